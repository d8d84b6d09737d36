"""A judge, teacher or arm behind a server, here one that does as each test says."""

import contextlib
import dataclasses
import http.server
import json
import subprocess
import sys
import threading
import time

import pytest

from dalign import stages
from dalign.config.replies import EndpointConfig
from dalign.config.schema import Config
from dalign.judges import asking
from dalign.judges import endpoint
from dalign.judges import forms
from dalign.judges import judge
from dalign.policy import prompting
from dalign.stages import judging
from dalign.stages import servers
from dalign.text import thinking
from dalign.types import Turn
from tests.helpers import ROOT
from tests.helpers import jsonl
from tests.helpers import opened
from tests.helpers import prompt
from tests.helpers import tiny

KEY = "sk-very-secret-5e5f"
OPEN = '<think>\nThe user asks: "{prompt}"'


class Server:
  """Answers each chat request with `reply(body)`: a text, a message's fields and
  perhaps its finish_reason, (status, message), or the bytes of a page."""

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
        page = isinstance(text, bytes)
        fields = dict(text) if isinstance(text, dict) else {"content": str(text)}
        finish = fields.pop("finish_reason", "stop")
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        usage = None if fields.pop("uncounted", False) else usage
        message = {"role": "assistant"} | fields
        sent = {
          "id": "1",
          "object": "chat.completion",
          "created": 0,
          "model": "m",
          "choices": [{"index": 0, "finish_reason": finish, "message": message}],
          "usage": usage,
        }
        if status != 200:
          sent = {"error": {"message": text}}
        content = text if page else json.dumps(sent).encode()
        with contextlib.suppress(OSError):
          self.send_response(status)
          self.send_header("Content-Type", "text/html" if page else "application/json")
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
    own = dict(url=f"http://127.0.0.1:{port}/v1", model="m", key="DALIGN_TEST_KEY")
    own |= dict(concurrency=3, timeout=5.0, retries=1, price_in=2.0, price_out=10.0)
    cfg = EndpointConfig(**own | changes)
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
  found = client(server.port).chat(requests(10) + requests(1))  # alike, it is one
  assert [r.text for r in found[:10]] == [f"reply to question {i}" for i in range(10)]
  assert {(r.finish, r.tokens_in, r.tokens_out) for r in found} == {("stop", 7, 3)}
  assert 2 <= server.most <= 3 and len(server.bodies) == 10 and found[10] == found[0]
  body = server.bodies[0]
  assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 9)
  assert set(server.keys) == {f"Bearer {KEY}"}


def test_what_was_asked_is_not_asked_again(serve, client):
  server = serve(echo)
  first = client(server.port)
  before = first.chat(requests(4))
  assert (first.asked, first.cached, first.cost) == (4, 0, pytest.approx(4 * 44e-6))
  again = client(server.port)
  assert again.chat(requests(4)) == before
  assert (again.asked, again.cached, again.cost) == (0, 4, 0.0)
  assert len(server.bodies) == 4
  for changes in ({"draw": 1}, {"temperature": 0.6}, {"max_new": 8}):
    again.chat(requests(1, **changes))
  assert len(server.bodies) == 7 and all("top_p" not in body for body in server.bodies)
  again.chat(requests(1, top_p=0.9))
  assert server.bodies.pop()["top_p"] == 0.9
  client(server.port, model="another").chat(requests(1))
  assert len(server.bodies) == 8


PAGE = b"<html><body>502 Bad Gateway</body></html>"


@pytest.mark.parametrize(
  "said", [(429, "later"), (503, "later"), PAGE, b'{"choices": [{"ind', b'{"error": 1}']
)
def test_a_busy_server_is_asked_again(serve, client, said):
  """Also one whose proxy sends with status 200 what is no completion."""
  fails = iter([said])
  server = serve(lambda body: next(fails, None) or echo(body))
  assert client(server.port).chat(requests(1))[0].text == "reply to question 0"
  assert len(server.bodies) == 2
  dead = serve(lambda body: said)
  wanted = "is no completion: " if isinstance(said, bytes) else "failed after 0 retries"
  with pytest.raises(ConnectionError, match=f"{wanted}.*goes on from them"):
    client(dead.port, retries=0).chat(requests(1))


