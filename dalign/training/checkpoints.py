"""Arrays on disk: training states by step, and parameters alone, through Orbax.

Knows trees of arrays and their shardings; does not know what is in them, configs, or
the other files of a run (workdir.py does).
"""

from collections.abc import Iterator, Mapping
import contextlib
import ctypes
import json
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from dalign.runs import buckets
from dalign.runs import distributed
from dalign.runs import store
from dalign.types import PyTree

KEEP = 1  # steps that stay when a newer one is whole


class Checkpoints:
  """Training states in a folder, by step, written by Orbax while training goes on.

  A state is any tree of arrays (optimizer states and typed keys included), `meta` a
  small dict of JSON. A step is there only when all of it is.
  """

  def __init__(self, dir: pathlib.Path):
    self._dir = buckets.absolute(dir)
    self._manager = None

  def save(self, step: int, state: PyTree, meta: Mapping) -> None:
    """Starts to save a step, then drops those before it.

    Returns before the files are whole; the arrays may be donated at once. A step that
    is there stays as it is.
    """
    buckets.flush()
    manager = self._open()
    if step != manager.latest_step():
      parts = {
        "state": ocp.args.StandardSave(state),
        "meta": ocp.args.JsonSave({"sums": _sums(state), "own": dict(meta)}),
      }
      manager.save(step, args=ocp.args.Composite(**parts), force=True)

  def wait_until_finished(self) -> None:
    """Waits until the last save is whole, and gives back the memory that it took.

    Where arrays live in host memory, the copy that a save in the background works on
    stands beside the training step's own peak, and what it frees stays with malloc.
    """
    if self._manager is not None:
      self._manager.wait_until_finished()
    give_back_memory()

  def latest(self) -> int | None:
    """The newest step that is whole, or None."""
    if not self._dir.exists():
      return None
    with _one_line_errors(self._dir):
      self._open().wait_until_finished()
      return self._open().latest_step()

  def restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict]:
    """The state and meta of a step.

    `abstract_state` is the tree with `jax.ShapeDtypeStruct` leaves; each array comes
    with the leaf's sharding (without one: on the first device). Raises ValueError,
    naming arrays, where the saved tree has others, or of another shape or dtype.
    """
    with _one_line_errors(self._dir):
      manager = self._open()
      manager.wait_until_finished()
      _check_fit(self._dir, manager.item_metadata(step).state, abstract_state)
      parts = {
        "state": ocp.args.StandardRestore(_with_default_sharding(abstract_state)),
        "meta": ocp.args.JsonRestore(),
      }
      restored = manager.restore(step, args=ocp.args.Composite(**parts))
    _check_sums(self._dir, restored.state, restored.meta["sums"])
    return restored.state, restored.meta["own"]

  def close(self) -> None:
    """Waits until the last save is whole, and drops what a killed run left of those
    before it."""
    if self._manager is not None:
      self._manager.wait_until_finished()
      for step in self._manager.all_steps()[:-KEEP]:
        self._manager.delete(step)
      self._manager.close()
      self._manager = None

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=KEEP, create=True, cleanup_tmp_directories=True
      )
      # Named handlers, so that metadata can be read before anything was saved.
      self._manager = ocp.CheckpointManager(
        self._dir,
        options=options,
        item_handlers={
          "state": ocp.StandardCheckpointHandler(),
          "meta": ocp.JsonCheckpointHandler(),
        },
      )
    return self._manager


def give_back_memory() -> None:
  """Returns freed host memory to the system, which malloc keeps; glibc only."""
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
      trim(0)


def save_params(dir: pathlib.Path, params: PyTree) -> None:
  """Parameters alone, in place of what `dir` held; done when this returns."""
  sums, path = _sums(params), buckets.absolute(dir)
  buckets.flush()
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, params, force=True)
  if distributed.is_first_process():
    store.write_json(_sums_file(path), sums)


