"""Artefacts -> report.html: tables, plots and sample browsers in one file.

Works out places on the page and no statistics: the numbers stand in the artefacts.
Knows the names and fields of files, not models, judges or stages. Model text is
hostile and stays text: it is escaped here, reaches the page as JSON in a script that
is never run, is shown through `textContent` alone, and a content security policy lets
only the template's own script run. The page asks no network for anything.
"""

import base64
import collections
from collections.abc import Iterator
import datetime
import hashlib
import html
import json
import math
import pathlib
import re
from typing import Any

STAGES = ("generate", "filter", "sft", "reward", "rl", "eval")
CORE = (  # the columns of the first table, in this order; other metrics follow it
  "refuse_disallowed",
  "comply_allowed",
  "balanced_accuracy",
  "style",
  "policy_retrieval",
  "think_format",
  "capability",
  "truncated",
)
PROMPTS = 300  # in the sample browser; the same ones for every arm
ROWS_A_PROMPT = 4  # of one arm
ROLLOUT_STEPS, ROLLOUTS_A_STEP = 40, 8
TEXT_LIMIT = 6000  # characters of one thought, answer or prompt
CURVE_POINTS = 240
NOT_RUN = '<p class="absent">not run yet</p>'
CONTROLS = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {127: 0x2421}
TEMPLATE = pathlib.Path(__file__).with_name("report_template.html")

Json = Any  # what json.loads returns


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes WORKDIR/report.html from the artefacts there are, and returns its path.

  A part whose artefact is missing says "not run yet". Raises ValueError where WORKDIR
  is no folder or an artefact cannot be read.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise ValueError(
      f"the report needs the folder of a run, there is none at {workdir}"
    )
  summary = _read_json(workdir / "eval" / "summary.json")
  manifests = {s: _read_json(workdir / s / "manifest.json") for s in STAGES}
  config = _read_json(workdir / "config.json")
  curves = _curves(workdir / "metrics.jsonl")
  samples, rollouts = _samples(workdir, summary), _rollouts(workdir)
  points = [curve for stage in curves.values() for curve in stage.values()]
  data = {"samples": samples, "rollouts": rollouts, "curves": points}
  name = (config or {}).get("name") or workdir.resolve().name
  page = _page(
    title=_text(name),
    stages=_stage_strip(manifests),
    results=_results(summary),
    filter=_filter(manifests["filter"]),
    curves=_curve_figures(curves),
    provenance=_provenance(manifests, summary, config),
    samples_note=_samples_note(samples),
    rollouts_note=_rollouts_note(rollouts),
    data=_script_json(data),
  )
  path = workdir / "report.html"
  part = workdir / "report.html.part"
  part.write_text(page, encoding="utf-8", newline="\n")
  part.replace(path)
  return path


def _page(**parts: str) -> str:
  """The template with its @@names@@ filled in one pass, so parts are never re-read."""
  template = TEMPLATE.read_text(encoding="utf-8")
  script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  parts |= {"script_hash": f"'sha256-{digest}'"}
  return re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], template)


# Reading


def _read_json(path: pathlib.Path) -> Json:
  """The JSON object of a file, or None where there is no file."""
  if not path.is_file():
    return None
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path} should hold JSON: {error}; run its stage again"
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} should hold a JSON object, got {type(value).__name__}")
  return value


def _rows(path: pathlib.Path) -> Iterator[dict]:
  """The objects of a JSONL file; none where it is absent.

  A last line without its line end is one that a run was stopped in: it is left out.
  """
  if not path.is_file():
    return
  with path.open(encoding="utf-8", newline="\n") as lines:
    for number, line in enumerate(lines, 1):
      try:
        row = json.loads(line) if line.strip() else None
      except ValueError as error:
        if not line.endswith("\n"):
          return
        raise ValueError(f"{path}, line {number} should be JSON: {error}") from error
      if row is not None and not isinstance(row, dict):
        raise ValueError(
          f"{path}, line {number} should be an object, got {line[:80]!r}"
        )
      if row is not None:
        yield row


def _samples(workdir: pathlib.Path, summary: Json) -> Json:
  """Rows for the sample browser: the same prompts for all arms, kept rows as an arm."""
  files = {p.stem: p for p in sorted((workdir / "eval").glob("*.jsonl"))}
  if summary:
    files = {arm: files[arm] for arm in summary.get("arms", {}) if arm in files}
  kept = {"kept by the filter": workdir / "filter" / "kept.jsonl"}
  groups, total = {}, 0
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
  queues = collections.defaultdict(collections.deque)
  for key, stratum in strata.items():
    queues[stratum].append(key)
  chosen = set()
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
  rows.append(texts | marks | ends | {"scores": scores, "more": more})


