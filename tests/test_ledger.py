"The ledger: every row has what it needs, rules meet edge cases, verdicts follow from metrics."

import re
from collections import defaultdict
from fnmatch import fnmatchcase

import pytest
import yaml
from conftest import ROOT

from tpro_nb import core, ledger, paper, studies

FULL = dict(
    tokens_added=34000,
    vocab_size=151669,
    unreachable_added=0,
    unreachable_kept_new=0,
    ru_tok_ratio=0.71,
    ru_tok_ratio_lo=0.70,
    ru_tok_ratio_hi=0.72,
)
RUN = {
    "01_tokenizer_analysis": dict(vocab_size=151669),
    "02c_tokenizer_surgery": FULL,
    "10_evaluation": dict(
        diff_think_minus_direct_sft=0.3,
        diff_think_minus_direct_sft_lo=0.2,
        diff_think_minus_direct_sft_hi=0.4,
    ),
    "14c_eagle_speedup": dict(
        speedup=1.4,
        speedup_lo=1.3,
        speedup_hi=1.5,
        acceptance_length=2.4,
        acceptance_length_lo=2.3,
        acceptance_length_hi=2.5,
    ),
}
DIRECTION = "direction holds at small scale"


def by_id(rows):
    return {row["id"]: row for row in rows}


def with_ends(name, value, low=None, high=None):
    "A metric and its interval as a stage writes them."
    return {name: value, f"{name}_lo": low, f"{name}_hi": high}


def keys_named(row):
    "What a row's rules and its column `beside` name, as (stages, metric)."
    text = " ".join([row["rule"], row["full_if"], row["beside"]])
    return re.findall(r"([\w|]+)/(\w+)", text)


def test_there_are_many_claims_and_each_has_its_own_id():
    rows = ledger.claim_table()
    assert len(rows) >= 60
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("row", ledger.claim_table(), ids=lambda row: row["id"])
def test_every_claim_has_what_it_needs(row):
    assert row["area"] and row["source"] and row["claim"] and row["paper"]
    assert not (row["recompute"] and row["rule"])
    if row["recompute"]:
        assert row["recompute"].split(":")[0] in paper.RECOMPUTE
    else:
        assert row["cost"]
    if row["rule"]:
        assert row["on"]
        assert ledger.conditions_of(row["rule"])  # a ValueError for what is none
    if row["full_if"]:
        assert row["area"] == "tokenizer"
        assert "tokens_added >= 34000" in row["full_if"]
        assert "vocab_size = 151669" in row["full_if"]


def test_every_recomputation_is_used():
    calls = [row["recompute"] for row in ledger.claim_table() if row["recompute"]]
    assert {call.split(":")[0] for call in calls} == set(paper.RECOMPUTE)


