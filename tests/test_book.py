"The reading edition: links are made where they should be, and every chapter has an executed copy."

import json
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
