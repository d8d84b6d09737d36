"""The first afternoon: a folder to begin with, and what is missing in one's own."""

import shutil

import pytest

from dalign import stages
from dalign.data import bundled
from dalign.data import prompt_sets
from dalign.formats import weights
from dalign.judges import functions
from dalign.judges import probing
from dalign.policy import spec as specs
from dalign.runs import manifests
from dalign.runs import store
from dalign.stages import evidence
from dalign.tools import check
from dalign.tools import new
from tests.helpers import ROOT
from tests.helpers import opened
from tests.helpers import tiny
from tests.helpers import write_jsonl
from tests.house.test_package import dalign_command

ROW = {"prompt": "How do I sell a lock?", "category": "benign", "expected": "comply"}


def test_a_new_folder_has_what_a_run_begins_with(tmp_path):
  """Read from anywhere, by a config that names its own folder."""
  made = dalign_command("--mode=new", "--workdir=own", cwd=tmp_path)
  assert made.returncode == 0, made.stderr
  config = tmp_path / "own" / "config.py"
  (tmp_path / "elsewhere").mkdir()
  done = dalign_command(
    "--mode=check", f"--config={config}", cwd=tmp_path / "elsewhere"
  )
  assert done.returncode == 0, done.stderr
  judge = f"python:{tmp_path / 'own' / 'judge.py'}:judge"
  for wanted in ("policy returns", "returns to refuse", f"{judge}; told of"):
    assert wanted in done.stdout
  assert "MISSING" not in done.stdout
  assert not [*(tmp_path / "elsewhere").iterdir()]
  again = dalign_command("--mode=new", "--workdir=own", cwd=tmp_path)
  assert again.returncode == 2 and "own: wanted a new folder" in again.stderr


def test_prompts_of_a_new_folder_have_every_type_on_both_sides(tmp_path):
  new.new(tmp_path / "own")
  prompts = prompt_sets.load(f"jsonl:{tmp_path}/own/prompts.jsonl", {}, "")
  cells = {(p.expected, p.split) for p in prompts if p.kind == "safety"}
  assert len(cells) == 6


def test_the_judge_of_a_new_folder_knows_the_rules_of_its_policy(tmp_path):
  own = tmp_path / "own"
  new.new(own)
  spec = specs.load(store.read_spec_files(own / "policies"))
  ask = functions.of_file(f"python:{own / 'judge.py'}:judge", str)
  asked = probing.of_rules(spec) + probing.of_worked(spec)
  verdicts = ask([question for _, question, _ in asked])
  [clauses] = probing.rules_report(spec, asked, verdicts).values()
  assert sum(row["breaks"] for row in clauses.values()) == 3
  assert not any(row["passed"] or row["failed"] for row in clauses.values())


def checked(config, tmp_path, capsys) -> tuple[str, str]:
  """The table, and the error."""
  with pytest.raises(ValueError, match="^check: ") as caught:
    check.check(config, tmp_path / "run")
  return capsys.readouterr().out, str(caught.value)


def test_all_that_is_missing_is_said_at_once(tmp_path, capsys):
  rows = [ROW, ROW | {"prompt": "What is a pawl?", "category": "weapons", "split": ""}]
  source = write_jsonl(tmp_path / "p.jsonl", [r | {"split": "train"} for r in rows])
  changes = {"data.source": f"jsonl:{source}", "generate.teacher": "base"}
  config = tiny(**changes, **{"filter.judge": "rubric"})
  table, error = checked(config, tmp_path, capsys)
  missing = [line for line in table.splitlines() if line.startswith("MISSING")]
  for about, said in (
    ("privacy", "no prompt of this policy"),
    ("held out", "0 to comply"),
    ("steps", "wanted 7 or more training prompts"),
  ):
    assert [x for x in missing if about in x and said in x], (about, table)
  assert "weapons to comply" in table and "1 to train on, 0 held out" in table
  assert f"{len(missing)} of these" in error
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("change", "about"),
  [
    ({"data.source": "jsonl:nowhere.jsonl"}, "prompts"),
    ({"spec.dir": "nowhere"}, "policies"),
    ({"model.path": "/nowhere"}, "lengths"),
  ],
)
def test_what_cannot_be_read_is_a_line_and_the_rest_is_still_said(
  tmp_path, capsys, change, about
):
  table, error = checked(tiny(**change), tmp_path, capsys)
  assert f"MISSING {about}" in table and "nowhere" in error
  assert "        judge of the filter" in table


