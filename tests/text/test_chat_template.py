"""Tokens and chats: what must come out, and what never may."""

import dataclasses
from unittest import mock

import hypothesis
from hypothesis import strategies as st
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.runs import store
from dalign.text import chat_template
from dalign.text import templates
from dalign.text import thinking
from dalign.text import vocab
from dalign.text.chat_template import render_chat
from dalign.types import Prompt
from dalign.types import Turn
from tests.helpers import ROOT

TINY = vocab.tiny_tokenizer()
THINK = thinking.ThinkFormat(open="<think>\nThe user", close="</think>")
TEMPLATES = {
  "chatml": vocab.CHATML,
  "bos, trim, generation": (
    "{{- bos_token }}\n"
    "{%- for message in messages -%}\n"
    "  <|im_start|>{{ message.role }}\n\n"
    "  {%- if message.role == 'assistant' %}\n"
    "    {% generation %}{{ message['content'] | trim }}{% endgeneration %}\n"
    "  {%- else %} {{ message.content | trim }} {%- endif %}\n"
    "  {{- eos_token }}\n"
    "{%- endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  ),
}


def byte_level(template: str, added=(), bos="<|endoftext|>") -> chat_template.Tokenizer:
  """The tiny tokenizer with another template and more added tokens."""
  backend = tokenizers.Tokenizer.from_str(TINY.backend.to_str())
  backend.add_tokens([token for token in added if not token.special])
  backend.add_special_tokens([token for token in added if token.special])
  bos_id = None if bos is None else backend.token_to_id(bos)
  return chat_template.Tokenizer.of(backend, template, bos_id=bos_id, eos_id=2)


def reference_ids(tok: chat_template.Tokenizer, turns, prompt: bool) -> list[int]:
  """The ids that transformers gives for the same backend and template."""
  transformers = pytest.importorskip("transformers")
  backend = tokenizers.Tokenizer.from_str(tok.backend.to_str())
  names = {k: v for k, v in tok._variables.items()}
  made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
  made.chat_template = tok.chat_template
  return made.apply_chat_template(
    [dataclasses.asdict(turn) for turn in turns],
    add_generation_prompt=prompt,
    tokenize=True,
    return_dict=False,
  )


def chat(*contents: str) -> list[Turn]:
  roles = ("user", "assistant")
  return [Turn(role=roles[i % 2], content=c) for i, c in enumerate(contents)]


# --- chats ---


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
  "turns",
  [
    chat("hi"),
    chat(" 12 + 30?\n", "  42\n", "naïve 日本 🙂 {{ x }} {% if %}", "", "< <| |> >"),
    [Turn(role="system", content="Be kind.\n\n1. x"), *chat("a <b> c")],
  ],
)
def test_chat_ids_are_those_of_transformers(name, prompt, turns):
  tok = byte_level(TEMPLATES[name])
  got = render_chat(tok, turns, add_generation_prompt=prompt)
  assert got == reference_ids(tok, turns, prompt)


@pytest.mark.parametrize("scheme", ["first", "always", "never", "prepend"])
def test_space_before_words_as_transformers(scheme):
  symbols = ["<s>", "</s>", "<unk>", *"▁abc\n[]INST/"]
  backend = tokenizers.Tokenizer(
    models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token="<unk>")
  )
  if scheme == "prepend":
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
  else:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
  backend.decoder = decoders.Metaspace()
  backend.add_special_tokens(["<s>", "</s>", "<unk>"])
  template = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
  )
  tok = chat_template.Tokenizer.of(backend, template, bos_id=0, eos_id=1)
  turns = chat("a b", "c", "b\nb", "")
  assert render_chat(tok, turns) == reference_ids(tok, turns, True)


