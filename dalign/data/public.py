"""Public prompt sets that models are evaluated on, from their publishers' own files.

A set is downloaded by TFDS from an address that is pinned, with its SHA-256, or read
from a copy on disk. What each set calls an item's class becomes a category of specs/.

Does not know specifications, models, or what answers are worth.
"""

from collections.abc import Callable, Iterator
import csv
import dataclasses
import io
import json
import pathlib

from etils import epath
import tensorflow_datasets as tfds

from dalign.data import prompt_sets
from dalign.data import readers
from dalign.types import Prompt

Row = dict[str, str]
_FAILURES = (
  tfds.download.DownloadError,
  tfds.download.download_manager.NonMatchingChecksumError,
)
_RAW = "https://raw.githubusercontent.com/"
# What the sets call their classes -> the categories of specs/.
_CATEGORIES = {
  # StrongREJECT
  "Disinformation and deception": "misinformation_fraud",
  "Hate, harassment and discrimination": "harassment_hate",
  "Illegal goods and services": "illicit_behavior",
  "Non-violent crimes": "illicit_behavior",
  "Sexual content": "sexual_content",
  "Violence": "extremism_violence",
  # HarmBench
  "chemical_biological": "weapons",
  "copyright": "illicit_behavior",
  "cybercrime_intrusion": "illicit_behavior",
  "harassment_bullying": "harassment_hate",
  "harmful": "extremism_violence",
  "illegal": "illicit_behavior",
  "misinformation_disinformation": "misinformation_fraud",
  # JailbreakBench
  "Disinformation": "misinformation_fraud",
  "Economic harm": "illicit_behavior",
  "Expert advice": "regulated_advice",
  "Fraud/Deception": "misinformation_fraud",
  "Government decision-making": "illicit_behavior",
  "Harassment/Discrimination": "harassment_hate",
  "Malware/Hacking": "illicit_behavior",
  "Physical harm": "extremism_violence",
  "Privacy": "privacy",
  "Sexual/Adult content": "sexual_content",
  # SimpleSafetyTests
  "Child safety": "sexual_content",
  "Illegal and Highly Regulated items": "illicit_behavior",
  "Physical harm and Violence": "extremism_violence",
  "Scams and fraud": "misinformation_fraud",
  "Suicide, Self-Harm, and Eating Disorders": "self_harm",
  # Do-Not-Answer
  "Information Hazards": "privacy",
  "Malicious Uses": "illicit_behavior",
  "Discrimination, Exclusion, Toxicity, Hateful, Offensive": "harassment_hate",
  "Misinformation Harms": "misinformation_fraud",
  # OR-Bench
  "deception": "misinformation_fraud",
  "harassment": "harassment_hate",
  "hate": "harassment_hate",
  "privacy": "privacy",
  "self-harm": "self_harm",
  "sexual": "sexual_content",
  "unethical": "illicit_behavior",
  "violence": "extremism_violence",
}


@dataclasses.dataclass(frozen=True)
class PublicSet:
  """A set and where it is: `read` takes the file's text to rows of data.FIELDS.

  `size` in bytes; without a `sha256` nobody has checked what the address gives.
  """

  url: str
  size: int
  sha256: str
  licence: str
  cite: str
  read: Callable[[str], Iterator[Row]]
  kind: str = "safety"


def _category(name: str, where: str) -> str:
  if name not in _CATEGORIES:
    raise ValueError(
      f"{where}: wanted a class of {', '.join(_CATEGORIES)}, got {name!r}"
    )
  return _CATEGORIES[name]


def _table(prompt: str, name: str, expected: str, id: str = ""):
  """Reads CSV, by the columns of the prompt, of the name of its class, and of its id,
  which is the row's number where there is none."""

  def read(text: str) -> Iterator[Row]:
    for number, row in enumerate(csv.DictReader(io.StringIO(text))):
      own = row[id] if id else str(number)
      category = _category(row[name], own)
      yield dict(id=own, prompt=row[prompt], category=category, expected=expected)

  return read


def _xstest(text: str) -> Iterator[Row]:
  """250 safe prompts and 200 contrasts. Its types are of wording, seldom of policy."""
  for row in csv.DictReader(io.StringIO(text)):
    kind, category = row["type"], "extremism_violence"
    if "privacy" in kind:
      category = "privacy"
    elif "discr" in kind:
      category = "harassment_hate"
    expected = {"safe": "comply", "unsafe": "refuse"}[row["label"]]
    yield dict(id=row["id"], prompt=row["prompt"], category=category, expected=expected)


