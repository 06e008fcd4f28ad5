"Chapters 01 to 02c on a toy vocabulary: the swap, its certificate, and what that must refuse."

import copy
import csv
import json
import lzma
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tpro_nb import assets, corpora, published, tokenizer_surgery, voters
from tpro_nb.certificate import (
    CHAR_TO_BYTE,
    TABLES,
    NewToken,
    byte_level,
    certify,
    id_map,
    load_tokenizer_json,
    save_tokenizer_folder,
    token_text,
    tokenizer_fingerprint,
    tokenizer_from_json,
)
from tpro_nb.core import (
    CHAT_TEMPLATE,
    SPECIALS,
    THINK,
    TOY_TEXT,
    UserError,
    cache_dir,
    read_json,
    toy_tokenizer,
)
from tpro_nb.tokenizer_analysis import density, find_words
from tpro_nb.tokenizer_surgery import (
    PROTECTION_RULES,
    TOY_WISH,
    SurgerySettings,
    by_script,
    card_text,
    check_donor,
    check_room,
    choose_victims,
    cuttable_ids,
    dense_tokenizer,
    good_token,
    grow_vocabulary,
    operate,
    pack_swaps,
    protected,
    removable_ids,
    surgery_job,
    toy_wish,
    two_piece_passes,
    unpack_swaps,
    without,
)
from tpro_nb.voters import (
    Usage,
    choosing_words,
    count_usage,
    count_votes,
    counted_votes,
    letter_owners,
    pack_usage,
    piece_words,
    read_usage,
)


def toy_usage(t: dict) -> np.ndarray:
    return count_usage(tokenizer_from_json(t), {}, dict(text=TOY_TEXT))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "(base, dense) as dicts: twelve entries swapped, think marks kept."
    folder = tmp_path_factory.mktemp("tok") / "base"
    toy_tokenizer(folder)
    base = load_tokenizer_json(folder)
    return base, operate(base, 12, toy_wish(), toy_usage(base), THINK)


@pytest.fixture(scope="module")
def tok(pair):
    return tokenizer_from_json(pair[1])


def test_size_ids_and_specials_hold(pair):
    base, dense = pair
    base_ids, dense_ids = base["model"]["vocab"], dense["model"]["vocab"]
    assert len(base_ids) == len(dense_ids)
    assert sorted(base_ids.values()) == sorted(dense_ids.values())
    assert dense["added_tokens"] == base["added_tokens"]
    assert all(dense_ids[name] == i for name, i in base_ids.items() if name in dense_ids)
    assert len(set(dense_ids) - set(base_ids)) == 12


def test_certificate_passes(pair):
    certificate = certify(pair[1], pair[0], TOY_TEXT)
    assert certificate["ok"]
    assert certificate["tokens_added"] == 12
    assert certificate["exceptions"] == {}
    assert certificate["unreachable_added"] == certificate["unreachable_kept_new"] == 0


def test_added_tokens_save_tokens(pair, tok):
    text = "Морозный солнечного дня, деньги счастливо"
    assert len(tok.encode(text).ids) < len(tokenizer_from_json(pair[0]).encode(text).ids)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip(tok, text):
    assert tok.decode(tok.encode(text).ids, skip_special_tokens=False) == text


PIECES_OF_TEXT = [*TOY_WISH, " the", "\n", "2026", "! ", "ё"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES_OF_TEXT), max_size=12))
def test_words_split_where_they_are_joined(pair, tok, words):
    "The dense vocabulary never needs more tokens than the base for Cyrillic text."
    text = "".join(words)
    cyrillic = " ".join(word.strip() for word in words if good_token(byte_level(word)))
    assert tok.decode(tok.encode(text).ids, skip_special_tokens=False) == text
    before = tokenizer_from_json(pair[0]).encode(cyrillic).ids
    assert len(tok.encode(cyrillic).ids) <= len(before)


def test_one_merge_out_of_order_is_caught(pair):
    base, dense = pair
    kept = len(base["model"]["merges"])
    for at in (5, kept // 2, len(dense["model"]["merges"]) - 2):
        broken = copy.deepcopy(dense)
        merges = broken["model"]["merges"]
        merges.insert(0, merges.pop(at))
        assert not certify(broken, base)["ok"], at


BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)


