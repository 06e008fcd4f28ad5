"Leaks that were planted, reworded or set in LaTeX; and rows that must not be accused."

from corpus_toys import corpus, protected_problems

from tpro_nb import decontamination, rows


def question(text: str, reply: str = "Ответ: 13") -> dict:
    return rows.make_row(text, reply, source="s", licence="MIT", family="f", domain="Math")


def test_planted_leaks_and_no_false_alarm():
    protected = protected_problems(40)
    clean = [rows.row_text(row) for row in corpus(150)]
    got = decontamination.leak_benchmark(protected, clean)
    assert got["leak_recall_pct"] >= 99
    assert got["leak_false_pct"] <= 0.1


def test_a_row_with_a_leak_goes_and_is_reported():
    protected = protected_problems(40)
    leak = question("Реши: " + protected[3]["text"].upper(), "Ответ: 1")
    guard = decontamination.LeakGuard(protected)
    kept, report = decontamination.decontaminate(corpus() + [leak], guard)
    assert leak not in kept
    assert report[0]["leaked"] == protected[3]["id"]


def test_a_reworded_leak_and_a_latex_leak_are_found_and_other_numbers_are_not():
    fruit = (
        "В корзине лежало 12 яблок и 7 груш, из них съели половину яблок. "
        "Сколько фруктов осталось в корзине?"
    )
    formula = "Найдите значение выражения 1/2 + √3 при условии, что x = 4"
    guard = decontamination.LeakGuard(
        [dict(id="p", text=fruit, set="test"), dict(id="l", text=formula, set="test")]
    )
    reworded = question(fruit.replace("лежало", "было").replace("осталось", "будет"))
    other = question(fruit.replace("12", "14").replace("лежало", "было"))
    latex = question(
        r"Найдите значение выражения $\frac{1}{2} + \sqrt{3}$ при условии, что $x = 4$"
    )
    kept, report = decontamination.decontaminate([reworded, other, latex], guard)
    assert kept == [other]
    found = [(leak["leaked"], leak["reason"].split()[1]) for leak in report]
    assert found == [("p", "nearly"), ("l", "a")]


def test_leaks_by_kind_and_near_misses():
    got = decontamination.leak_kinds_benchmark(5, seed=2)
    near_miss = got.pop("leak_near_miss_pct")
    assert near_miss <= 0.1
    assert min(got.values()) >= 95


def test_long_questions_are_found_and_their_near_misses_are_not_accused():
    got = decontamination.long_questions_benchmark()
    assert got.pop("leak_long_false_pct") == 0
    assert got.pop("leak_long_reworded_pct") >= 80
    assert min(got.values()) == 100


WRAPPING = (
    "Представь, что объясняешь это младшему брату, который видит тему впервые: {} Не торопись."
)
OTHER_QUESTIONS = [
    ("Кто такой Пушкин?", "Кто такой Лермонтов?"),
    ("Поезд идёт из Тулы в Орёл.", "Поезд идёт из Орла в Тулу."),
    ("Назови столицу Гвинеи.", "Назови столицу Гайаны."),
    ("if x and y:", "if x or y:"),
    ("Найди объём куба.", "Найди площадь куба."),
    ("Переведи слово кот.", "Переведи слово пёс."),
    ("Реши 3x = 12.", "Реши 3x = 21."),
    ("Сколько стоит 5 евро?", "Сколько стоит 5 долларов?"),
    ("Верно ли, что 5 чётное?", "Верно ли, что 5 нечётное?"),
    ("Опиши преимущества угля.", "Опиши недостатки угля."),
]


def test_a_wrapping_accuses_nobody_and_the_order_of_hashes_does_not_count():
    protected = [
        dict(id=str(place), text=WRAPPING.format(one), set="test")
        for place, (one, _) in enumerate(OTHER_QUESTIONS)
    ]
    guard = decontamination.LeakGuard(protected)
    for place, (one, other) in enumerate(OTHER_QUESTIONS):
        assert guard.find(WRAPPING.format(other)) is None, other
        hidden = WRAPPING.format(one).replace("Представь, что", "Вообрази, будто").upper()
        assert guard.find(f"Вот. {hidden} Ответь.")["id"] == str(place), one
    both = " ".join(item["text"] for item in protected[3:6])
    backwards = decontamination.LeakGuard(protected[::-1])
    assert guard.find(both)["id"] in ("3", "4", "5")
    assert backwards.find(both)["id"] in ("3", "4", "5")
    assert len({guard.find(both)["id"] for _ in range(5)}) == 1


def test_a_sign_a_word_or_a_letter_is_no_leak_and_a_later_turn_is():
    roots = "Решите уравнение x^2+5x+6=0"
    capital = "Какой город является столицей Австралии и когда он ею стал?"
    guard = decontamination.LeakGuard(
        [dict(id="x", text=roots, set="test"), dict(id="c", text=capital, set="test")]
    )
    assert guard.find(roots.replace("+", "-")) is None
    assert guard.find(roots + "+1") is None
    assert guard.find(capital.replace("Австралии", "Австрии")) is None
    dialogue = question("Привет!")
    later = [*dialogue["messages"], dict(role="user", content=capital.replace("Какой", "какой"))]
    answer = dict(role="assistant", content="Канберра.")
    kept, report = decontamination.decontaminate(
        [dialogue | dict(messages=[*later, answer])], guard
    )
    assert kept == []
    assert report[0]["leaked"] == "c"
