"""Attention under one softmax over a line's own tokens, caches and shared prefixes.

Scores of a line are made in blocks of queries, each against the keys that it can see at
most, and never kept: the backward pass makes them again. Knows arrays, and no model.
"""

import functools

from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from dalign.types import Leaf

HIDDEN = -1e30  # a finite stand-in for minus infinity: masked rows stay free of NaN
KEPT = "attention", "attention_logz"  # names of what the backward pass needs
BLOCK, BLOCKS = 64, 8  # queries of a block at least, and blocks of a line at most


@struct.dataclass
class Part:
  """Keys and values that queries may read, and which of them they may see.

  `k` is [A, K, H, S] (the faster side for a product with few queries), `v` is
  [A, K, S, H]. A divides B: each run of B / A rows shares one, which is read in place
  and never copied to the rows. A = B are rows' own, A = 1 is shared by all. `mask` is
  True where visible and broadcasts to [B, T, S].
  """

  k: Leaf
  v: Leaf
  mask: Leaf


@struct.dataclass
class Line:
  """The tokens of each line itself: k [B, K, H, T], v [B, K, T, H], and the ends [B, T]
  that say what they see of each other (`tree_mask`), or None where a line is a row."""

  k: Leaf
  v: Leaf
  ends: Leaf | None


def row_mask(T: int, rows: slice):
  """[1, t, S], True where those tokens of a row of T may see another: not the later
  ones. S are the tokens up to the last of `rows`."""
  at_T, at_S = jnp.arange(T)[rows], jnp.arange(T)[: rows.stop]
  return (at_S[None] <= at_T[:, None])[None]


def tree_mask(ends_BT, rows: slice = slice(None)):
  """[B, T, S], True where the token of a column may see that of another: the other is
  not after it, and ends after it. All see themselves, padding (end 0) nothing else.

  With the tokens of a tree written depth first, and each token's end the column behind
  the last of its descendants, a token sees the path from the root to itself. Packed
  rows are the plainest such tree. Given `rows`, these tokens alone and what is not
  after them.
  """
  at_T = jnp.arange(ends_BT.shape[1])[rows]
  at_S = jnp.arange(ends_BT.shape[1])[: rows.stop]
  before_TS, self_TS = at_S[None] < at_T[:, None], at_S[None] == at_T[:, None]
  open_BTS = at_T[None, :, None] < ends_BT[:, None, : rows.stop]
  return before_TS[None] & open_BTS | self_TS[None]


