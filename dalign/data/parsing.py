"""One row of a prompt set as a `Prompt`, checked; errors say where it is.

Knows the names that people give to columns and turns; not files, nor other rows.
"""

from collections.abc import Iterable, Mapping
import contextlib
import difflib
import json
import math
from typing import Any

from dalign.data.readers import Row
from dalign.types import EXPECTED
from dalign.types import KINDS
from dalign.types import Prompt
from dalign.types import Turn

FIELDS = (
  *("prompt", "turns", "category", "expected", "id"),
  *("kind", "split", "answer", "scenario", "clauses"),
)
SPLITS = ("train", "rl", "eval")  # "rl": of RL and distillation alone
# Columns that may hold what is said, in the order in which they are looked for.
_SAID = ("turns", "prompt", "messages", "conversations")
_SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of roles


def check_columns(rows: list[tuple[str, Row]], columns: Mapping[str, str]) -> None:
  """ValueError for a name that is no field, a column that no row has, and one that
  seems to say the split."""
  for name in columns:
    if name not in FIELDS:
      raise ValueError(
        f"columns: {name!r} is no field of a prompt{_nearest(name, FIELDS)}; "
        f"there are {', '.join(FIELDS)}"
      )
  there = {name: None for _, row in rows for name in row}
  if "split" not in there and "split" not in columns:
    for name in there:
      if name.strip().casefold() == "split":
        raise ValueError(
          f"{rows[0][0]}: column {name!r} is not read as split: rename it, or map it"
        )
  for name, column in columns.items() if rows else ():
    if column not in there and not column.startswith("="):
      raise ValueError(
        f"{rows[0][0]}: wanted column {column!r} for {name}{_nearest(column, there)}; "
        f"there are {', '.join(there)}"
      )


def is_empty(value: object) -> bool:
  """Whether a cell is empty: null, not a number, or blank."""
  if isinstance(value, str):
    return not value.strip()
  return value is None or (isinstance(value, float) and math.isnan(value))


def parse_row(
  where: str, row: Row, columns: Mapping[str, str], source: str, *, labelled: bool
) -> tuple[Prompt, bool]:
  """The prompt of a row, and whether it has an answer, which is left out. Its id is ""
  where the row has none; the rest is as of `prompt_sets.load`."""
  values = {name: row.get(name) for name in (*FIELDS, *_SAID)}
  for name, column in columns.items():
    values[name] = column[1:] if column.startswith("=") else row.get(column)
  values = {name: value for name, value in values.items() if not is_empty(value)}
  if labelled and "expected" not in values:
    wanted = f"expected, as one of {', '.join(EXPECTED)}"
    advice = "; --mode=label proposes labels for prompts without"
    raise ValueError(_absent(where, "expected", wanted, row, columns) + advice)
  if values.keys().isdisjoint(_SAID):
    wanted = "a prompt, or turns [{'role': ..., 'content': ...}, ...]"
    raise ValueError(_absent(where, "prompt", wanted, row, columns))
  texts: dict[str, Any] = {"kind": "safety"}
  for name in ("id", "category", "expected", "kind", "split", "answer", "scenario"):
    value = values.get(name, texts.get(name, ""))
    if name in ("id", "answer") and isinstance(value, (int, float)):
      # A column of whole numbers with an empty cell is one of floats.
      whole = isinstance(value, float) and value.is_integer()
      value = str(int(value) if whole else value)
    if not isinstance(value, str):
      said = _named(name, columns)
      raise ValueError(f"{where}: wanted text as {said}, got {value!r:.60}")
    texts[name] = value
  if labelled and not texts["category"]:
    raise ValueError(f"{where}: wanted a category; map a column, or '=benign' for all")
  types = EXPECTED if labelled else ("", *EXPECTED)
  known = {"expected": types, "kind": KINDS, "split": ("", *SPLITS)}
  for name, some in known.items():
    if texts[name] not in some:
      wanted = ", ".join(filter(None, some))
      raise ValueError(
        f"{where}: wanted {_named(name, columns)} as one of {wanted}, "
        f"got {texts[name]!r:.80}"
      )
  if texts["kind"] == "capability" and not texts["answer"]:
    raise ValueError(
      f"{where}: wanted an answer, which a prompt of kind capability is compared with, "
      "found none"
    )
  turns, answered = _turns(where, values, columns)
  clauses: Any = _listed(values.get("clauses", ()))
  listed = isinstance(clauses, (list, tuple))
  if not (listed and all(isinstance(one, str) for one in clauses)):
    raise ValueError(f"{where}: wanted clauses as a list of ids, got {clauses!r:.60}")
  return Prompt(turns=turns, clauses=(*clauses,), source=source, **texts), answered


