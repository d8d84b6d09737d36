"""The plan: its work, its memory against what a run takes, and what fits."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalign.config import convert
from dalign.config import stages as declared
from dalign.config.model import ModelConfig
from dalign.config.schema import Config
from dalign.formats import weights
from dalign.models import adapters
from dalign.models import param_tree
from dalign.models import transformer
from dalign.tools import plan
from tests import helpers
from tests.helpers import MODEL
from tests.helpers import ROOT
from tests.helpers import config_file
from tests.helpers import opened
from tests.helpers import tiny

PHASES = [
  *("generate prefill", "generate decode", "sft update", "student prefill"),
  *("student decode", "student score", "teacher", "distill update", "reward update"),
  *("rollout prefill", "rollout decode", "score", "reward score", "rl update"),
]


@pytest.mark.parametrize("passes", [1, 3])
def test_flops_are_those_that_the_compiler_counts(compute, passes):
  """Of one layer, as it counts the body of a loop once; of three, an update's."""
  cfg = dataclasses.replace(MODEL, layers=1, width=64, ffw=256, vocab=512)
  B, T = 2, 64
  where = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.full((B, T), T, np.int32)

  def loss(params):
    tokens_BT = np.zeros((B, T), np.int32)
    hidden_BTD, _ = transformer.forward(
      params, tokens_BT, *where, cfg=cfg, compute=compute
    )
    logits_BTV = transformer.logits(params, hidden_BTD, cfg=cfg, compute=compute)
    return jnp.sum(logits_BTV**2)

  program = jax.jit(loss if passes == 1 else jax.grad(loss))
  counted = program.lower(weights.random_model(cfg, 0)).compile().cost_analysis()
  made = passes * plan.forward_flops(cfg, B * T, seen=T, predicted=B * T)
  assert made == pytest.approx(counted["flops"], rel=0.05)


def test_a_token_pays_for_its_experts_and_windows_alone():
  def flops(seen=100, **changes):
    cfg = dataclasses.replace(MODEL, **changes)
    return plan.forward_flops(cfg, 1, seen=seen, predicted=0)

  mlp = 2 * 2 * 3 * MODEL.width * MODEL.ffw  # of both layers
  routed = flops(experts=8, experts_used=2) - flops()
  assert routed == mlp + 2 * 2 * MODEL.width * 8  # one more expert, and the router
  pair = 4 * MODEL.heads * MODEL.head_dim
  assert flops() - flops(window=9, sliding=(1,)) == pair * (100 - 9)
  assert flops(seen=5, window=9, sliding=(1,)) == flops(seen=5)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
  """The plan of the tiny config on eight devices."""
  workdir = tmp_path_factory.mktemp("plan")
  some = {"plan.chip": "h200", "plan.price": 2.0, "mesh.fsdp": 2}
  cfg = tiny(**some, **{"generate.teacher": "base"})
  plan.plan(cfg, workdir)
  assert [path.name for path in workdir.iterdir()] == ["plan.json"]
  return json.loads((workdir / "plan.json").read_text())


def test_every_phase_is_planned(found):
  rows = found["phases"]
  assert [row["phase"] for row in rows] == PHASES
  for row in rows:
    assert row["fits"] and row["flops"] > 0 and row["seconds"] > 0
    assert row["total"] >= row["parameters"] + row["optimizer"] + row["cache"]
  seconds = sum(row["seconds"] * row["calls"] for row in rows)
  assert found["chip_hours"] == pytest.approx(seconds * 8 / 3600)
  assert found["cost"] == pytest.approx(found["chip_hours"] * 2)
  assert found["mesh"] == dict(data=4, fsdp=2, tensor=1, sequence=1, expert=1)


def test_parts_are_those_of_the_arrays(found):
  """Parameters and moments over fsdp, the caches of the sampler over rows."""
  cfg = tiny()
  rows = {row["phase"]: row for row in found["phases"]}
  run = opened(cfg, pathlib.Path("unused"))
  width, layers = run.model.arch.width, run.model.arch.layers
  whole = 4 * sum(x.size for x in jax.tree.leaves(run.model.shapes))
  cut = whole - 4 * (2 * layers + 1) * width  # norms are not cut by rows of devices
  update = rows["sft update"]
  assert cut / 2 <= update["parameters"] < 0.55 * whole
  assert update["optimizer"] == pytest.approx(2 * update["parameters"], rel=0.01)
  s, decode = cfg.sampler, rows["rollout decode"]
  columns = s.prompt_room + cfg.rl.max_new
  kv = 2 * layers * run.model.arch.kv_heads * run.model.arch.head_dim * 4
  assert decode["cache"] >= s.slots / 8 * columns * kv
  assert decode["cache"] <= (s.slots / 8 * columns + s.prefix_step) * kv


def test_decoding_reads_its_weights_and_cache_for_every_token(found):
  rows = {row["phase"]: row for row in found["phases"]}
  decode, chunk = rows["generate decode"], tiny().sampler.chunk
  held = decode["parameters"] + decode["cache"]
  assert decode["bound"] == "memory"
  assert decode["seconds"] == pytest.approx(chunk * held / 4800e9)


