"""Whatever stands in a prompt set, a flag or a config: one clear error, or none.

DALIGN_FUZZ=k tries k times as many examples.
"""

import copy
import json

from absl import flags
from hypothesis import given
from hypothesis import strategies as st
import pytest

from dalign import main
from dalign.config import convert
from dalign.config.schema import Config
from dalign.data import prompt_sets
from tests.helpers import ROOT
from tests.helpers import config_file
from tests.helpers import examples
from tests.helpers import tiny

TEXT = st.one_of(
  st.text(max_size=20),
  st.sampled_from(
    ["", " ", "user", "comply", "refuse", "train", "nan", "=x"]
    + ["../x", "\x00", "\ud800"]
  ),
)
JSON = st.recursive(
  st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXT),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)
  ),
  max_leaves=8,
)


def sound(do):
  """What `do` returns, or the one line of its ValueError; all else is a failure."""
  try:
    return do()
  except ValueError as error:
    assert str(error) and "\n" not in str(error), repr(str(error))
    return str(error)


def places(value, path=()):
  """The paths of all that a JSON value holds, itself included."""
  yield path
  if isinstance(value, dict | list):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
      yield from places(inner, (*path, key))


def changed(value, path, new):
  """A JSON value with another at a path; `...` takes it out."""
  if not path:
    return None if new is ... else new
  value = copy.copy(value)
  inside = changed(value[path[0]], path[1:], new)
  if len(path) == 1 and new is ...:
    value.pop(path[0])
  else:
    value[path[0]] = inside
  return value


# --- Prompt sets ---

TURNS = st.lists(
  st.one_of(
    st.fixed_dictionaries(
      {"role": st.one_of(st.sampled_from(["user", "assistant"]), JSON), "content": TEXT}
    ),
    JSON,
  ),
  max_size=3,
)
ROW = st.fixed_dictionaries(
  {},
  optional={
    "prompt": st.one_of(TEXT, JSON),
    "turns": st.one_of(TURNS, JSON),
    "category": st.one_of(st.just("benign"), JSON),
    "expected": st.one_of(st.just("comply"), JSON),
    "kind": st.one_of(st.just("capability"), JSON),
    "split": st.one_of(st.just("eval"), JSON),
    "id": JSON,
    "answer": JSON,
    "scenario": JSON,
    "more": JSON,
  },
)
LINE = st.one_of(
  ROW.map(lambda row: json.dumps(row).encode()),
  JSON.map(lambda row: json.dumps(row).encode()),
  st.binary(max_size=30),
  st.integers(1, 40).map(lambda n: b"[" * 50_000 * n),
  st.integers(1, 40).map(lambda n: b"9" * 500 * n),
)
COLUMNS = st.dictionaries(
  st.one_of(st.sampled_from(prompt_sets.FIELDS), TEXT),
  st.one_of(st.sampled_from(["=benign", "=comply", "more", "prompt"]), TEXT),
  max_size=3,
)


def well_formed(prompts) -> None:
  """What a stage may count on."""
  for prompt in prompts:
    fields = (prompt.id, prompt.category, prompt.scenario, prompt.answer, prompt.text)
    assert all(isinstance(value, str) for value in fields) and prompt.text.strip()
    assert prompt.split in prompt_sets.SPLITS and prompt.category
  assert len({prompt.id for prompt in prompts}) == len(prompts) > 0


@examples(150)
@given(lines=st.lists(LINE, max_size=4), columns=COLUMNS)
def test_any_jsonl_is_prompts_or_one_clear_error(tmp_path_factory, lines, columns):
  path = tmp_path_factory.mktemp("rows") / "set.jsonl"
  path.write_bytes(b"\n".join(lines))
  found = sound(lambda: prompt_sets.load(f"jsonl:{path}", columns, "."))
  if isinstance(found, str):
    assert str(path) in found or "columns: " in found
  else:
    well_formed(found)


# --- Flags ---

KEYS = sorted(convert.flat(tiny()))
VALUES = st.one_of(
  st.sampled_from(
    [
      *("", *"nan inf -inf 1e999 -1 0 1.5 None True () {}".split()),
      *("(1,)", "('a',)", "[1, 2]", "{'a': 1}", "9" * 30, "1_0", "__import__('os')"),
      *("'", '"', "(", "\\", "\n", "../..", "a=b", "--config.seed=1"),
    ]
  ),
  st.text(max_size=12),
)
NAMES = st.one_of(
  st.sampled_from(KEYS),
  st.sampled_from(KEYS).map(lambda key: key.rpartition(".")[0] or key),
  st.sampled_from(KEYS).map(lambda key: key[:-1]),
  st.text("abz._[]0", min_size=1, max_size=9),
)


@examples(120)
@given(overrides=st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_override_makes_a_config_or_one_clear_error(overrides):
  more = [f"--config.{name}={value}" for name, value in overrides.items()]
  argv = ["dalign", f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=w", *more]
  before = set(flags.FLAGS)
  try:
    found = sound(lambda: main.read_flags(argv))
  finally:
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
  if not isinstance(found, str):
    again = convert.of_json(json.loads(json.dumps(convert.to_json(found[0]))))
    assert convert.flat(again) == convert.flat(found[0])


NODE = config_file("tiny").get_config().to_dict()


@examples(150)
@given(
  st.sampled_from(sorted(places(NODE), key=repr)[1:]), st.one_of(st.just(...), JSON)
)
def test_any_config_is_one_or_one_clear_error(path, new):
  """As a config file, which is Python and may hold anything, has it."""
  found = sound(lambda: convert.build(Config, changed(NODE, path, new)))
  assert isinstance(found, str | Config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -(10**400)])
def test_numbers_of_configs_are_finite(value):
  bad = changed(NODE, ("sft", "average_share"), value)
  with pytest.raises(ValueError, match="sft.average_share: wanted a finite number"):
    convert.build(Config, bad)


@pytest.mark.parametrize("value", [[], 3, None, {"seed": 1, "seed.x": 2}, {}])
def test_what_is_no_config_is_refused(value):
  with pytest.raises(ValueError, match="^config"):
    convert.of_json(value)
