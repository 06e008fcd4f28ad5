"Chapters 01 and 02 on a toy vocabulary: the swap, its certificate, and what the certificate must refuse."
import copy, json, unicodedata
from collections import Counter
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models
from tpro_nb import tokenizer_analysis as TA, tokenizer_surgery as S
from tpro_nb.core import CHAT_TEMPLATE, TOY_TEXT, UserError, read_json, toy_tokenizer

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "(base, dense) as dicts: twelve entries swapped, think marks kept."
    toy_tokenizer(p := tmp_path_factory.mktemp("tok")/"base")
    base = S.load_json(p)
    words = {S.byte_level(w): 1. for w in S.TOY_WISH}
    return base, S.operate(base, 12, words, S.usage(S.from_json(base), {}, dict(text=TOY_TEXT)), S.THINK)

@pytest.fixture(scope="module")
def tok(pair): return S.from_json(pair[1])

def test_size_ids_and_specials_hold(pair):
    base, dense = pair
    bv, dv = base["model"]["vocab"], dense["model"]["vocab"]
    assert len(bv) == len(dv) and sorted(bv.values()) == sorted(dv.values()) and dense["added_tokens"] == base["added_tokens"]
    assert all(dv[s] == i for s, i in bv.items() if s in dv) and len(set(dv) - set(bv)) == 12

def test_certificate_passes(pair):
    c = S.certify(pair[1], pair[0], TOY_TEXT)
    assert c["ok"] and c["tokens_added"] == 12 and c["exceptions"] == {} and c["unreachable_added"] == c["unreachable_kept_new"] == 0

def test_added_tokens_save_tokens(pair, tok):
    text = "Морозный солнечного дня, деньги счастливо"
    assert len(tok.encode(text).ids) < len(S.from_json(pair[0]).encode(text).ids)

@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip(tok, s):
    assert tok.decode(tok.encode(s).ids, skip_special_tokens=False) == s

@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(S.TOY_WISH + [" the", "\n", "2026", "! ", "ё"]), max_size=12))
def test_words_split_where_they_are_joined(pair, tok, ws):
    "The dense vocabulary never needs more tokens than the base for Cyrillic text."
    s = "".join(ws)
    cyr = " ".join(w.strip() for w in ws if S.good_token(S.byte_level(w)))
    assert tok.decode(tok.encode(s).ids, skip_special_tokens=False) == s
    assert len(tok.encode(cyr).ids) <= len(S.from_json(pair[0]).encode(cyr).ids)

def test_one_merge_out_of_order_is_caught(pair):
    base, dense = pair
    n = len(base["model"]["merges"])
    for at in (5, n//2, len(dense["model"]["merges"]) - 2):
        broken = copy.deepcopy(dense)
        m = broken["model"]["merges"]; m.insert(0, m.pop(at))
        assert not S.certify(broken, base)["ok"], at

def test_a_stolen_neighbour_is_caught():
    "All merges valid, none premature: only encoding shows that `кот` is dead."
    letters = [*S._CHARS.values()]
    k, o, t = (S.byte_level(c) for c in "кот")
    def make(merges):
        vocab = {c: i for i, c in enumerate(letters)}
        for a, b in merges: vocab.setdefault(a + b, len(vocab))
        d = json.loads(Tokenizer(models.BPE()).to_str())
        return d | dict(model=d["model"] | dict(vocab=vocab, merges=[list(m) for m in merges]), decoder=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True),
                        pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True))
    halves = [tuple(x) for x in (k, o, t)]
    base = make([*halves, (o, t), (t, t)])
    good, bad = make([*halves, (o, t), (k, o + t)]), make([*halves, (o, t), (k, o)])
    assert S.certify(good, base)["ok"] and S.certify(bad, base)["unreachable_added"] == 0
    dead = make([*halves, (o, t), (k, o), (k + o, t)]); dead_base = make([*halves, (o, t), (k, o), (t, t)])
    c = S.certify(dead, dead_base)
    assert not c["ok"] and c["unreachable_added"] == 1 and c["merges_premature"] == c["merges_reordered"] == 0

def test_changed_id_and_lost_special_are_caught(pair):
    base, dense = pair
    broken = copy.deepcopy(dense); v = broken["model"]["vocab"]
    a, b = S.byte_level(" м"), "!"
    names = list(v); x, y = names[100], names[101]; v[x], v[y] = v[y], v[x]
    assert S.certify(broken, base)["ids_changed"] == 2
    lost = copy.deepcopy(dense); lost["added_tokens"] = [t for t in lost["added_tokens"] if t["content"] != "<|im_end|>"]
    assert not S.certify(lost, base)["ok"]

