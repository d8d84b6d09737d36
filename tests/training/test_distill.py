"""On-policy distillation: loss and estimate, against enumeration and plain sums."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config import convert
from dalign.config.fields import Halted
from dalign.evaluation import evals
from dalign.models import adapters
from dalign.models import transformer
from dalign.policy import prompting
from dalign.stages import distill as distill_stage
from dalign.stages import rollouts as rollouts_of
from dalign.stages import services
from dalign.text import packing
from dalign.training import distillation
from dalign.training import policy_gradient
from tests.helpers import assert_close
from tests.helpers import opened
from tests.helpers import tiny
from tests.helpers import with_gradients

KEY, TEMPERATURE = jax.random.key(0), 0.8
PROMPT, SPEC = (3, 1, 4, 1), (2, 2, 0, 4, 3, 0)


def close(got, want):
  """Equal but for rounding, which is in proportion to the largest of each array."""
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert_close(a, b, atol=1e-4 * np.abs(b).max() + 1e-6, rtol=1e-3)


@pytest.fixture(scope="module")
def small(cfg):
  """Five tokens, logits that are capped, one id that is none, and a head of its own."""
  return dataclasses.replace(
    cfg, vocab=6, absent=((5, 6),), logit_cap=3.0, tied=False, layers=1
  )


@pytest.fixture(scope="module")
def student(small, make_params):
  return jax.tree.map(lambda x: 2.0 * x, make_params(small))


@pytest.fixture(scope="module")
def teacher(small, make_params):
  return jax.tree.map(lambda x: 2.0 * x, make_params(small, seed=1))


def logp_of(params, rows, cfg, compute, front=()):
  """Log-probabilities [N, T, V], in float32, of what follows PROMPT behind a front."""
  return _logp(params, np.asarray(rows, np.int32), cfg, compute, front)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _logp(params, rows_NT, cfg, compute, front):
  known = jnp.asarray([[*front, *PROMPT]] * len(rows_NT), jnp.int32)
  tokens = jnp.concatenate([known, rows_NT], axis=1)
  hidden_BTD, _ = transformer.forward_rows(params, tokens, cfg=cfg, compute=compute)
  at = len(front) + len(PROMPT) - 1
  logits = transformer.logits(params, hidden_BTD[:, at:-1], cfg=cfg, compute=compute)
  return jax.nn.log_softmax(logits / TEMPERATURE)


@functools.cache
def score_of(cfg, compute, exact):
  """What the teacher makes of each token."""
  if exact:
    return jax.jit(distillation.make_hidden(cfg=cfg, compute=compute))
  return jax.jit(
    policy_gradient.make_score(cfg=cfg, compute=compute, temperature=TEMPERATURE)
  )


def batch_of(samples, teacher, cfg, compute, *, exact, packs=packing.pack):
  """What `distillation.make_loss` takes of samples, each of which follows PROMPT."""
  known = len(PROMPT)
  rows = [([*PROMPT, *own], [0.0] * known + [1.0] * len(own)) for own in samples]
  told = [([*SPEC, *tokens], [0.0] * len(SPEC) + weights) for tokens, weights in rows]
  packed, read = packs(rows, length=16), packing.pack(told, length=32)
  lines = read.lines | {"wanted_BT": read.weight_BT > 0}
  found = np.asarray(score_of(cfg, compute, exact)(teacher, lines))
  at = np.zeros((*packed.tokens_BT.shape, *found.shape[2:]), np.float32)
  places = zip(packed.where, read.where, samples, strict=True)
  for (b, start, size), (c, begun, length), own in places:
    end, last = start + size, begun + length
    at[b, end - len(own) : end] = found[c, last - len(own) : last]
  more = {"sampled_BT": packed.weight_BT > 0}
  return packed.lines | more | {"teacher_BTD" if exact else "teacher_BT": at}


@functools.cache
def run_of(cfg, compute, exact, chunk=16):
  """`run({"policy", "teacher"}, batch) -> (mean, metrics, gradients)`."""
  compute = dataclasses.replace(compute, logits_chunk=chunk)
  return with_gradients(
    distillation.make_loss(
      cfg=cfg, compute=compute, temperature=TEMPERATURE, exact=exact
    )
  )


def every(length):
  """All completions of so many of the five tokens there are."""
  return [*itertools.product(range(5), repeat=length)]


SAMPLES = [(0, 1, 2), (3,), (4, 4, 0, 2, 1), (1, 0)]


@pytest.mark.parametrize("packs", [packing.pad_rows, packing.pack])
def test_the_loss_is_the_sum_by_hand(packs, student, teacher, small, compute):
  batch = batch_of(SAMPLES, teacher, small, compute, exact=True, packs=packs)
  params = {"policy": student, "teacher": distillation.head_of(teacher)}
  mean, metrics, grads = run_of(small, compute, True)(params, batch)
  rows = [(*own, *[0] * (5 - len(own))) for own in SAMPLES]
  pi_NTV, p_NTV = (
    np.asarray(logp_of(params, rows, small, compute, front), float)[..., :5]
    for params, front in ((student, ()), (teacher, SPEC))
  )
  kls, entropies = [], []
  for n, own in enumerate(SAMPLES):
    for t in range(len(own)):
      pi_V, p_V = pi_NTV[n, t], p_NTV[n, t]
      kls.append(sum(np.exp(pi_V[v]) * (pi_V[v] - p_V[v]) for v in range(5)))
      entropies.append(-sum(np.exp(pi_V[v]) * pi_V[v] for v in range(5)))
  assert np.mean(kls) > 0.1
  np.testing.assert_allclose(mean.total, sum(kls), rtol=1e-4)
  assert mean.count == len(kls)
  found = metrics["reverse_kl_nats"].value(), metrics["entropy_nats"].value()
  np.testing.assert_allclose(found, (np.mean(kls), np.mean(entropies)), rtol=1e-4)
  mask_NT = np.arange(5)[None] < np.array([*map(len, SAMPLES)])[:, None]

  def by_hand(p):
    pi_NTV = logp_of(p, rows, small, compute)[..., :5]
    kl_NT = jnp.sum(jnp.exp(pi_NTV) * (pi_NTV - p_NTV), axis=-1)
    return jnp.sum(jnp.where(mask_NT, kl_NT, 0.0))

  close(grads["policy"], jax.jit(jax.grad(by_hand))(student))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_change_nothing(chunk, student, teacher, small, compute):
  batch = batch_of(SAMPLES, teacher, small, compute, exact=True)
  params = {"policy": student, "teacher": distillation.head_of(teacher)}
  want = run_of(small, compute, True)(params, batch)
  got = run_of(small, compute, True, chunk)(params, batch)
  close(got, want)


@pytest.mark.parametrize("exact", [True, False])
def test_the_teacher_gets_no_gradient(exact, student, teacher, small, compute):
  batch = batch_of(SAMPLES, teacher, small, compute, exact=exact)
  name = "teacher_BTD" if exact else "teacher_BT"
  loss = distillation.make_loss(
    cfg=small, compute=compute, temperature=TEMPERATURE, exact=exact
  )

  def total(params, scores):
    return loss(params, batch | {name: scores}, KEY)[0].total

  params = {"policy": student, "teacher": distillation.head_of(teacher)}
  grads, by_scores = jax.jit(jax.grad(total, (0, 1)))(params, batch[name])
  assert not np.any(jax.tree.leaves(grads["teacher"])[0])
  assert not np.any(by_scores)
  assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads["policy"]["layers"]))


def test_the_expected_estimate_is_the_exact_loss(student, teacher, small, compute):
  """All completions of three tokens, each as often as the student says it: no noise.

  The estimate's mean gradient is that of the per-token KL with the states as given,
  summed over all states by their probability; its mean value, and that of the exact
  loss, is the KL of whole completions.
  """
  params = {"policy": student, "teacher": distillation.head_of(teacher)}
  rows = every(3)
  picked = np.asarray(rows)[..., None]
  pi_NT, p_NT = (
    np.take_along_axis(np.asarray(logp_of(p, rows, small, compute, f)), picked, -1)[
      ..., 0
    ].astype(float)
    for p, f in ((student, ()), (teacher, SPEC))
  )
  prob_N = np.exp(pi_NT.sum(axis=1))
  np.testing.assert_allclose(prob_N.sum(), 1, atol=1e-5)
  whole = float(prob_N @ (pi_NT - p_NT).sum(axis=1))
  assert whole > 0.3

  seen = [(*row, *[0] * (3 - t)) for t in range(3) for row in every(t)]
  length = [t for t in range(3) for _ in every(t)]
  reached_N = np.array(
    [
      prob_N[[row[:t] == state[:t] for row in rows]].sum()
      for state, t in zip(seen, length, strict=True)
    ]
  )
  at_N1V = np.array(length)[:, None, None]
  p_NTV = logp_of(teacher, seen, small, compute, SPEC)

  def states(p):
    """Of each state the probability that it comes to pass, times its KL."""
    pi_NTV = logp_of(p, seen, small, compute)
    pi_NV, p_NV = (
      jnp.take_along_axis(x, at_N1V, axis=1)[:, 0, :5] for x in (pi_NTV, p_NTV)
    )
    return jnp.sum(reached_N * jnp.sum(jnp.exp(pi_NV) * (pi_NV - p_NV), axis=-1))

  value, want = jax.jit(jax.value_and_grad(states))(student)
  np.testing.assert_allclose(value, whole, rtol=1e-4)
  for exact in (False, True):
    run, mean = run_of(small, compute, exact), 0.0
    sums = jax.tree.map(jnp.zeros_like, params)
    for row, prob in zip(rows, prob_N, strict=True):
      batch = batch_of([row], teacher, small, compute, exact=exact)
      found, _, grads = run(params, batch)
      sums = jax.tree.map(lambda s, g: s + prob * g, sums, grads)  # noqa: B023
      mean += prob * float(found.total)
    np.testing.assert_allclose(mean, whole, rtol=1e-4)
    close(sums["policy"], want)


# --- The stage ---

SMALL = dict(start="base", prompts=3, samples=2, max_new=24, teacher_rows=1, probed=4)
SMALL |= {"show_every": 1, "batch.rows": 2, "batch.micro": 4}
SMALL = {f"distill.{name}": value for name, value in SMALL.items()}


def distilled(folder, **changes) -> services.Services:
  """The stage run to its end in a folder."""
  run = opened(tiny(**SMALL | changes), folder, "distill")
  with jax.set_mesh(run.mesh):
    distill_stage.distill(run)
  return run


def left_by(run: services.Services) -> tuple:
  """What the stage made, but for clocks."""
  metrics = run.store.read_rows(run.store.workdir / "metrics.jsonl")
  timeless = [
    {n: x for n, x in row.items() if n not in ("time", "distill/step_s")}
    for row in metrics
  ]
  with jax.set_mesh(run.mesh):
    params = jax.tree.leaves(run.model.trained_params("distill"))
  rollouts = run.store.read_rows(run.store.path("distill", "rollouts.jsonl"))
  return [*map(np.asarray, params)], timeless, rollouts, run.store.manifest("distill")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return left_by(distilled(tmp_path_factory.mktemp("whole")))


def test_the_stage_leaves_what_it_learned_and_watched(whole):
  params, metrics, rollouts, manifest = whole
  assert [row["step"] for row in metrics] == [1, 2]
  for name in (
    *("reverse_kl_nats", "entropy_nats", "kl_nats", "length_tokens", "format"),
    *("loss", "grad_norm", "truncated", "declined", "distinct"),
  ):
    assert np.isfinite([row[f"distill/{name}"] for row in metrics]).all(), name
  assert metrics[0]["distill/loss"] == metrics[0]["distill/reverse_kl_nats"] > 0
  assert abs(metrics[0]["distill/kl_nats"]) < 1e-3 < abs(metrics[1]["distill/kl_nats"])
  assert {row["step"] for row in rollouts} == {1, 2} and len(rollouts) == 2 * 3 * 2
  summary = manifest["summary"]
  assert summary["steps"] == 2 and {"headroom_n", "headroom_unscored"} < {*summary}
  assert summary["headroom_n"] + summary["headroom_unscored"] == 4


def test_a_stage_that_was_cut_ends_as_one_that_was_not(whole, tmp_path, monkeypatch):
  build, built = distill_stage.build_batch, []

  def killed(*args):
    built.append(args)
    if len(built) == 2:
      raise KeyboardInterrupt
    return build(*args)

  with monkeypatch.context() as patch:
    patch.setattr(distill_stage, "build_batch", killed)
    with pytest.raises(KeyboardInterrupt):
      distilled(tmp_path)
  params, *rest = left_by(distilled(tmp_path))
  want, *others = whole
  for got, wanted in zip(params, want, strict=True):
    np.testing.assert_array_equal(got, wanted)
  assert rest[:2] == others[:2]
  assert rest[2]["summary"] == others[2]["summary"]


def test_adapters_and_the_estimate_are_trained_too(tmp_path):
  run = distilled(
    tmp_path, **{"lora.rank": 2, "distill.loss": "sampled", "distill.steps": 1}
  )
  with jax.set_mesh(run.mesh):
    trained, _ = adapters.split(run.model.trained_params("distill"))
  assert np.abs(trained["layers"]["q_lora_b"]).max() > 0
  assert all("lora" in name for name in trained["layers"]) and {*trained} == {"layers"}


def test_a_run_too_far_from_its_start_stops(tmp_path, monkeypatch):
  score = rollouts_of.with_scores

  def far(*args):
    return [dataclasses.replace(r, reference=r.reference - 1.0) for r in score(*args)]

  monkeypatch.setattr(rollouts_of, "with_scores", far)
  with pytest.raises(Halted, match="above config.distill.stop_kl=3"):
    distilled(tmp_path, **{"distill.stop_kl": 3.0, "distill.probed": 0})


def test_the_teacher_reads_the_policy_of_what_is_no_capability(tmp_path):
  run = opened(tiny(**SMALL | {"distill.capability": 1}), tmp_path, "distill")
  prompts = rollouts_of.prompt_schedule(run, run.cfg.distill)(0)
  assert {prompt.kind for prompt in prompts} == {"safety", "capability"}
  for prompt in prompts:
    alone = prompting.render_prompt(
      run.model.tok, prompting.plain(prompt), run.model.trained_think
    )
    told, alone = (
      run.model.tok.decode(tokens)
      for tokens in (distill_stage.teacher_prompt(run, prompt), alone)
    )
    clauses = [f"{c.id}:" for p in run.task.spec.policies for c in p.clauses]
    assert any(text in told for text in clauses) == (prompt.kind != "capability")
    assert told.endswith(alone[-20:]) and not any(text in alone for text in clauses)


def test_lines_too_short_for_the_teacher_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"teacher_length: wanted \d+ or more"):
    distilled(tmp_path, **{"distill.teacher_length": 256})


def test_the_headroom_of_a_distillation():
  def row(metric, score, declined):
    scores = dict.fromkeys(evals.TYPES) | {metric: score}
    return {"scores": scores, "declined": declined}

  refuses = row("refuse_disallowed", 1.0, True)
  answers = row("refuse_disallowed", 0.0, False)
  helps, declines = row("comply_allowed", 1.0, False), row("comply_allowed", 0.0, True)
  silent = row("comply_allowed", None, False)
  found = evals.decision_changes(
    [(answers, refuses), (answers, answers), (declines, helps), (helps, declines)]
    + [(silent, helps)]
  )
  assert found == {
    "n": 4,
    "unscored": 1,
    "otherwise": 0.75,
    "gained": 0.5,
    "lost": 0.25,
    "right_untold": 0.25,
    "right_told": 0.5,
  }
  same = evals.decision_changes([(refuses, refuses), (helps, helps)])
  assert distill_stage.headroom_line(same).endswith("there is nothing to be learned")


def test_a_stage_without_settings_is_refused_and_one_of_all_is_left_out():
  with pytest.raises(ValueError, match="config.distill: wanted its settings"):
    convert.changed(tiny(), {"distill": None, "stages": "sft,distill"})
  assert convert.changed(tiny(), {"distill": None}).distill is None
  assert convert.of_json(convert.to_json(tiny())) == tiny()
