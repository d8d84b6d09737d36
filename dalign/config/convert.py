"""Configs read and written: files and flags, changes, JSON.

`configs/*.py` and flags speak `ml_collections`; `build` turns that once into a `Config`
of `schema.py`, and nothing below `main` ever sees a ConfigDict.
"""

import collections.abc
import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal, Mapping

from dalign.config.fields import check
from dalign.config.fields import split_annotated
from dalign.config.schema import Config

FORMAT_VERSION = 1  # of config.json


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object of JSON, as `json.loads` asks for one; ValueError where a key stands in
  it twice."""
  names = [name for name, _ in pairs]
  if twice := [name for name in {*names} if names.count(name) > 1]:
    raise ValueError(f"the key {min(twice)!r} more than once in an object: keep one")
  return dict(pairs)


def build(cls, node: Mapping[str, Any], where: str = "config"):
  """Makes the frozen `cls` from one node of a config file, a mapping or a ConfigDict.

  Raises ValueError for unknown names (with the nearest known one), missing names and
  values of the wrong kind, naming the field in full.
  """
  node = node.to_dict() if hasattr(node, "to_dict") else node
  if not isinstance(node, Mapping) or not all(isinstance(name, str) for name in node):
    raise ValueError(f"{where}: wanted names and their values, got {node!r:.80}")
  fields = {field.name: field.type for field in dataclasses.fields(cls)}
  for name in node:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=1)
      hint = f"; did you mean {where}.{near[0]}?" if near else ""
      said = name if name.isprintable() else repr(name)
      raise ValueError(f"{where}.{said}: no such field{hint}")
  needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
  missing = sorted(needed - set(node))
  if missing:
    raise ValueError(f"{where}: missing {', '.join(missing)}")
  return cls(**{n: _value(fields[n], node[n], f"{where}.{n}") for n in node})


def _value(kind, value, where: str):
  if kind is Any:
    return value
  if isinstance(kind, types.UnionType):  # X | None
    if value is None:
      return None
    kind = typing.get_args(kind)[0]
  if dataclasses.is_dataclass(kind):
    return build(kind, value, where)
  said, (kind, _) = kind, split_annotated(kind)
  origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
  if origin is tuple and isinstance(value, (tuple, list)):
    if inner[1:] == (...,):
      if len(value) == 1 and isinstance(value[0], str):  # as a flag gives "a,b"
        value = [name.strip() for name in value[0].split(",")]
      value = [_value(inner[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
    return tuple(value)
  if origin is Literal:
    kind = origin = str
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = _float(value)
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{where}: wanted a finite number, got {value}")
  if not isinstance(value, origin) or isinstance(value, bool) and kind is not bool:
    raise ValueError(f"{where}: wanted {kind}, got {value!r:.80}")
  if origin is collections.abc.Mapping:
    rows: Any = value
    values = {k: _value(inner[1], x, f"{where}.{k}") for k, x in rows.items()}
    return types.MappingProxyType(values)
  check(said, value, where)
  return value


def _float(value: int) -> float:
  try:
    return float(value)
  except OverflowError:
    return math.inf


def changed(config, changes: Mapping[str, Any], where: str = "config"):
  """A config with other values in some places, as in {"sft": {"epochs": 4}}.

  Raises ValueError for a name that is none and a value of the wrong kind.
  """
  fields = {field.name: field.type for field in dataclasses.fields(type(config))}
  new = {}
  for name, value in changes.items():
    if name not in fields:
      raise ValueError(f"{where}.{name}: no such field; there are {', '.join(fields)}")
    old, place = getattr(config, name), f"{where}.{name}"
    inside = dataclasses.is_dataclass(old) and isinstance(value, Mapping)
    new[name] = (
      changed(old, value, place) if inside else _value(fields[name], value, place)
    )
  return dataclasses.replace(config, **new)


def flat(config, prefix: str = "") -> dict[str, Any]:
  """A config, or part of one, as {"sft.batch.rows": 8, ...}: plain JSON values."""
  out: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = f"{prefix}{field.name}"
    if dataclasses.is_dataclass(value):
      out |= flat(value, f"{name}.")
    else:
      out[name] = plain(value)
  return out


def to_json(config: Config) -> dict[str, Any]:
  """What config.json holds: the format's version, and the config, flat."""
  return {"format_version": FORMAT_VERSION} | flat(config)


def of_json(values: Mapping[str, Any]) -> Config:
  """The config of a config.json.

  Raises ValueError for what is no config, or of a format that is not known.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f"config.json: wanted keys and values, got {values!r:.80}")
  version = values.get("format_version")
  if version != FORMAT_VERSION:
    raise ValueError(
      f"config.json: wanted format {FORMAT_VERSION}, got {version!r}; use the dalign "
      "that wrote it"
    )
  node: dict[str, Any] = {}
  for name, value in values.items():
    if name == "format_version":
      continue
    *path, last = name.split(".")
    place = node
    for part in path:
      place = place.setdefault(part, {})
      if not isinstance(place, dict):
        raise ValueError(f"config.json: {name!r} is in something that has no parts")
    place[last] = value
  return build(Config, node)


def plain(value):
  """A value as JSON has it: tuples are lists."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  return [plain(item) for item in value] if isinstance(value, tuple) else value
