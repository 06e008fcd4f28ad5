"Speculative decoding: the text is the target's; wrong verifiers and bad input are caught."

import itertools
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tpro_nb import c_engine, decoder, eagle_decoding, trees
from tpro_nb.core import UserError, read_json, toy_model, write_json
from tpro_nb.decoder import Decoder, planted, transformers_text
from tpro_nb.draft_model import DraftKV, EagleDraft, random_draft
from tpro_nb.torch_engine import Engine, Features, PassRow, Unread, chain_rows, logits_of

COMPILED = c_engine.kernels(torch.float32) is not None
ENGINES = ["torch"] + (["c"] if COMPILED else [])
needs_compiler = pytest.mark.skipif(not COMPILED, reason="no compiler")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_llama(path, layers: int, seed: int, **more) -> None:
    "A Llama with its own head, 3 query heads a key head and an odd vocabulary."
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **more,
    )
    LlamaForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A nano Qwen3 (tied head, q/k norm) and a Llama, each with an untrained draft."
    folder = tmp_path_factory.mktemp("eagle")
    toy_model(folder / "qwen")
    rope = dict(rope_type="default", rope_theta=700.0)
    save_llama(folder / "llama", layers=2, seed=1, rope_parameters=rope)
    for name, vocab in (("qwen", 500), ("llama", 101)):
        random_draft(folder / f"{name}_draft", folder / name, hot=list(range(0, vocab, 3)))
    return folder


@pytest.fixture(scope="module")
def three(work):
    """Two targets of enough layers with an EAGLE-3 draft each, EAGLE-1 beside it.

    Qwen is that of `work`, the Llama has five layers."""
    save_llama(work / "llama5", layers=5, seed=2)
    for name, vocab in (("qwen", 500), ("llama5", 101)):
        for kind in ("eagle", "eagle3"):
            folder = work / f"{name}_{kind}"
            draft = random_draft(folder, work / name, hot=list(range(1, vocab, 2)), kind=kind)
            for parameter_name, parameter in draft.named_parameters():
                if parameter_name.endswith("norm.weight"):  # ones would hide a forgotten norm
                    torch.nn.init.uniform_(parameter, 0.5, 2.0)
            draft.save(folder, torch.float32)
    return work


def prompts(vocab):
    "Of one token, of seven and of seventy: less and more than one call of the kernels takes."
    drawn = []
    for seed, n in enumerate((1, 7, 70)):
        drawn.append(np.random.default_rng(seed).integers(0, vocab, n).tolist())
    return drawn


def logits(dec: Decoder, ids: list[int]) -> torch.Tensor:
    return logits_of(dec.target, dec.embed, dec.head, ids)


def read_prompt(dec: Decoder, ids: list[int]) -> torch.Tensor:
    return dec.target.forward(dec.embed[ids].float(), chain_rows(ids))


def longest(events) -> int:
    return max(len(event["accepted"]) for event in events)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_step_equals_transformers(work, name, engine):
    dec = Decoder(work / name, dtype="float32", engine=engine, context=256)
    model = decoder.load_target(work / name, torch.float32)
    for prompt in prompts(dec.vocab):
        with torch.no_grad():
            theirs = model(torch.tensor([prompt])).logits[0]
        assert (logits(dec, prompt) - theirs).abs().max() < 2e-4


