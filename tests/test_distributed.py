"Two processes over gloo equal one; a killed training resumes to the same weights. Every child counts its world: two that do not talk would pass the rest."
import hashlib, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from safetensors.torch import load_file
import dist_child
from tpro_nb.base_model import last_checkpoint
from tpro_nb.core import cache_dir, launch, toy

TESTS = Path(__file__).resolve().parent
SFT = dict(epochs=1., steps=4, batch=1, context=128, packing=True, lr=1e-3, warmup=0, beta2=.95, eps=1e-8, weight_decay=0., clip=1., rank=4, save_every=100)
MID = dict(steps=4, batch=1, context=96, lr=1e-3, lr_min=1e-4, warmup=1, beta2=.95, eps=1e-8, weight_decay=1e-6, clip=1., rank=0, save_every=100)
LONG = SFT | dict(steps=40, accumulate=1, save_every=5)         # long enough to be killed in its middle

@pytest.fixture(autouse=True)
def importable(monkeypatch): monkeypatch.setenv("PYTHONPATH", str(TESTS))

def data(name):
    model, rows = dict(sft=("06_midtraining/model", "sft_train"), midtraining=("03_base_model/model", "midtrain"))[name]
    return dict(model_dir=str(toy(model)), rows_path=str(toy(f"05_data/{rows}.jsonl")))

def job(tmp, name, config, tag): return name, config | data(name) | dict(out=str(tmp/f"{tag}-model"), work=str(tmp/f"{tag}-work"))

def weights(folder): return load_file(Path(folder)/"model.safetensors")

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The same trainings in one process, which accumulates two packs a step; and the long one, uninterrupted."
    tmp = tmp_path_factory.mktemp("alone")
    jobs = [job(tmp, "sft", SFT | dict(accumulate=2), "sft"), job(tmp, "midtraining", MID | dict(accumulate=2), "midtraining"), job(tmp, "sft", LONG, "long")]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", str(TESTS))
        return tmp, launch("dist_child:train", dict(nproc=1, jobs=jobs), tmp/"job", threads=1)

def test_two_processes_train_what_one_does(tmp_path, alone):
    "Two ranks of one pack each: the losses, gradient norms and weights of one rank that accumulates two."
    tmp, one = alone
    jobs = [job(tmp_path, name, base | dict(accumulate=1), name) for name, base in (("sft", SFT), ("midtraining", MID))]
    two = launch("dist_child:train", dict(nproc=2, jobs=jobs), tmp_path/"job", nproc=2)
    assert (one["world"], two["world"], two["backend"]) == (1, 2, "gloo")
    for i, name in enumerate(("sft", "midtraining")):
        a, b = one["runs"][i]["log"], two["runs"][i]["log"]
        assert len(a) == len(b) == 4
        for key in ("loss", "grad_norm", "learning_rate"):       # AdamW forgives a wrong scale of the gradient, its norm does not
            assert [r[key] for r in b] == pytest.approx([r[key] for r in a], rel=2e-3), f"{name}: {key}"
        begin, a, b = weights(data(name)["model_dir"]), weights(tmp/f"{name}-model"), weights(tmp_path/f"{name}-model")
        moved, apart = (max((a[k].float() - x[k].float()).abs().max().item() for k in a) for x in (begin, b))
        assert moved > 1e-3 and apart < .1*moved, f"{name}: weights moved {moved:.2g} and ended {apart:.2g} apart"

def test_fully_shard_equals_one_process(tmp_path):
    one = dist_child.fsdp(1, str(tmp_path/"one.safetensors"))
    two = launch("dist_child:fsdp", dict(nproc=2, out=str(tmp_path/"two.safetensors")), tmp_path/"job", nproc=2)
    assert two["world"] == 2 and two["local"] == pytest.approx(one["local"]/2, rel=.02)     # each holds half of the weights
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5) and one["losses"][-1] < one["losses"][0] - .01
    a, b = (load_file(tmp_path/f"{n}.safetensors") for n in ("one", "two"))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5

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

def test_killed_training_resumes_to_the_same_weights(tmp_path, alone):
    "SIGKILL to the whole process group while sft:train runs, then the same call again."
    target, config = "tpro_nb.sft:train", job(tmp_path, "sft", LONG, "long")[1]
    code = f"from tpro_nb.core import launch; launch({target!r}, {config!r}, {str(tmp_path/'job')!r}, threads=1)"
    p = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work, end = Path(config["work"]), time.time() + 60
    while not any(last_checkpoint(w) for w in work.glob("fit-*")):
        assert p.poll() is None and time.time() < end, "the training ended or hung before its first checkpoint"
        time.sleep(.02)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    at = int(last_checkpoint(next(work.glob("fit-*"))).rsplit("-", 1)[1])
    assert at < LONG["steps"] and not Path(config["out"]).exists() and not (tmp_path/"job"/"result.json").exists()
    again = launch(target, config, tmp_path/"job", threads=1)
    tmp, whole = alone
    assert again["resumed"] and again["steps"] == LONG["steps"]
    assert [r["loss"] for r in again["log"]] == [r["loss"] for r in whole["runs"][2]["log"]]
    assert (tmp_path/"long-model"/"model.safetensors").read_bytes() == (tmp/"long-model"/"model.safetensors").read_bytes()
