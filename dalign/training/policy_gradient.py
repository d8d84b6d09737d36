"""The policy-gradient loss, a pure function of log-probabilities, and the value head.

An algorithm is a handful of choices (`on_policy.ObjectiveConfig`), of which
`configs/algorithms.py` has the usual ones. Where advantages come from is not known here
(`advantages.py`). What runs a decoder is at the end: `make_loss` for the trainer,
`make_score` and `make_values` for what is read off a model.
"""

import jax
import jax.numpy as jnp

from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.config.on_policy import ObjectiveConfig
from dalign.models import transformer
from dalign.types import Mean

# --- The loss, of arrays ---


def loss(
  logp_BT,
  entropy_BT,
  value_BT=None,
  *,
  behaviour_BT,
  advantage_BT,
  sampled_BT,
  rollout_BT,
  objective: ObjectiveConfig,
  reference_BT=None,
  returns_BT=None,
  left_out=0.0,
) -> tuple[Mean, dict[str, Mean]]:
  """The policy-gradient loss of an objective, and its metrics.

  All arrays are aligned by token. logp_BT and entropy_BT are the policy's, in nats, and
  value_BT its value head's. behaviour_BT are the log-probabilities that tokens were
  sampled with, reference_BT those of the reference policy (for a KL penalty),
  returns_BT the targets of the values. sampled_BT is the mask of sampled tokens: what
  the arrays of the batch hold elsewhere does not count. rollout_BT numbers the rollouts
  of a line, -1 outside of any. left_out is how many rollouts of the step are not in the
  batch because they have no gradient.

  The importance ratio is that of a token, pi / pi_behaviour, or with ratio "sequence"
  its geometric mean over the rollout (GSPO, 2507.18071), at most ratio_cap. The
  surrogate of a token is min(ratio A, clip(ratio, 1 - low, 1 + high) A) (PPO,
  1707.06347, eq. 7), minus the penalty for its KL to the reference, minus the squared
  error of its value. Surrogates are averaged over all tokens of the step (DAPO), or
  over rollouts of which each has its own mean (GRPO), or summed and divided by
  rollouts times length_norm (Dr. GRPO), those left out included.
  """

  def masked(x_BT):
    return jnp.where(sampled_BT, x_BT, 0.0)

  length_BT = sum_over_rollouts(sampled_BT.astype(jnp.float32), rollout_BT)
  length_BT = jnp.maximum(length_BT, 1.0)
  token_log_ratio_BT = masked(logp_BT - masked(behaviour_BT))
  log_ratio_BT = token_log_ratio_BT
  if objective.ratio == "sequence":
    log_ratio_BT = sum_over_rollouts(token_log_ratio_BT, rollout_BT) / length_BT
  ratio_BT = jnp.exp(jnp.clip(log_ratio_BT, -20.0, 20.0))
  ratio_BT = jnp.minimum(ratio_BT, objective.ratio_cap)
  clipped_ratio_BT = jnp.clip(
    ratio_BT, 1.0 - objective.clip_low, 1.0 + objective.clip_high
  )
  advantage_BT = masked(advantage_BT)
  surrogate_BT = jnp.minimum(ratio_BT * advantage_BT, clipped_ratio_BT * advantage_BT)
  gap_BT = jax.lax.stop_gradient(jnp.abs(token_log_ratio_BT))
  metrics = {
    "entropy_nats": Mean.of(entropy_BT, sampled_BT),
    "ratio": Mean.of(jax.lax.stop_gradient(ratio_BT), sampled_BT),
    "clipped": Mean.of(ratio_BT != clipped_ratio_BT, sampled_BT),
    "logp_gap_nats": Mean.of(gap_BT, sampled_BT),
  }
  if objective.penalised:
    kl_BT = kl_penalty(objective.kl, logp_BT, masked(reference_BT))
    surrogate_BT -= objective.kl_weight * kl_BT
    metrics["penalty_nats"] = Mean.of(jax.lax.stop_gradient(kl_BT), sampled_BT)
  if objective.learns_values:
    error_BT = value_BT - masked(returns_BT)
    surrogate_BT -= 0.5 * objective.value_weight * error_BT**2
    metrics["value_error"] = Mean.of(jax.lax.stop_gradient(error_BT**2), sampled_BT)
  surrogate_BT = masked(surrogate_BT)
  tokens = jnp.sum(sampled_BT, dtype=jnp.float32)
  # The tokens of a rollout count 1 / length each: together 1 a rollout.
  rollouts = jnp.sum(masked(1.0 / length_BT))
  if objective.mean == "rollouts":
    return Mean(-jnp.sum(surrogate_BT / length_BT), rollouts), metrics
  constant = (rollouts + left_out) * objective.length_norm
  count = tokens if objective.mean == "tokens" else constant
  return Mean(-jnp.sum(surrogate_BT), count), metrics


