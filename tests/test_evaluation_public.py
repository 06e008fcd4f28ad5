"Public benchmarks: files that lie, endpoints that die, folders of two runs; lm-eval where it is installed."
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
import pytest
from tpro_nb import public_benchmarks as B
from tpro_nb.core import UserError, read_json, read_jsonl, toy_model, write_jsonl

SETS, MODELS = B.registry(), B.registry("models")
MATH, GPQA = SETS["ruMATH-500"], SETS["ruGPQA"]
ROWS = [dict(unique_id=f"p{i}", problem=f"Сколько будет {i} + 1?", answer=str(i + 1)) for i in range(6)]
CHOICE = [{"Record ID": f"r{i}", "Question": f"Сколько будет {i} + 1?", "Correct Answer": str(i + 1), **{f"Incorrect Answer {j}": str(90 + j) for j in (1, 2, 3)}} for i in range(6)]

def file(tmp_path, rows, name="set.jsonl"): write_jsonl(tmp_path/name, rows); return str(tmp_path/name)
def math(tmp_path): return B.load_benchmark(MATH, file(tmp_path, ROWS), rows=6)

def test_the_registry_is_complete():
    asked = "T-Math ruAIME-24 ruAIME-25 ruMATH-500 ruGPQA ruLCB ruMMLU-Pro MERA Arena-Hard-Ru AIME-24 AIME-25 MATH-500 GPQA LCB"
    assert set(asked.split()) <= set(SETS)
    for b in SETS.values():
        assert b.source and b.licence and b.metric and b.prompt in B.prompts() and B.paper_figure(b, MODELS["T-pro-it-2.0"]) is not None, b.id
    assert B.paper_figure(SETS["T-Math"], MODELS["T-pro-it-2.0"]) == .541 and B.paper_figure(SETS["GPQA"], MODELS["Qwen3-32B"]) == .668
    assert B.paper_figure(SETS["T-Math"], MODELS["Qwen3-0.6B"]) is None and B.paper_figure(SETS["ruMMLU-Pro"], MODELS["DeepSeek-R1"]) is None
    assert all(B.paper_figure(SETS["ruGPQA"], m) for m in MODELS.values() if m.paper)      # every name is found in its table

def test_a_registry_of_ones_own(tmp_path):
    (tmp_path/"b.yaml").write_text("benchmarks:\n- {id: x, language: ru}\n")
    with pytest.raises(UserError, match="x: "): B.registry(path=str(tmp_path/"b.yaml"))

@pytest.mark.parametrize("change,says", [
    (lambda r: [*r, r[0]], "occurs twice"), (lambda r: r[:5], "5 rows, and ruMATH-500 has 6"), (lambda r: [{**r[0], "answer": ""}, *r[1:]], "row 0: answer missing or empty"),
    (lambda r: [{**r[0], "unique_id": None}, *r[1:]], "unique_id missing"), (lambda r: [*r[:5], {**r[0], "unique_id": "z"}], "under two ids"), (lambda r: [dict(вопрос="?", ответ="1")], "The row has вопрос, ответ")])
def test_files_that_lie_are_refused(tmp_path, change, says):
    with pytest.raises(UserError, match=says): B.load_benchmark(MATH.model_copy(update=dict(rows=6)), file(tmp_path, change(ROWS)))

def test_sets_that_cannot_be_graded_say_so(tmp_path):
    with pytest.raises(UserError, match="LCB: needs a sandbox"): B.load_benchmark(SETS["LCB"], file(tmp_path, ROWS))
    with pytest.raises(UserError, match="not the form of Arena-Hard"): B.load_benchmark(SETS["Arena-Hard-Ru"], file(tmp_path, ROWS))
    for name in ("ruMATH-500", "MERA", "Arena-Hard-Ru"):
        with pytest.raises(UserError, match="no questions"): B.load_benchmark(SETS[name], file(tmp_path, []), rows=0)
    for bad in (dict(inputs={}), dict(meta=dict(id=None)), dict(meta=dict(id=" ")), dict(instruction=""), dict(inputs=None)):
        with pytest.raises(UserError, match="not MERA's form"): B.load_mera(file(tmp_path, [dict(instruction="{text}", inputs=dict(text="?"), meta=dict(id=1)) | bad]))
    for bad in (dict(uid=None), dict(uid=""), dict(prompt=None), dict(prompt="  ")):
        with pytest.raises(UserError, match="not the form of Arena-Hard"): B.load_arena(file(tmp_path, [dict(uid="a", prompt="?") | bad]))

