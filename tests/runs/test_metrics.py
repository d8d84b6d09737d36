"""Metrics: the file is the truth, and its mirrors show what it holds, each step once.

W&B and MLflow are the real ones, with no server: W&B's offline files are read with its
own records, MLflow's store with its client.
"""

import json
import math
import pathlib
import shutil
import sys

import jax
import pytest

from dalign.config import convert
from dalign.config import stages
from dalign.config.schema import Config
from dalign.config.schema import LogConfig
from dalign.runs import metrics as logs
from dalign.runs import store
from dalign.runs.metrics import Metrics
from tests.helpers import config_file
from tests.helpers import python
from tests.helpers import run_command
from tests.helpers import tiny

CONFIG = {"seed": 3, "rl.steps": 20, "eval.arms": ["base", "sft"], "model.random": {}}


@pytest.fixture
def alone(monkeypatch, tmp_path):
  """No account, no server, and nobody told of what the tests do."""
  for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
  monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
  yield
  if "wandb" in sys.modules:
    sys.modules["wandb"].teardown()


def to(*writers: str) -> LogConfig:
  return LogConfig(writers=writers, project="a project")


def wandb_runs(workdir: pathlib.Path) -> list[dict]:
  """What each offline file of W&B holds: its run, hyperparameters and steps."""
  import wandb
  from wandb.proto import wandb_internal_pb2

  wandb.teardown()  # a run that is finished may not be on the disk before
  found = []
  for path in sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb")):
    record, config, steps = None, {}, {}
    for raw in leveldb(path.read_bytes()):
      one = wandb_internal_pb2.Record.FromString(raw)
      kind = one.WhichOneof("record_type")
      if kind == "run":
        record = one.run
      if kind in ("run", "config"):
        updates = one.run.config.update if kind == "run" else one.config.update
        config |= {x.key: json.loads(x.value_json) for x in updates if x.key}
      if kind == "history":
        row = {(x.key or x.nested_key[0]): x.value_json for x in one.history.item}
        assert one.history.step.num not in steps
        steps[one.history.step.num] = {k: json.loads(v) for k, v in row.items()}
    found.append({"run": record, "config": config, "steps": steps})
  return found


