"""What is out of bounds stops a stage, or a step changes nothing; nothing goes on."""

import dataclasses
import errno
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign import main
from dalign import stages
from dalign.config import convert
from dalign.config.fields import Halted
from dalign.judges import judge
from dalign.runs import devices
from dalign.runs.workdir import Store
from dalign.stages import generate as generate_stage
from dalign.stages import judging
from dalign.stages import model as models
from dalign.stages import rl as rl_stage
from dalign.stages import rollouts as rollouts_of
from dalign.stages import scoring
from dalign.stages import services
from dalign.stages import sft as sft_stage
from dalign.training import checkpoints
from dalign.training import sft
from dalign.training import train
from tests.helpers import opened
from tests.helpers import tiny

OPTIMIZER = tiny().sft.optimizer


def tree(x: float) -> dict:
  return {"w": jnp.full((3, 2), x), "norm": jnp.full(3, -x)}


def same(one, other) -> bool:
  """Whether two trees are equal to the bit."""
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("matrix_rate", [0.0, 0.1])
def test_a_gradient_above_skip_norm_changes_nothing(matrix_rate):
  """And one below is taken as without a limit; moments and schedule stand still."""
  limits = dict(matrix_rate=matrix_rate, weight_decay=0.1)
  cfg = convert.changed(OPTIMIZER, limits)
  plain = train.make_optimizer(cfg, steps=5)
  limited = train.make_optimizer(convert.changed(cfg, {"skip_norm": 4.0}), steps=5)
  params, state = tree(0.5), limited.init(tree(0.5))
  assert jax.tree.structure(state) == jax.tree.structure(plain.init(params))
  for x in (0.5, 1.0):  # norms of 1.5 and 3
    wanted, wanted_state = plain.update(tree(x), state, params)
    updates, state = limited.update(tree(x), state, params)
    assert same((updates, state), (wanted, wanted_state)) and float(updates["w"][0, 0])
  for x in (2.0, math.nan, math.inf):
    updates, after = limited.update(tree(x), state, params)
    assert same(after, state) and not np.any(jax.tree.leaves(updates)[0])
    assert not np.any(jax.tree.leaves(updates)[1])


@pytest.fixture
def filtered(workdir, tmp_path):
  """The tiny run up to its filter, in a folder of its own."""
  for stage in ("generate", "filter"):
    shutil.copytree(workdir / stage, tmp_path / stage)
  return tmp_path


@pytest.fixture
def reinforced(workdir, tmp_path):
  """`reinforced(**changes)`: the tiny run up to RL, opened in a folder of its own."""
  for stage in ("sft", "reward"):
    shutil.copytree(workdir / stage, tmp_path / stage)
  small = {"rl.prompts": 4, "rl.batch.rows": 2, "rl.batch.micro": 4}
  return lambda **changes: opened(tiny(**small, **changes), tmp_path, "rl")


def finetune(folder, **changes) -> services.Services:
  small = {"sft.worked": False, "sft.epochs": 3, "sft.batch.rows": 2}
  small |= {"sft.batch.micro": 1, "sft.batch.length": 1024}
  run = opened(tiny(**small, **changes), folder, "sft")
  with jax.set_mesh(run.mesh):
    sft_stage.finetune(run)
  return run


def reinforce(run: services.Services) -> None:
  with jax.set_mesh(run.mesh):
    rl_stage.reinforce(run)


def test_a_gradient_above_stop_norm_halts_and_the_run_goes_on_without(filtered):
  where = filtered / "sft" / "halted_step_1.npz"
  with pytest.raises(Halted) as caught:
    finetune(filtered, **{"sft.optimizer.stop_norm": 1e-6})
  assert "above config.sft.optimizer.stop_norm=1e-06" in str(caught.value)
  assert str(where) in str(caught.value) and "\n" not in str(caught.value)
  with np.load(where) as batch:
    assert batch["tokens_BT"].ndim == 3 and batch["weight_BT"].any()
  run = finetune(filtered)
  with jax.set_mesh(run.mesh):
    found = run.model.trained_params("sft")
    run = finetune(filtered, start_over=True)
    assert same(found, run.model.trained_params("sft"))
    assert not same(found, run.model.base_params())


@pytest.mark.slow
def test_a_stage_whose_steps_are_all_skipped_ends_where_it_started(filtered):
  run = finetune(filtered, **{"sft.optimizer.skip_norm": 1e-6})
  with jax.set_mesh(run.mesh):
    assert same(run.model.trained_params("sft"), run.model.base_params())
  found = run.store.read_rows(filtered / "metrics.jsonl")
  assert len(found) > 2 and all(row["sft/skipped"] == 1.0 for row in found)


def test_a_loss_that_is_not_finite_halts_before_anything_is_kept(filtered, monkeypatch):
  fine = models.Model.base_params

  def broken(run):
    params = fine(run)
    return params | {"norm": params["norm"] * np.nan}

  monkeypatch.setattr(models.Model, "base_params", broken)
  with pytest.raises(Halted, match="step 1: .*loss.* not finite; its batch is"):
    finetune(filtered)
  assert (filtered / "sft" / "halted_step_1.npz").stat().st_size > 1000
  assert checkpoints.Checkpoints(filtered / "sft" / "checkpoints").latest() is None
  assert not (filtered / "sft" / "params").exists()


