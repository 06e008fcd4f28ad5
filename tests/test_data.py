"The funnel's steps, each on planted cases."
import json, subprocess, sys
from collections import Counter
import pytest
from hypothesis import given, settings, strategies as st
from tpro_nb import data, tmath
from tpro_nb.core import UserError

ENTRIES = [dict(word=f"слово{c}", glosses=[f"нечто, что встречается под номером {i} в {n} словаре"], quotations=[f"Он взял {n} слово и положил его на место {i}, не сказав ни слова."], synonyms=[f"речь{c}"])
           for i, (c, n) in enumerate([("а", "толковом"), ("б", "морском"), ("в", "старинном"), ("г", "детском"), ("д", "горном"), ("е", "лесном")])]

def rows(n=8): return data.wiktionary_rows(ENTRIES) + data.problem_rows([p for f in tmath.FAMILIES for p in tmath.problems(f, n)])

def test_fold_ignores_dress_and_keeps_numbers():
    assert data.fold("Ёлка, Москва 12") == data.fold("ЕЛКА   Mocквa — 12!") != data.fold("Ёлка, Москва 13")

@given(st.text(alphabet="абвеёорсх АБ,.!-12", min_size=1, max_size=60))
@settings(max_examples=80, deadline=None)
def test_fold_is_idempotent_and_case_blind(s):
    assert data.fold(data.fold(s)) == data.fold(s) == data.fold(s.upper())

def test_exact_and_near_duplicates():
    base = rows()
    copy = json.loads(json.dumps(base[0])); copy["id"] = "x"; copy["messages"][0]["content"] = copy["messages"][0]["content"].upper() + " !"
    assert [r["id"] for r in data.exact_dedup(base + [copy])] == [r["id"] for r in base]
    text = "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный — пора, красавица, проснись."
    assert data.near_duplicates([text, text.replace("ё", "е").replace("друг", "брат"), "Совсем другое предложение о погоде в Казани весной."]) == [1]

def test_near_dedup_never_drops_a_checkable_problem():
    ps = [r for r in rows(30) if r["answer"]]
    assert data.near_dedup(ps) == ps

def test_planted_duplicates():
    docs = [d for _, d, _ in data.stdlib_docs()]
    got = data.dedup_benchmark(docs, 500, seed=1)
    assert got["dedup_recall_pct"] >= 95 and got["dedup_precision_pct"] == 100

def test_planted_leaks_and_no_false_alarm():
    protected = [dict(id=p["problem_id"], text=p["question"], set="test") for f in tmath.FAMILIES for p in tmath.problems(f, 40, split="test")]
    clean = [data.text_of(r) for r in rows(150)]
    got = data.leak_benchmark(protected, clean)
    assert got["leak_recall_pct"] >= 99 and got["leak_false_pct"] <= .1
    bad = data.row("Реши: " + protected[3]["text"].upper(), "Ответ: 1", source="s", licence="MIT", family="f", domain="Math")
    kept, report = data.decontaminate(rows() + [bad], data.Guard(protected))
    assert bad not in kept and report[0]["leaked"] == protected[3]["id"]

def test_licence_gate_names_the_row():
    with pytest.raises(UserError, match="CC BY-SA"): data.licence_gate(rows(), ["Apache-2.0"])

@pytest.mark.parametrize("bad, reason", [("текст", "not an object"), ({}, "messages"), (dict(messages=[dict(role="user", content="а")]), "two turns"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content=None)]), "role or content"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="  ")]), "not an answer"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="<think>б")]), "unclosed"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="Ð¿Ñ€Ð¸Ð²ÐµÑ\u0082 Ð¿Ñ\u0080Ð¸Ð²")]), "encoding"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="я" * 50_000_000)]), "million")])
def test_broken_rows_are_set_aside(bad, reason):
    ok, out = data.foreign_rows([bad], "x", "MIT")
    assert ok == [] and reason in out[0]["reason"] and len(str(out[0])) < 1000

def test_t_wix_schema():
    turns = [dict(role="user", content="Сколько будет 2 + 2?"), dict(role="assistant", content="<think>\n2 + 2 = 4\n</think>\n\n4")]
    (r,), bad = data.foreign_rows([dict(messages=turns, subset="reasoning")], "t-tech/T-Wix", "ODC-By")
    assert r["mode"] == "think" and r["messages"] == turns and r["licence"] == "ODC-By" and not bad

def test_both_modes_for_the_same_families_and_step_counts():
    got = Counter((r["family"], r["mode"], r["tier"]) for r in data.problem_rows([p for f in tmath.FAMILIES for p in tmath.problems(f, 120)]))
    for f in tmath.FAMILIES:
        for tier in ("School", "Student", "Professor"): assert abs(got[f, "think", tier] - got[f, "direct", tier]) <= 2

@given(st.dictionaries(st.text("абвг", min_size=1, max_size=2), st.integers(0, 50), min_size=1), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_quotas(sizes, n):
    q = data.quotas(sizes, n)
    assert sum(q.values()) == min(n, sum(sizes.values())) and all(0 <= q[k] <= sizes[k] for k in sizes)
    capped = [q[k] for k in sizes if q[k] < sizes[k]]
    assert not capped or max(q.values()) <= min(capped) + 1

def test_language_mix_counts_characters():
    many = [dict(r, id=str(i)) for i in range(12) for r in data.wiktionary_rows(ENTRIES)] + data.english_rows(data.stdlib_docs()[:80])
    assert 8 <= data.english_share(data.language_mix(many, 10)) <= 10.01
    assert data.english_share(data.language_mix(many, 0)) == 0

def test_diverse_sampling_covers_more_tags():
    pool = rows(40)
    tags = lambda rs: len({t for r in rs for t in r["tags"]})
    few = data.diverse_sample(pool, 20)
    assert len(few) == 20 and tags(few) > tags(pool[:20])

STAGE = """
import json, sys
nb = json.load(open(sys.argv[1]))
g = {"__name__": "nb"}
for c in nb["cells"]:
    if c["cell_type"] != "code": continue
    exec("".join(c["source"]), g)
    if "parameters" in c["metadata"].get("tags", []): g["run_dir"] = sys.argv[2]
"""

def test_rebuild_is_byte_identical_and_shares_are_disjoint(tmp_path):
    from tpro_nb.core import project_root, read_jsonl, toy
    import shutil
    nb, out = project_root()/"nbs"/"05_data.ipynb", []
    for name in ("a", "b"):
        (tmp_path/name/"04_tmath").mkdir(parents=True)
        shutil.copy(toy("04_tmath/protect.jsonl"), tmp_path/name/"04_tmath"/"protect.jsonl")
        subprocess.run([sys.executable, "-c", STAGE, str(nb), str(tmp_path/name)], check=True, capture_output=True, env={**__import__("os").environ, "MPLBACKEND": "agg"})
        out.append({p.name: p.read_bytes() for p in (tmp_path/name/"05_data").glob("*.json*") if p.name != "metrics.json"})
    assert out[0] == out[1] and {"midtrain.jsonl", "sft_train.jsonl", "sft_dev.jsonl", "prompts.jsonl", "heldout.jsonl", "card.json"} <= set(out[0])
    ids = [r["id"] for n in ("midtrain", "sft_train", "sft_dev", "prompts") for r in read_jsonl(tmp_path/"a"/"05_data"/f"{n}.jsonl")]
    assert len(ids) == len(set(ids)) > 50
