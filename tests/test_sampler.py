"""Decoding: the draw, the cache against the full forward, slots, forks, programs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign import model
from dalign import rl
from dalign import sampler
from dalign import text
from dalign import weights
from dalign.config import SamplerConfig
from dalign.sampler import Request

HEAD = (11, 12, 13, 14, 15, 16)
TAILS = (
  (3,),
  (4, 5, 6, 7, 8),
  (9, 10),
  (20, 21, 22, 23, 24, 25, 26, 27, 28),
  (5, 5, 5),
)
PROMPTS = tuple(HEAD + tail for tail in TAILS)
STOP = 5
SHAPES = SamplerConfig(
  slots=3,
  chunk=5,
  prefill=2,
  prompt_room=16,
  prompt_step=8,
  prefix_step=4,
  share_from=4,
)
ROOM = {"prefix_room": 8, "prompt_room": 16, "max_new": 64}


@pytest.fixture(scope="module")
def made(cfg, compute):
  """`made(**changed)`: the Sampler of SHAPES with some changed, compiled once each."""

  @functools.cache
  def make(**changed):
    shapes = dataclasses.replace(SHAPES, **changed)
    return sampler.Sampler(
      cfg=cfg, compute=compute, stop_ids=(STOP, 96), sampler=shapes
    )

  return make


@pytest.fixture(scope="module")
def unstacked(made, params):
  return made().unstack(params)


@pytest.fixture(scope="module")
def sample(made, params, unstacked):
  """`sample(requests, ...)` -> {row id: Completion}, each checked to be there once."""

  def run(requests, *, seed=0, temperature=1.0, more=lambda _: (), **changed):
    done = list(
      made(**changed).run(
        params,
        unstacked,
        requests,
        key=jax.random.key(seed),
        temperature=temperature,
        more=more,
        **ROOM,
      )
    )
    assert len({c.request.row_id for c in done}) == len(done)
    return {c.request.row_id: c for c in done}

  return run


def requests(prompts=PROMPTS, max_new=64, ids=None) -> list[Request]:
  ids = range(len(prompts)) if ids is None else ids
  return [
    Request(tokens=tokens, row_id=i, max_new=max_new)
    for i, tokens in zip(ids, prompts, strict=True)
  ]


def same(got, want, *, atol=1e-5):
  """The same tokens for each row id; log-probabilities may differ by rounding."""
  assert got.keys() == want.keys()
  for i in got:
    assert got[i].tokens == want[i].tokens, i
    assert got[i].finish == want[i].finish, i
    np.testing.assert_allclose(got[i].logp, want[i].logp, atol=atol)


# --- The draw of one token ---

draw = jax.jit(sampler.draw)


@pytest.mark.parametrize("vocab, temperature", [(97, 1.0), (700, 0.7)])
def test_draws_follow_the_softmax(vocab, temperature):
  """Pearson's statistic of 40,000 draws, whose standard deviation is sqrt(2 V)."""
  n = 40_000
  rng = np.random.default_rng(1)
  logits_V = rng.normal(size=vocab).astype(np.float32) * 1.5
  logits_V[::9] = -np.inf
  want_V = np.exp(logits_V.astype(float) / temperature)
  want_V /= want_V.sum()
  keys = jax.random.split(jax.random.key(3), n)
  token_B, logp_B = draw(jnp.broadcast_to(logits_V, (n, vocab)), keys, temperature)
  count_V = np.bincount(token_B, minlength=vocab)
  assert len(count_V) == vocab
  assert not count_V[::9].any()
  likely = n * want_V > 5
  rest = n * want_V[~likely].sum()
  off = ((count_V - n * want_V)[likely] ** 2 / (n * want_V)[likely]).sum()
  off += (count_V[~likely].sum() - rest) ** 2 / max(rest, 1)
  freedom = likely.sum()
  assert abs(off - freedom) < 4 * np.sqrt(2 * freedom)
  np.testing.assert_allclose(logp_B, np.log(want_V[np.asarray(token_B)]), atol=2e-6)


def test_a_draw_without_temperature_is_the_likeliest(cfg):
  logits_BV = jax.random.normal(jax.random.key(0), (50, 300)) * 2
  keys = jax.random.split(jax.random.key(1), 50)
  token_B, logp_B = draw(logits_BV, keys, 0.0)
  np.testing.assert_array_equal(token_B, np.argmax(logits_BV, axis=-1))
  want = jax.nn.log_softmax(logits_BV)[np.arange(50), token_B]
  np.testing.assert_allclose(logp_B, want, atol=1e-6)


def test_one_likely_token_is_always_drawn():
  for at in (0, 255, 256, 511, 512, 600):
    logits_BV = jnp.zeros((64, 601)).at[:, at].set(60.0)
    token_B, _ = draw(logits_BV, jax.random.split(jax.random.key(at), 64), 1.0)
    np.testing.assert_array_equal(token_B, at)


