"""Rows laid into [B, T] arrays, with masks and weights.

A mask or a weight is born here beside its tokens; nothing is ever read off a token's
value, since padding often shares its id with the stop token.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

Row = tuple[Sequence[int], Sequence[float]]  # tokens, the weight of each as a target


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
  """Rows laid into [B, T] arrays; a front that rows of a line share is there once.

  A line is a tree written depth first. ends_BT is, for each token, the column behind
  the last token that follows it in a row: it is seen from the columns before that. In
  padding it is 0, where all else is 0 too: 0 is a valid id and says nothing.
  positions_BT counts from the start of each row. weight_BT is the loss weight of each
  token as a target; it is 0 for the first token of a row, which nothing predicts.
  where[i] = (b, start, length) is the place of what the i-th input row does not share
  with one to its left: all of it, or its last `length` tokens, and always its first
  target and the token before it.
  """

  tokens_BT: np.ndarray
  ends_BT: np.ndarray
  positions_BT: np.ndarray
  weight_BT: np.ndarray
  where: tuple[tuple[int, int, int], ...]

  @property
  def lines(self) -> dict[str, np.ndarray]:
    """What a model reads: tokens_BT, positions_BT and ends_BT."""
    return {
      "tokens_BT": self.tokens_BT,
      "positions_BT": self.positions_BT,
      "ends_BT": self.ends_BT,
    }


def pack(rows: Sequence[Row], *, length: int, rows_multiple: int = 1) -> Packed:
  """Packs rows, in input order, into lines of `length` tokens.

  A row is (tokens, weights or mask). It goes where it adds the fewest tokens, to the
  first such line: known tokens in front, before the one that predicts its first target,
  may be those of another row (a chat's system turn, the prompt of several samples). The
  number of lines is rounded up to `rows_multiple`, with lines of padding. Nothing is
  cut: raises ValueError for a row that is longer than a line, and for empty or uneven
  rows.
  """
  _check_rows(rows, length)
  fronts = [_shareable_prefix(row) for row in rows]
  lines: list[list[int]] = []  # the rows of each
  room = np.full(len(rows), length)
  for i, (tokens, _) in enumerate(rows):
    best = len(tokens), len(lines)
    hopeful = np.flatnonzero(room[: len(lines)] >= len(tokens) - len(fronts[i]))
    sure = np.flatnonzero(room[: len(lines)] >= len(tokens))
    for b in [*hopeful[:_LOOK], *sure[:1]]:
      more = len(tokens) - max(common_prefix(fronts[i], fronts[j]) for j in lines[b])
      if room[b] >= more:
        best = min(best, (more, int(b)))
    more, b = best
    if b == len(lines):
      lines.append([])
    lines[b].append(i)
    room[b] -= more
  count = -(-max(len(lines), 1) // rows_multiple) * rows_multiple
  return _write_lines(rows, fronts, lines + [[]] * (count - len(lines)), length)


def pad_rows(rows: Sequence[Row], *, length: int) -> Packed:
  """As `pack`, with one row a line: line b is the b-th row."""
  _check_rows(rows, length)
  return _write_lines(rows, [()] * len(rows), [[b] for b in range(len(rows))], length)


_LOOK = 64  # lines that a row is tried in, beside the first with room for all of it


def _shareable_prefix(row: Row) -> tuple[int, ...]:
  """The tokens of a row that another may share: those before the token that predicts
  the first target."""
  tokens, weights = row
  first = next((t for t, weight in enumerate(weights) if weight > 0), len(tokens))
  return tuple(tokens[: max(first - 1, 0)])


def common_prefix(a: Sequence, b: Sequence) -> int:
  """How many first tokens, or characters, two sequences share."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((t for t, (x, y) in pairs if x != y), min(len(a), len(b)))


def _check_rows(rows: Sequence[Row], length: int) -> None:
  for i, (tokens, weights) in enumerate(rows):
    if not 0 < len(tokens) <= length:
      raise ValueError(
        f"row {i} has {len(tokens)} tokens, wanted 1 to {length}; drop and count "
        "over-long rows first, cutting them would train on broken text"
      )
    if len(weights) != len(tokens):
      raise ValueError(f"row {i} has {len(tokens)} tokens and {len(weights)} weights")
    if not np.all(np.isfinite(np.asarray(weights, np.float32))):
      raise ValueError(f"row {i} has a weight that is not finite")


def _write_lines(
  rows: Sequence[Row], fronts, lines: list[list[int]], length: int
) -> Packed:
  """Writes the rows of each line as a tree: sorted, a row shares with its neighbour
  what it shares with any."""
  shape = len(lines), length
  tokens_BT, ends_BT, positions_BT = (np.zeros(shape, np.int32) for _ in range(3))
  weight_BT = np.zeros(shape, np.float32)
  where = [(0, 0, 0)] * len(rows)
  for b, line in enumerate(lines):
    start, before, path = 0, (), np.zeros(0, np.int64)
    for i in sorted(line, key=lambda i: fronts[i]):
      tokens, weights = rows[i]
      shared = common_prefix(before, fronts[i])
      end = start + len(tokens) - shared
      path = np.concatenate([path[:shared], np.arange(start, end)])
      where[i] = b, start, end - start
      own = b, slice(start, end)
      tokens_BT[own] = tokens[shared:]
      positions_BT[own] = np.arange(shared, len(tokens))
      weight_BT[own] = weights[shared:]
      ends_BT[b, path] = end
      if not shared:
        weight_BT[b, start] = 0.0
      before, start = fronts[i], end
  return Packed(
    tokens_BT=tokens_BT,
    ends_BT=ends_BT,
    positions_BT=positions_BT,
    weight_BT=weight_BT,
    where=tuple(where),
  )


def batches(n: int, size: int):
  """Slices that cut n things into runs of `size`."""
  return [slice(at, min(at + size, n)) for at in range(0, n, size)]
