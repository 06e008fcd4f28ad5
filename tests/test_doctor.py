"""Chapter 91: the sums agree with hand arithmetic, what cannot fit is refused by name.

And accelerate, TRL and SGLang accept what the profiles ask for.
"""

import inspect
import math
import shlex
import sys

import pytest
import yaml
from conftest import ROOT

from tpro_nb import cli, core, doctor, launch, stages
from tpro_nb.core import UserError, toy
from tpro_nb.doctor import CardLoad
from tpro_nb.planner import Cards, estimate
from tpro_nb.serving import target_shapes

FOLDER = ROOT / "params" / "h100x32"
PARAMETERS = 32_762_123_264  # of Qwen3-32B
TRAININGS = ["06_midtraining", "07_sft", "08_reward_model", "09_dpo"]


@pytest.fixture
def big():
    "The 4x8 profile with batches and lengths that fit, so that each test breaks one thing."
    params = stages.load_params(ROOT, "h100x32")
    params["07_sft"]["eval_batch"] = 6
    params["10_evaluation"]["batch_size"] = 1
    params["11c_eagle_draft"]["gen_batch"] = 8
    for stage in ("08_reward_model", "09_dpo"):
        params[stage] |= dict(sample_batch=1, servers={})
    params["10_evaluation"]["servers"] = {}
    return params


def problems_of(params, folder=FOLDER):
    return doctor.examine(params, folder).problems


def warnings_of(params):
    return doctor.examine(params, FOLDER).warnings


def changed(params, stage, **changes):
    "A copy of a profile's parameters with some of one stage changed."
    return params | {stage: params[stage] | changes}


def fit_of(examination, stage):
    return next(fit for fit in examination.fits if fit.training.stage == stage)


def states(memory):
    return memory.weights + memory.gradients + memory.optimiser


@pytest.mark.parametrize("size", doctor.QWEN3)
def test_parameters_on_the_meta_device_equal_two_other_counts(size):
    config = doctor.qwen3_config(size)
    shapes = target_shapes(config.to_dict() | dict(model_type="qwen3"))
    counted = doctor.count_parameters(config)
    assert counted == sum(math.prod(shape) for shape in shapes.values())
    assert counted == doctor.QWEN3[size].parameters


def test_32b_by_hand():
    layer = 2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128
    by_hand = 64 * layer + 2 * 151_936 * 5120 + 5120
    assert doctor.count_parameters(doctor.qwen3_config("32B")) == by_hand == PARAMETERS


def test_memory_of_32b_by_hand():
    config = doctor.qwen3_config("32B")
    one = doctor.training_memory(config, CardLoad(1, 32768))
    many = doctor.training_memory(config, CardLoad(1, 32768, shards=32))
    assert states(one) == pytest.approx(16 * PARAMETERS / 1e9)
    assert states(many) == pytest.approx(16 * PARAMETERS / 32 / 1e9)
    assert many.activations == pytest.approx(64 * 32768 * 5120 * 2 / 1e9)
    block = 32768 * (16 * 5120 + 10 * 9216 + 12 * 25600)
    assert many.block == pytest.approx(block / 1e9)
    pairs = doctor.training_memory(config, CardLoad(2, 32768, shards=32, reference=True))
    assert pairs.reference == pytest.approx(2 * PARAMETERS / 32 / 1e9)
    cut = doctor.training_memory(config, CardLoad(1, 32768, shards=32, parts=4))
    assert cut.activations == pytest.approx(many.activations / 4)
    assert states(cut) == states(many)
    one_token = doctor.writing_memory(config, 1, 1 - doctor.PROMPT)
    assert one_token.cache == pytest.approx(262_144 / 1e9)


def test_adapters_hold_frozen_weights_in_bf16():
    config = doctor.qwen3_config("8B")
    memory = doctor.training_memory(config, CardLoad(1, 1024, rank=16))
    params = doctor.count_parameters(config)
    trained = 16 * 36 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 12288) * 3)
    assert memory.optimiser == pytest.approx(8 * trained / 1e9)
    assert memory.weights == pytest.approx((2 * params + 4 * trained) / 1e9)
    assert memory.reference == 0


