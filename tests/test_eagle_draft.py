"The draft layer, its data, hot tokens, rollout and resume, on the toy world."
import json
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from tpro_nb.core import UserError, read_json, toy, write_json
from tpro_nb.eagle_draft import (BatchTarget, DraftKV, EagleDraft, chain_prompts, check_draft, collate, coverage, draft_config, draft_loss, draft_shapes,
    estimate, general_prompts, generate_batch, heldout, hot_tokens, load_data, make_data, random_draft, render, rollout_mask, stop_ids, target_matrices, train)

TARGET = str(toy("09_dpo/model"))

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    work = tmp_path_factory.mktemp("data")
    job = dict(target=TARGET, rows=chain_prompts(toy("05_data/prompts.jsonl"))["train"], work=str(work), max_new=10, batch=4, temperatures=[0.0, 0.8],
               token_budget=400, budget_mb=50, seed=0)
    return job, make_data(**job), work

def test_llama_layer_is_transformers_llama_layer():
    "Same weights, same numbers as transformers' Llama attention and MLP without the input norm."
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
    cfg = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1, vocab_size=50,
                      attn_implementation="eager")
    draft = EagleDraft(draft_config(cfg))
    layer = LlamaDecoderLayer(cfg, 0); layer.input_layernorm = torch.nn.Identity()
    layer.load_state_dict(draft.layers[0].state_dict())
    emb, feat, pos = torch.randn(1, 5, 32), torch.randn(1, 5, 32), torch.arange(5)[None]
    x = draft.fc(torch.cat([emb, feat], -1))
    mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    want = layer(x, attention_mask=mask, position_embeddings=LlamaRotaryEmbedding(cfg)(x, pos), position_ids=pos)
    want = want[0] if isinstance(want, tuple) else want
    assert torch.allclose(draft(emb, feat, pos), want, atol=1e-5)

def test_cache_pieces_equal_whole(tmp_path):
    draft = random_draft(tmp_path, TARGET)
    H, kv = draft.config["hidden_size"], DraftKV()
    e, f, pos = torch.randn(1, 7, H), torch.randn(1, 7, H), torch.arange(7)[None]
    whole = draft(e, f, pos)
    draft(e[:, :5], f[:, :5], pos[:, :5], kv); kv.crop(3)
    tail = draft(e[:, 3:], f[:, 3:], pos[:, 3:], kv)
    assert len(kv) == 7 and torch.allclose(tail, whole[:, 3:], atol=1e-5)

