"The draft layer, its data, hot tokens, rollout and resume, on the toy world."
import json, os
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from tpro_nb.core import UserError, launch, read_json, toy, write_json
from tpro_nb.eagle_draft import (BatchTarget, DraftKV, Eagle3Draft, EagleDraft, aux_layers, chain_prompts, check_draft, collate, coverage, draft_config, draft_loss, draft_shapes,
    estimate, general_prompts, generate_batch, heldout, hot_tokens, load_data, make_data, new_draft, plan_answers, random_draft, render, rollout_mask, save_shard, stop_ids, target_matrices, target_model, train)

TARGET = str(toy("09_dpo/model"))

class Stub:
    "A stand-in for EAGLE-1: `fn` in the layer's place."
    feature_loss = True
    def __init__(self, fn): self.fn = fn
    def __call__(self, *a): return self.fn(*a)
    def begin(self, feat): return feat
    logits = EagleDraft.logits

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

def test_plan_takes_every_prompt_once_before_any_twice_and_pads_little():
    size = [9, 2, 5, 7, 1]
    plan = plan_answers(size, [0.0, 0.8], 7, 2)
    jobs = [j for shard in plan for j in shard]
    assert sorted(jobs) == [(0, 0.0), (0, 0.8), (1, 0.0), (1, 0.8), (2, 0.0), (3, 0.8), (4, 0.0)] and [len(s) for s in plan] == [2, 2, 2, 1]
    assert [size[i] for i, _ in jobs] == sorted(size[i] for i, _ in jobs)

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
    oracle = Stub(lambda e, f, *_: b["goal"].float())
    _, lf, lt = draft_loss(oracle, b, emb, head, 1., .1)
    _, lf2, lt2 = draft_loss(Stub(lambda e, f, *_: b["goal"].float() + torch.randn_like(b["goal"].float())), b, emb, head, 1., .1)
    assert lf == 0 and lf2 > 0 and lt2 > lt

def test_heldout_counts_a_draft_that_knows(data):
    "Rolling out a draft that returns the true features hits at every depth on greedy text."
    size = [len(render(AutoTokenizer.from_pretrained(TARGET), r["prompt"], r["mode"])) for r in data[0]["rows"]]
    temps = [t for shard in plan_answers(size, [0.0, 0.8], 40, 4) for _, t in shard]
    rows = [r for r, t in zip(load_data(data[2]), temps, strict=True) if t == 0]
    emb, head = target_matrices(TARGET)
    class Oracle(Stub):
        def __init__(self): pass
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
    draft_loss(Stub(spy), b, emb, head, 1., .1, unroll=2)
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
        lf, lt = losses(Stub(None), guess, goal, head, chunk); (lf + lt).backward()
        grads.append((lt.item(), guess.grad))
    assert abs(grads[0][0] - grads[1][0]) < 1e-4 and torch.allclose(grads[0][1], grads[1][1], atol=1e-6)

@pytest.fixture(scope="module")
def data3(data, tmp_path_factory):
    "The same text with the three layers EAGLE-3 reads, and without any feature."
    job, _, _ = data
    d = tmp_path_factory.mktemp("data3")
    return {n: make_data(**(job | dict(work=str(d/n), **kw))) | dict(path=d/n) for n, kw in (("eagle3", dict(kind="eagle3")), ("online", dict(online=True))) if not (d/n).mkdir()}

FIT = dict(target=TARGET, hot=list(range(400)), lr=1e-3, batch=4, w_feat=1., w_token=.1, noise=.1, beta2=.95, clip=.5, warmup=2, depth=2, seed=0, evals=1)

def test_eagle3_layer_is_llama_over_both_inputs():
    "Midlayer = transformers' attention over cat(norm(embedding), norm(state)), the residual carrying the state; logits = head(norm)."
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
    cfg = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=6, vocab_size=50, attn_implementation="eager")
    d = Eagle3Draft(draft_config(cfg, "eagle3"), [7, 3, 9])
    assert all((n.weight == 1).all() for n in (d.norm, d.midlayer.input_layernorm, d.midlayer.hidden_norm))
    for n in (d.norm, d.midlayer.input_layernorm, d.midlayer.hidden_norm): torch.nn.init.uniform_(n.weight, .5, 2)
    layer = LlamaDecoderLayer(cfg, 0)
    for n in "qkv": setattr(layer.self_attn, f"{n}_proj", getattr(d.midlayer.self_attn, f"{n}_proj"))
    layer.load_state_dict({k: v for k, v in d.midlayer.state_dict().items() if k != "hidden_norm.weight"})
    emb, aux, pos = torch.randn(1, 5, 32), torch.randn(1, 5, 96), torch.arange(5)[None]
    h, rms = aux @ d.fc.weight.T, lambda x, w: w*x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + cfg.rms_norm_eps)
    both = torch.cat([rms(emb, d.midlayer.input_layernorm.weight), rms(h, d.midlayer.hidden_norm.weight)], -1)
    x = h + layer.self_attn(both, attention_mask=torch.full((5, 5), float("-inf")).triu(1)[None, None], position_embeddings=LlamaRotaryEmbedding(cfg)(h, pos))[0]
    want = x + layer.mlp(layer.post_attention_layernorm(x))
    got = d(emb, d.begin(aux), pos)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(d.logits(got), rms(want, d.norm.weight) @ d.lm_head.weight.T, atol=1e-5)

