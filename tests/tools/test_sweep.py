"""A sweep prints what a shell can run: each line makes its point, in its own folder."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from dalign import main
from dalign.config import convert
from dalign.config.schema import Config
from dalign.tools import sweep
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import config_file
from tests.helpers import python

QUICKSTART = ROOT / "configs" / "quickstart.py"


def read(options: list[str]) -> Config:
  """As the command line does."""
  return main._read_config([f"--config={QUICKSTART}", *options])


def lines(*points, args=(), workdir="runs/sweep") -> list[list[str]]:
  """The words of each point's line."""
  made = sweep.lines(points, [*args], ["python", "-m", "dalign.main"], workdir, read)
  return [shlex.split(line) for line in made]


def command(config, workdir, *more: str) -> subprocess.CompletedProcess:
  given = f"--config={config}", f"--workdir={workdir}", *more
  return python("-m", "dalign.main", "--mode=sweep", *given)


@pytest.fixture
def file(tmp_path):
  """`file(sweep)`: a config file, with the body of a sweep() or without one."""

  def write(body: str = ""):
    path = tmp_path / "mine.py"
    path.write_text(
      "import importlib.util\n"
      f"spec = importlib.util.spec_from_file_location('tiny', {str(ROOT)!r}"
      " + '/configs/tiny.py')\n"
      "tiny = importlib.util.module_from_spec(spec)\n"
      "spec.loader.exec_module(tiny)\n"
      "get_config = tiny.get_config\n" + (f"def sweep():\n  {body}\n" if body else "")
    )
    return path

  return write


def test_a_shell_reads_each_line_as_its_point(file, tmp_path):
  """As they stand; the first is also run."""
  path = file(
    "yield {'seed': 1, 'spec.dir': \"it's a; $folder\"}\n"
    "  yield {'seed': 2, 'eval.budgets': (0, 8)}\n"
    "  yield {}"
  )
  runs = tmp_path / "the runs"
  done = command(path, runs, "--config.stages=report")
  assert (done.returncode, done.stderr) == (0, "")
  found = []
  for line in done.stdout.splitlines():
    said = subprocess.check_output(["sh", "-c", f"printf '%s\\0' {line}"], text=True)
    python, _, module, workdir, *options = said.split("\0")[:-1]
    assert (python, module) == (sys.executable, "dalign.main")
    cfg = main._read_config(options)
    found.append((workdir, cfg.seed, cfg.spec.dir, cfg.eval.budgets, cfg.stages))
  assert found == [
    (
      *(f"--workdir={runs}/seed=1,spec.dir=it-s-a---folder-13195cda", 1),
      *("it's a; $folder", (), "report"),
    ),
    (
      f"--workdir={runs}/eval.budgets=-0,-8-,seed=2-179dbeed",
      *(2, "specs", (0, 8), "report"),
    ),
    (f"--workdir={runs}/as-it-is", 0, "specs", (), "report"),
  ]
  ran = subprocess.run(
    ["sh", "-c", done.stdout.splitlines()[0]],
    cwd=ROOT,
    env=clean_environment() | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert ran.returncode == 0, ran.stderr
  [folder] = runs.iterdir()
  made = convert.of_json(json.loads((folder / "config.json").read_text()))
  assert (made.seed, made.spec.dir) == (1, "it's a; $folder")


def test_folders_say_the_point_and_nothing_else_decides_them():
  points = [{"rl.steps": 20, "seed": 1}, {"seed": 1, "rl.steps": 7}, {"rl.stop_kl": 5}]
  folders = [os.path.basename(words[3]) for words in lines(*points)]
  assert folders == ["rl.steps=20,seed=1", "rl.steps=7,seed=1", "rl.stop_kl=5"]
  [[_, _, _, alone, *_]] = lines({"seed": 1, "rl.steps": 20}, args=["--config.seed=4"])
  assert alone == "--workdir=runs/sweep/rl.steps=20,seed=1"
  odd = [{"model.path": path} for path in ("a/b", "a b", "x" * 200, "x" * 201)]
  folders = [words[3] for words in lines(*odd)]
  assert len(set(folders)) == 4
  assert all(folder.count("/") == 2 and " " not in folder for folder in folders)
  assert max(map(len, folders)) < 180


def test_the_options_of_the_sweep_are_kept_but_for_mode_and_workdir():
  args = ["--mode", "sweep", "--config.stages=sft", "-workdir=x", "--distributed"]
  [words] = lines({"seed": 3}, args=args)
  assert words[4:] == ["--config.stages=sft", "--distributed", "--config.seed=3"]


@pytest.mark.parametrize(
  "points, match",
  [
    ([{"sead": 1}], "config.sead: no such field"),
    ([{"rl": 1}], "config.rl"),
    ([{"seed": "x"}], "seed"),
    ([{"seed": "1"}], "wanted config.seed='1'"),
    ([{"model.path": None}], "wanted config.model.path=None"),
    ([{"seed": -1}], "config.seed: wanted 0"),
    ([{"model.path": "a\nb"}], "one line"),
    ([{"seed": 1}, {"seed": 1}], "make the same config"),
    ([{"seed": 0}, {}], "make the same config"),
    ([{"rl.stop_kl": 5}, {"rl.stop_kl": 5.0}], "make the same config"),
    ([["seed"]], "wanted overrides"),
  ],
)
def test_points_that_are_wrong_are_refused(points, match):
  with pytest.raises(ValueError, match=match) as error:
    lines(*points)
  assert "\n" not in str(error.value)


def test_an_error_is_one_line_and_nothing_is_printed(file, tmp_path):
  done = command(file("yield {'rl.stepz': 3}"), tmp_path / "runs")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.count("\n") == 1 and "Did you mean" in done.stderr
  assert not (tmp_path / "runs").exists()


def test_the_quickstart_has_a_sweep():
  points = [*config_file("quickstart").sweep()]
  assert len(lines(*points)) == len(points) > 3
