"""The base of the policy world that comes with the package, made of a run's.

  python -m tests.bundle_base WORKDIR

takes what `dalign --config=configs/world.py --config.stages=base` with
--config.world.base=train, and for the deep one --config.world.depth=4 and the batch of
configs/world.py:deep, left in WORKDIR.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from dalign.config import convert
from dalign.runs import store
from dalign.stages import base
from tests.helpers import opened


def bundle(workdir: pathlib.Path, path: pathlib.Path | None = None) -> None:
  """Writes the parameters of a finished stage, with what they were made by; without a
  path where the package has them."""
  config = convert.of_json(store.read_json(workdir / "config.json"))
  manifest = store.read_json(workdir / "base" / "manifest.json")
  run = opened(config, workdir, "base")
  path = path or base.BUNDLED[config.world.depth]
  with jax.set_mesh(run.mesh):
    params = run.model.base_params()
  header = {"recipe": json.dumps(base.recipe(run)), "seed": str(manifest["seed"])}
  header["code_version"] = manifest["code_version"]
  leaves = {
    name: np.asarray(x)
    for name, x in (params | params["layers"]).items()
    if name != "layers"
  }
  safetensors_numpy.save_file(leaves, path, header)


if __name__ == "__main__":
  bundle(pathlib.Path(sys.argv[1]))
