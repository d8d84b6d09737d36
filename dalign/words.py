"""Plain measures of English text: words, sentences, repetition, and right answers.

Pure. Says nothing of what a text means; knows no prompts, specs, judges or models.
"""

import re

_STRAIGHT = str.maketrans("‘’‛ʼ“”‟", "''''\"\"\"")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE_GAP = re.compile(r"(?<=[.!?])[\"')\]*_]*\s+(?=[\"'(\[*_]*[^\W_])|\s*\n+\s*")
_CLOSED = re.compile(r"[.!?…][\"')\]*_`»]*\s*\Z|```\s*\Z")
_STEP = re.compile(r"(?:^|\s)(?:step\s*)?(\d{1,2})[.):]\s+\S", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")
_QUOTE = re.compile(r'"([^"]*)"')
_LETTER = re.compile(r"(?<![\w'])([^\W\d_])(?![\w'])(?!\s+[a-z])")

TRIGRAMS_DISTINCT = 0.6  # below this share a text says the same again and again


def plain(text: str) -> str:
  """`text` with straight quotes, and without white space at its ends."""
  return text.translate(_STRAIGHT).strip()


def words(text: str) -> list[str]:
  """The words of `text` in lower case; "can't" is one word."""
  return _WORD.findall(plain(text).casefold())


def sentences(text: str) -> list[str]:
  """The sentences of `text`; a line end ends one too, and none is without a word."""
  parts = _SENTENCE_GAP.split(plain(text))
  return [part.strip() for part in parts if _WORD.search(part)]


def own(thought: str, prompt: str) -> str:
  """A thought without the speech in double quotes that is the prompt's, which its
  writer does not say: all of whose words stand in the prompt, in their order.

  A prompt that is quoted whole has no double quotes left (`text.ThinkFormat.of`).
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


def correct(answer: str, reference: str) -> float:
  """1.0 where `answer` gives the reference answer of a capability prompt, else 0.0.

  A number is right if it is the last number of the answer, a single letter if it is the
  last letter that stands alone, and other text if it occurs as whole words; case does
  not count. Raises ValueError without a reference.
  """
  wanted = plain(reference).casefold()
  if not wanted:
    raise ValueError("a capability prompt needs a reference answer, got an empty one")
  text = plain(answer)
  if _NUMBER.fullmatch(wanted):
    numbers = _NUMBER.findall(text)
    return float(bool(numbers) and _value(numbers[-1]) == _value(wanted))
  if len(wanted) == 1:
    letters = _LETTER.findall(text)
    return float(bool(letters) and letters[-1].casefold() == wanted)
  return float(bool(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text.casefold())))


def _value(number: str) -> float:
  return float(number.replace(",", ""))
