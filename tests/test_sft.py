"""Chapter 07: the boundary between prompt and answer, the mask, sampling, and the paper's
table 14."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tpro_nb.core import CHAT_TEMPLATE, SPECIALS, THINK, UserError, toy, toy_rows
from tpro_nb.midtraining import prompt_ids, turn_ids
from tpro_nb.sft import (
    TRAINING_TEMPLATE,
    generate_answers,
    leaks,
    sft_dataset,
    show_mask,
    token_chooser,
    train_row,
    training_text,
    turns,
    write_answers,
)
from tpro_nb.training import load_model, sft_trainer, trainable, trainer_args

ROOT = Path(__file__).resolve().parent.parent
THINKING, DIRECT = toy_rows(2)
ASK = dict(role="user", content="А вдвое больше?")
DIALOGUES = [
    (THINKING["messages"], "think"),
    (DIRECT["messages"], "direct"),
    ([*THINKING["messages"], ASK, *DIRECT["messages"][1:]], "direct"),
    ([*DIRECT["messages"], ASK, *THINKING["messages"][1:]], "think"),
    ([dict(role="system", content="Отвечай кратко."), *DIRECT["messages"]], "direct"),
]


def toy_tokenizer():
    return AutoTokenizer.from_pretrained(toy("07_sft/model"))


def newline_tokenizer():
    """Bytes and one merge, ĊĊ, under GPT-2's splitting rule: the case in which whole-text
    tokenising moves the boundary."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    vocab = {token: number for number, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIALS)
    bpe.add_tokens(THINK)
    tok = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok


@pytest.fixture(params=["toy", "newline"])
def tok(request):
    return toy_tokenizer() if request.param == "toy" else newline_tokenizer()


@pytest.mark.parametrize("messages,mode", DIALOGUES)
def test_tokens_before_the_answer_are_the_inference_prompt(tok, messages, mode):
    row = dict(messages=messages, mode=mode)
    made = train_row(tok, row)
    before = made["labels"].count(-100)
    served = tok.apply_chat_template(
        messages[:-1],
        add_generation_prompt=True,
        enable_thinking=mode == "think",
        return_dict=False,
    )
    assert made["input_ids"][:before] == served == prompt_ids(tok, messages[:-1], mode == "think")
    assert tok.decode(made["input_ids"]) + "\n" == training_text(tok, messages)
    assert tok.decode(made["input_ids"][before:]) == messages[-1]["content"] + "<|im_end|>"
    assert -100 not in made["labels"][before:]
    for context in (before + 1, before + 3):
        cut = train_row(tok, row, context)
        assert cut["input_ids"][:before] == served
        assert cut["cut"]
        assert cut["labels"] == made["labels"][:context]


def test_whole_text_tokenising_would_move_the_boundary():
    "If this stops failing for the naive way, the two-piece way is no longer needed."
    tok, messages = newline_tokenizer(), DIRECT["messages"]
    served = prompt_ids(tok, messages[:1], False)
    whole = tok(training_text(tok, messages), add_special_tokens=False)["input_ids"]
    assert whole[: len(served)] != served


