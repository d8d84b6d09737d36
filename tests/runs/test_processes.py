"""Two processes of four devices are one run: its numbers, one writer, no hanging."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests.helpers import ROOT
from tests.helpers import jsonl

SMALL = (
  "--config.stages=generate,filter,sft,rl,export",
  "--config.generate.prompts.refuse=2",
  "--config.generate.prompts.safe_complete=0",
  "--config.generate.prompts.comply=2",
  "--config.generate.helpful=0",
  "--config.generate.capability=0",
  "--config.generate.most=1",
  "--config.generate.batch=1",
  "--config.generate.enough=1",
  "--config.generate.max_new=8",
  "--config.sft.capability=0",
  "--config.sft.checkpoint_every=1",
  "--config.rl.reward=rubric",
  "--config.rl.metadata=told",
  "--config.rl.prompts=4",
  "--config.rl.samples=2",
  "--config.rl.max_new=8",
  "--config.export.of=rl",
)
MESH = ("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
TO_SFT = ("--config.stages=generate,filter,sft",)
OTHER_MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")


def start(workdir, *args, count=1, devices=8, own=lambda i: ()) -> list:
  """So many processes of one run, whose output goes to WORKDIR.i.log."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  base = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "DALIGN_HEARTBEAT_SECONDS": "10",
  }
  if count > 1:
    base |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    base |= {"JAX_NUM_PROCESSES": str(count)}
  made = []
  config = f"--config={ROOT / 'configs' / 'tiny.py'}"
  for i in range(count):
    command = [sys.executable, "-m", "dalign.main", config, f"--workdir={workdir}"]
    with log(workdir, i).open("w") as file:
      made.append(
        subprocess.Popen(
          [*command, *SMALL, *args, *own(i)],
          cwd=ROOT,
          env=base | {"JAX_PROCESS_ID": str(i)},
          stdout=file,
          stderr=subprocess.STDOUT,
        )
      )
  return made


def log(workdir, i: int) -> pathlib.Path:
  return workdir.with_name(f"{workdir.name}.{i}.log")


def end(processes, within: float) -> list[int]:
  """The exit codes; those that have not ended in time are killed."""
  deadline = time.monotonic() + within
  try:
    return [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
  finally:
    for process in processes:
      process.kill()


def metrics(workdir) -> dict:
  """(stage, step) -> its numbers, but for times; every step is there once."""
  found = {}
  for row in jsonl(workdir / "metrics.jsonl"):
    key = row.pop("stage"), row.pop("step")
    assert key not in found, f"{key} was written twice"
    found[key] = {k: v for k, v in row.items() if k != "time" and "step_s" not in k}
  return found


def tokens(workdir, name: str) -> list:
  rows = jsonl(workdir / name)
  return sorted([str(r["prompt_id"]), r.get("tokens") or r["answer"]] for r in rows)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
  """The run of one process with eight devices."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  assert end(start(workdir, *MESH), 500) == [0], log(workdir, 0).read_text()
  return workdir


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(alone, tmp_path):
  both = tmp_path / "run"
  codes = end(start(both, *MESH, count=2, devices=4), 500)
  assert codes == [0, 0], log(both, 0).read_text() + log(both, 1).read_text()
  assert "dalign:" not in log(both, 1).read_text()  # one of them speaks
  same_numbers(both, alone, ("sft", "rl"))
  for name in ("generate/samples.jsonl", "rl/rollouts.jsonl"):
    assert tokens(both, name) == tokens(alone, name)
  drafts = [path for path in both.rglob("*") if path.name.endswith((".tmp", ".part"))]
  assert not drafts
  one, two = (
    safetensors_numpy.load_file(place / "export" / "model" / "model.safetensors")
    for place in (alone, both)
  )
  assert one.keys() == two.keys()
  for name, x in one.items():
    np.testing.assert_allclose(two[name], x, atol=1e-6)


def same_numbers(one, other, stages) -> None:
  one, other = (
    {key: x for key, x in metrics(workdir).items() if key[0] in stages}
    for workdir in (one, other)
  )
  assert {stage for stage, _ in one} == set(stages)
  assert one.keys() == other.keys()
  for key, values in one.items():
    assert values.keys() == other[key].keys()
    for name, value in values.items():
      np.testing.assert_allclose(value, other[key][name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_one_that_dies_ends_the_other_and_another_mesh_goes_on(alone, tmp_path):
  workdir = tmp_path / "run"
  for stage in ("generate", "filter"):
    shutil.copytree(alone / stage, workdir / stage)
  processes = start(workdir, *MESH, *TO_SFT, count=2, devices=4)
  saved = workdir / "sft" / "checkpoints"
  deadline = time.monotonic() + 300
  while not any(saved.glob("[0-9]*")) and time.monotonic() < deadline:
    assert all(p.poll() is None for p in processes), log(workdir, 0).read_text()
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  first, _ = end(processes, 120)
  assert first != 0
  assert time.monotonic() - killed < 60
  assert "another" in log(workdir, 0).read_text()  # JAX's own words, or ours
  assert not (workdir / "sft" / "params").exists()

  assert end(start(workdir, *OTHER_MESH, *TO_SFT, devices=4), 500) == [0]
  assert "sft: goes on where it stopped" in log(workdir, 0).read_text()
  same_numbers(workdir, alone, ("sft",))


def test_bad_input_ends_all_processes_with_2(tmp_path):
  workdir = tmp_path / "run"
  codes = end(start(workdir, "--config.spec.dir=nowhere", count=2, devices=1), 60)
  assert codes == [2, 2]
  for i in range(2):
    assert "nowhere" in log(workdir, i).read_text()


def test_processes_with_unlike_configs_stop(tmp_path):
  workdir = tmp_path / "run"
  seed = lambda i: (f"--config.seed={i}",)  # noqa: E731
  first, second = end(start(workdir, count=2, devices=1, own=seed), 60)
  assert first != 0 and second == 2
  assert "another config than the first" in log(workdir, 1).read_text()


def test_what_processes_want_is_said(tmp_path):
  """A run of several that nobody can find, and a number that is none."""
  for name, value, said in (
    ("JAX_NUM_PROCESSES", "two", "JAX_NUM_PROCESSES: wanted a whole number, got 'two'"),
    ("JAX_OTHER", "", "Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
  ):
    workdir = tmp_path / name
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv(name, value)
      assert end(start(workdir, "--distributed"), 60) == [2]
    assert said in log(workdir, 0).read_text()
