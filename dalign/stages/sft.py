"""kept.jsonl -> sft/params: the spec taken out, thought and answer learned."""

import dataclasses
import math

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
  source = run.store.path("filter", "kept.jsonl")
  if not source.exists():
    raise ValueError(f"{source} is missing: run the filter stage first")
  if not run.begin([source, *run.prompts.files]):
    return
  rows, recalls, dropped = _rows(run, source)
  if cfg.recall_epochs and not recalls:
    progress.say(
      "sft: no thought recalls a clause, so that there is nothing to learn in "
      f"config.sft.recall_epochs={cfg.recall_epochs}"
    )
  first = cfg.recall_epochs if recalls else 0
  plan = _plan(recalls, cfg, run.cfg.seed, range(first))
  plan += _plan(rows, cfg, run.cfg.seed, range(first, first + cfg.epochs))
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
  run.store.finish(
    "sft",
    {"rows": len(rows), "recalls": len(recalls), "steps": len(plan)}
    | {"trained_fraction": share}
    | dropped,
  )


def _rows(run: Run, source) -> tuple[list, list, dict]:
  """(tokens, weights) of each kept sample, and of its start up to the clause that it
  recalls; what leaks or is too long is left out. Raises ValueError where that leaves
  none."""
  cfg = run.cfg.sft
  index = specs.leak_index(run.task.spec, cfg.leak_words)
  prompts = {prompt.id: prompt for prompt in run.prompts.all}
  found = []  # (turns, row, where the clause that it recalls ends)
  kept_rows = run.store.read_rows(source)
  of = {  # each sample as if it were a prompt, to be drawn by category and type
    f"{row['prompt_id']} {row['index']}": prompts[row["prompt_id"]] for row in kept_rows
  }
  drawn = prompt_sets.balanced(
    [dataclasses.replace(prompt, id=id) for id, prompt in of.items()],
    min(cfg.most, len(of)),
    run.cfg.seed,
  )
  ids_drawn = {prompt.id for prompt in drawn}
  some = [row for row, id in zip(kept_rows, of, strict=True) if id in ids_drawn]
  for kept in some:
    prompt = prompts[kept["prompt_id"]]
    turns = prompting.plain(prompt)
    sample, recalled = samples.of_row(kept), 0
    if cfg.recall_epochs and run.model.thinks:
      line = run.task.recalled(sample.thought)
      sample = samples.written(
        run.model,
        prompts[sample.prompt_id],
        0,
        line + sample.thought,
        sample.answer,
        run.model.think,
      )
      own = sample.tokens[sample.forced :]
      recalled = next(
        (n for n in range(len(own)) if line.strip() in run.model.tok.decode(own[:n])), 0
      )
    tokens, forced = sample.tokens, sample.forced
    if not run.model.thinks:
      tokens, forced = _answer(run, sample.answer), 0
    told = run.task.teach(prompt.blind(), worked=0) if cfg.spec_in_prompt else turns
    row = prompting.row(run.model.tok, told, tokens, forced)
    end = len(row[0]) - len(tokens) + forced + recalled if recalled else 0
    found.append((turns, row, end))
  for prompt in run.prompts.choose("train", "capability", cfg.capability):
    if not prompt.answer.strip():
      raise ValueError(
        f"prompt {prompt.id!r} is of kind capability and has no answer to train on: "
        "give it one, or set sft.capability=0"
      )
    known = _recalling(run, run.task.known(prompt))
    written = _written(run, prompting.plain(prompt), known)
    if not run.model.thinks:
      answer = _answer(run, prompt.answer)
      written = prompting.row(run.model.tok, prompting.plain(prompt), answer, 0)
    found.append((prompting.plain(prompt), written, 0))
  leaked = [
    any(specs.leaks(turn.content, index, cfg.leak_words) for turn in turns)
    for turns, _, _ in found
  ]
  most = min(cfg.batch.length, run.model.arch.max_length)
  fit = [
    len(row[0]) <= most and not leaks
    for (_, row, _), leaks in zip(found, leaked, strict=True)
  ]
  if not any(fit[: len(some)]):
    raise ValueError(
      f"sft: {source} has {len(some)} samples, of which {sum(leaked[: len(some)])} "
      f"leak the specification and the rest are longer than {most} tokens "
      "(config.sft.batch.length): nothing is left to learn. Why the filter kept no "
      "more is in its manifest.json: raise generate.prompts or generate.most, or lower "
      "filter.threshold"
    )
  clean = [
    (row, end) for (_, row, end), leaks in zip(found, leaked, strict=True) if not leaks
  ]
  dropped = {"beyond_most": len(kept_rows) - len(some), "leaked": sum(leaked)}
  if cfg.worked:
    clean += [
      (
        _written(run, [Turn(role="user", content=prompt)], _recalling(run, completion)),
        0,
      )
      for prompt, completion in run.task.worked()
    ]
  fits = [(row, end) for row, end in clean if len(row[0]) <= most]
  dropped["too_long"] = len(clean) - len(fits)
  recalls = [(row[0][:end], row[1][:end]) for row, end in fits if end]
  return [row for row, _ in fits], recalls, dropped


def _recalling(run: Run, completion: str) -> str:
  """A written completion that begins with the clause that its thought recalls."""
  if not (run.cfg.sft.recall_epochs and run.model.thinks):
    return completion
  thought = completion.lstrip()
  gap = completion[: len(completion) - len(thought)]
  line = run.task.recalled(thought.partition(run.model.think.close)[0])
  return gap + line + thought


def _answer(run: Run, answer: str) -> tuple[int, ...]:
  """The tokens of an answer without a thought."""
  return (*run.model.tok.encode(answer), run.model.tok.stop_ids[0])


def _written(run: Run, turns, rest: str) -> tuple[list, list]:
  """A completion that was written, not sampled, as a row; `rest` is what follows its
  forced opening, which is not trained."""
  forced = prompting.forced(run.model.tok, turns, run.model.think)
  tokens = (*forced, *run.model.tok.encode(rest), run.model.tok.stop_ids[0])
  return prompting.row(run.model.tok, turns, tokens, len(forced))


def _plan(rows, cfg, seed: int, epochs: range) -> list[dict]:
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
