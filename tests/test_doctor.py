"Chapter 91: the sums agree with hand arithmetic, what cannot fit is refused by name, and accelerate, TRL and SGLang accept what the profiles ask for."
import inspect, math, shlex, sys
from pathlib import Path
import pytest, yaml
from tpro_nb import core, doctor as D, pipeline as P
from tpro_nb.claims import estimate
from tpro_nb.core import UserError, toy
from tpro_nb.serving import target_shapes
from conftest import ROOT

FOLDER = ROOT/"params"/"h100x32"

@pytest.fixture
def big():
    "The 4x8 profile with batches and lengths that fit, so that each test breaks one thing."
    p = P.load_params(ROOT, "h100x32")
    p["07_sft"]["eval_batch"], p["10_evaluation"]["batch_size"], p["11_eagle_draft"]["gen_batch"] = 6, 1, 8
    for stage in ("08_reward_model", "09_dpo"): p[stage] |= dict(sample_batch=1, servers={})
    p["10_evaluation"]["servers"] = {}
    return p

@pytest.mark.parametrize("size", D.QWEN3)
def test_parameters_on_the_meta_device_equal_two_other_counts(size):
    c = D.qwen3(size)
    shapes = target_shapes(c.to_dict() | dict(model_type="qwen3"))
    assert D.count(c) == sum(math.prod(s) for s in shapes.values()) == D.QWEN3[size][-1]

def test_32b_by_hand():
    layer = 2*5120*8192 + 2*5120*1024 + 3*5120*25600 + 2*5120 + 2*128
    n = 64*layer + 2*151_936*5120 + 5120
    assert D.count(D.qwen3("32B")) == n == 32_762_123_264
    one, many = D.memory(D.qwen3("32B"), 1, 32768), D.memory(D.qwen3("32B"), 1, 32768, shards=32)
    state = lambda m: m["weights"] + m["gradients"] + m["optimiser"]
    assert state(one) == pytest.approx(16*n/1e9) and state(many) == pytest.approx(16*n/32/1e9)
    assert many["activations"] == pytest.approx(64*32768*5120*2/1e9) and many["block"] == pytest.approx(32768*(16*5120 + 10*9216 + 12*25600)/1e9)
    assert D.memory(D.qwen3("32B"), 2, 32768, shards=32, reference=True)["reference"] == pytest.approx(2*n/32/1e9)
    cut = D.memory(D.qwen3("32B"), 1, 32768, shards=32, parts=4)
    assert cut["activations"] == pytest.approx(many["activations"]/4) and state(cut) == state(many)
    assert D.writing(D.qwen3("32B"), 1, 1 - D.PROMPT)["cache"] == pytest.approx(262_144/1e9)

def test_adapters_hold_frozen_weights_in_bf16():
    c = D.qwen3("8B")
    m, n = D.memory(c, 1, 1024, rank=16), D.count(c)
    trained = 16*36*((4096 + 4096)*2 + (4096 + 1024)*2 + (4096 + 12288)*3)
    assert m["optimiser"] == pytest.approx(8*trained/1e9) and m["weights"] == pytest.approx((2*n + 4*trained)/1e9) and m["reference"] == 0

def test_a_profile_that_fits_is_not_refused(big):
    got = D.examine(big, FOLDER)
    assert got["problems"] == [] and got["parameters"] == 32_762_123_264
    assert {f["stage"]: f["world"] for f in got["fits"]} == dict.fromkeys(["06_midtraining", "07_sft", "08_reward_model", "09_dpo"], 32)
    assert got["trl"] == {"06_midtraining": "SFTConfig", "07_sft": "SFTConfig", "08_reward_model": "RewardConfig", "09_dpo": "DPOConfig"}
    mid = next(h for h in got["hours"] if h["stage"] == "midtraining")
    want = estimate("midtraining", 32_762_123_264, 9750*128*32768, 6, mfu=big["16_claims"]["plan_mfu"], gpus=32)
    assert mid["gpu_h"] == pytest.approx(want["gpu_h"]) and 5000 < mid["gpu_h"] < 6500     # the paper's 40 B tokens
    text = D.said(got, "h100x32")
    assert "nothing refused" in text and "No GPU was used" in text and "srun --nodes=4" in text and "--speculative-algorithm EAGLE" in text

