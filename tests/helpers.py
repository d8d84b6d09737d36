"""What several test files call."""

from collections.abc import Iterable
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import hypothesis
import jax
import numpy as np

from dalign.config import convert
from dalign.config import stages
from dalign.config.model import ModelConfig
from dalign.config.schema import Config
from dalign.judges import judge
from dalign.stages import services
from dalign.types import Prompt
from dalign.types import Sample
from dalign.types import Turn

ROOT = pathlib.Path(__file__).parents[1]

SHARED = ROOT / ".." / "shared"  # prompt sets and cases that are not of the project


# Grouped heads, and no number that is a default or a product of the others.
MODEL = ModelConfig(
  **dict(vocab=97, width=32, layers=2, heads=4, kv_heads=2, head_dim=12, ffw=40),
  **dict(rope_theta=777.0, norm_eps=1e-3, tied=True, max_length=256),
)


def clean_environment() -> dict[str, str]:
  """For another process: the environment without what conftest asks of JAX."""
  return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}


def python(*args, cwd=ROOT, **more) -> subprocess.CompletedProcess:
  """Runs a Python of its own to its end; `more` is what `subprocess.run` takes."""
  given = dict(env=clean_environment(), capture_output=True, text=True, timeout=600)
  return subprocess.run([sys.executable, *args], cwd=cwd, **given | more)


def jsonl(path: pathlib.Path) -> list[dict]:
  """The rows of a JSONL file, each whole."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: pathlib.Path, rows: Iterable[dict]) -> pathlib.Path:
  """The path, with rows written as the standard library writes them."""
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def prompt(said="How?", category="privacy", expected="comply", **more) -> Prompt:
  """A prompt of one user turn, or of several turns, the users' and the assistant's by
  turns; its id is what it says last where it is given none."""
  said = (said,) if isinstance(said, str) else said
  roles = ("user", "assistant") * len(said)
  turns = tuple(Turn(role=r, content=c) for r, c in zip(roles, said, strict=False))
  fields = dict(id=said[-1], turns=turns, category=category, expected=expected)
  return Prompt(**fields | more)


def sample(answer="Yes.", thought="", malformed="", finish="stop", **more) -> Sample:
  """A sample of prompt "p"."""
  fields = dict(prompt_id="p", index=0, tokens=(1,), forced=0, thought=thought)
  fields |= dict(answer=answer, malformed=malformed, finish=finish)
  return Sample(**fields | more)


def assert_close(got, want, *, atol=1e-5, rtol=1e-4) -> None:
  """That two trees are finite and equal but for rounding."""
  got = jax.tree_util.tree_flatten_with_path(got)[0]
  want = jax.tree_util.tree_flatten_with_path(want)[0]
  for (path, a), (_, b) in zip(got, want, strict=True):
    assert np.isfinite(a).all(), path
    np.testing.assert_allclose(a, b, atol=atol, rtol=rtol, err_msg=str(path))


def with_gradients(loss):
  """`run(params, batch) -> (mean, metrics, gradients of the mean's total)`."""

  @jax.jit
  def run(params, batch):
    def total(p):
      mean, metrics = loss(p, batch, jax.random.key(0))
      return mean.total, (mean, metrics)

    grads, (mean, metrics) = jax.grad(total, has_aux=True)(params)
    return mean, metrics, grads

  return run


def config_file(name: str) -> types.ModuleType:
  """A file of configs/, as a module."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def examples(n: int):
  """Hypothesis settings of a fuzzer: n examples, the same each time; or with the
  environment variable DALIGN_FUZZ=k so many times as many, new ones each time."""
  times = int(os.environ.get("DALIGN_FUZZ", "0"))
  return hypothesis.settings(
    max_examples=n * max(times, 1),
    derandomize=not times,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


def reference_probes(prompts, references):
  """Probes of good answers, by prompt id: at their own prompt ("reference", not low),
  at the nearest other one of its category ("twin") and at another ("other")."""
  answered = [p for p in prompts if p.expected == "comply" and p.id in references]
  for prompt in answered:
    yield "reference", judge.RewardQuestion(prompt, references[prompt.id]), False
    others = [
      p for p in answered if p.category == prompt.category and p.id != prompt.id
    ]
    if others:
      own = {*prompt.text.casefold().split()}
      near = max(others, key=lambda p: (len(own & {*p.text.casefold().split()}), p.id))
      far = others[(others.index(near) + len(others) // 2) % len(others)]
      yield "twin", judge.RewardQuestion(prompt, references[near.id]), True
      yield "other", judge.RewardQuestion(prompt, references[far.id]), True


def tiny(**changes) -> Config:
  """The tiny config, with changes such as {"rl.steps": 1}."""
  node = config_file("tiny").get_config()
  for name, value in changes.items():
    node.update_from_flattened_dict({name: value})
  return convert.build(Config, node.to_dict())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several(
  *(stages.GenerateStage, stages.FilterStage, stages.SFTStage, stages.RewardStage),
  *(stages.RLStage, stages.EvalStage),
):
  """What these stages read, for tests of functions that several of them call."""


def opened(
  cfg: Config, workdir: pathlib.Path, stage="", shared=None
) -> services.Services:
  """The services of a stage, or with "" of functions that several stages call, in this
  process on one of its devices: eight on a few cores wait for one another, and what
  they compute is compared elsewhere. `stage` may be a class of `config.stages`."""
  work = services.Workspace(cfg, workdir, shared, devices=jax.devices()[:1])
  return services.of(stages.STAGES.get(stage, stage or Several), cfg, work)


def command(workdir, *more: str) -> list[str]:
  """The command line of a run in a folder."""
  return [
    sys.executable,
    "-m",
    "dalign.main",
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    f"--workdir={workdir}",
    *more,
  ]


READ_FLAGS = """
import json, os, sys
from dalign import main
for line in json.load(sys.stdin):
  sys.stdout.flush()
  if os.fork() == 0:
    try:
      sys.argv = ["dalign", *line]  # where ml_collections looks for overrides
      main.read_flags(sys.argv)
      said = ""
    except BaseException as error:
      said = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
    sys.stdout.flush()
    os._exit(0)
  os.wait()
"""


def read_flags(lines: list[list[str]], place: pathlib.Path) -> list[str]:
  """What `main.read_flags` says of each command line, "" for a config; from one process
  that reads each as if it were the first."""
  env = clean_environment() | {"PYTHONPATH": str(ROOT)}
  done = python("-c", READ_FLAGS, cwd=place, env=env, input=json.dumps(lines))
  assert done.returncode == 0, done.stderr
  said = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(said) == len(lines), done.stderr
  return said


def run_command(workdir, *more: str) -> subprocess.CompletedProcess:
  """Runs the command to its end."""
  return subprocess.run(
    command(workdir, *more), cwd=ROOT, capture_output=True, text=True, timeout=900
  )
