"Files and shapes that people bring: what is read, and what is refused by name."

import gzip
import io
import json
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpus_toys import turns

from tpro_nb import rows, sources
from tpro_nb.core import UserError
from tpro_nb.tmath import Broken

SUM, FOUR = "Сколько будет 2 + 2?", "4"
THOUGHT = "<think>\n2 + 2\n</think>\n\n4"
SYSTEM = dict(role="system", content="Ты учитель.")
CHAT = [{"from": "human", "value": SUM}, {"from": "gpt", "value": FOUR}]
PLAIN = turns(SUM, FOUR)
CALL = dict(id="c1", type="function", function=dict(name="add", arguments=dict(a=2, b=2)))
TOOL_TURNS = [
    dict(role="user", content=SUM),
    dict(role="assistant", content=None, tool_calls=[CALL]),
    dict(role="tool", content="4", tool_call_id="c1"),
    dict(role="assistant", content=FOUR),
]

READ = {  # a foreign row → its shape, its turns
    "messages": (dict(messages=PLAIN), "messages", PLAIN),
    "parts": (
        dict(messages=[dict(role="user", content=[dict(type="text", text=SUM)]), PLAIN[1]]),
        "messages",
        PLAIN,
    ),
    "roles in conversations": (dict(conversations=PLAIN, id=1), "messages", PLAIN),
    "other keys are null": (dict(messages=PLAIN, chosen=None, rejected=None), "messages", PLAIN),
    "sharegpt": (dict(conversations=CHAT), "sharegpt", PLAIN),
    "sharegpt in messages": (dict(messages=CHAT), "sharegpt", PLAIN),
    "sharegpt, a system's text": (
        dict(conversations=CHAT, system="Ты учитель."),
        "sharegpt",
        [SYSTEM, *PLAIN],
    ),
    "alpaca": (dict(instruction=SUM, input="", output=FOUR), "alpaca", PLAIN),
    "alpaca, an input": (
        dict(instruction="Сложи.", input="2, 2", output=FOUR),
        "alpaca",
        turns("Сложи.\n\n2, 2", FOUR),
    ),
    "alpaca, a history": (
        dict(instruction=SUM, input=None, output=FOUR, history=[["а", "б"]], system="Ты учитель."),
        "alpaca",
        [SYSTEM, *turns("а", "б", SUM, FOUR)],
    ),
    "prompt and response": (dict(prompt=SUM, response=FOUR), "prompt", PLAIN),
    "prompt and completion, as turns": (
        dict(prompt=PLAIN[:1], completion=PLAIN[1:]),
        "prompt",
        PLAIN,
    ),
    "question and answer": (dict(question=SUM, answer=FOUR), "prompt", PLAIN),
    "a thought": (dict(prompt=SUM, response=FOUR, thinking="2 + 2"), "prompt", turns(SUM, THOUGHT)),
    "a thought of a turn": (
        dict(messages=[PLAIN[0], dict(PLAIN[1], reasoning_content="2 + 2")]),
        "messages",
        turns(SUM, THOUGHT),
    ),
    "pair": (dict(prompt=SUM, chosen=FOUR, rejected="5"), "preference", PLAIN),
    "pair of turns": (
        dict(prompt=SUM, chosen=PLAIN, rejected=turns(SUM, "5"), messages=PLAIN),
        "preference",
        PLAIN,
    ),
    "pair without a prompt": (
        dict(chosen=PLAIN, rejected=turns(SUM, "5")),
        "preference",
        PLAIN,
    ),
    "pair of transcripts": (
        dict(
            chosen=f"\n\nHuman: {SUM}\n\nAssistant: {FOUR}",
            rejected=f"\n\nHuman: {SUM}\n\nAssistant: 5",
        ),
        "preference",
        PLAIN,
    ),
}
REFUSED = {  # a foreign row → what the reason must name
    "no shape": (dict(text=SUM), "keys: text"),
    "no object": ([SUM], "a list"),
    "messages null": (dict(messages=None), "messages: not a list"),
    "conversations null": (dict(conversations=None), "conversations: not a list"),
    "content null": (dict(messages=turns(SUM, None)), "messages[1].content"),
    "an image": (
        dict(messages=[dict(role="user", content=[dict(type="image_url")]), PLAIN[1]]),
        "messages[0].content[0].type: 'image_url'",
    ),
    "value null": (dict(conversations=[CHAT[0], {"from": "gpt"}]), "conversations[1].value"),
    "a moderator": (
        dict(conversations=[{"from": "moderator", "value": "!"}, *CHAT]),
        "conversations[0].from",
    ),
    "output null": (dict(instruction=SUM, output=None), "output: "),
    "output a number": (dict(instruction=SUM, output=4), "output: "),
    "input a list": (dict(instruction=SUM, input=[2], output=FOUR), "input: a list"),
    "instruction blank": (dict(instruction=" ", output=FOUR), "instruction: a blank question"),
    "history torn": (dict(instruction=SUM, output=FOUR, history=[["а"]]), "history[0]"),
    "response blank": (dict(prompt=SUM, response=""), "response: the last turn is not an answer"),
    "think unclosed": (dict(prompt=SUM, response="<think>2"), "response: unclosed think"),
    "prompts differ": (
        dict(chosen=PLAIN, rejected=turns("Другой вопрос", "5")),
        "rejected: another prompt",
    ),
    "no choice": (dict(prompt=SUM, chosen=FOUR, rejected=FOUR), "rejected: the same"),
    "pair without any prompt": (dict(chosen="а", rejected="б"), "prompt: not there"),
    "rejected null": (dict(prompt=SUM, chosen=FOUR, rejected=None), "rejected"),
    "tools": (dict(messages=TOOL_TURNS), "messages[1].tool_calls: the chat template"),
}


