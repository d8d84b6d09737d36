"""The command line: flags -> Config -> the chosen stages. The only reader of flags."""

import contextlib
import difflib
import errno
import json
import os
import pathlib
import re
import runpy
import signal
import sys
import tempfile
import traceback

from absl import flags
from ml_collections import config_flags

import dalign
from dalign.config import convert
from dalign.config import explain
from dalign.config.fields import Halted
from dalign.config.schema import Config
from dalign.data import bundled
from dalign.runs import buckets
from dalign.runs import stopping
from dalign.tools import sweep

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk that takes no more
FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, OSError)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)  # of files that are not ours to write

MODES = {
  "run": "the stages of config.stages, each done once",
  "new": "a new folder WORKDIR: a policy, prompts, a judge, a config",
  "label": "propose labels for prompts, by the filter's judge",
  "check": "what is there to begin with, and what is missing",
  "plan": "what they would take: memory, time, chips",
  "probe_judge": "whether the judge of RL can be trusted with it",
  "chat": "talk to a model of the run in WORKDIR, in the terminal",
  "serve": "the same by OpenAI's protocol, on loopback (extra: serve)",
  "config": "what differs from the recipe, and all; --describe says what",
  "schema": "the JSON Schema of configs",
  "sweep": "a command line for each point of the config file's sweep()",
}
HELP = """\
usage: dalign --config=FILE --workdir=FOLDER [--mode=MODE] [--config.NAME=VALUE ...]

From a written spec, prompts and a model to a model that reasons over the spec.

  --config=FILE[:NAME]       a config file, yours or one that comes with the package:
                             configs/quickstart.py, configs/tiny.py (a minute),
                             configs/world.py[:ablation], configs/large.py:NAME
  --workdir=FOLDER           where all that comes out lies; the same command again skips
                             what is done and goes on with what is not
  --mode=MODE
{modes}
  --config.stages=NAMES      all, or some of base, generate, filter, sft, distill,
                             reward, rl, eval, report, export
  --config.seed=N            and any other value of the config file, such as:
  --config.model.path=DIR    a Hugging Face folder, a name on the Hub, or a .gguf file
  --config.data.source=FORM:PATH   prompts: csv, jsonl, parquet, hf, tfds
  --config.data.columns.FIELD=COLUMN   what column a field is in; =TEXT for all rows
  --config.spec.dir=DIR      another specification
  --config.rl.steps=N        as of every stage
  --config.start_over=true   do a stage again whose config or input has changed
  --stage=NAME               chat, serve: the model that base, sft, distill or rl
                             left
  --host=ADDRESS --port=N    serve: where; others than loopback need a key
  --distributed              one of several processes, on the cluster that JAX finds
  --version

Exit codes: 0 done, or saved on SIGTERM; 2 bad input or config; 1 anything else. One
line on stderr says which. README.md says what comes out.
"""

