"""The decoder: a Llama-family transformer as pure functions of a parameter tree.

The only file that knows Flax. Parameters are a nested dict of float32 arrays whose
layers are stacked on axis 0 (the tree of `weights.py`); the KV cache is an argument
and a result. Knows nothing of losses, sampling or text.
"""

import functools

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from dalign import ops
from dalign.config import Compute
from dalign.config import ModelConfig
from dalign.types import Leaf
from dalign.types import PyTree

HIDDEN = -1e30  # a finite stand-in for minus infinity: masked rows stay free of NaN

LAYER_AXES = {
  "attn_norm": ("layer", "width"),
  "q": ("layer", "width", "heads"),
  "k": ("layer", "width", "kv_heads"),
  "v": ("layer", "width", "kv_heads"),
  "o": ("layer", "heads", "width"),
  "mlp_norm": ("layer", "width"),
  "gate": ("layer", "width", "ffw"),
  "up": ("layer", "width", "ffw"),
  "down": ("layer", "ffw", "width"),
}


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
class KV:
  """Keys [L, A, K, H, S] and values [L, A, K, S, H] of all layers."""

  k: Leaf
  v: Leaf


@struct.dataclass
class Prefix:
  """A prompt prefix that all rows share: its KV (with A = 1) and true length."""

  kv: KV
  length: Leaf


class Block(nn.Module):
  """One layer: pre-norm attention over given parts and itself, then SwiGLU."""

  cfg: ModelConfig
  compute: Compute
  turned: bool = False  # weights are [out, in], for decoding

  @nn.compact
  def __call__(self, x_BTD, angles, own: Part, column, parts: tuple[Part, ...]):
    """Returns the new x_BTD and the (k, v) that now hold this layer's own.

    `own` is the cache that the new keys and values are written to, at `column`, before
    it is read: so it is updated in place. Its k and v may be None: then the new keys
    and values themselves are the cache.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    D, N, K, H, F = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.ffw
    init = nn.initializers.normal(0.02)

    def dense(name, x, shape):
      w = self.param(name, init, shape[::-1] if self.turned else shape)
      return (ops.matmul_turned if self.turned else ops.matmul)(x, w, dtype)

    def norm(name, x):
      return rms_norm(x, self.param(name, nn.initializers.ones, (D,)), cfg.norm_eps)

    def heads(y, n):
      return y.reshape(*y.shape[:2], n, H).swapaxes(1, 2)

    y_BTD = norm("attn_norm", x_BTD)
    q_BNTH = rotate(heads(dense("q", y_BTD, (D, N * H)), N), angles)
    k_BKHT = rotate(heads(dense("k", y_BTD, (D, K * H)), K), angles).swapaxes(2, 3)
    v_BKTH = heads(dense("v", y_BTD, (D, K * H)), K)
    if own.k is not None:
      k_BKHT = write(own.k, k_BKHT, (0, 0, 0, column))
      v_BKTH = write(own.v, v_BKTH, (0, 0, column, 0))
    own = Part(k=k_BKHT, v=v_BKTH, mask=own.mask)
    out_BNTH = attend(q_BNTH, (*parts, own), jnp.dtype(self.compute.kv_dtype))
    out_BTE = out_BNTH.swapaxes(1, 2).reshape(*x_BTD.shape[:2], N * H)
    x_BTD = x_BTD + dense("o", out_BTE, (N * H, D))

    y_BTD = norm("mlp_norm", x_BTD)
    gate_BTF = nn.silu(dense("gate", y_BTD, (D, F)))
    x_BTD = x_BTD + dense("down", gate_BTF * dense("up", y_BTD, (D, F)), (F, D))
    return x_BTD, (k_BKHT, v_BKTH)


class Decoder(nn.Module):
  """Embedding, scanned layers, final norm. The head is applied by `ops.token_stats`."""

  cfg: ModelConfig
  compute: Compute

  @nn.compact
  def __call__(self, tokens_BT, positions_BT, own_mask, prefix_kv, prefix_mask):
    cfg = self.cfg
    init = nn.initializers.normal(0.02)
    embed_VD = self.param("embed", init, (cfg.vocab, cfg.width))
    if not cfg.tied:
      self.param("head", init, (cfg.width, cfg.vocab))
    angles = rotary_angles(positions_BT, cfg)
    block = nn.remat(Block, prevent_cse=False) if self.compute.remat else Block

    def layer(module, x_BTD, kv):
      parts = () if kv is None else (Part(k=kv.k, v=kv.v, mask=prefix_mask),)
      return module(x_BTD, angles, Part(None, None, own_mask), 0, parts)

    scan = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=cfg.layers,
    )
    x_BTD = jnp.take(embed_VD, tokens_BT, axis=0)
    x_BTD, (k, v) = scan(block(cfg, self.compute, name="layers"), x_BTD, prefix_kv)
    scale_D = self.param("norm", nn.initializers.ones, (cfg.width,))
    return rms_norm(x_BTD, scale_D, cfg.norm_eps), KV(k=k, v=v)


def write(cache, new, at):
  """`new` put into a cache at the given start, in the cache's dtype."""
  return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), at)


