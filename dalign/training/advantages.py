"""Advantages: rewards of rollouts -> what each sampled token is reinforced by.

Rewards come in as numbers: which judge gave them is not known here. N rollouts of up to
T sampled tokens are B groups of R rollouts of one prompt.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from dalign.config.on_policy import ObjectiveConfig

EPSILON = 1e-6  # added to a standard deviation before it divides


# --- Of whole rollouts ---


def no_baseline(reward_BR, scored_BR):
  """REINFORCE (Williams, 1992): the reward itself."""
  return jnp.where(scored_BR, reward_BR, 0.0)


def rloo(reward_BR, scored_BR):
  """RLOO (2402.14740): the reward minus the mean reward of the group's other rollouts.

  Unscored rollouts are left out of every mean and get advantage 0, as does a rollout
  that is alone in its group.
  """
  reward_BR = jnp.where(scored_BR, reward_BR, 0.0)
  count_B1 = jnp.sum(scored_BR, axis=1, keepdims=True)
  others_BR = jnp.sum(reward_BR, axis=1, keepdims=True) - reward_BR
  mean_BR = others_BR / jnp.maximum(count_B1 - 1, 1)
  return jnp.where(scored_BR & (count_B1 > 1), reward_BR - mean_BR, 0.0)


def dr_grpo(reward_BR, scored_BR):
  """Dr. GRPO (2503.20783): the reward minus the group's mean, not divided by the
  standard deviation."""
  count_B1 = jnp.sum(scored_BR, axis=1, keepdims=True)
  total_B1 = jnp.sum(jnp.where(scored_BR, reward_BR, 0.0), axis=1, keepdims=True)
  mean_B1 = total_B1 / jnp.maximum(count_B1, 1)
  return jnp.where(scored_BR & (count_B1 > 1), reward_BR - mean_B1, 0.0)


def grpo(reward_BR, scored_BR):
  """GRPO (2402.03300): the reward minus the group's mean, divided by the group's
  standard deviation."""
  centred_BR = dr_grpo(reward_BR, scored_BR)
  count_B1 = jnp.maximum(jnp.sum(scored_BR, axis=1, keepdims=True), 1)
  std_B1 = jnp.sqrt(jnp.sum(centred_BR**2, axis=1, keepdims=True) / count_B1)
  return centred_BR / (std_B1 + EPSILON)


ESTIMATORS = {"none": no_baseline, "rloo": rloo, "dr_grpo": dr_grpo, "grpo": grpo}


# --- Of tokens ---


def token_rewards(reward_N, kl_NT, mask_NT, *, kl_weight: float) -> np.ndarray:
  """The reward of each token, [N, T]: minus kl_weight times log pi_old - log pi_ref,
  and at the last token of a rollout the rollout's reward as well."""
  mask_NT = np.asarray(mask_NT, bool)
  last_N = mask_NT.shape[1] - 1 - np.argmax(mask_NT[:, ::-1], axis=1)
  last_NT = (np.arange(mask_NT.shape[1])[None] == last_N[:, None]) & mask_NT
  kl_NT = np.where(mask_NT, -kl_weight * kl_NT, 0.0)
  return kl_NT + last_NT * np.asarray(reward_N)[:, None]


def gae(reward_NT, value_NT, mask_NT, *, lam: float) -> np.ndarray:
  """Generalised advantage estimation (1506.02438, eq. 16) without discount, [N, T].

  With lam 1 and values of 0 this is the reward to go. The value after a rollout's last
  token is 0.
  """
  advantage_NT = np.zeros(np.shape(mask_NT))
  running_N, next_value_N = np.zeros((2, len(advantage_NT)))
  for t in reversed(range(advantage_NT.shape[1])):
    mask_N = np.asarray(mask_NT)[:, t]
    delta_N = reward_NT[:, t] + next_value_N - value_NT[:, t]
    running_N = np.where(mask_N, delta_N + lam * running_N, running_N)
    next_value_N = np.where(mask_N, value_NT[:, t], next_value_N)
    advantage_NT[:, t] = np.where(mask_N, running_N, 0.0)
  return advantage_NT


def whiten(x_NT, mask_NT) -> np.ndarray:
  """Scaled to mean 0 and standard deviation 1 over all tokens of the mask."""
  values = np.asarray(x_NT)[np.asarray(mask_NT, bool)]
  if not len(values):
    return np.zeros(np.shape(x_NT))
  return np.where(mask_NT, (x_NT - values.mean()) / (values.std() + EPSILON), 0.0)


