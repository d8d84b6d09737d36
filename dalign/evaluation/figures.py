"""Values as a page shows them, and drawings as places on it: page/report.html has the
HTML.

Works out no statistics. Knows no artefacts and no sections of the report.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any, TypeGuard

from dalign.runs import progress

CURVE_POINTS = 240
CONTROLS = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {127: 0x2421}
MARKS = (  # of arms, about a point
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
  "M-4 -4H4V4H-4Z",
  "M0 -5L5 0L0 5L-5 0Z",
  "M0 -5L5 4H-5Z",
  "M0 5L5 -4H-5Z",
  "M-2 -5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
  "M-5 -2H5V2H-5Z",
  "M-2 -5H2V5H-2Z",
)

Json = Any  # what json.loads returns
Point = tuple[float, float]

# Text and numbers.


def plain(value: Json) -> str:
  """A JSON value as people read it: control characters as pictures, no lone surrogates,
  which no page can hold."""
  if isinstance(value, Mapping):
    return ", ".join(f"{plain(k)} {plain(v)}" for k, v in value.items())
  if isinstance(value, list | tuple):
    return ", ".join(map(plain, value))
  if isinstance(value, float):
    return f"{value:.4g}"
  text = "" if value is None else str(value)
  return text.encode("utf-8", "replace").decode().translate(CONTROLS)


def finite(value: Json) -> TypeGuard[float]:
  return isinstance(value, int | float) and math.isfinite(value)


def shown(value: Json) -> str:
  """A number as people read it; an en dash where there is none."""
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return "–" if value is None else plain(value)


def duration(seconds: Json) -> str:
  if not finite(seconds):
    return "–"
  minutes, rest = divmod(int(seconds), 60)
  if minutes >= 60:
    return f"{minutes // 60} h {minutes % 60} min"
  return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean, perhaps with the two ends of its interval and the number of answers it is
  of, and what it was taken without."""

  mean: Json
  ends: tuple[float, float] | None
  n: Json
  notes: list[str]
  unit: str  # "%", or " points" of a difference of such, or "" of what is no share

  def shown(self, value: float) -> str:
    if self.unit == "":
      return f"{value:.4g}"
    return f"{100 * value:+.1f}" if self.unit == " points" else f"{100 * value:.1f}"


def estimate(cell: Mapping, unit: str | None = None) -> Estimate:
  """Of a cell of a summary, {"mean", "low", "high", "n", "unscored", ...}. In percent,
  but where a unit is given or a number is outside [0, 1]."""
  mean, low, high = (cell.get(name) for name in ("mean", "low", "high"))
  if unit is None:
    share = all(0 <= value <= 1 for value in (mean, low, high) if finite(value))
    unit = "%" if share else ""
  return Estimate(mean, _ends(cell), cell.get("n"), notes(cell), unit)


def _ends(cell: Mapping) -> Point | None:
  low, high = cell.get("low"), cell.get("high")
  return (low, high) if finite(low) and finite(high) else None


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


def flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, Json]]:
  """The values of a nested dict with dotted names."""
  for name, value in values.items():
    if isinstance(value, dict) and value:
      yield from flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


# Drawings.


@dataclasses.dataclass(frozen=True)
class Series:
  """An arm in the plane: the point of its means, whiskers where it has intervals, and
  perhaps a curve; `place` among all arms chooses colour and mark."""

  arm: str
  place: int
  point: Point
  whiskers: Sequence[tuple[Point, Point]]
  curve: Sequence[Point]

  @property
  def colour(self) -> int:
    return self.place % 8

  @property
  def mark(self) -> str:
    return MARKS[(self.place + self.place // 8) % len(MARKS)]


@dataclasses.dataclass(frozen=True)
class Plane:
  """One metric against another in a frame of 400 by 400 pixels, whose lower left corner
  is at (60, 420). `without` are arms that could not be drawn."""

  axes: tuple[str, str]
  series: Sequence[Series]
  without: Sequence[str]

  def x(self, value: float) -> str:
    return f"{60 + 400 * value:.1f}"

  def y(self, value: float) -> str:
    return f"{20 + 400 * (1 - value):.1f}"

  def path(self, points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{self.x(a)} {self.y(b)}" for a, b in points)


def plane(arms: dict, curves: dict, axes: tuple[str, str]) -> Plane | None:
  """One metric against another, a point an arm with its intervals as whiskers, and
  where it is known the curve of what other thresholds on its odds would do."""
  series = []
  for place, (arm, metrics) in enumerate(arms.items()):
    across, up = (metrics.get(name) or {} for name in axes)
    x, y = across.get("mean"), up.get("mean")
    if finite(x) and finite(y):
      whiskers = []
      if ends := _ends(across):
        whiskers.append(((ends[0], y), (ends[1], y)))
      if ends := _ends(up):
        whiskers.append(((x, ends[0]), (x, ends[1])))
      points = (curves.get(arm) or {}).get("points") or ()
      curve = [(kept, refused) for refused, kept in points]
      series.append(Series(arm, place, (x, y), whiskers, curve))
  without = [arm for arm in arms if arm not in [one.arm for one in series]]
  return Plane(axes, series, without) if series else None


def downsample(points: dict) -> dict:
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


@dataclasses.dataclass(frozen=True)
class Curve:
  """One metric over its steps, as `downsample` has it, in a frame of 240 by 100."""

  name: str
  data: dict

  @property
  def range(self) -> Point:
    return min(self.data["y"], default=0), max(self.data["y"], default=0)

  def x(self, step: float) -> float:
    first, last = self.data["ends"]
    return 240 * (step - first) / ((last - first) or 1)

  @property
  def dots(self) -> list[str]:
    low, high = self.range
    ups = [84 * (v - low) / (high - low) if high > low else 42 for v in self.data["y"]]
    xs = map(self.x, self.data["x"])
    return [f"{x:.1f} {92 - up:.1f}" for x, up in zip(xs, ups, strict=True)]
