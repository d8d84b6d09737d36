"""What comes with the package, where it lies: configs/ and specs/."""

import pathlib
import runpy
from typing import Any

_PACKAGE = pathlib.Path(__file__).parents[1]
# A wheel has them in the package, a checkout beside it.
HOME = _PACKAGE if (_PACKAGE / "specs").is_dir() else _PACKAGE.parent


def find(name: str) -> pathlib.Path:
  """The file or folder of that name; where there is none, that of the package, such as
  specs or configs/tiny.py; where that is not either, the name as it is."""
  given = pathlib.Path(name).expanduser()
  ours = HOME / given
  return given if given.exists() or not ours.exists() else ours


def hidden(name: str) -> bool:
  """Whether a file or folder that is here hides the package's of the same name."""
  ours = HOME / pathlib.Path(name).expanduser()
  found = find(name)
  return ours.exists() and found.resolve() != ours.resolve()


def recipe(name: str) -> Any:
  """A new ConfigDict of configs/, such as "quickstart" or "large:qwen3_8b", for a
  config file to change; ValueError where there is none."""
  stem, *argument = name.split(":", 1)
  folder = HOME / "configs"
  known = {path.stem for path in folder.glob("*.py")} - {"algorithms", "from_json"}
  if stem not in known:
    raise ValueError(f"recipe: wanted one of {', '.join(sorted(known))}, got {name!r}")
  return runpy.run_path(str(folder / f"{stem}.py"))["get_config"](*argument)


def spec_files() -> dict[str, str]:
  """Path -> text of the specification of the package, whatever lies where this runs."""
  paths = sorted((HOME / "specs").glob("*.md"))
  return {path.as_posix(): path.read_text(encoding="utf-8") for path in paths}
