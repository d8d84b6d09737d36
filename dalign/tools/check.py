"""What a run has to begin with, before it costs anything: its policies, its prompts and
splits, what models read of them in tokens, and its judges. No weights are read."""

import collections
from collections.abc import Callable, Iterator
import dataclasses
import pathlib
from typing import Any

import jax

from dalign.config import stages as declared
from dalign.config.schema import Config
from dalign.config.schema import chosen_stages
from dalign.data import prompt_sets
from dalign.policy import prompting
from dalign.runs import distributed
from dalign.stages import evidence
from dalign.stages import rehearsal
from dalign.stages import rollouts
from dalign.stages import services
from dalign.stages.prompts import too_long
from dalign.types import EXPECTED
from dalign.types import Prompt


@dataclasses.dataclass(frozen=True)
class Line:
  """One of the table: what it is about, what is there, and whether that will do."""

  about: str
  found: str
  fine: bool = True


@dataclasses.dataclass(frozen=True)
class Begun:
  """What the parts of the table look at."""

  cfg: Config
  work: services.Workspace
  stages: tuple[str, ...]

  @property
  def run(self) -> services.Services[declared.Plan]:
    """What most of them read of the config."""
    return services.of(declared.Plan, self.cfg, self.work)


def check(cfg: Config, workdir: pathlib.Path) -> None:
  """Prints a table of what is there and what is missing; ValueError where something is.
  A config with arms is checked as it stands, without their changes."""
  work = services.Workspace(cfg, workdir)
  begun = Begun(cfg, work, chosen_stages(cfg.stages))
  with jax.set_mesh(work.mesh):
    lines: list[Line] = []
    for part in PARTS:
      lines += _guarded(part, begun, [line.found for line in lines if not line.fine])
  if distributed.is_first_process():
    print("\n".join(table(lines)))
  if missing := [line for line in lines if not line.fine]:
    raise ValueError(
      f"check: {len(missing)} of these {len(lines)} say what is missing, the first of "
      f"{missing[0].about}: {missing[0].found}"
    )


def table(lines: list[Line]) -> list[str]:
  """The lines that are printed."""
  width = max(len(line.about) for line in lines)
  return [
    f"{'' if line.fine else 'MISSING':8s}{line.about:{width}s}  {line.found}"
    for line in lines
  ]


def _guarded(
  part: Callable[[Begun], Iterator[Line]], begun: Begun, before: list[str]
) -> list[Line]:
  """The lines of a part; what is wrong with its input is one, unless an earlier part
  has said it `before`, and the others go on."""
  found = []
  try:
    for line in part(begun):
      found.append(line)
  except ValueError as error:
    if not any(str(error).endswith(said) for said in before):
      found.append(Line(part.__name__.strip("_"), str(error), fine=False))
  return found


def _policies(begun: Begun) -> Iterator[Line]:
  run = begun.run
  spec = run.task.spec
  for policy in spec.policies:
    counts = collections.Counter(clause.verdict for clause in policy.clauses)
    said = ", ".join(f"{counts[name]} to {name}" for name in EXPECTED)
    tried = sum(bool(clause.breaks) for clause in policy.clauses)
    said += f"; {tried} with answers that break them, to try judges with"
    yield Line(f"policy {policy.id}", f"version {policy.version}, clauses: {said}")
  if not begun.cfg.world:
    yield Line("policies", f"{len(spec.policies)} of {run.spec_dir.absolute()}")


def _prompts(begun: Begun) -> Iterator[Line]:
  run, cfg, stages = begun.run, begun.cfg, begun.stages
  prompts = run.prompts.all
  cells: dict[tuple[str, str, str], collections.Counter] = {}
  for p in prompts:
    cell = (p.category, p.kind, p.expected)
    cells.setdefault(cell, collections.Counter())[p.split] += 1
  for (category, kind, expected), n in sorted(cells.items()):
    about = f"{category} to {expected}" if kind == "safety" else f"{category}, {kind}"
    said = f"{n['train']} to train on, {n['eval']} held out"
    least = cfg.filter.least if cfg.thin == "stop" and "filter" in stages else 0
    if n["train"] * cfg.filter.per_prompt < least:
      said += f"; filter is to keep {least} (config.filter.least)"
    fine = n["train"] * cfg.filter.per_prompt >= max(least, 1)
    yield Line(about, said, fine=fine or kind != "safety")
  for policy in run.task.spec.policies:
    if policy.id not in {p.category for p in prompts}:
      yield Line(policy.id, "no prompt of this policy", fine=False)
      continue
    there = {p.expected for p in prompts if p.category == policy.id}
    clauses = {clause.verdict: clause for clause in policy.clauses[::-1]}
    for clause in clauses.values():
      if clause.verdict not in there and cfg.generate.prompts.get(clause.verdict, 1):
        said = f"no prompt, and the policy has clauses for it, such as {clause.id}"
        yield Line(f"{policy.id} to {clause.verdict}", said, fine=False)
  if said := run.prompts.of_no_clause.get(run.cfg.data.source, ""):
    yield Line("clauses", said, fine=False)
  if "eval" in stages:
    least = cfg.eval.least if cfg.thin == "stop" else 1
    own = services.of(declared.EvalStage, cfg, begun.work)
    for what in evidence.of_held_out(own, max(least, 1)):
      said = f"{what}, of {max(least, 1)} or more that are wanted"
      yield Line("held out", said, fine=False)
  yield Line(
    "prompts",
    f"{len(run.prompts.raw)} of {run.cfg.data.source}; "
    f"{len(run.prompts.raw) - len(prompts)} say what held-out ones say, and are left "
    "out of training",
  )
  families = collections.defaultdict(set)
  for name, p in zip(prompt_sets.families(prompts), prompts, strict=True):
    families[name].add(p.split)
  both = sum(len(sides) > 1 for sides in families.values())
  yield Line(
    "families",
    f"{len(families)} of scenarios and near-twins, {both} of them on both sides of the "
    "split",
  )


