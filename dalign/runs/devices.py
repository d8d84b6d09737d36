"""The devices of a run: their name for manifests, and JAX's compile cache."""

import os
import pathlib

import jax


def prepare() -> None:
  """Turns the compile cache on, beside other caches of the user, unless one is set."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = pathlib.Path("~/.cache/dalign/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def name() -> str:
  """The kind and number of devices."""
  devices = jax.devices()
  return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
