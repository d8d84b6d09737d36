"""A run's model behind an address that speaks OpenAI's protocol.

  python -m dalign.main --mode=serve --workdir=runs/quickstart --port=8000

The thought is in a field of its own, `reasoning_content`, as in vLLM and SGLang. Plain
text is continued by /v1/completions, which tells log-probabilities where it is asked
to, those of the prompt among them (`echo`), at temperature 1 and of all tokens. What a
client asks for and cannot have is refused, not passed over. On loopback anybody on the
machine may ask; on another address only who sends the key in $DALIGN_API_KEY.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
import contextlib
import dataclasses
import difflib
import functools
import hmac
import ipaddress
import itertools
import json
import os
import pathlib
import socket
import sys
import time
from typing import Any
import uuid

from dalign.config.schema import Config
from dalign.runs import store
from dalign.sampling import live
from dalign.serving import assistant
from dalign.text import chat_template
from dalign.types import Turn

KEY = "DALIGN_API_KEY"
LOCAL = ("localhost", "127.0.0.1", "[::1]")
MAX_BODY_BYTES = 4 * 2**20  # of a request
MAX_WAITING_PER_SLOT = 16  # choices that may wait, for each slot of the sampler
GRACE = 5  # seconds that replies under way have left when the server ends
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
  the settings of `assistant.Engine.ask`."""

  row: tuple[int, ...]
  read: Callable[[live.PartialCompletion], assistant.Reply]
  chat: bool
  n: int
  stream: bool
  usage: bool  # at the end of a stream
  echo: str | None
  logprobs: int | None
  how: Mapping[str, Any]


