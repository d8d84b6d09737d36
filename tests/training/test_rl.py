"""Advantages, the policy gradient, and the reward model, against plain loops."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalign.config.convert import build
from dalign.config.on_policy import ObjectiveConfig
from dalign.models import param_tree
from dalign.models import transformer
from dalign.text import packing
from dalign.training import advantages
from dalign.training import policy_gradient
from dalign.training import reward
from dalign.training import rollout
from dalign.types import Prompt
from dalign.types import Verdict
from tests.helpers import assert_close
from tests.helpers import config_file
from tests.helpers import prompt
from tests.helpers import with_gradients

KEY = jax.random.key(0)


ALGORITHMS = config_file("algorithms")


@functools.cache
def forward_of(cfg, compute):
  return jax.jit(functools.partial(transformer.forward, cfg=cfg, compute=compute))


# --- Advantages ---


def groups(seed=0):
  """Rewards of 6 groups of 5, and which of them were scored: all, some, one, none."""
  rng = np.random.default_rng(seed)
  reward_BR = rng.random((6, 5)).astype(np.float32)
  scored_BR = np.ones((6, 5), bool)
  scored_BR[1, [0, 3]] = False
  scored_BR[2] = [False, False, True, False, False]
  scored_BR[3] = False
  reward_BR[4] = 0.25
  return reward_BR, scored_BR


def test_rloo_is_dr_grpo_times_a_constant():
  reward_BR, scored_BR = groups(1)
  rloo = advantages.rloo(reward_BR, scored_BR)
  dr_grpo = advantages.dr_grpo(reward_BR, scored_BR)
  G = np.maximum(scored_BR.sum(axis=1, keepdims=True), 2)
  np.testing.assert_allclose(rloo, dr_grpo * G / (G - 1), atol=1e-6)
  assert np.abs(rloo).max() > 0.1


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
def test_advantages_leave_out_what_was_not_scored(name):
  estimate = advantages.ESTIMATORS[name]
  reward_BR, scored_BR = groups()
  want = estimate(reward_BR, scored_BR)
  for odd in (1e6, np.nan):
    got = estimate(np.where(scored_BR, reward_BR, odd), scored_BR)
    np.testing.assert_array_equal(got, want)
  assert (np.asarray(want)[~scored_BR] == 0).all()
  few = estimate(reward_BR[1:2, [1, 2, 4]], np.ones((1, 3), bool))
  np.testing.assert_allclose(want[1, [1, 2, 4]], few[0], atol=1e-5)
  if name != "none":  # what is alone, unscored or all equal has nothing to learn from
    np.testing.assert_array_equal(want[2:5], 0)
    np.testing.assert_allclose(np.sum(want, axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "rloo", "dr_grpo", "grpo"])
def test_advantages_are_their_formulas(kind):
  reward_BR, scored_BR = groups()
  got = np.asarray(advantages.ESTIMATORS[kind](reward_BR, scored_BR))
  for b, (reward_R, scored_R) in enumerate(zip(reward_BR, scored_BR, strict=True)):
    known = reward_R[scored_R].astype(float)
    for r in range(5):
      want = 0.0
      if scored_R[r] and kind == "none":
        want = reward_R[r]
      elif scored_R[r] and len(known) > 1:
        others = (known.sum() - reward_R[r]) / (len(known) - 1)
        want = {
          "rloo": reward_R[r] - others,
          "dr_grpo": reward_R[r] - known.mean(),
          "grpo": (reward_R[r] - known.mean()) / (known.std() + advantages.EPSILON),
        }[kind]
      np.testing.assert_allclose(got[b, r], want, atol=1e-5)


def tokens(seed=0):
  """Of six rollouts of 1 to 5 tokens: KL and values a token, their mask, rewards."""
  rng = np.random.default_rng(seed)
  mask_NT = np.arange(5)[None] < np.array([5, 1, 3, 2, 5, 4])[:, None]
  kl_NT, value_NT = rng.normal(size=(2, 6, 5))
  return np.where(mask_NT, kl_NT, 9.0), np.where(mask_NT, value_NT, 9.0), mask_NT, rng


def objective(name: str, **more) -> ObjectiveConfig:
  return build(ObjectiveConfig, ALGORITHMS.of(name, **more))


@pytest.mark.parametrize("baseline", [False, True])
def test_rewards_to_go_hold_the_kl_of_what_follows(baseline):
  kl_NT, _, mask_NT, rng = tokens()
  reward_BR, scored_BR = rng.random((2, 3)), np.ones((2, 3), bool)
  scored_BR[1, 1] = False
  name = "reinforce_pp_baseline" if baseline else "reinforce_pp"
  how = objective(name, whiten=False, kl_weight=0.3)
  got, _ = advantages.token_advantages(how, reward_BR, scored_BR, kl_NT, mask_NT)
  for i in range(6):
    group, r = divmod(i, 3)
    last = mask_NT[i].sum() - 1
    final = reward_BR[group, r]
    if baseline:
      final -= reward_BR[group][scored_BR[group]].mean()
    for t in range(5):
      want = 0.0
      if mask_NT[i, t] and scored_BR[group, r]:
        want = final - 0.3 * sum(kl_NT[i, s] for s in range(t, last + 1))
      np.testing.assert_allclose(got[i, t], want, atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_gae_is_the_weighted_sum_of_temporal_differences(lam):
  kl_NT, value_NT, mask_NT, rng = tokens()
  reward_BR, scored_BR = rng.random((2, 3)), np.ones((2, 3), bool)
  how = objective("ppo", whiten=False, kl_weight=0.3, gae_lambda=lam)
  got, returns = advantages.token_advantages(
    how, reward_BR, scored_BR, kl_NT, mask_NT, value_NT
  )
  for i in range(6):
    n = mask_NT[i].sum()
    r = [-0.3 * kl_NT[i, t] for t in range(n)]
    r[-1] += reward_BR.flat[i]
    v = [*value_NT[i, :n], 0.0]
    delta = [r[t] + v[t + 1] - v[t] for t in range(n)]
    for t in range(n):
      want = sum(lam ** (s - t) * delta[s] for s in range(t, n))
      np.testing.assert_allclose(got[i, t], want, atol=1e-5)
      np.testing.assert_allclose(returns[i, t], want + v[t], atol=1e-5)
    assert (got[i, n:] == 0).all() and (returns[i, n:] == 0).all()
    if lam == 1:
      np.testing.assert_allclose(returns[i, 0], sum(r), atol=1e-5)


def test_kl_in_the_reward_counts_a_rollout_once_and_before_its_baseline():
  kl_NT, _, mask_NT, rng = tokens()
  reward_BR, scored_BR = rng.random((2, 3)), np.ones((2, 3), bool)
  got, _ = advantages.token_advantages(
    objective("rloo", kl_weight=0.3), reward_BR, scored_BR, kl_NT, mask_NT
  )
  total = reward_BR - 0.3 * np.where(mask_NT, kl_NT, 0).sum(axis=1).reshape(2, 3)
  want = np.asarray(advantages.rloo(total, scored_BR)).ravel()
  np.testing.assert_allclose(got, np.where(mask_NT, want[:, None], 0.0), atol=1e-5)
  none, _ = advantages.token_advantages(
    objective("grpo", kl_weight=0.3), reward_BR, scored_BR, kl_NT, mask_NT
  )
  plain = np.asarray(advantages.grpo(reward_BR, scored_BR)).ravel()
  np.testing.assert_allclose(none, np.where(mask_NT, plain[:, None], 0.0), atol=1e-5)


def test_whitening_counts_the_tokens_of_the_mask_alone():
  kl_NT, _, mask_NT, _ = tokens()
  got = advantages.whiten(kl_NT, mask_NT)
  np.testing.assert_allclose(got[mask_NT].mean(), 0, atol=1e-6)
  np.testing.assert_allclose(got[mask_NT].std(), 1, atol=1e-4)
  assert (got[~mask_NT] == 0).all()
  assert (advantages.whiten(kl_NT, np.zeros_like(mask_NT)) == 0).all()


def test_a_long_answer_is_penalised_over_a_margin():
  got = advantages.overlong_penalty([1, 80, 90, 100, 120], max_length=100, margin=20)
  np.testing.assert_allclose(got, [0, 0, -0.5, -1, -1])
  assert (advantages.overlong_penalty([1, 200], max_length=100, margin=0) == 0).all()


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(kl="k1"), "k1 has no gradient in expectation"),
    (dict(kl="none", kl_weight=0.1), "kl_weight: wanted 0 where kl is none"),
    (dict(ratio="sequence", advantages="gae"), "ratio: wanted token"),
    (dict(advantages="vtrace"), "advantages: wanted one of none, rloo"),
    (dict(mean="words"), "mean: wanted one of tokens, rollouts, constant"),
    (dict(clip_low=2.0), "clip_low: wanted more than 0, at most 1"),
    (dict(overlong=-1), "overlong: wanted 0 or more"),
  ],
)
def test_objectives_that_make_no_sense_are_refused(change, words):
  with pytest.raises(ValueError, match=words):
    objective("rloo", **change)


def test_an_unknown_algorithm_is_named_with_those_there_are():
  with pytest.raises(KeyError, match="no algorithm 'grpo2'; there are: reinforce, "):
    ALGORITHMS.of("grpo2")


# --- The KL penalty ---


@pytest.mark.parametrize(
  ("kind", "other_way"), [("k2", False), ("k3", True), ("k3_as_k2", False)]
)
def test_penalties_have_the_gradient_of_a_kl(kind, other_way):
  """Every token of a vocabulary of 7, as often as its probability: no noise."""
  rng = np.random.default_rng(0)
  logits_V, ref_V = rng.normal(size=(2, 7)).astype(np.float32)
  ref_V = jax.nn.log_softmax(ref_V)

  def sampled(logits_V):
    logp_V = jax.nn.log_softmax(logits_V)
    prob_V = jax.lax.stop_gradient(jnp.exp(logp_V))
    return jnp.sum(prob_V * policy_gradient.kl_penalty(kind, logp_V, ref_V))

  def exact(logits_V):
    logp_V = jax.nn.log_softmax(logits_V)
    if other_way:
      return jnp.sum(jnp.exp(ref_V) * (ref_V - logp_V))
    return jnp.sum(jnp.exp(logp_V) * (logp_V - ref_V))

  np.testing.assert_allclose(
    jax.grad(sampled)(logits_V), jax.grad(exact)(logits_V), atol=1e-5
  )
  if kind != "k2":  # its value is that of the KL too
    logp_V = jax.nn.log_softmax(logits_V)
    want = jnp.sum(jnp.exp(logp_V) * (logp_V - ref_V))
    np.testing.assert_allclose(sampled(logits_V), want, atol=1e-5)


# --- The policy gradient ---


def rollouts(seed=0, count=8):
  """(tokens, sampled, {advantage, behaviour shift}) of rollouts, two of a prompt."""
  rng = np.random.default_rng(seed)
  rows = []
  for i in range(count):
    if i % 2 == 0:
      prompt = rng.integers(1, 6)
      front = rng.integers(0, 97, prompt).tolist()
    new = rng.integers(1, 9)
    tokens = front + rng.integers(0, 97, new).tolist()
    numbers = {"advantage": rng.normal(), "shift": rng.normal() * 0.3}
    rows.append((tokens, [0.0] * prompt + [1.0] * new, numbers))
  return rows


@pytest.fixture(scope="module")
def score(cfg, compute):
  """`score(params, packed, temperature)`: the trainer's log-probabilities."""

  @functools.partial(jax.jit, static_argnums=2)
  def run(params, batch, temperature):
    scorer = policy_gradient.make_score(
      cfg=cfg, compute=compute, temperature=temperature
    )
    return scorer(params, batch)

  return lambda params, packed, temperature: np.asarray(
    run(params, tokens_of(packed), temperature)
  )


