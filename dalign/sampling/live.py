"""Decoding for those who come at any time: rows join and leave between two chunks.

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
from dalign.types import Key

SHORTEST = 64  # tokens: rooms for prompts and for new tokens are twice, four times ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ask(sampling.Request):
  """A request with a temperature and a `top_p` of its own. `gone` says whether nobody
  waits for it any more: then its row is given up."""

  temperature: float
  top_p: float = 1.0
  gone: Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heard:
  """What has been sampled for one who asked: all tokens so far, the stop token
  included; `finish` is "" while more is to come, then "stop" or "length"."""

  ask: Ask
  tokens: tuple[int, ...]
  finish: str


def run(
  sampler: sampling.Sampler,
  weights: sampling.Weights,
  come: Callable[[bool], Iterable[Ask] | None],
  *,
  key: Key,
  most: int,
  tokens: int,
) -> Iterator[list[Heard]]:
  """What every row has, after each chunk of tokens.

  `come(idle)` brings those who newly ask, and None to end; where it is told that there
  is nothing else to do it may wait. At most `most` rows are decoded together, and on a
  mesh always so many; and, but for one that is alone, no more than caches of `tokens`
  tokens in all have room for. Others wait, in the order in which they came. What a row
  draws depends on key, row id, tokens, temperature and `top_p` alone, as in
  `Sampler.run`. `weights` is `sampler.prepare(params)`.
  """
  rows = _Rows(sampler, weights, key, most, tokens)
  while (new := come(rows.idle())) is not None:
    rows.waiting.extend(new)
    if heard := rows.step():
      yield heard


class _Rows:
  """The slots, who holds them, and who waits for one."""

  def __init__(self, sampler, weights, key, most: int, tokens: int):
    self._sampler, self._weights = sampler, weights
    self._most, self._tokens = most, tokens
    self._none = sampling.Prefixes(kv=(), length_A=np.zeros(1, np.int32))
    self._shape: tuple[int, ...] = (0, 0, 0)
    self._slots: Any = None
    self._held: list[Ask | None] = []
    self.waiting: collections.deque[Ask] = collections.deque()
    self._next: collections.deque[Ask] = collections.deque()  # who have room
    self._lane = sampling.Lane(
      sampler, weights.encode, key, (), None, range(0), self._next
    )

  def idle(self) -> bool:
    return not self.waiting and not self._next and not any(self._held)

  def step(self) -> list[Heard]:
    """A chunk of tokens for every row."""
    self._leave()
    if self.idle():
      return []
    self._make_room()
    slots = self._lane.refill(self._slots, self._held)
    heat_B = np.array([a.temperature if a else 1.0 for a in self._held], np.float32)
    top_p_B = np.array([a.top_p if a else 1.0 for a in self._held], np.float32)
    cut = (top_p_B,) if (top_p_B < 1).any() else ()
    slots = self._sampler.chunk(self._weights.decode, self._none, slots, heat_B, *cut)
    self._slots = slots
    out_BS, count_B, active_B = jax.device_get(
      (slots.out_BS, slots.count_B, slots.active_B)
    )
    heard = [
      Heard(ask=ask, tokens=tuple(out_BS[i, : count_B[i]].tolist()), finish="")
      for i, ask in enumerate(self._held)
      if ask and active_B[i]
    ]
    for _, done in sampling.collect(slots, self._held):
      ask: Any = done.request
      heard.append(Heard(ask=ask, tokens=done.tokens, finish=done.finish))
    return heard

  def _leave(self) -> None:
    """Gives up the rows of those who are gone."""
    for queue in (self.waiting, self._next):
      kept = [ask for ask in queue if not ask.gone()]
      queue.clear()
      queue.extend(kept)
    left = [i for i, ask in enumerate(self._held) if ask and ask.gone()]
    if left:
      for i in left:
        self._held[i] = None
      active_B = self._slots.active_B.at[np.array(left)].set(False)
      self._slots = self._slots.replace(active_B=active_B)

  def _make_room(self) -> None:
    """Lets those in who have room, and has slots with room for all of them."""
    held = [ask for ask in self._held if ask]
    there = [*held, *self._next]
    wanted = self._room(there, held)
    while self.waiting:
      more = self._room([*there, self.waiting[0]], held)
      if there and more[0] * sum(more[1:]) > self._tokens:
        break
      wanted = more
      there.append(self.waiting[0])
      self._next.append(self.waiting.popleft())
    if wanted == self._shape:
      return
    slots = self._sampler.empty(*wanted)
    if held:
      slots = self._sampler.grow(self._slots, slots)
    self._held = [*self._held, *[None] * wanted[0]][: wanted[0]]
    self._lane = dataclasses.replace(self._lane, slots=range(wanted[0]))
    self._shape, self._slots = wanted, slots

  def _room(self, asks: list[Ask], held: list[Ask]) -> tuple[int, ...]:
    """Slots, tokens of a prompt and new tokens that these need: no less than there is,
    where rows are under way."""
    longest = max((len(ask.tokens) - 1 for ask in asks), default=0)
    step = self._sampler.sampler.prompt_step  # what prompts are padded to
    wanted = (
      self._most
      if self._sampler.meshed
      else min(_doubled(len(asks), 1, 4), self._most),
      _doubled(sampling.bucket(longest, step), SHORTEST, 2),
      _doubled(max((ask.max_new for ask in asks), default=0), SHORTEST, 2),
    )
    return tuple(map(max, wanted, self._shape)) if held else wanted


def _doubled(n: int, least: int, times: int) -> int:
  """The first of least, least * times, least * times^2 ... that n is not above."""
  while least < n:
    least *= times
  return least
