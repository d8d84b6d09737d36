"""Policy gradients: advantages and losses, and nothing else.

Rewards come in as numbers: which judge gave them is not known here. An algorithm is a
handful of choices (`schema.ObjectiveConfig`), of which `configs/algorithms.py` has the
usual ones. N rollouts of up to T sampled tokens are B groups of R.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dalign.config.schema import Compute
from dalign.config.schema import ModelConfig
from dalign.config.schema import ObjectiveConfig
from dalign.models import transformer
from dalign.types import Mean

TINY = 1e-6  # added to a standard deviation before it divides


# --- Advantages of whole rollouts ---


def no_baseline(reward_BR, scored_BR):
  """REINFORCE (Williams, 1992): the reward itself."""
  return jnp.where(scored_BR, reward_BR, 0.0)


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


def grpo_advantages(reward_BR, scored_BR):
  """GRPO (2402.03300): those of Dr.GRPO divided by their group's standard deviation."""
  centred_BR = dr_grpo_advantages(reward_BR, scored_BR)
  count_B1 = jnp.maximum(jnp.sum(scored_BR, axis=1, keepdims=True), 1)
  std_B1 = jnp.sqrt(jnp.sum(centred_BR**2, axis=1, keepdims=True) / count_B1)
  return centred_BR / (std_B1 + TINY)


ADVANTAGES = {
  "none": no_baseline,
  "rloo": rloo_advantages,
  "dr_grpo": dr_grpo_advantages,
  "grpo": grpo_advantages,
}


# --- Advantages of tokens ---


def token_rewards(reward_N, kl_NT, mask_NT, *, kl_weight: float) -> np.ndarray:
  """What each token earns, [N, T]: -kl_weight times log pi_old - log pi_ref, and the
  last of a rollout its reward too."""
  mask_NT = np.asarray(mask_NT, bool)
  last_N = mask_NT.shape[1] - 1 - np.argmax(mask_NT[:, ::-1], axis=1)
  at_NT = (np.arange(mask_NT.shape[1])[None] == last_N[:, None]) & mask_NT
  return (
    np.where(mask_NT, -kl_weight * kl_NT, 0.0) + at_NT * np.asarray(reward_N)[:, None]
  )


def gae(reward_NT, value_NT, mask_NT, *, lam: float) -> np.ndarray:
  """Generalised advantage estimation (1506.02438, eq. 16) without discount, [N, T]: for
  lam 1 and no values the return to go. A rollout ends with value 0."""
  out_NT = np.zeros(np.shape(mask_NT))
  run_N, next_N = np.zeros((2, len(out_NT)))
  for t in reversed(range(out_NT.shape[1])):
    on_N = np.asarray(mask_NT)[:, t]
    delta_N = reward_NT[:, t] + next_N - value_NT[:, t]
    run_N = np.where(on_N, delta_N + lam * run_N, run_N)
    next_N = np.where(on_N, value_NT[:, t], next_N)
    out_NT[:, t] = np.where(on_N, run_N, 0.0)
  return out_NT


def whiten(x_NT, mask_NT) -> np.ndarray:
  """Mean 0 and standard deviation 1 over all tokens of the mask."""
  values = np.asarray(x_NT)[np.asarray(mask_NT, bool)]
  if not len(values):
    return np.zeros(np.shape(x_NT))
  return np.where(mask_NT, (x_NT - values.mean()) / (values.std() + TINY), 0.0)


def overlong(length_N, *, most: int, margin: int) -> np.ndarray:
  """DAPO's soft over-length penalty (2503.14476, eq. 13): 0 up to most - margin tokens,
  falling to -1 at `most`."""
  if not margin:
    return np.zeros(len(length_N))
  return np.clip((most - margin - np.asarray(length_N)) / margin, -1.0, 0.0)