def tokens_of(packed: packing.Packed):
  return packed.lines | {"wanted_BT": packed.weight_BT > 0}


def rl_batch(packed: packing.Packed, logp_BT, rows, *, shift=False):
  """What `policy_gradient.make_loss` takes of rollouts; `shift` moves the behaviour
  away from the policy. Their reference and returns are some numbers of each."""
  spread = {"advantage": [], "shift": [], "reference": [], "returns": []}
  for tokens, sampled, numbers in rows:
    rng = np.random.default_rng(len(tokens))
    n = int(sum(sampled))
    for name in ("advantage", "shift"):
      spread[name].append(np.full(n, numbers[name]))
    spread["reference"].append(numbers["shift"] + rng.normal(size=n) - 4.0)
    spread["returns"].append(rng.normal(size=n))
  arrays = rollout.scatter_to_packed(packed.tokens_BT.shape, packed.where, **spread)
  shift_BT = arrays.pop("shift_BT")
  more = {"sampled_BT": packed.weight_BT > 0}
  more["behaviour_BT"] = logp_BT + (shift_BT if shift else 0.0)
  more["left_out_B"] = np.zeros(len(logp_BT), np.float32)
  return tokens_of(packed) | arrays | more


RLOO = dict(ratio_cap=1.2, length_norm=8.0)


