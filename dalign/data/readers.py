"""Files and data sets of all kinds as rows: names and values, and where each row is.

Knows formats (TFDS, JSONL, CSV, Parquet, what `datasets` saved), not prompts.
"""

import codecs
from collections.abc import Iterator
import contextlib
import csv
import io
import json
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from dalign.config import convert

Row = dict[str, object]


def prepare(builder: tfds.core.DatasetBuilder) -> None:
  """Has TFDS download and write a data set, without what it prints."""
  with (
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
  ):
    builder.download_and_prepare()


def tfds_rows(name: str, split_name: str, data_dir: str) -> Iterator[tuple[str, Row]]:
  """(where it is, row) of each row of a split of any TFDS data set, kept under
  `data_dir`; ValueError where there is none."""
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
  except ModuleNotFoundError as error:
    raise ValueError(f"tfds:{name} needs it: pip install {error.name}") from None
  except (tfds.core.DatasetNotFoundError, ValueError) as error:
    raise ValueError(f"tfds:{name}: wanted a TFDS data set, got {error}") from None
  if split_name.partition("[")[0] not in builder.info.splits:
    raise ValueError(
      f"tfds:{name}: wanted one of its splits, {sorted(builder.info.splits)}, "
      f"got {split_name!r}"
    )
  return builder_rows(builder, split_name, f"tfds:{name}:{split_name}")


def builder_rows(builder, split_name: str, source: str) -> Iterator[tuple[str, Row]]:
  """(where it is, row) of each row of a prepared TFDS data set, in plain Python."""
  features = builder.info.features
  data = builder.as_data_source(split=split_name)
  for number in range(len(data)):
    row = {name: _plain(value, features[name]) for name, value in data[number].items()}
    yield f"{source} row {number}", row


def _plain(value, feature):
  """A TFDS value in plain Python: text for bytes and labels, lists for sequences."""
  if isinstance(feature, tfds.features.ClassLabel):
    return feature.int2str(int(value))
  if isinstance(value, dict):
    columns = {name: _plain(part, None) for name, part in value.items()}
    return [
      dict(zip(columns, parts, strict=True))
      for parts in zip(*columns.values(), strict=True)
    ]
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, (list, np.ndarray)):
    return [_plain(part, None) for part in value]
  return value.item() if isinstance(value, np.generic) else value


def json_lines(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
  """(file:line, row) of each line that is not blank; ValueError for one that is not a
  JSON object."""
  try:
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
  except OSError as error:
    raise ValueError(f"{path}: wanted a JSONL file, got {error.strerror}") from None
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line, object_pairs_hook=convert.unique)
    except (ValueError, RecursionError) as error:
      array = line.strip() == b"[" or line.lstrip().startswith(b"[{")
      got = (
        ", an object a line, got the begin of an array" if array else f", got {error}"
      )
      raise ValueError(f"{path}:{number}: wanted JSON{got}") from None
    if not isinstance(row, dict):
      raise ValueError(f"{path}:{number}: wanted a JSON object, got {row!r:.60}")
    yield f"{path}:{number}", row


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
  import pyarrow.parquet  # large, and only some read Parquet

  try:
    rows = pyarrow.parquet.read_table(path).to_pylist()
  except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
    said = " ".join(str(error).split())
    raise ValueError(f"{path}: wanted a Parquet file, got {said}") from None
  for number, row in enumerate(rows):
    yield f"{path} row {number}", row


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
  """(file:line, row) of each row of a CSV file, whose first one names the columns."""
  try:
    text = path.read_bytes().decode("utf-8-sig")
  except OSError as error:
    raise ValueError(f"{path}: wanted a CSV file, got {error.strerror}") from None
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: wanted CSV in UTF-8, {error}") from None
  reader = csv.reader(io.StringIO(text, newline=""), strict=True)
  try:
    names = next(reader, [])
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
      raise ValueError(f"{path}:1: wanted commas between columns, got {names[0]!r:.80}")
    if twice := [name for name in names if names.count(name) > 1]:
      raise ValueError(f"{path}:1: wanted each column once, got {twice[0]!r} again")
    line = reader.line_num + 1
    for cells in reader:
      if cells and len(cells) != len(names):
        raise ValueError(
          f"{path}:{line}: wanted {len(names)} cells, as there are columns "
          f"({', '.join(names)}), got {len(cells)}: {cells!r:.80}"
        )
      if cells:
        yield f"{path}:{line}", dict(zip(names, cells, strict=True))
      line = reader.line_num + 1
  except csv.Error as error:
    raise ValueError(f"{path}:{reader.line_num}: wanted CSV, got {error}") from None


def _hf_rows(folder: pathlib.Path) -> Iterator[tuple[str, Row]]:
  """(folder row n, row) of each row of a Dataset of the library `datasets`, as its
  save_to_disk leaves it."""
  try:
    import datasets  # large, and only some have such folders
  except ImportError:
    raise ValueError(f"hf:{folder} needs datasets: pip install datasets") from None
  try:
    data = datasets.load_from_disk(str(folder))
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(
      f"hf:{folder}: wanted a folder that save_to_disk of `datasets` wrote, got {said}"
    ) from None
  if isinstance(data, datasets.DatasetDict):
    some = ", ".join(f"hf:{folder / split}" for split in sorted(data))
    raise ValueError(f"hf:{folder}: wanted one of its splits, {some}")
  labels = {
    name: feature
    for name, feature in data.features.items()
    if isinstance(feature, datasets.ClassLabel)
  }
  for number, row in enumerate(data):
    for name, label in labels.items():
      if row[name] is not None:
        row[name] = label.int2str(row[name]) if row[name] >= 0 else None
    yield f"{folder} row {number}", row


READERS = {
  "csv": _csv_rows,
  "jsonl": json_lines,
  "parquet": _parquet_rows,
  "hf": _hf_rows,
}


def read_rows(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
  """(where it is, row) of each row of a JSONL or a Parquet file, by its ending."""
  return _parquet_rows(path) if path.suffix == ".parquet" else json_lines(path)
