"""Training states survive the disk: optimizers, keys, shardings, kept steps, errors."""

import json
import pathlib

from flax import struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dalign.training import checkpoints
from dalign.training.checkpoints import Checkpoints
from dalign.training.checkpoints import load_params
from dalign.training.checkpoints import save_params


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  key: jax.Array


def make_state(step: int) -> State:
  params = {"layers": {"w": jnp.full((3, 4), step, jnp.float32)}, "none": {}}
  params["embed"] = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(
      optax.adamw(1e-3), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    ),
    optax.inject_hyperparams(optax.sgd)(learning_rate=0.5),
  )
  grads = jax.tree.map(jnp.ones_like, params)
  _, opt_state = tx.update(grads, tx.init(params), params)
  return State(jnp.int32(step), params, opt_state, jax.random.key(step))


def saved(folder: pathlib.Path, *steps: int) -> list[str]:
  """What lies in a folder once one run has saved states of some steps there."""
  writer = Checkpoints(folder)
  for step in steps:
    writer.save(step, make_state(step), {})
  writer.close()
  return sorted(path.name for path in folder.iterdir())


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_whole_state_comes_back_in_another_process_s_eyes(tmp_path):
  state, meta = make_state(3), {"cursor": 12, "order": [1, 2], "name": "é"}
  writer = Checkpoints(tmp_path / "c")
  assert writer.latest() is None and not (tmp_path / "c").exists()
  writer.save(3, state, meta)
  writer.close()
  reader = Checkpoints(tmp_path / "c")
  assert reader.latest() == 3
  restored, restored_meta = reader.restore(3, abstract(state))
  reader.close()
  assert_same(restored, state)
  assert restored_meta == meta and type(restored.opt_state) is type(state.opt_state)


def test_only_the_newest_is_kept(tmp_path):
  assert saved(tmp_path, 1, 2, 4) == ["4"]


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
  bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  tree = bump({f"w{i}": jnp.zeros((500, 500)) for i in range(8)})
  want = abstract(tree)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, tree, {})
  for _ in range(5):
    tree = bump(tree)
  restored, _ = checkpoints.restore(1, want)
  checkpoints.close()
  assert all((np.asarray(x) == 1).all() for x in jax.tree.leaves(restored))


def test_a_step_that_is_there_stays(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(5, make_state(5), {"first": True})
  checkpoints.save(5, make_state(6), {"first": False})
  restored, meta = checkpoints.restore(5, abstract(make_state(5)))
  checkpoints.close()
  assert meta == {"first": True} and int(restored.step) == 5


def test_what_a_killed_run_left_goes(tmp_path, monkeypatch):
  """A draft, which is no step, and a step that it did not come to drop."""
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, "KEEP", 2)
    assert saved(tmp_path, 1, 2) == ["1", "2"]
  (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
  assert Checkpoints(tmp_path).latest() == 2
  assert saved(tmp_path, 2) == ["2"]


def damaged(content: bytes) -> list[bytes]:
  """What a bad disk makes of a file: a bit flipped at some places, half of it, none."""
  flips = []
  for at in {0, len(content) // 2, len(content) - 1} if content else ():
    flips.append(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
  return [*flips, content[: len(content) // 2], b""]


def unharmed(read, folder: pathlib.Path, wanted) -> dict[str, int]:
  """How often a damaged file made `read` fail, and how often it gave the same; never
  anything else."""
  counts = {"refused": 0, "same": 0}
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    before = path.read_bytes()
    for content in damaged(before):
      path.write_bytes(content)
      try:
        got = read()
      except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        counts["refused"] += 1
      else:
        assert_same(got, wanted)
        counts["same"] += 1
    path.write_bytes(before)
  return counts


def test_parameters_that_were_damaged_are_refused(tmp_path):
  rng = np.random.default_rng(0)
  params = {n: rng.normal(size=(64, 5)).astype(np.float32) for n in ("a", "b")}
  params["c"] = {"d": rng.normal(size=300).astype(ml_dtypes.bfloat16)}
  save_params(tmp_path / "params", params)
  counts = unharmed(
    lambda: load_params(tmp_path / "params", abstract(params)),
    tmp_path / "params",
    params,
  )
  assert counts["refused"] > 10, counts


def test_a_damaged_checkpoint_is_refused(tmp_path):
  writer, state = Checkpoints(tmp_path / "state"), make_state(1)
  writer.save(1, state, {"at": 3})
  writer.close()

  def read():
    again = Checkpoints(tmp_path / "state")
    try:
      found, meta = again.restore(1, abstract(state))
    finally:
      again.close()
    assert meta == {"at": 3}
    return found

  counts = unharmed(read, tmp_path / "state", state)
  assert counts["refused"] > 10, counts


def test_sums_tell_values_and_places_apart():
  x = jnp.arange(24.0).reshape(2, 3, 4)
  sums = [tuple(map(int, checkpoints._sum(y))) for y in (x, x[::-1], x + 0)]
  assert sums[0] == sums[2] != sums[1] and sums[0][0] == sums[1][0]
  assert tuple(map(int, checkpoints._sum(x.reshape(4, 6)))) != sums[0]


def test_arrays_that_do_not_fit_are_named(tmp_path):
  saved(tmp_path, 1)
  wanted = abstract(make_state(1))
  wanted.params["layers"] = {
    "w": jax.ShapeDtypeStruct((5, 4), jnp.float32),
    "new": jax.ShapeDtypeStruct((1,), jnp.float32),
  }
  with pytest.raises(ValueError) as caught:
    Checkpoints(tmp_path).restore(1, wanted)
  said = str(caught.value)
  assert "params.layers.w is float32[3, 4], wanted float32[5, 4]" in said
  assert "params.layers.new is absent, wanted float32[1]" in said
  assert "embed" not in str(caught.value)


def test_arrays_come_with_the_sharding_asked_for_and_in_no_other_dtype(tmp_path):
  params = make_state(2).params
  save_params(tmp_path / "p", params)
  mesh = jax.make_mesh(
    (len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params
  )
  loaded = load_params(tmp_path / "p", wanted)
  assert_same(loaded, params)
  assert all(x.sharding == sharding for x in jax.tree.leaves(loaded))
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
  with pytest.raises(
    ValueError, match=r"w is float32\[3, 4\], wanted bfloat16\[3, 4\]"
  ):
    load_params(tmp_path / "p", half)


def test_parameters_are_replaced_and_their_absence_is_named(tmp_path):
  for step in (1, 2):
    save_params(tmp_path / "p", make_state(step).params)
  params = make_state(2).params
  assert_same(load_params(tmp_path / "p", abstract(params)), params)
  with pytest.raises(ValueError, match="wanted a folder of saved parameters"):
    load_params(tmp_path / "none", abstract(params))
  with pytest.raises(ValueError, match=r"layers.w is float32\[3, 4\], wanted none"):
    load_params(tmp_path / "p", abstract({"embed": params["embed"]}))
  sums = tmp_path / "p.sums.json"
  kept = json.loads(sums.read_text())
  del kept["embed"]
  sums.write_text(json.dumps(kept))
  with pytest.raises(ValueError, match="embed changed since they were saved"):
    load_params(tmp_path / "p", abstract(params))
  sums.unlink()
  with pytest.raises(ValueError, match="p.sums.json: cannot be read"):
    load_params(tmp_path / "p", abstract(params))