def advantages(
  objective: ObjectiveConfig, reward_BR, scored_BR, kl_NT, mask_NT, value_NT=None
):
  """(advantage_NT, return_NT) of the sampled tokens of a step, float32.

  reward_BR is judged and formatted, without KL; kl_NT is log pi_old - log pi_ref a
  token, in nats; value_NT the value head's, with "gae" alone. Returns are what values
  learn. Unscored rollouts have advantage 0.
  """
  scored_BR, mask_NT = np.asarray(scored_BR, bool), np.asarray(mask_NT, bool)
  mask_NT = mask_NT & scored_BR.reshape(-1, 1)
  weight = objective.kl_weight if objective.kl == "reward" else 0.0
  kl_NT = np.where(mask_NT, kl_NT, 0.0)
  if objective.of_tokens:
    baseline = dr_grpo_advantages if objective.grouped else no_baseline
    reward_N = np.asarray(baseline(reward_BR, scored_BR)).ravel()
    reward_NT = token_rewards(reward_N, kl_NT, mask_NT, kl_weight=weight)
    value_NT = np.zeros(mask_NT.shape) if value_NT is None else value_NT
    lam = objective.gae_lambda if objective.learns_values else 1.0
    advantage_NT = gae(reward_NT, value_NT, mask_NT, lam=lam)
    return_NT = np.where(mask_NT, advantage_NT + value_NT, 0.0)
  else:
    total_BR = reward_BR - weight * kl_NT.sum(axis=1).reshape(scored_BR.shape)
    of_rollout_BR = ADVANTAGES[objective.advantages](total_BR, scored_BR)
    advantage_NT = np.where(mask_NT, np.asarray(of_rollout_BR).reshape(-1, 1), 0.0)
    return_NT = np.zeros(mask_NT.shape)
  if objective.whiten:
    advantage_NT = whiten(advantage_NT, mask_NT)
  return advantage_NT.astype(np.float32), return_NT.astype(np.float32)


def placed(shape: tuple[int, int], where, **of_tokens) -> dict[str, np.ndarray]:
  """Arrays NAME_BT with what each rollout has for each of its sampled tokens, which are
  the last of its row, and rollout_BT, the number of the rollout in its line or -1.

  `where` has (line, start, size) of each row, as `packing.pack` gives it.
  """
  out = {f"{name}_BT": np.zeros(shape, np.float32) for name in of_tokens}
  rollout_BT, count_B = np.full(shape, -1, np.int32), np.zeros(shape[0], int)
  for i, (b, start, size) in enumerate(where):
    own = len(next(iter(of_tokens.values()))[i])
    at = slice(start + size - own, start + size)
    for name, rows in of_tokens.items():
      out[f"{name}_BT"][b, at] = rows[i]
    rollout_BT[b, at] = count_B[b]
    count_B[b] += 1
  return out | {"rollout_BT": rollout_BT}


# --- The loss ---


def kl_penalty(kind: str, logp, reference):
  """An estimate of a token's KL(pi || reference) whose gradient is to be followed, in
  nats, from the log-probabilities of a token that pi drew.

  On-policy "k2" has the gradient of KL(pi || reference), and "k3", GRPO's, that of
  KL(reference || pi); "k3_as_k2" has k3's value and k2's gradient. "k1", that is logp
  - reference, has none in expectation and is refused by the config.
  """
  gap = reference - logp
  k2, k3 = 0.5 * gap**2, jnp.exp(jnp.clip(gap, -20.0, 20.0)) - gap - 1.0
  if kind == "k3_as_k2":
    return k2 + jax.lax.stop_gradient(k3 - k2)
  return {"k2": k2, "k3": k3}[kind]


def over_rollouts(x_BT, rollout_BT):
  """[B, T]: at each token the sum of x over its rollout in its line, 0 where rollout_BT
  is negative."""
  T = x_BT.shape[1]

  def line(x_T, rollout_T):
    sums_T = jax.ops.segment_sum(x_T, jnp.where(rollout_T < 0, T, rollout_T), T)
    return jnp.where(rollout_T < 0, 0.0, sums_T[jnp.maximum(rollout_T, 0)])

  return jax.vmap(line)(x_BT, rollout_BT)


