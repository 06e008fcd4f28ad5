"09b: our trainers against TRL's are compared on the same work."
import pytest, torch
from tpro_nb import core, rounds
from tpro_nb.base_model import load_model

ROWS = [dict(id=str(i), mode="direct", category="Math", lang="ru", messages=[dict(role="user", content=f"Сколько будет {i} + 3?"), dict(role="assistant", content=f"{i + 3}. Это ответ.")]) for i in range(40)]

@pytest.mark.parametrize("stage", ["midtraining", "sft", "dpo"])
def test_ours_and_trl_read_the_same_tokens_and_lose_the_same(stage, tmp_path):
    core.toy_model(tmp_path/"m")
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model, tok = load_model(str(tmp_path/"m"))
        rows = ROWS if stage != "dpo" else [dict(prompt=r["messages"][0]["content"], mode="direct", chosen=r["messages"][1]["content"], rejected="Нет.",
                                                chosen_ids=tok.encode(r["messages"][1]["content"] + "<|im_end|>"), rejected_ids=tok.encode("Нет.<|im_end|>")) for r in ROWS]
        trainer = dict(midtraining=rounds.midtraining_run, sft=rounds.sft_run, dpo=rounds.dpo_run)[stage](ours, model, tok, rows, tmp_path/f"{ours}", 2, 2, 128, 4, 0)
        batch = next(iter(trainer.get_train_dataloader()))
        found.append((batch["input_ids"][batch["input_ids"] != tok.pad_token_id].tolist(), trainer.train().training_loss))
    (a, x), (b, y) = found
    assert a == b and x == pytest.approx(y, rel=1e-5)
