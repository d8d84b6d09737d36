"""Tokenizers made here: of bytes, of words, and of the pieces that model files list."""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from dalign.text.chat_template import Tokenizer

CHATML = (
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
  "{{ '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
  """259 ids: ChatML's three control tokens, then one for each byte. Pad is the stop."""
  control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  symbols = control + sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = byte_level(symbols, [], control)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  return Tokenizer.of(backend, CHATML, bos_id=1, eos_id=2, pad_id=2)


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
  """A token for each of some words, which white space tells apart, one for all others,
  and four control tokens of a chat. Pad is the stop."""
  control = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
  vocab = {word: i for i, word in enumerate(["<unk>", *words])}
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(control)
  template = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
  )
  end = backend.get_vocab()[control[0]]
  return Tokenizer.of(backend, template, bos_id=None, eos_id=end, pad_id=end)


Symbols = Sequence[str | None]  # in the order of their ids; None is an id without one


def byte_level(
  symbols: Symbols, merges: list[tuple[str, ...]], control: Iterable[str]
) -> tokenizers.Tokenizer:
  """A GPT-2-like backend whose ids are the order of `symbols`."""
  backend = _bpe(symbols, merges)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(
    [tokenizers.AddedToken(name, special=True, normalized=False) for name in control]
  )
  return backend


def pieces(
  symbols: Symbols,
  scores: Sequence[float],
  control: Iterable[str],
  *,
  space_in_front: bool,
) -> tokenizers.Tokenizer:
  """A SentencePiece backend of the pair-merging kind, whose ids are the order of
  `symbols`: of two neighbours that are a piece together, those with the highest score
  are merged first. Spaces are part of words, unknown characters become bytes; a text
  may be read as if a space stood in front of it, also behind a control token."""
  score_of = dict(zip(symbols, scores, strict=True))
  found: list[tuple] = []
  for whole in filter(None, symbols):
    for at in range(1, len(whole)):
      left, right = whole[:at], whole[at:]
      if left in score_of and right in score_of:
        found.append((-score_of[whole], len(found), (left, right)))
  merges = [pair for _, _, pair in sorted(found)]
  backend = _bpe(symbols, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
  steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
  backend.normalizer = normalizers.Replace(" ", "\u2581")
  if space_in_front:
    both = [normalizers.Prepend("\u2581"), backend.normalizer]
    backend.normalizer = normalizers.Sequence(both)
    steps.append(decoders.Strip(" ", 1, 0))
  backend.decoder = decoders.Sequence(steps)
  backend.add_special_tokens(
    [tokenizers.AddedToken(name, special=True, normalized=False) for name in control]
  )
  return backend


def begin_with(backend: tokenizers.Tokenizer, bos: int) -> None:
  """Has a backend put the token `bos` in front of a whole text."""
  name = backend.id_to_token(bos) or ""
  backend.post_processor = processors.TemplateProcessing(
    single=[name, "$A"], special_tokens=[(name, bos)]
  )


def _bpe(symbols, merges, **more) -> tokenizers.Tokenizer:
  vocab = {symbol: i for i, symbol in enumerate(symbols) if symbol is not None}
  try:
    return tokenizers.Tokenizer(models.BPE(vocab, merges, **more))
  except Exception as error:  # tokenizers raises no narrower class
    raise ValueError(f"merges that the vocabulary does not know: {error}") from error
