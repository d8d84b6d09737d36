"""Slopes of long runs, `tests/soak.py`: a short one of each, and how they are found."""

import numpy as np
import pytest

from tests import soak


def test_a_slope_is_told_from_noise_and_from_a_warm_up():
  rng, x = np.random.default_rng(0), np.arange(2000.0)
  noise = rng.normal(0, 50, 2000)
  warm = np.where(x < 150, 1e6 * (1 - x / 150), 0.0)  # what a start takes and gives
  flat, grows = (soak.trend(x, 1e5 + warm + noise + rise * x) for rise in (0.0, 0.3))
  assert flat["low"] < 0 < flat["high"] and abs(flat["slope"]) < 0.05
  assert 0.25 < grows["low"] < 0.3 < grows["high"] < 0.35
  assert abs(grows["last"] - grows["first"] - 0.3 * 1710) < 60


@pytest.mark.e2e
def test_short_runs_do_not_grow(tmp_path):
  run = soak.prompts(20_000, tmp_path / "prompts")
  assert run["generate"]["resident bytes"]["high"] < 400  # a prompt
  assert run["filter"]["resident bytes"]["high"] < 400
  run = soak.rl(200, tmp_path / "rl")["rl"]
  for name in ("descriptors", "live arrays", "files"):
    assert run[name]["last"] <= run[name]["first"], name
  assert run["resident bytes"]["high"] < 200_000  # a step
