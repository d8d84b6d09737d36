"""Kills a run again and again, and compares what comes out with a run that was not.

  DALIGN_CHAOS=1 pytest -m e2e tests/runs/test_chaos.py

Each go of the run ends itself by SIGKILL where none did yet: before or after a call
that changes a file of the workdir (fsync, rename, replace, mkdir, rmdir, unlink), or in
the middle of a row that it appends. The same command then goes on, until it is done.
All that a run leaves must be the same to the bit, but for clocks.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

ROOT = pathlib.Path(__file__).parents[1]
CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")
CLOCKS = {"started": "", "finished": "", "wall_s": 0.0, "inputs": {}}  # hashes of those


@dataclasses.dataclass(frozen=True)
class Kills:
  """When a go ends itself: at the first place that is not among `before` and, by the
  seed, in the share to be tried."""

  seed: int
  share: float
  before: tuple[str, ...] = ()

  def at(self, place: str) -> str:
    """How to end at a place: "before", "after", "within", or "" for not at all."""
    rng = random.Random(f"{self.seed} {place}")
    if place in self.before or rng.random() >= self.share:
      return ""
    return rng.choice(("before", "after", "within"))


# In the process that is killed.


def arm(kills: Kills, workdir: pathlib.Path, note: pathlib.Path) -> set[str]:
  """Makes this process end itself as `kills` says; `note` then says where it was. The
  places that were passed are in what it returns."""
  seen, lock, root = set(), threading.RLock(), str(workdir.absolute())

  def end(how: str, place: str):
    with lock:
      note.write_text(json.dumps([how, place]))
      os.kill(os.getpid(), signal.SIGKILL)

  def event(place: str, act, torn=None):
    """Does what happens at a place; `torn` undoes a part of it."""
    with lock:
      seen.add(place)
    how = kills.at(place)
    if how == "before":
      end(how, place)
    done = act()
    if how == "within" and torn:
      torn()
    if how:
      end(how if torn else "after", place)
    return done

  def wrapped(name: str, real):
    @functools.wraps(real)
    def call(*args, **more):
      path = args[0]
      if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
      path = os.path.abspath(os.fsdecode(path))
      if not path.startswith(root):
        return real(*args, **more)
      what = f"{name} {re.sub(r'[0-9a-f]{8,}|[.][0-9]+[.]', '*', path[len(root) :])}"
      return event(what, lambda: real(*args, **more))

    return call

  for name in CALLS:
    setattr(os, name, wrapped(name, getattr(os, name)))

  from dalign.runs import metrics
  from dalign.runs import store

  append, write = store.append_rows, metrics.Metrics.write

  def tear(path, before: int):
    with open(path, "ab") as file:
      file.truncate((before + file.tell()) // 2)

  def size(path) -> int:
    return path.stat().st_size if path.exists() else 0

  def append_rows(path, rows):
    rows, before = list(rows), size(path)
    what = f"append {str(path)[len(root) :]}"
    return event(what, lambda: append(path, rows), lambda: tear(path, before))

  def write_metrics(self, stage, step, values):
    before = size(self._path)
    return event(
      f"metrics {stage}",
      lambda: write(self, stage, step, values),
      lambda: tear(self._path, before),
    )

  store.append_rows, metrics.Metrics.write = append_rows, write_metrics
  return seen


def go(kills: Kills, note: pathlib.Path, argv: list[str]) -> int:
  """The command line, armed; returns its exit code where it lives to the end."""
  sys.argv = ["dalign", *argv]
  workdir = next(a.partition("=")[2] for a in argv if a.startswith("--workdir="))
  seen = arm(kills, pathlib.Path(workdir), note)
  from dalign import main

  code = main.main(sys.argv)
  note.write_text(json.dumps(["passed", sorted(seen)]))
  return code


# In the process that looks on.


def run(workdir: pathlib.Path, config: str, kills: Kills, more=()):
  """One go: its exit code, how and where it ended, and the end of what it said."""
  argv = [f"--config={config}", f"--workdir={workdir}", *more]
  note = workdir.parent / "note"
  note.unlink(missing_ok=True)
  done = subprocess.run(
    [sys.executable, "-m", "tests.chaos", str(note), *argv],
    cwd=ROOT,
    input=json.dumps(dataclasses.asdict(kills)),
    capture_output=True,
    text=True,
    timeout=1200,
  )
  how, place = json.loads(note.read_text()) if note.exists() else ("", "")
  return done.returncode, how, place, done.stderr[-3000:]


def killed(workdir, config, kills: Kills, more=()) -> list[tuple[str, str]]:
  """Runs to the end with all kills on the way; how and where they were.

  Raises RuntimeError where a go ends in any other way than by its kill or done.
  """
  found: list[tuple[str, str]] = []
  while True:
    before = *kills.before, *(place for _, place in found)
    armed = dataclasses.replace(kills, before=before)
    code, how, place, said = run(workdir, config, armed, more)
    if code == 0:
      return found
    if code != -signal.SIGKILL:
      raise RuntimeError(f"exit {code} after {found[-1:]}: {said}")
    found.append((how, place))


def fingerprint(workdir: pathlib.Path) -> dict[str, str]:
  """Artefact -> hash of what it says, clocks left out: files, parameters, states."""
  found = {}
  for path in sorted(workdir.rglob("*")):
    name = path.relative_to(workdir).as_posix()
    if path.is_dir() and (path / "_CHECKPOINT_METADATA").exists():
      found |= {f"{name}:{leaf}": x for leaf, x in _arrays(path).items()}
    elif name == "report.html":
      found[name] = _report(workdir)
    elif path.is_file() and not _inside(path, workdir):
      found[name] = hashlib.sha256(_timeless(path)).hexdigest()
  return found


def _inside(path: pathlib.Path, workdir: pathlib.Path) -> bool:
  """Whether a file is part of saved arrays, or of TensorBoard's own logs."""
  above = path.relative_to(workdir).parts[:-1]
  return bool({"checkpoints", "params", "tensorboard"} & set(above))


def _timeless(path: pathlib.Path) -> bytes:
  content = path.read_bytes()
  if path.name == "manifest.json":
    return json.dumps(json.loads(content) | CLOCKS, sort_keys=True).encode()
  if path.name == "metrics.jsonl":
    rows = [json.loads(line) for line in content.splitlines()]
    for row in rows:
      row |= {k: 0.0 for k in row if k == "time" or k.endswith("_s")}
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
  return content


def _report(workdir: pathlib.Path) -> str:
  """Hash of the page that the artefacts make with their clocks left out; and whether
  the page that is there is the one that they make as they are."""
  from dalign.evaluation import report

  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / workdir.name
    leave = shutil.ignore_patterns("checkpoints", "params", "tensorboard")
    shutil.copytree(workdir, copy, ignore=leave)
    report.write_report(copy)
    if (copy / "report.html").read_bytes() != (workdir / "report.html").read_bytes():
      return "not that of the artefacts"
    for path in [*copy.rglob("manifest.json"), copy / "metrics.jsonl"]:
      path.write_bytes(_timeless(path))
    report.write_report(copy)
    return hashlib.sha256((copy / "report.html").read_bytes()).hexdigest()


def _arrays(folder: pathlib.Path) -> dict[str, str]:
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  where = folder / "state" if (folder / "state").is_dir() else folder
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.restore(where.absolute())
  return {
    jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
  """The artefacts that are not the same in both."""
  return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


if __name__ == "__main__":
  _, note, *argv = sys.argv
  sys.exit(go(Kills(**json.load(sys.stdin)), pathlib.Path(note), argv))
