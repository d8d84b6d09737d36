"""The files of a run: artefacts, stage manifests and specification files.

A run is a folder, WORKDIR. Each stage keeps its rows, its checkpoints and a
manifest.json in WORKDIR/<stage>; metrics.jsonl (metrics.py) lies beside them.
What is replaced is replaced whole (a temporary file, then `os.replace`), and what grows
grows by whole lines, so that a run killed at any point can go on. In a bucket
(gs://BUCKET/FOLDER) buckets.py sees to the same.

Does not know what the rows mean, what a stage does, models, tokens, or arrays on disk
(checkpoints.py does).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
import contextlib
import datetime
import errno
import functools
import glob
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import time
from typing import Any

import dalign
from dalign.runs import buckets
from dalign.runs import distributed

try:
  import fcntl
except ImportError:  # Windows has none, and there nobody is held off
  fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1  # of manifest.json
_REMEDY = "Use another --workdir, or --config.start_over=true to do the stage again."


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Makes `path` hold `content`, whole or not at all; parent folders are made."""
  _replace(path, (content,))


def _replace(path: pathlib.Path, parts: Iterable[bytes]) -> None:
  if buckets.is_remote(path):
    buckets.write(path, parts)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
    left.unlink(missing_ok=True)  # of a writer that was killed
  draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with draft.open("wb") as file:
      file.writelines(parts)
      file.flush()
      os.fsync(file.fileno())
    os.replace(draft, path)
  finally:
    draft.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value) -> None:
  """`value` as indented JSON, whole or not at all; ValueError for NaN and infinity."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
  write_bytes(path, _encode(text + "\n"))


def read_json(path: pathlib.Path):
  """The value of a JSON file; ValueError names a file that is absent or not JSON."""
  try:
    with buckets.local_copy(path) as own:
      return json.loads(own.read_bytes())
  except FileNotFoundError:
    raise ValueError(f"{path}: wanted this file, found none") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: wanted JSON, got {error}") from None


def write_rows(path: pathlib.Path, rows: Iterable[Mapping]) -> None:
  """One JSON object a line, the whole file or nothing of it."""
  write_bytes(path, b"".join(map(encode_row, rows)))


def append_rows(path: pathlib.Path, rows: Iterable[Mapping]) -> None:
  """Adds rows that are on the disk when this returns; in a bucket soon after, and
  before whatever is written next.

  First cuts off what a killed writer left of a last line.
  """
  content = b"".join(map(encode_row, rows))
  own = buckets.staging_path(path)
  own.parent.mkdir(parents=True, exist_ok=True)
  repair_last_line(own)
  with own.open("ab") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  buckets.flush(due=True)


def read_rows(path: pathlib.Path) -> list[dict]:
  """The rows of a JSONL file in order; an unfinished last line is passed over.

  `append_rows` is what cuts that line off: reading leaves the file as it is. Raises
  ValueError with file:line for any other line that is not a JSON object.
  """
  return [*each_row(path)]


def each_row(
  path: pathlib.Path, key: Callable[[dict], Any] | None = None
) -> Iterator[dict]:
  """As `read_rows`, one after the other; in the order of a key, whose values alone are
  held in memory."""
  opened = contextlib.ExitStack()
  try:
    file = opened.enter_context(
      opened.enter_context(buckets.local_copy(path)).open("rb")
    )
  except FileNotFoundError:
    raise ValueError(f"{path}: wanted this file, found none") from None

  def rows():
    for number, line in enumerate(file, 1):
      if not line.endswith(b"\n") and _row(line) is None:
        return
      yield _checked_row(path, number, line), len(line)

  with opened:
    if key is None:
      yield from (row for row, _ in rows())
      return
    places, at = [], 0
    for row, size in rows():
      places.append((key(row), at))
      at += size
    for _, place in sorted(places):
      file.seek(place)
      yield json.loads(file.readline())


def sort_rows(path: pathlib.Path, key: Callable[[dict], Any]) -> None:
  """Puts the rows of a JSONL file in the order of `key`, whole or not at all; memory
  and errors as of `each_row`."""
  if not buckets.is_remote(path):
    repair_last_line(path)
  _replace(path, map(encode_row, each_row(path, key)))


def read_spec_files(dir: pathlib.Path) -> dict[str, str]:
  """File name -> text of each *.md in `dir` but README.md, in order of their names."""
  dir = pathlib.Path(dir)
  if not dir.is_dir():
    raise ValueError(f"{dir}: wanted a folder with specification files, found none")
  paths = [path for path in sorted(dir.glob("*.md")) if path.name != "README.md"]
  if not paths:
    raise ValueError(f"{dir}: wanted specification files (*.md), the folder has none")
  return {path.name: _text(path) for path in paths}


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: wanted a text in UTF-8, {error}") from error


class Store:
  """The folder of one run, and the manifests that say which stages are done.

  A manifest is {"format_version", "stage", "config", "config_hash", "inputs",
  "outputs", "code_version", "seed", "device", "started", "finished", "wall_s",
  "summary"}: times are UTC, `finished` is null while the stage runs, `inputs` maps
  files to SHA-256, `outputs` the files that the finished stage left in its folder
  (arrays have sums of their own: checkpoints.py), and `wall_s` is the sum over all
  goes.

  In a run of several processes each calls the same methods in the same order: the
  first writes, and what is read was read by all when a method returns.
  """

  def __init__(
    self, workdir: pathlib.Path, shared: Mapping[str, pathlib.Path] | None = None
  ):
    """`shared` has the workdirs of stages that other runs have done for this one."""
    self.workdir = buckets.absolute(workdir)
    buckets.check_access(self.workdir)
    self._shared = {
      stage: buckets.absolute(place) for stage, place in (shared or {}).items()
    }
    self._since: dict[str, float] = {}

  @contextlib.contextmanager
  def hold_workdir(self) -> Iterator[None]:
    """Holds WORKDIR for this run; ValueError where another is at work in it.

    The system lets go of it with the process, however that ends: no lock is ever stale.
    File systems without locks hold nobody off. In a bucket there is a lease instead.
    """
    held = wrong = None
    if distributed.is_first_process() and buckets.is_remote(self.workdir):
      try:
        held = buckets.Lease(self.workdir / ".lock")
      except ValueError as error:
        wrong = str(error)
    elif distributed.is_first_process() and fcntl:
      try:
        self.workdir.mkdir(parents=True, exist_ok=True)
        held = (self.workdir / ".lock").open("a")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        wrong = (
          f"{self.workdir}: another run is at work here; wait for it, or take another "
          "--workdir"
        )
      except OSError as error:
        if held is None:
          wrong = (
            f"--workdir: wanted a folder to write in, or to make, got {self.workdir} "
            f"({error.strerror})"
          )
        elif error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
          raise
    wrong = distributed.broadcast(wrong)
    try:
      if wrong:
        raise ValueError(wrong)
      yield
    finally:
      if held:
        held.close()

  def write_json(self, path: pathlib.Path, value) -> None:
    """As the function."""
    distributed.run_on_first(str(path), write_json, path, value)

  def write_rows(self, path: pathlib.Path, rows: Iterable[Mapping]) -> None:
    """As the function."""
    distributed.run_on_first(str(path), write_rows, path, rows)

  def write_bytes(self, path: pathlib.Path, content: bytes) -> None:
    """As the function."""
    distributed.run_on_first(str(path), write_bytes, path, content)

  def append_rows(self, path: pathlib.Path, rows: Iterable[Mapping]) -> None:
    """As the function; the others do not wait for it."""
    if distributed.is_first_process():
      append_rows(path, rows)

  def sort_rows(self, path: pathlib.Path, key: Callable[[dict], Any]) -> None:
    """As the function."""
    distributed.run_on_first(str(path), sort_rows, path, key)

  def read_json(self, path: pathlib.Path):
    """As the function."""
    return self._read(read_json, path)

  def read_rows(self, path: pathlib.Path) -> list[dict]:
    """As the function."""
    return self._read(read_rows, path)

  def each_row(
    self, path: pathlib.Path, key: Callable[[dict], Any] | None = None
  ) -> Iterator[dict]:
    """As the function; to be read to its end."""
    buckets.flush()
    distributed.barrier(f"before {path}")
    yield from each_row(path, key)
    distributed.barrier(str(path))

  def has(self, path: pathlib.Path) -> bool:
    """Whether a file is there, as the first process sees it."""
    return distributed.broadcast(buckets.exists(path))

  def _read(self, read, path: pathlib.Path):
    found = read(path)
    distributed.barrier(str(path))
    return found

  def path(self, stage: str, name: str = "") -> pathlib.Path:
    """WORKDIR/<stage>/<name>, or the stage's folder; nothing is made. A shared stage
    has the workdir of the run that did it."""
    if stage in ("", "..") or pathlib.PurePath(stage).name != stage:
      raise ValueError(f"a stage is the name of one folder, got {stage!r}")
    return self._shared.get(stage, self.workdir) / stage / name

  def left(self, stage: str, name: str) -> pathlib.Path:
    """Where a stage has left a file or folder of that name; ValueError, with the flags
    that make it, where it is not."""
    where = self.path(stage, name)
    if where.exists():
      return where
    if (self.manifest(stage) or {}).get("finished"):
      raise ValueError(
        f"{where} is gone since stage {stage} was done; put it back, or do that stage "
        f"again ({again(stage)})"
      )
    raise ValueError(
      f"{where} is missing: run the {stage} stage first "
      f"(--config.stages={stage} or all)"
    )

  def manifest(self, stage: str) -> dict | None:
    """The manifest of a stage, or None before its first `begin`."""
    return read_manifest(self.path(stage, "manifest.json"))

  def begin(
    self,
    stage: str,
    config: Mapping[str, object],
    inputs: Iterable[pathlib.Path],
    seed: int,
    device: str,
    *,
    start_over: bool = False,
    anew: bool = False,
    renewed: Collection[str | pathlib.Path] = (),
    hash_of: Callable[[pathlib.Path], str] | None = None,
  ) -> str:
    """Opens a stage: "done" (nothing to do), "resume" (was cut off) or "fresh".

    `config` has the flat keys that the stage depends on, `inputs` files or folders it
    reads. Raises ValueError, naming what changed, when the stage was begun or done with
    another config, seed or input. `start_over` deletes the stage's folder first (the
    stage's metrics stay: see `metrics.Metrics.rewind`). `anew` says that a stage which
    was cut off keeps nothing of that go, whose config and inputs then do not count.
    A stage whose `renewed` keys or inputs alone changed goes on, done or not. `hash_of`
    is the hash of an input, else `file_hash`.
    """
    state = wrong = None
    if distributed.is_first_process():
      try:
        of = stage, config, inputs, seed, device, hash_of or file_hash
        state = self._begin(of, start_over, anew, self._keys(renewed))
      except ValueError as error:
        wrong = str(error)
    state, wrong = distributed.broadcast([state, wrong])
    if wrong is not None:
      raise ValueError(wrong)
    if state != "done":
      self._since[stage] = time.monotonic()
    return state

  def _begin(self, of, start_over, anew, renewed) -> str:
    stage = of[0]
    if start_over and buckets.is_remote(self.path(stage)):
      buckets.remove(self.path(stage))
    elif start_over and self.path(stage).exists():
      try:
        shutil.rmtree(self.path(stage))
      except OSError as error:
        raise ValueError(f"config.start_over: {self.path(stage)}: {error}") from error
    new = self._new_manifest(*of)
    old = self.manifest(stage)
    if old is None:
      self._refuse_leftovers(stage)
    elif anew and old["finished"] is None:
      pass
    elif changes := _differences(_resume_key(old, renewed), _resume_key(new, renewed)):
      state = "was cut off" if old["finished"] is None else "is done"
      raise ValueError(f"stage {stage} {state}, but {'; '.join(changes)}. {_REMEDY}")
    elif old["finished"] is not None and _resume_key(old) == _resume_key(new):
      return "done"
    kept = {key: old[key] for key in ("started", "wall_s")} if old else {}
    write_json(self.path(stage, "manifest.json"), new | kept)
    return "resume" if old else "fresh"

  def pause(self, stage: str) -> None:
    """Notes the time spent so far, which a kill would lose; for each checkpoint."""
    with buckets.unordered():
      self._write_manifest(stage, self._manifest_with_elapsed(stage))

  def finish(self, stage: str, summary: Mapping) -> None:
    """Marks the stage done; `summary` is whatever is worth showing of it, as JSON."""
    manifest = self._manifest_with_elapsed(stage)
    end = {"finished": _now(), "summary": dict(summary)}
    if distributed.is_first_process():
      end["outputs"] = _outputs(self.path(stage))
    self._write_manifest(stage, manifest | end)
    del self._since[stage]

  def _new_manifest(self, stage, config, inputs, seed, device, hash_of) -> dict:
    config = json.loads(json.dumps(dict(config), sort_keys=True))
    text = json.dumps(config, sort_keys=True)
    return {
      "format_version": FORMAT_VERSION,
      "stage": stage,
      "config": config,
      "config_hash": hashlib.sha256(text.encode()).hexdigest(),
      "inputs": self._hashes(inputs, hash_of),
      "outputs": {},
      "code_version": code_version(),
      "seed": seed,
      "device": device,
      "started": _now(),
      "finished": None,
      "wall_s": 0.0,
      "summary": {},
    }

  def _hashes(self, inputs: Iterable[pathlib.Path], hash_of) -> dict[str, str]:
    hashes = {}
    ours = {self.workdir, *self._shared.values()}  # others have manifests of their own
    for folder in {buckets.absolute(path).parent for path in inputs}:
      if folder.parent in ours:
        check_outputs(folder)
    for full in map(buckets.absolute, inputs):
      key = self._input_name(full)
      hashes[full.as_posix() if key in hashes else key] = hash_of(full)
    return hashes

  def _input_name(self, full: pathlib.Path) -> str:
    inside = full.is_relative_to(self.workdir)
    # An input from elsewhere may move with its repository; two names tell it apart.
    key = full.relative_to(self.workdir) if inside else pathlib.Path(*full.parts[-2:])
    return key.as_posix()

  def _keys(self, renewed: Collection[str | pathlib.Path]) -> set[str]:
    """Keys of the config, and inputs, as `_resume_key` names them."""
    return {
      key
      if isinstance(key, str)
      else f"input {self._input_name(buckets.absolute(key))}"
      for key in renewed
    }

  def _refuse_leftovers(self, stage: str) -> None:
    folder = self.path(stage)
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    found = [name for name in there if not name.endswith(".tmp")]
    if found:
      raise ValueError(
        f"{folder}: holds {', '.join(found[:3])} but no manifest.json, so nobody knows "
        f"what made them. {_REMEDY}"
      )

  def _manifest_with_elapsed(self, stage: str) -> dict:
    if stage not in self._since:
      raise ValueError(f"stage {stage} is not open: call begin first")
    now = time.monotonic()
    spent, self._since[stage] = now - self._since[stage], now
    manifest = self.manifest(stage) or {}
    return manifest | {"wall_s": round(manifest["wall_s"] + spent, 3)}

  def _write_manifest(self, stage: str, manifest: dict) -> None:
    self.write_json(self.path(stage, "manifest.json"), manifest)


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
    manifest = read_json(path)
  except ValueError as error:
    raise ValueError(f"{error}. {_REMEDY}") from error
  version = manifest.get("format_version") if isinstance(manifest, dict) else None
  if version != FORMAT_VERSION:
    raise ValueError(
      f"{path}: wanted manifest format {FORMAT_VERSION}, got {version!r:.80}. {_REMEDY}"
    )
  for key, kind in _MANIFEST_TYPES.items():
    if not isinstance(manifest.get(key, ...), kind):
      got = repr(manifest[key]) if key in manifest else "nothing"
      raise ValueError(f"{path}: wanted {kind} as {key}, got {got:.80}. {_REMEDY}")
  for key in ("inputs", "outputs"):
    if not all(isinstance(hash, str) for hash in manifest[key].values()):
      raise ValueError(f"{path}: wanted a hash for each of {key}. {_REMEDY}")
  return manifest


def check_outputs(folder: pathlib.Path) -> None:
  """Raises ValueError where a file of a finished stage is not what the stage wrote."""
  path = folder / "manifest.json"
  manifest = read_manifest(path)
  if manifest is None or manifest["stage"] != folder.name:
    return
  for name, hash in manifest["outputs"].items():
    if pathlib.PurePath(name).name != name:
      raise ValueError(f"{path}: {name!r} is no file of this folder. {_REMEDY}")
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


def _outputs(folder: pathlib.Path) -> dict[str, str]:
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


def _resume_key(manifest: Mapping, but: Collection[str] = ()) -> dict:
  """What must be the same for a stage to count as done or to go on, flat."""
  inputs = {f"input {name}": hash[:8] for name, hash in manifest["inputs"].items()}
  found = manifest["config"] | {"the run's seed": manifest["seed"]} | inputs
  return {key: value for key, value in found.items() if key not in but}


def _differences(old: Mapping, new: Mapping) -> list[str]:
  """Each key in which two flat mappings of JSON values differ, with both values."""
  found = []
  for key in sorted(old.keys() | new.keys()):
    before, after = (json.dumps(m[key]) if key in m else "absent" for m in (old, new))
    if before != after:
      found.append(f"{key} was {before} and is now {after}")
  return found


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _encode(text: str) -> bytes:
  # A lone surrogate becomes \udXXX, which is its escape in JSON too.
  return text.encode("utf-8", "backslashreplace")


def encode_row(row: Mapping) -> bytes:
  """A row as its line of a JSONL file; ValueError for NaN and infinity."""
  return _encode(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _row(line: bytes) -> dict | None:
  """The JSON object of a line, or None. No proper prefix of an object is an object."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) else None


def _checked_row(path: pathlib.Path, number: int, line: bytes) -> dict:
  row = _row(line)
  if row is None:
    got = line[:60].decode("utf-8", "replace")
    raise ValueError(f"{path}:{number}: wanted one JSON object a line, got {got!r}")
  return row


def repair_last_line(path: pathlib.Path) -> None:
  """Makes a JSONL file end with a whole line: ends the last one, or cuts it off."""
  if not path.exists() or path.stat().st_size == 0:
    return
  with path.open("r+b") as file:
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
      return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _row(content[start:]) is None:
      file.truncate(start)
    else:
      file.write(b"\n")
