"""Advantages, the policy gradient, and the reward model, against plain loops."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config.convert import build
from dalign.config.on_policy import ObjectiveConfig
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


@pytest.mark.parametrize("kind", advantages.ESTIMATORS)
def test_advantages_are_their_formulas(kind):
  """Of what was scored: what was not may be any number, and has none."""
  reward_BR, scored_BR = groups()
  told_BR = np.where(scored_BR, reward_BR, np.nan)
  got = np.asarray(advantages.ESTIMATORS[kind](told_BR, scored_BR))
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


def laid(rows, packs=packing.pad_rows, **how) -> packing.Packed:
  """The tokens of rollouts in lines of 32."""
  return packs([row[:2] for row in rows], length=32, **how)


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
  more["left_out_B"] = np.arange(len(logp_BT), dtype=np.float32)
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
  packed = laid(rows, packing.pack, rows_multiple=8)
  got = score(params, packed, 0.8)
  alone = laid(rows)
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
  if how.mean == "tokens":
    return total, sum(map(len, surrogates))
  return total, (len(surrogates) + batch["left_out_B"].sum()) * how.length_norm


@pytest.mark.parametrize("packs", [packing.pad_rows, packing.pack])
@pytest.mark.parametrize("name", [*ALGORITHMS.CHANGES])
def test_each_loss_is_its_formula(name, packs, score, params, cfg, compute):
  """Ratios off 1, padded rows and trees of two samples of a prompt."""
  wider = dict(clip_low=0.2, clip_high=0.3) if name == "gspo" else {}
  how, rows = objective(name, ratio_cap=1.3, **wider), rollouts()
  packed = laid(rows, packs)
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
  mean, _, _ = run_of(how, cfg, compute)(tree, batch)
  total, count = plain_loss(how, batch, logp_BT, value_BT)
  np.testing.assert_allclose(mean.total, total, rtol=1e-4)
  np.testing.assert_allclose(mean.count, count, rtol=1e-6)


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
  mean, _, got_T = by_hand(**changes)
  np.testing.assert_allclose(mean.total, total, rtol=1e-5)
  np.testing.assert_allclose(mean.count, count, rtol=1e-6)
  np.testing.assert_allclose(got_T, grad_T, atol=1e-5)


def test_metrics_of_the_loss_are_what_they_are_by_hand():
  _, metrics, _ = by_hand(mean="tokens")
  found = {name: float(mean.value()) for name, mean in metrics.items()}
  assert found == pytest.approx(
    dict(entropy_nats=1, ratio=5.5 / 4, clipped=3 / 4, logp_gap_nats=np.log(2) * 3 / 4)
  )
  _, metrics, _ = by_hand(mean="tokens", ratio_cap=1.1)
  assert metrics["ratio"].value() == pytest.approx(3.7 / 4)


def test_on_policy_the_gradient_is_that_of_log_pi(
  score, loss_and_gradient, params, cfg, compute
):
  rows = rollouts()
  packed = laid(rows)
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
    (laid(straight), straight),
    (laid(turned), turned),
    (laid(straight, packing.pack, rows_multiple=8), straight),
  ):
    batch = rl_batch(packed, score(params, packed, 0.8), rows, shift=True)
    runs.append(loss_and_gradient(batch))
  assert_close(runs[1], runs[0])
  assert_close(runs[2], runs[0])
  assert (packed.ends_BT == 0).all(axis=1).any()  # lines of padding alone


def test_what_was_not_sampled_may_hold_anything(score, loss_and_gradient, params):
  rows = rollouts()
  packed = laid(rows)
  batch = rl_batch(packed, score(params, packed, 0.8), rows)
  want = loss_and_gradient(batch)
  for name in ("behaviour_BT", "advantage_BT", "reference_BT", "returns_BT"):
    batch[name] = np.where(batch["sampled_BT"], batch[name], np.nan)
  got = loss_and_gradient(batch)
  assert_close(got, want, atol=0, rtol=0)


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
