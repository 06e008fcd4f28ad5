"A model server in every mood, and answers that are kept."

import json
import threading
import time

import pytest
from stub_server import Said, Stub, asked_text, in_turn

from tpro_nb.client import (
    Endpoint,
    Kept,
    RefusedQuestion,
    ServerGone,
    Unanswered,
    read_reply,
    requested_pause,
)
from tpro_nb.core import UserError

FAST = dict(per_s=1000, timeout_s=0.3, wait_s=0.01, workers=1)
GOOD = Said("да")
CHAT = "/chat/completions"


def body(question: str = "?") -> dict:
    return dict(messages=[dict(role="user", content=question)])


def said(reply) -> str:
    return reply["choices"][0]["message"]["content"]


def replied(reply) -> dict:
    return read_reply(reply)


def endpoint(server: Stub, path, **more) -> Endpoint:
    return Endpoint(server.name, Kept(path / "kept.jsonl"), **{**FAST, **more})


# what the server does in turn → response, finished; the number of requests it takes
ANSWERED = {
    "a stream": ([GOOD], "да", True, 1),
    "in one, though a stream was asked for": ([Said("да", streams=False)], "да", True, 1),
    "slowly, over twice the timeout": ([Said("да" * 8, gap_s=0.07)], "да" * 8, True, 1),
    "thoughts apart": ([Said("4", thought="два и два")], "<think>два и два</think>4", True, 1),
    "thoughts under their other name": (
        [Said("4", thought="2+2", thought_name="reasoning")],
        "<think>2+2</think>4",
        True,
        1,
    ),
    "thoughts inside": ([Said("<think>2</think>4")], "<think>2</think>4", True, 1),
    "cut off in a thought": ([Said("", "length", thought="ещё")], "<think>ещё", False, 1),
    "cut off by the limit": ([Said("да", "length")], "да", False, 1),
    "nothing at all": ([Said("")], "", True, 1),
    "null": ([Said(None, streams=False)], "", True, 1),
    "busy": ([Said(status=429, headers={"Retry-After": "0.05"}), GOOD], "да", True, 2),
    "broken": ([Said(status=500), Said(status=502), Said(status=503), GOOD], "да", True, 4),
    "silent before the first piece": ([Said("да", wait_s=0.6), GOOD], "да", True, 2),
    "alive and silent": ([Said("да", gap_s=0.1, pings=9), GOOD], "да", True, 2),
    "cut": ([Said("да", cut=True), GOOD], "да", True, 2),
    "reset": ([Said("да", reset=True), GOOD], "да", True, 2),
    "another language": ([Said(body="<html>"), Said(body="[1, 2"), GOOD], "да", True, 3),
    "no choices": ([Said(body="{}"), Said(body='{"choices": []}'), GOOD], "да", True, 3),
    "without an end": ([Said("да", finish=None), GOOD], "да", True, 2),
    "aborted": ([Said("да", finish="abort"), GOOD], "да", True, 2),
}


@pytest.mark.parametrize("script,response,finished,requests", ANSWERED.values(), ids=ANSWERED)
def test_an_answer_is_had_in_the_end(tmp_path, script, response, finished, requests):
    with Stub(in_turn(*script)) as server:
        (reply,) = endpoint(server, tmp_path).ask(CHAT, [body()], replied)
        assert (reply["response"], reply["finished"]) == (response, finished)
        assert len(server.asked) == requests
        assert endpoint(server, tmp_path).ask(CHAT, [body()], replied) == [reply]
        assert len(server.asked) == requests  # it is kept


NO_ANSWER = {  # what the server does for ever → the reason, the number of requests
    "HTTP 503: перегрузка": (Said(status=503, body='{"error": {"message": "перегрузка"}}'), 3),
    "no new piece for 0.3 s": (Said("да", gap_s=0.1, pings=9), 3),
    "ReadTimeout": (Said("да", wait_s=0.6), 3),
    "the stream was cut": (Said("да", cut=True), 3),
    "JSONDecodeError": (Said(body="[1, 2"), 3),
    "HTTP 400: слишком длинно": (Said(status=400, body='{"message": "слишком длинно"}'), 1),
    "HTTP 413": (Said(status=413), 1),
    "HTTP 400: в потоке": (Said(body='{"error": {"message": "в потоке", "code": 400}}'), 1),
    "HTTP 500: внутри": (Said(body='{"error": "внутри"}'), 3),
    'HTTP 422: [{"loc"': (Said(status=422, body='{"detail": [{"loc": 1}]}'), 1),
}


