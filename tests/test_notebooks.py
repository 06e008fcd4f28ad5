"The rules that keep notebooks, library and parameter files one thing (each line of this file is a trap somebody fell into)."
import ast, configparser, json, re, subprocess, sys, tomllib
from pathlib import Path
import pytest, yaml
from tpro_nb import pipeline as P
from conftest import ROOT

NBS = sorted((ROOT/"nbs").glob("*.ipynb"))
STAGES = P.stage_names(ROOT)
ids = lambda p: p.stem
FULL = ["smoke", "cpu", "h100", "h100x32"]
LONG = {p.stem for p in (ROOT/"params"/"cpu-long").glob("*.yaml")}      # chapters that stand on a finished cpu run

def cells(nb): return json.loads(nb.read_text(encoding="utf-8"))["cells"]
def source(c): return "".join(c["source"])

def test_every_chapter_of_the_plan_is_there():
    assert {s.split("_")[0] for s in STAGES} >= {f"{i:02}" for i in (*range(1, 15), 16)}

@pytest.mark.parametrize("nb", NBS, ids=ids)
def test_clean(nb):
    for c in cells(nb):
        assert not c.get("outputs") and c.get("execution_count") is None, f"run nbdev-clean: {source(c)[:60]}"
        assert set(c["metadata"]) <= {"tags"}

@pytest.mark.parametrize("nb", NBS, ids=ids)
def test_cells_are_short_and_named_once(nb):
    names = [c["id"] for c in cells(nb)]
    assert len(names) == len(set(names))
    for c in cells(nb):
        if c["cell_type"] != "code": continue
        n = len([l for l in source(c).splitlines() if l.strip()])
        assert n <= (60 if "#| export" in source(c) else 30), f"{n} lines: {source(c)[:80]}"

@pytest.mark.parametrize("nb", NBS, ids=ids)
def test_no_absolute_paths_and_no_pickle(nb):
    for c in cells(nb):
        if c["cell_type"] != "code": continue
        assert not re.search(r"""["'](/home|/tmp|/root|/work|C:\\)""", source(c)), source(c)[:80]
        assert not re.search(r"\bimport pickle|\bpickle\.|trust_remote_code\s*=\s*True|weights_only\s*=\s*False|(?<![\w.])eval\(model", source(c)), source(c)[:80]

@pytest.mark.parametrize("stage", STAGES)
def test_one_parameters_cell_never_exported(stage):
    tagged = [c for c in cells(ROOT/"nbs"/f"{stage}.ipynb") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and "#| export" not in source(tagged[0])
    sig = P.signature(ROOT/"nbs"/f"{stage}.ipynb")
    assert sig["run_dir"] == ("str", "") and sig["seed"][0] == "int"
    P.check_params(ROOT/"nbs"/f"{stage}.ipynb", {}, stage)

@pytest.mark.parametrize("stage", STAGES)
def test_chapter_module_and_inputs(stage):
    nb = ROOT/"nbs"/f"{stage}.ipynb"
    module = next(m[1] for c in cells(nb) if (m := re.search(r"#\| default_exp (\w+)", source(c))))
    assert module == stage.split("_", 1)[1] and (ROOT/"tpro_nb"/f"{module}.py").exists()
    for name in P.inputs_of(nb): assert name.split("/")[0] in STAGES and name < stage, f"{stage} reads {name}, which is not earlier"

def test_imports_only_go_down():
    order = ["core", "assets"] + [s.split("_", 1)[1] for s in STAGES] + ["public_benchmarks", "limits", "grid", "server", "playground", "benchmark", "doctor", "pipeline", "ablate"]
    for f in (ROOT/"tpro_nb").glob("*.py"):
        if f.stem.startswith("_"): continue
        top = [n for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom) and (n.level == 1 or (n.module or "").startswith("tpro_nb"))]
        names = [(n.module or "").removeprefix("tpro_nb").lstrip(".") for n in top]                 # nbdev writes `from .core import x`
        used = {m.split(".")[0] for m in names if m} | {a.name for n, m in zip(top, names) if not m for a in n.names}
        assert f.stem in ("core", "doctor", "playground") or "core" in used or "assets" in used, f"{f.stem}: {used}"    # the test sees imports at all
        assert all(order.index(u) <= order.index(f.stem) for u in used), f"{f.stem} imports {used}"

@pytest.mark.parametrize("profile", FULL)
def test_profiles_are_complete_and_valid(profile):
    params = P.load_params(ROOT, profile)
    assert list(params) == [s for s in STAGES if s not in LONG]
    for stage in params:
        given = set(yaml.safe_load((ROOT/"params"/profile/f"{stage}.yaml").read_text(encoding="utf-8")))
        assert given == set(P.signature(ROOT/"nbs"/f"{stage}.ipynb")), f"{profile}/{stage}: list every parameter"

def test_long_chapters_stand_on_the_cpu_run():
    params = P.load_params(ROOT, "cpu-long")
    assert LONG and not LONG & set(P.load_params(ROOT, "cpu")) and {p["run_dir"] for p in params.values()} == {"outputs/cpu"}
    for stage in params: assert set(yaml.safe_load((ROOT/"params"/"cpu-long"/f"{stage}.yaml").read_text(encoding="utf-8"))) == set(P.signature(ROOT/"nbs"/f"{stage}.ipynb"))

def test_tpro_profile():
    assert set(P.load_params(ROOT, "tpro")) == {"10_evaluation", "13_serving", "14_eagle_speedup"}

def test_export_is_fresh(tmp_path):
    before = {f: f.read_bytes() for f in (ROOT/"tpro_nb").glob("*.py")}
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=ROOT, check=True)
    changed = [f.name for f in (ROOT/"tpro_nb").glob("*.py") if before.get(f) != f.read_bytes()]
    assert not changed, f"run nbdev-export and commit: {changed}"

def test_settings_ini_is_the_one_source():
    ini = configparser.ConfigParser(interpolation=None); ini.read(ROOT/"settings.ini", encoding="utf-8")
    cfg = ini["DEFAULT"]
    py = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))
    assert set(py["project"]["dynamic"]) >= {"version", "dependencies", "requires-python", "optional-dependencies"} and "version" not in py["project"]
    assert py["tool"]["nbdev"]["lib_name"] == py["tool"]["nbdev"]["lib_path"] == cfg["lib_name"] == py["project"]["name"]
    assert py["tool"]["nbdev"]["allowed_cell_metadata_keys"] == ["tags"]
    import tpro_nb
    assert tpro_nb.__version__ == cfg["version"]
    from importlib.metadata import requires, version
    assert version("tpro_nb") == cfg["version"]
    asked = {re.split(r"[\[<>=]", l)[0].strip() for l in cfg["requirements"].splitlines() if l.strip()}
    assert asked >= set("jupyterlab papermill nbdev torch transformers datasets trl matplotlib".split())
    assert asked <= {re.split(r"[\[<>=; ]", r)[0] for r in requires("tpro_nb")}

def test_every_reported_number_is_defined():
    from tpro_nb.core import metric_table
    rows = metric_table()
    assert all(r["unit"] and r["formula"] and r["null_rule"] for r in rows)
    assert len({(r["stage"], r["key"]) for r in rows}) == len(rows)
    units = {"_s": "s", "_ms": "ms", "_mb": "MB", "_pct": "%"}
    for r in rows:
        for end, unit in units.items():
            if r["key"].endswith(end) and not r["key"].endswith("_per_s"): assert r["unit"].startswith(unit), r
