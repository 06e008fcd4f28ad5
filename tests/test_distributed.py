"Two processes over gloo equal one; a killed training resumes to the same weights. Every child counts its world: two that do not talk would pass the rest."
import hashlib, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, yaml
from safetensors.torch import load_file
import dist_child
from tpro_nb.base_model import last_checkpoint
from tpro_nb.core import UserError, cache_dir, launch, read_jsonl, toy, write_jsonl

TESTS = Path(__file__).resolve().parent
SFT = dict(epochs=1., steps=4, batch=1, context=128, packing=True, lr=1e-3, warmup=0, beta2=.95, eps=1e-8, weight_decay=0., clip=1., rank=4, save_every=100)
MID = dict(steps=4, batch=1, context=96, lr=1e-3, lr_min=1e-4, warmup=1, beta2=.95, eps=1e-8, weight_decay=1e-6, clip=1., rank=0, save_every=100)
RM = dict(steps=4, batch=1, max_length=96, lr=1e-3, warmup=0, weight_decay=0., clip=1., center=.01, rank=4, save_every=100)
DPO = dict(epochs=1., batch=1, max_length=96, lr=1e-3, warmup=0., beta=.5, beta2=.95, eps=1e-8, weight_decay=0., clip=1., rank=4, dev_share=.2, eval_every=2, patience=0)
SHORT = dict(sft=SFT, midtraining=MID, reward_model=RM, dpo=DPO)
LONG = dict(sft=SFT | dict(steps=40, accumulate=1, save_every=5), midtraining=MID | dict(steps=40, accumulate=1, save_every=5),     # long enough to be killed in the middle
            dpo=DPO | dict(epochs=5., accumulate=1, eval_every=5), reward_model=RM | dict(steps=40, accumulate=1, save_every=5))

@pytest.fixture(autouse=True)
def importable(monkeypatch): monkeypatch.setenv("PYTHONPATH", str(TESTS))

def data(name):
    model, rows = dict(sft=("06_midtraining/model", "sft_train"), midtraining=("03_base_model/model", "midtrain")).get(name, ("07_sft/model", ""))
    return dict(model_dir=str(toy(model))) | (dict(rows_path=str(toy(f"05_data/{rows}.jsonl"))) if rows else {})

def pairs(n=10):
    ids = lambda n: [5 + (7*k) % 200 for k in range(n)]
    return [dict(id=f"q{i}", mode=("think", "direct")[i % 2], prompt=f"Сколько будет {i} + 3?", chosen=f"Ответ: {i + 3}", rejected="Мороз", chosen_ids=ids(4 + i), rejected_ids=ids(9)[::-1]) for i in range(n)]

def job(tmp, name, config, tag):
    given = data(name) | dict(out=str(tmp/f"{tag}-model"), work=str(tmp/f"{tag}-work"))
    if "rows_path" not in given: given["pairs_path"] = str(tmp/f"{tag}-pairs.jsonl"); write_jsonl(given["pairs_path"], pairs())
    return name, config | given

def weights(folder): return load_file(Path(folder)/"model.safetensors")

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The same trainings in one process, which accumulates two packs (or pairs) a step; and the long ones, uninterrupted."
    tmp = tmp_path_factory.mktemp("alone")
    jobs = [job(tmp, name, config | dict(accumulate=2), name) for name, config in SHORT.items()] + [job(tmp, name, config, f"long-{name}") for name, config in LONG.items()]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", str(TESTS))
        return tmp, launch("dist_child:train", dict(nproc=1, jobs=jobs), tmp/"job", threads=1)

def test_two_processes_train_what_one_does(tmp_path, alone):
    "Two ranks of one pack or pair each: the losses, gradient norms and weights of one rank that accumulates two."
    tmp, one = alone
    jobs = [job(tmp_path, name, config | dict(accumulate=1), name) for name, config in SHORT.items()]
    two = launch("dist_child:train", dict(nproc=2, jobs=jobs), tmp_path/"job", nproc=2)
    assert (one["world"], two["world"], two["backend"]) == (1, 2, "gloo")
    for i, name in enumerate(SHORT):
        a, b = one["runs"][i]["log"], two["runs"][i]["log"]
        assert len(a) == len(b) == 4
        for key in ("loss", "grad_norm", "learning_rate"):       # AdamW forgives a wrong scale of the gradient, its norm does not
            assert [r[key] for r in b] == pytest.approx([r[key] for r in a], rel=2e-3), f"{name}: {key}"
        begin, a, b = weights(data(name)["model_dir"]), weights(tmp/f"{name}-model"), weights(tmp_path/f"{name}-model")
        moved, apart = (max((a[k].float() - x[k].float()).abs().max().item() for k in a if k in x) for x in (begin, b))
        assert a.keys() == b.keys() >= begin.keys() and moved > 1e-3 and apart < .1*moved, f"{name}: weights moved {moved:.2g} and ended {apart:.2g} apart"

