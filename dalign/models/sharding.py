"""Which mesh axis each logical axis of an array lies on: one table for every stage.

`pjit` is today `jax.jit` with NamedShardings; nothing here is a no-op on CPU.
"""

from collections.abc import Callable
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dalign.config.model import MeshConfig
from dalign.types import PyTree

RULES = {
  "batch": ("data", "fsdp"),  # rows of every batch
  "slot": ("data", "fsdp", "sequence"),  # rows of decoding, one token each
  "token": "sequence",
  "attending": ("tensor", "sequence"),  # heads, where they see whole lines
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "ffw": "tensor",
  "width": "fsdp",  # parameters and optimizer state, gathered where they are used
  "layer": None,
  "head": "tensor",
  "q_norm": None,
  "k_norm": None,
  "expert": "expert",
  "choice": None,
  "rank": None,
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
  """The mesh of a config's axes; -1 takes what is left of the devices.

  Over several slices of TPUs, the outer axes are cut by slice: between slices the
  network is slow. Raises ValueError when the sizes do not multiply to the number of
  devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": cfg.data, "fsdp": cfg.fsdp, "tensor": cfg.tensor}
  sizes |= {"sequence": cfg.sequence, "expert": cfg.expert}
  left = [axis for axis, size in sizes.items() if size == -1]
  if len(left) > 1:
    raise ValueError(f"mesh: at most one axis may be -1, got {', '.join(left)}")
  known = math.prod(size for size in sizes.values() if size != -1)
  sizes |= {axis: len(devices) // known for axis in left}
  if math.prod(sizes.values()) != len(devices):
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    raise ValueError(
      f"mesh: {shown} is not the number of devices, {len(devices)}; set one of "
      "config.mesh.* to -1"
    )
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  shape = tuple(sizes.values())
  types = (AxisType.Auto,) * len(shape)
  if slices == 1:
    return jax.make_mesh(shape, tuple(sizes), axis_types=types, devices=devices)
  outer = _slices_per_axis(shape, slices)
  inner = tuple(n // o for n, o in zip(shape, outer, strict=True))
  grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices)
  return Mesh(grid, tuple(sizes), axis_types=types)


def _slices_per_axis(shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
  """How many slices each axis lies on: the first as many as it can."""
  outer, left = [], slices
  for size in shape:
    outer.append(math.gcd(size, left))
    left //= outer[-1]
  if left > 1:
    raise ValueError(f"mesh: no axis to lay {slices} slices of devices on, got {shape}")
  return tuple(outer)


def partition_spec(logical: tuple[str | None, ...]) -> P:
  """Logical axis names of one array -> PartitionSpec; an unknown name is an error."""
  axes = [None if name is None else RULES[name] for name in logical]
  flat = [x for a in axes if a for x in (a if isinstance(a, tuple) else (a,))]
  if len(flat) != len(set(flat)):
    raise ValueError(f"{logical} lays one mesh axis on two dimensions: {axes}")
  return P(*axes)


def drop_indivisible_axes(
  sharding: NamedSharding, shape: tuple[int, ...]
) -> NamedSharding:
  """The sharding, without the axes that do not divide the dimension they lie on; of
  several on one dimension, as many first ones as divide it."""
  mesh, kept = sharding.mesh, []
  axes = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
  for size, axis in zip(shape, axes, strict=True):
    while axis and size % _num_parts(mesh, axis):
      axis = axis[:-1] if isinstance(axis, tuple) else None
    kept.append(axis or None)
  return NamedSharding(mesh, P(*kept))


def _num_parts(mesh, axis) -> int:
  """The number of shards of a dimension on mesh axes: a name, several, or None."""
  names = axis if isinstance(axis, tuple) else (axis,)
  return math.prod(mesh.shape[name] for name in names if name)


def named_sharding(
  mesh: Mesh | AbstractMesh, logical: tuple[str | None, ...], shape
) -> NamedSharding:
  """The sharding of an array; what a mesh axis does not divide is replicated."""
  return drop_indivisible_axes(
    NamedSharding(mesh, partition_spec(logical)), tuple(shape)
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """All of an array on every device, and so in every process."""
  return NamedSharding(mesh, P())


def put_on_mesh(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Puts an array that every process holds on the mesh; each sends its own part."""
  if sharding.is_fully_addressable:
    return jax.device_put(x, sharding)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def constrain(x, *logical: str | None):
  """`x` laid out by its logical axes on the mesh that is set (`jax.set_mesh`), inside
  of jit; without a mesh, as it is."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, named_sharding(mesh, logical, x.shape))


def token_partition(shape: tuple[int, int]) -> tuple[Callable, Callable]:
  """How [B, T, ...] arrays of lines become [P, N, ...], the N tokens of each of the P
  parts that the mesh that is set cuts them into, and back."""
  mesh = jax.sharding.get_abstract_mesh()
  unsharded = mesh.empty or mesh.size == 1
  cut = (
    P(None, None) if unsharded else named_sharding(mesh, ("batch", "token"), shape).spec
  )
  rows, columns = (_num_parts(mesh, axis) for axis in cut)
  axes = tuple(jax.tree.leaves(tuple(cut)))
  B, T = shape

  def partition(x):
    x = x.reshape(rows, B // rows, columns, T // columns, *x.shape[2:])
    x = x.swapaxes(1, 2).reshape(rows * columns, -1, *x.shape[4:])
    if unsharded:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes)))

  def merge(x):
    x = x.reshape(rows, columns, B // rows, T // columns, *x.shape[2:])
    return x.swapaxes(1, 2).reshape(B, T, *x.shape[4:])

  return partition, merge


def shard_by_heads(q_BNTH, k_BKHT, v_BKTH):
  """Queries, keys and values with whole lines on each device, and a part of the heads
  where tokens were cut: those that share keys stay together (2309.14509)."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape.get("sequence", 1) == 1:
    return q_BNTH, k_BKHT, v_BKTH
  divisible = k_BKHT.shape[1] % _num_parts(mesh, RULES["attending"]) == 0
  names = "batch", "attending" if divisible else "heads", None, None
  return tuple(constrain(x, *names) for x in (q_BNTH, k_BKHT, v_BKTH))


def shardings(mesh: Mesh, axes: PyTree, shapes: PyTree) -> PyTree:
  """NamedShardings of a tree from its logical axes and its (abstract) arrays."""
  return jax.tree.map(
    lambda names, x: named_sharding(mesh, names, x.shape),
    axes,
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def with_shardings(tree: PyTree, placed: PyTree) -> PyTree:
  """The arrays of a tree as ShapeDtypeStructs with the given shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed
  )


def shard_map_by_axes(fn, in_axes: tuple, out_axes: tuple, args: tuple):
  """`fn(*args)` run by each device on its own part of the arguments, on the mesh that
  is set (`jax.set_mesh`); without one, or with one device, a plain call.

  Axes are logical, a None stands for an argument that is None. What a mesh axis does
  not divide in every argument is whole on all of its devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return fn(*args)
  given = [(a, x) for a, x in zip(in_axes, args, strict=True) if x is not None]
  odd = {
    name
    for names, x in given
    for name, size in zip(names, x.shape, strict=True)
    if name and size % _num_parts(mesh, RULES[name])
  }
  if odd & {"heads", "kv_heads"}:
    odd |= {"heads", "kv_heads"}  # those that share keys stay together

  def lay(names):
    return names and partition_spec(tuple(None if n in odd else n for n in names))

  return jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=tuple(lay(names) for names in in_axes),
    out_specs=lay(out_axes),
    check_vma=False,
  )(*args)


def shardings_like_params(
  mesh: Mesh, state: PyTree, params: PyTree, param_shardings: PyTree
):
  """Shardings of a state that holds copies of the parameters (optimizer moments).

  A leaf whose path ends in the path of a parameter, with its shape, lies as it does;
  every other leaf is replicated. Nothing is computed, as optax's `map_params` does, so
  that the mesh may be of devices that only compile (`tools/plan.py`).
  """
  known = {
    jax.tree_util.keystr(path): (x.shape, sharding)
    for (path, x), sharding in zip(
      jax.tree_util.tree_flatten_with_path(params)[0],
      jax.tree.leaves(param_shardings),
      strict=True,
    )
  }

  def like(path, x):
    name = jax.tree_util.keystr(path)
    for suffix, (shape, sharding) in known.items():
      if name.endswith(suffix) and x.shape == shape:
        return sharding
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(like, state)


def batch_sharding(mesh: Mesh, name: str, x, *, lead: int = 0) -> NamedSharding:
  """Rows over data x fsdp, their tokens over sequence; `lead` axes before the rows
  (micro-batches) stay whole.

  A batch's arrays carry their dimensions in their names: one whose suffix does not
  begin with B (such as prefix_P) has no rows, and every device holds all of it.
  """
  letters = name.rpartition("_")[2]
  if not letters.startswith("B"):
    return replicated(mesh)
  tokens = ("token",) if letters.startswith("BT") else ()
  names = (None,) * lead + ("batch", *tokens)
  return named_sharding(mesh, names + (None,) * (x.ndim - len(names)), x.shape)
