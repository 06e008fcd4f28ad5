"""The playground: its arithmetic, its page without a browser (AppTest), and the real page in
Chromium where there is one."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from streamlit.testing.v1 import AppTest
from test_server import slow_turns, talkative, wait_until

from tpro_nb.chat_service import Message, Service, ServiceSettings
from tpro_nb.core import UserError, read_jsonl
from tpro_nb.panes import (
    SIDES,
    Pane,
    PaneSettings,
    Playback,
    answer_html,
    fill_pane,
    read_replay,
    session_replay,
    shipped_replay,
    telemetry,
    text_of_rows,
    token_spans,
)
from tpro_nb.playground import (
    PAGE_TEXT,
    PRESETS,
    free_port,
    open_page,
    page_config,
    pair_of_run,
    playground_command,
    playground_parser,
    preset_questions,
)
from tpro_nb.scheduler import twin
from tpro_nb.server import serving
from tpro_nb.votes import bradley_terry

RU = PAGE_TEXT["ru"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def svc(tmp_path_factory):
    target, draft = talkative(tmp_path_factory.mktemp("playground"))
    return Service(
        ServiceSettings(
            target, draft, name="toy", tree=(3, 4, 8), dtype="float32", context=384, slots=2
        )
    )


@pytest.fixture(scope="module")
def url(svc):
    with serving(svc) as address:
        yield f"{address}/v1"


class DyingServer(BaseHTTPRequestHandler):
    "Sends two pieces of text, HTML among them, and drops the connection."

    MODEL = dict(id="dying", object="model", created=0, owned_by="x")
    TEXTS = ("Начало <img src=x onerror=alert(1)> ", "[ссылка](javascript:alert(1)) $x$")

    def log_message(self, *args):
        pass

    def do_GET(self):
        content = json.dumps(dict(object="list", data=[self.MODEL])).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for text in self.TEXTS:
            chunk = dict(
                id="1",
                object="chat.completion.chunk",
                created=0,
                model="dying",
                choices=[dict(index=0, delta=dict(content=text))],
            )
            line = f"data: {json.dumps(chunk)}\n\n".encode()
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def dying():
    server = ThreadingHTTPServer(("127.0.0.1", 0), DyingServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def app():
    from tpro_nb.playground import page

    page()


@pytest.fixture
def open_app(url, monkeypatch):
    "The page on the fair pair, or as the keyword arguments say."

    def make(**config):
        pair = dict(left=dict(url=url, model="toy-plain"), right=dict(url=url, model="toy"))
        monkeypatch.setenv("TPRO_NB_PLAYGROUND", json.dumps(pair | config))
        return ok(AppTest.from_function(app, default_timeout=20).run())

    return make


def ok(page):
    assert not page.exception, page.exception
    return page


def settled(page):
    "Run the page again until nothing is running, as the fragment does in a browser."
    panes = page.session_state.panes
    assert wait_until(lambda: not any(pane.running for pane in panes), 6), "still running"
    return ok(page.run())


def press(page, key):
    return ok(page.button(key).click().run())


def ask(page, question):
    page.text_area("prompt").set_value(question)
    return press(page, "run")


def limit_tokens(page, most):
    for side in SIDES:
        page.number_input(f"{side}_max_tokens").set_value(most)


def htmls(page):
    return [element.proto.body for element in page.get("html")]


def plain(markup):
    return re.sub(r"<style>.*?</style>|<[^>]+>", "", markup, flags=re.S)


def names(page):
    return [plain(markup) for markup in htmls(page) if 'class="who"' in markup]


def coloured(markup):
    return 'class="accepted"' in markup or 'class="bonus"' in markup


def pane_settings(url, **changes):
    usual = PaneSettings(
        url=url,
        model="toy",
        key="",
        mode="direct",
        temperature=0.0,
        top_p=1.0,
        max_tokens=4,
        seed=0,
        stop=[],
        steps=True,
    )
    return usual | changes


def kinds(rows):
    return Counter(span.kind for span in token_spans(rows))


# ---------------------------------------------------------------- without a page
def test_pane_gets_the_servers_text_and_telemetry(svc, url):
    settings = pane_settings(url, max_tokens=40)
    pane = Pane(settings, "Привет")
    fill_pane(pane)
    prompt = svc.ids([Message(role="user", content="Привет")], False)
    with torch.inference_mode():
        tokens = twin(svc.dec).generate(prompt, 40, eos=svc.sched.eos)
    own = svc.tok.decode(tokens, skip_special_tokens=True)
    assert pane.status == "done"
    assert text_of_rows(pane.rows) == own
    seen = telemetry(pane.rows, pane.meta, pane.tokens, pane.seconds)
    assert seen["tokens"] == pane.meta["completion_tokens"]
    assert 0 < seen["ttft_s"] < seen["latency_s"]
    # the first token belongs to no verification step
    steps = pane.meta["spec_verify_ct"]
    assert seen["acceptance_length"] == pytest.approx((seen["tokens"] - 1) / steps)
    rate = pane.meta["spec_num_correct_drafts"] / pane.meta["spec_num_proposed_drafts"]
    assert seen["acceptance_rate_pct"] == pytest.approx(100 * rate)
    # what a server without step rows lets one know
    silent = Pane(settings | dict(steps=False), "Привет")
    fill_pane(silent)
    assert text_of_rows(silent.rows) == own
    assert set(kinds(silent.rows)) == {"plain"}
    seen = telemetry(silent.rows, silent.meta, silent.tokens, silent.seconds)
    assert seen["acceptance_length"] == pytest.approx(pane.meta["spec_accept_length"])


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(model="nobody"), "404"),
        (dict(url="http://127.0.0.1:9/v1"), "no server answers"),
        (dict(url="not a url"), "not a url"),
        (dict(max_tokens=10**6), "400"),
    ],
)
def test_errors_are_told(url, wrong, says):
    pane = Pane(pane_settings(url) | wrong, "x")
    fill_pane(pane)
    assert pane.status == "error"
    assert says in pane.error
    assert pane.rows == []


def test_a_server_that_dies_keeps_what_came(dying):
    pane = Pane(pane_settings(dying, model="dying"), "x")
    fill_pane(pane)
    assert pane.status == "error"
    assert pane.error
    assert len(pane.rows) == 2
    drawn = answer_html(pane.rows)
    assert "<img" not in drawn
    assert "&lt;img" in drawn


def test_nobody_looks_then_it_hangs_up(svc, url):
    pane = Pane(pane_settings(url, max_tokens=200), "x")
    pane.looked -= 100
    fill_pane(pane)
    assert pane.status == "stopped"
    assert len(pane.rows) < 5


def test_shipped_recording():
    file = shipped_replay()
    assert file.stat().st_size < 300 * 1024
    for sides in read_replay(file).values():
        for head, rows in sides.values():
            times = [row["at_s"] for row in rows]
            assert times[0] == 0
            assert times == sorted(times)
            assert telemetry(rows)["tokens"] == sum(len(row["pieces"]) for row in rows)
            assert "http" not in json.dumps(head)
        left, right = sides["left"], sides["right"]
        if "plain" in left.head["settings"]["decoding"]:
            # a draft changes no text
            assert text_of_rows(left.rows) == text_of_rows(right.rows)


def test_bad_recordings(tmp_path):
    file = tmp_path / "r.jsonl"
    for text, says in (
        ("{}\n", "line 1"),
        ('{"episode": 1, "side": "left", "pieces": [], "at_s": 0}\n', "line 1"),
        ("not json\n", "line 1"),
        ("", "left and a right"),
        ('{"episode": "a", "side": "left", "prompt": "x", "settings": {}}\n', "left and a right"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            read_replay(file)


def test_saved_session_plays_again(url, tmp_path):
    settings = pane_settings(url, key="secret", max_tokens=12)
    panes = [Pane(settings | dict(model=model), "Привет") for model in ("toy-plain", "toy")]
    for pane in panes:
        fill_pane(pane)
    file = tmp_path / "s.jsonl"
    file.write_text(session_replay(panes, "мой"))
    assert "secret" not in file.read_text()
    sides = read_replay(file)["мой"]
    for side, pane in zip(SIDES, panes):
        assert answer_html(sides[side].rows) == answer_html(pane.rows)


def test_bradley_terry_against_another_fit():
    rng = np.random.default_rng(0)
    truth = dict(a=1.0, b=0.0, c=-1.0)
    votes = []
    for _ in range(3000):
        left, right = rng.choice(list(truth), 2, replace=False)
        left_wins = rng.random() < 1 / (1 + np.exp(truth[right] - truth[left]))
        votes.append(dict(left=left, right=right, winner="left" if left_wins else "right"))
    got = {row["model"]: row for row in bradley_terry(votes)}

    def design_row(vote):
        return [(vote["left"] == name) - (vote["right"] == name) for name in truth]

    design = np.array([design_row(vote) for vote in votes], float)
    won = [vote["winner"] == "left" for vote in votes]
    fit = LogisticRegression(fit_intercept=False, C=9.0, tol=1e-8).fit(design, won)
    expected = fit.coef_[0] - fit.coef_[0].mean()
    strengths = [got[name]["strength"] for name in truth]
    assert strengths == pytest.approx(expected, abs=1e-3)
    for name, strength in truth.items():
        assert got[name]["strength_lo"] < strength < got[name]["strength_hi"]
    assert bradley_terry([]) == []


# ---------------------------------------------------------------- the page, no browser
def test_both_panes_stream_and_agree(open_app):
    page = open_app()
    limit_tokens(page, 40)
    page = settled(ask(page, "Сколько будет <b>12</b> + 30?"))
    left, right = page.session_state.panes
    assert [left.status, right.status] == ["done", "done"]
    assert len(right.rows) <= len(left.rows)
    drafted = sum(row["drafted"] for row in right.rows)
    assert kinds(right.rows)["accepted"] == drafted > 0
    assert kinds(right.rows)["bonus"] >= len(right.rows) - 2
    assert set(kinds(left.rows)) == {"plain"}
    assert text_of_rows(left.rows) == text_of_rows(right.rows) != ""
    labels = [metric.label for metric in page.metric]
    assert labels == [RU[name] for name in telemetry([])] * 2
    # acceptance length: none when plain
    assert page.metric[5].value == "–"
    assert float(page.metric[12].value) >= 1
    assert any(coloured(markup) for markup in htmls(page))
    assert any('class="tree"' in markup for markup in htmls(page))
    assert '"model": "toy"' in page.code[1].value
    assert "key" not in page.code[1].value
    page.toggle("colours").set_value(False)
    ok(page.run())
    answers = [markup for markup in htmls(page) if 'class="tp"' in markup]
    assert not any('class="accepted"' in markup for markup in answers)


def test_english_thinking_and_presets(open_app):
    page = open_app()
    page.radio("lang").set_value("en")
    ok(page.run())
    assert page.title[0].value == "Two answers side by side"
    page.selectbox("domain").set_value("code")
    ok(page.run())
    question = PRESETS["code"]["en"][0]
    page.selectbox("preset").set_value(question)
    ok(page.run())
    assert page.text_area("prompt").value == question
    assert page.radio("left_mode").value == "think"
    press(page, "run")
    assert page.session_state.panes[0].settings["mode"] == "think"
    settled(page)


def test_maths_presets_come_from_the_runs_tmath(open_app, tmp_path):
    file = tmp_path / "04b_tmath" / "test.jsonl"
    file.parent.mkdir()
    questions = [f"Задача <b>{number}</b>" for number in range(20)]
    rows = [dict(question=question, verifiable_answer="1") for question in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--run", str(tmp_path), "--left", "http://127.0.0.1:9/v1"]
    config, _ = page_config(playground_parser().parse_args(args))
    assert config["tmath"] == str(file)
    page = open_app(tmath=config["tmath"])
    page.selectbox("domain").set_value("maths")
    ok(page.run())
    found = page.selectbox("preset").options
    assert found == questions[0:16:2]  # spread over the file
    page.selectbox("preset").set_value(found[3])
    ok(page.run())
    assert page.text_area("prompt").value == found[3]
    assert preset_questions("en", str(file))["maths"] == PRESETS["maths"]["en"]
    assert preset_questions("ru", str(tmp_path / "no"))["maths"] == PRESETS["maths"]["ru"]


def test_dead_and_dying_endpoints(open_app, dying):
    page = open_app(left=dict(url="http://127.0.0.1:9/v1"), right=dict(url=dying))
    assert any(caption.value == RU["nobody"] for caption in page.caption)
    page = settled(ask(page, "x"))
    assert len(page.error) == 2
    assert "no server answers" in page.text[0].value
    assert any("Начало &lt;img" in markup for markup in htmls(page))
    assert not any("<img" in markup for markup in htmls(page))


def test_stop(open_app, svc):
    with slow_turns(svc, 0.03):
        page = open_app()
        limit_tokens(page, 250)
        ask(page, "Расскажи")
        time.sleep(0.3)
        press(page, "halt")
        assert {pane.status for pane in page.session_state.panes} == {"stopped"}
        # the server stopped as well
        assert wait_until(lambda: not svc.sched.busy, 4)
        assert svc.sched.total["finished_cancelled"] >= 2


def test_one_after_the_other(open_app, svc):
    with slow_turns(svc, 0.01):
        page = open_app()
        page.toggle("turns").set_value(True)
        ok(page.run())
        limit_tokens(page, 30)
        ask(page, "Привет")
        time.sleep(0.15)
        left, right = page.session_state.panes
        assert left.running
        assert left.rows
        assert right.running
        assert not right.rows
        settled(page)
        assert right.rows[0]["at_s"] < left.seconds  # the wait is not counted


def test_replay_needs_no_model(monkeypatch):
    monkeypatch.setenv("TPRO_NB_PLAYGROUND", "{}")
    page = ok(AppTest.from_function(app, default_timeout=20).run())
    assert page.radio("source").value == "replay"
    page.selectbox("speed").set_value(0.0)
    press(page, "play")
    ok(page.run())
    assert [pane.status for pane in page.session_state.panes] == ["done", "done"]
    assert float(page.metric[12].value) > 1
    assert any("Ответ" in plain(markup) for markup in htmls(page))
    assert page.expander[0].label == "Размышление"
    page.text_input("file").set_value("/no/such/file.jsonl")
    ok(page.run())
    assert "cannot read" in page.error[0].value


def test_playback_goes_by_the_clock():
    playback = Playback({}, "", rows=[dict(at_s=0.0), dict(at_s=60.0)])
    assert len(playback.visible()) == 1
    playback.speed = 10**5
    time.sleep(0.01)
    assert len(playback.visible()) == 2
    assert playback.status == "done"


def test_blind_vote(open_app, tmp_path):
    file = tmp_path / "votes.jsonl"
    for written, with_prompt in (("", False), (str(file), False), (str(file), True)):
        page = open_app()
        page.toggle("blind").set_value(True)
        ok(page.run())
        page = settled(ask(page, "тайный вопрос"))
        assert names(page) == ["Модель A", "Модель B"]
        assert not page.metric
        assert not any('class="accepted"' in markup for markup in htmls(page))
        page.text_input("votes").set_value(written)
        page.checkbox("keep").set_value(with_prompt)
        ok(page.run())
        press(page, "vote_left")
        assert {name.split(" ")[0] for name in names(page)} == {"toy", "toy-plain"}
        assert page.success
        assert file.exists() == bool(written)
    first, second = read_jsonl(file)
    assert "prompt" not in first
    assert second["prompt"] == "тайный вопрос"
    assert first["winner"] == "left"
    assert {first["left"], first["right"]} == {"toy (think)", "toy-plain (think)"}
    assert len(page.dataframe) == 1
    assert "key" not in first["settings"][0]


def test_command(capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for args, says in (
            (["--port", port, "--run", "none"], "--port"),
            (["--replay", "nope.jsonl"], "nope.jsonl"),
        ):
            assert playground_command(args) == 2
            assert says in capsys.readouterr().err
    assert pair_of_run(tmp_path) is None


def handshake(port, host, origin):
    "The status with which the page's websocket answers a browser that sends these."
    key = base64.b64encode(os.urandom(16)).decode()
    head = [
        "GET /_stcore/stream HTTP/1.1",
        f"Host: {host}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
    ]
    if origin:
        head.append(f"Origin: {origin}")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall("\r\n".join([*head, "", ""]).encode())
        return int(sock.recv(200).split()[1])


def test_the_websocket_is_for_the_page_itself():
    port = free_port()
    streamlit = open_page({}, port)

    def listens():
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    numbers, name = f"127.0.0.1:{port}", f"localhost:{port}"
    foreign, lookalike = f"evil.example:{port}", f"127.0.0.1.evil.example:{port}"
    try:
        assert wait_until(listens, 20)
        for own in (numbers, name, name.upper()):
            assert handshake(port, own, f"http://{own.lower()}") == 101
        assert handshake(port, numbers, None) == 101  # no browser
        # a page that gave itself this address, and one that did not
        for host in (foreign, lookalike):
            assert handshake(port, host, f"http://{host}") == 403
            assert handshake(port, host, None) == 403
            assert handshake(port, numbers, f"http://{host}") == 403
        assert handshake(port, foreign, f"http://{name}") == 403
        assert handshake(port, numbers, "null") == 403
    finally:
        streamlit.terminate()
        streamlit.wait(timeout=10)


def test_sigterm_leaves_no_orphans():
    command = [sys.executable, "-m", "tpro_nb.playground"]
    command += ["--run", "none", "--port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "http://127.0.0.1" in process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.terminate()
    process.wait(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


# ---------------------------------------------------------------- the page, in Chromium
def chromium() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    return None


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    path = chromium()
    if path is None:
        # a warning is printed even with -q
        warnings.warn(
            "NOT TESTED: the playground in a browser, as there is no Chromium on PATH "
            "(apt install chromium)",
            stacklevel=1,
        )
        pytest.skip("no Chromium on PATH (apt install chromium)")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


BOTH_SIDES_AGREE = """
(texts => texts.length && texts.join('').trim()
    && texts.slice(0, texts.length/2).join('|') == texts.slice(texts.length/2).join('|'))