def test_a_profile_that_fits_is_not_refused(big):
    got = doctor.examine(big, FOLDER)
    assert got.problems == []
    assert got.parameters == PARAMETERS
    assert {fit.training.stage: fit.training.world for fit in got.fits} == dict.fromkeys(
        TRAININGS, 32
    )
    assert got.trl == {
        "06_midtraining": "SFTConfig",
        "07_sft": "SFTConfig",
        "08_reward_model": "RewardConfig",
        "09_dpo": "DPOConfig",
    }
    text = doctor.examination_text(got, "h100x32")
    for said in (
        "nothing refused",
        "No GPU was used",
        "srun --nodes=4",
        "--speculative-algorithm EAGLE",
    ):
        assert said in text, said


def test_hours_of_midtraining_are_the_planners(big):
    hours = doctor.examine(big, FOLDER).hours
    midtraining = next(row for row in hours if row.stage == "midtraining")
    cards = Cards(mfu=big["16d_claims"]["plan_mfu"], gpus=32)
    want = estimate("midtraining", PARAMETERS, 9750 * 128 * 32768, 6, cards)
    assert midtraining.gpu_h == pytest.approx(want.gpu_h)
    assert 5000 < midtraining.gpu_h < 6500  # the paper's 40 B tokens


def test_small_profile_fits_as_it_is():
    got = doctor.examine(stages.load_params(ROOT, "h100"), ROOT / "params" / "h100")
    assert got.problems == []
    for fit in got.fits:
        assert fit.memory.total < 80
        assert fit.training.world == 1
    assert got.files["accelerate.yaml"].kind == "single"
    dpo, sft = fit_of(got, "09_dpo").training, fit_of(got, "07_sft").training
    assert dpo.steps == -(-2000 * 0.98 // 128)
    assert sft.tokens == (3 * 1500 + 40_000) * 2 * 2140  # by what 05 deals


def test_full_fine_tuning_of_32b_on_a_node_is_refused_with_the_sum(big):
    problems = doctor.examine(big, FOLDER, cards=8).problems
    line = next(problem for problem in problems if problem.startswith("06_midtraining"))
    summed, _, rest = line.split("needs ")[1].partition(" = ")
    sums = {}
    for part in summed.split(" + "):
        purpose, gb = part.split(" ")[-2:]
        sums[purpose] = float(gb)
    total = float(rest.split(" ")[0])
    assert sums["optimiser"] == pytest.approx(8 * 32.762 / 8, abs=0.1)
    assert sum(sums.values()) == pytest.approx(total, abs=0.5)
    assert total > 80
    for said in ("context 32768", "24 cards", "rank: 16"):
        assert said in line


REFUSALS = [
    ("07_sft", dict(eval_batch=7), ["07_sft: eval_batch 7", "eval_batch: 6"]),
    (
        "08_reward_model",
        dict(max_length=65536),
        ["08_reward_model: max_length 65536", "max_length: "],
    ),
    (
        "08_reward_model",
        dict(accelerate=""),
        [
            "08_reward_model: max_length 32768",
            "1 shard)",
            "accelerate: a file (the weights are then sharded over the 32 cards",
        ],
    ),
    ("09_dpo", dict(batch=2), ["09_dpo: max_length 32768 with batch 2", "batch: 1"]),
    ("09_dpo", dict(sample_batch=3), ["09_dpo: sample_batch 3", "sample_batch: 1"]),
    (
        "07_sft",
        dict(accelerate="params/h100x32/accelerate_sequence.yaml"),
        [
            "07_sft: accelerate names accelerate_sequence.yaml",
            "TRL refuses packed rows",
            "packing: false",
        ],
    ),
    ("10_evaluation", dict(batch_size=16), ["10_evaluation: batch_size 16", "batch_size: 1"]),
    ("06_midtraining", dict(nproc=4), ["06_midtraining: nproc 4", "num_processes 32"]),
    ("13_serving", dict(tp_size=1), ["13_serving: tp_size 1", "tp_size: 2"]),
]


@pytest.mark.parametrize("stage, changes, names", REFUSALS)
def test_what_cannot_fit_is_refused_by_name(big, stage, changes, names):
    (problem,) = problems_of(changed(big, stage, **changes))
    for name in names:
        assert name in problem


def test_the_named_remedy_fits_and_one_step_more_does_not(big):
    (problem,) = problems_of(changed(big, "09_dpo", max_length=65536))
    fix = int(problem.split("max_length: ")[1].split(";")[0].rstrip("."))
    assert problems_of(changed(big, "09_dpo", max_length=fix)) == []
    assert problems_of(changed(big, "09_dpo", max_length=fix + 1024)) != []


def test_a_stage_without_an_accelerate_file_is_weighed_and_started_as_torchrun_will(big):
    "Its launch line and its sum must be those of `launch`, not of the file that others name."
    got = doctor.examine(changed(big, "08_reward_model", accelerate=""), FOLDER)
    reward = fit_of(got, "08_reward_model")
    assert reward.load.shards == 1
    assert reward.memory.total > 500
    assert doctor.launch_line(8) in got.lines
    assert len(got.lines) == 2
    assert all(fit.load.shards == 32 for fit in got.fits if fit is not reward)


def slow_notes(params):
    "Notes on answers in one process, by the chapter's number."
    notes = [note for note in warnings_of(params) if "answers in one process" in note]
    return {note[:2]: note for note in notes}


def tokens_per_second(new_tokens):
    "Bytes a second over bytes a token, one answer at a time."
    return 3.35e12 / (2 * PARAMETERS + 262_144 * (new_tokens + doctor.PROMPT))


def test_answers_that_one_card_cannot_write_are_said(big):
    notes = slow_notes(big)
    rate, hard = tokens_per_second(30_000), tokens_per_second(32_768)
    assert set(notes) == {"08", "09", "10"}
    assert "10_evaluation writes 1,200 answers" in notes["10"]  # 100 of T-Math × 4 × 3 models
    assert f"{1200 * 16_000 / hard / 86400:,.0f} days" in notes["10"]
    assert f"{1_600_000 * 2140 / rate / 86400:,.0f} days" in notes["09"]
    assert "64,000 answers" in notes["08"]


def test_answers_that_a_server_writes_are_not_weighed(big):
    dpo = big["09_dpo"]
    dpo["servers"] = {"07_sft": "http://127.0.0.1:31001/v1 07_sft"}
    assert not any(note.startswith("09_dpo writes") for note in warnings_of(big))
    dpo["sample_batch"] = 64  # 09_dpo itself is still loaded here
    said = "09_dpo: sample_batch"
    assert any(problem.startswith(f"{said} 64") for problem in problems_of(big))
    dpo["servers"]["09_dpo"] = "http://127.0.0.1:31002/v1 09_dpo"
    assert not any(problem.startswith(said) for problem in problems_of(big))


def test_text_that_is_read_again_and_again_is_said(big):
    start = "06_midtraining reads"
    (note,) = [note for note in warnings_of(big) if note.startswith(start)]
    assert "40.89 billion" in note
    assert "read 41 times, and more often" in note
    assert "hold some 1.07 before anything is dealt, 2.7 % of the paper's 40" in note
    big["05j_data"]["midtrain_chars"] = 9750 * 128 * 32_768  # four passes, and T-Wix has less
    (note,) = [note for note in warnings_of(big) if note.startswith(start)]
    assert "read 38 times" in note
    big["05j_data"]["raw"] = ["own/forty-billion"]  # which nobody here has counted
    assert not any(note.startswith(start) for note in warnings_of(big))


def test_without_fsdp_many_cards_do_not_help(big, tmp_path):
    "Plain torchrun replicates: with no accelerate file every card holds all sixteen bytes."
    problems = problems_of(big, tmp_path)
    assert any(line.startswith("06_midtraining") and "1 shard)" in line for line in problems)


def accelerate_file(tmp_path, **changes):
    "The profile's accelerate file with some entries changed; a dict is merged into its entry."
    text = yaml.safe_load((FOLDER / "accelerate.yaml").read_text())
    for name, value in changes.items():
        text[name] = text[name] | value if isinstance(value, dict) else value
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(text))
    return file


