"Chapter 07: the boundary between prompt and answer, the mask, sampling, and the paper's table 14."
from pathlib import Path
import pytest, torch, yaml
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from tpro_nb.base_model import load_model
from tpro_nb.core import CHAT_TEMPLATE, SPECIALS, THINK, UserError, toy, toy_rows
from tpro_nb.midtraining import prompt_ids, turn_ids
from tpro_nb.sft import TRAINING_TEMPLATE, dataset, generate, leaks, show_mask, train_row, training_text, turns

ROOT = Path(__file__).resolve().parent.parent
THINKING, DIRECT = toy_rows(2)
ASK = dict(role="user", content="А вдвое больше?")
DIALOGUES = [(THINKING["messages"], "think"), (DIRECT["messages"], "direct"), ([*THINKING["messages"], ASK, *DIRECT["messages"][1:]], "direct"),
             ([*DIRECT["messages"], ASK, *THINKING["messages"][1:]], "think"), ([dict(role="system", content="Отвечай кратко."), *DIRECT["messages"]], "direct")]

def newline_tokenizer():
    "Bytes and one merge, ĊĊ, under GPT-2's splitting rule: the case in which whole-text tokenising moves the boundary."
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "ĊĊ"])}, merges=[("Ċ", "Ċ")]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(SPECIALS); t.add_tokens(THINK)
    tok = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tok.chat_template = CHAT_TEMPLATE
    return tok

@pytest.fixture(params=["toy", "newline"])
def tok(request): return AutoTokenizer.from_pretrained(toy("07_sft/model")) if request.param == "toy" else newline_tokenizer()

@pytest.mark.parametrize("messages,mode", DIALOGUES)
def test_tokens_before_the_answer_are_the_inference_prompt(tok, messages, mode):
    got = train_row(tok, dict(messages=messages, mode=mode))
    n = got["labels"].count(-100)
    served = tok.apply_chat_template(messages[:-1], add_generation_prompt=True, enable_thinking=mode == "think", return_dict=False)
    assert got["input_ids"][:n] == served == prompt_ids(tok, messages[:-1], mode == "think")
    assert tok.decode(got["input_ids"]) + "\n" == training_text(tok, messages)
    assert tok.decode(got["input_ids"][n:]) == messages[-1]["content"] + "<|im_end|>" and -100 not in got["labels"][n:]
    for context in (n + 1, n + 3):
        cut = train_row(tok, dict(messages=messages, mode=mode), context)
        assert cut["input_ids"][:n] == served and cut["cut"] and cut["labels"] == got["labels"][:context]

def test_whole_text_tokenising_would_move_the_boundary():
    "If this stops failing for the naive way, the two-piece way is no longer needed."
    tok, messages = newline_tokenizer(), DIRECT["messages"]
    served = prompt_ids(tok, messages[:1], False)
    assert tok(training_text(tok, messages), add_special_tokens=False)["input_ids"][:len(served)] != served

def test_generation_marks_agree_with_labels():
    tok = AutoTokenizer.from_pretrained(toy("07_sft/model"))
    for messages, mode in DIALOGUES:
        out = tok.apply_chat_template(messages, chat_template=TRAINING_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True)
        marked = tok.decode([i for i, m in zip(out["input_ids"], out["assistant_masks"]) if m])
        assert marked == messages[-1]["content"] + "<|im_end|>"

def test_dialogues_become_one_row_a_turn():
    rows = turns(dict(messages=DIALOGUES[3][0], mode="think"))
    assert [(len(r["messages"]), r["mode"]) for r in rows] == [(2, "direct"), (4, "think")]
    assert "<think>" not in train_text(rows[1]).split("<|im_start|>assistant")[1]

def test_an_empty_think_block_is_a_direct_answer():
    "Qwen3 puts one before direct answers; as an earlier turn it must not teach think mode to think nothing."
    empty, said = "<think>\n\n</think>\n\n4", "<think>\n2 + 3\n</think>\n\n5"
    talk = [m for q, a in (("2 + 2?", empty), ("2 + 3?", said)) for m in (dict(role="user", content=q), dict(role="assistant", content=a))]
    rows = turns(dict(messages=talk, mode="think"))
    assert [r["mode"] for r in rows] == ["direct", "think"]
    tok = AutoTokenizer.from_pretrained(toy("07_sft/model"))
    assert tok.decode(train_row(tok, rows[0])["input_ids"]).endswith("4<|im_end|>")
    for mode, answer, why in (("think", empty, "no whole think block"), ("direct", said, "has a whole think block"), ("direct", "<think>\n2 + 3", "opens a think block"), ("thinking", said, "think or direct")):
        with pytest.raises(UserError, match=f"row 7: mode is '{mode}'.*{why}"): turn_ids(tok, [talk[0], dict(role="assistant", content=answer)], mode, "row 7")

def train_text(row): return training_text(AutoTokenizer.from_pretrained(toy("07_sft/model")), row["messages"])

