"""The points that right answers to a prompt make and wrong ones on its matter miss.

Written by hand for each held-out prompt, beside its reference answer, as spellings of
which any one shows a point; what writes fluently of the matter and gets it wrong has
few of them. Pure; knows no prompts, models or files.
"""

from collections.abc import Sequence
import dataclasses
import re

from dalign.text import words

# The share of a prompt's points that an answer has to make. 96 of 97 second good
# answers by another writer do (tests/other_answers.jsonl, other_safe_answers.jsonl),
# and 2.5% of the references of other prompts. Of answers of SmolLM2-135M-Instruct,
# trained or not (tests/read_answers.jsonl), 29 of the 356 do that two blind readers
# found of no use, and 18 of the 36 that both found of use. It was chosen with all of
# them in sight.
MADE = 0.5


@dataclasses.dataclass(frozen=True)
class Points:
  """What answers to one prompt are read for.

  `made` has a list of spellings for each point, `wrong` the spellings that only wrong
  answers have: lower case, whole words, and any ending where one ends in "*".
  """

  made: Sequence[Sequence[str]]
  wrong: Sequence[str] = ()

  def share(self, answer: str) -> float:
    """The share of the points that `answer` makes, 0 where it says what is wrong."""
    text = " ".join(words.plain(answer).casefold().split())
    if any(_says(text, spelling) for spelling in self.wrong):
      return 0.0
    made = [any(_says(text, spelling) for spelling in point) for point in self.made]
    return sum(made) / len(made)


def _says(text: str, spelling: str) -> bool:
  ending = r"\w*" if spelling.endswith("*") else ""
  return bool(
    re.search(rf"(?<!\w){re.escape(spelling.removesuffix('*'))}{ending}(?!\w)", text)
  )