def _named(name: str, columns: Mapping[str, str]) -> str:
  """A field, and the column that it is read from where that has another name."""
  column = columns.get(name, name)
  return name if column == name else f"{name} (column {column!r})"


def _turns(
  where: str, values: Row, columns: Mapping[str, str]
) -> tuple[tuple[Turn, ...], bool]:
  """The turns of a row, or its prompt as the one turn, and whether an assistant's came
  after these, whatever it holds."""
  # A column that is mapped before one that only has the name.
  names = sorted(_SAID, key=lambda name: name not in columns)
  name = next(name for name in names if name in values)
  column, found = columns.get(name, name), values[name]
  if name == "prompt" and isinstance(found, str):
    found = [{"role": "user", "content": found}]
  found = _listed(found)
  if not isinstance(found, (list, tuple)) or not found:
    raise ValueError(
      f"{where}: {column}: wanted turns [{{'role': ..., 'content': ...}}, ...], "
      f"got {found!r:.80}"
    )
  own = [
    _of_openai(said) if isinstance(said, Mapping) else {"": said} for said in found
  ]
  while len(own) > 1 and own[-1].get("role") == "assistant":
    own.pop()
  turns = []
  for number, said in enumerate(own, 1):
    role, content = said.get("role"), text_of(said.get("content"))
    at = (
      f"{where}: {column}, turn {number} of {len(found)} ({role or 'no role'}): wanted"
    )
    role = "system" if role == "developer" else role  # another name for it
    if role not in ("system", "user", "assistant"):
      raise ValueError(
        f"{at} a role of system, user or assistant, got {dict(said)!r:.80}"
      )
    if uses_tools(said):
      raise ValueError(f"{at} text alone, got a call of a tool")
    if content is None or is_empty(content):
      raise ValueError(f"{at} text as content, got {said.get('content')!r:.80}")
    turns.append(Turn(role=role, content=content))
  if role != "user":
    raise ValueError(f"{at} a user's turn as the last: take out what follows that")
  return tuple(turns), len(own) < len(found)


def _listed(value: Any) -> Any:
  """A list that a source could not hold as one: JSON in a cell of text, or a list for
  each name, as Arrow has sequences of objects."""
  if isinstance(value, str) and value.lstrip().startswith("["):
    with contextlib.suppress(ValueError, RecursionError):
      return json.loads(value)
  if isinstance(value, Mapping):
    parts = [*value.values()]
    if all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
      return [dict(zip(value, own, strict=True)) for own in zip(*parts, strict=True)]
  return value


def _of_openai(message: Mapping) -> Mapping:
  """A message with OpenAI's names where it has ShareGPT's."""
  if message.get("role") is not None or "from" not in message:
    return message
  role = message["from"]
  role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
  return {"role": role, "content": message.get("value")}


def uses_tools(message: Mapping) -> bool:
  """Whether a message calls a tool or says what one gave: nothing here knows tools."""
  calls = message.get("tool_calls") or message.get("function_call")
  return bool(calls) or message.get("role") in ("tool", "function")


def text_of(content: object) -> str | None:
  """The text of a turn's content, in one piece or in parts that are all text; None of
  anything else."""
  if not isinstance(content, list):
    return content if isinstance(content, str) else None
  texts: list[Any] = [part.get("text") for part in content if isinstance(part, Mapping)]
  kinds = {part.get("type") for part in content if isinstance(part, Mapping)}
  all_text = kinds == {"text"} and len(texts) == len(content)
  return (
    "\n".join(texts) if all_text and all(isinstance(t, str) for t in texts) else None
  )


def _absent(
  where: str, name: str, wanted: str, row: Row, columns: Mapping[str, str]
) -> str:
  """What is said of a row without a field: that its cell is empty, or how the column
  that has it can be named."""
  if columns.get(name, name) in row:
    return f"{where}: wanted {wanted}, found an empty cell"
  return (
    f"{where}: wanted {wanted}, found none{_nearest(name, row)}; the row has "
    f"{[*row]!r:.200}, of which --config.data.columns.{name}=COLUMN maps one"
  )


def _nearest(name: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" (did you mean {close[0]!r}?)" if close else ""
