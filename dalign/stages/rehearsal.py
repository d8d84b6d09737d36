"""A rehearsal, before anything costs: what models are to read is rendered, and judges
that are code are tried."""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
from typing import Any, Sequence

from dalign.config import stages as declared
from dalign.config.on_policy import DistillConfig
from dalign.config.on_policy import RLConfig
from dalign.config.schema import Config
from dalign.data import prompt_sets
from dalign.judges import functions
from dalign.judges import judge
from dalign.runs import progress
from dalign.stages import evidence
from dalign.stages import judging
from dalign.stages import scoring
from dalign.stages import services
from dalign.text import chat_template
from dalign.training import rollout
from dalign.types import Prompt
from dalign.types import Turn

THOUGHT, ANSWER = "A thought.", "An answer."
Chats = Iterator[tuple[str, Sequence[Turn]]]  # who reads, and what


def check_prompts_render(
  config: Config, work: services.Workspace, stages: Collection[str]
) -> None:
  """Renders what teacher, judges and reward model of some stages are to read of a
  prompt of each category, and has judges that are code judge an answer to each.
  ValueError where the chat template leaves some of it out, where the judge's context
  has no room for a question, for a rubric that was made for another policy, for a
  function that cannot be called or gives no verdicts, where a mixture names no prompts,
  and where eval will not have enough to measure by."""
  if "eval" in stages and config.thin == "stop":
    evidence.require_held_out(services.of(declared.EvalStage, config, work))
  for stage, chats in READERS.items():
    if stage not in stages or (stage == "distill" and config.distill is None):
      continue
    run: Any = services.of(declared.STAGES[stage], config, work)
    for prompt in {p.category: p for p in run.prompts.raw}.values():
      for reader, turns in chats(run, prompt):
        with _name_reader_in_errors(reader):
          chat_template.render_chat(
            run.model.tok, turns, kept_tags=run.model.think.tags
          )
  if "filter" in stages:
    _judge_has_room(config, services.of(declared.FilterStage, config, work))
  for stage, own in (("distill", config.distill), ("rl", config.rl)):
    if stage in stages and own is not None:
      _mixture(services.of(declared.STAGES[stage], config, work), own)
  rewarded = "rl" in stages and "model" in (config.rl.reward, config.rl.helpful)
  if "reward" in stages or rewarded:
    reward = services.of(declared.RewardStage, config, work)
    with _name_reader_in_errors("the reward model"):
      renderer = scoring.Renderer(reward)
      for prompt in {p.category: p for p in reward.prompts.raw}.values():
        with_metadata = prompt_sets.with_metadata(prompt, reward.cfg.reward.metadata)
        question = scoring.reward_question(reward, with_metadata, THOUGHT, ANSWER)
        renderer.question_tokens(question)
  judges = [who for who in _judges(config) if who[0] in stages]
  if "rubric" in {kind for _, kind, _ in judges}:
    _try_rubric(services.of(declared.FilterStage, config, work))
  for stage, kind, metadata in judges:
    if kind.startswith(functions.MARK):
      run = services.of(declared.STAGES[stage], config, work)
      _try_function(run, kind, metadata, thinks=stage == "filter")


def _judges(config: Config) -> Iterator[tuple[str, str, str]]:
  """Stages, who judges in them, and what that is told of the ideal response type."""
  own, rl, reward = config.filter, config.rl, config.reward
  yield "filter", own.judge, own.metadata
  labels = own.judge if reward.labels == "judge" else "rubric"
  yield "reward", labels, reward.metadata
  for kind in (rl.reward, rl.helpful):
    yield "rl", own.judge if kind == "judge" else kind, rl.metadata
  for grader in config.eval.grader:
    if grader.startswith(functions.MARK):  # and told what the rules are
      yield "eval", grader, "told"


def _try_rubric(run: judging.Run) -> None:
  run.task.reward_rubric(None)
  if others := run.task.reworded():
    progress.say(
      f"the rubric does not read the wording of {', '.join(others)}, which is not the "
      "one that it was made for"
    )


