"""prompts + spec -> generate/samples.jsonl: thoughts and answers, the spec in sight.

Nothing here is told how a prompt should be replied to. Prompts of one category share
their context, so each category is one run of the sampler. A prompt is sampled in rounds
until enough samples look right, or it has had its share. A teacher behind
a server is asked for the same; a recorded one has been.
"""

import collections
from collections.abc import Iterator
import dataclasses
import functools
import pathlib

from dalign.config import stages
from dalign.data import prompt_sets
from dalign.judges import recordings
from dalign.models import ops
from dalign.policy import prompting
from dalign.runs import progress
from dalign.sampling import sampler as sampling
from dalign.stages import samples
from dalign.stages import servers
from dalign.stages import services
from dalign.stages.prompts import too_long
from dalign.text import packing
from dalign.types import EXPECTED
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Turn

Run = services.Services[stages.GenerateStage]  # what this stage sees of a run

PROMPTS_PER_BATCH = 1024  # prompts of a category whose tokens are held at the same time


def generate(run: Run) -> None:
  """Samples every chosen training prompt; goes on where it stopped."""
  cfg = run.cfg.generate
  if set(cfg.prompts) != set(EXPECTED):
    raise ValueError(
      f"config.generate.prompts: wanted a number for each of {', '.join(EXPECTED)}, "
      f"got {dict(cfg.prompts)}"
    )
  recorded = _recorded_rows(run)
  prompts = []
  for expected in EXPECTED:
    wanted = cfg.prompts[expected]
    prompts += run.prompts.choose("train", "safety", wanted, (expected,), recorded)
  prompts += run.prompts.choose("train", "helpful", cfg.helpful, among=recorded)
  prompts += run.prompts.choose("train", "capability", cfg.capability, among=recorded)
  if not prompts:
    raise ValueError(
      f"generate: wanted training prompts, and {run.cfg.data.source} has none of those "
      "that config.generate asks for; a column split says which are of training"
    )
  prompts = [prompt.blind() for prompt in prompts]
  # Samples of prompts that stay as they were are kept, whatever else their file says;
  # revisions are of drafts that were made for all at once.
  renewed: list[str | pathlib.Path] = ["data.columns", *run.prompts.files]
  inputs = [*run.sources, *run.recording_files]
  if not run.begin(inputs, renewed=() if cfg.revise else renewed):
    return
  path = run.store.path("generate", "samples.jsonl")
  _keep_samples(run, path, prompts)
  ledger = SampleLedger(run, prompts)
  for row in run.store.each_row(path) if run.store.has(path) else []:
    ledger.add(samples.from_row(row))
  if cfg.revise:
    ledger.load_drafts(path.with_name("drafts.jsonl"))
  refused: list[Sample] = []  # to be asked for again where this does not finish
  draw = _sample_endpoint if cfg.teacher == "endpoint" else _sample_base
  if recorded is not None:
    draw = functools.partial(_replay_recording, recorded)
  with progress.bar(len(prompts), "generate", "prompt", len(ledger.finished)) as bar:
    for sample in draw(run, ledger):
      if sample.finish == "refused":
        refused.append(sample)
      else:
        run.store.append_rows(path, [samples.to_row(sample)])
      if ledger.total % 20 == 0:
        run.store.pause("generate")
      bar.n = len(ledger.finished)
      bar.set_postfix(samples=ledger.total, good=ledger.good, refresh=False)
      bar.update(0)
  if len(refused) > cfg.refused * ledger.total:
    raise ValueError(
      f"generate: the server sent nothing for {len(refused)} of {ledger.total} "
      f"samples: {progress.top_reasons(sample.malformed for sample in refused)}; "
      f"wanted at most {cfg.refused:.0%} (config.generate.refused). "
      "The same command asks again"
    )
  run.store.append_rows(path, [*map(samples.to_row, refused)])
  order = {id: at for at, id in enumerate(ledger.prompts)}
  # Not in the order in which they happened to end.
  run.store.sort_rows(path, lambda row: (order[row["prompt_id"]], row["index"]))
  run.finish(ledger.summary())
  bad = ledger.malformed
  progress.say(
    f"generate: {ledger.total} samples, {bad.total()} of them malformed"
    + (f": {progress.top_reasons(bad.elements())}" if bad else "")
  )


