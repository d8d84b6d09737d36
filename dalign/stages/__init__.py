"""The method as a pipeline: one function a stage, each from artefact to artefact.

[base ->] generate -> filter -> sft [-> distill] -> reward -> rl -> eval -> report
-> export
"""

from collections.abc import Callable
import contextlib
import datetime
import pathlib

import jax

from dalign.config import convert
from dalign.config import stages as declared
from dalign.config.schema import Config
from dalign.config.schema import chosen_stages
from dalign.evaluation import report
from dalign.formats import hub
from dalign.runs import distributed
from dalign.runs import progress
from dalign.runs import store
from dalign.runs.workdir import Store
from dalign.stages import ablate
from dalign.stages import base
from dalign.stages import distill
from dalign.stages import evaluate
from dalign.stages import export
from dalign.stages import filter as filtering
from dalign.stages import generate
from dalign.stages import rehearsal
from dalign.stages import reward
from dalign.stages import rl
from dalign.stages import services
from dalign.stages import sft


def write_report(run: services.Services[declared.ReportStage]) -> None:
  """artefacts -> report.html"""
  _report(run.store.workdir)


def _report(workdir: pathlib.Path) -> None:
  distributed.run_on_first("report", report.write_report, workdir)
  progress.say(f"report: {workdir / 'report.html'}")


STAGES: dict[str, Callable] = {  # the order is the method
  "base": base.make_base,
  "generate": generate.generate,
  "filter": filtering.filter_,
  "sft": sft.finetune,
  "distill": distill.distill,
  "reward": reward.train_reward,
  "rl": rl.reinforce,
  "eval": evaluate.evaluate,
  "report": write_report,
  "export": export.export,
}


def run(cfg: Config, workdir: pathlib.Path) -> None:
  """Runs the stages that the config asks for, in order; or all of its arms."""
  cfg = _pinned(cfg, workdir)
  if cfg.ablation:
    ablate.ablate(cfg, workdir, run_stages)
    _report(workdir)
  else:
    run_stages(cfg, workdir, {}, chosen_stages(cfg.stages))


def run_stages(
  cfg: Config,
  workdir: pathlib.Path,
  shared: dict[str, pathlib.Path],
  stages: tuple[str, ...],
) -> None:
  """Runs some stages; `shared` has the workdirs of those that were run elsewhere."""
  distributed.check_same("config", convert.flat(cfg))
  work = services.Workspace(cfg, workdir, shared)
  work.metrics.check_packages()
  with (
    work.store.hold_workdir(),
    contextlib.closing(work.metrics),
    jax.set_mesh(work.mesh),
  ):
    written = work.store.workdir / "config.json"
    before = _read(work.store, written)
    work.store.write_json(written, convert.to_json(cfg))
    if not written.exists():
      raise ValueError(
        f"{work.store.workdir}: the first process wrote here and this one sees "
        "nothing; wanted a --workdir on a file system that all hosts share"
      )
    try:
      done = [
        stage
        for stage in stages
        # Of a stage that is done again nothing is read, which may be damaged.
        if not cfg.start_over and (work.store.manifest(stage) or {}).get("finished")
      ]
      rehearsal.check_prompts_render(
        cfg, work, [stage for stage in stages if stage not in done]
      )
      for stage in stages:
        if stage == "base" and cfg.world is None:
          continue  # only a world's base is trained here
        if stage == "distill" and cfg.distill is None:
          continue  # one of "all"
        STAGES[stage](services.of(declared.STAGES[stage], cfg, work))
    except ValueError:
      # Nothing is of this config, and chat and serve want the other. Without others.
      if before and not work.opened and distributed.is_first_process():
        store.write_json(written, before)
      raise


def _pinned(cfg: Config, workdir: pathlib.Path) -> Config:
  """The config with the day on which the run began, in this command or an earlier, and
  the commits that names on the Hub had then."""
  arms = cfg.ablation
  first = workdir / f"seed-{arms.seeds[0]}" / "shared" if arms else workdir
  before = _read(Store(first), first / "config.json")
  before = before if isinstance(before, dict) else {}
  began = before.get("model.date")
  asked = cfg.model.date
  if began and asked and began != asked and not cfg.start_over:
    raise ValueError(
      f"config.model.date: this run began with {began}, got {asked}; leave it out, or "
      "use another --workdir"
    )
  today = datetime.datetime.now(datetime.UTC).date().isoformat()
  day = asked or began or distributed.broadcast(today)
  model, grader = (
    distributed.broadcast(hub.pinned(path, str(before.get(name, ""))))
    for name, path in (
      ("model.path", cfg.model.path),
      ("eval.grader_model", cfg.eval.grader_model),
    )
  )
  changes = {"model": {"date": day, "path": model}, "eval": {"grader_model": grader}}
  return convert.changed(cfg, changes)


def _read(kept: Store, path: pathlib.Path) -> dict | None:
  """The config of the command before, or None."""
  try:
    return kept.read_json(path) if kept.has(path) else None
  except ValueError:
    progress.say(f"{path} is damaged and written anew")
    return None
