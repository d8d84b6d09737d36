"""SIGTERM, the notice of machines taken back: a run stops, and loses nothing."""

from collections.abc import Iterator
import contextlib
import signal
import sys


class Stopped(BaseException):
  """SIGTERM came. No Exception, which libraries may catch: JAX goes on after any while
  it reads its compile cache."""


_uninterrupted_depth, _stop_requested = 0, False


def install_handlers() -> None:
  """Has SIGTERM raise Stopped in the main thread, at once or when `uninterrupted` ends.
  A finalizer in which it comes ends without it: it is raised again after that."""
  signal.signal(signal.SIGTERM, _stop)
  signal.signal(signal.SIGALRM, _stop)
  ignored = sys.unraisablehook

  def again(unraisable) -> None:
    if issubclass(unraisable.exc_type, Stopped):
      signal.setitimer(signal.ITIMER_REAL, 0.01)  # when the finalizer is left
    else:
      ignored(unraisable)

  sys.unraisablehook = again


def _stop(*_) -> None:
  global _stop_requested
  if not _uninterrupted_depth:
    raise Stopped
  _stop_requested = True


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
  """What is done inside is done to its end before a SIGTERM stops the run."""
  global _uninterrupted_depth, _stop_requested
  _uninterrupted_depth += 1
  try:
    yield
  finally:
    _uninterrupted_depth -= 1
  if _stop_requested and not _uninterrupted_depth:
    _stop_requested = False
    raise Stopped
