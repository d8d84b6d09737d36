"""Artefacts -> report.html: tables, plots and sample browsers in one file.

Works out no statistics: the numbers stand in the artefacts. Knows the names and fields
of files, not models, judges or stages. What is shown is put together here as plain
values; page/report.html makes HTML of it with Jinja. Model text is hostile and stays
text: all that the template writes is escaped, or reaches the page as JSON in a script
that is never run, is shown through `textContent` alone, and a content security policy
lets only page/report.js run. The page asks no network for anything.
"""

import base64
import collections
from collections.abc import Iterator
import functools
import hashlib
import json
import math
import pathlib
import re
from typing import Any

import jinja2
import markupsafe

from dalign.config.schema import chosen_stages
from dalign.evaluation import browser
from dalign.evaluation import figures
from dalign.evaluation.browser import DECIDED
from dalign.evaluation.browser import rows_of
from dalign.runs import buckets
from dalign.runs import store
from dalign.runs.manifests import check_outputs
from dalign.runs.manifests import read_manifest

STAGES = ("base", "generate", "filter", "sft", "distill", "reward", "rl", "eval")
CORE = {  # the columns of the first table in words, in this order; others follow it
  "refuse_disallowed": "refuses what is forbidden",
  "comply_allowed": "answers what is allowed",
  "safe_complete": "completes safely",
  "response_types": "mean of these three",
  "capability": "right final answers",
  "think_format": "thinks in one block",
  "balanced_accuracy": "mean of refusing and answering",
  "policy_retrieval": "thinks of the right policy",
  "citation": "cites a deciding clause",
  "style": "keeps the style guide",
  "truncated": "cut by the token budget",
  "no_answer": "has no answer",
}
AFTER = {  # the first of these arms that is there is what the first sentence is of
  "sft_rl": "After SFT and RL",
  "sft_distill": "After SFT and distillation",
  "distill": "After distillation",
  "rl": "After RL",
  "sft": "After SFT",
}
LEFT_OUT = {  # counts and lists in the manifests of stages that are to be empty
  ("generate", "too_long"): "prompts too long to be sampled",
  ("filter", "thin"): "too few samples kept to go by",
  ("filter", "kept_none_of"): "categories of which nothing was kept",
  ("sft", "leaked"): "rows that hold words of the specification",
  ("sft", "too_long"): "rows too long to be learned",
  ("reward", "too_long"): "answers too long to be learned",
  ("rl", "skipped_steps"): "steps without anything to learn",
}
THOUGHTS = "rl/thought_", "distill/thought_"  # what metrics of thoughts begin with
SAME = 0.02  # of decisions that differ: no more than nothing
ERRORS = 0.1  # of a probe's answers: a judge that gets more of them wrong is named
UNREADABLE = ArithmeticError, AttributeError, LookupError, TypeError
PAGE = pathlib.Path(__file__).with_name("page")