def test_save_load_and_wrong_names(tmp_path):
    draft = random_draft(tmp_path, TARGET, hot=[3, 5, 7])
    assert EagleDraft.load(tmp_path).hot_tokens.tolist() == [3, 5, 7]
    assert check_draft(tmp_path) == draft_shapes(draft.config)
    t = load_file(tmp_path/"model.safetensors"); t["model.fc.bias"] = t.pop("fc.bias")
    save_file(t, tmp_path/"model.safetensors")
    with pytest.raises(UserError, match="fc.bias: missing"): EagleDraft.load(tmp_path)
    (tmp_path/"model.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match="cannot read"): EagleDraft.load(tmp_path)

@pytest.mark.parametrize("hot", [[], [1, 1], [-1], [10**6]])
def test_bad_hot_tokens(hot):
    with pytest.raises(UserError, match="hot tokens"): EagleDraft(draft_config(TARGET), hot)

def test_prompts_are_disjoint_and_stable():
    g = general_prompts()
    assert g == general_prompts() and len(g["train"]) >= 300
    held, seen = {r["prompt"] for r in g["eval"] + g["dev"]}, {r["prompt"] for r in g["train"]}
    assert not held & seen and len({r["id"] for s in g.values() for r in s}) == sum(map(len, g.values()))
    assert len(g["eval"]) >= 24 and len(g["dev"]) >= 12 and len({r["domain"] for r in g["eval"]}) >= 6 and len({r["domain"] for r in g["dev"]}) >= 6
    assert not any("{" in r["prompt"] for s in g.values() for r in s)
    topic = lambda r: r["id"].rsplit("-", 1)[0]
    assert not {topic(r) for r in g["train"]} & {topic(r) for r in g["eval"] + g["dev"]}

def test_chain_prompts_split_by_prompt():
    c = chain_prompts(toy("05_data/prompts.jsonl"))
    sets = [{r["prompt"] for r in c[s]} for s in ("train", "eval", "dev")]
    assert all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert {r["mode"] for r in c["eval"]} == {"think", "direct"}

@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_padded_batch_equals_each_alone(arch):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    if arch == "qwen3": m = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    else: m = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    for row in generate_batch(m, prompts, [0.0]*3, {-1}, 6, 0):
        with torch.no_grad(): h = m.model(torch.tensor([row["ids"]])).last_hidden_state[0]
        assert torch.allclose(row["feats"].float(), h[:-1], atol=2e-2, rtol=1e-2)
        greedy = m.lm_head(h[row["start"] - 1:-1]).argmax(-1).tolist()
        assert greedy == row["ids"][row["start"]:]

def test_sampling_follows_softmax():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(1)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, initializer_range=.8)).eval()
    with torch.no_grad(): p = (m(torch.tensor([[1, 2]])).logits[0, -1]/.7).softmax(-1)
    drawn = torch.tensor([r["ids"][-1] for r in generate_batch(m, [[1, 2]]*4000, [.7]*4000, {-1}, 1, 3)])
    assert (torch.bincount(drawn, minlength=5)/4000 - p).abs().max() < .03

def test_data_resumes_and_respects_budget(data):
    job, report, work = data
    shards = sorted(work.glob("shard_*"))
    before = [s.read_bytes() for s in shards]
    ids = load_file(shards[-1])["ids"]
    shards[-1].unlink()                       # as if killed before the last shard
    assert make_data(**job)["new_tokens"] == report["new_tokens"]
    for s, b in zip(shards[:-1], before): assert s.read_bytes() == b
    assert torch.equal(load_file(shards[-1])["ids"], ids)
    with pytest.raises(UserError, match="budget_mb"): make_data(**(job | dict(budget_mb=-1)))

def test_collate_shift(data):
    r = load_data(data[2])[0]
    b, i = collate([r]), r["start"] - 2
    assert b["token"][0, i] == r["ids"][i + 1] and b["label"][0, i] == r["ids"][i + 2] == r["ids"][r["start"]]
    assert torch.equal(b["feat"][0, i], r["feats"][i]) and torch.equal(b["goal"][0, i], r["feats"][i + 1])
    assert b["mask"][0].sum() == len(r["ids"]) - r["start"]

def test_perfect_features_give_zero_feature_loss(data):
    "A stand-in that returns the goal has no feature loss and the least possible cross-entropy."
    rows, (emb, head) = load_data(data[2])[:3], target_matrices(TARGET)
    b = collate(rows)
    oracle = lambda e, f, *_: b["goal"].float()
    _, lf, lt = draft_loss(oracle, b, emb, head, 1., .1)
    _, lf2, lt2 = draft_loss(lambda e, f, *_: b["goal"].float() + torch.randn_like(b["goal"].float()), b, emb, head, 1., .1)
    assert lf == 0 and lf2 > 0 and lt2 > lt

def test_heldout_counts_a_draft_that_knows(data):
    "Rolling out a draft that returns the true features hits at every depth on greedy text."
    rows = [r for r in load_data(data[2]) if r["row"] % 2 == 0]          # temperature 0
    emb, head = target_matrices(TARGET)
    class Oracle:
        hot_tokens = torch.arange(head.shape[0]); call = 0
        def __call__(self, e, f, pos, kv, mask):
            self.call += 1
            out = torch.zeros(1, e.shape[1], e.shape[2]); d = self.call
            out[0, :len(self.row["feats"]) - d] = self.row["feats"][d:].float()[:e.shape[1]]
            return out
    for r in rows[:2]:
        o = Oracle(); o.row = r
        h = heldout(o, [r], emb, head, 3)
        assert h["top1"] > .9 and h["depth"][0] > .9 and h["depth"][1] > .9

