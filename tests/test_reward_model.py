"Reward model: bracket algebra, judges, pairs, pooling, exact best-of-n, calibration, and the trainer with its resume."
import itertools, json, math, random, shutil, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from tpro_nb import core, data, reward_model as R

@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_pair_count_and_truth(n):
    strength = random.Random(n).sample(range(1000), n)
    matches, pairs = R.knockout(n, lambda a, b: 1 if strength[a] > strength[b] else -1)
    assert len(matches) == n - 1 and len(pairs) == n//2*int(math.log2(n)) == len(set(pairs))
    assert all(strength[w] > strength[l] for w, l in pairs)
    edges = {(m["winner"], m["a"] + m["b"] - m["winner"]) for m in matches}      # closure: nothing more, nothing less
    closed = set(edges)
    while new := {(a, d) for a, b in closed for c, d in closed if b == c} - closed: closed |= new
    assert closed == set(pairs)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_ties_never_make_a_wrong_pair(level):
    _, pairs = R.knockout(8, R.both_orders(lambda a, b: (level[a] > level[b]) - (level[a] < level[b])))
    assert all(level[w] > level[l] for w, l in pairs) and len(set(pairs)) == len(pairs) <= 12

@pytest.mark.parametrize("n", [0, 1, 3, 6, 12])
def test_no_bracket_of_other_sizes(n):
    with pytest.raises(core.UserError, match="n_think"): R.knockout(n, lambda a, b: 1)

def test_verifier_judge():
    rows = [dict(verdict=v, text=t) for v, t in [("correct", "Ответ: 5, так как"), ("wrong", "нет"), ("correct", "Ответ: 5"), ("truncated", "нет")]]
    j = R.verifier_judge(rows)
    assert j(0, 1) == 1 and j(1, 0) == -1 and j(0, 2) == 0 and j(1, 3) == 0
    short = R.verifier_judge(rows, "shorter")
    assert short(0, 2) == -1 and short(0, 1) == 1 and short(1, 3) == 0
    with pytest.raises(core.UserError): R.verifier_judge(rows, "longest")

@pytest.fixture
def judge_server():
    "An OpenAI-compatible judge: `mode` decides how it answers."
    class H(BaseHTTPRequestHandler):
        mode, seen = "longer", []
        def log_message(self, *a): pass
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            H.seen.append((self.path, body))
            text = body["messages"][0]["content"]
            a, b = text.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
            b = b.split("\n\nExplain")[0]
            said = {"longer": f"[[A]] or [[B]]? [[{'A' if len(a) > len(b) else 'B'}]]", "first": "[[A]]", "mute": "I cannot say."}[H.mode]
            out = json.dumps(dict(choices=[dict(message=dict(content=said))])).encode()
            self.send_response(200); self.send_header("Content-Length", str(len(out))); self.end_headers(); self.wfile.write(out)
    s = HTTPServer(("127.0.0.1", 0), H); threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}/v1", H
    s.shutdown()

def test_llm_judge_is_asked_in_both_orders_and_its_verdicts_survive_a_kill(judge_server, tmp_path):
    url, H = judge_server
    texts, kept = ["x", "xxx", "xx", "xxxx"], lambda name: data.Kept(tmp_path/name)
    judge = R.server_at(f"{url} m", kept("a.jsonl"), "judge_url"); H.seen.clear()
    ask = R.both_orders(R.llm_judge(judge, "Вопрос?", texts))
    matches, pairs = R.knockout(4, ask)
    assert sorted(pairs) == [(1, 0), (3, 0), (3, 1), (3, 2)]
    assert len(H.seen) == 6 and H.seen[0][0] == "/v1/chat/completions" and H.seen[0][1]["model"] == "m" and H.seen[0][1]["temperature"] == 0
    again = R.both_orders(R.llm_judge(R.server_at(f"{url} m", kept("a.jsonl"), "judge_url"), "Вопрос?", texts)); H.seen.clear()
    assert R.knockout(4, again) == (matches, pairs) and not H.seen         # another process finds them on disk
    H.mode = "first"                                # position bias: everything is contradicted, nothing is kept
    matches, pairs = R.knockout(4, R.both_orders(R.llm_judge(R.server_at(f"{url} m", kept("b.jsonl"), "judge_url"), "Вопрос?", texts)))
    assert pairs == [] and all(m["verdict"] is None for m in matches)
    H.mode = "mute"
    assert [m["verdict"] for m in R.knockout(2, R.both_orders(R.llm_judge(R.server_at(f"{url} m", kept("c.jsonl"), "judge_url"), "Вопрос?", texts)))[0]] == [0]

