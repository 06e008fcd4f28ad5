"The speed figures: computed from events, by prompt, with the conditions they claim."

import csv
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tpro_nb import cost_model, decoder, eagle_decoding, eagle_speedup, speed_figures, trees
from tpro_nb.core import UserError, check_metrics, read_jsonl, toy_model
from tpro_nb.draft_model import EagleDraft, random_draft
from tpro_nb.target_text import general_prompts


def event(run, request, draft_ms, verify_ms, accepted, emitted=None, nodes=3):
    "A step whose tree has `nodes` drafted nodes; all that was verified is emitted if not said."
    return dict(
        target="base",
        run=run,
        request=request,
        domain="d",
        mode="direct",
        lang="ru",
        position=5,
        draft_ms=draft_ms,
        verify_ms=verify_ms,
        accepted=accepted,
        bonus=0,
        emitted=len(accepted) + 1 if emitted is None else emitted,
        tree=dict(parents=[-1] + [0] * nodes, tokens=[0] * (nodes + 1)),
    )


def plain_step(request="a", ms=10.0):
    return event("plain", request, None, ms, [], nodes=0)


def drafted_step(request, accepted, emitted=None):
    return event("eagle", request, 5.0, 10.0, accepted, emitted)


EVENTS = (
    [plain_step("a")] * 12
    + [plain_step("b")] * 12
    + [drafted_step("a", [1, 2])] * 4
    + [drafted_step("b", [1])] * 6
)


def test_ratios_by_hand():
    totals = speed_figures.request_totals(EVENTS)
    eagle = totals["base", "eagle"]
    assert eagle["a"].tokens == eagle["b"].tokens == 12
    assert eagle["a"].ms == 60
    assert eagle["b"].ms == 90
    speedup = speed_figures.speedup_between(totals["base", "plain"], eagle)
    assert speedup.value == pytest.approx(240 / 150)
    judged = dict(tree=[2, 2, 3], predicted=1.7, predicted_lo=1.5, predicted_hi=1.9)
    metrics = speed_figures.speed_metrics(totals, dict(judged=judged), "base")
    assert metrics["acceptance_length"] == pytest.approx(24 / 10)
    assert metrics["acceptance_rate_pct"] == pytest.approx(100 * 14 / 30, abs=1e-3)
    assert metrics["plain_ms_per_token"] == 10
    assert metrics["eagle_ms_per_token"] == 6.25
    assert metrics["break_even_acceptance_length"] == 1.5
    assert metrics["speedup_lo"] <= metrics["speedup"] <= metrics["speedup_hi"]
    assert metrics["speedup_lo"] == pytest.approx(120 / 90, abs=1e-3)
    assert metrics["speedup_t08"] is None
    assert metrics["speedup_vs_hf_generate"] is None
    assert metrics["tree"] == "2x2x3"
    assert metrics["speedup_predicted"] == 1.7
    assert metrics["speedup_predicted_lo"] == 1.5
    assert metrics["speedup_predicted_hi"] == 1.9
    ratio = metrics["acceptance_length"] / metrics["break_even_acceptance_length"]
    assert metrics["speedup"] == pytest.approx(ratio)


def test_tokens_cut_by_the_limit_are_not_counted_as_speed():
    cut = [plain_step()] * 2 + [drafted_step("a", [1, 2], emitted=2)]
    totals = speed_figures.request_totals(cut)
    eagle = totals["base", "eagle"]
    speedup = speed_figures.speedup_between(totals["base", "plain"], eagle)
    assert speedup.value == pytest.approx(20 / 15)
    # acceptance length still counts what verification gave
    assert speed_figures.ratio_of_totals(eagle, "yielded", "steps").value == 3


def test_other_texts_compare_per_token():
    "A baseline whose text is longer is scaled to the same number of tokens."
    slow = [event("transformers", "a", None, 20.0, [])] * 24
    fast = [event("eagle", "a", 2.0, 8.0, [1])] * 6
    totals = speed_figures.request_totals(slow + fast)
    speedup = speed_figures.speedup_between(totals["base", "transformers"], totals["base", "eagle"])
    assert speedup.value == pytest.approx(20 * 12 / 60)


