"""Supervised fine-tuning: cross-entropy on thought and answer, without the spec."""

import jax.numpy as jnp

from dalign.config.schema import Compute
from dalign.config.schema import ModelConfig
from dalign.models import transformer
from dalign.types import Mean


def make_loss(*, cfg: ModelConfig, compute: Compute):
  """The SFT loss, in nats a trained token (METHOD: L = -sum w log pi(y | x, y<)).

  A batch has tokens_BT, positions_BT, ends_BT and weight_BT, the weight of each
  token as a target: 1 on the sampled tokens of thought and answer, 0 on the prompt, on
  forced tokens and on padding.
  """

  def loss(params, batch, key):
    del key
    weight_BT = batch["weight_BT"][:, 1:]
    trained_BT = weight_BT > 0
    stats = transformer.target_stats(
      params, batch, trained_BT, cfg=cfg, compute=compute
    )
    total = Mean(-jnp.sum(stats.logp * weight_BT), jnp.sum(weight_BT))
    return total, {
      "entropy_nats": Mean.of(stats.entropy, trained_BT),
      "accuracy": Mean.of(stats.hit, trained_BT),
    }

  return loss
