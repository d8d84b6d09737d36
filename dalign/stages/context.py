"""What the stages of one run share: config, files, model, spec, prompts, progress."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dalign.config import schema as configs
from dalign.data import attacks
from dalign.data import bundled
from dalign.data import prompt_sets
from dalign.formats import weights
from dalign.judges import recordings
from dalign.models import adapters
from dalign.models import kernels
from dalign.models import ops
from dalign.models import param_tree
from dalign.models import sharding
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.runs import distributed
from dalign.runs import metrics
from dalign.runs import stopping
from dalign.runs import store
from dalign.sampling import likelihood
from dalign.sampling import sampler as sampling
from dalign.tasks import domain
from dalign.tasks import world
from dalign.text import chat_template
from dalign.text import thinking
from dalign.text import vocab
from dalign.training import checkpoints
from dalign.training import train
from dalign.types import EXPECTED
from dalign.types import Prompt
from dalign.types import PyTree
from dalign.types import Sample
from dalign.types import Spec
from dalign.types import Turn

# The parts of the config that each stage depends on; a change there stops the run.
_JUDGE = tuple(
  f"filter.{name}" for name in ("judge", "endpoint", "form", "temperature", "max_new")
)
READS = {
  "base": ("model", "compute", "world"),
  "generate": ("model", "compute", "think", "spec", "world.spec", "data", "generate"),
  "filter": (
    *("model", "compute", "spec", "world.spec", "data", "filter"),
    *("generate.teacher", "sft.batch"),  # of recorded votes, and of language quality
  ),
  "sft": ("model", "compute", "lora", "think", "spec", "world.spec", "data", "sft"),
  "reward": (
    *("model", "compute", "lora", "spec", "world.spec", "data", "reward", *_JUDGE),
    *("generate.temperature", "generate.max_new"),  # of drafts
    "generate.teacher",
  ),
  "rl": (
    *("model", "compute", "lora", "think", "spec", "data", "rl"),
    *("world.spec", *_JUDGE),
    *(f"reward.{n}" for n in ("shows_thought", "metadata", "detail", "length")),
  ),
  "eval": (
    *("model", "compute", "think", "spec", "world.spec", "data", "eval"),
    *("generate.temperature", "generate.max_new"),  # of what self_refine revises
  ),
  "export": ("model", "lora", "think", "spec", "world.spec", "export"),
}

# Of a server, how it is asked and what that costs.
ASKING = ("key", "concurrency", "timeout", "retries", "price_in", "price_out")

# Keys that say when to stop, how fast and at what price, and change nothing made.
LIMITS = (
  "model.date",  # which config.json keeps
  *("generate.refused", "filter.unscored", "rl.unscored", "eval.unscored"),
  *("rl.judge_errors", "rl.scan_words", "rl.stop_kl", "rl.stop_gap"),
  *(f"{stage}.optimizer.stop_norm" for stage in ("world", "sft", "reward", "rl")),
  *(
    f"{stage}.endpoint.{name}"
    for stage in ("generate", "filter", "eval")
    for name in ASKING
  ),
  *(f"eval.grader_endpoint.{name}" for name in ASKING),
)


def prepare_jax() -> None:
  """Turns the compile cache on, beside other caches of the user, unless one is set."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = pathlib.Path("~/.cache/dalign/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Run:
  """One run of the method in one folder."""

  def __init__(
    self,
    cfg: configs.Config,
    workdir: pathlib.Path,
    shared: dict[str, pathlib.Path] | None = None,
    devices=None,
  ):
    platform = (devices or jax.devices())[0].platform
    if platform == "cpu" and cfg.compute.kv_dtype != "float32":
      raise ValueError(
        "config.compute.kv_dtype: wanted float32 on a CPU, whose XLA has no batched "
        f"product of attention in other types; got {cfg.compute.kv_dtype}"
      )
    wanted = kernels.PLATFORMS.get(cfg.compute.attention, platform)
    if wanted != platform:
      raise ValueError(
        f"config.compute.attention: {cfg.compute.attention} runs on a {wanted}, this "
        f"is a {platform}; use xla"
      )
    self.cfg = cfg
    self.store = store.Store(workdir, shared)
    self.metrics = metrics.Metrics(workdir, cfg.log, configs.flat(cfg))
    self.key = jax.random.key(cfg.seed)
    self.think = thinking.ThinkFormat(open=cfg.think.open, close=cfg.think.close)
    self.thinks = self.think if cfg.think.used else None  # what is trained writes it
    self.domain = domain.make(cfg, self._spec_files)
    self.mesh = sharding.make_mesh(cfg.mesh, devices)
    self.opened = False  # whether a stage has begun or gone on

  @property
  def has_model(self) -> bool:
    """Whether the model's files are here, or it needs none; a plan needs only sizes."""
    path = self.cfg.model.path
    return (
      path.startswith("pip:")
      or path in ("random", "world")
      or not self.cfg.model.random
      or pathlib.Path(path).expanduser().exists()
    )

  @functools.cached_property
  def _model(self) -> weights.Checkpoint:
    """The base model as its files have it, parameters unread."""
    if self.cfg.model.path in ("random", "world"):
      tok = vocab.tiny_tokenizer()
      if self.cfg.world:
        tok = vocab.word_tokenizer(world.vocabulary())
      sizes = dict(self.cfg.model.random) | {"vocab": len(tok.ids)}
      arch = configs.build(configs.ModelConfig, sizes, "config.model.random")
      return weights.Checkpoint.random(arch, tok, self.cfg.seed)
    say(f"loading {self.cfg.model.path}")
    return weights.find(self.cfg.model.path)

  @functools.cached_property
  def arch(self) -> configs.ModelConfig:
    lora = self.cfg.lora
    scale = lora.alpha / lora.rank if lora.rank else 0.0
    if self.has_model:
      arch = self._model.cfg
    else:
      sizes = self.cfg.model.random
      arch = configs.build(configs.ModelConfig, sizes, "config.model.random")
    return dataclasses.replace(arch, lora_scale=scale)

  @functools.cached_property
  def model_tok(self) -> chat_template.Tokenizer:
    """The tokenizer as the model's files have it, but that it opens no thought, and
    that all stages have one day."""
    return self.dated(self._model.tok).unopened(self.think.tag)

  def dated(self, tok: chat_template.Tokenizer) -> chat_template.Tokenizer:
    """A tokenizer whose chat template is told the day of the run's first stage."""
    return dataclasses.replace(tok, date=self.cfg.model.date)

  @functools.cached_property
  def tok(self) -> chat_template.Tokenizer:
    """The tokenizer, which reads the tags of the think format."""
    return self.model_tok.reading(self.think.open + self.think.close)

  @functools.cached_property
  def shapes(self) -> PyTree:
    """The base model's parameters as ShapeDtypeStructs."""
    return _shapes(self.arch)

  def base_params(self) -> PyTree:
    """The base model's parameters, on the mesh; a new copy at each call."""
    params = (
      self._load(self.trained("base"), self.shapes)
      if self.cfg.world
      else self.fresh_params()
    )
    return adapters.held(params, lora=self.cfg.lora)

  def fresh_params(self) -> PyTree:
    """The parameters that the model's source has, on the mesh."""
    return self._model.params(
      jax.tree.map(lambda x: x.sharding, self.placed(self.shapes))
    )

  def start_params(self, start: str) -> PyTree:
    """What a training stage starts from: "base", with new adapters where the config has
    such, or "sft"."""
    if start == "sft":
      return self.trained_params("sft")
    return self.adapted(self.base_params())

  def adapted(self, params: PyTree) -> PyTree:
    """A decoder's parameters with the adapters that the config asks for."""
    lora, key = self.cfg.lora, ops.stream(self.key, "lora")
    if not lora.rank:
      return params
    return adapters.attach(params, key, cfg=self.arch, lora=lora)

  def trained_params(self, stage: str, whole=lambda params: params) -> PyTree:
    """The parameters that a finished stage ended with; `whole` makes a decoder's into
    what the stage trains. Where that were adapters, the rest is the base model's."""
    where = self.trained(stage)
    if not self.cfg.lora.rank:
      return self._load(where, jax.eval_shape(whole, self.shapes))
    trained, frozen = adapters.split(whole(self.adapted(self.base_params())))
    return adapters.join(frozen, self._load(where, trained))

  def trained(self, stage: str) -> pathlib.Path:
    """Where the parameters of a finished stage are; ValueError where they are not."""
    where = self.store.path(stage, "params")
    if not where.exists():
      raise ValueError(
        f"{where} is missing: run the {stage} stage first "
        f"(--config.stages={stage} or all)"
      )
    return where

  def _load(self, where: pathlib.Path, shapes: PyTree) -> PyTree:
    """Saved parameters, laid on the mesh as they are read."""
    return checkpoints.load_params(where, self.placed(shapes))

  def placed(self, shapes: PyTree) -> PyTree:
    """Parameters as ShapeDtypeStructs that say where on the mesh they lie."""
    axes = param_tree.logical_axes(shapes)
    return sharding.abstract(shapes, sharding.shardings(self.mesh, axes, shapes))

  @functools.cached_property
  def sampler(self) -> sampling.Sampler:
    return self.make_sampler(self.cfg.sampler)

  def make_sampler(self, shapes: configs.SamplerConfig) -> sampling.Sampler:
    """A sampler of the run's model on its mesh."""
    return sampling.Sampler(
      cfg=self.arch,
      compute=self.cfg.compute,
      stop_ids=self.tok.stop_ids if self.has_model else (0,),
      sampler=shapes,
      mesh=self.mesh if self.mesh.size > 1 else None,
    )

  @property
  def spec(self) -> Spec:
    """The specification."""
    return self.domain.spec

  @property
  def sources(self) -> list[pathlib.Path]:
    """What stages depend on besides each other: policies and prompts, or a world's
    base."""
    if not self.cfg.world:
      return [self.spec_dir, *self.prompt_files]
    base = self.store.path("base", "manifest.json")
    if not base.exists():
      raise ValueError(f"{base} is missing: run the base stage first")
    return [base]

  @property
  def prompt_files(self) -> list[pathlib.Path]:
    """The file of prompts, where they are one of the user's; samples know its lines by
    their numbers."""
    file = prompt_sets.file_of(self.cfg.data.source)
    return [file] if file else []

  @property
  def spec_dir(self) -> pathlib.Path:
    """The folder of policies: as given, or that which comes with the package."""
    return bundled.find(self.cfg.spec.dir)

  def _spec_files(self) -> dict[str, str]:
    """Path -> text, so that what is wrong with a policy says where it lies."""
    folder = self.spec_dir
    files = store.read_spec_files(folder)
    return {(folder / name).as_posix(): text for name, text in files.items()}

  @functools.cached_property
  def all_prompts(self) -> list[Prompt]:
    """The prompt set as its source has it."""
    return self.load_prompts(self.cfg.data.source, self.cfg.data.columns)

  @functools.cached_property
  def prompts(self) -> list[Prompt]:
    """The prompt set without training prompts that say what held-out ones say.
    ValueError where these are more than config.data.contaminated."""
    train = [prompt for prompt in self.all_prompts if prompt.split == "train"]
    held_out = [prompt for prompt in self.all_prompts if prompt.split == "eval"]
    hits = dict(self.domain.contaminated(train, held_out))
    if not hits:
      return self.all_prompts
    prompt, other = next(iter(hits.items()))
    said = (
      f"{len(hits)} of {len(train)} training prompts say what held-out ones say, such "
      f"as {prompt!r}: {other!r:.80}"
    )
    limit = self.cfg.data.contaminated
    if len(hits) > limit * len(train):
      raise ValueError(
        f"{self.cfg.data.source}: {said}; wanted at most {limit:.0%} of them "
        "(config.data.contaminated): take them out, or hold others out"
      )
    say(f"{said}; they are left out")
    return [prompt for prompt in self.all_prompts if prompt.id not in hits]

  def further_sets(self) -> dict[str, list[Prompt]]:
    """The sets that evaluation asks for beside our own, by the name that their metrics
    begin with. Each is the same for every seed."""
    cfg, sets = self.cfg.eval, {}
    for name, source in cfg.extra.items():
      rows = self.load_prompts(source["source"], source["columns"])
      sets[name] = prompt_sets.balanced(rows, min(cfg.extra_limit, len(rows)), 0)
    chosen = {}  # of each public set, whatever its disguises
    for name in cfg.suite:
      public, *names = name.split("+")
      if public not in chosen:
        rows = self.load_prompts(f"public:{public}", {})
        chosen[public] = prompt_sets.balanced(rows, min(cfg.extra_limit, len(rows)), 0)
      if label(name) in sets:
        raise ValueError(f"config.eval: two sets are called {label(name)}")
      sets[label(name)] = [attacks.disguised(p, names) for p in chosen[public]]
    return sets

  def load_prompts(self, source: str, columns) -> list[Prompt]:
    """A prompt set; categories must be of the spec, or "benign". Clauses that the spec
    lacks decide nothing: they are said, and taken off."""
    if notice := self.domain.notice(source):
      say(notice)
    prompts = self.domain.prompts(source, columns, str(self._data_dir))
    known = {policy.id for policy in self.spec.policies} | {specs.BENIGN}
    for prompt in prompts:
      if prompt.category not in known:
        raise ValueError(
          f"{source}: prompt {prompt.id!r} has category {prompt.category!r}; the spec "
          f"has {', '.join(sorted(known))}"
        )
    there = specs.clause_ids(self.spec).keys()
    gone = {p.id: [c for c in p.clauses if c not in there] for p in prompts}
    if odd := [id for id, clauses in gone.items() if clauses]:
      say(
        f"{source}: {len(odd)} prompts name clauses that the spec lacks, such as "
        f"{odd[0]!r} {', '.join(gone[odd[0]])}; they count as not labelled with those"
      )
    return [
      dataclasses.replace(p, clauses=tuple(c for c in p.clauses if c in there))
      if gone[p.id]
      else p
      for p in prompts
    ]

  @property
  def _data_dir(self) -> pathlib.Path:
    return pathlib.Path(self.cfg.data.dir).expanduser().absolute()

  @property
  def recording(self) -> str:
    """The recording that stands for the teacher, or ""."""
    teacher = self.cfg.generate.teacher
    return teacher.removeprefix("recorded:") if teacher.startswith("recorded:") else ""

  @property
  def recording_files(self) -> list[pathlib.Path]:
    """The file of the recording, if there is one."""
    return [recordings.path_of(self.recording)] if self.recording else []

  @functools.cached_property
  def recorded(self) -> list[recordings.Recorded]:
    """The rows of the recording."""
    return recordings.load(self.recording, self.all_prompts, self.spec)

  def choose(
    self, split: str, kind: str, n: int | None, expected=EXPECTED, among=None
  ) -> list[Prompt]:
    """n prompts of one split and kind, spread over categories and response types, or
    all; of those whose ids are `among` some, where that is given. Held-out ones are the
    same for every seed. Where there are fewer than n, that is said."""
    rows = [
      p
      for p in self.prompts
      if p.split == split
      and p.kind == kind
      and p.expected in expected
      and (among is None or p.id in among)
    ]
    seed = self.cfg.seed if split == "train" else 0
    if n is not None and n > len(rows):
      types = "" if expected == EXPECTED else f" to {', '.join(expected)}"
      say(f"wanted {n} {split} prompts of kind {kind}{types}, found {len(rows)}")
    return prompt_sets.balanced(
      rows, len(rows) if n is None else min(n, len(rows)), seed
    )

  def begin(self, stage: str, inputs) -> bool:
    """Opens a stage; False when it is done already."""
    cfg, flat = self.cfg, configs.flat(self.cfg)
    keys = {
      key: value
      for part in READS[stage]
      for key, value in flat.items()
      if (key == part or key.startswith(f"{part}.")) and key not in LIMITS
    }
    state = self.store.begin(
      stage, keys, inputs, cfg.seed, device(), start_over=cfg.start_over
    )
    if state == "done":
      say(f"{stage}: done before, skipped")
      return False
    self.opened = True
    if state == "fresh":
      self.metrics.rewind(stage, -1)
    say(f"{stage}: {'goes on where it stopped' if state == 'resume' else 'starts'}")
    return True

  def sample_row(
    self, prompt: Prompt, done: sampling.Completion, index, think
  ) -> Sample:
    """A completion as a Sample: thought and answer split, forced tokens marked."""
    return prompting.read(
      self.tok,
      prompt,
      done.tokens,
      done.finish,
      index=index,
      think=self.think,
      opened=bool(think),
      needed=bool(think or self.thinks),
    )

  def written_sample(
    self, prompt: Prompt, index: int, thought: str, answer: str, think
  ) -> Sample:
    """A thought and an answer that were written elsewhere as a Sample, with the tokens
    that our own tokenizer has for them, behind the forced opening of `think`."""
    return prompting.write(
      self.tok,
      prompt,
      thought,
      answer,
      index=index,
      think=self.think,
      opened=bool(think),
    )

  def halt(self, stage: str, step: int, why: str, advice: str, batch: dict):
    """Stops at a step, whose batch, a mapping of arrays, is kept. Raises Halted."""
    where, content = self.store.path(stage, f"halted_step_{step}.npz"), io.BytesIO()
    if distributed.first():
      arrays: dict[str, Any] = {n: np.asarray(x) for n, x in batch.items()}
      np.savez(content, **arrays)
      store.write_bytes(where, content.getvalue())
    raise configs.Halted(
      f"{stage} step {step}: {why}; its batch is in {where}. Nothing of this step is "
      f"kept: {advice}, and the same command goes on from the last checkpoint"
    )


