"""What the site has besides docs/*.md: the documents of the top, the notebooks, the
files of configs/, a page a module, and the reference of the config.

MkDocs calls the functions that begin with `on_`, mkdocstrings the extension. Nothing of
dalign is run but its config, and nothing is copied: pages are made as
they are built.
"""

import ast
import dataclasses
import inspect
import json
import pathlib
import posixpath
import re
import sys
import types
import typing

import griffe
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dalign.config import convert  # noqa: E402  this checkout's, installed or not
from dalign.config import explain  # noqa: E402
from dalign.config.fields import Bounds  # noqa: E402
from dalign.config.fields import split_annotated  # noqa: E402
from dalign.config.schema import Config  # noqa: E402

DOCUMENTS = (
  *("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
  *("specs/README.md", "benchmarks/README.md", "benchmarks/RESULTS.md"),
)
ITEM = re.compile(r"(\w+(?:, \w+)*): (?=\S)")


def on_config(config):
  """Adds what is found in folders to the navigation."""
  for section, pages in (
    ("Notebooks", [f"{path}.md" for path in _found("colab/*.ipynb")]),
    ("Configs", ["config.md", *(f"{path}.md" for path in _found("configs/*.py"))]),
    ("Modules", [f"{path}.md" for path in _found("dalign/**/*.py")]),
  ):
    config.nav.append({section: pages})
  return config


def on_files(files, config):
  """Adds the pages that are no files of docs/."""
  for name in DOCUMENTS:
    files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
  made = {"config.md": reference()}
  made |= {f"{path}.md": notebook(ROOT / path) for path in _found("colab/*.ipynb")}
  made |= {f"{path}.md": _source(path) for path in _found("configs/*.py")}
  for path in _found("dalign/**/*.py"):
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    made[f"{path}.md"] = f"# {name}\n\n::: {name}\n"
  for name, content in made.items():
    files.append(File.generated(config, name, content=content))
  return files


def on_page_markdown(markdown, page, config, files):
  """Links between files of the repository, as links between pages.

  What is a file and no page becomes its name; what is nothing is left for MkDocs to
  refuse.
  """
  here = page.file.src_uri
  if page.file.generated_by is None:
    place = posixpath.join("docs", here)
  else:
    place = here

  def link(found):
    code, words, target, anchor = found.groups()
    if code or not target or ":" in target:
      return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
    name = path.removeprefix("docs/")
    for uri in (name, f"{name}.md", f"{name}/__init__.py.md"):
      if files.get_file_from_path(uri):
        to = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"[{words}]({to}{anchor or ''})"
    return words if (ROOT / path).exists() else found[0]

  code = r"(^```.*?^```|`[^`\n]+`(?!\]))"
  rule = rf"{code}|\[([^\]\n]+)\]\(([^)\s#]*)(#[^)\s]*)?\)"
  linked = re.sub(rule, link, markdown, flags=re.MULTILINE | re.DOTALL)
  return linked.replace("<!-- definitions -->", definitions())


def notebook(path: pathlib.Path) -> str:
  """A notebook's cells as Markdown; it is not run."""
  parts = []
  for cell in json.loads(path.read_text())["cells"]:
    text = "".join(cell["source"]).strip("\n")
    code = cell["cell_type"] == "code"
    parts.append(f"```python\n{text}\n```" if code else text)
  if not parts[0].startswith("# "):
    parts.insert(0, f"# {path.stem}")
  return "\n\n".join(parts) + "\n"


def definitions() -> str:
  """What evaluation measures, in its own words, as a table."""
  tree = ast.parse((ROOT / "dalign" / "evaluation" / "evals.py").read_text())
  [said] = [
    ast.literal_eval(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign) and node.targets[0].id == "DEFINITIONS"
  ]
  rows = [f"| `{name}` | {_escaped(text)} |" for name, text in said.items()]
  return "\n".join(["| number | meaning |", "|---|---|", *rows])


def reference() -> str:
  """Every field of a config: its type, its meaning, the quickstart's value."""
  values = _quickstart()
  parts = [
    "# Config reference",
    "Fields of [Config](dalign/config/schema.py), set as `--config.NAME=VALUE` or "
    "in a file of `configs/`. The last column is the value of the "
    "[quickstart](configs/quickstart.py), where the reasons stand.",
    *_tables(Config, "", values),
  ]
  return "\n\n".join(parts) + "\n"


def _tables(cls, prefix: str, values):
  intro, meanings = _escaped(explain.prose(cls)), explain.fields(cls)
  parts = [f"## {prefix.rstrip('.')}" if prefix else "## The run", intro]
  rows, inside = ["| field | type | meaning | quickstart |", "|---|---|---|---|"], []
  for field in dataclasses.fields(cls):
    kind = next(iter(typing.get_args(field.type)), field.type)
    name = f"{prefix}{field.name}"
    if dataclasses.is_dataclass(kind):
      inside.append((kind, f"{name}."))
      said = _escaped(meanings[field.name])
      anchor = name.replace(".", "")
      rows.append(f"| `{name}` | | {said} [its fields](#{anchor}) | |")
      continue
    value = values.get(name)
    shown = "" if value is None else f"`{value!r}`".replace("|", "\\|")
    cells = (
      f"`{name}`",
      _kind(field.type),
      _escaped(meanings[field.name]),
      shown,
    )
    rows.append(f"| {' | '.join(cells)} |")
  parts.append("\n".join(rows))
  for kind, name in inside:
    parts += _tables(kind, name, values)
  return parts


def _kind(kind) -> str:
  """A field's type in words."""
  kind, more = split_annotated(kind)
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if isinstance(kind, types.UnionType):
    return f"{_kind(inner[0])} or None"
  if origin is typing.Literal:
    return "one of " + ", ".join(f"`{one}`" if one else "nothing" for one in inner)
  if origin is tuple:
    return f"tuple of {_kind(inner[0])}"
  name = getattr(kind, "__name__", str(kind))
  return f"{name}, {more.words}" if isinstance(more, Bounds) else name


def _joined(text: str) -> list[str]:
  """A docstring's lines, those that are indented at the end of the one before, and
  those that hold several items parted."""
  lines = []
  for line in text.splitlines():
    if line.startswith("  ") and lines and lines[-1].strip():
      lines[-1] += f" {line.strip()}"
    else:
      lines += re.split(r"(?<=\S)  (?=\w+(?:, \w+)*: \S)", line)
  return lines


def as_markdown(text: str, names: set[str]) -> str:
  """A docstring of this house as Markdown, what it says of `names` as a list."""
  lines, listed = [], False
  for line in _joined(text):
    item = ITEM.match(line)
    if item and set(item[1].split(", ")) <= names:
      lines += [] if listed else [""]
      lines.append(f"- **{item[1]}**: {_escaped(line[item.end() :])}")
    else:
      lines += [""] if listed else []
      lines.append(f"  {line}" if line.startswith("  ") else _escaped(line))
    listed = lines[-1].startswith("- **")
  return "\n".join(lines)


def _escaped(text: str) -> str:
  """Text without the marks of HTML, Markdown and its tables, but for code."""
  parts = re.split(r"(`[^`]*`)", text)
  parts[::2] = [re.sub(r"([*\[\]_|])", r"\\\1", p) for p in parts[::2]]
  parts[::2] = [p.replace("<", "&lt;") for p in parts[::2]]
  return "".join(parts)


class Docstrings(griffe.Extension):
  """Hands mkdocstrings the docstrings as Markdown."""

  def on_object(self, *, obj, **kwargs):
    """Rewrites one, once its members are known."""
    del kwargs
    if obj.docstring:
      names = set(obj.members) | {p.name for p in getattr(obj, "parameters", ())}
      obj.docstring.value = as_markdown(inspect.cleandoc(obj.docstring.value), names)


def _found(pattern: str) -> list[str]:
  """Files of the repository that hold something, by name."""
  paths = sorted(path for path in ROOT.glob(pattern) if path.stat().st_size)
  return [path.relative_to(ROOT).as_posix() for path in paths]


def _source(path: str) -> str:
  text = (ROOT / path).read_text()
  first = ast.get_docstring(ast.parse(text)).splitlines()[0]
  return f"# {path}\n\n{first}\n\n```python\n{text}```\n"


def _quickstart() -> dict[str, typing.Any]:
  path = ROOT / "configs" / "quickstart.py"
  names = {"__file__": str(path)}
  exec(compile(path.read_text(), str(path), "exec"), names)
  return convert.flat(convert.build(Config, names["get_config"]()))