class KeepLogits:
    "A chooser that accepts nothing and keeps what it was shown."

    best_only = False

    def __call__(self, tree, logits):
        self.logits = logits.clone()
        return trees.Verdict([], 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_tree_attention_equals_separate_paths(work, engine):
    "Each node of a tree gets the logits it would get alone after its own path."
    dec = Decoder(work / "llama", dtype="float32", engine=engine, context=128)
    prompt = prompts(101)[1]
    tree = trees.Tree([-1, 0, 0, 1, 1, 2, 3], [5, 9, 8, 7, 6, 5, 4]).check()
    read_prompt(dec, prompt)
    keep = KeepLogits()
    dec.verify(tree, 7, keep)
    for node in range(len(tree)):
        path = [tree.tokens[i] for i in tree.path(node)]
        alone = logits(dec, prompt + path)[-1]
        assert (alone - keep.logits[node]).abs().max() < 2e-4, node


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_greedy_identity(work, name, engine):
    "Every tree shape gives transformers' own text in fp32, with the draft and planted trees."
    dec = Decoder(work / name, work / f"{name}_draft", "float32", context=128, engine=engine)
    model = decoder.load_target(work / name, torch.float32)
    for i, prompt in enumerate(prompts(dec.vocab)):
        expected = transformers_text(model, prompt, 20)
        assert dec.generate(prompt, 20) == expected
        for shape in [(1, 1, 1), (4, 1, 4), (2, 5, 3), (3, 4, 12), (5, 8, 31), trees.STATIC]:
            assert dec.generate(prompt, 20, tree=shape) == expected, shape
        events = []
        for seed in range(3):
            plant = planted(expected, dec.vocab, 10 * i + seed, 16)
            text = dec.generate(prompt, 20, tree=(9, 9, 24), propose=plant, events=events)
            assert text == expected
        assert longest(events) >= 2, (
            "the planted trees never had two tokens accepted: the test tests nothing"
        )


@needs_compiler
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_bf16_tree_equals_plain_bit_for_bit(work, name):
    dec = Decoder(work / name, work / f"{name}_draft", "bfloat16", context=128, engine="c")
    for i, prompt in enumerate(prompts(dec.vocab)):
        plain = dec.generate(prompt, 30)
        assert dec.generate(prompt, 30, tree=(3, 4, 9)) == plain
        plant = planted(plain, dec.vocab, i, 16)
        assert dec.generate(prompt, 30, tree=(9, 9, 24), propose=plant) == plain


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_right_for_every_number_of_rows_and_threads(dtype):
    lib = c_engine.kernels(dtype)
    weights = torch.randn(16 * 13, 48).to(dtype)
    packed = c_engine.pack_weights(weights, dtype)
    for rows in range(1, 27):
        x = torch.randn(rows, 48).to(dtype)
        outputs = []
        for threads in (1, 2, 3):
            y = torch.full((rows, 208), 7.0)
            pointers = [c_engine.pointer(tensor) for tensor in (x, packed, y)]
            lib.matmul(*pointers, rows, 208, 48, threads)
            outputs.append(y)
        assert (outputs[0] - x.double() @ weights.double().T).abs().max() < 1e-4
        assert all(torch.equal(outputs[0], y) for y in outputs)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name,kind", [("qwen", "draft"), ("llama", "draft"), ("qwen", "eagle3"), ("llama5", "eagle3")]
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fused_passes_equal_the_readable_ones(three, name, kind, dtype, threads):
    "Same proposals, same cache; same features and argmax: for every shape and number of threads."
    folder = three / f"{name}_{kind}"
    dec = Decoder(three / name, folder, dtype, context=64, engine="c", threads=threads)
    draft, weights = dec.draft, dec.draft_weights
    states = torch.randn(6, dec.hidden, generator=torch.Generator().manual_seed(threads))
    unread = Unread([5, 9, 77], Features(states, [0, 3, 5]), before_root=10, base=7)
    for depth, topk in [(1, 1), (1, 4), (3, 3), (4, 2), (5, 8), (3, 1), (2, 8)]:
        end = 7 + 10 + min(topk, len(weights.hot)) * (depth - 1)
        draft.keys.zero_()
        fused = draft.propose(weights, unread, depth, topk)
        fused_keys = draft.keys[..., :end].clone()
        fused_values = draft.values[:, :, :end].clone()
        draft.keys.zero_()
        readable = Engine.propose(draft, weights, unread, depth, topk)
        for one, other in zip(fused, readable, strict=True):
            assert (one.parent, one.token, one.depth) == (other.parent, other.token, other.depth)
        np.testing.assert_allclose(
            [candidate.log_confidence for candidate in fused],
            [candidate.log_confidence for candidate in readable],
            atol=2e-6,
        )
        assert torch.equal(fused_keys, draft.keys[..., :end])
        assert torch.equal(fused_values, draft.values[:, :, :end])
    rows = chain_rows(range(9), base=5)
    features, best = dec.target.greedy(dec.embed, rows, dec.head)
    readable_features, readable_best = Engine.greedy(dec.target, dec.embed, rows, dec.head)
    assert torch.equal(features, readable_features) and best == readable_best


def slow_chain(model, draft, ids: list[int], depth: int) -> list[int]:
    """What a draft proposes after `ids`, without a cache.

    By chapter 11a's layer over transformers' own hidden states."""
    with torch.no_grad():
        # the root's own feature is not known yet
        hidden = model.model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        features = hidden[-1]
        if draft.kind == "eagle3":
            taps = draft.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
            features = torch.cat([hidden[layer + 1] for layer in taps], -1)
        embed, cache, n = model.get_input_embeddings().weight, DraftKV(), len(ids) - 1
        hot_head = model.lm_head.weight[draft.hot_tokens]
        positions = torch.arange(n)[None]
        guess = draft(embed[ids[1:]][None], draft.begin(features), positions, cache)[:, -1:]
        proposed = []
        for level in range(depth):
            best = draft.logits(guess[0], hot_head).argmax()
            proposed.append(int(draft.hot_tokens[best]))
            position = torch.tensor([[n + level]])
            guess = draft(embed[proposed[-1:]][None], guess, position, cache)
    return proposed


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("name", ["qwen", "llama5"])
def test_proposals_are_the_trained_layers(three, name, kind, engine):
    """Step after step the decoder proposes what the module of chapter 11a proposes.

    With accepted branches between them: same features, same positions, nothing stale."""
    folder = three / f"{name}_{kind}"
    dec = Decoder(three / name, folder, "float32", context=128, engine=engine)
    model = decoder.load_target(three / name, torch.float32).eval()
    draft = EagleDraft.load(folder)
    real = dec.draft_tree
    accepted = 0
    for i, prompt in enumerate(prompts(dec.vocab)[1:]):
        truth = dec.generate(prompt, 12)
        plant = planted(truth, dec.vocab, i, 10)
        seen = []

        def so_far(unread, prompt=prompt, truth=truth):
            return prompt + truth[: unread.before_root + 1 - len(prompt)]

        def both(unread, shape, plant=plant, seen=seen, so_far=so_far):
            "The draft proposes and is kept; a planted tree, partly right, is verified."
            seen.append((so_far(unread), real(unread, (3, 1, 3)).tokens[1:]))
            return plant(so_far(unread))

        dec.draft_tree = both
        events = []
        assert dec.generate(prompt, 12, tree=(3, 1, 12), events=events) == truth
        accepted += sum(len(event["accepted"]) for event in events)
        dec.draft_tree = real
        for ids, tokens in seen:
            assert tokens == slow_chain(model, draft, ids, 3), len(ids)
    assert accepted >= 4, "no branch was accepted: the test tests nothing"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama5"])
def test_greedy_identity_with_eagle3(three, name, engine):
    "fp32, every tree shape: transformers' own greedy text."
    folder = three / f"{name}_eagle3"
    dec = Decoder(three / name, folder, "float32", context=128, engine=engine)
    model = decoder.load_target(three / name, torch.float32)
    for prompt in prompts(dec.vocab):
        expected = transformers_text(model, prompt, 20)
        for shape in [None, (1, 1, 1), (4, 1, 4), (2, 5, 3), (3, 4, 12), (5, 8, 31)]:
            assert dec.generate(prompt, 20, tree=shape) == expected, shape


@pytest.mark.parametrize("engine", ENGINES)
def test_taps_are_the_hidden_states(three, engine):
    "A prompt longer than one call of the kernels; and none left behind where nobody asks."
    target = three / "llama5"
    prompt = prompts(101)[2]
    dec = Decoder(target, three / "llama5_eagle3", "float32", context=128, engine=engine)
    read_prompt(dec, prompt)
    model = decoder.load_target(target, torch.float32)
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[layer + 1][0] for layer in (0, 1, 3)], -1)
    assert dec.target.taps == [0, 1, 3]
    assert (dec.target.tapped - expected).abs().max() < 1e-4
    plain = Decoder(target, three / "llama5_eagle", "float32", context=128, engine=engine)
    read_prompt(plain, prompt)
    assert plain.target.tapped is None


