"""The prompts of a run: a checked set, and draws from it."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import pathlib

from dalign.config.model import SamplerConfig
from dalign.config.replies import DataConfig
from dalign.data import attacks
from dalign.data import prompt_sets
from dalign.policy import spec as specs
from dalign.runs import progress
from dalign.sampling import sampler as sampling
from dalign.tasks import base
from dalign.text import chat_template
from dalign.types import EXPECTED
from dalign.types import Prompt


class Prompts:
  """The prompt set of a config, read when it is first needed.

  Training prompts are drawn by the seed; held-out ones are the same for every seed.
  """

  def __init__(self, task: base.Task, *, data: DataConfig, seed: int):
    self._task, self._data, self._seed = task, data, seed
    # By source what is to be said of prompts whose clauses are none of the spec.
    self.of_no_clause: dict[str, str] = {}

  @functools.cached_property
  def raw(self) -> list[Prompt]:
    """The prompt set as its source has it."""
    return self.load(self._data.source, self._data.columns)

  @functools.cached_property
  def all(self) -> list[Prompt]:
    """The prompt set without training prompts that say what held-out ones say.
    ValueError where these are more than config.data.contaminated."""
    train = [prompt for prompt in self.raw if prompt.split != "eval"]
    held_out = [prompt for prompt in self.raw if prompt.split == "eval"]
    hits = dict(self._task.contaminated(train, held_out))
    if not hits:
      return self.raw
    prompt, other = next(iter(hits.items()))
    said = (
      f"{len(hits)} of {len(train)} training prompts say what held-out ones say, such "
      f"as {prompt!r}: {other!r:.80}"
    )
    limit = self._data.contaminated
    if len(hits) > limit * len(train):
      raise ValueError(
        f"{self._data.source}: {said}; wanted at most {limit:.0%} of them "
        "(config.data.contaminated): take them out, or hold others out"
      )
    progress.say(f"{said}; they are left out")
    return [prompt for prompt in self.raw if prompt.id not in hits]

  @property
  def files(self) -> list[pathlib.Path]:
    """The file of prompts, where they are one of the user's."""
    file = prompt_sets.file_of(self._data.source)
    return [file] if file else []

  def load(self, source: str, columns: Mapping[str, str]) -> list[Prompt]:
    """A prompt set; categories must be of the spec, or "benign". Clauses that the spec
    lacks decide nothing: they are said, and taken off."""
    if notice := self._task.notice(source):
      progress.say(notice)
    folder = pathlib.Path(self._data.dir).expanduser().absolute()
    prompts = self._task.prompts(source, columns, str(folder))
    report_lone_surrogates(source, (turn.content for p in prompts for turn in p.turns))
    spec = self._task.spec
    known = {policy.id for policy in spec.policies} | {specs.BENIGN}
    if odd := [prompt for prompt in prompts if prompt.category not in known]:
      raise ValueError(
        f"{source}: {len(odd)} prompts have a category without a policy, such as "
        f"{odd[0].category!r} of {odd[0].id!r} ({odd[0].text!r:.60}); wanted one of "
        f"{', '.join(sorted(known))}"
      )
    there = specs.clause_ids(spec).keys()
    unknown = {p.id: [c for c in p.clauses if c not in there] for p in prompts}
    if found := [p for p in prompts if unknown[p.id]]:
      self.of_no_clause[source] = (
        f"{len(found)} prompts name clauses that no policy has, such as "
        f"{found[0].id!r} ({found[0].text!r:.60}) {', '.join(unknown[found[0].id])}"
      )
      progress.say(
        f"{source}: {self.of_no_clause[source]}; they count as not labelled with those"
      )
    return [
      dataclasses.replace(p, clauses=tuple(c for c in p.clauses if c in there))
      if unknown[p.id]
      else p
      for p in prompts
    ]

  def choose(
    self, split: str, kind: str, n: int | None, expected=EXPECTED, among=None
  ) -> list[Prompt]:
    """n prompts of one split and kind, spread over categories and response types, or
    all; of those whose ids are `among` some, where that is given. Where there are fewer
    than n, that is said."""
    rows = [
      p
      for p in self.all
      if p.split == split
      and p.kind == kind
      and p.expected in expected
      and (among is None or p.id in among)
    ]
    if n is not None and n > len(rows):
      types = "" if expected == EXPECTED else f" to {', '.join(expected)}"
      progress.say(
        f"wanted {n} {split} prompts of kind {kind}{types}, found {len(rows)}"
      )
    return prompt_sets.balanced(rows, n, 0 if split == "eval" else self._seed)

  def choose_on_policy(
    self, kind: str, n: int | None, expected=EXPECTED, among=None
  ) -> list[Prompt]:
    """As `choose`, what RL and distillation sample from: prompts that are theirs alone,
    or where there are none of this kind, those for training."""
    own = any((p.split, p.kind) == ("rl", kind) for p in self.all)
    return self.choose("rl" if own else "train", kind, n, expected, among)

  def load_eval_sets(
    self, extra: Mapping[str, Mapping], suite: Sequence[str], most: int
  ) -> dict[str, list[Prompt]]:
    """The sets that evaluation asks for beside our own, at most so many prompts of
    each, by the name that their metrics begin with. Each is the same for every seed."""
    sets = {}
    for name, source in extra.items():
      rows = self.load(source["source"], source["columns"])
      sets[name] = prompt_sets.balanced(rows, most, 0)
    chosen = {}  # of each public set, whatever its disguises
    for name in suite:
      public, *names = name.split("+")
      if public not in chosen:
        rows = self.load(f"public:{public}", {})
        chosen[public] = prompt_sets.balanced(rows, most, 0)
      if set_label(name) in sets:
        raise ValueError(f"config.eval: two sets are called {set_label(name)}")
      found = [
        attacks.disguised(p, names) for p in chosen[public] if attacks.reaches(p, names)
      ]
      if left := len(chosen[public]) - len(found):
        said = (
          f"{name}: {left} of {len(chosen[public])} prompts are in letters that "
          f"{', '.join(names)} leaves as they are"
        )
        if not found:
          raise ValueError(f"config.eval.suite: {said}; take it out")
        progress.say(f"{said}; they are left out")
      sets[set_label(name)] = found
    return sets