def test_accelerate_files_are_what_they_say():
    one = doctor.accelerate_config(ROOT / "params" / "h100" / "accelerate.yaml")
    many = doctor.accelerate_config(FOLDER / "accelerate.yaml")
    cut = doctor.accelerate_config(FOLDER / "accelerate_sequence.yaml")
    assert (one.kind, one.processes) == ("single", 1)
    assert (many.kind, many.processes, many.machines) == ("fsdp", 32, 4)
    assert (many.shards, many.parts, many.wraps) == (32, 1, ["Qwen3DecoderLayer"])
    assert (cut.kind, cut.processes, cut.shards, cut.parts) == ("fsdp", 32, 32, 4)


BROKEN_FILES = [
    (
        dict(parallelism_config=dict(parallelism_config_dp_shard_size=16)),
        "= 16, but num_processes is 32",
    ),
    (
        dict(
            parallelism_config=dict(
                parallelism_config_dp_shard_size=8, parallelism_config_sp_size=4
            )
        ),
        "does nothing under FSDP",
    ),
    (
        dict(parallelism_config=dict(parallelism_config_cp_size=4, parallelism_config_sp_size=4)),
        "mutually exclusive",
    ),
    (dict(fsdp_config=dict(fsdp_version=1)), "fsdp_version must be 2"),
    (dict(mixed_precision="fp16"), "the trainers use bf16"),
    (dict(num_procs=32), "num_procs"),
    (dict(distributed_type="FSDP3"), "FSDP3"),
]


