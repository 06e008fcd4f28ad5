"Paths and a toy chain that several test files use."
import json, os, shutil, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
import pytest

os.environ.setdefault("TPRO_NB_RUN", "none")     # chapters opened by hand read toys, never a run that happens to lie here
ROOT = Path(__file__).resolve().parent.parent

def write_notebook(path: Path, cells: list[str]):
    "A notebook whose second cell is the parameters cell."
    made = [dict(cell_type="code", id=f"c{i}", source=s, outputs=[], execution_count=None, metadata=dict(tags=["parameters"]) if i == 1 else {})
            for i, s in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, cells=made,
                                    metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")))))

PARAMS = "run_dir: str = ''\nseed: int = 0\nn: int = 1\nlr: float = 1e-4"
CHAIN = {
    "01_make": ["from tpro_nb.core import *", PARAMS, "run = Run('01_make', run_dir, seed)\nwrite_json(run.out/'x.json', [n])\nrun.finish()"],
    "02_double": ["from tpro_nb.core import *\nimport os, time", PARAMS,
                  "run = Run('02_double', run_dir, seed)\nx = read_json(run.input('01_make/x.json'))",
                  "if os.environ.get('TOY_SLEEP'):\n    (run.out/'pid').write_text(str(os.getpid()))\n    time.sleep(60)",
                  "write_json(run.out/'y.json', x*2)\nrun.finish()"],
    "03_use": ["from tpro_nb.core import *\nimport os", PARAMS,
               "run = Run('03_use', run_dir, seed)\nread_json(run.input('02_double/y.json'))",
               "if os.environ.get('TOY_WRONG'): raise UserError('y is wrong: run 02_double with another n')\n"
               "if os.environ.get('TOY_BUG'): 1/0", "run.finish()"],
}

@pytest.fixture
def chain(tmp_path):
    "A three-stage project of its own: the real runner, toy notebooks."
    (tmp_path/"settings.ini").touch()
    shutil.copytree(ROOT/"tpro_nb"/"tables", tmp_path/"tpro_nb"/"tables")
    (tmp_path/"pyproject.toml").write_text("[tool.nbdev]\nlib_name='toychain'\nlib_path='toychain'\nnbs_path='nbs'\n")
    for name, cells in CHAIN.items():
        write_notebook(tmp_path/"nbs"/f"{name}.ipynb", cells)
        (tmp_path/"params"/"toy").mkdir(parents=True, exist_ok=True)
        (tmp_path/"params"/"toy"/f"{name}.yaml").write_text("run_dir: outputs/toy\nseed: 0\n")
    return tmp_path

@pytest.fixture
def answer_server():
    "An OpenAI-compatible server whose thoughts come apart, as SGLang's reasoning parser sends them."
    class H(BaseHTTPRequestHandler):
        seen, slow = [], 0.0      # slow: seconds before it answers
        def log_message(self, *a): pass
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"]))); H.seen.append(body); time.sleep(H.slow)
            think = body.get("chat_template_kwargs", {}).get("enable_thinking")
            out = json.dumps(dict(choices=[dict(finish_reason="stop", message=dict(content=f"Ответ: {body.get('seed', 0) % 3}", reasoning_content="2 + 3" if think else None))])).encode()
            self.send_response(200); self.send_header("Content-Length", str(len(out))); self.end_headers(); self.wfile.write(out)
    s = HTTPServer(("127.0.0.1", 0), H); threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}/v1 07_sft", H
    s.shutdown()
