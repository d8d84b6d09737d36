"""Config of what is trained on what the model samples: distillation and RL."""

import dataclasses
import typing
from typing import Annotated, Any, Literal, Mapping

from dalign.config.fields import Bounds
from dalign.config.fields import Checked
from dalign.config.fields import Count
from dalign.config.fields import Metadata
from dalign.config.fields import Natural
from dalign.config.fields import NotNegative
from dalign.config.fields import Positive
from dalign.config.fields import Share
from dalign.config.fields import SomeShare
from dalign.config.fields import limit
from dalign.config.fields import or_function
from dalign.config.fields import refuse
from dalign.config.training import BatchConfig
from dalign.config.training import OptimizerConfig

Response = Literal["refuse", "safe_complete", "comply"]  # types.EXPECTED


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Checked):
  """On-policy specification distillation, beside RL or in its place: the model answers
  without the specification, and a teacher that has it in its prompt says of each token
  how likely it finds it (distill.make_loss).

  start: "sft" or "base".
  teacher: whose parameters the teacher has: those of the "base", or of "sft".
  demonstrations: worked examples in the teacher's context, or all that there are.
  loss: the reverse KL of a token "exact", over the whole vocabulary, or its estimate by
    the token that was "sampled".
  steps: updates that the stage makes.
  prompts: prompts a step, those of `capability` among them.
  expected: the ideal response types of the prompts that are not of capability.
  mixture: how much more often than the others prompts of a category or of an ideal
    response type are drawn, as {"refuse": 2.0, "privacy": 0.5}: a prompt of both has
    both; {} draws each category and type as often.
  capability: how many prompts of a step have a known answer; of them the teacher reads
    no specification.
  samples: rollouts a prompt.
  temperature: temperature of sampling, and of the log-probabilities of both.
  max_new: tokens of a rollout at the most.
  probed: training prompts that both answer before the first step: how often the
    specification changes the decision is what there is to learn; 0 asks nothing.
  stop_kl: nats of log pi - log pi_start that the rollouts of a step have in the mean,
    above which the stage stops; 0 is no limit.
  teacher_rows, teacher_length: lines that the teacher reads at once, and their tokens:
    specification, prompt and rollout, the former once for all that share them.
  checkpoint_every: steps between checkpoints.
  show_every: steps between those whose rollouts are kept to be read.
  """

  start: Literal["base", "sft"]
  teacher: Literal["base", "sft"]
  demonstrations: Natural
  loss: Literal["exact", "sampled"]
  steps: Count
  prompts: Count
  expected: tuple[Response, ...]
  mixture: Mapping[str, Any]
  capability: Natural
  samples: Count
  temperature: Positive
  max_new: Count
  probed: Natural
  stop_kl: NotNegative
  teacher_rows: Count
  teacher_length: Count
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: Count
  show_every: Count

  def __post_init__(self):
    super().__post_init__()
    _check_prompts(self)