def over_bytes(merges: list[tuple[str, str]]) -> dict:
    "A byte-level tokenizer.json of the 256 bytes and what these merges make."
    vocab = {char: place for place, char in enumerate(CHAR_TO_BYTE)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    t = json.loads(Tokenizer(models.BPE()).to_str())
    model = t["model"] | dict(vocab=vocab, merges=[list(merge) for merge in merges])
    return t | dict(model=model, decoder=dict(BYTE_LEVEL), pre_tokenizer=dict(BYTE_LEVEL))


CAT = [byte_level(letter) for letter in "кот"]
CAT_LETTERS = [(letter[0], letter[1]) for letter in CAT]  # two bytes each


def plain() -> dict:
    return over_bytes(CAT_LETTERS)


def test_a_stolen_neighbour_is_caught():
    "All merges valid, none premature: only encoding shows that `кот` is dead."
    k, o, t = CAT
    base = over_bytes([*CAT_LETTERS, (o, t), (t, t)])
    good = over_bytes([*CAT_LETTERS, (o, t), (k, o + t)])
    bad = over_bytes([*CAT_LETTERS, (o, t), (k, o)])
    assert certify(good, base)["ok"]
    assert certify(bad, base)["unreachable_added"] == 0
    dead = over_bytes([*CAT_LETTERS, (o, t), (k, o), (k + o, t)])
    dead_base = over_bytes([*CAT_LETTERS, (o, t), (k, o), (t, t)])
    certificate = certify(dead, dead_base)
    assert not certificate["ok"]
    assert certificate["unreachable_added"] == 1
    assert certificate["merges_premature"] == certificate["merges_reordered"] == 0


def test_changed_id_and_lost_special_are_caught(pair):
    base, dense = pair
    broken = copy.deepcopy(dense)
    vocab = broken["model"]["vocab"]
    names = list(vocab)
    one, other = names[100], names[101]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    assert certify(broken, base)["ids_changed"] == 2
    lost = copy.deepcopy(dense)
    lost["added_tokens"] = [a for a in lost["added_tokens"] if a["content"] != "<|im_end|>"]
    assert not certify(lost, base)["ok"]


def test_bad_input():
    with pytest.raises(UserError, match="byte-level"):
        load_tokenizer_json(dict(model=dict(type="Unigram")))
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer_json("/nowhere/tokenizer.json")


def test_more_than_can_be_removed(pair):
    with pytest.raises(UserError, match="may be removed"):
        choose_victims(pair[0], toy_usage(pair[0]), 500)
    mine = frozenset("т")  # what holds it stays, and so do the halves that it is built from
    room = len(cuttable_ids(pair[0], mine))
    assert 0 < room < len(removable_ids(pair[0], mine))
    use = toy_usage(pair[0])
    cut = choose_victims(pair[0], use, room, letters=mine)
    assert set(cut) == cuttable_ids(pair[0], mine)
    with pytest.raises(UserError, match=f"at most {room} entries"):
        check_room(pair[0], room + 1, mine)


def test_too_few_words(pair):
    with pytest.raises(UserError, match="support only"):
        grow_vocabulary(pair[0], {byte_level(" зимой"): 1.0}, 50)


def test_victims_are_leaves_and_never_protected(pair):
    base = pair[0]
    gone = choose_victims(base, toy_usage(base), 12)
    kept = without(base, gone)["model"]
    assert all({left, right} <= kept["vocab"].keys() for left, right in kept["merges"])
    texts = token_text(tokenizer_from_json(base), gone)
    assert not any(protected(text) for text in texts)


def toy_settings(folder: Path, n: int) -> dict:
    return asdict(
        SurgerySettings(
            base="toy",
            n=n,
            out=str(folder),
            base_name="base",
            dense_name="dense",
            source="toy",
            words_per_lang=100,
            docs=5,
            heldout_docs=5,
        )
    )


def test_job_folders_and_map(tmp_path):
    from transformers import AutoTokenizer

    report = surgery_job(toy_settings(tmp_path, 12))
    old, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "dense"))
    assert new.chat_template == CHAT_TEMPLATE
    assert new.eos_token == "<|im_end|>"
    assert new.pad_token == "<|endoftext|>"
    assert len(old) == len(new)
    for mark in SPECIALS + THINK:
        assert len(new.encode(mark, add_special_tokens=False)) == 1, mark
    change = read_json(tmp_path / "id_map.json")
    assert change["kept"] + len(change["added"]) == change["vocab_size"] == len(new)
    assert len(change["added"]) == 12
    for row in change["added"]:
        come = NewToken(*row)
        assert new.decode([come.id]) == come.text == old.decode(come.pieces)
    assert read_json(tmp_path / "certificate_base.json")["ok"]
    assert report["certificate"]["tokens_added"] == 12
    assert dense_tokenizer(tmp_path / "dense").get_vocab_size() == len(new)