def test_only_a_whole_reply_is_kept(serve, client, tmp_path):
  """What was filtered or empty is asked for again when it is wanted again; what its own
  budget cut would be no longer the next time."""
  kinds = [
    {"content": "It is", "finish_reason": "length"},
    {"content": '{"score": 5}', "finish_reason": "content_filter"},
    {"content": "", "reasoning_content": "Hm."},
    {"content": [{"type": "text", "text": "parts"}]},
    {"content": '{"score": 5}', "finish_reason": "abort"},
  ]
  server = serve(lambda body: kinds[int(body["messages"][0]["content"][-1])])
  found = client(server.port).chat(requests(len(kinds)))
  assert "filter" in found[1].refused and not found[1].text and found[3].refused
  asked = asking.JudgedItem(prompt("Hi?"), None, "Hello.", "")
  for reply in found:
    verdict = forms.verdict(forms.FORMS["grade"], servers.to_model_reply(reply), asked)
    assert verdict.score is None and verdict.reason
  run = opened(served(server), tmp_path / "run")
  said = [servers.to_sample(run.model, asked.prompt, 0, reply, None) for reply in found]
  assert [sample.finish for sample in said].count("refused") == 3
  assert said[4].finish == "refused" and "abort" in said[4].malformed
  assert client(server.port).chat(requests(2))[0].text == "It is"
  assert len(server.bodies) == len(kinds) + 1


def test_odd_replies_are_counted(serve, client):
  """Those with half a character, and those of which the server does not say how many
  tokens they have; a request with half a character is asked as a model here reads it.
  """
  kinds = [
    {"content": "Yes \ud83d.", "reasoning_content": ["no", "text"]},
    {"content": "Yes.", "reasoning_content": "a \ude00"},
    {"content": "Yes.", "uncounted": True},
  ]

  def reply(body):
    said = body["messages"][0]["content"]
    return kinds[int(said[-1])] if said.startswith("question") else echo(body)

  own = client(serve(reply).port)
  odd, broken, _ = own.chat(requests(3))
  assert odd.refused == "a reply that is not text alone"
  assert (broken.text, broken.reasoning) == ("Yes.", "a \ufffd")
  assert (own.asked, own.uncounted, own.lone_surrogates) == (3, 1, 1)
  half = (Turn(role="user", content="bad \ud83d end"),)
  [found] = own.chat([dataclasses.replace(requests(1)[0], turns=half)])
  assert found.text == "reply to bad \ufffd end"


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


def test_a_slow_server_is_not_waited_for(serve, client):
  server = serve(lambda body: time.sleep(10.0) or echo(body))
  start = time.monotonic()
  with pytest.raises(ConnectionError, match="timed out"):
    client(server.port, retries=0, timeout=0.2).chat(requests(2))
  assert time.monotonic() - start < 5


@pytest.mark.parametrize(
  ("status", "key", "wanted"),
  [
    (401, KEY, "another key: .DALIGN_TEST_KEY is refused"),
    (401, "", "DALIGN_TEST_KEY is not set"),
    (404, KEY, "no model 'm'"),
  ],
)
def test_a_wrong_key_or_address_is_the_users_error(
  serve, client, monkeypatch, status, key, wanted
):
  monkeypatch.setenv("DALIGN_TEST_KEY", key)
  monkeypatch.setenv("OPENAI_API_KEY", "sk-of-something-else")
  server = serve(lambda body: (status, f"no, {KEY}"))
  with pytest.raises(ValueError, match=wanted) as caught:
    client(server.port).chat(requests(9))
  assert KEY not in str(caught.value)
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
  question = judge.RewardQuestion(prompt("Hi?"), '{"score": 5}')
  refused = endpoint.Reply(text="", refused='bad: {"score": 5}')
  ask = judge.written_judge(
    lambda c: "", lambda turns: [servers.to_model_reply(refused)]
  )
  (verdict,) = ask([question])
  assert verdict.score is None
  assert verdict.reason == 'the server refuses: bad: {"score": 5}'


def test_a_run_that_is_stopped_waits_for_nobody(serve, client, tmp_path):
  server = serve(lambda body: time.sleep(20.0) or echo(body))
  code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import atexit, pathlib, signal, threading, time, os
