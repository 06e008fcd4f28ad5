"""Chapters 00a and 00b.

Artefacts that are whole or absent, child processes that end with their parent, numbers that are
defined, intervals that cover.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tpro_nb import core, launch
from tpro_nb.core import Run, UserError

VALUES = st.one_of(st.none(), st.integers(-(2**53), 2**53), st.text(), st.booleans())
ROWS = st.lists(st.dictionaries(st.text(min_size=1), VALUES, max_size=4), max_size=6)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_jsonl_gives_back_what_it_took(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("j") / "a.jsonl"
    core.write_jsonl(file, rows)
    assert core.read_jsonl(file) == rows


def test_truncated_artefact_names_file_and_line(tmp_path):
    file = core.write_jsonl(tmp_path / "a.jsonl", [{"a": number} for number in range(5)])
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="a.jsonl, line 5"):
        core.read_jsonl(file)
    with pytest.raises(UserError, match="cannot read"):
        core.read_json(tmp_path / "none.json")


def test_missing_input_says_which_stage_to_run(tmp_path):
    run = Run("07_sft", run_dir=str(tmp_path))
    message = "07_sft needs 06_midtraining/model.*Run stage 06_midtraining first"
    with pytest.raises(UserError, match=message):
        run.input("06_midtraining/model")


def test_undefined_metric_is_refused(tmp_path):
    run = Run("07_sft", run_dir=str(tmp_path))
    for bad in (dict(no_such_key=1), dict(wall_s=float("inf")), dict(wall_s=[1])):
        with pytest.raises(ValueError):
            core.check_metrics("07_sft", bad)
    returned = run.finish()
    written = json.loads((tmp_path / "07_sft/metrics.json").read_text())
    assert set(returned) == {"wall_s", "peak_mb"} == set(written)


def test_licences_add_up(tmp_path):
    run = Run("05j_data", run_dir=str(tmp_path))
    run.uses(a="MIT")
    run.uses(b="CC BY-SA")
    assert core.read_json(run.out / "licences.json") == dict(a="MIT", b="CC BY-SA")


def test_every_toy_of_the_table_can_be_built(tmp_path, monkeypatch):
    monkeypatch.setenv("TPRO_NB_CACHE", str(tmp_path))
    for name in core.TOYS:
        assert core.toy(name).exists(), name


JOBS = """
from tpro_nb.core import UserError


def wrong(x):
    raise UserError(f'x is {x}: make it 2')


def boom():
    1 / 0


def ok(x):
    return {'y': x + 1}
"""


def test_child_process_users_mistake_and_crash(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    work = tmp_path / "w"
    assert launch.launch("job:ok", dict(x=1), work) == {"y": 2}
    # two: torchrun ends with a status of its own, and an older mistake must not be told again
    for number in (1, 2):
        with pytest.raises(UserError, match=f"x is {number}: make it 2"):
            launch.launch("job:wrong", dict(x=number), work, nproc=number)
    assert launch.launch("job:ok", dict(x=2), work, nproc=2) == {"y": 3}
    with pytest.raises(RuntimeError, match="job:boom ended with status 1"):
        launch.launch("job:boom", {}, work)


WORLD = """
import torch.distributed


def world():
    torch.distributed.init_process_group('gloo')
    size = torch.distributed.get_world_size()
    torch.distributed.destroy_process_group()
    return {'n': size}
"""


def test_two_processes_really_are_two(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(WORLD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert launch.launch("job:world", {}, tmp_path / "w", nproc=2) == {"n": 2}


SLEEPER = """
import os
import time
from pathlib import Path


def go(f):
    Path(f).write_text(str(os.getpid()))
    time.sleep(60)
"""
STARTER = """
import sys

from tpro_nb.launch import launch

launch('job:go', dict(f=sys.argv[1]), sys.argv[2])
"""


def is_running(pid: int) -> bool:
    "Whether there is such a process, and not only its entry."
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
    except FileNotFoundError:
        return False
    return after_name.split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_child_dies_with_its_parent(tmp_path):
    (tmp_path / "job.py").write_text(SLEEPER)
    pid_file = tmp_path / "pid"
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(pid_file), str(tmp_path / "w")],
        env={**os.environ, "PYTHONPATH": path},
    )
    end = time.time() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.time() < end
        time.sleep(0.05)
    child = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.time() + 10
    while is_running(child):
        assert time.time() < end, "the training process outlived its notebook"
        time.sleep(0.1)


def test_cluster_interval_covers_and_the_naive_one_does_not():
    "Forty problems, eight samples each, true mean 1/2, two hundred times."
    rng = np.random.default_rng(0)
    covered = covered_naively = 0
    for trial in range(200):
        difficulty = rng.beta(0.5, 0.5, 40)
        right = rng.binomial(8, difficulty)
        _, lower, upper = core.ratio_ci(right, 8, seed=trial, n=400)
        covered += lower <= 0.5 <= upper
        accuracy = right.sum() / 320
        half = 1.96 * (accuracy * (1 - accuracy) / 320) ** 0.5
        covered_naively += abs(accuracy - 0.5) <= half
    assert 180 <= covered <= 200
    assert covered_naively < 160


@cache
def toy_chat_tokenizer():
    return AutoTokenizer.from_pretrained(core.toy("07_sft/model"))


def test_toy_tokenizer_has_the_chat_form():
    tokenizer = toy_chat_tokenizer()
    for text in ("<think>", "</think>", "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer.encode(text)) == 1
    chat = [
        dict(role="user", content="Раз?"),
        dict(role="assistant", content="<think>\nдумаю\n</think>\n\nДва."),
        dict(role="user", content="Три?"),
    ]
    prompt = dict(tokenize=False, add_generation_prompt=True)
    think = tokenizer.apply_chat_template(chat, **prompt)
    direct = tokenizer.apply_chat_template(chat, **prompt, enable_thinking=False)
    assert "думаю" not in think
    assert think.endswith("<|im_start|>assistant\n")
    assert direct == think + "<think>\n\n</think>\n\n"


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_toy_tokenizer_round_trip(text):
    tokenizer = toy_chat_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_only_processes_that_share_cores_are_told_to_sleep_while_they_wait(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "OMP_WAIT_POLICY" not in launch.child_environment(1, 2)
    assert launch.child_environment(2, 1)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert launch.child_environment(2, 1)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("TQDM_DELAY", "0")
    assert launch.child_environment(1, 2)["OMP_WAIT_POLICY"] == "ACTIVE"
    assert launch.child_environment(2, 1)["OMP_WAIT_POLICY"] == "ACTIVE"
    assert launch.child_environment(2, 1)["TQDM_DELAY"] == "0"
