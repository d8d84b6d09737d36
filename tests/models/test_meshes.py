"""Every mesh gives the numbers of one device: losses, gradients, and sampled tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from dalign.config.model import MeshConfig
from dalign.config.model import SamplerConfig
from dalign.formats import weights
from dalign.models import param_tree
from dalign.models import sharding
from dalign.sampling.sampler import Request
from dalign.sampling.sampler import Sampler
from dalign.text import packing
from dalign.training import policy_gradient
from dalign.training import sft
from dalign.training import train
from tests.helpers import MODEL
from tests.helpers import tiny

DENSE = dataclasses.replace(MODEL, vocab=96, heads=8)
# Experts, sinks, windows and biases at once.
SPARSE = dataclasses.replace(
  DENSE,
  tied=False,
  family="gpt_oss",
  activation="clipped",
  biased=("q", "k", "v", "o", "router", "gate", "up", "down"),
  window=7,
  sliding=(0,),
  sinks=True,
  experts=4,
  experts_used=2,
)
MODELS = {"dense": DENSE, "sparse": SPARSE}
OPTIMIZER = dataclasses.replace(
  tiny().sft.optimizer,
  **dict(learning_rate=1e-3, matrix_rate=0.0, warmup_share=0.0, final_share=1.0),
  **dict(beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0),
)
SHAPES = SamplerConfig(
  slots=8, lanes=2, chunk=5, prefill=4, prompt_room=16, prompt_step=8, prefix_step=4
)
MESHES = [
  ("dense", dict(data=8)),
  ("dense", dict(fsdp=8)),
  ("dense", dict(tensor=8)),
  ("dense", dict(data=2, fsdp=2, tensor=2)),
  ("dense", dict(data=4, tensor=2)),
  ("dense", dict(sequence=8)),
  ("dense", dict(fsdp=2, tensor=2, sequence=2)),
  ("sparse", dict(expert=4, data=2)),
  ("sparse", dict(fsdp=2, tensor=2, expert=2)),
]
KEY = jax.random.key(3)


def mesh_of(**sizes):
  cfg = MeshConfig(**dict(data=1, fsdp=1, tensor=1) | sizes)
  return sharding.make_mesh(cfg, jax.devices()[: np.prod([*sizes.values()], dtype=int)])


def rows(cfg):
  rng = np.random.default_rng(0)
  sizes = [(5, 9), (3, 21), (8, 12), (2, 2), (6, 1), (4, 7), (1, 23), (6, 7)]
  return [
    (rng.integers(0, cfg.vocab, p + n).tolist(), [0.0] * p + [1.0] * n)
    for p, n in sizes
  ]


def lay(params, mesh):
  axes = param_tree.logical_axes(params)
  return jax.device_put(params, sharding.shardings(mesh, axes, params))


def trained(cfg, compute, mesh):
  """Two updates of SFT: the mean loss of each, the parameters, what was compiled."""
  params = weights.random_model(cfg, 0)
  tx = train.make_optimizer(OPTIMIZER, steps=10)
  packed = packing.pad_rows(rows(cfg), length=24)
  batch = packed.lines | {"weight_BT": packed.weight_BT}
  batch = {name: x[None] for name, x in batch.items()}
  losses = []
  with jax.set_mesh(mesh):
    loss = sft.make_loss(cfg=cfg, compute=compute)
    program = train.program(loss, tx, mesh, params)
    state = program.create(lay(params, mesh))
    first = state.params["layers"]["q"]
    for _ in range(2):
      state, metrics = program.update(state, batch, KEY, 1)
      losses.append([float(metrics[name].value()) for name in ("loss", "grad_norm")])
  assert program.jitted._cache_size() == 1
  assert first.is_deleted()  # its memory is the new state's
  assert state.params["layers"]["q"].sharding == first.sharding
  return np.array(losses), jax.device_get(state.params)


def scored(cfg, compute, mesh):
  """Log-probabilities of packed rows."""
  packed = packing.pack(rows(cfg), length=32, rows_multiple=8)
  batch = packed.lines | {"wanted_BT": packed.ends_BT > 0}
  score = jax.jit(policy_gradient.make_score(cfg=cfg, compute=compute, temperature=1.0))
  with jax.set_mesh(mesh):
    return np.asarray(score(lay(weights.random_model(cfg, 0), mesh), batch))


def sampled(cfg, compute, mesh):
  """Greedy and random completions of two groups that share fronts, by row id."""
  rng = np.random.default_rng(1)
  groups = []
  for g in range(2):
    front = rng.integers(0, cfg.vocab, 9).tolist()
    tails = [rng.integers(0, cfg.vocab, n).tolist() for n in (2, 7, 4, 4, 1, 6)]
    groups.append(
      [
        Request(tokens=tuple(front + tail), row_id=10 * g + i, max_new=8 + i)
        for i, tail in enumerate(tails)
      ]
    )
  decode = Sampler(
    cfg=cfg,
    compute=compute,
    stop_ids=(5,),
    sampler=SHAPES,
    mesh=mesh if mesh.size > 1 else None,
  )
  out = {}
  with jax.set_mesh(mesh):
    ready = decode.prepare(lay(weights.random_model(cfg, 0), mesh))
    for temperature in (0.0, 1.0):
      how = dict(key=KEY, prefix_room=12, prompt_room=16, max_new=16)
      if temperature:
        before = decode.chunk._cache_size()
      for done in decode.run(ready, groups, temperature=temperature, **how):
        out[temperature, done.request.row_id] = done
  assert decode.chunk._cache_size() == before
  return out


@pytest.fixture(scope="module")
def alone(compute):
  """What one device gives, for each model."""
  return {
    name: [fn(cfg, compute, mesh_of()) for fn in (trained, scored, sampled)]
    for name, cfg in MODELS.items()
  }


@pytest.mark.parametrize(
  "name, sizes",
  [
    # Those of three axes have every axis.
    pytest.param(n, s, id="-".join([n, *s]), marks=[pytest.mark.slow] * (len(s) < 3))
    for n, s in MESHES
  ],
)
def test_a_mesh_gives_the_numbers_of_one_device(name, sizes, alone, compute):
  cfg, mesh = MODELS[name], mesh_of(**sizes)
  assert mesh.size == 8
  (losses, params), logp_BT, completions = alone[name]
  got_losses, got_params = trained(cfg, compute, mesh)
  np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(got_params), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  np.testing.assert_allclose(scored(cfg, compute, mesh), logp_BT, atol=1e-5)
  got = sampled(cfg, compute, mesh)
  assert got.keys() == completions.keys()
  for i, want in completions.items():
    assert got[i].tokens == want.tokens, i
    np.testing.assert_allclose(got[i].logp, want.logp, atol=1e-5)


def test_parameters_and_caches_are_cut(compute):
  """No device holds more than its share of what is large."""
  mesh = mesh_of(fsdp=2, tensor=2, sequence=2)
  params = lay(weights.random_model(DENSE, 0), mesh)
  for name in ("q", "gate", "down"):
    leaf = params["layers"][name]
    assert leaf.addressable_shards[0].data.size * 4 == leaf.size
  decode = Sampler(cfg=DENSE, compute=compute, stop_ids=(), sampler=SHAPES, mesh=mesh)
  with jax.set_mesh(mesh):
    slots = decode.empty(SHAPES.slots, 16, 16)
  for cache in (*slots.prompt[0], *slots.fresh[1]):
    assert cache.addressable_shards[0].data.size * 8 == cache.size
  assert slots.out_BS.sharding.is_fully_replicated  # every process reads it
  experts = lay(weights.random_model(SPARSE, 0), mesh_of(expert=4, data=2))
  leaf = experts["layers"]["gate"]
  assert leaf.addressable_shards[0].data.shape == (2, 1, 32, 40)


def test_gradients_are_those_of_one_device(compute):
  """Before an optimizer has made them equal in size."""
  loss = sft.make_loss(cfg=SPARSE, compute=compute)
  packed = packing.pad_rows(rows(SPARSE), length=24)
  batch = packed.lines | {"weight_BT": packed.weight_BT}
  found = []
  for mesh in (mesh_of(), mesh_of(tensor=2, expert=2, sequence=2)):
    with jax.set_mesh(mesh):
      grad = jax.jit(jax.grad(lambda p: loss(p, batch, KEY)[0].total))
      found.append(jax.device_get(grad(lay(weights.random_model(SPARSE, 0), mesh))))
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))
    assert np.abs(b).max() > 1e-4
