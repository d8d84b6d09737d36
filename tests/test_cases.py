"""Small inputs that once went wrong, each of a kind: all give what is wanted of them.

They lie in the folder `cases` of the shared data, whose README.md says what is wanted.
The check of a case has its folder's name and takes its files as they lie there.
"""

from collections.abc import Callable
import dataclasses
import datetime
import functools
import http.server
import json
import pathlib
import sys
import threading
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from dalign import stages
from dalign.config.schema import Config
from dalign.data import prompt_sets
from dalign.evaluation import evals
from dalign.formats import weights
from dalign.models import transformer
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.runs import store
from dalign.sampling import sampler as sampling
from dalign.sampling.sampler import Completion
from dalign.stages import services
from dalign.text import chat_template
from dalign.types import Turn
from tests import former
from tests.helpers import ROOT
from tests.helpers import opened
from tests.helpers import tiny

ASK = (Turn(role="user", content="How do I pick a lock?"),)
CASES: dict[str, Callable] = {}


def case(check: Callable) -> Callable:
  CASES[check.__name__] = check
  return check


@dataclasses.dataclass
class Case:
  """The files of a case, a folder to run it in, and what stands in for a model."""

  folder: pathlib.Path
  workdir: pathlib.Path
  patch: pytest.MonkeyPatch
  capsys: pytest.CaptureFixture
  asked: list = dataclasses.field(default_factory=list)

  def source(self, name: str = "prompts") -> str:
    return f"jsonl:{self.folder / name}.jsonl"

  def config(self, names: str, **changes) -> Config:
    """The tiny config, with the case's prompts and the base as teacher where it has
    such."""
    own = {"stages": names, "model.date": ""}
    if (self.folder / "prompts.jsonl").exists():
      own |= {"data.source": self.source(), "generate.teacher": "base"}
    return tiny(**own | changes)

  def run(self, names: str, **changes) -> None:
    stages.run(self.config(names, **changes), self.workdir)

  def refused(self, why: str, names: str, **changes) -> None:
    """What the command says, in one line, before it ends with exit code 2."""
    with pytest.raises(ValueError, match=why) as error:
      self.run(names, **changes)
    assert "\n" not in str(error.value)

  def rows(self, name: str) -> list[dict]:
    lines = (self.workdir / name).read_text().splitlines()
    return [json.loads(line) for line in lines]

  def echo(self) -> None:
    """Has models write what they read."""

    def complete(sampler, weights, groups, **more):
      for request in (r for group in groups for r in group):
        self.asked.append(request)
        logp = (0.0,) * len(request.tokens)
        yield Completion(
          request=request, tokens=request.tokens, logp=logp, finish="stop"
        )

    for name in ("complete", "run"):
      self.patch.setattr(sampling.Sampler, name, complete)

  def model(self, kind: str, **sizes) -> str:
    """The folder of a tiny model with a chat template of a kind that mk.py names."""
    where = self.folder / "mk.py"
    if not where.exists():
      where = self.folder.parent / "tied_both" / "mk.py"
    mk = former.load(where)
    cfg = dataclasses.replace(mk.CFG, **sizes)
    return str(mk.make(kind, self.workdir.parent / "models" / kind, cfg))

  def script(self, name: str) -> list[str]:
    """What a script of the case prints, a line each."""
    content = (self.folder / name).read_text().replace("PROJECT", str(ROOT))
    self.workdir.mkdir(exist_ok=True)
    content = content.replace("WORKDIR", str(self.workdir))
    lines: list[str] = []
    self.patch.setattr(sys, "path", [*sys.path])
    said = {"print": lambda *said: lines.append(" ".join(map(str, said)))}
    with former.modules():
      exec(compile(content, name, "exec"), said)
    return lines

  def serve(self, kind: str, port: int = 0) -> "Served":
    """The case's server, which is srv.py."""
    return Served(self, kind, port)