def read_one(raw, **how) -> tuple[dict, str]:
    return sources.read_foreign(raw, "x.jsonl", 7, sources.Reading(**how))


@pytest.mark.parametrize("raw, shape, expected", READ.values(), ids=READ)
def test_shapes_that_are_read(raw, shape, expected):
    row, told = read_one(raw)
    assert (told, row["messages"]) == (shape, expected)
    assert (row["source"], row["line"]) == ("x.jsonl", 7)
    assert read_one(raw, shape=shape)[0] == row
    assert row.get("rejected") == ("5" if shape == "preference" else None)


@pytest.mark.parametrize("raw, named", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_names_the_files_own_key(raw, named):
    with pytest.raises(rows.RowFault) as fault:
        read_one(raw)
    assert named in str(fault.value)


def test_a_named_shape_is_the_only_one():
    with pytest.raises(rows.RowFault, match=r"not of the shape alpaca .*keys: messages"):
        read_one(dict(messages=PLAIN), shape="alpaca")


def test_ids_tell_pairs_and_calls_apart():
    pair = dict(prompt=SUM, chosen=FOUR, rejected="5")
    ids = {
        read_one(raw)[0]["id"]
        for raw in (pair, pair | dict(rejected="6"), READ["prompt and response"][0])
    }
    assert len(ids) == 3


def test_tools_are_kept_where_the_template_carries_them():
    row, _ = read_one(dict(messages=TOOL_TURNS, tools=[dict(name="add")]), tools=True)
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    call = row["messages"][1]["tool_calls"][0]["function"]
    assert json.loads(call["arguments"]) == dict(a=2, b=2)
    assert json.loads(row["tools"]) == [dict(name="add")]
    assert "add" in rows.row_text(row)
    uncalled = [TOOL_TURNS[0], *TOOL_TURNS[2:]]
    for messages, named in [
        (uncalled, "messages[1].role: 'tool', and nobody"),
        ([TOOL_TURNS[0], dict(role="assistant", tool_calls=[{}]), PLAIN[1]], "function.name"),
        (TOOL_TURNS[:2], "the last turn is not an answer"),
    ]:
        with pytest.raises(rows.RowFault) as fault:
            read_one(dict(messages=messages), tools=True)
        assert named in str(fault.value)


RAWS = [dict(prompt=f"вопрос {number}", response="да\u2028нет\x00") for number in range(500)]
LINES = [json.dumps(raw, ensure_ascii=False) for raw in RAWS]


def write_as(folder: Path, name: str) -> str:
    "The same five hundred rows as a file of this name."
    path = folder / name
    plain = (
        path.with_name(path.name.removesuffix(path.suffix))
        if path.suffix in (".gz", ".zst")
        else path
    )
    if plain.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(RAWS), plain, row_group_size=60)
    elif plain.suffix == ".json":
        plain.write_text("\ufeff" + json.dumps(RAWS, indent=1), encoding="utf-8")
    elif plain.suffix:
        plain.write_bytes("\r\n".join(LINES).encode())
    elif plain.name == "dict":
        datasets.DatasetDict(train=datasets.Dataset.from_list(RAWS)).save_to_disk(path)
    else:
        datasets.Dataset.from_list(RAWS).save_to_disk(path)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    if path.suffix == ".zst":
        path.write_bytes(zstandard.compress(plain.read_bytes()))
    return str(path)


