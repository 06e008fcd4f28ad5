"Chapters 03 and 06: rows move as they should, new rows train, recipes equal the paper's tables."
import subprocess, sys
from pathlib import Path
import pytest, torch, yaml
from tpro_nb.base_model import (INITS, bits_per_byte, check_sizes, fit, fit_folder, get_base, last_checkpoint, load_model, merge_and_save, new_rows, row_plan, run_steps, save_folder, set_attention, spelt,
                                text_bits, trainable, transplant, vocab_matrices, windows)
from tpro_nb.core import TOY_TEXT, UserError, toy, toy_model, toy_tokenizer, write_jsonl
from tpro_nb.midtraining import check_think, dataset, turn_ids
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
params = lambda profile, stage: yaml.safe_load((ROOT/"params"/profile/f"{stage}.yaml").read_text())

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = toy_tokenizer(tmp_path_factory.mktemp("base"), vocab_size=400)
    return base, AutoTokenizer.from_pretrained(toy("03_base_model/model"))

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", list(INITS))
def test_transplant_moves_kept_rows_and_touches_no_padding(tmp_path, pair, tied, init):
    base, dense = pair
    m = toy_model(tmp_path, tie_word_embeddings=tied, vocab_size=640).bfloat16()
    before = [W.detach().clone() for W in vocab_matrices(m)]
    ids = transplant(m, base, dense, init)
    kept, new = row_plan(base, dense)
    assert ids == sorted(new) and len(ids) > 20 and len(vocab_matrices(m)) == (1 if tied else 2)
    for W, b in zip(vocab_matrices(m), before):
        assert W.dtype == torch.bfloat16 and torch.isfinite(W).all()
        assert torch.equal(W[list(kept)], b[list(kept.values())])
        assert torch.equal(W[len(dense):], b[len(dense):])
    assert m.config.eos_token_id == dense.eos_token_id != m.config.pad_token_id

def test_pieces_spell_the_token(pair):
    base, dense = pair
    kept, new = row_plan(base, dense)
    names = {i: s for s, i in dense.get_vocab().items()}
    assert all("".join(base.convert_ids_to_tokens(p)) == names[i] for i, p in new.items())
    ids, parts = spelt(base, torch.Generator().manual_seed(0))
    assert all("".join(base.convert_ids_to_tokens(p)) == base.convert_ids_to_tokens(i) for i, p in zip(ids, parts))

def test_every_initialiser_is_the_same_in_another_process(tmp_path, pair):
    "transformers gives get_vocab in another order in every process; a sample taken by position would be another one."
    base, dense = pair
    base.save_pretrained(tmp_path/"base"); code = ("import sys, torch; from transformers import AutoTokenizer; from tpro_nb.base_model import spelt; "
        f"print(spelt(AutoTokenizer.from_pretrained({str(tmp_path/'base')!r}), torch.Generator().manual_seed(3), 10))")
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(said) == 1 and "[" in said.pop()
    assert spelt(base, torch.Generator().manual_seed(3), 10) != spelt(base, torch.Generator().manual_seed(4), 10)

def test_another_number_of_processes_is_another_training(tmp_path, monkeypatch):
    one = fit_folder(tmp_path, dict(batch=1)); monkeypatch.setenv("WORLD_SIZE", "8")
    assert fit_folder(tmp_path, dict(batch=1)) != one == tmp_path/one.name

def test_sizes_that_disagree_are_a_user_error(tmp_path, pair):
    small = toy_model(tmp_path/"m", vocab_size=300)
    with pytest.raises(UserError, match="not a pair"): transplant(small, *pair)
    with pytest.raises(UserError, match="no initialiser"): transplant(toy_model(tmp_path/"n"), *pair, init="magic")
    with pytest.raises(UserError, match="smollm2 / nano"): load_model(tmp_path/"absent")

def test_a_base_of_another_vocabulary_is_refused_though_it_would_fit(tmp_path):
    toy_model(tmp_path/"base", vocab_size=640); toy_tokenizer(tmp_path/"same"); toy_tokenizer(tmp_path/"other", vocab_size=400)
    assert get_base(str(tmp_path/"base"), str(tmp_path/"same"), str(tmp_path/"out"))["parameters"] > 0
    with pytest.raises(UserError, match="have another id in the vocabulary of 02"): get_base(str(tmp_path/"base"), str(tmp_path/"other"), str(tmp_path/"out"))

