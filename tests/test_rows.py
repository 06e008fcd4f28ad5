"Rows from every source, and those that are turned away."

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_toys import corpus, problems_of_all, turns

from tpro_nb import rows, tmath
from tpro_nb.core import UserError

THOUGHT = "<think>\n2 + 2 = 4\n</think>\n\n4"
SUM = "Сколько будет 2 + 2?"


def test_licence_gate_names_the_row():
    with pytest.raises(UserError, match="CC BY-SA"):
        rows.licence_gate(corpus(), ["Apache-2.0"])


MOJIBAKE = "Ð¿Ñ€Ð¸Ð²ÐµÑ\u0082 Ð¿Ñ\u0080Ð¸Ð²"


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("текст", "not an object"),
        ({}, "messages"),
        (dict(messages=turns("а")), "two turns"),
        (dict(messages=turns("а", None)), "role or content"),
        (dict(messages=turns("а", "  ")), "not an answer"),
        (dict(messages=turns("а", "<think>б")), "unclosed"),
        (dict(messages=turns("а", "Ну, <think>б</think> в")), "does not begin"),
        (dict(messages=turns("а", MOJIBAKE)), "encoding"),
        (dict(messages=turns("а", "я" * 50_000_000)), "million"),
    ],
    ids=[
        "no-object",
        "no-messages",
        "one-turn",
        "no-content",
        "blank",
        "unclosed-think",
        "late-think",
        "mojibake",
        "huge",
    ],
)
def test_broken_rows_are_set_aside(bad, reason):
    accepted, rejected = rows.foreign_rows([bad], "x", "MIT")
    assert accepted == []
    assert reason in rejected[0]["reason"]
    assert len(str(rejected[0])) < 1000


def test_t_wix_schema():
    thinking = dict(messages=turns(SUM, THOUGHT), subset="reasoning")
    (row,), rejected = rows.foreign_rows([thinking], "t-tech/T-Wix", "ODC-By")
    assert row["mode"] == "think"
    assert row["messages"] == turns(SUM, THOUGHT)
    assert row["licence"] == "ODC-By"
    assert not rejected


def test_an_empty_think_block_is_no_thought():
    as_qwen3 = dict(messages=turns(SUM, "<think>\n\n</think>\n\n4"), subset="general")
    (row,), rejected = rows.foreign_rows([as_qwen3], "t-tech/T-Wix", "ODC-By")
    assert row["mode"] == "direct"
    assert not rejected


def test_both_modes_for_the_same_families_and_step_counts():
    made = rows.problem_rows(problems_of_all(120))
    got = Counter((row["family"], row["mode"], row["tier"]) for row in made)
    for family in tmath.FAMILIES:
        for tier in ("School", "Student", "Professor"):
            assert abs(got[family, "think", tier] - got[family, "direct", tier]) <= 2


def test_parallel_rows_ask_in_either_direction():
    pairs = [
        (
            f"Enter the valid date number {number} of the form.",
            f"Введите правильную дату номер {number} в форме.",
        )
        for number in range(12)
    ]
    made = rows.parallel_rows(pairs)
    assert {row["lang"] for row in made} == {"ru-en"}
    assert len({row["id"] for row in made}) == 12
    for row in made:
        question = row["messages"][0]["content"]
        assert {*question} & {*"абвг"} or "Translate" in question


def test_mixed_encodings_and_broken_lines_of_a_raw_file(tmp_path):
    good = json.dumps(
        dict(messages=turns("Привет", "Здравствуйте!"), subset="general"), ensure_ascii=False
    )
    surrogate = json.dumps(dict(messages=turns("\ud800", "а")))
    lines = [good.encode(), good.encode("cp1251"), b"{", surrogate.encode(), good.encode()]
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b"\n".join(lines))
    accepted, rejected = rows.foreign_rows(tmath.load_rows(str(path)), "raw", "MIT")
    assert len(accepted) == 2
    reasons = [broken["reason"].split(" (")[0] for broken in rejected]
    assert reasons == ["not UTF-8", "not json", "broken encoding"]
    assert json.dumps(rejected)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_t_wix_from_jsonl_parquet_and_a_hub_folder(kind, tmp_path):
    raw = [
        dict(messages=turns(SUM, THOUGHT), subset="reasoning"),
        dict(messages=turns(SUM, "4"), subset="general"),
    ]
    files = dict(
        jsonl="t.jsonl", parquet="t.parquet", hub="T-Wix/data/train-00000-of-00001.parquet"
    )
    path = tmp_path / files[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in raw]
        path.write_text("".join(lines), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(raw), path)
    name = str(tmp_path / "T-Wix" if kind == "hub" else path)
    accepted, rejected = rows.foreign_rows(tmath.load_rows(name), "t-tech/T-Wix", "ODC-By")
    assert not rejected
    assert [row["mode"] for row in accepted] == ["think", "direct"]
    assert accepted[0]["messages"] == turns(SUM, THOUGHT)