def _keep_samples(run: Run, path: pathlib.Path, prompts: list[Prompt]) -> None:
  """Takes out the samples of prompts that are other ones now, or none, and notes in
  generate/prompts.jsonl what was asked."""
  store, noted = run.store, path.with_name("prompts.jsonl")
  asked = {
    p.id: prompt_sets.fingerprint([dataclasses.replace(p, split="", scenario="")])
    for p in prompts
  }
  rows = store.read_rows(noted) if store.has(noted) else []
  before = {row["prompt_id"]: row["asked"] for row in rows}
  if rows and before != asked and store.has(path):
    samples_ = store.read_rows(path)
    same = {id for id, what in asked.items() if before.get(id) == what}
    kept = [row for row in samples_ if row["prompt_id"] in same]
    store.write_rows(path, kept)
    progress.say(
      f"generate: the prompts have changed: kept {len(kept)} of {len(samples_)} samples"
    )
  store.write_rows(
    noted, [{"prompt_id": id, "asked": what} for id, what in asked.items()]
  )


def _recorded_rows(run: Run) -> dict[str, list[recordings.RecordedReply]] | None:
  """Prompt id -> what the recorded teacher thought and said to it."""
  if not run.recording:
    return None
  rows_by_prompt = collections.defaultdict(list)
  for row in run.recorded:
    if row.thought:
      rows_by_prompt[row.prompt_id].append(row)
  return dict(rows_by_prompt)


def _replay_recording(
  recorded: dict[str, list[recordings.RecordedReply]], run: Run, ledger: "SampleLedger"
) -> Iterator[Sample]:
  """The samples of a recorded teacher, all that there are of each prompt."""
  for prompt in ledger.prompts.values():
    for index, row in enumerate(recorded[prompt.id]):
      if index not in ledger.samples[prompt.id]:
        sample = samples.from_text(
          run.model, prompt, index, row.thought, row.answer, run.model.think
        )
        ledger.add(sample)
        yield sample
    ledger.finish(prompt)


def _sample_base(run: Run, ledger: "SampleLedger") -> Iterator[Sample]:
  """Samples of the base, as they end."""
  groups = collections.defaultdict(list)
  for prompt in ledger.prompts.values():
    groups[prompt.category].append(prompt)
  parts = [
    group[at]
    for group in sorted(groups.values(), key=len, reverse=True)
    for at in packing.batches(len(group), PROMPTS_PER_BATCH)
  ]
  room = max(
    ledger.common_prefix(group[:PROMPTS_PER_BATCH]) for group in groups.values()
  )
  done = run.sampler.run(  # as they are needed, and not all of them at once
    run.base_weights,
    (ledger.fitting_requests(part, room) for part in parts),
    key=ops.stream(run.key, "generate"),
    temperature=run.cfg.generate.temperature,
    max_new=run.cfg.generate.max_new,
    prefix_room=room,
    prompt_room=run.cfg.sampler.prompt_room,
    more=ledger.more,
  )
  for completion in done:
    yield ledger.sample(completion)


def _sample_endpoint(run: Run, ledger: "SampleLedger") -> Iterator[Sample]:
  """Samples of the model at `generate.endpoint`."""
  cfg = run.cfg.generate
  server = servers.Server(run.store, cfg.endpoint, "teacher")
  wanted = [(p, i) for p in ledger.prompts.values() for i in ledger.wanted(p)]
  while wanted:
    asked = [servers.make_request(ledger.turns(*pair), cfg, pair[1]) for pair in wanted]
    next_wanted = []
    for at, reply in server.rounds(asked):
      prompt, index = wanted[at]
      sample = servers.to_sample(run.model, prompt, index, reply, run.model.think)
      ledger.add(sample)
      yield sample
      next_wanted += [(prompt, i) for i in ledger.wanted(prompt)]
    wanted = next_wanted
  server.report_usage()


