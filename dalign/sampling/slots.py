"""The decode state and one step of it: a token for each row that lives in a slot.

Pure functions of arrays, which programs.py compiles. Knows no requests or queues.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from dalign.models import attention
from dalign.models import ops
from dalign.models import transformer
from dalign.types import Leaf

VOCAB_BLOCK = 256  # tokens summed together before the inverse of the distribution


@struct.dataclass
class Slots:
  """The decode state. B slots, S columns for new tokens, P columns for the prompt.

  New tokens of all rows are written to one moving column, modulo S; `live_BS` says
  which columns belong to the row that now sits in a slot. Order in the cache does not
  matter to attention, since positions are inside the keys.
  """

  prompt: Leaf  # a layer (k [B, K, H, P], v [B, K, P, H])
  fresh: Leaf  # a layer (k [B, K, H, S], v [B, K, S, H])
  prompt_len_B: Leaf
  live_BS: Leaf
  column: Leaf
  token_B: Leaf  # the last token, not yet in the cache
  position_B: Leaf
  key_B: Leaf
  limit_B: Leaf
  count_B: Leaf
  active_B: Leaf
  stopped_B: Leaf
  out_BS: Leaf
  logp_BS: Leaf


@struct.dataclass
class Prefixes:
  """The shared prefix of each lane: (k, v) a layer, or none, and their true lengths."""

  kv: Leaf
  length_A: Leaf


def nucleus(logits_BV, top_p):
  """Logits, -inf for the tokens outside the nucleus (1904.09751): the fewest likeliest
  ones that have `top_p` of the probability, one at least, and those that are as likely
  as the last of them. `top_p` is one number, or one a row, [B]; 1 leaves all."""
  top_p_B1 = jnp.broadcast_to(top_p, len(logits_BV))[:, None]
  probs_BV = jax.nn.softmax(logits_BV, axis=-1)
  falling_BV = jnp.sort(probs_BV, axis=-1, descending=True)
  upto_BV = jnp.cumsum(falling_BV, axis=-1)
  before_BV = jnp.pad(upto_BV[:, :-1], ((0, 0), (1, 0)), constant_values=-1.0)
  inside_BV = jnp.where(before_BV < top_p_B1, falling_BV, 1.0)
  least_B1 = jnp.min(inside_BV, axis=-1, keepdims=True)
  kept_BV = (probs_BV >= least_B1) | (top_p_B1 >= 1)
  return jnp.where(kept_BV, logits_BV, -jnp.inf)


def sample_tokens(logits_BV, key_B, temperature, top_p=None):
  """A token a row from softmax(logits / temperature), of which `top_p` is left
  (`nucleus`), with its log-probability under what is left.

  Both are one number, or one a row, [B]; a `top_p` of None leaves all, and is cheaper
  than 1. Temperature 0 is greedy, with the log-probability at temperature 1. One
  uniform number a row is inverted through sums of blocks of the vocabulary, which is
  cheaper and more exact than one long cumulative sum or a Gumbel number a token.
  """
  B, V = logits_BV.shape
  temperature_B = jnp.broadcast_to(temperature, B)
  greedy_B = temperature_B <= 0
  scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
  if top_p is not None:
    scaled_BV = nucleus(scaled_BV, jnp.where(greedy_B, 1.0, top_p))
  logz_B = jax.nn.logsumexp(scaled_BV, axis=-1)
  probs_BV = jnp.exp(scaled_BV - logz_B[:, None])
  probs_BNC = jnp.pad(probs_BV, ((0, 0), (0, -V % VOCAB_BLOCK)))
  probs_BNC = probs_BNC.reshape(B, -1, VOCAB_BLOCK)
  upto_BN = jnp.cumsum(jnp.sum(probs_BNC, axis=-1), axis=-1)
  u_B = jax.vmap(jax.random.uniform)(key_B)
  aim_B = u_B * upto_BN[:, -1]
  block_B = jnp.sum(upto_BN <= aim_B[:, None], axis=-1)
  block_B = jnp.minimum(block_B, upto_BN.shape[1] - 1)
  before_BN = upto_BN - jnp.sum(probs_BNC, axis=-1)
  before_B = jnp.take_along_axis(before_BN, block_B[:, None], axis=1)[:, 0]
  inside_BC = jnp.take_along_axis(probs_BNC, block_B[:, None, None], axis=1)[:, 0]
  upto_BC = jnp.cumsum(inside_BC, axis=-1)
  hit_BC = (upto_BC > (aim_B - before_B)[:, None]) & (inside_BC > 0)
  # Rounding can leave the aim above the last sum: then the likeliest of the block.
  inside_B = jnp.where(
    jnp.any(hit_BC, axis=-1),
    jnp.argmax(hit_BC, axis=-1),
    jnp.argmax(inside_BC, axis=-1),
  )
  token_B = block_B * VOCAB_BLOCK + inside_B
  token_B = jnp.where(greedy_B, jnp.argmax(logits_BV, axis=-1), token_B)
  picked_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=-1)[:, 0]
  return token_B.astype(jnp.int32), picked_B - logz_B


def decode_one(weights, prefixes, slots, temperature, top_p, *, cfg, compute, stop_ids):
  """One token for every active slot."""
  S = slots.live_BS.shape[1]
  column = slots.column % S
  at_1S = jnp.arange(S)[None]
  live_BS = slots.live_BS | (at_1S == column)
  at_1P = jnp.arange(slots.prompt[0][1].shape[2])[None]
  prompt_mask_BP = at_1P < slots.prompt_len_B[:, None]
  B, A = len(slots.token_B), len(prefixes.length_A)
  length_B = jnp.repeat(prefixes.length_A, B // A)
  # What each part's columns hold: whether they are a row's own, and their positions.
  ages_1S = (column - at_1S) % S
  prompt = prompt_mask_BP, length_B[:, None] + at_1P
  fresh = live_BS, slots.position_B[:, None] - ages_1S
  parts = [(slots.prompt, *prompt), (slots.fresh, *fresh)]
  if prefixes.kv:
    at_1P = jnp.arange(prefixes.kv[0][1].shape[2])[None]
    parts.insert(0, (prefixes.kv, at_1P < length_B[:, None], at_1P))
  reads, ring = [], []
  for i in range(cfg.layers):
    at_B1 = slots.position_B[:, None] if i in cfg.sliding else None
    *read, own = (
      _cache_part(kv[i], mask_BS, at_BS, at_B1, cfg.window)
      for kv, mask_BS, at_BS in parts
    )
    reads.append(tuple(read))
    ring.append(own)
  hidden_BD, fresh = transformer.decode_step(
    weights,
    slots.token_B,
    slots.position_B,
    reads,
    ring,
    column,
    cfg=cfg,
    compute=compute,
  )
  logits_BV = ops.matmul_transposed(
    hidden_BD, weights["head"], jnp.dtype(compute.dtype)
  )
  logits_BV = ops.mask_absent(ops.soft_cap(logits_BV, cfg.logit_cap), cfg.absent)
  key_B = jax.vmap(jax.random.fold_in)(slots.key_B, slots.count_B)
  token_B, logp_B = sample_tokens(logits_BV, key_B, temperature, top_p)

  active_B = slots.active_B
  stop_B = jnp.isin(token_B, jnp.asarray(stop_ids)) & active_B
  count_B = slots.count_B + active_B
  at_BS = (at_1S == slots.count_B[:, None]) & active_B[:, None]
  return slots.replace(
    fresh=fresh,
    live_BS=live_BS & (active_B[:, None] | slots.live_BS),
    column=slots.column + 1,
    token_B=jnp.where(active_B, token_B, slots.token_B),
    position_B=slots.position_B + active_B,
    count_B=count_B,
    active_B=active_B & ~stop_B & (count_B < slots.limit_B),
    stopped_B=slots.stopped_B | stop_B,
    out_BS=jnp.where(at_BS, token_B[:, None], slots.out_BS),
    logp_BS=jnp.where(at_BS, logp_B[:, None], slots.logp_BS),
  )


def _cache_part(kv, mask_BS, at_BS, at_B1, window: int) -> attention.Part:
  """One layer's cache with what its rows may see; `at_B1` are the positions that they
  look from where a window ends their sight."""
  mask_BTS = mask_BS[:, None]
  if at_B1 is not None:
    mask_BTS = mask_BTS & attention.within_window(at_B1, at_BS, window)
  k, v = kv
  return attention.Part(k=k, v=v, mask=mask_BTS)


def insert_prompts(slots: Slots, kv: transformer.KV, src_R, slot_R, count) -> Slots:
  """Copies the first `count` of the rows `src_R` of `kv` into the slots `slot_R`."""

  def put(i, prompt):
    def cache(old, new):
      row = jax.lax.dynamic_index_in_dim(new, src_R[i])
      return transformer.write(old, row, (slot_R[i], 0, 0, 0))

    return tuple(
      (cache(k, kv.k[layer]), cache(v, kv.v[layer]))
      for layer, (k, v) in enumerate(prompt)
    )

  return dataclasses.replace(
    slots, prompt=jax.lax.fori_loop(0, count, put, slots.prompt)
  )


def start_rows(slots: Slots, starts_B, fields: dict) -> Slots:
  """Begins a new row in each slot of `starts_B`, whose prompt lies there already;
  `fields` are the values of all slots, of which those that start are taken."""
  fields |= {"live_BS": False, "count_B": 0, "active_B": True, "stopped_B": False}

  def pick(name, new):
    old = getattr(slots, name)
    mask = starts_B.reshape(-1, *[1] * (old.ndim - 1))
    return jnp.where(mask, new, old)

  return dataclasses.replace(
    slots, **{name: pick(name, new) for name, new in fields.items()}
  )


def grow_slots(old: Slots, new: Slots) -> Slots:
  """The rows of `old` in the first slots of `new`, which has room for at least as many
  rows, tokens of a prompt and new tokens. The ring of new tokens is turned so that the
  oldest column is the first, and grows at its end."""
  S = old.live_BS.shape[1]

  def rolled(x, axis):
    return jnp.roll(x, -(old.column % S), axis)

  old = dataclasses.replace(
    old,
    fresh=tuple((rolled(k, 3), rolled(v, 2)) for k, v in old.fresh),
    live_BS=rolled(old.live_BS, 1),
    column=jnp.full_like(old.column, S),
  )

  def put(new, old):
    return jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim)

  return jax.tree.map(put, new, old)


def set_prefix(prefixes: Prefixes, kv: transformer.KV, length, lane) -> Prefixes:
  """Puts an encoded prefix into a lane."""
  layers = tuple(
    tuple(
      transformer.write(old, new[i], (lane, 0, 0, 0))
      for old, new in zip(pair, (kv.k, kv.v), strict=True)
    )
    for i, pair in enumerate(prefixes.kv)
  )
  return Prefixes(kv=layers, length_A=prefixes.length_A.at[lane].set(length))
