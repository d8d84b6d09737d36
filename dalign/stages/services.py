"""What a stage works with, each service made of the parts of the config that the stage
declares.

A `Workspace` is the folder and the devices of a run, and holds no config. `Services`
are those of one stage: they hold what `config.stages` gives that stage, and a service
that needs another part is not there.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import pathlib
from typing import Any, Generic, TypeVar
import weakref

import jax

from dalign.config import convert
from dalign.config import stages
from dalign.config.schema import Config
from dalign.config.training import BatchConfig
from dalign.config.training import OptimizerConfig
from dalign.data import bundled
from dalign.data import prompt_sets
from dalign.judges import recordings
from dalign.models import kernels
from dalign.models import sharding
from dalign.runs import buckets
from dalign.runs import devices as machines
from dalign.runs import manifests
from dalign.runs import metrics
from dalign.runs import progress
from dalign.runs import store as files
from dalign.runs.workdir import Store
from dalign.sampling import likelihood
from dalign.sampling import sampler as sampling
from dalign.sampling.programs import Weights
from dalign.stages import model as models
from dalign.stages import prompts as prompt_choice
from dalign.tasks import base
from dalign.tasks import english
from dalign.tasks import policy_world
from dalign.text import thinking
from dalign.training import train
from dalign.training import trainer
from dalign.types import Key
from dalign.types import Prompt
from dalign.types import PyTree
from dalign.types import Spec

C = TypeVar("C", bound=stages.Stage, covariant=True)
S = TypeVar("S", bound=stages.Stage)
T = TypeVar("T")


class Workspace:
  """The folder, the metrics and the mesh of a run, which its stages share."""

  def __init__(
    self,
    cfg: Config,
    workdir: pathlib.Path,
    shared: dict[str, pathlib.Path] | None = None,
    devices=None,
  ):
    """`shared` has the workdirs of stages that were run elsewhere. Raises ValueError
    where the devices cannot compute as `config.compute` says."""
    platform = (devices or jax.devices())[0].platform
    if platform == "cpu" and cfg.compute.kv_dtype != "float32":
      raise ValueError(
        "config.compute.kv_dtype: wanted float32 on a CPU, whose XLA has no batched "
        f"product of attention in other types; got {cfg.compute.kv_dtype}"
      )
    wanted = kernels.PLATFORMS.get(cfg.compute.attention, platform)
    if wanted != platform:
      raise ValueError(
        f"config.compute.attention: {cfg.compute.attention} runs on a {wanted}, this "
        f"is a {platform}; use xla"
      )
    self.store = Store(workdir, shared)
    self.metrics = metrics.Metrics(workdir, cfg.log, convert.flat(cfg))
    self.mesh = sharding.make_mesh(cfg.mesh, devices)
    self.start_over = cfg.start_over
    self.opened = False  # whether a stage has begun or gone on
    self._made: dict[tuple[str, str], Any] = {}

  def once(self, make: Callable[..., T], *args, **parts) -> T:
    """make(*args, **parts), which stages with equal parts share."""
    key = f"{make.__module__}.{make.__qualname__}", repr(sorted(parts.items()))
    if key not in self._made:
      self._made[key] = make(*args, **parts)
    return self._made[key]


def of(kind: type[S], cfg: Config, work: Workspace) -> "Services[S]":
  """The services of a stage, or of what else declares what it reads of a config."""
  return Services(stages.of(kind, cfg), work)


class Services(Generic[C]):
  """What one stage works with."""

  def __init__(self, cfg: C, work: Workspace):
    self.cfg, self._work = cfg, work
    self.store, self.metrics, self.mesh = work.store, work.metrics, work.mesh
    self._cache: dict[Callable, Any] = {}
    self._base: Callable[[], Weights | None] = lambda: None

  def _once(self, make: Callable[..., T], *args, **parts) -> T:
    """As `Workspace.once`, and at once where the stage has asked before."""
    if make not in self._cache:
      self._cache[make] = self._work.once(make, *args, **parts)
    return self._cache[make]

  @property
  def key(self: "Services[stages.OfModel]") -> Key:
    """What all randomness comes from, by name and step."""
    return jax.random.key(self.cfg.seed)

  @property
  def model(self: "Services[stages.OfModel]") -> models.Model:
    """The model: architecture, tokenizer and parameters."""
    return self._once(
      models.Model,
      self.store,
      self.mesh,
      source=self.cfg.model,
      think=self.cfg.think,
      lora=self.cfg.lora,
      world_depth=self.cfg.world.depth if self.cfg.world else None,
      seed=self.cfg.seed,
    )

  @property
  def sampler(self: "Services[stages.Computing]") -> sampling.Sampler:
    """The model's sampler in the shapes of the config."""
    shapes, model = self.cfg.sampler, self.model
    return self._work.once(model.sampler, compute=self.cfg.compute, shapes=shapes)

  @property
  def base_weights(self: "Services[stages.Computing]") -> Weights:
    """The base model as the sampler reads it, the same for all who hold it."""
    weights = self._base()
    if weights is None:
      weights = self.sampler.prepare(self.model.base_params())
      self._base = weakref.ref(weights)
    return weights

  def scorer(
    self: "Services[stages.Computing]", shape: BatchConfig, *, make=None, **how
  ) -> likelihood.Scorer:
    """A `Scorer` of the model on its mesh; `make(cfg=, compute=)` makes another score
    than the log-probability."""
    arch, compute = self.model.arch, self.cfg.compute
    if make is not None:
      score = make(cfg=arch, compute=dataclasses.replace(compute, remat=False))
      how = how | {"score": score}
    replicated = sharding.replicated(self.mesh)
    return likelihood.Scorer(arch, compute, shape, shardings=replicated, **how)

  def trainer(
    self: "Services[stages.Training]",
    *,
    params: PyTree,
    loss: train.LossFn,
    optimizer: OptimizerConfig,
    steps: int,
    every: int,
    **more,
  ) -> trainer.Trainer:
    """A `Trainer` of the stage, which takes `params` for its own."""
    return trainer.Trainer(
      stage=self.cfg.stage,
      store=self.store,
      metrics=self.metrics,
      mesh=self.mesh,
      arch=self.model.arch,
      key=self.key,
      profile=self.cfg.profile,
      params=params,
      loss=loss,
      optimizer=optimizer,
      steps=steps,
      every=every,
      **more,
    )

  @property
  def task(self: "Services[stages.OfTask]") -> base.Task:
    """What the run is about: its specification, prompts, judges and grades."""
    return self._once(
      make_task,
      self._spec_files,
      world=self.cfg.world,
      think=self.model.think,
      detail=self.cfg.spec.detail,
      copies=self.cfg.copies,
    )

  @property
  def prompts(self: "Services[stages.OfTask]") -> prompt_choice.Prompts:
    """The prompts."""
    return self._once(
      prompt_choice.Prompts, self.task, data=self.cfg.data, seed=self.cfg.seed
    )

  @property
  def spec_dir(self: "Services[stages.OfTask]") -> pathlib.Path:
    """The folder of policies: as given, or that which comes with the package."""
    return bundled.find(self.cfg.spec.dir)

  def _spec_files(self: "Services[stages.OfTask]") -> dict[str, str]:
    """Path -> text, so that what is wrong with a policy says where it lies."""
    folder = self.spec_dir
    if bundled.hidden(self.cfg.spec.dir):
      progress.say(
        f"policies: those of {folder.absolute()}, and not the folder "
        f"{self.cfg.spec.dir!r} that comes with dalign"
      )
    found = files.read_spec_files(folder)
    return {(folder / name).as_posix(): text for name, text in found.items()}

  @property
  def sources(self: "Services[stages.OfTask]") -> list[pathlib.Path]:
    """What stages depend on besides each other: policies and prompts, or a world's
    base."""
    if not self.cfg.world:
      return [self.spec_dir, *self.prompts.files]
    return [self.store.left("base", "manifest.json")]

  @property
  def recording(self: "Services[stages.Taught]") -> str:
    """The recording that stands for the teacher, or ""."""
    teacher = self.cfg.teacher
    return teacher.removeprefix("recorded:") if teacher.startswith("recorded:") else ""

  @property
  def recording_files(self: "Services[stages.Taught]") -> list[pathlib.Path]:
    """The file of the recording, if there is one."""
    return [recordings.path_of(self.recording)] if self.recording else []

  @property
  def recorded(self: "Services[stages.Taught]") -> list[recordings.RecordedReply]:
    """The rows of the recording."""
    return self._once(_load_recording, self.recording, self.prompts.raw, self.task.spec)

  def begin(
    self: "Services[stages.OfModel]",
    inputs: Iterable[pathlib.Path],
    *,
    anew: bool = False,
    renewed: Collection[str | pathlib.Path] = (),
    hash_of: Callable[[pathlib.Path], str] | None = None,
  ) -> bool:
    """Opens the stage; False when it is done already. `anew`, `renewed`, `hash_of`: as
    of `Store.begin`, but that a file of prompts is what its rows say and nothing else,
    with the split that they have."""
    stage = self.cfg.stage
    state = self.store.begin(
      stage,
      stages.manifest_config(self.cfg),
      inputs,
      self.cfg.seed,
      machines.name(),
      start_over=self._work.start_over,
      anew=anew,
      renewed=renewed,
      hash_of=hash_of or self._hash,
    )
    if state == "done":
      progress.say(f"{stage}: done before, skipped")
      return False
    self._work.opened = True
    if state == "fresh":
      self.metrics.rewind(stage, -1)
    action = "goes on where it stopped" if state == "resume" else "starts"
    progress.say(f"{stage}: {action}")
    return True

  def _hash(self: "Services[Any]", path: pathlib.Path) -> str:
    """The hash of an input."""
    own = self.prompts.files if isinstance(self.cfg, stages.OfTask) else []
    if path in map(buckets.absolute, own):
      return prompt_sets.fingerprint(self.prompts.raw)
    return manifests.file_hash(path)

  def finish(self: "Services[stages.OfModel]", summary: Mapping) -> None:
    """Marks the stage done; `summary` is as of `Store.finish`."""
    self.store.finish(self.cfg.stage, dict(summary) | self.model.notes)


def _load_recording(
  source: str, found: list[Prompt], spec: Spec
) -> list[recordings.RecordedReply]:
  rows = recordings.load(source, found, spec)
  prompt_choice.report_lone_surrogates(
    source, (row.thought + row.answer for row in rows)
  )
  return rows


def make_task(
  read_spec: Callable[[], Mapping[str, str]],
  *,
  world: stages.WorldSpec | None,
  think: thinking.ThinkFormat,
  detail: str,
  copies: str,
) -> base.Task:
  """The policy world, or English of the policies that `read_spec` reads."""
  if world is not None:
    return policy_world.World(world.spec, world.depth)
  return english.English(read_spec, think=think, detail=detail, copies=copies)
