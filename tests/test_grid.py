"""The tokenizer × drafter grid: characters counted right, ratios by hand.

And a small grid from end to end that is kept and not run twice."""

import csv
from dataclasses import asdict, replace

import pytest
import torch

from tpro_nb import grid
from tpro_nb.core import TOY_TEXT, UserError, read_json, toy_model, toy_tokenizer, write_jsonl
from tpro_nb.draft_model import random_draft
from tpro_nb.eagle_decoding import PROOF_PROMPTS

MS = dict(
    plain=dict(draft_ms=0.0, verify_ms=10.0),
    chain=dict(draft_ms=2.0, verify_ms=12.0),
    tree=dict(draft_ms=3.0, verify_ms=13.0),
)


def made_up_rows(chars, tau, prompts, bump):
    rows = []
    for i in range(prompts):
        steps = i + 10
        rows.append([steps * tau, steps * tau * chars + bump * i, steps])
    return rows


def made_up_cell(chars, tau, prompts=6, bump=0):
    "Every step of every prompt yields tau tokens of `chars` characters; prompt i: i + 10 steps."
    runs = {}
    for method in grid.METHODS:
        rows = made_up_rows(chars, 1 if method == "plain" else tau, prompts, bump)
        runs[method] = {"0": rows, "0.8": rows}
    return dict(runs=runs, kept=[8] * prompts, ids=[10] * prompts, bits_per_byte=1.5)


def find_row(rows, vocabulary, method):
    "The row of all seeds at T = 0.8."
    wanted = dict(vocabulary=vocabulary, method=method, temperature="0.8", seed="all")
    return next(row for row in rows if row.items() >= wanted.items())


def test_characters_of_tokens_add_up(tmp_path):
    from transformers import AutoTokenizer

    toy_tokenizer(tmp_path / "t")
    tok = AutoTokenizer.from_pretrained(tmp_path / "t")
    counts = grid.char_counts(tok)
    for text in [*TOY_TEXT, "ё — 𝄞 z\n"]:
        assert counts[tok.encode(text, add_special_tokens=False)].sum() == len(text)
    assert counts[tok.eos_token_id] == 0


def test_ratios_by_hand_and_pairs_drawn_together():
    cells = {("base", 0): made_up_cell(2, 2.0), ("dense", 0): made_up_cell(3, 1.5)}
    rows = grid.grid_table(cells, MS)
    assert find_row(rows, "base", "plain")["chars_per_s"] == 200
    assert find_row(rows, "dense", "plain")["over_base"] == 1.5
    chain = find_row(rows, "base", "chain")
    assert chain["chars_per_step"] == 4
    assert chain["chars_per_s"] == pytest.approx(1000 * 4 / 14, abs=1e-3)
    dense = find_row(rows, "dense", "tree")
    assert dense["acceptance_length"] == 1.5
    assert dense["chars_per_step"] == 4.5
    assert dense["over_base"] == 1.125
    assert dense["acceptance_over_base"] == 0.75
    # prompts differ in length, not in ratio: drawn together, nothing varies
    assert dense["over_base_lo"] == dense["over_base_hi"] == 1.125
    assert find_row(rows, "base", "tree")["over_base"] == 1
    assert dense["coverage_pct"] == 80


def test_an_interval_where_prompts_differ_in_ratio():
    cells = {("base", 0): made_up_cell(2, 2.0), ("dense", 0): made_up_cell(3, 1.5, bump=4)}
    dense = find_row(grid.grid_table(cells, MS), "dense", "tree")
    assert dense["over_base_lo"] < dense["over_base"] < dense["over_base_hi"]


def test_seeds_are_pooled_and_shown():
    cells = {}
    for seed, extra in enumerate((0, 1)):
        cells["base", seed] = made_up_cell(2, 2.0 + extra)
        cells["dense", seed] = made_up_cell(3, 1.5)
    rows = grid.grid_table(cells, MS)
    assert [row["seed"] for row in rows] == ["all"] * 12 + [0] * 12 + [1] * 12
    wanted = dict(vocabulary="base", method="chain", temperature="0")
    chains = [row for row in rows if row.items() >= wanted.items()]
    by_seed = {row["seed"]: row["acceptance_length"] for row in chains}
    assert by_seed == {"all": 2.5, 0: 2.0, 1: 3.0}


