"The benchmark of a running server: a whole small run, resume, what is refused, failed requests."

import json

import pytest
from test_server import service, talkative

from tpro_nb import benchmark
from tpro_nb.benchmark import bench_command, benchmark_tables, stream_once
from tpro_nb.core import UserError, read_jsonl
from tpro_nb.server import serving

QUESTIONS = (
    ("code", "Привет"),
    ("general", "Сколько будет 12 + 30?"),
    ("general", "Да?"),
)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    svc = service(talkative(tmp_path_factory.mktemp("benchmark")))
    with serving(svc) as address:
        yield f"{address}/v1"


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [dict(domain=domain, prompt=prompt) for domain, prompt in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def arguments(url, questions, out, *more, eagle="toy"):
    return [
        *(url, eagle),
        *("--plain", "toy-plain"),
        *("--questions", questions),
        *("--out", str(out)),
        *("--tokens", "12"),
        *("--prompts", "2"),
        *("--temperatures", "0", "0.8"),
        *("--concurrency", "1", "3"),
        *("--repeats", "2"),
        *more,
    ]


def test_a_whole_run_and_its_tables(url, questions, tmp_path, monkeypatch):
    out = tmp_path / "bench"
    assert bench_command(arguments(url, questions, out)) == 0
    rows = read_jsonl(out / "requests.jsonl")
    assert len(rows) == 2 * 2 * 2 * 2 * 2 * 3
    assert not any("error" in row for row in rows)
    assert [row["repeat"] for row in rows] == [0] * 48 + [1] * 48  # all cells, then all again
    assert len({tuple(row["at"]) for row in rows}) == len(rows)
    for row in rows:
        assert bool(row["acceptance_length"]) == (row["side"] == "eagle")
        assert 0 < row["ttft_s"] <= row["latency_s"]
        assert row["tokens"] <= 12
    lines = (out / "domains.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 2
    expected = "code,direct,0.0,1,ruCodeEval,2.26,4.09,"
    assert any(line.startswith(expected) for line in lines)
    written = {file.name for file in out.iterdir()}
    assert written >= {"averages.csv", "load.csv", "speedup.png"}
    monkeypatch.setattr(benchmark, "stream_once", None)  # nothing is asked again
    assert bench_command(arguments(url, questions, out)) == 0
    assert read_jsonl(out / "requests.jsonl") == rows


def test_a_killed_run_goes_on(url, questions, tmp_path):
    out = tmp_path / "bench"
    bench_command(arguments(url, questions, out))
    log = out / "requests.jsonl"
    lines = log.read_text().splitlines(True)
    log.write_text("".join(lines[:30]))
    bench_command(arguments(url, questions, out))
    assert log.read_text().splitlines(True)[:30] == lines[:30]
    assert len(read_jsonl(log)) == len(lines)


def test_refused_before_anything_is_asked(url, questions, tmp_path):
    out = tmp_path / "bench"
    with pytest.raises(UserError, match="nobody answers"):
        bench_command(arguments("http://127.0.0.1:9/v1", questions, out))
    with pytest.raises(UserError, match="not toy-fast"):
        bench_command(arguments(url, questions, out, eagle="toy-fast"))
    with pytest.raises(UserError, match="--concurrency"):
        bench_command(arguments(url, questions, out, "--concurrency", "0"))
    assert not (out / "requests.jsonl").exists()
    bench_command(arguments(url, questions, out))
    with pytest.raises(UserError, match="other settings"):
        bench_command(arguments(url, questions, out, "--prompts", "1"))
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="line 1"):
        bench_command(arguments(url, questions, tmp_path / "b"))


def test_failed_requests_are_counted_and_their_partners_left_out(
    url, questions, tmp_path, monkeypatch
):
    async def fails_once(client, address, model, job, new):
        if model == "toy" and job.prompt == "Да?":
            return dict(error="status 503")
        return await stream_once(client, address, model, job, new)

    monkeypatch.setattr(benchmark, "stream_once", fails_once)
    out = tmp_path / "bench"
    bench_command(arguments(url, questions, out))
    averages = benchmark_tables(read_jsonl(out / "requests.jsonl"))["averages"]
    assert averages[0]["prompts"] == 2
    assert averages[0]["failed"] == 2  # once in every round


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "No such file"),
        ('{"domain": "а", "prompt": "б"}'.encode("cp1251"), "iconv -f CP1251"),
        (b'["domain"]', "line 1: needs domain and prompt"),
        (b'{"domain": "code"}', "line 1: needs domain and prompt"),
        (b"\n", "is empty"),
        ('{"domain": "а", "prompt": "б\u2028в"}'.encode(), ""),
    ],
)
def test_questions_of_another_kind_are_named(tmp_path, content, told):
    file = tmp_path / "q.jsonl"
    if content is not None:
        file.write_bytes(content)
    if not told:
        assert benchmark.benchmark_questions(str(file)) == {"а": ["б\u2028в"]}
        return
    with pytest.raises(UserError, match=told) as refused:
        benchmark.benchmark_questions(str(file))
    assert str(refused.value).startswith("--questions") and "stage" not in str(refused.value)