def test_bits_do_not_depend_on_the_batch():
    model, tok = load_model(toy("03_base_model/model"), torch.float32)
    one = torch.tensor([text_bits(model, tok, [t])[0][0] for t in TOY_TEXT])
    assert torch.allclose(one, torch.tensor(text_bits(model, tok, TOY_TEXT, batch=9)[0]), rtol=1e-4)

@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_train_and_merge_into_a_whole_folder(tmp_path, pair, tied):
    base, dense = pair
    m = toy_model(tmp_path/"base", tie_word_embeddings=tied).bfloat16()
    ids = transplant(m, base, dense, "mean"); save_folder(m, dense, tmp_path/"start", ids)
    m, tok = load_model(tmp_path/"start")
    p = trainable(m, ids, 4)
    assert {q.dtype for q in p.parameters() if q.requires_grad} == {torch.float32}
    run_steps(p.train(), windows(tok, TOY_TEXT*4, 32), 4, 4, 1e-2)
    changed = merge_and_save(p, tok, tmp_path/"end", tmp_path/"start")
    start, end = load_model(tmp_path/"start")[0], load_model(tmp_path/"end")[0]
    moved = [100*((b[ids] - a[ids]).abs().amax(1) > 1e-3).double().mean().item() for a, b in zip(vocab_matrices(start), vocab_matrices(end))]
    assert len(moved) == 2 - tied and moved[-1] == 100 and changed >= min(moved) > 0      # an untied embedding moves for the tokens that were read, every head row at each step
    end, tok = load_model(tmp_path/"end")
    assert end.dtype == torch.bfloat16 and new_rows(tmp_path/"end") == ids and tok.chat_template
    assert end.generation_config.eos_token_id == tok.convert_tokens_to_ids("<|im_end|>")
    kept = [i for i in range(len(tok)) if i not in set(ids)]
    assert torch.equal(vocab_matrices(end)[0][kept], vocab_matrices(load_model(tmp_path/"start")[0])[0][kept])

def test_trl_fused_head_sees_the_trained_rows():
    "TRL reads lm_head.weight and .bias directly: through PEFT's wrapper that must be the merged matrix."
    from trl.trainer.utils import add_fused_lm_head
    m, _ = load_model(toy("03_base_model/base"), torch.float32)
    p = trainable(m, [300, 301], 4)
    for n, q in p.named_parameters():
        if "trainable_tokens" in n: q.data += 1.
    add_fused_lm_head(p.get_base_model())
    x = torch.tensor([[5, 300, 7, 301, 9]])
    assert torch.allclose(p(input_ids=x, labels=x, fused_lm_head=True).loss, p(input_ids=x, labels=x).loss, atol=1e-4)

def test_an_interrupted_checkpoint_is_passed_over(tmp_path):
    "Newest first: no optimiser, a state cut short, an optimiser cut short; the one before them is whole."
    for n in (2, 4, 6, 8):
        d = tmp_path/f"checkpoint-{n}"; d.mkdir()
        torch.save(dict(state=list(range(500))), d/"optimizer.pt"); (d/"trainer_state.json").write_text('{"global_step": %d, "log_history": []}' % n)
    cut = lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size//2])
    cut(tmp_path/"checkpoint-4"/"optimizer.pt"); cut(tmp_path/"checkpoint-6"/"trainer_state.json"); (tmp_path/"checkpoint-8"/"optimizer.pt").unlink()
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    cut(tmp_path/"checkpoint-2"/"trainer_state.json")
    assert last_checkpoint(tmp_path) is None

def test_bad_rows_are_named():
    tok = AutoTokenizer.from_pretrained(toy("03_base_model/model"))
    row = dict(messages=[dict(role="user", content="Где?"), dict(role="assistant", content="Тут.")], mode="think", id="r7")
    with pytest.raises(UserError, match="r7"): turn_ids(tok, row["messages"], row["mode"], row["id"])
    with pytest.raises(UserError, match="no row fits"): dataset(tok, [row | dict(mode="direct")], 3)

def test_midtraining_recipe_is_the_papers():
    p = params("h100x32", "06_midtraining")
    assert (p["lr"], p["lr_min"], p["warmup"], p["beta2"], p["eps"], p["weight_decay"], p["clip"]) == (1e-5, 1e-6, 100, .95, 1e-8, 1e-6, 1.0)
    assert p["context"] == 32768 and p["batch"]*p["accumulate"]*32 == 128 and p["steps"] == 9750 and p["rank"] == 0
    assert abs(128*p["context"]*p["steps"]/40e9 - 1) < .03
    assert params("h100x32", "03_base_model")["base"] == "Qwen/Qwen3-32B" and params("h100x32", "08_reward_model")["max_length"] == 32768      # App. F

