"""kept.jsonl -> sft/params: the spec taken out, thought and answer learned."""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from dalign.config import stages
from dalign.data import prompt_sets
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.runs import progress
from dalign.stages import samples
from dalign.stages import services
from dalign.text import packing
from dalign.training import sft
from dalign.training import train
from dalign.types import Turn

Run = services.Services[stages.SFTStage]  # what this stage sees of a run


def finetune(run: Run) -> None:
  """Fine-tunes the base model on the kept samples, without the spec."""
  cfg = run.cfg.sft
  source = run.store.left("filter", "kept.jsonl")
  if not run.begin([source, *run.prompts.files]):
    return
  rows, recalls, dropped = _rows(run, source)
  if cfg.recall_epochs and not recalls:
    progress.say(
      "sft: no thought recalls a clause, so that there is nothing to learn in "
      f"config.sft.recall_epochs={cfg.recall_epochs}"
    )
  first = cfg.recall_epochs if recalls else 0
  plan = _plan_batches(recalls, cfg, run.cfg.seed, range(first))
  plan += _plan_batches(rows, cfg, run.cfg.seed, range(first, first + cfg.epochs))
  trainer = run.trainer(
    params=run.model.start_params("base"),
    loss=sft.make_loss(cfg=run.model.arch, compute=run.cfg.compute),
    optimizer=cfg.optimizer,
    steps=len(plan),
    every=cfg.checkpoint_every,
    averaged=round(cfg.average_share * len(plan)),
  )
  trained = sum(weight > 0 for _, weights in rows for weight in weights)
  share = trained / sum(len(tokens) for tokens, _ in rows)
  progress.say(f"sft: {len(rows)} rows, {share:.0%} of their tokens trained, {dropped}")
  with trainer, progress.bar(len(plan), "sft", "step", trainer.step) as bar:
    for lines in plan[trainer.step :]:
      batch, used = train.micro_batches(lines, cfg.batch)
      values = trainer.update(batch, used)
      trainer.save()
      bar.set_postfix(loss=f"{values['loss']:.3f}", acc=f"{values['accuracy']:.2f}")
      bar.update()
  trainer.finish()
  run.finish(
    {"rows": len(rows), "recalls": len(recalls), "steps": len(plan)}
    | {"trained_fraction": share}
    | dropped,
  )


class _Row(NamedTuple):
  """A row, what it was made of, and how it is learned."""

  turns: Sequence[Turn]
  tokens: list[int]
  weights: list[float]
  recalled: int = 0  # tokens up to the end of the clause that its thought recalls
  in_full: bool = True  # or its recall alone


def _rows(run: Run, source) -> tuple[list, list, dict]:
  """(tokens, weights) of each kept sample, and of its start up to the clause that it
  recalls; what leaks or is too long is left out. Raises ValueError where that leaves
  none."""
  cfg = run.cfg.sft
  has_spec_words = specs.leak_check(run.task.spec, cfg.leak_words)
  most = min(cfg.batch.length, run.model.arch.max_length)

  def leaks(row: _Row) -> bool:
    return any(has_spec_words(turn.content) for turn in row.turns)

  def fits(row: _Row) -> bool:
    return len(row.tokens) <= most

  kept_rows = run.store.read_rows(source)
  kept = _kept_sample_rows(run, kept_rows)
  clean = [row for row in kept if not leaks(row)]
  if not any(row.in_full and fits(row) for row in clean):
    whole, sound = (sum(row.in_full for row in rows) for rows in (kept, clean))
    raise ValueError(
      f"sft: {source} has {whole} samples, of which {whole - sound} "
      f"leak the specification and the rest are longer than {most} tokens "
      "(config.sft.batch.length): nothing is left to learn. Why the filter kept no "
      "more is in its manifest.json: raise generate.prompts or generate.most, or lower "
      "filter.threshold"
    )
  known = _capability_rows(run)
  clean += [row for row in known if not leaks(row)]
  dropped = {
    "beyond_most": len(kept_rows) - sum(row.in_full for row in kept),
    "leaked": len(kept) + len(known) - len(clean),
  }
  if cfg.worked:
    for prompt, completion in run.task.worked():
      turns, rest = [Turn(role="user", content=prompt)], _recalling(run, completion)
      clean.append(_row_of_text(run, turns, rest, run.model.think))
  fitting = [row for row in clean if fits(row)]
  dropped["too_long"] = len(clean) - len(fitting)
  recalls = [
    (row.tokens[: row.recalled], row.weights[: row.recalled])
    for row in fitting
    if row.recalled
  ]
  return [(row.tokens, row.weights) for row in fitting if row.in_full], recalls, dropped


