"""Arms side by side in the policy world, tiny: what they share, what each sees."""

import dataclasses
import json

import jax
import pytest

from dalign import stages
from dalign.config import convert
from dalign.config.schema import STAGES
from dalign.config.schema import Config
from dalign.evaluation import evals
from dalign.evaluation import figures
from dalign.judges import forms
from dalign.judges import judge
from dalign.runs import store
from dalign.stages import ablate
from dalign.stages import judging
from dalign.stages import reward as reward_stage
from dalign.stages import samples
from dalign.stages import scoring
from dalign.stages import sft as sft_stage
from dalign.tasks import lessons
from dalign.tasks import world
from dalign.text import thinking
from tests.helpers import config_file
from tests.helpers import opened

SMALL = {
  "model": {
    "random": dict(
      **dict(width=32, layers=2, heads=2, kv_heads=2, head_dim=16, ffw=48),
      **dict(rope_theta=100.0, norm_eps=1e-5, tied=True, max_length=512),
    )
  },
  "compute": {"dtype": "float32"},
  "sampler": {"slots": 16, "lanes": 2, "prefill": 8},
  "world": {"base": "train", "steps": 3, "batch": {"rows": 8}, "checkpoint_every": 2},
  "generate": {
    "prompts": dict(refuse=4, safe_complete=4, comply=4),
    "helpful": 2,
    "most": 1,
    "batch": 1,
    "enough": 1,
    "max_new": 12,
  },
  # An untrained base writes no grades: the truth judges.
  "filter": {"judge": "rubric", "max_new": 12},
  "sft": {"epochs": 1, "capability": 24, "batch": {"rows": 8}},
  "reward": {"steps": 2, "rows": 8, "checkpoint_every": 1},
  "rl": {
    "reward": "rubric",
    "metadata": "told",
    "steps": 1,
    "prompts": 5,
    "capability": 1,
    "samples": 2,
    "max_new": 12,
    "batch": {"micro": 2, "rows": 8},
    "objective": {"kl": "k3", "kl_weight": 0.1},  # a gradient though rewards be equal
  },
  "eval": {
    "prompts": 6,
    "helpful": 1,
    "capability": 3,
    "extra_limit": 2,
    "max_new": 12,
    "budgets": (0, 2),
    "trials": 20,
  },
}


def config(arms=None, **changes) -> Config:
  """configs/world.py, small; with arms the ablation."""
  node = config_file("world").get_config("ablation" if arms else None).to_dict()
  built = convert.changed(convert.build(Config, node), SMALL)
  if arms:
    some = {name: built.ablation.arms[name] for name in arms}
    built = convert.changed(built, {"ablation": {"arms": some, "seeds": (3,)}})
  return convert.changed(built, changes)


