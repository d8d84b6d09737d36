"""Packing: rows laid into arrays lose nothing and overlap nothing."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from dalign.text import packing

ROWS = st.lists(st.integers(1, 9), max_size=20)
KNOWN = st.lists(
  st.tuples(st.lists(st.integers(1, 2), max_size=7), st.integers(1, 5)), max_size=20
)


def make_rows(sizes):
  return [([2] * n, [float(i + 1)] * n) for i, n in enumerate(sizes)]


@hypothesis.given(KNOWN, st.integers(1, 4))
@hypothesis.example([([1, 2, 1], 2), ([1, 2, 2], 2), ([1, 2, 1], 3)], 1)
def test_packing_loses_nothing_and_overlaps_nothing(known, multiple):
  """Rows are known tokens and then targets, told apart by their ids."""
  rows = [
    ([*front, *[10 + i] * n], [0.0] * len(front) + [float(i + 1)] * n)
    for i, (front, n) in enumerate(known)
  ]
  packed = packing.pack(rows, length=12, rows_multiple=multiple)
  assert packed.tokens_BT.shape[0] % multiple == 0 < packed.tokens_BT.shape[0]
  assert packed.tokens_BT.shape[1] == 12
  used = np.zeros(packed.tokens_BT.shape, int)
  at_T = np.arange(12)
  for (tokens, wanted), (b, start, size) in zip(rows, packed.where, strict=True):
    last = start + size - 1
    path = np.flatnonzero((at_T <= last) & (last < packed.ends_BT[b]))  # what it sees
    assert packed.tokens_BT[b, path].tolist() == tokens
    assert packed.positions_BT[b, path].tolist() == list(range(len(tokens)))
    assert packed.weight_BT[b, path].tolist() == [0.0, *wanted[1:]]
    own = path[-size:]
    assert own.tolist() == list(range(start, start + size))
    targets = [t for t in range(1, len(tokens)) if wanted[t] > 0]
    assert all(path[t] - 1 == path[t - 1] >= start for t in targets)
    used[b, own] += 1
  assert np.array_equal(used, packed.ends_BT > 0)  # each column by one row
  padding = packed.ends_BT == 0
  assert not packed.weight_BT[padding].any() and not packed.tokens_BT[padding].any()
  assert packed.positions_BT[padding].sum() == 0


@hypothesis.given(ROWS)
def test_packing_takes_the_first_line_with_room(sizes):
  space, want = [], []
  for n in sizes:
    b = next((b for b, room in enumerate(space) if room >= n), len(space))
    if b == len(space):
      space.append(9)
    want.append((b, 9 - space[b], n))
    space[b] -= n
  assert packing.pack(make_rows(sizes), length=9).where == tuple(want)


def test_rows_of_a_line_share_what_is_known_in_front():
  """Two samples of a prompt, and a prompt that begins like it."""
  a = [7, 7, 1, 2, 3], [0, 0, 0, 0, 1]
  b = [7, 7, 1, 2, 4, 5], [0, 0, 0, 0, 1, 1]
  c = [7, 7, 6, 8], [0, 0, 0, 1]
  packed = packing.pack([a, c, b], length=12)
  assert packed.tokens_BT.tolist() == [[7, 7, 6, 8, 1, 2, 3, 2, 4, 5, 0, 0]]
  assert packed.positions_BT.tolist() == [[0, 1, 2, 3, 2, 3, 4, 3, 4, 5, 0, 0]]
  assert packed.ends_BT.tolist() == [[10, 10, 4, 4, 10, 7, 7, 10, 10, 10, 0, 0]]
  assert packed.weight_BT.tolist() == [[0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0]]
  assert packed.where == ((0, 4, 3), (0, 0, 4), (0, 7, 3))


def test_a_row_goes_where_it_adds_least():
  rows = [([i, i, i, 9], [0, 0, 0, 1]) for i in (1, 2, 1)]
  packed = packing.pack(rows, length=6)
  assert [b for b, _, _ in packed.where] == [0, 1, 0]


def test_a_line_with_room_is_found_behind_many_that_a_row_could_only_share_in():
  """Two rows fill a line but for the two tokens that a row adds which shares all it
  can; none shares anything."""
  rows = [([i] * 10, [0] * 9 + [1]) for i in range(200)]
  packed = packing.pack(rows, length=22)
  assert [b for b, _, _ in packed.where] == [i // 2 for i in range(200)]


def test_padded_rows_keep_their_line_and_masks_become_weights():
  packed = packing.pad_rows([([5, 2, 2], [False, True, True]), ([2], [True])], length=4)
  assert packed.tokens_BT.tolist() == [[5, 2, 2, 0], [2, 0, 0, 0]]
  assert packed.ends_BT.tolist() == [[3, 3, 3, 0], [1, 0, 0, 0]]
  assert packed.weight_BT.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
  assert packed.tokens_BT.dtype == packed.ends_BT.dtype == np.int32
  assert packed.weight_BT.dtype == np.float32


@pytest.mark.parametrize(
  "rows, message",
  [
    ([([1] * 5, [1.0] * 5)], "row 0 has 5 tokens, wanted 1 to 4"),
    ([([1], [1.0]), ([], [])], "row 1 has 0 tokens"),
    ([([1, 2], [1.0])], "2 tokens and 1 weights"),
    ([([1], [float("nan")])], "not finite"),
  ],
)
@pytest.mark.parametrize("lay", [packing.pack, packing.pad_rows])
def test_rows_that_do_not_fit_are_refused(lay, rows, message):
  with pytest.raises(ValueError, match=message):
    lay(rows, length=4)
