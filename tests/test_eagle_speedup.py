"The speed figures: computed from events, by prompt, with the conditions they claim."
import csv
import numpy as np
import pytest
import torch
from tpro_nb import eagle_decoding as ed, eagle_speedup as es
from tpro_nb.core import UserError, read_jsonl, toy_model, check_metrics
from tpro_nb.eagle_draft import EagleDraft, general_prompts, random_draft

def event(run, request, draft_ms, verify_ms, accepted, emitted=None, target="base", domain="d", mode="direct", nodes=3):
    return dict(target=target, run=run, request=request, domain=domain, mode=mode, lang="ru", position=5, draft_ms=draft_ms, verify_ms=verify_ms,
                accepted=accepted, bonus=0, emitted=len(accepted) + 1 if emitted is None else emitted, tree=dict(parents=[-1] + [0]*nodes, tokens=[0]*(nodes + 1)))

EVENTS = ([event("plain", r, None, 10., [], nodes=0) for r in "ab" for _ in range(12)] +
          [event("eagle", "a", 5., 10., [1, 2])]*4 + [event("eagle", "b", 5., 10., [1])]*6)

def test_ratios_by_hand():
    T = es.totals(EVENTS)
    e = T["base", "eagle"]
    assert e["a"]["tokens"] == e["b"]["tokens"] == 12 and e["a"]["ms"] == 60 and e["b"]["ms"] == 90
    assert es.against(T["base", "plain"], e)[0] == pytest.approx(240/150)
    m = es.speed_metrics(T, dict(judged=dict(tree=[2, 2, 3], predicted=1.7, predicted_lo=1.5, predicted_hi=1.9)), "base")
    assert m["acceptance_length"] == pytest.approx(24/10) and m["acceptance_rate_pct"] == pytest.approx(100*14/30, abs=1e-3)
    assert m["plain_ms_per_token"] == 10 and m["eagle_ms_per_token"] == 6.25 and m["break_even_acceptance_length"] == 1.5
    assert m["speedup_lo"] <= m["speedup"] <= m["speedup_hi"] and m["speedup_lo"] == pytest.approx(120/90, abs=1e-3)
    assert m["speedup_t08"] is None and m["speedup_vs_hf_generate"] is None and m["tree"] == "2x2x3"
    assert (m["speedup_predicted"], m["speedup_predicted_lo"], m["speedup_predicted_hi"]) == (1.7, 1.5, 1.9)
    assert m["speedup"] == pytest.approx(m["acceptance_length"]/m["break_even_acceptance_length"])

def test_tokens_cut_by_the_limit_are_not_counted_as_speed():
    T = es.totals([event("plain", "a", None, 10., [], nodes=0)]*2 + [event("eagle", "a", 5., 10., [1, 2], emitted=2)])
    assert es.against(T["base", "plain"], T["base", "eagle"])[0] == pytest.approx(20/15)
    assert es.per(T["base", "eagle"], "emitted", "steps")[0] == 3          # acceptance length still counts what verification gave

def test_other_texts_compare_per_token():
    "A baseline whose text is longer is scaled to the same number of tokens."
    T = es.totals([event("transformers", "a", None, 20., [])]*24 + [event("eagle", "a", 2., 8., [1])]*6)
    assert es.against(T["base", "transformers"], T["base", "eagle"])[0] == pytest.approx(20*12/60)

def test_paper_points_are_the_tables():
    p = np.array(es.PAPER_20 + es.PAPER_21)
    assert len(es.PAPER_20) == 14 and len(es.PAPER_21) == 13
    assert (p[:, 0]/p[:, 1]).min() > 1.72 and (p[:, 0]/p[:, 1]).max() < 1.86
    assert np.mean([s for _, s in es.PAPER_21]) == pytest.approx(1.79, abs=.01)

def test_acceptance_by_depth():
    assert es.acceptance_by_depth([event("eagle", "a", 1, 1, a) for a in ([], [1], [1, 2], [1])]) == [.75, .25]

def echo_draft(folder, model, hot):
    "A draft that guesses the next feature to be the last one: right where the target repeats a token that is hot, wrong elsewhere."
    random_draft(folder, model, hot)
    d = EagleDraft.load(folder); H = d.config["hidden_size"]
    with torch.no_grad():
        for w in (d.fc.weight, d.fc.bias, d.layers[0].self_attn.o_proj.weight, d.layers[0].mlp.down_proj.weight): w.zero_()
        d.fc.weight[:, H:] = torch.eye(H)
    d.save(folder)

@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    d = tmp_path_factory.mktemp("speed")
    n = torch.get_num_threads(); torch.set_num_threads(1)
    toy_model(d/"model"); echo_draft(d/"draft", d/"model", [i for i in range(510) if i not in (300, 301)])
    rows = [dict(r, prompt=r["prompt"]) for r in ed.PROOF_PROMPTS]
    rows = [r | dict(ids=r["ids"] + [300 + i]) for i, r in enumerate(es.prepared(d/"model", rows, 4))]     # the toy repeats its last token; two of the four are not hot
    info = es.measure(str(d/"model"), str(d/"draft"), rows, rows[:1], rows[1:3], [[1, 1, 1], [2, 2, 4]], 10, 6, 8, es.end_ids(d/"model"), [1, 3], 2, 2, .8, 400, "cpu", "base", str(d), 0, vocabs=[40, 5000], temperatures=[0.0, 1.0])
    torch.set_num_threads(n)
    return info, read_jsonl(d/"base.jsonl"), rows, d

