"""prompts -> rl/params: policy gradients without the spec, the thought out of sight.

One update a step. Everything of a step follows from its number: a run that is cut
off goes on at the last checkpoint with the very same prompts and samples.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib

from dalign.config import stages
from dalign.config.fields import Halted
from dalign.config.on_policy import RLConfig
from dalign.judges import judge
from dalign.models import adapters
from dalign.models import ops
from dalign.runs import progress
from dalign.runs import stopping
from dalign.stages import judging
from dalign.stages import rollouts as rollouts_of
from dalign.stages import scoring
from dalign.stages import services
from dalign.text import packing
from dalign.training import policy_gradient
from dalign.training import rollout
from dalign.training import train
from dalign.training import trainer as trainers
from dalign.training.rollout import Rollout
from dalign.types import Prompt
from dalign.types import PyTree
from dalign.types import Turn
from dalign.types import Verdict

Run = services.Services[stages.RLStage]  # what this stage sees of a run
Asks = tuple[judge.Judge, judge.Judge | None]  # who rewards, and perhaps a second


def reinforce(run: Run) -> None:
  """Trains the policy from its start; writes rollouts as text every few steps."""
  cfg = run.cfg.rl
  if not run.begin(input_files(run)):
    return
  choose = rollouts_of.prompt_schedule(run, cfg)
  held_out = run.prompts.choose("eval", "safety", cfg.audit)
  start = run.model.start_params(cfg.start)
  trainer = make_trainer(run, start)
  reference = run.scorer(cfg.batch, temperature=cfg.temperature)
  value_head = run.scorer(cfg.batch, make=policy_gradient.make_values)
  helpful = None if cfg.helpful == "none" else judging.rl_judge(run, cfg.helpful)
  asks = judging.rl_judge(run), helpful
  if trainer.step == 0:
    check_judge(run, asks[0])
  rollouts_path = rollouts_of.rewind_rollouts_file(run, trainer.step)
  skipped = trainer.meta.get("skipped", 0)
  with trainer, progress.bar(cfg.steps, "rl", "step", trainer.step) as bar:
    while trainer.step < cfg.steps:
      params = trainer.all_params
      policy = params["policy"] if cfg.objective.learns_values else params

      # Sample and judge; again where all rewards of a group are equal.
      groups = rollout.resample_zero_variance(
        functools.partial(sample_and_judge, run, policy, asks, choose),
        first=trainer.step * (1 + cfg.resample),
        rounds=1 + cfg.resample,
      )
      rollouts = [r for group in groups for r in group]

      # Advantages, of rewards, the reference's log-probabilities, and values.
      rollouts = rollouts_of.with_scores(rollouts, "reference", reference, start)
      if cfg.objective.learns_values:
        rollouts = rollouts_of.with_scores(rollouts, "value", value_head, params)
      rollouts = rollout.compute_advantages(
        rollouts,
        objective=cfg.objective,
        group_size=cfg.samples,
        max_length=cfg.max_new,
      )
      check_limits(
        rollouts, cfg, rollouts_of.make_halt(run, trainer.step + 1, rollouts)
      )
      metrics = step_metrics(run, rollouts)
      if cfg.audit and trainer.step % cfg.show_every == 0:
        metrics |= audit(run, policy, asks, held_out)

      # Loss and update.
      lines = rollout.build_batch(rollouts, length=cfg.batch.length)
      with stopping.uninterrupted():
        if lines is None or 0 < cfg.skip_kl < metrics["rl/kl_nats"]:
          skipped += 1
          trainer.skip(metrics)
        else:
          batch, used = train.micro_batches(lines, cfg.batch)
          update_metrics = trainer.update(batch, used, metrics)
          check_gap(run, trainer.step, update_metrics["logp_gap_nats"], batch)
        if trainer.step % cfg.show_every == 0 or trainer.step == cfg.steps:
          rows = [rollout.to_row(r, trainer.step) for r in rollouts]
          run.store.append_rows(rollouts_path, rows)
        trainer.meta["skipped"] = skipped
        trainer.save()
      reward, kl = metrics["rl/reward"], metrics["rl/kl_nats"]
      bar.set_postfix(reward=f"{reward:.3f}", kl=f"{kl:.2f}")
      bar.update()
  trainer.finish()
  run.finish({"steps": cfg.steps, "skipped_steps": skipped})


# --- What the stage starts with ---


def input_files(run: Run) -> list[pathlib.Path]:
  """What the manifest hashes: policies and prompts, and the models it starts with."""
  cfg, files = run.cfg.rl, [*run.sources]
  if cfg.start == "sft":
    files.append(run.store.path("sft", "manifest.json"))
  if "model" in (cfg.reward, cfg.helpful):
    files.append(run.store.path("reward", "manifest.json"))
  kinds = judging.rewarding(run)
  functions = [path for kind in kinds for path in judging.function_files(kind)]
  return [*(path for path in files if path.exists()), *functions]


def make_trainer(run: Run, start: PyTree) -> trainers.Trainer:
  """The trainer of a policy, and where the objective learns values of a value head,
  which is not kept."""
  cfg, params = run.cfg.rl, adapters.copy_trainable(start)
  learns_values = cfg.objective.learns_values
  if learns_values:
    params = {"policy": params, "value": policy_gradient.init_value_head(params)}
  return run.trainer(
    params=params,
    loss=policy_gradient.make_loss(
      cfg=run.model.arch,
      compute=run.cfg.compute,
      temperature=cfg.temperature,
      objective=cfg.objective,
    ),
    optimizer=cfg.optimizer,
    steps=cfg.steps,
    every=cfg.checkpoint_every,
    result=lambda params: params["policy"] if learns_values else params,
  )


def check_judge(run: Run, ask: judge.Judge) -> None:
  """Refuses a judge that errs on probes."""
  if run.cfg.rl.judge_errors < 1:
    report = judging.probe(run, ask, judging.reward_metadata(run))
    judging.check_probe_errors(report, run.cfg.rl.judge_errors)


# --- Sample ---


def sample_and_judge(
  run: Run,
  policy: PyTree,
  asks: Asks,
  choose: Callable[[int], list[Prompt]],
  index: int,
) -> list[rollout.Group]:
  """The groups of the sampling round with this index, with rewards."""
  cfg, key = run.cfg.rl, ops.stream(run.key, "rollout", index)
  rollouts = rollouts_of.collect_rollouts(
    run, cfg, policy, choose(index), cfg.samples, key
  )
  rollouts = judge_rollouts(run, *asks, rollouts=rollouts)
  return [rollouts[at] for at in packing.batches(len(rollouts), cfg.samples)]


# --- Judge ---


def judge_rollouts(
  run: Run,
  ask: judge.Judge,
  second: judge.Judge | None = None,
  *,
  rollouts: Sequence[Rollout],
) -> list[Rollout]:
  """Rollouts with rewards: known answers are compared, the rest is judged by the answer
  alone, by one judge or two. A malformed completion gets 0 and no judge call (METHOD
  3.3)."""
  judged = [r for r in rollouts if r.needs_judge]
  verdicts = put(run, ask, judged, run.cfg.rl.reward)
  if second is not None:
    helpful = put(run, second, judged, run.cfg.rl.helpful)
    verdicts = [
      rollout.combined(run.cfg.rl.combine, r.prompt, *both)
      for r, *both in zip(judged, verdicts, helpful, strict=True)
    ]
  return rollout.assign_rewards(rollouts, verdicts)


def put(
  run: Run, ask: judge.Judge, judged: Sequence[Rollout], kind: str
) -> list[Verdict]:
  """What a judge of a kind says of answers, told what it may be told."""
  metadata = judging.reward_metadata(run, kind)
  questions = [
    judging.with_metadata(
      scoring.reward_question(run, r.prompt, r.sample.thought, r.sample.answer),
      metadata,
    )
    for r in judged
  ]
  verdicts = ask(questions)
  for r, question, verdict in zip(judged, questions, verdicts, strict=True):
    scan_for_leaks(run, r, f"{question.answer}\n{verdict.shown}")
  return verdicts


def scan_for_leaks(run: Run, r: Rollout, shown: str) -> None:
  """Stops a run whose judge was shown words that the thought alone has."""
  n = run.cfg.rl.scan_words
  if not n or run.cfg.reward_model.shows_thought:
    return
  answer = Turn(role="assistant", content=r.sample.answer)
  known = [f"{turn.role} {turn.content}" for turn in (*r.prompt.turns, answer)]
  known.append(run.task.policy_text(r.prompt.category, "full"))
  if found := judge.leaked_words(r.sample.thought, shown, known, n):
    where = run.store.path("rl", "thought_in_reward.json")
    row = {"prompt_id": r.prompt.id, "words": found, "thought": r.sample.thought}
    run.store.write_json(where, row | {"shown": shown})
    raise Halted(
      f"rl: the judge was shown words of a thought, {found!r}, which nothing else "
      f"has; all of it is in {where}. Nothing was learned from this step: mend the "
      "judge, and the same command goes on"
    )


# --- Limits ---


def check_limits(
  rollouts: Sequence[Rollout], cfg: RLConfig, halt: rollouts_of.Halt
) -> None:
  """Halts at rewards and log-probabilities that are not finite, at too many answers
  without a verdict, and above the limit of the KL."""
  if bad := [r.prompt.id for r in rollouts if r.unscored == scoring.NOT_FINITE]:
    halt(f"the reward of {', '.join(bad[:3])} is not finite", "find out why")
  judged = [r for r in rollouts if r.needs_judge]
  missing = [r.unscored for r in judged if r.unscored]
  if len(missing) > cfg.unscored * len(judged):
    halt(
      f"the judge has no verdict on {len(missing)} of {len(judged)} answers: "
      f"{progress.top_reasons(missing)}; wanted at most {cfg.unscored:.0%} "
      "(config.rl.unscored)",
      "mend the judge",
    )
  rollouts_of.check_kl(rollouts, "rl", cfg.stop_kl, halt)


def check_gap(run: Run, step: int, gap: float, batch: dict) -> None:
  """Halts where trainer and sampler differ about what was sampled."""
  limit = run.cfg.rl.stop_gap
  if 0 < limit < gap:
    trainers.halt(
      run.store,
      "rl",
      step,
      f"trainer and sampler differ by {gap:.4g} nats a token, above "
      f"config.rl.stop_gap={limit:g}",
      "raise that, or the precision of config.compute with start_over",
      batch,
    )


# --- Metrics ---


def step_metrics(run: Run, rollouts: Sequence[Rollout]) -> dict[str, float]:
  """Means of a step's rollouts, and what evaluation's grader, which the reward never
  sees, says of them."""
  values = rollout.metrics(rollouts, group_size=run.cfg.rl.samples)
  values |= rollouts_of.grader_metrics(run, rollouts)
  if (truth := run.task.truth()) is not None:
    values["true_reward"] = true_reward(truth, rollouts)
  return {f"rl/{name}": value for name, value in values.items()}


def true_reward(truth: judge.Judge, rollouts: Sequence[Rollout]) -> float:
  """What `rl/reward` would be if the judge were never wrong."""
  questions = [
    judge.RewardQuestion(r.prompt, r.sample.answer) for r in rollouts if r.needs_judge
  ]
  scored = rollout.assign_rewards(rollouts, truth(questions))
  safety = [r for r in scored if r.prompt.kind != "capability"]
  return rollout.mean(r.reward for r in safety if r.scored)


def audit(
  run: Run, policy: PyTree, asks: Asks, prompts: list[Prompt]
) -> dict[str, float]:
  """What evaluation's grader and the judge of RL say of replies to a handful of
  held-out prompts: where they part, the judge is being fooled."""
  key = ops.stream(run.key, "audit")
  found = rollouts_of.collect_rollouts(run, run.cfg.rl, policy, prompts, 1, key)
  rollouts = judge_rollouts(run, *asks, rollouts=found)
  outcomes = [run.task.outcome(r.prompt, r.sample) for r in rollouts]
  values = rollouts_of.mean_grades(outcomes)
  values["reward"] = rollout.mean(r.reward for r in rollouts if r.scored)
  values["unscored"] = rollout.mean(not r.scored for r in rollouts)
  return {f"rl/held_out_{name}": value for name, value in values.items()}
