"""What the fields of a config may be, in types that its classes are declared by, and
which of them are limits.

A number's bounds and a text's form stand in its annotation, from where the check and
the JSON Schema (`explain.py`) read them.
"""

import dataclasses
import math
import re
import typing
from typing import Annotated, Any, Literal


class Halted(RuntimeError):
  """A limit that the config sets was passed, or a number is not finite: what was done
  before is kept, and nothing of the step."""


def limit() -> Any:
  """A field that says when to stop, how fast or at what price, and that changes nothing
  that is made: no manifest has it."""
  return dataclasses.field(metadata={"limit": True})


class Bounds(typing.NamedTuple):
  """What a number may be, in words and as JSON Schema has it."""

  words: str
  minimum: float = -math.inf
  maximum: float = math.inf
  exclusiveMinimum: float = -math.inf

  def accepts(self, value: float) -> bool:
    """Whether the number is within them."""
    return self.exclusiveMinimum < value and self.minimum <= value <= self.maximum


class Form(typing.NamedTuple):
  """What a text may look like, as a regular expression, and perhaps in words."""

  pattern: str
  said: str = ""

  def accepts(self, value: str) -> bool:
    """Whether all of the text has this form."""
    return bool(re.fullmatch(self.pattern, value))

  @property
  def words(self) -> str:
    """What was wanted, for a message."""
    return self.said or f"a text of the form {self.pattern}"


Count = Annotated[int, Bounds("more than 0", minimum=1)]
Natural = Annotated[int, Bounds("0 or more", minimum=0)]
Positive = Annotated[float, Bounds("more than 0", exclusiveMinimum=0.0)]
NotNegative = Annotated[float, Bounds("0 or more", minimum=0.0)]
Share = Annotated[float, Bounds("a share in [0, 1]", minimum=0.0, maximum=1.0)]
SomeShare = Annotated[
  float, Bounds("a share in (0, 1]", exclusiveMinimum=0.0, maximum=1.0)
]
FUNCTION = "python:.+:[A-Za-z_][A-Za-z0-9_]*"  # `functions.of_file`


def or_function(*names: str) -> Form:
  """One of some names, or a function of the user's."""
  said = f"one of {', '.join(names)}, or python:FILE:FUNCTION"
  return Form("|".join([*names, FUNCTION]), said)


Metadata = Annotated[
  str, Form("none|told|noisy:(0|1|0?\\.[0-9]+)")
]  # `prompt_sets.with_metadata`


def split_annotated(kind) -> tuple[Any, Any]:
  """A field's type, and what Annotated says of it: Bounds, words, or the dataclass of
  a mapping's values; None where it says nothing."""
  if typing.get_origin(kind) is Annotated:
    return typing.get_args(kind)
  return kind, None


def check(kind, value, where: str) -> None:
  """ValueError where a value of the right type is none of those that the field's type
  names, or outside its bounds."""
  kind, constraint = split_annotated(kind)
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    for one in value:
      check(inner[0], one, where)
  elif origin is Literal and value not in inner:
    wanted = f"one of {', '.join(one or repr(one) for one in inner)}"
    said = f"{wanted}; {constraint}" if constraint else wanted
    raise ValueError(f"{where}: wanted {said}, got {value!r:.80}")
  elif isinstance(constraint, (Bounds, Form)) and not constraint.accepts(value):
    raise ValueError(f"{where}: wanted {constraint.words}, got {value!r}")


class Checked:
  """A dataclass whose values are those that the types of its fields allow."""

  def __post_init__(self):
    own: Any = self
    for field in dataclasses.fields(own):
      where = f"{type(self).__name__}.{field.name}"
      check(field.type, getattr(self, field.name), where)


def refuse(config, name, wanted):
  """Raises ValueError: the value of a field, against what was wanted of it."""
  raise ValueError(
    f"{type(config).__name__}.{name}: wanted {wanted}, got {getattr(config, name)!r}"
  )
