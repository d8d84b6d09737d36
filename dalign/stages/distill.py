"""prompts -> distill/params: the model's samples, scored by a teacher with the spec.

The student thinks and answers without the specification. The teacher, whose parameters
stay as they are, reads the same tokens behind spec(category) and, of prompts with a
known answer, behind the prompt alone. One update a step; no judge, no reward.
"""

import collections
from collections.abc import Sequence
import functools

import numpy as np

from dalign.config import stages
from dalign.config.training import BatchConfig
from dalign.evaluation import evals
from dalign.models import adapters
from dalign.models import ops
from dalign.policy import prompting
from dalign.runs import progress
from dalign.runs import stopping
from dalign.sampling import likelihood
from dalign.sampling.sampler import Request
from dalign.stages import rollouts as rollouts_of
from dalign.stages import samples as sample_rows
from dalign.stages import services
from dalign.text import packing
from dalign.training import distillation
from dalign.training import rollout
from dalign.training import train
from dalign.training.rollout import Rollout
from dalign.types import Prompt
from dalign.types import PyTree

Run = services.Services[stages.DistillStage]  # what this stage sees of a run

NO_HEADROOM = 0.02  # of decisions: where no more differ, nothing can be learned


def distill(run: Run) -> None:
  """Trains the student from its start; writes rollouts as text every few steps."""
  cfg = run.cfg.distill
  inputs = [*run.sources]
  if "sft" in (cfg.start, cfg.teacher):
    inputs.append(run.store.path("sft", "manifest.json"))
  if not run.begin([path for path in inputs if path.exists()]):
    return
  choose = rollouts_of.prompt_schedule(run, cfg)
  check_teacher_length(run)
  start = run.model.start_params(cfg.start)
  teacher = start if cfg.teacher == cfg.start else run.model.start_params(cfg.teacher)
  headroom = measure_headroom(run, start, teacher)
  trainer = run.trainer(
    params={"policy": adapters.copy_trainable(start)},
    loss=distillation.make_loss(
      cfg=run.model.arch,
      compute=run.cfg.compute,
      temperature=cfg.temperature,
      exact=cfg.loss == "exact",
    ),
    optimizer=cfg.optimizer,
    steps=cfg.steps,
    every=cfg.checkpoint_every,
    result=lambda params: params["policy"],
    beside={"teacher": distillation.head_of(teacher)},
  )
  reference = run.scorer(cfg.batch, temperature=cfg.temperature)
  score_with_teacher = teacher_scorer(run)
  rollouts_path = rollouts_of.rewind_rollouts_file(run, trainer.step)
  with trainer, progress.bar(cfg.steps, "distill", "step", trainer.step) as bar:
    while trainer.step < cfg.steps:
      # The student samples without the specification.
      student = trainer.all_params["policy"]
      key = ops.stream(run.key, "student", trainer.step)
      prompts = choose(trainer.step)
      rollouts = rollouts_of.collect_rollouts(
        run, cfg, student, prompts, cfg.samples, key
      )
      rollouts = rollouts_of.with_scores(rollouts, "reference", reference, start)
      halt = rollouts_of.make_halt(run, trainer.step + 1, rollouts)
      rollouts_of.check_kl(rollouts, "distill", cfg.stop_kl, halt)
      metrics = step_metrics(run, rollouts)

      # The teacher reads its tokens behind the specification; loss and update.
      lines = build_batch(run, rollouts, score_with_teacher, teacher)
      batch, used = train.micro_batches(lines, cfg.batch)
      with stopping.uninterrupted():
        update_metrics = trainer.update(batch, used, metrics)
        if trainer.step % cfg.show_every == 0 or trainer.step == cfg.steps:
          rows = [rollout.sample_row(r, trainer.step) for r in rollouts]
          run.store.append_rows(rollouts_path, rows)
        trainer.save()
      reverse_kl, kl = update_metrics["loss"], metrics["distill/kl_nats"]
      bar.set_postfix(reverse_kl=f"{reverse_kl:.3f}", kl=f"{kl:.2f}")
      bar.update()
  trainer.finish()
  headroom_summary = {f"headroom_{name}": value for name, value in headroom.items()}
  run.finish({"steps": cfg.steps} | headroom_summary)


def teacher_prompt(run: Run, prompt: Prompt) -> tuple[int, ...]:
  """What the teacher reads before it goes on as the student did."""
  turns = prompting.plain(prompt)
  if prompt.kind != "capability":
    turns = run.task.teach(prompt.blind(), worked=run.cfg.distill.demonstrations)
  return prompting.render_prompt(
    run.model.tok, turns, run.model.trained_think, keep_thoughts=True
  )


def check_teacher_length(run: Run) -> None:
  """ValueError where a line of the teacher may not hold what it has to read."""
  cfg = run.cfg.distill
  prompts = run.prompts.choose_on_policy("safety", None, cfg.expected)
  if cfg.capability:
    prompts += run.prompts.choose_on_policy("capability", None)
  fitting = rollouts_of.prompts_that_fit(run, prompts)
  longest = max(len(teacher_prompt(run, prompt)) for prompt in fitting) + cfg.max_new
  if longest > cfg.teacher_length:
    raise ValueError(
      f"config.distill.teacher_length: wanted {longest} or more, the tokens of the "
      f"longest specification, prompt and rollout, got {cfg.teacher_length}"
    )


