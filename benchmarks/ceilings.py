"""What this machine can do at best: rates of matrix products and of reading memory.

Run as a process of its own; prints one JSON object, GFLOP/s and GB/s. The best of some
repeats is the ceiling: a shared machine only ever makes them look lower.
"""

from concurrent import futures
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turn

SHAPES = (4096, 576, 1536), (4096, 1536, 576), (2048, 2048, 2048)
BYTES = 2**30


def best(fn, seconds: float = 3.0) -> float:
  """The shortest of the runs of fn that fit in some seconds, at least five."""
  fn()
  turn.wait_until_quiet()
  times, end = [], time.perf_counter() + seconds
  while len(times) < 5 or time.perf_counter() < end:
    at = time.perf_counter()
    fn()
    times.append(time.perf_counter() - at)
  return min(times)


def products() -> dict[str, float]:
  """GFLOP/s of the fastest of the shapes: float32 by numpy's BLAS and by XLA, and
  bfloat16 operands with float32 sums by XLA."""
  found = {"f32": 0.0, "bf16": 0.0}

  def take(kind, shape, fn):
    rate = 2.0 * np.prod(shape) / best(fn) / 1e9
    found[kind] = max(found[kind], float(rate))

  rng = np.random.default_rng(0)
  dot = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
  for shape in SHAPES:
    M, K, N = shape
    x = rng.standard_normal((M, K), dtype=np.float32)
    w = rng.standard_normal((K, N), dtype=np.float32)
    if jax.default_backend() == "cpu":
      take("f32", shape, lambda: x @ w)  # noqa: B023
    for kind, dtype in (("f32", jnp.float32), ("bf16", jnp.bfloat16)):
      a, b = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
      take(kind, shape, lambda: dot(a, b).block_until_ready())  # noqa: B023
  return found


def reading() -> float:
  """GB/s of reading memory, all threads together."""
  if jax.default_backend() != "cpu":
    total, data = jax.jit(jnp.sum), jnp.ones(BYTES // 4, jnp.float32)
    return BYTES / best(lambda: total(data).block_until_ready()) / 1e9
  parts = np.array_split(np.ones(BYTES // 4, np.float32), turn.THREADS)
  with futures.ThreadPoolExecutor(turn.THREADS) as pool:
    return BYTES / best(lambda: list(pool.map(np.max, parts))) / 1e9


if __name__ == "__main__":
  device = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
  print(json.dumps({"gflops": products(), "gb_s": reading(), "device": device}))
