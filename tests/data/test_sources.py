"""Prompts of the user's own: files, columns, and what is wrong with a row."""

import csv
import dataclasses
import json

import pytest

from dalign.data import prompt_sets
from dalign.types import Turn
from tests import helpers

COLUMNS = {"prompt": "question", "category": "area", "expected": "=comply"}


def write(tmp_path, *rows):
  return f"jsonl:{helpers.write_jsonl(tmp_path / 'p.jsonl', rows)}"


def test_jsonl_with_columns(tmp_path):
  source = write(
    tmp_path,
    {"question": "a b c", "area": "weapons", "id": 7, "scenario": None, "extra": 1},
    {"question": "d e f", "area": "privacy", "id": "x", "answer": 2.5},
  )
  first, second = prompt_sets.load(source, COLUMNS, str(tmp_path))
  assert (first.id, first.text, first.category) == ("7", "a b c", "weapons")
  assert (first.expected, first.kind, first.source) == ("comply", "safety", source)
  assert (second.id, second.answer) == ("x", "2.5")


def test_a_mapped_column_comes_before_one_that_has_a_fields_name(tmp_path):
  other = [{"role": "user", "content": "of another column"}]
  row = {"question": "a b c", "area": "weapons"}
  for name in ("turns", "messages"):
    (prompt,) = prompt_sets.load(
      write(tmp_path, row | {name: other}), COLUMNS, str(tmp_path)
    )
    assert prompt.text == "a b c"
  (prompt,) = prompt_sets.load(
    write(tmp_path, row | {"prompt": "q", "said": other}),
    COLUMNS | {"prompt": "question", "turns": "said"},
    str(tmp_path),
  )
  assert prompt.text == "of another column"


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
  (tmp_path / "home").write_text("no folder")
  with pytest.raises(ValueError, match="config.data.dir: .*home/.cache"):
    prompt_sets.load("bundled", {}, str(tmp_path / "home" / ".cache"))


def test_a_split_column_is_kept(tmp_path):
  rows = [{"question": f"q {i}", "area": "a", "part": "eval"} for i in range(9)]
  source = write(tmp_path, *rows)
  loaded = prompt_sets.load(source, COLUMNS | {"split": "part"}, "")
  assert {p.split for p in loaded} == {"eval"} and len({p.id for p in loaded}) == 9
  assert {p.split for p in prompt_sets.load(source, COLUMNS, "")} == {"train", "eval"}


def test_a_split_that_is_added_later_moves_no_prompt(tmp_path):
  """What was drawn for a prompt stays its own: ids follow from what is said alone."""
  rows = [{"question": f"q {i}", "area": "a"} for i in range(9)]
  before = prompt_sets.load(write(tmp_path, *rows), COLUMNS, "")
  added = [row | {"split": "eval" if i < 3 else "train"} for i, row in enumerate(rows)]
  after = prompt_sets.load(write(tmp_path, *added), COLUMNS, "")
  assert [dataclasses.replace(p, split="") for p in after] == [
    dataclasses.replace(p, split="") for p in before
  ]
  assert [p.split for p in after] == ["eval"] * 3 + ["train"] * 6


GOOD = {"prompt": "p", "category": "a", "expected": "comply"}


@pytest.mark.parametrize(
  ("columns", "rows", "message"),
  [
    ({"promt": "q"}, [GOOD], r"'promt' is no field of a prompt .did you mean 'prompt'"),
    (
      {"prompt": "promts"},
      [{"prompts": "p"}],
      r"p.jsonl:1: wanted column 'promts' for prompt .did you mean 'prompts'",
    ),
    ({}, [GOOD, GOOD | {"expected": "deny"}], r":2: wanted expected as one of refuse"),
    (
      {},
      [{"prompt": "p", "category": "a", "expcted": "comply"}],
      r":1: wanted expected, .* found none .did you mean 'expcted'..; the row has",
    ),
    ({}, [GOOD | {"kind": "odd"}], r":1: wanted kind as one of .* got 'odd'"),
    ({}, [GOOD | {"split": "test"}], r":1: wanted split as one of train, rl, eval"),
    ({}, [GOOD | {"clauses": ["A-D1", 2]}], r":1: wanted clauses as a list of ids"),
    ({}, [GOOD | {"category": ["a"]}], r":1: wanted text as category, got \['a'\]"),
    ({}, [GOOD | {"category": ""}], r":1: wanted a category"),
    ({}, [GOOD | {"id": "x"}] * 2, r":2: id 'x' is also that of .*p.jsonl:1"),
    ({}, [GOOD | {"prompt": " "}], r":1: wanted a prompt, or turns"),
    ({}, [GOOD | {"turns": []}], r":1: turns: wanted turns"),
    ({}, [GOOD | {"turns": [{"role": "bot", "content": "x"}]}], r"turn 1 of 1 .bot."),
    (
      {"turns": "chat"},
      [GOOD | {"chat": [{"role": "assistant", "content": "x"}]}],
      r":1: chat, turn 1 of 1 .assistant.: wanted a user's turn as the last",
    ),
    (
      {},
      [
        GOOD
        | {"turns": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}
      ],
      r":1: turns, turn 1 of 1 .user.: wanted text as content, got .*image_url",
    ),
    ({}, [GOOD | {"kind": "capability"}], r":1: wanted an answer"),
    ({}, [GOOD | {"split": "eval"}, GOOD], r":2: wanted a split, .* 1 of 2 rows"),
    ({}, ["text"], r"p.jsonl:1: wanted a JSON object, got 'text'"),
    (
      {},
      [GOOD | {"id": "x"}, GOOD | {"prompt": "q"}, GOOD | {"expected": "refuse"}],
      r":3: expected is 'refuse', and 'comply' of the same prompt at .*p.jsonl:1",
    ),
    (
      {},
      [GOOD | {"turns": [{"role": "user", "content": "x", "tool_calls": [1]}]}],
      r"turn 1 of 1 .user.: wanted text alone, got a call of a tool",
    ),
    (
      {"expected": "label"},
      [{"prompt": "p", "category": "a", "label": "deny"}],
      r":1: wanted expected .column 'label'. as one of refuse, .* got 'deny'",
    ),
    ({}, [GOOD | {"Split": "eval"}], r"p.jsonl:1: column 'Split' is not read as split"),
    ({}, [], r"wanted prompts, found no row"),
  ],
)
def test_bad_rows_are_named(tmp_path, columns, rows, message):
  with pytest.raises(ValueError, match=message):
    prompt_sets.load(write(tmp_path, *rows), columns, str(tmp_path))