def _check_prompts(config: "DistillConfig | RLConfig") -> None:
  """ValueError where the prompts of a step make no sense."""
  if not config.expected:
    refuse(config, "expected", f"some of {', '.join(typing.get_args(Response))}")
  if config.capability >= config.prompts:
    refuse(config, "capability", f"0 to {config.prompts - 1}, fewer than prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Checked):
  """The choices that a policy-gradient algorithm is made of: `configs/algorithms.py`
  has those of REINFORCE, RLOO, GRPO, Dr.GRPO, DAPO, GSPO, REINFORCE++ and PPO.

  advantages: of a rollout "none" (its reward), "rloo", "dr_grpo" or "grpo", of a token
    "to_go" (its rewards to go), "group_to_go" (of rewards less their group's mean) or
    "gae" (from a value head that is learned beside the policy).
  whiten: advantages get mean 0 and standard deviation 1 over the tokens of a step.
  ratio: importance ratios of a "token", or of a whole "sequence" (GSPO).
  clip_low, clip_high: gains stop to grow at ratios 1 - low and 1 + high.
  ratio_cap: the most a ratio counts, whatever the sign of its advantage.
  mean: gains are averaged over "tokens", over "rollouts" of means over tokens, or
    summed and divided by rollouts times the "constant" length_norm.
  length_norm: tokens that stand for a rollout's length where mean is "constant".
  kl: to the start, "none", in the "reward" (k1), or as a penalty "k2", "k3" or
    "k3_as_k2" (policy_gradient.kl_penalty), times kl_weight.
  kl_weight: reward that a nat of KL costs, or loss that it adds.
  gae_lambda: of "gae" alone: the weight of rewards a token further on, in [0, 1].
  value_weight: of "gae" alone: the weight of the value head's loss.
  overlong: tokens before max_new over which a penalty grows to 1 (DAPO), or 0.
  mask_truncated: rollouts that max_new has cut are not trained on.
  """

  advantages: Literal["none", "rloo", "dr_grpo", "grpo", "to_go", "group_to_go", "gae"]
  whiten: bool
  ratio: Literal["token", "sequence"]
  clip_low: Annotated[
    float, Bounds("more than 0, at most 1", exclusiveMinimum=0.0, maximum=1.0)
  ]
  clip_high: Positive
  ratio_cap: Positive
  mean: Literal["tokens", "rollouts", "constant"]
  length_norm: Positive
  kl: Annotated[
    Literal["none", "reward", "k2", "k3", "k3_as_k2"],
    "as a penalty k1 has no gradient in expectation",
  ]
  kl_weight: NotNegative
  gae_lambda: Share
  value_weight: NotNegative
  overlong: Natural
  mask_truncated: bool

  def __post_init__(self):
    super().__post_init__()
    if self.kl == "none" and self.kl_weight:
      refuse(self, "kl_weight", "0 where kl is none")
    if self.ratio == "sequence" and self.of_tokens:
      refuse(self, "ratio", "token, where advantages are those of tokens")

  @property
  def grouped(self) -> bool:
    """Whether advantages compare the rollouts of a group."""
    return self.advantages in ("rloo", "dr_grpo", "grpo", "group_to_go")

  @property
  def of_tokens(self) -> bool:
    """Whether the tokens of a rollout have advantages of their own."""
    return self.advantages in ("to_go", "group_to_go", "gae")

  @property
  def learns_values(self) -> bool:
    """Whether a value head is learned."""
    return self.advantages == "gae"

  @property
  def penalised(self) -> bool:
    """Whether the KL is part of the loss."""
    return self.kl in ("k2", "k3", "k3_as_k2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(Checked):
  """Stage 4. A step samples prompts x samples rollouts and makes one update of them.

  start: "sft", or "base" for the arm without SFT.
  reward: "model" (the trained reward model), "rubric" (the rubric judge, which needs
    metadata), "judge" (the filter's own judge, one vote), or a function of yours,
    "python:FILE:FUNCTION".
  metadata: what the rubric, the filter's judge or the function is told, as
    `filter.metadata`.
  helpful: a second judge, another of these, whose scores are joined to those of
    `reward`; or "none".
  combine: how they are joined (rollout.combined): their "product", their "mean", or
    "split": the second's of prompts to be complied with, the first's of all others.
  steps: updates that the stage makes.
  prompts: prompts a step, those of `capability` among them.
  expected: the ideal response types of the prompts that are not of capability.
  mixture: how often prompts of a category or an ideal response type are drawn, as in
    `distill.mixture`.
  capability: how many prompts of a step have a known answer.
  samples: rollouts a prompt.
  temperature: temperature of sampling, and of the policy's log-probabilities.
  max_new: tokens of a rollout at the most.
  resample: how often groups without a difference are replaced by those of new prompts.
  unscored: the share of a step's answers on which the judge may have no verdict before
    RL stops.
  judge_errors: the share of a probe's answers (probing.probes) that the judge of
    `reward` may get wrong before RL refuses it; 1 asks nothing.
  scan_words: RL stops where its judge was shown this many words in a row of a thought
    that neither answer, prompt nor specification has; 0 looks for none.
  skip_kl, stop_kl: nats of log pi - log pi_start that the rollouts of a step have in
    the mean, above which it changes nothing, or RL stops; 0 is no limit.
  stop_gap: RL stops where trainer and sampler differ by more nats a token, in the mean,
    about what was just sampled; 0 is no limit.
  checkpoint_every: steps between checkpoints.
  show_every: steps between those whose rollouts are kept to be read.
  audit: held-out prompts that are answered and graded, as evaluation does, every
    `show_every` steps, to be compared with the reward; 0 for none.
  """

  start: Literal["base", "sft"]
  reward: Annotated[str, or_function("model", "rubric", "judge")]
  metadata: Metadata
  helpful: Annotated[str, or_function("none", "model", "rubric", "judge")]
  combine: Literal["product", "mean", "split"]
  steps: Count
  prompts: Count
  expected: tuple[Response, ...]
  mixture: Mapping[str, Any]
  capability: Natural
  samples: Count
  temperature: Positive
  max_new: Count
  resample: Natural
  unscored: SomeShare = limit()
  judge_errors: Share = limit()
  scan_words: Natural = limit()
  skip_kl: NotNegative
  stop_kl: NotNegative = limit()
  stop_gap: NotNegative = limit()
  objective: ObjectiveConfig
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: Count
  show_every: Count
  audit: Natural

  def __post_init__(self):
    super().__post_init__()
    if self.samples < 1 + self.objective.grouped:
      refuse(self, "samples", "at least 2, for the baseline of a group")
    if self.resample and not self.objective.grouped:
      refuse(self, "resample", "0 where groups are not compared")
    if "rubric" in (self.reward, self.helpful) and self.metadata == "none":
      refuse(self, "metadata", "told, or noisy:SHARE, without which the rubric is mute")
    if self.helpful == self.reward:
      refuse(self, "helpful", "another judge than rl.reward, or none")
    _check_prompts(self)
