"""Asking a reward model: questions to token rows, rows to scores in [0, 1].

The one renderer of its questions, for training, probing and RL. A question has no
field for the thought, so none can reach the model.
"""

import collections
from collections.abc import Collection, Iterator, Mapping
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from typing import Any, Sequence

import jax
import numpy as np

from dalign.config import schema as configs
from dalign.data import prompt_sets
from dalign.judges import forms
from dalign.judges import judge
from dalign.judges import probing
from dalign.judges import recordings
from dalign.models import ops
from dalign.models import sharding
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.sampling import likelihood
from dalign.sampling import sampler as sampling
from dalign.stages import context
from dalign.stages import servers
from dalign.text import chat_template
from dalign.text import thinking
from dalign.text import words
from dalign.training import reward
from dalign.types import Prompt
from dalign.types import PyTree
from dalign.types import Turn
from dalign.types import Verdict

NOT_FINITE = "the reward model's score is not finite"  # why a question is unscored
UNLIKE = ("a", "1", " b", "\n\nc", '"d"', "(e)")  # prompts, by how they begin
PROBED = 27  # held-out prompts that each probe is put to
OPINIONS = {
  "refuse": "Another AI thinks that the right reply is a refusal.",
  "safe_complete": "Another AI thinks that the right reply is a safe completion.",
  "comply": "Another AI thinks that the right reply is a helpful answer.",
}


def rehearse(run: context.Run, stages: Collection[str]) -> None:
  """Renders what teacher, judges and reward model are to read of a prompt of each
  category. ValueError where the chat template leaves some of it out, before it costs.
  """
  if {"generate", "filter", "reward", "rl", "eval"}.isdisjoint(stages):
    return
  cfg, domain, said = run.cfg, run.domain, "An answer."
  judged = not {"filter", "reward"}.isdisjoint(stages)
  rewards = "reward" in stages or ("rl" in stages and cfg.rl.reward == "model")
  arms = cfg.eval.arms if "eval" in stages else ()
  whole, tried = run.think.tags, {p.category: p for p in run.all_prompts}.values()
  for prompt in tried:
    chats: list[tuple[str, Sequence[Turn]]] = []
    if "generate" in stages and cfg.generate.teacher == "base":
      worked = cfg.generate.demonstrations
      chats.append(("the teacher", domain.teach(prompt.blind(), worked=worked)))
    if "self_refine" in arms or ("generate" in stages and cfg.generate.revise):
      chats.append(("who revises", domain.revise(prompt, said)))
    if judged and cfg.filter.judge in ("model", "sampled"):
      question = judge.FilterQuestion(prompt=prompt, thought="A thought.", answer=said)
      chats.append(("the judge", domain.question(question)))
    if not {"spec_in_prompt", "spec_in_prompt_oracle"}.isdisjoint(arms):
      chats.append(("the base, told the policies", domain.summaries(prompt)))
    for reader, turns in chats:
      with _read_by(reader):
        chat_template.render_chat(run.tok, turns, whole=whole)
  if rewards:
    with _read_by("the reward model"):
      renderer = Renderer(run)
      for prompt in tried:
        told = prompt_sets.told(prompt, cfg.reward.metadata)
        renderer.own(reward_question(run, told, "A thought.", said))


@contextlib.contextmanager
def _read_by(reader: str) -> Iterator[None]:
  try:
    yield
  except ValueError as error:
    raise ValueError(f"what {reader} is to read: {error}") from error


