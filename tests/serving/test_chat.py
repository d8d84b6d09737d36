"""The terminal: what a person types and sees; and what a stream holds back."""

import io
import sys

from hypothesis import given
from hypothesis import strategies as st
import pytest

from dalign.sampling import live
from dalign.serving import assistant
from dalign.serving import chat
from dalign.serving.engine import Engine
from dalign.text import thinking
from dalign.types import Turn
from tests.helpers import examples
from tests.helpers import python

THINK = thinking.ThinkFormat(open="<think>", close="</think>")
PIECES = ("<think>", "</think>", "<", "</th", " ", "\n", "word", "\ufffd", "é", "ink>")


@examples(300)
@given(st.lists(st.sampled_from(PIECES)), st.sampled_from(["<think>", "", " <think>"]))
def test_what_is_shown_is_never_taken_back(pieces, begin):
  """Cut anywhere, thought and answer so far begin those of the whole."""
  written = begin + "".join(pieces)
  thought, answer = thinking.split_partial_thought(written, THINK, complete=True)
  for n in range(len(written)):
    some = thinking.split_partial_thought(written[:n], THINK, complete=False)
    if "\ufffd" not in written[:n].rstrip("\ufffd"):
      assert thought.startswith(some[0]) and answer.startswith(some[1])
    assert (
      not some[1]
      or not written.lstrip().startswith("<think>")
      or ("</think>" in written[:n])
    )


@pytest.mark.parametrize(
  "written, thought, answer",
  [
    ("<think>\nHm. </think>\n\nYes.", "Hm.", "Yes."),
    ("<think>Hm", "Hm", ""),
    ("Yes.", "", "Yes."),
    ("<think>a</think>b</think>c", "a", "b</think>c"),
    ("so <think>a</think>b", "", "so <think>a</think>b"),
  ],
)
def test_a_completion_is_split_at_its_first_closing_tag(written, thought, answer):
  assert thinking.split_partial_thought(written, THINK, complete=True) == (
    thought,
    answer,
  )
  if thinking.split_thought(written, THINK)[2] == "":
    assert thinking.split_thought(written, THINK)[:2] == (thought, answer)


def test_a_stop_that_has_begun_is_held_back():
  assert thinking.stable_prefix("one tw", ("two", "twin")) == "one "
  # whole: no longer held
  assert thinking.stable_prefix("one two", ("two",)) == "one two"
  assert thinking.stable_prefix("é\ufffd\ufffd", ()) == "é"


def test_control_characters_of_a_model_do_not_reach_the_terminal():
  assert (
    chat._strip_controls("a\x1b[2Jb\r\x07c\n\té") == "a\ufffd[2Jb\ufffd\ufffdc\n\té"
  )


@pytest.fixture(scope="module")
def model(workdir) -> assistant.Model:
  return assistant.Model(workdir, "sft")


@pytest.fixture(scope="module")
def engine(model):
  with Engine(model) as engine:
    yield engine


def talk(talking, engine, monkeypatch, capsys, *lines: str) -> tuple[str, str]:
  monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
  chat.Terminal(talking, engine).run()
  return capsys.readouterr()


def test_a_conversation_goes_on_from_its_answers(model, engine):
  talking = chat.Conversation(model)
  *_, first = talking.ask("Is the sky blue?", engine)
  *_, second = talking.ask("Why?", engine)
  turns = (
    Turn(role="user", content="Is the sky blue?"),
    Turn(role="assistant", content=first.answer),
    Turn(role="user", content="Why?"),
  )
  assert second.tokens_in == len(model.read(turns))
  talking.new()
  *_, anew = talking.ask("Why?", engine)
  assert anew.tokens_in == len(model.read(turns[2:])) < second.tokens_in


def test_a_policy_can_stand_in_front(model, engine):
  talking = chat.Conversation(model)
  talking.new("privacy")
  *_, told = talking.ask("Why?", engine)
  prompt = assistant.prompt_of([Turn(role="user", content="Why?")], "privacy")
  turns = model.task.teach(prompt, worked=0)
  assert told.tokens_in == len(model.read(turns))
  with pytest.raises(ValueError, match="no policy 'privat'; there are: .*privacy"):
    talking.new("privat")


def test_a_person_sees_thought_and_answer(model, engine, monkeypatch, capsys):
  lines = "Is the sky blue?", "", "/spec nope", "/what", "/quit", "Not asked"
  out, err = talk(chat.Conversation(model), engine, monkeypatch, capsys, *lines)
  assert out.count("thought  ") == out.count("answer   ") == 1
  assert 'thought  "Is the sky blue?"' in out  # the forced opening
  assert out.endswith(chat.HELP)
  assert "no policy 'nope'" in err and "Not asked" not in out


def test_a_conversation_that_is_too_long_is_said_and_can_be_left(
  model, engine, monkeypatch, capsys
):
  lines = "a " * 9000, "/new", "Hi"
  out, err = talk(chat.Conversation(model), engine, monkeypatch, capsys, *lines)
  assert "send fewer" in err and "answer   " in out


def test_cited_clauses_are_named_with_what_they_say(model):
  talking = chat.Conversation(model)
  asked = "Does PR-D1 allow this?"
  talking._turns = [
    Turn(role="user", content=asked),
    Turn(role="assistant", content=""),
  ]
  clause = model.task.spec.policy("privacy").clauses[0]
  thought = f'The user asks: "{asked}" Clause {clause.id} decides, not XX-D9 or PR-D99.'
  first, *invented = talking.cited(thought)
  assert first == f"{clause.id}: {clause.text}"
  assert invented and all(line.endswith("no such clause") for line in invented)


def hello(model):
  """The tokens of a chat, and how its reply is read."""
  turns = [Turn(role="user", content="Hi")]
  return model.read(turns), lambda heard: model.partial_reply(turns, heard)


def test_an_error_ends_those_who_wait_and_nobody_after_them(model, monkeypatch):
  """As of a device that is out of memory."""
  decode, left = live.run, [MemoryError("no room")]

  def run(sampler, weights, come, **how):
    if left:
      come(True)
      raise left.pop()
    yield from decode(sampler, weights, come, **how)

  monkeypatch.setattr(live, "run", run)
  row, read = hello(model)
  how = {"max_new": 4, "temperature": 0.0}
  with Engine(model) as engine:
    with pytest.raises(MemoryError, match="no room"):
      next(engine.stream(row, read, **how))
    *_, reply = engine.stream(row, read, **how)
  assert reply.finish


def test_who_still_waits_when_the_engine_ends_is_told(model):
  row, read = hello(model)
  with Engine(model) as engine:
    said = engine.stream(row, read, max_new=4000, temperature=1.0, seed=3)
    assert not next(said).finish
  with pytest.raises(ConnectionError, match="nobody answers"):
    for _ in said:
      pass


def test_the_command_talks(workdir):
  command = "-m", "dalign.main", "--mode=chat", f"--workdir={workdir}"
  done = python(*command, input="Is the sky blue?\n")
  assert done.returncode == 0, done.stderr
  assert "answer   " in done.stdout and "stage rl" in done.stderr
