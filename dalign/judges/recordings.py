"""Recorded samples: thoughts and answers that a model wrote elsewhere and earlier.

A recording is a JSONL or Parquet file of rows in one of three shapes:

  {"prompt_id", "thought", "answer"}, the shape of the one that comes with dalign, and
    perhaps "spec" (`spec_hash` of what the writer had in sight) and "votes", each
    {"score", "answer_score", "verdict"}, of judges that read the row;
  {"messages": [..., {"role": "assistant", "content", "reasoning_content"}]}, as servers
    of reasoning models and trainers write them;
  {"question", "response"}, the response with its think block in front (STAR-1,
    arXiv 2504.01903).

A row without "prompt_id" (or "id") belongs to the prompt whose words it has. A row with
an empty thought is an answer alone: a reward model may learn from it, SFT does not.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

from dalign.data import parsing
from dalign.data import readers
from dalign.judges import behaviour
from dalign.judges import judge
from dalign.policy import spec as specs
from dalign.text import thinking
from dalign.types import EXPECTED
from dalign.types import Prompt
from dalign.types import Spec
from dalign.types import Verdict

BUNDLED = "bundled"
_FOLDER = pathlib.Path(__file__).parents[1] / "recordings"
_TAGS = thinking.ThinkFormat(open="<think>", close="</think>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vote:
  """What one judge said of a recorded row: a score in [0, 1] of thought and answer, one
  of the answer alone, and how it would have decided."""

  score: float
  answer_score: float
  verdict: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedReply:
  """A row of a recording."""

  prompt_id: str
  thought: str
  answer: str
  votes: tuple[Vote, ...] = ()


def path_of(name: str) -> pathlib.Path:
  """The file of a recording: a path, or that of "bundled"."""
  return _FOLDER / "bundled.jsonl" if name == BUNDLED else pathlib.Path(name)


def spec_hash(spec: Spec, category: str) -> str:
  """SHA-256, 16 digits of it, of the full spec(category) as text."""
  shown = specs.render(spec, category, detail="full")
  return hashlib.sha256(shown.encode()).hexdigest()[:16]


def load(name: str, prompts: Sequence[Prompt], spec: Spec) -> list[RecordedReply]:
  """The rows of a recording, in order, each of a training prompt.

  Raises ValueError that names the row: one in no shape, of a prompt that is not there
  or is held out, or written under another specification.
  """
  path = path_of(name)
  known = {prompt.id: prompt for prompt in prompts}
  said = {_normalized_text(turn.content for turn in p.turns): p.id for p in prompts}
  hash_of = functools.cache(functools.partial(spec_hash, spec))
  found = []
  for where, row in readers.read_rows(path):
    row = {name: "" if parsing.is_empty(x) else x for name, x in row.items()}
    own = _parse_row(where, row, said)
    prompt = known.get(own.prompt_id)
    if prompt is None or prompt.split != "train":
      why = "held out" if prompt else "not among those of config.data.source"
      raise ValueError(
        f"{where}: wanted a row of a training prompt, and {own.prompt_id!r} is {why}; "
        "generate.teacher may be base or endpoint, or a recording of the prompts"
      )
    own_hash = hash_of(prompt.category)
    if row.get("spec") and row["spec"] != own_hash:
      raise ValueError(
        f"{where}: recorded under another specification of {prompt.category!r} "
        f"({row['spec']}, this one is {own_hash}): record it anew, or "
        "use the specification that it was written under (config.spec.dir)"
      )
    found.append(own)
  if not found:
    raise ValueError(f"{path}: wanted recorded samples, found no row")
  return found


def recorded_judge(rows: Iterable[RecordedReply]) -> judge.Judge:
  """A judge that gives the recorded votes: asked the same again, the next one.

  It answers both questions, that with a thought and that without. A thought that ends
  in another verdict than the voter's own, given blind, gets 0. Known answers are
  compared. Unscored: what was not recorded, and more votes than were.
  """
  recorded: dict[tuple[str, str], list[RecordedReply]] = {}
  for row in rows:
    recorded.setdefault((row.prompt_id, row.answer), []).append(row)
  asked: dict[tuple[str, str, str], int] = {}

  def verdict(question: judge.Question) -> Verdict:
    thinks = isinstance(question, judge.FilterQuestion)
    thought = question.thought if isinstance(question, judge.FilterQuestion) else ""
    id, answer = question.prompt.id, question.answer
    key = id, thought, answer
    draw = asked[key] = asked.get(key, -1) + 1
    # Its thought may stand behind words that the think format puts in front.
    same = [
      row
      for row in recorded.get((id, answer), [])
      if not thinks or (thought.endswith(row.thought) if row.thought else not thought)
    ]
    have = max(same, key=lambda row: len(row.thought)).votes if same else ()
    if draw >= len(have):
      return Verdict(score=None, reason=f"{len(have)} recorded votes, no more")
    vote = have[draw]
    if not thinks:
      return Verdict(score=vote.answer_score)
    agrees = float(vote.verdict in ("", behaviour.verdict(thought)))
    parts = {"vote": vote.score, "blind_verdict_agrees": agrees}
    return Verdict(score=vote.score * agrees, parts=parts)

  ask = judge.beside_known(lambda questions: [*map(verdict, questions)])
  return judge.Judge(ask, deterministic=False)


def _parse_row(where: str, row: Mapping, said: Mapping[str, str]) -> RecordedReply:
  """A row in any of the shapes."""
  if row.get("messages", "") != "":
    turns, thought, answer = _parse_messages(where, row["messages"])
  elif row.get("response", "") != "":
    turns, thought, answer = [row.get("question")], "", row["response"]
  else:
    turns, thought, answer = [], row.get("thought"), row.get("answer")
  if not isinstance(thought, str) or not isinstance(answer, str):
    raise ValueError(
      f"{where}: wanted thought and answer, messages that end with an assistant's, or "
      f"question and response; the row has {[*row]!r:.120}"
    )
  if not thought and answer.lstrip().startswith(_TAGS.tag):
    thought, answer, malformed = thinking.split_thought(answer, _TAGS)
    if malformed:
      raise ValueError(f"{where}: wanted one think block and an answer: {malformed}")
  name = row.get("prompt_id") or row.get("id")
  if turns:
    name = said.get(_normalized_text(turns)) or name or " / ".join(map(str, turns))[:60]
  if not isinstance(name, str) or not answer.strip():
    raise ValueError(
      f"{where}: wanted a prompt_id and an answer, or the words of a prompt of "
      f"config.data.source, got {row!r:.80}"
    )
  return RecordedReply(
    prompt_id=name,
    thought=thought.strip(),
    answer=answer.strip(),
    votes=tuple(_parse_votes(where, row.get("votes") or ())),
  )


def _parse_messages(where: str, messages: Any) -> tuple[list[str], str, str]:
  """The contents before the reply, its reasoning, and its content."""
  try:
    *before, reply = [dict(message) for message in messages]
    if reply["role"] != "assistant":
      raise KeyError(reply["role"])
    thought = reply.get("reasoning_content") or reply.get("reasoning") or ""
    asked: list[Any] = [parsing.text_of(message["content"]) for message in before]
    if None in asked or any(map(parsing.uses_tools, [*before, reply])):
      raise KeyError("content")
    return asked, thought, parsing.text_of(reply["content"]) or ""
  except (TypeError, KeyError, ValueError):
    raise ValueError(
      f"{where}: wanted messages that end with an assistant's, of text and without "
      f"calls of tools, got {messages!r:.80}"
    ) from None


def _parse_votes(where: str, votes: Any) -> Iterator[Vote]:
  for vote in votes if isinstance(votes, (list, tuple)) else [votes]:
    own = vote if isinstance(vote, Mapping) else {}
    scores: list[Any] = [own.get("score"), own.get("answer_score")]
    scores[1] = scores[0] if parsing.is_empty(scores[1]) else scores[1]
    verdict = own.get("verdict") or ""
    scored = all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in scores)
    if not scored or verdict not in ("", *EXPECTED):
      raise ValueError(
        f"{where}: wanted votes, each with scores in [0, 1], and a verdict of "
        f"{', '.join(EXPECTED)} or none, got {vote!r:.80}"
      )
    score, answer_score = map(float, scores)
    yield Vote(score=score, answer_score=answer_score, verdict=verdict)


def _normalized_text(contents: Iterable[Any]) -> str:
  """The words of a conversation, however they are spaced."""
  return "\0".join(" ".join(str(content).split()) for content in contents)