def run_of(how: ObjectiveConfig, cfg, compute):
  """`run(params, batch) -> (mean, metrics, gradients)` at temperature 0.8."""
  return with_gradients(
    policy_gradient.make_loss(cfg=cfg, compute=compute, temperature=0.8, objective=how)
  )


@pytest.fixture(scope="module")
def loss_and_gradient(params, cfg, compute):
  """Of RLOO, ratios up to 1.2 and length 8: (mean, metrics, gradients) of a batch."""
  return functools.partial(run_of(objective("rloo", **RLOO), cfg, compute), params)


def test_scores_are_log_probabilities_of_what_is_wanted_of_a_row_alone(
  score, params, cfg, compute
):
  rows = rollouts()
  packed = packing.pack(rows, length=32, rows_multiple=8)
  got = score(params, packed, 0.8)
  alone = packing.pad_rows(rows, length=32)
  hidden_BTD, _ = forward_of(cfg, compute)(
    params, alone.tokens_BT, alone.positions_BT, alone.ends_BT
  )
  logits_BTV = np.asarray(hidden_BTD @ transformer.head(params)).astype(float) / 0.8
  logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
  sizes = [size for _, _, size in packed.where]
  assert any(n < len(row[0]) for n, row in zip(sizes, rows, strict=True))
  for i, (b, start, size) in enumerate(packed.where):
    shared = len(rows[i][0]) - size
    for t in range(shared + 1, shared + size):
      want = logp_BTV[i, t - 1, rows[i][0][t]] if rows[i][1][t] else 0.0
      np.testing.assert_allclose(got[b, start + t - shared], want, atol=1e-5)
  assert (got[:, 0] == 0).all()


def plain_loss(how: ObjectiveConfig, batch, logp_BT, value_BT):
  """(total, count): a rollout at a time, a token at a time."""
  surrogates = []  # of each rollout, of each token
  for b in range(len(logp_BT)):
    for i in range(batch["rollout_BT"][b].max() + 1):
      at = np.flatnonzero(batch["rollout_BT"][b] == i)
      log_ratio = (logp_BT[b, at] - batch["behaviour_BT"][b, at]).astype(float)
      if how.ratio == "sequence":
        log_ratio = np.full(len(at), log_ratio.mean())
      surrogate = []
      for t, rho in zip(at, np.minimum(np.exp(log_ratio), how.ratio_cap), strict=True):
        A = batch["advantage_BT"][b, t]
        clipped = min(max(rho, 1 - how.clip_low), 1 + how.clip_high)
        one = min(rho * A, clipped * A)
        if how.penalised:
          d = batch["reference_BT"][b, t] - logp_BT[b, t]
          k = d * d / 2 if how.kl == "k2" else np.exp(d) - d - 1
          one -= how.kl_weight * k
        if how.learns_values:
          error = value_BT[b, t] - batch["returns_BT"][b, t]
          one -= how.value_weight * error**2 / 2
        surrogate.append(one)
      surrogates.append(surrogate)
  if how.mean == "rollouts":
    return -sum(np.mean(g) for g in surrogates), len(surrogates)
  total = -sum(sum(g) for g in surrogates)
  tokens = sum(map(len, surrogates))
  return total, tokens if how.mean == "tokens" else len(surrogates) * how.length_norm