def _harmbench(text: str) -> Iterator[Row]:
  """Behaviours; what a contextual one is about stands in front of it."""
  for row in csv.DictReader(io.StringIO(text)):
    parts = (row["ContextString"], row["Behavior"])
    yield dict(
      id=row["BehaviorID"],
      prompt="\n\n---\n\n".join(part for part in parts if part),
      category=_category(row["SemanticCategory"], row["BehaviorID"]),
      expected="refuse",
    )


def _simplesafetytests(text: str) -> Iterator[Row]:
  """Those on suicide and self-injury call for support, all others for a refusal."""
  for row in _table("prompts_final", "harm_area", "refuse", "id")(text):
    hurt = row["category"] == "self_harm"
    yield row | {"expected": "safe_complete" if hurt else "refuse"}


def _do_not_answer(text: str) -> Iterator[Row]:
  """Without its questions to a chatbot as if to a person, which no policy refuses."""
  for row in csv.DictReader(io.StringIO(text)):
    if not row["risk_area"].casefold().startswith("human-chatbot"):
      yield dict(
        id=row["id"],
        prompt=row["question"],
        category=_category(row["risk_area"], row["id"]),
        expected="refuse",
      )


def _jailbreakbench(file: str, expected: str) -> PublicSet:
  """One of its two files, which were never seen: the test's rows are made up."""
  return PublicSet(
    url="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors/resolve/main/data/"
    f"{file}",
    size=0,
    sha256="",
    licence="MIT",
    cite="Chao et al., JailbreakBench, 2404.01318",
    read=_table("Goal", "Category", expected, "Index"),
  )


def _gsm8k(text: str) -> Iterator[Row]:
  for number, line in enumerate(text.splitlines()):
    row = json.loads(line)
    yield dict(
      id=str(number),
      prompt=row["question"],
      category="benign",
      expected="comply",
      answer=row["answer"].rpartition("####")[2].strip().replace(",", ""),
    )


_BEHAVIOURS = (
  f"{_RAW}busycalibrating/AdversariaLLM/f970939273ea17b491fadf6001fddc36ed3ae3ff/data/"
  "behavior_datasets/"
)
SETS = {
  "xstest": PublicSet(
    url=f"{_RAW}paul-rottger/exaggerated-safety/"
    "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/xstest_prompts.csv",
    size=38719,
    sha256="11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
    licence="CC-BY-4.0",
    cite="Röttger et al., XSTest, 2308.01263",
    read=_xstest,
  ),
  "strongreject": PublicSet(  # the copy that AdversariaLLM has at a fixed commit
    url=f"{_BEHAVIOURS}strongreject_dataset.csv",
    size=56359,
    sha256="4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
    licence="MIT; some rows of sources that state none",
    cite="Souly et al., StrongREJECT, 2402.10260",
    read=_table("forbidden_prompt", "category", "refuse"),
  ),
  "harmbench": PublicSet(  # as strongreject
    url=f"{_BEHAVIOURS}harmbench_behaviors_text_all.csv",
    size=198374,
    sha256="2745611872be3b2eab141e39bb328b8c1140dc3cd8d0a49da6174260d9ccbfb9",
    licence="MIT",
    cite="Mazeika et al., HarmBench, 2402.04249",
    read=_harmbench,
  ),
  "simplesafetytests": PublicSet(
    url=f"{_RAW}bertiev/SimpleSafetyTests/d7aee9a9422a5a5488f478fd79c2479c891c0f3b/"
    "SimpleSafetyTests%20-%20test%20cases.csv",
    size=12610,
    sha256="6d95a1301e0d0f3a3c4cf5392f4afff11ad6e3066f95d23aaa138d44aedf986c",
    licence="CC-BY-4.0",
    cite="Vidgen et al., SimpleSafetyTests, 2311.08370",
    read=_simplesafetytests,
  ),
  "jailbreakbench": _jailbreakbench("harmful-behaviors.csv", "refuse"),
  "jailbreakbench_benign": _jailbreakbench("benign-behaviors.csv", "comply"),
  "do_not_answer": PublicSet(  # its size and sum as another project wrote them down
    url=f"{_RAW}Libr-AI/do-not-answer/460703484df354958a5e1cd7378a38fcb94a2f3e/"
    "datasets/Instruction/do_not_answer_en.csv",
    size=329395,
    sha256="06acfa39a06a1b33d1f264ce41b4f7a95812010c594fb733ae4717ee0a4544fc",
    licence="CC-BY-NC-SA-4.0",
    cite="Wang et al., Do-Not-Answer, 2308.13387",
    read=_do_not_answer,
  ),
  "or_bench_hard": PublicSet(  # never seen, as jailbreakbench
    url="https://huggingface.co/datasets/bench-llm/or-bench/resolve/main/"
    "or-bench-hard-1k.csv",
    size=0,
    sha256="",
    licence="CC-BY-4.0",
    cite="Cui et al., OR-Bench, 2405.20947",  # they seem to ask for harm and do not
    read=_table("prompt", "category", "comply"),
  ),
  "gsm8k": PublicSet(
    url=f"{_RAW}openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/test.jsonl",
    size=749738,
    sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    licence="MIT",
    cite="Cobbe et al., GSM8K, 2110.14168",
    read=_gsm8k,
    kind="capability",
  ),
}


