"Duplicates by letters and by meaning, each on planted cases; one node and a cluster."

import json
import random

import numpy as np
import pytest
from corpus_toys import ENTRIES, FAST, corpus, toy_server, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from tpro_nb import duplicates, rows
from tpro_nb.client import Kept
from tpro_nb.core import read_jsonl, write_jsonl


def summaries() -> list[str]:
    return [documented.summary for documented in rows.stdlib_docs()]


def test_fold_ignores_dress_and_keeps_numbers():
    folded = duplicates.fold("Ёлка, Москва 12")
    assert folded == duplicates.fold("ЕЛКА   Mocквa — 12!")
    assert folded != duplicates.fold("Ёлка, Москва 13")


@given(st.text(alphabet="абвеёорсх АБ,.!-12", min_size=1, max_size=60))
@settings(max_examples=80, deadline=None)
def test_fold_is_idempotent_and_case_blind(text):
    folded = duplicates.fold(text)
    assert duplicates.fold(folded) == folded == duplicates.fold(text.upper())


def test_the_first_of_exact_duplicates_stays():
    base = corpus()
    copy = json.loads(json.dumps(base[0]))
    copy["id"] = "x"
    copy["messages"][0]["content"] = copy["messages"][0]["content"].upper() + " !"
    kept = duplicates.exact_dedup(base + [copy])
    assert [row["id"] for row in kept] == [row["id"] for row in base]


def test_a_near_duplicate_is_found_and_a_stranger_is_not():
    text = (
        "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный — "
        "пора, красавица, проснись."
    )
    near = text.replace("ё", "е").replace("друг", "брат")
    stranger = "Совсем другое предложение о погоде в Казани весной."
    assert duplicates.near_duplicates([text, near, stranger]) == [1]


def test_near_dedup_never_drops_a_checkable_problem():
    checkable = [row for row in corpus(30) if row["answer"]]
    assert duplicates.near_dedup(checkable) == (checkable, {}, ())


def test_planted_duplicates():
    got = duplicates.dedup_benchmark(summaries(), 500, seed=1)
    assert got["dedup_recall_pct"] >= 95
    assert got["dedup_precision_pct"] == 100


def test_rivals_find_the_same_kind_of_duplicates():
    pytest.importorskip("datatrove")
    pytest.importorskip("datasketch")
    got = duplicates.dedup_benchmark(summaries(), 200, rivals=duplicates.rival_libraries())
    assert got["datasketch_recall_pct"] > 80
    assert got["datatrove_recall_pct"] > 80
    assert got["minhash_vs_datatrove"] > 1


def test_one_node_and_datatrove_keep_the_same_rows(tmp_path):
    pytest.importorskip("datatrove")
    docs = rows.english_rows(rows.stdlib_docs())[:400]
    rng = random.Random(0)
    texts = [rows.row_text(row) for row in docs]
    words = sorted(set(" ".join(texts).split()))
    again = [
        rows.make_row(
            row["messages"][0]["content"],
            duplicates.disturb(row["messages"][1]["content"], rng, words, 0.05),
            source="s",
            licence="MIT",
            family="pydoc",
            domain="Math",
            lang="en",
        )
        for row in docs[::4]
    ]
    pool = docs + again + corpus(10)
    rng.shuffle(pool)
    write_jsonl(tmp_path / "rows.jsonl", pool)
    out = duplicates.cluster_dedup(
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "out.jsonl"),
        str(tmp_path / "work"),
        tasks=3,
        workers=2,
    )
    here = duplicates.near_dedup(pool).rows
    assert 30 < len(pool) - len(here)
    assert [row["id"] for row in read_jsonl(out)] == [row["id"] for row in here]


def test_semdedup_rule_keeps_the_row_farthest_from_the_centre():
    vectors = unit([1, 0, 0], [1, 0.05, 0], [1, 0.5, 0.5], [0, 0, 1])
    drop = duplicates.sem_dedup(vectors, 0.95)
    centre = vectors.mean(0)
    nearer = max((0, 1), key=lambda place: vectors[place] @ centre)
    assert set(drop) == {nearer}
    twin, cosine = drop[nearer]
    assert twin == 1 - nearer
    assert cosine == pytest.approx(float(vectors[0] @ vectors[1]))
    assert duplicates.sem_dedup(vectors, 0.9999) == {}


def all_alike(texts: list[str]) -> np.ndarray:
    "An embedder to which every text is nearly the same."
    return unit(*([1, 0.001 * place] for place in range(len(texts))))


def test_semantic_step_counts_what_it_looked_at_and_passes_the_rest():
    some = rows.wiktionary_rows(ENTRIES)
    kept, seen, _ = duplicates.semantic_dedup(some, all_alike, 0.95, limit=5)
    assert len(kept) == len(some) - 4
    assert len(seen) == 5


def test_semantic_step_does_not_look_at_problems():
    checkable = corpus(6)[-5:]
    assert duplicates.semantic_dedup(checkable, all_alike) == (checkable, {}, ())


def test_endpoint_embedder_gives_unit_vectors(tmp_path):
    def embed_by_length(number, body):
        vector = [3.0, 4.0 * len(body["input"])]
        return 200, {}, json.dumps(dict(data=[dict(embedding=vector)])), 0

    with toy_server() as server:
        server.mood = embed_by_length
        embed = duplicates.embedder(server.name, Kept(tmp_path / "k.jsonl"), **FAST)
        vectors = embed(["а", "бб"])
    assert vectors.shape == (2, 2)
    assert np.allclose(vectors[0], [0.6, 0.8], atol=1e-3)
