"The playground: its arithmetic, its page without a browser (AppTest), and the real page in Chromium where there is one."
import json, os, re, shutil, socket, subprocess, sys, threading, time, warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, psutil, pytest, torch
from streamlit.testing.v1 import AppTest
from tpro_nb import playground as G, server as S
from tpro_nb.core import UserError, read_jsonl
from test_server import talkative

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope="module")
def svc(tmp_path_factory):
    return S.Service(*talkative(tmp_path_factory.mktemp("playground")), name="toy", tree=(3, 4, 8), dtype="float32", context=384, slots=2)

@pytest.fixture(scope="module")
def url(svc):
    with S.serving(svc) as u: yield f"{u}/v1"

@pytest.fixture(scope="module")
def dying():
    "A chat server that sends two pieces of text, HTML among them, and drops the connection."
    class H(BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self): self.answer(b'{"object": "list", "data": [{"id": "dying", "object": "model", "created": 0, "owned_by": "x"}]}', "application/json")
        def answer(self, b, kind): self.send_response(200); self.send_header("content-type", kind); self.send_header("content-length", str(len(b))); self.end_headers(); self.wfile.write(b)
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200); self.send_header("content-type", "text/event-stream"); self.send_header("transfer-encoding", "chunked"); self.end_headers()
            for text in ("Начало <img src=x onerror=alert(1)> ", "[ссылка](javascript:alert(1)) $x$"):
                b = f'data: {json.dumps(dict(id="1", object="chat.completion.chunk", created=0, model="dying", choices=[dict(index=0, delta=dict(content=text))]))}\n\n'.encode()
                self.wfile.write(f"{len(b):x}\r\n".encode() + b + b"\r\n"); self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
    server = ThreadingHTTPServer(("127.0.0.1", 0), H)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()

def app():
    from tpro_nb.playground import page
    page()

@pytest.fixture
def at(url, monkeypatch):
    def make(**cfg):
        monkeypatch.setenv("TPRO_NB_PLAYGROUND", json.dumps(dict(left=dict(url=url, model="toy-plain"), right=dict(url=url, model="toy")) | cfg))
        return AppTest.from_function(app, default_timeout=20).run()
    return make

def settle(a):
    "Run the page again until nothing is running, as the fragment does in a browser."
    for _ in range(200):
        if not any(p.running for p in a.session_state.panes): return a.run()
        time.sleep(.03)
    raise AssertionError("still running")

def htmls(a): return [h.proto.body for h in a.get("html")]
def plain(h): return re.sub(r"<style>.*?</style>|<[^>]+>", "", h, flags=re.S)
def names(a): return [plain(h) for h in htmls(a) if 'class="who"' in h]
def ok(a): assert not a.exception, a.exception; return a

# ---------------------------------------------------------------- without a page
def test_pane_gets_the_servers_text_and_telemetry(svc, url):
    s = dict(url=url, model="toy", key="", mode="direct", temperature=0.0, top_p=1.0, max_tokens=40, seed=0, stop=[], steps=True)
    p = G.Pane(s, "Привет"); G.ask(p)
    ids = svc.ids([S.Message(role="user", content="Привет")], False)
    with torch.inference_mode(): own = svc.tok.decode(S.twin(svc.dec).generate(ids, 40, eos=svc.sched.eos), skip_special_tokens=True)
    assert p.status == "done" and "".join(t for t, _ in G.spans(p.rows)) == own
    seen = G.telemetry(p.rows, p.meta, p.tokens, p.seconds)
    assert seen["tokens"] == p.meta["completion_tokens"] and 0 < seen["ttft_s"] < seen["latency_s"]
    steps = p.meta["spec_verify_ct"]
    assert seen["acceptance_length"] == pytest.approx((seen["tokens"] - 1)/steps)              # the first token belongs to no verification step
    assert seen["acceptance_rate_pct"] == pytest.approx(100*p.meta["spec_num_correct_drafts"]/p.meta["spec_num_proposed_drafts"])
    q = G.Pane(s | dict(steps=False), "Привет"); G.ask(q)                                       # what a server without step rows lets one know
    assert "".join(t for t, _ in G.spans(q.rows)) == own and {k for _, k in G.spans(q.rows)} == {"plain"}
    assert G.telemetry(q.rows, q.meta, q.tokens, q.seconds)["acceptance_length"] == pytest.approx(p.meta["spec_accept_length"])

