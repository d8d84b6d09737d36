"""Thought and answer: how a completion shows its thought, and where that ends."""

from collections.abc import Sequence
import dataclasses
import re

PROMPT = "{prompt}"  # where a think format's opening quotes the prompt
QUOTED = 30  # words at either end of a long prompt that are quoted


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkFormat:
  """How a completion shows its thought, such as open="<think>\\nThe user".

  `open` is forced at the start of each completion: its first line is the tag, what
  follows are the thought's first words. `close` ends the thought. Where `open` holds
  "{prompt}", the prompt that is answered is quoted: `of(prompt)` is its own format.
  """

  open: str
  close: str

  def __post_init__(self):
    if not self.tag or not self.close:
      raise ValueError(f"a think format has two tags, got {self}")
    if self.tag in self.close or self.close in self.tag:
      raise ValueError(f"neither tag may hold the other, got {self}")
    if self.tag in self.start or self.close in self.start:
      raise ValueError(f"the forced words may not hold a tag, got {self}")

  @property
  def tag(self) -> str:
    """The opening tag."""
    return self.open.split("\n", 1)[0].strip()

  @property
  def tags(self) -> tuple[str, str]:
    """The tags around a thought."""
    return self.tag, self.close

  @property
  def start(self) -> str:
    """The forced first words of the thought, "" if there are none."""
    return self.open.removeprefix(self.tag).strip()

  def of(self, prompt: str) -> "ThinkFormat":
    """The format for one prompt, with `prompt` in the place of "{prompt}".

    It is quoted on one line, its double quotes as single ones, its tags broken or gone,
    so that no tokenizer reads one, and of more than 2 * QUOTED words the middle left
    out. `templates.with_thought_opening` does the same in Jinja.
    """
    if PROMPT not in self.open:
      return self
    for tag in (self.tag, self.close):
      prompt = prompt.replace(tag, " ")
    said = prompt.replace("<", "< ").replace('"', "'").split()
    if len(said) > 2 * QUOTED:
      said = [*said[:QUOTED], "...", *said[-QUOTED:]]
    quoted = self.open.replace(PROMPT, " ".join(said))
    return dataclasses.replace(self, open=quoted)


def split_thought(text: str, think: ThinkFormat) -> tuple[str, str, str]:
  """(thought, answer, malformed) of a completion, its forced opening included.

  `malformed` is "" for one block that opens the text, is closed once, and has words of
  its own in it (beyond the forced ones) and after it. Otherwise it is the reason:
  "no opening tag", "no closing tag", "repeated tag", "empty thought" or "empty answer";
  then the answer is what follows the last closing tag, or without one all of the text
  but the opening tag, and the thought is what stands before, or "".
  Both are stripped. For text of a model only: users may write tags as they like.
  """
  body = text.strip()
  opened = body.startswith(think.tag)
  before, closed, answer = body.rpartition(think.close)
  if not closed:
    before, answer = "", body.replace(think.tag, "", 1)
  thought, answer = before.removeprefix(think.tag).strip(), answer.strip()
  reason = ""
  if not opened:
    reason = "no opening tag"
  elif not closed:
    reason = "no closing tag"
  elif body.count(think.tag) > 1 or body.count(think.close) > 1:
    reason = "repeated tag"
  elif not thought.removeprefix(think.start).strip():
    reason = "empty thought"
  elif not answer:
    reason = "empty answer"
  return thought, answer, reason


_NAMES = "think|thinking|thought|reasoning|seed:think"
OPENS = re.compile(rf"<(?:{_NAMES})>|\[THINK\]", re.IGNORECASE)
CLOSES = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]", re.IGNORECASE)
_FINAL = re.compile(r"<\|channel\|>final(?:<\|constrain\|>\w+)?<\|message\|>")
_MESSAGE = re.compile(r"<\|message\|>(.*?)(?:<\|end\|>|\Z)", re.DOTALL)
UNENDED = "a think block without an end, or two"


def split_reasoning(reply: str) -> tuple[str, str, str]:
  """(thought, rest, why) of a reply of a model that reasons aloud in a way of its own:
  in tags, whose first a chat template may have written, or in gpt-oss's channels. `why`
  is UNENDED where the reply is no more than a part of a thought, or "".
  """
  body = reply.strip()
  if "<|channel|>" in body:
    before, *final = _FINAL.split(body)
    if len(final) != 1:
      return "", body, UNENDED
    thought = " ".join(_MESSAGE.findall(before))
    return thought.strip(), re.split(r"<\|(?:return|end)\|>", final[0])[0].strip(), ""
  if body.startswith("analysis") and "assistantfinal" in body:  # without control tokens
    thought, _, rest = body.rpartition("assistantfinal")
    return thought.removeprefix("analysis").strip(), rest.strip(), ""
  opened, closed = OPENS.match(body), CLOSES.search(body)
  if closed:
    thought = body[opened.end() if opened else 0 : closed.start()]
    return thought.strip(), body[closed.end() :].strip(), ""
  return "", body, UNENDED if opened else ""


def continues_opened_thought(reply: str) -> bool:
  """Whether a reply has a thought that it did not open: its chat template did."""
  opens = OPENS.match(reply.lstrip()) or "<|channel|>" in reply
  return bool(split_reasoning(reply)[0]) and not opens


def has_tags(said: str) -> bool:
  """Whether a tag of a think block, as `split_reasoning` knows them, stands in a
  text."""
  return bool(OPENS.search(said) or CLOSES.search(said))


def split_partial_thought(
  text: str, think: ThinkFormat, *, complete: bool
) -> tuple[str, str]:
  """(thought, answer) of a completion that is being written, its opening included.

  What is yet to come may change neither, only add to them: what it could change is held
  back, until the text is `complete`. Unlike in `split_thought` the first closing tag
  ends the thought, and one without an opening tag is part of the answer.
  """
  body = text.lstrip()
  if not complete:
    body = stable_prefix(body, (think.tag, think.close))
  if not body.startswith(think.tag):
    return "", body.strip()
  thought, _, answer = body.removeprefix(think.tag).partition(think.close)
  return thought.strip(), answer.strip()


def stable_prefix(text: str, marks: Sequence[str]) -> str:
  """What stands before a character that is not whole yet, and before what may be the
  begin of one of `marks`, at the end of a text that goes on."""
  text = text.rstrip("\ufffd")
  for n in range(max(map(len, marks), default=0), 0, -1):
    if any(len(mark) > n and text.endswith(mark[:n]) for mark in marks):
      return text[:-n]
  return text
