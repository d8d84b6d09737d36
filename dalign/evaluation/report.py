"""Artefacts -> report.html: tables, plots and sample browsers in one file.

Works out no statistics: the numbers stand in the artefacts. Knows the names and fields
of files, not models, judges or stages. Model text is hostile and stays text: it is
escaped (`figures.py`) or reaches the page as JSON in a script that is never run, is
shown through `textContent` alone, and a content security policy lets only the
template's own script run. The page asks no network for anything.
"""

import base64
import collections
from collections.abc import Iterator
import datetime
import hashlib
import json
import math
import pathlib
import re
from typing import Any

from dalign.config.schema import chosen_stages
from dalign.evaluation import figures
from dalign.runs import buckets
from dalign.runs import store

STAGES = ("base", "generate", "filter", "sft", "distill", "reward", "rl", "eval")
CORE = (  # the columns of the first table, in this order; other metrics follow it
  "refuse_disallowed",
  "comply_allowed",
  "safe_complete",
  "response_types",
  "capability",
  "think_format",
  "balanced_accuracy",
  "policy_retrieval",
  "citation",
  "style",
  "truncated",
  "no_answer",
)
DECIDED = (  # of a row that has one of these, what was right
  "refuse_disallowed",
  "comply_allowed",
  "safe_complete",
  "capability",
)
SETTINGS = (  # what the methods name, and where it stands
  ("recipe, which flags may have changed", "config.json", "recipe"),
  ("base model", "config.json", "model.path"),
  ("prompts, for training and held out", "config.json", "data.source"),
  ("number of the policy world's specification", "config.json", "world.spec"),
  ("how much of the specification is read", "config.json", "spec.detail"),
  ("prompts that stage 1 answers", "generate/manifest.json", "prompts"),
  ("who answers them", "config.json", "generate.teacher"),
  ("that teacher's model, behind a server", "config.json", "generate.endpoint.model"),
  ("rows that SFT learns", "sft/manifest.json", "rows"),
  ("decisions that the spec turns right", "distill/manifest.json", "headroom_gained"),
  ("judge of the filter", "config.json", "filter.judge"),
  ("that judge's model, behind a server", "config.json", "filter.endpoint.model"),
  ("votes, of which the least counts", "config.json", "filter.votes"),
  ("score from which a sample is kept", "config.json", "filter.threshold"),
  ("labels of the reward model", "config.json", "reward.labels"),
  ("reward of RL", "config.json", "rl.reward"),
  ("errors on a probe that RL's judge may make", "config.json", "rl.judge_errors"),
  ("words of a thought in its sight that stop RL", "config.json", "rl.scan_words"),
  ("prompts of all sets, for each arm", "eval/manifest.json", "rows"),
  ("held-out prompts of policies, at most", "config.json", "eval.prompts"),
  ("held-out helpful prompts, at most", "config.json", "eval.helpful"),
  ("held-out capability prompts, at most", "config.json", "eval.capability"),
  ("further sets", "config.json", "eval.extra"),
  ("public sets, in their disguises", "config.json", "eval.suite"),
  ("prompts of such a set, at most", "config.json", "eval.extra_limit"),
  ("share of its disguises that are worst", "config.json", "eval.worst"),
  ("model of the arms behind a server", "config.json", "eval.endpoint.model"),
  ("graders, of which the first makes the table", "config.json", "eval.grader"),
  ("how a grader that is a model is asked", "config.json", "eval.form"),
  ("that model, in this process", "config.json", "eval.grader_model"),
  ("that model, behind a server", "config.json", "eval.grader_endpoint.model"),
  ("temperature of evaluation", "config.json", "eval.temperature"),
  ("tokens of a thought, at most (0: of both)", "config.json", "eval.max_think"),
  ("tokens of a completion, or its answer", "config.json", "eval.max_new"),
  ("bootstrap trials of an interval", "config.json", "eval.trials"),
  ("seed", "eval/summary.json", "seed"),
  ("seeds", "eval/summary.json", "seeds"),
)
THOUGHTS = "rl/thought_", "distill/thought_"  # what metrics of thoughts begin with
PROMPTS = 300  # in the sample browser; the same ones for every arm
ROWS_A_PROMPT = 4  # of one arm
ROLLOUT_STEPS, ROLLOUTS_A_STEP = 40, 8
TEXT_LIMIT = 6000  # characters of one thought, answer or prompt
NOT_RUN = '<p class="absent">not run yet</p>'
TEMPLATE = pathlib.Path(__file__).with_name("report_template.html")

