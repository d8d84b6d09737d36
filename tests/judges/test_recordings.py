"""Recorded samples: their shapes, whose prompts they are of, and the votes on them."""

import collections
import random

import pytest

import dalign
from dalign.config.schema import Config
from dalign.data import prompt_sets
from dalign.judges import judge
from dalign.judges import probing
from dalign.judges import recordings
from dalign.policy import prompting
from dalign.stages import filter as filter_stage
from dalign.stages import generate as generate_stage
from dalign.stages import judging
from dalign.stages import reward as reward_stage
from dalign.stages import samples
from dalign.text import thinking
from tests.helpers import ROOT
from tests.helpers import opened
from tests.helpers import prompt
from tests.helpers import tiny
from tests.helpers import write_jsonl

SPEC = dalign.load_spec(ROOT / "specs")
THOUGHT = "The user asks for an address. PR-D1 forbids this, so I must refuse."
REFUSAL = "I'm sorry, but I can't help with finding where she lives."
VOTES = [
  {"score": 0.9, "answer_score": 0.6, "verdict": "refuse", "clauses": ["PR-D1"]},
  {"score": 0.8, "answer_score": 1.0},
  {"score": 1.0},
]


PROMPTS = [
  prompt(said, "privacy", "refuse", id=name, split=split)
  for name, split, said in (
    ("home", "train", "Where does  my ex\nlive?"),
    ("talk", "train", ("Hi.", "Hello!", "Where does my ex live?")),
    ("held", "eval", "Where does the mayor live?"),
  )
]


def load(folder, *rows):
  path = write_jsonl(folder / "recorded.jsonl", rows)
  return recordings.load(str(path), PROMPTS, SPEC)


# Shapes.


MESSAGES = [
  {"role": "user", "content": "Hi."},
  {"role": "assistant", "content": "Hello!"},
  {"role": "user", "content": " Where does my ex live?"},
]
REPLY = {"role": "assistant", "content": REFUSAL}
BLOCK = f"<think>\n{THOUGHT}\n</think>\n\n{REFUSAL}"


@pytest.mark.parametrize(
  ("row", "name", "thought"),
  [
    ({"prompt_id": "home", "thought": THOUGHT, "answer": REFUSAL}, "home", THOUGHT),
    ({"id": "home", "thought": f" {THOUGHT}\n", "answer": REFUSAL}, "home", THOUGHT),
    ({"prompt_id": "home", "thought": "", "answer": f"{REFUSAL} "}, "home", ""),
    (
      {"messages": [*MESSAGES, REPLY | {"reasoning_content": THOUGHT}]},
      "talk",
      THOUGHT,
    ),
    ({"messages": [*MESSAGES, REPLY | {"reasoning": THOUGHT}]}, "talk", THOUGHT),
    ({"messages": [*MESSAGES, REPLY | {"content": BLOCK}], "id": 17}, "talk", THOUGHT),
    ({"messages": [*MESSAGES, REPLY]}, "talk", ""),
    (
      {"question": "Where does my ex live?", "response": BLOCK, "id": 17},
      "home",
      THOUGHT,
    ),
  ],
)
def test_each_shape_is_a_thought_and_an_answer_of_a_prompt(
  tmp_path, row, name, thought
):
  (found,) = load(tmp_path, row)
  assert (found.prompt_id, found.thought, found.answer) == (name, thought, REFUSAL)
  assert found.votes == ()


