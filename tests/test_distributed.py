"""Two processes over gloo equal one; a killed training resumes to the same weights.

Every child counts its world: two processes that do not talk would pass the rest.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dist_child
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tpro_nb import dpo
from tpro_nb.core import cache_dir, read_jsonl, toy, write_jsonl
from tpro_nb.launch import launch
from tpro_nb.training import last_checkpoint

TESTS = Path(__file__).resolve().parent
SFT = dict(
    epochs=1.0,
    steps=4,
    batch=1,
    context=128,
    packing=True,
    lr=1e-3,
    warmup=0,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    clip=1.0,
    rank=4,
    save_every=100,
)
MID = dict(
    steps=4,
    batch=1,
    context=96,
    lr=1e-3,
    lr_min=1e-4,
    warmup=1,
    beta2=0.95,
    eps=1e-8,
    weight_decay=1e-6,
    clip=1.0,
    rank=0,
    save_every=100,
)
RM = dict(
    steps=4,
    batch=1,
    max_length=96,
    lr=1e-3,
    warmup=0,
    weight_decay=0.0,
    clip=1.0,
    center=0.01,
    rank=4,
    save_every=100,
)
DPO = dict(
    epochs=1.0,
    batch=1,
    max_length=96,
    lr=1e-3,
    warmup=0.0,
    beta=0.5,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    clip=1.0,
    rank=4,
    dev_share=0.2,
    eval_every=2,
    patience=0,
)
SHORT = dict(sft=SFT, midtraining=MID, reward_model=RM, dpo=DPO)
FORTY_STEPS = dict(steps=40, accumulate=1, save_every=5)  # to be killed in the middle
LONG = dict(
    sft=SFT | FORTY_STEPS,
    midtraining=MID | FORTY_STEPS,
    dpo=DPO | dict(epochs=5.0, accumulate=1, eval_every=5),
    reward_model=RM | FORTY_STEPS,
)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


MODELS = dict(
    sft="06_midtraining/model",
    midtraining="03b_base_model/model",
    reward_model="07_sft/model",
    dpo="07_sft/model",
)
ROWS = dict(sft="05j_data/sft_train.jsonl", midtraining="05j_data/midtrain.jsonl")


def pairs(n: int = 10) -> list[dict]:
    def ids(length: int) -> list[int]:
        return [5 + (7 * k) % 200 for k in range(length)]

    rows = []
    for i in range(n):
        rows.append(
            dict(
                id=f"q{i}",
                mode=("think", "direct")[i % 2],
                prompt=f"Сколько будет {i} + 3?",
                chosen=f"Ответ: {i + 3}",
                rejected="Мороз",
                chosen_ids=ids(4 + i),
                rejected_ids=ids(9)[::-1],
            )
        )
    return rows


def job(tmp: Path, name: str, config: dict, tag: str) -> tuple[str, dict]:
    "A training's module and its arguments: toy inputs, and outputs whose names begin with tag."
    given = dict(
        model_dir=str(toy(MODELS[name])),
        out=str(tmp / f"{tag}-model"),
        work=str(tmp / f"{tag}-work"),
    )
    if name in ROWS:
        given["rows_path"] = str(toy(ROWS[name]))
    else:
        given["pairs_path"] = str(tmp / f"{tag}-pairs.jsonl")
        write_jsonl(given["pairs_path"], pairs())
    return name, config | given


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def column(run: dict, key: str) -> list[float]:
    "One figure of a training's log, step by step."
    return [row[key] for row in run["log"]]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    "Of the weights that both have."
    common = one.keys() & other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in common)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    "Euclidean, over the weights that both have."
    squares = 0.0
    for name in one:
        if name in other:
            squares += (one[name].float() - other[name].float()).square().sum().item()
    return squares**0.5


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same trainings in one process, which accumulates two packs (or pairs) a step.

    And the long ones, uninterrupted.
    """
    tmp = tmp_path_factory.mktemp("alone")
    jobs = [job(tmp, name, config | dict(accumulate=2), name) for name, config in SHORT.items()]
    jobs += [job(tmp, name, config, f"long-{name}") for name, config in LONG.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        ran = launch("dist_child:train", dict(nproc=1, jobs=jobs), tmp / "job", threads=1)
    return tmp, ran


def test_two_processes_train_what_one_does(tmp_path, alone):
    "Two ranks of one pack or pair each: losses, gradients and weights of one that accumulates two."
    tmp, one = alone
    jobs = []
    for name, config in SHORT.items():
        jobs.append(job(tmp_path, name, config | dict(accumulate=1), name))
    two = launch("dist_child:train", dict(nproc=2, jobs=jobs), tmp_path / "job", nproc=2)
    assert one["world"] == 1
    assert two["world"] == 2
    assert two["backend"] == "gloo"
    for name in ROWS:  # tokenised once and packed once: the other process mapped both
        (tokens,) = (tmp_path / f"{name}-work").glob("tokens-*")
        assert (
            len(list(tokens.glob("data-*.arrow"))) == len(list(tokens.glob("cache-*.arrow"))) == 1
        )
    for name, of_one, of_two in zip(SHORT, one["runs"], two["runs"]):
        assert len(of_one["log"]) == len(of_two["log"]) == 4
        # AdamW forgives a wrong scale of the gradient, its norm does not
        for key in ("loss", "grad_norm", "learning_rate"):
            expected = pytest.approx(column(of_one, key), rel=2e-3)
            assert column(of_two, key) == expected, f"{name}: {key}"
        begin = weights(toy(MODELS[name]))
        by_one, by_two = weights(tmp / f"{name}-model"), weights(tmp_path / f"{name}-model")
        assert by_one.keys() == by_two.keys() >= begin.keys()
        moved = largest_difference(by_one, begin)
        apart = largest_difference(by_one, by_two)
        assert moved > 1e-3 and apart < 0.1 * moved, (
            f"{name}: weights moved {moved:.2g} and ended {apart:.2g} apart"
        )


def test_fully_shard_equals_one_process(tmp_path):
    one_file, two_file = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one = dist_child.fsdp(1, str(one_file))
    config = dict(nproc=2, out=str(two_file))
    two = launch("dist_child:fsdp", config, tmp_path / "job", nproc=2)
    assert two["world"] == 2
    assert two["local"] == pytest.approx(one["local"] / 2, rel=0.02)  # each holds half
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert one["losses"][-1] < one["losses"][0] - 0.01
    by_one, by_two = load_file(one_file), load_file(two_file)
    assert by_one.keys() == by_two.keys()
    assert largest_difference(by_one, by_two) < 1e-5


def test_processes_share_the_scoring_and_a_kill_loses_a_block(tmp_path):
    rows = [dict(id=f"q{i}", prompt=f"{i} + 3?", text=f"Ответ: {i * i}") for i in range(10)]

    def score(name, nproc):
        config = dict(
            path=str(tmp_path / f"{name}.jsonl"),
            reward_dir=str(toy("08_reward_model/model")),
            work=str(tmp_path / name),
            block=2,
        )
        write_jsonl(config["path"], rows)
        return launch("tpro_nb.dpo:score_file", config, tmp_path / "job", nproc=nproc), config[
            "path"
        ]

    one, one_path = score("one", 1)
    two, two_path = score("two", 2)
    assert one["made"] == 10
    assert two["made"] == 6  # blocks 0, 2 and 4 of five in the first of two processes
    Path(two["parts"], "4.json").unlink()
    assert score("two", 1)[0]["made"] == 2  # the others are there
    dpo.join_rewards(one_path, one["parts"])
    dpo.join_rewards(two_path, two["parts"])
    by_one, by_two = read_jsonl(one_path), read_jsonl(two_path)
    rewards = [row["reward"] for row in by_one]
    assert rewards == pytest.approx([row["reward"] for row in by_two], abs=1e-5)
    assert len(set(rewards)) > 5
    assert [row["text"] for row in by_two] == [row["text"] for row in rows]
    Path(two["parts"], "8.json").unlink()
    with pytest.raises(ValueError):
        dpo.join_rewards(two_path, two["parts"])


@pytest.fixture
def accelerate(tmp_path) -> str:
    "h100x32's accelerate file with two processes for 32."
    file = yaml.safe_load((TESTS.parent / "params" / "h100x32" / "accelerate.yaml").read_text())
    file |= dict(
        num_machines=1, num_processes=2, mixed_precision="no", use_cpu=True, main_process_port=0
    )
    file["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(file))
    return str(tmp_path / "accelerate.yaml")


def test_sharded_training_resumes_from_its_shards(tmp_path, accelerate):
    "Only the checkpoint of step 2 is left of four; each process reads its part; all ends alike."
    config = SFT | dict(rank=0, accumulate=1, save_every=2)
    jobs = [job(tmp_path, "sft", config, "sft")]

    def run() -> tuple[dict, bytes]:
        ran = launch(
            "dist_child:sharded",
            dict(nproc=2, jobs=jobs),
            tmp_path / "job",
            nproc=2,
            accelerate=accelerate,
        )
        saved = tmp_path / "sft-model" / "model.safetensors"
        return ran["runs"][0], saved.read_bytes()

    first, first_weights = run()
    (work,) = (tmp_path / "sft-work").glob("fit-*")
    assert (work / "checkpoint-2" / "optimizer_0").is_dir()
    shutil.rmtree(work / "checkpoint-4")
    again, weights_again = run()
    assert not first["resumed"]
    assert again["resumed"]
    assert column(again, "loss") == column(first, "loss")
    assert weights_again == first_weights


# bf16 rounds otherwise where the layers are sharded
LOSSES_AGREE = dict(sft=5e-3, midtraining=5e-3, dpo=0.02, reward_model=0.03)
# The reward model's gradients are small: AdamW makes whole steps of bf16's rounding.
WEIGHTS_AGREE = dict(sft=0.1, midtraining=0.1, dpo=0.1, reward_model=0.6)


def test_accelerate_file_shards_the_trainings(tmp_path, accelerate):
    """Every training under FSDP2 gives the weights of one process.

    DPO loads its best checkpoint from the shards; no card holds whole gradients or a whole
    reference.
    """
    one_jobs, two_jobs = [], []
    for name, config in SHORT.items():
        full, micro = config | dict(rank=0), 2 if name == "sft" else 1
        one_jobs.append(job(tmp_path, name, full | dict(accumulate=2 * micro), f"one-{name}"))
        two_jobs.append(job(tmp_path, name, full | dict(accumulate=micro), f"two-{name}"))
    one = launch("dist_child:train", dict(nproc=1, jobs=one_jobs), tmp_path / "one", threads=1)
    two = launch(
        "dist_child:sharded",
        dict(nproc=2, jobs=two_jobs),
        tmp_path / "two",
        nproc=2,
        accelerate=accelerate,
    )
    assert two["world"] == 2
    assert two["backend"] == "gloo"
    for name, of_one, of_two, seen in zip(SHORT, one["runs"], two["runs"], two["seen"]):
        assert seen["kinds"] == ["DTensor"]
        assert seen["version"] == 2
        assert seen["local"] == pytest.approx(seen["all"] / 2, rel=0.02)  # each holds half
        assert seen["unsharded_steps"] == 0
        assert seen["blocks"] > 4
        assert seen["reference_blocks"] == (seen["blocks"] if name == "dpo" else None)
        for key in ("loss", "grad_norm"):
            expected = pytest.approx(column(of_one, key), rel=LOSSES_AGREE[name])
            assert column(of_two, key) == expected, f"{name}: {key}"
        begin = weights(toy(MODELS[name]))
        by_one = weights(tmp_path / f"one-{name}-model")
        by_two = weights(tmp_path / f"two-{name}-model")
        assert by_one.keys() == by_two.keys()
        # saved in bf16: the largest difference would be one rounding
        moved, apart = distance(by_one, begin), distance(by_one, by_two)
        assert moved > 0.1 and apart < WEIGHTS_AGREE[name] * moved, (
            f"{name}: weights moved {moved:.2g} and ended {apart:.2g} apart"
        )


DEEPSPEED = (
    "deepspeed==0.19.8",
    "einops==0.8.2",
    "hjson==3.1.0",
    "msgpack==1.2.4",
    "py-cpuinfo==9.0.0",
)


def deepspeed() -> Path:
    "A folder with DeepSpeed and what its attention imports, without its kernels, in the cache."
    asked = repr((list(DEEPSPEED), sys.version_info[:2]))
    folder = cache_dir() / f"deepspeed-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    installed = subprocess.run(
        [*pip, "--target", part, *DEEPSPEED],
        env=os.environ | dict(DS_BUILD_OPS="0", DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
    )
    if installed.returncode:
        why = (installed.stderr.strip().splitlines() or ["?"])[-1][:120]
        pytest.skip(f"Ulysses was NOT tested: DeepSpeed could not be installed ({why})")
    try:
        os.replace(part, folder)
    except OSError:
        shutil.rmtree(part)  # another process was first
    return folder


def test_ulysses_attention_equals_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(deepspeed())]))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    one_file, two_file = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one = dist_child.ulysses(1, str(one_file))
    config = dict(nproc=2, out=str(two_file))
    two = launch("dist_child:ulysses", config, tmp_path / "job", nproc=2)
    assert two["world"] == 2
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    by_one, by_two = load_file(one_file), load_file(two_file)
    assert by_one.keys() == by_two.keys()
    largest = max(gradient.abs().max().item() for gradient in by_one.values())
    assert largest_difference(by_one, by_two) < 1e-6 < 1e-2 < largest


