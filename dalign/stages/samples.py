"""Samples: of what a model wrote, of what was written elsewhere, and as rows."""

import dataclasses

from dalign.config import stages
from dalign.models import ops
from dalign.policy import prompting
from dalign.sampling import sampler as sampling
from dalign.stages import model as models
from dalign.stages import services
from dalign.text import chat_template
from dalign.text import thinking
from dalign.types import Prompt
from dalign.types import Sample


def from_completion(
  model: models.Model,
  prompt: Prompt,
  done: sampling.Completion,
  index: int,
  think: thinking.ThinkFormat | None,
) -> Sample:
  """A completion as a Sample: thought and answer split, forced tokens marked."""
  return prompting.parse_completion(
    model.tok,
    prompt,
    done.tokens,
    done.finish,
    index=index,
    think=model.think,
    opened=bool(think),
    needed=bool(think or model.trained_think),
  )


def from_text(
  model: models.Model,
  prompt: Prompt,
  index: int,
  thought: str,
  answer: str,
  think: thinking.ThinkFormat | None,
) -> Sample:
  """A thought and an answer that were written elsewhere as a Sample, with the tokens
  that our own tokenizer has for them, behind the forced opening of `think`."""
  return prompting.encode_completion(
    model.tok,
    prompt,
    thought,
    answer,
    index=index,
    think=model.think,
    opened=bool(think),
  )


def drafts(
  run: services.Services[stages.Drafting], prompts: list[Prompt], index: int = 0
) -> dict[str, Sample]:
  """What the base replies to prompts without a specification: prompt id -> sample."""
  cfg, model = run.cfg.drafts, run.model
  requests = [
    sampling.Request(
      tokens=tuple(chat_template.render_chat(model.tok, list(prompting.plain(prompt)))),
      row_id=(prompt.id, index),
      max_new=cfg.max_new,
    )
    for prompt in prompts
  ]
  done = run.sampler.complete(
    run.base_weights,
    [requests],
    key=ops.stream(run.key, "draft"),
    temperature=cfg.temperature,
    max_new=cfg.max_new,
    prefix_room=run.cfg.sampler.prefix_step,
  )
  prompts_by_row = {(prompt.id, index): prompt for prompt in prompts}
  found = {}
  for completion in done:
    prompt = prompts_by_row[completion.request.row_id]
    found[prompt.id] = from_completion(model, prompt, completion, index, None)
  return found


def to_row(sample: Sample) -> dict:
  """A Sample as a JSON row."""
  return dataclasses.asdict(sample)


def from_row(row: dict) -> Sample:
  """The Sample of a JSON row, which may hold more than a Sample."""
  fields = {field.name: row[field.name] for field in dataclasses.fields(Sample)}
  return Sample(**fields | {"tokens": tuple(row["tokens"])})
