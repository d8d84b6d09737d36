"""Configs: what a run needs to know, as frozen, checked and hashable dataclasses.

`Config` joins the parts, which stand beside this in modules by what they are about, and
checks what they need of each other. No number has a default here: it stands in a config
file, with its reason, or nowhere.

A class says of each field what it is, in lines of its docstring that begin "name: " or
"name, name: " and go on indented (`explain.py` reads them); what it may be is its type.
"""

import dataclasses
import difflib
from typing import Annotated, Any, Literal, Mapping

from dalign.config.fields import Bounds
from dalign.config.fields import Checked
from dalign.config.fields import Count
from dalign.config.fields import NotNegative
from dalign.config.fields import refuse
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
from dalign.config.replies import EvalConfig
from dalign.config.replies import FilterConfig
from dalign.config.replies import GenerateConfig
from dalign.config.replies import SpecConfig
from dalign.config.training import RewardConfig
from dalign.config.training import SFTConfig
from dalign.config.training import WorldConfig

STAGES = (
  *("base", "generate", "filter", "sft", "distill", "reward", "rl"),
  *("eval", "report", "export"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig(Checked):
  """Arms side by side: each is the run with changes, in a folder of its own.

  seeds: every arm is run with each.
  shared: the stages that are run once a seed, for all arms.
  arms: name -> {"stages": what the arm runs itself, "takes": {stage: the arm that ran
    it}, "row": which of its eval.arms it is, "changes": as in `changed`}.
  """

  seeds: tuple[int, ...]
  shared: tuple[str, ...]
  arms: Mapping[str, Any]

  def __post_init__(self):
    super().__post_init__()
    if not self.seeds or not self.arms:
      raise ValueError("config.ablation: wanted a seed and an arm, or more")
    before: set[str] = set()
    for name, arm in self.arms.items():
      if name in ("", ".", "..", "shared") or set(name) & set("/\\\0"):
        raise ValueError(f"config.ablation.arms: {name!r} is no name for a folder")
      if set(arm) != {"stages", "takes", "row", "changes"}:
        raise ValueError(
          f"config.ablation.arms.{name}: wanted stages, takes, row and changes, got "
          f"{', '.join(arm)}"
        )
      unknown = (set(arm["stages"]) | set(arm["takes"])) - set(STAGES)
      late = set(arm["takes"].values()) - before
      if unknown or late:
        raise ValueError(
          f"config.ablation.arms.{name}: wanted stages of {', '.join(STAGES)} and arms "
          f"before it, got {', '.join(sorted(unknown | late))}"
        )
      before.add(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(Checked):
  """Where metrics are shown besides metrics.jsonl.

  writers: names out of "tensorboard", "wandb" (Weights & Biases) and "mlflow".
  project: the project of W&B and the experiment of MLflow.
  """

  writers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...]
  project: str

  def __post_init__(self):
    super().__post_init__()
    if len(set(self.writers)) < len(self.writers):
      refuse(self, "writers", "each name once")
    if not self.project:
      refuse(self, "project", "a name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig(Checked):
  """What JAX's profiler traces, for XProf, in WORKDIR/profile/STAGE.

  steps: the first and the last step of each training stage, or () for none.
  """

  steps: tuple[Count, ...]

  def __post_init__(self):
    super().__post_init__()
    if self.steps and not (len(self.steps) == 2 and self.steps[0] <= self.steps[1]):
      refuse(self, "steps", "the first and the last step, or ()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Checked):
  """What `--mode=plan` plans for.

  topology: TPUs that need not be here, as "v5e:8x8"; "" for the devices that are.
  chip: a name of `tools.plan.CHIPS`, whose memory and speed count; "" for that of
    the topology, or none.
  price: price of a chip for an hour, in any currency; 0 where nobody asks.
  """

  topology: str
  chip: str
  price: NotNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
  """One run.

  recipe: the name and version that these values are cited by, as "quickstart.v1"; it
    stays where flags change a value. No stage reads it; "" for none.
  seed: all randomness of the run comes from it.
  stages: "all", or names out of STAGES, with commas.
  start_over: does the stages again that are done, or were cut.
  thin: what is done where there is less to learn from or to measure by than
    filter.least or eval.least: "stop", or "say" so, in the report too, and go on.
  world: where it is set, the run is about the policy world, and not about prompts and
    policies in English.
  distill: where it is not set, "all" stages are those without it.
  ablation: where it is set, the run is one of many arms.
  """

  recipe: str
  seed: Annotated[int, Bounds("0 to 2^31 - 1", minimum=0, maximum=2**31 - 1)]
  stages: str
  start_over: bool
  thin: Literal["stop", "say"]
  model: ModelSource
  compute: Compute
  mesh: MeshConfig
  lora: LoRAConfig
  sampler: SamplerConfig
  think: ThinkConfig
  world: WorldConfig | None
  spec: SpecConfig
  data: DataConfig
  generate: GenerateConfig
  filter: FilterConfig
  sft: SFTConfig
  distill: DistillConfig | None
  reward: RewardConfig
  rl: RLConfig
  eval: EvalConfig
  export: ExportConfig
  log: LogConfig
  profile: ProfileConfig
  plan: PlanConfig
  ablation: AblationConfig | None

  def __post_init__(self):
    super().__post_init__()
    stages = chosen_stages(self.stages)
    if "distill" in stages and self.stages != "all" and self.distill is None:
      raise ValueError(
        "config.distill: wanted its settings where config.stages has distill, as "
        "configs/world.py:distill; got None"
      )
    judges = {self.rl.reward: "reward", self.rl.helpful: "helpful"}
    if self.filter.judge == "recorded" and "judge" in judges:
      raise ValueError(
        f"config.rl.{judges['judge']}: wanted model, or rubric with metadata, as "
        "nobody has recorded votes on what RL samples (filter.judge=recorded); got "
        "judge"
      )
    if self.reward.labels == "rubric" and self.reward.metadata == "none":
      raise ValueError(
        "config.reward.metadata: wanted told, or noisy:SHARE, without which the rubric "
        "gives the reward model no labels; got none"
      )
    if (self.world is None) == (self.model.path == "world"):
      raise ValueError(
        "config.model.path: wanted world where config.world is set, and only there; "
        f"got {self.model.path!r}"
      )
    grader = self.eval.grader
    if self.world is not None and grader != ("rules",):
      raise ValueError(
        "config.eval.grader: wanted rules alone in the policy world, whose words no "
        f"model elsewhere knows, got {', '.join(grader)}"
      )
    if "model" in grader and self.eval.grader_model == self.model.path:
      raise ValueError(
        "config.eval.grader_model: wanted another model than the one that is evaluated"
        f", got that of config.model.path, {self.model.path!r}"
      )


def chosen_stages(stages: str) -> tuple[str, ...]:
  """The stages that a run asks for, in the order of the method."""
  if stages == "all":
    return STAGES
  names = [name.strip() for name in stages.split(",")]
  for name in names:
    if name not in STAGES:
      near = difflib.get_close_matches(name, STAGES, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"config.stages: {name!r} is none of {', '.join(STAGES)}{hint}")
  return tuple(name for name in STAGES if name in names)