class Renderer:
  """Reward questions as (shared prefix, own tokens); the prefix has spec(category)."""

  def __init__(self, run: context.Run):
    self.run, self.cfg = run, run.cfg.reward
    names = [*(p.id for p in run.spec.policies), specs.BENIGN]
    self.prefixes = {name: self._prefix(name) for name in names}
    longest = max(map(len, self.prefixes.values()))
    step = run.cfg.sampler.prefix_step
    self.room = -(-longest // step) * step

  def _system(self, category: str) -> Turn:
    spec = self.run.domain.policy_text(category, self.cfg.detail)
    return Turn(role="system", content=spec)

  def _render(self, turns) -> list[int]:
    return chat_template.render_chat(
      self.run.tok,
      list(turns),
      add_generation_prompt=False,
      whole=self.run.think.tags,  # an answer is judged as it is
    )

  def _prefix(self, category: str) -> list[int]:
    """The system turn; of a template that has none without a user's turn, what begins
    that turn for unlike prompts."""
    system = self._system(category)
    try:
      return self._render([system])
    except ValueError:
      answer = Turn(role="assistant", content="No.")
      chats = [[system, context.user_turn(asked), answer] for asked in UNLIKE]
      rows = [tuple(self._render(turns)) for turns in chats]
      return list(rows[0][: sampling.common_prefix(rows)])

  def own(self, question: judge.RewardQuestion) -> list[int]:
    """The question's tokens after the prefix, however many."""
    prompt = question.prompt
    turns = [self._system(prompt.category)]
    if prompt.expected:
      turns.append(Turn(role="system", content=OPINIONS[prompt.expected]))
    turns += [*prompt.turns, Turn(role="assistant", content=question.answer)]
    ids, prefix = self._render(turns), self.prefixes[prompt.category]
    if ids[: len(prefix)] != prefix:
      raise ValueError("the chat template does not begin with the policy alone")
    return ids[len(prefix) :]

  def fits(self, row: Sequence[int]) -> bool:
    """Whether the model reads so many tokens of a question; it reads no part of one."""
    return len(row) <= self.cfg.length

  def batch(self, category: str, rows: Sequence[list[int]]) -> dict:
    """Arrays of at most `reward.rows` rows of one category, padded to fixed shapes."""
    prefix = self.prefixes[category]
    longest = len(prefix) + max(map(len, rows))
    self.run.arch.check_length(longest, f"a question about {category}")
    return lines_after(prefix, rows, cfg=self.cfg, room=self.room)


def lines_after(
  prefix: list[int],
  rows: Sequence[list[int]],
  *,
  cfg: configs.RewardConfig,
  room: int,
) -> dict[str, Any]:
  """A prefix, padded to `room` tokens, and at most `rows` rows that follow it."""
  B, T = cfg.rows, cfg.length
  prefix_P = np.zeros(room, np.int32)
  prefix_P[: len(prefix)] = prefix
  tokens_BT, length_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
  for b, row in enumerate(rows):
    tokens_BT[b, : len(row)] = row
    length_B[b] = len(row)
  return {
    "prefix_P": prefix_P,
    "prefix_len": np.int32(len(prefix)),
    "tokens_BT": tokens_BT,
    "length_B": length_B,
  }


def load_reward_model(run: context.Run) -> PyTree:
  """The trained reward model's parameters."""
  return run.trained_params("reward", lambda params: reward.init_head(params, run.key))


def reward_model(run: context.Run, params: PyTree, renderer: Renderer) -> judge.Judge:
  """A judge whose verdicts are the reward model's sigmoid scores."""
  compute = dataclasses.replace(run.cfg.compute, remat=False)

  @functools.partial(jax.jit, out_shardings=sharding.whole(run.mesh))
  def scores(params, batch):
    return jax.nn.sigmoid(reward.logits(params, batch, cfg=run.arch, compute=compute))

  def ask(questions):
    of = collections.defaultdict(list)
    own = [renderer.own(question) for question in questions]
    verdicts: list[Verdict | None] = [None] * len(questions)
    for i, (question, row) in enumerate(zip(questions, own, strict=True)):
      if renderer.fits(row):
        of[question.prompt.category].append(i)
      else:
        reason = f"{len(row)} tokens after the policy, more than reward.length"
        verdicts[i] = Verdict(score=None, reason=reason)
    for category, indices in of.items():
      for at in context.batches(len(indices), run.cfg.reward.rows):
        some = indices[at]
        rows = [own[i] for i in some]
        found = np.asarray(scores(params, renderer.batch(category, rows)))
        for i, row, score in zip(some, rows, found[: len(some)], strict=True):
          finite = bool(np.isfinite(score))
          verdicts[i] = Verdict(
            score=float(score) if finite else None,
            reason="" if finite else NOT_FINITE,
            shown=renderer.run.tok.decode(row),
          )
    return verdicts

  return judge.Judge(ask, deterministic=True)


def reward_question(
  run: context.Run, prompt: Prompt, thought: str, answer: str
) -> judge.RewardQuestion:
  """What the reward model is asked: the answer alone, but where the config shows it the
  thought, which only a negative control does."""
  if run.cfg.reward.shows_thought:
    answer = f"{run.think.tag} {thought} {run.think.close} {answer}"
  return judge.RewardQuestion(prompt=prompt, answer=answer)


def filter_judge(
  run: context.Run, name: str, likely: judge.Quality | None = None
) -> judge.Judge:
  """The judge of thought and answer that the config asks for. A rubric's `likely` may
  be shared with others (`quality`)."""
  return _model(run, name) or filter_rubric(run, likely)


def answer_judge(
  run: context.Run, name: str, likely: judge.Quality | None = None
) -> judge.Judge:
  """The filter's judge, asked about answers alone."""
  return _model(run, name) or answer_rubric(run, likely)


def filter_rubric(run: context.Run, likely: judge.Quality | None = None) -> judge.Judge:
  """The judge of both that is no model, but for what `filter.quality` adds."""
  return run.domain.filter_rubric(likely or quality(run))


def answer_rubric(run: context.Run, likely: judge.Quality | None = None) -> judge.Judge:
  """The same of answers alone."""
  return run.domain.reward_rubric(likely or quality(run))


NOTHING = Turn(role="user", content="Say something.")  # a prompt that asks nothing


def quality(run: context.Run) -> judge.Quality | None:
  """How likely the base finds answers, without spec and thought, after their prompts
  and after NOTHING, if `filter.quality` asks for it. The base is loaded when it is
  first asked; what it said last is kept, as two rubrics ask of the same answers."""
  if not run.cfg.filter.quality:
    return None
  params = functools.cache(run.base_params)

  @functools.cache
  def scorer(length: int) -> context.Scorer:
    shape = configs.BatchConfig(micro=1, rows=max(1, 1024 // length), length=length)
    return context.Scorer(run, shape)

  @functools.lru_cache(maxsize=1)
  def of(pairs: tuple[tuple[Prompt, str], ...]):
    rows, starts = [], []
    for prompt, answer in pairs:
      for turns in (prompting.plain(prompt), (NOTHING,)):
        before = chat_template.render_chat(run.tok, list(turns))
        rows.append(before + run.tok.encode(answer))
        starts.append(len(before))
    length = -(-max(map(len, rows), default=1) // 256) * 256
    found = scorer(length)(params(), rows, starts)
    means = [float(own.mean()) if len(own) else math.nan for own in found]
    return [*zip(means[::2], means[1::2], strict=True)]

  return lambda pairs: of(tuple(pairs))


def _model(run: context.Run, name: str) -> judge.Judge | None:
  """The judge that the config has, but a rubric."""
  kind = run.cfg.filter.judge
  if kind == "model":
    return model_judge(run)
  if kind == "sampled":
    return sampled_judge(run, name)
  if kind == "recorded":
    return recorded_judge(run)
  return endpoint_judge(run) if kind == "endpoint" else None


def model_judge(run: context.Run) -> judge.Judge:
  """The base model as judge: its expected score over the label tokens."""
  score_logprobs = likelihood.of_labels(
    run.base_params(),
    tok=run.tok,
    cfg=run.arch,
    compute=run.cfg.compute,
    shardings=sharding.whole(run.mesh),
  )

  def render(category):
    return run.domain.policy_text(category, run.cfg.spec.detail)

  return judge.model_judge(render, score_logprobs)


def recorded_judge(run: context.Run) -> judge.Judge:
  """The votes that were recorded with the samples of a recorded teacher."""
  if not run.recording:
    raise ValueError(
      "config.filter.judge: recorded votes are those of a recorded teacher; wanted "
      f"generate.teacher=recorded:PATH, got {run.cfg.generate.teacher!r}"
    )
  return recordings.judges(run.recorded)


def endpoint_judge(run: context.Run) -> judge.Judge:
  """The model at `filter.endpoint` as judge."""
  cfg = run.cfg.filter
  server = servers.Server(run, cfg.endpoint, "judge")
  asked: collections.Counter = collections.Counter()

  def ask(conversations) -> list[forms.Said]:
    requests = []
    for turns in map(tuple, conversations):
      requests.append(servers.request(turns, cfg, asked[turns]))
      asked[turns] += 1
    found = server.chat(requests)
    server.say()
    return [*map(servers.said, found)]

  return run.domain.written_judge(ask, cfg.form)


def rl_judge(run: context.Run) -> judge.Judge:
  """What RL is rewarded by: the reward model, the filter's judge, or the rubric."""
  kind = run.cfg.rl.reward
  if kind == "model":
    return reward_model(run, load_reward_model(run), Renderer(run))
  return answer_judge(run, "rl") if kind == "judge" else answer_rubric(run)


def metadata(run: context.Run) -> str:
  """What the judge of RL is told of the ideal response type."""
  return (run.cfg.reward if run.cfg.rl.reward == "model" else run.cfg.rl).metadata


def probe(
  run: context.Run, ask: judge.Judge, told: str, prompts: int = PROBED
) -> dict[str, dict]:
  """What a judge makes of the probes of METHOD section 4, on held-out prompts of which
  it is `told` as metadata says."""
  probes = [
    (name, dataclasses.replace(asked, prompt=prompt_sets.told(asked.prompt, told)), low)
    for name, asked, low in run.domain.probes(run.choose("eval", "safety", prompts))
  ]
  report = probing.probe_report(probes, ask([question for _, question, _ in probes]))
  for name, row in report.items():
    if row["unscored"]:
      context.say(f"probes: {name}: {_unscored(row)}")
  return report


def _unscored(row: Mapping) -> str:
  """How many answers of a probe have no verdict, and why."""
  reasons = context.counted(collections.Counter(row["reasons"]).elements())
  return f"no verdict on {row['unscored']} of {row['n'] + row['unscored']}: {reasons}"


def refuse(report: dict[str, dict], limit: float) -> None:
  """ValueError for a judge that got more than `limit` of some probe wrong, or to which
  none was put."""
  if not report:
    raise ValueError(
      "the judge of RL is tried on held-out prompts of kind safety, and there are "
      "none: hold some out, or let it pass with --config.rl.judge_errors=1.0"
    )
  if failed := probing.failed(report, limit):
    shown = ", ".join(
      f"{name} ({context.percent(probing.errors(report[name])).strip()} of "
      f"{report[name]['n']}"
      + (f"; {_unscored(report[name])})" if report[name]["unscored"] else ")")
      for name in failed
    )
    raise ValueError(
      f"the judge of RL errs on probes: {shown}; wanted at most {limit:.0%} of each. "
      "Train a better one, take another (config.rl.reward), or let "
      "it pass with --config.rl.judge_errors=1.0"
    )


def sampled_judge(run: context.Run, name: str) -> judge.Judge:
  """The base model as judge: it thinks with the spec in sight, and writes a grade.

  Asked the same again, it draws anew; else its randomness comes from `name` and from
  what is asked. Known answers are compared.
  """
  cfg, params = run.cfg.filter, run.sampler.prepare(run.base_params())
  asked: collections.Counter = collections.Counter()

  def ask(questions):
    verdicts: list[Verdict | None] = [None] * len(questions)
    groups: dict[str, list] = collections.defaultdict(list)
    asks = [(q.prompt.id, getattr(q, "thought", ""), q.answer) for q in questions]
    what = hashlib.sha256(json.dumps(asks).encode()).hexdigest()
    asked[what] += 1
    for i, question in enumerate(questions):
      prompt = question.prompt
      if prompt.kind == "capability":
        correct = words.correct(question.answer, prompt.answer)
        verdicts[i] = Verdict(score=correct)
        continue
      tokens = tuple(chat_template.render_chat(run.tok, run.domain.question(question)))
      row = prompt.id, what, i
      request = sampling.Request(tokens=tokens, row_id=row, max_new=cfg.max_new)
      groups[prompt.category].append(request)
    done = context.complete(
      run,
      params,
      [*groups.values()],
      key=ops.stream(run.key, f"judge_{name}", asked[what]),
      temperature=cfg.temperature,
      max_new=cfg.max_new,
    )
    for completion in done:
      *_, i = completion.request.row_id
      said = run.tok.decode(completion.tokens)
      _, answer, malformed = thinking.split_thought(said, run.think.of(""))
      verdict = run.domain.grade(said if malformed else answer)
      if completion.finish == "length":
        verdict = Verdict(score=None, reason=forms.CUT)
      shown = run.tok.decode(completion.request.tokens)
      verdicts[i] = dataclasses.replace(verdict, shown=shown)
    return verdicts

  return judge.Judge(ask, deterministic=False)
