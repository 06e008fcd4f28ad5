"The embedded server over real sockets: answers equal the decoder's own, bad requests get their status, nobody is lost."
import asyncio, json, os, socket, subprocess, sys, threading, time
import httpx, openai, psutil, pytest, torch
from tpro_nb import server as S
from collections import Counter
from tpro_nb.core import UserError, toy_model
from tpro_nb.eagle_draft import random_draft, render
from transformers import AutoTokenizer

SHAPE = (3, 2, 5)

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def talkative(d):
    "A toy that does not repeat one token, and an untrained draft over the few tokens it says most, so that some guesses are right."
    toy_model(d/"target", tie_word_embeddings=False, initializer_range=.2)
    dec = S.Decoder(d/"target", dtype="float32", context=256)
    tok = AutoTokenizer.from_pretrained(d/"target")
    said = Counter(t for p in ("Сколько будет 12 + 30?", "Привет") for t in dec.generate(render(tok, p, "direct"), 60))
    random_draft(d/"draft", d/"target", hot=[t for t, _ in said.most_common(5)])
    return d/"target", d/"draft"

@pytest.fixture(scope="module")
def folders(tmp_path_factory): return talkative(tmp_path_factory.mktemp("server"))

def service(folders, **kw): return S.Service(*folders, **(dict(name="toy", tree=SHAPE, dtype="float32", context=256, slots=3, queue=64) | kw))

@pytest.fixture(scope="module")
def svc(folders): return service(folders)

@pytest.fixture(scope="module")
def url(svc):
    with S.serving(svc) as u: yield u

def body(text="Сколько будет 12 + 30?", **kw):
    return dict(model="toy", messages=[dict(role="user", content=text)], max_tokens=16, temperature=0, chat_template_kwargs=dict(enable_thinking=False)) | kw
def post(url, b, **kw): return httpx.post(f"{url}/v1/chat/completions", json=b, timeout=60, **kw)
def direct(svc, text="Сколько будет 12 + 30?", new=16, thinking=False, **kw):
    "What the decoder says when it is called without a server. Twins share scratch memory, so the server's one must have finished."
    wait_idle(svc)
    with torch.inference_mode(): ids = S.twin(svc.dec).generate(svc.ids([S.Message(role="user", content=text)], thinking), new, eos=svc.sched.eos, **kw)
    return svc.tok.decode(ids, skip_special_tokens=True)
def answer(r): assert r.status_code == 200, r.text; return r.json()["choices"][0]["message"]["content"]
def wait_idle(svc):
    for _ in range(500):
        if not svc.sched.busy and not svc.sched.waiting: return
        time.sleep(.01)
    raise AssertionError("requests are left")

@pytest.mark.parametrize("name, tree", [("toy", SHAPE), ("toy-plain", None)])
@pytest.mark.parametrize("kw", [{}, dict(temperature=.8, top_p=.9, seed=5), dict(temperature=2.0, top_k=2, seed=5)], ids=["greedy", "sampled", "top_k"])
def test_text_is_the_decoders_own(svc, url, name, tree, kw):
    assert answer(post(url, body(model=name, **kw))) == direct(svc, tree=tree, **kw)

def test_top_k_and_null_reach_the_decoder(svc, url):
    hot = dict(temperature=2.0, seed=3, max_tokens=30, model="toy-plain")
    texts = {k: answer(post(url, body(**hot, top_k=k))) for k in (1, 2, -1)}
    assert texts[1] == answer(post(url, body(model="toy-plain", max_tokens=30))) and len(set(texts.values())) == 3      # one candidate is greedy
    assert answer(post(url, body(**hot, top_k=None))) == texts[-1] == answer(post(url, body(**hot)))
    null = body(temperature=None, top_p=None, seed=3, stream=None, stop=None, n=None, max_completion_tokens=None)
    assert answer(post(url, null)) == answer(post(url, body(temperature=1.0, seed=3)))          # as OpenAI's interface has it: null is the default

