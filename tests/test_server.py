"""The embedded server over real sockets: answers equal the decoder's own, bad requests get their
status, nobody is lost."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager

import httpx
import openai
import psutil
import pytest
import torch
from transformers import AutoTokenizer

from tpro_nb import scheduler, server
from tpro_nb.chat_service import (
    NONCHARACTERS,
    Limits,
    Message,
    Service,
    ServiceSettings,
    event_line,
)
from tpro_nb.core import UserError, toy_model
from tpro_nb.decoder import Decoder, common_prefix
from tpro_nb.draft_model import random_draft
from tpro_nb.scheduler import Job, PassCosts, TextRequest
from tpro_nb.server import listen, serve_command, serving, serving_line
from tpro_nb.serving_cost import crowd, overhead
from tpro_nb.target_text import render

SHAPE = (3, 2, 5)
SUM = "Сколько будет 12 + 30?"
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)
JSON_TYPE = {"content-type": "application/json"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def talkative(folder):
    """A toy that does not repeat one token, and an untrained draft over the few tokens it says
    most, so that some guesses are right."""
    target = folder / "target"
    toy_model(target, tie_word_embeddings=False, initializer_range=0.2)
    dec = Decoder(target, dtype="float32", context=256)
    tok = AutoTokenizer.from_pretrained(target)
    said = Counter()
    for prompt in (SUM, "Привет"):
        said.update(dec.generate(render(tok, prompt, "direct"), 60))
    most_common = [token for token, _ in said.most_common(5)]
    random_draft(folder / "draft", target, hot=most_common)
    return target, folder / "draft"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return talkative(tmp_path_factory.mktemp("server"))


def service(folders, **changes):
    target, draft = folders
    usual = dict(name="toy", tree=SHAPE, dtype="float32", context=256, slots=3, queue=64)
    usual |= dict(piece=12, draft_up_to=99)  # nothing is measured, nothing depends on the machine
    return Service(ServiceSettings(target, draft, **(usual | changes)))


@pytest.fixture(scope="module")
def svc(folders):
    return service(folders)


@pytest.fixture(scope="module")
def url(svc):
    with serving(svc) as address:
        yield address


def body(text=SUM, **changes):
    usual = dict(
        model="toy",
        messages=[dict(role="user", content=text)],
        max_tokens=16,
        temperature=0,
        chat_template_kwargs=dict(enable_thinking=False),
    )
    return usual | changes


def post(url, request, **options):
    return httpx.post(f"{url}/v1/chat/completions", json=request, timeout=60, **options)


def direct(svc, text=SUM, new=16, thinking=False, **how):
    """What the decoder says when it is called without a server. Twins share scratch memory, so the
    server's one must have finished."""
    wait_idle(svc)
    prompt = svc.ids([Message(role="user", content=text)], thinking)
    with torch.inference_mode():
        tokens = scheduler.twin(svc.dec).generate(prompt, new, eos=svc.sched.eos, **how)
    return svc.tok.decode(tokens, skip_special_tokens=True)


