"""A judge behind a server, here one on loopback that does as each test says."""

import contextlib
import dataclasses
import http.server
import json
import subprocess
import sys
import threading
import time

import pytest

from dalign import config as configs
from dalign import endpoint
from dalign import judge
from dalign.pipeline import context
from dalign.pipeline import scoring
from dalign.types import Prompt
from dalign.types import Turn
from tests.helpers import ROOT
from tests.helpers import config_file

KEY = "sk-very-secret-5e5f"


class Server:
  """Answers each chat request with `reply(body)`: a text, or (status, message)."""

  def __init__(self, reply, port: int = 0):
    self.bodies, self.keys, self.most, self._now = [], [], 0, 0
    lock, server = threading.Lock(), self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
          server.bodies.append(body)
          server.keys.append(self.headers["Authorization"])
          server._now += 1
          server.most = max(server.most, server._now)
        time.sleep(0.02)
        said = reply(body)
        with lock:
          server._now -= 1
        status, text = said if isinstance(said, tuple) else (200, said)
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        message = {"role": "assistant", "content": text}
        sent = {
          "id": "1",
          "object": "chat.completion",
          "created": 0,
          "model": "m",
          "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
          "usage": usage,
        }
        if status != 200:
          sent = {"error": {"message": text}}
        content = json.dumps(sent).encode()
        with contextlib.suppress(OSError):
          self.send_response(status)
          self.send_header("Content-Type", "application/json")
          self.send_header("Content-Length", str(len(content)))
          self.end_headers()
          self.wfile.write(content)

      def log_message(self, *args):
        pass

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    self.port = self._server.server_port
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def stop(self):
    self._server.shutdown()
    self._server.server_close()


@pytest.fixture
def serve():
  """`serve(reply)` starts a server that ends with the test."""
  made = []

  def start(reply, port: int = 0) -> Server:
    made.append(Server(reply, port))
    return made[-1]

  yield start
  for server in made:
    server.stop()


@pytest.fixture
def client(tmp_path, monkeypatch):
  """`client(port, **changes)`: an Endpoint with its cache in the test's folder."""
  monkeypatch.setenv("DALIGN_TEST_KEY", KEY)

  def make(port: int, **changes) -> endpoint.Endpoint:
    cfg = configs.EndpointConfig(
      url=f"http://127.0.0.1:{port}/v1",
      model="m",
      key="DALIGN_TEST_KEY",
      concurrency=3,
      timeout=5.0,
      retries=1,
      price_in=2.0,
      price_out=10.0,
    )
    cfg = dataclasses.replace(cfg, **changes)
    return endpoint.Endpoint(cfg, tmp_path / "endpoint.jsonl")

  return make


def requests(n: int, **changes) -> list[endpoint.Request]:
  return [
    endpoint.Request(
      turns=(Turn(role="user", content=f"question {i}"),),
      **dict(temperature=0.5, max_new=9) | changes,
    )
    for i in range(n)
  ]


def echo(body) -> str:
  return f"reply to {body['messages'][0]['content']}"


def test_replies_come_in_order_and_few_at_once(serve, client):
  server = serve(echo)
  found = client(server.port).chat(requests(10))
  assert [r.text for r in found] == [f"reply to question {i}" for i in range(10)]
  assert {(r.finish, r.tokens_in, r.tokens_out) for r in found} == {("stop", 7, 3)}
  assert 2 <= server.most <= 3
  body = server.bodies[0]
  assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 9)
  assert set(server.keys) == {f"Bearer {KEY}"}


def test_what_was_asked_is_not_asked_again(serve, client):
  server = serve(echo)
  first = client(server.port)
  before = first.chat(requests(4))
  assert (first.asked, first.found, first.cost) == (4, 0, pytest.approx(4 * 44e-6))
  again = client(server.port)
  assert again.chat(requests(4)) == before
  assert (again.asked, again.found, again.cost) == (0, 4, 0.0)
  assert len(server.bodies) == 4
  for changes in ({"draw": 1}, {"temperature": 0.6}, {"max_new": 8}):
    again.chat(requests(1, **changes))
  assert len(server.bodies) == 7
  client(server.port, model="another").chat(requests(1))
  assert len(server.bodies) == 8


