"""Stand-ins in PyTorch for the C++ kernels that SGLang 0.5.23 imports on a CPU for dense models with EAGLE.

SGLang's own wheels hold CUDA kernels only. Names, argument order and effects follow SGLang's call sites and its Triton kernels of the
same names (Apache-2.0; read, not copied). Clear rather than fast: tests only. Everything else of `sgl_kernel` is absent on purpose,
`convert_weight_packed` above all: SGLang looks for it to decide whether packed AMX weights exist, and without it uses plain torch.
"""
import ctypes, json, os
import torch


def _pages(req_to_token, pool, start, end): return req_to_token[int(pool), int(start):int(end)].long()


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    "Write the slots of `out_cache_loc`, request after request, into req_to_token[request, start:end]."
    at = 0
    for r, a, b in zip(req_pool_indices.tolist(), start.tolist(), end.tolist()):
        req_to_token[r, a:b] = out_cache_loc[at:at + b - a].to(req_to_token.dtype)
        at += b - a


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    "The reverse: read req_to_token[request, start:end] of every request into `out_cache_loc`."
    rows = [_pages(req_to_token, r, a, b) for r, a, b in zip(req_pool_indices.tolist(), start.tolist(), end.tolist())]
    if rows:
        flat = torch.cat(rows)
        out_cache_loc[:len(flat)] = flat.to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps):
    "The topk × num_steps slots that follow every request's sequence."
    n = topk*num_steps
    for i, (r, s) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist())):
        out_cache_loc[i*n:(i + 1)*n] = _pages(req_to_token, r, s, s + n).to(out_cache_loc.dtype)


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    "The last accepted token of every request; `accept_lens` counts it."
    rows = torch.arange(len(accept_lens), device=accept_lens.device)
    bonus_tokens[:len(rows)] = accept_tokens.flatten()[rows*accept_stride + accept_lens.long() - 1].to(bonus_tokens.dtype)


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    "Cache slots of the accepted nodes (−1: none), packed to the front."
    picked = out_cache_loc[accept_index.flatten()[accept_index.flatten() > -1].long()]
    accept_out_cache_loc[:len(picked)] = picked.to(accept_out_cache_loc.dtype)


def rotate_input_ids_cpu(input_ids, extend_start_loc, extend_seq_lens, topk_index, select_index=None):
    "Shift every request's tokens left by one; the new token goes last, or where `select_index` says."
    for i, (a, n) in enumerate(zip(extend_start_loc.tolist(), extend_seq_lens.tolist())):
        if n <= 0: continue
        input_ids[a:a + n - 1] = input_ids[a + 1:a + n].clone()
        input_ids[a + n - 1 if select_index is None else int(select_index[i])] = topk_index.flatten()[i].to(input_ids.dtype)


def build_draft_decode_metadata_cpu(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):
    "A row of slots for every request × branch: the request's own, then the `num_steps` that belong to this branch."
    rows = torch.zeros(len(seq_lens)*topk, pool_len, dtype=req_to_token.dtype, device=req_to_token.device)
    for i, (r, s) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist())):
        for k in range(topk):
            rows[i*topk + k, :s] = req_to_token[r, :s]
            own = req_to_token[r, s + k*num_steps:s + (k + 1)*num_steps]
            rows[i*topk + k, s:s + len(own)] = own[:pool_len - s]
    return rows