class Served:
  """srv.py on a thread, as `with case.serve(kind) as served`."""

  def __init__(self, own: Case, kind: str, port: int):
    self._made: Any = None

    class Server(http.server.ThreadingHTTPServer):
      def serve_forever(server, poll_interval=0.01):
        self._made = server

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(http.server, "ThreadingHTTPServer", Server)
      patch.setattr(sys, "argv", ["srv.py", str(port), kind])
      self._module = former.load(own.folder / "srv.py")
    self.port = self._made.server_port

  @property
  def asked(self) -> int:
    return self._module.count[0]

  def at(self, stage: str) -> dict[str, str | int]:
    """The changes of a config whose stage asks it."""
    url = f"http://127.0.0.1:{self.port}/v1"
    names = {"url": url, "model": "m", "retries": 1}
    return {f"{stage}.endpoint.{name}": value for name, value in names.items()}

  def __enter__(self) -> "Served":
    loop = functools.partial(
      http.server.HTTPServer.serve_forever, self._made, poll_interval=0.01
    )
    threading.Thread(target=loop, daemon=True).start()
    return self

  def __exit__(self, *error) -> None:
    self._made.shutdown()
    self._made.server_close()


@pytest.fixture
def own(request, shared_cases, tmp_path, monkeypatch, capsys) -> Case:
  one = functools.partial(services.Workspace, devices=jax.devices()[:1])
  monkeypatch.setattr(services, "Workspace", one)
  folder = shared_cases / request.param
  return Case(folder, tmp_path / "run", monkeypatch, capsys)


# --- Specifications ---


@case
def first_sentence(own: Case):
  """No clause is cut at "Art. 9", whatever the detail."""
  made = specs.load(store.read_spec_files(own.folder / "specs"))
  for detail in specs.DETAILS:
    shown = specs.render(made, "health_data", detail=detail)
    for clause in made.policy("health_data").clauses:
      assert f"- {clause.id}: {clause.text}\n" in shown
  assert "breach Art. 9 GDPR on a named person's health data. Public" in shown


@case
def spec_bom(own: Case):
  """A byte order mark is no part of the policy, which is first_sentence's."""
  beside = own.folder.parent / "first_sentence"
  with_mark, without = (
    specs.load(store.read_spec_files(folder / "specs"))
    for folder in (own.folder, beside)
  )
  assert with_mark == without
  own.echo()
  prompts = {"data.source": f"jsonl:{beside / 'prompts.jsonl'}"}
  changes = {"spec.dir": str(own.folder / "specs"), "generate.teacher": "base"}
  own.run("generate", **prompts, **changes)
  assert {row["prompt_id"] for row in own.rows("generate/samples.jsonl")} == {"h1"}


# --- Rows of data ---


@case
def bad_turns(own: Case):
  """What can be read is read; of the rest column, turn and role are named."""
  for name, columns, wanted in (
    ("content_parts", {}, [("user", "hi")]),
    ("developer", {}, [("system", "be nice"), ("user", "hi")]),
    ("prompt_is_messages", {}, [("user", "hi")]),
    ("messages", {}, [("user", "hi")]),
    ("messages", {"turns": "messages"}, [("user", "hi")]),
    ("system_last", {}, r":1: turns, turn 2 of 2 .system."),
    ("tool_calls", {}, r":1: turns, turn 2 of 4 .assistant."),
  ):
    if isinstance(wanted, str):
      changes = {"data.source": own.source(name), "data.columns": columns}
      own.refused(wanted, "generate", **changes)
    else:
      (found,) = prompt_sets.load(own.source(name), columns, "")
      assert [(turn.role, turn.content) for turn in found.turns] == wanted


@case
def blank_line(own: Case):
  """It is no row; that the one row there is came to be held out is said."""
  own.refused("training prompts", "generate")
  own.echo()
  own.run("generate", **{"data.columns": {"split": "=train"}})
  (id,) = {row["prompt_id"] for row in own.rows("generate/samples.jsonl")}
  (prompt,) = prompt_sets.load(own.source(), {}, "")
  assert (prompt.id, prompt.text) == (id, "a")


