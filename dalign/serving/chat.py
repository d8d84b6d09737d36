"""Talks to a run's model in the terminal, the thought apart from the answer.

  python -m dalign.main --mode=chat --workdir=runs/quickstart --stage=sft

After each reply stand the clauses of the specification that the thought cites.
"""

from collections.abc import Generator
import pathlib
import sys

from dalign.config.schema import Config
from dalign.policy import spec as specs
from dalign.serving import assistant
from dalign.serving.engine import Engine
from dalign.text import words
from dalign.types import Turn

HELP = """  /new       a new conversation
  /spec ID   the policy ID in front of it, as in stage 1; /spec alone leaves it out
  /quit      the end, as is Ctrl-D; Ctrl-C ends a reply
"""
DIM, PLAIN = "\033[2m", "\033[0m"


class Conversation:
  """The turns so far, and whether a policy stands in front of them."""

  def __init__(self, model: assistant.Model):
    self._model = model
    self._turns: list[Turn] = []
    self._policy = ""

  def new(self, policy: str = "") -> None:
    """Forgets all turns; ValueError for a policy that the specification lacks."""
    known = {policy.id for policy in self._model.task.spec.policies}
    if policy and policy not in known:
      raise ValueError(f"no policy {policy!r}; there are: {', '.join(sorted(known))}")
    self._turns, self._policy = [], policy

  def ask(self, said: str, engine: Engine) -> Generator[assistant.Reply, None, None]:
    """The reply to what a user says, as it is written; kept once it is whole. Raises
    ValueError where the conversation has become too long."""
    turns = (*self._turns, Turn(role="user", content=said))
    prompt = assistant.prompt_of(turns, self._policy or specs.BENIGN)
    model = self._model
    read = model.task.teach(prompt, worked=0) if self._policy else turns
    told = bool(self._policy)
    row = model.read(read, with_policy=told)
    replies = engine.stream(
      row,
      lambda heard: model.partial_reply(read, heard, with_policy=told),
      max_new=min(model.budget, engine.room(row)),
      temperature=model.temperature,
      top_p=model.top_p,
    )
    for reply in replies:
      yield reply
    self._turns = [*turns, Turn(role="assistant", content=reply.answer)]

  def cited(self, thought: str) -> list[str]:
    """A line for each clause that a thought cites beyond what it quotes."""
    spec, asked = self._model.task.spec, self._turns[-2].content
    own = words.without_prompt_quotes(thought, asked)
    texts = {c.id: c.text for policy in spec.policies for c in policy.clauses}
    known = [f"{name}: {texts[name]}" for name in specs.cited(own, spec)]
    return known + [f"{name}: no such clause" for name in specs.invented(own, spec)]


class Terminal:
  """What a person sees and types."""

  def __init__(self, talk: Conversation, engine: Engine):
    self._talk, self._engine = talk, engine
    self._dim, self._plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")

  def run(self) -> None:
    """Reads lines to the last."""
    while (line := self._line()) is not None:
      command, _, rest = line.strip().partition(" ")
      if command == "/quit":
        return
      try:
        if command == "/new":
          self._talk.new()
        elif command == "/spec":
          self._talk.new(rest.strip())
        elif command.startswith("/"):
          print(HELP, end="")
        elif command:
          self._reply(line.strip())
      except ValueError as error:
        print(f"dalign: {error}", file=sys.stderr)

  def _line(self) -> str | None:
    try:
      return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
      return None

  def _reply(self, said: str) -> None:
    replies = self._talk.ask(said, self._engine)
    thought = answer = ""
    begun = False
    try:
      for reply in replies:
        if not thought and reply.thought:
          print(f"{self._dim}thought  ", end="")
        print(_strip_controls(reply.thought[len(thought) :]), end="", flush=True)
        if not begun and (reply.answer or reply.finish):
          begun = True
          print(f"{self._plain}\n" * bool(reply.thought) + "answer   ", end="")
        print(_strip_controls(reply.answer[len(answer) :]), end="", flush=True)
        thought, answer = reply.thought, reply.answer
      print("" if reply.finish == "stop" else " [cut by the token budget]")
      for line in self._talk.cited(thought):
        print(f"{self._dim}cites    {_strip_controls(line)}{self._plain}")
    except KeyboardInterrupt:
      replies.close()
      print(f"{self._plain} [given up, and forgotten]")


def _strip_controls(text: str) -> str:
  """A model's words without what would move a terminal's cursor or change its state."""
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def chat(cfg: Config | None, workdir: pathlib.Path, stage: str) -> None:
  """Talks until the input ends. `cfg` and `stage` are as of `assistant.Model`."""
  model = assistant.Model(workdir, stage, cfg)
  name = f"{model.workdir.name}, stage {model.stage}"
  with Engine(model) as engine:
    print(f"dalign: {name}; /help lists what can be done", file=sys.stderr)
    Terminal(Conversation(model), engine).run()