_ARGV: list[str] = []  # the arguments that are being read, but those of `_columns`
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/.", sys_argv=_ARGV
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's artefacts.")
_MODE = flags.DEFINE_enum(
  "mode",
  "run",
  [*MODES],
  "What to do: see --help.",
)
_STAGE = flags.DEFINE_string(
  "stage",
  "",
  "chat, serve: the model that base, sft, distill or rl left; else the last of them.",
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: the address.")
_PORT = flags.DEFINE_integer(
  "port", 8000, "serve: the port; 0 takes a free one.", lower_bound=0, upper_bound=65535
)
_DESCRIBE = flags.DEFINE_bool("describe", False, "With --mode=config: what fields are.")
_JOINED = flags.DEFINE_bool(
  "distributed", False, "One of several processes, on the cluster that JAX finds."
)


GET_CONFIG = "wanted a function get_config() that returns the config"
ASKED = ("chat", "serve")  # modes that read the config of a run where none is given


def read_flags(argv: list[str]) -> tuple[Config | None, pathlib.Path]:
  """The checked config, or None where the mode does without, and the workdir;
  ValueError for anything that is wrong."""
  try:
    _ARGV[:], columns = _columns(_resolve_config(argv))
    rest = flags.FLAGS(_ARGV)
    if len(rest) > 1:
      raise ValueError(f"unexpected {rest[1]!r}: options are --config.NAME=VALUE")
    place, mode = buckets.as_path(_WORKDIR.value or ""), _MODE.value
    if not _WORKDIR.value and mode not in ("config", "schema", "check"):
      raise ValueError("wanted --workdir=FOLDER; see README.md")
    if mode in ("schema", "new") or mode in ASKED and _CONFIG.value is None:
      return None, place
    if _CONFIG.value is None:
      raise ValueError(_no_config())
    node = _node(_CONFIG.value, columns)
  except FLAG_ERRORS as error:
    raise ValueError(_one_line(error, argv)) from error
  except Exception as error:  # of the config file, which may raise any
    if not (line := _line_of_config(error)):
      raise
    said = getattr(error, "msg", None) or error  # a SyntaxError's has its line too
    raise ValueError(f"{line}{type(error).__name__}: {said}") from error
  return convert.build(Config, node), place


def _columns(argv: list[str]) -> tuple[list[str], dict[str, str]]:
  """The arguments without those --config.data.columns.FIELD=COLUMN, and the columns by
  field: names that no config file has, which is all that flags can change."""
  found = [re.fullmatch(r"--?config\.data\.columns\.(\w+)=(.*)", a) for a in argv]
  rest = [given for given, match in zip(argv, found, strict=True) if not match]
  return rest, {match[1]: match[2] for match in found if match}


def _node(config, columns: dict[str, str]) -> dict:
  """A config file's values, with some columns of its prompts."""
  node = config.to_dict()
  if columns:
    node["data"]["columns"] = dict(node["data"]["columns"]) | columns
  return node


def _explained(config: Config | None) -> str:
  """The text of the modes that run nothing."""
  if config is None:
    return json.dumps(explain.schema(Config), indent=2)
  return explain.listing(config, _recipe(config.recipe), describe=_DESCRIBE.value)


def _recipe(name: str) -> Config:
  """The config of a recipe such as "large:qwen3_8b.v3"; where configs/ has none of that
  name and version, that of the config file without flags."""
  stem, colon, argument = name.rpartition(".v")[0].partition(":")
  path = bundled.find(f"configs/{stem}.py")
  if path.is_file():
    with contextlib.suppress(ValueError):  # the file knows no such argument
      found = _read_config([f"--config={path}{colon}{argument}"])
      if found.recipe == name:
        return found
  file = config_flags.get_config_filename(flags.FLAGS["config"])
  return _read_config([f"--config={file}"])


def _resolve_config(argv: list[str]) -> list[str]:
  """The arguments, with a config file that is not here as that of the package;
  ValueError for one that is nowhere."""
  found = []
  for at, given in enumerate(argv):
    front, value = "", given
    if at and given.startswith(("--config=", "-config=")):
      front, value = "--config=", given.partition("=")[2]
    elif not at or argv[at - 1] not in ("--config", "-config"):
      found.append(given)
      continue
    file, colon, name = value.partition(":")
    path = bundled.find(file)
    if not path.is_file():
      beside = [str(other) for other in pathlib.Path(file).parent.glob("*.py")]
      near = difflib.get_close_matches(file, beside, n=1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise ValueError(f"{file!r}: wanted a config file, found none{hint}")
    found.append(f"{front}{path}{colon}{name}")
  return found


def _read_config(options: list[str]) -> Config:
  """The config that some options make, whatever flags this process has."""
  (argv, columns), values = _columns([sys.argv[0], *options]), flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    values(argv, known_only=True)
    node = _node(holder.value, columns)
  except FLAG_ERRORS as error:
    raise ValueError(_one_line(error, argv)) from error
  return convert.build(Config, node)


def _sweep(argv: list[str]) -> str:
  """The command lines of a sweep."""
  file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
  points = runpy.run_path(str(bundled.find(file))).get("sweep")
  if points is None:
    raise ValueError(
      f"{file}: wanted a function sweep() that yields points, found none"
    )
  command = [sys.executable, "-m", "dalign.main"]
  workdir = _WORKDIR.value or ""
  lines = sweep.lines(points(), argv[1:], command, workdir, _read_config)
  return "\n".join(lines)


def _config_files() -> list[str]:
  """The config file that the arguments name, if they do."""
  values = [given.removeprefix("--config=") for given in _ARGV[1:]]
  return [file for value in values if (file := value.partition(":")[0]).endswith(".py")]


def _no_config() -> str:
  """What is said where there is no config: none was named, or its function makes
  none."""
  if files := _config_files():
    return f"{files[-1]}: {GET_CONFIG}, got None of it"
  return "wanted --config=FILE; see README.md"


def _line_of_config(error: BaseException | None) -> str:
  """The line of the config file that an error comes from, as "FILE:LINE: ", or ""."""
  files = _config_files()
  while error is not None:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(frame.filename, frame.lineno) for frame in frames]
    if isinstance(error, SyntaxError):
      lines.append((error.filename or "", error.lineno))
    if own := [line for line in lines if line[0] in files]:
      return f"{own[-1][0]}:{own[-1][1]}: "
    error = error.__context__
  return ""


def _one_line(error: BaseException, argv: list[str]) -> str:
  """An error of the flag libraries in one line; a KeyError inside is an unknown field,
  of which ml_collections names the nearest. Of an error in a config file it tells the
  traceback, where the error will do."""
  cause = error
  while cause.args and isinstance(cause.args[0], BaseException):
    cause = cause.args[0]
  told: BaseException | None = error
  while told and not str(told).startswith("Error whilst parsing config file"):
    told = told.__context__
  cause = told and told.__context__ or cause
  text = " ".join(str(cause.args[0] if cause.args else cause).split())
  if text.endswith("has no attribute 'get_config'"):
    return f"{', '.join(_config_files())}: {GET_CONFIG}, found none"
  if flag := re.fullmatch(r"Unknown command line flag '(\w+\.[\w.]+)'", text):
    return f"{text}; did you mean --config.{flag[1]}?"
  line = _line_of_config(error) if isinstance(cause, (AttributeError, KeyError)) else ""
  if not isinstance(cause, KeyError):
    return line + text
  missing = text.split("'")[1] if "'" in text else text
  given = next((a.split("=")[0] for a in argv if f".{missing}=" in a), missing)
  said = f"{given.lstrip('-')}: no such field. {text.partition(' ')[2]}"
  return f"{line}{said}".strip()


def _join() -> None:
  """Makes this process one of several where that is asked for; ValueError where it is
  one already and nobody asked, as on each host of a TPU slice."""
  import jax

  from dalign.runs import distributed

  if _JOINED.value or os.environ.get(distributed.ADDRESS_VARIABLE):
    distributed.start()
    stopping.install_handlers()  # JAX has taken the signal for itself
  elif distributed.is_multi_process():
    raise ValueError(
      f"this is one of {jax.process_count()} processes: give each of them --distributed"
    )


def _of_several() -> str:
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return ""
  return "; if another process of this run has died, its own output says why"


def _dispatch(config: Config | None, workdir: pathlib.Path) -> None:
  """What the flags ask for."""
  from dalign.runs import devices

  devices.prepare()
  match _MODE.value:
    case "run" if config:
      from dalign import stages

      stages.run(config, workdir)
    case "check" if config:
      from dalign.tools import check

      check.check(config, workdir)
    case "label" if config:
      from dalign.tools import label

      label.label(config, workdir)
    case "plan" if config:
      from dalign.tools import plan

      plan.plan(config, workdir)
    case "probe_judge" if config:
      from dalign.tools import probe

      probe.probe(config, workdir)
    case "chat":
      from dalign.serving import chat

      chat.chat(config, workdir, _STAGE.value)
    case "serve":
      from dalign.serving import server

      server.serve(config, workdir, _STAGE.value, _HOST.value, _PORT.value)


def _ensure_home() -> None:
  """Has a folder for temporary files be the home of a user who has none, as in many
  containers: caches lie in it, of ours and of the libraries."""
  try:
    pathlib.Path.home()
  except RuntimeError:
    home = pathlib.Path(tempfile.gettempdir()) / f"dalign-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    os.environ["HOME"] = str(home)


def main(argv: list[str] | None = None) -> int:
  """Runs the stages and returns the exit code."""
  argv = sys.argv if argv is None else argv
  _ensure_home()
  if {"--help", "-h"} & {*argv[1:]}:
    modes = [f"    {name:23}  {does}" for name, does in MODES.items()]
    print(HELP.format(modes="\n".join(modes)), end="")
    return 0
  if "--version" in argv[1:]:
    print(dalign.__version__)
    return 0
  try:
    config, workdir = read_flags(argv)
    if _MODE.value in ("config", "schema", "sweep"):
      signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
      print(_sweep(argv) if _MODE.value == "sweep" else _explained(config))
      return 0
    if _MODE.value == "new":
      from dalign.tools import new

      new.new(workdir)
      return 0
    stopping.install_handlers()
    _join()
    _dispatch(config, workdir)
  except ValueError as error:
    print(f"dalign: {error}", file=sys.stderr)
    return 2
  except (ConnectionError, Halted) as error:
    print(f"dalign: {error}", file=sys.stderr)
    return 1
  except (stopping.Stopped, KeyboardInterrupt):
    talks = flags.FLAGS.is_parsed() and _MODE.value in ASKED
    again = "" if talks else "; the same command goes on from here"
    print(f"dalign: stopped{again}", file=sys.stderr)
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
    traceback.print_exc()
    print(f"dalign: {type(error).__name__}: {error}{_of_several()}", file=sys.stderr)
    return 1
  return 0


def run() -> None:
  """The console script."""
  code = main()
  for number in (signal.SIGTERM, signal.SIGALRM):  # too late to stop anything
    signal.signal(number, signal.SIG_IGN)
  if "jax" not in sys.modules:
    sys.exit(code)
  from dalign.runs import distributed

  distributed.exit_process(code)


if __name__ == "__main__":
  run()