NAMES = [
    *("a.jsonl", "a.ndjson", "a.json", "a.parquet", "saved", "dict"),
    *("a.jsonl.gz", "a.json.gz", "a.parquet.gz", "a.ndjson.zst", "a.parquet.zst"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_every_row_once_with_its_number(name, tmp_path):
    found = sources.find_sources([write_as(tmp_path, name)])
    pieces = sources.cut_sources(found, piece_mb=0.001)
    assert len(pieces) > 1 or name.startswith(("a.json.", "a.parquet.")) or name == "a.json"
    read = [row for piece in pieces for row in sources.read_piece(piece)]
    assert sorted(read, key=lambda row: row.line) == [
        sources.NumberedRow(line, raw) for line, raw in enumerate(RAWS, start=1)
    ]


def read_bytes(folder: Path, name: str, content: bytes, mb: float = 1e-5) -> dict[int, str | dict]:
    "Number → what was read of a file, or why not."
    (folder / name).write_bytes(content)
    pieces = sources.cut_sources(sources.find_sources([str(folder / name)]), piece_mb=mb)
    read = [row for piece in pieces for row in sources.read_piece(piece)]
    return {row.line: row.raw.reason if isinstance(row.raw, Broken) else row.raw for row in read}


def test_awkward_files(tmp_path):
    assert read_bytes(tmp_path, "empty.jsonl", b"") == {}
    assert read_bytes(tmp_path, "empty.json", b" \n") == {}
    assert read_bytes(tmp_path, "blank.jsonl", b"\n\r\n  \n") == {}
    assert read_bytes(tmp_path, "bom.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": 1, "a": 2}') == {
        1: dict(a=1),
        3: dict(a=2),
    }
    torn = read_bytes(tmp_path, "torn.jsonl", b'{"a": 1}\n{"a": \n\xff\n{"a": 4}\n{"a"')
    assert torn[1] == dict(a=1) and torn[4] == dict(a=4)
    assert "not json" in torn[2] and "not UTF-8" in torn[3] and "not json" in torn[5]
    big = json.dumps(dict(a="я" * 2_000_000)).encode()
    assert len(read_bytes(tmp_path, "big.jsonl", big + b"\n" + big, 1)) == 2
    assert len(read_bytes(tmp_path, "big.json", b"[" + big + b"," + big + b"]")) == 2
    unended = read_bytes(tmp_path, "unended.json", b'[{"a": 1}, {"a": 2}')
    assert unended[2] == dict(a=2) and "does not end" in unended[3]
    lines = read_bytes(tmp_path, "lines.json", b'{"a": 1}\n{"a": 2}')
    assert list(lines.values()) == [dict(a=1), dict(a=2)]
    packed = gzip.compress(b'{"a": 1}\n' * 9_000, 0)
    cut = read_bytes(tmp_path, "cut.jsonl.gz", packed[:-4000], 1)
    assert [line for line, raw in cut.items() if isinstance(raw, str)] == [max(cut)]
    assert "ends in the middle" in cut[max(cut)]
    long = list(sources.byte_lines(__import__("io").BytesIO(b"a" * 5_000_000 + b"\nb"), 2_000_000))
    assert isinstance(long[0].text, Broken) and long[1].text == b"b"
    assert [line.size for line in long] == [5_000_000, 1]


@pytest.mark.parametrize("longest", [500_000, 1_500_000, 4_000_000])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_that_is_too_long_takes_no_row_of_another_piece(
    tmp_path, monkeypatch, longest, place
):
    "Wherever it stands and however the file is cut, every line is read once."
    lines = [json.dumps(dict(n=n)) for n in range(20_000)]
    lines[place * 9_999] = json.dumps(dict(n="я" * 1_000_000))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sources, "byte_lines", partial(sources.byte_lines, longest=longest))
    pieces = sources.cut_sources(sources.find_sources([str(path)]), 0.05)
    assert len(pieces) > 3
    read = [row.line for piece in pieces for row in sources.read_piece(piece)]
    assert sorted(read) == list(range(1, 20_001))


def test_a_damaged_packing_of_a_list_is_counted_and_does_not_end_the_run(tmp_path):
    whole = gzip.compress(json.dumps([dict(n=n) for n in range(9_000)]).encode(), 0)
    cut = read_bytes(tmp_path, "cut.json.gz", whole[:-4000])
    assert isinstance(cut[max(cut)], str)
    beginning = read_bytes(tmp_path, "beginning.json.gz", whole[:200])
    assert all(isinstance(raw, str) for raw in beginning.values())


def test_a_broken_parquet_is_named_before_work_and_a_broken_group_is_counted(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match="a.parquet is no parquet"):
        sources.cut_sources(sources.find_sources([str(tmp_path / "a.parquet")]))
    path = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist(RAWS), path, row_group_size=100, compression="zstd")
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content[start : start + 200] = b"\xff" * 200
    read = read_bytes(tmp_path, "b.parquet", bytes(content))
    assert len(read) == 500
    assert sum(isinstance(raw, str) for raw in read.values()) == 100


