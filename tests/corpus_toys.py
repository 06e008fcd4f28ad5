"Toys of the tests of chapter 05: a small corpus, and a model server with moods."

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from tpro_nb import rows, tmath

PLACES = [
    ("а", "толковом"),
    ("б", "морском"),
    ("в", "старинном"),
    ("г", "детском"),
    ("д", "горном"),
    ("е", "лесном"),
]
ENTRIES = [
    dict(
        word=f"слово{letter}",
        glosses=[f"нечто, что встречается под номером {number} в {kind} словаре"],
        quotations=[f"Он взял {kind} слово и положил его на место {number}, не сказав ни слова."],
        synonyms=[f"речь{letter}"],
    )
    for number, (letter, kind) in enumerate(PLACES)
]
TAGS = {"tags": ["Definition", "rare word"], "domain": "Writing", "tier": "Student"}


def problems_of_all(per_family: int, **options) -> list[dict]:
    "So many problems of every family."
    drawn = []
    for family in tmath.FAMILIES:
        drawn += tmath.draw_problems(family, per_family, **options)
    return drawn


def corpus(per_family: int = 8) -> list[dict]:
    "Rows of the six words, and of so many problems a family."
    return rows.wiktionary_rows(ENTRIES) + rows.problem_rows(problems_of_all(per_family))


def protected_problems(per_family: int) -> list[dict]:
    "Test problems as the list that decontamination guards."
    return [
        dict(id=problem["problem_id"], text=problem["question"], set="test")
        for problem in problems_of_all(per_family, split="test")
    ]


def turns(*texts: str) -> list[dict]:
    "A conversation: the user begins, then they take turns."
    roles = ("user", "assistant")
    return [dict(role=roles[place % 2], content=text) for place, text in enumerate(texts)]


def hostile(row: dict) -> dict:
    "The row with turns that would run something."
    said = turns("<script>alert(1)</script>", "</pre><img src=x onerror=alert(1)>")
    return dict(row, messages=said)


def unit(*vectors) -> np.ndarray:
    "The vectors at length 1."
    array = np.array(vectors, float)
    return array / np.linalg.norm(array, axis=1)[:, None]


def chat(content: str) -> str:
    "The body of a chat endpoint's answer."
    return json.dumps(dict(choices=[dict(message=dict(content=content))]))


TAGGED = chat(f"<think>хм</think> Вот: {json.dumps(TAGS)}")
FAST = dict(per_s=1000, timeout_s=0.3, wait_s=0.02)  # an endpoint for the impatient

# (status, headers, text, seconds to wait): what a server with moods answers.
Answer = tuple[int, dict, str, float]


def always(text: str) -> Callable[[int, dict], Answer]:
    "A mood: this text, at once, whatever is asked."
    return lambda number, body: (200, {}, text, 0)


class ToyServer(http.server.ThreadingHTTPServer):
    "A chat and embeddings endpoint; its mood maps (number of the question, body) to an answer."

    mood: Callable[[int, dict], Answer]

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: list[dict] = []
        self.name = f"http://127.0.0.1:{self.server_port}/v1 toy"


class Handler(http.server.BaseHTTPRequestHandler):
    server: ToyServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            number = len(self.server.asked)
        status, headers, text, wait = self.server.mood(number, body)
        time.sleep(wait)
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass

    def log_message(self, *arguments):
        pass


@contextmanager
def toy_server() -> Iterator[ToyServer]:
    server = ToyServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
