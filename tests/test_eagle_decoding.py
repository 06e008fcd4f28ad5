"Speculative decoding: the step equals transformers, the text equals the target's, wrong verifiers and bad input are caught."
import ctypes
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, GPT2Config, GPT2LMHeadModel
from tpro_nb.core import UserError, read_json, toy, toy_model, write_json
from tpro_nb import eagle_decoding as ed
from tpro_nb.eagle_draft import DraftKV, EagleDraft, random_draft

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
        for shape in [(1, 1, 1), (4, 1, 4), (2, 5, 3), (3, 4, 12), (5, 8, 31), ed.STATIC]: assert dec.generate(p, 20, tree=shape) == ref, shape
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
    for q in range(1, 27):
        x, out = torch.randn(q, 48).to(dtype), []
        for threads in (1, 2, 3):
            y = torch.full((q, 208), 7.)
            lib.matmul(*(ctypes.c_void_p(t.data_ptr()) for t in (x, packed, y)), q, 208, 48, threads)
            out.append(y)
        assert (out[0] - x.double() @ w.double().T).abs().max() < 1e-4 and all(torch.equal(out[0], y) for y in out)

@pytest.mark.skipif("c" not in ENGINES, reason="no compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name,kind", [("qwen", "draft"), ("llama", "draft"), ("qwen", "eagle3"), ("llama5", "eagle3")])
def test_fused_passes_equal_the_readable_ones(three, name, kind, dtype):
    "Same proposals, same cache; same features and argmax: for every shape and number of threads."
    for threads in (1, 2, 3):
        dec = ed.Decoder(three/name, three/f"{name}_{kind}", dtype, context=64, engine="c", threads=threads)
        e, w, f = dec.draft, dec.draft_weights, torch.randn(6, dec.hidden, generator=torch.Generator().manual_seed(threads))
        for depth, topk in [(1, 1), (1, 4), (3, 3), (4, 2), (5, 8), (3, 1), (2, 8)]:
            at, end = ([5, 9, 77], (f, [0, 3, 5]), 10, depth, topk, 7), 7 + 10 + min(topk, len(w.hot))*(depth - 1)
            e.k.zero_(); a = e.propose(w, *at); ka, va = e.k[..., :end].clone(), e.v[:, :, :end].clone()
            e.k.zero_(); b = ed.propose_pass(e, w, *at)
            assert [(p, t, d) for p, t, _, d in a] == [(p, t, d) for p, t, _, d in b]
            np.testing.assert_allclose([x[2] for x in a], [x[2] for x in b], atol=2e-6)
            assert torch.equal(ka, e.k[..., :end]) and torch.equal(va, e.v[:, :, :end])
        rows = list(range(9)), 0, 5, ed.causal(9, 5), 5
        (f1, b1), (f2, b2) = dec.target.greedy(dec.embed, list(range(9)), dec.head, *rows), ed.greedy_pass(dec.target, dec.embed, list(range(9)), dec.head, *rows)
        assert torch.equal(f1, f2) and b1 == b2

@pytest.fixture(scope="module")
def three(work):
    "Two targets of enough layers with an EAGLE-3 draft each, EAGLE-1 beside it; the Llama has five layers, 3 query heads a key head and its own head."
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig(vocab_size=101, hidden_size=96, intermediate_size=160, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=256, tie_word_embeddings=False, initializer_range=.08, bos_token_id=None, eos_token_id=None, pad_token_id=None)).save_pretrained(work/"llama5")
    for n, v in (("qwen", 500), ("llama5", 101)):
        for kind in ("eagle", "eagle3"):
            d = random_draft(work/f"{n}_{kind}", work/n, hot=list(range(1, v, 2)), kind=kind)
            for name, p in d.named_parameters():                     # norms of ones would hide a forgotten one
                if name.endswith("norm.weight"): torch.nn.init.uniform_(p, .5, 2.)
            d.save(work/f"{n}_{kind}", torch.float32)
    return work

def slow_chain(hf, draft, ids: list[int], depth: int) -> list[int]:
    "What a draft proposes after `ids`, by chapter 11's layer over transformers' own hidden states, without a cache."
    with torch.no_grad():
        h = hf.model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states              # the root's own feature is not known yet
        feat = h[-1] if draft.kind == "eagle" else torch.cat([h[i + 1] for i in draft.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]], -1)
        emb, kv, n = hf.get_input_embeddings().weight, DraftKV(), len(ids) - 1
        f, out = draft(emb[ids[1:]][None], draft.begin(feat), torch.arange(n)[None], kv)[:, -1:], []
        for d in range(depth):
            out.append(int(draft.hot_tokens[draft.logits(f[0], hf.lm_head.weight[draft.hot_tokens]).argmax()]))
            f = draft(emb[out[-1:]][None], f, torch.tensor([[n + d]]), kv)
    return out

