"Chapter 03d: any alphabet, any byte-level base, swaps or growth; what cannot be done is refused."

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tpro_nb import adapt as adapting
from tpro_nb.adapt import (
    AdaptSettings,
    adapt,
    base_words,
    letters_of_alphabet,
    letters_of_script,
    load_adapt_base,
    read_frequencies,
)
from tpro_nb.base_model import row_plan, transplant
from tpro_nb.certificate import load_tokenizer_json, tokenizer_from_json
from tpro_nb.cli import main
from tpro_nb.core import UserError, toy, toy_model, toy_tokenizer
from tpro_nb.training import vocab_matrices

LINES = dict(
    Cyrillic="Сәлам дөнья, исәнмесез, рәхмәт! Татарстан башкаласы Казан шәһәре.",
    Armenian="Բարև աշխարհ, շնորհակալություն: Երևանը Հայաստանի մայրաքաղաքն է։",
    Georgian="გამარჯობა მსოფლიო, თბილისი საქართველოს დედაქალაქია.",
    Devanagari="नमस्ते दुनिया, दिल्ली भारत की राजधानी है।",
    Arabic="مرحبا بالعالم، القاهرة عاصمة مصر.",
    Greek="Γειά σου Κόσμε, η Αθήνα είναι η πρωτεύουσα.",
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def llama3_like(folder):
    "A Llama in Llama 3's layout: its regex, specials after the entries, ids put first, no NFC."
    toy_tokenizer(folder / "qwen")
    tok_json = load_tokenizer_json(folder / "qwen")
    specials = [added["content"] for added in tok_json["added_tokens"]]
    vocab = [name for name in tok_json["model"]["vocab"] if name not in specials]
    model = tok_json["model"] | dict(vocab={name: k for k, name in enumerate(vocab)})
    split = dict(type="Split", pattern={"Regex": LLAMA3}, behavior="Isolated", invert=False)
    in_bytes = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    first = len(vocab)
    begins = dict(SpecialToken=dict(id=BEGIN, type_id=0))
    text = dict(Sequence=dict(id="A", type_id=0))
    tok_json |= dict(
        model=model | dict(ignore_merges=True),
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, in_bytes]),
        added_tokens=[
            dict(id=first, content=BEGIN, **flags),
            dict(id=first + 1, content=END, **flags),
        ],
        post_processor=dict(
            type="TemplateProcessing",
            single=[begins, text],
            pair=[begins, text, dict(Sequence=dict(id="B", type_id=1))],
            special_tokens={BEGIN: dict(id=BEGIN, ids=[first], tokens=[BEGIN])},
        ),
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_from_json(tok_json), bos_token=BEGIN, eos_token=END
    )
    config = LlamaConfig(
        vocab_size=len(tok) + 2,  # two rows of padding, as many models have
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=first,
        eos_token_id=[first + 1, first],
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Two model folders: Qwen's layout with tied rows, Llama 3's with untied ones."
    return dict(
        qwen=str(toy("03b_base_model/base")),
        llama=str(llama3_like(tmp_path_factory.mktemp("llama"))),
    )


def text_file(folder, line, name="mine.txt"):
    path = folder / name
    path.write_text("".join(f"{line} {k}\n" for k in range(60)), encoding="utf-8")
    return str(path)


CASES = [
    ("qwen", "Armenian", dict(swaps=9)),
    ("qwen", "Cyrillic", dict(grow=12)),
    ("qwen", "Devanagari", dict(grow=9)),
    ("llama", "Armenian", dict(grow=12)),
    ("llama", "Cyrillic", dict(swaps=9)),
    ("llama", "Georgian", dict(swaps=9)),
    ("llama", "Arabic", dict(grow=1)),
    ("llama", "Greek", dict(swaps=1)),
]


@pytest.mark.parametrize(("base", "script", "how"), CASES)
def test_an_alphabet_gets_entries_and_the_model_its_rows(tmp_path, bases, base, script, how):
    out = tmp_path / "out"
    made = adapt(
        AdaptSettings(
            base=bases[base],
            out=str(out),
            letters=letters_of_script(script),
            texts=[text_file(tmp_path, LINES[script])],
            everybody=False,
            **how,
        )
    )
    n = sum(how.values())
    certificate = made["certificate"]
    assert certificate["ok"]
    assert certificate["tokens_added"] == n
    assert certificate["grown"] == how.get("grow", 0)
    assert made["own_ratio"] < 1
    old, new = (AutoTokenizer.from_pretrained(path) for path in (bases[base], out / "tokenizer"))
    assert (new.eos_token, new.bos_token, new.pad_token) == (
        old.eos_token,
        old.bos_token,
        old.pad_token,
    )
    assert new.chat_template == old.chat_template
    before = AutoModelForCausalLM.from_pretrained(bases[base])
    after = AutoModelForCausalLM.from_pretrained(out / "model")
    assert after.config.eos_token_id == before.config.eos_token_id
    assert after.config.bos_token_id == before.config.bos_token_id
    assert after.config.tie_word_embeddings == before.config.tie_word_embeddings
    plan = row_plan(old, new)
    assert len(plan.new) == n == made["new_rows"]
    rows = before.get_input_embeddings().num_embeddings
    assert after.get_input_embeddings().num_embeddings == max(rows, len(new))
    for was, now in zip(vocab_matrices(before), vocab_matrices(after)):
        kept = list(plan.kept)
        assert torch.equal(now[kept], was[list(plan.kept.values())])
        for token, pieces in plan.new.items():
            assert torch.allclose(now[token].float(), was[pieces].float().mean(0), atol=1e-2)
    text = LINES[script]
    assert AutoTokenizer.from_pretrained(out / "model").encode(text) == new.encode(text)
    made_files = {path.name for path in out.iterdir()}
    assert {"certificate.json", "cost.png", "cost.csv", "id_map.json", "README.md"} <= made_files


def test_a_list_alone_and_a_tokenizer_alone_are_enough(tmp_path, bases):
    (tmp_path / "hy.tsv").write_text("բարև\t50\nաշխարհ 20\nԵրևան,3\n", encoding="utf-8")
    tokenizer_alone = tmp_path / "tokenizer"
    toy_tokenizer(tokenizer_alone)
    out = tmp_path / "out"
    made = adapt(
        AdaptSettings(
            base=str(tokenizer_alone),
            out=str(out),
            letters=letters_of_script("Armenian"),
            texts=[],
            frequencies=str(tmp_path / "hy.tsv"),
            swaps=6,
            everybody=False,
        )
    )
    assert made["certificate"]["ok"]
    assert made["new_rows"] is None
    assert not (out / "model").exists()
    assert "no model was written" in (out / "README.md").read_text()


def test_the_base_cuts_the_words(bases):
    "Digits in threes and a leading sign are Llama 3's way; marks stay where the base puts them."
    tok = tokenizer_from_json(load_tokenizer_json(bases["llama"]))
    words = base_words(tok, ["кот-кот 12345"], letters_of_script("Cyrillic"))
    assert sum(words.values()) == 2
    assert len(words) == 2


# --- what cannot be done, said before any work

GOOD = dict(script="Cyrillic", swaps="9")


def out_of_reach(name, **asked):
    raise LocalEntryNotFoundError("cannot find the files on the Hub")


def test_a_hub_gives_the_tokenizer_first(monkeypatch, bases):
    "Gigabytes of weights wait until the request is known to be possible."
    asked = []
    monkeypatch.setattr(
        adapting, "snapshot_download", lambda name, **what: asked.append(what) or bases["llama"]
    )
    base = load_adapt_base("somebody/model")
    assert (base.name, base.weights) == ("somebody/model", "somebody/model")
    assert base.tok_json == load_tokenizer_json(bases["llama"])
    assert asked == [dict(allow_patterns=["*.json", "*.jinja"])]


def unigram(folder):
    tok = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    tok.save(str(folder / "tokenizer.json"))


def no_merges(folder):
    tok_json = json.loads((folder / "tokenizer.json").read_text())
    tok_json["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tok_json))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def too_few_rows(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(vocab_size=300)))


SPOILT = dict(
    unigram=unigram,
    no_merges=no_merges,
    pickled=pickled,
    cut_short=cut_short,
    too_few_rows=too_few_rows,
)


REFUSED = [
    (dict(script="Cyrilic"), "no script of that name"),
    (dict(script="[а-я]"), "Unicode name"),
    (dict(script=None, alphabet="абв12"), "is no letter"),
    (dict(script=None, alphabet="а"), "all letters of the language"),
    (dict(swaps="100000"), "may be removed"),
    (dict(swaps="0"), "positive number"),
    (dict(swaps="-5"), "positive number"),
    (dict(swaps=None, grow="-5"), "positive number"),
    (dict(swaps=None, grow="5000"), "can be joined in"),
    (dict(script="Greek"), "of the alphabet that is to gain"),
    (dict(text=None), "no words to choose on"),
    (dict(text="absent.txt"), "cannot read"),
    (dict(text="cp1251.txt"), "not UTF-8"),
    (dict(text="empty.txt"), "no words to choose on"),
    (dict(frequencies="words.tsv"), "line 2"),
    (dict(frequencies="negative.tsv"), "line 1"),
    (dict(frequencies="not_a_number.tsv"), "line 1"),
    (dict(text=None, frequencies="zero.tsv"), "no words to choose on"),
    (dict(base="unigram"), "'Unigram'"),
    (dict(base="no_merges"), "no merges"),
    (dict(base="pickled"), "pickle"),
    (dict(base="cut_short"), "copied whole"),
    (dict(base="too_few_rows"), "not a pair"),
    (dict(out="mine.txt/out"), "Name a folder that can be written"),
    (dict(base="nowhere/at-all"), "nor a hub id"),
    (dict(out="."), "something already"),
    (dict(init="magic"), "choose one of"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_what_cannot_be_done_is_refused_before_work(
    tmp_path, bases, monkeypatch, capsys, change, says
):
    monkeypatch.setattr(adapting, "snapshot_download", out_of_reach)
    monkeypatch.chdir(tmp_path)
    for work in ("adapted_json", "adapt_votes"):
        monkeypatch.setattr(adapting, work, lambda *given: pytest.fail("work had started"))
    text_file(tmp_path, LINES["Cyrillic"])
    (tmp_path / "cp1251.txt").write_bytes("кот".encode("cp1251"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "words.tsv").write_text("кот 5\nпёс\n", encoding="utf-8")
    (tmp_path / "negative.tsv").write_text("кот -5\n", encoding="utf-8")
    (tmp_path / "not_a_number.tsv").write_text("кот nan\n", encoding="utf-8")
    (tmp_path / "zero.tsv").write_text("кот 0\nпёс -0.0\n", encoding="utf-8")
    asked = dict(base=bases["qwen"], text="mine.txt", out="out") | GOOD | change
    if asked["base"] in SPOILT:
        shutil.copytree(bases["qwen"], tmp_path / "b")
        SPOILT[asked["base"]](tmp_path / "b")
        asked["base"] = "b"
    argv = ["adapt", asked.pop("base")]
    for name, value in asked.items():
        if value is not None:
            argv.append(f"--{name}={value}")
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


FAULTS = [
    (OSError(28, "No space left on device"), 2),
    (Exception("File too large (os error 27)"), 2),
    (SafetensorError("I/O error: No space left on device (os error 28)"), 2),
    (UserError("cannot read x (os error 2)"), 2),
    (RuntimeError("the certificate failed"), 1),
]


@pytest.mark.parametrize(("fault", "status"), FAULTS)
def test_a_full_disk_is_one_line(tmp_path, bases, monkeypatch, capsys, fault, status):
    def fails(*given):
        raise fault

    monkeypatch.setattr(adapting, "adapted_json", fails)
    text = text_file(tmp_path, LINES["Cyrillic"])
    argv = ["adapt", bases["qwen"], "--script", "Cyrillic", "--text", text, "--swaps", "9"]
    with pytest.raises(SystemExit) as end:
        main([*argv, "--out", str(tmp_path / "out")])
    assert end.value.code == status
    said = capsys.readouterr().err
    full = "Free space" in said
    assert full == (status == 2 and not isinstance(fault, UserError))


def test_frequency_lists(tmp_path):
    path = tmp_path / "list"
    path.write_text("\ufeffкот\t5\nпёс 7\n рак ; 2.5\n\nё,1e3\n", encoding="utf-8")
    assert read_frequencies(path) == [("ё", 1000.0), ("пёс", 7.0), ("кот", 5.0), ("рак", 2.5)]


def test_alphabets():
    assert letters_of_alphabet("аи\u0306") == frozenset("айАЙ")  # й spelt with a loose sign
    assert "'" in letters_of_alphabet("абґ'")
    assert letters_of_script("Latin") >= frozenset("abzÄß")
    assert "и" not in letters_of_script("latin")


# --- the transplant maps special tokens by their role


def test_a_special_of_another_name_gets_the_row_of_its_role(tmp_path):
    toy_tokenizer(tmp_path / "base")
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    tok_json = load_tokenizer_json(tmp_path / "base")
    text = json.dumps(tok_json, ensure_ascii=False).replace("<|im_end|>", "<|eot_id|>")
    renamed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_from_json(json.loads(text)),
        eos_token="<|eot_id|>",
        pad_token=base.pad_token,
    )
    plan = row_plan(base, renamed)
    assert plan.new == {renamed.eos_token_id: [base.eos_token_id]}


def test_a_special_that_is_gone_is_named(tmp_path):
    toy_tokenizer(tmp_path / "base")
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    without_end = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_from_json(
            json.loads(
                json.dumps(load_tokenizer_json(tmp_path / "base"), ensure_ascii=False).replace(
                    "<|im_end|>", "<|nothing|>"
                )
            )
        )
    )
    model = toy_model(tmp_path / "model", vocab_size=640)
    with pytest.raises(UserError, match="eos_token.*<\\|im_end\\|>"):
        transplant(model, base, without_end)
