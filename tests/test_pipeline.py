"The runner on a toy chain: what is skipped, stale and why, what survives a kill, what is refused."

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from conftest import CHAIN, write_notebook

from tpro_nb import cards, cli, core, pipeline, reference, stages
from tpro_nb.core import UserError


def by_stage(root, profile="toy"):
    return {found.stage: found for found in stages.status(root, profile)}


def states(root):
    return {stage: found.state for stage, found in by_stage(root).items()}


def all_current(root):
    return set(states(root).values()) == {"current"}


def run(root, **chosen):
    "Bring the toy profile up to date; the lines the runner says."
    lines = []
    pipeline.run_profile(root, "toy", say=lines.append, **chosen)
    return lines


def run_quietly(root, profile):
    return pipeline.run_profile(root, profile, say=lambda line: None)


def publish(root, profile="toy"):
    return reference.publish(root, profile, say=lambda line: None)


def edit_json(path, **changes):
    "Replace fields of a json object in a file."
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_cells(root, stage, change):
    "Write a stage's notebook anew, each cell passed through `change`."
    write_notebook(root / "nbs" / f"{stage}.ipynb", [change(cell) for cell in CHAIN[stage]])


def stamp_bytes(root):
    return {stage: (root / "outputs/toy" / stage / "stamp.json").read_bytes() for stage in CHAIN}


def test_second_run_does_nothing(chain):
    assert states(chain) == dict.fromkeys(CHAIN, "missing")
    run(chain)
    stamps = stamp_bytes(chain)
    assert all_current(chain)
    assert all(line.endswith("current") for line in run(chain))
    assert stamps == stamp_bytes(chain)


def test_stale_says_why_and_spreads_downwards(chain):
    run(chain)
    (chain / "params/toy/02_double.yaml").write_text("run_dir: outputs/toy\nn: 5\n")
    found = by_stage(chain)
    assert found["01_make"].state == "current"
    assert found["02_double"].state == "stale"
    assert "parameter changed: n" in found["02_double"].why
    assert found["03_use"].state == "stale"
    assert "02_double" in found["03_use"].why


def test_prose_and_comments_do_not_make_stale_but_code_does(chain):
    run(chain)
    commented = "# why this file\nwrite_json"
    edit_cells(chain, "01_make", lambda cell: cell.replace("write_json", commented, 1))
    assert states(chain)["01_make"] == "current"
    edit_cells(chain, "01_make", lambda cell: cell.replace("[n]", "[n + 1]"))
    assert states(chain)["01_make"] == "stale"


def test_damaged_artefact_is_noticed_and_made_again(chain):
    run(chain)
    artefact = chain / "outputs/toy/01_make/x.json"
    good = artefact.read_bytes()
    artefact.write_bytes(good[:1])
    assert "artefact changed or gone: x.json" in stages.status(chain, "toy")[0].why
    run(chain)
    assert artefact.read_bytes() == good
    assert all_current(chain)


def test_users_mistake_in_a_stage_then_resume(chain, monkeypatch):
    monkeypatch.setenv("TOY_WRONG", "1")
    with pytest.raises(UserError, match="03_use: y is wrong"):
        run(chain)
    assert states(chain) == {"01_make": "current", "02_double": "current", "03_use": "failed"}
    monkeypatch.delenv("TOY_WRONG")
    lines = run(chain)
    assert lines[0].endswith("current")
    assert lines[1].endswith("current")
    assert "done in" in lines[-1]


def test_bug_in_a_stage_names_the_executed_notebook(chain, monkeypatch):
    monkeypatch.setenv("TOY_BUG", "1")
    with pytest.raises(RuntimeError, match="ZeroDivisionError.*\n.*03_use.ipynb"):
        run(chain)


