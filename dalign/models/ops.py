"""Small pure functions on arrays: matmuls, token statistics, keys.

Knows no model, no config and no text.
"""

from collections.abc import Callable, Hashable, Sequence
import functools
import hashlib
import math
import zlib

from flax import struct
import jax
from jax.experimental import layout
import jax.numpy as jnp
import numpy as np

from dalign.types import Key
from dalign.types import Leaf


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x, w, dtype):
  """`x @ w` with operands rounded to `dtype` and float32 sums; w is [in, out].

  The backward pass rounds its operands too and returns float32 gradients. Without
  this, autodiff would multiply a float32 cotangent by a bfloat16 weight, for which
  XLA has no fast path on CPU.
  """
  return _dot(x, w, ((x.ndim - 1,), (0,)), dtype)


def _dot(x, y, contract, dtype):
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (contract, ((), ())),
    preferred_element_type=jnp.float32,
  )


def _matmul_fwd(x, w, dtype):
  return matmul(x, w, dtype), (x.astype(dtype), w)


def _matmul_bwd(dtype, saved, g):
  x, w = saved
  dx, dw = _matmul_grads(x, w, g, dtype)
  return dx, dw.astype(w.dtype)


def _matmul_grads(x, w, g, dtype):
  """Float32 gradients of `matmul` by x and by w, given that of its result."""
  rows = (a.reshape(-1, a.shape[-1]).astype(dtype) for a in (x, g))
  dw = jax.lax.platform_dependent(*rows, cpu=_over_rows_cpu, default=_over_rows)
  return _dot(g, w, ((g.ndim - 1,), (1,)), dtype), dw


def _over_rows(x, g):
  """`x.T @ g` of [rows, width] each."""
  return _dot(x, g, ((0,), (0,)), x.dtype)