def test_thinking_switch_and_system_message(svc, url):
    think = post(url, body(chat_template_kwargs=dict(enable_thinking=True)))
    assert answer(think) == direct(svc, thinking=True)
    assert think.json()["usage"]["prompt_tokens"] < post(url, body()).json()["usage"]["prompt_tokens"]     # direct carries an empty think block
    rows = [dict(role="system", content="Отвечай кратко."), dict(role="user", content=[dict(type="text", text="Привет"), dict(type="text", text="!")])]
    ids = svc.ids([S.Message(**r) for r in rows], False)
    assert post(url, body(messages=rows)).json()["usage"]["prompt_tokens"] == len(ids) and "Привет!" in svc.tok.decode(ids)

def test_openai_client_streams_the_same_text(svc, url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert {m.id for m in client.models.list()} == {"toy", "toy-plain"}
    chunks = list(client.chat.completions.create(**{k: v for k, v in body(max_tokens=40).items() if k != "chat_template_kwargs"}, stream=True,
                  stream_options=dict(include_usage=True), extra_body=dict(chat_template_kwargs=dict(enable_thinking=False), return_steps=True)))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == direct(svc, new=40, tree=SHAPE) == direct(svc, new=40)
    rows = [c.step for c in chunks if getattr(c, "step", None)]
    assert "".join(p for r in rows for p in r["pieces"]) == text
    assert sum(len(r["pieces"]) for r in rows) == chunks[-1].usage.completion_tokens
    assert [r["at_s"] for r in rows] == sorted(r["at_s"] for r in rows) and rows[0]["tree"] is None
    assert all(len(r["tree_text"]) == len(r["tree"]["tokens"]) and r["drafted"] <= len(r["accepted"]) for r in rows[1:])

def test_telemetry_has_sglangs_names_and_adds_up(url):
    r = post(url, body(max_tokens=40, return_steps=True)).json()
    m, steps = r["meta_info"], [s for s in r["steps"] if s["tree"]]
    assert m["spec_verify_ct"] == len(steps) and m["completion_tokens"] == r["usage"]["completion_tokens"]
    assert m["spec_accept_length"] == pytest.approx(m["completion_tokens"]/len(steps))
    assert m["spec_num_correct_drafts"] == sum(len(s["accepted"]) for s in steps) == sum(i*n for i, n in enumerate(m["spec_correct_drafts_histogram"]))
    assert m["spec_num_correct_drafts"] > 0
    assert m["spec_num_proposed_drafts"] == sum(len(s["tree"]["tokens"]) - 1 for s in steps) == 5*len(steps)
    assert m["spec_accept_rate"] == pytest.approx(m["spec_num_correct_drafts"]/(len(steps)*5))
    assert 0 <= m["queue_time"] <= m["ttft"] <= m["e2e_latency"]
    assert "spec_verify_ct" not in post(url, body(model="toy-plain")).json()["meta_info"]

def test_stop_strings_across_tokens(svc, url):
    full = direct(svc, new=40)
    cut = full[7:11]
    assert len(set(full)) > 10 and cut not in full[:7]
    r = post(url, body(max_tokens=40, stop=[cut, "нет такого"])).json()
    assert r["choices"][0]["message"]["content"] == full[:full.index(cut)] and r["choices"][0]["finish_reason"] == "stop"
    plain = post(url, body(model="toy-plain", max_tokens=40, stop=cut)).json()
    assert plain["usage"] == r["usage"] and plain["choices"] == r["choices"]              # a draft changes nothing, not even the count
    assert post(url, body()).json()["choices"][0]["finish_reason"] == "length"

def test_pages_for_machines(svc, url):
    answer(post(url, body()))
    text = httpx.get(f"{url}/metrics").text
    names = [l.split()[0] for l in text.splitlines() if l and not l.startswith("#")]
    assert {"tpro_nb:num_running_reqs", "tpro_nb:num_queue_reqs", "tpro_nb:verified_total", "tpro_nb:tokens_total", "tpro_nb:spec_accept_length"} <= set(names)
    info = httpx.get(f"{url}/server_info").json()
    assert info["speculative_num_draft_tokens"] == 6 and info["internal_states"][0]["avg_spec_accept_length"] >= 1
    assert httpx.get(f"{url}/health").text == "ok" and httpx.get(f"{url}/nowhere").status_code == 404

BAD = {
    "malformed": (400, b'{"model": "toy", "messages": [', "not JSON"), "utf-8": (400, b'{"model": "toy", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "UTF-8"),
    "deep": (400, b"["*100_000, ""), "not an object": (400, b'"hello"', "body"), "huge number": (400, b'{"max_tokens": ' + b"9"*5000 + b"}", ""),
    "unknown model": (404, dict(model="gpt-5"), "toy-plain"), "unknown role": (400, dict(messages=[dict(role="wizard", content="x")]), "role"),
    "no messages": (400, dict(messages=[]), "messages"), "picture": (400, dict(messages=[dict(role="user", content=[dict(type="image_url")])]), "text"),
    "surrogate": (400, b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}', "content"),
    "negative limit": (400, dict(max_tokens=-5), "max_tokens"), "zero limit": (400, dict(max_tokens=0), "max_tokens"), "huge limit": (400, dict(max_tokens=10**9), "room for"),
    "long prompt": (400, dict(messages=[dict(role="user", content="слово "*2000)]), "shorten"), "1 MB": (413, dict(messages=[dict(role="user", content="a"*2**20)]), "larger"),
    "stops": (400, dict(stop=["x"]*5000), "stop"), "empty stop": (400, dict(stop=[""]), "stop"), "temperature": (400, dict(temperature=-1), "temperature"),
    "nan": (400, b'{"model": "toy", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"), "top_p": (400, dict(top_p=0), "top_p"),
    "top_k": (400, dict(top_k=0), "top_k"), "top_k sign": (400, dict(top_k=-2), "top_k"), "top_k size": (400, dict(top_k=10**30), "top_k"), "top_k kind": (400, dict(top_k="many"), "top_k"),
    "seed": (400, dict(seed=-1), "seed"), "n": (400, dict(n=3), "n"), "tools": (400, dict(tools=[dict(type="function")]), "tools"),
    "odd name": (400, b'{"model": "\\udc00", "messages": [{"role": "user", "content": "x"}]}', "model"), "template": (400, dict(chat_template_kwargs=dict(evil="{{ 1 }}")), "evil"),
}
@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_their_status_and_a_sentence(svc, url, case):
    status, b, says = BAD[case]
    raw = b if isinstance(b, bytes) else json.dumps(body(**b)).encode()
    r = httpx.post(f"{url}/v1/chat/completions", content=raw, headers={"content-type": "application/json"}, timeout=30)
    assert r.status_code == status, r.text
    e = r.json()["error"]
    assert e["code"] == status and says in e["message"] and len(e["message"]) < 600

def test_a_page_elsewhere_cannot_post(url):
    r = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body()), headers={"content-type": "text/plain"})     # what a form of a foreign page may send
    assert r.status_code == 400
    assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}).status_code == 400       # nor reach it under a name of its own