def answer(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def wait_until(true, seconds):
    "Look every 10 ms; the last look's answer."
    for _ in range(round(seconds * 100)):
        if true():
            return True
        time.sleep(0.01)
    return true()


def wait_idle(svc):
    idle = wait_until(lambda: not svc.sched.busy and not svc.sched.waiting, 5)
    assert idle, "requests are left"


@contextmanager
def slow_turns(svc, seconds):
    "Every turn of the scheduler takes so much longer."
    usual = svc.sched.turn

    def slow_turn():
        time.sleep(seconds)
        usual()

    svc.sched.turn = slow_turn
    try:
        yield
    finally:
        svc.sched.turn = usual


@pytest.mark.parametrize("name, tree", [("toy", SHAPE), ("toy-plain", None)])
@pytest.mark.parametrize(
    "how",
    [{}, dict(temperature=0.8, top_p=0.9, seed=5), dict(temperature=2.0, top_k=2, seed=5)],
    ids=["greedy", "sampled", "top_k"],
)
def test_text_is_the_decoders_own(svc, url, name, tree, how):
    assert answer(post(url, body(model=name, **how))) == direct(svc, tree=tree, **how)


def test_top_k_and_null_reach_the_decoder(svc, url):
    hot = dict(temperature=2.0, seed=3, max_tokens=30, model="toy-plain")
    texts = {top_k: answer(post(url, body(**hot, top_k=top_k))) for top_k in (1, 2, -1)}
    greedy = answer(post(url, body(model="toy-plain", max_tokens=30)))
    assert texts[1] == greedy  # one candidate is greedy
    assert len(set(texts.values())) == 3
    assert answer(post(url, body(**hot, top_k=None))) == texts[-1]
    assert texts[-1] == answer(post(url, body(**hot)))
    nulls = dict(
        temperature=None,
        top_p=None,
        stream=None,
        stop=None,
        n=None,
        max_completion_tokens=None,
    )
    # as OpenAI's interface has it: null is the default
    told = answer(post(url, body(temperature=1.0, seed=3)))
    assert answer(post(url, body(seed=3, **nulls))) == told


def test_thinking_switch_and_system_message(svc, url):
    think = post(url, body(chat_template_kwargs=dict(enable_thinking=True)))
    assert answer(think) == direct(svc, thinking=True)
    straight = post(url, body())  # carries an empty think block
    assert think.json()["usage"]["prompt_tokens"] < straight.json()["usage"]["prompt_tokens"]
    parts = [dict(type="text", text="Привет"), dict(type="text", text="!")]
    rows = [
        dict(role="system", content="Отвечай кратко."),
        dict(role="user", content=parts),
    ]
    prompt = svc.ids([Message(**row) for row in rows], False)
    assert post(url, body(messages=rows)).json()["usage"]["prompt_tokens"] == len(prompt)
    assert "Привет!" in svc.tok.decode(prompt)


def test_openai_client_streams_the_same_text(svc, url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert {model.id for model in client.models.list()} == {"toy", "toy-plain"}
    request = body(max_tokens=40)
    template = request.pop("chat_template_kwargs")
    stream = client.chat.completions.create(
        **request,
        stream=True,
        stream_options=dict(include_usage=True),
        extra_body=dict(chat_template_kwargs=template, return_steps=True),
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == direct(svc, new=40, tree=SHAPE) == direct(svc, new=40)
    rows = [chunk.step for chunk in chunks if getattr(chunk, "step", None)]
    pieces = []
    for row in rows:
        pieces += row["pieces"]
    assert "".join(pieces) == text
    assert len(pieces) == chunks[-1].usage.completion_tokens
    times = [row["at_s"] for row in rows]
    assert times == sorted(times)
    assert rows[0]["tree"] is None
    for row in rows[1:]:
        assert len(row["tree_text"]) == len(row["tree"]["tokens"])
        assert row["drafted"] <= len(row["accepted"])


def test_telemetry_has_sglangs_names_and_adds_up(url):
    told = post(url, body(max_tokens=40, return_steps=True)).json()
    meta = told["meta_info"]
    steps = [step for step in told["steps"] if step["tree"]]
    assert meta["spec_verify_ct"] == len(steps)
    assert meta["completion_tokens"] == told["usage"]["completion_tokens"]
    assert meta["spec_accept_length"] == pytest.approx(meta["completion_tokens"] / len(steps))
    correct = sum(len(step["accepted"]) for step in steps)
    histogram = meta["spec_correct_drafts_histogram"]
    assert meta["spec_num_correct_drafts"] == correct
    assert correct == sum(accepted * many for accepted, many in enumerate(histogram))
    assert meta["spec_num_correct_drafts"] > 0
    proposed = sum(len(step["tree"]["tokens"]) - 1 for step in steps)
    assert meta["spec_num_proposed_drafts"] == proposed == 5 * len(steps)
    assert meta["spec_accept_rate"] == pytest.approx(correct / (len(steps) * 5))
    assert 0 <= meta["queue_time"] <= meta["ttft"] <= meta["e2e_latency"]
    assert "spec_verify_ct" not in post(url, body(model="toy-plain")).json()["meta_info"]


def test_stop_strings_across_tokens(svc, url):
    full = direct(svc, new=40)
    cut = full[7:11]
    assert len(set(full)) > 10
    assert cut not in full[:7]
    told = post(url, body(max_tokens=40, stop=[cut, "нет такого"])).json()
    choice = told["choices"][0]
    assert choice["message"]["content"] == full[: full.index(cut)]
    assert choice["finish_reason"] == "stop"
    plain = post(url, body(model="toy-plain", max_tokens=40, stop=cut)).json()
    # a draft changes nothing, not even the count
    assert plain["usage"] == told["usage"]
    assert plain["choices"] == told["choices"]
    assert post(url, body()).json()["choices"][0]["finish_reason"] == "length"


def test_pages_for_machines(svc, url):
    answer(post(url, body()))
    text = httpx.get(f"{url}/metrics").text
    values = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {
        "tpro_nb:num_running_reqs",
        "tpro_nb:num_queue_reqs",
        "tpro_nb:verified_total",
        "tpro_nb:tokens_total",
        "tpro_nb:spec_accept_length",
    } <= {line.split()[0] for line in values}
    info = httpx.get(f"{url}/server_info").json()
    assert info["speculative_num_draft_tokens"] == 6
    assert info["internal_states"][0]["avg_spec_accept_length"] >= 1
    assert httpx.get(f"{url}/health").text == "ok"
    assert httpx.get(f"{url}/nowhere").status_code == 404


def said_by_user(content):
    return dict(messages=[dict(role="user", content=content)])


X = b'"messages": [{"role": "user", "content": "x"}]'
BAD = {  # status, what is sent (bytes: as it is; a dict: changes of a good body), what is said
    "malformed": (400, b'{"model": "toy", "messages": [', "not JSON"),
    "utf-8": (
        400,
        b'{"model": "toy", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        "UTF-8",
    ),
    "deep": (400, b"[" * 100_000, "nested too deeply"),
    "not an object": (400, b'"hello"', "body"),
    "huge number": (400, b'{"max_tokens": ' + b"9" * 5000 + b"}", "digits"),
    "unknown model": (404, dict(model="gpt-5"), "toy-plain"),
    "unknown role": (400, dict(messages=[dict(role="wizard", content="x")]), "role"),
    "no messages": (400, dict(messages=[]), "messages"),
    "picture": (400, said_by_user([dict(type="image_url")]), "text"),
    "surrogate": (
        400,
        b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}',
        "content",
    ),
    "negative limit": (400, dict(max_tokens=-5), "max_tokens"),
    "zero limit": (400, dict(max_tokens=0), "max_tokens"),
    "huge limit": (400, dict(max_tokens=10**9), "room for"),
    "long prompt": (400, said_by_user("слово " * 2000), "shorten"),
    "1 MB": (413, said_by_user("a" * 2**20), "larger"),
    "stops": (400, dict(stop=["x"] * 5000), "stop: at most 16 stop strings, not 5000"),
    "1,000 stops": (400, dict(stop=["x"] * 1000), "stop: at most 16 stop strings, not 1000"),
    "long stop": (400, dict(stop="x" * 257), "not 257"),
    "no content": (400, dict(messages=[dict(role="user")]), "messages.0.content"),
    "null content": (400, said_by_user(None), "messages.0.content"),
    "no parts": (400, said_by_user([]), "messages.0.content"),
    "empty stop": (400, dict(stop=[""]), "stop"),
    "temperature": (400, dict(temperature=-1), "temperature"),
    "nan": (400, b'{"model": "toy", ' + X + b', "temperature": NaN}', "temperature"),
    "top_p": (400, dict(top_p=0), "top_p"),
    "top_k sign": (400, dict(top_k=-2), "top_k"),
    "top_k size": (400, dict(top_k=10**30), "top_k"),
    "top_k kind": (400, dict(top_k="many"), "top_k"),
    "seed": (400, dict(seed=2**63), "seed"),
    "true tokens": (400, dict(max_tokens=True), "max_tokens"),
    "true newer tokens": (400, dict(max_completion_tokens=True), "max_completion_tokens"),
    "false temperature": (400, dict(temperature=False), "temperature"),
    "half a character in a value": (
        400,
        b'{"model": "toy", ' + X + b', "suffix": "\\ud800"}',
        "suffix",
    ),
    "half a character in a name": (
        400,
        b'{"model": "toy", ' + X + b', "\\ud800": 1}',
        "no such field",
    ),
    "half a character in a message": (
        400,
        b'{"model": "toy", "messages": [{"role": "user", "content": "x", "\\ud800": 1}]}',
        "no such field",
    ),
    "every noncharacter": (400, said_by_user("".join(NONCHARACTERS)), "U+FDD0"),
    "n": (400, dict(n=3), "n"),
    "tools": (400, dict(tools=[dict(type="function")]), "tools"),
    "odd name": (400, b'{"model": "\\udc00", ' + X + b"}", "model"),
    "template": (400, dict(chat_template_kwargs=dict(evil="{{ 1 }}")), "evil"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_their_status_and_a_sentence(svc, url, case):
    status, sent, says = BAD[case]
    raw = sent if isinstance(sent, bytes) else json.dumps(body(**sent)).encode()
    response = httpx.post(f"{url}/v1/chat/completions", content=raw, headers=JSON_TYPE, timeout=30)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    too_long = case in ("huge limit", "long prompt")
    assert error["code"] == ("context_length_exceeded" if too_long else status)
    assert ("maximum context length is 256 tokens" in error["message"]) == too_long
    assert says in error["message"]
    assert len(error["message"]) < 600


def test_a_page_elsewhere_cannot_post(url):
    # what a form of a foreign page may send
    plain = {"content-type": "text/plain"}
    response = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body()), headers=plain)
    assert response.status_code == 400
    # nor reach it under a name of its own
    strange = ("127.0.0.1:8000@evil.example", "[::1].evil.example", "localhost:evil", "evil@[::1]")
    plain_names = ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "")
    for host in plain_names + strange:
        renamed = httpx.get(f"{url}/v1/models", headers={"host": host})
        assert renamed.status_code == 400
        assert "Host" in renamed.json()["error"]["message"]
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.2:80", "[::1]:8000", "[::1]"):
        assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["::1", "127.0.0.2"])
