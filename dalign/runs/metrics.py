"""The metrics of a run: a file, and mirrors of it for TensorBoard, W&B and MLflow.

metrics.jsonl is the truth. A mirror has a run of its own for each stage, which goes on
where the stage does, and is given each row once: rows that were written while it failed
stay away from it, and steps that are done again after a kill are dropped by W&B and
shown twice by MLflow, as they are the same.

Does not know what the numbers mean.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
from importlib import util
import json
import math
import pathlib
import sys
import time
from typing import Any, BinaryIO, Protocol

import tqdm

from dalign.config.schema import LogConfig
from dalign.runs import buckets
from dalign.runs import distributed
from dalign.runs import store

PATIENCE_S = 60  # for W&B's server to answer, or to take the last rows
_OWN = ("time", "stage", "step")  # what a row has besides its metrics


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a mirror shows: a stage of a run.

  began: time of the stage's first row, which is another where it is done anew.
  config: the whole run's, flat: its hyperparameters.
  cut: the first step that a rewind may have dropped, or None where none was.
  """

  workdir: pathlib.Path
  name: str
  began: float
  project: str
  config: Mapping[str, Any]
  cut: int | None

  @property
  def run(self) -> str:
    """The end of the workdir, by which a reader knows the run."""
    return "/".join(self.workdir.parts[-2:])

  @property
  def id(self) -> str:
    """What the mirrors know the stage by, each time it goes on."""
    said = f"{self.run} {self.name} {self.began}"
    return hashlib.sha256(said.encode()).hexdigest()[:16]


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

    self._writer = tensorboardX.SummaryWriter(
      str(buckets.staging_path(stage.workdir / "tensorboard" / stage.name)),
      purge_step=stage.cut,
      flush_secs=10,
      filename_suffix=f".{time.time_ns()}",  # else one second is one file
    )
    self._writer.add_text("config", json.dumps(dict(stage.config), indent=2))

  def write(self, row: Mapping[str, Any]) -> None:
    for name, value in _values(row).items():
      self._writer.add_scalar(name, value, row["step"], row["time"])

  def close(self) -> None:
    self._writer.close()


class WandB:
  """A run of Weights & Biases in WORKDIR/wandb, and on its server unless
  WANDB_MODE=offline: `wandb sync` sends such runs later."""

  package = "wandb"

  def __init__(self, stage: Stage):
    import wandb

    self._run = wandb.init(
      project=stage.project,
      group=stage.run,
      name=f"{stage.run}/{stage.name}",
      job_type=stage.name,
      id=stage.id,
      resume="allow",
      config=dict(stage.config),
      dir=buckets.staging_path(stage.workdir),
      reinit="create_new",  # whatever else this process has
      settings=wandb.Settings(
        console="off",
        silent=True,
        init_timeout=PATIENCE_S,
        finish_timeout=PATIENCE_S,
      ),
    )

  def write(self, row: Mapping[str, Any]) -> None:
    self._run.log(_values(row) | {"_timestamp": row["time"]}, step=row["step"])

  def close(self) -> None:
    self._run.finish()


