"""Kernels of others for whole lines: equal to our attention where they run."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config.model import MeshConfig
from dalign.models import attention
from dalign.models import kernels
from dalign.models import param_tree
from dalign.models import sharding
from dalign.models import transformer
from tests.helpers import python

B, N, K, H = 2, 6, 2, 64
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")
KERNELS = {
  "cudnn, its masks and layouts by XLA": (
    functools.partial(kernels.cudnn, implementation="xla"),
    jnp.bfloat16,
  ),
  "splash, interpreted": (
    functools.partial(kernels.splash, interpret=True),
    jnp.float32,
  ),
}
WAYS = [*KERNELS.values(), pytest.param(kernels.cudnn, jnp.bfloat16, marks=on_gpu)]
NAMES = [*KERNELS, "cudnn"]


def numbers(T: int):
  rng = np.random.default_rng(0)
  shapes = (B, N, T, H), (B, K, H, T), (B, K, T, H), (B, N, T, H)
  return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def trees(T: int):
  """A front with two leaves and padding; and one row with a leaf in its middle."""
  ends = np.zeros((B, T), np.int32)
  ends[0, : T // 3] = T - 10
  ends[0, T // 3 : T // 2] = T // 2
  ends[0, T // 2 : T - 10] = T - 10
  ends[1] = T
  ends[1, T // 4 : T // 3] = T // 3
  return jnp.asarray(ends)


@pytest.mark.parametrize("T", [151, 256])
@pytest.mark.parametrize("masked", [False, True], ids=["rows", "trees"])
@pytest.mark.parametrize(("kernel", "dtype"), WAYS, ids=NAMES)
def test_a_kernel_and_its_gradients_equal_ours(kernel, dtype, masked, T):
  *args, weight = numbers(T)
  ends = trees(T) if masked else None

  def run(kernel):
    def loss(q, k, v):
      line = attention.Line(k=k, v=v, sight=attention.Visibility(ends=ends))
      out = attention.attend(q, (line,), dtype, kernel)
      return jnp.sum(out * weight), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)

  near = 2e-5 if dtype == jnp.float32 else 0.06
  for got, want in zip(*map(jax.tree.leaves, (run(kernel), run(None))), strict=True):
    np.testing.assert_allclose(got, want, atol=near)


def test_a_line_joined_with_a_prefix_is_not_left_to_a_kernel():
  q, k, v, _ = numbers(64)
  line = attention.Line(k=k, v=v, sight=attention.Visibility())
  front = attention.Part(k=k[:1], v=v[:1], mask=jnp.ones((1, 1, 64), bool))

  def never(*_):
    raise AssertionError("a kernel was asked for what it cannot do")

  attention.attend(q, (front, line), jnp.float32, never)
  with pytest.raises(AssertionError):
    attention.attend(q, (line,), jnp.float32, never)


@pytest.mark.parametrize("masked", [False, True], ids=["rows", "trees"])
@pytest.mark.parametrize("T", [151, 256])
def test_cudnn_takes_our_lines(T, masked, monkeypatch):
  """Lowered for a GPU that is not there, past all that JAX checks of shapes."""
  stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91200)
  monkeypatch.setattr(stablehlo, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda _: False)
  *args, _ = numbers(T)
  ends = trees(T) if masked else None

  def loss(q, k, v):
    line = attention.Line(k=k, v=v, sight=attention.Visibility(ends=ends))
    return jnp.sum(attention.attend(q, (line,), jnp.bfloat16, kernels.cudnn))

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*args)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  name = "__cudnn$fmhaScaleBiasSoftmax" if masked else "__cudnn$fmhaSoftmax"
  assert f"{name}(" in text and f"{name}Backward(" in text


def test_cudnn_refuses_float32():
  q, k, v, _ = numbers(64)
  with pytest.raises(ValueError, match="set config.compute.kv_dtype to bfloat16"):
    kernels.cudnn(q, k, v, None, jnp.dtype("float32"))


def test_by_parts_gives_each_device_its_own_and_keeps_whole_what_does_not_divide():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
  seen = []

  def fn(q, k, mask):
    seen.append((q.shape, k.shape, mask))
    return q * 2 + jnp.sum(k)

  axes = ("batch", "heads"), ("batch", "kv_heads"), None

  def run(q, k):
    with jax.set_mesh(mesh):
      call = functools.partial(sharding.shard_map_by_axes, fn, axes, axes[0])
      return jax.jit(lambda q, k: call((q, k, None)))(q, k)

  run(jnp.ones((4, 8)), jnp.ones((4, 2)))
  assert seen.pop() == ((2, 4), (2, 1), None)
  run(jnp.ones((4, 9)), jnp.ones((4, 2)))  # heads that share keys stay together
  assert seen.pop() == ((2, 9), (2, 2), None)
  run(jnp.ones((3, 8)), jnp.ones((3, 2)))
  assert seen.pop() == ((3, 4), (3, 1), None)


def test_the_model_is_the_same_with_splash_alone_and_on_a_mesh(
  cfg, compute, params, monkeypatch
):
  interpreted = functools.partial(kernels.splash, interpret=True)
  monkeypatch.setitem(kernels.KERNELS, "splash", interpreted)
  rng = np.random.default_rng(0)
  T = 40
  batch = {
    "tokens_BT": rng.integers(0, cfg.vocab, (4, T)).astype(np.int32),
    "positions_BT": np.tile(np.arange(T, dtype=np.int32), (4, 1)),
    "ends_BT": np.concatenate([trees(T)] * 2),
  }

  def grads(attention: str, mesh=None):
    how = dataclasses.replace(compute, attention=attention, remat=True)

    def loss(params, batch):
      wanted = jnp.ones((4, T - 1), bool)
      found = transformer.target_stats(params, batch, wanted, cfg=cfg, compute=how)
      return -jnp.sum(found.logp)

    run = jax.jit(jax.grad(loss))
    if mesh is None:
      return run(params, batch)
    placed = sharding.shardings(mesh, param_tree.logical_axes(params), params)
    with jax.set_mesh(mesh):
      return run(jax.device_put(params, placed), batch)

  want = grads("xla")
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
  for got in (grads("splash"), grads("splash", mesh)):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)


AOT = """
import dataclasses

