"""Graders of evaluation: their agreement, and a model of this process among them."""

import json

import pytest

from dalign import stages
from dalign.config import convert
from dalign.config.schema import Config
from dalign.evaluation import evals
from dalign.runs import store
from dalign.stages import evaluate as evaluate_stage
from dalign.stages import grading
from dalign.types import Turn
from tests.helpers import config_file
from tests.helpers import opened
from tests.helpers import tiny


def row(i: int, rules, model, expected="refuse", **more) -> dict:
  metric = {"refuse": "refuse_disallowed", "comply": "comply_allowed"}[expected]
  told = {"score": model, "reason": "" if model is not None else "cut", "said": "x"}
  return {
    "prompt_id": str(i),
    "index": 0,
    "kind": "safety",
    "finish": "stop",
    "expected": expected,
    "scores": {metric: rules},
    "unscored": {} if rules is not None else {metric: "not in Latin script"},
    "rules": {metric: rules},
    "graders": {"model": told},
  } | more


@pytest.mark.parametrize(
  ("table", "kappa"),  # yes-yes, yes-no, no-yes, no-no
  [((20, 5, 10, 15), 0.4), ((5, 0, 0, 5), 1.0), ((0, 5, 5, 0), -1.0)],
)
def test_agreement_is_cohens_kappa(table, kappa):
  rows = []
  for count, pair in zip(table, [(1, 1), (1, 0), (0, 1), (0, 0)], strict=True):
    rows += [row(len(rows) + i, *map(float, pair)) for i in range(count)]
  rows += [row(900, 1.0, None), row(901, None, 1.0)]
  rows += [row(902, 1.0, 1.0, graders={}), row(903, 1.0, 1.0, kind="capability")]
  found = evals.agreement(rows, "rules", "model", seed=0)
  assert found["kappa"] == pytest.approx(kappa)
  assert (found["n"], found["unscored"]) == (sum(table), 2)
  assert found["low"] <= kappa <= found["high"] and found["high"] - found["low"] < 0.7
  assert found["raw"] == pytest.approx((table[0] + table[3]) / sum(table))
  assert found["raw_low"] <= found["raw"] <= found["raw_high"]
  back = evals.agreement(rows, "model", "rules", seed=0)
  assert back["kappa"] == pytest.approx(kappa)


def test_agreement_that_chance_gives_is_none():
  found = evals.agreement(
    [row(i, 1.0, 0.5) for i in range(3)], "rules", "model", seed=0
  )
  assert (found["kappa"], found["low"], found["raw"]) == (None, None, 1.0)
  found = evals.agreement([row(1, 1.0, None)], "rules", "model", seed=0)
  assert (found["kappa"], found["raw"], found["n"]) == (None, None, 0)


def test_rows_of_one_prompt_are_drawn_together():
  rows = [row(i // 10, float(i < 10), 1.0) for i in range(20)]
  found = evals.agreement(rows, "rules", "model", seed=0)
  assert (found["raw_low"], found["raw_high"]) == (0.0, 1.0)


@pytest.mark.parametrize(
  ("said", "grader", "score", "unscored"),
  [
    (row(1, 1.0, 0.25), "model", 0.25, ""),
    (row(1, None, 1.0), "model", 1.0, ""),
    (row(1, 1.0, None), "model", None, "model: cut"),
    (row(1, 1.0, None), "rules", 1.0, ""),
    (row(1, 1.0, None, graders={}), "model", None, ""),  # it was not asked
  ],
)
def test_the_first_grader_is_in_the_scores_and_the_rules_beside(
  said, grader, score, unscored
):
  by_rules = said.pop("rules")
  for _ in range(2):  # as when a run goes on
    evals.use_grader(said, grader)
    assert said["scores"] == {"refuse_disallowed": score} and said["rules"] == by_rules
    assert said["unscored"] == ({"refuse_disallowed": unscored} if unscored else {})


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"eval.grader": ()}, "EvalConfig.grader: wanted one name or more"),
    ({"eval.grader": ("rules", "rules")}, "each once"),
    ({"eval.grader": ("judge",)}, "wanted one of rules, model, endpoint"),
    ({"eval.grader": ("model",)}, "EvalConfig.grader_model: wanted the path"),
    (
      {"eval.grader": ("model",), "eval.grader_model": "random"},
      "eval.grader_model: wanted another model than the one that is evaluated",
    ),
    ({"eval.form": "essay"}, "EvalConfig.form|eval.form: wanted one of grade"),
  ],
)
def test_graders_that_cannot_be_are_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    tiny(**changes)


