"""What a run will take, before it runs: every phase is compiled, and none of it run.

A phase is a program that a stage calls again and again; eval, which calls programs like
those of generation, has none here. Its memory is what the compiler says. Its time is at
least what the chips' arithmetic or memory need for it, in closed form: of matrix
products and attention, and of what is read of parameters, optimizer and cache. What
chips send to one another is not counted. How often it is called follows from the
config, as if every sample used all the tokens it may and every one were kept.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalign.config import stages as declared
from dalign.config.model import ModelConfig
from dalign.config.on_policy import DistillConfig
from dalign.config.schema import Config
from dalign.config.schema import PlanConfig
from dalign.config.schema import chosen_stages
from dalign.config.training import BatchConfig
from dalign.config.training import RewardConfig
from dalign.models import adapters
from dalign.models import param_tree
from dalign.models import sharding
from dalign.policy import spec as specs
from dalign.runs import distributed
from dalign.runs import progress
from dalign.runs.workdir import Store
from dalign.stages import scoring
from dalign.stages import services
from dalign.text import packing
from dalign.training import distillation
from dalign.training import policy_gradient
from dalign.training import reward
from dalign.training import rollout
from dalign.training import sft
from dalign.training import train
from dalign.types import PyTree

Run = services.Services[declared.Plan]

GIB = 2**30
UNITS = {"M": 2**20, "G": GIB, "T": 2**40}
CHARACTERS = 4.0  # a token, of a specification that no tokenizer is here for


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip has: memory in bytes (of a TPU what its compiler allots), bfloat16
  FLOP/s, and bytes/s to its memory (the makers' figures)."""

  memory: float
  flops: float
  bandwidth: float


CHIPS = {
  "v5e": Chip(memory=15.75 * GIB, flops=197e12, bandwidth=819e9),
  "v5p": Chip(memory=95.74 * GIB, flops=459e12, bandwidth=2765e9),
  "v6e": Chip(memory=31.25 * GIB, flops=918e12, bandwidth=1600e9),
  "a100": Chip(memory=80e9, flops=312e12, bandwidth=2039e9),
  "h100": Chip(memory=80e9, flops=989e12, bandwidth=3350e9),
  "h200": Chip(memory=141e9, flops=989e12, bandwidth=4800e9),
}


