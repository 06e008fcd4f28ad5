"Chapter 02a: the certificate judges behaviour, and says in one line what it cannot judge."

import copy
import json
import unicodedata

import pytest
from transformers import AutoTokenizer

from tpro_nb.certificate import (
    CHAR_TO_BYTE,
    byte_level,
    certify,
    load_tokenizer_json,
    read_object,
    save_tokenizer_folder,
    setting_differences,
    tokenizer_from_json,
)
from tpro_nb.cli import main
from tpro_nb.core import UserError, toy_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A toy of the project with Qwen's normaliser."
    folder = tmp_path_factory.mktemp("base")
    toy_tokenizer(folder)
    return load_tokenizer_json(folder) | dict(normalizer=dict(type="NFC"))


def mark(content, **flags):
    usual = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    return dict(content=content) | usual | flags


# --- parts around the lists: (part, what it becomes, whether behaviour changes)

QWEN = {"Regex": r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+|[^\s\p{L}\p{N}]+"}
BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
SPLIT = dict(type="Split", pattern=QWEN, behavior="Isolated", invert=False)
IN_BYTES = BYTES | dict(use_regex=False)
PREPENDS = dict(
    type="TemplateProcessing",
    single=[
        dict(SpecialToken=dict(id="<|endoftext|>", type_id=0)),
        dict(Sequence=dict(id="A", type_id=0)),
    ],
    pair=[dict(Sequence=dict(id="A", type_id=0)), dict(Sequence=dict(id="B", type_id=1))],
    special_tokens={"<|endoftext|>": dict(id="<|endoftext|>", ids=[0], tokens=["<|endoftext|>"])},
)
PREPENDS_NOTHING = PREPENDS | dict(single=PREPENDS["single"][1:], special_tokens={})
PART_CASES = [
    ("normalizer", None, True),
    ("normalizer", dict(type="NFKC"), True),
    ("normalizer", dict(type="NFD"), True),
    ("normalizer", dict(type="Lowercase"), True),
    ("normalizer", dict(type="Strip", strip_left=True, strip_right=False), True),
    ("normalizer", dict(type="Replace", pattern=dict(String="щи"), content="борщ"), True),
    ("normalizer", dict(type="Sequence", normalizers=[dict(type="NFC")]), False),
    ("pre_tokenizer", BYTES | dict(add_prefix_space=True), True),
    ("pre_tokenizer", BYTES | dict(use_regex=False), True),
    ("pre_tokenizer", dict(type="Sequence", pretokenizers=[SPLIT, IN_BYTES]), True),
    ("pre_tokenizer", BYTES | dict(trim_offsets=False), False),
    ("pre_tokenizer", dict(type="Sequence", pretokenizers=[BYTES]), False),
    ("post_processor", PREPENDS, True),
    ("post_processor", PREPENDS_NOTHING, False),
    ("post_processor", BYTES, False),
    ("decoder", None, True),
    ("decoder", dict(type="Metaspace", replacement="▁", prepend_scheme="always", split=True), True),
    ("decoder", BYTES | dict(add_prefix_space=True, use_regex=False), False),
    ("decoder", dict(type="Sequence", decoders=[BYTES, dict(type="Fuse")]), False),
    (
        "truncation",
        dict(direction="Right", max_length=16, strategy="LongestFirst", stride=0),
        True,
    ),
    ("truncation", None, False),
    ("padding", None, False),
]


@pytest.mark.parametrize(("part", "becomes", "changes"), PART_CASES)
def test_a_part_that_works_otherwise_is_named(base, part, becomes, changes):
    same = json.dumps(base.get(part)) == json.dumps(becomes)
    certificate = certify(base | {part: becomes}, base)
    assert certificate["ok"] is not changes
    named = certificate["exceptions"].get("behaviour_changed", [])
    assert len(named) == certificate["behaviour_changed"] == int(changes)
    assert len(certificate["notes"]) == int(not changes and not same)
    assert all(line.startswith(part) for line in named + certificate["notes"])


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "post_processor"])
def test_the_line_shows_a_text(base, part):
    becomes = dict(normalizer=None, post_processor=PREPENDS).get(
        part, BYTES | dict(add_prefix_space=True)
    )
    (line,) = certify(base | {part: becomes}, base)["exceptions"]["behaviour_changed"]
    assert " becomes " in line


