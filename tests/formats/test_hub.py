"""Models by their names on the Hub: which revision is read, and what of it."""

import functools
import json
import pathlib
import shutil

import huggingface_hub
from huggingface_hub import utils
import jax
import pytest

from dalign import stages
from dalign.formats import hub
from dalign.formats import weights
from dalign.models import adapters
from dalign.text import vocab
from tests.formats.test_weights import CFG
from tests.helpers import tiny

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  """A cache of the Hub with two commits of own/model; main is the first. There is no
  network."""
  monkeypatch.chdir(tmp_path)
  place = tmp_path / "hub" / "models--own--model"
  for seed, commit in enumerate((FIRST, SECOND)):
    folder = place / "snapshots" / commit
    weights.save_hf(
      folder, CFG, weights.random_model(CFG, seed), vocab.tiny_tokenizer()
    )
  (place / "refs").mkdir()
  (place / "refs" / "main").write_text(FIRST)
  real = huggingface_hub.snapshot_download

  def offline(*args, local_files_only, **more):
    return real(*args, cache_dir=place.parent, local_files_only=True, **more)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
  return place


def head(path: str) -> float:
  return float(weights.find(path).params()["head"][0, 0])


def test_a_name_is_read_at_its_revision(cache):
  seeds = [float(weights.random_model(CFG, seed)["head"][0, 0]) for seed in (0, 1)]
  assert head("own/model") == head("own/model@main") == seeds[0]
  assert head(f"own/model@{SECOND}") == seeds[1]
  assert weights.origin(f"own/model@{SECOND}")["base_model"] == "own/model"
  assert hub.cached("own/model") and not hub.cached("own/other")
  shutil.copytree(cache / "snapshots" / SECOND, "own/model")
  assert head("own/model") == seeds[1]  # a folder goes first


def test_only_settings_and_safetensors_of_the_model_are_taken(monkeypatch, tmp_path):
  asked = {}

  def download(name, **how):
    asked.update(how, name=name)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  hub.folder("own/model@v1")
  assert (asked["name"], asked["revision"]) == ("own/model", "v1")
  files = ["config.json", "tokenizer.json", "chat_template.jinja", "README.md"]
  files += ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
  other = ["pytorch_model.bin", "modeling_x.py", "consolidated.safetensors"]
  other += ["original/params.json", "onnx/model.safetensors", "x.gguf"]
  patterns = {n: asked[n] for n in ("allow_patterns", "ignore_patterns")}
  assert [*utils.filter_repo_objects(files + other, **patterns)] == files


@pytest.mark.parametrize("path", ["own/model@main", "own/other", "own/other@v2"])
def test_what_cannot_be_had_is_one_line(path, monkeypatch, tmp_path):
  def download(*args, **how):
    raise ConnectionError("no\nroute")

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  name = path.partition("@")[0]
  with pytest.raises(ValueError, match=f"{path}.*no route.*`hf download {name}`") as no:
    weights.find(path)
  assert "\n" not in str(no.value)


def test_paths_are_no_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  paths = ("random", "pip:llm-x", "/a/b", "~/a/b", "../a", "a/b/c", "a/b.gguf", "a/")
  assert not any(map(hub.named, paths))
  assert all(map(hub.named, ("Qwen/Qwen3-8B", "a/b@refs/pr/1", f"a/b@{FIRST}")))


def test_a_run_keeps_the_commit_that_it_began_with(cache, monkeypatch):
  read = []
  monkeypatch.setitem(
    stages.STAGES, "export", lambda run: read.append(run.model.base_params())
  )

  def run(workdir: str, path="own/model") -> str:
    cfg = tiny(**{"stages": "export", "model.path": path})
    stages.run(cfg, pathlib.Path(workdir))
    return json.loads((pathlib.Path(workdir) / "config.json").read_text())["model.path"]

  assert run("one") == f"own/model@{FIRST}"
  (cache / "refs" / "main").write_text(SECOND)
  assert run("one") == f"own/model@{FIRST}"
  assert run("other") == f"own/model@{SECOND}"
  assert run("third", f"own/model@{FIRST}") == f"own/model@{FIRST}"
  heads = [float(params["head"][0, 0]) for params in read]
  assert heads[0] == heads[1] == heads[3] != heads[2]


def test_adapters_name_their_base_and_its_commit(cache, tmp_path):
  lora = tiny().lora
  lora = type(lora)(**vars(lora) | {"rank": 2, "alpha": 4.0})
  made = adapters.attach(
    weights.random_model(CFG, 0), jax.random.key(0), cfg=CFG, lora=lora
  )
  save = functools.partial(weights.save_peft, cfg=CFG, layers=made["layers"], lora=lora)
  save(str(tmp_path / "a"), base=f"own/model@{SECOND}")
  told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
  assert (told["base_model_name_or_path"], told["revision"]) == ("own/model", SECOND)
  assert head(str(tmp_path / "a")) == head(f"own/model@{SECOND}")
