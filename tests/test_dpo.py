"DPO: the loss against TRL's, modes, best against worst, the paper's table in the parameter file, and training that improves its pairs."
import math
import pytest, torch, yaml
from tpro_nb import core, dpo as D, pipeline as P
from tpro_nb.midtraining import prompt_ids
from conftest import ROOT

def test_loss():
    t = torch.tensor
    assert D.dpo_loss(t(-3.), t(-7.), t(-3.), t(-7.)).item() == pytest.approx(math.log(2))
    assert D.dpo_loss(t(-2.), t(-7.), t(-3.), t(-7.), beta=2.).item() == pytest.approx(math.log(1 + math.exp(-2)))

def test_modes_shares():
    deck = [dict(id=i, answer="1" if i < 100 else None) for i in range(1000)]
    cast = D.assign_modes(deck, .6, 4/90)
    assert [r["id"] for r in cast] == list(range(1000))
    assert sum(r["crossed"] for r in cast[:100]) == 60 and sum(r["crossed"] for r in cast[100:]) == 40
    assert all((r["mode"] == "think") == ((r["answer"] is not None) != r["crossed"]) for r in cast)

def test_best_worst():
    rows = [dict(id=i, mode="think", prompt="?", text=t, ids=[k], reward=r) for i, answers in enumerate([[("a", 1.), ("b", 3.), ("c", -2.)], [("a", 1.), ("a ", 2.)], [("a", 1.), ("b", 1.)]])
            for k, (t, r) in enumerate(answers)]
    (p,) = D.best_worst(rows)                          # equal texts and equal rewards give no pair
    assert (p["id"], p["chosen"], p["rejected"], p["chosen_ids"], p["rejected_ids"], p["margin"]) == (0, "b", "c", [1], [2], 5.)
    assert D.best_worst(rows, min_margin=5.) == []

def test_shares_outside_zero_and_one_are_refused():
    with pytest.raises(core.UserError, match="cross_to_think: a share"): D.assign_modes([dict(id=0, answer=None)], .5, 4.4)

def test_paper_table_15():
    y = yaml.safe_load((ROOT/"params"/"h100x32"/"09_dpo.yaml").read_text(encoding="utf-8"))
    assert (y["beta"], y["lr"], y["weight_decay"], y["warmup"], y["clip"], y["beta2"], y["eps"]) == (.5, 1e-7, .01, .05, 2., .95, 1e-12)
    assert y["max_length"] == 32768 and y["epochs"] == 1 and y["n"] == 16 and y["batch"]*y["accumulate"]*32 == 128
    assert y["cross_to_direct"] == pytest.approx(6/10) and y["cross_to_think"] == pytest.approx(4/90, abs=1e-3)

def test_config_carries_the_table(tmp_path):
    a = D.dpo_args(tmp_path, epochs=1., batch=1, accumulate=4, lr=1e-7, warmup=.05, beta=.5, betas=(.9, .95), eps=1e-12, weight_decay=.01, clip=2., max_length=32768, eval_every=10)
    assert a.loss_type == ["sigmoid"] and a.beta == .5 and a.learning_rate == 1e-7 and a.max_length == 32768 and a.max_grad_norm == 2. and a.adam_epsilon == 1e-12
    assert a.get_warmup_steps(1000) == 50 and str(getattr(a.lr_scheduler_type, "value", a.lr_scheduler_type)) == "cosine" and a.load_best_model_at_end

@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")/"model"
    core.toy_model(path, hidden=32, layers=2)
    return path

def pairs(tok, n=10):
    enc = lambda s: tok.encode(s + "<|im_end|>", add_special_tokens=False)
    return [dict(id=f"q{i}", mode=("think", "direct")[i % 2], prompt=f"Сколько будет {i} + 3?", chosen=f"Ответ: {i + 3}", rejected="Мороз и солнце", chosen_ids=enc(f"Ответ: {i + 3}"),
                 rejected_ids=enc("Мороз и солнце")) for i in range(n)]

CONFIG = dict(epochs=2., batch=4, accumulate=1, max_length=128, lr=3e-3, warmup=0., beta=.5, beta2=.95, eps=1e-12, weight_decay=.01, clip=2., dev_share=.2, eval_every=1, patience=0)

def logp(path, p):
    model, tok = D.load_model(path, torch.float32)
    out = []
    for side in ("chosen_ids", "rejected_ids"):
        head = prompt_ids(tok, [dict(role="user", content=p["prompt"])], p["mode"] == "think")
        x = torch.tensor([head + p[side]])
        with torch.no_grad(): lp = model(x).logits.log_softmax(-1)[0, len(head) - 1:-1].gather(-1, x[0, len(head):, None]).sum()
        out.append(lp)
    return out

@pytest.mark.parametrize("rank", [0, 4])
def test_training_moves_the_pairs_apart(sft, tmp_path, rank):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(sft)
    ps = pairs(tok)
    core.write_jsonl(tmp_path/"pairs.jsonl", ps); core.write_json(sft/"new_rows.json", [5, 6])
    got = D.train(str(sft), str(tmp_path/"pairs.jsonl"), str(tmp_path/"model"), str(tmp_path/"work"), rank=rank, **CONFIG)
    assert got["log"][0]["loss"] == pytest.approx(math.log(2), abs=2e-3) and got["held"] == 2 and got["pairs"] == 8
    assert min(e["eval_loss"] for e in got["evals"]) == pytest.approx(next(e["eval_loss"] for e in got["evals"] if e["step"] == got["best_step"]))
    before, after = (sum((lambda w, l: w - l)(*logp(f, p)) for p in ps) for f in (sft, tmp_path/"model"))
    assert after > before                                            # in the saved folder, not only in the trainer's log
    assert core.read_json(tmp_path/"model"/"new_rows.json") == [5, 6]
    assert "lora" not in str(list((tmp_path/"model").iterdir()))

def test_dataset_keeps_sampled_tokens_and_drops_long_ones(sft):
    _, tok = D.load_model(sft)
    ps = pairs(tok, 4)
    d = D.dataset(tok, ps, 128)
    assert [r["chosen_ids"] for r in d] == [p["chosen_ids"] for p in ps]
    assert d[1]["prompt_ids"] == prompt_ids(tok, [dict(role="user", content=ps[1]["prompt"])], False) and tok.decode(d[1]["prompt_ids"]).endswith("</think>\n\n")
    ps[0]["chosen_ids"] = ps[0]["chosen_ids"]*99
    assert len(D.dataset(tok, ps, 128)) == 3
    with pytest.raises(core.UserError, match="max_length"): D.dataset(tok, ps[:1], 128)

def test_paired_gain():
    rows = lambda rights: [dict(id=i, mode=m, verdict="correct" if r else "wrong") for i, r in enumerate(rights) for m in ("think", "direct")]
    g = D.paired_gain(rows([0, 0, 1, 1]), rows([1, 1, 1, 1]), mode="think")
    assert (g["before"], g["after"], g["gain"], g["n"]) == (50, 100, 50, 4) and g["lo"] <= 50 <= g["hi"]
    with pytest.raises(ValueError): D.paired_gain(rows([1]), rows([1, 0]))

def test_best_and_worst_pairs_with_equal_sides_stop_training(sft, tmp_path):
    core.write_jsonl(tmp_path/"p.jsonl", [dict(id="q", chosen="да", rejected="да")])
    with pytest.raises(core.UserError, match="equal sides"): D.train(str(sft), str(tmp_path/"p.jsonl"), str(tmp_path/"m"), str(tmp_path/"w"), rank=0, **CONFIG)
