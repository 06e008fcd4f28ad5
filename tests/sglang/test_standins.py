"""The stand-ins for SGLang's kernels against brute force.

They need torch only; SGLang itself is not imported.
"""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tpro_nb.core import read_jsonl
from tpro_nb.trees import Tree, verify_greedy

spec = importlib.util.spec_from_file_location(
    "sgl_kernel_standin", Path(__file__).parent / "standins" / "sgl_kernel.py"
)
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


class Beam:
    """A drafted beam with explicit parents, and the tensors SGLang makes of it.

    There are topk candidates first, then topk survivors × topk a step.
    """

    def __init__(self, topk, steps, nodes, rng):
        self.rng = rng
        self.topk = topk
        self.parent = {}
        self.score = {}
        self.add(0, None)
        # block b hangs under candidate blocks[b]; block 0 under the root
        self.blocks = [-1, *range(topk)]
        survivors = list(range(topk))
        for step in range(1, steps):
            first = topk + (step - 1) * topk**2
            for n, survivor in enumerate(survivors):
                self.add(first + n * topk, survivor)
            survivors = self.best(range(first, first + topk**2), topk)
            if step < steps - 1:
                self.blocks += survivors
        # a candidate's number over topk must give its block: survivors are numbered in the order
        # in which they are expanded
        self.chosen = sorted(self.best(self.parent, nodes - 1))

    def add(self, first, parent):
        "Give a node `topk` children, numbered from `first`, the likeliest first."
        above = 1.0 if parent is None else self.score[parent]
        for n in range(self.topk):
            drawn = sorted((self.rng.random() for _ in range(self.topk)), reverse=True)
            self.parent[first + n] = parent
            self.score[first + n] = above * drawn[n] * 0.999**n

    def best(self, candidates, n):
        "The `n` likeliest of some candidates."
        return sorted(candidates, key=self.score.get, reverse=True)[:n]

    def path(self, candidate):
        "From the root's child down to a candidate."
        above = []
        while candidate is not None:
            above.append(candidate)
            candidate = self.parent[candidate]
        return above[::-1]


def linked(first, following):
    "A list that lies in an array of followers, −1 at its end."
    found, node = [], int(first)
    while node != -1:
        found.append(node)
        node = int(following[node])
    return found


@pytest.mark.parametrize("seed", range(30))
def test_tree_building(seed):
    rng = random.Random(seed)
    topk, steps, batch = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 3)
    n = rng.randint(2, min(12, 1 + topk + (steps - 1) * topk**2))
    beams = [Beam(topk, steps, n, rng) for _ in range(batch)]
    lengths = torch.tensor([rng.randint(1, 20) for _ in range(batch)])
    masks = torch.ones(batch * n * n, dtype=torch.bool)
    positions = torch.full((batch * n,), -9)
    index, child, brother = torch.full((3, batch, n), -1)
    kernels.build_tree_kernel_efficient_cpu(
        torch.tensor([beam.blocks for beam in beams]),
        torch.tensor([beam.chosen for beam in beams]),
        lengths,
        masks,
        positions,
        index,
        child,
        brother,
        topk,
        steps,
        n,
        1,
    )
    assert index.tolist() == torch.arange(batch * n).view(batch, n).tolist()
    for b, beam in enumerate(beams):
        # by node, as candidates from the root
        paths = [[]] + [beam.path(candidate) for candidate in beam.chosen]
        mask, where = masks.view(batch, n, n)[b], positions.view(batch, n)[b]
        for i, path in enumerate(paths):
            assert where[i] == lengths[b] + len(path)
            for j, other in enumerate(paths):
                assert bool(mask[i, j]) == (path[: len(other)] == other), (i, j)
            kids = [j for j in range(1, n) if paths[j][:-1] == path]
            assert linked(child[b, i], brother[b]) == kids


def random_tree(rng, n):
    "A tree of `n` nodes in which siblings differ."
    parents = [-1] + [rng.randrange(node) for node in range(1, n)]
    tokens, used = [0] * n, {}
    for node in range(1, n):
        taken = used.setdefault(parents[node], [])
        tokens[node] = rng.choice([token for token in range(12) if token not in taken])
        taken.append(tokens[node])
    return Tree(parents, tokens)