def test_tournaments_side_by_side_make_the_same_pairs():
    some = [r for i in range(12) for r in rows(["correct", "wrong", "wrong", "correct"], f"q{i}")]
    judge = lambda s: R.both_orders(R.verifier_judge(s))
    assert R.make_pairs(some, judge, 3, workers=8) == R.make_pairs(some, judge, 3)

def test_unreachable_judge_says_so(tmp_path):
    with pytest.raises(core.UserError, match="judge_url http://127.0.0.1:9/v1.*leave it empty"): R.server_at("http://127.0.0.1:9/v1 m", data.Kept(tmp_path/"v.jsonl"), "judge_url")

def test_a_server_answers_for_a_model_and_nothing_is_asked_twice(answer_server, tmp_path):
    name, H = answer_server
    path = str(core.toy("07_sft/model"))
    def ask(out, server=name): return R.sample([dict(name="07_sft", path=path, mode=m, n=3, server=server) for m in ("think", "direct")], [dict(id=f"p{i}", prompt=f"2 + {i}?", answer="2") for i in range(4)],
                                 str(tmp_path/out), str(tmp_path/"w"), temperature=1.0, max_new_tokens=dict(think=64, direct=8), batch_size=6, seed=1)
    ask("a.jsonl"); rows = core.read_jsonl(tmp_path/"a.jsonl")
    assert len(rows) == 24 and {r["text"].split("Ответ")[0] for r in rows if r["mode"] == "think"} == {"<think>2 + 3</think>"} and {r["verdict"] for r in rows} == {"correct", "wrong"}
    tok = core_tok(path)
    assert all(tok.decode(r["ids"]) == r["text"] + "<|im_end|>" for r in rows)
    asked = [b for b in H.seen if b["max_tokens"] > 1]; assert len(asked) == 24 and len(H.seen) == 26 and sum(b["max_tokens"] == 64 for b in asked) == 12      # two first questions, of one token
    assert len({b["seed"] for b in asked}) == 24                                                            # every answer draws for itself, over prompts too
    assert {(b["temperature"], b["top_p"], b["top_k"]) for b in asked} == {(1.0, 1.0, -1)}                  # a server would put generation_config's values where nothing is said
    dead = "http://127.0.0.1:9/v1 m"
    ask("b.jsonl", dead); assert core.read_jsonl(tmp_path/"b.jsonl") == rows                                # nothing is missing: no server needed
    for f in (tmp_path/"w").glob("sample-*"): f.unlink()                                                    # killed before a chunk was written: the answers are there
    ask("c.jsonl"); assert len(H.seen) == 28 and core.read_jsonl(tmp_path/"c.jsonl") == rows
    next((tmp_path/"w").glob("sample-*")).unlink()
    with pytest.raises(core.UserError, match="servers http://127.0.0.1:9/v1 m: no answer"): ask("d.jsonl", dead)
    other = tmp_path/"other"; shutil.copytree(path, other); tensors = load_file(other/"model.safetensors"); save_file({k: v + 1 for k, v in tensors.items()}, other/"model.safetensors", {"format": "pt"})
    before = len(H.seen); path = str(other)
    ask("e.jsonl"); assert len(H.seen) == before + 26                                                       # other weights under the server's old name: nothing of the old answers is taken

