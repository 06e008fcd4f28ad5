"The ablation: a design that separates what it says, a cache that shares what is the same, effects that are found only where they are."
from types import SimpleNamespace
import numpy as np
import pytest, yaml
from tpro_nb import ablate as A, pipeline as P
from tpro_nb.core import UserError, environment, read_json, read_jsonl, write_json, write_jsonl
from conftest import ROOT, PARAMS, write_notebook

ON = dict.fromkeys(A.FACTORS, 1)

def test_design_is_balanced_and_orthogonal():
    d = np.array([[c[f] for f in A.FACTORS] for c in A.cells()])
    assert (d.T @ d == 8*np.eye(4)).all() and not d.sum(0).any() and len({A.name_of(c) for c in A.cells()}) == 8
    pairs = np.array([d[:, i]*d[:, j] for i in range(4) for j in range(i)])
    assert not (pairs @ d).any()                                   # no main effect is mixed with an interaction of two

def test_switches_change_the_parameters_they_name():
    base = P.load_params(ROOT, "smoke")
    off = dict.fromkeys(A.FACTORS, -1)
    p = A.cell_params(ROOT, base, off, 3, "outputs/x", more_steps=1.5, changes={"07_sft": dict(steps=5)})
    assert p["02_tokenizer_surgery"]["base_swap"] == 1 and p["06_midtraining"]["lr"] == p["09_dpo"]["lr"] == A.STILL and p["10_evaluation"]["chain"] == ["09_dpo"]
    assert p["06_midtraining"]["steps"] == round(1.5*base["06_midtraining"]["steps"]) and p["07_sft"]["steps"] == 5 and {v["seed"] for v in p.values()} == {3}
    same = A.cell_params(ROOT, base, ON, 0, "outputs/x")
    assert same["06_midtraining"]["steps"] == base["06_midtraining"]["steps"] and same["09_dpo"]["lr"] == base["09_dpo"]["lr"] and base["07_sft"]["run_dir"] == "outputs/smoke"
    with pytest.raises(UserError, match="unknown parameter"): A.cell_params(ROOT, base, ON, 0, "x", changes={"07_sft": dict(stepz=5)})
    with pytest.raises(UserError, match="no stage"): A.cell_params(ROOT, base, ON, 0, "x", changes={"77_sft": dict(steps=5)})

def test_what_the_cache_saves():
    base = P.load_params(ROOT, "smoke"); code = P.code_keys(ROOT, base)
    assert A.keys_of(code, base) == code                           # the short way gives the runner's own keys
    plans = [(A.cell_params(ROOT, base, c, 0, f"outputs/{A.name_of(c)}"), c) for c in A.cells()]
    got = A.shared(code, plans, ["10_evaluation"])
    assert got["04_tmath"] == (8, 1) and got["03_base_model"] == (8, 2) and got["07_sft"] == got["08_reward_model"] == (8, 4) and got["09_dpo"] == (8, 8)
    assert "14_eagle_speedup" not in got and "01_tokenizer_analysis" not in got

@pytest.fixture
def toy(tmp_path, monkeypatch):
    "Three stages under the names that matter; a fake runner that writes what they would."
    import torch
    from safetensors.torch import save_file
    (tmp_path/"settings.ini").touch(); (tmp_path/"tpro_nb"/"tables").mkdir(parents=True)
    inputs = {"07_sft": "", "08_reward_model": "run.input('07_sft/model')", "09_dpo": "run.input('08_reward_model/model')"}
    for s, i in inputs.items():
        write_notebook(tmp_path/"nbs"/f"{s}.ipynb", ["from tpro_nb.core import *", PARAMS, i])
        (tmp_path/"params"/"toy").mkdir(parents=True, exist_ok=True); (tmp_path/"params"/"toy"/f"{s}.yaml").write_text("run_dir: outputs/toy\nseed: 0\n")
    ran = []
    def run_stage(root, stage, params, keys, ins, label, inherited=None):
        out = root/params["run_dir"]/stage; (out/"model").mkdir(parents=True, exist_ok=True); ran.append((root/params["run_dir"]).name + "/" + stage)
        save_file({"score.weight": torch.ones(1, 8)}, out/"model"/"model.safetensors"); write_json(out/"metrics.json", dict(n=params["n"]))
        write_json(out/"stamp.json", dict(stage=stage, code_key=keys, inputs=ins, outputs=P.list_outputs(out), seconds=1, environment=environment(), licences={}))
    monkeypatch.setattr(P, "run_stage", run_stage)
    base = P.load_params(tmp_path, "toy"); code = P.code_keys(tmp_path, base)
    def go(name, cell=ON, **change):
        params = {s: p | dict(run_dir=f"outputs/{name}") | (change if s == "09_dpo" else {}) for s, p in base.items()}
        pool = [p for p in sorted((tmp_path/"outputs").glob("*")) if p.is_dir()]
        del ran[:]; return A.run_cell(tmp_path, code, params, cell, pool, ["09_dpo"], say=lambda *a: None), list(ran)
    return go

