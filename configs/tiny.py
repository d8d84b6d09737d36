"""A minute or some on a CPU: the whole pipeline with a tiny random model, for tests.

  python -m dalign.main --config=configs/tiny.py --workdir=runs/tiny

An untrained model draws bytes at random, so the think block is closed by one byte. The
teacher is a recorded one, of whose samples the filter keeps some; every other part is
the quickstart's.
"""

import importlib.util
import pathlib

import ml_collections


def get_config(size: str = "") -> ml_collections.ConfigDict:
  """The quickstart's config, small, whatever the size that is asked for."""
  del size
  path = pathlib.Path(__file__).with_name("quickstart.py")
  module = importlib.util.spec_from_file_location("quickstart", path)
  quickstart = importlib.util.module_from_spec(module)
  module.loader.exec_module(quickstart)
  c = quickstart.get_config()
  c.recipe = ""  # its numbers say nothing, and nobody cites them
  c.model = dict(
    path="random",
    date="",
    random=dict(
      width=32,
      layers=2,
      heads=4,
      kv_heads=2,
      head_dim=8,
      ffw=64,
      rope_theta=10000.0,
      norm_eps=1e-5,
      tied=True,
      max_length=8192,
    ),
  )
  c.compute.update(dict(dtype="float32", remat=False))
  c.sampler.update(
    dict(slots=16, lanes=2, prompt_room=512, prompt_step=256, prefix_step=512)
  )
  c.think = dict(used=True, open='<think>\n"{prompt}"', close="(")
  c.generate.update(
    dict(
      prompts=dict(refuse=9, safe_complete=2, comply=9),
      helpful=2,
      capability=2,
      demonstrations=1,
      most=4,
      max_new=256,
    )
  )
  c.filter.least = 0
  c.sft.update(dict(epochs=1, worked=True, capability=4, checkpoint_every=2))
  c.sft.batch = dict(micro=2, rows=8, length=1536)
  c.distill = quickstart.distillation(
    steps=2,
    prompts=8,
    capability=1,
    max_new=96,
    probed=4,
    teacher_length=4096,
    batch=dict(micro=2, rows=4, length=2048),
    checkpoint_every=1,
  )
  c.reward.update(dict(steps=3, rows=8, length=512, held_out=0.15, checkpoint_every=2))
  c.rl.update(
    dict(
      reward="model",
      steps=2,
      prompts=8,
      expected=("refuse", "safe_complete", "comply"),
      capability=1,
      judge_errors=1.0,  # its reward model has learned nothing
      max_new=96,
      checkpoint_every=1,
      audit=4,
    )
  )
  c.rl.batch = dict(micro=2, rows=4, length=2048)
  c.eval.update(
    dict(least=0, prompts=9, helpful=2, capability=2, max_new=256, trials=100)
  )
  return c