def test_options_are_shuffled_the_same_way_each_time(tmp_path):
    a, b = (B.load_benchmark(GPQA, file(tmp_path, CHOICE), rows=6) for _ in range(2))
    assert a == b and len({p["verifiable_answer"] for p in a}) > 1
    assert [p["options"][B.LETTERS.index(p["verifiable_answer"])] for p in a] == [r["Correct Answer"] for r in CHOICE]
    pro = [dict(question_id=1, question="?", options=["да", "нет"], answer="B")]
    assert B.load_benchmark(SETS["ruMMLU-Pro"], file(tmp_path, pro))[0]["verifiable_answer"] == "B"
    with pytest.raises(UserError, match="none of the 2 options"): B.load_benchmark(SETS["ruMMLU-Pro"], file(tmp_path, [{**pro[0], "answer": "C"}]))

class Fake:
    "An endpoint with a script: `say(body, n)` gives (status, text, finish_reason)."
    def __init__(self, say): self.say, self.asked = say, []
    def __enter__(self):
        fake = self
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"]))); fake.asked.append(body)
                status, text, why = fake.say(body, len(fake.asked))
                data = json.dumps(dict(choices=[dict(index=0, message=dict(role="assistant", content=text), finish_reason=why)], usage=dict(completion_tokens=3))).encode()
                self.send_response(status); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)
            def log_message(self, *a): pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler); threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.name = f"http://127.0.0.1:{self.server.server_port}/v1 toy"
        return self
    def __exit__(self, *a): self.server.shutdown(); self.server.server_close()

FAST = dict(per_s=1e4, timeout_s=5, retries=1, wait_s=.01, workers=1)
def right(body): return str(int(body["messages"][0]["content"].split("будет ")[1].split(" +")[0]) + 1)
def good(body, n): return 200, f"<think>раз {body['seed']}</think>\\boxed{{{right(body)}}}", "stop"

def test_asks_with_distinct_seeds_keeps_raw_answers_and_scores_offline(tmp_path):
    with Fake(good) as f:
        said = B.ask_endpoint(MATH, math(tmp_path), tmp_path/"run", f.name, k=2, seed=7, mode="direct", **FAST)
        assert said == dict(asked=12, answered=12, why={}, distinct_pct=100)
        assert [b["seed"] for b in f.asked] == [7]*6 + [8]*6 and not f.asked[0]["chat_template_kwargs"]["enable_thinking"]
        B.ask_endpoint(MATH, math(tmp_path), tmp_path/"run", f.name, k=3, seed=7, mode="direct", **FAST)
        assert len(f.asked) == 18                                  # a third pass asks for itself alone
    raw = read_jsonl(tmp_path/"run"/"answers.jsonl")
    assert len(raw) == 18 and raw[0][1]["usage"] == dict(completion_tokens=3)
    line, rows = B.rescore(MATH, math(tmp_path), tmp_path/"run")
    assert (line["avg_at_k"], line["k"], line["answers"]) == (1, 3, 18) and {r["tokens"] for r in rows} == {3}

