"Export to SGLang's layout: names, shapes, dtypes, token map, tree rule, flags, launch script."

import json
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tpro_nb.core import UserError, read_json, toy, write_json
from tpro_nb.decoder import Decoder
from tpro_nb.draft_model import random_draft
from tpro_nb.serving import (
    SGLangLaunch,
    check_flags,
    compare_shapes,
    export_to_sglang,
    flag_table,
    launch_script,
    sglang_arguments,
    sglang_events,
    sglang_figures,
    sglang_generate,
    sglang_parses,
    sglang_state,
    target_shapes,
    tensor_headers,
    tree_fields,
    write_token_map,
)

TARGET = toy("03b_base_model/base")


class Folders(NamedTuple):
    "What `export_to_sglang` takes."

    target: Path
    draft: Path
    out: Path


@pytest.fixture
def folders(tmp_path):
    random_draft(tmp_path / "draft", TARGET, hot=list(range(100)))
    return Folders(TARGET, tmp_path / "draft", tmp_path / "out")


def edit(folder: Path, change):
    "Change the tensors of a draft folder."
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def flag_value(words: list[str], flag: str) -> str:
    "The word after a flag."
    return words[words.index(flag) + 1]


def test_export(folders):
    report = export_to_sglang(*folders)
    out = folders.out
    assert torch.load(out / "hot_token_map.pt", weights_only=True) == list(range(100))
    assert sorted(path.name for path in (out / "draft").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert report["names_checked"] == len(tensor_headers(TARGET)) + 10
    assert (out / "target" / "tokenizer.json").exists()
    assert read_json(out / "draft" / "config.json")["architectures"] == ["LlamaForCausalLMEagle"]
    assert (folders.draft / "hot_tokens.json").exists(), "the source is untouched"
    export_to_sglang(*folders)  # and again over itself


def rename_queries(tensors):
    tensors["layers.0.self_attn.query.weight"] = tensors.pop("layers.0.self_attn.q_proj.weight")


def add_input_norm(tensors):
    tensors["layers.0.input_layernorm.weight"] = torch.ones(64, dtype=torch.bfloat16)


def halve_fc(tensors):
    tensors["fc.weight"] = tensors["fc.weight"][:, :64].contiguous()


def widen_fc_bias(tensors):
    tensors["fc.bias"] = tensors["fc.bias"].float()


def drop_fc_bias(tensors):
    tensors.pop("fc.bias")


@pytest.mark.parametrize(
    "change, message",
    [
        (rename_queries, "missing"),
        (add_input_norm, "not expected"),
        (halve_fc, "shape"),
        (widen_fc_bias, "dtype"),
        (drop_fc_bias, "fc.bias: missing"),
    ],
)
def test_what_sglang_would_not_report(folders, change, message):
    edit(folders.draft, change)
    with pytest.raises(UserError, match=message):
        export_to_sglang(*folders)


def test_broken_files(folders):
    config = read_json(folders.draft / "config.json")
    larger = config | dict(vocab_size=config["vocab_size"] + 1)
    write_json(folders.draft / "config.json", larger)
    with pytest.raises(UserError, match="vocab_size"):
        export_to_sglang(*folders)
    write_json(folders.draft / "config.json", config)
    write_json(folders.draft / "hot_tokens.json", [config["vocab_size"]])
    with pytest.raises(UserError, match="hot tokens"):
        export_to_sglang(*folders)
    write_json(folders.draft / "hot_tokens.json", [1])
    (folders.draft / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot read"):
        export_to_sglang(*folders)
    (folders.draft / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors"):
        export_to_sglang(*folders)


LAYER_PARAMETERS = [
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
    "hidden_norm",
]
FUSED = {
    ".q_proj": ".qkv_proj",
    ".k_proj": ".qkv_proj",
    ".v_proj": ".qkv_proj",
    ".gate_proj": ".gate_up_proj",
    ".up_proj": ".gate_up_proj",
}


def fused_name(name: str) -> str:
    "The name of the parameter that SGLang fills from a tensor and its neighbours."
    for part, whole in FUSED.items():
        if part in name:
            return name.replace(part, whole)
    return name


def sglang_loads(names) -> tuple[dict, list]:
    """Parameter -> names it is filled from, and the names nobody reads.

    The rules are those of `LlamaForCausalLMEagle3.load_weights` in
    sglang/srt/models/llama_eagle3.py of SGLang 0.5.23. Parameters are those its constructor makes
    for one layer, no bias, untied head, no fc_norm.
    """
    parameters = ["lm_head", "model.embed_tokens", "model.fc", "model.norm"]
    parameters += [f"model.layers.0.{name}" for name in LAYER_PARAMETERS]
    filled_from: dict[str, list[str]] = {f"{name}.weight": [] for name in parameters}
    unread = []
    for file_name in names:
        name = file_name.replace("midlayer", "layers.0")
        if "d2t" in name or "t2d" in name:
            continue
        name = fused_name(name)
        if name not in filled_from:
            name = f"model.{name}"
        filled_from.get(name, unread).append(file_name)
    return filled_from, unread


def stacked_shape(headers, names) -> tuple[int, ...]:
    "Shape of a parameter that is filled from several tensors, one below the other."
    rows = sum(headers[name].shape[0] for name in names)
    return (rows, *headers[names[0]].shape[1:])


def test_eagle3_export_is_what_sglang_reads(tmp_path):
    """Every name finds its parameter, every parameter but the shared embedding is filled.

    Shapes are the constructor's, d2t gives the ids.
    """
    hot = [7, 3, 100, 42]
    random_draft(tmp_path / "draft", TARGET, hot=hot, kind="eagle3")
    report = export_to_sglang(TARGET, tmp_path / "draft", tmp_path / "out")
    exported = tmp_path / "out" / "draft"
    headers, config = tensor_headers(exported), read_json(exported / "config.json")
    parameters, unread = sglang_loads(headers)
    assert not unread
    empty = [name for name, sources in parameters.items() if not sources]
    assert empty == ["model.embed_tokens.weight"]
    shapes = {
        name: stacked_shape(headers, sources) for name, sources in parameters.items() if sources
    }
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    read = len(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    assert shapes == {
        "lm_head.weight": (4, hidden),
        "model.fc.weight": (hidden, read * hidden),
        "model.norm.weight": (hidden,),
        "model.layers.0.self_attn.qkv_proj.weight": (q + 2 * kv, 2 * hidden),
        "model.layers.0.self_attn.o_proj.weight": (hidden, q),
        "model.layers.0.mlp.gate_up_proj.weight": (2 * inner, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, inner),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.layers.0.post_attention_layernorm.weight": (hidden,),
        "model.layers.0.hidden_norm.weight": (hidden,),
    }
    assert headers.pop("d2t") == ((4,), "I64")
    assert {header.dtype for header in headers.values()} == {"BF16"}
    d2t = load_file(exported / "model.safetensors")["d2t"]
    assert (d2t + torch.arange(d2t.shape[0])).tolist() == hot  # as load_weights does it
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == 4
    assert not config["tie_word_embeddings"]
    assert report["algorithm"] == "EAGLE3"
    assert report["hot_tokens"] == 4
    assert not (tmp_path / "out" / "hot_token_map.pt").exists()
    words = sglang_arguments(
        SGLangLaunch("t", "target", draft="draft", algorithm="EAGLE3", **tree_fields([3, 1, 4]))
    )
    assert check_flags(words)
    assert flag_value(words, "--speculative-algorithm") == "EAGLE3"


def test_nothing_is_left_of_the_other_kind(tmp_path):
    "An export of EAGLE-1 over one of EAGLE-3."
    random_draft(tmp_path / "three", TARGET, hot=[7, 3, 100, 42], kind="eagle3")
    random_draft(tmp_path / "one", TARGET, hot=[7, 3, 100, 42])
    export_to_sglang(TARGET, tmp_path / "three", tmp_path / "out")
    export_to_sglang(TARGET, tmp_path / "one", tmp_path / "out")
    assert (tmp_path / "out" / "hot_token_map.pt").exists()
    assert "d2t" not in tensor_headers(tmp_path / "out" / "draft")


def ids_for_differences(tensors):
    tensors["d2t"] = tensors["d2t"] + torch.arange(4)


def round_d2t(tensors):
    tensors["d2t"] = tensors["d2t"].to(torch.bfloat16)


def widen_norm(tensors):
    tensors["norm.weight"] = tensors["norm.weight"].float()


def drop_d2t(tensors):
    tensors.pop("d2t")


def rename_hidden_norm(tensors):
    tensors["layers.0.hidden_norm.weight"] = tensors.pop("midlayer.hidden_norm.weight")


@pytest.mark.parametrize(
    "change, message",
    [
        (ids_for_differences, "row numbers"),
        (round_d2t, "dtype"),
        (widen_norm, "dtype"),
        (drop_d2t, "d2t: missing"),
        (rename_hidden_norm, "hidden_norm"),
    ],
)
def test_eagle3_misfits_are_refused(tmp_path, change, message):
    random_draft(tmp_path / "draft", TARGET, hot=[7, 3, 100, 42], kind="eagle3")
    edit(tmp_path / "draft", change)
    with pytest.raises(UserError, match=message):
        export_to_sglang(TARGET, tmp_path / "draft", tmp_path / "out")


def test_eagle3_layers_must_be_ones_sglang_hands_over(tmp_path):
    random_draft(tmp_path / "draft", TARGET, hot=[1, 2], kind="eagle3")
    config = read_json(tmp_path / "draft" / "config.json")
    last = read_json(TARGET / "config.json")["num_hidden_layers"] - 1
    for ids in ([0, 1, last], [1, 0, 2], [-1, 0, 1]):
        read = dict(use_aux_hidden_state=True, eagle_aux_hidden_state_layer_ids=ids)
        write_json(tmp_path / "draft" / "config.json", config | dict(eagle_config=read))
        with pytest.raises(UserError, match="hands over"):
            export_to_sglang(TARGET, tmp_path / "draft", tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_target_table_is_what_transformers_saves(tmp_path, tied):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for folder in (tmp_path, TARGET):
        want = target_shapes(read_json(folder / "config.json"))
        assert all(row["ok"] for row in compare_shapes(folder, want, ("F32", "BF16")))


@pytest.mark.parametrize(
    "shape, ok",
    [
        ((5, 8, 64), True),
        ((1, 3, 4), True),
        ((1, 3, 5), False),
        ((2, 3, 13), True),
        ((2, 3, 14), False),
        ((3, 1, 4), True),
        ((3, 1, 3), False),
        ((0, 1, 1), False),
        ((3, 0, 4), False),
    ],
)
def test_tree_rule(shape, ok):
    "Shapes are steps, topk and draft tokens."
    server = SGLangLaunch("t", "m", draft="d", **tree_fields(shape))
    if ok:
        assert server.check() is server
    else:
        with pytest.raises(UserError):
            server.check()


def beam_candidates(steps: int, topk: int) -> int:
    "Nodes of a fully expanded beam of topk, the root among them, counted level by level."
    level, total = topk, 1 + topk
    for _ in range(steps - 1):
        level = min(level, topk) * topk
        total += level
    return total


@pytest.mark.parametrize("steps", range(1, 5))
@pytest.mark.parametrize("topk", range(2, 5))
def test_tree_rule_counts_candidates(steps, topk):
    most = beam_candidates(steps, topk)
    SGLangLaunch("t", "m", draft="d", **tree_fields([steps, topk, most])).check()
    with pytest.raises(UserError):
        SGLangLaunch("t", "m", draft="d", **tree_fields([steps, topk, most + 1])).check()


@pytest.mark.parametrize(
    "words",
    [
        ["--speculative-topk", "4"],
        ["--port", "http"],
        ["--port"],
        ["--port", "--host"],
        ["--speculative-algorithm", "MAGIC"],
        ["tree"],
    ],
)
def test_bad_flags(words):
    with pytest.raises(UserError):
        check_flags(words)


def test_plain_endpoint_has_no_speculative_flag():
    words = sglang_arguments(SGLangLaunch("plain", "m"))
    assert not [word for word in words if "speculative" in word]
    assert flag_value(words, "--host") == "127.0.0.1"
    assert {word for word in words if word.startswith("--")} <= set(flag_table())


def test_sglang_is_not_here():
    "A folder of that name on the path (tests/sglang is one) is not an installation."
    installed = any(found.metadata["Name"] == "sglang" for found in metadata.distributions())
    assert (sglang_parses(["--model-path", "m"]) is None) == (not installed)


def test_launch_script_runs_what_it_says(tmp_path):
    "A stand-in `python` on PATH prints its arguments."
    plain = SGLangLaunch("plain", "m")
    tree = SGLangLaunch(
        "tree",
        "a folder/it's",
        draft="d",
        token_map="map.pt",
        extra=("--tp-size", "2"),
        **tree_fields([3, 4, 8]),
    )
    (tmp_path / "launch.sh").write_text(launch_script([tree, plain]))
    (tmp_path / "python").write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    (tmp_path / "python").chmod(0o755)

    def run(*words):
        return subprocess.run(
            ["sh", str(tmp_path / "launch.sh"), *words],
            capture_output=True,
            text=True,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        )

    assert run("tree", "--port", "5").stdout.splitlines() == [
        "-m",
        "sglang.launch_server",
        *sglang_arguments(tree),
        "--port",
        "5",
    ]
    assert run("plain").stdout.splitlines()[2:] == sglang_arguments(plain)
    assert run("nope").returncode == 2
    assert "tree|plain" in run().stderr


def test_token_map_must_fit(tmp_path):
    for hot in ([], [1, 1], [-1], [7]):
        with pytest.raises(UserError):
            write_token_map(tmp_path / "m.pt", hot, 7)


@contextmanager
def fake_sglang(chunks, status=200, pages=None):
    "Answers /generate with the chunks as server-sent events, other paths with `pages`."
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
            self.reply("".join(events) + "data: [DONE]\n\n")

        def do_GET(self):
            self.reply((pages or {}).get(self.path, ""))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


# as the real SGLang 0.5.23 streamed them: output_ids grow, the speculative keys come with the
# last chunk
SPECULATIVE = dict(
    spec_verify_ct=3, spec_accept_length=8 / 3, spec_correct_drafts_histogram=[1, 0, 2]
)
CHUNKS = [
    dict(
        text="",
        output_ids=list(range(n)),
        meta_info=dict(completion_tokens=n) | (SPECULATIVE if n == 8 else {}),
    )
    for n in (1, 4, 5, 8)
]


def emitted(events) -> list[int]:
    "Tokens of each step."
    return [event["emitted"] for event in events]


def positions(events) -> list:
    "Where each step began."
    return [event["position"] for event in events]


def test_client_reads_text_and_telemetry():
    meta = dict(request="r", domain="maths")
    with fake_sglang(CHUNKS) as (url, asked):
        ids, events, info = sglang_generate(url, [5, 6, 7], 8, meta, ignore_eos=True)
    assert ids == list(range(8))
    assert info["spec_verify_ct"] == 3
    assert emitted(events) == [3, 1, 3]
    assert positions(events) == [3, 6, 7]
    assert {event["source"] for event in events} == {"sglang"}
    assert all(event["tree"] is None for event in events)
    assert asked == [
        dict(
            input_ids=[5, 6, 7],
            stream=True,
            sampling_params=dict(temperature=0, max_new_tokens=8, ignore_eos=True),
        )
    ]


def test_events_have_the_decoders_keys():
    ours = []
    Decoder(str(TARGET), None, "float32", context=64).generate([1, 2, 3], 4, events=ours)
    theirs = sglang_events([1, 2], dict(spec_verify_ct=1), 4)
    assert set(theirs[0]) == set(ours[0])


def test_merged_chunks_keep_the_sum():
    "A chunk that holds two steps: the histogram tells how long they were."
    with fake_sglang([CHUNKS[0], CHUNKS[1], CHUNKS[3]]) as (url, _):
        answer = sglang_generate(url, [5], 8)
    assert sorted(emitted(answer.events)) == [1, 3, 3]
    assert set(positions(answer.events)) == {None}


def test_plain_answers_are_one_token_a_step():
    plain = [
        dict(output_ids=list(range(n)), meta_info=dict(completion_tokens=n)) for n in (1, 2, 4)
    ]
    with fake_sglang(plain) as (url, _):
        events = sglang_generate(url, [5], 4).events
    assert positions(events) == [1, 2, 3]
    assert emitted(events) == [1, 1, 1]
    assert events[0]["source"] == "sglang/plain"


@pytest.mark.parametrize(
    "chunks, status, message",
    [
        ([dict(error=dict(message="too long"))], 200, "too long"),
        ([], 503, "503"),
        ([dict(output_ids=[1])], 200, "launch.sh"),
    ],
)
def test_client_errors(chunks, status, message):
    with fake_sglang(chunks, status) as (url, _), pytest.raises(UserError, match=message):
        sglang_generate(url, [5], 3)
    with pytest.raises(UserError, match="launch.sh"):
        sglang_state("http://127.0.0.1:9")


def test_state():
    states = [dict(avg_spec_accept_length=1.74)]
    metrics = [
        'sglang:spec_accept_length{model_name="t"} 1.5',
        'sglang:spec_accept_length_bucket{le="1"} 3',
        "other 2",
        'sglang:spec_verify_calls_total{m="t"} 96.0',
    ]
    pages = {
        "/server_info": json.dumps(dict(version="0.5.23", internal_states=states)),
        "/metrics": "\n".join(metrics) + "\n",
    }
    with fake_sglang([], pages=pages) as (url, _):
        state = sglang_state(url)
    assert state == dict(
        version="0.5.23",
        avg_spec_accept_length=1.74,
        metrics={"sglang:spec_accept_length": 1.5, "sglang:spec_verify_calls_total": 96.0},
    )


def test_figures(tmp_path):
    file = tmp_path / "sglang.json"
    versions = dict(sglang="0.5.23")
    assert sglang_figures(file)["sglang_ran"] == 0
    assert sglang_figures(file)["parity_tau_diff_pct"] is None
    write_json(file, dict(versions=versions, figures=dict(parity_tau_diff_pct=0.4)))
    assert sglang_figures(file) == sglang_figures(None) | dict(
        sglang_ran=1, parity_tau_diff_pct=0.4
    )
    for wrong in (
        [],
        {},
        dict(figures={}),
        dict(versions=versions, figures=dict(speed=9)),
        dict(versions=versions, figures=dict(parity_tau_diff_pct="0")),
    ):
        write_json(file, wrong)
        with pytest.raises(UserError, match="make test-sglang"):
            sglang_figures(file)
    file.write_text("{")
    with pytest.raises(UserError):
        sglang_figures(file)