def edit(folder, **change):
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | change)


def test_eagle3_of_another_target_is_refused(three, tmp_path):
    random_draft(tmp_path / "deep", three / "llama5", hot=[1, 2, 3], kind="eagle3")
    taps = dict(use_aux_hidden_state=True, eagle_aux_hidden_state_layer_ids=[2, 15, 28])
    edit(tmp_path / "deep", eagle_config=taps)
    with pytest.raises(UserError, match="layers"):
        Decoder(three / "llama5", tmp_path / "deep", "float32", context=64)


@pytest.mark.parametrize("engine", ENGINES)
def test_moved_slots(work, engine):
    dec = Decoder(work / "llama", dtype="float32", engine=engine, context=32)
    target = dec.target
    read_prompt(dec, list(range(9)))

    def at(slots):
        keys = target.keys[..., slots] if engine == "c" else target.keys[:, :, slots]
        return keys.clone(), target.values[:, :, slots].clone()

    keys, values = at([4, 6, 8])
    target.move([4, 6, 8], [3, 4, 5])
    moved_keys, moved_values = at([3, 4, 5])
    assert torch.equal(moved_keys, keys) and torch.equal(moved_values, values)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_twin_has_the_weights_and_a_cache_of_its_own(work, engine):
    dec = Decoder(work / "llama", dtype="float32", engine=engine, context=64)
    prompt = prompts(101)[1]
    states = read_prompt(dec, prompt)
    keys = dec.target.keys.clone()
    twin = dec.target.twin()
    assert not twin.keys.any()
    backwards = prompt[::-1]
    twin.forward(dec.embed[backwards].float(), chain_rows(backwards))
    assert torch.equal(dec.target.keys, keys) and not torch.equal(twin.keys, keys)
    assert torch.equal(twin.forward(dec.embed[prompt].float(), chain_rows(prompt)), states)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_a_batch_gives_each_text_what_it_gets_alone(work, name, engine):
    folder = work / f"{name}_draft"
    dec = Decoder(work / name, folder, "float32", context=256, engine=engine)
    texts = prompts(dec.vocab)
    events = []
    meta = [dict(request=str(i)) for i in range(6)]
    for shape in (None, (3, 1, 3), (3, 4, 9)):
        alone = [dec.generate(prompt, 16, tree=shape) for prompt in texts]
        assert dec.generate_batch(texts, 16, tree=shape) == alone, shape
        mixed = [texts[0], [dec.vocab], *texts[1:], ["x"], [1] * 200]
        with_bad = dec.generate_batch(mixed, 16, tree=shape, events=events, meta=meta)
        assert [with_bad[0], *with_bad[2:4]] == alone
        assert isinstance(with_bad[1], UserError)
        assert isinstance(with_bad[4], ValueError)
        assert "batch" in str(with_bad[5])
    assert {event["request"] for event in events} == {"0", "2", "3"}

    how = dict(tree=(3, 4, 9), temperature=0.9, top_k=20)
    drawn = dec.generate_batch(texts, 16, seed=5, **how)
    assert drawn == [dec.generate(p, 16, seed=5 + i, **how) for i, p in enumerate(texts)]
    end = alone[0][3]
    ended = dec.generate_batch(texts, 16, tree=(3, 4, 9), eos=end)
    assert ended == [dec.generate(prompt, 16, eos=end) for prompt in texts]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen", "llama5"])
def test_a_batch_with_eagle3(three, name, engine):
    """The taps of one text must not be read by another.

    Texts of 1, 7 and 70 tokens side by side, in another order too, greedy and sampled."""
    dec = Decoder(
        three / name,
        three / f"{name}_eagle3",
        "float32",
        context=320 if name == "qwen" else 256,
        engine=engine,
    )
    texts = prompts(dec.vocab)
    for how in (dict(), dict(temperature=0.8, top_k=30, top_p=0.95)):
        for shape in ((4, 1, 4), (3, 4, 12)):
            alone = []
            for i, prompt in enumerate(texts):
                alone.append(dec.generate(prompt, 14, tree=shape, seed=3 + i, **how))
            together = dec.generate_batch(texts, 14, tree=shape, seed=3, **how)
            assert together == alone, (shape, how)
    backwards = dec.generate_batch(texts[::-1], 14, tree=(3, 4, 12))
    assert backwards == [dec.generate(prompt, 14) for prompt in texts[::-1]]


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_accepted_branches_of_one_text_do_not_move_another(three, kind, monkeypatch):
    """Trees that are partly right: slots move in every text of the batch, by different amounts.

    The texts are the target's own. Bare proposals would hardly ever be accepted."""
    dec = Decoder(three / "llama5", three / f"llama5_{kind}", "float32", context=256)
    texts = prompts(101)
    alone = [dec.generate(prompt, 16) for prompt in texts]
    plants = [planted(truth, 101, i, 12) for i, truth in enumerate(alone)]
    greedy = decoder.SamplingOptions()
    number, base = {}, 0  # a text is known by where its slots begin
    for i, prompt in enumerate(texts):
        number[base] = i
        base += dec.check_request(prompt, 16, (3, 2, 12), greedy, base)
    real = dec.draft_tree

    def partly_right(unread, shape):
        real(unread, shape)  # the draft's own slots are written as ever
        i = number[unread.base]
        written = alone[i][: unread.before_root + 1 - len(texts[i])]
        return plants[i](texts[i] + written)

    monkeypatch.setattr(dec, "draft_tree", partly_right)
    events = []
    meta = [dict(request=str(i)) for i in range(3)]
    assert dec.generate_batch(texts, 16, tree=(3, 2, 12), events=events, meta=meta) == alone
    long = [event["request"] for event in events if len(event["accepted"]) >= 2]
    assert set(long) == {"0", "1", "2"}


