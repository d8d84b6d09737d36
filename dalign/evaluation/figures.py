"""Values -> HTML: text, numbers, tables and drawings, as they stand on a page.

Works out places on the page and no statistics. Knows no artefacts and no sections. All
text is hostile, and is escaped where it becomes HTML.
"""

import collections
from collections.abc import Iterator
import html
import math
import re
from typing import Any, TypeGuard

from dalign.runs import progress

CURVE_POINTS = 240
CONTROLS = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {127: 0x2421}

Json = Any  # what json.loads returns

# Text and numbers.


def text(value: Json) -> str:
  """HTML of a text: escaped, control characters as pictures, no lone surrogates."""
  whole = plain(value).encode("utf-8", "replace").decode()
  return html.escape(whole.translate(CONTROLS))


def plain(value: Json) -> str:
  """A JSON value as people read it."""
  if value is None:
    return ""
  if isinstance(value, dict):
    return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
  if isinstance(value, list | tuple):
    return ", ".join(map(plain, value))
  if isinstance(value, float):
    return f"{value:.4g}"
  return str(value)


def finite(value: Json) -> TypeGuard[float]:
  return isinstance(value, int | float) and math.isfinite(value)


def number(value: Json) -> str:
  """A number with its exact value in the markup; an en dash where there is none."""
  if not finite(value) or isinstance(value, bool):
    return "–" if value is None else text(value)
  shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
  return f'<data value="{value!r}">{shown}</data>'


def duration(seconds: Json) -> str:
  if not finite(seconds):
    return "–"
  minutes, rest = divmod(int(seconds), 60)
  shown = f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
  if minutes >= 60:
    shown = f"{minutes // 60} h {minutes % 60} min"
  return f'<data value="{seconds!r}">{shown}</data>'


def table(label: str, head: list[str], rows: list[list[str]], kind: str = "") -> str:
  """A table of HTML cells whose first column names the row; `label` is its text."""
  top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
  body = "".join(
    f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'
    for first, *cells in rows
  )
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">'
    f'<table class="{kind}"><thead><tr>{top}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def pairs(values: dict) -> str:
  """A nested dict as a definition list with dotted names."""
  items = "".join(
    f"<div><dt>{text(k)}</dt><dd>{number(v) if finite(v) else text(v)}</dd></div>"
    for k, v in _flat(values)
  )
  return f'<dl class="pairs">{items}</dl>'


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, Json]]:
  for name, value in values.items():
    if isinstance(value, dict) and value:
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def estimate(cell: Json) -> str:
  """One estimate as "63.2% [58.1, 68.0] n=120", over a bar of its interval."""
  if cell is None:
    return "–"
  mean, low, high = (cell.get(name) for name in ("mean", "low", "high"))
  ends = all(map(finite, (low, high)))
  rate = all(0 <= v <= 1 for v in (mean, low, high) if finite(v))
  scale = (lambda v: f"{100 * v:.1f}") if rate else (lambda v: f"{v:.4g}")

  def data(value):
    return f'<data value="{value!r}">{scale(value)}</data>'

  shown = f"<b>{data(mean)}{'%' if rate else ''}</b>" if finite(mean) else "<b>–</b>"
  if ends:
    shown += f' <span class="interval">[{data(low)}, {data(high)}]</span>'
  shown += f" <small>n={number(cell.get('n'))}</small>"
  return (
    shown
    + _missing(cell)
    + (_interval_bar(mean, low, high) if rate and ends and finite(mean) else "")
  )


def notes(cell: Json) -> list[str]:
  """What an estimate was taken without: answers that have no score, and the commonest
  reason where it is known; seeds in which nothing has one."""
  seeds, said = cell.get("seeds") or [], []
  if unscored := cell.get("unscored"):
    why = cell.get("why")
    said.append(f"{plain(unscored)} unscored" + (f" ({why:.80})" if why else ""))
  there = [seed for seed in seeds if seed is not None]
  if len(there) < len(seeds):
    said.append(f"{len(there)} of {len(seeds)} seeds")
  return said


def line(cell: Json) -> str:
  """An estimate for a line of text, with what it was taken without."""
  said = notes(cell)
  return progress.percent(cell["mean"]) + (f" ({', '.join(said)})" if said else "")


def _missing(cell: Json) -> str:
  return "".join(f' <small class="warn">{text(note)}</small>' for note in notes(cell))


def _interval_bar(mean: float, low: float, high: float) -> str:
  return (
    '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" '
    'aria-hidden="true"><rect class="track" width="100" height="6"/>'
    f'<rect class="range" x="{100 * low:.1f}" width="{100 * (high - low):.1f}" '
    f'height="6"/><rect class="mean" x="{98.5 * mean:.1f}" width="1.5" height="6"/>'
    "</svg>"
  )


def shaded(cell: Json) -> str:
  """One rate as "63% n=12", on a ground that is the stronger the higher it is."""
  if cell is None or not finite(cell.get("mean")):
    return f'<span class="shade">–{_missing(cell or {})}</span>'
  share = 100 * cell["mean"]
  return (
    f'<span class="shade" style="--share:{share:.0f}%"><b><data '
    f'value="{cell["mean"]!r}">{share:.0f}</data>%</b> '
    f"<small>n={number(cell.get('n'))}</small>{_missing(cell)}</span>"
  )


