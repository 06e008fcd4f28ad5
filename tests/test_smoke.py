"""The whole chain at toy scale through the real runner.

And the library as a stranger installs it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tpro_nb import core, stages

BIN = Path(sys.executable).parent
STAGES = list(stages.load_params(ROOT, "smoke"))
PICKLES = {".pkl", ".pickle", ".bin", ".pt", ".npy"}
LOADED_FROM_THE_NET = re.compile(r"""(src|href)\s*=\s*["']https?://[^"']+\.(js|css|png|woff2?)""")


def tpro_nb_command(*arguments):
    return subprocess.run(
        [BIN / "tpro-nb", *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )


@pytest.fixture(scope="module")
def smoke():
    "One real run of the smoke profile, from nothing."
    shutil.rmtree(ROOT / "outputs" / "smoke", ignore_errors=True)
    run = tpro_nb_command("run", "smoke")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return ROOT / "outputs" / "smoke"


def test_smoke_runs_and_is_current(smoke):
    assert all(found.state == "current" for found in stages.status(ROOT, "smoke"))
    begin = time.time()
    again = tpro_nb_command("run", "smoke")
    assert again.returncode == 0
    assert "everything is current" in again.stdout
    assert again.stdout.count(" current\n") == len(STAGES)
    assert time.time() - begin < 60


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_numbers_notebook_and_stamp(smoke, stage):
    core.check_metrics(stage, core.read_json(smoke / stage / "metrics.json"))
    stamp = core.read_json(smoke / stage / "stamp.json")
    assert stamp["seconds"] > 0
    assert stamp["environment"]["packages"]["torch"]
    assert set(stamp["inputs"]) <= set(stages.inputs_of(stages.notebook_of(ROOT, stage)))
    for cell in json.loads((smoke / stage / f"{stage}.ipynb").read_text())["cells"]:
        for output in cell.get("outputs", []):
            assert output.get("output_type") != "error"
    for picture in (smoke / stage).glob("*.png"):
        assert picture.stat().st_size < 100_000, picture


def test_no_pickles_between_stages(smoke):
    for file in smoke.rglob("*"):
        if "work" not in file.parts and file.name != "hot_token_map.pt":
            assert file.suffix not in PICKLES, file


def test_report_opens_offline(smoke):
    html = (smoke / "report.html").read_text(encoding="utf-8")
    assert not LOADED_FROM_THE_NET.search(html)
    assert "<script src" not in html
    claims = core.read_json(smoke / "16d_claims" / "claims.json")
    metrics = core.read_json(smoke / "16d_claims" / "metrics.json")
    listed = claims if isinstance(claims, list) else claims["claims"]
    assert metrics["claims_total"] == len(listed) >= 60


def test_bare_papermill_with_a_parameter_file(smoke, tmp_path):
    notebooks = [stages.notebook_of(ROOT, "04b_tmath"), tmp_path / "o.ipynb"]
    parameters = ["-f", ROOT / "params" / "smoke" / "04b_tmath.yaml"]
    parameters += ["-p", "run_dir", str(tmp_path / "run")]
    subprocess.run(
        [BIN / "papermill", *notebooks, *parameters],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (tmp_path / "run/04b_tmath/metrics.json").exists()


BEFORE_THE_README = """
import tpro_nb
from tpro_nb.core import project_root

assert tpro_nb.__file__.startswith({folder!r}), tpro_nb.__file__
assert project_root() is None
"""


def test_readme_snippets_in_an_installed_wheel(tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(ROOT)], check=True)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(snippets) >= 2
    script = tmp_path / "readme.py"
    opening = BEFORE_THE_README.format(folder=str(tmp_path))
    script.write_text("\n".join([opening, *snippets]), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