def head(run): 
    from safetensors.torch import load_file
    return load_file(run/"08_reward_model"/"model"/"model.safetensors")["score.weight"]

def test_cells_share_what_is_the_same_and_survive_a_stop(toy):
    run, ran = toy("one"); assert ran == ["one/07_sft", "one/08_reward_model", "one/09_dpo"]
    assert toy("one")[1] == []
    two, ran = toy("two", n=5); assert ran == ["two/09_dpo"] and read_json(two/"09_dpo"/"metrics.json")["n"] == 5
    (two/"09_dpo"/"stamp.json").unlink(); assert toy("two", n=5)[1] == ["two/09_dpo"]
    (two/"08_reward_model"/"model"/"model.safetensors").write_bytes(b"x"); assert toy("two", n=5)[1] == []      # damaged: taken from its twin again

def test_a_random_reward_head_is_its_own_and_spoils_nobody_elses(toy):
    one, _ = toy("one")
    off, ran = toy("off", ON | dict(reward=-1))
    assert ran == ["off/09_dpo"]                                   # the trained one is copied, only its head changes
    assert (head(one) == 1).all() and not (head(off) == 1).any()
    assert toy("off", ON | dict(reward=-1))[1] == [] and toy("one")[1] == []
    third, ran = toy("third", ON | dict(reward=-1), n=2); assert ran == ["third/09_dpo"] and (head(third) == head(off)).all()

@pytest.mark.parametrize("args,says", [(["nowhere"], "unknown profile"), (["smoke", "--set", "steps=3"], "STAGE.PARAM=VALUE"), (["smoke", "--sweep", "german"], "no sweep"), (["tpro"], "lacks")])
def test_mistakes_are_named(args, says):
    with pytest.raises(UserError, match=says): A.main([*args, "--dry-run"])

def rows(effect=0., noise=.02, seeds=3, rng=np.random.default_rng(5)):
    return [c | dict(seed=s, cell=A.name_of(c), think_accuracy=.3 + effect/2*c["dpo"] + .1*s + rng.normal(0, noise)) for s in range(seeds) for c in A.cells()]

def test_effects_are_found_where_they_are_and_nowhere_else():
    got = {e["term"]: e for e in A.effects(rows(.12), "think_accuracy")}
    assert got["dpo"]["verdict"] == "significant" and got["dpo"]["lo"] < .12 < got["dpo"]["hi"]
    assert sum(e["verdict"] == "significant" for e in got.values()) == 1
    data = rows(.12); by_hand = [r["think_accuracy"]*r["dpo"] for r in data]
    assert {e["term"]: e["effect"] for e in A.effects(data, "think_accuracy")}["dpo"] == pytest.approx(np.sum(by_hand)/12)
    assert sum(any(e["verdict"] == "significant" for e in A.effects(rows(), "think_accuracy")) for _ in range(20)) <= 4        # Holm: one family in twenty
    assert {e["verdict"] for e in A.effects(rows(noise=0, effect=0) and [r | dict(think_accuracy=0.) for r in rows()], "think_accuracy")} == {"does not vary"}

def test_a_figure_taken_before_dpo_is_not_counted_twice():
    rng = np.random.default_rng(1); per = {(c["vocabulary"], c["midtraining"], s): 2 - .2*(c["midtraining"] > 0) + rng.normal(0, .05) for c in A.cells() for s in range(3)}
    data = [c | dict(seed=s, ru_bits_per_byte=per[c["vocabulary"], c["midtraining"], s]) for s in range(3) for c in A.cells()]
    got = {e["term"]: e for e in A.effects(data, "ru_bits_per_byte", early=True)}
    assert set(got) == {"vocabulary", "midtraining", "vocabulary × midtraining"}
    late = {e["term"]: e for e in A.effects(data, "ru_bits_per_byte")}
    assert {late[t]["verdict"] for t in ("reward", "dpo")} == {"does not vary"} and [late["midtraining"][k] for k in ("effect", "lo", "hi")] == pytest.approx([got["midtraining"][k] for k in ("effect", "lo", "hi")])
    with pytest.raises(UserError, match="share everything"): A.effects([data[0] | dict(ru_bits_per_byte=9.), *data[1:]], "ru_bits_per_byte", early=True)