def test_the_server_lives_after_all_that(svc, url): assert answer(post(url, body())) == direct(svc)

def test_fifty_at_once_a_third_hangs_up(svc, url):
    before = dict(svc.sched.total)
    asyncio.run(S.crowd(svc, url, 50, 24)); rss = psutil.Process().memory_info().rss       # the first crowd fills every cache and pool
    got = asyncio.run(S.crowd(svc, url, 50, 24))
    assert got["served_requests_ok_pct"] == 100 and got["left"] == 0 and got["texts"] > 25
    assert svc.sched.made == 3
    assert svc.sched.total["finished_cancelled"] > before.get("finished_cancelled", 0) and not svc.sched.total["finished_error"]
    assert psutil.Process().memory_info().rss - rss < 30*2**20

def test_turns_are_fair(folders):
    svc, seen = service(folders, slots=2), []
    job = lambda i, new: S.Job([40 + i, 41], new, None, 0, 1, 0, [], time.monotonic() + 60, lambda item: seen.append((i, item["finish"])))
    with svc.sched.wake: svc.sched.waiting.extend([job(0, 60), job(1, 10)]); svc.sched.wake.notify()
    while sum(f is not None for _, f in seen) < 2: time.sleep(.005)
    svc.sched.close()
    assert [i for i, _ in seen[:20]] == [0, 1]*10            # the long one does not hold up the short one
    assert seen[19] == (1, "length")

