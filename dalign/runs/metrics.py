"""The metrics of a run: a file, and mirrors of it for TensorBoard, W&B and MLflow.

metrics.jsonl is the truth. A mirror has a run of its own for each stage, and each time
one is opened it is compared with the file: rows that it lacks are sent, and where it
has steps that a rewind has dropped, it is made anew. So a mirror that fails is left out
with a line, and nothing is lost.

Does not know what the numbers mean.
"""

from collections.abc import Callable, Mapping
import dataclasses
import glob
from importlib import util
import json
import math
import pathlib
import shutil
import sys
import time
from typing import Any, BinaryIO, Protocol
import uuid

import tqdm

from dalign.config import schema as configs
from dalign.runs import buckets
from dalign.runs import distributed
from dalign.runs import store

PATIENCE_S = 60  # for W&B's server to answer, or to take the last rows
_OWN = ("time", "stage", "step")  # what a row has besides its metrics


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a mirror shows: a stage of a run.

  config: the whole run's, flat: its hyperparameters.
  rows: what metrics.jsonl has of the stage so far.
  cut: the first step that a rewind may have dropped, or None where none was.
  """

  workdir: pathlib.Path
  name: str
  project: str
  config: Mapping[str, Any]
  rows: list[dict]
  cut: int | None

  @property
  def run(self) -> str:
    """The end of the workdir, by which a reader knows the run."""
    return "/".join(self.workdir.parts[-2:])

  def id(self, service: str) -> str | None:
    """The id that this stage has with a service, where it has one."""
    return self._ids().get(service, {}).get(self.name)

  def keep(self, service: str, id: str) -> None:
    """Keeps that id."""
    ids = self._ids()
    ids[service] = ids.get(service, {}) | {self.name: id}
    store.write_json(self._path, ids)

  @property
  def _path(self) -> pathlib.Path:
    return self.workdir / "mirrors.json"

  def _ids(self) -> dict:
    found = store.read_json(self._path) if self._path.exists() else {}
    if not isinstance(found, dict) or not all(
      isinstance(x, dict) for x in found.values()
    ):
      raise ValueError(
        f"{self._path}: wanted ids by service and stage, got {found!r:.80}"
      )
    return found


class Mirror(Protocol):
  """Shows the rows of a stage; made of a Stage, when its first row is written."""

  def write(self, row: Mapping[str, Any]) -> None:
    """A row as metrics.jsonl has it; what was not finite is NaN."""

  def close(self) -> None:
    """Has all that was written where it belongs."""


class TensorBoard:
  """Event files in WORKDIR/tensorboard/STAGE; a later step hides what a rewind dropped.

  A folder is a run of TensorBoard: only so can the points after a resumed step be
  hidden without those of the other stages.
  """

  package = "tensorboardX"

  def __init__(self, stage: Stage):
    import tensorboardX

    self._hyperparameters: Mapping[str, Any] | None = stage.config
    self._writer = tensorboardX.SummaryWriter(
      str(buckets.twin(stage.workdir / "tensorboard" / stage.name)),
      purge_step=stage.cut,
      flush_secs=10,
      filename_suffix=f".{time.time_ns()}",  # else one second is one file
    )

  def write(self, row: Mapping[str, Any]) -> None:
    values = _values(row)
    if self._hyperparameters:
      from tensorboardX import summary

      some = {k: _text(v) for k, v in self._hyperparameters.items()}
      for part in summary.hparams(some, dict.fromkeys(values, 0.0)):
        self._writer.file_writer.add_summary(part)
      self._hyperparameters = None
    for name, value in values.items():
      self._writer.add_scalar(name, value, row["step"], row["time"])

  def close(self) -> None:
    self._writer.close()


class WandB:
  """A run of Weights & Biases in WORKDIR/wandb, and on its server unless that is not
  to be reached, or WANDB_MODE=offline: `wandb sync` sends such runs later.

  An offline run cannot be resumed, so each has all rows and takes the place of the
  last.
  """

  package = "wandb"

  def __init__(self, stage: Stage):
    import wandb

    self._stage, self._wandb = stage, wandb
    self._run = self._start(stage.id("wandb"))
    last = stage.rows[-1]["step"] if stage.rows else -1
    if self._run.resumed and self._run.starting_step > last + 1:
      gone = f"{self._run.entity}/{self._run.project}/{self._run.id}"
      self._run.finish()
      wandb.Api(timeout=PATIENCE_S).run(gone).delete()
      self._run = self._start(None)
    if not self._run.offline:
      _say(f"{stage.name}: {self._run.url}")
    for row in stage.rows:
      if row["step"] >= self._run.starting_step:
        self.write(row)

  def _start(self, id: str | None):
    offline = self._wandb.setup().settings.mode in ("offline", "dryrun")
    stage, id = self._stage, id or uuid.uuid4().hex[:16]
    stage.keep("wandb", id)
    if not offline:
      try:
        return self._init(id, resume="allow")
      except self._wandb.Error as error:
        _say(f"W&B: {_one_line(error)}; its run is kept here, for `wandb sync`")
        self._wandb.teardown()  # which else holds the id
    pattern = f"offline-run-*-{glob.escape(id)}"
    for old in (buckets.twin(stage.workdir) / "wandb").glob(pattern):
      shutil.rmtree(old)
    return self._init(id, mode="offline")

  def _init(self, id: str, **more):
    stage = self._stage
    return self._wandb.init(
      project=stage.project,
      group=stage.run,
      name=f"{stage.run}/{stage.name}",
      job_type=stage.name,
      id=id,
      config=dict(stage.config),
      dir=buckets.twin(stage.workdir),
      reinit="create_new",  # whatever else this process has
      settings=self._wandb.Settings(
        console="off",
        silent=True,
        init_timeout=PATIENCE_S,
        finish_timeout=PATIENCE_S,
      ),
      **more,
    )

  def write(self, row: Mapping[str, Any]) -> None:
    self._run.log(_values(row) | {"_timestamp": row["time"]}, step=row["step"])

  def close(self) -> None:
    self._run.finish()


class MLflow:
  """A run of MLflow, on the server or in the store that MLFLOW_TRACKING_URI names, or
  in WORKDIR/mlflow.db.

  MLflow can take no metric back: a run with steps that were dropped is deleted, and
  another has its rows.
  """

  package = "mlflow"

  def __init__(self, stage: Stage):
    import mlflow

    self._entities = mlflow.entities
    given = mlflow.is_tracking_uri_set()
    self._client = mlflow.MlflowClient(
      mlflow.get_tracking_uri()
      if given
      else f"sqlite:///{buckets.twin(stage.workdir / 'mlflow.db')}"
    )
    known, sent = self._find(stage)
    self._id = self._create(stage) if known is None else known
    for row in stage.rows:
      if row["step"] not in sent:
        self.write(row)

  def _find(self, stage: Stage) -> tuple[str | None, set[int]]:
    """The run of an earlier go, and the steps that it has; where it has others than
    the file, it goes."""
    import mlflow

    id = stage.id("mlflow")
    if id is None:
      return None, set()
    try:
      run = self._client.get_run(id)
    except mlflow.MlflowException as error:
      if error.error_code != "RESOURCE_DOES_NOT_EXIST":
        raise
      return None, set()
    if run.info.lifecycle_stage != "active":
      return None, set()
    sent = {
      point.step
      for name in run.data.metrics
      for point in self._client.get_metric_history(id, name)
    }
    if sent - {row["step"] for row in stage.rows}:
      self._client.delete_run(id)
      return None, set()
    self._client.update_run(id, status="RUNNING")
    return id, sent

  def _create(self, stage: Stage) -> str:
    id = self._client.create_run(
      self._experiment(stage.project),
      run_name=f"{stage.run}/{stage.name}",
      tags={"dalign.run": stage.run, "dalign.stage": stage.name},
    ).info.run_id
    stage.keep("mlflow", id)
    params = [
      self._entities.Param(name, str(_text(value))[:6000])
      for name, value in stage.config.items()
    ]
    for at in range(0, len(params), 100):  # as many as MLflow takes at once
      self._client.log_batch(id, params=params[at : at + 100])
    return id

  def _experiment(self, name: str) -> str:
    import mlflow

    found: Any = self._client.get_experiment_by_name(name)
    if found is None:
      try:
        return self._client.create_experiment(name)
      except mlflow.MlflowException:  # another run was faster
        found = self._client.get_experiment_by_name(name)
    return found.experiment_id

  def write(self, row: Mapping[str, Any]) -> None:
    at = round(row["time"] * 1000)
    points = [
      self._entities.Metric(name, value, at, row["step"])
      for name, value in _values(row).items()
    ]
    self._client.log_batch(self._id, points)

  def close(self) -> None:
    self._client.set_terminated(self._id)


MIRRORS: Mapping[str, Any] = {  # what makes a Mirror of a Stage
  "tensorboard": TensorBoard,
  "wandb": WandB,
  "mlflow": MLflow,
}


class Metrics:
  """One line per write in WORKDIR/metrics.jsonl, shown in the mirrors that the config
  names. Of several processes the first writes."""

  def __init__(
    self,
    workdir: pathlib.Path,
    log: configs.LogConfig,
    config: Mapping[str, Any] | None = None,
  ):
    self._workdir = buckets.absolute(workdir)
    self._path = self._workdir / "metrics.jsonl"
    self._log, self._config = log, config or {}
    self._mirrors: dict[str, dict[str, Mirror]] = {}  # by stage, by name
    self._lost: set[str] = set()
    self._cut: dict[str, int] = {}
    self._file: BinaryIO | None = None

  def ready(self) -> None:
    """ValueError where a mirror's package is missing."""
    missing = [n for n in self._log.writers if not util.find_spec(MIRRORS[n].package)]
    if missing := distributed.agree(missing):
      raise ValueError(
        f"config.log.writers: {', '.join(missing)} wanted, and not installed: pip "
        "install -e '.[loggers]', or leave it out"
      )

  def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
    """Adds {"time": Unix seconds, "stage", "step", **values}; not finite is null."""
    if not distributed.first():
      return
    row: dict[str, Any] = {"time": round(time.time(), 3), "stage": stage}
    row["step"] = int(step)
    values = {name: float(value) for name, value in values.items()}
    if taken := row.keys() & values.keys():
      raise ValueError(f"a metric may not be named {sorted(taken)}")
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    if self._file is None:
      own = buckets.twin(self._path)
      own.parent.mkdir(parents=True, exist_ok=True)
      store.mend(own)
      self._file = own.open("ab")
    self._file.write(store.line(row | finite))
    self._file.flush()
    if stage not in self._mirrors:
      self._mirrors[stage] = self._open(stage, row["step"])
    for name, mirror in self._mirrors[stage].items():
      self._try(name, mirror.write, row | values)
    buckets.flush(due=True)

  def rewind(self, stage: str, step: int) -> None:
    """Drops what a stage wrote after `step`, as if it had stopped there."""
    self.close()
    self._cut[stage] = step + 1
    if not distributed.first() or not buckets.exists(self._path):
      return
    rows = store.read_rows(self._path)
    for number, row in enumerate(rows, 1):
      own = isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
      try:
        store.line(row)
      except ValueError:  # of what is not finite
        own = False
      if not own:
        raise ValueError(
          f"{self._path}:{number}: wanted a stage, a step and finite numbers, got "
          f"{row!r:.80}"
        )
    kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
    if len(kept) < len(rows):
      store.write_rows(self._path, kept)

  def close(self) -> None:
    """Writes out what is pending; a later `write` opens all again."""
    for mirrors in self._mirrors.values():
      for name, mirror in mirrors.items():
        self._try(name, mirror.close)
    self._mirrors.clear()
    if self._file is not None:
      self._file.close()
      self._file = None

  def _open(self, stage: str, step: int) -> dict[str, Mirror]:
    rows = [row for row in store.read_rows(self._path) if row.get("stage") == stage]
    of = Stage(
      workdir=self._workdir,
      name=stage,
      project=self._log.project,
      config=self._config,
      rows=[row for row in rows if row["step"] < step],
      cut=self._cut.pop(stage, None),
    )
    found = {name: self._try(name, MIRRORS[name], of) for name in self._log.writers}
    return {name: mirror for name, mirror in found.items() if mirror is not None}

  def _try(self, name: str, do: Callable, *args):
    """What a mirror does, or None where it failed, now or before."""
    if name in self._lost:
      return None
    try:
      return do(*args)
    except Exception as error:  # of libraries and servers, which may raise anything
      self._lost.add(name)
      _say(
        f"metrics: {name} is left out from here ({_one_line(error)}); {self._path} has "
        "all, and the next go sends what is missing of a stage that goes on"
      )
      return None


def _values(row: Mapping[str, Any]) -> dict[str, float]:
  """The metrics of a row; what was not finite is NaN."""
  values = {name: value for name, value in row.items() if name not in _OWN}
  return {name: math.nan if x is None else x for name, x in values.items()}


def _text(value) -> bool | int | float | str:
  """A value of the config as a hyperparameter: what has parts is JSON."""
  plain = isinstance(value, (bool, int, float, str))
  return value if plain else json.dumps(value)


def _one_line(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _say(line: str) -> None:
  tqdm.tqdm.write(f"dalign: {line}", file=sys.stderr)
