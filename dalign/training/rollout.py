"""Rollouts: what becomes of them between sampling and the update, as pure functions.

Prompts of a step, rewards from verdicts, advantages, metrics, and the batch. Knows no
sampler, judge, model or file.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from dalign.config.on_policy import ObjectiveConfig
from dalign.data import prompt_sets
from dalign.text import packing
from dalign.text import words
from dalign.training import advantages
from dalign.types import EXPECTED
from dalign.types import Leaf
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
  """One sampled completion of a prompt, and what a step finds out about it.

  prompt_tokens: what the policy was given, without a forced opening.
  behaviour: of each sampled token the log-probability that it was sampled with, in
    nats.
  score: the judge's, or 1 for a right answer that is known; in [0, 1].
  unscored: why there is no verdict, "" where there is one.
  reference, value, advantage, returns: of each sampled token its log-probability under
    the reference policy, the value head's estimate, its advantage and its return.
  trained: whether it is in the batch of the update.
  """

  prompt: Prompt
  sample: Sample
  prompt_tokens: Sequence[int]
  behaviour: Sequence[float]
  score: float = 0.0
  unscored: str = ""
  reference: Leaf = None
  value: Leaf = None
  advantage: Leaf = None
  returns: Leaf = None
  trained: bool = False

  @property
  def tokens(self) -> list[int]:
    """Prompt, forced opening and sampled tokens."""
    return [*self.prompt_tokens, *self.sample.tokens]

  @property
  def first_sampled(self) -> int:
    """The index of the first sampled token."""
    return len(self.prompt_tokens) + self.sample.forced

  @property
  def needs_judge(self) -> bool:
    """False for known answers, which are compared, and malformed ones, which get 0."""
    return not self.sample.malformed and self.prompt.kind != "capability"

  @property
  def scored(self) -> bool:
    """Whether there is a verdict."""
    return not self.unscored

  @property
  def reward(self) -> float:
    """The score, 0 for a malformed completion."""
    return 0.0 if self.sample.malformed else self.score

  @property
  def kl(self) -> float:
    """log pi_old - log pi_ref of the whole rollout, in nats."""
    return float(np.sum(np.array(self.behaviour) - self.reference))


Group = list[Rollout]  # the rollouts of one prompt


# --- Prompts ---


def prompt_cells(prompts: Iterable[Prompt]) -> list[list[Prompt]]:
  """Prompts by category and ideal response type."""
  cells: dict[tuple[str, str], list[Prompt]] = {}
  for prompt in prompts:
    cells.setdefault((prompt.category, prompt.expected), []).append(prompt)
  return [cell for _, cell in sorted(cells.items())]


def cell_shares(
  cells: Sequence[Sequence[Prompt]], mixture: Mapping[str, Any], *, key: str
) -> list[float]:
  """The share of each cell in the prompts that are drawn: its category's number in
  `mixture` times its ideal response type's, 1 for what is not named. ValueError, which
  names the config's `key`, for a name that is neither, and where nothing is left."""
  of = [(cell[0].category, cell[0].expected) for cell in cells]
  known = {name for pair in of for name in pair}
  for name, weight in mixture.items():
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if name not in known or not number or not 0 <= weight < math.inf:
      raise ValueError(
        f"{key}: wanted a number of 0 or more for some of {', '.join(sorted(known))},"
        f" got {name!r}: {weight!r}"
      )
  weights = [mixture.get(a, 1.0) * mixture.get(b, 1.0) for a, b in of]
  if not any(weights):
    raise ValueError(f"{key}: wanted a number above 0 for some prompts, got none")
  return [weight / sum(weights) for weight in weights]


def _turn(position: int, shares: Sequence[float]) -> tuple[int, int]:
  """Of a draw the cell, and how often that was drawn before: multiples of the golden
  ratio, modulo 1, fall into every share as evenly as can be."""
  golden = (5**0.5 - 1) / 2
  ends = np.cumsum(shares)
  at = (np.arange(position + 1) * golden + 0.5) % 1.0 * ends[-1]
  drawn = np.searchsorted(ends, at, side="right")
  return int(drawn[-1]), int(np.sum(drawn[:-1] == drawn[-1]))