def test_killed_in_the_middle_continues(tmp_path):
    with Fake(good) as f:
        B.ask_endpoint(MATH, math(tmp_path), tmp_path/"a", f.name, k=2, **FAST)
        (tmp_path/"b").mkdir(); (tmp_path/"b"/"run.json").write_bytes((tmp_path/"a"/"run.json").read_bytes())
        data = (tmp_path/"a"/"answers.jsonl").read_bytes()
        cut = data[:len(data)//2]; (tmp_path/"b"/"answers.jsonl").write_bytes(cut)          # half a line at the end
        before = len(f.asked)
        B.ask_endpoint(MATH, math(tmp_path), tmp_path/"b", f.name, k=2, **FAST)
        assert len(f.asked) - before == 12 - cut.count(b"\n") < 12
    assert (tmp_path/"a"/"samples.jsonl").read_bytes() == (tmp_path/"b"/"samples.jsonl").read_bytes()

def test_an_endpoint_that_fails_half_way_is_not_averaged(tmp_path):
    def dies(body, n): return (503, "", "stop") if body["seed"] == 1 and "5 +" in body["messages"][0]["content"] else good(body, n)
    with Fake(dies) as f:
        said = B.ask_endpoint(MATH, math(tmp_path), tmp_path/"run", f.name, k=2, **FAST)
        assert said["answered"] == 11 and said["why"] == {"HTTP 503": 1}
        with pytest.raises(UserError, match="11 of 12"): B.rescore(MATH, math(tmp_path), tmp_path/"run")
        assert B.rescore(MATH, math(tmp_path), tmp_path/"run", k=1)[0]["answers"] == 6      # the first pass is whole
        f.say, before = good, len(f.asked)
        assert B.ask_endpoint(MATH, math(tmp_path), tmp_path/"run", f.name, k=2, **FAST)["answered"] == 12 and len(f.asked) == before + 1
    assert B.rescore(MATH, math(tmp_path), tmp_path/"run")[0]["avg_at_k"] == 1

def test_four_ends_stay_apart_and_a_deaf_seed_is_seen(tmp_path):
    ends = [("<think>а</think>\\boxed{1}", "stop"), ("\\boxed{99}", "stop"), ("", "stop"), ("<think>без конца \\boxed{4}", "length"), ("не знаю", "stop"), ("", "length")]
    with Fake(lambda body, n: (200, *ends[int(right(body)) - 1])) as f: said = B.ask_endpoint(MATH, math(tmp_path), tmp_path/"run", f.name, k=2, **FAST)
    line, rows = B.rescore(MATH, math(tmp_path), tmp_path/"run")
    assert [r["verdict"] for r in rows][:6] == ["correct", "wrong", "unparsed", "truncated", "unparsed", "truncated"]
    assert line["empty_pct"] == pytest.approx(100/3) and said["distinct_pct"] == 0

def test_nonsense_is_no_answer(tmp_path):
    with Fake(lambda body, n: (200, "\\boxed{1}", None)) as f: said = B.ask_endpoint(MATH, math(tmp_path)[:2], tmp_path/"run", f.name, k=1, **FAST)
    assert said["answered"] == 0 and all("finish_reason" in w for w in said["why"])

def test_a_thought_that_never_closes_is_truncated_even_where_the_template_opened_it():
    r = B.read_reply(dict(choices=[dict(message=dict(content="дальше \\boxed{4}"), finish_reason="length")]), opens=True)
    from tpro_nb.tmath import grade
    assert grade(r["response"], "4", r["finished"]) == "truncated"
    with pytest.raises(UserError, match="no direct mode"): B.ask_endpoint(MATH, [], "nowhere", "http://x m", MODELS["DeepSeek-R1"], mode="direct")

def test_two_runs_never_share_a_folder(tmp_path):
    ps = math(tmp_path)
    with Fake(good) as f:
        go = lambda ps=ps, name=f.name, **kw: B.ask_endpoint(MATH, ps, tmp_path/"run", name, **(dict(k=1) | FAST | kw))
        go()
        for kw, says in ((dict(temperature=.1), "temperature"), (dict(mode="direct"), "mode"), (dict(seed=5), "seed"), (dict(name=f.name.replace("toy", "other")), "other now"), (dict(name=f.name.replace("/v1", "/v2")), "/v2 now")):
            with pytest.raises(UserError, match=says): go(**kw)
        with pytest.raises(UserError, match="has changed"): go([{**ps[0], "verifiable_answer": "7"}, *ps[1:]])
    with pytest.raises(UserError, match="other questions"): B.rescore(MATH, [{**ps[0], "question": "другой"}, *ps[1:]], tmp_path/"run")
    rows = read_jsonl(tmp_path/"run"/"samples.jsonl")
    write_jsonl(tmp_path/"run"/"samples.jsonl", [*rows[:5], {**rows[5], "key": "другой"}])
    with pytest.raises(UserError, match="mixes 2 runs"): B.rescore(MATH, ps, tmp_path/"run")
    write_jsonl(tmp_path/"run"/"samples.jsonl", [*rows, rows[0]])
    with pytest.raises(UserError, match="there twice"): B.rescore(MATH, ps, tmp_path/"run")
    write_jsonl(tmp_path/"run"/"samples.jsonl", [*rows[:5], {**rows[5], "problem_id": "чужой"}])
    with pytest.raises(UserError, match="which was not asked"): B.rescore(MATH, ps, tmp_path/"run")
    write_jsonl(tmp_path/"run"/"samples.jsonl", [dict(x=1)])
    with pytest.raises(UserError, match="row 0: not a sample"): B.rescore(MATH, ps, tmp_path/"run")
    (tmp_path/"run"/"run.json").unlink()
    with pytest.raises(UserError, match="nobody knows"): B.claim_folder(tmp_path/"run", dict(questions="x"))

def test_what_a_filter_swallowed_is_an_empty_answer_and_does_not_block_the_score(tmp_path):
    with Fake(lambda body, n: (200, None, "content_filter") if right(body) == "3" else good(body, n)) as f: B.ask_endpoint(MATH, math(tmp_path), tmp_path/"run", f.name, k=1, **FAST)
    line, _ = B.rescore(MATH, math(tmp_path), tmp_path/"run")
    assert (line["correct_pct"], line["unparsed_pct"], line["empty_pct"]) == pytest.approx((500/6, 100/6, 100/6))

def test_two_runs_are_paired_by_problem(tmp_path):
    with Fake(good) as f, Fake(lambda body, n: (200, "\\boxed{2}", "stop")) as g:
        B.ask_endpoint(MATH, math(tmp_path), tmp_path/"a", f.name, k=1, **FAST); B.ask_endpoint(MATH, math(tmp_path), tmp_path/"b", g.name, k=1, **FAST)
    d = B.against(MATH, math(tmp_path), tmp_path/"a", tmp_path/"b")
    assert d["diff"] == pytest.approx(500/6) and d["n"] == 6 and d["lo"] < d["diff"] and d["p"] < .1 and d["mdd"] > 0
    same = B.against(MATH, math(tmp_path), tmp_path/"a", tmp_path/"a")
    assert (same["diff"], same["p"], same["mdd"]) == (0, 1, None)

MERA_ROWS = [dict(instruction="Сколько будет {n} + 1? Ответь числом.", inputs=dict(n=str(i)), outputs="", meta=dict(id=i + 10)) for i in range(3)]

def test_mera_closed_answers_become_its_submission_and_open_ones_a_score(tmp_path, capsys):
    with Fake(lambda body, n: (200, f"<think>так</think>{right(body)}", "stop")) as f:
        assert B.main(["MERA", file(tmp_path, MERA_ROWS, "BPS.jsonl"), str(tmp_path/"run"), "--endpoint", f.name, "--workers", "1"]) == 0
        assert read_json(tmp_path/"run"/"BPS.json") == dict(data=dict(test=[dict(outputs=str(i + 1), meta=dict(id=i + 10)) for i in range(3)]))
        B.main(["MERA", file(tmp_path, [r | dict(outputs=str(i + 1 - (i == 2))) for i, r in enumerate(MERA_ROWS)], "open.jsonl"), str(tmp_path/"open"), "--endpoint", f.name])
    assert "avg@1 0.667" in capsys.readouterr().out
    ps = B.load_mera(str(tmp_path/"BPS.jsonl"))
    with pytest.raises(UserError, match="closed"): B.rescore(SETS["MERA"], ps, tmp_path/"run")
    rows = read_jsonl(tmp_path/"run"/"samples.jsonl"); write_jsonl(tmp_path/"run"/"samples.jsonl", rows[:2])
    with pytest.raises(UserError, match="1 of 3 questions have no answer"): B.submission(ps, tmp_path/"run", "BPS")

ARENA = [dict(question_id=f"q{i}", turns=[dict(content=f"Сколько будет {i} + 1? Объясни.")]) for i in range(5)]

def test_a_judge_is_asked_in_both_orders_and_only_for_what_is_missing(tmp_path, capsys):
    theirs = file(tmp_path, [dict(uid=f"q{i}", answer="<think>тайна</think>не знаю") for i in range(5)], "base.jsonl")
    def fair(body, n):
        text = body["messages"][0]["content"]; assert "<think>" not in text and body["temperature"] == 0
        return (500, "", "stop") if n == 7 and broken else (200, "Думаю: " + ("[[A>>B]]" if text.index("Подробно") < text.index("не знаю") else "[[B>>A]]"), "stop")
    with Fake(lambda body, n: (200, "<think>ход</think>Подробно: столько-то", "stop")) as f, Fake(fair) as g:
        args = ["Arena-Hard-Ru", file(tmp_path, ARENA, "arena.jsonl"), str(tmp_path/"run"), "--rows", "5", "--endpoint", f.name, "--workers", "1"]
        with pytest.raises(UserError, match="is judged"): B.main(args)
        broken, ps, net = True, B.load_arena(str(tmp_path/"arena.jsonl")), FAST | dict(retries=0)
        with pytest.raises(UserError, match="1 of 10 judgements are missing"): B.judge(ps, tmp_path/"run", theirs, g.name, **net)
        broken = False
        assert B.main([*args, "--baseline", theirs, "--judge", g.name]) == 0 and len(g.asked) == 11 and len(f.asked) == 5
        got = read_json(tmp_path/"run"/"score.json")
        assert got["win_pct"] == 100 and got["win_pct_lo"] < 60 and got["first_place_pct"] == 50 and "wins 100.0 %" in capsys.readouterr().out
        lost = file(tmp_path, [dict(uid="q0", answer="да")], "lost.jsonl")
        with pytest.raises(UserError, match="no answer to 4 questions"): B.judge(ps, tmp_path/"run", lost, g.name, **net)

@pytest.mark.parametrize("said", ["", "A", "[[A>C]]", "[[A>B]] [[B>A]]", "<think>[[A>B]]"])
def test_a_judge_that_does_not_decide_gives_no_verdict(said):
    with pytest.raises(ValueError, match="no single verdict"): B.read_judgement(dict(choices=[dict(message=dict(content=said), finish_reason="stop")]))

@pytest.mark.parametrize("said,verdict", [("Ответ: вариант B", "correct"), ("Ответ: В", "correct"), ("\\boxed{(B)}", "correct"), ("\\boxed{B) 17}", "correct"), ("Ответ: B.", "correct"), ("Ответ: A", "wrong"), ("Ответ: E", "unparsed"), ("Ответ: A, B", "unparsed"), ("Ответ: Большой", "unparsed"), ("Думаю, B", "unparsed")])
def test_letters(said, verdict): assert B.grade_letter(said, "B", 4) == verdict

@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "The embedded server on a toy; it has a draft, so plain decoding is asked by the name `toy-plain`."
    pytest.importorskip("fastapi"); pytest.importorskip("uvicorn")
    from tpro_nb import server as S
    from tpro_nb.eagle_draft import random_draft
    d = tmp_path_factory.mktemp("served")
    toy_model(d/"target", tie_word_embeddings=False, initializer_range=.2); random_draft(d/"draft", d/"target", hot=list(range(40, 45)))
    with S.serving(S.Service(d/"target", d/"draft", name="toy", tree=(2, 2, 4), dtype="float32", context=256, slots=2, queue=16)) as url: yield f"{url}/v1"

def test_the_embedded_server_answers_and_speculation_changes_no_score(served, tmp_path):
    lines = []
    for name in ("toy", "toy-plain"):
        said = B.ask_endpoint(MATH, math(tmp_path), tmp_path/name, f"{served} {name}", mode="direct", k=1, temperature=0, max_tokens=12, top_p=1, **FAST | dict(timeout_s=60))
        assert said["answered"] == 6, said
        lines.append([r["response"] for r in read_jsonl(tmp_path/name/"samples.jsonl")])
        assert B.rescore(MATH, math(tmp_path), tmp_path/name)[0]["answers"] == 6
    assert lines[0] == lines[1] and any(lines[0])

def test_a_folder_in_process(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(B, "launch", lambda target, cfg, work: seen.update(cfg, target=target))
    toy = tmp_path/"m"; toy_model(toy, hidden=16, layers=1)
    B.ask_folder(MATH, math(tmp_path), tmp_path/"run", str(toy), "toy", k=2, max_tokens=4)
    assert seen["target"] == "tpro_nb.evaluation:sample" and seen["k"] == 2 and len(read_jsonl(seen["problems"])) == 6
    toy_model(toy, hidden=16, layers=1, seed=1)
    with pytest.raises(UserError, match="weights"): B.ask_folder(MATH, math(tmp_path), tmp_path/"run", str(toy), "toy", k=2, max_tokens=4)

def test_command_line(tmp_path, capsys):
    assert B.main(["--list"]) == 0 and "t-tech/T-math" in capsys.readouterr().out
    with pytest.raises(UserError, match="--list"): B.main([])
    with Fake(good) as f: assert B.main(["ruMATH-500", file(tmp_path, ROWS), str(tmp_path/"run"), "--rows", "6", "--endpoint", f.name, "--model", "T-pro-it-2.0", "--workers", "2"]) == 0
    assert "avg@1 1.000" in (out := capsys.readouterr().out) and "paper 0.94" in out and read_json(tmp_path/"run"/"score.json")["k"] == 1
    with pytest.raises(UserError, match="not registered"): B.main(["ruX", "f", "o"])

def test_command_line_pairs_two_runs_and_takes_a_folder(tmp_path, capsys, monkeypatch):
    rows = file(tmp_path, ROWS)
    with Fake(good) as f, Fake(lambda body, n: (200, "\\boxed{2}", "stop")) as g:
        assert B.main(["ruMATH-500", rows, str(tmp_path/"a"), "--rows", "6", "--endpoint", g.name, "--workers", "1"]) == 0
        assert B.main(["ruMATH-500", rows, str(tmp_path/"b"), "--rows", "6", "--endpoint", f.name, "--workers", "1", "--against", str(tmp_path/"a")]) == 0
    assert "+83.3 points" in capsys.readouterr().out and read_json(tmp_path/"b"/"against.json")["other"] == str(tmp_path/"a")
    seen = {}
    monkeypatch.setattr(B, "ask_folder", lambda b, problems, out, path, name, **how: seen.update(path=path, name=name)); monkeypatch.setattr(B, "finish", lambda *a: None)
    assert B.main(["ruMATH-500", rows, str(tmp_path/"c"), "--rows", "6", "--path", "models/nano"]) == 0 and seen == dict(path="models/nano", name="nano")
    with pytest.raises(UserError, match="--endpoint"): B.main(["ruMATH-500", rows, str(tmp_path/"d"), "--rows", "6"])
    with pytest.raises(UserError, match="--path"): B.main(["ruMATH-500", rows, str(tmp_path/"d"), "--rows", "6", "--endpoint", "http://127.0.0.1:9/v1 m", "--lm-eval", "choice"])
    monkeypatch.setattr(B, "lm_eval", lambda tasks, folder, model: {tasks[0]: dict(acc=(.5, .1, .9))})
    assert B.main(["ruGPQA", file(tmp_path, CHOICE, "choice.jsonl"), str(tmp_path/"e"), "--rows", str(len(CHOICE)), "--path", "models/nano", "--lm-eval", "choice"]) == 0
    assert "acc 0.500 [0.100, 0.900]" in capsys.readouterr().out and read_json(tmp_path/"e"/"score.json") == dict(acc=[.5, .1, .9])
    before = read_json(tmp_path/"a"/"score.json")
    with pytest.raises(UserError, match="holds another run"): B.main(["ruMATH-500", rows, str(tmp_path/"a"), "--rows", "6", "--path", "models/nano", "--lm-eval", "generate"])
    assert read_json(tmp_path/"a"/"score.json") == before and not list((tmp_path/"a").glob("*.yaml"))

def test_arena_needs_both_orders_and_takes_length_out():
    rng = np.random.default_rng(3)
    d = rng.integers(-200, 500, 150).tolist()
    def rows(judge): return [dict(prompt_id=str(i), order=o, verdict=judge(o, x), model_chars=900 + x, baseline_chars=900) for i, x in enumerate(d) for o in ("model_first", "baseline_first")]
    long = B.arena(rows(lambda o, x: "A>B" if (rng.random() < 1/(1 + np.exp(-x/80))) == (o == "model_first") else "B>A"), resamples=60)
    better = B.arena(rows(lambda o, x: "A>>B" if (rng.random() < .8) == (o == "model_first") else "B>A"), resamples=60)
    assert long["win_pct_lo"] > 55 and long["lc_win_pct_lo"] < 50 < long["lc_win_pct_hi"] and better["lc_win_pct_lo"] > 70
    assert B.arena(rows(lambda o, x: "A=B"), resamples=5)["win_pct"] == 50 and B.arena(rows(lambda o, x: "A>B" if o == "model_first" else "B>A"), resamples=5)["win_pct_lo"] < 100
    with pytest.raises(UserError, match="lack one"): B.arena(rows(lambda o, x: "A>B")[:-1])
    with pytest.raises(UserError, match="twice"): B.arena(rows(lambda o, x: "A>B")*2)
    with pytest.raises(UserError, match="none of"): B.arena(rows(lambda o, x: "оба хороши"))

def test_lm_eval_is_asked_for_politely(tmp_path):
    try: import lm_eval
    except ImportError:
        with pytest.raises(UserError, match="eval"): B.lm_eval(["x"], str(tmp_path), "m")

@pytest.mark.parametrize("gpu,device,dtype", [(True, "cuda", "auto"), (False, "cpu", "float32")])
def test_lm_eval_goes_where_the_card_is(monkeypatch, tmp_path, gpu, device, dtype):
    import sys, torch
    from types import SimpleNamespace
    seen = {}
    def evaluate(**kw): seen.update(kw); return dict(samples=dict(x=[dict(metrics=["acc"], acc=1., doc={}), dict(metrics=["acc"], acc=0., doc={})]))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=evaluate)); monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=lambda **kw: None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert B.lm_eval(["x"], str(tmp_path), "models/nano")["x"]["acc"][0] == .5
    assert (seen["device"], seen["model_args"]) == (device, dict(pretrained="models/nano", dtype=dtype))

