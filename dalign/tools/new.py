"""A folder to begin with: a policy, prompts, a judge, a config, all to edit."""

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
  # Under their own names tools would take them for modules of the package.
  for name in ("config.py", "judge.py"):
    (folder / f"{name}.txt").rename(folder / name)
  for name in _SHARED:
    shutil.copy(bundled.HOME / "specs" / name, folder / "policies")
  progress.say(
    f"new: {folder} has a policy, prompts, a judge and a config to edit. README.md "
    f"says how to go on, --mode=check --config={folder / 'config.py'} what is missing"
  )