def choose_prompts(
  cells: Sequence[Sequence[Prompt]],
  capability: Sequence[Prompt],
  index: int,
  *,
  safety_count: int,
  capability_count: int,
  seed: int,
  shares: Sequence[float] | None = None,
) -> list[Prompt]:
  """The prompts of the sampling round with this index: one of each cell in turn, so
  that no category or type is rewarded more often, or of each cell its share; then those
  of capability. They follow from the index and the seed alone."""
  chosen: dict[str, Prompt] = {}
  position = index * safety_count
  while len(chosen) < safety_count:
    if shares is None:
      epoch, number = divmod(position, len(cells))
    else:
      number, epoch = _turn(position, shares)
    cell = cells[number]
    prompt = cell[prompt_sets.visits(len(cell), epoch, 1, seed=seed)[0]]
    chosen[prompt.id] = prompt
    position += 1
  if not capability_count:
    return [*chosen.values()]
  start = index * capability_count
  rows = prompt_sets.visits(len(capability), start, capability_count, seed=seed)
  return [*chosen.values(), *(capability[row] for row in rows)]


# --- Rewards ---


def combined(how: str, prompt: Prompt, safe: Verdict, helpful: Verdict) -> Verdict:
  """One verdict on an answer of two judges', `safe` and `helpful`.

  "product" of both (2508.09224): what is of no use, or not allowed, earns nothing.
  "mean" of both. "split" (TARS, 2507.00971): how helpful an answer is where the prompt
  is to be complied with, how safe it is elsewhere. Unscored where a score that counts
  is missing.
  """
  counts = [safe, helpful]
  if how == "split":
    counts = [helpful if prompt.expected == "comply" else safe]
  scores = []
  for verdict in counts:
    if verdict.score is None:
      return verdict
    scores.append(verdict.score)
  score = math.prod(scores) if how == "product" else sum(scores) / len(scores)
  return Verdict(score=score)


def assign_rewards(
  rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]
) -> list[Rollout]:
  """Rollouts with scores, given a verdict for each that needs a judge, in order."""
  scored = list(rollouts)
  judged = [i for i, r in enumerate(rollouts) if r.needs_judge]
  for i, verdict in zip(judged, verdicts, strict=True):
    unscored = verdict.reason if verdict.score is None else ""
    scored[i] = dataclasses.replace(
      rollouts[i], score=verdict.score or 0.0, unscored=unscored
    )
  for i, r in enumerate(rollouts):
    if r.prompt.kind == "capability" and not r.sample.malformed:
      score = words.correct(r.sample.answer, r.prompt.answer)
      unscored = words.UNCOMPARABLE if score is None else ""
      scored[i] = dataclasses.replace(r, score=score or 0.0, unscored=unscored)
  return scored


def has_zero_variance(group: Sequence[Rollout]) -> bool:
  """Whether the scored rewards of a group are all equal: then it has no gradient."""
  return len({r.reward for r in group if r.scored}) < 2


def resample_zero_variance(
  sample: Callable[[int], list[Group]], *, first: int, rounds: int
) -> list[Group]:
  """Groups of judged rollouts, those without variance replaced by groups of other
  prompts (DAPO's dynamic sampling, 2503.14476).

  `sample` makes the groups of one round; rounds are numbered from `first` on, and there
  are no more than needed.
  """
  groups = sample(first)
  for index in range(first + 1, first + rounds):
    spare = [group for group in groups if has_zero_variance(group)]
    if not spare:
      break
    kept = [group for group in groups if not has_zero_variance(group)]
    fresh = [group for group in sample(index) if not has_zero_variance(group)]
    groups = (kept + fresh + spare)[: len(groups)]
  return groups


# --- Advantages ---


def compute_advantages(
  rollouts: Sequence[Rollout],
  *,
  objective: ObjectiveConfig,
  group_size: int,
  max_length: int,
) -> list[Rollout]:
  """Rollouts, in groups of group_size, with advantages and returns of their tokens, and
  whether they are trained on. They must have rewards and reference log-probabilities,
  and values where the objective learns them."""
  lengths = [len(r.behaviour) for r in rollouts]
  mask_NT = np.arange(max(lengths))[None] < np.array(lengths)[:, None]

  def padded(rows):
    x_NT = np.zeros(mask_NT.shape)
    x_NT[mask_NT] = np.concatenate(rows)
    return x_NT

  reward_N = np.array([r.reward for r in rollouts])
  reward_N += advantages.overlong_penalty(
    lengths, max_length=max_length, margin=objective.overlong
  )
  scored_N = np.array([r.scored for r in rollouts])
  advantage_NT, returns_NT = advantages.token_advantages(
    objective,
    reward_N.reshape(-1, group_size),
    scored_N.reshape(-1, group_size),
    padded([np.array(r.behaviour) - r.reference for r in rollouts]),
    mask_NT,
    padded([r.value for r in rollouts]) if objective.learns_values else None,
  )
  cut_N = np.array([r.sample.finish == "length" for r in rollouts])
  trained_N = advantages.are_trained(objective, advantage_NT, scored_N, cut_N)
  return [
    dataclasses.replace(
      r,
      advantage=advantage_NT[i, : lengths[i]],
      returns=returns_NT[i, : lengths[i]],
      trained=bool(trained_N[i]),
    )
    for i, r in enumerate(rollouts)
  ]


