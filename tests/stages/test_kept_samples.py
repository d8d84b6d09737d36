"""What was sampled stays, whatever becomes of the rest of the prompts' file."""

import json

import pytest

from dalign.data import prompt_sets
from dalign.runs import store
from dalign.stages import generate
from tests.helpers import opened
from tests.helpers import tiny
from tests.judges.test_endpoint import serve  # noqa: F401, a fixture

ROWS = [
  {"prompt": f"How do I sell {thing}?", "category": "benign", "expected": "comply"}
  for thing in ("a lock", "apples", "an old boat", "my drawings", "honey", "two hens")
]


class Desk:
  """Prompts in a file, and a teacher that says who asked it."""

  def __init__(self, folder, server):
    self.file, self.workdir, self.server = folder / "p.jsonl", folder / "run", server
    at = {"url": f"http://127.0.0.1:{server.port}/v1", "model": "m"}
    self.changes = {
      "data.source": f"jsonl:{self.file}",
      "data.contaminated": 1.0,
      "generate.teacher": "endpoint",
      "generate.most": 1,
      "generate.batch": 1,
      "generate.revise": False,
      **{f"generate.endpoint.{name}": value for name, value in at.items()},
    }

  def write(self, rows):
    self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

  def run(self, stage="generate", **changes):
    return opened(tiny(**self.changes | changes), self.workdir, stage)

  def generate(self, **changes) -> tuple[list[dict], set[str]]:
    """The samples, and the prompts that the teacher was asked."""
    (self.workdir / "endpoint.jsonl").unlink(missing_ok=True)  # which saves asking
    self.server.bodies.clear()
    generate.generate(self.run(**changes))
    samples = store.read_rows(self.workdir / "generate" / "samples.jsonl")
    return samples, {body["messages"][-1]["content"] for body in self.server.bodies}


@pytest.fixture
def desk(serve, tmp_path):  # noqa: F811
  own = Desk(tmp_path, serve(lambda body: "<think>\nA sale, so I can.\n</think>\nAsk."))
  own.write(ROWS)
  return own


def sides(rows) -> dict[str, str]:
  """Prompt -> its split."""
  found = prompt_sets.split(
    prompt_sets.parse_prompts([(str(i), row) for i, row in enumerate(rows)], {}, "")
  )
  return {prompt.text: prompt.split for prompt in found}


def test_a_split_that_says_what_was_so_changes_nothing(desk):
  samples, asked = desk.generate()
  split = sides(ROWS)
  assert asked == {text for text, side in split.items() if side == "train"}
  filtering = desk.run("filter")
  assert filtering.begin([*filtering.sources])
  filtering.store.finish("filter", {})
  desk.write([row | {"split": split[row["prompt"]]} for row in ROWS])
  assert desk.generate() == (samples, set())
  filtering = desk.run("filter")
  assert not filtering.begin([*filtering.sources])


@pytest.mark.parametrize("column", ["split", "fold"])
def test_a_new_split_keeps_the_samples_of_all_that_is_still_trained_on(desk, column):
  samples, _ = desk.generate()
  before = sides(ROWS)
  train = [text for text, side in before.items() if side == "train"]
  [held_out] = [text for text, side in before.items() if side == "eval"][:1]
  now = before | {train[0]: "eval", held_out: "train"}
  desk.write([row | {column: now[row["prompt"]]} for row in ROWS])
  if column != "split":
    desk.changes["data.columns"] = {"split": column}
  found, asked = desk.generate()
  assert asked == {held_out}
  known = {row["prompt_id"]: row for row in samples}
  ids = {p.text: p.id for p in desk.run().prompts.raw}
  assert {row["prompt_id"] for row in found} == {
    ids[held_out],
    *map(ids.get, train[1:]),
  }
  assert all(row == known.get(row["prompt_id"], row) for row in found)
  assert desk.generate() == (found, set())


def test_a_prompt_that_is_another_under_its_id_is_sampled_again(desk):
  rows = [row | {"id": str(i), "split": "train"} for i, row in enumerate(ROWS)]
  desk.write(rows)
  desk.generate()
  rows[2] |= {"prompt": "How do I buy an old boat?"}
  rows[3] |= {"expected": "refuse"}  # which the teacher is not told
  desk.write(rows)
  samples, asked = desk.generate()
  assert asked == {"How do I buy an old boat?"} and len(samples) == len(rows)


def test_what_a_later_stage_learned_from_other_prompts_is_refused(desk):
  filtering = desk.run("filter")
  assert filtering.begin([*filtering.sources])
  filtering.store.finish("filter", {})
  desk.write([row | {"split": "train"} for row in ROWS])
  filtering = desk.run("filter")
  with pytest.raises(ValueError, match="filter is done, but input .*/p.jsonl was"):
    filtering.begin([*filtering.sources])


def test_another_config_keeps_no_sample(desk):
  desk.generate()
  desk.write([row | {"split": "train"} for row in ROWS])
  with pytest.raises(ValueError, match="generate is done, but generate.max_new was"):
    desk.generate(**{"generate.max_new": 3})
