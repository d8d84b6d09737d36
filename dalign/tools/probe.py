"""Whether the judge of RL can be trusted with it: probes, and answers that are known.

Asks before anything is trained by it. RL puts the same probes to its judge
(`judging.probe`); this says more, and of more prompts.
"""

from collections.abc import Mapping
import pathlib

import jax

from dalign.config import stages
from dalign.config.schema import Config
from dalign.judges import probing
from dalign.runs import distributed
from dalign.runs import progress
from dalign.stages import judging
from dalign.stages import services

PROMPTS = 45  # held-out prompts that each probe is put to


def probe(cfg: Config, workdir: pathlib.Path) -> None:
  """Prints what `rl.reward` makes of the probes of METHOD section 4, of answers that
  are known to be right or wrong, and by clause of those that break or keep it, and
  writes WORKDIR/probe.json.

  ValueError says which probes it gets wrong more often than `rl.judge_errors`.
  """
  run = services.of(stages.RLStage, cfg, services.Workspace(cfg, workdir))
  with jax.set_mesh(run.mesh):
    ask = judging.rl_judge(run)
    told = judging.reward_metadata(run)
    report = judging.probe(run, ask, told, PROMPTS)
    known, of_rules = run.task.labelled(), run.task.of_rules()
    questions = [q for q, _ in known] + [q for _, q, _ in of_rules]
    verdicts = ask([judging.with_metadata(question, told) for question in questions])
  right = [right for _, right in known]
  agreed = probing.agreement(right, verdicts[: len(known)], seed=cfg.seed)
  found = {"reward": cfg.rl.reward, "probes": report, "agreement": agreed}
  if of_rules:
    found["rules"] = probing.rules_report(
      run.task.spec, of_rules, verdicts[len(known) :]
    )
  run.store.write_json(run.store.workdir / "probe.json", found)
  if distributed.is_first_process():
    print("\n".join(table(found)))
  judging.check_probe_errors(report, cfg.rl.judge_errors)


def table(found: dict) -> list[str]:
  """The lines that are printed."""
  lines = [f"{'probe':16s} {'wrong':>6s}  {'95% interval':15s} {'n':>4s}  unscored"]
  for name, row in found["probes"].items():
    wrong = progress.percent(probing.error_rate(row))
    interval = _interval(row["interval"])
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
  return lines + _of_rules(found.get("rules") or {})


def _of_rules(rules: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
  """Lines on the clauses that have answers which break them, or were got wrong, and on
  those of which nothing says whether the judge knows them."""
  lines, without, gaps = [], list[str](), list[str]()
  for policy, clauses in rules.items():
    untried = [clause for clause, row in clauses.items() if not row["breaks"]]
    if len(untried) == len(clauses):
      without.append(policy)
    else:
      gaps += untried
    for clause, row in clauses.items():
      if row["breaks"] or row["failed"] or row["unscored"]:
        passed = f"{row['passed']} of {row['breaks']}"
        failed = f"{row['failed']} of {row['keeps']}"
        lines.append(f"{clause:16s} {passed:>21s} {failed:>20s}  {row['unscored']:8d}")
  if lines:
    head = "clause           passes what breaks it  fails what keeps it  unscored"
    lines.insert(0, head)
  how = 'lines "  - Breaks:" and "  - Keeps:", as in specs/README.md'
  if without:
    lines.append(
      f"{', '.join(without)}: no probes of its own: this says nothing of whether the "
      f"judge knows your rules ({how})"
    )
  if gaps:
    lines.append(
      f"{', '.join(gaps)}: no answer that breaks them: whether the judge knows these "
      "is not tried"
    )
  return lines


def _interval(ends: list[float] | None, form: str = ".1%") -> str:
  return "" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"
