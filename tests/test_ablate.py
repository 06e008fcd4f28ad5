"""The ablation: a design that separates what it says, a cache that shares what is the same,
effects that are found only where they are."""

import dataclasses
import gc
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PARAMS, ROOT, write_notebook

from tpro_nb import ablate as ablate_module
from tpro_nb import ablation_cells as cells
from tpro_nb import pipeline, stages
from tpro_nb.ablate import (
    ENGLISH,
    AblationSettings,
    ablate,
    ablate_command,
    ablation_report,
    effects,
    forest_plot,
    sweep_effects,
)
from tpro_nb.ablation_cells import (
    STILL,
    AblationCell,
    CellPlan,
    Recipe,
    factorial_cells,
)
from tpro_nb.core import (
    UserError,
    environment,
    mean_ci,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)

ALL_ON = AblationCell()
RANDOM_REWARD = AblationCell(reward=-1)
SEEDS = range(3)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    "statsmodels collects garbage at every call: half a second each, beside all of torch."
    gc.freeze()
    yield
    gc.unfreeze()


def silent(line):
    "Says nothing."


def test_design_is_balanced_and_orthogonal():
    design = np.array([list(cell.as_row().values()) for cell in factorial_cells()])
    assert (design.T @ design == 8 * np.eye(4)).all()
    assert not design.sum(0).any()
    assert len({cell.name for cell in factorial_cells()}) == 8
    # no main effect is mixed with an interaction of two
    interactions = []
    for first in range(4):
        for second in range(first):
            interactions.append(design[:, first] * design[:, second])
    assert not (np.array(interactions) @ design).any()


def smoke_recipe(**changes):
    base = stages.load_params(ROOT, "smoke")
    return Recipe(ROOT, base, stages.code_keys(ROOT, base), changes)


def test_switches_change_the_parameters_they_name():
    recipe = smoke_recipe(**{"07_sft": dict(steps=5)})
    base = recipe.params
    all_off = AblationCell(-1, -1, -1, -1)
    params = cells.cell_params(recipe, all_off, 3, "outputs/x", more_steps=1.5)
    assert params["02c_tokenizer_surgery"]["base_swap"] == 8
    assert params["06_midtraining"]["lr"] == params["09_dpo"]["lr"] == STILL
    assert params["10_evaluation"]["chain"] == ["09_dpo"]
    assert params["06_midtraining"]["steps"] == round(1.5 * base["06_midtraining"]["steps"])
    assert params["07_sft"]["steps"] == 5
    assert {values["seed"] for values in params.values()} == {3}

    same = cells.cell_params(dataclasses.replace(recipe, changes={}), ALL_ON, 0, "outputs/x")
    assert same["06_midtraining"]["steps"] == base["06_midtraining"]["steps"]
    assert same["09_dpo"]["lr"] == base["09_dpo"]["lr"]
    assert base["07_sft"]["run_dir"] == "outputs/smoke"

    recipe.changes = {"07_sft": dict(stepz=5)}
    with pytest.raises(UserError, match="unknown parameter"):
        cells.cell_params(recipe, ALL_ON, 0, "x")
    recipe.changes = {"77_sft": dict(steps=5)}
    with pytest.raises(UserError, match="no stage"):
        cells.cell_params(recipe, ALL_ON, 0, "x")


def test_what_the_cache_saves():
    recipe = smoke_recipe()
    # the short way gives the runner's own keys
    assert cells.cell_keys(recipe.code, recipe.params) == recipe.code
    plans = []
    for cell in factorial_cells():
        params = cells.cell_params(recipe, cell, 0, f"outputs/{cell.name}")
        plans.append(CellPlan(cell, params))
    saved = cells.runs_by_stage(recipe.code, plans, ["10_evaluation"])
    assert saved["04b_tmath"] == (8, 1)
    assert saved["03b_base_model"] == (8, 2)
    assert saved["07_sft"] == saved["08_reward_model"] == (8, 4)
    assert saved["09_dpo"] == (8, 8)
    assert "14c_eagle_speedup" not in saved
    assert "01_tokenizer_analysis" not in saved


