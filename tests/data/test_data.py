"""Prompt sets: bundled rows, splits that keep families together, sources, order."""

import collections
import csv
import dataclasses
import json
import pathlib
import time

import pytest

from dalign.data import prompt_sets
from dalign.text import words
from dalign.types import EXPECTED
from dalign.types import Turn
from tests import helpers

SHARED = helpers.SHARED / "data"


@pytest.fixture(scope="module")
def rows():
  return prompt_sets.bundled_rows()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def bundled(cache):
  return prompt_sets.load("bundled", {}, cache)


def prompt(id, text, scenario="", **fields):
  own = {"id": id, "category": "weapons", "scenario": scenario}
  return helpers.prompt(text, **own | fields)


def slow_jaccard(left, right):
  def grams(text):
    found = "".join(c if c.isalnum() or c == "_" else " " for c in text.casefold())
    found = found.split()
    if len(found) < 3:
      return {tuple(found)}
    return set(zip(found, found[1:], found[2:], strict=False))

  left, right = grams(left), grams(right)
  return len(left & right) / len(left | right)


# The prompts that come along


def test_every_policy_has_every_cell_on_both_sides(rows):
  cells = collections.Counter((r["category"], r["expected"], r["split"]) for r in rows)
  categories = {category for category, _, _ in cells} - {"benign"}
  assert len(categories) == 9
  missing = [
    (category, expected, split)
    for category in categories
    for expected in EXPECTED
    for split in prompt_sets.SPLITS
    if not cells[category, expected, split]
  ]
  assert not missing
  share = sum(row["split"] == "eval" for row in rows) / len(rows)
  assert 0.15 < share < 0.25


def test_no_scenario_and_no_near_twin_straddles(rows):
  sides = collections.defaultdict(set)
  for row in rows:
    sides[row["scenario"]].add(row["split"])
  assert not [name for name, found in sides.items() if len(found) > 1]
  start = time.process_time()
  pairs = list(words.near_duplicates([row["prompt"] for row in rows]))
  assert time.process_time() - start < 3
  assert pairs, "some bundled prompts are near-twins"
  assert not [
    (rows[i]["id"], rows[j]["id"])
    for i, j in pairs
    if rows[i]["split"] != rows[j]["split"]
  ]


def test_no_bundled_prompt_is_an_evaluation_prompt(bundled):
  paths = sorted(SHARED.glob("eval_*.jsonl")) + sorted(
    SHARED.glob("capability_*.jsonl")
  )
  if not paths:
    pytest.skip("../shared/data is absent")
  texts = [row["prompt"] for path in paths for row in helpers.jsonl(path)]
  assert len(texts) > 4000
  assert prompt_sets.contaminated(bundled, texts) == []