def written(dec, task, most=1000):
    "A text alone, its prompt in pieces of at most `most` tokens."
    text = dec.write_text(task)
    read = next(text)
    with torch.no_grad():
        while True:
            try:
                read = text.send(dec.read_all([read.cut(most)])[0])
            except StopIteration as end:
                return end.value


def task_of(prompt, new=12, tree=(3, 2, 5), seed=None, **more):
    temperature = 0.0 if seed is None else 0.9
    choose = decoder.chooser(decoder.SamplingOptions(temperature, seed=seed))
    return decoder.DecodeTask(prompt, new, choose, tree, **more)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_pieces_of_a_prompt_are_the_prompt(three, kind, engine):
    dec = Decoder(three / "llama5", three / f"llama5_{kind}", "float32", 256, engine)
    for prompt in prompts(101):
        for seed in (None, 3):
            temperature = 0.0 if seed is None else 0.9
            events, whole_events = [], []
            whole = dec.generate(prompt, 12, (3, 2, 5), temperature, seed=seed, events=whole_events)
            for most in (1, 17, 69) if engine == "c" else (17,):
                tell = decoder.event_keeper(events)
                assert written(dec, task_of(prompt, seed=seed, tell=tell), most) == whole
                trees_of = [
                    [event["tree"]["tokens"] for event in log] for log in (events, whole_events)
                ]
                assert trees_of[0] == trees_of[1]  # the draft has read the same
                events.clear()


