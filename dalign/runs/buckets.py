"""Folders in a bucket, gs://BUCKET/..., in place of those on a disk.

What a bucket can do: replace an object whole or not at all, on condition that nobody
else has; read one; list them. It cannot add to an object, rename, or lock. So what is
replaced is written in one go; what grows does so in a twin on this machine's disk, of
which the bucket gets the whole, at the latest before the next other write; and a lease
that its holder renews is the lock. A run that is killed thus leaves a bucket as it
would have left a disk if it had been killed a little earlier.

Paths on a disk pass through as they are. Arrays are Orbax's (checkpoints.py); it and
the paths that `as_path` makes reach the bucket by gcsfs, what is here by Google's
client.
"""

from collections.abc import Iterable, Iterator
import contextlib
import functools
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid

from dalign.runs import gcs
from dalign.runs.gcs import SCHEME

MAX_UPLOAD_DELAY_S = 20.0  # until what was appended is in the bucket,
UPLOAD_DELAY_FACTOR = 10  # or after so many times as many as the last upload took
LEASE_RENEWAL_S = 10.0  # a lease is renewed every so many seconds,
LEASE_EXPIRY_S = 60.0  # and whoever has not done so for as many has lost it


def is_remote(path) -> bool:
  """Whether a path is one of a bucket."""
  return os.fspath(path).startswith(SCHEME)


def as_path(path):
  """A path, or the text of one, as what has pathlib's methods; nothing is reached.

  ValueError for a bucket without a name, other services, and a missing library.
  """
  text = os.fspath(path)
  scheme, found, rest = text.partition("://")
  if not found:
    return pathlib.Path(path)
  if f"{scheme}://" != SCHEME or not rest.strip("/") or ".." in rest.split("/"):
    raise ValueError(f"wanted a folder or {SCHEME}BUCKET/FOLDER, got {text!r}")
  gcs.prepare()
  from etils import epath

  return epath.Path(text)


def absolute(path):
  """As `as_path`, on a disk from its root."""
  found = as_path(path)
  return found if is_remote(found) else found.absolute()


def check_access(path) -> None:
  """ValueError where the bucket of a path is not there or not ours, ConnectionError
  where it does not answer."""
  if is_remote(path):
    gcs.cached_bucket(gcs.bucket_and_name(path)[0])


def write(path, parts: Iterable[bytes]) -> None:
  """Makes an object hold `parts`, whole or not at all, and all that was appended
  before is there too."""
  if not _state.unordered:
    flush()
  drop_staged(path)
  with tempfile.TemporaryFile() as draft:
    draft.writelines(parts)
    _upload(path, draft)


@contextlib.contextmanager
def unordered() -> Iterator[None]:
  """Writes inside need not wait for the upload of what was appended earlier."""
  _state.unordered = True
  try:
    yield
  finally:
    _state.unordered = False


def exists(path) -> bool:
  """Whether there is such a file, folder or object, what was appended among them."""
  if is_remote(path):
    _flush_pending(path)
  return path.exists()


@contextlib.contextmanager
def local_copy(path) -> Iterator[pathlib.Path]:
  """A file to be read: the path itself, or a copy of an object, for as long as it is
  needed. FileNotFoundError where there is no such object."""
  if not is_remote(path):
    yield path
    return
  _flush_pending(path)
  with tempfile.TemporaryDirectory(prefix="dalign-") as folder:
    copy = pathlib.Path(folder) / path.name
    with gcs.translate_errors(path):
      gcs.blob(path).download_to_filename(str(copy))
    yield copy


def staging_path(path) -> pathlib.Path:
  """The file or folder on this machine in which what `path` holds may grow: the path
  itself, or for a bucket another, which `flush` uploads where it has changed."""
  if not is_remote(path):
    return path
  twin = _staging_path(path)
  if not twin.exists():
    twin.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError), local_copy(path) as copy:
      os.replace(copy, twin)
      _state.sent[twin] = _stamp(twin)
  return twin


def flush(*, due: bool = False) -> None:
  """Uploads what has changed in twins; with `due` only if that was long ago.

  ConnectionError where the bucket does not answer, or another run has the lease.
  """
  if due and time.monotonic() < _state.due:
    return
  if _state.lease:
    _state.lease.check()
  start = time.monotonic()
  for file in sorted(_state.files()):
    stamp = _stamp(file)
    if _state.sent.get(file) != stamp:
      with file.open("rb") as content:
        _upload(as_path(SCHEME + file.relative_to(_state.folder).as_posix()), content)
      _state.sent[file] = stamp
  took = time.monotonic() - start
  _state.due = time.monotonic() + max(MAX_UPLOAD_DELAY_S, UPLOAD_DELAY_FACTOR * took)


def drop_staged(path) -> None:
  """Drops the twins of an object, or of all in a folder, with what was not uploaded."""
  twin = _staging_path(path)
  for file in [file for file in _state.sent if file.is_relative_to(twin)]:
    del _state.sent[file]
  if twin.is_file():
    twin.unlink()
  else:
    shutil.rmtree(twin, ignore_errors=True)


def remove(path) -> None:
  """Deletes all objects of a folder."""
  flush()
  drop_staged(path)
  path.rmtree(missing_ok=True)


