"Public sets by their true schema, from file to score: a stub answers, and a toy that is served."

import pytest
from stub_server import Said, Stub, asked_text

from tpro_nb.benchmark_files import benchmark_registry
from tpro_nb.core import read_json, read_jsonl, toy, write_jsonl
from tpro_nb.public_benchmarks import public_benchmarks_command


def tmath_row(question: str, answer: str, **other) -> dict:
    "All eight columns of t-tech/T-math; every one text but the list of solutions."
    about = dict(year="2009", grade="9", task_complexity="4", olympiad="Московская олимпиада")
    return dict(
        question=question,
        verifiable_answer=answer,
        full_answer=f"Ответ: {answer}.",
        solutions=[f"Получаем {answer}."],
        **(about | other),
    )


def aime_row(number: int, problem: str, answer: str) -> dict:
    return dict(
        id=number,
        problem=problem,
        solution="",
        answer=answer,
        url=f"https://artofproblemsolving.com/{number}",
        year="2024",
    )


def math500_row(place: int, problem: str, answer: str) -> dict:
    return dict(
        problem=problem,
        solution=f"$\\boxed{{{answer}}}$",
        answer=answer,
        subject="Algebra",
        level=3,
        unique_id=f"test/algebra/{place}.json",
    )


def gpqa_row(name: str, question: str, right: str, *wrong: str) -> dict:
    row = {"Record ID": name, "Question": question, "Correct Answer": right}
    for place, answer in enumerate(wrong, 1):
        row[f"Incorrect Answer {place}"] = answer
    return row | {"Subdomain": "Physics", "Explanation": "…"}


def mera_row(name: int, instruction: str, inputs, outputs: str) -> dict:
    return dict(instruction=instruction, inputs=inputs, outputs=outputs, meta=dict(id=name))


AIME = [
    aime_row(60, "Найдите время прогулки в минутах.", "204"),
    aime_row(61, "Найдите остаток от деления на 1000.", "025"),
]
PICK = "Задание: {question}\nA {option_a}\nB {option_b}\nЗапиши одну букву."
# set → (its rows, what a model replies to each, in order, and the verdict)
SETS = {
    "T-Math": (
        [
            tmath_row("Сколько было игроков?", "2"),
            tmath_row("Во сколько раз площадь больше?", "3.34", grade="10"),
            tmath_row("Найдите вероятность того, что выпадет орёл.", "\\frac{1}{2}"),
            tmath_row("Сколько монет нужно?", "2009"),
        ],
        [
            ("<think>Было 20 и 10.</think>\n**Ответ:** $\\boxed{2}$", "correct"),
            ("<think>…</think>Ответ: 3,34.", "correct"),
            ("Итак, $P = \\boxed{0{,}5}$.", "correct"),
            ("$\\boxed{2009}$\n\nХотя нет, монеты повторяются.", "unparsed"),
        ],
    ),
    "ruAIME-24": (AIME, [("Итого $\\boxed{204}$ минуты.", "correct"), ("\\boxed{25}", "correct")]),
    "ruAIME-25": (AIME, [("\\boxed{240}", "wrong"), ("**Ответ: 025**", "correct")]),
    "ruMATH-500": (
        [
            math500_row(1, "Переведите точку $(0,3)$.", "\\left( 3, \\frac{\\pi}{2} \\right)"),
            math500_row(2, "Решите неравенство.", "(-\\infty,2)\\cup(3,\\infty)"),
            math500_row(3, "Запишите произведение в восьмеричной системе.", "2516_8"),
            math500_row(4, "Кто бегает быстрее?", "\\text{Evelyn}"),
        ],
        [
            ("$\\boxed{(3; \\pi/2)}$", "correct"),
            ("Ответ: $x<2$ или $x>3$.", "correct"),
            ("$\\boxed{2516_{8}}$", "correct"),
            ("$\\boxed{\\text{Carla}}$", "wrong"),
        ],
    ),
    "ruGPQA": (
        [
            gpqa_row("rec1", "Какова энергия?", "2 эВ", "1 эВ", "3 эВ", "4 эВ"),
            gpqa_row("rec2", "Каков заряд?", "+1", "0", "−1", "+2"),
        ],
        [("**Ответ:** \\boxed{RIGHT}", "correct"), ("Либо A, либо B.", "unparsed")],
    ),
    "MERA": (
        [
            mera_row(0, "Верна ли скобочная запись {inputs}? 1 или 0.", "[()]", "1"),
            mera_row(1, PICK, dict(question="2+2?", option_a="3", option_b="4"), "B"),
            mera_row(2, "Тема: {topic}\nНазови автора.", dict(topic="роман"), "Толстой"),
        ],
        [("<think>верна</think>1", "correct"), ("B", "correct"), ("Ответ: Чехов", "wrong")],
    ),
}


