"""A run's model behind an address: the real command, the real clients of others."""

import concurrent.futures
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import inspect_ai
from inspect_ai import dataset
from inspect_ai import solver
import openai
import pytest

from dalign.serving import assistant
from dalign.serving import protocol
from dalign.serving import server
from dalign.serving.engine import Engine
from dalign.types import Turn
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import read_flags

QUESTION = [{"role": "user", "content": "Is the sky blue?"}]


@pytest.fixture(scope="module")
def address(workdir):
  """The base_url of a server of the tiny run's SFT model; it ends as it should."""
  command = [
    *(sys.executable, "-m", "dalign.main", "--mode=serve", f"--workdir={workdir}"),
    *("--stage=sft", "--port=0"),
  ]
  running = subprocess.Popen(
    command, cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True
  )
  try:
    said = running.stderr.readline()
    yield re.search(r"http://127\.0\.0\.1:\d+/v1", said)[0]
    running.send_signal(signal.SIGTERM)
    rest = running.communicate(timeout=30)[1]
    assert running.returncode == 0, rest
    assert rest == "dalign: stopped\n"
  finally:
    running.kill()
    running.wait()


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
  return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120.0)


@pytest.fixture(scope="module")
def name(client) -> str:
  (model,) = client.models.list().data
  return model.id


@pytest.fixture(scope="module")
def model(workdir) -> assistant.Model:
  return assistant.Model(workdir, "sft")


@pytest.fixture(scope="module")
def ask(client, name):
  def asked(**how):
    return client.chat.completions.create(
      **{"model": name, "messages": QUESTION, "max_tokens": 24, "seed": 2} | how
    )

  return asked


def words(reply, i=0) -> tuple[str, str]:
  message = reply.choices[i].message
  return message.reasoning_content, message.content


def test_the_reply_is_the_models_own_thought_and_answer(ask, model):
  reply = ask(temperature=0.0)
  turns = [Turn(**message) for message in QUESTION]
  (own,) = model.replies([turns], max_new=24, temperature=0.0)
  assert words(reply) == (own.thought, own.answer or "")
  assert reply.choices[0].finish_reason == own.finish
  read = len(model.read(turns))
  assert reply.usage.prompt_tokens == read
  assert reply.usage.completion_tokens == len(own.tokens) - own.forced
  assert reply.usage.total_tokens == read + reply.usage.completion_tokens


def test_a_client_may_cut_what_is_sampled_from(ask):
  assert words(ask(temperature=1.0, top_p=0.0)) == words(ask(temperature=0.0))
  assert words(ask(temperature=1.0, top_p=1)) == words(ask(temperature=1.0))


def test_a_stream_adds_up_to_the_whole(ask):
  whole = ask(temperature=1.0)
  chunks = [*ask(temperature=1.0, stream=True, stream_options={"include_usage": True})]
  *parts, end = chunks
  deltas = [chunk.choices[0].delta for chunk in parts]
  thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
  assert (thought, "".join(d.content or "" for d in deltas)) == words(whole)
  assert deltas[0].role == "assistant" and len(deltas) > 1
  assert [c.choices[0].finish_reason for c in parts[:-1]] == [None] * (len(parts) - 1)
  assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
  assert end.choices == [] and end.usage == whole.usage
  assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_says_the_same_again_and_choices_differ(ask):
  once, again = ask(temperature=1.0, n=3), ask(temperature=1.0, n=3)
  said = [words(once, i) for i in range(3)]
  assert said == [words(again, i) for i in range(3)]
  assert len(set(said)) == 3
  assert words(ask(temperature=1.0, seed=3)) != said[0] == words(ask(temperature=1.0))
  assert words(ask(temperature=1.0, seed=None)) != words(
    ask(temperature=1.0, seed=None)
  )