def _shapes(arch: configs.ModelConfig) -> PyTree:
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    param_tree.shapes(arch),
    is_leaf=lambda x: isinstance(x, tuple),
  )


class Guest:
  """A model beside the run's own, on its mesh, to be asked and not trained. What path
  it may have: `weights.find`."""

  def __init__(self, run: Run, path: str):
    say(f"loading {path}")
    found = weights.find(path)
    self.cfg, self.arch, self.tok = run.cfg, found.cfg, run.dated(found.tok)
    self.sampler = sampling.Sampler(
      cfg=self.arch,
      compute=run.cfg.compute,
      stop_ids=self.tok.stop_ids,
      sampler=run.cfg.sampler,
      mesh=run.mesh if run.mesh.size > 1 else None,
    )
    placed = run.placed(_shapes(self.arch))
    params = found.params(jax.tree.map(lambda x: x.sharding, placed))
    self.weights = self.sampler.prepare(params)


def complete(
  run: Run | Guest,
  weights: sampling.Weights,
  groups: Iterable[list[sampling.Request]],
  *,
  key,
  temperature: float,
  max_new: int,
  room: int | None = None,
  grows: bool = False,
  **more,
) -> Iterator[sampling.Completion]:
  """The completions of requests, as they end. Those of a group share what they have in
  common, or of it the first `room` tokens; groups are made as they are needed where
  that is given. Prompts longer than the config has room for are an error, or with
  `grows` take more."""
  return run.sampler.complete(
    weights,
    groups,
    key=key,
    temperature=temperature,
    max_new=max_new,
    prefix_room=room,
    grows=grows,
    **more,
  )


