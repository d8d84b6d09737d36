"""The benchmarks' own arithmetic, and dalign's side of each kind of work."""

import argparse
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from benchmarks import classifier
from benchmarks import roofline
from benchmarks import run as benchmark
from benchmarks import works
from benchmarks import world_figures
from benchmarks.peers import dalign as ours
from dalign.data import prompt_sets
from dalign.formats import weights
from dalign.models import transformer
from dalign.text import chat_template
from dalign.text import vocab
from tests.helpers import python
from tests.helpers import write_jsonl

SHAPE = roofline.Model(
  layers=2, width=8, heads=4, kv_heads=2, head_dim=2, ffw=16, vocab=32
)


def test_floors_count_each_token_and_what_it_sees_once():
  """By hand: a token's products in the layers, in the head, and its attention."""
  body = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
  token, head, pair = 2 * body, 2 * 8 * 32, 2 * 2 * 8 * 2
  assert (SHAPE.body, SHAPE.head) == (body, 8 * 32)
  rates = roofline.Rates(gflops=1e-9, gb_s=np.inf, weight=4)  # seconds are operations
  shared = works.Decode(about="", prompts=3, batch=3, shared=5, own=(2, 2), new=(4, 4))
  floor = roofline.floor(shared, SHAPE, rates)
  seen = 5 * 6 / 2 + 3 * (2 * 5 + 2 * 3 / 2)
  assert floor["prefill"] == pytest.approx((5 + 3 * 2) * token + 3 * head + seen * pair)
  assert floor["decode"] == pytest.approx(9 * (token + head) + 9 * pair * (5 + 2 + 2))
  train = works.Train(about="", batch=3, length=4, remat=False)
  once = 12 * (token + head) + 3 * 10 * pair
  assert roofline.floor(train, SHAPE, rates)["gradient"] == pytest.approx(3 * once)
  step = works.Reinforce(about="", prompts=2, samples=3, prompt=4, new=5)
  floor = roofline.floor(step, SHAPE, rates)
  prompts = 2 * (4 * token + 10 * pair)
  assert floor["prefill"] == pytest.approx(prompts + 6 * head)
  own = 30 * (token + head) + 6 * (5 * 4 + 15) * pair
  assert floor["reference"] == pytest.approx(prompts + own)
  assert floor["update"] == pytest.approx(3 * (prompts + own))


def test_reading_bounds_what_has_few_products():
  rates = roofline.Rates(gflops=1e30, gb_s=1e-9, weight=4)  # seconds are bytes
  work = works.Decode(about="", prompts=3, batch=3, shared=5, own=(2, 2), new=(3, 3))
  floor = roofline.floor(work, SHAPE, rates)
  cached = 2 * 2 * 2 * 2 * (5 + 3 * (2 + 3 / 2))  # the shared ones once for all rows
  want = 2 * 4 * (SHAPE.body + SHAPE.head + cached)
  assert floor["decode"] == pytest.approx(want)


def turns(name, seconds, **more):
  return [
    {"work": "W3", "turn": i, "name": name, "dtype": "f32", "seconds": [s]}
    | {"peak_mb": 100 + i, "first_done_s": 9.0 - i, "others_cpus": [0.1]}
    | more
    for i, s in enumerate(seconds)
  ]


def test_the_table_pairs_the_turns(tmp_path):
  config = dict(num_hidden_layers=2, hidden_size=8, num_attention_heads=4)
  config |= dict(num_key_value_heads=2, intermediate_size=16, vocab_size=32)
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert roofline.Model.of(str(tmp_path)) == SHAPE
  ceilings = {"gflops": {"f32": 1.0, "bf16": 2.0}, "gb_s": 1.0, "device": "a cpu"}
  rows = [{"ceilings": ceilings, "commit": "abc", "date": "today"}]
  rows += turns("dalign", [1.0, 2.0, 4.0])
  rows += turns("TRL", [3.0, 2.0, 10.0, 4.0], parts={"update": 1.5})
  rows.append({"work": "W3", "turn": 0, "name": "Tunix", "dtype": "f32"})
  rows[-1]["failed"] = "exit 1: no memory"
  lines = benchmark.table(rows, str(tmp_path))
  assert "commit abc" in lines[0] and "1 GFLOP/s float32" in lines[0]
  cells = [[c.strip() for c in line.split("|")] for line in lines]
  trl = next(c for c in cells if "TRL" in c)
  # Turns are compared one by one: 3 / 1, 2 / 2, 10 / 4, of which 2.5 is the middle; the
  # fourth has no partner.
  assert trl[3:7] == ["3.50 (2.00-10.00)", f"{4096 / 3.5:.0f}", "update 1.5", "2.50"]
  assert trl[8:10] == ["103", "9.0, then 7.0"]
  floor = roofline.floor(
    works.WORKS["W3"], SHAPE, roofline.Rates(gflops=1.0, gb_s=1.0, weight=4)
  )
  assert trl[7] == f"{sum(floor.values()) / 3.5:.0%}"
  assert any("exit 1: no memory" in c for line in cells for c in line)