def test_rules_name_stages_that_exist():
    stages = {file.stem for file in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    for row in ledger.claim_table():
        for named, _ in keys_named(row):
            assert set(named.split("|")) <= stages, (row["id"], named)


def test_rules_name_metrics_that_are_defined():
    table, unknown = core.metric_table(), set()
    for row in ledger.claim_table():
        for stages, name in keys_named(row):
            defined = [
                metric
                for metric in table
                if metric["stage"] in stages.split("|") and fnmatchcase(name, metric["key"])
            ]
            if not defined:
                unknown.add(f"{stages}/{name}")
    assert not unknown


def test_no_source_is_vague():
    place = re.compile(r"§|Table|App\.|Figure|Limitations|\(secondary\)|not in the paper")
    for row in ledger.claim_table():
        assert place.search(row["source"]), (row["id"], row["source"])
        assert not re.match(r"an? (summary|reading)", row["source"]), row["id"]
        assert "(a summary)" not in row["claim"], row["id"]
    for claim in ledger.ledger({}):
        assert claim["verdict"] in ledger.VERDICTS
        assert claim["source"]


@pytest.mark.parametrize(
    "interval, judged",
    [
        ((1.4, 1.2, 1.6), 1),
        ((1.4, 0.9, 1.9), 0),
        ((0.8, 0.7, 0.9), -1),
        ((1.4,), 0),
        ((None,), None),
    ],
)
def test_intervals_decide_and_points_do_not(interval, judged):
    metrics = {"14c_eagle_speedup": with_ends("speedup", *interval)}
    assert ledger.judge_claim("14c_eagle_speedup/speedup above 1", metrics) == judged


def test_without_a_run_nothing_is_judged():
    assert ledger.judge_claim("14c_eagle_speedup/speedup above 1", {}) is None


def test_what_is_no_rule_and_what_is_no_number_are_refused():
    with pytest.raises(ValueError):
        ledger.judge_claim("speedup is nice", {})
    for bad in (float("nan"), "1.4"):
        metrics = {"14c_eagle_speedup": with_ends("speedup", bad, 1.2, 1.6)}
        with pytest.raises(core.UserError, match="not a number"):
            ledger.judge_claim("14c_eagle_speedup/speedup above 1", metrics)


WIDE = {"7": with_ends("a", 60, 50, 70) | with_ends("b", 49, 39, 59)}
APART = {"7": with_ends("a", 60, 55, 65) | with_ends("b", 40, 35, 45)}
EXACT = {"7": with_ends("a", 60, 50, 70) | with_ends("b", 49)}


@pytest.mark.parametrize(
    "rule, metrics, judged",
    [
        ("7/a above 7/b", WIDE, 0),
        ("7/a below 7/b", WIDE, 0),
        ("7/a above 7/b", APART, 1),
        ("7/a below 7/b", APART, -1),
        ("7/a above 1.5*7/b", APART, 0),
        ("7/b below 7/a", APART, 1),
        ("7/a above 7/b", EXACT, 1),
    ],
)
def test_a_threshold_that_was_measured_has_noise_too(rule, metrics, judged):
    assert ledger.judge_claim(rule, metrics) == judged


def test_verdicts_of_a_run():
    rows = by_id(ledger.ledger(RUN, "a model", decides=True))
    assert rows["tok-34k"]["verdict"] == "reproduced at full scale"
    assert rows["tok-ru-here"]["verdict"] == "reproduced at full scale"
    assert rows["tok-152064"]["verdict"] == "contradicted"
    assert rows["sp-here"]["verdict"] == DIRECTION
    assert rows["sft-think"]["verdict"] == DIRECTION
    assert rows["sp-here"]["values"][0]["key"] == "14c_eagle_speedup/speedup"
    assert "a model" in rows["sp-here"]["on"]
    assert rows["dpo-gain"]["verdict"] == "not run here"
    assert "H100-hours" in rows["dpo-gain"]["why"]


def test_our_own_utilisation_proves_nothing():
    rows = by_id(ledger.ledger(RUN, "a model", decides=True))
    for plan in ("sft-plan", "dpo-plan"):
        assert rows[plan]["verdict"] == "not run here"
        assert "our assumption" in rows[plan]["why"]


def test_verdicts_are_counted():
    number = ledger.counts(ledger.ledger(RUN, "a model", decides=True))
    kinds = (
        "recomputed",
        "reproduced_full_scale",
        "direction_holds",
        "contradicted",
        "not_run",
    )
    assert number["claims_total"] == sum(number[f"claims_{kind}"] for kind in kinds)


def test_a_smaller_swap_is_no_full_reproduction():
    smaller = {"02c_tokenizer_surgery": FULL | dict(tokens_added=9000)}
    rows = by_id(ledger.ledger(smaller, decides=True))
    assert rows["tok-ru-here"]["verdict"] == "not run here"
    assert rows["tok-34k"]["verdict"] == "not run here"
    assert "9,000 tokens were swapped" in rows["tok-34k"]["why"]


def test_a_smaller_swap_is_undecided_not_a_contradiction():
    small = {
        "01_tokenizer_analysis": dict(vocab_size=151669),
        "02c_tokenizer_surgery": FULL | dict(tokens_added=300, vocab_size=20000),
    }
    rows = by_id(ledger.ledger(small, "a model", decides=False))
    assert rows["tok-34k"]["verdict"] == "not run here"
    assert rows["tok-152064"]["verdict"] == "contradicted"


@pytest.mark.parametrize("scale", [1, 1000])
def test_nothing_but_the_tokenizer_is_reproduced_however_good_the_numbers(scale):
    fake = defaultdict(dict)
    for row in ledger.claim_table():
        for condition in ledger.conditions_of(row["rule"]):
            stages, name = condition.key.split("/")
            first_stage = stages.split("|")[0]
            fake[first_stage] |= with_ends(name, 100.0 * scale, 99.0 * scale, 101.0 * scale)
    claims = ledger.ledger(dict(fake), decides=True)
    reproduced = [claim for claim in claims if claim["verdict"] == "reproduced at full scale"]
    assert {claim["area"] for claim in reproduced} <= {"tokenizer"}


def test_what_stands_beside_a_verdict_does_not_make_it():
    dpo = {
        "09_dpo": with_ends("dpo_gain_pct", 6.0, 3.0, 9.0),
        "10_evaluation": with_ends("diff_dpo_minus_sft_think", -0.01, -0.05, 0.03),
    }
    row = by_id(ledger.ledger(dpo, decides=True))["dpo-gain"]
    assert row["verdict"] == DIRECTION
    shown = [value["metric"] for value in row["values"]]
    assert shown == ["dpo_gain_pct", "diff_dpo_minus_sft_think"]
    assert "temperature" in row["on"]


def test_studies_that_the_ledger_names_are_there():
    files = (ROOT / "outputs" / "reference").glob("*/study_*.json")
    committed = {studies.read_study(file).file for file in files}
    assert {row["study"] for row in ledger.claim_table()} - {""} <= committed


@pytest.mark.parametrize(
    "low, high, verdict", [(0.05, 0.15, DIRECTION), (-0.05, 0.25, "not run here")]
)
def test_russian_bits_need_their_interval(low, high, verdict):
    metrics = {"06_midtraining": with_ends("ru_bpb_gain", 0.1, low, high)}
    assert by_id(ledger.ledger(metrics, decides=True))["mid-ru"]["verdict"] == verdict


def test_words_of_two_tokens_need_their_own_base():
    "Another text, whose base stands as high as the paper's result."
    surgery = FULL | dict(ru_le2_pct_base=60.0, ru_le2_pct_dense=61.0)
    rows = by_id(ledger.ledger({"02c_tokenizer_surgery": surgery}, decides=True))
    assert rows["tok-le2-here"]["verdict"] == DIRECTION


def test_smoke_decides_no_direction():
    rows = by_id(ledger.ledger(RUN, decides=False))
    assert rows["sp-here"]["verdict"] == "not run here"
    assert rows["sp-here"]["values"]
    assert "code runs" in rows["sp-here"]["why"]
    # counts over the real vocabulary are exact at any profile
    assert rows["tok-34k"]["verdict"] == "reproduced at full scale"
    assert yaml.safe_load((ROOT / "params/smoke/16d_claims.yaml").read_text())["decides"] is False
