"""How likely a model finds what is written: tokens of rows, labels that come next."""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.config.training import BatchConfig
from dalign.models import transformer
from dalign.text import chat_template
from dalign.text import packing
from dalign.training import policy_gradient
from dalign.types import PyTree
from dalign.types import Turn

LABEL_BATCH_ROWS = 4  # conversations whose labels are scored together
STEP = 128  # they are padded to a multiple of so many tokens


class Scorer:
  """A number a token of rows, packed, in batches of one shape: by default its
  log-probability in nats. `shardings` are those of the result, [B, T]."""

  def __init__(
    self,
    cfg: ModelConfig,
    compute: Compute,
    shape: BatchConfig,
    *,
    temperature: float = 1.0,
    score: Callable | None = None,
    shardings=None,
  ):
    if score is None:
      compute = dataclasses.replace(compute, remat=False)
      score = policy_gradient.make_score(
        cfg=cfg, compute=compute, temperature=temperature
      )
    self._score = jax.jit(score, out_shardings=shardings)
    self.arch, self.rows, self.length = cfg, shape.rows, shape.length

  def __call__(
    self, params: PyTree, rows: list[list[int]], starts: list[int]
  ) -> list[np.ndarray]:
    """For each row the number of each token from its start, at least 1, onward: none
    where the row ends before."""
    if not rows:
      return []
    self.arch.check_length(max(map(len, rows)), "a row to score")
    packed = packing.pack(
      [
        (row, [float(at >= start) for at in range(len(row))])
        for row, start in zip(rows, starts, strict=True)
      ],
      length=self.length,
      rows_multiple=self.rows,
    )
    out = []
    for at in range(0, len(packed.tokens_BT), self.rows):
      out.append(np.asarray(self._score(params, self._batch(packed, at))))
    logp_BT = np.concatenate(out)
    wanted = [max(len(row) - start, 0) for row, start in zip(rows, starts, strict=True)]
    return [
      logp_BT[b, at + n - own : at + n]
      for (b, at, n), own in zip(packed.where, wanted, strict=True)
    ]

  def lowered(self, params: PyTree) -> jax.stages.Lowered:
    """The program of a batch, not run; of parameters the shapes will do."""
    row = [0, 0], [0.0, 1.0]
    packed = packing.pack([row], length=self.length, rows_multiple=self.rows)
    return self._score.lower(params, self._batch(packed, 0))

  def _batch(self, packed: packing.Packed, at: int) -> dict[str, np.ndarray]:
    """The lines of a batch from one on."""
    batch = packed.lines | {"wanted_BT": packed.weight_BT}
    batch = {name: x[at : at + self.rows] for name, x in batch.items()}
    return batch | {"wanted_BT": batch["wanted_BT"] > 0}


def make_label_scorer(
  params: PyTree,
  *,
  tok: chat_template.Tokenizer,
  cfg: ModelConfig,
  compute: Compute,
  shardings=None,
) -> Callable[[Sequence[Sequence[Turn]], Sequence[str]], list[list[float] | None]]:
  """`score(conversations, labels)`: the log-probability, in nats, of the first token of
  each label as the begin of the reply to each conversation, None for one that is longer
  than the model takes.

  That raises ValueError where two labels begin with one token, which says nothing.
  """
  compute = dataclasses.replace(compute, remat=False)

  @functools.partial(jax.jit, out_shardings=shardings)
  def last_logprobs(params, tokens_BT, length_B):
    hidden_BTD, _ = transformer.forward_rows(
      params, tokens_BT, cfg=cfg, compute=compute
    )
    last_BD = jnp.take_along_axis(hidden_BTD, length_B[:, None, None] - 1, axis=1)[:, 0]
    logits_BV = transformer.logits(params, last_BD, cfg=cfg, compute=compute)
    return jax.nn.log_softmax(logits_BV, axis=-1)

  def score(conversations, labels):
    ids = [tok.encode(label)[0] for label in labels]
    if len({*ids}) < len(labels):
      raise ValueError(
        "config.filter.judge=model: this tokenizer begins several of "
        f"{', '.join(labels)} with one token, which no grade can be read off; take "
        "another judge"
      )
    rows = [chat_template.render_chat(tok, turns) for turns in conversations]
    fitting = [i for i, row in enumerate(rows) if len(row) <= cfg.max_length]
    found: list[list[float] | None] = [None] * len(rows)
    for at in range(0, len(fitting), LABEL_BATCH_ROWS):
      some = fitting[at : at + LABEL_BATCH_ROWS]
      tokens_BT, length_B = _padded([rows[i] for i in some])
      logp_BV = last_logprobs(params, tokens_BT, length_B)
      read = jax.device_get(logp_BV[: len(some), jnp.asarray(ids)]).tolist()
      for i, logprobs in zip(some, read, strict=True):
        found[i] = logprobs
    return found

  return score


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Rows right-padded to [LABEL_BATCH_ROWS, T], T a multiple of STEP, and their
  lengths (at least 1, so that empty rows pick a real position)."""
  T = -(-max(map(len, rows)) // STEP) * STEP
  tokens_BT = np.zeros((LABEL_BATCH_ROWS, T), np.int32)
  length_B = np.ones(LABEL_BATCH_ROWS, np.int32)
  for b, row in enumerate(rows):
    tokens_BT[b, : len(row)] = row
    length_B[b] = len(row)
  return tokens_BT, length_B