@pytest.mark.parametrize("packs", [packing.pad_rows, packing.pack])
@pytest.mark.parametrize("name", [*ALGORITHMS.CHANGES])
def test_each_loss_is_its_formula(name, packs, score, params, cfg, compute):
  """Ratios off 1, padded rows and trees of two samples of a prompt."""
  wider = dict(clip_low=0.2, clip_high=0.3) if name == "gspo" else {}
  how, rows = objective(name, ratio_cap=1.3, **wider), rollouts()
  packed = packs(rows, length=32)
  logp_BT = score(params, packed, 0.8)
  batch = rl_batch(packed, logp_BT, rows, shift=True)
  tree, value_BT = params, None
  if how.learns_values:
    head = policy_gradient.init_value_head(params)
    head = jax.tree.map(lambda x: x + jnp.linspace(-3.0, 5.0, len(x)), head)
    tree = {"policy": params, "value": head}
    values = policy_gradient.make_values(cfg=cfg, compute=compute)
    value_BT = np.asarray(jax.jit(values)(tree, tokens_of(packed)))
    assert np.abs(value_BT).max() > 0.1
  mean, metrics, _ = run_of(how, cfg, compute)(tree, batch)
  total, count = plain_loss(how, batch, logp_BT, value_BT)
  np.testing.assert_allclose(mean.total, total, rtol=1e-4)
  np.testing.assert_allclose(mean.count, count, rtol=1e-6)
  if how.clip_low < 1:
    assert 0 < metrics["clipped"].value() < 1


def by_hand(**changes):
  """`loss` of PPO's ratios, and its gradient, on a row of two rollouts of two tokens,
  with what is not sampled NaN in the batch. Ratios are 2, 1/2, 2 and 1."""
  how = objective("grpo", kl="none", kl_weight=0.0, **changes)
  odd, logp_BT = np.nan, jnp.log(jnp.array([[1.0, 0.4, 0.2, 1.0, 0.4, 0.5]]))
  batch = {
    "behaviour_BT": np.log([[odd, 0.2, 0.4, odd, 0.2, 0.5]]),
    "advantage_BT": np.array([[odd, 3.0, 3.0, odd, -1.0, -1.0]]),
    "sampled_BT": np.array([[False, True, True, False, True, True]]),
    "rollout_BT": np.array([[-1, 0, 0, -1, 1, 1]]),
  }

  def total(logp_BT):
    mean, metrics = policy_gradient.loss(
      logp_BT, jnp.ones((1, 6)), **batch, objective=how, left_out=3.0
    )
    return mean.total, (mean, metrics)

  grad_BT, (mean, metrics) = jax.grad(total, has_aux=True)(logp_BT)
  return mean, metrics, grad_BT[0]


@pytest.mark.parametrize(
  ("changes", "total", "count", "grad_T"),
  [
    # min(2 * 3, 1.2 * 3), min(3 / 2, 0.8 * 3), min(-2, -1.2), -1: clipped where gains
    # have been taken, not where a step back is.
    (dict(mean="tokens"), -(3.6 + 1.5 - 2 - 1), 4, [0, 0, -1.5, 0, 2, 1]),
    (dict(mean="rollouts"), -(3.6 + 1.5) / 2 + 1.5, 2, [0, 0, -0.75, 0, 1, 0.5]),
    (
      dict(mean="constant", length_norm=10.0),
      -(3.6 + 1.5 - 2 - 1),
      (2 + 3) * 10,
      [0, 0, -1.5, 0, 2, 1],
    ),
    (
      dict(mean="tokens", ratio_cap=1.1),
      -(3.3 + 1.5 - 1.1 - 1),
      4,
      [0, 0, -1.5, 0, 0, 1],
    ),
    # Geometric means of the two rollouts: 1 and sqrt(2).
    (
      dict(mean="tokens", ratio="sequence"),
      -(3 + 3 - 2 * 2**0.5),
      4,
      [0, -3, -3, 0, 2**0.5, 2**0.5],
    ),
  ],
)
def test_the_loss_of_arrays_is_what_it_is_by_hand(changes, total, count, grad_T):
  mean, metrics, got_T = by_hand(**changes)
  np.testing.assert_allclose(mean.total, total, rtol=1e-5)
  np.testing.assert_allclose(mean.count, count, rtol=1e-6)
  np.testing.assert_allclose(got_T, grad_T, atol=1e-5)
  assert metrics["entropy_nats"].value() == 1


def test_the_policy_loss_keeps_its_metrics(score, loss_and_gradient, params):
  rows = rollouts()
  packed = packing.pad_rows(rows, length=32)
  logp_BT = score(params, packed, 0.8)
  batch = rl_batch(packed, logp_BT, rows, shift=True)
  _, metrics, _ = loss_and_gradient(batch)
  log_ratio = (logp_BT - batch["behaviour_BT"])[batch["sampled_BT"]]
  ratios = np.minimum(np.exp(log_ratio), 1.2)
  assert ratios.max() == np.float32(1.2) and ratios.min() < 0.9
  np.testing.assert_allclose(metrics["ratio"].value(), ratios.mean(), rtol=1e-4)
  gaps = metrics["logp_gap_nats"].value()
  np.testing.assert_allclose(gaps, np.abs(log_ratio).mean(), rtol=1e-3)


@pytest.mark.parametrize(
  ("name", "counted"), [("rloo", 8.0 * 3), ("grpo", 0.0), ("dapo", 0.0)]
)
def test_rollouts_left_out_count_where_a_constant_divides(
  name, counted, score, params, cfg, compute
):
  """Else a step of which half has no gradient would take twice the step."""
  how = objective(name, length_norm=8.0, kl="none", kl_weight=0.0)
  assert (how.mean == "constant") == bool(counted)
  rows = rollouts()
  packed = packing.pad_rows(rows, length=32)
  batch = rl_batch(packed, score(params, packed, 0.8), rows)
  run = run_of(how, cfg, compute)
  whole, _, grads = run(params, batch)
  # A new array: a step that is still on its way may read the old one.
  left_out_B = batch["left_out_B"].copy()
  left_out_B[[0, 5]] = 1.0, 2.0
  batch = batch | {"left_out_B": left_out_B}
  some, _, same = run(params, batch)
  np.testing.assert_allclose(some.total, whole.total, rtol=1e-6)
  np.testing.assert_allclose(some.count, whole.count + counted, rtol=1e-6)
  assert_close(same, grads, atol=1e-7, rtol=1e-4)  # sums of two calls


