"The draft layer, its data, hot tokens, rollout and resume, on the toy world."

import os
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from tpro_nb import eagle_draft
from tpro_nb.core import UserError, read_json, toy
from tpro_nb.draft_model import (
    DraftKV,
    Eagle3Draft,
    EagleDraft,
    aux_layers,
    check_draft,
    draft_config,
    draft_shapes,
    random_draft,
)
from tpro_nb.eagle_draft import (
    DraftTraining,
    collate,
    draft_loss,
    draft_losses,
    heldout,
    new_draft,
    rollout_mask,
    target_matrices,
    target_model,
    train_draft,
)
from tpro_nb.launch import launch
from tpro_nb.target_text import (
    ShardSettings,
    chain_prompts,
    estimate_shards,
    general_prompts,
    generate_with_features,
    hot_tokens,
    load_shards,
    make_shards,
    plan_answers,
    render,
    save_shard,
)

TARGET = str(toy("09_dpo/model"))
HOT = list(range(400))
SHARDS = ShardSettings(
    max_new=10, batch=4, temperatures=[0.0, 0.8], token_budget=400, budget_mb=50, seed=0
)
FIT = DraftTraining(
    epochs=1,
    lr=1e-3,
    batch=4,
    w_feat=1.0,
    w_token=0.1,
    noise=0.1,
    beta2=0.95,
    clip=0.5,
    warmup=2,
    depth=2,
    seed=0,
    evals=1,
)


class Text(NamedTuple):
    "A target's text in a folder."

    prompts: list
    report: dict
    folder: Path


class Stub:
    "A stand-in for EAGLE-1: `fn` in the layer's place."

    feature_loss = True

    def __init__(self, fn):
        self.fn = fn

    def __call__(self, *args):
        return self.fn(*args)

    def begin(self, feat):
        return feat

    logits = EagleDraft.logits


def training_config(settings, data, folder, hot=HOT) -> dict:
    "Arguments of `train_draft`: text and held-out text are one, all it makes goes to `folder`."
    return dict(
        target=TARGET,
        data=str(data),
        held=str(data),
        out=str(folder / "draft"),
        work=str(folder),
        hot=hot,
        settings=asdict(settings),
    )


def trained(settings, data, folder) -> dict:
    folder.mkdir(exist_ok=True)
    return train_draft(**training_config(settings, data, folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    work = tmp_path_factory.mktemp("data")
    prompts = chain_prompts(toy("05j_data/prompts.jsonl"))["train"]
    return Text(prompts, make_shards(TARGET, prompts, work, SHARDS), work)


@pytest.fixture(scope="module")
def data3(data, tmp_path_factory):
    "The same text with the three layers EAGLE-3 reads, and without any feature."
    folder = tmp_path_factory.mktemp("data3")
    variants = dict(eagle3=replace(SHARDS, kind="eagle3"), online=replace(SHARDS, online=True))
    texts = {}
    for name, settings in variants.items():
        report = make_shards(TARGET, data.prompts, folder / name, settings)
        texts[name] = Text(data.prompts, report, folder / name)
    return texts


def nano_llama(**changes) -> LlamaConfig:
    "A config of the sizes that the layer tests use."
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        vocab_size=50,
        attn_implementation="eager",
    )
    return LlamaConfig(**(sizes | changes))


def transformers_layer(layer, config, x, residual, positions):
    "Attention of transformers' Llama layer over `x`, causal, as it is added to `residual`."
    n = positions.shape[1]
    out = layer.self_attn(
        x,
        attention_mask=torch.full((n, n), float("-inf")).triu(1)[None, None],
        position_embeddings=LlamaRotaryEmbedding(config)(residual, positions),
    )
    return residual + out[0]


def test_llama_layer_is_transformers_llama_layer():
    "Same weights, same numbers as transformers' attention and MLP without the input norm."
    config = nano_llama()
    draft = EagleDraft(draft_config(config))
    layer = LlamaDecoderLayer(config, 0)
    layer.input_layernorm = torch.nn.Identity()
    layer.load_state_dict(draft.layers[0].state_dict())
    emb, feat, positions = torch.randn(1, 5, 32), torch.randn(1, 5, 32), torch.arange(5)[None]
    x = draft.fc(torch.cat([emb, feat], -1))
    want = layer(
        x,
        attention_mask=torch.full((5, 5), float("-inf")).triu(1)[None, None],
        position_embeddings=LlamaRotaryEmbedding(config)(x, positions),
        position_ids=positions,
    )
    want = want[0] if isinstance(want, tuple) else want
    assert torch.allclose(draft(emb, feat, positions), want, atol=1e-5)


def test_cache_pieces_equal_whole(tmp_path):
    draft = random_draft(tmp_path, TARGET)
    hidden = draft.config["hidden_size"]
    emb, feat = torch.randn(1, 7, hidden), torch.randn(1, 7, hidden)
    positions = torch.arange(7)[None]
    kv = DraftKV()
    whole = draft(emb, feat, positions)
    draft(emb[:, :5], feat[:, :5], positions[:, :5], kv)
    kv.crop(3)
    tail = draft(emb[:, 3:], feat[:, 3:], positions[:, 3:], kv)
    assert len(kv) == 7
    assert torch.allclose(tail, whole[:, 3:], atol=1e-5)


def test_save_load_and_wrong_names(tmp_path):
    draft = random_draft(tmp_path, TARGET, hot=[3, 5, 7])
    assert EagleDraft.load(tmp_path).hot_tokens.tolist() == [3, 5, 7]
    assert check_draft(tmp_path) == draft_shapes(draft.config)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "weights are as readable as the other files"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.fc.bias"] = tensors.pop("fc.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="fc.bias: missing"):
        EagleDraft.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match="cannot read"):
        EagleDraft.load(tmp_path)


