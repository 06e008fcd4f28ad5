"The ledger: arithmetic against hand-computed values, rules against edge cases, the report as a browser would get it."
import html.parser, json, re, shutil
from pathlib import Path
import pytest, yaml
from tpro_nb import claims as C, core
from conftest import ROOT

FULL = dict(tokens_added=34000, vocab_size=151669, unreachable_added=0, unreachable_kept_new=0, ru_tok_ratio=.71, ru_tok_ratio_lo=.70, ru_tok_ratio_hi=.72)
RUN = {"01_tokenizer_analysis": dict(vocab_size=151669), "02_tokenizer_surgery": FULL, "10_evaluation": dict(diff_think_minus_direct_sft=.3, diff_think_minus_direct_sft_lo=.2, diff_think_minus_direct_sft_hi=.4),
       "14_eagle_speedup": dict(speedup=1.4, speedup_lo=1.3, speedup_hi=1.5, acceptance_length=2.4, acceptance_length_lo=2.3, acceptance_length_hi=2.5)}
by_id = lambda rows: {r["id"]: r for r in rows}

def test_every_claim_has_what_it_needs():
    rows = C.claim_table()
    assert len(rows) >= 60 and len({r["id"] for r in rows}) == len(rows)
    for r in rows:
        assert r["area"] and r["source"] and r["claim"] and r["paper"], r["id"]
        assert not (r["recompute"] and r["rule"]), r["id"]
        if r["recompute"]: assert r["recompute"].split(":")[0] in C.RECOMPUTE
        else: assert r["cost"], r["id"]
        if r["rule"]: assert r["on"] and all(C.CONDITION.match(c.strip()) for c in r["rule"].split(" and ")), r["id"]
        if r["full_if"]: assert r["area"] == "tokenizer" and "tokens_added >= 34000" in r["full_if"] and "vocab_size = 151669" in r["full_if"], r["id"]
    assert {r["recompute"].split(":")[0] for r in rows if r["recompute"]} == set(C.RECOMPUTE), "a recomputation that no claim uses"

def test_rules_name_stages_that_exist():
    stages = {p.stem for p in (ROOT/"nbs").glob("[0-9]*.ipynb")} | {f"{i:02}" for i in range(15)}
    for r in C.claim_table():
        for key in re.findall(r"[\w|]+(?=/)", r["rule"] + " " + r["full_if"] + " " + r["beside"]):
            for s in key.split("|"): assert s in stages or s[:2] in {f"{i:02}" for i in range(15)}, (r["id"], s)

def test_rules_name_metrics_that_are_defined():
    from fnmatch import fnmatchcase
    table, unknown = core.metric_table(), set()
    for r in C.claim_table():
        for key in re.findall(r"[\w|]+/\w+", r["rule"] + " " + r["full_if"] + " " + r["beside"]):
            stages, name = key.split("/")
            if not any(m["stage"] in stages.split("|") and fnmatchcase(name, m["key"]) for m in table): unknown.add(key)
    assert not unknown

@pytest.mark.parametrize("call,holds,says", [
    ("fastest:28", False, "2.28"), ("fastest:2.28", True, "T-Math"), ("table7_change:ruWiki:-24", True, "−23.7"), ("table8_largest_gain:ky", False, "Kazakh"),
    ("steps_from_tokens", None, "9,537"), ("modes_alike", False, "1.70"), ("table2_mean:direct:1.85:3.39", True, "3 benchmarks"), ("table2_mean:think:1.83:3.33", True, "4 benchmarks"),
    ("at_least:23:Qwen3-32B:AIME24:AIME25", False, "−0.043"), ("split:5:Qwen3-32B:4:4", True, "Vikhr"), ("cycle_cost", True, "1.80"), ("length_caps_speed", True, "0.58"),
    ("transitive_pairs", True, "12 pairs"), ("table13_without:ruCodeEval", False, "0.570 → 0.569"), ("table13_average", True, "0.5"), ("at_least:5:Qwen3-32B:T-Math", True, "0.3 standard"), ("table17_better:labels by DeepSeek-V3:labels by Qwen3-235B", None, "without focus it would be behind, 0.538 against 0.586"), ("table17_better:with transitive pairs:without transitive pairs", True, "the same figures"),
    ("plan_beside:dpo", None, "1,840 with attention"), ("plan_beside:sft", None, "factor 1.02"), ("early_tokens", True, "4.19B"),
    ("gpu_hours:dpo:896", True, "896"), ("table16_delta", True, "5 rows"), ("table17_first", False, "Skywork"), ("compound", True, "2.4")])