def test_an_unknown_work_ends_with_what_there_is():
  done = python("-m", "benchmarks.run", "--works", "W9", cwd=benchmark.ROOT)
  assert done.returncode == 2 and "no work W9; there are W1, W2" in done.stderr


def test_unknown_contenders_are_refused(capsys):
  asked = argparse.Namespace(only="trl:f32,nobody", peers=False, envs="none")
  with pytest.raises(SystemExit) as stop:
    benchmark.choose(asked)
  assert stop.value.code == 2
  told = capsys.readouterr().err
  assert "nobody is called nobody; there are dalign:f32, dalign:bf16, " in told
  asked.only = "DALIGN:F32"
  assert [c.label for c in benchmark.choose(asked)] == ["dalign", "dalign, static"]


@pytest.fixture
def tiny(monkeypatch, tmp_path, cfg, params):
  """Runs dalign's side of a work with the tiny model; its answer."""
  monkeypatch.setattr(works, "ORDINARY", (3, cfg.vocab))
  monkeypatch.setattr(ours.turn, "wait_until_quiet", lambda: None)
  tok = vocab.tiny_tokenizer()
  read = jax.tree.map(np.asarray, params)  # as files are
  monkeypatch.setattr(
    weights, "load", lambda _: (cfg, jax.tree.map(np.copy, read), tok)
  )

  def run(capsys, work, *more):
    monkeypatch.setitem(works.WORKS, "tiny", work)
    argv = ["turn", "--work", "tiny", "--model", "-", *more]
    monkeypatch.setattr(sys, "argv", argv)
    ours.main()
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

  return run


def test_slots_and_static_batches_decode_the_same(tiny, capsys):
  work = works.Decode(about="", prompts=5, batch=2, own=(2, 9), new=(1, 6))
  slots = tiny(capsys, work)
  static = tiny(capsys, work, "--variant", "static")
  assert slots["check"] == static["check"]
  assert slots["new_tokens"] == static["new_tokens"] == work.tokens
  assert len(slots["seconds"]) == len(slots["first_token_s"]) == 1


@pytest.mark.slow
def test_a_training_and_an_rl_step_give_their_times(tiny, capsys):
  train = works.Train(about="", batch=2, length=16, remat=True)
  assert len(tiny(capsys, train, "--repeats", "2")["seconds"]) == 2
  step = works.Reinforce(about="", prompts=2, samples=3, prompt=7, new=5)
  parts = tiny(capsys, step)["parts"]
  assert set(parts) == {"rollout", "reference", "update"} and min(parts.values()) > 0


@pytest.fixture
def letters(monkeypatch, tmp_path, cfg, make_params):
  """A file of prompts whose first letter says the category and whose second the
  verdict, and a tiny model to learn them."""
  tok = vocab.tiny_tokenizer()
  arch = dataclasses.replace(cfg, vocab=len(tok.ids))
  params = jax.tree.map(np.asarray, make_params(arch))
  monkeypatch.setattr(
    weights, "load", lambda _: (arch, jax.tree.map(np.copy, params), tok)
  )
  rows = [
    {"id": f"{i}{a}{b}", "prompt": f"{a}{b}{i}", "category": category}
    | {"expected": expected, "split": "eval" if i < 2 else "train"}
    for i in range(10)
    for a, category in {"p": "privacy", "w": "weapons"}.items()
    for b, expected in {"r": "refuse", "c": "comply", "s": "safe_complete"}.items()
  ]
  path = write_jsonl(tmp_path / "letters.jsonl", rows)
  return path, arch, params, tok