@pytest.mark.parametrize("changes, complaint", BROKEN_FILES)
def test_accelerate_files_that_would_not_work_are_refused(tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        doctor.accelerate_config(accelerate_file(tmp_path, **changes))


def test_a_layer_that_the_model_lacks_is_refused(big, tmp_path):
    wraps = dict(fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer")
    accelerate_file(tmp_path, fsdp_config=wraps)
    assert any(
        "LlamaDecoderLayer is no layer" in problem and "Qwen3DecoderLayer" in problem
        for problem in problems_of(big, tmp_path)
    )


def test_accelerate_still_puts_ulysses_in_place_under_deepspeed_only():
    "The day this fails, accelerate_sequence.yaml can use sp_size and the sentence has to go."
    from accelerate import Accelerator

    assert "UlyssesSPAttentionHF" in inspect.getsource(Accelerator._prepare_deepspeed)
    under_fsdp = inspect.getsource(Accelerator._prepare_fsdp2)
    under_cp = inspect.getsource(Accelerator._prepare_cp)
    assert "ulysses" not in (under_fsdp + under_cp).lower()


@pytest.mark.parametrize("nproc", [1, 2])
def test_launch_lines_are_those_of_launch(tmp_path, monkeypatch, nproc):
    seen = []

    def run(argv, **options):
        seen.append(argv[1:])
        core.write_json(tmp_path / "result.json", [{}])
        return type("P", (), dict(returncode=0))

    monkeypatch.setattr(launch.subprocess, "run", run)
    launch.launch("tpro_nb.core:peak_mb", {}, tmp_path, nproc=nproc)
    shown = {
        str(tmp_path / "config.json"): "CONFIG",
        str(tmp_path / "result.json"): "RESULT",
    }
    words = shlex.split(doctor.launch_line(nproc))
    assert words[1:] == [shown.get(word, word) for word in seen[0]]


def test_on_slurm_launch_starts_what_the_doctor_prints(big, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    accelerate = doctor.examine(big, FOLDER).accelerate
    shown = shlex.split(doctor.launch_line(8, accelerate))
    own = launch.starter(8, "params/h100x32/accelerate.yaml")
    script = own.index("-c") + 1
    assert own[:script] == shown[: shown.index("-c") + 1]
    assert own[-1] == "tpro-nb"
    python = f"{sys.executable} -m accelerate.commands.launch"
    inner = own[script].replace(python, "accelerate launch").replace(f"{ROOT}/", "")
    assert inner == shown[-1].replace("CONFIG RESULT", '"$@"')
    with pytest.raises(UserError, match="no file params/nowhere.yaml"):
        launch.starter(2, "params/nowhere.yaml")


def test_the_profile_as_it_stands_is_not_refused():
    assert problems_of(stages.load_params(ROOT, "h100x32")) == []


def test_host_memory_by_hand(big):
    adapters = {stage: own | dict(rank=8) if "rank" in own else own for stage, own in big.items()}
    whole = doctor.host_memory(PARAMETERS, doctor.trainings(big, 32))
    assert whole == pytest.approx(PARAMETERS * (8 * 4 + 2) / 1e9)
    assert doctor.host_memory(PARAMETERS, doctor.trainings(adapters, 32)) == 0


def test_a_host_that_is_too_small_is_refused(big, monkeypatch):
    monkeypatch.setattr(doctor, "HOST_GB", 1000)
    assert any("host memory" in problem for problem in problems_of(big))


@pytest.mark.parametrize("installed", [False, True])
def test_flash_attention_is_asked_for(big, monkeypatch, installed):
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if installed else None)
    assert any("flash-attn" in note for note in warnings_of(big)) is not installed


def test_an_empty_accelerate_is_said(big):
    notes = warnings_of(changed(big, "07_sft", accelerate=""))
    (note,) = [note for note in notes if "nothing is sharded" in note]
    assert "07_sft" in note
    assert "06_midtraining" not in note


@pytest.mark.parametrize("cards, machines", [(None, 4), (8, 1), (16, 2)])
def test_accelerate_takes_the_launch_line(big, monkeypatch, cards, machines):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(ROOT)
    line = doctor.launch_line(8, doctor.examine(big, FOLDER, cards=cards).accelerate)
    if machines > 1:
        first_host = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)"
        inner = line.split("bash -c ")[1].strip("'")
        line = inner.replace("$SLURM_NODEID", "0").replace(first_host, "node0")
    words = shlex.split(line)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert args.num_processes == 8 * machines
    assert args.num_machines == machines
    assert int(args.parallelism_config_dp_shard_size) == 8 * machines
    assert args.use_fsdp is True
    assert args.module
    assert args.training_script == "tpro_nb.launch"
    assert args.training_script_args == ["CONFIG", "RESULT"]


def value(choice):
    "Of an enumeration, or what is already one."
    return getattr(choice, "value", choice)


def test_trl_configs_carry_the_stages_values(big):
    got = doctor.trl_configs(big)
    midtraining, sft, dpo = got["06_midtraining"], got["07_sft"], got["09_dpo"]
    assert midtraining.learning_rate == 1e-5
    assert midtraining.max_length == 32768
    assert midtraining.packing is True
    assert midtraining.adam_beta2 == 0.95
    assert midtraining.max_grad_norm == 1.0
    assert midtraining.max_steps == 9750
    assert midtraining.lr_scheduler_kwargs == dict(min_lr=1e-6)
    assert str(value(midtraining.include_num_input_tokens_seen)) == "all"
    assert sft.max_steps == -1
    assert sft.num_train_epochs == 2
    assert sft.pad_to_multiple_of == 64
    assert sft.padding_free
    assert value(sft.lr_scheduler_type) == "cosine"
    assert dpo.beta == 0.5
    assert dpo.learning_rate == 1e-7
    assert dpo.max_length == 32768
    assert dpo.loss_type == ["sigmoid"]
    assert dpo.load_best_model_at_end is True


@pytest.mark.parametrize("profile", ["smoke", "cpu", "h100", "h100x32"])
def test_the_profiles_can_be_dealt(profile):
    assert doctor.dealing(stages.load_params(ROOT, profile)["05j_data"]) == []


def test_a_deal_that_cannot_be_is_refused(big):
    (told,) = problems_of(changed(big, "05j_data", prompts_dpo=200_000))
    assert "cups: 9,118 wanted, 6,000 at most" in told
    (told,) = problems_of(changed(big, "05j_data", sft_general=700_000))
    assert "general: " in told and "cups" not in told
    first, *_ = problems_of(changed(big, "05j_data", problems_per_family=50_000))
    assert "05j_data: cups/train has only" in first


def test_a_training_that_one_kill_would_lose_is_said(big):
    def late(params):
        return [note for note in warnings_of(params) if "a kill loses all" in note]

    assert late(big) == []
    assert late(changed(big, "09_dpo", eval_every=778)) == [
        "09_dpo: a checkpoint every 778 steps of 778 is one at the end, so a kill loses all;"
        " lower eval_every."
    ]


def test_trackers_that_are_not_there_are_refused(big, monkeypatch):
    big["06_midtraining"]["report_to"] = "trackio"
    big["07_sft"]["report_to"] = "tensorbord"
    big["09_dpo"]["report_to"] = "wandb"
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name == "wandb" else None)
    missing, unknown = [problem for problem in problems_of(big) if "report_to" in problem]
    assert "06_midtraining: report_to is 'trackio'" in missing
    assert "pip install trackio" in missing
    assert "07_sft: report_to is 'tensorbord'; none" in unknown