def even(rows):
  """The rollouts with as many sampled tokens each, which only repeat their first."""
  return [
    ([*tokens[: -int(sum(sampled))], *[tokens[-1]] * 4], front + [1.0] * 4, numbers)
    for tokens, sampled, numbers in rows
    for front in [[0.0] * (len(tokens) - int(sum(sampled)))]
  ]


def test_dapo_is_grpo_without_kl_where_lengths_are_equal(score, params, cfg, compute):
  rows = even(rollouts())
  packed = packing.pad_rows(rows, length=32)
  batch = rl_batch(packed, score(params, packed, 0.8), rows, shift=True)
  found = []
  for name in ("dapo", "grpo"):
    how = objective(name, kl="none", kl_weight=0.0, clip_high=0.28)
    mean, _, grads = run_of(how, cfg, compute)(params, batch)
    found.append(jax.tree.map(lambda g: g / mean.count, grads))  # noqa: B023
  assert_close(found[0], found[1], atol=1e-6)


def test_on_policy_gspo_has_the_gradient_of_grpo(score, params, cfg, compute):
  rows = rollouts()
  packed = packing.pad_rows(rows, length=32)
  batch = rl_batch(packed, score(params, packed, 0.8), rows)
  grpo = objective("grpo", kl="none", kl_weight=0.0)
  want = run_of(grpo, cfg, compute)(params, batch)
  got = run_of(objective("gspo"), cfg, compute)(params, batch)
  assert_close(got[2], want[2])


def test_on_policy_the_gradient_is_that_of_log_pi(
  score, loss_and_gradient, params, cfg, compute
):
  rows = rollouts()
  packed = packing.pad_rows(rows, length=32)
  batch = rl_batch(packed, score(params, packed, 0.8), rows)
  _, metrics, got = loss_and_gradient(batch)
  np.testing.assert_allclose(metrics["ratio"].value(), 1, atol=1e-5)
  weight_BT = np.where(batch["sampled_BT"], batch["advantage_BT"], 0.0)

  def reinforce(p):
    hidden_BTD, _ = forward_of(cfg, compute)(
      p, packed.tokens_BT, packed.positions_BT, packed.ends_BT
    )
    logp_BTV = jax.nn.log_softmax(hidden_BTD[:, :-1] @ transformer.head(p) / 0.8)
    at = jnp.asarray(packed.tokens_BT[:, 1:, None])
    logp_BT = jnp.take_along_axis(logp_BTV, at, axis=-1)[..., 0]
    return -jnp.sum(logp_BT * weight_BT[:, 1:])

  want = jax.jit(jax.grad(reinforce))(params)
  assert_close(got, want)


def test_packing_and_order_change_no_policy_gradient(score, loss_and_gradient, params):
  straight, runs = rollouts(), []
  turned = straight[::-1]
  for packed, rows in (
    (packing.pad_rows(straight, length=32), straight),
    (packing.pad_rows(turned, length=32), turned),
    (packing.pack(straight, length=32, rows_multiple=8), straight),
  ):
    batch = rl_batch(packed, score(params, packed, 0.8), rows, shift=True)
    runs.append(loss_and_gradient(batch))
  assert_close(runs[1], runs[0])
  assert_close(runs[2], runs[0])
  assert (packed.ends_BT == 0).all(axis=1).any()  # lines of padding alone


def test_what_was_not_sampled_may_hold_anything(score, loss_and_gradient, params):
  rows = rollouts()
  packed = packing.pad_rows(rows, length=32)
  batch = rl_batch(packed, score(params, packed, 0.8), rows)
  want = loss_and_gradient(batch)
  for name in ("behaviour_BT", "advantage_BT", "reference_BT", "returns_BT"):
    batch[name] = np.where(batch["sampled_BT"], batch[name], np.nan)
  got = loss_and_gradient(batch)
  assert_close(got, want, atol=0, rtol=0)


def test_equal_rewards_give_no_policy_gradient(score, loss_and_gradient, params):
  rows = rollouts()
  advantage_R = advantages.rloo(np.full((1, 8), 0.7, np.float32), np.ones((1, 8), bool))
  rows = [
    (tokens, sampled, numbers | {"advantage": float(a)})
    for (tokens, sampled, numbers), a in zip(rows, advantage_R[0], strict=True)
  ]
  packed = packing.pad_rows(rows, length=32)
  _, _, grads = loss_and_gradient(rl_batch(packed, score(params, packed, 0.8), rows))
  assert all(np.abs(g).max() < 1e-6 for g in jax.tree.leaves(grads))