def attend(q_BNTH, parts: tuple[Part | Line, ...], dtype, kernel=None):
  """Outputs float32 [B, N, T, H] of queries over several parts under one softmax.

  Each part is reduced by itself, shared keys as one matrix for all rows that share
  them, and the parts are joined by their log-sum-exp. Operands are `dtype`, sums
  float32. N is a multiple of the K heads of keys (2305.13245).

  A `kernel` takes over a line that stands alone: called with queries, keys, values, the
  mask [B, T, T] or None for rows, and dtype, it gives the outputs.
  """
  B, N, T, H = q_BNTH.shape
  K = parts[0].k.shape[1]
  q_BKGTH = (q_BNTH * H**-0.5).reshape(B, K, N // K, T, H)
  if len(parts) == 1 and isinstance(parts[0], Line):
    line = parts[0]
    if kernel is not None:
      mask_BTS = None if line.ends is None else tree_mask(line.ends)
      return kernel(q_BNTH, line.k, line.v, mask_BTS, dtype)
    out, _ = _over_line(q_BKGTH, line.k, line.v, line.ends, dtype)
    return out.reshape(B, N, T, H)
  reduced = [_reduce(q_BKGTH, part, dtype) for part in parts]
  top = functools.reduce(jnp.maximum, [peak for _, peak, _ in reduced])
  total, mass = 0.0, 0.0
  for out, peak, z in reduced:
    scale = jnp.exp(peak - top)
    total += out * scale[..., None]
    mass += z * scale
  return (total / mass[..., None]).reshape(B, N, T, H)


def _reduce(q_BKGTH, part: Part | Line, dtype):
  """Over one part: the output, and the score and number that its sum is counted in."""
  if isinstance(part, Line):
    out, logz = _over_line(q_BKGTH, part.k, part.v, part.ends, dtype)
    return out, logz, 1.0
  return _over_part(q_BKGTH.astype(dtype), part, dtype)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _over_part(q_BKGTH, part: Part, dtype):
  """Over one part: the unnormalised output, the peak score, and the softmax's sum."""
  B, K, G, T, H = q_BKGTH.shape
  A, _, _, S = part.k.shape
  R = B // A  # rows that read the same keys: they become rows of one product

  def together(x):
    x = x.reshape(A, R, K, *x.shape[2:])
    return x.swapaxes(1, 2).reshape(A, K, R * G * T, *x.shape[5:])

  def apart(x):
    x = x.reshape(A, K, R, G, T, *x.shape[3:])
    return x.swapaxes(1, 2).reshape(B, K, G, T, *x.shape[5:])

  scores = _dot("AKMH,AKHS->AKMS", together(q_BKGTH), part.k.astype(dtype))
  mask = part.mask[:, None, None]  # [B or 1, 1, 1, T or 1, S]
  if part.mask.shape[0] > 1:
    mask = mask.reshape(A, R, 1, *mask.shape[2:]).swapaxes(1, 2)
  else:
    mask = mask[None]
  scores = jnp.where(mask, scores.reshape(A, K, R, G, T, S), HIDDEN)
  scores = scores.reshape(A, K, R * G * T, S)
  peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
  probs = jnp.exp(scores - peak[..., None])
  z = jnp.sum(probs, axis=-1)
  out = _dot("AKMS,AKSH->AKMH", probs.astype(dtype), part.v.astype(dtype))
  return apart(out), apart(peak), apart(z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _over_line(q_BKGTH, k_BKHT, v_BKTH, ends_BT, dtype):
  """Softmax attention [B, K, G, T, H] of the tokens of a line over each other, and the
  log-sum-exp [B, K, G, T] of their scores; the scores are made again in the backward
  pass, from the latter (2205.14135, without its blocks of keys)."""
  return _over_line_fwd(q_BKGTH, k_BKHT, v_BKTH, ends_BT, dtype)[0]


def _blocks(T: int) -> list[slice]:
  size = max(BLOCK, -(-T // (BLOCKS * BLOCK)) * BLOCK)
  return [slice(at, min(at + size, T)) for at in range(0, T, size)]


def _rows_of(x_BKGT, rows: slice):
  """A block [B, K, G * t, ...] of what is given a query, [B, K, G, T, ...]."""
  B, K, _, _, *more = x_BKGT.shape
  return x_BKGT[:, :, :, rows].reshape(B, K, -1, *more)


def _scores(q_BKGTH, k_BKHT, ends_BT, rows: slice):
  """[B, K, G * t, S] of a block of queries, with the hidden ones masked, and these
  queries, [B, K, G * t, H]."""
  B, K, G, T, _ = q_BKGTH.shape
  q_BKMH = _rows_of(q_BKGTH, rows)
  scores = _dot("BKMH,BKHS->BKMS", q_BKMH, k_BKHT[..., : rows.stop])
  mask = row_mask(T, rows) if ends_BT is None else tree_mask(ends_BT, rows)
  mask = mask[:, None, None]
  shape = B, K, G, *mask.shape[3:]
  return jnp.where(mask, scores.reshape(shape), HIDDEN).reshape(scores.shape), q_BKMH


def _over_line_fwd(q_BKGTH, k_BKHT, v_BKTH, ends_BT, dtype):
  B, K, G, T, H = q_BKGTH.shape
  q, k, v = (x.astype(dtype) for x in (q_BKGTH, k_BKHT, v_BKTH))
  outs, logzs = [], []
  for rows in _blocks(T):
    scores, _ = _scores(q, k, ends_BT, rows)
    peak = jnp.max(scores, axis=-1)
    probs = jnp.exp(scores - peak[..., None])
    z = jnp.sum(probs, axis=-1)
    out = _dot("BKMS,BKSH->BKMH", probs.astype(dtype), v[:, :, : rows.stop])
    outs.append((out / z[..., None]).reshape(B, K, G, -1, H))
    logzs.append((peak + jnp.log(z)).reshape(B, K, G, -1))
  out = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
  logz = checkpoint_name(jnp.concatenate(logzs, axis=3), "attention_logz")
  return (out, logz), (q, k, v, ends_BT, out, logz)


def _over_line_bwd(dtype, saved, grads):
  q, k, v, ends_BT, out, logz = saved
  dout, dlogz = grads
  B, K, G, T, H = q.shape
  # A score's gradient is probs * (dprobs - drop).
  drop = jnp.sum(dout * out, axis=-1) - dlogz
  dout = dout.astype(dtype)
  dqs, dk, dv = [], jnp.zeros(k.shape), jnp.zeros(v.shape)

  for rows in _blocks(T):
    S = rows.stop
    scores, q_BKMH = _scores(q, k, ends_BT, rows)
    probs = jnp.exp(scores - _rows_of(logz, rows)[..., None])
    dout_BKMH = _rows_of(dout, rows)
    dprobs = _dot("BKMH,BKSH->BKMS", dout_BKMH, v[:, :, :S])
    dscores = (probs * (dprobs - _rows_of(drop, rows)[..., None])).astype(dtype)
    dq = _dot("BKMS,BKHS->BKMH", dscores, k[..., :S])
    dqs.append(dq.reshape(B, K, G, -1, H))
    dk = dk.at[..., :S].add(_dot("BKMH,BKMS->BKHS", q_BKMH, dscores))
    dv = dv.at[:, :, :S].add(_dot("BKMS,BKMH->BKSH", probs.astype(dtype), dout_BKMH))
  return jnp.concatenate(dqs, axis=3), dk, dv, None


_over_line.defvjp(_over_line_fwd, _over_line_bwd)
