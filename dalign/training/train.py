"""The training step: one update for many losses. Knows no text, data order or stage."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Callable

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from dalign.config.training import BatchConfig
from dalign.config.training import OptimizerConfig
from dalign.models import adapters
from dalign.models import param_tree
from dalign.models import sharding
from dalign.types import Key
from dalign.types import Leaf
from dalign.types import Mean
from dalign.types import PyTree

LossFn = Callable[[PyTree, PyTree, Key], tuple[Mean, dict[str, Mean]]]


@struct.dataclass
class TrainState:
  """Everything a step changes. `average` is the mean of the last steps' parameters, or
  None where none is kept."""

  step: Leaf
  params: Leaf
  opt_state: Leaf
  average: Leaf


def make_optimizer(cfg: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
  """AdamW (1711.05101) with warm-up, cosine decay and clipping by global norm; for
  matrices Muon (2502.16982) where the config gives them a rate.

  Norm scales and other vectors are not decayed. A step above the config's skip_norm
  changes neither parameters nor moments, and the schedule does not count it.
  """
  rate = functools.partial(_schedule, cfg, steps)
  if cfg.matrix_rate:
    tx = optax.contrib.muon(
      rate(cfg.matrix_rate),
      weight_decay=cfg.weight_decay,
      adam_b1=cfg.beta1,
      adam_b2=cfg.beta2,
      adam_learning_rate=rate(cfg.learning_rate),
      muon_weight_dimension_numbers=_per_layer_matrices,
    )
  else:
    tx = optax.adamw(
      rate(cfg.learning_rate),
      b1=cfg.beta1,
      b2=cfg.beta2,
      weight_decay=cfg.weight_decay,
      mask=_matrices,
    )
  tx = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), tx)
  return _skip_large_updates(tx, cfg.skip_norm) if cfg.skip_norm else tx


def adam(learning_rate: float = 0.0) -> optax.GradientTransformation:
  """Adam (1412.6980) at a rate that is part of its state, for updates that are not of a
  planned number; gradients are clipped to global norm 1."""
  rated = optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate, b2=0.99)
  return optax.chain(optax.clip_by_global_norm(1.0), rated)


def _skip_large_updates(
  tx: optax.GradientTransformation, max_norm: float
) -> optax.GradientTransformation:
  """As `tx`, whose state it has; nothing changes where the global norm is above
  `max_norm`. optax.apply_if_finite does so for other gradients, optax.MultiSteps with a
  second copy of them."""

  def update(grads, state, params=None):
    updates, after = tx.update(grads, state, params)
    take = optax.tree.norm(grads) <= max_norm
    updates = jax.tree.map(lambda x: jnp.where(take, x, 0.0), updates)
    return updates, jax.tree.map(lambda x, y: jnp.where(take, x, y), after, state)

  return optax.GradientTransformation(tx.init, update)


def _schedule(cfg: OptimizerConfig, steps: int, peak: float):
  warmup = min(steps - 1, round(cfg.warmup_share * steps))
  return optax.warmup_cosine_decay_schedule(
    init_value=peak / max(warmup, 1),
    peak_value=peak,
    warmup_steps=warmup,
    decay_steps=max(steps, 1),
    end_value=peak * cfg.final_share,
  )


def _matrices(params: PyTree) -> PyTree:
  """Which leaves are matrices."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.ndim > 1 and _is_matrix(path), params
  )


def _is_matrix(path) -> bool:
  return param_tree.is_matrix(str(getattr(path[-1], "key", "")))


def _per_layer_matrices(params: PyTree) -> PyTree:
  """What Muon is to take for matrices: those of the layers, each by itself."""
  layers = jax.tree_util.DictKey("layers")

  def one(path, x):
    if layers not in path or x.ndim < 3 or not _is_matrix(path):
      return None
    return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)

  return jax.tree_util.tree_map_with_path(one, params)