def test_many_at_once_hear_what_each_hears_alone(ask):
  hows = [
    {"temperature": i % 3 / 2, "seed": i, "max_tokens": 8 + 12 * i, "n": 1 + i % 2}
    for i in range(6)
  ]
  alone = [ask(**how) for how in hows]
  with concurrent.futures.ThreadPoolExecutor(6) as threads:
    together = [*threads.map(lambda how: ask(**how), hows)]
  for one, other in zip(alone, together, strict=True):
    assert one.choices == other.choices and one.usage == other.usage


def test_an_answer_ends_before_a_stop(ask):
  how = dict(n=8, temperature=1.0, max_tokens=64)
  whole = ask(**how)
  at = max(range(8), key=lambda i: len(words(whole, i)[1]))
  answer = words(whole, at)[1]
  stop = answer[2:4]
  assert len(stop) == 2
  cut = ask(**how, stop=[stop, "never"])
  assert words(cut, at)[1] == answer[: answer.index(stop)]
  assert cut.choices[at].finish_reason == "stop"
  parts = [chunk.choices[0] for chunk in ask(**how, stop=stop, stream=True)]
  said = [part.delta.content or "" for part in parts if part.index == at]
  assert "".join(said) == words(cut, at)[1]
  assert whole.choices == ask(**how).choices


def test_a_client_that_leaves_takes_its_rows_along(ask, address):
  stream = ask(stream=True, temperature=1.0, max_tokens=2000, n=4)
  next(stream)
  stream.close()
  assert ask(max_tokens=4).choices[0].finish_reason  # somebody else is answered


BAD = [
  ({"model": "gpt"}, 404, "wanted the model"),
  ({"messages": []}, 400, "a list of messages"),
  ({"messages": [*QUESTION, {"role": "tool", "content": "x"}]}, 400, "no 'tool'"),
  ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "a user's message"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
  ({"messages": [{"role": "user", "content": "a " * 9000}]}, 400, "send fewer"),
  ({"temperature": 3}, 400, "a number in 0 to 2"),
  ({"temperature": True}, 400, "a number in 0 to 2"),
  ({"max_tokens": 0}, 400, "a whole number in 1 to"),
  ({"max_tokens": 10**6}, 400, "a whole number in 1 to"),
  ({"n": 1000}, 400, "a whole number in 1 to 16"),
  ({"stop": [""]}, 400, "stop: wanted"),
  ({"stream": "yes"}, 400, "true or false"),
  ({"top_p": 1.5}, 400, "top_p: wanted a number in 0 to 1"),
  ({"tools": [{"type": "function"}]}, 400, "tools cannot be set"),
  ({"logprobs": True}, 400, "logprobs cannot be set"),
  ({"max_token": 5}, 400, "did you mean max_tokens"),
  (
    {"stream_options": {"include_logprobs": True}},
    400,
    "include_logprobs is not known",
  ),
  ({"stream_options": True}, 400, "stream_options: wanted an object"),
  ({"messages": [QUESTION[0] | {"name": "Ann"}]}, 400, "name is not known here"),
  ({"messages": [QUESTION[0] | {"tool_calls": [{}]}]}, 400, "tool_calls is not known"),
]


@pytest.mark.parametrize("change, status, wanted", BAD, ids=lambda x: str(x)[:40])
def test_what_cannot_be_had_is_refused(address, name, change, status, wanted):
  body = {"model": name, "messages": QUESTION} | change
  assert_refused(address, json.dumps(body).encode(), status, wanted)


def post(address, body: bytes, **headers):
  headers = {"Content-Type": "application/json"} | headers
  request = urllib.request.Request(f"{address}/chat/completions", body, headers)
  with urllib.request.urlopen(request, timeout=60) as reply:
    return json.load(reply)


def assert_refused(address, body, status, wanted, **how):
  with pytest.raises(urllib.error.HTTPError) as caught:
    post(address, body, **how)
  assert caught.value.code == status
  assert wanted in json.load(caught.value)["error"]["message"]


