"""The house holds: imports go down, and do nothing."""

import ast
import dataclasses

from dalign.config import explain
from dalign.config.schema import Config
from tests.helpers import ROOT
from tests.helpers import python

PATHS = {
  ".".join(path.relative_to(ROOT / "dalign").with_suffix("").parts): path
  for path in sorted((ROOT / "dalign").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}


def test_packages_import_downwards():
  """The contracts of pyproject.toml."""
  lint = "from importlinter.cli import lint_imports_command as m; m()"
  done = python("-c", lint, "--no-cache", env={"PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stdout


def test_importing_everything_does_nothing(tmp_path):
  ours = PATHS.keys() - {"__init__"}
  modules = [f"dalign.{name}".removesuffix(".__init__") for name in sorted(ours)]
  heavy = "tensorflow torch transformers tensorboardX llama_cpp wandb mlflow".split()
  program = f"""
import importlib, sys
for name in {modules!r}:
  importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a JAX backend was started"
found = [name for name in {heavy!r} if name in sys.modules]
assert not found, f"imported: {{found}}"
"""
  env = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
  done = python("-c", program, cwd=tmp_path, env=env)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
  assert not list(tmp_path.iterdir())


def config_fields() -> list[tuple[str, str]]:
  """(class, field) of every dataclass of a config."""
  classes = explain.parts(Config)
  return [(cls.__name__, f.name) for cls in classes for f in dataclasses.fields(cls)]


def read_names() -> set[str]:
  """Every name that is read after a dot, but where the classes check themselves."""
  own = {cls.__module__.removeprefix("dalign.") for cls in explain.parts(Config)}
  trees = [tree for name, tree in TREES.items() if name not in own]
  return {
    node.attr
    for tree in trees
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
  }


def test_every_field_of_a_config_is_read():
  read = read_names()
  assert not [f"{cls}.{field}" for cls, field in config_fields() if field not in read]
