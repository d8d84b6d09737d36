"""The model of a run: architecture, tokenizer, parameters and sampler."""

import dataclasses
import functools
import pathlib
import weakref

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dalign.config import convert
from dalign.config.model import Compute
from dalign.config.model import LoRAConfig
from dalign.config.model import ModelConfig
from dalign.config.model import ModelSource
from dalign.config.model import SamplerConfig
from dalign.config.model import ThinkConfig
from dalign.formats import hub
from dalign.formats import weights
from dalign.models import adapters
from dalign.models import ops
from dalign.models import param_tree
from dalign.models import sharding
from dalign.runs import progress
from dalign.runs.workdir import Store
from dalign.sampling import sampler as sampling
from dalign.tasks import world
from dalign.text import chat_template
from dalign.text import thinking
from dalign.text import vocab
from dalign.training import checkpoints
from dalign.types import PyTree

FOLDED = "in front of the first user turn"


class Model:
  """The base model of a run, on its mesh, and what its stages have made of it.

  It knows its sources alone: files or a seed, the ends of a thought, adapters. Files
  are read when they are first needed.
  """

  def __init__(
    self,
    store: Store,
    mesh: Mesh,
    *,
    source: ModelSource,
    think: ThinkConfig,
    lora: LoRAConfig,
    world_depth: int | None,
    seed: int,
  ):
    self.store, self.mesh = store, mesh
    self._source, self._lora, self._world_depth = source, lora, world_depth
    self._seed = seed
    self._shared: list[weakref.ref] = []  # leaves of the base that somebody may hold
    self.think = thinking.ThinkFormat(open=think.open, close=think.close)
    self.trained_think = self.think if think.used else None  # what is trained writes it

  @property
  def has_files(self) -> bool:
    """Whether the model's files are here, or it needs none; a plan needs only sizes."""
    path = self._source.path
    return (
      path.startswith("pip:")
      or path in ("random", "world")
      or not self._source.random
      or pathlib.Path(path).expanduser().exists()
      or hub.cached(path)
    )

  @functools.cached_property
  def _checkpoint(self) -> weights.Checkpoint:
    """The base model as its files have it, parameters unread."""
    if self._source.path in ("random", "world"):
      tok = vocab.tiny_tokenizer()
      if self._world_depth:
        tok = vocab.word_tokenizer(world.vocabulary(self._world_depth))
      sizes = dict(self._source.random) | {"vocab": len(tok.ids)}
      arch = convert.build(ModelConfig, sizes, "config.model.random")
      return weights.Checkpoint.random(arch, tok, self._seed)
    progress.say(f"loading {self._source.path}")
    return weights.find(self._source.path)

  @functools.cached_property
  def arch(self) -> ModelConfig:
    scale = self._lora.alpha / self._lora.rank if self._lora.rank else 0.0
    if self.has_files:
      arch = self._checkpoint.cfg
    else:
      sizes = self._source.random
      arch = convert.build(ModelConfig, sizes, "config.model.random")
    return dataclasses.replace(arch, lora_scale=scale)

  @functools.cached_property
  def file_tok(self) -> chat_template.Tokenizer:
    """The tokenizer as the model's files have it, but that it opens no thought, and
    that all stages have one day."""
    found = dataclasses.replace(self._checkpoint.tok, date=self._source.date)
    _say_folds(found)
    return found.without_opened_thought(self.think.tag)

  @property
  def notes(self) -> dict[str, str]:
    """What a stage's manifest says of the model, as far as its files were read."""
    folds = "file_tok" in vars(self) and self.file_tok.folds
    return {"system_turns": FOLDED} if folds else {}

  @functools.cached_property
  def tok(self) -> chat_template.Tokenizer:
    """The tokenizer, which reads the tags of the think format."""
    return self.file_tok.with_tags(self.think.open + self.think.close)

  @functools.cached_property
  def shapes(self) -> PyTree:
    """The base model's parameters as ShapeDtypeStructs."""
    return _shapes(self.arch)

  def base_params(self) -> PyTree:
    """The base model's parameters, on the mesh: a new copy at each call, but with
    adapters, which leave them as they are, the same arrays for all who hold them."""
    if not self._lora.rank:
      return self._read_base()
    leaves = [ref() for ref in self._shared]
    if not leaves or any(leaf is None for leaf in leaves):
      leaves = jax.tree.leaves(self._read_base())
      self._shared = [weakref.ref(leaf) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(self.shapes), leaves)

  def _read_base(self) -> PyTree:
    if self._world_depth is None:
      return self.fresh_params(
        functools.partial(adapters.frozen_dtype, lora=self._lora)
      )
    params = self._load(self.trained_params_path("base"), self.shapes)
    return adapters.cast_frozen(params, lora=self._lora)

  def free(self, params: PyTree) -> None:
    """Deletes parameters that were read for one use, but those that others share."""
    if not self._lora.rank:
      jax.tree.map(lambda x: x.delete(), params)

  def fresh_params(self, dtype=lambda leaf: jnp.float32) -> PyTree:
    """The parameters that the model's source has, on the mesh; `dtype` is of a leaf's
    name."""
    return self._checkpoint.params(
      jax.tree.map(lambda x: x.sharding, self.abstract_on_mesh(self.shapes)), dtype
    )

  def start_params(self, start: str) -> PyTree:
    """What a training stage starts from: "base", with new adapters where the config has
    such, or "sft"."""
    if start == "sft":
      return self.trained_params("sft")
    return self.with_adapters(self.base_params())

  def with_adapters(self, params: PyTree) -> PyTree:
    """A decoder's parameters with the adapters that the config asks for."""
    if not self._lora.rank:
      return params
    key = ops.stream(jax.random.key(self._seed), "lora")
    return adapters.attach(params, key, cfg=self.arch, lora=self._lora)

  def trained_params(self, stage: str, extend=lambda params: params) -> PyTree:
    """The parameters that a finished stage ended with; `extend` makes a decoder's into
    what the stage trains. Where that were adapters, the rest is the base model's."""
    where = self.trained_params_path(stage)
    if not self._lora.rank:
      return self._load(where, jax.eval_shape(extend, self.shapes))
    trained, frozen = adapters.split(extend(self.with_adapters(self.base_params())))
    return adapters.merge_trees(frozen, self._load(where, trained))

  def trained_params_path(self, stage: str) -> pathlib.Path:
    """Where the parameters of a finished stage are; ValueError where they are not."""
    return self.store.left(stage, "params")

  def _load(self, where: pathlib.Path, shapes: PyTree) -> PyTree:
    """Saved parameters, laid on the mesh as they are read."""
    return checkpoints.load_params(where, self.abstract_on_mesh(shapes))

  def abstract_on_mesh(self, shapes: PyTree) -> PyTree:
    """Parameters as ShapeDtypeStructs that say where on the mesh they lie."""
    return _abstract_on_mesh(self.mesh, shapes)

  def sampler(self, compute: Compute, shapes: SamplerConfig) -> sampling.Sampler:
    """A sampler of the model on its mesh; its programs are compiled for it alone."""
    return _sampler(
      self.arch,
      self.tok.stop_ids if self.has_files else (0,),
      self.mesh,
      compute=compute,
      shapes=shapes,
    )


