"""judged.jsonl -> reward/params: a reward model of spec, prompt and answer.

It learns the scores that the answers got from a judge without the thought. Beside the
sampled answers of a prompt it sees one that was given to a prompt of another ideal type
in the same category and, where there are such, what the base answers without the spec,
both judged anew; and answers whose score follows from how they are made, such as a bare
refusal, which is fair where one is due and wrong where an answer was right.
"""

import collections
from collections.abc import Sequence
import itertools
import random

import numpy as np

from dalign.config import stages
from dalign.data import prompt_sets
from dalign.judges import judge
from dalign.judges import probing
from dalign.models import ops
from dalign.runs import progress
from dalign.stages import judging
from dalign.stages import samples
from dalign.stages import scoring
from dalign.stages import services
from dalign.text import packing
from dalign.training import reward
from dalign.training import trainer as trainers
from dalign.types import Prompt

Run = services.Services[stages.RewardStage]  # what this stage sees of a run

MAX_MEASURED = 160  # held-out answers that the trained model is measured on


def train_reward(run: Run) -> None:
  """Trains, measures on held-out prompts, and probes the reward model."""
  cfg = run.cfg.reward
  source = run.store.left("filter", "judged.jsonl")
  inputs = [source, *run.sources, *run.recording_files]
  if cfg.start == "sft":
    inputs.append(run.store.path("sft", "manifest.json"))
  if cfg.labels == "judge":
    inputs += judging.function_files(run.cfg.judge.judge)
  if not run.begin(inputs):
    return
  renderer = scoring.Renderer(run)
  questions, scores, too_long = _fitting(renderer, *_questions(run, source))
  held_out, learned = _split(questions, cfg.held_out)
  if not learned:
    raise ValueError(
      f"{source} has scored answers to one prompt alone, which is held out: the reward "
      "model needs more"
    )
  plan = _plan_batches(run, learned, questions)
  trainer = _trainer(run)
  with trainer, progress.bar(cfg.steps, "reward", "step", trainer.step) as bar:
    for step in range(trainer.step, cfg.steps):
      batch = _batch(renderer, plan[step], questions, scores)
      values = trainer.update(batch, 1)
      trainer.save()
      bar.set_postfix(
        loss=f"{values['loss']:.3f}", pairs=f"{values['pair_accuracy']:.2f}"
      )
      bar.update()
  ask = scoring.reward_model(run, trainer.finish(), renderer)
  seen = {i for step_indices in plan for i in step_indices}
  if len(seen) < len(learned):
    progress.say(
      f"reward: {len(learned) - len(seen)} of {len(learned)} questions are never seen "
      f"in config.reward.steps={cfg.steps} steps of {cfg.rows}"
    )
  summary = _measure(run, ask, questions, scores, held_out)
  summary |= {"too_long": too_long, "seen": len(seen)}
  run.finish(summary)
  result = summary["held_out"]
  pairs = progress.percent(result["pair_accuracy"]).strip()
  progress.say(
    f"reward: held-out accuracy {result['accuracy']:.1%}, pairs {pairs}, calibration "
    f"error {result['calibration_error']:.2f}"
  )


def _trainer(run: Run) -> trainers.Trainer:
  cfg = run.cfg.reward
  trunk = run.model.start_params(cfg.start)
  params = reward.init_head(trunk, ops.stream(run.key, "reward_head"))
  loss = reward.make_loss(
    cfg=run.model.arch,
    compute=run.cfg.compute,
    pair_weight=cfg.pair_weight,
    answer_weight=cfg.answer_weight,
    point_weight=cfg.point_weight,
  )
  return run.trainer(
    params=params,
    loss=loss,
    optimizer=cfg.optimizer,
    steps=cfg.steps,
    every=cfg.checkpoint_every,
  )