@case
def nan_answer(own: Case):
  """Missing is missing, and a prompt that is compared with an answer needs one."""
  own.refused(r"prompts.jsonl:1: wanted an answer", "generate,filter,sft")


@case
def no_eval_prompts(own: Case):
  """A column of splits that is all empty is none: rows are split as without it."""
  own.echo()
  own.run("eval", **{"eval.arms": ("base",)})
  found = prompt_sets.load(own.source(), {}, "")
  (held_out,) = (prompt.id for prompt in found if prompt.split == "eval")
  assert [row["prompt_id"] for row in own.rows("eval/base.jsonl")] == [held_out]


@case
def same_in_both(own: Case):
  own.refused("1 of 1 training prompts say .*'t1'", "generate,eval")


@case
def split_by_path(own: Case):
  """What is held out follows from the rows: not from the path, the order, the ids or
  what other lines there are."""
  own.patch.chdir(own.folder)
  given = (own.folder / "a" / "set.jsonl").read_text().splitlines()

  def held_out(path: str | pathlib.Path, lines=given) -> set[tuple[str, str]]:
    if lines is not given:
      path = own.workdir.with_name(str(path))
      path.write_text("\n".join(lines))
    found = prompt_sets.load(f"jsonl:{path}", {}, "")
    assert len({prompt.id for prompt in found}) == len(lines)
    return {(prompt.id, prompt.text) for prompt in found if prompt.split == "eval"}

  first = held_out("a/set.jsonl")
  assert 0 < len(first) < len(given)
  assert held_out("b/set.jsonl") == held_out(own.folder / "a" / "set.jsonl") == first
  assert held_out("reversed.jsonl", given[::-1]) == first
  new = json.loads(given[0]) | {"prompt": "a line of its own that says other things"}
  more = held_out("more.jsonl", [json.dumps(new), *given])
  assert {row for row in more if row[1] != new["prompt"]} == first
  numbered = [json.dumps(json.loads(line) | {"id": i}) for i, line in enumerate(given)]
  texts = {said for _, said in held_out("numbered.jsonl", numbered)}
  assert texts == {said for _, said in first}


@case
def row_id_collision(own: Case):
  """Each prompt has the reply to itself, though two ids have one CRC-32."""
  own.echo()
  changes = {"eval.arms": ("base",), "eval.helpful": 4}
  own.run("eval", **changes)
  rows = own.rows("eval/base.jsonl")
  assert len(rows) == 4
  assert all(row["prompt"] in row["answer"] for row in rows)
  own.run("eval", **changes)
  assert own.rows("eval/base.jsonl") == rows and len(own.asked) == 4


@case
def long_prompt(own: Case):
  """The one is left out, named and counted."""
  own.echo()
  own.run("generate", **{"generate.helpful": 12})
  wanted = {f"p{i}" for i in range(12) if i != 7}
  assert {row["prompt_id"] for row in own.rows("generate/samples.jsonl")} == wanted
  kept = json.loads((own.workdir / "generate" / "manifest.json").read_text())
  assert kept["summary"]["too_long"] == 1
  said = [line for line in own.capsys.readouterr().err.splitlines() if "'p7'" in line]
  assert len(said) == 1 and "sampler.prompt_room" in said[0]


# --- Servers ---


@case
def judge_all_refused(own: Case):
  """The reason is said and no stage goes on; once the server is mended, filter does."""
  with own.serve("max_tokens") as served:
    changes = {"filter.judge": "endpoint"} | served.at("filter")
    own.refused("no verdict on .*'max_tokens'", "generate,filter,sft", **changes)
  assert not (own.workdir / "filter" / "kept.jsonl").exists()
  assert not (own.workdir / "sft").exists()
  with own.serve("long", served.port):
    own.run("generate,filter", **changes)
  rows = own.rows("filter/judged.jsonl")
  assert rows and own.rows("filter/kept.jsonl")
  assert all(row["score"] is not None for row in rows if not row["malformed"])