@pytest.mark.parametrize("reason", NO_ANSWER)
def test_no_answer_has_a_reason_and_is_not_kept(tmp_path, reason):
    does, requests = NO_ANSWER[reason]
    with Stub(in_turn(does)) as server:
        (reply,) = endpoint(server, tmp_path, retries=2).ask(CHAT, [body()], replied)
        assert isinstance(reply, Unanswered)
        assert isinstance(reply, RefusedQuestion) == (requests == 1)
        assert reason in str(reply)
        assert len(server.asked) == requests
    assert not Kept(tmp_path / "kept.jsonl").got


def test_half_of_all_requests_fail_and_no_answer_is_lost(tmp_path):
    bad = [Said(status=500), Said("да", reset=True), Said("да", cut=True), Said(status=429)]

    def every_second(asked, number):
        return bad[number // 2 % 4] if number % 2 else Said(asked_text(asked))

    questions = [f"вопрос {number}" for number in range(40)]
    with Stub(every_second) as server:
        replies = endpoint(server, tmp_path, workers=4, retries=30).ask(
            CHAT, [body(question) for question in questions], said
        )
    assert replies == questions


STOPS = {  # what the server does, by the number of the request → what the run says
    "HTTP 401": lambda number: Said(status=401),
    "HTTP 404.*end in /v1": lambda number: Said(status=404),
    "HTTP 308": lambda number: Said(status=308, headers={"Location": "https://h"}),
    "HTTP 402": lambda number: GOOD if number < 5 else Said(status=402),
    "twenty questions in succession": lambda number: GOOD if number <= 5 else Said(status=503),
    "refused the first twenty.*n_ctx": lambda number: Said(status=400, body="n_ctx"),
}


@pytest.mark.parametrize("says", STOPS)
def test_a_server_that_serves_nobody_stops_the_run(tmp_path, says):
    with Stub(lambda asked, number: STOPS[says](number)) as server:
        bodies = [body(str(number)) for number in range(60)]
        with pytest.raises(UserError, match=says):
            endpoint(server, tmp_path, retries=0).ask(CHAT, bodies, said)
        answered = len(Kept(tmp_path / "kept.jsonl").got)
        server.say = in_turn(GOOD)
        before = len(server.asked)
        assert endpoint(server, tmp_path).ask(CHAT, bodies, said) == ["да"] * 60
        # a worker may have sent one more before it heard of the end
        assert 0 <= len(server.asked) - before - (60 - answered) <= 1


def test_a_wrong_port_is_no_night_of_waiting(tmp_path, monkeypatch):
    with Stub(in_turn(GOOD)) as server:
        pass  # nobody listens there any more
    monkeypatch.setattr("tpro_nb.client.REACHED_WITHIN_S", 0.05)
    with pytest.raises(ServerGone, match="cannot be reached.*is this its address"):
        endpoint(server, tmp_path, retries=100).ask(CHAT, [body()], said)


def test_a_server_that_restarts_is_waited_for(tmp_path):
    port = []

    def comes_back():
        time.sleep(0.3)
        back = Stub(in_turn(Said("да")), port[0])
        back.__enter__()
        restarted.append(back)

    restarted = []
    with Stub(in_turn(GOOD)) as server:
        port.append(server.server_port)
    threading.Thread(target=comes_back).start()
    assert endpoint(server, tmp_path, retries=12).ask(CHAT, [body()], said) == ["да"]
    restarted[0].__exit__()


def test_refusals_between_answers_stop_nothing(tmp_path):
    def first_only(asked, number):
        return GOOD if number == 1 else Said(status=403 if number % 2 else 400)

    with Stub(first_only) as server:
        replies = endpoint(server, tmp_path).ask(CHAT, [body(str(i)) for i in range(40)], said)
    assert replies[0] == "да"
    assert all(isinstance(reply, RefusedQuestion) for reply in replies[1:])


@pytest.mark.parametrize(
    "name",
    ["localhost:30000", "http://localhost:1", "http:// m", "http://h:port/v1 m", "", "ftp://h m"],
)
def test_a_name_that_is_no_endpoint(name, tmp_path):
    with pytest.raises(UserError, match="no endpoint"):
        Endpoint(name, Kept(tmp_path / "k.jsonl"))


def test_a_proxy_that_cannot_be_used_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "gopher://nowhere")
    with pytest.raises(UserError, match="proxy"):
        Endpoint("http://h/v1 m", Kept(tmp_path / "k.jsonl"))


