"""`make test-loads`: an older transformers, llama.cpp and mergekit, each in its own environment.

The dense Qwen3 vocabulary must have the same ids everywhere, on 10,000 lines.
"""

import json
import os
import subprocess
import sys
import unicodedata
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tpro_nb import corpora
from tpro_nb.base_model import RaceSettings
from tpro_nb.certificate import PROBES, load_tokenizer_json, random_text, save_tokenizer_folder
from tpro_nb.core import TOY_TEXT, toy, toy_model, toy_tokenizer
from tpro_nb.gguf_export import export_to_gguf
from tpro_nb.initialisers import TOKENSURGEON, PeerPaths, make_donor, starts
from tpro_nb.tokenizer_surgery import dense_tokenizer

CHILD = Path(__file__).with_name("loads_child.py")
HOME = Path(os.environ.get("TPRO_NB_LOADS", "/nowhere"))

pytestmark = pytest.mark.skipif(not HOME.exists(), reason="make test-loads makes what it needs")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A small Qwen3 in float32 with the dense vocabulary and Qwen3's padded rows."
    folder = tmp_path_factory.mktemp("loads") / "dense"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    save_tokenizer_folder(load_tokenizer_json(dense_tokenizer()), folder)
    return folder


@pytest.fixture(scope="module")
def lines():
    "10,000 lines of eleven languages, source text and random signs, in NFC."
    found = ["Мороз и солнце; день", *PROBES[:-1], *random_text(500)]
    for lang in [*corpora.LANGS, "en", "code"]:
        running = chain.from_iterable(doc.splitlines() for doc in corpora.text(lang, "heldout"))
        found += list(running)[:1100]
    for messages in corpora.locales("heldout").values():
        found += messages[:60]
    return [unicodedata.normalize("NFC", line) for line in found if line][:10_000]


def ask(python, what, source, lines, folder):
    given, out = folder / "lines.json", folder / "answer.json"
    given.write_text(json.dumps(lines), encoding="utf-8")
    command = [str(python), str(CHILD), what, str(source), str(given), str(out)]
    subprocess.run(command, check=True)
    return json.loads(out.read_text(encoding="utf-8"))


def test_transformers_4_has_the_same_ids(model, lines, tmp_path):
    assert len(lines) == 10_000
    here = ask(sys.executable, "ids", model, lines, tmp_path)
    there = ask(HOME / "transformers4" / "bin" / "python", "ids", model, lines, tmp_path)
    assert there["version"].startswith("4.57")
    assert there["ids"] == here["ids"] == there["plain"] == here["plain"]


def test_llama_cpp_has_the_same_ids_and_continues_alike(model, lines, tmp_path):
    path = export_to_gguf(model, tmp_path / "dense.gguf")
    found = ask(HOME / "llama" / "bin" / "python", "llama", path, lines, tmp_path)
    tok = AutoTokenizer.from_pretrained(model)
    expected = tok(lines)["input_ids"]
    unlike = [line for line, a, b in zip(lines, found["ids"], expected) if a != b]
    assert unlike == []
    prompt = torch.tensor([expected[0]])
    ours = Qwen3ForCausalLM.from_pretrained(model)
    continued = ours.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    assert found["greedy"] == continued.tolist()


def test_every_rule_of_mergekit_runs_beside_ours(tmp_path):
    "On a toy only that all run and are finite; chapter 03c has real figures."
    toy_model(tmp_path / "base")
    toy_tokenizer(tmp_path / "base", vocab_size=400)
    dense = Path(toy("02c_tokenizer_surgery/dense"))
    make_donor(dense, TOY_TEXT * 5, tmp_path / "donor", width=64)
    paths = PeerPaths(
        base=tmp_path / "base",
        dense=dense,
        donor=tmp_path / "donor",
        work=tmp_path,
        tokensurgeon=str(HOME / "mergekit" / "bin" / "mergekit-tokensurgeon"),
    )
    budget = RaceSettings(steps=1, every=1, batch=2, length=16, lr=1e-3, rank=0)
    for rows in starts(paths, TOY_TEXT[:4], TOY_TEXT, budget).values():
        assert {f"mergekit {rule}" for rule in TOKENSURGEON} < set(rows)
        assert rows["mean"]["worse_than_mean"] == 0
        assert all(0 < row["bits_per_byte"] < 20 for row in rows.values())
