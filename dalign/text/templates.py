"""Chat templates, which strangers wrote: rendered in a sandbox, in bounded work.

Jinja's own sandbox keeps a template from Python; here a rendering also takes a bounded
number of steps and so of memory, whatever the template. Knows no tokens.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
import datetime
import functools
import itertools
import json
import re
import string
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2 import runtime
from jinja2 import sandbox
from jinja2 import utils
from jinja2 import visitor

LONGEST = 200_000  # characters of a chat template; the longest we know has 30,000
STEPS = 100_000  # of a rendering, and as many more as the chat has characters, times
STEPS_A_CHARACTER = 100
BITS = 1024  # of a whole number
DEPTH = 50  # of values in each other
_METER = " meter"  # where a rendering's meter is; no template can spell a space
# Filters whose work is not linear in what they read, or is a matter of chance.
_UNBOUNDED = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")


def render(
  template: str, messages: Sequence[Mapping[str, str]], *, date: str = "", **more: Any
) -> str:
  """What a chat template makes of messages with a role and a content each, and of other
  variables, on a day such as 2026-11-27, or today.

  Raises ValueError of one line for a template that does not compile, refuses the
  messages, or takes more work than any such template needs for them.
  """
  length = sum(16 + len(message["content"]) for message in messages)
  meter = _Meter(STEPS + STEPS_A_CHARACTER * length)
  variables: dict[str, Any] = {
    "messages": messages,
    "tools": None,
    "documents": None,
    _METER: meter,
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


def without_end(template: str, end: str) -> str:
  """A template that writes the same, but for an `end` of what it writes where a reply
  is to follow."""
  body = template.removesuffix("\n")  # as jinja takes it off the end of a template
  said = f"(said.removesuffix({json.dumps(end)}) if add_generation_prompt else said)"
  return f"{{% set said +%}}{body}{{%+ endset %}}{{{{ {said} }}}}"


def one_line(error: BaseException, most: int = 500) -> str:
  """What an error says, in one line; of those that are no ValueError the class too."""
  said = " ".join(str(error).split())
  said = said if len(said) <= most else said[:most] + "..."
  plain = isinstance(error, ValueError | jinja2.TemplateError)
  return said if plain and said else f"{type(error).__name__}: {said}".rstrip(": ")


class _Meter:
  """The steps that are left to a rendering."""

  def __init__(self, steps: int):
    self.left = steps

  def take(self, work: int) -> None:
    """Takes a step, and one more for each 16 characters of work."""
    self.left -= 1 + work // 16
    if self.left < 0:
      raise jinja2.TemplateRuntimeError("it is too much work for the turns it is given")

  def size(self, x: Any, depth: int = 0) -> int:
    """The characters of `x` as text, about; to look at an item is a step."""
    if isinstance(x, str):
      return len(x)
    if isinstance(x, int) and x.bit_length() > BITS:
      raise jinja2.TemplateRuntimeError(f"a number of more than {BITS} bits")
    if isinstance(x, utils.Namespace):
      x = x._Namespace__attrs
    if not isinstance(x, Collection):
      return 1
    if depth == DEPTH:
      raise jinja2.TemplateRuntimeError(f"values in each other more than {DEPTH} deep")
    self.take(16 * len(x))
    parts = itertools.chain.from_iterable(x.items()) if isinstance(x, Mapping) else x
    return 1 + sum(self.size(part, depth + 1) for part in parts)

  def weigh(self, *values: Any) -> None:
    """Takes the steps of reading or copying values once."""
    self.take(sum(map(self.size, values)))

  def weigh_product(self, first: Any, rest: Iterable[Any]) -> None:
    """Takes the steps of any function of a text, at worst: replacing each character,
    or padding each line to a width."""
    sizes = (abs(x) if isinstance(x, int) else self.size(x) for x in rest)
    self.take(max(self.size(first), 1) * (1 + sum(sizes)))

  def weigh_format(self, form: str, values: Any) -> None:
    """Takes the steps of filling values in a format, with the widths it names."""
    fields = 1 + form.count("%") + form.count("{")
    widths = sum(int(width) for width in re.findall(r"\d+", form))
    self.take(len(form) + fields * self.size(values) + widths)


def _meter(context: runtime.Context) -> _Meter:
  return context[_METER]


class _Metered(visitor.NodeTransformer):
  """Adds to a template's syntax tree what takes steps where the sandbox has no hook: in
  each turn of a loop, and to what is compared, sliced, joined by ~ or made a tuple."""

  def visit_For(self, node: nodes.For) -> nodes.For:
    written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    self.generic_visit(node)
    turn = _filtered(nodes.Const(written), " turn")
    node.body.insert(0, nodes.ExprStmt(turn))
    if node.test is not None:
      node.test = nodes.And(turn, node.test)
    return node

  def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
    self.generic_visit(node)
    node.expr = _filtered(node.expr, " weigh")
    for operand in node.ops:
      operand.expr = _filtered(operand.expr, " weigh")
    return node

  def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
    self.generic_visit(node)
    if isinstance(node.arg, nodes.Slice):
      node.node = _filtered(node.node, " weigh")
    return node

  def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:
    self.generic_visit(node)
    node.nodes = [_filtered(part, " weigh") for part in node.nodes]
    return node

  def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
    self.generic_visit(node)
    return _filtered(node, " weigh") if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
  return nodes.Filter(node, name, [], [], None, None)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
  """Jinja's sandbox, where a rendering takes a bounded number of steps: turns of loops,
  calls, operations, and the characters and items that they read and write. Work is
  weighed before it is done, so that memory is bounded by the steps as well."""

  intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

  def __init__(self):
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=["jinja2.ext.loopcontrols"],
      finalize=_weighed,
    )
    self.filters["tojson"] = _tojson
    for name in _UNBOUNDED:
      del self.filters[name]
    tables: tuple[dict[str, Any], ...] = self.filters, self.tests
    for table in tables:
      for name, function in table.items():
        table[name] = _metered(name, function)
    self.filters |= {" turn": _turn, " weigh": _weighed}
    del self.globals["lipsum"]  # a matter of chance
    self.globals["raise_exception"] = _raise_exception
    self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

  def compiled(self, template: str) -> jinja2.Template:
    """The template, with what takes steps."""
    return self.from_string(_Metered().visit(self.parse(template)))

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    bytes_too = attr in ("encode", "to_bytes")  # which nothing here weighs
    return not bytes_too and super().is_safe_attribute(obj, attr, value)

  def call(__self, __context, __obj, *args, **kwargs):  # noqa: B902
    meter, values = _meter(__context), (*args, *kwargs.values())
    method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(__obj, runtime.Macro):
      meter.take(0)
    elif not isinstance(owner, str):
      meter.weigh(owner, *values)
    elif name in ("format", "format_map"):
      for _, _, form, _ in string.Formatter().parse(owner):
        if "{" in (form or ""):
          raise jinja2.TemplateRuntimeError("a width that is another field")
      meter.weigh_format(owner, values)
    else:
      args = _listed(args) if name == "join" else args
      meter.weigh_product(owner, (*args, *kwargs.values()))
    result = super().call(__context, __obj, *args, **kwargs)
    meter.weigh(result)
    return result

  def call_binop(self, context, operator, left, right):
    meter = _meter(context)
    meter.weigh(left, right)
    if operator == "%" and isinstance(left, str):
      _weigh_percent(meter, left, right)
    whole = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and whole and left.bit_length() * right > BITS:
      raise jinja2.TemplateRuntimeError(f"a number of more than {BITS} bits")
    if operator == "*" and not whole:
      for items, times in ((left, right), (right, left)):
        if isinstance(items, Collection) and isinstance(times, int):
          meter.take(meter.size(items) * max(times, 0))
    return super().call_binop(context, operator, left, right)


def _weigh_percent(meter: _Meter, form: str, values: Any) -> None:
  if "*" in form.partition("%")[2]:
    raise jinja2.TemplateRuntimeError("a width that is another value")
  meter.weigh_format(form, values)


def _listed(args: Sequence[Any]) -> tuple[Any, ...]:
  """Values with their iterators run out, so that their items can be counted."""
  return tuple(list(x) if isinstance(x, Iterator) else x for x in args)


@jinja2.pass_context
def _turn(context: runtime.Context, written: int) -> bool:
  _meter(context).take(written)
  return True


@jinja2.pass_context
def _weighed(context: runtime.Context, x: Any) -> Any:
  _meter(context).weigh(x)
  return x


def _metered(name: str, function: Callable) -> Callable:
  """A filter or test that takes steps for what it reads and what it gives."""
  passed = getattr(function, "jinja_pass_arg", None)

  @jinja2.pass_context
  def metered(context, *args, **kwargs):
    meter, front = _meter(context), ()
    args = _listed(args) if name == "join" else args
    if name == "format" and args:
      _weigh_percent(meter, str(args[0]), (*args[1:], kwargs))
    elif args:
      meter.weigh_product(args[0], (*args[1:], *kwargs.values()))
    if passed is not None:
      given = {"environment": context.environment, "eval_context": context.eval_ctx}
      front = (given.get(passed.name, context),)
    result = function(*front, *args, **kwargs)
    meter.weigh(result)
    return result

  return metered


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  """The template in a sandbox with the few helpers that templates of chats expect."""
  if len(template) > LONGEST:
    raise ValueError(f"wanted {LONGEST} characters at most, got {len(template)}")
  # Only transformers' masks read these tags; they render as what they enclose.
  tags = r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}"
  return _Sandbox().compiled(re.sub(tags, r"{%\1 if true \2%}{% endif %}", template))


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
