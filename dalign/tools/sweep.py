"""The points of a sweep -> one command line each.

Does not know how flags are parsed, or what the fields of a config mean.
"""

from collections.abc import Callable, Iterable, Mapping
import hashlib
import re
import shlex
from typing import Any

from dalign.config import convert
from dalign.config.schema import Config

NAME = 120  # characters of a folder's name, before what makes it unique


def lines(
  points: Iterable[Mapping[str, object]],
  args: list[str],
  command: list[str],
  workdir: str,
  read: Callable[[list[str]], Config],
) -> list[str]:
  """A command line a point, quoted for a shell, with a folder of its own in `workdir`.

  points: overrides such as {"rl.steps": 20, "seed": 1}.
  args: the options of the sweep's own command line, which all points keep.
  command: what the options follow.
  read: options -> the config that they make, or ValueError.

  Raises ValueError for a point that makes no config, or not what it says, and for two
  that make the same.
  """
  kept = _without(args, {"mode", "workdir"})
  found: list[str] = []
  before: dict[str, str] = {}
  made: Iterable[Any] = points  # by a config file, which may make anything
  for point in made:
    if not isinstance(point, Mapping) or not all(isinstance(n, str) for n in point):
      raise ValueError(
        f'sweep(): wanted overrides such as {{"seed": 1}}, got {point!r:.80}'
      )
    given = {name: _format_option(value) for name, value in point.items()}
    options = [*kept, *(f"--config.{name}={value}" for name, value in given.items())]
    config = convert.flat(read(options))
    for name, value in point.items():
      got = config.get(name)
      if name not in config or got != _plain(value):
        raise ValueError(
          f"sweep(): wanted config.{name}={value!r:.80}, and a command line makes it "
          f"{got!r:.80}; give a value of a field, of its own kind"
        )
    folder = _folder(given)
    key = repr(sorted(config.items()))
    if key in before:
      raise ValueError(
        f"sweep(): {before[key]} and {folder} make the same config; wanted each once"
      )
    before[key] = folder
    line = shlex.join([*command, f"--workdir={workdir}/{folder}", *options])
    if not line.isprintable():
      raise ValueError(f"sweep(): wanted a point that one line can say, got {line!r}")
    found.append(line)
  return found


def _without(args: list[str], names: set[str]) -> list[str]:
  """Options but for those of some names, as --name=value or --name value."""
  kept, rest = [], iter(args)
  for arg in rest:
    name, given, _ = arg.lstrip("-").partition("=")
    if arg.startswith("-") and name in names:
      if not given:
        next(rest, None)
      continue
    kept.append(arg)
  return kept


def _format_option(value) -> str:
  """A value as an option says it."""
  return value if isinstance(value, str) else repr(value)


def _plain(value):
  """A value as a flat config has it."""
  return [*map(_plain, value)] if isinstance(value, (list, tuple)) else value


def _folder(given: Mapping[str, str]) -> str:
  """A name that the point alone decides: all it says, or as much as a path may say and
  a hash of the rest."""
  said = ",".join(f"{name}={value}" for name, value in sorted(given.items()))
  plain = re.sub(r"[^A-Za-z0-9_.,=+-]", "-", said)[:NAME]
  if plain == said:
    return said or "as-it-is"
  return f"{plain}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
