"""Advantages, the policy gradient, and the reward model, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign import model
from dalign import reward
from dalign import rl
from dalign import text

KEY = jax.random.key(0)


def close(got, want, *, atol=1e-5, rtol=1e-4):
  got = jax.tree_util.tree_flatten_with_path(got)[0]
  want = jax.tree_util.tree_flatten_with_path(want)[0]
  for (path, a), (_, b) in zip(got, want, strict=True):
    assert np.isfinite(a).all(), path
    np.testing.assert_allclose(a, b, atol=atol, rtol=rtol, err_msg=str(path))


@functools.cache
def forward_of(cfg, compute):
  return jax.jit(functools.partial(model.forward, cfg=cfg, compute=compute))


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


def plain_rloo(reward_R, scored_R):
  out = np.zeros(len(reward_R))
  for i in np.flatnonzero(scored_R):
    others = [reward_R[j] for j in np.flatnonzero(scored_R) if j != i]
    if others:
      out[i] = reward_R[i] - np.mean(others)
  return out


def test_rloo_is_each_reward_less_the_mean_of_the_others():
  reward_BR, scored_BR = groups()
  got = rl.rloo_advantages(reward_BR, scored_BR)
  for b in range(len(reward_BR)):
    want = plain_rloo(reward_BR[b].astype(float), scored_BR[b])
    np.testing.assert_allclose(got[b], want, atol=1e-6)


def test_rloo_is_dr_grpo_times_a_constant():
  reward_BR, scored_BR = groups(1)
  rloo, dr_grpo = (f(reward_BR, scored_BR) for f in rl.ADVANTAGES.values())
  G = np.maximum(scored_BR.sum(axis=1, keepdims=True), 2)
  np.testing.assert_allclose(rloo, dr_grpo * G / (G - 1), atol=1e-6)
  assert np.abs(rloo).max() > 0.1


@pytest.mark.parametrize("name", rl.ADVANTAGES)
def test_advantages_leave_out_what_was_not_scored(name):
  advantages = rl.ADVANTAGES[name]
  reward_BR, scored_BR = groups()
  want = advantages(reward_BR, scored_BR)
  for odd in (1e6, np.nan):
    got = advantages(np.where(scored_BR, reward_BR, odd), scored_BR)
    np.testing.assert_array_equal(got, want)
  assert (np.asarray(want)[~scored_BR] == 0).all()
  np.testing.assert_array_equal(want[2:5], 0)  # alone, unscored, all equal
  np.testing.assert_allclose(np.sum(want, axis=1), 0, atol=1e-6)
  few = advantages(reward_BR[1:2, [1, 2, 4]], np.ones((1, 3), bool))
  np.testing.assert_allclose(want[1, [1, 2, 4]], few[0], atol=1e-6)


def test_groups_without_a_difference_are_known():
  reward_BR, scored_BR = groups()
  got = rl.zero_variance(np.where(scored_BR, reward_BR, 9.0), scored_BR)
  np.testing.assert_array_equal(got, [False, False, True, True, True, False])


def test_reward_is_judge_times_format_less_kl():
  got = rl.combine(
    jnp.array([0.8, 0.8, 0.2]),
    jnp.array([True, False, True]),
    jnp.array([2.0, 4.0, -1.0]),
    kl_weight=0.05,
  )
  np.testing.assert_allclose(got, [0.7, -0.2, 0.25], atol=1e-6)


@pytest.mark.parametrize("well_formed", [False, 0.0])
def test_malformed_rollouts_need_no_judge(well_formed):
  """They were never judged: their score is not a number and their reward is 0."""
  got = rl.combine(
    np.array([np.nan]), np.array([well_formed]), np.zeros(1), kl_weight=0.1
  )
  np.testing.assert_array_equal(got, [0.0])


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
    scorer = rl.make_score(cfg=cfg, compute=compute, temperature=temperature)
    return scorer(params, batch)

  return lambda params, packed, temperature: np.asarray(
    run(params, tokens_of(packed), temperature)
  )


def tokens_of(packed: text.Packed):
  names = "tokens_BT", "positions_BT", "ends_BT"
  batch = {name: getattr(packed, name) for name in names}
  return batch | {"wanted_BT": packed.weight_BT > 0}


def rl_batch(packed: text.Packed, logp_BT, *, shift=False):
  """What `rl.make_loss` takes; `shift` moves the behaviour away from the policy."""
  start_BT = np.zeros(packed.tokens_BT.shape, bool)
  for b, start, _ in packed.where:
    start_BT[b, start] = True
  return tokens_of(packed) | {
    "sampled_BT": packed.weight_BT > 0,
    "logp_BT": logp_BT + (packed.extras["shift"] if shift else 0.0),
    "advantage_BT": packed.extras["advantage"],
    "start_BT": start_BT,
  }


@pytest.fixture(scope="module")
def loss_and_gradient(params, cfg, compute):
  """Of rl at temperature 0.8, cap 1.2 and length 8: (mean, metrics, gradients)."""
  loss = rl.make_loss(
    cfg=cfg, compute=compute, temperature=0.8, ratio_cap=1.2, length_norm=8.0
  )

  @jax.jit
  def run(batch):
    def total(p):
      mean, metrics = loss(p, batch, KEY)
      return mean.total, (mean, metrics)

    grads, (mean, metrics) = jax.grad(total, has_aux=True)(params)
    return mean, metrics, grads

  return run


def test_scores_are_log_probabilities_of_what_is_wanted_of_a_row_alone(
  score, params, cfg, compute
):
  rows = rollouts()
  packed = text.pack(rows, length=32, rows_multiple=8)
  got = score(params, packed, 0.8)
  alone = text.pad_rows(rows, length=32)
  hidden_BTD, _ = forward_of(cfg, compute)(
    params, alone.tokens_BT, alone.positions_BT, alone.ends_BT
  )
  logits_BTV = np.asarray(hidden_BTD @ model.head(params)).astype(float) / 0.8
  logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
  sizes = [size for _, _, size in packed.where]
  assert any(n < len(row[0]) for n, row in zip(sizes, rows, strict=True))
  for i, (b, start, size) in enumerate(packed.where):
    shared = len(rows[i][0]) - size
    for t in range(shared + 1, shared + size):
      want = logp_BTV[i, t - 1, rows[i][0][t]] if rows[i][1][t] else 0.0
      np.testing.assert_allclose(got[b, start + t - shared], want, atol=1e-5)
  assert (got[:, 0] == 0).all()


def test_the_policy_loss_is_its_formula(score, loss_and_gradient, params):
  """-sum A min(rho, cap) / (rollouts * length), a token at a time, ratios off 1."""
  packed = text.pad_rows(rollouts(), length=32)
  logp_BT = score(params, packed, 0.8)
  batch = rl_batch(packed, logp_BT, shift=True)
  mean, metrics, _ = loss_and_gradient(batch)
  want, ratios = 0.0, []
  for b, t in np.argwhere(batch["sampled_BT"]):
    ratios.append(min(np.exp(logp_BT[b, t] - batch["logp_BT"][b, t]), 1.2))
    want -= batch["advantage_BT"][b, t] * ratios[-1]
  np.testing.assert_allclose(mean.total, want, rtol=1e-4)
  assert mean.count == 8 * 8
  assert max(ratios) == 1.2 and min(ratios) < 0.9
  np.testing.assert_allclose(metrics["ratio"].value(), np.mean(ratios), rtol=1e-4)
  gap = np.abs(packed.extras["shift"][batch["sampled_BT"]]).mean()
  np.testing.assert_allclose(metrics["logp_gap_nats"].value(), gap, rtol=1e-3)


def test_on_policy_the_gradient_is_that_of_log_pi(
  score, loss_and_gradient, params, cfg, compute
):
  packed = text.pad_rows(rollouts(), length=32)
  batch = rl_batch(packed, score(params, packed, 0.8))
  _, metrics, got = loss_and_gradient(batch)
  np.testing.assert_allclose(metrics["ratio"].value(), 1, atol=1e-5)
  weight_BT = np.where(batch["sampled_BT"], batch["advantage_BT"], 0.0)

  def reinforce(p):
    hidden_BTD, _ = model.forward(
      p,
      packed.tokens_BT,
      packed.positions_BT,
      packed.ends_BT,
      cfg=cfg,
      compute=compute,
    )
    logp_BTV = jax.nn.log_softmax(hidden_BTD[:, :-1] @ model.head(p) / 0.8)
    at = jnp.asarray(packed.tokens_BT[:, 1:, None])
    logp_BT = jnp.take_along_axis(logp_BTV, at, axis=-1)[..., 0]
    return -jnp.sum(logp_BT * weight_BT[:, 1:])

  want = jax.jit(jax.grad(reinforce))(params)
  close(got, want)


def test_packing_and_order_change_no_policy_gradient(score, loss_and_gradient, params):
  rows, runs = rollouts(), []
  for packed in (
    text.pad_rows(rows, length=32),
    text.pad_rows(rows[::-1], length=32),
    text.pack(rows, length=32, rows_multiple=8),
  ):
    batch = rl_batch(packed, score(params, packed, 0.8), shift=True)
    runs.append(loss_and_gradient(batch))
  close(runs[1], runs[0])
  close(runs[2], runs[0])
  assert (packed.ends_BT == 0).all(axis=1).any()  # lines of padding alone


def test_what_was_not_sampled_may_hold_anything(score, loss_and_gradient, params):
  packed = text.pad_rows(rollouts(), length=32)
  batch = rl_batch(packed, score(params, packed, 0.8))
  want = loss_and_gradient(batch)
  for name in ("logp_BT", "advantage_BT"):
    batch[name] = np.where(batch["sampled_BT"], batch[name], np.nan)
  got = loss_and_gradient(batch)
  close(got, want, atol=0, rtol=0)


def test_equal_rewards_give_no_policy_gradient(score, loss_and_gradient, params):
  rows = rollouts()
  advantage_R = rl.rloo_advantages(
    np.full((1, 8), 0.7, np.float32), np.ones((1, 8), bool)
  )
  rows = [
    (tokens, sampled, numbers | {"advantage": float(a)})
    for (tokens, sampled, numbers), a in zip(rows, advantage_R[0], strict=True)
  ]
  packed = text.pad_rows(rows, length=32)
  _, _, grads = loss_and_gradient(rl_batch(packed, score(params, packed, 0.8)))
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
    line = text.pad_rows([(prompt, [0.0] * 4)], length=4)
    hidden_BTD, _ = model.forward(
      p,
      line.tokens_BT,
      line.positions_BT,
      line.ends_BT,
      cfg=cfg,
      compute=compute,
    )
    return -jax.nn.softmax(hidden_BTD[0, -1] @ model.head(p) / 0.8) @ reward_V

  want = jax.jit(jax.grad(expected))(params)
  for baseline in (0.0, 0.3):
    total, mass = jax.tree.map(jnp.zeros_like, params), 0.0
    for start in range(0, cfg.vocab, 48):  # 48 rows of 5 fill 8 lines of 32
      tokens = range(start, min(start + 48, cfg.vocab))
      numbers = [{"advantage": float(reward_V[a]) - baseline} for a in tokens]
      rows = [
        (prompt + [a], [0.0] * 4 + [1.0], more)
        for a, more in zip(tokens, numbers, strict=True)
      ]
      packed = text.pack(rows, length=32, rows_multiple=8)
      batch = rl_batch(packed, score(params, packed, 0.8))
      prob_BT = np.where(batch["sampled_BT"], np.exp(batch["logp_BT"]), 0.0)
      mass += prob_BT.sum()
      batch["advantage_BT"] = batch["advantage_BT"] * prob_BT
      total = jax.tree.map(jnp.add, total, loss_and_gradient(batch)[2])
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    close(total, want)


# --- The reward model ---

SPEC = [31, 41, 59, 26, 53]


def reward_batch(rows, *, room=8, spec_room=8, filler=0, lines=None):
  """Rows of (tokens, score, prompt) behind one shared prefix."""
  lines = len(rows) if lines is None else lines
  tokens_BT = np.full((lines, room), filler, np.int32)
  prefix_P = np.full(spec_room, filler, np.int32)
  prefix_P[: len(SPEC)] = SPEC
  for b, (tokens, _, _) in enumerate(rows):
    tokens_BT[b, : len(tokens)] = tokens
  numbers = np.zeros((3, lines))
  numbers[:, : len(rows)] = np.transpose([(len(t), s, p) for t, s, p in rows])
  return {
    "prefix_P": prefix_P,
    "prefix_len": np.int32(len(SPEC)),
    "tokens_BT": tokens_BT,
    "length_B": numbers[0].astype(np.int32),
    "score_B": numbers[1].astype(np.float32),
    "prompt_B": numbers[2].astype(np.int32),
  }


@pytest.fixture(scope="module")
def reward_params(params):
  return reward.init_head(params, jax.random.key(4))


@pytest.fixture(scope="module")
def rows():
  """(tokens, judged score, prompt): three prompts of 3, 2 and 1 answers."""
  rng = np.random.default_rng(2)
  marks = [(0.9, 0), (0.1, 0), (0.5, 0), (0.0, 1), (1.0, 1), (0.4, 2)]
  return [(rng.integers(0, 97, rng.integers(1, 9)).tolist(), s, p) for s, p in marks]


@pytest.fixture(scope="module")
def judge(cfg, compute, reward_params):
  jitted = jax.jit(functools.partial(reward.logits, cfg=cfg, compute=compute))
  return lambda batch: np.asarray(jitted(reward_params, batch))


def test_the_score_is_read_at_the_last_token(judge, rows, reward_params, cfg, compute):
  got = judge(reward_batch(rows))
  for i, (tokens, _, _) in enumerate(rows):
    line = text.pad_rows([(SPEC + tokens, [1.0] * (5 + len(tokens)))], length=32)
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
  loss = reward.make_loss(cfg=cfg, compute=compute, pair_weight=0.5)

  @jax.jit
  def run(params, batch):
    def total(p):
      mean, metrics = loss(p, batch, KEY)
      return mean.total, (mean, metrics)

    grads, (mean, metrics) = jax.grad(total, has_aux=True)(params)
    return mean, metrics, grads

  return lambda batch, params=reward_params: run(params, batch)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_the_reward_loss_is_points_and_pairs(judge, reward_loss, rows):
  batch = reward_batch(rows, lines=8)
  mean, metrics, _ = reward_loss(batch)
  logit = judge(batch).astype(float)
  points, pairs, right = [], [], []
  for i, (_, s, p) in enumerate(rows):
    q = sigmoid(logit[i])
    points.append(-(s * np.log(q) + (1 - s) * np.log(1 - q)))
    for j, (_, s_j, p_j) in enumerate(rows):
      if p == p_j and s > s_j:
        pairs.append(-np.log(sigmoid(logit[i] - logit[j])) * (s - s_j))
        right.append(logit[i] > logit[j])
  assert len(pairs) == 4
  for name, want in (
    ("point_nats", points),
    ("pair_nats", pairs),
    ("pair_accuracy", right),
    (
      "absolute_error",
      [abs(sigmoid(x) - r[1]) for x, r in zip(logit, rows, strict=False)],
    ),
  ):
    assert metrics[name].count == len(want), name
    np.testing.assert_allclose(metrics[name].value(), np.mean(want), atol=1e-5)
  want = np.mean(points) + 0.5 * np.sum(pairs) / len(points)
  np.testing.assert_allclose(mean.value(), want, rtol=1e-5)


def test_padding_and_order_change_no_reward_gradient(reward_loss, rows):
  want = reward_loss(reward_batch(rows, lines=8))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(want[2]))
  turned = reward_loss(reward_batch(rows[::-1], lines=8))
  close(turned, want)
  odd = reward_batch(rows, lines=8)
  odd["tokens_BT"][6:] = 50
  odd["score_B"][6:] = 0.7
  close(reward_loss(odd), want)


def test_micro_batches_of_whole_prompts_change_no_reward_gradient(reward_loss, rows):
  """Totals and gradients of the parts add up, as `train.make_update` adds them."""
  whole = reward_loss(reward_batch(rows, lines=8))
  parts = [reward_loss(reward_batch(part, lines=8)) for part in (rows[:3], rows[3:])]
  close(jax.tree.map(jnp.add, *parts), whole)


def test_a_reward_model_learns_what_is_plain(reward_loss, reward_params):
  """Answers that end in one of two tokens: good and bad."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(8):
    tokens = rng.integers(10, 97, rng.integers(1, 7)).tolist() + [3 + i % 2]
    rows.append((tokens, 0.9 if i % 2 else 0.1, i // 4))
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
  got = reward.agreement(predicted, score, prompt)
  # Bins of width 0.2: {0.05}, {0.3, 0.2}, {}, {0.6}, {0.9}.
  error = (0.05 + 2 * abs(0.25 - 0.3) + abs(0.6 - 0.05) + abs(0.9 - 1.0)) / 5
  assert got == {
    "n": 5,
    "pairs": 4,  # 0 over 1, 0 over 2, 1 over 2 (ranked wrongly), 3 over 4
    "accuracy": pytest.approx(4 / 5),
    "pair_accuracy": pytest.approx(3 / 4),
    "calibration_error": pytest.approx(error),
    "mean_absolute_error": pytest.approx((0.1 + 0.2 + 0.55 + 0.3 + 0.05) / 5),
  }


def test_a_reward_model_keeps_the_trunk_and_drops_the_head(params, make_params, cfg):
  untied = params | {"head": params["embed"].T}
  made = reward.init_head(untied, KEY)
  assert made["trunk"].keys() == params.keys()
  axes = reward.logical_axes(made)
  flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
  shapes = [x.ndim for x in jax.tree.leaves(made)]
  assert [len(names) for names in flat] == shapes