Json = Any  # what json.loads returns


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes WORKDIR/report.html from the artefacts there are, and returns its path.

  A part whose artefact is missing says "not run yet", and a stage where the config asks
  for it. Raises ValueError where WORKDIR is no folder or an artefact cannot be read.
  """
  workdir = buckets.place(workdir)
  if not workdir.is_dir():
    raise ValueError(
      f"the report needs the folder of a run, there is none at {workdir}"
    )
  for stage in STAGES:
    store.check_outputs(workdir / stage)
  try:
    page = _whole(workdir)
  except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise ValueError(
      f"{workdir}: an artefact does not hold what its stage writes ({said}); put it "
      "back from a copy, or do its stage again"
    ) from error
  store.write_bytes(workdir / "report.html", page.encode())
  return workdir / "report.html"


def _whole(workdir: pathlib.Path) -> str:
  """The page of a folder."""
  summary = _read_json(workdir / "eval" / "summary.json")
  config = _read_json(workdir / "config.json")
  manifests = _manifests(workdir, _asked(config))
  probe = _read_json(workdir / "probe.json")
  curves = _curves(workdir / "metrics.jsonl")
  samples, rollouts = _samples(workdir, summary), _rollouts(workdir)
  points = [curve for stage in curves.values() for curve in stage.values()]
  data = {"samples": samples, "rollouts": rollouts, "curves": points}
  name = (config or {}).get("name") or workdir.resolve().name
  return _page(
    title=figures.text(name),
    stages=_stage_strip(manifests),
    results=_results(summary),
    judge=_judge(probe),
    filter=_filter(manifests.get("filter")),
    curves=_curve_figures(curves),
    methods=_methods(manifests, summary, config),
    provenance=_provenance(manifests, config),
    samples_note=_samples_note(samples),
    rollouts_note=_rollouts_note(rollouts),
    data=_script_json(data),
  )


def _page(**parts: str) -> str:
  """The template with its @@names@@ filled in one pass, so parts are never re-read."""
  template = TEMPLATE.read_text(encoding="utf-8")
  [script] = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  parts |= {"script_hash": f"'sha256-{digest}'"}
  return re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], template)


# Reading


def _read_json(path: pathlib.Path) -> Json:
  """The JSON object of a file, or None where there is no file."""
  value = store.read_json(path) if path.is_file() else {}
  if not isinstance(value, dict):
    raise ValueError(f"{path}: wanted a JSON object, got {type(value).__name__}")
  return value if path.is_file() else None


def _asked(config: Json) -> tuple[str, ...]:
  """The stages that a config asks for: but a world's, none trains a base."""
  config = config or {}
  asked = chosen_stages(config.get("stages", "all"))
  optional = {"base": "world.spec", "distill": "distill.start"}
  return tuple(s for s in asked if s not in optional or optional[s] in config)


def _manifests(workdir: pathlib.Path, asked: tuple[str, ...]) -> dict[str, Json]:
  """Manifests of the stages that were run, and None for others that are asked for."""
  found = {s: store.read_manifest(workdir / s / "manifest.json") for s in STAGES}
  return {stage: found[stage] for stage in STAGES if found[stage] or stage in asked}


def _rows(path: pathlib.Path) -> Iterator[dict]:
  """The rows of a JSONL file; none where it is absent."""
  return store.each_row(path) if path.is_file() else iter(())


