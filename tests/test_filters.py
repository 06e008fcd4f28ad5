"Filters: what they catch, what they leave alone, and what they say."

import json

import pytest

from tpro_nb import filters, rows
from tpro_nb.core import UserError


def row(question: str, answer: str = "Хорошо.") -> dict:
    return rows.make_row(question, answer, source="s", licence="MIT", family="f", domain="Math")


def test_every_filter_on_its_cases():
    figures = filters.filters_benchmark()
    assert len(figures) == 2 * (len(filters.FILTERS) - 1)
    for name, value in figures.items():
        if name.endswith("recall_pct"):
            assert value >= 94, name
        else:
            assert value <= 3, name
    for name in set(filters.FILTERS) - {"languages"}:
        caught, left = filters.filter_cases(name)
        assert len(caught) + len(left) >= 20
        assert len(left) >= 0.45 * (len(caught) + len(left))


def test_ordinary_texts_pass_untouched():
    settings = filters.FilterSettings()
    for documented in rows.stdlib_docs()[:150]:
        given = row("What does it do?", documented.summary)
        assert filters.filter_row(given, settings).row["messages"] == given["messages"]


def test_a_repaired_row_knows_where_it_came_from():
    given = row("ÐŸÑ€Ð¸Ð²ÐµÑ‚, Ð¼Ð¾Ð¹ email ivan@mail.ru <|im_end|>")
    after = filters.filter_row(given, filters.FilterSettings())
    assert after.repaired == ("mojibake", "control_tokens", "personal")
    assert after.row["came_from"] == given["id"] != after.row["id"]
    assert after.row["changed_by"] == list(after.repaired)
    assert after.row["messages"][0]["content"] == "Привет, мой email [email] <\u200b|im_end|>"


def test_a_row_is_dropped_by_name_or_passes_where_a_filter_is_off():
    refusal = row("Помоги", "Извините, я не могу с этим помочь.")
    gone = filters.filter_row(refusal, filters.FilterSettings())
    assert (gone.row, gone.step) == (None, "refusals")
    off = filters.FilterSettings(refusals=False)
    assert filters.filter_row(refusal, off).row is not None
    dropped = filters.filter_row(
        row("Пишите на ivan@mail.ru"), filters.FilterSettings(personal="drop")
    )
    assert (dropped.step, dropped.reason) == ("personal", "personal: email")
    private = row("Пишите на ivan@mail.ru")
    kept = filters.filter_row(private, filters.FilterSettings(personal="off", secrets="off"))
    assert kept.row["messages"] == private["messages"]


def test_languages_that_are_not_asked_for_go():
    only_russian = filters.FilterSettings(languages=("ru",))
    ukrainian = row("Хто написав «Кобзар»?", "Тарас Шевченко написав цю книгу.")
    assert filters.filter_row(ukrainian, only_russian).reason == "language uk"
    short = row("2 + 2?", "4")
    assert filters.filter_row(short, only_russian).reason == "language und"
    wide = filters.FilterSettings(languages=("uk", "und"))
    assert filters.filter_row(ukrainian, wide).row["lang"] == "uk"
    assert filters.filter_row(short, wide).row["lang"] == "und"


@pytest.mark.parametrize(
    "wrong",
    [
        dict(personal="hide"),
        dict(secrets=True),
        dict(languages="ru"),
        dict(languages=("Russian",)),
        dict(refusals="yes"),
        dict(mojibake=1),
        dict(squeezed=12),
        dict(squeezed="a"),
    ],
)
def test_settings_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        filters.FilterSettings(**wrong)


def test_awkward_texts_pass_through():
    awkward = ["", " ", "\x00", "@" * 3000, "8" * 5000, "<" * 3000, "я" * 100_000]
    for text in awkward:
        filters.filter_row(row(text, text or "а"), filters.FilterSettings())
    deep = row("а", json.dumps([[[]]] * 300))
    assert filters.filter_row(deep, filters.FilterSettings()).step in ("", "repetition")


REFUSALS = [  # an answer, and whether it refuses
    ("Прошу прощения, но такой контент я создавать не буду.", True),
    ("Давайте лучше поговорим о чём-нибудь другом.", True),
    ("Я — текстовая модель и не умею рисовать.", True),
    ("Я не вижу изображения, поэтому не могу его описать.", True),
    ("Unfortunately, I'm not able to write that for you.", True),
    ("Мы не можем описать электрон как шарик: у него нет траектории.", False),
    ("Пингвины не умеют летать: крылья слишком малы.", False),
    ("I can't say who wins, but the poll shows 51 % for the mayor.", False),
    ("Создавать таблицы не нужно: они создаются сами.", False),
    ("Давайте лучше возьмём другой пример: 2 + 2 = 4.", False),
]


def test_refusals_that_a_reader_met_first():
    for answer, refuses in REFUSALS:
        assert filters.is_refusal("Помоги мне с этим.", answer) == refuses, answer
