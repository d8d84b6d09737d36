"""models -> eval/<arm>.jsonl, eval/summary.json: the arms side by side, held out."""

import collections

import jax

from dalign import compose
from dalign import evals
from dalign import ops
from dalign.pipeline import context
from dalign.sampler import Request
from dalign.types import Prompt

# Where each arm's parameters come from (a stage, or None for the base model), whether
# the spec is in the prompt, and whether the think block is opened for it.
ARMS = {
  "base": (None, False, False),
  "spec_in_prompt": (None, True, True),
  "sft": ("sft", False, True),
  "rl": ("rl", False, True),
  "sft_rl": ("rl", False, True),
}


def evaluate(run: context.Run) -> None:
  """Samples every arm on the held-out prompts, grades and summarises."""
  cfg = run.cfg.eval
  arms = [arm for arm in cfg.arms if _there(run, arm)]
  inputs = [run.spec_dir]
  inputs += {run.store.path(ARMS[a][0], "manifest.json") for a in arms if ARMS[a][0]}
  if not run.begin("eval", sorted(inputs)):
    return
  sets = {"": _held_out(run)}
  for name, source in cfg.extra.items():
    rows = run.load_prompts(source["source"], source["columns"])
    sets[name] = rows[: cfg.extra_limit]
  found = {name: {} for name in sets}
  for arm in arms:
    rows = _arm(run, arm, [p for prompts in sets.values() for p in prompts])
    for name, prompts in sets.items():
      ids = {prompt.id for prompt in prompts}
      found[name][arm] = [row for row in rows if row["prompt_id"] in ids]
  summary = evals.summarize(found[""], seed=run.cfg.seed, trials=cfg.trials)
  for name, rows in list(found.items())[1:]:
    more = evals.summarize(rows, seed=run.cfg.seed, trials=cfg.trials)
    for part in ("arms", "paired"):
      for arm, metrics in more[part].items():
        summary[part][arm] |= {f"{name}_{m}": v for m, v in metrics.items() if v["n"]}
  run.store.write_json(run.store.path("eval", "summary.json"), summary)
  run.store.finish("eval", {"arms": arms, "rows": sum(map(len, sets.values()))})
  for arm, metrics in summary["arms"].items():
    shown = ("refuse_disallowed", "comply_allowed", "balanced_accuracy", "capability")
    line = "  ".join(f"{m} {_percent(metrics[m]['mean'])}" for m in shown)
    context.say(f"eval: {arm:15s} {line}")


def _percent(mean) -> str:
  return "   -" if mean is None else f"{mean:5.1%}"


def _there(run: context.Run, arm: str) -> bool:
  """Whether an arm's model has been trained, in the way the arm means."""
  stage = ARMS[arm][0]
  if stage is None:
    return True
  if not run.store.path(stage, "params").exists():
    context.say(f"eval: no {stage} model in this workdir, arm {arm} is left out")
    return False
  if stage == "rl":
    start = run.store.manifest("rl")["config"]["rl.start"]
    return (arm == "sft_rl") == (start == "sft")
  return True


def _held_out(run: context.Run) -> list[Prompt]:
  cfg = run.cfg.eval
  return [
    *run.choose("eval", "safety", cfg.prompts),
    *run.choose("eval", "helpful", cfg.helpful),
    *run.choose("eval", "capability", cfg.capability),
  ]


def _arm(run: context.Run, arm: str, prompts: list[Prompt]) -> list[dict]:
  """The graded rows of one arm; rows that are there already are not sampled again."""
  cfg = run.cfg.eval
  stage, with_spec, thinks = ARMS[arm]
  path = run.store.path("eval", f"{arm}.jsonl")
  rows = {r["prompt_id"]: r for r in run.store.read_rows(path)} if path.exists() else {}
  think = run.think if thinks else None
  groups, tokens = collections.defaultdict(list), {}
  for prompt in prompts:
    turns = compose.plain(prompt)
    if with_spec:
      turns = compose.teach(
        run.spec, prompt, detail=run.cfg.spec.detail, worked=0, think=run.think
      )
    tokens[prompt.id] = compose.opened(run.tok, turns, think)
    if prompt.id not in rows:
      groups[prompt.category if with_spec else ""].append(prompt)
  params = run.trained_params(stage) if stage else run.base_params()
  weights = run.sampler.prepare(params)
  room = max(map(len, tokens.values())) if with_spec else run.cfg.sampler.prefix_step
  with context.bar(len(prompts), f"eval {arm}", "prompt", len(rows)) as bar:
    of = {context.row_id(p.id): p for group in groups.values() for p in group}
    rows_of = {p.id: row for row, p in of.items()}
    done = run.sampler.run(
      weights,
      [
        [
          Request(tokens=tokens[p.id], row_id=rows_of[p.id], max_new=cfg.max_new)
          for p in g
        ]
        for g in groups.values()
      ],
      key=ops.stream(run.key, "eval"),
      temperature=cfg.temperature,
      prefix_room=room,
      prompt_room=run.cfg.sampler.prompt_room,
      max_new=cfg.max_new,
    )
    for completion in done:
      prompt = of[completion.request.row_id]
      sample = run.sample_row(prompt, completion, 0, think)
      row = evals.outcome(prompt, sample, run.spec)
      run.store.append_rows(path, [row])
      rows[prompt.id] = row
      bar.update()
  jax.tree.map(lambda x: x.delete(), params)
  ordered = [rows[prompt.id] for prompt in prompts]
  run.store.write_rows(path, ordered)  # not in the order in which they happened to end
  run.store.pause("eval")
  return ordered
