"""LoRA: joined to the base it is what its sums say, and only it is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config.model import LoRAConfig
from dalign.formats import weights
from dalign.models import adapters
from dalign.models import param_tree
from dalign.models import transformer
from dalign.text import packing
from dalign.training import reward
from dalign.training import sft
from dalign.training import train
from tests.helpers import tiny

KEY = jax.random.key(0)
LORA = LoRAConfig(rank=3, alpha=12.0, leaves=("q", "v", "o", "down"), frozen="float32")
TOKENS = np.random.default_rng(7).integers(3, 97, 30).tolist()
OPTIMIZER = dataclasses.replace(
  tiny().sft.optimizer,
  **dict(learning_rate=1e-2, matrix_rate=0.0, warmup_share=0.0, final_share=1.0),
  **dict(beta1=0.9, beta2=0.95, weight_decay=0.0, clip_norm=1e9),
)


@pytest.fixture(scope="module")
def adapted(cfg):
  return dataclasses.replace(cfg, lora_scale=LORA.alpha / LORA.rank)


@pytest.fixture(scope="module")
def with_lora(adapted, params):
  """Parameters whose adapters are no longer zero."""
  made = adapters.attach(params, KEY, cfg=adapted, lora=LORA)
  rng = np.random.default_rng(1)

  def scatter(path, x):
    name = path[-1].key
    if not name.endswith(adapters.B):
      return x
    return jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.2)

  return jax.tree_util.tree_map_with_path(scatter, made)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def logits(params, tokens_BT, *, cfg, compute):
  hidden_BTD, _ = transformer.forward_rows(params, tokens_BT, cfg=cfg, compute=compute)
  return transformer.logits(params, hidden_BTD, cfg=cfg, compute=compute)


def test_new_adapters_change_nothing(params, adapted, compute):
  made = adapters.attach(params, KEY, cfg=adapted, lora=LORA)
  tokens_BT = jnp.asarray([TOKENS])
  got, want = (
    logits(p, tokens_BT, cfg=adapted, compute=compute) for p in (made, params)
  )
  np.testing.assert_array_equal(got, want)
  a = made["layers"]["down_lora_a"]
  assert a.shape == (2, 40, 3) and made["layers"]["down_lora_b"].shape == (2, 3, 32)
  assert 0.9 * 40**-0.5 < np.abs(a).max() <= 40**-0.5


def test_a_base_of_bfloat16_is_held_in_it(params, adapted, compute):
  """With no other result, in half the bytes."""
  base = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
  low = dataclasses.replace(LORA, frozen="bfloat16")
  made = [
    adapters.attach(adapters.cast_frozen(base, lora=lora), KEY, cfg=adapted, lora=lora)
    for lora in (LORA, low)
  ]
  tokens_BT = jnp.asarray([TOKENS])
  want, got = (logits(p, tokens_BT, cfg=adapted, compute=compute) for p in made)
  np.testing.assert_array_equal(got, want)
  kinds = {n: x.dtype for n, x in made[1]["layers"].items()}
  assert {str(kinds[n]) for n in ("q", "k", "gate", "down")} == {"bfloat16"}
  assert made[1]["embed"].dtype == jnp.bfloat16
  assert kinds["q_lora_a"] == kinds["attn_norm"] == jnp.float32
  decode = [transformer.unstack(p, cfg=adapted, compute=compute) for p in made]
  for a, b in zip(*map(jax.tree.leaves, decode), strict=True):
    np.testing.assert_array_equal(a, b.astype(a.dtype))


def test_merged_they_are_the_same_model(with_lora, params, adapted, compute):
  tokens_BT = jnp.asarray([TOKENS])
  got = logits(with_lora, tokens_BT, cfg=adapted, compute=compute)
  merged = adapters.merge_adapters(with_lora, cfg=adapted)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  want = logits(merged, tokens_BT, cfg=adapted, compute=compute)
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert (
    np.abs(got - logits(params, tokens_BT, cfg=adapted, compute=compute)).max() > 0.1
  )
  for i in range(2):  # against a plain sum
    a, b = (np.asarray(with_lora["layers"][f"q_lora_{x}"][i]) for x in "ab")
    want = np.asarray(params["layers"]["q"][i]) + 4.0 * a @ b
    np.testing.assert_allclose(merged["layers"]["q"][i], want, atol=1e-6)


def test_decoding_has_them_added(with_lora, adapted, compute):
  decode = transformer.unstack(with_lora, cfg=adapted, compute=compute)
  merged = transformer.unstack(
    adapters.merge_adapters(with_lora, cfg=adapted), cfg=adapted, compute=compute
  )
  assert jax.tree.structure(decode) == jax.tree.structure(merged)
  for a, b in zip(jax.tree.leaves(decode), jax.tree.leaves(merged), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_trees_are_split_and_joined(with_lora, params):
  made = reward.init_head(with_lora, KEY)
  trained, frozen = adapters.split(made)
  names = {f"{name}_lora_{part}" for name in LORA.leaves for part in "ab"}
  assert trained.keys() == {"trunk", "score"}
  assert trained["trunk"].keys() == {"layers"}
  assert trained["trunk"]["layers"].keys() == names
  assert frozen.keys() == {"trunk"}
  assert frozen["trunk"]["layers"].keys() == params["layers"].keys()
  joined = adapters.merge_trees(frozen, trained)
  assert jax.tree.structure(joined) == jax.tree.structure(made)
  for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(made), strict=True):
    assert a is b
  assert adapters.split(params) == (params, {})  # without adapters all is trained
  axes = param_tree.logical_axes(trained)
  assert axes["trunk"]["layers"]["q_lora_a"] == ("layer", "width", "rank")
  assert axes["trunk"]["layers"]["down_lora_b"] == ("layer", "rank", "width")


def test_a_step_changes_adapters_alone_and_holds_moments_of_them_alone(
  with_lora, adapted, compute
):
  """With the gradients of the merged model's matrices, through the chain rule."""
  trained, frozen = adapters.split(with_lora)
  tx = train.make_optimizer(OPTIMIZER, steps=5)
  loss = sft.make_loss(cfg=adapted, compute=compute)
  packed = packing.pad_rows([(TOKENS, [0.0] * 4 + [1.0] * 26)], length=30)
  batch = packed.lines | {"weight_BT": packed.weight_BT}

  def total(params):
    return loss(params, batch, KEY)[0].total

  merged = adapters.merge_adapters(with_lora, cfg=adapted)
  of_merged = jax.jit(jax.grad(total))(merged)["layers"]
  of_adapters = jax.jit(jax.grad(lambda t: total(adapters.merge_trees(frozen, t))))(
    trained
  )
  for name in LORA.leaves:
    a, b = (with_lora["layers"][f"{name}_lora_{x}"] for x in "ab")
    want_a = 4.0 * jnp.einsum("lio,lro->lir", of_merged[name], b)
    want_b = 4.0 * jnp.einsum("lir,lio->lro", a, of_merged[name])
    got = of_adapters["layers"]
    np.testing.assert_allclose(got[f"{name}_lora_a"], want_a, atol=2e-4)
    np.testing.assert_allclose(got[f"{name}_lora_b"], want_b, atol=2e-4)
    assert np.abs(want_a).max() > 0.01
  state = train.create(trained, tx)
  sizes = {x.shape for x in jax.tree.leaves(state.opt_state)} - {()}
  assert sizes == {x.shape for x in jax.tree.leaves(trained)}
  update = jax.jit(train.make_update(loss, tx))
  micro = {name: x[None] for name, x in batch.items()}
  losses = []
  for _ in range(4):
    state, metrics = update(state, micro, KEY, 1, frozen)
    losses.append(float(metrics["loss"].value()))
  assert losses[-1] < losses[0] - 0.1
  assert jax.tree.structure(state.params) == jax.tree.structure(trained)


def test_experts_get_none(cfg):
  sparse = dataclasses.replace(cfg, experts=4, experts_used=2)
  params = weights.random_model(sparse, 0)
  with pytest.raises(ValueError, match="no adapters for down of experts"):
    adapters.attach(params, KEY, cfg=sparse, lora=LORA)
