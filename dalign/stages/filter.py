"""samples.jsonl -> judged.jsonl, kept.jsonl: the judge k times, the least score counts.

The filter's judge reads thought and answer. Beside its score each answer gets a reward
score from a judge that cannot see the thought: that is what the reward model learns.
"""

import collections
import dataclasses
import functools
import itertools
import math
import pathlib
import sys

from dalign.config import stages
from dalign.config.replies import FilterConfig
from dalign.data import prompt_sets
from dalign.judges import judge
from dalign.policy import spec as specs
from dalign.runs import progress
from dalign.stages import evidence
from dalign.stages import judging
from dalign.stages import samples
from dalign.stages import services
from dalign.text import words
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Verdict

Run = services.Services[stages.FilterStage]  # what this stage sees of a run

FIRST_BATCH_SIZE = 256  # a judge that answers few of these is asked no more
MIN_CELL_SIZE = 10  # of a cell: fewer say nothing of a judge
SAVED = ("endpoint", "recorded")  # judges whose every reply lies on the disk


def filter_(run: Run) -> None:
  """Judges every well-formed sample and keeps the best, balanced over cells; goes on
  where it stopped."""
  cfg = run.cfg.filter
  source = run.store.left("generate", "samples.jsonl")
  functions = judging.function_files(cfg.judge)
  inputs = [source, *run.sources, *run.recording_files, *functions]
  if not run.begin(inputs, anew=True):
    return
  path = run.store.path("filter", "judged.jsonl")
  judged = _judge_samples(run, source, path)
  kept = _select_kept(judged, cfg)
  ids = {row.id for row in kept}
  kept_rows = [
    r for r in run.store.each_row(path) if (r["prompt_id"], r["index"]) in ids
  ]
  run.store.write_rows(path.with_name("kept.jsonl"), kept_rows)
  summary = _summary(judged, kept)
  counts = {
    f"of {category} to {expected}": cell["kept"]
    for category, cells in sorted(summary["keep_rates"].items())
    for expected, cell in sorted(cells.items())
  }
  summary["thin"] = evidence.short(counts, cfg.least)
  evidence.require(
    run.cfg.thin,
    summary["thin"],
    f"filter: kept fewer samples than {cfg.least} of a cell (config.filter.least)",
    "filter/judged.jsonl has why; more prompts, a larger generate.most, another judge "
    "or a lower filter.threshold give more",
  )
  run.finish(summary)
  drop_reasons = [row.drop_reason for row in judged if row.id not in ids]
  progress.say(
    f"filter: kept {len(kept)} of {len(judged)} samples"
    + (f"; not kept: {progress.top_reasons(drop_reasons)}" if drop_reasons else "")
  )
  if right := summary.get("truly_right"):
    shown = (f"{progress.percent(of).strip()} of {what}" for what, of in right.items())
    progress.say(f"filter: truly right are {', '.join(shown)}")
  if any(summary["unread_votes"].values()):
    unread = (f"{n} on {what}" for what, n in summary["unread_votes"].items())
    progress.say(f"filter: votes without a verdict: {', '.join(unread)}")
  if none := summary["kept_none_of"]:
    progress.say(f"filter: kept none of {', '.join(none)}")


@dataclasses.dataclass(frozen=True, slots=True)
class _JudgedSample:
  """Of a row of judged.jsonl what decides whether it is kept."""

  id: tuple[str, int]  # prompt and index
  cell: tuple[str, str, str]  # category, kind, ideal response type
  score: float | None
  drop_reason: str  # why it would not be kept
  # Why a judge that was asked has no verdict; None where none was asked.
  unscored: str | None
  unrewarded: str | None
  unread: tuple[int, int]  # votes without a verdict, with the thought and without
  right: bool | None  # by the truth, where that is known

  @classmethod
  def of(cls, row: dict, threshold: float) -> "_JudgedSample":
    def why(score: str, reason: str) -> str | None:
      missing = row[reason] if row[score] is None else ""  # or it has a score's reason
      return None if row["malformed"] else sys.intern(missing)

    return cls(
      id=(row["prompt_id"], row["index"]),
      cell=(row["category"], row["kind"], row["expected"]),
      score=row["score"],
      drop_reason=sys.intern(_drop_reason(row, threshold)),
      unscored=why("score", "reason"),
      unrewarded=why("reward", "reward_reason"),
      unread=(row["unread_votes"], row["reward_unread_votes"]),
      right=None if row.get("true_score") is None else row["true_score"] >= threshold,
    )