@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("name", ["qwen", "llama5"])
def test_proposals_are_the_trained_layers(three, name, kind, engine):
    "Step after step, accepted branches between them, the decoder proposes what the module of chapter 11 proposes: same features, same positions, nothing stale."
    dec = ed.Decoder(three/name, three/f"{name}_{kind}", "float32", context=128, engine=engine)
    hf, draft = ed.load_target(three/name, torch.float32), EagleDraft.load(three/f"{name}_{kind}")
    hf = hf.eval(); accepted = 0
    for i, p in enumerate(prompts(dec.vocab)[1:]):
        truth = dec.generate(p, 12)
        plant, real, seen = ed.planted(truth, dec.vocab, i, 10), dec._propose, []
        def both(tokens, feats, n, shape, base=0):                   # the draft proposes and is kept; a planted tree, partly right, is verified
            seen.append((n, real(tokens, feats, n, (3, 1, 3), base).tokens[1:]))
            return plant(p + truth[:n + 1 - len(p)])
        dec._propose = both
        events = []
        assert dec.generate(p, 12, tree=(3, 1, 12), events=events) == truth
        accepted += sum(len(e["accepted"]) for e in events); dec._propose = real
        for n, tokens in seen: assert tokens == slow_chain(hf, draft, p + truth[:n + 1 - len(p)], 3), n
    assert accepted >= 4, "no branch was accepted: the test tests nothing"

@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama5"])
def test_greedy_identity_with_eagle3(three, name, engine):
    "fp32, every tree shape: transformers' own greedy text; two texts in one pass too."
    dec, hf = ed.Decoder(three/name, three/f"{name}_eagle3", "float32", context=128, engine=engine), ed.load_target(three/name, torch.float32)
    for p in prompts(dec.vocab):
        ref = hf.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(p):].tolist()
        for shape in [None, (1, 1, 1), (4, 1, 4), (2, 5, 3), (3, 4, 12), (5, 8, 31)]: assert dec.generate(p, 20, tree=shape) == ref, shape

@pytest.mark.parametrize("engine", ENGINES)
def test_taps_are_the_hidden_states(three, engine):
    "A prompt longer than one call of the kernels; and none left behind where nobody asks."
    dec, hf, p = ed.Decoder(three/"llama5", three/"llama5_eagle3", "float32", context=128, engine=engine), ed.load_target(three/"llama5", torch.float32), prompts(101)[2]
    dec.target.forward(dec.embed[p].float(), list(range(70)), 0, 0, ed.causal(70))
    with torch.no_grad(): h = hf.model(torch.tensor([p]), output_hidden_states=True).hidden_states
    assert dec.target.taps == [0, 1, 3] and (dec.target.aux - torch.cat([h[i + 1][0] for i in (0, 1, 3)], -1)).abs().max() < 1e-4
    plain = ed.Decoder(three/"llama5", three/"llama5_eagle", "float32", context=128, engine=engine)
    plain.target.forward(dec.embed[p].float(), list(range(70)), 0, 0, ed.causal(70))
    assert plain.target.aux is None

def test_eagle3_of_another_target_is_refused(three, tmp_path):
    random_draft(tmp_path/"deep", three/"llama5", hot=[1, 2, 3], kind="eagle3")
    edit(tmp_path/"deep", eagle_config=dict(use_aux_hidden_state=True, eagle_aux_hidden_state_layer_ids=[2, 15, 28]))
    with pytest.raises(UserError, match="layers"): ed.Decoder(three/"llama5", tmp_path/"deep", "float32", context=64)

@pytest.mark.parametrize("engine", ENGINES)
def test_moved_slots(work, engine):
    dec = ed.Decoder(work/"llama", dtype="float32", engine=engine, context=32)
    e = dec.target; e.forward(dec.embed[list(range(9))].float(), list(range(9)), 0, 0, ed.causal(9))
    at = (lambda t, i: t[..., i]) if engine == "c" else (lambda t, i: t[:, :, i])
    k, v = at(e.k, [4, 6, 8]).clone(), e.v[:, :, [4, 6, 8]].clone()
    e.move([4, 6, 8], [3, 4, 5])
    assert torch.equal(at(e.k, [3, 4, 5]), k) and torch.equal(e.v[:, :, [3, 4, 5]], v)

