"""models -> eval/<arm>.jsonl, eval/summary.json: the arms side by side, held out."""

import bisect
import collections
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import itertools
import math
from typing import Literal

import numpy as np

from dalign.config import stages
from dalign.config.training import BatchConfig
from dalign.data import attacks
from dalign.data import prompt_sets
from dalign.evaluation import evals
from dalign.evaluation import figures
from dalign.models import ops
from dalign.policy import prompting
from dalign.runs import progress
from dalign.sampling.sampler import Completion
from dalign.sampling.sampler import Request
from dalign.stages import evidence
from dalign.stages import grading
from dalign.stages import judging
from dalign.stages import samples
from dalign.stages import servers
from dalign.stages import services
from dalign.stages.prompts import set_label
from dalign.text import thinking
from dalign.types import Prompt
from dalign.types import PyTree
from dalign.types import Sample
from dalign.types import Turn

Run = services.Services[stages.EvalStage]  # what this stage sees of a run
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


def evaluate(run: Run) -> None:
  """Samples every arm on the held-out prompts, grades and summarises."""
  cfg = run.cfg.eval
  arms = [arm for arm in cfg.arms if _is_trained(run, arm)]
  if not arms:
    raise ValueError(f"eval: no arm of {', '.join(cfg.arms)} is there to evaluate")
  stages = {ARMS[arm].stage for arm in arms} - {""}
  extra = (prompt_sets.file_of(source["source"]) for source in cfg.extra.values())
  inputs = {*run.sources, *filter(None, extra)}
  inputs |= {file for one in cfg.grader for file in judging.function_files(one)}
  inputs |= {run.store.path(stage, "manifest.json") for stage in stages}
  if not run.begin(sorted(inputs)):
    return
  thin = evidence.require_held_out(run)
  sets = {"": _held_out_prompts(run)} | run.prompts.load_eval_sets(
    cfg.extra, cfg.suite, cfg.extra_limit
  )
  _check_unique_ids(sets)
  prompts_by_id = {prompt.id: prompt for some in sets.values() for prompt in some}

  # Replies of every arm to every set, and with other thoughts.
  rows_by_set: dict[str, dict] = collections.defaultdict(dict)
  files: dict[str, list[dict]] = {}  # rows, by the names of the files that have them
  for arm in arms:
    drafts: dict[str, Sample] = {}
    files[arm] = _evaluate_arm(run, arm, [*prompts_by_id.values()], drafts)
    for name, prompts in sets.items():
      ids = {prompt.id for prompt in prompts}
      rows_by_set[name][arm] = [row for row in files[arm] if row["prompt_id"] in ids]
    think = _think_format(run, arm)
    for budget in cfg.budgets if think else ():
      name = f"thought_{budget}"
      forced = ForcedThought(f".{name}", budget=budget)
      rows = _evaluate_arm(run, arm, sets[""], drafts, forced)
      rows_by_set[name][arm] = files[f"{arm}.{name}"] = rows
    swaps = cfg.swaps and "swap_followed" in run.task.definitions
    if swaps and think and not think.start and not ARMS[arm].spec:
      rows_by_set["swapped"][arm] = _evaluate_swapped(
        run, arm, sets[""], rows_by_set[""][arm]
      )

  # Grades, and what follows from them.
  grading.add_grades(run, files, prompts_by_id)
  grading.check_graded(run, files, cfg.unscored)
  _check_scored(rows_by_set, cfg.unscored)
  for arm in arms:
    for public, disguises in _disguises_by_set(cfg.suite).items():
      rows_by_original = collections.defaultdict(list)
      for disguise in disguises:
        for row in rows_by_set[set_label(disguise)][arm]:
          rows_by_original[prompts_by_id[row["prompt_id"]].original].append(row)
      rows_by_set[f"{public}_worst"][arm] = evals.worst(
        rows_by_original, share=cfg.worst
      )
    if run.task.openings and not ARMS[arm].served and not ARMS[arm].spec:
      _add_decline_probability(run, arm, prompts_by_id, files[arm])

  summary = _summarize(run, sets, rows_by_set) | {"thin": thin}
  if cfg.grader[1:]:
    every = [row for rows in files.values() for row in rows]
    summary["graders"] = grading.grader_agreement(run, every)
  run.store.write_json(run.store.path("eval", "summary.json"), summary)
  run.finish({"arms": arms, "rows": len(prompts_by_id)})
  for arm, metrics in summary["arms"].items():
    shown = (*evals.TYPES, "response_types", "capability", "think_format", "no_answer")
    line = "  ".join(f"{m} {figures.line(metrics[m])}" for m in shown)
    progress.say(f"eval: {arm:15s} {line}")
  grading.report_agreement(summary.get("graders", {}))