Json = Any  # what json.loads returns


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes WORKDIR/report.html from the artefacts there are, and returns its path.

  A part whose artefact is missing says "not run yet", and a stage where the config asks
  for it. Raises ValueError where WORKDIR is no folder or an artefact cannot be read.
  """
  workdir = buckets.as_path(workdir)
  if not workdir.is_dir():
    raise ValueError(
      f"the report needs the folder of a run, there is none at {workdir}"
    )
  for stage in STAGES:
    check_outputs(workdir / stage)
  try:
    page = render(view(workdir))
  except (*UNREADABLE, jinja2.TemplateError) as error:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise ValueError(
      f"{workdir}: an artefact does not hold what its stage writes ({said}); put it "
      "back from a copy, or do its stage again"
    ) from error
  store.write_bytes(workdir / "report.html", page.encode())
  return workdir / "report.html"


def view(workdir: pathlib.Path) -> dict[str, Any]:
  """What the page of a folder shows, by the names that the template has for it."""
  summary = _read_json(workdir / "eval" / "summary.json") or {}
  config = _read_json(workdir / "config.json") or {}
  probe = _read_json(workdir / "probe.json") or {}
  manifests = _manifests(workdir, _requested_stages(config))
  curves = _curves(workdir / "metrics.jsonl")
  samples = browser.samples(workdir, summary)
  rollouts = [browser.rollouts(workdir, stage) for stage in ("distill", "rl")]
  rollouts = [found for found in rollouts if found["steps"]]
  points = [curve.data for of_stage in curves.values() for curve in of_stage]
  return {
    "title": config.get("name") or workdir.resolve().name,
    "outcome": _outcome(summary, manifests),
    "doubts": [*_doubts(summary, manifests, probe)],
    "manifests": manifests,
    "config": config,
    "summary": summary,
    "results": _results(summary) if summary.get("arms") else None,
    "probe": probe,
    "rules": _rules(probe.get("rules") or {}),
    "filtered": _summary(manifests, "filter"),
    "curves": curves,
    "samples": samples,
    "rollouts": rollouts,
    "data": {"samples": samples, "rollouts": rollouts, "curves": points},
    "limits": {"rows": browser.ROWS_A_PROMPT, "rollouts": browser.ROLLOUTS_A_STEP},
  }


def render(values: dict[str, Any]) -> str:
  """The page of a view. What is no HTML of the template's own is escaped."""
  env = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PAGE),
    autoescape=True,
    finalize=lambda x: x if isinstance(x, markupsafe.Markup) else figures.plain(x),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  env.tests["finite"] = figures.finite
  filters = (
    *(figures.estimate, figures.notes, figures.shown, figures.duration, figures.flat),
    *(_heading, _probed, _script_json),
  )
  env.filters |= {f.__name__.lstrip("_"): f for f in filters} | {"exact": repr}
  env.filters["pretty"] = functools.partial(json.dumps, indent=2, ensure_ascii=False)
  style, script = (
    markupsafe.Markup((PAGE / name).read_text("utf-8"))
    for name in ("report.css", "report.js")
  )
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  return env.get_template("report.html").render(
    values, style=style, script=script, script_hash=f"sha256-{digest}"
  )


# Reading


def _read_json(path: pathlib.Path) -> Json:
  """The JSON object of a file, or None where there is no file."""
  return store.read_json(path) if path.is_file() else None


def _requested_stages(config: Json) -> tuple[str, ...]:
  """The stages that a config asks for: but a world's, none trains a base."""
  asked = chosen_stages(config.get("stages", "all"))
  optional = {"base": "world.spec", "distill": "distill.start"}
  return tuple(s for s in asked if s not in optional or optional[s] in config)


def _manifests(workdir: pathlib.Path, asked: tuple[str, ...]) -> dict[str, Json]:
  """Manifests of the stages that were run, and None for others that are asked for."""
  found = {s: read_manifest(workdir / s / "manifest.json") for s in STAGES}
  return {stage: found[stage] for stage in STAGES if found[stage] or stage in asked}


def _summary(manifests: dict, stage: str) -> dict:
  """What a stage said of itself, if it was run."""
  return (manifests.get(stage) or {}).get("summary") or {}


def _curves(path: pathlib.Path) -> dict[str, list[figures.Curve]]:
  """heading -> curves; of a step that was run twice the later row counts."""
  series: dict[str, dict[str, dict]] = collections.defaultdict(
    lambda: collections.defaultdict(dict)
  )
  for row in rows_of(path):
    stage = str(row.get("stage", ""))
    if not figures.finite(row.get("step")):
      continue
    for name, value in row.items():
      number = value is None or isinstance(value, int | float)
      if name in ("time", "stage", "step") or not number:
        continue
      heading = f"{stage}: thoughts" if name.startswith(THOUGHTS) else stage
      series[heading][name.removeprefix(f"{stage}/")][row["step"]] = value
  return {
    heading: [
      figures.Curve(n, figures.downsample(own)) for n, own in sorted(metrics.items())
    ]
    for heading, metrics in series.items()
  }


