"""dalign's turn: all works."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turn
from benchmarks import works
from dalign.config.model import Compute
from dalign.config.model import SamplerConfig
from dalign.config.on_policy import ObjectiveConfig
from dalign.config.training import OptimizerConfig
from dalign.formats import weights
from dalign.models import ops
from dalign.sampling import sampler as sampling
from dalign.text import packing
from dalign.training import advantages
from dalign.training import policy_gradient
from dalign.training import rollout
from dalign.training import sft
from dalign.training import train

OPTIMIZER = OptimizerConfig(
  learning_rate=1e-5,
  warmup_share=0.0,
  final_share=1.0,
  beta1=0.9,
  beta2=0.999,
  weight_decay=0.0,
  matrix_rate=0.0,
  clip_norm=1.0,
  skip_norm=0.0,
  stop_norm=0.0,
)

OBJECTIVE = ObjectiveConfig(
  advantages="rloo",
  whiten=False,
  ratio="token",
  clip_low=1.0,
  clip_high=1e6,
  ratio_cap=2.0,
  mean="constant",
  length_norm=1.0,
  kl="reward",
  kl_weight=0.04,
  gae_lambda=1.0,
  value_weight=0.0,
  overlong=0,
  mask_truncated=False,
)


def main() -> None:
  """Runs the turn that the command line asks for."""
  asked = turn.settings()
  dtype = {"f32": "float32", "bf16": "bfloat16"}[asked.dtype]
  compute = Compute(
    dtype=dtype, kv_dtype="float32", attention="xla", remat=False, logits_chunk=512
  )
  cfg, params, _ = weights.load(asked.model)
  params = jax.tree.map(jnp.asarray, params)
  work = works.WORKS[asked.work]
  version = turn.versions("jax", "flax", "optax")
  if isinstance(work, works.Decode):
    decode(work, asked, cfg, compute, params, version)
  elif isinstance(work, works.Train):
    step = sft_step(work, cfg, dataclasses.replace(compute, remat=work.remat), params)
    start = turn.first(step)
    turn.answer(start=start, runs=turn.measure(step, asked.repeats), version=version)
  else:
    step = RLStep(work, cfg, compute, params)
    start = turn.first(step)
    runs = turn.measure(step, asked.repeats)
    turn.answer(start=start, runs=runs, version=version, parts=step.parts)


def decode(work: works.Decode, asked, cfg, compute, params, version: str) -> None:
  """All rows through the slots; as "static", one batch after the other."""
  rows, lengths = work.rows(), work.lengths()
  engine = make_sampler(cfg, compute, work.batch, 8, work.own[1], work.shared)
  prepared = engine.prepare(params)

  def run(whole: bool):
    requests = [
      sampling.Request(tokens=tuple(row), row_id=i, max_new=n if whole else 1)
      for i, (row, n) in enumerate(zip(rows, lengths, strict=True))
    ]
    size = work.batch if asked.variant == "static" else len(requests)
    done = {}
    for at in range(0, len(requests), size):
      for c in engine.run(
        prepared,
        [requests[at : at + size]],
        key=jax.random.key(0),
        temperature=0.0,
        prefix_room=work.shared,
        prompt_room=work.own[1],
        max_new=work.new[1],
      ):
        done[c.request.row_id] = c.tokens
    return [done[i] for i in range(len(requests))]

  turn.decode(run, asked.repeats, version=version)


def make_sampler(
  cfg, compute, slots: int, prefill: int, own: int, shared: int
) -> sampling.Sampler:
  """One lane whose rows end only at their length."""
  shape = SamplerConfig(
    slots=slots,
    lanes=1,
    chunk=8,
    prefill=prefill,
    prompt_room=own,
    prompt_step=64,
    prefix_step=max(shared, 64),
  )
  return sampling.Sampler(cfg=cfg, compute=compute, stop_ids=(), sampler=shape)


def trainer(loss, params):
  """`step(batch) -> metrics` on a state that takes the parameters over, and the state's
  parameters."""
  tx = train.make_optimizer(OPTIMIZER, steps=1000)
  update = jax.jit(train.make_update(loss, tx), donate_argnums=0)
  state = [train.create(params, tx)]

  def step(batch: dict):
    used = len(batch["tokens_BT"])
    state[0], metrics = update(state[0], batch, jax.random.key(0), used)
    return jax.block_until_ready(metrics)

  return step, lambda: state[0].params


def sft_step(work: works.Train, cfg, compute, params):
  """A step of SFT on new rows at each call."""
  step, _ = trainer(sft.make_loss(cfg=cfg, compute=compute), params)
  count = [0]

  def one():
    rows = [(row.tolist(), [1.0] * work.length) for row in work.rows(count[0])]
    packed = packing.pad_rows(rows, length=work.length)
    batch = packed.lines | {"weight_BT": packed.weight_BT}
    step({name: x[None] for name, x in batch.items()})
    count[0] += 1

  return one


class RLStep:
  """Rollout, reward, reference and update, on new prompts at each call."""

  def __init__(self, work: works.Reinforce, cfg, compute, params):
    self.work, self.reference, self.count = work, params, 0
    rows = work.prompts * work.samples
    self.engine = make_sampler(cfg, compute, rows, work.prompts, work.prompt, 0)
    make = functools.partial(
      policy_gradient.make_loss, cfg=cfg, compute=compute, temperature=1.0
    )
    loss = make(objective=dataclasses.replace(OBJECTIVE, length_norm=float(work.new)))
    self.update, self.params = trainer(loss, jax.tree.map(jnp.copy, params))
    self.score = jax.jit(
      policy_gradient.make_score(cfg=cfg, compute=compute, temperature=1.0)
    )
    self.parts: dict[str, float] = {}

  def __call__(self) -> None:
    work = self.work
    with turn.Timer() as generation:
      done = self._rollout()
    with turn.Timer() as reference:
      batch, places = self._batch(done)
      scored = batch | {"wanted_BT": batch["sampled_BT"]}
      known_BT = np.asarray(self.score(self.reference, scored))
    kl_BT = batch["behaviour_BT"] - known_BT
    judged_R = np.array([works.reward(c.tokens) for c in done])
    kl_NT = np.stack([kl_BT[place] for place in places])
    shape = work.prompts, work.samples
    batch["advantage_BT"] = np.zeros(kl_BT.shape, np.float32)
    advantage_NT, _ = advantages.token_advantages(
      OBJECTIVE,
      judged_R.reshape(shape),
      np.ones(shape, bool),
      kl_NT,
      np.ones(kl_NT.shape, bool),
    )
    for place, own in zip(places, advantage_NT, strict=True):
      batch["advantage_BT"][place] = own
    with turn.Timer() as update:
      self.update({name: x[None] for name, x in batch.items()})
    self.parts = {"rollout": generation.s, "reference": reference.s, "update": update.s}
    self.count += 1

  def _rollout(self) -> list[sampling.Completion]:
    work = self.work
    requests = [
      sampling.Request(tokens=tuple(row), row_id=i * work.samples + r, max_new=work.new)
      for i, row in enumerate(work.rows(self.count))
      for r in range(work.samples)
    ]
    done = self.engine.run(
      self.engine.prepare(self.params()),
      [requests],
      key=ops.stream(jax.random.key(0), "rollout", self.count),
      temperature=1.0,
      prefix_room=0,
      prompt_room=work.prompt,
      max_new=work.new,
    )
    return sorted(done, key=lambda c: c.request.row_id)

  def _batch(self, done: list[sampling.Completion]) -> tuple[dict, list]:
    """A line a prompt, with all its samples behind it; and where each sample lies."""
    work = self.work
    rows = [
      ([*c.request.tokens, *c.tokens], [0.0] * work.prompt + [1.0] * work.new)
      for c in done
    ]
    packed = packing.pack(rows, length=work.prompt + work.samples * (work.new + 1))
    shape = packed.tokens_BT.shape
    more = rollout.scatter_to_packed(
      shape, packed.where, behaviour=[c.logp for c in done]
    )
    more |= {"sampled_BT": packed.weight_BT > 0}
    more |= {"left_out_B": np.zeros(shape[0], np.float32)}
    places = [
      (b, slice(start + n - work.new, start + n)) for b, start, n in packed.where
    ]
    return packed.lines | more, places


if __name__ == "__main__":
  main()