@dataclasses.dataclass(frozen=True)
class Phase:
  """A program, lowered, and how a run uses it.

  calls, tokens: how often it is called, and the tokens that a call is about.
  flops: of a call, on all chips together.
  held: arrays of the program that have a name: parameters, optimizer, cache.
  beside: arrays that lie in memory meanwhile and are none of the program's.
  reads: how often a call reads what it holds.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  calls: float
  tokens: float
  flops: float
  held: dict[str, PyTree]
  beside: PyTree = ()
  reads: float = 1


@dataclasses.dataclass(frozen=True)
class Row:
  """A phase's line of the plan: bytes and work of one chip and call, seconds at
  least."""

  phase: str
  parameters: float
  optimizer: float
  cache: float
  temporaries: float | None
  total: float
  fits: bool | None
  flops: float
  seconds: float | None
  bound: str
  tokens: float
  calls: float


def plan(cfg: Config, workdir: pathlib.Path) -> None:
  """Prints the plan and writes WORKDIR/plan.json. ValueError says what does not fit."""
  devices, chip = _devices(cfg.plan)
  run = services.of(
    declared.Plan, cfg, services.Workspace(cfg, workdir, devices=devices)
  )
  rows, n = [], len(devices)
  with jax.set_mesh(run.mesh):
    for phase in phases(run, chip):
      progress.say(f"plan: {phase.name}")
      rows.append(row_of(phase, chip, n))
  hours = None
  if all(row.seconds is not None for row in rows):
    hours = sum((row.seconds or 0.0) * row.calls for row in rows) * n / 3600
  found = {
    "topology": cfg.plan.topology,
    "chip": _chip_name(cfg.plan),
    "chips": n,
    "mesh": dict(run.mesh.shape),
    "memory": chip.memory if chip else None,
    "phases": [dataclasses.asdict(row) for row in rows],
    "chip_hours": hours,
    "cost": None if hours is None else hours * cfg.plan.price,
  }
  Store(workdir).write_json(workdir / "plan.json", found)
  lines = table(rows, chip)
  parts = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
  if spread := indivisible_rows(cfg, parts):
    lines.append(
      f"not whole times data x fsdp = {parts}, so on more chips than need be: "
      + ", ".join(spread)
    )
  if hours is not None:
    lines.append(bill(n, hours, cfg.plan.price))
  if distributed.is_first_process():
    print("\n".join(lines))
  if chip and (too_large := [row for row in rows if not row.fits]):
    names = ", ".join(f"{r.phase} ({r.total / GIB:.2f} GiB)" for r in too_large)
    raise ValueError(
      f"the plan does not fit in {chip.memory / GIB:.2f} GiB a chip: {names}; try "
      "compute.remat=true, smaller batch.rows with more batch.micro, fewer "
      "sampler.slots, compute.kv_dtype=bfloat16, or more of mesh.fsdp"
    )


def _abstract_key() -> jax.ShapeDtypeStruct:
  """A key of no seed: to make one takes a device that computes."""
  return jax.eval_shape(lambda: jax.random.key(0))


def _chip_name(cfg: PlanConfig) -> str:
  return cfg.chip or cfg.topology.partition(":")[0]


def _devices(cfg: PlanConfig):
  """The devices to compile for, and what their chips have, if that is known."""
  name = _chip_name(cfg)
  if name and name not in CHIPS:
    raise ValueError(f"config.plan: wanted a chip of {', '.join(CHIPS)}, got {name!r}")
  if not cfg.topology:
    return jax.devices(), CHIPS.get(name)
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  try:
    made = topologies.get_topology_desc(platform="tpu", topology_name=cfg.topology)
  except Exception as error:  # of libtpu, of no class of its own
    raise ValueError(
      f"config.plan.topology: {cfg.topology!r} is none that libtpu knows, or there is "
      f"no libtpu (pip install 'jax[tpu]'): {str(error).splitlines()[0]}"
    ) from error
  # What was compiled for chips that are not there cannot be read back.
  jax.config.update("jax_enable_compilation_cache", False)
  return made.devices, CHIPS[name]


# --- The phases ---


def phases(run: Run, chip: Chip | None = None) -> Iterator[Phase]:
  """The programs of the stages that the config asks for; where they would run on a
  `chip`, whatever compiles them here."""
  cfg, arch, mesh = run.cfg, run.model.arch, run.mesh
  stages = chosen_stages(cfg.stages)
  lying = jax.eval_shape(
    lambda p: adapters.cast_frozen(p, lora=cfg.lora), run.model.shapes
  )
  base = run.model.abstract_on_mesh(lying)
  made = jax.eval_shape(run.model.with_adapters, lying)
  trunk = run.model.abstract_on_mesh(made)
  room, think = _spec_room(run), cfg.sampler.prompt_room
  prompts = sum(cfg.generate.prompts.values())
  prompts += cfg.generate.helpful + cfg.generate.capability
  if run.recording:
    prompts = min(prompts, len({r.prompt_id for r in run.recorded if r.thought}))
  kept = prompts * cfg.filter.per_prompt

  def training(
    name, loss, optimizer, params, batch, *, steps, work, beside=(), fixed=None
  ):
    """An update; `work` is the tokens of a step, and FLOPs of their forward pass."""
    trained, frozen = adapters.split(params)
    frozen = adapters.merge_trees(frozen, fixed or {})
    tx = train.make_optimizer(optimizer, steps=max(2, round(steps)))
    program = train.program(loss, tx, mesh, trained)
    batch = {n: _array(mesh, n, x) for n, x in batch.items()}
    key = _abstract_key()
    used = jax.ShapeDtypeStruct((), jnp.int32)

    def lower():
      return program.jitted.lower(program.state, batch, key, used, frozen)

    held = {
      "parameters": (program.state.params, frozen),
      "optimizer": program.state.opt_state,
    }
    tokens, forward = work
    # Backward takes two products for each of forward's, or one where those are frozen.
    passes = (2 if cfg.lora.rank else 3) + cfg.compute.remat
    return Phase(name, lower, steps, tokens, passes * forward, held, beside)

  def sampling(
    name, params, *, samples, distinct, prefix, max_new, lanes, more=0, beside=()
  ):
    """Prefill and decoding, each beside what the other reads, and the parameters that
    were cast for them; prompts have so many `more` tokens than they have room for."""
    own = think + more
    programs = run.sampler.lowered(
      params, prefix_room=prefix, prompt_room=own, max_new=max_new, lanes=lanes
    )
    prefill, encode, kv = programs["prefill"]
    decode, weights, caches = programs["decode"]
    casting = run.sampler.to_cast(params).values()
    if chip:  # on which, unlike on a CPU, what has that dtype already is no other copy
      casting = [x for x in casting if x.dtype != cfg.compute.dtype]
    beside = params if casting else (), beside
    s = cfg.sampler
    read, drawn = s.prefill * own, s.slots * s.chunk
    yield Phase(
      f"{name} prefill",
      lambda: prefill,
      distinct / s.prefill,
      read,
      forward_flops(arch, read, seen=prefix + own / 2, predicted=0),
      {"parameters": encode, "cache": kv},
      (weights, caches, beside),
    )
    yield Phase(
      f"{name} decode",
      lambda: decode,
      samples * max_new / drawn,
      drawn,
      forward_flops(arch, drawn, seen=prefix + own + max_new / 2, predicted=drawn),
      {"parameters": weights, "cache": caches},
      (encode, kv, beside),
      reads=s.chunk,
    )

  if "generate" in stages and cfg.generate.teacher == "base":
    per = cfg.generate.batch
    yield from sampling(
      "generate",
      base,
      samples=prompts * per,
      distinct=prompts,
      prefix=room,
      max_new=cfg.generate.max_new,
      lanes=cfg.sampler.lanes,
    )
  if "filter" in stages and cfg.filter.judge == "sampled":
    asked = 2 * prompts * cfg.generate.batch  # with the thought, and without
    yield from sampling(
      "judge",
      base,
      samples=asked * cfg.filter.votes,
      distinct=asked,
      prefix=room,
      max_new=cfg.filter.max_new,
      lanes=cfg.sampler.lanes,
      more=cfg.generate.max_new,
    )
  if "sft" in stages:
    shape = cfg.sft.batch
    lines = kept * (think + cfg.generate.max_new) / shape.length
    yield training(
      "sft update",
      sft.make_loss(cfg=arch, compute=cfg.compute),
      cfg.sft.optimizer,
      trunk,
      lines_of(shape),
      steps=max(1, cfg.sft.epochs * lines / (shape.micro * shape.rows)),
      work=_line_work(run, shape),
    )
  if "distill" in stages and cfg.distill:
    yield from _distill(run, cfg.distill, training, sampling, trunk)
  if "reward" in stages:
    c = cfg.reward
    head = jax.eval_shape(reward.init_head, made, _abstract_key())
    loss = reward.make_loss(
      cfg=arch,
      compute=cfg.compute,
      pair_weight=c.pair_weight,
      answer_weight=c.answer_weight,
      point_weight=c.point_weight,
    )
    yield training(
      "reward update",
      loss,
      c.optimizer,
      run.model.abstract_on_mesh(head),
      _questions(c, room),
      steps=c.steps,
      work=_reward_work(run, room),
    )
  if "rl" in stages:
    yield from _rl(run, training, sampling, trunk, room)


def _distill(
  run: Run, c: DistillConfig, training, sampling, trunk: PyTree
) -> Iterator[Phase]:
  """As of RL, and what the teacher reads; it is the start or, where it is another,
  takes as much again: with adapters these alone."""
  cfg, arch, shape = run.cfg, run.model.arch, c.batch
  exact, start = c.loss == "exact", _start(cfg, trunk)
  beside = start if c.teacher == c.start else (start, start)
  lines = lines_of(shape)
  lines["sampled_BT"] = lines.pop("weight_BT") > 0
  told = (arch.width,) if exact else ()
  dtype = jnp.dtype(cfg.compute.dtype if exact else "float32")
  name = "teacher_BTD" if exact else "teacher_BT"
  lines[name] = np.zeros((*lines["tokens_BT"].shape, *told), dtype)
  update = training(
    "distill update",
    distillation.make_loss(
      cfg=arch, compute=cfg.compute, temperature=c.temperature, exact=exact
    ),
    c.optimizer,
    {"policy": trunk},
    lines,
    steps=c.steps,
    work=_line_work(run, shape),
    beside=beside,
    fixed={"teacher": distillation.head_of(trunk)},
  )
  yield from _rollouts(run, c, ("student", "student score"), sampling, trunk, update)
  wide = BatchConfig(micro=1, rows=c.teacher_rows, length=c.teacher_length)
  how = {"make": distillation.make_hidden} if exact else {"temperature": c.temperature}
  read = run.scorer(wide, **how)
  own = _spec_room(run) + cfg.sampler.prompt_room + c.max_new
  tokens, flops = _line_work(run, wide)
  yield Phase(
    "teacher",
    lambda: read.lowered(trunk),
    c.steps * c.prompts * c.samples * own / tokens,
    tokens,
    flops,
    {"parameters": trunk},
    (beside, update.held["optimizer"]),
  )
  yield update


def _start(cfg, trunk: PyTree) -> PyTree:
  """What lies beside a policy of the start: all or, with adapters, these alone."""
  return trunk if not cfg.lora.rank else adapters.split(trunk)[0]


def _rl(run: Run, training, sampling, trunk: PyTree, room: int) -> Iterator[Phase]:
  """Rollouts, scores of the start, and updates."""
  cfg, c, shape = run.cfg, run.cfg.rl, run.cfg.rl.batch
  policy, start = trunk, _start(cfg, trunk)
  beside = (
    (start, start) if "model" in (c.reward, c.helpful) else start
  )  # a reward model's trunk
  if c.objective.learns_values:
    policy = {
      "policy": trunk,
      "value": run.model.abstract_on_mesh(
        jax.eval_shape(policy_gradient.init_value_head, trunk)
      ),
    }
  loss = policy_gradient.make_loss(
    cfg=run.model.arch,
    compute=cfg.compute,
    temperature=c.temperature,
    objective=c.objective,
  )
  update = training(
    "rl update",
    loss,
    c.optimizer,
    policy,
    lines_of(shape, rollouts=True),
    steps=c.steps,
    work=_line_work(run, shape),
    beside=beside,
  )
  yield from _rollouts(run, c, ("rollout", "score"), sampling, trunk, update)
  if "model" in (c.reward, c.helpful):
    beside = start, start, update.held["optimizer"]
    yield _reward_scores(run, trunk, room, beside)
  yield update


def _reward_scores(run: Run, trunk: PyTree, room: int, beside: PyTree) -> Phase:
  """Scores of a step's answers by the reward model, category by category."""
  cfg, c = run.cfg.reward, run.cfg.rl
  prompts = c.prompts - c.capability
  categories = min(prompts, len(run.task.spec.policies))
  answers = math.ceil(prompts / categories) * c.samples  # to prompts of a category
  params = run.model.abstract_on_mesh(
    jax.eval_shape(reward.init_head, trunk, _abstract_key())
  )
  batch = scoring.batch_after_prefix([], [], cfg=cfg, room=room)
  return Phase(
    "reward score",
    lambda: scoring.make_scores(run).lower(params, batch),
    c.steps * categories * math.ceil(answers / cfg.rows),
    *_reward_work(run, room),
    {"parameters": params},
    beside,
  )