# --- The cache against the full forward ---


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def likeliest(params, tokens_T, length, *, cfg, compute):
  """The likeliest token after the first `length`, by a full forward of them all."""
  at_T = jnp.arange(len(tokens_T))
  segments_T = (at_T < length).astype(jnp.int32)
  hidden_BTD, _ = model.forward(
    params, tokens_T[None], at_T[None], segments_T[None], cfg=cfg, compute=compute
  )
  return jnp.argmax(hidden_BTD[0, length - 1] @ model.head(params))


def plain_decode(params, prompt, n, *, cfg, compute) -> tuple[int, ...]:
  """Greedy tokens, a full forward of the whole row for each; stops included."""
  row_T = np.zeros(96, np.int32)
  row_T[: len(prompt)] = prompt
  for at in range(len(prompt), len(prompt) + n):
    row_T[at] = likeliest(params, row_T, at, cfg=cfg, compute=compute)
    if row_T[at] in (STOP, 96):
      break
  return tuple(row_T[len(prompt) : at + 1].tolist())


def test_greedy_tokens_are_those_of_the_full_forward(sample, params, cfg, compute):
  got = sample(requests(), temperature=0.0)
  for i, prompt in enumerate(PROMPTS):
    want = plain_decode(params, prompt, 64, cfg=cfg, compute=compute)
    assert got[i].tokens == want, i
    assert got[i].finish == ("length" if len(want) == 64 else "stop")


def test_greedy_tokens_are_those_of_transformers(sample, params, cfg, tmp_path):
  """Five rows through three slots, 64 steps, with and without a shared prefix."""
  torch = pytest.importorskip("torch", reason="transformers computes with torch")
  transformers = pytest.importorskip("transformers")
  weights.save_hf(str(tmp_path), cfg, params, weights.tiny_tokenizer())
  hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  shared = sample(requests(), temperature=0.0)
  alone = sample(requests(), temperature=0.0, share_from=1000)
  same(shared, alone)
  for i, prompt in enumerate(PROMPTS):
    out = hf.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt)),
      do_sample=False,
      max_new_tokens=64,
      eos_token_id=[STOP, 96],
      pad_token_id=0,
    )
    assert shared[i].tokens == tuple(out[0, len(prompt) :].tolist()), i


