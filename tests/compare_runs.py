"""Did two runs compute the same? Metrics to the last digit, artefacts by their bytes.

    python tests/compare_runs.py OLD_RUN NEW_RUN [STAGE...]

Times and memory are compared by no one. A stage is known by its module's name, so `05_data` of
one run meets `05g_data` of the other. Exit status 1 where anything differs that no clock can
explain; every difference is printed.
"""

import hashlib
import json
import sys
from pathlib import Path

# Files that hold times, paths or versions, that are drawn or executed, or that the runner adds.
NOT_COMPUTED = {".ipynb", ".png", ".html", ".log"}
OF_THE_RUNNER = {"stamp.json", "metrics.json", "README.md"}
SCRATCH = {"work", "__pycache__"}

# Endings and parts of keys that a clock or the memory decides.
CLOCK_ENDINGS = ("_s", "_ms", "_mb", "_tok_per_s", "_per_s", "_gb", "_j")
CLOCK_PARTS = (
    "wall peak speedup seconds predicted prediction_error drift overhead break_even _ms_ _s_ per_s"
).split()


def module_name(stage: str) -> str:
    "`05f_data` → `data`."
    return stage.split("_", 1)[1]


def stage_folders(run: Path) -> dict[str, Path]:
    "Module name → folder, for every stage that left metrics."
    folders = sorted(file.parent for file in run.glob("[0-9]*/metrics.json"))
    return {module_name(folder.name): folder for folder in folders}


def of_the_clock(key: str) -> bool:
    "Whether a metric measures time or memory, or is chosen by such a measurement."
    bare = key.removesuffix("_lo").removesuffix("_hi")
    return bare.endswith(CLOCK_ENDINGS) or any(part in key for part in CLOCK_PARTS)


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def artefacts(folder: Path) -> dict[str, str]:
    "Relative path → sha256 of everything computed that a stage left."
    found = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        skipped = file.suffix in NOT_COMPUTED or file.name in OF_THE_RUNNER
        if file.is_file() and not skipped and not SCRATCH & set(inside.parts):
            found[str(inside)] = hashlib.sha256(computed_bytes(file)).hexdigest()
    return found


def computed_bytes(file: Path) -> bytes:
    "A file's bytes; of an event log what was decoded, without how long it took."
    if file.name != "events.jsonl":
        return file.read_bytes()
    events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    kept = [{key: event[key] for key in event if not of_the_clock(key)} for event in events]
    return json.dumps(kept).encode()


def differences(old: dict, new: dict) -> list[tuple[str, object, object]]:
    "Keys whose values differ, with both values; a missing one is shown as «absent»."
    keys = sorted(old.keys() | new.keys())
    pairs = [(key, old.get(key, "absent"), new.get(key, "absent")) for key in keys]
    return [(key, before, after) for key, before, after in pairs if before != after]


def file_verdict(before: object, after: object) -> str:
    if after == "absent":
        return "absent now"
    return "new" if before == "absent" else "other bytes"


def compare_stage(old: Path, new: Path) -> int:
    "Print how a stage's two folders differ; the number of differences no clock explains."
    before = read_metrics(old)
    metrics = differences(before, read_metrics(new))
    firm = [row for row in metrics if not of_the_clock(row[0])]
    files = differences(artefacts(old), artefacts(new))
    print(
        f"{new.name}: {len(before)} metrics, {len(firm)} differ"
        f" ({len(metrics) - len(firm)} of the clock); {len(files)} artefacts differ"
    )
    for key, was, is_now in firm:
        print(f"    {key}: {was} → {is_now}")
    for path, was, is_now in files:
        print(f"    {path}: {file_verdict(was, is_now)}")
    return len(firm) + len(files)


def main(old_run: str, new_run: str, *only: str) -> int:
    "Exit status of the comparison: of the stages in `only`, or of all that the old run has."
    old, new = stage_folders(Path(old_run)), stage_folders(Path(new_run))
    wrong = 0
    for name in [module_name(stage) for stage in only] or old:
        absent_from = [
            run for run, stages in ((old_run, old), (new_run, new)) if name not in stages
        ]
        if absent_from:
            print(f"{name}: absent from {' and '.join(absent_from)}")
            wrong += 1
        else:
            wrong += compare_stage(old[name], new[name])
    return int(wrong > 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