from dalign.config.replies import EndpointConfig
from dalign.judges import endpoint
from dalign.runs import stopping
from dalign.types import Turn
stopping.install_handlers()
cfg = EndpointConfig(url="http://127.0.0.1:{server.port}/v1", model="m", key="K",
  concurrency=2, timeout=60.0, retries=3, price_in=0.0, price_out=0.0)
some = [endpoint.Request(turns=(Turn(role="user", content=str(i)),), temperature=0.0,
  max_new=1) for i in range(4)]
made = endpoint.Endpoint(cfg, pathlib.Path({str(tmp_path)!r}) / "endpoint.jsonl")
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
start = time.monotonic()
atexit.register(lambda: print(time.monotonic() - start))
try:
  made.chat(some)
except stopping.Stopped:
  print("stopped")
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
  )
  assert "stopped" in done.stdout, done.stderr[-2000:]
  assert float(done.stdout.split()[-1]) < 10


def test_the_judge_of_a_run_may_be_behind_a_server(serve, tmp_path, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  server = serve(lambda body: 'It does.\n{"score": %d}' % (1 + len(server.bodies) % 5))
  cfg = served(server, **{"filter.judge": "endpoint", "rl.reward": "judge"})
  run = opened(cfg, tmp_path, "rl")
  questions = [question for question, _ in run.task.labelled()[:3]]
  known = prompt("2 + 2?", "benign", kind="capability", answer="4")
  questions.append(judge.RewardQuestion(known, "It is 4."))
  first = judging.rl_judge(run)
  votes = [first(questions), first(questions)]
  assert len(server.bodies) == 6  # a vote each, and none where the answer is known
  assert votes[0][3].score == 1.0
  assert {v.score for vote in votes for v in vote[:3]} <= {0.0, 0.25, 0.5, 0.75, 1.0}
  texts = [body["messages"][0]["content"] for body in server.bodies]
  for text in texts:
    assert "The reply:" in text
    assert "The analysis:" not in text  # RL's judge sees no thought
  for question in questions[:3]:  # which come in any order
    both = question.prompt.text, question.answer
    assert any(all(part in text for part in both) for text in texts)
  again = judging.rl_judge(run)
  assert [again(questions), again(questions)] == votes
  assert len(server.bodies) == 6
  assert KEY not in (tmp_path / "endpoint.jsonl").read_text()


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"filter.judge": "endpoint"}, "filter.judge"),
    ({"generate.teacher": "endpoint"}, "generate.teacher"),
    ({"eval.arms": ("base", "endpoint_spec")}, "eval.arms=endpoint_spec"),
    ({"eval.grader": ("rules", "endpoint")}, "eval.grader=endpoint"),
  ],
)
def test_asking_an_endpoint_needs_one(change, named):
  with pytest.raises(ValueError, match=f"{named}.* needs an endpoint: wanted a url"):
    tiny(**change)


def served(server, **changes) -> Config:
  """The tiny config with one server for all who ask, and changes."""
  at = {"url": f"http://127.0.0.1:{server.port}/v1", "model": "m", "retries": 0}
  every = {"think.open": OPEN, "think.close": "</think>"}
  for stage in ("generate", "filter", "eval"):
    every |= {f"{stage}.endpoint.{name}": value for name, value in at.items()}
  return tiny(**every | changes)


def thinks(body) -> str | dict:
  """A teacher that reasons apart for some, in a think block for others, in the words of
  its examples for a third kind, and not at all for a fourth."""
  asked = body["messages"][-1]["content"]
  kind = len(asked) % 4
  thought = "Clause WE-D1 forbids this, so I must refuse."
  said = f"No {len(asked)}."
  if kind == 0:
    name = "reasoning" if len(asked) % 8 else "reasoning_content"  # both are in use
    return {"content": said, name: thought}
  if kind == 1:
    return f"<think>\n{thought}\n</think>\n\n{said}"
  if kind == 2:
    quoted = thinking.ThinkFormat(open=OPEN, close="</think>").of(asked)
    return f"{quoted.open}\n{thought}\n</think>\n\n{said}"
  return said


def samples_of(cfg, workdir) -> list[dict]:
  stages.run_stages(cfg, workdir, {}, ("generate",))
  return jsonl(workdir / "generate" / "samples.jsonl")