def test_measure_runs_every_contestant_in_rotating_order(measured):
    info, events, rows, _ = measured
    T = es.totals(events)
    assert set(T) == {("base", r) for r in ("plain", "eagle", "plain_t", "eagle_t", "transformers", "prompt_lookup")}
    assert len(T["base", "plain"]) == len(T["base", "eagle"]) == 4 and len(T["base", "transformers"]) == len(T["base", "eagle_t"]) == 2
    first = {}
    for e in events: first.setdefault(e["request"], e["run"])
    assert len(set(first.values())) > 1
    assert {tuple(t["tree"]) for t in info["tried"]} == {(1, 1, 1), (2, 2, 4)} and info["tried"][0]["predicted"] >= info["tried"][1]["predicted"]
    assert {1, 2, 3, 5} <= {int(k) for k in info["forward_ms"]} and {1, 2, 5} == {int(k) for k in info["loop_ms"]}

def test_forward_times_take_the_call_that_decoding_makes(measured, monkeypatch):
    "What is timed is the target's `greedy`, as many rows as asked, the prefix behind them; and no other pass."
    dec, calls = ed.Decoder(measured[3]/"model", dtype="float32", context=64), []
    real = dec.target.greedy
    def greedy(embed, tokens, head, pos, past, slot, seen): calls.append((len(tokens), pos[0], past, len(seen))); return real(embed, tokens, head, pos, past, slot, seen)
    monkeypatch.setattr(dec.target, "greedy", greedy)
    times = es.forward_times(dec, [1, 5], rounds=2)
    assert list(times) == [1, 5] and min(times.values()) > 0
    assert calls == [(q, 58, 58, q) for _ in range(3) for q in (1, 5)]

def test_same_text_and_known_keys(measured):
    info, events, rows, d = measured
    text = {}
    for e in events:
        if e["run"] in ("plain", "eagle"):
            t = ([e["tree"]["tokens"][i] for i in e["accepted"]] + [e["bonus"]])[:e["emitted"]]
            text.setdefault((e["request"], e["run"]), []).extend(t)
    steps = [len(e["accepted"]) for e in events if e["run"] == "eagle"]
    assert max(steps) > 0 and min(steps) == 0, "no draft token was accepted, or none refused: the comparison would show nothing"
    assert sum(e["emitted"] > 1 for e in events if e["run"] == "eagle") > 3
    if info["engine"] == "c":
        for r in rows: assert text[r["request"], "plain"] == text[r["request"], "eagle"]
    T = es.totals(events)
    check_metrics("14_eagle_speedup", es.speed_metrics(T, info, "base") | es.speed_metrics(T, None, "chain", "chain_"))
    es.write_csv(d/"speed.csv", es.groups(T))
    got = list(csv.DictReader(open(d/"speed.csv", newline="", encoding="utf-8")))
    assert len(got) == len({(r["domain"], r["mode"]) for r in rows}) and all(float(r["speedup"]) > 0 for r in got)

def test_forecast_counts_what_is_kept():
    step = lambda emitted=None: event("eagle", "a", 1., 9., [1, 2], emitted)
    f = es.forecast([event("plain", "a", None, 10., [], nodes=0)]*3, [step(), step(), step(1)], (2, 1, 2))
    assert f["acceptance_length"] == 3 and f["predicted"] == pytest.approx(7/3, abs=1e-4)

def test_sweeps_of_the_chosen_tree(measured):
    info = measured[0]
    greedy = info["tried"][0]["acceptance_length"]
    by = {r["temperature"]: r for r in info["temperatures"]}
    assert set(by) == {0.0, 1.0} and by[0.0]["acceptance_length"] == pytest.approx(greedy) and by[0.0]["speedup"] > 0 and 1 <= info["static"] <= 5
    _, _, rows, d = measured
    cold, hot = es.sweep_temperatures(ed.Decoder(d/"model", d/"draft", context=400), rows, (2, 2, 4), 10, [], [0.0, 5.0], 0)
    assert cold["acceptance_length"] > hot["acceptance_length"] >= 1, "the echo is right only where the target is greedy"

def test_the_parts_of_a_pass_add_up(measured):
    info = measured[0]
    if info["engine"] != "c": pytest.skip("no compiler")
    hf, one, tree = info["profile"]
    assert [p["name"] for p in (hf, one, tree)] == ["transformers, 1 row", "our kernels, 1 row", f"our kernels, {info['judged']['tree'][2] + 1} rows"]
    assert all(min(p["products"], p["attention"], p["head"]) > 0 for p in (one, tree)) and all(p["rest"] >= 0 for p in (hf, one, tree))
    assert sum(v for k, v in hf.items() if k != "name") > sum(v for k, v in one.items() if k != "name")