@pytest.mark.parametrize("hot", [[], [1, 1], [-1], [10**6]])
def test_bad_hot_tokens(hot):
    with pytest.raises(UserError, match="hot tokens"):
        EagleDraft(draft_config(TARGET), hot)


def test_prompts_are_disjoint_and_stable():
    general = general_prompts()
    held = general["eval"] + general["dev"]
    everything = general["train"] + held
    assert general == general_prompts()
    assert len(general["train"]) >= 300
    assert not {p["prompt"] for p in held} & {p["prompt"] for p in general["train"]}
    assert len({p["id"] for p in everything}) == len(everything)
    assert len(general["eval"]) >= 24
    assert len(general["dev"]) >= 12
    assert len({p["domain"] for p in general["eval"]}) >= 6
    assert len({p["domain"] for p in general["dev"]}) >= 6
    assert not any("{" in p["prompt"] for p in everything)

    def topics(prompts):
        return {p["id"].rsplit("-", 1)[0] for p in prompts}

    assert not topics(general["train"]) & topics(held)


def test_chain_prompts_split_by_prompt():
    chain = chain_prompts(toy("05j_data/prompts.jsonl"))
    train, held, dev = ({p["prompt"] for p in chain[split]} for split in ("train", "eval", "dev"))
    assert train and held and dev
    assert not (train & held or train & dev or held & dev)
    assert {p["mode"] for p in chain["eval"]} == {"think", "direct"}


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_padded_batch_equals_each_alone(arch):
    if arch == "qwen3":
        model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    else:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config).eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    for row in generate_with_features(model, prompts, [0.0] * 3, {-1}, 6, 0):
        with torch.no_grad():
            hidden = model.model(torch.tensor([row["ids"]])).last_hidden_state[0]
        assert torch.allclose(row["feats"].float(), hidden[:-1], atol=2e-2, rtol=1e-2)
        greedy = model.lm_head(hidden[row["start"] - 1 : -1]).argmax(-1).tolist()
        assert greedy == row["ids"][row["start"] :]


def test_sampling_follows_softmax():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.8,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        p = (model(torch.tensor([[1, 2]])).logits[0, -1] / 0.7).softmax(-1)
    rows = generate_with_features(model, [[1, 2]] * 4000, [0.7] * 4000, {-1}, 1, 3)
    drawn = torch.tensor([row["ids"][-1] for row in rows])
    assert (torch.bincount(drawn, minlength=5) / 4000 - p).abs().max() < 0.03


def test_plan_takes_every_prompt_once_before_any_twice_and_pads_little():
    size = [9, 2, 5, 7, 1]
    plan = plan_answers(size, [0.0, 0.8], 7, 2)
    answers = [answer for shard in plan for answer in shard]
    assert sorted(answers) == [
        (0, 0.0),
        (0, 0.8),
        (1, 0.0),
        (1, 0.8),
        (2, 0.0),
        (3, 0.8),
        (4, 0.0),
    ]
    assert [len(shard) for shard in plan] == [2, 2, 2, 1]
    sizes = [size[answer.row] for answer in answers]
    assert sizes == sorted(sizes)


