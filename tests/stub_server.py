"A chat endpoint in this process that answers by a script, well or badly."

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Said:
    "What the server does with one request."

    text: str | None = ""
    finish: str | None = "stop"
    status: int = 200
    thought: str = ""  # sent apart
    thought_name: str = "reasoning_content"
    headers: dict = field(default_factory=dict)
    body: str | None = None  # sent instead of a completion, in one
    streams: bool = True
    wait_s: float = 0.0  # before the first byte
    gap_s: float = 0.0  # between two pieces
    pings: int = 0  # lines that say nothing, a gap apart, before the first piece
    cut: bool = False  # ends after the first piece, as if all were well
    reset: bool = False  # the connection is torn down after the first piece


def events(said: Said) -> list[str]:
    "A completion as its events: two characters each."
    pieces = [{said.thought_name: said.thought[i : i + 2]} for i in range(0, len(said.thought), 2)]
    text = said.text or ""
    pieces += [dict(content=text[i : i + 2]) for i in range(0, len(text), 2)]
    told = [dict(index=0, delta=piece, finish_reason=None) for piece in pieces]
    told.append(dict(index=0, delta={}, finish_reason=said.finish))
    lines = [json.dumps(dict(choices=[choice]), ensure_ascii=False) for choice in told]
    lines.append(json.dumps(dict(choices=[], usage=dict(completion_tokens=3))))
    return [f"data: {line}\n\n" for line in lines]


def completion(said: Said) -> str:
    "The same in one."
    message = dict(role="assistant", content=said.text)
    if said.thought:
        message[said.thought_name] = said.thought
    choice = dict(index=0, message=message, finish_reason=said.finish)
    return json.dumps(dict(choices=[choice], usage=dict(completion_tokens=3)))


class Handler(BaseHTTPRequestHandler):
    server: "Stub"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            number = len(self.server.asked)
        said = self.server.say(body, number)
        time.sleep(said.wait_s)
        try:
            whole = said.body is not None or said.status != 200
            if whole or not (said.streams and body.get("stream")):
                self.answer_in_one(said)
            else:
                self.answer_in_pieces(said)
        except OSError:
            pass

    def answer_in_one(self, said: Said):
        text = completion(said) if said.body is None and said.status == 200 else said.body or ""
        self.send_response(said.status)
        for name, value in said.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def answer_in_pieces(self, said: Said):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for _ in range(said.pings):
            self.wfile.write(b": still here\n\n")
            self.wfile.flush()
            time.sleep(said.gap_s)
        for event in events(said):
            self.wfile.write(event.encode())
            self.wfile.flush()
            time.sleep(said.gap_s)
            if said.reset:
                at_once = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
                return
            if said.cut:
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args):
        pass


class Stub(ThreadingHTTPServer):
    "Runs inside `with`; `say(body, number of the request)` gives a `Said`."

    daemon_threads = True

    def __init__(self, say: Callable[[dict, int], Said], port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.say = say
        self.lock = threading.Lock()
        self.asked: list[dict] = []
        self.name = f"http://127.0.0.1:{self.server_port}/v1 toy"

    def handle_error(self, request, client_address):
        pass

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()


def in_turn(*script: Said) -> Callable[[dict, int], Said]:
    "The script's answers one after the other, the last one for ever."
    return lambda body, number: script[min(number, len(script)) - 1]


def asked_text(body: dict) -> str:
    "The question."
    return body["messages"][-1]["content"]