def test_lm_eval_by_likelihood_and_over_the_server(served, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1"); monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path/"cache"))
    ps = B.load_benchmark(GPQA, file(tmp_path, CHOICE), rows=6)
    toy_model(tmp_path/"m")
    choice = B.lm_eval_task(GPQA, ps, tmp_path/"tasks")
    got = B.lm_eval([choice], tmp_path/"tasks", str(tmp_path/"m"), limit=4)[choice]
    assert set(got) == {"acc", "acc_norm"} and all(lo <= m <= hi for m, lo, hi in got.values())
    ask = B.lm_eval_task(GPQA, ps, tmp_path/"tasks", "generate", max_tokens=12)
    assert set(B.lm_eval([ask], tmp_path/"tasks", f"{served} toy", limit=2)[ask]) == {"correct"}

def test_a_free_answer_is_graded_as_everywhere(tmp_path):
    "exact_match of a whole reply is 0 for every model; a right box, a right number spelt otherwise, and a wrong thought before a right answer count."
    row = lambda said, answer, options=(), family="math": dict(doc=dict(verifiable_answer=answer, options=list(options), family=family), resps=[[said]])
    assert B.graded(row("<think>\\boxed{A}?</think>Шаги. \\boxed{B}", "B", "1234")) and not B.graded(row("\\boxed{C}", "B", "1234")) and not B.graded(row("<think>\\boxed{B}", "B", "1234"))
    assert B.graded(row("Ответ: 0,5", "\\frac{1}{2}")) and B.graded(row("да.", "Да", family="MERA"))

def test_lm_eval_scores_a_right_answer_as_right(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1"); monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path/"cache"))
    for b, ps in ((GPQA, B.load_benchmark(GPQA, file(tmp_path, CHOICE), rows=6)), (MATH, math(tmp_path))):
        key = {p["question"]: p["verifiable_answer"] for p in ps}; ask = B.lm_eval_task(b, ps, tmp_path/"tasks", "generate", max_tokens=12)
        for wrong in (0, 6):
            def say(body, n): return 200, f"<think>Сперва \\boxed{{Z}}.</think>Шаги.\n\\boxed{{{'Z' if n <= wrong else key[body['messages'][-1]['content'].strip()]}}}", "stop"
            with Fake(say) as f: assert B.lm_eval([ask], tmp_path/"tasks", f.name)[ask]["correct"][0] == (not wrong)