def test_data_resumes_and_respects_budget(data):
    shards = sorted(data.folder.glob("shard_*"))
    before = [shard.read_bytes() for shard in shards]
    ids = load_file(shards[-1])["ids"]
    shards[-1].unlink()  # as if killed before the last shard
    again = make_shards(TARGET, data.prompts, data.folder, SHARDS)
    assert again["new_tokens"] == data.report["new_tokens"]
    for shard, content in zip(shards[:-1], before):
        assert shard.read_bytes() == content
    assert torch.equal(load_file(shards[-1])["ids"], ids)
    with pytest.raises(UserError, match="budget_mb"):
        make_shards(TARGET, data.prompts, data.folder, replace(SHARDS, budget_mb=-1))


def test_collate_shift(data):
    row = load_shards(data.folder)[0]
    batch, i = collate([row]), row["start"] - 2
    assert batch.tokens[0, i] == row["ids"][i + 1]
    assert batch.labels[0, i] == row["ids"][i + 2] == row["ids"][row["start"]]
    assert torch.equal(batch.feats[0, i], row["feats"][i])
    assert torch.equal(batch.goals[0, i], row["feats"][i + 1])
    assert batch.answer[0].sum() == len(row["ids"]) - row["start"]


def test_perfect_features_give_zero_feature_loss(data):
    "A stand-in that returns the goal has no feature loss and the least possible cross-entropy."
    batch = collate(load_shards(data.folder)[:3])
    emb, head = target_matrices(TARGET)

    def oracle(*_):
        return batch.goals.float()

    def blurred(*_):
        return batch.goals.float() + torch.randn_like(batch.goals.float())

    perfect = draft_loss(Stub(oracle), batch, emb, head, 1.0, 0.1)
    worse = draft_loss(Stub(blurred), batch, emb, head, 1.0, 0.1)
    assert perfect.feature == 0
    assert worse.feature > 0
    assert worse.token > perfect.token


class Oracle(Stub):
    "Gives the true features of one text, a place further on at every call."

    def __init__(self, row, vocab):
        self.row = row
        self.hot_tokens = torch.arange(vocab)
        self.calls = 0

    def __call__(self, emb, feat, positions, kv, mask):
        self.calls += 1
        out = torch.zeros(1, emb.shape[1], emb.shape[2])
        true = self.row["feats"][self.calls :].float()[: emb.shape[1]]
        out[0, : len(self.row["feats"]) - self.calls] = true
        return out


def test_heldout_counts_a_draft_that_knows(data):
    "Rolling out a draft that returns the true features hits at every depth on greedy text."
    tok = AutoTokenizer.from_pretrained(TARGET)
    size = [len(render(tok, row["prompt"], row["mode"])) for row in data.prompts]
    plan = plan_answers(size, [0.0, 0.8], 40, 4)
    temperatures = [answer.temperature for shard in plan for answer in shard]
    texts = zip(load_shards(data.folder), temperatures, strict=True)
    greedy = [row for row, temperature in texts if temperature == 0]
    emb, head = target_matrices(TARGET)
    for row in greedy[:2]:
        seen = heldout(Oracle(row, len(head)), [row], emb, head, 3)
        assert seen["top1"] > 0.9
        assert seen["depth"][0] > 0.9
        assert seen["depth"][1] > 0.9


def test_rollout_mask():
    assert rollout_mask(3, 2).tolist() == [
        [True, False, False, True, False, False],
        [True, True, False, False, True, False],
        [True, True, True, False, False, True],
    ]


def test_hot_tokens_keep_bytes_and_specials():
    tok = AutoTokenizer.from_pretrained(TARGET)
    hot = hot_tokens(tok, Counter({300: 50, 301: 40}), ["ru"], 300, {tok.eos_token_id})
    vocab = tok.get_vocab()
    assert len(hot) == len(set(hot)) == 300
    assert {300, 301, tok.eos_token_id, vocab["<think>"], vocab["</think>"]} <= set(hot)
    assert {vocab[char] for char in ByteLevel.alphabet()} <= set(hot)


class CountedSteps:
    "`training_step`, counted; the n-th of them dies where `dies_at` is given."

    def __init__(self, dies_at=None):
        self.real = eagle_draft.training_step
        self.dies_at = dies_at
        self.taken = 0

    def __call__(self, *args):
        self.taken += 1
        if self.taken == self.dies_at:
            raise KeyboardInterrupt
        return self.real(*args)


