"Chapters 03a, 03b and 06: rows move as they should, new rows train, recipes are the paper's."

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from tpro_nb.base_model import (
    INITS,
    get_base,
    row_plan,
    run_steps,
    spelt,
    text_bits,
    transplant,
    windows,
)
from tpro_nb.core import TOY_TEXT, UserError, toy, toy_model, toy_tokenizer, write_jsonl
from tpro_nb.midtraining import (
    check_think,
    midtraining_dataset,
    snippets,
    train_midtraining,
    turn_ids,
)
from tpro_nb.training import (
    fit,
    fit_folder,
    last_checkpoint,
    load_model,
    merge_and_save,
    new_rows,
    save_model_folder,
    set_attention,
    trainable,
    vocab_matrices,
)

ROOT = Path(__file__).resolve().parent.parent


def params(profile, stage):
    return yaml.safe_load((ROOT / "params" / profile / f"{stage}.yaml").read_text())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = toy_tokenizer(tmp_path_factory.mktemp("base"), vocab_size=400)
    return base, AutoTokenizer.from_pretrained(toy("03b_base_model/model"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", list(INITS))
def test_transplant_moves_kept_rows_and_touches_no_padding(tmp_path, pair, tied, init):
    base, dense = pair
    model = toy_model(tmp_path, tie_word_embeddings=tied, vocab_size=640).bfloat16()
    before = [matrix.detach().clone() for matrix in vocab_matrices(model)]
    ids = transplant(model, base, dense, init)
    plan = row_plan(base, dense)
    assert ids == sorted(plan.new)
    assert len(ids) > 20
    assert len(vocab_matrices(model)) == (1 if tied else 2)
    for now, was in zip(vocab_matrices(model), before):
        assert now.dtype == torch.bfloat16
        assert torch.isfinite(now).all()
        assert torch.equal(now[list(plan.kept)], was[list(plan.kept.values())])
        assert torch.equal(now[len(dense) :], was[len(dense) :])
    assert model.config.eos_token_id == dense.eos_token_id != model.config.pad_token_id


def test_pieces_spell_the_token(pair):
    base, dense = pair
    names = {token: name for name, token in dense.get_vocab().items()}
    for token, pieces in row_plan(base, dense).new.items():
        assert "".join(base.convert_ids_to_tokens(pieces)) == names[token]
    examples = spelt(base, torch.Generator().manual_seed(0))
    for token, pieces in zip(examples.ids, examples.pieces):
        assert "".join(base.convert_ids_to_tokens(pieces)) == base.convert_ids_to_tokens(token)


SPELT_IN_ANOTHER_PROCESS = """
import sys, torch
from transformers import AutoTokenizer
from tpro_nb.base_model import spelt

print(spelt(AutoTokenizer.from_pretrained(sys.argv[1]), torch.Generator().manual_seed(3), 10))
"""


def test_every_initialiser_is_the_same_in_another_process(tmp_path, pair):
    "get_vocab has another order in every process; a sample taken by position would be another one."
    base, _ = pair
    base.save_pretrained(tmp_path / "base")
    command = [sys.executable, "-c", SPELT_IN_ANOTHER_PROCESS, str(tmp_path / "base")]
    said = set()
    for _ in range(3):
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        said.add(child.stdout)
    assert len(said) == 1
    assert "[" in said.pop()
    third, fourth = (spelt(base, torch.Generator().manual_seed(seed), 10) for seed in (3, 4))
    assert third != fourth


def test_another_number_of_processes_is_another_training(tmp_path, monkeypatch):
    one = fit_folder(tmp_path, dict(batch=1))
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert fit_folder(tmp_path, dict(batch=1)) != one == tmp_path / one.name


def test_sizes_that_disagree_are_a_user_error(tmp_path, pair):
    small = toy_model(tmp_path / "m", vocab_size=300)
    with pytest.raises(UserError, match="not a pair"):
        transplant(small, *pair)
    with pytest.raises(UserError, match="no initialiser"):
        transplant(toy_model(tmp_path / "n"), *pair, init="magic")
    with pytest.raises(UserError, match="smollm2 / nano"):
        load_model(tmp_path / "absent")


def test_a_base_of_another_vocabulary_is_refused_though_it_would_fit(tmp_path):
    toy_model(tmp_path / "base", vocab_size=640)
    toy_tokenizer(tmp_path / "same")
    toy_tokenizer(tmp_path / "other", vocab_size=400)
    base, same, other, out = (str(tmp_path / name) for name in ("base", "same", "other", "out"))
    assert get_base(base, same, out)["parameters"] > 0
    with pytest.raises(UserError, match="have another id in the vocabulary of 02"):
        get_base(base, other, out)


def test_bits_do_not_depend_on_the_batch():
    model, tok = load_model(toy("03b_base_model/model"), torch.float32)
    singly = [text_bits(model, tok, [text]).bits[0] for text in TOY_TEXT]
    together = text_bits(model, tok, TOY_TEXT, batch=9).bits
    assert torch.allclose(torch.tensor(singly), torch.tensor(together), rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_train_and_merge_into_a_whole_folder(tmp_path, pair, tied):
    base, dense = pair
    model = toy_model(tmp_path / "base", tie_word_embeddings=tied).bfloat16()
    ids = transplant(model, base, dense, "mean")
    save_model_folder(model, dense, tmp_path / "start", ids)
    model, tok = load_model(tmp_path / "start")
    adapted = trainable(model, ids, 4)
    assert {w.dtype for w in adapted.parameters() if w.requires_grad} == {torch.float32}
    run_steps(adapted.train(), windows(tok, TOY_TEXT * 4, 32), 4, 4, 1e-2)
    changed = merge_and_save(adapted, tok, tmp_path / "end", tmp_path / "start")
    start, (end, tok) = load_model(tmp_path / "start")[0], load_model(tmp_path / "end")
    moved = []
    for was, now in zip(vocab_matrices(start), vocab_matrices(end)):
        largest = (now[ids] - was[ids]).abs().amax(1)
        moved.append(100 * (largest > 1e-3).double().mean().item())
    # an untied embedding moves for the tokens that were read, every head row at each step
    assert len(moved) == 2 - tied
    assert moved[-1] == 100
    assert changed >= min(moved) > 0
    assert end.dtype == torch.bfloat16
    assert new_rows(tmp_path / "end") == ids
    assert tok.chat_template
    assert end.generation_config.eos_token_id == tok.convert_tokens_to_ids("<|im_end|>")
    kept = [token for token in range(len(tok)) if token not in set(ids)]
    assert torch.equal(vocab_matrices(end)[0][kept], vocab_matrices(start)[0][kept])


def test_trl_fused_head_sees_the_trained_rows():
    "TRL reads lm_head.weight and .bias: through PEFT's wrapper that must be the merged matrix."
    from trl.trainer.utils import add_fused_lm_head

    model, _ = load_model(toy("03b_base_model/base"), torch.float32)
    adapted = trainable(model, [300, 301], 4)
    for name, weight in adapted.named_parameters():
        if "trainable_tokens" in name:
            weight.data += 1.0
    add_fused_lm_head(adapted.get_base_model())
    row = torch.tensor([[5, 300, 7, 301, 9]])
    fused = adapted(input_ids=row, labels=row, fused_lm_head=True).loss
    assert torch.allclose(fused, adapted(input_ids=row, labels=row).loss, atol=1e-4)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_an_interrupted_checkpoint_is_passed_over(tmp_path):
    "Newest first: no optimiser, a state cut short, an optimiser cut short; then a whole one."
    for step in (2, 4, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save(dict(state=list(range(500))), folder / "optimizer.pt")
        state = f'{{"global_step": {step}, "log_history": []}}'
        (folder / "trainer_state.json").write_text(state)
    cut_in_half(tmp_path / "checkpoint-4" / "optimizer.pt")
    cut_in_half(tmp_path / "checkpoint-6" / "trainer_state.json")
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    cut_in_half(tmp_path / "checkpoint-2" / "trainer_state.json")
    assert last_checkpoint(tmp_path) is None


def test_bad_rows_are_named():
    tok = AutoTokenizer.from_pretrained(toy("03b_base_model/model"))
    row = dict(
        messages=[dict(role="user", content="Где?"), dict(role="assistant", content="Тут.")],
        mode="think",
        id="r7",
    )
    with pytest.raises(UserError, match="r7"):
        turn_ids(tok, row["messages"], row["mode"], row["id"])
    with pytest.raises(UserError, match="no row fits"):
        midtraining_dataset(tok, [row | dict(mode="direct")], 3)


MIDTRAINING_IN_APPENDIX_F = dict(
    lr=1e-5,
    lr_min=1e-6,
    warmup=100,
    beta2=0.95,
    eps=1e-8,
    weight_decay=1e-6,
    clip=1.0,
    context=32768,
    steps=9750,
    rank=0,
)


def test_midtraining_recipe_is_the_papers():
    given = params("h100x32", "06_midtraining")
    assert {name: given[name] for name in MIDTRAINING_IN_APPENDIX_F} == MIDTRAINING_IN_APPENDIX_F
    assert given["batch"] * given["accumulate"] * 32 == 128
    assert abs(128 * given["context"] * given["steps"] / 40e9 - 1) < 0.03
    assert params("h100x32", "03b_base_model")["base"] == "Qwen/Qwen3-32B"
    assert params("h100x32", "08_reward_model")["max_length"] == 32768


def test_packed_attention_is_the_plain_one_and_padded_batches_take_it():
    "A packed row with padding, one conversation, a padded batch: plain attention's logits."
    model, _ = load_model(toy("03b_base_model/base"), torch.float32)
    row, two = torch.randint(5, 300, (1, 70)), torch.randint(5, 300, (2, 9))
    positions = [*range(33), *range(20), *range(9), *[0] * 8]
    packed = dict(input_ids=row, position_ids=torch.tensor([positions]))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    padded = dict(input_ids=two, attention_mask=mask)
    alone = dict(input_ids=row)
    for given, live in ((packed, slice(62)), (alone, slice(None)), (padded, slice(6))):
        model.set_attn_implementation("eager")
        plain = model(**given, use_cache=False).logits[:, live]
        ours = set_attention(model)(**given, use_cache=False).logits[:, live]
        assert torch.allclose(ours, plain, atol=1e-4)
    second = model(input_ids=row[:, 33:53], use_cache=False).logits
    in_the_row = model(**packed, use_cache=False).logits[:, 33:53]
    assert torch.allclose(in_the_row, second, atol=1e-4)


def test_the_older_model_outlives_a_failed_save(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model, tok = load_model(toy("03b_base_model/base"))
    save_model_folder(model, tok, tmp_path / "model", [7])
    was = (tmp_path / "model" / "model.safetensors").read_bytes()
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "weights are as readable as the other files"
    with monkeypatch.context() as patch:
        patch.setattr(type(tok), "save_pretrained", full_disk)
        with pytest.raises(OSError):
            save_model_folder(model, tok, tmp_path / "model", [8])
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == was
    assert new_rows(tmp_path / "model") == [7]
    save_model_folder(model, tok, tmp_path / "model", [9])
    assert new_rows(tmp_path / "model") == [9]
    assert not list(tmp_path.glob(".model*"))


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    "A NaN that no logged step shows is found before the folder is written."
    model, _ = load_model(toy("03b_base_model/base"), torch.float32)
    adapted = trainable(model, [300], 4)

    def train(resume_from_checkpoint):
        first = next(weight for weight in adapted.parameters() if weight.requires_grad)
        first.data[0, 0] = float("inf")

    trainer = SimpleNamespace(
        model=adapted,
        train=train,
        add_callback=lambda callback: None,
        remove_callback=lambda callback: None,
        state=SimpleNamespace(log_history=[dict(loss=1.0)]),
    )
    with pytest.raises(UserError, match="not finite.*Lower lr"):
        fit(trainer, tmp_path)


def test_a_loss_that_is_no_number_stops_the_training(tmp_path):
    with pytest.raises(
        UserError, match="loss is (nan|inf) at step . *: lower lr|not finite.*Lower lr"
    ):
        train_midtraining(
            model_dir=str(toy("06_midtraining/model")),
            rows_path=str(toy("05j_data/midtrain.jsonl")),
            out=str(tmp_path / "out"),
            work=str(tmp_path / "w"),
            steps=6,
            batch=1,
            accumulate=1,
            context=96,
            lr=1e30,
            lr_min=1e29,
            warmup=0,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.0,
            clip=1e30,
            rank=0,
            save_every=100,
        )
    assert not (tmp_path / "out").exists()


def test_a_race_whose_loss_is_no_number_stops():
    model, tok = load_model(toy("03b_base_model/base"), torch.float32)
    next(model.parameters()).data[:] = float("nan")
    with pytest.raises(UserError, match="race: the loss is nan at step 1; lower lr"):
        run_steps(model, windows(tok, TOY_TEXT, 16), 2, 2, 1e-3, desc="race")


def test_a_language_without_held_out_text_is_named(tmp_path):
    write_jsonl(
        tmp_path / "heldout.jsonl",
        [dict(lang="ru", text="Мороз и солнце"), dict(lang="en", text=" ")],
    )
    with pytest.raises(UserError, match="lacks texts in en; run stage 05j_data again"):
        snippets(tmp_path / "heldout.jsonl", 5, 100)


def test_a_tokenizer_that_splits_the_think_tokens_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    check_think(AutoTokenizer.from_pretrained(toy("03b_base_model/model")))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate(letters)}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match="<think> is 7 tokens"):
        check_think(PreTrainedTokenizerFast(tokenizer_object=bytes_only))
