"The runner on a toy chain: what is skipped, what is stale and why, what survives a kill, what is refused."
import json, os, signal, subprocess, sys, time
import pytest, yaml
from tpro_nb import pipeline as P
from tpro_nb.core import UserError
from conftest import write_notebook, CHAIN

def states(root): return {s.stage: s.state for s in P.status(root, "toy")}
def run(root, **kw):
    lines = []
    P.run(root, "toy", say=lines.append, **kw)
    return lines

def test_second_run_does_nothing(chain):
    assert states(chain) == dict.fromkeys(CHAIN, "missing")
    run(chain)
    stamps = {s: (chain/"outputs/toy"/s/"stamp.json").read_bytes() for s in CHAIN}
    assert set(states(chain).values()) == {"current"}
    assert all(l.endswith("current") for l in run(chain))
    assert stamps == {s: (chain/"outputs/toy"/s/"stamp.json").read_bytes() for s in CHAIN}

def test_stale_says_why_and_spreads_downwards(chain):
    run(chain)
    (chain/"params/toy/02_double.yaml").write_text("run_dir: outputs/toy\nn: 5\n")
    by = {s.stage: s for s in P.status(chain, "toy")}
    assert by["01_make"].state == "current"
    assert by["02_double"].state == "stale" and "parameter changed: n" in by["02_double"].why
    assert by["03_use"].state == "stale" and "02_double" in by["03_use"].why

def test_prose_and_comments_do_not_make_stale_but_code_does(chain):
    run(chain)
    cells = list(CHAIN["01_make"])
    cells[2] = cells[2].replace("write_json", "# why this file\nwrite_json", 1)
    write_notebook(chain/"nbs/01_make.ipynb", cells)
    assert states(chain)["01_make"] == "current"
    cells[2] = cells[2].replace("[n]", "[n + 1]")
    write_notebook(chain/"nbs/01_make.ipynb", cells)
    assert states(chain)["01_make"] == "stale"

def test_damaged_artefact_is_noticed_and_made_again(chain):
    run(chain)
    x = chain/"outputs/toy/01_make/x.json"
    good = x.read_bytes(); x.write_bytes(good[:1])
    assert "artefact changed or gone: x.json" in P.status(chain, "toy")[0].why
    run(chain)
    assert x.read_bytes() == good and set(states(chain).values()) == {"current"}

def test_users_mistake_in_a_stage_then_resume(chain, monkeypatch):
    monkeypatch.setenv("TOY_WRONG", "1")
    with pytest.raises(UserError, match="03_use: y is wrong"): run(chain)
    assert states(chain) == {"01_make": "current", "02_double": "current", "03_use": "failed"}
    monkeypatch.delenv("TOY_WRONG")
    lines = run(chain)
    assert lines[0].endswith("current") and lines[1].endswith("current") and "done in" in lines[-1]

def test_bug_in_a_stage_names_the_executed_notebook(chain, monkeypatch):
    monkeypatch.setenv("TOY_BUG", "1")
    with pytest.raises(RuntimeError, match="ZeroDivisionError.*\n.*03_use.ipynb"): run(chain)

def test_only_and_from(chain):
    with pytest.raises(UserError, match="needs 01_make/x.json, but 01_make is missing"): run(chain, only="02_double")
    run(chain, only="01")
    assert states(chain)["02_double"] == "missing"
    run(chain, start="02")
    assert set(states(chain).values()) == {"current"}

@pytest.mark.parametrize("text, complaint", [
    ("run_dir: outputs/toy\nsede: 1\n", "unknown parameter `sede`; did you mean `seed`?"),
    ("run_dir: outputs/toy\nlr: 1e-4\n", "write 1.0e-4"),
    ("run_dir: outputs/toy\nseed: on\n", "`seed` must be int, not True"),
    ("run_dir: [\n", "not valid YAML"), ("seed: 0\n", "`run_dir` is missing")])
def test_wrong_parameters_stop_everything_before_a_kernel_starts(chain, text, complaint):
    (chain/"params/toy/03_use.yaml").write_text(text)
    with pytest.raises(UserError) as e: run(chain)
    assert complaint in str(e.value) and "03_use.yaml" in str(e.value)
    assert not (chain/"outputs").exists()

def test_unknown_profile_and_stage_have_suggestions(chain):
    with pytest.raises(UserError, match="did you mean `toy`"): P.load_params(chain, "toi")
    with pytest.raises(UserError, match="did you mean `03_use`"): run(chain, only="03_usee")

def start(chain, **env):
    code = "import sys; from pathlib import Path; from tpro_nb.pipeline import run; run(Path(sys.argv[1]), 'toy')"
    return subprocess.Popen([sys.executable, "-c", code, str(chain)], env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def wait_for(path, seconds=60):
    end = time.time() + seconds
    while not (path.exists() and path.read_text()):
        assert time.time() < end, f"{path} did not appear"
        time.sleep(.1)
    return int(path.read_text())

def gone(pid):
    try: return open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] == "Z"
    except FileNotFoundError: return True