SETTING_CASES = [  # name, value, whether it changes what the tokenizer does (None: nothing is said)
    ("ignore_merges", True, True),
    ("dropout", 0.1, True),
    ("continuing_subword_prefix", "##", True),
    ("end_of_word_suffix", "</w>", True),
    ("dropout", 0.0, None),
    ("continuing_subword_prefix", "", None),
    ("end_of_word_suffix", "", None),
    ("byte_fallback", False, None),
    ("fuse_unk", True, False),
    ("unk_token", "<unk>", False),
    ("byte_fallback", True, False),
]


@pytest.mark.parametrize(("name", "value", "changes"), SETTING_CASES)
def test_settings_of_the_model(base, name, value, changes):
    new = base | dict(model=base["model"] | {name: value})
    said = [found.changes for found in setting_differences(new, base)]
    assert said == ([] if changes is None else [changes])


# --- flags of added tokens

FLAG_CASES = [
    (dict(special=False), "NFC", True),
    (dict(lstrip=True), "NFC", True),
    (dict(rstrip=True), None, True),
    (dict(single_word=True), None, True),
    (dict(normalized=True), "NFC", True),
    (dict(normalized=True), None, False),
    ({}, None, False),
]


@pytest.mark.parametrize(("flags", "normalizer", "changes"), FLAG_CASES)
def test_flags_of_a_special(base, flags, normalizer, changes):
    old = base | dict(normalizer=normalizer and dict(type=normalizer))
    new = copy.deepcopy(old)
    ends = next(added for added in new["added_tokens"] if added["content"] == "<|im_end|>")
    ends |= flags
    certificate = certify(new, old)
    assert certificate["ok"] is not changes
    assert certificate["behaviour_changed"] == int(changes)


def test_the_order_of_added_tokens_is_nothing(base):
    old = listed(base)
    certificate = certify(old | dict(added_tokens=old["added_tokens"][::-1]), old)
    assert certificate["ok"]
    assert certificate["notes"] == []


MARK_CASES = [
    (mark("<work>"), True),
    (mark("[INST]", special=True), True),
    (mark("<|tool|>", normalized=True), True),
    (mark("Ġthe"), False),
    (mark(" the"), False),
    (mark("стол"), False),
    (mark("2026"), False),
    (mark("<work>", lstrip=True), False),
    (mark("<work>", rstrip=True), False),
    (mark("<a> "), False),
]


@pytest.mark.parametrize(("new_mark", "ok"), MARK_CASES)
def test_a_new_added_token_must_be_a_mark(base, new_mark, ok):
    "One that takes over the id of the last entry, as the surgery's <think> does."
    old = copy.deepcopy(base)
    vocab, merges = old["model"]["vocab"], old["model"]["merges"]
    victim = next(name for name in reversed(vocab) if name not in str(old["added_tokens"]))
    new = copy.deepcopy(old)
    ids, left_over = new["model"]["vocab"], []
    token = ids.pop(victim)
    for merge in merges:
        if "".join(merge) != victim and victim not in merge:
            left_over.append(merge)
    new["model"]["merges"] = left_over
    if new_mark["content"] not in ids:
        ids[new_mark["content"]] = token
    new["added_tokens"].append(new_mark | dict(id=ids[new_mark["content"]]))
    certificate = certify(new, old)
    lines = certificate["exceptions"].get("behaviour_changed", [])
    assert (not lines) is ok, lines


# --- size, orphans, and entries taken out by hand


def with_entries(tok_json, *names, merges=()):
    new = copy.deepcopy(tok_json)
    for name in names:
        new["model"]["vocab"][name] = max(new["model"]["vocab"].values()) + 1
    new["model"]["merges"] += [list(pair) for pair in merges]
    return new


PAIR = (byte_level("щ"), byte_level("ъ"))
LETTERS = [tuple(byte_level(letter)) for letter in "щъ"]


def listed(base):
    "The same with its added tokens among the entries, as growth needs it."
    new = copy.deepcopy(base)
    for added in new["added_tokens"]:
        new["model"]["vocab"][added["content"]] = added["id"]
    return new


def grown_pair(base):
    "A base that knows щ and ъ, and the same grown by their pair."
    base = listed(base)
    letters = [pair for pair in LETTERS if "".join(pair) not in base["model"]["vocab"]]
    names = ["".join(pair) for pair in letters]
    old = with_entries(base, *names, merges=letters)
    return old, with_entries(old, "".join(PAIR), merges=[PAIR])