def _judge_samples(
  run: Run, source: pathlib.Path, path: pathlib.Path
) -> list[_JudgedSample]:
  """What the judges say of every sample, in judged.jsonl as it comes. ValueError where
  they have no verdict on too many."""
  cfg = run.cfg.filter
  prompts = {prompt.id: prompt for prompt in run.prompts.all}
  judged = _judged_before(run, path)
  likely = judging.make_quality(run)
  ask = judging.filter_judge(run, "filter", likely)
  reward = judging.answer_judge(run, "reward", likely)
  truth = run.task.truth()
  rows = run.store.each_row(source, lambda row: (row["prompt_id"], row["index"]))
  for _ in itertools.islice(rows, len(judged)):
    pass
  size = cfg.at_once if judged else FIRST_BATCH_SIZE
  _check_scored(judged[:FIRST_BATCH_SIZE], cfg, max(cfg.unscored, 0.5))
  while batch := [*map(samples.from_row, itertools.islice(rows, size))]:
    # What judges see has no label but by `filter.metadata`.
    prompts_and_samples = [
      (prompt_sets.with_metadata(prompts[s.prompt_id], cfg.metadata), s) for s in batch
    ]
    least = functools.partial(
      judge.verdicts, samples=prompts_and_samples, k=cfg.votes, readable=cfg.readable
    )
    verdicts, rewards = least(ask, thought=True), least(reward, thought=False)
    judged_rows = [
      _row(run, prompts[s.prompt_id], s, verdict, reward_verdict)
      for s, verdict, reward_verdict in zip(batch, verdicts, rewards, strict=True)
    ]
    if truth is not None:
      for row, verdict in zip(judged_rows, least(truth, thought=True), strict=True):
        row["true_score"] = verdict.score
    run.store.append_rows(path, judged_rows)
    judged += (_JudgedSample.of(row, cfg.threshold) for row in judged_rows)
    run.store.pause("filter")
    _check_scored(judged[:FIRST_BATCH_SIZE], cfg, max(cfg.unscored, 0.5))
    size = cfg.at_once
  _check_scored(judged, cfg, cfg.unscored)
  return judged


def _judged_before(run: Run, path: pathlib.Path) -> list[_JudgedSample]:
  """What a run that was cut off has judged, of samples that were put to the judge
  together all or none. Nothing of an endpoint and of a recording, which have what they
  said on the disk and are asked again: of what had no verdict there may be one now."""
  if run.cfg.filter.judge in SAVED or not run.store.has(path):
    run.store.write_rows(path, [])
    return []
  cfg = run.cfg.filter
  judged = [_JudgedSample.of(row, cfg.threshold) for row in run.store.each_row(path)]
  whole = len(judged) >= FIRST_BATCH_SIZE
  beyond = (len(judged) - FIRST_BATCH_SIZE) % cfg.at_once if whole else len(judged)
  if beyond:
    judged = judged[: len(judged) - beyond]
    run.store.write_rows(path, run.store.read_rows(path)[: len(judged)])
  return judged


def _row(
  run, prompt: Prompt, sample: Sample, verdict: Verdict, reward: Verdict
) -> dict:
  thought = words.without_prompt_quotes(sample.thought, prompt.text)
  parts = dict(verdict.parts)
  score = verdict.score
  if score is not None:  # whoever judged
    checks = run.task.checks(prompt, sample)
    parts |= checks
    score *= math.prod(checks.values())
  return samples.to_row(sample) | {
    "prompt": prompt.text,
    "category": prompt.category,
    "expected": prompt.expected,
    "kind": prompt.kind,
    "cited": list(specs.cited(thought, run.task.spec)),
    "invented": list(specs.invented(thought, run.task.spec)),
    "score": score,
    "reason": verdict.reason,
    "scores": parts,
    "reward": reward.score,
    "reward_reason": reward.reason,
    "unread_votes": verdict.unread,
    "reward_unread_votes": reward.unread,
  }


