"Public benchmarks: files that lie, endpoints that die, folders of two runs; lm-eval if installed."

import json
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from stub_server import Said, Stub, asked_text, in_turn

from tpro_nb import public_benchmarks
from tpro_nb.arena import (
    arena_rates,
    baseline_answers,
    first_answers,
    judge_answers,
    length_controlled,
    read_arena_verdict,
)
from tpro_nb.benchmark_answers import AskSettings, ask_endpoint, ask_folder, claim_folder
from tpro_nb.benchmark_files import (
    CHOICE_LETTERS,
    benchmark_prompts,
    benchmark_registry,
    load_arena,
    load_benchmark,
    load_mera,
    model_registry,
    paper_figure,
    unread_keys,
)
from tpro_nb.benchmark_scores import paired_against, rescore, submission
from tpro_nb.client import read_reply
from tpro_nb.core import UserError, read_json, read_jsonl, toy_model, write_jsonl
from tpro_nb.evaluation import ScoreInterval
from tpro_nb.grader import KeyedReply, grade, grade_letter
from tpro_nb.harness import harness_model, harness_scores, lm_eval_task, reply_is_right, run_lm_eval
from tpro_nb.public_benchmarks import public_benchmarks_command

SETS, MODELS = benchmark_registry(), model_registry()
MATH, GPQA, MMLU = SETS["ruMATH-500"], SETS["ruGPQA"], SETS["ruMMLU-Pro"]
TPRO = MODELS["T-pro-it-2.0"]


def math_row(i: int) -> dict:
    return dict(unique_id=f"p{i}", problem=f"Сколько будет {i} + 1?", answer=str(i + 1))


def choice_row(i: int) -> dict:
    row = {
        "Record ID": f"r{i}",
        "Question": f"Сколько будет {i} + 1?",
        "Correct Answer": str(i + 1),
    }
    return row | {f"Incorrect Answer {place}": str(90 + place) for place in (1, 2, 3)}


ROWS = [math_row(i) for i in range(6)]
CHOICE = [choice_row(i) for i in range(6)]


def file(tmp_path, rows, name="set.jsonl") -> str:
    write_jsonl(tmp_path / name, rows)
    return str(tmp_path / name)


def math(tmp_path) -> list[dict]:
    return load_benchmark(MATH, file(tmp_path, ROWS), rows=6)


def test_the_registry_is_complete():
    russian = "T-Math ruAIME-24 ruAIME-25 ruMATH-500 ruGPQA ruLCB ruMMLU-Pro MERA Arena-Hard-Ru"
    english = "AIME-24 AIME-25 MATH-500 GPQA LCB"
    assert {*russian.split(), *english.split()} <= set(SETS)
    for benchmark in SETS.values():
        assert benchmark.source, benchmark.id
        assert benchmark.licence, benchmark.id
        assert benchmark.metric, benchmark.id
        assert benchmark.prompt in benchmark_prompts(), benchmark.id
        assert paper_figure(benchmark, TPRO) is not None, benchmark.id
    assert paper_figure(SETS["T-Math"], TPRO) == 0.541
    assert paper_figure(SETS["GPQA"], MODELS["Qwen3-32B"]) == 0.668
    assert paper_figure(SETS["T-Math"], MODELS["Qwen3-0.6B"]) is None
    assert paper_figure(MMLU, MODELS["DeepSeek-R1"]) is None
    for model in MODELS.values():  # every name is found in its table
        assert not model.paper or paper_figure(GPQA, model)


def test_a_registry_of_ones_own(tmp_path):
    (tmp_path / "b.yaml").write_text("benchmarks:\n- {id: x, language: ru}\n")
    with pytest.raises(UserError, match="x: "):
        benchmark_registry(path=str(tmp_path / "b.yaml"))


LIES = {
    "occurs twice": [*ROWS, ROWS[0]],
    "5 rows, and ruMATH-500 has 6": ROWS[:5],
    "row 0: answer missing or empty": [ROWS[0] | dict(answer=""), *ROWS[1:]],
    "unique_id missing": [ROWS[0] | dict(unique_id=None), *ROWS[1:]],
    "under two ids": [*ROWS[:5], ROWS[0] | dict(unique_id="z")],
    "The row has вопрос, ответ": [dict(вопрос="?", ответ="1")],
}


@pytest.mark.parametrize("says,rows", LIES.items())
def test_files_that_lie_are_refused(tmp_path, says, rows):
    six = MATH.model_copy(update=dict(rows=6))
    with pytest.raises(UserError, match=says):
        load_benchmark(six, file(tmp_path, rows))


def test_sets_that_cannot_be_graded_say_so(tmp_path):
    with pytest.raises(UserError, match="LCB: needs a sandbox"):
        load_benchmark(SETS["LCB"], file(tmp_path, ROWS))
    with pytest.raises(UserError, match="not the form of Arena-Hard"):
        load_benchmark(SETS["Arena-Hard-Ru"], file(tmp_path, ROWS))
    for name in ("ruMATH-500", "MERA", "Arena-Hard-Ru"):
        with pytest.raises(UserError, match="no questions"):
            load_benchmark(SETS[name], file(tmp_path, []), rows=0)


@pytest.mark.parametrize(
    "change",
    [
        dict(inputs={}),
        dict(meta=dict(id=None)),
        dict(meta=dict(id=" ")),
        dict(instruction=""),
        dict(inputs=None),
    ],
)
def test_a_row_that_is_not_mera_is_refused(tmp_path, change):
    row = dict(instruction="{text}", inputs=dict(text="?"), meta=dict(id=1))
    with pytest.raises(UserError, match="not MERA's form"):
        load_mera(file(tmp_path, [row | change]))


@pytest.mark.parametrize(
    "change", [dict(uid=None), dict(uid=""), dict(prompt=None), dict(prompt="  ")]
)
def test_a_row_that_is_not_arena_hard_is_refused(tmp_path, change):
    with pytest.raises(UserError, match="not the form of Arena-Hard"):
        load_arena(file(tmp_path, [dict(uid="a", prompt="?") | change]))


def test_options_are_shuffled_the_same_way_each_time(tmp_path):
    problems = load_benchmark(GPQA, file(tmp_path, CHOICE), rows=6)
    assert load_benchmark(GPQA, file(tmp_path, CHOICE), rows=6) == problems
    assert len({problem["verifiable_answer"] for problem in problems}) > 1
    for problem, row in zip(problems, CHOICE):
        place = CHOICE_LETTERS.index(problem["verifiable_answer"])
        assert problem["options"][place] == row["Correct Answer"]
    listed = dict(question_id=1, question="?", options=["да", "нет"], answer="B")
    (problem,) = load_benchmark(MMLU, file(tmp_path, [listed]))
    assert problem["verifiable_answer"] == "B"
    with pytest.raises(UserError, match="none of the 2 options"):
        load_benchmark(MMLU, file(tmp_path, [listed | dict(answer="C")]))


FAST = dict(per_s=1e4, timeout_s=5, retries=1, wait_s=0.01, workers=1)


def right(body: dict) -> str:
    "The answer to «Сколько будет i + 1?»."
    number = asked_text(body).split("будет ")[1].split(" +")[0]
    return str(int(number) + 1)


def good(body, n):
    return Said(f"<think>раз {body['seed']}</think>\\boxed{{{right(body)}}}")


def always_two(body, n):
    return Said("\\boxed{2}")


