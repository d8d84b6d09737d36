"""What each stage reads of the config, and no more: one frozen dataclass a stage.

A stage's class has the parts and single values of `schema.Config` that the stage and
what it calls may read; `of` takes them out of a whole config, and the stage gets
nothing else. So what a stage does not declare is an AttributeError at run time and an
error of the type checker before, and its manifest, which keeps all that the class has
(`manifest_config`), cannot miss what it depends on.

A field is the part of the config that is called as it is, or that of
`copied_from(PATH)`. `not_in_manifest` marks those that change nothing a stage makes, as
`fields.limit` does inside a part: where and in which shapes it is computed.
"""

from collections.abc import Iterator
import dataclasses
import types
import typing
from typing import Any, ClassVar, TypeVar

from dalign.config import convert
from dalign.config.model import Compute
from dalign.config.model import ExportConfig
from dalign.config.model import LoRAConfig
from dalign.config.model import MeshConfig
from dalign.config.model import ModelSource
from dalign.config.model import SamplerConfig
from dalign.config.model import ThinkConfig
from dalign.config.on_policy import DistillConfig
from dalign.config.on_policy import RLConfig
from dalign.config.replies import DataConfig
from dalign.config.replies import EndpointConfig
from dalign.config.replies import EvalConfig
from dalign.config.replies import FilterConfig
from dalign.config.replies import GenerateConfig
from dalign.config.replies import SpecConfig
from dalign.config.schema import ProfileConfig
from dalign.config.training import JudgeErrors
from dalign.config.training import RewardConfig
from dalign.config.training import SFTConfig
from dalign.config.training import WorldConfig

S = TypeVar("S")


def copied_from(path: str) -> Any:
  """A field that holds what the config has elsewhere, as "generate.temperature"."""
  return dataclasses.field(metadata={"path": path})


def not_in_manifest(path: str = "") -> Any:
  """A field that changes nothing that the stage makes; `path` as of `copied_from`."""
  found = {"path": path} if path else {}
  return dataclasses.field(metadata={"limit": True} | found)


# --- Parts of sections ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldSpec:
  """Of WorldConfig, what stages after the base read."""

  spec: int
  depth: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
  """Of FilterConfig, how the judge is asked that other stages share."""

  judge: str
  endpoint: EndpointConfig
  form: str
  temperature: float
  max_new: int
  quality: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposer:
  """Of FilterConfig, how its judge is asked for labels."""

  judge: str
  endpoint: EndpointConfig
  votes: int
  readable: float
  temperature: float
  max_new: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafts:
  """Of GenerateConfig, how the base is sampled without the specification."""

  temperature: float
  max_new: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
  """Of RewardConfig, how the reward model is asked.

  rows: prompts are put to it so many at a time.
  """

  shows_thought: bool
  detail: str
  metadata: str
  rows: int
  length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
  """Of EvalConfig, how a model replies where nobody says otherwise."""

  temperature: float
  top_p: float
  max_think: int
  max_new: int


