"""The notebooks run as they stand, on a tiny random model in place of the real one."""

import json
import pathlib

import pytest

from dalign import vocab
from dalign import weights
from dalign.config import ModelConfig

COLAB = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
TINY = ModelConfig(
  vocab=259,
  width=16,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  ffw=32,
  rope_theta=10000.0,
  norm_eps=1e-5,
  tied=True,
  max_length=8192,
)


def cells(path: pathlib.Path, kind: str) -> list[dict]:
  found = json.loads(path.read_text())["cells"]
  return [cell for cell in found if cell["cell_type"] == kind]


def run(path: pathlib.Path, model: pathlib.Path) -> dict:
  """The names a notebook ends with, its cell `MODEL = ...` saying `model` instead."""
  sources = ["".join(cell["source"]) for cell in cells(path, "code")]
  [named] = [i for i, source in enumerate(sources) if "MODEL = " in source]
  sources[named] = f"MODEL = {str(model)!r}"
  names = {}
  for i, source in enumerate(sources):
    exec(compile(source, f"{path.name}, code cell {i}", "exec"), names)
  return names


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_carry_no_outputs(path):
  for cell in cells(path, "code"):
    assert cell["outputs"] == [] and cell["execution_count"] is None


def test_the_sample_notebook_answers_with_and_without_the_spec(
  tmp_path, monkeypatch, capsys
):
  weights.save_hf(
    str(tmp_path), TINY, weights.random_model(TINY, 0), vocab.tiny_tokenizer()
  )
  monkeypatch.chdir(COLAB)
  names = run(COLAB / "01_sample.ipynb", tmp_path)
  assert names["cfg"] == TINY
  alone, taught = names["rows"].values()
  assert len(taught) > len(alone)
  printed = capsys.readouterr().out
  for name in names["rows"]:
    assert f"--- {name} (" in printed
  assert printed.count("THOUGHT  ") == printed.count("ANSWER   ") == 2
