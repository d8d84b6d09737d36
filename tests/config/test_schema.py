"""The JSON Schema of configs agrees with what builds, and a run can be said in JSON."""

import copy
import json
import subprocess

import jsonschema
import pytest

from dalign import main
from dalign.config import convert
from dalign.config import explain
from dalign.config.schema import Config
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import config_file
from tests.helpers import python
from tests.helpers import read_flags

SCHEMA = json.loads(json.dumps(explain.schema(Config)))
CHECK = jsonschema.Draft202012Validator(SCHEMA)
ALL = {
  "quickstart": (),
  **{f"quickstart:{name}": (name,) for name in config_file("quickstart").SIZES},
  "tiny": (),
  "world": (),
  **{f"world:{name}": (name,) for name in ("short", *config_file("world").VERSIONS)},
  **{f"large:{name}": (name,) for name in config_file("large").PLACES},
}


def nested(name: str) -> dict:
  """A config as nested JSON."""
  node = config_file(name.split(":")[0]).get_config(*ALL[name]).to_dict()
  return json.loads(json.dumps(node))


def paths(value, path=()):
  """The paths of all that nested JSON holds."""
  for key, inner in value.items() if isinstance(value, dict) else ():
    yield (*path, key)
    yield from paths(inner, (*path, key))


def changed(value, path, new):
  """Nested JSON with another value at a path; `...` takes it out."""
  value = copy.deepcopy(value)
  place = value
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = new
  if new is ...:
    del place[path[-1]]
  return value


def test_the_schema_is_one_of_its_draft():
  jsonschema.Draft202012Validator.check_schema(SCHEMA)
  assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
  for part in (SCHEMA, *SCHEMA["$defs"].values()):
    own = {key: value for key, value in part["properties"].items() if key != "$schema"}
    assert own and all(value["description"] for value in own.values())
    assert part["additionalProperties"] is False


@pytest.mark.parametrize("name", ALL)
def test_every_config_passes(name):
  CHECK.validate(nested(name) | {"$schema": "dalign.schema.json"})


def test_some_values_of_a_recipe_pass():
  CHECK.validate({"recipe": "quickstart", "rl": {"steps": 3, "temperature": 1}})


@pytest.mark.parametrize(
  ("path", "new"),
  [
    (("recipe",), ...),
    (("recipe",), 1),
    (("rl", "stepz"), 3),
    (("rl", "steps"), "3"),
    (("rl", "steps"), 0),
    (("rl", "steps"), 1.5),
    (("rl", "temperature"), 0),
    (("rl", "judge_errors"), 1.01),
    (("rl", "start"), "rl"),
    (("rl", "expected"), ["answer"]),
    (("rl", "objective", "kl"), "k1"),
    (("sft", "worked"), 1),
    (("sft", "optimizer", "warmup_share"), -0.1),
    (("eval", "arms"), "sft"),
    (("eval", "worst"), 0),
    (("data", "columns"), {"id": 3}),
    (("model", "random"), {"wdth": 3}),
    (("model", "random"), {"width": 0}),
    (("world",), 3),
    (("seed",), 2**31),
    (("compute",), None),
  ],
)
def test_what_is_no_config_fails(path, new):
  node = nested("quickstart")
  assert CHECK.is_valid(node)
  assert not CHECK.is_valid(changed(node, path, new))


VALUES = [None, True, 0, 1, -1, 0.5, 2.5, 2**40]
VALUES += ["", "all", [], ["x"], [1], {}, {"a": 1}]


def test_what_builds_passes():
  """Every value of the world's arms made another: the schema asks for no more."""
  node, tried, built = nested("world:ablation"), 0, 0
  for at, path in enumerate(paths(node)):
    if path[:2] in (("model", "random"), ("ablation", "arms")):
      continue  # mappings, which `build` leaves to those that read them
    for new in (VALUES[(at + i) % len(VALUES)] for i in (0, 5, 10)):
      other, tried = changed(node, path, new), tried + 1
      try:
        convert.build(Config, other)
      except ValueError:
        continue
      built += 1
      assert CHECK.is_valid(other), (path, new)
  assert tried > 400 and built > 60


# --- configs/from_json.py ---


def ran(file, *more: str) -> subprocess.CompletedProcess:
  """The listing of a run in JSON, from its folder."""
  place = ROOT / "configs" / "from_json.py"
  options = ["--mode=config", f"--config={place}:{file.name}", *more]
  env = clean_environment() | {"PYTHONPATH": str(ROOT)}
  return python("-m", "dalign.main", *options, cwd=file.parent, env=env)


RUN = """{
  "$schema": "dalign.schema.json",
  "recipe": "quickstart",
  "rl": {
    "steps": 3, "temperature": 1,
    "expected": ["refuse"],
    "batch": {"rows": 4}
  },
  "generate": {"prompts": {"refuse": 7}},
  "data": {"columns": {"id": "name"}}
}
"""


