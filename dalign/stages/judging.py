"""The judges of filter, reward and RL, as the config has them, and what they are tried
with."""

import collections
from collections.abc import Mapping
import dataclasses
import functools
import math
import pathlib

from dalign.config import stages
from dalign.config.training import BatchConfig
from dalign.data import prompt_sets
from dalign.judges import forms
from dalign.judges import functions
from dalign.judges import judge
from dalign.judges import probing
from dalign.judges import recordings
from dalign.models import ops
from dalign.models import sharding
from dalign.policy import prompting
from dalign.runs import progress
from dalign.sampling import likelihood
from dalign.sampling import sampler as sampling
from dalign.stages import scoring
from dalign.stages import servers
from dalign.stages import services
from dalign.text import chat_template
from dalign.text import thinking
from dalign.types import Prompt
from dalign.types import Turn
from dalign.types import Verdict

Run = services.Services[stages.Judging]
Labelling = services.Services[stages.Labelling]

PROMPTS_PER_PROBE = 27  # held-out prompts that each probe is put to


def filter_judge(
  run: Labelling, name: str, likely: judge.Quality | None = None
) -> judge.Judge:
  """The judge of thought and answer that the config asks for. A rubric's `likely` may
  be shared with others (`make_quality`)."""
  chosen = _recorded_judge(run) or _chosen_model(run, name)
  return _with_errors(run, name, chosen or filter_rubric(run, likely))


def answer_judge(
  run: Labelling, name: str, likely: judge.Quality | None = None
) -> judge.Judge:
  """The filter's judge, asked about answers alone."""
  chosen = _recorded_judge(run) or _chosen_model(run, name)
  return _with_errors(run, name, chosen or answer_rubric(run, likely))


def _with_errors(run: Run, name: str, chosen: judge.Judge) -> judge.Judge:
  """The judge that the config has, with the errors that a policy world's is to make."""
  errors = run.cfg.judge_errors
  if errors is None:
    return chosen
  return judge.with_errors(chosen, errors, seed=run.cfg.seed, name=name)


def filter_rubric(run: Run, likely: judge.Quality | None = None) -> judge.Judge:
  """The judge of both that is no model, but for what `filter.quality` adds."""
  return run.task.filter_rubric(likely or make_quality(run))


def answer_rubric(run: Run, likely: judge.Quality | None = None) -> judge.Judge:
  """The same of answers alone."""
  return run.task.reward_rubric(likely or make_quality(run))


EMPTY_PROMPT = Turn(role="user", content="Say something.")  # a prompt that asks nothing


