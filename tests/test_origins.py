"""Where a config's values are said to come from is where they stand."""

import textwrap

import ml_collections
from ml_collections import config_flags
import pytest

from dalign.config import origins
from tests.helpers import ROOT


def read(monkeypatch, name: str, **flags) -> dict[str, str]:
  """The origins of a file, as it is named from the repository's root."""
  monkeypatch.chdir(ROOT)
  parser = config_flags.config_flags.ConfigFileFlagParser("config")
  return origins.read(lambda: parser.parse(name), flags)


def line(file: str, *texts: str) -> str:
  """file:line of the one line that has a text; of more texts, the last after the
  others."""
  lines = (ROOT / file).read_text().splitlines()
  at = 0
  for text in texts[:-1]:
    at = next(i for i in range(at, len(lines)) if text in lines[i])
  found = [i for i in range(at, len(lines)) if texts[-1] in lines[i]]
  assert len(texts) > 1 or len(found) == 1, found
  return f"{file}:{found[0] + 1}"


QUICK, TINY, WORLD, LARGE = (
  f"configs/{name}.py" for name in ("quickstart", "tiny", "world", "large")
)
EXPECTED = {
  QUICK: {
    "seed": (QUICK, "c.seed = 0"),
    "world": (QUICK, "c.world = None"),
    "model.path": (QUICK, "c.model = dict("),
    "compute.remat": (QUICK, "c.compute = dict(", "remat=False"),
    "lora.alpha": (QUICK, "c.lora = lora(rank=0)"),
    "think.close": (QUICK, "c.think = dict("),
    "generate.prompts.comply": (QUICK, "prompts=dict(refuse=10"),
    "generate.endpoint.timeout": (QUICK, "c.generate = dict(", "endpoint=NO_ENDPOINT"),
    "filter.endpoint.timeout": (QUICK, "c.filter = dict(", "endpoint=NO_ENDPOINT"),
    "sft.batch.rows": (QUICK, "batch=dict(micro=1, rows=2"),
    "sft.optimizer.beta2": (QUICK, "c.sft = dict(", "optimizer=optimizer(2e-4)"),
    "rl.optimizer.learning_rate": (QUICK, "optimizer=optimizer(3e-5)"),
    "rl.objective.clip_low": (QUICK, 'objective=algorithms.of("rloo")'),
    "eval.budgets": (QUICK, "budgets=()"),
    "eval.extra": (QUICK, "extra={}"),
    "ablation": (QUICK, "c.ablation = None"),
  },
  TINY: {
    "recipe": (TINY, "c.recipe ="),
    "seed": (QUICK, "c.seed = 0"),
    "model.path": (TINY, 'path="random"'),
    "model.random.ffw": (TINY, "ffw=64"),
    "compute.dtype": (TINY, "c.compute.update("),
    "compute.kv_dtype": (QUICK, "c.compute = dict(", "kv_dtype="),
    "sampler.lanes": (TINY, "dict(slots=16, lanes=2"),
    "sampler.chunk": (QUICK, "chunk=8"),
    "generate.prompts.refuse": (TINY, "prompts=dict(refuse=9"),
    "generate.max_new": (TINY, "most=4", "max_new=256"),
    "generate.batch": (QUICK, "c.generate = dict(", "batch=1"),
    "filter.judge": (QUICK, 'judge="recorded",'),
    "sft.batch.length": (TINY, "c.sft.batch = dict("),
    "sft.epochs": (TINY, "c.sft.update("),
    "rl.steps": (TINY, "steps=2"),
    "rl.judge_errors": (TINY, "judge_errors=1.0"),
    "rl.batch.rows": (TINY, "c.rl.batch = dict("),
    "rl.optimizer.beta1": (QUICK, "optimizer=optimizer(3e-5)"),
    "eval.max_new": (TINY, "c.eval.update("),
  },
  f"{WORLD}:ablation": {
    "recipe": (WORLD, 'c.recipe = "world.v3" if'),
    "model.random.qk_norm": (WORLD, 'qk_norm="head"'),
    "lora.rank": (WORLD, "c.lora = quickstart.lora(rank=32)"),
    "world.first_lessons.weighing": (WORLD, "first_lessons=dict("),
    "world.lessons.weighing": (WORLD, "weighing=0.04"),
    "world.batch.rows": (WORLD, "batch=dict(micro=1, rows=32"),
    "world.optimizer.matrix_rate": (WORLD, "| dict(matrix_rate=0.02"),
    "world.optimizer.beta1": (WORLD, "c.world = dict(", "optimizer=quickstart"),
    "sft.optimizer.final_share": (WORLD, "c.sft = dict(", "optimizer=quickstart"),
    "rl.objective.length_norm": (WORLD, "length_norm=25.0"),
    "eval.extra.spelled.source": (WORLD, "extra={"),
    "eval.suite": (WORLD, "suite=()"),
    "ablation.seeds": (WORLD, "c.ablation = None if arms"),
    "ablation.arms.rl.changes.rl.start": (WORLD, "c.ablation = None if arms"),
  },
  f"{LARGE}:llama33_70b": {
    "recipe": (LARGE, "c.recipe ="),
    "seed": (QUICK, "c.seed = 0"),
    "model.path": (LARGE, "c.model = dict("),
    "model.random.rope": (LARGE, "c.model = dict("),
    "compute.attention": (LARGE, 'attention="splash" if'),
    "mesh.tensor": (LARGE, "c.mesh = dict("),
    "lora.frozen": (LARGE, "c.lora = quickstart.lora("),
    "spec.detail": (LARGE, 'c.spec.detail = "full"'),
    "spec.dir": (QUICK, "c.spec = dict("),
    "generate.most": (LARGE, "most=8"),
    "filter.votes": (LARGE, "c.filter.update("),
    "sft.batch.rows": (LARGE, "batch=dict(micro=1, rows=rows"),
    "rl.batch.micro": (LARGE, "dict(micro=4, rows=rows, length=2048)"),
    "rl.optimizer.learning_rate": (LARGE, "optimizer=quickstart.optimizer(2e-5 if"),
    "plan.topology": (LARGE, "c.plan.update("),
    "plan.price": (QUICK, "c.plan = dict("),
  },
  f"{LARGE}:qwen3_8b_lora": {
    "rl.batch.micro": (LARGE, "dict(micro=8, rows=rows // 2, length=2048)"),
  },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_value_is_from_the_line_that_set_it_last(name, monkeypatch):
  found = read(monkeypatch, name)
  wanted = {key: line(*texts) for key, texts in EXPECTED[name].items()}
  assert {key: found[key] for key in wanted} == wanted


CONFIG = """
import ml_collections

BASE = dict(b=2, c=3)
many = {"d": 4} | {
  "e": 5,
}


def get_config():
  c = ml_collections.ConfigDict(
    dict(
      a=1,
      part=dict(
        x=0,
        **BASE,
      ),
    )
  )
  c.update(
    {
      "a": 2,
      "more": BASE | dict(
        c=4,
      ),
    },
    last=(
      1,
      2,
    ),
  )
  for name in ("x", "b"):
    c.part[name] = 7
  c.late = (
    dict(z=1)
    if c.a == 1
    else dict(
      y=2,
      z=2,
    )
  )
  own = ml_collections.ConfigDict()
  own.u = 1
  c.own = own
  c.wide = dict(
    d=1,
    f=6,
  ) | many
  return c
"""
LINES = {
  "a": '      "a": 2',
  "part.x": "    c.part[name] = 7",
  "part.b": "    c.part[name] = 7",
  "part.c": "        **BASE",
  "more.b": '      "more": BASE',
  "more.c": "        c=4",
  "last": "    last=(",
  "late.y": "      y=2",
  "late.z": "      z=2",
  "own.u": "  own.u = 1",
  "wide.d": "  ) | many",
  "wide.e": "  ) | many",
  "wide.f": "    f=6",
}


def test_statements_of_many_forms_are_read(tmp_path, monkeypatch):
  file = tmp_path / "some.py"
  file.write_text(textwrap.dedent(CONFIG))
  monkeypatch.chdir(tmp_path)
  parser = config_flags.config_flags.ConfigFileFlagParser("config")
  found = origins.read(lambda: parser.parse("some.py"), {})
  lines = CONFIG.splitlines()
  numbers = {key: int(place.split(":")[1]) for key, place in found.items()}
  assert {key: lines[n - 1].rstrip(",") for key, n in numbers.items()} == {
    key: lines[i].rstrip(",")
    for key, text in LINES.items()
    for i in [next(i for i, one in enumerate(lines) if one.startswith(text))]
  }


def test_flags_come_last(monkeypatch):
  flags = {"rl.steps": "3", "generate.prompts": "\"{'refuse': 1}\""}
  found = read(monkeypatch, TINY, **flags)
  assert found["rl.steps"] == "--config.rl.steps=3"
  assert found["generate.prompts.refuse"].startswith("--config.generate.prompts=")
  assert found["rl.prompts"] == line(TINY, "prompts=8")


def test_nothing_is_noted_afterwards(monkeypatch):
  before = ml_collections.ConfigDict.__setitem__
  read(monkeypatch, TINY)
  assert ml_collections.ConfigDict.__setitem__ is before

  def fails():
    raise ValueError("no config")

  with pytest.raises(ValueError, match="no config"):
    origins.read(fails, {})
  assert ml_collections.ConfigDict.__setitem__ is before