def test_a_check_reads_no_weights(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(weights.Checkpoint, "params", None)
  check.check(tiny(), tmp_path / "run")
  assert "weapons to refuse" in capsys.readouterr().out
  assert not (tmp_path / "run").exists()


def test_policies_that_hide_the_packages_are_named(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  check.check(tiny(), tmp_path / "run")
  assert "policies: those of" not in capsys.readouterr().err
  shutil.copytree(ROOT / "specs", tmp_path / "specs")
  check.check(tiny(), tmp_path / "run")
  assert f"policies: those of {tmp_path / 'specs'}, and not" in capsys.readouterr().err


def test_a_recipe_is_that_of_the_package(tmp_path, monkeypatch):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart.py").write_text("")
  monkeypatch.chdir(tmp_path)
  assert bundled.recipe("quickstart:full").recipe.startswith("quickstart:full.v")
  with pytest.raises(ValueError, match="wanted one of large, quickstart, .* got 'x'"):
    bundled.recipe("x")


def few(tmp_path, **changes):
  """The tiny config with prompts of which one to comply and none to refuse is held out,
  although some are there."""
  rows = [
    ROW | {"prompt": f"{word} a lock?", "category": "weapons", "expected": expected}
    for expected, word in (("comply", "Sell"), ("comply", "Paint"), ("refuse", "Force"))
  ]
  sides = ("train", "eval", "train")
  rows = [row | {"split": side} for row, side in zip(rows, sides, strict=True)]
  path = write_jsonl(tmp_path / "p.jsonl", rows)
  source = {"data.source": f"jsonl:{path}", "generate.teacher": "base"}
  return tiny(**source, **changes)


def test_a_run_without_enough_held_out_prompts_stops_before_it_begins(tmp_path):
  config = few(tmp_path, **{"thin": "stop", "eval.least": 1})
  wanted = (
    "fewer held-out prompts than 1 of a type .*: 0 to refuse: .*--config.thin=say"
  )
  with pytest.raises(ValueError, match=wanted):
    stages.run_stages(config, tmp_path / "run", {}, ("generate", "eval"))
  assert not (tmp_path / "run" / "generate").exists()


def test_too_few_held_out_prompts_are_said(tmp_path, capsys):
  run = opened(few(tmp_path, **{"eval.least": 2}), tmp_path, "eval")
  assert evidence.require_held_out(run) == ["1 to comply", "0 to refuse"]
  assert "1 to comply, 0 to refuse" in capsys.readouterr().err
  none = opened(few(tmp_path, **{"eval.least": 2, "eval.prompts": 0}), tmp_path, "eval")
  assert evidence.require_held_out(none) == []


def test_a_filter_that_keeps_too_little_stops_or_says_so(tmp_path, workdir):
  shutil.copytree(workdir / "generate", tmp_path / "generate")
  asked = {"filter.least": 10**6}
  wanted = "filter: kept fewer samples than 1000000 .*, [0-9]+ of weapons to refuse"
  with pytest.raises(ValueError, match=wanted):
    stages.run_stages(tiny(thin="stop", **asked), tmp_path, {}, ("filter",))
  manifest = manifests.read_manifest(tmp_path / "filter" / "manifest.json")
  assert manifest["finished"] is None  # or the next command would go on
  stages.run_stages(tiny(thin="say", **asked), tmp_path, {}, ("filter", "report"))
  summary = store.read_json(tmp_path / "filter" / "manifest.json")["summary"]
  cells = [cell for cells in summary["keep_rates"].values() for cell in cells.values()]
  assert len(summary["thin"]) == len(cells) > 3
  page = (tmp_path / "report.html").read_text()
  assert f"filter: too few samples kept to go by: {summary['thin'][0]}, " in page


def test_a_filter_that_keeps_enough_says_nothing(tmp_path, workdir):
  shutil.copytree(workdir / "generate", tmp_path / "generate")
  stages.run_stages(tiny(thin="stop"), tmp_path, {}, ("filter",))
  summary = store.read_json(tmp_path / "filter" / "manifest.json")["summary"]
  assert summary["thin"] == [] and summary["kept"]