@pytest.mark.parametrize("kw, says", [(dict(model="nobody"), "404"), (dict(url="http://127.0.0.1:9/v1"), "no server answers"), (dict(url="not a url"), "not a url"), (dict(max_tokens=10**6), "400")])
def test_errors_are_told(url, kw, says):
    p = G.Pane(dict(url=url, model="toy", mode="direct", temperature=0.0, top_p=1.0, max_tokens=4, seed=0, stop=[], steps=True) | kw, "x"); G.ask(p)
    assert p.status == "error" and says in p.error and p.rows == []

def test_a_server_that_dies_keeps_what_came(dying):
    p = G.Pane(dict(url=dying, model="dying", mode="direct", temperature=0.0, top_p=1.0, max_tokens=4, seed=0, stop=[], steps=True), "x"); G.ask(p)
    assert p.status == "error" and p.error and len(p.rows) == 2
    page = G.shown(p.rows)
    assert "<img" not in page and "&lt;img" in page

def test_nobody_looks_then_it_hangs_up(svc, url):
    p = G.Pane(dict(url=url, model="toy", mode="direct", temperature=0.0, top_p=1.0, max_tokens=200, seed=0, stop=[], steps=True), "x")
    p.looked -= 100; G.ask(p)
    assert p.status == "stopped" and len(p.rows) < 5

def test_shipped_recording():
    f = G.shipped()
    assert f.stat().st_size < 300*1024
    for name, sides in G.recordings(f).items():
        for head, rows in sides.values():
            assert rows[0]["at_s"] == 0 and [r["at_s"] for r in rows] == sorted(r["at_s"] for r in rows)
            assert G.telemetry(rows)["tokens"] == sum(len(r["pieces"]) for r in rows) and "http" not in json.dumps(head)
        text = lambda s: "".join(t for t, _ in G.spans(sides[s][1]))
        if "plain" in (sides["left"][0]["settings"]["decoding"]): assert text("left") == text("right")          # a draft changes no text

def test_bad_recordings(tmp_path):
    for text, says in (("{}\n", "line 1"), ('{"episode": 1, "side": "left", "pieces": [], "at_s": 0}\n', "line 1"), ("not json\n", "line 1"), ("", "left and a right"),
                       ('{"episode": "a", "side": "left", "prompt": "x", "settings": {}}\n', "left and a right")):
        (tmp_path/"r.jsonl").write_text(text)
        with pytest.raises(UserError, match=says): G.recordings(tmp_path/"r.jsonl")

def test_saved_session_plays_again(url, tmp_path):
    s = dict(url=url, model="toy", key="secret", mode="direct", temperature=0.0, top_p=1.0, max_tokens=12, seed=0, stop=[], steps=True)
    panes = [G.Pane(s | dict(model=m), "Привет") for m in ("toy-plain", "toy")]
    for p in panes: G.ask(p)
    (tmp_path/"s.jsonl").write_text(G.saved(panes, "мой"))
    assert "secret" not in (tmp_path/"s.jsonl").read_text()
    sides = G.recordings(tmp_path/"s.jsonl")["мой"]
    assert [G.shown(sides[s][1]) for s in ("left", "right")] == [G.shown(p.rows) for p in panes]

