"""SIGTERM, the notice of machines taken back: a run stops, and loses nothing."""

from collections.abc import Iterator
import contextlib
import signal


class Stopped(BaseException):
  """SIGTERM came. No Exception, which libraries may catch: JAX goes on after any while
  it reads its compile cache."""


_held, _asked = 0, False


def listen() -> None:
  """Has SIGTERM raise Stopped in the main thread, at once or when `whole` ends."""
  signal.signal(signal.SIGTERM, _stop)


def _stop(*_) -> None:
  global _asked
  if not _held:
    raise Stopped
  _asked = True


@contextlib.contextmanager
def whole() -> Iterator[None]:
  """What is done inside is done to its end before a SIGTERM stops the run."""
  global _held, _asked
  _held += 1
  try:
    yield
  finally:
    _held -= 1
  if _asked and not _held:
    _asked = False
    raise Stopped
