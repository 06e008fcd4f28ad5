"The speed figures: computed from events, by prompt, with the conditions they claim."
import csv
import numpy as np
import pytest
import torch
from tpro_nb import eagle_decoding as ed, eagle_speedup as es
from tpro_nb.core import read_jsonl, toy_model, check_metrics
from tpro_nb.eagle_draft import random_draft

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
    m = es.speed_metrics(T, dict(tried=[dict(tree=[2, 2, 3], predicted=1.7)]), "base")
    assert m["acceptance_length"] == pytest.approx(24/10) and m["acceptance_rate_pct"] == pytest.approx(100*14/30, abs=1e-3)
    assert m["plain_ms_per_token"] == 10 and m["eagle_ms_per_token"] == 6.25 and m["break_even_acceptance_length"] == 1.5
    assert m["speedup_lo"] <= m["speedup"] <= m["speedup_hi"] and m["speedup_lo"] == pytest.approx(120/90, abs=1e-3)
    assert m["speedup_t08"] is None and m["speedup_vs_hf_generate"] is None and m["tree"] == "2x2x3"
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

@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    d = tmp_path_factory.mktemp("speed")
    n = torch.get_num_threads(); torch.set_num_threads(1)
    toy_model(d/"model"); random_draft(d/"draft", d/"model", hot=list(range(0, 500, 5)))
    rows = [dict(r, prompt=r["prompt"]) for r in ed.PROOF_PROMPTS]
    rows = es.prepared(d/"model", rows, 4)
    info = es.measure(str(d/"model"), str(d/"draft"), rows, rows[:1], [[1, 1, 1], [2, 2, 4]], 10, 6, es.end_ids(d/"model"), [1, 3], 2, 2, .8, 400, "cpu", "base", str(d), 0)
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
    assert {1, 2, 3, 5} <= {int(k) for k in info["forward_ms"]}

def test_same_text_and_known_keys(measured):
    info, events, rows, d = measured
    text = {}
    for e in events:
        if e["run"] in ("plain", "eagle"):
            t = ([e["tree"]["tokens"][i] for i in e["accepted"]] + [e["bonus"]])[:e["emitted"]]
            text.setdefault((e["request"], e["run"]), []).extend(t)
    if info["engine"] == "c":
        for r in rows: assert text[r["request"], "plain"] == text[r["request"], "eagle"]
    T = es.totals(events)
    check_metrics("14_eagle_speedup", es.speed_metrics(T, info, "base") | es.speed_metrics(T, None, "chain", "chain_"))
    es.write_csv(d/"speed.csv", es.groups(T))
    got = list(csv.DictReader(open(d/"speed.csv", newline="", encoding="utf-8")))
    assert len(got) == len({(r["domain"], r["mode"]) for r in rows}) and all(float(r["speedup"]) > 0 for r in got)
