"""Specifications: text of specs/*.md in, Spec out, and spec(category) as prompt text.

Everything here is a pure function of text. Knows the format of specs/README.md; does
not know files, tokens, chat templates, judges or models.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import re

from dalign.text import words
from dalign.types import Clause
from dalign.types import Policy
from dalign.types import Spec
from dalign.types import Worked

BENIGN = "benign"  # the category of prompts that touch no policy
DETAILS = ("full", "brief", "clauses")
MORE = "<!--more-->"

_FIELDS = {  # front matter: key -> pattern of its value, and that pattern in words
  "id": (rf"(?!{BENIGN}$)[a-z][a-z0-9_]*", f"lower case and not {BENIGN!r}"),
  "code": (r"[A-Z]{2}", "two capitals"),
  "title": (r".+", "some text"),
  "version": (r".+", "some text"),
  "summary": (r".+", "some text"),
}
_CLAUSES = {  # section -> letter of its ids, verdict of its clauses
  "Allowed": ("A", "comply"),
  "Disallowed": ("D", "refuse"),
  "Safe completion": ("S", "safe_complete"),
}
_SECTIONS = ("Purpose", "Definitions", *_CLAUSES, "Edge cases", "Worked examples")
_GENERAL_STYLES = ("comply", "refuse", "safe_complete")
_DEFAULT_STYLE = "safe_complete:dual_use"
_TURNS = ("User", "Thought", "Answer")

_ID_LIKE = re.compile(r"(?<![^\W_])[A-Z]{2}-[A-Za-z][0-9]+(?![^\W_])")
_MARK = re.compile(r"\s*<!--\s*more\s*-->\s*")  # where a text's short form ends
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
  policies = [parse_policy(files[paths[name]], paths[name]) for name in sorted(paths)]
  if not policies:
    raise ValueError(f"wanted one <category>.md or more, got only {sorted(files)}")
  _check_codes(policies)
  marked = Spec(
    principles=parse_principles(files[principles], principles),
    styles=parse_styles(files[style], style),
    policies=tuple(policies),
  )
  short = _texts(marked, lambda text: _MARK.split(text)[0])
  whole = _texts(marked, lambda text: _MARK.sub(" ", text))
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


def parse_policy(text: str, file: str) -> Policy:
  """The policy in `text`, marks of short forms included; `file` is named in errors, and
  its stem must be the id.

  Raises ValueError "<file>:<line>: wanted ..., got ..." at the first line that is not
  in the format of specs/README.md.
  """
  lines = _lines(text, file)
  front, body = _parse_front(lines)
  sections = _sections(body, _end(lines))
  clauses = [
    clause
    for name, (letter, verdict) in _CLAUSES.items()
    for clause in _parse_clauses(sections[name], f"{front['code']}-{letter}", verdict)
  ]
  verdicts = {clause.id: clause.verdict for clause in clauses}
  return Policy(
    **front,
    purpose=_join(sections["Purpose"]),
    definitions=tuple(_parse_named(sections["Definitions"])),
    clauses=tuple(clauses),
    edges=tuple(_parse_edges(sections["Edge cases"], verdicts)),
    worked=tuple(_parse_worked(sections["Worked examples"], verdicts)),
  )


def parse_principles(text: str, file: str) -> tuple[str, ...]:
  """Each principle as "name: text"; ValueError names the line that is not one."""
  lines = _lines(text, file)
  blocks = _blocks(lines, "## ", '"## Principles"')
  if [heading.text for heading, _ in blocks] != ["## Principles"]:
    wrong = blocks[-1][0] if blocks else _end(lines)
    raise wrong.error('one heading, "## Principles"')
  return tuple(f"{name}: {text}" for name, text in _parse_named(blocks[0][1]))


def parse_styles(text: str, file: str) -> tuple[tuple[str, str], ...]:
  """(name, guide) of each style; ValueError names a wrong, repeated or missing one."""
  lines = _lines(text, file)
  form = '"## comply", "## refuse", "## safe_complete" or "## safe_complete:<name>"'
  styles = {}
  for heading, body in _blocks(lines, "## ", form):
    name = heading.text.removeprefix("## ")
    if not re.fullmatch(r"comply|refuse|safe_complete(:[a-z][a-z0-9_]*)?", name):
      raise heading.error(form)
    if name in styles:
      raise heading.error(f"each style once, and {name!r} came before")
    styles[name] = _join(body)
  for name in (*_GENERAL_STYLES, _DEFAULT_STYLE):
    if name not in styles:
      raise _end(lines).error(f'"## {name}" and its guide')
  return tuple(styles.items())


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
    blocks = [_style_block(spec, ("refuse",), "# Style")]
    if policy:
      blocks = [f"# {policy.title}", *_clause_blocks(policy, full), *blocks]
  else:
    blocks = _shared_blocks(spec)
    if policy:
      blocks += _policy_blocks(spec, policy, full)
  return "\n\n".join(filter(None, blocks))


def catalogue(spec: Spec, *, detail: str) -> str:
  """What one is shown of all policies who says which of them a prompt is about: id,
  summary and clauses of each; with the detail "full", definitions, examples and edge
  cases besides, and else short forms. ValueError for an unknown detail."""
  if detail not in DETAILS:
    raise ValueError(f"detail is one of {DETAILS}, got {detail!r}")
  full = detail == "full"
  blocks = []
  for policy in (spec if full else spec.brief).policies:
    blocks += [f"# {policy.id}: {policy.title}", policy.summary]
    if full:
      terms = (f"{term}: {text}" for term, text in policy.definitions)
      blocks.append(_block("## Definitions", terms))
    blocks += _clause_blocks(policy, full)
    if full:
      blocks.append(_edge_block(policy))
  return "\n\n".join(filter(None, blocks))


def clause_ids(spec: Spec) -> dict[str, str]:
  """Clause id -> category, for every clause of the specification."""
  return {clause.id: policy.id for policy in spec.policies for clause in policy.clauses}


def cited(text: str, spec: Spec) -> tuple[str, ...]:
  """Ids of clauses that `text` names and `spec` has, each once, in order."""
  return _id_like(text, clause_ids(spec).__contains__)


def invented(text: str, spec: Spec) -> tuple[str, ...]:
  """What looks like a clause id in `text` and is none, each once, in order."""
  known = clause_ids(spec)
  return _id_like(text, lambda name: name not in known)


def leak_index(spec: Spec, n: int) -> frozenset[tuple[str, ...]]:
  """All runs of `n` words of what the specification itself says, for `leaks`.

  Principles, guides, summaries, purposes, definitions, clauses, reasons and thoughts
  count. Quoted prompts and answers do not: an innocent conversation may hold them.
  """
  if n < 1:
    raise ValueError(f"a run has at least one word, got n = {n}")
  return frozenset(run for text in _own_words(spec) for run in runs(text, n))


def leaks(text: str, index: frozenset[tuple[str, ...]], n: int = 8) -> bool:
  """Whether `text` shares a run of `n` words with the specification behind `index`.

  Case and punctuation do not count. `n` must be the one that `index` was made with.
  """
  run = next(iter(index), ())
  if run and (not any(words.runs(run, n)) or any(words.runs(run, n + 1))):
    raise ValueError(f"the index has runs of {len(run)} words, got n={n}")
  return not index.isdisjoint(runs(text, n))


def runs(text: str, n: int) -> Iterator[tuple[str, ...]]:
  """All runs of `n` words of `text`, without case and punctuation (`words.runs`)."""
  found = _WORD.findall(text.casefold().replace("'", "").replace("’", ""))
  return words.runs(found, n)


# Parsing. A line knows where it stands, so that it can say what is wrong with it.


@dataclasses.dataclass(frozen=True)
class _Line:
  file: str
  number: int
  text: str

  def error(self, wanted: str) -> ValueError:
    return ValueError(f"{self.file}:{self.number}: wanted {wanted}, got {self.text!r}")

  def match(self, pattern: str, wanted: str) -> re.Match:
    found = re.fullmatch(pattern, self.text)
    if not found:
      raise self.error(wanted)
    return found


def _lines(text: str, file: str) -> list[_Line]:
  texts = text.removeprefix("\ufeff").rstrip().split("\n")
  lines = [_Line(file, i, line.rstrip()) for i, line in enumerate(texts, 1)]
  for line in lines:
    front, *rest = _MARK.split(line.text)
    if rest and (len(rest) > 1 or not rest[0] or front.endswith(":") or not front):
      raise line.error(f'words on both sides of one "{MORE}"')
  return lines


def _end(lines: list[_Line]) -> _Line:
  return _Line(lines[-1].file, lines[-1].number, "the end of the file")


def _join(lines: list[_Line]) -> str:
  return " ".join(line.text.strip() for line in lines)


def _parse_front(lines: list[_Line]) -> tuple[dict[str, str], list[_Line]]:
  """The fields between the two "---", and the lines after them."""
  if lines[0].text != "---":
    raise lines[0].error('"---" to open the front matter')
  fields: dict[str, str] = {}
  for i, line in enumerate(lines[1:], 1):
    if line.text == "---":
      missing = [key for key in _FIELDS if key not in fields]
      if missing:
        raise line.error(f'"{missing[0]}: ..." in the front matter')
      return fields, lines[i + 1 :]
    key, value = _parse_field(line)
    if key in fields:
      raise line.error(f"each key once, and {key!r} came before")
    fields[key] = value
  raise _end(lines).error('"---" to close the front matter')


def _parse_field(line: _Line) -> tuple[str, str]:
  key, _, value = (part.strip() for part in line.text.partition(":"))
  if key not in _FIELDS:
    raise line.error(f'"<key>: ..." with a key of {", ".join(_FIELDS)}, or "---"')
  pattern, wanted = _FIELDS[key]
  if not re.fullmatch(pattern, value):
    raise line.error(f'"{key}: ..." with {wanted}')
  stem = line.file.rsplit("/", 1)[-1].removesuffix(".md")
  if key == "id" and value != stem:
    raise line.error(f'"id: {stem}", the name of the file')
  return key, value


def _blocks(
  lines: list[_Line], mark: str, first: str
) -> list[tuple[_Line, list[_Line]]]:
  """(heading, the non-blank lines under it) for each line that begins with `mark`."""
  blocks: list[tuple[_Line, list[_Line]]] = []
  for line in lines:
    if line.text.startswith(mark):
      blocks.append((line, []))
    elif line.text and not blocks:
      raise line.error(first)
    elif line.text:
      blocks[-1][1].append(line)
  for heading, body in blocks:
    if not body:
      raise heading.error("text under this heading")
  return blocks


def _sections(body: list[_Line], end: _Line) -> dict[str, list[_Line]]:
  """Section name -> its lines; every section must be there once, in order."""
  blocks = _blocks(body, "## ", f'"## {_SECTIONS[0]}"')
  for i, name in enumerate(_SECTIONS):
    heading = blocks[i][0] if i < len(blocks) else end
    if heading.text != f"## {name}":
      raise heading.error(f'section "## {name}"')
  if len(blocks) > len(_SECTIONS):
    raise blocks[len(_SECTIONS)][0].error(f'nothing after "## {_SECTIONS[-1]}"')
  return {name: lines for name, (_, lines) in zip(_SECTIONS, blocks, strict=True)}


def _parse_named(lines: list[_Line]) -> list[tuple[str, str]]:
  named = {}
  for line in lines:
    name, text = line.match(r"- \*\*(.+?)\*\*: (\S.*)", '"- **name**: text"').groups()
    if name in named:
      raise line.error(f"each name once, and {name!r} came before")
    named[name] = text
  return list(named.items())


def _parse_clauses(lines: list[_Line], prefix: str, verdict: str) -> list[Clause]:
  """The clauses of one section, whose ids are `prefix` and a number."""
  clauses: dict[str, Clause] = {}
  for line in lines:
    if line.text.startswith("  ") and clauses:
      name, clause = clauses.popitem()
      clauses[name] = _with_item(clause, line)
      continue
    form = rf"- ({prefix}[1-9][0-9]*): (\S.*)"
    name, text = line.match(form, f'"- {prefix}<number>: text"').groups()
    if name in clauses:
      raise line.error(f"each clause id once, and {name} came before")
    clauses[name] = Clause(id=name, verdict=verdict, text=text)
  return list(clauses.values())


def _with_item(clause: Clause, line: _Line) -> Clause:
  """A clause with what stands in a line under it: an example, or an answer to the last
  one, which breaks or keeps the clause."""
  kind, text = line.match(
    r'  - (Example|Breaks|Keeps): "(.+)"',
    '"  - Example: \\"prompt\\"" under its clause, and "  - Breaks: \\"answer\\"" or '
    '"  - Keeps: \\"answer\\"" under the example that it answers',
  ).groups()
  if kind == "Example":
    return dataclasses.replace(clause, examples=(*clause.examples, text))
  if not clause.examples:
    raise line.error(f"an Example of {clause.id} above, which this is an answer to")
  pair = clause.examples[-1], text
  if pair in (*clause.breaks, *clause.keeps):
    raise line.error("each answer to an example once, and this one came before")
  if kind == "Keeps":
    return dataclasses.replace(clause, keeps=(*clause.keeps, pair))
  return dataclasses.replace(clause, breaks=(*clause.breaks, pair))


def _parse_edges(lines: list[_Line], verdicts: dict[str, str]) -> Iterator[tuple]:
  for line in lines:
    form = r'- "(.+)" -> (\S+): (\S.*)'
    edge = line.match(form, '"- \\"prompt\\" -> <clause id>: reason"').groups()
    _check_clause(line, edge[1], verdicts)
    yield edge


def _parse_worked(lines: list[_Line], verdicts: dict[str, str]) -> Iterator[Worked]:
  for heading, body in _blocks(lines, "### ", '"### <clause id>"'):
    clause = heading.text.removeprefix("### ")
    _check_clause(heading, clause, verdicts)
    if len(body) != len(_TURNS):
      raise heading.error(f"{len(_TURNS)} lines under this heading, not {len(body)}")
    prompt, thought, answer = (
      line.match(rf"{turn}: (\S.*)", f'"{turn}: ..." on one line')[1]
      for turn, line in zip(_TURNS, body, strict=True)
    )
    yield Worked(
      clause=clause,
      verdict=verdicts[clause],
      prompt=prompt,
      thought=thought,
      answer=answer,
    )


def _check_clause(line: _Line, name: str, verdicts: dict[str, str]) -> None:
  if name not in verdicts:
    raise line.error(f"a clause of this file ({', '.join(verdicts)})")


def _check_codes(policies: list[Policy]) -> None:
  first: dict[str, str] = {}
  for policy in policies:
    other = first.setdefault(policy.code, policy.id)
    if other != policy.id:
      raise ValueError(
        f"wanted a code of its own in each policy, got {policy.code} in {other} and"
        f" {policy.id}; change it in one, in its clause ids too"
      )


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
    _style_block(spec, _GENERAL_STYLES, "# Style"),
    _block(
      "# Policies in short",
      (f"{p.title} ({p.code}): {p.summary}" for p in spec.policies),
    ),
  ]


def _policy_blocks(spec: Spec, policy: Policy, full: bool) -> list[str]:
  title = f"# Policy: {policy.title} ({policy.code})"
  own = f"safe_complete:{policy.id}"
  style = own if own in dict(spec.styles) else _DEFAULT_STYLE
  blocks = [title]
  if full:
    terms = (f"{term}: {text}" for term, text in policy.definitions)
    blocks += [f"## Purpose\n{policy.purpose}", _block("## Definitions", terms)]
  blocks += _clause_blocks(policy, full)
  blocks.append(_style_block(spec, (style,), "## Style of safe completions here"))
  if full:
    blocks.append(_edge_block(policy))
  return blocks


def _edge_block(policy: Policy) -> str:
  edges = (f'"{prompt}" -> {name}: {why}' for prompt, name, why in policy.edges)
  return _block("## Edge cases", edges)


def _clause_blocks(policy: Policy, full: bool) -> list[str]:
  return [
    _block(
      f"## {name} ({verdict})",
      (_clause(c, full) for c in policy.clauses if c.verdict == verdict),
    )
    for name, (_, verdict) in _CLAUSES.items()
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