@case
def judge_cut_thought(own: Case):
  """A score that a cut thought drafts is none."""
  with own.serve("cutthink") as served:
    changes = {"filter.judge": "endpoint"} | served.at("filter")
    own.refused("no verdict on", "generate,filter", **changes)
    assert served.asked
  for row in own.rows("filter/judged.jsonl"):
    known = row["kind"] == "capability"  # no judge is asked where the answer is known
    assert (row["score"] is None) == (row["reward"] is None) == (not known)


@case
def judge_html_page(own: Case):
  """A page with status 200 is an outage: tried again, one line, and gone on from."""
  teacher = {"data.source": own.source("one"), "generate.teacher": "endpoint"}
  with own.serve("html") as served:
    changes = teacher | {"generate.batch": 1} | served.at("generate")
    with pytest.raises(ConnectionError) as error:
      own.run("generate", **changes)
    assert "\n" not in str(error.value) and served.asked == 2
  with own.serve("good", served.port):
    own.run("generate", **changes)
  assert {row["finish"] for row in own.rows("generate/samples.jsonl")} == {"stop"}


@case
def surrogate_endpoint(own: Case):
  """Half a character costs no reply."""
  with own.serve("good") as served:
    own.run("generate", **{"generate.teacher": "endpoint"} | served.at("generate"))
  rows = own.rows("generate/samples.jsonl")
  assert {(row["prompt_id"], row["finish"]) for row in rows} == {
    ("s1", "stop"),
    ("s2", "stop"),
  }


@case
def cut_thought_graded(own: Case):
  """No answer has no grade, whatever was wanted; one behind a thought has."""
  found, outcome = [], evals.outcome

  def kept(prompt, sample, *more):
    found.append((prompt, sample, outcome(prompt, sample, *more)))
    return found[-1][2]

  own.patch.setattr(evals, "outcome", kept)
  own.script("check.py")
  own.script("check_endpoint.py")
  by_a_server = found[4:]
  # The third is of words without a tag, which nobody can tell from an answer.
  for prompt, sample, row in (*found[:2], found[3], *by_a_server):
    answers = sample.answer.startswith("Here is how: mix flour")
    graded = {row["scores"][name] for name in (*evals.TYPES, "style")} - {None}
    assert row["scores"]["no_answer"] == (not answers) and bool(graded) == answers
    if answers:
      assert row["scores"]["comply_allowed"] == (
        1 if prompt.expected == "comply" else None
      )
  assert sum(not row["scores"]["no_answer"] for _, _, row in by_a_server) == 4


# --- Models and their files ---


@case
def context_exceeded(own: Case):
  """A model of 128 positions is given no 1,000."""
  path = own.model("chatml", max_length=128)
  changes = {"model.path": path, "generate.teacher": "base"}
  few = {"generate.prompts.refuse": 2, "generate.max_new": 8, "eval.prompts": 2}
  for stage in ("generate", "eval"):
    own.refused("the model takes 128", stage, **changes | few)


@case
def tied_both(own: Case):
  """The head that a file has is the model's, though the config calls it tied."""
  place = pathlib.Path(own.model("chatml", tied=False))
  file = place / "config.json"
  file.write_text(
    json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True})
  )
  cfg, params, _ = weights.load(str(place))
  head = safetensors.numpy.load_file(place / "model.safetensors")["lm_head.weight"]
  assert not np.array_equal(head, params["embed"])
  x_BD = np.random.default_rng(0).standard_normal((3, cfg.width), np.float32)
  got = transformer.logits(params, x_BD, cfg=cfg, compute=tiny().compute)
  np.testing.assert_allclose(got, x_BD @ head.T, atol=1e-5)


@case
def gguf_split(own: Case):
  """A part is refused as one, and so is what else a file says that is not read."""
  found = {line[:22].strip(): line[22:].strip() for line in own.script("check.py")}
  for part in (1, 2):
    said = found[f"split {part} of 2"]
    assert said.startswith("refused: ") and f"part {part} of 2" in said
  read = {name for name, said in found.items() if said.startswith("read")}
  assert read >= {"f32", "q8_0", "eot id"}
  assert not read & {"qwen2", "rope yarn", "moe", "scale", "sliding", "llama-bpe"}
  assert "error of q 0.0000; stops (0, 2)" in found["f32"]
  assert not any(said.startswith("CRASH") for said in found.values())