def _rollouts(
  run: Run, c, names: tuple[str, str], sampling, trunk: PyTree, update: Phase
) -> Iterator[Phase]:
  """Rollouts of a stage, and their scores by its start, so named."""
  cfg, shape = run.cfg, c.batch
  rollouts, room = c.prompts * c.samples, cfg.sampler.prompt_room
  lines = rollouts * (room + c.max_new) / shape.length
  beside = update.beside, update.held["optimizer"]
  yield from sampling(
    names[0],
    trunk,
    samples=rollouts * c.steps,
    distinct=c.prompts * c.steps,
    prefix=cfg.sampler.prefix_step,
    max_new=c.max_new,
    lanes=1,
    beside=beside,
  )
  score = run.scorer(shape, temperature=c.temperature)
  yield Phase(
    names[1],
    lambda: score.lowered(trunk),
    c.steps * lines / shape.rows,
    *_line_work(run, dataclasses.replace(shape, micro=1)),
    {"parameters": trunk},
    beside,
  )


def _array(mesh, name: str, x) -> jax.ShapeDtypeStruct:
  where = sharding.batch_sharding(mesh, name, x, lead=1)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def lines_of(shape: BatchConfig, rollouts=False) -> dict[str, np.ndarray]:
  """A batch of packed lines as the stages make it, empty."""
  packed = packing.pack([([0, 0], [0.0, 1.0])], length=shape.length)
  more = {"weight_BT": packed.weight_BT}
  if rollouts:
    of = {n: [[0.0]] for n in ("behaviour", "advantage", "reference", "returns")}
    left_out_B = np.zeros(len(packed.tokens_BT), np.float32)
    more = {"sampled_BT": packed.weight_BT > 0, "left_out_B": left_out_B}
    more |= rollout.scatter_to_packed(packed.tokens_BT.shape, packed.where, **of)
  return train.micro_batches(packed.lines | more, shape)[0]


