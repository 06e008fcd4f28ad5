"The paper's arithmetic against hand-computed values; verdicts come from the tables."

import shutil

import pytest

from tpro_nb import ledger, paper

CALLS = [
    ("fastest:28", False, "2.28"),
    ("fastest:2.28", True, "T-Math"),
    ("table7_change:ruWiki:-24", True, "−23.7"),
    ("table8_largest_gain:ky", False, "Kazakh"),
    ("steps_from_tokens", None, "9,537"),
    ("modes_alike", False, "1.70"),
    ("table2_mean:direct:1.85:3.39", True, "3 benchmarks"),
    ("table2_mean:think:1.83:3.33", True, "4 benchmarks"),
    ("at_least:23:Qwen3-32B:AIME24:AIME25", False, "−0.043"),
    ("split:5:Qwen3-32B:4:4", True, "Vikhr"),
    ("cycle_cost", True, "1.80"),
    ("length_caps_speed", True, "0.58"),
    ("transitive_pairs", True, "12 pairs"),
    ("table13_without:ruCodeEval", False, "0.570 → 0.569"),
    ("table13_average", True, "0.5"),
    ("at_least:5:Qwen3-32B:T-Math", True, "0.3 standard"),
    (
        "table17_better:labels by DeepSeek-V3:labels by Qwen3-235B",
        None,
        "without focus it would be behind, 0.538 against 0.586",
    ),
    ("table17_better:with transitive pairs:without transitive pairs", True, "the same figures"),
    ("plan_beside:dpo", None, "1,840 with attention"),
    ("plan_beside:sft", None, "factor 1.02"),
    ("early_tokens", True, "4.19B"),
    ("gpu_hours:dpo:896", True, "896"),
    ("table16_delta", True, "5 rows"),
    ("table17_first", False, "Skywork"),
    ("compound", True, "2.4"),
]


@pytest.mark.parametrize("call, holds, says", CALLS)
def test_recomputations(call, holds, says):
    found = paper.recompute(call)
    assert found.holds is holds
    assert says in found.said


def test_knockout_by_brute_force():
    played = [paper.knockout_pairs(players) for players in (2, 4, 8, 16)]
    assert played == [(1, 1), (3, 4), (7, 12), (15, 32)]


def test_a_changed_table_changes_the_verdict(tmp_path, monkeypatch):
    "Verdicts come from the tables, not from the code."
    shutil.copytree(paper.tables_folder(), tmp_path / "tables")
    table = tmp_path / "tables" / "paper_table20.csv"
    table.write_text(table.read_text().replace("T-Math,0,think,2.28", "T-Math,0,think,28"))
    monkeypatch.setattr(paper, "tables_folder", lambda: tmp_path / "tables")
    paper.paper.cache_clear()
    try:
        assert paper.recompute("fastest:28").holds is True
        assert paper.recompute("length_caps_speed").holds is False
    finally:
        paper.paper.cache_clear()


def test_what_the_tables_leave_open_has_a_cost():
    for row in ledger.claim_table():
        if row["recompute"] and paper.recompute(row["recompute"]).holds is None:
            assert row["cost"], row["id"]
