"Export to SGLang's layout: names, shapes, dtypes, token map, tree rule, flags, launch script."
import json, shutil, subprocess, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from tpro_nb.core import UserError, read_json, toy, write_json
from tpro_nb.eagle_draft import random_draft
from tpro_nb.serving import Endpoint, arguments, check_flags, compare, export, flag_table, launch_script, sglang_events, sglang_figures, sglang_generate, sglang_parses, sglang_state, target_shapes, tensors, write_token_map

TARGET = toy("03_base_model/base")

@pytest.fixture
def folders(tmp_path):
    random_draft(tmp_path/"draft", TARGET, hot=list(range(100)))
    return TARGET, tmp_path/"draft", tmp_path/"out"

def edit(folder: Path, change):
    t = load_file(folder/"model.safetensors"); change(t); save_file(t, folder/"model.safetensors")

def test_export(folders):
    r = export(*folders)
    out = folders[2]
    assert torch.load(out/"hot_token_map.pt", weights_only=True) == list(range(100))
    assert sorted(p.name for p in (out/"draft").iterdir()) == ["config.json", "model.safetensors"]
    assert r["names_checked"] == len(tensors(TARGET)) + 10 and (out/"target"/"tokenizer.json").exists()
    assert read_json(out/"draft"/"config.json")["architectures"] == ["LlamaForCausalLMEagle"]
    assert (folders[1]/"hot_tokens.json").exists()          # the source is untouched
    export(*folders)                                        # and again over itself

@pytest.mark.parametrize("change, message", [
    (lambda t: t.__setitem__("layers.0.self_attn.query.weight", t.pop("layers.0.self_attn.q_proj.weight")), "missing"),
    (lambda t: t.__setitem__("layers.0.input_layernorm.weight", torch.ones(64, dtype=torch.bfloat16)), "not expected"),
    (lambda t: t.__setitem__("fc.weight", t["fc.weight"][:, :64].contiguous()), "shape"),
    (lambda t: t.__setitem__("fc.bias", t["fc.bias"].float()), "dtype"),
    (lambda t: t.pop("fc.bias"), "fc.bias: missing")])
def test_what_sglang_would_not_report(folders, change, message):
    edit(folders[1], change)
    with pytest.raises(UserError, match=message): export(*folders)

def test_broken_files(folders):
    c = read_json(folders[1]/"config.json")
    write_json(folders[1]/"config.json", c | dict(vocab_size=c["vocab_size"] + 1))
    with pytest.raises(UserError, match="vocab_size"): export(*folders)
    write_json(folders[1]/"config.json", c); write_json(folders[1]/"hot_tokens.json", [c["vocab_size"]])
    with pytest.raises(UserError, match="hot tokens"): export(*folders)
    write_json(folders[1]/"hot_tokens.json", [1]); (folders[1]/"model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot read"): export(*folders)
    (folders[1]/"model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors"): export(*folders)

def sglang_loads(names: dict) -> tuple[dict, list]:
    """parameter -> names it is filled from, and the names nobody reads, by the rules of `LlamaForCausalLMEagle3.load_weights` in
    sglang/srt/models/llama_eagle3.py of SGLang 0.5.23. Parameters are those its constructor makes for one layer, no bias, untied head, no fc_norm."""
    layer = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm", "hidden_norm"]
    params = {n + ".weight": [] for n in ["lm_head", "model.embed_tokens", "model.fc", "model.norm", *("model.layers.0." + l for l in layer)]}
    unread = []
    for file_name in names:
        name = file_name.replace("midlayer", "layers.0")
        if "d2t" in name or "t2d" in name: continue
        for new, old in [(".qkv_proj", ".q_proj"), (".qkv_proj", ".k_proj"), (".qkv_proj", ".v_proj"), (".gate_up_proj", ".gate_proj"), (".gate_up_proj", ".up_proj")]:
            if old in name: name = name.replace(old, new); break
        name = name if name in params else f"model.{name}"
        params[name].append(file_name) if name in params else unread.append(file_name)
    return params, unread

