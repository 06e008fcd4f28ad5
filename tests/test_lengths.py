"Long answers: a tree that goes wrong late is seen, and where; a killed run goes on."
import pytest
from tpro_nb import lengths as L
from tpro_nb.core import UserError, toy_model
from tpro_nb.eagle_draft import random_draft

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    d = tmp_path_factory.mktemp("lengths")
    toy_model(d/"target"); random_draft(d/"draft", d/"target")
    return str(d/"target"), str(d/"draft")

def runs(pair, work, **kw): return L.long_runs(*pair, **(dict(prompts=[[40, 41], [42, 43, 44]], new=20, shapes=[[2, 1, 2], [3, 3, 7]], stretches=2, work=str(work)) | kw))

def test_same_text_and_every_token_counted(pair, tmp_path):
    rows = runs(pair, tmp_path)
    assert [x["shared"] for r in rows for x in r] == [20]*4
    for r in rows:
        for x in r: assert sum(t for _, t in x["steps"]) >= 19 and sum(s for s, _ in x["steps"]) <= 19      # the first token comes with the prompt

def test_a_late_fault_is_seen_where_it_is(pair, tmp_path, monkeypatch):
    good = L.Decoder.generate
    def late(self, p, new, tree=None, **kw):
        out = good(self, p, new, tree=tree, **kw)
        return out if tree is None else out[:17] + [t ^ 1 for t in out[17:]]
    monkeypatch.setattr(L.Decoder, "generate", late)
    assert [x["shared"] for r in runs(pair, tmp_path) for x in r] == [17]*4

def test_a_killed_run_goes_on(pair, tmp_path, monkeypatch):
    first = runs(pair, tmp_path, prompts=[[40, 41]])
    asked, good = [], L.Decoder.generate
    monkeypatch.setattr(L.Decoder, "generate", lambda self, p, *a, **kw: (asked.append(p), good(self, p, *a, **kw))[1])
    assert runs(pair, tmp_path)[0] == first[0] and {tuple(p) for p in asked} == {(42, 43, 44)}

def test_too_long_for_the_target(pair, tmp_path):
    with pytest.raises(UserError, match="new_tokens 100000"): runs(pair, tmp_path, new=100_000)
