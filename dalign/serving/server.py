"""A run's model behind an address that speaks OpenAI's protocol.

  python -m dalign.main --mode=serve --workdir=runs/quickstart --port=8000

The thought is in a field of its own, `reasoning_content`, as in vLLM and SGLang. On
loopback anybody on the machine may ask; on another address only who sends the key in
$DALIGN_API_KEY.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
import contextlib
import functools
import hmac
import ipaddress
import json
import os
import pathlib
import socket
import sys
import time
from typing import Any
import uuid

from dalign.config.schema import Config
from dalign.serving import assistant
from dalign.serving.engine import Engine
from dalign.serving.protocol import CheckedRequest
from dalign.serving.protocol import RequestError
from dalign.serving.protocol import error_body
from dalign.serving.protocol import read_request

KEY = "DALIGN_API_KEY"
LOCAL = ("localhost", "127.0.0.1", "[::1]")
MAX_BODY_BYTES = 4 * 2**20  # of a request
MAX_WAITING_PER_SLOT = 16  # choices that may wait, for each slot of the sampler
GRACE = 5  # seconds that replies under way have left when the server ends


class Service:
  """OpenAI's protocol without its transport: requests in, JSON out."""

  def __init__(self, engine: Engine, name: str, key: str = ""):
    self.engine, self.name, self._key = engine, name, key
    self._under_way = 0
    self._created = int(time.time())

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
    choices = [
      {
        "index": i,
        "finish_reason": reply.finish,
        "logprobs": None,
        "message": {
          "role": "assistant",
          "content": reply.answer,
          "reasoning_content": reply.thought or None,
        },
      }
      for i, reply in sorted(last.items())
    ]
    return self._frame("chat.completion", choices) | {"usage": _usage(last)}

  async def events(self, asked: CheckedRequest) -> AsyncIterator[str]:
    """The events of a stream, to the last."""
    frame = self._frame("chat.completion.chunk", [])
    last: dict[int, assistant.Reply] = {}
    try:
      with self.reserve(asked):
        async for i, reply in self.replies(asked):
          yield _event(frame | {"choices": [_part(i, last.get(i), reply)]})
          last[i] = reply
      if asked.usage:
        yield _event(frame | {"usage": _usage(last)})
      yield "data: [DONE]\n\n"
    except RequestError as error:
      yield _event(error_body(error))

  def _frame(self, kind: str, choices: list) -> dict:
    return {
      "id": f"chatcmpl-{uuid.uuid4().hex}",
      "object": kind,
      "created": int(time.time()),
      "model": self.name,
      "choices": choices,
    }


def _part(i: int, last: assistant.Reply | None, reply: assistant.Reply) -> dict:
  """What is new of a choice."""
  thought, answer = (last.thought, last.answer) if last else ("", "")
  thought, answer = reply.thought[len(thought) :], reply.answer[len(answer) :]
  delta: dict = {} if last else {"role": "assistant"}
  delta |= {"reasoning_content": thought} if thought else {}
  delta |= {"content": answer} if answer else {}
  said = {"index": i, "finish_reason": reply.finish or None, "logprobs": None}
  return said | {"delta": delta}


def _usage(last: Mapping[int, assistant.Reply]) -> dict:
  read = max(reply.tokens_in for reply in last.values())
  written = sum(reply.tokens_out for reply in last.values())
  return {
    "prompt_tokens": read,
    "completion_tokens": written,
    "total_tokens": read + written,
  }


def _event(value: dict) -> str:
  return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


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

  async def answer(request: requests.Request):
    asked = read_request(await body(request), service.engine, service.name)
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

  async def health(request: requests.Request):
    return responses.JSONResponse({"status": "ok"})

  def route(path: str, handle, method: str = "GET"):
    return routing.Route(path, guarded(handle), methods=[method])

  return applications.Starlette(
    routes=[
      route("/health", health),
      route("/v1/models", models),
      route("/v1/chat/completions", answer, "POST"),
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
  with listening, Engine(model) as engine:
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
