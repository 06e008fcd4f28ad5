"""Stand-ins in PyTorch for the C++ kernels that SGLang 0.5.23 imports on a CPU.

They are those for dense models with EAGLE; SGLang's own wheels hold CUDA kernels only. Names,
argument order and effects follow SGLang's call sites and its Triton kernels of the same names
(Apache-2.0; read, not copied). Clear rather than fast: tests only. Everything else of `sgl_kernel`
is absent on purpose, `convert_weight_packed` above all: SGLang looks for it to decide whether
packed AMX weights exist, and without it uses plain torch.

`req_to_token` is SGLang's page table: row r holds the cache slots of request r's tokens in order.
"""

import ctypes
import json
import os

import torch


def _slots(req_to_token, request, start, end):
    "Cache slots of a request's tokens start..end."
    return req_to_token[int(request), int(start) : int(end)].long()


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len
):
    "Write `out_cache_loc`, request after request, into req_to_token[request, start:end]."
    at = 0
    spans = zip(req_pool_indices.tolist(), start.tolist(), end.tolist())
    for request, first, last in spans:
        slots = out_cache_loc[at : at + last - first]
        req_to_token[request, first:last] = slots.to(req_to_token.dtype)
        at += last - first


def assign_extend_cache_locs_cpu(
    req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len
):
    "The reverse: read req_to_token[request, start:end] of every request into `out_cache_loc`."
    spans = zip(req_pool_indices.tolist(), start.tolist(), end.tolist())
    rows = [_slots(req_to_token, request, first, last) for request, first, last in spans]
    if rows:
        flat = torch.cat(rows)
        out_cache_loc[: len(flat)] = flat.to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    "The topk × num_steps slots that follow every request's sequence."
    width = topk * num_steps
    requests = zip(req_pool_indices.tolist(), seq_lens.tolist())
    for row, (request, length) in enumerate(requests):
        slots = _slots(req_to_token, request, length, length + width)
        out_cache_loc[row * width : (row + 1) * width] = slots.to(out_cache_loc.dtype)


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    "The last accepted token of every request; `accept_lens` counts it."
    rows = torch.arange(len(accept_lens), device=accept_lens.device)
    last = rows * accept_stride + accept_lens.long() - 1
    bonus_tokens[: len(rows)] = accept_tokens.flatten()[last].to(bonus_tokens.dtype)


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    "Cache slots of the accepted nodes (−1: none), packed to the front."
    nodes = accept_index.flatten()
    picked = out_cache_loc[nodes[nodes > -1].long()]
    accept_out_cache_loc[: len(picked)] = picked.to(accept_out_cache_loc.dtype)


def rotate_input_ids_cpu(
    input_ids, extend_start_loc, extend_seq_lens, topk_index, select_index=None
):
    "Shift every request's tokens left by one; the new one goes last, or where `select_index` says."
    spans = zip(extend_start_loc.tolist(), extend_seq_lens.tolist())
    for row, (start, length) in enumerate(spans):
        if length <= 0:
            continue
        end = start + length
        input_ids[start : end - 1] = input_ids[start + 1 : end].clone()
        place = end - 1 if select_index is None else int(select_index[row])
        input_ids[place] = topk_index.flatten()[row].to(input_ids.dtype)


def build_draft_decode_metadata_cpu(
    req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len
):
    """A row of slots for every request × branch.

    It holds the request's own slots, then the `num_steps` that belong to this branch.
    """
    rows = torch.zeros(
        len(seq_lens) * topk, pool_len, dtype=req_to_token.dtype, device=req_to_token.device
    )
    requests = zip(req_pool_indices.tolist(), seq_lens.tolist())
    for n, (request, length) in enumerate(requests):
        for branch in range(topk):
            row = rows[n * topk + branch]
            start = length + branch * num_steps
            own = req_to_token[request, start : start + num_steps]
            row[:length] = req_to_token[request, :length]
            row[length : length + len(own)] = own[: pool_len - length]
    return rows


