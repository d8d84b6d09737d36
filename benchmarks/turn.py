"""One turn of one contender, in a process of its own: its settings, clock and answer.

Needs the standard library alone, so it runs in every contender's environment.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import sys
import time

THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
_HZ = os.sysconf("SC_CLK_TCK")
QUIET = 0.25  # CPUs that others may use while a run is waited for
PATIENCE_S = 60.0


def settings() -> argparse.Namespace:
  """What the command line asks of this turn."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--work", required=True)
  parser.add_argument("--model", required=True, help="Hugging Face directory, float32")
  parser.add_argument("--gguf", help="the same model as one GGUF file")
  parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
  parser.add_argument("--variant", default="", help="a form that this contender has")
  parser.add_argument("--repeats", type=int, default=1)
  return parser.parse_args()


def versions(*packages: str) -> str:
  """What is installed here of each."""
  return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


class Timer:
  """`with Timer() as t`: then t.s seconds, t.others CPUs that other processes used."""

  def __enter__(self):
    self._busy, self._own = _cpu()
    self._at = time.perf_counter()
    return self

  def __exit__(self, *_):
    self.s = time.perf_counter() - self._at
    busy, own = _cpu()
    others = (busy - self._busy) - (own - self._own)
    self.others = max(0.0, others / max(self.s, 1e-9))


def wait_until_quiet() -> None:
  """Returns when others leave the machine alone for a second, or patience ends."""
  end = time.perf_counter() + PATIENCE_S
  while time.perf_counter() < end:
    with Timer() as t:
      time.sleep(1.0)
    if t.others < QUIET:
      return


def measure(fn, repeats: int) -> list[Timer]:
  """Timed runs of fn, each on a quiet machine."""
  runs = []
  for _ in range(repeats):
    wait_until_quiet()
    with Timer() as t:
      fn()
    runs.append(t)
  return runs


def first(fn) -> tuple[Timer, float]:
  """The first run of fn, with all that is compiled and allocated, and the seconds from
  the start of this process to its end."""
  with Timer() as t:
    fn()
  return t, age()


def age() -> float:
  """Seconds since this process began."""
  with open("/proc/self/stat") as f:
    start = int(f.read().rsplit(")", 1)[1].split()[19]) / _HZ
  with open("/proc/uptime") as f:
    return float(f.read().split()[0]) - start


def decode(run, repeats: int, *, version: str) -> None:
  """A turn of decoding: `run(all)` gives every row its new tokens, or with all=False
  one, and returns the rows' new tokens. The answer holds both times."""
  found = {}

  def whole():
    found["rows"] = run(True)

  start = first(whole)
  run(False)  # compiles, for those that compile
  answer(
    start=start,
    runs=measure(whole, repeats),
    version=version,
    first_token_s=[t.s for t in measure(lambda: run(False), repeats)],
    check=[list(map(int, row[:8])) for row in found["rows"][:2]],
    new_tokens=sum(len(row) for row in found["rows"]),
  )


class Steps:
  """Times the steps of a loop that is not ours, and named parts of them."""

  def __init__(self):
    self.runs: list[Timer] = []
    self.parts: dict[str, float] = {}  # seconds of this step
    self.last: dict[str, float] = {}  # and of the last that ended
    self.first_done_s = 0.0

  def begin(self) -> None:
    """Where a step begins."""
    if self.runs:
      wait_until_quiet()
    self.parts.clear()
    self._timer = Timer().__enter__()

  def end(self) -> None:
    """Where a step ends."""
    self._timer.__exit__()
    if not self.runs:
      self.first_done_s = age()
    self.runs.append(self._timer)
    self.last = dict(self.parts)

  def watch(self, thing, name: str, part: str, settle=lambda _: None) -> None:
    """Adds the time of each call of `thing.name` to a part; `settle(result)` waits."""
    inner = getattr(thing, name)

    def timed(*args, **kwargs):
      at = time.perf_counter()
      result = inner(*args, **kwargs)
      settle(result)
      self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - at
      return result

    setattr(thing, name, timed)

  def answer(self, *, version: str) -> None:
    """The answer of a loop whose first step was the warm-up."""
    start = self.runs[0], self.first_done_s
    answer(start=start, runs=self.runs[1:], version=version, parts=self.last)


def answer(*, start: tuple[Timer, float], runs: list[Timer], version: str, **more):
  """Prints what this turn found, as the last line of its output."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  found = {
    "first_s": start[0].s,
    "first_done_s": start[1],
    "seconds": [t.s for t in runs],
    "others_cpus": [round(t.others, 3) for t in runs],
    "peak_mb": round(peak),
    "threads": THREADS,
    "version": version,
  }
  sys.stderr.flush()
  print("\n" + json.dumps(found | more), flush=True)


def _cpu() -> tuple[float, float]:
  """Busy seconds of all CPUs and CPU seconds of this process, since they began."""
  with open("/proc/stat") as f:
    user, nice, system, _, _, irq, soft, steal = map(int, f.readline().split()[1:9])
  own = os.times()
  return (user + nice + system + irq + soft + steal) / _HZ, own.user + own.system