def make_loss(
  *, cfg: ModelConfig, compute: Compute, temperature: float, objective: ObjectiveConfig
):
  """The policy-gradient loss of an objective.

  rho = pi_theta / pi_behaviour of a token, or with ratio "sequence" the geometric mean
  over its rollout (GSPO, 2507.18071), with the sampler's own log-probabilities as the
  behaviour, and at most ratio_cap. A token's gain is min(rho A, clip(rho, 1 - low,
  1 + high) A) (PPO, 1707.06347, eq. 7), less the penalty for its KL to the reference.
  Gains are averaged over all tokens of the step (DAPO), or over rollouts of which each
  has its own mean (GRPO), or divided by rollouts times length_norm (Dr.GRPO), those
  included that have no gradient and so are not in the batch.

  A batch is that of `transformer.target_stats` with, per token, sampled_BT (as
  targets), rollout_BT (which rollout of its line has sampled it, or -1), logp_BT
  (behaviour), advantage_BT, with a penalty reference_BT, and with values worth_BT, the
  returns; and left_out_B, whose sum is how many rollouts of the step without a gradient
  it lacks.
  Parameters are a decoder's, or with values {"policy": a decoder's, "value":
  `init_value`'s}.
  """

  def loss(params, batch, key):
    del key
    policy = params["policy"] if objective.learns_values else params
    sampled_BT, rollout_BT = batch["sampled_BT"][:, 1:], batch["rollout_BT"][:, 1:]
    hidden_BTD = transformer.hidden(policy, batch, cfg=cfg, compute=compute)
    stats = transformer.stats(
      policy,
      hidden_BTD,
      batch["tokens_BT"],
      sampled_BT,
      cfg=cfg,
      compute=compute,
      temperature=temperature,
    )

    def sampled(name):
      return jnp.where(sampled_BT, batch[name][:, 1:], 0.0)

    size_BT = jnp.maximum(
      over_rollouts(sampled_BT.astype(jnp.float32), rollout_BT), 1.0
    )
    gap_BT = jnp.where(sampled_BT, stats.logp - sampled("logp_BT"), 0.0)
    moved_BT = gap_BT
    if objective.ratio == "sequence":
      moved_BT = over_rollouts(gap_BT, rollout_BT) / size_BT
    ratio_BT = jnp.minimum(
      jnp.exp(jnp.clip(moved_BT, -20.0, 20.0)), objective.ratio_cap
    )
    near_BT = jnp.clip(ratio_BT, 1.0 - objective.clip_low, 1.0 + objective.clip_high)
    advantage_BT = sampled("advantage_BT")
    gain_BT = jnp.minimum(ratio_BT * advantage_BT, near_BT * advantage_BT)
    metrics = {
      "entropy_nats": Mean.of(stats.entropy, sampled_BT),
      "ratio": Mean.of(jax.lax.stop_gradient(ratio_BT), sampled_BT),
      "clipped": Mean.of(ratio_BT != near_BT, sampled_BT),
      "logp_gap_nats": Mean.of(jax.lax.stop_gradient(jnp.abs(gap_BT)), sampled_BT),
    }
    if objective.penalised:
      kl_BT = kl_penalty(objective.kl, stats.logp, sampled("reference_BT"))
      gain_BT -= objective.kl_weight * kl_BT
      metrics["penalty_nats"] = Mean.of(jax.lax.stop_gradient(kl_BT), sampled_BT)
    if objective.learns_values:
      error_BT = values(params["value"], hidden_BTD[:, :-1]) - sampled("worth_BT")
      gain_BT -= 0.5 * objective.value_weight * error_BT**2
      metrics["value_error"] = Mean.of(jax.lax.stop_gradient(error_BT**2), sampled_BT)
    gain_BT = jnp.where(sampled_BT, gain_BT, 0.0)
    tokens = jnp.sum(sampled_BT, dtype=jnp.float32)
    # Each rollout's tokens have 1 / size each: together one a rollout.
    rollouts = jnp.sum(jnp.where(sampled_BT, 1.0 / size_BT, 0.0))
    if objective.mean == "rollouts":
      return Mean(-jnp.sum(gain_BT / size_BT), rollouts), metrics
    all_rollouts = rollouts + jnp.sum(batch["left_out_B"])
    constant = all_rollouts * objective.length_norm
    count = tokens if objective.mean == "tokens" else constant
    return Mean(-jnp.sum(gain_BT), count), metrics

  return loss


# --- Values ---


def init_value(params) -> dict:
  """A value head on a decoder's last hidden states, which says 0 of everything."""
  return {"weight": jnp.zeros(params["norm"].shape), "bias": jnp.zeros((1,))}


def values(head: dict, hidden_BTD):
  """What a state is worth, float32 [B, T]: the return expected from the token that is
  sampled after it."""
  scaled_BTD = hidden_BTD * hidden_BTD.shape[-1] ** -0.5
  return scaled_BTD @ head["weight"] + head["bias"][None]


# --- Scores ---


def make_score(*, cfg: ModelConfig, compute: Compute, temperature: float):
  """`score(params, batch) -> logp_BT`: log-probability in nats of each token of
  `wanted_BT` given the ones before it in its row, of which its left neighbour is the
  last; 0 elsewhere. A batch is that of `transformer.target_stats` with wanted_BT."""

  def score(params, batch):
    wanted_BT = batch["wanted_BT"][:, 1:]
    stats = transformer.target_stats(
      params, batch, wanted_BT, cfg=cfg, compute=compute, temperature=temperature
    )
    return jnp.pad(stats.logp, ((0, 0), (1, 0)))

  return score


def make_worth(*, cfg: ModelConfig, compute: Compute):
  """`worth(params, batch) -> value_BT`: what the value head says before each token of
  `wanted_BT`; 0 elsewhere. Parameters are a policy's with values."""

  def worth(params, batch):
    hidden_BTD = transformer.hidden(params["policy"], batch, cfg=cfg, compute=compute)
    value_BT = values(params["value"], hidden_BTD[:, :-1])
    return jnp.pad(
      jnp.where(batch["wanted_BT"][:, 1:], value_BT, 0.0), ((0, 0), (1, 0))
    )

  return worth
