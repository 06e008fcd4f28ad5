"The stand-ins for SGLang's kernels against brute force. They need torch only; SGLang itself is not imported."
import importlib.util, random
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from tpro_nb.core import read_jsonl
from tpro_nb.eagle_decoding import Tree, verify_greedy

spec = importlib.util.spec_from_file_location("sgl_kernel_standin", Path(__file__).parent/"standins"/"sgl_kernel.py")
K = importlib.util.module_from_spec(spec); spec.loader.exec_module(K)

class Beam:
    "A drafted beam with explicit parents, and the tensors SGLang makes of it: topk candidates, then topk survivors × topk a step."
    def __init__(self, topk, steps, n, rng):
        self.parent, self.score, self.token = {}, {}, {}
        def add(c, parent, kids):
            for j, t in enumerate(rng.sample(range(50), topk)):
                self.parent[c + j], self.token[c + j] = parent, t
                self.score[c + j] = (self.score[parent] if parent is not None else 1.0)*sorted((rng.random() for _ in range(topk)), reverse=True)[j]*.999**j
        add(0, None, topk)
        blocks, last = [-1, *range(topk)], list(range(topk))            # block b hangs under candidate blocks[b]; block 0 under the root
        for s in range(1, steps):
            first = topk + (s - 1)*topk**2
            for i, p in enumerate(last): add(first + i*topk, p, topk)
            new = range(first, first + topk**2)
            last = sorted(new, key=lambda c: -self.score[c])[:topk]
            if s < steps - 1: blocks += last
        # a candidate's number over topk must give its block: survivors are numbered in the order in which they are expanded
        self.chosen = sorted(sorted(self.parent, key=lambda c: -self.score[c])[:n - 1])
        self.blocks = blocks
    def up(self, c):
        out = []
        while c is not None: out.append(c); c = self.parent[c]
        return out[::-1]

@pytest.mark.parametrize("seed", range(30))
def test_tree_building(seed):
    rng = random.Random(seed)
    topk, steps, B = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 3)
    n = rng.randint(2, min(12, 1 + topk + (steps - 1)*topk**2))
    beams, lens = [Beam(topk, steps, n, rng) for _ in range(B)], torch.tensor([rng.randint(1, 20) for _ in range(B)])
    mask, pos = torch.ones(B*n*n, dtype=torch.bool), torch.full((B*n,), -9)
    index, child, brother = torch.full((3, B, n), -1)
    K.build_tree_kernel_efficient_cpu(torch.tensor([b.blocks for b in beams]), torch.tensor([b.chosen for b in beams]), lens, mask, pos, index, child, brother, topk, steps, n, 1)
    assert index.tolist() == torch.arange(B*n).view(B, n).tolist()
    for b, beam in enumerate(beams):
        paths = [[]] + [beam.up(c) for c in beam.chosen]                # by node, as candidates from the root
        m, p = mask.view(B, n, n)[b], pos.view(B, n)[b]
        for i in range(n):
            assert p[i] == lens[b] + len(paths[i])
            for j in range(n): assert bool(m[i, j]) == (paths[i][:len(paths[j])] == paths[j]), (i, j)
            kids = [j for j in range(1, n) if paths[j][:-1] == paths[i] and len(paths[j]) == len(paths[i]) + 1]
            got, c = [], int(child[b, i])
            while c != -1: got.append(c); c = int(brother[b, c])
            assert got == kids

