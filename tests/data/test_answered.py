"""Conversations that end with the assistant's turn, as those that models learn from do:
the prompt is what stands before it."""

import csv
import json

import pytest
import tensorflow_datasets as tfds

from dalign.data import prompt_sets
from dalign.data import readers

ASKED = [
  {"role": "system", "content": "s"},
  {"role": "user", "content": "a"},
  {"role": "assistant", "content": "b"},
  {"role": "user", "content": "c"},
]
ANSWERED = [*ASKED, {"role": "assistant", "content": "d"}]
LABEL = {"category": "x", "expected": "comply", "split": "train"}
ROWS = [
  {"messages": ANSWERED} | LABEL,
  {"messages": ASKED[1:2]} | LABEL | {"split": "eval"},
]


class AnsweredChats(tfds.core.GeneratorBasedBuilder):
  """`ROWS` as a TFDS data set."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    text = tfds.features.Text
    turns = tfds.features.Sequence({"role": text(), "content": text()})
    features = {"messages": turns} | {name: text() for name in LABEL}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield from enumerate(ROWS)


def of_jsonl(folder):
  (folder / "p.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
  return f"jsonl:{folder / 'p.jsonl'}", "p.jsonl:1"


def of_csv(folder):
  with (folder / "p.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, [*ROWS[0]])
    writer.writeheader()
    writer.writerows(row | {"messages": json.dumps(row["messages"])} for row in ROWS)
  return f"csv:{folder / 'p.csv'}", "p.csv:2"


def of_parquet(folder):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "p.parquet")
  return f"parquet:{folder / 'p.parquet'}", "p.parquet row 0"


def of_hf(folder):
  datasets = pytest.importorskip("datasets")
  datasets.Dataset.from_list(ROWS).save_to_disk(folder / "own")
  return f"hf:{folder / 'own'}", "own row 0"


def of_tfds(folder):
  builder = AnsweredChats(data_dir=str(folder), file_format="array_record")
  readers.prepare(builder)
  return "tfds:answered_chats:train", "tfds:answered_chats:train row 0"


@pytest.mark.parametrize("make", [of_jsonl, of_csv, of_parquet, of_hf, of_tfds])
def test_what_stands_before_the_answer_is_the_prompt(tmp_path, capsys, make):
  source, first = make(tmp_path)
  prompts = prompt_sets.load(source, {}, str(tmp_path))
  said = [[(turn.role, turn.content) for turn in p.turns] for p in prompts]
  assert said == [[(t["role"], t["content"]) for t in x] for x in (ASKED, ASKED[1:2])]
  line = capsys.readouterr().err
  assert "1 of 2 conversations end with the assistant's turn" in line
  assert first in line


def test_where_nothing_is_left_out_nothing_is_said(tmp_path, capsys):
  (tmp_path / "p.jsonl").write_text(json.dumps(ROWS[1]))
  prompt_sets.load(f"jsonl:{tmp_path / 'p.jsonl'}", {}, "")
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  "said",
  [
    [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
    [
      {"role": "user", "content": "a"},
      {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
      {"role": "assistant", "content": "b"},
    ],
  ],
)
def test_whatever_the_answer_is_it_is_not_read(tmp_path, said):
  (tmp_path / "p.jsonl").write_text(json.dumps({"conversations": said} | LABEL))
  [prompt] = prompt_sets.load(f"jsonl:{tmp_path / 'p.jsonl'}", {}, "")
  assert prompt.text == "a" and len(prompt.turns) == 1


@pytest.mark.parametrize(
  ("said", "message"),
  [
    (ANSWERED[-1:], r"turn 1 of 1 \(assistant\): wanted a user's turn as the last"),
    ([ASKED[0], ANSWERED[-1]], r"turn 1 of 2 \(system\): wanted a user's turn"),
    ([*ASKED, {"role": "tool", "content": "d"}, ANSWERED[-1]], "turn 5 of 6 .tool.:"),
  ],
)
def test_a_conversation_without_a_question_names_row_and_column(
  tmp_path, said, message
):
  rows = [{"chat": ASKED} | LABEL, {"chat": said} | LABEL]
  (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
  with pytest.raises(ValueError, match=rf"p.jsonl:2: chat, {message}"):
    prompt_sets.load(f"jsonl:{tmp_path / 'p.jsonl'}", {"turns": "chat"}, "")