TOY_STAGES = {
    "07_sft": "",
    "08_reward_model": "run.input('07_sft/model')",
    "09_dpo": "run.input('08_reward_model/model')",
}


class ToyChain:
    "Three stages under the names that matter; a fake runner that writes what they would."

    def __init__(self, root):
        self.root = root
        self.ran = []  # cell/stage, in the order of running
        (root / "settings.ini").touch()
        (root / "tpro_nb" / "tables").mkdir(parents=True)
        profile = root / "params" / "toy"
        profile.mkdir(parents=True)
        for stage, reads in TOY_STAGES.items():
            notebook = root / "nbs" / f"{stage}.ipynb"
            write_notebook(notebook, ["from tpro_nb.core import *", PARAMS, reads])
            (profile / f"{stage}.yaml").write_text("run_dir: outputs/toy\nseed: 0\n")
        base = stages.load_params(root, "toy")
        self.recipe = Recipe(root, base, stages.code_keys(root, base))

    def run_stage(self, root, stage, params, keys, inputs, label, inherited=None):
        import torch
        from safetensors.torch import save_file

        run = root / params["run_dir"]
        out = run / stage
        (out / "model").mkdir(parents=True, exist_ok=True)
        self.ran.append(f"{run.name}/{stage}")
        save_file({"score.weight": torch.ones(1, 8)}, out / "model" / "model.safetensors")
        write_json(out / "metrics.json", dict(n=params["n"]))
        stamp = dict(
            stage=stage,
            code_key=keys,
            inputs=inputs,
            outputs=stages.list_outputs(out),
            seconds=1,
            environment=environment(),
            licences={},
        )
        write_json(out / "stamp.json", stamp)

    def bring(self, name, cell=ALL_ON, **change):
        "A cell's folder, brought up to date, and what ran for it; `change`: parameters of DPO."
        params = {}
        for stage, values in self.recipe.params.items():
            params[stage] = values | dict(run_dir=f"outputs/{name}")
        params["09_dpo"] |= change
        folders = sorted((self.root / "outputs").glob("*"))
        pool = [folder for folder in folders if folder.is_dir()]
        self.ran.clear()
        plan = CellPlan(cell, params)
        run = cells.run_cell(self.recipe, plan, pool, ["09_dpo"], say=silent)
        return run, list(self.ran)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    chain = ToyChain(tmp_path)
    monkeypatch.setattr(pipeline, "run_stage", chain.run_stage)
    return chain.bring


def head_of(run):
    from safetensors.torch import load_file

    return load_file(run / "08_reward_model" / "model" / "model.safetensors")["score.weight"]


def test_cells_share_what_is_the_same_and_survive_a_stop(toy):
    run, ran = toy("one")
    assert ran == ["one/07_sft", "one/08_reward_model", "one/09_dpo"]
    assert toy("one")[1] == []
    two, ran = toy("two", n=5)
    assert ran == ["two/09_dpo"]
    assert read_json(two / "09_dpo" / "metrics.json")["n"] == 5
    (two / "09_dpo" / "stamp.json").unlink()
    assert toy("two", n=5)[1] == ["two/09_dpo"]
    (two / "08_reward_model" / "model" / "model.safetensors").write_bytes(b"x")
    assert toy("two", n=5)[1] == []  # damaged: taken from its twin again


def test_a_random_reward_head_is_its_own_and_spoils_nobody_elses(toy):
    one, _ = toy("one")
    off, ran = toy("off", RANDOM_REWARD)
    assert ran == ["off/09_dpo"]  # the trained one is copied, only its head changes
    assert (head_of(one) == 1).all()
    assert not (head_of(off) == 1).any()
    assert toy("off", RANDOM_REWARD)[1] == []
    assert toy("one")[1] == []
    third, ran = toy("third", RANDOM_REWARD, n=2)
    assert ran == ["third/09_dpo"]
    assert (head_of(third) == head_of(off)).all()