def _rollouts(workdir: pathlib.Path) -> Json:
  """The first few rollouts of steps spread evenly over training."""
  path = workdir / "rl" / "rollouts.jsonl"
  steps = sorted({row["step"] for row in _rows(path) if _finite(row.get("step"))})
  count = min(len(steps), ROLLOUT_STEPS)
  chosen = {
    steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)
  }
  kept = {step: [] for step in sorted(chosen)}
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
  texts = {n: t if isinstance(t, str) else _plain(t) for n, t in texts.items()}
  more = {n: len(t) - TEXT_LIMIT for n, t in texts.items() if len(t) > TEXT_LIMIT}
  return {n: t[:TEXT_LIMIT] for n, t in texts.items()}, more


def _curves(path: pathlib.Path) -> dict[str, dict[str, dict]]:
  """stage -> metric -> points; of a step that was run twice the later row counts."""
  series = collections.defaultdict(lambda: collections.defaultdict(dict))
  for row in _rows(path):
    for name, value in row.items():
      number = value is None or isinstance(value, int | float)
      if name not in ("time", "stage", "step") and number and _finite(row.get("step")):
        series[str(row.get("stage", ""))][name][row["step"]] = value
  return {
    stage: {name: _thin(points) for name, points in sorted(metrics.items())}
    for stage, metrics in series.items()
  }


def _thin(points: dict) -> dict:
  """At most CURVE_POINTS points: the lowest and the highest of each stretch of steps.

  "x" and "y" are finite, "bad" are the other steps, "ends" the first and the last step.
  """
  good = sorted((s, float(v)) for s, v in points.items() if _finite(v))
  bad = sorted(s for s, v in points.items() if not _finite(v))
  last = good[-1][1] if good else None
  if len(good) > CURVE_POINTS:
    width = math.ceil(2 * len(good) / CURVE_POINTS)
    parts = [good[i : i + width] for i in range(0, len(good), width)]
    ends = [{min(p, key=lambda q: q[1]), max(p, key=lambda q: q[1])} for p in parts]
    good = sorted(set().union(*ends, {good[0], good[-1]}))
  x, y = [s for s, _ in good], [v for _, v in good]
  ends = [min(x + bad), max(x + bad)]
  return {"x": x, "y": y, "bad": bad, "ends": ends, "last": last}


# Text and numbers


def _text(value: Json) -> str:
  """HTML of a text: escaped, control characters as pictures, no lone surrogates."""
  plain = _plain(value).encode("utf-8", "replace").decode()
  return html.escape(plain.translate(CONTROLS))


def _plain(value: Json) -> str:
  """A JSON value as people read it."""
  if value is None:
    return ""
  if isinstance(value, dict):
    return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
  if isinstance(value, list | tuple):
    return ", ".join(map(_plain, value))
  if isinstance(value, float):
    return f"{value:.4g}"
  return str(value)


def _finite(value: Json) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


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


def _number(value: Json) -> str:
  """A number with its exact value in the markup; an en dash where there is none."""
  if not _finite(value) or isinstance(value, bool):
    return "–" if value is None else _text(value)
  shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
  return f'<data value="{value!r}">{shown}</data>'


def _duration(seconds: Json) -> str:
  if not _finite(seconds):
    return "–"
  minutes, rest = divmod(int(seconds), 60)
  shown = f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
  if minutes >= 60:
    shown = f"{minutes // 60} h {minutes % 60} min"
  return f'<data value="{seconds!r}">{shown}</data>'


def _moment(value: Json) -> str:
  """A time stamp as text: seconds since 1970 as UTC, texts as they are."""
  if not _finite(value):
    return _plain(value) or "–"
  moment = datetime.datetime.fromtimestamp(value, datetime.UTC)
  return f"{moment:%Y-%m-%d %H:%M} UTC"


