"""Judges of the policy world that are made to err, beside a truth that says how often
they did."""

import dataclasses

import jax
import pytest

from dalign.config import stages as declared
from dalign.judges import judge
from dalign.stages import filter as filter_stage
from dalign.stages import judging
from dalign.stages import rl as rl_stage
from dalign.stages import samples
from dalign.tasks import lessons
from dalign.tasks import world
from dalign.training.rollout import Rollout
from tests.helpers import jsonl
from tests.helpers import opened
from tests.helpers import sample
from tests.stages.test_ablation import config


def errors(**changes) -> dict:
  return {"world": {"judge_errors": changes}}


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