def test_prompts_that_leave_no_room_are_counted_and_left_out(tmp_path):
    "A server would refuse them one by one (HTTP 400), and the stage would never end."
    path = str(core.toy("07_sft/model"))
    room = AutoConfig.from_pretrained(path).max_position_embeddings
    long = dict(id="long", prompt="слово "*room, answer="1"); short = dict(id="short", prompt="2 + 2?", answer="4")
    how = dict(temperature=1.0, max_new_tokens=dict(think=8, direct=8), batch_size=4, seed=1)
    ask = lambda prompts: R.sample([dict(name="07_sft", path=path, mode="direct", n=2)], prompts, str(tmp_path/"a.jsonl"), str(tmp_path), **how)
    assert ask([long, short])["without_room"] == 1 and {r["id"] for r in core.read_jsonl(tmp_path/"a.jsonl")} == {"short"}
    with pytest.raises(core.UserError, match=f"8 new tokens in a model of {room} positions"): ask([long])

def test_a_long_answer_is_waited_for(answer_server, tmp_path):
    "A server that thinks for longer than the endpoint of chapter 05 waits: the wait grows with the tokens asked for."
    name, H = answer_server
    assert [R.server_at(name, data.Kept(tmp_path/"v.jsonl"), "servers", max_new_tokens=n).timeout_s for n in (0, 30_000)] == [600, 30_600]
    end = R.server_at(name, data.Kept(tmp_path/"v.jsonl"), "servers"); end.retries, H.slow = 0, 1.0
    ask = lambda: end.ask("/chat/completions", [dict(max_tokens=2, messages=[dict(role="user", content="2 + 2?")])], lambda a: a["choices"][0]["finish_reason"])
    end.timeout_s = .3; assert isinstance(ask()[0], data.Unanswered)
    end.timeout_s = 30; assert ask() == ["stop"]

def test_chunks_of_prompts_draw_independently(tmp_path):
    "The same question twice, in two chunks: with one stream for all chunks the answers would be the same; and two models answer a chunk under the same luck."
    ask = lambda name, out: R.sample([dict(name=name, path=str(core.toy("07_sft/model")), mode="direct", n=4)], [dict(id=f"p{i}", prompt="Где шарик?", answer="1") for i in range(3)],
                                     str(tmp_path/out), str(tmp_path/out[:1]), temperature=2.0, max_new_tokens=dict(think=8, direct=8), batch_size=4, seed=1)
    ask("m", "a.jsonl"); ask("other", "b.jsonl")
    by = lambda f: [[r["ids"] for r in core.read_jsonl(tmp_path/f) if r["id"] == f"p{i}"] for i in range(3)]
    a, b, c = by("a.jsonl")
    assert a != b and b != c and a != c and by("b.jsonl") == [a, b, c]

def core_tok(path):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(path)

def rows(verdicts, pid="q"): return [dict(id=pid, prompt="2 + 3?", source="07_sft", mode="direct", text=f"Ответ: {i}", verdict=v) for i, v in enumerate(verdicts)]

def test_make_pairs_prefers_correct():
    some = rows(["correct", "wrong", "wrong", "truncated"]) + rows(["wrong"]*4, "none")
    pairs, brackets = R.make_pairs(some, lambda s: R.both_orders(R.verifier_judge(s)), seed=3)
    assert pairs and all(p["id"] == "q" and p["chosen"] == "Ответ: 0" for p in pairs) and any(p["judged"] for p in pairs)
    assert [b["id"] for b in brackets] == ["q", "none"] and not brackets[1]["pairs"]

def test_bad_pairs():
    good = dict(id="q", chosen="a", rejected="b")
    assert R.check_pairs([good], "x") == [good]
    with pytest.raises(core.UserError, match="pair 1 .*equal sides; 1 of 2"): R.check_pairs([good, dict(id="q", chosen="a", rejected="a\n")], "x")
    with pytest.raises(core.UserError, match="x: no pairs"): R.check_pairs([], "x")

