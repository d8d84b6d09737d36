"""Figures of the policy world's questions, from the workdirs of configs/world.py.

  python -m benchmarks.world_figures --deep=runs/deep --noise=runs/noise --out=docs

draws OUT/deep.svg (right verdicts by how many clauses have to be considered, by arm and
by how long a thought may be) and OUT/noise.svg (right verdicts by how many votes a
sample has to pass). Points are means over seeds, bars reach from the lowest seed to the
highest.
"""

import argparse
import json
import pathlib

import matplotlib
from matplotlib import pyplot as plt
import numpy as np

CLAUSES = (1, 2, 3, 4)  # of five there are six prompts
VOTES = (1, 2, 4, 8)
ARMS = {
  "spec_in_prompt": "base, spec in the prompt",
  "sft": "SFT, all rows",
  "sft_300_distill": "SFT, 300 rows + distillation",
  "sft_300_rl_fast": "SFT, 300 rows + RL at 1e-3",
  "sft_300_rl": "SFT, 300 rows + RL",
  "sft_300": "SFT, 300 rows",
  "no_thoughts": "SFT on answers alone",
}
BUDGETS = {"": "whole", "thought_32_": "32", "thought_24_": "24", "thought_16_": "16"}


def scores(workdir: pathlib.Path, arm: str, metric: str) -> list[float]:
  """The metric of an arm of an ablation in percent, one a seed; ValueError where no
  seed has the arm, KeyError where the metric was not measured."""
  found = []
  for path in sorted(workdir.glob(f"seed-*/{arm}/eval/summary.json")):
    [row] = json.loads(path.read_text())["arms"].values()
    found.append(100 * row[metric]["mean"])
  if not found:
    raise ValueError(f"wanted {workdir}/seed-*/{arm}/eval/summary.json, found none")
  return found


def draw(axes, xs, by_x: list[list[float]], label: str) -> None:
  """One line: means over seeds, and bars from the lowest to the highest."""
  means = np.array([np.mean(seeds) for seeds in by_x])
  low = means - [min(seeds) for seeds in by_x]
  high = [max(seeds) for seeds in by_x] - means
  axes.errorbar(xs, means, yerr=[low, high], marker="o", capsize=3, label=label)


def deep(workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Depth: by arm, and by the length of thought that SFT on all rows is given."""
  figure, (by_arm, by_length) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
  for arm, label in ARMS.items():
    draw(by_arm, CLAUSES, [scores(workdir, arm, f"depth_{n}") for n in CLAUSES], label)
  for budget, label in BUDGETS.items():
    metrics = [f"{budget}depth_{n}" for n in CLAUSES]
    draw(by_length, CLAUSES, [scores(workdir, "sft", m) for m in metrics], label)
  by_arm.set_ylabel("right verdicts, held out (%)")
  by_arm.legend(fontsize=8, loc="lower left")
  by_length.legend(
    title="SFT, all rows; tokens of thought", fontsize=8, loc="lower left"
  )
  for axes in (by_arm, by_length):
    axes.set_xlabel("clauses to consider (training prompts: 3 at most)")
    axes.set_xticks(CLAUSES)
    axes.set_ylim(0, 102)
  _save(figure, path)


def noise(workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Votes: by the share of them that is wrong, all that is kept and 300 rows of it."""
  figure, axes = plt.subplots(figsize=(6, 4))
  for rate in (10, 30):
    arms = [f"errs_{rate}_votes_{k}" for k in VOTES]
    by_votes = [scores(workdir, arm, "verdict") for arm in arms]
    draw(axes, VOTES, by_votes, f"{rate}% of votes wrong")
  few = [scores(workdir, f"errs_30_votes_{k}_rows_300", "verdict") for k in VOTES[:3]]
  draw(axes, VOTES[:3], few, "30%, and 300 rows learned")
  for arm in ("truth", "truth_rows_300"):
    axes.axhline(np.mean(scores(workdir, arm, "verdict")), color="grey", linestyle=":")
  axes.set_xscale("log", base=2)
  axes.set_xticks(VOTES, [str(k) for k in VOTES])
  axes.set_xlabel("votes that a sample has to pass (dotted: a judge without errors)")
  axes.set_ylabel("right verdicts of SFT, held out (%)")
  axes.legend(fontsize=8)
  _save(figure, path)


def _save(figure, path: pathlib.Path) -> None:
  figure.tight_layout()
  figure.savefig(path, metadata={"Date": None})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--deep", type=pathlib.Path, help="of configs/world.py:deep")
  parser.add_argument("--noise", type=pathlib.Path, help="of configs/world.py:noise")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"))
  args = parser.parse_args()
  matplotlib.use("svg")
  plt.rcParams |= {"svg.hashsalt": "dalign", "axes.grid": True, "grid.alpha": 0.3}
  if args.deep:
    deep(args.deep, args.out / "deep.svg")
  if args.noise:
    noise(args.noise, args.out / "noise.svg")


if __name__ == "__main__":
  main()