def test_words_and_density(tok):
    assert find_words("по-русски: 5 слов, don't") == ["по-русски", "слов", "don't"]
    found = density(tok, ["да да нет", "нет"])
    assert list(found.words) == [3, 1]
    assert (found.one <= found.two).all()
    assert found.types == 2


def test_paper_passes_never_fall_and_miss_what_needs_helpers():
    base = load_tokenizer_json(json.loads(json.dumps(load_tokenizer_json(plain()))))
    candidates = [byte_level(word) for word in ("к", "ко", "кот", "щ", "ъщ")]
    share = two_piece_passes(base, candidates, 4)
    assert share == sorted(share)
    assert len(share) == 5


def test_table_rebuilds_and_refuses(pair):
    base, dense = pair
    packed = pack_swaps(dense, base)
    rebuilt = unpack_swaps(packed, base)
    assert tokenizer_fingerprint(rebuilt) == tokenizer_fingerprint(dense)
    assert len(packed) < 5000
    with pytest.raises(UserError, match="another base"):
        unpack_swaps(packed, dense)


def test_pack_refuses_a_broken_table(pair):
    base, dense = pair
    table = json.loads(lzma.decompress(pack_swaps(dense, base)))
    table["cut"][0] += 1
    with pytest.raises(UserError):
        unpack_swaps(lzma.compress(json.dumps(table).encode()), base)


def test_shipped_table():
    "The library's table of 34,000 is whole, and rebuilds where Qwen3's vocabulary is in the cache."
    shipped = Path(tokenizer_surgery.__file__).parent / "tables" / "qwen3_dense.json.xz"
    table = json.loads(lzma.decompress(shipped.read_bytes()))
    added, cuts = table["added"], table["cut"]
    assert len(table["removed"]) == len(added) == len(cuts) == 34_000 == len(set(added))
    assert all(good_token(token) for token in added)
    assert all(0 < cut < len(token) for token, cut in zip(added, cuts))
    if not list((cache_dir() / "vocabularies").glob("qwen3-*.json")):
        pytest.skip("Qwen3's vocabulary is not in the cache")
    dense = dense_tokenizer()
    assert dense.get_vocab_size() == 151_669
    assert dense.token_to_id("<think>") == 151_667
    line = "Мороз и солнце; день чудесный! Қазақстан Республикасы."
    before, after = published.qwen3_tokenizer().encode(line).ids, dense.encode(line).ids
    assert len(after) < 0.75 * len(before)
    assert dense.decode(after) == line


# --- who votes, and who is refused

STAYS = {  # text: whether it stays under symbols, units, paper
    None: "yyy",
    "\ufffdа": "yyy",
    " к": "yyy",
    "чеп": "yyy",
    "2026": "yyy",
    "v2": "yyy",
    "xFE": "yyy",
    "龙": "yyy",
    "    ": "yyy",
    "两国": "nyy",
    " ab": "nyy",
    "});\n": "nyy",
    "!!!!!": "nyy",
    " heavens": "nny",
    "getMap": "nny",
    ".getMap": "nnn",
    " für": "nnn",
    "的权利": "nnn",
    "xFEE": "nny",
}


@pytest.mark.parametrize("text", STAYS)
def test_rules_of_protection(text):
    "Each rule protects what a narrower one protects; specials stay whatever they are."
    said = "".join("ny"[protected(text, rule=rule)] for rule in PROTECTION_RULES)
    assert said == STAYS[text]
    assert all(protected(text, special=True, rule=rule) for rule in PROTECTION_RULES)