def teacher_scorer(run: Run) -> likelihood.Scorer:
  """What the teacher makes of each token: the state that predicts it where the loss is
  exact, else its log-probability in nats."""
  cfg = run.cfg.distill
  shape = BatchConfig(micro=1, rows=cfg.teacher_rows, length=cfg.teacher_length)
  if cfg.loss == "exact":
    return run.scorer(shape, make=distillation.make_hidden)
  return run.scorer(shape, temperature=cfg.temperature)


def build_batch(
  run: Run,
  rollouts: Sequence[Rollout],
  score_with_teacher: likelihood.Scorer,
  teacher: PyTree,
) -> dict[str, np.ndarray]:
  """The rollouts packed into lines, with what the teacher makes of each sampled token
  at its place, as `distillation.make_loss` reads them."""
  cfg = run.cfg.distill
  prompt_tokens = {r.prompt.id: teacher_prompt(run, r.prompt) for r in rollouts}
  fronts = [prompt_tokens[r.prompt.id] for r in rollouts]
  replies = [r.sample.tokens[r.sample.forced :] for r in rollouts]
  rows = [[*front, *own] for front, own in zip(fronts, replies, strict=True)]
  teacher_scores = score_with_teacher(teacher, rows, [*map(len, fronts)])
  own = [
    (r.tokens, [False] * r.first_sampled + [True] * len(r.behaviour)) for r in rollouts
  ]
  packed = packing.pack(own, length=cfg.batch.length)
  scores = np.zeros(
    (*packed.tokens_BT.shape, *teacher_scores[0].shape[1:]), teacher_scores[0].dtype
  )
  for (b, first, size), score in zip(packed.where, teacher_scores, strict=True):
    scores[b, first + size - len(score) : first + size] = score
  name = "teacher_BTD" if cfg.loss == "exact" else "teacher_BT"
  return packed.lines | {"sampled_BT": packed.weight_BT > 0, name: scores}


def step_metrics(run: Run, rollouts: Sequence[Rollout]) -> dict[str, float]:
  """What says that a student collapses: format, length, KL, and what evaluation's
  grader makes of answers and thoughts."""
  watched = ("format", "kl_nats", "length_tokens", "truncated", "distinct")
  found = rollout.metrics(rollouts, group_size=run.cfg.distill.samples)
  values = {name: found[name] for name in (*watched, "thought_words")}
  values |= rollouts_of.grader_metrics(run, rollouts)
  return {f"distill/{name}": value for name, value in values.items()}


def measure_headroom(run: Run, start: PyTree, teacher: PyTree) -> dict:
  """How often the teacher decides otherwise than the student does before the first
  step; said, and kept in distill/headroom.json."""
  cfg = run.cfg.distill
  path = run.store.path("distill", "headroom.json")
  if not cfg.probed:
    return {}
  if run.store.has(path):
    return run.store.read_json(path)
  prompts = run.prompts.choose_on_policy("safety", None, cfg.expected)
  fitting_ids = {prompt.id for prompt in rollouts_of.prompts_that_fit(run, prompts)}
  prompts = run.prompts.choose_on_policy(
    "safety", cfg.probed, cfg.expected, fitting_ids
  )
  key = ops.stream(run.key, "headroom")
  student_rollouts = rollouts_of.collect_rollouts(run, cfg, start, prompts, 1, key)
  groups = collections.defaultdict(list)
  for prompt in prompts:
    tokens, row_id = teacher_prompt(run, prompt), (prompt.id, 0)
    request = Request(tokens=tokens, row_id=row_id, max_new=cfg.max_new)
    groups[prompt.category].append(request)
  completions = run.sampler.complete(
    run.sampler.prepare(teacher),
    [*groups.values()],
    key=key,
    temperature=cfg.temperature,
    max_new=cfg.max_new,
  )
  by_prompt = {completion.request.row_id[0]: completion for completion in completions}
  pairs = []
  for r in student_rollouts:
    told = sample_rows.from_completion(
      run.model, r.prompt, by_prompt[r.prompt.id], 0, run.model.trained_think
    )
    outcome = functools.partial(run.task.outcome, r.prompt)
    pairs.append((outcome(r.sample), outcome(told)))
  headroom = evals.decision_changes(pairs)
  run.store.write_json(path, headroom)
  progress.say(f"distill: {headroom_line(headroom)}")
  return headroom


def headroom_line(headroom: dict) -> str:
  """The headroom in a line."""
  if not headroom["n"]:
    return "no reply to the prompts probed has a grade: what can be learned is unknown"
  shares = {n: f"{x:.0%}" for n, x in headroom.items() if n not in ("n", "unscored")}
  line = (
    "with the specification in sight the teacher decides otherwise on "
    f"{shares['otherwise']} of {headroom['n']} prompts: on {shares['gained']} from "
    f"wrong to right, on {shares['lost']} from right to wrong; right are "
    f"{shares['right_untold']} without it, {shares['right_told']} with it"
  )
  if headroom["otherwise"] <= NO_HEADROOM:
    line += ". Of its decisions there is nothing to be learned"
  return line
