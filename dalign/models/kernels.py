"""Attention of whole lines by kernels that JAX brings: cuDNN's on GPU, splash on TPU.

Both see exactly what a mask lets them see, trees too, and give gradients; neither can
be joined with a cache or a prefix, which stays with `attention.py`. Knows arrays alone.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
import jax.numpy as jnp

LANES = 128  # splash wants lines of a multiple of these tokens
BLOCKS = 512, 384, 256, 128  # sides of splash's blocks: the largest that divides a line


def cudnn(q_BNTH, k_BKHT, v_BKTH, mask_BTS, dtype, implementation="cudnn"):
  """Outputs float32 [B, N, T, H] of flash attention; without a mask, tokens see those
  before them. A mask goes in as a bias [B, 1, T, S] of `dtype`.

  Raises ValueError for float32 operands, which cuDNN has no such kernel for.
  """
  if dtype == jnp.float32:
    raise ValueError(
      "config.compute.attention: cudnn multiplies in bfloat16; set "
      "config.compute.kv_dtype to bfloat16, or attention to xla"
    )
  q_BTNH, k_BTKH, v_BTKH = (
    x.astype(dtype)
    for x in (
      q_BNTH.swapaxes(1, 2),
      k_BKHT.transpose(0, 3, 1, 2),
      v_BKTH.swapaxes(1, 2),
    )
  )
  T = q_BTNH.shape[1]
  if T % 2:  # with a gradient, cuDNN wants lines of even length
    odd = (0, 1)
    heads = (0, 0), odd, (0, 0), (0, 0)
    q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, heads) for x in (q_BTNH, k_BTKH, v_BTKH))
    if mask_BTS is not None:
      mask_BTS = jnp.pad(mask_BTS, ((0, 0), odd, odd))
  out_BTNH = jax.nn.dot_product_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    mask=None if mask_BTS is None else mask_BTS[:, None],
    is_causal=mask_BTS is None,
    implementation=implementation,
  )
  return out_BTNH[:, :T].swapaxes(1, 2).astype(jnp.float32)


def splash(q_BNTH, k_BKHT, v_BKTH, mask_BTS, dtype, interpret=False):
  """Outputs float32 [B, N, T, H] of splash attention; without a mask, tokens see those
  before them. A mask is held as bytes [B, T, S], and blocks it hides are skipped."""
  T, H = q_BNTH.shape[2:]
  pad = -T % LANES
  heads = (q_BNTH * H**-0.5, k_BKHT.swapaxes(2, 3), v_BKTH)
  q_BNTH, k_BKTH, v_BKTH = (
    jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))).astype(dtype) for x in heads
  )
  if mask_BTS is not None:
    mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, pad), (0, pad)))
  kernel = functools.partial(_splash_line, interpret=interpret)
  out_BNTH = jax.vmap(kernel)(mask_BTS, q_BNTH, k_BKTH, v_BKTH)
  return out_BNTH[:, :, :T].astype(jnp.float32)


def _splash_line(mask_TS, q_NTH, k_KTH, v_KTH, *, interpret: bool):
  N, T, _ = q_NTH.shape
  side = next(side for side in BLOCKS if T % side == 0)
  fields = dataclasses.fields(splash_attention_kernel.BlockSizes)
  sizes: dict[str, Any] = {f.name: side for f in fields if f.name.startswith("block_")}
  if mask_TS is None:
    causal = splash_attention_mask.CausalMask((T, T))
    mask = splash_attention_mask.MultiHeadMask([causal] * N)
  else:
    mask = mask_TS[None]
  kernel = splash_attention_kernel.make_splash_mha(
    mask,
    block_sizes=splash_attention_kernel.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name="attention",
    interpret=interpret,
  )
  # Under jit this flag has become an array, which the kernel's `if` cannot read.
  for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
    info = getattr(kernel, name)._replace(is_dynamic_mask=mask_TS is not None)
    setattr(kernel, name, info)
  return kernel(q_NTH, k_KTH, v_KTH)


KERNELS = {"xla": None, "cudnn": cudnn, "splash": splash}
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
