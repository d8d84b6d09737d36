"""prompts -> rl/params: policy gradients without the spec, the thought out of sight.

One update a step. Everything of a step follows from its number: a run that is cut
off goes on at the last checkpoint with the very same prompts and samples.
"""

import collections
from collections.abc import Iterable
import dataclasses
import functools

import numpy as np

from dalign.config import schema as configs
from dalign.data import prompt_sets
from dalign.evaluation import evals
from dalign.judges import judge
from dalign.models import adapters
from dalign.models import ops
from dalign.policy import prompting
from dalign.runs import stopping
from dalign.sampling.sampler import Request
from dalign.stages import context
from dalign.stages import scoring
from dalign.text import chat_template
from dalign.text import packing
from dalign.text import words
from dalign.training import policy_gradient
from dalign.types import Leaf
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Turn


def reinforce(run: context.Run) -> None:
  """Trains the policy from its start; writes rollouts as text every few steps."""
  cfg = run.cfg.rl
  inputs = [*run.sources]
  if cfg.start == "sft":
    inputs.append(run.store.path("sft", "manifest.json"))
  if cfg.reward == "model":
    inputs.append(run.store.path("reward", "manifest.json"))
  if not run.begin("rl", [path for path in inputs if path.exists()]):
    return
  start = run.start_params(cfg.start)
  params = adapters.apart(start)
  valued = cfg.objective.learns_values
  if valued:
    params = {"policy": params, "value": policy_gradient.init_value(params)}
  trainer = context.Trainer(
    run=run,
    stage="rl",
    params=params,
    loss=policy_gradient.make_loss(
      cfg=run.arch,
      compute=run.cfg.compute,
      temperature=cfg.temperature,
      objective=cfg.objective,
    ),
    optimizer=cfg.optimizer,
    steps=cfg.steps,
    every=cfg.checkpoint_every,
    result=(lambda params: params["policy"]) if valued else (lambda params: params),
  )
  step = _Step(run, start)
  if trainer.step == 0:
    _admit(run, step.judge)
  shown = run.store.path("rl", "rollouts.jsonl")
  before = run.store.read_rows(shown) if run.store.has(shown) else []
  run.store.write_rows(shown, [r for r in before if r["step"] <= trainer.step])
  skipped = trainer.meta.get("skipped", 0)
  with trainer, context.bar(cfg.steps, "rl", "step", trainer.step) as bar:
    while trainer.step < cfg.steps:
      rollouts, values = step.roll(trainer.whole, trainer.step)
      if cfg.audit and trainer.step % cfg.show_every == 0:
        values |= step.audit(trainer.whole)
      batch, used = step.batch(rollouts)
      with stopping.whole():
        if batch is None or 0 < cfg.skip_kl < values["rl/kl_nats"]:
          skipped += 1
          trainer.skip(values)
        else:
          found = trainer.update(batch, used, values)
          step.check_gap(trainer.step, found["logp_gap_nats"], batch)
        if trainer.step % cfg.show_every == 0 or trainer.step == cfg.steps:
          run.store.append_rows(shown, [_shown(trainer.step, r) for r in rollouts])
        trainer.meta["skipped"] = skipped
        trainer.save()
      bar.set_postfix(
        reward=f"{values['rl/reward']:.3f}", kl=f"{values['rl/kl_nats']:.2f}"
      )
      bar.update()
  trainer.finish()
  run.store.finish("rl", {"steps": cfg.steps, "skipped_steps": skipped})


def _admit(run: context.Run, ask: judge.Judge) -> None:
  """Refuses a judge that errs on probes."""
  limit = run.cfg.rl.judge_errors
  if limit < 1:
    scoring.refuse(scoring.probe(run, ask, scoring.metadata(run)), limit)


