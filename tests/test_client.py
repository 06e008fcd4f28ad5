"A model server in every mood, and answers that are kept."

import time

import pytest
from corpus_toys import FAST, TAGGED, TAGS, always, chat, toy_server

from tpro_nb.client import Endpoint, Kept, Unanswered
from tpro_nb.core import UserError
from tpro_nb.tags import endpoint_tagger

QUESTION = "Что значит слово «дом»?"


@pytest.fixture
def server():
    with toy_server() as running:
        yield running


def test_endpoint_is_late_busy_drunk_and_then_well(server, tmp_path):
    moods = [
        (200, {}, TAGGED, 0.6),
        (429, {"Retry-After": "0.05"}, "", 0),
        (200, {}, "<html>", 0),
        (200, {}, chat("не знаю"), 0),
        (200, {}, TAGGED, 0),
    ]
    server.mood = lambda number, body: moods[number - 1]

    def tag():
        kept = Kept(tmp_path / "k.jsonl")
        return endpoint_tagger(server.name, kept, workers=1, **FAST)([QUESTION])

    assert tag() == [TAGS]
    assert len(server.asked) == 5
    assert tag()[0]["tier"] == "Student"
    assert len(server.asked) == 5


def test_a_dead_endpoint_stops_the_run_and_keeps_what_was_answered(server, tmp_path):
    def dies_after_five(number, body):
        return (200, {}, TAGGED, 0) if number <= 5 else (503, {}, "", 0)

    def tag():
        kept = Kept(tmp_path / "k.jsonl")
        tagger = endpoint_tagger(server.name, kept, workers=1, retries=0, **FAST)
        return tagger([f"Вопрос {number}" for number in range(60)])

    server.mood = dies_after_five
    with pytest.raises(UserError, match="twenty questions"):
        tag()
    assert len(Kept(tmp_path / "k.jsonl").got) == 5
    server.mood = always(TAGGED)
    before = len(server.asked)
    assert len(tag()) == 60
    assert len(server.asked) - before == 55


def test_a_name_that_is_no_endpoint_and_a_server_that_refuses(server, tmp_path):
    with pytest.raises(UserError, match="no endpoint"):
        Endpoint("localhost:30000", Kept(tmp_path / "k.jsonl"))
    server.mood = lambda number, body: (401, {}, "", 0)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        endpoint_tagger(server.name, Kept(tmp_path / "j.jsonl"), **FAST)(["а"])


def test_the_rate_limit_holds_for_all_workers_together(server, tmp_path):
    server.mood = always(TAGGED)
    tagger = endpoint_tagger(server.name, Kept(tmp_path / "k.jsonl"), per_s=20, workers=8)
    start = time.monotonic()
    tagger([str(number) for number in range(10)])
    assert time.monotonic() - start >= 0.45


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
    assert Kept(path).each("other", ["а"], exclaim) == ["а!"]
    assert len(asked) == 4


def test_what_could_not_be_had_is_not_kept(tmp_path):
    path = tmp_path / "k.jsonl"
    (failed,) = Kept(path).each("w", ["г"], lambda words: [Unanswered("nobody")])
    assert isinstance(failed, Unanswered)
    assert "г" not in str(Kept(path).got)
    assert not Kept(path).got
