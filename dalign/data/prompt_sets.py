"""Prompt sets: where prompts come from, how they are split, and in which order.

Reads the prompts that come with dalign (as a TFDS data set) and those of other sources
(readers.py, parsing.py); splits by scenario so that near-twins never straddle; says
which row is visited when. Needs no TensorFlow.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from etils import epath
import grain
import tensorflow_datasets as tfds

from dalign.data.parsing import FIELDS
from dalign.data.parsing import SPLITS
from dalign.data.parsing import check_columns
from dalign.data.parsing import parse_row
from dalign.data.readers import READERS
from dalign.data.readers import Row
from dalign.data.readers import builder_rows
from dalign.data.readers import json_lines
from dalign.data.readers import prepare
from dalign.data.readers import tfds_rows
from dalign.runs import progress
from dalign.text import words
from dalign.text.points import Points
from dalign.types import EXPECTED
from dalign.types import KINDS
from dalign.types import Prompt
from dalign.types import Turn

EVAL_SHARE = 0.2  # of the scenarios
SHARED_RUN = 8  # words in a row that make two texts one
_FOLDER = pathlib.Path(__file__).parents[1] / "prompts"
_REFERENCES = pathlib.Path(__file__).parents[1] / "recordings/references.jsonl"
_SOURCES = (
  "'bundled', 'csv:PATH', 'jsonl:PATH', 'parquet:PATH', 'hf:DIR' or 'tfds:NAME:SPLIT'"
)


def bundled_rows() -> list[Row]:
  """The prompts that come with dalign, as rows with every field of `FIELDS`.

  A file <category>.jsonl holds one category; capability.jsonl belongs to "benign", and
  rows of authored.jsonl, rare_clauses.jsonl and rl.jsonl name theirs. Ids are
  <category>-<scenario>-<k> where a row has none. Splits are those of `split`, but for
  the rows of rl.jsonl, which are of the split "rl".
  """
  rows: list[tuple[str, Row]] = []
  of_rl: list[tuple[str, Row]] = []
  counts: dict[str, int] = {}
  for path in _bundled_files():
    capability = path.stem == "capability"
    for where, row in json_lines(path):
      row = {"category": "benign" if capability else path.stem} | row
      kind = "helpful" if row["category"] == "benign" else "safety"
      key = f"{row['category']}-{row['scenario']}"
      counts[key] = counts.get(key, 0) + 1
      named = {
        "id": f"{key}-{counts[key]}",
        "kind": "capability" if capability else kind,
      }
      (of_rl if "split" in row else rows).append((where, named | row))
  prompts = split(parse_prompts(rows, {}, "bundled"))
  prompts += parse_prompts(of_rl, {}, "bundled")
  own = (dataclasses.asdict(prompt) | {"prompt": prompt.text} for prompt in prompts)
  return [{name: row[name] for name in FIELDS} for row in own]


def references() -> dict[str, str]:
  """Prompt id -> a good answer, of the bundled prompts of the split "eval".

  They were written for grading, and nothing is trained on them.
  """
  return {id: row["answer"] for id, row in _reference_rows().items()}


def points() -> dict[str, Points]:
  """Prompt id -> what right answers say, of the prompts that have a reference."""
  rows = _reference_rows().items()
  return {id: Points(row["points"], row["wrong"]) for id, row in rows}


def _reference_rows() -> dict[str, dict[str, Any]]:
  return {str(row["prompt_id"]): row for _, row in json_lines(_REFERENCES)}


class DalignPrompts(tfds.core.GeneratorBasedBuilder):
  """`bundled_rows` as a TFDS data set with the splits of SPLITS."""

  VERSION = tfds.core.Version("1.3.0")
  # TFDS 4.9 would look for it with importlib_resources, which it does not install.
  code_path = epath.Path(__file__)

  def _info(self) -> tfds.core.DatasetInfo:
    text, label = tfds.features.Text, tfds.features.ClassLabel
    # Of several categories, or of another.
    shared = {"authored", "rare_clauses", "rl", "capability"}
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
    of = {name: [row for row in rows if row["split"] == name] for name in SPLITS}
    return {name: self._generate_examples(some) for name, some in of.items() if some}

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
  if source == "bundled":
    return _load_bundled(columns, data_dir)
  if kind in READERS and rest:
    rows = READERS[kind](pathlib.Path(rest))
  elif kind == "tfds" and all(parts := rest.partition(":")):
    rows = tfds_rows(parts[0], parts[2], data_dir)
  else:
    kind = pathlib.Path(source).suffix.lstrip(".")
    hint = f"; did you mean '{kind}:{source}'?" if kind in READERS else ""
    raise ValueError(f"wanted a prompt source, {_SOURCES}, got {source!r}{hint}")
  prompts = parse_prompts(rows, columns, source, labelled=labelled)
  if not prompts:
    raise ValueError(f"{source}: wanted prompts, found no row")
  return prompts if prompts[0].split or not labelled else split(prompts)


def file_of(source: str) -> pathlib.Path | None:
  """The one file or folder that a source of `load` is, or None."""
  kind, _, rest = source.partition(":")
  return pathlib.Path(rest) if kind in READERS and rest else None


def split(prompts: Sequence[Prompt]) -> list[Prompt]:
  """The prompts, in order, each with split "train" or "eval".

  A family (see `families`) is on one side as a whole, chosen by a hash of its name:
  about EVAL_SHARE of them are "eval", and more prompts do not move the others. Where
  all families of a (category, expected) cell fall on one side, the nearest one moves.
  """
  names = families(prompts)
  sides = {name: "eval" if fraction(name) < EVAL_SHARE else "train" for name in names}
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

  for i, j in words.near_duplicates([_users_text(prompt) for prompt in prompts]):
    first, second = sorted((root(scenarios[i]), root(scenarios[j])))
    parent[second] = first
  return [root(name) for name in scenarios]


def contaminated(
  prompts: Sequence[Prompt], others: Sequence[str]
) -> list[tuple[str, str]]:
  """(prompt id, other) where what a user says in a prompt and the other share
  SHARED_RUN words in a row or are near-twins."""
  texts = [_users_text(prompt) for prompt in prompts]
  long: dict[str, list[int]] = {}
  for j, other in enumerate(others):
    for gram in words.word_runs(other, SHARED_RUN):
      long.setdefault(gram, []).append(j)
  found = {
    (i, j)
    for i, text in enumerate(texts)
    for gram in words.word_runs(text, SHARED_RUN)
    for j in long.get(gram, ())
  }
  size = len(texts)
  for i, j in words.near_duplicates([*texts, *others]):
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
  for name in builder.info.splits:
    for where, row in builder_rows(builder, name, "bundled"):
      rows.append((where, row | {"split": name}))
  return parse_prompts(rows, {}, "bundled")


def _bundled_files() -> list[pathlib.Path]:
  return sorted(_FOLDER.glob("*.jsonl"))


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
  check_columns(rows, columns)
  prompts: list[Prompt] = []
  seen: dict[str, str] = {}
  same: collections.Counter = collections.Counter()
  labels: dict[str, Prompt] = {}
  odd: list[tuple[str, Prompt, Prompt]] = []
  answered: list[str] = []
  for where, row in rows:
    prompt, more = parse_row(where, row, columns, source, labelled=labelled)
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


def _users_text(prompt: Prompt) -> str:
  """What the user says: a system turn that prompts share makes no twins of them."""
  return "\n".join(turn.content for turn in prompt.turns if turn.role == "user")


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
