"""The real SGLang 0.5.23 on a CPU against transformers and our decoder: `make test-sglang`.

What runs is SGLang's server, scheduler, models and EAGLE worker over PyTorch stand-ins (standins/sgl_kernel.py) for its C++ kernels, in
float32, greedy. Ids must be those of transformers; acceptance must be that of tpro_nb.eagle_decoding. No speed is measured, and nothing
is shown for sampling: on a CPU SGLang verifies greedily whatever the temperature.

This process needs the project's own environment; SGLang lives in another one (`make env-sglang`), started with the launch lines of chapter 13.
"""
import argparse, json, os, platform, signal, socket, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
import httpx, torch, yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from tpro_nb.core import environment, toy_model, toy_rows, read_jsonl, sha256, write_json, write_jsonl
from tpro_nb.eagle_decoding import Decoder
from tpro_nb.eagle_draft import build_draft, general_prompts, render, stop_ids
from tpro_nb.serving import SGLANG_KEYS, Endpoint, arguments, export, sglang_generate, sglang_state

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CPU = ("--device cpu --dtype float32 --mem-fraction-static 0.05 --max-total-tokens 4096 --context-length 512 --skip-server-warmup --grammar-backend none "
       "--sleep-on-idle --prefill-attention-backend intel_amx --decode-attention-backend intel_amx").split()
SHAPES = dict(plain=None, chain=(3, 1, 4), tree=(3, 4, 8))      # steps, topk, draft tokens as SGLang counts them (the root among them)


def say(*a): print(*a, flush=True)


# --- a nano pair whose draft is right often enough to be accepted and wrong often enough for branches

def nano(folder: Path) -> Path:
    "Train a nano Qwen3 on toy dialogues and an EAGLE draft for it; the exported folder."
    rows = toy_rows(24)
    model, tok = toy_model(folder/"model", hidden=128, layers=4), AutoTokenizer.from_pretrained(folder/"model")
    texts = [tok.apply_chat_template(r["messages"], tokenize=False, enable_thinking=False) for r in rows]
    ids = [torch.tensor(tok.encode(t, add_special_tokens=False)) for t in texts]
    x = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    for n, w in model.named_parameters():         # three times the usual attention: with less of it, a wrong tree mask changes no answer
        if n.split(".")[-2] in ("q_norm", "v_proj", "o_proj"): w.data.mul_(3)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        b = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:12]]
        loss = model(b.clamp(min=0), attention_mask=(b >= 0).long(), labels=b).loss
        loss.backward(); opt.step(); opt.zero_grad()
    model.save_pretrained(folder/"model")
    prompt = lambda r: dict(id=r["id"], prompt=r["messages"][0]["content"], domain="math", lang="ru", mode="direct")
    p = dict(train=[prompt(r) for r in rows[4:]], dev=[prompt(r) for r in rows[:2]], eval=[prompt(r) for r in rows[2:4]])
    data = dict(max_new=32, batch=32, temperatures=[0.0, .8], token_budget=1280, budget_mb=100, seed=0)
    fit = dict(epochs=8, lr=1e-3, batch=8, w_feat=1.0, w_token=.1, noise=.1, beta2=.95, clip=.5, warmup=4, unroll=1, depth=3, evals=1, curve_rows=2, seed=0)
    made = build_draft(str(folder/"model"), p, "draft", str(folder), ["ru"], data, fit, 320)
    say(f"nano Qwen3: loss {loss:.2f}, draft right {100*made['fit']['heldout']['top1']:.0f} % of the time on held-out prompts")
    export(folder/"model", folder/"draft", folder/"export")
    write_json(folder/"export"/"prompts.json", [prompt(r) for r in rows])
    return folder/"export"


# --- SGLang

def sglang_environment(log: Path) -> dict:
    "Variables of a server: the stand-ins on its path, no hub, no compiler."
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | dict(
        PYTHONPATH=str(HERE/"standins"), SGLANG_USE_CPU_ENGINE="1", TORCH_COMPILE_DISABLE="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", SGLANG_STANDIN_LOG=str(log))

@contextmanager
def server(python: str, e: Endpoint, log: Path, limit: float = 300):
    "A running endpoint; gives its URL. A server that dies or does not answer raises with the end of its log."
    with open(log.with_suffix(".out"), "w") as out:
        p = subprocess.Popen([python, "-m", "sglang.launch_server", *arguments(e)], env=sglang_environment(log), cwd=log.parent, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    url, end = f"http://{e.host}:{e.port}", time.monotonic() + limit
    try:
        while True:
            if p.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"SGLang ({e.name}) did not start:\n" + "".join(log.with_suffix(".out").read_text().splitlines(True)[-40:]))
            try:
                if httpx.get(f"{url}/health", timeout=30).status_code == 200: break
            except httpx.HTTPError: pass
            time.sleep(.5)
        yield url
    finally:
        for sig in (signal.SIGTERM, signal.SIGKILL):
            try: os.killpg(p.pid, sig); p.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired): pass

