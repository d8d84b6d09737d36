"""The decoder: a Llama-family transformer as pure functions of a parameter tree.

The only file that knows Flax. Parameters are a nested dict of float32 arrays whose
layers are stacked on axis 0 (the tree of `weights.py`); the KV cache is an argument
and a result. Knows nothing of losses, sampling or text.
"""

from flax import linen as nn
from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name as keep
import jax.numpy as jnp
import numpy as np

from dalign import attention
from dalign import kernels
from dalign import ops
from dalign import sharding
from dalign.attention import Line
from dalign.attention import Part
from dalign.attention import attend
from dalign.config import Compute
from dalign.config import ModelConfig
from dalign.types import Leaf
from dalign.types import PyTree

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


# What a layer keeps for its backward pass: results of products, and not what is made of
# them element by element, which costs less to make again than to write and read.
KEPT = (*attention.KEPT, "q", "k", "v", "middle", "gate", "up")


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
  turned: bool = False  # weights are those of `unstack`

  @nn.compact
  def __call__(self, x_BTD, angles, own, parts: tuple[Part, ...], column=None):
    """Returns the new x_BTD and the (k, v) that now hold this layer's own.

    `own` is the cache that the new keys and values are written to, at `column`, before
    it is read: so it is updated in place. For whole lines it is the tokens' ends
    [B, T], or None where each line is one row.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    D, N, K, H, F = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.ffw
    init = nn.initializers.normal(0.02)

    def dense(name, x, size):
      shape = x.shape[-1], size
      w = self.param(name, init, shape[::-1] if self.turned else shape)
      product = ops.matmul_turned if self.turned else ops.matmul
      return product(x, from_bits(w), dtype)

    def norm(name, x):
      return rms_norm(x, self.param(name, nn.initializers.ones, (D,)), cfg.norm_eps)

    def heads(y, n):
      return y.reshape(*y.shape[:2], n, H).swapaxes(1, 2)

    y_BTD = norm("attn_norm", x_BTD)
    q_BNTH = rotate(heads(dense("q", y_BTD, N * H), N), angles)
    k_BKHT = rotate(heads(dense("k", y_BTD, K * H), K), angles).swapaxes(2, 3)
    v_BKTH = heads(dense("v", y_BTD, K * H), K)
    q_BNTH, k_BKHT, v_BKTH = keep(q_BNTH, "q"), keep(k_BKHT, "k"), keep(v_BKTH, "v")
    if isinstance(own, Part):
      k_BKHT = write(own.k, k_BKHT, (0, 0, 0, column))
      v_BKTH = write(own.v, v_BKTH, (0, 0, column, 0))
      own = Part(k=k_BKHT, v=v_BKTH, mask=own.mask)
    else:
      own = Line(k=k_BKHT, v=v_BKTH, ends=own)
    kv_dtype, kernel = jnp.dtype(self.compute.kv_dtype), _kernel(self.compute)
    out_BNTH = attend(q_BNTH, (*parts, own), kv_dtype, kernel)
    out_BTE = out_BNTH.swapaxes(1, 2).reshape(*x_BTD.shape[:2], N * H)
    x_BTD = keep(x_BTD + dense("o", out_BTE, D), "middle")

    y_BTD = norm("mlp_norm", x_BTD)
    gate_BTF = keep(dense("gate", y_BTD, F), "gate")
    up_BTF = keep(dense("up", y_BTD, F), "up")
    x_BTD = x_BTD + dense("down", nn.silu(gate_BTF) * up_BTF, D)
    return x_BTD, (k_BKHT, v_BKTH)


class Decoder(nn.Module):
  """Embedding, scanned layers, final norm. The head is applied by `ops.token_stats`."""

  cfg: ModelConfig
  compute: Compute

  @nn.compact
  def __call__(self, tokens_BT, positions_BT, ends_BT, prefix_kv, prefix_mask):
    cfg = self.cfg
    init = nn.initializers.normal(0.02)
    embed_VD = self.param("embed", init, (cfg.vocab, cfg.width))
    if not cfg.tied:
      self.param("head", init, (cfg.width, cfg.vocab))
    angles = rotary_angles(positions_BT, cfg)
    kept = () if self.compute.remat else KEPT
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    block = nn.remat(Block, prevent_cse=False, policy=policy)

    def layer(module, x_BTD, kv):
      parts = () if kv is None else (Part(k=kv.k, v=kv.v, mask=prefix_mask),)
      return module(x_BTD, angles, ends_BT, parts)

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


def _kernel(compute: Compute):
  """What computes the attention of lines, if not `attention.py`. XLA cannot divide such
  kernels over a mesh: each device runs it on its own lines and heads."""
  kernel = kernels.KERNELS[compute.attention]
  if kernel is None:
    return None

  def divided(q_BNTH, k_BKHT, v_BKTH, mask_BTS, dtype):
    heads, masked = ("batch", "heads", None, None), ("batch", None, None)
    kv_heads = "batch", "kv_heads", None, None
    return sharding.by_parts(
      lambda q, k, v, mask: kernel(q, k, v, mask, dtype),
      (heads, kv_heads, kv_heads, None if mask_BTS is None else masked),
      heads,
      (q_BNTH, k_BKHT, v_BKTH, mask_BTS),
    )

  return divided


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

  A token sees itself, what comes before it and ends after it (`attention.tree_mask`;
  without ends all that comes before it), and, when given, the whole prefix;
  `positions_BT` then start at the prefix's length.
  """
  kv, mask = None, None
  if prefix is not None:
    kv = prefix.kv
    mask = (jnp.arange(kv.k.shape[-1]) < prefix.length)[None, None]
  return Decoder(cfg, compute).apply(
    {"params": params}, tokens_BT, positions_BT, ends_BT, kv, mask
  )