def test_training_resumes_to_the_same_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(eagle_draft, "SAVE_EVERY_S", 0.0)
    settings = replace(FIT, epochs=6, evals=6)
    whole_steps, killed_steps, later_steps = CountedSteps(), CountedSteps(5), CountedSteps()
    monkeypatch.setattr(eagle_draft, "training_step", whole_steps)
    whole = trained(settings, data.folder, tmp_path / "a")
    monkeypatch.setattr(eagle_draft, "training_step", killed_steps)
    with pytest.raises(KeyboardInterrupt):
        trained(settings, data.folder, tmp_path / "b")
    monkeypatch.setattr(eagle_draft, "training_step", later_steps)
    again = trained(settings, data.folder, tmp_path / "b")
    assert later_steps.taken == whole_steps.taken - 4, (
        "the four steps before the kill were done again"
    )
    assert len(again["curve"]) == len(whole["curve"])
    assert whole["curve"][-1][2] < whole["curve"][0][2]
    one = load_file(tmp_path / "a" / "draft" / "model.safetensors")
    other = load_file(tmp_path / "b" / "draft" / "model.safetensors")
    assert all(torch.allclose(one[name].float(), other[name].float(), atol=1e-2) for name in one)


def test_unrolled_loss_feeds_the_draft_its_own_feature(data):
    "At depth two the goal is one place further and the input is the guess of depth one."
    batch = collate(load_shards(data.folder)[:2])
    emb, head = target_matrices(TARGET)
    seen = []

    def spy(emb, feat, positions, kv, mask):
        seen.append((emb, feat, positions, mask))
        return feat + 1

    draft_loss(Stub(spy), batch, emb, head, 1.0, 0.1, unroll=2)
    (emb1, feat1, positions1, mask1), (emb2, feat2, positions2, mask2) = seen
    length = batch.tokens.shape[1]
    assert mask1 is None
    assert mask2.shape == (length, 2 * length)
    assert torch.equal(feat2, feat1 + 1)
    assert torch.equal(positions2, positions1 + 1)
    assert torch.equal(emb2[:, 0], emb1[:, 1])


def test_chunked_loss_equals_whole():
    torch.manual_seed(0)
    goal, head = torch.randn(50, 16), torch.randn(30, 16)
    token_losses, gradients = [], []
    for chunk in (8192, 7):
        guess = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        feature_loss, token_loss = draft_losses(Stub(None), guess, goal, head, chunk)
        (feature_loss + token_loss).backward()
        token_losses.append(token_loss.item())
        gradients.append(guess.grad)
    assert abs(token_losses[0] - token_losses[1]) < 1e-4
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_eagle3_layer_is_llama_over_both_inputs():
    """Midlayer is transformers' attention over cat(norm(embedding), norm(state)).

    The residual carries the state; logits = head(norm).
    """
    config = nano_llama(num_hidden_layers=6)
    draft = Eagle3Draft(draft_config(config, "eagle3"), [7, 3, 9])
    middle = draft.midlayer
    norms = (draft.norm, middle.input_layernorm, middle.hidden_norm)
    assert all((norm.weight == 1).all() for norm in norms)
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    layer = LlamaDecoderLayer(config, 0)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer.self_attn, name, getattr(middle.self_attn, name))
    weights = middle.state_dict()
    del weights["hidden_norm.weight"]
    layer.load_state_dict(weights)

    def rms(x, weight):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)

    emb, aux, positions = torch.randn(1, 5, 32), torch.randn(1, 5, 96), torch.arange(5)[None]
    state = aux @ draft.fc.weight.T
    both = [rms(emb, middle.input_layernorm.weight), rms(state, middle.hidden_norm.weight)]
    x = transformers_layer(layer, config, torch.cat(both, -1), state, positions)
    want = x + layer.mlp(layer.post_attention_layernorm(x))
    got = draft(emb, draft.begin(aux), positions)
    assert torch.allclose(got, want, atol=1e-5)
    logits = rms(want, draft.norm.weight) @ draft.lm_head.weight.T
    assert torch.allclose(draft.logits(got), logits, atol=1e-5)