def test_luck_that_two_cells_share_is_no_effect_of_what_they_share():
    "A split plot: with a shared luck ten times the cells' own, the interval still holds the truth (0) about 95 times of 100."
    rng, missed = np.random.default_rng(2), 0
    for _ in range(150):
        luck = {(c["vocabulary"], c["midtraining"], s): rng.normal(0, .05) for c in A.cells() for s in range(3)}
        data = [c | dict(seed=s, y_=luck[c["vocabulary"], c["midtraining"], s] + rng.normal(0, .005) + .02*c["dpo"]) for s in range(3) for c in A.cells()]
        got = {e["term"]: e for e in A.effects(data, "y_")}
        missed += not got["midtraining"]["lo"] < 0 < got["midtraining"]["hi"]
        assert got["dpo"]["effect"] == pytest.approx(.04, abs=.02) and got["dpo"]["verdict"] == "significant"
    assert 1 <= missed <= 14, missed

def test_luck_that_a_vocabulary_shares_is_no_effect_of_the_vocabulary():
    "Tokenizer, base and data are made once for four cells: with a luck per vocabulary and seed the interval still holds the truth (0), and midtraining is found through it."
    rng, missed, found = np.random.default_rng(4), 0, 0
    for _ in range(40):
        luck = {(v, s): rng.normal(0, .1) for v in (1, -1) for s in range(3)}; own = {(c["vocabulary"], c["midtraining"], s): rng.normal(0, .01) for c in A.cells() for s in range(3)}
        data = [c | dict(seed=s, y_=luck[c["vocabulary"], s] + own[c["vocabulary"], c["midtraining"], s] + .04*c["midtraining"] + rng.normal(0, .005)) for s in range(3) for c in A.cells()]
        got = {e["term"]: e for e in A.effects(data, "y_")}
        missed += not got["vocabulary"]["lo"] < 0 < got["vocabulary"]["hi"]; found += got["midtraining"]["lo"] > 0
    assert missed <= 6 and found > 33, (missed, found)

def test_bits_of_an_answer_are_the_models_own_and_vocabularies_compare(tmp_path):
    import torch
    from tpro_nb.base_model import load_model
    from tpro_nb.core import toy_model, toy_problems
    from tpro_nb.midtraining import prompt_ids
    toy_model(tmp_path, hidden=16, layers=1); model, tok = load_model(tmp_path); p = toy_problems(1)[0]
    ids = prompt_ids(tok, [dict(role="user", content=p["question"])], False); said = tok.encode(p["full_answer"], add_special_tokens=False)
    with torch.inference_mode(): logp = torch.log_softmax(model(torch.tensor([ids + said])).logits[0].float(), -1)
    by_hand = -sum(float(logp[len(ids) - 1 + i, t]) for i, t in enumerate(said))/np.log(2)/len(p["full_answer"])
    assert A.answer_bits(model, tok, [p], False) == pytest.approx(by_hand, rel=1e-4)

def test_incomplete_designs_are_refused():
    with pytest.raises(UserError, match="one seed"): A.effects(rows(seeds=1), "think_accuracy")
    with pytest.raises(UserError, match="all eight cells"): A.effects(rows()[:-1], "think_accuracy")
    with pytest.raises(UserError, match="all eight cells"): A.effects([*rows()[:-1], rows()[-1] | dict(think_accuracy=None)], "think_accuracy")

def test_report(tmp_path):
    said = []
    table = A.report([r | dict(speedup=1.3 + .01*r["seed"]) for r in rows(.12)], tmp_path, say=said.append)
    assert any("eagle" in t["term"] and t["effect"] == pytest.approx(1.31) and t["lo"] < 1.31 < t["hi"] for t in table)
    eagle = next(t for t in table if "eagle" in t["term"])
    assert (eagle["lo"], eagle["hi"]) == pytest.approx(A.mean_ci([1.3, 1.31, 1.32])[1:])              # three seeds, not 24 cells
    assert (tmp_path/"effects.csv").read_text().startswith("response,term,effect") and any("not significant" in s for s in said)
    assert (tmp_path/"effects.png").read_bytes().startswith(b"\x89PNG") and not any("eagle" in l.get_text() for l in A.forest(table).axes[0].get_yticklabels())      # its ratio is a mean, not an effect

def english(run):
    rows = read_jsonl(run/"05_data"/"midtrain.jsonl"); size = lambda r: len(r["messages"][0]["content"])
    return sum(map(size, rows)), 100*sum(size(r) for r in rows if r["lang"] == "en")/sum(map(size, rows))

