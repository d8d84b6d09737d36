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
class Visibility:
  """What the tokens of a line see of each other: by their ends [B, T] (`tree_mask`), or
  where these are None what comes before them; and of that, where a window is given, as
  many last tokens by their positions [B, T], themselves included."""

  ends: Leaf = None
  positions: Leaf = None
  window: Leaf = None


@struct.dataclass
class Line:
  """The tokens of each line itself: k [B, K, H, T], v [B, K, T, H]."""

  k: Leaf
  v: Leaf
  sight: Visibility


def within_window(positions_BT, seen_BS, window):
  """[B, T, S], True where a token sees by its window the one at the other position."""
  return positions_BT[:, :, None] - seen_BS[:, None] < window


def visible(sight: Visibility, T: int, rows: slice = slice(None)):
  """[B or 1, t, S], True where those tokens of T may see another; of a row, without
  ends, not the later ones. S are the tokens up to the last of `rows`."""
  if sight.ends is None:
    mask = (jnp.arange(T)[None, : rows.stop] <= jnp.arange(T)[rows, None])[None]
  else:
    mask = tree_mask(sight.ends, rows)
  if sight.window is None:
    return mask
  at_BT = sight.positions
  return mask & within_window(at_BT[:, rows], at_BT[:, : rows.stop], sight.window)


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