class MLflow:
  """A run of MLflow, on the server or in the store that MLFLOW_TRACKING_URI names, or
  in WORKDIR/mlflow.db."""

  package = "mlflow"

  def __init__(self, stage: Stage):
    import mlflow

    uri = f"sqlite:///{buckets.staging_path(stage.workdir / 'mlflow.db')}"
    if mlflow.is_tracking_uri_set():
      uri = mlflow.get_tracking_uri()
    self._mlflow, self._client = mlflow, mlflow.MlflowClient(uri)
    experiment = self._client.get_experiment_by_name(stage.project)
    where = experiment and experiment.experiment_id
    where = where or self._client.create_experiment(stage.project)
    same = f"tags.`dalign.id` = '{stage.id}'"
    if found := self._client.search_runs([where], same):
      self._id = found[0].info.run_id
      self._client.update_run(self._id, status="RUNNING")
      return
    tags = {"dalign.id": stage.id, "dalign.run": stage.run, "dalign.stage": stage.name}
    run = self._client.create_run(
      where, run_name=f"{stage.run}/{stage.name}", tags=tags
    )
    self._id = run.info.run_id
    params = [
      mlflow.entities.Param(name, _text(value)[:6000])
      for name, value in stage.config.items()
    ]
    for at in range(0, len(params), 100):  # as many as MLflow takes at once
      self._client.log_batch(self._id, params=params[at : at + 100])

  def write(self, row: Mapping[str, Any]) -> None:
    at, metric = round(row["time"] * 1000), self._mlflow.entities.Metric
    points = [metric(k, x, at, row["step"]) for k, x in _values(row).items()]
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
    log: LogConfig,
    config: Mapping[str, Any] | None = None,
  ):
    self._workdir = buckets.absolute(workdir)
    self._path = self._workdir / "metrics.jsonl"
    self._log, self._config = log, config or {}
    self._mirrors: dict[str, dict[str, Mirror]] = {}  # by stage, by name
    self._lost: set[str] = set()
    self._cut: dict[str, int] = {}
    self._file: BinaryIO | None = None

  def check_packages(self) -> None:
    """ValueError where a mirror's package is missing."""
    missing = [n for n in self._log.writers if not util.find_spec(MIRRORS[n].package)]
    if missing := distributed.broadcast(missing):
      raise ValueError(
        f"config.log.writers: {', '.join(missing)} wanted, and not installed: pip "
        "install -e '.[loggers]', or leave it out"
      )

  def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
    """Adds {"time": Unix seconds, "stage", "step", **values}; not finite is null."""
    if not distributed.is_first_process():
      return
    row: dict[str, Any] = {"time": round(time.time(), 3), "stage": stage}
    row["step"] = int(step)
    values = {name: float(value) for name, value in values.items()}
    if taken := row.keys() & values.keys():
      raise ValueError(f"a metric may not be named {sorted(taken)}")
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    if self._file is None:
      own = buckets.staging_path(self._path)
      own.parent.mkdir(parents=True, exist_ok=True)
      store.repair_last_line(own)
      self._file = own.open("ab")
    self._file.write(store.encode_row(row | finite))
    self._file.flush()
    if stage not in self._mirrors:
      self._mirrors[stage] = self._open(stage)
    for name, mirror in self._mirrors[stage].items():
      self._try(name, mirror.write, row | values)
    buckets.flush(due=True)

  def rewind(self, stage: str, step: int) -> None:
    """Drops what a stage wrote after `step`, as if it had stopped there."""
    self.close()
    self._cut[stage] = step + 1
    if not distributed.is_first_process() or not buckets.exists(self._path):
      return
    rows = store.read_rows(self._path)
    for number, row in enumerate(rows, 1):
      own = isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
      try:
        store.encode_row(row)
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

  def _open(self, stage: str) -> dict[str, Mirror]:
    rows = store.read_rows(self._path)
    began = next(row["time"] for row in rows if row.get("stage") == stage)
    of = Stage(
      workdir=self._workdir,
      name=stage,
      began=began,
      project=self._log.project,
      config=self._config,
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
        "all"
      )
      return None


def _values(row: Mapping[str, Any]) -> dict[str, float]:
  """The metrics of a row; what was not finite is NaN."""
  values = {name: value for name, value in row.items() if name not in _OWN}
  return {name: math.nan if x is None else x for name, x in values.items()}


def _text(value) -> str:
  """A value of the config as a hyperparameter: what has parts is JSON."""
  plain = isinstance(value, (bool, int, float, str))
  return str(value) if plain else json.dumps(value)


def _one_line(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _say(line: str) -> None:
  tqdm.tqdm.write(f"dalign: {line}", file=sys.stderr)