def test_paper_points_are_the_tables():
    points = np.array(cost_model.PAPER_20 + cost_model.PAPER_21)
    assert len(cost_model.PAPER_20) == 14
    assert len(cost_model.PAPER_21) == 13
    prices = points[:, 0] / points[:, 1]
    assert prices.min() > 1.72
    assert prices.max() < 1.86
    speedups = [point.speedup for point in cost_model.PAPER_21]
    assert np.mean(speedups) == pytest.approx(1.79, abs=0.01)


def test_acceptance_by_depth():
    events = [event("eagle", "a", 1, 1, accepted) for accepted in ([], [1], [1, 2], [1])]
    assert speed_figures.acceptance_by_depth(events) == [0.75, 0.25]


def echo_draft(folder, model, hot):
    """A draft that guesses the next feature to be the last one.

    It is right where the target repeats a token that is hot, wrong elsewhere."""
    random_draft(folder, model, hot)
    draft = EagleDraft.load(folder)
    hidden = draft.config["hidden_size"]
    layer = draft.layers[0]
    with torch.no_grad():
        for weight in (
            draft.fc.weight,
            draft.fc.bias,
            layer.self_attn.o_proj.weight,
            layer.mlp.down_proj.weight,
        ):
            weight.zero_()
        draft.fc.weight[:, hidden:] = torch.eye(hidden)
    draft.save(folder)


class Measured(NamedTuple):
    "What `measure_speed` gave for the toy."

    info: dict
    events: list[dict]
    rows: list[dict]
    folder: Path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = folder / "model"
    toy_model(model)
    echo_draft(folder / "draft", model, [i for i in range(510) if i not in (300, 301)])
    random_draft(folder / "shipped", model)
    # the toy repeats its last token; two of the four are not hot
    rows = []
    for i, row in enumerate(eagle_speedup.prepared_prompts(model, eagle_decoding.PROOF_PROMPTS, 4)):
        rows.append(row | dict(ids=row["ids"] + [300 + i]))
    plan = eagle_speedup.SpeedPlan(
        model=str(model),
        draft=str(folder / "draft"),
        shipped=str(folder / "shipped"),
        name="base",
        work=str(folder),
        rows=rows,
        dev=rows[:1],
        judge=rows[1:3],
        shapes=[[1, 1, 1], [2, 2, 4]],
        new=10,
        dev_new=6,
        judge_new=8,
        eos=eagle_speedup.end_ids(model),
        sizes=[1, 3],
        baselines=2,
        sampled=2,
        temperature=0.8,
        context=400,
        device="cpu",
        seed=0,
        vocabs=[40, 5000],
        temperatures=[0.0, 1.0],
    )
    info = eagle_speedup.measure_speed(**asdict(plan))
    torch.set_num_threads(threads)
    return Measured(info, read_jsonl(folder / "base.jsonl"), rows, folder)


def test_measure_runs_every_contestant_in_rotating_order(measured):
    info = measured.info
    totals = speed_figures.request_totals(measured.events)
    runs = ("plain", "eagle", "plain_t", "eagle_t", "transformers", "prompt_lookup")
    targets = ("base", "shipped")
    assert set(totals) == {(target, run) for target in targets for run in runs}
    assert len(totals["base", "plain"]) == len(totals["base", "eagle"]) == 4
    assert len(totals["base", "transformers"]) == len(totals["base", "eagle_t"]) == 2
    first = {}
    for step in measured.events:
        first.setdefault(step["request"], step["run"])
    assert len(set(first.values())) > 1
    assert {tuple(trial["tree"]) for trial in info["tried"]} == {(1, 1, 1), (2, 2, 4)}
    assert info["tried"][0]["predicted"] >= info["tried"][1]["predicted"]
    assert {1, 2, 3, 5} <= {int(rows) for rows in info["forward_ms"]}
    assert {1, 2, 5} == {int(rows) for rows in info["loop_ms"]}


