"""Arrays on disk: training states by step, and parameters alone, through Orbax.

Knows trees of arrays and their shardings; does not know what is in them, configs, or
the other files of a run (store.py does).
"""

from collections.abc import Mapping
import ctypes
import pathlib
import sys

import jax
import orbax.checkpoint as ocp

from dalign.types import PyTree


class Checkpoints:
  """Training states in a folder, by step, written by Orbax while training goes on.

  A state is any tree of arrays (optimizer states and typed keys included), `meta` a
  small dict of JSON. A step is there only when all of it is.
  """

  def __init__(self, dir: pathlib.Path):
    self._dir = pathlib.Path(dir).absolute()
    self._keep = 1
    self._manager = None

  def save(self, step: int, state: PyTree, meta: Mapping, *, keep: int = 1) -> None:
    """Starts to save a step, then drops all but the newest `keep`.

    Returns before the files are whole; the arrays may be donated at once. A step that
    is there stays as it is. Raises ValueError for one older than the latest.
    """
    if keep != self._keep:
      self.close()
      self._keep = keep
    manager = self._open()
    latest = manager.latest_step()
    if latest is not None and step < latest:
      raise ValueError(f"{self._dir}: step {step} is older than its latest, {latest}")
    if step != latest:
      parts = {
        "state": ocp.args.StandardSave(state),
        "meta": ocp.args.JsonSave(dict(meta)),
      }
      manager.save(step, args=ocp.args.Composite(**parts), force=True)

  def settle(self) -> None:
    """Waits until the last save is whole, and gives back the memory that it took.

    Where arrays live in host memory, the copy that a save in the background works on
    stands beside the training step's own peak, and what it frees stays with malloc.
    """
    if self._manager is not None:
      self._manager.wait_until_finished()
    give_back_memory()

  def latest(self) -> int | None:
    """The newest step that is whole, or None."""
    if not self._dir.is_dir():
      return None
    self._open().wait_until_finished()
    return self._open().latest_step()

  def restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict]:
    """The state and meta of a step.

    `abstract_state` is the tree with `jax.ShapeDtypeStruct` leaves; each array comes
    with the leaf's dtype and sharding (without one: on the first device). Raises
    ValueError, naming arrays, where the saved tree has others.
    """
    manager = self._open()
    manager.wait_until_finished()
    if step not in manager.all_steps():
      has = sorted(manager.all_steps())
      raise ValueError(f"{self._dir}: wanted the checkpoint of step {step}, has {has}")
    _check_fit(self._dir, manager.item_metadata(step).state, abstract_state)
    parts = {
      "state": ocp.args.StandardRestore(_placed(abstract_state)),
      "meta": ocp.args.JsonRestore(),
    }
    restored = manager.restore(step, args=ocp.args.Composite(**parts))
    return restored.state, restored.meta

  def close(self) -> None:
    """Waits until the last save is whole."""
    if self._manager is not None:
      self._manager.wait_until_finished()
      self._manager.close()
      self._manager = None

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=self._keep, create=True, cleanup_tmp_directories=True
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
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(dir).absolute(), params, force=True)


def load_params(dir: pathlib.Path, abstract: PyTree) -> PyTree:
  """What `save_params` wrote; `abstract` and errors as in `Checkpoints.restore`."""
  path = pathlib.Path(dir).absolute()
  if not path.is_dir():
    raise ValueError(f"{path}: wanted a folder of saved parameters, found none")
  with ocp.StandardCheckpointer() as checkpointer:
    _check_fit(path, checkpointer.metadata(path).item_metadata, abstract)
    return checkpointer.restore(path, _placed(abstract))


def _check_fit(where: pathlib.Path, saved: PyTree, wanted: PyTree) -> None:
  """Raises ValueError with the names and shapes of arrays that are not the same."""
  saved, wanted = _shapes(saved), _shapes(wanted)
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


def _shapes(tree: PyTree) -> dict[str, list[int]]:
  """Name -> shape on disk of each array; a typed key is saved as the words it is of."""
  shapes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    shapes[jax.tree_util.keystr(path, simple=True, separator=".")] = list(leaf.shape)
  return shapes


def _placed(abstract: PyTree) -> PyTree:
  home = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def place(leaf):
    sharding = home if leaf.sharding is None else leaf.sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, abstract)
