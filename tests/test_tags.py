"Tags, and what is chosen by them."

import pytest
from corpus_toys import ENTRIES, FAST, TAGGED, chat, corpus, toy_server, turns, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from tpro_nb import curation, rows, tags
from tpro_nb.client import Kept
from tpro_nb.core import UserError


def different_tags(some: list[dict]) -> int:
    found = set()
    for row in some:
        found.update(row["tags"])
    return len(found)


def test_tags_come_from_user_turns_only():
    said = turns("Что значит слово «дом»?", "«Кошка»", "Подбери синоним к слову «пёс».")
    row = dict(rows.wiktionary_rows(ENTRIES)[0], messages=said)
    (tagged,), _, rejected = tags.tag_rows([row], tags.rule_tags)
    wanted = {"task:define", "task:synonym", "about:дом", "about:пёс"}
    assert wanted <= set(tagged["tags"])
    assert "about:кошка" not in tagged["tags"]
    assert not rejected


def test_rows_without_a_usable_answer_go_to_the_side_file_and_nothing_is_lost(tmp_path):
    def tags_some(number, body):
        asked = body["messages"][0]["content"]
        refused = "определению" in asked or "Что значит" in asked
        return 200, {}, chat("чепуха") if refused else TAGGED, 0

    some = rows.wiktionary_rows(ENTRIES)[:8]
    with toy_server() as server:
        server.mood = tags_some
        kept = Kept(tmp_path / "k.jsonl")
        tagger = tags.endpoint_tagger(server.name, kept, retries=1, **FAST)
        funnel = curation.Funnel(some).step("tags", lambda given: tags.tag_rows(given, tagger))
    assert len(funnel.rows) + len(funnel.rejected) == 8
    assert funnel.rejected and funnel.rows
    for broken in funnel.rejected:
        assert "nonsense" in broken["reason"]
        assert broken["row"] in some
    for row in funnel.rows:
        assert row["tags"] == ["Definition", "rare word"]
        assert row["domain"] == "Writing"


def test_tag_normalisation_steps():
    row = rows.wiktionary_rows(ENTRIES)[0]
    tag_sets = [["Physics!", "law"]] * 3
    tag_sets += [["physics", "law"]] * 40
    tag_sets += [["once", "optics"]] + [["optics"]] * 2
    tagged = [dict(row, tags=mine, id=str(place)) for place, mine in enumerate(tag_sets)]

    def near(names):
        return unit(*([1, 0] if name in ("law", "optics") else [0, 1] for name in names))

    tidy, book = tags.normalise_tags(tagged, min_count=2, embed=near)
    assert book == dict(raw=5, frequent=4, plain=3, semantic=2, associated=1)
    assert different_tags(tidy) == 1
    assert all(set(row["tags"]) <= {"law"} for row in tidy)


def test_diverse_sampling_covers_more_tags():
    pool = corpus(40)
    few = tags.diverse_sample(pool, 20)
    assert len(few) == 20
    assert different_tags(few) > different_tags(pool[:20])


def test_complexity_first_sampling_sweeps():
    row = rows.wiktionary_rows(ENTRIES)[0]
    tag_sets = dict(a=["x", "y", "z"], b=["x", "y"], c=["w"], d=["z"], e=[])
    pool = [dict(row, id=id, tags=mine) for id, mine in tag_sets.items()]
    sampled = tags.diverse_sample(pool, 4)
    # Two sweeps; a row without tags never brings one.
    assert [row["id"] for row in sampled] == ["a", "c", "b", "d"]


@given(
    st.dictionaries(st.text("абвг", min_size=1, max_size=2), st.integers(0, 50), min_size=1),
    st.integers(0, 200),
)
@settings(max_examples=100, deadline=None)
def test_quotas(sizes, n):
    quota = tags.quotas(sizes, n)
    assert sum(quota.values()) == min(n, sum(sizes.values()))
    assert all(0 <= quota[group] <= size for group, size in sizes.items())
    capped = [quota[group] for group, size in sizes.items() if quota[group] < size]
    assert not capped or max(quota.values()) <= min(capped) + 1


def test_language_mix_counts_characters():
    many = []
    for number in range(12):
        many += [dict(row, id=str(number)) for row in rows.wiktionary_rows(ENTRIES)]
    many += rows.english_rows(rows.stdlib_docs()[:80])
    assert 8 <= tags.english_share(tags.language_mix(many, 10)) <= 10.01
    assert tags.english_share(tags.language_mix(many, 0)) == 0


WORDS = "книга мороз метель абажур ланцет дом кот лес снег река".split()


def numbered_entry(number: int, word: str) -> dict:
    return dict(
        word=word + "аио"[number // 10],
        glosses=[f"нечто под номером {number} для проверки"],
        quotations=[f"Это предложение номер {number} со словом {word}."],
        synonyms=["вещь"],
    )


def test_trained_tagger_knows_its_own_words_and_says_how_well():
    some = corpus(40) + rows.english_rows(rows.stdlib_docs()[:60])
    entries = [numbered_entry(number, word) for number, word in enumerate(WORDS * 3)]
    some += rows.wiktionary_rows(entries)
    tag, figures = tags.trained_tagger(some)
    assert figures["tagger_heldout_pct"] > 90
    assert 0 <= figures["tagger_new_wording_pct"] <= 100
    got = tag(["Что значит слово «сосна»?", "Подбери синоним к слову «пёс»."])
    assert [told["tags"][0] for told in got] == ["task:define", "task:synonym"]
    assert "about:сосна" in got[0]["tags"]
    assert tag([]) == []
    asked = ["Назови слово по определению: снег."]
    assert tags.trained_tagger(some)[0](asked) == tag(asked)


def test_a_tagger_is_not_trained_on_nothing():
    with pytest.raises(UserError, match="two tasks"):
        tags.trained_tagger([])


def test_a_dump_without_english_keeps_its_russian_and_says_so():
    russian = rows.wiktionary_rows(ENTRIES)
    assert tags.language_mix(russian, 10) == russian
    assert "there is 0.0 %" in tags.language_note(russian, 10)
