"The benchmark of a running server: a whole small run, resume, what is refused, failed requests kept apart."
import json
import pytest
from tpro_nb import benchmark as B, server as S
from tpro_nb.core import UserError, read_jsonl
from test_server import folders, one_thread, service, talkative

@pytest.fixture(scope="module")
def url(folders):
    svc = service(folders)
    with S.serving(svc) as u: yield u + "/v1"

@pytest.fixture
def asked(tmp_path):
    f = tmp_path/"q.jsonl"
    f.write_text("".join(json.dumps(dict(domain=d, prompt=p)) + "\n" for d, p in (("code", "Привет"), ("general", "Сколько будет 12 + 30?"), ("general", "Да?"))))
    return str(f)

def args(url, asked, out, *more): return [url, "toy", "--plain", "toy-plain", "--questions", asked, "--out", str(out), "--tokens", "12", "--prompts", "2", "--temperatures", "0", "0.8", "--concurrency", "1", "3", *more]

def test_a_whole_run_and_its_tables(url, asked, tmp_path, monkeypatch):
    out = tmp_path/"bench"
    assert B.main(args(url, asked, out)) == 0
    rows = read_jsonl(out/"requests.jsonl")
    assert len(rows) == 2*2*2*2*3 and not any("error" in r for r in rows) and len({tuple(r["at"]) for r in rows}) == len(rows)
    assert all(r["acceptance_length"] for r in rows if r["side"] == "eagle") and not any(r["acceptance_length"] for r in rows if r["side"] == "plain")
    assert all(0 < r["ttft_s"] <= r["latency_s"] and r["tokens"] <= 12 for r in rows)
    text = (out/"domains.csv").read_text().splitlines()
    assert len(text) == 1 + 2*2*2 and any(l.startswith("code,direct,0.0,1,ruCodeEval,2.26,4.09,") for l in text)
    assert {p.name for p in out.iterdir()} >= {"averages.csv", "load.csv", "speedup.png"}
    monkeypatch.setattr(B, "one", None)                                   # nothing is asked again
    assert B.main(args(url, asked, out)) == 0 and read_jsonl(out/"requests.jsonl") == rows

def test_a_killed_run_goes_on(url, asked, tmp_path):
    out = tmp_path/"bench"
    B.main(args(url, asked, out))
    log = out/"requests.jsonl"; lines = log.read_text().splitlines(True)
    log.write_text("".join(lines[:30])); B.main(args(url, asked, out))
    assert log.read_text().splitlines(True)[:30] == lines[:30] and len(read_jsonl(log)) == len(lines)

def test_refused_before_anything_is_asked(url, asked, tmp_path):
    out = tmp_path/"bench"
    with pytest.raises(UserError, match="nobody answers"): B.main(args("http://127.0.0.1:9/v1", asked, out))
    with pytest.raises(UserError, match="not toy-fast"): B.main([*args(url, asked, out)[:1], "toy-fast", *args(url, asked, out)[2:]])
    with pytest.raises(UserError, match="--concurrency"): B.main(args(url, asked, out, "--concurrency", "0"))
    assert not (out/"requests.jsonl").exists()
    B.main(args(url, asked, out))
    with pytest.raises(UserError, match="other settings"): B.main(args(url, asked, out, "--prompts", "1"))
    (tmp_path/"q.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="line 1"): B.main(args(url, asked, tmp_path/"b"))

def test_failed_requests_are_counted_and_their_partners_left_out(url, asked, tmp_path, monkeypatch):
    good = B.one
    async def fails(client, u, model, job, new): return dict(error="status 503") if model == "toy" and job["prompt"] == "Да?" else await good(client, u, model, job, new)
    monkeypatch.setattr(B, "one", fails)
    out = tmp_path/"bench"; B.main(args(url, asked, out))
    t = B.tables(read_jsonl(out/"requests.jsonl"))["averages"][0]
    assert (t["prompts"], t["failed"]) == (2, 1)