import jax, jax.numpy as jnp
from jax.experimental import topologies
from dalign.config.model import MeshConfig
from dalign.models import sharding
from dalign.models import transformer
from dalign.training import sft
from dalign.training import train
from tests.helpers import MODEL
from tests.helpers import tiny

cfg = dataclasses.replace(MODEL, width=256, head_dim=64, ffw=512, vocab=1024)
compute = dataclasses.replace(
  tiny().compute, dtype="bfloat16", kv_dtype="bfloat16", attention="splash", remat=True
)
chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), chips.devices)
tx = train.make_optimizer(tiny().sft.optimizer, steps=10)
init = lambda: transformer.init(jax.random.key(0), cfg=cfg, compute=compute)
loss = sft.make_loss(cfg=cfg, compute=compute)
program = train.program(loss, tx, mesh, jax.eval_shape(init))

def lines(name, dtype):
  shape = jax.ShapeDtypeStruct((2, 4, 512), dtype)
  place = sharding.batch_sharding(mesh, name, shape, lead=1)
  return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=place)

names = "tokens_BT", "positions_BT", "ends_BT"
batch = {name: lines(name, "int32") for name in names}
batch["weight_BT"] = lines("weight_BT", "float32")
key, used = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(1)))
with jax.set_mesh(mesh):
  made = program.jitted.lower(program.state, batch, key, used, {}).compile()
print("kernels", sum("tpu_custom_call" in x for x in made.as_text().splitlines()))
"""


def test_a_training_step_with_splash_compiles_for_a_tpu_mesh():
  pytest.importorskip("libtpu", reason="no libtpu: pip install 'jax[tpu]'")
  quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
  done = python("-c", AOT, env=os.environ | quiet)
  assert done.returncode == 0, done.stderr[-3000:]
  assert int(done.stdout.split()[-1]) >= 3  # forward, and queries and keys backward
