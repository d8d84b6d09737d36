"""A mixture of experts: which experts serve a token, and what they make of it.

Rows are sorted by expert and multiplied group by group, so that only the chosen
experts' work is done, and no token is dropped. On a mesh each device sorts the tokens
that it holds for the experts that it holds. Knows arrays alone.
"""

import jax
from jax.ad_checkpoint import checkpoint_name as keep
import jax.numpy as jnp

from dalign.models import sharding

AXES = {  # of what `mix` reads
  "router": (None, None),
  "router_bias": (None,),
  "gate": ("expert", None, "ffw"),
  "gate_bias": ("expert", "ffw"),
  "up": ("expert", None, "ffw"),
  "up_bias": ("expert", "ffw"),
  "down": ("expert", "ffw", None),
  "down_bias": ("expert", None),
}


def mix(x_BTD, leaf, gated, *, used: int, normed: bool, dtype):
  """Outputs float32 [B, T, D] of tokens, each the weighted sum of `used` experts'
  outputs.

  `leaf(name)` gives router [D, E], gate and up [E, D, F], down [E, F, D], and each's
  bias or None under name + "_bias"; `gated(gate, up)` is the activation. Weights are
  the router's probabilities; `normed` has those of the experts used add up to one.
  """
  parts = {name: leaf(name) for name in AXES}
  ffw = parts["gate"].shape[2]

  def on_device(x_BTD, *values):
    params = dict(zip(parts, values, strict=True))
    y_MD = _local_experts(
      x_BTD.reshape(-1, x_BTD.shape[2]), params, gated, ffw, used, normed, dtype
    )
    return y_MD.reshape(x_BTD.shape)

  lines = "batch", "token", None
  axes = [None if value is None else AXES[name] for name, value in parts.items()]
  return sharding.shard_map_by_axes(
    on_device, (lines, *axes), lines, (x_BTD, *parts.values())
  )


def _local_experts(x_MD, params, gated, ffw: int, used: int, normed: bool, dtype):
  """Outputs of this device's tokens: the sum over devices of what their experts, or
  their parts of the feed-forward width, add."""
  M, D = x_MD.shape
  logits_ME = jnp.dot(x_MD, params["router"], precision="highest")
  if params["router_bias"] is not None:
    logits_ME += params["router_bias"][None]
  weight_MU, expert_MU = jax.lax.top_k(jax.nn.softmax(logits_ME), used)
  if normed:
    weight_MU /= jnp.sum(weight_MU, axis=-1, keepdims=True)
  count, _, part = params["gate"].shape
  first = 0 if count == logits_ME.shape[1] else jax.lax.axis_index("expert") * count
  expert_R = expert_MU.reshape(-1) - first
  expert_R = jnp.where((expert_R >= 0) & (expert_R < count), expert_R, count)
  order_R = jnp.argsort(expert_R, stable=True)  # those of no expert here come last
  sorted_R = expert_R[order_R]
  rows_E = jnp.bincount(expert_R, length=count).astype(jnp.int32)

  def grouped(name, x_RI):
    return jax.lax.ragged_dot(
      x_RI.astype(dtype),
      params[name].astype(dtype),
      rows_E,
      preferred_element_type=jnp.float32,
    )

  def biased(name, y_RO):
    bias = params[f"{name}_bias"]
    return y_RO if bias is None else y_RO + bias[jnp.minimum(sorted_R, count - 1)]

  x_RD = x_MD[order_R // used]
  gate_RF = keep(biased("gate", grouped("gate", x_RD)), "gate")
  up_RF = keep(biased("up", grouped("up", x_RD)), "up")
  y_RD = grouped("down", gated(gate_RF, up_RF))
  if part != ffw:
    y_RD = jax.lax.psum(y_RD, "tensor")
  y_RD = jnp.where((sorted_R < count)[:, None], biased("down", y_RD), 0.0)
  y_RD = jnp.zeros_like(y_RD).at[order_R].set(y_RD, unique_indices=True)
  y_MD = jnp.sum(y_RD.reshape(M, used, D) * weight_MU[..., None], axis=1)
  return y_MD if count == logits_ME.shape[1] else jax.lax.psum(y_MD, "expert")
