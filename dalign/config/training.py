"""Config of what is trained on rows: the optimizer, SFT, the reward model, and the base
of the policy world."""

import dataclasses
from typing import Annotated, Any, Literal, Mapping

from dalign.config.fields import Bounds
from dalign.config.fields import Checked
from dalign.config.fields import Count
from dalign.config.fields import Form
from dalign.config.fields import Metadata
from dalign.config.fields import Natural
from dalign.config.fields import NotNegative
from dalign.config.fields import Positive
from dalign.config.fields import Share
from dalign.config.fields import limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
  """AdamW with warm-up and cosine decay.

  learning_rate: AdamW's peak rate, a step.
  matrix_rate: the layers' matrices are updated by Muon (optax.contrib.muon) at this
    peak rate, all else by NAdamW; with 0 all of it by AdamW.
  warmup_share: the share of the steps over which rates rise from 0 to their peak.
  final_share: the share of the peak rate that is left after the last step.
  beta1, beta2: decay a step of the mean gradient, and of the mean squared one.
  weight_decay: the share of themselves that parameters lose a step, times the learning
    rate.
  clip_norm: gradients are scaled down to this global norm at the most.
  skip_norm: a step whose gradient has a global norm above this, before it is scaled,
    changes nothing; 0 is no limit.
  stop_norm: a step whose gradient is above this stops the stage, its batch kept; 0 is
    no limit.
  """

  learning_rate: Positive
  matrix_rate: NotNegative
  warmup_share: Share
  final_share: Share
  beta1: float
  beta2: float
  weight_decay: float
  clip_norm: Positive
  skip_norm: NotNegative
  stop_norm: NotNegative = limit()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig(Checked):
  """Shapes of one update.

  micro: micro-batches an update, one after the other.
  rows: lines a micro-batch.
  length: tokens a line.
  """

  micro: Count
  rows: Count
  length: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(Checked):
  """Stage 3. Epochs over the kept rows, and what is mixed in with them.

  epochs: how often each row is learned.
  spec_in_prompt: kept rows are learned with the specification left in their prompt, as
    stage 1 has it: so a teacher for distillation is made, not what the method is after.
  worked: the spec's own worked examples are learned too, with their thoughts in brief.
  most: kept rows that are learned whole, at the most: a draw balanced over category
    and ideal response type. What the others recall is learned in `recall_epochs`.
  capability: how many training prompts with a known answer, with that answer (METHOD:
    capability data).
  recall_epochs: so many epochs, before the others, of nothing but the id of the clause
    that decides, with which all thoughts then begin; 0 leaves thoughts as they are.
  average_share: the share of the steps, the last ones, whose parameters are averaged
    into what SFT ends with (1803.05407); 0 takes those of the last step.
  leak_words: so many words in a row of the specification's make a row one that leaks
    it, which is refused.
  checkpoint_every: steps between checkpoints.
  """

  epochs: Count
  spec_in_prompt: bool
  worked: bool
  most: Count
  capability: Natural
  recall_epochs: Natural
  average_share: Share
  leak_words: Count
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Checked):
  """The reward model.

  start: "base" or "sft", where its trunk comes from.
  labels: who scored what it learns: the "judge", which reads the spec, or "rubric".
  drafts: it learns of what the base answers without the spec too.
  shows_thought: it sees the thought before the answer, in RL too: only to find out what
    that does.
  detail: how much of the spec it reads, or "none" of it.
  metadata: what it is told, as another AI's opinion, of the ideal response type; as
    `filter.metadata`.
  steps: updates that the stage makes.
  rows: judged answers an update, all of one category.
  length: tokens that are read after the policy, the prompt's and the answer's. What has
    more is not learned, and has no score.
  held_out: the share of prompts it is measured on and does not learn.
  point_weight, pair_weight, answer_weight: weights of its losses, of each score, of
    which of two answers to a prompt is the better, and of which of two prompts an
    answer suits better (reward.loss).
  checkpoint_every: steps between checkpoints.
  """

  start: Literal["base", "sft"]
  labels: Literal["judge", "rubric"]
  drafts: bool
  shows_thought: bool
  detail: Literal["full", "brief", "clauses", "none"]
  metadata: Metadata
  steps: Count
  rows: Count
  length: Count
  held_out: Share
  point_weight: NotNegative
  pair_weight: NotNegative
  answer_weight: NotNegative
  optimizer: OptimizerConfig
  checkpoint_every: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeErrors(Checked):
  """Errors that the filter's judge is made to make in the policy world, in every stage
  that asks it, beside its own: to measure what they cost (`judge.with_errors`).

  rate: the share of votes that are turned: what is good gets 0, all else 1.
  habit: answers that the judge has a weakness for: of more than N words, "long:N", or
    with a word, "word:WORD"; "" for none.
  habit_rate: the share of the votes on such answers that are 1, whatever they say.
  """

  rate: Share
  habit: Annotated[str, Form("|long:[1-9][0-9]*|word:\\S+")]
  habit_rate: Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig(Checked):
  """The policy world (`world.py`), and stage 0, which makes its base.

  spec: the number of its specification.
  depth: how many conditions of an asker (a role, a place, a time, a company) each
    policy has an exception for: with one, 1 or 2 clauses decide a prompt, with four up
    to 5.
  base: "bundled", the base that comes with dalign, which one run of the recipe left and
    no other recipe takes; or "train" one from scratch.
  first_lessons: as `lessons`, in the first first_share of the steps.
  first_share: the share of the steps that have first_lessons.
  lessons: what share of the base's rows each kind of lesson has.
  declines: the share of prompts that a base without a specification refuses for no
    reason.
  steps: updates that the stage makes.
  checkpoint_every: steps between checkpoints.
  judge_errors: how the judge errs; nothing of the base.
  """

  spec: int
  depth: Annotated[int, Bounds("from 1 to 4", minimum=1, maximum=4)]
  base: Literal["bundled", "train"]
  first_lessons: Mapping[str, Any]
  first_share: Share
  lessons: Mapping[str, Any]
  declines: Share
  steps: Count
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: Count
  judge_errors: JudgeErrors = limit()  # of the base: `stages.Judging` keeps it
