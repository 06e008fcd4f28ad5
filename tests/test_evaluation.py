"Intervals, paired tests, and a sampler that loses and mixes nothing."
import json, sys, types
import numpy as np
import pytest
from tpro_nb import evaluation as ev
from tpro_nb.core import UserError, read_jsonl, toy, toy_problems, write_jsonl

def test_coverage_is_95_by_problem_and_less_by_answer():
    c = ev.coverage(sims=300)
    assert 92 <= c["by_problem"] <= 98 and c["by_answer"] < 88

def test_coverage_is_that_of_the_intervals_themselves(monkeypatch):
    monkeypatch.setattr(ev, "accuracy", lambda x, seed=0: (.4, .41, .42))                   # one that never holds the truth, 7/16
    assert ev.coverage(sims=20)["by_problem"] == 0

def test_accuracy_at_the_ends_has_width():
    one, half = ev.accuracy([1.0]*30), ev.accuracy([0, 1]*30)
    assert one[0] == one[2] == 1 and .85 < one[1] < .95
    assert half[1] < .5 < half[2]
    assert ev.accuracy([0.0]*30)[2] > .05
    alike = ev.accuracy([.5]*20)                                              # all alike between the ends: resampling would say (.5, .5, .5)
    assert alike[0] == .5 and alike[1] < .3 and alike[2] > .7

def test_paired_finds_a_real_difference_and_not_a_false_one():
    rng = np.random.default_rng(0)
    skill = rng.beta(1, 1, 200)
    a, b = rng.binomial(1, skill), rng.binomial(1, np.clip(skill*.4, 0, 1))
    big, none = ev.paired(a, b), ev.paired(rng.binomial(1, skill), rng.binomial(1, skill))
    assert big["p"] < .001 and big["lo"] > 0 and none["p"] > .01
    for x, y in (([1, 0, 1], [1, 0, 1]), ([1, 1, 1], [0, 0, 0])):                  # nothing varies: no noise to speak of
        assert ev.paired(x, y)["mdd"] is None
    few, many = ev.paired([1, 0, 1], [1, 0, 1]), ev.paired([1]*300, [1]*300)
    assert few["lo"] == -few["hi"] < -.6 and 0 < many["hi"] < .02 and few["p"] == 1      # that none of three differed proves little

def test_the_detectable_difference_is_detected_four_times_in_five():
    d = np.array([1, 0, 0, 0, -1]*20)                                         # variance known: 2/5 per problem, n = 100
    assert ev.paired(d, 0*d)["mdd"] == pytest.approx((1.959964 + .841621)*(40/99)**.5/10, rel=1e-5)
    rng = np.random.default_rng(1); noise = rng.choice([-1, 0, 0, 0, 1], (4000, 100))
    x = noise + ev.paired(d, 0*d)["mdd"]
    found = abs(x.mean(1)/(x.std(1, ddof=1)/10)) > 1.984                      # a t test of each simulated comparison
    assert .77 < found.mean() < .83

def test_problems_that_all_differ_alike_leave_an_interval():
    "Two problems, both right against both wrong: p is .5, so the interval must not exclude 0; forty of them settle it."
    two, forty = ev.paired([1, 1], [0, 0]), ev.paired([0]*40, [1]*40)
    assert two["lo"] < 0 < two["hi"] == 1 and two["mdd"] is None and two["p"] > .05
    assert forty["lo"] == -1 and -1 < forty["hi"] < -.7 and forty["p"] < .001
    for bad in ([], [.5, float("nan")]):
        with pytest.raises(ValueError): ev.accuracy(bad)
    with pytest.raises(ValueError, match="not a number"): ev.paired([1, float("nan")], [0, 0])

def test_the_vote_of_a_problem():
    def rows(*answers): return [dict(problem_id="p", model="m", mode="direct", sample=i, response=t, verdict=v) for i, (t, v) in enumerate(answers)]
    good, half, bad, none = ("Ответ: 0,5", "correct"), ("Ответ: \\frac{1}{2}", "correct"), ("Ответ: 7", "wrong"), ("", "unparsed")
    assert ev.majority(rows(bad, good, half)) == {"p": 1.0}                   # one value, two spellings, one vote
    assert ev.majority(rows(bad, good)) == {"p": 0.0} and ev.majority(rows(good, bad)) == {"p": 1.0}
    assert ev.majority(rows(bad, bad, good)) == {"p": 0.0} and ev.majority(rows(none, none, good)) == {"p": 1.0}
    assert ev.majority(rows(none)) == {"p": 0.0} and ev.majority(rows(good), mode="think") == {}
    (t,) = ev.table(rows(bad, good, half, none))
    assert (t["avg_at_k"], t["pass_at_k"], t["maj_at_k"], t["empty_pct"]) == (.5, 1, 1, 25)
    assert all(t[f"{f}_lo"] <= t[f] <= t[f"{f}_hi"] and t[f"{f}_lo"] < t[f"{f}_hi"] for f in ev.FIGURES)

def test_samples_of_another_benchmark_are_refused():
    row = dict(key="k", model="m", mode="direct", problem_id="другая", sample=0, response="Ответ: 1", finished=True)
    with pytest.raises(UserError, match="not in the benchmark"): ev.score([row], toy_problems(2))