def test_rows_that_say_the_same_have_ids_of_their_own(tmp_path):
  found = prompt_sets.load(write(tmp_path, GOOD, GOOD), {}, "")
  assert len({p.id for p in found}) == 2 and len({p.split for p in found}) == 1


def test_what_is_missing_is_missing(tmp_path):
  empty = dict.fromkeys(("id", "answer", "scenario", "clauses", "turns"), float("nan"))
  rows = [GOOD | empty, GOOD | dict.fromkeys(empty) | {"prompt": "q", "split": None}]
  first, second = prompt_sets.load(write(tmp_path, *rows), {"answer": "answer"}, "")
  for found in (first, second):
    assert (found.answer, found.scenario, found.clauses) == ("", "", ())
    assert len(found.id) == 16
  assert {first.split, second.split} == {"train", "eval"}


def test_whole_numbers_of_a_column_with_an_empty_cell_stay_whole(tmp_path):
  rows = [GOOD | {"kind": "capability", "answer": 4.0, "id": 7.0}]
  (found,) = prompt_sets.load(write(tmp_path, *rows), {}, "")
  assert (found.answer, found.id) == ("4", "7")


def test_a_byte_order_mark_is_no_text(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text("\n" + json.dumps(GOOD) + "\n\n", encoding="utf-8-sig")
  (found,) = prompt_sets.load(f"jsonl:{path}", {}, "")
  assert found.text == "p"


def test_bad_sources_are_named(tmp_path):
  (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"')
  (tmp_path / "bad.parquet").write_text("x")
  (tmp_path / "twice.jsonl").write_text('{"b": {"a": 1, "c": 2, "a": 1}}')
  for source, message in (
    ("jsonl", "wanted a prompt source, 'bundled'"),
    ("bundle", "wanted a prompt source, 'bundled'"),
    ("tfds:gsm8k", "wanted a prompt source, 'bundled'"),
    ("mine/p.jsonl", "did you mean 'jsonl:mine/p.jsonl'"),
    (f"jsonl:{tmp_path}/none", "none: wanted a JSONL file, got No such file"),
    (f"jsonl:{tmp_path}/bad.jsonl", "bad.jsonl:2: wanted JSON"),
    (
      f"jsonl:{tmp_path}/twice.jsonl",
      "twice.jsonl:1: wanted JSON, got the key 'a' more",
    ),
    (f"parquet:{tmp_path}/none", "none: wanted a Parquet file"),
    (f"parquet:{tmp_path}/bad.parquet", "bad.parquet: wanted a Parquet file"),
    ("tfds:no_such_set:train", "tfds:no_such_set: wanted a TFDS data set"),
  ):
    with pytest.raises(ValueError, match=message):
      prompt_sets.load(source, {}, str(tmp_path))


ASKED = [
  {"role": "system", "content": "s"},
  {"role": "user", "content": "a"},
  {"role": "assistant", "content": "b"},
  {"role": "user", "content": "c"},
]


def test_what_stands_before_an_answer_is_the_prompt(tmp_path, capsys):
  label = {"category": "x", "expected": "comply", "split": "train"}
  answered = [*ASKED, {"role": "assistant", "content": "d"}]
  rows = [{"messages": said} | label for said in (answered, ASKED[1:2])]
  prompts = prompt_sets.load(write(tmp_path, *rows), {}, "")
  said = [[dataclasses.asdict(turn) for turn in p.turns] for p in prompts]
  assert said == [ASKED, ASKED[1:2]]
  line = capsys.readouterr().err
  assert "1 of 2 conversations end with the assistant's turn" in line
  assert "p.jsonl:1" in line
  prompt_sets.load(write(tmp_path, *rows[1:]), {}, "")
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
  row = {"conversations": said, "category": "x", "expected": "comply"}
  [prompt] = prompt_sets.load(write(tmp_path, row), {}, "")
  assert prompt.text == "a" and len(prompt.turns) == 1


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
  ("column", "turns"),
  [
    ("turns", [{"role": "user", "content": PARTS}]),
    ("messages", [{"role": "user", "content": "one\ntwo"}]),
    ("conversations", [{"role": "user", "content": "one\ntwo"}]),
    ("conversations", [{"from": "human", "value": "one\ntwo"}]),
    ("conversations", [{"from": "human", "value": PARTS}]),
    ("conversations", {"from": ["human"], "value": ["one\ntwo"]}),
    (
      "conversations",
      [
        {"from": role, "value": "one\ntwo"}
        for role in ("system", "human", "gpt", "human")
      ],
    ),
  ],
)
def test_conversations_are_read_as_people_have_them(tmp_path, column, turns):
  row = {column: turns, "category": "a", "expected": "comply"}
  (found,) = prompt_sets.load(write(tmp_path, row), {}, "")
  roles = ["system", "user", "assistant", "user"][-len(found.turns) :]
  assert found.turns == tuple(Turn(role=role, content="one\ntwo") for role in roles)
  assert len(found.turns) == (4 if len(turns) == 4 else 1)


def test_csv(tmp_path):
  path = tmp_path / "p.csv"
  turns = json.dumps(
    [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
  )
  with path.open("w", newline="", encoding="utf-8-sig") as file:
    writer = csv.writer(file)
    writer.writerow(["question", "area", "expected", "messages", "clauses", "split"])
    writer.writerow(["a, b\nand c", "weapons", "refuse", "", '["WE-D1"]', "train"])
    writer.writerow([])
    writer.writerow(["", "weapons", "comply", turns, "", "eval"])
  columns = {"prompt": "question", "category": "area"}
  first, second = prompt_sets.load(f"csv:{path}", columns, "")
  assert (first.text, first.clauses, first.split) == (
    "a, b\nand c",
    ("WE-D1",),
    "train",
  )
  assert [turn.role for turn in second.turns] == ["system", "user"]
  assert prompt_sets.file_of(f"csv:{path}") == path


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("prompt,category,expected\np,a,deny\n", r"p.csv:2: wanted expected as one of"),
    ('prompt,category,expected\n"p\nq",a,comply\np,a\n', r"p.csv:4: wanted 3 cells"),
    ("prompt,prompt\na,b\n", r"p.csv:1: wanted each column once, got 'prompt'"),
    ('prompt\n"a', r"p.csv:2: wanted CSV, got"),
    (
      "prompt;category;expected\np;a;comply\n",
      r"p.csv:1: wanted commas between columns",
    ),
    ("", "wanted prompts, found no row"),
    (b"prompt\n\xff\n", r"p.csv: wanted CSV in UTF-8"),
  ],
)
def test_bad_csv_is_named(tmp_path, text, message):
  path = tmp_path / "p.csv"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ValueError, match=message):
    prompt_sets.load(f"csv:{path}", {}, "")


