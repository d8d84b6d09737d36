"""A folder to begin with: a policy, prompts, a config and how to go on, all to edit."""

import pathlib
import shutil

from dalign.data import bundled
from dalign.runs import progress

_STARTER = pathlib.Path(__file__).parents[1] / "starter"
_SHARED = ("principles.md", "style.md")  # of all policies


def new(folder: pathlib.Path) -> None:
  """Writes the files of a run of one's own into a folder that is not there, or empty;
  ValueError for another."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(
      f"{folder}: wanted a new folder, or an empty one, to write a policy, prompts and "
      "a config into; this one is in use: take another --workdir"
    )
  shutil.copytree(_STARTER, folder, dirs_exist_ok=True)
  # Under its own name tools would take it for a module of the package.
  (folder / "config.py.txt").rename(folder / "config.py")
  for name in _SHARED:
    shutil.copy(bundled.HOME / "specs" / name, folder / "policies")
  progress.say(
    f"new: {folder} has a policy, prompts and a config to edit, and README.md says how "
    f"to go on; what is missing says --mode=check --config={folder / 'config.py'}"
  )