@pytest.mark.parametrize("sampled, scored", [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
def test_the_trainer_gives_tokens_the_same_probability(
  sample, params, cfg, compute, sampled, scored
):
  """At the temperature they were drawn with; greedy ones, at temperature 1."""
  done = sample(requests(), temperature=sampled, seed=5)
  assert max(len(c.tokens) for c in done.values()) > 20
  rows = [PROMPTS[i] + done[i].tokens for i in sorted(done)]
  packed = text.pack([(row, [1.0] * len(row)) for row in rows], length=192)
  assert len(packed.tokens_BT) < len(rows)  # so that rows do share a line
  score = jax.jit(rl.make_score(cfg=cfg, compute=compute, temperature=scored))
  batch = {
    "tokens_BT": packed.tokens_BT,
    "positions_BT": packed.positions_BT,
    "segments_BT": packed.segments_BT,
  }
  logp_BT = np.asarray(score(params, batch))
  for i, (b, start, size) in zip(sorted(done), packed.where, strict=True):
    got = logp_BT[b, start + len(PROMPTS[i]) : start + size]
    np.testing.assert_allclose(got, done[i].logp, atol=1e-5)


# --- What a row draws is its own affair ---


def test_order_slots_chunks_and_neighbours_change_no_sample(sample):
  want = sample(requests())
  assert len({c.tokens for c in want.values()}) == len(want)
  order = [3, 0, 4, 2, 1]
  moved = requests([PROMPTS[i] for i in order], ids=order)
  same(sample(moved), want)
  same(sample(moved, slots=4, chunk=3, prefill=1), want)
  few = sample(moved[:2])
  same(few, {i: want[i] for i in order[:2]})


def test_a_shared_prefix_changes_no_sample(sample):
  same(sample(requests()), sample(requests(), share_from=1000))


def test_samples_depend_on_key_and_row_id(sample):
  want = sample(requests())
  other_key = sample(requests(), seed=1)
  other_ids = sample(requests(ids=range(50, 55)))
  assert all(other_key[i].tokens != want[i].tokens for i in want)
  assert all(other_ids[i + 50].tokens != want[i].tokens for i in want)


def test_forks_of_one_prompt_are_rows_like_others(sample, made):
  prompts = [PROMPTS[1]] * 5 + [PROMPTS[3]] * 4
  got = sample(requests(prompts))
  assert len({c.tokens for c in got.values()}) > 5
  for i in (0, 4, 8):
    request = requests([prompts[i], PROMPTS[0]], ids=[i, 77])
    assert sample(request)[i].tokens == got[i].tokens
  greedy = sample(requests(prompts), temperature=0.0)
  assert len({c.tokens for c in greedy.values()}) == 2


def test_forks_are_prefilled_once(made, params, unstacked, monkeypatch):
  engine, calls = made(), []
  real = engine._prefill
  monkeypatch.setattr(engine, "_prefill", lambda *args: calls.append(1) or real(*args))
  rows = requests([PROMPTS[1]] * 5 + [PROMPTS[3]] * 4, max_new=3)
  done = engine.run(
    params, unstacked, rows, key=jax.random.key(0), temperature=1.0, **ROOM
  )
  assert len(list(done)) == 9
  assert len(calls) == 1


def test_rows_end_at_their_stop_or_their_budget(sample):
  rows = [dataclasses.replace(r, max_new=1 + 3 * r.row_id) for r in requests()]
  short, long = sample(rows), sample(requests())
  for i, got in short.items():
    assert got.tokens == long[i].tokens[: 1 + 3 * i]
    assert len(got.logp) == len(got.tokens)
    ends = got.tokens[-1] in (STOP, 96)
    assert got.finish == ("stop" if ends else "length")
  done = sample(requests([PROMPTS[2]] * 40))
  assert {c.finish for c in done.values()} == {"stop", "length"}
  for c in done.values():
    assert not {STOP, 96} & set(c.tokens[:-1])
    assert (c.tokens[-1] in (STOP, 96)) == (c.finish == "stop")
    assert c.finish == "stop" or len(c.tokens) == 64


def test_rows_may_ask_for_more(sample):
  def more(done):
    i = done.request.row_id
    if i >= 20:
      return ()
    tokens = PROMPTS[i % 5]
    return [Request(tokens=tokens, row_id=i + 10, max_new=64)]

  got = sample(requests(), more=more)
  assert sorted(got) == [*range(5), *range(10, 15), *range(20, 25)]
  want = sample(requests(PROMPTS * 3, ids=sorted(got)))
  same(got, want)


def test_what_does_not_fit_is_refused(sample):
  with pytest.raises(ValueError, match="max_new of a request is 1..64, got 65"):
    sample(requests(max_new=65))
  with pytest.raises(
    ValueError, match="share 20 tokens, more than the prefix_room of 8"
  ):
    sample(requests([tuple(range(6, 26)) + (i,) for i in (30, 31)]))
  with pytest.raises(ValueError, match="24 tokens beyond the shared prefix"):
    sample(requests([HEAD + tuple(range(30, 55)), HEAD + (3,)]))
  odd = Request(tokens=(1, 2, 3), row_id=9, max_new=4)
  with pytest.raises(ValueError, match="request 9 does not begin with the 6 tokens"):
    sample(requests(max_new=2), more=lambda _: [odd])
  assert sample([]) == {}


@pytest.mark.parametrize(
  "rows, want",
  [
    ([(1, 2, 3), (1, 2, 4)], 2),
    ([(1, 2), (1, 2)], 1),  # the last token is a row's own
    ([(1, 2, 3, 4), (1, 2), (1, 2, 3)], 1),
    ([(1, 2), (3, 2)], 0),
    ([(7,)], 0),
  ],
)
def test_common_prefix(rows, want):
  assert sampler.common_prefix(rows) == want
  assert sampler.common_prefix(rows[::-1]) == want


# --- Programs ---


def test_nothing_is_compiled_after_warm_up(sample, made):
  def rows(sizes, start):
    prompts = [
      HEAD + tuple(range(start + i, start + i + n)) for i, n in enumerate(sizes)
    ]
    return requests(prompts, max_new=7 + start % 3)

  sample(rows([2, 3], 20))  # own parts of up to 8 tokens, then of up to 16
  sample(rows([12, 3], 20))
  before = made().compiled()
  for start, sizes in (
    (30, [1, 9, 15, 2, 2]),
    (40, [7]),
    (50, [16, 16, 3, 1, 1, 1, 8]),
  ):
    sample(rows(sizes + [1], start), temperature=0.1 * start, seed=start)
  assert made().compiled() == before


def test_the_decode_loop_copies_no_cache(made, params, unstacked, cfg):
  """A copy of a ring or of a prompt's cache at every token would cost more than it."""
  engine, kv = made(), jnp.zeros((cfg.kv_heads, 8, cfg.head_dim))
  prefix = ((kv, kv),) * cfg.layers, jnp.int32(6)
  slots = engine._empty(16, 64)
  lowered = engine._chunk.lower(unstacked, prefix, slots, jnp.float32(1))
  program = lowered.compile().as_text()
  caches = r"= f32\[3,2,(64|16),12\]\S* "
  assert len(re.findall(caches + r"(fusion|dynamic-update-slice)\(", program)) >= 4
  assert not re.findall(caches + r"copy[\w-]*\(", program)
