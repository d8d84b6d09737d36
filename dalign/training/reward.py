"""The reward model: the decoder's trunk, a scalar head, and how both are trained.

It reads spec(category), prompt and answer as one conversation and scores the last
token. The spec is the same for all rows of a batch, so it is encoded once. Knows
tokens; the thought is not among them, because `judge.RewardQuestion` has none.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.models import ops
from dalign.models import transformer
from dalign.types import Key
from dalign.types import Mean
from dalign.types import PyTree

BINS = 5  # of scores, by which a reward model's calibration is read


def init_head(params: PyTree, key: Key) -> PyTree:
  """A trunk's parameters with a scalar head added; an untied output head is dropped."""
  width = params["norm"].shape[0]
  trunk = {name: value for name, value in params.items() if name != "head"}
  weight_D = jax.random.normal(key, (width,)) * width**-0.5
  return {"trunk": trunk, "score": {"weight": weight_D, "bias": jnp.zeros((1,))}}


def logits(params: PyTree, batch: PyTree, *, cfg: ModelConfig, compute: Compute):
  """The score of each row before the sigmoid, float32 [B].

  `batch` has prefix_P and prefix_len (what all rows share), tokens_BT (the rest of each
  row, right-padded) and length_B. The score is read at position length - 1: a token
  that every row has, never found by looking for a token id.
  """
  trunk = params["trunk"]
  tokens_BT, length_B = batch["tokens_BT"], batch["length_B"]
  prefix = transformer.encode_prefix(
    trunk, batch["prefix_P"], batch["prefix_len"], cfg=cfg, compute=compute
  )
  hidden_BTD, _ = transformer.forward_rows(
    trunk, tokens_BT, cfg=cfg, compute=compute, prefix=prefix
  )
  last_B = jnp.maximum(length_B - 1, 0)
  last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
  score = params["score"]
  scaled_BD = last_BD * last_BD.shape[-1] ** -0.5
  return (
    ops.matmul(scaled_BD, score["weight"][:, None], jnp.float32)[:, 0] + score["bias"]
  )


def loss(
  logit_B,
  score_B,
  prompt_B,
  answer_B,
  real_B,
  *,
  pair_weight: float,
  answer_weight: float = 0.0,
  point_weight: float = 1.0,
) -> tuple[Mean, dict[str, Mean]]:
  """Regression on the judge's scores, plus pairs of answers to one prompt, and of
  prompts with one answer.

  logit_B are the reward model's scores before the sigmoid, score_B the judge's in
  [0, 1], prompt_B and answer_B the numbers of the prompt and of the answer's text,
  real_B the mask of rows that are not padding. Regression is the cross-entropy between
  the judge's score and the sigmoid. A pair is two rows of one prompt, or with one
  answer to two prompts, whose scores differ; its loss is Bradley-Terry's log-sigmoid of
  the logit difference (2203.02155, eq. 1), weighted by the difference. Only pairs of
  the second kind are blind to how an answer sounds: what tells a refusal that is due
  from one that is not is the prompt alone. All are summed and divided by the rows, so
  micro-batches that keep the rows of every pair together change nothing.
  """
  point_B = -(
    score_B * jax.nn.log_sigmoid(logit_B) + (1 - score_B) * jax.nn.log_sigmoid(-logit_B)
  )
  margin_BB = score_B[:, None] - score_B[None, :]
  real_BB = real_B[:, None] & real_B[None, :]
  pair_BB, answer_BB = _pairs(margin_BB, prompt_B, answer_B)
  pair_BB, answer_BB = pair_BB & real_BB, answer_BB & real_BB
  pair_loss_BB = -jax.nn.log_sigmoid(logit_B[:, None] - logit_B[None, :]) * margin_BB
  points = Mean.of(point_B, real_B)
  pairs = Mean.of(pair_loss_BB, pair_BB)
  answers = Mean.of(pair_loss_BB, answer_BB)
  total = point_weight * points.total + pair_weight * pairs.total
  total += answer_weight * answers.total
  right_BB = logit_B[:, None] > logit_B[None, :]
  error_B = jnp.abs(jax.nn.sigmoid(logit_B) - score_B)
  return Mean(total, points.count), {
    "point_nats": points,
    "pair_nats": pairs,
    "absolute_error": Mean.of(error_B, real_B),
    "pair_accuracy": Mean.of(right_BB, pair_BB),
    "answer_pair_nats": answers,
    "answer_pair_accuracy": Mean.of(right_BB, answer_BB),
  }


def make_loss(*, cfg: ModelConfig, compute: Compute, **weights: float):
  """`loss_fn(params, batch, key) -> (Mean, metrics)`: the `loss` of a reward model,
  with its weights. A batch is that of `logits` with score_B, prompt_B and answer_B;
  padding has length 0."""

  def loss_fn(params, batch, key):
    del key
    return loss(
      logits(params, batch, cfg=cfg, compute=compute),
      batch["score_B"],
      batch["prompt_B"],
      batch["answer_B"],
      batch["length_B"] > 0,
      **weights,
    )

  return loss_fn


def agreement(
  predicted_B: np.ndarray,
  score_B: np.ndarray,
  prompt_B: np.ndarray,
  answer_B: np.ndarray,
) -> dict[str, float | None]:
  """Held-out quality of a reward model against the judge.

  accuracy: both on one side of 0.5. pair_accuracy: of pairs of one prompt whose judged
  scores differ, ranked alike; answer_pair_accuracy: the same of pairs with one answer
  to two prompts; None without such pairs. calibration_error: expected calibration
  error, the mean |predicted - judged| of BINS of equal width, weighted by their
  size (1706.04599).
  """
  gap_BB = score_B[:, None] - score_B[None, :]
  pair_BB, answer_BB = _pairs(gap_BB, prompt_B, answer_B)
  right_BB = predicted_B[:, None] > predicted_B[None, :]
  bin_B = np.minimum((predicted_B * BINS).astype(int), BINS - 1)
  error = 0.0
  for b in range(BINS):
    inside = bin_B == b
    if inside.any():
      error += abs(predicted_B[inside].mean() - score_B[inside].mean()) * inside.mean()
  return {
    "n": int(len(score_B)),
    "pairs": int(pair_BB.sum()),
    "accuracy": float(np.mean((predicted_B > 0.5) == (score_B > 0.5))),
    "pair_accuracy": _share(right_BB, pair_BB),
    "answer_pairs": int(answer_BB.sum()),
    "answer_pair_accuracy": _share(right_BB, answer_BB),
    "calibration_error": float(error),
    "mean_absolute_error": float(np.abs(predicted_B - score_B).mean()),
  }


def _pairs(margin_BB, prompt_B, answer_B):
  """Masks [B, B] of pairs of one prompt, and of those with one answer to two prompts,
  in which the row's score is above the column's; of either numpy's arrays or jax's."""
  one_prompt_BB = prompt_B[:, None] == prompt_B[None, :]
  one_answer_BB = answer_B[:, None] == answer_B[None, :]
  above_BB = margin_BB > 0
  return one_prompt_BB & above_BB, one_answer_BB & ~one_prompt_BB & above_BB


def _share(right: np.ndarray, among: np.ndarray) -> float | None:
  return float(right[among].mean()) if among.any() else None