def test_any_text_can_be_asked(tmp_path):
    with Stub(lambda asked, number: Said(asked_text(asked))) as server:
        strange = ["\ud800 half a pair", "\u2028\x85", "😀", "\x00"]
        replies = endpoint(server, tmp_path).ask(CHAT, [body(text) for text in strange], said)
    assert replies[1:] == strange[1:]
    assert len(replies) == 4


def test_an_address_may_be_written_in_three_ways(tmp_path):
    for name in ("http://h/v1 m", "http://h/v1/  m ", "http://h/v1/chat/completions m"):
        server = Endpoint(name, Kept(tmp_path / "k.jsonl"))
        assert (server.url, server.model) == ("http://h/v1", "m")


@pytest.mark.parametrize(
    "asked,seconds",
    [
        ("0", 0),
        ("7", 7),
        ("1.5", 1.5),
        ("-1", 0),
        ("", 0),
        ("soon", 0),
        ("inf", 3600),
        ("9e9", 3600),
    ],
)
def test_pauses(asked, seconds):
    assert requested_pause(asked) == seconds


def test_a_busy_server_holds_every_worker_back(tmp_path):
    arrived = []

    def busy_once(asked, number):
        arrived.append(time.monotonic())
        return Said(status=429, headers={"Retry-After": "0.4"}) if number == 1 else GOOD

    with Stub(busy_once) as server:
        pace = dict(per_s=20, workers=4)
        endpoint(server, tmp_path, **pace).ask(CHAT, [body(str(i)) for i in range(8)], said)
    assert len(arrived) == 9
    assert arrived[-1] - arrived[0] >= 0.5  # the pause, and 1/20 s between any two


def test_an_error_does_not_wait_for_a_slow_neighbour(tmp_path):
    def slow_first(asked, number):
        return Said("да" * 40, gap_s=0.1) if asked_text(asked) == "0" else Said(status=401)

    with Stub(slow_first) as server:
        with pytest.raises(UserError, match="401"):
            endpoint(server, tmp_path, workers=2).ask(CHAT, [body("0"), body("1")], said)
        assert threading.active_count() > 1  # the slow one is still on its way, and is let go
    assert not Kept(tmp_path / "kept.jsonl").got


def test_torn_lines_of_a_cache_are_dropped_and_asked_again(tmp_path):
    path = tmp_path / "k.jsonl"
    asked = []

    def exclaim(words):
        asked.append(words)
        return [f"{word}!" for word in words]

    words = ["а", "б", "в"]
    exclaimed = ["а!", "б!", "в!"]
    assert Kept(path).each("w", words, exclaim, block=2) == exclaimed
    path.write_bytes(path.read_bytes()[:-4])
    assert Kept(path).each("w", words, exclaim, block=2) == exclaimed
    assert asked[-1] == ["в"]
    whole = path.read_bytes()
    path.write_bytes(b"{torn\n" + whole + json.dumps(["x"]).encode())
    assert Kept(path).each("w", words, exclaim, block=2) == exclaimed
    assert Kept(path).each("other", ["а"], exclaim) == ["а!"]
    assert len(asked) == 4


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    kept = Kept(tmp_path / "k.jsonl")
    kept.put("a", 1)
    kept.path = tmp_path  # a folder cannot be appended to
    with pytest.raises(UserError, match="cannot write.*run again"):
        kept.put("b", 2)
    assert Kept(tmp_path / "k.jsonl").got == dict(a=1)


def test_what_could_not_be_had_is_not_kept(tmp_path):
    path = tmp_path / "k.jsonl"
    (failed,) = Kept(path).each("w", ["г"], lambda words: [Unanswered("nobody")])
    assert isinstance(failed, Unanswered)
    assert not Kept(path).got