def test_every_loopback_address_looks_at_the_host(folders, monkeypatch, host):
    "The command's own wiring: what `serve` gives to the server for a loopback address."
    seen = []

    class Told(Exception):
        pass

    def remember(service, key, hosts):
        seen.append(hosts)
        raise Told

    monkeypatch.delenv("TPRO_NB_API_KEY", raising=False)
    monkeypatch.setattr(server, "uvicorn_server", remember)
    target, draft = map(str, folders)
    with pytest.raises(Told):
        serve_command([target, "--host", host, "--port", "0", "--context", "64"])
    assert seen == [[host]]  # a list: foreign names are refused; this one is no news


def test_the_server_lives_after_all_that(svc, url):
    assert answer(post(url, body())) == direct(svc)


def test_fifty_at_once_a_third_hangs_up(svc, url):
    before = dict(svc.sched.total)
    asyncio.run(crowd(svc, url, 50, 24))
    # the first crowd fills every cache and pool
    resident = psutil.Process().memory_info().rss
    got = asyncio.run(crowd(svc, url, 50, 24))
    assert got["served_requests_ok_pct"] == 100
    assert got["left"] == 0
    assert got["texts"] > 25
    assert svc.sched.total["finished_cancelled"] > before.get("finished_cancelled", 0)
    assert not svc.sched.total["finished_error"]
    assert psutil.Process().memory_info().rss - resident < 30 * 2**20