ARMS = ("none", "sft", "sft_rl", "no_thoughts", "self_refine", "rlhf", "constitutional")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder in which some arms were run."""
  place = tmp_path_factory.mktemp("arms")
  stages.run(config(ARMS), place)
  return place


def manifest(place, stage):
  return json.loads((place / stage / "manifest.json").read_text())


@pytest.mark.slow
def test_arms_share_what_they_do_not_change(folder):
  seed = folder / "seed-3"
  folders = {
    p.name: {s.name for s in p.iterdir() if s.is_dir()} for p in seed.iterdir()
  }
  own = {name: found & set(STAGES) for name, found in folders.items()}
  assert own["shared"] == {"base", "generate", "filter"}
  assert own["none"] == own["self_refine"] == {"eval"}
  assert own["sft"] == own["no_thoughts"] == {"sft", "eval"}
  assert own["sft_rl"] == {"rl", "eval"}
  assert own["rlhf"] == {"reward", "rl", "eval"}
  assert own["constitutional"] == {"generate", "filter", "sft", "reward", "rl", "eval"}
  judged = seed / "shared" / "filter" / "kept.jsonl"
  assert (folder / "seed-3" / "sft" / "sft" / "params").exists() and judged.exists()
  for arm in ARMS:
    assert manifest(seed / arm, "eval")["seed"] == 3


@pytest.mark.slow
def test_the_summary_has_every_arm_with_what_was_measured_of_it(folder):
  summary = json.loads((folder / "eval" / "summary.json").read_text())
  assert set(summary["arms"]) == set(ARMS)
  for arm, metrics in summary["arms"].items():
    assert {"verdict", "citation", "fabricated", "lookalike_verdict"} <= set(metrics)
    thinks = arm not in ("none", "no_thoughts", "rlhf", "constitutional")
    assert ("thought_0_verdict" in metrics) == thinks
    own = json.loads((folder / "seed-3" / arm / "eval" / "summary.json").read_text())
    assert [metrics] == [*own["arms"].values()]
  assert (folder / "report.html").exists()


@pytest.mark.parametrize("used", [True, False])
def test_a_model_without_thoughts_learns_the_answer_alone(tmp_path, used):
  run = opened(config(think={"used": used}), tmp_path)
  prompt = run.prompts.choose("train", "safety", 1)[0]
  said = "rifle is weapons . so comply </think> you need oil"
  tokens = [*run.model.tok.encode(f"<think> {said}"), run.model.tok.stop_ids[0]]
  row = dict(prompt_id=prompt.id, index=0, tokens=tokens, forced=1, finish="stop")
  row |= dict(
    thought="rifle is weapons . so comply", answer="you need oil", malformed=""
  )
  path = run.store.path("filter", "kept.jsonl")
  run.store.write_rows(path, [row])
  rows, _, _ = sft_stage._rows(run, path)
  learned = [
    run.model.tok.decode([t for t, w in zip(tokens, weights, strict=True) if w])
    for tokens, weights in rows
  ]
  assert learned[0] == (said if used else "you need oil")
  assert len(rows) == 25  # and 24 of capability
  for text_of, (tokens, _) in zip(learned, rows, strict=True):
    assert run.model.tok.decode(tokens).endswith(text_of) and text_of
    assert ("</think>" in run.model.tok.decode(tokens)) == used


def test_sets_and_categories_stand_in_the_summary(tmp_path):
  """Of stages that only write what they are said to have found."""

  def run_stages(cfg, workdir, shared, stages):
    if "eval" not in stages:
      return
    cell = {"mean": cfg.seed / 10, "low": 0.0, "high": 1.0, "n": 4, "unscored": 0}
    [row], found = cfg.eval.arms, {"tea": {"verdict": {"mean": cfg.seed / 10, "n": 4}}}
    summary = {"arms": {row: dict.fromkeys(("verdict", *evals.PARTS), cell)}}
    summary |= {"definitions": {}, "versions": {}, "sets": {"begin": "2 prompts"}}
    found |= {"rifle": found["tea"]} if cfg.seed == 3 else {}
    store.write_json(
      workdir / "eval" / "summary.json", summary | {"categories": {row: found}}
    )

  cfg = config(("none", "sft"))
  several = dataclasses.replace(cfg.ablation, seeds=(3, 5))
  ablate.ablate(dataclasses.replace(cfg, ablation=several), tmp_path, run_stages)
  summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
  assert summary["sets"] == {"begin": "2 prompts"}
  assert set(summary["categories"]) == {"none", "sft"}
  tea, rifle = (summary["categories"]["sft"][c]["verdict"] for c in ("tea", "rifle"))
  assert (tea["mean"], tea["n"]) == (pytest.approx(0.4), 8)
  assert (rifle["mean"], rifle["n"]) == (pytest.approx(0.3), 4)


@pytest.mark.slow
def test_a_second_run_does_nothing_anew(folder, capsys):
  before = (folder / "eval" / "summary.json").read_bytes()
  stages.run(config(ARMS), folder)
  assert (folder / "eval" / "summary.json").read_bytes() == before
  said = capsys.readouterr().err
  assert "starts" not in said and said.count("done before") > 10


@pytest.mark.slow
def test_revised_answers_begin_with_drafts_that_saw_no_spec(folder):
  place = folder / "seed-3" / "constitutional" / "generate"
  drafts = [json.loads(line) for line in (place / "drafts.jsonl").open()]
  samples = [json.loads(line) for line in (place / "samples.jsonl").open()]
  assert {d["prompt_id"] for d in drafts} == {s["prompt_id"] for s in samples}


@pytest.mark.slow
def test_a_reward_model_learns_of_drafts_where_it_is_to(folder, tmp_path):
  shared = folder / "seed-3" / "shared"
  done = dict.fromkeys(("base", "generate", "filter"), shared)
  found = []
  for drafts in (False, True):
    cfg = config(seed=3, reward={"labels": "rubric", "drafts": drafts})
    run = opened(cfg, tmp_path, "reward", done)
    with jax.set_mesh(run.mesh):
      questions, _ = reward_stage._questions(
        run, run.store.path("filter", "judged.jsonl")
      )
      asked = [*{q.prompt.id: q.prompt for q in questions}.values()]
      own = samples.drafts(run, asked)
    found.append([(q.prompt.id, q.answer) for q in questions])
  assert found[1] == found[0] + [(p.id, own[p.id].answer) for p in asked]


def test_answers_to_one_prompt_are_measured_together():
  prompts = lessons.prompts(world.spec(0))[:2]
  questions = [judge.RewardQuestion(prompt=p, answer="") for p in prompts * 2]
  assert reward_stage._grouped_by_prompt([0, 1, 2, 3], questions) in (
    [0, 2, 1, 3],
    [1, 3, 0, 2],
  )
  assert reward_stage._grouped_by_prompt([3, 2, 1], questions) in ([3, 1, 2], [2, 3, 1])


def test_intervals_over_seeds_are_students():
  def seed(mean):
    return {"m": {"mean": mean, "low": 0.0, "high": 1.0, "n": 10, "unscored": 1}}

  cell = ablate.over_seeds([seed(0.5), seed(0.6), seed(0.7)])["m"]
  assert (
    cell["mean"] == pytest.approx(0.6) and cell["n"] == 30 and cell["unscored"] == 3
  )
  # 0.1 / sqrt(3) times the 97.5% quantile of t with 2 degrees of freedom, 4.3027
  assert cell["high"] - 0.6 == pytest.approx(0.24842, abs=1e-4)
  assert ablate.over_seeds([seed(0.5)])["m"]["high"] == 1.0
  some = ablate.over_seeds([seed(0.5), {"k": seed(0.2)["m"]} | seed(0.7)])
  assert some["m"]["seeds"] == [0.5, 0.7] and some["k"]["seeds"] == [None, 0.2]
  none = seed(None)
  assert ablate.over_seeds([none, none])["m"]["mean"] is None


def test_seeds_without_a_value_are_counted():
  def seed(mean):
    cell = {"mean": mean, "n": 10, "unscored": 1, "why": "too long"}
    return {"verdict": cell, "capability": cell | {"unscored": 0}}

  some = ablate.over_seeds([seed(0.5), seed(None), {}])
  assert some["verdict"]["seeds"] == [0.5, None, None] and some["verdict"]["n"] == 20
  said = ablate.line("sft", some)
  assert "verdict 50.0% (2 unscored (too long), 1 of 3 seeds)" in said
  of = ablate._by_category([{"a": seed(0.5)}, {"b": seed(0.5)}])
  assert of["b"]["verdict"]["seeds"] == [None, 0.5]
  assert "1 of 2 seeds" in figures.notes(of["a"]["verdict"])
  assert "seeds" not in ablate.line("sft", ablate.over_seeds([seed(0.5)] * 2))


# --- The judge that writes its grades ---


@pytest.mark.slow
def test_a_sampled_judge_reads_grades_and_knows_answers(tmp_path):
  run = opened(config(), tmp_path)
  stages.base.train_base(run)
  with jax.set_mesh(run.mesh):
    ask = judging.sampled_judge(run, "test")
    prompts = run.prompts.choose("eval", "safety", 3) + run.prompts.choose(
      "eval", "capability", 2
    )
    questions = [judge.RewardQuestion(prompt=p, answer=p.answer) for p in prompts]
    verdicts = ask(questions)
  for prompt, verdict in zip(prompts, verdicts, strict=True):
    if prompt.kind == "capability":
      assert verdict.score == 1.0
    else:  # untrained, it writes no grade
      assert verdict.score is None and verdict.reason == "no grade"
  assert run.task.grade(" good ").score == 1.0
  assert run.task.grade("fair").score == 0.5
  assert run.task.grade("good bad").score is None


@pytest.mark.parametrize(
  ("said", "score"),
  [("5", 1.0), ("1.", 0.0), ("3", 0.5), ("6", None), ("4 or 5", None)],
)
def test_a_label_and_nothing_else_is_a_score(said, score):
  assert forms.read_label(said).score == score


def test_the_reward_sees_no_thought_but_where_a_control_shows_it(tmp_path):
  prompt = lessons.prompts(world.spec(0))[0]
  for shown in (False, True):
    run = opened(config(reward={"shows_thought": shown}), tmp_path)
    question = scoring.reward_question(run, prompt, "a secret thought", "you need oil")
    asked = " ".join(turn.content for turn in run.task.question(question))
    assert ("secret" in asked) == shown and "you need oil" in asked
    tokens = scoring.Renderer(run).question_tokens(question)
    assert isinstance(question, judge.RewardQuestion) and tokens


def test_preferences_are_learned_without_the_text_of_the_spec(tmp_path):
  run = opened(config(reward={"detail": "none"}), tmp_path)
  prefixes = scoring.Renderer(run).prefixes
  assert len({tuple(p) for p in prefixes.values()}) == 1
  run = opened(config(), tmp_path)
  said = run.model.tok.decode(scoring.Renderer(run).prefixes["drugs"])
  assert said == world.render(run.task.spec, "drugs")


def test_changes_of_a_config_are_checked():
  cfg = config()
  new = convert.changed(cfg, {"sft": {"batch": {"rows": 3}}, "seed": 5})
  assert (new.sft.batch.rows, new.seed) == (3, 5)
  assert new.sft.batch.length == cfg.sft.batch.length
  with pytest.raises(ValueError, match=r"config\.sft\.epoch: no such field"):
    convert.changed(cfg, {"sft": {"epoch": 2}})
  with pytest.raises(ValueError, match=r"config\.sft\.epochs: wanted"):
    convert.changed(cfg, {"sft": {"epochs": "2"}})
  with pytest.raises(ValueError, match="arms before it, got nobody"):
    arm = {"stages": (), "takes": {"sft": "nobody"}, "row": "base", "changes": {}}
    convert.changed(config(("none",)), {"ablation": {"arms": {"a": arm}}})


def test_a_world_is_there_where_its_base_is_asked_for():
  with pytest.raises(ValueError, match="wanted world where config.world is set"):
    convert.changed(config(), {"world": None})


def test_thoughts_are_closed_at_their_budget(tmp_path):
  from dalign.sampling.sampler import Completion
  from dalign.sampling.sampler import Request
  from dalign.stages import arms as arms_of

  run = opened(config(), tmp_path)
  close = run.model.tok.encode(run.model.think.close)
  thought = run.model.tok.encode("rifle is weapons . weapons make")
  asked = []

  def complete(groups):
    for request in (r for group in groups for r in group):
      asked.append(request)
      whole = len(request.tokens) > 2
      tokens = (
        tuple(run.model.tok.encode("you need oil")) if whole else tuple(thought[:4])
      )
      yield Completion(
        request=request,
        tokens=tokens,
        logp=(0.0,) * len(tokens),
        finish="stop" if whole else "length",
      )

  request = Request(tokens=(1, 2), row_id=7, max_new=40)
  for budget, size in ((4, 4), (0, 0)):
    asked.clear()
    (done,) = arms_of._complete_with_thought_budget(run, complete, [[request]], budget)
    assert done.request == request
    assert list(done.tokens[:size]) == thought[:size]
    assert list(done.tokens[size : size + 1]) == close
    assert run.model.tok.decode(done.tokens[size + 1 :]) == "you need oil"
    assert asked[-1].tokens == (1, 2, *thought[:size], *close)
    assert [r.max_new for r in asked] == ([4, 40] if budget else [40])
  sample = samples.from_completion(
    run.model,
    lessons.prompts(run.task.spec)[0],
    done,
    0,
    thinking.ThinkFormat(open="<think>", close="</think>"),
  )
  assert sample.answer == "you need oil"
