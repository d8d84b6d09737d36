"""A run's model in lm-evaluation-harness."""

import json
import pathlib

from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
import numpy as np
import pytest

from dalign.config import convert
from dalign.runs import store
from dalign.serving import assistant
from dalign.serving.harness import lm_eval_model
from dalign.types import Turn
from tests.helpers import clean_environment
from tests.helpers import python
from tests.helpers import tiny
from tests.helpers import write_jsonl

PAIRS = [  # prompts and what may follow
  ("The sky is", " blue"),
  ("The sky is", " green, some say"),
  ("The sky is ", "blue"),
  ("", "Nothing before it"),
  ("Two and two", " is 4"),
]


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory) -> pathlib.Path:
  """A run whose base is what the tiny run has exported, so that others can read it."""
  folder = tmp_path_factory.mktemp("exported")
  cfg = tiny(**{"model.path": str(workdir / "export" / "model")})
  store.write_json(folder / "config.json", convert.to_json(cfg))
  return folder


@pytest.fixture(scope="module")
def both(exported, workdir):
  """The same model as ours and as the harness's own, of transformers."""
  ours = lm_eval_model.DalignLM(workdir=exported, stage="base")
  place = str(workdir / "export" / "model")
  theirs = huggingface.HFLM(
    pretrained=place, dtype="float32", device="cpu", batch_size=1, max_length=512
  )
  # It is compared as a base: no thought is opened, and the harness says how long.
  theirs.tokenizer.chat_template = ours.model.tok.chat_template
  theirs.model.generation_config.max_new_tokens = None
  return ours, theirs


def asked(kind: str, *arguments) -> list[Instance]:
  """Requests of the harness."""
  return [
    Instance(request_type=kind, doc={}, arguments=own, idx=i)
    for i, own in enumerate(arguments)
  ]


def test_log_likelihoods_are_those_of_transformers(both):
  ours, theirs = both
  requests = asked("loglikelihood", *PAIRS)
  got, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests)
  np.testing.assert_allclose([x for x, _ in got], [x for x, _ in wanted], atol=2e-3)
  assert [hit for _, hit in got] == [hit for _, hit in wanted]
  texts = asked("loglikelihood_rolling", ("A text. " * 3,), ("Another",))
  np.testing.assert_allclose(
    ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), atol=2e-3
  )


def test_what_greedy_decoding_writes_is_said_to_be_greedy(both):
  ours, _ = both
  turns = [Turn(role="user", content="Is the sky blue?")]
  (sample,) = ours.model.replies([turns], max_new=4, temperature=0.0)
  front = ours.model.read(turns)
  best, other = (*front, *sample.tokens), (*front, *sample.tokens[:-1], 41)
  assert sample.tokens[-1] != 41
  kept, lost = ours.model.scores([best, other], [len(front)] * 2)
  assert kept[1] and not lost[1] and kept[0] > lost[0]


def test_continuations_are_those_of_transformers(both):
  ours, theirs = both
  wanted = {"until": ["zz"], "max_gen_toks": 12, "do_sample": False}
  requests = asked("generate_until", *((prompt, wanted) for prompt, _ in PAIRS[:2]))
  assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_a_chat_is_read_as_the_template_writes_it(both):
  ours, theirs = both
  chat = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is the sky blue?"},
  ]
  rendered = theirs.apply_chat_template(chat)
  assert ours._encode_pair(ours.apply_chat_template(chat), "Yes") == (
    theirs._encode_pair(rendered, "Yes")
  )
  (got,) = ours.loglikelihood(
    asked("loglikelihood", (ours.apply_chat_template(chat), "Yes"))
  )
  (wanted,) = theirs.loglikelihood(asked("loglikelihood", (rendered, "Yes")))
  np.testing.assert_allclose(got[0], wanted[0], atol=2e-3)
  begun = [*chat, {"role": "assistant", "content": "Ye"}]
  (end,) = ours.loglikelihood(
    asked("loglikelihood", (ours.apply_chat_template(begun, False), "s"))
  )
  assert end[0] > got[0]  # a part of the same words