def too_long(run: Run, rows: Mapping[str, tuple[int, ...]], room: int) -> set[str]:
  """Of prompts, by id the tokens that are read, the ids of those that the sampler has
  no room for beyond what all share, at most `room`; they are said. ValueError where
  they are more than half, which no outliers are."""
  if not rows:
    return set()
  shared = min(sampling.common_prefix([*rows.values()]), room)
  most = shared + run.cfg.sampler.prompt_room + 1
  found = {id: len(row) for id, row in rows.items() if len(row) > most}
  if not found:
    return set()
  id = max(found, key=lambda id: found[id])
  said = (
    f"{len(found)} of {len(rows)} prompts are longer than the {most} tokens there is "
    f"room for, such as {id!r} with {found[id]}"
  )
  if 2 * len(found) > len(rows):
    raise ValueError(f"{said}; raise sampler.prompt_room")
  say(f"{said}; they are left out (sampler.prompt_room)")
  return {*found}


def drafts(
  run: Run, prompts: list[Prompt], index: int = 0, *, grows: bool = False
) -> dict[str, Sample]:
  """What the base replies to prompts without a specification: prompt id -> sample.
  `grows` as in `complete`."""
  cfg = run.cfg.generate
  requests = [
    sampling.Request(
      tokens=tuple(chat_template.render_chat(run.tok, list(prompting.plain(prompt)))),
      row_id=(prompt.id, index),
      max_new=cfg.max_new,
    )
    for prompt in prompts
  ]
  done = complete(
    run,
    run.sampler.prepare(run.base_params()),
    [requests],
    key=ops.stream(run.key, "draft"),
    temperature=cfg.temperature,
    max_new=cfg.max_new,
    room=run.cfg.sampler.prefix_step,
    grows=grows,
  )
  of = {(prompt.id, index): prompt for prompt in prompts}
  found = {}
  for completion in done:
    prompt = of[completion.request.row_id]
    found[prompt.id] = run.sample_row(prompt, completion, index, None)
  return found