class SampleLedger:
  """Which samples each prompt has, and whether it wants more."""

  def __init__(self, run: Run, prompts: list[Prompt]):
    self.run, self.cfg = run, run.cfg.generate
    self.prompts = {prompt.id: prompt for prompt in prompts}
    # By the id of a prompt that wants more: whether each sample looks right, those that
    # were asked for, and of each draft what is read.
    self.samples: dict[str, dict[int, bool]] = collections.defaultdict(dict)
    self.asked: dict[str, set[int]] = collections.defaultdict(set)
    self.rendered: dict[str, dict] = collections.defaultdict(dict)
    self.drafts: dict = {}  # prompt id -> the answers to be revised, one a sample
    self.total = self.good = self.prompts_with_good = self.too_long = 0
    self.malformed: collections.Counter = collections.Counter()
    self.finished: set[str] = set()  # ids of prompts that want no more
    self.looks_right = run.task.looks_right(self.cfg.threshold)

  def load_drafts(self, path: pathlib.Path) -> None:
    """Has every sample revise an answer that the base gave without the spec."""
    store = self.run.store
    if not store.has(path):
      prompts = [*self.prompts.values()]
      rounds = [samples.drafts(self.run, prompts, i) for i in range(self.cfg.most)]
      store.write_rows(
        path,
        [
          {"prompt_id": p.id, "drafts": [d[p.id].answer for d in rounds]}
          for p in prompts
        ],
      )
    self.drafts = {row["prompt_id"]: row["drafts"] for row in store.read_rows(path)}

  def tokens(self, prompt: Prompt, index: int) -> tuple[int, ...]:
    """What the model reads before it thinks of this prompt."""
    draft = self._draft(prompt, index)
    known = self.rendered[prompt.id]
    if draft not in known:
      turns = self.turns(prompt, index)
      known[draft] = prompting.render_prompt(
        self.run.model.tok, turns, self.run.model.think, keep_thoughts=True
      )
    return known[draft]

  def turns(self, prompt: Prompt, index: int) -> tuple[Turn, ...]:
    """The same as a conversation."""
    draft = self._draft(prompt, index)
    if draft is None:
      return self.run.task.teach(prompt, worked=self.cfg.demonstrations)
    return self.run.task.revise(prompt, draft)

  def _draft(self, prompt: Prompt, index: int) -> str | None:
    return self.drafts[prompt.id][index] if self.drafts else None

  def common_prefix(self, group: list[Prompt]) -> int:
    """How many tokens all samples of a group have in common."""
    indices = range(self.cfg.most if self.drafts else 1)
    return sampling.common_prefix([self.tokens(p, i) for p in group for i in indices])

  def fitting_requests(self, part: list[Prompt], room: int) -> list[sampling.Request]:
    """The first samples to draw of some prompts, but of those that are too long."""
    requests = [request for prompt in part for request in self.requests(prompt)]
    rows = {request.row_id[0]: request.tokens for request in requests}
    long = too_long(self.run.cfg.sampler, rows, room)
    for id in long:
      self.finish(self.prompts[id])
    self.too_long += len(long)
    return [request for request in requests if request.row_id[0] not in long]

  def requests(self, prompt: Prompt) -> list[sampling.Request]:
    """The samples to draw next, for the sampler."""
    return [
      sampling.Request(
        tokens=self.tokens(prompt, i), row_id=(prompt.id, i), max_new=self.cfg.max_new
      )
      for i in self.wanted(prompt)
    ]

  def wanted(self, prompt: Prompt) -> list[int]:
    """The samples to draw next, that nobody has been asked for."""
    if prompt.id in self.finished:
      return []
    new = [i for i in self._missing(prompt) if i not in self.asked[prompt.id]]
    self.asked[prompt.id].update(new)
    return new

  def _missing(self, prompt: Prompt) -> list[int]:
    """What the first round that is not complete lacks; none if no more is wanted."""
    have, cfg = self.samples[prompt.id], self.cfg
    for first in range(0, cfg.most, cfg.batch):
      if sum(have.get(i, False) for i in range(first)) >= cfg.enough:
        return []
      round_ = range(first, min(first + cfg.batch, cfg.most))
      if missing := [i for i in round_ if i not in have]:
        return missing
    return []

  def more(self, completion) -> list[sampling.Request]:
    """What the sampler should draw after a completion."""
    sample = self.sample(completion)
    self.add(sample)
    return self.requests(self.prompts[sample.prompt_id])

  def sample(self, completion):
    id, index = completion.request.row_id
    return samples.from_completion(
      self.run.model, self.prompts[id], completion, index, self.run.model.think
    )

  def add(self, sample) -> None:
    """Notes a sample and whether it looks right: well-formed, and to the task."""
    prompt = self.prompts.get(sample.prompt_id)
    if prompt is None:
      raise ValueError(
        f"generate/samples.jsonl has prompt {sample.prompt_id!r}, which this config "
        "does not choose; use another --workdir or --config.start_over=true"
      )
    self.malformed.update([sample.malformed] if sample.malformed else [])
    right = not sample.malformed and self.looks_right(prompt, sample)
    have = self.samples[prompt.id]
    have[sample.index] = right
    self.total, self.good = self.total + 1, self.good + right
    if not self.run.recording and not self._missing(prompt):
      self.finish(prompt)

  def finish(self, prompt: Prompt) -> None:
    """Notes that a prompt wants no more samples."""
    self.finished.add(prompt.id)
    self.prompts_with_good += any(self.samples[prompt.id].values())
    for kept in (self.samples, self.asked, self.rendered):
      kept.pop(prompt.id, None)

  def summary(self) -> dict:
    return {
      "prompts": len(self.prompts),
      "too_long": self.too_long,
      "samples": self.total,
      "malformed": dict(self.malformed.most_common()),
      "look_right": self.good,
      "prompts_with_one": self.prompts_with_good,
    }