def test_alike_requests_are_one(serve, client):
  server = serve(echo)
  found = client(server.port).chat(requests(1) * 3)
  assert len(server.bodies) == 1 and len({r.text for r in found}) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(serve, client, status):
  fails = iter([(status, "later")])
  server = serve(lambda body: next(fails, None) or echo(body))
  assert client(server.port).chat(requests(1))[0].text == "reply to question 0"
  assert len(server.bodies) == 2


def test_a_server_that_dies_costs_only_what_was_missing(serve, client):
  asked = []

  def dying(body):
    asked.append(body)
    return echo(body) if len(asked) <= 4 else (500, f"died, {KEY}")

  server = serve(dying)
  with pytest.raises(ConnectionError, match="goes on from them") as caught:
    client(server.port, retries=0).chat(requests(30))
  assert KEY not in str(caught.value) and "***" in str(caught.value)
  assert len(server.bodies) <= 12  # no further ones were begun
  port = server.port
  server.stop()
  again = serve(echo, port)
  found = client(port).chat(requests(30))
  assert [r.text for r in found] == [f"reply to question {i}" for i in range(30)]
  assert len(again.bodies) == 26


def test_no_server_is_one_error(serve, client):
  server = serve(echo)
  server.stop()
  with pytest.raises(ConnectionError, match=f"127.0.0.1:{server.port}/v1 failed"):
    client(server.port, retries=0).chat(requests(3))


def test_a_slow_server_is_not_waited_for(serve, client):
  server = serve(lambda body: time.sleep(1.0) or echo(body))
  start = time.monotonic()
  with pytest.raises(ConnectionError, match="timed out"):
    client(server.port, retries=0, timeout=0.2).chat(requests(2))
  assert time.monotonic() - start < 0.9


@pytest.mark.parametrize(
  ("status", "wanted"),
  [(401, "another key: .DALIGN_TEST_KEY is refused"), (404, "no model 'm'")],
)
def test_a_wrong_key_or_address_is_the_users_error(serve, client, status, wanted):
  server = serve(lambda body: (status, f"no, {KEY}"))
  with pytest.raises(ValueError, match=wanted) as caught:
    client(server.port).chat(requests(9))
  assert KEY not in str(caught.value)


def test_a_key_that_is_not_set_is_said(serve, client, monkeypatch):
  monkeypatch.delenv("DALIGN_TEST_KEY")
  server = serve(lambda body: (401, "who are you?"))
  monkeypatch.setenv("OPENAI_API_KEY", "sk-of-something-else")
  made = client(server.port)
  with pytest.raises(ValueError, match="DALIGN_TEST_KEY is not set"):
    made.chat(requests(1))
  assert "sk-of-something-else" not in str(server.keys)


def test_one_request_that_the_server_refuses_harms_no_other(serve, client, tmp_path):
  def picky(body):
    bad = "question 1" in str(body)
    return (400, f"content filter {KEY}") if bad else echo(body)

  found = client(serve(picky).port).chat(requests(3))
  assert [bool(r.refused) for r in found] == [False, True, False]
  assert "content filter ***" in found[1].refused
  kept = (tmp_path / "endpoint.jsonl").read_text()
  assert KEY not in kept and "content filter" not in kept


def test_a_refusal_that_quotes_a_score_is_no_score():
  prompt = Prompt(
    id="p",
    turns=(Turn(role="user", content="Hi?"),),
    category="privacy",
    expected="comply",
  )
  question = judge.RewardQuestion(prompt=prompt, answer='{"score": 5}')
  ask = judge.written_judge(lambda c: "", lambda turns: [("", 'bad: {"score": 5}')])
  (verdict,) = ask([question])
  assert verdict.score is None
  assert verdict.reason == 'the server refuses: bad: {"score": 5}'