def make_quality(run: Run) -> judge.Quality | None:
  """How likely the base finds answers, without spec and thought, after their prompts
  and after EMPTY_PROMPT, if `filter.quality` asks for it. The base is loaded when it is
  first asked; what it said last is kept, as two rubrics ask of the same answers."""
  if not run.cfg.judge.quality:
    return None
  params = functools.cache(run.model.base_params)

  @functools.cache
  def scorer(length: int) -> likelihood.Scorer:
    shape = BatchConfig(micro=1, rows=max(1, 1024 // length), length=length)
    return run.scorer(shape)

  @functools.lru_cache(maxsize=1)
  def nats_per_token(pairs: tuple[tuple[Prompt, str], ...]):
    rows, starts = [], []
    for prompt, answer in pairs:
      for turns in (prompting.plain(prompt), (EMPTY_PROMPT,)):
        before = chat_template.render_chat(run.model.tok, list(turns))
        row = before + run.model.tok.encode(answer)
        # What is longer than the context has no quality.
        rows.append(row if len(row) <= run.model.arch.max_length else row[:1])
        starts.append(len(before))
    length = -(-max(map(len, rows), default=1) // 256) * 256
    found = scorer(length)(params(), rows, starts)
    means = [float(logp_T.mean()) if len(logp_T) else math.nan for logp_T in found]
    return [*zip(means[::2], means[1::2], strict=True)]

  return lambda pairs: nats_per_token(tuple(pairs))


def _chosen_model(run: Run, name: str) -> judge.Judge | None:
  """The judge that the config has, but a rubric."""
  kind = run.cfg.judge.judge
  if kind == "model":
    return model_judge(run)
  if kind == "sampled":
    return sampled_judge(run, name)
  if kind.startswith(functions.MARK):
    return function_judge(run, kind)
  return endpoint_judge(run) if kind == "endpoint" else None


def model_judge(run: Run) -> judge.Judge:
  """The base model as judge: its expected score over the label tokens."""
  score_logprobs = likelihood.make_label_scorer(
    run.model.base_params(),
    tok=run.model.tok,
    cfg=run.model.arch,
    compute=run.cfg.compute,
    shardings=sharding.replicated(run.mesh),
  )

  def render(category):
    return run.task.policy_text(category, run.cfg.spec.detail)

  return judge.model_judge(render, score_logprobs)


def _recorded_judge(run: Labelling) -> judge.Judge | None:
  """The votes that were recorded with the samples of a recorded teacher, if the config
  asks for them."""
  if run.cfg.judge.judge != "recorded":
    return None
  if not run.recording:
    raise ValueError(
      "config.filter.judge: recorded votes are those of a recorded teacher; wanted "
      f"generate.teacher=recorded:PATH, got {run.cfg.teacher!r}"
    )
  return recordings.recorded_judge(run.recorded)


def endpoint_judge(run: Run) -> judge.Judge:
  """The model at `filter.endpoint` as judge."""
  cfg = run.cfg.judge
  server = servers.Server(run.store, cfg.endpoint, "judge")
  times_asked: collections.Counter = collections.Counter()

  def ask(conversations) -> list[forms.ModelReply]:
    requests = []
    for turns in map(tuple, conversations):
      requests.append(servers.make_request(turns, cfg, times_asked[turns]))
      times_asked[turns] += 1
    found = server.chat(requests)
    server.report_usage()
    return [*map(servers.to_model_reply, found)]

  return run.task.written_judge(ask, cfg.form)


def function_judge(run: Run, source: str) -> judge.Judge:
  """A function of the user's, "python:FILE:FUNCTION", which is told whole policies."""
  return functions.of_file(source, lambda name: run.task.policy_text(name, "full"))


def function_files(kind: str) -> list[pathlib.Path]:
  """The file of a judge that is a function of the user's. What that imports of other
  files is not among these."""
  return [functions.place(kind)[0]] if kind.startswith(functions.MARK) else []


def rewarding(run: services.Services[stages.RLStage]) -> list[str]:
  """What RL is rewarded by: `rl.reward`, `rl.helpful`, or the filter's judge where they
  say so."""
  kinds = run.cfg.rl.reward, run.cfg.rl.helpful
  return [run.cfg.judge.judge if kind == "judge" else kind for kind in kinds]


def rl_judge(run: services.Services[stages.RLStage], kind: str = "") -> judge.Judge:
  """What RL is rewarded by, as `rl.reward` or another `kind` says: the reward model,
  the filter's judge, the rubric, or a function."""
  kind = kind or run.cfg.rl.reward
  if kind == "model":
    params = scoring.load_reward_model(run)
    return scoring.reward_model(run, params, scoring.Renderer(run))
  if kind.startswith(functions.MARK):
    return function_judge(run, kind)
  if kind == "judge":
    return _with_errors(run, "rl", _chosen_model(run, "rl") or answer_rubric(run))
  return answer_rubric(run)


def reward_metadata(run: services.Services[stages.RLStage], kind: str = "") -> str:
  """What a judge of RL, by default that of `rl.reward`, is told of the ideal response
  type."""
  kind = kind or run.cfg.rl.reward
  return (run.cfg.reward_model if kind == "model" else run.cfg.rl).metadata


def with_metadata(
  question: judge.RewardQuestion, metadata: str
) -> judge.RewardQuestion:
  """A question that tells of the ideal response type what `metadata` says."""
  prompt = prompt_sets.with_metadata(question.prompt, metadata)
  return judge.RewardQuestion(prompt, question.answer)


def probe(
  run: services.Services[stages.OfTask],
  ask: judge.Judge,
  metadata: str,
  prompts: int = PROMPTS_PER_PROBE,
) -> dict[str, dict]:
  """What a judge makes of the probes of METHOD section 4, on held-out prompts of which
  it is told as much as `metadata` says."""
  probes = run.task.probes(run.prompts.choose("eval", "safety", prompts))
  report = probing.probe_report(
    probes, ask([with_metadata(question, metadata) for _, question, _ in probes])
  )
  for name, row in report.items():
    if row["unscored"]:
      progress.say(f"probes: {name}: {_describe_unscored(row)}")
  return report


def _describe_unscored(row: Mapping) -> str:
  """How many answers of a probe have no verdict, and why."""
  reasons = progress.top_reasons(collections.Counter(row["reasons"]).elements())
  return f"no verdict on {row['unscored']} of {row['n'] + row['unscored']}: {reasons}"


def check_probe_errors(report: dict[str, dict], limit: float) -> None:
  """ValueError for a judge that got more than `limit` of some probe wrong, or to which
  none was put."""
  if not report:
    raise ValueError(
      "the judge of RL is tried on held-out prompts of kind safety, and there are "
      "none: hold some out, or let it pass with --config.rl.judge_errors=1.0"
    )
  if failed := probing.failed_probes(report, limit):
    shown = []
    for name in failed:
      row = report[name]
      wrong = f"{progress.percent(probing.error_rate(row)).strip()} of {row['n']}"
      unscored = f"; {_describe_unscored(row)}" if row["unscored"] else ""
      shown.append(f"{name} ({wrong}{unscored})")
    raise ValueError(
      f"the judge of RL errs on probes: {', '.join(shown)}; wanted at most {limit:.0%} "
      "of each. Train a better one, take another (config.rl.reward), or let it pass "
      "with --config.rl.judge_errors=1.0"
    )


def sampled_judge(run: Run, name: str) -> judge.Judge:
  """The base model as judge: it thinks with the spec in sight, and writes a grade.

  Asked the same again, it draws anew; else its randomness comes from `name` and from
  what is asked. Known answers are compared. Unscored: what its context has no room for,
  with a verdict of `filter.max_new` tokens.
  """
  cfg, weights = run.cfg.judge, run.base_weights
  times_asked: collections.Counter = collections.Counter()

  def ask(questions):
    verdicts: list[Verdict | None] = [None] * len(questions)
    groups: dict[str, list] = collections.defaultdict(list)
    digest = judge.digest(questions)
    times_asked[digest] += 1
    for i, question in enumerate(questions):
      prompt = question.prompt
      if prompt.kind == "capability":
        verdicts[i] = judge.known_answer_verdict(prompt, question.answer)
        continue
      tokens = tuple(
        chat_template.render_chat(run.model.tok, run.task.question(question))
      )
      if len(tokens) + cfg.max_new > run.model.arch.max_length:
        verdicts[i] = Verdict(score=None, reason=forms.TOO_LONG)
        continue
      row = prompt.id, digest, i
      request = sampling.Request(tokens=tokens, row_id=row, max_new=cfg.max_new)
      groups[prompt.category].append(request)
    done = run.sampler.complete(
      weights,
      [*groups.values()],
      key=ops.stream(run.key, f"judge_{name}", times_asked[digest]),
      temperature=cfg.temperature,
      max_new=cfg.max_new,
    )
    for completion in done:
      *_, i = completion.request.row_id
      text = run.model.tok.decode(completion.tokens)
      _, answer, malformed = thinking.split_thought(text, run.model.think.of(""))
      verdict = run.task.grade(text if malformed else answer)
      if completion.finish == "length":
        verdict = Verdict(score=None, reason=forms.TRUNCATED)
      shown = run.model.tok.decode(completion.request.tokens)
      verdicts[i] = dataclasses.replace(verdict, shown=shown)
    return verdicts

  return judge.Judge(ask, deterministic=False)
