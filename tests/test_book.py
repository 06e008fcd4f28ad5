"The reading edition: links are made where they should be, and every chapter has an executed copy."

import json
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "nbs" / "_book"))
import build  # noqa: E402 - a script beside the chapters

NAMES = sorted(path.stem for path in build.CHAPTERS.glob("*.ipynb"))


@pytest.mark.parametrize(
    "place, anchor",
    [
        ("paper §3.2", "#S3.SS2"),
        ("paper §4", "#S4"),
        ("paper App. D.1", "#A4.SS1"),
        ("paper App. H", "#A8"),
        ("paper, Table 2", ""),
    ],
)
def test_places_of_the_paper(place, anchor):
    assert build.section_anchor(place) == anchor
    assert f"({build.PAPER}{anchor})" in build.with_links(f"as said [{place}].", "07_sft", NAMES)


@pytest.mark.parametrize(
    "text, target",
    [
        ("see chapter 07 for it", "07_sft.ipynb"),
        ("Chapter 12a grows it", "12a_trees.ipynb"),
        ("chapter 14 measures", "14a_cost_model.ipynb"),
        ("chapter 12's decoder", "12a_trees.ipynb"),
    ],
)
def test_chapters_are_linked(text, target):
    assert f"]({target})" in build.with_links(text, "01_tokenizer_analysis", NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "chapter 07 is this one",
        "a chapter of seven",
        "[chapter 12a](12a_trees.ipynb) once is enough",
        "[paper](elsewhere)",
        "chapter 77 does not exist",
    ],
)
def test_what_is_no_link_stays(text):
    assert build.with_links(text, "07_sft", NAMES) == text


@pytest.mark.parametrize("name", NAMES)
def test_an_executed_copy_lies_there(name):
    executed = build.KEPT / f"{name}.ipynb"
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.fixture
def one_chapter(tmp_path, monkeypatch):
    "A chapter and its kept copy in a place of their own, and the list of what was run."
    name = "90a_stages.ipynb"
    shutil.copy(build.KEPT / name, tmp_path / name)
    ran: list = []
    chapters = tmp_path / "chapters"
    chapters.mkdir()
    whole = build.read(build.CHAPTERS / name)
    monkeypatch.setattr(build, "KEPT", tmp_path)
    monkeypatch.setattr(build, "CHAPTERS", chapters)
    monkeypatch.setattr(build, "run_examples", ran.append)
    return whole, chapters / name, ran


def test_a_new_sentence_runs_nothing(one_chapter, tmp_path):
    chapter, place, ran = one_chapter
    prose = next(cell for cell in chapter.cells if cell.cell_type == "markdown")
    prose.source += " One sentence more."
    build.nbformat.write(chapter, place)
    before = build.read(tmp_path / place.name)
    made = build.on_toys(place.stem)
    assert not ran
    assert any("One sentence more." in cell.source for cell in made.cells)
    shown = [cell.outputs for cell in made.cells if cell.cell_type == "code"]
    assert any(shown)
    assert shown == [cell.outputs for cell in before.cells if cell.cell_type == "code"]


def test_new_code_runs_again(one_chapter):
    chapter, place, ran = one_chapter
    code = [cell for cell in chapter.cells if cell.cell_type == "code"]
    code[-1].source += "\nprint(1)"
    build.nbformat.write(chapter, place)
    build.on_toys(place.stem)
    assert len(ran) == 1
