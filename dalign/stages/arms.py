"""The arms of an evaluation: whose model replies to which prompt, and how.

Knows no metrics: a row is graded by the task as its reply ends.
"""

import bisect
import collections
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import itertools
from typing import Literal

from dalign.config import stages
from dalign.data import attacks
from dalign.models import ops
from dalign.policy import prompting
from dalign.runs import progress
from dalign.sampling.sampler import Completion
from dalign.sampling.sampler import Request
from dalign.stages import samples
from dalign.stages import servers
from dalign.stages import services
from dalign.text import thinking
from dalign.types import Prompt
from dalign.types import PyTree
from dalign.types import Sample
from dalign.types import Turn

Run = services.Services[stages.EvalStage]  # what is seen of a run
Wanted = list[tuple[Prompt, int]]  # prompts and which of their samples
Replies = Iterator[tuple[Prompt, Sample]]


@dataclasses.dataclass(frozen=True)
class Arm:
  """Where an arm's replies come from: the parameters of a stage, or those of the base
  with "", or a server; what it has of the spec in its prompt: nothing, the "summaries"
  of all policies, as its users would who know no category, or the "policy" of the
  prompt's category; and whether the think block is opened for it."""

  stage: str
  spec: Literal["", "summaries", "policy"] = ""
  thinks: bool = False
  served: bool = False


ARMS = {
  "base": Arm(""),
  "base_thinks": Arm("", thinks=True),
  "spec_in_prompt": Arm("", spec="summaries"),
  "spec_in_prompt_oracle": Arm("", spec="policy"),
  "self_refine": Arm("", spec="policy", thinks=True),  # revises what the base answered
  "sft": Arm("sft", thinks=True),
  "distill": Arm("distill", thinks=True),
  "sft_distill": Arm("distill", thinks=True),
  "rl": Arm("rl", thinks=True),
  "sft_rl": Arm("rl", thinks=True),
  "endpoint": Arm("", served=True),
  "endpoint_spec": Arm("", spec="policy", served=True),
}


@dataclasses.dataclass(frozen=True)
class ForcedThought:
  """What is done to an arm's thoughts: closed after `budget` tokens, or those of
  `thoughts`, by prompt id, put in their place."""

  suffix: str = ""  # what the name of its file has behind the arm's
  budget: int | None = None
  thoughts: Mapping[str, str] = dataclasses.field(default_factory=dict)


OWN_THOUGHT = ForcedThought()


def think_format(run: Run, arm: str) -> thinking.ThinkFormat | None:
  """How an arm's thoughts are opened for it, if they are."""
  own = ARMS[arm]
  if own.spec:
    return run.model.think if own.thinks or run.task.opens_with_policy else None
  return run.model.trained_think if own.thinks else None


def params_of(run: Run, arm: str) -> PyTree:
  """The parameters of an arm."""
  stage = ARMS[arm].stage
  return run.model.trained_params(stage) if stage else run.model.base_params()


def rows_of(
  run: Run,
  arm: str,
  prompts: list[Prompt],
  drafts: dict[str, Sample],
  forced: ForcedThought = OWN_THOUGHT,
) -> list[dict]:
  """The graded rows of one arm, perhaps with other thoughts; rows that are there
  already are not sampled again. Of what it revises, what `drafts` lacks is added there.
  """
  name = f"{arm}{forced.suffix}"
  path = run.store.path("eval", f"{name}.jsonl")
  previous = run.store.read_rows(path) if run.store.has(path) else []
  # What a server would not send is asked for again: it may be otherwise today.
  previous = [row for row in previous if row["finish"] != "refused"]
  rows = {(row["prompt_id"], row["index"]): row for row in previous}
  wanted = [(p, index) for p in prompts for index in range(run.cfg.eval.samples)]
  pending = [(p, index) for p, index in wanted if (p.id, index) not in rows]
  to_ask = [*dict.fromkeys(prompt for prompt, _ in pending)]
  without_draft = [prompt for prompt in to_ask if prompt.id not in drafts]
  if arm == "self_refine" and without_draft:
    drafts |= samples.drafts(run, without_draft)
  turns = {prompt.id: _conversation(run, arm, prompt, drafts) for prompt in to_ask}
  if ARMS[arm].served:
    replies = _endpoint_replies(run, pending, turns)
  else:
    replies = _sampled_replies(run, arm, pending, turns, forced)
  with progress.bar(len(wanted), f"eval {name}", "reply", len(rows)) as bar:
    for prompt, sample in replies:
      row = run.task.outcome(prompt, sample)
      run.store.append_rows(path, [row])
      rows[prompt.id, sample.index] = row
      bar.update()
  ordered = [rows[prompt.id, index] for prompt, index in wanted]
  run.store.write_rows(path, ordered)  # not in the order in which they happened to end
  run.store.pause("eval")
  return ordered


def _conversation(run: Run, arm: str, prompt: Prompt, drafts: dict) -> tuple[Turn, ...]:
  """What the model of an arm reads before it replies."""
  if prompt.id in drafts:
    return run.task.revise(prompt, drafts[prompt.id].answer)
  if ARMS[arm].spec == "policy":
    return run.task.teach(prompt, worked=0)
  if ARMS[arm].spec == "summaries":
    return run.task.summaries(prompt)
  return prompting.plain(prompt)