def test_a_question_cannot_spell_control_tokens(both):
  ours, _ = both
  tok = ours.model.tok
  plain = ours.apply_chat_template([{"role": "user", "content": "Hello"}])
  named = next(iter(tok.special))
  hostile = ours.apply_chat_template([{"role": "user", "content": f"Hello{named}"}])

  def controls(prompt):
    before, _ = ours._encode_pair(prompt, "Yes")
    return [i for i in before if i in tok.special.values()]

  assert controls(hostile) == controls(plain)
  before, _ = ours._encode_pair(f"Hello{named}", "Yes")
  assert not set(before) & set(tok.special.values())


def test_replies_of_a_trained_model_are_answers_alone(workdir):
  ours = lm_eval_model.DalignLM(workdir=workdir, stage="sft", max_new=24)
  chat = [{"role": "user", "content": "Is the sky blue?"}]
  (reply,) = ours.generate_until(
    asked("generate_until", (ours.apply_chat_template(chat), {"until": []}))
  )
  turns = [Turn(role="user", content="Is the sky blue?")]
  (sample,) = ours.model.replies([turns], max_new=24, temperature=0.0)
  assert reply == sample.answer and "sky" in sample.thought
  with pytest.raises(ValueError, match="top_k"):
    ours.generate_until(asked("generate_until", (reply, {"top_k": 3, "until": []})))


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""


@pytest.mark.slow
def test_the_harness_runs_its_tasks_on_a_checkpoint(workdir, tmp_path):
  rows = [
    {"question": f"{n} and {n} is", "choices": [f"{2 * n}", "none"], "gold": 0}
    for n in range(4)
  ]
  data = write_jsonl(tmp_path / "rows.jsonl", rows)
  chosen = "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]"
  written = (
    'doc_to_target: "{{choices[0]}}"\nmetric_list: [{metric: exact_match}]\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 16}'
  )
  for name, kind, more in (
    ("chosen", "multiple_choice", chosen),
    ("written", "generate_until", written),
  ):
    task = TASK.format(name=name, data=data, kind=kind, more=more)
    (tmp_path / f"{name}.yaml").write_text(task)
  command = [
    *("-m", "dalign.serving.harness", "run", "--model", "dalign"),
    *("--model_args", f"workdir={workdir},stage=sft", "--include_path", str(tmp_path)),
    *("--tasks", "chosen,written", "--apply_chat_template", "--log_samples"),
    *("--output_path", str(tmp_path / "out")),
  ]
  offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
  done = python(*command, env=clean_environment() | offline)
  assert done.returncode == 0, done.stderr[-3000:]
  (found,) = (tmp_path / "out").rglob("results_*.json")
  results = json.loads(found.read_text())
  assert results["n-samples"]["chosen"]["effective"] == 4
  ours = lm_eval_model.DalignLM(workdir=workdir, stage="sft")
  prompts = [
    ours.apply_chat_template([{"role": "user", "content": row["question"]}])
    for row in rows
  ]
  pairs = [(p, c) for p, row in zip(prompts, rows, strict=True) for c in row["choices"]]
  logp = [x for x, _ in ours.loglikelihood(asked("loglikelihood", *pairs))]
  right = np.mean([a > b for a, b in zip(logp[::2], logp[1::2], strict=True)])
  assert results["results"]["chosen"]["acc,none"] == pytest.approx(right)
  assert "exact_match,none" in results["results"]["written"]


@pytest.mark.parametrize(
  "given, wanted",
  [
    ("workdir=/nowhere", "config.json is missing"),
    ("stage=sft", "wanted workdir=FOLDER"),
    ("workdir=/nowhere,stage=third", "wanted one of base, sft, distill, rl"),
    ("workdir=/nowhere,path=x", r"got \['path'\]"),
  ],
)
def test_what_the_harness_is_given_wrongly_is_said(given, wanted):
  with pytest.raises(ValueError, match=wanted):
    lm_eval_model.DalignLM.create_from_arg_string(given)


def test_a_stage_that_was_not_run_is_said(exported):
  with pytest.raises(ValueError, match="run the rl stage first"):
    assistant.Model(str(exported))


def test_text_is_cut_at_the_first_stop():
  assert assistant.cut_at_stop("one. two! three", ["!", ". ", ""]) == "one"
  assert assistant.cut_at_stop("one", ["!"]) == "one"