def test_best_of_equals_enumeration():
    rng = np.random.default_rng(0)
    for n in (1, 3, 6):
        c, r = rng.integers(0, 2, n), rng.permutation(n)
        for k in range(1, n + 1):
            want = np.mean([c[max(s, key=lambda i: r[i])] for s in itertools.combinations(range(n), k)])
            assert R.best_of(c, r, k) == pytest.approx(want)
    assert R.best_of([1, 0], [2., 2.], 2) == .5                                 # equal rewards know nothing
    assert R.best_of([1, 0, 0, 1], [1, 0, 0, 1], 2) == pytest.approx(1 - 1/6)   # oracle = pass@2

def test_bon_curve_and_pair_accuracy():
    data = [dict(id=i, verdict="correct" if k == i % 3 else "wrong", reward=float(k == i % 3)) for i in range(9) for k in range(3)]
    end = R.bon_curve(data)[-1]
    assert end["best"][0] == 1 and end["worst"][0] == 0 and end["delta"] == (1, 1, 1) and end["gain"][0] == pytest.approx(2/3) and end["oracle"] == 1
    assert R.bon_curve(data)[0]["delta"][0] == pytest.approx(0)
    pairs = [dict(id="a", margin=1.), dict(id="a", margin=-1.), dict(id="b", margin=0.), dict(id="b", margin=2.)]
    assert R.pair_accuracy(pairs)[0] == 62.5 and R.pair_accuracy([]) == (None, None, None)

def test_calibration():
    assert R.calibration([0., 0.])["brier"] == .25 and R.calibration([50.])["brier"] < 1e-6
    assert R.calibration([-50.])["ece"] == pytest.approx(1)

@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")/"model"
    core.toy_model(path, hidden=32, layers=2)
    return path

def pair_rows(n=8): return [dict(id=f"q{i}", prompt=f"Сколько будет {i} + 3?", chosen=f"Ответ: {i + 3}", rejected="Мороз и солнце") for i in range(n)]

def go(sft, folder, steps, **kw):
    core.write_jsonl(folder/"pairs.jsonl", pair_rows())
    config = dict(steps=steps, batch=4, accumulate=1, max_length=128, lr=1e-2, warmup=0, weight_decay=0., clip=1., center=0., rank=0, save_every=3) | kw
    return R.train(model_dir=str(sft), pairs_path=str(folder/"pairs.jsonl"), out=str(folder/"model"), work=str(folder/"work"), **config)

def test_training_learns_and_resumes(sft, tmp_path, monkeypatch):
    (tmp_path/"a").mkdir(); (tmp_path/"b").mkdir()
    whole = go(sft, tmp_path/"a", 8)
    assert whole["log"][0]["loss"] == pytest.approx(math.log(2), abs=1e-3)          # zero head, whatever the padding
    model, tok = R.load_reward_model(tmp_path/"a"/"model")
    ps = pair_rows()
    margin = R.score(model, tok, [p["prompt"] for p in ps], [p["chosen"] for p in ps]) - R.score(model, tok, [p["prompt"] for p in ps], [p["rejected"] for p in ps])
    assert (margin > 0).all() and model.config.num_labels == 1
    import tpro_nb.base_model as B                       # killed at step 5, run again
    from transformers import TrainerCallback
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 5: raise KeyboardInterrupt
    old = R.fit
    def broken(trainer, work): trainer.add_callback(Kill()); return old(trainer, work)
    monkeypatch.setattr(R, "fit", broken)
    with pytest.raises(KeyboardInterrupt): go(sft, tmp_path/"b", 8)
    assert not (tmp_path/"b"/"model").exists()
    monkeypatch.setattr(R, "fit", old)
    again = go(sft, tmp_path/"b", 8)
    assert again["resumed"]
    other, _ = R.load_reward_model(tmp_path/"b"/"model")
    for (k, x), y in zip(model.state_dict().items(), other.state_dict().values()): assert torch.equal(x, y), k

