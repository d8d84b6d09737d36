"""Files of a run: nothing is half written, and what changed is not gone on with."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dalign.config import convert
from dalign.runs import store
from dalign.runs import workdir
from dalign.runs.metrics import Metrics
from dalign.runs.workdir import Store
from tests.helpers import tiny

ROWS = [{"id": "a", "text": "é\u2028"}, {"id": "b", "n": [1, 2]}, {"id": "c", "t": {}}]
CONFIG = {"sft.lr": 1e-3, "sft.steps": 10, "model.path": "m"}


@pytest.fixture
def spec(tmp_path):
  path = tmp_path / "elsewhere" / "specs" / "weapons.md"
  path.parent.mkdir(parents=True)
  path.write_text("v1")
  return path


def test_rows_and_json_come_back(tmp_path):
  path = tmp_path / "new" / "rows.jsonl"
  store.write_rows(path, ROWS)
  store.append_rows(path, [{"lone": "\ud83d"}])
  assert store.read_rows(path) == [*ROWS, {"lone": "\ud83d"}]
  store.write_json(tmp_path / "x.json", {"a": ["é", None]})
  assert store.read_json(tmp_path / "x.json") == {"a": ["é", None]}
  assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["rows.jsonl", "x.json"]


def test_append_goes_on_wherever_the_last_line_was_cut(tmp_path):
  path = tmp_path / "rows.jsonl"
  store.write_rows(path, ROWS)
  content = path.read_bytes()
  for size in range(len(content) + 1):
    path.write_bytes(content[:size])
    before = store.read_rows(path)
    assert path.read_bytes() == content[:size]
    store.append_rows(path, [{"id": "new"}])
    assert store.read_rows(path) == [*before, {"id": "new"}]
    whole = content[:size].count(b"\n")
    assert before in (ROWS[:whole], ROWS[: whole + 1])
    assert path.read_bytes().endswith(b'\n{"id": "new"}\n') or not before


def test_a_killed_writer_leaves_rows_to_go_on_from(tmp_path):
  path = tmp_path / "rows.jsonl"
  code = (
    "import itertools, pathlib, sys; from dalign.runs import store\n"
    "for i in itertools.count():\n"
    "  store.append_rows(pathlib.Path(sys.argv[1]), [{'i': i, 'x': 'y' * 100_000}])"
  )
  root = pathlib.Path(store.__file__).parents[2]
  writer = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=root)
  try:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 2_000_000):
      assert time.monotonic() < deadline, "the writer wrote nothing"
      time.sleep(0.001)
  finally:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
  rows = store.read_rows(path)
  store.append_rows(path, [{"i": len(rows)}])
  assert [row["i"] for row in store.read_rows(path)] == list(range(len(rows) + 1))


@pytest.mark.parametrize("bad", ["{'id': 1}", "[1]", "", '{"id": '])
def test_a_bad_row_is_named(tmp_path, bad):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"id": 1}\n' + bad + '\n{"id": 3}\n')
  with pytest.raises(ValueError, match=r"rows\.jsonl:2: wanted one JSON object"):
    store.read_rows(path)


def test_outputs_of_a_finished_stage_are_watched(tmp_path, spec):
  made = Store(tmp_path)
  path = tmp_path / "filter" / "kept.jsonl"
  made.begin("filter", {}, [spec], 0, "cpu")
  store.write_rows(path, ROWS)
  made.finish("filter", {})
  assert list(made.manifest("filter")["outputs"]) == ["kept.jsonl"]
  before = path.read_bytes()
  flipped = bytes([before[0], before[1] ^ 1]) + before[2:]
  for content, said in (
    (flipped, "changed"),
    (before[:-3], "changed"),
    (None, "is gone"),
  ):
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"kept.jsonl: {said}.*--config.stages=filter"):
      made.begin("sft", {}, [path], 0, "cpu")
  path.write_bytes(before)
  assert made.begin("sft", {}, [path], 0, "cpu") == "fresh"


def test_what_a_killed_writer_left_is_no_hindrance(tmp_path, spec):
  made = Store(tmp_path)
  (tmp_path / "generate").mkdir()
  (tmp_path / "generate" / ".manifest.json.1234.tmp").write_text("{")
  assert made.begin("generate", {}, [spec], 0, "cpu") == "fresh"
  assert [p.name for p in (tmp_path / "generate").iterdir()] == ["manifest.json"]


def test_rows_are_put_in_order(tmp_path):
  path = tmp_path / "rows.jsonl"
  rows = [{"n": n, "text": "é" * n} for n in (3, 1, 2)]
  store.write_rows(path, rows)
  with path.open("ab") as file:
    file.write(b'{"n": 0, "cut')
  store.sort_rows(path, lambda row: row["n"])
  assert store.read_rows(path) == [rows[1], rows[2], rows[0]]
  assert path.read_bytes().endswith(b"\n") and len(list(tmp_path.iterdir())) == 1
  path.write_bytes(b'{"n": 1}\nnonsense\n{"n": 0}\n')
  with pytest.raises(ValueError, match=r"rows.jsonl:2: wanted one JSON object"):
    store.sort_rows(path, lambda row: row["n"])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  store.write_json(path, {"a": 1})
  with pytest.raises(ValueError):
    store.write_json(path, {"a": float("nan")})
  monkeypatch.setattr(store.os, "fsync", lambda _: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    store.write_json(path, {"a": 2})
  assert store.read_json(path) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_is_absent_or_not_json_is_named(tmp_path):
  (tmp_path / "x.json").write_text("{")
  with pytest.raises(ValueError, match="x.json: wanted JSON"):
    store.read_json(tmp_path / "x.json")
  for read in (store.read_json, store.read_rows):
    with pytest.raises(ValueError, match="none.jsonl: wanted this file"):
      read(tmp_path / "none.jsonl")


def test_a_stage_is_fresh_then_resumed_then_done(tmp_path, spec):
  args = ("sft", CONFIG, [spec], 7, "cpu")
  assert Store(tmp_path / "w").begin(*args) == "fresh"
  first = Store(tmp_path / "w").manifest("sft")
  assert first["finished"] is None and first["wall_s"] == 0
  assert first["config"] == CONFIG and list(first["inputs"]) == ["specs/weapons.md"]

  second = Store(tmp_path / "w")
  assert second.begin(*args) == "resume"
  time.sleep(0.02)
  second.pause("sft")
  third = Store(tmp_path / "w")
  assert third.begin(*args) == "resume"
  time.sleep(0.02)
  third.finish("sft", {"loss": 1.5})
  last = Store(tmp_path / "w").manifest("sft")
  assert Store(tmp_path / "w").begin(*args) == "done"
  assert last["wall_s"] >= 0.04 and last["summary"] == {"loss": 1.5}
  assert last["started"] == first["started"] <= last["finished"]
  assert set(last) == {
    *("format_version", "stage", "config", "config_hash", "inputs", "outputs"),
    *("code_version", "seed", "device", "started", "finished", "wall_s", "summary"),
  }


@pytest.mark.parametrize("finished", [False, True])
def test_what_changed_is_named(tmp_path, spec, finished):
  run = Store(tmp_path / "w")
  run.begin("sft", CONFIG, [spec], 7, "cpu")
  if finished:
    run.finish("sft", {})
  before = run.path("sft", "manifest.json").read_bytes()
  spec.write_text("v2")
  changed = {"sft.lr": 0.5, "sft.steps": 10, "sft.new": (1, 2)}
  with pytest.raises(ValueError) as caught:
    Store(tmp_path / "w").begin("sft", changed, [spec], 8, "cuda")
  text = str(caught.value)
  for part in (
    "stage sft " + ("is done" if finished else "was cut off"),
    "sft.lr was 0.001 and is now 0.5",
    "sft.new was absent and is now [1, 2]",
    'model.path was "m" and is now absent',
    "the run's seed was 7 and is now 8",
    "input specs/weapons.md was",
    "--workdir",
    "--config.start_over=true",
  ):
    assert part in text, part
  assert "sft.steps" not in text and "cuda" not in text
  assert run.path("sft", "manifest.json").read_bytes() == before


def test_a_folder_as_input_and_a_lost_input(tmp_path, spec):
  run = Store(tmp_path / "w")
  assert run.begin("sft", {}, [spec.parent], 0, "cpu") == "fresh"
  assert run.begin("sft", {}, [spec.parent], 0, "cpu") == "resume"
  (spec.parent / "new.md").write_text("")
  with pytest.raises(ValueError, match="input elsewhere/specs was"):
    run.begin("sft", {}, [spec.parent], 0, "cpu")
  with pytest.raises(ValueError, match="gone.md: wanted as an input"):
    run.begin("rl", {}, [tmp_path / "gone.md"], 0, "cpu")


def test_start_over_deletes_that_stage_alone(tmp_path):
  run = Store(tmp_path)
  for stage in ("sft", "rl"):
    run.begin(stage, CONFIG, [], 0, "cpu")
    run.write_rows(run.path(stage, "rows.jsonl"), ROWS)
  assert run.begin("sft", {}, [], 0, "cpu", start_over=True) == "fresh"
  assert not run.path("sft", "rows.jsonl").exists()
  assert run.read_rows(run.path("rl", "rows.jsonl")) == ROWS


def test_a_stage_that_cannot_be_deleted_is_not_taken_for_done(tmp_path):
  run = Store(tmp_path / "run")
  run.begin("sft", {}, [], 0, "cpu")
  run.finish("sft", {})
  run.path("sft").rename(tmp_path / "disk")
  run.path("sft").symlink_to(tmp_path / "disk")
  with pytest.raises(ValueError, match="start_over: .*sft"):
    run.begin("sft", {}, [], 0, "cpu", start_over=True)


def test_rows_without_a_manifest_are_not_gone_on_with(tmp_path):
  run = Store(tmp_path)
  run.append_rows(run.path("sft", "rows.jsonl"), ROWS)
  with pytest.raises(ValueError, match="holds rows.jsonl but no manifest.json"):
    run.begin("sft", {}, [], 0, "cpu")


def test_a_stage_is_one_folder(tmp_path):
  for stage in ("", ".", "..", "a/b", "/"):
    with pytest.raises(ValueError, match="a stage is the name of one folder"):
      Store(tmp_path / "w").begin(stage, {}, [], 0, "cpu", start_over=True)


def test_a_manifest_of_another_format_is_refused(tmp_path):
  run = Store(tmp_path)
  run.write_json(run.path("sft", "manifest.json"), {"format_version": 0})
  with pytest.raises(ValueError, match="wanted manifest format 1, got 0"):
    run.begin("sft", {}, [], 0, "cpu")


def test_a_config_json_of_another_format_is_refused():
  values = convert.to_json(tiny())
  assert convert.of_json(values) == tiny()
  for version in (2, None):
    with pytest.raises(ValueError, match=f"wanted format 1, got {version}"):
      convert.of_json(values | {"format_version": version})
  del values["rl.stop_kl"]
  with pytest.raises(ValueError, match="config.rl: missing stop_kl"):
    convert.of_json(values)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
  now = iter(range(10**9, 0, -3600))
  monkeypatch.setattr(time, "time", lambda: float(next(now)))
  monkeypatch.setattr(time, "time_ns", lambda: next(now) * 10**9)
  monkeypatch.setattr(
    workdir, "_now", lambda: f"2001-01-{next(now) % 28:02d}T00:00:00Z"
  )
  args = ("sft", CONFIG, [], 7, "cpu")
  for state in ("fresh", "resume"):
    run, metrics = Store(tmp_path), Metrics(tmp_path, tiny().log)
    assert run.begin(*args) == state
    metrics.rewind("sft", 2)
    for step in (1, 2, 3, 4) if state == "fresh" else (3, 4):
      metrics.write("sft", step, {"sft/loss": 1.0})
    metrics.close()
    run.pause("sft")
  run.finish("sft", {})
  assert Store(tmp_path).begin(*args) == "done"
  assert Store(tmp_path).manifest("sft")["wall_s"] >= 0
  found = store.read_rows(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in found] == [1, 2, 3, 4]


def test_spec_files_are_the_markdown_but_the_readme(tmp_path):
  for name in ("style.md", "README.md", "a.md", "notes.txt"):
    (tmp_path / name).write_text(name, encoding="utf-8")
  assert store.read_spec_files(tmp_path) == {"a.md": "a.md", "style.md": "style.md"}
  with pytest.raises(ValueError, match="wanted a folder with specification files"):
    store.read_spec_files(tmp_path / "none")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="the folder has none"):
    store.read_spec_files(tmp_path / "empty")
