"""What all tests share: eight CPU devices, a tiny model, and the shared data's place.

All that jax reads once, when it first looks for devices, is set here. Shapes of unlike
rank are not broadcast: that hides mistakes. Tests compile more than they compute, so
LLVM is told not to optimise, and what one test has compiled the next need not, in this
process or another. Commands that tests start compute more: they are not told so.
"""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:
  _cache = tempfile.mkdtemp(prefix="dalign-tests-")
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.formats import weights
from tests.helpers import MODEL
from tests.helpers import SHARED
from tests.helpers import run_command

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
if "XLA_FLAGS" not in os.environ:
  os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  jax.devices()  # reads them
  del os.environ["XLA_FLAGS"]

# Files of tests that take minutes, as two processes are to take them.
LONG = (
  *("pipeline", "plan", "meshes", "families", "processes", "ablation", "site", "colab"),
  *("limits", "metrics", "rl", "serve", "sampler"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """What takes long comes first, or one process waits for another at the end."""
  places = {f"test_{name}": place for place, name in enumerate(LONG)}
  items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Files of tests, and not tests, are what processes take, in the order above."""
  from xdist.scheduler import LoadFileScheduling

  config.option.loadscopereorder = False
  return LoadFileScheduling(config, log)


def _shared(name: str) -> pathlib.Path:
  """A folder of shared data beside the repository; skips where there is none."""
  if not (SHARED / name).is_dir():
    pytest.skip(f"no {name} at {SHARED / name}")
  return SHARED / name


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Prompt sets."""
  return _shared("data")


@pytest.fixture(scope="session")
def shared_cases() -> pathlib.Path:
  """Small inputs that once went wrong."""
  return _shared("cases")


@pytest.fixture(scope="session")
def cfg() -> ModelConfig:
  return MODEL


@pytest.fixture(scope="session")
def compute() -> Compute:
  return Compute(
    dtype="float32", kv_dtype="float32", attention="xla", remat=False, logits_chunk=16
  )


@pytest.fixture(scope="session")
def make_params():
  """`make_params(cfg, seed=0)`: random parameters whose norm scales are not one."""

  def make(cfg: ModelConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    params = weights.random_model(cfg, seed)

    def scatter(path, x):
      norm = path[-1].key.endswith("norm")
      return x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32) if norm else x

    params = jax.tree_util.tree_map_with_path(scatter, params)
    return jax.tree.map(jnp.asarray, params)

  return make


@pytest.fixture(scope="session")
def params(cfg, make_params):
  """Random parameters of `cfg`."""
  return make_params(cfg)


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> pathlib.Path:
  """A folder in which every stage was run by the command: once, however many
  processes run tests, each of which has a copy."""
  folder = tmp_path_factory.mktemp("run")
  if "PYTEST_XDIST_WORKER" not in os.environ:
    _run_every_stage(folder)
    return folder
  made = folder.parent.parent / "run"
  with filelock.FileLock(f"{made}.lock"):
    if not made.exists():
      draft = made.with_name("draft")
      shutil.rmtree(draft, ignore_errors=True)
      _run_every_stage(draft)
      draft.rename(made)
  shutil.copytree(made, folder, dirs_exist_ok=True)
  return folder


def _run_every_stage(folder: pathlib.Path) -> None:
  done = run_command(folder)
  assert done.returncode == 0, done.stderr[-3000:]
