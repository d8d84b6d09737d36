"""The policy world's own: the base that comes with it, and judges that are made to err
beside a truth that says how often they did."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from dalign.config import convert
from dalign.config import stages as declared
from dalign.config.schema import Config
from dalign.judges import judge
from dalign.stages import base
from dalign.stages import filter as filter_stage
from dalign.stages import judging
from dalign.stages import rl as rl_stage
from dalign.stages import samples
from dalign.tasks import lessons
from dalign.tasks import world
from dalign.training.rollout import Rollout
from tests.bundle_base import bundle
from tests.helpers import config_file
from tests.helpers import jsonl
from tests.helpers import opened
from tests.helpers import sample
from tests.stages.test_ablation import config


def errors(**changes) -> dict:
  return {"world": {"judge_errors": changes}}


# --- The base that comes with the package ---


def of_package(**changes) -> Config:
  built = convert.build(Config, config_file("world").get_config().to_dict())
  return convert.changed(built, changes)


def test_the_base_of_the_package_is_that_of_the_config(tmp_path):
  """A recipe, a vocabulary or lessons that change ask for another base: train one, and
  `python -m tests.bundle_base WORKDIR`."""
  run = opened(of_package(), tmp_path, "base")
  assert json.loads(base.bundled_header()["recipe"]) == base.recipe(run)


def test_the_deep_base_of_the_package_is_that_of_the_config(tmp_path):
  node = config_file("world").get_config("deep")
  run = opened(convert.build(Config, node.to_dict()), tmp_path, "base")
  assert json.loads(base.bundled_header(depth=4)["recipe"]) == base.recipe(run)


def test_a_depth_without_a_base_in_the_package_is_named(tmp_path):
  run = opened(of_package(world={"depth": 2}), tmp_path, "base")
  with pytest.raises(ValueError, match="no base of depth 2 .* 1 and 4; train one"):
    base.make_base(run)


def test_the_base_of_the_package_is_taken_as_it_is(tmp_path):
  run = opened(of_package(seed=7), tmp_path, "base")
  with jax.set_mesh(run.mesh):
    base.make_base(run)
    assert not run.begin([base.BUNDLED[1]])  # it is done
    params = run.model.base_params()
  leaves = safetensors_numpy.load_file(base.BUNDLED[1])
  for name, leaf in (params | params["layers"]).items():
    if name != "layers":
      np.testing.assert_array_equal(leaf, leaves.pop(name))
  assert not leaves
  manifest = run.store.manifest("base")
  assert manifest["summary"]["seed"] == 0 and manifest["summary"]["trained_by"]


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"world": {"steps": 1700}}, "world.steps differ"),
    ({"world": {"optimizer": {"beta1": 0.8}}}, "world.optimizer.beta1 differ"),
    ({"model": {"random": {"width": 64}}}, "model.random differ"),
  ],
)
def test_a_base_of_another_recipe_is_refused(tmp_path, changes, named):
  if "model" in changes:
    changes = {"model": {"random": dict(of_package().model.random) | {"width": 64}}}
  run = opened(of_package(**changes), tmp_path, "base")
  with pytest.raises(ValueError, match=f"{named}; .*--config.world.base=train"):
    base.make_base(run)
  assert not run.store.path("base").exists()


def test_a_base_of_other_lessons_is_refused(tmp_path, monkeypatch):
  def other(rng, *, depth):
    return dataclasses.replace(lessons.weighing(rng, depth=depth), answer="good")

  monkeypatch.setitem(lessons.LESSONS, "weighing", other)
  run = opened(of_package(), tmp_path, "base")
  with pytest.raises(ValueError, match="another recipe: lessons differ"):
    base.make_base(run)


@pytest.mark.parametrize(
  "changes",
  [{"seed": 5}, {"world": {"spec": 3, "checkpoint_every": 7}}, {"lora": {"rank": 4}}],
)
def test_what_a_base_does_not_depend_on_may_be_otherwise(tmp_path, changes):
  run, other = (
    opened(c, tmp_path, "base") for c in (of_package(), of_package(**changes))
  )
  assert base.recipe(run) == base.recipe(other)


def test_a_base_is_bundled_as_it_was_trained(tmp_path):
  cfg, file = config(seed=3), tmp_path / "base.safetensors"
  run = opened(cfg, tmp_path, "base")
  run.store.write_json(tmp_path / "config.json", convert.to_json(cfg))
  with jax.set_mesh(run.mesh):
    base.make_base(run)
    trained = run.model.base_params()
  bundle(tmp_path, file)
  taken = convert.changed(cfg, {"world": {"base": "bundled"}, "seed": 4})
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(base.BUNDLED, 1, file)
    own = opened(taken, tmp_path / "own", "base")
    with jax.set_mesh(own.mesh):
      base.make_base(own)
      same = own.model.base_params()
  jax.tree.map(np.testing.assert_array_equal, trained, same)
  assert own.store.manifest("base")["summary"]["seed"] == 3


# --- Judges that err ---


def right_and_wrong(run, n: int):
  """As many right samples as wrong ones, each of a prompt of its own."""
  for i, prompt in enumerate(run.prompts.choose("train", "safety", 2 * n)):
    ask = lessons.ask_of(prompt)
    told = None if i % 2 and prompt.expected != "comply" else run.task.spec
    thought, answer = world.thought(told, ask), world.answer(told, ask)
    tokens = run.model.tok.encode(lessons.written(thought, answer))
    yield prompt, sample(answer, thought, prompt_id=prompt.id, tokens=tuple(tokens))


def filtered(place, n=60, **changes) -> tuple[dict, list[dict]]:
  """What filter says in its manifest, and its rows."""
  cfg = config(seed=3, **changes)
  made_base = opened(cfg, place, "base")
  made_base.begin([])
  made_base.finish({})
  run = opened(cfg, place, "filter")
  rows = [samples.to_row(own) for _, own in right_and_wrong(run, n)]
  run.store.write_rows(run.store.path("generate", "samples.jsonl"), rows)
  with jax.set_mesh(run.mesh):
    filter_stage.filter_(run)
  judged = jsonl(run.store.path("filter", "judged.jsonl"))
  return run.store.manifest("filter"), judged


def test_filter_says_what_share_of_what_it_kept_is_truly_right(tmp_path):
  found, rows = filtered(tmp_path / "a")
  right = sum(row["true_score"] == 1.0 for row in rows)
  assert found["summary"]["truly_right"] == {"samples": right / len(rows), "kept": 1.0}
  assert 0 < right < len(rows) and found["summary"]["kept"] == right
  shares = []
  for votes in (1, 4):
    found, rows = filtered(
      tmp_path / f"{votes}",
      filter={"judge": "rubric", "votes": votes},
      **errors(rate=0.3),
    )
    kept = [row for row in rows if row["score"] == 1.0]
    share = sum(row["true_score"] == 1.0 for row in kept) / len(kept)
    assert found["summary"]["truly_right"]["kept"] == pytest.approx(share)
    assert found["config"]["world.judge_errors.rate"] == 0.3
    shares.append((share, len(kept)))
  (one, many), (four, few) = shares
  assert one < four and many > few


def test_filter_errs_the_same_where_it_goes_on(tmp_path):
  whole, rows = filtered(tmp_path, n=150, **errors(rate=0.3))
  run = opened(config(seed=3, **errors(rate=0.3)), tmp_path, "filter")
  path = run.store.path("filter", "judged.jsonl")
  run.store.write_rows(path, rows[: filter_stage.FIRST_BATCH_SIZE])
  manifest = run.store.manifest("filter") | {"finished": None, "summary": {}}
  run.store.write_json(run.store.path("filter", "manifest.json"), manifest)
  with jax.set_mesh(run.mesh):
    filter_stage.filter_(run)
  assert jsonl(path) == rows and len(rows) > filter_stage.FIRST_BATCH_SIZE
  assert run.store.manifest("filter")["summary"] == whole["summary"]


def test_the_truth_errs_nowhere_and_a_base_knows_of_no_errors(tmp_path):
  cfg = config(**errors(rate=1.0))
  kept = {
    name: declared.manifest_config(declared.of(declared.STAGES[name], cfg))
    for name in ("base", "generate", "filter", "sft", "reward", "rl", "eval")
  }
  stages = {name for name, keys in kept.items() if "world.judge_errors.rate" in keys}
  assert stages == {"filter", "reward", "rl"}
  run = opened(cfg, tmp_path)
  [(prompt, own), *_] = right_and_wrong(run, 1)
  asked = [judge.FilterQuestion(prompt, own.thought, own.answer)]
  assert run.task.truth()(asked)[0].score == 1.0
  assert judging.filter_rubric(run)(asked)[0].score == 1.0
  assert judging.filter_judge(run, "filter")(asked)[0].score == 0.0


def test_rl_notes_the_true_reward_beside_the_one_it_was_given(tmp_path):
  run = opened(config(rl={"reward": "judge"}, **errors(rate=1.0)), tmp_path, "rl")
  rollouts = [
    Rollout(
      prompt=prompt, sample=own, prompt_tokens=(1,), behaviour=(0.0,), reference=0.0
    )
    for prompt, own in right_and_wrong(run, 10)
  ]
  spoiled = dataclasses.replace(rollouts[0].sample, malformed="no end")
  rollouts.append(dataclasses.replace(rollouts[0], sample=spoiled))
  judged = rl_stage.judge_rollouts(run, judging.rl_judge(run), rollouts=rollouts)
  values = rl_stage.step_metrics(run, judged)
  asked = [judge.RewardQuestion(r.prompt, r.sample.answer) for r in rollouts[:-1]]
  true = [verdict.score for verdict in run.task.truth()(asked)]
  assert values["rl/true_reward"] == pytest.approx(sum(true) / len(rollouts))
  assert 0 < values["rl/reward"] < 1
  assert values["rl/reward"] == pytest.approx(
    sum(score < 1.0 for score in true) / len(rollouts)
  )