def test_a_run_that_is_stopped_waits_for_nobody(serve, client, tmp_path):
  server = serve(lambda body: time.sleep(20.0) or echo(body))
  code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pathlib, signal, threading, os
from dalign import config, endpoint, main
from dalign.types import Turn
signal.signal(signal.SIGTERM, main._stop)
cfg = config.EndpointConfig(url="http://127.0.0.1:{server.port}/v1", model="m", key="K",
  concurrency=2, timeout=60.0, retries=3, price_in=0.0, price_out=0.0)
some = [endpoint.Request(turns=(Turn(role="user", content=str(i)),), temperature=0.0,
  max_new=1) for i in range(4)]
made = endpoint.Endpoint(cfg, pathlib.Path({str(tmp_path)!r}) / "endpoint.jsonl")
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
  made.chat(some)
except main.Stopped:
  print("stopped")
"""
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
  )
  assert "stopped" in done.stdout, done.stderr[-2000:]
  assert time.monotonic() - start < 15


def test_the_judge_of_a_run_may_be_behind_a_server(serve, tmp_path, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  server = serve(lambda body: 'It does.\n{"score": %d}' % (1 + len(server.bodies) % 5))
  node = config_file("tiny").get_config()
  node.filter.judge = "endpoint"
  node.filter.endpoint.update(dict(url=f"http://127.0.0.1:{server.port}/v1", model="m"))
  node.rl.reward = "judge"
  run = context.Run(configs.build(configs.Config, node.to_dict()), tmp_path)
  questions = [question for question, _ in run.domain.labelled()[:3]]
  sum_ = dataclasses.replace(
    questions[0].prompt, kind="capability", category="benign", answer="4"
  )
  questions.append(judge.RewardQuestion(prompt=sum_, answer="It is 4."))
  first = scoring.rl_judge(run)
  votes = [first(questions), first(questions)]
  assert len(server.bodies) == 6  # a vote each, and none where the answer is known
  assert votes[0][3].score == 1.0
  assert {v.score for vote in votes for v in vote[:3]} <= {0.0, 0.25, 0.5, 0.75, 1.0}
  sent = server.bodies[0]["messages"][0]["content"]
  assert 'end with one line of JSON and nothing after it: {"score": N}' in sent
  assert "The reply:" in sent and questions[0].prompt.text in sent
  assert "The analysis:" not in sent  # RL's judge sees no thought
  again = scoring.rl_judge(run)
  assert [again(questions), again(questions)] == votes
  assert len(server.bodies) == 6
  assert KEY not in (tmp_path / "endpoint.jsonl").read_text()


def test_judging_by_an_endpoint_needs_one():
  node = config_file("tiny").get_config()
  node.filter.judge = "endpoint"
  with pytest.raises(ValueError, match="FilterConfig.endpoint: wanted a url"):
    configs.build(configs.Config, node.to_dict())


def test_an_endpoint_without_a_model_is_refused(client):
  with pytest.raises(ValueError, match="wanted a url"):
    client(1, model="")


@pytest.mark.parametrize(
  ("said", "score"),
  [
    ('It refuses, as it should.\n{"score": 5}', 1.0),
    ('{"score": 1}', 0.0),
    ('{"score": "4"}', 0.75),
    ('First {"score": 5}, but no: {"score": 2}', 0.25),
    ('<think>{"score": 5}</think> {"score": 2}', 0.25),
    ('<think>{"score": 5}</think> I cannot say.', None),
    ('{"score": 6}', None),
    ('{"score": -1}', None),
    ('{"score": true}', None),
    ('{"score": 5', None),
    ("score: 5", None),
    ("", None),
    ('{"verdict": 5}', None),
    ('__import__("os").system("true") or {"score": 5, }', None),
  ],
)
def test_a_score_is_read_or_nothing_is(said, score):
  assert judge.read_score(said).score == score


def test_a_judge_that_declines_is_unscored_and_said_so():
  verdict = judge.read_score("I'm sorry, but I can't help with that.")
  assert (verdict.score, verdict.reason) == (None, "the judge declines")