class Lease:
  """An object that says who is at work; its holder renews it every LEASE_RENEWAL_S.

  Another may take it once it has not changed for LEASE_EXPIRY_S, by its own clock, or
  at once where the holder was a process of this machine that is no more. The one that
  lost it writes nothing any longer: it is told at its next write, or within two beats.
  """

  def __init__(self, path):
    """Takes the lease of a folder; ValueError where another run holds it."""
    self._path = path
    bucket, name = gcs.bucket_and_name(path)
    bucket = gcs.open_bucket(bucket)  # with a client for the thread alone
    self._blob = bucket.blob(name)
    self._owner = {
      "run": uuid.uuid4().hex,
      "host": socket.gethostname(),
      "process": os.getpid(),
      "machine": _machine(),
    }
    self._lost, self._end, self._lock = False, threading.Event(), threading.Lock()
    with gcs.translate_errors(path):
      self._take()
    self._renewed = time.monotonic()
    _state.lease = self
    self._renewal_thread = threading.Thread(
      target=self._renew_periodically, daemon=True
    )
    self._renewal_thread.start()

  def check(self) -> None:
    """ConnectionError where the lease is no longer ours."""
    if not self._lost and time.monotonic() - self._renewed > 2 * LEASE_RENEWAL_S:
      with gcs.translate_errors(self._path):
        self._renew()
    if self._lost:
      raise ConnectionError(
        f"{self._path.parent}: another run has taken this workdir over, since this one "
        f"was not heard of for {LEASE_EXPIRY_S:.0f} s; nothing more is written"
      )

  def close(self) -> None:
    """Uploads what is left and gives the lease back, if it is still ours and the bucket
    answers."""
    writes = not (self._lost or _state.unreachable)
    try:
      if writes:
        flush()
    finally:
      self._end.set()
      self._renewal_thread.join()
      _state.lease = None
      drop_staged(self._path.parent)
    if writes:
      with (
        gcs.translate_errors(self._path),
        contextlib.suppress(gcs.api().PreconditionFailed),
      ):
        self._blob.delete(if_generation_match=self._generation)

  def _take(self) -> None:
    seen, since = None, time.monotonic()
    while True:
      found, generation = self._read()
      silent = generation == seen and time.monotonic() - since > LEASE_EXPIRY_S
      if found is None or silent or _process_has_ended(found):
        if self._put(generation):
          return
      elif seen not in (None, generation):
        who = f"process {found.get('process')} of {found.get('host')}"
        raise ValueError(
          f"{self._path.parent}: another run is at work here, {who}; wait for it, or "
          "take another --workdir"
        )
      elif seen is None:
        seen = generation
        print(
          f"dalign: {self._path.parent}: a run of {found.get('host')} was at work here"
          f"; waiting up to {LEASE_EXPIRY_S:.0f} s for a sign of it",
          file=sys.stderr,
        )
      time.sleep(LEASE_RENEWAL_S / 10)

  def _read(self) -> tuple[dict | None, int]:
    """What the object says, and its generation; or None and 0."""
    blob = self._blob.bucket.get_blob(self._blob.name)
    if blob is None:
      return None, 0
    try:
      found = json.loads(blob.download_as_bytes())
    except (gcs.api().NotFound, ValueError):
      found = {}
    return found if isinstance(found, dict) else {}, blob.generation

  def _put(self, generation: int) -> bool:
    """Writes the object over that generation; False where it has another by now."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    try:
      self._blob.upload_from_string(
        json.dumps(self._owner),
        if_generation_match=generation,
        retry=DEFAULT_RETRY.with_timeout(LEASE_RENEWAL_S),
      )
    except gcs.api().PreconditionFailed:
      found, now = self._read()  # the request may have been sent twice, and done once
      if found is None or found.get("run") != self._owner["run"]:
        return False
      self._generation = now
      return True
    self._generation = self._blob.generation
    return True

  def _renew(self) -> None:
    with self._lock:
      start = time.monotonic()
      self._lost = self._lost or not self._put(self._generation)
      self._renewed = start

  def _renew_periodically(self) -> None:
    while not self._end.wait(LEASE_RENEWAL_S) and not self._lost:
      with contextlib.suppress(ConnectionError), gcs.translate_errors(self._path):
        self._renew()


class _ProcessState:
  """State of this process: staged files, when their upload is due, the lease."""

  def __init__(self):
    self.sent: dict[pathlib.Path, tuple] = {}  # twin -> its stamp as it was uploaded
    self.due = 0.0
    self.unordered = False
    self.unreachable = False  # whether the bucket did not answer the last upload
    self.lease: Lease | None = None

  @functools.cached_property
  def folder(self) -> pathlib.Path:
    self._made = tempfile.TemporaryDirectory(prefix="dalign-")
    return pathlib.Path(self._made.name)

  def files(self) -> Iterator[pathlib.Path]:
    """All twins that are files."""
    if "folder" in self.__dict__:
      yield from (path for path in self.folder.rglob("*") if path.is_file())


_state = _ProcessState()


def _staging_path(path) -> pathlib.Path:
  return _state.folder / "/".join(gcs.bucket_and_name(path))


def _flush_pending(path) -> None:
  """Uploads the staged file of an object, if any, before the object is read."""
  if _staging_path(path).exists():
    flush()


def _stamp(file: pathlib.Path) -> tuple[int, int]:
  found = file.stat()
  return found.st_size, found.st_mtime_ns


def _upload(path, content) -> None:
  """A file's content as an object, from its beginning."""
  if _state.lease:
    _state.lease.check()
  size = content.seek(0, os.SEEK_END)
  try:
    with gcs.translate_errors(path):
      gcs.blob(path).upload_from_file(content, rewind=True, size=size)
  except ConnectionError:
    _state.unreachable = True
    raise
  _state.unreachable = False


def _machine() -> str:
  """What tells this machine, and its numbers of processes, from all others; "" where
  the system does not say."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _process_has_ended(found: dict) -> bool:
  """Whether a lease is that of a process of this machine that has ended."""
  if not _machine() or found.get("machine") != _machine():
    return False
  try:
    os.kill(int(found["process"]), 0)
  except ProcessLookupError:
    return True
  except OSError:
    return False
  return False
