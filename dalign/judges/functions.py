"""A judge of the user's own: a Python function from replies to scores.

In a config it is named "python:FILE:FUNCTION". What it gives is checked row by row, and
what is wrong with it, or in it, is one ValueError. Of several processes the first asks
it. Runs the code of that file, as the one who wrote it would.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import difflib
import functools
import numbers
import pathlib
import sys
import traceback
import types
from typing import Any

import numpy as np

from dalign.judges import judge
from dalign.judges import labels
from dalign.runs import distributed
from dalign.types import Prompt
from dalign.types import Spec
from dalign.types import Turn
from dalign.types import Verdict

MARK = "python:"
SILENT = "the function gave no score"
UNLABELLED = "the function gave no label"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Conversation:
  turns: tuple[Turn, ...]  # up to the user's last

  @property
  def prompt(self) -> str:
    """The last turn, the user's."""
    return self.turns[-1].content


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply(_Conversation):
  """What a function judges: an answer alone, as in RL. It has no field that could carry
  the thought.

  `policy` is the whole text of the policy of its `category`, `expected` the ideal
  response type where the config's metadata tells it, else "".
  """

  category: str
  policy: str
  expected: str
  answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThoughtfulReply(Reply):
  """What a function judges where the filter asks: thought and answer."""

  thought: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unlabelled(_Conversation):
  """What a function proposes a label for, with the whole text of each policy, by its
  id."""

  policies: Mapping[str, str]


# A score in [0, 1], None for no verdict, or a pair of either and why.
Said = Verdict | float | None | tuple[float | None, str]
Function = Callable[[list[Reply]], Sequence[Said]]


def of_file(source: str, policy: Callable[[str], str]) -> judge.Judge:
  """The judge "python:FILE:FUNCTION"; `policy` gives the text of a category.

  ValueError names what there is no file or no function for, or what ends in an error.
  """
  path, name = place(source)
  return of_function(_load(path, name), policy, f"{path}: {name}", path)


def place(source: str) -> tuple[pathlib.Path, str]:
  """The file and the name in "python:FILE:FUNCTION"; ValueError where there is no such
  file."""
  file, _, name = source.removeprefix(MARK).rpartition(":")
  path = pathlib.Path(file).expanduser()
  if not path.is_file():
    raise ValueError(f"{source}: wanted a file with a Python function, found none")
  return path, name


def of_function(
  function: Function,
  policy: Callable[[str], str],
  name: str = "",
  path: pathlib.Path | None = None,
) -> judge.Judge:
  """A function as judge of either question; `name` stands in errors, and the line of
  `path` that one comes from. Known answers are compared and not asked about."""
  name = name or getattr(function, "__qualname__", type(function).__name__)
  policy = functools.cache(policy)

  def told(question: judge.Question) -> Reply:
    prompt = question.prompt
    known = ("turns", "category", "expected")
    shown: dict[str, Any] = {name: getattr(prompt, name) for name in known}
    shown |= {"policy": policy(prompt.category), "answer": question.answer}
    if isinstance(question, judge.FilterQuestion):
      return ThoughtfulReply(thought=question.thought, **shown)
    return Reply(**shown)

  def ask(questions: Sequence[judge.Question]) -> list[Verdict]:
    ids = [q.prompt.id for q in questions]
    rows = _once(function, [*map(told, questions)], ids, name, path, _row)
    return [Verdict(score=score, reason=why) for score, why in rows]

  return judge.Judge(judge.beside_known(ask), deterministic=False)


def labeller(
  source: str, spec: Spec, policies: Mapping[str, str]
) -> Callable[[Sequence[Prompt]], list[labels.Vote]]:
  """The function "python:FILE:FUNCTION" that proposes labels of prompts: it is told of
  each as Unlabelled, and gives for each {"category", "expected", "clauses"}, the last
  of which may be missing, None for no label, or a pair of either and why. Errors as of
  `of_file`."""
  path, name = place(source)
  function = _load(path, name)

  def read(i: int, said: Any) -> dict:
    label, why = said if isinstance(said, tuple) and len(said) == 2 else (said, "")
    if label is None:
      return dataclasses.asdict(labels.Vote(reason=str(why) or UNLABELLED))
    if not isinstance(label, Mapping):
      wanted = "a mapping with category and expected, None, or a pair of one and why"
      raise _Wrong(f"wanted {wanted}, got {said!r:.80}", i)
    try:
      return dataclasses.asdict(labels.checked(label, spec))
    except ValueError as error:
      raise _Wrong(str(error), i) from None

  def ask(prompts: Sequence[Prompt]) -> list[labels.Vote]:
    told = [Unlabelled(turns=prompt.turns, policies=policies) for prompt in prompts]
    ids = [prompt.id for prompt in prompts]
    rows = _once(function, told, ids, f"{path}: {name}", path, read)
    return [labels.Vote(**row | {"clauses": tuple(row["clauses"])}) for row in rows]

  return ask