@pytest.mark.parametrize(
    "args,says",
    [
        (["nowhere"], "unknown profile"),
        (["smoke", "--set", "steps=3"], "STAGE.PARAM=VALUE"),
        (["smoke", "--sweep", "german"], "no sweep"),
        (["tpro"], "lacks"),
        (["smoke", "--seeds", "0", "0"], "--seeds"),
        (["smoke", "--seeds", "1", "-1"], "--seeds"),
    ],
)
def test_mistakes_are_named(args, says):
    with pytest.raises(UserError, match=says):
        ablate_command([*args, "--dry-run"])


def cells_and_seeds(seeds=SEEDS):
    "Every cell of every seed, seed by seed."
    for seed in seeds:
        for cell in factorial_cells():
            yield cell, seed


def with_response(values, response="y_"):
    "Rows of all cells and seeds with a response, in the order of `cells_and_seeds`."
    rows = []
    for (cell, seed), value in zip(cells_and_seeds(), values, strict=True):
        rows.append(cell.as_row() | {"seed": seed, response: value})
    return rows


RNG = np.random.default_rng(5)  # one stream for all draws of `accuracy_rows`


def accuracy_rows(effect=0.0, noise=0.02, seeds=3):
    rows = []
    for cell, seed in cells_and_seeds(range(seeds)):
        accuracy = 0.3 + effect / 2 * cell.dpo + 0.1 * seed + RNG.normal(0, noise)
        rows.append(cell.as_row() | dict(seed=seed, cell=cell.name, think_accuracy=accuracy))
    return rows


def by_term(found):
    return {effect["term"]: effect for effect in found}


def count_significant(found):
    return sum(effect["verdict"] == "significant" for effect in found)


def test_effects_are_found_where_they_are_and_nowhere_else():
    found = by_term(effects(accuracy_rows(0.12), "think_accuracy"))
    assert found["dpo"]["verdict"] == "significant"
    assert found["dpo"]["lo"] < 0.12 < found["dpo"]["hi"]
    assert count_significant(found.values()) == 1

    data = accuracy_rows(0.12)
    by_hand = sum(row["think_accuracy"] * row["dpo"] for row in data) / 12
    assert by_term(effects(data, "think_accuracy"))["dpo"]["effect"] == pytest.approx(by_hand)

    families = [effects(accuracy_rows(), "think_accuracy") for _ in range(20)]
    false_alarms = sum(count_significant(found) > 0 for found in families)
    assert false_alarms <= 4  # Holm: one family in twenty

    all_alike = [row | dict(think_accuracy=0.0) for row in accuracy_rows()]
    verdicts = {effect["verdict"] for effect in effects(all_alike, "think_accuracy")}
    assert verdicts == {"does not vary"}


def shared_luck(rng, spread):
    "One draw for every pair of cells that share vocabulary, midtraining and seed."
    luck = {}
    for cell in factorial_cells():
        for seed in SEEDS:
            luck[cell.vocabulary, cell.midtraining, seed] = rng.normal(0, spread)
    return luck


def test_a_figure_taken_before_dpo_is_not_counted_twice():
    luck = shared_luck(np.random.default_rng(1), 0.05)
    values = []
    for cell, seed in cells_and_seeds():
        gain = 0.2 * (cell.midtraining > 0)
        values.append(2 - gain + luck[cell.vocabulary, cell.midtraining, seed])
    data = with_response(values, "ru_bits_per_byte")
    early = by_term(effects(data, "ru_bits_per_byte", early=True))
    assert set(early) == {"vocabulary", "midtraining", "vocabulary × midtraining"}
    late = by_term(effects(data, "ru_bits_per_byte"))
    assert {late[term]["verdict"] for term in ("reward", "dpo")} == {"does not vary"}
    for name in ("effect", "lo", "hi"):
        assert late["midtraining"][name] == pytest.approx(early["midtraining"][name])
    with pytest.raises(UserError, match="share everything"):
        odd = data[0] | dict(ru_bits_per_byte=9.0)
        effects([odd, *data[1:]], "ru_bits_per_byte", early=True)


