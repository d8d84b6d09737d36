"""The model of a run, for those who ask it: replies, streams and log-likelihoods.

The task suites of others (`harness/`), the terminal (`chat.py`) and the server
(`server.py`) speak for it; this file knows none of them. A model answers here as it
does in the eval stage: a trained one's think block is opened for it.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import math
import os
import pathlib
import queue
import threading

import jax
import jax.numpy as jnp
import numpy as np

from dalign.config import convert
from dalign.config import stages
from dalign.config.schema import Config
from dalign.data import prompt_sets
from dalign.models import ops
from dalign.models import transformer as decoder
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.runs import buckets
from dalign.runs import devices
from dalign.runs import distributed
from dalign.runs import store
from dalign.sampling import likelihood
from dalign.sampling import live
from dalign.sampling import sampler as sampling
from dalign.sampling.programs import Weights
from dalign.sampling.programs import bucket_size
from dalign.stages import samples
from dalign.stages import services
from dalign.tasks import base
from dalign.text import chat_template
from dalign.text import thinking
from dalign.types import Key
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Turn

STAGES = ("base", "sft", "distill", "rl")
LINE_MULTIPLE = 128  # scored rows are in lines of a multiple of so many tokens
TOP_LOGPROBS = 5  # tokens known of each place of a row, as in OpenAI's protocol
MAX_SCORED_ROWS = 256  # rows that are scored together at the most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """What the model has said of a reply so far. `finish` is "" while more is to come,
  then "stop" or "length"; `tokens` are those that it drew, and those read are counted,
  forced ones among them."""

  thought: str
  answer: str
  finish: str
  tokens_in: int
  tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
  """A token after those before it: its log-probability in nats at temperature 1, and
  the likeliest tokens there with theirs, best first."""

  logp: float
  likeliest: tuple[tuple[int, float], ...]


def last_finished_stage(workdir: pathlib.Path) -> str:
  """The last stage of STAGES that a run has finished."""
  done = ("base", *(s for s in STAGES[1:] if buckets.exists(workdir / s / "params")))
  return done[-1]


class Model:
  """A model of a run's folder: its base, or what sft, distill or rl ended with.

  Nothing is written to the folder. Parameters are read when they are first needed.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    stage: str = "rl",
    cfg: Config | None = None,
  ):
    """`stage` "" is the last that the run has finished; `cfg` takes the place of the
    run's own config. Raises ValueError for a folder without a run, a stage that is none
    of STAGES, and one that has not been run."""
    place = buckets.absolute(os.path.expanduser(workdir))
    stage = stage or last_finished_stage(place)
    if stage not in STAGES:
      raise ValueError(f"stage: wanted one of {', '.join(STAGES)}, got {stage!r}")
    if cfg is None:
      written = place / "config.json"
      if not written.is_file():
        raise ValueError(
          f"{written} is missing: wanted the --workdir of a run of dalign"
        )
      cfg = convert.of_json(store.read_json(written))
    devices.prepare()
    self._run = services.of(stages.Talk, cfg, services.Workspace(cfg, place))
    self.workdir = self._run.store.workdir
    self.stage = stage
    self._asked: collections.Counter = collections.Counter()
    self._scorers: dict[tuple[Callable, int], likelihood.Scorer] = {}
    if stage != "base":
      self._run.model.trained_params_path(stage)

  @property
  def tok(self) -> chat_template.Tokenizer:
    """The model's tokenizer."""
    return self._run.model.tok

  @property
  def task(self) -> base.Task:
    """What its run was about."""
    return self._run.task

  @property
  def temperature(self) -> float:
    """The temperature of a reply where nobody says: that of eval."""
    return self._run.cfg.replies.temperature

  @property
  def top_p(self) -> float:
    """The share of the probability that is sampled from where nobody says."""
    return self._run.cfg.replies.top_p

  @property
  def slots(self) -> int:
    """Rows that are decoded together."""
    return self._run.cfg.sampler.slots

  def key(self, name: str, number: int = 0) -> Key:
    """A key of its own for each use of randomness."""
    return ops.stream(self._run.key, name, number)

  def sampler(self, *, prefill: int) -> sampling.Sampler:
    """A sampler that encodes so many prompts together."""
    shapes = dataclasses.replace(self._run.cfg.sampler, prefill=prefill)
    return self._run.model.sampler(self._run.cfg.compute, shapes)

  def on_mesh(self):
    """Has JAX compute on the model's mesh, used `with`."""
    return jax.set_mesh(self._run.mesh)

  @property
  def think(self) -> thinking.ThinkFormat | None:
    """How thoughts are opened for the model, or None."""
    return None if self.stage == "base" else self._run.model.trained_think

  def _think(self, with_policy: bool) -> thinking.ThinkFormat | None:
    return self._run.model.think if with_policy else self.think

  @property
  def max_length(self) -> int:
    """Tokens that the architecture was made for, prompt and completion together."""
    return self._run.model.arch.max_length

  @property
  def budget(self) -> int:
    """Tokens of a reply, thought and answer, where nobody says: those of eval."""
    return self._run.cfg.replies.max_think + self._run.cfg.replies.max_new

  def read(
    self, turns: Sequence[Turn], *, with_policy: bool = False
  ) -> tuple[int, ...]:
    """The tokens of a chat up to where the model goes on, its opened thought among
    them; a base thinks only where a policy is in the chat (`with_policy`). Control
    tokens come from the chat template alone."""
    return prompting.render_prompt(self.tok, turns, self._think(with_policy))

  def replies(
    self,
    chats: Sequence[Sequence[Turn]],
    *,
    max_new: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
  ) -> list[Sample]:
    """What the model says to each chat, which ends with a user turn.

    One that is asked again is answered anew, with other randomness; so epochs differ.
    A thought that was opened and never ended has no answer.
    """
    prompts = [prompt_of(turns) for turns in chats]
    rows = [self.read(prompt.turns) for prompt in prompts]
    how = dict(max_new=max_new, temperature=temperature, top_p=top_p)
    done = self._complete(rows, seed, how)
    return [
      self._sample(prompt, completion)
      for prompt, completion in zip(prompts, done, strict=True)
    ]

  def _sample(self, prompt: Prompt, done: sampling.Completion) -> Sample:
    sample = samples.from_completion(self._run.model, prompt, done, 0, self.think)
    if self.think and self.think.close not in self.tok.decode(done.tokens):
      return dataclasses.replace(sample, thought=sample.answer, answer="")
    return sample

  def partial_reply(
    self,
    turns: Sequence[Turn],
    partial: live.PartialCompletion,
    *,
    with_policy: bool = False,
  ) -> Reply:
    """The reply of a chat that is being written, which was `read` so: thought and
    answer only ever grow. The first closing tag ends the thought."""
    think_format = self._run.model.think.of(turns[-1].content)
    written = (think_format.open if self._think(with_policy) else "") + self.tok.decode(
      partial.tokens
    )
    thought, answer = thinking.split_partial_thought(
      written, think_format, complete=bool(partial.finish)
    )
    return _reply(partial, thought, answer)

  def partial_text(self, partial: live.PartialCompletion) -> Reply:
    """The reply of a row of tokens that is no chat: all that is written is answer."""
    written = self.tok.decode(partial.tokens)
    return _reply(
      partial, "", written if partial.finish else thinking.stable_prefix(written, ())
    )

  def continuations(
    self,
    rows: Sequence[Sequence[int]],
    *,
    max_new: int,
    temperature: float,
    seed: int = 0,
  ) -> list[str]:
    """The text that the model writes after rows of tokens, no thought opened."""
    done = self._complete(rows, seed, dict(max_new=max_new, temperature=temperature))
    return [self.tok.decode(completion.tokens) for completion in done]

  def _complete(self, rows, seed: int, how: dict) -> list[sampling.Completion]:
    requests = []
    for row in map(tuple, rows):
      row_id = self._asked[row], *row
      self._asked[row] += 1
      requests.append(
        sampling.Request(tokens=row, row_id=row_id, max_new=how["max_new"])
      )
    key = self.key("harness", seed)
    with self.on_mesh():
      done = self._run.sampler.complete(
        self.weights,
        [requests],
        key=key,
        grow_to_fit=True,
        **how,
      )
      found = {completion.request.row_id: completion for completion in done}
    return [found[request.row_id] for request in requests]

  def scores(
    self, rows: Sequence[Sequence[int]], starts: Sequence[int]
  ) -> list[tuple[float, bool]]:
    """For each row the log-probability in nats of its tokens from its start, at least
    1, onward, at temperature 1, and whether each of them is the likeliest."""
    found = self._score_rows(_make_hit_scorer, rows, starts)
    return [(float(x[:, 0].sum()), bool(x[:, 1].all())) for x in found]

  def top_logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[Scored]]:
    """For each row the log-probability of each token but the first, and the most
    probable tokens at its place."""

    def read(x: np.ndarray) -> Scored:
      logp, (best, ids) = x[0], x[1:].reshape(2, TOP_LOGPROBS).tolist()
      return Scored(
        logp=float(logp), likeliest=tuple(zip(map(int, ids), best, strict=True))
      )

    found = self._score_rows(_make_top_logprobs_scorer, rows, [1] * len(rows))
    return [[*map(read, row)] for row in found]

  def _score_rows(self, make: Callable, rows, starts) -> list[np.ndarray]:
    """Of each row the numbers of its tokens from its start onward, by the `score` of a
    Scorer that `make(cfg=, compute=)` makes."""
    if not rows:
      return []
    shape = self._run.cfg.scoring
    length = max(shape.length, bucket_size(max(map(len, rows)), LINE_MULTIPLE))
    if (make, length) not in self._scorers:
      self._scorers[make, length] = self._run.scorer(
        dataclasses.replace(shape, length=length), make=make
      )
    with self.on_mesh():
      return self._scorers[make, length](
        self._params, list(map(list, rows)), list(starts)
      )

  @functools.cached_property
  def _params(self):
    with self.on_mesh():
      if self.stage == "base":
        return self._run.model.base_params()
      return self._run.model.trained_params(self.stage)

  @functools.cached_property
  def weights(self) -> Weights:
    with self.on_mesh():
      return self._run.sampler.prepare(self._params)