def _questions(cfg: RewardConfig, room: int) -> dict[str, np.ndarray]:
  """A batch of the reward model's questions, empty."""
  batch = scoring.batch_after_prefix([], [], cfg=cfg, room=room)
  batch["prompt_B"] = batch["answer_B"] = np.zeros(cfg.rows, np.int32)
  batch["score_B"] = np.zeros(cfg.rows, np.float32)
  return {name: np.asarray(x)[None] for name, x in batch.items()}


def _line_work(run: Run, shape: BatchConfig) -> tuple[float, float]:
  """(tokens of a batch, FLOPs of a forward pass over them), if each line is one row and
  all of it counts."""
  tokens = shape.micro * shape.rows * shape.length
  seen = shape.length / 2
  return tokens, forward_flops(run.model.arch, tokens, seen=seen, predicted=tokens)


def _reward_work(run: Run, room: int) -> tuple[float, float]:
  """The same of a batch of questions, after the policy that they share."""
  c = run.cfg.reward
  tokens, seen = c.rows * c.length + room, room + c.length / 2
  return tokens, forward_flops(run.model.arch, tokens, seen=seen, predicted=0)


def _spec_room(run: Run) -> int:
  """The tokens of the longest policy, in whole steps."""
  names = [policy.id for policy in run.task.spec.policies] + [specs.BENIGN]
  told = [run.task.policy_text(name, run.cfg.spec.detail) for name in names]
  if run.model.has_files:
    longest = max(len(run.model.tok.encode(one)) for one in told)
  else:
    longest = max(map(len, told)) / CHARACTERS
    progress.say(
      f"plan: no tokenizer at {run.cfg.model.path}; the longest policy has "
      f"{longest:.0f} tokens by a guess of {CHARACTERS:g} characters a token"
    )
  step = run.cfg.sampler.prefix_step
  return math.ceil(longest / step) * step


