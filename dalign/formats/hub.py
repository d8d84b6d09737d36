"""Models by their names on the Hugging Face Hub: in its cache on this machine, or
downloaded to it. Takes settings, tokenizer, card and safetensors; no pickle, no code.
"""

import pathlib
import re

from dalign.text import templates

TAKEN = ("*.json", "*.jinja", "*.safetensors", "README.md")
LEFT = ("*/*", "consolidated*")  # other formats of the same weights
_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")  # NAME@REVISION


def named(path: str) -> bool:
  """Whether a path is a name on the Hub, such as Qwen/Qwen3-8B or, with a revision,
  Qwen/Qwen3-8B@main: one that looks so, and is no path on this machine."""
  looks_so = _NAME.fullmatch(path) and not path.endswith(".gguf")
  return bool(looks_so) and not pathlib.Path(path).exists()


def cached(path: str) -> bool:
  """Whether a path is a name of the Hub whose files are here."""
  try:
    return named(path) and folder(path, download=False).is_dir()
  except ValueError:
    return False


def folder(path: str, *, download: bool = True) -> pathlib.Path:
  """The folder of a model in the Hub's cache, whose name is the commit. Without a
  network what is there already is taken. Raises ValueError where there is none."""
  import huggingface_hub  # half a second, and only these names need it

  name, revision = split(path)
  try:
    found = huggingface_hub.snapshot_download(
      name,
      revision=revision or None,
      allow_patterns=[*TAKEN],
      ignore_patterns=[*LEFT],
      local_files_only=not download,
    )
  except Exception as error:  # of the network, the Hub or the cache: many classes
    raise ValueError(
      f"no model at {path!r}: no such folder, and of the Hub neither in the cache nor "
      f"to be downloaded ({templates.one_line(error, 200)}); give a folder with "
      "config.json and safetensors, or fetch it where there is a network: "
      f"`hf download {name}`"
    ) from error
  return pathlib.Path(found)


def split(path: str) -> tuple[str, str]:
  """(name, revision) of a model on the Hub; the revision may be ""."""
  name, _, revision = path.partition("@")
  return name, revision


def pinned(path: str, before: str) -> str:
  """A path of a model with the commit that it names today, NAME@COMMIT, or that it
  named `before`; any other path as it is."""
  if not named(path):
    return path
  name, revision = split(path)
  if not revision and split(before)[0] == name:
    return before
  return f"{name}@{folder(path).name}"