def _questions(run: Run, source):
  """Scored questions about each prompt: its sampled answers, what else was judged, and
  what has a score by construction. No malformed completion is among them: what stands
  as its answer may be a thought."""
  cfg = run.cfg.reward
  prompts = {p.id: prompt_sets.with_metadata(p, cfg.metadata) for p in run.prompts.all}
  stored, why = "reward", "reward_reason"
  if cfg.shows_thought:
    stored, why = "score", "reason"
  well_formed = [r for r in run.store.read_rows(source) if not r["malformed"]]
  rows = [r for r in well_formed if r[stored] is not None]
  missing = [r[why] for r in well_formed if r[stored] is None]
  replies = [(prompts[r["prompt_id"]], r["thought"], r["answer"]) for r in rows]
  scores = [r[stored] for r in rows]
  expected = {r["prompt_id"]: r["expected"] for r in rows}
  contrasts = _contrasting_replies(run, replies, expected)
  to_judge = contrasts
  if cfg.labels == "rubric":
    scores, to_judge = [], replies + contrasts
  verdicts = _judge_replies(run, to_judge)
  scores += [verdict.score for verdict in verdicts]
  missing += [verdict.reason for verdict in verdicts if verdict.score is None]
  if missing:
    progress.say(
      f"reward: {len(missing)} of {len(well_formed) + len(contrasts)} answers have no "
      f"verdict and are left out: {progress.top_reasons(missing)}"
    )
  scored = [
    (reply, score)
    for reply, score in zip(replies + contrasts, scores, strict=True)
    if score is not None
  ]
  # Answers whose score follows from how they are made, to prompts that have a good one.
  good = [(r[0], r[2]) for r, score in scored if score >= probing.FALSE_POSITIVE]
  made = run.task.constructed_answers(good, random.Random(run.cfg.seed))
  scored += [((prompt, "", answer), score) for prompt, answer, score in made]
  if not scored:
    raise ValueError(
      f"{source} has no scored answers, and the reward model needs some: all were "
      "malformed, or their judge gave none (a rubric needs filter.metadata=told)"
    )
  questions = [scoring.reward_question(run, *reply) for reply, _ in scored]
  return questions, np.array([score for _, score in scored], np.float32)


def _fitting(renderer: scoring.Renderer, questions, scores):
  """Those questions that the model has room for, their scores, and how many others."""
  fits = [
    i for i, q in enumerate(questions) if renderer.fits(renderer.question_tokens(q))
  ]
  too_long = len(questions) - len(fits)
  if too_long:
    progress.say(
      f"reward: {too_long} of {len(questions)} questions are left out, being longer "
      f"than the {renderer.most} tokens that it reads (config.reward.length)"
    )
  return [questions[i] for i in fits], scores[fits], too_long


Reply = tuple[Prompt, str, str]  # prompt, thought and answer


def _contrasting_replies(run: Run, replies: list[Reply], expected: dict) -> list[Reply]:
  """For each prompt an answer that was given to one of another type, where whoever
  makes the labels can judge it anew, and drafts of the base."""
  prompts = {prompt.id: prompt for prompt, _, _ in replies}
  if run.recording:
    return [
      (prompts[row.prompt_id], "", row.answer)
      for row in run.recorded
      if not row.thought and row.prompt_id in prompts
    ]
  by_category = collections.defaultdict(list)
  for prompt, thought, answer in replies:
    by_category[prompt.category].append((expected[prompt.id], (thought, answer)))
  draw, contrasts = random.Random(run.cfg.seed), list[Reply]()
  for id, prompt in prompts.items():
    others = [s for type_, s in by_category[prompt.category] if type_ != expected[id]]
    if others:
      contrasts.append((prompt, *draw.choice(others)))
  if run.cfg.reward.drafts:
    drafts = samples.drafts(run, [*prompts.values()])
    contrasts += [
      (prompt, drafts[id].thought, drafts[id].answer) for id, prompt in prompts.items()
    ]
  return contrasts


def _judge_replies(run: Run, replies):
  """Verdicts on (prompt, thought, answer), by whoever makes the labels."""
  rubric = run.cfg.reward.labels == "rubric"
  if run.cfg.reward.shows_thought:
    questions = [judge.FilterQuestion(p, thought, a) for p, thought, a in replies]
    ask = judging.filter_rubric(run) if rubric else judging.filter_judge(run, "labels")
  else:
    questions = [judge.RewardQuestion(p, answer) for p, _, answer in replies]
    ask = judging.answer_rubric(run) if rubric else judging.answer_judge(run, "labels")
  return ask(questions)


