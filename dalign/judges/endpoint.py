"""Chat completions of a server that speaks OpenAI's protocol, each paid for once.

vLLM, SGLang, llama.cpp, `transformers serve` and hosted services do. What a request
brought is kept in a file under a hash of all that was asked, so that the same again
costs nothing, whoever asks, and a run that was cut goes on. The key comes from the
environment and is written nowhere.

Does not know what is asked, or what a reply means.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
from multiprocessing import pool
import os
import pathlib
import threading
from typing import Any

from dalign.config.replies import EndpointConfig
from dalign.runs import buckets
from dalign.runs import store
from dalign.text import chat_template
from dalign.text import templates
from dalign.text import thinking
from dalign.types import Turn

FATAL_STATUSES = (401, 403, 404)  # every other request would get the same
NOT_A_COMPLETION = 599  # our own status of a page, or whatever else, sent with 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A conversation to be continued by at most `max_new` tokens. Requests that are alike
  but for `draw` are asked apart."""

  turns: tuple[Turn, ...]
  temperature: float
  max_new: int
  draw: int = 0
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """What the server wrote, its reasoning apart where it gives that apart; or why the
  server will not answer this request, in `refused`. Of a filtered reply, what was
  written before the provider's filter cut it is not in `text`."""

  text: str
  reasoning: str = ""
  finish: str = ""
  tokens_in: int = 0
  tokens_out: int = 0
  refused: str = ""

  @property
  def complete(self) -> bool:
    """Whether the model said all that it wanted to, or all that the request's budget
    has room for: to ask for the same again would give no more."""
    said = self.finish == "length" or self.text.strip()
    return not self.refused and self.finish in ("", "stop", "length") and bool(said)

  @property
  def ambiguous(self) -> bool:
    """Whether it was cut where nothing in it tells an answer from a thought that a chat
    template opened."""
    marked = (
      self.reasoning or thinking.has_tags(self.text) or "<|channel|>" in self.text
    )
    return self.finish == "length" and bool(self.text.strip()) and not marked