def test_cut_rows_are_counted_and_empty_sets_refused():
    tok = AutoTokenizer.from_pretrained(toy("07_sft/model"))
    rows = toy_rows(8)
    longest = max(len(train_row(tok, r)["input_ids"]) for r in rows)
    assert dataset(tok, rows, longest)[1] == 0 and dataset(tok, rows, longest - 1, most_cut=100)[1] > 0
    with pytest.raises(UserError, match="cuts .* % of 8 rows, at most 1 %"): dataset(tok, rows, longest - 1)
    with pytest.raises(UserError, match="no training rows"): dataset(tok, [], 64)
    with pytest.raises(UserError, match="cuts every row"): dataset(tok, toy_rows(8), 5)

def test_mask_viewer_marks_the_answer_only():
    tok = AutoTokenizer.from_pretrained(toy("07_sft/model"))
    assert show_mask(tok, DIRECT, plain=True).endswith("[<|im_end|>]") and "[<think>]" in show_mask(tok, THINKING, plain=True)
    assert "[<think>]" not in show_mask(tok, DIRECT, plain=True) and show_mask(tok, DIRECT).startswith("<div")

def test_generate_batches_like_singles_and_samples_reproducibly():
    model, tok = load_model(toy("07_sft/model"), torch.float32)
    asked = ["Где?", "Сколько будет 12 + 30?", "Под каким стаканом шарик, если его дважды передвинули?"]
    many = generate(model, tok, asked, True, 8, batch_size=2)
    assert [r[0]["ids"] for r in many] == [generate(model, tok, [q], True, 8)[0][0]["ids"] for q in asked]
    draws = generate(model, tok, asked, False, 8, temperature=1., n=3, seed=5)
    assert draws == generate(model, tok, asked, False, 8, temperature=1., n=3, seed=5) != generate(model, tok, asked, False, 8, temperature=1., n=3, seed=6)
    assert [len(r) for r in draws] == [3]*3 and all(len(a["ids"]) <= 8 and (a["finished"] or len(a["ids"]) == 8) for r in draws for a in r)

def test_sampled_tokens_follow_the_softmax():
    from scipy.stats import chisquare
    from tpro_nb.midtraining import prompt_ids, turn_ids
    model, tok = load_model(toy("07_sft/model"), torch.float32)
    with torch.no_grad(): p = (model(torch.tensor([prompt_ids(tok, [dict(role="user", content="Где?")], False)])).logits[0, -1]/.3).softmax(-1).double().numpy()
    seen = torch.tensor([a["ids"][0] for a in generate(model, tok, ["Где?"], False, 1, temperature=.3, n=4000, seed=1, batch_size=500)[0]]).bincount(minlength=len(p)).numpy()
    big = p*4000 >= 5
    fold = lambda x: [*x[big], x[~big].sum()]
    assert big.sum() > 3 and chisquare(fold(seen), fold(p/p.sum()*4000)).pvalue > .01

def test_leaks():
    assert not leaks("<think>\nраз\n</think>\n\nОтвет: 1", True) and not leaks("Ответ: 1", False)
    assert leaks("Ответ: 1", True) and leaks("Ответ </think>", False)

def test_sft_recipe_is_table_14():
    p = yaml.safe_load((ROOT/"params"/"h100x32"/"07_sft.yaml").read_text())
    assert (p["epochs"], p["steps"], p["lr"], p["warmup"], p["beta2"], p["eps"], p["clip"]) == (2.0, 0, 1e-6, .1, .95, 1e-12, 2.0)
    assert p["context"] == 32768 and p["packing"] and p["batch"]*p["accumulate"]*32 == 32 and p["rank"] == 0

def packed_trainer(tmp_path, rows, steps=2, **kw):
    from trl import SFTConfig
    from tpro_nb.base_model import sft_trainer, trainable, trainer_args
    model, tok = load_model(toy("06_midtraining/model"), torch.float32)
    args = trainer_args(SFTConfig, tmp_path/"w", steps=steps, batch=1, lr=1e-3, packing=True, packing_strategy="bfd", max_length=300, **kw)
    torch.manual_seed(0)
    return sft_trainer()(model=trainable(model, (), 4), args=args, train_dataset=dataset(tok, rows, 300)[0], processing_class=tok)

def test_labelled_head_gives_trls_own_loss_and_packed_rows_do_not_see_each_other(tmp_path):
    from trl import SFTTrainer
    trainer = packed_trainer(tmp_path, toy_rows(8))
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1 and (batch["position_ids"] == 0).sum() > 1
    model = trainer.model.eval()
    ours = trainer.compute_loss(model, dict(batch)).item()
    theirs = SFTTrainer.compute_loss(trainer, model, dict(batch)).item()
    assert ours == pytest.approx(theirs, rel=2e-3) and trainer.compute_loss(model, dict(batch), num_items_in_batch=7).item() != pytest.approx(ours)
    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    total = count = 0
    with torch.no_grad():
        for a, b in zip(starts, starts[1:]):
            y = batch["labels"][0, a + 1:b]; keep = y != -100
            logits = model(input_ids=batch["input_ids"][:, a:b]).logits[0, :-1][keep]
            total += torch.nn.functional.cross_entropy(logits, y[keep], reduction="sum").item(); count += int(keep.sum())
    assert ours == pytest.approx(total/count, rel=2e-3)
