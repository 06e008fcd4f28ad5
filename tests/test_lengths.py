"Long answers: a tree that goes wrong late is seen, and where; a killed run goes on."

import pytest

from tpro_nb.core import UserError, toy_model
from tpro_nb.decoder import Decoder
from tpro_nb.draft_model import random_draft
from tpro_nb.lengths import long_runs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    toy_model(folder / "target")
    random_draft(folder / "draft", folder / "target")
    return str(folder / "target"), str(folder / "draft")


def runs_of(pair, work, prompts=((40, 41), (42, 43, 44)), new=20):
    "The runs of all prompts, two trees each, in one list."
    target, draft = pair
    rows = long_runs(
        target,
        draft,
        prompts=[list(prompt) for prompt in prompts],
        new=new,
        shapes=[[2, 1, 2], [3, 3, 7]],
        stretches=2,
        work=str(work),
    )
    assert all(len(row) == 2 for row in rows)
    return [run for row in rows for run in row]


def test_same_text_and_every_token_counted(pair, tmp_path):
    runs = runs_of(pair, tmp_path)
    assert [run["shared"] for run in runs] == [20] * 4
    for run in runs:
        # the first token comes with the prompt
        assert sum(tokens for _, tokens in run["steps"]) >= 19
        assert sum(steps for steps, _ in run["steps"]) <= 19


def test_a_late_fault_is_seen_where_it_is(pair, tmp_path, monkeypatch):
    good = Decoder.generate

    def late(self, prompt, new, tree=None, **options):
        out = good(self, prompt, new, tree=tree, **options)
        if tree is None:
            return out
        return out[:17] + [token ^ 1 for token in out[17:]]

    monkeypatch.setattr(Decoder, "generate", late)
    assert [run["shared"] for run in runs_of(pair, tmp_path)] == [17] * 4


def test_a_killed_run_goes_on(pair, tmp_path, monkeypatch):
    first = runs_of(pair, tmp_path, prompts=[(40, 41)])
    asked, good = set(), Decoder.generate

    def watched(self, prompt, *args, **options):
        asked.add(tuple(prompt))
        return good(self, prompt, *args, **options)

    monkeypatch.setattr(Decoder, "generate", watched)
    assert runs_of(pair, tmp_path)[:2] == first
    assert asked == {(42, 43, 44)}


def test_too_long_for_the_target(pair, tmp_path):
    with pytest.raises(UserError, match="new_tokens 100000"):
        runs_of(pair, tmp_path, new=100_000)
