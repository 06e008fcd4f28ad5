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

import hypothesis
import numpy as np
import psutil
import pytest
import torch
from hypothesis import strategies
from markdown_it import MarkdownIt
from sklearn.linear_model import LogisticRegression
from streamlit.testing.v1 import AppTest
from test_server import slow_turns, talkative, wait_until

from tpro_nb.chat_service import Message, Service, ServiceSettings
from tpro_nb.core import UserError, read_jsonl, write_json, write_jsonl
from tpro_nb.panes import (
    SIDES,
    Exchange,
    Pane,
    PaneSettings,
    Playback,
    answer_html,
    answer_parts,
    fill_pane,
    history_of,
    logged_prompts,
    read_replay,
    room_left,
    safe_markdown,
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
            target,
            draft,
            name="toy",
            tree=(3, 4, 8),
            dtype="float32",
            context=384,
            slots=2,
            draft_up_to=2,
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
    last = page.session_state.turns[-1]
    assert wait_until(lambda: not last.running, 6), "still running"
    return ok(page.run())


def press(page, key):
    return ok(page.button(key).click().run())


def ask(page, question):
    return ok(page.chat_input("prompt").set_value(question).run())


def panes_of(page):
    return page.session_state.turns[-1].panes


def limit_tokens(page, most):
    for side in SIDES:
        page.number_input(f"{side}_max_tokens").set_value(most)


def htmls(page):
    return [element.proto.body for element in page.get("html")]


def plain(markup):
    return re.sub(r"<style>.*?</style>|<[^>]+>", "", markup, flags=re.S)


def names(page):
    return [plain(markup) for markup in htmls(page) if 'class="who"' in markup]


def marked(page):
    return [element.value for element in page.markdown]


def figures(page):
    "Label → number, of every pane that shows figures."
    panes = []
    for markup in htmls(page):
        if 'class="figures"' in markup:
            panes.append(
                {label: value for value, label in re.findall(r"<b>(.*?)</b> (.*?)<", markup)}
            )
    return panes


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
    "wrong, failure, says",
    [
        (dict(model="nobody"), "refused", "404"),
        (dict(url="http://127.0.0.1:9/v1"), "nobody", "127.0.0.1:9"),
        (dict(url="not a url"), "nobody", "not a url"),
        (dict(max_tokens=10**6), "refused", "400"),
    ],
)
def test_errors_are_told(url, wrong, failure, says):
    pane = Pane(pane_settings(url) | wrong, "x")
    fill_pane(pane)
    assert (pane.status, pane.failure) == ("error", failure)
    assert says in pane.error
    assert pane.rows == []
    for words in PAGE_TEXT.values():
        assert words[f"failed_{failure}"]


def test_a_server_that_dies_keeps_what_came(dying):
    pane = Pane(pane_settings(dying, model="dying"), "x")
    fill_pane(pane)
    assert pane.status == "error"
    assert pane.error
    assert len(pane.rows) == 2
    drawn = answer_html(pane.rows)
    assert "<img" not in drawn
    assert "&lt;img" in drawn


AWKWARD = {  # source, and how often each kind may be found in it after it is written anew
    "<script>alert(1)</script> и <style>*{display:none}</style>": {},
    '<img src=x onerror="alert(1)"> <iframe src="https://evil.example/"></iframe>': {},
    "[раз](javascript:alert(1)) [два](JaVaScRiPt&#58;alert(1)) <javascript:alert(1)>": {},
    "[три](data:text/html;base64,PHNjcmlwdD4=) [сайт](https://example.org/a_(b))": {"link": 1},
    "![кот](https://evil.example/cat.png) ![][c]\n\n[c]: https://evil.example/c.png": {"link": 2},
    "[![кот](https://evil.example/cat.png)](https://example.org)": {"link": 1},
    "<!-- спрятано --> видно <!-- не закрыто": {},
    ":red[нет] :material/home: :streamlit: :smile: :blue-badge[нет] -->": {},
    "| а | б |\n|---|--:|\n" + "| $\\|x\\|$ <br> | `p\\|q` |\n" * 20: {
        "table": 1,
        "code": 20,
        "math": 20,
    },
    "- раз\n  - два\n    1. три\n       - четыре\n       - пять": {"list": 4},
    "```mermaid\ngraph TD\n```\n\n````\n```\n![x](https://evil.example)\n````": {"fence": 2},
    "Скорость $v = 5\\ \\text{км/ч}$, а $площадь = 5\\%$ и \\(\\alpha\\)": {"math": 3},
    "Итог: \\boxed{\\frac{1}{2}}, \\[x^2\\] и\n$$\ny\n+ 1\n= 2\n$$\nвсё": {"math": 3},
    "билет $5 and $6, $5 или 6$, \\$x\\$, $HOME/bin:$PATH": {},
    "\\href{javascript:alert(1)}{x} $\\href{javascript:alert(1)}{x}$": {"math": 1},
    "    ![x](https://evil.example)\n\n&lt;script&gt; &#60;b&#62;": {"fence": 1},
    "незакрытое $$\nx = \\frac{1": {},
    "незакрытый код\n```python\nprint('<b>')\n![x](https://evil.example)": {"fence": 1},
}
KINDS = dict(
    link="link_open", table="table_open", code="code_inline", fence="fence", image="image"
) | dict(html_block="html", html_inline="html")


