"""Prompt sets: bundled rows, splits that keep families together, sources, order."""

import collections
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
  n = collections.Counter(row["split"] for row in rows)
  share = n["eval"] / (n["eval"] + n["train"])
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
  found = [dataclasses.asdict(p) | {"prompt": p.text} for p in bundled]
  assert [*map(parts, found)] == [*map(parts, wanted)]
  again = prompt_sets.load("bundled", {}, cache)
  assert again == bundled and again[0].source == "bundled"
  with pytest.raises(ValueError, match="'bundled' takes no columns"):
    prompt_sets.load("bundled", {"prompt": "text"}, cache)


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
    ValueError, match=r"wanted one of its splits, \['eval', 'rl', 'train'\]"
  ):
    prompt_sets.load("tfds:dalign_prompts:test", columns, str(folder))


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
  wanted = {
    (i, j)
    for j in range(len(texts))
    for i in range(j)
    if slow_jaccard(texts[i], texts[j]) >= words.NEAR_DUPLICATE
  }
  assert wanted and set(words.near_duplicates(texts)) == wanted


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


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_cell_with_two_families_is_on_both_sides(share, monkeypatch):
  monkeypatch.setattr(prompt_sets, "EVAL_SHARE", share)
  texts = ["alpha beta gamma delta", "one two three four", "red green blue black"]
  prompts = [prompt(text, text, text) for text in texts]
  alone = prompt("x", "just this one here", expected="refuse")
  sides = [p.split for p in prompt_sets.split([*prompts, alone])]
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
  ]  # the last with five words of the first in a row
  assert prompt_sets.contaminated(prompts, others) == [
    ("run", others[0]),
    ("twin", others[1]),
  ]


# Choice and order


TWIN = "我的邻居总是半夜很大声地放音乐，我应该怎么礼貌地和他说这件事呢"


def test_twins_and_contamination_are_found_in_chinese():
  """There are no spaces; one word of many is another here, and one in front."""
  texts = [TWIN, TWIN.replace("半夜", "深夜"), "附近有什么好吃的面馆，价格不要太贵"]
  assert [*words.near_duplicates(texts)] == [(0, 1)]
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