@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_a_batch_gives_each_text_what_it_gets_alone(work, name, engine):
    dec = ed.Decoder(work/name, work/f"{name}_draft", "float32", context=256, engine=engine)
    ps, events = prompts(dec.vocab), []
    for shape in (None, (3, 1, 3), (3, 4, 9)):
        alone = [dec.generate(p, 16, tree=shape) for p in ps]
        assert dec.generate_batch(ps, 16, tree=shape) == alone, shape
        with_bad = dec.generate_batch([ps[0], [dec.vocab], *ps[1:], ["x"], [1]*200], 16, tree=shape, events=events, meta=[dict(request=str(i)) for i in range(6)])
        assert [with_bad[0], *with_bad[2:4]] == alone
        assert isinstance(with_bad[1], UserError) and isinstance(with_bad[4], ValueError) and "batch" in str(with_bad[5])
    assert {e["request"] for e in events} == {"0", "2", "3"}
    drawn = dec.generate_batch(ps, 16, tree=(3, 4, 9), temperature=.9, top_k=20, seed=5)
    assert drawn == [dec.generate(p, 16, tree=(3, 4, 9), temperature=.9, top_k=20, seed=5 + i) for i, p in enumerate(ps)]
    ends = [o[3] for o in alone]
    assert dec.generate_batch(ps, 16, tree=(3, 4, 9), eos=ends[0]) == [dec.generate(p, 16, eos=ends[0]) for p in ps]

@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama5"])
def test_a_batch_with_eagle3(three, name, engine):
    "The taps of one text must not be read by another: texts of 1, 7 and 70 tokens side by side, in another order too, greedy and sampled."
    dec = ed.Decoder(three/name, three/f"{name}_eagle3", "float32", context=320 if name == "qwen" else 256, engine=engine)
    ps = prompts(dec.vocab)
    for kw in (dict(), dict(temperature=.8, top_k=30, top_p=.95)):
        for shape in ((4, 1, 4), (3, 4, 12)):
            alone = [dec.generate(p, 14, tree=shape, seed=3 + i, **kw) for i, p in enumerate(ps)]
            assert dec.generate_batch(ps, 14, tree=shape, seed=3, **kw) == alone, (shape, kw)
    assert dec.generate_batch(ps[::-1], 14, tree=(3, 4, 12)) == [dec.generate(p, 14) for p in ps[::-1]]

@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_accepted_branches_of_one_text_do_not_move_another(three, kind, monkeypatch):
    "Trees that are partly right: slots move in every text of the batch, by different amounts; the texts are the target's own. Bare proposals would hardly ever be accepted."
    dec = ed.Decoder(three/"llama5", three/f"llama5_{kind}", "float32", context=256)
    ps, events, texts = prompts(101), [], {}
    alone = [dec.generate(p, 16) for p in ps]
    plants = [ed.planted(a, 101, i, 12) for i, a in enumerate(alone)]
    def planted(tokens, feats, n, shape, base=0):
        real(tokens, feats, n, shape, base)                       # the draft's own slots are written as ever
        i = texts.setdefault(base, len(texts))                    # a text is known by where its slots begin
        return plants[i](ps[i] + alone[i][:n + 1 - len(ps[i])])
    real = dec._propose; monkeypatch.setattr(dec, "_propose", planted)
    assert dec.generate_batch(ps, 16, tree=(3, 2, 12), events=events, meta=[dict(request=str(i)) for i in range(3)]) == alone
    assert {e["request"] for e in events if len(e["accepted"]) >= 2} == {"0", "1", "2"}

def test_a_text_that_fails_on_the_way_leaves_the_others_running(work):
    dec, ps = ed.Decoder(work/"llama", work/"llama_draft", "float32", context=256), prompts(101)
    alone = [dec.generate(p, 12) for p in ps]
    def fails(ids):
        if len(ids) > len(ps[1]) + 4: raise RuntimeError("lost")
        return ed.Tree([-1], [ids[-1]])
    greedy = ed.chooser(0, 1.0, 0)
    texts = [dec._text(p, 12, None, greedy, None, propose=fails if i == 1 else None, base=90*i) for i, p in enumerate(ps)]
    out = dec._run(texts)
    assert out[0] == alone[0] and out[2] == alone[2] and isinstance(out[1], RuntimeError)

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

