"The report as a browser would get it: self-contained, escaped, studies and stages named."

import html.parser
import os
import shutil

import pytest
from conftest import ROOT
from test_ledger import RUN

from tpro_nb import core, ledger, report, studies
from tpro_nb.ledger import Measured


def test_captions_and_numbers():
    markdown = "## T\n\nfirst\n\nLook at **this** [one](http://x), `code`."
    assert report.plain_text(markdown) == "Look at this one, code."
    metrics = dict(speedup=1.4, speedup_lo=1.3, speedup_hi=1.5, wall_s=3.0, chain_speedup=None)
    rows = report.key_numbers("14c_eagle_speedup", metrics)
    assert [row.key for row in rows] == ["speedup", "wall_s", "chain_speedup"]
    assert rows[0].value == "1.40 [1.30, 1.50]"
    assert rows[2].value == "not measured"


class Tags(html.parser.HTMLParser):
    "Unclosed tags, outside addresses, scripts."

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.bad, self.seen = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)

    @property
    def balanced(self):
        return not self.bad and not self.open


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
)


@pytest.fixture
def run_dir(tmp_path):
    for stage, metrics in RUN.items():
        core.write_json(tmp_path / stage / "metrics.json", metrics | dict(wall_s=1.0, peak_mb=2.0))
    out = tmp_path / "14c_eagle_speedup"
    (out / "speed.png").write_bytes(PNG)
    cells = [
        dict(cell_type="markdown", source="# 14 · Скорость <b>&"),
        dict(cell_type="markdown", source="Смотрите на <script>alert(1)</script> линию."),
        dict(cell_type="code", source="run.figure(fig, 'speed')"),
    ]
    core.write_json(out / "14c_eagle_speedup.ipynb", dict(cells=cells))
    stamp = dict(
        finished="2026-01-01 00:00",
        seconds=3,
        peak_mb=4,
        seed=0,
        code_version="abc",
        code_key=dict(key="k1"),
        licences=dict(SmolLM2="Apache-2.0"),
        environment=core.environment(),
    )
    core.write_json(out / "stamp.json", stamp)
    return tmp_path


def test_report_needs_nothing_from_outside(run_dir):
    page = report.write_report(run_dir)
    text = page.read_text(encoding="utf-8")
    tags = Tags(text)
    assert page == run_dir / "report.html"
    assert tags.balanced
    for tag, attributes in tags.seen:
        assert tag != "link"
        assert not (tag == "script" and attributes.get("src"))
        for address in (attributes.get("src"), attributes.get("href")):
            inside = address is None or address.startswith(("data:image/png;base64,", "#"))
            assert inside, address
    assert "url(" not in text
    assert "@import" not in text


def test_report_escapes_what_comes_from_a_run(run_dir):
    text = report.write_report(run_dir).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "Скорость &lt;b&gt;&amp;" in text


def test_report_shows_the_run_and_the_ledger(run_dir):
    text = report.write_report(run_dir).read_text(encoding="utf-8")
    for said in (
        "14c_eagle_speedup",
        "SmolLM2",
        "Apache-2.0",
        "2026-01-01",
        "1.40 [1.30, 1.50]",
        "prefers-color-scheme",
    ):
        assert said in text, said
    assert text.count("<tr data-v=") == len(ledger.claim_table())
    assert "2.28" in text


def test_report_of_nothing(tmp_path):
    with pytest.raises(core.UserError, match="no run"):
        report.write_report(tmp_path / "absent")
    assert "No stage of this run has finished" in report.write_report(tmp_path).read_text()


def test_report_names_a_broken_file(run_dir):
    (run_dir / "10_evaluation" / "metrics.json").write_text('{"a": 1')
    with pytest.raises(core.UserError, match="10_evaluation"):
        report.write_report(run_dir)


