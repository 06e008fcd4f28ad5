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


def test_shards_and_slices_keep_the_same_rows():
    docs = rows.english_rows(rows.stdlib_docs())[:300]
    rng = random.Random(0)
    words = sorted(filter(duplicates.is_plain, set(" ".join(map(rows.row_text, docs)).split())))

    def again(row: dict) -> dict:
        reply = duplicates.disturb(row["messages"][1]["content"], rng, words, 0.05)
        return plain_row(row["messages"][0]["content"], reply)

    pool = docs + list(map(again, docs[::4])) + corpus(10)
    here = duplicates.near_dedup(pool).rows
    assert 30 < len(pool) - len(here)
    rng.shuffle(pool)
    shards = [pool[:100], pool[100:250], pool[250:]]
    signed = duplicates.Signatures.joined(list(map(duplicates.row_signatures, shards)))
    pairs = duplicates.candidate_pairs(signed).tolist()
    assert len(pairs) <= 8 * len(pool)
    texts = [duplicates.Compared(rows.row_text(row)) for row in pool]

    def alike(one: int, other: int) -> float | None:
        return duplicates.likeness(texts[one], texts[other])

    gone = duplicates.chosen_survivors(pairs, alike)
    left = {row["id"] for place, row in enumerate(pool) if place not in gone}
    assert left == {row["id"] for row in here}


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


def test_different_problems_never_merge_and_their_copies_do():
    pairs = duplicates.templated_pairs(26, seed=3)
    assert len(pairs) >= 500
    assert len({pair.kind for pair in pairs}) == 20
    got = duplicates.false_merge_benchmark(26, seed=3)
    assert got == dict(false_merge_pct=0, redressed_merge_pct=100)


APART = [
    ("x + 5 = 0", "x - 5 = 0"),
    ("1.5 * 2", "15 * 2"),
    ("2^10", "210"),
    ("x < 4", "x > 4"),
    ("C++", "C"),
    ("a[-1]", "a[1]"),
    ("x² + 1", "x2 + 1"),
    ("(2+3)*4", "2+(3*4)"),
    ("a/b", "b/a"),
    ("Из 5 вычти 3", "Из 3 вычти 5"),
    ("У Маши 3 яблока. У Пети 5 яблок.", "У Маши 5 яблок. У Пети 3 яблока."),
    ("Какое число простое?", "Какое число не простое?"),
    ("мощность 5 мВт здесь", "мощность 5 МВт здесь"),
    ("!!!", "😀"),
    ("Правильный вариант: б)", "Правильный вариант: в)"),
    ("Свойства Co и его сплавов.", "Свойства CO и его сплавов."),
    ("в 5 веке до н. э.", "в 5 веке н. э."),
    ("Функция непрерывна в нуле?", "Функция прерывна в нуле?"),
    ("Приготовь суп с мясом.", "Приготовь суп без мяса."),
    ("Сочини сказку для дочки", "Сочини сказку про дочку"),
    ("Поезд едет из Москвы в Казань.", "Поезд едет из Казани в Москву."),
    ("Как включить звук телефона?", "Как выключить звук телефона?"),
    ("Аргументы за войну.", "Аргументы против войны."),
    ("f'(x) = 2", "f(x) = 2"),
    (r"\sin^2 x", r"\cos^2 x"),
    ("Глава I романа", "Глава II романа"),
    ("Иван выше Олега. Кто ниже?", "Олег выше Ивана. Кто ниже?"),
]
LONG_APART = [
    ("Назови преимущества угля.", "Назови недостатки угля."),
    ("Напиши весёлый рассказ о коте.", "Напиши грустный рассказ о коте."),
    ("Переведи слово кот.", "Переведи слово пёс."),
    ("какая река течёт через париж?", "какая река течёт через прагу?"),
    ("Ответ: ничья.", "Ответ: победа белых."),
    ("Дай ответ в градусах.", "Дай ответ в радианах."),
    ("Что посадить весной?", "Что посадить осенью?"),
]
PROSE = (
    "Ночью в порт вошёл большой парусник под чужим флагом. Матросы долго спускали паруса, "
    "а на берегу уже собиралась толпа любопытных. Говорили, что судно везло чай и пряности, "
    "но буря унесла его далеко от дороги. Капитан вышел к людям и попросил воды и хлеба. "
)
TOGETHER = [
    ("Ещё  раз: Cepгей!", "еще раз сергей"),
    ("x − 5 = 0", "X - 5 = 0"),
    (r"$\frac{1}{2} + \sqrt{3}$", "1/2 + √3"),
    ("x^{2}", "x²"),
    ("**73** штуки", "73 штуки"),
    ("Москва — столица.", "Москва столица"),
    ("за́мок", "замок"),
]


@pytest.mark.parametrize("one, other", APART)
def test_what_means_another_thing_is_no_duplicate(one, other):
    assert not duplicates.would_merge(one, other, threshold=0)


