"""The parameter tree of a decoder: its leaves, their shapes and logical axes.

A nested dict: embed, norm, head (only when untied), and layers, whose leaves have all
layers stacked on their first axis. Matrices are [in, out]. Also how the tensors of a
file hold the leaves, by which they are read in parts and written one at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from dalign.config.model import ModelConfig
from dalign.types import PyTree

Index = tuple[slice, ...]  # a part of an array, each slice with its start and stop
Read = Callable[[Index], np.ndarray]

TOP = {"embed": ("vocab", "width"), "norm": ("width",), "head": ("width", "vocab")}
MATRICES = {  # of a layer, in products with many rows
  "q": ("width", "heads"),
  "k": ("width", "kv_heads"),
  "v": ("width", "kv_heads"),
  "o": ("heads", "width"),
  "gate": ("width", "ffw"),
  "up": ("width", "ffw"),
  "down": ("ffw", "width"),
}
OF_EXPERTS = ("gate", "up", "down")
REST = {
  "attn_norm": ("width",),
  "attn_post_norm": ("width",),
  "mlp_norm": ("width",),
  "mlp_post_norm": ("width",),
  "q_norm": ("q_norm",),
  "k_norm": ("k_norm",),
  "sinks": ("head",),
  "router": ("width", "choice"),
}


def layer_leaves(cfg: ModelConfig) -> tuple[str, ...]:
  """The names of one layer's leaves."""
  names = [*cfg.norms, *MATRICES]
  names += ["q_norm", "k_norm"] if cfg.qk_norm else []
  names += ["sinks"] if cfg.sinks else []
  names += ["router"] if cfg.experts else []
  return (*names, *(f"{name}_bias" for name in cfg.biased))


def layer_names() -> dict[str, tuple[str, ...]]:
  """Every leaf that a layer of some family has, with the logical axes of its matrix."""
  matrices = MATRICES | {"router": REST["router"]}
  return MATRICES | REST | {f"{name}_bias": axes for name, axes in matrices.items()}


def is_matrix(name: str) -> bool:
  """Whether a leaf maps vectors to vectors, once for each layer and expert."""
  return not name.endswith(("norm", "bias", "sinks"))


def _axes(name: str, experts: bool) -> tuple[str, ...]:
  """The logical axes of a leaf of one layer."""
  matrix, _, part = name.partition("_lora")
  matrix = matrix.removesuffix("_bias")
  axes = (MATRICES | REST)[matrix]
  if part:  # of the adapters beside it
    return (axes[0], "rank") if part == "_a" else ("rank", axes[-1])
  axes = axes[-1:] if matrix != name else axes
  return ("expert", *axes) if experts and matrix in OF_EXPERTS else axes


def logical_axes(params: PyTree) -> PyTree:
  """The logical axis names of each leaf of a decoder, or of a tree with decoders and
  vectors in it, in the shape of the tree."""

  def one(name, node):
    if name == "layers":
      return {n: ("layer", *_axes(n, "router" in node)) for n in node}
    if isinstance(node, Mapping):
      return logical_axes(node)
    return TOP[name] if name in TOP else (None,) * node.ndim

  return {name: one(name, node) for name, node in params.items()}