def test_bad_input():
    with pytest.raises(UserError, match="byte-level"): S.load_json(dict(model=dict(type="Unigram")))
    with pytest.raises(UserError, match="no tokenizer at"): S.load_json("/nowhere/tokenizer.json")

def test_more_than_can_be_removed(pair):
    with pytest.raises(UserError, match="may be removed"):
        S.choose_victims(pair[0], S.usage(S.from_json(pair[0]), {}, dict(text=TOY_TEXT)), 500)

def test_too_few_words(pair):
    with pytest.raises(UserError, match="support only"): S.grow(pair[0], {S.byte_level(" зимой"): 1.}, 50)

def test_victims_are_leaves_and_never_protected(pair):
    base = pair[0]
    gone = S.choose_victims(base, S.usage(S.from_json(base), {}, dict(text=TOY_TEXT)), 12)
    kept = S.without(base, gone)
    assert all(a in kept["model"]["vocab"] and b in kept["model"]["vocab"] for a, b in kept["model"]["merges"])
    assert not any(S.protected(t) for t in S.text_of(S.from_json(base), gone))

def test_job_folders_and_map(tmp_path):
    from transformers import AutoTokenizer
    r = S.surgery_job("toy", 12, str(tmp_path), ["base", "dense"], "toy", 100, 5, 5)
    old, new = (AutoTokenizer.from_pretrained(tmp_path/n) for n in ("base", "dense"))
    assert new.chat_template == CHAT_TEMPLATE and new.eos_token == "<|im_end|>" and new.pad_token == "<|endoftext|>" and len(old) == len(new)
    for mark in S.SPECIALS + S.THINK: assert len(new.encode(mark, add_special_tokens=False)) == 1, mark
    m = read_json(tmp_path/"id_map.json")
    assert m["kept"] + len(m["added"]) == m["vocab_size"] == len(new) and len(m["added"]) == 12
    for i, text, pieces in m["added"]: assert new.decode([i]) == text == old.decode(pieces)
    assert read_json(tmp_path/"certificate_base.json")["ok"] and r["certificate"]["tokens_added"] == 12
    assert S.dense_tokenizer(tmp_path/"dense").get_vocab_size() == len(new)

def test_words_and_density(tok):
    assert TA.words("по-русски: 5 слов, don't") == ["по-русски", "слов", "don't"]
    d = TA.density(tok, ["да да нет", "нет"])
    assert list(d["words"]) == [3, 1] and (d["one"] <= d["two"]).all() and d["types"] == 2

def test_paper_passes_never_fall_and_miss_what_needs_helpers():
    base = S.load_json(json.loads(json.dumps(S.load_json(_plain()))))
    share = S.two_piece_passes(base, [S.byte_level(w) for w in ("к", "ко", "кот", "щ", "ъщ")], 4)
    assert share == sorted(share) and len(share) == 5

def _plain():
    d = json.loads(Tokenizer(models.BPE()).to_str())
    k, o, t = (S.byte_level(c) for c in "кот")
    vocab = {c: i for i, c in enumerate(S._CHARS.values())}
    for x in (k, o, t): vocab[x] = len(vocab)
    return d | dict(model=d["model"] | dict(vocab=vocab, merges=[list(x) for x in (k, o, t)]), decoder=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True),
                    pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True))

def test_table_rebuilds_and_refuses(pair):
    base, dense = pair
    data = S.pack(dense, base)
    assert S.fingerprint(S.unpack(data, base)) == S.fingerprint(dense) and len(data) < 5000
    with pytest.raises(UserError, match="another base"): S.unpack(data, dense)

def test_pack_refuses_a_broken_table(pair):
    import lzma
    base, dense = pair
    t = json.loads(lzma.decompress(S.pack(dense, base))); t["cut"][0] += 1
    with pytest.raises(UserError): S.unpack(lzma.compress(json.dumps(t).encode()), base)

def test_shipped_table():
    "The 34,000 of the library: its table is whole, and rebuilds where chapter 00's vocabulary is already in the cache."
    import lzma
    from pathlib import Path
    from tpro_nb.core import cache_dir
    table = json.loads(lzma.decompress((Path(S.__file__).parent/"tables"/"qwen3_dense.json.xz").read_bytes()))
    assert len(table["removed"]) == len(table["added"]) == len(table["cut"]) == 34_000 == len(set(table["added"]))
    assert all(S.good_token(t) and 0 < k < len(t) for t, k in zip(table["added"], table["cut"]))
    if not list((cache_dir()/"vocabularies").glob("qwen3-*.json")): pytest.skip("Qwen3's vocabulary is not in the cache")
    tok = S.dense_tokenizer()
    assert tok.get_vocab_size() == 151_669 and tok.token_to_id("<think>") == 151_667
    line = "Мороз и солнце; день чудесный! Қазақстан Республикасы."
    assert len(tok.encode(line).ids) < .75*len(S.assets.qwen3_tokenizer().encode(line).ids) and tok.decode(tok.encode(line).ids) == line

