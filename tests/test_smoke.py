"The whole chain at toy scale through the real runner, every chapter opened alone, and the library as a stranger installs it."
import json, os, re, subprocess, sys, time
from pathlib import Path
import pytest
from tpro_nb import core, pipeline as P
from conftest import ROOT

BIN = Path(sys.executable).parent
STAGES = list(P.load_params(ROOT, "smoke"))

def cli(*args, **env): return subprocess.run([BIN/"tpro-nb", *args], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})

@pytest.fixture(scope="module")
def smoke():
    "One real run of the smoke profile, from nothing."
    import shutil
    shutil.rmtree(ROOT/"outputs"/"smoke", ignore_errors=True)
    p = cli("run", "smoke")
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-3000:]
    return ROOT/"outputs"/"smoke"

def test_smoke_runs_and_is_current(smoke):
    assert all(s.state == "current" for s in P.status(ROOT, "smoke"))
    begin = time.time()
    p = cli("run", "smoke")
    assert p.returncode == 0 and "everything is current" in p.stdout and p.stdout.count(" current\n") == len(STAGES)
    assert time.time() - begin < 60

@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_numbers_notebook_and_stamp(smoke, stage):
    m = core.read_json(smoke/stage/"metrics.json")
    core.check_metrics(stage, m)
    s = core.read_json(smoke/stage/"stamp.json")
    assert s["seconds"] > 0 and s["environment"]["packages"]["torch"] and set(s["inputs"]) <= {n for n in P.inputs_of(ROOT/"nbs"/f"{stage}.ipynb")}
    nb = json.loads((smoke/stage/f"{stage}.ipynb").read_text())
    assert all(o.get("output_type") != "error" for c in nb["cells"] for o in c.get("outputs", []))
    for png in (smoke/stage).glob("*.png"): assert png.stat().st_size < 100_000, png

def test_no_pickles_between_stages(smoke):
    loose = [f for f in smoke.rglob("*") if f.suffix in {".pkl", ".pickle", ".bin", ".pt", ".npy"} and "work" not in f.parts and f.name != "hot_token_map.pt"]
    assert not loose

def test_report_opens_offline(smoke):
    html = (smoke/"report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']https?://[^"']+\.(js|css|png|woff2?)""", html) and "<script src" not in html
    claims = core.read_json(smoke/"16_claims"/"claims.json")
    m = core.read_json(smoke/"16_claims"/"metrics.json")
    assert m["claims_total"] == len(claims if isinstance(claims, list) else claims["claims"]) >= 60

def test_bare_papermill_with_a_parameter_file(smoke, tmp_path):
    subprocess.run([BIN/"papermill", ROOT/"nbs"/"04_tmath.ipynb", tmp_path/"o.ipynb", "-f", ROOT/"params"/"smoke"/"04_tmath.yaml", "-p", "run_dir", str(tmp_path/"run")],
                   check=True, capture_output=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (tmp_path/"run/04_tmath/metrics.json").exists()

@pytest.mark.parametrize("stage", P.stage_names(ROOT))
def test_chapter_opened_alone_runs_all(stage, tmp_path):
    "What a reader does in JupyterLab in a clean clone: open, run all cells, the stage section too, on toys."
    import papermill as pm
    pm.execute_notebook(str(ROOT/"nbs"/f"{stage}.ipynb"), str(tmp_path/"o.ipynb"), kernel_name="python3", cwd=str(ROOT/"nbs"), progress_bar=False)

def test_readme_snippets_in_an_installed_wheel(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path/"site"), str(ROOT)], check=True)
    code = re.findall(r"```python\n(.*?)```", (ROOT/"README.md").read_text(encoding="utf-8"), re.S)
    assert len(code) >= 3
    script = tmp_path/"readme.py"
    script.write_text("import tpro_nb\nassert tpro_nb.__file__.startswith(" + repr(str(tmp_path)) + "), tpro_nb.__file__\n"
                      "from tpro_nb.core import project_root\nassert project_root() is None\n" + "\n".join(code), encoding="utf-8")
    p = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path/"site")}, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
