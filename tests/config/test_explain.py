"""Every field of a config is described, and what is printed can be given back."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

from dalign.config import convert
from dalign.config import explain
from dalign.config import model
from dalign.config import on_policy
from dalign.config import replies
from dalign.config import schema
from dalign.config import training
from dalign.config.model import ModelConfig
from dalign.config.schema import Config
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import config_file
from tests.helpers import tiny


def said(*options: str, start: str = "python -m dalign.main") -> list[str]:
  """The lines of a command, whose words bash reads."""
  line = " ".join([start.replace("python", sys.executable, 1), *options])
  done = subprocess.run(
    ["bash", "-c", line],
    cwd=ROOT,
    env=clean_environment(),
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (done.returncode, done.stderr) == (0, ""), done.stderr
  return done.stdout.splitlines()


# --- Descriptions ---


def test_all_of_config_is_reached():
  own = {
    cls
    for module in (model, on_policy, replies, schema, training)
    for _, cls in inspect.getmembers(module, dataclasses.is_dataclass)
  }
  assert own == set(explain.parts(Config)) and ModelConfig in own


@pytest.mark.parametrize("cls", explain.parts(Config), ids=lambda c: c.__name__)
def test_every_field_is_described_and_nothing_else(cls):
  texts = explain.fields(cls)
  assert [*texts] == [field.name for field in dataclasses.fields(cls)]
  assert all(len(text) > 8 and not text.endswith(",") for text in texts.values())
  assert explain.prose(cls)


@dataclasses.dataclass
class Inner:
  """What an inner part is.

  a: one.
  """

  a: int


@dataclasses.dataclass
class Outer:
  """What it is: a sentence
  of two lines.

  x, y: tokens of these,
    and more.
  z: "q: not a field", in words.
  """

  x: int
  y: int
  z: str
  inner: Inner
  maybe: Inner | None


def test_a_docstring_is_read_entry_by_entry():
  assert explain.prose(Outer) == "What it is: a sentence of two lines."
  assert explain.fields(Outer) == {
    "x": "x, y: tokens of these, and more.",
    "y": "x, y: tokens of these, and more.",
    "z": '"q: not a field", in words.',
    "inner": "What an inner part is.",
    "maybe": "What an inner part is.",
  }
  assert explain.text(Outer, "inner.a") == "one."


@pytest.mark.parametrize(
  ("doc", "wanted"),
  [
    ("Words.\n\n  a: one.\n", "Made.b: its docstring says nothing"),
    ("Words.\n\n  a, b: both.\n  c: other.\n", "Made has no c"),
    ("Words.\n\n  a: one.\n  b: two.\n  a: three.\n", "Made.a is described twice"),
  ],
)
def test_a_field_without_words_and_words_without_a_field_are_found(doc, wanted):
  made = dataclasses.make_dataclass(
    "Made", [("a", int), ("b", int)], namespace={"__doc__": doc}
  )
  with pytest.raises(ValueError, match=wanted):
    explain.fields(made)


# --- What a field may be stands once, in its type ---


@pytest.mark.parametrize(
  ("changes", "wanted"),
  [
    ({"compute": {"dtype": "float16"}}, "config.compute.dtype: wanted one of float32"),
    ({"rl": {"steps": 0}}, "config.rl.steps: wanted more than 0, got 0"),
    ({"rl": {"judge_errors": 1.5}}, r"config.rl.judge_errors: wanted a share in \[0"),
    ({"eval": {"worst": 0.0}}, r"config.eval.worst: wanted a share in \(0, 1\]"),
    ({"lora": {"leaves": ("q", "x")}}, r"config.lora.leaves\[1\]: wanted one of q, k"),
    ({"data": {"columns": {"id": 3}}}, "config.data.columns.id: wanted .*str"),
    ({"seed": -1}, r"config.seed: wanted 0 to 2\^31 - 1, got -1"),
  ],
)
def test_values_outside_of_their_type_are_refused_by_name(changes, wanted):
  with pytest.raises(ValueError, match=wanted):
    convert.changed(tiny(), changes)


def test_a_part_that_is_made_by_hand_is_checked_too():
  with pytest.raises(ValueError, match="RLConfig.start: wanted one of base, sft, got"):
    dataclasses.replace(tiny().rl, start="rl")


# --- The listing ---


def test_values_are_listed_as_flags_take_them_back():
  """All values of a listing, as flags to the same config, make the same listing."""
  listed = said("--mode=config", "--config=configs/world.py:ablation")
  assert listed[0] == "# recipe: world:ablation.v5"
  assert len(listed) > 300 and not any(line.endswith("=None") for line in listed)
  given = [f"--config.{line}" for line in listed[1:]]
  assert said("--mode=config", "--config=configs/world.py:ablation", *given) == listed


@pytest.mark.parametrize(
  "value",
  [
    *("", "a", "a b", "it's", '"$HOME" `x` \\ !', "<think>\n\t'é\\n'", "~/x"),
    "\x1b[0m",
    *(True, 0.1, 1e-6, -1, (), ("a",), ("a", 'b"c'), {}, {"a": {"b": 1}}),
  ],
)
def test_a_value_goes_through_bash(value):
  written = explain.flag(value)
  assert written.isprintable()
  done = subprocess.run(
    ["bash", "-c", f"printf %s {written}"], capture_output=True, check=True
  )
  wanted = value if isinstance(value, str) else repr(value)
  assert done.stdout.decode() == (wanted.lower() if value is True else wanted)


def test_what_is_other_than_in_the_recipe_is_said():
  first, *lines = said(
    "--mode=config", "--config=configs/quickstart.py", "--config.rl.steps=3"
  )
  assert first == "# recipe: quickstart.v5; changed: rl.steps"
  quickstart = convert.build(Config, config_file("quickstart").get_config())
  assert len(lines) == len([*explain.values(quickstart)])
  assert all(len(line) <= explain.WIDTH for line in lines)
  wanted = f"rl.steps=3  # recipe: {quickstart.rl.steps}"
  assert [line for line in lines if "#" in line] == [wanted]
  described = said("--mode=config", "--config=configs/quickstart.py", "--describe")
  at = next(i for i, x in enumerate(described) if x.startswith("rl.max_new="))
  assert described[at + 1] == "    tokens of a rollout at the most."
  assert all(len(line) <= explain.WIDTH for line in described)


def test_what_one_of_two_configs_has_alone_is_said():
  base = convert.changed(
    tiny(), {"data": {"columns": {"id": "name"}}, "recipe": "a.v1"}
  )
  config = convert.changed(base, {"data": {"columns": {"prompt": "text"}}, "seed": 9})
  first, *lines = explain.listing(config, base).splitlines()
  changed = "seed, data.columns.prompt, data.columns.id"
  assert first == f"# recipe: a.v1; changed: {changed}"
  assert [line for line in lines if "#" in line] == [
    "seed=9  # recipe: 0",
    "data.columns.prompt=text  # recipe: has none",
    "# only the recipe: data.columns.id=name",
  ]


@pytest.mark.parametrize(
  ("recipe", "before"),
  [
    ("quickstart.v5", "8"),  # what configs/ has of that name
    ("quickstart.v1", "5"),  # no longer there, so the file itself
    ("quickstart:mine.v1", "5"),
    ("mine.v1", "5"),
    ("", "5"),
  ],
)
def test_the_recipe_is_what_a_config_of_ones_own_is_held_against(
  tmp_path, recipe, before
):
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import quickstart\n\ndef get_config():\n"
    "  c = quickstart.get_config()\n"
    f"  c.recipe, c.rl.steps = {recipe!r}, 5\n  return c\n"
  )
  listed = said("--mode=config", f"--config={file}", "--config.rl.steps=7")
  assert f"rl.steps=7  # recipe: {before}" in listed


def test_a_reader_that_has_enough_is_no_error():
  assert said("--mode=schema", "| true") == []


def test_each_value_of_a_config_has_a_text():
  for name in ("tiny", "world", "large"):
    config = convert.build(Config, config_file(name).get_config())
    for path, _ in explain.values(config):
      assert explain.text(Config, path)
