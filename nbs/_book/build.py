"""The reading edition: a static site from executed chapters.

    python nbs/_book/build.py [--run outputs/reference/cpu] [--out outputs/book]

A stage's page is the notebook that the run executed, if it ran today's code. Any other chapter's
examples are executed here on toys, once for every content, and kept in outputs/reference/chapters.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CHAPTERS = ROOT / "nbs"
REFERENCE = ROOT / "outputs" / "reference" / "cpu"
KEPT = ROOT / "outputs" / "reference" / "chapters"
PAPER = "https://arxiv.org/html/2512.10430v1"
PARTS = [  # the last chapter number of a part, and its title
    ("00", "What every chapter stands on"),
    ("03", "The vocabulary and the base model"),
    ("05", "The yardstick and the data"),
    ("09", "Training"),
    ("10", "Evaluation"),
    ("14", "Speculative decoding"),
    ("15", "Serving and side by side"),
    ("16", "The ledger"),
    ("99", "The runner"),
]
SKIPPED = re.compile(r"^#\|\s*(eval:\s*false|notest|gpu)", re.M)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
BORROWED_PARAMETERS = "parameters-of-run"  # id of a cell


def part_of(name: str) -> str:
    "The title of the part to which a chapter belongs."
    return next(title for last, title in PARTS if name[:2] <= last)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def digest(notebook) -> str:
    "What a chapter says, without what it showed."
    sources = [(cell.cell_type, cell.source) for cell in notebook.cells]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def same_code(notebook, other) -> bool:
    "Whether two notebooks hold the same code; what papermill or a borrowing adds is left aside."

    def code(whole) -> list[str]:
        cells = [cell for cell in whole.cells if cell.cell_type == "code"]
        return [
            cell.source
            for cell in cells
            if "injected-parameters" not in tags_of(cell) and cell.get("id") != BORROWED_PARAMETERS
        ]

    return code(notebook) == code(other)


def executed(name: str, run: Path):
    "A chapter with its outputs: the run's, if it ran this code; else that of the examples on toys."
    made = run / name / f"{name}.ipynb"
    if made.exists():
        of_run = read(made)
        if same_code(of_run, read(CHAPTERS / f"{name}.ipynb")):
            without_noise(of_run)
            return of_run
    return on_toys(name)


def on_toys(name: str):
    "The kept copy whose examples ran on toys; they run now where the chapter's code has changed."
    chapter = read(CHAPTERS / f"{name}.ipynb")
    made_of = digest(chapter)
    kept = KEPT / f"{name}.ipynb"
    before = read(kept) if kept.exists() else None
    if before is not None and before.metadata.get("tpro_nb", {}).get("digest") == made_of:
        return before
    if before is not None and same_code(before, chapter):
        copy_outputs(before, chapter)
    else:
        print(f"running {name}", flush=True)
        run_examples(chapter)
    chapter.metadata["tpro_nb"] = {"digest": made_of}
    without_noise(chapter)
    for cell in chapter.cells:
        cell.metadata.pop("execution", None)
    borrow_results(chapter, REFERENCE / name)
    kept.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(chapter, kept)
    return chapter


def copy_outputs(executed_copy, chapter) -> None:
    "What a chapter's cells showed when their prose was another."
    chapter.metadata = executed_copy.metadata
    shown = {cell.id: cell for cell in executed_copy.cells if cell.cell_type == "code"}
    for cell in chapter.cells:
        if cell.cell_type == "code":
            cell.outputs = shown[cell.id].outputs
            cell.execution_count = shown[cell.id].execution_count


def run_examples(chapter) -> None:
    "Run a chapter's cells in place, but for those of a stage, which want a run."
    whole = list(chapter.cells)
    chapter.cells = [cell for cell in whole if not SKIPPED.search(cell.source)]
    os.environ["TPRO_NB_RUN"] = "none"  # toys, never a run that happens to lie here
    place = {"metadata": {"path": str(CHAPTERS)}}
    with tempfile.TemporaryDirectory(prefix="tpro_nb-") as sockets:  # a kernel without open ports
        transport = Config(KernelManager=dict(transport="ipc", ip=f"{sockets}/kernel"))
        client = NotebookClient(
            chapter, timeout=1200, kernel_name="python3", resources=place, config=transport
        )
        client.execute()
    chapter.cells = whole


def borrow_results(chapter, stage: Path) -> None:
    "Under the stage's cells what the committed run showed there, its parameters, and a note of it."
    made = stage / f"{stage.name}.ipynb"
    if not made.exists():
        return
    of_run = read(made)
    without_noise(of_run)
    shown = {cell.get("id"): cell.get("outputs", []) for cell in of_run.cells}
    borrowed = 0
    for cell in chapter.cells:
        if cell.cell_type == "code" and SKIPPED.search(cell.source):
            cell.outputs = shown.get(cell.id, [])
            borrowed += len(cell.outputs)
    if not borrowed:
        return
    injected = [cell for cell in of_run.cells if "injected-parameters" in tags_of(cell)]
    after = [place for place, cell in enumerate(chapter.cells) if "parameters" in tags_of(cell)]
    for cell in injected[:1]:
        lead = nbformat.v4.new_markdown_cell("The committed run's own:", id="lead-to-parameters")
        parameters = nbformat.v4.new_code_cell(cell.source, id=BORROWED_PARAMETERS)
        chapter.cells[after[0] + 1 : after[0] + 1] = [lead, parameters]
    stamp = json.loads((stage / "stamp.json").read_text(encoding="utf-8"))
    note = (
        "*The examples ran on toys. Below “The stage” stands what the committed run of "
        f"{stamp['finished'][:10]} showed, made by the code of version {stamp['code_version']}, "
        "before this chapter took its present form.*"
    )
    chapter.cells.insert(1, nbformat.v4.new_markdown_cell(note, id="results-of-run"))


def tags_of(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def without_noise(notebook) -> None:
    "Drop progress bars and what a library wrote to stderr; a book has no use for either."
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("name") != "stderr"
            and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        ]


def section_anchor(place: str) -> str:
    "`§3.2` → `S3.SS2`, `App. D.1` → `A4.SS1`: the ids of arXiv's pages."
    section = re.search(r"§(\d+)(?:\.(\d+))?", place)
    if section:
        return f"#S{section[1]}" + (f".SS{section[2]}" if section[2] else "")
    appendix = re.search(r"App\. ([A-I])(?:\.(\d+))?", place)
    if appendix:
        letter = ord(appendix[1]) - ord("A") + 1
        return f"#A{letter}" + (f".SS{appendix[2]}" if appendix[2] else "")
    return ""


def with_links(text: str, own: str, names: list[str]) -> str:
    "Links to the paper's places, to other papers and to other chapters."

    def to_paper(match: re.Match) -> str:
        return f"[{match[1]}]({PAPER}{section_anchor(match[1])})"

    def to_arxiv(match: re.Match) -> str:
        return f"[arXiv {match[1]}](https://arxiv.org/abs/{match[1]})"

    def to_chapter(match: re.Match) -> str:
        number = match[2]
        fitting = [name for name in names if name.split("_")[0].rstrip("abcdefgh") == number]
        exact = [name for name in names if name.split("_")[0] == number]
        target = (exact or fitting or [""])[0]
        return f"[{match[1]} {number}]({target}.ipynb)" if target and target != own else match[0]

    def to_room(match: re.Match) -> str:
        target = next((name for name in names if name.split("_")[0] == match[2]), own)
        return match[0] if target == own else f"([{match[2]}]({target}.ipynb)"

    text = re.sub(r"\[(paper[^\]]*)\](?!\()", to_paper, text)
    text = re.sub(r"(?<!/)\[?arXiv (\d{4}\.\d{5})\]?(?!\()", to_arxiv, text)
    text = re.sub(r"\b([Cc]hapter) (\d\d[a-h]?)\b(?!\])", to_chapter, text)
    return re.sub(r"(\()(\d\d[a-h])(?=[),])", to_room, text)


def page(name: str, notebook, names: list[str]):
    "A chapter as the book shows it: linked prose, code without nbdev's directives."
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, name, names)
        elif cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source).rstrip()
            if not cell.source:
                continue
        cells.append(cell)
    notebook.cells = cells
    return notebook


def title_of(notebook) -> str:
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def toctree(caption: str, entries: list[str], hidden: bool = True) -> str:
    options = f":caption: {caption}\n:maxdepth: 1\n" + (":hidden:\n" if hidden else "")
    return "```{toctree}\n" + options + "\n" + "\n".join(entries) + "\n```\n"


def front_page(titles: dict[str, str], run: Path, modules: list[str], report: bool) -> str:
    "Contents by part; figures come from the run that is named here."
    lines = ["# T-pro 2.0, chapter by chapter", ""]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines += [readme.split("\n\n")[1], ""]
    lines += [
        f"Stages that ran this code are shown as they ran in `{run.name}`; examples ran on toys.",
        "",
    ]
    if report:
        lines += [
            '<a href="report.html">The run\'s report</a>: the ledger, every figure, every number.',
            "",
        ]
    trees = []
    for part, members in groupby(titles, key=part_of):
        names = list(members)
        lines += [f"## {part}", ""]
        lines += [f"- [{titles[name]}](chapters/{name}.ipynb)" for name in names]
        lines += [""]
        trees.append(toctree(part, [f"chapters/{name}" for name in names]))
    trees.append(toctree("The library", [f"api/{module}" for module in modules]))
    return "\n".join(lines + trees)


def write_sources(run: Path, source: Path) -> None:
    "Everything Sphinx reads."
    shutil.rmtree(source, ignore_errors=True)
    for folder in ("chapters", "api", "_static"):
        (source / folder).mkdir(parents=True)
    shutil.copy(HERE / "conf.py", source)
    shutil.copy(HERE / "book.css", source / "_static")
    names = sorted(path.stem for path in CHAPTERS.glob("*.ipynb"))
    titles = {}
    for name in names:
        notebook = executed(name, run)
        titles[name] = title_of(notebook)
        nbformat.write(page(name, notebook, names), source / "chapters" / f"{name}.ipynb")
    modules = [name.split("_", 1)[1] for name in names]
    for name, module in zip(names, modules, strict=True):
        text = f"# tpro_nb.{module}\n\nThe chapter: [{titles[name]}](../chapters/{name}.ipynb)\n\n"
        text += f"```{{eval-rst}}\n.. automodule:: tpro_nb.{module}\n   :members:\n```\n"
        (source / "api" / f"{module}.md").write_text(text, encoding="utf-8")
    report = run / "report.html"
    (source / "index.md").write_text(
        front_page(titles, run, modules, report.exists()), encoding="utf-8"
    )


def build(run: Path, out: Path) -> Path:
    "The site in `out`; returns its first page."
    if not run.is_dir():
        sys.exit(f"--run {run}: there is no such folder; give one that holds a run's stages")
    write_sources(run, out / "source")
    site = out / "site"
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-j", "2", "-q", "-E"]
    subprocess.run([*command, str(out / "source"), str(site)], check=True)
    if (run / "report.html").exists():
        shutil.copy(run / "report.html", site)
    return site / "index.html"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the reading edition.")
    parser.add_argument(
        "--run",
        type=Path,
        default=REFERENCE,
        help="folder of the run whose executed notebooks become pages",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "book", help="folder for the site"
    )
    asked = parser.parse_args()
    print(build(asked.run.resolve(), asked.out.resolve()))


if __name__ == "__main__":
    main()