def _endpoint_replies(run: Run, wanted: Wanted, turns: dict) -> Replies:
  """What the model at `eval.endpoint` says to each prompt."""
  cfg = run.cfg.eval
  server = servers.Server(run.store, cfg.endpoint, "eval")
  requests = [
    dataclasses.replace(
      servers.make_request(turns[prompt.id], cfg, index), top_p=cfg.top_p
    )
    for prompt, index in wanted
  ]
  for at, reply in server.rounds_ambiguous_last(requests):
    prompt, index = wanted[at]
    yield prompt, servers.to_sample(run.model, prompt, index, reply, None)
  server.report_usage()


def _sampled_replies(
  run: Run, arm: str, wanted: Wanted, turns: dict, forced: ForcedThought
) -> Replies:
  """What the model of an arm says to each prompt, as it ends."""
  if not wanted:
    return
  cfg, model, think = run.cfg.eval, run.model, think_format(run, arm)
  max_new = cfg.max_new + (cfg.max_think if think else 0)
  prompts_by_id = {prompt.id: prompt for prompt, _ in wanted}
  thoughts = {
    id: tuple(model.tok.encode(prompting.format_completion(thought, "", model.think)))
    for id, thought in forced.thoughts.items()
  }
  groups = collections.defaultdict(list)
  for prompt, index in wanted:
    if attacks.untemplated(prompt):
      tokens = prompting.untemplated(model.tok, turns[prompt.id])
    else:
      opened = prompting.render_prompt(model.tok, turns[prompt.id], think)
      tokens = (*opened, *thoughts.get(prompt.id, ()))
    group = prompt.category if ARMS[arm].spec == "policy" else ""
    request = Request(tokens=tokens, row_id=(prompt.id, index), max_new=max_new)
    groups[group].append(request)
  params = params_of(run, arm)
  complete = functools.partial(
    run.sampler.complete,
    run.sampler.prepare(params),
    key=ops.stream(run.key, "eval"),
    temperature=cfg.temperature,
    top_p=cfg.top_p,
    max_new=max_new,
    prefix_room=None if ARMS[arm].spec else run.cfg.sampler.prefix_step,
  )
  max_think, requests = cfg.max_think, [*groups.values()]
  if forced.budget is None:
    completions = complete(requests)
  else:
    completions = _complete_with_thought_budget(run, complete, requests, forced.budget)
    closed_tokens = forced.budget + len(model.tok.encode(model.think.close))
    max_think = max_think and max(max_think, closed_tokens)
  for completion in completions:
    id, index = completion.request.row_id
    prompt = prompts_by_id[id]
    thinks = None if attacks.untemplated(prompt) else think
    tokens = (*thoughts.get(id, ()), *completion.tokens)
    completion = dataclasses.replace(completion, tokens=tokens)
    if thinks and max_think:
      completion = _truncate_to_budgets(run, completion, max_think)
    yield prompt, samples.from_completion(model, prompt, completion, index, thinks)
  model.free(params)


def _truncate_to_budgets(
  run: Run, completion: Completion, max_think: int
) -> Completion:
  """A completion cut where its thought or its answer is longer than it may be."""

  def ended(n: int) -> bool:
    return run.model.think.close in run.model.tok.decode(completion.tokens[:n])

  thought = bisect.bisect_left(range(len(completion.tokens) + 1), True, key=ended)
  max_tokens = thought + run.cfg.eval.max_new if thought <= max_think else max_think
  if len(completion.tokens) <= max_tokens:
    return completion
  return dataclasses.replace(
    completion,
    tokens=completion.tokens[:max_tokens],
    logp=completion.logp[:max_tokens],
    finish="length",
  )


def _complete_with_thought_budget(
  run: Run, complete, groups, budget: int
) -> Iterator[Completion]:
  """Completions whose thought is closed for them after `budget` tokens."""
  close = tuple(run.model.tok.encode(run.model.think.close))
  later: list[list[Request]] = [[] for _ in groups]
  tokens_so_far: dict = {}  # row id -> its tokens so far
  place = {r.row_id: (g, r) for g, group in enumerate(groups) for r in group}
  if budget:
    short = [[dataclasses.replace(r, max_new=budget) for r in g] for g in groups]
    first = complete(short)
  else:
    first = (
      Completion(request=r, tokens=(), logp=(), finish="length")
      for r in itertools.chain(*groups)
    )
  for done in first:
    row = done.request.row_id
    g, request = place[row]
    if done.finish == "stop":
      yield dataclasses.replace(done, request=request)
      continue
    open_still = run.model.think.close not in run.model.tok.decode(done.tokens)
    tokens_so_far[row] = (*done.tokens, *(close if open_still else ()))
    tokens = (*request.tokens, *tokens_so_far[row])
    later[g].append(dataclasses.replace(request, tokens=tokens))
  for done in complete([group for group in later if group]):
    row = done.request.row_id
    tokens = (*tokens_so_far[row], *done.tokens)
    yield dataclasses.replace(done, request=place[row][1], tokens=tokens)
