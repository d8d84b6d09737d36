"""Decoding: token prompts in, completions out. Knows tokens; not text, specs, rewards.

Prompts come in groups. What the rows of a group share in front (a spec, a system turn)
is encoded once and read in place by all of them. Samples of one prompt fork one
prefill. Rows live in slots of a fixed batch, cut into lanes that each serve one group:
a finished row leaves, a waiting one enters, and no shape ever changes.
"""

import collections
import dataclasses
import functools
import itertools
from typing import Any, Callable, Iterable, Iterator, Sequence

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from dalign.config.fields import Halted
from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.config.model import SamplerConfig
from dalign.models import attention
from dalign.models import ops
from dalign.models import sharding
from dalign.models import transformer
from dalign.text import packing
from dalign.types import Key
from dalign.types import Leaf
from dalign.types import PyTree

VOCAB_BLOCK = 256  # tokens summed together before the inverse of the distribution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt to continue: its tokens, and the id that alone decides its randomness:
  text, numbers, or a tuple of them, that no other request of a run has."""

  tokens: tuple[int, ...]
  row_id: Any
  max_new: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What was sampled after a prompt: ids (the stop token included) and, in nats, the
  log-probability of each under the very distribution it was drawn from."""

  request: Request
  tokens: tuple[int, ...]
  logp: tuple[float, ...]
  finish: str  # "stop" or "length"


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
class Weights:
  """A model's parameters as encoding (`transformer.cast`) and decoding
  (`transformer.unstack`) read them. The former may be the very arrays that training
  goes on with."""

  encode: PyTree
  decode: PyTree


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


def _decode_one(
  weights, prefixes, slots, temperature, top_p, *, cfg, compute, stop_ids
):
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


def _insert_prompts(slots: Slots, kv: transformer.KV, src_R, slot_R, count) -> Slots:
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


def _start_rows(slots: Slots, starts_B, fields: dict) -> Slots:
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


def _grow_slots(old: Slots, new: Slots) -> Slots:
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


def _set_prefix(prefixes: Prefixes, kv: transformer.KV, length, lane) -> Prefixes:
  """Puts an encoded prefix into a lane."""
  layers = tuple(
    tuple(
      transformer.write(old, new[i], (lane, 0, 0, 0))
      for old, new in zip(pair, (kv.k, kv.v), strict=True)
    )
    for i, pair in enumerate(prefixes.kv)
  )
  return Prefixes(kv=layers, length_A=prefixes.length_A.at[lane].set(length))


def common_prefix(rows: list[tuple[int, ...]]) -> int:
  """How many first tokens all rows share; each keeps at least one of its own."""
  low, high = min(rows), max(rows)
  return min(packing.common_prefix(low, high), min(map(len, rows)) - 1)


def needed_prompt_room(rows: list[tuple[int, ...]], prefix_room: int) -> int:
  """The `prompt_room` that a group of these rows needs where they share up to
  `prefix_room` tokens."""
  return max(map(len, rows)) - min(common_prefix(rows), prefix_room) - 1