@dataclasses.dataclass
class _Rollout:
  """One sampled completion and what became of it."""

  prompt: Prompt
  sample: Sample
  before: list[int]
  logp: tuple[float, ...]
  judged: float = 0.0
  unscored: str = ""  # why it has no verdict
  trained: bool = False
  # Of each sampled token: its log-probability under the start, its advantage, what it
  # was worth to the value head, and the return that the head should have said.
  reference: Leaf = None
  advantage: Leaf = None
  value: Leaf = None
  worth: Leaf = None

  @property
  def asked(self) -> bool:
    """Whether a judge is asked: known answers are compared, malformed ones have 0."""
    return not self.sample.malformed and self.prompt.kind != "capability"

  @property
  def scored(self) -> bool:
    """Whether a judge gave a verdict."""
    return not self.unscored

  @property
  def known(self) -> int:
    """How many of the row's tokens were not sampled."""
    return len(self.before) + self.sample.forced

  @property
  def tokens(self) -> list[int]:
    return [*self.before, *self.sample.tokens]

  @property
  def reward(self) -> float:
    """Judge times format."""
    return 0.0 if self.sample.malformed else self.judged

  @property
  def kl(self) -> float:
    """log pi_old - log pi_start of all that was sampled, in nats."""
    return float(np.sum(np.array(self.logp) - self.reference))


