"""A run's model behind an address: the real command, the real clients of others."""

import concurrent.futures
import contextlib
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import inspect_ai
from inspect_ai import dataset
from inspect_ai import solver
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models import openai_completions
import numpy as np
import openai
import pytest

from dalign.serving import assistant
from dalign.serving import server
from dalign.serving.engine import Engine
from dalign.serving.harness import lm_eval_model
from dalign.types import Turn
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import read_flags
from tests.helpers import write_jsonl

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
  assert client.models.retrieve(model.id).id == model.id
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


def test_an_answer_ends_before_a_stop(client, name):
  """Of plain text, all of which is answer."""

  def write(**how):
    how = {"model": name, "prompt": "The sky", "seed": 3, "temperature": 1.0} | how
    return client.completions.create(max_tokens=64, **how)

  whole = write().choices[0].text
  stop = whole[5:7]
  cut = write(stop=[stop, "never"]).choices[0]
  assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
  parts = [chunk.choices[0].text for chunk in write(stop=stop, stream=True)]
  assert "".join(parts) == cut.text
  assert write().choices[0].text == whole


@pytest.fixture(scope="module")
def write(client, name):
  def written(prompt, **how):
    how = {"model": name, "prompt": prompt, "temperature": 0.0} | how
    return client.completions.create(**how).choices

  return written


def test_tokens_are_told_what_they_were_worth(write, model):
  (choice,) = write("The sky is blue", max_tokens=4, echo=True, logprobs=2)
  row = model.tok.document("The sky is blue")
  (drawn,) = model._complete([row], 0, dict(max_new=4, temperature=0.0))
  whole, found = [*row, *drawn.tokens], choice.logprobs
  assert choice.text == "The sky is blue" + model.tok.decode(drawn.tokens)
  assert len(found.tokens) == len(whole) and "".join(found.tokens[1:4]) in choice.text
  assert [choice.text[at:][:1] for at in found.text_offset[1:4]] == [
    token[:1] for token in found.tokens[1:4]
  ]
  assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
  for at in (1, len(row), len(whole) - 1):  # from there to the end
    ((logp, likeliest),) = model.scores([whole], [at])
    assert sum(found.token_logprobs[at:]) == pytest.approx(logp, abs=1e-3)
    own = zip(found.token_logprobs[at:], found.top_logprobs[at:], strict=True)
    assert all(logp == max(top.values()) for logp, top in own) == likeliest
  assert {len(top) for top in found.top_logprobs[1:]} == {2, 3}  # with its own
  (alone,) = write("The sky is blue", max_tokens=4, logprobs=2)
  assert alone.text == choice.text.removeprefix("The sky is blue")
  assert alone.logprobs.token_logprobs == found.token_logprobs[len(row) :]
  assert alone.logprobs.top_logprobs == found.top_logprobs[len(row) :]
  (echoed,) = write(row, max_tokens=4, echo=True)
  assert echoed.text == choice.text and echoed.logprobs is None


def test_rows_that_are_scored_together_are_scored_as_alone(write):
  asks = [f"The {'very ' * i}blue sky" for i in range(5)]
  how = dict(max_tokens=1, echo=True, logprobs=0)
  alone = [write(prompt, **how) for prompt in asks]
  with concurrent.futures.ThreadPoolExecutor(5) as threads:
    together = [*threads.map(lambda prompt: write(prompt, **how), asks)]
  for (one,), (other,) in zip(alone, together, strict=True):
    assert one.text == other.text and one.logprobs.top_logprobs[1] is None
    np.testing.assert_allclose(
      one.logprobs.token_logprobs[1:], other.logprobs.token_logprobs[1:], atol=1e-4
    )


@pytest.mark.parametrize(
  "change, wanted",
  [
    ({"logprobs": 6}, "a whole number in 0 to 5"),
    ({"logprobs": True}, "a whole number in 0 to 5"),
    ({"echo": 1}, "true or false"),
    ({"logprobs": 1, "stream": True}, "leave stream out"),
    ({"echo": True, "stream": True}, "leave stream out"),
    ({"logprobs": 1, "stop": "."}, "stop cannot be had with logprobs"),
  ],
)
def test_numbers_that_cannot_be_had_are_refused(address, name, change, wanted):
  body = json.dumps({"model": name, "prompt": "The sky"} | change).encode()
  assert_refused(address, body, 400, wanted, path="/completions")


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


def post(address, body: bytes, path="/chat/completions", **headers):
  headers = {"Content-Type": "application/json"} | headers
  request = urllib.request.Request(address + path, body, headers)
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
  asked = service.read(json.dumps(body).encode(), chat=True)
  with contextlib.ExitStack() as waiting:
    for _ in range(server.MAX_WAITING_PER_SLOT):
      waiting.enter_context(service.reserve(asked))
    with pytest.raises(server.RequestError, match="come again later") as caught:
      with service.reserve(asked):
        pass
  assert caught.value.status == 429
  with service.reserve(asked):
    pass


def test_a_key_is_wanted_where_one_is_set(model):
  service = server.Service(Engine(model), "m", key="secret")
  service.admit({"authorization": "Bearer secret"}, local=False)
  for sent in ({}, {"authorization": "Bearer no"}, {"authorization": "secre"}):
    with pytest.raises(server.RequestError, match="bearer token") as caught:
      service.admit(sent, local=False)
    assert caught.value.status == 401


def test_what_cannot_be_served_is_said(workdir, tmp_path):
  [said] = read_flags([["--mode=serve", "--workdir=w", "--port=99999"]], tmp_path)
  assert said.startswith("ValueError: ") and "--port=99999: " in said
  for place, stage, host, wanted in (
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


def test_lm_evals_log_likelihoods_are_those_of_the_harness(address, name, workdir):
  theirs = openai_completions.LocalCompletionsAPI(
    model=name,
    base_url=f"{address}/completions",
    tokenizer=str(workdir / "export" / "model"),
    tokenizer_backend="huggingface",
    num_concurrent=3,
  )
  ours = lm_eval_model.DalignLM(workdir=workdir, stage="sft")
  pairs = [("The sky is", " blue"), ("The sky is", " green, some"), ("Two and", " two")]
  requests = [
    Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
    for i, pair in enumerate(pairs)
  ]
  got, wanted = theirs.loglikelihood(requests), ours.loglikelihood(requests)
  np.testing.assert_allclose([x for x, _ in got], [x for x, _ in wanted], atol=2e-3)
  assert [hit for _, hit in got] == [hit for _, hit in wanted]


TASK = """
task: chat
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: exact_match}}]
generation_kwargs: {{until: ["zz"], max_gen_toks: 16, temperature: 0.0}}
"""


@pytest.mark.slow
def test_lm_eval_asks_it_as_any_such_server(
  address, name, model, tmp_path, monkeypatch
):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(3)]
  data = write_jsonl(tmp_path / "rows.jsonl", rows)
  (tmp_path / "chat.yaml").write_text(TASK.format(data=data))
  found = lm_eval.simple_evaluate(
    model="local-chat-completions",
    model_args=f"model={name},base_url={address}/chat/completions,num_concurrent=3",
    tasks=["chat"],
    task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
    apply_chat_template=True,
    log_samples=True,
  )
  for sample in found["samples"]["chat"]:
    turns = [Turn(role="user", content=sample["doc"]["question"])]
    (own,) = model.replies([turns], max_new=16, temperature=0.0)
    assert sample["resps"] == [[own.answer]]
