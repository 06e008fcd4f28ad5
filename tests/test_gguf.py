"Chapter 13b: a model folder as GGUF, read back by transformers; what llama.cpp could not read."

import errno
import json
import shutil

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tpro_nb.certificate import load_tokenizer_json
from tpro_nb.cli import main
from tpro_nb.core import UserError, toy
from tpro_nb.gguf_export import (
    RotarySettings,
    export_to_gguf,
    gguf_tokens,
    llama_cpp_rule,
    rotary_factors,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A tied Qwen3 in float32, an untied bf16 Llama with grouped heads; the toy's tokenizer."
    home = tmp_path_factory.mktemp("models")
    qwen = home / "qwen"
    shutil.copytree(toy("03b_base_model/base"), qwen)
    llama = home / "llama"
    tok = AutoTokenizer.from_pretrained(qwen)
    config = LlamaConfig(
        vocab_size=len(tok) + 6,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(llama)
    tok.save_pretrained(llama)
    return dict(qwen=qwen, llama=llama)


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_another_reader_gets_the_same_model_and_ids(tmp_path, folders, name):
    path = export_to_gguf(folders[name], tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=model.config, dtype=torch.float32
    )
    ids = torch.tensor([[5, 300, 7, 301, 9, 4, 411]])
    assert torch.allclose(back(ids).logits, model(ids).logits, atol=1e-4)
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in names) is (name == "llama")
    tok = AutoTokenizer.from_pretrained(folders[name])
    vocab = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name).get_vocab()
    assert {token: vocab[token] for token in tok.get_vocab()} == tok.get_vocab()
    assert list(tmp_path.iterdir()) == [path]


def test_kinds_of_entries(folders):
    tok_json = load_tokenizer_json(folders["llama"])
    vocab = AutoTokenizer.from_pretrained(folders["llama"]).get_vocab()
    tokens = gguf_tokens(tok_json, max(vocab.values()) + 3)
    assert tokens[vocab["<|im_end|>"]].kind == gguf.TokenType.CONTROL
    assert tokens[vocab["<think>"]].kind == gguf.TokenType.USER_DEFINED
    assert tokens[vocab["a"]] == ("a", gguf.TokenType.NORMAL)
    assert [token.kind for token in tokens[-2:]] == [gguf.TokenType.UNUSED] * 2
    assert len({token.text for token in tokens}) == len(tokens)
    with pytest.raises(UserError, match="not a pair"):
        gguf_tokens(tok_json, 300)


RULE_CASES = [
    (dict(), "gpt-2"),
    (dict(normalizer=dict(type="NFC")), "gpt-2"),
    (dict(normalizer=dict(type="NFKC")), None),
    (dict(pre_tokenizer=None), None),
    (dict(pre_tokenizer=dict(type="Whitespace")), None),
]


@pytest.mark.parametrize(("parts", "rule"), RULE_CASES)
def test_the_rule_is_named_or_refused(folders, parts, rule):
    tok_json = load_tokenizer_json(folders["qwen"]) | parts
    if rule:
        assert llama_cpp_rule(tok_json) == rule
        words_first = tok_json | dict(model=tok_json["model"] | dict(ignore_merges=True))
        with pytest.raises(UserError, match="ignore_merges"):
            llama_cpp_rule(words_first)
        return
    with pytest.raises(UserError, match="cut text otherwise"):
        llama_cpp_rule(tok_json)


def test_llama3_slows_the_slow_rotations_only():
    values = dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    factors = rotary_factors(RotarySettings(500_000.0, "llama3", values), 128)
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        rope_parameters=dict(rope_type="llama3", rope_theta=500_000.0, **values),
    )
    plain = 1 / 500_000.0 ** (torch.arange(0, 128, 2) / 128)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert torch.allclose(plain / torch.tensor(factors), slowed, rtol=1e-4)
    assert (factors[0], factors[-1]) == (1.0, 8.0)


REFUSED = [
    (dict(model_type="gpt2"), "gpt2 model"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)), "'yarn'"),
    (dict(vocab_size=77), "does not fit"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_what_cannot_be_exported(tmp_path, folders, capsys, change, says):
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen"], folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit) as end:
        main(["gguf", str(folder), str(tmp_path / "model.gguf")])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def out_of_space(*given):
    raise OSError(errno.ENOSPC, "No space left on device")


def broken_config(folder):
    (folder / "config.json").write_text("{oops")


def foreign_words(folder):
    path = folder / "tokenizer.json"
    tok_json = json.loads(path.read_text()) | dict(pre_tokenizer=dict(type="Whitespace"))
    path.write_text(json.dumps(tok_json))


PLACES = {  # what is done to a copy of the toy, where to write, and what is said; None: it works
    "a new folder": (None, "new/deep/m.gguf", None),
    "over an older file": (None, "old.gguf", None),
    "a name without an ending": (None, "model", None),
    "letters of another script": (None, "модель.gguf", None),
    "beside the weights": (None, "model/m.gguf", None),
    "a folder": (None, "model", "is a folder"),
    "under a file": (None, "old.gguf/m.gguf", "Name another place"),
    "a broken config": (broken_config, "m.gguf", "copied whole"),
    "another cut of words": (foreign_words, "m.gguf", "cut text otherwise"),
    "a full disk": ("full", "m.gguf", "No space left"),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_and_from_what(tmp_path, folders, monkeypatch, name):
    spoil, where, says = PLACES[name]
    folder = tmp_path / ("model" if where != "model" or says else "other")
    shutil.copytree(folders["qwen"], folder)
    (tmp_path / "old.gguf").write_text("older")
    if spoil == "full":
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", out_of_space)
    elif spoil:
        spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    if says is None:
        path = export_to_gguf(folder, tmp_path / where)
        assert path.read_bytes()[:4] == b"GGUF"
        return
    with pytest.raises(UserError, match=says):
        export_to_gguf(folder, tmp_path / where)
    assert sorted(tmp_path.rglob("*")) == before