def test_full_queue_and_time_limit(folders):
    svc = service(folders, slots=1, queue=1, limits=S.Limits(seconds=.6))
    slow = svc.sched.turn
    svc.sched.turn = lambda: (time.sleep(.1), slow())
    with S.serving(svc) as url:
        got, ts = [], [threading.Thread(target=lambda: got.append(post(url, body(max_tokens=100)))) for _ in range(4)]
        for t in ts: t.start(); time.sleep(.05)
        for t in ts: t.join()
        status = sorted(r.status_code for r in got)
        assert status == [429, 429, 504, 504], [r.text for r in got]
        busy = next(r for r in got if r.status_code == 429)
        assert busy.headers["retry-after"] and "waiting" in busy.json()["error"]["message"]
        lines = post(url, body(max_tokens=100, stream=True)).text.split("\n\n")
        assert json.loads(lines[-3][6:])["error"]["code"] == 504 and lines[-2] == "data: [DONE]"
        svc.sched.turn = slow
        assert answer(post(url, body())) == direct(svc)

def test_hanging_up_frees_the_place(folders):
    svc = service(folders, slots=1)
    slow = svc.sched.turn
    svc.sched.turn = lambda: (time.sleep(.02), slow())
    with S.serving(svc) as url:
        for streamed in (True, False):
            with pytest.raises(httpx.ReadTimeout): httpx.post(f"{url}/v1/chat/completions", json=body(max_tokens=200, stream=False), timeout=.2) if not streamed else _half(url)
            wait_idle(svc)
        assert svc.sched.total["finished_cancelled"] == 2

def _connect(url, rcvbuf=0):
    host, port = url.removeprefix("http://").split(":")
    s = socket.socket()
    if rcvbuf: s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)          # before connecting: it sets the window
    s.settimeout(20); s.connect((host, int(port)))
    return s

def _rest(s):
    "All that still comes, until the other side ends the connection."
    got = b""
    while True:
        try: part = s.recv(65536)
        except ConnectionError: return got
        if not part: return got
        got += part

def test_readers_who_sleep_hold_up_nobody_and_are_cut(folders, monkeypatch):
    plain_listen = S.listen
    def listen(*a):
        s = plain_listen(*a); s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)   # inherited by every connection, so a full buffer is soon reached
        return s
    monkeypatch.setattr(S, "listen", listen)
    svc = service(folders, limits=S.Limits(patience=3.0))
    live, server = [], S.uvicorn_server
    monkeypatch.setattr(S, "uvicorn_server", lambda *a: live.append(server(*a)) or live[0])
    b = json.dumps(body(max_tokens=150, stream=True, return_steps=True)).encode()
    ask = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(b) + b
    with S.serving(svc) as url:
        with httpx.stream("POST", f"{url}/v1/chat/completions", content=b, headers={"content-type": "application/json"}, timeout=60) as r: whole = len(r.read())
        assert whole > 100_000
        def crowd():
            sleepers = [_connect(url, 4096) for _ in range(8)]
            for s in sleepers: s.sendall(ask)
            for _ in range(1000):
                full = [c for c in live[0].server_state.connections if c.transport.get_write_buffer_size()]
                if len(full) == 8: break
                time.sleep(.01)
            assert len(full) == 8                                  # the kernel takes no more: all eight are really stuck
            assert all(c.transport.get_write_buffer_size() < 64*1024 for c in full)     # and what waits is one chunk, not the answer
            return sleepers
        for _ in range(2):
            sleepers = crowd()
            assert answer(post(url, body())) == direct(svc)        # another is served; idle again: all eight were decoded to the end, read or not
            for _ in range(1000):
                if not any(c.flow.write_paused for c in live[0].server_state.connections): break
                time.sleep(.01)
            for s in sleepers:
                got = _rest(s); s.close()
                assert b" 200 " in got[:20] and len(got) < whole and b"[DONE]" not in got       # cut, not drained when they wake up
            assert svc.sched.total["finished_length"] + svc.sched.total["finished_cancelled"] >= 10
        assert not svc.sched.total["finished_error"] and svc.sched.made <= svc.sched.slots