@case
def system_in_user_turn(own: Case):
  """A template that has no place for the policy has it in the user's turn, which is
  said once and kept."""
  own.echo()
  for kind in ("lastuser", "nosystem"):
    changes = {"model.path": own.model(kind), "generate.teacher": "base"}
    changes |= {"filter.judge": "rubric", "generate.prompts.refuse": 2}
    place = own.workdir.with_name(kind)
    stages.run(own.config("generate,filter", **changes), place)
    said = own.capsys.readouterr().err
    assert said.count("takes no system turn") == 1
    for stage in ("generate", "filter"):
      kept = json.loads((place / stage / "manifest.json").read_text())
      assert kept["summary"]["system_turns"] == "in front of the first user turn"
  tok = opened(tiny(**changes), own.workdir).model.tok
  read = {tok.decode(request.tokens) for request in own.asked}
  assert read and all("say what is asked and what for" in said for said in read)


@case
def template_opens_think(own: Case):
  """A thought is opened once, in every stage and in the export, and those of worked
  examples stay."""
  for kind in ("opens", "strips"):
    changes = {"model.path": own.model(kind), "think.close": "</think>"}
    run = opened(tiny(**changes), own.workdir)
    asked = dataclasses.replace(run.prompts.all[0], turns=ASK)
    told = run.task.teach(asked.blind(), worked=1)
    for turns in (told, prompting.plain(asked)):
      read = run.model.tok.decode(
        prompting.render_prompt(
          run.model.tok, turns, run.model.think, keep_thoughts=True
        )
      )
      assert read.rpartition("assistant\n")[2] == run.model.think.of(asked.text).open
      thoughts = sum(turn.role == "assistant" for turn in turns)
      assert (
        read.count("<think>") == read.count(run.model.think.close) + 1 == thoughts + 1
      )
    params, out = weights.random_model(run.model.arch, 0), own.workdir / kind
    weights.save_hf(str(out), run.model.arch, params, run.model.file_tok)
    found = weights.find(str(out)).tok
    assert chat_template.render_chat(found, ASK) == chat_template.render_chat(
      run.model.tok, ASK
    )
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    chat = [dataclasses.asdict(turn) for turn in ASK]
    said = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert said.endswith("assistant\n")


@case
def dated_template(own: Case):
  """A run has one day, the one on which it began."""
  path, days = {"model.path": own.model("dated")}, []

  def stage(run):
    tok = run.model.tok
    days.append(tok.decode(chat_template.render_chat(tok, ASK))[:40])

  class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return super().now(tz) + datetime.timedelta(days=40)

  own.patch.setitem(stages.STAGES, "export", stage)
  own.run("export", **path)
  kept = json.loads((own.workdir / "config.json").read_text())["model.date"]
  today = datetime.datetime.now(datetime.UTC).date()
  assert abs((datetime.date.fromisoformat(kept) - today).days) < 2
  own.patch.setattr("datetime.datetime", Later)
  own.run("export", **path)
  assert days[0] == days[1] and kept[:4] in days[0]
  stages.run(own.config("export", **path), own.workdir.with_name("other"))
  assert days[2] != days[0]
  other = path | {"model.date": "2021-02-03"}
  own.refused(f"began with {kept}, got 2021-02-03", "report", **other)
  stages.run(own.config("export", **other), own.workdir.with_name("third"))
  assert "03 Feb 2021" in days[3]


@pytest.mark.parametrize("own", CASES, indirect=True)
def test_a_case_gives_what_is_wanted(own):
  CASES[own.folder.name](own)


def test_every_case_has_a_check(shared_cases):
  assert {path.name for path in shared_cases.iterdir() if path.is_dir()} == {*CASES}