def test_rollout_mask():
    m = rollout_mask(3, 2)
    assert m.tolist() == [[True, False, False, True, False, False], [True, True, False, False, True, False], [True, True, True, False, False, True]]

def test_hot_tokens_keep_bytes_and_specials():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer
    from collections import Counter
    tok = AutoTokenizer.from_pretrained(TARGET)
    hot = hot_tokens(tok, Counter({300: 50, 301: 40}), ["ru"], 300, {tok.eos_token_id})
    v = tok.get_vocab()
    assert len(hot) == len(set(hot)) == 300 and {300, 301, tok.eos_token_id, v["<think>"], v["</think>"]} <= set(hot)
    assert {v[c] for c in ByteLevel.alphabet()} <= set(hot)

def test_training_resumes_to_the_same_weights(data, tmp_path, monkeypatch):
    import tpro_nb.eagle_draft as ed
    cfg = dict(target=TARGET, data=str(data[2]), held=str(data[2]), hot=list(range(400)), epochs=6, lr=1e-3, batch=4, w_feat=1., w_token=.1, noise=.1, beta2=.95,
               clip=.5, warmup=2, depth=2, seed=0, save_s=0.)
    a, b = tmp_path/"a", tmp_path/"b"; a.mkdir(); b.mkdir()
    real, n, n_steps = ed.update, 0, 0
    def counted(*args):
        nonlocal n_steps
        n_steps += 1
        return real(*args)
    monkeypatch.setattr(ed, "update", counted)
    whole = train(**cfg, out=str(a/"draft"), work=str(a))
    def dies(*args):
        nonlocal n
        n += 1
        if n == 5: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(ed, "update", dies)
    with pytest.raises(KeyboardInterrupt): train(**cfg, out=str(b/"draft"), work=str(b))
    calls = []
    monkeypatch.setattr(ed, "update", lambda *args: (calls.append(1), real(*args))[1])
    again = train(**cfg, out=str(b/"draft"), work=str(b))
    assert len(calls) == n_steps - 4, "the four steps before the kill were done again"
    assert len(again["curve"]) == len(whole["curve"]) and whole["curve"][-1][2] < whole["curve"][0][2]
    x, y = load_file(a/"draft"/"model.safetensors"), load_file(b/"draft"/"model.safetensors")
    assert all(torch.allclose(x[k].float(), y[k].float(), atol=1e-2) for k in x)

def test_unrolled_loss_feeds_the_draft_its_own_feature(data):
    "At depth two the goal is one place further and the input is the guess of depth one."
    rows, (emb, head) = load_data(data[2])[:2], target_matrices(TARGET)
    b, seen = collate(rows), []
    def spy(e, f, pos, kv, mask):
        seen.append((e, f, pos, mask)); return f + 1
    draft_loss(spy, b, emb, head, 1., .1, unroll=2)
    (e1, f1, p1, m1), (e2, f2, p2, m2) = seen
    assert m1 is None and m2.shape == (b["token"].shape[1],)*1 + (2*b["token"].shape[1],)
    assert torch.equal(f2, f1 + 1) and torch.equal(p2, p1 + 1) and torch.equal(e2[:, 0], e1[:, 1])

def test_chunked_loss_equals_whole():
    from tpro_nb.eagle_draft import losses
    torch.manual_seed(0)
    goal, head = torch.randn(50, 16), torch.randn(30, 16)
    grads = []
    for chunk in (8192, 7):
        guess = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        lf, lt = losses(guess, goal, head, chunk); (lf + lt).backward()
        grads.append((lt.item(), guess.grad))
    assert abs(grads[0][0] - grads[1][0]) < 1e-4 and torch.allclose(grads[0][1], grads[1][1], atol=1e-6)
