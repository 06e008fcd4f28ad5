"Chapter 15i: the demo on toys, its refusals, and its output where there is no terminal."

import io
import re
import socket
import sys

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tpro_nb import demo
from tpro_nb.core import UserError, toy, write_json
from tpro_nb.decoder import Decoder
from tpro_nb.demo import (
    DEMO_SENTENCE,
    DemoSettings,
    Written,
    demo_command,
    equality_line,
    sentence_from,
    side_by_side,
    speed_line,
    split_text,
    token_owners,
    write_twice,
)
from tpro_nb.draft_model import random_draft

MODEL = toy("07_sft/model")


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "draft"
    random_draft(folder, MODEL)
    return folder


@pytest.fixture(scope="module")
def answer(draft):
    decoder = Decoder(MODEL, draft, dtype="float32", context=256)
    tok = AutoTokenizer.from_pretrained(MODEL)
    return write_twice(decoder, tok, "Сколько будет 2 + 2?", DemoSettings(new=12, rounds=2))


def test_rounds_and_owners(answer):
    assert answer.equal and len(answer.ratios) == 2
    for text in answer.plain + answer.drafted:
        assert len(token_owners(text)) == len(text.tokens)
    assert not any(token_owners(answer.plain[0]))  # plain text is all the model's own


def test_a_slow_machine_gets_one_round(draft):
    decoder = Decoder(MODEL, draft, dtype="float32", context=256)
    tok = AutoTokenizer.from_pretrained(MODEL)
    slow = DemoSettings(new=4, rounds=50, seconds=0.0)
    assert len(write_twice(decoder, tok, "Да?", slow).plain) == 1


def shown(monkeypatch, table, *, terminal: bool, encoding: str = "utf-8", **variables) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="replace")
    Console(file=stream, force_terminal=terminal, highlight=False).print(table)
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def table():
    tok = AutoTokenizer.from_pretrained(MODEL)
    ids = tok.encode("Мороз и солнце; день чудесный! [bold]", add_special_tokens=False)
    step = dict(tree=dict(tokens=ids[:2]), accepted=[1], bonus=ids[2], emitted=2)
    last = dict(tree=dict(tokens=ids[2:]), accepted=list(range(1, len(ids) - 2)), bonus=0)
    text = Written(ids, 1.0, [step, last | dict(emitted=len(ids) - 3)])
    return side_by_side(demo.WrittenTwice("[red]Что?", [text], [text]), tok)


def test_colours_only_on_a_terminal(monkeypatch, table):
    bright = shown(monkeypatch, table, terminal=True)
    assert "\x1b[94m" in bright and "\x1b[32m" in bright and "[bold]" in bright
    for quiet in (
        shown(monkeypatch, table, terminal=False),
        shown(monkeypatch, table, terminal=True, NO_COLOR="1"),
        shown(monkeypatch, table, terminal=False, encoding="ascii"),
    ):
        assert "\x1b[94m" not in quiet and "\x1b[32m" not in quiet
        lines = re.sub(r"\x1b\[[\d;]*m", "", quiet).splitlines()  # bold remains
        assert max(map(len, lines)) <= 80
        assert "[red]" in quiet  # a question is no markup


def test_a_terminal_of_ascii_gets_a_table_of_ascii(monkeypatch, table):
    assert "+--" in shown(monkeypatch, table, terminal=False, encoding="ascii")


def test_equality_is_compared_and_a_loss_is_called_one(answer):
    step = dict(tree=dict(tokens=[1, 2]), accepted=[1], bonus=2, emitted=2)
    plain, drafted = Written([1, 2], 1.0, []), Written([1, 2], 2.0, [step])
    loss = demo.WrittenTwice("?", [plain], [drafted])
    assert "costs more than it saves" in speed_line([loss])
    assert "equal: 1 answer, 2 tokens together, once plain" in equality_line([loss])
    assert "equal: 2 answers, 4 tokens together, 2 times plain" in equality_line([loss, loss])
    other = demo.WrittenTwice("?", [plain], [drafted._replace(tokens=[1, 3])])
    assert "NOT equal: 1 of 2" in equality_line([loss, other])


def end_of_file(_: str) -> str:
    raise EOFError


def not_utf8(_: str) -> str:
    return b"\xd0".decode()


SENTENCES = [
    ("given", "given", None),
    ("", DEMO_SENTENCE, None),
    (None, DEMO_SENTENCE, None),
    (None, "typed", lambda _: "typed"),
    (None, DEMO_SENTENCE, lambda _: "   "),
    (None, DEMO_SENTENCE, end_of_file),
    ("given", "given", lambda _: "typed"),
    ("a\n\tb", "a b", None),
    ("\udcd0x", "?x", None),
    ("[bold]x[/bold]", "[bold]x[/bold]", None),
]


@pytest.mark.parametrize("given, wanted, ask", SENTENCES)
def test_sentences(given, wanted, ask):
    assert sentence_from(given, ask) == wanted


@pytest.mark.parametrize(
    "given, ask, words", [("а" * 1001, None, "at most 1,000"), (None, not_utf8, "not UTF-8")]
)
def test_refused_sentences(given, ask, words):
    with pytest.raises(UserError, match=words):
        sentence_from(given, ask)


