"""Whether the judge of RL can be trusted with it: probes, and answers that are known.

Asks before anything is trained by it. RL puts the same probes to its judge
(`judging.probe`); this says more, and of more prompts.
"""

import pathlib

import jax

from dalign.config import stages
from dalign.config.schema import Config
from dalign.data import prompt_sets
from dalign.judges import judge
from dalign.judges import probing
from dalign.runs import distributed
from dalign.runs import progress
from dalign.stages import judging
from dalign.stages import services

PROMPTS = 45  # held-out prompts that each probe is put to


def probe(cfg: Config, workdir: pathlib.Path) -> None:
  """Prints what `rl.reward` makes of the probes of METHOD section 4 and of answers that
  are known to be right or wrong, and writes WORKDIR/probe.json.

  ValueError says which probes it gets wrong more often than `rl.judge_errors`.
  """
  run = services.of(stages.RLStage, cfg, services.Workspace(cfg, workdir))
  with jax.set_mesh(run.mesh):
    ask = judging.rl_judge(run)
    told = judging.metadata(run)
    report = judging.probe(run, ask, told, PROMPTS)
    known = run.task.labelled()
    prompts = [
      prompt_sets.with_metadata(question.prompt, told) for question, _ in known
    ]
    pairs = zip(prompts, known, strict=True)
    verdicts = ask([judge.RewardQuestion(p, q.answer) for p, (q, _) in pairs])
  agreed = probing.agreement([right for _, right in known], verdicts, seed=cfg.seed)
  found = {"reward": cfg.rl.reward, "probes": report, "agreement": agreed}
  run.store.write_json(run.store.workdir / "probe.json", found)
  if distributed.first():
    print("\n".join(table(found)))
  judging.refuse(report, cfg.rl.judge_errors)


def table(found: dict) -> list[str]:
  """The lines that are printed."""
  lines = [f"{'probe':16s} {'wrong':>6s}  {'95% interval':15s} {'n':>4s}  unscored"]
  for name, row in found["probes"].items():
    wrong, interval = progress.percent(probing.errors(row)), _interval(row["interval"])
    n, unscored = row["n"], row["unscored"]
    lines.append(f"{name:16s} {wrong:>6s}  {interval:15s} {n:4d}  {unscored:8d}")
  agreed = found["agreement"]
  if agreed["n"] + agreed["unscored"]:
    kappa = "-" if agreed["kappa"] is None else f"{agreed['kappa']:.2f}"
    lines.append(
      f"with {agreed['n']} answers that are known to be right or wrong: agrees on "
      f"{progress.percent(agreed['accuracy']).strip()}, kappa {kappa} "
      f"{_interval(agreed['interval'], '.2f')}, {agreed['unscored']} unscored"
    )
  return lines


def _interval(ends: list[float] | None, form: str = ".1%") -> str:
  return "" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"
