"""The programs of decoding, compiled for one architecture on a device or a mesh.

Knows shapes and where arrays lie; not which request sits in which slot (sampler.py).
"""

import dataclasses
import functools
from typing import Iterable

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding

from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.config.model import SamplerConfig
from dalign.models import sharding
from dalign.models import transformer
from dalign.sampling.slots import Prefixes
from dalign.sampling.slots import Slots
from dalign.sampling.slots import decode_one
from dalign.sampling.slots import grow_slots
from dalign.sampling.slots import insert_prompts
from dalign.sampling.slots import set_prefix
from dalign.sampling.slots import start_rows
from dalign.types import PyTree


@struct.dataclass
class Weights:
  """A model's parameters as encoding (`transformer.cast`) and decoding
  (`transformer.unstack`) read them. The former may be the very arrays that training
  goes on with."""

  encode: PyTree
  decode: PyTree


def bucket_size(n: int, step: int) -> int:
  """The smallest multiple of step that holds n, of at most four between one power of
  two and the next: few shapes to compile, and little padding."""
  steps = max(1, -(-n // step))
  coarse = max(1, 1 << (steps - 1).bit_length() - 3) if steps > 8 else 1
  return -(-steps // coarse) * coarse * step


class Programs:
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
    self.encode_rows = self._jit(self._encode_rows_fn, transformer.KV(k=rows, v=rows))
    self.encode_prefix = self._jit(self._encode_prefix_fn, prefix)
    self.empty = self._jit(self._empty_fn, slots, static_argnums=(0, 1, 2))
    self.grow = self._jit(grow_slots, slots, donate_argnums=1)
    self.insert = self._jit(insert_prompts, slots, donate_argnums=0)
    self.start = self._jit(start_rows, slots, donate_argnums=0)
    self.chunk = self._jit(self._chunk_fn, slots, donate_argnums=2)
    self.lanes = {lanes: self._lane_programs(lanes) for lanes in (1, sampler.lanes)}
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
      self._jit(set_prefix, shardings, donate_argnums=0),
    )

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
    prefix = self.encode_prefix.eval_shape(encode, tokens_P, scalar)
    make_lanes, _ = self.lanes[lanes]
    prefixes, slots = (
      make_lanes.eval_shape(P),
      self.empty.eval_shape(s.slots, T, max_new),
    )
    temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._sharding())
    prefill = self.encode_rows.lower(encode, prefix, rows)
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

  def _encode_prefix_fn(self, params, tokens_P, length):
    return transformer.encode_prefix(
      params, tokens_P, length, cfg=self.cfg, compute=self.compute
    )

  def _encode_rows_fn(self, params, prefix, tokens_BT):
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
      slots = decode_one(
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
