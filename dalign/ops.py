"""Small pure functions on arrays: matmuls, masks, token statistics, keys.

Knows no model, no config and no text.
"""

import functools
import zlib

from flax import struct
import jax
import jax.numpy as jnp

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
  dx = _dot(g, w, ((g.ndim - 1,), (1,)), dtype)
  lead = tuple(range(x.ndim - 1))
  dw = _dot(x, g, (lead, lead), dtype)
  return dx, dw.astype(w.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def matmul_turned(x, w, dtype):
  """`x @ w.T` as `matmul` does it, without a gradient; w is [out, in].

  The weight is the product's left side: XLA's CPU kernels repack the right side at
  every call, which with few rows of x takes longer than the product.
  """
  rows = x.reshape(-1, x.shape[-1])
  y = _dot(w, rows, ((1,), (1,)), dtype)
  return y.T.reshape(*x.shape[:-1], w.shape[0])


@struct.dataclass
class TokenStats:
  """Per token, in nats and float32: log-probability, entropy, and the argmax hit."""

  logp: Leaf
  entropy: Leaf
  hit: Leaf


def token_stats(
  hidden_BTD, head_DV, targets_BT, *, dtype, chunk: int, temperature: float = 1.0
) -> TokenStats:
  """Statistics of each target token under `softmax(hidden @ head / temperature)`.

  `targets_BT[:, t]` is scored with `hidden_BTD[:, t]`: the caller shifts. Never makes
  a [B, T, V] array: the rows are cut in chunks of `chunk` tokens, each recomputed in
  the backward pass.
  """
  B, T, D = hidden_BTD.shape
  N = B * T
  chunk = min(chunk, N)
  pad = -N % chunk
  hidden_ND = jnp.pad(hidden_BTD.reshape(N, D), ((0, pad), (0, 0)))
  targets_N = jnp.pad(targets_BT.reshape(N), (0, pad))

  @jax.checkpoint
  def one(hidden_CD, targets_C):
    logits_CV = matmul(hidden_CD, head_DV, dtype) / temperature
    logz_C = jax.nn.logsumexp(logits_CV, axis=-1)
    picked_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
    probs_CV = jnp.exp(jax.lax.stop_gradient(logits_CV - logz_C[:, None]))
    mean_C = jnp.sum(probs_CV * jax.lax.stop_gradient(logits_CV), axis=-1)
    entropy_C = jax.lax.stop_gradient(logz_C) - mean_C
    hit_C = jax.lax.stop_gradient(picked_C >= jnp.max(logits_CV, axis=-1))
    return TokenStats(picked_C - logz_C, entropy_C, hit_C.astype(jnp.float32))

  def body(_, part):
    return None, one(*part)

  parts = hidden_ND.reshape(-1, chunk, D), targets_N.reshape(-1, chunk)
  _, stats = jax.lax.scan(body, None, parts)
  return jax.tree.map(lambda x: x.reshape(-1)[:N].reshape(B, T), stats)


def segment_mask(query_segments_BT, key_segments_BS):
  """True where a query may see a key of its own segment; segment 0 is padding.

  Padding sees padding, so that no row of the mask is empty and no softmax is NaN.
  """
  return query_segments_BT[:, :, None] == key_segments_BS[:, None, :]


def stream(root: Key, name: str, step: int = 0) -> Key:
  """The key of one named use of randomness at one step."""
  return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def per_row(key: Key, row_ids_B) -> Key:
  """One key a row, by the row's own id: neighbours and batch size change nothing."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids_B)