class AuxiliaryModel:
  """A model beside the run's own, on its mesh, to be asked and not trained. What path
  it may have: `weights.find`."""

  def __init__(
    self,
    path: str,
    mesh: Mesh,
    *,
    compute: Compute,
    shapes: SamplerConfig,
    date: str,
  ):
    progress.say(f"loading {path}")
    checkpoint = weights.find(path)
    self.arch, self.tok = checkpoint.cfg, dataclasses.replace(checkpoint.tok, date=date)
    _say_folds(self.tok)
    self.sampler = _sampler(
      self.arch, self.tok.stop_ids, mesh, compute=compute, shapes=shapes
    )
    abstract = _abstract_on_mesh(mesh, _shapes(self.arch))
    params = checkpoint.params(jax.tree.map(lambda x: x.sharding, abstract))
    self.weights = self.sampler.prepare(params)


def _say_folds(tok: chat_template.Tokenizer) -> None:
  if tok.folds:
    progress.say(f"its chat template takes no system turn: they stand {FOLDED}")


def _sampler(arch, stop_ids, mesh: Mesh, *, compute, shapes) -> sampling.Sampler:
  return sampling.Sampler(
    cfg=arch,
    compute=compute,
    stop_ids=stop_ids,
    sampler=shapes,
    mesh=mesh if mesh.size > 1 else None,
  )


def _abstract_on_mesh(mesh: Mesh, shapes: PyTree) -> PyTree:
  axes = param_tree.logical_axes(shapes)
  return sharding.with_shardings(shapes, sharding.shardings(mesh, axes, shapes))


def _shapes(arch: ModelConfig) -> PyTree:
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    param_tree.shapes(arch),
    is_leaf=lambda x: isinstance(x, tuple),
  )