def test_documents_do_not_overlap(monkeypatch):
    def quotations(part):
        return [f"{part} {i} " + "слово " * 40 for i in range(60)] + ["коротко"]

    monkeypatch.setattr(grid.corpora, "quotations", quotations)
    size = grid.GridSize(chars=2000, answers=8, prompts=4, bits_docs=5)
    docs = grid.grid_documents(size)
    assert len(docs["draft"]) == 8
    assert len(docs["heldout"]) == 5
    assert sum(map(len, docs["target"])) >= 2000
    assert not set(docs["target"]) & set(docs["draft"])
    assert all(text.startswith("heldout") for text in docs["heldout"])
    with pytest.raises(UserError, match="too few"):
        grid.grid_documents(grid.GridSize(chars=10**7))


TINY = grid.GridSize(
    vocab=330,
    hidden=64,
    layers=1,
    batch=2,
    length=32,
    chars=400,
    answers=4,
    answer_chars=24,
    gen_batch=2,
    hot=280,
    epochs=1,
    draft_batch=2,
    prompts=2,
    prompt_chars=16,
    new_chars=16,
    bits_docs=2,
)


@pytest.fixture
def toy_run(tmp_path):
    "A run's tokenizers, target and draft as toys."
    run = tmp_path / "toyrun"
    for name in ("qwen_base", "qwen_dense"):
        toy_tokenizer(run / "02c_tokenizer_surgery" / name)
    base = run / "03b_base_model" / "base"
    toy_model(base)
    random_draft(run / "11c_eagle_draft" / "base", base)
    write_jsonl(run / "11c_eagle_draft" / "prompts_dev.jsonl", PROOF_PROMPTS)
    return run


@pytest.fixture
def launched(monkeypatch):
    "Children run in this process, on toy documents; the names of what was launched."
    calls = []

    def launch(target, config, work, **options):
        calls.append(target)
        return getattr(grid, target.split(":")[1])(**config)

    docs = [text for text in TOY_TEXT if len(text) > 20]

    def few_documents(size):
        return dict(target=docs * 4, draft=docs[:4], heldout=docs[:3])

    monkeypatch.setattr(grid, "launch", launch)
    monkeypatch.setattr(grid, "grid_documents", few_documents)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield calls
    torch.set_num_threads(threads)


def test_grid_from_end_to_end_and_resumed(toy_run, launched, tmp_path):
    out, said = tmp_path / "out", []
    rows = grid.run_grid(toy_run, out, TINY, [0], say=said.append)
    assert launched == ["tpro_nb.grid:grid_cell"] * 2 + ["tpro_nb.grid:pass_costs"]
    assert len(said) == 2
    with open(out / "grid.csv", newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) == 12
    pairs = {(row["vocabulary"], row["method"]) for row in written}
    base = {("base", method) for method in grid.METHODS}
    dense = {("dense", method) for method in grid.METHODS}
    assert pairs == base | dense
    for row in rows:
        assert row["acceptance_length"] >= 1
        assert row["chars_per_s"] > 0
        assert 0 < row["coverage_pct"] <= 100
        if row["method"] == "plain":
            assert row["acceptance_length"] == 1
            assert row["draft_ms"] == 0
    assert read_json(out / "grid.json")["size"]["vocab"] == 330
    assert (out / "grid.png").stat().st_size > 10_000
    work = out / "work"
    assert next(iter(work.glob("base-0-*/target"))).is_dir()

    grid.run_grid(toy_run, out, TINY, [0], say=said.append)
    assert len(launched) == 3, "nothing was run again"

    # a stopped cell keeps its target
    again = next(work.glob("dense-0-*"))
    (again / "cell.json").unlink()
    weights = again / "target" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    grid.run_grid(toy_run, out, TINY, [0], say=said.append)
    assert launched[3:] == ["tpro_nb.grid:grid_cell"]
    assert weights.stat().st_mtime_ns == stamp


def test_sizes_on_the_command_line():
    size = grid.grid_size(["vocab=4096", "lr=1"])
    assert asdict(size) == asdict(replace(grid.GridSize(), vocab=4096, lr=1.0))
    assert isinstance(size.lr, float)


def test_what_a_user_gets_wrong(tmp_path):
    with pytest.raises(UserError, match="run the profile up to 11"):
        grid.run_grid(tmp_path, tmp_path / "out", TINY, [0])
    with pytest.raises(UserError, match="NAME=VALUE"):
        grid.grid_command(["smoke", "--set", "depth=3"])
    with pytest.raises(UserError, match="number above 0"):
        grid.grid_command(["smoke", "--set", "vocab=lots"])
