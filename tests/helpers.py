"""What several test files call."""

import importlib.util
import pathlib
import types

ROOT = pathlib.Path(__file__).parents[1]


def config_file(name: str) -> types.ModuleType:
  """A file of configs/, as a module."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
