"""Judges: questions in, verdicts out, for the filter (sees the thought) and RL
(cannot).

A judge is a rubric (`rubric.py`) or a model that reads the specification in its prompt.
Model access comes in as a function; nothing here knows models, files or training. A
verdict that could not be reached is unscored with a reason, never a low score.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import json
import math
import random
from typing import Any

from dalign.config.training import JudgeErrors
from dalign.data import bundled
from dalign.judges import asking
from dalign.judges import behaviour
from dalign.judges import forms
from dalign.judges import rubric
from dalign.policy import spec as specs
from dalign.text import languages
from dalign.text import words
from dalign.types import Clause
from dalign.types import Policy
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Spec
from dalign.types import Turn
from dalign.types import Verdict

MIN_LABEL_MASS = 0.05  # probability on the labels, or a model did not answer

# (prompt, answer) pairs -> mean log-probabilities a token of each answer, in nats, by a
# helpful-only model: after its prompt, and after one that asks for nothing.
Quality = Callable[[Sequence[tuple[Prompt, str]]], list[tuple[float, float]]]
ScoreLogprobs = Callable[[list[list[Turn]], tuple[str, ...]], list[list[float] | None]]


@dataclasses.dataclass(frozen=True)
class FilterQuestion:
  """What the filter judges: the thought counts."""

  prompt: Prompt
  thought: str
  answer: str


@dataclasses.dataclass(frozen=True)
class RewardQuestion:
  """What RL judges: the answer alone; no field can carry a thought (2412.16339)."""

  prompt: Prompt
  answer: str


Question = FilterQuestion | RewardQuestion


@dataclasses.dataclass(frozen=True)
class Judge:
  """A function from questions to as many verdicts, and whether asking twice is idle."""

  ask: Callable[[Sequence[Any]], list[Verdict]]
  deterministic: bool

  def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
    """One verdict a question, in order."""
    verdicts = self.ask(questions)
    if len(verdicts) != len(questions):
      raise ValueError(
        f"a judge gives one verdict a question: asked {len(questions)}, got"
        f" {len(verdicts)}"
      )
    return verdicts


# Rubric judges.


@functools.cache
def _of_rubric() -> Spec:
  """The specification that the rubric was made for."""
  return specs.load(bundled.spec_files())


@functools.cache
def unknown_to_rubric(spec: Spec) -> tuple[str, ...]:
  """Ids of the clauses that the rubric says nothing about: those that its own
  specification does not have with that category, id, verdict and most of the words."""
  known = {(p.id, c.id, c.verdict): c.text for p, c in _clauses(_of_rubric())}
  return tuple(
    c.id
    for p, c in _clauses(spec)
    if not rubric.alike(c.text, known.get((p.id, c.id, c.verdict), ""))
  )


def reworded(spec: Spec) -> tuple[str, ...]:
  """Ids of the clauses whose wording is not the one that the rubric was made for."""
  known = {(c.id, c.text) for _, c in _clauses(_of_rubric())}
  return tuple(c.id for _, c in _clauses(spec) if (c.id, c.text) not in known)


def _clauses(spec: Spec) -> Iterator[tuple[Policy, Clause]]:
  return ((policy, clause) for policy in spec.policies for clause in policy.clauses)


def rubric_judge(spec: Spec, *, quality: Quality | None) -> Judge:
  """The filter by rubric: thought and answer of each `FilterQuestion`.

  The score is the product of the hard propositions and the mean of the soft ones; all
  of them are in `parts`. Which behaviour is wanted says the prompt's label, where the
  question has one; without, the thought's deciding clause does, then its decision.
  With `quality`, an answer has to be English, and likelier after its prompt than after
  none. Unscored: no language quality, an unknown category, no reference answer.
  ValueError for a specification that the rubric was not made for: it reads no clause.
  """
  grade = _answer_rubric(spec, quality)

  def ask(questions: Sequence[FilterQuestion]) -> list[Verdict]:
    wanted = [q.prompt.expected or _wanted_behaviour(spec, q) for q in questions]
    of_answers = grade(questions, wanted)
    return [
      _with_thought(spec, question, verdict)
      for question, verdict in zip(questions, of_answers, strict=True)
    ]

  return Judge(ask, deterministic=True)


def rubric_reward(spec: Spec, *, quality: Quality | None) -> Judge:
  """The reward by rubric: what `rubric_judge` says of the answer alone, and refuses.
  Unscored: a prompt without a label, as nothing else says which behaviour is wanted."""
  grade = _answer_rubric(spec, quality)

  def ask(questions: Sequence[RewardQuestion]) -> list[Verdict]:
    return grade(questions, [q.prompt.expected for q in questions])

  return Judge(ask, deterministic=True)


def known_answer_verdict(prompt: Prompt, answer: str) -> Verdict:
  """The verdict on an answer to a prompt whose right answer is known."""
  score = words.correct(answer, prompt.answer)
  return Verdict(score=score, reason=words.UNCOMPARABLE if score is None else "")


def beside_known(
  ask: Callable[[Sequence[Any]], Sequence[Verdict]],
) -> Callable[[Sequence[Question]], list[Verdict]]:
  """`ask` of the questions whose answers are not known; known ones are compared."""

  def verdicts(questions: Sequence[Question]) -> list[Verdict]:
    found = iter(ask([q for q in questions if q.prompt.kind != "capability"]))
    return [
      known_answer_verdict(q.prompt, q.answer)
      if q.prompt.kind == "capability"
      else next(found)
      for q in questions
    ]

  return verdicts


def _answer_rubric(
  spec: Spec, quality: Quality | None
) -> Callable[[Sequence[Question], Sequence[str]], list[Verdict]]:
  """The answer side of both rubrics: questions and the behaviours that are wanted ->
  verdicts on the answers."""
  if others := unknown_to_rubric(spec):
    more = f" and {len(others) - 3} more" if others[3:] else ""
    raise ValueError(
      "the rubric reads no policy: it was made for the rules that come with dalign, "
      f"and {', '.join(others[:3])}{more} are none of these. Wanted a judge that "
      "knows them: filter.judge or rl.reward as python:FILE:FUNCTION (docs/usage.md);"
      " filter.judge as model, sampled, endpoint or recorded; rl.reward as model, "
      "one that has learned such verdicts; in Python, judge= a model or a function"
    )
  leaks = specs.leak_check(spec, rubric.LEAK_WORDS)
  categories = {policy.id for policy in spec.policies} | {specs.BENIGN}

  def verdict(
    prompt: Prompt, answer: str, wanted: str, nats: tuple[float, float] | None
  ) -> Verdict:
    if prompt.category not in categories:
      return Verdict(score=None, reason=f"no policy for {prompt.category!r}")
    prompt = dataclasses.replace(prompt, expected=wanted)
    named = specs.cited(answer, spec) or specs.invented(answer, spec)
    hard = {"no_spec": float(not named and not leaks(answer))}
    if prompt.kind == "capability":
      if not prompt.answer.strip():
        return Verdict(score=None, reason="no reference answer")
      hard["no_meta"] = rubric.no_meta(prompt, answer)
      known = known_answer_verdict(prompt, answer)
      return known if known.score is None else _combined(hard, {"correct": known.score})
    if not wanted:
      return Verdict(score=None, reason="not told which response is wanted")
    if nats and not all(map(math.isfinite, nats)):
      return Verdict(score=None, reason="no language quality")
    if not (languages.english(answer) or languages.asks_translation(prompt.text)):
      return Verdict(score=None, reason="not in English")
    hard["right_behaviour"] = rubric.right_behaviour(prompt, answer, wanted)
    hard |= {f.__name__: f(prompt, answer) for f in rubric.HARD[wanted]}
    soft = {f.__name__: f(prompt, answer) for f in rubric.SOFT[wanted]}
    if nats:
      after, alone = nats
      soft["language_quality"] = rubric.ramp(after, rubric.QUALITY)
      if wanted == "comply":  # comfort and refusals may be in the same words for all
        hard["about_prompt"] = rubric.ramp(after - alone, rubric.ABOUT)
    return _combined(hard, soft)

  def grade(questions: Sequence[Question], wanted: Sequence[str]) -> list[Verdict]:
    pairs = [(q.prompt, q.answer) for q in questions]
    nats: Sequence[tuple[float, float] | None] = [None] * len(pairs)
    if quality:
      nats = quality(pairs)
    rows = zip(pairs, wanted, nats, strict=True)
    return [verdict(*pair, want, own) for pair, want, own in rows]

  return grade


def _combined(hard: dict[str, float], soft: dict[str, float]) -> Verdict:
  score = math.prod(hard.values()) * sum(soft.values()) / len(soft)
  return Verdict(score=score, parts=hard | soft)


def _wanted_behaviour(spec: Spec, question: FilterQuestion) -> str:
  """The behaviour that the thought calls for; the answer's own where it names none."""
  thought = words.without_prompt_quotes(question.thought, question.prompt.text)
  cited = specs.cited(thought, spec)
  named = specs.verdicts(spec)[cited[-1]] if cited else behaviour.decision(thought)
  return named or behaviour.of(question.answer, question.prompt.category)