BEGINNINGS = {  # a prompt after the text of `prompts(101)[1]`, and how many of its tokens are kept
    "the same": (lambda ids, out: ids, 6),
    "its text and more": (lambda ids, out: ids + out + [5, 6, 7], 17),
    "half its text": (lambda ids, out: ids + out[:5], 11),
    "its beginning": (lambda ids, out: ids[:4], 3),
    "another first token": (lambda ids, out: [ids[0] + 1, *ids[1:]], 0),
    "another second token": (lambda ids, out: [ids[0], ids[1] + 1, *ids[2:]], 0),
    "another last token": (lambda ids, out: [*ids[:-1], ids[-1] + 1], 5),
    "one token": (lambda ids, out: ids[:1], 0),
    "one token more": (lambda ids, out: [*ids, out[0] + 1], 6),
    "nothing in common": (lambda ids, out: [100] * 9, 0),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_what_a_text_leaves_is_used_again(three, kind, engine):
    """In its place and in a copy of it: same text, same proposals. Plain after drafted too.

    After a plain text the draft begins anew, the target does not."""
    dec = Decoder(three / "llama5", three / f"llama5_{kind}", "float32", 256, engine)
    ids = prompts(101)[1]
    cases = list(BEGINNINGS)[: 3 if engine == "torch" else None]
    for case, former, tree in itertools.product(cases, ((3, 2, 5), None), ((3, 2, 5), None)):
        changed, kept = BEGINNINGS[case]
        out = dec.generate(ids, 12)
        prompt = changed(ids, out)
        fresh = []
        expected = dec.generate(prompt, 12, tree, events=fresh)
        held = decoder.Held()
        assert written(dec, task_of(ids, tree=former, held=held)) == out
        assert held.tokens[: len(ids) + 11] == [*ids, *out[:11]]
        count = decoder.reusable(held, prompt, drafting=tree is not None)
        # a last step may have read one token more than the text has
        assert count in ([0] if tree and not former else [kept, kept + (kept == 17)]), case
        drafted = min(count, held.drafted)
        dec.target.copy(0, 128, count)
        dec.draft.copy(0, 128, count)
        for base in (128, 0):
            events = []
            again = decoder.Held(prompt[:count], drafted)
            tell = decoder.event_keeper(events)
            task = task_of(prompt, tree=tree, base=base, held=again, tell=tell)
            assert written(dec, task) == expected, case
            proposed = [event["tree"]["tokens"] for event in events]
            assert proposed == [event["tree"]["tokens"] for event in fresh], case


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("seed", [None, 11])
def test_a_draft_that_rests_changes_nothing(three, kind, engine, seed, monkeypatch):
    "For good, now and then, from the middle on; and what it missed it reads later."
    monkeypatch.setattr(decoder, "MOST_UNREAD", 4)
    dec = Decoder(three / "llama5", three / f"llama5_{kind}", "float32", 256, engine)
    ids = prompts(101)[1]
    how = dict(temperature=0.0 if seed is None else 0.9, seed=seed)
    plain = dec.generate(ids, 30, **how)
    drafted = []
    assert dec.generate(ids, 30, (3, 2, 5), events=drafted, **how) == plain
    proposed = {event["position"]: event["tree"]["tokens"] for event in drafted}
    patterns = ("r", "rrrrrrrrrrrrrrrrrrwwwwwwww", "rrrrrrrw", "w", "rw", "wrrrrrrrrrrrrrrrrr")
    for pattern in patterns[: 2 if engine == "torch" else None]:
        turns = iter(pattern * 30)
        events, held = [], decoder.Held()
        task = task_of(
            ids,
            30,
            seed=seed,
            held=held,
            resting=lambda turns=turns: next(turns) == "r",
            tell=decoder.event_keeper(events),
        )
        assert written(dec, task) == plain, pattern
        assert held.drafted <= len(held.tokens)
        assert pattern == "w" or any(len(event["tree"]["tokens"]) == 1 for event in events)
        for event in events:
            tokens = event["tree"]["tokens"]
            if len(tokens) > 1 and event["position"] in proposed:
                assert tokens == proposed[event["position"]], pattern
        further = ids + plain[:20]
        count = decoder.reusable(held, further, drafting=True)
        assert count >= len(ids) - 1
        assert pattern != "r" or count >= len(ids) + 12  # it has not stayed behind for ever
        again = decoder.Held(further[:count], count)
        seen, fresh = [], []
        tell = decoder.event_keeper(seen)
        assert written(dec, task_of(further, held=again, tell=tell)) == dec.generate(
            further, 12, (3, 2, 5), events=fresh
        )
        assert [e["tree"]["tokens"] for e in seen] == [e["tree"]["tokens"] for e in fresh]


@needs_compiler
def test_texts_of_every_kind_share_a_pass_bit_for_bit(three):
    "bf16: greedy and sampled, plain and drafted, at their prompts and past them, in one pass."
    dec = Decoder(three / "llama5", three / "llama5_eagle", "bfloat16", 128)
    kinds = []
    for i, ids in enumerate([*prompts(101), [5] * 30, [9, 8]]):
        kinds.append(dict(prompt=ids, tree=(3, 2, 5) if i % 2 else None, seed=i if i > 2 else None))
    alone = [written(dec, task_of(**kind)) for kind in kinds]
    shared = dec.target.twin(5 * 256), dec.draft.twin(5 * 256)
    dec.target, dec.draft = shared
    texts = [dec.write_text(task_of(base=256 * i, **kind)) for i, kind in enumerate(kinds)]
    reads, out = {}, {}
    with torch.no_grad():
        for turn in range(60):
            if turn % 2 == 0 and turn // 2 < 5:
                reads[turn // 2] = next(texts[turn // 2])
            results = dec.read_all([read.cut(7) for read in reads.values()])
            for i, verified in zip(list(reads), results):
                try:
                    reads[i] = texts[i].send(verified)
                except StopIteration as end:
                    out[i] = end.value
                    del reads[i]
            if len(out) == 5:
                break
    assert [out[i] for i in range(5)] == alone


def test_a_text_that_fails_on_the_way_leaves_the_others_running(work):
    dec = Decoder(work / "llama", work / "llama_draft", "float32", context=256)
    texts = prompts(101)
    alone = [dec.generate(prompt, 12) for prompt in texts]

    def fails(ids):
        if len(ids) > len(texts[1]) + 4:
            raise RuntimeError("lost")
        return trees.Tree([-1], [ids[-1]])

    tasks = []
    for i, prompt in enumerate(texts):
        propose = fails if i == 1 else None
        task = decoder.DecodeTask(prompt, 12, decoder.GreedyChooser(), propose=propose, base=90 * i)
        tasks.append(dec.write_text(task))
    out = dec.run_texts(tasks)
    assert out[0] == alone[0] and out[2] == alone[2] and isinstance(out[1], RuntimeError)


def test_events_and_end_token(work):
    dec = Decoder(work / "llama", work / "llama_draft", "float32", context=128)
    prompt = prompts(101)[1]
    expected = dec.generate(prompt, 24)
    events = []
    out = dec.generate(
        prompt,
        24,
        tree=(8, 8, 8),
        propose=planted(expected, 101, 0),
        events=events,
        meta=dict(request="r", lang="ru"),
    )
    assert out == expected and sum(event["emitted"] for event in events) == 23
    position = len(prompt)
    for event in events:
        tree, accepted = event["tree"], event["accepted"]
        assert event["position"] == position and event["request"] == "r"
        assert len(tree["parents"]) == len(tree["tokens"]) == len(tree["confidence"])
        parents = [tree["parents"][node] for node in accepted]
        assert parents == [0, *accepted][: len(accepted)]
        position += len(accepted) + 1
    eos = expected[9]
    until = expected[: expected.index(eos) + 1]
    plant = planted(expected, 101, 0)
    assert dec.generate(prompt, 24, tree=(8, 8, 8), propose=plant, eos=eos) == until
    assert dec.generate(prompt, 24, eos=eos) == until


class RandomDraft:
    "Fixed log-probabilities for every node; the pools that it was shown are kept."

    def __init__(self, topk, rng):
        self.topk, self.rng = topk, rng
        self.drawn, self.pools = {}, []

    def guess(self, node):
        if node not in self.drawn:
            shares = np.sort(self.rng.dirichlet(np.ones(self.topk + 1)))[::-1]
            self.drawn[node] = np.log(shares[: self.topk])
        return trees.Continuations(list(range(self.topk)), self.drawn[node])

    def step(self, frontier, pool):
        self.pools.append(pool)
        return [self.guess((len(pool), i)) for i in frontier]


def test_dynamic_tree_is_the_best_connected_one():
    "The kept nodes are the surest of everything proposed; confidence is the path's product."
    rng = np.random.default_rng(0)
    for topk, depth, nodes in [(1, 4, 9), (3, 3, 8), (4, 2, 30)]:
        draft = RandomDraft(topk, rng)
        tree = trees.grow_tree(0, draft.guess("root"), draft.step, depth, topk, nodes)
        pool = draft.pools[-1]
        assert len(tree) == 1 + min(nodes, len(pool))
        assert max(len(tree.path(node)) - 1 for node in range(len(tree))) <= depth
        kept = sorted(tree.confidence[1:], reverse=True)
        proposed = np.exp([candidate.log_confidence for candidate in pool])
        surest = sorted(proposed, reverse=True)[: len(kept)]
        np.testing.assert_allclose(kept, surest, rtol=1e-6)
        for node, parent in enumerate(tree.parents):
            if node:
                assert tree.confidence[node] <= tree.confidence[parent] + 1e-9


def test_a_static_tree_has_its_form_at_every_step_and_the_drafts_best_tokens_in_it(work):
    "Where the forms agree, a static tree is the dynamic one: a chain, all children of the root."
    dec = Decoder(work / "llama", work / "llama_draft", "float32", context=128)
    prompt = prompts(101)[1]
    events = []
    dec.generate(prompt, 16, tree=trees.STATIC, events=events)
    wanted = sorted(len(path) for path in trees.STATIC)
    assert len(events) > 2
    for event in events:
        tree = trees.Tree(**event["tree"])
        assert sorted(len(tree.path(node)) - 1 for node in range(1, 12)) == wanted
    for static, dynamic in [
        (((0,), (0, 0), (0, 0, 0)), (3, 1, 3)),
        (((0,), (1,), (2,)), (1, 3, 3)),
    ]:
        drafted = []
        for shape in (static, dynamic):
            events = []
            dec.generate(prompt, 12, tree=shape, events=events)
            drafted.append([event["tree"] for event in events])
        assert drafted[0] == drafted[1]


@pytest.mark.parametrize(
    "tree, says",
    [
        (((0,), (1, 0)), "parent of each"),
        (((0,), (0,)), "every node once"),
        (((0,), ()), "every node once"),
        (((0,), (-1,)), "ranks must lie"),
        (((0,), (10**6,)), "ranks must lie"),
    ],
)
def test_what_is_no_static_tree_is_refused(work, tree, says):
    dec = Decoder(work / "llama", work / "llama_draft", "float32", context=64)
    with pytest.raises(UserError, match=says):
        dec.generate([1, 2, 3], 4, tree=tree)


def test_sampling_is_exact_and_broken_verifiers_are_caught(tmp_path):
    tiny = eagle_decoding.tiny_target(tmp_path / "tiny")
    good = eagle_decoding.chi2_tests(tiny, 20000, 0)
    assert len(good) == 7 and min(good.values()) * len(good) > 0.01, good
    sampled = eagle_decoding.chi2_tests(tiny, 1500, 0, eagle_decoding.broken_sampled)
    assert max(sampled.values()) < 1e-6
    top = eagle_decoding.chi2_tests(tiny, 1500, 0, eagle_decoding.broken_top)
    assert min(top.values()) * len(top) < 1e-6


def test_whole_decoder_samples_the_target(tmp_path):
    shapes = ((2, 3, 6), ((0,), (1,), (0, 0)))
    good = eagle_decoding.chi2_decoder(tmp_path, 1500, 0, shapes=shapes)
    assert min(good.values()) > 0.01
    for wrong in (eagle_decoding.broken_sampled, eagle_decoding.broken_top):
        bad = eagle_decoding.chi2_decoder(tmp_path, 1500, 0, shapes=shapes[:1], verify=wrong)
        assert max(bad.values()) < 1e-6


def test_broken_greedy_never_passes(tmp_path):
    nano = eagle_decoding.nano_identity(tmp_path, plants=4)
    assert nano["same"] == nano["runs"] == 12
    assert nano["broken_same"] == 0
    assert nano["tokens_per_step"] > 1.3


def test_top_p_keeps_the_smallest_sufficient_set():
    four = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    np.testing.assert_allclose(trees.distribution(four, 1.0, 0.75), [0.625, 0.375, 0, 0], atol=1e-7)
    two = torch.tensor([0.5, 0.5]).log()
    np.testing.assert_allclose(trees.distribution(two, 1.0, 1e-9).sum(), 1)


def test_top_k_then_top_p_as_transformers_do():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    for temperature, top_p, top_k in [
        (1.0, 1.0, 5),
        (0.7, 0.8, 7),
        (1.3, 0.5, 3),
        (1.0, 0.9, 0),
        (1.0, 1.0, 100),
    ]:
        warped = TemperatureLogitsWarper(temperature)(None, scores)
        if top_k:
            warped = TopKLogitsWarper(top_k)(None, warped)
        if top_p < 1:
            warped = TopPLogitsWarper(top_p)(None, warped)
        ours = trees.distribution(scores[0], temperature, top_p, top_k)
        np.testing.assert_allclose(ours, torch.softmax(warped[0], -1).numpy(), atol=1e-6)


def test_classify_tells_a_tie_from_a_bug(work):
    fp32 = Decoder(work / "llama", dtype="float32", context=64)
    prompt = prompts(101)[1]
    true = logits(fp32, prompt)[-1]
    best, *_, worst = true.argsort(descending=True).tolist()
    low = [true + 0.01]
    assert eagle_decoding.classify(prompt, best, worst, fp32, low)["kind"] == "bug"
    assert eagle_decoding.classify(prompt, best, best, fp32, low)["kind"] == "near-tie"


def test_bad_input_is_refused_before_decoding(work, tmp_path):
    dec = Decoder(work / "llama", work / "llama_draft", "float32", context=64)
    prompt = [1, 2, 3]

    def disconnected(ids):
        return trees.Tree([-1, 3, 0], [3, 1, 2])

    for how, word in [
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(tree=(0, 1, 1)), "tree"),
        (dict(tree=(2, 2, 2), propose=disconnected), "not connected"),
    ]:
        with pytest.raises(UserError, match=word):
            dec.generate(prompt, 4, **how)
    for bad, new, word in [
        ([], 4, "prompt"),
        ([101], 4, "prompt"),
        ([-1], 4, "prompt"),
        ([1] * 60, 10, "fit"),
        (prompt, 0, "max_new_tokens"),
    ]:
        with pytest.raises(UserError, match=word):
            dec.generate(bad, new)
    with pytest.raises(UserError, match="draft"):
        Decoder(work / "llama", dtype="float32", context=64).generate(prompt, 4, tree=(1, 1, 1))
    with pytest.raises(UserError, match="width"):
        Decoder(work / "llama", work / "qwen_draft", "float32", context=64)
    with pytest.raises(UserError, match="nowhere"):
        Decoder(tmp_path / "nowhere")


def test_damaged_drafts_and_targets_are_refused(work, tmp_path):
    from safetensors.torch import load_file, save_file

    random_draft(tmp_path / "nan", work / "llama", hot=[1, 2, 3])
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["fc.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors")
    with pytest.raises(UserError, match="NaN"):
        Decoder(work / "llama", tmp_path / "nan", "float32", context=64)
    random_draft(tmp_path / "hot", work / "llama", hot=[1, 2, 3])
    write_json(tmp_path / "hot" / "hot_tokens.json", [1, 2, 999])
    with pytest.raises(UserError, match="hot"):
        Decoder(work / "llama", tmp_path / "hot", "float32", context=64)
    random_draft(tmp_path / "vocab", work / "llama", hot=[1, 2, 3])
    edit(tmp_path / "vocab", vocab_size=77)
    with pytest.raises(UserError, match="vocabulary"):
        Decoder(work / "llama", tmp_path / "vocab", "float32", context=64)
    model = decoder.load_target(work / "llama", torch.float32)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="finite"):
        Decoder(tmp_path / "broken", dtype="float32", context=64).generate([1, 2], 4)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        Decoder(tmp_path / "gpt2")