def build_tree_kernel_efficient_cpu(
    parent_list,
    selected_index,
    seq_lens,
    tree_mask,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    topk,
    depth,
    draft_token_num,
    tree_mask_mode,
):
    """Turn the selected candidates of every request into a tree.

    Written are the mask [bs·n·n] of ancestors, positions, first child and next sibling of every
    node. Candidate c of `selected_index` (sorted) hangs under block c // topk: block 0 is the
    root, block b the candidate parent_list[b]. Only the mask among the n draft tokens is written
    (mode QLEN_ONLY, the one SGLang uses on a CPU).
    """
    assert int(tree_mask_mode) == 1, "the CPU path of SGLang 0.5.23 asks for QLEN_ONLY masks"
    n = draft_token_num
    masks = tree_mask.view(-1)[: len(seq_lens) * n * n].view(-1, n, n)
    for b in range(len(seq_lens)):
        chosen = selected_index[b].tolist()
        parents = _parents(chosen, parent_list[b].tolist(), topk)
        retrieve_index.view(-1, n)[b] = torch.arange(b * n, (b + 1) * n)
        first = retrieve_next_token.view(-1, n)[b]
        sibling = retrieve_next_sibling.view(-1, n)[b]
        for node in range(n - 1, 0, -1):
            parent = parents[node]
            if parent >= 0:
                sibling[node] = first[parent].item()
                first[parent] = node
        for node in range(n):
            ancestors = _ancestors(node, parents)
            masks[b, node] = False
            masks[b, node, 0] = True
            masks[b, node, ancestors] = True
            positions.view(-1, n)[b, node] = int(seq_lens[b]) + len(ancestors)


def _parents(chosen, blocks, topk):
    "Parent of every node, the root (node 0, parent −1) first; −1 where the parent was not chosen."
    node_of = {candidate: n + 1 for n, candidate in enumerate(chosen)}
    parents = [-1]
    for candidate in chosen:
        block = candidate // topk
        parents.append(node_of.get(blocks[block], -1) if block else 0)
    return parents


def _ancestors(node, parents):
    "A node and those above it, the root left out."
    above = []
    while node > 0:
        above.append(node)
        node = parents[node]
    return above


def _note(tokens, child, brother, accepted, bonus):
    """With SGLANG_STANDIN_LOG set, a line a verification.

    It holds the tree as SGLang drafted it, which it does not report, and what was accepted.
    """
    file = os.environ.get("SGLANG_STANDIN_LOG")
    if not file:
        return
    parents = [-1] * len(tokens)
    for parent, node in enumerate(child):
        while node != -1:
            parents[node] = parent
            node = brother[node]
    line = json.dumps(dict(tokens=tokens, parents=parents, accepted=accepted, bonus=bonus))
    with open(file, "a") as log:
        log.write(line + "\n")


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Walk every tree from its root along the children that the target would have chosen.

    `predicts` gets the target's token at every node of the path, `accept_index` the path,
    `accept_token_num` its length without the root.
    """
    n, most = candidates.shape[1], accept_index.shape[1]
    for b in range(len(candidates)):
        tokens = candidates[b].tolist()
        index = retrive_index.view(-1, n)[b].tolist()
        child = retrive_next_token.view(-1, n)[b].tolist()
        brother = retrive_next_sibling.view(-1, n)[b].tolist()
        best = target_predict.view(-1, n)[b]
        node, path = 0, [index[0]]
        while len(path) < most:
            follower = child[node]
            while follower != -1 and tokens[follower] != int(best[node]):
                follower = brother[follower]
            if follower == -1:
                break
            predicts[path[-1]] = best[node].to(predicts.dtype)
            node = follower
            path.append(index[node])
        predicts[path[-1]] = best[node].to(predicts.dtype)
        accept_index[b, : len(path)] = torch.tensor(path, dtype=accept_index.dtype)
        accept_token_num[b] = len(path) - 1
        _note(tokens, child, brother, [i - b * n for i in path[1:]], int(best[node]))


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Copy rows src → tgt in every buffer, given by address and bytes a row.

    All rows are read before one is written.
    """
    for base, step in zip(data_ptrs.tolist(), strides.tolist()):
        rows = [ctypes.string_at(base + source * step, step) for source in src_loc.tolist()]
        for target, row in zip(tgt_loc.tolist(), rows):
            ctypes.memmove(base + target * step, row, step)