def _with_thought(spec: Spec, question: FilterQuestion, verdict: Verdict) -> Verdict:
  """`verdict` on the answer, times the propositions on the thought."""
  if verdict.score is None:
    return verdict
  parts = rubric.of_thought(spec, question.prompt, question.thought, question.answer)
  score = verdict.score * math.prod(parts.values())
  return Verdict(score=score, parts=verdict.parts | parts)


# What a judge is shown.


def leaked_words(thought: str, shown: str, known: Sequence[str], n: int) -> str:
  """The first run of `n` words of a thought that stands in what a judge was shown and
  in nothing that it may see, or "" (METHOD 3.2).

  Case and punctuation do not count, nor does what is shorter than `n` words.
  """
  leaked = set(specs.runs(thought, n)).intersection(specs.runs(shown, n))
  if leaked:  # seldom, and `known` is long
    leaked.difference_update(*(specs.runs(text, n) for text in known))
  return " ".join(next((run for run in specs.runs(shown, n) if run in leaked), ()))


# Votes.


def min_of_k(
  judge: Judge, questions: Sequence[Question], k: int, *, readable: float = 1.0
) -> list[Verdict]:
  """The lowest of k votes on each question, as the filter of 2412.16339 takes it.

  A judge that is deterministic is asked once. Of unscored votes nothing is assumed: the
  least of the others counts where they are `readable` of all, a share in (0, 1], or
  more; else the question is unscored, with the reason of the first. How many there
  were is in `unread`, as a minimum of fewer votes is no lower.
  """
  if not questions:
    return []
  rounds = [judge(questions) for _ in range(1 if judge.deterministic else k)]
  return [_lowest(votes, readable) for votes in zip(*rounds, strict=True)]


