"""The decoder: a transformer of the Llama kind as pure functions of a parameter tree.

The only file that knows Flax. Parameters are the tree of `param_tree.py` in float32;
the KV cache is an argument and a result. Knows nothing of losses, sampling or text, and
of families only what `ModelConfig` says of them.
"""

from flax import linen as nn
from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name as keep
import jax.numpy as jnp

from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.models import adapters
from dalign.models import attention
from dalign.models import kernels
from dalign.models import moe
from dalign.models import ops
from dalign.models import param_tree
from dalign.models import rotary
from dalign.models import sharding
from dalign.models.attention import Line
from dalign.models.attention import Part
from dalign.models.attention import attend
from dalign.types import Leaf
from dalign.types import PyTree

# What a layer keeps for its backward pass: results of products, and not what is made of
# them element by element, which costs less to make again than to write and read.
KEPT = (*attention.KEPT, "q", "k", "v", "middle", "gate", "up")


LINES = "batch", "token", None  # the axes of a line's activations between layers


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
  """One layer: attention over given parts and itself, then a gated MLP or experts."""

  cfg: ModelConfig
  compute: Compute
  transposed: bool = False  # weights are those of `unstack`

  @nn.compact
  def __call__(self, x_BTD, turn, own, parts: tuple[Part, ...], column=None):
    """Returns the new x_BTD and the (k, v) that now hold this layer's own.

    `turn` are the angles of `rotary.angles`. `own` is the cache that the new keys and
    values are written to, at `column`, before it is read: so it is updated in place.
    For whole lines it is their `attention.Visibility`.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
    N, K, H = cfg.heads, cfg.kv_heads, cfg.head_dim
    product = ops.matmul_transposed if self.transposed else ops.matmul
    shapes = {n: shape[1:] for n, shape in param_tree.shapes(cfg)["layers"].items()}

    def leaf(name):
      if name not in shapes:
        return None
      shape = shapes[name]
      if self.transposed and name in param_tree.MATRICES and len(shape) == 2:
        shape = shape[::-1]
      start = nn.initializers.normal(0.02)
      if not param_tree.is_matrix(name):
        start = nn.initializers.zeros if name.endswith("bias") else nn.initializers.ones
      return from_bits(self.param(name, start, shape))

    def dense(name, x):
      y, bias = product(x, leaf(name), dtype), leaf(f"{name}_bias")
      if self.has_variable("params", name + adapters.A):
        a: jax.Array = self.get_variable("params", name + adapters.A)
        b: jax.Array = self.get_variable("params", name + adapters.B)
        y += cfg.lora_scale * ops.matmul(ops.matmul(x, a, dtype), b, dtype)
      return y if bias is None else y + bias[None, None]

    def norm(name, x):
      scale = leaf(name)
      return x if scale is None else rms_norm(x, scale, cfg.norm_eps)

    def heads(name, x, n):
      y_BTE = dense(name, x)
      if cfg.qk_norm == "all":
        y_BTE = norm(f"{name}_norm", y_BTE)
      y_BNTH = y_BTE.reshape(*y_BTE.shape[:2], n, H).swapaxes(1, 2)
      return norm(f"{name}_norm", y_BNTH) if cfg.qk_norm == "head" else y_BNTH

    y_BTD = norm("attn_norm", x_BTD)
    q_BNTH, growth_B1T1 = rotary.rotate(heads("q", y_BTD, N), turn), turn[2]
    q_BNTH = q_BNTH if growth_B1T1 is None else q_BNTH * growth_B1T1
    k_BKHT = rotary.rotate(heads("k", y_BTD, K), turn).swapaxes(2, 3)
    v_BKTH = heads("v", y_BTD, K)
    q_BNTH, k_BKHT, v_BKTH = keep(q_BNTH, "q"), keep(k_BKHT, "k"), keep(v_BKTH, "v")
    if not self.transposed:
      q_BNTH, k_BKHT, v_BKTH = sharding.shard_by_heads(q_BNTH, k_BKHT, v_BKTH)
    if isinstance(own, Part):
      k_BKHT = write(own.k, k_BKHT, (0, 0, 0, column))
      v_BKTH = write(own.v, v_BKTH, (0, 0, column, 0))
      own = Part(k=k_BKHT, v=v_BKTH, mask=own.mask)
    else:
      own = Line(k=k_BKHT, v=v_BKTH, sight=own)
    out_BNTH = attend(
      q_BNTH,
      (*parts, own),
      jnp.dtype(self.compute.kv_dtype),
      _kernel(self.compute, cfg),
      scale=cfg.query_scale,
      cap=cfg.attention_cap,
      sinks_N=leaf("sinks"),
    )
    out_BTE = out_BNTH.swapaxes(1, 2).reshape(*x_BTD.shape[:2], N * H)
    x_BTD = keep(x_BTD + norm("attn_post_norm", dense("o", out_BTE)), "middle")

    y_BTD = norm("mlp_norm", x_BTD)
    gated = ACTIVATIONS[cfg.activation]
    if cfg.experts:
      used, normed = cfg.experts_used, cfg.experts_normed
      y_BTD = moe.mix(y_BTD, leaf, gated, used=used, normed=normed, dtype=dtype)
    else:
      gate_BTF, up_BTF = dense("gate", y_BTD), dense("up", y_BTD)
      y_BTD = dense("down", gated(keep(gate_BTF, "gate"), keep(up_BTF, "up")))
    x_BTD = x_BTD + norm("mlp_post_norm", y_BTD)
    if not self.transposed:
      x_BTD = sharding.constrain(x_BTD, *LINES)
    return x_BTD, (k_BKHT, v_BKTH)


def _clipped(gate, up):
  """gpt-oss's: both clipped at 7, the sigmoid 1.702 times as steep, up moved by one."""
  gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
  return gate * nn.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS = {
  "silu": lambda gate, up: nn.silu(gate) * up,
  "gelu": lambda gate, up: nn.gelu(gate, approximate=True) * up,
  "clipped": _clipped,
}