# --- What they take ---


def row_of(phase: Phase, chip: Chip | None, chips: int) -> Row:
  """What a phase takes by its program, which this compiles."""
  held = {name: per_device(tree) for name, tree in phase.held.items()}
  total, temporaries = per_device(phase.beside), None
  try:
    memory: Any = phase.lower().compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    needed = _bytes_needed(str(error))
    if needed is None:
      raise
    total += needed
  else:
    temporaries = memory.temp_size_in_bytes
    total += (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + temporaries
      + memory.generated_code_size_in_bytes
    )
  seconds, bound = None, ""
  if chip:
    times = {
      "compute": phase.flops / chips / chip.flops,
      "memory": phase.reads * sum(held.values()) / chip.bandwidth,
    }
    bound, seconds = max(times.items(), key=lambda item: item[1])
  return Row(
    phase=phase.name,
    parameters=held.get("parameters", 0.0),
    optimizer=held.get("optimizer", 0.0),
    cache=held.get("cache", 0.0),
    temporaries=temporaries,
    total=total,
    fits=total <= chip.memory if chip else None,
    flops=phase.flops / chips,
    seconds=seconds,
    bound=bound,
    tokens=phase.tokens,
    calls=phase.calls,
  )


def forward_flops(
  arch: ModelConfig, tokens: float, *, seen: float, predicted: float
) -> float:
  """FLOPs of a forward pass: of `tokens`, each of which sees so many others, through
  the layers, and of those `predicted` through the head."""
  shapes = param_tree.shapes(arch)
  used = arch.experts_used / arch.experts if arch.experts else 1.0
  layers = sum(
    math.prod(shape) * (used if name in param_tree.OF_EXPERTS else 1.0)
    for name, shape in shapes["layers"].items()
    if param_tree.is_matrix(name)
  )
  slid = len(arch.sliding)
  pairs = (arch.layers - slid) * seen + slid * min(seen, arch.window)
  attention = 2.0 * arch.heads * arch.head_dim * pairs
  return 2.0 * (tokens * (layers + attention) + predicted * arch.width * arch.vocab)