def test_eagle3_folder_is_sglangs(tmp_path):
    "Names, shapes and config of LlamaForCausalLMEagle3; d2t holds target id - draft id, in int64; the map decides when loading."
    d = random_draft(tmp_path, TARGET, hot=[30, 5, 70], kind="eagle3")
    t, c = load_file(tmp_path/"model.safetensors"), read_json(tmp_path/"config.json")
    H, I, q, kv = 64, 128, 64, 32
    assert {k: tuple(v.shape) for k, v in t.items()} == {"fc.weight": (H, 3*H), "midlayer.self_attn.q_proj.weight": (q, 2*H), "midlayer.self_attn.k_proj.weight": (kv, 2*H),
        "midlayer.self_attn.v_proj.weight": (kv, 2*H), "midlayer.self_attn.o_proj.weight": (H, q), "midlayer.mlp.gate_proj.weight": (I, H), "midlayer.mlp.up_proj.weight": (I, H),
        "midlayer.mlp.down_proj.weight": (H, I), "midlayer.input_layernorm.weight": (H,), "midlayer.hidden_norm.weight": (H,), "midlayer.post_attention_layernorm.weight": (H,),
        "norm.weight": (H,), "lm_head.weight": (3, H), "d2t": (3,)} == check_draft(tmp_path)
    assert t["d2t"].dtype == torch.int64 and t["d2t"].tolist() == [30, 4, 68]
    assert c["architectures"] == ["LlamaForCausalLMEagle3"] and c["draft_vocab_size"] == 3 and c["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    (tmp_path/"hot_tokens.json").unlink()
    again = EagleDraft.load(tmp_path)
    assert isinstance(again, Eagle3Draft) and again.hot_tokens.tolist() == [30, 5, 70]
    save_file(t | {"d2t": torch.tensor([30, 4, 10**6])}, tmp_path/"model.safetensors")
    with pytest.raises(UserError, match="hot tokens"): EagleDraft.load(tmp_path)
    save_file({k: v for k, v in t.items() if k != "d2t"}, tmp_path/"model.safetensors")
    with pytest.raises(UserError, match="d2t: missing"): EagleDraft.load(tmp_path)

def test_three_different_layers_below_the_last():
    for n in range(4, 60):
        a = aux_layers(n)
        assert 0 <= a[0] < a[1] < a[2] <= n - 2, (n, a)
    assert aux_layers(30) == [1, 14, 26] and aux_layers(32) == [1, 15, 28]      # SGLang's default {2, n//2, n-3}, counted by what goes into a layer
    with pytest.raises(UserError, match="three"): aux_layers(3)
    with pytest.raises(UserError, match="eagle4"): draft_config(TARGET, "eagle4")

def test_kept_layers_are_the_targets(data, data3):
    "The text is the same whatever is kept; the layers kept are transformers' hidden states; the plan counts them."
    one, three, none = load_data(data[2]), load_data(data3["eagle3"]["path"]), load_data(data3["online"]["path"])
    assert all(torch.equal(a["ids"], b["ids"]) and torch.equal(a["ids"], c["ids"]) and c["feats"] is None for a, b, c in zip(one, three, none))
    m = target_model(TARGET).float()
    for r in three[:3]:
        with torch.no_grad(): h = m.model(r["ids"][None], output_hidden_states=True).hidden_states       # [i + 1] is the output of layer i, the last one normalised
        want = torch.cat([h[i][0, :-1] for i in (1, 2, 3, 4)], -1)
        assert torch.allclose(r["feats"].float(), want, atol=5e-2, rtol=5e-2)
        b = collate([r], width=64)
        assert torch.equal(b["feat"][0], r["feats"][:-1, :192]) and torch.equal(b["goal"][0], r["feats"][1:, 192:])
    mb = [estimate(m.config, 10**6, 10**6, 1, 1, n)["disk_mb"] for n in (0, 1, 4)]
    assert mb[2] - mb[0] == pytest.approx(4*(mb[1] - mb[0]), abs=3) and mb[0] < 10

@pytest.mark.parametrize("unroll", [1, 3])
def test_eagle3_learns(data, data3, tmp_path, unroll):
    "The token loss falls (the toy target is nearly uniform, so by little) and hits rise; there is no feature loss."
    d = str(data3["eagle3"]["path"])
    r = train(**FIT | dict(lr=3e-3), data=d, held=d, epochs=25, out=str(tmp_path/"draft"), work=str(tmp_path), kind="eagle3", unroll=unroll)
    first, last = r["curve"][0], r["curve"][-1]
    before = heldout(new_draft("eagle3", TARGET, FIT["hot"], target_matrices(TARGET)[1]), load_data(d), *target_matrices(TARGET), 2)
    assert first[1] == last[1] == 0 and last[2] < first[2] - .01 and r["heldout"]["top1"] > before["top1"] + .1
    assert check_draft(tmp_path/"draft")

def test_lm_head_starts_as_the_targets_rows():
    head = target_matrices(TARGET)[1]
    assert torch.equal(new_draft("eagle3", TARGET, [5, 3], head).lm_head.weight, head[[5, 3]].float())

def test_eagle3_unrolls_over_its_own_state(data3):
    "Depth two reads what depth one gave out; fc is applied once."
    rows, (emb, head) = load_data(data3["eagle3"]["path"])[:2], target_matrices(TARGET)
    d, seen, begun = new_draft("eagle3", TARGET, FIT["hot"], head), [], []
    d.midlayer.register_forward_hook(lambda m, a, o: seen.append((a[1], o))); d.fc.register_forward_hook(lambda m, a, o: begun.append(o))
    draft_loss(d, collate(rows, width=64), emb, head[d.hot_tokens], 1., .1, unroll=3)
    assert len(begun) == 1 and len(seen) == 3 and torch.equal(seen[0][0], begun[0]) and torch.equal(seen[1][0], seen[0][1]) and torch.equal(seen[2][0], seen[1][1])

@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_online_labels_equal_kept_ones(data, data3, tmp_path, kind):
    kept = str(data[2] if kind == "eagle" else data3["eagle3"]["path"]); text = str(data3["online"]["path"])
    run = lambda n, d, **kw: ((tmp_path/n).mkdir(), train(**FIT | dict(noise=0.), data=d, held=d, epochs=2, out=str(tmp_path/n/"draft"), work=str(tmp_path/n), kind=kind, **kw))[1]
    a, b = run("kept", kept), run("online", text, online=True)
    assert [c[2] for c in b["curve"]] == pytest.approx([c[2] for c in a["curve"]], rel=1e-2)
    assert b["heldout"]["top1"] == pytest.approx(a["heldout"]["top1"], abs=.03)

def test_the_curve_along_training_is_over_the_development_prompts(data, tmp_path, monkeypatch):
    "They are the first prompts, not the first texts: shards hold texts by the length of their prompts."
    import tpro_nb.eagle_draft as ed
    _, _, d = data
    seen, real = [], heldout
    monkeypatch.setattr(ed, "heldout", lambda draft, rows, *a: (seen.append({r["row"] for r in rows}), real(draft, rows, *a))[1])
    train(**FIT | dict(curve_rows=3), data=str(d), held=str(d), epochs=1, out=str(tmp_path/"draft"), work=str(tmp_path))
    everyone = {r["row"] for r in load_data(d)}
    assert len(everyone) > 3 and seen[-1] == everyone and all(s == {r for r in everyone if r < 3} for s in seen[:-1]) and len(seen) > 1

def test_features_of_the_other_kind_are_refused(data, data3, tmp_path):
    go = lambda d, **kw: train(**FIT, data=str(d), held=str(d), epochs=1, out=str(tmp_path/"draft"), work=str(tmp_path), **kw)
    with pytest.raises(UserError, match="another kind"): go(data[2], kind="eagle3")
    with pytest.raises(UserError, match="another kind"): go(data3["eagle3"]["path"])
    with pytest.raises(UserError, match="online"): go(data3["online"]["path"])

@pytest.mark.parametrize("kind", ["eagle3"])
def test_two_processes_train_what_one_does(data3, tmp_path, monkeypatch, kind):
    "Online labels in fp32 over gloo: each rank has the target and half of every batch; the weights of one process, to 1e-5. Answers differ in length, so that a plain mean over ranks is wrong."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    rows, d, got = load_data(data3["online"]["path"]), str(tmp_path), {}
    save_shard([r | dict(ids=r["ids"][:r["start"] + 3 + i % 7].tolist()) for i, r in enumerate(rows)], tmp_path/"shard_0000.safetensors", 0.)
    for n in (1, 2):
        (tmp_path/str(n)).mkdir()
        cfg = FIT | dict(noise=0., warmup=1, data=d, held=d, epochs=1, batch=6, out=str(tmp_path/str(n)/"draft"), work=str(tmp_path/str(n)), kind=kind, unroll=2, online=True)
        got[n] = launch("dist_draft:train_fp32", dict(nproc=n, config=cfg), tmp_path/str(n)/"job", nproc=n, threads=1)
    assert (got[1]["world"], got[2]["world"], got[2]["backend"]) == (1, 2, "gloo") and got[1]["steps"] == got[2]["steps"] >= 3
    assert [c[2] for c in got[2]["curve"]] == pytest.approx([c[2] for c in got[1]["curve"]], abs=1e-5)
    a, b = (load_file(tmp_path/str(n)/"weights.safetensors") for n in (1, 2))
    start = new_draft(kind, TARGET, FIT["hot"], target_matrices(TARGET)[1])
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5 and (a["lm_head.weight"] - start.lm_head.weight).abs().max() > 1e-3
