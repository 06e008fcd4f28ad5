"Steps that ask a model: translation, difficulty, reward; with toys, and with real small models."

from corpus_toys import ENTRIES, FAST, chat, corpus, toy_server

from tpro_nb import decontamination, grader, model_steps, rows, tags
from tpro_nb.client import Kept, Unanswered
from tpro_nb.core import toy


def translate_for_a_test(text: str) -> str:
    "What the toy server says to a text: refusals, lost numbers, and Russian."
    if "refuse" in text:
        return "I will not."
    if "Add 2" in text:
        return "Прибавь два."
    numbers = [word for word in text.split() if word.isdigit()]
    return "<think>хм</think>Сложить " + " ".join(numbers)


def test_translator_takes_russian_with_all_numbers_and_nothing_else(tmp_path):
    def mood(number, body):
        text = body["messages"][0]["content"].split("Text:\n")[1]
        return 200, {}, chat(translate_for_a_test(text)), 0

    with toy_server() as server:
        server.mood = mood
        kept = Kept(tmp_path / "k.jsonl")
        translate = model_steps.translator(server.name, kept, retries=1, **FAST)
        thought = "<think>\nSum 5\n</think>\n\nSum 6"
        got = translate(["Sum 3 and 4", "refuse this", "Add 2", thought])
        assert got[0] == "Сложить 3 4"
        assert "not Russian" in str(got[1])
        assert "lost the numbers 2" in str(got[2])
        assert grader.after_think(got[3]).strip() == "Сложить 6"
        assert got[3].startswith("<think>")
        asked = len(server.asked)
        assert translate(["Sum 3 and 4"]) == got[:1]
        assert len(server.asked) == asked


def toy_translation(texts: list[str]) -> list:
    "Russian of about the same length, and no answer about bisect."
    got = []
    for place, text in enumerate(texts):
        if "`bisect" in text:
            got.append(Unanswered("HTTP 500"))
        else:
            got.append("русский текст " * (len(text) // 14 + 1) + str(place))
    return got


def test_translation_keeps_the_english_share_and_loses_no_row():
    some = rows.english_rows(rows.stdlib_docs()[:40]) + corpus(5)
    some.sort(key=rows.hash_order)
    out, seen, rejected = model_steps.translate_surplus(some, toy_translation, 10)
    assert len(out) + len(rejected) == len(some)
    for broken in rejected:
        assert "HTTP 500" in broken["reason"]
        assert broken["row"] in some
    moved = [row for row in out if row.get("changed_by") == ["translated"]]
    assert 5 < len(moved) == len({row["id"] for row in moved})
    for row in moved:
        assert row["lang"] == "ru"
        assert row["came_from"] in seen
    assert tags.english_share(out) <= 12

    secret = dict(id="p", text="русский текст русский текст", set="test")
    _, report = decontamination.decontaminate(moved, decontamination.LeakGuard([secret]))
    assert len(report) == len(moved)


def test_two_rows_with_one_translation_are_one():
    some = rows.english_rows(rows.stdlib_docs()[:40]) + corpus(5)
    some.sort(key=rows.hash_order)
    same, why, _ = model_steps.translate_surplus(some[:6], lambda texts: ["да"] * len(texts), 0)
    assert len({row["id"] for row in same}) == len(same)
    assert any("was" in saw for saw in why.values())


def test_reward_filter_works_within_each_source():
    some = (rows.wiktionary_rows(ENTRIES) * 2)[:20]
    pool = []
    for source in "аб":
        pool += [dict(row, id=f"{source}{place}", source=source) for place, row in enumerate(some)]

    def score(pairs):
        return [float(place % 20 + 100 * (place >= 20)) for place in range(len(pairs))]

    kept, seen, _ = model_steps.reward_bottom(pool, score)
    dropped = {row["id"] for row in pool} - {row["id"] for row in kept}
    assert dropped == {"а0", "а1", "б0", "б1"}
    assert seen["б0"] == "reward 100.00"


def test_targets():
    replies = ["Ответ: 4", "Ответ: 5", "так. Ответ: 5"]
    assert model_steps.choose_target(replies, [3, 1, 2], "5") == 2
    assert model_steps.choose_target(["Ответ: 4"], [3], "5") is None
    assert model_steps.choose_target(["dddd", "ccc", "bb", "a"], [4, 3, 2, 1]) == 2


def test_zpd():
    thinking = [row for row in corpus(4) if row["answer"] and row["mode"] == "think"][:3]

    def teach(prompts):
        return [[f"Ответ: {row['answer']}", "Ответ: 99"] for row in thinking]

    def study(prompts):
        return [["не знаю"] * 2, Unanswered("HTTP 500"), ["да"] * 2]

    def score(pairs):
        return [1.0 if reply == "не знаю" else 2.0 for _, reply in pairs]

    out, seen, rejected = model_steps.zpd_select(thinking, teach, study, score)
    assert len(out) == len(rejected) == 1
    assert out[0]["came_from"] == thinking[0]["id"] != out[0]["id"]
    assert out[0]["changed_by"] == ["ZPD target"]
    assert "nothing to learn" in seen[thinking[2]["id"]]
    assert "HTTP 500" in rejected[0]["reason"]
    _, reply = rows.prompt_and_reply(out[0])
    assert grader.grade(reply, thinking[0]["answer"]) == "correct"


def test_ifd_and_reward_of_a_real_model_are_kept(tmp_path):
    path = tmp_path / "k.jsonl"
    kept = Kept(path)
    model = str(toy("06_midtraining/model"))
    pairs = [("Что значит слово «дом»?", "Жилище."), ("2 + 2?", "4, потому что так."), ("а", "б")]
    got = model_steps.ifd_scorer(model, kept)(pairs)
    assert all(0.3 < value < 3 for value in got)
    assert len(kept.got) == 3
    assert model_steps.ifd_scorer(model, Kept(path))(pairs[::-1]) == got[::-1]
    rewards = model_steps.scorer(str(toy("08_reward_model/model")), kept)(pairs)
    assert len(rewards) == 3
    assert len(set(rewards)) > 1


def test_ifd_keeps_what_lies_between_the_limits():
    some = rows.wiktionary_rows(ENTRIES)[:4]
    kept, seen, _ = model_steps.ifd_filter(some, lambda pairs: [0.69, 0.7, 1.0, 1.01][: len(pairs)])
    assert sorted(seen.values()) == ["IFD 0.69", "IFD 0.70", "IFD 1.00", "IFD 1.01"]
    assert len(kept) == 2
