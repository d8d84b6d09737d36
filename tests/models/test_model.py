"""The decoder against plain loops and itself; against transformers by family, in
tests/formats/test_families.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config.model import ModelConfig
from dalign.models import attention
from dalign.models import ops
from dalign.models import param_tree
from dalign.models import transformer
from dalign.text import packing

TOKENS = np.random.default_rng(7).integers(3, 97, 40).tolist()


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def jitted(params, batch, prefix, *, cfg, compute):
  """[B, T, V] logits, small enough here to be made whole."""
  tokens_BT, positions_BT, ends_BT = batch
  offset = 0 if prefix is None else prefix.length
  hidden_BTD, _ = transformer.forward(
    params,
    tokens_BT,
    positions_BT + offset,
    ends_BT,
    cfg=cfg,
    compute=compute,
    prefix=prefix,
  )
  return ops.matmul(hidden_BTD, transformer.head(params), jnp.float32)


def logits(params, packed: packing.Packed, *, cfg, compute, prefix=None):
  batch = packed.tokens_BT, packed.positions_BT, packed.ends_BT
  return jitted(params, batch, prefix, cfg=cfg, compute=compute)


@pytest.fixture(scope="module")
def run(cfg, compute):
  """`run(params, packed)`: logits of the tiny model, as numpy."""
  return lambda params, packed: np.asarray(
    logits(params, packed, cfg=cfg, compute=compute)
  )


def rows(*tokens: list[int]) -> list[packing.Row]:
  return [(row, [1.0] * len(row)) for row in tokens]


# --- Against plain loops ---


def plain_attention(q_NTH, k_KSH, v_KSH, mask_TS) -> np.ndarray:
  """One row, one head, one query at a time, in float64."""
  N, T, H = q_NTH.shape
  out = np.zeros((N, T, H))
  for n in range(N):
    k_SH, v_SH = k_KSH[n * len(k_KSH) // N], v_KSH[n * len(k_KSH) // N]
    for t in range(T):
      seen = np.flatnonzero(mask_TS[t])
      score = np.array([q_NTH[n, t].astype(float) @ k_SH[s] for s in seen]) * H**-0.5
      prob = np.exp(score - score.max())
      prob /= prob.sum()
      for p, s in zip(prob, seen, strict=True):
        out[n, t] += p * v_SH[s]
  return out


def test_attention_over_parts_is_one_softmax():
  """Over keys of all rows, of each two rows, hidden from all, and of each row."""
  rng = np.random.default_rng(0)
  B, N, K, T, H, S = 4, 4, 2, 5, 6, 5
  q_BNTH = 3 * rng.standard_normal((B, N, T, H), np.float32)
  seen = [
    np.broadcast_to(np.arange(S) < 3, (B, T, S)),
    np.broadcast_to(rng.random((B, 1, S)) < 0.7, (B, T, S)),
    np.zeros((B, T, S), bool),
    rng.random((B, T, S)) < 0.6,
  ]
  masks = [seen[0][:1, :1], seen[1][:, :1], seen[2][:1, :1], seen[3]]
  k, v = (
    [3 * rng.standard_normal((A, K, S, H), np.float32) for A in (1, 2, B, B)]
    for _ in range(2)
  )
  parts = tuple(
    attention.Part(k.swapaxes(2, 3), v, mask)
    for k, v, mask in zip(k, v, masks, strict=True)
  )
  got = jax.jit(attention.attend, static_argnums=2)(q_BNTH, parts, jnp.float32)
  for b in range(B):
    own = [[x[b * len(x) // B] for x in parts] for parts in (k, v)]
    want = plain_attention(
      q_BNTH[b],
      *[np.concatenate(x, axis=1) for x in own],
      np.concatenate([mask[b] for mask in seen], axis=1),
    )
    np.testing.assert_allclose(got[b], want, atol=2e-5)


# --- Against itself ---


def test_rows_are_lines_that_end_at_their_length(run, params, cfg, compute):
  padded = packing.pad_rows(rows(TOKENS[:9], TOKENS[:40], TOKENS[3:30]), length=40)
  real_BT = padded.ends_BT > 0
  rows_alone = jax.jit(
    functools.partial(transformer.forward_rows, cfg=cfg, compute=compute)
  )
  hidden_BTD, _ = rows_alone(params, padded.tokens_BT)
  got = hidden_BTD @ transformer.head(params)
  want = run(params, padded)
  np.testing.assert_allclose(got[real_BT], want[real_BT], atol=1e-5)


def test_what_stands_in_padding_is_never_seen(run, params):
  packed = packing.pad_rows(rows(TOKENS[:9], TOKENS[:30]), length=40)
  want = run(params, packed)
  packed.tokens_BT[packed.ends_BT == 0] = 55
  packed.positions_BT[packed.ends_BT == 0] = 99
  got = run(params, packed)
  real_BT = packed.ends_BT > 0
  np.testing.assert_array_equal(got[real_BT], want[real_BT])
  assert np.isfinite(got).all()


@pytest.mark.parametrize("spare", [0, 6])
def test_a_shared_prefix_is_the_same_prompt(run, params, cfg, compute, spare):
  head, tails = TOKENS[:10], (TOKENS[10:22], TOKENS[22:27])
  padded = jnp.asarray(head + [44] * spare)
  encode = jax.jit(
    functools.partial(transformer.encode_prefix, cfg=cfg, compute=compute)
  )
  prefix = encode(params, padded, jnp.int32(10))
  packed = packing.pad_rows(rows(*tails), length=12)
  got = logits(params, packed, cfg=cfg, compute=compute, prefix=prefix)
  whole = run(params, packing.pad_rows(rows(*(head + t for t in tails)), length=40))
  for b, tail in enumerate(tails):
    want = whole[b, 10 : 10 + len(tail)]
    np.testing.assert_allclose(got[b, : len(tail)], want, atol=1e-5)


def test_gradients_of_padding_rows_are_finite(params, cfg, compute):
  packed = packing.pack(rows(TOKENS[:5]), length=8, rows_multiple=3)

  def total(params):
    x_BTV = logits(params, packed, cfg=cfg, compute=compute)
    return jnp.sum(jnp.where(packed.ends_BT[..., None] > 0, x_BTV, 0.0) ** 2)

  grads = jax.tree.leaves(jax.jit(jax.grad(total))(params))
  assert all(np.isfinite(g).all() for g in grads)
  assert sum(np.abs(g).sum() for g in grads) > 1


def test_recomputing_layers_changes_no_gradient(params, cfg, compute):
  packed = packing.pad_rows(rows(TOKENS[:12]), length=12)

  def gradient(remat):
    used = dataclasses.replace(compute, remat=remat)

    def total(p):
      return jnp.mean(logits(p, packed, cfg=cfg, compute=used) ** 3)

    traced = jax.jit(jax.grad(total)).trace(params)
    return traced.lower().compile()(params), str(traced.jaxpr).count("dot_general")

  (kept, fewer), (again, products) = gradient(False), gradient(True)
  # Made again: q, k, v, the attention's two, o, gate and up.
  assert products == fewer + 8
  for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_rounds_operands_and_keeps_float32_results(params, cfg, compute):
  packed = packing.pad_rows(rows(TOKENS[:12]), length=12)
  low = dataclasses.replace(compute, dtype="bfloat16", kv_dtype="bfloat16")
  want = logits(params, packed, cfg=cfg, compute=compute)
  got = logits(params, packed, cfg=cfg, compute=low)
  assert got.dtype == jnp.float32
  assert 1e-3 < np.abs(got - want).max() < 0.15


@pytest.mark.parametrize("tied", [True, False])
def test_one_tree_for_init_files_and_axes(cfg, compute, tied):
  cfg = dataclasses.replace(cfg, tied=tied)
  made = jax.eval_shape(
    lambda key: transformer.init(key, cfg=cfg, compute=compute), jax.random.key(0)
  )
  assert jax.tree.map(lambda x: x.shape, made) == param_tree.shapes(cfg)
  axes = param_tree.logical_axes(made)
  for path, leaf in jax.tree_util.tree_flatten_with_path(made)[0]:
    names = axes
    for step in path:
      names = names[step.key]
    assert len(names) == leaf.ndim, path
  assert transformer.head(
    made if not tied else jax.tree.map(jnp.zeros_like, made)
  ).shape == (cfg.width, cfg.vocab)


def test_heads_must_divide(cfg):
  with pytest.raises(
    ValueError, match="kv_heads: wanted a divisor of heads = 4, got 3"
  ):
    ModelConfig(**{**dataclasses.asdict(cfg), "kv_heads": 3})
