"""Reward model: brackets, judges, pairs, pooling, exact best-of-n, calibration, and the trainer
with its resume."""

import itertools
import json
import math
import random
import shutil
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, TrainerCallback

import tpro_nb.dpo
import tpro_nb.sft
from tpro_nb import client, core
from tpro_nb import reward_model as R

NOWHERE = "http://127.0.0.1:9/v1 m"


def judge_by(strength):
    def judge(first, second):
        return (strength[first] > strength[second]) - (strength[first] < strength[second])

    return judge


def closure(edges):
    "Everything that follows by transitivity."
    closed = set(edges)
    while True:
        chains = itertools.product(closed, closed)
        new = {(first[0], second[1]) for first, second in chains if first[1] == second[0]} - closed
        if not new:
            return closed
        closed |= new


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_pair_count_and_truth(n):
    strength = random.Random(n).sample(range(1000), n)
    matches, pairs = R.knockout(n, judge_by(strength))
    assert len(matches) == n - 1
    assert len(pairs) == n // 2 * int(math.log2(n)) == len(set(pairs))
    assert all(strength[winner] > strength[loser] for winner, loser in pairs)
    edges = {(match.winner, match.first + match.second - match.winner) for match in matches}
    assert closure(edges) == set(pairs)  # nothing more, nothing less


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_ties_never_make_a_wrong_pair(level):
    _, pairs = R.knockout(8, R.both_orders(judge_by(level)))
    assert all(level[winner] > level[loser] for winner, loser in pairs)
    assert len(set(pairs)) == len(pairs) <= 12


@pytest.mark.parametrize("n", [0, 1, 3, 6, 12])
def test_no_bracket_of_other_sizes(n):
    with pytest.raises(core.UserError, match="n_think"):
        R.knockout(n, lambda first, second: 1)


def test_verifier_judge():
    rows = [
        dict(verdict="correct", text="Ответ: 5, так как"),
        dict(verdict="wrong", text="нет"),
        dict(verdict="correct", text="Ответ: 5"),
        dict(verdict="truncated", text="нет"),
    ]
    judge = R.verifier_judge(rows)
    assert judge(0, 1) == 1
    assert judge(1, 0) == -1
    assert judge(0, 2) == 0
    assert judge(1, 3) == 0
    short = R.verifier_judge(rows, "shorter")
    assert short(0, 2) == -1
    assert short(0, 1) == 1
    assert short(1, 3) == 0
    with pytest.raises(core.UserError):
        R.verifier_judge(rows, "longest")