def test_turns_are_fair(folders):
    svc = service(folders, slots=2)
    seen = []

    def job(number, new):
        return Job(
            TextRequest([40 + number, 41], new),
            stop=[],
            deadline=time.monotonic() + 60,
            tell=lambda item: seen.append((number, item.finish)),
        )

    with svc.sched.wake:
        svc.sched.waiting.extend([job(0, 60), job(1, 10)])
        svc.sched.wake.notify()
    while sum(finish is not None for _, finish in seen) < 2:
        time.sleep(0.005)
    svc.sched.close()
    short = [place for place, (number, _) in enumerate(seen) if number]
    assert len(short) == 10
    between = [seen[place] for place in range(short[0], short[-1]) if place not in short]
    assert len(between) == 9  # the long one has a step for every step of the short one
    assert seen[short[-1]] == (1, "length")


def test_full_queue_and_time_limit(folders):
    svc = service(folders, slots=1, queue=1, limits=Limits(seconds=0.6))
    with serving(svc) as url:
        with slow_turns(svc, 0.1):
            got = []

            def ask():
                got.append(post(url, body(max_tokens=100)))

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
                time.sleep(0.05)
            for thread in threads:
                thread.join()
            status = sorted(response.status_code for response in got)
            assert status == [429, 429, 504, 504], [response.text for response in got]
            busy = next(response for response in got if response.status_code == 429)
            assert busy.headers["retry-after"]
            assert "waiting" in busy.json()["error"]["message"]
            lines = post(url, body(max_tokens=100, stream=True)).text.split("\n\n")
            last = json.loads(lines[-3].removeprefix("data: "))
            assert last["error"]["code"] == 504
            assert lines[-2] == "data: [DONE]"
        assert answer(post(url, body())) == direct(svc)


def submit(svc, prompt, new=8, tree=SHAPE, salt="", **more):
    "A job of bare ids, and the items that it is told."
    items = []
    deadline = time.monotonic() + 60
    job = Job(TextRequest(prompt, new, tree, **more), [], deadline, items.append, salt=salt)
    svc.sched.submit(job)
    return job, items


def ended(*told):
    assert wait_until(lambda: all(items and items[-1].finish for items in told), 30)


def tokens_of(svc, items):
    "The text, put together."
    return "".join(item.text for item in items)


def alone(svc, prompt, new=8, **how):
    wait_idle(svc)
    with torch.inference_mode():
        tokens = scheduler.twin(svc.dec).generate(prompt, new, eos=svc.sched.eos, **how)
    return svc.tok.decode(tokens, skip_special_tokens=True)


SYSTEM = [7, 8, 9, 10, 11, 12]
PREFIXES = [  # prompts in their order, and how many tokens of each are not read again
    ([*SYSTEM, 20, 21], 0),
    ([*SYSTEM, 20, 21], 7),  # the same once more
    ([*SYSTEM, 30], 5),  # a system prompt in common
    ([*SYSTEM, 31, 32], 5),
    ([6, *SYSTEM[1:], 20, 21], 0),  # another first token
    ([*SYSTEM, 20], 6),  # shorter than what is kept
    ([*SYSTEM, 20, 22], 6),  # another last token
    ([7], 0),
    ([7, 8], 1),
    ([50] * 40, 0),
    ([50] * 41, 39),
]


@pytest.mark.parametrize("tree", [SHAPE, None])
@pytest.mark.parametrize("keep", [0, 4])
def test_beginnings_in_common(folders, tree, keep):
    svc = service(folders, keep=keep, slots=2)
    for prompt, kept in PREFIXES:
        job, items = submit(svc, prompt, tree=tree)
        ended(items)
        assert job.cached == (kept if keep else 0), prompt
        assert tokens_of(svc, items) == alone(svc, prompt), prompt
    total = svc.sched.total["cached_tokens"]
    assert total == (sum(kept for _, kept in PREFIXES) if keep else 0)
    svc.sched.close()


def test_only_so_many_are_kept_the_oldest_goes_first(folders):
    svc = service(folders, keep=2, slots=1)
    firsts = [[number] * 20 for number in (30, 40, 50, 60)]
    kept = []
    for prompt in [*firsts, firsts[3], firsts[1], firsts[0]]:
        job, items = submit(svc, prompt)
        ended(items)
        kept.append(job.cached)
    # three places: the first two were displaced when the fourth and the second came
    assert kept == [0, 0, 0, 0, 19, 19, 0]
    svc.sched.close()


def test_nothing_is_used_again_across_salts_or_servers(folders, tmp_path):
    prompt = list(range(40, 70))
    svc, other = service(folders), service(talkative(tmp_path))
    for at, salt, kept in (
        (svc, "a", 0),
        (svc, "b", 0),
        (svc, "", 0),
        (other, "a", 0),
        (svc, "a", 29),
    ):
        job, items = submit(at, prompt, salt=salt)
        ended(items)
        assert job.cached == kept, salt
        assert tokens_of(at, items) == alone(at, prompt)
    with held_up(svc):  # nor does one wait for the other
        (first, told), (second, told_too) = (submit(svc, [9] * 60, salt=salt) for salt in "ab")
    ended(told, told_too)
    assert first.cached == second.cached == 0
    svc.sched.close()
    other.sched.close()


def test_the_draft_begins_anew_after_a_plain_text(folders):
    svc = service(folders, slots=1)
    for tree, kept in ((None, 0), (SHAPE, 0), (None, 29), (SHAPE, 29)):
        job, items = submit(svc, list(range(40, 70)), tree=tree)
        ended(items)
        assert job.cached == kept
        assert tokens_of(svc, items) == alone(svc, list(range(40, 70)))
    svc.sched.close()