KILLED = """
import json, sys
from tpro_nb.launch import launch

target, config, work = sys.argv[1:]
launch(target, json.loads(config), work, threads=1)
"""


@pytest.mark.parametrize("name", LONG)
def test_killed_training_resumes_to_the_same_weights(tmp_path, alone, name):
    "SIGKILL to the whole process group while the chapter trains, then the same call again."
    target = f"tpro_nb.{name}:train_{name}"
    _, config = job(tmp_path, name, LONG[name], "long")
    begun = subprocess.Popen(
        [sys.executable, "-c", KILLED, target, json.dumps(config), str(tmp_path / "job")],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work, end = Path(config["work"]), time.time() + 60
    while not any(last_checkpoint(folder) for folder in work.glob("fit-*")):
        assert begun.poll() is None and time.time() < end, (
            "the training ended or hung before its first checkpoint"
        )
        time.sleep(0.02)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    (folder,) = work.glob("fit-*")
    killed_after = int(last_checkpoint(folder).rsplit("-", 1)[1])
    assert killed_after < 40
    assert not Path(config["out"]).exists()
    assert not (tmp_path / "job" / "result.json").exists()
    again = launch(target, config, tmp_path / "job", threads=1)
    tmp, ran = alone
    uninterrupted = ran["runs"][len(SHORT) + list(LONG).index(name)]
    assert again["resumed"]
    assert again["log"][-1]["step"] == 40
    assert column(again, "loss") == column(uninterrupted, "loss")
    resumed = (tmp_path / "long-model" / "model.safetensors").read_bytes()
    assert resumed == (tmp / f"long-{name}-model" / "model.safetensors").read_bytes()