def test_a_run_in_json_is_its_recipe_but_for_what_it_says(tmp_path):
  file = tmp_path / "mine.json"
  file.write_text(RUN)
  CHECK.validate(json.loads(RUN))
  done = ran(file, "--config.rl.temperature=0.5", "--config.seed=4")
  assert (done.returncode, done.stderr) == (0, "")
  first, *lines = done.stdout.splitlines()
  assert first == "# recipe: quickstart.v5; changed: 8 values"
  found = dict(line.split("=", 1) for line in lines)
  assert found["rl.steps"] == "3  # recipe: 8"
  assert found["rl.temperature"] == "0.5  # recipe: 0.8"
  assert found["rl.expected"].startswith('"(\'refuse\',)"  # recipe: "(')
  assert found["rl.batch.rows"] == "4  # recipe: 6"
  assert found["generate.prompts.refuse"] == "7  # recipe: 1000000"
  assert found["data.columns.id"] == "name  # recipe: has none"
  assert found["seed"] == "4  # recipe: 0"
  assert found["rl.batch.micro"] == "11"
  assert found["generate.prompts.comply"] == "1000000"


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ('{"recipe": "tiny", "rl": {"stepz": 3}}', "config.rl.stepz: no such field; did"),
    ('{"recipe": "tiny", "rl": {"steps": "3"}}', "config.rl.steps: wanted <class"),
    ('{"recipe": "tiny", "rl": {"steps": 0}}', "config.rl.steps: wanted more than 0"),
    ('{"recipe": "tiny", "rl": 3}', "config.rl: wanted names and their values, got 3"),
    ('{"recipe": "tiny", "seed": {"a": 1}}', "config.seed: wanted <class 'int'>"),
    (
      '{"rl": {"steps": 3}}',
      "recipe: wanted one of large, quickstart, tiny, world, got",
    ),
    ('{"recipe": "../x"}', "recipe: wanted one of large, quickstart, tiny, world, got"),
    ('{"recipe": "large:x"}', "wanted configs/large.py:qwen3_8b|"),
    ('{"recipe": "quickstart.v0"}', "recipe: wanted quickstart.v0, configs/quickstart"),
    ('{"recipe": "tiny",}', "line 1 column 19"),
    ('{"recipe": "tiny", "seed": 1, "seed": 2}', "the key 'seed' more than once"),
    ("[1]", "wanted names and their values, got [1]"),
  ],
)
def test_an_error_names_the_file_and_the_key(tmp_path, text, wanted):
  file = tmp_path / "mine.json"
  file.write_text(text)
  with pytest.raises(ValueError) as caught:
    config_file("from_json").get_config(str(file))
  assert str(caught.value).startswith(f"{file}: ") and wanted in str(caught.value)


def test_a_version_of_a_recipe_can_be_asked_for(tmp_path):
  file = tmp_path / "mine.json"
  large = config_file("large").get_config().recipe
  ablation = config_file("world").get_config("ablation").recipe
  assert large.startswith("large:qwen3_8b.v") and ablation.startswith(
    "world:ablation.v"
  )
  for said in (large, ablation):
    file.write_text(json.dumps({"recipe": said}))
    assert config_file("from_json").get_config(str(file)).recipe == said


@pytest.mark.parametrize(
  ("name", "wanted"),
  [
    ("mine.json", "dalign: mine.json: config.rl.stepz: no such field; did you mean"),
    ("none.json", "dalign: none.json: [Errno 2] No such file or directory"),
  ],
)
def test_an_error_is_one_line_and_exit_code_2(tmp_path, name, wanted):
  (tmp_path / "mine.json").write_text('{"recipe": "tiny", "rl": {"stepz": 3}}')
  done = ran(tmp_path / name)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(wanted) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("config", ["tiny.py", "from_json.py:mine.json"])
def test_bad_flags_are_one_line(tmp_path, config):
  (tmp_path / "mine.json").write_text('{"recipe": "tiny"}')
  wanted = {
    "--config.sft.epoch=3": 'config.sft.epoch: no such field. Did you mean "epochs"',
    "--config.stages=generat": "did you mean 'generate'",
    "--config.rl.samples=1": "at least 2",
    "--config.rl.expected=('refuse','answer')": "wanted one of refuse",
    "--config.rl.reward=rubric": "without which the rubric is mute",
    "--config.filter.metadata=noisy:2": "wanted a text of the form none|told|noisy:",
    "--nope=1": "nope",
  }
  lines = [["--workdir=w", f"--config=configs/{config}", x] for x in wanted]
  for said, part in zip(read_flags(lines, tmp_path), wanted.values(), strict=True):
    assert said.startswith("ValueError: ") and part in said and "\n" not in said


def test_columns_are_mapped_by_flags(tmp_path):
  file = tmp_path / "mine.json"
  file.write_text('{"recipe": "tiny", "data": {"columns": {"id": "name"}}}')
  done = ran(
    file,
    "--config.data.columns.prompt=question",
    "--config.data.columns.category==benign",
    "--config.data.columns.id=key",
    "--config.rl.steps=3",
  )
  assert done.returncode == 0, done.stderr
  for wanted in ("id=key", "prompt=question", "category==benign"):
    assert f"\ndata.columns.{wanted}" in done.stdout
  assert "\nrl.steps=3" in done.stdout
  tiny = f"--config={ROOT}/configs/tiny.py"
  config = main._read_config([tiny, "--config.data.columns.prompt=my question"])
  assert config.data.columns == {"prompt": "my question"}


@pytest.mark.parametrize("given", ["base,sft", "base, sft", "('base','sft')"])
def test_several_names_are_given_with_commas(given):
  tiny = f"--config={ROOT}/configs/tiny.py"
  config = main._read_config([tiny, f"--config.eval.arms={given}"])
  assert config.eval.arms == ("base", "sft")


def test_a_config_file_that_is_not_there_is_named(tmp_path):
  (tmp_path / "mine.py").write_text("")
  done = python("-m", "dalign.main", f"--config={tmp_path}/mien.py")
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  wanted = (
    f"dalign: '{tmp_path}/mien.py': wanted a config file, found none; did you mean"
  )
  assert done.stderr.startswith(wanted) and f"{tmp_path}/mine.py" in done.stderr


def test_the_mode_prints_the_schema_without_a_config():
  done = python("-m", "dalign.main", "--mode=schema")
  assert (done.returncode, done.stderr) == (0, "")
  assert json.loads(done.stdout) == SCHEMA
