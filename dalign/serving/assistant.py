"""The model of a run, for those who ask it: replies, whole or as they are written.

The terminal (`chat.py`) and the server (`server.py`) speak for it; this file knows
neither. A model answers here as it does in the eval stage: a trained one's think block
is opened for it.
"""

from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib

import jax

from dalign.config import convert
from dalign.config import stages
from dalign.config.schema import Config
from dalign.data import prompt_sets
from dalign.models import ops
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.runs import buckets
from dalign.runs import devices
from dalign.runs import store
from dalign.sampling import live
from dalign.sampling import sampler as sampling
from dalign.sampling.programs import Weights
from dalign.stages import samples
from dalign.stages import services
from dalign.tasks import base
from dalign.text import thinking
from dalign.types import Key
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Turn

STAGES = ("base", "sft", "distill", "rl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """What the model has said of a reply so far. `finish` is "" while more is to come,
  then "stop" or "length"; tokens are counted as read, forced ones among them, and as
  drawn."""

  thought: str
  answer: str
  finish: str
  tokens_in: int
  tokens_out: int


def last_finished_stage(workdir: pathlib.Path) -> str:
  """The last stage of STAGES that a run has finished."""
  done = ("base", *(s for s in STAGES[1:] if buckets.exists(workdir / s / "params")))
  return done[-1]


class Model:
  """A model of a run's folder: its base, or what sft, distill or rl ended with.

  Nothing is written to the folder. Parameters are read when they are first needed.

  tok: its tokenizer.
  temperature, top_p, budget: of a reply, where nobody says, those of eval; its budget
    is tokens, thought and answer.
  slots: rows that are decoded together.
  max_length: tokens that the architecture was made for, prompt and completion together.
  think: how thoughts are opened for the model, or None.
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
    if stage != "base":
      self._run.model.trained_params_path(stage)
    own, replies = self._run.model, self._run.cfg.replies
    self.tok, self.max_length = own.tok, own.arch.max_length
    self.think = None if stage == "base" else own.trained_think
    self.temperature, self.top_p = replies.temperature, replies.top_p
    self.budget = replies.max_think + replies.max_new
    self.slots = self._run.cfg.sampler.slots

  @property
  def task(self) -> base.Task:
    """What its run was about."""
    return self._run.task

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

  def _think(self, with_policy: bool) -> thinking.ThinkFormat | None:
    return self._run.model.think if with_policy else self.think

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
    seed: int = 0,
  ) -> list[Sample]:
    """What the model says to each chat, which ends with a user turn. A thought that was
    opened and never ended has no answer."""
    requests = [
      sampling.Request(
        tokens=(row := self.read(turns)), row_id=(i, *row), max_new=max_new
      )
      for i, turns in enumerate(chats)
    ]
    with self.on_mesh():
      done = self._run.sampler.complete(
        self.weights,
        [requests],
        key=self.key("replies", seed),
        temperature=temperature,
        max_new=max_new,
      )
      found = {completion.request.row_id: completion for completion in done}
    prompts = map(prompt_of, chats)
    ends = [found[request.row_id] for request in requests]
    return [self._sample(*both) for both in zip(prompts, ends, strict=True)]

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
    return Reply(
      thought=thought,
      answer=answer,
      finish=partial.finish,
      tokens_in=len(partial.ask.tokens),
      tokens_out=len(partial.tokens),
    )

  @functools.cached_property
  def weights(self) -> Weights:
    with self.on_mesh():
      own, base_ = self._run.model, self.stage == "base"
      params = own.base_params() if base_ else own.trained_params(self.stage)
      return self._run.sampler.prepare(params)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
  """What stands before the first of `stops`; empty ones stop nothing."""
  found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
  return text[: min(found, default=len(text))]


def prompt_of(turns: Sequence[Turn], category: str = specs.BENIGN) -> Prompt:
  """A chat of which nothing else is known, as a Prompt."""
  return Prompt(
    id=prompt_sets.digest(turns),
    turns=tuple(turns),
    category=category,
    expected="comply",
    kind="helpful",
  )