def test_what_datasets_saved(tmp_path):
  datasets = pytest.importorskip("datasets")
  features = datasets.Features(
    {
      "messages": [
        {"role": datasets.Value("string"), "content": datasets.Value("string")}
      ],
      "expected": datasets.ClassLabel(names=["comply", "refuse"]),
      "note": datasets.Value("float64"),
    }
  )
  rows = [
    {
      "messages": [{"role": "user", "content": f"q {i}"}],
      "expected": i % 2,
      "note": None,
    }
    for i in range(4)
  ]
  table = datasets.Dataset.from_list(rows, features=features)
  table.select([3, 0, 1]).save_to_disk(tmp_path / "own", num_shards=2)
  found = prompt_sets.load(f"hf:{tmp_path / 'own'}", {"category": "=a"}, "")
  assert [(p.text, p.expected) for p in found] == [
    ("q 3", "refuse"),
    ("q 0", "comply"),
    ("q 1", "refuse"),
  ]
  datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
  with pytest.raises(
    ValueError, match=r"wanted one of its splits, hf:.*both/test, hf:"
  ):
    prompt_sets.load(f"hf:{tmp_path / 'both'}", {}, "")
  next((tmp_path / "own").glob("*.arrow")).unlink()
  for left in ("none", "own"):
    with pytest.raises(ValueError, match=f"hf:.*{left}: wanted a folder"):
      prompt_sets.load(f"hf:{tmp_path / left}", {}, "")


def test_parquet_with_turns(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
  table = pyarrow.table({"messages": [turns, turns[1:]], "category": ["a", "b"]})
  parquet.write_table(table, tmp_path / "p.parquet")
  columns = {"turns": "messages", "expected": "=refuse"}
  first, second = prompt_sets.load(f"parquet:{tmp_path}/p.parquet", columns, "")
  assert [turn.role for turn in first.turns] == ["system", "user"]
  assert second.text == "u" and second.category == "b" and second.expected == "refuse"