def test_small_profile_fits_as_it_is():
    got = D.examine(P.load_params(ROOT, "h100"), ROOT/"params"/"h100")
    assert got["problems"] == [] and all(f["total"] < 80 and f["world"] == 1 for f in got["fits"])
    assert got["configs"]["accelerate.yaml"]["kind"] == "single"
    (dpo,) = (f for f in got["fits"] if f["stage"] == "09_dpo")
    sft = next(f for f in got["fits"] if f["stage"] == "07_sft")
    assert dpo["steps"] == -(-2000*.98//128) and sft["tokens"] == (3*1500 + 40_000)*2*2140          # by what 05 deals

def test_full_fine_tuning_of_32b_on_a_node_is_refused_with_the_sum(big):
    got = D.examine(big, FOLDER, cards=8)
    line = next(p for p in got["problems"] if p.startswith("06_midtraining"))
    sums = {k: float(v) for k, v in (x.split(" ")[-2:] for x in line.split("needs ")[1].split(" = ")[0].split(" + "))}
    total = float(line.split(" = ")[1].split(" ")[0])
    assert sums["optimiser"] == pytest.approx(8*32.762/8, abs=.1) and sum(sums.values()) == pytest.approx(total, abs=.5) and total > 80
    assert "context 32768" in line and "24 cards" in line and "rank: 16" in line

@pytest.mark.parametrize("stage, changes, names", [
    ("07_sft", dict(eval_batch=7), ["07_sft: eval_batch 7", "eval_batch: 6"]),
    ("08_reward_model", dict(max_length=65536), ["08_reward_model: max_length 65536", "max_length: "]),
    ("08_reward_model", dict(accelerate=""), ["08_reward_model: max_length 32768", "1 shard)", "accelerate: a file (the weights are then sharded over the 32 cards"]),
    ("09_dpo", dict(batch=2), ["09_dpo: max_length 32768 with batch 2", "batch: 1"]),
    ("09_dpo", dict(sample_batch=3), ["09_dpo: sample_batch 3", "sample_batch: 1"]),
    ("07_sft", dict(accelerate="params/h100x32/accelerate_sequence.yaml"), ["07_sft: accelerate names accelerate_sequence.yaml", "TRL refuses packed rows", "packing: false"]),
    ("10_evaluation", dict(batch_size=16), ["10_evaluation: batch_size 16", "batch_size: 1"]),
    ("06_midtraining", dict(nproc=4), ["06_midtraining: nproc 4", "num_processes 32"]),
    ("13_serving", dict(tp_size=1), ["13_serving: tp_size 1", "tp_size: 2"])])
def test_what_cannot_fit_is_refused_by_name(big, stage, changes, names):
    big[stage] |= changes
    problems = D.examine(big, FOLDER)["problems"]
    assert len(problems) == 1 and all(n in problems[0] for n in names), problems

def test_the_named_remedy_fits_and_one_step_more_does_not(big):
    big["09_dpo"]["max_length"] = 65536
    fix = int(D.examine(big, FOLDER)["problems"][0].split("max_length: ")[1].split(";")[0].rstrip("."))
    for length, fits in ((fix, True), (fix + 1024, False)):
        big["09_dpo"]["max_length"] = length
        assert (D.examine(big, FOLDER)["problems"] == []) is fits

def test_a_stage_without_an_accelerate_file_is_weighed_and_started_as_torchrun_will(big):
    "Its launch line and its sum must be those of `core.starter`, not of the file that other stages name."
    big["08_reward_model"]["accelerate"] = ""
    got = D.examine(big, FOLDER)
    row = next(f for f in got["fits"] if f["stage"] == "08_reward_model")
    assert row["shards"] == 1 and row["total"] > 500 and D.launch_line(8) in got["lines"] and len(got["lines"]) == 2
    assert all(f["shards"] == 32 for f in got["fits"] if f is not row)

def test_answers_that_one_card_cannot_write_are_said(big):
    notes = {n[:2]: n for n in D.examine(big, FOLDER)["warnings"] if "answers in one process" in n}
    rate = 3.35e12/(2*32_762_123_264 + 262_144*(30_000 + D.PROMPT))                 # bytes a second over bytes a token
    hard = 3.35e12/(2*32_762_123_264 + 262_144*(32_768 + D.PROMPT))
    assert "10_evaluation writes 1,200 answers" in notes["10"] and f"{1200*16_000/hard/86400:,.0f} days" in notes["10"]      # 100 of T-Math, 4 samples, 3 models
    assert set(notes) == {"08", "09", "10"} and f"{1_600_000*2140/rate/86400:,.0f} days" in notes["09"] and "64,000 answers" in notes["08"]
    big["09_dpo"]["servers"] = {"07_sft": "http://127.0.0.1:31001/v1 07_sft"}
    assert not any(n.startswith("09_dpo writes") for n in D.examine(big, FOLDER)["warnings"])
    big["09_dpo"]["sample_batch"] = 64                                              # 09_dpo itself is still loaded here
    assert any(p.startswith("09_dpo: sample_batch 64") for p in D.examine(big, FOLDER)["problems"])
    big["09_dpo"]["servers"]["09_dpo"] = "http://127.0.0.1:31002/v1 09_dpo"
    assert not any(p.startswith("09_dpo: sample_batch") for p in D.examine(big, FOLDER)["problems"])

def test_text_that_is_read_again_and_again_is_said(big):
    (note,) = [w for w in D.examine(big, FOLDER)["warnings"] if w.startswith("06_midtraining reads")]
    assert "40.89 billion" in note and "read 41 times, and more often" in note
    big["05_data"]["midtrain_chars"] = 9750*128*32_768                     # four passes
    assert not any(w.startswith("06_midtraining reads") for w in D.examine(big, FOLDER)["warnings"])

def test_without_fsdp_many_cards_do_not_help(big, tmp_path):
    "Plain torchrun replicates: with no accelerate file every card holds all sixteen bytes."
    problems = D.examine(big, tmp_path)["problems"]
    assert any(p.startswith("06_midtraining") and "1 shard)" in p for p in problems)

def config(tmp_path, name="accelerate.yaml", **changes):
    c = yaml.safe_load((FOLDER/name).read_text())
    for k, v in changes.items():
        if isinstance(v, dict): c[k] |= v
        else: c[k] = v
    (tmp_path/"accelerate.yaml").write_text(yaml.safe_dump(c))
    return tmp_path/"accelerate.yaml"

def test_accelerate_files_are_what_they_say():
    one, many, cut = (D.accelerate_config(ROOT/"params"/p) for p in ("h100/accelerate.yaml", "h100x32/accelerate.yaml", "h100x32/accelerate_sequence.yaml"))
    assert (one["kind"], one["processes"]) == ("single", 1)
    assert (many["kind"], many["processes"], many["machines"], many["shards"], many["parts"], many["wraps"]) == ("fsdp", 32, 4, 32, 1, ["Qwen3DecoderLayer"])
    assert (cut["kind"], cut["processes"], cut["shards"], cut["parts"]) == ("fsdp", 32, 32, 4)

@pytest.mark.parametrize("changes, complaint", [
    (dict(parallelism_config=dict(parallelism_config_dp_shard_size=16)), "= 16, but num_processes is 32"),
    (dict(parallelism_config=dict(parallelism_config_dp_shard_size=8, parallelism_config_sp_size=4)), "does nothing under FSDP"),
    (dict(parallelism_config=dict(parallelism_config_cp_size=4, parallelism_config_sp_size=4)), "mutually exclusive"),
    (dict(fsdp_config=dict(fsdp_version=1)), "fsdp_version must be 2"), (dict(mixed_precision="fp16"), "the trainers use bf16"),
    (dict(num_procs=32), "num_procs"), (dict(distributed_type="FSDP3"), "FSDP3")])
def test_accelerate_files_that_would_not_work_are_refused(tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint): D.accelerate_config(config(tmp_path, **changes))

def test_a_layer_that_the_model_lacks_is_refused(big, tmp_path):
    config(tmp_path, fsdp_config=dict(fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer"))
    assert any("LlamaDecoderLayer is no layer" in p and "Qwen3DecoderLayer" in p for p in D.examine(big, tmp_path)["problems"])

def test_accelerate_still_puts_ulysses_in_place_under_deepspeed_only():
    "The day this fails, accelerate_sequence.yaml can use sp_size and the chapter's sentence has to go."
    from accelerate import Accelerator
    assert "UlyssesSPAttentionHF" in inspect.getsource(Accelerator._prepare_deepspeed)
    assert "ulysses" not in (inspect.getsource(Accelerator._prepare_fsdp2) + inspect.getsource(Accelerator._prepare_cp)).lower()

@pytest.mark.parametrize("nproc", [1, 2])
def test_launch_lines_are_those_of_core_launch(tmp_path, monkeypatch, nproc):
    seen = []
    def run(argv, **kw): seen.append(argv[1:]); core.write_json(tmp_path/"result.json", [{}]); return type("P", (), dict(returncode=0))
    monkeypatch.setattr(core.subprocess, "run", run)
    core.launch("tpro_nb.core:peak_mb", {}, tmp_path, nproc=nproc)
    assert shlex.split(D.launch_line(nproc))[1:] == [{str(tmp_path/"config.json"): "CONFIG", str(tmp_path/"result.json"): "RESULT"}.get(a, a) for a in seen[0]]

def test_on_slurm_core_starts_what_the_doctor_prints(big, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    shown, own = shlex.split(D.launch_line(8, D.examine(big, FOLDER)["acc"])), core.starter(8, "params/h100x32/accelerate.yaml")
    assert own[:own.index("-c")] == shown[:shown.index("-c")] and own[-1] == "tpro-nb"
    inner = own[own.index("-c") + 1].replace(f"{sys.executable} -m accelerate.commands.launch", "accelerate launch").replace(f"{ROOT}/", "")
    assert inner == shown[-1].replace("CONFIG RESULT", '"$@"')
    with pytest.raises(UserError, match="no file params/nowhere.yaml"): core.starter(2, "params/nowhere.yaml")

def test_the_profile_as_it_stands_is_not_refused():
    assert D.examine(P.load_params(ROOT, "h100x32"), FOLDER)["problems"] == []

def test_host_memory_and_flash_attention_are_asked_for(big, monkeypatch):
    n = 32_762_123_264
    assert D.host_memory(n, D.trainings(big, 32)) == pytest.approx(n*(8*4 + 2)/1e9) and D.host_memory(n, D.trainings({s: p | (dict(rank=8) if "rank" in p else {}) for s, p in big.items()}, 32)) == 0
    for there in (False, True):
        monkeypatch.setattr(D, "find_spec", lambda name: object() if there else None)
        assert any("flash-attn" in w for w in D.examine(big, FOLDER)["warnings"]) is not there
    monkeypatch.setattr(D, "HOST_GB", 1000)
    assert any("host memory" in p for p in D.examine(big, FOLDER)["problems"])

def test_an_empty_accelerate_is_said(big):
    big["07_sft"]["accelerate"] = ""
    assert any("07_sft" in w and "06_midtraining" not in w and "nothing is sharded" in w for w in D.examine(big, FOLDER)["warnings"])

@pytest.mark.parametrize("cards, machines", [(None, 4), (8, 1), (16, 2)])
def test_accelerate_takes_the_launch_line(big, monkeypatch, cards, machines):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    monkeypatch.chdir(ROOT)
    line = D.launch_line(8, D.examine(big, FOLDER, cards=cards)["acc"])
    words = shlex.split(line.split("bash -c ")[1].strip("'").replace("$SLURM_NODEID", "0").replace("$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)", "node0") if machines > 1 else line)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert (args.num_processes, args.num_machines, int(args.parallelism_config_dp_shard_size), args.use_fsdp) == (8*machines, machines, 8*machines, True)
    assert args.module and args.training_script == "tpro_nb.core" and args.training_script_args == ["CONFIG", "RESULT"]

def test_trl_configs_carry_the_stages_values(big):
    got = D.trl_configs(big)
    mid, dpo = got["06_midtraining"], got["09_dpo"]
    assert (mid.learning_rate, mid.max_length, mid.packing, mid.adam_beta2, mid.max_grad_norm, mid.max_steps) == (1e-5, 32768, True, .95, 1.0, 9750)
    assert mid.lr_scheduler_kwargs == dict(min_lr=1e-6) and got["07_sft"].max_steps == -1 and got["07_sft"].num_train_epochs == 2
    assert (dpo.beta, dpo.learning_rate, dpo.max_length, dpo.loss_type, dpo.load_best_model_at_end) == (.5, 1e-7, 32768, ["sigmoid"], True)
    assert got["07_sft"].pad_to_multiple_of == 64 and got["07_sft"].padding_free and str(getattr(mid.include_num_input_tokens_seen, "value", mid.include_num_input_tokens_seen)) == "all"
    schedule = got["07_sft"].lr_scheduler_type
    assert getattr(schedule, "value", schedule) == "cosine"

def test_a_deal_that_cannot_be_is_refused(big):
    assert all(D.dealing(P.load_params(ROOT, p)["05_data"]) == [] for p in ("smoke", "cpu", "h100", "h100x32"))
    ask = lambda **kw: D.examine(big | {"05_data": big["05_data"] | kw}, FOLDER)["problems"]
    assert ask(prompts_dpo=200_000) == ["05_data: dpo: 6667 rows asked, 4216 left. Raise entries or problems_per_family, or ask for fewer."]
    assert "05_data: cups/train has only" in ask(problems_per_family=50_000)[0]

def test_a_training_that_one_kill_would_lose_is_said(big):
    late = lambda **kw: [w for w in D.examine(big | {"09_dpo": big["09_dpo"] | kw}, FOLDER)["warnings"] if "a kill loses all" in w]
    assert late() == [] and late(eval_every=778) == ["09_dpo: a checkpoint every 778 steps of 778 is one at the end, so a kill loses all; lower eval_every."]

def test_trackers_that_are_not_there_are_refused(big, monkeypatch):
    asked = {s: p | (dict(report_to=n) if (n := {"06_midtraining": "trackio", "07_sft": "tensorbord", "09_dpo": "wandb"}.get(s)) else {}) for s, p in big.items()}
    monkeypatch.setattr(D, "find_spec", lambda name: object() if name == "wandb" else None)
    got = [p for p in D.examine(asked, ROOT/"params"/"h100x32")["problems"] if "report_to" in p]
    assert len(got) == 2 and "06_midtraining: report_to is 'trackio'" in got[0] and "pip install trackio" in got[0] and "07_sft: report_to is 'tensorbord'; none" in got[1]

def test_a_stage_is_weighed_by_the_file_it_names(big):
    named = lambda f: {s: p | (dict(accelerate=f"params/h100x32/{f}") if s == "07_sft" else {}) for s, p in big.items()}
    row = lambda f: next(r for r in D.examine(named(f), ROOT/"params"/"h100x32")["fits"] if r["stage"] == "07_sft")
    assert (row("accelerate.yaml")["parts"], row("accelerate_sequence.yaml")["parts"]) == (1, 4)
    assert any("no_such.yaml" in p for p in D.examine(named("no_such.yaml"), ROOT/"params"/"h100x32")["problems"])

def test_base_models_are_found_or_named():
    assert D.count(D.config_of(str(toy("07_sft/model")))) < 10**6
    assert D.count(D.config_of("smollm2")) == 134_515_008 and D.count(D.config_of("t-tech/T-pro-it-2.0")) == 32_762_123_264
    with pytest.raises(UserError, match="config.json"): D.config_of("no/such/folder")

def test_command_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for argv, status in ((["doctor", "h100"], 0), (["doctor", "h100x32", "--cards", "8"], 2), (["doctor", "h100", "--card-gb", "10"], 2)):
        with pytest.raises(SystemExit) as e: P.main(argv)
        out = capsys.readouterr().out
        assert e.value.code == status and ("REFUSED" in out) is bool(status) and "No GPU was used" in out
