"""Prompt sets: where prompts come from, how they are split, and in which order.

Reads the prompts that come with dalign (as a TFDS data set), any TFDS data set, CSV,
JSONL, Parquet and what the library `datasets` saved into `Prompt`; splits by scenario
so that near-twins never straddle; says which row is visited when. Needs no TensorFlow.

Does not know specifications, chat templates, tokens, stages, or the other files of a
run.
"""

import codecs
import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import io
import json
import math
import pathlib
import re
from typing import Any

from etils import epath
import grain
import numpy as np
import tensorflow_datasets as tfds

from dalign.config import convert
from dalign.runs import progress
from dalign.text import words
from dalign.text.points import Points
from dalign.types import EXPECTED
from dalign.types import KINDS
from dalign.types import Prompt
from dalign.types import Turn

FIELDS = (
  *("prompt", "turns", "category", "expected", "id"),
  *("kind", "split", "answer", "scenario", "clauses"),
)
SPLITS = ("train", "eval")
NEAR_DUPLICATE = 0.5  # word-trigram Jaccard from which two prompts are near-twins
EVAL_SHARE = 0.2  # of the scenarios
_FOLDER = pathlib.Path(__file__).parents[1] / "prompts"
_REFERENCES = pathlib.Path(__file__).parents[1] / "recordings/references.jsonl"
_SOURCES = (
  "'bundled', 'csv:PATH', 'jsonl:PATH', 'parquet:PATH', 'hf:DIR' or 'tfds:NAME:SPLIT'"
)
# Columns that may hold what is said, in the order in which they are looked for.
_SAID = ("turns", "prompt", "messages", "conversations")
_SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of roles

Row = dict[str, object]


def bundled_rows() -> list[Row]:
  """The prompts that come with dalign, as rows with every field of `FIELDS`.

  A file <category>.jsonl holds one category; capability.jsonl belongs to "benign", and
  rows of authored.jsonl and rare_clauses.jsonl name theirs. Ids are
  <category>-<scenario>-<k> where a row has none. Splits are those of `split`.
  """
  rows: list[tuple[str, Row]] = []
  counts: dict[str, int] = {}
  for path in _bundled_files():
    capability = path.stem == "capability"
    for where, row in _json_lines(path):
      row = {"category": "benign" if capability else path.stem} | row
      kind = "helpful" if row["category"] == "benign" else "safety"
      key = f"{row['category']}-{row['scenario']}"
      counts[key] = counts.get(key, 0) + 1
      named = {
        "id": f"{key}-{counts[key]}",
        "kind": "capability" if capability else kind,
      }
      rows.append((where, named | row))
  prompts = split(parse_prompts(rows, {}, "bundled"))
  return [_row(prompt) for prompt in prompts]


def references() -> dict[str, str]:
  """Prompt id -> a good answer, of the bundled prompts of the split "eval".

  They were written for grading, and nothing is trained on them.
  """
  return {str(row["prompt_id"]): str(row["answer"]) for row in _reference_rows()}


def points() -> dict[str, Points]:
  """Prompt id -> what right answers say, of the prompts that have a reference."""
  return {
    str(row["prompt_id"]): Points(row["points"], row["wrong"])
    for row in _reference_rows()
  }


def _reference_rows() -> Iterator[dict[str, Any]]:
  return (row for _, row in _json_lines(_REFERENCES))