def build_tree_kernel_efficient_cpu(parent_list, selected_index, seq_lens, tree_mask, positions, retrieve_index, retrieve_next_token,
                                    retrieve_next_sibling, topk, depth, draft_token_num, tree_mask_mode):
    """Turn the selected candidates into a tree: mask [bs·n·n] of ancestors, positions, first child and next sibling of every node.

    Candidate c of `selected_index` (sorted) hangs under block c // topk: block 0 is the root, block b the candidate parent_list[b].
    Only the mask among the n draft tokens is written (mode QLEN_ONLY, the one SGLang uses on a CPU)."""
    assert int(tree_mask_mode) == 1, "the CPU path of SGLang 0.5.23 asks for QLEN_ONLY masks"
    n = draft_token_num
    mask, where = tree_mask.view(-1)[:len(seq_lens)*n*n].view(-1, n, n), positions.view(-1, n)
    for b in range(len(seq_lens)):
        chosen = selected_index[b].tolist()
        node = {c: i + 1 for i, c in enumerate(chosen)}                                   # candidate → its node
        blocks = [c//topk for c in chosen]
        parent = [0 if k == 0 else node.get(int(parent_list[b, k]), -1) for k in blocks]  # of nodes 1..n-1
        retrieve_index.view(-1, n)[b] = torch.arange(b*n, (b + 1)*n)
        first, sibling = retrieve_next_token.view(-1, n)[b], retrieve_next_sibling.view(-1, n)[b]
        for i in range(n - 1, 0, -1):
            p = parent[i - 1]
            if p < 0: continue
            sibling[i] = first[p].item()
            first[p] = i
        for i in range(n):
            mask[b, i] = False
            mask[b, i, 0] = True
            up, level = i, 0
            while up > 0:
                mask[b, i, up] = True
                up, level = parent[up - 1], level + 1
            where[b, i] = int(seq_lens[b]) + level


def _note(tokens, child, brother, accepted, bonus):
    "With SGLANG_STANDIN_LOG set, a line a verification: the tree as SGLang drafted it, which it does not report, and what was accepted."
    if not (file := os.environ.get("SGLANG_STANDIN_LOG")): return
    parents = [-1]*len(tokens)
    for p, c in enumerate(child):
        while c != -1: parents[c], c = p, brother[c]
    with open(file, "a") as f: f.write(json.dumps(dict(tokens=tokens, parents=parents, accepted=accepted, bonus=bonus)) + "\n")


def verify_tree_greedy_cpu(predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling, target_predict):
    """Walk every tree from its root along the children that the target would have chosen.

    `predicts` gets the target's token at every node of the path, `accept_index` the path, `accept_token_num` its length without the root."""
    n, most = candidates.shape[1], accept_index.shape[1]
    index, child, brother, best = (t.view(-1, n) for t in (retrive_index, retrive_next_token, retrive_next_sibling, target_predict))
    for b in range(len(candidates)):
        node, path = 0, [int(index[b, 0])]
        while len(path) < most:
            c = int(child[b, node])
            while c != -1 and int(candidates[b, c]) != int(best[b, node]): c = int(brother[b, c])
            if c == -1: break
            predicts[path[-1]] = best[b, node].to(predicts.dtype)
            node = c; path.append(int(index[b, c]))
        predicts[path[-1]] = best[b, node].to(predicts.dtype)
        accept_index[b, :len(path)] = torch.tensor(path, dtype=accept_index.dtype)
        accept_token_num[b] = len(path) - 1
        _note(candidates[b].tolist(), child[b].tolist(), brother[b].tolist(), [i - b*n for i in path[1:]], int(best[b, node]))


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    "Copy rows src → tgt in every buffer, given by address and bytes a row; all rows are read before one is written."
    for base, step in zip(data_ptrs.tolist(), strides.tolist()):
        rows = [ctypes.string_at(base + s*step, step) for s in src_loc.tolist()]
        for t, row in zip(tgt_loc.tolist(), rows): ctypes.memmove(base + t*step, row, step)


def _attend(q, k, v, scale, visible):
    "q [n, heads, d] over k, v [m, kv heads, d]; visible [n, m] or None."
    group = q.shape[1]//k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    s = torch.einsum("nhd,mhd->hnm", q.float(), k)*scale
    if visible is not None: s = s.masked_fill(~visible, float("-inf"))
    return torch.einsum("hnm,mhd->nhd", s.softmax(-1), v)


def _only_dense(logit_cap, cross, window, sinks, k_scale, v_scale):
    assert not logit_cap and not cross and window <= 0 and sinks is None and k_scale == v_scale == 1.0, "stand-in: plain dense attention only"


def decode_attention_cpu(q, k_buffer, v_buffer, k_scale, v_scale, out, key, value, loc, attn_logits, req_to_token, req_pool_indices, seq_lens,
                         scale, logit_cap, cross, window, encoder_lens, sinks):
    "One query a row: store its key and value at `loc`, then attend over req_to_token[row's request, :seq_len]."
    _only_dense(logit_cap, cross, window, sinks, k_scale, v_scale)
    if key is not None:
        k_buffer[loc] = key.reshape(-1, *k_buffer.shape[1:]).to(k_buffer.dtype)
        v_buffer[loc] = value.reshape(-1, *v_buffer.shape[1:]).to(v_buffer.dtype)
    for i, (r, n) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist())):
        at = _pages(req_to_token, r, 0, n)
        out[i] = _attend(q[i:i + 1], k_buffer[at], v_buffer[at], scale, None)[0].to(out.dtype)


def extend_attention_cpu(q, key, value, out, k_buffer, v_buffer, k_scale, v_scale, req_to_token, req_pool_indices, seq_lens, extend_lens, extend_start,
                         max_extend, scale, logit_cap, cross, window, encoder_lens, sinks, tree_mask, causal):
    "The last `extend_lens` tokens of every request attend over its cache and each other: causally, or by the tree's mask."
    _only_dense(logit_cap, cross, window, sinks, k_scale, v_scale)
    key, value, used = key.reshape(len(q), *k_buffer.shape[1:]), value.reshape(len(q), *v_buffer.shape[1:]), 0
    for r, n, m, a in zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_lens.tolist(), extend_start.tolist()):
        if m == 0: continue
        past, own = _pages(req_to_token, r, 0, n - m), slice(a, a + m)
        k, v = (torch.cat([b[past], t[own].to(b.dtype)]) for b, t in ((k_buffer, key), (v_buffer, value)))
        among = torch.ones(m, m, dtype=torch.bool)
        if tree_mask is not None: among = tree_mask[used:used + m*m].view(m, m).bool()
        elif causal: among = among.tril()
        used += m*m
        out[own] = _attend(q[own], k, v, scale, torch.cat([torch.ones(m, n - m, dtype=torch.bool), among], 1)).to(out.dtype)


torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu
