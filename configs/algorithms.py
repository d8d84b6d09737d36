"""Policy-gradient algorithms as they were published: settings of `config.rl.objective`.

c.rl.objective = algorithms.of("grpo")
"""

# REINFORCE (Williams, 1992): reward times log-probability, the KL in the reward.
PLAIN = dict(
  advantages="none",
  whiten=False,
  ratio="token",
  clip_low=1.0,
  clip_high=1e6,
  # One update a rollout: ratios are off 1 by rounding alone. Where sampler and trainer
  # disagree by more, a token's weight stays bounded.
  ratio_cap=2.0,
  mean="constant",
  length_norm=100.0,
  kl="reward",
  kl_weight=0.01,
  gae_lambda=1.0,
  value_weight=0.0,
  overlong=0,
  mask_truncated=False,
)
PPO = dict(clip_low=0.2, clip_high=0.2, ratio_cap=1e6)

CHANGES = {
  "reinforce": {},
  "rloo": dict(advantages="rloo"),  # 2402.14740
  "grpo": PPO
  | dict(advantages="grpo", mean="rollouts", kl="k3", kl_weight=0.04),  # 2402.03300
  "dr_grpo": PPO | dict(advantages="dr_grpo", kl="none", kl_weight=0.0),  # 2503.20783
  "dapo": PPO
  | dict(  # 2503.14476
    advantages="grpo",
    clip_high=0.28,
    mean="tokens",
    kl="none",
    kl_weight=0.0,
    mask_truncated=True,
  ),
  "gspo": PPO
  | dict(  # 2507.18071
    advantages="grpo",
    ratio="sequence",
    clip_low=3e-4,
    clip_high=4e-4,
    mean="rollouts",
    kl="none",
    kl_weight=0.0,
  ),
  "reinforce_pp": PPO
  | dict(advantages="to_go", whiten=True, mean="tokens"),  # 2501.03262
  "reinforce_pp_baseline": PPO
  | dict(advantages="group_to_go", whiten=True, mean="tokens"),
  "ppo": PPO
  | dict(  # 1707.06347, with values on the policy's trunk
    advantages="gae",
    whiten=True,
    mean="tokens",
    gae_lambda=0.95,
    value_weight=0.1,
  ),
}


def of(name: str, **more) -> dict:
  """The settings of an algorithm, with changes; KeyError names those there are."""
  if name not in CHANGES:
    raise KeyError(f"no algorithm {name!r}; there are: {', '.join(CHANGES)}")
  return PLAIN | CHANGES[name] | more
