"""What several test files call."""

import importlib.util
import os
import pathlib
import types

ROOT = pathlib.Path(__file__).parents[1]


def clean_environment() -> dict[str, str]:
  """For another process: the environment without what conftest asks of JAX."""
  return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}


def config_file(name: str) -> types.ModuleType:
  """A file of configs/, as a module."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
