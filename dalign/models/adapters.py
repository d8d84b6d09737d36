"""LoRA (2106.09685): small trained matrices beside the frozen ones of a decoder.

A matrix W [in, out] of a layer gets leaves A [in, rank] and B [rank, out] beside it and
computes x W + scale * (x A) B. What is trained is a tree of its own: these leaves and
all that is no decoder's, such as a reward model's head. The rest can be shared.
"""

from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from dalign.config.model import LoRAConfig
from dalign.config.model import ModelConfig
from dalign.models import param_tree
from dalign.types import Key
from dalign.types import PyTree

A, B = "_lora_a", "_lora_b"
DECODERS = param_tree.TOP | param_tree.layer_names()


def attach(params: PyTree, key: Key, *, cfg: ModelConfig, lora: LoRAConfig) -> PyTree:
  """A decoder's parameters with adapters that change nothing yet: A is uniform in
  1/sqrt(inputs), as a layer of torch, and B zero."""
  shapes = param_tree.shapes(cfg)["layers"]
  sparse = cfg.experts and set(lora.leaves) & set(param_tree.OF_EXPERTS)
  if sparse:
    raise ValueError(
      f"config.lora.leaves: no adapters for {', '.join(sorted(sparse))} of experts; "
      "wanted some of q, k, v, o"
    )
  made: dict[str, Any] = {}
  for i, name in enumerate(lora.leaves):
    layers, inputs, outputs = shapes[name]
    limit = inputs**-0.5
    shape = layers, inputs, lora.rank
    draw = jax.random.uniform(
      jax.random.fold_in(key, i), shape, minval=-limit, maxval=limit
    )
    made |= {name + A: draw, name + B: jnp.zeros((layers, lora.rank, outputs))}
  return params | {"layers": params["layers"] | made}


def frozen_dtype(leaf: str, *, lora: LoRAConfig) -> str:
  """In what a leaf of a decoder is held: matrices that adapters leave as they are in
  `lora.frozen`, all else in float32."""
  low = lora.rank and leaf in ("embed", "head", *param_tree.MATRICES)
  return lora.frozen if low else "float32"


def cast_frozen(params: PyTree, *, lora: LoRAConfig) -> PyTree:
  """A decoder's parameters, each in its `frozen_dtype`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(frozen_dtype(path[-1].key, lora=lora)), params
  )


def merge_adapters(params: PyTree, *, cfg: ModelConfig) -> PyTree:
  """A decoder's parameters with the adapters added to their matrices, float32."""
  layers = {}
  for name, leaf in params["layers"].items():
    if name.endswith((A, B)):
      continue
    a, b = params["layers"].get(name + A), params["layers"].get(name + B)
    if a is not None:
      leaf = leaf + cfg.lora_scale * jnp.matmul(a, b, precision="highest")
    layers[name] = leaf
  return params | {"layers": layers}


def copy_trainable(params: PyTree) -> PyTree:
  """The parameters, with a copy of each that training would change."""
  trained, frozen = split(params)
  return merge_trees(frozen, jax.tree.map(lambda x: x.copy(), trained))


def split(params: PyTree) -> tuple[PyTree, PyTree]:
  """(trained, frozen): the same nested dicts with some of the leaves each. Without
  adapters all of them are trained."""
  leaves = traverse_util.flatten_dict(params)
  own = {path for path in leaves if path[-1].endswith((A, B))}
  if not own:
    return params, {}
  own |= {path for path in leaves if path[-1] not in DECODERS}
  trained = {path: x for path, x in leaves.items() if path in own}
  frozen = {path: x for path, x in leaves.items() if path not in own}
  return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def merge_trees(one: PyTree, other: PyTree) -> PyTree:
  """The leaves of both of `split`'s trees in one."""
  leaves = traverse_util.flatten_dict(one) | traverse_util.flatten_dict(other)
  return traverse_util.unflatten_dict(leaves)
