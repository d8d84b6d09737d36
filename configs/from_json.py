"""A run as JSON: a recipe, and what is other than in it.

  python -m dalign.main --config=configs/from_json.py:my_run.json --workdir=runs/mine

with in my_run.json, say,

  {"$schema": "dalign.schema.json", "recipe": "quickstart", "rl": {"steps": 3}}

The recipe is a file of this folder, as "large:qwen3_8b" with what that takes, or one
version of it, as "quickstart.v1". Objects are merged into the recipe's; all else takes
the place of what was there. `python -m dalign.main --mode=schema > dalign.schema.json`
makes the schema, by which editors complete, explain and check. Flags go on top.
"""

import json
import pathlib

import ml_collections

from dalign.config import convert
from dalign.config.schema import Config
from dalign.data import bundled


def _recipe(said) -> ml_collections.ConfigDict:
  """The config of a recipe; ValueError where there is none, or not in that version."""
  name, _, version = said.partition(".") if isinstance(said, str) else ("", "", "")
  c = bundled.recipe(name)
  if version and c.recipe != said:
    stem = name.partition(":")[0]
    raise ValueError(f"recipe: wanted {said}, configs/{stem}.py is {c.recipe!r} now")
  return c


def _plain(value):
  """A value of JSON as config files have it: tuples in place of lists."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  return tuple(map(_plain, value)) if isinstance(value, list) else value


def _put(node: ml_collections.ConfigDict, values: dict) -> None:
  """Merges values into a config."""
  for key, value in values.items():
    old = node.get(key)
    if isinstance(old, ml_collections.ConfigDict) and isinstance(value, dict):
      _put(old, value)
    else:
      node[key] = _plain(value)


def get_config(file: str = "") -> ml_collections.ConfigDict:
  """The config of a JSON file; ValueError names the file and the key."""
  if not file:
    raise ValueError("wanted configs/from_json.py:FILE, a file of JSON")
  try:
    content = pathlib.Path(file).read_text(encoding="utf-8")
    values = json.loads(content, object_pairs_hook=convert.unique)
    if not isinstance(values, dict):
      raise ValueError(f"wanted names and their values, got {values!r:.80}")
    c = _recipe(values.pop("recipe", None))
    values.pop("$schema", None)
    with c.ignore_type():
      _put(c, values)
    convert.build(Config, c)
  except (OSError, ValueError) as error:
    raise ValueError(f"{file}: {error}") from error
  return c