def _table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
  """A table of HTML cells whose first column names the row."""
  top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
  body = "".join(
    f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'
    for first, *cells in rows
  )
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="by {head[0]}">'
    f'<table class="{kind}"><thead><tr>{top}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def _pairs(values: dict) -> str:
  """A nested dict as a definition list with dotted names."""
  items = "".join(
    f"<div><dt>{_text(k)}</dt><dd>{_number(v) if _finite(v) else _text(v)}</dd></div>"
    for k, v in _flat(values)
  )
  return f'<dl class="pairs">{items}</dl>'


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, Json]]:
  for name, value in values.items():
    if isinstance(value, dict) and value:
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


# Sections


def _stage_strip(manifests: dict) -> str:
  items = []
  for stage, manifest in manifests.items():
    done = _duration(manifest.get("wall_s")) if manifest else "not run yet"
    items.append(f'<li class="{"done" if manifest else ""}"><b>{stage}</b> {done}</li>')
  return f'<ol class="stages">{"".join(items)}</ol>'


def _results(summary: Json) -> str:
  """The arms' tables, the two kinds of error as a plane, and what the metrics mean."""
  if not summary or not summary.get("arms"):
    return NOT_RUN
  arms = summary["arms"]
  metrics = {name: None for arm in arms.values() for name in arm}
  definitions = summary.get("definitions") or {}
  tables = []
  for title, names in _metric_groups(metrics):
    head = ["arm"] + [
      f'<abbr title="{_text(definitions.get(n, ""))}">'
      f"{_text(n).replace('_', '_<wbr>')}</abbr>"
      for n in names
    ]
    rows = [
      [_text(arm)] + [_cell(arm, n, arms[arm].get(n)) for n in names] for arm in arms
    ]
    tables.append(f"<h3>{_text(title)}</h3>{_table(head, rows, 'arms')}")
  words = _words("What the metrics mean", definitions)
  sets = _words("What the further sets are", summary.get("sets") or {})
  return "".join([*tables[:1], _plane(arms), _scaling(arms), *tables[1:], sets, words])


def _words(title: str, said: dict[str, str]) -> str:
  """A list of names and what they mean, if there are any."""
  items = "".join(
    f"<div><dt>{_text(n)}</dt><dd>{_text(t)}</dd></div>" for n, t in said.items()
  )
  return f'<h3>{_text(title)}</h3><dl class="words">{items}</dl>' if items else ""


def _metric_groups(metrics: dict) -> list[tuple[str, list[str]]]:
  """The core metrics, then one group for each first word of the other names."""
  core = [name for name in CORE if name in metrics]
  groups = collections.defaultdict(list)
  for name in metrics:
    if name not in core:
      groups[re.split(r"[_/.]", name)[0]].append(name)
  single = [n for names in groups.values() for n in names if len(names) == 1]
  shared = [(head, names) for head, names in groups.items() if len(names) > 1]
  groups = [("Arms", core), *shared, ("Other metrics", single)]
  return [(title, names) for title, names in groups if names]


def _cell(arm: str, metric: str, cell: Json) -> str:
  """One estimate as "63.2% [58.1, 68.0] n=120", over a bar of its interval."""
  if cell is None:
    return "–"
  if not isinstance(cell, dict) or "mean" not in cell:
    raise ValueError(
      f"eval/summary.json: {arm}.{metric} needs mean, low, high, n and unscored, "
      f"got {cell!r}; run the eval stage again"
    )
  mean, low, high = (cell.get(name) for name in ("mean", "low", "high"))
  ends = all(map(_finite, (low, high)))
  rate = all(0 <= v <= 1 for v in (mean, low, high) if _finite(v))
  scale = (lambda v: f"{100 * v:.1f}") if rate else (lambda v: f"{v:.4g}")

  def data(value):
    return f'<data value="{value!r}">{scale(value)}</data>'

  shown = f"<b>{data(mean)}{'%' if rate else ''}</b>" if _finite(mean) else "<b>–</b>"
  if ends:
    shown += f' <span class="interval">[{data(low)}, {data(high)}]</span>'
  shown += f" <small>n={_number(cell.get('n'))}</small>"
  if cell.get("unscored"):
    shown += f' <small class="warn">{_number(cell["unscored"])} unscored</small>'
  return shown + (
    _interval_bar(mean, low, high) if rate and ends and _finite(mean) else ""
  )


def _interval_bar(mean: float, low: float, high: float) -> str:
  return (
    '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" '
    'aria-hidden="true"><rect class="track" width="100" height="6"/>'
    f'<rect class="range" x="{100 * low:.1f}" width="{100 * (high - low):.1f}" '
    f'height="6"/><rect class="mean" x="{98.5 * mean:.1f}" width="1.5" height="6"/>'
    "</svg>"
  )