def test_another_rule_is_refused(pair):
    with pytest.raises(UserError, match="protect='latin'.*symbols, units, paper"):
        removable_ids(pair[0], rule="latin")
    rooms = [len(removable_ids(pair[0], rule=rule)) for rule in PROTECTION_RULES]
    assert rooms == sorted(rooms, reverse=True)


def test_counted_votes_add_up(tmp_path):
    "A table survives its file; `english` multiplies its three groups and no other."
    voice = np.array([[0, 30, 300], [6, 0, 0], [0, 9, 0], [90, 0, 3]], np.float32)
    groups = ["en", "code", "vocab", "zh"]
    usage = Usage(groups, np.array([9.0, 9, 1, 3]), voice, "f" * 8)
    (tmp_path / "usage.xz").write_bytes(pack_usage(usage))
    again = read_usage(tmp_path / "usage.xz")
    assert again.groups == groups
    assert again.base == usage.base
    assert again.say.tolist() == usage.say.tolist()
    np.testing.assert_allclose(again.voice, voice, rtol=0.15)
    assert ((again.voice == 0) == (voice == 0)).all()
    for english, want in ((1, [96, 39, 303]), (2, [102, 78, 603])):
        votes = counted_votes(english, usage)
        assert votes.use.tolist() == [want]
        assert votes.weight.tolist() == [1]
    with pytest.raises(UserError, match="english=0: give a factor above 0"):
        counted_votes(0, usage)


