"""Decoding: token prompts in, completions out. Knows tokens; not text, specs, rewards.

Prompts come in groups. What the rows of a group share in front (a spec, a system turn)
is encoded once and read in place by all of them. Samples of one prompt fork one
prefill. Rows live in slots of a fixed batch, cut into lanes that each serve one group:
a finished row leaves, a waiting one enters, and no shape ever changes.
"""

import collections
import dataclasses
import itertools
from typing import Any, Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalign.config.fields import Halted
from dalign.config.model import SamplerConfig
from dalign.models import ops
from dalign.models import transformer
from dalign.sampling.programs import Programs
from dalign.sampling.programs import Weights
from dalign.sampling.programs import bucket_size
from dalign.sampling.slots import Prefixes
from dalign.sampling.slots import Slots
from dalign.text import packing
from dalign.types import Key
from dalign.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt to continue: its tokens, and the id that alone decides its randomness:
  text, numbers, or a tuple of them, that no other request of a run has."""

  tokens: tuple[int, ...]
  row_id: Any
  max_new: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What was sampled after a prompt: ids (the stop token included) and, in nats, the
  log-probability of each under the very distribution it was drawn from."""

  request: Request
  tokens: tuple[int, ...]
  logp: tuple[float, ...]
  finish: str  # "stop" or "length"


def common_prefix(rows: list[tuple[int, ...]]) -> int:
  """How many first tokens all rows share; each keeps at least one of its own."""
  low, high = min(rows), max(rows)
  return min(packing.common_prefix(low, high), min(map(len, rows)) - 1)


def default_shapes(rows: int, groups: int) -> SamplerConfig:
  """Shapes that suit so many rows in so many groups: at the most 64 are decoded
  together, in 8 lanes."""
  slots, lanes = (
    min(most, 1 << (max(n, 1) - 1).bit_length())
    for most, n in ((64, rows), (8, groups))
  )
  return SamplerConfig(
    slots=slots,
    lanes=min(lanes, slots),
    chunk=8,
    prefill=min(8, slots),
    prompt_room=128,
    prompt_step=16,
    prefix_step=64,
  )


