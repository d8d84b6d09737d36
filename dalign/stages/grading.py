"""Graders of evaluation that are models or functions: rows of eval/<arm>.jsonl get
their verdicts.

No grader is told the thought. A model is not told the ideal response type either: it
reads prompt and answer, and the policy where its form has one, and writes greedily. A
function of the user's is, as the rules are.
"""

import collections
from collections.abc import Callable, Mapping, Sequence

from dalign.config import stages
from dalign.evaluation import evals
from dalign.judges import endpoint
from dalign.judges import forms
from dalign.judges import functions
from dalign.judges import judge
from dalign.models import ops
from dalign.runs import progress
from dalign.sampling import sampler as sampling
from dalign.stages import model as models
from dalign.stages import servers
from dalign.stages import services
from dalign.text import chat_template
from dalign.text import packing
from dalign.types import Prompt
from dalign.types import Turn

Run = services.Services[stages.EvalStage]  # what this stage sees of a run

ROWS_PER_BATCH = 256  # rows that a grader has between two looks at the run
SHARED_PREFIX_CHARS = 400  # characters in front by which questions share a policy

Ask = Callable[[list[list[Turn]]], Sequence[forms.ModelReply]]


def add_grades(
  run: Run, files: Mapping[str, list[dict]], prompts: Mapping[str, Prompt]
) -> None:
  """Adds to the rows of eval/<name>.jsonl, and to these files, what the graders of the
  config say of them, and has the first one's grades in their scores. Rows that a grader
  has scored before are not read again."""
  graders = run.cfg.eval.grader
  if graders == ("rules",):
    return
  for grader in graders:
    left = {name: _ungraded_rows(run, grader, rows) for name, rows in files.items()}
    if grader != "rules" and any(left.values()):
      _grade(run, grader, files, left, prompts)
  for name, rows in files.items():
    for row in rows:
      evals.use_grader(row, graders[0])
    run.store.write_rows(run.store.path("eval", f"{name}.jsonl"), rows)


def _ungraded_rows(run: Run, grader: str, rows: list[dict]) -> list[dict]:
  """The rows that a grader has still to read: not those that have no answer, and
  prompts to be answered only where its form knows what is of use."""
  of_use = _is_function(grader) or forms.FORMS[run.cfg.eval.form].judges_usefulness
  return [
    row
    for row in rows
    if row["kind"] != "capability"
    and not row["scores"]["no_answer"]
    and (of_use or row["expected"] != "comply")
    and row.get("graders", {}).get(grader, {}).get("score") is None
  ]


def _grade(
  run: Run,
  grader: str,
  files: Mapping[str, list[dict]],
  ungraded: Mapping[str, list[dict]],
  prompts: Mapping[str, Prompt],
) -> None:
  replies: list[forms.ModelReply] = []  # what a model wrote
  own = _is_function(grader)
  judged = _function(run, grader) if own else _model(run, grader, replies)
  total = sum(map(len, ungraded.values()))
  with progress.bar(total, f"eval grader {grader}", "answer") as bar:
    for name, rows in ungraded.items():
      for at in packing.batches(len(rows), ROWS_PER_BATCH):
        batch = rows[at]
        asked = [prompts[row["prompt_id"]] for row in batch]
        questions = [
          judge.RewardQuestion(prompt if own else prompt.blind(), row["answer"])
          for prompt, row in zip(asked, batch, strict=True)
        ]
        verdicts = judged(questions)
        reply = [one.text for one in replies] or [""] * len(batch)
        for row, verdict, text in zip(batch, verdicts, reply, strict=True):
          found = forms.score_by_response_type(verdict, row["expected"])
          grade = {"score": found.score, "reason": found.reason, "said": text}
          row.setdefault("graders", {})[grader] = grade
        bar.update(len(batch))
        run.store.write_rows(run.store.path("eval", f"{name}.jsonl"), files[name])
        run.store.pause("eval")


def _is_function(grader: str) -> bool:
  return grader.startswith(functions.MARK)


def _function(run: Run, grader: str) -> judge.Judge:
  """The grader "python:FILE:FUNCTION", which is told whole policies."""
  return functions.of_file(grader, lambda name: run.task.policy_text(name, "full"))


def _model(run: Run, grader: str, heard: list[forms.ModelReply]) -> judge.Judge:
  """The grader that is a model; what it wrote last is in `heard`."""
  write = _endpoint_grader(run) if grader == "endpoint" else _local_grader(run)

  def ask(conversations: list[list[Turn]]) -> Sequence[forms.ModelReply]:
    heard[:] = write(conversations)
    return heard

  return run.task.written_judge(ask, run.cfg.eval.form)