def _attend(q, k, v, scale, visible):
    "q [n, heads, d] over k, v [m, kv heads, d]; visible [n, m] or None."
    group = q.shape[1] // k.shape[1]
    k = k.float().repeat_interleave(group, 1)
    v = v.float().repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


def _only_dense(logit_cap, cross, window, sinks, k_scale, v_scale):
    "Refuse what the stand-ins do not do."
    plain = not logit_cap and not cross and window <= 0 and sinks is None
    assert plain and k_scale == v_scale == 1.0, "stand-in: plain dense attention only"


def decode_attention_cpu(
    q,
    k_buffer,
    v_buffer,
    k_scale,
    v_scale,
    out,
    key,
    value,
    loc,
    attn_logits,
    req_to_token,
    req_pool_indices,
    seq_lens,
    scale,
    logit_cap,
    cross,
    window,
    encoder_lens,
    sinks,
):
    "One query a row: store its key and value at `loc`, then attend over the request's slots."
    _only_dense(logit_cap, cross, window, sinks, k_scale, v_scale)
    if key is not None:
        k_buffer[loc] = key.reshape(-1, *k_buffer.shape[1:]).to(k_buffer.dtype)
        v_buffer[loc] = value.reshape(-1, *v_buffer.shape[1:]).to(v_buffer.dtype)
    requests = zip(req_pool_indices.tolist(), seq_lens.tolist())
    for row, (request, length) in enumerate(requests):
        slots = _slots(req_to_token, request, 0, length)
        read = _attend(q[row : row + 1], k_buffer[slots], v_buffer[slots], scale, None)
        out[row] = read[0].to(out.dtype)


def extend_attention_cpu(
    q,
    key,
    value,
    out,
    k_buffer,
    v_buffer,
    k_scale,
    v_scale,
    req_to_token,
    req_pool_indices,
    seq_lens,
    extend_lens,
    extend_start,
    max_extend,
    scale,
    logit_cap,
    cross,
    window,
    encoder_lens,
    sinks,
    tree_mask,
    causal,
):
    """The last `extend_lens` tokens of every request attend over its cache and each other.

    Among each other causally, or by the tree's mask.
    """
    _only_dense(logit_cap, cross, window, sinks, k_scale, v_scale)
    key = key.reshape(len(q), *k_buffer.shape[1:])
    value = value.reshape(len(q), *v_buffer.shape[1:])
    used = 0  # of the mask
    requests = zip(
        req_pool_indices.tolist(), seq_lens.tolist(), extend_lens.tolist(), extend_start.tolist()
    )
    for request, length, new, start in requests:
        if new == 0:
            continue
        past = _slots(req_to_token, request, 0, length - new)
        own = slice(start, start + new)
        keys = torch.cat([k_buffer[past], key[own].to(k_buffer.dtype)])
        values = torch.cat([v_buffer[past], value[own].to(v_buffer.dtype)])
        among = torch.ones(new, new, dtype=torch.bool)
        if tree_mask is not None:
            among = tree_mask[used : used + new * new].view(new, new).bool()
        elif causal:
            among = among.tril()
        used += new * new
        before = torch.ones(new, length - new, dtype=torch.bool)
        visible = torch.cat([before, among], 1)
        out[own] = _attend(q[own], keys, values, scale, visible).to(out.dtype)


torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu
