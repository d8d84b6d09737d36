"""Chat templates, which strangers wrote: rendered in Jinja's sandbox.

The sandbox, set up as in transformers, keeps a template from Python. What a template
writes, adds and repeats has at most MOST characters, so that plain mistakes and the
usual bombs end within seconds. One that is made to be slow, or large, can still be so,
as in transformers. Also what of a conversation goes to one, and templates that write
more or less than one that is given. Knows no tokens.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
import datetime
import functools
import json
import re
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2 import sandbox
from jinja2 import visitor

from dalign.text import thinking
from dalign.types import Turn

LONGEST = 200_000  # characters of a chat template; the longest we know has 30,000
MOST = 10_000_000  # characters, or items, that it makes: a million tokens fit
BITS = 1024  # of a product or power
_CLOSED = re.compile(r"</[^\s<>]+>")  # the end of a thought, whatever its tag


def merged(turns: Sequence[Turn]) -> list[Turn]:
  """A conversation with one system turn at most, in front, since few templates take
  more: what all of them say, in their order, a blank line between."""
  said = [turn.content for turn in turns if turn.role == "system"]
  rest = [turn for turn in turns if turn.role != "system"]
  if not said:
    return rest
  return [Turn(role="system", content="\n\n".join(filter(None, said))), *rest]


def folded(turns: Sequence[Turn]) -> list[Turn]:
  """A `merged` conversation without a system turn: what it says stands in the user's
  turn that follows, in front of that and a blank line."""
  if not turns or turns[0].role != "system":
    return list(turns)
  first, rest = turns[0].content, list(turns[1:])
  asked = [rest.pop(0).content] if rest and rest[0].role == "user" else []
  said = "\n\n".join(filter(None, [first, *asked]))
  return [Turn(role="user", content=said), *rest]


def render(
  template: str, messages: Sequence[Mapping[str, str]], *, date: str = "", **more: Any
) -> str:
  """What a chat template makes of messages with a role and a content each, and of other
  variables, on a day such as 2026-11-27, or today.

  Raises ValueError of one line for a template that does not compile, refuses the
  messages, or makes too much.
  """
  variables: dict[str, Any] = {
    "messages": messages,
    "tools": None,
    "documents": None,
  }
  if date:
    variables["strftime_now"] = datetime.date.fromisoformat(date).strftime
  try:
    return _compile(template).render(variables | more)
  except Exception as error:  # a template may raise any there is
    roles = ", ".join(message["role"] for message in messages[:8])
    raise ValueError(
      f"the chat template refused the turns ({roles}): {one_line(error)}"
    ) from error


# What is written from here on is also read by engines that know little of Jinja, such
# as llama.cpp's own and minja: no removesuffix, no split without a separator, no "+%}".
def check_written(text: str, messages: Sequence[Mapping[str, str]]) -> None:
  """ValueError where a rendered chat lacks what one of its turns says, white space
  apart; of an assistant's, what follows its thought."""
  words = "".join(text.split())
  for message in messages:
    said = "".join(message["content"].split())
    if message["role"] == "assistant" and said not in words:
      said = _CLOSED.split(said)[-1]
    if said not in words:
      begins = " ".join(message["content"].split())[:60]
      raise ValueError(
        f"the chat template leaves out what the {message['role']} turn says "
        f"({begins}...): wanted one that writes every turn; "
        "use another model, or give its folder another chat_template"
      )


def break_controls(
  text: str, names: tuple[str, ...], kept: tuple[str, ...], mark: str
) -> str:
  """`text` with `mark` after each character that one of `names` begins with, but for
  those of the tags `kept`; and in front, if it holds a name's first or last character.

  So none of the names can come to stand there, whatever the template cuts out or puts
  around it; and text that could never make one, or begins with a kept tag, begins as
  the template expects it.
  White space at the edges stays outside, because templates trim it.
  """
  if not {c for name in names for c in (name[0], name[-1])} & set(text):
    return text
  at = len(text) - len(text.lstrip())
  marked = _starts(names, kept).sub(lambda match: match[0] + mark, text[at:])
  front = "" if text[at:].startswith(kept) else mark
  return text[:at] + front + marked


@functools.lru_cache(maxsize=16)
def _starts(names: tuple[str, ...], kept: tuple[str, ...]) -> re.Pattern[str]:
  """A pattern of the first character of any of `names`, where none of `kept` begins."""
  first = "".join(re.escape(c) for c in sorted({name[0] for name in names}))
  other = "|".join(map(re.escape, kept)) or "(?!)"
  return re.compile(f"(?!{other})[{first}]")


_HERE = "{{ '' }}"  # beside it white space stays, which a block would take
_OPENS = _HERE + "{# a thought is opened #}"
_SPACES = tuple(c for c in map(chr, range(0x3001)) if c.isspace())