def ask_math(tmp_path, folder: str, endpoint: str, **settings) -> dict:
    how = AskSettings(**settings)
    return ask_endpoint(MATH, math(tmp_path), tmp_path / folder, endpoint, how, **FAST)


def score_math(tmp_path, folder: str, k: int = 0) -> tuple[dict, list[dict]]:
    return rescore(MATH, math(tmp_path), tmp_path / folder, k=k)


def test_asks_with_distinct_seeds_keeps_raw_answers_and_scores_offline(tmp_path):
    with Stub(good) as fake:
        said = ask_math(tmp_path, "run", fake.name, samples=2, seed=7, mode="direct")
        assert said == dict(asked=12, answered=12, refused=0, why={}, distinct_pct=100)
        assert [body["seed"] for body in fake.asked] == [7] * 6 + [8] * 6
        assert not fake.asked[0]["chat_template_kwargs"]["enable_thinking"]
        ask_math(tmp_path, "run", fake.name, samples=3, seed=7, mode="direct")
        assert len(fake.asked) == 18  # a third pass asks for itself alone
    raw = read_jsonl(tmp_path / "run" / "answers.jsonl")
    assert len(raw) == 18
    _, answer = raw[0]
    assert answer["usage"] == dict(completion_tokens=3)
    line, rows = score_math(tmp_path, "run")
    assert line["avg_at_k"] == 1
    assert line["k"] == 3
    assert line["answers"] == 18
    assert {row["tokens"] for row in rows} == {3}


def test_killed_in_the_middle_continues(tmp_path):
    whole, killed = tmp_path / "a", tmp_path / "b"
    with Stub(good) as fake:
        ask_math(tmp_path, "a", fake.name, samples=2)
        killed.mkdir()
        (killed / "run.json").write_bytes((whole / "run.json").read_bytes())
        data = (whole / "answers.jsonl").read_bytes()
        cut = data[: len(data) // 2]
        (killed / "answers.jsonl").write_bytes(cut)  # half a line at the end
        before = len(fake.asked)
        ask_math(tmp_path, "b", fake.name, samples=2)
        assert len(fake.asked) - before == 12 - cut.count(b"\n") < 12
    assert (whole / "samples.jsonl").read_bytes() == (killed / "samples.jsonl").read_bytes()


def test_an_endpoint_that_fails_half_way_is_not_averaged(tmp_path):
    def dies(body, n):
        if body["seed"] == 1 and "5 +" in asked_text(body):
            return Said(status=503)
        return good(body, n)

    with Stub(dies) as fake:
        said = ask_math(tmp_path, "run", fake.name, samples=2)
        assert said["answered"] == 11
        assert said["why"] == {"HTTP 503": 1}
        with pytest.raises(UserError, match="11 of 12"):
            score_math(tmp_path, "run")
        first_pass, _ = score_math(tmp_path, "run", k=1)
        assert first_pass["answers"] == 6  # the first pass is whole
        fake.say = good
        before = len(fake.asked)
        assert ask_math(tmp_path, "run", fake.name, samples=2)["answered"] == 12
        assert len(fake.asked) == before + 1
    line, _ = score_math(tmp_path, "run")
    assert line["avg_at_k"] == 1


ENDS = [  # text, finish_reason, verdict
    ("<think>а</think>\\boxed{1}", "stop", "correct"),
    ("\\boxed{99}", "stop", "wrong"),
    ("", "stop", "unparsed"),
    ("<think>без конца \\boxed{4}", "length", "truncated"),
    ("не знаю", "stop", "unparsed"),
    ("", "length", "truncated"),
]


def test_four_ends_stay_apart_and_a_deaf_seed_is_seen(tmp_path):
    def in_turn(body, n):
        text, why, _ = ENDS[int(right(body)) - 1]
        return Said(text, why)

    with Stub(in_turn) as fake:
        said = ask_math(tmp_path, "run", fake.name, samples=2)
    line, rows = score_math(tmp_path, "run")
    assert [row["verdict"] for row in rows][:6] == [verdict for _, _, verdict in ENDS]
    assert line["empty_pct"] == pytest.approx(100 / 3)
    assert said["distinct_pct"] == 0


def test_nonsense_is_no_answer(tmp_path):
    def endless(body, n):
        return Said("\\boxed{1}", "abort")

    with Stub(endless) as fake:
        problems, settings = math(tmp_path)[:2], AskSettings(samples=1)
        said = ask_endpoint(MATH, problems, tmp_path / "run", fake.name, settings, **FAST)
    assert said["answered"] == 0
    assert all("finish_reason" in why for why in said["why"])


def test_a_thought_that_never_closes_is_truncated_even_where_the_template_opened_it():
    choice = dict(message=dict(content="дальше \\boxed{4}"), finish_reason="length")
    reply = read_reply(dict(choices=[choice]), opens=True)
    assert grade(reply["response"], "4", reply["finished"]) == "truncated"
    with pytest.raises(UserError, match="no direct mode"):
        direct = AskSettings(mode="direct")
        ask_endpoint(MATH, [], "nowhere", "http://x m", direct, MODELS["DeepSeek-R1"])


def test_two_runs_are_never_asked_into_one_folder(tmp_path):
    problems = math(tmp_path)
    with Stub(good) as fake:

        def go(problems=problems, name=fake.name, **settings):
            how = AskSettings(samples=1, **settings)
            return ask_endpoint(MATH, problems, tmp_path / "run", name, how, **FAST)

        go()
        for change, says in (
            (dict(temperature=0.1), "temperature"),
            (dict(mode="direct"), "mode"),
            (dict(seed=5), "seed"),
            (dict(max_tokens=5), "max_tokens"),
            (dict(stop=("Вопрос:",)), "stop"),
            (dict(name=fake.name.replace("toy", "other")), "other now"),
            (dict(problems=problems[1:]), "questions have changed"),
            (dict(problems=[problems[0] | dict(question="?"), *problems[1:]]), "have changed"),
        ):
            with pytest.raises(UserError, match=says):
                go(**change)
        assert len(fake.asked) == 6


def test_a_run_goes_on_wherever_its_server_and_its_file_have_moved(tmp_path):
    with Stub(good) as fake:
        ask_math(tmp_path, "run", fake.name, samples=1)
    (tmp_path / "elsewhere").mkdir()
    moved = load_benchmark(MATH, file(tmp_path / "elsewhere", ROWS, "moved.jsonl"), rows=6)
    moved[0]["verifiable_answer"] = "7"  # and a key was mended
    with Stub(good) as other_port:
        where = other_port.name.replace("/v1", "/proxy/v1/")
        how = AskSettings(samples=2)
        said = ask_endpoint(MATH, moved, tmp_path / "run", where, how, **FAST)
        assert (said["answered"], len(other_port.asked)) == (12, 6)
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "run")
    line, _ = rescore(MATH, moved, tmp_path / "elsewhere" / "run")
    assert line["avg_at_k"] == pytest.approx(5 / 6)


def test_a_refused_question_is_recorded_scored_and_not_asked_again(tmp_path):
    def refuses_three(body, n):
        too_long = Said(status=400, body='{"error": {"message": "слишком длинно"}}')
        return too_long if right(body) == "3" else good(body, n)

    run = tmp_path / "run"
    with Stub(refuses_three) as fake:
        said = ask_math(tmp_path, "run", fake.name, samples=2)
        assert (said["answered"], said["refused"], said["why"]) == (10, 2, {})
        assert len(fake.asked) == 12
        ask_math(tmp_path, "run", fake.name, samples=2)
        assert len(fake.asked) == 12
        line, rows = score_math(tmp_path, "run")
        assert line["avg_at_k"] == pytest.approx(5 / 6)
        assert line["counts"]["refused"] == 2
        assert line["counts"]["unparsed"] == line["counts"]["empty"] == 0
        assert {row["refused"] for row in rows if "refused" in row} == {"HTTP 400: слишком длинно"}
        (run / "refused.jsonl").unlink()
        fake.say = good
        assert ask_math(tmp_path, "run", fake.name, samples=2)["answered"] == 12


