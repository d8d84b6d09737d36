"""Mistakes that people make with a policy, prompts, a judge and a config of their own:
each ends with one line that says what was wanted, what came and where, and with exit
code 2."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import re
import sys

from absl import flags
from absl.testing import flagsaver
import pytest

from dalign import main
from dalign.tools import new
from tests.judges.test_endpoint import serve  # noqa: F401, a fixture

CONFIG = """\
import pathlib

from dalign.data import bundled

HERE = pathlib.Path(__file__).parent.resolve()


def get_config():
  c = bundled.recipe("tiny")
  c.spec.dir = str(HERE / "policies")
  c.data.source = f"jsonl:{HERE / 'prompts.jsonl'}"
  c.generate.teacher = "base"
  c.filter.judge = f"python:{HERE / 'judge.py'}:judge"
  c.filter.metadata = "told"
  c.rl.reward, c.rl.metadata = "judge", "told"
  c.thin = "stop"
  c.filter.least = c.eval.least = 1
  return c
"""
POLICY, PROMPTS, JUDGE = "policies/returns.md", "prompts.jsonl", "judge.py"


@dataclasses.dataclass
class Folder:
  """What `--mode=new` writes, with a tiny model, to be made wrong."""

  path: pathlib.Path

  @property
  def rows(self) -> list[dict]:
    return [*map(json.loads, (self.path / PROMPTS).read_text().splitlines())]

  def write(self, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (self.path / PROMPTS).write_text(text)

  def first(self, **changes):
    self.write([self.rows[0] | changes, *self.rows[1:]])

  def each(self, change: Callable[[dict], dict]):
    self.write(map(change, self.rows))

  def edit(self, name, before, after):
    text = (self.path / name).read_text()
    assert before in text
    (self.path / name).write_text(text.replace(before, after))

  def cut(self, name, begin, end):
    text = (self.path / name).read_text()
    (self.path / name).write_text(text[: text.index(begin)] + text[text.index(end) :])

  def put(self, name, text):
    (self.path / name).write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.fixture
def own(tmp_path, monkeypatch):
  new.new(tmp_path / "own")
  (tmp_path / "own" / "config.py").write_text(CONFIG)
  monkeypatch.chdir(tmp_path / "own")
  monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of another config
  return Folder(tmp_path / "own")


def told(own, capsys, *options, mode="check") -> tuple[int, str, str]:
  """Exit code, last line and table of the command in the folder."""
  given = [f"--mode={mode}", "--config=config.py", "--workdir=../run"]
  names = {option.partition("=")[0] for option in options}
  given = [one for one in given if one.partition("=")[0] not in names]
  capsys.readouterr()
  with flagsaver.flagsaver():
    flags.FLAGS["config"].unparse()
    code = main.main(["dalign", *given, *options])
  said = capsys.readouterr()
  return code, (said.err.strip().splitlines() or [""])[-1], said.out


def renamed(row):
  return {("question" if name == "prompt" else name): x for name, x in row.items()}


def refunds(row):
  return row | {"category": row["category"].replace("returns", "refunds")}


MISTAKES = {
  # The policy.
  "no section of what is disallowed": (
    lambda own: own.cut(POLICY, "## Disallowed", "## Safe completion"),
    r'returns.md:22: wanted section "## Disallowed", got .## Safe completion',
  ),
  "a clause with another policy's code": (
    lambda own: own.edit(POLICY, "- RT-D2:", "- RE-D2:"),
    r'returns.md:27: wanted "- RT-D<number>: text", got .- RE-D2',
  ),
  "an example of a clause that there is not": (
    lambda own: own.edit(POLICY, "### RT-S1", "### RT-S9"),
    r"returns.md:57: wanted a clause of this file .RT-A1.*got .### RT-S9",
  ),
  "a policy in a file of another name": (
    lambda own: (own.path / POLICY).rename(own.path / "policies/refunds.md"),
    r'refunds.md:2: wanted "id: refunds", the name of the file, got .id: returns',
  ),
  "no principles": (
    lambda own: (own.path / "policies/principles.md").unlink(),
    r"wanted principles.md in the specification.*--mode=new writes one",
  ),
  "a folder of policies that is not there": (
    lambda own: "--config.spec.dir=policy",
    "policy: wanted a folder with specification files, found none",
  ),
  "a policy that is no text": (
    lambda own: own.put(POLICY, b"---\nid: returns\n\xff"),
    "returns.md: wanted a text in UTF-8",
  ),
  # The prompts.
  "a column of another name": (
    lambda own: own.each(renamed),
    r"prompts.jsonl:1: wanted a prompt.*the row has .'question', .*"
    "--config.data.columns.prompt=COLUMN",
  ),
  "a mapped column that is not there": (
    lambda own: "--config.data.columns.prompt=promt",
    r"wanted column 'promt' for prompt \(did you mean 'prompt'",
  ),
  "a field that prompts do not have": (
    lambda own: "--config.data.columns.labels=expected",
    r"columns: 'labels' is no field of a prompt.*there are prompt, turns",
  ),
  "a clause that no policy has": (
    lambda own: own.first(clauses=["RT-D7"]),
    r"1 prompts name clauses that no policy has, such as .*How many days.* RT-D7",
  ),
  "a category without a policy": (
    lambda own: own.each(refunds),
    r"28 prompts have a category without a policy, such as 'refunds' of .*'How many "
    r"days.*wanted one of benign, returns",
  ),
  "nothing to refuse": (
    lambda own: own.write(r for r in own.rows if r["expected"] != "refuse"),
    r"returns to refuse: no prompt, .*has clauses for it, such as RT-D1",
  ),
  "an empty label": (
    lambda own: own.first(expected=""),
    "prompts.jsonl:1: wanted expected, as one of refuse, safe_complete, comply, found "
    "an empty cell",
  ),
  "an empty prompt": (
    lambda own: own.first(prompt=" "),
    "prompts.jsonl:1: wanted a prompt, or turns .*found an empty cell",
  ),
  "no labels": (
    lambda own: own.each(lambda row: {"prompt": row["prompt"]}),
    "prompts.jsonl:1: wanted expected, .* found none; the row has .*--mode=label",
  ),
  "a label of another name": (
    lambda own: own.first(expected="Refuse"),
    "prompts.jsonl:1: wanted expected as one of refuse, .* got 'Refuse'",
  ),
  "semicolons": (
    lambda own: (
      own.put("p.csv", "prompt;category;expected\nHi;returns;comply\n")
      or "--config.data.source=csv:p.csv"
    ),
    "p.csv:1: wanted commas between columns, got 'prompt;category;expected'",
  ),
  "one array of JSON": (
    lambda own: own.put(PROMPTS, json.dumps(own.rows, indent=1)),
    "prompts.jsonl:1: wanted JSON, an object a line, got the begin of an array",
  ),
  "no UTF-8": (
    lambda own: own.put(PROMPTS, b'{"prompt": "caf\xe9"}\n'),
    "prompts.jsonl:1: wanted JSON, got .utf-8. codec",
  ),
  "a file that is not there": (
    lambda own: "--config.data.source=jsonl:promts.jsonl",
    "promts.jsonl: wanted a JSONL file, got No such file",
  ),
  "a file without its form": (
    lambda own: "--config.data.source=prompts.jsonl",
    "wanted a prompt source, .*did you mean 'jsonl:prompts.jsonl'",
  ),
  "a table of an office": (
    lambda own: "--config.data.source=xlsx:p.xlsx",
    "wanted a prompt source, 'bundled', 'csv:PATH',.*got 'xlsx:p.xlsx'",
  ),
  "two labels for one prompt": (
    lambda own: own.write([*own.rows, own.rows[0] | {"expected": "refuse"}]),
    "prompts.jsonl:38: expected is 'refuse', and 'comply' of the same prompt at .*:1",
  ),
  "a capability without an answer": (
    lambda own: own.each(lambda row: {k: x for k, x in row.items() if k != "answer"}),
    "prompts.jsonl:34: wanted an answer, which a prompt of kind capability",
  ),
  "a split of another name": (
    lambda own: own.each(lambda row: row | {"split": "test"}),
    "prompts.jsonl:1: wanted split as one of train, rl, eval, got 'test'",
  ),
  "a split for one row": (
    lambda own: own.first(split="eval"),
    "prompts.jsonl:2: wanted a split, as other rows have.*36 of 37",
  ),
  "nothing held out": (
    lambda own: own.each(lambda row: row | {"split": "train"}),
    "held out: 0 to comply, of 1 or more",
  ),
  # The judge.
  "a judge that raises": (
    lambda own: own.edit(JUDGE, "words, refuses =", "1 / 0\n  words, refuses ="),
    r"judge.py: judge: row 1 of 1, prompt '\w+': line 19: ZeroDivisionError",
  ),
  "a judge of another name": (
    lambda own: "--config.filter.judge=python:judge.py:juge",
    "judge.py: wanted a function juge, found none; did you mean judge",
  ),
  "a judge in no file": (
    lambda own: "--config.filter.judge=python:jugde.py:judge",
    "python:jugde.py:judge: wanted a file with a Python function, found none",
  ),
  "a judge without its form": (
    lambda own: "--config.filter.judge=judge.py:judge",
    "config.filter.judge: wanted one of rubric, model, sampled, endpoint, recorded, or "
    "python:FILE:FUNCTION, got 'judge.py:judge'",
  ),
  "a grader of another name": (
    lambda own: "--config.eval.grader=('rule',)",
    "wanted one of rules, model, endpoint, or python:FILE:FUNCTION, got 'rule'",
  ),
  "a judge with another scale": (
    lambda own: own.edit(JUDGE, "min(1.0, len(words) / 8)", "5"),
    "judge.py: judge: row 1 of 1, .*wanted a score in .0, 1., or None.*got 5",
  ),
  "a judge of one reply": (
    lambda own: own.edit(JUDGE, "[verdict(reply) for reply in replies]", "0.5"),
    "judge.py: judge: wanted a list of verdicts, got 0.5",
  ),
  "a judge that is no Python": (
    lambda own: own.edit(JUDGE, "def verdict(reply):", "def verdict(reply)"),
    "judge.py: line 18: SyntaxError",
  ),
  "a judge of a package that is not there": (
    lambda own: own.edit(JUDGE, "import re", "import re, not_installed"),
    "judge.py: line 8: ModuleNotFoundError: No module named 'not_installed'",
  ),
  "a judge that knows other policies": (
    lambda own: "--config.filter.judge=rubric",
    "the rubric reads no policy.*RT-A1.*filter.judge or rl.reward as python:FILE",
  ),
  "a server without an address": (
    lambda own: "--config.filter.judge=endpoint",
    "config.filter.judge=endpoint needs an endpoint: wanted a url.*got '' and ''",
  ),
  # The config.
  "a key that there is not, as a flag": (
    lambda own: "--config.filter.treshold=0.5",
    'config.filter.treshold: no such field. Did you mean "threshold"',
  ),
  "a key that there is not, in the file": (
    lambda own: own.edit("config.py", "c.filter.metadata", "c.filter.metdata"),
    "config.filter.metdata: no such field; did you mean config.filter.metadata",
  ),
  "a section that there is not": (
    lambda own: own.edit("config.py", "c.filter.metadata", "c.filtr.metadata"),
    'config.py:14: filtr: no such field. Did you mean "filter"',
  ),
  "a word for a number": (
    lambda own: "--config.rl.steps=many",
    "--config.rl.steps=many: invalid literal for int",
  ),
  "a number out of bounds": (
    lambda own: "--config.rl.steps=-1",
    "config.rl.steps: wanted more than 0, got -1",
  ),
  "a flag without config in front": (
    lambda own: "--filter.judge=rubric",
    "Unknown command line flag 'filter.judge'; did you mean --config.filter.judge",
  ),
  "a config that is not there": (
    lambda own: "--config=confg.py",
    "'confg.py': wanted a config file, found none; did you mean config.py",
  ),
  "a config that is no Python": (
    lambda own: own.edit("config.py", "def get_config():", "def get_config()"),
    "config.py:8: SyntaxError: expected ':'",
  ),
  "a config that raises": (
    lambda own: own.edit("config.py", "  return c", "  return d"),
    "config.py:18: NameError: name 'd' is not defined",
  ),
  "a config without its function": (
    lambda own: own.edit("config.py", "def get_config", "def config"),
    "config.py: wanted a function get_config.. that returns the config, found none",
  ),
  "a config that returns nothing": (
    lambda own: own.edit("config.py", "  return c\n", ""),
    "config.py: wanted a function get_config.. that returns the config, got None of it",
  ),
  "a model that is not there": (
    lambda own: "--config.model.path=/models/qwen",
    "no model at '/models/qwen': wanted a folder with config.json and safetensors",
  ),
  "a stage of another name": (
    lambda own: "--config.stages=generate,fliter",
    "'fliter' is none of base, generate,.*did you mean 'filter'",
  ),
  "a mode of another name": (
    lambda own: "--mode=chek",
    "--mode=chek: value should be one of <run.*check",
  ),
  "a mode without its dashes": (
    lambda own: "check",
    "unexpected 'check': options are --config.NAME=VALUE",
  ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_once_and_clearly(own, capsys, mistake):
  make, said = MISTAKES[mistake]
  given = make(own)
  options = [given] if isinstance(given, str) else []
  code, line, table = told(own, capsys, *options)
  assert code == 2, line
  missing = [row for row in table.splitlines() if row.startswith("MISSING")]
  assert matches(said, line) or [row for row in missing if matches(said, row)], line
  found = [row.split(None, 2)[-1] for row in missing]
  assert len({*found}) == len(found)  # what one part says no other repeats


def matches(said: str, line: str) -> bool:
  return bool(re.search(said, " ".join(line.split())))


def test_what_is_not_wrong_is_not_said(own, capsys):
  code, line, table = told(own, capsys)
  assert (code, line) == (0, "") and "MISSING" not in table


def test_all_policies_without_prompts_are_named(own, capsys):
  text = (own.path / POLICY).read_text()
  for id, code in (("swaps", "SW"), ("trades", "TR")):
    other = text.replace("id: returns", f"id: {id}").replace("RT", code)
    own.put(f"policies/{id}.md", other)
  code, _, table = told(own, capsys)
  missing = [row.split()[1] for row in table.splitlines() if "no prompt of" in row]
  assert code == 2 and missing == ["swaps", "trades"]


def test_a_server_that_is_down_is_no_bad_input(own, capsys, serve):  # noqa: F811
  """The same command may do once it is up: exit code 1, and what is to be done."""
  server = serve(lambda body: "")
  server.stop()
  at = {"url": f"http://127.0.0.1:{server.port}/v1", "model": "m", "retries": 0}
  options = [f"--config.filter.endpoint.{name}={x}" for name, x in at.items()]
  code, line, _ = told(
    own, capsys, "--config.filter.judge=endpoint", *options, mode="label"
  )
  assert code == 1
  assert f"127.0.0.1:{server.port}/v1 failed after 0 retries" in line
  assert "Connection error" in line and "the same command goes on" in line


def test_a_model_that_a_server_does_not_know_is_bad_input(own, capsys, serve):  # noqa: F811
  server = serve(lambda body: (404, "no such model"))
  at = {"url": f"http://127.0.0.1:{server.port}", "model": "qwen", "retries": 0}
  options = [f"--config.filter.endpoint.{name}={x}" for name, x in at.items()]
  code, line, _ = told(
    own, capsys, "--config.filter.judge=endpoint", *options, mode="label"
  )
  assert code == 2 and "knows no model 'qwen', or is no such address (404)" in line
