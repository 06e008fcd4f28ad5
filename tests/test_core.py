"Artefacts that are whole or absent, child processes that end with their parent, numbers that are defined, intervals that cover."
import json, os, signal, subprocess, sys, time
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from tpro_nb import core
from tpro_nb.core import Run, UserError

rows = st.lists(st.dictionaries(st.text(min_size=1), st.one_of(st.none(), st.integers(-2**53, 2**53), st.text(), st.booleans()), max_size=4), max_size=6)

@settings(max_examples=60, deadline=None)
@given(rows)
def test_jsonl_gives_back_what_it_took(tmp_path_factory, rows):
    f = tmp_path_factory.mktemp("j")/"a.jsonl"
    core.write_jsonl(f, rows)
    assert core.read_jsonl(f) == [r for r in rows]

def test_truncated_artefact_names_file_and_line(tmp_path):
    f = core.write_jsonl(tmp_path/"a.jsonl", [{"a": i} for i in range(5)])
    f.write_bytes(f.read_bytes()[:-4])
    with pytest.raises(UserError, match="a.jsonl, line 5"): core.read_jsonl(f)
    with pytest.raises(UserError, match="cannot read"): core.read_json(tmp_path/"none.json")

def test_missing_input_says_which_stage_to_run(tmp_path):
    r = Run("07_sft", run_dir=str(tmp_path))
    with pytest.raises(UserError, match="07_sft needs 06_midtraining/model.*Run stage 06_midtraining first"): r.input("06_midtraining/model")

def test_undefined_metric_is_refused(tmp_path):
    r = Run("07_sft", run_dir=str(tmp_path))
    for bad in (dict(no_such_key=1), dict(wall_s=float("inf")), dict(wall_s=[1])):
        with pytest.raises(ValueError): core.check_metrics("07_sft", bad)
    assert set(r.finish()) == {"wall_s", "peak_mb"} == set(json.loads((tmp_path/"07_sft/metrics.json").read_text()))

def test_licences_add_up(tmp_path):
    r = Run("05_data", run_dir=str(tmp_path)); r.uses(a="MIT"); r.uses(b="CC BY-SA")
    assert core.read_json(r.out/"licences.json") == dict(a="MIT", b="CC BY-SA")

def test_child_process_users_mistake_and_crash(tmp_path, monkeypatch):
    (tmp_path/"job.py").write_text("from tpro_nb.core import UserError\ndef wrong(x): raise UserError(f'x is {x}: make it 2')\ndef boom(): 1/0\ndef ok(x): return {'y': x + 1}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert core.launch("job:ok", dict(x=1), tmp_path/"w") == {"y": 2}
    for n in (1, 2):      # two: torchrun ends with a status of its own, and an older mistake must not be told again
        with pytest.raises(UserError, match=f"x is {n}: make it 2"): core.launch("job:wrong", dict(x=n), tmp_path/"w", nproc=n)
    assert core.launch("job:ok", dict(x=2), tmp_path/"w", nproc=2) == {"y": 3}
    with pytest.raises(RuntimeError, match="job:boom ended with status 1"): core.launch("job:boom", {}, tmp_path/"w")

def test_two_processes_really_are_two(tmp_path, monkeypatch):
    (tmp_path/"job.py").write_text("import torch.distributed as d\ndef world():\n    d.init_process_group('gloo'); n = d.get_world_size(); d.destroy_process_group(); return {'n': n}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert core.launch("job:world", {}, tmp_path/"w", nproc=2) == {"n": 2}

@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_child_dies_with_its_parent(tmp_path):
    (tmp_path/"job.py").write_text("import os, time\nfrom pathlib import Path\ndef go(f): Path(f).write_text(str(os.getpid())); time.sleep(60)\n")
    code = f"from tpro_nb.core import launch; launch('job:go', dict(f={str(tmp_path/'pid')!r}), {str(tmp_path/'w')!r})"
    p = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    end = time.time() + 30
    while not ((tmp_path/"pid").exists() and (tmp_path/"pid").read_text()): assert time.time() < end; time.sleep(.05)
    child = int((tmp_path/"pid").read_text())
    p.send_signal(signal.SIGKILL); p.wait()
    end = time.time() + 10
    while True:
        try: state = open(f"/proc/{child}/stat").read().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError: break
        if state == "Z": break
        assert time.time() < end, "the training process outlived its notebook"; time.sleep(.1)

def test_cluster_interval_covers_and_the_naive_one_does_not():
    rng = np.random.default_rng(0)
    hit = naive = 0
    for i in range(200):
        p = rng.beta(.5, .5, 40); right = rng.binomial(8, p)      # 40 problems, 8 samples each, true mean 1/2
        _, lo, hi = core.ratio_ci(right, 8, seed=i, n=400); hit += lo <= .5 <= hi
        a = right.sum()/320; half = 1.96*(a*(1 - a)/320)**.5; naive += abs(a - .5) <= half
    assert 180 <= hit <= 200 and naive < 160

def test_toy_tokenizer_has_the_chat_form():
    from transformers import AutoTokenizer
    t = AutoTokenizer.from_pretrained(core.toy("07_sft/model"))
    for s in ("<think>", "</think>", "<|im_start|>", "<|im_end|>"): assert len(t.encode(s)) == 1
    chat = [dict(role="user", content="Раз?"), dict(role="assistant", content="<think>\nдумаю\n</think>\n\nДва."), dict(role="user", content="Три?")]
    think = t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    direct = t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert "думаю" not in think and think.endswith("<|im_start|>assistant\n") and direct == think + "<think>\n\n</think>\n\n"

@settings(max_examples=80, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_toy_tokenizer_round_trip(text):
    from transformers import AutoTokenizer
    t = core._toy_tok = getattr(core, "_toy_tok", None) or AutoTokenizer.from_pretrained(core.toy("07_sft/model"))
    assert t.decode(t.encode(text), clean_up_tokenization_spaces=False) == text