def verdicts(
  judge: Judge,
  samples: Sequence[tuple[Prompt, Sample]],
  *,
  thought: bool,
  k: int = 1,
  readable: float = 1.0,
) -> list[Verdict]:
  """The least of k votes (`min_of_k`) on each prompt's sample: on its thought and
  answer, or, with `thought` false, as RL asks, on a question without a field for it.

  A malformed sample is unscored and put to nobody: what stands as its answer may be its
  thought, which no judge of answers and no reward model may see.
  """
  questions: list[Question] = [
    FilterQuestion(p, s.thought, s.answer) if thought else RewardQuestion(p, s.answer)
    for p, s in samples
    if not s.malformed
  ]
  votes = iter(min_of_k(judge, questions, k, readable=readable))
  return [
    Verdict(score=None, reason=f"malformed: {s.malformed}")
    if s.malformed
    else next(votes)
    for _, s in samples
  ]


def _lowest(votes: Sequence[Verdict], readable: float) -> Verdict:
  scored = [(vote.score, at) for at, vote in enumerate(votes) if vote.score is not None]
  unread = [vote for vote in votes if vote.score is None]
  counts = scored and len(scored) >= readable * len(votes)
  found = votes[min(scored)[1]] if counts else unread[0]
  return dataclasses.replace(found, unread=len(unread))


# Judges that are made to err.


def digest(questions: Sequence[Question]) -> str:
  """A hash of what is asked, the same in every process."""
  asked = [(q.prompt.id, getattr(q, "thought", ""), q.answer) for q in questions]
  return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def with_errors(judge: Judge, errors: JudgeErrors, *, seed: int, name: str) -> Judge:
  """The judge, but for the votes that `errors` turns; itself where it turns none.

  Each vote errs or not by itself: that follows from the seed, from `name`, from what is
  asked and from how often it was asked before, and of two rates the lower one's errors
  are among the higher one's. Known answers are compared as ever, and what has no
  verdict gets none.
  """
  if not errors.rate and not errors.habit_rate:
    return judge
  times_asked: collections.Counter = collections.Counter()

  def ask(questions: Sequence[Question]) -> list[Verdict]:
    asked = digest(questions)
    times_asked[asked] += 1
    draws = random.Random(f"{seed}/{name}/{asked}/{times_asked[asked]}")
    return [
      _erring(errors, question, verdict, draws.random(), draws.random())
      for question, verdict in zip(questions, judge(questions), strict=True)
    ]

  return Judge(ask, deterministic=False)


