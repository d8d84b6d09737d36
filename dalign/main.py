"""The command line: flags -> Config -> the chosen stages. The only reader of flags.

  python -m dalign.main --config=configs/quickstart.py --workdir=runs/quickstart

Exit codes: 0 done, or saved on SIGTERM; 2 bad input or config; 1 anything else. One
line on stderr says which. README.md says what can be overridden and what comes out.
"""

import errno
import os
import pathlib
import signal
import sys

from absl import flags
from ml_collections import config_flags

from dalign import buckets
from dalign import config as configs
from dalign import stopping

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk that takes no more
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)  # of files that are not ours to write

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's artefacts.")
_MODE = flags.DEFINE_enum(
  "mode",
  "run",
  ["run", "plan", "probe_judge"],
  "Run the stages, say what they would take, or try the judge of RL.",
)
_JOINED = flags.DEFINE_bool(
  "distributed", False, "One of several processes, on the cluster that JAX finds."
)


def read_flags(argv: list[str]) -> tuple[configs.Config, pathlib.Path]:
  """The checked config and the workdir; ValueError for anything that is wrong."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f"unexpected {rest[1]!r}: options are --config.NAME=VALUE")
    if _CONFIG.value is None or not _WORKDIR.value:
      raise ValueError("wanted --config=FILE and --workdir=FOLDER; see README.md")
    node = _CONFIG.value.to_dict()
  except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
    raise ValueError(_one_line(error, argv)) from error
  return configs.build(configs.Config, node), buckets.place(_WORKDIR.value)


def _one_line(error: BaseException, argv: list[str]) -> str:
  """An error of the flag libraries in one line; a KeyError inside is an unknown field,
  of which ml_collections names the nearest."""
  cause = error
  while cause.args and isinstance(cause.args[0], BaseException):
    cause = cause.args[0]
  text = " ".join(str(cause.args[0] if cause.args else cause).split())
  if not isinstance(cause, KeyError):
    return text
  missing = text.split("'")[1] if "'" in text else text
  given = next((a.split("=")[0] for a in argv if f".{missing}=" in a), missing)
  return f"{given.lstrip('-')}: no such field. {text.partition(' ')[2]}".strip()


def _join() -> None:
  """Makes this process one of several where that is asked for; ValueError where it is
  one already and nobody asked, as on each host of a TPU slice."""
  import jax

  from dalign import processes

  if _JOINED.value or os.environ.get(processes.ADDRESS):
    processes.start()
    stopping.listen()  # JAX has taken the signal for itself
  elif processes.several():
    raise ValueError(
      f"this is one of {jax.process_count()} processes: give each of them --distributed"
    )


def _of_several() -> str:
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return ""
  return "; if another process of this run has died, its own output says why"


def main(argv: list[str] | None = None) -> int:
  """Runs the stages and returns the exit code."""
  argv = sys.argv if argv is None else argv
  if "--help" in argv[1:]:
    print(__doc__)
    return 0
  try:
    config, workdir = read_flags(argv)
    stopping.listen()
    _join()
    from dalign import pipeline
    from dalign.pipeline import context
    from dalign.pipeline import plan
    from dalign.pipeline import probe

    context.prepare_jax()
    modes = {"run": pipeline.run, "plan": plan.plan, "probe_judge": probe.probe}
    modes[_MODE.value](config, workdir)
  except ValueError as error:
    print(f"dalign: {error}", file=sys.stderr)
    return 2
  except (ConnectionError, configs.Halted) as error:
    print(f"dalign: {error}", file=sys.stderr)
    return 1
  except (stopping.Stopped, KeyboardInterrupt):
    print("dalign: stopped; the same command goes on from here", file=sys.stderr)
    return 0
  except Exception as error:
    number = getattr(error, "errno", None)
    if number in (*FULL, *LOCKED):
      advice = "make room" if number in FULL else "have it writable"
      advice = (
        f"what is done is kept: {advice}, and the same command goes on from there"
      )
      print(f"dalign: {error}; {advice}", file=sys.stderr)
      return 1
    import traceback

    traceback.print_exc()
    print(f"dalign: {type(error).__name__}: {error}{_of_several()}", file=sys.stderr)
    return 1
  return 0


def run() -> None:
  """The console script."""
  code = main()
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # too late to stop anything
  if "jax" not in sys.modules:
    sys.exit(code)
  from dalign import processes

  processes.leave(code)


if __name__ == "__main__":
  run()