def _teacher(begun: Begun) -> Iterator[Line]:
  run, cfg, stages = begun.run, begun.cfg, begun.stages
  if "generate" not in stages:
    return
  train = [p for p in run.prompts.all if p.split == "train"]
  if run.recording:
    there = {row.prompt_id for row in run.recorded}
    n = sum(p.id in there for p in train)
    yield Line(
      "teacher",
      f"{cfg.generate.teacher}: has thoughts on {n} of {len(train)} training prompts",
      fine=n > 0,
    )
  elif cfg.generate.teacher == "endpoint":
    where = cfg.generate.endpoint
    yield Line("teacher", f"{where.model} at {where.url}, not asked here")
  else:
    yield Line("teacher", f"the base model itself, {cfg.model.path}")


def _judges(begun: Begun) -> Iterator[Line]:
  cfg, where = begun.cfg, begun.cfg.filter.endpoint
  names = {
    "rubric": "the rubric, rules that read no policy but were made for that of dalign, "
    "and go by the label, or by the clause that the thought cites",
    "model": f"{cfg.model.path} by the odds of its grades",
    "sampled": f"{cfg.model.path}, which thinks and grades",
    "endpoint": f"{where.model} at {where.url} as {cfg.filter.form}, not asked here",
    "recorded": f"the votes that came with {cfg.generate.teacher}",
  }
  own = names.get(cfg.filter.judge, cfg.filter.judge)  # or a function
  if "filter" in begun.stages:
    yield Line(
      "judge of the filter", f"{own}; told of the right type: {cfg.filter.metadata}"
    )
  if "rl" in begun.stages:
    who = {"model": "the reward model", "rubric": names["rubric"]}
    told = (cfg.reward if cfg.rl.reward == "model" else cfg.rl).metadata
    who = who.get(cfg.rl.reward, own if cfg.rl.reward == "judge" else cfg.rl.reward)
    yield Line("judge of rl", f"{who}; told of the right type: {told}")


def _lengths(begun: Begun) -> Iterator[Line]:
  run, cfg, stages = begun.run, begun.cfg, begun.stages
  tok, prompts = run.model.tok, run.prompts.all
  rows = {
    p.id: prompting.render_prompt(tok, prompting.plain(p), run.model.trained_think)
    for p in prompts
  }
  lengths = sorted(map(len, rows.values()))
  long = too_long(cfg.sampler, rows, cfg.sampler.prefix_step)
  yield Line(
    "tokens of a prompt",
    f"{lengths[len(lengths) // 2]} in the median, {lengths[-1]} at most; {len(long)} "
    f"are left out (sampler.prompt_room={cfg.sampler.prompt_room})",
  )
  longest = _longest(prompts)
  most = min(cfg.sft.batch.length, run.model.arch.max_length)
  room = most - cfg.generate.max_new
  n = sum(len(rows[p.id]) > room for p in prompts if p.split == "train")
  if "sft" in stages:
    yield Line(
      "tokens of a row of sft",
      f"{most}, of which {cfg.generate.max_new} may be thought and answer: {n} prompts "
      "may be too long for that (sft.batch.length)",
      fine=2 * n <= len(prompts),
    )
  if "generate" in stages and cfg.generate.teacher == "base":
    worked = cfg.generate.demonstrations
    taught = max(
      len(prompting.render_prompt(tok, run.task.teach(p.blind(), worked=worked), None))
      for p in longest
    )
    whole = taught + cfg.generate.max_new
    run.model.arch.check_length(whole, "policy, prompt, thought and answer")
    yield Line(
      "tokens with the policy",
      f"{taught} at most, {whole} with thought and answer; the model takes "
      f"{run.model.arch.max_length}",
    )
  if "eval" in stages:
    whole = lengths[-1] + cfg.eval.max_think + cfg.eval.max_new
    run.model.arch.check_length(whole, "a prompt and what eval.max_new lets it write")


def _longest(prompts: list[Prompt]) -> list[Prompt]:
  """The longest prompt of each category, by characters."""
  found: dict[str, Prompt] = {}
  for p in prompts:
    best = found.setdefault(p.category, p)
    if sum(len(t.content) for t in p.turns) > sum(len(t.content) for t in best.turns):
      found[p.category] = p
  return [*found.values()]


def _steps(begun: Begun) -> Iterator[Line]:
  """Whether stages that sample as they train have the prompts of a step."""
  for stage in ("distill", "rl"):
    cfg: Any = getattr(begun.cfg, stage)
    if cfg and stage in begun.stages:
      run: Any = services.of(declared.STAGES[stage], begun.cfg, begun.work)
      rollouts.prompt_schedule(run, cfg)
      said = f"{cfg.prompts} prompts, {cfg.capability} of them with a known answer"
      yield Line(f"steps of {stage}", said)


def _reading(begun: Begun) -> Iterator[Line]:
  rehearsal.check_prompts_render(begun.cfg, begun.work, begun.stages)
  yield Line("reading", "the chat template shows teacher and judges all that it is to")


PARTS = (_policies, _prompts, _teacher, _judges, _lengths, _steps, _reading)