def test_a_request_that_is_refused_as_such_leaves_the_folder_free(tmp_path):
    with Stub(lambda body, n: Said(status=400, body="max_tokens > 4096")) as fake:
        with pytest.raises(UserError, match="refuses every question.*max_tokens > 4096"):
            ask_math(tmp_path, "run", fake.name, samples=1)
        fake.say = good
        said = ask_math(tmp_path, "run", fake.name, samples=1, max_tokens=4096)
        assert (said["answered"], said["refused"]) == (6, 0)


def test_what_is_never_answered_may_be_counted_as_not_right(tmp_path):
    def breaks_on_five(body, n):
        return Said(status=500) if right(body) == "5" else good(body, n)

    with Stub(breaks_on_five) as fake:
        ask_math(tmp_path, "run", fake.name, samples=1)
    with pytest.raises(UserError, match="5 of 6 samples.*missing_is_wrong"):
        score_math(tmp_path, "run")
    line, _ = rescore(MATH, math(tmp_path), tmp_path / "run", missing_is_wrong=True)
    assert line["avg_at_k"] == pytest.approx(5 / 6)
    assert (line["counts"]["missing"], line["counts"]["truncated"]) == (1, 0)


def test_what_cannot_be_averaged_is_refused(tmp_path):
    problems = math(tmp_path)
    with Stub(good) as fake:
        ask_math(tmp_path, "run", fake.name, samples=1)
    with pytest.raises(UserError, match="other questions"):
        other = [problems[0] | dict(question="другой"), *problems[1:]]
        rescore(MATH, other, tmp_path / "run")
    log = tmp_path / "run" / "samples.jsonl"
    rows = read_jsonl(log)
    for wrong, says in (
        ([*rows[:5], rows[5] | dict(key="другой")], "mixes 2 runs"),
        ([*rows, rows[0]], "there twice"),
        ([*rows[:5], rows[5] | dict(problem_id="чужой")], "which was not asked"),
        ([dict(x=1)], "row 0: not a sample"),
    ):
        write_jsonl(log, wrong)
        with pytest.raises(UserError, match=says):
            rescore(MATH, problems, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match="nobody knows"):
        claim_folder(tmp_path / "run", dict(questions="x"))


def test_what_a_filter_swallowed_is_an_empty_answer_and_does_not_block_the_score(tmp_path):
    def swallows_three(body, n):
        return Said(None, "content_filter") if right(body) == "3" else good(body, n)

    with Stub(swallows_three) as fake:
        ask_math(tmp_path, "run", fake.name, samples=1)
    line, _ = score_math(tmp_path, "run")
    assert line["correct_pct"] == pytest.approx(500 / 6)
    assert line["unparsed_pct"] == pytest.approx(100 / 6)
    assert line["empty_pct"] == pytest.approx(100 / 6)


def test_two_runs_are_paired_by_problem(tmp_path):
    with Stub(good) as fake, Stub(always_two) as poor:
        ask_math(tmp_path, "a", fake.name, samples=1)
        ask_math(tmp_path, "b", poor.name, samples=1)
    test = paired_against(MATH, math(tmp_path), tmp_path / "a", tmp_path / "b")
    assert test.diff == pytest.approx(500 / 6)
    assert test.n == 6
    assert test.lo < test.diff
    assert test.p < 0.1
    assert test.mdd > 0
    same = paired_against(MATH, math(tmp_path), tmp_path / "a", tmp_path / "a")
    assert (same.diff, same.p, same.mdd) == (0, 1, None)


def mera_row(i: int, outputs: str = "") -> dict:
    return dict(
        instruction="Сколько будет {n} + 1? Ответь числом.",
        inputs=dict(n=str(i)),
        outputs=outputs,
        meta=dict(id=i + 10),
    )


def test_mera_closed_answers_become_its_submission_and_open_ones_a_score(tmp_path, capsys):
    def bare(body, n):
        return Said(f"<think>так</think>{right(body)}")

    run = tmp_path / "run"
    closed = file(tmp_path, [mera_row(i) for i in range(3)], "BPS.jsonl")
    key = [mera_row(0, "1"), mera_row(1, "2"), mera_row(2, "2")]  # 2 + 1 is not 2
    open_split = file(tmp_path, key, "open.jsonl")
    with Stub(bare) as fake:
        args = ["MERA", closed, str(run), "--endpoint", fake.name, "--workers", "1"]
        assert public_benchmarks_command(args) == 0
        expected = [dict(outputs=str(i + 1), meta=dict(id=i + 10)) for i in range(3)]
        assert read_json(run / "BPS.json") == dict(data=dict(test=expected))
        out = str(tmp_path / "open")
        public_benchmarks_command(["MERA", open_split, out, "--endpoint", fake.name])
    assert "avg@1   0.7 [0.0, 1.0]" in capsys.readouterr().out
    problems = load_mera(closed)
    with pytest.raises(UserError, match="closed"):
        rescore(SETS["MERA"], problems, run)
    rows = read_jsonl(run / "samples.jsonl")
    write_jsonl(run / "samples.jsonl", rows[:2])
    with pytest.raises(UserError, match="1 of 3 questions have no answer"):
        submission(problems, run, "BPS")


def arena_row(i: int) -> dict:
    return dict(question_id=f"q{i}", turns=[dict(content=f"Сколько будет {i} + 1? Объясни.")])


def baseline_row(i: int) -> dict:
    return dict(uid=f"q{i}", answer="<think>тайна</think>не знаю")


class FairJudge:
    "Prefers «Подробно» wherever it stands; breaks at the seventh question while `broken`."

    broken = True

    def __call__(self, body, n):
        text = asked_text(body)
        assert "<think>" not in text
        assert body["temperature"] == 0
        if n == 7 and self.broken:
            return Said(status=500)
        first = text.index("Подробно") < text.index("не знаю")
        return Said("Думаю: " + ("[[A>>B]]" if first else "[[B>>A]]"))


def test_a_judge_is_asked_in_both_orders_and_only_for_what_is_missing(tmp_path, capsys):
    def in_detail(body, n):
        return Said("<think>ход</think>Подробно: столько-то")

    theirs = file(tmp_path, [baseline_row(i) for i in range(5)], "base.jsonl")
    questions = file(tmp_path, [arena_row(i) for i in range(5)], "arena.jsonl")
    run, fair, once = tmp_path / "run", FairJudge(), FAST | dict(retries=0)
    with Stub(in_detail) as fake, Stub(fair) as judge:
        args = ["Arena-Hard-Ru", questions, str(run), "--rows", "5"]
        args += ["--endpoint", fake.name, "--workers", "1"]
        with pytest.raises(UserError, match="is judged"):
            public_benchmarks_command(args)
        problems = load_arena(questions)
        with pytest.raises(UserError, match="1 of 10 judgements are missing"):
            judge_answers(problems, run, theirs, judge.name, **once)
        fair.broken = False
        args += ["--baseline", theirs, "--judge", judge.name]
        assert public_benchmarks_command(args) == 0
        assert len(judge.asked) == 11
        assert len(fake.asked) == 5
        rates = read_json(run / "score.json")
        assert rates["win_pct"] == 100
        assert rates["win_pct_lo"] < 60
        assert rates["first_place_pct"] == 50
        assert "wins 100.0 %" in capsys.readouterr().out
        lost = file(tmp_path, [dict(uid="q0", answer="да")], "lost.jsonl")
        with pytest.raises(UserError, match="no answer to 4 questions"):
            judge_answers(problems, run, lost, judge.name, **once)