def test_growth_is_named_and_certified_where_it_was_meant(base):
    old, new = grown_pair(base)
    unasked = certify(new, old)
    assert not unasked["ok"]
    assert unasked["grown"] == 1
    assert "1 more than" in unasked["exceptions"]["size_changed"][0]
    meant = certify(new, old, grow=1)
    assert meant["ok"], meant["exceptions"]
    assert not certify(new, old, grow=2)["ok"]
    shrunk = certify(old, new)
    assert "fewer than" in shrunk["exceptions"]["size_changed"][0]
    new["model"]["vocab"]["".join(PAIR)] += 5
    assert "without a gap" in certify(new, old, grow=1)["exceptions"]["size_changed"][0]


def test_growth_that_pushes_a_special_aside_is_caught(base):
    "Where the file gives a new entry the id of a special that is no entry, the special moves."
    old = copy.deepcopy(base)
    for added in old["added_tokens"]:
        old["model"]["vocab"].pop(added["content"], None)
    last = max(old["model"]["vocab"].values())
    for place, added in enumerate(old["added_tokens"], last + 1):
        added["id"] = place
    new = with_entries(old, byte_level("щъ"))
    assert "<|endoftext|>" in certify(new, old, grow=1)["exceptions"]["specials_changed"]


def test_an_orphan_of_the_base_is_inherited_and_no_fault(base):
    orphan = byte_level("ĠабвгдX")
    old = with_entries(listed(base), orphan)
    certificate = certify(old, old)
    assert certificate["ok"]
    assert certificate["unreachable_inherited"] == 1 + certify(base, base)["unreachable_inherited"]
    added = certify(old, listed(base), grow=1)
    assert added["exceptions"]["unreachable_added"] == [orphan]


@pytest.mark.parametrize("which", ["product", "left half", "right half"])
def test_a_merge_that_names_a_deleted_entry_is_named(base, which, tmp_path, capsys):
    left, right = next(
        merge for merge in base["model"]["merges"][::-1] if len(merge[0]) > 1 and len(merge[1]) > 1
    )
    gone = {"product": left + right, "left half": left, "right half": right}[which]
    cut = copy.deepcopy(base)
    del cut["model"]["vocab"][gone]
    with pytest.raises(UserError, match="take their merges out too") as refusal:
        certify(cut, base)
    assert repr(gone) in str(refusal.value)


# --- files that are something else: one line, which never tells anybody to delete their file

BYTE_VOCAB = {char: place for place, char in enumerate(CHAR_TO_BYTE)}
BPE = dict(type="BPE", vocab=BYTE_VOCAB, merges=[])
AROUND = dict(pre_tokenizer=BYTES, decoder=BYTES, added_tokens=[])
OTHER_FILES = [
    ('["a", "b"]', "holds a list"),
    ("3", "holds a int"),
    ("", "copied whole"),
    ('{"model": {"type": "BPE", "voc', "copied whole"),
    ('{"tokenizer_class": "Qwen2Tokenizer"}', "no model"),
    ('{"model": [1]}', "no model"),
    (json.dumps(AROUND | dict(model=dict(type="Unigram", vocab=[["a", -1.0]]))), "'Unigram'"),
    (json.dumps(AROUND | dict(model=dict(type="WordPiece", vocab={"a": 0}))), "'WordPiece'"),
    (json.dumps(AROUND | dict(model=dict(type="WordLevel", vocab={"a": 0}))), "'WordLevel'"),
    (json.dumps(AROUND | dict(model=BPE)), "no merges"),
    (json.dumps(AROUND | dict(model=dict(type="BPE", vocab=BYTE_VOCAB))), "no merges"),
    (json.dumps(AROUND | dict(model=BPE | dict(merges=["a b c"]))), "not two entries"),
    (json.dumps(AROUND | dict(model=BPE | dict(merges=[7]))), "not two entries"),
    (json.dumps(AROUND | dict(model=BPE | dict(merges=["a b"]))), "'ab'"),
    (
        json.dumps(AROUND | dict(model=dict(type="BPE", vocab=["a"], merges=["a b"]))),
        "whole number",
    ),
    (json.dumps(dict(model=BPE | dict(merges=["a b"]), added_tokens=[])), "byte-level"),
]


