"""Continuous batching: requests join and leave the decode loop between two chunks.

`Sampler.run` knows the shapes of what is asked before it begins. Here the slots grow
when more rows come than there are slots, or longer ones, and shrink when all have left;
growing moves caches and changes no row. Rows share no prefix.

Knows tokens; not text, chats, or who asks.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import dataclasses
from typing import Any

import jax
import numpy as np

from dalign.sampling import sampler as sampling
from dalign.sampling.programs import Weights
from dalign.sampling.programs import bucket_size
from dalign.sampling.slots import Prefixes
from dalign.types import Key

MIN_ROOM = 64  # tokens: rooms for prompts and for new tokens are twice, four times ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LiveRequest(sampling.Request):
  """A request with a temperature and a `top_p` of its own. `cancelled` says whether
  nobody waits for it any more: then its row is given up."""

  temperature: float
  top_p: float = 1.0
  cancelled: Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartialCompletion:
  """The tokens sampled for a request so far, the stop token included; `finish` is ""
  while more is to come, then "stop" or "length"."""

  ask: LiveRequest
  tokens: tuple[int, ...]
  finish: str


def run(
  sampler: sampling.Sampler,
  weights: Weights,
  next_requests: Callable[[bool], Iterable[LiveRequest] | None],
  *,
  key: Key,
  max_rows: int,
  tokens: int,
) -> Iterator[list[PartialCompletion]]:
  """What every row has, after each chunk of tokens.

  `next_requests(idle)` brings those who newly ask, and None to end; where it is told
  that there is nothing else to do it may wait. At most `max_rows` rows are decoded
  together, and on a mesh always so many; and, but for one that is alone, no more than
  caches of `tokens` tokens in all have room for. Others wait, in the order in which
  they came. What a row draws depends on key, row id, tokens, temperature and `top_p`
  alone, as in `Sampler.run`. `weights` is `sampler.prepare(params)`.
  """
  rows = _LiveRows(sampler, weights, key, max_rows, tokens)
  while (new := next_requests(rows.idle())) is not None:
    rows.waiting.extend(new)
    if partials := rows.step():
      yield partials


class _LiveRows:
  """The decode slots, the requests that occupy them, and the queue of the others."""

  def __init__(self, sampler, weights, key, max_rows: int, tokens: int):
    self._sampler, self._weights = sampler, weights
    self._most, self._tokens = max_rows, tokens
    self._no_prefixes = Prefixes(kv=(), length_A=np.zeros(1, np.int32))
    self._shape: tuple[int, ...] = (0, 0, 0)
    self._slots: Any = None
    self._slot_requests: list[LiveRequest | None] = []
    self.waiting: collections.deque[LiveRequest] = collections.deque()
    self._admitted: collections.deque[LiveRequest] = collections.deque()
    self._lane = sampling.Lane(
      sampler, weights.encode, key, (), None, range(0), self._admitted
    )

  def idle(self) -> bool:
    return not self.waiting and not self._admitted and not any(self._slot_requests)

  def step(self) -> list[PartialCompletion]:
    """A chunk of tokens for every row."""
    self._drop_cancelled()
    if self.idle():
      return []
    self._make_room()
    slots = self._lane.refill(self._slots, self._slot_requests)
    temperature_B = np.array(
      [a.temperature if a else 1.0 for a in self._slot_requests], np.float32
    )
    top_p_B = np.array([a.top_p if a else 1.0 for a in self._slot_requests], np.float32)
    cut = (top_p_B,) if (top_p_B < 1).any() else ()
    slots = self._sampler.chunk(
      self._weights.decode, self._no_prefixes, slots, temperature_B, *cut
    )
    self._slots = slots
    out_BS, count_B, active_B = jax.device_get(
      (slots.out_BS, slots.count_B, slots.active_B)
    )
    partials = [
      PartialCompletion(
        ask=ask, tokens=tuple(out_BS[i, : count_B[i]].tolist()), finish=""
      )
      for i, ask in enumerate(self._slot_requests)
      if ask and active_B[i]
    ]
    for _, done in sampling.collect_finished(slots, self._slot_requests):
      ask: Any = done.request
      partials.append(
        PartialCompletion(ask=ask, tokens=done.tokens, finish=done.finish)
      )
    return partials

  def _drop_cancelled(self) -> None:
    """Drops the rows and queue entries of cancelled requests."""
    for queue in (self.waiting, self._admitted):
      kept = [ask for ask in queue if not ask.cancelled()]
      queue.clear()
      queue.extend(kept)
    left = [i for i, ask in enumerate(self._slot_requests) if ask and ask.cancelled()]
    if left:
      for i in left:
        self._slot_requests[i] = None
      active_B = self._slots.active_B.at[np.array(left)].set(False)
      self._slots = self._slots.replace(active_B=active_B)

  def _make_room(self) -> None:
    """Admits waiting requests that fit, and resizes the slots to hold all of them."""
    running = [ask for ask in self._slot_requests if ask]
    admitted = [*running, *self._admitted]
    wanted = self._room(admitted, running)
    while self.waiting:
      wanted_with_next = self._room([*admitted, self.waiting[0]], running)
      if admitted and wanted_with_next[0] * sum(wanted_with_next[1:]) > self._tokens:
        break
      wanted = wanted_with_next
      admitted.append(self.waiting[0])
      self._admitted.append(self.waiting.popleft())
    if wanted == self._shape:
      return
    slots = self._sampler.empty(*wanted)
    if running:
      slots = self._sampler.grow(self._slots, slots)
    self._slot_requests = [*self._slot_requests, *[None] * wanted[0]][: wanted[0]]
    self._lane = dataclasses.replace(self._lane, slots=range(wanted[0]))
    self._shape, self._slots = wanted, slots

  def _room(
    self, asks: list[LiveRequest], running: list[LiveRequest]
  ) -> tuple[int, ...]:
    """Slots, tokens of a prompt and new tokens that these need: no less than there is,
    where rows are under way."""
    longest = max((len(ask.tokens) - 1 for ask in asks), default=0)
    step = self._sampler.sampler.prompt_step  # what prompts are padded to
    wanted = (
      self._most
      if self._sampler.uses_mesh
      else min(_round_up_geometric(len(asks), 1, 4), self._most),
      _round_up_geometric(bucket_size(longest, step), MIN_ROOM, 2),
      _round_up_geometric(max((ask.max_new for ask in asks), default=0), MIN_ROOM, 2),
    )
    return tuple(map(max, wanted, self._shape)) if running else wanted


def _round_up_geometric(n: int, least: int, times: int) -> int:
  """The first of least, least * times, least * times^2 ... that is at least n."""
  while least < n:
    least *= times
  return least