def free_port() -> int:
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]

def off_first(steps: list[dict]) -> int:
    "Steps in which a node was accepted that is not its parent's first child: SGLang sorts siblings by probability."
    first = lambda s, i: s["parents"].index(s["parents"][i]) == i
    return sum(any(not first(s, i) for i in s["accepted"]) for s in steps)


# --- the comparison

def references(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    "Greedy ids by transformers, float32."
    model = AutoModelForCausalLM.from_pretrained(folder/"target", dtype=torch.float32).eval()
    with torch.inference_mode(): return [model.generate(torch.tensor([p]), max_new_tokens=new, do_sample=False, pad_token_id=0)[0, len(p):].tolist() for p in prompts]

def pair(python: str, name: str, folder: Path, rows: list[dict], new: int, work: Path) -> dict:
    "One target and draft: plain, chain and tree against transformers and our decoder."
    tok, config = AutoTokenizer.from_pretrained(folder/"target"), json.loads((folder/"target"/"config.json").read_text())
    prompts = [render(tok, r["prompt"], r["mode"]) for r in rows]
    want = references(folder, prompts, new)
    eos = stop_ids(AutoModelForCausalLM.from_pretrained(folder/"target"), tok)
    hot = work/f"{name}_draft"                    # our decoder reads the hot list as json beside the weights
    hot.mkdir()
    for f in (folder/"draft").iterdir(): (hot/f.name).symlink_to(f.resolve())
    write_json(hot/"hot_tokens.json", torch.load(folder/"hot_token_map.pt", weights_only=True))
    ours = Decoder(str(folder/"target"), str(hot), "float32", context=512)
    out = dict(name=name, target_sha256=sha256(folder/"target"/"model.safetensors")[:16], draft_sha256=sha256(folder/"draft"/"model.safetensors")[:16], model_type=config["model_type"], layers=config["num_hidden_layers"], hidden=config["hidden_size"], prompts=len(prompts), tokens=sum(map(len, want)), modes={})
    for mode, shape in SHAPES.items():
        log, began = work/f"{name}_{mode}.jsonl", time.monotonic()
        draft = dict(zip(("steps", "topk", "draft_tokens"), shape), draft=str(folder/"draft"), token_map=str(folder/"hot_token_map.pt")) if shape else {}
        with server(python, Endpoint(f"{name}-{mode}", str(folder/"target"), port=free_port(), extra=tuple(CPU), **draft), log) as url:
            started = time.monotonic() - began
            ask = lambda i: sglang_generate(url, prompts[i], new, dict(request=rows[i]["id"], domain=rows[i]["domain"], mode=rows[i]["mode"], lang=rows[i]["lang"]))
            with ThreadPoolExecutor(3) as pool: got = list(pool.map(ask, range(len(prompts))))       # several at a time, so batches are served too
            state = sglang_state(url)
        assert state["version"] == "0.5.23", f"this is SGLang {state['version']}"
        events = [e for g in got for e in g[1]]
        write_jsonl(work/f"{name}_{mode}_events.jsonl", events)
        m = dict(identical=sum(g[0] == w for g, w in zip(got, want)), of=len(want), steps=len(events), start_s=round(started, 1), all_s=round(time.monotonic() - began, 1))
        if shape:
            own = [[] for _ in prompts]
            same = [ours.generate(p, new, tree=(*shape[:2], shape[2] - 1), eos=eos, events=ev) == w for p, ev, w in zip(prompts, own, want)]
            mine, tau, lengths = sum(own, []), lambda ev: sum(e["emitted"] for e in ev)/len(ev), lambda ev: [e["emitted"] for e in ev]
            order = lambda ev, like: lengths(ev) if all(e["position"] is not None for e in like) else sorted(lengths(ev))      # lost where chunks were merged
            alike = sum(order(a, g[1]) == order(g[1], g[1]) for a, g in zip(own, got))
            m |= dict(shape=shape, acceptance_length=round(tau(events), 4), acceptance_length_ours=round(tau(mine), 4), steps_ours=len(mine), identical_ours=sum(same), alike_step_for_step=alike,
                      tau_diff_pct=round(100*abs(tau(events)/tau(mine) - 1), 3), branches_accepted=off_first(read_jsonl(log)), sglang_says=state["avg_spec_accept_length"])
        out["modes"][mode] = m
        say(f"{name} {mode}: {json.dumps(m)}")
    return out


# --- the launch lines of chapter 13, by SGLang's own parser

PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
p, bad = argparse.ArgumentParser(), []
ServerArgs.add_cli_args(p)
for words in json.load(sys.stdin):
    try: p.parse_args(words)
    except SystemExit: bad.append(words)
print("bad:", json.dumps(bad))
"""

def launch_lines() -> list[list[str]]:
    "The three endpoints of every profile, as stage 13 writes them."
    out = []
    for f in sorted((ROOT/"params").glob("*/13_serving.yaml")):
        v = yaml.safe_load(f.read_text())
        model, common = v["model"] or "target", dict(tp_size=v["tp_size"], extra=tuple(v["extra"]))
        spec = dict(draft=v["draft_model"] or "draft", token_map=v["token_map"] or (None if v["model"] else "hot_token_map.pt"))
        out += [arguments(Endpoint(n, model, port=v["port"], **spec, **dict(zip(("steps", "topk", "draft_tokens"), v[n])), **common)) for n in ("tree", "chain")]
        out.append(arguments(Endpoint("plain", model, port=v["port"], **common)))
    return out

def refused(python: str, lines: list[list[str]], log: Path) -> list:
    p = subprocess.run([python, "-c", PARSE], input=json.dumps(lines), env=sglang_environment(log), capture_output=True, text=True)
    if p.returncode: raise SystemExit(f"SGLang's parser did not load:\n{p.stderr[-3000:]}")
    return json.loads(p.stdout.rsplit("bad:", 1)[1])


def versions(python: str) -> dict:
    code = "import json, platform; from importlib.metadata import version as v; print(json.dumps(dict(python=platform.python_version(), **{p: v(p) for p in ('sglang', 'torch', 'transformers')})))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)

def figures(models: list[dict]) -> dict:
    "The keys that stage 13 takes in."
    modes = lambda k: [m["modes"][k] for m in models]
    out = {f"sglang_{k}_identical_pct": round(100*sum(m["identical"] for m in modes(k))/sum(m["of"] for m in modes(k)), 2) for k in SHAPES}
    out |= dict(sglang_tree_branches_accepted=sum(m["branches_accepted"] for m in modes("tree")), parity_tau_diff_pct=max(m["tau_diff_pct"] for k in ("chain", "tree") for m in modes(k)))
    assert set(out) == set(SGLANG_KEYS)
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--python", required=True, help="the python of SGLang's environment"); p.add_argument("--out", type=Path, help="where sglang.json goes")
    p.add_argument("--export", type=Path, nargs="*", default=[], help="folders of stage 13 (target, draft, hot_token_map.pt) to try besides the nano pair")
    p.add_argument("--keep", type=Path, help="work folder to keep (server logs, events)"); p.add_argument("--new", type=int, default=40); p.add_argument("--prompts", type=int, default=16)
    a = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))        # so that servers are stopped
    began, python = time.monotonic(), str(a.python)
    with tempfile.TemporaryDirectory() as tmp:
        work = (a.keep or Path(tmp)).resolve(); work.mkdir(parents=True, exist_ok=True)
        lines = launch_lines()
        bad = refused(python, lines, work/"parser.jsonl")
        say(f"SGLang's parser takes {len(lines) - len(bad)} of {len(lines)} launch lines", *bad)
        todo = [("nano_qwen3", nano(work/"nano"), None)] + [("run_" + f.resolve().parent.name, f.resolve(), general_prompts(0)["eval"]) for f in a.export]
        models = [pair(python, n, f, (r or json.loads((f/"prompts.json").read_text()))[:a.prompts], a.new, work) for n, f, r in todo]
    out = dict(what="SGLang's server, scheduler, models and EAGLE worker over PyTorch stand-ins for its C++ kernels; float32 on a CPU, greedy; says nothing of speed or sampling",
               at=time.strftime("%F"), versions=versions(python), ours=dict(python=platform.python_version(), packages={k: environment()["packages"][k] for k in ("torch", "transformers")}),
               cpu=environment()["cpu"], seconds=round(time.monotonic() - began, 1), launch_lines=len(lines), launch_lines_parsed=len(lines) - len(bad), models=models, figures=figures(models))
    f = out["figures"]
    say(json.dumps(f, indent=1))
    if a.out: write_json(a.out, out)
    wrong = [k for k in f if k.endswith("identical_pct") and f[k] < 100] + ["branches"]*(f["sglang_tree_branches_accepted"] == 0) + ["parity"]*(f["parity_tau_diff_pct"] > 1)
    wrong += ["launch lines"]*bool(bad) + [f"our decoder on {m['name']}" for m in models for x in m["modes"].values() if x.get("identical_ours", x["of"]) < x["of"]]
    sys.exit(f"failed: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__": main()