# --- The batch ---


def build_batch(
  rollouts: Sequence[Rollout], *, length: int
) -> dict[str, np.ndarray] | None:
  """The trained rollouts packed into lines of `length` tokens, as
  `policy_gradient.make_loss` reads them, or None where none is trained."""
  trained = [r for r in rollouts if r.trained]
  if not trained:
    return None
  rows = [
    (r.tokens, [False] * r.first_sampled + [True] * len(r.behaviour)) for r in trained
  ]
  packed = packing.pack(rows, length=length)
  left_out_B = np.zeros(len(packed.tokens_BT), np.float32)
  left_out_B[0] = sum(r.scored for r in rollouts) - len(trained)
  per_token = scatter_to_packed(
    packed.tokens_BT.shape,
    packed.where,
    behaviour=[r.behaviour for r in trained],
    advantage=[r.advantage for r in trained],
    reference=[r.reference for r in trained],
    returns=[r.returns for r in trained],
  )
  masks = {"sampled_BT": packed.weight_BT > 0, "left_out_B": left_out_B}
  return packed.lines | masks | per_token


def scatter_to_packed(
  shape: tuple[int, int], where, **per_token
) -> dict[str, np.ndarray]:
  """Arrays NAME_BT of numbers per sampled token, laid out as the tokens are packed, and
  rollout_BT, the number of the rollout in its line or -1.

  Each of `per_token` has a sequence for each rollout, whose sampled tokens are the last
  of its row. `where` has (line, start, size) of each row, as `packing.pack` gives it.
  """
  arrays = {f"{name}_BT": np.zeros(shape, np.float32) for name in per_token}
  rollout_BT, count_B = np.full(shape, -1, np.int32), np.zeros(shape[0], int)
  for i, (b, start, size) in enumerate(where):
    sampled = len(next(iter(per_token.values()))[i])
    columns = slice(start + size - sampled, start + size)
    for name, rows in per_token.items():
      arrays[f"{name}_BT"][b, columns] = rows[i]
    rollout_BT[b, columns] = count_B[b]
    count_B[b] += 1
  return arrays | {"rollout_BT": rollout_BT}


# --- What is said of them ---


def metrics(rollouts: Sequence[Rollout], *, group_size: int) -> dict[str, float]:
  """Means over the rollouts of a step; NaN where there is nothing to average."""
  starts = range(0, len(rollouts), group_size)
  groups = [rollouts[at : at + group_size] for at in starts]
  safety = [r for r in rollouts if r.prompt.kind != "capability"]
  values = {
    "reward": mean(r.reward for r in safety if r.scored),
    "format": mean(not r.sample.malformed for r in rollouts),
    "kl_nats": mean(r.kl for r in rollouts),
    "length_tokens": mean(len(r.behaviour) for r in rollouts),
    "truncated": mean(r.sample.finish == "length" for r in rollouts),
    "unscored": mean(not r.scored for r in rollouts),
    "zero_variance_groups": mean(map(has_zero_variance, groups)),
    "distinct": len({r.sample.tokens for r in rollouts}) / len(rollouts),
    "thought_words": mean(
      len(r.sample.thought.split()) for r in safety if r.sample.thought
    ),
  }
  if capability := [r for r in rollouts if r.prompt.kind == "capability"]:
    values["capability"] = mean(r.score for r in capability if r.scored)
  for kind in EXPECTED:
    some = [r for r in safety if r.prompt.expected == kind and r.scored]
    if some:
      values[f"reward_{kind}"] = mean(r.reward for r in some)
  return values


def sample_row(r: Rollout, step: int) -> dict:
  """What was sampled, as a JSON row for people to read."""
  return {
    "step": step,
    "prompt_id": r.prompt.id,
    "prompt": r.prompt.text,
    "category": r.prompt.category,
    "expected": r.prompt.expected,
    "thought": r.sample.thought,
    "answer": r.sample.answer,
    "malformed": r.sample.malformed,
    "kl_nats": r.kl,
  }


def to_row(r: Rollout, step: int) -> dict:
  """The same with what it earned."""
  return sample_row(r, step) | {
    "reward": r.reward if r.scored else None,
    "unscored": r.unscored,
    "advantage": float(np.mean(r.advantage)),
  }


def mean(values: Iterable[float]) -> float:
  """Their mean; NaN, which metrics take for missing, where there are none."""
  values = [*values]
  return float(np.mean(values)) if values else np.nan