def test_generation_marks_agree_with_labels():
    tok = toy_tokenizer()
    for messages, _ in DIALOGUES:
        out = tok.apply_chat_template(
            messages,
            chat_template=TRAINING_TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens = zip(out["input_ids"], out["assistant_masks"])
        marked = tok.decode([token for token, mark in tokens if mark])
        assert marked == messages[-1]["content"] + "<|im_end|>"


def test_dialogues_become_one_row_a_turn():
    rows = turns(dict(messages=DIALOGUES[3][0], mode="think"))
    assert [(len(row["messages"]), row["mode"]) for row in rows] == [(2, "direct"), (4, "think")]
    text = training_text(toy_tokenizer(), rows[1]["messages"])
    assert "<think>" not in text.split("<|im_start|>assistant")[1]


def test_an_empty_think_block_is_a_direct_answer():
    """Qwen3 puts one before direct answers; as an earlier turn it must not teach think mode to
    think nothing."""
    empty, said = "<think>\n\n</think>\n\n4", "<think>\n2 + 3\n</think>\n\n5"
    talk = [
        dict(role="user", content="2 + 2?"),
        dict(role="assistant", content=empty),
        dict(role="user", content="2 + 3?"),
        dict(role="assistant", content=said),
    ]
    rows = turns(dict(messages=talk, mode="think"))
    assert [row["mode"] for row in rows] == ["direct", "think"]
    tok = toy_tokenizer()
    assert tok.decode(train_row(tok, rows[0])["input_ids"]).endswith("4<|im_end|>")
    for mode, answer, why in (
        ("think", empty, "no whole think block"),
        ("direct", said, "has a whole think block"),
        ("direct", "<think>\n2 + 3", "opens a think block"),
        ("thinking", said, "think or direct"),
    ):
        with pytest.raises(UserError, match=f"row 7: mode is '{mode}'.*{why}"):
            turn_ids(tok, [talk[0], dict(role="assistant", content=answer)], mode, "row 7")


def test_cut_rows_are_counted_and_empty_sets_refused():
    tok = toy_tokenizer()
    rows = toy_rows(8)
    longest = max(len(train_row(tok, row)["input_ids"]) for row in rows)
    _, none_cut = sft_dataset(tok, rows, longest)
    assert none_cut == 0
    _, some_cut = sft_dataset(tok, rows, longest - 1, most_cut=100)
    assert some_cut > 0
    with pytest.raises(UserError, match="cuts .* % of 8 rows, at most 1 %"):
        sft_dataset(tok, rows, longest - 1)
    with pytest.raises(UserError, match="no training rows"):
        sft_dataset(tok, [], 64)
    with pytest.raises(UserError, match="cuts every row"):
        sft_dataset(tok, toy_rows(8), 5)


def test_mask_viewer_marks_the_answer_only():
    tok = toy_tokenizer()
    direct = show_mask(tok, DIRECT, plain=True)
    assert direct.endswith("[<|im_end|>]")
    assert "[<think>]" not in direct
    assert "[<think>]" in show_mask(tok, THINKING, plain=True)
    assert show_mask(tok, DIRECT).startswith("<div")


def test_generate_batches_like_singles_and_samples_reproducibly():
    model, tok = load_model(toy("07_sft/model"), torch.float32)
    asked = [
        "Где?",
        "Сколько будет 12 + 30?",
        "Под каким стаканом шарик, если его дважды передвинули?",
    ]
    together = generate_answers(model, tok, asked, True, 8, batch_size=2)
    for question, (in_company,) in zip(asked, together, strict=True):
        ((alone,),) = generate_answers(model, tok, [question], True, 8)
        assert in_company["ids"] == alone["ids"]

    def draw(seed):
        return generate_answers(model, tok, asked, False, 8, temperature=1.0, n=3, seed=seed)

    drawn = draw(5)
    assert drawn == draw(5)
    assert drawn != draw(6)
    assert [len(answers) for answers in drawn] == [3] * 3
    for answers in drawn:
        for answer in answers:
            assert len(answer["ids"]) <= 8
            assert answer["finished"] or len(answer["ids"]) == 8


def test_an_answer_that_ends_leaves_the_others_as_they_were():
    model, tok = load_model(toy("07_sft/model"), torch.float32)
    asked = ["Где?", "Сколько будет 12 + 30?", "Под каким стаканом шарик, если его передвинули?"]
    prompts = [prompt_ids(tok, [dict(role="user", content=question)], True) for question in asked]
    copies, pad = [0, 1, 1, 2], tok.convert_tokens_to_ids("<|endoftext|>")
    greedy = token_chooser(0.0, 0, model.device)
    free = write_answers(model, prompts, copies, [pad], 12, greedy)
    assert free[1] == free[2]
    stopped = 0
    for end in {*free[0], *free[1], *free[3]}:
        cut = write_answers(model, prompts, copies, [end, pad], 12, greedy)
        for whole, part in zip(free, cut, strict=True):
            length = whole.index(end) + 1 if end in whole else 12
            assert part == whole[:length]
            stopped += length < 12
    assert stopped > 2


def test_sampled_tokens_follow_the_softmax():
    model, tok = load_model(toy("07_sft/model"), torch.float32)
    prompt = prompt_ids(tok, [dict(role="user", content="Где?")], False)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    stated = (logits / 0.3).softmax(-1).double().numpy()
    (answers,) = generate_answers(
        model, tok, ["Где?"], False, 1, temperature=0.3, n=4000, seed=1, batch_size=500
    )
    first = torch.tensor([answer["ids"][0] for answer in answers])
    seen = first.bincount(minlength=len(stated)).numpy()
    big = stated * 4000 >= 5

    def fold(counts):
        "The rare tokens as one."
        return [*counts[big], counts[~big].sum()]

    assert big.sum() > 3
    assert chisquare(fold(seen), fold(stated / stated.sum() * 4000)).pvalue > 0.01


def test_leaks():
    assert not leaks("<think>\nраз\n</think>\n\nОтвет: 1", True)
    assert not leaks("Ответ: 1", False)
    assert leaks("Ответ: 1", True)
    assert leaks("Ответ </think>", False)


def test_sft_recipe_is_table_14():
    params = yaml.safe_load((ROOT / "params" / "h100x32" / "07_sft.yaml").read_text())
    table = dict(epochs=2.0, steps=0, lr=1e-6, warmup=0.1, beta2=0.95, eps=1e-12, clip=2.0)
    assert {name: params[name] for name in table} == table
    assert params["context"] == 32768
    assert params["packing"]
    assert params["batch"] * params["accumulate"] * 32 == 32
    assert params["rank"] == 0


def packed_trainer(tmp_path, rows, steps=2, **kw):
    model, tok = load_model(toy("06_midtraining/model"), torch.float32)
    args = trainer_args(
        SFTConfig,
        tmp_path / "w",
        steps=steps,
        batch=1,
        lr=1e-3,
        packing=True,
        packing_strategy="bfd",
        max_length=300,
        **kw,
    )
    torch.manual_seed(0)
    return sft_trainer()(
        model=trainable(model, (), 4),
        args=args,
        train_dataset=sft_dataset(tok, rows, 300)[0],
        processing_class=tok,
    )


def test_labelled_head_gives_trls_own_loss_and_packed_rows_do_not_see_each_other(tmp_path):
    trainer = packed_trainer(tmp_path, toy_rows(8))
    batch = next(iter(trainer.get_train_dataloader()))
    first = batch["position_ids"][0] == 0  # of every conversation
    assert len(batch["input_ids"]) == 1
    assert first.sum() > 1
    model = trainer.model.eval()
    ours = trainer.compute_loss(model, dict(batch)).item()
    theirs = SFTTrainer.compute_loss(trainer, model, dict(batch)).item()
    assert ours == pytest.approx(theirs, rel=2e-3)
    by_seven = trainer.compute_loss(model, dict(batch), num_items_in_batch=7).item()
    assert by_seven != pytest.approx(ours)
    starts = [*first.nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    total = count = 0
    with torch.no_grad():
        for start, stop in pairwise(starts):
            labels = batch["labels"][0, start + 1 : stop]
            learned = labels != -100
            logits = model(input_ids=batch["input_ids"][:, start:stop]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(
                logits[learned], labels[learned], reduction="sum"
            ).item()
            count += int(learned.sum())
    assert ours == pytest.approx(total / count, rel=2e-3)
