"""What the stages ask of a field: its specification, prompts, words and grades.

The stages are the same for every field. English (policies that people wrote) is one,
the policy world, whose truth is known, another; a third is a class with these members.
"""

from collections.abc import Callable, Iterator, Mapping
import random
from typing import Protocol

from dalign.judges import judge
from dalign.judges import probing
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Spec
from dalign.types import Turn
from dalign.types import Verdict


class Task(Protocol):
  """A field.

  monitored: metrics of `definitions` about the thought that RL writes down.
  opens_with_policy: whether the think block of a base with the specification in sight
    is opened for it.
  openings: how an answer that refuses opens, where that has to be known.
  """

  monitored: tuple[str, ...]
  opens_with_policy: bool
  openings: tuple[str, ...]

  @property
  def spec(self) -> Spec:
    """The specification."""

  @property
  def definitions(self) -> Mapping[str, str]:
    """Metric -> what it is."""

  def prompts(
    self, source: str, columns: Mapping[str, str], data_dir: str
  ) -> list[Prompt]:
    """The prompts of `config.data.source`, or of a set to be evaluated besides."""

  def notice(self, source: str) -> str:
    """Whose prompts they are, of those that are others'."""

  def contaminated(
    self, prompts: list[Prompt], held_out: list[Prompt]
  ) -> list[tuple[str, str]]:
    """(id of a prompt, text of a held-out one) where they say the same."""

  def policy_text(self, category: str, detail: str) -> str:
    """spec(category) as a system turn has it."""

  def teach(self, prompt: Prompt, *, worked: int) -> tuple[Turn, ...]:
    """The conversation of stage 1, the spec in sight, with worked examples."""

  def summaries(self, prompt: Prompt) -> tuple[Turn, ...]:
    """The conversation in which the principles, the guides and the summaries of all
    policies are in sight, and nobody says which of them the prompt is about."""

  def revise(self, prompt: Prompt, answer: str) -> tuple[Turn, ...]:
    """The conversation in which an answer is revised, the spec in sight."""

  def known(self, prompt: Prompt) -> str:
    """The completion of a prompt with a known answer, after its forced opening."""

  def worked(self) -> list[tuple[str, str]]:
    """The spec's worked examples: a prompt, and its completion after the opening."""

  def looks_right(self, threshold: float) -> Callable[[Prompt, Sample], bool]:
    """Whether a well-formed sample needs no further ones beside it: its score by the
    rubric is at least `threshold`; by policies that the rubric was not made for, it has
    what is checked whoever judges."""

  def checks(self, prompt: Prompt, sample: Sample) -> dict[str, float]:
    """What a sample has to have whoever judges it, each 0 or 1: its thought cites a
    clause that applies, where the prompt's are known, and ends in a verdict, which the
    answer follows."""

  def recalled(self, thought: str) -> str:
    """With what a thought begins that recalls first and reasons then: the id of the
    first clause it cites that calls for its verdict, or else of the first, if any."""

  def reworded(self) -> tuple[str, ...]:
    """Ids of clauses in other words than the rubric was made for."""

  def filter_rubric(self, quality) -> judge.Judge:
    """The judge of thought and answer that is no model."""

  def reward_rubric(self, quality) -> judge.Judge:
    """The judge of answers that is no model."""

  def truth(self) -> judge.Judge | None:
    """Who knows what is right, of thoughts and answers or of answers alone, where
    somebody does: no stage learns of it, they only note beside what was judged what was
    so."""

  def question(self, asked: judge.Question) -> list[Turn]:
    """What a model that judges is asked."""

  def grade(self, answer: str) -> Verdict:
    """What a model that judges has answered."""

  def written_judge(self, ask, form: str) -> judge.Judge:
    """A model that writes its verdicts; `ask`, `form`: as of `judge.written_judge`."""

  def probes(self, prompts) -> list[probing.Probe]:
    """Answers to try a reward model with, those that break or keep a rule of the policy
    among them; none without prompts."""

  def of_rules(self) -> list[probing.Probe]:
    """Answers by the clause that they break or keep."""

  def constructed_answers(
    self, good: list[tuple[Prompt, str]], draw: random.Random
  ) -> Iterator[tuple[Prompt, str, float]]:
    """(prompt, answer, score) to each prompt that has a good answer: a bare refusal,
    the same throughout a category, which is fair where that refuses, and else that or a
    refusal that was right elsewhere, which is wrong; and what speaks about the prompt
    but does not answer it, or answers another one."""

  def labelled(self) -> list[tuple[judge.RewardQuestion, bool]]:
    """Answers that are known to be right or wrong."""

  def outcome(self, prompt: Prompt, sample: Sample) -> dict:
    """The graded row of one sample."""