def write_set(tmp_path, name: str, rows: list[dict]) -> str:
    "A set's file: parquet where that is what is published, with columns of one type."
    if name != "T-Math":
        return str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
    arrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / f"{name}.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return str(path)


def said_by_the_table(rows: list[dict], replies: list[tuple[str, str]]):
    "What the stub answers: the reply that belongs to the question's row."

    def say(body, n):
        asked = asked_text(body)
        for row, (reply, _) in zip(rows, replies):
            inputs = row.get("inputs", "")
            parts = inputs.values() if isinstance(inputs, dict) else [inputs]
            question = row.get("question") or row.get("problem") or row.get("Question")
            if all(part in asked for part in ([question] if question else parts)):
                letter = "?"
                if "Correct Answer" in row:
                    letter = asked.split(f") {row['Correct Answer']}")[0][-1]
                return Said(reply.replace("RIGHT", letter))
        raise AssertionError(asked)

    return say


@pytest.mark.parametrize("name", SETS)
def test_a_set_by_its_true_schema_is_asked_graded_and_scored(tmp_path, capsys, name):
    rows, replies = SETS[name]
    file = write_set(tmp_path, name, rows)
    out = tmp_path / "run"
    with Stub(said_by_the_table(rows, replies)) as stub:
        args = [name, file, str(out), "--rows", str(len(rows)), "--k", "1"]
        assert public_benchmarks_command([*args, "--endpoint", stub.name]) == 0
    verdicts = [row["verdict"] for row in read_jsonl(out / "graded.jsonl")]
    assert verdicts == [verdict for _, verdict in replies]
    share = verdicts.count("correct") / len(verdicts)
    assert read_json(out / "score.json")["avg_at_k"] == pytest.approx(share)
    assert name in capsys.readouterr().out


def test_a_served_toy_goes_through_every_set(tmp_path):
    """No weights of the chain are kept with the project, so the toy of its SFT model answers.

    It knows nothing: what is tested is that questions reach it, and its words a verdict."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from tpro_nb.chat_service import Service, ServiceSettings
    from tpro_nb.server import serving

    model = toy("07_sft/model")
    settings = ServiceSettings(model, name="toy", dtype="float32", context=1024, slots=2)
    with serving(Service(settings)) as url:
        for name, (rows, _) in SETS.items():
            file = write_set(tmp_path, name, rows)
            out = tmp_path / name
            args = [name, file, str(out), "--rows", str(len(rows)), "--k", "1", "--mode", "direct"]
            args += ["--endpoint", f"{url}/v1 toy", "--max-tokens", "4", "--temperature", "0"]
            assert public_benchmarks_command(args) == 0, name
            score = read_json(out / "score.json")
            assert (score["answers"], score["benchmark"]) == (len(rows), name)


def test_every_graded_set_of_the_registry_has_its_kind_here():
    "A kind of answer that no row above has is one that nobody has run."
    registry = benchmark_registry()
    kinds = {registry[name].answer for name in SETS}
    assert {entry.answer for entry in registry.values()} - kinds == {"judged", "code"}
