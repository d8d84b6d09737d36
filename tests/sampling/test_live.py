"""Decoding for those who come at any time: the same tokens as in one go."""

import dataclasses

import jax
import pytest

from dalign.config.model import MeshConfig
from dalign.config.model import SamplerConfig
from dalign.models import sharding
from dalign.sampling import live
from dalign.sampling import sampler

SHAPES = SamplerConfig(
  slots=8, lanes=1, chunk=5, prefill=1, prompt_room=16, prompt_step=96, prefix_step=4
)
PROMPTS = (
  (11, 12, 13),
  (4, 5, 6, 7, 8, 9, 10),
  2 * tuple(range(20, 90)),  # more than the first slots have room for
  (3,),
  (9, 10),
  (70, 71, 72, 73),
)
MAX_NEW = (40, 7, 100, 90, 30, 64)  # beyond the first ring, and around it
STOP = 5


@pytest.fixture(scope="module")
def engine(cfg, compute):
  """`cfg` has room for 256 tokens."""
  return sampler.Sampler(cfg=cfg, compute=compute, stop_ids=(STOP,), sampler=SHAPES)


@pytest.fixture(scope="module")
def weights(engine, params):
  return engine.prepare(params)


def asks(temperature=1.0, gone=lambda: False) -> list[live.LiveRequest]:
  return [
    live.LiveRequest(
      tokens=t, row_id=i, max_new=n, temperature=temperature, cancelled=gone
    )
    for i, (t, n) in enumerate(zip(PROMPTS, MAX_NEW, strict=True))
  ]


def in_one_go(engine, weights, temperature=1.0) -> dict[int, sampler.Completion]:
  done = engine.run(
    weights,
    [asks()],
    key=jax.random.key(0),
    temperature=temperature,
    prefix_room=0,
    prompt_room=150,
    max_new=128,
  )
  return {c.request.row_id: c for c in done}


def arriving(at: dict[int, list[live.LiveRequest]]):
  """`come` of `live.run`: who comes before which chunk; ends when all have left."""
  turn = iter(range(1000))

  def come(idle: bool):
    now = next(turn)
    if idle and now > max(at):
      return None
    return at.get(now, [])

  return come


def ended(heard) -> dict[int, live.PartialCompletion]:
  last = {}
  for said in (said for chunk in heard for said in chunk):
    before = last.get(said.ask.row_id)
    if before:
      assert not before.finish and said.tokens[: len(before.tokens)] == before.tokens
    last[said.ask.row_id] = said
  return last


def run(engine, weights, come, most=8, tokens=10**6):
  key = jax.random.key(0)
  return live.run(engine, weights, come, key=key, max_rows=most, tokens=tokens)


@pytest.mark.parametrize("most", [8, 2])
def test_rows_that_come_and_go_draw_what_they_draw_in_one_go(engine, weights, most):
  """Slots grow from 1 to 4 to 8 with rows under way, prompts from 128 to 256, new
  tokens from 64 to 128; with two slots, rows wait for one."""
  want = in_one_go(engine, weights)
  a = asks()
  at = {0: a[:1], 2: a[1:2], 4: a[2:4], 5: a[4:]}
  got = ended(run(engine, weights, arriving(at), most))
  assert got.keys() == want.keys()
  for i, said in got.items():
    assert said.tokens == want[i].tokens, i
    assert said.finish == want[i].finish, i
  assert {s.finish for s in got.values()} == {"stop", "length"}
  assert max(len(s.tokens) for s in got.values()) > 2 * SHAPES.chunk


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_p": 1e-9}])
def test_each_row_has_its_own_temperature_and_nucleus(engine, weights, changes):
  hot, cold = in_one_go(engine, weights), in_one_go(engine, weights, 0.0)
  mixed = [
    dataclasses.replace(ask, **{} if i % 2 else changes) for i, ask in enumerate(asks())
  ]
  got = ended(run(engine, weights, arriving({0: mixed})))
  for i, said in got.items():
    assert said.tokens == (hot if i % 2 else cold)[i].tokens
  assert hot[0].tokens != cold[0].tokens


def test_one_who_leaves_frees_a_slot_and_changes_no_other(engine, weights):
  want = in_one_go(engine, weights)
  left = set()
  a = [
    dataclasses.replace(ask, cancelled=lambda i=i: i in left)
    for i, ask in enumerate(asks())
  ]
  come = arriving({0: a[:3], 1: a[3:]})
  got, chunks = {}, 0
  for chunk in run(engine, weights, come, most=2):
    chunks += 1
    got |= {said.ask.row_id: said for said in chunk}
    if chunks == 2:
      left |= {0, 5}  # one under way, one who waits
  assert not got[0].finish and 5 not in got
  for i in (1, 2, 3, 4):
    assert got[i].tokens == want[i].tokens


def test_slots_shrink_when_all_have_left(engine, weights):
  rows = live._LiveRows(engine, weights, jax.random.key(0), 8, 10**6)
  rows.waiting.extend(asks())
  while not rows.idle():
    rows.step()
  assert rows._shape == (8, 256, 128)  # six rows, 139 tokens, 100 new ones
  rows.waiting.extend(asks()[:1])
  (said,) = rows.step()
  assert rows._shape == (1, 128, 64)
  assert said.tokens == in_one_go(engine, weights)[0].tokens[: len(said.tokens)]


def test_who_has_no_room_waits(engine, weights):
  """A row of 139 and 100 tokens takes caches of 384; four short ones 4 * 192."""
  want = in_one_go(engine, weights)
  rows = live._LiveRows(engine, weights, jax.random.key(0), 8, 800)
  a = asks()
  rows.waiting.extend([a[0], a[1], a[2], a[3]])
  got, shapes = {}, []
  while not rows.idle():
    got |= {said.ask.row_id: said for said in rows.step()}
    shapes.append(rows._shape)
  assert {i: said.tokens for i, said in got.items()} == {i: want[i].tokens for i in got}
  assert len(got) == 4 and len(set(shapes)) > 1
  assert all(B * (P + S) <= 800 for B, P, S in shapes)
  alone = live._LiveRows(engine, weights, jax.random.key(0), 8, 10)
  alone.waiting.extend(a[:2])
  assert [said.ask.row_id for said in alone.step()] == [0]  # and the other waits


def test_a_mesh_gives_the_same_tokens(cfg, compute, params, engine, weights):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    meshed = sampler.Sampler(
      cfg=cfg, compute=compute, stop_ids=(STOP,), sampler=SHAPES, mesh=mesh
    )
    own = meshed.prepare(params)
    a = asks()
    got = ended(run(meshed, own, arriving({0: a[:2], 3: a[2:]})))
  want = in_one_go(engine, weights)
  for i, said in got.items():
    assert said.tokens == want[i].tokens
