"""Plain measures of text, most of it English: words, runs of them in any script,
sentences, repetition, and right answers.

Pure. Says nothing of what a text means; knows no prompts, specs, judges or models.
"""

from collections.abc import Iterable, Iterator, Sequence
import fractions
import functools
import math
import re
import threading
import unicodedata

_STRAIGHT = str.maketrans("‘’‛ʼ“”‟", "''''\"\"\"")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE_GAP = re.compile(r"(?<=[.!?])[\"')\]*_]*\s+(?=[\"'(\[*_]*[^\W_])|\s*\n+\s*")
_CLOSED = re.compile(r"[.!?…][\"')\]*_`»]*\s*\Z|```\s*\Z")
_STEP = re.compile(r"(?:^|\s)(?:step\s*)?(\d{1,2})[.):]\s+\S", re.IGNORECASE)
_QUOTE = re.compile(r'"([^"]*)"')

# Scripts that put no spaces between words, by how many characters a word has.
_TWO = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
_TWO += "\U00020000-\U0003ffff"  # Han and kana
_FOUR = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese and Khmer
_PIECE = re.compile(f"([{_TWO}])|([{_FOUR}])|[^{_TWO}{_FOUR}]+")
_UNSPACED = re.compile(f"[{_TWO}{_FOUR}]")

# Right answers.
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
_GAP = re.compile(
  r"(?<=[(\[{,;])[ \t]+|[ \t]+(?=[)\]},;])|\\(?:left|right)(?=[()\[\]])"
)
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
_LETTER = re.compile(r"(?<!\w)(?<!\w')(?<!\w\.)([^\W\d_])(?!\w|'\w|\.\w)")
_NO_OPTION = re.compile(r"\s+(?!(?:is|or|and|nor|because|since)\b)[a-z]")
_CUES = (r"\banswer\b|\\boxed", r"\b(?:option|choice|letter)\b")
_BULLET = re.compile(r"^\s*(?:[-*•]|\w{1,2}[.)])\s+\S", re.MULTILINE)
_JOINT = re.compile(r"\s*(,?\s*\b(?:or|and)\b|[,;/])\s*")
_HERE = "\0"  # where the reference stands

MAX_ANSWER_CHARS = 4000  # the last ones, in which its number or formula stands
MAX_FORMULA_CHARS = 120  # which take algebra a moment at the most
ALGEBRA_TIMEOUT_S = 5  # seconds after which it has failed
UNCOMPARABLE = "a formula that algebra cannot compare"

NEAR_DUPLICATE = 0.5  # word-trigram Jaccard from which two texts are near-twins
TRIGRAMS_DISTINCT = 0.6  # below this share a text says the same again and again


def plain(text: str) -> str:
  """`text` with straight quotes, and without white space at its ends."""
  return text.translate(_STRAIGHT).strip()


def words(text: str) -> list[str]:
  """The words of `text` in lower case; "can't" is one word."""
  return _WORD.findall(plain(text).casefold())