([...document.querySelectorAll('p.tp')].map(p => p.textContent))
"""


def goto_when_up(page, address):
    for _ in range(200):
        try:
            page.goto(address)
            return
        except Exception:
            time.sleep(0.1)


@pytest.fixture
def browser_page(browser, url):
    "The page on the fair pair; what its scripts want to alert is in `page.alerts`."
    port = free_port()
    sides = {
        "left": dict(url=url, model="toy-plain", mode="direct"),
        "right": dict(url=url, model="toy", mode="direct"),
    }
    streamlit = open_page(sides, port)
    page = browser.new_page(viewport=dict(width=1400, height=1250))
    page.set_default_timeout(20_000)
    page.alerts = []

    def dismiss(dialog):
        page.alerts.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    try:
        goto_when_up(page, f"http://127.0.0.1:{port}")
        yield page
    finally:
        page.close()
        streamlit.terminate()
        streamlit.wait(timeout=10)


def test_in_a_browser(browser_page, svc, dying):
    page = browser_page
    shots = os.environ.get("TPRO_NB_SHOTS")

    def shot(name):
        if shots:
            page.screenshot(path=f"{shots}/{name}.png")

    def click(name):
        page.get_by_role("button", name=name).click()

    def wait_for_marks(kind, how_many):
        page.wait_for_function(f"document.querySelectorAll('.tp .{kind}').length {how_many}")

    # live models
    question = page.get_by_label("Вопрос", exact=True)
    question.fill("Сколько будет 12 + 30? <script>alert(1)</script>")
    click("Спросить")
    page.get_by_text("Длина принятия").nth(1).wait_for()
    page.get_by_role("button", name="Сохранить как запись").wait_for()
    wait_for_marks("bonus", "> 0")
    shot("live")
    page.wait_for_function(BOTH_SIDES_AGREE)
    page.get_by_text("Окрасить токены").click()  # a toggle
    wait_for_marks("bonus", "== 0")
    # a stop
    with slow_turns(svc, 0.05):
        click("Спросить")
        time.sleep(0.8)
        click("Остановить")
        page.get_by_text("Остановлено").nth(1).wait_for()
    # an endpoint that dies
    page.get_by_text("Настройки", exact=True).first.click()
    address = page.get_by_label("Адрес сервера").nth(1)
    address.fill(dying)
    address.press("Enter")
    time.sleep(0.7)
    click("Спросить")
    page.get_by_text("Ошибка", exact=True).wait_for()
    page.get_by_text("<img src=x onerror=alert(1)>").wait_for()
    shot("dead")
    # a recording
    page.get_by_text("Запись", exact=True).click()
    click("Воспроизвести")
    page.get_by_role("button", name="Сохранить как запись").wait_for()
    page.get_by_text("Окрасить токены").click()
    wait_for_marks("accepted", "> 0")
    shot("replay")
    assert page.get_by_text(re.compile(r"Ответ: \d")).count() == 2
    assert not page.alerts
