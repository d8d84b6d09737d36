"""Policy gradients: advantages and losses, and nothing else.

Rewards come in as numbers: which judge gave them is not known here.
"""

import jax
import jax.numpy as jnp

from dalign import model
from dalign.config import Compute
from dalign.config import ModelConfig
from dalign.types import Mean


def rloo_advantages(reward_BR, scored_BR):
  """RLOO (2402.14740): each reward less the mean of the others of its group.

  Unscored rollouts are left out of every mean and get advantage 0, as does a rollout
  that is alone in its group.
  """
  reward_BR = jnp.where(scored_BR, reward_BR, 0.0)
  count_B1 = jnp.sum(scored_BR, axis=1, keepdims=True)
  others_BR = jnp.sum(reward_BR, axis=1, keepdims=True) - reward_BR
  mean_BR = others_BR / jnp.maximum(count_B1 - 1, 1)
  return jnp.where(scored_BR & (count_B1 > 1), reward_BR - mean_BR, 0.0)


def dr_grpo_advantages(reward_BR, scored_BR):
  """Dr.GRPO (2503.20783): each reward less its group's mean, not divided by std."""
  count_B1 = jnp.sum(scored_BR, axis=1, keepdims=True)
  total_B1 = jnp.sum(jnp.where(scored_BR, reward_BR, 0.0), axis=1, keepdims=True)
  mean_B1 = total_B1 / jnp.maximum(count_B1, 1)
  return jnp.where(scored_BR & (count_B1 > 1), reward_BR - mean_B1, 0.0)


ADVANTAGES = {"rloo": rloo_advantages, "dr_grpo": dr_grpo_advantages}


def zero_variance(reward_BR, scored_BR):
  """True for groups whose scored rewards are all equal: they carry no gradient."""
  high_B = jnp.max(jnp.where(scored_BR, reward_BR, -jnp.inf), axis=1)
  low_B = jnp.min(jnp.where(scored_BR, reward_BR, jnp.inf), axis=1)
  return ~(high_B > low_B)


def combine(judged_BR, well_formed_BR, kl_BR, *, kl_weight: float):
  """The reward that is trained on: judge times format, less the KL to the reference.

  kl_BR is the sum over a rollout's sampled tokens of log pi_old - log pi_ref, in nats
  (k1 in the reward, METHOD 5: as a differentiable penalty it would have no gradient).
  """
  judged_BR = jnp.where(well_formed_BR, judged_BR, 0.0)  # NaN where never judged
  return judged_BR - kl_weight * kl_BR


def make_loss(
  *,
  cfg: ModelConfig,
  compute: Compute,
  temperature: float,
  ratio_cap: float,
  length_norm: float,
):
  """The policy-gradient loss: -sum_t A_t min(rho_t, cap) / (rollouts * length_norm).

  rho = pi_theta / pi_behaviour, with the sampler's own log-probabilities as the
  behaviour; with one update a rollout it is 1 up to rounding and its gradient is that
  of log pi. The normaliser is constant (Dr.GRPO): long and short rollouts weigh alike
  per token. A batch is packed rows with, per token, sampled_BT (as targets), logp_BT
  (behaviour), advantage_BT, and start_BT, True on one token of each rollout.
  """

  def loss(params, batch, key):
    del key
    sampled_BT = batch["sampled_BT"][:, 1:]
    stats = model.target_stats(
      params, batch, sampled_BT, cfg=cfg, compute=compute, temperature=temperature
    )
    delta_BT = jnp.where(sampled_BT, stats.logp - batch["logp_BT"][:, 1:], 0.0)
    ratio_BT = jnp.minimum(jnp.exp(jnp.clip(delta_BT, -20.0, 20.0)), ratio_cap)
    gain_BT = jnp.where(sampled_BT, ratio_BT * batch["advantage_BT"][:, 1:], 0.0)
    rollouts = jnp.sum(batch["start_BT"], dtype=jnp.float32)
    gap_BT = jax.lax.stop_gradient(jnp.abs(delta_BT))
    return Mean(-jnp.sum(gain_BT), rollouts * length_norm), {
      "entropy_nats": Mean.of(stats.entropy, sampled_BT),
      "ratio": Mean.of(jax.lax.stop_gradient(ratio_BT), sampled_BT),
      "logp_gap_nats": Mean.of(gap_BT, sampled_BT),
    }

  return loss


def make_score(*, cfg: ModelConfig, compute: Compute, temperature: float):
  """`score(params, batch) -> logp_BT`: log-probability in nats of each token of
  `wanted_BT` given the ones before it in its row, of which its left neighbour is the
  last; 0 elsewhere. A batch is that of `model.target_stats` with wanted_BT."""

  def score(params, batch):
    wanted_BT = batch["wanted_BT"][:, 1:]
    stats = model.target_stats(
      params, batch, wanted_BT, cfg=cfg, compute=compute, temperature=temperature
    )
    return jnp.pad(stats.logp, ((0, 0), (1, 0)))

  return score