TRUTH = """
import ctypes, dataclasses, pathlib, sys, time
import jax, numpy as np
from dalign.config import convert; from dalign.training import sft
from dalign.config import stages; from dalign.tools import plan
from tests.helpers import opened, tiny

cfg = tiny(stages="sft")
sizes = dict(cfg.model.random) | dict(
  width=384, layers=6, heads=6, kv_heads=3, head_dim=64, ffw=1536
)
cfg = convert.changed(cfg, {
  "model": {"random": sizes},
  "compute": {"remat": True, "dtype": "bfloat16"},
  "sft": {"batch": {"micro": 2, "rows": 2, "length": 512}},
})
run = opened(cfg, pathlib.Path(sys.argv[1]), stages.Plan)
sft_run = opened(cfg, pathlib.Path(sys.argv[1]), "sft")

def resident(key):
  for line in open("/proc/self/status"):
    if line.startswith(key):
      return int(line.split()[1]) * 1024

with jax.set_mesh(run.mesh):
  [phase] = [p for p in plan.phases(run) if p.name == "sft update"]
  planned = plan.row_of(phase, None, 1).total
  trainer = sft_run.trainer(
    params=run.model.base_params(), optimizer=cfg.sft.optimizer,
    loss=sft.make_loss(cfg=run.model.arch, compute=cfg.compute), steps=9, every=100,
  )
  batch = plan.lines_of(cfg.sft.batch)
  batch["weight_BT"] = np.ones_like(batch["weight_BT"])
  batch["ends_BT"][:] = cfg.sft.batch.length
  for _ in range(2):
    trainer.update(batch, 2)
  time.sleep(2)  # a step's numbers are there before its program has freed its memory
  ctypes.CDLL(None).malloc_trim(0)
  live, idle = sum(x.nbytes for x in jax.live_arrays()), resident("VmRSS")
  open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
  trainer.update(batch, 2)
print("real", live + resident("VmHWM") - idle, "planned", planned)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_is_what_a_run_takes(tmp_path):
  env = {"JAX_NUM_CPU_DEVICES": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed at once
  done = python("-c", TRUTH, str(tmp_path), **env)
  assert done.returncode == 0, done.stderr[-2000:]
  _, real, _, planned = done.stdout.split()[-4:]
  assert float(planned) == pytest.approx(float(real), rel=0.05), done.stdout


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
  chip = dataclasses.replace(plan.CHIPS["v5e"], memory=1000.0)
  monkeypatch.setitem(plan.CHIPS, "small", chip)
  wanted = "does not fit in .* sft update .* try compute.remat=true"
  with pytest.raises(ValueError, match=wanted):
    plan.plan(tiny(**{"stages": "sft", "plan.chip": "small"}), tmp_path)
  [row] = json.loads((tmp_path / "plan.json").read_text())["phases"]
  assert row["fits"] is False


def python(*args, **env) -> subprocess.CompletedProcess:
  """A process of its own, on a CPU."""
  here = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
  return helpers.python(*args, env=here | env)


def test_a_guess_of_the_policys_tokens_is_said_to_be_one(tmp_path, capsys):
  for path, guessed in (("random", False), (str(tmp_path / "absent"), True)):
    run = opened(tiny(**{"model.path": path}), tmp_path / path[-4:])
    assert plan._spec_room(run) > 0
    said = "by a guess of 4 characters a token" in capsys.readouterr().err
    assert said == guessed == (not run.model.has_files)


def test_a_judge_is_planned_with_room_for_thought_and_answer(tmp_path):
  changes = {"filter.judge": "sampled", "filter.max_new": 64, "stages": "filter"}
  cfg = tiny(**changes, **{"generate.max_new": 1024})
  prefill, decode = plan.phases(opened(cfg, tmp_path, declared.Plan))
  assert (prefill.name, decode.name) == ("judge prefill", "judge decode")
  _, prompt, fresh = decode.held["cache"]
  assert prompt[0][1].shape[2] >= cfg.sampler.prompt_room + 1024
  assert fresh[0][1].shape[2] == 64


@pytest.mark.parametrize(("frozen", "copies"), [("bfloat16", 1), ("float32", 0)])
def test_what_only_a_cpu_copies_is_not_planned_for_a_chip(frozen, copies, tmp_path):
  """A CPU reads matrices of bfloat16 as their bits, beside those of the model."""
  changes = {"lora.rank": 2, "lora.frozen": frozen, "compute.dtype": "bfloat16"}
  cfg = tiny(**changes, **{"generate.teacher": "base", "stages": "generate"})
  run = opened(cfg, tmp_path, declared.Plan)
  here, there = (
    plan.per_device(next(plan.phases(run, chip)).beside)
    for chip in (None, plan.CHIPS["h200"])
  )
  base = adapters.cast_frozen(run.model.base_params(), lora=cfg.lora)
  assert here - there == copies * sum(x.nbytes for x in jax.tree.leaves(base))


def test_unknown_chips_are_refused(tmp_path):
  with pytest.raises(ValueError, match="wanted a chip of v5e, v5p.*got 'v99'"):
    plan.plan(tiny(**{"plan.topology": "v99:2x2"}), tmp_path)


def test_a_slice_of_tpus_that_is_not_here(tmp_path):
  pytest.importorskip("libtpu", reason="no libtpu: pip install 'jax[tpu]'")
  config = f"--config={ROOT / 'configs' / 'tiny.py'}"
  flags = "--config.plan.topology=v5e:2x2", "--config.mesh.fsdp=2"
  command = "-m", "dalign.main", "--mode=plan", config, f"--workdir={tmp_path}"
  done = python(*command, *flags)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "plan.json").read_text())
  assert found["chips"] == 4
  assert [row["phase"] for row in found["phases"]] == PHASES
  assert all(row["seconds"] > 0 and row["bound"] for row in found["phases"])


def test_what_a_compiler_refuses_for_its_size_does_not_fit():
  said = "Ran out of memory on HBM, the total memory required for HLO temporaries "
  assert (
    plan._bytes_needed(f"{said}(36.02G) exceeds available HBM (15.75G).")
    == 36.02 * 2**30
  )
  said = "Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm."
  assert plan._bytes_needed(said) == 512.5 * 2**20
  assert plan._bytes_needed("INTERNAL: something else") is None


TOO_LARGE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from dalign.config.model import MeshConfig; from dalign.models import sharding
from dalign.tools import plan

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=1, tensor=1), chips)
everywhere = sharding.replicated(mesh)
x = jax.ShapeDtypeStruct((2**16, 2**17), jnp.float32, sharding=everywhere)
lower = lambda: jax.jit(lambda x: x + 1).lower(x)
row = plan.row_of(plan.Phase("large", lower, 1, 1, 1, {}), plan.CHIPS["v5e"], 4)
print(row.fits, row.total)
"""