def found_in(markdown):
    "What another parser, with HTML switched on, finds; formulas by their signs."
    other = MarkdownIt("commonmark", dict(html=True)).enable(["table", "strikethrough"])
    kinds = Counter()
    for token in other.parse(markdown):
        for part in (token, *(token.children or [])):
            kinds[part.type] += 1
            if part.type == "link_open":
                assert re.match(r"(https?|mailto):", part.attrs["href"]), part.attrs
    found = {kind: kinds[name] for kind, name in KINDS.items() if kinds[name]}
    if lists := kinds["bullet_list_open"] + kinds["ordered_list_open"]:
        found["list"] = lists
    if "fence" not in found and (pairs := len(re.findall(r"(?<!\\)\$\$", markdown)) // 2):
        found["math"] = pairs
    return found


@pytest.mark.parametrize("source", AWKWARD, ids=lambda source: source[:20])
def test_strange_markdown_is_written_anew(source):
    assert found_in(safe_markdown(source)) == AWKWARD[source]
    # unfinished, as it is while it streams
    for end in range(0, len(source), 7):
        assert (
            not {"image", "html_block", "html_inline"}
            & found_in(safe_markdown(source[:end])).keys()
        )


SCRAPS = [*AWKWARD, "\n", "\n\n", "  ", "> ", "- ", "1. ", "|", "`", "```", "~~~", "$", "$$", "*"]
SCRAPS += [
    "_",
    "[",
    "](",
    ")",
    "!",
    "<",
    ">",
    "\\",
    "\\(",
    "\\]",
    "{",
    "}",
    "\t",
    "#",
    "=",
    "&",
    ":",
]


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(strategies.lists(strategies.sampled_from(SCRAPS) | strategies.text(), max_size=9))
def test_no_mixture_becomes_html_or_an_image(scraps):
    found = found_in(safe_markdown("".join(scraps)))
    assert not {"image", "html_block", "html_inline"} & found.keys()


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


@pytest.mark.parametrize(
    "metrics, measured, says",
    [
        (dict(tree="3x2x5"), "base", "EAGLE, tree 3x2x5"),
        (
            dict(tree="3x2x5", shipped_tree="4x1x4"),
            "shipped",
            "EAGLE with the shipped draft, tree 4x1x4",
        ),
    ],
)
def test_a_recording_shows_the_shipped_draft_where_it_was_measured(
    tmp_path, metrics, measured, says
):
    run, draft = tmp_path / "14c_eagle_speedup", tmp_path / "11c_eagle_draft"
    run.mkdir()
    draft.mkdir()
    write_json(run / "metrics.json", metrics)
    events = [
        dict(run=how, target=target, request="p1", draft_ms=None, verify_ms=1.0)
        for target in ("base", "shipped")
        for how in ("plain", "eagle")
    ]
    write_jsonl(run / "events.jsonl", events)
    asked = dict(id="p1", prompt="Hi", domain="maths", mode="direct")
    write_jsonl(draft / "prompts_eval.jsonl", [asked])
    write_jsonl(draft / "chain_prompts_eval.jsonl", [])
    (prompt,) = logged_prompts(tmp_path).values()
    assert prompt.events["plain"] == [event for event in events[::2] if event["target"] == measured]
    assert prompt.side("eagle").settings["decoding"] == says
    assert prompt.side("plain").settings["decoding"] == "plain"


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
    turn = Exchange("Привет", panes)
    for turns, name in (([turn], "мой"), ([turn, turn], "мой · 2")):
        file.write_text(session_replay(turns, "мой"))
        assert "secret" not in file.read_text()
        sides = read_replay(file)[name]
        for side, pane in zip(SIDES, panes):
            assert answer_html(sides[side].rows) == answer_html(pane.rows)


def test_a_conversation_fits_to_the_end(url):
    "The limit shrinks with what is left of the context, so that no turn is refused."
    settings = pane_settings(url, max_tokens=1024, context=384)
    turns = []
    for question in ("Расскажи о погоде.", "А ещё?", "Сколько будет 12 + 30?"):
        limit = room_left(settings, question, turns, 0)
        assert limit < 384
        its_own = settings | dict(max_tokens=min(limit, 24))
        pane = Pane(its_own, question, history=history_of(turns, 0))
        fill_pane(pane)
        assert pane.status == "done", pane.error
        turns.append(Exchange(question, [pane, pane]))
    assert len(turns[-1].panes[0].history) == 4
    assert turns[0].panes[0].prompt_tokens < turns[1].panes[0].prompt_tokens
    used = pane.prompt_tokens + pane.tokens
    assert 1 <= room_left(settings, "и", turns, 0) <= 384 - used


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
NAMES = set("tpro nb serve run cpu playground EAGLE Enter API top votes jsonl content".split())
NAMES |= {"Русский", "English"}
FOREIGN = dict(ru=r"[A-Za-z]{2,}", en=r"[А-Яа-яЁё]{2,}")


def one_language(page, lang, *known):
    "No word of the other language on the page, beside names."
    shown = []
    said = set()
    for turn in page.session_state.turns:
        for pane in turn.panes:
            whole = text_of_rows(pane.rows)
            said |= {
                safe_markdown(whole[slice(*part)].strip()).strip() for part in answer_parts(whole)
            }
    for element in page:
        if element.type in ("code", "arrow_table") or not hasattr(element, "proto"):
            continue
        body = getattr(element.proto, "body", "")
        if body in said or 'class="tree"' in body:
            continue
        for name in ("label", "value", "body", "placeholder", "help"):
            text = getattr(element.proto, name, "") or ""
            shown.append(plain(text) if isinstance(text, str) else "")
        shown += getattr(element.proto, "options", [])
    text = re.sub(r"http\S+|`[^`]*`", "", " ".join(map(str, shown)).replace("\\", ""))
    assert len(text) > 100
    assert set(re.findall(FOREIGN[lang], text)) - NAMES - set(known) == set()


def test_both_panes_stream_and_agree(open_app):
    page = open_app()
    one_language(page, "ru", "toy", "plain")
    limit_tokens(page, 40)
    page = settled(ask(page, "Сколько будет <b>12</b> + 30?"))
    left, right = panes_of(page)
    assert [left.status, right.status] == ["done", "done"]
    assert len(right.rows) <= len(left.rows)
    drafted = sum(row["drafted"] for row in right.rows)
    assert kinds(right.rows)["accepted"] == drafted > 0
    assert kinds(right.rows)["bonus"] >= len(right.rows) - 2
    assert set(kinds(left.rows)) == {"plain"}
    assert text_of_rows(left.rows) == text_of_rows(right.rows) != ""
    plain_figures, drafted_figures = figures(page)
    assert RU["acceptance_length"] not in plain_figures
    assert float(drafted_figures[RU["acceptance_length"]].replace(",", ".")) >= 1
    assert set(drafted_figures) <= {RU[name] for name in telemetry([])}
    assert any('class="tree"' in markup for markup in htmls(page))
    assert '"model": "toy"' in page.code[1].value
    assert "key" not in page.code[1].value
    assert safe_markdown("Сколько будет <b>12</b> + 30?").strip() in marked(page)
    assert not any(coloured(markup) for markup in htmls(page) if 'class="tp' in markup)
    page.toggle("colours").set_value(True)
    ok(page.run())
    assert any(coloured(markup) for markup in htmls(page) if 'class="tp' in markup)


def test_several_turns(open_app, svc):
    page = open_app()
    limit_tokens(page, 24)
    page = settled(ask(page, "Первый <i>вопрос</i>?"))
    first = panes_of(page)
    page = settled(ask(page, "Второй?"))
    assert len(page.session_state.turns) == 2
    for before, now in zip(first, panes_of(page)):
        assert [message["role"] for message in now.history] == ["user", "assistant"]
        assert now.prompt_tokens > before.prompt_tokens
        assert now.status == "done"
    assert any(expander.label.startswith("1: Первый \\<i\\>") for expander in page.expander)
    assert len(names(page)) == 4
    assert names(page)[0] == f"toy-plain · {RU['think']}"
    press(page, "fresh")
    assert page.session_state.turns == []
    one_language(page, "ru", "toy", "plain")
    page = settled(ask(page, "Снова первый?"))
    assert panes_of(page)[0].history == []


def test_english_thinking_and_presets(open_app):
    page = open_app(lang="en")
    assert page.header[0].value == "Two answers side by side"
    one_language(page, "en")
    page.session_state.domain = "code"
    ok(page.run())
    question = PRESETS["code"]["en"][0]
    assert page.radio("left_mode").value == "think"
    limit_tokens(page, 8)
    press(page, f"preset {question}")
    asked = page.session_state.turns[0]
    assert asked.prompt == question
    assert asked.panes[0].settings["mode"] == "think"
    page = settled(page)
    one_language(page, "en")
    assert PAGE_TEXT["en"]["cut"] in [caption.value for caption in page.caption]


def test_maths_presets_come_from_the_runs_tmath(open_app, tmp_path):
    file = tmp_path / "04b_tmath" / "test.jsonl"
    file.parent.mkdir()
    questions = [f"Задача <b>{number}</b> " + "о числах " * 20 for number in range(20)]
    rows = [dict(question=question, verifiable_answer="1") for question in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--run", str(tmp_path), "--left", "http://127.0.0.1:9/v1"]
    config, _ = page_config(playground_parser().parse_args(args))
    assert config["tmath"] == str(file)
    page = open_app(tmath=config["tmath"])
    page.session_state.domain = "maths"
    ok(page.run())
    found = [button for button in page.button if str(button.key).startswith("preset ")]
    # spread over the file
    assert [button.key.removeprefix("preset ") for button in found] == questions[0:16:2]
    assert all(len(button.label) < 110 for button in found)
    assert "<b>" not in found[0].label
    press(page, found[3].key)
    assert page.session_state.turns[0].prompt == questions[6]
    assert preset_questions("en", str(file))["maths"] == PRESETS["maths"]["en"]
    assert preset_questions("ru", str(tmp_path / "no"))["maths"] == PRESETS["maths"]["ru"]


def test_dead_and_dying_endpoints(open_app, dying):
    page = open_app(left=dict(url="http://127.0.0.1:9/v1"), right=dict(url=dying))
    (warning,) = page.warning
    assert RU["start"] in warning.value
    one_language(page, "ru", "default", "dying")
    page = settled(ask(page, "x"))
    left, right = page.error
    assert left.value.startswith(RU["failed_nobody"])
    assert RU["failed_broken"] in right.value
    one_language(page, "ru", "default", "dying")
    assert any("Начало \\<img" in text for text in marked(page))
    turns = page.session_state.turns
    assert [len(history_of(turns, place)) for place in (0, 1)] == [0, 2]


def test_stop(open_app, svc):
    with slow_turns(svc, 0.03):
        page = open_app()
        limit_tokens(page, 250)
        ask(page, "Расскажи")
        time.sleep(0.3)
        press(page, "halt")
        assert {pane.status for pane in panes_of(page)} == {"stopped"}
        # the server stopped as well
        assert wait_until(lambda: not svc.sched.busy, 4)
        assert svc.sched.total["finished_cancelled"] >= 2


def test_one_after_the_other(open_app, svc):
    with slow_turns(svc, 0.01):
        page = open_app()
        page.toggle("one_by_one").set_value(True)
        ok(page.run())
        limit_tokens(page, 30)
        ask(page, "Привет")
        time.sleep(0.15)
        left, right = panes_of(page)
        assert left.running
        assert left.rows
        assert right.running
        assert not right.rows
        assert RU["queued"] in [caption.value for caption in ok(page.run()).caption]
        settled(page)
        assert right.rows[0]["at_s"] < left.seconds  # the wait is not counted


def test_choices_survive_another_language(monkeypatch):
    sides = {side: dict(url="http://127.0.0.1:1/v1", mode="direct") for side in ("left", "right")}
    monkeypatch.setenv("TPRO_NB_PLAYGROUND", json.dumps(dict(lang="ru") | sides))
    page = ok(AppTest.from_function(app, default_timeout=20).run())
    page.radio("source").set_value("live")
    page.radio("lang").set_value("en")
    ok(page.run())
    for name, value in (("source", "live"), ("left_mode", "direct"), ("right_mode", "direct")):
        choice = page.radio(name)
        assert choice.value == value
        assert choice.proto.set_value  # else the page, which goes by its words, shows none


@pytest.mark.parametrize("lang", ["ru", "en"])
def test_replay_needs_no_model(monkeypatch, lang):
    words = PAGE_TEXT[lang]
    monkeypatch.setenv("TPRO_NB_PLAYGROUND", json.dumps(dict(lang=lang)))
    page = ok(AppTest.from_function(app, default_timeout=20).run())
    assert page.radio("source").value == "replay"
    assert words["recording"] in [info.value for info in page.info]
    titles = page.selectbox("episode").options
    assert all(words["draft"] in title or words["think"] in title for title in titles)
    page.selectbox("speed").set_value(0.0)
    press(page, "play")
    ok(page.run())
    assert [pane.status for pane in panes_of(page)] == ["done", "done"]
    length = figures(page)[1][words["acceptance_length"]]
    assert float(length.replace(",", ".")) > 1
    assert any("Ответ" in text for text in marked(page))
    assert words["thinking"] in [expander.label for expander in page.expander]
    page.text_input("file").set_value("/no/such/file.jsonl")
    ok(page.run())
    assert page.error[0].value == words["unreadable"]


def test_playback_goes_by_the_clock():
    playback = Playback({}, "", rows=[dict(at_s=0.0), dict(at_s=60.0)])
    assert len(playback.visible()) == 1
    playback.speed = 10**5
    time.sleep(0.01)
    assert len(playback.visible()) == 2
    assert playback.status == "done"


def test_blind_vote(open_app, tmp_path):
    file = tmp_path / "votes.jsonl"
    for with_prompt in (False, True):
        page = open_app()
        page.toggle("blind").set_value(True)
        ok(page.run())
        limit_tokens(page, 20)
        page = settled(ask(page, "тайный вопрос"))
        if with_prompt:
            page = settled(ask(page, "и ещё один"))
        assert set(names(page)) == {"Модель A", "Модель B"}
        assert not any('class="figures"' in markup for markup in htmls(page))
        assert not any('class="accepted"' in markup for markup in htmls(page))
        page.text_input("votes").set_value(str(file))
        page.checkbox("keep").set_value(with_prompt)
        ok(page.run())
        assert file.exists() == with_prompt  # of the first round
        one_language(page, "ru", "toy", "plain", "vlad")
        press(page, "vote_left")
        assert {name.split(" ")[0] for name in names(page)} == {"toy", "toy-plain"}
        assert RU["voted"] in page.success[0].value
    first, second = read_jsonl(file)
    assert "prompt" not in first
    assert (first["turn"], second["turn"]) == (1, 2)
    assert second["prompt"] == "и ещё один"
    assert first["winner"] == "left"
    assert {first["left"], first["right"]} == {"toy (think)", "toy-plain (think)"}
    assert len(page.table) == 1
    assert "key" not in first["settings"][0]
    # the next question begins anew, and blind
    page = settled(ask(page, "новый"))
    assert len(page.session_state.turns) == 1
    assert set(names(page)) == {"Модель A", "Модель B"}


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


FOUND = """Object.fromEntries(Object.entries({
    script: '.stMarkdown script, .stMarkdown iframe, .stMarkdown style',
    image: '.stMain img',
    handler: '.stMarkdown [onerror], .stMarkdown [onclick]',
    icon: '.stMarkdown [role=img]',
    link: '.stMarkdown a',
    formula: '.stMarkdown .katex',
    wrong: '.stMarkdown .katex-error',
    display: '.stMarkdown .katex-display',
    table: '.stMarkdown table',
    code: '.stMarkdown pre',
}).map(([name, where]) => [name, document.querySelectorAll(where).length]))"""
SIDEWAYS = "document.documentElement.scrollWidth > innerWidth"
LAST = ("незакрытое", "незакрытый")  # begin what would swallow the rest


def goto_when_up(page, address):
    for _ in range(200):
        try:
            page.goto(address)
            return
        except Exception:
            time.sleep(0.1)


@pytest.fixture
def browser_page(browser, url):
    "The page on the fair pair; what it alerts and what it asks other hosts for is kept."
    port = free_port()
    sides = {
        "left": dict(url=url, model="toy-plain", mode="direct", max_tokens=128),
        "right": dict(url=url, model="toy", mode="direct", max_tokens=128),
    }
    streamlit = open_page(sides, port)
    page = browser.new_page(viewport=dict(width=1300, height=1100))
    page.set_default_timeout(20_000)
    page.alerts = []
    page.remote = []

    def dismiss(dialog):
        page.alerts.append(dialog.message)
        dialog.dismiss()

    def asked(request):
        if not request.url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")):
            page.remote.append(request.url)

    page.on("dialog", dismiss)
    page.on("request", asked)
    try:
        goto_when_up(page, f"http://127.0.0.1:{port}")
        yield page
    finally:
        page.close()
        streamlit.terminate()
        streamlit.wait(timeout=10)


def test_in_a_browser(browser_page, svc, dying, monkeypatch):
    page = browser_page
    shots = os.environ.get("TPRO_NB_SHOTS")

    def shot(name):
        if shots:
            page.screenshot(path=f"{shots}/{name}.png")

    def button(name):
        return page.get_by_role("button", name=name)

    def ask_by_enter(question):
        line = page.get_by_placeholder("Enter отправляет")
        line.fill(question)
        line.press("Enter")

    def wait_for_marks(kind, how_many):
        page.wait_for_function(f"document.querySelectorAll('.tp .{kind}').length {how_many}")

    def wait_until_done():
        page.get_by_text("Сохранить как запись").wait_for()

    # live models: Enter sends, and the answer is in sight
    ask_by_enter("Сколько будет 12 + 30? <script>alert(1)</script> $x^2$")
    page.get_by_text("длина принятия").wait_for()
    wait_until_done()
    assert page.locator(".figures").last.bounding_box()["y"] < 1100
    page.get_by_text("Окрасить токены").click()  # a toggle
    wait_for_marks("bonus", "> 0")
    shot("live")
    page.get_by_text("Окрасить токены").click()
    wait_for_marks("bonus", "== 0")
    # a second turn, and a stop
    with slow_turns(svc, 0.05):
        ask_by_enter("А теперь?")
        button("Остановить").click()
        page.get_by_text("Остановлено").nth(1).wait_for()
        page.get_by_text("1: Сколько будет").wait_for()
    shot("stopped")
    # an endpoint that dies, after strange Markdown
    harmless = [source for source in AWKWARD if not source.startswith(LAST)]
    texts = ["\n\n----\n\n".join([*harmless, end]) for end in AWKWARD if end.startswith(LAST)]
    monkeypatch.setattr(DyingServer, "TEXTS", texts[:1])
    button("Новая беседа").click()
    page.get_by_text("Настройки слева", exact=True).click()
    address = page.get_by_label("Адрес сервера").first
    address.fill(dying)
    address.press("Enter")
    page.get_by_text("Слева: dying").wait_for()
    ask_by_enter("Покажи всё")
    page.get_by_text("Связь оборвалась").wait_for()
    wait_until_done()
    assert page.evaluate(FOUND) == dict(
        script=0,
        image=0,
        handler=0,
        icon=0,
        link=5,  # one is an address in the text of an iframe
        formula=27,
        wrong=0,
        display=1,
        table=1,
        code=3,
    )
    page.get_by_text("graph TD").wait_for()  # mermaid's source, not its drawing
    shot("strange")
    page.set_viewport_size(dict(width=400, height=800))
    assert not page.evaluate(SIDEWAYS)
    shot("phone")
    page.set_viewport_size(dict(width=1300, height=1100))
    # a recording
    page.get_by_text("Запись", exact=True).click()
    button("Воспроизвести").click()
    page.get_by_text("принято, %").nth(0).wait_for()
    page.get_by_text("Окрасить токены").click()
    wait_for_marks("accepted", "> 0")
    shot("replay")
    assert not page.alerts
    assert not page.remote