def random_choices(rng, tree):
    "What a target would say at every node: often one of its children's tokens, else 99."
    choices = []
    for node in range(len(tree.tokens)):
        followers = [tree.tokens[child] for child in tree.children(node)] or [99]
        follower = rng.choice(followers)
        choices.append(follower if rng.random() < 0.7 else 99)
    return choices


def links(tree):
    "First child and next sibling of every node, −1 where there is none."
    n = len(tree.parents)
    child, brother = [-1] * n, [-1] * n
    for node in range(n - 1, 0, -1):
        parent = tree.parents[node]
        brother[node] = child[parent]
        child[parent] = node
    return child, brother


def is_chosen(tree, path, best):
    "Is every token of a path the target's choice at the node above?"
    return all(tree.tokens[node] == best[tree.parents[node]] for node in path[1:])


@pytest.mark.parametrize("seed", range(40))
def test_verification(seed, tmp_path, monkeypatch):
    """Against the longest path on which every token is the target's choice, all paths tried.

    And against our own verifier.
    """
    rng = random.Random(seed)
    batch, n = rng.randint(1, 3), rng.randint(2, 10)
    most = rng.choice([n, rng.randint(2, n)])  # a row may be shorter than the tree is deep
    log = tmp_path / "log.jsonl"
    monkeypatch.setenv("SGLANG_STANDIN_LOG", str(log))
    trees = [random_tree(rng, n) for _ in range(batch)]
    choices = [random_choices(rng, tree) for tree in trees]
    pointers = [links(tree) for tree in trees]
    predicts = torch.full((batch * n,), -7, dtype=torch.int32)
    accept = torch.full((batch, most), -1, dtype=torch.int32)
    count = torch.zeros(batch, dtype=torch.int32)
    kernels.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accept,
        accept_token_num=count,
        candidates=torch.tensor([tree.tokens for tree in trees]),
        retrive_index=torch.arange(batch * n).view(batch, n),
        retrive_next_token=torch.tensor([child for child, _ in pointers]),
        retrive_next_sibling=torch.tensor([brother for _, brother in pointers]),
        target_predict=torch.tensor(choices),
    )
    for b, (tree, best) in enumerate(zip(trees, choices)):
        paths = [tree.path(node) for node in range(n)]
        path = max((path for path in paths if is_chosen(tree, path, best)), key=len)[:most]
        padding = [-1] * (most - len(path))
        assert accept[b].tolist() == [b * n + node for node in path] + padding
        assert count[b] == len(path) - 1
        assert [int(predicts[b * n + node]) for node in path] == [best[node] for node in path]
        mine, bonus = verify_greedy(tree, best)
        assert mine[: most - 1] == path[1:]
        assert len(mine) >= most or bonus == best[path[-1]]
    noted = read_jsonl(log)
    assert [line["parents"] for line in noted] == [tree.parents for tree in trees]
    assert [line["tokens"] for line in noted] == [tree.tokens for tree in trees]
    assert [len(line["accepted"]) for line in noted] == count.tolist()


WIDTH = 40  # of the page table


def page_table(generator, requests):
    "req_to_token with scattered slots, every request's its own; and the requests' rows in it."
    slots = torch.randperm(requests * WIDTH, generator=generator).view(requests, WIDTH)
    rows = torch.randperm(requests, generator=generator)
    table = torch.zeros(requests + 2, WIDTH, dtype=torch.int32)
    table[rows] = slots.int()
    return table, rows


def dense(q, k, v, mask):
    "PyTorch's attention, [n, heads, d] over [m, kv heads, d], two heads a kv head."
    read = F.scaled_dot_product_attention(
        q.transpose(0, 1),
        k.repeat_interleave(2, 1).transpose(0, 1),
        v.repeat_interleave(2, 1).transpose(0, 1),
        attn_mask=mask,
        scale=0.3,
    )
    return read.transpose(0, 1)


class AttentionCase:
    "Three requests with something in their cache: a page table, keys and values."

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(3, 20, (3,), generator=self.generator)
        self.table, self.rows = page_table(self.generator, 3)
        self.keys = self.randn(3 * WIDTH, 2, 8)
        self.values = self.randn(3 * WIDTH, 2, 8)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def slots(self, request, length):
        "Where the first tokens of a request lie."
        return self.table[self.rows[request], :length].long()