def _summarize(
  run: Run, sets: dict[str, list[Prompt]], rows_by_set: dict[str, dict[str, list[dict]]]
) -> dict:
  """eval/summary.json, as of `evals.summarize`, with the metrics of other sets than the
  held-out prompts under names that begin with theirs."""
  cfg = run.cfg.eval
  how = {"seed": run.cfg.seed, "trials": cfg.trials}
  summarize = functools.partial(
    evals.summarize, definitions=grading.definitions(run), **how
  )
  summary = summarize(rows_by_set[""])
  for name in (f"thought_{budget}" for budget in cfg.budgets):
    for arm, rows in rows_by_set[name].items():
      both = {f"{arm}.{name}": rows, arm: rows_by_set[""][arm]}
      summary["differences"] |= summarize(both)["differences"]
  summary["curves"] = {
    name or "held out": {
      arm: curve
      for arm, rows in rows_by_set[name].items()
      if (curve := evals.operating_curve(rows, **how))
    }
    for name in sets
  }
  for name, rows in list(rows_by_set.items())[1:]:
    _merge_set_summary(summary, name, summarize(rows))
  summary["sets"] = _describe_sets(run, sets)
  return summary | {"contaminated": _count_contaminated(run, sets)}


def _merge_set_summary(summary: dict, name: str, set_summary: dict) -> None:
  """Adds to a summary that of the set `name`: the metrics that apply to any arm's rows,
  whether they have a score or not."""
  applies = {
    metric
    for metrics in set_summary["arms"].values()
    for metric, cell in metrics.items()
    if cell["n"] or cell["unscored"]
  }
  for part in ("arms", "paired", "differences"):
    for arm, metrics in set_summary[part].items():
      prefixed = {f"{name}_{m}": cell for m, cell in metrics.items() if m in applies}
      summary[part].setdefault(arm, {}).update(prefixed)


def _is_trained(run: Run, arm: str) -> bool:
  """Whether an arm's model is trained, and from the start that the arm names."""
  stage = ARMS[arm].stage
  if not stage:
    return True
  manifest = run.store.manifest(stage) or {}
  if manifest.get("finished"):
    run.model.trained_params_path(stage)  # or what is to be done, where it is gone
  if not run.store.path(stage, "params").exists():
    progress.say(f"eval: no {stage} model in this workdir, arm {arm} is left out")
    return False
  if stage in ("distill", "rl"):
    start = manifest["config"][f"{stage}.start"]
    if (arm == f"sft_{stage}") != (start == "sft"):
      progress.say(f"eval: {stage} started from {start}, arm {arm} is left out")
      return False
  return True


def _count_contaminated(run: Run, sets: dict[str, list[Prompt]]) -> dict[str, int]:
  """Set -> training prompts that say what it says; where there are any, one line."""
  train = [prompt for prompt in run.prompts.all if prompt.split == "train"]
  found = {
    name: len(dict(run.task.contaminated(train, prompts)))
    for name, prompts in sets.items()
    if name
  }
  for name, count in found.items():
    if count:
      progress.say(f"eval: {count} training prompts say what prompts of {name} say")
  return found


def _check_unique_ids(sets: dict[str, list[Prompt]]) -> None:
  """ValueError where two prompts of several sets have one id."""
  set_of_id: dict[str, str] = {}
  for name, prompts in sets.items():
    for prompt in prompts:
      other = set_of_id.setdefault(prompt.id, name)
      if other != name:
        raise ValueError(
          f"eval: {other or 'the held-out prompts'} and {name} both have a prompt "
          f"{prompt.id!r}; wanted ids that differ"
        )


def _describe_sets(run: Run, sets: dict[str, list[Prompt]]) -> dict[str, str]:
  """What each of the further sets is, by the name that its metrics begin with."""
  cfg = run.cfg.eval
  descriptions = {name: source["source"] for name, source in cfg.extra.items()}
  for name in cfg.suite:
    public, *names = name.split("+")
    disguise = f"; disguised by {', then '.join(names)}" if names else ""
    descriptions[set_label(name)] = run.task.notice(f"public:{public}") + disguise
  counted = {
    name: f"{len(sets[name])} prompts of {text}" for name, text in descriptions.items()
  }
  worst = {
    f"{public}_worst": f"{public} in {len(names)} disguises, the mean over the "
    f"{cfg.worst:.0%} of them (one at least) that are worst for a prompt; unscored are "
    "the prompts of which some have no score, and the worst may be among those"
    for public, names in _disguises_by_set(cfg.suite).items()
  }
  return counted | worst


def _disguises_by_set(suite: tuple[str, ...]) -> dict[str, list[str]]:
  """Public set -> its disguises in a suite, where it has several."""
  of = collections.defaultdict(list)
  for name in suite:
    public, plus, _ = name.partition("+")
    if plus:
      of[public].append(name)
  return {public: names for public, names in of.items() if len(names) > 1}


