"""prompts -> rl/params: policy gradients without the spec, the thought out of sight.

One update a rollout. Everything of a step follows from its number: a run that is cut
off goes on at the last checkpoint with the very same prompts and samples.
"""

import collections
import dataclasses

import jax
import numpy as np

from dalign import compose
from dalign import data
from dalign import judge
from dalign import ops
from dalign import rl
from dalign import text
from dalign import words
from dalign.pipeline import context
from dalign.pipeline import scoring
from dalign.sampler import Request
from dalign.types import Prompt


def reinforce(run: context.Run) -> None:
  """Trains the policy from its start; writes rollouts as text every few steps."""
  cfg = run.cfg.rl
  inputs = [run.spec_dir]
  if cfg.start == "sft":
    inputs.append(run.store.path("sft", "manifest.json"))
  if cfg.reward == "model":
    inputs.append(run.store.path("reward", "manifest.json"))
  if not run.begin("rl", [path for path in inputs if path.exists()]):
    return
  start = run.start_params(cfg.start)
  trainer = context.Trainer(
    run=run,
    stage="rl",
    params=jax.tree.map(lambda x: x.copy(), start),
    axes=run.axes,
    loss=rl.make_loss(
      cfg=run.arch,
      compute=run.cfg.compute,
      temperature=cfg.temperature,
      ratio_cap=cfg.ratio_cap,
      length_norm=cfg.length_norm,
    ),
    optimizer=cfg.optimizer,
    steps=cfg.steps,
    every=cfg.checkpoint_every,
  )
  step = _Step(run, start)
  shown = run.store.path("rl", "rollouts.jsonl")
  before = run.store.read_rows(shown) if shown.exists() else []
  run.store.write_rows(shown, [r for r in before if r["step"] <= trainer.step])
  skipped = trainer.meta.get("skipped", 0)
  with context.bar(cfg.steps, "rl", "step", trainer.step) as bar:
    while trainer.step < cfg.steps:
      rollouts, values = step.roll(trainer.state.params, trainer.step)
      batch, used = step.batch(rollouts)
      if batch is None:
        skipped += 1
        trainer.skip(values)
      else:
        trainer.update(batch, used, values)
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


@dataclasses.dataclass
class _Rollout:
  """One sampled completion and what became of it."""

  prompt: Prompt
  sample: object
  before: list[int]
  logp: tuple[float, ...]
  judged: float = 0.0
  scored: bool = True
  kl: float = 0.0
  advantage: float = 0.0
  trained: bool = False