@pytest.mark.parametrize("seed", range(40))
def test_verification(seed, tmp_path, monkeypatch):
    "Against the longest path on which every token is the target's choice, all paths tried; and against our own verifier."
    rng = random.Random(seed)
    B, n = rng.randint(1, 3), rng.randint(2, 10)
    most = rng.choice([n, rng.randint(2, n)])                           # a row may be shorter than the tree is deep
    monkeypatch.setenv("SGLANG_STANDIN_LOG", str(tmp_path/"log.jsonl"))
    trees, child, brother = [], torch.full((B, n), -1), torch.full((B, n), -1)
    for b in range(B):
        parents = [-1] + [rng.randrange(i) for i in range(1, n)]
        tokens, used = [0]*n, {}
        for i in range(1, n):                                          # siblings differ
            tokens[i] = rng.choice([t for t in range(12) if t not in used.setdefault(parents[i], [])]); used[parents[i]].append(tokens[i])
        for i in range(n - 1, 0, -1): brother[b, i] = child[b, parents[i]]; child[b, parents[i]] = i
        trees.append(Tree(parents, tokens))
    best = torch.tensor([[rng.choice([t.tokens[k] for k in t.children(i)] or [99]) if rng.random() < .7 else 99 for i in range(n)] for t in trees])
    index, predicts, accept, count = torch.arange(B*n).view(B, n), torch.full((B*n,), -7, dtype=torch.int32), torch.full((B, most), -1, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
    K.verify_tree_greedy_cpu(predicts=predicts, accept_index=accept, accept_token_num=count, candidates=torch.tensor([t.tokens for t in trees]), retrive_index=index,
                             retrive_next_token=child, retrive_next_sibling=brother, target_predict=best)
    for b, t in enumerate(trees):
        good = [t.path(i) for i in range(n) if all(t.tokens[j] == best[b, t.parents[j]] for j in t.path(i)[1:])]
        path = max(good, key=len)[:most]
        assert accept[b].tolist() == [b*n + i for i in path] + [-1]*(most - len(path)) and count[b] == len(path) - 1
        assert [int(predicts[b*n + i]) for i in path] == [int(best[b, i]) for i in path]
        mine, bonus = verify_greedy(t, best[b].tolist())
        assert mine[:most - 1] == path[1:] and (len(mine) >= most or bonus == best[b, path[-1]])
    noted = read_jsonl(tmp_path/"log.jsonl")
    assert [(x["parents"], x["tokens"]) for x in noted] == [(t.parents, t.tokens) for t in trees] and [len(x["accepted"]) for x in noted] == count.tolist()

def pool(rng, lens, extra=0, width=40):
    "req_to_token with scattered slots: row of request r, its slots distinct from everyone's."
    slots = torch.randperm(len(lens)*width, generator=rng).view(len(lens), width)
    rows = torch.randperm(len(lens), generator=rng)
    table = torch.zeros(len(lens) + 2, width, dtype=torch.int32)
    table[rows] = slots.int()
    return table, rows

@pytest.mark.parametrize("seed", range(8))
def test_attention(seed):
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(3, 20, (3,), generator=g)
    table, rows = pool(g, lens)
    kb, vb = (torch.randn(3*40, 2, 8, generator=g) for _ in "kv")
    dense = lambda q, k, v, mask: F.scaled_dot_product_attention(q.transpose(0, 1), k.repeat_interleave(2, 1).transpose(0, 1), v.repeat_interleave(2, 1).transpose(0, 1), attn_mask=mask, scale=.3).transpose(0, 1)
    # decoding: the new token's key and value are stored first
    q, k, v = torch.randn(3, 4, 8, generator=g), torch.randn(3, 2, 8, generator=g), torch.randn(3, 2, 8, generator=g)
    loc, out, before = torch.stack([table[r, n - 1] for r, n in zip(rows, lens)]).long(), torch.empty(3, 4, 8), kb.clone()
    K.decode_attention_cpu(q, kb, vb, 1.0, 1.0, out, k.reshape(3, 16), v, loc, None, table, rows, lens, .3, 0.0, False, 0, None, None)
    assert torch.equal(kb[loc], k) and torch.equal(vb[loc], v) and (kb != before).any(-1).any(-1).sum() == 3
    for i in range(3):
        at = table[rows[i], :lens[i]].long()
        assert torch.allclose(out[i], dense(q[i:i + 1], kb[at], vb[at], None)[0], atol=1e-5)
    # extending: the whole sequence under one mask must give the same
    ext = torch.tensor([int(torch.randint(1, int(n) + 1, (1,), generator=g)) for n in lens])
    start, total = torch.cumsum(ext, 0) - ext, int(ext.sum())
    q, k, v = torch.randn(total, 4, 8, generator=g), torch.randn(total, 2, 8, generator=g), torch.randn(total, 2, 8, generator=g)
    trees = [torch.rand(m, m, generator=g) < .5 for m in ext.tolist()]
    for t in trees: t.fill_diagonal_(True)
    for tree in (None, torch.cat([t.flatten() for t in trees])):
        out = torch.empty(total, 4, 8)
        K.extend_attention_cpu(q, k, v, out, kb, vb, 1.0, 1.0, table, rows, lens, ext, start, int(ext.max()), .3, 0.0, False, 0, None, None, tree, True)
        for i in range(3):
            n, m, own = int(lens[i]), int(ext[i]), slice(int(start[i]), int(start[i] + ext[i]))
            at = table[rows[i], :n - m].long()
            mask = torch.ones(m, n, dtype=torch.bool)
            mask[:, n - m:] = trees[i] if tree is not None else torch.tensor([[b <= a for b in range(m)] for a in range(m)])
            assert torch.allclose(out[own], dense(q[own], torch.cat([kb[at], k[own]]), torch.cat([vb[at], v[own]]), mask), atol=1e-5)

def test_attention_refuses_what_it_does_not_do():
    t = torch.zeros(1, 1, 1)
    for cap, cross, window, sinks in ((30.0, False, 0, None), (0.0, True, 0, None), (0.0, False, 9, None), (0.0, False, 0, t)):
        with pytest.raises(AssertionError, match="dense"): K.decode_attention_cpu(t, t, t, 1.0, 1.0, t, None, None, None, None, t, t, t, 1.0, cap, cross, window, None, sinks)

@pytest.mark.parametrize("seed", range(10))
def test_cache_locations(seed):
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    lens = torch.tensor([rng.randint(1, 12) for _ in range(3)])
    table, rows = pool(g, lens)
    # read and write back are each other's reverse
    end = lens + torch.tensor([rng.randint(0, 6) for _ in range(3)])
    out = torch.full((30,), -1)
    K.assign_extend_cache_locs_cpu(rows, table, lens, end, out, 40)
    want = [int(table[r, j]) for r, a, b in zip(rows, lens, end) for j in range(a, b)]
    assert out.tolist() == want + [-1]*(30 - len(want))
    other = torch.zeros_like(table)
    K.assign_req_to_token_pool_cpu(rows, other, lens, end, out, 40)
    for r in range(5):
        for j in range(40):
            inside = any(r == x and a <= j < b for x, a, b in zip(rows, lens, end))
            assert other[r, j] == (table[r, j] if inside else 0)
    topk, steps = rng.randint(1, 4), rng.randint(1, 4)
    out = torch.zeros(3*topk*steps, dtype=torch.long)
    K.assign_draft_cache_locs_contiguous_cpu(rows, table, lens, out, 40, topk, steps)
    assert out.tolist() == [int(table[r, n + j]) for r, n in zip(rows, lens) for j in range(topk*steps)]
    view = K.build_draft_decode_metadata_cpu(table, rows, lens, topk, steps, 40)
    assert view.shape == (3*topk, 40) and view.dtype == table.dtype
    per_branch = out.view(3, topk, steps)                               # as SGLang splits the slots it was given
    for i in range(3):
        for k in range(topk):
            n = int(lens[i])
            assert view[i*topk + k, :n].tolist() == table[rows[i], :n].tolist() and view[i*topk + k, n:n + steps].tolist() == per_branch[i, k].tolist()

def test_small_ones():
    bonus = torch.zeros(3, dtype=torch.int32)
    K.fill_bonus_tokens_cpu(torch.arange(12).view(3, 4), torch.tensor([1, 4, 2]), bonus, 4)
    assert bonus.tolist() == [0, 7, 9]
    out = torch.full((6,), -1)
    K.fill_accept_out_cache_loc_cpu(torch.tensor([[0, 2, -1], [3, -1, -1]]), torch.tensor([10, 11, 12, 13]), out)
    assert out.tolist() == [10, 12, 13, -1, -1, -1]
    ids = torch.tensor([1, 2, 3, 4, 5, 6])
    K.rotate_input_ids_cpu(ids, torch.tensor([0, 4, 6]), torch.tensor([4, 2, 0]), torch.tensor([[90], [91], [92]]))
    assert ids.tolist() == [2, 3, 4, 90, 6, 91]
    ids = torch.tensor([1, 2, 3, 4])
    K.rotate_input_ids_cpu(ids, torch.tensor([0]), torch.tensor([4]), torch.tensor([90]), torch.tensor([1]))
    assert ids.tolist() == [2, 90, 4, 4]

def test_cache_rows_move_all_at_once():
    "Rows move in every layer by address; a row that is source and target is read before it is written."
    layers = [torch.arange(40.).view(10, 2, 2).contiguous(), torch.arange(30).view(10, 3).to(torch.bfloat16)]
    before = [l.clone() for l in layers]
    src, tgt = torch.tensor([5, 3, 4]), torch.tensor([3, 4, 9])
    K.copy_all_layer_kv_cache_cpu(torch.tensor([l.data_ptr() for l in layers], dtype=torch.uint64), torch.tensor([l.stride(0)*l.element_size() for l in layers]), tgt, src)
    for l, b in zip(layers, before):
        want = b.clone(); want[tgt] = b[src]
        assert torch.equal(l, want)

def test_amx_packing_stays_away():
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed") and torch.ops.sgl_kernel.decode_attention_cpu is K.decode_attention_cpu
