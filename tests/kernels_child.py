"Passes through kernels built with sanitizers; run by test_eagle_decoding with libasan loaded."

import sys

import torch

from tpro_nb import c_engine
from tpro_nb.torch_engine import (
    DraftWeights,
    EngineOptions,
    Features,
    LayerWeights,
    Stack,
    Unread,
    chain_rows,
    tree_rows,
)
from tpro_nb.trees import Tree

SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
c_engine.KERNEL_FLAGS = (*c_engine.KERNEL_FLAGS, *SANITIZE)
TWO_THREADS = EngineOptions(threads=2)
HIDDEN, VOCAB = 96, 101


def layer(heads, head_dim, width, norms):
    norm = torch.rand(head_dim) if norms else None
    return LayerWeights(
        input_norm=torch.rand(HIDDEN) if norms else None,
        qkv=torch.randn(heads * head_dim + 4 * head_dim, width) / 10,
        query_norm=norm,
        key_norm=norm,
        output=torch.randn(HIDDEN, heads * head_dim) / 10,
        post_norm=torch.rand(HIDDEN),
        gate_up=torch.randn(2 * 160, HIDDEN) / 10,
        down=torch.randn(HIDDEN, 160) / 10,
    )


def engine(dtype, heads, head_dim, width=HIDDEN, norms=True):
    layers = [layer(heads, head_dim, width, norms) for _ in range(2)]
    final = torch.rand(HIDDEN) if norms else None
    angles = torch.rand(head_dim // 2)
    stack = Stack(layers, heads, 2, head_dim, 1e-6, angles, final_norm=final)
    return c_engine.CEngine(stack, 160, dtype, TWO_THREADS)


def read(dtype, heads, head_dim):
    "A target: a prompt in pieces, trees of many sizes, a move."
    target = engine(dtype, heads, head_dim)
    target.taps = [0, 1]
    embed = torch.randn(VOCAB, HIDDEN).to(dtype)
    head = target.prepare(torch.randn(VOCAB, HIDDEN))
    target.forward(embed[:70].float(), chain_rows(range(70), base=3))
    for nodes in (1, 5, 12, 13, 30):
        tree = Tree([-1, *[i // 2 for i in range(nodes - 1)]], list(range(nodes)))
        features, _ = target.greedy(embed, tree_rows(tree, 70, 3), head)
        target.best(features, head), target.mm(features, head)
    target.move([75, 78], [74, 75])


def draft(dtype, three):
    "A draft of either kind: what was accepted, and trees to the edge of the cache."
    drafting = engine(dtype, 6, 64, width=2 * HIDDEN if three else HIDDEN, norms=three)
    weights = DraftWeights(
        embed=torch.randn(VOCAB, HIDDEN).to(dtype),
        fc=drafting.prepare(torch.randn(HIDDEN, 2 * HIDDEN)),
        bias=None if three else torch.randn(HIDDEN),
        head=drafting.prepare(torch.randn(50, HIDDEN)),
        hot=list(range(0, 100, 2)),
        embed_norm=torch.rand(HIDDEN) if three else None,
        norm=torch.rand(HIDDEN) if three else None,
    )
    unread = Unread([5, 9, 77], Features(torch.randn(6, HIDDEN), [0, 3, 5]), 10, base=7)
    for depth, topk in ((1, 1), (3, 3), (5, 8), (2, 50)):
        drafting.propose(weights, unread, depth, topk)


def overrun():
    "The control: outputs for five rows into memory for four."
    x, w, y = torch.randn(5, 48), torch.randn(16, 48), torch.empty(4, 16)
    lib = c_engine.kernels(torch.float32)
    packed = c_engine.pack_weights(w, torch.float32)
    lib.matmul(*[c_engine.pointer(t) for t in (x, packed, y)], 5, 16, 48, 1)


if sys.argv[1] == "overrun":
    overrun()
else:
    for dtype in (torch.float32, torch.bfloat16):
        for heads, head_dim in ((4, 64), (6, 64), (8, 64), (4, 16)):
            read(dtype, heads, head_dim)
        for three in (False, True):
            draft(dtype, three)
print("through")
