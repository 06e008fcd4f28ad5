"""DPO: the loss, modes, best against worst, the paper's table in the parameter file, and training
that improves its pairs."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoTokenizer

from tpro_nb import core
from tpro_nb import dpo as D
from tpro_nb.midtraining import prompt_ids

SETTINGS = D.DPOSettings(
    epochs=2.0,
    batch=4,
    accumulate=1,
    max_length=128,
    lr=3e-3,
    warmup=0.0,
    beta=0.5,
    beta2=0.95,
    eps=1e-12,
    weight_decay=0.01,
    clip=2.0,
    rank=0,
    dev_share=0.2,
    eval_every=1,
    patience=0,
)


def loss(chosen, rejected, **how):
    "Of a policy whose reference has −3 and −7."
    now = torch.tensor(chosen), torch.tensor(rejected)
    return D.dpo_loss(*now, torch.tensor(-3.0), torch.tensor(-7.0), **how).item()


def test_loss():
    assert loss(-3.0, -7.0) == pytest.approx(math.log(2))
    assert loss(-2.0, -7.0, beta=2.0) == pytest.approx(math.log(1 + math.exp(-2)))


def test_modes_shares():
    deck = [dict(id=number, answer="1" if number < 100 else None) for number in range(1000)]
    cast = D.assign_modes(deck, 0.6, 4 / 90)
    assert [row["id"] for row in cast] == list(range(1000))
    assert sum(row["crossed"] for row in cast[:100]) == 60
    assert sum(row["crossed"] for row in cast[100:]) == 40
    for row in cast:
        reasoning = row["answer"] is not None
        assert (row["mode"] == "think") == (reasoning != row["crossed"])


def test_best_worst():
    rows = []
    for prompt, answers in enumerate(
        [
            [("a", 1.0), ("b", 3.0), ("c", -2.0)],
            [("a", 1.0), ("a ", 2.0)],
            [("a", 1.0), ("b", 1.0)],
        ]
    ):
        for number, (text, reward) in enumerate(answers):
            row = dict(id=prompt, mode="think", prompt="?", text=text, ids=[number], reward=reward)
            rows.append(row)
    (pair,) = D.best_worst(rows)  # equal texts and equal rewards give no pair
    assert pair["id"] == 0
    assert (pair["chosen"], pair["rejected"]) == ("b", "c")
    assert (pair["chosen_ids"], pair["rejected_ids"]) == ([1], [2])
    assert pair["margin"] == 5.0
    assert D.best_worst(rows, min_margin=5.0) == []


def test_shares_outside_zero_and_one_are_refused():
    with pytest.raises(core.UserError, match="cross_to_think: a share"):
        D.assign_modes([dict(id=0, answer=None)], 0.5, 4.4)


def test_paper_table_15():
    path = ROOT / "params" / "h100x32" / "09_dpo.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    table = dict(
        beta=0.5,
        lr=1e-7,
        weight_decay=0.01,
        warmup=0.05,
        clip=2.0,
        beta2=0.95,
        eps=1e-12,
        max_length=32768,
        epochs=1,
        n=16,
    )
    assert {name: params[name] for name in table} == table
    assert params["batch"] * params["accumulate"] * 32 == 128
    assert params["cross_to_direct"] == pytest.approx(6 / 10)
    assert params["cross_to_think"] == pytest.approx(4 / 90, abs=1e-3)


def test_config_carries_the_table(tmp_path):
    settings = replace(
        SETTINGS,
        epochs=1.0,
        batch=1,
        accumulate=4,
        lr=1e-7,
        warmup=0.05,
        max_length=32768,
        eval_every=10,
    )
    args = D.dpo_args(tmp_path, settings)
    assert args.loss_type == ["sigmoid"]
    assert args.beta == 0.5
    assert args.learning_rate == 1e-7
    assert args.max_length == 32768
    assert args.max_grad_norm == 2.0
    assert args.adam_epsilon == 1e-12
    assert args.get_warmup_steps(1000) == 50
    schedule = args.lr_scheduler_type
    assert str(getattr(schedule, "value", schedule)) == "cosine"
    assert args.load_best_model_at_end


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft") / "model"
    core.toy_model(path, hidden=32, layers=2)
    return path


def toy_pairs(tok, n=10):
    rejected = "Мороз и солнце"
    pairs = []
    for number in range(n):
        chosen = f"Ответ: {number + 3}"
        pair = dict(
            id=f"q{number}",
            mode=("think", "direct")[number % 2],
            prompt=f"Сколько будет {number} + 3?",
            chosen=chosen,
            rejected=rejected,
            chosen_ids=tok.encode(chosen + "<|im_end|>", add_special_tokens=False),
            rejected_ids=tok.encode(rejected + "<|im_end|>", add_special_tokens=False),
        )
        pairs.append(pair)
    return pairs


def inference_prompt(tok, pair):
    return prompt_ids(tok, [dict(role="user", content=pair["prompt"])], pair["mode"] == "think")


def train(sft, folder, pairs, settings):
    core.write_jsonl(folder / "pairs.jsonl", pairs)
    return D.train_dpo(
        model_dir=str(sft),
        pairs_path=str(folder / "pairs.jsonl"),
        out=str(folder / "model"),
        work=str(folder / "work"),
        **asdict(settings),
    )


@torch.no_grad()
def margin(folder, pairs):
    "Log-probabilities of the chosen answers minus those of the rejected, summed over the pairs."
    model, tok = D.load_model(folder, torch.float32)

    def logp(prompt, answer):
        ids = torch.tensor([prompt + answer])
        rows = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        return rows.gather(-1, ids[0, len(prompt) :, None]).sum()

    total = 0
    for pair in pairs:
        prompt = inference_prompt(tok, pair)
        total += logp(prompt, pair["chosen_ids"]) - logp(prompt, pair["rejected_ids"])
    return total


@pytest.mark.parametrize("rank", [0, 4])
def test_training_moves_the_pairs_apart(sft, tmp_path, rank):
    pairs = toy_pairs(AutoTokenizer.from_pretrained(sft))
    core.write_json(sft / "new_rows.json", [5, 6])
    result = train(sft, tmp_path, pairs, replace(SETTINGS, rank=rank))
    assert result["log"][0]["loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert result["held"] == 2
    assert result["pairs"] == 8
    looks = {look["step"]: look["eval_loss"] for look in result["evals"]}
    assert min(looks.values()) == pytest.approx(looks[result["best_step"]])
    # in the saved folder, not only in the trainer's log
    assert margin(tmp_path / "model", pairs) > margin(sft, pairs)
    assert core.read_json(tmp_path / "model" / "new_rows.json") == [5, 6]
    assert "lora" not in str(list((tmp_path / "model").iterdir()))


def test_a_tied_head_is_not_reported_as_missing(sft, tmp_path, monkeypatch):
    "The best checkpoint is read again at the end, and holds a tied head as the embedding alone."
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *_: said.append(text))
    result = train(sft, tmp_path, toy_pairs(AutoTokenizer.from_pretrained(sft)), SETTINGS)
    assert core.read_json(sft / "config.json")["tie_word_embeddings"]
    assert result["held"] == 2
    assert not [text for text in said if "missing keys" in text]


def test_dataset_keeps_sampled_tokens_and_drops_long_ones(sft):
    _, tok = D.load_model(sft)
    pairs = toy_pairs(tok, 4)
    data = D.preference_dataset(tok, pairs, 128)
    assert [row["chosen_ids"] for row in data] == [pair["chosen_ids"] for pair in pairs]
    direct = pairs[1]
    assert direct["mode"] == "direct"
    assert data[1]["prompt_ids"] == inference_prompt(tok, direct)
    assert tok.decode(data[1]["prompt_ids"]).endswith("</think>\n\n")
    pairs[0]["chosen_ids"] = pairs[0]["chosen_ids"] * 99
    assert len(D.preference_dataset(tok, pairs, 128)) == 3
    with pytest.raises(core.UserError, match="max_length"):
        D.preference_dataset(tok, pairs[:1], 128)


def graded(marks):
    "Answers in both modes, 1 for a right one."
    rows = []
    for problem, right in enumerate(marks):
        for mode in ("think", "direct"):
            rows.append(dict(id=problem, mode=mode, verdict="correct" if right else "wrong"))
    return rows


def test_paired_gain():
    gain = D.paired_gain(graded([0, 0, 1, 1]), graded([1, 1, 1, 1]), mode="think")
    assert (gain.before, gain.after, gain.gain, gain.n) == (50, 100, 50, 4)
    assert gain.lo <= 50 <= gain.hi
    with pytest.raises(ValueError):
        D.paired_gain(graded([1]), graded([1, 0]))


def test_best_and_worst_pairs_with_equal_sides_stop_training(sft, tmp_path):
    with pytest.raises(core.UserError, match="equal sides"):
        train(sft, tmp_path, [dict(id="q", chosen="да", rejected="да")], SETTINGS)