# --- who votes, and who is refused

def test_votes_are_weighed(pair):
    "With all the weight on one voter the choice is that voter's alone; hexadecimal bytes are protected."
    base = pair[0]
    use = np.random.default_rng(0).random((2, 600)).astype(np.float32)
    alone = [S.choose_victims(base, use[k:k+1], 12) for k in (0, 1)]
    assert [S.choose_victims(base, use, 12, np.array(w)) for w in ([1., 0.], [0., 1.])] == alone and alone[0] != alone[1]
    assert S.protected("xFE") and not S.protected("xFEE")

def test_running_python_has_no_say(monkeypatch):
    "Neither the standard library nor its documentation is read while victims are chosen."
    def no(*a, **k): raise AssertionError("the running Python's text was read for a vote")
    monkeypatch.setattr(S.assets, "english", no); monkeypatch.setattr(S.assets, "code", no)
    monkeypatch.setattr(S.assets, "source_texts", lambda n, limit=0: ["def f(x): return x"])
    monkeypatch.setattr(S.assets, "locales", lambda part: {"th": ["ธรรม"]})
    monkeypatch.setattr(S.assets, "xlmr_pieces", lambda: [("▁ธรรม", -9.)]*100)
    toy = S.load_json(_plain())
    use, weight = S.voters(toy, 50, 1)
    assert len(use) == len(weight) and set(weight) == {1., S.SAY} and (weight == S.SAY).sum() == 2 + len(S.assets.SOURCES) + 1

def test_letters_tell_languages():
    assert S._owners(" әкім") == ["kk"] and S._owners(" зрабіў") == ["be"] and S._owners(" будзе") == []
    found = S.piece_words([("▁менен", -9.), ("▁стол", -9.), ("ке", -9.), ("▁кот2", -9.)], {"стол"})
    assert list(found["rest"]) == [" менен"] and not found["kk"]

def test_first_language_gains(monkeypatch):
    "Ukrainian first and Kazakh first: each gets the greatest say, and its words cost less than in the Russian profile."
    text = dict(ru="Счастливые люди всегда похожи друг на друга", uk="Щасливі люди завжди схожі одне на одного", kk="Бақытты адамдар әрқашан бір-біріне ұқсайды", be="Шчаслівыя людзі", bg="Щастливите хора",
                sr="Срећни људи", mk="Среќните луѓе", ky="Бактылуу адамдар")
    monkeypatch.setattr(S, "halves", lambda l, part, docs=0: [text[l]])
    monkeypatch.setattr(S, "listed_words", lambda l, n: Counter())
    monkeypatch.setattr(S.assets, "glosses", lambda part: [])
    base = S.load_json(_plain())
    def cost(first, lang):
        ext = S.grow(base, S.choosing_words(10, 0, [], first=first), 25)
        return sum(len(ext.pieces(S.byte_level(w))) for w in (" " + text[lang]).split(" ") if w)
    for lang in ("uk", "kk"): assert cost(lang, lang) < cost("ru", lang)
    with pytest.raises(UserError, match="no such language"): S.choosing_words(10, 0, [], first="de")

def test_bad_tokenizers(tmp_path, pair):
    cut = copy.deepcopy(pair[0]); names = sorted(cut["model"]["vocab"], key=cut["model"]["vocab"].get)
    for s in names[-40:]: cut["model"]["vocab"].pop(s, None)
    with pytest.raises(UserError, match="truncated"): S.load_json(cut)
    (tmp_path/"tokenizer.json").write_text(json.dumps(pair[0])[:2000])
    with pytest.raises(UserError, match="cannot read"): S.load_json(tmp_path)
    fallback = copy.deepcopy(pair[0]); fallback["model"]["byte_fallback"] = True
    with pytest.raises(UserError, match="byte-level"): S.load_json(fallback)

def test_donor_of_another_normalisation(pair):
    donor = copy.deepcopy(pair[0]); S.check_donor("toy", S.from_json(donor))
    donor["normalizer"] = dict(type="NFKC")
    with pytest.raises(UserError, match="normalisation is NFKC"): S.check_donor("toy", S.from_json(donor))

