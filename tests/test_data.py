"The corpus dealt out, and the stage twice with the same bytes."

import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from corpus_toys import problems_of_all

from tpro_nb import data, rows, tags, tmath
from tpro_nb.core import UserError, project_root, read_jsonl, toy, write_jsonl


def toy_sizes(**others) -> data.ShareSizes:
    sizes = dict(
        sft_per_family=12,
        sft_general=10,
        midtrain_chars=4000,
        midtrain_problems_share=0.4,
        english_pct=10,
        prompts=dict(rm_train=6, eagle=8),
    )
    return data.ShareSizes(**(sizes | others))


def pool_of(docs: int) -> list[dict]:
    "Sixty problems a family, and so many English rows."
    problems = rows.problem_rows(problems_of_all(60))
    return problems + rows.english_rows(rows.stdlib_docs()[:docs])


def ids_of(share: list[dict]) -> set[str]:
    return {row["id"] for row in share}


def test_parallel_texts_go_to_midtraining_alone_and_move_nothing_else():
    pairs = [
        (
            f"Enter the valid date number {number} of the form.",
            f"Введите правильную дату номер {number} в форме.",
        )
        for number in range(12)
    ]
    parallel = rows.parallel_rows(pairs)
    pool, families = pool_of(60), list(tmath.FAMILIES)
    without = data.deal(pool, families, toy_sizes())
    together = data.deal(pool + parallel, families, toy_sizes())
    for use in without.keys() - {"midtrain"}:
        assert without[use] == together[use]
    assert ids_of(together["midtrain"]) - ids_of(without["midtrain"]) == ids_of(parallel)


def test_the_share_of_open_prompts_and_what_a_prompt_is():
    system = dict(role="system", content="Отвечай кратко.")
    told = [row | dict(messages=[system, *row["messages"]]) for row in pool_of(80)]

    def deal(open_share):
        sizes = toy_sizes(
            sft_general=4,
            midtrain_chars=0,
            prompts=dict(rm_train=20, dpo=10, eagle=8),
            open_share=open_share,
        )
        return data.deal(told, list(tmath.FAMILIES), sizes)

    prompts = deal(0.9)["prompts"]
    assert Counter((prompt["split"], prompt["answer"] is None) for prompt in prompts) == {
        ("rm_train", True): 18,
        ("rm_train", False): 2,
        ("dpo", True): 9,
        ("dpo", False): 1,
        ("eagle", True): 4,
        ("eagle", False): 4,
    }
    # The question, not the system's line.
    assert not any("Отвечай" in prompt["prompt"] for prompt in prompts)
    with pytest.raises(UserError, match="open_share 1.5"):
        deal(1.5)


@pytest.mark.parametrize("pct", [0, 10, 30])
def test_midtraining_has_the_share_of_english_and_of_problems_it_is_asked_for(pct):
    problems = rows.problem_rows(problems_of_all(60))
    some = rows.english_rows(rows.stdlib_docs()[:600])
    half_russian = some[::2] + [row | dict(lang="ru") for row in some[1::2]]
    got = data.midtrain_rows(half_russian, problems, 20_000, 0.4, pct)
    assert tags.english_share(got) == pytest.approx(pct, abs=2)
    share = sum(row["family"] in tmath.FAMILIES for row in got) / len(got)
    assert share == pytest.approx(0.4, abs=0.02)


# Run a notebook's cells in this process: notebook, run folder.
STAGE = """
import json, sys
nb = json.load(open(sys.argv[1]))
names = {"__name__": "nb"}
for cell in nb["cells"]:
    if cell["cell_type"] != "code":
        continue
    exec("".join(cell["source"]), names)
    if "parameters" in cell["metadata"].get("tags", []):
        names["run_dir"] = sys.argv[2]
"""