def test_a_judge_that_refuses_or_does_not_decide_is_not_asked_for_ever(tmp_path, capsys):
    def evades(body, n):
        if "Сколько будет 1 +" in asked_text(body):
            return Said(status=400, body="нельзя")
        first = asked_text(body).index("Подробно") < asked_text(body).index("не знаю")
        if "Сколько будет 2 +" in asked_text(body) and first:
            return Said("оба хороши")
        return Said("[[A>B]]" if first else "[[B>A]]")

    theirs = file(tmp_path, [baseline_row(i) for i in range(5)], "base.jsonl")
    questions = file(tmp_path, [arena_row(i) for i in range(5)], "arena.jsonl")
    args = ["Arena-Hard-Ru", questions, str(tmp_path / "run"), "--rows", "5", "--baseline", theirs]
    with Stub(in_turn(Said("Подробно: столько-то"))) as fake, Stub(evades) as judge:
        args += ["--endpoint", fake.name]
        assert public_benchmarks_command([*args, "--judge", judge.name]) == 0
        rates = read_json(tmp_path / "run" / "score.json")
        assert (rates["prompts"], rates["left_out"], rates["win_pct"]) == (3, 2, 100)
        assert "no verdict on 2 prompts" in capsys.readouterr().out
        judge.say = in_turn(Said("оба хороши"))
        with pytest.raises(UserError, match="decides nothing"):
            public_benchmarks_command([*args, "--judge", judge.name.replace("toy", "other")])


@pytest.mark.parametrize("said", ["", "A", "[[A>C]]", "[[A>B]] [[B>A]]", "<think>[[A>B]]"])
def test_a_judge_that_does_not_decide_gives_no_verdict(said):
    choice = dict(message=dict(content=said), finish_reason="stop")
    with pytest.raises(ValueError, match="no single verdict"):
        read_arena_verdict(dict(choices=[choice]))


@pytest.mark.parametrize(
    "said,verdict",
    [
        ("Ответ: вариант B", "correct"),
        ("Ответ: В", "correct"),
        ("\\boxed{(B)}", "correct"),
        ("\\boxed{B) 17}", "correct"),
        ("Ответ: B.", "correct"),
        ("Ответ: A", "wrong"),
        ("Ответ: E", "unparsed"),
        ("Ответ: A, B", "unparsed"),
        ("Ответ: Большой", "unparsed"),
        ("Думаю, B", "unparsed"),
    ],
)
def test_letters(said, verdict):
    assert grade_letter(KeyedReply(said, "B", options=4)) == verdict


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "The embedded server on a toy; it has a draft, so `toy-plain` asks for plain decoding."
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from tpro_nb.chat_service import Service, ServiceSettings
    from tpro_nb.draft_model import random_draft
    from tpro_nb.server import serving

    folder = tmp_path_factory.mktemp("served")
    toy_model(folder / "target", tie_word_embeddings=False, initializer_range=0.2)
    random_draft(folder / "draft", folder / "target", hot=list(range(40, 45)))
    settings = ServiceSettings(
        folder / "target",
        folder / "draft",
        name="toy",
        tree=(2, 2, 4),
        dtype="float32",
        context=256,
        slots=2,
        queue=16,
    )
    with serving(Service(settings)) as url:
        yield f"{url}/v1"


def test_the_embedded_server_answers_and_speculation_changes_no_score(served, tmp_path):
    greedy = AskSettings(mode="direct", samples=1, temperature=0, max_tokens=12, top_p=1)
    patient = FAST | dict(timeout_s=60)
    problems = math(tmp_path)
    texts = []
    for name in ("toy", "toy-plain"):
        out = tmp_path / name
        said = ask_endpoint(MATH, problems, out, f"{served} {name}", greedy, **patient)
        assert said["answered"] == 6, said
        texts.append([row["response"] for row in read_jsonl(out / "samples.jsonl")])
        line, _ = rescore(MATH, problems, out)
        assert line["answers"] == 6
    speculative, plain = texts
    assert speculative == plain
    assert any(speculative)


def test_a_folder_in_process(tmp_path, monkeypatch):
    seen = {}

    def launched(target, config, work):
        seen.update(config, target=target)

    monkeypatch.setattr("tpro_nb.benchmark_answers.launch", launched)
    toy = tmp_path / "m"
    settings = AskSettings(samples=2, max_tokens=4)
    toy_model(toy, hidden=16, layers=1)
    ask_folder(MATH, math(tmp_path), tmp_path / "run", str(toy), "toy", settings)
    assert seen["target"] == "tpro_nb.evaluation:sample_answers"
    assert seen["k"] == 2
    assert len(read_jsonl(seen["problems"])) == 6
    write_jsonl(tmp_path / "run" / "samples.jsonl", [dict(an="answer")])
    toy_model(toy, hidden=16, layers=1, seed=1)
    with pytest.raises(UserError, match="weights"):
        ask_folder(MATH, math(tmp_path), tmp_path / "run", str(toy), "toy", settings)


def math_command(tmp_path, folder: str, *more: str) -> int:
    "The command on the six questions, into a folder."
    questions = file(tmp_path, ROWS)
    out = str(tmp_path / folder)
    return public_benchmarks_command(["ruMATH-500", questions, out, "--rows", "6", *more])


def test_command_line(tmp_path, capsys):
    assert public_benchmarks_command(["--list"]) == 0
    assert "t-tech/T-math" in capsys.readouterr().out
    with pytest.raises(UserError, match="--list"):
        public_benchmarks_command([])
    with Stub(good) as fake:
        more = ["--endpoint", fake.name, "--model", "T-pro-it-2.0", "--workers", "2"]
        assert math_command(tmp_path, "run", *more) == 0
    printed = capsys.readouterr().out
    for part in ("6 answered, 0 refused, 0 missing", "avg@1   1.00 [", "maj@1   1.00 [", "0.94"):
        assert part in printed
    assert "WARNING" not in printed
    assert read_json(tmp_path / "run" / "score.json")["k"] == 1
    with pytest.raises(UserError, match="not registered"):
        public_benchmarks_command(["ruX", "f", "o"])


def command(*args: str, **options) -> subprocess.Popen:
    "The command in a process of its own."
    line = [sys.executable, "-m", "tpro_nb.public_benchmarks", *args]
    return subprocess.Popen(line, text=True, stderr=subprocess.PIPE, **options)


def test_a_reader_may_leave(tmp_path):
    listing = command("--list", stdout=subprocess.PIPE)
    head = subprocess.Popen(["head", "-1"], stdin=listing.stdout, stdout=subprocess.DEVNULL)
    listing.stdout.close()
    head.wait()
    assert "Traceback" not in listing.communicate()[1]