def _samples(workdir: pathlib.Path, summary: Json) -> Json:
  """Rows for the sample browser: the same prompts for all arms, kept rows as an arm."""
  files = {p.stem: p for p in sorted((workdir / "eval").glob("*.jsonl"))}
  if summary:
    files = {arm: files[arm] for arm in summary.get("arms", {}) if arm in files}
  kept = {"kept by the filter": workdir / "filter" / "kept.jsonl"}
  groups: dict[str, dict] = {}
  total = 0
  for arms in (files, kept):
    strata = {}
    for path in arms.values():
      for row in _rows(path):
        if "prompt_id" not in row:
          raise ValueError(f"{path}: every row needs a prompt_id, got {sorted(row)}")
        strata[row["prompt_id"]] = (row.get("category"), row.get("expected"))
    total += len(strata)
    chosen = _spread(strata, PROMPTS)
    for arm, path in arms.items():
      for row in _rows(path):
        if row["prompt_id"] in chosen:
          _add_row(groups, arm, row)
  arms = [
    arm for arm in (files | kept) if any(arm in g["rows"] for g in groups.values())
  ]
  return {"arms": arms, "prompts": list(groups.values()), "total": total}


def _spread(strata: dict, limit: int) -> set:
  """At most `limit` keys, taken in turn from each stratum, in file order."""
  queues: dict[Any, collections.deque] = collections.defaultdict(collections.deque)
  for key, stratum in strata.items():
    queues[stratum].append(key)
  chosen: set = set()
  while len(chosen) < min(limit, len(strata)):
    for queue in queues.values():
      if queue and len(chosen) < limit:
        chosen.add(queue.popleft())
  return chosen


def _add_row(groups: dict, arm: str, row: dict) -> None:
  prompt, more = _clip({"prompt": row.get("prompt")})
  about = {name: str(row.get(name) or "") for name in ("category", "expected", "kind")}
  new = {"id": str(row["prompt_id"])} | prompt | about | {"more": more, "rows": {}}
  group = groups.setdefault(str(row["prompt_id"]), new)
  rows = group["rows"].setdefault(arm, [])
  if len(rows) >= ROWS_A_PROMPT:
    return
  texts, more = _clip({name: row.get(name) for name in ("thought", "answer")})
  scores = dict(row.get("scores") or {})
  if "score" in row:
    scores["score"] = row["score"]
  marks = {name: list(map(str, row.get(name) or ())) for name in ("cited", "invented")}
  ends = {name: str(row.get(name) or "") for name in ("malformed", "finish")}
  unscored = {name: str(why) for name, why in (row.get("unscored") or {}).items()}
  found = {"scores": scores, "unscored": unscored, "outcome": _outcome(row)}
  rows.append(texts | marks | ends | found | {"more": more})


def _outcome(row: dict) -> str:
  """Whether a row did what was expected of it, as far as its artefact says."""
  scores = row.get("scores") or {}
  for name in DECIDED:
    if figures.finite(scores.get(name)):
      return "right" if scores[name] >= 0.5 else "wrong"
  return "unscored" if row.get("unscored") else ""


def _rollouts(workdir: pathlib.Path) -> Json:
  """The first few rollouts of steps spread evenly over training."""
  path = workdir / "rl" / "rollouts.jsonl"
  found = (row.get("step") for row in _rows(path))
  steps = sorted({step for step in found if figures.finite(step)})
  count = min(len(steps), ROLLOUT_STEPS)
  chosen = {
    steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)
  }
  kept: dict[Any, list[dict]] = {step: [] for step in sorted(chosen)}
  for row in _rows(path):
    rows = kept.get(row.get("step"))
    if rows is None or len(rows) >= ROLLOUTS_A_STEP:
      continue
    texts, more = _clip(
      {name: row.get(name) for name in ("prompt", "thought", "answer")}
    )
    numbers = {name: row.get(name) for name in ("reward", "advantage")}
    rows.append(
      texts | numbers | {"category": str(row.get("category") or ""), "more": more}
    )
  return {"steps": list(kept), "rows": list(kept.values()), "total": len(steps)}


