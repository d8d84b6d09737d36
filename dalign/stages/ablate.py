"""Arms side by side: the same run with changes, sharing what the method lets them.

seed-S/shared has the stages that all arms share, seed-S/ARM those of its own, and
eval/summary.json all of them, as one run's has its own.
"""

from collections.abc import Callable
import math
import pathlib

import numpy as np
from scipy import stats

from dalign.config import convert
from dalign.config.schema import STAGES
from dalign.config.schema import Config
from dalign.evaluation import evals
from dalign.evaluation import figures
from dalign.runs import progress
from dalign.runs.workdir import Store

RunStages = Callable[[Config, pathlib.Path, dict, tuple[str, ...]], None]


def ablate(cfg: Config, workdir: pathlib.Path, run_stages: RunStages) -> None:
  """Runs every arm of every seed and writes their summary."""
  plan = cfg.ablation
  if plan is None:
    raise ValueError("wanted a config with an ablation")
  metrics_by_arm: dict[str, list[dict]] = {}  # arm -> of each seed, the metrics
  categories: dict[str, list[dict]] = {}
  root_store = Store(workdir)
  for seed in plan.seeds:
    folder = workdir / f"seed-{seed}"
    seed_cfg = convert.changed(cfg, {"seed": seed, "ablation": None})
    run_stages(seed_cfg, folder / "shared", {}, plan.shared)
    for name, arm in plan.arms.items():
      own_stages = {*arm["stages"], "eval"}
      shared = {s: folder / "shared" for s in plan.shared if s not in own_stages}
      shared |= {stage: folder / other for stage, other in arm["takes"].items()}
      changes = arm["changes"] | {"eval": {"arms": (arm["row"],)}}
      stages = tuple(stage for stage in STAGES if stage in own_stages)
      progress.say(f"seed {seed}, {name}: {', '.join(stages)}")
      run_stages(convert.changed(seed_cfg, changes), folder / name, shared, stages)
      summary = root_store.read_json(folder / name / "eval" / "summary.json")
      metrics_by_arm.setdefault(name, []).append(summary["arms"][arm["row"]])
      categories.setdefault(name, []).append(summary["categories"][arm["row"]])
  root_store.write_json(
    workdir / "eval" / "summary.json",
    {
      "arms": {name: over_seeds(seeds) for name, seeds in metrics_by_arm.items()},
      "paired": {},
      "categories": {name: _by_category(seeds) for name, seeds in categories.items()},
      "definitions": summary["definitions"],
      "versions": summary["versions"],
      "sets": summary["sets"],
      "seeds": list(plan.seeds),
    },
  )
  for name, seeds in metrics_by_arm.items():
    progress.say(line(name, over_seeds(seeds)))


def over_seeds(seeds: list[dict]) -> dict:
  """metric -> mean over seeds with Student's 95% interval; of one seed its own.

  A metric need not be in all of them, nor have a value: it is over those that have, and
  `seeds` has None for the others.
  """
  if len(seeds) == 1:
    return seeds[0]
  metrics = dict.fromkeys(metric for one in seeds for metric in one)
  return {m: _estimate_over_seeds([one.get(m, {}) for one in seeds]) for m in metrics}


def _by_category(seeds: list[dict]) -> dict:
  """category -> metric -> mean over seeds, as `over_seeds` has it."""
  names = dict.fromkeys(category for one in seeds for category in one)
  return {name: over_seeds([one.get(name, {}) for one in seeds]) for name in names}


def _estimate_over_seeds(cells: list[dict]) -> dict:
  seeds = [cell.get("mean") for cell in cells]
  means = [mean for mean in seeds if mean is not None]
  out = {
    "n": sum(cell.get("n", 0) for cell in cells),
    "unscored": sum(cell.get("unscored", 0) for cell in cells),
    "seeds": seeds,
  }
  if why := next((cell["why"] for cell in cells if cell.get("why")), None):
    out["why"] = why
  if not means:
    return out | {"mean": None, "low": None, "high": None}
  mean, spread = float(np.mean(means)), math.inf
  if len(means) > 1:
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    spread = float(stats.t.ppf(0.975, len(means) - 1)) * error
  low, high = max(0.0, mean - spread), min(1.0, mean + spread)
  return out | {"mean": mean, "low": low, "high": high}


def line(name: str, metrics: dict) -> str:
  """An arm in one line."""
  shown = ("verdict", *evals.PARTS, "safe_complete", "citation", "capability")
  said = (f"{m} {figures.line(metrics[m])}" for m in shown if m in metrics)
  return f"{name:15s} {'  '.join(said)}"