def test_fully_shard_equals_one_process(tmp_path):
    one = dist_child.fsdp(1, str(tmp_path/"one.safetensors"))
    two = launch("dist_child:fsdp", dict(nproc=2, out=str(tmp_path/"two.safetensors")), tmp_path/"job", nproc=2)
    assert two["world"] == 2 and two["local"] == pytest.approx(one["local"]/2, rel=.02)     # each holds half of the weights
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5) and one["losses"][-1] < one["losses"][0] - .01
    a, b = (load_file(tmp_path/f"{n}.safetensors") for n in ("one", "two"))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5

def test_processes_share_the_scoring_and_a_kill_loses_a_block(tmp_path):
    from tpro_nb import dpo
    rows = [dict(id=f"q{i}", prompt=f"{i} + 3?", text=f"Ответ: {i*i}") for i in range(10)]
    def score(name, nproc):
        what = dict(path=str(tmp_path/f"{name}.jsonl"), reward_dir=str(toy("08_reward_model/model")), work=str(tmp_path/name), block=2)
        write_jsonl(what["path"], rows)
        return launch("tpro_nb.dpo:rewards", what, tmp_path/"job", nproc=nproc), what["path"]
    (one, a), (two, b) = score("one", 1), score("two", 2)
    assert (one["made"], two["made"]) == (10, 6)                    # blocks 0, 2 and 4 of five in the first of two processes
    Path(two["parts"], "4.json").unlink()
    assert score("two", 1)[0]["made"] == 2                          # the others are there
    for x, path in ((one, a), (two, b)): dpo.join_rewards(path, x["parts"])
    got = [r["reward"] for r in read_jsonl(a)]
    assert got == pytest.approx([r["reward"] for r in read_jsonl(b)], abs=1e-5) and len(set(got)) > 5 and [r["text"] for r in read_jsonl(b)] == [r["text"] for r in rows]
    Path(two["parts"], "8.json").unlink()
    with pytest.raises(ValueError): dpo.join_rewards(b, two["parts"])