def test_tfds_gives_the_bundled_rows_in_order(rows, bundled, cache):
  def parts(row):
    turns = [(turn["role"], turn["content"]) for turn in row["turns"]]
    return {name: row[name] for name in prompt_sets.FIELDS if name != "turns"} | {
      "t": turns
    }

  wanted = [row for side in prompt_sets.SPLITS for row in rows if row["split"] == side]
  assert [parts(prompt_sets._row(prompt)) for prompt in bundled] == [
    parts(r) for r in wanted
  ]
  again = prompt_sets.load("bundled", {}, cache)
  assert again == bundled and again[0].source == "bundled"
  with pytest.raises(ValueError, match="'bundled' takes no columns"):
    prompt_sets.load("bundled", {"prompt": "text"}, cache)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder in place of the bundled one, with enough rows for both splits."""
  monkeypatch.setattr(prompt_sets, "_FOLDER", tmp_path)
  rows = [
    {"scenario": f"privacy{i}", "expected": "comply", "prompt": f"what is number {i}"}
    for i in range(20)
  ]
  helpers.write_jsonl(tmp_path / "privacy.jsonl", rows)
  return tmp_path


def test_changed_prompts_are_prepared_anew(folder):
  for text in ("how do locks work", "how do safes open"):
    row = {"scenario": "locks", "expected": "comply", "prompt": text}
    (folder / "weapons.jsonl").write_text(json.dumps(row))
    loaded = {p.id: p for p in prompt_sets.load("bundled", {}, str(folder / "tfds"))}
    assert len(loaded) == 21 and loaded["weapons-locks-1"].text == text


def test_bundled_turns_and_kinds(folder):
  turns = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c d"},
  ]
  files = {
    "capability": {"expected": "comply", "scenario": "x", "prompt": "1+1", "answer": 2},
    "benign": {"expected": "comply", "scenario": "x", "prompt": "hello you"},
    "weapons": {"expected": "refuse", "scenario": "x", "turns": turns},
  }
  for name, row in files.items():
    (folder / f"{name}.jsonl").write_text(json.dumps(row))
  loaded = {p.id: p for p in prompt_sets.load("bundled", {}, str(folder / "tfds"))}
  assert {"benign-x-1", "benign-x-2", "weapons-x-1"} <= set(loaded)
  assert loaded["benign-x-1"].kind == "helpful"
  assert (
    loaded["benign-x-2"].kind == "capability" and loaded["benign-x-2"].answer == "2"
  )
  assert [(t.role, t.content) for t in loaded["weapons-x-1"].turns] == [
    (turn["role"], turn["content"]) for turn in turns
  ]


# Splits


def test_near_twins_are_those_of_all_pairs(rows):
  texts = [row["prompt"] for row in rows[::20]]
  texts += ["", "!", "one", "one two", "One, two!", "one two three four five six"]
  texts += ["one two three four five seven", "one two three four nine ten"]
  for threshold in (0.3, 0.5, 0.8, 1.0):
    wanted = {
      (i, j)
      for j in range(len(texts))
      for i in range(j)
      if slow_jaccard(texts[i], texts[j]) >= threshold
    }
    assert set(words.near_duplicates(texts, threshold=threshold)) == wanted


def test_families_join_scenarios_through_twins():
  prompts = [
    prompt("1", "how do I clean an old rifle", "b"),
    prompt("2", "something else here entirely", "b"),
    prompt("3", "how do I clean an old rifle today", "a"),
    prompt("4", "nothing like the others", ""),
    prompt("5", "words that stand alone again", "d"),
  ]
  own = prompt_sets.digest(prompts[3].turns)  # it has no scenario
  assert prompt_sets.families(prompts) == ["a", "a", "a", own, "d"]


def with_system(prompt, content):
  turns = (Turn(role="system", content=content), *prompt.turns)
  return dataclasses.replace(prompt, turns=turns)


def test_a_shared_system_prompt_makes_no_twins():
  """Else all of a set were one family, on one side of the split."""
  system = "You are the assistant of a bookshop. " * 20
  topics = [f"word{i} other{i} third{i} fourth{i}" for i in range(60)]
  own = [with_system(prompt(topic, topic), system) for topic in topics]
  assert len({*prompt_sets.families(own)}) == 60
  assert {p.split for p in prompt_sets.split(own)} == {"train", "eval"}
  assert prompt_sets.contaminated(own, [system]) == []


def test_a_shared_question_is_one_family_whatever_the_system_prompt():
  plain = prompt("1", "how do I clean an old rifle")
  other = with_system(dataclasses.replace(plain, id="2"), "Be brief.")
  first, second = prompt_sets.families([plain, other])
  assert first == second


def test_a_split_is_stable_and_whole():
  prompts = [
    prompt(f"{i}", f"text {i} about {i * 7} and {i * 13}", f"s{i // 3}")
    for i in range(900)
  ]
  once = prompt_sets.split(prompts)
  assert once == prompt_sets.split(prompts)
  assert [p.id for p in once] == [p.id for p in prompts]
  sides = {p.id: p.split for p in once}
  assert {p.id: p.split for p in prompt_sets.split(prompts[::-1])} == sides
  assert {
    p.id: p.split for p in prompt_sets.split(prompts[:600])
  }.items() <= sides.items()
  assert all(sides[str(i)] == sides[str(i // 3 * 3)] for i in range(900))
  assert 0.12 < sum(side == "eval" for side in sides.values()) / 900 < 0.28
  more = prompt_sets.split(prompts, share=0.5)
  assert 0.4 < sum(p.split == "eval" for p in more) / 900 < 0.6
  assert all(
    b.split == "eval" for a, b in zip(once, more, strict=True) if a.split == "eval"
  )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_cell_with_two_families_is_on_both_sides(share):
  texts = ["alpha beta gamma delta", "one two three four", "red green blue black"]
  prompts = [prompt(text, text, text) for text in texts]
  alone = prompt("x", "just this one here", expected="refuse")
  sides = [p.split for p in prompt_sets.split([*prompts, alone], share=share)]
  assert set(sides[:3]) == {"train", "eval"}
  assert sides[3] == ("eval" if share else "train")


def test_contamination_by_a_long_run_or_a_near_twin():
  prompts = [
    prompt(
      "run", "Well, tell me how to open the old wooden garden door quickly please"
    ),
    prompt("twin", "how do I boil an egg"),
    prompt("clean", "which planets have rings"),
  ]
  others = [
    "My aunt asked: TELL ME HOW TO OPEN THE OLD wooden box, then asked for something",
    "how do I boil an egg fast",
    "which planets have moons, and how do I open the old wooden garden gate",
  ]
  assert prompt_sets.contaminated(prompts, others) == [
    ("run", others[0]),
    ("twin", others[1]),
  ]
  assert ("run", others[2]) in prompt_sets.contaminated(prompts, others, n=5)


# Choice and order


TWIN = "我的邻居总是半夜很大声地放音乐，我应该怎么礼貌地和他说这件事呢"


def test_twins_and_contamination_are_found_in_chinese():
  """There are no spaces; one word of many is another here, and one in front."""
  texts = [TWIN, TWIN.replace("半夜", "深夜"), "附近有什么好吃的面馆，价格不要太贵"]
  assert [*words.near_duplicates(texts, threshold=0.5)] == [(0, 1)]
  prompts = [prompt("a", "请问，" + TWIN[8:]), prompt("b", texts[2])]
  assert prompt_sets.contaminated(prompts, [TWIN]) == [("a", TWIN)]


def test_balanced_takes_cells_by_turns(bundled):
  chosen = prompt_sets.balanced(bundled, 280, 3)
  cells = collections.Counter((p.category, p.expected) for p in chosen)
  assert len(cells) == 28 and set(cells.values()) == {10}
  assert prompt_sets.balanced(bundled[::-1], 280, 3) == chosen
  assert prompt_sets.balanced(bundled, 31, 3) == chosen[:31]
  assert prompt_sets.balanced(bundled, 280, 4) != chosen
  everything = prompt_sets.balanced(bundled, len(bundled), 0)
  assert sorted(p.id for p in everything) == sorted(p.id for p in bundled)
  assert prompt_sets.balanced(bundled, None, 0) == everything
  assert len(prompt_sets.balanced(bundled[:2], 3, 0)) == 2


@pytest.mark.parametrize("metadata", ["none", "told", "noisy:0", "noisy:1"])
def test_what_is_told_of_a_prompt_is_no_more_than_asked_for(metadata):
  for expected in EXPECTED:
    for i in range(20):
      own = prompt(f"p{i}", "How?", "s", expected=expected, clauses=("WE-D1",))
      seen = prompt_sets.with_metadata(own, metadata)
      assert seen.clauses == () and seen.turns == own.turns and seen.id == own.id
      if metadata == "none":
        assert seen.expected == ""
      else:
        assert (seen.expected == expected) == (metadata != "noisy:1")
        assert seen.expected in EXPECTED


def test_noise_is_wrong_for_its_share_of_prompts_and_always_the_same_ones():
  some = [prompt(f"p{i}", "How?", expected=EXPECTED[i % 3]) for i in range(3000)]
  seen = [prompt_sets.with_metadata(p, "noisy:0.2").expected for p in some]
  assert seen == [prompt_sets.with_metadata(p, "noisy:0.2").expected for p in some]
  wrong = [p.expected != s for p, s in zip(some, seen, strict=True)]
  assert 0.17 < sum(wrong) / len(wrong) < 0.23  # 4 standard errors
  pairs = collections.Counter(
    (p.expected, s) for p, s, w in zip(some, seen, wrong, strict=True) if w
  )
  assert len(pairs) == 6 and min(pairs.values()) > 60  # each in place of each
  more = [
    prompt_sets.with_metadata(p, "noisy:0.4").expected != p.expected for p in some
  ]
  assert all(b for a, b in zip(wrong, more, strict=True) if a)  # and some besides


def test_order_visits_each_row_once_an_epoch_and_goes_on_anywhere():
  epochs = [prompt_sets.order(50, seed=1, epoch=epoch) for epoch in range(3)]
  assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert prompt_sets.order(50, seed=2, epoch=0) != epochs[0]
  flat = [row for epoch in epochs for row in epoch]
  for start, count in ((0, 150), (37, 20), (49, 2), (149, 1), (60, 0)):
    assert prompt_sets.visits(50, start, count, seed=1) == flat[start : start + count]
  for bad in ((0, 0, 1, 1), (5, -1, 1, 1), (5, 0, 1, -1)):
    with pytest.raises(ValueError, match="wanted n > 0"):
      prompt_sets.visits(*bad[:3], seed=bad[3])


# Other sources

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
    ({}, [GOOD | {"split": "test"}], r":1: wanted split as one of train, eval"),
    ({}, [GOOD | {"clauses": "A-D1"}], r":1: wanted clauses as a list of ids"),
    ({}, [GOOD | {"clauses": ["A-D1", 2]}], r":1: wanted clauses as a list of ids"),
    ({}, [GOOD | {"category": ["a"]}], r":1: wanted text as category, got \['a'\]"),
    ({}, [GOOD | {"category": ""}], r":1: wanted a category"),
    ({}, [GOOD | {"id": "x"}] * 2, r":2: id 'x' is also that of .*p.jsonl:1"),
    ({}, [{"category": "a", "expected": "comply"}], r":1: wanted a prompt, or turns"),
    ({}, [GOOD | {"prompt": " "}], r":1: wanted a prompt, or turns"),
    ({}, [GOOD | {"turns": "hello"}], r":1: turns: wanted turns .*got 'hello'"),
    ({}, [GOOD | {"turns": []}], r":1: turns: wanted turns"),
    ({}, [GOOD | {"turns": [{"role": "bot", "content": "x"}]}], r"turn 1 of 1 .bot."),
    (
      {"turns": "chat"},
      [GOOD | {"chat": [{"role": "assistant", "content": "x"}]}],
      r":1: chat, turn 1 of 1 .assistant.: wanted a user's turn as the last",
    ),
    (
      {},
      [GOOD | {"turns": [{"role": "user", "content": "x"}, {"role": "tool"}]}],
      r":1: turns, turn 2 of 2 .tool.: wanted a role",
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
    (
      {},
      [GOOD | {"conversations": [{"from": "bing", "value": "x"}], "prompt": None}],
      r":1: conversations, turn 1 of 1 .bing.: wanted a role",
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
  for left, message in (("none", "No such file"), ("own", "data-")):
    next((tmp_path / "own").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=f"hf:.*{left}: wanted a folder.*{message}"):
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


def test_tfds_by_name(bundled, cache):
  (folder,) = [path for path in pathlib.Path(cache).iterdir() if path.is_dir()]
  want = [prompt for prompt in bundled if prompt.split == "eval"]
  columns = {"split": "=eval"}
  got = prompt_sets.load("tfds:dalign_prompts:eval", columns, str(folder))
  assert [(p.id, p.turns, p.expected) for p in got] == [
    (p.id, p.turns, p.expected) for p in want
  ]
  part = prompt_sets.load("tfds:dalign_prompts:eval[:3]", columns, str(folder))
  assert [p.id for p in part] == [p.id for p in want[:3]]
  with pytest.raises(
    ValueError, match=r"wanted one of its splits, \['eval', 'train'\]"
  ):
    prompt_sets.load("tfds:dalign_prompts:test", columns, str(folder))
