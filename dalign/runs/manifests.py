"""A stage's manifest.json: how it is read, what it vouches for, and what differs."""

from collections.abc import Collection, Mapping
import functools
import hashlib
import json
import pathlib
import shutil
import subprocess

import dalign
from dalign.runs import buckets
from dalign.runs import store

FORMAT_VERSION = 1  # of manifest.json
REMEDY = "Use another --workdir, or --config.start_over=true to do the stage again."
_MANIFEST_TYPES = {  # what each key of a manifest holds
  "stage": str,
  "config": dict,
  "inputs": dict,
  "outputs": dict,
  "code_version": str,
  "seed": int,
  "device": str,
  "started": str,
  "finished": str | None,
  "wall_s": float | int,
  "summary": dict,
}


def read_manifest(path: pathlib.Path) -> dict | None:
  """A manifest.json, or None where there is no such file.

  Raises ValueError for what is no manifest, or of a format that is not known.
  """
  if not path.is_file():
    return None
  try:
    manifest = store.read_json(path)
  except ValueError as error:
    raise ValueError(f"{error}. {REMEDY}") from error
  version = manifest.get("format_version") if isinstance(manifest, dict) else None
  if version != FORMAT_VERSION:
    raise ValueError(
      f"{path}: wanted manifest format {FORMAT_VERSION}, got {version!r:.80}. {REMEDY}"
    )
  for key, kind in _MANIFEST_TYPES.items():
    if not isinstance(manifest.get(key, ...), kind):
      got = repr(manifest[key]) if key in manifest else "nothing"
      raise ValueError(f"{path}: wanted {kind} as {key}, got {got:.80}. {REMEDY}")
  for key in ("inputs", "outputs"):
    if not all(isinstance(hash, str) for hash in manifest[key].values()):
      raise ValueError(f"{path}: wanted a hash for each of {key}. {REMEDY}")
  return manifest


def check_outputs(folder: pathlib.Path) -> None:
  """Raises ValueError where a file of a finished stage is not what the stage wrote."""
  path = folder / "manifest.json"
  manifest = read_manifest(path)
  if manifest is None or manifest["stage"] != folder.name:
    return
  for name, hash in manifest["outputs"].items():
    if pathlib.PurePath(name).name != name:
      raise ValueError(f"{path}: {name!r} is no file of this folder. {REMEDY}")
    file = folder / name
    if not file.is_file() or file_hash(file) != hash:
      raise ValueError(
        f"{file}: {'changed' if file.is_file() else 'is gone'} since stage "
        f"{folder.name} was done; put it back, or do that stage again "
        f"({again(folder.name)})"
      )


def again(stage: str) -> str:
  """The flags that do a stage again which is done."""
  return f"--config.stages={stage} --config.start_over=true"


def hash_outputs(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of the files in a stage's folder, by name."""
  return {
    path.name: file_hash(path)
    for path in sorted(folder.iterdir())
    if path.is_file() and path.name != "manifest.json" and path.suffix != ".tmp"
  }


def file_hash(path: pathlib.Path) -> str:
  """SHA-256 of a file, or of the names and contents in a folder, in hexadecimal."""
  if path.is_dir():
    names = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    lines = (f"{file_hash(path / name)} {name.as_posix()}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
  if not path.exists():
    raise ValueError(f"{path}: wanted as an input, found no such file")
  with buckets.local_copy(path) as copy, copy.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_version() -> str:
  """The package's version; in a checkout "+", the commit, and "-dirty" if edited."""
  version = dalign.__version__
  root = pathlib.Path(__file__).parents[2]
  command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
  if not (root / ".git").exists() or shutil.which("git") is None:
    return version
  commit = subprocess.run(command, capture_output=True, text=True, check=False)
  return f"{version}+{commit.stdout.strip()}" if commit.returncode == 0 else version


def _resume_key(manifest: Mapping) -> dict:
  """What must be the same for a stage to count as done or to go on, flat."""
  inputs = {f"input {name}": hash[:8] for name, hash in manifest["inputs"].items()}
  return manifest["config"] | {"the run's seed": manifest["seed"]} | inputs


def changes(old: Mapping, new: Mapping, but: Collection[str] = ()) -> list[str]:
  """Each key but those of `but` in which two manifests differ, with both values: of the
  config, "the run's seed", and "input NAME". With none a stage is done, or goes on."""
  keys = [_resume_key(manifest) for manifest in (old, new)]
  found = []
  for key in sorted((keys[0].keys() | keys[1].keys()) - {*but}):
    before, after = (json.dumps(m[key]) if key in m else "absent" for m in keys)
    if before != after:
      found.append(f"{key} was {before} and is now {after}")
  return found
