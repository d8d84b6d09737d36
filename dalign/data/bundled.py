"""Where what comes with the package lies: configs/ and specs/."""

import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]
# A wheel has them in the package, a checkout beside it.
HOME = _PACKAGE if (_PACKAGE / "specs").is_dir() else _PACKAGE.parent


def find(name: str) -> pathlib.Path:
  """The file or folder of that name; where there is none, that of the package, such as
  specs or configs/tiny.py; where that is not either, the name as it is."""
  given = pathlib.Path(name).expanduser()
  ours = HOME / given
  return given if given.exists() or not ours.exists() else ours