def test_eagle3_export_is_what_sglang_reads(tmp_path):
    "Every name finds its parameter, every parameter but the shared embedding is filled, shapes are the constructor's, d2t gives the ids."
    hot = [7, 3, 100, 42]
    random_draft(tmp_path/"draft", TARGET, hot=hot, kind="eagle3"); r = export(TARGET, tmp_path/"draft", tmp_path/"out")
    found, c = tensors(tmp_path/"out"/"draft"), read_json(tmp_path/"out"/"draft"/"config.json")
    params, unread = sglang_loads(found)
    assert not unread and [k for k, v in params.items() if not v] == ["model.embed_tokens.weight"]
    shape = {k: (sum(found[n][0][0] for n in v), *found[v[0]][0][1:]) for k, v in params.items() if v}
    H, I, D, l = c["hidden_size"], c["intermediate_size"], c["head_dim"], "model.layers.0."
    q, kv, n = c["num_attention_heads"]*D, c["num_key_value_heads"]*D, len(c["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    assert shape == {"lm_head.weight": (4, H), "model.fc.weight": (H, n*H), "model.norm.weight": (H,), l + "self_attn.qkv_proj.weight": (q + 2*kv, 2*H),
                     l + "self_attn.o_proj.weight": (H, q), l + "mlp.gate_up_proj.weight": (2*I, H), l + "mlp.down_proj.weight": (H, I), l + "input_layernorm.weight": (H,),
                     l + "post_attention_layernorm.weight": (H,), l + "hidden_norm.weight": (H,)}
    assert {d for k, (_, d) in found.items() if k != "d2t"} == {"BF16"} and found["d2t"] == ((4,), "I64")
    d2t = load_file(tmp_path/"out"/"draft"/"model.safetensors")["d2t"]
    assert (d2t + torch.arange(d2t.shape[0])).tolist() == hot          # as load_weights does it
    assert c["architectures"] == ["LlamaForCausalLMEagle3"] and c["draft_vocab_size"] == 4 and not c["tie_word_embeddings"]
    assert r["algorithm"] == "EAGLE3" and r["hot_tokens"] == 4 and not (tmp_path/"out"/"hot_token_map.pt").exists()
    a = arguments(Endpoint("t", "target", draft="draft", steps=3, topk=1, draft_tokens=4, algorithm="EAGLE3"))
    assert check_flags(a) and a[a.index("--speculative-algorithm") + 1] == "EAGLE3"
    random_draft(tmp_path/"one", TARGET, hot=hot); export(TARGET, tmp_path/"one", tmp_path/"out")          # and back: nothing is left of the other kind
    assert (tmp_path/"out"/"hot_token_map.pt").exists() and "d2t" not in tensors(tmp_path/"out"/"draft")

@pytest.mark.parametrize("change, message", [
    (lambda t: t.__setitem__("d2t", t["d2t"] + torch.arange(4)), "row numbers"), (lambda t: t.__setitem__("d2t", t["d2t"].to(torch.bfloat16)), "dtype"),
    (lambda t: t.__setitem__("norm.weight", t["norm.weight"].float()), "dtype"), (lambda t: t.pop("d2t"), "d2t: missing"),
    (lambda t: t.__setitem__("layers.0.hidden_norm.weight", t.pop("midlayer.hidden_norm.weight")), "hidden_norm")])
def test_eagle3_misfits_are_refused(tmp_path, change, message):
    random_draft(tmp_path/"draft", TARGET, hot=[7, 3, 100, 42], kind="eagle3"); edit(tmp_path/"draft", change)
    with pytest.raises(UserError, match=message): export(TARGET, tmp_path/"draft", tmp_path/"out")

def test_eagle3_layers_must_be_ones_sglang_hands_over(tmp_path):
    random_draft(tmp_path/"draft", TARGET, hot=[1, 2], kind="eagle3"); c = read_json(tmp_path/"draft"/"config.json")
    last = read_json(TARGET/"config.json")["num_hidden_layers"] - 1
    for ids in ([0, 1, last], [1, 0, 2], [-1, 0, 1]):
        write_json(tmp_path/"draft"/"config.json", c | dict(eagle_config=dict(use_aux_hidden_state=True, eagle_aux_hidden_state_layer_ids=ids)))
        with pytest.raises(UserError, match="hands over"): export(TARGET, tmp_path/"draft", tmp_path/"out")

@pytest.mark.parametrize("tied", [True, False])
def test_target_table_is_what_transformers_saves(tmp_path, tied):
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 tie_word_embeddings=tied)).save_pretrained(tmp_path)
    for folder in (tmp_path, TARGET):
        assert all(r["ok"] for r in compare(folder, target_shapes(read_json(folder/"config.json")), ("F32", "BF16")))

