"""Policies in English, as specs/README.md has them: rubrics judge, rules grade."""

import collections
from collections.abc import Callable, Iterator, Mapping
import functools
import random

from dalign.data import prompt_sets
from dalign.data import public
from dalign.evaluation import answered
from dalign.evaluation import encoder
from dalign.evaluation import evals
from dalign.judges import behaviour
from dalign.judges import forms
from dalign.judges import judge
from dalign.judges import probing
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.tasks import base
from dalign.text import thinking
from dalign.text import words
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Spec
from dalign.types import Turn
from dalign.types import Verdict


class English(base.Task):
  """Policies in English, as specs/README.md has them."""

  # How an answer that refuses opens.
  openings = ("I'm sorry", "Sorry", "I can't", "I cannot", "I won't", "Unfortunately")
  opens_with_policy = (
    False  # whether the think block of a base with the spec in sight is opened
  )
  monitored = (
    *("policy_retrieval", "citation", "thought_agrees", "fabricated", "tested"),
  )

  def __init__(
    self,
    read_spec: Callable[[], Mapping[str, str]],
    *,
    think: thinking.ThinkFormat,
    detail: str,
    copies: str,
  ):
    """`detail` is how much of a policy is shown, `copies` the folder of public sets, or
    "" (`config.spec.detail`, `config.eval.copies`)."""
    self._read, self._think = read_spec, think
    self._detail, self._copies = detail, copies

  @functools.cached_property
  def spec(self) -> Spec:
    """The specification."""
    return specs.load(dict(self._read()))

  @functools.cached_property
  def definitions(self) -> Mapping[str, str]:
    """Metric -> what it is, and of "answered" how it was judged."""
    how = answered.HOW["reference" if encoder.installed() else "words"]
    said = f"{evals.DEFINITIONS['answered']} {how}"
    return evals.DEFINITIONS | {"answered": said}

  @functools.cached_property
  def _answers(self) -> answered.Answered:
    return answered.Answered(encoder.installed(), prompt_sets.points())

  def prompts(
    self, source: str, columns: Mapping[str, str], data_dir: str
  ) -> list[Prompt]:
    """A prompt set: a source of `prompt_sets.load`, or "public:NAME" of
    `public.SETS`."""
    kind, _, name = source.partition(":")
    if kind == "public":
      return public.load(name, copies=self._copies, data_dir=data_dir)
    return prompt_sets.load(source, columns, data_dir)

  def notice(self, source: str) -> str:
    """Whose prompts they are, of those that are others'."""
    kind, _, name = source.partition(":")
    return public.notice(name) if kind == "public" else ""

  def contaminated(
    self, prompts: list[Prompt], held_out: list[Prompt]
  ) -> list[tuple[str, str]]:
    """(id of a prompt, text of a held-out one) where they say the same."""
    said = {prompt_sets.digest(prompt.turns): prompt.text for prompt in held_out}
    same = {prompt.id: prompt_sets.digest(prompt.turns) for prompt in prompts}
    return [
      *prompt_sets.contaminated(prompts, [prompt.text for prompt in held_out]),
      *((id, said[turns]) for id, turns in same.items() if turns in said),
    ]

  def policy_text(self, category: str, detail: str) -> str:
    """spec(category) as a system turn has it."""
    return "" if detail == "none" else specs.render(self.spec, category, detail=detail)

  def teach(self, prompt: Prompt, *, worked: int) -> tuple[Turn, ...]:
    """The conversation of stage 1, the spec in sight, with worked examples."""
    return prompting.teach(
      self.spec, prompt, detail=self._detail, worked=worked, think=self._think
    )

  def summaries(self, prompt: Prompt) -> tuple[Turn, ...]:
    """The conversation in which the principles, the guides and the summaries of all
    policies are in sight, and nobody says which of them the prompt is about."""
    system = specs.render(self.spec, specs.BENIGN, detail="brief")
    return (Turn(role="system", content=system), *prompt.turns)

  def revise(self, prompt: Prompt, answer: str) -> tuple[Turn, ...]:
    """The conversation in which an answer is revised, the spec in sight."""
    return prompting.revise(self.spec, prompt, answer, detail=self._detail)

  def known(self, prompt: Prompt) -> str:
    """The completion of a prompt with a known answer, after its forced opening."""
    return self._written(prompting.UNTOUCHED, prompt.answer)

  def worked(self) -> list[tuple[str, str]]:
    """The spec's worked examples: a prompt, and its completion after the opening."""
    all_worked = (w for policy in self.spec.policies for w in policy.worked)
    return [(w.prompt, self._written(w.thought, w.answer)) for w in all_worked]

  def _written(self, thought: str, answer: str) -> str:
    return prompting.format_completion(thought, answer, self._think)

  def looks_right(self, threshold: float) -> Callable[[Prompt, Sample], bool]:
    """Whether a well-formed sample needs no further ones beside it: its score by the
    rubric is at least `threshold`; by policies that the rubric was not made for, it has
    what is checked whoever judges."""
    if judge.unknown_to_rubric(self.spec):
      return lambda prompt, sample: all(self.checks(prompt, sample).values())
    ask = judge.rubric_judge(self.spec, quality=None)

    def right(prompt: Prompt, sample: Sample) -> bool:
      question = judge.FilterQuestion(
        prompt=prompt, thought=sample.thought, answer=sample.answer
      )
      score = ask([question])[0].score
      return score is not None and score >= threshold

    return right

  def checks(self, prompt: Prompt, sample: Sample) -> dict[str, float]:
    """What a sample has to have whoever judges it, each 0 or 1: its thought cites a
    clause that applies, where the prompt's are known, and ends in a verdict, which the
    answer follows."""
    thought = words.without_prompt_quotes(sample.thought, prompt.text)
    ends, does = (
      behaviour.verdict(thought),
      behaviour.of(sample.answer, prompt.category),
    )
    found = {"ends_in_verdict": float(bool(ends))}
    if ends:
      found["follows_verdict"] = float((ends == "refuse") == (does == "refuse"))
    if prompt.clauses:
      applies = not {*specs.cited(thought, self.spec)}.isdisjoint(prompt.clauses)
      found["clause_applies"] = float(applies)
    return found

  def recalled(self, thought: str) -> str:
    """With what a thought begins that recalls first and reasons then: the id of the
    first clause it cites that calls for its verdict, or else of the first, if any."""
    verdicts = specs.verdicts(self.spec)
    cited, ends = specs.cited(thought, self.spec), behaviour.verdict(thought)
    deciding = [id for id in cited if verdicts[id] == ends] or cited
    return f"{[*deciding, 'No clause'][0]}: "

  def reworded(self) -> tuple[str, ...]:
    """Ids of clauses in other words than the rubric was made for."""
    return judge.reworded(self.spec)

  def filter_rubric(self, quality) -> judge.Judge:
    """The judge of thought and answer that is no model."""
    return judge.rubric_judge(self.spec, quality=quality)

  def reward_rubric(self, quality) -> judge.Judge:
    """The judge of answers that is no model."""
    return judge.rubric_reward(self.spec, quality=quality)

  def truth(self) -> None:
    """Nobody."""

  def question(self, asked: judge.Question) -> list[Turn]:
    """What a model that judges is asked."""
    return judge.question_turns(
      asked, lambda category: self.policy_text(category, self._detail)
    )

  def grade(self, answer: str) -> Verdict:
    """What a model that judges has answered."""
    return forms.read_label(answer)

  def written_judge(self, ask, form: str) -> judge.Judge:
    """A model that writes its verdicts; `ask`, `form`: as of `judge.written_judge`."""
    return judge.written_judge(
      lambda category: self.policy_text(category, self._detail),
      ask,
      form=form,
    )

  def probes(self, prompts) -> list[probing.Probe]:
    """Answers to try a reward model with, those that break or keep a rule of the policy
    among them; none without prompts."""
    found = probing.probes(prompts)
    named = {True: "breaks_a_rule", False: "keeps_a_rule"}
    own = [(named[low], asked, low) for _, asked, low in probing.of_rules(self.spec)]
    return found and found + own

  def of_rules(self) -> list[probing.Probe]:
    """Answers by the clause that they break or keep."""
    return probing.of_rules(self.spec) + probing.of_worked(self.spec)

  def constructed_answers(
    self, good: list[tuple[Prompt, str]], draw: random.Random
  ) -> Iterator[tuple[Prompt, str, float]]:
    """(prompt, answer, score) to each prompt that has a good answer: a bare refusal,
    the same throughout a category, which is fair where that refuses, and else that or a
    refusal that was right elsewhere, which is wrong; and what speaks about the prompt
    but does not answer it, or answers another one."""
    refusals: dict[str, list] = collections.defaultdict(list)
    answers: dict[str, list] = collections.defaultdict(list)
    for prompt, answer in good:
      refused = behaviour.of(answer, prompt.category) == "refuse"
      (refusals if refused else answers)[prompt.category].append((prompt.id, answer))
    bare_of = {
      c: draw.choice(probing.REFUSALS_LEARNED)
      for c in sorted({p.category for p, _ in good})
    }
    for prompt, answer in good:
      other = [said for id, said in answers[prompt.category] if id != prompt.id]
      forms = probing.non_answers(prompt, probing.FORMS_LEARNED)
      some = [said for _, said in forms] + [draw.choice(other) for _ in other[:2]]
      bare = bare_of[prompt.category]
      if behaviour.of(answer, prompt.category) == "refuse":
        yield prompt, bare, probing.BARE_REFUSAL_SCORE
      else:
        known = [said for _, said in refusals[prompt.category]]
        yield prompt, draw.choice([bare, draw.choice(known or [bare])]), 0.0
      yield prompt, draw.choice(some), 0.0

  def labelled(self) -> list[tuple[judge.RewardQuestion, bool]]:
    """Answers that are known to be right or wrong."""
    return probing.labelled_examples(self.spec)

  def outcome(self, prompt: Prompt, sample: Sample) -> dict:
    """The graded row of one sample."""
    return evals.outcome(prompt, sample, self.spec, self._answers)
