"""lessons -> base/params: the helpful-only base of a world (stage 0), from scratch, or
as one run of this recipe left it and as it comes with dalign."""

import functools
import hashlib
import json
import pathlib
import random
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from dalign.config import stages
from dalign.config.training import WorldConfig
from dalign.formats import weights
from dalign.runs import progress
from dalign.stages import services
from dalign.tasks import lessons
from dalign.tasks import world
from dalign.text import chat_template
from dalign.text import packing
from dalign.training import checkpoints
from dalign.training import sft
from dalign.training import train

Run = services.Services[stages.BaseStage]  # what this stage sees of a run

# Parameters that `train_base` left, and in the header by what recipe, seed and code.
_TASKS = pathlib.Path(__file__).parents[1] / "tasks"
BUNDLED = {  # by the depth of their world
  1: _TASKS / "world_base.safetensors",
  4: _TASKS / "deep_world_base.safetensors",
}
FILL = 0.9  # of the tokens of a batch are drawn; packing leaves some room
# Keys of the config that no parameter of a base depends on (lessons have specifications
# of their own, never the run's), or only through the lessons, which `recipe` hashes.
BESIDES = ("world.spec", "world.depth", "world.base", "world.checkpoint_every")


def make_base(run: Run) -> None:
  """The base that the config asks for, trained or taken from the package."""
  if run.cfg.lessons.base == "train":
    train_base(run)
  else:
    take_bundled(run)


def take_bundled(run: Run) -> None:
  """The base that comes with dalign; ValueError where the run's recipe is another."""
  depth = run.cfg.lessons.depth
  if depth not in BUNDLED:
    raise ValueError(
      f"config.world.base: no base of depth {depth} comes with dalign, only of depth "
      f"{' and '.join(map(str, BUNDLED))}; train one with --config.world.base=train"
    )
  header = bundled_header(depth)
  made_by, own = json.loads(header["recipe"]), recipe(run)
  differing = [key for key in own | made_by if own.get(key) != made_by.get(key)]
  if differing:
    raise ValueError(
      "config.world.base: the base that comes with dalign was made by another recipe: "
      f"{', '.join(sorted(differing))} differ; take its values, or train one with "
      "--config.world.base=train"
    )
  if not run.begin([BUNDLED[depth]]):
    return
  leaves = safetensors_numpy.load_file(BUNDLED[depth])
  saved = weights.Checkpoint(
    run.model.arch, run.model.tok, lambda leaf, index: leaves[leaf][index]
  )
  abstract = run.model.abstract_on_mesh(run.model.shapes)
  params = saved.params(jax.tree.map(lambda x: x.sharding, abstract))
  checkpoints.save_params(run.store.path("base", "params"), params)
  run.finish({"trained_by": header["code_version"], "seed": int(header["seed"])})


def bundled_header(depth: int = 1) -> dict[str, str]:
  """Of a base that comes with dalign "recipe", as JSON, "seed" and "code_version"."""
  with safetensors.safe_open(BUNDLED[depth], "numpy") as file:
    return file.metadata()


def recipe(run: Run) -> dict[str, Any]:
  """What a base depends on but the seed, as JSON has it: sizes, lessons and optimizer,
  and a hash of the tokens of some lessons, which says what the world is like."""
  kept = stages.manifest_config(run.cfg)
  values = {
    key: value
    for key, value in kept.items()
    if key.startswith(("model.random", "world.")) and key not in BESIDES
  }
  rng = random.Random(0)
  rows = [
    _row(run, lesson(rng, depth=run.cfg.lessons.depth))
    for lesson in lessons.LESSONS.values()
    for _ in "x" * 50
  ]
  tokens = json.dumps(rows).encode()
  return json.loads(
    json.dumps(values | {"lessons": hashlib.sha256(tokens).hexdigest()})
  )


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
    lesson = teach[rng.choices(names, shares)[0]](rng, depth=cfg.depth)
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
