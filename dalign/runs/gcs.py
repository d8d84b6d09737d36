"""Google's client of gs://BUCKET/...: buckets, objects, and its errors as ours."""

from collections.abc import Iterator
import contextlib
import functools
import os

SCHEME = "gs://"
_RESUME_HINT = "what is there is kept, and the same command goes on from it"


def bucket_and_name(path) -> tuple[str, str]:
  """The bucket, and the name in it."""
  bucket, _, name = os.fspath(path).removeprefix(SCHEME).partition("/")
  return bucket, name


def blob(path):
  """The object of a path, whether it is there or not."""
  bucket, name = bucket_and_name(path)
  return cached_bucket(bucket).blob(name)


def open_bucket(name: str):
  """A bucket, with a client of its own; ValueError where it is not
  there or not ours, ConnectionError where it does not answer."""
  from google.auth import exceptions as auth
  from google.cloud import storage

  try:
    with translate_errors(SCHEME + name):
      return storage.Client().get_bucket(name)
  except FileNotFoundError:
    raise ValueError(f"{SCHEME}{name}: there is no such bucket") from None
  except ConnectionError as error:
    cause = error.__cause__
    if isinstance(cause, auth.TransportError):
      raise
    if isinstance(cause, auth.GoogleAuthError):
      raise ValueError(
        f"{SCHEME}{name}: wanted credentials of Google Cloud, by `gcloud auth "
        f"application-default login` or a service account: {_one_line_error(cause)}"
      ) from error
    if isinstance(cause, (api().Forbidden, api().Unauthorized)):
      raise ValueError(
        f"{SCHEME}{name}: these credentials may not use it; wanted storage.buckets.get "
        f"and its objects: {_one_line_error(cause)}"
      ) from error
    raise


cached_bucket = functools.cache(open_bucket)


@functools.cache
def prepare() -> None:
  """Checks for the libraries, and has them ask the bucket itself: gcsfs would keep
  lists of what was there, and etils take TensorFlow where that is installed."""
  try:
    import fsspec.config
    import gcsfs  # noqa: F401
    from google.cloud import storage  # noqa: F401
  except ImportError:
    raise ValueError(f'{SCHEME} needs more: pip install "dalign[gcs]"') from None
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  os.environ["EPATH_USE_TF"] = "false"


@contextlib.contextmanager
def translate_errors(path) -> Iterator[None]:
  """Turns errors of Google's client into FileNotFoundError or ConnectionError."""
  from google.auth import exceptions as auth
  from google.cloud.storage import exceptions as storage
  import requests

  try:
    yield
  except api().NotFound:
    raise FileNotFoundError(f"{path}: there is no such object") from None
  except (
    api().GoogleAPIError,
    auth.GoogleAuthError,
    requests.RequestException,
    storage.DataCorruption,
    storage.InvalidResponse,
  ) as error:
    raise ConnectionError(
      f"{path}: {_one_line_error(error)}; {_RESUME_HINT}"
    ) from error


def api():
  """The exceptions of Google's services, which take long to import."""
  from google.api_core import exceptions

  return exceptions


def _one_line_error(error: BaseException) -> str:
  return " ".join(f"{type(error).__name__}: {error}".split())[:300]
