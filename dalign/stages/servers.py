"""A model behind a server, as a run asks it: replies, and replies as samples.

What was said is kept in WORKDIR/endpoint.jsonl. Of several processes the first asks.
"""

from collections.abc import Iterator, Sequence
import dataclasses

from dalign.config import stages
from dalign.config.replies import EndpointConfig
from dalign.config.replies import EvalConfig
from dalign.config.replies import GenerateConfig
from dalign.judges import endpoint
from dalign.judges import forms
from dalign.runs import distributed
from dalign.runs import progress
from dalign.runs import store as files
from dalign.stages import model as models
from dalign.stages import samples
from dalign.text import packing
from dalign.text import thinking
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Turn

UNTOLD = "every reply was cut, and may be a thought without an end: give it more tokens"
ROUND = 16  # requests that each connection has waiting, between two looks at the run


class Server:
  """The endpoint of a config, asked for `name`, which its lines of progress begin
  with."""

  def __init__(self, store: files.Store, cfg: EndpointConfig, name: str):
    self._endpoint = endpoint.Endpoint(cfg, store.workdir / "endpoint.jsonl")
    self._name = name
    self.round = ROUND * cfg.concurrency

  def chat(self, requests: Sequence[endpoint.Request]) -> list[endpoint.Reply]:
    """A reply to each request, in order, the same in every process; see
    `endpoint.Endpoint.chat`."""
    if not distributed.is_multi_process():
      return self._endpoint.chat(requests)
    said = ("", None)
    if distributed.is_first_process():
      try:
        found = self._endpoint.chat(requests)
        said = ("", [dataclasses.asdict(reply) for reply in found])
      except (ValueError, ConnectionError) as error:
        said = (str(error), None)
    failure, rows = distributed.broadcast(said)
    if failure:
      raise ConnectionError(failure)
    return [endpoint.Reply(**row) for row in rows]

  def rounds(
    self, requests: Sequence[endpoint.Request]
  ) -> Iterator[tuple[int, endpoint.Reply]]:
    """(place, reply) of each request, in order, some at a time."""
    for at in packing.batches(len(requests), self.round):
      yield from enumerate(self.chat(requests[at]), at.start)

  def settled(
    self, requests: Sequence[endpoint.Request]
  ) -> Iterator[tuple[int, endpoint.Reply]]:
    """As `rounds`, but last those that were cut and do not tell a thought from an
    answer: they are what the model's whole replies begin with, and refused where there
    is none to go by."""
    cut = []
    for at, reply in self.rounds(requests):
      if reply.ambiguous:
        cut.append((at, reply))
      else:
        yield at, reply
    thinks = distributed.broadcast(self._endpoint.thinks) if cut else None
    for at, reply in cut:
      if thinks is None:
        reply = dataclasses.replace(reply, refused=UNTOLD)
      elif thinks:
        reply = dataclasses.replace(reply, text=f"<think>\n{reply.text}")
      yield at, reply

  def say(self) -> None:
    """One line on what was asked so far and what it cost."""
    own = self._endpoint
    progress.say(
      f"{self._name}: {own.asked} requests, {own.cached} known before; tokens in "
      f"{own.tokens_in}, out {own.tokens_out}; cost {own.cost:.4g}"
      + f", without {own.uncounted} replies that came uncounted" * bool(own.uncounted)
      + f"; {own.lone_surrogates} replies with half a character, read as U+FFFD"
      * bool(own.lone_surrogates)
    )


def sample(
  model: models.Model,
  prompt: Prompt,
  index: int,
  reply: endpoint.Reply,
  think: thinking.ThinkFormat | None,
) -> Sample:
  """A reply as a sample, with the tokens of our own tokenizer for a model to learn.

  Its thought is the reasoning that the server gave apart, or the think block in front
  of the text, whatever its tags. With `think` that follows the forced opening, as in
  all samples.
  """
  own = model.think.of(prompt.text)
  thought, said, unended = reply.reasoning, reply.text, ""
  if not thought and not said.lstrip().startswith(own.tag):
    thought, said, unended = thinking.split_reasoning(said)
  if thought:
    said = f"{own.tag}\n{thought}\n{own.close}\n{said}"
  elif unended and not said.startswith(own.tag):
    said = f"{own.tag}\n{said}"
  finish = "length" if reply.finish == "length" else "stop"
  plain = dataclasses.replace(own, open=own.tag)
  thought, answer, malformed = thinking.split_thought(said, plain)
  if finish == "length" and not malformed:
    malformed = "cut by the token budget"
  if why := _unread(reply):
    finish, malformed = "refused", why
  if think and not malformed:
    written = samples.written(model, prompt, index, thought, answer, think)
    return dataclasses.replace(written, finish=finish)
  return Sample(
    prompt_id=prompt.id,
    index=index,
    tokens=(),
    forced=0,
    thought=thought,
    answer=answer,
    malformed=malformed,
    finish=finish,
  )


def said(reply: endpoint.Reply) -> forms.ModelReply:
  """A reply as a form reads it: one that the server did not end as the model wanted is
  not read, but where it may be cut."""
  return forms.ModelReply(reply.text, _unread(reply), reply.finish == "length")


def _unread(reply: endpoint.Reply) -> str:
  """Why a reply is not what its model wanted to say, or ""."""
  if reply.refused == UNTOLD:
    return UNTOLD
  if reply.refused:
    return f"the server refuses: {reply.refused}"
  if reply.finish not in ("", "stop", "length"):
    return f"the server ended the reply for another reason: {reply.finish}"
  return ""


def request(
  turns: Sequence[Turn],
  cfg: GenerateConfig | stages.Judge | EvalConfig,
  draw: int = 0,
) -> endpoint.Request:
  """The request to continue a conversation as a stage samples."""
  return endpoint.Request(
    turns=tuple(turns), temperature=cfg.temperature, max_new=cfg.max_new, draw=draw
  )