def test_lora_reward_model_is_merged(sft, tmp_path):
    got = go(sft, tmp_path, 2, rank=4)
    model, tok = R.load_reward_model(tmp_path/"model")
    assert not any("lora" in k for k in model.state_dict()) and model.score.weight.abs().sum() > 0
    assert {p.name for p in (tmp_path/"model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}

def test_equal_sides_stop_training(sft, tmp_path):
    core.write_jsonl(tmp_path/"p.jsonl", [dict(id="q", prompt="?", chosen="да", rejected="да")])
    with pytest.raises(core.UserError, match="equal sides"):
        R.train(str(sft), str(tmp_path/"p.jsonl"), str(tmp_path/"m"), str(tmp_path/"w"), 1, 1, 1, 64, 1e-3, 0, 0., 1., 0., 0, 1)
    assert not (tmp_path/"m").exists()

def test_a_classifier_with_two_outputs_is_refused(tmp_path):
    core.toy_model(tmp_path/"m", hidden=32, layers=1, scalar_head=True)
    config = core.read_json(tmp_path/"m"/"config.json")
    config.pop("id2label", None); config.pop("label2id", None)
    core.write_json(tmp_path/"m"/"config.json", config | dict(num_labels=2, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}))
    w = load_file(tmp_path/"m"/"model.safetensors"); w["score.weight"] = torch.zeros(2, 32); save_file(w, tmp_path/"m"/"model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(core.UserError, match="2 outputs"): R.load_reward_model(tmp_path/"m")

def test_sampling_resumes_from_its_chunks(sft, tmp_path, monkeypatch):
    prompts = [dict(id=f"q{i}", prompt=f"Сколько будет {i} + 3?", answer=str(i + 3)) for i in range(4)]
    go_ = lambda out: R.sample([dict(name="a", path=str(sft), mode="think", n=2), dict(name="b", path=str(sft), mode="direct", n=2)], prompts, str(tmp_path/out), str(tmp_path/"w"), 1., dict(think=6, direct=4), 4)
    first = go_("1.jsonl"); second = go_("2.jsonl")
    assert first["made"] == 16 and second["made"] == 0 and (tmp_path/"1.jsonl").read_text() == (tmp_path/"2.jsonl").read_text()
    got = core.read_jsonl(tmp_path/"1.jsonl")
    assert [(r["id"], r["source"]) for r in got] == [(f"q{i}", s) for i in range(4) for s in "aabb"] and all(r["verdict"] for r in got)

def test_answers_and_rewards_are_made_where_the_accelerator_is(sft, tmp_path, monkeypatch):
    "Every model that writes or scores goes to `device()`; here that is torch's device without memory."
    import tpro_nb.dpo as D, tpro_nb.sft as S
    seen = []
    def generate(model, tok, prompts, think, **kw): seen.append(model.device.type); return [[dict(text="5", ids=[5], finished=True)]*kw["n"] for _ in prompts]
    def score(model, tok, prompts, completions, **kw): seen.append(model.device.type); return np.zeros(len(prompts))
    for m in (R, D): monkeypatch.setattr(m, "device", lambda: "meta"); monkeypatch.setattr(m, "score", score)
    monkeypatch.setattr(S, "generate", generate)
    core.toy_model(tmp_path/"rm", scalar_head=True)
    D.draw([([dict(name="a", path=str(sft), mode="direct", n=1)], [dict(id="q", prompt="2 + 3?", answer="5")])], str(tmp_path/"rm"), str(tmp_path/"rows.jsonl"), str(tmp_path/"w"),
           temperature=1., max_new_tokens=dict(direct=4), batch_size=4)
    R.reward_rows(str(tmp_path/"rm"), str(tmp_path/"rows.jsonl"), str(tmp_path/"scored.jsonl"))
    assert seen == ["meta"]*3