def test_a_static_tree_has_its_form_at_every_step_and_the_drafts_best_tokens_in_it(work):
    "Where the forms agree, a static tree is the dynamic one: a chain, and all children of the root."
    dec, p = ed.Decoder(work/"llama", work/"llama_draft", "float32", context=128), prompts(101)[1]
    events = []; dec.generate(p, 16, tree=ed.STATIC, events=events)
    ranks = {path: i + 1 for i, path in enumerate(sorted(ed.STATIC, key=lambda q: (len(q), q)))}
    want = sorted(len(q) for q in ranks)
    assert len(events) > 2 and all(sorted(len(ed.Tree(**e["tree"]).path(i)) - 1 for i in range(1, 12)) == want for e in events)
    for static, dynamic in [(((0,), (0, 0), (0, 0, 0)), (3, 1, 3)), (((0,), (1,), (2,)), (1, 3, 3))]:
        both = [[], []]
        for log, shape in zip(both, (static, dynamic)): dec.generate(p, 12, tree=shape, events=log)
        assert [e["tree"] for e in both[0]] == [e["tree"] for e in both[1]]

@pytest.mark.parametrize("tree, says", [(((0,), (1, 0)), "parent of each"), (((0,), (0,)), "every node once"), (((0,), ()), "every node once"), (((0,), (-1,)), "ranks must lie"),
                                        (((0,), (10**6,)), "ranks must lie")])
def test_what_is_no_static_tree_is_refused(work, tree, says):
    with pytest.raises(UserError, match=says): ed.Decoder(work/"llama", work/"llama_draft", "float32", context=64).generate([1, 2, 3], 4, tree=tree)

def test_sampling_is_exact_and_broken_verifiers_are_caught(tmp_path):
    tiny = ed.tiny_target(tmp_path/"tiny")
    good = ed.chi2_tests(tiny, 20000, 0)
    assert len(good) == 7 and min(good.values())*len(good) > .01, good
    assert max(ed.chi2_tests(tiny, 1500, 0, ed.broken_sampled).values()) < 1e-6
    bad = ed.chi2_tests(tiny, 1500, 0, ed.broken_top)
    assert min(bad.values())*len(bad) < 1e-6

def test_whole_decoder_samples_the_target(tmp_path):
    p = ed.chi2_decoder(tmp_path, 1500, 0, shapes=((2, 3, 6), ((0,), (1,), (0, 0))))
    assert min(p.values()) > .01
    for wrong in (ed.broken_sampled, ed.broken_top): assert max(ed.chi2_decoder(tmp_path, 1500, 0, shapes=((2, 3, 6),), verify=wrong).values()) < 1e-6

def test_broken_greedy_never_passes(tmp_path):
    nano = ed.nano_identity(tmp_path, plants=4)
    assert nano["same"] == nano["runs"] == 12 and nano["broken_same"] == 0 and nano["tokens_per_step"] > 1.3

def test_top_p_keeps_the_smallest_sufficient_set():
    p = ed.distribution(torch.tensor([.5, .3, .15, .05]).log(), 1.0, .75)
    np.testing.assert_allclose(p, [.625, .375, 0, 0], atol=1e-7)
    np.testing.assert_allclose(ed.distribution(torch.tensor([.5, .5]).log(), 1.0, 1e-9).sum(), 1)

def test_top_k_then_top_p_as_transformers_do():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    for t, p, k in [(1.0, 1.0, 5), (.7, .8, 7), (1.3, .5, 3), (1.0, .9, 0), (1.0, 1.0, 100)]:
        y = TemperatureLogitsWarper(t)(None, x)
        if k: y = TopKLogitsWarper(k)(None, y)
        if p < 1: y = TopPLogitsWarper(p)(None, y)
        np.testing.assert_allclose(ed.distribution(x[0], t, p, k), torch.softmax(y[0], -1).numpy(), atol=1e-6)

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
    for kw, word in [(dict(temperature=-.1), "temperature"), (dict(temperature=float("nan")), "temperature"), (dict(top_p=0), "top_p"), (dict(top_k=-1), "top_k"), (dict(tree=(0, 1, 1)), "tree"),
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

WAYS = [dict(attention="fused"), dict(steps="fixed"), dict(attention="fused", steps="fixed")]

@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(w.values()))
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_forms_for_a_gpu_give_the_same_text(work, name, way):
    "Attention without enable_gqa, and the pass of fixed shape: logits up to rounding, text token for token, alone and in a batch."
    plain, other = (ed.Decoder(work/name, work/f"{name}_draft", "float32", context=128, engine="torch", **w) for w in ({}, way))
    for i, p in enumerate(prompts(plain.vocab)):
        a, b = (ed.logits_of(d.target, d.embed, d.head, p) for d in (plain, other))
        assert (a - b).abs().max() < 2e-4
        ref = plain.generate(p, 12)
        for shape in (None, (1, 1, 1), (3, 4, 12)): assert other.generate(p, 12, tree=shape) == ref, shape
        assert other.generate(p, 12, tree=(9, 9, 24), propose=ed.planted(ref, plain.vocab, i, 16)) == ref
    two = prompts(plain.vocab)[:2]
    assert other.generate_batch(two, 8, tree=(2, 3, 5)) == [plain.generate(p, 8) for p in two]