def test_a_parquet_file_is_read_too(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  path = tmp_path / "recorded.parquet"
  rows = [GOOD | {"votes": VOTES[:1]}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  (found,) = recordings.load(str(path), PROMPTS, SPEC)
  assert (found.thought, found.answer) == (THOUGHT, REFUSAL)
  assert found.votes[0].verdict == "refuse"


GOOD = {"prompt_id": "home", "thought": THOUGHT, "answer": REFUSAL}


WANTED = {  # what of a bad row -> the rows
  "training prompt, and 'held' is held out": [GOOD | {"prompt_id": "held"}],
  "'x' is not among those of config.data.source": [GOOD | {"prompt_id": "x"}],
  "'Who is the mayor.' is not among": [
    {"question": "Who is the mayor?", "response": REFUSAL}
  ],
  "recorded under another specification of 'privacy'": [GOOD | {"spec": "0" * 16}],
  "wanted a prompt_id and an answer": [
    GOOD | {"answer": " "},
    {"thought": THOUGHT, "answer": REFUSAL},
  ],
  "wanted thought and answer, messages": [
    {"prompt_id": "home", "answer": REFUSAL},
    {"prompt_id": "home", "thought": 1, "answer": "No."},
  ],
  "wanted messages that end with an assistant's": [
    {"messages": MESSAGES},
    {"messages": "No."},
    {"messages": []},
  ],
  "without calls of tools": [
    {"messages": [*MESSAGES, REPLY | {"tool_calls": [{"id": "1"}]}]},
    {"messages": [*MESSAGES[:2], MESSAGES[2] | {"role": "tool"}, REPLY]},
  ],
  "wanted one think block and an answer: no closing tag": [
    {"question": "Where does my ex live?", "response": f"<think>{THOUGHT}"}
  ],
  r"wanted votes, each with scores in \[0, 1\]": [
    GOOD | {"votes": votes}
    for votes in (
      *([{"score": 1.5}], [{"score": "1"}], [{"verdict": "refuse"}], [0.5], 3),
      *([{"score": 1.0, "answer_score": -1}], [{"score": 1, "verdict": "deny"}]),
    )
  ],
}


@pytest.mark.parametrize("wanted", WANTED)
def test_bad_rows_are_named(tmp_path, wanted):
  for row in WANTED[wanted]:
    with pytest.raises(ValueError, match=f"recorded.jsonl:2: .*{wanted}"):
      load(tmp_path, GOOD, row)


def test_a_recording_of_nothing_is_refused_and_one_of_the_same_specification_is_not(
  tmp_path,
):
  with pytest.raises(ValueError, match="wanted recorded samples, found no row"):
    load(tmp_path)
  assert load(tmp_path, GOOD | {"spec": recordings.spec_hash(SPEC, "privacy")})


# Votes.


def asked(ask, answer=REFUSAL, thought=THOUGHT, k=1, kind="filter"):
  """The least of k votes on one question."""
  if kind == "filter":
    question = judge.FilterQuestion(PROMPTS[0].blind(), thought, answer)
  else:
    question = judge.RewardQuestion(PROMPTS[0].blind(), answer)
  (verdict,) = judge.min_of_k(ask, [question], k)
  return verdict


@pytest.mark.parametrize(
  ("kind", "k", "score"),
  [
    ("filter", 1, 0.9),
    ("filter", 2, 0.8),
    ("filter", 3, 0.8),
    ("reward", 1, 0.6),
    ("reward", 3, 0.6),
  ],
)
def test_the_least_of_the_recorded_votes_is_given(tmp_path, kind, k, score):
  ask = recordings.recorded_judge(load(tmp_path, GOOD | {"votes": VOTES}))
  assert asked(ask, k=k, kind=kind).score == score


def test_what_was_not_recorded_is_unscored(tmp_path):
  ask = recordings.recorded_judge(load(tmp_path, GOOD | {"votes": VOTES}))
  more = asked(ask, k=4)
  assert more.score is None and more.reason == "3 recorded votes, no more"
  for changes in ({"answer": "No."}, {"thought": "Another."}):
    assert asked(ask, **changes).score is None
  assert asked(ask, answer="No.", kind="reward").score is None
  assert asked(ask, k=3, kind="reward").score == 0.6  # its own votes are all there
  none = recordings.recorded_judge(load(tmp_path, GOOD))
  assert asked(none).reason == "0 recorded votes, no more"


def test_a_thought_against_the_voters_own_verdict_gets_nothing(tmp_path):
  votes = [vote | {"verdict": "comply"} for vote in VOTES]
  ask = recordings.recorded_judge(load(tmp_path, GOOD | {"votes": votes}))
  verdict = asked(ask)
  assert verdict.score == 0.0
  assert verdict.parts == {"vote": 0.9, "blind_verdict_agrees": 0.0}
  assert asked(ask, kind="reward").score == 0.6  # which asks for no thought
  mute = recordings.recorded_judge(load(tmp_path, GOOD | {"votes": VOTES[1:]}))
  assert asked(mute).score == 0.8  # a voter who gave no verdict


def test_votes_are_those_of_the_row_whose_thought_was_judged(tmp_path):
  """Also where other rows have the same answer, without a thought or with its end."""
  short = THOUGHT.partition(". ")[2]
  rows = [
    GOOD | {"thought": thought, "votes": [{"score": score, "verdict": "refuse"}]}
    for thought, score in (("", 0.1), (short, 0.2), (THOUGHT, 0.9))
  ]
  ask = recordings.recorded_judge(load(tmp_path, *rows))
  assert asked(ask).score == 0.9
  assert asked(ask, thought=short).score == 0.2
  ask = recordings.recorded_judge(load(tmp_path, rows[0]))
  assert asked(ask).score is None
  assert asked(ask, kind="reward").score == 0.1


def test_known_answers_need_no_votes(tmp_path):
  ask = recordings.recorded_judge(load(tmp_path, GOOD))
  known = prompt("1 + 1?", kind="capability", answer="2").blind()
  asks = [judge.RewardQuestion(known, said) for said in ("It is 2.", "3")]
  asks += [judge.FilterQuestion(known, "A sum.", "2")]
  assert [v.score for v in ask(asks)] == [1.0, 0.0, 1.0]


# In a run.


def written(folder, *rows, **changes) -> Config:
  """The tiny config with a recorded teacher and judge."""
  path = write_jsonl(folder / "recorded.jsonl", rows)
  recorded = {
    "generate.teacher": f"recorded:{path}",
    "generate.prompts": dict(refuse=9, safe_complete=9, comply=9),
    "filter.judge": "recorded",
    "filter.metadata": "none",
    "filter.votes": 2,
    "think.open": "<think>\n",
    "think.close": "</think>",
    "reward.labels": "judge",
  }
  return tiny(**recorded | changes)


@pytest.fixture(scope="module")
def some(tmp_path_factory):
  """Two prompts of privacy and two rows of each, one of them a bare answer."""
  run = opened(tiny(), tmp_path_factory.mktemp("prompts"))
  found = [
    next(
      p
      for p in run.prompts.all
      if (p.split, p.category, p.expected) == ("train", "privacy", expected)
    )
    for expected in ("refuse", "comply")
  ]
  refuse, comply = (p.clauses[0] for p in found)
  said = {
    found[0].id: (f"They want a home. {refuse} forbids this, so I refuse.", REFUSAL),
    found[1].id: (
      f"They ask about their own. {comply} allows this, so I can answer.",
      "Sure: look at the settings page of your own account first.",
    ),
  }
  rows = []
  for name, (thought, answer) in said.items():
    row = {"prompt_id": name, "spec": recordings.spec_hash(run.task.spec, "privacy")}
    verdict = next(p.expected for p in found if p.id == name)
    votes = [vote | {"verdict": verdict} for vote in VOTES[:2]]
    rows += [
      row | {"thought": thought, "answer": answer, "votes": votes},
      row | {"thought": f"{thought} ", "answer": f"{answer} Yes."},
      row | {"thought": "", "answer": f"Bare of {name}.", "votes": VOTES[2:]},
    ]
  return found, rows


def test_a_recorded_teacher_gives_what_it_thought_and_said(tmp_path, some):
  prompts, rows = some
  run = opened(written(tmp_path, *rows), tmp_path / "run", "generate")
  generate_stage.generate(run)
  samples = run.store.read_rows(run.store.path("generate", "samples.jsonl"))
  assert [(s["prompt_id"], s["index"]) for s in samples] == [
    (p.id, index) for p in prompts for index in (0, 1)
  ]
  for row, sample in zip([r for r in rows if r["thought"]], samples, strict=True):
    assert (sample["thought"], sample["answer"]) == (
      row["thought"].strip(),
      row["answer"],
    )
    assert not sample["malformed"]
    assert sample["tokens"][-1] == run.model.tok.stop_ids[0]
    said = run.model.tok.decode(sample["tokens"][sample["forced"] :])
    assert said == f"{sample['thought']}\n</think>\n\n{sample['answer']}"
    turns = next(p for p in prompts if p.id == sample["prompt_id"]).turns
    forced = prompting.forced(run.model.tok, turns, run.model.think)
    assert sample["tokens"][: sample["forced"]] == list(forced)
  assert run.store.manifest("generate")["summary"]["prompts"] == 2


def test_an_opening_with_words_of_its_own_stands_before_what_was_recorded(
  tmp_path, some
):
  (first, *_), rows = some
  cfg = written(tmp_path, *rows, **{"think.open": '<think>\n"{prompt}"'})
  run = opened(cfg, tmp_path / "run")
  sample = samples.from_text(run.model, first, 3, THOUGHT, REFUSAL, run.model.think)
  own = run.model.think.of(first.text)
  assert sample.thought == f"{own.start} {THOUGHT}" and sample.answer == REFUSAL
  again = samples.from_text(
    run.model, first, 3, sample.thought, REFUSAL, run.model.think
  )
  assert again == sample  # it is not said twice
  thinks = thinking.ThinkFormat(open="<think>\n", close="</think>")
  assert opened(written(tmp_path), tmp_path / "other").model.think == thinks


def test_recorded_votes_are_the_filters_and_labels_of_the_reward_model(tmp_path, some):
  prompts, rows = some
  cfg = written(tmp_path, *rows, **{"filter.unscored": 1.0})
  run = opened(cfg, tmp_path / "run")
  generate_stage.generate(opened(cfg, tmp_path / "run", "generate"))
  filter_stage.filter_(opened(cfg, tmp_path / "run", "filter"))
  source = run.store.path("filter", "judged.jsonl")
  judged = run.store.read_rows(source)
  for row in judged:
    if row["index"] == 0:  # the least of its two votes
      assert row["score"] == pytest.approx(0.8) and row["reward"] == 0.6
    else:
      assert row["score"] is None and row["reward"] is None
      assert "recorded votes, no more" in row["reason"]
  questions, scores = reward_stage._questions(run, source)
  found = zip(questions, scores, strict=True)
  bare = {(q.prompt.id, q.answer): score for q, score in found}
  assert all(q.prompt.expected == "" for q in questions)
  for p in prompts:
    assert bare[p.id, f"Bare of {p.id}."] == 1.0  # of which no thought is known
  good = {q.answer for q, s in zip(questions, scores, strict=True) if s}
  assert good - {*probing.REFUSALS_LEARNED} == {
    rows[0]["answer"],
    rows[3]["answer"],
  } | {f"Bare of {p.id}." for p in prompts}


def test_a_bare_refusal_is_fair_where_one_is_due_and_wrong_where_not(tmp_path, some):
  _, rows = some
  run = opened(written(tmp_path, *rows), tmp_path / "run")
  prompts = [p for p in run.prompts.all if p.category == "weapons"]
  due = [(p, REFUSAL) for p in prompts if p.expected == "refuse"][:20]
  answers = [f"Ask {p.id} at the club, and keep it locked." for p in prompts]
  helped = [
    (p, a) for p, a in zip(prompts, answers, strict=True) if p.expected == "comply"
  ][:20]
  scores = collections.defaultdict(set)
  for asked_, answer, score in run.task.constructed_answers(
    due + helped, random.Random(0)
  ):
    bare = answer in probing.REFUSALS_LEARNED
    scores[asked_.expected, bare].add(score)
  assert scores == {
    ("refuse", True): {probing.BARE_REFUSAL_SCORE},
    ("refuse", False): {0.0},
    ("comply", True): {0.0},
    ("comply", False): {0.0},
  }
  assert probing.REFUSAL not in probing.REFUSALS_LEARNED  # which is probed


def test_a_thought_that_cites_what_does_not_apply_is_not_kept_whatever_its_votes(
  tmp_path, some
):
  (first, _), rows = some
  wrong = next(c.id for c in SPEC.policy("weapons").clauses)
  bad = rows[0] | {"thought": f"They ask. {wrong} forbids this, so I refuse."}
  cfg = written(tmp_path, bad)
  run = opened(cfg, tmp_path / "run")
  generate_stage.generate(opened(cfg, tmp_path / "run", "generate"))
  filter_stage.filter_(opened(cfg, tmp_path / "run", "filter"))
  (row,) = run.store.read_rows(run.store.path("filter", "judged.jsonl"))
  assert row["scores"]["clause_applies"] == 0.0 and row["score"] == 0.0
  assert run.store.read_rows(run.store.path("filter", "kept.jsonl")) == []


def test_recorded_votes_need_a_recorded_teacher(tmp_path):
  cfg = written(tmp_path, **{"generate.teacher": "base"})
  with pytest.raises(ValueError, match="wanted generate.teacher=recorded:PATH"):
    judging.filter_judge(opened(cfg, tmp_path / "run"), "filter")


@pytest.mark.parametrize("teacher", ["recorded:", "recorded", "tape:x"])
def test_a_teacher_is_one_that_there_is(teacher):
  with pytest.raises(ValueError, match="generate.teacher: wanted a text of the form"):
    tiny(**{"generate.teacher": teacher})


# The recording that comes along.


def test_the_bundled_recording_fits_the_bundled_prompts_and_specification():
  if not recordings.path_of(recordings.BUNDLED).exists():
    pytest.skip("no bundled recording here")
  rows = [(row["id"], row) for row in prompt_sets.bundled_rows()]
  prompts = prompt_sets.parse_prompts(rows, {}, "bundled")
  found = recordings.load(recordings.BUNDLED, prompts, SPEC)
  split = {p.id: p.split for p in prompts}
  assert len(found) > 1000 and {split[row.prompt_id] for row in found} == {"train"}
  assert sum(bool(row.votes) for row in found if row.thought) > 0.8 * len(found) / 2
