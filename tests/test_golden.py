"""Runs of released versions are done, go on and are read: `tests/golden.py`."""

import json

import jax
import pytest

from dalign import config as configs
from dalign import pipeline
from dalign import store
from dalign.assistant import Model
from dalign.types import Turn
from tests import golden
from tests.helpers import long

ARCHIVES = sorted(golden.FOLDER.glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def runs(request, tmp_path, monkeypatch):
  """The folder of a version's runs, where relative paths of its config begin."""
  golden.unpack(request.param, tmp_path / "golden")
  monkeypatch.chdir(tmp_path / "golden")
  return tmp_path / "golden"


def config(folder, **changes) -> configs.Config:
  """The config of an older run, in today's words."""
  return configs.of_json(json.loads((folder / "config.json").read_text()) | changes)


def test_every_stage_counts_as_done(runs, capsys):
  done = runs / "done"
  before = {p: p.read_bytes() for p in sorted(done.glob("*/manifest.json"))}
  assert len(before) >= 6
  pipeline.run(config(done), done)
  assert {p: p.read_bytes() for p in sorted(done.glob("*/manifest.json"))} == before
  said = capsys.readouterr().err
  assert said.count("done before, skipped") == len(before)
  page = (done / "report.html").read_text()
  assert page.count("not run yet") == 1  # that is, the judge was not probed


@long
def test_rl_goes_on_from_its_checkpoint(runs, capsys):
  cut = runs / "cut"
  pipeline.run(config(cut, stages="rl"), cut)
  assert "goes on where it stopped" in capsys.readouterr().err
  rows = [r for r in store.read_rows(cut / "metrics.jsonl") if r["stage"] == "rl"]
  assert [row["step"] for row in rows] == [1, 2]
  assert store.read_manifest(cut / "rl" / "manifest.json")["finished"]


def test_its_models_answer(runs):
  for stage in ("sft", "rl"):
    model = Model(str(runs / "done"), stage)
    with jax.set_mesh(model.run.mesh):
      found = model.replies(
        [[Turn(role="user", content="Hi")]], max_new=4, temperature=1.0
      )
    assert len(found) == 1


def test_today_s_version_has_a_run():
  assert ARCHIVES
