"""Scripts of the shared cases, which know modules by the names of one folder."""

from collections.abc import Iterator
import contextlib
import importlib.util
import pathlib
import sys
import types

import pytest

import dalign
from dalign.config import convert
from dalign.config import model
from dalign.config import schema
from dalign.data import prompt_sets
from dalign.evaluation import evals
from dalign.formats import ggufs
from dalign.formats import weights
from dalign.judges import endpoint
from dalign.models import transformer
from dalign.policy import spec as specs
from dalign.runs import store
from dalign.serving import server
from dalign.stages import servers
from dalign.text import chat_template
from dalign.text import thinking
from dalign.text import vocab
from tests.helpers import opened


@contextlib.contextmanager
def modules() -> Iterator[None]:
  """Modules by the names of one folder, which the scripts of cases know them by."""

  def run(cfg, workdir, devices):
    found = opened(cfg, workdir, "eval")
    return types.SimpleNamespace(model=found.model, domain=found.task)

  def sample(run, *rest):
    return servers.to_sample(run.model, *rest)

  text = types.SimpleNamespace(**vars(chat_template) | vars(thinking))
  pipeline = types.ModuleType("dalign.pipeline")
  pipeline.context = types.SimpleNamespace(Run=run)
  pipeline.servers = types.SimpleNamespace(sample=sample)
  configs = types.SimpleNamespace(**vars(convert) | vars(model) | vars(schema))
  modules = {"config": configs, "data": prompt_sets, "text": text, "spec": specs}
  modules |= {"model": transformer, "serve": server, "pipeline": pipeline}
  modules |= {
    module.__name__.rpartition(".")[2]: module
    for module in (endpoint, evals, ggufs, store, vocab, weights)
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, module in modules.items():
      patch.setitem(sys.modules, f"dalign.{name}", module)
      patch.setattr(dalign, name, module, raising=False)
    yield


def load(path: pathlib.Path) -> types.ModuleType:
  """A script of the shared cases as a module."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  with modules():
    spec.loader.exec_module(module)
  return module