def test_without_a_compiler_torch_does_the_work(work, monkeypatch):
    monkeypatch.setenv("TPRO_NB_NO_KERNELS", "1")
    dec = Decoder(work / "llama", work / "llama_draft", "float32", context=64)
    assert dec.kind == "torch"
    assert dec.generate([1, 2, 3], 8, tree=(2, 2, 4)) == dec.generate([1, 2, 3], 8)
    with pytest.raises(UserError, match="compil"):
        Decoder(work / "llama", engine="c")


# Forms of the torch engine for a GPU


WAYS = [dict(attention="fused"), dict(steps="fixed"), dict(attention="fused", steps="fixed")]


def way_name(way):
    return "-".join(way.values())


def torch_decoder(work, name, way=None):
    return Decoder(
        work / name,
        work / f"{name}_draft",
        "float32",
        context=128,
        engine="torch",
        **(way or {}),
    )


@pytest.mark.parametrize("way", WAYS, ids=way_name)
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_forms_for_a_gpu_give_the_same_text(work, name, way):
    """Attention without enable_gqa, and the pass of fixed shape.

    Logits up to rounding, text token for token, alone and in a batch."""
    plain, other = torch_decoder(work, name), torch_decoder(work, name, way)
    for i, prompt in enumerate(prompts(plain.vocab)):
        assert (logits(plain, prompt) - logits(other, prompt)).abs().max() < 2e-4
        expected = plain.generate(prompt, 12)
        for shape in (None, (1, 1, 1), (3, 4, 12)):
            assert other.generate(prompt, 12, tree=shape) == expected, shape
        plant = planted(expected, plain.vocab, i, 16)
        assert other.generate(prompt, 12, tree=(9, 9, 24), propose=plant) == expected
    two = prompts(plain.vocab)[:2]
    together = other.generate_batch(two, 8, tree=(2, 3, 5))
    assert together == [plain.generate(prompt, 8) for prompt in two]