def rms_norm(x, scale_D, eps: float):
  """Root-mean-square normalisation in float32 (Zhang & Sennrich, 1910.07467)."""
  x = x.astype(jnp.float32)
  scale = jnp.expand_dims(scale_D, range(x.ndim - 1))
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotary_angles(positions_BT, cfg: ModelConfig):
  """cos and sin, each float32 [B, 1, T, H/2], of the rotary embedding (2104.09864)."""
  exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / cfg.head_dim
  freqs = (1.0 / np.float32(cfg.rope_theta) ** exponent).astype(np.float32)
  angle = positions_BT[:, None, :, None].astype(jnp.float32) * freqs[None, None, None]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BNTH, angles):
  """Rotates the two halves of the head width against each other."""
  cos, sin = angles
  a, b = jnp.split(x_BNTH, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q_BNTH, parts: tuple[Part, ...], dtype):
  """Attention of one set of queries over several parts under one softmax.

  Each part is reduced by itself, shared keys as one matrix for all rows that share
  them, and the parts are joined by their log-sum-exp. Sums are float32.
  """
  B, N, T, H = q_BNTH.shape
  K = parts[0].k.shape[1]
  q_BKGTH = (q_BNTH * H**-0.5).reshape(B, K, N // K, T, H).astype(dtype)
  reduced = [_attend_part(q_BKGTH, part, dtype) for part in parts]
  top = functools.reduce(jnp.maximum, [peak for _, peak, _ in reduced])
  total, mass = 0.0, 0.0
  for out, peak, z in reduced:
    scale = jnp.exp(peak - top)
    total += out * scale[..., None]
    mass += z * scale
  return (total / mass[..., None]).reshape(B, N, T, H)


def _attend_part(q_BKGTH, part: Part, dtype):
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

  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = dot("AKMH,AKHS->AKMS", together(q_BKGTH), part.k.astype(dtype))
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
  out = dot("AKMS,AKSH->AKMH", probs.astype(dtype), part.v.astype(dtype))
  return apart(out), apart(peak), apart(z)


def forward(
  params: PyTree,
  tokens_BT,
  positions_BT,
  ends_BT,
  *,
  cfg: ModelConfig,
  compute: Compute,
  prefix: Prefix | None = None,
):
  """Hidden states after the final norm, float32 [B, T, D], and the KV of these tokens.

  A token sees itself, what comes before it and ends after it (`ops.tree_mask`), and,
  when given, the whole prefix; `positions_BT` then start at the prefix's length.
  """
  own_mask = ops.tree_mask(ends_BT)
  kv, mask = None, None
  if prefix is not None:
    kv = prefix.kv
    mask = (jnp.arange(kv.k.shape[-1]) < prefix.length)[None, None]
  return Decoder(cfg, compute).apply(
    {"params": params}, tokens_BT, positions_BT, own_mask, kv, mask
  )


def target_stats(
  params: PyTree,
  batch,
  wanted_BT,
  *,
  cfg: ModelConfig,
  compute: Compute,
  temperature: float = 1.0,
) -> ops.TokenStats:
  """Statistics, [B, T - 1] each, of tokens_BT[:, 1:] given the tokens before them.

  `batch` has tokens_BT, positions_BT and ends_BT. Where `wanted_BT`, of the shape of
  the result, is False they are 0. A token whose left neighbour is not the one before it
  in its row is not to be wanted: what it gets is meaningless.
  """
  hidden_BTD, _ = forward(
    params,
    batch["tokens_BT"],
    batch["positions_BT"],
    batch["ends_BT"],
    cfg=cfg,
    compute=compute,
  )
  return ops.token_stats(
    hidden_BTD[:, :-1],
    head(params),
    batch["tokens_BT"][:, 1:],
    wanted_BT,
    dtype=jnp.dtype(compute.dtype),
    chunk=compute.logits_chunk,
    temperature=temperature,
  )


def head(params: PyTree):
  """The output projection [D, V]: the transposed embedding when tied."""
  return params["head"] if "head" in params else params["embed"].T


def encode_prefix(params, tokens_P, length, *, cfg: ModelConfig, compute: Compute):
  """The Prefix of `tokens_P`, of which the first `length` are real."""
  at_P = jnp.arange(tokens_P.shape[0])
  ends_BT = ops.row_ends(jnp.reshape(length, 1), len(at_P))
  _, kv = forward(params, tokens_P[None], at_P[None], ends_BT, cfg=cfg, compute=compute)
  return Prefix(kv=kv, length=length)


def unstack(params: PyTree, *, cfg: ModelConfig, compute: Compute) -> PyTree:
  """Parameters for decoding: one tree a layer, matrices [out, in], compute dtype.

  A decode loop that slices stacked layers would copy each weight at every step.
  """
  dtype = jnp.dtype(compute.dtype)

  def cast(x):
    return x.T.astype(dtype) if x.ndim > 1 else x

  layers = tuple(
    jax.tree.map(lambda p: cast(p[i]), params["layers"])  # noqa: B023
    for i in range(cfg.layers)
  )
  return {
    "embed": params["embed"],
    "layers": layers,
    "norm": params["norm"],
    "head": cast(head(params)),
  }


def decode_step(weights, token_B, position_B, reads, ring, column, *, cfg, compute):
  """One token a row through unstacked weights.

  `reads[l]` are the parts that layer l reads, `ring[l]` the part it also writes the
  token's keys and values to, at `column`, where its mask is already True. Returns the
  hidden states [B, D] and the rings' new (k, v) a layer.
  """
  block = Block(cfg, compute, turned=True)
  x_BTD = jnp.take(weights["embed"], token_B[:, None], axis=0)
  angles = rotary_angles(position_B[:, None], cfg)
  written = []
  for params, parts, own in zip(weights["layers"], reads, ring, strict=True):
    x_BTD, kv = block.apply({"params": params}, x_BTD, angles, own, column, parts)
    written.append(kv)
  return rms_norm(x_BTD, weights["norm"], cfg.norm_eps)[:, 0], tuple(written)


def init(key, *, cfg: ModelConfig, compute: Compute) -> PyTree:
  """Random parameters, for tests and tiny configs."""
  tokens_BT = jnp.zeros((1, 2), jnp.int32)
  mask = jnp.ones((1, 2, 2), bool)
  decoder = Decoder(cfg, compute)
  return decoder.init(key, tokens_BT, tokens_BT, mask, None, None)["params"]


def logical_axes(params: PyTree) -> PyTree:
  """The logical axis names of each parameter, in the shape of the tree."""
  top = {
    "embed": ("vocab", "width"),
    "norm": ("width",),
    "head": ("width", "vocab"),
    "layers": LAYER_AXES,
  }
  return {name: top[name] for name in params}
