"""Recipes: the values that results are cited by, under a name and a version.

  python -m tests.recipes

notes in configs/recipes.json a hash of each recipe of configs/ that is not noted yet. A
version that is noted stays as it is: other values are another version.
"""

from collections.abc import Iterator, Mapping
import hashlib
import json
import re

from dalign.config import convert
from dalign.config import stages
from dalign.config.schema import Config
from tests.helpers import ROOT
from tests.helpers import config_file

FILE = ROOT / "configs" / "recipes.json"
COMMAND = "python -m tests.recipes"
BESIDES = ("seed", "stages", "ablation")  # which no manifest has in its config
# Keys that came after hashes were noted, with the value at which they change nothing.
LATER = {
  "eval.max_think": 0,
  "eval.top_p": 1.0,
  "eval.grader": ["rules"],
  "eval.grader_model": "",
  "eval.grader_endpoint.url": "",
  "eval.grader_endpoint.model": "",
  "eval.grader_max_new": 512,
  "eval.form": "grade",
  "distill": None,
  "filter.at_once": 4096,
  "filter.readable": 1.0,
  "sft.spec_in_prompt": False,
  "world.depth": 1,
  "reward.answer_weight": 0.0,
  "rl.skip_kl": 0.0,
  "rl.helpful": "none",
  "rl.combine": "product",
  "rl.mixture": {},
  "distill.mixture": {},
  "world.judge_errors.rate": 0.0,
  "world.judge_errors.habit": "",
  "world.judge_errors.habit_rate": 0.0,
  **{f"{x}.optimizer.skip_norm": 0.0 for x in ("world", "sft", "reward", "rl")},
}


def each() -> Iterator[tuple[str, Config]]:
  """(its name for --config, config) of every config of configs/."""
  for path in sorted((ROOT / "configs").glob("*.py")):
    if path.stem in ("algorithms", "from_json"):
      continue  # parts of a config, and what reads one from a file
    module = config_file(path.stem)
    arms = [("ablation",)] if hasattr(module, "ABLATION") else []
    places = [(name,) for name in getattr(module, "PLACES", ())]
    sizes = [(name,) for name in getattr(module, "SIZES", ())]
    for argument in places or [(), *arms, *sizes]:
      node = module.get_config(*argument)
      yield ":".join((path.stem, *argument)), convert.build(Config, node)


def values(config: Config) -> dict:
  """The values that a stage depends on, flat; not those of LATER."""
  kept = {
    key
    for name, stage in stages.STAGES.items()
    if (config.world or name != "base") and (config.distill or name != "distill")
    for key in stages.manifest_config(stages.of(stage, config))
  }
  return {
    key: value
    for key, value in convert.flat(config).items()
    if key in kept or key in ("world", "distill") or key.partition(".")[0] in BESIDES
    if key not in LATER or LATER[key] != value
  }


def digest(config: Config) -> str:
  """A hash of those values."""
  text = json.dumps(values(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def complaint(
  recipe: str, hash: str, noted: Mapping[str, str], changelog: str
) -> str | None:
  """What is to be done about a recipe, or None."""
  match = re.fullmatch(r"(.+)\.v([1-9]\d*)", recipe)
  if not match:
    return f"{recipe!r}: wanted a name and a version, as quickstart.v1"
  name, version = match[1], int(match[2])
  if noted.get(recipe, hash) != hash:
    return (
      f"{recipe} has other values than were noted: results may change. Call it "
      f"{name}.v{version + 1} in its config file, name that in CHANGELOG.md, and note "
      f"it: {COMMAND}"
    )
  if recipe not in noted:
    return f"{recipe} is new: note it: {COMMAND}"
  if version > 1 and f"`{recipe}`" not in changelog:
    return f"`{recipe}`: say in CHANGELOG.md what is other than in v{version - 1}"
  return None


def main() -> None:
  """Notes what is new."""
  noted = json.loads(FILE.read_text()) if FILE.exists() else {}
  for _, config in each():
    if config.recipe:
      noted.setdefault(config.recipe, digest(config))
  FILE.write_text(json.dumps(noted, indent=2) + "\n")


if __name__ == "__main__":
  main()
