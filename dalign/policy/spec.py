"""Specifications: text of specs/*.md in, Spec out, and spec(category) as prompt text.

Pure; parsing.py knows the format.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import re

from dalign.policy import parsing
from dalign.policy.parsing import CLAUSES
from dalign.policy.parsing import DEFAULT_STYLE
from dalign.policy.parsing import GENERAL_STYLES
from dalign.policy.parsing import MARK
from dalign.text import words
from dalign.types import BENIGN
from dalign.types import Clause
from dalign.types import Policy
from dalign.types import Spec

DETAILS = ("full", "brief", "clauses")
_ID_LIKE = re.compile(r"(?<![^\W_])[A-Z]{2}-[A-Za-z][0-9]+(?![^\W_])")
_WORD = re.compile(r"[^\W_]+")


def load(files: dict[str, str]) -> Spec:
  """The specification written in `files`: file name -> text.

  Wanted are principles.md, style.md and one <category>.md a policy; README.md is passed
  over. Policies are ordered by id, whatever the order of the files. Raises ValueError
  for what the parsers refuse, a missing file, a name that is not .md, and a clause code
  that two policies share.
  """
  paths = {path.rsplit("/", 1)[-1]: path for path in files}
  odd = [path for path in files if not path.endswith(".md")]
  if odd or len(paths) < len(files):
    raise ValueError(f"wanted .md files with a name each, got {sorted(odd or files)}")
  paths.pop("README.md", None)
  for name in ("principles.md", "style.md"):
    if name not in paths:
      raise ValueError(
        f"wanted {name} in the specification, got {sorted(files)}; --mode=new writes "
        "one that may stay"
      )
  principles, style = paths.pop("principles.md"), paths.pop("style.md")
  policies = [
    parsing.parse_policy(files[paths[name]], paths[name]) for name in sorted(paths)
  ]
  if not policies:
    raise ValueError(f"wanted one <category>.md or more, got only {sorted(files)}")
  first: dict[str, str] = {}
  for policy in policies:
    if (other := first.setdefault(policy.code, policy.id)) != policy.id:
      raise ValueError(
        f"wanted a code of its own in each policy, got {policy.code} in {other} and"
        f" {policy.id}; change it in one, in its clause ids too"
      )
  marked = Spec(
    principles=parsing.parse_principles(files[principles], principles),
    styles=parsing.parse_styles(files[style], style),
    policies=tuple(policies),
  )
  short = _texts(marked, lambda text: MARK.split(text)[0])
  whole = _texts(marked, lambda text: MARK.sub(" ", text))
  return dataclasses.replace(whole, short=short)


def _texts(x, change: Callable[[str], str]):
  """A specification or a part of one, with every text in it changed."""
  if isinstance(x, str):
    return change(x)
  if isinstance(x, tuple):
    return tuple(_texts(part, change) for part in x)
  if x is None:
    return None
  parts = {f.name: _texts(getattr(x, f.name), change) for f in dataclasses.fields(x)}
  return dataclasses.replace(x, **parts)


def render(spec: Spec, category: str, *, detail: str) -> str:
  """spec(category): what a model is shown of the specification for one category.

  Principles, general style guides and the summaries of all policies come first and are
  the same for every category, so that their keys and values can be shared; then the
  whole policy of `category` with the guide "safe_complete:<category>", or
  "safe_complete:dual_use" where there is no such guide. "benign" has no policy.
  `detail` is "full"; "brief", which keeps principles, guides, summaries and clauses in
  their short forms and drops the rest; or "clauses", the short forms of this category's
  clauses and of the refusal guide alone. A text's short form ends where its author
  marked it (MORE); without a mark it is the whole text. Worked examples are never part.
  Raises ValueError for an unknown detail or category. Source: arXiv 2412.16339, 2.3.
  """
  if detail not in DETAILS:
    raise ValueError(f"detail is one of {DETAILS}, got {detail!r}")
  full = detail == "full"
  spec = spec if full else spec.brief
  known = {policy.id: policy for policy in spec.policies}
  if category not in known and category != BENIGN:
    raise ValueError(f"wanted a category of {(*known, BENIGN)}, got {category!r}")
  policy = known.get(category)
  if detail == "clauses":
    own = [f"# {policy.title}", *_clause_blocks(policy, full)] if policy else []
    blocks = [*own, _style_block(spec, ("refuse",), "# Style")]
  else:
    own = _policy_blocks(spec, policy, full) if policy else []
    blocks = _shared_blocks(spec) + own
  return "\n\n".join(filter(None, blocks))


def catalogue(spec: Spec, *, detail: str) -> str:
  """What one is shown of all policies who says which of them a prompt is about: id,
  summary and clauses of each; with the detail "full", definitions, examples and edge
  cases besides, and else short forms."""
  full = detail == "full"
  blocks = []
  for policy in (spec if full else spec.brief).policies:
    blocks += [f"# {policy.id}: {policy.title}", policy.summary]
    blocks += _rule_blocks(policy, full)
  return "\n\n".join(filter(None, blocks))


def clause_ids(spec: Spec) -> dict[str, str]:
  """Clause id -> category, for every clause of the specification."""
  return {clause.id: policy.id for policy in spec.policies for clause in policy.clauses}


def verdicts(spec: Spec) -> dict[str, str]:
  """Clause id -> the response type that it calls for."""
  return {c.id: c.verdict for policy in spec.policies for c in policy.clauses}


def cited(text: str, spec: Spec) -> tuple[str, ...]:
  """Ids of clauses that `text` names and `spec` has, each once, in order."""
  return _id_like(text, clause_ids(spec).__contains__)


def invented(text: str, spec: Spec) -> tuple[str, ...]:
  """What looks like a clause id in `text` and is none, each once, in order."""
  known = clause_ids(spec)
  return _id_like(text, lambda name: name not in known)


def leak_check(spec: Spec, n: int) -> Callable[[str], bool]:
  """Whether a text shares a run of `n` words with what the specification itself says.

  That are principles, guides, summaries, purposes, definitions, clauses, reasons and
  thoughts; quoted prompts and answers are not: an innocent conversation may hold them.
  Case and punctuation do not count.
  """
  own = frozenset(run for text in _own_words(spec) for run in runs(text, n))
  return lambda text: not own.isdisjoint(runs(text, n))


def runs(text: str, n: int) -> Iterator[tuple[str, ...]]:
  """All runs of `n` words of `text`, without case and punctuation (`words.runs`)."""
  found = _WORD.findall(text.casefold().replace("'", "").replace("’", ""))
  return words.runs(found, n)


# Composing.


def _block(heading: str, items: Iterable[str]) -> str:
  lines = [f"- {item}" for item in items]
  return "\n".join([heading, *lines]) if lines else ""


def _style_block(spec: Spec, names: tuple[str, ...], heading: str) -> str:
  styles = dict(spec.styles)
  return _block(heading, (f"{n}: {styles[n]}" for n in names if n in styles))


def _shared_blocks(spec: Spec) -> list[str]:
  return [
    _block("# Principles", spec.principles),
    _style_block(spec, GENERAL_STYLES, "# Style"),
    _block(
      "# Policies in short",
      (f"{p.title} ({p.code}): {p.summary}" for p in spec.policies),
    ),
  ]


def _policy_blocks(spec: Spec, policy: Policy, full: bool) -> list[str]:
  own = f"safe_complete:{policy.id}"
  style = own if own in dict(spec.styles) else DEFAULT_STYLE
  return [
    f"# Policy: {policy.title} ({policy.code})",
    f"## Purpose\n{policy.purpose}" if full else "",
    *_rule_blocks(
      policy, full, _style_block(spec, (style,), "## Style of safe completions here")
    ),
  ]


def _rule_blocks(policy: Policy, full: bool, style: str = "") -> list[str]:
  """Clauses and the style of safe completions; between definitions and edge cases where
  all of the policy is shown."""
  blocks = [*_clause_blocks(policy, full), style]
  if not full:
    return blocks
  terms = (f"{term}: {text}" for term, text in policy.definitions)
  edges = (f'"{prompt}" -> {name}: {why}' for prompt, name, why in policy.edges)
  return [_block("## Definitions", terms), *blocks, _block("## Edge cases", edges)]


def _clause_blocks(policy: Policy, full: bool) -> list[str]:
  return [
    _block(
      f"## {name} ({verdict})",
      (_clause(c, full) for c in policy.clauses if c.verdict == verdict),
    )
    for name, (_, verdict) in CLAUSES.items()
  ]


def _clause(clause: Clause, full: bool) -> str:
  examples = ", ".join(f'"{example}"' for example in clause.examples if full)
  return f"{clause.id}: {clause.text}" + (f" Examples: {examples}" if examples else "")


# Words and ids.


def _id_like(text: str, keep: Callable[[str], bool]) -> tuple[str, ...]:
  return tuple(filter(keep, dict.fromkeys(_ID_LIKE.findall(text))))


def _own_words(spec: Spec) -> Iterator[str]:
  yield from spec.principles
  yield from (guide for _, guide in spec.styles)
  for policy in spec.policies:
    yield from (policy.summary, policy.purpose)
    yield from (f"{term}: {text}" for term, text in policy.definitions)
    yield from (clause.text for clause in policy.clauses)
    yield from (reason for _, _, reason in policy.edges)
    yield from (worked.thought for worked in policy.worked)
