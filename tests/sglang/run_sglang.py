"""The real SGLang 0.5.23 on a CPU against transformers and our decoder: `make test-sglang`.

What runs is SGLang's server, scheduler, models and EAGLE worker over PyTorch stand-ins
(standins/sgl_kernel.py) for its C++ kernels, in float32, greedy. Ids must be those of transformers;
acceptance must be that of tpro_nb.decoder. No speed is measured, and nothing is shown for
sampling: on a CPU SGLang verifies greedily whatever the temperature.

This process needs the project's own environment; SGLang lives in another one (`make env-sglang`),
started with the launch lines of chapter 13.
"""

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import httpx
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tpro_nb.core import (
    environment,
    read_json,
    read_jsonl,
    sha256,
    toy_model,
    toy_rows,
    write_json,
    write_jsonl,
)
from tpro_nb.decoder import Decoder
from tpro_nb.eagle_draft import DraftSettings, DraftTraining, build_draft
from tpro_nb.serving import (
    SGLANG_KEYS,
    SGLANG_VERSION,
    SGLangAnswer,
    SGLangLaunch,
    export_to_sglang,
    sglang_arguments,
    sglang_generate,
    sglang_state,
    tree_fields,
)
from tpro_nb.target_text import ShardSettings, TargetPrompt, general_prompts, render, stop_ids

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CPU = (
    "--device cpu --dtype float32 --mem-fraction-static 0.05 --max-total-tokens 4096 "
    "--context-length 512 --skip-server-warmup --grammar-backend none --sleep-on-idle "
    "--prefill-attention-backend intel_amx --decode-attention-backend intel_amx"
).split()
# steps, topk, draft tokens as SGLang counts them (the root among them)
SHAPES = dict(plain=None, chain=(3, 1, 4), tree=(3, 4, 8))


def say(*words):
    print(*words, flush=True)


# --- a nano pair whose draft is right often enough to be accepted and wrong often enough for
# branches


def strengthen_attention(model):
    "Three times the usual attention: with less of it, a wrong tree mask changes no answer."
    for name, weight in model.named_parameters():
        if name.split(".")[-2] in ("q_norm", "v_proj", "o_proj"):
            weight.data.mul_(3)