def test_recomputations(call, holds, says):
    found, got = C.recompute(call)
    assert got is holds and says in found

def test_knockout_by_brute_force():
    assert [C.knockout_pairs(n) for n in (2, 4, 8, 16)] == [(1, 1), (3, 4), (7, 12), (15, 32)]

def test_a_changed_table_changes_the_verdict(tmp_path, monkeypatch):
    "Verdicts come from the tables, not from the code."
    shutil.copytree(C._tables(), tmp_path/"tables")
    f = tmp_path/"tables"/"paper_table20.csv"
    f.write_text(f.read_text().replace("T-Math,0,think,2.28", "T-Math,0,think,28"))
    monkeypatch.setattr(C, "_tables", lambda: tmp_path/"tables"); C.paper.cache_clear()
    try: assert C.recompute("fastest:28")[1] is True and C.recompute("length_caps_speed")[1] is False
    finally: C.paper.cache_clear()

def test_intervals_decide_and_points_do_not():
    m = lambda v, *ci: {"14_eagle_speedup": dict(zip(("speedup", "speedup_lo", "speedup_hi"), (v, *ci)))}
    rule = "14_eagle_speedup/speedup above 1"
    assert [C.judge(rule, x) for x in (m(1.4, 1.2, 1.6), m(1.4, .9, 1.9), m(.8, .7, .9), m(1.4), m(None), {})] == [1, 0, -1, 0, None, None]
    with pytest.raises(ValueError): C.judge("speedup is nice", {})
    for bad in (float("nan"), "1.4"):
        with pytest.raises(core.UserError, match="not a number"): C.judge(rule, m(bad, 1.2, 1.6))

def test_a_threshold_that_was_measured_has_noise_too():
    two = lambda a, b: {"7": dict(zip(("a", "a_lo", "a_hi", "b", "b_lo", "b_hi"), (*a, *b)))}
    wide, apart = two((60, 50, 70), (49, 39, 59)), two((60, 55, 65), (40, 35, 45))
    assert [C.judge(f"7/a {w} 7/b", x) for x in (wide, apart) for w in ("above", "below")] == [0, 0, 1, -1]
    assert C.judge("7/a above 1.5*7/b", apart) == 0 and C.judge("7/b below 7/a", apart) == 1 and C.judge("7/a above 7/b", {"7": wide["7"] | dict(b_lo=None, b_hi=None)}) == 1

def test_verdicts_of_a_run():
    rows = by_id(C.ledger(RUN, "a model", decides=True))
    assert rows["tok-34k"]["verdict"] == rows["tok-ru-here"]["verdict"] == "reproduced at full scale"
    assert rows["tok-152064"]["verdict"] == "contradicted"
    assert rows["sp-here"]["verdict"] == rows["sft-think"]["verdict"] == "direction holds at small scale"
    assert rows["sp-here"]["values"][0]["key"] == "14_eagle_speedup/speedup" and "a model" in rows["sp-here"]["on"]
    assert rows["dpo-gain"]["verdict"] == "not run here" and "H100-hours" in rows["dpo-gain"]["why"]
    for k in ("sft-plan", "dpo-plan"): assert rows[k]["verdict"] == "not run here" and "our assumption" in rows[k]["why"]      # our own utilisation proves nothing
    n = C.counts(list(rows.values()))
    assert n["claims_total"] == sum(n[f"claims_{k}"] for k in ("recomputed", "reproduced_full_scale", "direction_holds", "contradicted", "not_run"))

def test_a_smaller_swap_is_no_full_reproduction():
    rows = by_id(C.ledger({"02_tokenizer_surgery": FULL | dict(tokens_added=9000)}, decides=True))
    assert rows["tok-ru-here"]["verdict"] == rows["tok-34k"]["verdict"] == "not run here" and "9,000 tokens were swapped" in rows["tok-34k"]["why"]