# --- What several stages read ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A stage by its name."""

  stage: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfModel(Stage):
  """Of a stage that reads the model.

  seed: kept by manifests beside the config.
  """

  seed: int = not_in_manifest()
  model: ModelSource
  mesh: MeshConfig = not_in_manifest()
  lora: LoRAConfig
  think: ThinkConfig
  world: WorldSpec | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computing(OfModel):
  """Of a stage that computes with the model."""

  compute: Compute
  sampler: SamplerConfig = not_in_manifest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfTask(OfModel):
  """Of a stage that reads the specification or prompts.

  copies: where public sets are read, whatever the place the same.
  """

  spec: SpecConfig
  data: DataConfig
  copies: str = not_in_manifest("eval.copies")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Computing):
  """Of a stage that trains."""

  profile: ProfileConfig = not_in_manifest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught(OfTask):
  """Of a stage that may read the recording of a teacher."""

  teacher: str = copied_from("generate.teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(OfTask, Computing):
  """Of a stage that samples or scores replies to prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judging(Sampling):
  """Of a stage that asks the filter's judge."""

  judge: Judge = copied_from("filter")
  judge_errors: JudgeErrors | None = copied_from("world.judge_errors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelling(Judging, Taught):
  """Of a stage whose judge may have been recorded with a teacher."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting(Sampling):
  """Of a stage that may sample the base without the specification."""

  drafts: Drafts = copied_from("generate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewarding(Sampling):
  """Of a stage that asks the reward model."""

  reward_model: RewardModel = copied_from("reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rolling(Sampling, Training):
  """Of a stage that trains on what the model samples."""


# --- The stages ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseStage(Training):
  """base: adapters are added to what it ends with."""

  stage: ClassVar[str] = "base"
  lora: LoRAConfig = not_in_manifest()
  lessons: WorldConfig = copied_from("world")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateStage(Drafting, Taught):
  """generate."""

  stage: ClassVar[str] = "generate"
  generate: GenerateConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterStage(Labelling):
  """filter."""

  stage: ClassVar[str] = "filter"
  thin: str = not_in_manifest()
  filter: FilterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTStage(Sampling, Training):
  """sft."""

  stage: ClassVar[str] = "sft"
  sft: SFTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardStage(Rewarding, Labelling, Drafting, Training):
  """reward."""

  stage: ClassVar[str] = "reward"
  reward: RewardConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillStage(Rolling):
  """distill."""

  stage: ClassVar[str] = "distill"
  distill: DistillConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLStage(Rewarding, Judging, Rolling):
  """rl."""

  stage: ClassVar[str] = "rl"
  rl: RLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalStage(Drafting):
  """eval."""

  stage: ClassVar[str] = "eval"
  thin: str = not_in_manifest()
  eval: EvalConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportStage(Stage):
  """report: it reads the files of the others."""

  stage: ClassVar[str] = "report"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportStage(Taught):
  """export, whose card says how the model was made and is asked."""

  stage: ClassVar[str] = "export"
  export: ExportConfig
  teacher_model: str = copied_from("generate.endpoint.model")
  judge: str = copied_from("filter.judge")
  replies: Replies = copied_from("eval")


# --- What is no stage ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Taught, Sampling):
  """The plan, which is about the stages that are asked for."""

  stages: str
  generate: GenerateConfig
  filter: FilterConfig
  sft: SFTConfig
  reward: RewardConfig
  rl: RLConfig
  distill: DistillConfig | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Talk(Sampling):
  """Chat and server."""

  replies: Replies = copied_from("eval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label(Sampling):
  """The mode label, which has a manifest as stages have."""

  stage: ClassVar[str] = "label"
  proposer: Proposer = copied_from("filter")


STAGES: dict[str, type[Stage]] = {
  kind.stage: kind
  for kind in (
    *(BaseStage, GenerateStage, FilterStage, SFTStage, DistillStage, RewardStage),
    *(RLStage, EvalStage, ReportStage, ExportStage),
  )
}


def of(kind: type[S], config: Any) -> S:
  """What a class of this file declares of a config, or of a part of one."""
  fields = dataclasses.fields(typing.cast(Any, kind))
  return kind(**{field.name: _value(field, config) for field in fields})


def _path(field: dataclasses.Field) -> str:
  return field.metadata.get("path", field.name)


def _value(field: dataclasses.Field, config):
  path, kind, value = _path(field), field.type, config
  for name in path.split("."):
    value = None if value is None else getattr(value, name)
  if isinstance(kind, types.UnionType):  # X | None
    if value is None:
      return None
    kind = typing.get_args(kind)[0]
  if not dataclasses.is_dataclass(kind) or isinstance(value, typing.cast(type, kind)):
    return value
  if value is None:
    raise ValueError(f"config.{path}: wanted one, got none")
  return of(typing.cast(type, kind), value)


def manifest_config(stage: Stage) -> dict[str, Any]:
  """The keys of the config that a manifest of the stage keeps, flat, with their values
  as JSON has them: all that it declares, but what changes nothing that it makes."""
  return dict(_kept(stage, ""))


def _kept(part: Any, prefix: str) -> Iterator[tuple[str, Any]]:
  for field in dataclasses.fields(part):
    value = getattr(part, field.name)
    if field.metadata.get("limit") or value is None:
      continue
    key = prefix + _path(field)
    if dataclasses.is_dataclass(value):
      yield from _kept(value, f"{key}.")
    else:
      yield key, convert.plain(value)
