"""One model for many who ask at a time: each hears its reply grow.

One thread decodes for all of them; knows no protocol (server.py).
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import queue
import threading

from dalign.runs import distributed
from dalign.sampling import live
from dalign.sampling import sampler as sampling
from dalign.serving import assistant
from dalign.text import thinking


class Engine:
  """Serves concurrent requests to a model, each as a stream of growing replies.

  Use it `with`, which ends its thread.
  """

  def __init__(self, model: assistant.Model):
    """Raises ValueError in a run of several processes."""
    if distributed.is_multi_process():
      raise ValueError("one process answers alone; start this on one host")
    self.model = model
    self._asked = 0
    self._requests: queue.SimpleQueue[_PendingRequest | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)

  def __enter__(self) -> "Engine":
    _ = self.model.weights  # before anybody waits for them
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._requests.put(None)
    self._thread.join()

  def room(self, row: Sequence[int]) -> int:
    """Tokens that may follow a row; ValueError where there is room for none."""
    room = self.model.max_length - len(row)
    if room < 1:
      raise ValueError(
        f"{len(row)} tokens were sent, and the model takes {self.model.max_length} "
        "with its reply: send fewer"
      )
    return room

  def ask(
    self,
    row: Sequence[int],
    read: Callable[[live.PartialCompletion], assistant.Reply],
    on_reply: Callable[[assistant.Reply | Exception], None],
    *,
    max_new: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int | None = None,
    draw: int = 0,
    stops: Sequence[str] = (),
  ) -> Callable[[], None]:
    """Has a row continued; returns what gives it up.

    `on_reply` is called on the engine's thread: with each Reply that `read` makes and
    that is longer than the last, the last one with its `finish`, or with the error that
    ended it. An answer ends before the first of `stops`. With a seed the same is said
    to the same row and `draw`; without one each time something else. Raises ValueError
    where row and reply do not fit the model.
    """
    if max_new > self.room(row):
      raise ValueError(
        f"{len(row)} tokens and {max_new} of a reply are more than the "
        f"{self.model.max_length} that the model takes: ask for fewer"
      )
    self._asked += 1
    drawn = [seed, draw] if seed is not None else ["", self._asked]
    waiting = _PendingRequest(read, on_reply, tuple(stops))
    waiting.ask = live.LiveRequest(
      tokens=tuple(row),
      row_id=(*drawn, *row),
      max_new=max_new,
      temperature=temperature,
      top_p=top_p,
      cancelled=waiting.cancelled.is_set,
    )
    self._requests.put(waiting)
    return waiting.cancelled.set

  def stream(
    self,
    row: Sequence[int],
    read: Callable[[live.PartialCompletion], assistant.Reply],
    **how,
  ) -> Iterator[assistant.Reply]:
    """The replies that `ask` would have heard; closing it gives the row up."""
    replies: queue.SimpleQueue[assistant.Reply | Exception] = queue.SimpleQueue()
    cancel = self.ask(row, read, replies.put, **how)
    try:
      while True:
        reply = replies.get()
        if isinstance(reply, Exception):
          raise reply
        yield reply
        if reply.finish:
          return
    finally:
      cancel()

  def _work(self) -> None:
    """The thread: decodes until it is told to end; an error ends those who wait."""
    pending: dict[live.LiveRequest, _PendingRequest] = {}
    ended = False
    while not ended:
      error: Exception = ConnectionError("nobody answers any more")
      try:
        self._decode(pending)
        ended = True
      except Exception as failed:
        error = failed
      for waiting in pending.values():
        waiting.on_reply(error)
      pending.clear()

  def _decode(self, pending: dict[live.LiveRequest, "_PendingRequest"]) -> None:
    """Decodes for those who come, until it is told to end."""

    def next_requests(idle: bool) -> list[live.LiveRequest] | None:
      new: list[live.LiveRequest] = []
      while not self._requests.empty() or (idle and not new):
        waiting = self._requests.get()
        if waiting is None:
          return None
        pending[waiting.ask] = waiting
        new.append(waiting.ask)
      return new

    slots = self.model.slots
    with self.model.on_mesh():
      chunks = live.run(
        self._sampler,
        self.model.weights,
        next_requests,
        key=self.model.key("asked"),
        max_rows=slots,
        tokens=slots * (self._sampler.sampler.prompt_room + self.model.budget),
      )
      for rows in chunks:
        for partial in rows:
          if pending[partial.ask].update(partial):
            del pending[partial.ask]
        for ask in [ask for ask in pending if ask.cancelled()]:
          del pending[ask]

  @functools.cached_property
  def _sampler(self) -> sampling.Sampler:
    """The model's sampler, which encodes prompts as they come, one by one."""
    return self.model.sampler(prefill=1)


class _PendingRequest:
  """A request under way, and the last reply that its caller got."""

  def __init__(self, read, on_reply, stops: tuple[str, ...]):
    self._read, self.on_reply, self._stops = read, on_reply, stops
    self.cancelled = threading.Event()
    self.ask: live.LiveRequest
    self._last: assistant.Reply | None = None

  def update(self, partial: live.PartialCompletion) -> bool:
    """Passes on what is new; True when the reply is complete."""
    if self.cancelled.is_set():
      return True
    reply = self._read(partial)
    answer = assistant.cut_at_stop(reply.answer, self._stops)
    if len(answer) < len(reply.answer):
      reply = dataclasses.replace(reply, answer=answer, finish="stop")
      self.cancelled.set()
    elif not reply.finish:
      answer = thinking.stable_prefix(answer, self._stops)
      reply = dataclasses.replace(reply, answer=answer)
    last = self._last
    if last is None or reply.finish or _visible_text(reply) != _visible_text(last):
      self.on_reply(reply)
    self._last = reply
    return bool(reply.finish)


def _visible_text(reply: assistant.Reply) -> tuple[str, str]:
  return reply.thought, reply.answer
