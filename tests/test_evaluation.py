"Intervals, paired tests, and a sampler that loses and mixes nothing."

import json
from dataclasses import asdict
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from tpro_nb import evaluation as ev
from tpro_nb.core import UserError, read_jsonl, toy, toy_problems, write_jsonl


def test_coverage_is_95_by_problem_and_less_by_answer():
    covered = ev.interval_coverage(sims=300)
    assert 92 <= covered["by_problem"] <= 98
    assert covered["by_answer"] < 88


def test_coverage_is_that_of_the_intervals_themselves(monkeypatch):
    def never_holds_the_truth(shares, seed=0):
        return ev.ScoreInterval(0.4, 0.41, 0.42)  # the truth is 7/16

    monkeypatch.setattr(ev, "accuracy", never_holds_the_truth)
    assert ev.interval_coverage(sims=20)["by_problem"] == 0


def test_accuracy_at_the_ends_has_width():
    solved = ev.accuracy([1.0] * 30)
    assert solved.mean == solved.high == 1
    assert 0.85 < solved.low < 0.95
    half = ev.accuracy([0, 1] * 30)
    assert half.low < 0.5 < half.high
    assert ev.accuracy([0.0] * 30).high > 0.05
    alike = ev.accuracy([0.5] * 20)  # all alike between the ends: resampling would say (.5, .5, .5)
    assert alike.mean == 0.5
    assert alike.low < 0.3
    assert alike.high > 0.7


def test_paired_finds_a_real_difference_and_not_a_false_one():
    rng = np.random.default_rng(0)
    skill = rng.beta(1, 1, 200)
    strong = rng.binomial(1, skill)
    weak = rng.binomial(1, np.clip(skill * 0.4, 0, 1))
    big = ev.paired(strong, weak)
    none = ev.paired(rng.binomial(1, skill), rng.binomial(1, skill))
    assert big.p < 0.001
    assert big.lo > 0
    assert none.p > 0.01


def test_where_nothing_varies_there_is_no_noise_to_speak_of():
    assert ev.paired([1, 0, 1], [1, 0, 1]).mdd is None
    assert ev.paired([1, 1, 1], [0, 0, 0]).mdd is None
    few = ev.paired([1, 0, 1], [1, 0, 1])  # that none of three differed proves little
    many = ev.paired([1] * 300, [1] * 300)
    assert few.lo == -few.hi < -0.6
    assert 0 < many.hi < 0.02
    assert few.p == 1


def test_the_detectable_difference_is_detected_four_times_in_five():
    differences = np.array([1, 0, 0, 0, -1] * 20)  # variance known: 2/5 per problem, n = 100
    detectable = ev.paired(differences, 0 * differences).mdd
    assert detectable == pytest.approx((1.959964 + 0.841621) * (40 / 99) ** 0.5 / 10, rel=1e-5)
    rng = np.random.default_rng(1)
    noise = rng.choice([-1, 0, 0, 0, 1], (4000, 100))
    simulated = noise + detectable
    standard_errors = simulated.std(1, ddof=1) / 10
    found = abs(simulated.mean(1) / standard_errors) > 1.984  # a t test of each comparison
    assert 0.77 < found.mean() < 0.83


def test_problems_that_all_differ_alike_leave_an_interval():
    """Two problems, both right against both wrong: p is .5, so the interval must not exclude 0;
    forty of them settle it."""
    two = ev.paired([1, 1], [0, 0])
    assert two.lo < 0 < two.hi == 1
    assert two.mdd is None
    assert two.p > 0.05
    forty = ev.paired([0] * 40, [1] * 40)
    assert forty.lo == -1
    assert -1 < forty.hi < -0.7
    assert forty.p < 0.001


def test_missing_shares_are_refused():
    for bad in ([], [0.5, float("nan")]):
        with pytest.raises(ValueError):
            ev.accuracy(bad)
    with pytest.raises(ValueError, match="not a number"):
        ev.paired([1, float("nan")], [0, 0])


GOOD = ("Ответ: 0,5", "correct")
HALF = ("Ответ: \\frac{1}{2}", "correct")  # the same value
BAD = ("Ответ: 7", "wrong")
NONE = ("", "unparsed")


def answered(*answers: tuple[str, str]) -> list[dict]:
    "Scored samples of one problem."
    rows = []
    for sample, (response, verdict) in enumerate(answers):
        row = dict(problem_id="p", model="m", mode="direct", sample=sample)
        rows.append(row | dict(response=response, verdict=verdict))
    return ev.with_votes(rows, "ru", "number")


