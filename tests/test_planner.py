"The planner against hand arithmetic, the paper's published hours, and the profiles' parameters."

import pytest
import yaml
from conftest import ROOT

from tpro_nb import core, planner
from tpro_nb.planner import Cards

PARAMS = ROOT / "params"
PROFILES = ["smoke", "cpu", "h100", "h100x32"]


def by_stage(rows):
    return {row.stage: row for row in rows}


def profile_parameters(profile):
    files = (PARAMS / profile).glob("[0-9]*.yaml")
    return {file.stem: yaml.safe_load(file.read_text()) for file in files}


def test_planner_against_hand_arithmetic():
    cards = Cards(mfu=0.5, gpus=2, peak_tflops=1000, usd_per_gpu_h=2, rub_per_usd=100)
    row = planner.estimate("x", 1e9, 1e9, 6, cards)
    assert row.flop == 6e18
    assert row.gpu_h == pytest.approx(6e18 / 5e14 / 3600)
    assert row.wall_h == row.gpu_h / 2
    assert row.rub == pytest.approx(row.gpu_h * 200)
    assert planner.estimate("x", 1e9, None).gpu_h is None


@pytest.mark.parametrize("stage, published", [("sft", 288), ("dpo", 896)])
def test_planner_against_published_hours(stage, published):
    hours = planner.plan_against_paper(stage)
    assert hours.published == published
    assert 1 / 1.5 <= hours.planned / hours.published <= 1.5


def test_energy_and_price_are_null_where_no_rate_is_known():
    row = planner.estimate("x", 1e9, 1e9, cards=Cards(gpus=4, usd_per_gpu_h=None))
    assert row.gpu_h > 0
    assert row.usd is row.rub is row.kwh is None
    with_watts = planner.estimate("x", 1e9, 1e9, cards=Cards(watts=500))
    assert with_watts.kwh == pytest.approx(row.gpu_h / 2)
    table = planner.plan_table(planner.profile_plan(PARAMS / "cpu")).splitlines()
    for line in (table[1], table[-1]):
        assert line.count("not known") == 3  # dollars, roubles, kWh


def test_footprint_by_hand():
    many = planner.estimate("sft", 10e9, 1e9, cards=Cards(gpus=8))
    alone = planner.estimate("sft", 10e9, 1e9, cards=Cards(gpus=1))
    assert planner.footprint(many, 6).memory_gb == 20
    assert planner.footprint(many, 8).memory_gb == 22.5
    assert planner.footprint(alone, 8).memory_gb == 200
    assert planner.footprint(many, 2).memory_gb == 20
    assert planner.footprint(many, 6).disk_gb == 20 + 3 * 120 + 4
    assert planner.footprint(many, 2).disk_gb == 24


def test_plan_by_size():
    from tpro_nb.doctor import QWEN3

    assert planner.SIZES == {size: shape.parameters for size, shape in QWEN3.items()}
    rows = {row.size: row for row in planner.plan_sizes()}
    whole = sum(row.gpu_h or 0 for row in planner.paper_plan())
    assert rows["32B"].gpu_h == pytest.approx(whole, rel=0.005)
    assert rows["0.6B"].gpu_h == pytest.approx(whole * 596_049_920 / 32.8e9)
    assert rows["32B"].cards == 10
    assert rows["0.6B"].cards == 1
    assert rows["32B"].usd * 80 == pytest.approx(rows["32B"].rub)


def test_a_larger_model_costs_more():
    rows = planner.plan_sizes()
    assert [row.size for row in rows] == ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]
    for smaller, larger in zip(rows, rows[1:]):
        assert smaller.gpu_h < larger.gpu_h
        assert smaller.usd < larger.usd
        assert smaller.disk_gb < larger.disk_gb


def test_plan_beside_the_run(tmp_path):
    core.write_json(tmp_path / "07_sft" / "stamp.json", dict(seconds=90))
    plan = planner.profile_plan(PARAMS / "cpu")
    rows = by_stage(planner.plan_against_run(tmp_path, plan))
    assert rows["07_sft"].stage_min == 1.5
    assert rows["07_sft"].planned_min > 0
    assert rows["09_dpo"].stage_min is None
    hours = sum(row.wall_h for row in plan if row.stage in ("dpo", "dpo sampling"))
    assert rows["09_dpo"].planned_min == pytest.approx(60 * hours)


