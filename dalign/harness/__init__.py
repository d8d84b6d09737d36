"""The model of a run, for the task suites of others: replies and log-likelihoods.

`inspect_provider.py` speaks for it in inspect_ai, `lm_eval_model.py` in EleutherAI's
lm-evaluation-harness; this file knows neither. A model answers here as it does in the
eval stage: a trained one's think block is opened for it, and what is scored is the
answer alone.
"""

import collections
from collections.abc import Sequence
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

from dalign import buckets
from dalign import compose
from dalign import config as configs
from dalign import model as decoder
from dalign import ops
from dalign import sampler as sampling
from dalign import spec as specs
from dalign import store
from dalign.pipeline import context
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Turn

STAGES = ("base", "sft", "rl")
LINE = 128  # scored rows are in lines of a multiple of so many tokens


class Model:
  """A model of a run's folder: its base, or what the stage sft or rl ended with.

  Nothing is written to the folder. Parameters are read when they are first needed.
  """

  def __init__(self, workdir: str, stage: str = "rl"):
    """Raises ValueError for a folder without a run, a stage that is none of STAGES, and
    one that has not been run."""
    place = buckets.absolute(os.path.expanduser(workdir))
    if stage not in STAGES:
      raise ValueError(f"stage: wanted one of {', '.join(STAGES)}, got {stage!r}")
    written = place / "config.json"
    if not written.is_file():
      raise ValueError(f"{written} is missing: wanted the --workdir of a run of dalign")
    context.prepare_jax()
    self.run = context.Run(configs.of_json(store.read_json(written)), place)
    self.stage = stage
    self._asked: collections.Counter = collections.Counter()
    self._scorers: dict[int, context.Scorer] = {}
    if stage != "base":
      self.run.trained(stage)

  @property
  def think(self):
    """How thoughts are opened for the model, or None."""
    return None if self.stage == "base" else self.run.thinks

  @property
  def max_length(self) -> int:
    """Tokens that the architecture was made for, prompt and completion together."""
    return self.run.arch.max_length

  def read(self, turns: Sequence[Turn]) -> tuple[int, ...]:
    """The tokens of a chat up to where the model goes on, its opened thought among
    them. Control tokens come from the chat template alone."""
    return compose.opened(self.run.tok, turns, self.think)

  def replies(
    self,
    chats: Sequence[Sequence[Turn]],
    *,
    max_new: int,
    temperature: float,
    seed: int = 0,
  ) -> list[Sample]:
    """What the model says to each chat, which ends with a user turn.

    One that is asked again is answered anew, with other randomness; so epochs differ.
    A thought that was opened and never ended has no answer.
    """
    prompts = [_prompt(turns) for turns in chats]
    rows = [self.read(prompt.turns) for prompt in prompts]
    done = self._complete(rows, max_new=max_new, temperature=temperature, seed=seed)
    return [
      self._sample(prompt, completion)
      for prompt, completion in zip(prompts, done, strict=True)
    ]

  def _sample(self, prompt: Prompt, done: sampling.Completion) -> Sample:
    sample = self.run.sample_row(prompt, done, 0, self.think)
    if self.think and self.think.close not in self.run.tok.decode(done.tokens):
      return dataclasses.replace(sample, thought=sample.answer, answer="")
    return sample

  def continuations(
    self,
    rows: Sequence[Sequence[int]],
    *,
    max_new: int,
    temperature: float,
    seed: int = 0,
  ) -> list[str]:
    """The text that the model writes after rows of tokens, no thought opened."""
    done = self._complete(rows, max_new=max_new, temperature=temperature, seed=seed)
    return [self.run.tok.decode(completion.tokens) for completion in done]

  def _complete(
    self, rows, *, max_new: int, temperature: float, seed: int
  ) -> list[sampling.Completion]:
    requests = []
    for row in map(tuple, rows):
      row_id = context.row_id(self._asked[row], *row)
      self._asked[row] += 1
      requests.append(sampling.Request(tokens=row, row_id=row_id, max_new=max_new))
    key = ops.stream(self.run.key, "harness", seed)
    with jax.set_mesh(self.run.mesh):
      done = context.complete(
        self.run,
        self._weights,
        [requests],
        key=key,
        temperature=temperature,
        max_new=max_new,
        grows=True,
      )
      found = {completion.request.row_id: completion for completion in done}
    return [found[request.row_id] for request in requests]

  def scores(
    self, rows: Sequence[Sequence[int]], starts: Sequence[int]
  ) -> list[tuple[float, bool]]:
    """For each row the log-probability in nats of its tokens from its start, at least
    1, onward, at temperature 1, and whether each of them is the likeliest."""
    if not rows:
      return []
    longest = max(map(len, rows))
    own = self.run.cfg.sft.batch
    length = max(own.length, sampling.bucket(longest, LINE))
    if length not in self._scorers:
      shape = dataclasses.replace(own, length=length)
      self._scorers[length] = self._scorer(shape)
    with jax.set_mesh(self.run.mesh):
      found = self._scorers[length](self._params, list(map(list, rows)), list(starts))
    return [(float(x[:, 0].sum()), bool(x[:, 1].all())) for x in found]

  @functools.cached_property
  def _params(self):
    with jax.set_mesh(self.run.mesh):
      if self.stage == "base":
        return self.run.base_params()
      return self.run.trained_params(self.stage)

  @functools.cached_property
  def _weights(self) -> sampling.Weights:
    with jax.set_mesh(self.run.mesh):
      return self.run.sampler.prepare(self._params)

  def _scorer(self, shape: configs.BatchConfig) -> context.Scorer:
    compute = dataclasses.replace(self.run.cfg.compute, remat=False)

    def score(params, batch):
      """[B, T, 2]: of each wanted token its logp, and whether it is the likeliest."""
      wanted_BT = batch["wanted_BT"][:, 1:]
      stats = decoder.target_stats(
        params, batch, wanted_BT, cfg=self.run.arch, compute=compute
      )
      both_BT2 = jnp.stack([stats.logp, stats.hit], axis=-1)
      return jnp.pad(both_BT2, ((0, 0), (1, 0), (0, 0)))

    return context.Scorer(self.run, shape, score=score)


def cut(text: str, stops: Sequence[str]) -> str:
  """What stands before the first of `stops`; empty ones stop nothing."""
  found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
  return text[: min(found, default=len(text))]


def _prompt(turns: Sequence[Turn]) -> Prompt:
  """A chat of which nothing else is known."""
  return Prompt(
    id=str(context.row_id(*(turn.content for turn in turns))),
    turns=tuple(turns),
    category=specs.BENIGN,
    expected="comply",
    kind="helpful",
  )