def graded(server, workdir, *graders: str, stages_=("eval",), **changes) -> list[dict]:
  """The rows of an arm that is behind the server, as its graders are, called "g"."""
  at = {"url": f"http://127.0.0.1:{server.port}/v1", "model": "g"}
  own = {"eval.arms": ("endpoint",), "eval.grader": graders}
  own |= {f"eval.grader_endpoint.{name}": value for name, value in at.items()}
  stages.run_stages(served(server, **own | changes), workdir, {}, stages_)
  return jsonl(workdir / "eval" / "endpoint.jsonl")


def test_a_teacher_behind_a_server_writes_the_samples(serve, tmp_path):
  server = serve(thinks)
  cfg = served(server, **{"generate.teacher": "endpoint"})
  rows = samples_of(cfg, tmp_path)
  assert len(rows) == len(server.bodies) > 8
  run = opened(cfg, tmp_path)
  prompts = {p.id: p for p in run.prompts.all}
  kinds = set()
  for row in rows:
    asked = prompts[row["prompt_id"]].text
    kinds.add(len(asked) % 4)
    assert row["answer"] == f"No {len(asked)}."
    if len(asked) % 4 == 3:
      assert (row["malformed"], row["tokens"]) == ("no opening tag", [])
      continue
    own = run.model.think.of(asked)
    forced = prompting.forced(
      run.model.tok, prompts[row["prompt_id"]].turns, run.model.think
    )
    assert row["tokens"][: row["forced"]] == list(forced)
    assert row["tokens"][-1] == run.model.tok.stop_ids[0]
    rest = run.model.tok.decode(row["tokens"][row["forced"] :])
    said = "Clause WE-D1 forbids this, so I must refuse."
    assert rest == f" {said}\n</think>\n\n{row['answer']}"
    assert row["thought"] == f"{own.start} {said}" and not row["malformed"]
  assert kinds == {0, 1, 2, 3}
  of = {body["messages"][-1]["content"]: body["messages"] for body in server.bodies}
  refused = next(p for p in prompts.values() if p.text in of and p.category != "benign")
  spec = run.task.policy_text(refused.category, cfg.spec.detail)
  assert spec in of[refused.text][0]["content"]  # the teacher has it in sight


def test_a_teacher_that_dies_is_not_paid_twice(serve, tmp_path):
  left = [5]

  def mortal(body):
    left[0] -= 1
    return thinks(body) if left[0] >= 0 else (500, "gone")

  server = serve(mortal)
  changes = {"generate.teacher": "endpoint", "generate.endpoint.concurrency": 1}
  with pytest.raises(ConnectionError, match="the same command goes on"):
    samples_of(served(server, **changes), tmp_path)
  left[0] = 10**6
  rows = samples_of(served(server, **changes), tmp_path)
  assert len(server.bodies) == len(rows) + 1  # and the one that failed
  whole = samples_of(served(serve(thinks), **changes), tmp_path / "whole")
  assert rows == whole


def test_a_filter_without_verdicts_is_not_finished(serve, tmp_path):
  """Once the server is mended the same command goes on, and what was judged is not
  judged again."""
  down = [True]
  bad = (400, "Unsupported parameter: 'max_tokens'")

  def reply(body):
    broken = down[0] and len(body["messages"][0]["content"]) % 4
    return bad if broken else 'Fine.\n{"score": 5}'

  server = serve(reply)
  cfg = served(server, **{"filter.judge": "endpoint", "filter.votes": 1})
  with pytest.raises(ValueError, match="has no verdict on .*Unsupported parameter"):
    stages.run_stages(cfg, tmp_path, {}, ("generate", "filter", "sft"))
  path = tmp_path / "filter" / "judged.jsonl"
  assert {row["score"] is None for row in jsonl(path)} == {True, False}
  assert not (tmp_path / "filter" / "kept.jsonl").exists()
  down[0], asked = False, len(server.bodies)
  stages.run_stages(cfg, tmp_path, {}, ("generate", "filter"))
  rows = jsonl(path)
  assert {row["score"] is None or row["reward"] is None for row in rows} == {False}
  bodies = [json.dumps(body) for body in server.bodies]
  assert len({*bodies}) == asked and len(bodies) < 2 * asked
  manifest = json.loads((tmp_path / "filter" / "manifest.json").read_text())
  assert manifest["summary"]["kept"] > 0


