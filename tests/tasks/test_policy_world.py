"""The policy world as a task: what is graded by which specification."""

import pytest

from dalign.judges import judge
from dalign.tasks import lessons
from dalign.tasks import policy_world
from dalign.tasks import world
from tests.helpers import sample


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("source", ["world:told", "world:edited"])
def test_what_the_specification_in_sight_says_is_right_in_all_grades(source, depth):
  task = policy_world.World(0, depth)
  shown = task.spec
  if source == "world:edited":
    shown = world.edited(task.spec, "probe")
  prompts = task.prompts(source, {}, "")[:100]
  assert len({prompt.expected for prompt in prompts}) > 1
  for prompt in prompts:
    ask = lessons.ask_of(prompt)
    thought, answer = world.thought(shown, ask), world.answer(shown, ask)
    line = task.outcome(prompt, sample(answer, thought))
    clauses = len(world.steps(shown, ask))
    named = ("verdict", "style", "citation", "policy_retrieval", f"depth_{clauses}")
    assert [line["scores"][name] for name in named] == [1.0] * 5
    assert line["scores"]["fabricated"] == 0.0 and not line["invented"]
    assert line["scores"][f"depth_{clauses % 5 + 1}"] is None
    [verdict] = task.truth()([judge.FilterQuestion(prompt, thought, answer)])
    assert verdict.score == 1.0
    wrong = "close to us there is kite" if prompt.expected == "refuse" else "no"
    line = task.outcome(prompt, sample(wrong, thought))
    assert line["scores"][f"depth_{clauses}"] == 0.0
