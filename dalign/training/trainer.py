"""A loop of updates with checkpoints, metrics and limits: what every training stage
runs."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import io
import time
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh
import numpy as np

from dalign.config.fields import Halted
from dalign.config.model import ModelConfig
from dalign.config.schema import ProfileConfig
from dalign.config.training import OptimizerConfig
from dalign.models import adapters
from dalign.models import ops
from dalign.runs import distributed
from dalign.runs import metrics as logs
from dalign.runs import stopping
from dalign.runs import store as files
from dalign.runs.workdir import Store
from dalign.training import checkpoints
from dalign.training import train
from dalign.types import Key
from dalign.types import PyTree


@dataclasses.dataclass
class Trainer:
  """A loop of updates with checkpoints and metrics; it takes `params` for its own.

  Its loop is `with` it, which saves the last step that was done where SIGTERM comes.
  What it ends with is the mean of the parameters after each of the last `averaged`
  steps, or with 0 the parameters after the last.
  """

  stage: str
  store: Store
  metrics: logs.Metrics
  mesh: Mesh
  arch: ModelConfig
  key: Key  # from which the randomness of each step comes
  params: PyTree
  loss: train.LossFn
  optimizer: OptimizerConfig
  steps: int
  every: int
  averaged: int = 0
  profile: ProfileConfig = ProfileConfig(steps=())
  result: Callable[[PyTree], PyTree] = lambda params: params  # what is kept of them
  beside: PyTree = dataclasses.field(default_factory=dict)  # read, and never trained

  def __post_init__(self):
    trained, frozen = adapters.split(self.params)
    self._frozen = adapters.merge_trees(frozen, self.beside)
    program = train.program(
      self.loss,
      train.make_optimizer(self.optimizer, steps=self.steps),
      self.mesh,
      trained,
      averaged=self.averaged > 0,
      average_from=self.steps - self.averaged,
    )
    self.saved = checkpoints.Checkpoints(self.store.path(self.stage, "checkpoints"))
    self.in_host_memory = jax.default_backend() == "cpu"
    self.meta: dict = {}
    latest = self.saved.latest()
    if latest is None:
      self.state = program.create(trained)
    else:
      self.state, self.meta = self.saved.restore(latest, program.state)
    self.params = None  # the state holds what is trained, and its updates donate it
    self.step = latest or 0
    self._since = self.step + 1  # the first step of this go
    self._trace, self._mark = contextlib.ExitStack(), contextlib.ExitStack()
    self.metrics.rewind(self.stage, self.step)
    self._update = program.update

  def __enter__(self) -> "Trainer":
    self._profile()
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Saves what a SIGTERM would lose, where one process alone decides that."""
    self._mark.close()
    self._trace.close()
    if isinstance(error, stopping.Stopped) and not distributed.is_multi_process():
      self._save()

  @property
  def all_params(self) -> PyTree:
    """The parameters as they are now, with those that are not trained."""
    return adapters.merge_trees(self._frozen, self.state.params)

  def update(self, batch: dict, used: int, extra: dict | None = None) -> dict:
    """One step over the first `used` micro-batches; returns and writes its metrics."""
    with stopping.uninterrupted():
      return self._step(batch, used, extra)

  def _step(self, batch: dict, used: int, extra: dict | None) -> dict:
    if "positions_BT" in batch:
      longest = int(np.max(batch["positions_BT"])) + 1
      self.arch.check_length(longest, f"a row of {self.stage}")
    key = ops.stream(self.key, self.stage, self.step)
    if self.in_host_memory:
      checkpoints.give_back_memory()  # of what was done since the last step
    start = time.monotonic()
    self.state, means = self._update(self.state, batch, key, used, self._frozen)
    values = {name: float(mean.value()) for name, mean in means.items()}
    values["step_s"] = time.monotonic() - start
    self.step += 1
    self._check(values, batch)
    values |= {name: np.nan for name, mean in means.items() if not float(mean.count)}
    named = {f"{self.stage}/{name}": value for name, value in values.items()}
    self.metrics.write(self.stage, self.step, named | (extra or {}))
    self._profile()
    return values

  def _profile(self) -> None:
    """Between two steps: begins or ends the trace that the config asks for, in which
    each step is marked, with what leads up to its update."""
    first, last = self.profile.steps or (0, 0)
    step = self.step + 1
    self._mark.close()
    if not first <= step <= min(last, self.steps):
      self._trace.close()
      return
    if step == max(first, self._since):
      place = self.store.workdir / "profile" / self.stage
      self._trace.enter_context(jax.profiler.trace(place))
    mark = jax.profiler.StepTraceAnnotation(self.stage, step_num=step)
    self._mark.enter_context(mark)

  def _check(self, values: dict, batch: dict) -> None:
    """Halts where a number is not finite or the gradient above its limit, and says
    whether the optimizer skipped the step."""
    stop = functools.partial(halt, self.store, self.stage, self.step, batch=batch)
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
      stop(f"{', '.join(bad)} not finite", "find out why")
    norm, limits = values["grad_norm"], self.optimizer
    if 0 < limits.stop_norm < norm:
      part = "world" if self.stage == "base" else self.stage
      key = f"config.{part}.optimizer.stop_norm={limits.stop_norm:g}"
      stop(f"a gradient of norm {norm:.4g}, above {key}", "raise that")
    if limits.skip_norm:
      values["skipped"] = float(norm > limits.skip_norm)

  def skip(self, extra: dict) -> None:
    """A step without a gradient: counted and written, nothing is changed."""
    with stopping.uninterrupted():
      self.step += 1
      self.metrics.write(self.stage, self.step, extra)
      self._profile()

  def save(self) -> None:
    """A checkpoint, at every `every` steps and at the end."""
    if self.step % self.every == 0 or self.step == self.steps:
      self._save()

  def _save(self) -> None:
    with stopping.uninterrupted():
      self.saved.save(self.step, self.state, self.meta)
      if self.in_host_memory:
        self.saved.wait_until_finished()
      self.store.pause(self.stage)

  def finish(self) -> PyTree:
    """Writes the parameters beside the checkpoints and returns them."""
    trained = self.state.average if self.averaged else self.state.params
    place = self.store.path(self.stage, "params")
    checkpoints.save_params(place, self.result(trained))
    self.saved.close()
    return self.result(adapters.merge_trees(self._frozen, trained))


def halt(
  kept: Store, stage: str, step: int, why: str, advice: str, batch: Mapping
) -> NoReturn:
  """Stops at a step, whose batch, a mapping of arrays, is kept. Raises Halted."""
  where, content = kept.path(stage, f"halted_step_{step}.npz"), io.BytesIO()
  if distributed.is_first_process():
    arrays: dict[str, Any] = {n: np.asarray(x) for n, x in batch.items()}
    np.savez(content, **arrays)
    files.write_bytes(where, content.getvalue())
  raise Halted(
    f"{stage} step {step}: {why}; its batch is in {where}. Nothing of this step is "
    f"kept: {advice}, and the same command goes on from the last checkpoint"
  )
