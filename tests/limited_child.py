"A pass of two threads where OpenMP grants only one; run by test_eagle_decoding."

import torch

from tpro_nb import c_engine
from tpro_nb.torch_engine import EngineOptions, LayerWeights, Stack, chain_rows

torch.manual_seed(0)
HIDDEN, HEADS, HEAD_DIM = 96, 4, 16
layer = LayerWeights(
    input_norm=torch.rand(HIDDEN),
    qkv=torch.randn((HEADS + 4) * HEAD_DIM, HIDDEN) / 10,
    query_norm=torch.rand(HEAD_DIM),
    key_norm=torch.rand(HEAD_DIM),
    output=torch.randn(HIDDEN, HEADS * HEAD_DIM) / 10,
    post_norm=torch.rand(HIDDEN),
    gate_up=torch.randn(2 * 160, HIDDEN) / 10,
    down=torch.randn(HIDDEN, 160) / 10,
)
angles = torch.rand(HEAD_DIM // 2)
stack = Stack([layer], HEADS, 2, HEAD_DIM, 1e-6, angles, final_norm=torch.rand(HIDDEN))
embedded, matrix = torch.randn(9, HIDDEN), torch.randn(101, HIDDEN)
found = []
for threads in (1, 2):
    engine = c_engine.CEngine(stack, 64, torch.float32, EngineOptions(threads=threads))
    head = engine.prepare(matrix)
    states = engine.forward(embedded.clone(), chain_rows(range(9)))
    found.append((states, engine.mm(states, head), engine.best(states, head)))
for one, two in zip(*found):
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
print("equal")
