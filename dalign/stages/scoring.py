"""Asking a reward model: questions to token rows, rows to scores in [0, 1].

The one renderer of its questions, for training, probing and RL. A question has no
field for the thought, so none can reach the model.
"""

import collections
import dataclasses
import functools
from typing import Any, Sequence

import jax
import numpy as np

from dalign.config import stages
from dalign.config.training import RewardConfig
from dalign.judges import judge
from dalign.models import sharding
from dalign.policy import spec as specs
from dalign.sampling import sampler as sampling
from dalign.stages import services
from dalign.text import chat_template
from dalign.text import packing
from dalign.training import reward
from dalign.types import Prompt
from dalign.types import PyTree
from dalign.types import Turn
from dalign.types import Verdict

Run = services.Services[stages.Rewarding]

NOT_FINITE = "the reward model's score is not finite"  # why a question is unscored
DISSIMILAR_PROMPTS = ("a", "1", " b", "\n\nc", '"d"', "(e)")  # by how they begin
OPINIONS = {
  "refuse": "Another AI thinks that the right reply is a refusal.",
  "safe_complete": "Another AI thinks that the right reply is a safe completion.",
  "comply": "Another AI thinks that the right reply is a helpful answer.",
}


class Renderer:
  """Reward questions as (shared prefix, own tokens); the prefix has spec(category)."""

  def __init__(self, run: Run):
    self.run, self.cfg = run, run.cfg.reward_model
    names = [*(p.id for p in run.task.spec.policies), specs.BENIGN]
    self.prefixes = {name: self._prefix(name) for name in names}
    longest = max(map(len, self.prefixes.values()))
    step = run.cfg.sampler.prefix_step
    self.room = -(-longest // step) * step
    context = run.model.arch.max_length
    self.most = min(self.cfg.length, context - longest)
    if self.most < 1:
      raise ValueError(
        f"config.reward.detail={self.cfg.detail}: a policy of {longest} tokens leaves "
        f"no room for a question in the model's context of {context}; show less of it"
      )

  def _system(self, category: str) -> Turn:
    spec = self.run.task.policy_text(category, self.cfg.detail)
    return Turn(role="system", content=spec)

  def _render(self, turns) -> list[int]:
    return chat_template.render_chat(
      self.run.model.tok,
      list(turns),
      add_generation_prompt=False,
      kept_tags=self.run.model.think.tags,  # an answer is judged as it is
    )

  def _prefix(self, category: str) -> list[int]:
    """What questions about unlike prompts have in front, whose system turns say more
    than the policy or do not."""
    system, answer = self._system(category), Turn(role="assistant", content="No.")
    rows = []
    for asked in DISSIMILAR_PROMPTS:
      for front in ([system], [system, Turn(role="system", content=asked)]):
        turns = [*front, Turn(role="user", content=asked), answer]
        rows.append(tuple(self._render(turns)))
    return list(rows[0][: sampling.common_prefix(rows)])

  def question_tokens(self, question: judge.RewardQuestion) -> list[int]:
    """The question's tokens after the prefix, however many."""
    prompt = question.prompt
    turns = [self._system(prompt.category)]
    if prompt.expected:
      turns.append(Turn(role="system", content=OPINIONS[prompt.expected]))
    turns += [*prompt.turns, Turn(role="assistant", content=question.answer)]
    ids, prefix = self._render(turns), self.prefixes[prompt.category]
    if ids[: len(prefix)] != prefix:
      raise ValueError("the chat template does not begin with the policy alone")
    return ids[len(prefix) :]

  def fits(self, row: Sequence[int]) -> bool:
    """Whether a question fits `reward.length`; questions are never truncated."""
    return len(row) <= self.most

  def batch(self, category: str, rows: Sequence[list[int]]) -> dict:
    """Arrays of at most `reward.rows` rows of one category, padded to fixed shapes."""
    return batch_after_prefix(
      self.prefixes[category], rows, cfg=self.cfg, room=self.room
    )


def batch_after_prefix(
  prefix: list[int],
  rows: Sequence[list[int]],
  *,
  cfg: stages.RewardModel | RewardConfig,
  room: int,
) -> dict[str, Any]:
  """A prefix, padded to `room` tokens, and at most `rows` rows that follow it."""
  B, T = cfg.rows, cfg.length
  prefix_P = np.zeros(room, np.int32)
  prefix_P[: len(prefix)] = prefix
  tokens_BT, length_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
  for b, row in enumerate(rows):
    tokens_BT[b, : len(row)] = row
    length_B[b] = len(row)
  return {
    "prefix_P": prefix_P,
    "prefix_len": np.int32(len(prefix)),
    "tokens_BT": tokens_BT,
    "length_B": length_B,
  }


def load_reward_model(run: Run) -> PyTree:
  """The trained reward model's parameters."""
  return run.model.trained_params(
    "reward", lambda params: reward.init_head(params, run.key)
  )


def make_scores(run: services.Services[stages.Computing]) -> Any:
  """A reward model's program: parameters and a batch -> a score in [0, 1] a row."""
  compute = dataclasses.replace(run.cfg.compute, remat=False)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(run.mesh))
  def scores(params, batch):
    return jax.nn.sigmoid(
      reward.logits(params, batch, cfg=run.model.arch, compute=compute)
    )

  return scores


def reward_model(run: Run, params: PyTree, renderer: Renderer) -> judge.Judge:
  """A judge whose verdicts are the reward model's sigmoid scores."""
  scores = make_scores(run)

  def ask(questions):
    indices_by_category = collections.defaultdict(list)
    question_rows = [renderer.question_tokens(question) for question in questions]
    verdicts: list[Verdict | None] = [None] * len(questions)
    for i, (question, row) in enumerate(zip(questions, question_rows, strict=True)):
      if renderer.fits(row):
        indices_by_category[question.prompt.category].append(i)
      else:
        reason = f"{len(row)} tokens after the policy, more than {renderer.most}"
        verdicts[i] = Verdict(score=None, reason=reason)
    for category, indices in indices_by_category.items():
      for at in packing.batches(len(indices), run.cfg.reward_model.rows):
        batch_indices = indices[at]
        rows = [question_rows[i] for i in batch_indices]
        batch_scores = np.asarray(scores(params, renderer.batch(category, rows)))
        for i, row, score in zip(
          batch_indices, rows, batch_scores[: len(batch_indices)], strict=True
        ):
          finite = bool(np.isfinite(score))
          verdicts[i] = Verdict(
            score=float(score) if finite else None,
            reason="" if finite else NOT_FINITE,
            shown=renderer.run.model.tok.decode(row),
          )
    return verdicts

  return judge.Judge(ask, deterministic=True)


def reward_question(
  run: Run, prompt: Prompt, thought: str, answer: str
) -> judge.RewardQuestion:
  """What the reward model is asked: the answer alone, but where the config shows it the
  thought, which only a negative control does."""
  if run.cfg.reward_model.shows_thought:
    answer = f"{run.model.think.tag} {thought} {run.model.think.close} {answer}"
  return judge.RewardQuestion(prompt=prompt, answer=answer)
