"""lessons -> base/params: the helpful-only base of a world, from scratch (stage 0)."""

import functools

import numpy as np

from dalign.config import stages
from dalign.config.training import WorldConfig
from dalign.runs import progress
from dalign.stages import services
from dalign.tasks import lessons
from dalign.tasks import world
from dalign.text import chat_template
from dalign.text import packing
from dalign.training import sft
from dalign.training import train

Run = services.Services[stages.BaseStage]  # what this stage sees of a run

FILL = 0.9  # of the tokens of a batch are drawn; packing leaves some room


def train_base(run: Run) -> None:
  """Trains the base on lessons that follow from the seed and the step."""
  cfg = run.cfg.lessons
  if not run.begin([]):
    return
  params = run.model.fresh_params()
  for name in ("o", "down"):  # each layer adds little at first
    params["layers"][name] *= 0.3
  trainer = run.trainer(
    params=params,
    loss=sft.make_loss(cfg=run.model.arch, compute=run.cfg.compute),
    optimizer=cfg.optimizer,
    steps=cfg.steps,
    every=cfg.checkpoint_every,
  )
  left_out = trainer.meta.get("left_out", 0)
  with trainer, progress.bar(cfg.steps, "base", "step", trainer.step) as bar:
    while trainer.step < cfg.steps:
      batch, used, lost = _batch(run, cfg, trainer.step)
      values = trainer.update(batch, used, {"base/left_out": lost})
      left_out += lost
      trainer.meta["left_out"] = left_out
      trainer.save()
      bar.set_postfix(loss=f"{values['loss']:.3f}", acc=f"{values['accuracy']:.3f}")
      bar.update()
  trainer.finish()
  run.finish({"steps": cfg.steps, "left_out": left_out})


def _batch(run: Run, cfg: WorldConfig, step: int):
  """The micro-batches of a step, full but for what packing leaves, how many of them
  are used, and how many lessons that were drawn found no line."""
  rng = world.rng_of("lessons", run.cfg.seed, step)
  teach = lessons.LESSONS | {
    "free": functools.partial(lessons.free, declines=cfg.declines)
  }
  mix = cfg.first_lessons if step < cfg.first_share * cfg.steps else cfg.lessons
  names, shares = [*mix], [*mix.values()]
  rows, size = [], 0
  room = cfg.batch.micro * cfg.batch.rows
  while size < FILL * room * cfg.batch.length:
    lesson = teach[rng.choices(names, shares)[0]](rng)
    rows.append(_row(run, lesson))
    size += len(rows[-1][0])
  packed = packing.pack(rows, length=cfg.batch.length)
  lines = packed.lines | {"weight_BT": packed.weight_BT}
  fitting_lines = {name: np.asarray(x[:room]) for name, x in lines.items()}
  dropped = int(sum(line >= room for line, _, _ in packed.where))
  return *train.micro_batches(fitting_lines, cfg.batch), dropped


def _row(run: Run, lesson: lessons.Lesson):
  before = chat_template.render_chat(run.model.tok, list(lesson.turns))
  own = [*run.model.tok.encode(lesson.completion), run.model.tok.end_id]
  return before + own, [0.0] * len(before) + [1.0] * len(own)