class _Step:
  """Rollouts, rewards and the batch of one step."""

  def __init__(self, run: context.Run, start):
    self.run, self.cfg, self.start = run, run.cfg.rl, start
    safety = self._fitting(run.choose("train", "safety", None, self.cfg.expected))
    cells = collections.defaultdict(list)
    for prompt in safety:
      cells[prompt.category, prompt.expected].append(prompt)
    self.cells = [cell for _, cell in sorted(cells.items())]
    wanted = self.cfg.prompts - self.cfg.capability
    self.able = self._fitting(run.choose("train", "capability", None))
    if len(safety) < wanted:
      raise ValueError(
        f"rl: wanted {wanted} or more training prompts of kind safety and of "
        f"{', '.join(self.cfg.expected)} (config.rl.expected), found {len(safety)}"
      )
    if self.cfg.capability and not self.able:
      raise ValueError(
        f"config.rl.capability: wanted {self.cfg.capability} training prompts of kind "
        "capability a step, found none; add some, or set it to 0"
      )
    temperature = self.cfg.temperature
    self.score = context.Scorer(run, self.cfg.batch, temperature=temperature)
    if self.cfg.objective.learns_values:
      worth = policy_gradient.make_worth(cfg=run.arch, compute=run.cfg.compute)
      self.worth = context.Scorer(run, self.cfg.batch, score=worth)
    self.judge = scoring.rl_judge(run)
    self.watched = run.choose("eval", "safety", self.cfg.audit)

  def _fitting(self, prompts: list[Prompt]) -> list[Prompt]:
    """Those that are not too long for the sampler."""
    run = self.run
    rows = {
      p.id: prompting.opened(run.tok, prompting.plain(p), run.thinks) for p in prompts
    }
    long = context.too_long(run, rows, run.cfg.sampler.prefix_step)
    return [prompt for prompt in prompts if prompt.id not in long]

  def prompts(self, step: int) -> list[Prompt]:
    """The prompts of a step, or of a round of one: those of each category and response
    type by turns, so that no type is rewarded more often, then capability."""
    cfg, seed = self.cfg, self.run.cfg.seed
    wanted = cfg.prompts - cfg.capability
    chosen: dict[str, Prompt] = {}
    at = step * wanted
    while len(chosen) < wanted:
      turn, cell = at // len(self.cells), self.cells[at % len(self.cells)]
      prompt = cell[prompt_sets.visits(len(cell), turn, 1, seed=seed)[0]]
      chosen[prompt.id] = prompt
      at += 1
    at, count = step * cfg.capability, cfg.capability
    able = prompt_sets.visits(len(self.able), at, count, seed=seed) if count else []
    return [*chosen.values(), *(self.able[i] for i in able)]

  def roll(self, params, step: int) -> tuple[list[_Rollout], dict[str, float]]:
    """Samples, rewards and advantages of a step, and its metrics."""
    objective, shape = self.cfg.objective, (-1, self.cfg.samples)
    policy = params["policy"] if objective.learns_values else params
    rollouts, idle_B = self._different(policy, step)
    for r, own in zip(rollouts, _read(self.score, self.start, rollouts), strict=True):
      r.reference = own
    if objective.learns_values:
      for r, own in zip(rollouts, _read(self.worth, params, rollouts), strict=True):
        r.value = own
    lengths = [len(r.logp) for r in rollouts]
    mask_NT = np.arange(max(lengths))[None] < np.array(lengths)[:, None]

    def padded(rows):
      out_NT = np.zeros(mask_NT.shape)
      out_NT[mask_NT] = np.concatenate(rows)
      return out_NT

    reward_N = np.array([r.reward for r in rollouts])
    reward_N += policy_gradient.overlong(
      lengths, most=self.cfg.max_new, margin=objective.overlong
    )
    advantage_NT, worth_NT = policy_gradient.advantages(
      objective,
      reward_N.reshape(shape),
      np.array([r.scored for r in rollouts]).reshape(shape),
      padded([np.array(r.logp) - r.reference for r in rollouts]),
      mask_NT,
      padded([r.value for r in rollouts]) if objective.learns_values else None,
    )
    for i, r in enumerate(rollouts):
      r.advantage, r.worth = advantage_NT[i, : lengths[i]], worth_NT[i, : lengths[i]]
      cut = objective.mask_truncated and r.sample.finish == "length"
      # What moves a policy besides rewards: KL in them, lengths, a penalty, values.
      learns = (
        objective.penalised
        or objective.learns_values
        or np.any(np.abs(r.advantage) > 1e-6)
      )
      r.trained = r.scored and not cut and bool(learns)
    values = self._metrics(rollouts, idle_B)
    self._check(step + 1, rollouts, values["rl/kl_nats"])
    return rollouts, values

  def _check(self, step: int, rollouts: list[_Rollout], kl: float) -> None:
    """Halts at rewards and log-probabilities that are not finite, and above the limit
    of the KL."""
    batch = {
      "prompt_id": [r.prompt.id for r in rollouts],
      "thought": [r.sample.thought for r in rollouts],
      "answer": [r.sample.answer for r in rollouts],
      "kl_nats": [r.kl for r in rollouts],
      "unscored": [r.unscored for r in rollouts],
    }
    halt = functools.partial(self.run.halt, "rl", step, batch=batch)
    if bad := [r.prompt.id for r in rollouts if r.unscored == scoring.NOT_FINITE]:
      halt(f"the reward of {', '.join(bad[:3])} is not finite", "find out why")
    if not np.isfinite(kl):
      halt("log-probabilities of rollouts not finite", "find out why")
    asked = [r for r in rollouts if r.asked]
    missing = [r.unscored for r in asked if r.unscored]
    if len(missing) > self.cfg.unscored * len(asked):
      halt(
        f"the judge has no verdict on {len(missing)} of {len(asked)} answers: "
        f"{context.counted(missing)}; wanted at most {self.cfg.unscored:.0%} "
        "(config.rl.unscored)",
        "mend the judge",
      )
    limit = self.cfg.stop_kl
    if 0 < limit < kl:
      halt(
        f"rollouts {kl:.4g} nats from the start, above config.rl.stop_kl={limit:g}",
        "raise that",
      )

  def check_gap(self, step: int, gap: float, batch: dict) -> None:
    """Halts where trainer and sampler differ about what was sampled."""
    limit = self.cfg.stop_gap
    if 0 < limit < gap:
      self.run.halt(
        "rl",
        step,
        f"trainer and sampler differ by {gap:.4g} nats a token, above "
        f"config.rl.stop_gap={limit:g}",
        "raise that, or the precision of config.compute with start_over",
        batch,
      )

  def _different(self, policy, step: int) -> tuple[list[_Rollout], np.ndarray]:
    """The judged rollouts of a step, and which of its groups have equal rewards; these
    are replaced by groups of other prompts, as often as the config says (DAPO)."""
    rounds = 1 + self.cfg.resample
    found: list[list[_Rollout]] = []
    for turn in range(rounds):
      fresh = self._sample(policy, step * rounds + turn)
      self._judge([r for group in fresh for r in group])
      if turn:  # those that differ take the place of those that do not
        fresh = [group for group in fresh if not _idle(group)]
        kept = [group for group in found if not _idle(group)]
        spare = [group for group in found if _idle(group)]
        fresh = (kept + fresh + spare)[: len(found)]
      found = fresh
      if not any(map(_idle, found)):
        break
    return [r for group in found for r in group], np.array([*map(_idle, found)])

  def audit(self, params) -> dict[str, float]:
    """What evaluation's grader and the judge of RL say of replies to a handful of
    held-out prompts: where they part, the judge is being fooled."""
    policy = params["policy"] if self.cfg.objective.learns_values else params
    groups = self._complete(policy, self.watched, 1, ops.stream(self.run.key, "audit"))
    found = [group[0] for group in groups]
    self._judge(found)
    values = _audited([self.run.domain.outcome(r.prompt, r.sample) for r in found])
    values["reward"] = _mean(r.reward for r in found if r.scored)
    values["unscored"] = _mean(not r.scored for r in found)
    return {f"rl/held_out_{name}": value for name, value in values.items()}

  def _sample(self, params, step: int) -> list[list[_Rollout]]:
    key = ops.stream(self.run.key, "rollout", step)
    return self._complete(params, self.prompts(step), self.cfg.samples, key)

  def _complete(
    self, params, prompts: list[Prompt], samples: int, key
  ) -> list[list[_Rollout]]:
    """So many rollouts of each prompt, not judged yet."""
    run, cfg = self.run, self.cfg
    before = [
      chat_template.render_chat(run.tok, list(prompting.plain(p))) for p in prompts
    ]
    requests, place = [], {}
    for i, prompt in enumerate(prompts):
      tokens = (
        *before[i],
        *prompting.forced(run.tok, prompting.plain(prompt), run.thinks),
      )
      for r in range(samples):
        row = prompt.id, r
        place[row] = i, r
        requests.append(Request(tokens=tokens, row_id=row, max_new=cfg.max_new))
    done = context.complete(
      run,
      run.sampler.prepare(params),
      [requests],
      key=key,
      temperature=cfg.temperature,
      max_new=cfg.max_new,
      room=run.cfg.sampler.prefix_step,
    )
    groups: list[list] = [[None] * samples for _ in prompts]
    for completion in done:
      i, r = place[completion.request.row_id]
      sample = run.sample_row(prompts[i], completion, r, run.thinks)
      groups[i][r] = _Rollout(prompts[i], sample, before[i], completion.logp)
    return groups

  def _judge(self, rollouts: list[_Rollout]) -> None:
    """Rewards: known answers are compared, the rest is judged by the answer alone.

    A malformed completion gets 0 and no judge call (METHOD 3.3).
    """
    asked = [r for r in rollouts if r.asked]
    for r in rollouts:
      if r.prompt.kind == "capability" and not r.sample.malformed:
        r.judged = words.correct(r.sample.answer, r.prompt.answer)
    metadata = scoring.metadata(self.run)
    questions = [
      scoring.reward_question(
        self.run,
        prompt_sets.told(r.prompt, metadata),
        r.sample.thought,
        r.sample.answer,
      )
      for r in asked
    ]
    verdicts = self.judge(questions)
    for r, question, verdict in zip(asked, questions, verdicts, strict=True):
      r.unscored = verdict.reason if verdict.score is None else ""
      r.judged = verdict.score or 0.0
      self._scan(r, f"{question.answer}\n{verdict.shown}")

  def _scan(self, r: _Rollout, shown: str) -> None:
    """Stops a run whose judge was shown words that the thought alone has."""
    n, prompt, domain = self.cfg.scan_words, r.prompt, self.run.domain
    if not n or self.run.cfg.reward.shows_thought:
      return
    answer = Turn(role="assistant", content=r.sample.answer)
    known = [f"{turn.role} {turn.content}" for turn in (*prompt.turns, answer)]
    known.append(domain.policy_text(prompt.category, "full"))
    if found := judge.carried(r.sample.thought, shown, known, n):
      where = self.run.store.path("rl", "thought_in_reward.json")
      row = {"prompt_id": prompt.id, "words": found, "thought": r.sample.thought}
      self.run.store.write_json(where, row | {"shown": shown})
      raise configs.Halted(
        f"rl: the judge was shown words of a thought, {found!r}, which nothing else "
        f"has; all of it is in {where}. Nothing was learned from this step: mend the "
        "judge, and the same command goes on"
      )

  def batch(self, rollouts: list[_Rollout]):
    """The packed micro-batches of the rollouts that carry a gradient, or None."""
    trained = [r for r in rollouts if r.trained]
    if not trained:
      return None, 0
    rows = [(r.tokens, [False] * r.known + [True] * len(r.logp)) for r in trained]
    packed = packing.pack(rows, length=self.cfg.batch.length)
    left_out_B = np.zeros(len(packed.tokens_BT), np.float32)
    left_out_B[0] = sum(r.scored for r in rollouts) - len(trained)
    more = {
      "sampled_BT": packed.weight_BT > 0,
      "left_out_B": left_out_B,
    } | policy_gradient.placed(
      packed.tokens_BT.shape,
      packed.where,
      logp=[r.logp for r in trained],
      advantage=[r.advantage for r in trained],
      reference=[r.reference for r in trained],
      worth=[r.worth for r in trained],
    )
    return context.micro_batches(packed.lines | more, self.cfg.batch)

  def _metrics(self, rollouts: list[_Rollout], idle_B) -> dict[str, float]:
    safety = [r for r in rollouts if r.prompt.kind != "capability"]
    values = {
      "reward": _mean(r.reward for r in safety if r.scored),
      "format": _mean(not r.sample.malformed for r in rollouts),
      "kl_nats": _mean(r.kl for r in rollouts),
      "length_tokens": _mean(len(r.logp) for r in rollouts),
      "truncated": _mean(r.sample.finish == "length" for r in rollouts),
      "unscored": _mean(not r.scored for r in rollouts),
      "idle_groups": _mean(idle_B),
      "distinct": len({r.sample.tokens for r in rollouts}) / len(rollouts),
    }
    if able := [r.judged for r in rollouts if r.prompt.kind == "capability"]:
      values["capability"] = _mean(able)
    for kind in ("refuse", "safe_complete", "comply"):
      some = [r for r in safety if r.prompt.expected == kind and r.scored]
      if some:
        values[f"reward_{kind}"] = _mean(r.reward for r in some)
    # Evaluation's grader, beside the reward, which never sees it.
    watched = [self.run.domain.outcome(r.prompt, r.sample) for r in safety]
    audited = _audited(watched)
    values |= {f"audit_{name}": value for name, value in audited.items()}
    thoughts = [r for r in safety if r.sample.thought]
    for name in self.run.domain.monitored:
      found = [
        row["scores"][name]
        for row in watched
        if row["thought"] and row["scores"][name] is not None
      ]
      if found:
        values[f"thought_{name.removeprefix('thought_')}"] = _mean(found)
    values["thought_words"] = _mean(len(r.sample.thought.split()) for r in thoughts)
    return {f"rl/{name}": value for name, value in values.items()}