@pytest.mark.parametrize("scale", [1, 1000])
def test_nothing_but_the_tokenizer_is_reproduced_however_good_the_numbers(scale):
    keys = {k for r in C.claim_table() for c in r["rule"].split(" and ") if r["rule"] for k in [C.CONDITION.match(c.strip())[1]]}
    fake = {}
    for k in keys:
        stages, name = k.split("/")
        fake.setdefault(stages.split("|")[0], {}).update({name: 100.*scale, f"{name}_lo": 99.*scale, f"{name}_hi": 101.*scale})
    assert {r["area"] for r in C.ledger(fake, decides=True) if r["verdict"] == "reproduced at full scale"} <= {"tokenizer"}

def test_what_stands_beside_a_verdict_does_not_make_it():
    dpo = {"09_dpo": dict(dpo_gain_pct=6., dpo_gain_pct_lo=3., dpo_gain_pct_hi=9.), "10_evaluation": dict(diff_dpo_minus_sft_think=-.01, diff_dpo_minus_sft_think_lo=-.05, diff_dpo_minus_sft_think_hi=.03)}
    row = by_id(C.ledger(dpo, decides=True))["dpo-gain"]
    assert row["verdict"] == "direction holds at small scale" and [v["metric"] for v in row["values"]] == ["dpo_gain_pct", "diff_dpo_minus_sft_think"] and "temperature" in row["on"]
    assert {r["study"] for r in C.claim_table()} - {""} <= set(C.STUDIES)

def test_russian_bits_need_their_interval_and_words_of_two_tokens_their_own_base():
    mid = lambda *ci: by_id(C.ledger({"06_midtraining": dict(zip(("ru_bpb_gain", "ru_bpb_gain_lo", "ru_bpb_gain_hi"), (.1, *ci)))}, decides=True))["mid-ru"]["verdict"]
    assert [mid(.05, .15), mid(-.05, .25)] == ["direction holds at small scale", "not run here"]
    le2 = by_id(C.ledger({"02_tokenizer_surgery": FULL | dict(ru_le2_pct_base=60., ru_le2_pct_dense=61.)}, decides=True))["tok-le2-here"]
    assert le2["verdict"] == "direction holds at small scale"            # another text, whose base stands as high as the paper's result

def test_smoke_decides_no_direction():
    rows = by_id(C.ledger(RUN, decides=False))
    assert rows["sp-here"]["verdict"] == "not run here" and rows["sp-here"]["values"] and "code runs" in rows["sp-here"]["why"]
    assert rows["tok-34k"]["verdict"] == "reproduced at full scale"      # counts over the real vocabulary are exact at any profile
    assert yaml.safe_load((ROOT/"params/smoke/16_claims.yaml").read_text())["decides"] is False

def test_planner_against_hand_arithmetic():
    r = C.estimate("x", 1e9, 1e9, 6, mfu=.5, gpus=2, peak_tflops=1000, usd_per_gpu_h=2, rub_per_usd=100)
    assert r["flop"] == 6e18 and r["gpu_h"] == pytest.approx(6e18/5e14/3600) and r["wall_h"] == r["gpu_h"]/2 and r["rub"] == pytest.approx(r["gpu_h"]*200)
    assert C.estimate("x", 1e9, None)["gpu_h"] is None
    for stage, hours in (("sft", 288), ("dpo", 896)):
        ours, theirs = C.plan_against_paper(stage)
        assert theirs == hours and 1/1.5 <= ours/theirs <= 1.5

def test_no_source_is_vague():
    for r in C.claim_table():
        assert re.search(r"§|Table|App\.|Figure|Limitations|\(secondary\)|not in the paper", r["source"]), (r["id"], r["source"])
        assert not re.match(r"an? (summary|reading)", r["source"]) and "(a summary)" not in r["claim"], r["id"]
    for c in C.ledger({}): assert c["verdict"] in C.VERDICTS and c["source"]

def test_energy_and_price_are_null_where_no_rate_is_known():
    r = C.estimate("x", 1e9, 1e9, gpus=4, usd_per_gpu_h=None)
    assert r["gpu_h"] > 0 and r["usd"] is r["rub"] is r["kwh"] is None
    assert C.estimate("x", 1e9, 1e9, watts=500)["kwh"] == pytest.approx(r["gpu_h"]/2)
    cpu = C.plan_table(C.plan(ROOT/"params"/"cpu"))
    assert cpu.splitlines()[1].count("not known") == 3 and cpu.splitlines()[-1].count("not known") == 3      # dollars, roubles, kWh