def runs(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
  """All runs of `n` words. Of scripts without spaces each character is one piece of a
  run, and two (Han, kana) or four (Thai, Lao, Burmese, Khmer) of them count as a word.
  """
  if not _UNSPACED.search("".join(words)):
    yield from zip(*(words[i:] for i in range(n)), strict=False)
    return
  pieces = [match for word in words for match in _PIECE.finditer(word)]
  quarters = [2 if match[1] else 1 if match[2] else 4 for match in pieces]
  end = size = 0
  for start, own in enumerate(quarters):
    while size < 4 * n and end < len(pieces):
      size += quarters[end]
      end += 1
    if size < 4 * n:
      return
    yield tuple(match[0] for match in pieces[start:end])
    size -= own


def near_duplicates(
  texts: Sequence[str], *, threshold: float = NEAR_DUPLICATE
) -> Iterator[tuple[int, int]]:
  """Pairs i < j of texts whose word-trigram Jaccard is `threshold` or more.

  Exact: two such sets share one of their rarest members (prefix filtering; Chaudhuri
  et al. 2006), so only those are looked up.
  """
  grams = [word_runs(text, 3) for text in texts]
  counts: dict[str, int] = {}
  for gram in (gram for some in grams for gram in some):
    counts[gram] = counts.get(gram, 0) + 1
  index: dict[str, list[int]] = {}
  for j, some in enumerate(grams):
    rarest = sorted(some, key=lambda gram: (counts[gram], gram))
    prefix = rarest[: len(some) - math.ceil(threshold * len(some)) + 1]
    for i in sorted({i for gram in prefix for i in index.get(gram, ())}):
      both = len(grams[i] & some)
      if both >= threshold * (len(grams[i]) + len(some) - both):
        yield i, j
    for gram in prefix:
      index.setdefault(gram, []).append(j)


def word_runs(text: str, n: int) -> frozenset[str]:
  """Runs of `n` words (`runs`); all of a text that has fewer, as one."""
  found = re.findall(r"\w+", text.casefold())
  return frozenset(map(" ".join, runs(found, n))) or frozenset([" ".join(found)])


def sentences(text: str) -> list[str]:
  """The sentences of `text`; a line end ends one too, and none is without a word."""
  parts = _SENTENCE_GAP.split(plain(text))
  return [part.strip() for part in parts if _WORD.search(part)]


def without_prompt_quotes(thought: str, prompt: str) -> str:
  """A thought without the speech in double quotes that is the prompt's, which its
  writer does not say: all of whose words stand in the prompt, in their order.

  A prompt that is quoted whole has no double quotes left (`thinking.ThinkFormat.of`).
  """
  asked = words(prompt.replace('"', "'"))

  def kept(match: re.Match) -> str:
    rest, said = iter(asked), words(match[1])
    return "" if said and all(word in rest for word in said) else match[0]

  return _QUOTE.sub(kept, thought)


def distinct_share(text: str, n: int = 3) -> float:
  """Distinct runs of `n` words over all of them, in [0, 1]; 1 where there is none."""
  found = words(text)
  runs = list(zip(*(found[i:] for i in range(n)), strict=False))
  return len(set(runs)) / len(runs) if runs else 1.0


def degenerate(text: str) -> bool:
  """Whether `text` has no word, or falls into repeating itself.

  Repeating is: less than 60% of the runs of three words are distinct, a sentence of
  four words or more comes twice, or one word comes four times in a row.
  """
  found = words(text)
  if not found or distinct_share(text) < TRIGRAMS_DISTINCT:
    return True
  long = [tuple(w) for s in sentences(text) if len(w := words(s)) >= 4]
  runs = zip(found, found[1:], found[2:], found[3:], strict=False)
  return len(set(long)) < len(long) or any(len(set(run)) == 1 for run in runs)


def ends_sentence(text: str) -> bool:
  """Whether `text` stops where a sentence does, quotes and brackets aside."""
  return bool(_CLOSED.search(plain(text)))


def numbered_steps(text: str) -> int:
  """How many steps "1. ... 2. ..." count up from 1, on lines of their own or not."""
  count = 0
  for match in _STEP.finditer(plain(text)):
    count += int(match[1]) == count + 1
  return count


def has_code(text: str) -> bool:
  """Whether `text` holds a fenced code block."""
  return "```" in text


def correct(answer: str, reference: str) -> float | None:
  """1.0 where `answer` gives the reference answer of a capability prompt, else 0.0; or
  None where it states a formula that algebra cannot compare (`UNCOMPARABLE`).

  A number or formula is right if what the answer states last equals it, as algebra does
  (units after it do not count, nor does the form); a single letter if it alone of all
  options is named; and other text if it occurs as whole words and is not one of several
  that are listed. Case does not count. Raises ValueError without a reference.
  """
  wanted = plain(reference)
  if not wanted:
    raise ValueError("a capability prompt needs a reference answer, got an empty one")
  text = plain(answer)
  figures = _normalize_numbers(_join_digit_groups(wanted))
  number = _NUMBER.match(figures)
  unit = figures[number.end() :] if number else ""
  if number and (not unit or _UNIT.fullmatch(unit)):
    said = _normalize_numbers(text[-MAX_ANSWER_CHARS:])
    # "1 234" is one number or two, and "million" a number or, where one of both has it
    # alone, a unit: it is whichever is right.
    whole = _POWERS.sub(_power_of_ten, figures)
    ways = [(_POWERS.sub(_power_of_ten, said), whole)]
    if (said == ways[0][0]) != (figures == whole):
      ways.append((said, figures))
    return _scored(_any_correct(_is_number(*way) for way in ways))
  if len(wanted) == 1:
    return float(_options(text) == {wanted.casefold()})
  if _is_formula(wanted):
    return _scored(_states_formula(text[-MAX_ANSWER_CHARS:], wanted))
  text, wanted = text.casefold(), wanted.casefold()
  bare = _GAP.sub("", wanted)
  if bare[0] in "([{":  # a tuple or an interval, however it is spaced
    text, wanted = _GAP.sub("", text), bare
  return float(_states_text(text, wanted))


# Numbers and formulas: right, wrong, or None where nobody can tell.


def _scored(right: bool | None) -> float | None:
  return None if right is None else float(right)


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
  return _any_correct(_states_number(one, wanted, unit) for one in said)


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


def _states_number(text: str, wanted: re.Match, unit: str) -> bool | None:
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


def _is_formula(text: str) -> bool:
  """Whether `text` is something to compute with, and not words."""
  bare = _COMMAND.sub(" ", text)
  return bool(_OPERATION.search(text)) and not re.search(r"[^\W\d_]{2}", bare)


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


def _states_formula(text: str, wanted: str) -> bool | None:
  """Whether a formula is what `text` states last."""
  inner, _ = _last_formula(text)
  if not inner:
    last = re.split(r"(?<=[.!?])\s+|\n+", text)[-1]
    inner = _STATED.split(last)[-1].strip(" .,;!*`")
    if not inner or re.search(r"[^\W\d_]{2}", _COMMAND.sub(" ", inner)):
      return False
  return not _hedged(text) and _equal(inner, wanted)


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


# Options and other text.


def _options(text: str) -> set[str]:
  """The letters that `text` names, in small: of sentences that speak of an answer, else
  of an option, else of all. An article and "I" are none."""
  parts = sentences(text)
  for cue in _CUES:
    said = [part for part in parts if re.search(cue, part, re.IGNORECASE)]
    if found := {letter for part in said for letter in _letters(part)}:
      return found
  return set(_letters(text))


def _letters(text: str) -> Iterator[str]:
  for match in _LETTER.finditer(text):
    if match[1] not in "aAI" or not _NO_OPTION.match(text, match.end()):
      yield match[1].casefold()


def _states_text(text: str, wanted: str) -> bool:
  """Whether `wanted` occurs where it is neither denied, nor asked, nor one of many."""
  whole = rf"(?<!\w){re.escape(wanted)}(?!\w)"
  text = re.sub(whole, _HERE, text.replace(_HERE, ""))
  if _HERE not in text:
    return False
  listed = len(_BULLET.findall(text)) > 1
  parts = re.split(r"(?<=[.!?])(?<!\b\d\.)(?<!\b\d\d\.)\s+|\n+", text)
  said = (part for part in parts if _HERE in part and not part.rstrip().endswith("?"))
  return any(
    not _is_one_of_many(part) for part in said if not (listed and _BULLET.match(part))
  )


def _is_one_of_many(sentence: str) -> bool:
  """Whether each time the reference stands next to "or" or a slash, after "not", or in
  a list of three or more short items, of which the first may have words before it."""
  pieces = _JOINT.split(sentence)
  items, joints = pieces[::2], [joint.lstrip(", ") or "," for joint in pieces[1::2]]
  sizes = [len(words(item)) for item in items]
  return all(
    _is_listed_item(items, joints, sizes, i)
    for i, item in enumerate(items)
    if _HERE in item
  )


def _is_listed_item(
  items: list[str], joints: list[str], sizes: list[int], i: int
) -> bool:
  if {"or", "/"} & {*joints[max(0, i - 1) : i + 1]}:
    return True
  if re.search(rf"(?:\bnot|n't)\s+(?:\w+\s+)?{_HERE}", items[i]):
    return True
  if i and sizes[i] > 1:
    return False
  first, last = i, i
  while last + 1 < len(items) and sizes[last + 1] <= 3:
    last += 1
  while first and sizes[first - 1] <= 3:
    first -= 1
  return last - first + 1 + bool(first) >= 3