@pytest.mark.parametrize("way", WAYS, ids=way_name)
def test_forms_for_a_gpu_round_no_worse_in_bf16(work, way):
    def read(dtype, **how):
        dec = Decoder(work / "llama", dtype=dtype, context=128, engine="torch", **how)
        return logits(dec, prompts(101)[2])

    true, plain, other = read("float32"), read("bfloat16"), read("bfloat16", **way)
    assert (other - plain).abs().max() <= 3 * (plain - true).abs().max()


class Listener(TorchDispatchMode):
    "Writes down every operation with the shapes of its tensors."

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        self.heard.append((str(operation), *shapes))
        return operation(*args, **(kwargs or {}))


def siblings(past):
    "Two rows at one position after `past` tokens, which do not see each other."
    return [PassRow(0, past, past + i, 0, past, [past + i]) for i in range(2)]


def heard(engine, past):
    "The operations of one pass over two siblings."
    run_layers, listener = engine.run_layers, Listener()

    def listen(*args):
        with listener:
            return run_layers(*args)

    engine.fixed_passes.clear()
    engine.run_layers = listen
    engine.forward(torch.ones(2, 96), siblings(past))
    del engine.run_layers
    return listener.heard


def test_fixed_pass_is_the_same_whatever_it_holds(work):
    """What a CUDA graph asks for: the same operations on the same shapes.

    And none that reads a value back. The free pass is the counterexample."""

    def engine(steps):
        target = work / "llama"
        return Decoder(target, dtype="float32", context=128, engine="torch", steps=steps).target

    fixed, free = engine("fixed"), engine("free")
    assert heard(fixed, 20) == heard(fixed, 90) and heard(free, 20) != heard(free, 90)
    for name, *_ in heard(fixed, 20):
        assert "_local_scalar_dense" not in name and "nonzero" not in name