def test_footprint_by_hand():
    row = C.estimate("sft", 10e9, 1e9, gpus=8)
    assert C.footprint(row, 6)["memory_gb"] == 20 and C.footprint(row, 8)["memory_gb"] == 22.5 and C.footprint(row | dict(gpus=1), 8)["memory_gb"] == 200 and C.footprint(row, 2)["memory_gb"] == 20
    assert C.footprint(row, 6)["disk_gb"] == 20 + 3*120 + 4 and C.footprint(row, 2)["disk_gb"] == 24

def test_plan_by_size():
    from tpro_nb.doctor import QWEN3
    assert C.SIZES == {k: v[-1] for k, v in QWEN3.items()}
    rows = {r["size"]: r for r in C.plan_sizes()}
    whole = sum(r["gpu_h"] or 0 for r in C.paper_plan())
    assert rows["32B"]["gpu_h"] == pytest.approx(whole, rel=.005) and rows["0.6B"]["gpu_h"] == pytest.approx(whole*596_049_920/32.8e9)
    assert rows["32B"]["cards"] == 10 and rows["0.6B"]["cards"] == 1 and rows["32B"]["usd"]*80 == pytest.approx(rows["32B"]["rub"])

def test_plan_beside_the_run(tmp_path):
    core.write_json(tmp_path/"07_sft"/"stamp.json", dict(seconds=90))
    plan = C.plan(ROOT/"params"/"cpu"); rows = {r["stage"]: r for r in C.plan_against_run(tmp_path, plan)}
    assert rows["07_sft"]["stage_min"] == 1.5 and rows["07_sft"]["planned_min"] > 0 and rows["09_dpo"]["stage_min"] is None
    assert rows["09_dpo"]["planned_min"] == pytest.approx(60*sum(r["wall_h"] for r in plan if r["stage"] in ("dpo", "dpo sampling")))
    text = C.plan_text(ROOT/"params"/"cpu", [tmp_path/"absent", tmp_path])
    for s in ("took     1.50 min", "dollars a card-hour not known", "0.6B", "32B", "FLOP", "on the paper's cards", "1,840 with attention", "published 288"): assert s in text, s
    assert "took" not in C.plan_text(ROOT/"params"/"h100", [tmp_path/"absent"])

@pytest.mark.parametrize("profile", ["smoke", "cpu", "h100", "h100x32"])
def test_plan_of_a_profile(profile):
    rows = C.plan(ROOT/"params"/profile)
    text = C.plan_table(rows)
    assert len(text.splitlines()) == len(rows) + 2 and "total" in text
    if profile == "h100x32":
        ours, paper = {r["stage"]: r for r in rows}, {r["stage"]: r for r in C.paper_plan()}
        for s in ("midtraining", "sft", "dpo sampling", "dpo", "eagle draft"): assert ours[s]["gpu_h"] == pytest.approx(paper[s]["gpu_h"], rel=.01)
        assert ours["reward model"]["gpu_h"] is None and "not known" in text

@pytest.mark.parametrize("profile", ["smoke", "cpu", "h100", "h100x32"])
def test_the_plan_counts_the_tokens_that_the_stages_will_see(profile):
    p = {f.stem: yaml.safe_load(f.read_text()) for f in (ROOT/"params"/profile).glob("[0-9]*.yaml")}
    own, got = p["16_claims"], {r["stage"]: r["tokens_b"] for r in C.plan(ROOT/"params"/profile)}
    steps = lambda s: p[s]["steps"]*p[s]["batch"]*p[s]["accumulate"]*own["plan_gpus"]/1e9
    assert got["midtraining"] == pytest.approx(steps("06_midtraining")*p["06_midtraining"]["context"], rel=.05)
    if profile in ("smoke", "cpu"):
        row = own["plan_row_tokens"]
        assert got["sft"] == pytest.approx(steps("07_sft")*row) and got["reward model"] == pytest.approx(steps("08_reward_model")*2*row)
        assert got["dpo"] == pytest.approx(p["09_dpo"]["prompts"]*p["09_dpo"]["epochs"]*2*row/1e9) and got["dpo sampling"] == pytest.approx(p["09_dpo"]["prompts"]*p["09_dpo"]["n"]*row/1e9)
        assert got["eagle draft"] == pytest.approx((p["11_eagle_draft"]["base_tokens"] + p["11_eagle_draft"]["chain_tokens"])/1e9) and all(own[f"plan_{s}_mtok"] is None for _, s, *_ in C.PLANNED)