def test_what_is_no_request_of_ours_is_refused(address):
  assert_refused(address, b"{", 400, "JSON")
  assert_refused(address, b"[1]", 400, "JSON object")
  assert_refused(address, b"[" * 10**5, 400, "JSON")
  assert_refused(address, b"x" * (server.MAX_BODY_BYTES + 1), 413, "bytes at the most")
  # A page that a browser was led to can send neither without asking first.
  form = {"Content-Type": "text/plain"}
  assert_refused(address, b"{}", 415, "application/json", **form)
  assert_refused(address, b"{}", 403, "a Host of this machine", Host="evil.example:80")


def test_what_asks_for_no_more_than_is_done_is_answered(address, name):
  body = {"model": name, "messages": QUESTION, "max_tokens": 4, "top_p": 1.0}
  more = {"tools": [], "user": "me", "logprobs": None, "response_format": None}
  reply = post(address, json.dumps(body | more).encode())
  assert reply["choices"][0]["message"]["role"] == "assistant"
  parts = [{"type": "text", "text": "Is the"}, {"type": "text", "text": "sky blue?"}]
  body["messages"] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": parts},
    {
      "role": "assistant",
      "content": "Yes",
      "reasoning_content": "Hm.",
      "refusal": None,
    },
    {"role": "user", "content": "Why?"},
  ]
  assert post(address, json.dumps(body).encode())["usage"]["completion_tokens"] <= 4


def test_too_many_who_wait_are_sent_away(model):
  service = server.Service(Engine(model), "m")
  body = {"model": "m", "messages": QUESTION, "n": 16}
  asked = protocol.read_request(json.dumps(body).encode(), service.engine, "m")
  with contextlib.ExitStack() as waiting:
    for _ in range(server.MAX_WAITING_PER_SLOT):
      waiting.enter_context(service.reserve(asked))
    with pytest.raises(protocol.RequestError, match="come again later") as caught:
      with service.reserve(asked):
        pass
  assert caught.value.status == 429
  with service.reserve(asked):
    pass


def test_a_key_is_wanted_where_one_is_set(model):
  service = server.Service(Engine(model), "m", key="secret")
  service.admit({"authorization": "Bearer secret"}, local=False)
  for sent in ({}, {"authorization": "Bearer no"}, {"authorization": "secre"}):
    with pytest.raises(protocol.RequestError, match="bearer token") as caught:
      service.admit(sent, local=False)
    assert caught.value.status == 401


def test_what_cannot_be_served_is_said(workdir, tmp_path):
  [said] = read_flags([["--mode=serve", "--workdir=w", "--port=99999"]], tmp_path)
  assert said.startswith("ValueError: ") and "--port=99999: " in said
  unfinished = tmp_path / "unfinished"
  unfinished.mkdir()
  shutil.copy(workdir / "config.json", unfinished)
  for place, stage, host, wanted in (
    (unfinished, "rl", "127.0.0.1", "run the rl stage first"),
    (workdir, "", "0.0.0.0", "set DALIGN_API_KEY"),
    (workdir, "third", "127.0.0.1", "wanted one of base, sft, distill, rl"),
    (tmp_path, "", "127.0.0.1", "config.json is missing"),
  ):
    with pytest.raises(ValueError, match=wanted) as error:
      server.serve(None, place, stage, host, 0)
    assert "\n" not in str(error.value)


def test_inspect_asks_it_as_any_such_server(address, name, model, tmp_path):
  (log,) = inspect_ai.eval(
    inspect_ai.Task(
      dataset=[dataset.Sample(input="Is the sky blue?", target="y")],
      solver=[solver.generate()],
    ),
    model=f"openai-api/dalign/{name}",
    model_base_url=address,
    model_args={"api_key": "none"},
    display="none",
    log_dir=str(tmp_path),
    temperature=0.0,
    max_tokens=24,
  )
  assert log.status == "success", log.error
  turns = [Turn(**message) for message in QUESTION]
  (own,) = model.replies([turns], max_new=24, temperature=0.0)
  message = log.samples[0].output.message
  assert own.thought == message.content[0].reasoning
  assert message.text == own.answer
