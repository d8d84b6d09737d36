"""Chat templates: conversations to token ids, with control tokens out of reach.

Pure: values in, values out. Knows nothing of models, judges, specs or files.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import re
from typing import Any

import tokenizers

from dalign.text import packing
from dalign.text import templates
from dalign.text import thinking
from dalign.types import Turn

ROLES = ("system", "user", "assistant")

# The symbol of each byte in vocabularies of bytes, as GPT-2 has them.
_SHOWN = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [b for b in range(256) if b not in _SHOWN]
_BYTES = [chr(b if b in _SHOWN else 256 + _HIDDEN.index(b)) for b in range(256)]
_SURROGATES = re.compile("[\ud800-\udfff]")
# Noncharacters first: no text should hold them. Then the private use area.
_MARKS = [chr(c) for c in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
  """A `tokenizers` backend and what a chat with its model needs. Make it with `of`.

  `special` maps every control token to its id. `stop_ids` are the tokenizer's own end
  of text, the token with which the chat template ends a turn, and those that a model's
  generation_config.json names, in that order. `end_id` is the one that an assistant's
  turn ends with. `pad_id` may equal one of them. Where it `folds`, its template takes
  no system turn, and `render_chat` puts what one says in front of the first user turn.
  `date` (2026-11-27) is what the chat template is told is today, by default the day on
  which it is rendered. The backend is taken over: its padding, truncation and reading
  of control tokens are switched off. A character of which its vocabulary lacks a byte
  (for SmolLM2 some ASCII control characters) is read as U+FFFD; transformers drops the
  byte. ValueError where U+FFFD is lacking too.
  """

  backend: tokenizers.Tokenizer
  chat_template: str
  special: dict[str, int]
  bos_id: int | None
  stop_ids: tuple[int, ...]
  end_id: int
  pad_id: int
  folds: bool = False
  date: str = ""
  _anchor: list[int] = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    self.backend.no_padding()
    self.backend.no_truncation()
    for name in (*self.special, *self._tags):
      if len(name) < 2:
        raise ValueError(
          f"control token {name!r} has one character, and text that holds it could not "
          "be told from it; give it a longer name in the tokenizer"
        )
    object.__setattr__(self, "_anchor", _anchor(self.backend, self.special))
    self.backend.encode_special_tokens = True
    unknown = getattr(self.backend.model, "unk_token", None)  # any text may be that
    for name, token in self._controls.items():
      if (
        name != unknown
        and token in self._plain.encode(name, add_special_tokens=False).ids
      ):
        raise ValueError(
          f"this tokenizer builds its control token {name!r} out of ordinary text, so "
          "a user could write it; use a tokenizer whose merges do not reach it"
        )
    mark = self.backend.encode("\ufffd", add_special_tokens=False).ids
    if not mark or not self._missing_bytes.isdisjoint("\ufffd".encode()):
      raise ValueError(
        "this tokenizer drops characters that its vocabulary lacks, and has no token "
        "for them: wanted one of bytes, or with an unknown token"
      )

  @classmethod
  def of(
    cls,
    backend: tokenizers.Tokenizer,
    chat_template: str,
    *,
    bos_id: int | None,
    eos_id: int,
    pad_id: int | None = None,
    stop_ids: Sequence[int] = (),
  ) -> "Tokenizer":
    """Reads control tokens off the backend, and off the template how a turn ends and
    whether it takes a system turn.

    `stop_ids` are further ones that end a completion. Without a `pad_id` the end of
    text pads. Raises ValueError for a template that does not compile, or does not take
    a user turn and an assistant turn.
    """
    for name, i in {"bos": bos_id, "eos": eos_id, "pad": pad_id}.items():
      if i is not None and not (_is_id(i) and backend.id_to_token(i)):
        raise ValueError(f"{name}_token_id: wanted the id of a token, got {i!r}")
    for i in stop_ids:
      if not _is_id(i):
        raise ValueError(f"eos_token_id: wanted ids of tokens, got {i!r}")
    added = backend.get_added_tokens_decoder()
    draft = cls(
      backend=backend,
      chat_template=chat_template,
      special={token.content: i for i, token in sorted(added.items()) if token.special},
      bos_id=bos_id,
      stop_ids=(eos_id,),
      end_id=eos_id,
      pad_id=eos_id if pad_id is None else pad_id,
    )
    if chat_template:
      end, folds = _turn_end(draft), not _takes_system(draft)
      draft = dataclasses.replace(draft, end_id=end, folds=folds)
    ends = dict.fromkeys((eos_id, draft.end_id, *stop_ids))
    return dataclasses.replace(draft, stop_ids=tuple(ends))

  def with_tags(self, text: str) -> "Tokenizer":
    """A tokenizer for which the control tokens that `text` names are tags, as <think>
    is: `encode` reads them, `decode` writes them, and they end nothing. System and user
    turns still cannot spell them. Harmony's channels are such."""
    names = {name for name in self._controls if name in text}
    gone = {self._controls[name] for name in names}
    if not gone & {*self.special.values(), *self.stop_ids}:
      return self
    made = json.loads(self.backend.to_str())
    for token in made["added_tokens"]:
      token["special"] = token["special"] and token["content"] not in names
    unread = {name: i for name, i in self.special.items() if name not in names}
    stop_ids = tuple(i for i in self.stop_ids if i not in gone)
    if not stop_ids:
      raise ValueError(f"{text!r} names every token that could end a completion")
    return dataclasses.replace(
      self,
      backend=tokenizers.Tokenizer.from_str(json.dumps(made)),
      special=unread,
      stop_ids=stop_ids,
      end_id=stop_ids[0] if self.end_id in gone else self.end_id,
    )

  def without_opened_thought(self, tag: str) -> "Tokenizer":
    """A tokenizer whose template leaves it to others to open a thought: if it writes
    `tag` where a reply is to follow, that is left out, and what comes behind it.
    ValueError where it opens one with another tag."""
    turns = [Turn(role="user", content="ask")]
    before, after = (_render(self, turns, prompt)[0] for prompt in (False, True))
    front = packing.common_prefix(before, after)
    at = after.find(tag, front)
    if at < 0:
      other = thinking.OPENS.search(after, front)
      if other and not thinking.CLOSES.search(after, other.end()):
        raise ValueError(
          f"config.think.open: the chat template opens a thought with {other[0]!r}, "
          f"and {tag!r} would stand inside it; give config.think its tags"
        )
      return self
    template = templates.without_thought_opening(self.chat_template)
    if template == self.chat_template:
      template = templates.without_end(template, after[at:])
    return dataclasses.replace(self, chat_template=template)

  def with_opened_thought(self, think: thinking.ThinkFormat) -> "Tokenizer":
    """A tokenizer whose template also writes the opening of the thought that is to
    follow, for those who know of no `think`; `without_opened_thought` takes it off."""
    template = templates.with_thought_opening(self.chat_template, think)
    return dataclasses.replace(self, chat_template=template)

  @functools.cached_property
  def ids(self) -> tuple[int, ...]:
    """The ids of all tokens, control tokens included, in order: there may be gaps."""
    return tuple(sorted(set(self.backend.get_vocab(with_added_tokens=True).values())))

  def encode(self, text: str) -> list[int]:
    """Ids of `text` alone: no BOS, and a control token's name is read as plain text.

    Tags that are tokens but not control tokens, such as Qwen3's <think>, are read.
    """
    return self._ids(self.backend, text)

  def document(self, text: str) -> list[int]:
    """Ids of `text` as a text without a chat: with what the tokenizer itself puts
    around one, such as BOS, and nothing of it read as a control token or a tag."""
    return self._ids(self._plain, text, add_special_tokens=True)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids` without control tokens."""
    return self.backend.decode(list(map(int, ids)), skip_special_tokens=True)

  @functools.cached_property
  def _tags(self) -> dict[str, int]:
    """Tokens the template writes that are not control tokens, such as <think>."""
    added = self.backend.get_added_tokens_decoder()
    return {
      token.content: i
      for i, token in sorted(added.items())
      if not token.special
      and token.content in self.chat_template
      and not token.content.isspace()
    }

  @functools.cached_property
  def _controls(self) -> dict[str, int]:
    return self.special | self._tags

  @functools.cached_property
  def _control_pattern(self) -> re.Pattern[str]:
    """Matches control tokens and tags, with the white space that they swallow."""
    parts = []
    added = self.backend.get_added_tokens_decoder()
    for name in sorted(self._controls, key=len, reverse=True):
      token = added[self._controls[name]]
      # Only from its start, lest a long run is tried from each of its characters.
      left, right = r"(?:(?<!\s)\s+)?" * token.lstrip, r"\s*" * token.rstrip
      parts.append(left + re.escape(name) + right)
    return re.compile("|".join(parts) or "(?!)")

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    """A backend that reads neither control tokens nor tags."""
    if not self._tags:
      return self.backend
    plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
    plain.add_special_tokens(
      [tokenizers.AddedToken(name, special=True) for name in self._tags]
    )
    plain.encode_special_tokens = True
    return plain

  @functools.cached_property
  def _missing_bytes(self) -> frozenset[int]:
    """The bytes that a vocabulary of bytes lacks."""
    if "ByteLevel" not in repr(self.backend.decoder):
      return frozenset()
    symbols = enumerate(_BYTES)
    return frozenset(b for b, s in symbols if self.backend.token_to_id(s) is None)

  def _ids(
    self, backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool = False
  ) -> list[int]:
    """Ids of a text, in which what the vocabulary has no bytes for is U+FFFD."""
    text, lost = characters(text), self._missing_bytes
    if not lost.isdisjoint(text.encode()):
      kept = (c if lost.isdisjoint(c.encode()) else "\ufffd" for c in text)
      text = "".join(kept)
    return backend.encode(text, add_special_tokens=add_special_tokens).ids

  def _control_id(self, match: re.Match[str]) -> int:
    """The id of what `_control_pattern` matched."""
    name = match[0] if match[0] in self._controls else match[0].strip()
    return self._controls[name]

  def _encode_piece(self, text: str, *, first: bool) -> list[int]:
    """Ids of one run of plain text of a rendered chat."""
    if not text:
      return []
    if first or not self._anchor:
      return self._ids(self._plain, text)
    ids = self._ids(self._plain, "\n" + text)
    if ids[: len(self._anchor)] != self._anchor:
      return self._ids(self._plain, text)
    return ids[len(self._anchor) :]

  @functools.cached_property
  def _variables(self) -> dict[str, str | None]:
    """What a template may call bos_token, eos_token and pad_token."""
    ids = {"bos": self.bos_id, "eos": self.stop_ids[0], "pad": self.pad_id}
    return {
      f"{name}_token": self.backend.id_to_token(i)
      for name, i in ids.items()
      if i is not None
    }


def characters(text: str) -> str:
  """A text whose lone surrogates, which are no characters, are U+FFFD."""
  return _SURROGATES.sub("\ufffd", text)


def _is_id(x: Any) -> bool:
  return type(x) is int and 0 <= x < 2**31


def _anchor(backend: tokenizers.Tokenizer, special: Mapping[str, int]) -> list[int]:
  """Ids of a new line where text after a control token is not as at the start, or [].

  Sentencepiece-like tokenizers put a space before the first word of a text alone.
  """
  if not special:
    return []
  name, token = next(iter(special.items()))
  backend.encode_special_tokens = False
  after = backend.encode(name + "a b", add_special_tokens=False).ids
  alone = backend.encode("a b", add_special_tokens=False).ids
  line = backend.encode("\n", add_special_tokens=False).ids
  return [] if after == [token, *alone] else line


def render_chat(
  tok: Tokenizer,
  turns: Sequence[Turn],
  *,
  add_generation_prompt: bool = True,
  kept_tags: Sequence[str] = (),
) -> list[int]:
  """Ids of a conversation under the tokenizer's chat template.

  Control tokens come from the template alone. Where a turn's content spells one it is
  encoded as ordinary text; the same holds in system and user turns for tags the
  template uses (<think>), which an assistant turn may write. For all other content the
  ids are those of `apply_chat_template` in transformers. No BOS is added to what the
  template writes, and a doubled one at the front becomes one. Templates may take the
  thought out of an assistant's turn, but not where `kept_tags` has its tags. All system
  turns are one, in front, or part of the user's turn (`templates.merged`, `folded`).

  Raises ValueError for an unknown role, and where the template refuses the turns or
  leaves out what one of them says.
  """
  text, mark = _render(tok, turns, add_generation_prompt, kept_tags)
  ids, at = [], 0
  for match in tok._control_pattern.finditer(text):
    piece = text[at : match.start()].replace(mark, "")
    ids += tok._encode_piece(piece, first=at == 0)
    ids.append(tok._control_id(match))
    at = match.end()
  ids += tok._encode_piece(text[at:].replace(mark, ""), first=at == 0)
  while tok.bos_id is not None and ids[:2] == [tok.bos_id] * 2:
    del ids[0]
  return ids


def _render(
  tok: Tokenizer, turns: Sequence[Turn], prompt: bool, kept_tags: Sequence[str] = ()
) -> tuple[str, str]:
  """The rendered text and the mark that breaks control tokens in its content."""
  for turn in turns:
    if turn.role not in ROLES:
      raise ValueError(f"a turn's role is one of {ROLES}, got {turn.role!r}")
  if not turns:
    raise ValueError("a conversation has at least one turn, got none")
  if not tok.chat_template:
    raise ValueError("this tokenizer has no chat template; use an instruction model")
  turns = templates.merged(turns)
  if tok.folds:
    turns = templates.folded(turns)
  taken = set(tok.chat_template).union(*(turn.content for turn in turns))
  free = [m for m in _MARKS if m not in taken]
  if len(free) <= len(kept_tags):
    raise ValueError("a conversation uses every private character there is")
  mark, unseen = free[0], list(zip(kept_tags, free[1:], strict=False))
  messages = []
  for turn in turns:
    content: str = turn.content
    kept: tuple[str, ...] = ()
    if turn.role == "assistant":
      kept = tuple(tok._tags)
      for tag, sign in unseen:  # else a template takes the thought out
        content = content.replace(tag, sign)
    content = templates.break_controls(content, tuple(tok._controls), kept, mark)
    messages.append({"role": turn.role, "content": content})
  text = templates.render(
    tok.chat_template,
    messages,
    date=tok.date,
    add_generation_prompt=prompt,
    **tok._variables,
  )
  templates.check_written(text, messages)
  for tag, sign in unseen:
    text = text.replace(sign, tag)
  return text, mark


_ASK, _REPLY = Turn(role="user", content="ask"), Turn(role="assistant", content="REPLY")


def _turn_end(tok: Tokenizer) -> int:
  """The first control token that the template writes after an assistant's words: some
  write none before the next turn begins. The end of text where there is none."""
  for turns in ([_ASK, _REPLY], [_ASK, _REPLY, _ASK]):
    text, _ = _render(tok, turns, False)
    if found := tok._control_pattern.search(text, text.rfind(_REPLY.content)):
      return tok._control_id(found)
  return tok.end_id


def _takes_system(tok: Tokenizer) -> bool:
  """Whether the template writes a system turn, of a chat that is to be answered and of
  one that has been."""
  rules = Turn(role="system", content="Some rules.")
  try:
    _render(tok, [rules, _ASK], True)
    _render(tok, [rules, _ASK, _REPLY], False)
  except ValueError:
    return False
  return True
