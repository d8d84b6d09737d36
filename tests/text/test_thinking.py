"""Thought and answer: where one ends and the other begins."""

import pytest

from dalign.policy import prompting
from dalign.text import thinking

THINK = thinking.ThinkFormat(open="<think>\nThe user", close="</think>")


@pytest.mark.parametrize(
  "completion, want",
  [
    ("<think>\nThe user asks.</think>\nNo.", ("The user asks.", "No.", "")),
    (" <think>short</think>a ", ("short", "a", "")),
    ("<think>\nThe user asks", ("", "The user asks", "no closing tag")),
    ("<think>a<think>b", ("", "a<think>b", "no closing tag")),
    ("The user</think>x", ("The user", "x", "no opening tag")),
    ("x<think>a</think>b", ("x<think>a", "b", "no opening tag")),
    ("</think><think>a", ("", "<think>a", "no opening tag")),
    ("plain", ("", "plain", "no opening tag")),
    ("", ("", "", "no opening tag")),
    ("<think>a</think>b</think>c", ("a</think>b", "c", "repeated tag")),
    ("<think>a<think>b</think>c", ("a<think>b", "c", "repeated tag")),
    ("<think>a</think>b<think>c", ("a", "b<think>c", "repeated tag")),
    ("<think> \n</think>b", ("", "b", "empty thought")),
    ("<think>\nThe user </think>b", ("The user", "b", "empty thought")),
    ("<think>a</think> \n", ("a", "", "empty answer")),
    ("<think></think>", ("", "", "empty thought")),
  ],
)
def test_split_thought(completion, want):
  assert thinking.split_thought(completion, THINK) == want


@pytest.mark.parametrize(
  "open_, close",
  [("", "</t>"), ("<t>", ""), ("<t>", "a<t>"), ("<t>\n</u>", "</u>"), ("\nx", "</t>")],
)
def test_think_formats_that_cannot_be_parsed_are_refused(open_, close):
  with pytest.raises(ValueError, match="tag"):
    thinking.ThinkFormat(open=open_, close=close)


def test_an_opening_quotes_its_prompt_on_one_line_without_tags():
  think = thinking.ThinkFormat(open='<think>\nAsked: "{prompt}"', close="</think>")
  prompt = 'Say "hi",\n\nthen </think> and\t<tool_call> {prompt}, as 1 < 2.'
  own = think.of(prompt)
  said = "Say 'hi', then and < tool_call> {prompt}, as 1 < 2."
  assert own.open == f'<think>\nAsked: "{said}"'
  assert (own.tag, own.close) == (think.tag, think.close)
  assert think.of("<thi<think>nk> b").start == 'Asked: "< thi nk> b"'
  assert THINK.of(prompt) is THINK


def test_of_a_long_prompt_both_ends_are_quoted():
  think = thinking.ThinkFormat(open="<think>\n{prompt}", close="</think>")
  n = thinking.QUOTED
  fits = [f"w{i}" for i in range(2 * n)]
  assert think.of(" ".join(fits)).start.split() == fits
  long = [*fits[:n], "left", "out", *fits[n:]]
  assert think.of(" ".join(long)).start.split() == [*fits[:n], "...", *fits[n:]]


def test_words_of_its_own_must_follow_a_quoted_prompt():
  think = thinking.ThinkFormat(open='<think>\n"{prompt}"', close="</think>").of("Why?")
  bare = f"{think.open} </think> Since."
  assert thinking.split_thought(bare, think) == ('"Why?"', "Since.", "empty thought")
  own = f"{think.open} I can.</think> Since."
  assert thinking.split_thought(own, think) == ('"Why?" I can.', "Since.", "")


@pytest.mark.parametrize(
  "open_, gap",
  [("<t>", "\n"), ("<t>\n", ""), ("<t>\nThe user", " "), ('<t>\n"{prompt}"', " ")],
)
def test_a_demonstrated_thought_follows_its_opening(open_, gap):
  think = thinking.ThinkFormat(open=open_, close="</t>")
  rest = prompting.format_completion(
    "No policy touches this, so I can answer.", "17.", think
  )
  assert rest == f"{gap}No policy touches this, so I can answer.\n</t>\n\n17."
