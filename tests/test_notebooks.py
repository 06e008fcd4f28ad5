"""The rules that keep notebooks, library and parameter files one thing.

Each line of this file is a trap somebody fell into.
"""

import ast
import configparser
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import defaultdict
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import tpro_nb
from tpro_nb import stages
from tpro_nb.core import metric_table

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
STAGES = stages.stage_names(ROOT)
FULL_PROFILES = ["smoke", "cpu", "h100", "h100x32"]
# Chapters that stand on a finished cpu run.
LONG_STAGES = {path.stem for path in (ROOT / "params" / "cpu-long").glob("*.yaml")}
LINE_LENGTH = 100
# Modules that need nothing of the library; a chapter that only holds a stage exports nothing.
WITHOUT_IMPORTS = {"core", "paper", "grader", "claims"}
HARD_PATH = re.compile(r"""["'](/home|/tmp|/root|/work|C:\\)""")
RUNS_FOREIGN_CODE = re.compile(
    r"\bimport pickle|\bpickle\.|trust_remote_code\s*=\s*True"
    r"|weights_only\s*=\s*False|(?<![\w.])eval\(model"
)


def chapter_name(notebook: Path) -> str:
    return notebook.stem


each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=chapter_name)
each_stage = pytest.mark.parametrize("stage", STAGES)


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_sources(notebook: Path) -> list[str]:
    return [source(cell) for cell in cells(notebook) if cell["cell_type"] == "code"]


def stage_notebook(stage: str) -> Path:
    return ROOT / "nbs" / f"{stage}.ipynb"


def module_of(notebook: Path) -> str:
    "The module that a notebook says it exports."
    for text in code_sources(notebook):
        if found := re.search(r"#\| default_exp (\w+)", text):
            return found[1]
    raise AssertionError(f"{notebook.name} has no default_exp")


