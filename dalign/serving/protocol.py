"""What a chat request of OpenAI's protocol asks for, checked, and how it is refused.

What a client asks for and cannot have is refused, not passed over. Knows the fields of
bodies; not the transport, nor how replies are told (server.py).
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
import json
from typing import Any

from dalign.data import parsing
from dalign.sampling import live
from dalign.serving import assistant
from dalign.serving.engine import Engine
from dalign.types import Turn

READ = {
  *("model", "messages", "stream", "stream_options", "max_tokens", "temperature"),
  *("max_completion_tokens", "top_p", "seed", "n", "stop"),
}
# Of a message. An earlier reply's reasoning is not read again, as in vLLM and SGLang;
# "type" is "text" in what lm-eval sends.
OF_MESSAGES = {"role", "content", "reasoning_content", "reasoning", "type"}
# What asks for no more than is done anyway.
NEUTRAL_VALUES: Mapping[str, tuple] = {
  "frequency_penalty": (0,),
  "presence_penalty": (0,),
  "logit_bias": ({},),
  "logprobs": (False,),
  "top_logprobs": (0,),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
}
IGNORED_FIELDS = {"user", "metadata", "store", "service_tier", "safety_identifier"}


class RequestError(Exception):
  """Why a request is not answered: a message, an HTTP status and a parameter."""

  def __init__(self, message: str, status: int = 400, param: str | None = None):
    super().__init__(message)
    self.status, self.param = status, param


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedRequest:
  """A request, checked: the tokens to continue, how their reply is read, and the
  settings of `Engine.ask`."""

  row: tuple[int, ...]
  read: Callable[[live.PartialCompletion], assistant.Reply]
  n: int
  stream: bool
  usage: bool  # at the end of a stream
  how: Mapping[str, Any]


def error_body(error: RequestError) -> dict:
  """An error as OpenAI's clients read it."""
  kind = "server_error" if error.status >= 500 else "invalid_request_error"
  inner = {"message": str(error), "type": kind, "param": error.param, "code": None}
  return {"error": inner}


def read_request(body: bytes, engine: Engine, name: str) -> CheckedRequest:
  """A request's body to the model of that name, checked; raises `RequestError`."""
  try:
    fields = json.loads(body)
  except (ValueError, RecursionError):
    raise RequestError("wanted a body of JSON") from None
  if not isinstance(fields, dict):
    raise RequestError("wanted a JSON object")
  fields = {name: value for name, value in fields.items() if value is not None}
  _check_fields(fields, name)
  model = engine.model
  turns = _turns(fields.get("messages"))
  row = model.read(turns)
  try:
    room = engine.room(row)
  except ValueError as error:
    raise RequestError(str(error), param="messages") from None
  longest = (
    "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
  )
  options = _object(
    fields.get("stream_options", {}), {"include_usage"}, "stream_options"
  )
  return CheckedRequest(
    row=row,
    read=lambda heard: model.partial_reply(turns, heard),
    n=_number(fields, "n", int, 1, model.slots, 1),
    stream=_flag(fields, "stream"),
    usage=_flag(options, "include_usage"),
    how=dict(
      max_new=_number(fields, longest, int, 1, room, min(model.budget, room)),
      temperature=_number(fields, "temperature", float, 0, 2, model.temperature),
      top_p=_number(fields, "top_p", float, 0, 1, model.top_p),
      seed=_number(fields, "seed", int, -(2**63), 2**63, None),
      stops=_stops(fields.get("stop", [])),
    ),
  )


def _check_fields(fields: dict, model: str) -> None:
  for name, value in fields.items():
    if name in NEUTRAL_VALUES:
      if value not in NEUTRAL_VALUES[name]:
        raise RequestError(f"{name} cannot be set here; leave it out", param=name)
    elif name not in READ | IGNORED_FIELDS:
      near = difflib.get_close_matches(name, READ, n=1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise RequestError(f"{name} is not known here; leave it out{hint}", param=name)
  if fields.get("model") != model:
    raise RequestError(
      f"wanted the model {model!r}, which is here, got {fields.get('model')!r}",
      404,
      "model",
    )


def _turns(messages) -> tuple[Turn, ...]:
  """The messages as turns; of an earlier reply the answer alone."""
  if not isinstance(messages, list) or not messages:
    raise RequestError("wanted a list of messages", param="messages")
  turns = []
  for i, message in enumerate(messages):
    where = f"messages[{i}]"
    role = _object(message, OF_MESSAGES, where).get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
      raise RequestError(f"{where}: wanted no {role!r} messages", param="messages")
    content = parsing.text_of(message.get("content"))
    if content is None:
      raise RequestError(f"{where}: wanted text alone as content", param="messages")
    turns.append(Turn(role=role, content=content))
  if turns[-1].role != "user":
    raise RequestError("wanted a user's message as the last", param="messages")
  return tuple(turns)


def _object(found, known: set[str], where: str) -> dict:
  """An object inside a request; refuses keys that are not read and say something."""
  if not isinstance(found, dict):
    raise RequestError(f"{where}: wanted an object", param=where.partition("[")[0])
  for name, value in found.items():
    if name not in known and value not in (None, False, "", [], {}):
      raise RequestError(
        f"{where}: {name} is not known here; leave it out",
        param=where.partition("[")[0],
      )
  return found


def _number(said: dict, name: str, kind, low, high, default):
  """A number of a request in [low, high]."""
  value = said.get(name, default)
  right = isinstance(value, int if kind is int else (int, float))
  if value is default or right and type(value) is not bool and low <= value <= high:
    return value
  what = "a whole number" if kind is int else "a number"
  raise RequestError(
    f"{name}: wanted {what} in {low} to {high}, got {value!r:.80}", param=name
  )


def _flag(said: dict, name: str) -> bool:
  value = said.get(name) or False
  if not isinstance(value, bool):
    raise RequestError(f"{name}: wanted true or false, got {value!r:.80}", param=name)
  return value


def _stops(stop) -> tuple[str, ...]:
  stops = [stop] if isinstance(stop, str) else stop
  if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
    raise RequestError("stop: wanted a text or a list of texts", param="stop")
  return tuple(stops)
