"""Token statistics, the update, shardings and the SFT loss against plain loops."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import optax
import pytest

from dalign.config.model import MeshConfig
from dalign.config.training import OptimizerConfig
from dalign.models import attention
from dalign.models import ops
from dalign.models import param_tree
from dalign.models import sharding
from dalign.models import transformer
from dalign.text import packing
from dalign.training import sft
from dalign.training import train
from dalign.types import Mean
from tests.helpers import assert_close
from tests.helpers import with_gradients

OPTIMIZER = OptimizerConfig(
  **dict(learning_rate=1e-2, warmup_share=0.3, final_share=0.1, matrix_rate=0.0),
  **dict(beta1=0.8, beta2=0.95, weight_decay=0.2, clip_norm=0.5),
  **dict(skip_norm=0.0, stop_norm=0.0),
)
KEY = jax.random.key(0)


# --- ops ---


def test_matmul_rounds_its_operands_and_sums_in_float32():
  rng = np.random.default_rng(0)
  x, w, g = (
    rng.standard_normal(shape, np.float32)
    for shape in [(3, 5, 600), (600, 7), (3, 5, 7)]
  )

  @jax.jit  # as one program: XLA's CPU backend has no kernel for some forms
  def run(x, w, g):
    out, back = jax.vjp(lambda x, w: ops.matmul(x, w, jnp.dtype("bfloat16")), x, w)
    return out, *back(g)

  out, dx, dw = run(x, w, g)
  bx, bw, bg = (a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, w, g))
  assert {a.dtype for a in (out, dx, dw)} == {jnp.dtype("float32")}
  np.testing.assert_allclose(out, bx @ bw, atol=1e-4)
  np.testing.assert_allclose(dx, bg @ bw.T, atol=1e-4)
  np.testing.assert_allclose(dw, np.einsum("abi,abo->io", bx, bg), atol=1e-4)
  assert np.abs(out - x @ w).max() > 1e-2


def plain_stats(hidden_TD, head_DV, targets_T, temperature):
  """One token at a time, in float64: log-probability, entropy, hit."""
  rows = []
  for hidden_D, target in zip(hidden_TD.astype(float), targets_T, strict=True):
    logits_V = hidden_D @ head_DV / temperature
    logp_V = logits_V - logits_V.max()
    logp_V -= np.log(np.exp(logp_V).sum())
    entropy = -(np.exp(logp_V) * logp_V).sum()
    rows.append((logp_V[target], entropy, float(target == logits_V.argmax())))
  return np.array(rows).T


@pytest.mark.parametrize("wanted", ["all", "some", "one", "none"])
@pytest.mark.parametrize("chunk, temperature", [(4, 1.0), (5, 0.7), (100, 1.3)])
def test_token_stats_are_those_of_one_token_at_a_time(chunk, temperature, wanted):
  rng = np.random.default_rng(chunk)
  B, T, D, V = 2, 7, 6, 11
  hidden = 2 * rng.standard_normal((B, T, D), np.float32)
  head = rng.standard_normal((D, V), np.float32)
  targets = (hidden @ head).argmax(-1)
  targets[:, ::2] = rng.integers(0, V, (B, 4))
  share = {"all": 1.0, "some": 0.4, "one": 0.0, "none": 0.0}[wanted]
  wanted_BT = rng.random((B, T)) < share
  wanted_BT[1, 3] |= wanted == "one"
  stats = jax.jit(
    functools.partial(
      ops.token_stats, dtype=jnp.float32, chunk=chunk, temperature=temperature
    )
  )
  got = stats(hidden, head, targets, wanted_BT)
  for b in range(B):
    want = plain_stats(hidden[b], head, targets[b], temperature)
    for a, w in zip((got.logp, got.entropy, got.hit), want, strict=True):
      np.testing.assert_allclose(a[b], np.where(wanted_BT[b], w, 0.0), atol=1e-4)
  assert wanted != "all" or 0 < got.hit.mean() < 1

  def dense(hidden, head):
    logp = jax.nn.log_softmax(hidden @ head / temperature)
    picked = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(wanted_BT, picked, 0.0) ** 2)

  def chunked(hidden, head):
    stats_BT = stats(hidden, head, targets, wanted_BT)
    return jnp.sum(stats_BT.logp**2) + jnp.sum(stats_BT.entropy + stats_BT.hit)

  got, want = (jax.jit(jax.grad(f, (0, 1)))(hidden, head) for f in (chunked, dense))
  assert_close(got, want)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_head_is_not_applied_to_what_is_not_wanted(parts):
  """Tokens of chunks without any wanted one are never read."""
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((parts, 16 // parts, 3), np.float32)
  wanted_PN = np.zeros(hidden.shape[:2], bool)
  wanted_PN[:, 1:9:2] = True  # a chunk of four in each part
  hidden[~wanted_PN] = np.nan
  head = rng.standard_normal((3, 5), np.float32)
  targets = rng.integers(0, 5, wanted_PN.shape)

  def total(hidden, head):
    stats = ops.token_stats(
      hidden, head, targets, wanted_PN, dtype=jnp.float32, chunk=4
    )
    return jnp.sum(stats.logp)

  dhidden, dhead = jax.jit(jax.grad(total, (0, 1)))(hidden, head)
  assert np.isfinite(dhead).all() and (dhidden[~wanted_PN] == 0).all()
  assert np.abs(dhead).max() > 0.1 and (dhidden[wanted_PN] != 0).any(axis=-1).all()


def test_a_token_sees_its_path_from_the_root():
  # 0 and 1 lead to 2, 3 and to 4; 5 is a row of its own; 6 is padding.
  mask = np.asarray(attention.tree_mask(jnp.array([[5, 5, 4, 4, 5, 6, 0]])))[0]
  sees = [np.flatnonzero(row).tolist() for row in mask]
  assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [6]]


def test_keys_differ_by_name_step_and_row():
  keys = [ops.stream(KEY, name, step) for name in ("rl", "sft") for step in (0, 1)]
  assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 4
  words_32 = np.array([[5, 1], [9, 1], [5, 1]], np.uint32)
  rows = jax.random.key_data(ops.row_keys(KEY, words_32))
  alone = jax.random.key_data(ops.row_keys(KEY, words_32[1:2]))
  np.testing.assert_array_equal(rows[1], alone[0])
  np.testing.assert_array_equal(rows[0], rows[2])
  assert (rows[0] != rows[1]).any()
  other = jax.random.key_data(ops.row_keys(KEY, np.array([[5, 2]], np.uint32)))
  assert (rows[0] != other[0]).any()  # the second word counts too


# --- The update ---


def squares(params, batch, key):
  """Squared errors of a small linear model, on the rows that count."""
  del key
  error_BO = batch["x"] @ params["w"] + params["b"][None] - batch["y"]
  return Mean.of(jnp.sum(error_BO**2, axis=-1), batch["real"]), {
    "bias": Mean.of(params["b"][0])
  }


def linear(seed, rows):
  rng = np.random.default_rng(seed)
  shapes = {"x": (rows, 3), "y": (rows, 2)}
  batch = {n: 2 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}
  return batch | {"real": np.arange(rows) % 4 != 1}


def one(batch, micro=1):
  """The batch as so many micro-batches."""
  return jax.tree.map(lambda x: jnp.reshape(x, (micro, -1, *x.shape[1:])), batch)


def plain_adamw(params, gradient, steps):
  """Decoupled weight decay (1711.05101) after clipping, in float64 and written out."""
  o, state = OPTIMIZER, {n: [0.0, 0.0] for n in params}
  for step in range(steps):
    grads = gradient(params)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    warmup = round(o.warmup_share * steps)
    if step < warmup:
      rate = o.learning_rate * (1 / warmup + (1 - 1 / warmup) * step / warmup)
    else:
      along = (step - warmup) / (steps - warmup)
      cosine = (1 + np.cos(np.pi * along)) / 2
      rate = o.learning_rate * (o.final_share + (1 - o.final_share) * cosine)
    for n, g in grads.items():
      g = g * min(1.0, o.clip_norm / norm)
      m, v = state[n]
      m, v = o.beta1 * m + (1 - o.beta1) * g, o.beta2 * v + (1 - o.beta2) * g**2
      state[n] = [m, v]
      m, v = m / (1 - o.beta1 ** (step + 1)), v / (1 - o.beta2 ** (step + 1))
      decay = o.weight_decay * params[n] if params[n].ndim > 1 else 0.0
      params[n] = params[n] - rate * (m / (np.sqrt(v) + 1e-8) + decay)
  return params


def test_muon_gives_each_layers_matrices_even_steps_and_adamw_the_rest():
  rng = np.random.default_rng(0)
  shapes = {
    "embed": (7, 4),
    "norm": (4,),
    "layers": {"q": (2, 4, 6), "mlp_norm": (2, 4)},
  }
  params = jax.tree.map(
    lambda s: jnp.ones(s), shapes, is_leaf=lambda s: type(s) is tuple
  )
  grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
  grads["layers"]["q"] *= jnp.asarray([1.0, 50.0])[:, None, None]

  def first_step(matrix_rate):
    cfg = dataclasses.replace(
      OPTIMIZER, matrix_rate=matrix_rate, weight_decay=0.0, clip_norm=1e6
    )
    tx = train.make_optimizer(cfg, steps=10)
    return tx.update(grads, tx.init(params), params)[0]

  muon, adamw = first_step(0.3), first_step(0.0)
  nadam = optax.nadam(OPTIMIZER.learning_rate / 3, b1=0.8, b2=0.95)
  rest = nadam.update(grads, nadam.init(params))[0]
  rate = 0.3 / 3  # the first of three steps of warm-up
  for update, gradient in zip(muon["layers"]["q"], grads["layers"]["q"], strict=True):
    u, _, v = np.linalg.svd(np.asarray(gradient, float), full_matrices=False)
    along = -u.T @ np.asarray(update, float) @ v.T / rate
    scale = np.sqrt(max(1, 6 / 4))
    assert 0.6 < np.diag(along).min() / scale and np.diag(along).max() / scale < 1.3
    assert np.abs(along - np.diag(np.diag(along))).max() < 0.05
  for name in ("embed", "norm"):
    assert_close(muon[name], rest[name])
  assert_close(muon["layers"]["mlp_norm"], rest["layers"]["mlp_norm"])
  assert np.abs(muon["layers"]["q"] - adamw["layers"]["q"]).max() > 1e-3


def test_the_last_steps_are_averaged():
  tx = train.make_optimizer(OPTIMIZER, steps=6)
  update = jax.jit(train.make_update(squares, tx, average_from=3), donate_argnums=0)
  state = train.create({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, tx, averaged=True)
  seen = []
  for seed in range(6):
    state, _ = update(state, one(linear(seed, 8)), KEY, 1)
    seen.append(jax.tree.map(np.asarray, jax.device_get(state.params)))
    last = seen[3:] or seen[-1:]
    want = jax.tree.map(lambda *x: np.mean(x, axis=0), *last)
    assert_close(state.average, want, atol=1e-6)
  assert np.abs(state.average["w"] - state.params["w"]).max() > 1e-3


def test_updates_are_those_of_written_out_adamw():
  batch = linear(0, 8)
  start = {"w": np.full((3, 2), 0.3, np.float32), "b": np.full(2, -0.4, np.float32)}
  tx = train.make_optimizer(OPTIMIZER, steps=10)
  update = jax.jit(train.make_update(squares, tx))
  state = train.create(jax.tree.map(jnp.asarray, start), tx)
  for _ in range(10):
    state, metrics = update(state, one(batch), KEY, 1)
  x, y = (batch[n][batch["real"]].astype(float) for n in ("x", "y"))

  def gradient(p):
    error = 2 * (x @ p["w"] + p["b"] - y) / len(x)
    return {"w": x.T @ error, "b": error.sum(axis=0)}

  want = plain_adamw({n: p.astype(float) for n, p in start.items()}, gradient, 10)
  assert_close(state.params, want)
  assert state.step == 10
  assert metrics["loss"].count == 6 and metrics["grad_norm"].value() > 0.5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_schedule(steps):
  warm = dataclasses.replace(OPTIMIZER, warmup_share=1.0)
  tx = train.make_optimizer(warm, steps=steps)
  state = train.create({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, tx)
  update = jax.jit(train.make_update(squares, tx))
  state, _ = update(state, one(linear(0, 4)), KEY, 1)
  moved = np.abs(state.params["b"] - 1)
  assert np.isfinite(moved).all() and moved.max() > 1e-4


def test_micro_batches_change_nothing():
  """Also where they hold different numbers of real rows, and one holds none."""
  batch = linear(1, 16)
  batch["real"][4:8] = False
  tx = optax.sgd(1.0)  # parameters move by the gradient
  update = jax.jit(train.make_update(squares, tx))
  start = {"w": jnp.full((3, 2), 0.3), "b": jnp.full(2, -0.4)}
  whole = update(train.create(start, tx), one(batch), KEY, 1)
  for micro in (2, 4, 16):
    state, metrics = update(train.create(start, tx), one(batch, micro), KEY, micro)
    assert_close(state.params, whole[0].params)
    assert metrics["loss"].count == 9
    np.testing.assert_allclose(metrics["loss"].total, whole[1]["loss"].total, rtol=1e-5)


def test_unused_micro_batches_are_not_looked_at():
  batch = linear(1, 16)
  tx = optax.sgd(1.0)
  update = jax.jit(train.make_update(squares, tx))
  start = {"w": jnp.full((3, 2), 0.3), "b": jnp.full(2, -0.4)}
  few = jax.tree.map(lambda x: x[:8], batch)
  want, want_metrics = update(train.create(start, tx), one(few, 2), KEY, 2)
  batch["x"][8:] = np.nan
  got, metrics = update(train.create(start, tx), one(batch, 4), KEY, 2)
  assert_close((got.params, metrics), (want.params, want_metrics))
  update(train.create(start, tx), one(batch, 4), KEY, 1)
  assert update._cache_size() == 2  # one a shape, none a number of used ones


def test_each_micro_batch_has_its_own_key():
  def noise(params, batch, key):
    noise = jax.random.normal(key)
    return Mean(params["b"][0] * noise, batch["x"].sum()), {"noise": Mean.of(noise**2)}

  tx = optax.sgd(1.0)
  update = jax.jit(train.make_update(noise, tx))
  start, batch = {"b": jnp.zeros(1)}, {"x": jnp.ones((3, 1))}
  runs = [update(train.create(start, tx), batch, KEY, used)[1] for used in (1, 2, 3)]
  totals = np.diff([0.0] + [float(m["noise"].total) for m in runs])
  assert len(set(totals.round(6).tolist())) == 3


def test_a_batch_that_trains_nothing_moves_only_by_decay():
  batch = linear(1, 4) | {"real": np.zeros(4, bool)}
  tx = train.make_optimizer(OPTIMIZER, steps=10)
  state = train.create({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, tx)
  update = jax.jit(train.make_update(squares, tx))
  state, metrics = update(state, one(batch), KEY, 1)
  assert metrics["loss"].value() == 0
  np.testing.assert_array_equal(state.params["b"], 1)
  assert ((state.params["w"] < 1) & (state.params["w"] > 0.99)).all()


@pytest.mark.parametrize("inside", ["", "trunk"])
def test_vectors_are_not_decayed_though_layers_are_stacked(inside):
  """In a decoder's tree and in a reward model's, whose decoder is its trunk."""
  layers = {"attn_norm": jnp.ones((2, 3)), "q": jnp.ones((2, 3, 3))}
  params = {"embed": jnp.ones((4, 3)), "norm": jnp.ones(3), "layers": layers}
  if inside:
    params = {inside: params, "score": {"weight": jnp.ones(3), "bias": jnp.ones(1)}}
  tx = train.make_optimizer(OPTIMIZER, steps=10)
  still = jax.tree.map(jnp.zeros_like, params)
  moves, _ = tx.update(still, tx.init(params), params)
  moved = {
    path[-1].key: bool((move != 0).any())
    for path, move in jax.tree_util.tree_flatten_with_path(moves)[0]
  }
  assert {name for name, move in moved.items() if move} == {"embed", "q"}


def test_means_add_before_they_are_divided():
  a = Mean.of(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
  b = Mean.of(jnp.array([10.0]))
  assert (a + b).value() == 14 / 3
  assert Mean.of(jnp.ones(3), jnp.zeros(3, bool)).value() == 0


# --- Shardings ---


def test_meshes_use_all_devices():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
  assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2, sequence=1, expert=1)
  with pytest.raises(ValueError, match="data 3 x fsdp 2 x tensor 1 x .* devices, 8"):
    sharding.make_mesh(MeshConfig(data=3, fsdp=2, tensor=1))
  with pytest.raises(ValueError, match="is not the number of devices, 8"):
    sharding.make_mesh(MeshConfig(data=3, fsdp=-1, tensor=1))
  with pytest.raises(ValueError, match="at most one axis may be -1"):
    sharding.make_mesh(MeshConfig(data=-1, fsdp=-1, tensor=1))


def test_logical_axes_become_mesh_axes():
  assert sharding.partition_spec(("layer", "width", "heads")) == P(
    None, "fsdp", "tensor"
  )
  assert sharding.partition_spec(("batch", None)) == P(("data", "fsdp"), None)
  with pytest.raises(ValueError, match="lays one mesh axis on two dimensions"):
    sharding.partition_spec(("heads", "ffw"))
  with pytest.raises(KeyError, match="rows"):
    sharding.partition_spec(("rows",))


def test_axes_that_do_not_divide_are_dropped(params):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  placed = sharding.shardings(mesh, param_tree.logical_axes(params), params)
  assert placed["embed"].spec == P(None, "fsdp")  # 97 words lie on two devices badly
  assert placed["layers"]["q"].spec == P(None, "fsdp", "tensor")
  rows = sharding.batch_sharding(mesh, "tokens_BT", jnp.zeros((3, 8, 5)), lead=1)
  assert rows.spec == P(None, ("data", "fsdp"), "sequence")
  six = sharding.batch_sharding(mesh, "tokens_BT", jnp.zeros((6, 5)))
  assert six.spec == P(("data",), "sequence")  # six rows on two of two by two
  shared = sharding.batch_sharding(mesh, "prefix_P", jnp.zeros((3, 8)), lead=1)
  assert shared.spec == P()


def test_moments_lie_as_their_parameters(params):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  tx = train.make_optimizer(OPTIMIZER, steps=10)
  state = train.program(squares, tx, mesh, params).state
  placed = jax.tree.map(lambda x: x.sharding, state)
  adam = next(s for s in jax.tree.leaves(placed.opt_state, is_leaf=_adam) if _adam(s))
  assert adam.mu == placed.params and adam.nu == placed.params
  assert adam.count.spec == placed.step.spec == P()


def _adam(x):
  return isinstance(x, optax.ScaleByAdamState)


# --- SFT ---


@pytest.fixture(scope="module")
def rows():
  """Rows of (tokens, weights): a prompt without weight, then what is trained. The
  prompts begin alike, and two are the same."""
  rng = np.random.default_rng(3)
  sizes = [(5, 9), (3, 4), (8, 12), (2, 2), (6, 1), (4, 7), (1, 11), (6, 7)]
  front = rng.integers(0, 97, 5).tolist()
  rows = []
  for p, n in sizes:
    tokens = rng.integers(0, 97, p + n).tolist()
    tokens[: min(p, 5)] = front[:p]
    rows.append((tokens, [0.0] * p + [1.0] * (n - 1) + [0.5]))
  rows[7][0][:6] = rows[4][0][:6]
  return rows


@pytest.fixture(scope="module")
def loss_and_gradient(params, cfg, compute):
  run = with_gradients(sft.make_loss(cfg=cfg, compute=compute))
  return functools.partial(run, params)


def sft_batch(packed: packing.Packed, micro=None):
  batch = packed.lines | {"weight_BT": packed.weight_BT}
  return batch if micro is None else one(batch, micro)


def test_sft_loss_is_the_sum_of_weighted_tokens(
  rows, loss_and_gradient, params, cfg, compute
):
  packed = packing.pad_rows(rows, length=24)
  mean, metrics, _ = loss_and_gradient(sft_batch(packed))
  forward = jax.jit(functools.partial(transformer.forward, cfg=cfg, compute=compute))
  hidden_BTD, _ = forward(params, packed.tokens_BT, packed.positions_BT, packed.ends_BT)
  head, want, entropies, hits = np.asarray(transformer.head(params)), 0.0, [], []
  for hidden_TD, (tokens, weight) in zip(np.asarray(hidden_BTD), rows, strict=True):
    n = len(tokens)
    logp, entropy, hit = plain_stats(hidden_TD[: n - 1], head, tokens[1:], 1.0)
    trained = np.array(weight[1:]) > 0
    want -= (logp * weight[1:]).sum()
    entropies += entropy[trained].tolist()
    hits += hit[trained].tolist()
  np.testing.assert_allclose(mean.total, want, rtol=1e-5)
  assert mean.count == sum(sum(w) for _, w in rows)
  np.testing.assert_allclose(
    metrics["entropy_nats"].value(), np.mean(entropies), rtol=1e-4
  )
  np.testing.assert_allclose(metrics["accuracy"].value(), np.mean(hits), rtol=1e-4)


def test_packing_padding_and_order_change_no_sft_gradient(rows, loss_and_gradient):
  padded = loss_and_gradient(sft_batch(packing.pad_rows(rows, length=24)))
  turned = loss_and_gradient(sft_batch(packing.pad_rows(rows[::-1], length=24)))
  packed = packing.pack(rows, length=24, rows_multiple=8)
  assert (packed.ends_BT == 0).all(axis=1).any()  # a line of padding alone
  assert np.sum(packed.ends_BT > 0) < sum(len(tokens) for tokens, _ in rows) - 5
  packed = loss_and_gradient(sft_batch(packed))
  assert_close(packed, padded)
  assert_close(turned, padded)
  alone = [
    loss_and_gradient(sft_batch(packing.pad_rows([row] * 8, length=24))) for row in rows
  ]
  total = sum(a[0].total for a in alone) / 8
  np.testing.assert_allclose(total, padded[0].total, rtol=1e-5)


def test_the_sft_step_never_holds_all_logits(rows, params, cfg, compute):
  """No buffer of the program is larger than one chunk's logits, parameters aside."""
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  tx = train.make_optimizer(OPTIMIZER, steps=10)
  program = train.program(sft.make_loss(cfg=cfg, compute=compute), tx, mesh, params)
  batch = sft_batch(packing.pad_rows(rows, length=24), micro=2)
  lowered = program.jitted.lower(program.state, batch, KEY, jnp.int32(2), {})
  shapes = {
    tuple(map(int, dims.split(",")))
    for dims in re.findall(
      r"(?:f32|bf16|pred|s32)\[([\d,]+)\]", lowered.compile().as_text()
    )
  }
  words = {s for s in shapes if cfg.vocab in s and cfg.width not in s}
  assert (compute.logits_chunk, cfg.vocab) in words
  assert max(np.prod(s) for s in words) == compute.logits_chunk * cfg.vocab, words
