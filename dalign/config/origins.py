"""Where a config file sets its values: for each the file and line that said it last.

While the file is loaded, each assignment to a ConfigDict is noted with its caller. Of a
statement of many lines, as `c.rl.update(dict(steps=2, ...))`, the source says which one
names the value; what a helper makes, as in `optimizer=optimizer(2e-4)`, was said there.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
import functools
import inspect
import pathlib
from typing import Any, NamedTuple

import ml_collections

_LIBRARY = str(pathlib.Path(ml_collections.__file__).parent)


class _Place(NamedTuple):
  """A line that assigns, and the names that can be read there."""

  file: str
  line: int
  names: dict[str, Any]


def read(
  load: Callable[[], ml_collections.ConfigDict], flags: Mapping[str, str]
) -> dict[str, str]:
  """Dotted name -> "file:line" of each value of the config that `load` makes; or where
  one of `flags`, name -> value, has changed it, that flag."""
  found = {}
  for path, place in _noted(load):
    name = ".".join(path)
    said = next((n for n in flags if f"{name}.".startswith(f"{n}.")), None)
    found[name] = f"--config.{said}={flags[said]}" if said else _where(place, path)
  return found


def _noted(load) -> list[tuple[tuple[str, ...], _Place]]:
  """Loads a config: each value's path, and the place that assigned it."""
  places, kept = {}, []  # by node and key; nodes are kept, so that no id is used twice
  put = ml_collections.ConfigDict.__setitem__

  def noting(self, key, value):
    put(self, key, value)
    kept.append(self)
    places[id(self), key] = _caller()

  ml_collections.ConfigDict.__setitem__ = noting
  try:
    node = load()
  finally:
    ml_collections.ConfigDict.__setitem__ = put
  return [*_leaves(node, (), None, places)]


def _leaves(node, path, place, places) -> Iterator[tuple[tuple[str, ...], _Place]]:
  for key in node.keys():
    value, here = node[key], places.get((id(node), key), place)
    if isinstance(value, ml_collections.ConfigDict) and len(value):
      yield from _leaves(value, (*path, key), here, places)
    else:
      yield (*path, key), here


def _caller() -> _Place:
  """Who assigned: the last frame outside of this file and ml_collections. A file whose
  values are another's names that in a variable `__origin__`."""
  frame: Any = inspect.currentframe()
  while frame.f_code.co_filename.startswith((__file__, _LIBRARY)):
    frame = frame.f_back
  names = frame.f_globals | frame.f_locals
  file = names.get("__origin__", frame.f_code.co_filename)
  return _Place(file, frame.f_lineno, names)


def _where(place: _Place, path: tuple[str, ...]) -> str:
  """The place, at the line that names the value at a path."""
  found = [(0, place.line)]
  # A statement may be about the whole config or a part: the most names found tell.
  if (node := _assigned(place)) is not None:
    for start in range(len(path)):
      one = _search(node, path[start:], place.names, found[0])
      found += [one] if one else []
  file, here = pathlib.Path(place.file).absolute(), pathlib.Path.cwd()
  shown = file.relative_to(here) if file.is_relative_to(here) else file
  return f"{shown}:{max(found[::-1], key=lambda one: one[0])[1]}"


def _assigned(place: _Place) -> ast.expr | None:
  """What the statement at a place assigns, as it is written; a file of JSON is one."""
  body = _body(place.file)
  if "__origin__" not in place.names:
    statements = (x for top in body for x in ast.walk(top) if isinstance(x, ast.stmt))
    body = [x for x in statements if x.lineno <= place.line <= (x.end_lineno or 0)]
  return getattr(body[-1], "value", None)


@functools.cache
def _body(file: str) -> list[ast.stmt]:
  """The statements of a file of Python, or of JSON, which is a mapping of Python's."""
  return ast.parse(pathlib.Path(file).read_text(encoding="utf-8"), file).body


def _search(node: ast.expr, path, names, so_far):
  """(names of `path` found, line) of the expression within `node` that a value comes
  from; None where it is not in there. `so_far` is that of `node` itself."""
  if not path:
    return so_far
  if isinstance(node, ast.IfExp):
    chosen = node.body if _value(node.test, names) else node.orelse
    return _search(chosen, path, names, so_far)
  inside = _inside(node)
  for key, inner, line in reversed(inside or ()):
    if key == path[0]:
      own = so_far[0] + 1, line
      return _search(inner, path[1:], names, own) or own
    if key is None and (found := _search(inner, path, names, (so_far[0], line))):
      return found
  if inside is None:
    value = _value(node, names)
    return so_far if isinstance(value, Mapping) and path[0] in value else None
  helper = isinstance(node, ast.Call) and ast.unparse(node.func) != "dict"
  return so_far if helper else None


def _key(node: ast.expr) -> str:
  return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def _inside(node: ast.expr) -> list[tuple[str | None, ast.expr, int]] | None:
  """(key, value, line) of what makes a mapping; the key of a whole mapping is None.
  None where it is not made here."""
  if isinstance(node, ast.Call):
    named = [
      (k.arg, k.value, k.value.lineno if k.arg is None else k.lineno)
      for k in node.keywords
    ]
    return [*((None, one, one.lineno) for one in node.args), *named]
  if isinstance(node, ast.Dict):
    pairs = zip(node.keys, node.values, strict=True)
    return [
      (None, x, x.lineno) if k is None else (_key(k), x, k.lineno) for k, x in pairs
    ]
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    return [(None, one, one.lineno) for one in (node.left, node.right)]
  return None


def _value(node: ast.expr, names: dict[str, Any]):
  """What an expression of a config file gives, where the file has just had it."""
  try:
    return eval(compile(ast.Expression(node), "config", "eval"), names)
  except Exception:  # of a variable that is gone; the line of its statement will do
    return None