@pytest.fixture
def judge_server():
    "An OpenAI-compatible judge: `mode` decides how it answers."

    class Handler(BaseHTTPRequestHandler):
        mode, seen = "longer", []

        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.seen.append((self.path, body))
            text = body["messages"][0]["content"]
            first, second = text.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
            second = second.split("\n\nExplain")[0]
            longer = "A" if len(first) > len(second) else "B"
            said = {
                "longer": f"[[A]] or [[B]]? [[{longer}]]",
                "first": "[[A]]",
                "mute": "I cannot say.",
            }[Handler.mode]
            out = json.dumps(dict(choices=[dict(message=dict(content=said))])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler
    server.shutdown()


def test_llm_judge_is_asked_in_both_orders_and_its_verdicts_survive_a_kill(judge_server, tmp_path):
    url, server = judge_server

    def judge(kept):
        "The judge of a process that keeps its answers in this file."
        endpoint = R.server_at(f"{url} m", client.Kept(tmp_path / kept), "judge_url")
        server.seen.clear()  # the first short question
        return R.both_orders(R.llm_judge(endpoint, "Вопрос?", ["x", "xxx", "xx", "xxxx"]))

    matches, pairs = R.knockout(4, judge("a.jsonl"))
    assert sorted(pairs) == [(1, 0), (3, 0), (3, 1), (3, 2)]
    assert len(server.seen) == 6
    path, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "m"
    assert body["temperature"] == 0
    again = judge("a.jsonl")
    assert R.knockout(4, again) == (matches, pairs)
    assert not server.seen  # another process finds them on disk
    server.mode = "first"  # position bias: everything is contradicted, nothing is kept
    matches, pairs = R.knockout(4, judge("b.jsonl"))
    assert pairs == []
    assert all(match.verdict is None for match in matches)
    server.mode = "mute"
    matches, _ = R.knockout(2, judge("c.jsonl"))
    assert [match.verdict for match in matches] == [0]


def verdict_rows(verdicts, prompt="q"):
    rows = []
    for number, verdict in enumerate(verdicts):
        row = dict(id=prompt, prompt="2 + 3?", source="07_sft", mode="direct")
        rows.append(row | dict(text=f"Ответ: {number}", verdict=verdict))
    return rows


def verifier_twice(seats):
    return R.both_orders(R.verifier_judge(seats))


def test_tournaments_side_by_side_make_the_same_pairs():
    rows = []
    for number in range(12):
        rows += verdict_rows(["correct", "wrong", "wrong", "correct"], f"q{number}")
    side_by_side = R.make_pairs(rows, verifier_twice, 3, workers=8)
    assert side_by_side == R.make_pairs(rows, verifier_twice, 3)


def test_unreachable_judge_says_so(tmp_path):
    with pytest.raises(core.UserError, match="judge_url http://127.0.0.1:9/v1.*leave it empty"):
        R.server_at(NOWHERE, client.Kept(tmp_path / "v.jsonl"), "judge_url")


def test_a_server_answers_for_a_model_and_nothing_is_asked_twice(answer_server, tmp_path):
    name, server = answer_server
    model = str(core.toy("07_sft/model"))

    def ask(out, answers_for_it=name, path=model):
        sources = []
        for mode in ("think", "direct"):
            sources.append(dict(name="07_sft", path=path, mode=mode, n=3, server=answers_for_it))
        R.sample_completions(
            sources,
            [dict(id=f"p{number}", prompt=f"2 + {number}?", answer="2") for number in range(4)],
            str(tmp_path / out),
            str(tmp_path / "w"),
            temperature=1.0,
            max_new_tokens=dict(think=64, direct=8),
            batch_size=6,
            seed=1,
        )
        return core.read_jsonl(tmp_path / out)

    rows = ask("a.jsonl")
    assert len(rows) == 24
    thoughts = {row["text"].split("Ответ")[0] for row in rows if row["mode"] == "think"}
    assert thoughts == {"<think>2 + 3</think>"}
    assert {row["verdict"] for row in rows} == {"correct", "wrong"}
    tok = AutoTokenizer.from_pretrained(model)
    assert all(tok.decode(row["ids"]) == row["text"] + "<|im_end|>" for row in rows)
    asked = [body for body in server.seen if body["max_tokens"] > 1]
    assert len(asked) == 24
    assert len(server.seen) == 26  # two first questions, of one token
    assert sum(body["max_tokens"] == 64 for body in asked) == 12
    # every answer draws for itself, over prompts too
    assert len({body["seed"] for body in asked}) == 24
    # a server would put generation_config's values where nothing is said
    sampling = {(body["temperature"], body["top_p"], body["top_k"]) for body in asked}
    assert sampling == {(1.0, 1.0, -1)}

    assert ask("b.jsonl", NOWHERE) == rows  # nothing is missing: no server needed
    for chunk in (tmp_path / "w").glob("sample-*"):
        chunk.unlink()  # killed before a chunk was written: the answers are there
    assert ask("c.jsonl") == rows
    assert len(server.seen) == 28
    next((tmp_path / "w").glob("sample-*")).unlink()
    with pytest.raises(core.UserError, match="servers http://127.0.0.1:9/v1 m: no answer"):
        ask("d.jsonl", NOWHERE)

    # other weights under the server's old name: nothing of the old answers is taken
    other = tmp_path / "other"
    shutil.copytree(model, other)
    moved = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    before = len(server.seen)
    ask("e.jsonl", path=str(other))
    assert len(server.seen) == before + 26


def test_prompts_that_leave_no_room_are_counted_and_left_out(tmp_path):
    "A server would refuse them one by one (HTTP 400), and the stage would never end."
    path = str(core.toy("07_sft/model"))
    room = AutoConfig.from_pretrained(path).max_position_embeddings
    long = dict(id="long", prompt="слово " * room, answer="1")
    short = dict(id="short", prompt="2 + 2?", answer="4")

    def ask(prompts):
        return R.sample_completions(
            [dict(name="07_sft", path=path, mode="direct", n=2)],
            prompts,
            str(tmp_path / "a.jsonl"),
            str(tmp_path),
            temperature=1.0,
            max_new_tokens=dict(think=8, direct=8),
            batch_size=4,
            seed=1,
        )

    assert ask([long, short])["without_room"] == 1
    assert {row["id"] for row in core.read_jsonl(tmp_path / "a.jsonl")} == {"short"}
    with pytest.raises(core.UserError, match=f"8 new tokens in a model of {room} positions"):
        ask([long])


def test_a_long_answer_is_waited_for(answer_server, tmp_path):
    """A server that thinks for longer than the endpoint of chapter 05 waits: the wait grows with
    the tokens asked for."""
    name, server = answer_server
    kept = client.Kept(tmp_path / "v.jsonl")
    waits = []
    for tokens in (0, 30_000):
        endpoint = R.server_at(name, kept, "servers", max_new_tokens=tokens)
        waits.append(endpoint.timeout_s)
    assert waits == [600, 30_600]
    endpoint = R.server_at(name, client.Kept(tmp_path / "v.jsonl"), "servers")
    endpoint.retries = 0
    server.slow = 1.0

    def ask():
        body = dict(max_tokens=2, messages=[dict(role="user", content="2 + 2?")])
        return endpoint.ask(
            "/chat/completions", [body], lambda answer: answer["choices"][0]["finish_reason"]
        )

    endpoint.timeout_s = 0.3
    assert isinstance(ask()[0], client.Unanswered)
    endpoint.timeout_s = 30
    assert ask() == ["stop"]


def test_chunks_of_prompts_draw_independently(tmp_path):
    """The same question twice, in two chunks: with one stream for all chunks the answers would be
    the same; and two models answer a chunk under the same luck."""

    def ask(name):
        "The tokens of the answers of model `name`, by prompt."
        out = tmp_path / f"{name}.jsonl"
        R.sample_completions(
            [dict(name=name, path=str(core.toy("07_sft/model")), mode="direct", n=4)],
            [dict(id=f"p{number}", prompt="Где шарик?", answer="1") for number in range(3)],
            str(out),
            str(tmp_path / name),
            temperature=2.0,
            max_new_tokens=dict(think=8, direct=8),
            batch_size=4,
            seed=1,
        )
        by_prompt = dict(p0=[], p1=[], p2=[])
        for row in core.read_jsonl(out):
            by_prompt[row["id"]].append(row["ids"])
        return list(by_prompt.values())

    first, second, third = ask("m")
    assert first != second
    assert second != third
    assert first != third
    assert ask("other") == [first, second, third]


def test_make_pairs_prefers_correct():
    rows = verdict_rows(["correct", "wrong", "wrong", "truncated"])
    rows += verdict_rows(["wrong"] * 4, "none")
    pairs, brackets = R.make_pairs(rows, verifier_twice, seed=3)
    assert pairs
    assert all(pair["id"] == "q" and pair["chosen"] == "Ответ: 0" for pair in pairs)
    assert any(pair["judged"] for pair in pairs)
    assert [bracket.id for bracket in brackets] == ["q", "none"]
    assert not brackets[1].pairs


def test_bad_pairs():
    good = dict(id="q", chosen="a", rejected="b")
    assert R.check_pairs([good], "x") == [good]
    with pytest.raises(core.UserError, match="pair 1 .*equal sides; 1 of 2"):
        R.check_pairs([good, dict(id="q", chosen="a", rejected="a\n")], "x")
    with pytest.raises(core.UserError, match="x: no pairs"):
        R.check_pairs([], "x")


def test_best_of_equals_enumeration():
    rng = np.random.default_rng(0)
    for n in (1, 3, 6):
        correct, reward = rng.integers(0, 2, n), rng.permutation(n)
        for k in range(1, n + 1):
            chosen = []
            for subset in itertools.combinations(range(n), k):
                chosen.append(correct[max(subset, key=reward.__getitem__)])
            assert R.best_of(correct, reward, k) == pytest.approx(np.mean(chosen))
    assert R.best_of([1, 0], [2.0, 2.0], 2) == 0.5  # equal rewards know nothing
    assert R.best_of([1, 0, 0, 1], [1, 0, 0, 1], 2) == pytest.approx(1 - 1 / 6)  # oracle = pass@2


def test_bon_curve():
    rows = []
    for prompt, sample in itertools.product(range(9), range(3)):
        right = sample == prompt % 3
        rows.append(dict(id=prompt, verdict="correct" if right else "wrong", reward=float(right)))
    curve = R.bon_curve(rows)
    end = curve[-1]
    assert end.best[0] == 1
    assert end.worst[0] == 0
    assert end.delta == (1, 1, 1)
    assert end.gain[0] == pytest.approx(2 / 3)
    assert end.oracle == 1
    assert curve[0].delta[0] == pytest.approx(0)


def test_pair_accuracy():
    pairs = [
        dict(id="a", margin=1.0),
        dict(id="a", margin=-1.0),
        dict(id="b", margin=0.0),
        dict(id="b", margin=2.0),
    ]
    assert R.pair_accuracy(pairs)[0] == 62.5
    assert R.pair_accuracy([]) == (None, None, None)


def test_calibration():
    assert R.calibration([0.0, 0.0]).brier == 0.25
    assert R.calibration([50.0]).brier < 1e-6
    assert R.calibration([-50.0]).ece == pytest.approx(1)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft") / "model"
    core.toy_model(path, hidden=32, layers=2)
    return path


def pair_rows(n=8):
    rows = []
    for number in range(n):
        row = dict(
            id=f"q{number}",
            prompt=f"Сколько будет {number} + 3?",
            chosen=f"Ответ: {number + 3}",
            rejected="Мороз и солнце",
        )
        rows.append(row)
    return rows


SETTINGS = R.RewardSettings(
    steps=8,
    batch=4,
    accumulate=1,
    max_length=128,
    lr=1e-2,
    warmup=0,
    weight_decay=0.0,
    clip=1.0,
    center=0.0,
    rank=0,
    save_every=3,
)


def go(sft, folder, **changed):
    core.write_jsonl(folder / "pairs.jsonl", pair_rows())
    return R.train_reward_model(
        model_dir=str(sft),
        pairs_path=str(folder / "pairs.jsonl"),
        out=str(folder / "model"),
        work=str(folder / "work"),
        **asdict(SETTINGS) | changed,
    )


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_training_learns_and_resumes(sft, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = go(sft, tmp_path / "a")
    first_loss = whole["log"][0]["loss"]
    assert first_loss == pytest.approx(math.log(2), abs=1e-3)  # zero head, whatever the padding
    model, tok = R.load_reward_model(tmp_path / "a" / "model")
    pairs = pair_rows()
    questions = [pair["prompt"] for pair in pairs]
    chosen = R.reward_scores(model, tok, questions, [pair["chosen"] for pair in pairs])
    rejected = R.reward_scores(model, tok, questions, [pair["rejected"] for pair in pairs])
    assert (chosen - rejected > 0).all()
    assert model.config.num_labels == 1
    unbroken = R.fit

    def broken(trainer, work):
        trainer.add_callback(Kill())
        return unbroken(trainer, work)

    monkeypatch.setattr(R, "fit", broken)
    with pytest.raises(KeyboardInterrupt):
        go(sft, tmp_path / "b")
    assert not (tmp_path / "b" / "model").exists()
    monkeypatch.setattr(R, "fit", unbroken)
    again = go(sft, tmp_path / "b")
    assert again["resumed"]
    other, _ = R.load_reward_model(tmp_path / "b" / "model")
    weights = zip(model.state_dict().items(), other.state_dict().values())
    for (name, ours), theirs in weights:
        assert torch.equal(ours, theirs), name


def test_lora_reward_model_is_merged(sft, tmp_path):
    go(sft, tmp_path, steps=2, rank=4)
    model, tok = R.load_reward_model(tmp_path / "model")
    assert not any("lora" in name for name in model.state_dict())
    assert model.score.weight.abs().sum() > 0
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_equal_sides_stop_training(sft, tmp_path):
    core.write_jsonl(tmp_path / "p.jsonl", [dict(id="q", prompt="?", chosen="да", rejected="да")])
    with pytest.raises(core.UserError, match="equal sides"):
        R.train_reward_model(
            model_dir=str(sft),
            pairs_path=str(tmp_path / "p.jsonl"),
            out=str(tmp_path / "m"),
            work=str(tmp_path / "w"),
            steps=1,
            batch=1,
            accumulate=1,
            max_length=64,
            lr=1e-3,
            warmup=0,
            weight_decay=0.0,
            clip=1.0,
            center=0.0,
            rank=0,
            save_every=1,
        )
    assert not (tmp_path / "m").exists()


def test_a_classifier_with_two_outputs_is_refused(tmp_path):
    folder = tmp_path / "m"
    core.toy_model(folder, hidden=32, layers=1, scalar_head=True)
    config = core.read_json(folder / "config.json")
    config.pop("id2label", None)
    config.pop("label2id", None)
    two = dict(num_labels=2, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    core.write_json(folder / "config.json", config | two)
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = torch.zeros(2, 32)
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(core.UserError, match="2 outputs"):
        R.load_reward_model(folder)


def test_sampling_resumes_from_its_chunks(sft, tmp_path, monkeypatch):
    prompts = []
    for number in range(4):
        question = f"Сколько будет {number} + 3?"
        prompts.append(dict(id=f"q{number}", prompt=question, answer=str(number + 3)))

    def ask(out):
        return R.sample_completions(
            [
                dict(name="a", path=str(sft), mode="think", n=2),
                dict(name="b", path=str(sft), mode="direct", n=2),
            ],
            prompts,
            str(tmp_path / out),
            str(tmp_path / "w"),
            temperature=1.0,
            max_new_tokens=dict(think=6, direct=4),
            batch_size=4,
        )

    first = ask("1.jsonl")
    second = ask("2.jsonl")
    assert first["made"] == 16
    assert second["made"] == 0
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()
    rows = core.read_jsonl(tmp_path / "1.jsonl")
    expected = [(f"q{number}", source) for number, source in itertools.product(range(4), "aabb")]
    assert [(row["id"], row["source"]) for row in rows] == expected
    assert all(row["verdict"] for row in rows)


def test_answers_and_rewards_are_made_where_the_accelerator_is(sft, tmp_path, monkeypatch):
    """Every model that writes or scores goes to `device()`; here that is torch's device without
    memory."""
    seen = []

    def generate(model, tok, prompts, think, **kw):
        seen.append(model.device.type)
        return [[dict(text="5", ids=[5], finished=True)] * kw["n"] for _ in prompts]

    def score(model, tok, prompts, completions, **kw):
        seen.append(model.device.type)
        return np.zeros(len(prompts))

    for module in (R, tpro_nb.dpo):
        monkeypatch.setattr(module, "device", lambda: "meta")
        monkeypatch.setattr(module, "reward_scores", score)
    monkeypatch.setattr(tpro_nb.sft, "generate_answers", generate)
    core.toy_model(tmp_path / "rm", scalar_head=True)
    sources = [dict(name="a", path=str(sft), mode="direct", n=1)]
    prompts = [dict(id="q", prompt="2 + 3?", answer="5")]
    tpro_nb.dpo.draw_answers(
        [(sources, prompts)],
        str(tmp_path / "rm"),
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "w"),
        temperature=1.0,
        max_new_tokens=dict(direct=4),
        batch_size=4,
    )
    R.reward_rows(
        str(tmp_path / "rm"), str(tmp_path / "rows.jsonl"), str(tmp_path / "scored.jsonl")
    )
    assert seen == ["meta"] * 3