def test_room_and_corpus_are_checked_before_work(monkeypatch, tmp_path):
    monkeypatch.setattr(S, "voters", lambda *a: pytest.fail("work had started"))
    job = lambda n: S.surgery_job("toy", n, str(tmp_path), ["base", "dense"], "toy", 100, 5, 5)
    with pytest.raises(UserError, match="may be removed"): job(500)
    for bad, why in (([""], "empty"), (["An English line of text."], "0 % Cyrillic")):
        monkeypatch.setattr(S, "reading", lambda source, part, docs, langs: {l: bad for l in langs})
        with pytest.raises(UserError, match=why): job(12)

# --- the folder

QWEN = (S.TABLES/"qwen3_chat_template.jinja").read_text(encoding="utf-8")

def _qwen3(messages, tools=None, think=None, generate=True):
    "Qwen3's format, written from its rules: reasoning stays only after the last real question; think=False opens an empty block."
    out, tail = "", lambda t: t.strip("\n")
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        lines = "".join("\n" + json.dumps(t, ensure_ascii=False) for t in tools)
        out += "<|im_start|>system\n" + (system + "\n\n" if system else "") + "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        out += lines + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n"
    elif system: out += f"<|im_start|>system\n{system}<|im_end|>\n"
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        before, after = (messages[k]["role"] if 0 <= k < len(messages) else "" for k in (i - 1, i + 1))
        if m["role"] == "user": out += f"<|im_start|>user\n{m['content']}<|im_end|>\n"
        if m["role"] == "tool":
            out += ("" if before == "tool" else "<|im_start|>user") + f"\n<tool_response>\n{m['content']}\n</tool_response>" + ("" if after == "tool" else "<|im_end|>\n")
        if m["role"] == "assistant":
            text, thought = m["content"], ""
            if "</think>" in text: thought, text = text.split("</think>")[0].split("<think>")[-1].strip("\n"), text.split("</think>")[-1].lstrip("\n")
            keep = i > last and (i == len(messages) - 1 or thought)
            out += "<|im_start|>assistant\n" + (f"<think>\n{tail(thought)}\n</think>\n\n" + text.lstrip("\n") if keep else text)
            for k, call in enumerate(m.get("tool_calls", [])):
                f = call["function"]
                out += ("\n" if k or text else "") + '<tool_call>\n{"name": "' + f["name"] + '", "arguments": ' + json.dumps(f["arguments"], ensure_ascii=False) + "}\n</tool_call>"
            out += "<|im_end|>\n"
    return out + ("<|im_start|>assistant\n" + ("<think>\n\n</think>\n\n" if think is False else "") if generate else "")

Q, A = dict(role="user", content="Сколько будет 2 + 2?"), dict(role="assistant", content="<think>\nСложу.\n</think>\n\nЧетыре.")
TOOL = dict(type="function", function=dict(name="погода", parameters=dict(type="object", properties=dict(город=dict(type="string")))))
CALL = dict(role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="погода", arguments=dict(город="Казань")))])
TALKS = dict(one=[Q], system=[dict(role="system", content="Отвечай кратко."), Q], turns=[Q, A, Q], answered=[Q, A], plain=[Q, dict(role="assistant", content="Четыре.")],
             tools=[Q, CALL, dict(role="tool", content="+5"), dict(role="tool", content="ветер")], called=[Q, dict(CALL, content="<think>\nСпрошу.\n</think>\n\nСмотрю."), dict(role="tool", content="+5"), dict(role="assistant", content="Пять.")])

@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("think", [None, True, False])
def test_template_renders_like_qwen3(pair, tmp_path, talk, think):
    from transformers import AutoTokenizer
    S.save_folder(pair[1], tmp_path, QWEN)
    tok, messages = AutoTokenizer.from_pretrained(tmp_path), TALKS[talk]
    mode = {} if think is None else dict(enable_thinking=think)
    for tools in (None, [TOOL]):
        for generate in (False, True):
            got = tok.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate, **mode)
            assert got == _qwen3(messages, tools, think, generate)

def test_card_names_everybody(pair):
    base, dense = pair
    card, row = S.certify(dense, base), dict(base=dict(tok_per_word=3.), dense=dict(tok_per_word=2.), tok_ratio=.67)
    text = S.card_text("qwen_dense", "qwen3", card, dict(ru=row), S.id_map(dense, base), {"vocabulary o200k": "MIT"})
    assert "| ru | 3.000 | 2.000 | 0.670 |" in text and "| Cyrillic | " in text and "* vocabulary o200k: MIT" in text and card["sha256"] in text
    rows = S.by_script(S.id_map(dense, base))
    assert sum(r["added"] for r in rows) == sum(r["removed"] for r in rows) == 12 and [r["script"] for r in rows if r["added"]] == ["Cyrillic"]
