"""The least time that each work takes on a machine of given rates.

Every part of a work takes the longer of its arithmetic and its memory traffic, and the
parts follow one another. What rows share is computed once: nobody has to repeat it.
"""

import dataclasses
import json
import pathlib

from benchmarks import works


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """The shape of a decoder of the Llama family with a tied head."""

  layers: int
  width: int
  heads: int
  kv_heads: int
  head_dim: int
  ffw: int
  vocab: int

  @classmethod
  def of(cls, path: str) -> "Model":
    """Of a Hugging Face directory."""
    c = json.loads((pathlib.Path(path) / "config.json").read_text())
    return cls(
      layers=c["num_hidden_layers"],
      width=c["hidden_size"],
      heads=c["num_attention_heads"],
      kv_heads=c["num_key_value_heads"],
      head_dim=c["hidden_size"] // c["num_attention_heads"],
      ffw=c["intermediate_size"],
      vocab=c["vocab_size"],
    )

  @property
  def body(self) -> int:
    """Weights of all layers."""
    attention = 2 * self.head_dim * (self.heads + self.kv_heads) + 3 * self.ffw
    return self.layers * self.width * attention

  @property
  def head(self) -> int:
    """Weights of the head."""
    return self.width * self.vocab

  def flops(self, tokens: float, predicted: float, seen: float) -> float:
    """Of a forward pass: tokens through the layers, predicted ones through the head,
    and pairs of a token and one that it sees."""
    pairs = 4.0 * self.heads * self.head_dim * self.layers * seen
    return 2.0 * self.body * tokens + 2.0 * self.head * predicted + pairs

  def kv(self, tokens: float) -> float:
    """Numbers in the cache of some tokens."""
    return 2.0 * self.layers * self.kv_heads * self.head_dim * tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
  """GFLOP/s of matrix products, GB/s of reading, and bytes a weight."""

  gflops: float
  gb_s: float
  weight: int

  def seconds(self, flops: float, numbers: float = 0.0) -> float:
    """The longer of arithmetic and reading that many weights or cached numbers."""
    return max(flops / self.gflops, numbers * self.weight / self.gb_s) / 1e9


def causal(n: float, before: float = 0.0) -> float:
  """Pairs of each of n tokens and what it sees: itself, those to its left, and more."""
  return n * before + n * (n + 1) / 2


def floor(work, model: Model, rates: Rates) -> dict[str, float]:
  """Seconds of each part of a work."""
  if isinstance(work, works.Decode):
    rows = [len(row) - work.shared for row in work.rows()]
    return _decode(rows, work.lengths(), work.shared, work.batch, model, rates)
  if isinstance(work, works.Train):
    n, seen = work.tokens, work.batch * causal(work.length)
    passes = 3 * model.flops(n, n, seen) + work.remat * model.flops(n, 0, seen)
    return {
      "gradient": rates.seconds(passes),
      "update": _adamw(model, rates),
    }
  rows = work.prompts * work.samples
  found = _decode([work.prompt] * rows, [work.new] * rows, 0, rows, model, rates)
  again = (
    rows - work.prompts
  ) * work.prompt  # prompt tokens that forks need not repeat
  spared = model.flops(again, 0, (rows - work.prompts) * causal(work.prompt))
  found["prefill"] -= rates.seconds(spared)
  once = model.flops(
    work.prompts * work.prompt + rows * work.new,
    rows * work.new,
    work.prompts * causal(work.prompt) + rows * causal(work.new, work.prompt),
  )
  found["reference"] = rates.seconds(once)
  return found | {"update": rates.seconds(3 * once) + _adamw(model, rates)}


def _decode(own, new, shared, batch, model, rates) -> dict[str, float]:
  """Prefill of each prompt, then steps that are always full. A step reads the weights
  and the caches once; a shared prefix is read once for all rows."""
  prefill = model.flops(shared, 0, causal(shared))
  prefill += model.flops(sum(own), len(own), sum(causal(n, shared) for n in own))
  steps = sum(n - 1 for n in new) / batch
  pairs = zip(own, new, strict=True)
  seen = sum((n - 1) * (shared + o + n / 2) for o, n in pairs) / max(steps, 1)
  step = model.flops(batch, batch, seen)
  numbers = model.body + model.head + model.kv(seen - shared * (batch - 1))
  return {
    "prefill": rates.seconds(prefill),
    "decode": steps * rates.seconds(step, numbers),
  }


def _adamw(model: Model, rates: Rates) -> float:
  """Reads parameter, gradient and two moments, writes three of them, float32."""
  return 28.0 * (model.body + model.head) / rates.gb_s / 1e9
