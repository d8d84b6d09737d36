"""Whether there is enough to learn from or to measure by: counts against the config's
floors. Below them a stage stops, or goes on and its summary has what falls short."""

import collections
from collections.abc import Mapping

from dalign.config import stages
from dalign.data import prompt_sets
from dalign.runs import progress
from dalign.stages import services


def short(counts: Mapping[str, int], least: int) -> list[str]:
  """What there is less of than `least`, as "3 of weapons to refuse"."""
  return [f"{n} {what}" for what, n in counts.items() if n < least]


def require(thin: str, found: list[str], said: str, advice: str) -> None:
  """ValueError where something falls short and `thin` (config.thin) is "stop"; else
  that is said."""
  if not found:
    return
  said = f"{said}: {', '.join(found)}"
  if thin == "stop":
    raise ValueError(
      f"{said}: {advice}; or go on with --config.thin=say, and the report says so"
    )
  progress.say(said)


def of_held_out(run: services.Services[stages.EvalStage], least: int) -> list[str]:
  """Of which ideal response types there are fewer held-out prompts than `least`: of
  those that the prompts have at all, where any are asked for."""
  cfg = run.cfg.eval
  prompts = [p for p in run.prompts.all if p.kind == "safety"]
  types = {p.expected for p in prompts}
  held_out = [p for p in prompts if p.split == "eval"]
  # As `prompts.choose` does, which would say how many there are each time.
  held_out = prompt_sets.balanced(held_out, cfg.prompts, 0)
  found = collections.Counter(p.expected for p in held_out)
  counts = {f"to {expected}": found[expected] for expected in sorted(types)}
  return short(counts, least if cfg.prompts else 0)


def require_held_out(run: services.Services[stages.EvalStage]) -> list[str]:
  """As `of_held_out` with `eval.least`, which it gives; ValueError as of `require`."""
  found = of_held_out(run, run.cfg.eval.least)
  require(
    run.cfg.thin,
    found,
    f"eval: fewer held-out prompts than {run.cfg.eval.least} of a type "
    "(config.eval.least)",
    "write more, or hold more of them out (a column split)",
  )
  return found