def create(
  params: PyTree, tx: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
  """The state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    average=jax.tree.map(jnp.zeros_like, params) if averaged else None,
  )


def make_update(
  loss_fn: LossFn, tx: optax.GradientTransformation, *, average_from: int = 0
):
  """The pure `update(state, batch, key, used, frozen) -> (state, metrics)` of a loss.

  `frozen` are parameters that the loss reads and no step changes, joined to those of
  the state (`adapters.merge_trees`); with none of them, an empty tree.

  Each leaf of `batch` has micro-batches as its first axis, of which the first `used`
  (at least one) are looped over: the shape stays, what is empty costs nothing.
  Gradients of the loss's *total* are added over them and divided once by the added
  count, so the split into micro-batches does not change the result. A state's average
  is that of the parameters after each step past `average_from` (stochastic weight
  averaging, 1803.05407), and before that the parameters themselves.
  """

  def totals(params, batch, key, frozen):
    def total(params):
      loss, metrics = loss_fn(adapters.merge_trees(frozen, params), batch, key)
      return loss.total, (loss, metrics)

    grads, (loss, metrics) = jax.grad(total, has_aux=True)(params)
    return grads, loss, metrics

  def update(
    state: TrainState, batch: PyTree, key: Key, used, frozen: PyTree | None = None
  ):
    frozen = frozen or {}

    def part(i):
      micro = jax.tree.map(lambda x: x[i], batch)
      return totals(state.params, micro, jax.random.fold_in(key, i), frozen)

    def add(i, sums):
      return jax.tree.map(jnp.add, sums, part(i))

    if len(jax.tree.leaves(batch)[0]) == 1:
      grads, loss, metrics = part(0)  # a loop would hold its gradients twice
    else:
      shapes = jax.eval_shape(part, 0)
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      grads, loss, metrics = jax.lax.fori_loop(0, used, add, zeros)
    grads = jax.tree.map(lambda g: g / jnp.maximum(loss.count, 1.0), grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    n = jnp.maximum(step - average_from, 1)
    average = state.average
    if average is not None:
      average = jax.tree.map(lambda a, p: a + (p - a) / n, average, params)
    state = TrainState(step=step, params=params, opt_state=opt_state, average=average)
    return state, metrics | {"loss": loss, "grad_norm": Mean.of(norm)}

  return update


def make_step(loss_fn: LossFn):
  """A compiled, pure `step(state, batch, parts) -> (state, metrics)` by `adam`, for a
  loss that draws nothing. A batch has [B, ...] arrays, which are cut into so many parts
  as micro-batches; metrics are scalars."""
  update = make_update(loss_fn, adam())

  @functools.partial(jax.jit, static_argnums=2)
  def step(state: TrainState, batch: Mapping[str, jax.Array], parts: int):
    micro = {n: x.reshape(parts, -1, *x.shape[1:]) for n, x in batch.items()}
    state, means = update(state, micro, jax.random.key(0), parts)
    return state, {name: mean.value() for name, mean in means.items()}

  return step


@dataclasses.dataclass(frozen=True)
class Program:
  """Training on a mesh: `state` is its state as ShapeDtypeStructs that say where each
  array lies, `create(params)` makes it and takes the parameters for its own, `jitted`
  is the compiled update, whose state is donated and laid out as it came in."""

  mesh: Mesh
  state: TrainState
  create: Callable[[PyTree], TrainState]
  jitted: jax.stages.Wrapped

  def update(self, state, batch, key, used, frozen: PyTree | None = None):
    """`make_update`'s of arrays of the host."""
    batch = {
      name: sharding.put_on_mesh(x, sharding.batch_sharding(self.mesh, name, x, lead=1))
      for name, x in batch.items()
    }
    return self.jitted(state, batch, key, jnp.int32(used), frozen or {})


def program(
  loss: LossFn,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  params: PyTree,
  *,
  averaged: bool = False,
  average_from: int = 0,
) -> Program:
  """What trains such parameters, arrays or ShapeDtypeStructs, by a loss; moments lie as
  their parameters."""

  def first(params):
    return create(params, tx, averaged=averaged)

  state = jax.eval_shape(first, params)
  own = sharding.shardings(mesh, param_tree.logical_axes(params), params)
  everywhere = sharding.replicated(mesh)
  moments = sharding.shardings_like_params(mesh, state.opt_state, params, own)
  placed = TrainState(
    step=everywhere,
    params=own,
    opt_state=moments,
    average=own if averaged else None,
  )
  return Program(
    mesh=mesh,
    state=sharding.with_shardings(state, placed),
    create=jax.jit(first, out_shardings=placed, donate_argnums=0),
    jitted=jax.jit(
      make_update(loss, tx, average_from=average_from),
      in_shardings=(placed, None, None, None, None),
      out_shardings=(placed, everywhere),
      donate_argnums=0,
    ),
  )


def micro_batches(lines: dict, shape: BatchConfig):
  """[B, T] arrays as [M, rows, T] micro-batches, and how many of them are used.

  Raises ValueError when there are more lines than one update holds.
  """
  have, room = len(lines["tokens_BT"]), shape.micro * shape.rows
  if have > room:
    raise ValueError(
      f"an update needs {have} lines of {shape.length} tokens, its batch holds {room}: "
      "raise batch.micro"
    )
  batch = {}
  for name, x in lines.items():
    x = np.concatenate([x, np.zeros((room - have, *x.shape[1:]), x.dtype)])
    batch[name] = x.reshape(shape.micro, shape.rows, *x.shape[1:])
  return batch, max(1, -(-have // shape.rows))