@pytest.fixture
def two_runs(tmp_path):
    "Two runs whose speed-ups lie apart; only the first has chapter 07."
    one = dict(speedup=1.2, speedup_lo=1.2 - 0.1, speedup_hi=1.3, prompts=28, draft_ms=0.9)
    two = dict(speedup=1.6, speedup_lo=1.6 - 0.1, speedup_hi=1.7, prompts=28)
    for name, metrics in (("one", one), ("two", two)):
        folder = tmp_path / name / "14c_eagle_speedup"
        folder.mkdir(parents=True)
        core.write_json(folder / "metrics.json", metrics)
        code = dict(code="c", modules={}, params=dict(seed=0, tree=name))
        core.write_json(folder / "stamp.json", dict(code_key=code))
    (tmp_path / "one" / "07_sft").mkdir()
    core.write_json(tmp_path / "one" / "07_sft" / "metrics.json", dict(acc_think_pct=90.0))
    return tmp_path / "one", tmp_path / "two"


def contents(*folders):
    files = {}
    for folder in folders:
        files |= {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return files


def test_two_runs_side_by_side(two_runs, tmp_path):
    before = contents(*two_runs)
    page = report.compare_runs(*two_runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert contents(*two_runs) == before
    for said in (
        "Not the same in both: tree one against two.",
        "Only one has this stage.",
        "acc_think_pct",
        "1.20 [1.10, 1.30]",
        "1.60 [1.50, 1.70]",
        "1 figures are apart",
        "one run only",
    ):
        assert said in page, said
    assert "http" not in page.split("</style>")[1]


def test_what_does_not_compare(two_runs, tmp_path):
    first, second = Measured(1, 0.9, 1.1), Measured(1.05, 1.0, 1.2)
    assert report.how_they_stand(first, second) == "overlap"
    with pytest.raises(core.UserError, match="no finished stage"):
        report.compare_runs(two_runs[0], tmp_path)


def stamped(folder, key, upstream, cpu):
    "A stage whose stamp says what it was computed from and on which machine."
    core.write_json(folder / "metrics.json", {})
    environment = dict(cpu=cpu, cores=2, ram_gb=1, system="x", python="3", packages={})
    stamp = dict(
        code_key=dict(key=key, upstream=upstream),
        environment=environment,
        seconds=1,
        peak_mb=1,
        seed=0,
        finished="now",
    )
    core.write_json(folder / "stamp.json", stamp)


def test_a_folder_of_two_runs_says_so(tmp_path):
    stamped(tmp_path / "06_midtraining", "b", {}, "A")
    stamped(tmp_path / "07_sft", "c", {"06_midtraining": "a"}, "<B>")
    page = report.write_report(tmp_path).read_text()
    assert "07_sft was computed from another 06_midtraining than the one here." in page
    assert "2 environments" in page
    assert "<B>" not in page
    same = core.read_json(tmp_path / "06_midtraining" / "stamp.json")
    core.write_json(tmp_path / "07_sft" / "stamp.json", same)
    page = report.write_report(tmp_path).read_text()
    assert "another 06" not in page
    assert "environments" not in page


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout with the committed studies, and an empty run."
    shutil.copytree(
        ROOT / "outputs" / "reference",
        tmp_path / "outputs" / "reference",
        ignore=shutil.ignore_patterns("cpu", "playground.png"),
    )
    (tmp_path / "outputs" / "cpu").mkdir()
    monkeypatch.setattr(report, "project_root", lambda: tmp_path)
    return tmp_path


def test_studies_are_shown_and_named_as_other_runs(checkout):
    run = checkout / "outputs" / "cpu"
    text = report.write_report(run).read_text(encoding="utf-8")
    assert Tags(text).balanced
    assert "Nothing in the ledger rests on them" in text
    views = report.study_views(run)
    names = ("ablate", "grid", "limits", "bench", "curation")
    folders = {f"outputs/reference/{name}" for name in names}
    assert {view.folder for view in views} == folders
    for view in views:
        assert view.committed
        assert view.folder in text
        assert view.tables[0].rows
        for table in view.tables:
            assert {len(row) for row in table.rows} == {len(table.head)}
    pictures = sum(len(view.figures) for view in views)
    assert text.count("data:image/png") == pictures == 6


def test_without_studies_the_page_has_no_such_section(checkout):
    run = checkout / "outputs" / "cpu"
    shutil.rmtree(checkout / "outputs" / "reference")
    assert report.study_views(run) == []
    assert "Studies beside" not in report.write_report(run).read_text(encoding="utf-8")


def test_studies_name_chapters_that_exist():
    chapters = {file.name.split("_")[0] for file in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    for file in (ROOT / "outputs" / "reference").glob("*/study_*.json"):
        assert studies.read_study(file).chapter in chapters, file


def folders_of(run):
    "Study → the folder that the page takes it from."
    return {view.id: view.folder for view in report.study_views(run)}


def test_ones_own_study_comes_before_the_committed_one(checkout):
    "The run's own, else the newest."
    out = checkout / "outputs"
    for run, age in (("cpu", 100), ("smoke", 50)):
        shutil.copytree(out / "reference" / "grid", out / run / "grid")
        os.utime(out / run / "grid" / "study_grid.json", (age, age))
    assert folders_of(out / "cpu")["grid"] == "outputs/cpu/grid"
    assert folders_of(out / "h100")["grid"] == "outputs/cpu/grid"
    assert folders_of(out / "smoke")["grid"] == "outputs/smoke/grid"


def test_each_study_of_a_folder_goes_its_own_way(checkout):
    out = checkout / "outputs"
    shutil.copytree(out / "reference" / "ablate", out / "ablate" / "smoke")
    (out / "limits").mkdir()
    shutil.copy(out / "reference" / "limits" / "study_tau.json", out / "limits")
    folders = folders_of(out / "cpu")
    assert folders["effects"] == "outputs/ablate/smoke"
    assert folders["tau"] == "outputs/limits"
    assert folders["position"] == "outputs/reference/limits"
    (tau,) = [view for view in report.study_views(out / "cpu") if view.id == "tau"]
    assert not tau.committed
    (out / "limits" / "study_tau.json").write_text('{"file": "tau.csv"}')
    with pytest.raises(core.UserError, match="study_tau.json is not a study"):
        report.study_views(out / "cpu")


def test_the_head_counts_every_claim_and_says_how_to_see_it_again():
    claims = ledger.ledger(RUN, "a model", decides=True)
    stamps = {"01_a": dict(seconds=60), "02_b": dict(seconds=60), "14_c": dict(seconds=1800)}
    rows = {row.verdict: row for row in report.evidence(claims, stamps, "cpu")}
    assert sum(row.n for row in rows.values()) == len(claims)
    assert list(rows) == ledger.VERDICTS
    reproduced, direction = rows[ledger.REPRODUCED], rows[ledger.DIRECTION]
    assert reproduced.again == "tpro-nb run cpu --to 02; 2 minutes of stage time in this run"
    assert "; 32 minutes" in direction.again
    assert "minutes" not in report.evidence(claims, {}, "cpu")[1].again


DEV = {
    "07_sft": dict(
        acc_think_pct=99.0,
        acc_direct_pct=18.0,
        think_minus_direct_pct=81.0,
        think_minus_direct_pct_lo=74.0,
        think_minus_direct_pct_hi=88.0,
    )
}
TEST = {
    "10_evaluation": dict(
        avg_at_k_sft_think=0.95,
        avg_at_k_sft_direct=0.125,
        diff_think_minus_direct_sft=0.825,
        diff_think_minus_direct_sft_lo=0.75,
        diff_think_minus_direct_sft_hi=0.9,
    )
}


def test_the_head_prefers_test_problems_to_those_that_chose_the_rates():
    on_dev, on_test = report.run_summary(DEV)[0], report.run_summary(DEV | TEST)[0]
    assert "99 % of chapter 07's problems, greedily," in on_dev
    assert "81 points (95 % interval 74 to 88)" in on_dev
    assert (
        "95 % of the test problems when it thinks first and 13 % when it does not, a difference"
        " of 83 points (95 % interval 75 to 90)"
    ) in on_test
    assert report.run_summary({}) == []