def test_killed_outright_in_the_middle_loses_what_was_in_flight(tmp_path):
    dead = threading.Event()

    def slow_from_five(body, n):
        if n == 5:
            dead.set()
            return Said("да" * 40, gap_s=0.2)
        return good(body, n)

    run = tmp_path / "run"
    args = ["ruMATH-500", file(tmp_path, ROWS), str(run), "--rows", "6", "--concurrency", "1"]
    with Stub(slow_from_five) as fake:
        running = command(*args, "--endpoint", fake.name)
        assert dead.wait(120)
        running.kill()
        running.communicate()
        with open(run / "answers.jsonl", "ab") as log:
            log.write(b'["torn')
        fake.say = good
        assert public_benchmarks_command([*args, "--endpoint", fake.name]) == 0
        assert len(fake.asked) == 7  # four, the one in flight, and two
    assert read_json(run / "score.json")["avg_at_k"] == 1
    assert [row["verdict"] for row in read_jsonl(run / "graded.jsonl")] == ["correct"] * 6


def test_interrupted_by_hand_it_ends_at_once(tmp_path):
    started = threading.Event()

    def silent(body, n):
        started.set()
        return Said("да", wait_s=60)

    run = tmp_path / "run"
    args = ["ruMATH-500", file(tmp_path, ROWS), str(run), "--rows", "6"]
    with Stub(silent) as fake:
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's & leaves it deaf
        running = command(*args, "--endpoint", fake.name, preexec_fn=heard)
        assert started.wait(120)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=30)[1]
    assert running.returncode == 130
    assert "the same command goes on" in said
    assert "Traceback" not in said


WARNED = {  # what the server says → what is printed
    "were cut off at --max-tokens 128": Said("<think>долго", "length"),
    "could not be read": Said("не знаю"),
    "6 answers are empty": Said(""),
}


@pytest.mark.parametrize("says", WARNED)
def test_a_score_that_says_little_says_so(tmp_path, capsys, says):
    with Stub(in_turn(WARNED[says])) as fake:
        math_command(tmp_path, "run", "--endpoint", fake.name, "--max-tokens", "128")
    assert says in capsys.readouterr().out


def test_refused_and_missing_are_told_apart(tmp_path, capsys):
    def moody(body, n):
        does = {"3": Said(status=400, body="длинно"), "5": Said(status=500)}
        return does.get(right(body)) or good(body, n)

    patience = ["--retries", "0", "--timeout", "5"]
    with Stub(moody) as fake:
        args = ["--endpoint", fake.name, *patience]
        with pytest.raises(UserError, match="5 of 6 samples are there.*missing_is_wrong"):
            math_command(tmp_path, "run", *args)
        math_command(tmp_path, "run", *args, "--missing-is-wrong")
    printed = capsys.readouterr().out
    for part in ("4 answered, 1 refused, 1 missing", "1 × HTTP 500", "WARNING: the server refused"):
        assert part in printed
    assert "avg@1   0.67 [" in printed
    assert "lower bounds" in printed


def test_a_server_that_is_gone_for_good_leaves_a_score(tmp_path, capsys):
    with Stub(lambda body, n: good(body, n) if n <= 4 else Said(status=401)) as fake:
        args = ["--endpoint", fake.name, "--concurrency", "1"]
        with pytest.raises(UserError, match="HTTP 401"):
            math_command(tmp_path, "run", *args)
        assert math_command(tmp_path, "run", *args, "--missing-is-wrong") == 0
        assert "avg@1   0.67 [" in capsys.readouterr().out
        with pytest.raises(UserError, match="holds another run"):
            math_command(tmp_path, "run", *args, "--missing-is-wrong", "--seed", "5")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        math_command(tmp_path, "file", *args)


BAD_ARGUMENTS = {
    "--k -1: give a number from 0": ["--k", "-1"],
    "--max-tokens 0": ["--max-tokens", "0"],
    "--timeout nan": ["--timeout", "nan"],
    "--timeout 0.0": ["--timeout", "0"],
    "--retries -1": ["--retries", "-1"],
    "--concurrency 0": ["--concurrency", "0"],
    "--temperature inf": ["--temperature", "inf"],
    "is no NAME=COLUMN": ["--fields", "вопрос"],
    "'ask' is none of id, question": ["--fields", "ask=вопрос"],
    "is no endpoint": ["--endpoint", "localhost:1 m"],
    "has no think mode": ["--switch", "never"],
    "two models": ["--path", "models/nano"],
}