@pytest.mark.parametrize("steps, topk, n, ok", [(5, 8, 64, True), (1, 3, 4, True), (1, 3, 5, False), (2, 3, 13, True), (2, 3, 14, False), (3, 1, 4, True), (3, 1, 3, False),
                                                (0, 1, 1, False), (3, 0, 4, False)])
def test_tree_rule(steps, topk, n, ok):
    e = Endpoint("t", "m", draft="d", steps=steps, topk=topk, draft_tokens=n)
    if ok: assert e.check() is e
    else:
        with pytest.raises(UserError): e.check()

def test_tree_rule_counts_candidates():
    "The bound is the number of candidates of a fully expanded beam of topk, counted."
    for steps in range(1, 5):
        for topk in range(2, 5):
            level, total = topk, 1 + topk
            for _ in range(steps - 1): total += min(level, topk)*topk; level = min(level, topk)*topk
            Endpoint("t", "m", draft="d", steps=steps, topk=topk, draft_tokens=total).check()
            with pytest.raises(UserError): Endpoint("t", "m", draft="d", steps=steps, topk=topk, draft_tokens=total + 1).check()

@pytest.mark.parametrize("args", [["--speculative-topk", "4"], ["--port", "http"], ["--port"], ["--port", "--host"], ["--speculative-algorithm", "MAGIC"], ["tree"]])
def test_bad_flags(args):
    with pytest.raises(UserError): check_flags(args)

def test_plain_endpoint_has_no_speculative_flag():
    a = arguments(Endpoint("plain", "m"))
    assert not [x for x in a if "speculative" in x] and a[a.index("--host") + 1] == "127.0.0.1" and set(x for x in a if x.startswith("--")) <= set(flag_table())

def test_sglang_is_not_here():
    "A folder of that name on the path (tests/sglang is one) is not an installation."
    from importlib import metadata
    here = any(d.metadata["Name"] == "sglang" for d in metadata.distributions())
    assert (sglang_parses(["--model-path", "m"]) is None) == (not here)