def test_a_second_draft_shares_what_has_none_and_is_measured_for_itself(measured):
    info, totals = measured.info, speed_figures.request_totals(measured.events)
    for run in ("plain", "plain_t", "transformers", "prompt_lookup"):
        assert totals["base", run] == totals["shipped", run]
    for run in ("eagle", "eagle_t"):
        assert totals["base", run] != totals["shipped", run]
    echo, rival = info["judged"], info["shipped"]["judged"]
    assert rival["plain_ms"] == echo["plain_ms"]
    assert rival["prompts"] == echo["prompts"] == 2
    assert rival["tree"] == info["shipped"]["tried"][0]["tree"]
    assert rival["acceptance_length"] < echo["acceptance_length"]  # it has learned nothing
    told = info | dict(static=None, vocabs=[], temperatures=[]) | info["shipped"]
    metrics = speed_figures.speed_metrics(totals, told, "shipped", "shipped_")
    own = speed_figures.speed_metrics(totals, info, "base")
    assert metrics["shipped_plain_ms_per_token"] == own["plain_ms_per_token"]
    assert metrics["shipped_speedup"] < own["speedup"]
    check_metrics("14c_eagle_speedup", metrics)


def test_transformers_is_given_the_conditions_that_suit_it_best(measured):
    "Waiting, threads, precision and guess length are all tried, and the cheapest is kept."
    trials = [eagle_speedup.BaselineTrial(*trial) for trial in measured.info["baselines"]]
    tried = [(trial.wait, trial.dtype, trial.lookup) for trial in trials if trial.threads == 1]
    for wait in ("", "PASSIVE"):
        for dtype in ("bfloat16", "float32"):
            for lookup in eagle_speedup.LOOKUPS:
                assert (wait, dtype, lookup) in tried
    assert all(trial.ms_per_token > 0 for trial in trials)


def test_the_cheapest_conditions_stay_and_lookup_follows_them():
    def trial(wait, lookup, cost, dtype="bfloat16"):
        return eagle_speedup.BaselineTrial(wait, 2, dtype, lookup, cost)

    slow, quick = trial("", 0, 40.0), trial("PASSIVE", 0, 30.0, "float32")
    elsewhere, here, worse = (
        trial("", 3, 10.0),
        trial("PASSIVE", 10, 25.0),
        trial("PASSIVE", 3, 26.0),
    )
    trials = [slow, elsewhere, here, quick, worse]
    assert eagle_speedup.best_trials(trials) == (quick, here)


def test_a_baseline_has_an_environment_of_its_own(measured, monkeypatch):
    "The waiting policy reaches the baseline's process, unset too, and ours keeps its own."
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    for wait in ("", "PASSIVE"):
        conditions = eagle_speedup.BaselineConditions(wait, 1)
        baseline = eagle_speedup.Baseline(str(measured.folder / "model"), "cpu", conditions, [])
        found = baseline.pool.submit(os.getenv, "OMP_WAIT_POLICY", "").result()
        baseline.close()
        assert found == wait
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_forward_times_take_the_call_that_decoding_makes(measured, monkeypatch):
    "Timed is the target's `greedy`, as many rows as asked, the prefix behind them; nothing else."
    dec = decoder.Decoder(measured.folder / "model", dtype="float32", context=64)
    calls = []
    real = dec.target.greedy

    def greedy(embed, rows, head):
        calls.append((len(rows), rows[0].position, rows[0].past, len(rows[-1].others)))
        return real(embed, rows, head)

    monkeypatch.setattr(dec.target, "greedy", greedy)
    times = cost_model.forward_times(dec, [1, 5], rounds=2)
    assert list(times) == [1, 5]
    assert min(times.values()) > 0
    assert calls == [(1, 58, 58, 1), (5, 58, 58, 5)] * 3


