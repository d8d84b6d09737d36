"""Deliberative alignment in JAX, as a library: README.md has it in ten lines.

The names below are those of `dalign.api`, which is imported when one of them is used:
`import dalign` alone imports neither JAX nor numpy.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
  "FilterQuestion",
  "Judge",
  "Model",
  "Prompt",
  "Reply",
  "RewardQuestion",
  "Rollout",
  "Spec",
  "ThoughtfulReply",
  "TrainState",
  "Turn",
  "Verdict",
  "export",
  "init_state",
  "judge",
  "load_model",
  "load_spec",
  "objective",
  "render",
  "rl_batch",
  "rl_step",
  "sft_batch",
  "sft_step",
  "user",
]

if TYPE_CHECKING:
  from dalign.api import FilterQuestion
  from dalign.api import Judge
  from dalign.api import Model
  from dalign.api import Prompt
  from dalign.api import Reply
  from dalign.api import RewardQuestion
  from dalign.api import Rollout
  from dalign.api import Spec
  from dalign.api import ThoughtfulReply
  from dalign.api import TrainState
  from dalign.api import Turn
  from dalign.api import Verdict
  from dalign.api import export
  from dalign.api import init_state
  from dalign.api import judge
  from dalign.api import load_model
  from dalign.api import load_spec
  from dalign.api import objective
  from dalign.api import render
  from dalign.api import rl_batch
  from dalign.api import rl_step
  from dalign.api import sft_batch
  from dalign.api import sft_step
  from dalign.api import user
else:

  def __getattr__(name: str):
    if name not in __all__:
      raise AttributeError(f"module 'dalign' has no attribute {name!r}")
    return getattr(importlib.import_module("dalign.api"), name)