class Scorer(likelihood.Scorer):
  """A `likelihood.Scorer` of a run's model, on its mesh."""

  def __init__(self, run: Run, shape: configs.BatchConfig, **how):
    whole = sharding.whole(run.mesh)
    super().__init__(run.arch, run.cfg.compute, shape, shardings=whole, **how)


def micro_batches(lines: dict, shape: configs.BatchConfig):
  """[B, T] arrays as [M, rows, T] micro-batches, and how many of them are used.

  Raises ValueError when there are more lines than one update holds.
  """
  have, room = len(lines["tokens_BT"]), shape.micro * shape.rows
  if have > room:
    raise ValueError(
      f"an update needs {have} lines of {shape.length} tokens, its batch holds {room}: "
      "raise batch.micro"
    )
  batch = {}
  for name, x in lines.items():
    x = np.concatenate([x, np.zeros((room - have, *x.shape[1:]), x.dtype)])
    batch[name] = x.reshape(shape.micro, shape.rows, *x.shape[1:])
  return batch, max(1, -(-have // shape.rows))


@dataclasses.dataclass
class Trainer:
  """A loop of updates with checkpoints and metrics; it takes `params` for its own.

  Its loop is `with` it, which saves the last step that was done where SIGTERM comes.
  What it ends with is the mean of the parameters after each of the last `averaged`
  steps, or with 0 the parameters after the last.
  """

  run: Run
  stage: str
  params: PyTree
  loss: train.LossFn
  optimizer: configs.OptimizerConfig
  steps: int
  every: int
  averaged: int = 0
  result: Callable[[PyTree], PyTree] = lambda params: params  # what is kept of them

  def __post_init__(self):
    trained, self._frozen = adapters.split(self.params)
    program = train.program(
      self.loss,
      train.make_optimizer(self.optimizer, steps=self.steps),
      self.run.mesh,
      trained,
      averaged=self.averaged > 0,
      average_from=self.steps - self.averaged,
    )
    self.saved = checkpoints.Checkpoints(self.run.store.path(self.stage, "checkpoints"))
    self.in_host_memory = jax.default_backend() == "cpu"
    self.meta: dict = {}
    latest = self.saved.latest()
    if latest is None:
      self.state = program.create(trained)
    else:
      self.state, self.meta = self.saved.restore(latest, program.state)
    self.params = None  # the state holds what is trained, and its updates donate it
    self.step = latest or 0
    self._since = self.step + 1  # the first step of this go
    self._trace, self._mark = contextlib.ExitStack(), contextlib.ExitStack()
    self.run.metrics.rewind(self.stage, self.step)
    self._update = program.update

  def __enter__(self) -> "Trainer":
    self._profile()
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Saves what a SIGTERM would lose, where one process alone decides that."""
    self._mark.close()
    self._trace.close()
    if isinstance(error, stopping.Stopped) and not distributed.several():
      self._save()

  @property
  def whole(self) -> PyTree:
    """The parameters as they are now, with those that are not trained."""
    return adapters.join(self._frozen, self.state.params)

  def update(self, batch: dict, used: int, extra: dict | None = None) -> dict:
    """One step over the first `used` micro-batches; returns and writes its metrics."""
    with stopping.whole():
      return self._step(batch, used, extra)

  def _step(self, batch: dict, used: int, extra: dict | None) -> dict:
    if "positions_BT" in batch:
      longest = int(np.max(batch["positions_BT"])) + 1
      self.run.arch.check_length(longest, f"a row of {self.stage}")
    key = ops.stream(self.run.key, self.stage, self.step)
    if self.in_host_memory:
      checkpoints.give_back_memory()  # of what was done since the last step
    start = time.monotonic()
    self.state, means = self._update(self.state, batch, key, used, self._frozen)
    values = {name: float(mean.value()) for name, mean in means.items()}
    values["step_s"] = time.monotonic() - start
    self.step += 1
    self._check(values, batch)
    values |= {name: np.nan for name, mean in means.items() if not float(mean.count)}
    named = {f"{self.stage}/{name}": value for name, value in values.items()}
    self.run.metrics.write(self.stage, self.step, named | (extra or {}))
    self._profile()
    return values

  def _profile(self) -> None:
    """Between two steps: begins or ends the trace that the config asks for, in which
    each step is marked, with what leads up to its update."""
    first, last = self.run.cfg.profile.steps or (0, 0)
    step = self.step + 1
    self._mark.close()
    if not first <= step <= min(last, self.steps):
      self._trace.close()
      return
    if step == max(first, self._since):
      place = self.run.store.workdir / "profile" / self.stage
      self._trace.enter_context(jax.profiler.trace(place))
    mark = jax.profiler.StepTraceAnnotation(self.stage, step_num=step)
    self._mark.enter_context(mark)

  def _check(self, values: dict, batch: dict) -> None:
    """Halts where a number is not finite or the gradient above its limit, and says
    whether the optimizer skipped the step."""
    halt = functools.partial(self.run.halt, self.stage, self.step, batch=batch)
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
      halt(f"{', '.join(bad)} not finite", "find out why")
    norm, limits = values["grad_norm"], self.optimizer
    if 0 < limits.stop_norm < norm:
      part = "world" if self.stage == "base" else self.stage
      key = f"config.{part}.optimizer.stop_norm={limits.stop_norm:g}"
      halt(f"a gradient of norm {norm:.4g}, above {key}", "raise that")
    if limits.skip_norm:
      values["skipped"] = float(norm > limits.skip_norm)

  def skip(self, extra: dict) -> None:
    """A step without a gradient: counted and written, nothing is changed."""
    with stopping.whole():
      self.step += 1
      self.run.metrics.write(self.stage, self.step, extra)
      self._profile()

  def save(self) -> None:
    """A checkpoint, at every `every` steps and at the end."""
    if self.step % self.every == 0 or self.step == self.steps:
      self._save()

  def _save(self) -> None:
    with stopping.whole():
      self.saved.save(self.step, self.state, self.meta)
      if self.in_host_memory:
        self.saved.settle()
      self.run.store.pause(self.stage)

  def finish(self) -> PyTree:
    """Writes the parameters beside the checkpoints and returns them."""
    trained = self.state.average if self.averaged else self.state.params
    place = self.run.store.path(self.stage, "params")
    checkpoints.save_params(place, self.result(trained))
    self.saved.close()
    return self.result(adapters.join(self._frozen, trained))


def label(name: str) -> str:
  """A set of a suite, in the names of metrics and files."""
  return name.replace("+", "_")


def counted(reasons: Iterable[str], most: int = 3) -> str:
  """The commonest of some reasons with their counts, and how many have others."""
  found = collections.Counter(reasons)
  top = found.most_common(most)
  said = [f"{n} x {why}" for why, n in top]
  left = found.total() - sum(n for _, n in top)
  return "; ".join([*said, *([f"{left} for other reasons"] if left else [])])


def device() -> str:
  """The kind and number of devices, for manifests."""
  devices = jax.devices()
  return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"


def say(line: str) -> None:
  """One line of progress on stderr, of the first process."""
  if distributed.first():
    tqdm.tqdm.write(f"dalign: {line}", file=sys.stderr)


def percent(mean: float | None) -> str:
  """A mean for a line of text."""
  return "   -" if mean is None else f"{mean:5.1%}"


def bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm.tqdm:
  """A progress bar with rate and time left; in a file it is seldom written anew."""
  return tqdm.tqdm(
    total=total,
    desc=what,
    unit=unit,
    initial=initial,
    dynamic_ncols=True,
    smoothing=0.1,
    mininterval=0.1 if sys.stderr.isatty() else 5.0,
    disable=not distributed.first(),
  )


def sample_to_row(sample: Sample) -> dict:
  """A Sample as a JSON row."""
  return dataclasses.asdict(sample)


def row_to_sample(row: dict) -> Sample:
  """The Sample of a JSON row, which may hold more than a Sample."""
  own = {field.name: row[field.name] for field in dataclasses.fields(Sample)}
  return Sample(**own | {"tokens": tuple(row["tokens"])})


def user_turn(content: str) -> Turn:
  """A conversation's one turn."""
  return Turn(role="user", content=content)


def batches(n: int, size: int):
  """Slices that cut n things into runs of `size`."""
  return [slice(at, min(at + size, n)) for at in range(0, n, size)]