def test_pieces_give_the_sentence_back():
    tok = AutoTokenizer.from_pretrained(MODEL).backend_tokenizer
    for sentence in ("Мороз и солнце", "ὕδωρ 水 🙂", "[/bold]"):
        assert "".join(split_text(tok, sentence)) == sentence


@pytest.fixture
def nothing_fetched(monkeypatch):
    "What is refused is refused before anything is downloaded."

    def fail():
        raise AssertionError("work began")

    monkeypatch.setattr(demo, "demo_model", fail)


@pytest.mark.parametrize("port", ["0", "-1", "70000", "taken"])
def test_refused_ports(nothing_fetched, draft, port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = str(taken.getsockname()[1]) if port == "taken" else port
        with pytest.raises(UserError, match="port"):
            demo_command(["--port", number, "--draft", str(draft)])


def test_a_long_sentence_is_refused_before_work(nothing_fetched, draft):
    with pytest.raises(UserError, match="1,001 letters"):
        demo_command(["--once", "--draft", str(draft), "--sentence", "а" * 1001])


@pytest.mark.parametrize("typed", [lambda _: "а" * 1001, not_utf8])
def test_a_typed_sentence_that_is_refused_gives_way_to_the_example(monkeypatch, typed):
    tok = AutoTokenizer.from_pretrained(MODEL).backend_tokenizer
    monkeypatch.setattr(demo, "qwen3_tokenizer", lambda: tok)
    monkeypatch.setattr(demo, "dense_tokenizer", lambda: tok)
    cut = []
    monkeypatch.setattr(demo, "split_text", lambda tok, text: cut.append(text) or ["x"])
    monkeypatch.setattr(demo, "input", typed, raising=False)
    monkeypatch.setattr(sys, "stdin", Terminal())
    console = Console(file=io.StringIO(), width=79)
    demo.show_vocabularies(console, None)
    said = console.file.getvalue()
    assert "here is an example" in " ".join(said.split())
    assert cut == [DEMO_SENTENCE] * 2


def no_folder(path):
    pass


def a_file(path):
    path.write_text("draft")


def no_files(path):
    path.mkdir()


def a_models_folder(path):
    path.mkdir()
    write_json(path / "config.json", dict(model_type="llama"))


def no_json(path):
    path.mkdir()
    (path / "config.json").write_bytes(b"\xff{")


def no_weights(path):
    random_draft(path, MODEL)
    (path / "model.safetensors").unlink()


def cut_weights(path):
    random_draft(path, MODEL)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


BAD_DRAFTS = [no_folder, a_file, no_files, a_models_folder, no_json, no_weights, cut_weights]


@pytest.mark.parametrize("make", BAD_DRAFTS)
def test_refused_drafts(nothing_fetched, tmp_path, make):
    folder = tmp_path / "draft"
    make(folder)
    with pytest.raises(UserError, match=str(folder)):
        demo_command(["--once", "--draft", str(folder)])


def test_a_draft_that_was_not_installed(nothing_fetched, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "shipped_draft", lambda: tmp_path / "absent")
    with pytest.raises(UserError, match="install tpro_nb again"):
        demo_command(["--once"])


@pytest.mark.parametrize("cache", ["a file", "below a file"])
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, draft, cache):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / ("x" if cache == "below a file" else "")
    monkeypatch.setenv("TPRO_NB_CACHE", str(place))
    with pytest.raises(UserError, match="TPRO_NB_CACHE"):
        demo_command(["--once", "--draft", str(draft)])


class NoTerminal(io.StringIO):
    def isatty(self):
        return False


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_whole_of_it_on_a_toy(monkeypatch, capsys, draft):
    "Decoding and vocabularies; the page itself is test_playground.py's."
    tok = AutoTokenizer.from_pretrained(MODEL).backend_tokenizer
    monkeypatch.setattr(demo, "demo_model", lambda: MODEL)
    monkeypatch.setattr(demo, "qwen3_tokenizer", lambda: tok)
    monkeypatch.setattr(demo, "dense_tokenizer", lambda: tok)
    monkeypatch.setattr(demo, "DemoSettings", lambda **kw: DemoSettings(new=8, rounds=1))
    monkeypatch.setattr(sys, "stdin", NoTerminal())
    opened = []
    monkeypatch.setattr(demo, "playground_command", lambda argv: opened.append(argv) or 0)
    assert demo_command(["--once", "--draft", str(draft)]) == 0
    said = capsys.readouterr().out
    assert "The texts are equal: 4 answers" in said and "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert not opened
    assert demo_command(["--draft", str(draft), "--port", "8502", "--sentence", "Да"]) == 0
    assert opened[0][:4] == [str(MODEL), "--draft", str(draft), "--tree"]
    assert opened[0][-2:] == ["--port", "8502"]
    monkeypatch.setenv("TPRO_NB_NO_KERNELS", "1")
    assert demo_command(["--once", "--draft", str(draft), "--sentence", "Да"]) == 0
    said = capsys.readouterr().out
    assert "no compiled kernels" in said and "The texts are equal" in said
