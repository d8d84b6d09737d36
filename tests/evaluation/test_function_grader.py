"""A function of the user's that grades evaluation."""

import json

import pytest

from dalign.runs import manifests
from dalign.runs import store
from dalign.stages import evaluate as evaluate_stage
from dalign.stages import rehearsal
from dalign.stages import services
from tests.evaluation.test_grading import SMALL
from tests.helpers import opened
from tests.helpers import tiny

OWN = """
import json
import pathlib


def grade(replies):
  with (pathlib.Path(__file__).parent / "told.jsonl").open("a") as file:
    for reply in replies:
      told = [reply.prompt, reply.expected, hasattr(reply, "thought"), reply.policy]
      file.write(json.dumps(told) + "\\n")
  return [(None, "to be answered") if r.expected == "comply" else 0.25 for r in replies]
"""


@pytest.fixture
def own(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(OWN)
  return path


def config(own, graders, **changes):
  return tiny(**SMALL | {"eval.grader": graders, "eval.unscored": 1.0} | changes)


def test_a_function_grades_beside_the_rules(own, tmp_path):
  grader, workdir = f"python:{own}:grade", tmp_path / "run"
  asked = config(own, ("rules", grader))
  evaluate_stage.evaluate(opened(asked, workdir, "eval"))
  rows = store.read_rows(workdir / "eval" / "base.jsonl")
  graded = {row["prompt"]: row for row in rows if "graders" in row}
  told = [*map(json.loads, (tmp_path / "told.jsonl").read_text().splitlines())]
  assert len(told) == len(graded) >= 3
  for prompt, expected, thought, policy in told:
    row = graded[prompt]
    assert expected == row["expected"] and not thought
    if row["category"] != "benign":
      assert "## Allowed (comply)" in policy and "## Edge cases" in policy
    [found] = row["graders"].values()
    score = None if expected == "comply" else 0.25
    assert found["score"] == score
    assert found["reason"] == ("to be answered" if score is None else "")
  summary = json.loads((workdir / "eval" / "summary.json").read_text())
  assert [*summary["graders"]] == [f"rules vs {grader}"]
  manifest = manifests.read_manifest(workdir / "eval" / "manifest.json")
  assert [name for name in manifest["inputs"] if name.endswith("own.py")]
  own.write_text(OWN + "\n# changed")
  with pytest.raises(ValueError, match="own.py was"):
    evaluate_stage.evaluate(opened(asked, workdir, "eval"))


def test_a_function_that_grades_first_makes_the_table(own, tmp_path):
  grader = f"python:{own}:grade"
  evaluate_stage.evaluate(opened(config(own, (grader,)), tmp_path / "run", "eval"))
  summary = json.loads((tmp_path / "run" / "eval" / "summary.json").read_text())
  arm = summary["arms"]["base"]
  assert arm["comply_allowed"]["unscored"] > 0
  scored = [m for m in ("refuse_disallowed", "safe_complete") if arm[m]["n"]]
  assert scored and all(arm[m]["mean"] == 0.25 for m in scored)
  assert grader in summary["definitions"]["refuse_disallowed"]


def test_a_function_that_grades_nothing_is_refused_before_anything_is_made(
  own, tmp_path
):
  own.write_text("def grade(replies):\n  return [reply.thought for reply in replies]\n")
  cfg = config(own, ("rules", f"python:{own}:grade"))
  work = services.Workspace(cfg, tmp_path / "run")
  with pytest.raises(ValueError, match="own.py: grade: row 1 of .*line 2: .*thought"):
    rehearsal.check_prompts_render(cfg, work, ("eval",))
  rehearsal.check_prompts_render(cfg, work, ("generate",))