def _endpoint_grader(run: Run) -> Ask:
  """The model at `eval.grader_endpoint`."""
  cfg = run.cfg.eval
  server = servers.Server(run.store, cfg.grader_endpoint, "grader")

  def write(conversations: list[list[Turn]]) -> list[forms.ModelReply]:
    asked = [
      endpoint.Request(turns=tuple(turns), temperature=0.0, max_new=cfg.grader_max_new)
      for turns in conversations
    ]
    found = server.chat(asked)
    server.report_usage()
    return [*map(servers.to_model_reply, found)]

  return write


def _local_grader(run: Run) -> Ask:
  """The model at the path `eval.grader_model`, beside the run's own."""
  guest = models.AuxiliaryModel(
    run.cfg.eval.grader_model,
    run.mesh,
    compute=run.cfg.compute,
    shapes=run.cfg.sampler,
    date=run.cfg.model.date,
  )
  max_new = run.cfg.eval.grader_max_new

  def write(conversations: list[list[Turn]]) -> list[forms.ModelReply]:
    groups: dict[str, list] = collections.defaultdict(list)
    replies: dict[int, forms.ModelReply] = {}
    for i, turns in enumerate(conversations):
      tokens = tuple(chat_template.render_chat(guest.tok, turns))
      if len(tokens) + max_new > guest.arch.max_length:
        reason = (
          f"the question has {len(tokens)} tokens, and the grader takes "
          f"{guest.arch.max_length} with its reply"
        )
        replies[i] = forms.ModelReply("", reason)
        continue
      request = sampling.Request(tokens=tokens, row_id=i, max_new=max_new)
      groups[turns[0].content[:SHARED_PREFIX_CHARS]].append(request)
    alone = [requests[0] for requests in groups.values() if not requests[1:]]
    shared = [requests for requests in groups.values() if requests[1:]]
    done = guest.sampler.complete(
      guest.weights,
      [*shared, alone],
      key=ops.stream(run.key, "grader"),
      temperature=0.0,
      max_new=max_new,
    )
    for completion in done:
      written = guest.tok.decode(completion.tokens)
      cut = completion.finish == "length"
      replies[completion.request.row_id] = forms.ModelReply(written, cut=cut)
    return [replies[i] for i in range(len(conversations))]

  return write


def definitions(run: Run) -> dict[str, str]:
  """What each metric is, where a model or a function grades."""
  cfg, found = run.cfg.eval, dict(run.task.definitions)
  if cfg.grader[0] == "rules":
    return found
  if _is_function(cfg.grader[0]):
    of_function = (
      f"Mean score that a function ({cfg.grader[0]}) gives answers to prompts that"
    )
    return found | {
      name: f"{of_function} {which}." for name, which in evals.GRADED_PROMPTS.items()
    }
  form = forms.FORMS[cfg.form]
  model = cfg.grader_model if cfg.grader[0] == "model" else cfg.grader_endpoint.model
  for metric, which in evals.GRADED_PROMPTS.items():
    found[metric] = (
      f"Mean score that a model ({model}, asked as {cfg.form}) gives answers to "
      f"prompts that {which}."
    )
    if metric == "comply_allowed" and not form.judges_usefulness:
      found[metric] = f"Not graded: {cfg.form} knows only what is harmful."
  return found


def grader_agreement(run: Run, rows: Sequence[Mapping]) -> dict[str, dict]:
  """ "first vs other" -> how far the graders agree on rows, for each other."""
  first, *others = run.cfg.eval.grader
  return {
    f"{first} vs {other}": evals.agreement(
      rows, first, other, seed=run.cfg.seed, trials=run.cfg.eval.trials
    )
    for other in others
  }


def report_agreement(agreements: Mapping[str, Mapping]) -> None:
  """A line for each pair of graders."""
  for pair, row in agreements.items():
    kappa, raw = row["kappa"], row["raw"]
    ends = f" [{row['low']:.2f}, {row['high']:.2f}]" if row["low"] is not None else ""
    shown = "-" if kappa is None else f"{kappa:.2f}{ends}"
    progress.say(
      f"eval: {pair}: kappa {shown}, raw agreement {progress.percent(raw).strip()} of "
      f"{row['n']} answers; {row['unscored']} unscored"
    )


def check_graded(run: Run, files: Mapping[str, list[dict]], limit: float) -> None:
  """ValueError where a grader other than the rules has no score for too many answers of
  a file; they are all on disk."""
  for grader in run.cfg.eval.grader:
    for name, rows in files.items():
      grades = [
        row["graders"][grader] for row in rows if grader in row.get("graders", {})
      ]
      missing = [grade["reason"] for grade in grades if grade["score"] is None]
      if len(missing) > limit * len(grades):
        raise ValueError(
          f"eval: the grader {grader} has no score for {len(missing)} of {len(grades)} "
          f"answers of arm {name}: {progress.top_reasons(missing)}; wanted at most "
          f"{limit:.0%} (config.eval.unscored). The same command asks again for these"
        )