def _check_scored(rows_by_set: dict[str, dict[str, list[dict]]], limit: float) -> None:
  """ValueError where too many answers of a set have no score; they are all on disk."""
  for name, rows_by_arm in rows_by_set.items():
    for arm, rows in rows_by_arm.items():
      reasons = (
        [why for name, why in row["unscored"].items() if row["scores"][name] is None]
        for row in rows
      )
      missing = [row_reasons[0] for row_reasons in reasons if row_reasons]
      if len(missing) > limit * len(rows):
        raise ValueError(
          f"eval: arm {arm} has no score for {len(missing)} of {len(rows)} answers to "
          f"{name or 'the held-out prompts'}: {progress.top_reasons(missing)}; wanted "
          f"at most {limit:.0%} (config.eval.unscored)"
        )


def _held_out_prompts(run: Run) -> list[Prompt]:
  cfg = run.cfg.eval
  wanted = {"safety": cfg.prompts, "helpful": cfg.helpful, "capability": cfg.capability}
  found = [
    prompt
    for kind, n in wanted.items()
    for prompt in run.prompts.choose("eval", kind, n)
  ]
  if not found and any(wanted.values()):
    raise ValueError(
      f"eval: wanted held-out prompts, and none of the {len(run.prompts.all)} of "
      f"{run.cfg.data.source} is one of those asked for: give rows the split "
      '"eval", or ask for none (config.eval.prompts, helpful and capability of 0)'
    )
  return found


def _think_format(run: Run, arm: str) -> thinking.ThinkFormat | None:
  """How an arm's thoughts are opened for it, if they are."""
  own = ARMS[arm]
  if own.spec:
    return run.model.think if own.thinks or run.task.opens_with_policy else None
  return run.model.trained_think if own.thinks else None


@dataclasses.dataclass(frozen=True)
class ForcedThought:
  """What is done to an arm's thoughts: closed after `budget` tokens, or those of
  `thoughts`, by prompt id, put in their place."""

  suffix: str = ""  # what the name of its file has behind the arm's
  budget: int | None = None
  thoughts: Mapping[str, str] = dataclasses.field(default_factory=dict)


OWN_THOUGHT = ForcedThought()


def _evaluate_swapped(
  run: Run, arm: str, prompts: list[Prompt], rows: list[dict]
) -> list[dict]:
  """The rows of an arm that was given thoughts of the opposite decision."""
  thoughts = evals.opposite_thoughts(rows, run.cfg.eval.swaps)
  some = [prompt for prompt in prompts if prompt.id in thoughts]
  forced = ForcedThought(".swapped", thoughts=thoughts)
  found = _evaluate_arm(run, arm, some, {}, forced)
  return [evals.swapped_row(row, thoughts[row["prompt_id"]]) for row in found]


def _add_decline_probability(
  run: Run, arm: str, prompts: Mapping[str, Prompt], rows: list[dict]
) -> None:
  """Adds to rows `decline_probability`, the probability that the arm opens an
  answer as a refusal does, after the prompt and its own thought, in one forward pass.
  """
  params = _arm_params(run, arm)
  think = _think_format(run, arm)
  rows = [
    row
    for row in rows
    if not (think and row["malformed"])
    and not attacks.untemplated(prompts[row["prompt_id"]])
  ]
  openings = [run.model.tok.encode(opening) for opening in run.task.openings]
  lines, starts = [], []
  for row in rows:
    prompt = prompts[row["prompt_id"]]
    front = [*prompting.render_prompt(run.model.tok, prompting.plain(prompt), think)]
    if think:
      thought = row["thought"].removeprefix(think.of(prompt.text).start).strip()
      front += run.model.tok.encode(prompting.format_completion(thought, "", think))
    for opening in openings:
      lines.append([*front, *opening])
      starts.append(len(front))
  length = -(-max(map(len, lines), default=1) // 128) * 128
  score = run.scorer(BatchConfig(micro=1, rows=max(1, 1024 // length), length=length))
  logp = iter(float(np.sum(logp_T)) for logp_T in score(params, lines, starts))
  for row in rows:
    row["decline_probability"] = min(1.0, sum(math.exp(next(logp)) for _ in openings))
  run.model.free(params)


def _evaluate_arm(
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
    drafts |= samples.drafts(run, without_draft, grow_to_fit=True)
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
  cfg, model, think = run.cfg.eval, run.model, _think_format(run, arm)
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
  params = _arm_params(run, arm)
  complete = functools.partial(
    run.sampler.complete,
    run.sampler.prepare(params),
    key=ops.stream(run.key, "eval"),
    temperature=cfg.temperature,
    top_p=cfg.top_p,
    max_new=max_new,
    prefix_room=None if ARMS[arm].spec else run.cfg.sampler.prefix_step,
    grow_to_fit=True,
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


def _arm_params(run: Run, arm: str) -> PyTree:
  """The parameters of an arm."""
  stage = ARMS[arm].stage
  return run.model.trained_params(stage) if stage else run.model.base_params()


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