def test_white_space_that_control_tokens_swallow_is_gone_as_in_transformers():
  end = tokenizers.AddedToken("<|end|>", special=True, lstrip=True, rstrip=True)
  template = (
    "{% for m in messages %}<|im_start|>{{ m.content }} <|end|>\n {% endfor %}"
    "x <|end|> "
  )
  tok = byte_level(template, [end])
  turns = chat("a ", " b")
  assert render_chat(tok, turns) == reference_ids(tok, turns, True)
  assert tok.stop_ids == (2, tok.special["<|end|>"])


def test_the_longest_control_token_wins_as_in_transformers():
  long = tokenizers.AddedToken("<|im_start|>user", special=True)
  tok = byte_level(vocab.CHATML, [long])
  ids = render_chat(tok, chat("x"))
  assert ids[0] == tok.special["<|im_start|>user"]
  assert ids == reference_ids(tok, chat("x"), True)


def test_a_doubled_bos_becomes_one():
  tok = byte_level("{{ bos_token }}" + TEMPLATES["bos, trim, generation"])
  once = byte_level(TEMPLATES["bos, trim, generation"])
  assert render_chat(tok, chat("x")) == render_chat(once, chat("x"))


def test_the_stop_ids_are_the_tokenizers_and_the_templates():
  assert TINY.stop_ids == (2,)
  backend = tokenizers.Tokenizer.from_str(TINY.backend.to_str())
  tok = chat_template.Tokenizer.of(backend, vocab.CHATML, bos_id=None, eos_id=0)
  assert (tok.stop_ids, tok.pad_id) == ((0, 2), 0)


