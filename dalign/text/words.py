"""Plain measures of text, most of it English: words, runs of them in any script,
sentences, repetition, and right answers.

Pure. Says nothing of what a text means; knows no prompts, specs, judges or models.
"""

from collections.abc import Iterator, Sequence
import math
import re

from dalign.text import quantities

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
_GAP = re.compile(
  r"(?<=[(\[{,;])[ \t]+|[ \t]+(?=[)\]},;])|\\(?:left|right)(?=[()\[\]])"
)
_LETTER = re.compile(r"(?<!\w)(?<!\w')(?<!\w\.)([^\W\d_])(?!\w|'\w|\.\w)")
_NO_OPTION = re.compile(r"\s+(?!(?:is|or|and|nor|because|since)\b)[a-z]")
_CUES = (r"\banswer\b|\\boxed", r"\b(?:option|choice|letter)\b")
_BULLET = re.compile(r"^\s*(?:[-*•]|\w{1,2}[.)])\s+\S", re.MULTILINE)
_JOINT = re.compile(r"\s*(,?\s*\b(?:or|and)\b|[,;/])\s*")
_HERE = "\0"  # where the reference stands

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


def near_duplicates(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
  """Pairs i < j of texts whose word-trigram Jaccard is NEAR_DUPLICATE or more.

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
    prefix = rarest[: len(some) - math.ceil(NEAR_DUPLICATE * len(some)) + 1]
    for i in sorted({i for gram in prefix for i in index.get(gram, ())}):
      both = len(grams[i] & some)
      if both >= NEAR_DUPLICATE * (len(grams[i]) + len(some) - both):
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


def distinct_share(text: str) -> float:
  """Distinct runs of three words over all of them, in [0, 1]; 1 where there is none."""
  found = words(text)
  runs = list(zip(found, found[1:], found[2:], strict=False))
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
  right = _is_right(plain(answer), wanted)
  return None if right is None else float(right)


def _is_right(text: str, wanted: str) -> bool | None:
  if quantities.is_number(wanted):
    return quantities.states_number(text, wanted)
  if len(wanted) == 1:
    return _options(text) == {wanted.casefold()}
  if quantities.is_formula(wanted):
    return quantities.states_formula(text, wanted)
  text, wanted = text.casefold(), wanted.casefold()
  bare = _GAP.sub("", wanted)
  if bare[0] in "([{":  # a tuple or an interval, however it is spaced
    text, wanted = _GAP.sub("", text), bare
  return _states_text(text, wanted)


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