@pytest.mark.parametrize("says", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_is_asked(tmp_path, says):
    with Stub(good) as fake:
        with pytest.raises(UserError, match=re.escape(says)):
            math_command(tmp_path, "run", "--endpoint", fake.name, *BAD_ARGUMENTS[says])
        assert not fake.asked
    assert not (tmp_path / "run" / "run.json").exists()


def test_columns_with_names_of_their_own(tmp_path):
    rows = [dict(Задача=f"Сколько будет {i} + 1?", Ответ=str(i + 1)) for i in range(3)]
    own = file(tmp_path, rows, "own.jsonl")
    with Stub(good) as fake:
        for fields in (
            ["id=", "question=Задача", "answer=Ответ"],
            ["id=,question=Задача,answer=Ответ"],
        ):
            args = [
                "ruMATH-500",
                own,
                str(tmp_path / "run"),
                "--rows",
                "0",
                "--endpoint",
                fake.name,
            ]
            assert public_benchmarks_command([*args, "--fields", *fields]) == 0
        assert len(fake.asked) == 3
    with pytest.raises(UserError, match="MERA has a form of its own"):
        load_benchmark(SETS["MERA"], own, dict(question="Задача"))


def test_a_torn_line_is_named(tmp_path):
    path = tmp_path / "torn.jsonl"
    whole = [json.dumps(row) for row in ROWS[:3]]
    path.write_text("\n\n".join(whole) + "\n" + whole[2][:20])
    for name in ("ruMATH-500", "MERA", "Arena-Hard-Ru"):
        with pytest.raises(UserError, match="torn.jsonl, line 6, .*not json.*Was the file cut off"):
            load_benchmark(SETS[name], str(path), rows=0)


def test_nothing_answered_is_no_zero_of_zero(tmp_path):
    with Stub(in_turn(Said(status=500))) as fake:
        ask_math(tmp_path, "run", fake.name, samples=2)
    with pytest.raises(UserError, match="0 of 6 questions are answered"):
        score_math(tmp_path, "run")


@pytest.mark.parametrize("paper", ["", ", paper: {}", ", paper: null"])
def test_a_set_of_ones_own_needs_no_figure_of_the_paper(tmp_path, paper):
    (tmp_path / "b.yaml").write_text(
        "benchmarks:\n- {id: x, language: ru, source: s, licence: l, rows: null, answer: number, "
        f"prompt: plain, metric: m, samples: 1, fields: {{question: q, answer: a}}{paper}}}\n"
    )
    entry = benchmark_registry(path=str(tmp_path / "b.yaml"))["x"]
    assert paper_figure(entry, TPRO) is None


def test_command_line_pairs_two_runs_and_protects_a_score(tmp_path, capsys):
    first = tmp_path / "a"
    with Stub(good) as fake, Stub(always_two) as poor:
        assert math_command(tmp_path, "a", "--endpoint", poor.name, "--workers", "1") == 0
        more = ["--endpoint", fake.name, "--workers", "1", "--against", str(first)]
        assert math_command(tmp_path, "b", *more) == 0
    assert "+83.3 points" in capsys.readouterr().out
    assert read_json(tmp_path / "b" / "against.json")["other"] == str(first)
    before = read_json(first / "score.json")
    with pytest.raises(UserError, match="holds another run"):
        math_command(tmp_path, "a", "--path", "models/nano", "--lm-eval", "generate")
    assert read_json(first / "score.json") == before
    assert not list(first.glob("*.yaml"))


def test_command_line_takes_a_folder(tmp_path, monkeypatch):
    seen = {}

    def asked(benchmark, problems, out, path, name, settings):
        seen.update(path=path, name=name)

    monkeypatch.setattr(public_benchmarks, "ask_folder", asked)
    monkeypatch.setattr(public_benchmarks, "finish_run", lambda *args: None)
    assert math_command(tmp_path, "c", "--path", "models/nano") == 0
    assert seen == dict(path="models/nano", name="nano")
    with pytest.raises(UserError, match="--endpoint"):
        math_command(tmp_path, "d")
    with pytest.raises(UserError, match="--path"):
        endpoint = "http://127.0.0.1:9/v1 m"
        math_command(tmp_path, "d", "--endpoint", endpoint, "--lm-eval", "choice")


def test_command_line_runs_lm_eval(tmp_path, capsys, monkeypatch):
    def evaluated(tasks, folder, model):
        return {tasks[0]: dict(acc=ScoreInterval(0.5, 0.1, 0.9))}

    monkeypatch.setattr(public_benchmarks, "run_lm_eval", evaluated)
    out = tmp_path / "e"
    args = ["ruGPQA", file(tmp_path, CHOICE, "choice.jsonl"), str(out), "--rows", str(len(CHOICE))]
    args += ["--path", "models/nano", "--lm-eval", "choice"]
    assert public_benchmarks_command(args) == 0
    assert "acc 0.500 [0.100, 0.900]" in capsys.readouterr().out
    assert read_json(out / "score.json") == dict(acc=[0.5, 0.1, 0.9])


LENGTHS = np.random.default_rng(3).integers(-200, 500, 150).tolist()


def judged_by(judge) -> list[dict]:
    "Judgements `judge(order, longer)` of 150 prompts in both orders."
    rows = []
    for (prompt, longer), order in product(enumerate(LENGTHS), ("model_first", "baseline_first")):
        row = dict(prompt_id=str(prompt), order=order, verdict=judge(order, longer))
        rows.append(row | dict(model_chars=900 + longer, baseline_chars=900))
    return rows


def first_wins(order: str, longer: int) -> str:
    return "A>B"


def test_arena_takes_length_out():
    rng = np.random.default_rng(3)
    rng.integers(-200, 500, 150)  # the draws go on after those of the lengths

    def likes_length(order, longer):
        model_wins = rng.random() < 1 / (1 + np.exp(-longer / 80))
        return "A>B" if model_wins == (order == "model_first") else "B>A"

    def likes_the_model(order, longer):
        model_wins = rng.random() < 0.8
        return "A>>B" if model_wins == (order == "model_first") else "B>A"

    long = arena_rates(judged_by(likes_length), resamples=60)
    better = arena_rates(judged_by(likes_the_model), resamples=60)
    assert long["win_pct_lo"] > 55
    assert long["lc_win_pct_lo"] < 50 < long["lc_win_pct_hi"]
    assert better["lc_win_pct_lo"] > 70


def test_arena_of_ties_and_of_a_model_that_always_wins():
    def ties(order, longer):
        return "A=B"

    def model_wins(order, longer):
        return "A>B" if order == "model_first" else "B>A"

    assert arena_rates(judged_by(ties), resamples=5)["win_pct"] == 50
    assert arena_rates(judged_by(model_wins), resamples=5)["win_pct_lo"] < 100


def test_arena_needs_both_orders():
    def likes_both(order, longer):
        return "оба хороши"

    rows = judged_by(first_wins)
    with pytest.raises(UserError, match="lack one"):
        arena_rates(rows[:-1])
    with pytest.raises(UserError, match="twice"):
        arena_rates(rows * 2)
    with pytest.raises(UserError, match="none of"):
        arena_rates(judged_by(likes_both))


def test_lm_eval_is_asked_for_politely(tmp_path):
    try:
        import lm_eval  # noqa: F401  only whether it is installed
    except ImportError:
        with pytest.raises(UserError, match="eval"):
            run_lm_eval(["x"], str(tmp_path), "m")


@pytest.mark.parametrize("gpu,device,dtype", [(True, "cuda", "auto"), (False, "cpu", "float32")])
def test_lm_eval_goes_where_the_card_is(monkeypatch, tmp_path, gpu, device, dtype):
    import torch

    seen = {}

    def evaluate(**arguments):
        seen.update(arguments)
        rows = [dict(metrics=["acc"], acc=acc, doc={}) for acc in (1.0, 0.0)]
        return dict(samples=dict(x=rows))

    def task_manager(**arguments):
        return None

    package = SimpleNamespace(simple_evaluate=evaluate)
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=task_manager))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    scores = run_lm_eval(["x"], str(tmp_path), "models/nano")
    assert scores["x"]["acc"].mean == 0.5
    assert seen["device"] == device
    assert seen["model_args"] == dict(pretrained="models/nano", dtype=dtype)