def test_bradley_terry_against_another_fit():
    rng, truth = np.random.default_rng(0), dict(a=1.0, b=0.0, c=-1.0)
    votes = []
    for _ in range(3000):
        l, r = rng.choice(list(truth), 2, replace=False)
        votes.append(dict(left=l, right=r, winner="left" if rng.random() < 1/(1 + np.exp(truth[r] - truth[l])) else "right"))
    got = {r["model"]: r for r in G.bradley_terry(votes)}
    from sklearn.linear_model import LogisticRegression
    X = np.array([[(v["left"] == n) - (v["right"] == n) for n in "abc"] for v in votes], float)
    ref = LogisticRegression(fit_intercept=False, C=9.0, tol=1e-8).fit(X, [v["winner"] == "left" for v in votes]).coef_[0]
    assert [got[n]["strength"] for n in "abc"] == pytest.approx(ref - ref.mean(), abs=1e-3)
    assert all(got[n]["strength_lo"] < truth[n] < got[n]["strength_hi"] for n in "abc") and G.bradley_terry([]) == []

# ---------------------------------------------------------------- the page, no browser
def test_both_panes_stream_and_agree(at):
    a = ok(at())
    a.number_input("left_max_tokens").set_value(40); a.number_input("right_max_tokens").set_value(40)
    a.text_area("prompt").set_value("Сколько будет <b>12</b> + 30?"); ok(a.button("run").click().run())
    a = ok(settle(a))
    left, right = a.session_state.panes
    assert [p.status for p in (left, right)] == ["done", "done"] and len(right.rows) <= len(left.rows)
    kinds = [k for _, k in G.spans(right.rows)]
    assert kinds.count("accepted") == sum(r["drafted"] for r in right.rows) > 0 and kinds.count("bonus") >= len(right.rows) - 2 and {k for _, k in G.spans(left.rows)} == {"plain"}
    assert "".join(t for t, _ in G.spans(left.rows)) == "".join(t for t, _ in G.spans(right.rows)) != ""
    labels = [m.label for m in a.metric]
    assert labels == [G.TEXT["ru"][k] for k in G.telemetry([])]*2
    assert a.metric[5].value == "–" and float(a.metric[12].value) >= 1                            # acceptance length: none when plain
    assert any('class="accepted"' in h or 'class="bonus"' in h for h in htmls(a)) and any('class="tree"' in h for h in htmls(a))
    assert '"model": "toy"' in a.code[1].value and "key" not in a.code[1].value
    a.toggle("colours").set_value(False); ok(a.run())
    assert not any('class="accepted"' in h for h in htmls(a) if 'class="tp"' in h)

def test_english_thinking_and_presets(at):
    a = ok(at()); a.radio("lang").set_value("en"); ok(a.run())
    assert a.title[0].value == "Two answers side by side"
    a.selectbox("domain").set_value("code"); ok(a.run())
    a.selectbox("preset").set_value(G.PRESETS["code"]["en"][0]); ok(a.run())
    assert a.text_area("prompt").value == G.PRESETS["code"]["en"][0]
    assert a.radio("left_mode").value == "think"
    a.button("run").click(); ok(a.run())
    assert a.session_state.panes[0].settings["mode"] == "think"
    ok(settle(a))

def test_maths_presets_come_from_the_runs_tmath(at, tmp_path):
    f = tmp_path/"04_tmath"/"test.jsonl"; f.parent.mkdir()
    f.write_text("".join(json.dumps(dict(question=f"Задача <b>{i}</b>", verifiable_answer="1")) + "\n" for i in range(20)))
    cfg = G.settle(G.parser().parse_args(["--run", str(tmp_path), "--left", "http://127.0.0.1:9/v1"]))[0]
    assert cfg["tmath"] == str(f)
    a = ok(at(tmath=cfg["tmath"])); a.selectbox("domain").set_value("maths"); ok(a.run())
    found = a.selectbox("preset").options
    assert found == [f"Задача <b>{i}</b>" for i in range(0, 16, 2)]      # spread over the file
    a.selectbox("preset").set_value(found[3]); ok(a.run())
    assert a.text_area("prompt").value == found[3]
    assert G.presets("en", str(f))["maths"] == G.PRESETS["maths"]["en"] and G.presets("ru", str(tmp_path/"no"))["maths"] == G.PRESETS["maths"]["ru"]

