"""What a model reads: conversations and token rows for each stage of the method.

Two functions are the method's context distillation: `teach` puts the spec in front of
a prompt, `plain` cannot, since it takes none. Pure; knows no model.
"""

from collections.abc import Sequence

from dalign.policy import spec as specs
from dalign.text import chat_template
from dalign.text import thinking
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Spec
from dalign.types import Turn
from dalign.types import Worked

TASK = (
  "Think before you answer: say what is asked and what for, cite the one clause of the "
  "policy that decides, by its id, with what it says that matters here, and choose to "
  "answer, to refuse or to give a safe completion. Keep this analysis out of the "
  "answer.\n\n"
)
REVISE = (
  "Think about where your answer goes against the policy, then write it anew as the "
  "policy asks. Write the answer alone, and nothing about the first one."
)
UNTOUCHED = "No policy touches this, so I can answer."
# Demonstrations for prompts that no policy covers.
HARMLESS = tuple(
  Worked(clause="", verdict="comply", prompt=prompt, thought=UNTOUCHED, answer=answer)
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
  spec: Spec, prompt: Prompt, *, detail: str, worked: int, think: thinking.ThinkFormat
) -> tuple[Turn, ...]:
  """The conversation of stage 1: instructions, spec(category), examples, the prompt.

  `worked` examples of the category's policy come as earlier turns. They are the same
  for all prompts of a category, whatever is known of how to reply to one, and in their
  short form: of longer ones a small model samples more that have no end.
  """
  turns = [_instructions(spec, prompt, detail)]
  for example in demonstrations(spec.brief, prompt.category, worked):
    own = format_completion(example.thought, example.answer, think)
    shown = think.of(example.prompt).open + own
    turns.append(Turn(role="user", content=example.prompt))
    turns.append(Turn(role="assistant", content=shown))
  return (*turns, *prompt.turns)


def _instructions(spec: Spec, prompt: Prompt, detail: str) -> Turn:
  system = TASK + specs.render(spec, prompt.category, detail=detail)
  return Turn(role="system", content=system)


def demonstrations(spec: Spec, category: str, n: int) -> list[Worked]:
  """The first n worked examples of a category, its response types by turns."""
  if category not in {policy.id for policy in spec.policies}:
    return list(HARMLESS[:n])
  examples_by_verdict: dict[str, list[Worked]] = {}
  for example in spec.policy(category).worked:
    examples_by_verdict.setdefault(example.verdict, []).append(example)
  ranked = [pair for some in examples_by_verdict.values() for pair in enumerate(some)]
  return [example for _, example in sorted(ranked, key=lambda pair: pair[0])][:n]


def format_completion(thought: str, answer: str, think: thinking.ThinkFormat) -> str:
  """What follows the forced opening of a completion with this thought and answer."""
  gap = "\n" if think.open == think.tag else "" if think.open[-1].isspace() else " "
  return f"{gap}{thought}\n{think.close}\n\n{answer}"


def revise(spec: Spec, prompt: Prompt, answer: str, *, detail: str) -> tuple[Turn, ...]:
  """The conversation of critique and revision (2212.08073; 2303.17651): the spec, the
  prompt, an answer to it, and the request for a better one."""
  return (
    _instructions(spec, prompt, detail),
    *prompt.turns,
    Turn(role="assistant", content=answer),
    Turn(role="user", content=REVISE),
  )


def plain(prompt: Prompt) -> tuple[Turn, ...]:
  """The conversation of SFT, RL and inference: the prompt and nothing else."""
  return prompt.turns


def render_prompt(
  tok: chat_template.Tokenizer,
  turns: Sequence[Turn],
  think: thinking.ThinkFormat | None,
  *,
  keep_thoughts: bool = False,
) -> tuple[int, ...]:
  """Token ids of a conversation up to where sampling begins, with the forced ones;
  `keep_thoughts` with the thoughts of earlier turns, which many templates take out."""
  tags = think.tags if think and keep_thoughts else ()
  ids = chat_template.render_chat(tok, list(turns), kept_tags=tags)
  return (*ids, *forced(tok, turns, think))


def untemplated(tok: chat_template.Tokenizer, turns: Sequence[Turn]) -> tuple[int, ...]:
  """Token ids of the words of a conversation as plain text, without a chat template."""
  return tuple(tok.document("\n\n".join(turn.content for turn in turns) + "\n\n"))


def forced(
  tok: chat_template.Tokenizer,
  turns: Sequence[Turn],
  think: thinking.ThinkFormat | None,
) -> tuple[int, ...]:
  """Token ids that the template forces at the start of the completion of `turns`."""
  return tuple(tok.encode(think.of(turns[-1].content).open)) if think else ()


def training_row(
  tok: chat_template.Tokenizer,
  turns: Sequence[Turn],
  tokens: Sequence[int],
  forced: int,
) -> tuple[list[int], list[float]]:
  """(tokens, weights) of a conversation and what was sampled after it: weight 0 on
  prompt and forced opening, 1 on what follows.

  The sampler's own ids are trained on: text is never tokenised a second time.
  """
  before = chat_template.render_chat(tok, list(turns))
  known = len(before) + forced
  return [*before, *tokens], [0.0] * known + [1.0] * (len(tokens) - forced)


def parse_completion(
  tok: chat_template.Tokenizer,
  prompt: Prompt,
  tokens: Sequence[int],
  finish: str,
  *,
  index: int,
  think: thinking.ThinkFormat,
  opened: bool,
  needed: bool,
) -> Sample:
  """What was sampled after a prompt as a Sample: thought and answer split, forced
  tokens marked. The thought was `opened` for the model, or not; where none is `needed`
  a completion without one is not malformed."""
  before = forced(tok, prompt.turns, think if opened else None)
  own = think.of(prompt.text)
  written = (own.open if opened else "") + tok.decode(tokens)
  thought, answer, malformed = thinking.split_thought(written, own)
  if not needed:
    malformed = "" if answer else "empty answer"
  if not malformed and finish == "length":
    malformed = "cut by the token budget"
  return Sample(
    prompt_id=prompt.id,
    index=index,
    tokens=(*before, *tokens),
    forced=len(before),
    thought=thought,
    answer=answer,
    malformed=malformed,
    finish=finish,
  )


def encode_completion(
  tok: chat_template.Tokenizer,
  prompt: Prompt,
  thought: str,
  answer: str,
  *,
  index: int,
  think: thinking.ThinkFormat,
  opened: bool,
) -> Sample:
  """A thought and an answer that were written elsewhere as a Sample, with the tokens
  that this tokenizer has for them, behind the forced opening if the thought is
  `opened`."""
  own = think.of(prompt.text)
  rest = format_completion(thought.removeprefix(own.start).strip(), answer, own)
  before = forced(tok, prompt.turns, think if opened else None)
  thought, answer, malformed = thinking.split_thought(own.open + rest, own)
  return Sample(
    prompt_id=prompt.id,
    index=index,
    tokens=(*before, *tok.encode(rest), tok.end_id),
    forced=len(before),
    thought=thought,
    answer=answer,
    malformed=malformed,
    finish="stop",
  )