def _make_hit_scorer(*, cfg, compute):
  """[B, T, 2]: of each wanted token its logp, and whether it is the likeliest."""

  def score(params, batch):
    wanted_BT = batch["wanted_BT"][:, 1:]
    stats = decoder.target_stats(params, batch, wanted_BT, cfg=cfg, compute=compute)
    both_BT2 = jnp.stack([stats.logp, stats.hit], axis=-1)
    return jnp.pad(both_BT2, ((0, 0), (1, 0), (0, 0)))

  return score


def _make_top_logprobs_scorer(*, cfg, compute):
  """[B, T, 1 + 2 TOP_LOGPROBS]: of each token its logp, then those of the likeliest
  there, then their ids, which float32 holds up to 2^24."""

  def score(params, batch):
    hidden_BTD = decoder.hidden(params, batch, cfg=cfg, compute=compute)
    B, T, D = hidden_BTD.shape
    targets_BT = jnp.roll(batch["tokens_BT"], -1, axis=1)

    def one(part):
      hidden_CD, targets_C = part
      logits_CV = decoder.logits(params, hidden_CD, cfg=cfg, compute=compute)
      logp_CV = jax.nn.log_softmax(logits_CV.astype(jnp.float32))
      own_C1 = jnp.take_along_axis(logp_CV, targets_C[:, None], axis=1)
      best_CK, ids_CK = jax.lax.top_k(logp_CV, TOP_LOGPROBS)
      return jnp.concatenate([own_C1, best_CK, ids_CK.astype(jnp.float32)], axis=1)

    C = math.gcd(T, LINE_MULTIPLE)  # never logits of all tokens at once
    parts = hidden_BTD.reshape(-1, C, D), targets_BT.reshape(-1, C)
    found_BTN = jax.lax.map(one, parts).reshape(B, T, -1)
    return jnp.pad(found_BTN[:, :-1], ((0, 0), (1, 0), (0, 0)))

  return score