def test_the_printed_plan(tmp_path):
    core.write_json(tmp_path / "07_sft" / "stamp.json", dict(seconds=90))
    text = planner.plan_text(PARAMS / "cpu", [tmp_path / "absent", tmp_path])
    for said in (
        "took     1.50 min",
        "dollars a card-hour not known",
        "0.6B",
        "32B",
        "FLOP",
        "on the paper's cards",
        "1,840 with attention",
        "published 288",
    ):
        assert said in text, said
    assert "took" not in planner.plan_text(PARAMS / "h100", [tmp_path / "absent"])


@pytest.mark.parametrize("profile", PROFILES)
def test_plan_of_a_profile(profile):
    rows = planner.profile_plan(PARAMS / profile)
    text = planner.plan_table(rows)
    assert len(text.splitlines()) == len(rows) + 2
    assert "total" in text
    if profile == "h100x32":
        ours, paper = by_stage(rows), by_stage(planner.paper_plan())
        for stage in ("midtraining", "sft", "dpo sampling", "dpo", "eagle draft"):
            assert ours[stage].gpu_h == pytest.approx(paper[stage].gpu_h, rel=0.01)
        assert ours["reward model"].gpu_h is None
        assert "not known" in text


@pytest.mark.parametrize("profile", PROFILES)
def test_the_plan_counts_the_tokens_that_the_stages_will_see(profile):
    params = profile_parameters(profile)
    own = params["16d_claims"]
    plan = planner.profile_plan(PARAMS / profile)
    billions = {row.stage: row.tokens_b for row in plan}

    def rows_seen(stage):
        "Rows of a training by steps, in 10^9."
        p = params[stage]
        return p["steps"] * p["batch"] * p["accumulate"] * own["plan_gpus"] / 1e9

    context = params["06_midtraining"]["context"]
    assert billions["midtraining"] == pytest.approx(rows_seen("06_midtraining") * context, rel=0.05)
    if profile in ("smoke", "cpu"):
        row, dpo, draft = own["plan_row_tokens"], params["09_dpo"], params["11c_eagle_draft"]
        pairs, answers = dpo["prompts"] * dpo["epochs"], dpo["prompts"] * dpo["n"]
        read = draft["base_tokens"] + draft["chain_tokens"]
        assert billions["sft"] == pytest.approx(rows_seen("07_sft") * row)
        assert billions["reward model"] == pytest.approx(rows_seen("08_reward_model") * 2 * row)
        assert billions["dpo"] == pytest.approx(pairs * 2 * row / 1e9)
        assert billions["dpo sampling"] == pytest.approx(answers * row / 1e9)
        assert billions["eagle draft"] == pytest.approx(read / 1e9)
        assert all(own[f"plan_{work.short}_mtok"] is None for work in planner.PLANNED)


def test_what_a_run_counted_comes_before_what_was_stated():
    text = (PARAMS / "h100x32" / "16d_claims.yaml").read_text()
    settings = planner.plan_settings(yaml.safe_load(text))
    stages = {"06_midtraining": dict(steps=10, batch=1, accumulate=1, context=512)}
    metrics = {
        "07_sft": dict(train_tokens=5e5),
        "11c_eagle_draft": dict(data_tokens=1e5, chain_data_tokens=2e4),
    }
    rows = by_stage(planner.plan_rows(settings, planner.tokens_of(stages, None, 1, metrics)))
    assert rows["midtraining"].tokens_b == 40
    assert rows["sft"].tokens_b == 5e-4
    assert rows["eagle draft"].tokens_b == pytest.approx(1.2e-4)
    assert "counted" in rows["sft"].note


def test_all_prompts_of_dpo_are_those_that_05_deals():
    stages = {"05j_data": dict(prompts_dpo=2000), "09_dpo": dict(prompts=0, n=16, epochs=1.0)}
    assert planner.tokens_of(stages, 2140.0, 1) == {
        "dpo_sampling": (2000 * 16 * 2140, "parameters"),
        "dpo": (2000 * 2 * 2140, "parameters"),
    }
    how_many_there_are_is_not_known = {"09_dpo": stages["09_dpo"]}
    assert planner.tokens_of(how_many_there_are_is_not_known, 2140.0, 1) == {}


def test_attention_by_hand():
    by_hand = 64 * 2 * 32768 * 64 * 128 / (2 * 32.8e9)
    assert planner.attention_share(32768) == pytest.approx(by_hand)


def test_plan_of_a_profile_without_one():
    with pytest.raises(core.UserError, match="16d_claims.yaml"):
        planner.profile_plan(PARAMS / "nowhere")