@pytest.mark.parametrize("more", [{"limit": 5}, {}])
def test_a_further_set_is_a_source_and_columns(more):
  node = config_file("tiny").get_config().to_dict()
  both = {"source": "bundled", "columns": {}}
  node["eval"]["extra"] = {"own": (both if more else {"source": "bundled"}) | more}
  with pytest.raises(ValueError, match="EvalConfig.extra: .*'own'"):
    convert.build(Config, node)
  node["eval"]["extra"] = {"own": both}
  assert convert.build(Config, node).eval.extra


def test_only_rules_grade_the_policy_world():
  node = config_file("world").get_config()
  node.eval.grader, node.eval.grader_model = ("rules", "model"), "somewhere"
  with pytest.raises(ValueError, match="wanted rules alone in the policy world"):
    convert.build(Config, node.to_dict())


SMALL = dict(arms=("base",), prompts=3, helpful=1, capability=1, max_new=8)
SMALL |= dict(form="harmbench", grader_max_new=4)
SMALL = {f"eval.{name}": value for name, value in SMALL.items()}


@pytest.fixture(scope="module")
def guest(tmp_path_factory) -> str:
  """An untrained model as a Hugging Face folder."""
  folder = tmp_path_factory.mktemp("guest")
  cfg = tiny(**{"export.of": "base", "export.dtype": "float32", "seed": 5})
  stages.run_stages(cfg, folder, {}, ("export",))
  return str(folder / "export" / "model")


def test_a_model_in_this_process_is_a_grader(guest, tmp_path):
  graders = {"eval.grader": ("rules", "model"), "eval.grader_model": guest}
  with pytest.raises(ValueError) as error:
    evaluate_stage.evaluate(opened(tiny(**SMALL | graders), tmp_path, "eval"))
  said = str(error.value)
  assert "the grader model has no score for 4 of 4 answers of arm base" in said
  assert "4 x the verdict is cut by the token budget; wanted" in said
  assert "(config.eval.unscored)" in said and "\n" not in said
  rows = store.read_rows(tmp_path / "eval" / "base.jsonl")
  told = [one["graders"]["model"] for one in rows if one["kind"] != "capability"]
  assert len(told) == 4 and all(one["reason"] and one["said"] for one in told)
  assert not (tmp_path / "eval" / "summary.json").exists()  # for no card or report
  more = SMALL | graders | {"eval.unscored": 1.0}
  evaluate_stage.evaluate(opened(tiny(**more), tmp_path, "eval"))
  assert store.read_rows(tmp_path / "eval" / "base.jsonl") == rows  # not read again
  summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
  found = summary["graders"]["rules vs model"]
  assert (found["n"], found["unscored"], found["kappa"]) == (0, 4, None)


def test_a_question_that_is_too_long_for_a_grader_is_not_read(guest, tmp_path):
  more = {"eval.grader": ("model",), "eval.grader_model": guest}
  run = opened(tiny(**SMALL | more), tmp_path, "eval")
  ask = grading._local_grader(run)
  short, long = ([Turn(role="user", content="Is it? " * n)] for n in (3, 2000))
  found = ask([long, short, long])
  assert [bool(said.unread) for said in found] == [True, False, True]
  assert "tokens, and the grader takes 8192 with its reply" in found[0].unread
  assert found[1].text and found[1].cut
  assert ask([short])[0] == found[1]  # it is greedy, whoever asks beside it