def test_luck_that_two_cells_share_is_no_effect_of_what_they_share():
    """A split plot: with a shared luck ten times the cells' own, the interval still holds the
    truth (0) about 95 times of 100."""
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(150):
        luck = shared_luck(rng, 0.05)
        values = []
        for cell, seed in cells_and_seeds():
            shared = luck[cell.vocabulary, cell.midtraining, seed]
            values.append(shared + rng.normal(0, 0.005) + 0.02 * cell.dpo)
        found = by_term(effects(with_response(values), "y_"))
        missed += not found["midtraining"]["lo"] < 0 < found["midtraining"]["hi"]
        assert found["dpo"]["effect"] == pytest.approx(0.04, abs=0.02)
        assert found["dpo"]["verdict"] == "significant"
    assert 1 <= missed <= 14, missed


def test_luck_that_a_vocabulary_shares_is_no_effect_of_the_vocabulary():
    """Tokenizer, base and data are made once for four cells: with a luck per vocabulary and seed
    the interval still holds the truth (0), and midtraining is found through it."""
    rng = np.random.default_rng(4)
    missed = found_midtraining = 0
    for _ in range(40):
        of_vocabulary = {}
        for level in (1, -1):
            for seed in SEEDS:
                of_vocabulary[level, seed] = rng.normal(0, 0.1)
        of_pair = shared_luck(rng, 0.01)
        values = []
        for cell, seed in cells_and_seeds():
            luck = of_vocabulary[cell.vocabulary, seed]
            luck += of_pair[cell.vocabulary, cell.midtraining, seed]
            values.append(luck + 0.04 * cell.midtraining + rng.normal(0, 0.005))
        found = by_term(effects(with_response(values), "y_"))
        missed += not found["vocabulary"]["lo"] < 0 < found["vocabulary"]["hi"]
        found_midtraining += found["midtraining"]["lo"] > 0
    assert missed <= 6 and found_midtraining > 33, (missed, found_midtraining)


def test_bits_of_an_answer_are_the_models_own_and_vocabularies_compare(tmp_path):
    import torch

    from tpro_nb.core import toy_model, toy_problems
    from tpro_nb.midtraining import prompt_ids
    from tpro_nb.training import load_model

    toy_model(tmp_path, hidden=16, layers=1)
    model, tokenizer = load_model(tmp_path)
    problem = toy_problems(1)[0]
    prompt = prompt_ids(tokenizer, [dict(role="user", content=problem["question"])], False)
    reply = tokenizer.encode(problem["full_answer"], add_special_tokens=False)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + reply])).logits[0].float()
    log_probabilities = torch.log_softmax(logits, -1)
    nats = 0.0
    for index, token in enumerate(reply):
        nats -= float(log_probabilities[len(prompt) - 1 + index, token])
    by_hand = nats / np.log(2) / len(problem["full_answer"])
    bits = cells.answer_bits(model, tokenizer, [problem], False)
    assert bits == pytest.approx(by_hand, rel=1e-4)


def test_incomplete_designs_are_refused():
    with pytest.raises(UserError, match="one seed"):
        effects(accuracy_rows(seeds=1), "think_accuracy")
    with pytest.raises(UserError, match="all eight cells"):
        effects(accuracy_rows()[:-1], "think_accuracy")
    *rest, last = accuracy_rows()
    with pytest.raises(UserError, match="all eight cells"):
        effects([*rest, last | dict(think_accuracy=None)], "think_accuracy")