def _script_json(value: Json) -> markupsafe.Markup:
  """ASCII JSON that no HTML parser can leave: no <, >, & and no NaN."""
  dumped = json.dumps(_clean(value), ensure_ascii=True, allow_nan=False)
  for char in "<>&":
    dumped = dumped.replace(char, f"\\u{ord(char):04x}")
  return markupsafe.Markup(dumped)


def _clean(value: Json) -> Json:
  """NaN as null, and lone surrogates, which no page can hold, as replacement marks."""
  if isinstance(value, dict):
    return {_clean(str(k)): _clean(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_clean(v) for v in value]
  if isinstance(value, str):
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  return None if isinstance(value, float) and not math.isfinite(value) else value


# Sections


def _outcome(summary: Json, manifests: dict) -> str:
  """What came of the run, in a sentence."""
  arms = summary.get("arms") or {}
  waiting = [stage for stage, manifest in manifests.items() if not manifest]
  end = f" Not run yet: {', '.join(waiting)}." if waiting else ""
  if not arms:
    return f"Nothing has been evaluated.{end}"
  arm = next((name for name in AFTER if name in arms), [*arms][-1])
  told = f"{AFTER[arm]} the model" if arm in AFTER else f"The arm {arm}"
  refuses = _change(summary, arm, "refuse_disallowed", "the specification forbids")
  answers = _change(summary, arm, "comply_allowed", "it allows")
  return f"{told} refuses {refuses} and answers {answers}.{end}"


def _change(summary: Json, arm: str, metric: str, of: str) -> str:
  """A share before and after, and whether the paired difference leaves it open."""

  def share(name):
    cell = summary["arms"].get(name, {}).get(metric) or {}
    if figures.finite(cell.get("mean")):
      return f"{100 * cell['mean']:.0f}%"
    why = ", ".join(figures.notes(cell)) or "not measured"
    return f"an unknown share ({why})"

  if arm == "base" or "base" not in summary["arms"]:
    return f"{share(arm)} of what {of}"
  paired = (summary.get("paired") or {}).get(arm, {}).get(metric) or {}
  low, high = (paired.get(name) for name in ("low", "high"))
  same = figures.finite(low) and figures.finite(high) and low <= 0 <= high
  unclear = " (chance could explain the difference)" if same else ""
  return f"{share('base')} → {share(arm)} of what {of}{unclear}"


def _doubts(summary: Json, manifests: dict, probe: Json) -> Iterator[str]:
  """What the artefacts say falls short."""
  if thin := summary.get("thin"):
    yield f"eval: too few held-out prompts to go by: {figures.plain(thin)}"
  otherwise = _summary(manifests, "distill").get("headroom_otherwise")
  if figures.finite(otherwise) and otherwise <= SAME:
    yield "distill: the teacher decides as the student does, and has nothing to teach"
  for (stage, name), said in LEFT_OUT.items():
    if found := _summary(manifests, stage).get(name):
      yield f"{stage}: {said}: {figures.plain(found)}"
  for name in DECIDED:
    cells = {a: cells.get(name) or {} for a, cells in summary.get("arms", {}).items()}
    missing = {a: figures.notes(cell) for a, cell in cells.items()}
    if missing := {a: notes for a, notes in missing.items() if notes}:
      yield f"{CORE[name]}: {figures.plain(missing)}"
  for name, count in (summary.get("contaminated") or {}).items():
    if count:
      yield f"{figures.plain(count)} training prompts say what prompts of {name} say"
  judges = {"judge of RL": probe, "reward model": _summary(manifests, "reward")}
  for judge, found in judges.items():
    probes = found.get("probes")
    rates = {name: _probed(row)[1]["mean"] for name, row in (probes or {}).items()}
    wrong = [
      f"{name} {f'{rate:.0%} wrong' if figures.finite(rate) else 'unscored'}"
      for name, rate in rates.items()
      if not figures.finite(rate) or rate > ERRORS
    ]
    if wrong:
      yield f"{judge}, on probes: {', '.join(wrong)}"
  if len({m.get("code_version") for m in manifests.values() if m}) > 1:
    yield "the stages were run by different versions of the code"


def _results(summary: Json) -> dict[str, Any]:
  """What tables and drawings show of the arms, beside the summary itself."""
  arms, sets = summary["arms"], summary.get("sets") or {}
  curves = (summary.get("curves") or {}).get("held out") or {}
  axes = "comply_allowed", "refuse_disallowed"
  return {
    "groups": _metric_groups(arms, sets),
    "plane": figures.plane(arms, curves, axes),
    "categories": _by_category(summary.get("categories") or {}),
    "by_set": _by_set(arms, sets, axes[1]),
  }


def _metric_groups(arms: dict, sets: dict) -> dict[str, list[str]]:
  """The core metrics, then one group for each further set, and for each first word of
  the other names."""
  metrics = dict.fromkeys(name for cells in arms.values() for name in cells)
  core = [name for name in CORE if name in metrics]
  groups = collections.defaultdict(list)
  for name in metrics:
    if name not in core:
      of = [one for one in sets if name.startswith(f"{one}_")]
      groups[max(of, key=len, default=re.split(r"[_/.]", name)[0])].append(name)
  alone = [h for h, names in groups.items() if h not in sets and len(names) == 1]
  single = [groups.pop(head)[0] for head in alone]
  groups = {"Arms": core} | groups | {"Other metrics": single}
  return {title: names for title, names in groups.items() if names}


def _heading(metric: str, title: str = "") -> str:
  """A metric in words, in the table of a group."""
  own = metric.removeprefix(f"{title}_")
  return CORE.get(own) or own.replace("_", " ")


def _by_category(categories: dict) -> dict[str, dict[str, dict]]:
  """metric -> category -> arm -> cell, of each metric that the summary has so."""
  found: dict[str, dict] = {}
  for metric in DECIDED:
    names = sorted({n for own in categories.values() for n in own if metric in own[n]})
    cells = {
      name: {arm: own.get(name, {}).get(metric) for arm, own in categories.items()}
      for name in names
    }
    found |= {metric: cells} if cells else {}
  return found


def _by_set(arms: dict, sets: dict, metric: str) -> dict[str, dict[str, Json]]:
  """set -> arm -> cell of a metric, where one of the further sets has it."""
  found = {
    name: {arm: cells.get(f"{name}_{metric}") for arm, cells in arms.items()}
    for name in sets
  }
  found = {name: cells for name, cells in found.items() if any(cells.values())}
  own = {"held out": {arm: cells.get(metric) for arm, cells in arms.items()}}
  return own | found if found else {}


def _rules(found: dict[str, dict]) -> dict[str, Any]:
  """Clause -> counts of the probes that break or keep it; and the policies of which
  nothing says whether the judge knows them."""
  without = [
    policy
    for policy, clauses in found.items()
    if not any(row.get("breaks") for row in clauses.values())
  ]
  rows = {
    clause: row
    for policy, clauses in found.items()
    if policy not in without
    for clause, row in clauses.items()
  }
  return {"rows": rows, "without": without}


def _probed(row: Json) -> tuple[str, dict]:
  """What the answers of a probe should score, and the share judged otherwise."""
  low, high = row.get("false_positive_rate"), row.get("false_negative_rate")
  rates = {"low": low, "not low": high}
  should = next((s for s, rate in rates.items() if rate is not None), "–")
  ends = dict(zip(("low", "high"), row.get("interval") or (), strict=False))
  counts = {"n": row.get("n"), "unscored": row.get("unscored")}
  return should, {"mean": rates.get(should)} | counts | ends