def kl_penalty(estimator: str, logp, reference):
  """An estimate of a token's KL(pi || reference) whose gradient is to be followed, in
  nats, from the log-probabilities of a token that was sampled from pi.

  On-policy "k2" has the gradient of KL(pi || reference), and "k3", GRPO's, that of
  KL(reference || pi); "k3_as_k2" has k3's value and k2's gradient. "k1", that is logp
  - reference, has none in expectation and is refused by the config.
  """
  log_ratio = reference - logp
  k2 = 0.5 * log_ratio**2
  k3 = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0)) - log_ratio - 1.0
  if estimator == "k3_as_k2":
    return k2 + jax.lax.stop_gradient(k3 - k2)
  return {"k2": k2, "k3": k3}[estimator]


def sum_over_rollouts(x_BT, rollout_BT):
  """[B, T]: at each token the sum of x over its rollout, 0 where rollout_BT is
  negative."""
  T = x_BT.shape[1]

  def row(x_T, rollout_T):
    sums_T = jax.ops.segment_sum(x_T, jnp.where(rollout_T < 0, T, rollout_T), T)
    return jnp.where(rollout_T < 0, 0.0, sums_T[jnp.maximum(rollout_T, 0)])

  return jax.vmap(row)(x_BT, rollout_BT)


# --- The value head ---


def init_value_head(params) -> dict:
  """A value head on a decoder's last hidden states, which predicts 0 everywhere."""
  return {"weight": jnp.zeros(params["norm"].shape), "bias": jnp.zeros((1,))}


def value_head(head: dict, hidden_BTD):
  """The value of each state, float32 [B, T]: the expected return from the token that is
  sampled after it."""
  scaled_BTD = hidden_BTD * hidden_BTD.shape[-1] ** -0.5
  return scaled_BTD @ head["weight"] + head["bias"][None]


# --- With a decoder ---


def make_loss(
  *, cfg: ModelConfig, compute: Compute, temperature: float, objective: ObjectiveConfig
):
  """`loss_fn(params, batch, key) -> (Mean, metrics)`: the loss of a decoder.

  A batch is that of `transformer.hidden` with, for each token, sampled_BT, rollout_BT,
  behaviour_BT, advantage_BT, reference_BT and returns_BT as `loss` takes them; and
  left_out_B, whose sum is how many rollouts of the step are left out.
  Parameters are a decoder's, or with a value head {"policy": a decoder's, "value":
  `init_value_head`'s}.
  """

  def loss_fn(params, batch, key):
    del key
    policy = params["policy"] if objective.learns_values else params
    sampled_BT = batch["sampled_BT"][:, 1:]
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
    value_BT = None
    if objective.learns_values:
      value_BT = value_head(params["value"], hidden_BTD[:, :-1])
    names = "behaviour_BT", "advantage_BT", "rollout_BT", "reference_BT", "returns_BT"
    return loss(
      stats.logp,
      stats.entropy,
      value_BT,
      sampled_BT=sampled_BT,
      **{name: batch[name][:, 1:] for name in names if name in batch},
      objective=objective,
      left_out=jnp.sum(batch["left_out_B"]),
    )

  return loss_fn


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


def make_values(*, cfg: ModelConfig, compute: Compute):
  """`values(params, batch) -> value_BT`: what the value head predicts before each token
  of `wanted_BT`; 0 elsewhere. Parameters are a policy's with a value head."""

  def values(params, batch):
    hidden_BTD = transformer.hidden(params["policy"], batch, cfg=cfg, compute=compute)
    value_BT = value_head(params["value"], hidden_BTD[:, :-1])
    wanted_BT = batch["wanted_BT"][:, 1:]
    return jnp.pad(jnp.where(wanted_BT, value_BT, 0.0), ((0, 0), (1, 0)))

  return values