def test_launch_script_runs_what_it_says(tmp_path):
    "A stand-in `python` on PATH prints its arguments."
    tree = Endpoint("tree", "a folder/it's", draft="d", steps=3, topk=4, draft_tokens=8, token_map="map.pt", extra=("--tp-size", "2"))
    (tmp_path/"launch.sh").write_text(launch_script([tree, Endpoint("plain", "m")]))
    (tmp_path/"python").write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n'); (tmp_path/"python").chmod(0o755)
    run = lambda *a: subprocess.run(["sh", str(tmp_path/"launch.sh"), *a], capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert run("tree", "--port", "5").stdout.splitlines() == ["-m", "sglang.launch_server", *arguments(tree), "--port", "5"]
    assert run("plain").stdout.splitlines()[2:] == arguments(Endpoint("plain", "m"))
    assert run("nope").returncode == 2 and "tree|plain" in run().stderr

def test_token_map_must_fit(tmp_path):
    for hot in ([], [1, 1], [-1], [7]):
        with pytest.raises(UserError): write_token_map(tmp_path/"m.pt", hot, 7)

@contextmanager
def fake_sglang(chunks, status=200, pages={}):
    "Answers /generate with the chunks as server-sent events, other paths with `pages`."
    class Handler(BaseHTTPRequestHandler):
        def reply(self, text):
            self.send_response(status); self.end_headers(); self.wfile.write(text.encode())
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.reply("".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n")
        def do_GET(self): self.reply(pages.get(self.path, ""))
        def log_message(self, *a): pass
    asked, server = [], ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", asked
    finally: server.shutdown(); server.server_close()

# as the real SGLang 0.5.23 streamed them: output_ids grow, the speculative keys come with the last chunk
SPEC = dict(spec_verify_ct=3, spec_accept_length=8/3, spec_correct_drafts_histogram=[1, 0, 2])
CHUNKS = [dict(text="", output_ids=list(range(n)), meta_info=dict(completion_tokens=n) | (SPEC if n == 8 else {})) for n in (1, 4, 5, 8)]

def test_client_reads_text_and_telemetry():
    with fake_sglang(CHUNKS) as (url, asked):
        ids, events, info = sglang_generate(url, [5, 6, 7], 8, dict(request="r", domain="maths"), ignore_eos=True)
    assert ids == list(range(8)) and info["spec_verify_ct"] == 3 and [e["emitted"] for e in events] == [3, 1, 3]
    assert [e["position"] for e in events] == [3, 6, 7] and {e["source"] for e in events} == {"sglang"} and all(e["tree"] is None for e in events)
    assert asked == [dict(input_ids=[5, 6, 7], stream=True, sampling_params=dict(temperature=0, max_new_tokens=8, ignore_eos=True))]

def test_events_have_the_decoders_keys():
    from tpro_nb.eagle_decoding import Decoder
    ours = []
    Decoder(str(TARGET), None, "float32", context=64).generate([1, 2, 3], 4, events=ours)
    assert set(sglang_events([1, 2], dict(spec_verify_ct=1), 4)[0]) == set(ours[0])

def test_merged_chunks_keep_the_sum():
    "A chunk that holds two steps: the histogram tells how long they were."
    with fake_sglang([CHUNKS[0], CHUNKS[1], CHUNKS[3]]) as (url, _): _, events, info = sglang_generate(url, [5], 8)
    assert sorted(e["emitted"] for e in events) == [1, 3, 3] and {e["position"] for e in events} == {None}

def test_plain_answers_are_one_token_a_step():
    plain = [dict(output_ids=list(range(n)), meta_info=dict(completion_tokens=n)) for n in (1, 2, 4)]
    with fake_sglang(plain) as (url, _): _, events, _ = sglang_generate(url, [5], 4)
    assert [(e["position"], e["emitted"]) for e in events] == [(1, 1), (2, 1), (3, 1)] and events[0]["source"] == "sglang/plain"

@pytest.mark.parametrize("chunks, status, message", [([dict(error=dict(message="too long"))], 200, "too long"), ([], 503, "503"), ([dict(output_ids=[1])], 200, "launch.sh")])
def test_client_errors(chunks, status, message):
    with fake_sglang(chunks, status) as (url, _), pytest.raises(UserError, match=message): sglang_generate(url, [5], 3)
    with pytest.raises(UserError, match="launch.sh"): sglang_state("http://127.0.0.1:9")

def test_state():
    pages = {"/server_info": json.dumps(dict(version="0.5.23", internal_states=[dict(avg_spec_accept_length=1.74)])),
             "/metrics": 'sglang:spec_accept_length{model_name="t"} 1.5\nsglang:spec_accept_length_bucket{le="1"} 3\nother 2\nsglang:spec_verify_calls_total{m="t"} 96.0\n'}
    with fake_sglang([], pages=pages) as (url, _): s = sglang_state(url)
    assert s == dict(version="0.5.23", avg_spec_accept_length=1.74, metrics={"sglang:spec_accept_length": 1.5, "sglang:spec_verify_calls_total": 96.0})

def test_figures(tmp_path):
    f = tmp_path/"sglang.json"
    assert sglang_figures(f)["sglang_ran"] == 0 and sglang_figures(f)["parity_tau_diff_pct"] is None
    write_json(f, dict(versions=dict(sglang="0.5.23"), figures=dict(parity_tau_diff_pct=.4)))
    assert sglang_figures(f) == sglang_figures(None) | dict(sglang_ran=1, parity_tau_diff_pct=.4)
    for wrong in ([], {}, dict(figures={}), dict(versions=dict(sglang="0.5.23"), figures=dict(speed=9)), dict(versions=dict(sglang="0.5.23"), figures=dict(parity_tau_diff_pct="0"))):
        write_json(f, wrong)
        with pytest.raises(UserError, match="make test-sglang"): sglang_figures(f)
    f.write_text("{")
    with pytest.raises(UserError): sglang_figures(f)
