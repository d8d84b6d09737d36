"""What the report's browsers show: a sample of the rows of arms, and of rollouts."""

import collections
from collections.abc import Iterator
import pathlib
from typing import Any

from dalign.evaluation import figures
from dalign.runs import store

DECIDED = (  # of a row that has one of these, what was right
  "refuse_disallowed",
  "comply_allowed",
  "safe_complete",
  "capability",
)
PROMPTS = 300  # in the sample browser; the same ones for every arm
ROWS_A_PROMPT = 4  # of one arm
ROLLOUT_STEPS, ROLLOUTS_A_STEP = 40, 8
TEXT_LIMIT = 6000  # characters of one thought, answer or prompt

Json = Any  # what json.loads returns


def rows_of(path: pathlib.Path) -> Iterator[dict]:
  """The rows of a JSONL file; none where it is absent."""
  return store.each_row(path) if path.is_file() else iter(())


def samples(workdir: pathlib.Path, summary: Json) -> Json:
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
      for row in rows_of(path):
        strata[row["prompt_id"]] = (row.get("category"), row.get("expected"))
    total += len(strata)
    chosen = _sample_strata(strata, PROMPTS)
    for arm, path in arms.items():
      for row in rows_of(path):
        if row["prompt_id"] in chosen:
          _add_row(groups, arm, row)
  arms = [
    arm for arm in (files | kept) if any(arm in g["rows"] for g in groups.values())
  ]
  return {"arms": arms, "prompts": list(groups.values()), "total": total}


def _sample_strata(strata: dict, limit: int) -> set:
  """At most `limit` keys, taken in turn from each stratum, in file order."""
  ranks: dict[Any, int] = {}  # of a key in its stratum
  sizes: collections.Counter = collections.Counter()
  for key, stratum in strata.items():
    ranks[key] = sizes[stratum]
    sizes[stratum] += 1
  return set(sorted(ranks, key=ranks.__getitem__)[:limit])


def _add_row(groups: dict, arm: str, row: dict) -> None:
  about = {name: str(row.get(name) or "") for name in ("category", "expected", "kind")}
  new = _clip(row, "prompt") | {"id": str(row["prompt_id"])} | about | {"rows": {}}
  group = groups.setdefault(str(row["prompt_id"]), new)
  rows = group["rows"].setdefault(arm, [])
  if len(rows) >= ROWS_A_PROMPT:
    return
  scores = {**(row.get("scores") or {})}
  if "score" in row:
    scores["score"] = row["score"]
  marks = {name: list(map(str, row.get(name) or ())) for name in ("cited", "invented")}
  ends = {name: str(row.get(name) or "") for name in ("malformed", "finish")}
  unscored = {name: str(why) for name, why in (row.get("unscored") or {}).items()}
  found = {"scores": scores, "unscored": unscored, "outcome": _right(row)}
  rows.append(_clip(row, "thought", "answer") | marks | ends | found)


def _right(row: dict) -> str:
  """Whether a row did what was expected of it, as far as its artefact says."""
  scores = row.get("scores") or {}
  for name in DECIDED:
    if figures.finite(scores.get(name)):
      return "right" if scores[name] >= 0.5 else "wrong"
  return "unscored" if row.get("unscored") else ""


def rollouts(workdir: pathlib.Path, stage: str) -> Json:
  """The first few rollouts of steps spread evenly over a stage's training."""
  path = workdir / stage / "rollouts.jsonl"
  found = (row.get("step") for row in rows_of(path))
  steps = sorted({step for step in found if figures.finite(step)})
  count = min(len(steps), ROLLOUT_STEPS)
  chosen = {
    steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)
  }
  kept: dict[Any, list[dict]] = {step: [] for step in sorted(chosen)}
  for row in rows_of(path):
    rows = kept.get(row.get("step"))
    if rows is None or len(rows) >= ROLLOUTS_A_STEP:
      continue
    numbers = {n: row[n] for n in ("reward", "advantage", "kl_nats") if n in row}
    about = {name: str(row.get(name) or "") for name in ("category", "unscored")}
    rows.append(_clip(row, "prompt", "thought", "answer") | numbers | about)
  values = {"steps": list(kept), "rows": list(kept.values()), "total": len(steps)}
  return {"stage": stage} | values


def _clip(row: dict, *names: str) -> dict[str, Any]:
  """Texts of a row of at most TEXT_LIMIT characters, and in "more" how many more each
  of them had."""
  texts = {name: row.get(name) for name in names}
  texts = {n: t if isinstance(t, str) else figures.plain(t) for n, t in texts.items()}
  more = {n: len(t) - TEXT_LIMIT for n, t in texts.items() if len(t) > TEXT_LIMIT}
  return {n: t[:TEXT_LIMIT] for n, t in texts.items()} | {"more": more}