def _split(questions, share: float) -> tuple[list[int], list[int]]:
  """Numbers of the questions that are held out, those of a share of the prompts, at
  least one, by id; and of the others."""
  ids = sorted(
    {q.prompt.id for q in questions}, key=lambda id: prompt_sets.fraction(f"held {id}")
  )
  held = set(ids[: max(1, round(share * len(ids)))])
  sides: tuple[list[int], list[int]] = ([], [])
  for i, question in enumerate(questions):
    sides[question.prompt.id not in held].append(i)
  return sides


def _group_ids(indices: Sequence[int], questions) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of the prompt, and of the answer's text, of each of some questions."""
  ids = [questions[i].prompt.id for i in indices]
  texts = [questions[i].answer for i in indices]
  prompts, answers = (np.unique(x, return_inverse=True)[1] for x in (ids, texts))
  return prompts.astype(np.int32), answers.astype(np.int32)


def _grouped_by_prompt(indices: list[int], questions) -> list[int]:
  """Numbers of questions, those of one prompt side by side, to be told apart; prompts
  of each category by turns."""
  indices_by_prompt = collections.defaultdict(list)
  for i in indices:
    indices_by_prompt[questions[i].prompt.id].append(i)
  prompts = [questions[group[0]].prompt for group in indices_by_prompt.values()]
  drawn = prompt_sets.balanced(prompts, None, 0)
  return [i for prompt in drawn for i in indices_by_prompt[prompt.id]]


def _plan_batches(run: Run, train: list[int], questions) -> list[list[int]]:
  """The rows of each step: of one category, answers to one prompt side by side."""
  cfg, seed = run.cfg.reward, run.cfg.seed
  by_category: dict[str, dict[str, list[int]]] = collections.defaultdict(
    lambda: collections.defaultdict(list)
  )
  for i in train:
    by_category[questions[i].prompt.category][questions[i].prompt.id].append(i)
  plan: list[list[int]] = []
  for epoch in itertools.count():
    if len(plan) >= cfg.steps:
      break
    steps = []
    for _, by_prompt in sorted(by_category.items()):
      groups = [*by_prompt.values()]
      order = prompt_sets.order(len(groups), seed=seed, epoch=epoch % 8)
      rows = [i for group in order for i in groups[group]]
      steps += [rows[at] for at in packing.batches(len(rows), cfg.rows)]
    order = prompt_sets.order(len(steps), seed=seed, epoch=epoch)
    plan += [steps[step] for step in order]
  return plan[: cfg.steps]


def _batch(renderer: scoring.Renderer, indices, questions, scores) -> dict:
  """One micro-batch of `reward.rows` rows, with scores and which prompt each is of."""
  rows = [renderer.question_tokens(questions[i]) for i in indices]
  category = questions[indices[0]].prompt.category
  batch = renderer.batch(category, rows)
  pad = renderer.cfg.rows - len(indices)
  batch["score_B"] = np.pad(scores[indices], (0, pad))
  prompt_B, answer_B = _group_ids(indices, questions)
  batch["prompt_B"] = np.pad(prompt_B, (0, pad))
  batch["answer_B"] = np.pad(answer_B, (0, pad))
  return {name: np.asarray(x)[None] for name, x in batch.items()}


def _measure(run: Run, ask, questions, scores, held_out: list[int]) -> dict:
  """Agreement with the judge on the held-out prompts, or a draw of very many, and
  the probes of METHOD section 4 on a few held-out prompts of each cell."""
  measured = _grouped_by_prompt(held_out, questions)[:MAX_MEASURED]
  verdicts = ask([questions[i] for i in measured])
  numbers = _group_ids(measured, questions)
  predicted = np.array([verdict.score for verdict in verdicts])
  return {
    "questions": len(questions),
    "held_out": reward.agreement(predicted, scores[measured], *numbers),
    "probes": judging.probe(run, ask, run.cfg.reward.metadata),
  }