class DalignPrompts(tfds.core.GeneratorBasedBuilder):
  """`bundled_rows` as a TFDS data set with the splits "train" and "eval"."""

  VERSION = tfds.core.Version("1.2.0")
  RELEASE_NOTES = {
    "1.0.0": "The first prompts.",
    "1.1.0": "Blunt questions with benign look-alikes.",
    "1.2.0": "The clauses that decide each prompt.",
  }
  # TFDS 4.9 would look for it with importlib_resources, which it does not install.
  code_path = epath.Path(__file__)

  def _info(self) -> tfds.core.DatasetInfo:
    text, label = tfds.features.Text, tfds.features.ClassLabel
    shared = {"authored", "rare_clauses", "capability"}  # of several, or of another
    categories = sorted({path.stem for path in _bundled_files()} - shared)
    return self.dataset_info_from_configs(
      description="Prompts to train and measure refusing, safe-completing, complying.",
      features=tfds.features.FeaturesDict(
        {
          "id": text(),
          "turns": tfds.features.Sequence({"role": text(), "content": text()}),
          "category": label(names=categories),
          "expected": label(names=EXPECTED),
          "kind": label(names=KINDS),
          "scenario": text(),
          "answer": text(),
          "clauses": tfds.features.Sequence(text()),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    rows = bundled_rows()
    return {
      name: self._generate_examples([row for row in rows if row["split"] == name])
      for name in SPLITS
    }

  def _generate_examples(self, rows: list[Row]):
    for number, row in enumerate(rows):
      yield number, {name: row[name] for name in self.info.features}


def load(
  source: str, columns: Mapping[str, str], data_dir: str, *, labelled: bool = True
) -> list[Prompt]:
  """The prompts of a source, with ids that differ and a split each.

  `source` is "bundled", "csv:PATH", "jsonl:PATH", "parquet:PATH", "tfds:NAME:SPLIT", or
  "hf:DIR", a folder that `datasets` wrote with save_to_disk. `columns` maps fields of
  `FIELDS` to the source's columns; "=text" is that text for every row, and a field that
  is not mapped is read from the column of its own name if there is one, turns from
  "messages" and "conversations" too. A turn has a role and content, the latter in one
  piece or in OpenAI's parts of text, or ShareGPT's from ("human", "gpt") and value; in
  CSV turns and clauses are JSON. Of a conversation that ends with the assistant's turn,
  what stands before it is the prompt, which is said. Wanted are prompt or turns,
  category and expected, and an answer of kind capability; of other kinds that is one to
  grade by. Where no row has a split, `split` decides. A row without an id has one that
  its turns make. What is null, NaN or blank is not there. TFDS files are kept under
  `data_dir`. Where they need not be `labelled`, category and expected are "" where a
  row has none, and no split is made. Raises ValueError that names the row, what was
  wanted and what came.
  """
  kind, _, rest = source.partition(":")
  _check_columns(columns)
  if source == "bundled":
    return _load_bundled(columns, data_dir)
  if kind in _READERS and rest:
    rows = _READERS[kind](pathlib.Path(rest))
  elif kind == "tfds" and all(parts := rest.partition(":")):
    rows = _tfds_rows(parts[0], parts[2], data_dir)
  else:
    kind = pathlib.Path(source).suffix.lstrip(".")
    hint = f"; did you mean '{kind}:{source}'?" if kind in _READERS else ""
    raise ValueError(f"wanted a prompt source, {_SOURCES}, got {source!r}{hint}")
  prompts = parse_prompts(rows, columns, source, labelled=labelled)
  if not prompts:
    raise ValueError(f"{source}: wanted prompts, found no row")
  return prompts if prompts[0].split or not labelled else split(prompts)


def file_of(source: str) -> pathlib.Path | None:
  """The one file or folder that a source of `load` is, or None."""
  kind, _, rest = source.partition(":")
  return pathlib.Path(rest) if kind in _READERS and rest else None


def split(prompts: Sequence[Prompt], *, share: float = EVAL_SHARE) -> list[Prompt]:
  """The prompts, in order, each with split "train" or "eval".

  A family (see `families`) is on one side as a whole, chosen by a hash of its name:
  about `share` of them are "eval", and more prompts do not move the others. Where all
  families of a (category, expected) cell fall on one side, the nearest one moves over.
  """
  names = families(prompts)
  sides = {name: "eval" if fraction(name) < share else "train" for name in names}
  cells: dict[tuple[str, str], set[str]] = {}
  for prompt, name in zip(prompts, names, strict=True):
    cells.setdefault((prompt.category, prompt.expected), set()).add(name)
  for side, nearest in (("eval", min), ("train", max)):
    for _, cell in sorted(cells.items()):
      if len(cell) > 1 and all(sides[name] != side for name in cell):
        sides[nearest(cell, key=fraction)] = side
  return [
    dataclasses.replace(prompt, split=sides[name])
    for prompt, name in zip(prompts, names, strict=True)
  ]


def families(prompts: Sequence[Prompt]) -> list[str]:
  """For each prompt the name of its family, that is the first scenario in it.

  Scenarios that share a near-twin are one family, and so on from twin to twin; twins
  are so by what the user says, whatever system turn they share. A prompt without a
  scenario starts with one of its own, named by what it says.
  """
  scenarios = [prompt.scenario or digest(prompt.turns) for prompt in prompts]
  parent = {name: name for name in scenarios}

  def root(name: str) -> str:
    while parent[name] != name:
      parent[name] = name = parent[parent[name]]
    return name

  for i, j in near_duplicates([_users_text(prompt) for prompt in prompts]):
    first, second = sorted((root(scenarios[i]), root(scenarios[j])))
    parent[second] = first
  return [root(name) for name in scenarios]


def near_duplicates(
  texts: Sequence[str], *, threshold: float = NEAR_DUPLICATE
) -> Iterator[tuple[int, int]]:
  """Pairs i < j of texts whose word-trigram Jaccard is `threshold` or more.

  Exact: two such sets share one of their rarest members (prefix filtering; Chaudhuri
  et al. 2006), so only those are looked up.
  """
  grams = [_grams(text, 3) for text in texts]
  counts: dict[str, int] = {}
  for gram in (gram for some in grams for gram in some):
    counts[gram] = counts.get(gram, 0) + 1
  index: dict[str, list[int]] = {}
  for j, some in enumerate(grams):
    rarest = sorted(some, key=lambda gram: (counts[gram], gram))
    prefix = rarest[: len(some) - math.ceil(threshold * len(some)) + 1]
    for i in sorted({i for gram in prefix for i in index.get(gram, ())}):
      both = len(grams[i] & some)
      if both >= threshold * (len(grams[i]) + len(some) - both):
        yield i, j
    for gram in prefix:
      index.setdefault(gram, []).append(j)


def contaminated(
  prompts: Sequence[Prompt], others: Sequence[str], *, n: int = 8
) -> list[tuple[str, str]]:
  """(prompt id, other) where what a user says in a prompt and the other share `n` words
  in a row or are near-twins."""
  texts = [_users_text(prompt) for prompt in prompts]
  long: dict[str, list[int]] = {}
  for j, other in enumerate(others):
    for gram in _grams(other, n):
      long.setdefault(gram, []).append(j)
  found = {
    (i, j)
    for i, text in enumerate(texts)
    for gram in _grams(text, n)
    for j in long.get(gram, ())
  }
  size = len(texts)
  for i, j in near_duplicates([*texts, *others]):
    if i < size <= j:
      found.add((i, j - size))
  return [(prompts[i].id, others[j]) for i, j in sorted(found)]


def balanced(prompts: Sequence[Prompt], n: int | None, seed: int) -> list[Prompt]:
  """At most `n` prompts, or all, spread evenly over the (category, expected) cells, by
  turns.

  The choice depends on ids and seed alone; a smaller `n` gives the beginning of a
  larger one. Small cells run out first.
  """
  cells: dict[tuple[str, str], list[Prompt]] = {}
  for prompt in sorted(prompts, key=lambda prompt: fraction(f"{seed} {prompt.id}")):
    cells.setdefault((prompt.category, prompt.expected), []).append(prompt)
  turns = sorted(cells, key=lambda cell: fraction(f"{seed} {cell}"))
  ranked = [
    (rank, place, prompt)
    for place, cell in enumerate(turns)
    for rank, prompt in enumerate(cells[cell])
  ]
  ranked.sort(key=lambda item: item[:2])
  return [prompt for _, _, prompt in ranked[:n]]


def with_metadata(prompt: Prompt, metadata: str) -> Prompt:
  """A prompt as a judge is given it, by `metadata`: with no word on how to reply
  ("none"), with its own label ("told"), or with one that is wrong for a share of the
  prompts ("noisy:0.2"), always the same ones. Source: arXiv 2412.16339, 2.3.2."""
  if metadata == "none":
    return prompt.blind()
  opinion, draw = prompt.expected, fraction(f"opinion {prompt.id}")
  if metadata.startswith("noisy:") and draw < float(metadata.removeprefix("noisy:")):
    others = [name for name in EXPECTED if name != prompt.expected]
    opinion = others[int(fraction(f"other {prompt.id}") * len(others))]
  return prompt.blind(opinion)


def visits(n: int, start: int, count: int, *, seed: int) -> list[int]:
  """Rows in [0, n) to visit at the global positions start, ..., start + count - 1.

  Each n positions are one epoch, shuffled anew by Grain; any position is found at once,
  so a run goes on from one integer.
  """
  if n <= 0 or start < 0 or count < 0 or not 0 <= seed < 2**32:
    raise ValueError(
      "wanted n > 0, start >= 0, count >= 0 and a seed of 32 bits, "
      f"got {n}, {start}, {count}, {seed}"
    )
  rows = grain.MapDataset.range(n).seed(seed).shuffle().repeat()
  return [int(rows[i]) for i in range(start, start + count)]


def order(n: int, *, seed: int, epoch: int) -> list[int]:
  """All rows in [0, n) in the order of one epoch; see `visits`."""
  return visits(n, epoch * n, n, seed=seed)


def _load_bundled(columns: Mapping[str, str], data_dir: str) -> list[Prompt]:
  if columns:
    raise ValueError(f"source 'bundled' takes no columns, got {dict(columns)}")
  contents = b"".join(path.read_bytes() for path in _bundled_files())
  # A folder for each content: TFDS looks at version numbers alone.
  folder = pathlib.Path(data_dir) / hashlib.sha256(contents).hexdigest()[:12]
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"config.data.dir: wanted a folder to write in, or to make, got {data_dir} "
      f"({error.strerror})"
    ) from error
  builder = DalignPrompts(data_dir=str(folder), file_format="array_record")
  prepare(builder)
  rows = []
  for name in SPLITS:
    for where, row in builder_rows(builder, name, "bundled"):
      rows.append((where, row | {"split": name}))
  return parse_prompts(rows, {}, "bundled")


def prepare(builder: tfds.core.DatasetBuilder) -> None:
  """Has TFDS download and write a data set, without what it prints."""
  with (
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
  ):
    builder.download_and_prepare()


def _bundled_files() -> list[pathlib.Path]:
  return sorted(_FOLDER.glob("*.jsonl"))


def _tfds_rows(name: str, split_name: str, data_dir: str):
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


def _json_lines(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
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
  try:
    import pyarrow.parquet  # large, and only some read Parquet
  except ImportError:
    raise ValueError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
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
  save_to_disk leaves it: Arrow files, and two of JSON that name them and the labels."""
  if splits := sorted(path.parent for path in folder.glob("*/state.json")):
    some = ", ".join(f"hf:{split}" for split in splits)
    raise ValueError(f"hf:{folder}: wanted one of its splits, {some}")
  import pyarrow.ipc  # large, and only some read Arrow

  tables = []
  try:
    state = json.loads((folder / "state.json").read_bytes())
    info = json.loads((folder / "dataset_info.json").read_bytes())
    for file in state["_data_files"]:
      with pyarrow.memory_map(str(folder / file["filename"])) as source:
        tables.append(pyarrow.ipc.open_stream(source).read_all())
    labels = {
      name: feature["names"]
      for name, feature in info["features"].items()
      if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    rows = [row for table in tables for row in table.to_pylist()]
    for row in rows:
      for name, names in labels.items():
        if row[name] is not None:
          row[name] = names[row[name]] if row[name] >= 0 else None
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(
      f"hf:{folder}: wanted a folder that save_to_disk of `datasets` wrote, got {said}"
    ) from None
  for number, row in enumerate(rows):
    yield f"{folder} row {number}", row


_READERS = {
  "csv": _csv_rows,
  "jsonl": _json_lines,
  "parquet": _parquet_rows,
  "hf": _hf_rows,
}


def read_rows(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
  """(where it is, row) of each row of a JSONL or a Parquet file, by its ending."""
  return _parquet_rows(path) if path.suffix == ".parquet" else _json_lines(path)


def _check_columns(columns: Mapping[str, str]) -> None:
  for name in columns:
    if name not in FIELDS:
      raise ValueError(
        f"columns: {name!r} is no field of a prompt{_nearest(name, FIELDS)}; "
        f"there are {', '.join(FIELDS)}"
      )


def parse_prompts(
  rows: Iterable[tuple[str, Row]],
  columns: Mapping[str, str],
  source: str,
  *,
  labelled: bool = True,
) -> list[Prompt]:
  """Prompts of (where it is, row), checked; `columns`, `labelled` and errors as of
  `load`. None has a split where no row has one."""
  rows = list(rows)
  _check_columns_used(rows, columns)
  prompts: list[Prompt] = []
  seen: dict[str, str] = {}
  same: collections.Counter = collections.Counter()
  labels: dict[str, Prompt] = {}
  odd: list[tuple[str, Prompt, Prompt]] = []
  answered: list[str] = []
  for where, row in rows:
    values = _rename_columns(row, columns)
    if labelled and "expected" not in values:
      wanted = f"expected, as one of {', '.join(EXPECTED)}"
      advice = "; --mode=label proposes labels for prompts without"
      raise ValueError(_absent(where, "expected", wanted, row, columns) + advice)
    if values.keys().isdisjoint(_SAID):
      wanted = "a prompt, or turns [{'role': ..., 'content': ...}, ...]"
      raise ValueError(_absent(where, "prompt", wanted, row, columns))
    prompt, more = _prompt(where, values, columns, source, labelled=labelled)
    answered += [where] if more else []
    own = digest(prompt.turns)
    if not prompt.id:
      same[own] += 1
      number = f"-{same[own]}" if same[own] > 1 else ""
      prompt = dataclasses.replace(prompt, id=own + number)
    if prompt.id in seen:
      raise ValueError(f"{where}: id {prompt.id!r} is also that of {seen[prompt.id]}")
    seen[prompt.id] = where
    prompts.append(prompt)
    first = labels.setdefault(own, prompt) if prompt.expected else prompt
    if first.expected != prompt.expected:
      odd.append((where, prompt, first))
  if odd:
    where, prompt, first = odd[0]
    raise ValueError(
      f"{where}: expected is {prompt.expected!r}, and {first.expected!r} of the same "
      f"prompt at {seen[first.id]}: keep one label ({len(odd)} rows differ so)"
    )
  if answered:
    progress.say(
      f"{source}: {len(answered)} of {len(prompts)} conversations end with the "
      f"assistant's turn, such as {answered[0]}: what stands before it is the prompt"
    )
  without = [prompt for prompt in prompts if not prompt.split]
  if 0 < len(without) < len(prompts):
    raise ValueError(
      f"{seen[without[0].id]}: wanted a split, as other rows have, found none; "
      f"{len(without)} of {len(prompts)} rows have none"
    )
  return prompts


def _absent(
  where: str, name: str, wanted: str, row: Row, columns: Mapping[str, str]
) -> str:
  """What is said of a row without a field: that its cell is empty, or how the column
  that has it can be named."""
  if columns.get(name, name) in row:
    return f"{where}: wanted {wanted}, found an empty cell"
  return (
    f"{where}: wanted {wanted}, found none{_nearest(name, row)}; the row has "
    f"{[*row]!r:.200}, of which --config.data.columns.{name}=COLUMN maps one"
  )


def _check_columns_used(
  rows: list[tuple[str, Row]], columns: Mapping[str, str]
) -> None:
  """ValueError for a column that no row has, and one that seems to say the split."""
  there = {name: None for _, row in rows for name in row}
  if "split" not in there and "split" not in columns:
    for name in there:
      if name.strip().casefold() == "split":
        raise ValueError(
          f"{rows[0][0]}: column {name!r} is not read as split: rename it, or map it"
        )
  for name, column in columns.items() if rows else ():
    if column not in there and not column.startswith("="):
      raise ValueError(
        f"{rows[0][0]}: wanted column {column!r} for {name}{_nearest(column, there)}; "
        f"there are {', '.join(there)}"
      )


def is_empty(value: object) -> bool:
  """Whether a cell is empty: null, not a number, or blank."""
  if isinstance(value, str):
    return not value.strip()
  return value is None or (isinstance(value, float) and math.isnan(value))


def _rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
  """The row's values by our field names, and its further columns of _SAID."""
  values = {name: row.get(name) for name in (*FIELDS, *_SAID)}
  for name, column in columns.items():
    values[name] = column[1:] if column.startswith("=") else row.get(column)
  return {name: value for name, value in values.items() if not is_empty(value)}


def _prompt(
  where: str, values: Row, columns: Mapping[str, str], source: str, *, labelled: bool
) -> tuple[Prompt, bool]:
  """The prompt of a row, and whether it has an answer, which is left out."""
  texts: dict[str, Any] = {"kind": "safety"}
  for name in ("id", "category", "expected", "kind", "split", "answer", "scenario"):
    value = values.get(name, texts.get(name, ""))
    if name in ("id", "answer") and isinstance(value, (int, float)):
      # A column of whole numbers with an empty cell is one of floats.
      whole = isinstance(value, float) and value.is_integer()
      value = str(int(value) if whole else value)
    if not isinstance(value, str):
      said = _named(name, columns)
      raise ValueError(f"{where}: wanted text as {said}, got {value!r:.60}")
    texts[name] = value
  if labelled and not texts["category"]:
    raise ValueError(f"{where}: wanted a category; map a column, or '=benign' for all")
  types = EXPECTED if labelled else ("", *EXPECTED)
  known = {"expected": types, "kind": KINDS, "split": ("", *SPLITS)}
  for name, some in known.items():
    if texts[name] not in some:
      wanted = ", ".join(filter(None, some))
      raise ValueError(
        f"{where}: wanted {_named(name, columns)} as one of {wanted}, "
        f"got {texts[name]!r:.80}"
      )
  if texts["kind"] == "capability" and not texts["answer"]:
    raise ValueError(
      f"{where}: wanted an answer, which a prompt of kind capability is compared with, "
      "found none"
    )
  turns, answered = _turns(where, values, columns)
  clauses = _clauses(where, values)
  return Prompt(turns=turns, clauses=clauses, source=source, **texts), answered


def _named(name: str, columns: Mapping[str, str]) -> str:
  """A field, and the column that it is read from where that has another name."""
  column = columns.get(name, name)
  return name if column == name else f"{name} (column {column!r})"


def _clauses(where: str, values: Row) -> tuple[str, ...]:
  """The ids of the clauses that decide a row's prompt."""
  found: Any = _listed(values.get("clauses", []))
  if not (isinstance(found, list) and all(isinstance(one, str) for one in found)):
    raise ValueError(f"{where}: wanted clauses as a list of ids, got {found!r:.60}")
  return tuple(found)


def _turns(
  where: str, values: Row, columns: Mapping[str, str]
) -> tuple[tuple[Turn, ...], bool]:
  """The turns of a row, or its prompt as the one turn, and whether an assistant's came
  after these, whatever it holds."""
  # A column that is mapped before one that only has the name.
  names = sorted(_SAID, key=lambda name: name not in columns)
  name = next(name for name in names if name in values)
  column, found = columns.get(name, name), values[name]
  if name == "prompt" and isinstance(found, str):
    found = [{"role": "user", "content": found}]
  found = _listed(found)
  if not isinstance(found, (list, tuple)) or not found:
    raise ValueError(
      f"{where}: {column}: wanted turns [{{'role': ..., 'content': ...}}, ...], "
      f"got {found!r:.80}"
    )
  own = [
    _of_openai(said) if isinstance(said, Mapping) else {"": said} for said in found
  ]
  while len(own) > 1 and own[-1].get("role") == "assistant":
    own.pop()
  turns = []
  for number, said in enumerate(own, 1):
    role, content = said.get("role"), text_of(said.get("content"))
    at = (
      f"{where}: {column}, turn {number} of {len(found)} ({role or 'no role'}): wanted"
    )
    role = "system" if role == "developer" else role  # another name for it
    if role not in ("system", "user", "assistant"):
      raise ValueError(
        f"{at} a role of system, user or assistant, got {dict(said)!r:.80}"
      )
    if uses_tools(said):
      raise ValueError(f"{at} text alone, got a call of a tool")
    if content is None or is_empty(content):
      raise ValueError(f"{at} text as content, got {said.get('content')!r:.80}")
    turns.append(Turn(role=role, content=content))
  if role != "user":
    raise ValueError(f"{at} a user's turn as the last: take out what follows that")
  return tuple(turns), len(own) < len(found)


def _listed(value: Any) -> Any:
  """A list that a source could not hold as one: JSON in a cell of text, or a list for
  each name, as Arrow has sequences of objects."""
  if isinstance(value, str) and value.lstrip().startswith("["):
    with contextlib.suppress(ValueError, RecursionError):
      return json.loads(value)
  if isinstance(value, Mapping):
    parts = [*value.values()]
    if all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
      return [dict(zip(value, own, strict=True)) for own in zip(*parts, strict=True)]
  return value


def _of_openai(message: Mapping) -> Mapping:
  """A message with OpenAI's names where it has ShareGPT's."""
  if message.get("role") is not None or "from" not in message:
    return message
  role = message["from"]
  role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
  return {"role": role, "content": message.get("value")}


def uses_tools(message: Mapping) -> bool:
  """Whether a message calls a tool or says what one gave: nothing here knows tools."""
  calls = message.get("tool_calls") or message.get("function_call")
  return bool(calls) or message.get("role") in ("tool", "function")


def text_of(content: object) -> str | None:
  """The text of a turn's content, in one piece or in parts that are all text; None of
  anything else."""
  if not isinstance(content, list):
    return content if isinstance(content, str) else None
  texts: list[Any] = [part.get("text") for part in content if isinstance(part, Mapping)]
  kinds = {part.get("type") for part in content if isinstance(part, Mapping)}
  all_text = kinds == {"text"} and len(texts) == len(content)
  return (
    "\n".join(texts) if all_text and all(isinstance(t, str) for t in texts) else None
  )


def _row(prompt: Prompt) -> Row:
  row = dataclasses.asdict(prompt)
  row |= {"turns": list(row["turns"]), "clauses": list(row["clauses"])}
  return {name: row[name] for name in FIELDS if name != "prompt"} | {
    "prompt": prompt.text
  }


def _nearest(name: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" (did you mean {close[0]!r}?)" if close else ""


def _users_text(prompt: Prompt) -> str:
  """What the user says: a system turn that prompts share makes no twins of them."""
  return "\n".join(turn.content for turn in prompt.turns if turn.role == "user")


def _grams(text: str, n: int) -> frozenset[str]:
  """Runs of `n` words (`words.runs`); all of a text that has fewer, as one."""
  found = re.findall(r"\w+", text.casefold())
  return frozenset(map(" ".join, words.runs(found, n))) or frozenset([" ".join(found)])


def digest(turns: Sequence[Turn]) -> str:
  """A name for a conversation, which follows from what is said in it: 64 bits of a
  SHA-256, in hexadecimal."""
  said = json.dumps([(turn.role, turn.content) for turn in turns])
  return hashlib.sha256(said.encode()).hexdigest()[:16]


def fingerprint(prompts: Iterable[Prompt]) -> str:
  """A SHA-256, in hexadecimal, of all that is known of prompts, wherever it stands."""
  rows = [dataclasses.asdict(prompt) | {"source": ""} for prompt in prompts]
  return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def fraction(name: str) -> float:
  """A number in [0, 1) that depends on the name alone."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / 2**56
