"""How many copies of the base a stage holds: of adapters, one, and one for decoding."""

import gc

import jax
import pytest

from dalign.models import adapters
from dalign.sampling import sampler as sampling
from dalign.stages import distill as distill_stage
from dalign.stages import filter as filter_stage
from dalign.stages import rl as rl_stage
from dalign.training import checkpoints
from dalign.training import reward
from dalign.training import trainer as trainers
from tests.helpers import opened
from tests.helpers import tiny
from tests.stages.test_pipeline import labelled
from tests.stages.test_pipeline import written

LORA = {"lora.rank": 2, "lora.alpha": 4.0}


def small(stage: str) -> dict:
  """A step of a few short rollouts."""
  sizes = {"steps": 1, "prompts": 2, "capability": 0, "samples": 2, "max_new": 8}
  return {f"{stage}.{name}": value for name, value in sizes.items()}


def copies() -> tuple[float, float]:
  """How many decoders lie in memory, in layers that are stacked and that are not, by
  their gates and what these let through."""
  gc.collect()
  found = [x.shape for x in jax.live_arrays()]
  return found.count((2, 32, 64)) / 2, found.count((64, 32)) / 4


@pytest.fixture
def seen(monkeypatch) -> dict[str, set]:
  """What lies in memory, beside what did before, as a stage samples and updates."""
  found: dict[str, set] = {"run": set(), "update": set()}
  before = copies()

  def note(name: str):
    found[name].add(tuple(a - b for a, b in zip(copies(), before, strict=True)))

  run, update = sampling.Sampler.run, trainers.Trainer.update

  def runs(*args, **more):
    for i, done in enumerate(run(*args, **more)):
      if not i:
        note("run")
      yield done

  def updates(*args, **more):
    note("update")
    return update(*args, **more)

  monkeypatch.setattr(sampling.Sampler, "run", runs)
  monkeypatch.setattr(trainers.Trainer, "update", updates)
  return found


def trained_before(run) -> None:
  """An SFT model and a reward model in the folder of a run, as they begin."""
  start = run.model.with_adapters(run.model.base_params())
  made = {"sft": start, "reward": reward.init_head(start, run.key)}
  for stage, params in made.items():
    trained, _ = adapters.split(params)
    checkpoints.save_params(run.store.path(stage, "params"), trained)


def test_rl_holds_one_base(tmp_path, seen):
  changes = {"rl.start": "sft", "rl.reward": "model", "rl.audit": 0}
  changes |= small("rl") | {"rl.samples": 16, "rl.max_new": 32}  # some of which stop
  changes |= {"think.used": False}
  run = opened(tiny(**LORA, **changes), tmp_path, "rl")
  with jax.set_mesh(run.mesh):
    trained_before(run)
    rl_stage.reinforce(run)
  assert seen == {"run": {(1, 1)}, "update": {(1, 0)}}


def test_distillation_from_another_teacher_holds_one_base(tmp_path, seen):
  changes = {"distill.teacher": "sft", "distill.start": "base", "distill.probed": 0}
  run = opened(tiny(**LORA, **changes, **small("distill")), tmp_path, "distill")
  with jax.set_mesh(run.mesh):
    trained_before(run)
    distill_stage.distill(run)
  assert seen == {"run": {(1, 1)}, "update": {(1, 0)}}


@pytest.mark.parametrize("changes", [{}, LORA])
def test_the_judges_of_thoughts_and_of_answers_are_one_model(tmp_path, seen, changes):
  changes = changes | {"filter.judge": "sampled", "filter.votes": 1}
  changes |= {"filter.max_new": 4, "filter.unscored": 1.0}
  run = opened(tiny(**changes), tmp_path, "filter")
  source = run.store.path("generate", "samples.jsonl")
  run.store.write_rows(source, written(run, labelled(run, 2)))
  with jax.set_mesh(run.mesh):
    filter_stage.filter_(run)
  assert seen["run"] == {(1, 1)}


def test_a_base_that_others_share_is_not_deleted(tmp_path):
  for changes in ({}, LORA):
    run = opened(tiny(**changes), tmp_path)
    held = run.model.base_params()
    run.model.free(run.model.base_params())
    assert not held["embed"].is_deleted()
    assert (run.model.base_params()["embed"] is held["embed"]) == bool(changes)


def test_a_frozen_base_is_read_in_its_own_type(tmp_path):
  run = opened(tiny(**LORA, **{"lora.frozen": "bfloat16"}), tmp_path)
  whole = opened(tiny(), tmp_path).model.base_params()
  found = run.model.base_params()
  low = adapters.cast_frozen(whole, lora=run.cfg.lora)
  assert found["embed"].dtype == "bfloat16" and found["norm"].dtype == "float32"
  same = jax.tree.map(
    lambda a, b: a.dtype == b.dtype and bool((a == b).all()), found, low
  )
  assert all(jax.tree.leaves(same))
