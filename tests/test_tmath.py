"Problems: disjoint, uniform, reproducible. Foreign files and the steps that build such a set."

import csv
import json
import re
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from scipy.stats import chisquare

from tpro_nb import grader, tmath
from tpro_nb.core import UserError, write_jsonl


def game(problem):
    "The problem without its wording, recomputed from the text."
    steps = re.findall(r"[a-j] \d+|\d:\d|\d", problem["question"])
    return problem["family"], problem["steps"], tuple(steps)


def published_row():
    "A row that has T-Math's eight fields and nothing else."
    (problem,) = tmath.draw_problems("sums", 1)
    return {field: problem[field] for field in tmath.TMATH_FIELDS}


def write_parquet(rows, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def ids_of(rows):
    return [row["problem_id"] for row in rows]


def reasons_of(rows):
    return [row["reason"] for row in rows]


@pytest.mark.parametrize("family", tmath.FAMILIES)
def test_splits_do_not_share_a_game(family):
    games = {}
    for split, n in dict(train=600, test=100, dev=40).items():
        games[split] = {game(problem) for problem in tmath.draw_problems(family, n, 3, split)}
        assert len(games[split]) > 20
    assert not games["train"] & games["test"]
    assert not games["train"] & games["dev"]
    assert not games["test"] & games["dev"]


def follow(problem):
    "Solve from the text alone, independently of the generator."
    question = problem["question"]
    two_digits = re.findall(r"[a-j] (\d\d)", question)
    if problem["family"] == "sums":
        return str(sum(int(term) for term in two_digits) % 10)
    if problem["family"] == "cups":
        cup = re.search(r"[Пп]од (\d)", question)[1]
        for pair in two_digits:
            if cup in pair:
                cup = pair.replace(cup, "")
        return cup
    rule = dict(re.findall(r"(\d):(\d)", question))
    place = re.search(r"(?:Начало|Старт|от|из|на) (\d)", question)[1]
    for _ in range(problem["steps"]):
        place = rule[place]
    return place


@pytest.mark.parametrize("family", tmath.FAMILIES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right_and_traces_end_in_them(family, split):
    for problem in tmath.draw_problems(family, 80, 1, split):
        trace = problem["solutions"][0]
        last_of_trace = re.split("[ :]", trace)[-1]
        assert follow(problem) == problem["verifiable_answer"] == last_of_trace, problem
        assert trace.count(";") == problem["steps"] - 1
        assert tmath.schema_error(problem) is None
        verdict = grader.grade(problem["full_answer"], problem["verifiable_answer"])
        assert verdict == "correct"


@pytest.mark.parametrize("family", tmath.FAMILIES)
def test_answers_are_uniform(family):
    drawn = tmath.draw_problems(family, 500, 5, steps=[4, 5, 6])
    counts = Counter(problem["verifiable_answer"] for problem in drawn)
    assert chisquare(list(counts.values())).pvalue > 1e-3
    assert tmath.CHANCE[family] >= max(counts.values()) / 500 * 0.7


def test_same_seed_same_problems_and_a_small_space_says_so():
    first = tmath.draw_problems("cups", 40, 7)
    assert first == tmath.draw_problems("cups", 40, 7)
    assert first != tmath.draw_problems("cups", 40, 8)
    with pytest.raises(UserError, match="has only"):
        tmath.draw_problems("cups", 400, split="test", steps=[2, 3])
    with pytest.raises(UserError, match="unknown family"):
        tmath.draw_problems("cup", 1)


def test_test_split_has_unseen_wordings_and_train_has_none():
    for family in tmath.FAMILIES:
        problems = tmath.draw_problems(family, 60, split="test")
        turns = Counter((problem["steps"], problem["wording"]) for problem in problems)
        for steps in range(1, 7):
            assert turns[steps, "seen"] - turns[steps, "held_out"] in (0, 1)
        wordings = Counter(problem["wording"] for problem in problems)
        assert wordings["held_out"] >= 26
    trained = tmath.draw_problems("cups", 50)
    assert {problem["wording"] for problem in trained} == {"seen"}


def test_real_file_schema(tmp_path):
    good = published_row()
    lines = [good, {**good, "year": 1998}, {"question": "?"}, [], good]
    rows, rejected = tmath.load_tmath(str(write_jsonl(tmp_path / "a.jsonl", lines)))
    assert len(rows) == 1
    assert rows[0]["family"] == "tmath"
    assert [row["line"] for row in rejected] == [1, 2, 3, 4]
    write_parquet([good], tmp_path / "a.parquet")
    rows, _ = tmath.load_tmath(str(tmp_path / "a.parquet"))
    assert rows[0]["question"] == good["question"]
    with pytest.raises(UserError, match="no such"):
        tmath.load_tmath(str(tmp_path / "b.parquet"))


def test_rows_from_a_local_folder_of_a_hub_set(tmp_path):
    good = published_row()
    data = tmp_path / "T-math" / "data"
    data.mkdir(parents=True)
    write_parquet([good, {**good, "question": "Ещё?"}], data / "train-00000-of-00001.parquet")
    rows, rejected = tmath.load_tmath(str(tmp_path / "T-math"))
    assert len(rows) == 2
    assert not rejected
    assert rows[0]["solutions"] == good["solutions"]
    assert len(tmath.load_rows(str(tmp_path / "T-math"), 1)) == 1


def test_broken_lines_are_set_aside_and_nothing_stops(tmp_path):
    good = json.dumps(published_row(), ensure_ascii=False).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"{broken",
        b"",
        '{"question": "Сколько"}'.encode("cp1251"),
        b"[" * 100_000,
        b"[1]",
        good,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows, rejected = tmath.load_tmath(str(tmp_path / "a.jsonl"))
    assert len(rows) == 1
    assert len(rejected) == 5
    assert [reason.split(" (")[0] for reason in reasons_of(rejected)] == [
        "not json",
        "not UTF-8",
        "not json",
        "not an object but list",
        "the same question twice",
    ]


def test_a_line_too_long_is_set_aside(tmp_path):
    good = json.dumps(published_row(), ensure_ascii=False).encode()
    (tmp_path / "b.jsonl").write_bytes(b'"' + b"x" * 3_000_000 + b'"\n' + good + b"\n")
    lines = tmath.read_lines(tmp_path / "b.jsonl", longest=1_000_000)
    assert isinstance(lines[0], tmath.Broken)
    assert "1 MB" in lines[0].reason
    assert lines[1] == published_row()


def test_files_that_cannot_be_used_stop_with_a_reason(tmp_path):
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="no parquet file"):
        tmath.load_rows(str(tmp_path / "c.parquet"))
    (tmp_path / "d.jsonl").write_text('{"title": "no text"}\n')
    with pytest.raises(UserError, match="cannot be protected"):
        tmath.protected_texts(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("Докажите, что 2+2=4.", "4", "proof"),
        ("Можно ли разрезать квадрат на 7 частей?", "7", "proof"),
        ("Найдите угол на рисунке.", "30", "figure"),
        ("Решите уравнение.", "1; 2", "several"),
        ("Кто победил?", "Вася", "not a number"),
        ("Найдите все такие числа.", "5", "all of"),
        ("Чему равна площадь?", "S^2", "not a number"),
        ("Чему равна сумма?", "12,5", None),
        ("Чему равно отношение?", "\\sqrt{2}", None),
        ("Сколько процентов?", "25%", None),
    ],
)
def test_statements_that_cannot_be_graded(question, answer, reason):
    given = tmath.unfit(published_row() | dict(question=question, verifiable_answer=answer))
    assert given is None if reason is None else reason in given