def test_scores_with_and_without_the_draft_are_compared_answer_by_answer(measured, monkeypatch):
    d = measured[3]
    problems = [dict(question=f"Сколько будет 2 + {i}?", verifiable_answer="5") for i in range(2)]
    got = es.invariance(str(d/"model"), str(d/"draft"), problems, [2, 2, 4], 10)
    assert (got["diff"], got["same"], got["answers"]) == (0.0, 100.0, 4)
    verify = ed.verify_greedy
    monkeypatch.setattr(ed, "verify_greedy", lambda t, b: ([], (b[0] + 1) % 500) if len(t) > 1 else verify(t, b))
    monkeypatch.setattr(es, "grade_many", lambda pairs: ["correct" if i % 2 else "wrong" for i, _ in enumerate(pairs)])
    wrong = es.invariance(str(d/"model"), str(d/"draft"), problems, [2, 2, 4], 10)
    assert wrong["same"] < 100 and wrong["correct"] == 50

def test_forecast_is_measured_on_prompts_that_did_not_choose(measured):
    info, events, rows, _ = measured
    j = info["judged"]
    assert [v["tokens"] for v in info["vocabs"]] == [508, 40] and info["vocabs"][0]["acceptance_length"] >= info["vocabs"][1]["acceptance_length"] >= 1
    assert j["tree"] == info["tried"][0]["tree"] and j["prompts"] == 2 and j["acceptance_length"] > 1
    assert 0 < j["predicted"] <= es.speedup(j["acceptance_length"], j["draft_ms"], j["verify_ms"], j["plain_ms"])*1.001
    assert j["predicted_lo"] <= j["predicted"] <= j["predicted_hi"]

class Scripted:
    "A decoder whose steps cost and yield what a list says."
    def __init__(self): self.order = []
    def generate(self, ids, new, tree=None, eos=None, events=None, meta=None):
        self.order.append((meta["request"], tree)); n = ids[0]
        for ms in (10., 10., 40.): events.append(event("x", meta["request"], tree and 5., ms, [1]*n if tree else [], nodes=3 if tree else 0))

def test_forecast_takes_means_in_turn_and_the_interval_of_tau():
    dec, rows = Scripted(), [dict(ids=[n], request=f"r{i}", domain="d", mode="direct", lang="en") for i, n in enumerate([1, 2, 1, 2])]
    log = es.in_turn(dec, rows, [None, (3, 3, 7)], 8, None)
    j = es.forecast(log[None], log[3, 3, 7], (3, 3, 7))
    assert dec.order[:4] == [("r0", None), ("r0", (3, 3, 7)), ("r1", (3, 3, 7)), ("r1", None)]       # one busy second does not hit one side only
    assert (j["plain_ms"], j["draft_ms"], j["verify_ms"], j["acceptance_length"]) == (20, 5, 20, 2.5)   # the sum counts in the measured figure, so it does here
    assert j["predicted"] == pytest.approx(2.5*20/25, abs=1e-3) and j["predicted_lo"] == pytest.approx(2*20/25, abs=1e-3) and j["predicted_hi"] == pytest.approx(3*20/25, abs=1e-3)
    assert es.forecast([], [], (3, 3, 7))["predicted"] is None

def test_more_development_prompts_are_nobody_elses():
    own = general_prompts(3); more = es.more_prompts(own["dev"], 3)
    assert len(more) == 5*len(own["dev"]) and len({r["prompt"] for r in more}) == len(more)
    assert not {r["prompt"] for r in more} & {r["prompt"] for s in own.values() for r in s}
    of = lambda rows: {r["id"].rsplit("-", 1)[0] for r in rows}
    assert of(more) == of(own["dev"]) and not of(more) & of(own["eval"] + own["train"])
    assert es.more_prompts(ed.PROOF_PROMPTS, 3) == []

def test_scatter_draws_the_pooled_point():
    import matplotlib; matplotlib.use("Agg"); import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    es.plot_scatter(ax, [dict(target="base", acceptance_length=1.9, speedup=1.2)], dict(base=1.55, chain=None), dict(base=(1.92, 1.24), chain=(None, None)), "t")
    stars = [l.get_xydata().tolist() for l in ax.lines if l.get_marker() == "*"]; plt.close(fig)
    assert stars == [[[1.92, 1.24]]]

def test_loop_times_are_medians_that_never_fall():
    log = {None: [event("p", "a", None, ms, [], nodes=0) for ms in (8., 8., 90.)], (2, 1, 2): [event("e", "a", 1., 12., [], nodes=2)]*3, (3, 1, 3): [event("e", "a", 1., 10., [], nodes=3)]}
    assert es.loop_times(log) == pytest.approx({1: 8., 3: 11.5, 4: 11.5})       # 12 three times and 10 once: a larger pass is not cheaper

def test_no_answer_on_development_prompts_is_said():
    class Silent:
        def generate(self, *a, **kw): pass
    rows = [dict(ids=[1], request="r", domain="d", mode="direct", lang="en")]
    with pytest.raises(UserError, match="development prompt"): es.choose_tree(Silent(), rows, [[1, 1, 1]], 8, None)