def test_same_text_and_known_keys(measured):
    info, events, rows, folder = measured
    text = {}
    for step in events:
        if step["run"] in ("plain", "eagle"):
            drafted = step["tree"]["tokens"]
            tokens = [drafted[node] for node in step["accepted"]] + [step["bonus"]]
            key = (step["request"], step["run"], step["target"])
            text.setdefault(key, []).extend(tokens[: step["emitted"]])
    eagle = [step for step in events if (step["run"], step["target"]) == ("eagle", "base")]
    accepted = [len(step["accepted"]) for step in eagle]
    assert max(accepted) > 0, "no draft token was accepted: the comparison would show nothing"
    assert min(accepted) == 0, "none was refused: the comparison would show nothing"
    assert sum(step["emitted"] > 1 for step in eagle) > 3
    if info["engine"] == "c":
        for row in rows:
            plain = text[row["request"], "plain", "base"]
            for target in ("base", "shipped"):
                assert text[row["request"], "eagle", target] == plain
    totals = speed_figures.request_totals(events)
    metrics = speed_figures.speed_metrics(totals, info, "base")
    metrics |= speed_figures.speed_metrics(totals, None, "chain", "chain_")
    check_metrics("14c_eagle_speedup", metrics)
    speed_figures.write_csv(folder / "speed.csv", speed_figures.speed_by_domain(totals))
    with open(folder / "speed.csv", newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 2 * len({(row["domain"], row["mode"]) for row in rows})
    assert all(float(row["speedup"]) > 0 for row in written)


def test_forecast_counts_what_is_kept():
    def step(emitted=None):
        return event("eagle", "a", 1.0, 9.0, [1, 2], emitted)

    told = cost_model.forecast([plain_step()] * 3, [step(), step(), step(1)], (2, 1, 2))
    assert told["acceptance_length"] == 3
    assert told["predicted"] == pytest.approx(7 / 3, abs=1e-4)


def test_sweeps_of_the_chosen_tree(measured):
    info = measured.info
    greedy = info["tried"][0]["acceptance_length"]
    by_temperature = {trial["temperature"]: trial for trial in info["temperatures"]}
    assert set(by_temperature) == {0.0, 1.0}
    assert by_temperature[0.0]["acceptance_length"] == pytest.approx(greedy)
    assert by_temperature[0.0]["speedup"] > 0
    assert 1 <= info["static"] <= 5
    dec = decoder.Decoder(measured.folder / "model", measured.folder / "draft", context=400)
    cold, hot = eagle_speedup.sweep_temperatures(
        dec, measured.rows, (2, 2, 4), 10, [], [0.0, 5.0], 0
    )
    # the echo is right only where the target is greedy
    assert cold["acceptance_length"] > hot["acceptance_length"] >= 1


def parts_of(profile):
    "The milliseconds of a profile's line."
    return [value for key, value in profile.items() if key != "name"]


def test_the_parts_of_a_pass_add_up(measured):
    info = measured.info
    if info["engine"] != "c":
        pytest.skip("no compiler")
    hf, one, tree = info["profile"]
    rows = info["judged"]["tree"][2] + 1
    assert hf["name"] == "transformers, 1 row"
    assert one["name"] == "our kernels, 1 row"
    assert tree["name"] == f"our kernels, {rows} rows"
    for part in (one, tree):
        assert min(part["products"], part["attention"], part["head"]) > 0
    assert all(part["rest"] >= 0 for part in (hf, one, tree))
    assert sum(parts_of(hf)) > sum(parts_of(one))


def test_scores_with_and_without_the_draft_are_compared_answer_by_answer(measured, monkeypatch):
    model, draft = str(measured.folder / "model"), str(measured.folder / "draft")
    problems = [dict(question=f"Сколько будет 2 + {i}?", verifiable_answer="5") for i in range(2)]
    found = eagle_speedup.invariance(model, draft, problems, [2, 2, 4], 10)
    assert (found["diff"], found["same"], found["answers"]) == (0.0, 100.0, 4)
    right = trees.verify_greedy

    def wrong_below_a_root(tree, best):
        return ([], (best[0] + 1) % 500) if len(tree) > 1 else right(tree, best)

    def every_second(answers, *_, **__):
        return ["correct" if i % 2 else "wrong" for i, _ in enumerate(answers)]

    monkeypatch.setattr(decoder, "verify_greedy", wrong_below_a_root)
    monkeypatch.setattr(eagle_speedup, "grade_many", every_second)
    wrong = eagle_speedup.invariance(model, draft, problems, [2, 2, 4], 10)
    assert wrong["same"] < 100
    assert wrong["correct"] == 50


def test_forecast_is_measured_on_prompts_that_did_not_choose(measured):
    info = measured.info
    judged = info["judged"]
    whole, cut = info["vocabs"]
    assert (whole["tokens"], cut["tokens"]) == (508, 40)
    assert whole["acceptance_length"] >= cut["acceptance_length"] >= 1
    assert judged["tree"] == info["tried"][0]["tree"]
    assert judged["prompts"] == 2
    assert judged["acceptance_length"] > 1
    uncut = cost_model.speedup(
        judged["acceptance_length"], judged["draft_ms"], judged["verify_ms"], judged["plain_ms"]
    )
    assert 0 < judged["predicted"] <= uncut * 1.001
    assert judged["predicted_lo"] <= judged["predicted"] <= judged["predicted_hi"]


class Scripted:
    "A decoder whose steps cost and yield what a list says."

    def __init__(self):
        self.order = []

    def generate(self, ids, new, tree=None, eos=None, events=None, meta=None):
        request = meta["request"]
        self.order.append((request, tree))
        for ms in (10.0, 10.0, 40.0):
            if tree:
                events.append(event("x", request, 5.0, ms, [1] * ids[0]))
            else:
                events.append(event("x", request, None, ms, [], nodes=0))


def test_forecast_takes_means_in_turn_and_the_interval_of_tau():
    dec = Scripted()
    shape = (3, 3, 7)
    rows = []
    for i, accepted in enumerate([1, 2, 1, 2]):
        labels = dict(request=f"r{i}", domain="d", mode="direct", lang="en")
        rows.append(labels | dict(ids=[accepted]))
    log = cost_model.decode_in_turn(dec, rows, [None, shape], 8, None)
    judged = cost_model.forecast(log[None], log[shape], shape)
    # one busy second does not hit one side only
    assert dec.order[:4] == [("r0", None), ("r0", shape), ("r1", shape), ("r1", None)]
    # the sum counts in the measured figure, so it does here
    assert judged["plain_ms"] == 20
    assert judged["draft_ms"] == 5
    assert judged["verify_ms"] == 20
    assert judged["acceptance_length"] == 2.5
    assert judged["predicted"] == pytest.approx(2.5 * 20 / 25, abs=1e-3)
    assert judged["predicted_lo"] == pytest.approx(2 * 20 / 25, abs=1e-3)
    assert judged["predicted_hi"] == pytest.approx(3 * 20 / 25, abs=1e-3)
    assert cost_model.forecast([], [], shape)["predicted"] is None


def topics_of(rows):
    return {row["id"].rsplit("-", 1)[0] for row in rows}


def test_more_development_prompts_are_nobody_elses():
    own = general_prompts(3)
    more = cost_model.more_prompts(own["dev"], 3)
    texts = {row["prompt"] for row in more}
    assert len(more) == 5 * len(own["dev"])
    assert len(texts) == len(more)
    for split in own.values():
        assert not texts & {row["prompt"] for row in split}
    assert topics_of(more) == topics_of(own["dev"])
    assert not topics_of(more) & topics_of(own["eval"] + own["train"])
    assert cost_model.more_prompts(eagle_decoding.PROOF_PROMPTS, 3) == []


def test_scatter_draws_the_pooled_point():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    rows = [dict(target="base", acceptance_length=1.9, speedup=1.2)]
    own = dict(base=1.55, chain=None)
    pooled = dict(base=(1.92, 1.24), chain=(None, None))
    speed_figures.plot_scatter(ax, rows, own, pooled, "t")
    stars = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "*"]
    plt.close(figure)
    assert stars == [[[1.92, 1.24]]]


def test_loop_times_are_medians_that_never_fall():
    log = {
        None: [plain_step(ms=ms) for ms in (8.0, 8.0, 90.0)],
        (2, 1, 2): [event("e", "a", 1.0, 12.0, [], nodes=2)] * 3,
        (3, 1, 3): [event("e", "a", 1.0, 10.0, [], nodes=3)],
    }
    # 12 three times and 10 once: a larger pass is not cheaper
    assert cost_model.loop_times(log) == pytest.approx({1: 8.0, 3: 11.5, 4: 11.5})


def test_no_answer_on_development_prompts_is_said():
    class Silent:
        def generate(self, *args, **kwargs):
            pass

    rows = [dict(ids=[1], request="r", domain="d", mode="direct", lang="en")]
    with pytest.raises(UserError, match="development prompt"):
        cost_model.choose_tree(Silent(), rows, [[1, 1, 1]], 8, None)