def test_what_a_run_counted_comes_before_what_was_stated():
    own = yaml.safe_load((ROOT/"params"/"h100x32"/"16_claims.yaml").read_text())
    known = C.tokens_of({"06_midtraining": dict(steps=10, batch=1, accumulate=1, context=512)}, None, 1, {"07_sft": dict(train_tokens=5e5), "11_eagle_draft": dict(data_tokens=1e5, chain_data_tokens=2e4)})
    rows = {r["stage"]: r for r in C.plan_rows(own, known)}
    assert rows["midtraining"]["tokens_b"] == 40 and rows["sft"]["tokens_b"] == 5e-4 and rows["eagle draft"]["tokens_b"] == pytest.approx(1.2e-4) and "counted" in rows["sft"]["note"]

def test_all_prompts_of_dpo_are_those_that_05_deals():
    stages = {"05_data": dict(prompts_dpo=2000), "09_dpo": dict(prompts=0, n=16, epochs=1.)}
    assert C.tokens_of(stages, 2140., 1) == {"dpo_sampling": (2000*16*2140, "parameters"), "dpo": (2000*2*2140, "parameters")}
    assert C.tokens_of({"09_dpo": stages["09_dpo"]}, 2140., 1) == {}                # how many there are is not known

def test_attention_by_hand():
    assert C.attention_share(32768) == pytest.approx(64*2*32768*64*128/(2*32.8e9))

def test_plan_of_a_profile_without_one():
    with pytest.raises(core.UserError, match="16_claims.yaml"): C.plan(ROOT/"params"/"nowhere")

def test_captions_and_numbers():
    assert C.plain("## T\n\nfirst\n\nLook at **this** [one](http://x), `code`.") == "Look at this one, code."
    rows = C.key_numbers("14_eagle_speedup", dict(speedup=1.4, speedup_lo=1.3, speedup_hi=1.5, wall_s=3.0, chain_speedup=None))
    assert [r["key"] for r in rows] == ["speedup", "wall_s", "chain_speedup"] and rows[0]["value"] == "1.40 [1.30, 1.50]" and rows[2]["value"] == "not measured"

class Tags(html.parser.HTMLParser):
    "Unclosed tags, outside addresses, scripts."
    VOID = {"meta", "img", "br", "link", "input", "hr"}
    def __init__(self): super().__init__(); self.open, self.bad, self.seen = [], [], []
    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)
    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.bad.append(tag)

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082")

@pytest.fixture
def run_dir(tmp_path):
    for stage, m in RUN.items(): core.write_json(tmp_path/stage/"metrics.json", m | dict(wall_s=1.0, peak_mb=2.0))
    out = tmp_path/"14_eagle_speedup"
    (out/"speed.png").write_bytes(PNG)
    cells = [dict(cell_type="markdown", source="# 14 · Скорость <b>&"), dict(cell_type="markdown", source="Смотрите на <script>alert(1)</script> линию."), dict(cell_type="code", source="run.figure(fig, 'speed')")]
    core.write_json(out/"14_eagle_speedup.ipynb", dict(cells=cells))
    core.write_json(out/"stamp.json", dict(finished="2026-01-01 00:00", seconds=3, peak_mb=4, seed=0, code_version="abc", code_key=dict(key="k1"), licences=dict(SmolLM2="Apache-2.0"),
                                           environment=core.environment()))
    return tmp_path

def test_report(run_dir):
    page = C.report(run_dir)
    text = page.read_text(encoding="utf-8")
    t = Tags(); t.feed(text)
    assert page == run_dir/"report.html" and not t.bad and not t.open
    for tag, a in t.seen:
        assert tag != "link" and not (tag == "script" and a.get("src"))
        for ref in (a.get("src"), a.get("href")): assert ref is None or ref.startswith(("data:image/png;base64,", "#")), ref
    assert "url(" not in text and "@import" not in text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "Скорость &lt;b&gt;&amp;" in text
    for s in ("14_eagle_speedup", "SmolLM2", "Apache-2.0", "2026-01-01", "1.40 [1.30, 1.50]", "prefers-color-scheme"): assert s in text
    assert text.count("<tr data-v=") == len(C.claim_table()) and "2.28" in text

