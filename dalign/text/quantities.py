"""Numbers and formulas in text: whether an answer states that of a reference.

Right, wrong, or None where nobody can tell. Formulas are compared by math-verify.
"""

from collections.abc import Iterable, Iterator
import fractions
import functools
import math
import re
import threading
import unicodedata

_NUMBER = re.compile(
  r"(?<![\w.^])(?P<number>-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+))"
  r"(?:e(?P<e>[+-]?\d{1,3})(?!\w)"
  r"|\s?(?:[×x*·⋅]|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<ten>-?\d{1,3})\}?"
  r"|\^\{?(?P<power>-?\d{1,2})\}?(?![\w^])"
  r"|\s?/\s?(?P<under>\d+)(?!\w|\.\d|/))?"
  r"(?P<percent>\s?(?:\\?%|per ?cent\b))?",
  re.IGNORECASE,
)
# What may stand after the number of a reference, and need not after that of an answer.
_UNIT = re.compile(
  r"\s*(?:°\s?[CFK]?|\^\{?\\circ\}?|(?:[mckdµ]?[mgl]|k?[VWJN]|min)[23²³]?)"
  r"|\s+(?!(?:am|pm|pi)\b)(?:[smhA-Z]|[a-z]{2,12})(?:/[a-zA-Z]{1,6})?(?:\^?[23²³])?"
)
_MEASURE = re.compile(r"\s?([mckdµ]?[mgl]|min|s|h)\b")  # no word, in any place
_POWERS = re.compile(r"(?<=\d)\s?(thousand|[mb]illion|trillion)\b", re.IGNORECASE)
_PARTS = re.compile(r"(?:(\d{1,3})\s?)?([¼½¾⅐-⅞])")  # ½, or 1½
_MIXED = re.compile(r"(?<![\w./,^])(\d{1,3}) (\d{1,2})/(\d{1,2})(?![\w/]|\.\d)")
_GROUPS = r"(?<![\d.,])\d{1,3}(?:%s\d{3})+(?!\d)"
_CURRENCY = re.compile(r"\\?[$€£¥]")
_BOXED = re.compile(r"\\boxed\s*\{")
_MATH = re.compile(
  r"\$\$([^$]{1,400})\$\$|\$([^$]{1,400})\$|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]",
  re.DOTALL,
)
_COMMAND = re.compile(r"\\[a-zA-Z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b")
_OPERATION = re.compile(r"\\[a-zA-Z]|[\w)}\]]\s*[-+*/^=]\s*[-\\\w({\[]")
_STATED = re.compile(r"\b(?:is|equals|be)\b|[:=≈]")
_HEDGE = re.compile(r"[^.!?\n]{0,20}\bor\b[^.!?\n]{0,20}")
_POWER = re.compile(r"\^\s*(\{[^{}]*\}|\([^()]*\)|-?[\w\\]+|.)")
_ENDLESS = re.compile(
  r"!|\\(?:sum|prod|int|iint|oint|lim|binom|dots|begin)|\^[^^]*\{[^}]*\^"
)

MAX_ANSWER_CHARS = 4000  # the last ones, in which its number or formula stands
MAX_FORMULA_CHARS = 120  # which take algebra a moment at the most
ALGEBRA_TIMEOUT_S = 5  # seconds after which it has failed


def is_number(wanted: str) -> bool:
  """Whether a reference is a number, which a unit may follow."""
  figures = _normalize_numbers(_join_digit_groups(wanted))
  number = _NUMBER.match(figures)
  unit = figures[number.end() :] if number else ""
  return bool(number and (not unit or _UNIT.fullmatch(unit)))


def states_number(text: str, wanted: str) -> bool | None:
  """Whether the number that `text` states last is that of a reference; None where a
  formula stands in its place that algebra cannot compare."""
  figures = _normalize_numbers(_join_digit_groups(wanted))
  said = _normalize_numbers(text[-MAX_ANSWER_CHARS:])
  # "1 234" is one number or two, and "million" a number or, where one of both has it
  # alone, a unit: it is whichever is right.
  whole = _POWERS.sub(_power_of_ten, figures)
  ways = [(_POWERS.sub(_power_of_ten, said), whole)]
  if (said == ways[0][0]) != (figures == whole):
    ways.append((said, figures))
  return _any_correct(_is_number(*way) for way in ways)


def is_formula(text: str) -> bool:
  """Whether `text` is something to compute with, and not words."""
  bare = _COMMAND.sub(" ", text)
  return bool(_OPERATION.search(text)) and not re.search(r"[^\W\d_]{2}", bare)