def share_bar(part: Json, whole: Json, unit: str = "%") -> str:
  """A bar of part / whole, with the share written beside it when it has a unit."""
  if not (finite(part) and finite(whole) and whole > 0):
    return "–"
  share = 100 * min(part / whole, 1)
  return (
    '<span class="share"><svg class="bar" viewBox="0 0 100 6" '
    'preserveAspectRatio="none" '
    'aria-hidden="true"><rect class="track" width="100" height="6"/>'
    f'<rect class="fill" width="{share:.1f}" height="6"/></svg>'
    f"{f'<small>{share:.0f}{unit}</small>' if unit else ''}</span>"
  )


# Drawings.


def plane(arms: dict, curves: dict | None = None) -> str:
  """Refusal against over-refusal: each arm a point with its intervals as whiskers, and
  where it is known the curve of what other thresholds on its odds would do."""
  pairs = {
    a: (m.get("comply_allowed"), m.get("refuse_disallowed")) for a, m in arms.items()
  }
  pairs = {
    arm: tuple([cell.get(k) for k in ("mean", "low", "high")] for cell in pair)
    for arm, pair in pairs.items()
    if all(cell and finite(cell.get("mean")) for cell in pair)
  }
  if not pairs:
    return ""
  absent = ", ".join(text(arm) for arm in arms if arm not in pairs)
  x, y = (lambda v: 60 + 400 * v), (lambda v: 420 - 400 * v)
  parts = [_plane_frame(x, y)]
  taken = [(x(p[0][0]) - 7, y(p[1][0]) - 7, 14, 14) for p in pairs.values()]
  for place, (arm, ((cx, *xs), (cy, *ys))) in enumerate(pairs.items()):
    lines = ""
    if points := ((curves or {}).get(arm) or {}).get("points"):
      path = "L".join(f"{x(kept):.1f} {y(refused):.1f}" for refused, kept in points)
      lines += f'<path class="operating" d="M{path}"/>'
    if all(map(finite, xs)):
      lines += f'<path d="M{x(xs[0]):.1f} {y(cy):.1f}H{x(xs[1]):.1f}"/>'
    if all(map(finite, ys)):
      lines += f'<path d="M{x(cx):.1f} {y(ys[0]):.1f}V{y(ys[1]):.1f}"/>'
    label = _short(arm, 24)
    left, top = _free_place(x(cx), y(cy), 7.4 * len(label), taken)
    parts.append(
      f'<g class="arm c{place % 8}">{lines}'
      f'<circle cx="{x(cx):.1f}" cy="{y(cy):.1f}" r="5"/>'
      f'<text x="{left:.1f}" y="{top + 12:.1f}">{text(label)}</text>'
      f"<title>{text(arm)}: complies with {100 * cx:.1f}% of what is allowed, "
      f"refuses {100 * cy:.1f}% of what is not</title></g>"
    )
  return (
    '<figure class="plane"><svg viewBox="0 0 480 470" role="img" aria-label="Refusal '
    'of disallowed prompts against compliance with allowed ones, one point an arm">'
    f"{''.join(parts)}</svg><figcaption>Up: refuses more of what is disallowed. "
    "Right: complies with more of what is allowed. Whiskers are the intervals of the "
    "table. On the dashed line a model answers without regard to what is asked. Thin "
    "curves are what other thresholds on the odds of opening with a refusal would do, "
    "if whatever does not decline counted as complying: a point lies below its curve "
    "by the answers that answer nothing."
    + (f" Without a place, as one of both has no score: {absent}." if absent else "")
    + "</figcaption></figure>"
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


def scaling(arms: dict) -> str:
  """What is right against the tokens that a thought may have, a line for each arm that
  was measured so."""
  # Arm -> budget, or inf -> mean.
  found: dict[str, dict[float, float]] = collections.defaultdict(dict)
  for arm, metrics in arms.items():
    for name, cell in metrics.items():
      budget = re.fullmatch(r"thought_(\d+)_verdict", name)
      if budget and finite(cell.get("mean")):
        found[arm][int(budget[1])] = cell["mean"]
    if arm in found and finite(metrics.get("verdict", {}).get("mean")):
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
  parts: list[str] = []
  taken: list[tuple] = []
  for arm, line in found.items():
    dots = [(across[budget], 420 - 400 * line[budget]) for budget in sorted(line)]
    left, top = _free_place(*dots[-1], 7.4 * len(arm), taken)
    parts.append(
      f'<g class="arm c{[*arms].index(arm) % 8}">'
      f'<path fill="none" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in dots)}"/>'
      + "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in dots)
      + f'<text x="{left:.1f}" y="{top + 12:.1f}">{text(arm)}</text></g>'
    )
  return (
    '<figure class="plane scaling"><svg viewBox="0 0 480 470" role="img" '
    'aria-label="Verdicts against the tokens that a thought may have">'
    f'{ticks}{"".join(parts)}<text class="axis" x="260" y="462" '
    'text-anchor="middle">tokens that a thought may have</text></svg><figcaption>'
    "Right verdicts of each arm when its thought is closed for it after so many "
    "tokens. An arm that does not write thoughts is not here.</figcaption></figure>"
  )


MARKS = (  # about a point
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
  "M-4 -4H4V4H-4Z",
  "M0 -5L5 0L0 5L-5 0Z",
  "M0 -5L5 4H-5Z",
  "M0 5L5 -4H-5Z",
  "M-2 -5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
  "M-5 -2H5V2H-5Z",
  "M-2 -5H2V5H-2Z",
)
LANE, GAP = 13, 14  # heights of an arm's line and between two sets


def by_set(sets: dict[str, dict[str, Json]], arms: list[str], axis: str) -> str:
  """A drawing of each set's estimates, a line for each arm with its interval."""
  legend = [
    _mark(i, 20 + 155 * (i % 4), 12 + 18 * (i // 4), _short(arm, 19))
    for i, arm in enumerate(arms)
  ]
  top = 32 + 18 * ((len(arms) - 1) // 4)
  height = LANE * len(arms) + GAP
  end = top + height * len(sets)
  parts = [
    f'<path class="grid" d="M{_across(v):.1f} {top}V{end}"/><text text-anchor="middle" '
    f'x="{_across(v):.1f}" y="{end + 16}">{100 * v:.0f}%</text>'
    for v in (0, 0.25, 0.5, 0.75, 1)
  ]
  for i, (name, cells) in enumerate(sets.items()):
    y = top + i * height
    parts.append(
      f'<path class="grid" d="M0 {y}H640"/><text x="0" y="{y + height / 2 + 4}">'
      f"{text(_short(name, 30))}<title>{text(name)}</title></text>"
    )
    lanes = enumerate(cells.get(arm) for arm in arms)
    parts += [_lane(n, y + (GAP + LANE) / 2 + LANE * n, cell) for n, cell in lanes]
  return (
    f'<svg viewBox="0 0 640 {end + 40}" role="img" aria-label="{text(axis)} of each '
    f'set, a line for each arm">{"".join(parts + legend)}<text class="axis" '
    f'x="{_across(0.5)}" y="{end + 34}" text-anchor="middle">{text(axis)}</text></svg>'
  )


def _across(share: float) -> float:
  return 210 + 410 * share


def _lane(place: int, y: float, cell: Json) -> str:
  """The estimate of one arm, with its whiskers, if there is one."""
  if not cell or not finite(cell.get("mean")):
    return ""
  ends, line = [cell.get("low"), cell.get("high")], ""
  if all(map(finite, ends)):
    line = f'<path d="M{_across(ends[0]):.1f} {y}H{_across(ends[1]):.1f}"/>'
  return f'<g class="arm c{place % 8}">{line}</g>' + _mark(
    place, _across(cell["mean"]), y
  )


def _mark(place: int, x: float, y: float, label: str = "") -> str:
  """The mark of one arm, and its name beside it where it is said."""
  said = f'<text x="{x + 10}" y="{y + 4}">{text(label)}</text>' if label else ""
  shape = MARKS[(place + place // 8) % len(MARKS)]  # one for each arm of a colour
  return (
    f'<g class="arm c{place % 8}"><path class="mark" d="{shape}" '
    f'transform="translate({x:.1f} {y})"/>{said}</g>'
  )


def _short(whole: str, most: int) -> str:
  return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def thin(points: dict) -> dict:
  """At most CURVE_POINTS points: the lowest and the highest of each stretch of steps.

  "x" and "y" are finite, "bad" are the other steps, "ends" the first and the last step.
  """
  good = sorted((s, float(v)) for s, v in points.items() if finite(v))
  bad = sorted(s for s, v in points.items() if not finite(v))
  last = good[-1][1] if good else None
  if len(good) > CURVE_POINTS:
    width = math.ceil(2 * len(good) / CURVE_POINTS)
    parts = [good[i : i + width] for i in range(0, len(good), width)]
    ends = [{min(p, key=lambda q: q[1]), max(p, key=lambda q: q[1])} for p in parts]
    good = sorted(set().union(*ends, {good[0], good[-1]}))
  x, y = [s for s, _ in good], [v for _, v in good]
  ends = [min(x + bad), max(x + bad)]
  return {"x": x, "y": y, "bad": bad, "ends": ends, "last": last}


def curve(name: str, curve: dict, place: int) -> str:
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
    f'<figure class="curve" data-curve="{place}"><figcaption><b>{text(name)}</b> '
    f"<output>{number(curve['last'])}</output>{warn}</figcaption>"
    f'<div class="frame"><svg viewBox="0 0 240 100" preserveAspectRatio="none" '
    f'role="img" aria-label="{text(name)} from step {first} to step {last}">'
    f'<path class="grid" d="M0 8H240M0 92H240"/>{line}{bad}</svg>'
    f"<span>{high:.3g}</span><span>{low:.3g}</span></div>"
    f"<small>step {first}<span>{last}</span></small></figure>"
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