@pytest.fixture
def fake(monkeypatch):
    calls = []
    def generate(model, tok, prompts, think, max_new_tokens, temperature, n, seed, batch_size):
        calls.append((None, think, seed, len(prompts)))
        return [[dict(text=f"Ответ: {seed}, место {i}", finished=True)] for i, _ in enumerate(prompts)]      # a draw: the stream and the place in it
    from tpro_nb.sft import draw_seed
    monkeypatch.setitem(sys.modules, "tpro_nb.sft", types.SimpleNamespace(generate=generate, draw_seed=draw_seed))
    monkeypatch.setitem(sys.modules, "tpro_nb.base_model", types.SimpleNamespace(device=lambda: "cpu", load_model=lambda p: (types.SimpleNamespace(to=lambda d: None), None)))
    import tpro_nb
    monkeypatch.setattr(tpro_nb, "sft", sys.modules["tpro_nb.sft"], raising=False)
    monkeypatch.setattr(tpro_nb, "base_model", sys.modules["tpro_nb.base_model"], raising=False)
    return calls

def go(tmp_path, key="a", k=2):
    write_jsonl(tmp_path/"p.jsonl", toy_problems(5))
    jobs = [dict(name="m", path="m", mode=m, key=key + m, max_new_tokens=4) for m in ("think", "direct")]
    return ev.sample(jobs, str(tmp_path/"p.jsonl"), str(tmp_path/"log.jsonl"), k=k, temperature=.6, batch_size=2, seed=10)

def test_sampler_draws_anew_in_every_batch_and_a_killed_run_equals_an_unbroken_one(fake, tmp_path):
    assert go(tmp_path)["answers"] == 20
    full = read_jsonl(tmp_path/"log.jsonl")
    assert {c[1] for c in fake} == {True, False} and len({r["seed"] for r in full}) == 2*3                # 2 samples × 3 batches
    assert len({r["response"] for r in full if r["mode"] == "think"}) == 10                              # no two answers share a draw
    lines = (tmp_path/"log.jsonl").read_bytes().splitlines(keepends=True)
    for n in (1, 5, 12):                                                # killed in the middle of a line, inside a batch
        (tmp_path/"log.jsonl").write_bytes(b"".join(lines[:n]) + lines[n][:9])
        assert go(tmp_path)["answers"] == 20 - n
        assert sorted(map(json.dumps, read_jsonl(tmp_path/"log.jsonl"))) == sorted(map(json.dumps, full))
    fake.clear(); assert go(tmp_path)["answers"] == 0 and not fake

def test_a_server_answers_and_the_next_one_is_missed_when_its_turn_comes(answer_server, tmp_path):
    name, H = answer_server
    write_jsonl(tmp_path/"p.jsonl", toy_problems(5))
    def ask(second):
        jobs = [dict(name=n, path=str(toy("07_sft/model")), server=s, mode=m, key=n + m, max_new_tokens=4) for n, s in (("a", name), ("b", second)) for m in ("think", "direct")]
        return ev.sample(jobs, str(tmp_path/"p.jsonl"), str(tmp_path/"log.jsonl"), k=2, temperature=.6, batch_size=2, seed=10)
    with pytest.raises(UserError, match="servers http://127.0.0.1:9/v1 b: no answer"): ask("http://127.0.0.1:9/v1 b")
    rows = read_jsonl(tmp_path/"log.jsonl")
    assert {r["model"] for r in rows} == {"a"} and len(rows) == 20 and all(r["finished"] for r in rows)
    assert {r["response"].split("Ответ")[0] for r in rows} == {"<think>2 + 3</think>", ""}
    asked = [b for b in H.seen if b["max_tokens"] == 4]
    assert len(asked) == 20 and len({(b["seed"], b["chat_template_kwargs"]["enable_thinking"]) for b in asked}) == 20
    assert ask(name)["answers"] == 20 and len(read_jsonl(tmp_path/"log.jsonl")) == 40                   # goes on with the second model alone,
    assert sum(b["max_tokens"] == 4 for b in H.seen) == 40                                              # and asks for it, though both servers call theirs by one name

def test_other_settings_are_told_apart(fake, tmp_path):
    go(tmp_path); go(tmp_path, key="b")
    assert len(read_jsonl(tmp_path/"log.jsonl")) == 40
    ps = toy_problems(3)
    key = lambda **w: ev.sample_key("hub/x", w.pop("ps", ps), "think", **({"temperature": .6} | w))
    assert key() == key() != key(temperature=.7) and key(ps=[{**ps[0], "question": "другой"}, *ps[1:]]) != key()

def test_weights_changed_under_the_same_path(tmp_path):
    (tmp_path/"m").mkdir(); (tmp_path/"m"/"w").write_text("1"); a = ev.model_digest(str(tmp_path/"m"))
    (tmp_path/"m"/"w").write_text("2")
    assert ev.model_digest(str(tmp_path/"m")) != a

def test_repeated_and_missing_ids_are_refused():
    with pytest.raises(UserError, match="no problem"): ev.check_problems([])
    with pytest.raises(UserError, match="twice"): ev.check_problems(toy_problems(2)*2)
    with pytest.raises(UserError, match="without problem_id"): ev.check_problems([{"question": "?"}])

def test_four_verdicts_stay_apart():
    ps = toy_problems(1)
    answers = [(f"Ответ: {ps[0]['verifiable_answer']}", True), ("Ответ: 999", True), ("", True), ("<think>так", True), ("Думаю", False)]
    rows = [dict(key="k", model="m", mode="direct", problem_id=ps[0]["problem_id"], sample=i, response=t, finished=f) for i, (t, f) in enumerate(answers)]
    (t,) = ev.table(ev.score(rows, ps))
    assert [t[f"{v}_pct"] for v in ("correct", "wrong", "unparsed", "truncated")] == [20, 20, 20, 40]
    assert t["avg_at_k"] == .2 and t["pass_at_1"] == 1 and t["pass_at_k"] == 1