def test_shipped_votes_and_their_texts():
    "The table is Qwen3's; each text that votes or judges has hash and licence, none does both."
    usage = read_usage()
    assert usage.voice.shape == (len(usage.groups), 151_669)
    table = json.loads(lzma.decompress((TABLES / "qwen3_dense.json.xz").read_bytes()))
    assert table["base"] == usage.base
    with open(TABLES / "counted_texts.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["group"], row["text"]) for row in rows}) == len(rows) > 300
    assert {row["role"] for row in rows} == {"votes", "judges"}
    assert all(row["licence"] and row["version"] for row in rows)
    assert all(row["sha256"] or "installed" in row["package"] for row in rows)
    judges = {(row["group"], row["text"]) for row in rows if row["role"] == "judges"}
    with open(TABLES / "qwen3_front.csv", encoding="utf-8", newline="") as file:
        points = list(csv.DictReader(file))
    assert {(row["group"], row["text"]) for row in points} == judges


def test_votes_are_weighed(pair):
    "With all the weight on one voter the choice is its alone; hexadecimal bytes are protected."
    base = pair[0]
    use = np.random.default_rng(0).random((2, 600)).astype(np.float32)
    alone = [choose_victims(base, use[k : k + 1], 12) for k in (0, 1)]
    first = choose_victims(base, use, 12, np.array([1.0, 0.0]))
    second = choose_victims(base, use, 12, np.array([0.0, 1.0]))
    assert [first, second] == alone
    assert alone[0] != alone[1]
    assert protected("xFE")
    assert not protected("xFEE")


def test_running_python_has_no_say(monkeypatch):
    "Neither the standard library nor its documentation is read while victims are chosen."

    def forbidden(*args, **kwargs):
        raise AssertionError("the running Python's text was read for a vote")

    monkeypatch.setattr(corpora, "english", forbidden)
    monkeypatch.setattr(corpora, "code", forbidden)
    monkeypatch.setattr(corpora, "source_texts", lambda name, limit=0: ["def f(x): return x"])
    monkeypatch.setattr(corpora, "locales", lambda part: {"th": ["ธรรม"]})
    monkeypatch.setattr(published, "xlmr_pieces", lambda: [("▁ธรรม", -9.0)] * 100)
    use, weight = count_votes(load_tokenizer_json(plain()), 50, 1)
    assert len(use) == len(weight)
    assert set(weight) == {1.0, voters.ENGLISH_WEIGHT}
    assert (weight == voters.ENGLISH_WEIGHT).sum() == 2 + len(assets.SOURCES) + 1


def test_letters_tell_languages():
    assert letter_owners(" әкім") == ["kk"]
    assert letter_owners(" зрабіў") == ["be"]
    assert letter_owners(" будзе") == []
    pieces = [("▁менен", -9.0), ("▁стол", -9.0), ("ке", -9.0), ("▁кот2", -9.0)]
    found = piece_words(pieces, {"стол"})
    assert list(found["rest"]) == [" менен"]
    assert not found["kk"]


HAPPY = dict(
    ru="Счастливые люди всегда похожи друг на друга",
    uk="Щасливі люди завжди схожі одне на одного",
    kk="Бақытты адамдар әрқашан бір-біріне ұқсайды",
    be="Шчаслівыя людзі",
    bg="Щастливите хора",
    sr="Срећни људи",
    mk="Среќните луѓе",
    ky="Бактылуу адамдар",
)


def test_first_language_gains(monkeypatch):
    "Ukrainian or Kazakh first: it has the greatest say, and its words cost less than otherwise."
    monkeypatch.setattr(voters, "language_documents", lambda lang, part, docs=0: [HAPPY[lang]])
    monkeypatch.setattr(voters, "listed_words", lambda lang, n: Counter())
    monkeypatch.setattr(corpora, "glosses", lambda part: [])
    base = load_tokenizer_json(plain())

    def cost(first, lang):
        grown = grow_vocabulary(base, choosing_words(10, 0, [], first=first), 25)
        words = [word for word in (" " + HAPPY[lang]).split(" ") if word]
        return sum(len(grown.pieces(byte_level(word))) for word in words)

    for lang in ("uk", "kk"):
        assert cost(lang, lang) < cost("ru", lang)
    with pytest.raises(UserError, match="no such language"):
        choosing_words(10, 0, [], first="de")


def test_bad_tokenizers(tmp_path, pair):
    cut = copy.deepcopy(pair[0])
    vocab = cut["model"]["vocab"]
    for name in sorted(vocab, key=vocab.get)[-40:]:
        vocab.pop(name, None)
    with pytest.raises(UserError, match="truncated"):
        load_tokenizer_json(cut)
    (tmp_path / "tokenizer.json").write_text(json.dumps(pair[0])[:2000])
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer_json(tmp_path)
    characters = copy.deepcopy(pair[0])
    characters |= dict(decoder=None, pre_tokenizer=None)
    with pytest.raises(UserError, match="byte-level"):
        load_tokenizer_json(characters)
    # a flag that no byte-level vocabulary needs: the certificate judges it, loading does not
    fallback = copy.deepcopy(pair[0])
    fallback["model"]["byte_fallback"] = True
    assert load_tokenizer_json(fallback)["model"]["byte_fallback"]


def test_donor_of_another_normalisation(pair):
    donor = copy.deepcopy(pair[0])
    check_donor("toy", tokenizer_from_json(donor))
    donor["normalizer"] = dict(type="NFKC")
    with pytest.raises(UserError, match="normalisation is NFKC"):
        check_donor("toy", tokenizer_from_json(donor))


def test_room_and_corpus_are_checked_before_work(monkeypatch, tmp_path):
    def started(*args):
        pytest.fail("work had started")

    monkeypatch.setattr(tokenizer_surgery, "count_votes", started)
    with pytest.raises(UserError, match="may be removed"):
        surgery_job(toy_settings(tmp_path, 500))
    for bad, why in (([""], "empty"), (["An English line of text."], "0 % Cyrillic")):
        monkeypatch.setattr(
            tokenizer_surgery,
            "documents_by_language",
            lambda source, part, docs, langs, bad=bad: dict.fromkeys(langs, bad),
        )
        with pytest.raises(UserError, match=why):
            surgery_job(toy_settings(tmp_path, 12))


# --- the folder

QWEN = (TABLES / "qwen3_chat_template.jinja").read_text(encoding="utf-8")

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)


def qwen3_system(system: str | None, tools: list[dict] | None) -> str:
    if tools:
        listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        given = system + "\n\n" if system else ""
        return f"<|im_start|>system\n{given}{TOOLS_BEFORE}{listed}{TOOLS_AFTER}"
    return f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""