def test_report(tmp_path):
    said = []
    rows = [row | dict(speedup=1.3 + 0.01 * row["seed"]) for row in accuracy_rows(0.12)]
    table = ablation_report(rows, tmp_path, say=said.append)
    (eagle,) = (row for row in table if "eagle" in row["term"])
    assert eagle["effect"] == pytest.approx(1.31)
    assert eagle["lo"] < 1.31 < eagle["hi"]
    # three seeds, not 24 cells
    assert (eagle["lo"], eagle["hi"]) == pytest.approx(mean_ci([1.3, 1.31, 1.32])[1:])
    assert (tmp_path / "effects.csv").read_text().startswith("response,term,effect")
    assert any("not significant" in line for line in said)
    assert (tmp_path / "effects.png").read_bytes().startswith(b"\x89PNG")
    # its ratio is a mean, not an effect
    labels = forest_plot(table).axes[0].get_yticklabels()
    assert not any("eagle" in label.get_text() for label in labels)


def size_of(row):
    return len(row["messages"][0]["content"])


def text_of_cell(run):
    return read_jsonl(run / "05j_data" / "midtrain.jsonl")


def text_measured(run, speed):
    "Instead of a cell's responses: characters of its text, and the share of English in them."
    rows = text_of_cell(run)
    characters = sum(size_of(row) for row in rows)
    english = sum(size_of(row) for row in rows if row["lang"] == "en")
    return dict(chars=characters, share=100 * english / characters)


