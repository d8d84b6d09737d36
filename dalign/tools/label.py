"""Labels for prompts that have none, proposed by the filter's judge, for people to
correct: prompts of `config.data` -> WORKDIR/labelled.jsonl, which `config.data` reads.

A prompt's votes lie in label/votes.jsonl, by what is said in it: what was asked before
a kill is not asked again.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import pathlib

import jax

from dalign.config import stages
from dalign.config.schema import Config
from dalign.data import prompt_sets
from dalign.judges import endpoint
from dalign.judges import forms
from dalign.judges import functions
from dalign.judges import labels
from dalign.models import ops
from dalign.policy import spec as specs
from dalign.runs import manifests
from dalign.runs import progress
from dalign.sampling import sampler as sampling
from dalign.stages import judging
from dalign.stages import servers
from dalign.stages import services
from dalign.text import chat_template
from dalign.text import packing
from dalign.text import thinking
from dalign.types import Prompt

Run = services.Services[stages.Label]
Ask = Callable[[Sequence[Prompt]], list[list[labels.Vote]]]  # the votes on each

AT_ONCE = 64  # prompts that are asked about together, and then saved
JUDGES = "model, sampled, endpoint or python:FILE:FUNCTION"


def label(cfg: Config, workdir: pathlib.Path) -> None:
  """Writes WORKDIR/labelled.jsonl: each row of the prompt set, in order, with its label
  where it has one, else with what `filter.votes` votes come to.

  Rows of which nothing could be read have empty fields and a reason. ValueError for a
  judge that proposes nothing, one of which nothing can be read, and a file that may
  have been corrected.
  """
  if cfg.world or cfg.filter.judge in ("rubric", "recorded"):
    what = "the policy world" if cfg.world else cfg.filter.judge
    raise ValueError(
      f"label: wanted policies in English and a judge that reads them, {JUDGES} "
      f"(--config.filter.judge), got {what}"
    )
  work = services.Workspace(cfg, workdir)
  with work.store.hold_workdir(), jax.set_mesh(work.mesh):
    _label(services.of(stages.Label, cfg, work), start_over=cfg.start_over)


def _label(run: Run, *, start_over: bool) -> None:
  store, cfg = run.store, run.cfg
  written = store.workdir / "labelled.jsonl"
  if store.has(written) and (start_over or store.manifest("label") is None):
    raise ValueError(_in_use(written))
  folder = pathlib.Path(cfg.data.dir).expanduser().absolute()
  prompts = prompt_sets.load(
    cfg.data.source, cfg.data.columns, str(folder), labelled=False
  )
  judge = judging.function_files(cfg.proposer.judge)
  open_ = run.begin(
    [*run.sources, *judge],
    renewed=["data.columns", *run.prompts.files],  # votes know what was said
    hash_of=manifests.file_hash,
  )
  path = store.path("label", "votes.jsonl")
  rows = store.read_rows(path) if store.has(path) else []
  known = {row["turns"]: [_vote(vote) for vote in row["votes"]] for row in rows}
  asked = {_name(prompt): prompt for prompt in prompts}
  missing = [prompt for name, prompt in asked.items() if name not in known]
  with progress.bar(len(asked), "label", "prompt", len(known)) as bar:
    for some, votes in _votes(run, missing):
      if not known and all(vote.reason for own in votes for vote in own):
        reasons = progress.top_reasons(vote.reason for own in votes for vote in own)
        raise ValueError(
          f"label: of the first {len(some)} prompts the judge could be read on none: "
          f"{reasons}; take another (--config.filter.judge), or give it more tokens "
          "(--config.filter.max_new)"
        )
      found = dict(zip(map(_name, some), votes, strict=True))
      known |= found
      store.append_rows(
        path,
        (
          {"turns": name, "votes": [*map(dataclasses.asdict, own)]}
          for name, own in found.items()
        ),
      )
      bar.update(len(some))
  readable = cfg.proposer.readable
  found = [labels.tally(known[_name(p)], p, readable=readable) for p in prompts]
  lines = [_line(p, proposed) for p, proposed in zip(prompts, found, strict=True)]
  summary = _summary(prompts, found)
  if not store.has(written):
    store.write_rows(written, lines)
  elif open_ and store.read_rows(written) != lines:
    raise ValueError(_in_use(written))
  if open_:
    run.finish(summary)
  for said in _said(summary):
    progress.say(f"label: {said}")
  progress.say(
    f"label: {written} is to be corrected; then --config.data.source=jsonl:{written}"
  )


def _in_use(path: pathlib.Path) -> str:
  return (
    f"{path}: wanted none, which is written there, and it may have corrections: move "
    "it, or take another --workdir"
  )


def _name(prompt: Prompt) -> str:
  return prompt_sets.digest(prompt.turns)


def _vote(row: dict) -> labels.Vote:
  return labels.Vote(**row | {"clauses": tuple(row["clauses"])})


def _votes(
  run: Run, prompts: Sequence[Prompt]
) -> Iterator[tuple[Sequence[Prompt], list[list[labels.Vote]]]]:
  """(prompts, votes on each), some at a time."""
  if not prompts:
    return
  kind = run.cfg.proposer.judge
  if kind == "endpoint":
    ask = _served(run)
  else:
    ask = _by_function(run) if kind.startswith(functions.MARK) else _sampled(run)
  for at in packing.batches(len(prompts), AT_ONCE):
    yield prompts[at], ask(prompts[at])


def _question(run: Run, prompt: Prompt):
  return labels.question(run.task.spec, prompt, detail=run.cfg.spec.detail)


def _by_function(run: Run) -> Ask:
  policies = {p.id: run.task.policy_text(p.id, "full") for p in run.task.spec.policies}
  ask = functions.labeller(run.cfg.proposer.judge, run.task.spec, policies)

  def votes(prompts: Sequence[Prompt]) -> list[list[labels.Vote]]:
    rounds = [ask(prompts) for _ in range(run.cfg.proposer.votes)]
    return [[*own] for own in zip(*rounds, strict=True)]

  return votes


def _served(run: Run) -> Ask:
  """The model at `filter.endpoint`."""
  cfg = run.cfg.proposer
  server = servers.Server(run.store, cfg.endpoint, "label")

  def votes(prompts: Sequence[Prompt]) -> list[list[labels.Vote]]:
    replies = server.chat(
      [
        endpoint.Request(
          turns=tuple(_question(run, prompt)),
          temperature=cfg.temperature,
          max_new=cfg.max_new,
          draw=draw,
        )
        for prompt in prompts
        for draw in range(cfg.votes)
      ]
    )
    server.report_usage()
    said = iter([*map(servers.to_model_reply, replies)])
    return [
      [labels.read(next(said), prompt, run.task.spec) for _ in range(cfg.votes)]
      for prompt in prompts
    ]

  return votes


def _sampled(run: Run) -> Ask:
  """The base model, which thinks and writes a label, whatever its odds would be."""
  cfg, weights = run.cfg.proposer, run.base_weights

  def votes(prompts: Sequence[Prompt]) -> list[list[labels.Vote]]:
    of = {_name(prompt): prompt for prompt in prompts}
    found: dict[str, list[labels.Vote]] = {name: [] for name in of}
    requests = []
    for name, prompt in of.items():
      turns = _question(run, prompt)
      tokens = tuple(chat_template.render_chat(run.model.tok, turns))
      if len(tokens) + cfg.max_new > run.model.arch.max_length:
        found[name] = [labels.Vote(reason=forms.TOO_LONG)] * cfg.votes
        continue
      requests += [
        sampling.Request(tokens=tokens, row_id=(name, i), max_new=cfg.max_new)
        for i in range(cfg.votes)
      ]
    done = run.sampler.complete(
      weights,
      [requests],
      key=ops.stream(run.key, "label"),
      temperature=cfg.temperature,
      max_new=cfg.max_new,
    )
    for completion in sorted(done, key=lambda done: done.request.row_id):
      name, _ = completion.request.row_id
      text = run.model.tok.decode(completion.tokens)
      _, answer, malformed = thinking.split_thought(text, run.model.think.of(""))
      text = text if malformed else answer
      said = forms.ModelReply(text, cut=completion.finish == "length")
      found[name].append(labels.read(said, of[name], run.task.spec))
    return [*found.values()]

  return votes


def _labelled(prompt: Prompt) -> bool:
  return bool(prompt.category and prompt.expected)


def _line(prompt: Prompt, proposed: labels.Proposal) -> dict:
  """A row as `prompt_sets.load` reads it, and beside what was proposed."""
  whole = _labelled(prompt)
  said = {
    "category": prompt.category or proposed.category,
    "expected": prompt.expected or proposed.expected,
    "clauses": [*(prompt.clauses or (() if whole else proposed.clauses))],
  }
  kind = prompt.kind
  if not prompt.category and (kind, proposed.category) == ("safety", specs.BENIGN):
    kind = "helpful"  # which is what is said where no policy is touched
  more = {
    # An id that the turns make changes with them.
    "id": "" if prompt.id.startswith(_name(prompt)) else prompt.id,
    "kind": kind if kind != "safety" else "",
    "split": prompt.split,
    "answer": prompt.answer,
    "scenario": prompt.scenario,
  }
  turns = [dataclasses.asdict(turn) for turn in prompt.turns]
  own = {"turns": turns} if turns[1:] else {"prompt": prompt.text}
  own |= said | {name: value for name, value in more.items() if value}
  label = {"proposed": {name: getattr(proposed, name) for name in said}}
  label["proposed"]["clauses"] = [*proposed.clauses]
  return own | label | {"confidence": proposed.confidence, "reason": proposed.reason}


def _summary(prompts: Sequence[Prompt], found: Sequence[labels.Proposal]) -> dict:
  rows = [*zip(prompts, found, strict=True)]
  open_ = [proposed for prompt, proposed in rows if not _labelled(prompt)]
  read = [one for one in open_ if not one.reason]
  both = [(p, one) for p, one in rows if _labelled(p) and not one.reason]
  return {
    "rows": len(rows),
    "proposed": len(read),
    "of_one_mind": sum(one.confidence["expected"] == 1.0 for one in read),
    "unread": len(open_) - len(read),
    "reasons": progress.top_reasons(one.reason for one in open_ if one.reason),
    "labelled": len(rows) - len(open_),
    "compared": len(both),
    **{
      f"same_{name}": sum(getattr(p, name) == getattr(one, name) for p, one in both)
      for name in ("category", "expected")
    },
  }


def _said(found: dict) -> Iterator[str]:
  yield (
    f"{found['proposed']} of {found['rows']} rows have a proposal, "
    f"{found['of_one_mind']} of these with all votes for it"
  )
  if found["unread"]:
    yield f"{found['unread']} rows have none, and why: {found['reasons']}"
  if found["labelled"]:
    yield (
      f"{found['labelled']} rows had a label and keep it; of {found['compared']} of "
      f"them with a proposal {found['same_category']} have the same category and "
      f"{found['same_expected']} the same type"
    )
