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
from dalign.runs.workdir import Store
from dalign.stages import model as models
from dalign.stages import samples
from dalign.text import packing
from dalign.text import thinking
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Turn

AMBIGUOUS = (
  "every reply was cut, and may be a thought without an end: give it more tokens"
)
REQUESTS_PER_CONNECTION = 16  # that wait, between two looks at the run


class Server:
  """The endpoint of a config, asked for `name`, which its lines of progress begin
  with."""

  def __init__(self, store: Store, cfg: EndpointConfig, name: str):
    self._endpoint = endpoint.Endpoint(cfg, store.workdir / "endpoint.jsonl")
    self._name = name
    self.round = REQUESTS_PER_CONNECTION * cfg.concurrency

  def chat(self, requests: Sequence[endpoint.Request]) -> list[endpoint.Reply]:
    """A reply to each request, in order, the same in every process; see
    `endpoint.Endpoint.chat`."""
    if not distributed.is_multi_process():
      return self._endpoint.chat(requests)
    shared = ("", None)
    if distributed.is_first_process():
      try:
        found = self._endpoint.chat(requests)
        shared = ("", [dataclasses.asdict(reply) for reply in found])
      except (ValueError, ConnectionError) as error:
        shared = (str(error), None)
    failure, rows = distributed.broadcast(shared)
    if failure:
      raise ConnectionError(failure)
    return [endpoint.Reply(**row) for row in rows]

  def rounds(
    self, requests: Sequence[endpoint.Request]
  ) -> Iterator[tuple[int, endpoint.Reply]]:
    """(place, reply) of each request, in order, some at a time."""
    for at in packing.batches(len(requests), self.round):
      yield from enumerate(self.chat(requests[at]), at.start)

  def rounds_ambiguous_last(
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
        reply = dataclasses.replace(reply, refused=AMBIGUOUS)
      elif thinks:
        reply = dataclasses.replace(reply, text=f"<think>\n{reply.text}")
      yield at, reply

  def report_usage(self) -> None:
    """One line on what was asked so far and what it cost."""
    usage = self._endpoint
    progress.say(
      f"{self._name}: {usage.asked} requests, {usage.cached} known before; tokens in "
      f"{usage.tokens_in}, out {usage.tokens_out}; cost {usage.cost:.4g}"
      + f", without {usage.uncounted} replies that came uncounted"
      * bool(usage.uncounted)
      + f"; {usage.lone_surrogates} replies with half a character, read as U+FFFD"
      * bool(usage.lone_surrogates)
    )


def to_sample(
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
  think_format = model.think.of(prompt.text)
  thought, text, unended = reply.reasoning, reply.text, ""
  if not thought and not text.lstrip().startswith(think_format.tag):
    thought, text, unended = thinking.split_reasoning(text)
  if thought:
    text = f"{think_format.tag}\n{thought}\n{think_format.close}\n{text}"
  elif unended and not text.startswith(think_format.tag):
    text = f"{think_format.tag}\n{text}"
  finish = "length" if reply.finish == "length" else "stop"
  plain = dataclasses.replace(think_format, open=think_format.tag)
  thought, answer, malformed = thinking.split_thought(text, plain)
  if finish == "length" and not malformed:
    malformed = "cut by the token budget"
  if why := _rejection_reason(reply):
    finish, malformed = "refused", why
  if think and not malformed:
    written = samples.from_text(model, prompt, index, thought, answer, think)
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


def to_model_reply(reply: endpoint.Reply) -> forms.ModelReply:
  """A reply as a form reads it: one that the server did not end as the model wanted is
  not read, but where it may be cut."""
  return forms.ModelReply(
    reply.text, _rejection_reason(reply), reply.finish == "length"
  )


def _rejection_reason(reply: endpoint.Reply) -> str:
  """Why a reply is not what its model wanted to say, or ""."""
  if reply.refused == AMBIGUOUS:
    return AMBIGUOUS
  if reply.refused:
    return f"the server refuses: {reply.refused}"
  if reply.finish not in ("", "stop", "length"):
    return f"the server ended the reply for another reason: {reply.finish}"
  return ""


def make_request(
  turns: Sequence[Turn],
  cfg: GenerateConfig | stages.Judge | EvalConfig,
  draw: int = 0,
) -> endpoint.Request:
  """The request to continue a conversation as a stage samples."""
  return endpoint.Request(
    turns=tuple(turns), temperature=cfg.temperature, max_new=cfg.max_new, draw=draw
  )