@contextmanager
def held_up(svc):
    "Nothing runs until the block is left; what was submitted in it is there at once."
    with svc.sched.wake:
        yield


def test_twice_the_same_at_once_is_read_once(folders):
    svc = service(folders, slots=4)
    prompt = [5, 9, 30, 7] * 20
    with held_up(svc):
        first, told = submit(svc, prompt)
        second, told_too = submit(svc, prompt)
        third, told_last = submit(svc, [*prompt[:50], 3])
    ended(told, told_too, told_last)
    assert (first.cached, second.cached, third.cached) == (0, 79, 49)
    assert tokens_of(svc, told) == tokens_of(svc, told_too) == alone(svc, prompt)
    assert tokens_of(svc, told_last) == alone(svc, [*prompt[:50], 3])
    svc.sched.close()


def test_what_a_cancelled_prompt_has_read_is_used(folders):
    "Cancelled, out of time, or failed on the way: the last leaves nothing."
    svc = service(folders, slots=1)
    prompt = list(range(20, 200))
    usual = svc.sched.dec.read_all

    def leave_after(turns, act):
        left = [turns]

        def read_all(reads):
            left[0] -= 1
            if not left[0]:
                act(reads)
            return usual(reads)

        svc.sched.dec.read_all = read_all

    def fail(reads):
        raise RuntimeError("lost")

    jobs = []
    for how, act in (
        ("cancelled", lambda reads: setattr(jobs[-1], "cancelled", True)),
        ("timeout", lambda reads: setattr(jobs[-1], "deadline", 0.0)),
        ("error", fail),
    ):
        leave_after(4, act)
        with held_up(svc):
            job, told = submit(svc, prompt)
            jobs.append(job)
        ended(told)
        assert told[-1].finish == how
    svc.sched.dec.read_all = usual
    assert [job.cached for job in jobs] == [0, 47, 94]
    job, told = submit(svc, prompt)
    ended(told)
    assert job.cached == 0  # what a failure leaves is not trusted
    assert tokens_of(svc, told) == alone(svc, prompt)
    svc.sched.close()


def test_a_long_prompt_stops_nobody(folders):
    """A stream has its step in every turn in which a piece is read, pieces have their size, and a
    short prompt that comes later is not behind the long one."""
    svc = service(folders, slots=3)
    passes = []
    usual = svc.sched.dec.read_all

    def noted(reads):
        passes.append([(read.base, len(read.tokens), read.tree is not None) for read in reads])
        return usual(reads)

    svc.sched.dec.read_all = noted
    long = [3 + number % 90 for number in range(190)]
    with held_up(svc):
        stream, told = submit(svc, [40, 41], new=60)
        slow, told_slow = submit(svc, long, new=4)
        quick, told_quick = submit(svc, [60] * 20, new=4)
    ended(told, told_slow, told_quick)
    assert max(tokens for read in passes for _, tokens, _ in read) == 12
    pieces = [sum(tokens > 0 for _, tokens, _ in read) for read in passes]
    assert max(pieces) == 1
    base = passes[0][0][0]
    beside = [read for read in passes[1:] if any(tokens for _, tokens, _ in read)]
    assert len(beside) >= 16
    while_it_ran = passes[1 : 1 + sum(read[0][0] == base for read in passes[1:])]
    assert all(any(at == base and tree for at, _, tree in read) for read in while_it_ran)
    assert quick.first < slow.first
    for job, items in ((stream, told), (slow, told_slow), (quick, told_quick)):
        assert tokens_of(svc, items) == alone(svc, job.asked.prompt, job.asked.new)
    svc.sched.close()


@pytest.mark.parametrize("up_to", [1, 2, 9])
def test_the_draft_rests_beyond_the_crossing(folders, up_to):
    "Greedy and sampled texts, drafted and plain, are those of one who is alone."
    svc = service(folders, slots=4, draft_up_to=up_to)
    hot = dict(temperature=0.9, top_p=0.9, seed=5)
    asked = [(SHAPE, {}), (SHAPE, hot), (None, hot), (SHAPE, {})]
    with held_up(svc):
        jobs = [
            submit(svc, [40 + number, 41], new=12 + 12 * number, tree=tree, **how)
            for number, (tree, how) in enumerate(asked)
        ]
    ended(*(items for _, items in jobs))
    for (job, items), (_, how) in zip(jobs, asked):
        text = alone(svc, job.asked.prompt, job.asked.new, **how)
        assert tokens_of(svc, items) == text
        assert text == alone(svc, job.asked.prompt, job.asked.new, tree=SHAPE, **how)
    rested = [job.rested for job, _ in jobs]
    assert rested[2] == 0  # it never drafts
    assert (sum(rested) > 0) == (up_to < 9)
    assert jobs[3][0].verified > 0  # the last one is alone in the end, and drafts again
    meta = jobs[3][0].meta_info("length")
    drafted = jobs[3][0].tokens - rested[3]
    assert meta["spec_accept_length"] == pytest.approx(drafted / meta["spec_verify_ct"])
    svc.sched.close()