def qwen3_tool_result(content: str, before: str, after: str) -> str:
    "Results that follow each other share one user turn."
    begin = "" if before == "tool" else "<|im_start|>user"
    end = "" if after == "tool" else "<|im_end|>\n"
    return f"{begin}\n<tool_response>\n{content}\n</tool_response>{end}"


def qwen3_answer(message: dict, after_question: bool, is_last: bool) -> str:
    "Reasoning stays only after the last real question."
    text, thought = message["content"], ""
    if "</think>" in text:
        thought = text.split("</think>")[0].split("<think>")[-1].strip("\n")
        text = text.split("</think>")[-1].lstrip("\n")
    out = "<|im_start|>assistant\n"
    if after_question and (is_last or thought):
        inner = thought.strip("\n")
        out += f"<think>\n{inner}\n</think>\n\n" + text.lstrip("\n")
    else:
        out += text
    for k, call in enumerate(message.get("tool_calls", [])):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        out += "\n" if k or text else ""
        out += (
            f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
        )
    return out + "<|im_end|>\n"


def qwen3_text(messages, tools=None, think=None, generate=True):
    "Qwen3's format, written from its rules; think=False opens an empty block."
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    out = qwen3_system(system, tools)
    roles = ["", *(message["role"] for message in messages), ""]
    last_question = max(k for k, message in enumerate(messages) if message["role"] == "user")
    for k, message in enumerate(messages):
        before, role, after = roles[k : k + 3]
        if role == "user":
            out += f"<|im_start|>user\n{message['content']}<|im_end|>\n"
        if role == "tool":
            out += qwen3_tool_result(message["content"], before, after)
        if role == "assistant":
            out += qwen3_answer(message, k > last_question, k == len(messages) - 1)
    if generate:
        out += "<|im_start|>assistant\n"
        out += "<think>\n\n</think>\n\n" if think is False else ""
    return out


Q = dict(role="user", content="Сколько будет 2 + 2?")
A = dict(role="assistant", content="<think>\nСложу.\n</think>\n\nЧетыре.")
TOOL = dict(
    type="function",
    function=dict(
        name="погода", parameters=dict(type="object", properties=dict(город=dict(type="string")))
    ),
)
CALL = dict(
    role="assistant",
    content="",
    tool_calls=[
        dict(type="function", function=dict(name="погода", arguments=dict(город="Казань")))
    ],
)
TALKS = dict(
    one=[Q],
    system=[dict(role="system", content="Отвечай кратко."), Q],
    turns=[Q, A, Q],
    answered=[Q, A],
    plain=[Q, dict(role="assistant", content="Четыре.")],
    tools=[Q, CALL, dict(role="tool", content="+5"), dict(role="tool", content="ветер")],
    called=[
        Q,
        dict(CALL, content="<think>\nСпрошу.\n</think>\n\nСмотрю."),
        dict(role="tool", content="+5"),
        dict(role="assistant", content="Пять."),
    ],
)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("think", [None, True, False])
def test_template_renders_likeqwen3_text(pair, tmp_path, talk, think):
    from transformers import AutoTokenizer

    save_tokenizer_folder(pair[1], tmp_path, QWEN)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    messages = TALKS[talk]
    mode = {} if think is None else dict(enable_thinking=think)
    for tools in (None, [TOOL]):
        for generate in (False, True):
            got = tok.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate, **mode
            )
            assert got == qwen3_text(messages, tools, think, generate)


def test_card_names_everybody(pair):
    base, dense = pair
    certificate, change = certify(dense, base), id_map(dense, base)
    row = dict(base=dict(tok_per_word=3.0), dense=dict(tok_per_word=2.0), tok_ratio=0.67)
    owed = {"vocabulary o200k": "MIT"}
    text = card_text("qwen_dense", "qwen3", certificate, dict(ru=row), change, owed)
    assert "| ru | 3.000 | 2.000 | 0.670 |" in text
    assert "| Cyrillic | " in text
    assert "* vocabulary o200k: MIT" in text
    assert certificate["sha256"] in text
    rows = by_script(change)
    assert sum(row["added"] for row in rows) == sum(row["removed"] for row in rows) == 12
    assert [row["script"] for row in rows if row["added"]] == ["Cyrillic"]
