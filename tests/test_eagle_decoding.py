"Speculative decoding: the step equals transformers, the text equals the target's, wrong verifiers and bad input are caught."
import ctypes
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, GPT2Config, GPT2LMHeadModel
from tpro_nb.core import UserError, read_json, toy, toy_model, write_json
from tpro_nb import eagle_decoding as ed
from tpro_nb.eagle_draft import random_draft

ENGINES = ["torch"] + (["c"] if ed.kernels(torch.float32) is not None else [])

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A nano Qwen3 (tied head, q/k norm) and a Llama (own head, 3 query heads a key head, odd vocabulary), each with an untrained draft."
    d = tmp_path_factory.mktemp("eagle")
    toy_model(d/"qwen")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=101, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=256, tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=700.0), initializer_range=.08,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)).save_pretrained(d/"llama")
    for n, v in (("qwen", 500), ("llama", 101)): random_draft(d/f"{n}_draft", d/n, hot=list(range(0, v, 3)))
    return d

def prompts(vocab): return [np.random.default_rng(i).integers(0, vocab, n).tolist() for i, n in enumerate((1, 7, 70))]

@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_step_equals_transformers(work, name, engine):
    dec, hf = ed.Decoder(work/name, dtype="float32", engine=engine, context=256), ed.load_target(work/name, torch.float32)
    for p in prompts(dec.vocab):
        ours = ed.logits_of(dec.target, dec.embed, dec.head, p)
        with torch.no_grad(): assert (ours - hf(torch.tensor([p])).logits[0]).abs().max() < 2e-4

@pytest.mark.parametrize("engine", ENGINES)
def test_tree_attention_equals_separate_paths(work, engine):
    "Each node of a tree gets the logits it would get alone after its own path."
    dec = ed.Decoder(work/"llama", dtype="float32", engine=engine, context=128)
    p, seen = prompts(101)[1], {}
    tree = ed.Tree([-1, 0, 0, 1, 1, 2, 3], [5, 9, 8, 7, 6, 5, 4]).check()
    dec.target.forward(dec.embed[p].float(), list(range(7)), 0, 0, ed.causal(7))
    dec._verify(tree, 7, lambda t, logits: (seen.update(logits=logits.clone()), ([], 0))[1])
    for i in range(len(tree)):
        alone = ed.logits_of(dec.target, dec.embed, dec.head, p + [tree.tokens[j] for j in tree.path(i)])[-1]
        assert (alone - seen["logits"][i]).abs().max() < 2e-4, i

@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_greedy_identity(work, name, engine):
    "Every tree shape gives transformers' own greedy text in fp32, with the draft and with planted trees."
    dec, hf = ed.Decoder(work/name, work/f"{name}_draft", "float32", context=128, engine=engine), ed.load_target(work/name, torch.float32)
    for i, p in enumerate(prompts(dec.vocab)):
        ref = hf.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(p):].tolist()
        assert dec.generate(p, 20) == ref
        for shape in [(1, 1, 1), (4, 1, 4), (2, 5, 3), (3, 4, 12), (5, 8, 31)]: assert dec.generate(p, 20, tree=shape) == ref, shape
        events = []
        for s in range(3): assert dec.generate(p, 20, tree=(9, 9, 24), propose=ed.planted(ref, dec.vocab, 10*i + s, 16), events=events) == ref
        assert max(len(e["accepted"]) for e in events) >= 2, "the planted trees never had two tokens accepted: the test tests nothing"

@pytest.mark.skipif("c" not in ENGINES, reason="no compiler")
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_bf16_tree_equals_plain_bit_for_bit(work, name):
    dec = ed.Decoder(work/name, work/f"{name}_draft", "bfloat16", context=128, engine="c")
    for i, p in enumerate(prompts(dec.vocab)):
        plain = dec.generate(p, 30)
        assert dec.generate(p, 30, tree=(3, 4, 9)) == plain
        assert dec.generate(p, 30, tree=(9, 9, 24), propose=ed.planted(plain, dec.vocab, i, 16)) == plain