@pytest.mark.parametrize(
    "name, said",
    [
        ("nothing.jsonl", "no such file"),
        ("notes.txt", "what kind of file"),
        ("empty", "a folder without"),
        ("dictionary.json", "neither a list"),
    ],
)
def test_inputs_that_stand_for_nothing_are_refused(name, said, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "dictionary.json").write_text('{\n "rows": []\n}')
    with pytest.raises(UserError, match=said):
        for piece in sources.cut_sources(sources.find_sources([str(tmp_path / name)])):
            list(sources.read_piece(piece))
    with pytest.raises(UserError, match="given twice"):
        (tmp_path / "a.jsonl").write_text("{}")
        sources.find_sources([str(tmp_path / "a.jsonl"), str(tmp_path)])


def turns_read(raw):
    row, shape = sources.read_foreign(raw, "file", 1, sources.Reading())
    return shape, [(turn["role"], turn["content"]) for turn in row["messages"]]


KEYS_BESIDE = [  # a row, and what must stand in its conversation
    (dict(system_prompt="ты юрист", question="а", response="б"), ("system", "ты юрист")),
    (dict(instruction="а", context="дано", response="б"), ("user", "а\n\nдано")),
    (dict(problem="а", solution="б"), ("assistant", "б")),
    (dict(inputs="а", targets="б"), ("user", "а")),
    (dict(system="", prompt="а", completion="б", label=True), ("user", "а")),
    (
        dict(
            messages=[
                dict(role="user", content="а"),
                dict(
                    role="assistant",
                    content=[dict(type="thinking", thinking="мысль"), dict(type="text", text="б")],
                ),
            ]
        ),
        ("assistant", "<think>\nмысль\n</think>\n\nб"),
    ),
]


def test_what_stands_under_keys_beside_the_question_is_not_lost():
    for raw, turn in KEYS_BESIDE:
        assert turn in turns_read(raw)[1], raw
    with pytest.raises(rows.RowFault, match="^label: false"):
        turns_read(dict(prompt="а", completion="б", label=False))


def test_a_torn_zst_and_what_stands_behind_a_list_are_said(tmp_path):
    line = b'{"prompt": "a", "completion": "b"}\n'
    packed = zstandard.compress(line * 3)
    files = {
        "whole.jsonl.zst": (packed + packed, 6, 0),
        "torn.jsonl.zst": (packed[:-5], 0, 1),
        "lists.json": (b"[" + line + b"] [" + line + b"]", 1, 1),
    }
    for name, (content, good, bad) in files.items():
        (tmp_path / name).write_bytes(content)
        found = sources.find_sources([str(tmp_path / name)])
        read = [
            row.raw for piece in sources.cut_sources(found) for row in sources.read_piece(piece)
        ]
        broken = [row for row in read if isinstance(row, Broken)]
        assert (len(read) - len(broken), len(broken)) == (good, bad), name


def test_a_solution_is_the_reply_and_the_answer_its_key():
    row, _ = read_one(dict(problem="x + 1 = 43", solution="x = 43 - 1 = \\boxed{42}", answer="42"))
    assert row["messages"][1]["content"].endswith("{42}")
    assert row["answer"] == "42"
    row, _ = read_one(dict(problem="x + 1 = 43", answer="42"))
    assert row["messages"][1]["content"] == "42"


def test_a_system_text_beside_turns_stands_before_them_once():
    turns = [dict(role="user", content="q"), dict(role="assistant", content="a")]
    row, _ = read_one(dict(system="SYS", messages=turns))
    assert [turn["content"] for turn in row["messages"]] == ["SYS", "q", "a"]
    own = dict(role="system", content="own")
    row, _ = read_one(dict(system="SYS", messages=[own, *turns]))
    assert [turn["content"] for turn in row["messages"]] == ["own", "q", "a"]


@pytest.mark.parametrize(
    ("beside", "asked"),
    [
        (dict(input="", context="CTX"), "i\n\nCTX"),
        (dict(input="IN", context=""), "i\n\nIN"),
        (dict(input=None), "i"),
        (dict(input=""), "i"),
    ],
)
def test_an_empty_input_hides_no_context(beside, asked):
    row, _ = read_one(dict(instruction="i", output="o") | beside)
    assert row["messages"][0]["content"] == asked


@pytest.mark.parametrize(
    ("written", "read_items", "broken"),
    [
        (b"[1]" + b" " * (1 << 21) + b"\xff", 1, "UTF-8"),
        (b"[1]" + b" " * (3 << 20) + b'{"a": 1}', 1, "behind the end"),
        (b"[1, \xff2]", 0, "UTF-8"),
        (b"[1]" + b" " * (3 << 20), 1, None),
        (b"[1]\n", 1, None),
    ],
)
def test_what_follows_a_list_is_looked_at_to_its_end(written, read_items, broken):
    items = list(sources.list_items(io.BytesIO(written)))
    said = [item.reason for item in items if isinstance(item, Broken)]
    assert len(items) - len(said) == read_items
    assert [broken in reason for reason in said] == [True] * (broken is not None)