def train_nano(model, texts: list[torch.Tensor], steps: int = 60) -> float:
    "Train on token ids of dialogues; the last loss."
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        shuffled = torch.randperm(len(padded), generator=torch.Generator().manual_seed(step))
        labels = padded[shuffled[:12]]
        mask = (labels >= 0).long()
        loss = model(labels.clamp(min=0), attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def prompt_of(row: dict) -> TargetPrompt:
    "What a toy dialogue asks."
    return TargetPrompt(
        id=row["id"],
        prompt=row["messages"][0]["content"],
        domain="math",
        lang="ru",
        mode="direct",
    )


NANO = DraftSettings(
    langs=["ru"],
    draft_vocab=320,
    shards=ShardSettings(
        max_new=32, batch=32, temperatures=[0.0, 0.8], token_budget=1280, budget_mb=100, seed=0
    ),
    training=DraftTraining(
        epochs=8,
        lr=1e-3,
        batch=8,
        w_feat=1.0,
        w_token=0.1,
        noise=0.1,
        beta2=0.95,
        clip=0.5,
        warmup=4,
        unroll=1,
        depth=3,
        evals=1,
        curve_rows=2,
        seed=0,
    ),
)


def nano(folder: Path) -> Path:
    "Train a nano Qwen3 on toy dialogues and an EAGLE draft for it; the exported folder."
    rows = toy_rows(24)
    model = toy_model(folder / "model", hidden=128, layers=4)
    tok = AutoTokenizer.from_pretrained(folder / "model")
    texts = []
    for row in rows:
        text = tok.apply_chat_template(row["messages"], tokenize=False, enable_thinking=False)
        texts.append(torch.tensor(tok.encode(text, add_special_tokens=False)))
    strengthen_attention(model)
    loss = train_nano(model, texts)
    model.save_pretrained(folder / "model")
    asked = [prompt_of(row) for row in rows]
    prompts = dict(train=asked[4:], dev=asked[:2], eval=asked[2:4])
    made = build_draft(str(folder / "model"), prompts, "draft", str(folder), asdict(NANO))
    right = 100 * made["fit"]["heldout"]["top1"]
    say(f"nano Qwen3: loss {loss:.2f}, draft right {right:.0f} % of the time on held-out prompts")
    export_to_sglang(folder / "model", folder / "draft", folder / "export")
    write_json(folder / "export" / "prompts.json", asked)
    return folder / "export"


# --- SGLang


def sglang_environment(log: Path) -> dict[str, str]:
    "Variables of a server: the stand-ins on its path, no hub, no compiler."
    own = dict(
        PYTHONPATH=str(HERE / "standins"),
        SGLANG_USE_CPU_ENGINE="1",
        TORCH_COMPILE_DISABLE="1",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        SGLANG_STANDIN_LOG=str(log),
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return inherited | own


def answers_health(url: str) -> bool:
    "Is a server up?"
    try:
        return httpx.get(f"{url}/health", timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def server(python: str, endpoint: SGLangLaunch, log: Path, limit: float = 300):
    "A running endpoint's URL. One that dies or does not answer raises with the end of its log."
    printed = log.with_suffix(".out")
    with open(printed, "w") as out:
        process = subprocess.Popen(
            [python, "-m", "sglang.launch_server", *sglang_arguments(endpoint)],
            env=sglang_environment(log),
            cwd=log.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://{endpoint.host}:{endpoint.port}"
    end = time.monotonic() + limit
    try:
        while True:
            if process.poll() is not None or time.monotonic() > end:
                last_lines = printed.read_text().splitlines(True)[-40:]
                raise SystemExit(f"SGLang ({endpoint.name}) did not start:\n" + "".join(last_lines))
            if answers_health(url):
                break
            time.sleep(0.5)
        yield url
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_first_child(parents: list[int], node: int) -> bool:
    "SGLang sorts siblings by probability: the first child is the likeliest."
    return parents.index(parents[node]) == node


def branches_accepted(steps: list[dict]) -> int:
    "Steps in which a node was accepted that is not its parent's first child."
    return sum(
        not all(is_first_child(step["parents"], node) for node in step["accepted"])
        for step in steps
    )


# --- the comparison


@dataclass
class Pair:
    "A target and its draft as stage 13 exports them, and what both are asked."

    name: str
    folder: Path  # target, draft, hot_token_map.pt
    rows: list[TargetPrompt]
    new: int  # most new tokens
    work: Path

    @cached_property
    def tok(self):
        return AutoTokenizer.from_pretrained(self.folder / "target")

    @cached_property
    def config(self) -> dict:
        return read_json(self.folder / "target" / "config.json")

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [render(self.tok, row["prompt"], row["mode"]) for row in self.rows]

    @cached_property
    def model(self):
        loaded = AutoModelForCausalLM.from_pretrained(self.folder / "target", dtype=torch.float32)
        return loaded.eval()

    @cached_property
    def references(self) -> list[list[int]]:
        "Greedy ids by transformers, float32."
        answers = []
        with torch.inference_mode():
            for prompt in self.prompts:
                ids = self.model.generate(
                    torch.tensor([prompt]),
                    max_new_tokens=self.new,
                    do_sample=False,
                    pad_token_id=0,
                )
                answers.append(ids[0, len(prompt) :].tolist())
        return answers

    @cached_property
    def decoder(self) -> Decoder:
        "Ours; it reads the hot list as json beside the weights."
        draft = self.work / f"{self.name}_draft"
        draft.mkdir()
        for file in (self.folder / "draft").iterdir():
            (draft / file.name).symlink_to(file.resolve())
        hot = torch.load(self.folder / "hot_token_map.pt", weights_only=True)
        write_json(draft / "hot_tokens.json", hot)
        return Decoder(str(self.folder / "target"), str(draft), "float32", context=512)

    def endpoint(self, mode: str) -> SGLangLaunch:
        "The server of a mode."
        speculative = {}
        if SHAPES[mode]:
            speculative = tree_fields(SHAPES[mode]) | dict(
                draft=str(self.folder / "draft"),
                token_map=str(self.folder / "hot_token_map.pt"),
            )
        return SGLangLaunch(
            f"{self.name}-{mode}",
            str(self.folder / "target"),
            port=free_port(),
            extra=tuple(CPU),
            **speculative,
        )

    def ask(self, url: str, n: int) -> SGLangAnswer:
        "Prompt `n` to a server."
        row = self.rows[n]
        meta = dict(request=row["id"], domain=row["domain"], mode=row["mode"], lang=row["lang"])
        return sglang_generate(url, self.prompts[n], self.new, meta)


def emitted(events: list[dict]) -> list[int]:
    "Tokens of each step."
    return [event["emitted"] for event in events]


def tokens_a_step(events: list[dict]) -> float:
    return sum(emitted(events)) / len(events)


def alike(ours: list[dict], theirs: list[dict]) -> bool:
    "The same tokens a step; their order is lost where SGLang merged chunks."
    if all(event["position"] is not None for event in theirs):
        return emitted(ours) == emitted(theirs)
    return sorted(emitted(ours)) == sorted(emitted(theirs))


def against_our_decoder(
    pair: Pair, shape: tuple, answers: list[SGLangAnswer], drafted: list[dict]
) -> dict:
    "Acceptance of SGLang beside that of our decoder with the same tree; `drafted`: SGLang's trees."
    steps, topk, draft_tokens = shape
    eos = stop_ids(pair.model, pair.tok)
    own_events: list[list[dict]] = []
    same = 0
    for prompt, wanted in zip(pair.prompts, pair.references):
        events: list[dict] = []
        tree = (steps, topk, draft_tokens - 1)
        text = pair.decoder.generate(prompt, pair.new, tree=tree, eos=eos, events=events)
        own_events.append(events)
        same += text == wanted
    mine = [event for events in own_events for event in events]
    theirs = [event for answer in answers for event in answer.events]
    tau, tau_ours = tokens_a_step(theirs), tokens_a_step(mine)
    return dict(
        shape=shape,
        acceptance_length=round(tau, 4),
        acceptance_length_ours=round(tau_ours, 4),
        steps_ours=len(mine),
        identical_ours=same,
        alike_step_for_step=sum(
            alike(events, answer.events) for events, answer in zip(own_events, answers)
        ),
        tau_diff_pct=round(100 * abs(tau / tau_ours - 1), 3),
        branches_accepted=branches_accepted(drafted),
    )


def try_mode(python: str, pair: Pair, mode: str) -> dict:
    "One mode of one pair against transformers and our decoder."
    began = time.monotonic()
    log = pair.work / f"{pair.name}_{mode}.jsonl"
    with server(python, pair.endpoint(mode), log) as url:
        started = time.monotonic() - began
        with ThreadPoolExecutor(3) as pool:  # several at a time, so batches are served too
            pending = [pool.submit(pair.ask, url, n) for n in range(len(pair.prompts))]
            answers = [asked.result() for asked in pending]
        state = sglang_state(url)
    assert state["version"] == SGLANG_VERSION, f"this is SGLang {state['version']}"
    events = [event for answer in answers for event in answer.events]
    write_jsonl(pair.work / f"{pair.name}_{mode}_events.jsonl", events)
    result = dict(
        identical=sum(answer.ids == want for answer, want in zip(answers, pair.references)),
        of=len(pair.references),
        steps=len(events),
        start_s=round(started, 1),
        all_s=round(time.monotonic() - began, 1),
    )
    if SHAPES[mode]:
        result |= against_our_decoder(pair, SHAPES[mode], answers, read_jsonl(log))
        result |= dict(sglang_says=state["avg_spec_accept_length"])
    return result


def compare_pair(python: str, pair: Pair) -> dict:
    "One target and draft: plain, chain and tree."
    result = dict(
        name=pair.name,
        target_sha256=sha256(pair.folder / "target" / "model.safetensors")[:16],
        draft_sha256=sha256(pair.folder / "draft" / "model.safetensors")[:16],
        model_type=pair.config["model_type"],
        layers=pair.config["num_hidden_layers"],
        hidden=pair.config["hidden_size"],
        prompts=len(pair.prompts),
        tokens=sum(map(len, pair.references)),
        modes={},
    )
    for mode in SHAPES:
        result["modes"][mode] = try_mode(python, pair, mode)
        say(f"{pair.name} {mode}: {json.dumps(result['modes'][mode])}")
    return result


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
    lines = []
    for file in sorted((ROOT / "params").glob("*/13_serving.yaml")):
        stage = yaml.safe_load(file.read_text())
        model = stage["model"] or "target"
        common = dict(port=stage["port"], tp_size=stage["tp_size"], extra=tuple(stage["extra"]))
        own_map = None if stage["model"] else "hot_token_map.pt"
        speculative = dict(
            draft=stage["draft_model"] or "draft", token_map=stage["token_map"] or own_map
        )
        servers = [
            SGLangLaunch(name, model, **speculative, **tree_fields(stage[name]), **common)
            for name in ("tree", "chain")
        ]
        servers.append(SGLangLaunch("plain", model, **common))
        lines += [sglang_arguments(endpoint) for endpoint in servers]
    return lines


def refused(python: str, lines: list[list[str]], log: Path) -> list[list[str]]:
    "The lines that SGLang's parser does not take."
    run = subprocess.run(
        [python, "-c", PARSE],
        input=json.dumps(lines),
        env=sglang_environment(log),
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"SGLang's parser did not load:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.rsplit("bad:", 1)[1])


VERSIONS = """
import json, platform
from importlib.metadata import version
packages = {name: version(name) for name in ("sglang", "torch", "transformers")}
print(json.dumps(dict(python=platform.python_version(), **packages)))
"""


def versions(python: str) -> dict[str, str]:
    "What SGLang's environment holds."
    run = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def figures(models: list[dict]) -> dict:
    "The keys that stage 13 takes in."
    found = {}
    for mode in SHAPES:
        results = [model["modes"][mode] for model in models]
        identical = sum(result["identical"] for result in results)
        answers = sum(result["of"] for result in results)
        found[f"sglang_{mode}_identical_pct"] = round(100 * identical / answers, 2)
    branches, differences = 0, []
    for model in models:
        branches += model["modes"]["tree"]["branches_accepted"]
        differences += [model["modes"][mode]["tau_diff_pct"] for mode in ("chain", "tree")]
    found["sglang_tree_branches_accepted"] = branches
    found["parity_tau_diff_pct"] = max(differences)
    assert set(found) == set(SGLANG_KEYS)
    return found


def failures(found: dict, models: list[dict], bad_lines: list) -> list[str]:
    "What is wrong, in words; empty where all is well."
    wrong = [key for key, value in found.items() if key.endswith("identical_pct") and value < 100]
    if found["sglang_tree_branches_accepted"] == 0:
        wrong.append("branches")
    if found["parity_tau_diff_pct"] > 1:
        wrong.append("parity")
    if bad_lines:
        wrong.append("launch lines")
    for model in models:
        for result in model["modes"].values():
            if result.get("identical_ours", result["of"]) < result["of"]:
                wrong.append(f"our decoder on {model['name']}")
    return wrong


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="the python of SGLang's environment")
    parser.add_argument("--out", type=Path, help="where sglang.json goes")
    parser.add_argument(
        "--export",
        type=Path,
        nargs="*",
        default=[],
        help="folders of stage 13 (target, draft, hot_token_map.pt) besides the nano pair",
    )
    parser.add_argument("--keep", type=Path, help="work folder to keep (server logs, events)")
    parser.add_argument("--new", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=16)
    return parser.parse_args()


@dataclass
class Findings:
    "What was run."

    lines: list[list[str]]
    bad_lines: list[list[str]] = field(default_factory=list)
    models: list[dict] = field(default_factory=list)


def run_everything(options: argparse.Namespace, work: Path) -> Findings:
    "The parser on every launch line, then the nano pair and the exported ones."
    python = str(options.python)
    found = Findings(launch_lines())
    found.bad_lines = refused(python, found.lines, work / "parser.jsonl")
    taken = len(found.lines) - len(found.bad_lines)
    say(f"SGLang's parser takes {taken} of {len(found.lines)} launch lines", *found.bad_lines)
    nano_folder = nano(work / "nano")
    asked = [("nano_qwen3", nano_folder, read_json(nano_folder / "prompts.json"))]
    for folder in options.export:
        name = "run_" + folder.resolve().parent.name
        asked.append((name, folder.resolve(), general_prompts(0)["eval"]))
    for name, folder, rows in asked:
        pair = Pair(name, folder, rows[: options.prompts], options.new, work)
        found.models.append(compare_pair(python, pair))
    return found


def stop(*_):
    "Leave in order, so that servers are stopped."
    sys.exit(143)


def main():
    options = parse_arguments()
    signal.signal(signal.SIGTERM, stop)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as tmp:
        work = (options.keep or Path(tmp)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        found = run_everything(options, work)
    here = environment()
    packages = {name: here["packages"][name] for name in ("torch", "transformers")}
    report = dict(
        what="SGLang's server, scheduler, models and EAGLE worker over PyTorch stand-ins for its "
        "C++ kernels; float32 on a CPU, greedy; says nothing of speed or sampling",
        at=time.strftime("%F"),
        versions=versions(str(options.python)),
        ours=dict(python=platform.python_version(), packages=packages),
        cpu=here["cpu"],
        seconds=round(time.monotonic() - began, 1),
        launch_lines=len(found.lines),
        launch_lines_parsed=len(found.lines) - len(found.bad_lines),
        models=found.models,
        figures=figures(found.models),
    )
    say(json.dumps(report["figures"], indent=1))
    if options.out:
        write_json(options.out, report)
    wrong = failures(report["figures"], found.models, found.bad_lines)
    sys.exit(f"failed: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