def test_a_slow_but_steady_reader_gets_everything(folders):
    svc = service(folders, limits=S.Limits(patience=1.0))
    b = json.dumps(body(max_tokens=60, stream=True, return_steps=True)).encode()
    with S.serving(svc) as url, _connect(url, 4096) as s:
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(b) + b)
        got = b""
        while part := s.recv(1500): got += part; time.sleep(.01)
        assert b"[DONE]" in got

def test_who_says_nothing_is_cut(folders):
    svc = service(folders, limits=S.Limits(patience=.4))
    with S.serving(svc) as url:
        silent = [_connect(url) for _ in range(30)]
        silent[0].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc")              # half a head is nothing either
        assert answer(post(url, body())) == direct(svc)
        for s in silent: assert _rest(s) == b""; s.close()

def _half(url):
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body(max_tokens=200, stream=True), timeout=5) as s:
        for _ in zip(range(6), s.iter_lines()): pass
    raise httpx.ReadTimeout("left in the middle")

def test_a_failing_decoder_takes_down_one_request_only(folders):
    svc = service(folders)
    with S.serving(svc) as url:
        commit, svc.dec._commit = svc.dec._commit, lambda *a: 1/0
        r = post(url, body())
        assert r.status_code == 500 and "ZeroDivisionError" in r.json()["error"]["message"]
        svc.dec._commit = commit
        assert answer(post(url, body())) == direct(svc)

def test_no_memory_for_another_cache(folders, monkeypatch):
    svc = service(folders)
    def full(dec): raise MemoryError
    monkeypatch.setattr(S, "twin", full)
    got = []
    for _ in range(3): svc.sched.submit(S.Job([40, 41], 5, None, 0, 1, 0, [], time.monotonic() + 60, lambda item: got.append(item["finish"])))
    for _ in range(500):
        if got.count("length") == 3: break
        time.sleep(.01)
    assert got.count("length") == 3 and svc.sched.slots == 1
    svc.sched.close()

def test_slow_upload_and_lying_length(folders):
    svc = service(folders)
    guard = S.Guard
    S.Guard = lambda app, **kw: guard(app, grace=.3, **kw)
    try:
        with S.serving(svc) as url:
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=5) as s:
                s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{")
                assert b" 408 " in s.recv(300)
            assert answer(post(url, body())) == direct(svc)
    finally: S.Guard = guard

def test_api_key(folders, capsys):
    svc = service(folders)
    with S.serving(svc, api_key="sesame") as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for h in ({}, {"authorization": "Bearer wrong"}, {"authorization": b"Bearer \xff"}):
            r = post(url, body("a"*200_000), headers=h)        # more than one packet: refused before it is read, the client would see a reset connection
            assert r.status_code == 401 and "key" in r.json()["error"]["message"]
        assert answer(post(url, body(), headers={"authorization": "Bearer sesame"})) == direct(svc)

def test_where_it_listens():
    with pytest.raises(UserError, match="TPRO_NB_API_KEY"): S.listen("0.0.0.0", 0)
    with pytest.raises(UserError, match="no such address"): S.listen("nowhere.invalid", 80)
    S.listen("0.0.0.0", 0, "key").close()
    with S.listen("127.0.0.1", 0) as s, pytest.raises(UserError, match="--port"): S.listen("127.0.0.1", s.getsockname()[1])

def test_command(folders, monkeypatch, capsys):
    monkeypatch.delenv("TPRO_NB_API_KEY", raising=False)
    for args, says in ((["x", "--host", "0.0.0.0"], "TPRO_NB_API_KEY"), (["x", "--tree", "3,a"], "--tree"), (["x", "--slots", "0"], "--slots"), (["x", "--port", "99999"], "--port"),
                       (["no/such/model", "--port", "0"], "no/such/model"), ([str(folders[0]), "--draft", str(folders[1]), "--tree", "0,1,1", "--port", "0"], "tree")):
        assert S.main(args) == 2
        assert says in capsys.readouterr().err

def test_overhead_is_small(svc, url):
    assert S.overhead(svc, url, ["Сколько будет 12 + 30?"], 32, 3)["serve_overhead_ms"] < 100       # a toy's own time is too short for a percentage