def test_the_expected_gradient_is_the_exact_one(
  loss_and_gradient, score, params, cfg, compute
):
  """All one-token answers to a prompt, each as often as its probability.

  The gradient of the expected reward J = sum_a pi(a) r(a) is that of the loss over
  every token a, when its advantage is r(a) pi(a): no draw and no noise. A constant
  baseline changes no expectation.
  """
  prompt = [3, 1, 4, 1]
  reward_V = np.random.default_rng(0).normal(size=cfg.vocab).astype(np.float32)

  def expected(p):
    line = packing.pad_rows([(prompt, [0.0] * 4)], length=4)
    hidden_BTD, _ = forward_of(cfg, compute)(
      p, line.tokens_BT, line.positions_BT, line.ends_BT
    )
    return -jax.nn.softmax(hidden_BTD[0, -1] @ transformer.head(p) / 0.8) @ reward_V

  want = jax.jit(jax.grad(expected))(params)
  for baseline in (0.0, 0.3):
    total, mass = jax.tree.map(jnp.zeros_like, params), 0.0
    for start in range(0, cfg.vocab, 48):  # 48 rows of 5 fill 8 lines of 32
      tokens = range(start, min(start + 48, cfg.vocab))
      numbers = [
        {"advantage": float(reward_V[a]) - baseline, "shift": 0.0} for a in tokens
      ]
      rows = [
        (prompt + [a], [0.0] * 4 + [1.0], more)
        for a, more in zip(tokens, numbers, strict=True)
      ]
      packed = packing.pack(rows, length=32, rows_multiple=8)
      batch = rl_batch(packed, score(params, packed, 0.8), rows)
      prob_BT = np.where(batch["sampled_BT"], np.exp(batch["behaviour_BT"]), 0.0)
      mass += prob_BT.sum()
      batch["advantage_BT"] = batch["advantage_BT"] * prob_BT
      total = jax.tree.map(jnp.add, total, loss_and_gradient(batch)[2])
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert_close(total, want)


@pytest.mark.parametrize("name", [*ALGORITHMS.CHANGES])
def test_each_algorithm_learns(name, params, score, cfg, compute):
  """Two tokens are drawn after a prompt; each below 30 of 97 is worth a half."""
  more = dict(length_norm=2.0, mask_truncated=False)
  if name == "gspo":  # its own are for updates of many thousand tokens
    more |= dict(clip_low=0.2, clip_high=0.2)
  how = objective(name, **more)
  tx = optax.adam(1e-2)
  tree = {"policy": params, "value": policy_gradient.init_value_head(params)}
  tree = tree if how.learns_values else params
  opt, run = tx.init(tree), run_of(how, cfg, compute)
  values = jax.jit(policy_gradient.make_values(cfg=cfg, compute=compute))
  rng, prompt, N = np.random.default_rng(0), [3, 1, 4, 1], 32

  @jax.jit
  def logits(p, tokens_BT):
    hidden_BTD, _ = transformer.forward_rows(p, tokens_BT, cfg=cfg, compute=compute)
    return hidden_BTD @ transformer.head(p) / 0.8

  def collect_rollouts(policy):
    rows = np.tile(np.array(prompt + [0, 0], np.int32), (N, 1))
    for t in (4, 5):
      noise = rng.gumbel(size=(N, cfg.vocab))
      rows[:, t] = np.argmax(np.asarray(logits(policy, rows))[:, t - 1] + noise, axis=1)
    return rows, (rows[:, 4:] < 30).mean(axis=1)

  rewards = []
  for _ in range(30):
    policy = tree["policy"] if how.learns_values else tree
    rows_NT, reward_N = collect_rollouts(policy)
    rewards.append(reward_N.mean())
    rows = [(row.tolist(), [0.0] * 4 + [1.0] * 2) for row in rows_NT]
    packed = packing.pad_rows(rows, length=6)
    logp_BT = score(policy, packed, 0.8)
    first_BT = score(params, packed, 0.8)
    value_NT = None
    if how.learns_values:
      value_NT = np.asarray(values(tree, tokens_of(packed)))[:, 4:]
    kl_NT = (logp_BT - first_BT)[:, 4:]
    shape = N // 8, 8
    advantage_NT, returns_NT = advantages.token_advantages(
      how,
      reward_N.reshape(shape),
      np.ones(shape, bool),
      kl_NT,
      np.ones((N, 2), bool),
      value_NT,
    )
    batch = tokens_of(packed) | {
      "sampled_BT": packed.weight_BT > 0,
      "behaviour_BT": logp_BT,
    }
    batch["left_out_B"] = np.zeros(N, np.float32)
    batch |= rollout.scatter_to_packed(
      logp_BT.shape,
      packed.where,
      advantage=advantage_NT,
      reference=first_BT[:, 4:],
      returns=returns_NT,
    )
    mean, metrics, grads = run(tree, batch)
    grads = jax.tree.map(lambda g: g / mean.count, grads)  # noqa: B023
    updates, opt = tx.update(grads, opt)
    tree = optax.apply_updates(tree, updates)
  assert rewards[0] < 0.5
  assert np.mean(rewards[-3:]) > 0.8, rewards


# --- The reward model ---

SPEC = [31, 41, 59, 26, 53]


def reward_batch(rows, *, room=8, spec_room=8, filler=0, lines=None):
  """Rows of (tokens, score, prompt, answer) behind one shared prefix."""
  lines = len(rows) if lines is None else lines
  tokens_BT = np.full((lines, room), filler, np.int32)
  prefix_P = np.full(spec_room, filler, np.int32)
  prefix_P[: len(SPEC)] = SPEC
  for b, (tokens, *_) in enumerate(rows):
    tokens_BT[b, : len(tokens)] = tokens
  numbers = np.zeros((4, lines))
  numbers[:, : len(rows)] = np.transpose([(len(t), *rest) for t, *rest in rows])
  return {
    "prefix_P": prefix_P,
    "prefix_len": np.int32(len(SPEC)),
    "tokens_BT": tokens_BT,
    "length_B": numbers[0].astype(np.int32),
    "score_B": numbers[1].astype(np.float32),
    "prompt_B": numbers[2].astype(np.int32),
    "answer_B": numbers[3].astype(np.int32),
  }


@pytest.fixture(scope="module")
def reward_params(params):
  return reward.init_head(params, jax.random.key(4))