def load_params(dir: pathlib.Path, abstract: PyTree) -> PyTree:
  """What `save_params` wrote; `abstract` and errors as in `Checkpoints.restore`."""
  path = buckets.absolute(dir)
  if not path.exists():
    raise ValueError(f"{path}: wanted a folder of saved parameters, found none")
  with ocp.StandardCheckpointer() as checkpointer:
    with _one_line_errors(path):
      _check_fit(path, checkpointer.metadata(path).item_metadata, abstract)
      params = checkpointer.restore(path, _with_default_sharding(abstract))
  sums = _sums_file(path)
  with _one_line_errors(sums):
    _check_sums(path, params, json.loads(sums.read_text()))
  return params


def _sums_file(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.sums.json")


def _again(where: pathlib.Path) -> str:
  """What is to be done about a file or folder of a stage's that is damaged."""
  return (
    "Put it back from a copy, or do its stage again "
    f"(--config.stages={where.parent.name} --config.start_over=true)"
  )


@contextlib.contextmanager
def _one_line_errors(where: pathlib.Path) -> Iterator[None]:
  """Says in one line what of Orbax's errors a user needs."""
  try:
    yield
  except Exception as error:  # Orbax raises many kinds, Exception itself among them
    if str(error).startswith(str(where)):
      raise
    said = " ".join(str(error).split())[:200]
    raise ValueError(f"{where}: cannot be read: {said}. {_again(where)}") from error


@jax.jit
def _sum(x) -> jax.Array:
  """Two sums, modulo 2**32, of the bits of an array: one that any change of a single
  value changes, one that knows their places. The same on every mesh."""
  if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == bool:
    x = x.astype(jax.numpy.uint8)
  words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  words = words.astype(jax.numpy.uint32)
  place = jax.numpy.uint32(1)
  for axis, size in enumerate(words.shape):
    shape = [1] * axis + [size] + [1] * (words.ndim - axis - 1)
    steps = jax.numpy.arange(size, dtype=jax.numpy.uint32).reshape(shape)
    place = place * jax.numpy.uint32(2654435761) + jax.numpy.broadcast_to(
      steps, words.shape
    )
  mixed = words * (place * jax.numpy.uint32(2) + jax.numpy.uint32(1))
  total = [jax.numpy.sum(part, dtype=jax.numpy.uint32) for part in (words, mixed)]
  return jax.numpy.stack(total)


def _sums(tree: PyTree) -> dict[str, list]:
  """Name -> dtype and sums of each array.

  One after the other, each awaited: programs with collectives that are under way at the
  same time can wait for one another for ever where devices share few threads.
  """
  jax.block_until_ready(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): [
      str(leaf.dtype),
      *map(int, np.asarray(_sum(leaf))),
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_sums(where: pathlib.Path, tree: PyTree, saved: Mapping[str, list]) -> None:
  """Raises ValueError with the names of arrays that are not as they were saved."""
  wrong = [name for name, own in _sums(tree).items() if saved.get(name) != own]
  if wrong:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise ValueError(
      f"{where}: {', '.join(wrong[:3])}{more} changed since they were saved. "
      + _again(where)
    )


def _check_fit(where: pathlib.Path, saved: PyTree, wanted: PyTree) -> None:
  """Raises ValueError with the names, dtypes and shapes of arrays that are not the
  same."""
  saved, wanted = _dtypes_and_shapes(saved), _dtypes_and_shapes(wanted)
  found = [
    f"{name} is {saved.get(name, 'absent')}, wanted {wanted.get(name, 'none')}"
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  if found:
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    raise ValueError(
      f"{where}: the saved arrays are not those of this config: "
      f"{'; '.join(found[:5])}{more}. Use the config they were made with, or another "
      "folder"
    )


def _dtypes_and_shapes(tree: PyTree) -> dict[str, str]:
  """Name -> dtype and shape on disk of each array, as "float32[3, 4]"; a typed key is
  saved as the words it is of."""
  kinds = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    kinds[name] = f"{leaf.dtype}{list(leaf.shape)}"
  return kinds


def _with_default_sharding(abstract: PyTree) -> PyTree:
  home = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def place(leaf):
    sharding = home if leaf.sharding is None else leaf.sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, abstract)