class PublicPrompts(tfds.core.GeneratorBasedBuilder):
  """SETS as TFDS data sets, a builder config each, with the one split "eval"."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SETS]
  # TFDS 4.9 would look for it with importlib_resources, which it does not install.
  code_path = epath.Path(__file__)
  url_infos = {
    some.url: tfds.download.checksums.UrlInfo(some.size, some.sha256, None)
    for some in SETS.values()
    if some.sha256
  }

  def _info(self) -> tfds.core.DatasetInfo:
    some, text = SETS[self.builder_config.name], tfds.features.Text()
    names = ("id", "prompt", "category", "expected", "kind", "split", "answer")
    return self.dataset_info_from_configs(
      description=f"{some.cite}. Licence: {some.licence}.",
      homepage=some.url,
      features=tfds.features.FeaturesDict(dict.fromkeys(names, text)),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    path = dl_manager.download(SETS[self.builder_config.name].url)
    return {"eval": self._generate_examples(pathlib.Path(path))}

  def _generate_examples(self, path: pathlib.Path):
    name = self.builder_config.name
    same = dict(kind=SETS[name].kind, split="eval")
    for number, row in enumerate(SETS[name].read(path.read_text("utf-8-sig"))):
      yield number, {"answer": ""} | row | same | {"id": f"{name}-{row['id']}"}


def load(name: str, *, copies: str, data_dir: str) -> list[Prompt]:
  """The prompts of one of SETS.

  From the folder `copies`, if that is given: NAME.jsonl, eval_NAME.jsonl or
  capability_NAME.jsonl with the columns of data.FIELDS. Else from its publisher, kept
  under `data_dir`. Raises ValueError for an unknown name, a file that is not there or
  is not what its checksum says.
  """
  some = _set(name)
  if copies:
    folder = pathlib.Path(copies).expanduser()
    tried = [folder / f"{front}{name}.jsonl" for front in ("", "eval_", "capability_")]
    path = next((path for path in tried if path.exists()), None)
    if path is None:
      wanted = ", ".join(path.name for path in tried)
      raise ValueError(f"config.eval.copies: wanted one of {wanted} in {folder}")
    return prompt_sets.load(f"jsonl:{path}", {"kind": f"={some.kind}"}, data_dir)
  try:
    builder = PublicPrompts(config=name, data_dir=data_dir, file_format="array_record")
    readers.prepare(builder)
  except (OSError, *_FAILURES) as error:
    raise ValueError(
      f"public:{name}: {some.url} could not be had ({' '.join(str(error).split())}); "
      "put a copy in a folder and say --config.eval.copies=FOLDER"
    ) from None
  rows = readers.builder_rows(builder, "eval", f"public:{name}")
  return prompt_sets.parse_prompts(rows, {}, f"public:{name}")


def notice(name: str) -> str:
  """Whose a set is, and under what licence."""
  some = _set(name)
  unchecked = "" if some.sha256 else "; its file has no checksum here"
  return f"{name}: {some.cite}; licence {some.licence}{unchecked}"


def _set(name: str) -> PublicSet:
  if name not in SETS:
    raise ValueError(f"public: wanted one of {', '.join(SETS)}, got {name!r}")
  return SETS[name]