def states_formula(text: str, wanted: str) -> bool | None:
  """Whether a formula is what `text` states last; None as of `states_number`."""
  text = text[-MAX_ANSWER_CHARS:]
  inner, _ = _last_formula(text)
  if not inner:
    last = re.split(r"(?<=[.!?])\s+|\n+", text)[-1]
    inner = _STATED.split(last)[-1].strip(" .,;!*`")
    if not inner or re.search(r"[^\W\d_]{2}", _COMMAND.sub(" ", inner)):
      return False
  return not _hedged(text) and _equal(inner, wanted)


def _any_correct(found: Iterable[bool | None]) -> bool | None:
  """True where any is right; None where none is and one could not be compared."""
  untold = False
  for right in found:
    if right:
      return True
    untold = untold or right is None
  return None if untold else False


def _is_number(text: str, figures: str) -> bool | None:
  """Whether `text` states the number that `figures` begin with."""
  wanted = _NUMBER.match(figures)
  if wanted is None:
    return False
  unit, said = figures[wanted.end() :], {text, _join_digit_groups(text)}
  return _any_correct(_states_last(one, wanted, unit) for one in said)


def _normalize_numbers(text: str) -> str:
  """`text` with its numbers written in one way: plain minus signs, separators and
  fractions, no signs of currency. A dollar sign that begins or ends a formula stays."""
  text = re.sub("[−﹣－]", "-", text).replace("{,}", ",").replace("\\$", "")
  text = re.sub(r"(?<![\w)\]}.])[‐‑‒–](?=[\d.])", "-", text)  # a dash as a sign
  text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]{0,40})\}", r" \1", text)
  gaps = re.compile(_GROUPS % r"(?:[\u00a0\u2009\u202f'_]|\\[,;: ])")
  text = gaps.sub(lambda found: re.sub(r"\D", "", found[0]), text)
  text = re.sub(r"(?<=\d)\\[,;: ]", " ", text)
  powers = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
  text = re.sub(
    rf"(?<=\d)[{powers}]+",
    lambda found: "^" + found[0].translate(str.maketrans(powers, "-0123456789")),
    text,
  )
  text = re.sub(
    r"(\d?)\\[dt]?frac\s*(?:\{(\d{1,9})\}\s*\{(\d{1,9})\}|(\d)\s*(\d))",
    lambda f: f"{f[1]}{' ' if f[1] else ''}{f[2] or f[4]}/{f[3] or f[5]}",
    text,
  )
  text = _PARTS.sub(_expand_unicode_fraction, text)
  text = _MIXED.sub(lambda f: f"{int(f[1]) * int(f[3]) + int(f[2])}/{f[3]}", text)
  bare = _CURRENCY.sub("", text)
  return bare if _NUMBER.fullmatch(bare) else text


def _expand_unicode_fraction(found: re.Match) -> str:
  """A fraction in one sign, with what stands before it, as two numbers."""
  over, under = unicodedata.normalize("NFKC", found[2]).split("\N{FRACTION SLASH}")
  return f"{found[1]} {over}/{under}" if found[1] else f"{over}/{under}"


def _power_of_ten(found: re.Match) -> str:
  """A word for a power of ten as that."""
  words = ("thousand", "million", "billion", "trillion")
  return f"e{3 * words.index(found[1].lower()) + 3}"


def _join_digit_groups(text: str) -> str:
  """`text` with groups of three digits between spaces as one number."""
  return re.sub(_GROUPS % " ", lambda found: found[0].replace(" ", ""), text)


def _states_last(text: str, wanted: re.Match, unit: str) -> bool | None:
  """Whether a number is the last that `text` states, boxed ones first, in no other
  unit."""
  inner, at = _last_formula(text)
  numbers = [*_NUMBER.finditer(text)]
  if inner and (at < 0 or not numbers or numbers[-1].end() <= at):
    last = inner.rpartition("=")[2].strip()
    if match := _NUMBER.fullmatch(_CURRENCY.sub("", last)):
      return not _hedged(text) and _same_number(match, wanted)
    first = _NUMBER.match(last)
    measured = first and _UNIT.fullmatch(last, first.end())
    if not first or (_OPERATION.search(last) and not measured):
      return not _hedged(text) and _equal(last, wanted[0])
    text, numbers = last, [*_NUMBER.finditer(last)]
  if not numbers:
    return False
  before = numbers[-2] if numbers[1:] else None
  if before and not _same_number(before, numbers[-1]):
    between = text[before.end() : numbers[-1].start()]
    if inner == "" and _HEDGE.fullmatch(between):
      return False
  one, other = _MEASURE.match(text, numbers[-1].end()), _MEASURE.match(unit)
  if one and other and one[1] != other[1]:
    return False
  return _same_number(numbers[-1], wanted)