@pytest.fixture
def accelerate(tmp_path) -> str:
    "h100x32's accelerate file with two processes for 32."
    file = yaml.safe_load((TESTS.parent/"params"/"h100x32"/"accelerate.yaml").read_text())
    file |= dict(num_machines=1, num_processes=2, mixed_precision="no", use_cpu=True, main_process_port=0)
    file["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    (tmp_path/"accelerate.yaml").write_text(yaml.safe_dump(file))
    return str(tmp_path/"accelerate.yaml")

def test_sharded_training_resumes_from_its_shards(tmp_path, accelerate):
    "The checkpoint of step 2 alone is left of four steps; each process reads its part of weights and optimiser, and ends where it had ended."
    name, config = job(tmp_path, "sft", SFT | dict(rank=0, accumulate=1, save_every=2), "sft")
    def run(): return launch("dist_child:sharded", dict(nproc=2, jobs=[(name, config)]), tmp_path/"job", nproc=2, accelerate=accelerate)["runs"][0], (tmp_path/"sft-model"/"model.safetensors").read_bytes()
    first, weights = run()
    (work,) = (tmp_path/"sft-work").glob("fit-*")
    assert (work/"checkpoint-2"/"optimizer_0").is_dir()
    shutil.rmtree(work/"checkpoint-4")
    again, same = run()
    assert (first["resumed"], again["resumed"]) == (False, True) and [r["loss"] for r in again["log"]] == [r["loss"] for r in first["log"]] and same == weights

def test_accelerate_file_shards_the_trainings(tmp_path, accelerate):
    "Every training under FSDP2 gives the weights of one process, the best checkpoint of DPO loaded from its shards; no card holds whole gradients or a whole reference."
    full, micro = {name: c | dict(rank=0) for name, c in SHORT.items()}, dict(sft=2)
    one = launch("dist_child:train", dict(nproc=1, jobs=[job(tmp_path, name, c | dict(accumulate=2*micro.get(name, 1)), f"one-{name}") for name, c in full.items()]), tmp_path/"one", threads=1)
    jobs = [job(tmp_path, name, c | dict(accumulate=micro.get(name, 1)), f"two-{name}") for name, c in full.items()]
    two = launch("dist_child:sharded", dict(nproc=2, jobs=jobs), tmp_path/"two", nproc=2, accelerate=accelerate)
    assert two["world"] == 2 and two["backend"] == "gloo"
    for i, name in enumerate(full):
        seen = two["seen"][i]
        assert seen["kinds"] == ["DTensor"] and seen["version"] == 2 and seen["local"] == pytest.approx(seen["all"]/2, rel=.02)     # each process holds half
        assert seen["unsharded_steps"] == 0 and seen["blocks"] > 4 and seen["reference_blocks"] == (seen["blocks"] if name == "dpo" else None)
        for key in ("loss", "grad_norm"): assert [r[key] for r in two["runs"][i]["log"]] == pytest.approx([r[key] for r in one["runs"][i]["log"]], rel=dict(dpo=.02, reward_model=.03).get(name, 5e-3)), f"{name}: {key}"     # bf16 rounds otherwise where the layers are sharded
        begin, a, b = weights(data(name)["model_dir"]), weights(tmp_path/f"one-{name}-model"), weights(tmp_path/f"two-{name}-model")
        moved, apart = (sum((a[k].float() - x[k].float()).square().sum().item() for k in a if k in x)**.5 for x in (begin, b))      # saved in bf16: the largest difference would be one rounding
        near = .6 if name == "reward_model" else .1      # its gradients are small: AdamW makes whole steps of bf16's rounding
        assert a.keys() == b.keys() and moved > .1 and apart < near*moved, f"{name}: weights moved {moved:.2g} and ended {apart:.2g} apart"

def deepspeed() -> Path:
    "A folder with DeepSpeed and what its attention imports, without its kernels; put into the cache once, outside the environment."
    asked = "deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 py-cpuinfo==9.0.0".split()
    folder = cache_dir()/f"deepspeed-{hashlib.sha256(repr((asked, sys.version_info[:2])).encode()).hexdigest()[:8]}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        p = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", part, *asked],
                           env=os.environ | dict(DS_BUILD_OPS="0", DS_ACCELERATOR="cpu"), capture_output=True, text=True)
        if p.returncode: pytest.skip(f"Ulysses was NOT tested: DeepSpeed could not be installed ({(p.stderr.strip().splitlines() or ['?'])[-1][:120]})")
        try: os.replace(part, folder)
        except OSError: shutil.rmtree(part)                     # another process was first
    return folder

def test_ulysses_attention_equals_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(deepspeed())]))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    one = dist_child.ulysses(1, str(tmp_path/"one.safetensors"))
    two = launch("dist_child:ulysses", dict(nproc=2, out=str(tmp_path/"two.safetensors")), tmp_path/"job", nproc=2)
    assert two["world"] == 2 and two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    a, b = (load_file(tmp_path/f"{n}.safetensors") for n in ("one", "two"))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6 < 1e-2 < max(x.abs().max().item() for x in a.values())

@pytest.mark.parametrize("name", LONG)
def test_killed_training_resumes_to_the_same_weights(tmp_path, alone, name):
    "SIGKILL to the whole process group while the chapter's `train` runs, then the same call again."
    target, config = f"tpro_nb.{name}:train", job(tmp_path, name, LONG[name], "long")[1]
    code = f"from tpro_nb.core import launch; launch({target!r}, {config!r}, {str(tmp_path/'job')!r}, threads=1)"
    p = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work, end = Path(config["work"]), time.time() + 60
    while not any(last_checkpoint(w) for w in work.glob("fit-*")):
        assert p.poll() is None and time.time() < end, "the training ended or hung before its first checkpoint"
        time.sleep(.02)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    at = int(last_checkpoint(next(work.glob("fit-*"))).rsplit("-", 1)[1])
    assert at < 40 and not Path(config["out"]).exists() and not (tmp_path/"job"/"result.json").exists()
    again = launch(target, config, tmp_path/"job", threads=1)
    tmp, whole = alone
    assert again["resumed"] and again["log"][-1]["step"] == 40
    assert [r["loss"] for r in again["log"]] == [r["loss"] for r in whole["runs"][len(SHORT) + list(LONG).index(name)]["log"]]
    assert (tmp_path/"long-model"/"model.safetensors").read_bytes() == (tmp/f"long-{name}-model"/"model.safetensors").read_bytes()