def test_only_and_from(chain):
    with pytest.raises(UserError, match="needs 01_make/x.json, but 01_make is missing"):
        run(chain, only="02_double")
    run(chain, only="01")
    assert states(chain)["02_double"] == "missing"
    run(chain, start="02")
    assert all_current(chain)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("run_dir: outputs/toy\nsede: 1\n", "unknown parameter `sede`; did you mean `seed`?"),
        ("run_dir: outputs/toy\nlr: 1e-4\n", "write 1.0e-4"),
        ("run_dir: outputs/toy\nseed: on\n", "`seed` must be int, not True"),
        ("run_dir: [\n", "not valid YAML"),
        ("- run_dir: outputs/toy\n", "a list, where lines of"),
        ("outputs/toy\n", "'outputs/toy', where lines of"),
        (b"run_dir: \xef\xee\n", "not UTF-8"),
        ("seed: 0\n", "`run_dir` is missing"),
    ],
)
def test_wrong_parameters_stop_everything_before_a_kernel_starts(chain, text, complaint):
    file = chain / "params/toy/03_use.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        run(chain)
    assert complaint in str(caught.value)
    assert "03_use.yaml" in str(caught.value)
    assert not (chain / "outputs").exists()


def test_unknown_profile_and_stage_have_suggestions(chain):
    with pytest.raises(UserError, match="did you mean `toy`"):
        stages.load_params(chain, "toi")
    with pytest.raises(UserError, match="did you mean `03_use`"):
        run(chain, only="03_usee")


@pytest.mark.parametrize("asked", ["14", "14c", "eagle_speedup", "14c_eagle_speedup"])
def test_a_stage_is_found_by_number_letter_or_name(asked):
    known = ["09_dpo", "12e_eagle_decoding", "14c_eagle_speedup"]
    assert pipeline.choose_stages(known, asked, None) == ["14c_eagle_speedup"]
    assert pipeline.choose_stages(known, None, "12", asked) == known[1:]
    assert pipeline.choose_stages(known, None, None, "12e") == known[:2]


def test_a_number_that_several_stages_bear():
    known = ["09_dpo", "09b_rounds", "14c_eagle_speedup", "14d_grid"]
    with pytest.raises(UserError, match="more than one stage: 14c_eagle_speedup, 14d_grid"):
        pipeline.choose_stages(known, "14", None)
    assert pipeline.choose_stages(known, "09", None) == ["09_dpo"]
    with pytest.raises(UserError, match="unknown stage `1`"):
        pipeline.choose_stages(known, "1", None)


@pytest.mark.parametrize("names", [("", None, None), (None, "", None), (None, None, "")])
def test_an_empty_name_is_no_stage(names):
    with pytest.raises(UserError, match="unknown stage ``"):
        pipeline.choose_stages(["09_dpo", "10_evaluation"], *names)


def test_an_end_before_the_start_is_refused():
    known = ["07_sft", "08_reward_model", "09_dpo"]
    with pytest.raises(UserError, match="--to 07 is before --from 09"):
        pipeline.choose_stages(known, None, "09", "07")
    assert pipeline.choose_stages(known, None, "08", "08") == ["08_reward_model"]


@pytest.mark.parametrize("name", ["", "/tmp", "..", "toy/../toy", "."])
def test_a_path_is_no_profile(chain, name):
    with pytest.raises(UserError, match="unknown profile"):
        stages.load_params(chain, name)


RUN_TOY = """
import sys
from pathlib import Path

from tpro_nb.pipeline import run_profile

run_profile(Path(sys.argv[1]), 'toy')
"""


def start(chain, **env):
    "A runner in a process of its own."
    return subprocess.Popen(
        [sys.executable, "-c", RUN_TOY, str(chain)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, seconds=60):
    "The process id that a file will hold."
    end = time.time() + seconds
    while not (path.exists() and path.read_text()):
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.1)
    return int(path.read_text())


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_killed_kernel_is_a_line_not_a_hang(chain):
    runner = start(chain, TOY_SLEEP="1")
    os.kill(wait_for(chain / "outputs/toy/02_double/pid"), signal.SIGKILL)
    _, errors = runner.communicate(timeout=45)
    assert runner.returncode
    assert "02_double: the kernel died" in errors
    assert states(chain)["01_make"] == "current"
    assert states(chain)["02_double"] == "failed"


def test_killed_runner_loses_nothing_and_leaves_nobody_behind(chain):
    runner = start(chain, TOY_SLEEP="1")
    kernel = wait_for(chain / "outputs/toy/02_double/pid")
    with pytest.raises(UserError, match="another tpro-nb is running"):
        run(chain)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert states(chain) == {"01_make": "current", "02_double": "missing", "03_use": "missing"}
    end = time.time() + 20
    while not gone(kernel):
        assert time.time() < end, "the kernel outlived its runner"
        time.sleep(0.2)
    assert run(chain)[0].endswith("current")
    assert all_current(chain)


