"""Progress on stderr: lines and bars, of the first process alone."""

import collections
from collections.abc import Iterable
import sys

import tqdm

from dalign.runs import distributed

tqdm.tqdm.get_lock()  # made now: a signal that stops the run may come while it is made


def say(line: str) -> None:
  """One line of progress."""
  if distributed.is_first_process():
    tqdm.tqdm.write(f"dalign: {line}", file=sys.stderr)


def bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm.tqdm:
  """A progress bar with rate and time left; in a file it is seldom written anew."""
  return tqdm.tqdm(
    total=total,
    desc=what,
    unit=unit,
    initial=initial,
    dynamic_ncols=True,
    smoothing=0.1,
    mininterval=0.1 if sys.stderr.isatty() else 5.0,
    disable=not distributed.is_first_process(),
  )


def percent(mean: float | None) -> str:
  """A mean for a line of text."""
  return "   -" if mean is None else f"{mean:5.1%}"


def top_reasons(reasons: Iterable[str], most: int = 3) -> str:
  """The commonest of some reasons with their counts, and how many have others."""
  found = collections.Counter(reasons)
  top = found.most_common(most)
  said = [f"{n} x {why}" for why, n in top]
  left = found.total() - sum(n for _, n in top)
  return "; ".join([*said, *([f"{left} for other reasons"] if left else [])])