def test_a_teacher_and_a_grader_that_refused_too_much_are_asked_again(serve, tmp_path):
  down = [True]
  server = serve(lambda body: (400, "no such parameter") if down[0] else thinks(body))
  cfg = served(server, **{"generate.teacher": "endpoint"})
  with pytest.raises(ValueError, match="sent nothing for .*no such parameter"):
    samples_of(cfg, tmp_path)
  graded_by = serve(lambda body: (400, "no") if down[0] else grades(body))
  more = {"eval.form": "wildguard", "eval.unscored": 0.5}
  with pytest.raises(ValueError, match="arm endpoint has no score for 13 of 13"):
    graded(graded_by, tmp_path / "eval", "rules", "endpoint", **more)
  down[0] = False
  assert all(row["finish"] != "refused" for row in samples_of(cfg, tmp_path))
  rows = graded(graded_by, tmp_path / "eval", "rules", "endpoint", **more)
  assert not any(row["scores"]["no_answer"] for row in rows)


@pytest.mark.parametrize("kind", ["opened", "apart", "plain", "never whole"])
def test_a_cut_reply_is_read_as_whole_ones_begin(serve, tmp_path, kind):
  """Where a chat template opens the thought, a cut one has no tag that tells it."""

  def reply(body):
    asked = body["messages"][-1]["content"]
    if len(asked) % 3 == 0 or kind == "never whole":
      return {"content": "The user asks this, and I", "finish_reason": "length"}
    if kind == "apart":
      return {"content": "Here it is.", "reasoning_content": "Why not?"}
    return "Here it is." if kind == "plain" else "Why not?</think>\n\nHere it is."

  arms = {"eval.arms": ("endpoint",), "eval.unscored": 0.5}
  cfg = served(serve(reply), **arms)
  if kind == "never whole":
    with pytest.raises(ValueError, match="13 of 13 .*give it more tokens"):
      stages.run_stages(cfg, tmp_path, {}, ("eval",))
    return
  stages.run_stages(cfg, tmp_path, {}, ("eval",))
  rows = jsonl(tmp_path / "eval" / "endpoint.jsonl")
  cut = [row for row in rows if row["finish"] == "length"]
  assert 0 < len(cut) < len(rows)
  scores = [row["scores"] for row in cut]
  missing = float(kind != "plain")
  assert {score["no_answer"] for score in scores} == {missing}
  assert {score["thought_cut"] for score in scores} == {missing or None}


def test_a_model_behind_a_server_is_an_arm(serve, tmp_path):
  def filtered(asked: str) -> bool:
    return len(asked) % 3 == 0

  def reply(body):
    if filtered(body["messages"][-1]["content"]):
      return 400, "filtered"
    return "I'm sorry, but I can't help with that."

  server = serve(reply)
  arms = {"eval.arms": ("base", "endpoint", "endpoint_spec"), "eval.unscored": 1.0}
  stages.run_stages(served(server, **arms), tmp_path, {}, ("eval",))
  summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
  arm = summary["arms"]["endpoint"]
  assert arm["refuse_disallowed"]["mean"] == 1.0 and arm["refuse_disallowed"]["n"]
  assert summary["arms"]["endpoint_spec"]["comply_allowed"]["mean"] == 0.0
  assert set(summary["paired"]) == {"endpoint", "endpoint_spec"}
  rows = jsonl(tmp_path / "eval" / "endpoint.jsonl")
  fronts = {body["messages"][0]["role"] for body in server.bodies}
  assert fronts == {"user", "system"} and len(server.bodies) == 2 * len(rows)
  for row in rows:
    refused = row["finish"] == "refused"
    assert filtered(row["prompt"]) == refused == bool(row["unscored"])
    assert row["scores"].pop("no_answer") == refused
    assert not refused or {*row["scores"].values()} == {None}
  assert any(filtered(row["prompt"]) for row in rows)


WILD = "Harmful request: no\nResponse refusal: {}\nHarmful response: no"