def test_full_disk_is_one_line(chain, monkeypatch):
    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(core.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device. Free space"):
        core.write_json(chain / "a.json", 1)
    assert not list(chain.glob(".a.json*"))


def test_publish_and_reference_status(chain):
    with pytest.raises(UserError, match="not publishing"):
        publish(chain)
    run(chain)
    made = chain / "outputs/toy/01_make"
    (made / "model.safetensors").write_bytes(b"0" * 100)
    run(chain)
    file = chain / "nbs/01_make.ipynb"
    notebook = json.loads(file.read_text())
    prose = dict(cell_type="markdown", id="prose", metadata={}, source=["what is expected"])
    notebook["cells"].insert(1, prose)
    file.write_text(json.dumps(notebook))
    (made / "stamp.json").unlink()
    run(chain)
    prose["source"] = ["what it showed"]
    file.write_text(json.dumps(notebook))
    published = chain / "outputs/reference/toy"
    (published / "09_other").mkdir(parents=True)
    (published / "01_make").mkdir()
    (published / "01_make/old.png").write_text("old")
    assert publish(chain) == published
    cells = json.loads((published / "01_make/01_make.ipynb").read_text())["cells"]
    assert [cell["source"] for cell in cells if cell.get("id") == "prose"] == [["what it showed"]]
    assert any(cell.get("outputs") for cell in cells)
    assert (published / "09_other").is_dir()
    assert not (published / "01_make/old.png").exists()
    assert not any(str(chain) in page.read_text() for page in published.rglob("*.ipynb"))
    assert (published / "01_make/01_make.ipynb").exists()
    assert not list(published.rglob("*.safetensors"))
    assert {found.state for found in stages.reference_status(chain, "toy")} == {"current"}
    (chain / "params/toy/03_use.yaml").write_text("run_dir: outputs/toy\nn: 2\n")
    now = [found.state for found in stages.reference_status(chain, "toy")]
    assert now == ["current", "current", "stale"]


@pytest.fixture
def long_chain(chain):
    "`long` stands on `toy` as cpu-long does on cpu: its stage is in the same folder."
    (chain / "params/long").mkdir()
    (chain / "params/toy/03_use.yaml").rename(chain / "params/long/03_use.yaml")
    return chain


def long_now(root):
    "State and reason of the only stage of `long`, here and in the reference."
    both = []
    for read in (stages.status, stages.reference_status):
        (found,) = read(root, "long")
        both.append((found.state, found.why))
    return both


CURRENT = ("current", "")
CHANGED = ("stale", "input changed: 02_double/y.json")


def test_a_profile_on_another_needs_what_is_beneath(long_chain):
    with pytest.raises(UserError, match="Run stage 02_double first"):
        run_quietly(long_chain, "long")
    run(long_chain)
    run_quietly(long_chain, "long")
    (long_chain / "outputs/toy/02_double/stamp.json").unlink()  # killed, or being made again
    assert long_now(long_chain)[0] == CHANGED
    message = "03_use needs 02_double/y.json, but 02_double is missing"
    with pytest.raises(UserError, match=message):
        run_quietly(long_chain, "long")


def test_a_profile_on_another_inherits_its_licences(long_chain):
    run(long_chain)
    outputs = long_chain / "outputs/toy"
    edit_json(outputs / "02_double/stamp.json", licences=dict(rows="CC0-1.0"))
    assert [found.stage for found in run_quietly(long_chain, "long")] == ["03_use"]
    (found,) = stages.status(long_chain, "long")
    assert (found.state, found.why) == CURRENT
    assert "02_double/y.json" in core.read_json(outputs / "03_use/stamp.json")["inputs"]
    done = stages.beneath(long_chain, outputs, stages.load_params(long_chain, "long"))
    assert pipeline.licences_above(["02_double/y.json"], done) == dict(rows="CC0-1.0")


def test_what_changes_beneath_a_profile_makes_it_stale(long_chain):
    run(long_chain)
    run_quietly(long_chain, "long")
    for profile in ("toy", "long"):
        publish(long_chain, profile)
    assert long_now(long_chain) == [CURRENT, CURRENT]
    for stage in ("02_double", "01_make"):
        file = long_chain / f"params/toy/{stage}.yaml"
        file.write_text("run_dir: outputs/toy\nseed: 0\nn: 5\n")
    run(long_chain)
    assert long_now(long_chain) == [CHANGED, CURRENT]
    publish(long_chain)
    assert long_now(long_chain) == [CHANGED, CHANGED]
    run_quietly(long_chain, "long")
    publish(long_chain, "long")
    assert long_now(long_chain) == [CURRENT, CURRENT]
    # a stamp that does not say what was read
    edit_json(long_chain / "outputs/reference/toy/03_use/stamp.json", inputs={})
    assert long_now(long_chain) == [CURRENT, CHANGED]


def test_seeds_leave_out_what_is_stale(chain):
    folders = [chain / "outputs" / name for name in ("toy", "toy@1", "toy@2")]
    for seed, folder in enumerate(folders):
        run_quietly(chain, folder.name)
        out = folder / "03_use"
        core.write_json(out / "metrics.json", dict(gain=seed, gain_lo=0, gain_hi=9))
        edit_json(out / "stamp.json", outputs=stages.list_outputs(out))
    said = []
    (effect,) = reference.compare_seeds(chain, "toy", said.append)
    assert (effect.key, effect.values) == ("gain", [0, 1, 2])
    assert not said

    (folders[2] / "03_use/metrics.json").write_text("{}")
    (effect,) = reference.compare_seeds(chain, "toy", said.append)
    assert effect.values == [0, 1]
    assert said == ["left out, artefact changed or gone: metrics.json: toy@2/03_use"]
    table = (folders[0] / "seeds.csv").read_text()
    assert table.splitlines()[1].endswith(",0 1")

    (chain / "outputs/toy@old").mkdir()
    (folders[1] / "03_use/metrics.json").write_text("{}")
    with pytest.raises(UserError, match="no stage is current in two runs"):
        reference.compare_seeds(chain, "toy", said.append)
    assert (folders[0] / "seeds.csv").read_text() == table


def test_command_line_statuses(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain)
    (chain / "params/toy/01_make.yaml").write_text("run_dir: outputs/toy\nlr: 1e-4\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "toy"])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "Traceback" not in errors


def test_stamp_holds_the_code_a_stage_started_with(chain):
    "After stage 1 somebody edits a stage that has run and one that has not."

    def say(line):
        if "01_make" in line and "done in" in line:
            edit_cells(chain, "01_make", lambda cell: cell.replace("[n]", "[n + 1]"))
            edit_cells(chain, "02_double", lambda cell: cell.replace("x*2", "x*3"))

    pipeline.run_profile(chain, "toy", say=say)
    found = by_stage(chain)
    assert found["01_make"].why == "its code changed"
    assert found["02_double"].why == "upstream changed: 01_make"
    edit_cells(chain, "01_make", str)
    assert all_current(chain)
    assert core.read_json(chain / "outputs/toy/02_double/y.json") == [1, 1, 1]


def test_a_file_for_accelerate_is_no_stage(chain):
    (chain / "params/toy/accelerate.yaml").write_text("mixed_precision: bf16\n")
    assert list(stages.load_params(chain, "toy")) == list(CHAIN)
    (chain / "params/toy/04_none.yaml").write_text("run_dir: outputs/toy\n")
    with pytest.raises(UserError, match="no stage 04_none"):
        stages.load_params(chain, "toy")


def test_a_closed_pipe_ends_quietly(chain):
    read, write = os.pipe()
    os.close(read)  # what `| head -1` does, at once
    command = subprocess.run(
        [sys.executable, "-c", "from tpro_nb.cli import main; main(['status', 'toy'])"],
        cwd=chain,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert command.returncode == 141
    assert command.stderr == ""


@pytest.mark.parametrize("command, module", [("serve", "server"), ("playground", "playground")])
def test_forwarded_commands_get_their_own_arguments(monkeypatch, capsys, command, module):
    seen = []

    def answer(argv):
        seen.append(argv)
        return 3

    fake = types.SimpleNamespace(**{f"{command}_command": answer})
    monkeypatch.setitem(sys.modules, f"tpro_nb.{module}", fake)
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--port", "8000", "model"])
    assert end.value.code == 3
    assert seen == [["--port", "8000", "model"]]

    monkeypatch.setitem(sys.modules, f"tpro_nb.{module}", None)  # as without the extra
    with pytest.raises(SystemExit) as end:
        cli.main([command])
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert "demo extra" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("command, goes_on", [("run", True), ("grid", True), ("demo", False)])
def test_ctrl_c_promises_only_what_holds(monkeypatch, capsys, command, goes_on):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_answer", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main([command, "toy"])
    assert end.value.code == 130
    assert ("goes on where it stopped" in capsys.readouterr().err) == goes_on


def test_every_forwarded_command_is_there():
    for command, forwarded in cli.FORWARDED.items():
        assert (Path(cli.__file__).parent / f"{forwarded.module}.py").exists(), command


ROWS_WITH_A_LICENCE = """
from tpro_nb.core import write_jsonl

run.uses(weights='Apache-2.0')
write_jsonl(run.out/'rows.jsonl', [dict(source='quotations', licence='CC BY-SA 4.0')]*3)
run.finish()"""
TWO_MODELS = """
run.input('01_make/rows.jsonl')
run.uses(embedder='MIT')
for d in ('model', 'work/half'):
    (run.out/d).mkdir(parents=True, exist_ok=True)
    write_json(run.out/d/'config.json', {})
    (run.out/d/'model.safetensors').touch()
    (run.out/d/'README.md').unlink(missing_ok=True)
run.finish()"""


def test_a_models_card_names_every_licence_and_stays_the_same(chain):
    edit_cells(chain, "01_make", lambda cell: cell.replace("run.finish()", ROWS_WITH_A_LICENCE))
    edit_cells(chain, "03_use", lambda cell: cell.replace("run.finish()", TWO_MODELS))
    run(chain)
    folder = chain / "outputs/toy/03_use"
    card = (folder / "model/README.md").read_text()
    assert "weights: Apache-2.0" in card
    assert "embedder: MIT" in card
    assert "3 training or prompt rows: quotations, CC BY-SA 4.0" in card
    assert "lr: 0.0001" in card
    assert "stage 03_use" in card
    assert "run_dir" not in card
    assert not (folder / "work/half/README.md").exists()
    assert card.startswith("---\n")
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["tpro-nb", "03_use"]
    (folder / "stamp.json").unlink()
    run(chain)
    assert (folder / "model/README.md").read_text() == card
    assert all_current(chain)


def test_a_profile_with_another_seed(chain):
    plain, seeded = stages.load_params(chain, "toy"), stages.load_params(chain, "toy@7")
    for stage, params in plain.items():
        assert seeded[stage] == params | dict(seed=7, run_dir=f"{params['run_dir']}@7")
    with pytest.raises(UserError, match="whole number"):
        stages.load_params(chain, "toy@x")
    with pytest.raises(UserError, match="one seed is no comparison"):
        reference.compare_seeds(chain, "toy")


def test_a_result_taken_in_is_part_of_the_key_but_not_its_date(chain):
    file = chain / "found.json"
    params = {"02_double": dict(run_dir="outputs/toy", n=5, sglang="found.json")}

    def key():
        return stages.code_keys(chain, params)["02_double"]["key"]

    without = key()
    result = dict(
        versions=dict(sglang="0.5.23"),
        figures=dict(x=100),
        models=[dict(target_sha256="a", seconds=3)],
        at="2026-01-01",
    )
    file.write_text(json.dumps(result))
    first = key()
    edit_json(file, at="2026-02-02", models=[dict(target_sha256="a", seconds=4)])
    assert key() == first != without
    edit_json(file, models=[dict(target_sha256="b")])
    assert key() != first


def test_two_runs_in_one_folder(chain, monkeypatch):
    """Kernels talk over sockets in a folder of their own.

    Over `kernel-ipc-1` in the working directory a second run would find those of the first.
    """
    monkeypatch.chdir(chain)
    for number in range(1, 6):
        (chain / f"kernel-ipc-{number}").write_text("another run's")
    run(chain, only="01")
    assert states(chain)["01_make"] == "current"
    assert {socket.read_text() for socket in chain.glob("kernel-ipc*")} == {"another run's"}


def processors(counters):
    return {name: counter for name, counter in counters.items() if "rapl" in name}


def test_energy_is_read_where_there_are_counters(tmp_path):
    joules_of = {"intel-rapl:0": 5, "intel-rapl:1": 7, "intel-rapl:0:0": 3}  # the last is a part
    for name, joules in joules_of.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{joules}000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("100000000\n")
    (tmp_path / "intel-rapl:2").mkdir()  # not readable
    before = processors(cards.energy_counters(tmp_path))
    assert before == {"intel-rapl:0": (5.0, 100.0), "intel-rapl:1": (7.0, 100.0)}
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2000000")
    assert cards.energy_used(before, cards.energy_counters(tmp_path)) == 4 + 95
    assert cards.energy_used({}, {}) is None


def test_times_left_go_by_this_machines_pace():
    "Once a minute of the reference's work has run, its seconds are scaled by what it took here."
    guess = dict(a=50.0, b=40.0, c=100.0)

    def ran(stage, seconds, state="ran"):
        return stages.Status(stage, state, "", dict(seconds=seconds))

    assert pipeline.machine_pace([ran("a", 150.0)], guess) is None
    assert pipeline.machine_pace([ran("a", 150.0), ran("b", 30.0)], guess) == 2
    assert pipeline.machine_pace([ran("a", 90.0), ran("b", 90.0, "current")], guess) == 2
    assert pipeline.machine_pace([ran("a", 90.0), ran("b", 90.0, "stale")], guess) is None
    assert pipeline.machine_pace([ran("new", 900.0)], guess) is None
    told = pipeline._expected_time("c", ["c"], guess, 2.0)
    assert told == "about 3:20 at this machine's pace; all that is left 3:20"


BARS_OF_A_CHILD = """
import subprocess, sys
from tpro_nb.pipeline import bars_thinned

bar = "import sys; print('one', file=sys.stderr)\\n"
bar += "for i in range(20_000): print(f'\\\\r{i} of 20000', end='', file=sys.stderr)\\n"
bar += "print('\\\\ntwo', file=sys.stderr)"
with bars_thinned():
    subprocess.run([sys.executable, "-c", bar], check=True)
    print("three", file=sys.stderr)
print("four", file=sys.stderr)
"""


@pytest.mark.parametrize("read", [True, False])
def test_a_log_gets_few_lines_of_a_bar(read):
    child = subprocess.Popen(
        [sys.executable, "-c", BARS_OF_A_CHILD], stderr=subprocess.PIPE, text=True
    )
    if not read:
        child.stderr.close()  # as `2>&1 | head` does: the writers go on
        assert child.wait(timeout=120) in (0, 1, 120)
        return
    said = child.communicate(timeout=120)[1].splitlines()
    assert said[0] == "one" and said[-3:] == ["two", "three", "four"]
    assert len(said) < 10


LOGGED = [
    b"error: x\r\nnext\n",
    b"\x1b[2K\x1b[31mred\x1b[0m\r\n",
    b"one\n\rbar 1 %\rbar 2 %\x1b[A\r\n\x1b[1;2Hend",
    b"a \x1b(B b\n[31m\n",
]


@pytest.mark.parametrize("text", LOGGED)
def test_a_log_is_the_same_however_it_is_read(text):
    logs = set()
    for at in range(len(text) + 1):
        thinner = pipeline.BarThinner(clock=lambda: 0.0)
        logs.add(thinner.feed(text[:at]) + thinner.feed(text[at:]) + thinner.rest())
    assert len(logs) == 1
    thinner = pipeline.BarThinner(clock=lambda: 0.0)
    letters = [thinner.feed(bytes([letter])) for letter in text]
    assert b"".join(letters) + thinner.rest() in logs
    assert b"\x1b[2K" not in logs.pop()


def test_a_profile_without_a_stage(chain):
    (chain / "params" / "hollow").mkdir()
    with pytest.raises(UserError, match="no stage's file"):
        stages.load_params(chain, "hollow")
