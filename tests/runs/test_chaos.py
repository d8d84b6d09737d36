"""A run killed on the way ends as one that was not: `tests/chaos.py`, a share of it."""

import os
import pathlib

import pytest

from tests import chaos

pytestmark = pytest.mark.e2e


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
  share = float(os.environ.get("DALIGN_CHAOS", "0.1"))  # of the places to be killed at
  config = str(chaos.ROOT / "configs" / "tiny.py")
  folders = [tmp_path / name / "run" for name in ("whole", "killed")]
  for folder in folders:
    folder.parent.mkdir()
  whole, other = folders
  code, how, places, said = chaos.run(whole, config, chaos.Kills(0, 0.0))
  assert (code, how) == (0, "passed"), said
  found = chaos.killed(other, config, chaos.Kills(seed=0, share=share))
  assert len(found) > share * len(places) / 4
  wanted = chaos.fingerprint(whole)
  assert len(wanted) > 150 and "rl/rollouts.jsonl" in wanted
  assert chaos.differing(wanted, chaos.fingerprint(other)) == []


def test_what_is_not_the_same_is_found(tmp_path):
  for name, text in (("one", "a"), ("other", "b")):
    folder = pathlib.Path(tmp_path / name / "generate")
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text(text)
    (folder / "kept.jsonl").write_text("")
  one, other = (chaos.fingerprint(tmp_path / name) for name in ("one", "other"))
  assert chaos.differing(one, other) == ["generate/samples.jsonl"]
