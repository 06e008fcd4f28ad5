"Grader: the table written from the rules, and hostile input."

import time
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from tpro_nb import grader

CASES = grader.grader_cases()


def test_table_of_russian_answers():
    assert len(CASES) >= 550
    demanded = {case["verdict"] for case in CASES}
    assert demanded == {"correct", "wrong", "unparsed", "truncated"}
    broken = []
    for case, verdict in zip(CASES, grader.grade_cases(CASES)):
        if verdict != case["verdict"]:
            broken.append((case["response"], case["answer"], case["verdict"], verdict))
    accepted = [row for row in broken if row[3] == "correct"]
    assert not accepted, "false positives weigh most"
    assert not broken


def test_unfinished_is_truncated_not_unparsed():
    assert grader.grade("Сначала посчитаем", "3", finished=False) == "truncated"
    assert grader.grade("Сначала посчитаем", "3") == "unparsed"
    assert grader.grade("Ответ: 3", "3", finished=False) == "correct"


HOSTILE = [
    "\\frac{" * 2000,
    "(" * 5000,
    "^".join(["9"] * 40),
    "\\sqrt{" * 100 + "2" + "}" * 100,
    "9" * 100000,
    "\\boxed{" * 3000,
    "{" * 100 + "}" * 100,
    "\\binom{99999999}{44444444}",
    "2^{99}" * 30,
    "Ответ: " * 5000,
    "1;" * 5000,
    "x" + "=" * 9999,
]


def test_hostile_strings_neither_hang_nor_pass():
    start = time.perf_counter()
    worker = grader.Worker(2)
    verdicts = []
    for hostile in HOSTILE:
        verdicts.append(grader.grade(f"\\boxed{{{hostile}}}", "\\sqrt{2}", worker=worker))
    assert "correct" not in verdicts
    assert time.perf_counter() - start < 30
    # the worker still answers
    assert grader.grade("\\boxed{\\sqrt{8}/2}", "\\sqrt{2}") == "correct"


def test_grade_works_from_threads():
    def grade_once(_):
        return grader.grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}")

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(grade_once, range(8))) == {"correct"}


def always_in_doubt(first, second):
    return "doubt"


FRAGMENTS = [
    "1",
    "2",
    "3,5",
    "0,(3)",
    " ",
    ";",
    ", ",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "∞",
    "-",
    "±",
    "x",
    "=",
    "<",
    "≤",
    "\\frac",
    "\\sqrt",
    "π",
    " и ",
    "∪",
    "n",
    "∈Z",
    "см",
    "%",
    "нет решений",
    "\\boxed{",
    "^",
    "/",
    "Ответ: ",
]
any_text = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)


@given(any_text, any_text)
@settings(max_examples=400, deadline=None)
def test_any_string_gets_a_verdict_and_nothing_equals_what_it_is_not(answer, key):
    verdict = grader.grade("Ответ: " + answer, key, worker=always_in_doubt)
    assert verdict in ("correct", "wrong", "unparsed", "truncated")
    if verdict == "correct":
        assert grader.parse(key) is not None or grader.clean(answer) == grader.clean(key)