@pytest.mark.skipif("c" not in ENGINES, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_right_for_every_number_of_rows_and_threads(dtype):
    lib, w = ed.kernels(dtype), torch.randn(16*13, 48).to(dtype)
    packed = ed.pack(w, dtype)
    for q in (*range(1, 10), 17):
        x, out = torch.randn(q, 48).to(dtype), []
        for threads in (1, 2, 3):
            y = torch.full((q, 208), 7.)
            lib.matmul(*(ctypes.c_void_p(t.data_ptr()) for t in (x, packed, y)), q, 208, 48, threads)
            out.append(y)
        assert (out[0] - x.double() @ w.double().T).abs().max() < 1e-4 and all(torch.equal(out[0], y) for y in out)

def test_events_and_end_token(work):
    dec, events = ed.Decoder(work/"llama", work/"llama_draft", "float32", context=128), []
    p = prompts(101)[1]
    ref = dec.generate(p, 24)
    out = dec.generate(p, 24, tree=(8, 8, 8), propose=ed.planted(ref, 101, 0), events=events, meta=dict(request="r", lang="ru"))
    assert out == ref and sum(e["emitted"] for e in events) == 23
    at = len(p)
    for e in events:
        t = e["tree"]
        assert e["position"] == at and e["request"] == "r" and len(t["parents"]) == len(t["tokens"]) == len(t["confidence"])
        assert [t["parents"][i] for i in e["accepted"]] == [0, *e["accepted"]][:len(e["accepted"])]
        at += len(e["accepted"]) + 1
    eos = ref[9]
    assert dec.generate(p, 24, tree=(8, 8, 8), propose=ed.planted(ref, 101, 0), eos=eos) == ref[:ref.index(eos) + 1] == dec.generate(p, 24, eos=eos)

def test_dynamic_tree_is_the_best_connected_one():
    "The kept nodes are the most confident of everything proposed; confidence is the path's product."
    rng = np.random.default_rng(0)
    for topk, depth, nodes in [(1, 4, 9), (3, 3, 8), (4, 2, 30)]:
        lp = {}
        def probs(key):
            if key not in lp: lp[key] = np.log(np.sort(rng.dirichlet(np.ones(topk + 1)))[::-1][:topk])
            return list(range(topk)), lp[key]
        pool_seen = []
        t = ed.grow(0, probs("root"), lambda fr, pool: (pool_seen.append(pool), zip(*[probs((len(pool), i)) for i in fr]))[1], depth, topk, nodes)
        assert len(t) == 1 + min(nodes, len(pool_seen[-1])) and max(len(t.path(i)) - 1 for i in range(len(t))) <= depth
        kept, everything = sorted(t.confidence[1:], reverse=True), sorted(np.exp([x[2] for x in pool_seen[-1]]), reverse=True)
        np.testing.assert_allclose(kept, everything[:len(kept)], rtol=1e-6)
        assert all(t.confidence[i] <= t.confidence[p] + 1e-9 for i, p in enumerate(t.parents) if i)

def test_sampling_is_exact_and_broken_verifiers_are_caught(tmp_path):
    tiny = ed.tiny_target(tmp_path/"tiny")
    good = ed.chi2_tests(tiny, 20000, 0)
    assert len(good) == 5 and min(good.values())*len(good) > .01, good
    assert max(ed.chi2_tests(tiny, 1500, 0, ed.broken_sampled).values()) < 1e-6
    bad = ed.chi2_tests(tiny, 1500, 0, ed.broken_top)
    assert min(bad.values())*len(bad) < 1e-6

def test_whole_decoder_samples_the_target(tmp_path):
    p = ed.chi2_decoder(tmp_path, 1500, 0, shapes=((2, 3, 6),))
    assert min(p.values()) > .01

def test_broken_greedy_never_passes(tmp_path):
    nano = ed.nano_identity(tmp_path, plants=4)
    assert nano["same"] == nano["runs"] == 12 and nano["broken_same"] == 0 and nano["tokens_per_step"] > 1.3

def test_top_p_keeps_the_smallest_sufficient_set():
    p = ed.distribution(torch.tensor([.5, .3, .15, .05]).log(), 1.0, .75)
    np.testing.assert_allclose(p, [.625, .375, 0, 0], atol=1e-7)
    np.testing.assert_allclose(ed.distribution(torch.tensor([.5, .5]).log(), 1.0, 1e-9).sum(), 1)

def test_classify_tells_a_tie_from_a_bug(work):
    fp32, p = ed.Decoder(work/"llama", dtype="float32", context=64), prompts(101)[1]
    true = ed.logits_of(fp32.target, fp32.embed, fp32.head, p)[-1]
    order = true.argsort(descending=True).tolist()
    low = [true + .01]
    assert ed.classify(p, order[0], order[-1], fp32, low)["kind"] == "bug"
    assert ed.classify(p, order[0], order[0], fp32, low)["kind"] == "near-tie"

def edit(folder, **change):
    c = read_json(folder/"config.json"); write_json(folder/"config.json", c | change)

def test_bad_input_is_refused_before_decoding(work, tmp_path):
    dec, p = ed.Decoder(work/"llama", work/"llama_draft", "float32", context=64), [1, 2, 3]
    for kw, word in [(dict(temperature=-.1), "temperature"), (dict(temperature=float("nan")), "temperature"), (dict(top_p=0), "top_p"), (dict(tree=(0, 1, 1)), "tree"),
                     (dict(tree=(2, 2, 2), propose=lambda ids: ed.Tree([-1, 3, 0], [3, 1, 2])), "not connected")]:
        with pytest.raises(UserError, match=word): dec.generate(p, 4, **kw)
    for bad, new, word in [([], 4, "prompt"), ([101], 4, "prompt"), ([-1], 4, "prompt"), ([1]*60, 10, "fit"), (p, 0, "max_new_tokens")]:
        with pytest.raises(UserError, match=word): dec.generate(bad, new)
    with pytest.raises(UserError, match="draft"): ed.Decoder(work/"llama", dtype="float32", context=64).generate(p, 4, tree=(1, 1, 1))
    with pytest.raises(UserError, match="width"): ed.Decoder(work/"llama", work/"qwen_draft", "float32", context=64)
    with pytest.raises(UserError, match="nowhere"): ed.Decoder(tmp_path/"nowhere")

def test_damaged_drafts_and_targets_are_refused(work, tmp_path):
    from safetensors.torch import load_file, save_file
    d = random_draft(tmp_path/"nan", work/"llama", hot=[1, 2, 3])
    w = load_file(tmp_path/"nan"/"model.safetensors"); w["fc.bias"][0] = float("nan"); save_file(w, tmp_path/"nan"/"model.safetensors")
    with pytest.raises(UserError, match="NaN"): ed.Decoder(work/"llama", tmp_path/"nan", "float32", context=64)
    random_draft(tmp_path/"hot", work/"llama", hot=[1, 2, 3]); write_json(tmp_path/"hot"/"hot_tokens.json", [1, 2, 999])
    with pytest.raises(UserError, match="hot"): ed.Decoder(work/"llama", tmp_path/"hot", "float32", context=64)
    random_draft(tmp_path/"vocab", work/"llama", hot=[1, 2, 3]); edit(tmp_path/"vocab", vocab_size=77)
    with pytest.raises(UserError, match="vocabulary"): ed.Decoder(work/"llama", tmp_path/"vocab", "float32", context=64)
    m = ed.load_target(work/"llama", torch.float32); m.model.norm.weight.data[0] = float("nan"); m.save_pretrained(tmp_path/"broken")
    with pytest.raises(UserError, match="finite"): ed.Decoder(tmp_path/"broken", dtype="float32", context=64).generate([1, 2], 4)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)).save_pretrained(tmp_path/"gpt2")
    with pytest.raises(UserError, match="GPT2LMHeadModel"): ed.Decoder(tmp_path/"gpt2")

def test_without_a_compiler_torch_does_the_work(work, monkeypatch):
    monkeypatch.setenv("TPRO_NB_NO_KERNELS", "1")
    dec = ed.Decoder(work/"llama", work/"llama_draft", "float32", context=64)
    assert dec.kind == "torch" and dec.generate([1, 2, 3], 8, tree=(2, 2, 4)) == dec.generate([1, 2, 3], 8)
    with pytest.raises(UserError, match="compil"): ed.Decoder(work/"llama", engine="c")