def naming(params, file):
    "The profile, with chapter 07 naming this accelerate file."
    return changed(params, "07_sft", accelerate=f"params/h100x32/{file}")


@pytest.mark.parametrize("file, parts", [("accelerate.yaml", 1), ("accelerate_sequence.yaml", 4)])
def test_a_stage_is_weighed_by_the_file_it_names(big, file, parts):
    assert fit_of(doctor.examine(naming(big, file), FOLDER), "07_sft").load.parts == parts


def test_a_file_that_is_not_there_is_refused(big):
    assert any("no_such.yaml" in problem for problem in problems_of(naming(big, "no_such.yaml")))


def test_base_models_are_found_or_named():
    def parameters(base):
        return doctor.count_parameters(doctor.base_config(base))

    assert parameters(str(toy("07_sft/model"))) < 10**6
    assert parameters("smollm2") == 134_515_008
    assert parameters("t-tech/T-pro-it-2.0") == PARAMETERS
    with pytest.raises(UserError, match="config.json"):
        doctor.base_config("no/such/folder")


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(cards=0), "--cards 0"),
        (dict(cards=-3), "--cards -3"),
        (dict(card_gb=0.0), "--card-gb 0"),
        (dict(card_gb=-80.0), "--card-gb -80"),
        (dict(card_gb=float("nan")), "--card-gb nan"),
        (dict(card_gb=float("inf")), "--card-gb inf"),
        (dict(cards=8), "trains on one"),
    ],
)
def test_cards_that_cannot_be_are_refused(options, named):
    folder = ROOT / "params" / "h100"
    with pytest.raises(UserError, match=named):
        doctor.examine(stages.load_params(ROOT, "h100"), folder, **options)


@pytest.mark.parametrize("options", [dict(cards=1), dict(card_gb=141.0)])
def test_cards_that_can_be_are_taken(options):
    folder = ROOT / "params" / "h100"
    found = doctor.examine(stages.load_params(ROOT, "h100"), folder, **options)
    assert not found.problems


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["doctor", "h100"], 0),
        (["doctor", "h100x32", "--cards", "8"], 2),
        (["doctor", "h100", "--card-gb", "10"], 2),
    ],
)
def test_command_line(capsys, monkeypatch, arguments, status):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    said = capsys.readouterr().out
    assert left.value.code == status
    assert ("REFUSED" in said) is bool(status)
    assert "No GPU was used" in said