@pytest.fixture(scope="module")
def rows():
  """(tokens, judged score, prompt, answer): three prompts of 3, 2 and 1 answers, of
  which the first two have one answer in common, and all three another."""
  rng = np.random.default_rng(2)
  marks = [(0.9, 0, 0), (0.1, 0, 1), (0.5, 0, 2), (0.0, 1, 0), (1.0, 1, 1), (0.4, 2, 1)]
  return [(rng.integers(0, 97, rng.integers(1, 9)).tolist(), *some) for some in marks]


@pytest.fixture(scope="module")
def judge(cfg, compute, reward_params):
  jitted = jax.jit(functools.partial(reward.logits, cfg=cfg, compute=compute))
  return lambda batch: np.asarray(jitted(reward_params, batch))


def test_the_score_is_read_at_the_last_token(judge, rows, reward_params, cfg, compute):
  got = judge(reward_batch(rows))
  for i, (tokens, *_) in enumerate(rows):
    line = packing.pad_rows([(SPEC + tokens, [1.0] * (5 + len(tokens)))], length=32)
    hidden_BTD, _ = forward_of(cfg, compute)(
      reward_params["trunk"], line.tokens_BT, line.positions_BT, line.ends_BT
    )
    last_D = np.asarray(hidden_BTD[0, 4 + len(tokens)], float)
    head = reward_params["score"]
    want = last_D @ np.asarray(head["weight"]) * cfg.width**-0.5 + head["bias"][0]
    np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_padding_and_neighbours_change_no_score(judge, rows):
  want = judge(reward_batch(rows))
  assert np.std(want) > 1e-3
  wide = reward_batch(rows, room=13, spec_room=11, filler=44)
  np.testing.assert_allclose(judge(wide), want, atol=1e-6)
  order = [4, 0, 5, 2, 1, 3]
  turned = judge(reward_batch([rows[i] for i in order]))
  np.testing.assert_allclose(turned, want[order], atol=1e-6)
  few = judge(reward_batch(rows[:2], lines=6))
  np.testing.assert_allclose(few[:2], want[:2], atol=1e-6)
  assert np.isfinite(few).all()  # rows of padding alone


@pytest.fixture(scope="module")
def reward_loss(cfg, compute, reward_params):
  run = with_gradients(
    reward.make_loss(cfg=cfg, compute=compute, pair_weight=0.5, answer_weight=0.25)
  )
  return lambda batch, params=reward_params: run(params, batch)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_the_reward_loss_is_points_and_pairs(judge, reward_loss, rows):
  batch = reward_batch(rows, lines=8)
  mean, metrics, _ = reward_loss(batch)
  logit = judge(batch).astype(float)
  points, pairs, right, answers, told = [], [], [], [], []
  for i, (_, s, p, a) in enumerate(rows):
    q = sigmoid(logit[i])
    points.append(-(s * np.log(q) + (1 - s) * np.log(1 - q)))
    for j, (_, s_j, p_j, a_j) in enumerate(rows):
      if p == p_j and s > s_j:
        pairs.append(-np.log(sigmoid(logit[i] - logit[j])) * (s - s_j))
        right.append(logit[i] > logit[j])
      if p != p_j and a == a_j and s > s_j:
        answers.append(-np.log(sigmoid(logit[i] - logit[j])) * (s - s_j))
        told.append(logit[i] > logit[j])
  assert (len(pairs), len(answers)) == (4, 4)
  for name, want in (
    ("point_nats", points),
    ("pair_nats", pairs),
    ("pair_accuracy", right),
    ("answer_pair_nats", answers),
    ("answer_pair_accuracy", told),
    (
      "absolute_error",
      [abs(sigmoid(x) - r[1]) for x, r in zip(logit, rows, strict=False)],
    ),
  ):
    assert metrics[name].count == len(want), name
    np.testing.assert_allclose(metrics[name].value(), np.mean(want), atol=1e-5)
  more = 0.5 * np.sum(pairs) + 0.25 * np.sum(answers)
  want = np.mean(points) + more / len(points)
  np.testing.assert_allclose(mean.value(), want, rtol=1e-5)


def test_padding_and_order_change_no_reward_gradient(reward_loss, rows):
  want = reward_loss(reward_batch(rows, lines=8))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(want[2]))
  turned = reward_loss(reward_batch(rows[::-1], lines=8))
  assert_close(turned, want)
  odd = reward_batch(rows, lines=8)
  odd["tokens_BT"][6:] = 50
  odd["score_B"][6:] = 0.7
  assert_close(reward_loss(odd), want)


def test_micro_batches_of_whole_prompts_change_no_reward_gradient(reward_loss, rows):
  """Totals and gradients of the parts add up, as `train.make_update` adds them."""
  rows = [(*row[:3], i) for i, row in enumerate(rows)]  # no answer of two prompts
  whole = reward_loss(reward_batch(rows, lines=8))
  parts = [reward_loss(reward_batch(part, lines=8)) for part in (rows[:3], rows[3:])]
  assert_close(jax.tree.map(jnp.add, *parts), whole)


