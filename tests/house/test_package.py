"""What is installed: all of it, found from anywhere, and quick to say what it can."""

import importlib.metadata
import os
import pathlib
import resource
import subprocess
import sys
import tarfile

import pytest

import dalign
from dalign import main
from dalign.data import bundled
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import python

LIMIT_S = 1.5  # of the help
HEAVY = ("jax", "numpy", "tensorflow_datasets", "transformers", "orbax", "etils")


def dalign_command(*more: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
  """The command in another folder, with the sources on the path alone."""
  env = clean_environment() | {"PYTHONPATH": str(ROOT)}
  return python("-m", "dalign.main", *more, cwd=cwd, env=env)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_the_modes_and_the_exit_codes(flag, capsys):
  assert main.main(["dalign", flag]) == 0
  said, errors = capsys.readouterr()
  assert not errors
  assert said.startswith("usage: dalign --config=FILE --workdir=FOLDER")
  assert len(main.MODES) >= 3
  for name, does in main.MODES.items():
    assert f"    {name} " in said and does in said
  assert "Exit codes: 0 done" in said and max(map(len, said.splitlines())) <= 88


def test_help_is_there_at_once(tmp_path):
  """In the time of a core, since others may be at work; the best of some tries."""
  tries: list[float] = []
  while len(tries) < 5 and min(tries, default=LIMIT_S) >= LIMIT_S:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert dalign_command("--help", cwd=tmp_path).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    tries.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
  assert min(tries) < LIMIT_S, tries


def test_help_imports_no_library_of_arrays():
  program = f"""
import sys
from dalign import main
assert main.main(["dalign", "--help"]) == 0
assert not [name for name in {HEAVY!r} if name in sys.modules]
"""
  done = python("-c", program)
  assert done.returncode == 0, done.stderr


def test_the_version_stands_once(capsys):
  assert main.main(["dalign", "--version"]) == 0
  assert capsys.readouterr() == (f"{dalign.__version__}\n", "")
  assert importlib.metadata.version("dalign") == dalign.__version__
  written = [p for p in (ROOT / "setup.py", *(ROOT / "dalign").rglob("*.py"))]
  assert sum(f'"{dalign.__version__}"' in p.read_text() for p in written) == 1


@pytest.mark.parametrize("name", ["specs", "configs/tiny.py"])
def test_what_comes_with_the_package_is_found_from_anywhere(
  tmp_path, monkeypatch, name
):
  monkeypatch.chdir(tmp_path)
  assert bundled.find(name) == ROOT / name
  own = tmp_path / name
  own.parent.mkdir(exist_ok=True)
  own.write_text("")
  assert bundled.find(name).absolute() == own  # theirs goes first
  assert bundled.find("nowhere/at_all") == pathlib.Path("nowhere/at_all")


def test_a_config_file_is_looked_up_and_nothing_else(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  world = f"{ROOT / 'configs' / 'world.py'}:ablation"
  given = ["dalign", "--workdir=configs/world.py", "--config.seed=1"]
  assert main._resolve_config([*given, "--config=configs/world.py:ablation"]) == [
    *given,
    f"--config={world}",
  ]
  assert main._resolve_config([*given, "--config", "configs/world.py:ablation"]) == [
    *given,
    "--config",
    world,
  ]


def test_a_config_and_a_spec_of_the_package_are_read_elsewhere(tmp_path):
  """Up to a stage that finds nothing to work on."""
  done = dalign_command(
    *("--config=configs/tiny.py", "--workdir=run", "--config.stages=filter"),
    cwd=tmp_path,
  )
  assert done.returncode == 2, done.stderr
  assert "run the generate stage first" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_source_archive_has_every_file_of_the_repository(tmp_path):
  """And a wheel is made of it, which .ci/run does."""
  build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir"]
  done = subprocess.run([*build, tmp_path], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  [archive] = tmp_path.glob("*.tar.gz")
  with tarfile.open(archive) as file:
    held = {name.partition("/")[2] for name in file.getnames()}
  listed = subprocess.run(
    ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  tracked = {name for name in listed.stdout.split("\0") if os.path.exists(ROOT / name)}
  assert tracked - {""} - held == set()