def _bytes_needed(error: str) -> float | None:
  """The bytes that XLA's TPU compiler says a program would have needed."""
  used = re.search(r"(?:memory required for[^(]*\(|Used )([\d.]+)([MGT])", error)
  return float(used[1]) * UNITS[used[2]] if used else None


def per_device(tree: PyTree) -> float:
  """The bytes of a tree of ShapeDtypeStructs on each device."""

  def one(x) -> float:
    shape = x.shape
    if getattr(x, "sharding", None) is not None:
      shape = x.sharding.shard_shape(shape)
    width = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else None
    return math.prod(shape) * (width or jnp.dtype(x.dtype).itemsize)

  return float(sum(map(one, jax.tree.leaves(tree))))


def table(rows: list[Row], chip: Chip | None) -> list[str]:
  """The plan in lines of text: GiB and TFLOP of one chip and call."""
  head = (
    f"{'phase':17} {'params':>7} {'optim':>7} {'cache':>7} {'temp':>7} {'total':>7}"
    f" {'of chip':>7} {'TFLOP':>9} {'ms >=':>9} {'by':7} {'calls':>8} {'tok/s <=':>9}"
  )
  lines = [head]
  for row in rows:
    sizes = (row.parameters, row.optimizer, row.cache, row.temporaries, row.total)
    gib = " ".join(f"{'-':>7}" if s is None else f"{s / GIB:7.2f}" for s in sizes)
    share = f"{row.total / chip.memory:7.0%}" if chip else f"{'-':>7}"
    took = f"{row.seconds * 1e3:9.2f}" if row.seconds is not None else f"{'-':>9}"
    rate = f"{row.tokens / row.seconds:9.0f}" if row.seconds else f"{'-':>9}"
    lines.append(
      f"{row.phase:17} {gib} {share} {row.flops / 1e12:9.4f} {took} {row.bound:7}"
      f" {row.calls:8.0f} {rate}"
    )
  return lines


def bill(chips: int, hours: float, price: float) -> str:
  """What a plan costs, in a line: without money where an hour's price is 0."""
  cost = f", {hours * price:.2f} at {price} each" if price else ""
  return f"{chips} chips; at least {hours:.3f} chip-hours{cost}"


def indivisible_rows(cfg: Config, parts: int) -> list[str]:
  """The numbers of rows that `parts` parts of a mesh do not divide. What axes do not
  divide lies whole on each of their devices (`sharding.drop_indivisible_axes`)."""
  counts = {
    "sampler.slots": cfg.sampler.slots,
    "sampler.prefill": cfg.sampler.prefill,
    "sft.batch.rows": cfg.sft.batch.rows,
    "reward.rows": cfg.reward.rows,
    "rl.batch.rows": cfg.rl.batch.rows,
  }
  if cfg.distill:
    counts["distill.batch.rows"] = cfg.distill.batch.rows
  return [f"{name} = {rows}" for name, rows in counts.items() if rows % parts]