class Sampler(Programs):
  """Completes requests; weights come with each call."""

  def run(
    self,
    weights: Weights,
    groups: Iterable[Sequence[Request]],
    *,
    key: Key,
    temperature: float,
    top_p: float = 1.0,
    prefix_room: int,
    prompt_room: int,
    max_new: int,
    more: Callable[[Completion], Iterable[Request]] = lambda _: (),
  ) -> Iterator[Completion]:
    """Completes the requests of all groups, in the order in which they finish; a group
    is asked for when there are slots for it.

    `weights` is `prepare(params)`. `prefix_room` (tokens that the rows of a group share
    in front, with 0 they share none), `prompt_room` (tokens of a row beyond those) and
    `max_new` only set shapes: keep them constant to reuse compiled programs.
    `more(completion)` may ask for further rows of the same group, which must begin as
    the others do. What a row draws depends on the key, its row id and its tokens alone.

    Raises ValueError when a request does not fit the given room, and Halted where
    log-probabilities are not finite.
    """
    pending = (group for group in groups if group)
    first = [*itertools.islice(pending, 2)]
    pending = itertools.chain(first, pending)
    A = self.sampler.lanes if len(first) > 1 else 1
    s = self.sampler
    P = -(-prefix_room // s.prefix_step) * s.prefix_step
    make_lanes, set_prefix = self.lanes[A]
    prefixes = make_lanes(P) if P else Prefixes(kv=(), length_A=np.zeros(A, np.int32))
    slots = self.empty(s.slots, bucket_size(prompt_room, s.prompt_step), max_new)
    slot_requests: list[Request | None] = [None] * s.slots
    lanes: list[Lane | None] = [None] * A
    heat = jnp.float32(temperature), None if top_p >= 1 else jnp.float32(top_p)

    def next_lane(lane_slots: range) -> Lane | None:
      """A lane for the next group; when there is none, with half of another's queue."""
      if group := next(pending, None):
        # Long prompts first, like ones together: a batch is as wide as its longest.
        group = sorted(group, key=lambda r: (-len(r.tokens), r.tokens))
        head, prefix = (), None
        if P:
          head = group[0].tokens[: min(common_prefix([r.tokens for r in group]), P)]
          tokens_P = np.zeros(P, np.int32)
          tokens_P[: len(head)] = head
          prefix = self.encode_prefix(weights.encode, tokens_P, jnp.int32(len(head)))
        return Lane(
          self, weights.encode, key, head, prefix, lane_slots, collections.deque(group)
        )
      queued = [lane for lane in lanes if lane is not None and len(lane.waiting) > 1]
      if not queued:
        return None
      return max(queued, key=lambda lane: len(lane.waiting)).split(lane_slots)

    while True:
      for a, lane in enumerate(lanes):
        if lane is None or lane.idle(slot_requests):
          new = next_lane(range(a * s.slots // A, (a + 1) * s.slots // A))
          if new is not None:
            lane = lanes[a] = new
            if new.prefix is not None:
              prefixes = set_prefix(
                prefixes, new.prefix.kv, new.prefix.length, jnp.int32(a)
              )
        if lane is not None:
          slots = lane.refill(slots, slot_requests)
      if not any(slot_requests):
        return
      slots = self.chunk(weights.decode, prefixes, slots, *heat)
      for slot, done in collect_finished(slots, slot_requests):
        if not np.isfinite(done.logp).all():  # its tokens say nothing
          raise Halted(
            f"sampling: log-probabilities after {done.request.row_id!r:.80} are not "
            "finite; find out which of the model's parameters are not"
          )
        lane = lanes[slot * A // s.slots]
        if lane is not None:  # as the row was one of its own
          lane.add(more(done), slot, done.request, slot_requests)
        yield done

  def complete(
    self,
    weights: Weights,
    groups: Iterable[list[Request]],
    *,
    prefix_room: int | None = None,
    **how: Any,
  ) -> Iterator[Completion]:
    """`run` with shapes that fit: the rows of a group share what they have in common,
    or of it the first `prefix_room` tokens, and there is room for the longest prompt,
    at the least what the config has."""
    groups = [group for group in groups if group]
    rows = [[request.tokens for request in group] for group in groups]
    if prefix_room is None:
      # A row alone shares all of itself, which lies in a lane and not in every slot.
      shared = [own for own in rows if len(own) > 1] or rows
      prefix_room = max((self.sampler.prefix_step, *map(common_prefix, shared)))
    prompt_room = self.sampler.prompt_room
    for own in rows:
      longest = max(map(len, own)) - min(common_prefix(own), prefix_room) - 1
      prompt_room = max(prompt_room, longest)
    return self.run(
      weights, groups, prefix_room=prefix_room, prompt_room=prompt_room, **how
    )


@dataclasses.dataclass
class Lane:
  """Requests of one group on their way through some of the slots."""

  programs: Programs
  params: PyTree
  key: Key
  head: tuple[int, ...]  # the tokens that all share,
  prefix: transformer.Prefix | None  # and what they encode to
  slots: range
  waiting: collections.deque
  ready: collections.deque = dataclasses.field(default_factory=collections.deque)
  reusing_prefill: list = dataclasses.field(default_factory=list)

  # `ready` has (request, kv, row of kv) of what is prefilled; `reusing_prefill` (slot,
  # request) of rows whose prompt lies in their slot already.

  def split(self, slots: range) -> "Lane":
    """A lane of the same group in other slots, with half of what waits here."""
    half = [self.waiting.pop() for _ in range(len(self.waiting) // 2)]
    waiting = collections.deque(reversed(half))
    return dataclasses.replace(
      self, slots=slots, waiting=waiting, ready=collections.deque(), reusing_prefill=[]
    )

  def add(
    self, requests: Iterable[Request], slot: int, done: Request, slot_requests: list
  ) -> None:
    """Takes further requests; one for the prompt that `slot` has just `done` goes
    on there, without a second prefill."""
    for request in requests:
      if slot_requests[slot] is None and request.tokens == done.tokens:
        slot_requests[slot] = request
        self.reusing_prefill.append((slot, request))
      else:
        self.waiting.append(request)

  def idle(self, slot_requests: list) -> bool:
    """Whether the group is through."""
    return (
      not self.waiting
      and not self.ready
      and not any(slot_requests[i] for i in self.slots)
    )

  def _prefill(self, room: int):
    """Encodes the next few distinct prompts; their last token is left to decoding."""
    s, shared = self.programs.sampler, len(self.head)
    group: list[Request] = []
    rows: dict[tuple[int, ...], int] = {}
    while self.waiting and (len(rows) < s.prefill or self.waiting[0].tokens in rows):
      request = self.waiting.popleft()
      if request.tokens[:shared] != self.head:
        raise ValueError(
          f"request {request.row_id} does not begin with the {shared} tokens that the "
          "first requests of its group share"
        )
      rows.setdefault(request.tokens, len(rows))
      group.append(request)
    own = [tokens[shared:-1] for tokens in rows]
    longest = max(map(len, own))
    if longest > room:
      id = next(r.row_id for r in group if len(r.tokens) - shared - 1 == longest)
      raise ValueError(
        f"request {id!r:.80} has {longest} tokens beyond the shared prefix, more than "
        f"the {room} there is room for; raise sampler.prompt_room"
      )
    T = bucket_size(longest, s.prompt_step)
    tokens_BT = np.zeros((s.prefill, T), np.int32)
    for i, row in enumerate(own):
      tokens_BT[i, : len(row)] = row
    kv = self.programs.encode_rows(self.params, self.prefix, tokens_BT)
    self.ready.extend((request, kv, rows[request.tokens]) for request in group)

  def refill(self, slots: Slots, slot_requests: list) -> Slots:
    """Fills this lane's free slots with waiting rows, a prefilled batch at a time."""
    free = [i for i in self.slots if slot_requests[i] is None]
    starting, self.reusing_prefill = self.reusing_prefill, []
    while free and (self.ready or self.waiting):
      if not self.ready:
        self._prefill(slots.prompt[0][1].shape[2])
      kv = self.ready[0][1]
      src_R, slot_R = np.zeros((2, len(slot_requests)), np.int32)
      count = 0
      while free and self.ready and self.ready[0][1] is kv:
        request, _, src_R[count] = self.ready.popleft()
        slot = slot_R[count] = free.pop(0)
        slot_requests[slot] = request
        starting.append((slot, request))
        count += 1
      slots = self.programs.insert(slots, kv, src_R, slot_R, jnp.int32(count))
    return self._start(slots, starting) if starting else slots

  def _start(self, slots: Slots, starting) -> Slots:
    B, S = slots.live_BS.shape
    names = ("prompt_len_B", "token_B", "position_B", "limit_B")
    ints = {name: np.zeros(B, np.int32) for name in names}
    starts_B, words_B2 = np.zeros(B, bool), np.zeros((B, 2), np.uint32)
    for slot, request in starting:
      if not 0 < request.max_new <= S:
        raise ValueError(f"max_new of a request is 1..{S}, got {request.max_new}")
      prompt = len(request.tokens)
      self.programs.cfg.check_length(
        prompt + request.max_new,
        f"{request.row_id!r:.80}: a prompt of {prompt} and {request.max_new} to write",
      )
      starts_B[slot], words_B2[slot] = True, ops.row_words(request.row_id)
      ints["prompt_len_B"][slot] = len(request.tokens) - 1 - len(self.head)
      ints["position_B"][slot] = len(request.tokens) - 1
      ints["token_B"][slot] = request.tokens[-1]
      ints["limit_B"][slot] = request.max_new
    fields = ints | {"key_B": ops.row_keys(self.key, words_B2)}
    return self.programs.start(slots, starts_B, fields)


def collect_finished(slots: Slots, slot_requests: list) -> list[tuple[int, Completion]]:
  """Takes the finished rows out of their slots."""
  active_B = np.asarray(slots.active_B)
  ended = [i for i, r in enumerate(slot_requests) if r is not None and not active_B[i]]
  if not ended:
    return []
  out, logp, count, stopped = jax.device_get(
    (slots.out_BS, slots.logp_BS, slots.count_B, slots.stopped_B)
  )
  done = []
  for i in ended:
    n = int(count[i])
    completion = Completion(
      request=slot_requests[i],
      tokens=tuple(out[i, :n].tolist()),
      logp=tuple(logp[i, :n].tolist()),
      finish="stop" if stopped[i] else "length",
    )
    done.append((i, completion))
    slot_requests[i] = None
  return done
