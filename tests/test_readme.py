"README: short, its command near the top, and every figure that of a metrics.json."

import csv
import re
from functools import cache

import pytest
from conftest import ROOT

from tpro_nb.core import read_json

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", README, flags=re.S)
with open(ROOT / "tests" / "readme_figures.csv", encoding="utf-8", newline="") as file:
    FIGURES = list(csv.DictReader(file))


@cache
def metrics(stage: str) -> dict:
    return read_json(ROOT / "outputs" / "reference" / "cpu" / stage / "metrics.json")


def shown(figure: dict) -> str:
    "The figure as its row says it is written, from the committed run's metrics."
    found = metrics(figure["stage"])
    values = [found[key] for key in figure["keys"].split()]
    return figure["format"].format(*values)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure["keys"].split()[0])
def test_a_figure_is_that_of_the_committed_run(figure):
    assert shown(figure) in PROSE


def test_no_number_without_a_source():
    "What looks like a measurement is in the table: decimals, percentages, intervals, points."
    text = PROSE
    for figure in FIGURES:
        text = text.replace(shown(figure), "")
    text = re.sub(r"\(http\S*\)|\([\w/.]+\)", "", text)  # addresses of links
    constants = [
        "1.85 times",
        "arXiv 2512.10430",
        "Apache-2.0",
        "GPL-2.0",
        "CC BY-SA 4.0",
        "Python 3.11",
    ]
    for constant in [*constants, "T-pro 2.0", "temperature 1.7", "95 % intervals"]:
        text = text.replace(constant, "")
    assert not re.findall(r"\d+\.\d+|\d+ %|\[\d[^\]]*\]|\d+ points", text)


def test_the_first_command_comes_early():
    before, _, _ = README.partition("make run")
    assert "git clone" in before and len(before.split()) <= 200


def test_it_can_be_finished():
    words = len(README.split())
    assert 600 <= words <= 900, words


def test_every_chapter_is_in_the_table():
    for chapter in (ROOT / "nbs").glob("*.ipynb"):
        link = re.search(rf"\((outputs/reference/\S+/{chapter.name})\)", README)
        assert link, f"{chapter.stem} is not in README's table of chapters"
        assert (ROOT / link[1]).exists(), link[1]