def _mean(values: Iterable[float]) -> float:
  """Their mean, or NaN, which metrics take for missing, where there are none."""
  values = [*values]
  return float(np.mean(values)) if values else np.nan


def _audited(rows: list[dict]) -> dict[str, float]:
  """What evaluation's grader says of replies: the mean of each response type's own
  metric, and over all replies the "grade"."""
  found = {name: [r["scores"].get(name) for r in rows] for name in evals.TYPES}
  known = {n: [x for x in xs if x is not None] for n, xs in found.items()}
  values = {name: float(np.mean(xs)) for name, xs in known.items() if xs}
  if grades := [x for xs in known.values() for x in xs]:
    values["grade"] = float(np.mean(grades))
  return values


def _read(score: context.Scorer, params, rollouts: list[_Rollout]) -> list[np.ndarray]:
  """What a scorer says of each sampled token, once a rollout."""
  return score(params, [r.tokens for r in rollouts], [r.known for r in rollouts])


def _idle(group: list[_Rollout]) -> bool:
  """Whether the scored rewards of a group are all equal: it has no gradient."""
  return len({r.reward for r in group if r.scored}) < 2


def _shown(step: int, r: _Rollout) -> dict:
  return {
    "step": step,
    "prompt_id": r.prompt.id,
    "prompt": r.prompt.text,
    "category": r.prompt.category,
    "expected": r.prompt.expected,
    "thought": r.sample.thought,
    "answer": r.sample.answer,
    "malformed": r.sample.malformed,
    "reward": r.reward if r.scored else None,
    "unscored": r.unscored,
    "kl_nats": r.kl,
    "advantage": float(np.mean(r.advantage)),
  }