class Decoder(nn.Module):
  """Embedding, scanned layers, final norm. The head is applied by `ops.token_stats`."""

  cfg: ModelConfig
  compute: Compute

  @nn.compact
  def __call__(self, tokens_BT, positions_BT, ends_BT, prefix_kv, prefix_mask):
    cfg = self.cfg
    init = nn.initializers.normal(0.02)
    embed_VD = self.param("embed", init, (cfg.vocab, cfg.width))
    if not cfg.tied and self.is_initializing():  # of no use here: `ops.token_stats`
      self.param("head", init, (cfg.width, cfg.vocab))
    by_kind = rotary.angles(positions_BT, cfg)
    turns = jax.tree.map(lambda *each: jnp.stack(each), *by_kind.values())
    kept = () if self.compute.remat else KEPT
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    block = nn.remat(Block, prevent_cse=False, policy=policy)

    def layer(module, x_BTD, scanned):
      kv, window, kind = scanned
      sight = attention.Visibility(ends=ends_BT, positions=positions_BT, window=window)
      parts = ()
      if kv is not None:
        mask = prefix_mask
        if window is not None:
          at_BP = jnp.arange(mask.shape[-1])[None]
          mask = mask & attention.within_window(positions_BT, at_BP, window)
        parts = (Part(k=kv.k, v=kv.v, mask=mask),)
      turn = jax.tree.map(lambda each: each[0 if kind is None else kind], turns)
      return module(x_BTD, turn, sight, parts)

    scan = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=cfg.layers,
    )
    windows = jnp.asarray(windows_of(cfg)) if cfg.sliding else None
    kinds = [[*by_kind].index(kind) for kind in rotary.kinds(cfg)]
    kinds = jnp.asarray(kinds) if len(by_kind) > 1 else None
    x_BTD = sharding.constrain(embed(embed_VD, tokens_BT, cfg), *LINES)
    x_BTD, (k, v) = scan(
      block(cfg, self.compute, name="layers"), x_BTD, (prefix_kv, windows, kinds)
    )
    scale_D = self.param("norm", nn.initializers.ones, (cfg.width,))
    return rms_norm(x_BTD, scale_D, cfg.norm_eps), KV(k=k, v=v)


def embed(embed_VD, tokens_BT, cfg: ModelConfig):
  """The embeddings of tokens, [B, T, D]."""
  x_BTD = jnp.take(embed_VD, tokens_BT, axis=0).astype(jnp.float32)
  return x_BTD if cfg.embed_scale == 1.0 else x_BTD * cfg.embed_scale


def windows_of(cfg: ModelConfig) -> tuple[int, ...]:
  """How many last tokens each layer sees; more than there are where it sees all."""
  return tuple(
    cfg.window if layer in cfg.sliding else 2**30 for layer in range(cfg.layers)
  )


def _kernel(compute: Compute, cfg: ModelConfig):
  """What computes the attention of lines, if not `attention.py`. XLA cannot divide such
  kernels over a mesh: each device runs it on its own lines and heads."""
  kernel = kernels.KERNELS[compute.attention]
  if kernel is None:
    return None
  if cfg.attention_cap or cfg.sinks:
    raise ValueError(
      f"config.compute.attention: {compute.attention} computes neither capped scores "
      f"nor sinks, which {cfg.family} has; set it to xla"
    )

  def divided(q_BNTH, k_BKHT, v_BKTH, mask_BTS, dtype):
    heads, masked = ("batch", "heads", None, None), ("batch", None, None)
    kv_heads = "batch", "kv_heads", None, None
    return sharding.shard_map_by_axes(
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
    cfg=cfg,
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
  cfg: ModelConfig,
  compute: Compute,
  temperature: float = 1.0,
) -> ops.TokenStats:
  """`target_stats` of lines whose hidden states are known."""
  targets_BT, last = jnp.roll(tokens_BT, -1, axis=1), ((0, 0), (0, 1))
  parts, whole = sharding.token_partition(tokens_BT.shape)
  found = ops.token_stats(
    parts(hidden_BTD),
    head(params),
    parts(targets_BT),
    parts(jnp.pad(wanted_BT, last)),
    dtype=jnp.dtype(compute.dtype),
    chunk=compute.logits_chunk,
    temperature=temperature,
    cap=cfg.logit_cap,
    absent=cfg.absent,
    gathered=lambda head_DV: sharding.constrain(head_DV, None, "vocab"),
  )
  return jax.tree.map(lambda x: whole(x)[:, :-1], found)


