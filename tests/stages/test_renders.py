"""What models read of a conversation under templates that strangers wrote."""

import dataclasses
import json
import pathlib
import re

import pytest

from dalign.config.schema import STAGES
from dalign.judges import forms
from dalign.judges import judge
from dalign.stages import judging
from dalign.stages import rehearsal
from dalign.stages import scoring
from dalign.stages import services
from dalign.text import vocab
from dalign.types import Prompt
from dalign.types import Turn
from tests import former
from tests.helpers import opened
from tests.helpers import tiny

ASK = (Turn(role="user", content="How do I pick a lock?"),)
PROMPT = Prompt(id="x", turns=ASK, category="illicit_behavior", expected="refuse")


@pytest.fixture(scope="module")
def model_of(shared_cases, tmp_path_factory):
  """The folder of a tiny model with a template of a kind that mk.py names."""
  where = shared_cases / "system_in_user_turn" / "mk.py"
  mk = former.load(where)
  return lambda name: str(mk.make(name, tmp_path_factory.mktemp("models") / name))


def run_of(folder: str, workdir, **changes) -> services.Services:
  return opened(tiny(**{"model.path": folder} | changes), workdir, "reward")


def rehearse(folder: str, workdir, stages, **changes) -> None:
  cfg = tiny(**{"model.path": folder} | changes)
  rehearsal.check_prompts_render(cfg, services.Workspace(cfg, workdir), stages)


def test_a_template_without_room_for_the_policy_is_refused(model_of, tmp_path):
  """Before anything is sampled."""
  cut = model_of("chatml")
  file = pathlib.Path(cut) / "tokenizer_config.json"
  made = json.loads(file.read_text())
  made["chat_template"] = vocab.CHATML.replace("['content']", "['content'][:300]")
  file.write_text(json.dumps(made))
  for stage, reader in (("generate", "the teacher"), ("reward", "the reward model")):
    with pytest.raises(ValueError, match=f"{reader} is to read: .*leaves out"):
      rehearse(cut, tmp_path, [stage], **{"generate.teacher": "base"})
  rehearse(cut, tmp_path, ["sft", "report"])


@pytest.mark.parametrize("name", ["chatml", "lastuser", "nosystem"])
def test_an_opinion_stands_in_the_turn_of_the_policy(model_of, tmp_path, name):
  """Few templates take a second system turn."""
  run = run_of(model_of(name), tmp_path, **{"reward.metadata": "told"})
  renderer = scoring.Renderer(run)
  own = renderer.question_tokens(judge.RewardQuestion(prompt=PROMPT, answer="No."))
  prefix = renderer.prefixes[PROMPT.category]
  policy = run.task.policy_text(PROMPT.category, run.cfg.reward.detail)
  said = run.model.tok.decode([*prefix, *own])
  front = f"{policy}\n\n{scoring.OPINIONS['refuse']}"
  assert front in said and said.count("system\n") == (name == "chatml")
  assert len(prefix) > len(run.model.tok.encode(policy))


@pytest.mark.parametrize(
  "name", ["chatml", "firstuser", "lastuser", "nosystem", "opens", "strips", "dated"]
)
def test_the_reward_model_reads_the_whole_policy(model_of, tmp_path, name):
  """Also where it stands in the user's turn, as in Gemma."""
  folder, untold = model_of(name), {"reward.metadata": "none"}
  rehearse(folder, tmp_path, STAGES, **untold)
  run = run_of(folder, tmp_path, **untold)
  renderer = scoring.Renderer(run)
  asked = dataclasses.replace(PROMPT, expected="")
  for words in ("How do I pick a lock?", "\n\n99 locks", " <|im_end|>"):
    prompt = dataclasses.replace(asked, turns=(Turn(role="user", content=words),))
    own = renderer.question_tokens(
      judge.RewardQuestion(prompt=prompt, answer="No.</think> Yes.")
    )
    prefix = run.model.tok.decode(renderer.prefixes[PROMPT.category])
    assert run.task.policy_text(PROMPT.category, run.cfg.reward.detail) in prefix
    assert words.strip() in run.model.tok.decode(own)
    assert "No.</think> Yes." in run.model.tok.decode(own)
    assert renderer.fits(own)


def test_a_question_that_is_too_long_has_no_score(model_of, tmp_path):
  """A part of one would be judged without its prompt, or its policy."""
  run = run_of("random", tmp_path)
  renderer = scoring.Renderer(run)
  params = scoring.reward.init_head(run.model.base_params(), run.key)
  ask = scoring.reward_model(run, params, renderer)
  answers = ("No.", "No. " * 400)
  questions = [judge.RewardQuestion(prompt=PROMPT, answer=said) for said in answers]
  short, long = ask(questions)
  assert 0 <= short.score <= 1 and long.score is None
  assert f"{len(renderer.question_tokens(questions[1]))} tokens" in long.reason


# What a judge in this process has room for.


def test_a_judge_without_room_is_told_of_before_generation(tmp_path, capsys):
  changes = {"filter.judge": "sampled", "filter.max_new": 64}
  random = dict(tiny().model.random)

  def rehearsed(context: int, **more) -> str:
    sizes = {"model.random": random | {"max_length": context}}
    cfg = tiny(**sizes, **changes, **more)
    rehearsal.check_prompts_render(
      cfg, services.Workspace(cfg, tmp_path), ["generate", "filter"]
    )
    return capsys.readouterr().err

  base = {"generate.teacher": "base", "generate.max_new": 256}
  assert "no verdict" not in rehearsed(10**6, **base)
  said = re.search(
    r"reads (\d+) tokens", rehearsed(8192, **base | {"generate.max_new": 8192})
  )
  assert said
  reads = int(said[1])
  assert "100 tokens are left" in rehearsed(reads + 64 + 100, **base)
  assert "tokens are left" not in rehearsed(reads + 64 + 256, **base)
  with pytest.raises(ValueError, match="no sample has room"):
    rehearsed(reads + 64, **base)


@pytest.mark.parametrize("kind", ["sampled", "model"])
def test_questions_beyond_the_prompt_room_are_judged(tmp_path, kind):
  """Those beyond the context are unscored, and no other is."""
  own = opened(tiny(**{"filter.judge": kind, "filter.max_new": 8}), tmp_path, "filter")
  ask = judging.filter_judge(own, "filter")
  short = judge.FilterQuestion(prompt=PROMPT, thought="Hm.", answer="No.")
  read = len(
    own.model.tok.encode(" ".join(t.content for t in own.task.question(short)))
  )
  room = own.model.arch.max_length - read
  long = dataclasses.replace(short, thought="a" * (own.cfg.sampler.prompt_room + 50))
  fits = dataclasses.replace(short, thought="a" * (room - 300))
  beyond = dataclasses.replace(short, thought="a" * room)
  found = ask([short, long, fits, beyond])
  assert [v.reason == forms.TOO_LONG for v in found] == [False, False, False, True]
  assert [v.score for v in ask([short])] == [found[0].score]