def report_lone_surrogates(source: str, texts: Iterable[str]) -> None:
  """Reports how many texts contain a lone surrogate, half a character."""
  if count := sum(chat_template.characters(own) != own for own in texts):
    progress.say(
      f"{source}: {count} texts hold half a character (a lone surrogate), which is "
      "read as U+FFFD"
    )


def too_long(
  shapes: SamplerConfig, rows: Mapping[str, tuple[int, ...]], room: int
) -> set[str]:
  """Of prompts, by id the tokens that are read, the ids of those that the sampler has
  no room for beyond what all share, at most `room`; they are said. ValueError where
  they are more than half, which no outliers are."""
  if not rows:
    return set()
  shared = min(sampling.common_prefix([*rows.values()]), room)
  limit = shared + shapes.prompt_room + 1
  lengths = {id: len(row) for id, row in rows.items() if len(row) > limit}
  if not lengths:
    return set()
  id = max(lengths, key=lambda id: lengths[id])
  message = (
    f"{len(lengths)} of {len(rows)} prompts are longer than the {limit} tokens there "
    f"is room for, such as {id!r} with {lengths[id]}"
  )
  if 2 * len(lengths) > len(rows):
    raise ValueError(f"{message}; raise sampler.prompt_room")
  progress.say(f"{message}; they are left out (sampler.prompt_room)")
  return {*lengths}


def set_label(name: str) -> str:
  """A set of a suite, in the names of metrics and files."""
  return name.replace("+", "_")