def _over_rows_cpu(x, g):
  """The same. XLA's CPU backend transposes the left side in one loop with all that
  makes it: better the narrower one. In bfloat16 it has no kernel for sums over rows and
  would widen both sides, but one for a transposed copy."""
  if x.shape[1] > g.shape[1]:
    return jax.lax.optimization_barrier(_over_rows_cpu(g, x)).T
  if x.dtype == jnp.float32:
    return _over_rows(x, g)
  turned = layout.with_layout_constraint(x.T, layout.Layout((0, 1)))
  return _dot(jax.lax.optimization_barrier(turned), g, ((1,), (0,)), x.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def matmul_transposed(x, w, dtype):
  """`x @ w.T` as `matmul` does it, without a gradient; w is [out, in].

  The weight is the product's left side: XLA's CPU kernels repack the right side at
  every call, which with few rows of x takes longer than the product. Without a barrier
  XLA would swap the sides again to spare the small result its transposition.
  """
  rows = x.reshape(-1, x.shape[-1])
  y = jax.lax.optimization_barrier(_dot(w, rows, ((1,), (1,)), dtype))
  return y.T.reshape(*x.shape[:-1], w.shape[0])


@struct.dataclass
class TokenStats:
  """Per token, in nats and float32: log-probability, entropy, and the argmax hit."""

  logp: Leaf
  entropy: Leaf
  hit: Leaf


def token_stats(
  hidden_PND,
  head_DV,
  targets_PN,
  wanted_PN,
  *,
  dtype,
  chunk: int,
  temperature: float = 1.0,
  cap: float = 0.0,
  absent: Sequence[tuple[int, int]] = (),
  gathered: Callable = lambda head_DV: head_DV,
) -> TokenStats:
  """Statistics of each wanted target under `softmax(logits / temperature)`, of logits
  `soft_cap(hidden @ head, cap)`, `mask_absent` where ids are `absent`.

  `targets_PN[:, n]` is scored with `hidden_PND[:, n]`: the caller shifts. Tokens that
  are not wanted get zeros and no work: the head is applied to as many chunks of `chunk`
  tokens of each part as the wanted ones of any part fill. No token leaves its part, so
  that parts may lie on several devices; `gathered` lays the head, in `dtype`, where
  the chunks need it. Never makes a [P, N, V] array. Only `logp` has a gradient.
  """
  to_chunks, from_chunks, used = wanted_first_chunks(wanted_PN, chunk)
  how = dtype, temperature, cap, absent, gathered
  hidden_NCD, targets_NC = to_chunks(hidden_PND), to_chunks(targets_PN)
  return jax.tree.map(
    from_chunks, _head_stats(hidden_NCD, head_DV, targets_NC, used, how)
  )


def wanted_first_chunks(wanted_PN, chunk: int) -> tuple[Callable, Callable, jax.Array]:
  """(to_chunks, from_chunks, used): the first makes [P, N, ...] arrays chunks [..,
  P * chunk, ...] of at most `chunk` tokens of each part, the wanted ones first; the
  second takes numbers of chunks back to their places [P, N], 0 where nothing is wanted;
  `used` is how many of the chunks, the first, hold what is wanted."""
  P, N = wanted_PN.shape
  chunk = min(chunk, N)
  order_PN = jnp.argsort(~wanted_PN, axis=1, stable=True)
  used = jnp.max(-(-jnp.sum(wanted_PN, axis=1) // chunk))

  @jax.vmap
  def ordered(x, order_N):
    return jnp.take(x, order_N, axis=0, unique_indices=True)

  @jax.vmap
  def restore_order(x_N, order_N):
    return jnp.zeros(N).at[order_N].set(x_N[:N], unique_indices=True)

  def to_chunks(x):
    x = ordered(x, order_PN)
    x = jnp.pad(x, ((0, 0), (0, -N % chunk), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(P, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(-1, P * chunk, *x.shape[3:])

  def from_chunks(x_NC):
    x_PN = x_NC.reshape(-1, P, chunk).swapaxes(0, 1).reshape(P, -1)
    return jnp.where(wanted_PN, restore_order(x_PN, order_PN), 0.0)

  return to_chunks, from_chunks, used


def soft_cap(x, cap: float):
  """`cap * tanh(x / cap)` (2408.00118), or x where cap is 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def mask_absent(logits, absent: Sequence[tuple[int, int]]):
  """Logits [..., V] that leave no probability to ids in the (start, stop) of `absent`;
  finite ones, whose square is too."""
  if not absent:
    return logits
  there = np.ones((1,) * (logits.ndim - 1) + logits.shape[-1:], bool)
  for start, stop in absent:
    there[..., start:stop] = False
  return jnp.where(there, logits, -1e9)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _head_stats(hidden_NCD, head_DV, targets_NC, used, how):
  """TokenStats of the first `used` of N chunks; the backward pass makes their logits
  again, chunk by chunk. `how` is (dtype, temperature, cap, absent, gathered)."""
  return _head_stats_fwd(hidden_NCD, head_DV, targets_NC, used, how)[0]


def _cast_head(head_DV, how):
  dtype, *_, gathered = how
  return gathered(head_DV.astype(dtype))


def _logits(hidden_CD, low_DV, how):
  dtype, temperature, cap, absent, _ = how
  logits_CV = soft_cap(matmul(hidden_CD, low_DV, dtype), cap)
  return mask_absent(logits_CV, absent) / temperature


def _head_stats_fwd(hidden_NCD, head_DV, targets_NC, used, how):
  low_DV = _cast_head(head_DV, how)

  def one(i, found):
    logits_CV = _logits(hidden_NCD[i], low_DV, how)
    peak_C = jnp.max(logits_CV, axis=-1)
    sum_C, weighted_C = _exp_sums(logits_CV, peak_C)
    logz_C = peak_C + jnp.log(sum_C)
    entropy_C = logz_C - weighted_C / sum_C
    picked_C = jnp.take_along_axis(logits_CV, targets_NC[i][:, None], axis=-1)[:, 0]
    hit_C = (picked_C >= peak_C).astype(jnp.float32)
    new = TokenStats(picked_C - logz_C, entropy_C, hit_C), logz_C
    return jax.tree.map(lambda xs, x: xs.at[i].set(x), found, new)

  zeros_NC = jnp.zeros(targets_NC.shape)
  start = TokenStats(zeros_NC, zeros_NC, zeros_NC), zeros_NC
  stats, logz_NC = jax.lax.fori_loop(0, used, one, start)
  return stats, (hidden_NCD, head_DV, targets_NC, used, logz_NC)


def _exp_sums(logits_CV, peak_C):
  """Sums [C] of exp(logit - peak), and of these times their logits, in one pass over
  the logits; first over an axis of at most 256, which keeps rounding errors small."""
  C, V = logits_CV.shape
  logits_CNM = logits_CV.reshape(C, math.gcd(V, 256), -1)
  exps_CNM = jnp.exp(logits_CNM - peak_C[:, None, None])

  def add(a, b):
    return a[0] + b[0], a[1] + b[1]

  zero = jnp.float32(0)
  sums = jax.lax.reduce((exps_CNM, exps_CNM * logits_CNM), (zero, zero), add, (1,))
  return tuple(jnp.sum(x_CM, axis=-1) for x_CM in sums)


def _head_stats_bwd(how, saved, grads: TokenStats):
  hidden_NCD, head_DV, targets_NC, used, logz_NC = saved
  dtype, temperature, cap, *_ = how
  low_DV = _cast_head(head_DV, how)

  def one(i, sums):
    dhidden_NCD, dhead_DV = sums
    logits_CV = _logits(hidden_NCD[i], low_DV, how)
    probs_CV = jnp.exp(logits_CV - logz_NC[i][:, None])
    hit_CV = targets_NC[i][:, None] == jnp.arange(head_DV.shape[1])[None]
    dlogits_CV = (hit_CV - probs_CV) * (grads.logp[i] / temperature)[:, None]
    if cap:
      dlogits_CV *= 1 - jnp.square(logits_CV * (temperature / cap))
    dhidden_CD, dhead = _matmul_grads(hidden_NCD[i], low_DV, dlogits_CV, dtype)
    return dhidden_NCD.at[i].set(dhidden_CD), dhead_DV + dhead

  start = jnp.zeros(hidden_NCD.shape), jnp.zeros(head_DV.shape)
  dhidden_NCD, dhead_DV = jax.lax.fori_loop(0, used, one, start)
  return dhidden_NCD, dhead_DV, None, None


_head_stats.defvjp(_head_stats_fwd, _head_stats_bwd)


def stream(root: Key, name: str, step: int = 0) -> Key:
  """The key of one named use of randomness at one step."""
  return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def row_keys(key: Key, words_B2) -> Key:
  """One key a row, by the row's own two words of 32 bits (`row_words`): neighbours and
  batch size change nothing."""

  def one(words_2):
    return jax.random.fold_in(jax.random.fold_in(key, words_2[0]), words_2[1])

  return jax.vmap(one)(words_B2)


def row_words(row_id: Hashable) -> np.ndarray:
  """The 64 bits, all that a key holds, that a row's randomness takes from its id: text,
  numbers, or a tuple of them."""
  digest = hashlib.sha256(repr(row_id).encode()).digest()
  return np.frombuffer(digest[:8], "<u4")