def test_packed_attention_is_the_plain_one_and_padded_batches_take_it():
    "`apart` on a packed row with padding, on a row of one conversation, and on a padded batch: logits of plain attention."
    m, _ = load_model(toy("03_base_model/base"), torch.float32)
    row, two = torch.randint(5, 300, (1, 70)), torch.randint(5, 300, (2, 9))
    packed = dict(input_ids=row, position_ids=torch.tensor([[*range(33), *range(20), *range(9), *[0]*8]]))
    padded = dict(input_ids=two, attention_mask=torch.tensor([[1]*9, [1]*6 + [0]*3]))
    for given, live in ((packed, slice(62)), (dict(input_ids=row), slice(None)), (padded, slice(6))):
        m.set_attn_implementation("eager"); plain = m(**given, use_cache=False).logits[:, live]
        assert torch.allclose(set_attention(m)(**given, use_cache=False).logits[:, live], plain, atol=1e-4)
    alone = m(input_ids=row[:, 33:53], use_cache=False).logits
    assert torch.allclose(m(**packed, use_cache=False).logits[:, 33:53], alone, atol=1e-4)

def test_the_older_model_outlives_a_failed_save(tmp_path, monkeypatch):
    m, tok = load_model(toy("03_base_model/base"))
    save_folder(m, tok, tmp_path/"model", [7])
    was = (tmp_path/"model"/"model.safetensors").read_bytes()
    with monkeypatch.context() as p:
        p.setattr(type(tok), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError): save_folder(m, tok, tmp_path/"model", [8])
    assert (tmp_path/"model"/"model.safetensors").read_bytes() == was and new_rows(tmp_path/"model") == [7]
    save_folder(m, tok, tmp_path/"model", [9])
    assert new_rows(tmp_path/"model") == [9] and not list(tmp_path.glob(".model*"))

def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    "A NaN that no logged step shows is found before the folder is written."
    from types import SimpleNamespace
    m, _ = load_model(toy("03_base_model/base"), torch.float32)
    p = trainable(m, [300], 4)
    def train(resume_from_checkpoint): next(q for q in p.parameters() if q.requires_grad).data[0, 0] = float("inf")
    trainer = SimpleNamespace(model=p, train=train, add_callback=lambda c: None, state=SimpleNamespace(log_history=[dict(loss=1.)]))
    with pytest.raises(UserError, match="not finite.*Lower lr"): fit(trainer, tmp_path)

def test_a_loss_that_is_no_number_stops_the_training(tmp_path):
    from tpro_nb.midtraining import train
    with pytest.raises(UserError, match="loss is (nan|inf) at step . *: lower lr|not finite.*Lower lr"):
        train(model_dir=str(toy("06_midtraining/model")), rows_path=str(toy("05_data/midtrain.jsonl")), out=str(tmp_path/"out"), work=str(tmp_path/"w"), steps=6, batch=1, accumulate=1,
              context=96, lr=1e30, lr_min=1e29, warmup=0, beta2=.95, eps=1e-8, weight_decay=0., clip=1e30, rank=0, save_every=100)
    assert not (tmp_path/"out").exists()

def test_a_race_whose_loss_is_no_number_stops():
    m, tok = load_model(toy("03_base_model/base"), torch.float32)
    next(m.parameters()).data[:] = float("nan")
    with pytest.raises(UserError, match="race: the loss is nan at step 1; lower lr"): run_steps(m, windows(tok, TOY_TEXT, 16), 2, 2, 1e-3, desc="race")

def test_a_language_without_held_out_text_is_named(tmp_path):
    from tpro_nb.midtraining import snippets
    write_jsonl(tmp_path/"heldout.jsonl", [dict(lang="ru", text="Мороз и солнце"), dict(lang="en", text=" ")])
    with pytest.raises(UserError, match="lacks texts in en; run stage 05_data again"): snippets(tmp_path/"heldout.jsonl", 5, 100)

def test_a_tokenizer_that_splits_the_think_tokens_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    check_think(AutoTokenizer.from_pretrained(toy("03_base_model/model")))
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match="<think> is 7 tokens"): check_think(PreTrainedTokenizerFast(tokenizer_object=t))
