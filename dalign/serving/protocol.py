"""What a request of OpenAI's protocol asks for, checked, and how it is refused.

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
from dalign.text import chat_template
from dalign.types import Turn

COMPLETION_TOKENS = 16  # of /v1/completions where nothing is said, as in the protocol
READ = {
  *("model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed"),
  *("n", "stop"),
}
OF_CHATS = READ | {"messages", "max_completion_tokens"}
OF_TEXTS = READ | {"prompt", "logprobs", "echo"}
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
  "echo": (False,),
  "best_of": (1,),
  "suffix": ("",),
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
  """A request, checked: the tokens to continue, how their reply is read, the text that
  is said before it, how many likeliest tokens are told of each (None: no numbers), and
  the settings of `Engine.ask`."""

  row: tuple[int, ...]
  read: Callable[[live.PartialCompletion], assistant.Reply]
  chat: bool
  n: int
  stream: bool
  usage: bool  # at the end of a stream
  echo: str | None
  logprobs: int | None
  how: Mapping[str, Any]


def error_body(error: RequestError) -> dict:
  """An error as OpenAI's clients read it."""
  kind = "server_error" if error.status >= 500 else "invalid_request_error"
  inner = {"message": str(error), "type": kind, "param": error.param, "code": None}
  return {"error": inner}


def read_request(
  body: bytes, engine: Engine, name: str, *, chat: bool
) -> CheckedRequest:
  """A request's body to the model of that name, checked; raises `RequestError`."""
  try:
    fields = json.loads(body)
  except (ValueError, RecursionError):
    raise RequestError("wanted a body of JSON") from None
  if not isinstance(fields, dict):
    raise RequestError("wanted a JSON object")
  fields = {name: value for name, value in fields.items() if value is not None}
  _check_fields(fields, OF_CHATS if chat else OF_TEXTS, name)
  model = engine.model
  if chat:
    turns = _turns(fields.get("messages"))
    row, read = model.read(turns), lambda heard: model.partial_reply(turns, heard)
    default, echo, logprobs = model.budget, None, None
  else:
    row, written = _row(fields.get("prompt"), model.tok)
    read, default = model.partial_text, None
    echo, logprobs = written if _flag(fields, "echo") else None, _logprobs(fields)
  try:
    room = engine.room(row)
  except ValueError as error:
    raise RequestError(str(error), param="messages" if chat else "prompt") from None
  longest = (
    "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
  )
  wanted = _number(
    fields, longest, int, 1, room, min(default or COMPLETION_TOKENS, room)
  )
  stream = _flag(fields, "stream")
  if stream and (echo is not None or logprobs is not None):
    raise RequestError("echo and logprobs come whole: leave stream out", param="stream")
  stops = _stops(fields.get("stop", []))
  if stops and logprobs is not None:
    raise RequestError("stop cannot be had with logprobs: leave it out", param="stop")
  options = _object(
    fields.get("stream_options", {}), {"include_usage"}, "stream_options"
  )
  return CheckedRequest(
    row=row,
    read=read,
    chat=chat,
    n=_number(fields, "n", int, 1, model.slots, 1),
    stream=stream,
    usage=_flag(options, "include_usage"),
    echo=echo,
    logprobs=logprobs,
    how=dict(
      max_new=wanted,
      temperature=_number(fields, "temperature", float, 0, 2, model.temperature),
      top_p=_number(fields, "top_p", float, 0, 1, model.top_p),
      seed=_number(fields, "seed", int, -(2**63), 2**63, None),
      stops=stops,
    ),
  )


def _check_fields(fields: dict, known: set[str], model: str) -> None:
  for name, value in fields.items():
    if name in NEUTRAL_VALUES and name not in known:
      if value not in NEUTRAL_VALUES[name]:
        raise RequestError(f"{name} cannot be set here; leave it out", param=name)
    elif name not in known | IGNORED_FIELDS:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise RequestError(f"{name} is not known here; leave it out{hint}", param=name)
  if fields.get("model") != model:
    raise RequestError(
      f"wanted the model {model!r}, which is here, got {fields.get('model')!r}",
      404,
      "model",
    )


def _row(prompt, tok: chat_template.Tokenizer) -> tuple[tuple[int, ...], str]:
  """The tokens and the text of a prompt that is either."""
  if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
    prompt = prompt[0]
  if isinstance(prompt, str):
    row = tok.document(prompt) or [tok.stop_ids[0]]
  else:
    row = prompt
  whole = isinstance(row, list) and row
  if not whole or not all(type(i) is int for i in row) or {*row} - {*tok.ids}:
    raise RequestError("wanted one text, or the ids of its tokens", param="prompt")
  return tuple(row), prompt if isinstance(prompt, str) else tok.decode(row)


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


def _logprobs(said: dict) -> int | None:
  """How many likeliest tokens of each a request asks for, or None."""
  if said.get("logprobs") is False:
    return None
  return _number(said, "logprobs", int, 0, assistant.TOP_LOGPROBS, None)


def _stops(stop) -> tuple[str, ...]:
  stops = [stop] if isinstance(stop, str) else stop
  if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
    raise RequestError("stop: wanted a text or a list of texts", param="stop")
  return tuple(stops)
