"""Rotary position embeddings (2104.09864) and how families stretch and mix them.

Frequencies are numbers of a config, made once in float64; knows no model.
"""

import math

import jax.numpy as jnp
import numpy as np

from dalign.config.model import ModelConfig

MAIN, LOCAL, NONE = range(3)  # the kinds of layers


def kinds(cfg: ModelConfig) -> tuple[int, ...]:
  """The kind of each layer."""

  def one(layer: int) -> int:
    if layer in cfg.unrotated:
      return NONE
    return LOCAL if cfg.local_theta and layer in cfg.sliding else MAIN

  return tuple(one(layer) for layer in range(cfg.layers))


def angles(positions_BT, cfg: ModelConfig) -> dict:
  """For each kind of layer that there is, cos and sin, each float32 [B, 1, T, H/2], and
  what its queries are multiplied with, float32 [B, 1, T, 1], or None."""
  positions = positions_BT[:, None, :, None].astype(jnp.float32)
  growth = _query_growth(positions_BT, cfg)

  def cos_sin(freqs, scale: float):
    angle = positions * freqs.astype(np.float32)[None, None, None]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale, growth

  def one(kind: int):
    if kind == MAIN:
      return cos_sin(*frequencies(cfg))
    plain = base(cfg.local_theta or cfg.rope_theta, cfg.head_dim)
    return cos_sin(plain if kind == LOCAL else 0 * plain, 1.0)

  return {kind: one(kind) for kind in sorted(set(kinds(cfg)))}


def _query_growth(positions_BT, cfg: ModelConfig):
  """What queries are multiplied with, float32 [B, 1, T, 1], or None: of a query at
  position p, 1 + beta * log(1 + p // original length) (Llama 4's, in Ministral 3)."""
  rope = dict(cfg.rope)
  if not (beta := rope.get("llama_4_scaling_beta")):
    return None
  times_BT = positions_BT // int(rope["original_max_position_embeddings"])
  return (1 + beta * jnp.log1p(times_BT.astype(jnp.float32)))[:, None, :, None]


def rotate(x_BNTH, turn):
  """Rotates the two halves of the head width against each other."""
  cos, sin, _ = turn
  a, b = jnp.split(x_BNTH, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def base(theta: float, head_dim: int) -> np.ndarray:
  """Angle a token, [H/2]."""
  return 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)


def frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
  """Angle a token [H/2] of the main kind, and a factor of cos and sin.

  ValueError names a kind of scaling that is not known.
  """
  rope, freqs = dict(cfg.rope), base(cfg.rope_theta, cfg.head_dim)
  kind = rope.get("rope_type", "default")
  if kind not in SCALINGS:
    raise ValueError(f"rotary scaling {kind!r}; known: {', '.join(SCALINGS)}")
  try:
    return SCALINGS[kind](freqs, rope, cfg)
  except KeyError as missing:
    raise ValueError(f"rotary scaling {kind!r} wants {missing}") from missing


def _linear(freqs, rope, cfg):
  """Positions divided by a factor (2306.15595)."""
  del cfg
  return freqs / rope["factor"], 1.0


def _llama3(freqs, rope, cfg):
  """Long waves divided, short ones kept, those between interpolated (2407.21783)."""
  del cfg
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  turns = rope["original_max_position_embeddings"] * freqs / (2 * math.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return freqs * (kept + (1 - kept) / rope["factor"]), 1.0


def _yarn(freqs, rope, cfg):
  """Divided where a wave turns seldom within the original length, kept where it turns
  often, with a ramp between, and attention sharpened (2309.00071)."""
  length, half = rope["original_max_position_embeddings"], cfg.head_dim // 2
  factor = rope.get("factor") or cfg.max_length / length

  def dim_of(turns: float) -> float:
    return half * math.log(length / (turns * 2 * math.pi)) / math.log(cfg.rope_theta)

  first = dim_of(rope.get("beta_fast") or 32)
  last = dim_of(rope.get("beta_slow") or 1)
  if rope.get("truncate", True):
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, cfg.head_dim - 1)
  ramp = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)

  def sharper(weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

  scale = rope.get("attention_factor")
  if scale is None:
    scale = sharper(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
      scale = sharper(rope["mscale"]) / sharper(rope["mscale_all_dim"])
  return freqs * (1 - ramp + ramp / factor), scale


SCALINGS = {
  "default": lambda freqs, rope, cfg: (freqs, 1.0),
  "linear": _linear,
  "llama3": _llama3,
  "yarn": _yarn,
}