def bucket_size(n: int, step: int) -> int:
  """The smallest multiple of step that holds n, of at most four between one power of
  two and the next: few shapes to compile, and little padding."""
  steps = max(1, -(-n // step))
  coarse = max(1, 1 << (steps - 1).bit_length() - 3) if steps > 8 else 1
  return -(-steps // coarse) * coarse * step


def default_shapes(rows: int, groups: int) -> SamplerConfig:
  """Shapes that suit so many rows in so many groups: at the most 64 are decoded
  together, in 8 lanes."""
  slots, lanes = (
    min(most, 1 << (max(n, 1) - 1).bit_length())
    for most, n in ((64, rows), (8, groups))
  )
  return SamplerConfig(
    slots=slots,
    lanes=min(lanes, slots),
    chunk=8,
    prefill=min(8, slots),
    prompt_room=128,
    prompt_step=16,
    prefix_step=64,
  )


class Sampler:
  """Compiled decoding of one architecture; weights come with each call.

  On a mesh, which must then be set (`jax.set_mesh`), caches lie by rows and heads;
  what says which rows live is held by every device, and read by every process.
  """

  def __init__(
    self,
    *,
    cfg: ModelConfig,
    compute: Compute,
    stop_ids: Iterable[int],
    sampler: SamplerConfig,
    mesh: Mesh | None = None,
  ):
    self.cfg, self.compute = cfg, dataclasses.replace(compute, remat=False)
    self.sampler, self.stop_ids = sampler, tuple(stop_ids)
    self._mesh = mesh
    k = v = self._sharding(
      "slot", "kv_heads", None, None, shape=(sampler.slots, cfg.kv_heads)
    )
    cache_shardings = dict(prompt=((k, v),) * cfg.layers, fresh=((k, v),) * cfg.layers)
    replicated = self._sharding()
    names = (field.name for field in dataclasses.fields(Slots))
    slots = Slots(**{name: cache_shardings.get(name, replicated) for name in names})
    heads = None, "batch", "kv_heads", None, None
    rows = self._sharding(*heads, shape=(1, sampler.prefill, cfg.kv_heads))
    row = self._sharding(*heads, shape=(1, 1, cfg.kv_heads))
    prefix = transformer.Prefix(kv=transformer.KV(k=row, v=row), length=replicated)
    self._prefill = self._jit(self._prefill_fn, transformer.KV(k=rows, v=rows))
    self._prefix = self._jit(self._prefix_fn, prefix)
    self.empty = self._jit(self._empty_fn, slots, static_argnums=(0, 1, 2))
    self.grow = self._jit(_grow_slots, slots, donate_argnums=1)
    self._insert = self._jit(_insert_prompts, slots, donate_argnums=0)
    self._start = self._jit(_start_rows, slots, donate_argnums=0)
    self.chunk = self._jit(self._chunk_fn, slots, donate_argnums=2)
    self._lanes = {lanes: self._lane_programs(lanes) for lanes in (1, sampler.lanes)}
    self._cast = jax.jit(functools.partial(transformer.cast, compute=self.compute))
    unstack = functools.partial(transformer.unstack, cfg=cfg, compute=self.compute)
    self._unstack = jax.jit(unstack)

  @property
  def uses_mesh(self) -> bool:
    """Whether its arrays lie on a mesh, which cuts the slots that the config has."""
    return self._mesh is not None

  def _sharding(self, *names, shape=()) -> NamedSharding | None:
    """The sharding of an array of these logical axes; `shape` may be a prefix."""
    if self._mesh is None:
      return None
    shape = (*shape, *[1] * (len(names) - len(shape)))
    return sharding.named_sharding(self._mesh, names, shape)

  def _jit(self, fn, shardings, **options):
    options |= {} if self._mesh is None else {"out_shardings": shardings}
    return jax.jit(fn, **options)

  def _lane_programs(self, A: int):
    """Compiled functions: one makes the prefixes of A lanes, one sets a lane's."""
    kv = self._sharding("slot", "kv_heads", None, None, shape=(A, self.cfg.kv_heads))
    both = ((kv, kv),) * self.cfg.layers

    def make(P: int) -> Prefixes:
      return Prefixes(kv=self._cache(A, P), length_A=jnp.zeros(A, jnp.int32))

    shardings = Prefixes(kv=both, length_A=self._sharding())
    return (
      self._jit(make, shardings, static_argnums=0),
      self._jit(_set_prefix, shardings, donate_argnums=0),
    )

  def compiled(self) -> int:
    """How many programs have been compiled so far; constant after warm-up."""
    puts = [put for _, put in self._lanes.values()]
    prefill = self._prefix, self._prefill, *puts
    jits = *prefill, self._insert, self._start, self.chunk
    return sum(f._cache_size() for f in jits)

  def lowered(
    self,
    params: PyTree,
    *,
    prefix_room: int,
    prompt_room: int,
    max_new: int,
    lanes: int,
  ) -> dict[str, tuple[jax.stages.Lowered, PyTree, PyTree]]:
    """What `run` would call with parameters of these shapes and the longest prompts,
    lowered and not run: "prefill" and "decode" (a chunk of tokens), each with the
    weights and the caches that it reads. Arrays are ShapeDtypeStructs that say where
    they lie."""
    s = self.sampler
    P = -(-prefix_room // s.prefix_step) * s.prefix_step
    T = bucket_size(prompt_room, s.prompt_step)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._sharding())
    tokens_P = jax.ShapeDtypeStruct((P,), jnp.int32, sharding=self._sharding())
    rows = jax.ShapeDtypeStruct((s.prefill, T), jnp.int32, sharding=self._sharding())
    casting = self.to_cast(params)
    low = jax.eval_shape(self._cast, casting)
    low = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=casting[name].sharding)
      for name, x in low.items()
    }
    encode = params | {"layers": params["layers"] | low}
    decode = self._unstack.lower(params).compile().output_shardings
    decode = sharding.with_shardings(jax.eval_shape(self._unstack, params), decode)
    prefix = self._prefix.eval_shape(encode, tokens_P, scalar)
    make_lanes, _ = self._lanes[lanes]
    prefixes, slots = (
      make_lanes.eval_shape(P),
      self.empty.eval_shape(s.slots, T, max_new),
    )
    temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._sharding())
    prefill = self._prefill.lower(encode, prefix, rows)
    chunk = self.chunk.lower(decode, prefixes, slots, temperature)
    caches = prefixes.kv, slots.prompt, slots.fresh
    return {"prefill": (prefill, encode, prefix.kv), "decode": (chunk, decode, caches)}

  def to_cast(self, params: PyTree) -> dict:
    """The matrices of which encoding reads another copy than the parameters'."""
    return transformer.matrices_to_cast(params, compute=self.compute)

  def prepare(self, params: PyTree) -> Weights:
    """Parameters cast and unstacked for `run`; valid until the parameters change."""
    low = self._cast(self.to_cast(params))
    encode = params | {"layers": params["layers"] | low}
    return Weights(encode=encode, decode=self._unstack(params))

  def _prefix_fn(self, params, tokens_P, length):
    return transformer.encode_prefix(
      params, tokens_P, length, cfg=self.cfg, compute=self.compute
    )

  def _prefill_fn(self, params, prefix, tokens_BT):
    _, kv = transformer.forward_rows(
      params, tokens_BT, cfg=self.cfg, compute=self.compute, prefix=prefix
    )
    return jax.tree.map(lambda x: x.astype(self.compute.kv_dtype), kv)

  def _chunk_fn(self, weights, prefixes, slots, temperature, top_p=None):
    def more(carry):
      step, slots = carry
      return (step < self.sampler.chunk) & jnp.any(slots.active_B)

    def body(carry):
      step, slots = carry
      slots = _decode_one(
        weights,
        prefixes,
        slots,
        temperature,
        top_p,
        cfg=self.cfg,
        compute=self.compute,
        stop_ids=self.stop_ids,
      )
      return step + 1, slots

    return jax.lax.while_loop(more, body, (0, slots))[1]

  def _cache(self, B: int, S: int):
    cfg, dtype = self.cfg, jnp.dtype(self.compute.kv_dtype)
    k_shape = B, cfg.kv_heads, cfg.head_dim, S
    v_shape = B, cfg.kv_heads, S, cfg.head_dim
    return tuple(
      (jnp.zeros(k_shape, dtype), jnp.zeros(v_shape, dtype)) for _ in range(cfg.layers)
    )

  def _empty_fn(self, B: int, P: int, S: int) -> Slots:
    def ints():
      return jnp.zeros(B, jnp.int32)

    return Slots(
      prompt=self._cache(B, P),
      fresh=self._cache(B, S),
      prompt_len_B=ints(),
      live_BS=jnp.zeros((B, S), bool),
      column=jnp.zeros((), jnp.int32),
      token_B=ints(),
      position_B=ints(),
      key_B=jax.random.split(jax.random.key(0), B),
      limit_B=ints(),
      count_B=ints(),
      active_B=jnp.zeros(B, bool),
      stopped_B=jnp.zeros(B, bool),
      out_BS=jnp.zeros((B, S), jnp.int32),
      logp_BS=jnp.zeros((B, S), jnp.float32),
    )

  def run(
    self,
    weights: Weights,
    groups: Iterable[Sequence[Request]],
    *,
    key: Key,
    temperature: float,
    top_p: float = 1.0,
    prefix_room: int,
    prompt_room: int,
    max_new: int,
    more: Callable[[Completion], Iterable[Request]] = lambda _: (),
  ) -> Iterator[Completion]:
    """Completes the requests of all groups, in the order in which they finish; a group
    is asked for when there are slots for it.

    `weights` is `prepare(params)`. `prefix_room` (tokens that the rows of a group share
    in front, with 0 they share none), `prompt_room` (tokens of a row beyond those) and
    `max_new` only set shapes: keep them constant to reuse compiled programs.
    `more(completion)` may ask for further rows of the same group, which must begin as
    the others do. What a row draws depends on the key, its row id and its tokens alone.

    Raises ValueError when a request does not fit the given room.
    """
    pending = (group for group in groups if group)
    first = [*itertools.islice(pending, 2)]
    pending = itertools.chain(first, pending)
    A = self.sampler.lanes if len(first) > 1 else 1
    s = self.sampler
    P = -(-prefix_room // s.prefix_step) * s.prefix_step
    make_lanes, set_prefix = self._lanes[A]
    prefixes = make_lanes(P) if P else Prefixes(kv=(), length_A=np.zeros(A, np.int32))
    slots = self.empty(s.slots, bucket_size(prompt_room, s.prompt_step), max_new)
    slot_requests: list[Request | None] = [None] * s.slots
    lanes: list[Lane | None] = [None] * A
    heat = jnp.float32(temperature), None if top_p >= 1 else jnp.float32(top_p)

    def next_lane(lane_slots: range) -> Lane | None:
      """A lane for the next group; when there is none, with half of another's queue."""
      if group := next(pending, None):
        # Long prompts first, like ones together: a batch is as wide as its longest.
        group = sorted(group, key=lambda r: (-len(r.tokens), r.tokens))
        head, prefix = (), None
        if P:
          head = group[0].tokens[: min(common_prefix([r.tokens for r in group]), P)]
          tokens_P = np.zeros(P, np.int32)
          tokens_P[: len(head)] = head
          prefix = self._prefix(weights.encode, tokens_P, jnp.int32(len(head)))
        return Lane(
          self, weights.encode, key, head, prefix, lane_slots, collections.deque(group)
        )
      queued = [lane for lane in lanes if lane is not None and len(lane.waiting) > 1]
      if not queued:
        return None
      return max(queued, key=lambda lane: len(lane.waiting)).split(lane_slots)

    while True:
      for a, lane in enumerate(lanes):
        if lane is None or lane.idle(slot_requests):
          new = next_lane(range(a * s.slots // A, (a + 1) * s.slots // A))
          if new is not None:
            lane = lanes[a] = new
            if new.prefix is not None:
              prefixes = set_prefix(
                prefixes, new.prefix.kv, new.prefix.length, jnp.int32(a)
              )
        if lane is not None:
          slots = lane.refill(slots, slot_requests)
      if not any(slot_requests):
        return
      slots = self.chunk(weights.decode, prefixes, slots, *heat)
      for slot, done in collect_finished(slots, slot_requests):
        lane = lanes[slot * A // s.slots]
        if lane is not None:  # as the row was one of its own
          lane.add(more(done), slot, done.request, slot_requests)
        yield done

  def complete(
    self,
    weights: Weights,
    groups: Iterable[list[Request]],
    *,
    key: Key,
    temperature: float,
    top_p: float = 1.0,
    max_new: int,
    prefix_room: int | None = None,
    grow_to_fit: bool = False,
    more: Callable[[Completion], Iterable[Request]] = lambda _: (),
  ) -> Iterator[Completion]:
    """`run` with shapes that fit: the rows of a group share what they have in common,
    or of it the first `prefix_room` tokens; groups are made as they are needed where
    that is given. Prompts longer than the config has room for are an error, or with
    `grow_to_fit` take more. Raises Halted where log-probabilities are not finite."""
    if prefix_room is None or grow_to_fit:
      groups = [group for group in groups if group]
      rows = [[request.tokens for request in group] for group in groups]
    if prefix_room is None:
      # A row alone shares all of itself, which lies in a lane and not in every slot.
      shared_groups = [group_rows for group_rows in rows if len(group_rows) > 1] or rows
      prefix_room = max((self.sampler.prefix_step, *map(common_prefix, shared_groups)))
    prompt_room = self.sampler.prompt_room
    if grow_to_fit:
      prompt_room = max(
        (
          prompt_room,
          *(needed_prompt_room(group_rows, prefix_room) for group_rows in rows),
        )
      )
    for done in self.run(
      weights,
      groups,
      key=key,
      temperature=temperature,
      top_p=top_p,
      prefix_room=prefix_room,
      prompt_room=prompt_room,
      max_new=max_new,
      more=more,
    ):
      if not np.isfinite(done.logp).all():  # its tokens say nothing
        raise Halted(
          f"sampling: log-probabilities after {done.request.row_id!r:.80} are not "
          "finite; find out which of the model's parameters are not"
        )
      yield done


@dataclasses.dataclass
class Lane:
  """Requests of one group on their way through some of the slots."""

  sampler: Sampler
  params: PyTree
  key: Key
  head: tuple[int, ...]  # the tokens that all share,
  prefix: transformer.Prefix | None  # and what they encode to
  slots: range
  waiting: collections.deque
  ready: collections.deque = dataclasses.field(default_factory=collections.deque)
  reusing_prefill: list = dataclasses.field(default_factory=list)

  # `ready` has (request, kv, row of kv) of what is prefilled; `reusing_prefill` (slot,
  # request) of rows whose prompt lies in their slot already.

  def split(self, slots: range) -> "Lane":
    """A lane of the same group in other slots, with half of what waits here."""
    half = [self.waiting.pop() for _ in range(len(self.waiting) // 2)]
    waiting = collections.deque(reversed(half))
    return dataclasses.replace(
      self, slots=slots, waiting=waiting, ready=collections.deque(), reusing_prefill=[]
    )

  def add(
    self, requests: Iterable[Request], slot: int, done: Request, slot_requests: list
  ) -> None:
    """Takes further requests; one for the prompt that `slot` has just `done` goes
    on there, without a second prefill."""
    for request in requests:
      if slot_requests[slot] is None and request.tokens == done.tokens:
        slot_requests[slot] = request
        self.reusing_prefill.append((slot, request))
      else:
        self.waiting.append(request)

  def idle(self, slot_requests: list) -> bool:
    """Whether the group is through."""
    return (
      not self.waiting
      and not self.ready
      and not any(slot_requests[i] for i in self.slots)
    )

  def _prefill(self, room: int):
    """Encodes the next few distinct prompts; their last token is left to decoding."""
    s, shared = self.sampler.sampler, len(self.head)
    group: list[Request] = []
    rows: dict[tuple[int, ...], int] = {}
    while self.waiting and (len(rows) < s.prefill or self.waiting[0].tokens in rows):
      request = self.waiting.popleft()
      if request.tokens[:shared] != self.head:
        raise ValueError(
          f"request {request.row_id} does not begin with the {shared} tokens that the "
          "first requests of its group share"
        )
      rows.setdefault(request.tokens, len(rows))
      group.append(request)
    own = [tokens[shared:-1] for tokens in rows]
    longest = max(map(len, own))
    if longest > room:
      id = next(r.row_id for r in group if len(r.tokens) - shared - 1 == longest)
      raise ValueError(
        f"request {id!r:.80} has {longest} tokens beyond the shared prefix, more than "
        f"the {room} there is room for; raise sampler.prompt_room"
      )
    T = bucket_size(longest, s.prompt_step)
    tokens_BT = np.zeros((s.prefill, T), np.int32)
    for i, row in enumerate(own):
      tokens_BT[i, : len(row)] = row
    kv = self.sampler._prefill(self.params, self.prefix, tokens_BT)
    self.ready.extend((request, kv, rows[request.tokens]) for request in group)

  def refill(self, slots: Slots, slot_requests: list) -> Slots:
    """Fills this lane's free slots with waiting rows, a prefilled batch at a time."""
    free = [i for i in self.slots if slot_requests[i] is None]
    starting, self.reusing_prefill = self.reusing_prefill, []
    while free and (self.ready or self.waiting):
      if not self.ready:
        self._prefill(slots.prompt[0][1].shape[2])
      kv = self.ready[0][1]
      src_R, slot_R = np.zeros((2, len(slot_requests)), np.int32)
      count = 0
      while free and self.ready and self.ready[0][1] is kv:
        request, _, src_R[count] = self.ready.popleft()
        slot = slot_R[count] = free.pop(0)
        slot_requests[slot] = request
        starting.append((slot, request))
        count += 1
      slots = self.sampler._insert(slots, kv, src_R, slot_R, jnp.int32(count))
    return self._start(slots, starting) if starting else slots

  def _start(self, slots: Slots, starting) -> Slots:
    B, S = slots.live_BS.shape
    names = ("prompt_len_B", "token_B", "position_B", "limit_B")
    ints = {name: np.zeros(B, np.int32) for name in names}
    starts_B, words_B2 = np.zeros(B, bool), np.zeros((B, 2), np.uint32)
    for slot, request in starting:
      if not 0 < request.max_new <= S:
        raise ValueError(f"max_new of a request is 1..{S}, got {request.max_new}")
      prompt = len(request.tokens)
      self.sampler.cfg.check_length(
        prompt + request.max_new,
        f"{request.row_id!r:.80}: a prompt of {prompt} and {request.max_new} to write",
      )
      starts_B[slot], words_B2[slot] = True, ops.row_words(request.row_id)
      ints["prompt_len_B"][slot] = len(request.tokens) - 1 - len(self.head)
      ints["position_B"][slot] = len(request.tokens) - 1
      ints["token_B"][slot] = request.tokens[-1]
      ints["limit_B"][slot] = request.max_new
    fields = ints | {"key_B": ops.row_keys(self.key, words_B2)}
    return self.sampler._start(slots, starts_B, fields)


def collect_finished(slots: Slots, slot_requests: list) -> list[tuple[int, Completion]]:
  """Takes the finished rows out of their slots."""
  active_B = np.asarray(slots.active_B)
  ended = [i for i, r in enumerate(slot_requests) if r is not None and not active_B[i]]
  if not ended:
    return []
  out, logp, count, stopped = jax.device_get(
    (slots.out_BS, slots.logp_BS, slots.count_B, slots.stopped_B)
  )
  done = []
  for i in ended:
    n = int(count[i])
    completion = Completion(
      request=slot_requests[i],
      tokens=tuple(out[i, :n].tolist()),
      logp=tuple(logp[i, :n].tolist()),
      finish="stop" if stopped[i] else "length",
    )
    done.append((i, completion))
    slot_requests[i] = None
  return done
