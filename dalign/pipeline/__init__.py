"""The method as a pipeline: one function a stage, each from artefact to artefact.

generate -> filter -> sft -> reward -> rl -> eval -> report
"""

import pathlib

import jax

from dalign import config as configs
from dalign import report
from dalign.pipeline import context
from dalign.pipeline import evaluate
from dalign.pipeline import filter as filtering
from dalign.pipeline import generate
from dalign.pipeline import reward
from dalign.pipeline import rl
from dalign.pipeline import sft


def write_report(run: context.Run) -> None:
  """artefacts -> report.html"""
  context.say(f"report: {report.write_report(run.store.workdir)}")


STAGES = {  # the order is the method
  "generate": generate.generate,
  "filter": filtering.filter_,
  "sft": sft.finetune,
  "reward": reward.train_reward,
  "rl": rl.reinforce,
  "eval": evaluate.evaluate,
  "report": write_report,
}


def run(cfg: configs.Config, workdir: pathlib.Path) -> None:
  """Runs the stages that the config asks for, in order."""
  here = context.Run(cfg, workdir)
  here.store.write_json(here.store.workdir / "config.json", configs.flat(cfg))
  with jax.set_mesh(here.mesh):
    for stage in configs.chosen_stages(cfg.stages):
      STAGES[stage](here)
  here.metrics.close()