def forward_rows(
  params: PyTree,
  tokens_BT,
  *,
  cfg: ModelConfig,
  compute: Compute,
  prefix: Prefix | None = None,
):
  """`forward` of lines that are one row each, padded on the right; what it gives for
  padding is meaningless."""
  at_T = jnp.arange(tokens_BT.shape[1]) + (0 if prefix is None else prefix.length)
  at_BT = jnp.broadcast_to(at_T, tokens_BT.shape)
  return forward(
    params, tokens_BT, at_BT, None, cfg=cfg, compute=compute, prefix=prefix
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
  hidden_BTD = hidden(params, batch, cfg=cfg, compute=compute)
  return stats(
    params,
    hidden_BTD,
    batch["tokens_BT"],
    wanted_BT,
    compute=compute,
    temperature=temperature,
  )


def hidden(params: PyTree, batch, *, cfg: ModelConfig, compute: Compute):
  """`forward` of a batch that has tokens_BT, positions_BT and ends_BT, without KV."""
  lines = batch["tokens_BT"], batch["positions_BT"], batch["ends_BT"]
  return forward(params, *lines, cfg=cfg, compute=compute)[0]


def stats(
  params: PyTree,
  hidden_BTD,
  tokens_BT,
  wanted_BT,
  *,
  compute: Compute,
  temperature: float = 1.0,
) -> ops.TokenStats:
  """`target_stats` of lines whose hidden states are known."""
  return ops.token_stats(
    hidden_BTD[:, :-1],
    head(params),
    tokens_BT[:, 1:],
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
  _, kv = forward_rows(params, tokens_P[None], cfg=cfg, compute=compute)
  return Prefix(kv=kv, length=length)


def cast(params: PyTree, *, compute: Compute) -> PyTree:
  """Parameters for encoding: the layers' matrices in the compute dtype, once for many
  calls, each of which would take as long for it as for some hundred tokens.

  In bfloat16 they are held as their bits: XLA's CPU backend would widen all layers to
  float32 again before it slices one.
  """
  if jnp.dtype(compute.dtype) == jnp.float32:
    return params

  def bits(w):
    if w.ndim < 3:
      return w
    return jax.lax.bitcast_convert_type(w.astype(compute.dtype), jnp.uint16)

  return params | {"layers": jax.tree.map(bits, params["layers"])}


def from_bits(w):
  """A matrix, where `cast` has made it its bits."""
  bits = w.dtype == jnp.uint16
  return jax.lax.bitcast_convert_type(w, jnp.bfloat16) if bits else w


def unstack(params: PyTree, *, cfg: ModelConfig, compute: Compute) -> PyTree:
  """Parameters for decoding: one tree a layer, matrices [out, in], compute dtype.

  A decode loop that slices stacked layers would copy each weight at every step.
  """
  dtype = jnp.dtype(compute.dtype)

  def turn(x):
    return x.T.astype(dtype) if x.ndim > 1 else x

  layers = tuple(
    jax.tree.map(lambda p: turn(p[i]), params["layers"])  # noqa: B023
    for i in range(cfg.layers)
  )
  return {
    "embed": params["embed"],
    "layers": layers,
    "norm": params["norm"],
    "head": turn(head(params)),
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
    x_BTD, kv = block.apply({"params": params}, x_BTD, angles, own, parts, column)
    written.append(kv)
  return rms_norm(x_BTD, weights["norm"], cfg.norm_eps)[:, 0], tuple(written)


def init(key, *, cfg: ModelConfig, compute: Compute) -> PyTree:
  """Random parameters, for tests and tiny configs."""
  zeros_BT = jnp.zeros((1, 2), jnp.int32)
  decoder = Decoder(cfg, compute)
  return decoder.init(key, zeros_BT, zeros_BT, None, None, None)["params"]


def logical_axes(params: PyTree) -> PyTree:
  """The logical axis names of each parameter, in the shape of the tree."""
  top = {
    "embed": ("vocab", "width"),
    "norm": ("width",),
    "head": ("width", "vocab"),
    "layers": LAYER_AXES,
  }
  return {name: top[name] for name in params}