@pytest.mark.slow
def test_a_reward_that_is_not_finite_halts_rl(reinforced, monkeypatch):
  run, load = reinforced(), scoring.load_reward_model
  monkeypatch.setattr(
    scoring,
    "load_reward_model",
    lambda run: jax.tree.map(lambda x: x * np.nan, load(run)),
  )
  with pytest.raises(Halted, match="rl step 1: the reward of .* not finite"):
    reinforce(run)
  with np.load(run.store.path("rl", "halted_step_1.npz")) as kept:
    assert scoring.NOT_FINITE in kept["unscored"] and len(kept["answer"]) == 16


@pytest.mark.slow
def test_a_sampler_that_is_not_the_trainer_s_halts_rl(reinforced, monkeypatch):
  collect = rollouts_of.collect_rollouts

  def off(*args):
    return [
      dataclasses.replace(r, behaviour=[x - 0.5 for x in r.behaviour])
      for r in collect(*args)
    ]

  monkeypatch.setattr(rollouts_of, "collect_rollouts", off)
  run = reinforced(**{"rl.stop_gap": 0.4})
  with pytest.raises(Halted, match="nats a token, above config.rl.stop_gap=0"):
    reinforce(run)
  assert checkpoints.Checkpoints(run.store.path("rl", "checkpoints")).latest() is None


@pytest.mark.slow
def test_a_policy_that_has_strayed_is_halted_or_left_as_it_is(reinforced, monkeypatch):
  score = rollouts_of.with_scores

  def far(*args):
    return [dataclasses.replace(r, reference=r.reference - 1.0) for r in score(*args)]

  monkeypatch.setattr(rollouts_of, "with_scores", far)
  with pytest.raises(Halted, match="from the start, above config.rl.stop_kl=3"):
    reinforce(reinforced(**{"rl.stop_kl": 3.0}))
  run = reinforced(**{"rl.stop_kl": 0.0, "rl.skip_kl": 3.0, "start_over": True})
  reinforce(run)
  assert run.store.manifest("rl")["summary"] == {"steps": 2, "skipped_steps": 2}
  with jax.set_mesh(run.mesh):
    assert same(run.model.trained_params("rl"), run.model.trained_params("sft"))


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (OSError(errno.EROFS, os.strerror(errno.EROFS), "x"), "have it writable"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "make room"),
    (Halted("sft step 3: loss not finite"), "dalign: sft step 3: loss not finite\n"),
  ],
)
def test_what_stops_a_run_is_one_line_and_exit_code_1(
  tmp_path, monkeypatch, capsys, error, said
):
  def run(*_):
    raise error

  assert ended(run, tmp_path, monkeypatch) == 1
  line = capsys.readouterr().err
  assert line.startswith(f"dalign: {error}") and line.count("\n") == 1 and said in line


def ended(run, workdir, monkeypatch) -> int:
  """The exit code of the command where `run` takes the place of the stages."""
  monkeypatch.setattr(stages, "run", run)
  monkeypatch.setattr(main, "read_flags", lambda argv: (tiny(), workdir))
  monkeypatch.setattr(main.stopping, "install_handlers", lambda: None)
  monkeypatch.setattr(devices, "prepare", lambda: None)
  main.flags.FLAGS.mark_as_parsed()
  return main.main(["dalign"])


def test_no_stage_reads_or_writes_more_than_the_model_takes(tmp_path):
  """A model of 128 positions, whose prompts alone have more."""
  small = {"model.random.max_length": 128, "generate.teacher": "base"}
  run = opened(tiny(**small), tmp_path)
  prompt = next(p for p in run.prompts.all if p.kind == "safety")
  question = judge.FilterQuestion(prompt=prompt, thought="So.", answer="No.")
  trainer = opened(tiny(**small), tmp_path, "sft").trainer(
    params=run.model.start_params("base"),
    loss=sft.make_loss(cfg=run.model.arch, compute=run.cfg.compute),
    optimizer=OPTIMIZER,
    steps=1,
    every=1,
  )
  scorer = run.scorer(run.cfg.sft.batch)
  doors = {
    r"\('[\w-]+', \d\): .* to write": lambda: generate_stage.generate(
      opened(tiny(**small), tmp_path, "generate")
    ),
    "a row of sft": lambda: trainer.update({"positions_BT": np.array([[[0, 128]]])}, 1),
    "a row to score": lambda: scorer(trainer.all_params, [[3] * 129], [1]),
  }
  for said, door in doors.items():
    with pytest.raises(ValueError, match=f"{said}.*the model takes 128 "):
      door()
  with pytest.raises(ValueError, match="no room for a question .* context of 128"):
    scoring.Renderer(run)
  (verdict,) = judging.model_judge(run)([question])
  assert verdict.score is None and "longer" in verdict.reason
  assert len(scorer(trainer.all_params, [[3] * 128], [1])[0]) == 127


def test_a_workdir_that_cannot_be_made_is_bad_input(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(ValueError, match="--workdir: .*file/run .Not a directory"):
    with Store(tmp_path / "file" / "run").hold_workdir():
      pass


def test_a_user_without_a_home_gets_one(tmp_path, monkeypatch):
  def unknown(user):
    raise KeyError(user)

  monkeypatch.delenv("HOME")
  monkeypatch.setattr("pwd.getpwuid", unknown)
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  assert main.main(["dalign", "--version"]) == 0
  assert pathlib.Path("~/.cache").expanduser().parent.parent == tmp_path