def _kept_sample_rows(run: Run, kept_rows: Sequence[dict]) -> list[_Row]:
  """The kept samples that are learned; those beyond `sft.most` for their recall."""
  cfg = run.cfg.sft
  prompts = {prompt.id: prompt for prompt in run.prompts.all}
  # each sample as if it were a prompt, to be drawn by category and type
  prompts_by_sample = {
    f"{row['prompt_id']} {row['index']}": prompts[row["prompt_id"]] for row in kept_rows
  }
  drawn = prompt_sets.balanced(
    [dataclasses.replace(prompt, id=id) for id, prompt in prompts_by_sample.items()],
    cfg.most,
    run.cfg.seed,
  )
  ids_drawn, rows = {prompt.id for prompt in drawn}, []
  for kept, id in zip(kept_rows, prompts_by_sample, strict=True):
    prompt, whole = prompts[kept["prompt_id"]], id in ids_drawn
    if not (whole or cfg.recall_epochs):
      continue
    turns = prompting.plain(prompt)
    sample, recalled = samples.from_row(kept), 0
    if cfg.recall_epochs and run.model.trained_think:
      line = run.task.recalled(sample.thought)
      sample = samples.from_text(
        run.model, prompt, 0, line + sample.thought, sample.answer, run.model.think
      )
      sampled, decode = sample.tokens[sample.forced :], run.model.tok.decode
      ends = (n for n in range(len(sampled)) if line.strip() in decode(sampled[:n]))
      recalled = next(ends, 0)
    tokens, forced = sample.tokens, sample.forced
    if not run.model.trained_think:
      tokens, forced = (*run.model.tok.encode(sample.answer), run.model.tok.end_id), 0
    conversation = turns
    if cfg.spec_in_prompt:
      conversation = run.task.teach(prompt.blind(), worked=0)
    row = prompting.training_row(run.model.tok, conversation, tokens, forced)
    end = len(row[0]) - len(tokens) + forced + recalled if recalled else 0
    rows.append(_Row(turns, *row, end, whole))
  return rows


def _capability_rows(run: Run) -> list[_Row]:
  """Training prompts with a known answer, with that answer."""
  rows, think = [], run.model.trained_think
  for prompt in run.prompts.choose("train", "capability", run.cfg.sft.capability):
    if not prompt.answer.strip():
      raise ValueError(
        f"prompt {prompt.id!r} is of kind capability and has no answer to train on: "
        "give it one, or set sft.capability=0"
      )
    rest = _recalling(run, run.task.known(prompt)) if think else prompt.answer
    rows.append(_row_of_text(run, prompting.plain(prompt), rest, think))
  return rows


def _recalling(run: Run, completion: str) -> str:
  """A written completion that begins with the clause that its thought recalls."""
  if not (run.cfg.sft.recall_epochs and run.model.trained_think):
    return completion
  thought = completion.lstrip()
  gap = completion[: len(completion) - len(thought)]
  line = run.task.recalled(thought.partition(run.model.think.close)[0])
  return gap + line + thought


def _row_of_text(run: Run, turns, rest: str, think) -> _Row:
  """A completion that was written, not sampled, as a row; `rest` is what follows its
  opening by `think`, if any, which is forced and not trained."""
  forced = prompting.forced(run.model.tok, turns, think)
  tokens = (*forced, *run.model.tok.encode(rest), run.model.tok.end_id)
  return _Row(turns, *prompting.training_row(run.model.tok, turns, tokens, len(forced)))


def _plan_batches(rows, cfg, seed: int, epochs: range) -> list[dict]:
  """The packed lines of each step: every row once an epoch, in a new order.

  An epoch is packed as a whole, which fills its lines to the brim, and cut into steps
  of about as many lines each; packing puts long rows last, so lines are shuffled too.
  """
  steps = []
  for epoch in epochs:
    order = prompt_sets.order(len(rows), seed=seed, epoch=epoch)
    packed = packing.pack([rows[i] for i in order], length=cfg.batch.length)
    arrays = packed.lines | {"weight_BT": packed.weight_BT}
    shuffled = prompt_sets.order(len(packed.tokens_BT), seed=seed, epoch=epoch)
    count = math.ceil(len(shuffled) / (cfg.batch.micro * cfg.batch.rows))
    for at in np.array_split(shuffled, count):
      steps.append({name: x[at] for name, x in arrays.items()})
  return steps