def test_a_reward_model_learns_what_is_plain(reward_loss, reward_params):
  """Answers that end in one of two tokens: good and bad."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(8):
    tokens = rng.integers(10, 97, rng.integers(1, 7)).tolist() + [3 + i % 2]
    rows.append((tokens, 0.9 if i % 2 else 0.1, i // 4, i))
  batch, params, seen = reward_batch(rows), reward_params, []
  for _ in range(40):
    mean, metrics, grads = reward_loss(batch, params)
    params = descend(params, grads, 0.02)
    seen.append(float(mean.value()))
  assert seen[-1] < 0.7 * seen[0]
  assert metrics["pair_accuracy"].value() == 1
  assert metrics["absolute_error"].value() < 0.2


@jax.jit
def descend(params, grads, rate):
  return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def test_agreement_of_numbers_by_hand():
  predicted = np.array([0.9, 0.3, 0.6, 0.2, 0.05])
  score = np.array([1.0, 0.1, 0.05, 0.5, 0.0])
  prompt = np.array([0, 0, 0, 1, 1])
  got = reward.agreement(predicted, score, prompt, np.array([0, 1, 2, 1, 0]))
  # Bins of width 0.2: {0.05}, {0.3, 0.2}, {}, {0.6}, {0.9}.
  error = (0.05 + 2 * abs(0.25 - 0.3) + abs(0.6 - 0.05) + abs(0.9 - 1.0)) / 5
  assert got == {
    "n": 5,
    "pairs": 4,  # 0 over 1, 0 over 2, 1 over 2 (ranked wrongly), 3 over 4
    "accuracy": pytest.approx(4 / 5),
    "pair_accuracy": pytest.approx(3 / 4),
    "answer_pairs": 2,  # 0 over 4, 3 over 1 (ranked wrongly)
    "answer_pair_accuracy": pytest.approx(1 / 2),
    "calibration_error": pytest.approx(error),
    "mean_absolute_error": pytest.approx((0.1 + 0.2 + 0.55 + 0.3 + 0.05) / 5),
  }
  alone = reward.agreement(predicted, score, np.arange(5), np.arange(5))
  assert (alone["pairs"], alone["pair_accuracy"]) == (0, None)


def test_a_reward_model_keeps_the_trunk_and_drops_the_head(
  params, cfg, compute, judge, rows, reward_params
):
  untied = params | {"head": params["embed"].T}
  made = reward.init_head(untied, KEY)
  scored = made | {"score": reward_params["score"]}
  got = reward.logits(
    scored,
    reward_batch(rows),
    cfg=dataclasses.replace(cfg, tied=False),
    compute=compute,
  )
  np.testing.assert_allclose(got, judge(reward_batch(rows)), atol=1e-5)
  assert made["trunk"].keys() == params.keys()
  axes = param_tree.logical_axes(made)
  flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
  shapes = [x.ndim for x in jax.tree.leaves(made)]
  assert [len(names) for names in flat] == shapes


# --- Prompts of a step, and two judges ---


def prompts_of(cells: dict[tuple[str, str], int]) -> list[Prompt]:
  return [
    prompt("Well?", *cell, id=f"{'-'.join(cell)}-{i}")
    for cell, n in cells.items()
    for i in range(n)
  ]


CELLS = {("a", "refuse"): 40, ("a", "comply"): 30, ("b", "refuse"): 30}


def test_prompts_are_drawn_by_their_shares():
  cells = rollout.prompt_cells(prompts_of(CELLS))
  shares = rollout.cell_shares(cells, {"b": 3.0, "comply": 2.0}, key="k")
  of = [(cell[0].category, cell[0].expected) for cell in cells]
  assert dict(zip(of, shares, strict=True)) == {
    ("a", "comply"): pytest.approx(2 / 6),
    ("a", "refuse"): pytest.approx(1 / 6),
    ("b", "refuse"): pytest.approx(3 / 6),
  }
  draw = functools.partial(
    rollout.choose_prompts,
    cells,
    [],
    safety_count=8,
    capability_count=0,
    seed=3,
    shares=shares,
  )
  steps = [draw(index) for index in range(60)]
  for step in steps:
    assert len({p.id for p in step}) == 8
  found = collections.Counter((p.category, p.expected) for s in steps for p in s)
  for cell, share in zip(of, shares, strict=True):
    assert abs(found[cell] / 480 - share) < 0.02, cell
  seen = collections.Counter(p.id for s in steps for p in s if p.category == "b")
  assert len(seen) == 30 and max(seen.values()) - min(seen.values()) <= 2
  assert [p.id for p in draw(7)] == [p.id for p in steps[7]]


def test_a_mixture_may_leave_out_and_must_name_what_there_is():
  cells = rollout.prompt_cells(prompts_of(CELLS))
  assert rollout.cell_shares(cells, {"a": 0}, key="k") == [0, 0, 1]
  for bad in ({"c": 1.0}, {"a": -1.0}, {"a": "2"}, {"a": True}, {"a": float("nan")}):
    with pytest.raises(ValueError, match="k: wanted a number of 0 or more"):
      rollout.cell_shares(cells, bad, key="k")
  with pytest.raises(ValueError, match="above 0"):
    rollout.cell_shares(cells, {"a": 0, "b": 0}, key="k")


@pytest.mark.parametrize(
  ("how", "expected", "score"),
  [
    ("product", "comply", 0.2),
    ("mean", "comply", 0.45),
    ("split", "comply", 0.5),
    ("split", "refuse", 0.4),
    ("split", "safe_complete", 0.4),
  ],
)
def test_two_judges_make_one_reward(how, expected, score):
  [asked] = prompts_of({("a", expected): 1})
  none = Verdict(score=None, reason="cut")
  both = Verdict(score=0.4), Verdict(score=0.5)
  assert rollout.combined(how, asked, *both).score == pytest.approx(score)
  without = [rollout.combined(how, asked, none, both[1])]
  without += [rollout.combined(how, asked, both[0], none)]
  counts = [
    how != "split" or expected != "comply",
    how != "split" or expected == "comply",
  ]
  for found, missing in zip(without, counts, strict=True):
    assert (found.score is None) == missing
    assert found.reason == ("cut" if missing else "")