def test_same_statement_in_two_years_is_kept_once_and_other_numbers_are_not_the_same():
    statements = [
        ("2024", "В классе 20 учеников и 3 учителя; сколько людей?"),
        ("2019", "В классе 20 учеников и 3 учителя. Сколько людей?"),
        ("2020", "В классе 21 учеников и 3 учителя. Сколько людей?"),
    ]
    rows = []
    for place, (year, question) in enumerate(statements):
        rows.append(published_row() | dict(problem_id=f"p{place}", year=year, question=question))
    kept, repeats = tmath.without_repeats(rows)
    assert ids_of(kept) == ["p1", "p2"]
    assert repeats[0]["problem_id"] == "p0"
    assert "2019" in repeats[0]["reason"]


def test_pass_at_k_and_difficulty():
    assert tmath.pass_at(4, 1, 2) == pytest.approx(0.5)
    assert tmath.pass_at(4, 0, 2) == 0
    assert tmath.pass_at(4, 3, 2) == 1
    rows = [published_row() | dict(problem_id=name, verifiable_answer="7") for name in "abc"]
    samples = dict(
        a=["Ответ: 7"] * 4,
        b=["Ответ: 7", "Ответ: 6", "не знаю", "Ответ: 1"],
    )
    kept, dropped = tmath.by_difficulty(rows, samples, k=4)
    assert ids_of(kept) == ["b"]
    assert kept[0]["solve_rate"] == 0.25
    assert reasons_of(dropped) == ["solved 4 times of 4", "0 samples, 4 needed"]


def test_review_table_goes_out_and_comes_back(tmp_path):
    rows = []
    for name in "ab":
        question = f"Вопрос; «{name}», да?\nИли"
        rows.append(published_row() | dict(problem_id=name, question=question))
    path = tmath.write_review(rows, tmp_path / "r.csv")
    with pytest.raises(UserError, match="2 problems without"):
        tmath.read_review(rows, path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    for line, mark in zip(lines, ("да", "нет")):
        line["ok"] = mark
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    assert tmath.read_review(rows, path) == rows[:1]