def test_the_vote_of_a_problem():
    assert ev.majority(answered(BAD, GOOD, HALF)) == {"p": 1.0}  # two spellings, one vote
    assert ev.majority(answered(BAD, GOOD)) == {"p": 0.0}
    assert ev.majority(answered(GOOD, BAD)) == {"p": 1.0}
    assert ev.majority(answered(BAD, BAD, GOOD)) == {"p": 0.0}
    assert ev.majority(answered(NONE, NONE, GOOD)) == {"p": 1.0}
    assert ev.majority(answered(NONE)) == {"p": 0.0}
    assert ev.majority(answered(GOOD), mode="think") == {}


SAME = [  # two wrong answers, and whether they are one
    ("0,5", "\\frac{1}{2}", True),
    ("\\{1; 2\\}", "\\{2; 1\\}", True),
    ("\\sqrt{8}", "2\\sqrt{2}", True),
    ("x = 3", "3", True),
    ("(1; 2)", "(1;2)", True),
    ("60 км/ч", "60", True),
    ("0,5", "0,05", False),
    ("\\{1; 2\\}", "\\{1; 3\\}", False),
    ("\\sqrt{8}", "\\sqrt{2}", False),
    ("(1; 2)", "(2; 1)", False),
    ("3", "-3", False),
    ("2x", "2y", False),
]


@pytest.mark.parametrize("first,second,same", SAME)
def test_wrong_answers_vote_together_if_they_are_one(first, second, same):
    for one, two in ((first, second), (second, first)):
        rows = answered(
            ("Ответ: 7", "correct"), (f"Ответ: {one}", "wrong"), (f"Ответ: {two}", "wrong")
        )
        assert ev.majority(rows) == {"p": float(not same)}
        assert [row["vote"] for row in rows[1:]] == [one, one if same else two]


@pytest.mark.parametrize("kind,votes", [("letter", ["B", "B", "C"]), ("text", ["да", "да", "c"])])
def test_letters_and_words_vote_too(kind, votes):
    said = dict(letter=["B", "вариант B", "C"], text=["Да.", "да", "C"])[kind]
    rows = [dict(problem_id="p", sample=i, response=f"Ответ: {x}") for i, x in enumerate(said)]
    voted = ev.with_votes([row | dict(verdict="wrong") for row in rows], "ru", kind)
    assert [row["vote"] for row in voted] == votes


def test_the_figures_of_a_problem():
    (line,) = ev.score_table(answered(BAD, GOOD, HALF, NONE))
    assert line["avg_at_k"] == 0.5
    assert line["pass_at_k"] == 1
    assert line["maj_at_k"] == 1
    assert line["empty_pct"] == 25
    for figure in ev.FIGURES:
        low, high = line[f"{figure}_lo"], line[f"{figure}_hi"]
        assert low <= line[figure] <= high
        assert low < high


def test_samples_of_another_benchmark_are_refused():
    row = dict(
        key="k",
        model="m",
        mode="direct",
        problem_id="другая",
        sample=0,
        response="Ответ: 1",
        finished=True,
    )
    with pytest.raises(UserError, match="not in the benchmark"):
        ev.score_samples([row], toy_problems(2))


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    "What a sampler without a model was asked for."
    seen = []

    def generate(model, tok, prompts, think, max_new_tokens, temperature, n, seed, batch_size):
        seen.append(dict(think=think, seed=seed, prompts=len(prompts)))
        answers = []
        for place, _ in enumerate(prompts):  # a draw: the stream and the place in it
            answers.append([dict(text=f"Ответ: {seed}, место {place}", ids=[1], finished=True)])
        return answers

    def load_model(path):
        return SimpleNamespace(to=lambda where: None), None

    monkeypatch.setattr("tpro_nb.sft.generate_answers", generate)
    monkeypatch.setattr("tpro_nb.training.device", lambda: "cpu")
    monkeypatch.setattr("tpro_nb.training.load_model", load_model)
    return seen


def sample_five(folder, jobs: list[ev.SamplingJob]) -> dict:
    "Two samples of five problems by every job, into `log.jsonl`."
    write_jsonl(folder / "p.jsonl", toy_problems(5))
    return ev.sample_answers(
        [asdict(job) for job in jobs],
        str(folder / "p.jsonl"),
        str(folder / "log.jsonl"),
        k=2,
        temperature=0.6,
        batch_size=2,
        seed=10,
    )


def in_both_modes(folder, key: str = "a") -> dict:
    modes = ("think", "direct")
    return sample_five(folder, [ev.SamplingJob("m", "m", mode, 4, key + mode) for mode in modes])


