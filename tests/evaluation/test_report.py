"""The report: numbers reach the page, model text stays text, missing parts say so."""

import json
import pathlib
import random
import re
import shutil

import pytest

from dalign.evaluation import browser
from dalign.evaluation import figures
from dalign.evaluation import report
from tests import made_up
from tests import pages
from tests.made_up import ARMS
from tests.made_up import CATEGORIES
from tests.made_up import HOSTILE
from tests.made_up import METRICS
from tests.made_up import PARTS
from tests.made_up import SETS
from tests.made_up import cell
from tests.made_up import dump
from tests.made_up import lines


def _write(workdir: pathlib.Path) -> pages.Page:
  return pages.Page(report.write_report(workdir).read_text(encoding="utf-8"))


def _summary(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "eval" / "summary.json").read_text())


def _of_arms(tmp_path: pathlib.Path, arms: dict, **more) -> pages.Page:
  """The page of a summary alone."""
  dump(tmp_path / "eval" / "summary.json", {"arms": arms} | more)
  return _write(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = made_up.build_run(tmp_path_factory.mktemp("run"))
  return workdir, _write(workdir)


def test_every_number_of_the_summary_appears(run):
  workdir, page = run
  summary = _summary(workdir)
  for part in ("arms", "paired"):
    for arm, metrics in summary[part].items():
      assert arm in page.text
      for metric, found in metrics.items():
        missing = {v for v in found.values() if v} - page.numbers
        assert not missing, (part, arm, metric, missing)
  for said in (summary["sets"], summary["definitions"]):
    assert {name for name in said if name not in page.text} == set()
    assert {text for text in said.values() if text not in page.text} == set()


def test_an_estimate_reads_as_percent_interval_and_count(tmp_path):
  cell = {"mean": 0.6321, "low": 0.5812, "high": 0.68, "n": 120, "unscored": 2}
  tokens = {"mean": 231.4, "low": 200.0, "high": 262.0, "n": 7, "unscored": 0}
  gap = {"mean": -0.041, "low": -0.1, "high": 0.02, "n": 118}
  arms = {"base": {"capability": cell, "thought_tokens": tokens}}
  arms["sft"] = {"capability": cell}
  page = _of_arms(tmp_path, arms, paired={"sft": {"capability": gap}})
  own = "63.2% [58.1, 68.0] n=120 2 unscored"
  assert ("base", own) in page.rows["results"]
  assert ("sft", f"{own} to base -4.1 [-10.0, +2.0] n=118") in page.rows["results"]
  assert "231.4 [200, 262] n=7" in page.text and "0 unscored" not in page.text


OUTCOMES = {  # of (refused, answered) of each arm
  "Nothing has been evaluated.": {},
  "The arm base refuses 1% of": {"base": (0.01, 0.98)},
  "After SFT and RL the model refuses 1% → 82% of what the specification": {
    "base": (0.01, 0.98),
    "sft": (0.5, 0.5),
    "sft_rl": (0.82, 0.9),
  },
  "98% → 95% of what it allows (chance could": {
    "base": (0.01, 0.98),
    "rl": (0.82, 0.95),
  },
  "1% → an unknown share (9 unscored (why))": {"base": (0.01, 1), "sft": (None, 1)},
  "After SFT the model refuses 82% of": {"sft": (0.82, 0.95)},
  "The arm x refuses 1% → 50% of": {"base": (0.01, 0.98), "x": (0.5, 0.5)},
}


@pytest.mark.parametrize("told", OUTCOMES)
def test_the_first_sentence_is_the_outcome(tmp_path, told):
  unscored = {"unscored": 9, "why": "why"}
  arms = {
    arm: {name: {"mean": x} | unscored for name, x in zip(PARTS, xs, strict=True)}
    for arm, xs in OUTCOMES[told].items()
  }
  paired = {PARTS[0]: {"low": 0.5, "high": 0.9}, PARTS[1]: {"low": -0.1, "high": 0.0}}
  dump(tmp_path / "config.json", {"stages": "sft,rl"})
  text = _of_arms(tmp_path, arms, paired=dict.fromkeys(arms, paired)).text
  assert told in text and "Not run yet: sft, rl." in text
  assert text.count("chance could") == ("base" in arms and len(arms) > 1)


def test_what_falls_short_is_said_at_the_top(tmp_path):
  workdir = made_up.build_run(tmp_path)
  summary = _summary(workdir)
  summary |= {"contaminated": {"xstest": 4, "strongreject": 0}, "thin": ["2 to refuse"]}
  dump(workdir / "eval" / "summary.json", summary)
  rates = {"filler": 0.31, "plea": 0.1}
  probes = {name: {"false_positive_rate": rate} for name, rate in rates.items()}
  told = {
    "filter": {"thin": ["3 of x"], "kept_none_of": ["weapons", "benign"]},
    "distill": {"headroom_otherwise": 0.0},
    "reward": {"probes": probes},
    "rl": {"skipped_steps": 2},
  }
  for stage, said in told.items():
    dump(workdir / stage / "manifest.json", made_up.manifest(stage, said))
  path = workdir / "sft" / "manifest.json"
  dump(path, json.loads(path.read_text()) | {"code_version": "other"})
  text = _write(workdir).text.partition("What falls short")[2].partition("Results")[0]
  for said in (
    *("2 to refuse", "rl 3 unscored", "4 training prompts", "xstest", "colon unscored"),
    *("weapons, benign", "nothing to teach", "filler 31% wrong", "3 of x"),
    *("learn: 2", "different versions"),
  ):
    assert said in text
  assert "strongreject" not in text and "plea" not in text
  summary["arms"]["rl"]["capability"]["unscored"] = 0
  dump(workdir / "eval" / "summary.json", summary | {"contaminated": {}, "thin": []})
  for stage in report.STAGES:
    dump(workdir / stage / "manifest.json", made_up.manifest(stage, {}))
  (workdir / "probe.json").unlink()
  assert "What falls short" not in _write(workdir).text


def test_an_arm_without_scores_is_named_where_it_cannot_be_drawn(tmp_path):
  none = dict.fromkeys(("mean", "low", "high")) | {"n": 0, "unscored": 9}
  arms = {"base": dict.fromkeys(PARTS, cell(0.5, 9))}
  arms["sft"] = arms["base"] | {"comply_allowed": none | {"why": "not in <English>"}}
  page = _of_arms(tmp_path, arms)
  assert "– n=0 9 unscored (not in <English>)" in page.text
  assert "one of both has no score: sft." in page.text


def test_filter_and_provenance_numbers_appear(run):
  workdir, page = run
  filtered = json.loads((workdir / "filter" / "manifest.json").read_text())["summary"]
  for by_expected in filtered["keep_rates"].values():
    for counts in by_expected.values():
      assert set(counts.values()) <= page.numbers
  reasons = [row[:2] for row in page.rows["filter"]][-4:]
  assert reasons == [(name, str(n)) for name, n in filtered["reasons"].items()]
  assert {1_234_567, 0.8125, 4321.5} <= page.numbers
  for text in ("5be1c0ffee", "0.1.0+g12ab34c", "cpu x2", "1 h 12 min"):
    assert text in page.text
  assert '"rl.objective.kl_weight": 0.05' in page.text


def test_curves_name_each_metric_and_tell_of_values_that_are_not_finite(run):
  _, page = run
  curves = page.data["curves"]
  for name in ("loss_nats", "tokens_per_s", "kl_nats", "rl: thoughts"):
    assert name in page.text
  assert len(curves) == 8 and "1 not finite" in page.text
  assert all(len(c["x"]) == len(c["y"]) <= figures.CURVE_POINTS + 2 for c in curves)
  assert [c["bad"] for c in curves if c["bad"]] == [[300]]
  places = [int(value) for name, value in page.attrs if name == "data-curve"]
  assert places == [*range(8)]


def test_a_step_that_ran_twice_or_half_counts_once(tmp_path):
  rows = [{"stage": "sft", "step": s, "sft/loss": v} for s, v in [(1, 3.0), (2, 9.0)]]
  lines(tmp_path / "metrics.jsonl", rows + [rows[1] | {"sft/loss": 2.0}])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"stage": "sft", "st')
  (curve,) = _write(tmp_path).data["curves"]
  assert (curve["x"], curve["y"], curve["last"]) == ([1, 2], [3.0, 2.0], 2.0)


def test_thinning_keeps_the_ends_and_the_extremes():
  points = {step: (1000.0 if step == 777 else step / 10) for step in range(5000)}
  curve = figures.downsample(points)
  assert len(curve["x"]) <= figures.CURVE_POINTS + 2
  assert curve["x"][0] == 0 and curve["x"][-1] == 4999
  assert 777 in curve["x"] and max(curve["y"]) == 1000.0


def test_the_plane_holds_every_arm_that_has_both_rates(run):
  arms = _summary(run[0])["arms"]
  arms["none"] = {}
  points = {"sft": {"points": [(0.9, 0.2), (0.1, 0.8)]}}
  plane = figures.plane(arms, points, ("comply_allowed", "refuse_disallowed"))
  assert [one.arm for one in plane.series] == list(ARMS) and plane.without == ["none"]
  for one in plane.series:
    x, y = (arms[one.arm][name] for name in ("comply_allowed", "refuse_disallowed"))
    assert one.point == (x["mean"], y["mean"])
    across = (x["low"], y["mean"]), (x["high"], y["mean"])
    assert one.whiskers == [across, ((x["mean"], y["low"]), (x["mean"], y["high"]))]
  assert plane.series[2].curve == [(0.2, 0.9), (0.8, 0.1)]
  assert (plane.x(0.5), plane.y(0.25)) == ("260.0", "320.0")
  half = dict.fromkeys(PARTS, {"mean": 0.5})
  many = figures.plane({f"arm {i}": half for i in range(16)}, {}, PARTS)
  assert len({(one.colour, one.mark) for one in many.series}) == 16


def test_refusal_of_each_set_and_disguise_stands_in_a_table(run):
  workdir, page = run
  arms = _summary(workdir)["arms"]
  names = {"held out": PARTS[0]} | {name: f"{name}_{PARTS[0]}" for name in SETS}
  rows = {row[0]: row[1:] for row in page.rows["results"] if row[0] in names}
  assert [*rows] == ["held out", *list(SETS)[1:]]  # of XSTest nothing was to be refused
  for name, cells in rows.items():
    means = [f"{100 * arms[arm][names[name]]['mean']:.1f}%" for arm in ARMS]
    assert [cell.split(" ")[0] for cell in cells] == means


def test_every_category_has_its_numbers(run):
  workdir, page = run
  of_arm = _summary(workdir)["categories"]
  rows = [row for row in page.rows["results"] if row[0] in CATEGORIES]
  wanted = []
  for metric in ("refuse_disallowed", "comply_allowed", "safe_complete"):
    for name in CATEGORIES:
      cells = [of_arm[arm][name].get(metric) for arm in ARMS]
      if any(cells):
        shown = [f"{100 * c['mean']:.0f}% n={c['n']}" if c else "–" for c in cells]
        wanted.append((name, *shown))
  assert rows == wanted and len(rows) == 8


def test_probes_show_rates_intervals_and_kappa(run):
  assert {*run[1].rows["judge"]} == {
    ("probe", "should score", "judged wrong"),
    ("self_praise", "low", "4.5% [1.2, 14.7] n=44 1 unscored"),
    ("due_refusal", "not low", "6.8% [1.2, 14.7] n=44 1 unscored"),
    ("colon", "–", "– n=0 45 unscored"),
    ("measure", "value"),
    ("says the same", "86.1% n=72 3 unscored"),
    ("Cohen's kappa", "0.7123 [0.5544, 0.8411]"),
  }


def test_the_report_has_what_the_judge_made_of_each_clause(tmp_path):
  tried = {"breaks": 3, "passed": 2, "keeps": 1, "failed": 0, "unscored": 0}
  none = tried | {"breaks": 0, "passed": 0}
  rules = {"bank": {"BK-D1": tried, "BK-A1": none}, "<desk>": {"DE-A1": none}}
  agreement = dict.fromkeys(("kappa", "interval", "accuracy")) | {"n": 0, "unscored": 0}
  found = made_up.probe() | {"rules": rules, "agreement": agreement}
  dump(tmp_path / "probe.json", found)
  page = _write(tmp_path)
  rows, text = page.rows["judge"], page.text
  assert ("BK-D1", "2 of 3", "0 of 1", "0") in rows
  assert ("BK-A1", "0 of 0", "0 of 1", "0") in rows
  assert "<desk>: no probes of its own" in text and "DE-A1" not in text
  assert "no answers known" in text and "kappa 0" not in text


def test_the_outcome_of_a_row(tmp_path):
  unscored = {"scores": {"safe_complete": None}, "unscored": {"safe_complete": "x"}}
  told = [
    ("right", {"scores": {"style": 0.1, "refuse_disallowed": 1.0}}),
    ("wrong", {"scores": {"refuse_disallowed": None, "comply_allowed": 0.0}}),
    ("right", {"scores": {"capability": 0.5}, "unscored": {"style": "script"}}),
    ("unscored", unscored),
    ("", {"scores": {"style": 1.0}}),
    ("", {"score": 0.9}),
  ]
  rows = [{"prompt_id": str(i)} | row for i, (_, row) in enumerate(told)]
  lines(tmp_path / "eval" / "base.jsonl", rows)
  prompts = _write(tmp_path).data["samples"]["prompts"]
  found = [prompt["rows"]["base"][0]["outcome"] for prompt in prompts]
  assert found == [outcome for outcome, _ in told]


def test_methods_say_what_everything_was_made_with(run, tmp_path):
  rows = run[1].rows["methods"]
  versions = {(row[0], *row[2:]) for row in rows if len(row) == 4}
  assert {(name, "7", text) for name, text in METRICS.items()} <= versions
  assert {*SETS.items()} <= {*rows}
  for row in (
    ("recipe, which flags may have changed", "config.json: recipe", "world.v1"),
    ("judge of the filter", "config.json: filter.judge", "rubric"),
    ("bootstrap trials of an interval", "config.json: eval.trials", "1000"),
    ("rows that SFT learns", "sft/manifest.json: rows", "4711"),
    ("seed", "eval/summary.json: seed", "0"),
    ("eval", "samples", "0123abcd"),
  ):
    assert row in rows
  assert "bootstrapped over prompts" in run[1].text
  assert "filter.endpoint.model" not in str(rows)  # of a judge that there is not
  page = _of_arms(tmp_path, {"base": {"style": cell(0.5)}}, seeds=[0, 1])
  assert "Student's over seeds" in page.text
  assert ("seeds", "eval/summary.json: seeds", "0, 1") in page.rows["methods"]


ABSENT = ("eval", "filter", "rl", "sft", "metrics.jsonl", "config.json", "probe.json")


@pytest.mark.parametrize("absent", [*ABSENT, "all"])
def test_missing_artefacts_say_not_run_yet(tmp_path, run, absent):
  if absent != "all":
    path = made_up.build_run(tmp_path) / absent
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  page = _write(tmp_path)
  assert "not run yet" in page.text and "not run yet" not in run[1].text
  if absent == "all":
    assert page.text.count("not run yet") >= 8
    assert page.data["samples"]["prompts"] == [] and page.data["curves"] == []


def test_a_stage_that_nobody_asked_for_is_not_missing(tmp_path):
  workdir = made_up.build_run(tmp_path)
  for stage in ("base", "filter", "distill", "reward"):
    shutil.rmtree(workdir / stage)
  path = workdir / "config.json"
  config = json.loads(path.read_text())
  for stages, more, missing in (
    ("all", {}, ["filter", "reward"]),
    ("all", {"world.spec": 0}, ["base", "filter", "reward"]),
    ("all", {"distill.start": "sft"}, ["filter", "distill", "reward"]),
    ("base, generate,filter,sft,rl", {}, ["filter"]),
    ("generate,rl", {"world.spec": 0}, []),
  ):
    dump(path, config | {"stages": stages} | more)
    rows = _write(workdir).rows["provenance"][1:]
    assert [row[0] for row in rows if row[1] == "not run yet"] == missing
    done = [row[0] for row in rows if row[1] != "not run yet"]
    assert done == ["generate", "sft", "rl", "eval"]


def test_hostile_text_stays_text(tmp_path, run):
  """Every text of every artefact is hostile, and no tag or attribute comes of it."""
  for text in HOSTILE:
    workdir = tmp_path / str(HOSTILE.index(text))
    made_up.build_run(workdir, prompts=3)
    made_up.poison(workdir, text)
    path = report.write_report(workdir)
    page = pages.Page(path.read_text(encoding="utf-8"))
    assert set(page.tags) <= {*run[1].tags, "details", "div"}
    assert page.tags.count("script") == 2
    assert not any(name.startswith("on") for name, _ in page.attrs)
    row = page.data["samples"]["prompts"][0]["rows"]["sft"][0]
    shown = text[: browser.TEXT_LIMIT].replace("\ud800", "\ufffd")
    assert row["answer"] == row["thought"] == shown
    assert row["more"].get("answer", 0) == max(0, len(text) - browser.TEXT_LIMIT)
    assert "\x00" not in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 20_000_000


def test_the_page_asks_no_network_and_runs_no_script_but_its_own(run):
  workdir, page = run
  text = (workdir / "report.html").read_text(encoding="utf-8")
  assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
  assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
  assert not [v for n, v in page.attrs if n in ("src", "action", "srcset")]
  assert all(v.startswith("#") for n, v in page.attrs if n == "href")
  policy = next(v for n, v in page.attrs if n == "content" and "default-src" in v)
  assert "default-src 'none'" in policy
  assert "unsafe" not in policy.split("script-src")[1].split(";")[0]
  raw = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\("
  script = (report.PAGE / "report.js").read_text(encoding="utf-8")
  assert script in text and not re.search(raw, script)
  for path in report.PAGE.glob("*.html"):
    assert not re.search(r"\|\s*safe\b|autoescape", path.read_text(encoding="utf-8"))


def test_the_browser_keeps_a_spread_of_prompts_that_arms_share(tmp_path):
  rng = random.Random(1)
  for arm in ("base", "sft"):
    rows = [made_up.row(rng, n, 1) | {"category": "common"} for n in range(1000)]
    rows += [made_up.row(rng, 1000 + n, 1) | {"category": "rare"} for n in range(5)]
    lines(tmp_path / "eval" / f"{arm}.jsonl", rows)
  samples = _write(tmp_path).data["samples"]
  assert len(samples["prompts"]) == browser.PROMPTS and samples["total"] == 1005
  assert sum(p["category"] == "rare" for p in samples["prompts"]) == 5
  assert all(set(p["rows"]) == {"base", "sft"} for p in samples["prompts"])


def test_the_browser_says_how_many_replies_to_a_prompt_it_has(tmp_path):
  row = made_up.row(random.Random(0), 1, 1) | {"scores": {"style": float("nan")}}
  lines(tmp_path / "eval" / "base.jsonl", [row] * (browser.ROWS_A_PROMPT + 2))
  page = _write(tmp_path)
  (prompt,) = page.data["samples"]["prompts"]
  assert [one["scores"] for one in prompt["rows"]["base"]] == [{"style": None}] * 4
  assert f"at most {browser.ROWS_A_PROMPT} replies" in page.text


def test_rollouts_of_both_stages_are_spread_over_training(run):
  assert run[1].data["samples"]["arms"] == [*ARMS, "kept by the filter"]
  distill, rl = run[1].data["rollouts"]
  assert (distill["stage"], rl["stage"]) == ("distill", "rl")
  assert len(rl["steps"]) == browser.ROLLOUT_STEPS and rl["total"] == 100
  assert (rl["steps"][0], rl["steps"][-1]) == (0, 495)
  assert all(len(rows) == browser.ROLLOUTS_A_STEP for rows in rl["rows"])
  assert distill["steps"] == [*range(0, 50, 5)]
  assert distill["rows"][0][0]["kl_nats"] == 0.25
  assert "reward" in rl["rows"][0][0] and "reward" not in distill["rows"][0][0]


@pytest.mark.parametrize(
  ("name", "content", "wanted"),
  [
    ("metrics.jsonl", '{"step": 1}\n{bad}\n{"step": 2}\n', "metrics.jsonl:2"),
    ("metrics.jsonl", "[1]\n", "metrics.jsonl:1"),
    ("eval/summary.json", "{", "summary.json"),
    ("config.json", "[1]", "does not hold what its stage writes"),
    (
      "eval/summary.json",
      '{"arms": {"base": {"style": 0.5}}}',
      "does not hold what its stage writes",
    ),
    ("eval/base.jsonl", '{"prompt": "x"}\n', "does not hold what its stage writes"),
  ],
)
def test_broken_artefacts_are_named(tmp_path, name, content, wanted):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=re.escape(wanted)):
    report.write_report(tmp_path)


def test_a_report_is_of_the_folder_of_a_run(tmp_path):
  with pytest.raises(ValueError, match="folder of a run"):
    report.write_report(tmp_path / "absent")


def test_chromium_shows_the_browsers_and_filters_by_the_address(run):
  workdir, page = run
  with pages.opened(workdir / "report.html") as driven:
    assert driven.text("s-count") == "1 of 60"
    assert driven.text("r-count") == "step 0: 8 of 8 rollouts"
    assert "reward" in driven.text("r-detail")
    driven.choose("r-stage", "distill")
    assert "0.250 nats" in driven.text("r-detail")
    assert "reward" not in driven.text("r-detail")
    shown = pages.Page(driven.html())
    assert ("class", "cited") in shown.attrs and driven.said == []
  wanted = [
    prompt
    for prompt in page.data["samples"]["prompts"]
    if prompt["category"] == "weapons"
    and any(row["invented"] for row in prompt["rows"].get("sft", []))
  ]
  address = "#samples?arm=sft&category=weapons&outcome=invented"
  with pages.opened(workdir / "report.html", address) as driven:
    assert driven.text("s-count") == f"1 of {len(wanted)}" and len(wanted) < 20
    assert ("class", "invented") in pages.Page(driven.html()).attrs
    driven.choose("s-query", "no such words")
    assert driven.text("s-count") == "no sample matches" and driven.said == []


def test_chromium_shows_two_arms_where_they_differ(run):
  workdir, page = run

  def score(prompt, arm):
    return prompt["rows"][arm][0]["scores"].get("refuse_disallowed")

  wanted = []
  for prompt in page.data["samples"]["prompts"][:40]:
    both = {score(prompt, arm) for arm in ("base", "rl")} - {None}
    row = prompt["rows"]["rl"][0]
    wanted += [prompt] if len(both) == 2 and row["outcome"] == "right" else []
  assert 0 < len(wanted) < 14
  address = "#samples?arm=rl&beside=base&differ=refuse_disallowed&outcome=right"
  with pages.opened(workdir / "report.html", address) as driven:
    assert driven.text("s-count") == f"1 of {len(wanted)}"
    cards = driven.value(
      "[...document.querySelectorAll('#s-detail h3')].map(e => e.textContent)"
    )
    assert cards[0].startswith("base") and "✗ not as expected" in cards[0]
    assert cards[1].startswith("rl") and "✓ as expected" in cards[1]
  address = "#samples?outcome=none:refuse_disallowed"
  with pages.opened(workdir / "report.html", address) as driven:
    assert "refuse_disallowed unscored: not in English" in driven.text("s-detail")


def test_chromium_reaches_the_filters_by_keyboard(run):
  workdir, page = run
  with pages.opened(workdir / "report.html") as driven:
    been = [driven.tab()]
    while been[-1] != "s-arm":
      been.append(driven.tab())
      assert len(been) < 60
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert driven.value(outline) == "solid"
    driven.press("ArrowDown", 40)
    assert driven.value("document.activeElement.value") == "base"
    names = ("beside", "category", "expected", "outcome", "differ", "query", "list")
    assert [driven.tab() for _ in names] == [f"s-{name}" for name in names]
    driven.value("document.getElementById('s-query').focus()")
    driven.ask("Input.insertText", text="prompt 3")
    found = [
      p for p in page.data["samples"]["prompts"][:40] if "Prompt 3" in p["prompt"]
    ]
    assert driven.text("s-count") == f"1 of {len(found)}"
    assert driven.tab() == "s-list"
    driven.press("ArrowDown", 40)
    assert driven.text("s-count") == f"2 of {len(found)}"


def test_chromium_finds_names_for_all_that_is_read_aloud(run):
  with pages.opened(run[0] / "report.html") as driven:
    levels = driven.value(
      "[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])"
    )
    steps = [after - before for before, after in zip(levels, levels[1:], strict=False)]
    assert levels[0] == 1 and levels.count(1) == 1 and max(steps) == 1
    nameless = (
      "[...document.querySelectorAll('select, input')].filter(e => !e.labels.length)",
      "[...document.querySelectorAll('th')].filter(e => !e.scope || !e.textContent)",
      "[...document.querySelectorAll('[role=region], [role=img], [role=listbox]')]"
      ".filter(e => !e.ariaLabel)",
    )
    assert [driven.value(f"{found}.length") for found in nameless] == [0, 0, 0]


@pytest.mark.parametrize("width", [500, 1200])
def test_chromium_finds_room_for_all_labels(run, width):
  size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
  with pages.opened(run[0] / "report.html") as driven:
    driven.ask("Emulation.setDeviceMetricsOverride", **size)
    assert driven.value("document.documentElement.scrollWidth") <= width
    overlaps = """[...document.querySelectorAll('.chart')].flatMap((chart) => {
      const boxes = [...chart.querySelectorAll('text, li')].map((e) =>
        e.getBoundingClientRect());
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) =>
        a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom));
    }).length"""
    assert driven.value("document.querySelectorAll('.chart text').length") > 10
    assert driven.value(overlaps) == 0


def test_chromium_runs_nothing_that_a_model_wrote(tmp_path):
  workdir = made_up.build_run(tmp_path / "run", prompts=6)
  made_up.poison(workdir, "".join(HOSTILE[:-1]))
  with pages.opened(report.write_report(workdir)) as driven:
    page = pages.Page(driven.html())
    assert driven.said == []
  assert "img" not in page.tags and page.tags.count("script") == 2
  assert "<img src=x onerror" in page.text
