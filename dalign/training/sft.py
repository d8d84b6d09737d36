"""Supervised fine-tuning: cross-entropy on thought and answer, without the spec."""

import jax.numpy as jnp

from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.models import transformer
from dalign.types import Mean


def loss(logp_BT, weight_BT) -> Mean:
  """Cross-entropy in nats a trained token (METHOD: L = -sum w log pi(y | x, y<)).

  weight_BT is the weight of each token as a target: 1 on the sampled tokens of thought
  and answer, 0 on the prompt, on forced tokens and on padding.
  """
  return Mean(-jnp.sum(logp_BT * weight_BT), jnp.sum(weight_BT))


def make_loss(*, cfg: ModelConfig, compute: Compute):
  """`loss_fn(params, batch, key) -> (Mean, metrics)`: the loss of a decoder. A batch
  has tokens_BT, positions_BT, ends_BT and weight_BT."""

  def loss_fn(params, batch, key):
    del key
    weight_BT = batch["weight_BT"][:, 1:]
    trained_BT = weight_BT > 0
    stats = transformer.target_stats(
      params, batch, trained_BT, cfg=cfg, compute=compute
    )
    return loss(stats.logp, weight_BT), {
      "entropy_nats": Mean.of(stats.entropy, trained_BT),
      "accuracy": Mean.of(stats.hit, trained_BT),
    }

  return loss_fn