class Engine:
  """Serves concurrent requests to a model, each as a stream of growing replies.

  One thread decodes for all of them and one scores; use it `with`, which ends both.
  """

  def __init__(self, model: Model):
    """Raises ValueError in a run of several processes."""
    if distributed.is_multi_process():
      raise ValueError("one process answers alone; start this on one host")
    self.model = model
    self._asked = 0
    self._requests: queue.SimpleQueue[_PendingRequest | None] = queue.SimpleQueue()
    self._rows_to_score: queue.SimpleQueue[
      tuple[Sequence[int], futures.Future] | None
    ] = queue.SimpleQueue()
    self._threads = [
      threading.Thread(target=work, name=name, daemon=True)
      for name, work in (("decoder", self._work), ("scorer", self._score))
    ]

  def __enter__(self) -> "Engine":
    _ = self.model.weights  # before anybody waits for them
    for thread in self._threads:
      thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._requests.put(None)
    self._rows_to_score.put(None)
    for thread in self._threads:
      thread.join()

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
    read: Callable[[live.PartialCompletion], Reply],
    on_reply: Callable[[Reply | Exception], None],
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
    self, row: Sequence[int], read: Callable[[live.PartialCompletion], Reply], **how
  ) -> Iterator[Reply]:
    """The replies that `ask` would have heard; closing it gives the row up."""
    replies: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()
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

  def score(self, row: Sequence[int]) -> futures.Future[list[Scored]]:
    """A future of the scores of a row's tokens but the first. Rows that arrive while
    others are scored are scored together."""
    future: futures.Future[list[Scored]] = futures.Future()
    self._rows_to_score.put((row, future))
    return future

  def _score(self) -> None:
    """The thread that scores, until it is told to end."""
    ended = False
    while not ended:
      batch = [self._rows_to_score.get()]
      while len(batch) < MAX_SCORED_ROWS and not self._rows_to_score.empty():
        batch.append(self._rows_to_score.get())
      ended = None in batch
      running = [one for one in batch if one and one[1].set_running_or_notify_cancel()]
      try:
        found = self.model.top_logprobs([row for row, _ in running])
      except Exception as error:
        for _, future in running:
          future.set_exception(error)
        continue
      for (_, future), scored in zip(running, found, strict=True):
        future.set_result(scored)

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
    self._last: Reply | None = None

  def update(self, partial: live.PartialCompletion) -> bool:
    """Passes on what is new; True when the reply is complete."""
    if self.cancelled.is_set():
      return True
    reply = self._read(partial)
    answer = cut_at_stop(reply.answer, self._stops)
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


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
  """What stands before the first of `stops`; empty ones stop nothing."""
  found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
  return text[: min(found, default=len(text))]


def _visible_text(reply: Reply) -> tuple[str, str]:
  return reply.thought, reply.answer


def _reply(partial: live.PartialCompletion, thought: str, answer: str) -> Reply:
  return Reply(
    thought=thought,
    answer=answer,
    finish=partial.finish,
    tokens_in=len(partial.ask.tokens),
    tokens=partial.tokens,
  )


def prompt_of(turns: Sequence[Turn], category: str = specs.BENIGN) -> Prompt:
  """A chat of which nothing else is known, as a Prompt."""
  return Prompt(
    id=prompt_sets.digest(turns),
    turns=tuple(turns),
    category=category,
    expected="comply",
    kind="helpful",
  )