def test_costs_choose_the_piece_and_the_crossing():
    costs = PassCosts({1: 10.0, 4: 10.0, 8: 20.0, 64: 160.0}, 0.01, draft_ms=2.0, rows=5)
    assert costs.time(128) == 320
    assert [costs.piece(rows, 0) for rows in (0, 1, 4)] == [10, 9, 6]
    sizes = [costs.piece(1, past) for past in (0, 150, 500, 1000, 10**6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 4
    prices = [costs.draft_break_even(texts) for texts in range(1, 9)]
    assert prices[0] == pytest.approx((2 + 12.5) / 10)
    assert [costs.crossing(tau, 8) for tau in (1.0, prices[1] + 0.01, 99)] == [1, 2, 8]


def test_costs_are_measured_where_they_are_not_given(folders):
    svc = service(folders, piece=0, draft_up_to=0)
    costs = svc.sched.options.costs
    assert list(costs.times.values()) == sorted(costs.times.values())
    assert costs.rows == 6 and costs.draft_ms > 0 and costs.piece(1, 0) >= 4
    assert svc.sched.draft_up_to == 3  # nothing is known of the draft's yield yet
    svc.sched.yields.extend([1] * 20)
    assert svc.sched.draft_up_to == 1
    assert "prompts are read" in serving_line(svc)
    svc.sched.close()


def test_a_conversation_says_what_it_did_not_read_again(svc, url):
    first = post(url, body(max_tokens=24)).json()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 40
    said = first["choices"][0]["message"]["content"]
    turns = [
        dict(role="user", content=SUM),
        dict(role="assistant", content=said),
        dict(role="user", content="А ещё?"),
    ]
    again = post(url, body(messages=turns)).json()
    usage, meta = again["usage"], again["meta_info"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    common = common_prefix(
        svc.ids([Message(**turns[0])], False), svc.ids([Message(**row) for row in turns], False)
    )
    assert cached == meta["cached_tokens"] >= common - 1 > 5
    prompt = svc.ids([Message(**row) for row in turns], False)
    assert again["choices"][0]["message"]["content"] == alone(svc, prompt, 16)
    text = httpx.get(f"{url}/metrics").text
    for name in ("cached_tokens_total", "draft_up_to", "rested_total", "turns_total"):
        assert f"tpro_nb:{name} " in text


def leave_a_stream(url):
    "Read six lines of a stream and go."
    request = body(max_tokens=200, stream=True)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=5) as stream:
        for _ in zip(range(6), stream.iter_lines()):
            pass
    raise httpx.ReadTimeout("left in the middle")


def leave_a_whole_answer(url):
    request = body(max_tokens=200, stream=False)
    httpx.post(f"{url}/v1/chat/completions", json=request, timeout=0.2)


def test_hanging_up_frees_the_place(folders):
    svc = service(folders, slots=1)
    with serving(svc) as url, slow_turns(svc, 0.02):
        for leave in (leave_a_stream, leave_a_whole_answer):
            with pytest.raises(httpx.ReadTimeout):
                leave(url)
            wait_idle(svc)
        assert svc.sched.total["finished_cancelled"] == 2


def address_of(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def connect(url, receive_buffer=0):
    sock = socket.socket()
    if receive_buffer:  # before connecting: it sets the window
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(20)
    sock.connect(address_of(url))
    return sock


def rest_of(sock):
    "All that still comes, until the other side ends the connection."
    got = b""
    while True:
        try:
            part = sock.recv(65536)
        except ConnectionError:
            return got
        if not part:
            return got
        got += part


def raw_request(content, more_headers=b""):
    length = b"content-length: %d\r\n" % len(content)
    return HEAD + length + more_headers + b"\r\n" + content


def test_readers_who_sleep_hold_up_nobody_and_are_cut(folders, monkeypatch):
    def listen_with_small_buffers(*args):
        sock = listen(*args)
        # inherited by every connection, so a full buffer is soon reached
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    live = []
    make_server = server.uvicorn_server

    def remembered_server(*args):
        live.append(make_server(*args))
        return live[0]

    monkeypatch.setattr(server, "listen", listen_with_small_buffers)
    monkeypatch.setattr(server, "uvicorn_server", remembered_server)
    svc = service(folders, limits=Limits(patience=3.0))
    request = body(max_tokens=150, stream=True, return_steps=True)
    content = json.dumps(request).encode()

    def connections():
        return live[0].server_state.connections

    def full_connections():
        return [c for c in connections() if c.transport.get_write_buffer_size()]

    with serving(svc) as url:
        with httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            content=content,
            headers=JSON_TYPE,
            timeout=60,
        ) as stream:
            whole = len(stream.read())
        assert whole > 100_000

        for _ in range(2):
            sleepers = [connect(url, 4096) for _ in range(8)]
            for sleeper in sleepers:
                sleeper.sendall(raw_request(content))
            # the kernel takes no more: all eight are really stuck
            assert wait_until(lambda: len(full_connections()) == 8, 10)
            # and what waits is one chunk, not the answer
            for connection in full_connections():
                assert connection.transport.get_write_buffer_size() < 64 * 1024
            # another is served; idle again: all eight were decoded to the end, read or not
            assert answer(post(url, body())) == direct(svc)
            wait_until(lambda: not any(c.flow.write_paused for c in connections()), 10)
            for sleeper in sleepers:
                got = rest_of(sleeper)
                sleeper.close()
                # cut, not drained when they wake up
                assert b" 200 " in got[:20]
                assert len(got) < whole
                assert b"[DONE]" not in got
            total = svc.sched.total
            assert total["finished_length"] + total["finished_cancelled"] >= 10
        assert not svc.sched.total["finished_error"]


def test_a_slow_but_steady_reader_gets_everything(folders):
    svc = service(folders, limits=Limits(patience=1.0))
    content = json.dumps(body(max_tokens=60, stream=True, return_steps=True)).encode()
    with serving(svc) as url, connect(url, 4096) as sock:
        sock.sendall(raw_request(content, b"connection: close\r\n"))
        got = b""
        while part := sock.recv(1500):
            got += part
            time.sleep(0.01)
        assert b"[DONE]" in got


def test_who_says_nothing_is_cut(folders):
    svc = service(folders, limits=Limits(patience=0.4))
    with serving(svc) as url:
        silent = [connect(url) for _ in range(30)]
        # half a head is nothing either
        silent[0].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc")
        assert answer(post(url, body())) == direct(svc)
        for sock in silent:
            assert rest_of(sock) == b""
            sock.close()


def test_a_slow_head_is_cut_on_later_requests_too(folders):
    svc = service(folders, limits=Limits(patience=0.5))
    with serving(svc) as url, connect(url) as sock:
        for _ in range(2):  # an honest connection lives on
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            got = b""
            while not got.endswith(b"ok"):
                got += sock.recv(4096)
            time.sleep(0.3)
        began = time.monotonic()
        ended = False
        for letter in b"GET /health HTTP/1.1\r\nx: " + b"y" * 100:
            try:
                sock.sendall(bytes([letter]))
                sock.settimeout(0.05)
                ended = sock.recv(100) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
            if ended:
                break
        assert ended
        assert time.monotonic() - began < 2


def test_too_many_connections_hear_it_as_json(folders):
    svc = service(folders, slots=1, queue=1)
    most = 2 * (1 + 1) + 32
    with serving(svc) as url:
        idle = [connect(url) for _ in range(most)]
        response = post(url, body())
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert "connections" in response.json()["error"]["message"]
        assert httpx.get(f"{url}/health").text == "ok"
        for sock in idle:
            sock.close()
        assert wait_until(lambda: post(url, body()).status_code == 200, 5)


def test_a_stopping_server_ends_its_streams(folders, monkeypatch):
    monkeypatch.setattr(server, "LAST_SECONDS", 0.5)
    svc = service(folders, slots=1)
    events = []

    def read(url):
        request = body(max_tokens=200, stream=True, ignore_eos=True)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=30) as stream:
            events.extend(line for line in stream.iter_lines() if line)

    with slow_turns(svc, 0.05):
        with serving(svc) as url:
            reader = threading.Thread(target=read, args=[url])
            reader.start()
            assert wait_until(lambda: svc.sched.busy, 5)
        reader.join(timeout=10)
    assert not reader.is_alive()
    assert events[-1] == "data: [DONE]"
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["error"]["code"] == 503
    assert "stopping" in last["error"]["message"]


def test_a_failing_decoder_takes_down_one_request_only(folders, monkeypatch):
    svc = service(folders)

    def broken(*args):
        return 1 / 0

    with serving(svc) as url:
        with monkeypatch.context() as patched:
            patched.setattr(svc.sched.dec, "commit", broken)
            response = post(url, body())
        assert response.status_code == 500
        assert "ZeroDivisionError" in response.json()["error"]["message"]
        assert answer(post(url, body())) == direct(svc)


def test_no_memory_for_the_cache_is_said_at_the_start(folders):
    with pytest.raises(UserError, match="GB are free: lower --slots, --keep or --context"):
        service(folders, slots=10**7)


def test_what_the_head_says_of_a_body(url):
    address = f"{url}/v1/chat/completions"
    content = json.dumps(body()).encode()
    typed = {"content-type": "application/json"}
    for packed in ("gzip", "br", "GZIP", "deflate, gzip"):
        told = httpx.post(address, content=content, headers=typed | {"content-encoding": packed})
        assert told.status_code == 415
        assert packed.lower() in told.json()["error"]["message"]
    for plain in ("identity", ""):
        told = httpx.post(address, content=content, headers=typed | {"content-encoding": plain})
        assert told.status_code == 200
    with connect(url) as sock:  # nothing of it comes
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in rest_of(sock).split(b"\r\n")[0]


def test_slow_upload_and_lying_length(folders, monkeypatch):
    svc = service(folders)
    usual = server.RequestGuard

    def impatient(app, **options):
        return usual(app, grace=0.3, **options)

    monkeypatch.setattr(server, "RequestGuard", impatient)
    with serving(svc) as url:
        with socket.create_connection(address_of(url), timeout=5) as sock:
            sock.sendall(HEAD + b"content-length: 500\r\n\r\n{")
            assert b" 408 " in sock.recv(300)
        assert answer(post(url, body())) == direct(svc)


def test_api_key(folders, capsys):
    svc = service(folders)
    # more than one packet: refused before it is read, the client would see a reset connection
    long = body("a" * 200_000)
    with serving(svc, api_key="sesame") as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for given in (b"", b"Bearer wrong", b"Bearer \xff", b"Basic sesame", b"sesame", b"Bearer"):
            headers = {"authorization": given} if given else {}
            response = post(url, long, headers=headers)
            assert response.status_code == 401
            assert "key" in response.json()["error"]["message"]
            assert response.headers["www-authenticate"] == "Bearer"
        for given in ("Bearer sesame", "bearer sesame", "BEARER  sesame"):
            right = {"authorization": given}
            assert answer(post(url, body(), headers=right)) == direct(svc)


def test_where_it_listens():
    with pytest.raises(UserError, match="TPRO_NB_API_KEY"):
        listen("0.0.0.0", 0)
    with pytest.raises(UserError, match="no such address"):
        listen("nowhere.invalid", 80)
    listen("0.0.0.0", 0, "key").close()
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_command(folders, monkeypatch, capsys):
    monkeypatch.delenv("TPRO_NB_API_KEY", raising=False)
    target, draft = map(str, folders)
    for args, says in (
        (["x", "--host", "0.0.0.0"], "TPRO_NB_API_KEY"),
        (["x", "--tree", "3,a"], "--tree"),
        (["x", "--tree", "3,4"], "--tree"),
        (["x", "--slots", "0"], "--slots"),
        (["x", "--seconds", "nan"], "--seconds"),
        (["x", "--seconds", "inf"], "--seconds"),
        (["x", "--threads", "-3"], "--threads"),
        (["x", "--device", "foo"], "--device foo"),
        (["x", "--device", "meta"], "--device meta"),
        (["x", "--device", "cuda:99"], "--device cuda:99"),
        (["x", "--device", "cuda:foo"], "--device cuda:foo"),
        (["x", "--device", "cpu:x"], "--device cpu:x"),
        (["x", "--port", "99999"], "--port"),
        (["no/such/model", "--port", "0"], "no/such/model"),
        ([target, "--draft", draft, "--tree", "0,1,1", "--port", "0"], "tree"),
    ):
        assert serve_command(args) == 2
        assert says in capsys.readouterr().err


def test_overhead_is_small(svc, url):
    extra = overhead(svc, url, [SUM], 32, 3)
    assert extra["serve_overhead_ms"] < 100  # a toy's own time is too short for a percentage


def test_a_chat_that_sets_no_limit_may_fill_the_context(svc, url):
    for name in ("toy", "toy-plain"):
        asked = body(model=name, ignore_eos=True)
        del asked["max_tokens"]
        usage = post(url, asked).json()["usage"]
        assert usage["total_tokens"] == 256
        exact = body(model=name, max_tokens=usage["completion_tokens"], ignore_eos=True)
        assert post(url, exact).json()["usage"] == usage
        assert post(url, exact | dict(max_tokens=exact["max_tokens"] + 1)).status_code == 400
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    assert [card["max_model_len"] for card in cards] == [256, 256]
    last = dict(model="toy", prompt=[5] * 255, max_tokens=1)
    assert httpx.post(f"{url}/v1/completions", json=last).status_code == 200
    full = httpx.post(f"{url}/v1/completions", json=last | dict(prompt=[5] * 256))
    assert full.json()["error"]["code"] == "context_length_exceeded"


def test_a_context_no_longer_than_the_models_positions(folders):
    "What the tree needs beside the text is taken from the text where the model ends."
    svc = service(folders, context=10**6)
    svc.sched.close()
    assert svc.context == svc.dec.context - SHAPE[2] - 1


def test_a_stream_has_one_time(svc, url):
    asked = body(max_tokens=40, stream=True, ignore_eos=True)
    with (
        slow_turns(svc, 0.1),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=asked) as got,
    ):
        began = time.time()
        lines = [line for line in got.iter_lines() if line.startswith("data: {")]
    assert time.time() - began > 1  # it went over a second's end
    (created,) = {json.loads(line.removeprefix("data: "))["created"] for line in lines}
    assert 0 <= began - created < 3


