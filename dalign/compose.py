"""What a model reads: conversations and token rows for each stage of the method.

Two functions are the method's context distillation: `teach` puts the spec in front of
a prompt, `plain` cannot, since it takes none. Pure; knows no model.
"""

from typing import Sequence

from dalign import spec as specs
from dalign import text
from dalign import words
from dalign.types import Prompt
from dalign.types import Spec
from dalign.types import Turn
from dalign.types import Worked

TASK = (
  "Think before you answer: quote what the user asks, cite the one clause of the "
  "policy that decides, by its id, and choose to answer, to refuse or to give a safe "
  "completion. Keep this analysis out of the answer.\n\n"
)


REVISE = (
  "Think about where your answer goes against the policy, then write it anew as the "
  "policy asks. Write the answer alone, and nothing about the first one."
)

# How a demonstrated thought ends. Small models copy a short, constant pattern far more
# reliably than the longer prose of the policies' own worked thoughts; the constant word
# before the clause's id makes them cite one.
DECISIONS = {
  "comply": "allows this, so I can answer.",
  "refuse": "forbids this, so I must refuse.",
  "safe_complete": "covers this, so I give a safe completion.",
}

# Demonstrations for prompts that no policy covers.
HARMLESS = tuple(
  Worked(clause="", verdict="comply", prompt=prompt, thought="", answer=answer)
  for prompt, answer in (
    (
      "How do I get a wine stain out of a cotton shirt?",
      "Blot the stain, don't rub it. Pour cold water through the back of the cloth, "
      "work in a little dish soap, wait ten minutes and wash as usual.",
    ),
    ("What is 9 plus 8?", "9 plus 8 is 17."),
    (
      "Which planet is closest to the sun?",
      "Mercury is the planet closest to the sun.",
    ),
    (
      "Give me a name for a cheerful orange cat.",
      "How about Marmalade? It is warm, sweet and exactly the right colour.",
    ),
  )
)


def teach(
  spec: Spec, prompt: Prompt, *, detail: str, worked: int, think: text.ThinkFormat
) -> tuple[Turn, ...]:
  """The conversation of stage 1: instructions, spec(category), examples, the prompt.

  `worked` examples of the category's policy come as earlier turns, those of the
  prompt's ideal response type first: a proposal for a small model to imitate, which the
  filter then judges. They are the same for all prompts of one category and type, and
  cut to two sentences of answer: of longer ones it samples more that have no end.
  """
  system = TASK + specs.render(spec, prompt.category, detail=detail)
  turns = [Turn(role="system", content=system)]
  for example in demonstrations(spec, prompt.category, prompt.expected, worked):
    answer = " ".join(words.sentences(example.answer)[:2])
    shown = f"{think.of(example.prompt).open}{brief(spec, example, think)}{answer}"
    turns.append(Turn(role="user", content=example.prompt))
    turns.append(Turn(role="assistant", content=shown))
  return (*turns, *prompt.turns)


def demonstrations(spec: Spec, category: str, expected: str, n: int) -> list[Worked]:
  """The first n worked examples of a category, those of the ideal type first.

  They are in the order of their clauses: a small model counts on from the ids it sees.
  After A1, A2, A3 43% of its samples were good, after A1, A6, A5 (so A7) 21%.
  """
  if category not in {policy.id for policy in spec.policies}:
    return list(HARMLESS[:n])
  policy = spec.policy(category)
  order = [clause.id for clause in policy.clauses]

  def place(example):
    return example.verdict != expected, order.index(example.clause)

  return sorted(policy.worked, key=place)[:n]


def brief(spec: Spec, example: Worked, think: text.ThinkFormat) -> str:
  """What follows the forced opening of an example: its decision, the closing tag, and
  the space before its answer."""
  return written(decision(spec, example), "", think)


def written(thought: str, answer: str, think: text.ThinkFormat) -> str:
  """What follows the forced opening of a completion with this thought and answer."""
  gap = "\n" if think.open == think.tag else "" if think.open[-1].isspace() else " "
  return f"{gap}{thought}\n{think.close}\n\n{answer}"


def decision(spec: Spec, example: Worked) -> str:
  """The clause that decides about an example and what it decides, in one sentence.

  Before a clause that limits comes the title of its policy, in plain words for a small
  model to go by; before one that allows, they lead it astray: with them a fifth of
  sampled thoughts and answers were good, without a third.
  """
  if not example.clause:
    return "No policy touches this, so I can answer."
  decides = f"{example.clause} {DECISIONS[example.verdict]}"
  if example.verdict == "comply":
    return f"Clause {decides}"
  policy = spec.policy(specs.clause_ids(spec)[example.clause])
  return f"On {policy.title.lower()}, clause {decides}"


def reference(prompt: Prompt) -> Worked:
  """A prompt with a known answer as an example: no clause, and the answer as it is."""
  return Worked(
    clause="",
    verdict="comply",
    prompt=prompt.text,
    thought="",
    answer=prompt.answer,
  )


def revise(spec: Spec, prompt: Prompt, answer: str, *, detail: str) -> tuple[Turn, ...]:
  """The conversation of critique and revision (2212.08073; 2303.17651): the spec, the
  prompt, an answer to it, and the request for a better one."""
  system = TASK + specs.render(spec, prompt.category, detail=detail)
  return (
    Turn(role="system", content=system),
    *prompt.turns,
    Turn(role="assistant", content=answer),
    Turn(role="user", content=REVISE),
  )


def plain(prompt: Prompt) -> tuple[Turn, ...]:
  """The conversation of SFT, RL and inference: the prompt and nothing else."""
  return prompt.turns


def opened(
  tok: text.Tokenizer, turns: Sequence[Turn], think: text.ThinkFormat | None
) -> tuple[int, ...]:
  """Token ids of a conversation up to where sampling begins, with the forced ones."""
  ids = text.render_chat(tok, list(turns))
  return (*ids, *forced(tok, turns, think))


def untemplated(tok: text.Tokenizer, turns: Sequence[Turn]) -> tuple[int, ...]:
  """Token ids of the words of a conversation as plain text, without a chat template."""
  return tuple(tok.document("\n\n".join(turn.content for turn in turns) + "\n\n"))


def forced(
  tok: text.Tokenizer, turns: Sequence[Turn], think: text.ThinkFormat | None
) -> tuple[int, ...]:
  """Token ids that the template forces at the start of the completion of `turns`."""
  return tuple(tok.encode(think.of(turns[-1].content).open)) if think else ()