def _try_function(run: judging.Run, kind: str, metadata: str, *, thinks: bool) -> None:
  """Has a function judge an answer to a prompt of each category."""
  prompts = {p.category: p for p in run.prompts.raw}.values()
  told = [prompt_sets.with_metadata(prompt, metadata) for prompt in prompts]
  ask = judging.function_judge(run, kind)
  ask([judge.RewardQuestion(prompt, ANSWER) for prompt in told])
  if thinks:
    ask([judge.FilterQuestion(prompt, THOUGHT, ANSWER) for prompt in told])


def _mixture(run: Any, own: DistillConfig | RLConfig) -> None:
  """ValueError where a mixture names no category or type of the prompts it is of."""
  some = run.prompts.choose_on_policy("safety", None, own.expected)
  if some and own.mixture:
    key = f"config.{run.cfg.stage}.mixture"
    rollout.cell_shares(rollout.prompt_cells(some), own.mixture, key=key)


def _judge_has_room(
  config: Config, run: services.Services[declared.FilterStage]
) -> None:
  """Says where a judge in this process has no room for the longest samples that may
  come; ValueError where it has none for any."""
  kind, context = run.cfg.judge.judge, run.model.arch.max_length
  if kind not in ("model", "sampled"):
    return
  of: dict[str, Prompt] = {}  # the longest prompt of each category
  for prompt in run.prompts.raw:
    if prompt.kind == "capability":
      continue  # of which the answers are known
    of[prompt.category] = max(of.get(prompt.category, prompt), prompt, key=_characters)
  tokens = {}
  for p in of.values():
    turns = run.task.question(judge.FilterQuestion(prompt=p, thought="", answer=""))
    tokens[p.id] = len(chat_template.render_chat(run.model.tok, turns))
  id, reads = max(tokens.items(), key=lambda pair: pair[1], default=("", 0))
  writes = run.cfg.judge.max_new if kind == "sampled" else 0
  room, most = context - reads - writes, config.generate.max_new
  said = (
    f"the filter's judge reads {reads} tokens beside a sample to {id!r:.80} and writes "
    f"up to {writes}: in its context of {context}"
  )
  if room < 1:
    raise ValueError(
      f"{said} no sample has room. Lower filter.max_new, show less of the policy "
      "(config.spec.detail), or take another judge (config.filter.judge)"
    )
  if room < most and not config.generate.teacher.startswith("recorded:"):
    progress.say(
      f"{said} {room} tokens are left for it, fewer than generate.max_new={most}; "
      "longer samples will have no verdict"
    )


def _characters(prompt: Prompt) -> int:
  return sum(len(turn.content) for turn in prompt.turns)


def _generate_chats(
  run: services.Services[declared.GenerateStage], prompt: Prompt
) -> Chats:
  cfg = run.cfg.generate
  if cfg.teacher == "base":
    turns = run.task.teach(prompt.blind(), worked=cfg.demonstrations)
    yield "the teacher", turns
  if cfg.revise:
    yield "who revises", run.task.revise(prompt, ANSWER)


def _distill_chats(
  run: services.Services[declared.DistillStage], prompt: Prompt
) -> Chats:
  worked = run.cfg.distill.demonstrations
  yield "the teacher", run.task.teach(prompt.blind(), worked=worked)


def _judge_chats(run: services.Services[declared.Judging], prompt: Prompt) -> Chats:
  if run.cfg.judge.judge in ("model", "sampled"):
    question = judge.FilterQuestion(prompt=prompt, thought=THOUGHT, answer=ANSWER)
    yield "the judge", run.task.question(question)


def _eval_chats(run: services.Services[declared.EvalStage], prompt: Prompt) -> Chats:
  arms = run.cfg.eval.arms
  if "self_refine" in arms:
    yield "who revises", run.task.revise(prompt, ANSWER)
  if not {"spec_in_prompt", "spec_in_prompt_oracle"}.isdisjoint(arms):
    yield "the base, told the policies", run.task.summaries(prompt)


READERS: Mapping[str, Callable[[Any, Prompt], Chats]] = {
  "generate": _generate_chats,
  "filter": _judge_chats,
  "distill": _distill_chats,
  "reward": _judge_chats,
  "eval": _eval_chats,
}


@contextlib.contextmanager
def _name_reader_in_errors(reader: str) -> Iterator[None]:
  try:
    yield
  except ValueError as error:
    raise ValueError(f"what {reader} is to read: {error}") from error
