"The draft that ships: its folder, its card, and what its text may not hold."

import os
import tomllib
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from tpro_nb.core import UserError, cache_dir, sha256, toy
from tpro_nb.cost_model import more_prompts
from tpro_nb.decoder import Decoder
from tpro_nb.draft_model import EagleDraft, check_draft
from tpro_nb.eagle_decoding import PROOF_PROMPTS
from tpro_nb.shipped_draft import (
    apart_from,
    count_guesses,
    fair_plan,
    heldout_topics,
    in_own_form,
    long_prompts,
    new_topics,
    shipped_card,
    shipped_draft,
    write_form,
)
from tpro_nb.target_text import TOPICS, ShardSettings, TargetPrompt, general_prompts

ROOT = Path(__file__).resolve().parent.parent
BASE = cache_dir() / "smollm2-135m-instruct-q4_1"


def test_the_folder_is_what_its_card_says():
    folder, card = shipped_draft(), shipped_card()
    check_draft(folder)
    weights = folder / "model.safetensors"
    assert sha256(weights) == card["sha256"]
    assert weights.stat().st_size < 9e6
    draft = EagleDraft.load(folder, torch.bfloat16)
    assert draft.kind == card["kind"]
    assert len(draft.hot_tokens) == card["hot_tokens"]
    parameters = sum(p.numel() for p in draft.parameters())
    assert round(parameters / 1e6, 3) == card["parameters_m"]


def test_the_readme_says_what_the_card_says():
    folder, card = shipped_draft(), shipped_card()
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert card["sha256"] in text
    assert card["what"] in text
    for name, value in card["made"].items():
        assert f"| {name} | {value} |" in text
    for row in card["heldout"]:
        assert f"| {row['domain']} | {row['answers']} | {row['chain']:.2f} |" in text


def test_everybody_may_read_it_and_the_wheel_carries_it():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["tpro_nb"]
    for file in shipped_draft().iterdir():
        inside = str(file.relative_to(ROOT / "tpro_nb"))
        assert any(fnmatch(inside, pattern) for pattern in patterns), inside
        assert os.access(file, os.R_OK)


has_base = (BASE / "model.safetensors").exists()
needs_base = pytest.mark.skipif(not has_base, reason="the base model's weights are not cached")


@needs_base
def test_its_guesses_are_those_of_the_card():
    check = shipped_card()["check"]
    counted = count_guesses(str(BASE), shipped_draft(), check["texts"], len(check["tries"]))
    # an fp32 sum in another order may turn a tie
    for name in ("tries", "hits"):
        for now, then in zip(counted[name], check[name]):
            assert abs(now - then) <= 2


@needs_base
def test_it_is_lossless_and_yields_more_than_one_token_a_step():
    decoder = Decoder(str(BASE), shipped_draft(), "float32", context=256)
    steps: list[dict] = []
    written = 0
    for text in shipped_card()["check"]["texts"]:
        prompt = text["ids"][: text["start"]]
        plain = decoder.generate(prompt, 24, eos=2)
        assert decoder.generate(prompt, 24, tree=(3, 2, 5), eos=2, events=steps) == plain
        written += len(plain)
    assert written / len(steps) > 1.3


ASKED = [
    ("What are black holes made of?", False),
    ("Explain a black hole to me.", False),
    ("BLACK HOLES!", False),
    ("Explain how birds fly to a ten-year-old, please.", False),
    ("The hole in a black sock", False),  # rather one too many
    ("Is a hole always round?", True),
    ("How do birds sing?", True),
    ("Why is coal black?", True),
    ("Explain gravity to a ten-year-old.", True),
    ("", True),
]


@pytest.mark.parametrize("text, stays", ASKED)
def test_a_prompt_that_mentions_a_held_out_topic_goes(text, stays):
    prompt = TargetPrompt(id="0", prompt=text, domain="own", lang="en", mode="direct")
    measured = ["Explain how birds fly to a ten-year-old."]
    assert bool(apart_from([prompt], ["black holes"], measured)) == stays


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_measured_is_trained_on(seed):
    own = TargetPrompt(
        id="0", prompt=PROOF_PROMPTS[2]["prompt"], domain="own", lang="en", mode="direct"
    )
    trained = {row["prompt"] for row in long_prompts([own], seed)}
    general = general_prompts(seed)
    measured = general["eval"] + general["dev"] + more_prompts(general["dev"], seed)
    assert not trained & {row["prompt"] for row in measured}
    heldout = heldout_topics(seed)
    for domain, topics in new_topics(seed).items():
        assert len(set(topics)) == len(topics) >= 36
        assert not set(topics) & set(heldout[domain])
        assert not set(topics) & set(TOPICS.get(domain, []))


def test_the_first_shards_are_a_fair_sample():
    size = [n % 37 for n in range(640)]
    plan = fair_plan(size, shards=40, batch=16, temperatures=[0.0, 0.8])
    rows = [answer.row for shard in plan for answer in shard]
    assert sorted(rows) == list(range(640))
    assert sorted(rows[:64]) == list(range(64))  # no later prompt is written before
    longest = [max(size[answer.row] for answer in shard) for shard in plan[:4]]
    assert longest == sorted(longest)
    assert {answer.temperature for answer in plan[0]} == {0.0, 0.8}


def test_too_few_prompts_and_too_little_disk_are_said(tmp_path):
    with pytest.raises(UserError, match="need 8 prompts, there are 7: lower shards or raise"):
        fair_plan([1] * 7, shards=2, batch=4, temperatures=[0.0])
    asked = TargetPrompt(id="0", prompt="Да?", domain="own", lang="ru", mode="direct")
    settings = ShardSettings(
        max_new=8, batch=4, temperatures=[0.0], token_budget=0, budget_mb=-1, seed=0
    )
    with pytest.raises(UserError, match="budget_mb is -1. Lower shards or raise budget_mb"):
        write_form(str(toy("09_dpo/model")), [asked] * 4, 1, str(tmp_path), asdict(settings))


def test_the_own_form_links_the_weights(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"weights")
    (target / "chat_template.jinja").write_text("another")
    form = in_own_form(target, tmp_path / "form")
    assert in_own_form(target, tmp_path / "form") == form  # twice is once
    assert (form / "model.safetensors").read_bytes() == b"weights"
    assert "named SmolLM" in (form / "chat_template.jinja").read_text(encoding="utf-8")
    assert (target / "chat_template.jinja").read_text() == "another"