def leveldb(content: bytes):
  """The records of a LevelDB log behind a header of seven bytes."""
  at, record = 7, b""
  while at + 7 < len(content):
    if (left := 32768 - at % 32768) < 7:  # no room for a header before the next block
      at += left
      continue
    size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
    record += content[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # a whole record, or the last part of one
      yield record
      record = b""


def mlflow_runs(workdir: pathlib.Path, name: str = "mlflow.db") -> list[dict]:
  """The runs of a store, deleted ones too, with their metrics' steps and values."""
  import mlflow

  client = mlflow.MlflowClient(f"sqlite:///{workdir / name}")
  [experiment] = client.search_experiments(filter_string="name = 'a project'")
  runs = client.search_runs(
    [experiment.experiment_id], run_view_type=mlflow.entities.ViewType.ALL
  )
  return [
    {
      "run": run,
      "points": {
        name: [
          (m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
      },
    }
    for run in runs
  ]


def events(workdir: pathlib.Path, stage: str):
  """What TensorBoard's files of a stage hold."""
  from tensorboardX.proto.event_pb2 import Event

  for path in sorted((workdir / "tensorboard" / stage).iterdir()):
    content = path.read_bytes()
    while content:
      size = int.from_bytes(content[:8], "little")
      yield Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]


def go(workdir, *writers: str, after: int, to_step: int, scale: float = 1.0) -> None:
  """One go of a stage: from the checkpoint of a step on, up to another step."""
  metrics = Metrics(workdir, to(*writers), CONFIG)
  metrics.rewind("sft", after)
  for step in range(after + 1, to_step + 1):
    metrics.write("sft", step, {"sft/loss_nats": scale * step})
  metrics.close()


def steps_in_file(workdir) -> list[int]:
  return [row["step"] for row in store.read_rows(workdir / "metrics.jsonl")]


def test_metrics_are_written_and_rewound(tmp_path):
  metrics = Metrics(tmp_path, to("tensorboard"))
  for step in (1, 2, 3):
    metrics.write("sft", step, {"sft/loss_nats": 1 / step})
    metrics.write("rl", step, {"rl/kl_nats": float("nan")})
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(b'{"time": 1')
  metrics.rewind("sft", 1)
  metrics.write("sft", 2, {"sft/loss_nats": 0.25})
  metrics.close()
  rows = store.read_rows(tmp_path / "metrics.jsonl")
  assert [(r["stage"], r["step"]) for r in rows] == [
    *(("sft", 1), ("rl", 1), ("rl", 2), ("rl", 3), ("sft", 2))
  ]
  assert rows[-1]["sft/loss_nats"] == 0.25 and rows[1]["rl/kl_nats"] is None
  assert {row["step"] for row in rows if row["time"] > 1e9} == {1, 2, 3}
  with pytest.raises(ValueError, match="may not be named"):
    metrics.write("sft", 3, {"step": 1})


def test_metrics_go_on_after_a_kill_without_a_rewind(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"time": 1, "stage": "sft", "step": 1}\n{"time": 2, "sta')
  metrics = Metrics(tmp_path, to())
  metrics.write("sft", 2, {})
  metrics.close()
  assert [row["step"] for row in store.read_rows(path)] == [1, 2]


def test_tensorboard_gets_the_points_and_the_cut(tmp_path):
  from tensorboardX.proto.event_pb2 import SessionLog

  metrics = Metrics(tmp_path, to("tensorboard"))
  metrics.write("sft", 5, {"sft/loss_nats": 0.5})
  metrics.rewind("sft", 3)
  metrics.write("sft", 4, {"sft/loss_nats": 0.25})
  metrics.write("rl", 4, {"rl/reward": 1.0})
  metrics.close()
  points = [
    (e.step, v.tag, v.simple_value)
    for e in events(tmp_path, "sft")
    for v in e.summary.value
    if v.tag.startswith("sft/")
  ]
  assert set(points) == {(5, "sft/loss_nats", 0.5), (4, "sft/loss_nats", 0.25)}
  starts = [
    e.step for e in events(tmp_path, "sft") if e.session_log.status == SessionLog.START
  ]
  assert starts == [4]
  assert not [
    e for e in events(tmp_path, "rl") if e.session_log.status == SessionLog.START
  ]


def test_neither_metrics_nor_prompts_import_tensorflow(tmp_path):
  """Holds with TensorFlow installed too: a stand-in ends who imports it."""
  stand_in = tmp_path / "site" / "tensorflow" / "__init__.py"
  stand_in.parent.mkdir(parents=True)
  stand_in.write_text("raise SystemExit('tensorflow was imported')")
  code = (
    f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    "import pathlib; from dalign.runs.metrics import Metrics\n"
    "from dalign.config.schema import LogConfig; from dalign.data import prompt_sets\n"
    f"assert prompt_sets.load('bundled', {{}}, {str(tmp_path)!r})\n"
    "prompt_sets.order(5, seed=0, epoch=0)\n"
    "log = LogConfig(writers=('tensorboard',), project='p')\n"
    f"metrics = Metrics(pathlib.Path({str(tmp_path)!r}), log)\n"
    "metrics.write('sft', 1, {'a': 1}); metrics.close()\n"
    "assert 'tensorboardX' in sys.modules and 'tensorflow' not in sys.modules"
  )
  done = python("-c", code)
  assert done.returncode == 0, done.stderr


def test_tensorboard_gets_the_config(tmp_path):
  metrics = Metrics(tmp_path, to("tensorboard"), CONFIG)
  metrics.write("sft", 1, {"sft/loss_nats": 0.5})
  metrics.close()
  values = {v.tag: v for e in events(tmp_path, "sft") for v in e.summary.value}
  assert values["sft/loss_nats"].simple_value == 0.5
  [text] = values["config/text_summary"].tensor.string_val
  assert json.loads(text) == CONFIG


def test_wandb_offline_has_a_run_a_stage_with_its_steps(tmp_path, alone):
  metrics = Metrics(tmp_path, to("wandb"), CONFIG)
  for step in (1, 2):
    metrics.write("sft", step, {"sft/loss_nats": step / 4, "sft/odd": math.inf})
    metrics.write("rl", step, {"rl/kl_nats": 0.5})
  metrics.close()
  found = {one["run"].job_type: one for one in wandb_runs(tmp_path)}
  assert set(found) == {"sft", "rl"}
  run = found["sft"]["run"]
  assert run.project == "a project"
  assert run.display_name == f"{tmp_path.parent.name}/{tmp_path.name}/sft"
  assert CONFIG.items() <= found["sft"]["config"].items()
  shown = {s: row["sft/loss_nats"] for s, row in found["sft"]["steps"].items()}
  assert shown == {1: 0.25, 2: 0.5}
  assert len({one["run"].run_id for one in found.values()}) == 2


def test_wandb_goes_on_with_the_run_of_a_stage_that_goes_on(tmp_path, alone):
  go(tmp_path, "wandb", after=-1, to_step=2)
  go(tmp_path, "wandb", after=2, to_step=4)
  first, second = wandb_runs(tmp_path)
  assert second["run"].run_id == first["run"].run_id
  assert [*first["steps"], *second["steps"]] == [0, 1, 2, 3, 4]
  go(tmp_path, "wandb", after=-1, to_step=1)  # done anew
  assert len({one["run"].run_id for one in wandb_runs(tmp_path)}) == 2


def test_a_server_that_is_away_costs_the_mirror_alone(
  tmp_path, alone, monkeypatch, capsys
):
  monkeypatch.setattr(logs, "PATIENCE_S", 2)
  monkeypatch.setenv("WANDB_MODE", "online")
  monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
  monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
  monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
  go(tmp_path, "wandb", "mlflow", "tensorboard", after=-1, to_step=2)
  said = capsys.readouterr().err
  for name in ("wandb", "mlflow"):
    assert said.count(f"{name} is left out from here") == 1
  assert steps_in_file(tmp_path) == [0, 1, 2]
  assert [e.step for e in events(tmp_path, "sft") if e.summary.value][-1] == 2


def test_mlflow_has_a_run_a_stage_with_its_steps(tmp_path, alone):
  metrics = Metrics(tmp_path, to("mlflow"), CONFIG | {"long": "x" * 7000})
  for step in (1, 2):
    metrics.write("sft", step, {"sft/loss_nats": step / 4, "sft/odd": math.nan})
    metrics.write("rl", step, {"rl/kl_nats": 0.5})
  metrics.close()
  found = {one["run"].data.tags["dalign.stage"]: one for one in mlflow_runs(tmp_path)}
  assert set(found) == {"sft", "rl"}
  run = found["sft"]["run"]
  assert run.info.status == "FINISHED" and run.info.run_name.endswith("/sft")
  params = dict(run.data.params)
  assert len(params.pop("long")) == 6000
  assert params == {
    "seed": "3",
    "rl.steps": "20",
    "eval.arms": '["base", "sft"]',
    "model.random": "{}",
  }
  points = found["sft"]["points"]
  assert points["sft/loss_nats"] == [(1, 0.25), (2, 0.5)]
  assert [step for step, _ in points["sft/odd"]] == [1, 2]


def test_mlflow_goes_on_with_the_run_of_a_stage_that_goes_on(tmp_path, alone):
  go(tmp_path, "mlflow", after=-1, to_step=2)
  go(tmp_path, "mlflow", after=2, to_step=4)
  [one] = mlflow_runs(tmp_path)
  assert one["points"]["sft/loss_nats"] == [(s, float(s)) for s in range(5)]
  assert one["run"].info.status == "FINISHED"
  go(tmp_path, "mlflow", after=-1, to_step=1)  # done anew
  other = [run for run in mlflow_runs(tmp_path) if run["run"].info != one["run"].info]
  assert [run["points"]["sft/loss_nats"] for run in other] == [[(0, 0.0), (1, 1.0)]]


def test_a_missing_package_is_one_line_that_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  Metrics(tmp_path, to("mlflow")).check_packages()
  with pytest.raises(ValueError, match=r"wandb wanted.*pip install -e '.\[loggers\]'"):
    Metrics(tmp_path, to("mlflow", "wandb")).check_packages()


def test_no_stage_depends_on_where_it_is_logged_or_profiled():
  world = config_file("world").get_config("distill").to_dict()
  cfg = convert.build(Config, world)
  kept = {
    key.partition(".")[0]
    for stage in stages.STAGES.values()
    for key in stages.manifest_config(stages.of(stage, cfg))
  }
  assert not {"log", "profile", "mesh", "sampler"} & kept and "rl" in kept


@pytest.mark.parametrize(
  "change",
  [
    {"log.writers": ("csv",)},
    {"log.writers": ("mlflow", "mlflow")},
    {"log.project": ""},
    {"profile.steps": (2,)},
    {"profile.steps": (0, 1)},
    {"profile.steps": (3, 2)},
  ],
)
def test_a_bad_log_or_profile_is_refused(change):
  with pytest.raises(ValueError, match="wanted"):
    tiny(**change)


@pytest.mark.slow
def test_a_stage_is_traced_and_logged_and_makes_the_same(
  workdir, tmp_path, alone, monkeypatch
):
  for stage in ("generate", "filter", "sft", "reward"):
    shutil.copytree(workdir / stage, tmp_path / "run" / stage)
  done = run_command(
    tmp_path / "run",
    "--config.stages=rl",
    "--config.profile.steps=(1,1)",
    "--config.log.project=a project",
    "--config.log.writers=('tensorboard','wandb','mlflow')",
  )
  assert done.returncode == 0, done.stderr[-3000:]
  for name in ("rollouts.jsonl", "params.sums.json"):
    made = (tmp_path / "run" / "rl" / name).read_bytes()
    assert made == (workdir / "rl" / name).read_bytes()
  rows = store.read_rows(tmp_path / "run" / "metrics.jsonl")
  shown = {row["step"]: row["rl/reward"] for row in rows}
  assert [*shown] == [1, 2]
  [run] = wandb_runs(tmp_path / "run")
  assert {s: row["rl/reward"] for s, row in run["steps"].items()} == shown
  assert run["config"]["rl.steps"] == 2
  [run] = mlflow_runs(tmp_path / "run")
  assert dict(run["points"]["rl/reward"]) == shown
  assert run["run"].data.params["rl.steps"] == "2"

  [trace] = (tmp_path / "run" / "profile" / "rl").rglob("*.xplane.pb")
  found = [
    event
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
    for line in plane.lines
    for event in line.events
  ]
  marks = [event for event in found if event.name == "rl"]
  assert [dict(mark.stats)["step_num"] for mark in marks] == [1]
  start, end = marks[0].start_ns, marks[0].start_ns + marks[0].duration_ns
  for program in ("update", "_chunk_fn"):  # of training, of sampling
    own = [e for e in found if e.name == f"PjitFunction({program})"]
    assert own and all(start <= e.start_ns < end for e in own)