def test_dead_and_dying_endpoints(at, dying):
    a = ok(at(left=dict(url="http://127.0.0.1:9/v1"), right=dict(url=dying)))
    assert any(G.TEXT["ru"]["nobody"] == c.value for c in a.caption)
    a.text_area("prompt").set_value("x"); ok(a.button("run").click().run()); a = ok(settle(a))
    assert len(a.error) == 2 and "no server answers" in a.text[0].value
    assert any("Начало &lt;img" in h for h in htmls(a)) and not any("<img" in h for h in htmls(a))

def test_stop(at, svc):
    slow, svc.sched.turn = svc.sched.turn, lambda: (time.sleep(.03), slow())
    try:
        a = ok(at())
        for s in ("left", "right"): a.number_input(f"{s}_max_tokens").set_value(250)
        a.text_area("prompt").set_value("Расскажи"); ok(a.button("run").click().run()); time.sleep(.3)
        ok(a.button("halt").click().run())
        assert {p.status for p in a.session_state.panes} == {"stopped"}
        for _ in range(200):
            if not svc.sched.busy: break
            time.sleep(.02)
        assert not svc.sched.busy and svc.sched.total["finished_cancelled"] >= 2            # the server stopped as well
    finally: svc.sched.turn = slow

def test_one_after_the_other(at, svc):
    slow, svc.sched.turn = svc.sched.turn, lambda: (time.sleep(.01), slow())
    try:
        a = ok(at()); a.toggle("turns").set_value(True); ok(a.run())
        for s in ("left", "right"): a.number_input(f"{s}_max_tokens").set_value(30)
        a.text_area("prompt").set_value("Привет"); ok(a.button("run").click().run()); time.sleep(.15)
        left, right = a.session_state.panes
        assert left.running and left.rows and right.running and not right.rows
        a = ok(settle(a))
        assert right.rows[0]["at_s"] < left.seconds                                            # the wait is not counted
    finally: svc.sched.turn = slow

def test_replay_needs_no_model(monkeypatch):
    monkeypatch.setenv("TPRO_NB_PLAYGROUND", "{}")
    a = ok(AppTest.from_function(app, default_timeout=20).run())
    assert a.radio("source").value == "replay"
    a.selectbox("speed").set_value(0.0); ok(a.button("play").click().run()); ok(a.run())
    assert [p.status for p in a.session_state.panes] == ["done", "done"]
    assert float(a.metric[12].value) > 1 and any("Ответ" in plain(h) for h in htmls(a)) and a.expander[0].label == "Размышление"
    a.text_input("file").set_value("/no/such/file.jsonl"); ok(a.run())
    assert "cannot read" in a.error[0].value
    p = G.Playback({}, "", rows=[dict(at_s=0.0), dict(at_s=60.0)]); assert len(p.visible()) == 1
    p.speed = 10**5; time.sleep(.01); assert len(p.visible()) == 2 and p.status == "done"

def test_blind_vote(at, tmp_path):
    f = tmp_path/"votes.jsonl"
    for n, written in enumerate(("", str(f), str(f))):
        a = ok(at()); a.toggle("blind").set_value(True); ok(a.run())
        a.text_area("prompt").set_value("тайный вопрос"); ok(a.button("run").click().run()); a = ok(settle(a))
        assert names(a) == ["Модель A", "Модель B"] and not a.metric and not any('class="accepted"' in h for h in htmls(a))
        a.text_input("votes").set_value(written); a.checkbox("keep").set_value(n == 2); ok(a.run())
        ok(a.button("vote_left").click().run())
        assert {n.split(" ")[0] for n in names(a)} == {"toy", "toy-plain"} and a.success
        assert f.exists() == bool(written)
    first, second = read_jsonl(f)
    assert "prompt" not in first and second["prompt"] == "тайный вопрос" and first["winner"] == "left" and {first["left"], first["right"]} == {"toy (think)", "toy-plain (think)"}
    assert len(a.dataframe) == 1 and "key" not in first["settings"][0]