def _once(
  function: Callable,
  told: list,
  ids: Sequence[str],
  where: str,
  path: pathlib.Path | None,
  read: Callable[[int, Any], Any],
) -> list:
  """What `read` makes of what a function gives of each that it is told, asked by the
  first of several processes; ValueError, after `where`, with the row and its id."""
  wrong, rows = "", list()
  if distributed.is_first_process() and told:
    try:
      rows = [read(i, said) for i, said in enumerate(_asked(function, told, path))]
    except _Wrong as error:
      at, row = error.row, ""
      if at is not None:
        row = f"row {at + 1} of {len(told)}, prompt {ids[at]!r}: "
      wrong = f"{where}: {row}{error}"
  wrong, rows = distributed.broadcast([wrong, rows])
  if wrong:
    raise ValueError(wrong)
  return rows


class _Wrong(Exception):
  """What is wrong with what a function gave, and of which row, counted from 0."""

  def __init__(self, said: str, row: int | None = None):
    super().__init__(said)
    self.row = row


def _asked(function: Callable, replies: list, path: pathlib.Path | None) -> list:
  try:
    given: Any = function([*replies])
    several = isinstance(given, Iterable) and not isinstance(
      given, (str, bytes, Mapping)
    )
    found = [*given] if several else None
  except (Exception, SystemExit) as error:
    raise _Wrong(_told(error, path), _culprit(function, replies)) from error
  if found is None:
    raise _Wrong(f"wanted a list of verdicts, got {given!r:.80}")
  if len(found) != len(replies):
    raise _Wrong(f"wanted a verdict each of {len(replies)} replies, got {len(found)}")
  return found


def _culprit(function: Callable, replies: list) -> int | None:
  """The first reply that a function cannot judge even alone, if there is one."""
  for i, reply in enumerate(replies):
    try:
      [*function([reply])]
    except (Exception, SystemExit):
      return i
  return None


def _row(i: int, said: Any) -> tuple[float | None, str]:
  """A checked verdict: a score, or None, and why."""
  score, why = said, ""
  if isinstance(said, Verdict):
    score, why = said.score, said.reason
  elif isinstance(said, (tuple, list)) and len(said) == 2:
    score, why = said
  scored = isinstance(score, (numbers.Real, np.bool_)) and 0 <= float(score) <= 1
  if not isinstance(why, str) or not (scored or score is None):  # nor is NaN a score
    wanted = "a score in [0, 1], or None, alone or with a reason"
    raise _Wrong(f"wanted {wanted}, got {said!r:.80}", i)
  return (None, why or SILENT) if score is None else (float(score), why)


def _told(error: BaseException, path: pathlib.Path | None) -> str:
  """An error of the user's code in one line, with the last of its own lines."""
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame.lineno for frame in frames if path and frame.filename == str(path)]
  line = error.lineno if isinstance(error, SyntaxError) else (own or [None])[-1]
  said = " ".join(f"{type(error).__name__}: {error}".split())
  if isinstance(error, AttributeError) and "'thought'" in said:
    said += " (an answer alone is judged, as RL does: its reply has no thought)"
  if isinstance(error, AttributeError) and "'Unlabelled'" in said:
    said += " (a prompt is to be labelled: name a function for that as filter.judge)"
  return f"line {line}: {said}" if line else said


def _load(path: pathlib.Path, name: str) -> Callable:
  """The function of that name in a file."""
  made = types.ModuleType(f"dalign_user_{path.stem}")
  made.__file__ = str(path)
  sys.modules[made.__name__] = made  # where dataclasses of the file look for it
  try:
    exec(compile(path.read_bytes(), path, "exec"), vars(made))
  except (Exception, SystemExit) as error:
    raise ValueError(f"{path}: {_told(error, path)}") from error
  found = getattr(made, name, None)
  if not callable(found):
    own = [n for n, x in vars(made).items() if callable(x) and not n.startswith("_")]
    near = difflib.get_close_matches(name, own, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{path}: wanted a function {name}, found none{hint}")
  return found
