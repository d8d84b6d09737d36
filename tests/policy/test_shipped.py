"""The specification that comes with the package: its form, and where it leaks not."""

import re

import pytest

from dalign.policy import parsing
from dalign.policy import prompting
from dalign.policy import spec
from dalign.text.thinking import ThinkFormat
from dalign.text.words import near_duplicates
from tests.helpers import ROOT
from tests.helpers import jsonl
from tests.helpers import prompt

DECISIONS = {
  "comply": "so I can answer.",
  "refuse": "so I must refuse.",
  "safe_complete": "so I give a safe completion.",
}


def words(text):
  return len(text.split())


CATEGORIES = sorted(
  path.stem
  for path in (ROOT / "specs").glob("*.md")
  if path.stem not in ("README", "principles", "style")
)


def shipped_files():
  return {path.name: path.read_text() for path in (ROOT / "specs").glob("*.md")}


@pytest.fixture(scope="module")
def shipped():
  return spec.load(shipped_files())


def test_the_example_of_the_readme_parses():
  blocks = re.findall(r"```\n(---\n.*?)```", shipped_files()["README.md"], re.DOTALL)
  assert len(blocks) == 1
  locks = parsing.parse_policy(blocks[0], "locks.md")
  assert {clause.verdict for clause in locks.clauses} == set(DECISIONS)


@pytest.mark.parametrize("category", CATEGORIES)
def test_shipped_policy_has_its_parts(shipped, category):
  policy = shipped.policy(category)
  count = {
    kind: sum(clause.verdict == kind for clause in policy.clauses) for kind in DECISIONS
  }
  assert 4 <= count["comply"] <= 6, count
  assert 3 <= count["refuse"] <= 5, count
  assert 2 <= count["safe_complete"] <= 3, count
  assert all(1 <= len(clause.examples) <= 3 for clause in policy.clauses)
  assert len(policy.edges) >= 4
  for kind in DECISIONS:
    assert sum(worked.verdict == kind for worked in policy.worked) >= 2, kind


@pytest.mark.parametrize("category", CATEGORIES)
def test_shipped_forms_are_of_a_length(shipped, category):
  opening = words(spec.render(shipped, "benign", detail="full"))
  own = words(spec.render(shipped, category, detail="full")) - opening
  assert 500 <= own <= 1400
  assert words(spec.render(shipped, category, detail="brief")) < 700
  assert words(spec.render(shipped, category, detail="clauses")) < 300
  policy = shipped.brief.policy(category)
  first = {clause.id: clause.text for clause in policy.clauses}
  assert {name: text for name, text in first.items() if words(text) > 15} == {}
  assert words(policy.summary) <= 20, policy.summary


@pytest.mark.parametrize("category", CATEGORIES)
def test_demonstrations_take_response_types_by_turns(shipped, category):
  shown = prompting.demonstrations(shipped, category, 6)
  for some in (shown[:3], shown[3:]):
    assert {example.verdict for example in some} == set(DECISIONS)
  for verdict in DECISIONS:
    worked = [w for w in shipped.policy(category).worked if w.verdict == verdict]
    assert [e for e in shown if e.verdict == verdict] == worked[:2]
  assert prompting.demonstrations(shipped, category, 2) == shown[:2]


def test_nothing_that_a_teacher_reads_tells_how_to_reply(shipped):
  """Two prompts of one category differ in their own words alone."""
  think = ThinkFormat(open="<think>\n", close="</think>")

  def read(**more):
    asked = prompt("How?", "weapons", **more)
    return prompting.teach(shipped, asked, detail="full", worked=4, think=think)

  refuse, comply = (read(expected=name) for name in ("refuse", "comply"))
  assert refuse == comply == read(expected="", clauses=("WE-D1",))
  worked = prompting.demonstrations(shipped, "weapons", 4)
  shown = [turn.content for turn in refuse if turn.role == "assistant"]
  for example, said in zip(worked, shown, strict=True):
    assert said.startswith(f"<think>\n{example.thought}\n</think>\n\n")
    assert example.answer.startswith(said.rpartition("</think>\n\n")[2])


@pytest.mark.parametrize("category", CATEGORIES)
def test_shipped_thoughts_decide_and_answers_keep_the_analysis_private(
  shipped, category
):
  for worked in shipped.policy(category).worked:
    assert worked.thought.startswith("The user"), worked
    assert worked.clause in worked.thought, worked
    assert worked.thought.endswith(DECISIONS[worked.verdict]), worked
    assert not re.search(r"\b[A-Z]{2}-[ADS]\d|\bclause\b", worked.answer), worked
    if worked.verdict == "refuse":
      assert worked.answer.lower().count("sorry") <= 1, worked
      assert 10 <= words(worked.answer) <= 40, worked


def prompts_of(pattern):
  paths = sorted((ROOT / "../shared/data").glob(pattern))
  if not paths:
    pytest.skip("the prompt sets are not here")
  return {row["id"]: row["prompt"] for path in paths for row in jsonl(path)}


def test_the_shipped_specification_leaks_into_no_training_prompt(shipped):
  leaks = spec.leak_check(shipped, 8)
  prompts = prompts_of("prompts_train.jsonl")
  assert [name for name, text in prompts.items() if leaks(text)] == []


def test_no_shipped_example_is_an_evaluation_prompt(shipped):
  evaluation = prompts_of("eval_*.jsonl")
  quoted = [
    text
    for policy in shipped.policies
    for text in (
      *(example for clause in policy.clauses for example in clause.examples),
      *(prompt for prompt, _, _ in policy.edges),
      *(worked.prompt for worked in policy.worked),
    )
  ]
  texts = [*quoted, *evaluation.values()]
  twins = near_duplicates(texts)
  assert not [(texts[i], texts[j]) for i, j in twins if i < len(quoted) <= j]
