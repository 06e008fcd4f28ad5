"The tokenizer × drafter grid: characters counted right, ratios by hand, a small grid from end to end that is kept and not run twice."
import csv
import numpy as np
import pytest, torch
from tpro_nb import grid as G
from tpro_nb.core import TOY_TEXT, UserError, read_json, toy_model, toy_tokenizer, write_jsonl
from tpro_nb.eagle_decoding import PROOF_PROMPTS
from tpro_nb.eagle_draft import random_draft

MS = dict(plain=dict(draft_ms=0., verify_ms=10.), chain=dict(draft_ms=2., verify_ms=12.), tree=dict(draft_ms=3., verify_ms=13.))

def made(chars, tau, prompts=6, bump=0):
    "A cell in which every step of every prompt yields tau tokens of `chars` characters; prompt i takes i + 10 steps."
    rows = lambda t: [[(i + 10)*t, (i + 10)*t*chars + bump*i, i + 10] for i in range(prompts)]
    return dict(runs={m: {t: rows(1 if m == "plain" else tau) for t in ("0", "0.8")} for m in G.SHAPES}, kept=[8]*prompts, ids=[10]*prompts, bits_per_byte=1.5)

def test_characters_of_tokens_add_up(tmp_path):
    from transformers import AutoTokenizer
    toy_tokenizer(tmp_path/"t"); tok = AutoTokenizer.from_pretrained(tmp_path/"t")
    n = G.char_counts(tok)
    for text in [*TOY_TEXT, "ё — 𝄞 z\n"]: assert n[tok.encode(text, add_special_tokens=False)].sum() == len(text)
    assert n[tok.eos_token_id] == 0

def test_ratios_by_hand_and_pairs_drawn_together():
    rows = G.table({("base", 0): made(2, 2.0), ("dense", 0): made(3, 1.5)}, MS)
    get = lambda v, m, t="0.8": next(r for r in rows if (r["vocabulary"], r["method"], r["temperature"], r["seed"]) == (v, m, t, "all"))
    assert get("base", "plain")["chars_per_s"] == 200 and get("dense", "plain")["over_base"] == 1.5
    assert get("base", "chain")["chars_per_step"] == 4 and get("base", "chain")["chars_per_s"] == pytest.approx(1000*4/14, abs=1e-3)
    d = get("dense", "tree")
    assert (d["acceptance_length"], d["chars_per_step"], d["over_base"], d["acceptance_over_base"]) == (1.5, 4.5, 1.125, .75)
    assert d["over_base_lo"] == d["over_base_hi"] == 1.125          # prompts differ in length, not in ratio: drawn together, nothing varies
    assert get("base", "tree")["over_base"] == 1 and d["coverage_pct"] == 80
    rows = G.table({("base", 0): made(2, 2.0), ("dense", 0): made(3, 1.5, bump=4)}, MS)
    d = next(r for r in rows if r["vocabulary"] == "dense" and r["method"] == "tree")
    assert d["over_base_lo"] < d["over_base"] < d["over_base_hi"]

def test_seeds_are_pooled_and_shown():
    cells = {(v, s): made(c, t) for s, extra in enumerate((0, 1)) for v, c, t in (("base", 2, 2.0 + extra), ("dense", 3, 1.5))}
    rows = G.table(cells, MS)
    assert [r["seed"] for r in rows] == ["all"]*12 + [0]*12 + [1]*12
    tau = {r["seed"]: r["acceptance_length"] for r in rows if (r["vocabulary"], r["method"], r["temperature"]) == ("base", "chain", "0")}
    assert tau == {"all": 2.5, 0: 2.0, 1: 3.0}

def test_documents_do_not_overlap(monkeypatch):
    text = lambda part: [f"{part} {i} " + "слово "*40 for i in range(60)] + ["коротко"]
    monkeypatch.setattr(G.assets, "quotations", text)
    d = G.documents(G.SIZE | dict(chars=2000, answers=8, prompts=4, bits_docs=5))
    assert len(d["draft"]) == 8 and len(d["heldout"]) == 5 and sum(map(len, d["target"])) >= 2000
    assert not set(d["target"]) & set(d["draft"]) and all(t.startswith("heldout") for t in d["heldout"])
    with pytest.raises(UserError, match="too few"): G.documents(G.SIZE | dict(chars=10**7))

@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run's tokenizers, target and draft as toys; children run in this process."
    run = tmp_path/"toyrun"
    for v in ("qwen_base", "qwen_dense"): toy_tokenizer(run/"02_tokenizer_surgery"/v)
    toy_model(run/"03_base_model"/"base"); random_draft(run/"11_eagle_draft"/"base", run/"03_base_model"/"base")
    write_jsonl(run/"11_eagle_draft"/"prompts_dev.jsonl", PROOF_PROMPTS)
    calls = []
    def launch(target, config, work, **kw): calls.append(target); return getattr(G, target.split(":")[1])(**config)
    docs = [t for t in TOY_TEXT if len(t) > 20]
    monkeypatch.setattr(G, "launch", launch)
    monkeypatch.setattr(G, "documents", lambda size: dict(target=docs*4, draft=docs[:4], heldout=docs[:3]))
    n = torch.get_num_threads(); torch.set_num_threads(1); yield run, calls; torch.set_num_threads(n)

TINY = G.SIZE | dict(vocab=330, hidden=64, layers=1, batch=2, length=32, chars=400, answers=4, answer_chars=24, gen_batch=2, hot=280, epochs=1, draft_batch=2, prompts=2, prompt_chars=16, new_chars=16, bits_docs=2)

def test_grid_from_end_to_end_and_resumed(run, tmp_path):
    run, calls = run
    said = []
    rows = G.grid(run, tmp_path/"out", TINY, [0], say=said.append)
    assert calls == ["tpro_nb.grid:cell"]*2 + ["tpro_nb.grid:costs"] and len(said) == 2
    got = list(csv.DictReader(open(tmp_path/"out"/"grid.csv", newline="", encoding="utf-8")))
    assert len(got) == len(rows) == 12 and {(r["vocabulary"], r["method"]) for r in got} == {(v, m) for v in ("base", "dense") for m in G.SHAPES}
    for r in rows:
        assert r["acceptance_length"] >= 1 and r["chars_per_s"] > 0 and 0 < r["coverage_pct"] <= 100
        assert r["method"] != "plain" or (r["acceptance_length"] == 1 and r["draft_ms"] == 0)
    assert read_json(tmp_path/"out"/"grid.json")["size"]["vocab"] == 330 and (tmp_path/"out"/"grid.png").stat().st_size > 10_000
    assert next(iter((tmp_path/"out"/"work").glob("base-0-*/target"))).is_dir()
    G.grid(run, tmp_path/"out", TINY, [0], say=said.append)
    assert len(calls) == 3                                          # nothing was run again
    again = next((tmp_path/"out"/"work").glob("dense-0-*")); (again/"cell.json").unlink(); stamp = (again/"target"/"model.safetensors").stat().st_mtime_ns
    G.grid(run, tmp_path/"out", TINY, [0], say=said.append)
    assert calls[3:] == ["tpro_nb.grid:cell"] and (again/"target"/"model.safetensors").stat().st_mtime_ns == stamp      # a stopped cell keeps its target

def test_what_a_user_gets_wrong(tmp_path):
    with pytest.raises(UserError, match="run the profile up to 11"): G.grid(tmp_path, tmp_path/"out", TINY, [0])
    with pytest.raises(UserError, match="NAME=VALUE"): G.main(["smoke", "--set", "depth=3"])
    with pytest.raises(UserError, match="number above 0"): G.main(["smoke", "--set", "vocab=lots"])
