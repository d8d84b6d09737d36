"""What stages declare: they read nothing else, and their manifests keep it."""

import subprocess
import sys

import pytest

from dalign.config import convert
from dalign.config import stages
from dalign.config.schema import Config
from tests.helpers import ROOT
from tests.helpers import config_file
from tests.helpers import opened
from tests.helpers import tiny


@pytest.mark.parametrize(
  ("stage", "key", "value"),
  [
    ("generate", "lora.rank", 2),  # the base's matrices may be held in bfloat16
    ("filter", "lora.rank", 2),
    ("filter", "think.close", "!"),  # what the tokenizer reads, and judges write
    ("reward", "think.close", "!"),
    ("reward", "filter.quality", True),  # of labels by the rubric
    ("reward", "generate.max_new", 9),  # of drafts
    ("rl", "filter.quality", True),
    ("rl", "reward.rows", 2),  # questions are put to the reward model by so many
    ("eval", "lora.rank", 2),
    ("eval", "generate.temperature", 0.5),  # of what self_refine revises
    ("export", "eval.max_new", 9),  # which the card says
    ("export", "filter.judge", "model"),
  ],
)
def test_a_stage_is_not_done_where_what_it_reads_has_changed(
  tmp_path, stage, key, value
):
  before = opened(tiny(), tmp_path, stage)
  assert before.begin([])
  before.store.finish(stage, {})
  assert not opened(tiny(), tmp_path, stage).begin([])
  with pytest.raises(ValueError, match=f"{stage} is done, but {key} was .* is now"):
    opened(tiny(**{key: value}), tmp_path, stage).begin([])


@pytest.mark.parametrize(
  ("stage", "key", "value"),
  [
    ("generate", "sampler.slots", 8),
    ("generate", "eval.copies", "/elsewhere"),
    ("filter", "sft.batch.length", 512),
    ("filter", "filter.unscored", 0.5),
    ("sft", "sft.optimizer.stop_norm", 9.0),
    ("sft", "profile.steps", (1, 2)),
    ("rl", "mesh.fsdp", 1),
    ("rl", "rl.stop_kl", 9.0),
    ("eval", "eval.grader_endpoint.price_in", 1.0),
    ("export", "compute.dtype", "bfloat16"),
  ],
)
def test_a_stage_is_done_whatever_changes_nothing_of_it(tmp_path, stage, key, value):
  before = opened(tiny(), tmp_path, stage)
  assert before.begin([])
  before.store.finish(stage, {})
  assert not opened(tiny(**{key: value}), tmp_path, stage).begin([])


def world() -> Config:
  node = config_file("world").get_config("distill").to_dict()
  return convert.build(Config, node)


def test_a_stage_cannot_read_what_it_does_not_declare(tmp_path):
  config = world()
  for name, kind in stages.STAGES.items():
    own = opened(config, tmp_path, name).cfg
    declared = {*kind.__dataclass_fields__}
    for section in Config.__dataclass_fields__.keys() - declared:
      with pytest.raises(AttributeError):
        getattr(own, section)
  base = opened(config, tmp_path, "base")
  for service in ("task", "prompts", "recorded"):
    with pytest.raises(AttributeError):
      getattr(base, service)
  with pytest.raises(AttributeError):
    _ = opened(config, tmp_path, "export").sampler  # which has no compute


def test_manifests_have_the_keys_and_values_of_the_config():
  for config in (tiny(), world()):
    flat = convert.flat(config)
    for name, kind in stages.STAGES.items():
      if name == "base" and config.world is None:
        continue
      kept = stages.manifest_config(stages.of(kind, config))
      assert kept.items() <= flat.items() if kept else name == "report"
  assert stages.manifest_config(stages.of(stages.SFTStage, world()))["world.spec"] == 0
  assert "world.steps" not in stages.manifest_config(
    stages.of(stages.SFTStage, world())
  )


def test_a_base_needs_a_world():
  with pytest.raises(ValueError, match="config.world: wanted one, got none"):
    stages.of(stages.BaseStage, tiny())


UNDECLARED = """
from dalign.config import stages
from dalign.stages import services


def sft(run: services.Services[stages.SFTStage]) -> None:
  _ = run.cfg.sft, run.task, run.sampler  # declared
  _ = run.cfg.rl
  _ = run.recorded


def base(run: services.Services[stages.BaseStage]) -> None:
  _ = run.sampler, run.model
  _ = run.task
"""


@pytest.mark.slow
def test_what_is_not_declared_is_an_error_of_the_type_checker(tmp_path):
  pytest.importorskip("mypy")
  file = tmp_path / "undeclared.py"
  file.write_text(UNDECLARED)
  command = [sys.executable, "-m", "mypy", str(file)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  found = [line for line in done.stdout.splitlines() if "undeclared.py" in line]
  assert [line.split(":")[1] for line in found] == ["8", "9", "14"], done.stdout