def shapes(cfg: ModelConfig) -> PyTree:
  """The shape of each leaf."""
  q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
  every = cfg.qk_norm == "all"
  size = {
    "vocab": cfg.vocab,
    "width": cfg.width,
    "heads": q,
    "kv_heads": kv,
    "q_norm": q if every else cfg.head_dim,
    "k_norm": kv if every else cfg.head_dim,
    "head": cfg.heads,
    "ffw": cfg.ffw,
    "expert": cfg.experts,
    "choice": cfg.experts,
    "layer": cfg.layers,
  }
  names = dict.fromkeys(["embed", "norm"] if cfg.tied else TOP)
  names["layers"] = dict.fromkeys(layer_leaves(cfg))
  tree = logical_axes(names)
  layers = tree.pop("layers")

  def shape(axes):
    return tuple(size[axis] for axis in axes)

  top = {name: shape(axes) for name, axes in tree.items()}
  return top | {"layers": {name: shape(axes) for name, axes in layers.items()}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """A tensor of a model's file, or with {layer} and {expert} in its name one of each.

  leaves: what lies in it: one, or several along its outputs.
  transposed: a matrix is [out, in] in the file.
  mixed: the leaves take turns, output by output.
  offset: what a leaf is above the file's numbers.
  """

  name: str
  leaves: tuple[str, ...]
  transposed: bool = True
  mixed: bool = False
  offset: float = 0.0

  def names(self, cfg: ModelConfig) -> Iterator[str]:
    """The tensors' names."""
    for place in self.places(cfg):
      yield self.name.format(**place)

  def places(self, cfg: ModelConfig) -> Iterator[dict[str, int | None]]:
    """The layer and the expert of each of the tensors, or None."""
    layers = range(cfg.layers) if "{layer}" in self.name else [None]
    experts = range(cfg.experts) if "{expert}" in self.name else [None]
    for layer, expert in itertools.product(layers, experts):
      yield {"layer": layer, "expert": expert}

  def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
    """The shape of each of the tensors."""
    own = [_own_shape(self, cfg, leaf) for leaf in self.leaves]
    whole = (*own[0][:-1], sum(shape[-1] for shape in own))
    return whole[:-2] + whole[:-3:-1] if self.transposed else whole

  def take(self, cfg: ModelConfig, leaf: str, index: Index, read: Read) -> np.ndarray:
    """A part of one leaf, out of one tensor; `read` gives a part of that, and an index
    has a slice with start and stop for each axis, layers and {expert} apart."""
    at, own = self.leaves.index(leaf), [_own_shape(self, cfg, x) for x in self.leaves]
    *rest, out = index
    if self.mixed:
      n = len(self.leaves)
      out = slice(out.start * n, out.stop * n)
    else:
      before = sum(shape[-1] for shape in own[:at])
      out = slice(out.start + before, out.stop + before)
    turn = self.transposed and len(rest) > 0
    array = read((*rest[:-1], out, rest[-1]) if turn else (*rest, out))
    array = array.swapaxes(-1, -2) if turn else array
    array = array[..., at :: len(self.leaves)] if self.mixed else array
    return array.astype(np.float32) + np.float32(self.offset)

  def put(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor, out of its leaves (of one layer and {expert}), in their order."""
    parts = [np.asarray(part, np.float32) - np.float32(self.offset) for part in parts]
    if self.mixed:
      whole = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
    else:
      whole = np.concatenate(parts, axis=-1)
    turn = self.transposed and whole.ndim > 1
    return np.ascontiguousarray(whole.swapaxes(-1, -2) if turn else whole)


def _own_shape(stored: Stored, cfg: ModelConfig, leaf: str) -> tuple[int, ...]:
  """The shape of a leaf as far as it lies in one tensor."""
  every = shapes(cfg)
  if leaf in TOP:
    return every[leaf]
  shape = every["layers"][leaf][1:]
  return shape[1:] if "{expert}" in stored.name else shape


def take(
  cfg: ModelConfig,
  leaf: str,
  index: Index,
  stored: Sequence[Stored],
  read: Callable[[str, Index], np.ndarray],
) -> np.ndarray:
  """A part of a leaf of the whole tree, float32, tensor by tensor; `read(name, index)`
  gives a part of a tensor."""
  [where] = (s for s in stored if leaf in s.leaves)

  def one(index, **place):
    name = where.name.format(**place)
    return where.take(cfg, leaf, index, functools.partial(read, name))

  if leaf in TOP:
    return one(index)
  layers, *own = index
  out = np.empty([i.stop - i.start for i in index], np.float32)
  for at, layer in enumerate(range(layers.start, layers.stop)):
    if "{expert}" not in where.name:
      out[at] = one(own, layer=layer)
      continue
    for e, expert in enumerate(range(own[0].start, own[0].stop)):
      out[at, e] = one(own[1:], layer=layer, expert=expert)
  return out


def tensors(
  cfg: ModelConfig, stored: Sequence[Stored], leaf: Callable[[str, Any], np.ndarray]
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
  """The name of each tensor of a file, and what makes it; `leaf(name, layer)` gives a
  leaf of a layer, or of the top where the layer is None."""

  def make(s, layer, expert):
    parts = [leaf(name, layer) for name in s.leaves]
    return s.put(parts if expert is None else [part[expert] for part in parts])

  for s in stored:
    for place in s.places(cfg):
      yield s.name.format(**place), functools.partial(make, s, **place)