def test_a_program_too_large_for_a_tpu_does_not_fit():
  pytest.importorskip("libtpu", reason="no libtpu: pip install 'jax[tpu]'")
  done = python("-c", TOO_LARGE)
  assert done.returncode == 0, done.stderr[-3000:]
  fits, total = done.stdout.split()[-2:]
  assert fits == "False" and float(total) >= 2**16 * 2**17 * 4


# --- configs/large.py ---

LARGE = config_file("large")
GPUS = {"qwen3_8b_8gpu": 8, "qwen3_8b_lora": 1}
PARAMETERS = {  # as their publishers count them, Gemma's without its eyes
  "Qwen3-8B": 8_190_735_360,
  "Qwen3-32B": 32_762_123_264,
  "Llama-3.1-8B-Instruct": 8_030_261_248,
  "Llama-3.3-70B-Instruct": 70_553_706_496,
  "gemma-3-27b-it": 27_009_346_304,
}


@pytest.mark.parametrize("model", LARGE.MODELS)
def test_sizes_of_large_models_are_the_published_ones(model):
  arch = convert.build(ModelConfig, LARGE.MODELS[model])
  shapes = jax.tree.leaves(
    param_tree.shapes(arch), is_leaf=lambda x: isinstance(x, tuple)
  )
  assert sum(map(math.prod, shapes)) == PARAMETERS[model]


@pytest.mark.parametrize("name", LARGE.PLACES)
def test_large_configs_use_all_chips_and_every_rollout(name):
  cfg = convert.build(Config, LARGE.get_config(name))
  _, _, shape = cfg.plan.topology.partition(":")
  chips = math.prod(map(int, shape.split("x"))) if shape else GPUS[name]
  assert math.prod(dataclasses.asdict(cfg.mesh).values()) == chips
  assert plan.indivisible_rows(cfg, cfg.mesh.data * cfg.mesh.fsdp) == []
  rollouts = cfg.rl.prompts * cfg.rl.samples  # those of capability among them
  assert rollouts == cfg.sampler.slots == cfg.rl.batch.micro * cfg.rl.batch.rows


def test_rows_that_a_mesh_does_not_divide_are_named():
  cfg = convert.build(Config, LARGE.get_config("qwen3_32b"))
  some = dataclasses.replace(cfg, reward=dataclasses.replace(cfg.reward, rows=64))
  assert plan.indivisible_rows(some, 128) == ["reward.rows = 64"]


@pytest.mark.e2e  # an hour and more
@pytest.mark.parametrize("name", [n for n, place in LARGE.PLACES.items() if place[1]])
def test_large_configs_fit_with_room(name, tmp_path):
  pytest.importorskip("libtpu", reason="no libtpu: pip install 'jax[tpu]'")
  config = f"--config={ROOT / 'configs' / 'large.py'}:{name}"
  done = python("-m", "dalign.main", "--mode=plan", config, f"--workdir={tmp_path}")
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "plan.json").read_text())
  for row in found["phases"]:
    assert row["total"] <= 0.9 * found["memory"], row
