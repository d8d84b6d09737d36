"""Long runs of the tiny model, and how fast memory, files and time grow in them.

  python -m tests.soak rl --n=2000
  python -m tests.soak prompts --n=100000

Slopes are those of Theil and Sen with their 95% interval, after the first tenth.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import jax
import numpy as np
from scipy import stats

from dalign import stages
from dalign.runs import devices
from dalign.runs import metrics
from dalign.runs import store
from tests.helpers import tiny

GROWING = ("metrics.jsonl", "rollouts.jsonl", "samples.jsonl", "judged.jsonl")
POINTS = 200  # that a slope is taken of
SMALL = {  # the tiny run, as little a step as can be
  "sampler.slots": 64,
  "sampler.lanes": 2,
  "model.random.width": 16,
  "model.random.layers": 1,
}


class Watch:
  """What a process holds, noted each time that something is written."""

  def __init__(self, workdir: pathlib.Path):
    self.workdir = workdir
    self.points: dict[str, list[tuple]] = {}

  def note(self, stage: str, count: float) -> None:
    """Notes all of it, where `count` steps or rows are done."""
    sizes = [
      path.stat().st_size
      for path in self.workdir.rglob("*")
      if path.is_file() and path.name not in GROWING and "tensorboard" not in path.parts
    ]
    self.points.setdefault(stage, []).append(
      (
        count,
        time.process_time(),
        _resident(),
        len(os.listdir("/proc/self/fd")),
        len(jax.live_arrays()),
        len(sizes),
        sum(sizes),
      )
    )

  def table(self) -> dict[str, dict[str, dict]]:
    """stage -> quantity -> first, last, slope a step or row, and its interval. Seconds
    are the processor's, which other work on the machine leaves as they are."""
    out = {}
    for stage, points in self.points.items():
      columns = np.array(points, float).T
      count = columns[0]
      pace = np.diff(columns[1]) / np.maximum(np.diff(count), 1e-9)
      rows = {"seconds a step": (count[1:], pace)}
      names = ("resident bytes", "descriptors", "live arrays", "files", "file bytes")
      rows |= {n: (count, x) for n, x in zip(names, columns[2:], strict=True)}
      out[stage] = {name: trend(*row) for name, row in rows.items()}
      out[stage]["of"] = {"n": count[-1], "seconds": columns[1][-1] - columns[1][0]}
    return out


def trend(x, y) -> dict[str, float]:
  """First and last value, and the slope with its 95% interval, past the first tenth."""
  x, y = (np.asarray(v, float)[len(x) // 10 :] for v in (x, y))
  some = np.unique(np.linspace(0, len(x) - 1, min(POINTS, len(x))).astype(int))
  slope, _, low, high = stats.theilslopes(y[some], x[some])
  first, last = np.median(y[: len(y) // 10 + 1]), np.median(y[-(len(y) // 10) - 1 :])
  return {"first": first, "last": last, "slope": slope, "low": low, "high": high}


def _resident() -> int:
  """Bytes of memory of this process."""
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


def rl(n: int, workdir: pathlib.Path) -> dict:
  """n steps of RL from the base, by the rubric, with a checkpoint every ten."""
  watch = Watch(workdir)
  write = metrics.Metrics.write

  def watched(self, stage, step, values):
    write(self, stage, step, values)
    if step % max(1, n // 1000) == 0:
      watch.note(stage, step)

  changes = {
    **{"stages": "rl", "rl.start": "base", "rl.reward": "rubric", "rl.steps": n},
    **{"rl.metadata": "told"},
    **{
      "rl.prompts": 4,
      "rl.capability": 1,
      "rl.max_new": 64,
      "rl.checkpoint_every": 10,
    },
    **{"rl.show_every": 10, "rl.batch.rows": 2, "rl.batch.micro": 4},
  }
  metrics.Metrics.write = watched
  try:
    stages.run(tiny(**SMALL | changes), workdir)
  finally:
    metrics.Metrics.write = write
  return watch.table()


def prompts(n: int, workdir: pathlib.Path) -> dict:
  """n prompts through generate and filter, one sample each."""
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / "prompts.jsonl"
  words = "red old tall warm odd shy thin calm wet raw".split()
  with path.open("w") as file:
    for i in range(n):
      said = " ".join(words[int(digit)] for digit in str(i))
      row = {"id": f"p{i}", "prompt": f"Name a thing that is {said}."}
      row |= {"category": "benign", "expected": "comply", "split": "train"}
      file.write(json.dumps(row) + "\n")
  watch, done = Watch(workdir / "run"), {}
  append = store.append_rows

  def watched(path, rows):
    rows = [*rows]
    append(path, rows)
    before = done.get(path, 0)
    done[path] = before + len(rows)
    if before * 1000 // n < done[path] * 1000 // n:
      watch.note(path.parent.name, done[path])

  changes = {
    **{"stages": "generate,filter", "data.source": f"jsonl:{path}"},
    "generate.prompts": dict(refuse=0, safe_complete=0, comply=n),
    **{"generate.helpful": 0, "generate.capability": 0, "generate.demonstrations": 0},
    **{"generate.most": 1, "generate.max_new": 8},
  }
  store.append_rows = watched
  try:
    stages.run(tiny(**SMALL | changes), workdir / "run")
  finally:
    store.append_rows = append
  return watch.table()


def main() -> None:
  """Runs one of them and prints its table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("rl", "prompts"))
  parser.add_argument("--n", type=int, required=True, help="steps, or prompts")
  options = parser.parse_args()
  devices.prepare()
  with tempfile.TemporaryDirectory() as folder:
    found = {"rl": rl, "prompts": prompts}[options.what](
      options.n, pathlib.Path(folder)
    )
  for stage, rows in found.items():
    of = rows.pop("of")
    print(f"{stage}: {of['n']:.0f} in {of['seconds']:.0f} s")
    for name, row in rows.items():
      print(
        f"  {name:15s} {row['first']:14.6g} to {row['last']:14.6g}, slope "
        f"{row['slope']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"
      )


if __name__ == "__main__":
  main()