def without_end(template: str, end: str) -> str:
  """A template that writes the same, but for an `end` of what it writes where a reply
  is to follow."""
  ends = f"add_generation_prompt and said.endswith({_literal(end)})"
  return (
    f"{{% set said %}}{_HERE}{_front(template)}{_HERE}{{% endset %}}"
    f"{{{{ said[:-{len(end)}] if {ends} else said }}}}"
  )


def with_thought_opening(template: str, think: thinking.ThinkFormat) -> str:
  """A template that writes the same, and where a reply is to follow also the opening of
  its thought: what `think.of` makes of the last turn."""
  parts = [f"{{{{ {_literal(part)} }}}}" for part in think.open.split(thinking.PROMPT)]
  said = "{{ words | join(' ') }}".join(parts)
  if len(parts) > 1:
    said = _quoted_words(think) + said
  return (
    f"{_front(template)}{_OPENS}{{% if add_generation_prompt %}}{said}{{% endif %}}"
  )


def _quoted_words(think: thinking.ThinkFormat) -> str:
  """Jinja that sets `words` to those of the last turn that `think.of` quotes."""
  n, gone = thinking.QUOTED, ", ".join(map(_literal, (*think.tags, *_SPACES)))
  return (
    "{% set asked = messages[-1]['content'] %}"
    "{% if asked is not string %}"  # but parts, as some servers have it
    "{% set asked = asked | map(attribute='text') | join(' ') %}{% endif %}"
    "{% set own = namespace(said=asked) %}"
    f"{{% for part in [{gone}] %}}"
    "{% set own.said = own.said.replace(part, ' ') %}{% endfor %}"
    "{% set own.said = own.said.replace('<', '< ').replace('\"', \"'\") %}"
    "{% set words = own.said.split(' ') | reject('equalto', '') | list %}"
    f"{{% if words | length > {2 * n} %}}"
    f"{{% set words = words[:{n}] + ['...'] + words[-{n}:] %}}{{% endif %}}"
  )


def without_thought_opening(template: str) -> str:
  """The template that `with_thought_opening` was given, or one that it did not make as
  it is."""
  return template.partition(_OPENS)[0]


def _front(template: str) -> str:
  """A template as the front of another: at its end jinja leaves a new line out."""
  return template.removesuffix("\n")


def _literal(text: str) -> str:
  """Jinja for a text, with no escapes but those that all engines know."""
  said = text.replace("\\", "\\\\").replace('"', '\\"')
  said = said.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
  return f'"{said}"'


def one_line(error: BaseException, most: int = 500) -> str:
  """What an error says, in one line; of those that are no ValueError the class too."""
  said = " ".join(str(error).split())
  said = said if len(said) <= most else said[:most] + "..."
  plain = isinstance(error, ValueError | jinja2.TemplateError)
  return said if plain and said else f"{type(error).__name__}: {said}".rstrip(": ")


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
  """Jinja's sandbox with the few helpers that templates of chats expect."""

  intercepted_binops = frozenset(["+", "*", "**"])

  def __init__(self):
    super().__init__(
      trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    self.filters["tojson"] = _tojson
    self.filters[" text"] = str
    del self.globals["lipsum"]  # a matter of chance
    self.globals["raise_exception"] = _raise_exception
    self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

  def concat(self, parts: Iterable[str]) -> str:
    """What a template, a macro or a block writes."""
    kept, length = [], 0
    for part in parts:
      length += len(part)
      _fit(length)
      kept.append(part)
    return "".join(kept)

  def call_binop(self, context, operator, left, right):
    for one, other in ((left, right), (right, left)):
      if operator == "*" and isinstance(one, Sized) and isinstance(other, int):
        _fit(len(one) * other)
    if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
      _fit(len(left) + len(right))
    if isinstance(left, int) and isinstance(right, int):
      bits = {"*": left.bit_length() + right.bit_length()}
      bits["**"] = left.bit_length() * right
      if bits.get(operator, 0) > BITS:
        raise jinja2.TemplateRuntimeError(f"a number of more than {BITS} bits")
    return super().call_binop(context, operator, left, right)


def _fit(length: int) -> None:
  if length > MOST:
    raise jinja2.TemplateRuntimeError(f"it makes more than {MOST} characters")


class _ConcatAsAdd(visitor.NodeTransformer):
  """Has `a ~ b` be a + b of texts, which the sandbox sees."""

  def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
    self.generic_visit(node)
    whole: nodes.Expr = nodes.Const("")
    for part in node.nodes:
      text = nodes.Filter(part, " text", [], [], None, None)
      whole = nodes.Add(whole, text)
    return whole


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  if len(template) > LONGEST:
    raise ValueError(f"wanted {LONGEST} characters at most, got {len(template)}")
  # Only transformers' masks read these tags; they render as what they enclose.
  tags = r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}"
  env, text = _Sandbox(), re.sub(tags, r"{%\1 if true \2%}{% endif %}", template)
  return env.from_string(_ConcatAsAdd().visit(env.parse(text)))


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  """JSON without jinja's HTML escapes."""
  return json.dumps(
    x,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)