def _clip(texts: dict) -> tuple[dict, dict]:
  """Texts of at most TEXT_LIMIT characters, and how many more each of them had."""
  texts = {n: t if isinstance(t, str) else figures.plain(t) for n, t in texts.items()}
  more = {n: len(t) - TEXT_LIMIT for n, t in texts.items() if len(t) > TEXT_LIMIT}
  return {n: t[:TEXT_LIMIT] for n, t in texts.items()}, more


def _curves(path: pathlib.Path) -> dict[str, dict[str, dict]]:
  """heading -> metric -> points; of a step that was run twice the later row counts."""
  series: dict[str, dict[str, dict]] = collections.defaultdict(
    lambda: collections.defaultdict(dict)
  )
  for row in _rows(path):
    stage = str(row.get("stage", ""))
    if not figures.finite(row.get("step")):
      continue
    for name, value in row.items():
      number = value is None or isinstance(value, int | float)
      if name in ("time", "stage", "step") or not number:
        continue
      heading = f"{stage}: thoughts" if name.startswith(THOUGHTS) else stage
      series[heading][name][row["step"]] = value
  return {
    heading: {name: figures.thin(points) for name, points in sorted(metrics.items())}
    for heading, metrics in series.items()
  }


# Text and numbers


def _script_json(value: Json) -> str:
  """ASCII JSON that no HTML parser can leave: no <, >, & and no NaN."""
  dumped = json.dumps(_clean(value), ensure_ascii=True, allow_nan=False)
  for char in "<>&":
    dumped = dumped.replace(char, f"\\u{ord(char):04x}")
  return dumped