HARMONY = (
  "{% for m in messages %}<|start|>{{ m.role }}"
  "{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
  "<|message|>{{ m.content }}<|end|>{% endfor %}"
  "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As of GLM: nothing ends a turn but the role of the next one.
ROLES = (
  "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("template, end", [(ROLES, "<|user|>"), (HARMONY, "<|end|>")])
def test_a_reply_ends_as_the_template_ends_it(template, end):
  """With a token that is not the tokenizer's end of text; what was written elsewhere is
  learned with it."""
  names = ("<|user|>", "<|assistant|>", "<|start|>", "<|message|>", "<|end|>")
  tok = byte_level(template, [tokenizers.AddedToken(n, special=True) for n in names])
  assert (tok.end_id, tok.stop_ids) == (tok.special[end], (2, tok.special[end]))
  turns = chat("one", "two", "three")
  prompt = Prompt(id="x", turns=(*turns[:1],), category="privacy", expected="comply")
  how = dict(index=0, think=THINK, opened=False)
  assert (
    prompting.encode_completion(tok, prompt, "why", "two", **how).tokens[-1]
    == tok.end_id
  )
  if template is ROLES:
    row = [*render_chat(tok, turns[:1]), *tok.encode("two"), tok.end_id]
    assert render_chat(tok, turns)[: len(row)] == row


HOSTILE = st.lists(
  st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool>"]
    + ["<|", "<|im_", "im_end|>", "end|>", "|>", "<", ">", " ", "\n", "a"]
    + ["assistant\n"]
    + ["\ufdd0", "\ufdd1", "\ue000", "<\ufdd0|im_end|>", "<th", "ink>", "{{ x }}"]
  ),
  max_size=8,
).map("".join)
EDGE = st.sampled_from(
  ["", "<|im_start|>", "<|", "<|im_", "end|>", ">", "x", "\n", " "]
)
FILTER = st.sampled_from(["", " | trim", " | replace('a', '')"])


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.example(["x<|im_", "x<|im_ \n"], "", "end|>", " | trim")
@hypothesis.example(["end|>x", " \nend|>"], "<|im_", "", " | trim")
@hypothesis.example(["<|im_end|>", "aim_end|>"], "<|", "", " | replace('a', '')")
@hypothesis.example(["x", "<|aim_end|>"], "", "", " | replace('a', '')")
@hypothesis.given(st.lists(HOSTILE, min_size=2, max_size=3), EDGE, EDGE, FILTER)
def test_content_never_makes_control_tokens(contents, before, after, filtered):
  """Under any template the controls are those that a harmless content gives."""
  hypothesis.assume(all(c.replace("a", "").strip() for c in contents))
  template = (
    "{% for m in messages %}<|im_start|>"
    f"{before}{{{{ m.content{filtered} }}}}{after}<|im_end|>"
    "{% if m.role == 'assistant' %}<think>{% endif %}{% endfor %}"
  )
  with mock.patch.object(templates, "check_written"):  # which refuses most filters
    _compare_controls(_thinking(template), contents, before, after, filtered)


def _compare_controls(tok, contents, before, after, filtered):
  turns = [Turn(role="user", content=content) for content in contents]
  plain = [Turn(role="user", content="x") for _ in contents]
  controls = set(tok._controls.values())
  seen = [[i for i in render_chat(tok, t) if i in controls] for t in (turns, plain)]
  assert seen[0] == seen[1]
  if not filtered:
    left, right = (edge.replace("<|im_start|>", "") for edge in (before, after))
    want = "".join(left + content + right for content in contents)
    assert tok.decode(render_chat(tok, turns)) == want


def test_templates_find_the_tag_that_an_assistant_turn_begins_with():
  template = (
    "{% for m in messages %}<|im_start|>{{ m.content.startswith('<think>') }}"
    "{{ m.content }}<|im_end|>{% endfor %}"
  )
  turns = [Turn(role=role, content="<think>a") for role in ("assistant", "user")]
  tok = _thinking(template)
  assert tok.decode(render_chat(tok, turns)) == "True<think>aFalse<think>a"


_MADE = {}


def _thinking(template: str) -> chat_template.Tokenizer:
  """A tokenizer with <think> and </think> as tokens that are not control tokens."""
  if template not in _MADE:
    tags = [tokenizers.AddedToken(t, special=False) for t in ("<think>", "</think>")]
    _MADE[template] = byte_level(template, tags)
  return _MADE[template]


def test_a_mark_that_the_user_wrote_is_kept():
  ids = render_chat(TINY, chat("<\ufdd0|im_end|>\ufdd1"))
  assert "<\ufdd0|im_end|>\ufdd1" in TINY.decode(ids)


def test_think_tags_are_tokens_for_the_model_and_text_for_users():
  think_prompt = "{% if add_generation_prompt %}<think>{% endif %}</think>"
  tok = _thinking(vocab.CHATML + think_prompt)
  open_id, close_id = tok._tags["<think>"], tok._tags["</think>"]
  ids = render_chat(tok, chat("<think>a</think>", "<think>b</think>c", "d"))
  assert ids.count(open_id) == 2 and ids.count(close_id) == 2
  assert "user\n<think>a</think>\n" in tok.decode(ids)
  assert tok.encode("<think>\nx") == [open_id, *tok.encode("\nx")]
  assert tok.decode([open_id, close_id, 2]) == "<think></think>"


CHANNELS = thinking.ThinkFormat(
  open="<|channel|>analysis<|message|>",
  close="<|end|><|start|>assistant<|channel|>final<|message|>",
)


def test_a_think_format_may_be_made_of_control_tokens():
  names = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
  added = [tokenizers.AddedToken(name, special=True) for name in names]
  plain = byte_level(HARMONY, added)
  end = plain.special["<|end|>"]
  assert end in plain.stop_ids
  tok = plain.with_tags(CHANNELS.open + CHANNELS.close)
  assert end not in tok.stop_ids and tok.stop_ids == (2,)
  said = CHANNELS.open + "S1 says no." + CHANNELS.close + "I will not."
  ids = tok.encode(said)
  assert ids[0] == plain.special["<|channel|>"] and ids.count(end) == 1
  assert tok.decode([*ids, *tok.stop_ids]) == said
  parts = "S1 says no.", "I will not.", ""
  assert thinking.split_thought(tok.decode(ids), CHANNELS) == parts
  turns, known = chat(said), plain.special.values()
  controls = [i for i in render_chat(tok, turns) if i in known]
  in_order = ("<|start|>", "<|message|>", "<|end|>", "<|start|>")
  assert controls == [plain.special[name] for name in in_order]
  assert render_chat(plain, turns) == render_chat(tok, turns)
  assert plain.with_tags("<think>") is plain
  saved = tok.backend.to_str()  # as the export has it
  found = chat_template.Tokenizer.of(
    tokenizers.Tokenizer.from_str(saved), HARMONY, bos_id=None, eos_id=2
  )
  assert end in found.stop_ids  # by the template
  assert found.with_tags(CHANNELS.open + CHANNELS.close).stop_ids == (2,)
  with pytest.raises(ValueError, match="every token that could end"):
    TINY.with_tags("<|im_end|><|endoftext|>")


@pytest.mark.parametrize(
  "template, turns, message",
  [
    (vocab.CHATML, [], "at least one turn"),
    (vocab.CHATML, [Turn(role="<|im_end|>", content="x")], "role is one of"),
    ("", chat("x"), "no chat template"),
    (
      "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
      + vocab.CHATML,
      chat("bad"),
      "no bad",
    ),
  ],
)
def test_chats_that_cannot_be_rendered_say_why(template, turns, message):
  with pytest.raises(ValueError, match=message):
    render_chat(byte_level(template), turns)


SPOKEN = [Turn(role="system", content="The policy."), *chat("one", "two", "three")]
# As of Mistral: what the system says stands in the last turn, if that is a user's.
LAST_USER = (
  "{% set front = messages[0].content if messages[0].role == 'system' else '' %}"
  "{% for m in messages %}{% if m.role == 'user' %}"
  "<|im_start|>{{ front if loop.last }}{{ m.content }}<|im_end|>"
  "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# As of R1 and Qwen3: no thoughts in earlier turns, and the next one is opened.
REASONS = (
  "{% for m in messages %}{% set c = m.content %}"
  "{% if m.role == 'assistant' and '</think>' in c %}"
  "{% set c = c.split('</think>')[-1] %}{% endif %}"
  "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


# As of Gemma 2: no system turn, and the others by turns.
NO_SYSTEM = (
  "{% for m in messages %}"
  "{% if m.role != ('assistant' if loop.index0 % 2 else 'user') %}"
  "{{ raise_exception('wanted user and assistant by turns') }}{% endif %}"
  "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, LAST_USER])
def test_a_template_without_system_turns_has_them_in_the_first_user_turn(template):
  """Whether it refuses one or would lose it once a reply has come."""
  tok = byte_level(template)
  plain = chat("The policy.\n\none", "two", "three")
  assert tok.folds
  for n, prompt in ((2, True), (3, False), (4, True)):
    ids = render_chat(tok, SPOKEN[:n], add_generation_prompt=prompt)
    assert ids == reference_ids(tok, plain[: n - 1], prompt)
  assert render_chat(tok, SPOKEN[:1]) == reference_ids(tok, chat("The policy."), True)


def test_system_turns_are_one_and_the_policy_is_its_first_words():
  spec = specs.load(store.read_spec_files(ROOT / "specs"))
  own = [Turn(role="system", content="Speak as a pirate."), *chat("hi", "ho", "hm")]
  prompt = Prompt(id="x", turns=(*own,), category="privacy", expected="comply")
  how = dict(detail="clauses", worked=1, think=THINK)
  told = prompting.teach(spec, prompt, **how)
  said = TINY.decode(render_chat(TINY, told))
  bare = dataclasses.replace(prompt, turns=(*own[1:],))
  system, *rest = prompting.teach(spec, bare, **how)
  both = Turn(role="system", content=f"{system.content}\n\n{own[0].content}")
  assert said == TINY.decode(render_chat(TINY, [both, *rest]))
  assert render_chat(TINY, own) == reference_ids(TINY, own, True)
  last = [*own[1:], Turn(role="system", content="")]
  assert render_chat(TINY, [own[0], *last]) == reference_ids(TINY, own, True)


def test_what_a_template_leaves_out_is_refused():
  short = vocab.CHATML.replace("message['content']", "message['content'][:5]")
  with pytest.raises(ValueError, match=r"leaves out what the user turn says \(The"):
    render_chat(byte_level(short), SPOKEN)
  with pytest.raises(ValueError, match="leaves out what the user turn says"):
    render_chat(byte_level(short), chat("one and two"))
  with pytest.raises(ValueError, match="leaves out what the assistant turn says"):
    render_chat(byte_level(short), chat("one", "two and three", "four"))


OPENINGS = [
  thinking.ThinkFormat(open=open_, close=close)
  for open_, close in (
    ("<think>\n", "</think>"),
    ('<think>\n"{prompt}"', "("),
    ('<t>\n\\n {{ x }} "{prompt}", {prompt}.', "=a="),
  )
]


def test_a_thought_that_a_template_opens_with_another_tag_is_refused():
  tok = byte_level(REASONS)
  with pytest.raises(ValueError, match="opens a thought with '<think>'"):
    tok.without_opened_thought("<reasoning>")
  shut = REASONS.replace("<think>\n", "<think>\n\n</think>\n")
  # a thought that has ended is none
  byte_level(shut).without_opened_thought("<reasoning>")
  opened = TINY.with_opened_thought(OPENINGS[0])
  with pytest.raises(ValueError, match="opens a thought with '<think>'"):
    opened.without_opened_thought("<reasoning>")


@pytest.mark.parametrize("tags", [False, True])
def test_a_thought_is_opened_once_and_earlier_ones_are_kept(tags):
  """Whatever the template does, whether its tags are tokens or text."""
  names = [tokenizers.AddedToken(t) for t in ("<think>", "</think>")] if tags else []
  tok = byte_level(REASONS, names)
  turns = chat("one", "<think>\nmine\n</think>\n\ntwo", "three")
  own = tok.without_opened_thought("<think>")
  read = prompting.render_prompt(own, turns, THINK, keep_thoughts=True)
  said = tok.backend.decode(list(read), skip_special_tokens=False)
  assert said.endswith("three<|im_end|>\n<|im_start|>assistant\n<think>\nThe user")
  assert said.count("<think>") == 2 and "<think>\nmine\n</think>\n\ntwo<|im_end" in said
  if tags:
    assert list(read).count(tok.backend.token_to_id("<think>")) == 2
  assert own.without_opened_thought("<think>") is own
  silent = prompting.render_prompt(own, turns, None)
  assert tok.backend.decode(list(silent)).endswith("assistant\n")
  # A chat that ends with a reply is as it was, and others read the template as we do.
  plain = chat("one", "two", "three")
  assert render_chat(own, plain) == reference_ids(own, plain, True)
  ends = render_chat(own, plain[:2], add_generation_prompt=False)
  assert ends == reference_ids(tok, plain[:2], False)


LONG = st.tuples(st.integers(50, 70), st.sampled_from(["w ", "<\n", '"\u3000']))
SPACES = st.sampled_from([chr(c) for c in range(0x3001) if chr(c).isspace()])
ASKED = st.lists(
  st.one_of(
    HOSTILE, SPACES, st.text(max_size=3), LONG.map(lambda some: some[0] * some[1])
  ),
  max_size=6,
).map("".join)


@hypothesis.settings(deadline=None)
@hypothesis.given(ASKED, st.sampled_from(OPENINGS), st.sampled_from([*TEMPLATES]))
def test_a_template_opens_a_thought_as_the_sampler_does(asked, think, name):
  """Under transformers, whatever the prompt; and what is opened can be taken off."""
  transformers = pytest.importorskip("transformers")
  asked = chat_template.characters(asked)
  tok = byte_level(TEMPLATES[name])
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(tok.backend.to_str()),
    **tok._variables,
  )
  messages = [dataclasses.asdict(turn) for turn in chat("one", "two", asked)]

  def written(template, messages, prompt=True):
    return made.apply_chat_template(
      messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )

  opens = tok.with_opened_thought(think).chat_template
  before = written(tok.chat_template, messages)
  assert written(opens, messages) == before + think.of(asked).open
  own = templates.render(opens, messages, add_generation_prompt=True, **tok._variables)
  assert own == before + think.of(asked).open
  plain = written(tok.chat_template, messages, False)
  assert written(opens, messages, False) == plain
  parts = [{"type": "text", "text": asked}]
  opening = templates.with_thought_opening("", think)  # few templates take parts
  said = written(opening, [{"role": "user", "content": parts}])
  assert said == think.of(asked).open
  again = tok.with_opened_thought(think).without_opened_thought(think.tag)
  assert written(again.chat_template, messages) == before


def test_a_template_is_told_the_day_of_the_run():
  template = "{{ strftime_now('%d %b %Y, %H:%M') }}" + vocab.CHATML
  tok = byte_level(template)
  assert tok.decode(render_chat(tok, chat("x")))[:11] != "03 Feb 2021"
  tok = dataclasses.replace(tok, date="2021-02-03")
  assert tok.decode(render_chat(tok, chat("x"))).startswith("03 Feb 2021, 00:00")


def test_control_tokens_that_text_can_reach_are_refused():
  symbols = ["<s>", "<", "s", ">", "<s", "</s>"]
  merges = [("<", "s"), ("<s", ">")]
  vocab = {s: i for i, s in enumerate(symbols)}
  backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
  backend.add_special_tokens(["<s>"])
  with pytest.raises(ValueError, match="out of ordinary text"):
    chat_template.Tokenizer.of(backend, "", bos_id=None, eos_id=0)


def test_a_character_without_its_bytes_is_read_as_a_replacement_mark():
  alphabet = {*pre_tokenizers.ByteLevel.alphabet()}

  def without(*bytes_: str) -> chat_template.Tokenizer:
    symbols = ["<end>", *sorted(alphabet - {*bytes_})]
    made = vocab.byte_level(symbols, [], ["<end>"])
    return chat_template.Tokenizer.of(made, vocab.CHATML, bos_id=None, eos_id=0)

  tok = without("\u0104", "\u0130")  # 4, a control character, and 142
  assert tok.decode(tok.encode("a\x04b\u00cfé\u038e\U0001f600")) == (
    "a\ufffdb\u00cfé\ufffd\U0001f600"
  )
  assert "x\ufffdy" in tok.decode(render_chat(tok, chat("x\x04y")))
  with pytest.raises(ValueError, match="drops characters"):
    without("½")  # 189, of the replacement mark
  with pytest.raises(ValueError, match="drops characters"):
    chat_template.Tokenizer.of(
      tokenizers.Tokenizer(models.BPE({"</s>": 0, "a": 1}, [])),
      "",
      bos_id=None,
      eos_id=0,
    )


@hypothesis.given(HOSTILE, st.sampled_from(["</think>", "=", "</t>"]))
def test_a_quoted_prompt_makes_no_control_tokens_and_no_tags(content, close):
  """<think> and </think> are tokens of this tokenizer, as in Qwen3."""
  tok = _thinking(vocab.CHATML + "<think></think>")
  think = thinking.ThinkFormat(open='<think>\n"{prompt}"', close=close)
  turns = (Turn(role="user", content=content),)
  ids = prompting.forced(tok, turns, think)
  assert [i for i in ids if i in tok._controls.values()] == [tok._tags["<think>"]]
  assert prompting.render_prompt(tok, turns, think)[-len(ids) :] == ids
