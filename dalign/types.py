"""The words of the project: dimension letters and the values that stages hand on.

Knows nothing else of dalign and does no I/O.

Dimension letters, used as suffixes of array names (Shazeer, "Shape Suffixes", 2024):

  B rows            T query positions   S key positions   P shared-prefix positions
  V vocabulary      D model width       F feed-forward    L layers
  N query heads     K key/value heads   G = N / K         H head width
  R rollouts a prompt                   C chunk           M micro-batches
"""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

Leaf = Any  # a struct field: array, ShapeDtypeStruct or Sharding (tree.map makes all)
PyTree = Any
Key = jax.Array  # a typed key of `jax.random.key`

EXPECTED = ("refuse", "safe_complete", "comply")  # the ideal response types
BENIGN = "benign"  # the category of prompts that touch no policy
KINDS = ("safety", "helpful", "capability")  # the parts of a prompt set


@struct.dataclass
class Mean:
  """A mean kept as (total, count), so that parts add up before they are divided.

  Micro-batches, hosts and steps add their Means with `+`; `value()` divides last.
  """

  total: Leaf
  count: Leaf

  @classmethod
  def of(cls, x, mask=None) -> "Mean":
    """Sum of `x` where `mask`, and how many those are; what is masked may be NaN."""
    x = jnp.asarray(x, jnp.float32)
    mask = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)
    return cls(jnp.sum(jnp.where(mask, x, 0.0)), jnp.sum(mask, dtype=jnp.float32))

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def value(self):
    """total / count; 0 where nothing was counted."""
    return self.total / jnp.maximum(self.count, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """One message of a conversation."""

  role: str  # "system" | "user" | "assistant"
  content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A conversation that ends with a user turn, and what is known about it.

  `expected` is noisy side information (the ideal response type), or "" in the sight of
  those who are not told it (`blind`). `clauses` are the ids of the clauses that decide
  it, () where nobody has labelled them. `scenario` names the family of near-twins that
  must not straddle the splits: "train", "eval", which is held out, and "rl", of RL and
  distillation alone. `answer` is what a capability prompt is compared with,
  of others a good answer to grade by, or "". `disguise` names what its last turn was
  put through (`attacks.py`), and then its id is that of the `original`, a "+" and the
  names.
  """

  id: str
  turns: tuple[Turn, ...]
  category: str
  expected: str
  kind: str = "safety"
  split: str = "train"
  scenario: str = ""
  source: str = ""
  answer: str = ""
  clauses: tuple[str, ...] = ()
  disguise: tuple[str, ...] = ()

  def __post_init__(self):
    if not self.turns or self.turns[-1].role != "user":
      raise ValueError(f"prompt {self.id!r}: the last turn must be the user's")
    if self.expected not in (*EXPECTED, ""):
      raise ValueError(
        f"prompt {self.id!r}: expected is one of {EXPECTED}, got {self.expected!r}"
      )
    if self.kind not in KINDS:
      raise ValueError(f"prompt {self.id!r}: kind is one of {KINDS}, got {self.kind!r}")

  @property
  def text(self) -> str:
    """The last user turn."""
    return self.turns[-1].content

  @property
  def original(self) -> str:
    """The id of the prompt that this one disguises, else its own."""
    return self.id.removesuffix("".join(f"+{name}" for name in self.disguise))

  def blind(self, opinion: str = "") -> "Prompt":
    """The prompt as one sees it who is not told how to reply to it, but at the most
    somebody's `opinion` of that: without its label and its clauses."""
    return dataclasses.replace(self, expected=opinion, clauses=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """One completion of one prompt.

  `tokens` are the sampler's own ids after the prompt, forced opening and the stop token
  included; the first `forced` of them were put there by the template and not sampled.
  `thought` and `answer` are the two sides of the think block, forced opening words
  included; `malformed` is "" or the reason why there is not exactly one closed block,
  and then `answer` holds what follows the last closing tag, or everything.
  `finish` is "stop", "length" (cut by the token budget) or "refused" (by a server that
  sent no completion).
  """

  prompt_id: str
  index: int
  tokens: tuple[int, ...]
  forced: int
  thought: str
  answer: str
  malformed: str
  finish: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """What a judge says of one question: a score in [0, 1], or unscored with a reason.

  `parts` are the scores of the atomic propositions that made up the score. `shown` is
  the text that a model was given of the question, "" where no model was asked. Of the
  least of several votes, `unread` is how many of them were unscored.
  """

  score: float | None
  reason: str = ""
  shown: str = ""
  unread: int = 0
  parts: dict[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.score is None and not self.reason:
      raise ValueError("an unscored verdict needs a reason")
    if self.score is not None and not 0.0 <= self.score <= 1.0:
      raise ValueError(f"a score lies in [0, 1], got {self.score}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clause:
  """One id'd rule of a category policy, such as "WE-D1".

  `breaks` and `keeps` are (prompt, answer) pairs to try judges with, which no model is
  ever shown.
  """

  id: str
  verdict: str  # "comply" (allowed), "refuse" (disallowed) or "safe_complete"
  text: str
  examples: tuple[str, ...] = ()
  breaks: tuple[tuple[str, str], ...] = ()
  keeps: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worked:
  """A worked example of a policy: a prompt with its clause, thought and answer."""

  clause: str
  verdict: str
  prompt: str
  thought: str
  answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """One category of the specification."""

  id: str
  code: str  # the prefix of its clause ids, e.g. "WE"
  title: str
  version: str
  summary: str
  purpose: str
  definitions: tuple[tuple[str, str], ...]
  clauses: tuple[Clause, ...]
  edges: tuple[tuple[str, str, str], ...]  # prompt, clause id, reason
  worked: tuple[Worked, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """A whole specification: principles, style guides, and one policy a category.

  `short` is the same in the short forms that its authors have marked.
  """

  principles: tuple[str, ...]
  styles: tuple[tuple[str, str], ...]  # name ("comply", "refuse", ...) -> guide
  policies: tuple[Policy, ...]
  short: "Spec | None" = None

  @property
  def brief(self) -> "Spec":
    """The short forms, and whole what has none."""
    return self.short or self

  def policy(self, category: str) -> Policy:
    """The policy of a category; KeyError names those there are."""
    for policy in self.policies:
      if policy.id == category:
        return policy
    known = ", ".join(p.id for p in self.policies)
    raise KeyError(f"no policy for category {category!r}; there are: {known}")