def _plane(arms: dict) -> str:
  """Refusal against over-refusal: each arm a point with its intervals as whiskers."""
  pairs = {
    a: (m.get("comply_allowed"), m.get("refuse_disallowed")) for a, m in arms.items()
  }
  pairs = {
    arm: tuple([cell.get(k) for k in ("mean", "low", "high")] for cell in pair)
    for arm, pair in pairs.items()
    if all(cell and _finite(cell.get("mean")) for cell in pair)
  }
  if not pairs:
    return ""
  x, y = (lambda v: 60 + 400 * v), (lambda v: 420 - 400 * v)
  parts = [_plane_frame(x, y)]
  taken = [(x(p[0][0]) - 7, y(p[1][0]) - 7, 14, 14) for p in pairs.values()]
  for number, (arm, ((cx, *xs), (cy, *ys))) in enumerate(pairs.items()):
    lines = ""
    if all(map(_finite, xs)):
      lines += f'<path d="M{x(xs[0]):.1f} {y(cy):.1f}H{x(xs[1]):.1f}"/>'
    if all(map(_finite, ys)):
      lines += f'<path d="M{x(cx):.1f} {y(ys[0]):.1f}V{y(ys[1]):.1f}"/>'
    label = arm if len(arm) <= 24 else arm[:23] + "…"
    left, top = _free_place(x(cx), y(cy), 7.4 * len(label), taken)
    parts.append(
      f'<g class="arm c{number % 8}">{lines}'
      f'<circle cx="{x(cx):.1f}" cy="{y(cy):.1f}" r="5"/>'
      f'<text x="{left:.1f}" y="{top + 12:.1f}">{_text(label)}</text>'
      f"<title>{_text(arm)}: complies with {100 * cx:.1f}% of what is allowed, "
      f"refuses {100 * cy:.1f}% of what is not</title></g>"
    )
  return (
    '<figure class="plane"><svg viewBox="0 0 480 470" role="img" aria-label="Refusal '
    'of disallowed prompts against compliance with allowed ones, one point an arm">'
    f"{''.join(parts)}</svg><figcaption>Up: refuses more of what is disallowed. "
    "Right: complies with more of what is allowed. Whiskers are the intervals of the "
    "table. On the dashed line a model answers without regard to what is asked."
    "</figcaption></figure>"
  )


def _plane_frame(x, y) -> str:
  grid = "".join(
    f'<path class="grid" d="M{x(v)} {y(0)}V{y(1)}M{x(0)} {y(v)}H{x(1)}"/>'
    f'<text x="{x(v)}" y="{y(0) + 18}" text-anchor="middle">{100 * v:.0f}%</text>'
    f'<text x="{x(0) - 8}" y="{y(v) + 4}" text-anchor="end">{100 * v:.0f}%</text>'
    for v in (0, 0.25, 0.5, 0.75, 1)
  )
  return (
    f'{grid}<path class="blind" d="M{x(0)} {y(1)}L{x(1)} {y(0)}"/>'
    f'<text class="axis" x="{x(0.5)}" y="460" text-anchor="middle">'
    "comply_allowed</text>"
    f'<text class="axis" transform="translate(14 {y(0.5)}) rotate(-90)" '
    'text-anchor="middle">refuse_disallowed</text>'
    f'<text class="corner" x="{x(0) + 24}" y="{y(1) + 15}">refuses everything</text>'
    f'<text class="corner" x="{x(1) - 24}" y="{y(0) - 7}" text-anchor="end">'
    "answers everything</text>"
  )