def attend(
  q_BNTH,
  parts: tuple[Part | Line, ...],
  dtype,
  kernel=None,
  *,
  scale: float | None = None,
  cap: float = 0.0,
  sinks_N=None,
):
  """Outputs float32 [B, N, T, H] of queries over several parts under one softmax.

  Each part is reduced by itself, shared keys as one matrix for all rows that share
  them, and the parts are joined by their log-sum-exp. Operands are `dtype`, sums
  float32. N is a multiple of the K heads of keys (2305.13245). Scores are scaled by
  `scale` (H ** -0.5 where it is None), then capped to cap * tanh(score / cap) where cap
  is not 0 (2408.00118). `sinks_N` are scores that the softmax counts beside those of
  keys, with nothing behind them (2309.17453, learned).

  A `kernel` takes over a line that stands alone, without cap and sinks: called with
  queries, keys, values, the mask [B, T, T] or None for rows, and dtype, it gives the
  outputs.
  """
  B, N, T, H = q_BNTH.shape
  K = parts[0].k.shape[1]
  scale = H**-0.5 if scale is None else scale
  if len(parts) == 1 and isinstance(parts[0], Line) and kernel is not None:
    line = parts[0]
    plain = line.sight.ends is None and line.sight.window is None
    mask_BTS = None if plain else visible(line.sight, T)
    if mask_BTS is not None:
      mask_BTS = jnp.broadcast_to(mask_BTS, (B, T, T))
    return kernel(q_BNTH * (scale * H**0.5), line.k, line.v, mask_BTS, dtype)
  q_BKGTH = (q_BNTH * scale).reshape(B, K, N // K, T, H)
  reduced = [_attend_one(q_BKGTH, part, dtype, cap) for part in parts]
  if len(parts) == 1 and isinstance(parts[0], Line) and sinks_N is None:
    return reduced[0][0].reshape(B, N, T, H)
  peaks = [peak for _, peak, _ in reduced]
  if sinks_N is not None:
    sink = sinks_N.reshape(1, K, N // K, 1)
    peaks.append(jax.lax.stop_gradient(sink))
  top = functools.reduce(jnp.maximum, peaks)
  total: Leaf = 0.0
  mass: Leaf = 0.0 if sinks_N is None else jnp.exp(sink - top)
  for out, peak, z in reduced:
    factor = jnp.exp(peak - top)
    total += out * factor[..., None]
    mass += z * factor
  return (total / mass[..., None]).reshape(B, N, T, H)


def _attend_one(q_BKGTH, part: Part | Line, dtype, cap: float):
  """Over one part: the output, and the score and number that its sum is counted in."""
  if isinstance(part, Line):
    out, logz = _attend_line(q_BKGTH, part.k, part.v, part.sight, dtype, cap)
    return out, logz, 1.0
  return _attend_part(q_BKGTH.astype(dtype), part, dtype, cap)


def _capped(scores, cap: float):
  return cap * jnp.tanh(scores / cap) if cap else scores


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _attend_part(q_BKGTH, part: Part, dtype, cap: float):
  """Over one part: the unnormalised output, the peak score, and the softmax's sum."""
  B, K, G, T, H = q_BKGTH.shape
  A, _, _, S = part.k.shape
  R = B // A  # rows that read the same keys: they become rows of one product

  def fold_rows(x):
    x = x.reshape(A, R, K, *x.shape[2:])
    return x.swapaxes(1, 2).reshape(A, K, R * G * T, *x.shape[5:])

  def unfold_rows(x):
    x = x.reshape(A, K, R, G, T, *x.shape[3:])
    return x.swapaxes(1, 2).reshape(B, K, G, T, *x.shape[5:])

  scores = _dot("AKMH,AKHS->AKMS", fold_rows(q_BKGTH), part.k.astype(dtype))
  scores = _capped(scores, cap)
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
  return unfold_rows(out), unfold_rows(peak), unfold_rows(z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_line(q_BKGTH, k_BKHT, v_BKTH, sight: Visibility, dtype, cap: float):
  """Softmax attention [B, K, G, T, H] of the tokens of a line over each other, and the
  log-sum-exp [B, K, G, T] of their scores; the scores are made again in the backward
  pass, from the latter (2205.14135, without its blocks of keys)."""
  return _attend_line_fwd(q_BKGTH, k_BKHT, v_BKTH, sight, dtype, cap)[0]


def _blocks(T: int) -> list[slice]:
  size = max(BLOCK, -(-T // (BLOCKS * BLOCK)) * BLOCK)
  return [slice(at, min(at + size, T)) for at in range(0, T, size)]


def _rows_of(x_BKGT, rows: slice):
  """A block [B, K, G * t, ...] of what is given a query, [B, K, G, T, ...]."""
  B, K, _, _, *more = x_BKGT.shape
  return x_BKGT[:, :, :, rows].reshape(B, K, -1, *more)


def _scores(q_BKGTH, k_BKHT, sight: Visibility, rows: slice, cap: float):
  """[B, K, G * t, S] of a block of queries, with the hidden ones masked, and these
  queries, [B, K, G * t, H]."""
  B, K, G, T, _ = q_BKGTH.shape
  q_BKMH = _rows_of(q_BKGTH, rows)
  scores = _capped(_dot("BKMH,BKHS->BKMS", q_BKMH, k_BKHT[..., : rows.stop]), cap)
  mask = visible(sight, T, rows)[:, None, None]
  shape = B, K, G, *mask.shape[3:]
  return jnp.where(mask, scores.reshape(shape), HIDDEN).reshape(scores.shape), q_BKMH


def _attend_line_fwd(q_BKGTH, k_BKHT, v_BKTH, sight: Visibility, dtype, cap: float):
  B, K, G, T, H = q_BKGTH.shape
  q, k, v = (x.astype(dtype) for x in (q_BKGTH, k_BKHT, v_BKTH))
  outs, logzs = [], []
  for rows in _blocks(T):
    scores, _ = _scores(q, k, sight, rows, cap)
    peak = jnp.max(scores, axis=-1)
    probs = jnp.exp(scores - peak[..., None])
    z = jnp.sum(probs, axis=-1)
    out = _dot("BKMS,BKSH->BKMH", probs.astype(dtype), v[:, :, : rows.stop])
    outs.append((out / z[..., None]).reshape(B, K, G, -1, H))
    logzs.append((peak + jnp.log(z)).reshape(B, K, G, -1))
  out = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
  logz = checkpoint_name(jnp.concatenate(logzs, axis=3), "attention_logz")
  return (out, logz), (q, k, v, sight, out, logz)


def _attend_line_bwd(dtype, cap: float, saved, grads):
  q, k, v, sight, out, logz = saved
  dout, dlogz = grads
  B, K, G, T, H = q.shape
  # A score's gradient is probs * (dprobs - drop).
  drop = jnp.sum(dout * out, axis=-1) - dlogz
  dout = dout.astype(dtype)
  dqs, dk, dv = [], jnp.zeros(k.shape), jnp.zeros(v.shape)

  for rows in _blocks(T):
    S = rows.stop
    scores, q_BKMH = _scores(q, k, sight, rows, cap)
    probs = jnp.exp(scores - _rows_of(logz, rows)[..., None])
    dout_BKMH = _rows_of(dout, rows)
    dprobs = _dot("BKMH,BKSH->BKMS", dout_BKMH, v[:, :, :S])
    dscores = probs * (dprobs - _rows_of(drop, rows)[..., None])
    if cap:
      dscores *= 1 - jnp.square(jnp.maximum(scores, -cap) / cap)
    dscores = dscores.astype(dtype)
    dq = _dot("BKMS,BKHS->BKMH", dscores, k[..., :S])
    dqs.append(dq.reshape(B, K, G, -1, H))
    dk = dk.at[..., :S].add(_dot("BKMH,BKMS->BKHS", q_BKMH, dscores))
    dv = dv.at[:, :, :S].add(_dot("BKMS,BKMH->BKSH", probs.astype(dtype), dout_BKMH))
  return jnp.concatenate(dqs, axis=3), dk, dv, None


_attend_line.defvjp(_attend_line_fwd, _attend_line_bwd)