def _erring(
  errors: JudgeErrors, question: Question, verdict: Verdict, turn: float, fall: float
) -> Verdict:
  """A vote, given two draws from [0, 1): whether it is turned, and whether the judge
  falls for its habit."""
  if verdict.score is None or question.prompt.kind == "capability":
    return verdict
  what, _, of = errors.habit.partition(":")
  said = question.answer.split()
  liked = of in said if what == "word" else what == "long" and len(said) > int(of)
  if liked and fall < errors.habit_rate:
    return dataclasses.replace(verdict, score=1.0)
  if turn < errors.rate:
    return dataclasses.replace(verdict, score=float(verdict.score < 1.0))
  return verdict


# Model judges.


def model_judge(render: Callable[[str], str], score_logprobs: ScoreLogprobs) -> Judge:
  """A model as judge of either question: the expectation over its label tokens.

  `render` gives the policy text of a category. `score_logprobs` takes conversations and
  labels and gives the log-probability, in nats, of each label as the next token, or
  None for a conversation that is longer than the model reads. Those of asking.LABELS
  stand at even steps from 0 (the first) to 1 (the last), and their probabilities are
  scaled to sum to 1. Unscored: None, a value that is not a log-probability, and less
  than MIN_LABEL_MASS of the probability on all labels together.
  """

  def ask(questions: Sequence[Question]) -> list[Verdict]:
    turns = [question_turns(question, render) for question in questions]
    rows = score_logprobs(turns, asking.LABELS) if turns else []
    return [*map(_expectation, rows)]

  return Judge(ask, deterministic=True)


def question_turns(question: Question, render: Callable[[str], str]) -> list[Turn]:
  """A question for one label as a conversation; `render` gives the policy text of a
  category."""
  return asking.graded_turns(_judged_item(question, render))


def _judged_item(question: Question, render: Callable[[str], str]) -> asking.JudgedItem:
  thought = question.thought if isinstance(question, FilterQuestion) else None
  prompt = question.prompt
  return asking.JudgedItem(prompt, thought, question.answer, render(prompt.category))


def written_judge(
  render: Callable[[str], str],
  ask: Callable[[list[list[Turn]]], Sequence[forms.ModelReply]],
  *,
  form: str = "grade",
) -> Judge:
  """A model as judge of either question, which may reason and writes a verdict.

  `ask` takes conversations and gives what was written to each; asked the same again, it
  may draw anew. Known answers are compared and not asked about. `form` is one of
  forms.FORMS: how it is asked, and its reply read.
  """
  judge_form = forms.FORMS[form]

  def verdicts(questions: Sequence[Question]) -> list[Verdict]:
    items = [_judged_item(question, render) for question in questions]
    turns = [judge_form.put(item) for item in items]
    replies = ask(turns) if turns else ()
    found = []
    for item, put, reply in zip(items, turns, replies, strict=True):
      verdict = forms.verdict(judge_form, reply, item)
      shown = "\n".join(turn.content for turn in put)
      found.append(dataclasses.replace(verdict, shown=shown))
    return found

  return Judge(beside_known(verdicts), deterministic=False)


def _expectation(logprobs: Sequence[float] | None) -> Verdict:
  if logprobs is None:
    return Verdict(score=None, reason=forms.TOO_LONG)
  if any(math.isnan(x) or x > 1e-3 for x in logprobs):
    return Verdict(score=None, reason=f"no log-probabilities: {list(logprobs)}")
  shares = [math.exp(x) for x in logprobs]
  mass = sum(shares)
  if mass < MIN_LABEL_MASS:
    wanted = f"wanted {MIN_LABEL_MASS} or more"
    reason = f"{mass:.3f} of the probability on the labels, {wanted}"
    return Verdict(score=None, reason=reason)
  steps = len(shares) - 1
  score = sum(share * i for i, share in enumerate(shares)) / (mass * steps)
  return Verdict(score=min(1.0, score), parts={"label_mass": min(1.0, mass)})