def _scaling(arms: dict) -> str:
  """What is right against the tokens that a thought may have, a line for each arm that
  was measured so."""
  found = collections.defaultdict(dict)  # arm -> budget, or inf -> mean
  for arm, metrics in arms.items():
    for name, cell in metrics.items():
      budget = re.fullmatch(r"thought_(\d+)_verdict", name)
      if budget and _finite(cell.get("mean")):
        found[arm][int(budget[1])] = cell["mean"]
    if arm in found and _finite(metrics.get("verdict", {}).get("mean")):
      found[arm][math.inf] = metrics["verdict"]["mean"]
  if not found:
    return ""
  budgets = sorted({budget for line in found.values() for budget in line})
  across = {budget: 60 + 400 * i / len(budgets) for i, budget in enumerate(budgets)}
  ticks = "".join(
    f'<path class="grid" d="M{x:.1f} 20V420"/><text x="{x:.1f}" y="438" '
    f'text-anchor="middle">{"all" if b == math.inf else b}</text>'
    for b, x in across.items()
  ) + "".join(
    f'<path class="grid" d="M60 {420 - 4 * v}H460"/><text x="54" y="{424 - 4 * v}" '
    f'text-anchor="end">{v}%</text>'
    for v in (0, 25, 50, 75, 100)
  )
  parts, taken = [], []
  for arm, line in found.items():
    dots = [(across[budget], 420 - 400 * line[budget]) for budget in sorted(line)]
    left, top = _free_place(*dots[-1], 7.4 * len(arm), taken)
    parts.append(
      f'<g class="arm c{[*arms].index(arm) % 8}">'
      f'<path fill="none" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in dots)}"/>'
      + "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in dots)
      + f'<text x="{left:.1f}" y="{top + 12:.1f}">{_text(arm)}</text></g>'
    )
  return (
    '<figure class="plane scaling"><svg viewBox="0 0 480 470" role="img" '
    'aria-label="Verdicts against the tokens that a thought may have">'
    f'{ticks}{"".join(parts)}<text class="axis" x="260" y="462" '
    'text-anchor="middle">tokens that a thought may have</text></svg><figcaption>'
    "Right verdicts of each arm when its thought is closed for it after so many "
    "tokens. An arm that does not write thoughts is not here.</figcaption></figure>"
  )


def _free_place(cx: float, cy: float, width: float, taken: list) -> tuple[float, float]:
  """Left and top of a label that covers no other; notes its place in `taken`."""
  sides = [(8, -20), (-8 - width, -20), (8, 5), (-8 - width, 5)]
  steps = [(dx, dy + k * math.copysign(15, dy)) for k in range(9) for dx, dy in sides]
  inside = [(cx + dx, cy + dy) for dx, dy in steps]
  inside = [(a, b) for a, b in inside if a > 60 and a + width < 478 and 4 < b < 404]
  clear = (
    (a, b)
    for a, b in inside
    if not any(
      a <= x + w and x <= a + width and b <= y + h and y <= b + 15
      for x, y, w, h in taken
    )
  )
  left, top = next(clear, (inside or [(cx + 8, cy - 20)])[0])
  taken.append((left, top, width, 15))
  return left, top


def _filter(manifest: Json) -> str:
  """What the filter kept of each category, and why it dropped the rest."""
  if not manifest:
    return NOT_RUN
  summary = manifest.get("summary") or {}
  rows = [
    [_text(category), _text(expected)]
    + [_number(counts.get(name)) for name in ("prompts", "samples", "kept")]
    + [_share_bar(counts.get("kept"), counts.get("samples"))]
    for category, by_expected in (summary.get("keep_rates") or {}).items()
    for expected, counts in by_expected.items()
  ]
  head = ["category", "expected", "prompts", "samples", "kept", "kept of samples"]
  table = (
    _table(head, rows, "counts") if rows else "<p>No keep rates were recorded.</p>"
  )
  reasons = sorted((summary.get("reasons") or {}).items(), key=lambda r: -r[1])
  most = reasons[0][1] if reasons else 0
  rows = [
    [_text(n), _number(count), _share_bar(count, most, "")] for n, count in reasons
  ]
  if not rows:
    return table
  why = _table(["reason", "samples", ""], rows, "counts")
  return f"{table}<h3>Why samples were dropped</h3>{why}"


def _share_bar(part: Json, whole: Json, unit: str = "%") -> str:
  """A bar of part / whole, with the share written beside it when it has a unit."""
  if not (_finite(part) and _finite(whole) and whole > 0):
    return "–"
  share = 100 * min(part / whole, 1)
  return (
    '<span class="share"><svg class="bar" viewBox="0 0 100 6" '
    'preserveAspectRatio="none" '
    'aria-hidden="true"><rect class="track" width="100" height="6"/>'
    f'<rect class="fill" width="{share:.1f}" height="6"/></svg>'
    f"{f'<small>{share:.0f}{unit}</small>' if unit else ''}</span>"
  )


def _curve_figures(curves: dict) -> str:
  """Small multiples of every metric, grouped by stage."""
  if not curves:
    return NOT_RUN
  parts, number = [], 0
  for stage, metrics in curves.items():
    figures = []
    for name, curve in metrics.items():
      figures.append(_curve(name.removeprefix(f"{stage}/"), curve, number))
      number += 1
    parts.append(
      f'<h3>{_text(stage)}</h3><div class="multiples">{"".join(figures)}</div>'
    )
  return "".join(parts)


