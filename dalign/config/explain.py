"""Configs in words: what each field is, as JSON Schema, and as flags are written.

Reads `schema.Config` and the classes that it reaches, whose docstrings describe their
fields and whose types say what these may be. Values in, values out.
"""

import collections.abc
import dataclasses
import inspect
import math
import re
import shlex
import textwrap
import types
import typing
from typing import Any, Iterator, Mapping

from dalign.config.fields import Bounds
from dalign.config.fields import Form
from dalign.config.fields import split_annotated
from dalign.config.schema import Config

WIDTH = 100  # columns of a terminal
_FIELD = re.compile(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): +(.+)")
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")  # what no shell changes
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def prose(cls) -> str:
  """What a dataclass is: its docstring without what that says of fields."""
  return _read(cls)[0]


def fields(cls) -> dict[str, str]:
  """What each field of a dataclass is. A field that is a dataclass may be left out, and
  is then what that is.

  Raises ValueError where one is described twice, or not at all, or is not there.
  """
  said = _read(cls)[1]
  found = {}
  for field in dataclasses.fields(cls):
    part = _part(field.type)
    text = said.pop(field.name, "") or (part and prose(part))
    if not text:
      raise ValueError(f"{cls.__name__}.{field.name}: its docstring says nothing of it")
    found[field.name] = text
  if said:
    raise ValueError(f"{cls.__name__} has no {', '.join(said)}, which it describes")
  return found


def _read(cls) -> tuple[str, dict[str, str]]:
  """A docstring's prose, and its entries: "name, name: text", going on indented."""
  rest: list[str] = []
  said: dict[str, str] = {}
  now: list[str] = []
  for line in (inspect.getdoc(cls) or "").splitlines():
    if entry := _FIELD.fullmatch(line):
      now = entry[1].split(", ")
      for name in now:
        if name in said:
          raise ValueError(f"{cls.__name__}.{name} is described twice")
        said[name] = line if now[1:] else entry[2]  # of several, which is which
    elif now and line.startswith("  "):
      said |= {name: f"{said[name]} {line.strip()}" for name in now}
    else:
      rest, now = [*rest, line], []
  return " ".join(" ".join(rest).split()), said


def _part(kind) -> Any:
  """The dataclass that a field is, or holds the values of in a mapping, or None."""
  kind, more = split_annotated(kind)
  if isinstance(kind, types.UnionType):
    kind = typing.get_args(kind)[0]
  return next((c for c in (kind, more) if dataclasses.is_dataclass(c)), None)


def parts(cls) -> list[type]:
  """The dataclass, and all that it reaches."""
  found = [cls]
  for one in found:
    inner = (_part(field.type) for field in dataclasses.fields(one))
    found += [part for part in dict.fromkeys(inner) if part and part not in found]
  return found


def text(cls, name: str) -> str:
  """What the value of a dotted name is, or the mapping that it stands in."""
  first, _, rest = name.partition(".")
  part = _part({f.name: f.type for f in dataclasses.fields(cls)}[first])
  return text(part, rest) if part and rest else fields(cls)[first]


def schema(cls) -> dict[str, Any]:
  """JSON Schema (draft 2020-12) of a config, or of some of its values, as nested JSON
  that names a recipe."""
  return {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A run of dalign",
    **_object(cls, {"$schema": {"type": "string"}}),
    "required": ["recipe"],
    "$defs": {part.__name__: _object(part, {}) for part in parts(cls)[1:]},
  }


def _object(cls, more: dict) -> dict[str, Any]:
  said = fields(cls)
  own = {
    field.name: _schema(field.type) | {"description": said[field.name]}
    for field in dataclasses.fields(cls)
  }
  return {
    "description": prose(cls),
    "type": "object",
    "properties": more | own,
    "additionalProperties": False,
  }


def _schema(kind) -> dict[str, Any]:
  """JSON Schema of a field's type."""
  kind, more = split_annotated(kind)
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if isinstance(kind, types.UnionType):  # X | None
    return {"anyOf": [_schema(inner[0]), {"type": "null"}]}
  if part := _part(kind) or _part(more):
    return {"$ref": f"#/$defs/{part.__name__}"}
  if origin is typing.Literal:
    return {"type": "string", "enum": [*inner]}
  if origin is tuple and inner[1:] == (...,):
    return {"type": "array", "items": _schema(inner[0])}
  if origin is tuple:
    return {"type": "array", "prefixItems": [_schema(one) for one in inner]}
  if origin is collections.abc.Mapping:
    return {"type": "object", "additionalProperties": _schema(inner[1])}
  if kind is Any:
    return {}
  if isinstance(more, Form):
    return {"type": "string", "pattern": f"^({more.pattern})$"}
  limits = more._asdict() if isinstance(more, Bounds) else {}
  limits.pop("words", None)
  return {"type": _TYPES[kind]} | {k: x for k, x in limits.items() if math.isfinite(x)}


def values(config, name: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted name, value) of each field of a config, and of each value in its mappings:
  the names that flags have after --config."""
  if dataclasses.is_dataclass(config):
    items = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
  elif isinstance(config, Mapping) and config:
    items = [*config.items()]
  else:
    yield name, dict(config) if isinstance(config, Mapping) else config
    return
  for key, value in items:
    yield from values(value, f"{name}.{key}" if name else key)


def flag(value) -> str:
  """A value as bash and a flag read it, in one line. (No flag can say None.)"""
  if isinstance(value, bool):
    return str(value).lower()
  written = value if isinstance(value, str) else repr(value)
  if _PLAIN.fullmatch(written):
    return written
  if not written.isprintable():
    return f"$'{''.join(map(_escaped, written))}'"
  return shlex.quote(written) if set(written) & set('"$`\\!') else f'"{written}"'


def _escaped(letter: str) -> str:
  """A letter within $'...'."""
  if letter in "\\'":
    return f"\\{letter}"
  named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(letter)
  return letter if letter.isprintable() else named or f"\\U{ord(letter):08x}"


def listing(config: Config, base: Config, *, describe: bool = False) -> str:
  """The config, a value a line: name=value, and what `base`, its recipe, has where that
  is other. `describe` adds what it is. On top, what differs; at the end, what only
  `base` has."""
  now, before = dict(values(config)), dict(values(base))
  names = [*now, *(name for name in before if name not in now)]
  other = [x for x in names if (x in now, now.get(x)) != (x in before, before.get(x))]
  but = ", ".join(other) if len(other) < 4 else f"{len(other)} values"
  changed = f"; changed: {but}" if other else ""
  lines = [f"# recipe: {config.recipe or 'none'}{changed}"]
  for name in now:
    line = f"{name}={flag(now[name])}"
    if name in other:
      line += f"  # recipe: {flag(before[name]) if name in before else 'has none'}"
    lines.append(line)
    if describe:
      about = text(type(config), name)
      lines += textwrap.wrap(
        about, WIDTH, initial_indent="    ", subsequent_indent="    "
      )
  gone = (name for name in before if name not in now)
  return "\n".join(
    [*lines, *(f"# only the recipe: {x}={flag(before[x])}" for x in gone)]
  )
