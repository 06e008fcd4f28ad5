"09b: our trainers against TRL's are compared on the same work."

import pytest
import torch

from tpro_nb import core, rounds
from tpro_nb.training import load_model


def conversations(n=40):
    rows = []
    for number in range(n):
        question = dict(role="user", content=f"Сколько будет {number} + 3?")
        answer = dict(role="assistant", content=f"{number + 3}. Это ответ.")
        row = dict(id=str(number), mode="direct", category="Math", lang="ru")
        rows.append(row | dict(messages=[question, answer]))
    return rows


def preferences(tok, rows):
    pairs = []
    for row in rows:
        question, answer = row["messages"]
        pair = dict(
            prompt=question["content"],
            mode="direct",
            chosen=answer["content"],
            rejected="Нет.",
            chosen_ids=tok.encode(answer["content"] + "<|im_end|>"),
            rejected_ids=tok.encode("Нет.<|im_end|>"),
        )
        pairs.append(pair)
    return pairs


@pytest.mark.parametrize("stage", ["midtraining", "sft", "dpo"])
def test_ours_and_trl_read_the_same_tokens_and_lose_the_same(stage, tmp_path):
    core.toy_model(tmp_path / "m")
    settings = rounds.SpeedSettings(steps=2, batch=2, max_length=128, rank=4, seed=0)
    tokens, losses = {}, {}
    for ours in (True, False):
        torch.manual_seed(0)
        model, tok = load_model(str(tmp_path / "m"))
        rows = conversations()
        if stage == "dpo":
            rows = preferences(tok, rows)
        make = rounds.SPEED_RUNS[stage]
        trainer = make(ours, model, tok, rows, tmp_path / str(ours), settings)
        ids = next(iter(trainer.get_train_dataloader()))["input_ids"]
        tokens[ours] = ids[ids != tok.pad_token_id].tolist()
        losses[ours] = trainer.train().training_loss
    assert tokens[True] == tokens[False]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