def modules_imported(text: str) -> set[str]:
    "Modules of the library that a cell imports, at its top or inside a function."
    modules = set()
    tree = stages.parsed(text)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "tpro_nb":
            names = [f"tpro_nb.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        modules |= {name.split(".")[1] for name in names if name.startswith("tpro_nb.")}
    return modules


def parameter_names(stage: str) -> set[str]:
    return set(stages.parameter_signature(stage_notebook(stage)))


def given_parameters(profile: str, stage: str) -> set[str]:
    text = (ROOT / "params" / profile / f"{stage}.yaml").read_text(encoding="utf-8")
    return set(yaml.safe_load(text))


def test_every_chapter_of_the_plan_is_there():
    numbers = {re.match(r"\d+", stage)[0] for stage in STAGES}
    assert numbers >= {f"{number:02}" for number in (*range(1, 15), 16)}


@each_notebook
def test_clean(notebook):
    for cell in cells(notebook):
        executed = cell.get("outputs") or cell.get("execution_count") is not None
        assert not executed, f"run nbdev-clean: {source(cell)[:60]}"
        assert set(cell["metadata"]) <= {"tags"}


@each_notebook
def test_cells_are_named_once(notebook):
    names = [cell["id"] for cell in cells(notebook)]
    assert len(names) == len(set(names))


@each_notebook
def test_one_statement_a_line_and_no_long_lines(notebook):
    for text in code_sources(notebook):
        for line in text.splitlines():
            assert len(line) <= LINE_LENGTH, line
        python = re.sub(r"(?m)^\s*[%!].*$", "", text)
        for token in tokenize.generate_tokens(io.StringIO(python).readline):
            assert token.string != ";", token.line


@each_notebook
def test_no_absolute_paths_and_no_pickle(notebook):
    for text in code_sources(notebook):
        assert not HARD_PATH.search(text), text[:80]
        assert not RUNS_FOREIGN_CODE.search(text), text[:80]


@each_stage
def test_one_parameters_cell_never_exported(stage):
    notebook = stage_notebook(stage)
    tagged = [cell for cell in cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert "#| export" not in source(tagged[0])
    signature = stages.parameter_signature(notebook)
    assert signature["run_dir"] == ("str", "")
    assert signature["seed"][0] == "int"
    stages.check_params(notebook, {}, stage)


class NamesBound(ast.NodeVisitor):
    "Names that a cell leaves behind: assigned, looped over, imported or defined."

    def __init__(self):
        self.names: set[str] = set()

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.names.add(node.id)

    def visit_FunctionDef(self, node):
        self.names.add(node.name)

    visit_ClassDef = visit_FunctionDef

    def visit_Import(self, node):
        self.names |= {one.asname or one.name.split(".")[0] for one in node.names}

    visit_ImportFrom = visit_Import

    def nothing(self, node):
        "A comprehension's or lambda's names are its own."

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda = nothing


def names_bound(text: str) -> set[str]:
    python = re.sub(r"(?m)^\s*[%!].*$", "", text)
    found = NamesBound()
    found.visit(ast.parse(python))
    return found.names


@pytest.mark.parametrize(
    "text,bound",
    [
        ("english = dict(a=1)", True),
        ("for english in range(3):\n    print(english)", True),
        ("with open('a') as english:\n    pass", True),
        ("def english():\n    return 1", True),
        ("from tpro_nb.tags import english_share as english", True),
        ("print(english)", False),
        ("not_russian = dict(english=1)", False),
        ("[english for english in range(3)]", False),
        ("settings.english = 1", False),
        ("def other():\n    english = 1", False),
    ],
)
def test_names_that_a_cell_leaves_behind(text, bound):
    assert ("english" in names_bound(text)) == bound


@each_stage
def test_no_example_takes_a_parameters_name(stage):
    "What an example assigns, the stage below it would run with."
    notebook = stage_notebook(stage)
    below = code_sources(notebook)
    while not re.search(r"^run_dir: str", below.pop(0), re.M):
        pass
    for text in below:
        if "#| eval: false" not in text:
            assert not names_bound(text) & parameter_names(stage), text[:200]


@each_notebook
def test_a_module_has_its_chapters_name(notebook):
    module = module_of(notebook)
    assert module == notebook.stem.split("_", 1)[1]
    assert (ROOT / "tpro_nb" / f"{module}.py").exists()


def test_every_module_has_a_chapter():
    modules = {path.stem for path in (ROOT / "tpro_nb").glob("[!_]*.py")}
    assert modules == {module_of(notebook) for notebook in NOTEBOOKS}


@each_stage
def test_a_stage_reads_only_from_earlier_stages(stage):
    for name in stages.inputs_of(stage_notebook(stage)):
        upstream = name.split("/")[0]
        assert upstream in STAGES, f"{stage} reads {name}: there is no such stage"
        assert name < stage, f"{stage} reads {name}, which is not earlier"


@each_notebook
def test_a_chapter_imports_only_from_earlier_ones(notebook):
    "Earlier is what sorts before it in `nbs/`; examples and stages keep to it as exports do."
    earlier = {module_of(other) for other in NOTEBOOKS if other.name < notebook.name}
    used = set()
    for text in code_sources(notebook):
        used |= modules_imported(text)
    module = module_of(notebook)
    assert used <= earlier, f"{notebook.stem} imports {used - earlier}"
    assert used or module in WITHOUT_IMPORTS  # the test sees imports at all


def test_a_public_name_is_exported_once():
    "A reader who looks a name up, or a page that links to it, must find one thing."
    homes = defaultdict(list)
    for path in sorted((ROOT / "tpro_nb").glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    homes[name].append(path.stem)
    assert len(homes) > 500  # the test sees names at all
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not twice


@pytest.mark.parametrize("profile", FULL_PROFILES)
def test_profiles_are_complete_and_valid(profile):
    params = stages.load_params(ROOT, profile)
    assert list(params) == [stage for stage in STAGES if stage not in LONG_STAGES]
    for stage in params:
        given = given_parameters(profile, stage)
        assert given == parameter_names(stage), f"{profile}/{stage}: list every parameter"


def test_long_chapters_stand_on_the_cpu_run():
    params = stages.load_params(ROOT, "cpu-long")
    assert LONG_STAGES
    assert not LONG_STAGES & set(stages.load_params(ROOT, "cpu"))
    assert {values["run_dir"] for values in params.values()} == {"outputs/cpu"}
    for stage in params:
        assert given_parameters("cpu-long", stage) == parameter_names(stage)


def test_tpro_profile():
    expected = {"10_evaluation", "13_serving", "14c_eagle_speedup"}
    assert set(stages.load_params(ROOT, "tpro")) == expected


def test_export_is_fresh():
    modules = sorted((ROOT / "tpro_nb").glob("*.py"))
    before = {path: path.read_bytes() for path in modules}
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=ROOT, check=True)
    after = {path: path.read_bytes() for path in (ROOT / "tpro_nb").glob("*.py")}
    changed = [path.name for path in after if before.get(path) != after[path]]
    assert not changed, f"run nbdev-export and commit: {changed}"


def settings() -> configparser.SectionProxy:
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_settings_ini_is_the_one_source():
    ini = settings()
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, nbdev = pyproject["project"], pyproject["tool"]["nbdev"]
    dynamic = {"version", "dependencies", "requires-python", "optional-dependencies"}
    assert set(project["dynamic"]) >= dynamic
    assert "version" not in project
    assert nbdev["lib_name"] == nbdev["lib_path"] == ini["lib_name"] == project["name"]
    assert nbdev["allowed_cell_metadata_keys"] == ["tags"]
    assert tpro_nb.__version__ == ini["version"]


def test_installed_package_is_that_of_settings_ini():
    ini = settings()
    assert version("tpro_nb") == ini["version"]
    lines = [line for line in ini["requirements"].splitlines() if line.strip()]
    asked = {re.split(r"[\[<>=]", line)[0].strip() for line in lines}
    named = "jupyterlab papermill nbdev torch transformers datasets trl matplotlib"
    assert asked >= set(named.split())
    installed = {re.split(r"[\[<>=; ]", line)[0] for line in requires("tpro_nb")}
    assert asked <= installed, "settings.ini has changed: pip install -e . again"


def test_every_reported_number_is_defined():
    rows = metric_table()
    assert all(row["unit"] and row["formula"] and row["null_rule"] for row in rows)
    assert len({(row["stage"], row["key"]) for row in rows}) == len(rows)
    units = {"_s": "s", "_ms": "ms", "_mb": "MB", "_pct": "%"}
    for row in rows:
        for ending, unit in units.items():
            if row["key"].endswith(ending) and not row["key"].endswith("_per_s"):
                assert row["unit"].startswith(unit), row