def test_a_classifier_learns_its_labels(letters, monkeypatch, tmp_path, capsys):
  path, *_ = letters
  out = tmp_path / "found.json"
  argv = ["classifier", f"--source=jsonl:{path}", f"--xstest={path}", f"--out={out}"]
  argv += ["--epochs=30", "--rate=1e-2", "--prompts=6"]
  monkeypatch.setattr(sys, "argv", argv)
  classifier.main()
  found = json.loads(out.read_text())
  assert found["trained"] == 48 and found["steps"] >= 30
  for name, n in (("held out", 6), ("xstest", 60)):
    some = found["sets"][name]
    assert len(some["rows"]) == n and some["curve"]["auc"] == 1.0
    cells = some["metrics"]
    assert {metric: cells[metric]["mean"] for metric in classifier.DEFINITIONS} == (
      dict.fromkeys(classifier.DEFINITIONS, 1.0)
    )
    assert [cells[m]["n"] for m in ("refuse_disallowed", "category")] == [n // 3, n]
  assert "safe_complete                  1.000 [" in (capsys.readouterr().out)


def test_a_verdict_is_summed_over_the_categories(letters, monkeypatch, compute):
  """Against a forward pass of each prompt alone, and by hand what is made of it."""
  monkeypatch.setattr(classifier, "COMPUTE", compute)
  path, arch, params, tok = letters
  prompts = prompt_sets.load(f"jsonl:{path}", {}, "")[:11]
  labels = classifier.Labels.of(tok, prompts)
  assert [*labels.categories] == ["privacy", "weapons"]
  joint_NCV = classifier.probabilities(params, tok, prompts, labels, cfg=arch)

  def last(tokens, ids):
    hidden_BTD, _ = transformer.forward_rows(
      params, np.array([tokens]), cfg=arch, compute=compute
    )
    logits_BV = transformer.logits(params, hidden_BTD[:, -1], cfg=arch, compute=compute)
    return jax.nn.softmax(logits_BV[0, jnp.array([*ids])])

  for prompt, joint_CV in zip(prompts[::5], joint_NCV[::5], strict=True):
    front = chat_template.render_chat(tok, list(prompt.turns))
    first_C = last(front, labels.categories.values())
    then_CV = [
      last([*front, c], labels.verdicts.values()) for c in labels.categories.values()
    ]
    want_CV = first_C[:, None] * jnp.stack(then_CV)
    np.testing.assert_allclose(joint_CV, want_CV, atol=1e-5)

  # Likeliest is the first category with "comply"; over both, a refusal is likelier.
  joint_NCV = np.tile([[0.25, 0.0, 0.3], [0.3, 0.15, 0.0]], (2, 1, 1))
  some = [p for p in prompts if p.expected != "safe_complete"][:2]
  found = classifier.measured(some, joint_NCV, labels, seed=0)
  assert [row["said"]["verdict"] for row in found["rows"]] == ["refuse", "refuse"]
  assert found["rows"][0]["odds"] == pytest.approx(
    {"refuse": 0.55, "safe_complete": 0.15, "comply": 0.3}
  )
  assert found["curve"]["auc"] == 0.5


# --- Figures of the policy world ---


def a_seed(workdir, seed: int, arm: str, **means: float) -> None:
  path = workdir / f"seed-{seed}" / arm / "eval" / "summary.json"
  path.parent.mkdir(parents=True)
  cells = {name: {"mean": mean} for name, mean in means.items()}
  path.write_text(json.dumps({"arms": {arm: cells}}))


def test_figures_are_drawn_of_all_seeds(tmp_path, monkeypatch):
  matplotlib.use("svg")
  for seed in (0, 1):
    for arm in world_figures.ARMS:
      depths = {
        f"{budget}depth_{n}": (n + seed) / 10
        for budget in world_figures.BUDGETS
        for n in world_figures.CLAUSES
      }
      a_seed(tmp_path, seed, arm, **depths)
  assert world_figures.scores(tmp_path, "sft", "depth_3") == pytest.approx([30, 40])
  drawn = []
  monkeypatch.setattr(
    world_figures, "draw", lambda axes, xs, by_x, label: drawn.append((label, by_x))
  )
  world_figures.deep(tmp_path, tmp_path / "deep.svg")
  lines = len(world_figures.ARMS) + len(world_figures.BUDGETS)
  assert len(drawn) == lines and "<svg" in (tmp_path / "deep.svg").read_text()
  assert drawn[0][1][0] == pytest.approx([10, 20])