def test_command(capsys, monkeypatch, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        for args, says in ((["--port", str(s.getsockname()[1]), "--run", "none"], "--port"), (["--replay", "nope.jsonl"], "nope.jsonl")):
            assert G.main(args) == 2 and says in capsys.readouterr().err
    assert G.pair_of_run(tmp_path) is None

def test_sigterm_leaves_no_orphans():
    p = subprocess.Popen([sys.executable, "-m", "tpro_nb.playground", "--run", "none", "--port", str(G.free_port())], stdout=subprocess.PIPE, text=True)
    assert "http://127.0.0.1" in p.stdout.readline()
    children = psutil.Process(p.pid).children(recursive=True); assert children
    p.terminate(); p.wait(timeout=20)
    assert not psutil.wait_procs(children, timeout=5)[1]

# ---------------------------------------------------------------- the page, in Chromium
CHROMIUM = next((c for n in ("chromium", "chromium-browser", "google-chrome") if (c := shutil.which(n))), None)

@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        warnings.warn("NOT TESTED: the playground in a browser, as there is no Chromium on PATH (apt install chromium)")     # pytest prints it even with -q
        pytest.skip("no Chromium on PATH (apt install chromium)")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield b
        b.close()

def test_in_a_browser(browser, svc, url, dying, tmp_path):
    port = G.free_port()
    page_ = G.open_page(dict(left=dict(url=url, model="toy-plain", mode="direct"), right=dict(url=url, model="toy", mode="direct")), port)
    slow, shots = svc.sched.turn, os.environ.get("TPRO_NB_SHOTS")
    page = browser.new_page(viewport=dict(width=1400, height=1250)); page.set_default_timeout(20_000)
    shot = lambda n: page.screenshot(path=f"{shots}/{n}.png") if shots else None
    alerts = []; page.on("dialog", lambda d: (alerts.append(d.message), d.dismiss()))
    try:
        for _ in range(200):
            try: page.goto(f"http://127.0.0.1:{port}"); break
            except Exception: time.sleep(.1)
        page.get_by_label("Вопрос", exact=True).fill("Сколько будет 12 + 30? <script>alert(1)</script>"); page.get_by_role("button", name="Спросить").click()
        page.get_by_text("Длина принятия").nth(1).wait_for(); page.get_by_role("button", name="Сохранить как запись").wait_for()
        page.wait_for_function("document.querySelectorAll('.tp .bonus').length > 0"); shot("live")
        page.wait_for_function("(t => t.length && t.join('').trim() && t.slice(0, t.length/2).join('|') == t.slice(t.length/2).join('|'))([...document.querySelectorAll('p.tp')].map(p => p.textContent))")
        page.get_by_text("Окрасить токены").click()                                              # a toggle
        page.wait_for_function("document.querySelectorAll('.tp .bonus').length == 0")
        svc.sched.turn = lambda: (time.sleep(.05), slow())                                       # a stop
        page.get_by_role("button", name="Спросить").click(); time.sleep(.8); page.get_by_role("button", name="Остановить").click()
        page.get_by_text("Остановлено").nth(1).wait_for(); svc.sched.turn = slow
        page.get_by_text("Настройки", exact=True).first.click()                                  # an endpoint that dies
        page.get_by_label("Адрес сервера").nth(1).fill(dying); page.get_by_label("Адрес сервера").nth(1).press("Enter"); time.sleep(.7)
        page.get_by_role("button", name="Спросить").click(); page.get_by_text("Ошибка", exact=True).wait_for()
        page.get_by_text("<img src=x onerror=alert(1)>").wait_for(); shot("dead")
        page.get_by_text("Запись", exact=True).click(); page.get_by_role("button", name="Воспроизвести").click()      # a recording
        page.get_by_role("button", name="Сохранить как запись").wait_for(); page.get_by_text("Окрасить токены").click()
        page.wait_for_function("document.querySelectorAll('.tp .accepted').length > 0"); shot("replay")
        assert page.get_by_text(re.compile(r"Ответ: \d")).count() == 2 and not alerts
    finally:
        svc.sched.turn = slow; page.close(); page_.terminate(); page_.wait(timeout=10)