class Service:
  """OpenAI's protocol without its transport: requests in, JSON out."""

  def __init__(self, engine: assistant.Engine, name: str, key: str = ""):
    self.engine, self.name, self._key = engine, name, key
    self._under_way = 0
    self._created = int(time.time())
    self._fingerprint = f"dalign-{store.code_version()}"

  def models(self) -> dict:
    """The one model there is."""
    own = {"id": self.name, "object": "model", "created": self._created}
    return {"object": "list", "data": [own | {"owned_by": "dalign"}]}

  def admit(self, headers: Mapping[str, str], local: bool) -> None:
    """Raises `RequestError` without the key (401) or for a page of another host
    (403)."""
    if self._key:
      sent = headers.get("authorization", "").removeprefix("Bearer ")
      if not hmac.compare_digest(sent.encode(), self._key.encode()):
        raise RequestError(f"wanted the key of ${KEY} as a bearer token", 401)
    elif local and headers.get("host", "").rsplit(":", 1)[0] not in LOCAL:
      raise RequestError("wanted a Host of this machine: a page elsewhere asks", 403)

  def read(self, body: bytes, *, chat: bool) -> CheckedRequest:
    """A request's body, checked; raises Refused."""
    try:
      fields = json.loads(body)
    except (ValueError, RecursionError):
      raise RequestError("wanted a body of JSON") from None
    if not isinstance(fields, dict):
      raise RequestError("wanted a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    self._check_fields(fields, OF_CHATS if chat else OF_TEXTS)
    model = self.engine.model
    if chat:
      turns = _turns(fields.get("messages"))
      row, read = model.read(turns), lambda heard: model.partial_reply(turns, heard)
      default, echo, logprobs = model.budget, None, None
    else:
      row, written = self._row(fields.get("prompt"))
      read, default = model.partial_text, None
      echo, logprobs = written if _flag(fields, "echo") else None, _logprobs(fields)
    try:
      room = self.engine.room(row)
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
      raise RequestError(
        "echo and logprobs come whole: leave stream out", param="stream"
      )
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

  def _check_fields(self, fields: dict, known: set[str]) -> None:
    for name, value in fields.items():
      if name in NEUTRAL_VALUES and name not in known:
        if value not in NEUTRAL_VALUES[name]:
          raise RequestError(f"{name} cannot be set here; leave it out", param=name)
      elif name not in known | IGNORED_FIELDS:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RequestError(f"{name} is not known here; leave it out{hint}", param=name)
    if fields.get("model") != self.name:
      raise RequestError(
        f"wanted the model {self.name!r}, which is here, got {fields.get('model')!r}",
        404,
        "model",
      )

  def _row(self, prompt) -> tuple[tuple[int, ...], str]:
    """The tokens and the text of a prompt that is either."""
    tok = self.engine.model.tok
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

  @contextlib.contextmanager
  def reserve(self, asked: CheckedRequest):
    """Counts the replies under way; raises `RequestError` (429) above the limit."""
    max_waiting = MAX_WAITING_PER_SLOT * self.engine.model.slots
    if self._under_way + asked.n > max_waiting:
      raise RequestError(
        f"{self._under_way} replies are waited for; come again later", 429
      )
    self._under_way += asked.n
    try:
      yield
    finally:
      self._under_way -= asked.n

  async def replies(
    self, asked: CheckedRequest
  ) -> AsyncIterator[tuple[int, assistant.Reply]]:
    """(choice, its Reply so far) as they are written, to the end of all; whoever stops
    listening gives them up."""
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def hear(i: int, reply) -> None:
      with contextlib.suppress(RuntimeError):  # the server has ended
        loop.call_soon_threadsafe(heard.put_nowait, (i, reply))

    leave = [
      self.engine.ask(
        asked.row, asked.read, functools.partial(hear, i), draw=i, **asked.how
      )
      for i in range(asked.n)
    ]
    try:
      missing = asked.n
      while missing:
        i, reply = await heard.get()
        if isinstance(reply, Exception):
          raise RequestError(f"{type(reply).__name__}: {reply}", 500)
        yield i, reply
        missing -= bool(reply.finish)
    finally:
      for one in leave:
        one()

  async def whole(self, asked: CheckedRequest) -> dict:
    """The answer to a request that is not streamed."""
    last: dict[int, assistant.Reply] = {}
    async for i, reply in self.replies(asked):
      last[i] = reply
    numbers = await asyncio.gather(
      *(self._numbers(asked, last[i].tokens) for i in sorted(last))
    )
    choices = [
      self._choice(asked, i, last[i], of)
      for i, of in zip(sorted(last), numbers, strict=True)
    ]
    return self._frame(asked, choices) | {"usage": _usage(last)}

  async def _numbers(
    self, asked: CheckedRequest, drawn: tuple[int, ...]
  ) -> dict | None:
    """The `logprobs` of a choice, as /v1/completions has them: at temperature 1, and of
    a row's first token none."""
    if asked.logprobs is None:
      return None
    row, tok = (*asked.row, *drawn), self.engine.model.tok
    try:
      scored = await asyncio.wrap_future(self.engine.score(row))
    except Exception as error:
      raise RequestError(f"{type(error).__name__}: {error}", 500) from None

    def top(token: str, own: assistant.Scored) -> dict[str, float] | None:
      found: dict[str, float] = {}
      for i, logp in own.likeliest[: asked.logprobs]:
        found.setdefault(_name(tok, i), logp)
      return {token: own.logp} | found if found else None

    start = len(asked.row) if asked.echo is None else 0
    ends = itertools.accumulate((len(tok.decode([i])) for i in row), initial=0)
    tokens = [_name(tok, i) for i in row[start:]]
    worth = [None, *scored][start:]
    return {
      "tokens": tokens,
      "token_logprobs": [own and own.logp for own in worth],
      "top_logprobs": [
        own and top(token, own) for token, own in zip(tokens, worth, strict=True)
      ],
      "text_offset": [*ends][start:-1],
    }

  def _choice(
    self, asked: CheckedRequest, i: int, reply: assistant.Reply, numbers
  ) -> dict:
    said: dict = {"index": i, "finish_reason": reply.finish, "logprobs": numbers}
    if not asked.chat:
      return said | {"text": (asked.echo or "") + reply.answer}
    message = {"role": "assistant", "content": reply.answer}
    return said | {"message": message | {"reasoning_content": reply.thought or None}}

  async def events(self, asked: CheckedRequest) -> AsyncIterator[str]:
    """The events of a stream, to the last."""
    frame = self._frame(asked, [], part=True)
    last: dict[int, assistant.Reply] = {}
    try:
      with self.reserve(asked):
        async for i, reply in self.replies(asked):
          choice = self._part(asked, i, last.get(i), reply)
          last[i] = reply
          yield _event(frame | {"choices": [choice]})
      if asked.usage:
        yield _event(frame | {"usage": _usage(last)})
      yield "data: [DONE]\n\n"
    except RequestError as error:
      yield _event(error_body(error))

  def _part(self, asked: CheckedRequest, i: int, last, reply: assistant.Reply) -> dict:
    """What is new of a choice."""
    thought, answer = (last.thought, last.answer) if last else ("", "")
    thought, answer = reply.thought[len(thought) :], reply.answer[len(answer) :]
    said: dict = {"index": i, "finish_reason": reply.finish or None, "logprobs": None}
    if not asked.chat:
      return said | {"text": answer}
    delta: dict = {} if last else {"role": "assistant"}
    delta |= {"reasoning_content": thought} if thought else {}
    return said | {"delta": delta | ({"content": answer} if answer else {})}

  def _frame(self, asked: CheckedRequest, choices: list, part: bool = False) -> dict:
    kind = "chat.completion" if asked.chat else "text_completion"
    return {
      "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}",
      "object": f"{kind}.chunk" if part and asked.chat else kind,
      "created": int(time.time()),
      "model": self.name,
      "system_fingerprint": self._fingerprint,
      "choices": choices,
    }


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
    turns.append(Turn(role=role, content=_content(message.get("content"), where)))
  if turns[-1].role != "user":
    raise RequestError("wanted a user's message as the last", param="messages")
  return tuple(turns)


def _content(content, where: str) -> str:
  """A message's text, whether in one piece or in parts."""
  parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
  if not isinstance(parts, list):
    raise RequestError(f"{where}: wanted a text as content", param="messages")
  for part in parts:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind != "text" or not isinstance(part.get("text"), str):
      raise RequestError(
        f"{where}: reads text alone, got {kind!r:.80}", param="messages"
      )
    _object(part, {"type", "text"}, where)
  return "\n".join(part["text"] for part in parts)


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


def _name(tok: chat_template.Tokenizer, i: int) -> str:
  """A token's text; of one that is none, a control token or a part of a character, the
  vocabulary's word."""
  said = tok.decode([i])
  return said if said and "\ufffd" not in said else tok.backend.id_to_token(i) or said


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


def _usage(last: Mapping[int, assistant.Reply]) -> dict:
  read = max(reply.tokens_in for reply in last.values())
  written = sum(len(reply.tokens) for reply in last.values())
  return {
    "prompt_tokens": read,
    "completion_tokens": written,
    "total_tokens": read + written,
  }


def _event(value: dict) -> str:
  return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_body(error: RequestError) -> dict:
  """An error as OpenAI's clients read it."""
  kind = "server_error" if error.status >= 500 else "invalid_request_error"
  inner = {"message": str(error), "type": kind, "param": error.param, "code": None}
  return {"error": inner}


def app(service: Service, *, local: bool):
  """The service as an ASGI application, of Starlette."""
  from starlette import applications
  from starlette import requests
  from starlette import responses
  from starlette import routing

  async def body(request: requests.Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
      raise RequestError(f"wanted application/json, got {kind!r:.80}", 415)
    read = bytearray()
    async for part in request.stream():
      read += part
      if len(read) > MAX_BODY_BYTES:
        raise RequestError(f"wanted a body of {MAX_BODY_BYTES} bytes at the most", 413)
    return bytes(read)

  async def answer(request: requests.Request, chat: bool):
    asked = service.read(await body(request), chat=chat)
    if asked.stream:
      with service.reserve(asked):  # refused before a stream has begun
        pass
      return responses.StreamingResponse(
        service.events(asked), media_type="text/event-stream"
      )
    with service.reserve(asked):
      work = asyncio.create_task(service.whole(asked))
      try:
        while not (await asyncio.wait({work}, timeout=0.5))[0]:
          if await request.is_disconnected():
            raise RequestError("nobody waits", 499)
        return responses.JSONResponse(work.result())
      finally:
        work.cancel()

  def guarded(handle):
    async def handler(request: requests.Request):
      try:
        service.admit(request.headers, local)
        return await handle(request)
      except RequestError as error:
        return responses.JSONResponse(error_body(error), error.status)

    return handler

  async def models(request: requests.Request):
    return responses.JSONResponse(service.models())

  async def one_model(request: requests.Request):
    if (name := request.path_params["name"]) != service.name:
      raise RequestError(f"no model {name!r} is here", 404, "model")
    return responses.JSONResponse(service.models()["data"][0])

  async def health(request: requests.Request):
    return responses.JSONResponse({"status": "ok"})

  def route(path: str, handle, method: str = "GET"):
    return routing.Route(path, guarded(handle), methods=[method])

  return applications.Starlette(
    routes=[
      route("/health", health),
      route("/v1/models", models),
      route("/v1/models/{name:path}", one_model),
      route("/v1/chat/completions", lambda r: answer(r, True), "POST"),
      route("/v1/completions", lambda r: answer(r, False), "POST"),
    ]
  )


def serve(
  cfg: Config | None, workdir: pathlib.Path, stage: str, host: str, port: int
) -> None:
  """Answers until SIGINT or SIGTERM. `cfg` and `stage` are as of `assistant.Model`.

  Raises ValueError where the address is not of this machine alone and no key is set,
  and where the port is taken.
  """
  try:
    import starlette  # noqa: F401 - both are of an extra
    import uvicorn
  except ImportError as error:
    raise ValueError(f"{error}: pip install 'dalign[serve]'") from None
  key = os.environ.get(KEY, "")
  local = host == "localhost" or _loopback(host)
  if not local and not key:
    raise ValueError(
      f"--host={host}: others could ask; set {KEY} to a key that they must send"
    )
  model = assistant.Model(workdir, stage, cfg)
  name = f"{model.workdir.name}-{model.stage}"
  try:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
  except OSError as error:
    raise ValueError(f"--host={host} --port={port}: {error.strerror}") from None
  with listening, assistant.Engine(model) as engine:
    asgi = app(Service(engine, name, key), local=local)
    place = f"[{host}]" if ":" in host else host
    port = listening.getsockname()[1]
    print(f"dalign: {name} answers at http://{place}:{port}/v1", file=sys.stderr)
    server = uvicorn.Config(
      asgi, log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE
    )
    uvicorn.Server(server).run(sockets=[listening])


def _loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False