def run_stage(run) -> dict[str, bytes]:
    "What the stage leaves, but for what a clock decides: name → bytes."
    (run / "04b_tmath").mkdir(parents=True)
    shutil.copy(toy("04b_tmath/protect.jsonl"), run / "04b_tmath" / "protect.jsonl")
    notebook = project_root() / "nbs" / "05j_data.ipynb"
    subprocess.run(
        [sys.executable, "-c", STAGE, str(notebook), str(run)],
        check=True,
        capture_output=True,
        env={**os.environ, "MPLBACKEND": "agg"},
    )
    files = (run / "05j_data").glob("*.json*")
    return {file.name: file.read_bytes() for file in files if file.name != "metrics.json"}


def test_rebuild_is_byte_identical_and_shares_are_disjoint(tmp_path):
    first, second = run_stage(tmp_path / "a"), run_stage(tmp_path / "b")
    assert first == second
    shares = ("midtrain", "sft_train", "sft_dev", "prompts")
    assert {f"{name}.jsonl" for name in (*shares, "heldout")} | {"card.json"} <= set(first)
    ids = []
    for name in shares:
        ids += [row["id"] for row in read_jsonl(tmp_path / "a" / "05j_data" / f"{name}.jsonl")]
    assert len(ids) == len(set(ids)) > 50


def small_plan(**changed):
    sizes = dict(
        sft_per_family=10,
        sft_general=20,
        midtrain_chars=0,
        midtrain_problems_share=0.0,
        english_pct=10.0,
        prompts=dict(rm_train=10, eagle=10),
        open_share=0.5,
    )
    return data.ShareSizes(**(sizes | changed))


@pytest.mark.parametrize(
    "short,changed",
    [
        (set(), {}),
        ({"general"}, dict(sft_general=80)),
        ({"sums", "sums, direct", "sums, think"}, dict(sft_per_family=60)),
        ({"general", "sums"}, dict(prompts=dict(rm_train=200))),
        ({"general"}, dict(prompts=dict(rm_train=200), open_share=1.0)),
    ],
)
def test_a_plan_that_cannot_be_dealt_is_refused_by_every_pool_it_lacks(short, changed):
    counted = {"sums": 40, "sums, think": 20, "sums, direct": 20, "general": 100}
    lines = data.supply(counted, ["sums"], small_plan(**changed), 0.72)
    assert {line.pool for line in lines if line.wanted > line.at_most} == short
    if not short:
        data.check_supply(lines)
        return
    with pytest.raises(UserError) as told:
        data.check_supply(lines)
    assert all(pool in str(told.value) for pool in short)


def test_what_is_wanted_is_what_dealing_takes():
    "A corpus of exactly the rows wanted is dealt; one general row less is too few."
    wanted = data.rows_wanted(["sums"], small_plan())
    problems = rows.problem_rows(tmath.draw_problems("sums", 400))
    half = -(-wanted["sums"] // 2)
    own = [row for row in problems if row["mode"] == "think"][:half]
    own += [row for row in problems if row["mode"] == "direct"][:half]
    general = rows.english_rows(rows.stdlib_docs()[: wanted["general"]])
    assert data.deal(own + general, ["sums"], small_plan())
    with pytest.raises(UserError):
        data.deal(own + general[1:], ["sums"], small_plan())
    counted = data.count_pools(own + general, ["sums"])
    data.check_supply(data.supply(counted, ["sums"], small_plan(), 1.0))


def test_rows_are_drawn_from_the_whole_file(tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", [dict(n=n) for n in range(1000)])
    drawn = [row["n"] for row in tmath.load_rows(str(path), 50, seed=0)]
    assert drawn == sorted(set(drawn)) and len(drawn) == 50
    assert drawn[-1] > 800 and drawn[0] < 200
    assert drawn == [row["n"] for row in tmath.load_rows(str(path), 50, seed=0)]
    assert drawn != [row["n"] for row in tmath.load_rows(str(path), 50, seed=1)]
    assert [row["n"] for row in tmath.load_rows(str(path), 3)] == [0, 1, 2]
    assert len(tmath.load_rows(str(path), 2000, seed=0)) == 1000