def test_harmless_numbers_pass(url):
    plain = answer(post(url, body()))
    for harmless in (dict(top_k=0), dict(seed=-5), dict(seed=-(2**63)), dict(max_tokens=16.0)):
        assert answer(post(url, body(**harmless))) == plain
    hot = dict(temperature=2.0, max_tokens=30)
    assert answer(post(url, body(**hot, seed=-5))) == answer(post(url, body(**hot, seed=-5)))


def test_a_plain_prompt_begins_as_the_caller_says(svc, url, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    asked = dict(model="toy", prompt="два", max_tokens=1)
    ids = svc.tok.encode("два")
    begins = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    processor = svc.tok.backend_tokenizer.post_processor
    svc.tok.backend_tokenizer.post_processor = begins
    try:
        for special, more in ((None, 1), (True, 1), (False, 0)):
            sent = asked | dict(add_special_tokens=special)
            told = httpx.post(f"{url}/v1/completions", json=sent).json()
            assert told["usage"]["prompt_tokens"] == len(ids) + more
        assert post(url, body(add_special_tokens=False)).status_code == 200
        assert post(url, body(add_special_tokens=True)).status_code == 400
    finally:
        svc.tok.backend_tokenizer.post_processor = processor


def test_a_fault_of_the_server_is_told_in_openais_form(svc, monkeypatch):
    from fastapi.testclient import TestClient

    def faulty(*_):
        raise ZeroDivisionError("a secret of the house")

    monkeypatch.setattr(svc, "job", faulty)
    client = TestClient(server.application(svc), raise_server_exceptions=False)
    response = client.post("/v1/chat/completions", json=body())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_ends_of_lines_in_an_answer_stay_inside_their_event():
    text = "раз\x85два\u2028три\u2029четыре\n"
    event = event_line(dict(text=text))
    assert event.splitlines() == [event.rstrip("\n"), ""]
    assert json.loads(event.removeprefix("data: ")) == dict(text=text)