def test_what_is_asked_in_a_long_wrapping_counts():
    wrapping = "Прочитай условие и реши подробно, чтобы понял школьник: {} Запиши ответ отдельно."
    for one, other in LONG_APART:
        assert not duplicates.would_merge(wrapping.format(one), wrapping.format(other)), one


DAMAGED = [
    ("чай и пряности", "чай и 17"),  # a word was overwritten
    ("большой парусник", "шлюпочный парусник"),
    ("толпа любопытных", "толпа зонтик"),
    ("дороги. Капитан", "дороги.  КАПИТАН"),
]
CHANGED = [
    ("большой парусник", "маленький парусник"),
    ("Ночью", "Утром"),
    ("и попросил", "и не попросил"),
    ("чай и пряности", "30 мешков чая"),
]


def test_prose_may_be_damaged_and_not_changed():
    for word, instead in DAMAGED:
        assert duplicates.would_merge(PROSE, PROSE.replace(word, instead)), instead
    for word, instead in CHANGED:
        assert not duplicates.would_merge(PROSE, PROSE.replace(word, instead)), instead
    numbers = PROSE.replace("большой", "43-й")
    assert not duplicates.would_merge(numbers, numbers.replace("43", "34"))


@pytest.mark.parametrize("one, other", TOGETHER)
def test_dress_does_not_count(one, other):
    assert duplicates.text_identity(one) == duplicates.text_identity(other)
    assert duplicates.would_merge(one, other)


def plain_row(question: str, reply: str = "Ответ долгий, из многих слов, как бывает.") -> dict:
    return rows.make_row(question, reply, source="s", licence="MIT", family="f", domain="Math")


def test_the_order_of_the_input_does_not_change_the_survivors():
    some = []
    for number in range(30):
        text = f"Прочитай условие и реши подробно: у Пети {number} яблок, сколько осталось?"
        some += [plain_row(text), plain_row(text.upper()), plain_row(text + " Спасибо!")]
    survivors = []
    for seed in range(3):
        random.Random(seed).shuffle(some)
        left = duplicates.near_dedup(duplicates.exact_dedup(some)).rows
        survivors.append({row["id"] for row in left})
    assert survivors[0] == survivors[1] == survivors[2]
    assert len(survivors[0]) == 30


def test_short_answers_that_differ_are_two_rows():
    question = "Прочитай условие внимательно и скажи одним словом, что это за город на картинке."
    vienna, canberra = plain_row(question, "Вена"), plain_row(question + " ", "Канберра")
    assert len(duplicates.near_dedup([vienna, canberra]).rows) == 2


def test_short_and_wordless_texts():
    assert duplicates.near_duplicates(["кот", "пёс", "кот"]) == [2]
    assert duplicates.near_duplicates(["", "!!!", "😀", "🎉"]) == []
    assert duplicates.near_duplicates([]) == []


def test_templates_and_boilerplate_take_bounded_work():
    templated = [
        f"Прочитай условие и реши подробно, по шагам: у Пети {n} яблок, сколько осталось?"
        for n in range(2000)
    ]
    pairs = duplicates.candidate_pairs(duplicates.Signatures.of_texts(templated))
    assert len(pairs) <= 8 * len(templated)
    assert duplicates.near_duplicates(templated) == []


def test_copies_are_found_among_a_thousand_pages_of_one_boilerplate():
    words = sorted({word for text in summaries() for word in text.split() if word.isalpha()})
    rng = random.Random(1)
    page = (
        "Thank you for writing to the support of our company, your request was registered, and we "
        "shall answer it within a day. It says: {} The support of the company greets its customer."
    )
    pages = [page.format(" ".join(rng.choices(words, k=20))) for _ in range(1000)]
    copies = [text.upper() for text in pages[::20]]
    found = duplicates.near_pairs(pages + copies)
    assert len([text for text in found if text >= len(pages)]) >= 0.98 * len(copies)
    assert len([text for text in found if text < len(pages)]) <= 5


LETTERS = [  # two texts, and whether they are two
    ("Просклоняй слово «осёл».", "Просклоняй слово «осел».", True),
    ("Объясни ребёнку, что такое нёбо.", "Объясни ребёнку, что такое небо.", True),
    ("Мы всё ещё едем.", "Мы все ещё едем.", True),
    ("Why isn't it continuous at zero?", "Why is it continuous at zero?", True),
    ("Explain why f isn't even.", "Explain why f is even.", True),
    ("Ещё раз: зачем нужен счёт?", "Еще раз: зачем нужен счет?", False),
    ("Он всё решил.", "Он все решил.", False),
    ("Don't wake the baby.", "Don’t wake the baby", False),
    ("Его осёл всё ещё идёт.", "Его осел все еще идет.", False),
]


def test_a_letter_that_makes_another_word():
    for one, other, apart in LETTERS:
        assert duplicates.would_merge(one, other) != apart, one
