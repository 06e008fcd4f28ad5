"`tpro-nb curate` as somebody uses it: files, a benchmark, and questions about rows."

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from tpro_nb import cli, curate
from tpro_nb.core import UserError, read_json

EXAM = "Найдите площадь треугольника со сторонами 3, 4 и 5 и прямым углом между ними."
ROWS = [
    dict(instruction="Кто написал «Войну и мир»?", output="Лев Толстой написал этот роман."),
    dict(instruction="КТО НАПИСАЛ «Войну и мир»", output="Лев Толстой написал этот роман"),
    dict(instruction=EXAM.replace("Найдите", "Вычислите"), output="Площадь равна 6."),
    dict(instruction="Переведи: кот", output=None),
    dict(instruction="Сколько будет 2 + 2?", output="Четыре, потому что это сумма."),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    "A folder to work in, with rows and a benchmark."
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path("exam.json").write_text(json.dumps([dict(question=EXAM)]), encoding="utf-8")
    return tmp_path


def said_by(capsys, *argv: str) -> str:
    "What the command prints; its status must be 0."
    with pytest.raises(SystemExit) as end:
        cli.main(["curate", *argv])
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    return said.out


def test_a_run_and_questions_about_its_rows(folder, capsys):
    said = said_by(capsys, "rows.jsonl", "--protect", "exam.json", "--out", "clean")
    assert "begins with alpaca" in said
    assert "5  rows read" in said and "2  kept" in said
    manifest = read_json("clean/manifest.json")
    assert manifest["dropped_by_step"] == dict(decontaminate=1, exact=1, read=1)
    assert manifest["languages"]["ru"]["rows"] == 2
    asked = {
        "rows.jsonl:3": "it met the protected item exam.json:1",
        "rows.jsonl:4": "output: ",
        "rows.jsonl:5": "kept: in kept/00000.parquet",
    }
    for row, answer in asked.items():
        assert answer in said_by(capsys, "clean", "--why", row)
    copies = {
        row: said_by(capsys, "clean", "--why", row) for row in ("rows.jsonl:1", "rows.jsonl:2")
    }
    (gone,) = [text for text in copies.values() if "dropped by exact" in text]
    other = "1" if "rows.jsonl:2) dropped" in gone else "2"
    assert "it met foreign-" in gone and f"(rows.jsonl:{other})" in gone
    again = said_by(capsys, "rows.jsonl", "--protect", "exam.json", "--out", "clean")
    assert "2  kept" in again


WRONG = {
    "no --out": (["rows.jsonl"], "--out DIR is needed"),
    "no such file": (["rows.json", "--out", "o"], "rows.json: no such file"),
    "no such benchmark": (["rows.jsonl", "--out", "o", "--protect", "x.jsonl"], "x.jsonl: no such"),
    "a benchmark without questions": (
        ["rows.jsonl", "--out", "o", "--protect", "keys.jsonl"],
        "keys.jsonl, row 1: no question under",
    ),
    "another key": (
        ["rows.jsonl", "--out", "o", "--protect", "exam.json", "--protect-key", "q"],
        "exam.json, row 1: no question under q",
    ),
    "jaccard": (["rows.jsonl", "--out", "o", "--jaccard", "70"], "jaccard: 70"),
    "workers": (["rows.jsonl", "--out", "o", "--workers", "0"], "workers: 0"),
    "shard_mb": (["rows.jsonl", "--out", "o", "--shard-mb", "-1"], "shard_mb"),
    "slurm": (["rows.jsonl", "--out", "o", "--executor", "slurm"], "partition, time"),
    "tokenizer": (["rows.jsonl", "--out", "o", "--tokenizer", "t"], "tokenizer: no such file"),
    "template": (["rows.jsonl", "--out", "o", "--template", "t"], "chat template: no such file"),
    "retries that are not whole": (
        ["rows.jsonl", "--out", "o", "--endpoint", "retries=2.5"],
        "endpoint: retries: 2.5, where a whole number",
    ),
    "a model that is not there": (
        ["rows.jsonl", "--out", "o", "--dry-run", "--model", "reward=/nope"],
        "models: reward: '/nope' is neither a folder",
    ),
    "no rows": (["empty.jsonl", "--out", "o"], "no rows in empty.jsonl"),
    "an empty benchmark": (
        ["rows.jsonl", "--out", "o", "--protect", "exam.json", "empty.jsonl"],
        "empty.jsonl: nothing is in it",
    ),
    "an empty list": (["rows.jsonl", "--out", "o", "--protect", "none.json"], "nothing is in it"),
    "an empty packed one": (
        ["rows.jsonl", "--out", "o", "--protect", "none.jsonl.gz"],
        "nothing is in it",
    ),
    "a key of no benchmark": (
        ["rows.jsonl", "--out", "o", "--protect-key", "q"],
        "--protect-key q",
    ),
    "slurm's options without slurm": (
        ["rows.jsonl", "--out", "o", "--slurm", "partition=cpu"],
        "only --executor slurm",
    ),
    "a tokenizer of another kind": (
        ["rows.jsonl", "--out", "o", "--tokenizer", "rows.jsonl"],
        "rows.jsonl is no tokenizer.json",
    ),
    "no ray": (["rows.jsonl", "--out", "o", "--executor", "ray"], "pip install ray"),
    "no run": (["rows.jsonl", "--why", "rows.jsonl:1"], "no finished run"),
}


@pytest.mark.parametrize("argv, named", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_before_work_starts(argv, named, folder, capsys, monkeypatch):
    monkeypatch.setattr(curate.importlib.util, "find_spec", lambda name: None)
    Path("empty.jsonl").touch()
    Path("none.json").write_text("[]")
    with gzip.open("none.jsonl.gz", "wb"):
        pass
    Path("keys.jsonl").write_text('{"q": "2+2?"}')
    with pytest.raises(SystemExit) as end:
        cli.main(["curate", *argv])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert named in said and "Traceback" not in said
    assert not Path("o/work").exists()


def test_settings_of_endpoints_keep_their_kind():
    told = dict(retries="2", per_s="3", wait_s="0.5", timeout_s="1e2")
    line = ["rows.jsonl", *(f"--endpoint={key}={value}" for key, value in told.items())]
    settings = curate.models_asked(curate.curate_parser().parse_args(line)).endpoint
    assert settings == dict(retries=2, per_s=3, wait_s=0.5, timeout_s=100)
    assert isinstance(settings["retries"], int)


def test_rows_that_were_never_there(folder, capsys):
    said_by(capsys, "rows.jsonl", "--out", "clean")
    with pytest.raises(UserError, match="no row of this id"):
        curate.why_text("clean", "rows.jsonl:99")


def test_a_dry_run_shows_the_plan_and_reads_nothing(folder, capsys):
    said = said_by(capsys, "rows.jsonl", "--out", "clean", "--dry-run")
    assert "step duplicates: 1 tasks" in said
    assert not Path("clean/kept").exists()
    slurm = ["--executor", "slurm", "--slurm", "partition=cpu", "--slurm", "time=1:00"]
    said = said_by(capsys, "rows.jsonl", "--out", "clean", "--dry-run", *slurm)
    assert "clean/work/slurm/read.slurm" in said


def test_a_folder_that_cannot_hold_the_result_is_refused_by_name(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    wrong = {
        "--out " + str(rows): ["--out", str(rows)],
        "the rows lie in that folder": ["--out", str(tmp_path)],
        "cannot be written to": ["--out", "/proc/nowhere/out"],
        "diverse_share: 0": ["--out", str(tmp_path / "out"), "--diverse-share", "0"],
    }
    for said, options in wrong.items():
        with pytest.raises(UserError, match=said):
            curate.curate_command([str(rows), *options])


def copies(text, places):
    "Rows of one file, the same text at some places."
    rows = [dict(prompt=f"Вопрос номер {n}: что это?", completion="Ответ.") for n in range(6)]
    for place in places:
        rows[place] = dict(prompt=text, completion="Один и тот же ответ на вопрос.")
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("places", [(0, 1), (1, 3), (0, 2, 5), (3, 4, 5)])
def test_an_exact_copy_met_the_row_that_stayed(folder, capsys, places):
    text = "Где находится озеро Байкал?"
    Path("copies.jsonl").write_text(copies(text, places), encoding="utf-8")
    said_by(capsys, "copies.jsonl", "--out", "clean")
    told = [said_by(capsys, "clean", "--why", f"copies.jsonl:{place + 1}") for place in places]
    (stayed,) = [place for place, line in zip(places, told) if ") kept: " in line]
    for line in told:
        if ") kept: " not in line:
            assert f"(copies.jsonl:{stayed + 1})" in line.split("it met")[1]


def test_copies_of_two_files_meet_each_other(folder, capsys):
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text(copies("Где находится Байкал?", [0]), encoding="utf-8")
    said_by(capsys, "a.jsonl", "b.jsonl", "--out", "clean")
    told = {name: said_by(capsys, "clean", "--why", f"{name}.jsonl:1") for name in "ab"}
    (gone,) = [name for name, line in told.items() if "dropped by exact" in line]
    (stayed,) = set("ab") - {gone}
    assert f"({stayed}.jsonl:1)" in told[gone].split("it met")[1]


def test_a_result_in_the_folder_of_the_rows_goes_on(folder, capsys):
    Path("exam.json").unlink()
    for _ in range(2):
        assert "5  rows read" in said_by(capsys, ".", "--out", "clean")
    with pytest.raises(UserError, match="the rows lie in that folder"):
        curate.curate_command([".", "clean/dropped.parquet", "--out", "clean"])


def test_the_same_rows_written_later_are_the_same(folder, capsys):
    said_by(capsys, "rows.jsonl", "--out", "clean")
    os.utime("rows.jsonl")
    assert "3  kept" in said_by(capsys, "rows.jsonl", "--out", "clean")


def test_a_dry_run_begins_nothing(folder, capsys):
    said_by(capsys, "rows.jsonl", "--out", "clean", "--dry-run")
    text = Path("rows.jsonl").read_text("utf-8")
    Path("rows.jsonl").write_text(text.replace("кот", "кит"), "utf-8")
    assert "3  kept" in said_by(capsys, "rows.jsonl", "--out", "clean")


def test_a_saved_folder_with_other_rows_is_another_input(folder):
    from datasets import Dataset

    for answer in ("Байкал.", "Ладога."):
        shutil.rmtree("saved", ignore_errors=True)
        rows = [dict(prompt="Какое озеро?", completion=answer)]
        Dataset.from_list(rows).save_to_disk("saved")
        if answer == "Байкал.":
            assert curate.curate_command(["saved", "--out", "clean"]) is None
    with pytest.raises(UserError, match="has changed since"):
        curate.curate_command(["saved", "--out", "clean"])


def test_rows_edited_since_the_run_began_are_no_old_result(folder, capsys):
    said_by(capsys, "rows.jsonl", "--out", "clean")
    Path("rows.jsonl").write_text(
        Path("rows.jsonl").read_text("utf-8").replace("кот", "кит"), "utf-8"
    )
    with pytest.raises(UserError, match="asked something else: rows.jsonl has changed"):
        curate.curate_command(["rows.jsonl", "--out", "clean"])
    assert "3  kept" in said_by(capsys, "rows.jsonl", "--out", "other")


@pytest.mark.parametrize(
    "content, told",
    [
        ('{"вопрос": "а", "ответ": "б"}\n'.encode(), "not one row could be read"),
        ('{"prompt": "а", "completion": "б"}\n'.encode("cp1251"), "not one row could be read"),
        ('{"prompt": "а", "completion": "б"}\n'.encode("utf-16"), "not one row could be read"),
        (b'{"prompt": "a", "completion": "b"}\n{"broken\n', ""),
    ],
)
def test_a_source_that_says_nothing_is_no_success(folder, capsys, content, told):
    Path("other.jsonl").write_bytes(content)
    status = curate.curate_command(["rows.jsonl", "other.jsonl", "--out", "clean"])
    said = capsys.readouterr()
    assert status == (1 if told else None)
    assert told in said.err and "no row is left" not in said.err
    alone = curate.curate_command(["other.jsonl", "--out", "alone"])
    assert alone == status
    assert ("no row is left" in capsys.readouterr().err) is bool(told)


def test_a_reason_keeps_the_numbers_of_names(folder, capsys):
    Path("other.jsonl").write_bytes('{"prompt": "а", "completion": "б"}\n'.encode("cp1251"))
    curate.curate_command(["other.jsonl", "--out", "clean"])
    assert "not UTF-8 (byte #" in capsys.readouterr().out