def _check_scored(judged: list[_JudgedSample], cfg: FilterConfig, limit: float) -> None:
  """ValueError where a judge has no verdict on more than `limit` of the samples that it
  was asked about, of all or of those of one cell; they are all on disk."""
  reasons_by_group: dict[str, list[str | None]] = collections.defaultdict(list)
  for row in judged:
    category, _, expected = row.cell
    for which in ("", f" of {category} to {expected}"):
      reasons_by_group[f"samples{which}"].append(row.unscored)
      if cfg.judge != "rubric":  # which may say nothing of answers alone
        reasons_by_group[f"answers{which}"].append(row.unrewarded)
  again = "The same command asks again for these"
  if cfg.judge not in SAVED:
    again = "Raise that where it may be so, or mend the judge and take another workdir"
  for group, reasons in reasons_by_group.items():
    asked = [why for why in reasons if why is not None]
    missing = [why for why in asked if why]
    few = group not in ("samples", "answers") and len(asked) < MIN_CELL_SIZE
    if not few and len(missing) > limit * len(asked):
      raise ValueError(
        f"filter: the judge has no verdict on {len(missing)} of {len(asked)} {group}: "
        f"{progress.top_reasons(missing)}; wanted at most {cfg.unscored:.0%} "
        f"(config.filter.unscored). {again}"
      )


def _select_kept(judged: list[_JudgedSample], cfg) -> list[_JudgedSample]:
  """At or above the threshold; the best of each prompt; no cell over its share."""
  good = [row for row in judged if row.score is not None and row.score >= cfg.threshold]
  best = sorted(good, key=lambda row: (-(row.score or 0.0), row.id[1], row.id[0]))
  of_prompt: collections.Counter = collections.Counter()
  of_cell: collections.Counter = collections.Counter()
  kept = []
  for row in best:
    prompt = row.id[0]
    if of_prompt[prompt] < cfg.per_prompt and of_cell[row.cell] < cfg.per_cell:
      of_prompt[prompt] += 1
      of_cell[row.cell] += 1
      kept.append(row)
  return kept


def _summary(judged: list[_JudgedSample], kept: list[_JudgedSample]) -> dict:
  """Keep-rates by category and ideal type, and why the others were not kept."""
  ids = {row.id for row in kept}
  rates: dict[str, dict] = collections.defaultdict(dict)
  by_type = collections.defaultdict(list)
  for row in judged:
    by_type[row.cell[0], row.cell[2]].append(row)
  for (category, expected), rows in by_type.items():
    rates[category][expected] = {
      "prompts": len({row.id[0] for row in rows}),
      "samples": len(rows),
      "kept": sum(row.id in ids for row in rows),
    }
  reasons = collections.Counter(row.drop_reason for row in judged if row.id not in ids)
  known = [row for row in judged if row.right is not None]
  right = {
    name: sum(row.right for row in rows if row.right) / len(rows) if rows else None
    for name, rows in (("samples", judged), ("kept", kept))
  }
  return {
    "samples": len(judged),
    "kept": len(kept),
    **({"truly_right": right} if known else {}),
    "keep_rates": dict(rates),
    "kept_none_of": [
      f"{category} to {expected}"
      for category, cells in rates.items()
      for expected, cell in cells.items()
      if not cell["kept"]
    ],
    "reasons": dict(reasons.most_common()),
    "unread_votes": {
      name: sum(row.unread[i] for row in judged)
      for i, name in enumerate(("samples", "answers"))
    },
  }


def _drop_reason(row: dict, threshold: float) -> str:
  """Why a row was not kept: unscored, the proposition that cost most, the score as a
  whole, or the caps."""
  if row["score"] is None:
    return row["reason"]
  if row["score"] >= threshold:
    return "enough others"
  failed = {name: part for name, part in row["scores"].items() if part < 0.5}
  return min(failed, key=failed.__getitem__) if failed else "below the threshold"