def test_killed_kernel_is_a_line_not_a_hang(chain):
    p = start(chain, TOY_SLEEP="1")
    os.kill(wait_for(chain/"outputs/toy/02_double/pid"), signal.SIGKILL)
    _, err = p.communicate(timeout=45)
    assert p.returncode and "02_double: the kernel died" in err
    assert states(chain)["01_make"] == "current" and states(chain)["02_double"] == "failed"

def test_killed_runner_loses_nothing_and_leaves_nobody_behind(chain):
    p = start(chain, TOY_SLEEP="1")
    kernel = wait_for(chain/"outputs/toy/02_double/pid")
    with pytest.raises(UserError, match="another tpro-nb is running"): run(chain)
    p.send_signal(signal.SIGKILL); p.wait()
    assert states(chain) == {"01_make": "current", "02_double": "missing", "03_use": "missing"}
    end = time.time() + 20
    while not gone(kernel): assert time.time() < end, "the kernel outlived its runner"; time.sleep(.2)
    assert run(chain)[0].endswith("current")
    assert set(states(chain).values()) == {"current"}

def test_full_disk_is_one_line(chain, monkeypatch):
    import errno
    from tpro_nb import core
    def full(*a): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(core.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device. Free space"): core.write_json(chain/"a.json", 1)
    assert not list(chain.glob(".a.json*"))

def test_publish_and_reference_status(chain):
    with pytest.raises(UserError, match="not publishing"): P.publish(chain, "toy", say=lambda *_: 0)
    run(chain)
    (chain/"outputs/toy/01_make/model.safetensors").write_bytes(b"0"*100)
    run(chain)
    nb = json.loads((chain/"nbs/01_make.ipynb").read_text())
    nb["cells"].insert(1, dict(cell_type="markdown", id="prose", metadata={}, source=["what is expected"]))
    (chain/"nbs/01_make.ipynb").write_text(json.dumps(nb)); (chain/"outputs/toy/01_make/stamp.json").unlink(); run(chain)
    nb["cells"][1]["source"] = ["what it showed"]; (chain/"nbs/01_make.ipynb").write_text(json.dumps(nb))
    (chain/"outputs/reference/toy/09_other").mkdir(parents=True); (chain/"outputs/reference/toy/01_make").mkdir(); (chain/"outputs/reference/toy/01_make/old.png").write_text("old")
    dst = P.publish(chain, "toy", say=lambda *_: 0)
    page = json.loads((dst/"01_make/01_make.ipynb").read_text())["cells"]
    assert [c["source"] for c in page if c.get("id") == "prose"] == [["what it showed"]] and any(c.get("outputs") for c in page)
    assert (dst/"09_other").is_dir() and not (dst/"01_make/old.png").exists()
    assert not any(str(chain) in f.read_text() for f in dst.rglob("*.ipynb"))
    assert (dst/"01_make/01_make.ipynb").exists() and not list(dst.rglob("*.safetensors"))
    assert {s.state for s in P.reference_status(chain, "toy")} == {"current"}
    (chain/"params/toy/03_use.yaml").write_text("run_dir: outputs/toy\nn: 2\n")
    assert [s.state for s in P.reference_status(chain, "toy")] == ["current", "current", "stale"]

def test_a_profile_that_stands_on_another(chain):
    "As cpu-long on cpu: its stage is in the same folder, and what changes beneath it makes it stale, in the reference as well."
    for name in ("toy", "long"): (chain/"params"/name).mkdir(exist_ok=True)
    (chain/"params/toy/03_use.yaml").rename(chain/"params/long/03_use.yaml")
    one = lambda of, name="long": [(s.state, s.why) for s in of(chain, name)]
    long = lambda: P.run(chain, "long", say=lambda *_: 0)
    with pytest.raises(UserError, match="Run stage 02_double first"): long()
    run(chain); (chain/"outputs/toy/02_double/stamp.json").write_text(json.dumps(json.loads((chain/"outputs/toy/02_double/stamp.json").read_text()) | dict(licences=dict(rows="CC0-1.0"))))
    assert [s.stage for s in long()] == ["03_use"] and one(P.status) == [("current", "")]
    assert "02_double/y.json" in json.loads((chain/"outputs/toy/03_use/stamp.json").read_text())["inputs"]
    assert P.licences_above(["02_double/y.json"], P.beneath(chain, chain/"outputs/toy", P.load_params(chain, "long"))) == dict(rows="CC0-1.0")
    for name in ("toy", "long"): P.publish(chain, name, say=lambda *_: 0)
    assert one(P.reference_status) == [("current", "")]
    (chain/"params/toy/02_double.yaml").write_text("run_dir: outputs/toy\nseed: 0\nn: 5\n"); (chain/"params/toy/01_make.yaml").write_text("run_dir: outputs/toy\nseed: 0\nn: 5\n")
    run(chain); changed = [("stale", "input changed: 02_double/y.json")]
    assert one(P.status) == changed and one(P.reference_status) == [("current", "")]
    P.publish(chain, "toy", say=lambda *_: 0)
    assert one(P.reference_status) == changed
    long(); P.publish(chain, "long", say=lambda *_: 0)
    assert one(P.status) == one(P.reference_status) == [("current", "")]
    old = chain/"outputs/reference/toy/03_use/stamp.json"; old.write_text(json.dumps(json.loads(old.read_text()) | dict(inputs={})))        # a stamp that does not say what was read
    assert one(P.reference_status) == changed
    (chain/"outputs/toy/02_double/stamp.json").unlink()                                                                                    # killed, or being made again
    assert one(P.status) == changed
    with pytest.raises(UserError, match="03_use needs 02_double/y.json, but 02_double is missing"): long()

def test_seeds_leave_out_what_is_stale(chain):
    said = []
    for k in (0, 1, 2): P.run(chain, "toy" + f"@{k}"*(k > 0), say=lambda *_: 0)
    for k in (0, 1, 2):
        out = chain/f"outputs/toy{f'@{k}'*(k > 0)}/03_use"; (out/"metrics.json").write_text(json.dumps(dict(gain=k, gain_lo=0, gain_hi=9)))
        stamp = json.loads((out/"stamp.json").read_text()); (out/"stamp.json").write_text(json.dumps(stamp | dict(outputs=P.list_outputs(out))))
    assert [(r["key"], r["values"]) for r in P.seeds(chain, "toy", said.append)] == [("gain", [0, 1, 2])] and not said
    (chain/"outputs/toy@2/03_use/metrics.json").write_text("{}")
    assert [r["values"] for r in P.seeds(chain, "toy", said.append)] == [[0, 1]] and said == ["left out, artefact changed or gone: metrics.json: toy@2/03_use"]
    table = (chain/"outputs/toy/seeds.csv").read_text()
    assert table.splitlines()[1].endswith(",0 1")
    (chain/"outputs/toy@old").mkdir(); (chain/"outputs/toy@1/03_use/metrics.json").write_text("{}")
    with pytest.raises(UserError, match="no stage is current in two runs"): P.seeds(chain, "toy", said.append)
    assert (chain/"outputs/toy/seeds.csv").read_text() == table

def test_command_line_statuses(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain)
    (chain/"params/toy/01_make.yaml").write_text("run_dir: outputs/toy\nlr: 1e-4\n")
    with pytest.raises(SystemExit) as e: P.main(["run", "toy"])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err

def test_stamp_holds_the_code_a_stage_started_with(chain):
    def edit(stage, old, new):
        cells = [c.replace(old, new) for c in CHAIN[stage]]
        write_notebook(chain/"nbs"/f"{stage}.ipynb", cells)
    def say(line):                                    # after stage 1 somebody edits a stage that has run and one that has not
        if "01_make" in line and "done in" in line: edit("01_make", "[n]", "[n + 1]"); edit("02_double", "x*2", "x*3")
    P.run(chain, "toy", say=say)
    by = {s.stage: s for s in P.status(chain, "toy")}
    assert by["01_make"].why == "its code changed" and by["02_double"].why == "upstream changed: 01_make"
    edit("01_make", "", "")
    assert set(states(chain).values()) == {"current"} and json.loads((chain/"outputs/toy/02_double/y.json").read_text()) == [1, 1, 1]

def test_a_file_for_accelerate_is_no_stage(chain):
    (chain/"params/toy/accelerate.yaml").write_text("mixed_precision: bf16\n")
    assert list(P.load_params(chain, "toy")) == list(CHAIN)
    (chain/"params/toy/04_none.yaml").write_text("run_dir: outputs/toy\n")
    with pytest.raises(UserError, match="no stage 04_none"): P.load_params(chain, "toy")

def test_a_closed_pipe_ends_quietly(chain):
    read, write = os.pipe(); os.close(read)                  # what `| head -1` does, at once
    p = subprocess.run([sys.executable, "-c", "from tpro_nb.pipeline import main; main(['status', 'toy'])"], cwd=chain, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert p.returncode == 141 and p.stderr == ""

def test_serve_and_playground_get_their_own_arguments(monkeypatch, capsys):
    import types
    seen = []
    for command, module in (("serve", "server"), ("playground", "playground")):
        monkeypatch.setitem(sys.modules, f"tpro_nb.{module}", types.SimpleNamespace(main=lambda argv: seen.append(argv) or 3))
        with pytest.raises(SystemExit) as e: P.main([command, "--port", "8000", "model"])
        assert e.value.code == 3
        monkeypatch.setitem(sys.modules, f"tpro_nb.{module}", None)                 # as where the extra is not installed
        with pytest.raises(SystemExit) as e: P.main([command])
        assert e.value.code == 2 and "demo extra" in (err := capsys.readouterr().err) and "Traceback" not in err
    assert seen == [["--port", "8000", "model"]]*2

def test_a_models_card_names_every_licence_and_stays_the_same(chain):
    def edit(stage, new):
        cells = [c.replace("run.finish()", f"{new}\nrun.finish()") for c in CHAIN[stage]]
        write_notebook(chain/"nbs"/f"{stage}.ipynb", cells)
    edit("01_make", "run.uses(weights='Apache-2.0')\nfrom tpro_nb.core import write_jsonl\nwrite_jsonl(run.out/'rows.jsonl', [dict(source='quotations', licence='CC BY-SA 4.0')]*3)")
    edit("03_use", "run.input('01_make/rows.jsonl')\nrun.uses(embedder='MIT')\nfor d in ('model', 'work/half'):\n    (run.out/d).mkdir(parents=True, exist_ok=True)\n"
                   "    write_json(run.out/d/'config.json', {})\n    (run.out/d/'model.safetensors').touch()\n    (run.out/d/'README.md').unlink(missing_ok=True)")
    run(chain)
    folder = chain/"outputs/toy/03_use"
    card = (folder/"model/README.md").read_text()
    assert all(x in card for x in ("weights: Apache-2.0", "embedder: MIT", "3 training or prompt rows: quotations, CC BY-SA 4.0", "lr: 0.0001", "stage 03_use"))
    assert "run_dir" not in card and not (folder/"work/half/README.md").exists()
    assert card.startswith("---\n") and yaml.safe_load(card.split("---")[1])["tags"] == ["tpro-nb", "03_use"]
    (folder/"stamp.json").unlink(); run(chain)
    assert (folder/"model/README.md").read_text() == card and set(states(chain).values()) == {"current"}

def test_a_profile_with_another_seed(chain):
    a, b = P.load_params(chain, "toy"), P.load_params(chain, "toy@7")
    assert all(b[s] == a[s] | dict(seed=7, run_dir=f"{a[s]['run_dir']}@7") for s in a)
    with pytest.raises(UserError, match="whole number"): P.load_params(chain, "toy@x")
    with pytest.raises(UserError, match="one seed is no comparison"): P.seeds(chain, "toy")

def test_a_result_taken_in_is_part_of_the_key_but_not_its_date(chain):
    f = chain/"found.json"
    key = lambda: P.code_keys(chain, {"02_double": dict(run_dir="outputs/toy", n=5, sglang="found.json")})["02_double"]["key"]
    without = key()
    said = dict(versions=dict(sglang="0.5.23"), figures=dict(x=100), models=[dict(target_sha256="a", seconds=3)], at="2026-01-01")
    f.write_text(json.dumps(said)); first = key()
    f.write_text(json.dumps(said | dict(at="2026-02-02", models=[dict(target_sha256="a", seconds=4)])))
    assert key() == first != without
    f.write_text(json.dumps(said | dict(models=[dict(target_sha256="b")])))
    assert key() != first

def test_two_runs_in_one_folder(chain, monkeypatch):
    "Kernels talk over sockets in a folder of their own, not over `kernel-ipc-1` in the working directory, where a second run would find those of the first."
    monkeypatch.chdir(chain)
    for n in range(1, 6): (chain/f"kernel-ipc-{n}").write_text("another run's")
    run(chain, only="01")
    assert states(chain)["01_make"] == "current" and {p.read_text() for p in chain.glob("kernel-ipc*")} == {"another run's"}

def test_energy_is_read_where_there_are_counters(tmp_path):
    for name, joules in (("intel-rapl:0", 5), ("intel-rapl:1", 7), ("intel-rapl:0:0", 3)):      # the last is a part of the first
        (tmp_path/name).mkdir(); (tmp_path/name/"energy_uj").write_text(f"{joules}000000\n"); (tmp_path/name/"max_energy_range_uj").write_text("100000000\n")
    (tmp_path/"intel-rapl:2").mkdir()                                                          # not readable
    before = P.energy_counters(tmp_path)
    assert {k: v for k, v in before.items() if "rapl" in k} == {"intel-rapl:0": (5., 100.), "intel-rapl:1": (7., 100.)}
    (tmp_path/"intel-rapl:0"/"energy_uj").write_text("9000000"); (tmp_path/"intel-rapl:1"/"energy_uj").write_text("2000000")
    assert P.energy_used({k: v for k, v in before.items() if "rapl" in k}, P.energy_counters(tmp_path)) == 4 + 95 and P.energy_used({}, {}) is None