@pytest.fixture
def offline_lm_eval(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_lm_eval_by_likelihood_and_over_the_server(offline_lm_eval, served, tmp_path):
    problems = load_benchmark(GPQA, file(tmp_path, CHOICE), rows=6)
    tasks, model = tmp_path / "tasks", tmp_path / "m"
    toy_model(model)
    choice = lm_eval_task(GPQA, problems, tasks)
    scores = run_lm_eval([choice], tasks, str(model), limit=4)[choice]
    assert set(scores) == {"acc", "acc_norm"}
    for score in scores.values():
        assert score.low <= score.mean <= score.high
    generate = lm_eval_task(GPQA, problems, tasks, "generate", max_tokens=12)
    scores = run_lm_eval([generate], tasks, f"{served} toy", limit=2)[generate]
    assert set(scores) == {"correct"}


def kept_reply(said: str, answer: str, kind="number", options=()) -> dict:
    "One of lm-eval's samples."
    problem = dict(verifiable_answer=answer, options=list(options), kind=kind, language="ru")
    return dict(doc=problem, resps=[[said]])


def test_a_free_answer_is_graded_as_everywhere():
    """exact_match of a whole reply is 0 for every model; a right box, a right number spelt
    otherwise, and a wrong thought before a right answer count."""
    second_thought = "<think>\\boxed{A}?</think>Шаги. \\boxed{B}"
    assert reply_is_right(kept_reply(second_thought, "B", "letter", "1234"))
    assert not reply_is_right(kept_reply("\\boxed{C}", "B", "letter", "1234"))
    assert not reply_is_right(kept_reply("<think>\\boxed{B}", "B", "letter", "1234"))
    assert reply_is_right(kept_reply("Ответ: 0,5", "\\frac{1}{2}"))
    assert reply_is_right(kept_reply("да.", "Да", "text"))


class AnswersAfter:
    "Wrong for the first `wrong` questions, then right; a wrong box stands in its thoughts."

    def __init__(self, problems: list[dict], wrong: int):
        self.key = {problem["question"]: problem["verifiable_answer"] for problem in problems}
        self.wrong = wrong

    def __call__(self, body, n):
        question = body["messages"][-1]["content"].strip()
        answer = "Z" if n <= self.wrong else self.key[question]
        text = f"<think>Сперва \\boxed{{Z}}.</think>Шаги.\n\\boxed{{{answer}}}"
        return Said(text)


def test_lm_eval_scores_a_right_answer_as_right(offline_lm_eval, tmp_path):
    choices = load_benchmark(GPQA, file(tmp_path, CHOICE), rows=6)
    sets = ((GPQA, choices), (MATH, math(tmp_path)))
    for (benchmark, problems), wrong in product(sets, (0, 6)):
        task = lm_eval_task(benchmark, problems, tmp_path / "tasks", "generate", max_tokens=12)
        with Stub(AnswersAfter(problems, wrong)) as fake:
            scores = run_lm_eval([task], tmp_path / "tasks", fake.name)[task]
        assert scores["correct"].mean == (not wrong)


NO_IDS = dict(id="", question="question", answer="answer")
KEYS = [  # as files give them, and what is graded by; None: refused
    ("72", "72"),
    (72, "72"),
    (7.5, "7.5"),
    (["72"], "72"),
    ("48/2=<<48/2=24>>24 так\n#### 72", "72"),
    ("\\frac{1}{2}", "\\frac{1}{2}"),
    (["72", "73"], None),
    ({"ground_truth": "72"}, None),
    (True, None),
    (float("nan"), None),
    ([["72"]], None),
    ("решение\n####", None),
]


@pytest.mark.parametrize("given, key", KEYS, ids=lambda value: str(value)[:30])
def test_a_key_is_one_number_or_text(tmp_path, given, key):
    path = file(tmp_path, [dict(question="Сколько?", answer=given)])
    if key is None:
        with pytest.raises(UserError, match="one number or text|answer is empty"):
            load_benchmark(MATH, path, NO_IDS, 0)
        return
    (problem,) = problems = load_benchmark(MATH, path, NO_IDS, 0)
    assert problem["verifiable_answer"] == key
    assert not unread_keys(MATH, problems)


def test_a_key_that_no_box_can_hold_is_read_bare(tmp_path):
    text_set = MATH.model_copy(update=dict(answer="text"))
    path = file(tmp_path, [dict(question="Какая?", answer="a{b")])
    assert not unread_keys(text_set, load_benchmark(text_set, path, NO_IDS, 0))


def test_keys_that_nothing_reads_are_told(tmp_path, capsys):
    questions = file(tmp_path, [*ROWS[:5], ROWS[5] | dict(answer="1}{")])
    with Stub(good) as fake:
        line = ["ruMATH-500", questions, str(tmp_path / "run"), "--rows", "6"]
        assert public_benchmarks_command([*line, "--endpoint", fake.name]) == 0
    assert "nothing reads 1 of the keys" in capsys.readouterr().out


CHOICES = [  # options and key as files give them, and the options and letter; None: refused
    (["да", "нет"], "B", ["да", "нет"], "B"),
    (["да", "нет"], 1, ["да", "нет"], "B"),
    ({"A": "да", "B": "нет"}, "B", ["да", "нет"], "B"),
    ({"text": ["да", "нет"], "label": ["1", "2"]}, "2", ["да", "нет"], "B"),
    ([3, 4.5], "A", ["3", "4.5"], "A"),
    ({"text": ["да", "нет"], "label": [1, 2]}, 1, ["да", "нет"], "A"),
    ({"text": ["да", "нет"], "label": [0, 1]}, 1, ["да", "нет"], "B"),
    ({"text": ["да", "нет"], "label": 5}, "A", None, None),
    ({"text": ["да", "нет"], "label": ["A"]}, "A", None, None),
    (["да", ["нет"]], "B", ["да", "нет"], "B"),
    (["да", float("nan")], "A", None, None),
    (["да", "нет"], "AB", None, None),
    (["да", "нет"], True, None, None),
    (["да", "нет"], 2, None, None),
    ("['да', 'нет']", "A", None, None),
    (["да", None], "A", None, None),
    ([str(option) for option in range(11)], "A", None, None),
]


@pytest.mark.parametrize("options, key, texts, letter", CHOICES)
def test_options_are_what_the_model_sees(tmp_path, options, key, texts, letter):
    row = dict(question_id=1, question="Верно?", options=options, answer=key)
    path = file(tmp_path, [row])
    if texts is None:
        with pytest.raises(UserError, match="option"):
            load_benchmark(MMLU, path, None, 0)
        return
    (problem,) = load_benchmark(MMLU, path, None, 0)
    assert (problem["options"], problem["verifiable_answer"]) == (texts, letter)
    assert f"B) {texts[1]}" in problem["question"]


def test_one_stem_with_other_options_is_another_question(tmp_path):
    rows = [
        dict(question="Что верно?", options=pair, answer="A") for pair in (["а", "б"], ["в", "г"])
    ]
    first, second = load_benchmark(MMLU, file(tmp_path, rows), dict(id=""), 0)
    assert first["problem_id"] != second["problem_id"]
    with pytest.raises(UserError, match="twice"):
        load_benchmark(MMLU, file(tmp_path, rows[:1] * 2), dict(id=""), 0)


def test_options_in_columns_are_texts_and_part_of_the_question(tmp_path):
    rows = [choice_row(0), choice_row(0) | {"Correct Answer": "5"}]
    first, second = load_benchmark(GPQA, file(tmp_path, rows), dict(id=""), 0)
    assert first["problem_id"] != second["problem_id"]
    for wrong in (float("nan"), ["7", "8"], dict(text="7")):
        path = file(tmp_path, [choice_row(0) | {"Correct Answer": wrong}])
        with pytest.raises(UserError, match="Correct Answer is one number or text"):
            load_benchmark(GPQA, path, None, 0)


def test_a_question_may_be_a_conversation_of_one_message(tmp_path):
    asked = [dict(role="user", content="2 + 2?")]
    (problem,) = load_benchmark(MATH, file(tmp_path, [dict(question=asked, answer="4")]), NO_IDS, 0)
    assert "2 + 2?" in problem["question"] and "role" not in problem["question"]
    longer = [*asked, dict(role="assistant", content="4"), dict(role="user", content="А 3 + 3?")]
    with pytest.raises(UserError, match="one question is asked"):
        load_benchmark(MATH, file(tmp_path, [dict(question=longer, answer="6")]), NO_IDS, 0)
    two_turns = dict(question_id="q", turns=[dict(content="Раз?"), dict(content="Два?")])
    with pytest.raises(UserError, match="one question is asked"):
        load_arena(file(tmp_path, [two_turns]))


@pytest.mark.parametrize(
    "splits, read",
    [(("test",), "test"), (("train", "test"), "test"), (("train",), "train"), (("a", "b"), None)],
)
def test_a_folder_gives_its_test_split(tmp_path, splits, read):
    import pandas as pd

    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    metadata = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split in splits:
        rows = [math_row(i) | dict(unique_id=f"{split}{i}") for i in range(2)]
        pd.DataFrame(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        metadata += f"  - split: {split}\n    path: data/{split}-*.parquet\n"
    (folder / "README.md").write_text(metadata + "---\n")
    if read is None:
        with pytest.raises(UserError, match="no split is called test"):
            load_benchmark(MATH, str(folder), None, 2)
        return
    problems = load_benchmark(MATH, str(folder), None, 2)
    assert [problem["problem_id"] for problem in problems] == [
        f"ruMATH-500-{read}{i}" for i in range(2)
    ]


def test_a_comparison_counts_what_the_score_counted(tmp_path):
    with Stub(good) as fake, Stub(always_two) as poor:
        ask_math(tmp_path, "a", fake.name, samples=2)
        ask_math(tmp_path, "b", poor.name, samples=1)
    for run in ("a", "b"):  # half of b's answers are lost, and a's second samples are wrong
        rows = read_jsonl(tmp_path / run / "samples.jsonl")
        kept = [row for row in rows if run == "a" or int(row["problem_id"][-1]) < 3]
        for row in kept:
            if row["sample"] == 1:
                row["response"] = "\\boxed{99}"
        write_jsonl(tmp_path / run / "samples.jsonl", kept)
    folders = (tmp_path / "a", tmp_path / "b")
    test = paired_against(MATH, math(tmp_path), *folders, k=1, missing_is_wrong=True)
    assert test.diff == pytest.approx(500 / 6)  # b is right once
    with pytest.raises(UserError, match="missing"):
        paired_against(MATH, math(tmp_path), *folders, k=1)


def test_every_filter_of_lm_eval_has_a_figure_of_its_own():
    def row(name, value):
        return dict(doc={}, filter=name, metrics=["exact_match"], exact_match=value)

    two = [row("strict-match", 0.0)] * 10 + [row("flexible-extract", 1.0)] * 10
    scores = harness_scores(two)
    assert [score.mean for score in scores.values()] == [0, 1]
    assert list(scores) == ["exact_match, strict-match", "exact_match, flexible-extract"]
    assert list(harness_scores(two[:10])) == ["exact_match"]


@pytest.mark.parametrize("url", ["http://h/v1", " http://h/v1/", "http://h/v1/chat/completions"])
def test_lm_eval_finds_the_endpoint(url):
    told = harness_model(f"{url} модель")["model_args"]
    assert told["base_url"] == "http://h/v1/chat/completions"
    assert told["model"] == "модель"


@pytest.mark.parametrize(
    "longer, low, high",
    [
        (np.full(300, 50), 0.666, 0.668),
        (np.full(300, -50), 0.666, 0.668),
        (np.random.default_rng(0).normal(1000, 100, 300), 0.6, 0.75),
        (np.zeros(300), 0.666, 0.668),
    ],
)
def test_lengths_that_say_nothing_take_nothing_away(longer, low, high):
    won = np.random.default_rng(1).permutation(np.r_[np.ones(200), np.zeros(100)])
    assert low < length_controlled(won, longer) < high


def verdicts_of(pairs) -> list[dict]:
    rows = []
    for prompt, verdicts in enumerate(pairs):
        for order, verdict in zip(("model_first", "baseline_first"), verdicts):
            row = dict(prompt_id=str(prompt), order=order, verdict=verdict)
            rows.append(row | dict(model_chars=90 + prompt, baseline_chars=50))
    return rows


@pytest.mark.parametrize(
    "pairs",
    [
        [("A>B", "B>A")] * 5,  # won every time
        [("A=B", "A=B")] * 5,
        [("A>B", "A>B")] * 5,  # whoever stands first
        [("A>B", "A>B")],
        [("A>B", "B>A")],
    ],
)
def test_few_judgements_that_do_not_vary_have_wide_intervals(pairs):
    rates = arena_rates(verdicts_of(pairs), resamples=20)
    for name in ("win_pct", "lc_win_pct"):
        low, high = rates[f"{name}_lo"], rates[f"{name}_hi"]
        assert low <= rates[name] + 1e-6 and rates[name] - 1e-6 <= high
        assert high - low > 20
    json.dumps(rates, allow_nan=False)


SPELT = {  # a judge's words, and the verdict
    "[[А>В]]": "A>B",
    "[[A > B]]": "A>B",
    "[[**A>>B**]]": "A>>B",
    "[[A\\>B]]": "A>B",
    "[[A<B]]": "B>A",
    "[[A<<B]]": "B>>A",
    "[[A==B]]": "A=B",
    "[[b>a]]": "B>A",
    "см. [[сноска]], итог [[B>A]]": "B>A",
    "[[A>>>B]]": "",
    "[[A>B]] или [[B>A]]": "",
    "[[A]]": "",
    "[A>B]": "",
}


@pytest.mark.parametrize("said", SPELT)
def test_a_verdict_in_other_letters(said):
    reply = dict(choices=[dict(message=dict(content=said), finish_reason="stop")])
    if not SPELT[said]:
        with pytest.raises(ValueError, match="no single verdict"):
            read_arena_verdict(reply)
        return
    assert read_arena_verdict(reply) == SPELT[said]
    reply["choices"][0]["finish_reason"] = "length"
    with pytest.raises(ValueError, match="cut off"):
        read_arena_verdict(reply)


@pytest.mark.parametrize(
    "answer",
    [
        dict(answer=None),
        dict(answer=dict(answer=None)),
        dict(messages=[dict(role="assistant", content=None)]),
        dict(messages=[dict(role="user", content="вопрос")]),
        dict(answer="<think>только мысль"),
    ],
)
def test_a_baseline_that_says_nothing_is_no_answer(tmp_path, answer):
    problems = load_arena(file(tmp_path, [arena_row(0)]))
    path = file(tmp_path, [dict(uid="q0") | answer], "base.jsonl")
    with pytest.raises(UserError, match="no answer to 1"):
        baseline_answers(path, problems)


@pytest.mark.parametrize(
    "mode, finished, text, said",
    [
        ("think", False, "Так, спрашивают про", ""),
        ("think", False, "<think>Так</think>Ответ", "Ответ"),
        ("think", True, "Ответ", "Ответ"),
        ("direct", False, "Ответ, который обор", "Ответ, который обор"),
    ],
)
def test_a_thought_cut_by_the_limit_is_no_answer(tmp_path, mode, finished, text, said):
    problems = load_arena(file(tmp_path, [arena_row(0)]))
    sample = dict(problem_id="arena-q0", sample=0, response=text, finished=finished, mode=mode)
    (tmp_path / "run").mkdir()
    write_jsonl(tmp_path / "run" / "samples.jsonl", [sample])
    assert first_answers(tmp_path / "run", problems) == {"arena-q0": said}


@pytest.mark.parametrize(
    "outputs, key",
    [
        ("", ""),
        (None, ""),
        ([], ""),
        ({}, ""),
        (0, "0"),
        (["Москва"], "Москва"),
        ([dict(segment="Москва", label="answer")], "Москва"),
        (["Москва", "Тула"], None),
        (True, None),
        (float("nan"), None),
        (dict(text="Москва"), None),
    ],
)
def test_what_mera_calls_outputs(tmp_path, outputs, key):
    path = file(tmp_path, [mera_row(0) | dict(outputs=outputs)])
    if key is None:
        with pytest.raises(UserError, match="outputs is one number or text"):
            load_mera(path)
        return
    assert load_mera(path)[0]["verifiable_answer"] == key


def test_two_processes_do_not_share_a_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), Stub(good) as fake:
        with pytest.raises(UserError, match="another process"):
            math_command(tmp_path, "run", "--endpoint", fake.name)
    with Stub(good) as fake:
        assert math_command(tmp_path, "run", "--endpoint", fake.name) == 0


def test_small_fits_say_nothing_on_the_way(recwarn):
    rng = np.random.default_rng(2)
    for size in (2, 3, 5, 8, 20):
        for _ in range(10):
            won = rng.choice([0, 0.5, 1], size)
            rate = length_controlled(won, rng.normal(0, 300, size))
            assert 0 <= rate <= 1
    assert not [str(warning.message) for warning in recwarn]