def test_eagle3_folder_is_sglangs(tmp_path):
    """Names, shapes and config of LlamaForCausalLMEagle3.

    d2t holds target id - draft id, in int64; the map decides when loading.
    """
    random_draft(tmp_path, TARGET, hot=[30, 5, 70], kind="eagle3")
    file = tmp_path / "model.safetensors"
    tensors, config = load_file(file), read_json(tmp_path / "config.json")
    hidden, inner, q, kv = 64, 128, 64, 32
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert shapes == {
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.self_attn.q_proj.weight": (q, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, q),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (3, hidden),
        "d2t": (3,),
    }
    assert shapes == check_draft(tmp_path)
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["d2t"].tolist() == [30, 4, 68]
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == 3
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    (tmp_path / "hot_tokens.json").unlink()
    again = EagleDraft.load(tmp_path)
    assert isinstance(again, Eagle3Draft)
    assert again.hot_tokens.tolist() == [30, 5, 70]
    save_file(tensors | {"d2t": torch.tensor([30, 4, 10**6])}, file)
    with pytest.raises(UserError, match="hot tokens"):
        EagleDraft.load(tmp_path)
    del tensors["d2t"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="d2t: missing"):
        EagleDraft.load(tmp_path)


def test_three_different_layers_below_the_last():
    for n in range(4, 60):
        low, middle, high = aux_layers(n)
        assert 0 <= low < middle < high <= n - 2, n
    # SGLang's default {2, n//2, n-3}, counted by what goes into a layer
    assert aux_layers(30) == [1, 14, 26]
    assert aux_layers(32) == [1, 15, 28]
    with pytest.raises(UserError, match="three"):
        aux_layers(3)
    with pytest.raises(UserError, match="eagle4"):
        draft_config(TARGET, "eagle4")


def test_the_text_is_the_same_whatever_is_kept(data, data3):
    one = load_shards(data.folder)
    three = load_shards(data3["eagle3"].folder)
    none = load_shards(data3["online"].folder)
    for with_one, with_three, with_none in zip(one, three, none):
        assert torch.equal(with_one["ids"], with_three["ids"])
        assert torch.equal(with_one["ids"], with_none["ids"])
        assert with_none["feats"] is None


def test_kept_layers_are_the_targets(data3):
    "The layers kept are transformers' hidden states; the plan counts them."
    model = target_model(TARGET).float()
    for row in load_shards(data3["eagle3"].folder)[:3]:
        with torch.no_grad():
            states = model.model(row["ids"][None], output_hidden_states=True).hidden_states
        # [i + 1] is the output of layer i, the last one normalised
        want = torch.cat([states[i][0, :-1] for i in (1, 2, 3, 4)], -1)
        assert torch.allclose(row["feats"].float(), want, atol=5e-2, rtol=5e-2)
        batch = collate([row], width=64)
        assert torch.equal(batch.feats[0], row["feats"][:-1, :192])
        assert torch.equal(batch.goals[0], row["feats"][1:, 192:])
    none, one, four = (
        estimate_shards(model.config, 10**6, 10**6, 1, 1, states)["disk_mb"] for states in (0, 1, 4)
    )
    assert four - none == pytest.approx(4 * (one - none), abs=3)
    assert none < 10


@pytest.mark.parametrize("unroll", [1, 3])
def test_eagle3_learns(data3, tmp_path, unroll):
    "The token loss falls (by little: the toy target is nearly uniform) and hits rise."
    folder = data3["eagle3"].folder
    settings = replace(FIT, lr=3e-3, epochs=25, kind="eagle3", unroll=unroll)
    result = trained(settings, folder, tmp_path)
    first, last = result["curve"][0], result["curve"][-1]
    emb, head = target_matrices(TARGET)
    before = heldout(new_draft("eagle3", TARGET, HOT, head), load_shards(folder), emb, head, 2)
    assert first[1] == last[1] == 0, "there is no feature loss"
    assert last[2] < first[2] - 0.01
    assert result["heldout"]["top1"] > before["top1"] + 0.1
    assert check_draft(tmp_path / "draft")


def test_lm_head_starts_as_the_targets_rows():
    head = target_matrices(TARGET)[1]
    draft = new_draft("eagle3", TARGET, [5, 3], head)
    assert torch.equal(draft.lm_head.weight, head[[5, 3]].float())


