"""Files of a run: JSON, and rows of JSON, one a line.

What is replaced is replaced whole (a temporary file, then `os.replace`), and what grows
grows by whole lines, so that a run killed at any point can go on. In a bucket
(gs://BUCKET/FOLDER) buckets.py sees to the same. Does not know what the rows mean.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import glob
import json
import os
import pathlib
from typing import Any

from dalign.runs import buckets


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