class _Step:
  """Rollouts, rewards and the batch of one step."""

  def __init__(self, run: context.Run, start):
    self.run, self.cfg, self.start = run, run.cfg.rl, start
    self.safety = _chunks(
      run.choose("train", "safety", 10**9, self.cfg.expected),
      max(1, run.cfg.reward.rows // self.cfg.samples),
    )
    self.able = run.choose("train", "capability", 10**9)
    self.score = context.Scorer(run, self.cfg.batch, temperature=self.cfg.temperature)
    if self.cfg.reward == "model":
      params = scoring.load_reward_model(run)
      self.judge = scoring.reward_model(run, params, scoring.Renderer(run))
    else:
      self.judge = judge.rubric_reward(run.spec, quality=None)

  def prompts(self, step: int) -> list[Prompt]:
    """The prompts of a step: whole chunks of one category, then capability."""
    cfg, seed = self.cfg, self.run.cfg.seed
    wanted = cfg.prompts - cfg.capability
    chosen, size = [], len(self.safety[0])
    count = -(-wanted // size)
    for i in data.visits(len(self.safety), step * count, count, seed=seed):
      chosen += self.safety[i]
    able = data.visits(len(self.able), step * cfg.capability, cfg.capability, seed=seed)
    return chosen[:wanted] + [self.able[i] for i in able]

  def roll(self, params, step: int) -> tuple[list[_Rollout], dict[str, float]]:
    """Samples, rewards and advantages of a step, and its metrics."""
    groups = self._sample(params, step)
    rollouts = [r for group in groups for r in group]
    self._judge(rollouts)
    self._reference(rollouts)
    shape = len(groups), self.cfg.samples
    judged_BR = np.array([r.judged for r in rollouts], np.float32).reshape(shape)
    scored_BR = np.array([r.scored for r in rollouts]).reshape(shape)
    kl_BR = np.array([r.kl for r in rollouts], np.float32).reshape(shape)
    form_BR = np.array([not r.sample.malformed for r in rollouts]).reshape(shape)
    total_BR = rl.combine(judged_BR, form_BR, kl_BR, kl_weight=self.cfg.kl_weight)
    advantage_BR = np.asarray(rl.ADVANTAGES[self.cfg.advantages](total_BR, scored_BR))
    idle_B = np.asarray(rl.zero_variance(judged_BR * form_BR, scored_BR))
    for b, group in enumerate(groups):
      for r, rollout in enumerate(group):
        rollout.advantage = float(advantage_BR[b, r])
        rollout.trained = bool(scored_BR[b, r]) and not idle_B[b]
    return rollouts, self._metrics(rollouts, idle_B)

  def _sample(self, params, step: int) -> list[list[_Rollout]]:
    run, cfg = self.run, self.cfg
    prompts = self.prompts(step)
    before = [text.render_chat(run.tok, list(compose.plain(p))) for p in prompts]
    requests, place = [], {}
    for i, prompt in enumerate(prompts):
      tokens = (*before[i], *compose.forced(run.tok, compose.plain(prompt), run.think))
      for r in range(cfg.samples):
        row = context.row_id(prompt.id, r)
        place[row] = i, r
        requests.append(Request(tokens=tokens, row_id=row, max_new=cfg.max_new))
    done = run.sampler.run(
      run.sampler.prepare(params),
      [requests],
      key=ops.stream(run.key, "rollout", step),
      temperature=cfg.temperature,
      prefix_room=run.cfg.sampler.prefix_step,
      prompt_room=run.cfg.sampler.prompt_room,
      max_new=cfg.max_new,
    )
    groups = [[None] * cfg.samples for _ in prompts]
    for completion in done:
      i, r = place[completion.request.row_id]
      sample = run.sample_row(prompts[i], completion, r, run.think)
      groups[i][r] = _Rollout(prompts[i], sample, before[i], completion.logp)
    return groups

  def _judge(self, rollouts: list[_Rollout]) -> None:
    """Rewards: known answers are compared, the rest is judged by the answer alone.

    A malformed completion gets 0 and no judge call (METHOD 3.3).
    """
    asked = []
    for r in rollouts:
      if r.sample.malformed:
        continue
      if r.prompt.kind == "capability":
        r.judged = words.correct(r.sample.answer, r.prompt.answer)
      else:
        asked.append(r)
    questions = [
      judge.RewardQuestion(prompt=r.prompt, answer=r.sample.answer) for r in asked
    ]
    for r, verdict in zip(asked, self.judge(questions), strict=True):
      r.scored = verdict.score is not None
      r.judged = verdict.score or 0.0

  def _reference(self, rollouts: list[_Rollout]) -> None:
    """The KL of each rollout to the start: its sum over the sampled tokens."""
    rows = [[*r.before, *r.sample.tokens] for r in rollouts]
    starts = [len(r.before) + r.sample.forced for r in rollouts]
    for r, own in zip(rollouts, self.score(self.start, rows, starts), strict=True):
      r.kl = float(np.sum(np.array(r.logp) - own))

  def batch(self, rollouts: list[_Rollout]):
    """The packed micro-batches of the rollouts that carry a gradient, or None."""
    rows = []
    for r in rollouts:
      if r.trained:
        known = len(r.before) + r.sample.forced
        tokens = [*r.before, *r.sample.tokens]
        sampled = [False] * known + [True] * (len(tokens) - known)
        rows.append((tokens, sampled, {"advantage": r.advantage}))
    if not rows:
      return None, 0
    packed = text.pack(rows, length=self.cfg.batch.length)
    logp_BT = np.zeros(packed.tokens_BT.shape, np.float32)
    start_BT = np.zeros(packed.tokens_BT.shape, bool)
    trained = [r for r in rollouts if r.trained]
    for r, (b, start, n) in zip(trained, packed.where, strict=True):
      logp_BT[b, start + n - len(r.logp) : start + n] = r.logp
      start_BT[b, start] = True
    more = {
      "sampled_BT": packed.weight_BT > 0,
      "advantage_BT": packed.extras["advantage"],
      "logp_BT": logp_BT,
      "start_BT": start_BT,
    }
    return context.micro_batches(packed.lines | more, self.cfg.batch)

  def _metrics(self, rollouts: list[_Rollout], idle_B) -> dict[str, float]:
    def mean(values):
      values = list(values)
      return float(np.mean(values)) if values else 0.0

    safety = [r for r in rollouts if r.prompt.kind != "capability"]
    values = {
      "reward": mean(r.judged * (not r.sample.malformed) for r in safety if r.scored),
      "format": mean(not r.sample.malformed for r in rollouts),
      "kl_nats": mean(r.kl for r in rollouts),
      "length_tokens": mean(len(r.logp) for r in rollouts),
      "truncated": mean(r.sample.finish == "length" for r in rollouts),
      "unscored": mean(not r.scored for r in rollouts),
      "idle_groups": mean(idle_B),
      "capability": mean(r.judged for r in rollouts if r.prompt.kind == "capability"),
      "distinct": len({r.sample.tokens for r in rollouts}) / len(rollouts),
    }
    for kind in ("refuse", "safe_complete", "comply"):
      some = [r for r in safety if r.prompt.expected == kind and r.scored]
      if some:
        values[f"reward_{kind}"] = mean(
          r.judged * (not r.sample.malformed) for r in some
        )
    return {f"rl/{name}": value for name, value in values.items()}


def _chunks(prompts: list[Prompt], size: int) -> list[list[Prompt]]:
  """Prompts of one category, `size` at a time and of mixed ideal types, so that a
  reward model reads their spec once; what does not fill a chunk is left out."""
  of = collections.defaultdict(list)
  for prompt in prompts:  # balanced order: types take turns
    of[prompt.category].append(prompt)
  return [
    some[at]
    for some in of.values()
    for at in context.batches(len(some), size)
    if at.stop - at.start == size
  ]


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
    "reward": r.judged,
    "kl_nats": r.kl,
    "advantage": r.advantage,
  }