@pytest.mark.parametrize(("content", "says"), OTHER_FILES)
def test_a_file_that_is_something_else(tmp_path, content, says, capsys):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["certify", str(path), "--base", str(path)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert str(path) in said
    assert "elete" not in said
    assert said.count("\n") == 1


def test_older_files_and_folders(base, tmp_path):
    "Merges as strings, no type, no list of added tokens: all of that is the same vocabulary."
    old = copy.deepcopy(base)
    del old["model"]["type"]
    old["model"]["merges"] = [" ".join(merge) for merge in old["model"]["merges"]]
    assert certify(old, base)["ok"]
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="save_pretrained"):
        load_tokenizer_json(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer_json(tmp_path / "nothing" / "here")


def test_help_says_what_the_arguments_are(capsys):
    with pytest.raises(SystemExit):
        main(["certify", "--help"])
    said = capsys.readouterr().out
    assert said.count("tokenizer.json") >= 2
    assert "--grow" in said


# --- a folder is opened as its users open it


def configured(base, folder, **config):
    save_tokenizer_folder(base, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


FOLDER_CASES = [
    (dict(), True),
    (dict(tokenizer_class="TokenizersBackend"), True),
    (dict(model_max_length=512), True),
    (dict(eos_token=dict(__type="AddedToken", content="<|im_end|>")), True),
    (dict(tokenizer_class="GPT2Tokenizer"), False),  # the toy's regex, but no normaliser
    (dict(tokenizer_class="Qwen2Tokenizer"), False),
    (dict(tokenizer_class="LlamaTokenizer"), True),
    (dict(eos_token="<|endoftext|>"), False),
    (dict(add_prefix_space=True, tokenizer_class="GPT2Tokenizer"), False),
    (dict(extra_special_tokens=["стол"]), False),
]


@pytest.mark.parametrize(("config", "ok"), FOLDER_CASES)
def test_what_a_configuration_changes(base, tmp_path, config, ok):
    theirs = configured(base, tmp_path / "base")
    certificate = certify(configured(base, tmp_path / "new", **config), theirs)
    assert certificate["ok"] is ok, (certificate["exceptions"], certificate["notes"])


def test_the_folder_written_opens_in_older_releases_and_survives_saving(base, tmp_path):
    save_tokenizer_folder(base, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    AutoTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert certify(tmp_path / "two", tmp_path / "one")["ok"]


NFD_AND_OTHERS = [
    "и\u0306 е\u0308 за\u0301мок",
    "со\u00adлнце",
    "ёлка елка Ё",
    "м\u2019ята м\u02bcята м'ята",
    "Ққ Ңң Әә Өө",
    "ј љ њ ћ",
]


@pytest.mark.parametrize("normalizer", [None, dict(type="NFC")])
def test_loose_accents_are_not_lost(base, normalizer):
    tok_json = base | dict(normalizer=normalizer)
    tok = tokenizer_from_json(tok_json)
    form = "NFC" if normalizer else "NFD"
    texts = [unicodedata.normalize(form, text) for text in NFD_AND_OTHERS]
    for text in texts:
        assert tok.decode(tok.encode(text).ids, skip_special_tokens=False) == text
    assert certify(tok_json, tok_json, NFD_AND_OTHERS)["ok"]


OBJECTS = {  # what a configuration file may hold: what is said of it, None: nothing
    b"{}": None,
    b' {"a": 1}\n': None,
    '{"имя": "кот"}'.encode(): None,
    b'{"a": {"b": []}}': None,
    b'{"tokenizer_class": null}': None,
    b"": "copied whole",
    b"{oops": "copied whole",
    b'{"a": 1': "copied whole",
    '{"a": 1}'.encode("utf-16"): "copied whole",
    b"[1, 2]": "holds a list",
    b"null": "holds a NoneType",
}


@pytest.mark.parametrize("held", OBJECTS)
def test_a_configuration_of_somebodys_own_is_not_to_be_deleted(tmp_path, held):
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(held)
    if OBJECTS[held] is None:
        assert read_object(path) == json.loads(held)
        return
    with pytest.raises(UserError, match=OBJECTS[held]) as refusal:
        read_object(path)
    assert "elete" not in str(refusal.value)


def test_a_negative_growth_is_refused(base):
    with pytest.raises(UserError, match="grow=-1"):
        certify(base, base, grow=-1)


def test_byte_fallback_in_a_byte_level_tokenizer_is_judged(base):
    old = base | dict(model=base["model"] | dict(byte_fallback=True))
    assert certify(old, old)["ok"]
    certificate = certify(old, base)
    assert certificate["ok"]
    assert any("byte_fallback" in note for note in certificate["notes"])