def test_report_of_nothing(tmp_path):
    with pytest.raises(core.UserError, match="no run"): C.report(tmp_path/"absent")
    assert "No stage of this run has finished" in C.report(tmp_path).read_text()

def test_report_names_a_broken_file(run_dir):
    (run_dir/"10_evaluation"/"metrics.json").write_text('{"a": 1')
    with pytest.raises(core.UserError, match="10_evaluation"): C.report(run_dir)

def test_a_smaller_swap_is_undecided_not_a_contradiction():
    small = {"01_tokenizer_analysis": dict(vocab_size=151669), "02_tokenizer_surgery": FULL | dict(tokens_added=300, vocab_size=20000)}
    rows = by_id(C.ledger(small, "a model", decides=False))
    assert rows["tok-34k"]["verdict"] == "not run here" and rows["tok-152064"]["verdict"] == "contradicted"

def test_two_runs_side_by_side(tmp_path):
    from tpro_nb.claims import beside, compare
    for name, gain, hi in (("one", 1.2, 1.3), ("two", 1.6, 1.7)):
        d = tmp_path/name/"14_eagle_speedup"; d.mkdir(parents=True)
        core.write_json(d/"metrics.json", dict(speedup=gain, speedup_lo=gain - .1, speedup_hi=hi, prompts=28, **({"draft_ms": .9} if name == "one" else {})))
        core.write_json(d/"stamp.json", dict(code_key=dict(code="c", modules={}, params=dict(seed=0, tree=name))))
    (tmp_path/"one"/"07_sft").mkdir(); core.write_json(tmp_path/"one"/"07_sft"/"metrics.json", dict(acc_think_pct=90.))
    files = lambda: {p: p.read_bytes() for d in ("one", "two") for p in (tmp_path/d).rglob("*") if p.is_file()}
    before = files()
    page = compare(tmp_path/"one", tmp_path/"two", tmp_path/"page.html").read_text(encoding="utf-8")
    assert files() == before
    assert "Not the same in both: tree one against two." in page and "Only one has this stage." in page and "acc_think_pct" in page
    assert "1.20 [1.10, 1.30]" in page and "1.60 [1.50, 1.70]" in page and "1 figures are apart" in page and "one run only" in page and "http" not in page.split("</style>")[1]
    assert beside((1, .9, 1.1), (1.05, 1.0, 1.2)) == "overlap"
    with pytest.raises(core.UserError, match="no finished stage"): compare(tmp_path/"one", tmp_path)

def test_what_the_tables_leave_open_has_a_cost():
    for r in C.claim_table():
        if r["recompute"] and C.recompute(r["recompute"])[1] is None: assert r["cost"], r["id"]

def test_a_larger_model_costs_more():
    rows = C.plan_sizes()
    assert [r["size"] for r in rows] == ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]
    for k in ("gpu_h", "usd", "disk_gb"): assert all(a[k] < b[k] for a, b in zip(rows, rows[1:])), k

def test_a_folder_of_two_runs_says_so(tmp_path):
    for s, key, up, cpu in (("06_midtraining", "b", {}, "A"), ("07_sft", "c", {"06_midtraining": "a"}, "<B>")):
        (tmp_path/s).mkdir(); core.write_json(tmp_path/s/"metrics.json", {}); core.write_json(tmp_path/s/"stamp.json", dict(code_key=dict(key=key, upstream=up), environment=dict(cpu=cpu, cores=2, ram_gb=1, system="x", python="3", packages={}), seconds=1, peak_mb=1, seed=0, finished="now"))
    page = C.report(tmp_path).read_text()
    assert "07_sft was computed from another 06_midtraining than the one here." in page and "2 environments" in page and "<B>" not in page
    core.write_json(tmp_path/"07_sft"/"stamp.json", core.read_json(tmp_path/"06_midtraining"/"stamp.json"))
    page = C.report(tmp_path).read_text(); assert "another 06" not in page and "environments" not in page

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout with the committed studies, and an empty run."
    shutil.copytree(ROOT/"outputs"/"reference", tmp_path/"outputs"/"reference", ignore=lambda d, names: [n for n in names if n in ("cpu", "playground.png")])
    (tmp_path/"outputs"/"cpu").mkdir(); monkeypatch.setattr(C, "project_root", lambda: tmp_path)
    return tmp_path