def _clean(value: Json) -> Json:
  """NaN as null, and lone surrogates, which no page can hold, as replacement marks."""
  if isinstance(value, dict):
    return {_clean(str(k)): _clean(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_clean(v) for v in value]
  if isinstance(value, str):
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _moment(value: Json) -> str:
  """A time stamp as text: seconds since 1970 as UTC, texts as they are."""
  if not figures.finite(value):
    return figures.plain(value) or "–"
  moment = datetime.datetime.fromtimestamp(value, datetime.UTC)
  return f"{moment:%Y-%m-%d %H:%M} UTC"


# Sections


def _stage_strip(manifests: dict) -> str:
  items = []
  for stage, manifest in manifests.items():
    done = figures.duration(manifest.get("wall_s")) if manifest else "not run yet"
    items.append(f'<li class="{"done" if manifest else ""}"><b>{stage}</b> {done}</li>')
  return f'<ol class="stages">{"".join(items)}</ol>'


def _results(summary: Json) -> str:
  """The arms' tables, and drawings of what they say."""
  if not summary or not summary.get("arms"):
    return NOT_RUN
  arms, sets = _checked(summary["arms"]), summary.get("sets") or {}
  definitions = summary.get("definitions") or {}
  groups = _metric_groups({name: None for arm in arms.values() for name in arm}, sets)
  own = [
    f"<h3>{figures.text(title)}</h3>{_arms_table(title, names, arms, definitions)}"
    for title, names in groups
    if title not in sets
  ]
  further = [
    f"<details><summary>{figures.text(title)}</summary>"
    f"{_arms_table(title, names, arms, definitions)}</details>"
    for title, names in groups
    if title in sets
  ]
  return "".join(
    [
      _thin("held-out prompts", summary.get("thin") or []),
      *own[:1],
      _graders(summary.get("graders")),
      figures.plane(arms, (summary.get("curves") or {}).get("held out")),
      _curves_table(summary.get("curves") or {}),
      _differences(summary.get("differences") or {}),
      _by_category(summary.get("categories") or {}),
      *(_by_set(arms, sets), figures.scaling(arms), *own[1:]),
      *(["<h3>Every metric of each further set</h3>"] if further else []),
      *further,
    ]
  )


def _curves_table(curves: dict) -> str:
  """How well each arm's odds of declining tell prompts apart, in each set."""
  arms = [*dict.fromkeys(arm for of_set in curves.values() for arm in of_set)]
  if not arms:
    return ""
  rows = [
    [
      figures.text(name),
      *(
        figures.estimate({"mean": c["auc"]} | c) if (c := own.get(a)) else ""
        for a in arms
      ),
    ]
    for name, own in curves.items()
    if own
  ]
  missed = ", ".join(
    f"{figures.text(arm)} {own['calibration_error']:.2f}"
    for arm, own in (curves.get("held out") or {}).items()
  )
  return (
    "<h3>Operating curves</h3><p>The area under each arm's curve: how often the odds "
    "of opening with a refusal, after the arm's own thought, are higher for a prompt "
    "to be refused than for one to be answered. Their expected calibration error on "
    f"the held-out prompts: {missed}.</p>"
    + figures.table("area under the curve", ["set", *map(figures.text, arms)], rows)
  )


def _differences(differences: dict) -> str:
  """Arms less others on the same prompts, in the metrics of the first table."""
  names = [n for n in CORE if any(n in own for own in differences.values())]
  rows = [
    [figures.text(pair), *(figures.estimate(own.get(name)) for name in names)]
    for pair, own in differences.items()
  ]
  if not rows:
    return ""
  head = ["difference", *map(figures.text, names)]
  table = figures.table("differences between arms, paired", head, rows)
  return (
    f"<details><summary>Differences between any two arms</summary>{table}</details>"
  )


def _graders(graders: Json) -> str:
  """How far the graders of several agree."""
  if not graders:
    return ""
  head = ["graders", "Cohen's kappa", "agree on"]
  rows = []
  for pair, cell in graders.items():
    ends = (cell.get("low"), cell.get("high"))
    kappa = f"{cell['kappa']:.2f}" if figures.finite(cell.get("kappa")) else "–"
    if all(map(figures.finite, ends)):
      kappa += f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    raw = {"mean": cell["raw"], "low": cell["raw_low"], "high": cell["raw_high"]}
    raw |= {"n": cell["n"], "unscored": cell["unscored"]}
    rows.append([figures.text(pair), kappa, figures.estimate(raw)])
  return f"<h3>Graders</h3>{figures.table('Graders', head, rows)}"


def _checked(arms: dict) -> dict:
  for arm, metrics in arms.items():
    for metric, cell in metrics.items():
      if not isinstance(cell, dict) or "mean" not in cell:
        raise ValueError(
          f"eval/summary.json: {arm}.{metric} needs mean, low, high, n and unscored, "
          f"got {cell!r}; run the eval stage again"
        )
  return arms


def _arms_table(title: str, names: list[str], arms: dict, definitions: dict) -> str:
  head = ["arm"] + [
    f'<abbr title="{figures.text(definitions.get(n, ""))}">'
    f"{figures.text(n).replace('_', '_<wbr>')}</abbr>"
    for n in names
  ]
  rows = [
    [figures.text(arm), *(figures.estimate(cells.get(n)) for n in names)]
    for arm, cells in arms.items()
  ]
  return figures.table(title, head, rows, "arms")


def _metric_groups(metrics: dict, sets: dict) -> list[tuple[str, list[str]]]:
  """The core metrics, then one group for each further set, and for each first word of
  the other names."""
  core = [name for name in CORE if name in metrics]
  groups = collections.defaultdict(list)
  for name in metrics:
    if name not in core:
      of = [one for one in sets if name.startswith(f"{one}_")]
      groups[max(of, key=len, default=re.split(r"[_/.]", name)[0])].append(name)
  single = [
    n
    for head, names in groups.items()
    if head not in sets and len(names) == 1
    for n in names
  ]
  shared = [(head, names) for head, names in groups.items() if names[0] not in single]
  groups = [("Arms", core), *shared, ("Other metrics", single)]
  return [(title, names) for title, names in groups if names]


def _by_category(categories: dict) -> str:
  """A map for each metric that the summary has by category: categories by arms."""
  maps = []
  for metric in DECIDED:
    cells = {
      (category, arm): found[metric]
      for arm, of_arm in categories.items()
      for category, found in of_arm.items()
      if metric in found
    }
    names = sorted({category for category, _ in cells})
    head = ["category", *map(figures.text, categories)]
    rows = [
      [figures.text(name)]
      + [figures.shaded(cells.get((name, arm))) for arm in categories]
      for name in names
    ]
    if rows:
      table = figures.table(f"{metric} by category", head, rows, "heat")
      maps.append(f"<div><h4>{metric}</h4>{table}</div>")
  if not maps:
    return ""
  return (
    "<h3>By category of the policy</h3><p>Means over the held-out prompts of each "
    "category; the stronger the colour, the higher.</p>"
    f'<div class="maps">{"".join(maps)}</div>'
  )


def _by_set(arms: dict, sets: dict) -> str:
  """Refusal of what is disallowed in each further set, drawn and as a table."""
  metric = "refuse_disallowed"
  found = {
    name: {arm: cells.get(f"{name}_{metric}") for arm, cells in arms.items()}
    for name in sets
  }
  found = {name: cells for name, cells in found.items() if any(cells.values())}
  if not found:
    return ""
  held_out = {arm: cells.get(metric) for arm, cells in arms.items()}
  rows = [
    [figures.text(name), *map(figures.estimate, cells.values())]
    for name, cells in [("held out", held_out), *found.items()]
  ]
  head = ["set", *map(figures.text, arms)]
  drawn = figures.by_set({"held out": held_out} | found, [*arms], metric)
  return (
    "<h3>Refusal of what is disallowed, by set and disguise</h3>"
    f'<figure class="bysets">{drawn}'
    "<figcaption>Marks are means, lines their intervals, as in the table. What each "
    'set is stands in the <a href="#methods">methods</a>.</figcaption></figure>'
    + figures.table(f"{metric} by set", head, rows, "sets")
  )


TRIED = (("passed", "breaks"), ("failed", "keeps"))  # of probe.json's rules


def _judge(probe: Json) -> str:
  """What the judge of RL made of probes, and of answers that are known."""
  if not probe:
    return NOT_RUN
  rows = []
  for name, row in (probe.get("probes") or {}).items():
    low, high = row.get("false_positive_rate"), row.get("false_negative_rate")
    rates = {"low": low, "not low": high}
    should = next((s for s, rate in rates.items() if rate is not None), "–")
    ends = dict(zip(("low", "high"), row.get("interval") or (), strict=False))
    wrong = {"mean": rates.get(should), "n": row.get("n")} | ends
    wrong |= {"unscored": row.get("unscored")}
    rows.append([figures.text(name), should, figures.estimate(wrong)])
  head = ["probe", "should score", "judged wrong"]
  said = f"<p>The reward that was probed: {figures.text(probe.get('reward'))}.</p>"
  table = figures.table("Probes of the judge", head, rows, "probes")
  rules = _rules(probe.get("rules") or {})
  return said + table + rules + _agreement(probe.get("agreement") or {})


def _rules(found: dict) -> str:
  """By clause, what breaks it and was passed, and what keeps it and was failed; and the
  policies of which nothing says whether the judge knows them."""
  rows, without = [], []
  for policy, clauses in found.items():
    if not any(row.get("breaks") for row in clauses.values()):
      without.append(policy)
      continue
    for clause, row in clauses.items():
      cells = (f"{row.get(a)} of {row.get(b)}" for a, b in TRIED)
      rows.append([figures.text(x) for x in (clause, *cells, row.get("unscored"))])
  title, said = "What breaks a clause, and what keeps it", ""
  if rows:
    head = ["clause", "passed, of what breaks it", "failed, of what keeps it"]
    said = f"<h3>{title}</h3>" + figures.table(title, [*head, "unscored"], rows)
  if without:
    said += (
      f"<p>{figures.text(', '.join(without))}: no probes of its own, and so nothing "
      "that says whether the judge knows these rules.</p>"
    )
  return said


def _agreement(found: dict) -> str:
  if not figures.finite(found.get("kappa")):
    return "<p>There were no answers known to be right and wrong to compare with.</p>"
  ends = ", ".join(map(figures.number, found.get("interval") or ()))
  accuracy = {"mean": found.get("accuracy"), "n": found.get("n")}
  accuracy |= {"unscored": found.get("unscored")}
  rows = [
    ["says the same", figures.estimate(accuracy)],
    ["Cohen's kappa", f"<b>{figures.number(found['kappa'])}</b> [{ends}]"],
  ]
  title = "Against answers that are known to be right or wrong"
  return f"<h3>{title}</h3>" + figures.table(title, ["measure", "value"], rows)


def _filter(manifest: Json) -> str:
  """What the filter kept of each category, and why it dropped the rest."""
  if not manifest:
    return NOT_RUN
  summary = manifest.get("summary") or {}
  rows = [
    [figures.text(category), figures.text(expected)]
    + [figures.number(counts.get(name)) for name in ("prompts", "samples", "kept")]
    + [figures.share_bar(counts.get("kept"), counts.get("samples"))]
    for category, by_expected in (summary.get("keep_rates") or {}).items()
    for expected, counts in by_expected.items()
  ]
  head = ["category", "expected", "prompts", "samples", "kept", "kept of samples"]
  table = "<p>No keep rates were recorded.</p>"
  if rows:
    table = figures.table("Kept by category", head, rows, "counts")
  none = [f"0 of {what}" for what in summary.get("kept_none_of") or ()]
  table = _thin("kept", summary.get("thin") or none) + table
  reasons = sorted((summary.get("reasons") or {}).items(), key=lambda r: -r[1])
  most = reasons[0][1] if reasons else 0
  rows = [
    [figures.text(n), figures.number(count), figures.share_bar(count, most, "")]
    for n, count in reasons
  ]
  if not rows:
    return table
  title = "Why samples were dropped"
  head = ["reason", "samples", "of the commonest"]
  return f"{table}<h3>{title}</h3>" + figures.table(title, head, rows, "counts")


def _thin(what: str, found: list) -> str:
  """What there is too little of to go by."""
  if not found:
    return ""
  return (
    f'<p class="thin">Too little to go by: {what} {figures.text(", ".join(found))}.</p>'
  )


def _curve_figures(curves: dict) -> str:
  """Small multiples of every metric, grouped by stage."""
  if not curves:
    return NOT_RUN
  parts, number = [], 0
  for heading, metrics in curves.items():
    stage, drawn = heading.partition(":")[0], []
    for name, curve in metrics.items():
      drawn.append(figures.curve(name.removeprefix(f"{stage}/"), curve, number))
      number += 1
    parts.append(
      f'<h3>{figures.text(heading)}</h3><div class="multiples">{"".join(drawn)}</div>'
    )
  return "".join(parts)


def _methods(manifests: dict, summary: Json, config: Json) -> str:
  """What each number means, and what it was made with."""
  summary = summary or {}
  versions = summary.get("versions") or {}
  metrics = [
    [figures.text(name), figures.text(versions.get(name)), figures.text(said)]
    for name, said in (summary.get("definitions") or {}).items()
  ]
  sets = [[*map(figures.text, one)] for one in (summary.get("sets") or {}).items()]
  stages = {
    f"{s}/manifest.json": (m or {}).get("summary") for s, m in manifests.items()
  }
  files = stages | {"config.json": config, "eval/summary.json": summary}
  settings = [
    [said, f"{file}: {key}", figures.text(value)]
    for said, file, key in SETTINGS
    if (value := (files.get(file) or {}).get(key)) not in (None, "", [], {})
  ]
  inputs = [
    [stage, figures.text(path), figures.text(digest)]
    for stage, manifest in manifests.items()
    for path, digest in ((manifest or {}).get("inputs") or {}).items()
  ]
  over = (
    "Student's over seeds"
    if "seeds" in summary
    else ("bootstrapped over prompts, and Jeffreys' where all prompts say the same")
  )
  parts = (
    ("What the metrics mean", ["metric", "version", "definition"], metrics),
    ("What the further sets are", ["set", "what it is"], sets),
    ("Data, judges and sampling", ["what", "where it stands", "value"], settings),
    ("What the stages read", ["stage", "file", "SHA-256"], inputs),
  )
  if not any(rows for _, _, rows in parts):
    return NOT_RUN
  return (
    f"<p>Intervals of arms are of 95%, {over}; those of probes are Wilson's, that of "
    "kappa is bootstrapped. Evaluation reads answers by rules of its own (grader.py; "
    "in the policy world, whose truth is known, by that), in the versions below. "
    "Answers without a score are counted as such, and in no mean.</p>"
  ) + "".join(
    f"<h3>{title}</h3>{figures.table(title, head, rows, 'said')}"
    for title, head, rows in parts
    if rows
  )


def _provenance(manifests: dict, config: Json) -> str:
  """Where the numbers come from: each stage's manifest and the config."""
  names = ("finished", "wall", "device", "seed", "code version", "config hash")
  rows, details = [], []
  for stage, manifest in manifests.items():
    if not manifest:
      rows.append([stage, NOT_RUN, *[""] * (len(names) - 1)])
      continue
    rows.append(
      [
        stage,
        figures.text(_moment(manifest.get("finished"))),
        figures.duration(manifest.get("wall_s")),
      ]
      + [
        figures.text(manifest.get(n))
        for n in ("device", "seed", "code_version", "config_hash")
      ]
    )
    shown = {
      k: v
      for k, v in (manifest.get("summary") or {}).items()
      if k not in ("keep_rates", "reasons")
    }
    shown |= {
      "started": _moment(manifest.get("started")),
      "format_version": manifest.get("format_version"),
    }
    pairs = figures.pairs(shown)
    details.append(f"<details><summary>{stage}</summary>{pairs}</details>")
  warning = ""
  if len({m.get("code_version") for m in manifests.values() if m}) > 1:
    warning = (
      '<p class="warn">The stages were run by different versions of the code.</p>'
    )
  pretty = NOT_RUN
  if config:
    pretty = figures.text(json.dumps(config, indent=2, ensure_ascii=False))
    pretty = f'<pre tabindex="0">{pretty}</pre>'
  details.append(f"<details><summary>config.json</summary>{pretty}</details>")
  stamps = figures.table("Stages", ["stage", *names], rows, "stamps")
  return warning + stamps + "".join(details)


def _samples_note(samples: Json) -> str:
  if not samples["prompts"]:
    return NOT_RUN
  shown, total = len(samples["prompts"]), samples["total"]
  said = f"{shown:,} of {total:,} prompts, taken evenly from every category"
  said = f"All {total:,} prompts" if shown == total else said
  return f"<p>{said}, and at most {ROWS_A_PROMPT} replies of an arm to each.</p>"


def _rollouts_note(rollouts: Json) -> str:
  if not rollouts["steps"]:
    return NOT_RUN
  shown, total = len(rollouts["steps"]), rollouts["total"]
  return (
    f"<p>{shown:,} of {total:,} steps with recorded rollouts, at most "
    f"{ROLLOUTS_A_STEP} rollouts of each.</p>"
  )