def test_capture_as_far_as_a_cpu_goes(work, monkeypatch):
    """Stand-ins for torch.cuda, whose graph repeats the pass into the captured result.

    One capture a width, and results that the next replay does not overwrite."""
    dec = torch_decoder(work, "llama", dict(steps="fixed"))
    engines, made = (dec.target, dec.draft), []

    class Graph:
        def __init__(self):
            made.append(self)

        def its_pass(self):
            for engine in engines:
                for kept in engine.fixed_passes.values():
                    if kept.graph is self:
                        return engine, kept

        def replay(self):
            engine, kept = self.its_pass()
            again = engine.run_layers(kept.inputs, slice(0, engine.slots))
            for captured, new in zip(kept.outputs, again):
                if captured is not None:
                    captured.copy_(new)

    class Stream:
        def wait_stream(self, other):
            pass

    def context(*args):
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, context)

    prompt = prompts(101)[1]
    expected = dec.generate(prompt, 16, tree=(3, 4, 12))
    for engine in engines:
        engine.steps = "graph"
        engine.fixed_passes.clear()
    for _ in range(2):
        assert dec.generate(prompt, 16, tree=(3, 4, 12)) == expected
    assert len(made) == sum(len(engine.fixed_passes) for engine in engines) > 2

    first = dec.target.forward(torch.ones(2, 96), siblings(20))
    kept = first.clone()
    second = dec.target.forward(-torch.ones(2, 96), siblings(20))
    assert torch.equal(first, kept) and not torch.equal(first, second)


@pytest.mark.parametrize(
    "way,says",
    [
        (dict(attention="flush"), "attention"),
        (dict(steps="fast"), "steps"),
        (dict(engine="c", steps="fixed"), "torch engine"),
    ],
)
def test_unknown_forms_are_refused(way, says):
    with pytest.raises(UserError, match=says):
        Decoder("no such model", **way)  # before anything is loaded


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_graphs_without_cuda_are_refused_first(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA graphs"):
        Decoder("no such model", device=device, steps="graph")


# The kernels' files


def test_large_pages_keep_what_they_are_given():
    tensors = [torch.randn(3, 32), torch.randn(5, 16).bfloat16(), torch.randn(2**20)]
    out = c_engine.large_pages(tensors)
    for given, kept in zip(tensors, out):
        assert torch.equal(given, kept) and given.dtype == kept.dtype
    assert out[0].data_ptr() % 2**21 == 0
    assert out[1].data_ptr() == out[0].data_ptr() + tensors[0].nbytes
    tensors[0][:] = 0
    assert out[0].any()


@needs_compiler
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("march", ["native", "x86-64", "x86-64-v3"])
def test_kernels_compile_without_a_warning(tmp_path, march, bf16):
    if march != "native" and os.uname().machine != "x86_64":
        pytest.skip("another processor")
    strict = ("-Wall", "-Wextra", "-Werror", f"-march={march}")
    flags = (*c_engine.KERNEL_FLAGS, *strict)
    done = c_engine.compile_kernels(c_engine.c_compiler(), tmp_path / "lib.so", bf16, flags)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_kernels_name_holds_their_sources_and_flags(tmp_path, monkeypatch):
    for path in c_engine.kernel_files():
        (tmp_path / path.name).write_text(path.read_text())
    flags = c_engine.KERNEL_FLAGS
    installed = c_engine.kernels_key("cc", flags)
    monkeypatch.setattr(c_engine, "KERNELS", tmp_path)
    assert c_engine.kernels_key("cc", flags) == installed
    assert c_engine.kernels_key("cc", [*flags, "-g"]) != installed
    assert c_engine.kernels_key("clang", flags) != installed
    for name in ("model.h", "product.c"):
        before = c_engine.kernels_key("cc", flags)
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        assert c_engine.kernels_key("cc", flags) != before


@needs_compiler
def test_kernels_under_address_and_undefined_sanitizers(tmp_path):
    "No read or write out of bounds, nothing undefined; the control shows that one would be seen."
    compiler = c_engine.c_compiler()
    found = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("no sanitizer's library beside this compiler")
    script = Path(__file__).parent / "kernels_child.py"

    def run(part):
        own = dict(
            LD_PRELOAD=found,
            ASAN_OPTIONS="detect_leaks=0",
            TPRO_NB_CACHE=str(tmp_path / "cache"),
            OMP_NUM_THREADS="2",
        )
        return subprocess.run(
            [sys.executable, str(script), part],
            env=os.environ | own,
            capture_output=True,
            text=True,
        )

    good = run("all")
    report = good.stdout[-2000:] + good.stderr[-8000:]
    assert good.returncode == 0 and good.stdout.endswith("through\n"), report
    assert "Sanitizer" not in good.stderr and "runtime error" not in good.stderr, report
    control = run("overrun")
    assert control.returncode != 0 and "AddressSanitizer" in control.stderr


@needs_compiler
@pytest.mark.parametrize("limit", [dict(OMP_THREAD_LIMIT="1"), dict(OMP_DYNAMIC="true"), {}])
def test_a_pass_waits_for_the_threads_that_came(limit):
    "OpenMP may grant fewer threads than asked for; a barrier that counts on more never opens."
    script = Path(__file__).parent / "limited_child.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | limit,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "equal\n", done.stdout + done.stderr


def test_the_decoder_loads_no_trainer():
    "A reader who only decodes waits for torch and for nothing else."
    code = (
        "import sys, time\n"
        "import torch\n"
        "start = time.perf_counter()\n"
        "import tpro_nb.decoder\n"
        "print(f'{time.perf_counter() - start:.2f} s after torch')\n"
        "heavy = {'transformers', 'trl', 'peft', 'datasets', 'accelerate'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, loaded = done.stdout.splitlines()
    print(seconds)
    assert loaded == ""