def test_sampler_draws_anew_in_every_batch(calls, tmp_path):
    assert in_both_modes(tmp_path)["answers"] == 20
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert {call["think"] for call in calls} == {True, False}
    assert len({row["seed"] for row in rows}) == 2 * 3  # 2 samples × 3 batches
    thought = {row["response"] for row in rows if row["mode"] == "think"}
    assert len(thought) == 10  # no two answers share a draw


def test_a_killed_run_equals_an_unbroken_one(calls, tmp_path):
    def sorted_log() -> list[str]:
        return sorted(map(json.dumps, read_jsonl(log)))

    log = tmp_path / "log.jsonl"
    in_both_modes(tmp_path)
    full = sorted_log()
    lines = log.read_bytes().splitlines(keepends=True)
    for n in (1, 5, 12):  # killed in the middle of a line, inside a batch
        log.write_bytes(b"".join(lines[:n]) + lines[n][:9])
        assert in_both_modes(tmp_path)["answers"] == 20 - n
        assert sorted_log() == full
    calls.clear()
    assert in_both_modes(tmp_path)["answers"] == 0
    assert not calls


def test_a_server_answers_and_the_next_one_is_missed_when_its_turn_comes(answer_server, tmp_path):
    name, handler = answer_server
    path = str(toy("07_sft/model"))

    def ask(second: str) -> dict:
        servers = dict(a=name, b=second)
        jobs = []
        for model, mode in product(servers, ("think", "direct")):
            job = ev.SamplingJob(model, path, mode, 4, model + mode, servers[model])
            jobs.append(job)
        return sample_five(tmp_path, jobs)

    def questions() -> list[dict]:
        return [body for body in handler.seen if body["max_tokens"] == 4]

    with pytest.raises(UserError, match="servers http://127.0.0.1:9/v1 b: no answer"):
        ask("http://127.0.0.1:9/v1 b")
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert {row["model"] for row in rows} == {"a"}
    assert len(rows) == 20
    assert all(row["finished"] for row in rows)
    thoughts = {row["response"].split("Ответ")[0] for row in rows}
    assert thoughts == {"<think>2 + 3</think>", ""}
    assert len(questions()) == 20
    draws = set()
    for body in questions():
        draws.add((body["seed"], body["chat_template_kwargs"]["enable_thinking"]))
    assert len(draws) == 20
    assert ask(name)["answers"] == 20  # goes on with the second model alone,
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 40
    assert len(questions()) == 40  # and asks for it, though both servers call theirs by one name


def test_other_settings_are_told_apart(calls, tmp_path):
    in_both_modes(tmp_path)
    in_both_modes(tmp_path, key="b")
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 40
    problems = toy_problems(3)
    other = [{**problems[0], "question": "другой"}, *problems[1:]]

    def key(problems=problems, temperature=0.6):
        return ev.sample_key("hub/x", problems, "think", temperature=temperature)

    assert key() == key()
    assert key() != key(temperature=0.7)
    assert key() != key(problems=other)


def test_weights_changed_under_the_same_path(tmp_path):
    model = tmp_path / "m"
    model.mkdir()
    (model / "w").write_text("1")
    before = ev.model_digest(str(model))
    (model / "w").write_text("2")
    assert ev.model_digest(str(model)) != before


def test_repeated_and_missing_ids_are_refused():
    with pytest.raises(UserError, match="no problem"):
        ev.check_problems([])
    with pytest.raises(UserError, match="twice"):
        ev.check_problems(toy_problems(2) * 2)
    with pytest.raises(UserError, match="without problem_id"):
        ev.check_problems([{"question": "?"}])


def test_four_verdicts_stay_apart():
    (problem,) = toy_problems(1)
    answers = [
        (f"Ответ: {problem['verifiable_answer']}", True),
        ("Ответ: 999", True),
        ("", True),
        ("<think>так", True),
        ("Думаю", False),
    ]
    rows = []
    for sample, (response, finished) in enumerate(answers):
        row = dict(key="k", model="m", mode="direct", problem_id=problem["problem_id"])
        rows.append(row | dict(sample=sample, response=response, finished=finished))
    (line,) = ev.score_table(ev.score_samples(rows, [problem]))
    assert line["correct_pct"] == 20
    assert line["wrong_pct"] == 20
    assert line["unparsed_pct"] == 20
    assert line["truncated_pct"] == 40
    assert line["avg_at_k"] == 0.2
    assert line["pass_at_1"] == 1
    assert line["pass_at_k"] == 1