class Endpoint:
  """One model behind one address; it counts what this object did, in `uncounted`
  replies of which the server does not tell the tokens, and in `lone_surrogates` those
  with half a character (a lone surrogate), in whose place U+FFFD is read."""

  def __init__(self, cfg: EndpointConfig, cache: pathlib.Path):
    try:
      import openai  # an extra: only some runs ask a server
    except ImportError:
      raise ValueError("an endpoint needs it: pip install openai") from None
    self._openai, self._cfg, self._cache = openai, cfg, cache
    self._key = os.environ.get(cfg.key, "")
    self._client = openai.OpenAI(
      base_url=cfg.url,
      api_key=self._key or "none",
      timeout=cfg.timeout,
      max_retries=cfg.retries,
      http_client=openai.DefaultHttpxClient(
        event_hooks={"response": [_mark_non_completion]}
      ),
    )
    rows = store.read_rows(cache) if buckets.exists(cache) else []
    self._known = {row["key"]: Reply(**row["reply"]) for row in rows}
    # Of the whole replies of this model, whether each has a thought it did not open.
    self._opened: list[bool] = []
    for row in rows:
      if row["model"] == cfg.model:
        self._record_thinking(self._known[row["key"]])
    self.asked = self.cached = self.tokens_in = self.tokens_out = 0
    self.uncounted = self.lone_surrogates = 0

  @property
  def cost(self) -> float:
    """The cost of this object's requests, in the currency of the config's prices."""
    cfg = self._cfg
    paid = self.tokens_in * cfg.price_in + self.tokens_out * cfg.price_out
    return paid / 1e6

  def chat(self, requests: Sequence[Request]) -> list[Reply]:
    """A reply to each request, in order; what is known is not asked.

    At most `concurrency` are under way; each is tried again `retries` times, later and
    later, where the server is away, busy or slow. After one that failed for good no
    further ones are begun. Raises ValueError where the address, the model or the key is
    wrong, ConnectionError where requests failed; the replies that came are kept.
    """
    keys = [self._hash(request) for request in requests]
    missing = {
      k: r for k, r in zip(keys, requests, strict=True) if k not in self._known
    }
    self.cached += len(requests) - len(missing)
    whole = chat_template.characters
    for key, raw in self._ask(missing):
      reply = dataclasses.replace(
        raw, text=whole(raw.text), reasoning=whole(raw.reasoning)
      )
      self._known[key] = reply
      self._record_thinking(reply)
      self.lone_surrogates += reply != raw
      if reply.complete:  # what is not may be otherwise tomorrow
        row = {"key": key, "model": self._cfg.model, "reply": dataclasses.asdict(reply)}
        store.append_rows(self._cache, [row])
      self.asked += 1
      self.tokens_in += reply.tokens_in
      self.tokens_out += reply.tokens_out
      self.uncounted += bool(reply.text) and not reply.tokens_out
    return [self._known[key] for key in keys]

  @property
  def thinks(self) -> bool | None:
    """Whether replies begin inside a thought, or have it apart, as most of the whole
    ones do; None without a whole one."""
    return 2 * sum(self._opened) > len(self._opened) if self._opened else None

  def _record_thinking(self, reply: Reply) -> None:
    if reply.complete and reply.finish != "length":
      self._opened.append(
        bool(reply.reasoning) or thinking.continues_opened_thought(reply.text)
      )

  def _hash(self, request: Request) -> str:
    said = dataclasses.asdict(request)
    if request.top_p == 1:  # which is not sent either
      del said["top_p"]
    asked = [self._cfg.url, self._cfg.model, said]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

  def _ask(self, missing: dict[str, Request]) -> Iterator[tuple[str, Reply]]:
    """Replies as they come. The pool's threads are daemons: a run that is stopped waits
    for no server."""
    if not missing:
      return
    halt = threading.Event()

    def send(item: tuple[str, Request]) -> tuple[str, Reply | Exception] | None:
      if halt.is_set():
        return None
      key, request = item
      try:
        return key, self._send(request)
      except Exception as error:  # for the thread that waits
        halt.set()
        return key, error

    failures = []
    with pool.ThreadPool(min(self._cfg.concurrency, len(missing))) as threads:
      for key, reply in filter(None, threads.imap_unordered(send, missing.items())):
        if isinstance(reply, Reply):
          yield key, reply
        else:
          failures.append(reply)
    if failures:
      raise self._user_error(failures[0])

  def _user_error(self, error: Exception) -> Exception:
    """The error that a user sees: ValueError for settings, else ConnectionError."""
    if not isinstance(error, self._openai.APIError):
      return error
    status = getattr(error, "status_code", None)
    if status in FATAL_STATUSES:
      return ValueError(self._fatal_message(status))
    said = self._without_key(error)
    if status == NOT_A_COMPLETION:
      said = f"status 200 with what is no completion: {said.partition(' - ')[2]}"
    return ConnectionError(
      f"{self._cfg.url} failed after {self._cfg.retries} retries: {said}; the replies "
      "that came are kept, and the same command goes on from them"
    )

  def _send(self, request: Request) -> Reply:
    """One request, on a thread."""
    cut: dict[str, Any] = {"top_p": request.top_p} if request.top_p < 1 else {}
    messages: list[Any] = [
      {"role": turn.role, "content": chat_template.characters(turn.content)}
      for turn in templates.merged(request.turns)
    ]
    try:
      response = self._client.chat.completions.create(
        model=self._cfg.model,
        messages=messages,
        temperature=request.temperature,
        max_tokens=request.max_new,
        **cut,
      )
    except (
      self._openai.BadRequestError,
      self._openai.UnprocessableEntityError,
    ) as error:
      return Reply(text="", refused=self._without_key(error))
    if not response.choices:
      return Reply(text="", refused="a reply without a choice")
    choice, usage = response.choices[0], response.usage
    message = choice.message
    reasoning_fields = (
      getattr(message, name, None) for name in ("reasoning_content", "reasoning")
    )
    content = message.content or getattr(message, "refusal", None) or ""
    reasoning = next(filter(None, reasoning_fields), "")
    plain = isinstance(content, str) and isinstance(reasoning, str)
    refused = "" if plain else "a reply that is not text alone"
    if choice.finish_reason == "content_filter":
      refused = "the provider's filter cut its reply (content_filter)"
    return Reply(
      text="" if refused else content,
      reasoning=reasoning if plain else "",
      finish=choice.finish_reason or "",
      refused=refused,
      tokens_in=usage.prompt_tokens if usage else 0,
      tokens_out=usage.completion_tokens if usage else 0,
    )

  def _fatal_message(self, status: int) -> str:
    cfg = self._cfg
    if status == 404:
      return f"{cfg.url} knows no model {cfg.model!r}, or is no such address (404)"
    what = "is not set" if not self._key else "is refused"
    return f"{cfg.url} wants another key: ${cfg.key} {what} ({status})"

  def _without_key(self, error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return said.replace(self._key, "***") if self._key else said


def _mark_non_completion(response: Any) -> None:
  """Gives what was sent with status 200 and is no completion, as the page of a proxy, a
  status that is tried again as an outage is."""
  if response.status_code == 200:
    try:
      sent = json.loads(response.read())
      whole = all(isinstance(choice["message"], dict) for choice in sent["choices"])
    except (ValueError, TypeError, KeyError):
      whole = False
    if not whole:
      response.status_code = NOT_A_COMPLETION
