"""models -> eval/<arm>.jsonl, eval/summary.json: the arms side by side, held out."""

import collections
from collections.abc import Mapping
import functools
import math

import numpy as np

from dalign.config import stages
from dalign.config.training import BatchConfig
from dalign.data import attacks
from dalign.data import prompt_sets
from dalign.evaluation import evals
from dalign.evaluation import figures
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.runs import progress
from dalign.stages import arms as arms_of
from dalign.stages import evidence
from dalign.stages import grading
from dalign.stages import judging
from dalign.stages import services
from dalign.stages.prompts import set_label
from dalign.types import Prompt
from dalign.types import Sample

Run = services.Services[stages.EvalStage]  # what this stage sees of a run


def evaluate(run: Run) -> None:
  """Samples every arm on the held-out prompts, grades and summarises."""
  cfg = run.cfg.eval
  arms = [arm for arm in cfg.arms if _is_trained(run, arm)]
  if not arms:
    raise ValueError(f"eval: no arm of {', '.join(cfg.arms)} is there to evaluate")
  stages = {arms_of.ARMS[arm].stage for arm in arms} - {""}
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
    files[arm] = arms_of.rows_of(run, arm, [*prompts_by_id.values()], drafts)
    for name, prompts in sets.items():
      ids = {prompt.id for prompt in prompts}
      rows_by_set[name][arm] = [row for row in files[arm] if row["prompt_id"] in ids]
    think = arms_of.think_format(run, arm)
    for budget in cfg.budgets if think else ():
      name = f"thought_{budget}"
      forced = arms_of.ForcedThought(f".{name}", budget=budget)
      rows = arms_of.rows_of(run, arm, sets[""], drafts, forced)
      rows_by_set[name][arm] = files[f"{arm}.{name}"] = rows
    swaps = cfg.swaps and "swap_followed" in run.task.definitions
    if swaps and think and not think.start and not arms_of.ARMS[arm].spec:
      swapped = _evaluate_swapped(run, arm, sets[""], rows_by_set[""][arm])
      for name, rows in swapped.items():
        rows_by_set[name][arm] = rows

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
      rows_by_set[f"{public}_worst"][arm] = [
        evals.worst(name, rows, share=cfg.worst)
        for name, rows in rows_by_original.items()
      ]
    own = arms_of.ARMS[arm]
    if run.task.openings and not own.served and not own.spec:
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
  seed, trials = run.cfg.seed, cfg.trials
  summarize = functools.partial(
    evals.summarize, definitions=grading.definitions(run), seed=seed, trials=trials
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
      if (curve := evals.operating_curve(rows, seed=seed, trials=trials))
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
  stage = arms_of.ARMS[arm].stage
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
  train = [prompt for prompt in run.prompts.all if prompt.split != "eval"]
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


def _evaluate_swapped(
  run: Run, arm: str, prompts: list[Prompt], rows: list[dict]
) -> dict[str, list[dict]]:
  """The rows of an arm that was given thoughts of the opposite decision, and of these
  the first clause, what follows it or the last sentence alone."""
  opposite = evals.opposite_thoughts(rows, run.cfg.eval.swaps)
  verdicts = specs.verdicts(run.task.spec)
  conflicting = evals.conflicting_thoughts(rows, opposite, verdicts)
  found = {}
  for name, thoughts in ({"swapped": opposite} | conflicting).items():
    some = [prompt for prompt in prompts if prompt.id in thoughts]
    forced = arms_of.ForcedThought(f".{name}", thoughts=thoughts)
    found[name] = [
      evals.swapped_row(row, thoughts[row["prompt_id"]])
      for row in arms_of.rows_of(run, arm, some, {}, forced)
    ]
  return found


def _add_decline_probability(
  run: Run, arm: str, prompts: Mapping[str, Prompt], rows: list[dict]
) -> None:
  """Adds to rows `decline_probability`, the probability that the arm opens an
  answer as a refusal does, after the prompt and its own thought, in one forward pass.
  """
  params = arms_of.params_of(run, arm)
  think = arms_of.think_format(run, arm)
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