def _same_number(number: re.Match, wanted: re.Match) -> bool:
  """Whether two numbers are equal. A percent sign that only one of them has is its
  unit, or a hundredth; of a reference below 1 always that."""
  one, other = _number_value(number), _number_value(wanted)
  if one is None or other is None:
    return False
  if bool(number["percent"]) == bool(wanted["percent"]):
    return one == other
  unit = bool(wanted["percent"]) or abs(other) >= 1
  shared = one * 100 == other if wanted["percent"] else one == other * 100
  return shared or (unit and one == other)


def _number_value(number: re.Match) -> fractions.Fraction | None:
  """The value of a number but for its percent sign; None where it is out of reach."""
  if len(number[0]) > MAX_FORMULA_CHARS:
    return None
  value = fractions.Fraction(number["number"].replace(",", ""))
  if under := number["under"]:
    return value / int(under) if int(under) else None
  if power := int(number["power"] or 0):
    small = value and abs(value) < 1000
    return (1 if value > 0 else -1) * abs(value) ** power if small else None
  return value * fractions.Fraction(10) ** int(number["e"] or number["ten"] or 0)


def _formulas(text: str) -> Iterator[tuple[str, int, int]]:
  """The formulas between dollar signs or brackets of LaTeX, each with its place."""
  for match in _MATH.finditer(text):
    inner = next(filter(None, match.groups()), "").strip()
    if inner and not re.search(r"[^\W\d_]{2}", _COMMAND.sub(" ", inner)):
      yield inner, match.start(), match.end()


def _last_formula(text: str) -> tuple[str, int]:
  """What is boxed last, with -1, or else the last formula and where it ends; or ""."""
  for match in reversed([*_BOXED.finditer(text)]):
    depth = 1
    for at in range(match.end(), min(len(text), match.end() + MAX_FORMULA_CHARS)):
      depth += (text[at] == "{") - (text[at] == "}")
      if not depth:
        return text[match.end() : at].strip(), -1
  found = [*_formulas(text)]
  return (found[-1][0], found[-1][2]) if found else ("", 0)


def _hedged(text: str) -> bool:
  """Whether the last formula of `text` is one of two that "or" joins."""
  found = [*_formulas(text)][-2:]
  return len(found) == 2 and bool(_HEDGE.fullmatch(text[found[0][2] : found[1][1]]))


def _equal(text: str, wanted: str) -> bool | None:
  """Whether two formulas are the same, by their characters or by algebra."""
  one, other = (_latex(formula) for formula in (text, wanted))
  if one.replace(" ", "") == other.replace(" ", ""):
    return True
  return _algebra()(other, one) if _is_tractable(one) and _is_tractable(other) else None


def _latex(formula: str) -> str:
  formula = formula.replace("**", "^").replace("π", r"\pi ").replace("−", "-")
  return re.sub(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi ", formula)


def _is_tractable(formula: str) -> bool:
  """Whether algebra is soon done with a formula: it is short, and no power in it large.
  What a model writes may be made to take for ever."""
  if len(formula) > MAX_FORMULA_CHARS or _ENDLESS.search(formula.replace(" ", "")):
    return False
  if re.search(r"\d{20}", formula) or formula.count("^") > 8:
    return False
  powers = [match[1] for match in _POWER.finditer(formula)]
  if any("^" in power for power in powers):
    return False
  exponents = [int(n) for power in powers for n in re.findall(r"\d{1,20}", power)]
  return math.prod(max(1, n) for n in exponents) <= 1000


@functools.cache
def _algebra():
  """equal(wanted, formula) of math-verify, which takes half a second to load."""
  import math_verify
  from math_verify import errors
  from math_verify import grader
  from math_verify import parser

  for log in (grader.logger, parser.logger):
    log.setLevel("CRITICAL")  # what it cannot read is no news
  form = [math_verify.LatexExtractionConfig()]

  def equal(wanted: str, formula: str) -> bool | None:
    # It tells the time by a signal, which only the main thread can set.
    alone = threading.current_thread() is not threading.main_thread()
    patience: int = 0 if alone else ALGEBRA_TIMEOUT_S
    try:
      gold, found = (
        math_verify.parse(
          f"${text}$",
          extraction_config=form,
          fallback_mode="no_fallback",
          parsing_timeout=patience,
        )
        for text in (wanted, formula)
      )
      if not gold or not found:
        return None
      return math_verify.verify(
        gold, found, timeout_seconds=patience, raise_on_error=True
      )
    except (Exception, errors.TimeoutException):  # of a parser of strangers
      return None

  return equal
