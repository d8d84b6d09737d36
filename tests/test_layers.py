"""The house holds: imports go down, I/O stays at the edges, imports do nothing.

The floors are those of the table in ARCHITECTURE.md.
"""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

from dalign import config
from tests.helpers import ROOT

PATHS = {
  ".".join(path.relative_to(ROOT / "dalign").with_suffix("").parts): path
  for path in sorted((ROOT / "dalign").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
EDGES = {
  "bundled",
  "processes",
  "buckets",
  "store",
  "metrics",
  "checkpoints",
  "data",
  "recordings",
  "public",
  "endpoint",
  "encoder",
  "ggufs",
  "origins",
  "weights",
  "pipeline",
  "report",
  "assistant",
  "harness",
  "chat",
  "serve",
  "main",
}
FOR_OTHERS = {"harness.inspect_provider", "harness.lm_eval_model"}  # import libraries
OUTSIDE = {  # modules whose only use is the world outside
  *("os", "io", "sys", "pathlib", "shutil", "tempfile", "subprocess", "socket"),
  *("time", "datetime", "logging", "warnings", "random", "json", "tqdm", "absl"),
}
TOLD = {"open", "print", "input", "exec", "eval", "breakpoint"}
SHARED = (  # what stages may import, in order
  "pipeline.context",
  "pipeline.servers",
  "pipeline.scoring",
  "pipeline.grading",
)
ALLOWED = {
  "templates": {"json", "datetime"},  # what chat templates may ask for
  "text": {"json"},
  "forms": {"json"},  # what a judge writes
  "world": {"random"},  # always of a seed
  "lessons": {"random"},
  "domain": {"random"},
  "stopping": {"sys"},  # whose hook sees what Python ignores
}


def floors() -> dict[str, int]:
  """Module -> floor, from ARCHITECTURE.md."""
  rows = re.findall(
    r"^\| (\d+) \| ([a-z_ ]+) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE
  )
  return {name: int(floor) for floor, names in rows for name in names.split()}


def room(name: str) -> str:
  """The floor's name for a module: a folder is one room."""
  return name.split(".")[0]


def ours(tree: ast.AST) -> set[str]:
  """The modules of dalign that a tree imports, such as "text" or "pipeline.context"."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "a relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      parts = name.split(".")
      if parts[0] == "dalign" and len(parts) > 1:
        inside = ".".join(parts[1:3])
        found.add(inside if inside in PATHS else parts[1])
  return found


def theirs(tree: ast.AST) -> set[str]:
  """The first names of all other modules that a tree imports."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found.add(node.module.split(".")[0])
  return found - {"dalign"}


def calls(tree: ast.AST) -> set[str]:
  """Names of functions called without a dot."""
  return {
    node.func.id
    for node in ast.walk(tree)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
  }


def test_every_module_has_a_floor_and_every_floor_its_modules():
  assert {room(name) for name in PATHS} - {"__init__"} == set(floors())


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_go_down(name):
  floor = floors()
  for other in ours(TREES[name]):
    if room(other) != room(name):
      assert floor[room(other)] < floor[room(name)], f"{name} may not import {other}"


@pytest.mark.parametrize("name", sorted(n for n in TREES if room(n) == "pipeline"))
def test_stages_do_not_import_each_other(name):
  stage = len(SHARED)
  floor = {part: i for i, part in enumerate(SHARED)} | {"pipeline.__init__": stage + 1}
  for other in ours(TREES[name]):
    if room(other) == "pipeline":
      low, high = floor.get(other, stage), floor.get(name, stage)
      assert low < high, f"{name} may not import {other}"


@pytest.mark.parametrize("name", sorted(n for n in TREES if room(n) not in EDGES))
def test_the_world_outside_is_met_at_the_edges_only(name):
  met = theirs(TREES[name]) & OUTSIDE - ALLOWED.get(name, set())
  assert not met, f"{name} imports {met}"
  assert not calls(TREES[name]) & TOLD, f"{name} calls {calls(TREES[name]) & TOLD}"


def test_only_the_model_knows_linen():
  knows = {
    name
    for name, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom) and node.module == "flax"
    if {"linen", "nnx"} & {alias.name for alias in node.names}
  }
  assert knows == {"model"}


def test_importing_everything_does_nothing(tmp_path):
  ours = PATHS.keys() - FOR_OTHERS - {"__init__"}
  modules = [f"dalign.{name}".removesuffix(".__init__") for name in sorted(ours)]
  heavy = [
    "tensorflow",
    "torch",
    "transformers",
    "tensorboardX",
    "llama_cpp",
    "wandb",
    "mlflow",
  ]
  program = f"""
import importlib, sys
for name in {modules!r}:
  importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a JAX backend was started"
found = [name for name in {heavy!r} if name in sys.modules]
assert not found, f"imported: {{found}}"
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=tmp_path,
    env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
  assert not list(tmp_path.iterdir())


def config_fields() -> list[tuple[str, str]]:
  """(class, field) of every dataclass in config.py."""
  classes = inspect.getmembers(config, dataclasses.is_dataclass)
  return [(name, f.name) for name, cls in classes for f in dataclasses.fields(cls)]


def read_names() -> set[str]:
  """Every name that is read after a dot, below the checks of config.py itself."""
  trees = [tree for name, tree in TREES.items() if name != "config"]
  return {
    node.attr
    for tree in trees
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
  }


def test_every_field_of_a_config_is_read():
  read = read_names()
  assert not [f"{cls}.{field}" for cls, field in config_fields() if field not in read]