@pytest.fixture
def corpus(tmp_path, monkeypatch):
    "A sweep in which chapter 05 is a fake that gives as many characters as asked for, every sixth row English; the later stages say what they were asked."
    asked = []
    def run_stage(root, stage, params, keys, ins, label, inherited=None):
        out = root/params["run_dir"]/stage; out.mkdir(parents=True, exist_ok=True); asked.append((out.parent.name, stage, params))
        if stage == "05_data": write_jsonl(out/"midtrain.jsonl", [dict(lang="en" if i % 6 == 0 else "ru", messages=[dict(role="user", content=("ab" if i % 6 == 0 else "я")*10)]) for i in range(params["midtrain_chars"]//11)])
        write_json(out/"metrics.json", {})
        write_json(out/"stamp.json", dict(stage=stage, code_key=keys, inputs=ins, outputs=P.list_outputs(out)))
    monkeypatch.setattr(P, "run_stage", run_stage); monkeypatch.setattr(P, "export_all", lambda root: None); monkeypatch.setattr(P, "_inputs_now", lambda *a: {})
    keyed = lambda f: f.exists() and read_json(f)["code_key"]["key"]
    monkeypatch.setattr(P, "stage_status", lambda run, stage, key, done, ins: SimpleNamespace(state="current" if keyed(run/stage/"stamp.json") == key["key"] else "stale", stamp={}))
    monkeypatch.setattr(A, "measured", lambda run, speed: dict(zip(("chars", "share"), english(run))))
    monkeypatch.setattr(A, "tokens", lambda run, vocabulary="dense": sum(len(r["messages"][0]["content"])//(4 if r["lang"] == "en" else 2) for r in read_jsonl(run/"05_data"/"midtrain.jsonl")))
    return tmp_path/"sweep", asked

def test_a_sweep_moves_the_language_of_what_is_read_and_nothing_else(corpus):
    "The share is that of the midtraining text itself, at equal characters; the corpus is made once; steps follow the tokens."
    out, asked = corpus
    rows = A.ablate(ROOT, "smoke", [0], str(out), sweep="english", changes={"05_data": dict(midtrain_chars=6000)}, say=lambda s: None)
    assert [r["share"] for r in rows] == pytest.approx(A.ENGLISH, abs=.3) and [r["chars"] for r in rows] == pytest.approx([6000]*5, abs=20)
    assert [a[0] for a in asked if a[1] == "05_data"] == ["corpus"] and asked[[a[1] for a in asked].index("05_data")][2]["midtrain_chars"] == 12000
    steps = {run: p["steps"] for run, s, p in asked if s == "06_midtraining"}; base = P.load_params(ROOT, "smoke")["06_midtraining"]["steps"]
    assert steps["english0"] == base and steps["english40"] == round(base*.8)                       # four tenths of the text takes half the tokens

def test_a_share_that_the_corpus_cannot_reach_is_refused_before_training(corpus, monkeypatch):
    out, asked = corpus; monkeypatch.setattr(A, "ENGLISH", (0., 95.))
    with pytest.raises(UserError, match="english95: 95 % English of 6,000 characters needs .* characters of en more"): A.ablate(ROOT, "smoke", [0], str(out), sweep="english", changes={"05_data": dict(midtrain_chars=6000)}, say=lambda s: None)
    assert "english95" not in {a[0] for a in asked}

def test_sweep_report(tmp_path):
    rng = np.random.default_rng(3); sweep = [dict(english_pct=e, seed=s, think_accuracy=e/100 + s/10 + rng.normal(0, .002), direct_accuracy=0.) for e in A.ENGLISH for s in range(3)]
    table = {(t["response"], t["term"]): t for t in A.report(sweep, tmp_path, "english", say=lambda s: None)}
    mean, gap = table["think_accuracy", "0 % English"], table["think_accuracy", "40 minus 0 % English"]
    assert len(table) == 18 and mean["effect"] == pytest.approx(.1, abs=.01) and mean["lo"] < .1 < mean["hi"]
    assert gap["lo"] < .4 < gap["hi"] and gap["hi"] - gap["lo"] < (mean["hi"] - mean["lo"])/10 and gap["verdict"] == "significant"      # the seeds' own level is not its noise
    assert table["direct_accuracy", "40 minus 0 % English"]["verdict"] == "does not vary"
    assert len(A.shares([r for r in sweep if r["seed"] == 0], "think_accuracy")) == 5               # one seed: means, no verdict
    with pytest.raises(UserError, match="every seed needs every share"): A.shares(sweep[1:], "think_accuracy")
    assert {f.name for f in tmp_path.iterdir()} == {"english.csv", "english.png"}                    # a sweep does not pass for a factorial
