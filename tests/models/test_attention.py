"""Attention in blocks, and its backward pass, against one plain softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.models import attention

B, K, G, H = 2, 2, 3, 8


def plain(q_BNTH, k_BKTH, v_BKTH, mask_BTS, *, scale=H**-0.5, cap=0.0, sinks_N=None):
  """Every score at once, in float32."""
  k_BNTH, v_BNTH = (jnp.repeat(x, G, axis=1) for x in (k_BKTH, v_BKTH))
  scores = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNTH) * scale
  scores = cap * jnp.tanh(scores / cap) if cap else scores
  scores = jnp.where(mask_BTS[:, None], scores, -1e30)
  if sinks_N is not None:
    sinks = jnp.broadcast_to(sinks_N[None, :, None, None], (*scores.shape[:3], 1))
    scores = jnp.concatenate([scores, sinks], axis=-1)
  probs = jax.nn.softmax(scores)[..., : v_BNTH.shape[2]]
  return jnp.einsum("BNTS,BNSH->BNTH", probs, v_BNTH)


def numbers(T: int, seed: int = 0):
  rng = np.random.default_rng(seed)
  return (
    jnp.asarray(rng.standard_normal((B, heads, T, H)), jnp.float32)
    for heads in (K * G, K, K)
  )


def trees(T: int):
  """Two trees a line, of a front and two leaves each, and padding; and one long row."""
  third = T // 6
  one = [2 * third] * third + [third * 3 // 2] * (third // 2)
  one += [2 * third] * (2 * third - len(one))
  two = [2 * third + end for end in one]
  ends = np.zeros((2, T), np.int32)
  ends[0, : len(one + two)] = one + two
  ends[1] = T
  return jnp.asarray(ends)


def blocked(q_BNTH, k_BKTH, v_BKTH, ends_BT, dtype=jnp.float32, parts=(), **more):
  sight = attention.Visibility(ends=ends_BT, **more.pop("sight", {}))
  line = attention.Line(k=k_BKTH.swapaxes(2, 3), v=v_BKTH, sight=sight)
  return attention.attend(q_BNTH, (*parts, line), dtype, **more)


@pytest.mark.parametrize("T", [48, 150, 600])  # one block, several, several longer
def test_blocks_equal_one_softmax_and_so_do_their_gradients(T):
  q, k, v = numbers(T)
  ends = trees(T)
  mask = attention.tree_mask(ends)
  weight = next(numbers(T, seed=1))

  def loss(fn, *last):
    return jax.jit(
      jax.value_and_grad(
        lambda q, k, v: jnp.sum(fn(q, k, v, *last) * weight), (0, 1, 2)
      )
    )

  got, got_grads = loss(blocked, ends)(q, k, v)
  want, want_grads = loss(plain, mask)(q, k, v)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(got_grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
    assert np.abs(a).max() > 0.1


@pytest.mark.parametrize("prefix", [0, 40])
def test_windows_caps_and_sinks_have_the_gradients_of_one_softmax(prefix):
  """Over trees, whose positions are not their columns, behind a prefix and without."""
  T, window = 150, 17
  q, k, v = numbers(prefix + T)
  ends = trees(T)
  position_BT = jnp.cumsum(jnp.ones((B, T), jnp.int32), axis=1) - 1
  position_BT = position_BT - (position_BT > 70) * 30 + prefix
  weight, sinks_N = next(numbers(T, seed=1)), jnp.linspace(-1.0, 2.0, K * G)
  more = dict(scale=0.9, cap=1.5)
  at_P = jnp.arange(prefix)[None]
  mask = attention.tree_mask(ends) & (
    position_BT[:, :, None] - position_BT[:, None] < window
  )
  behind = attention.within_window(position_BT, at_P, window)
  mask = jnp.concatenate([jnp.broadcast_to(behind, (B, T, prefix)), mask], axis=2)
  assert 0 < behind.sum() < behind.size or not prefix

  def in_parts(q, k, v, sinks_N):
    part = attention.Part(k[:1, :, :prefix].swapaxes(2, 3), v[:1, :, :prefix], behind)
    own = (x[:, :, prefix:] for x in (q, k, v))
    sight = dict(positions=position_BT, window=window)
    parts = (part,) if prefix else ()
    out = blocked(*own, ends, parts=parts, sight=sight, sinks_N=sinks_N, **more)
    return jnp.sum(out * weight), out

  def at_once(q, k, v, sinks_N):
    k, v = (  # the prefix of the first line is that of all
      jnp.concatenate(
        [jnp.broadcast_to(x[:1], x.shape)[:, :, :prefix], x[:, :, prefix:]], 2
      )
      for x in (k, v)
    )
    out = plain(q[:, :, prefix:], k, v, mask, sinks_N=sinks_N, **more)
    return jnp.sum(out * weight), out

  (_, got), got_grads = jax.jit(
    jax.value_and_grad(in_parts, (0, 1, 2, 3), has_aux=True)
  )(q, k, v, sinks_N)
  (_, want), want_grads = jax.jit(
    jax.value_and_grad(at_once, (0, 1, 2, 3), has_aux=True)
  )(q, k, v, sinks_N)
  np.testing.assert_allclose(got, want, atol=1e-5)
  for a, b in zip(got_grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5)
    assert np.abs(a).max() > 0.1


def test_bfloat16_operands_are_rounded_in_both_passes():
  T = 100
  q, k, v = numbers(T)
  ends = jnp.full((B, T), T)

  def gradients(dtype):
    def total(q, k, v):
      return jnp.sum(blocked(q, k, v, ends, dtype) ** 2)

    return jax.jit(jax.grad(total, (0, 1, 2))), jax.make_jaxpr(jax.grad(total))(q, k, v)

  low, traced = gradients(jnp.bfloat16)
  high, _ = gradients(jnp.float32)
  for a, b in zip(low(q, k, v), high(q, k, v), strict=True):
    assert 1e-4 < np.abs(a - b).max() / np.abs(b).max() < 0.02
  products = str(traced).split("dot_general")[1:]
  assert len(products) == 14  # two blocks: two products forward, five backward
  assert all("preferred_element_type=float32" in text[:200] for text in products)


def test_no_scores_are_kept_for_the_backward_pass():
  T = 256
  q, k, v = numbers(T)
  ends = jnp.full((B, T), T)
  _, pullback = jax.vjp(lambda q, k, v: blocked(q, k, v, ends), q, k, v)
  kept = [x.shape for x in jax.tree.leaves(pullback)]
  assert kept
  assert all(shape.count(T) < 2 for shape in kept)