def test_studies_are_shown_and_named_as_other_runs(checkout):
    text = C.report(checkout/"outputs"/"cpu").read_text(encoding="utf-8")
    t = Tags(); t.feed(text)
    assert not t.bad and not t.open and "Nothing in the ledger rests on them" in text
    seen = {s["folder"]: s for s in C.studies(checkout/"outputs"/"cpu")}
    assert set(seen) == {f"outputs/reference/{s}" for s in ("ablate", "grid", "limits", "bench")} and all(s["committed"] for s in seen.values())
    for s in seen.values(): assert s["folder"] in text and s["tables"][0]["rows"] and all(len(r) == len(x["head"]) for x in s["tables"] for r in x["rows"])
    assert text.count("data:image/png") == sum(len(s["figures"]) for s in C.studies(checkout/"outputs"/"cpu")) == 6
    shutil.rmtree(checkout/"outputs"/"reference")
    assert C.studies(checkout/"outputs"/"cpu") == [] and "Studies beside" not in C.report(checkout/"outputs"/"cpu").read_text(encoding="utf-8")

def test_ones_own_study_comes_before_the_committed_one(checkout):
    import os
    out = checkout/"outputs"
    where = lambda run: {s["id"]: s["folder"] for s in C.studies(out/run)}
    shutil.copytree(out/"reference"/"grid", out/"cpu"/"grid"); shutil.copytree(out/"reference"/"grid", out/"smoke"/"grid")
    for run, age in (("cpu", 100), ("smoke", 50)): os.utime(out/run/"grid"/"grid.csv", (age, age))
    assert where("cpu")["grid"] == "outputs/cpu/grid" and where("h100")["grid"] == "outputs/cpu/grid" and where("smoke")["grid"] == "outputs/smoke/grid"      # the run's own, else the newest
    shutil.copytree(out/"reference"/"ablate", out/"ablate"/"smoke"); (out/"limits").mkdir(); shutil.copy(out/"reference"/"limits"/"tau.csv", out/"limits")
    got = where("cpu")
    assert got["effects"] == "outputs/ablate/smoke" and got["tau"] == "outputs/limits" and got["position"] == "outputs/reference/limits"
    assert not next(s for s in C.studies(out/"cpu") if s["id"] == "tau")["committed"]
    (out/"limits"/"tau.csv").write_text("from_token,to_token\n0,1\n")
    with pytest.raises(core.UserError, match="tau.csv is not a table"): C.studies(out/"cpu")

def test_the_head_counts_every_claim_and_says_how_to_see_it_again():
    claims = C.ledger(RUN, "a model", decides=True)
    rows = {e["verdict"]: e for e in C.evidence(claims, {"01_a": dict(seconds=60), "02_b": dict(seconds=60), "14_c": dict(seconds=1800)}, "cpu")}
    assert sum(e["n"] for e in rows.values()) == len(claims) and list(rows) == C.VERDICTS
    assert rows["reproduced at full scale"]["again"] == "tpro-nb run cpu --to 02; 2 minutes of stage time in this run" and "; 32 minutes" in rows["direction holds at small scale"]["again"]
    assert "minutes" not in C.evidence(claims, {}, "cpu")[1]["again"]

def test_the_head_prefers_test_problems_to_those_that_chose_the_rates():
    dev = {"07_sft": dict(acc_think_pct=99., acc_direct_pct=18., think_minus_direct_pct=81., think_minus_direct_pct_lo=74., think_minus_direct_pct_hi=88.)}
    test = {"10_evaluation": dict(avg_at_k_sft_think=.95, avg_at_k_sft_direct=.125, diff_think_minus_direct_sft=.825, diff_think_minus_direct_sft_lo=.75, diff_think_minus_direct_sft_hi=.9)}
    assert "99 % of chapter 07's problems, greedily," in C.summary(dev)[0] and "81 points (95 % interval 74 to 88)" in C.summary(dev)[0]
    assert "95 % of the test problems when it thinks first and 13 % when it does not, a difference of 83 points (95 % interval 75 to 90)" in C.summary(dev | test)[0]
    assert C.summary({}) == []