def test_eagle3_unrolls_over_its_own_state(data3):
    "Depth two reads what depth one gave out; fc is applied once."
    rows = load_shards(data3["eagle3"].folder)[:2]
    emb, head = target_matrices(TARGET)
    draft = new_draft("eagle3", TARGET, HOT, head)
    read, given, begun = [], [], []

    def watch_layer(module, args, out):
        read.append(args[1])
        given.append(out)

    def watch_fc(module, args, out):
        begun.append(out)

    draft.midlayer.register_forward_hook(watch_layer)
    draft.fc.register_forward_hook(watch_fc)
    batch = collate(rows, width=64)
    draft_loss(draft, batch, emb, head[draft.hot_tokens], 1.0, 0.1, unroll=3)
    assert len(begun) == 1
    assert len(read) == 3
    assert torch.equal(read[0], begun[0])
    assert torch.equal(read[1], given[0])
    assert torch.equal(read[2], given[1])


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_online_labels_equal_kept_ones(data, data3, tmp_path, kind):
    settings = replace(FIT, noise=0.0, epochs=2, kind=kind)
    with_features = data.folder if kind == "eagle" else data3["eagle3"].folder
    kept = trained(settings, with_features, tmp_path / "kept")
    online = trained(replace(settings, online=True), data3["online"].folder, tmp_path / "online")
    losses = [entry[2] for entry in kept["curve"]]
    assert [entry[2] for entry in online["curve"]] == pytest.approx(losses, rel=1e-2)
    assert online["heldout"]["top1"] == pytest.approx(kept["heldout"]["top1"], abs=0.03)


def test_the_curve_along_training_is_over_the_development_prompts(data, tmp_path, monkeypatch):
    "They are the first prompts, not the first texts: shards hold texts by their prompts' length."
    seen = []

    def watched(draft, rows, *args):
        seen.append({row["row"] for row in rows})
        return heldout(draft, rows, *args)

    monkeypatch.setattr(eagle_draft, "heldout", watched)
    trained(replace(FIT, curve_rows=3), data.folder, tmp_path)
    everyone = {row["row"] for row in load_shards(data.folder)}
    along, at_the_end = seen[:-1], seen[-1]
    assert len(everyone) > 3
    assert at_the_end == everyone
    assert along
    assert all(rows == {row for row in everyone if row < 3} for rows in along)


def test_features_of_the_other_kind_are_refused(data, data3, tmp_path):
    with pytest.raises(UserError, match="another kind"):
        trained(replace(FIT, kind="eagle3"), data.folder, tmp_path)
    with pytest.raises(UserError, match="another kind"):
        trained(FIT, data3["eagle3"].folder, tmp_path)
    with pytest.raises(UserError, match="online"):
        trained(FIT, data3["online"].folder, tmp_path)


@pytest.mark.parametrize("kind", ["eagle3"])
def test_two_processes_train_what_one_does(data3, tmp_path, monkeypatch, kind):
    """Online labels in fp32 over gloo: each rank has the target and half of every batch.

    The weights are those of one process, to 1e-5. Answers differ in length, so that a plain mean
    over ranks is wrong.
    """
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    rows = load_shards(data3["online"].folder)
    shorter = [
        row | dict(ids=row["ids"][: row["start"] + 3 + i % 7].tolist())
        for i, row in enumerate(rows)
    ]
    save_shard(shorter, tmp_path / "shard_0000.safetensors", 0.0)
    settings = replace(FIT, noise=0.0, warmup=1, batch=6, kind=kind, unroll=2, online=True)
    result, weights = {}, {}
    for nproc in (1, 2):
        folder = tmp_path / str(nproc)
        folder.mkdir()
        job = dict(nproc=nproc, config=training_config(settings, tmp_path, folder))
        result[nproc] = launch("dist_draft:train_fp32", job, folder / "job", nproc=nproc, threads=1)
        weights[nproc] = load_file(folder / "weights.safetensors")
    assert result[1]["world"] == 1
    assert result[2]["world"] == 2
    assert result[2]["backend"] == "gloo"
    assert result[1]["steps"] == result[2]["steps"] >= 3
    losses = [entry[2] for entry in result[1]["curve"]]
    assert [entry[2] for entry in result[2]["curve"]] == pytest.approx(losses, abs=1e-5)
    start = new_draft(kind, TARGET, HOT, target_matrices(TARGET)[1])
    for name, value in weights[1].items():
        assert (value - weights[2][name]).abs().max().item() < 1e-5, name
    moved = weights[1]["lm_head.weight"] - start.lm_head.weight
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("config", ["[1]", "{}", '{"architectures": 3}', '{"hidden_size": null}'])
def test_a_config_that_describes_no_draft_is_one_line(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="does not describe a draft"):
        check_draft(tmp_path)