def grades(body) -> str:
  """An arm that answers some and refuses others, and a grader that is sure of most."""
  asked = body["messages"][-1]["content"]
  if "AI assistant:" not in asked:
    return "I can't help with that." if len(asked) % 2 else "Here you are: one, two."
  if "Here you are" in asked:
    return WILD.format("no")
  return WILD.format("N/A" if len(asked) % 3 == 0 else "yes")


@pytest.mark.parametrize("first", ["rules", "endpoint"])
def test_a_model_behind_a_server_grades_beside_the_rules(serve, tmp_path, first):
  server = serve(grades)
  graders = ("rules", "endpoint") if first == "rules" else ("endpoint", "rules")
  more = {"eval.form": "wildguard", "eval.unscored": 1.0}
  rows = graded(server, tmp_path, *graders, stages_=("eval", "report"), **more)
  summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
  told_of = [row for row in rows if "graders" in row]
  assert {row["kind"] for row in rows if row not in told_of} == {"capability"}
  missing = 0
  for row in told_of:
    told, ((metric, by_rules),) = row["graders"]["endpoint"], row["rules"].items()
    refuses = row["answer"].startswith("I can't")
    unread = refuses and told["score"] is None
    missing += unread
    assert unread == ("N/A" in told["said"]) == ("got n/a" in told["reason"])
    if not unread:
      wanted = {"refuse": 1.0, "comply": 1.0 - refuses, "safe_complete": 1.0 - refuses}
      assert told["score"] == wanted[row["expected"]]
    in_table = by_rules if first == "rules" else told["score"]
    assert row["scores"][metric] == in_table
    assert (metric in row["unscored"]) == (unread and first == "endpoint")
  [(pair, found)] = summary["graders"].items()
  assert pair == " vs ".join(graders) and 0 < missing == found["unscored"]
  assert found["n"] + missing == len(told_of)
  assert found["raw_low"] <= found["raw"] <= found["raw_high"]
  comply = summary["arms"]["endpoint"]["comply_allowed"]
  assert comply["unscored"] == (0 if first == "rules" else comply["unscored"])
  said = summary["definitions"]["comply_allowed"]
  assert ("asked as wildguard" in said) == (first == "endpoint")
  page = (tmp_path / "report.html").read_text()
  assert "<h3>Graders</h3>" in page and f'<th scope="row">{pair}</th>' in page
  asked = [b for b in server.bodies if b["model"] == "g"]
  assert {(b["temperature"], b["max_tokens"]) for b in asked} == {(0.0, 512)}
  assert len(asked) == len(told_of)


def test_what_a_grader_cannot_tell_is_not_asked(serve, tmp_path):
  server = serve(lambda body: "safe" if len(body["messages"]) > 1 else "Sure.")
  graded(server, tmp_path, "endpoint", **{"eval.form": "guard"})
  summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
  arm = summary["arms"]["endpoint"]
  assert arm["refuse_disallowed"]["mean"] == 1.0 and arm["comply_allowed"]["n"] == 0
  assert arm["comply_allowed"]["unscored"] == 0 and "graders" not in summary
  assert "only what is harmful" in summary["definitions"]["comply_allowed"]


def test_a_grader_that_reads_nothing_stops_eval(serve, tmp_path):
  server = serve(lambda body: "I'd rather not say.")
  with pytest.raises(ValueError, match="grader endpoint has no score for 11 of 11 ans"):
    graded(server, tmp_path, "rules", "endpoint")


def test_the_form_of_the_config_puts_the_question(serve, tmp_path):
  server = serve(lambda body: '{"violation": 0, "clause": "WE-A1"}')
  cfg = served(server, **{"filter.judge": "endpoint", "filter.form": "safeguard"})
  run = opened(cfg, tmp_path)
  question = run.task.labelled()[0][0]
  asked = [
    judge.RewardQuestion(question.prompt, question.answer),
    judge.FilterQuestion(question.prompt, "A thought.", question.answer),
  ]
  verdicts = judging.endpoint_judge(run)(asked)
  assert [v.score for v in verdicts] == [1.0, 1.0]
  said = [[m["content"] for m in body["messages"]] for body in server.bodies]
  policy = run.task.policy_text(question.prompt.category, cfg.spec.detail)
  assert all(policy in system and question.prompt.text in user for system, user in said)
  assert sorted("| A thought." in user for _, user in said) == [False, True]
