"""One run in several processes, of one host each: all take the same steps on the same
data and one mesh, and what has to happen once, as writing a file, the first one does.

What a process alone decides, it must tell the others (`broadcast`), and what the first
has written, they read after `barrier`. Without `start` there is one process, and
nothing here costs anything.
"""

from collections.abc import Callable
import json
import os
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

ADDRESS_VARIABLE = "JAX_COORDINATOR_ADDRESS"
HEARTBEAT_VARIABLE = "DALIGN_HEARTBEAT_SECONDS"
GRACE_S = 5.0


def start() -> None:
  """Joins the others: those of JAX_COORDINATOR_ADDRESS (host:port of the first),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID, or of the cluster that JAX finds itself in.

  A process that is not heard of for DALIGN_HEARTBEAT_SECONDS (60) ends all others.
  Raises ValueError where there is no cluster to be found.
  """
  given: dict[str, Any] = {}
  for name in ("num_processes", "process_id"):
    value = os.environ.get(f"JAX_{name.upper()}")
    if value is not None:
      given[name] = _parse_int(f"JAX_{name.upper()}", value)
  seconds = _parse_int(HEARTBEAT_VARIABLE, os.environ.get(HEARTBEAT_VARIABLE, "60"))
  try:
    jax.distributed.initialize(
      **given,
      heartbeat_timeout_seconds=seconds,
      shutdown_timeout_seconds=seconds,
    )
  except ValueError as error:
    raise ValueError(
      f"cannot join other processes: {error} Set {ADDRESS_VARIABLE}, "
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start on a cluster that JAX knows."
    ) from error


def _parse_int(name: str, value: str) -> int:
  if not value.isdecimal():
    raise ValueError(f"{name}: wanted a whole number, got {value!r}")
  return int(value)


def is_multi_process() -> bool:
  """Whether this run is of more than one process."""
  return jax.process_count() > 1


def is_first_process() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def barrier(where: str) -> None:
  """Waits for all others to come here; RuntimeError where one has come elsewhere."""
  if is_multi_process():
    multihost_utils.sync_global_devices(where)


def broadcast(value: Any) -> Any:
  """The first process's value, JSON-serialisable, broadcast to all processes."""
  if not is_multi_process():
    return value
  payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(payload))))
  payload = np.resize(payload, length)
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(payload)).decode())


def check_same(what: str, value: Any) -> None:
  """ValueError in a process whose value is not the first's."""
  if broadcast(value) != value:
    raise ValueError(
      f"this process has another {what} than the first; give all the same flags"
    )


def run_on_first(where: str, do: Callable[..., object], *args) -> None:
  """Has the first process do something, and the others wait until it is done."""
  if is_first_process():
    do(*args)
  barrier(where)


def gather(x) -> np.ndarray:
  """The whole array as numpy, gathered from all processes that hold parts of it."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def exit_process(code: int) -> None:
  """Ends this process, and with an exit code other than 0 all others in time.

  Python's own way out would wait for them. The first goes last, whose end cuts off the
  words of the others.
  """
  if not jax.distributed.is_initialized():
    sys.exit(code)
  if code == 0:
    jax.distributed.shutdown()
    sys.exit(0)
  sys.stdout.flush()
  sys.stderr.flush()
  if is_first_process():
    time.sleep(GRACE_S)
  os._exit(code)
