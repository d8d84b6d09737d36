"""Decoding: the draw, the cache against the full forward, slots, forks, programs."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config.model import SamplerConfig
from dalign.models import transformer
from dalign.sampling import sampler
from dalign.sampling.programs import bucket_size
from dalign.sampling.sampler import Request
from dalign.sampling.slots import Prefixes
from dalign.sampling.slots import nucleus
from dalign.sampling.slots import sample_tokens
from dalign.text import packing
from dalign.training import policy_gradient

HEAD = (11, 12, 13, 14, 15, 16)
TAILS = ((3,), (4, 5, 6, 7, 8), (9, 10), tuple(range(20, 29)), (5, 5, 5))
PROMPTS = tuple(HEAD + tail for tail in TAILS)
LONG = tuple(tuple(range(40, 50)) + tail for tail in ((3, 4), (5,)))  # share 10 > 8
APART = ((30, 31), (50, 51, 52, 53), (70,))
STOP = 5
SHAPES = SamplerConfig(
  slots=4, lanes=2, chunk=5, prefill=2, prompt_room=16, prompt_step=8, prefix_step=4
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
def prepared(made, params):
  return made().prepare(params)


@pytest.fixture(scope="module")
def sample(made, prepared):
  """`sample(*groups, ...)` -> {row id: Completion}, each checked to be there once."""

  def run(
    *groups, seed=0, temperature=1.0, top_p=1.0, more=lambda _: (), room=ROOM, **changed
  ):
    done = list(
      made(**changed).run(
        prepared,
        groups,
        key=jax.random.key(seed),
        temperature=temperature,
        top_p=top_p,
        more=more,
        **room,
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


def three_groups() -> list[list[Request]]:
  """Five rows, then two, then three, for two lanes of two slots."""
  return [requests(), requests(LONG, ids=(10, 11)), requests(APART, ids=(20, 21, 22))]


def same(got, want, *, atol=1e-5):
  """The same tokens for each row id; log-probabilities may differ by rounding."""
  assert got.keys() == want.keys()
  for i in got:
    assert got[i].tokens == want[i].tokens, i
    assert got[i].finish == want[i].finish, i
    np.testing.assert_allclose(got[i].logp, want[i].logp, atol=atol)


# --- The draw of one token ---

draw = jax.jit(sample_tokens)


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


def plain_nucleus(logits_V, temperature: float, top_p: float) -> np.ndarray:
  """The probabilities of the tokens that stay, by a loop over the likeliest first."""
  probs_V = np.exp(logits_V.astype(float) / temperature)
  probs_V /= probs_V.sum()
  kept_V, mass = np.zeros(len(probs_V)), 0.0
  for i in np.argsort(-probs_V):
    if kept_V.any() and mass >= top_p:
      break
    kept_V[i] = probs_V[i]
    mass += probs_V[i]
  return kept_V / kept_V.sum()


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_draws_stay_in_the_nucleus(temperature):
  """Each row in its own; log-probabilities are those under what is left."""
  n, vocab = 400, 700
  top_p_B = np.repeat([1e-9, 0.3, 0.9, 0.99], n).astype(np.float32)
  logits_V = np.random.default_rng(2).normal(size=vocab).astype(np.float32) * 2
  keys = jax.random.split(jax.random.key(4), len(top_p_B))
  logits_BV = jnp.broadcast_to(logits_V, (len(top_p_B), vocab))
  token_B, logp_B = map(np.asarray, draw(logits_BV, keys, temperature, top_p_B))
  for top_p in np.unique(top_p_B):
    want_V, some = plain_nucleus(logits_V, temperature, top_p), top_p_B == top_p
    np.testing.assert_allclose(np.exp(logp_B[some]), want_V[token_B[some]], rtol=1e-4)
    cut = nucleus(logits_V[None] / temperature, top_p)
    np.testing.assert_array_equal(np.isfinite(cut[0]), want_V > 0)
    assert len({*token_B[some]}) > min(3, (want_V > 0).sum() - 1)
  whole = draw(logits_BV, keys, temperature)
  for got, want in zip(draw(logits_BV, keys, temperature, 1.0), whole, strict=True):
    np.testing.assert_array_equal(got, want)
  cold = draw(logits_BV, keys, 0.0, 0.5)
  for got, want in zip(cold, draw(logits_BV, keys, 0.0), strict=True):
    np.testing.assert_array_equal(got, want)


def test_equally_likely_tokens_stay_together():
  cut = nucleus(jnp.log(jnp.array([[0.3, 0.1, 0.3, 0.3]])), 0.5)
  np.testing.assert_array_equal(np.isfinite(cut), [[True, False, True, True]])


def test_buckets_are_multiples_and_few():
  assert [bucket_size(n, 64) for n in (0, 1, 64, 65, 512, 513, 1025)] == [
    *(64, 64, 64, 128, 512, 640, 1280)
  ]
  sizes = {bucket_size(n, 64) for n in range(1, 4097)}
  assert len(sizes) == 8 + 3 * 4


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
  ends_BT = jnp.where(at_T < length, length, 0)[None]
  hidden_BTD, _ = transformer.forward(
    params, tokens_T[None], at_T[None], ends_BT, cfg=cfg, compute=compute
  )
  return jnp.argmax(hidden_BTD[0, length - 1] @ transformer.head(params))


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
  for i, done in sample(requests(), temperature=0.0).items():
    want = plain_decode(params, done.request.tokens, 64, cfg=cfg, compute=compute)
    assert done.tokens == want, i
    assert done.finish == ("length" if len(want) == 64 else "stop")


def test_the_smallest_nucleus_is_the_likeliest_token(sample):
  got, want = sample(requests(), top_p=1e-9), sample(requests(), temperature=0.0)
  assert {i: c.tokens for i, c in got.items()} == {i: c.tokens for i, c in want.items()}
  assert all(abs(x) < 1e-6 for done in got.values() for x in done.logp)


@pytest.mark.parametrize("sampled, scored", [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
def test_the_trainer_gives_tokens_the_same_probability(
  sample, params, cfg, compute, sampled, scored
):
  """At the temperature they were drawn with; greedy ones, at temperature 1."""
  done = sample(*three_groups(), temperature=sampled, seed=5)
  assert max(len(c.tokens) for c in done.values()) > 20
  rows = [
    (c.request.tokens + c.tokens, [0] * len(c.request.tokens) + [1] * len(c.tokens))
    for _, c in sorted(done.items())
  ]
  packed = packing.pack(rows, length=192)
  assert len(packed.tokens_BT) < len(rows)  # so that rows do share a line
  score = jax.jit(
    policy_gradient.make_score(cfg=cfg, compute=compute, temperature=scored)
  )
  batch = packed.lines | {"wanted_BT": packed.weight_BT > 0}
  logp_BT = np.asarray(score(params, batch))
  for i, (b, start, size) in zip(sorted(done), packed.where, strict=True):
    got = logp_BT[b, start + size - len(done[i].tokens) : start + size]
    np.testing.assert_allclose(got, done[i].logp, atol=1e-5)


def test_ids_without_a_token_are_never_drawn_and_have_no_probability(
  params, cfg, compute
):
  """To the trainer neither: holes, and the padding of a vocabulary."""
  cfg = dataclasses.replace(cfg, absent=((20, 60), (90, 97)), logit_cap=3.0)
  absent = {*range(20, 60), *range(90, 97)}
  some = sampler.Sampler(cfg=cfg, compute=compute, stop_ids=(), sampler=SHAPES)
  how = dict(key=jax.random.key(3), temperature=2.0, **ROOM)
  [done] = some.run(some.prepare(params), [requests(PROMPTS[:1])], **how)
  assert len(done.tokens) == 64 and not absent & {*done.tokens}
  row = [*done.request.tokens, *done.tokens]
  packed = packing.pack([(row, [0] * 7 + [1] * 64)], length=len(row))
  batch = packed.lines | {"wanted_BT": packed.weight_BT > 0}
  score = policy_gradient.make_score(cfg=cfg, compute=compute, temperature=2.0)

  def total(params):
    logp_BT = score(params, batch)
    return jnp.sum(logp_BT), logp_BT

  grads, logp_BT = jax.jit(jax.grad(total, has_aux=True))(params)
  np.testing.assert_allclose(logp_BT[0, 7:], done.logp, atol=1e-5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


# --- What a row draws is its own affair ---


def test_order_slots_lanes_and_neighbours_change_no_sample(sample):
  want = sample(*three_groups())
  assert len({c.tokens for c in want.values()}) == len(want) == 10
  same(sample(*[group[::-1] for group in three_groups()[::-1]]), want)
  same(sample(*three_groups(), slots=3, lanes=3, chunk=3, prefill=1), want)
  unshared = {"prefix_room": 0, "prompt_room": 32, "max_new": 64}
  same(sample(*three_groups(), room=unshared), want)
  for group in three_groups():  # a group alone has all slots
    got = sample(group)
    same(got, {i: want[i] for i in got})
  few = requests()[3:1:-1]
  same(sample(few), {i: want[i] for i in (2, 3)})


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


def test_forks_are_prefilled_once(made, prepared, monkeypatch):
  """Those of the beginning, and those that are asked for when one is done."""
  engine, calls = made(), []
  real = engine.encode_rows
  monkeypatch.setattr(
    engine, "encode_rows", lambda *args: calls.append(1) or real(*args)
  )
  rows = requests([PROMPTS[1]] * 5 + [PROMPTS[3]] * 4, max_new=3)

  def more(done):
    if done.request.row_id >= 20:
      return []
    return [dataclasses.replace(done.request, row_id=done.request.row_id + 10)]

  done = engine.run(
    prepared, [rows], key=jax.random.key(0), temperature=1.0, more=more, **ROOM
  )
  assert len(list(done)) == 27
  assert len(calls) == 1


def test_an_idle_lane_takes_half_of_a_queue(cfg, compute, prepared, monkeypatch):
  """Of two lanes, one with sixteen rows and one with one, none is left idle."""
  shapes = dataclasses.replace(SHAPES, chunk=1)
  engine = sampler.Sampler(cfg=cfg, compute=compute, stop_ids=(), sampler=shapes)
  calls = collections.Counter()

  def counted(name, real):
    return lambda *args: calls.update([name]) or real(*args)

  for name in ("encode_prefix", "chunk"):
    monkeypatch.setattr(engine, name, counted(name, getattr(engine, name)))
  many = requests([(*HEAD, i) for i in range(20, 36)], max_new=10)
  one = requests(LONG[:1], ids=[99], max_new=10)
  run = functools.partial(engine.run, prepared, temperature=1.0, **ROOM)
  assert len(list(run([many, one], key=jax.random.key(0)))) == 17
  assert calls["encode_prefix"] == 2
  assert calls["chunk"] <= 60  # a lane alone takes 16 rows of 10 tokens in 80 steps


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
  """Of their own group, also when the group is the last one of its lane."""

  def more(done):
    i = done.request.row_id
    again = Request(tokens=done.request.tokens, row_id=i + 100, max_new=64)
    return [again] if i < 200 else []

  got = sample(*three_groups(), more=more)
  ids = [r.row_id for group in three_groups() for r in group]
  assert sorted(got) == [i + n for n in (0, 100, 200) for i in ids]
  for group in three_groups():
    rows = [dataclasses.replace(r, row_id=r.row_id + 200) for r in group]
    same({r.row_id: got[r.row_id] for r in rows}, sample(rows))


def test_what_does_not_fit_is_refused(sample, cfg):
  with pytest.raises(ValueError, match="max_new of a request is 1..64, got 65"):
    sample(requests(max_new=65))
  with pytest.raises(ValueError, match="max_new of a request is 1..64, got 0"):
    sample(requests(max_new=0))
  with pytest.raises(ValueError, match="24 tokens beyond the shared prefix"):
    sample(requests([HEAD + tuple(range(30, 55)), HEAD + (3,)]))
  most = cfg.max_length - 64
  with pytest.raises(ValueError, match=f"{cfg.max_length + 1} tokens, and the model"):
    sample(requests([(3,) * (most + 1)]), room=ROOM | {"prompt_room": cfg.max_length})
  odd = Request(tokens=(1, 2, 3), row_id=9, max_new=4)
  with pytest.raises(ValueError, match="request 9 does not begin with the 6 tokens"):
    sample(requests(max_new=2), more=lambda _: [odd])
  with pytest.raises(ValueError, match="lanes: wanted a divisor of slots = 4, got 3"):
    dataclasses.replace(SHAPES, lanes=3)
  assert sample() == sample([]) == {}


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
    tails = [tuple(range(start + i, start + i + n)) for i, n in enumerate(sizes)]
    prompts = [HEAD[: start % 7] + tail for tail in tails]
    return requests(
      prompts, max_new=7 + start % 3, ids=range(start, start + len(sizes))
    )

  # Own parts of up to 8 tokens, and of up to 16; one group, and more than one.
  for sizes in ([2, 3], [12, 3]):
    sample(rows(sizes, 20))
    sample(rows(sizes, 20), rows(sizes, 30))
  engine = made()
  programs = engine.encode_prefix, engine.encode_rows, engine.insert, engine.start
  before = [f._cache_size() for f in (*programs, engine.chunk)]
  for n, sizes in enumerate(([1, 9, 15, 2, 2], [7], [16, 16, 3, 1, 1, 1, 8])):
    groups = [rows([*sizes, 1], start) for start in range(30, 50, 10)[:n]]
    sample(*groups, rows([2], 60), temperature=0.5 * n, seed=n)
  assert [f._cache_size() for f in (*programs, engine.chunk)] == before


def test_the_decode_loop_copies_no_cache(made, prepared, cfg):
  """A copy of a ring or of a prompt's cache at every token would cost more than it."""
  engine = made()
  slots = engine.empty(SHAPES.slots, 16, 64)
  prefixes = Prefixes(kv=engine._cache(2, 8), length_A=jnp.full(2, 6))
  lowered = engine.chunk.lower(prepared.decode, prefixes, slots, jnp.float32(1))
  program = lowered.compile().as_text()
  caches = r"= f32\[[24],2,(?:12,\d+|\d+,12)\]\S* "
  used = re.findall(caches + r"(?:\w*fusion|dynamic-update-slice)\(", program)
  assert len(used) >= 4
  copies = re.findall(caches + r"[\w-]*copy[\w-]*\(.*", program)
  assert not copies, copies
