"""Times the quickstart from the start of its process to its first finished sample on
disk: once with an empty compile cache, then with the one that this left.

  python -m benchmarks.startup --warm 3

A sample is finished when a decode step ended it, so this holds all that comes before:
imports, the model's file, compiling or reading what is compiled, the first contexts.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT_S = 600.0


def main() -> None:
  """Prints a line a start."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--warm", type=int, default=3, help="starts after the cold one")
  asked = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    place = pathlib.Path(scratch)
    for number in range(1 + asked.warm):
      seconds = start(place / f"run{number}", place / "compiled")
      print(f"{'warm' if number else 'cold'}: {seconds:.1f} s", flush=True)


def start(workdir: pathlib.Path, cache: pathlib.Path) -> float:
  """Seconds until the first sample; the run is then ended with SIGTERM."""
  command = [sys.executable, "-m", "dalign.main", "--config=configs/quickstart.py"]
  command += [f"--workdir={workdir}", "--config.stages=generate"]
  samples = workdir / "generate" / "samples.jsonl"
  at = time.monotonic()
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    while not (samples.exists() and samples.stat().st_size):
      if process.poll() is not None or time.monotonic() - at > LIMIT_S:
        process.kill()
        sys.exit(f"no sample came:\n{process.communicate()[1][-2000:]}")
      time.sleep(0.05)
    seconds = time.monotonic() - at
  finally:
    process.send_signal(signal.SIGTERM)
    process.communicate()
  return seconds


if __name__ == "__main__":
  main()
