"""Which mesh axis each logical axis of an array lies on: one table for every stage.

`pjit` is today `jax.jit` with NamedShardings; nothing here is a no-op on CPU.
"""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dalign.config import MeshConfig
from dalign.types import PyTree

RULES = {
  "batch": ("data", "fsdp"),  # rows of every batch
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "ffw": "tensor",
  "width": "fsdp",  # parameters and optimizer state, gathered where they are used
  "layer": None,
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
  """The mesh (data, fsdp, tensor); -1 takes what is left of the devices.

  Raises ValueError when the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [cfg.data, cfg.fsdp, cfg.tensor]
  if sizes.count(-1) > 1:
    raise ValueError(f"mesh: at most one axis may be -1, got {sizes}")
  known = 1
  for size in sizes:
    known *= 1 if size == -1 else size
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  data, fsdp, tensor = sizes
  if data * fsdp * tensor != len(devices):
    raise ValueError(
      f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} is not the number of "
      f"devices, {len(devices)}; set one of config.mesh.* to -1"
    )
  axes = ("data", "fsdp", "tensor")
  return jax.make_mesh(
    tuple(sizes), axes, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def spec(logical: tuple[str | None, ...]) -> P:
  """Logical axis names of one array -> PartitionSpec; an unknown name is an error."""
  axes = [None if name is None else RULES[name] for name in logical]
  flat = [x for a in axes if a for x in (a if isinstance(a, tuple) else (a,))]
  if len(flat) != len(set(flat)):
    raise ValueError(f"{logical} lays one mesh axis on two dimensions: {axes}")
  return P(*axes)


def fits(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """The sharding, without the axes that do not divide the dimension they lie on."""
  mesh, kept = sharding.mesh, []
  axes = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
  for size, axis in zip(shape, axes, strict=True):
    kept.append(axis if size % _ways(mesh, axis) == 0 else None)
  return NamedSharding(mesh, P(*kept))


def _ways(mesh, axis) -> int:
  """How many parts mesh axes cut a dimension into: a name, several, or none."""
  names = axis if isinstance(axis, tuple) else (axis,)
  return math.prod(mesh.shape[name] for name in names if name)


def shardings(mesh: Mesh, axes: PyTree, shapes: PyTree) -> PyTree:
  """NamedShardings of a tree from its logical axes and its (abstract) arrays."""
  return jax.tree.map(
    lambda names, x: fits(NamedSharding(mesh, spec(names)), x.shape),
    axes,
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def by_parts(fn, in_axes: tuple, out_axes: tuple, args: tuple):
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
    if name and size % _ways(mesh, RULES[name])
  }
  if odd & {"heads", "kv_heads"}:
    odd |= {"heads", "kv_heads"}  # those that share keys stay together

  def place(names):
    return names and spec(tuple(None if n in odd else n for n in names))

  return jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=tuple(place(names) for names in in_axes),
    out_specs=place(out_axes),
    check_vma=False,
  )(*args)


def like_params(mesh: Mesh, state: PyTree, params: PyTree, param_shardings: PyTree):
  """Shardings of a state that holds copies of the parameters (optimizer moments).

  A leaf whose path ends in the path of a parameter, with its shape, lies as it does;
  every other leaf is replicated.
  """
  known = {
    jax.tree_util.keystr(path): (x.shape, sharding)
    for (path, x), sharding in zip(
      jax.tree_util.tree_flatten_with_path(params)[0],
      jax.tree.leaves(param_shardings),
      strict=True,
    )
  }

  def place(path, x):
    name = jax.tree_util.keystr(path)
    for suffix, (shape, sharding) in known.items():
      if name.endswith(suffix) and x.shape == shape:
        return sharding
    return NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh, name: str, x, *, lead: int = 0) -> NamedSharding:
  """Rows over data x fsdp; `lead` axes before the rows (micro-batches) stay whole.

  A batch's arrays carry their dimensions in their names: one whose suffix does not
  begin with B (such as prefix_P) has no rows, and every device holds all of it.
  """
  if not name.rpartition("_")[2].startswith("B"):
    return NamedSharding(mesh, P())
  names = (None,) * lead + ("batch",) + (None,) * (x.ndim - lead - 1)
  return fits(NamedSharding(mesh, spec(names)), x.shape)
