"""What all tests share: eight CPU devices, a tiny model, and the shared data's place.

All that jax reads once, when it first looks for devices, is set here. Shapes of unlike
rank are not broadcast: that hides mistakes. Tests compile more than they compute, so
LLVM is told not to optimise, and what one test has compiled the next need not.
"""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign import weights
from dalign.config import Compute
from dalign.config import ModelConfig
from tests.helpers import run_command

_cache = tempfile.mkdtemp(prefix="dalign-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).parents[1] / ".." / "shared"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """The folder of shared data beside the repository; skips where there is none."""
  if not (SHARED / "data").is_dir():
    pytest.skip(f"no shared data at {SHARED / 'data'}")
  return SHARED / "data"


@pytest.fixture(scope="session")
def cfg() -> ModelConfig:
  """Grouped heads, and no number that is a default or a product of the others."""
  return ModelConfig(
    vocab=97,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=12,
    ffw=40,
    rope_theta=777.0,
    norm_eps=1e-3,
    tied=True,
    max_length=256,
  )


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
  """A folder in which every stage was run by the command."""
  folder = tmp_path_factory.mktemp("run")
  done = run_command(folder)
  assert done.returncode == 0, done.stderr[-3000:]
  return folder