def overlong_penalty(length_N, *, max_length: int, margin: int) -> np.ndarray:
  """DAPO's soft over-length penalty (2503.14476, eq. 13), [N]: 0 up to max_length -
  margin tokens, then falling to -1 at max_length; 0 without a margin."""
  if not margin:
    return np.zeros(len(length_N))
  return np.clip((max_length - margin - np.asarray(length_N)) / margin, -1.0, 0.0)


def token_advantages(
  objective: ObjectiveConfig, reward_BR, scored_BR, kl_NT, mask_NT, value_NT=None
) -> tuple[np.ndarray, np.ndarray]:
  """(advantage_NT, returns_NT), float32: of each sampled token of a step.

  reward_BR does not include the KL yet. kl_NT is log pi_old - log pi_ref of each token,
  in nats. value_NT are the value head's estimates, for "gae" alone. Returns are the
  targets of the value head. Unscored rollouts have advantage 0.
  """
  scored_BR, mask_NT = np.asarray(scored_BR, bool), np.asarray(mask_NT, bool)
  mask_NT = mask_NT & scored_BR.reshape(-1, 1)
  kl_weight = objective.kl_weight if objective.kl == "reward" else 0.0
  kl_NT = np.where(mask_NT, kl_NT, 0.0)
  if objective.of_tokens:
    baseline = dr_grpo if objective.grouped else no_baseline
    reward_N = np.asarray(baseline(reward_BR, scored_BR)).ravel()
    reward_NT = token_rewards(reward_N, kl_NT, mask_NT, kl_weight=kl_weight)
    value_NT = np.zeros(mask_NT.shape) if value_NT is None else value_NT
    lam = objective.gae_lambda if objective.learns_values else 1.0
    advantage_NT = gae(reward_NT, value_NT, mask_NT, lam=lam)
    returns_NT = np.where(mask_NT, advantage_NT + value_NT, 0.0)
  else:
    total_BR = reward_BR - kl_weight * kl_NT.sum(axis=1).reshape(scored_BR.shape)
    advantage_BR = ESTIMATORS[objective.advantages](total_BR, scored_BR)
    advantage_NT = np.where(mask_NT, np.asarray(advantage_BR).reshape(-1, 1), 0.0)
    returns_NT = np.zeros(mask_NT.shape)
  if objective.whiten:
    advantage_NT = whiten(advantage_NT, mask_NT)
  return advantage_NT.astype(np.float32), returns_NT.astype(np.float32)


def are_trained(
  objective: ObjectiveConfig, advantage_NT, scored_N, cut_N
) -> np.ndarray:
  """[N]: which scored rollouts move a policy: those with an advantage, and all of them
  where a penalty or values do so too; of the `cut_N`, which max_new cut, none where the
  objective masks them."""
  moving_N = np.any(np.abs(advantage_NT) > 1e-6, axis=1)
  if objective.penalised or objective.learns_values:
    moving_N[:] = True
  return scored_N & moving_N & ~(cut_N & objective.mask_truncated)


def with_advantages(objective: ObjectiveConfig, rollouts: Mapping) -> dict:
  """Rollouts, a row each, as the batch that the loss reads.

  They have [B, T] arrays tokens, positions, ends, sampled, rollout
  (`rollout.scatter_to_packed`), behaviour and reference, of B = P R rows
  reward_PR and scored_PR, and cut_B. Rows that are not trained are no targets, and are
  counted as left out.
  """
  scored_PR, sampled_BT = rollouts["scored_PR"], rollouts["sampled_BT"]
  kl_BT = rollouts["behaviour_BT"] - rollouts["reference_BT"]
  advantage_BT, _ = token_advantages(
    objective, rollouts["reward_PR"], scored_PR, kl_BT, sampled_BT
  )
  scored_B = scored_PR.ravel()
  trained_B = are_trained(objective, advantage_BT, scored_B, rollouts["cut_B"])
  rows = {name: x for name, x in rollouts.items() if name.endswith("_BT")}
  return rows | {
    "sampled_BT": sampled_BT & trained_B[:, None],
    "advantage_BT": advantage_BT,
    "left_out_B": (scored_B & ~trained_B).astype(np.float32),
  }
