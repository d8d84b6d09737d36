"""A recipe's values stay those that were noted for its version: `tests/recipes.py`."""

import json
import re

import pytest

from dalign.config import convert
from tests import recipes
from tests.helpers import ROOT
from tests.helpers import tiny

NOTED = json.loads(recipes.FILE.read_text())
ALL = dict(recipes.each())
CITED = {name: config for name, config in ALL.items() if name != "tiny"}


@pytest.mark.parametrize("name", CITED)
def test_a_recipe_is_what_was_noted(name):
  config, changelog = ALL[name], (ROOT / "CHANGELOG.md").read_text()
  said = recipes.complaint(config.recipe, recipes.digest(config), NOTED, changelog)
  assert said is None, said


def test_each_config_that_is_cited_has_a_recipe_of_its_own():
  assert len({config.recipe for config in CITED.values()}) == len(CITED) > 8
  for name, config in CITED.items():
    assert config.recipe.rpartition(".v")[0] == name
  assert ALL["tiny"].recipe == ""


@pytest.mark.parametrize(
  ("recipe", "noted", "changelog", "wanted"),
  [
    ("a.v1", {"a.v1": "x"}, "", None),
    ("a.v2", {"a.v1": "y", "a.v2": "x"}, "`a.v2`: other prompts", None),
    ("a.v1", {"a.v1": "y"}, "", "results may change. Call it a.v2 .*-m tests.recipes"),
    ("a.v9", {"a.v9": "y"}, "`a.v9`", "Call it a.v10 in"),
    ("a.v1", {}, "", "a.v1 is new: note it: python -m tests.recipes"),
    ("a.v2", {"a.v2": "x"}, "`a.v1`", "`a.v2`: say in CHANGELOG.md"),
    ("a", {"a": "x"}, "", "'a': wanted a name and a version"),
  ],
)
def test_what_is_to_be_done_is_said(recipe, noted, changelog, wanted):
  said = recipes.complaint(recipe, "x", noted, changelog)
  assert said is None if wanted is None else re.search(wanted, said)


@pytest.mark.parametrize(
  ("change", "same"),
  [
    ({"rl": {"steps": 3}}, False),
    ({"seed": 1}, False),
    ({"stages": "rl"}, False),
    ({"eval": {"max_think": 8}}, False),
    ({"recipe": "mine.v1"}, True),
    ({"rl": {"stop_kl": 1.0}}, True),
    ({"mesh": {"fsdp": 2}}, True),
    ({"plan": {"price": 3.0}}, True),
    ({"start_over": True}, True),
  ],
)
def test_a_hash_is_of_what_is_made(change, same):
  config = tiny()
  changed = convert.changed(config, change)
  assert (recipes.digest(changed) == recipes.digest(config)) == same


def test_a_key_that_came_later_and_changes_nothing_changes_no_hash(monkeypatch):
  config = tiny()
  before = recipes.digest(config)
  monkeypatch.setitem(recipes.LATER, "rl.samples", 4)
  assert "rl.samples" not in recipes.values(config)
  monkeypatch.setitem(recipes.LATER, "rl.samples", 5)
  assert recipes.digest(config) == before


def test_noting_leaves_what_is_noted(tmp_path, monkeypatch):
  file = tmp_path / "recipes.json"
  file.write_text('{"quickstart.v1": "old"}')
  monkeypatch.setattr(recipes, "FILE", file)
  recipes.main()
  now = {name: NOTED[name] for config in ALL.values() if (name := config.recipe)}
  assert json.loads(file.read_text()) == now | {"quickstart.v1": "old"}