@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(w.values()))
def test_forms_for_a_gpu_round_no_worse_in_bf16(work, way):
    exact, plain, other = (ed.Decoder(work/"llama", dtype=t, context=128, engine="torch", **w) for t, w in (("float32", {}), ("bfloat16", {}), ("bfloat16", way)))
    p = prompts(101)[2]
    true, a, b = (ed.logits_of(d.target, d.embed, d.head, p) for d in (exact, plain, other))
    assert (b - a).abs().max() <= 3*(a - true).abs().max()

def test_fixed_pass_is_the_same_whatever_it_holds(work):
    "What a CUDA graph asks for: the same operations on the same shapes, none that reads a value back; the free pass is the counterexample."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            heard.append((str(f), *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
            return f(*args, **(kwargs or {}))
    def record(e, n):
        layers = e.layers
        def listen(*args):
            with Listener(): return layers(*args)
        heard.clear(); e.kept.clear(); e.layers = listen
        e.forward(torch.ones(2, 96), [n, n], n, n, [[n], [n + 1]])
        del e.layers
        return list(heard)
    heard = []
    fixed, free = (ed.Decoder(work/"llama", dtype="float32", context=128, engine="torch", steps=s).target for s in ("fixed", "free"))
    assert record(fixed, 20) == record(fixed, 90) and record(free, 20) != record(free, 90)
    assert not any("_local_scalar_dense" in f or "nonzero" in f for f, *_ in record(fixed, 20))

def test_capture_as_far_as_a_cpu_goes(work, monkeypatch):
    "Stand-ins for torch.cuda, whose graph repeats the pass into the captured result: one capture a width, results not overwritten by the next replay."
    from contextlib import nullcontext
    dec = ed.Decoder(work/"llama", work/"llama_draft", "float32", context=128, engine="torch", steps="fixed")
    engines, made = (dec.target, dec.draft), []
    class Graph:
        def __init__(self): made.append(self)
        def replay(self):
            e, (held, _, out) = next((e, k) for e in engines for k in e.kept.values() if k[1] is self)
            for o, new in zip(out, e.layers(*held, e.cap)):
                if o is not None: o.copy_(new)
    class Stream:
        def wait_stream(self, other): pass
    for name, stand_in in dict(CUDAGraph=Graph, Stream=Stream, current_stream=Stream, stream=lambda s: nullcontext(), graph=lambda g: nullcontext(),
                               device=lambda d: nullcontext()).items(): monkeypatch.setattr(torch.cuda, name, stand_in)
    p = prompts(101)[1]
    ref = dec.generate(p, 16, tree=(3, 4, 12))
    for e in engines: e.steps = "graph"; e.kept.clear()
    for _ in range(2): assert dec.generate(p, 16, tree=(3, 4, 12)) == ref
    assert len(made) == sum(len(e.kept) for e in engines) > 2
    at = lambda n: ([n, n], n, n, [[n], [n + 1]])
    first = dec.target.forward(torch.ones(2, 96), *at(20)); kept = first.clone()
    second = dec.target.forward(-torch.ones(2, 96), *at(20))
    assert torch.equal(first, kept) and not torch.equal(first, second)

@pytest.mark.parametrize("way,says", [(dict(attention="flush"), "attention"), (dict(steps="fast"), "steps"), (dict(engine="c", steps="fixed"), "torch engine")])
def test_unknown_forms_are_refused(way, says):
    with pytest.raises(UserError, match=says): ed.Decoder("no such model", **way)          # before anything is loaded

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_graphs_without_cuda_are_refused_first(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA graphs"): ed.Decoder("no such model", device=device, steps="graph")


def test_large_pages_keep_what_they_are_given():
    ts = [torch.randn(3, 32), torch.randn(5, 16).bfloat16(), torch.randn(2**20)]
    out = ed.large_pages(ts)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(out, ts))
    assert out[0].data_ptr() % 2**21 == 0 and out[1].data_ptr() == out[0].data_ptr() + ts[0].nbytes
    ts[0][:] = 0
    assert out[0].any()