def head(params: PyTree):
  """The output projection [D, V]: the transposed embedding when tied."""
  return params["head"] if "head" in params else params["embed"].T


def logits(params: PyTree, hidden, *, cfg: ModelConfig, compute: Compute):
  """Logits [..., V] of hidden states [..., D], made whole: for few of them."""
  product = ops.matmul(hidden, head(params), jnp.dtype(compute.dtype))
  return ops.mask_absent(ops.soft_cap(product, cfg.logit_cap), cfg.absent)


def encode_prefix(params, tokens_P, length, *, cfg: ModelConfig, compute: Compute):
  """The Prefix of `tokens_P`, of which the first `length` are real."""
  _, kv = forward_rows(params, tokens_P[None], cfg=cfg, compute=compute)
  return Prefix(kv=kv, length=length)


def matrices_to_cast(params: PyTree, *, compute: Compute) -> dict:
  """The layers' matrices that encoding wants as `cast` makes them: none in float32, and
  on an accelerator none that have the compute dtype already."""
  if jnp.dtype(compute.dtype) == jnp.float32:
    return {}

  def as_it_is(w) -> bool:
    platforms = {device.platform for device in w.sharding.device_set}
    return w.dtype == compute.dtype and "cpu" not in platforms

  layers = params["layers"]
  return {n: layers[n] for n in param_tree.MATRICES if not as_it_is(layers[n])}


def cast(matrices: dict, *, compute: Compute) -> dict:
  """Matrices for encoding in the compute dtype, once for many calls, each of which
  would take as long for it as for some hundred tokens.

  In bfloat16 they are held as their bits: XLA's CPU backend would widen all layers to
  float32 again before it slices one.
  """

  def bits(w):
    return jax.lax.bitcast_convert_type(w.astype(compute.dtype), jnp.uint16)

  return {name: bits(w) for name, w in matrices.items()}


def from_bits(w):
  """A matrix, where `cast` has made it its bits."""
  bits = w.dtype == jnp.uint16
  return jax.lax.bitcast_convert_type(w, jnp.bfloat16) if bits else w


def unstack(params: PyTree, *, cfg: ModelConfig, compute: Compute) -> PyTree:
  """Parameters for decoding: one tree a layer, matrices [out, in], compute dtype, with
  their adapters added.

  A decode loop that slices stacked layers would copy each weight at every step.
  """
  dtype = jnp.dtype(compute.dtype)

  def turn(name, x):
    if name not in param_tree.MATRICES:
      return x
    return (x.T if x.ndim == 2 else x).astype(dtype)

  def layer(i: int) -> dict:
    own = {name: leaf[i] for name, leaf in params["layers"].items()}
    whole = adapters.merge_adapters({"layers": own}, cfg=cfg)["layers"]
    return {name: turn(name, leaf) for name, leaf in whole.items()}

  layers = tuple(layer(i) for i in range(cfg.layers))
  return {
    "embed": params["embed"],
    "layers": layers,
    "norm": params["norm"],
    "head": head(params).T.astype(dtype),
  }


def decode_step(weights, token_B, position_B, reads, ring, column, *, cfg, compute):
  """One token a row through unstacked weights.

  `reads[l]` are the parts that layer l reads, `ring[l]` the part it also writes the
  token's keys and values to, at `column`, where its mask is already True. Returns the
  hidden states [B, D] and the rings' new (k, v) a layer.
  """
  block = Block(cfg, compute, transposed=True)
  x_BTD = embed(weights["embed"], token_B[:, None], cfg)
  turns = rotary.angles(position_B[:, None], cfg)
  written = []
  layers = zip(weights["layers"], rotary.kinds(cfg), reads, ring, strict=True)
  for params, kind, parts, own in layers:
    args = x_BTD, turns[kind], own, parts, column
    x_BTD, kv = block.apply({"params": params}, *args)
    written.append(kv)
  return rms_norm(x_BTD, weights["norm"], cfg.norm_eps)[:, 0], tuple(written)


def init(key, *, cfg: ModelConfig, compute: Compute) -> PyTree:
  """Random parameters, for tests and tiny configs."""
  zeros_BT = jnp.zeros((1, 2), jnp.int32)
  decoder = Decoder(cfg, compute)
  return decoder.init(key, zeros_BT, zeros_BT, None, None, None)["params"]
