"Paths and a toy chain that several test files use."

import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

# chapters opened by hand read toys, never a run that happens to lie here
os.environ.setdefault("TPRO_NB_RUN", "none")
# tests share the cores with each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
KERNEL = dict(name="python3", language="python", display_name="python3")


def pytest_collection_modifyitems(items):
    """The longest files first, while there is work for the other process beside them.

    Minutes on two cores with the other busy: 9, 12, 10, 3."""
    longest = ["test_smoke.py", "test_opened_alone.py", "test_distributed.py", "test_data.py"]

    def place(item) -> int:
        name = item.path.name
        return longest.index(name) if name in longest else len(longest)

    items.sort(key=place)


def write_notebook(path: Path, cells: list[str]):
    "A notebook whose second cell is the parameters cell."
    made = []
    for index, source in enumerate(cells):
        cell = dict(
            cell_type="code",
            id=f"c{index}",
            source=source,
            outputs=[],
            execution_count=None,
            metadata=dict(tags=["parameters"]) if index == 1 else {},
        )
        made.append(cell)
    notebook = dict(nbformat=4, nbformat_minor=5, cells=made, metadata=dict(kernelspec=KERNEL))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook))


PARAMS = "run_dir: str = ''\nseed: int = 0\nn: int = 1\nlr: float = 1e-4"
MAKE = """
run = Run('01_make', run_dir, seed)
write_json(run.out/'x.json', [n])
run.finish()
"""
DOUBLE = """
run = Run('02_double', run_dir, seed)
x = read_json(run.input('01_make/x.json'))
"""
SLEEP_IF_ASKED = """
if os.environ.get('TOY_SLEEP'):
    (run.out/'pid').write_text(str(os.getpid()))
    time.sleep(60)
"""
USE = """
run = Run('03_use', run_dir, seed)
read_json(run.input('02_double/y.json'))
"""
FAIL_IF_ASKED = """
if os.environ.get('TOY_WRONG'):
    raise UserError('y is wrong: run 02_double with another n')
if os.environ.get('TOY_BUG'):
    1/0
"""
CHAIN = {
    "01_make": ["from tpro_nb.core import *", PARAMS, MAKE],
    "02_double": [
        "from tpro_nb.core import *\nimport os, time",
        PARAMS,
        DOUBLE,
        SLEEP_IF_ASKED,
        "write_json(run.out/'y.json', x*2)\nrun.finish()",
    ],
    "03_use": [
        "from tpro_nb.core import *\nimport os",
        PARAMS,
        USE,
        FAIL_IF_ASKED,
        "run.finish()",
    ],
}


@pytest.fixture
def chain(tmp_path):
    "A three-stage project of its own: the real runner, toy notebooks."
    (tmp_path / "settings.ini").touch()
    shutil.copytree(ROOT / "tpro_nb" / "tables", tmp_path / "tpro_nb" / "tables")
    (tmp_path / "pyproject.toml").write_text(
        "[tool.nbdev]\nlib_name='toychain'\nlib_path='toychain'\nnbs_path='nbs'\n"
    )
    profile = tmp_path / "params" / "toy"
    profile.mkdir(parents=True)
    for name, cells in CHAIN.items():
        write_notebook(tmp_path / "nbs" / f"{name}.ipynb", cells)
        (profile / f"{name}.yaml").write_text("run_dir: outputs/toy\nseed: 0\n")
    return tmp_path


def chat_answer(asked: dict) -> bytes:
    "What an OpenAI-compatible server says: the seed's rest by three, with a thought if asked for."
    thinks = asked.get("chat_template_kwargs", {}).get("enable_thinking")
    message = dict(
        content=f"Ответ: {asked.get('seed', 0) % 3}",
        reasoning_content="2 + 3" if thinks else None,
    )
    return json.dumps(dict(choices=[dict(finish_reason="stop", message=message)])).encode()


@pytest.fixture
def answer_server():
    "An OpenAI-compatible server whose thoughts come apart, as SGLang's parser sends them."

    class Handler(BaseHTTPRequestHandler):
        seen = []  # the bodies it was sent
        slow = 0.0  # seconds before it answers

        def log_message(self, *args):
            pass

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.seen.append(asked)
            time.sleep(Handler.slow)
            answer = chat_answer(asked)
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1 07_sft", Handler
    server.shutdown()
