"""Rollouts of a step, which RL and distillation share: of which prompts, sampled
without the specification, when to halt, and what evaluation's grader says of them."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NoReturn

import numpy as np

from dalign.config import stages
from dalign.config.on_policy import DistillConfig
from dalign.config.on_policy import RLConfig
from dalign.evaluation import evals
from dalign.policy import prompting
from dalign.sampling import likelihood
from dalign.sampling.sampler import Request
from dalign.stages import samples as sample_rows
from dalign.stages import services
from dalign.stages.prompts import too_long
from dalign.text import chat_template
from dalign.training import rollout
from dalign.training import trainer as trainers
from dalign.training.rollout import Rollout
from dalign.types import Key
from dalign.types import Prompt
from dalign.types import PyTree

Run = services.Services[stages.Rolling]  # what is seen of a run
Settings = RLConfig | DistillConfig
Halt = Callable[[str, str], NoReturn]  # why, and what to do about it


def prompt_schedule(run: Run, cfg: Settings) -> Callable[[int], list[Prompt]]:
  """A function from the index of a sampling round to its prompts. ValueError where
  there are too few."""
  stage = run.cfg.stage
  safety = prompts_that_fit(
    run, run.prompts.choose_on_policy("safety", None, cfg.expected)
  )
  capability = prompts_that_fit(run, run.prompts.choose_on_policy("capability", None))
  safety_count = cfg.prompts - cfg.capability
  cells, shares = rollout.prompt_cells(safety), None
  if cfg.mixture and cells:
    shares = rollout.cell_shares(cells, cfg.mixture, key=f"config.{stage}.mixture")
    drawn = zip(cells, shares, strict=True)
    safety = [prompt for cell, share in drawn if share for prompt in cell]
  if len(safety) < safety_count:
    raise ValueError(
      f"{stage}: wanted {safety_count} or more training prompts of kind safety and of "
      f"{', '.join(cfg.expected)} (config.{stage}.expected), found {len(safety)}"
    )
  if cfg.capability and not capability:
    raise ValueError(
      f"config.{stage}.capability: wanted {cfg.capability} training prompts of kind "
      "capability a step, found none; add some, or set it to 0"
    )
  return functools.partial(
    rollout.choose_prompts,
    cells,
    capability,
    safety_count=safety_count,
    capability_count=cfg.capability,
    seed=run.cfg.seed,
    shares=shares,
  )


def prompts_that_fit(run: Run, prompts: list[Prompt]) -> list[Prompt]:
  """Those prompts that are not too long for the sampler."""
  rows = {
    p.id: prompting.render_prompt(
      run.model.tok, prompting.plain(p), run.model.trained_think
    )
    for p in prompts
  }
  long = too_long(run.cfg.sampler, rows, run.cfg.sampler.prefix_step)
  return [prompt for prompt in prompts if prompt.id not in long]


def collect_rollouts(
  run: Run,
  cfg: Settings,
  policy: PyTree,
  prompts: list[Prompt],
  samples: int,
  key: Key,
) -> list[Rollout]:
  """Samples from the policy, without the spec, `samples` times each prompt: the
  rollouts of a prompt are next to each other."""
  tok, think = run.model.tok, run.model.trained_think
  turns = {prompt.id: prompting.plain(prompt) for prompt in prompts}
  fronts = {id: chat_template.render_chat(tok, list(own)) for id, own in turns.items()}
  opened = {id: prompting.forced(tok, own, think) for id, own in turns.items()}
  completions = run.sampler.complete(
    run.sampler.prepare(policy),
    [
      [
        Request(
          tokens=(*fronts[prompt.id], *opened[prompt.id]),
          row_id=(prompt.id, index),
          max_new=cfg.max_new,
        )
        for prompt in prompts
        for index in range(samples)
      ]
    ],
    key=key,
    temperature=cfg.temperature,
    max_new=cfg.max_new,
    prefix_room=run.cfg.sampler.prefix_step,
  )
  done = {completion.request.row_id: completion for completion in completions}

  def rollout_of(prompt: Prompt, index: int) -> Rollout:
    own = done[prompt.id, index]
    return Rollout(
      prompt=prompt,
      sample=sample_rows.from_completion(run.model, prompt, own, index, think),
      prompt_tokens=fronts[prompt.id],
      behaviour=own.logp,
    )

  return [rollout_of(prompt, index) for prompt in prompts for index in range(samples)]


def with_scores(
  rollouts: Sequence[Rollout], name: str, score: likelihood.Scorer, params: PyTree
) -> list[Rollout]:
  """Rollouts with what a scorer says of each sampled token, as the field `name`."""
  tokens, starts = [r.tokens for r in rollouts], [r.first_sampled for r in rollouts]
  fields: list[dict[str, Any]] = [{name: x_T} for x_T in score(params, tokens, starts)]
  return [dataclasses.replace(r, **x) for r, x in zip(rollouts, fields, strict=True)]


def make_halt(run: Run, step: int, rollouts: Sequence[Rollout]) -> Halt:
  """Stops the stage at a step, and keeps its rollouts."""
  batch = {
    "prompt_id": [r.prompt.id for r in rollouts],
    "thought": [r.sample.thought for r in rollouts],
    "answer": [r.sample.answer for r in rollouts],
    "kl_nats": [r.kl for r in rollouts],
    "unscored": [r.unscored for r in rollouts],
  }
  return functools.partial(trainers.halt, run.store, run.cfg.stage, step, batch=batch)


def check_kl(rollouts: Sequence[Rollout], stage: str, limit: float, halt: Halt) -> None:
  """Halts at log-probabilities that are not finite, and above the limit of the KL in
  nats, where that is not 0."""
  kl = rollout.mean(r.kl for r in rollouts)
  if not np.isfinite(kl):
    halt("log-probabilities of rollouts not finite", "find out why")
  if 0 < limit < kl:
    halt(
      f"rollouts {kl:.4g} nats from the start, above config.{stage}.stop_kl={limit:g}",
      "raise that",
    )


def grader_metrics(run: Run, rollouts: Sequence[Rollout]) -> dict[str, float]:
  """What evaluation's grader, whom no stage trains to please, makes of answers and
  thoughts, and the share that declines."""
  safety = [r for r in rollouts if r.prompt.kind != "capability"]
  outcomes = [run.task.outcome(r.prompt, r.sample) for r in safety]
  values = {f"audit_{name}": value for name, value in mean_grades(outcomes).items()}
  values["declined"] = rollout.mean(row["declined"] for row in outcomes)
  for name in run.task.monitored:
    scores = [row["scores"][name] for row in outcomes if row["thought"]]
    if known := [score for score in scores if score is not None]:
      values[f"thought_{name.removeprefix('thought_')}"] = rollout.mean(known)
  return values


def rewind_rollouts_file(run: Run, step: int) -> pathlib.Path:
  """The file of rollouts that are kept to be read, without those after a step."""
  path = run.store.path(run.cfg.stage, "rollouts.jsonl")
  before = run.store.read_rows(path) if run.store.has(path) else []
  run.store.write_rows(path, [row for row in before if row["step"] <= step])
  return path


def mean_grades(graded: list[dict]) -> dict[str, float]:
  """The mean of each response type's own metric, and over all replies the "grade"."""
  found = {name: [row["scores"].get(name) for row in graded] for name in evals.TYPES}
  known = {n: [x for x in xs if x is not None] for n, xs in found.items()}
  values = {name: rollout.mean(xs) for name, xs in known.items() if xs}
  if every := [x for xs in known.values() for x in xs]:
    values["grade"] = rollout.mean(every)
  return values