def _curve(name: str, curve: dict, number: int) -> str:
  """One metric over its steps; steps whose value is not finite are ticked in red."""
  first, last = curve["ends"]
  low, high = min(curve["y"], default=0), max(curve["y"], default=0)
  across, up = 240 / ((last - first) or 1), 84 / ((high - low) or 1)
  dots = [
    f"{(s - first) * across:.1f} {(92 - (v - low) * up) if high > low else 50:.1f}"
    for s, v in zip(curve["x"], curve["y"], strict=True)
  ]
  line = f'<path class="line" d="M{"L".join(dots)}"/>' if len(dots) > 1 else ""
  if len(dots) == 1:
    line = '<circle class="dot" cx="{}" cy="{}" r="3"/>'.format(*dots[0].split())
  bad = "".join(
    f'<path class="bad" d="M{(s - first) * across:.1f} 92v8"/>' for s in curve["bad"]
  )
  warn = f' <span class="warn">{len(curve["bad"])} not finite</span>' if bad else ""
  return (
    f'<figure class="curve" data-curve="{number}"><figcaption><b>{_text(name)}</b> '
    f"<output>{_number(curve['last'])}</output>{warn}</figcaption>"
    f'<div class="frame"><svg viewBox="0 0 240 100" preserveAspectRatio="none" '
    f'role="img" aria-label="{_text(name)} from step {first} to step {last}">'
    f'<path class="grid" d="M0 8H240M0 92H240"/>{line}{bad}</svg>'
    f"<span>{high:.3g}</span><span>{low:.3g}</span></div>"
    f"<small>step {first}<span>{last}</span></small></figure>"
  )


def _provenance(manifests: dict, summary: Json, config: Json) -> str:
  """Where the numbers come from: each stage's manifest, the versions and the config."""
  names = ("finished", "wall", "device", "seed", "code version", "config hash")
  rows, details = [], []
  for stage, manifest in manifests.items():
    if not manifest:
      rows.append([stage, NOT_RUN, *[""] * (len(names) - 1)])
      continue
    rows.append(
      [
        stage,
        _text(_moment(manifest.get("finished"))),
        _duration(manifest.get("wall_s")),
      ]
      + [
        _text(manifest.get(n))
        for n in ("device", "seed", "code_version", "config_hash")
      ]
    )
    shown = {
      k: v
      for k, v in (manifest.get("summary") or {}).items()
      if k not in ("keep_rates", "reasons")
    }
    shown |= {
      "inputs": manifest.get("inputs"),
      "started": _moment(manifest.get("started")),
    }
    shown |= {"format_version": manifest.get("format_version")}
    details.append(f"<details><summary>{stage}</summary>{_pairs(shown)}</details>")
  versions = {m.get("code_version") for m in manifests.values() if m}
  warning = ""
  if len(versions) > 1:
    warning = (
      '<p class="warn">The stages were run by different versions of the code.</p>'
    )
  if summary:
    of_eval = {"seed": summary.get("seed"), **(summary.get("versions") or {})}
    details.append(
      f"<details><summary>eval versions</summary>{_pairs(of_eval)}</details>"
    )
  pretty = (
    _text(json.dumps(config, indent=2, ensure_ascii=False)) if config else NOT_RUN
  )
  pretty = f"<pre>{pretty}</pre>" if config else pretty
  details.append(f"<details><summary>config.json</summary>{pretty}</details>")
  return warning + _table(["stage", *names], rows, "stamps") + "".join(details)


def _samples_note(samples: Json) -> str:
  if not samples["prompts"]:
    return NOT_RUN
  shown, total = len(samples["prompts"]), samples["total"]
  if shown == total:
    return f"<p>All {total:,} prompts.</p>"
  return f"<p>{shown:,} of {total:,} prompts, taken evenly from every category.</p>"


def _rollouts_note(rollouts: Json) -> str:
  if not rollouts["steps"]:
    return NOT_RUN
  shown, total = len(rollouts["steps"]), rollouts["total"]
  return (
    f"<p>{shown:,} of {total:,} steps with recorded rollouts, at most "
    f"{ROLLOUTS_A_STEP} rollouts of each.</p>"
  )
