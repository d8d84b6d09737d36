"""The folder of a run, WORKDIR: its stages, and the manifests that say what is done.

Each stage keeps its rows, its checkpoints and a manifest.json in WORKDIR/<stage>;
metrics.jsonl (metrics.py) lies beside them. Does not know what a stage does, models,
tokens, or arrays on disk (checkpoints.py does).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
import contextlib
import datetime
import errno
import functools
import hashlib
import json
import pathlib
import shutil
import time
from typing import Any, Concatenate, ParamSpec

from dalign.runs import buckets
from dalign.runs import distributed
from dalign.runs import manifests
from dalign.runs import store

try:
  import fcntl
except ImportError:  # Windows has none, and there nobody is held off
  fcntl = None  # type: ignore[assignment]

P = ParamSpec("P")


def _on_first(
  do: Callable[Concatenate[pathlib.Path, P], None],
) -> Callable[Concatenate["Store", pathlib.Path, P], None]:
  """A method that has the first process `do` it to a path, while all others wait."""

  def method(
    self: "Store", path: pathlib.Path, /, *args: P.args, **more: P.kwargs
  ) -> None:
    distributed.run_on_first(str(path), functools.partial(do, path, *args, **more))

  return method


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

  # As the functions of these names, by the first process.
  write_json = _on_first(store.write_json)
  write_rows = _on_first(store.write_rows)
  write_bytes = _on_first(store.write_bytes)
  sort_rows = _on_first(store.sort_rows)

  def append_rows(self, path: pathlib.Path, rows: Iterable[Mapping]) -> None:
    """As the function; the others do not wait for it."""
    if distributed.is_first_process():
      store.append_rows(path, rows)

  def read_json(self, path: pathlib.Path):
    """As the function."""
    return self._read(store.read_json, path)

  def read_rows(self, path: pathlib.Path) -> list[dict]:
    """As the function."""
    return self._read(store.read_rows, path)

  def each_row(
    self, path: pathlib.Path, key: Callable[[dict], Any] | None = None
  ) -> Iterator[dict]:
    """As the function; to be read to its end."""
    buckets.flush()
    distributed.barrier(f"before {path}")
    yield from store.each_row(path, key)
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
        f"again ({manifests.again(stage)})"
      )
    raise ValueError(
      f"{where} is missing: run the {stage} stage first "
      f"(--config.stages={stage} or all)"
    )

  def manifest(self, stage: str) -> dict | None:
    """The manifest of a stage, or None before its first `begin`."""
    return manifests.read_manifest(self.path(stage, "manifest.json"))

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
        of = stage, config, inputs, seed, device, hash_of or manifests.file_hash
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
    elif changed := manifests.changes(old, new, renewed):
      state = "was cut off" if old["finished"] is None else "is done"
      raise ValueError(
        f"stage {stage} {state}, but {'; '.join(changed)}. {manifests.REMEDY}"
      )
    elif old["finished"] is not None and not manifests.changes(old, new):
      return "done"
    kept = {key: old[key] for key in ("started", "wall_s")} if old else {}
    store.write_json(self.path(stage, "manifest.json"), new | kept)
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
      end["outputs"] = manifests.hash_outputs(self.path(stage))
    self._write_manifest(stage, manifest | end)
    del self._since[stage]

  def _new_manifest(self, stage, config, inputs, seed, device, hash_of) -> dict:
    config = json.loads(json.dumps(dict(config), sort_keys=True))
    text = json.dumps(config, sort_keys=True)
    return {
      "format_version": manifests.FORMAT_VERSION,
      "stage": stage,
      "config": config,
      "config_hash": hashlib.sha256(text.encode()).hexdigest(),
      "inputs": self._hashes(inputs, hash_of),
      "outputs": {},
      "code_version": manifests.code_version(),
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
        manifests.check_outputs(folder)
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
    """Keys of the config, and inputs, as `manifests.changes` names them."""
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
        f"what made them. {manifests.REMEDY}"
      )

  def _manifest_with_elapsed(self, stage: str) -> dict:
    now = time.monotonic()
    spent, self._since[stage] = now - self._since[stage], now
    manifest = self.manifest(stage) or {}
    return manifest | {"wall_s": round(manifest["wall_s"] + spent, 3)}

  def _write_manifest(self, stage: str, manifest: dict) -> None:
    self.write_json(self.path(stage, "manifest.json"), manifest)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