def tokens_of_text(run, vocabulary="dense"):
    "Four characters a token of English, two of Russian."
    return sum(size_of(row) // (4 if row["lang"] == "en" else 2) for row in text_of_cell(run))


def mixed_rows(count):
    "Rows of text, every sixth of them English and twice as long as the Russian ones."
    rows = []
    for index in range(count):
        is_english = index % 6 == 0
        content = ("ab" if is_english else "я") * 10
        language = "en" if is_english else "ru"
        rows.append(dict(lang=language, messages=[dict(role="user", content=content)]))
    return rows


def status_by_key(run, stage, key, done, inputs):
    "Current where the stamp has the key; nothing else is looked at."
    stamp = run / stage / "stamp.json"
    is_current = stamp.exists() and read_json(stamp)["code_key"]["key"] == key["key"]
    return SimpleNamespace(state="current" if is_current else "stale", stamp={})


def no_inputs(*arguments):
    return {}


def no_export(root):
    "The library is as it is."


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A sweep in which chapter 05 is a fake that gives as many characters as asked for, every
    sixth row English; the later stages say what they were asked."""
    asked = []

    def run_stage(root, stage, params, keys, inputs, label, inherited=None):
        out = root / params["run_dir"] / stage
        out.mkdir(parents=True, exist_ok=True)
        asked.append(SimpleNamespace(cell=out.parent.name, stage=stage, params=params))
        if stage == "05j_data":
            write_jsonl(out / "midtrain.jsonl", mixed_rows(params["midtrain_chars"] // 11))
        write_json(out / "metrics.json", {})
        outputs = stages.list_outputs(out)
        stamp = dict(stage=stage, code_key=keys, inputs=inputs, outputs=outputs)
        write_json(out / "stamp.json", stamp)

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    monkeypatch.setattr(pipeline, "export_all", no_export)
    monkeypatch.setattr(pipeline, "inputs_now", no_inputs)
    monkeypatch.setattr(stages, "stage_status", status_by_key)
    monkeypatch.setattr(ablate_module, "cell_responses", text_measured)
    monkeypatch.setattr(ablate_module, "midtraining_tokens", tokens_of_text)
    settings = AblationSettings(
        "smoke",
        str(tmp_path / "sweep"),
        seeds=[0],
        sweep="english",
        changes={"05j_data": dict(midtrain_chars=6000)},
    )
    return settings, asked


def test_a_sweep_moves_the_language_of_what_is_read_and_nothing_else(corpus):
    """The share is that of the midtraining text itself, at equal characters; the corpus is made
    once; steps follow the tokens."""
    settings, asked = corpus
    rows = ablate(ROOT, settings, say=silent)
    assert [row["share"] for row in rows] == pytest.approx(ENGLISH, abs=0.3)
    assert [row["chars"] for row in rows] == pytest.approx([6000] * 5, abs=20)
    (curated,) = (call for call in asked if call.stage == "05j_data")
    assert curated.cell == "corpus"
    assert curated.params["midtrain_chars"] == 12000
    steps = {call.cell: call.params["steps"] for call in asked if call.stage == "06_midtraining"}
    base = stages.load_params(ROOT, "smoke")["06_midtraining"]["steps"]
    assert steps["english0"] == base
    # four tenths of the text takes half the tokens
    assert steps["english40"] == round(base * 0.8)


def test_a_cell_whose_speed_cannot_be_measured_keeps_its_other_figures(corpus, monkeypatch):
    settings, _ = corpus
    settings = dataclasses.replace(settings, sweep="", speed=True, seeds=[0])
    run_usual = pipeline.run_stage

    def run_stage(root, stage, params, *more, **how):
        if stage == cells.SPEED and "VmRD" in params["run_dir"]:
            raise UserError(f"{cells.SPEED}: no development prompt got an answer of two tokens")
        return run_usual(root, stage, params, *more, **how)

    def measured(run, speed):
        return dict(answer_bits=1.0) | (dict(speedup=1.5, acceptance_length=2.0) if speed else {})

    two = [ALL_ON, AblationCell(midtraining=-1)]
    monkeypatch.setattr(ablate_module, "factorial_cells", lambda: two)
    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    monkeypatch.setattr(ablate_module, "cell_responses", measured)
    told = []
    rows = ablate(ROOT, settings, say=told.append)
    assert [row["answer_bits"] for row in rows] == [1.0, 1.0]
    assert [row["speedup"] for row in rows] == [1.5, None]
    assert sum("two tokens" in str(line) for line in told) == 1

    def another_fault(root, stage, params, *more, **how):
        if stage == "11c_eagle_draft":
            raise UserError("11c_eagle_draft: the disk is full")
        return run_usual(root, stage, params, *more, **how)

    monkeypatch.setattr(pipeline, "run_stage", another_fault)
    elsewhere = dataclasses.replace(settings, out=f"{settings.out}2")
    with pytest.raises(UserError, match="disk is full"):
        ablate(ROOT, elsewhere, say=silent)


def test_a_share_that_the_corpus_cannot_reach_is_refused_before_training(corpus, monkeypatch):
    settings, asked = corpus
    monkeypatch.setattr(ablate_module, "ENGLISH", (0.0, 95.0))
    says = "english95: 95 % English of 6,000 characters needs .* characters of en more"
    with pytest.raises(UserError, match=says):
        ablate(ROOT, settings, say=silent)
    assert "english95" not in {call.cell for call in asked}


def test_sweep_report(tmp_path):
    rng = np.random.default_rng(3)
    sweep = []
    for share in ENGLISH:
        for seed in SEEDS:
            accuracy = share / 100 + seed / 10 + rng.normal(0, 0.002)
            accuracies = dict(think_accuracy=accuracy, direct_accuracy=0.0)
            sweep.append(dict(english_pct=share, seed=seed) | accuracies)
    table = {}
    for row in ablation_report(sweep, tmp_path, "english", say=silent):
        table[row["response"], row["term"]] = row
    mean = table["think_accuracy", "0 % English"]
    gap = table["think_accuracy", "40 minus 0 % English"]
    assert len(table) == 18
    assert mean["effect"] == pytest.approx(0.1, abs=0.01)
    assert mean["lo"] < 0.1 < mean["hi"]
    assert gap["lo"] < 0.4 < gap["hi"]
    # the seeds' own level is not its noise
    assert gap["hi"] - gap["lo"] < (mean["hi"] - mean["lo"]) / 10
    assert gap["verdict"] == "significant"
    assert table["direct_accuracy", "40 minus 0 % English"]["verdict"] == "does not vary"
    one_seed = [row for row in sweep if row["seed"] == 0]
    assert len(sweep_effects(one_seed, "think_accuracy")) == 5  # means, no verdict
    with pytest.raises(UserError, match="every seed needs every share"):
        sweep_effects(sweep[1:], "think_accuracy")
    # a sweep does not pass for a factorial
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"english.csv", "english.png", "study_english.json"}