@pytest.mark.parametrize("seed", range(8))
def test_decode_attention(seed):
    "The new token's key and value are stored first."
    case = AttentionCase(seed)
    q, key, value = case.randn(3, 4, 8), case.randn(3, 2, 8), case.randn(3, 2, 8)
    last = [case.slots(n, length)[-1] for n, length in enumerate(case.lengths)]
    loc = torch.stack(last)
    out, before = torch.empty(3, 4, 8), case.keys.clone()
    kernels.decode_attention_cpu(
        q,
        case.keys,
        case.values,
        1.0,
        1.0,
        out,
        key.reshape(3, 16),
        value,
        loc,
        None,
        case.table,
        case.rows,
        case.lengths,
        0.3,
        0.0,
        False,
        0,
        None,
        None,
    )
    assert torch.equal(case.keys[loc], key)
    assert torch.equal(case.values[loc], value)
    assert (case.keys != before).any(-1).any(-1).sum() == 3
    for n, length in enumerate(case.lengths):
        slots = case.slots(n, length)
        want = dense(q[n : n + 1], case.keys[slots], case.values[slots], None)
        assert torch.allclose(out[n], want[0], atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("with_trees", [False, True])
def test_extend_attention(seed, with_trees):
    "The whole sequence under one mask must give the same."
    case = AttentionCase(seed)
    new = [int(torch.randint(1, int(n) + 1, (1,), generator=case.generator)) for n in case.lengths]
    new = torch.tensor(new)
    start, total = torch.cumsum(new, 0) - new, int(new.sum())
    q, key, value = case.randn(total, 4, 8), case.randn(total, 2, 8), case.randn(total, 2, 8)
    among = [torch.ones(n, n, dtype=torch.bool).tril() for n in new.tolist()]
    tree_mask = None
    if with_trees:
        among = [torch.rand(n, n, generator=case.generator) < 0.5 for n in new.tolist()]
        for mask in among:
            mask.fill_diagonal_(True)
        tree_mask = torch.cat([mask.flatten() for mask in among])
    out = torch.empty(total, 4, 8)
    kernels.extend_attention_cpu(
        q,
        key,
        value,
        out,
        case.keys,
        case.values,
        1.0,
        1.0,
        case.table,
        case.rows,
        case.lengths,
        new,
        start,
        int(new.max()),
        0.3,
        0.0,
        False,
        0,
        None,
        None,
        tree_mask,
        True,
    )
    for n, mask_among in enumerate(among):
        past = case.slots(n, int(case.lengths[n] - new[n]))
        own = slice(int(start[n]), int(start[n] + new[n]))
        mask = torch.cat([torch.ones(int(new[n]), len(past), dtype=torch.bool), mask_among], 1)
        keys = torch.cat([case.keys[past], key[own]])
        values = torch.cat([case.values[past], value[own]])
        assert torch.allclose(out[own], dense(q[own], keys, values, mask), atol=1e-5)


@pytest.mark.parametrize(
    "cap, cross, window, sinks",
    [
        (30.0, False, 0, None),
        (0.0, True, 0, None),
        (0.0, False, 9, None),
        (0.0, False, 0, torch.zeros(1, 1, 1)),
    ],
)
def test_attention_refuses_what_it_does_not_do(cap, cross, window, sinks):
    x = torch.zeros(1, 1, 1)
    with pytest.raises(AssertionError, match="dense"):
        kernels.decode_attention_cpu(
            x,
            x,
            x,
            1.0,
            1.0,
            x,
            None,
            None,
            None,
            None,
            x,
            x,
            x,
            1.0,
            cap,
            cross,
            window,
            None,
            sinks,
        )


@pytest.mark.parametrize("seed", range(10))
def test_reading_and_writing_slots_are_each_others_reverse(seed):
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    start = torch.tensor([rng.randint(1, 12) for _ in range(3)])
    end = start + torch.tensor([rng.randint(0, 6) for _ in range(3)])
    table, rows = page_table(generator, 3)
    out = torch.full((30,), -1)
    kernels.assign_extend_cache_locs_cpu(rows, table, start, end, out, WIDTH)
    want = []
    for row, first, last in zip(rows, start, end):
        want += table[row, first:last].tolist()
    assert out.tolist() == want + [-1] * (30 - len(want))
    copy = torch.zeros_like(table)
    kernels.assign_req_to_token_pool_cpu(rows, copy, start, end, out, WIDTH)
    written = torch.zeros_like(table)
    for row, first, last in zip(rows, start, end):
        written[row, first:last] = table[row, first:last]
    assert torch.equal(copy, written)


@pytest.mark.parametrize("seed", range(10))
def test_slots_of_a_draft(seed):
    "Every request has topk × steps slots behind its text; a branch sees the text and its own."
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    lengths = torch.tensor([rng.randint(1, 12) for _ in range(3)])
    table, rows = page_table(generator, 3)
    topk, steps = rng.randint(1, 4), rng.randint(1, 4)
    out = torch.zeros(3 * topk * steps, dtype=torch.long)
    kernels.assign_draft_cache_locs_contiguous_cpu(rows, table, lengths, out, WIDTH, topk, steps)
    want = []
    for row, length in zip(rows, lengths):
        want += table[row, length : length + topk * steps].tolist()
    assert out.tolist() == want
    view = kernels.build_draft_decode_metadata_cpu(table, rows, lengths, topk, steps, WIDTH)
    assert view.shape == (3 * topk, WIDTH)
    assert view.dtype == table.dtype
    per_branch = out.view(3 * topk, steps)  # as SGLang splits the slots it was given
    for branch, seen in enumerate(view):
        request = branch // topk
        length = int(lengths[request])
        assert seen[:length].tolist() == table[rows[request], :length].tolist()
        assert seen[length : length + steps].tolist() == per_branch[branch].tolist()


def test_bonus_tokens():
    bonus = torch.zeros(3, dtype=torch.int32)
    kernels.fill_bonus_tokens_cpu(torch.arange(12).view(3, 4), torch.tensor([1, 4, 2]), bonus, 4)
    assert bonus.tolist() == [0, 7, 9]


def test_accepted_slots_are_packed():
    out = torch.full((6,), -1)
    accepted = torch.tensor([[0, 2, -1], [3, -1, -1]])
    kernels.fill_accept_out_cache_loc_cpu(accepted, torch.tensor([10, 11, 12, 13]), out)
    assert out.tolist() == [10, 12, 13, -1, -1, -1]


def test_input_ids_rotate():
    ids = torch.tensor([1, 2, 3, 4, 5, 6])
    start, lengths = torch.tensor([0, 4, 6]), torch.tensor([4, 2, 0])
    kernels.rotate_input_ids_cpu(ids, start, lengths, torch.tensor([[90], [91], [92]]))
    assert ids.tolist() == [2, 3, 4, 90, 6, 91]
    ids = torch.tensor([1, 2, 3, 4])
    kernels.rotate_input_ids_cpu(
        ids, torch.tensor([0]), torch.tensor([4]), torch.tensor([90]), torch.tensor([1])
    )
    assert ids.tolist() == [2, 90, 4, 4]


def test_cache_rows_move_all_at_once():
    """Rows move in every layer by address.

    A row that is source and target is read before it is written.
    """
    layers = [
        torch.arange(40.0).view(10, 2, 2).contiguous(),
        torch.arange(30).view(10, 3).to(torch.bfloat16),
    ]
    before = [layer.clone() for layer in layers]
    source, target = torch.tensor([5, 3, 4]), torch.tensor([3, 4, 9])
    kernels.copy_all_layer_kv_cache_cpu(
        torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64),
        torch.tensor([layer.stride(0) * layer.element_size() for layer in layers]),
        target,
        source,
    )
    for layer, old in zip(layers, before):
        want = old.clone()
        want[target] = old[source]
        assert torch.equal(layer, want)


def test_amx_packing_stays_away():
    registered = torch.ops.sgl_kernel
    assert not hasattr(registered, "convert_weight_packed")
    assert registered.decode_attention_cpu is kernels.decode_attention_cpu
