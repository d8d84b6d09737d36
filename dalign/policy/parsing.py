"""The text of one file of a specification, parsed: policies, principles and styles, in
the format of specs/README.md. What is not in it is a ValueError that names the line.
"""

from collections.abc import Iterator
import dataclasses
import re

from dalign.types import BENIGN
from dalign.types import Clause
from dalign.types import Policy
from dalign.types import Worked

MORE = "<!--more-->"
_FIELDS = {  # front matter: key -> pattern of its value, and that pattern in words
  "id": (rf"(?!{BENIGN}$)[a-z][a-z0-9_]*", f"lower case and not {BENIGN!r}"),
  "code": (r"[A-Z]{2}", "two capitals"),
  "title": (r".+", "some text"),
  "version": (r".+", "some text"),
  "summary": (r".+", "some text"),
}
CLAUSES = {  # section -> letter of its ids, verdict of its clauses
  "Allowed": ("A", "comply"),
  "Disallowed": ("D", "refuse"),
  "Safe completion": ("S", "safe_complete"),
}
_SECTIONS = ("Purpose", "Definitions", *CLAUSES, "Edge cases", "Worked examples")
GENERAL_STYLES = ("comply", "refuse", "safe_complete")
DEFAULT_STYLE = "safe_complete:dual_use"
_TURNS = ("User", "Thought", "Answer")

MARK = re.compile(r"\s*<!--\s*more\s*-->\s*")  # where a text's short form ends


def parse_policy(text: str, file: str) -> Policy:
  """The policy in `text`, marks of short forms included; `file` is named in errors, and
  its stem must be the id."""
  lines = _lines(text, file)
  front, body = _parse_front(lines)
  sections = _sections(body, _end(lines))
  clauses = [
    clause
    for name, (letter, verdict) in CLAUSES.items()
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
  """Each principle as "name: text"."""
  lines = _lines(text, file)
  blocks = _blocks(lines, "## ", '"## Principles"')
  if [heading.text for heading, _ in blocks] != ["## Principles"]:
    wrong = blocks[-1][0] if blocks else _end(lines)
    raise wrong.error('one heading, "## Principles"')
  return tuple(f"{name}: {text}" for name, text in _parse_named(blocks[0][1]))


def parse_styles(text: str, file: str) -> tuple[tuple[str, str], ...]:
  """(name, guide) of each style."""
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
  for name in (*GENERAL_STYLES, DEFAULT_STYLE):
    if name not in styles:
      raise _end(lines).error(f'"## {name}" and its guide')
  return tuple(styles.items())


# A line knows where it stands, so that it can say what is wrong with it.


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
    front, *rest = MARK.split(line.text)
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
    key, _, value = (part.strip() for part in line.text.partition(":"))
    if key not in _FIELDS:
      raise line.error(f'"<key>: ..." with a key of {", ".join(_FIELDS)}, or "---"')
    pattern, wanted = _FIELDS[key]
    if not re.fullmatch(pattern, value):
      raise line.error(f'"{key}: ..." with {wanted}')
    stem = line.file.rsplit("/", 1)[-1].removesuffix(".md")
    if key == "id" and value != stem:
      raise line.error(f'"id: {stem}", the name of the file')
    if key in fields:
      raise line.error(f"each key once, and {key!r} came before")
    fields[key] = value
  raise _end(lines).error('"---" to close the front matter')


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
