"""The plan: work read off programs, memory against what a run takes, and what fits."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from dalign.config import convert
from dalign.config import stages as declared
from dalign.config.model import MeshConfig
from dalign.config.model import ModelConfig
from dalign.config.schema import Config
from dalign.models import adapters
from dalign.models import param_tree
from dalign.models import sharding
from dalign.tools import hlo
from dalign.tools import plan
from tests import helpers
from tests.helpers import ROOT
from tests.helpers import config_file
from tests.helpers import opened
from tests.helpers import tiny

PHASES = [
  *("generate prefill", "generate decode", "sft update", "student prefill"),
  *("student decode", "student score", "teacher", "distill update", "reward update"),
  *("rollout prefill", "rollout decode", "score", "reward score", "rl update"),
]


def text_of(fn, *args) -> str:
  return jax.jit(fn).lower(*args).compile().as_text()


def test_loops_count_as_often_as_they_run():
  x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))

  def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  one = 2 * 8 * 16 * 16
  assert hlo.cost(text_of(layers, x, w)).flops == 5 * one

  def often(n, x, w):
    return jax.lax.fori_loop(0, n, lambda _, x: layers(x, w), x)

  text = text_of(often, 3, x, w)
  assert hlo.cost(text, loops=(7,)).flops == 7 * 5 * one
  with pytest.raises(ValueError, match="how often"):
    hlo.cost(text)
  moved = [hlo.cost(text, loops=(n,)).moved for n in (1, 2, 3)]
  assert moved[1] - moved[0] == moved[2] - moved[1] > 4 * (5 * 16 * 16)


def test_what_is_cut_out_of_a_stack_is_read_once_a_turn():
  """Each turn of a scan reads one layer's matrix, not all of them."""
  few, many = (
    hlo.cost(
      text_of(
        lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0],
        jnp.ones((4, 64)),
        jnp.ones((n, 64, 64)),
      )
    ).moved
    for n in (10, 20)
  )
  assert 1.8 < many / few < 2.2


def test_a_loop_of_several_turns_in_one_runs_less_often():
  """Text as XLA's TPU compiler writes it: two turns of a loop to 8 in one."""
  text = """
%cond (p.1: (s32[], f32[4,4])) -> pred[] {
  %c.1 = s32[] constant(8)
  %p.1 = (s32[], f32[4,4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i.1, %c.1), direction=LT
}

%body (p.2: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %c.2 = s32[] constant(2)
  %p.2 = (s32[], f32[4,4]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %x.2 = f32[4,4]{1,0:T(8,128)S(1)} get-tuple-element(%p.2), index=1
  %next = s32[] add(%i.2, %c.2)
  %y = f32[4,4]{1,0:T(8,128)} convolution(%x.2, %x.2), dim_labels=bf_io->bf
  ROOT %t = (s32[], f32[4,4]) tuple(%next, %y)
}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]) tuple(%zero, %x)
  %loop = (s32[], f32[4,4]) while(%start), condition=%cond, body=%body
  ROOT %out = f32[4,4] get-tuple-element(%loop), index=1
}
"""
  found = hlo.cost(text)
  assert found.flops == 4 * 2 * 4**3
  # What lies on the chip (S(1)) is not read from memory; 4 sums and 4 results are.
  assert found.moved == 4 * (4 * 4 * 4 + 3 * 4)


def test_what_is_fetched_ahead_is_read_once():
  """Text as XLA's TPU compiler writes it: copies to the chip (S(1)) that others wait
  for."""
  text = """
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %all = (f32[8,4]{1,0}, f32[8,4]{1,0S(1)}, u32[]{S(2)}) copy-start(%x)
  %one = ((f32[8,4]{1,0}), f32[1,4]{1,0S(1)}, s32[]{S(2)}) slice-start(%x)
  %here = f32[8,4]{1,0S(1)} copy-done(%all)
  %row = f32[1,4]{1,0S(1)} slice-done(%one)
  ROOT %y = f32[8,4]{1,0S(1)} add(%here, %row)
}
"""
  assert hlo.cost(text).moved == 4 * (8 * 4 + 4)


@pytest.mark.parametrize(
  ("labels", "window", "left", "right", "out", "depth"),
  [
    ("0bf_io0->0bf", "{size=1}", "4,8,32", "32,16,1", "4,8,16", 32),
    # A batch of two as a padded window, and as one that is spread.
    ("0fb_0oi->0fb", "{size=2 stride=2 pad=1_1 rhs_reversal=1}", "2,8,4", "2,6,4",
     "2,8,6", 4),
    ("0bf_0io->0bf", "{size=2 lhs_dilate=2}", "2,8,4", "2,4,6", "2,8,6", 4),
    # Two parts of a width that are summed.
    ("1b0f_0io1->1bf0", "{size=2x1}", "4,8,2,16", "2,16,6,1", "4,8,6,1", 32),
    # The same, beside heads that are laid out by padding.
    ("0b2f1_1o2i0->0b1f2", "{size=1x2x2 pad=0_0x1_1x0_0 rhs_reversal=0x1x0}",
     "4,8,2,16,1", "2,6,2,16,1", "4,8,2,6,1", 32),
  ],
)  # fmt: skip
def test_a_convolution_is_a_matrix_product(labels, window, left, right, out, depth):
  text = f"""
ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}] parameter(0)
  %b = f32[{right}] parameter(1)
  ROOT %c = f32[{out}] convolution(%a, %b), window={window}, dim_labels={labels}
}}
"""
  size = 1
  for n in out.split(","):
    size *= int(n)
  assert hlo.cost(text).flops == 2 * size * depth


def test_collectives_are_counted_by_kind_and_size():
  mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
  rows = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("data")))

  def gathered(x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))

  links = hlo.cost(text_of(gathered, rows)).links
  assert links == {"all-gather": 3 * 2 * 16 * 4}  # each sends its part on, three times

  def summed(x):
    return jax.lax.with_sharding_constraint(x.sum(0), NamedSharding(mesh, P()))

  links = hlo.cost(text_of(summed, rows)).links
  assert links == {"all-reduce": 2 * 16 * 4 * 3 / 4}


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


def test_a_price_is_said_where_one_is_known():
  assert plan.bill(8, 0.0061, 0.0) == "8 chips; at least 0.006 chip-hours"
  assert plan.bill(8, 1.5, 2.0).endswith("at least 1.500 chip-hours, 3.00 at 2.0 each")


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


def test_operations_are_those_of_the_model(found):
  """The products of an update: three times forward's, on each of eight devices."""
  cfg, arch = tiny(), opened(tiny(), pathlib.Path("unused")).model.arch
  row = next(row for row in found["phases"] if row["phase"] == "sft update")
  shape, D, T = cfg.sft.batch, arch.width, cfg.sft.batch.length
  heads = (2 * arch.heads + 2 * arch.kv_heads) * arch.head_dim
  of_layers = arch.layers * 2 * D * (heads + 3 * arch.ffw)
  of_scores = arch.layers * 4 * arch.heads * arch.head_dim * T
  tokens = shape.micro * shape.rows * T
  least = 3 * tokens * (of_layers + of_scores / 2)
  most = 4 * tokens * (of_layers + of_scores + 2 * D * arch.vocab)
  assert least < 8 * row["flops"] < most


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
  planned = plan.row_of(phase, None).total
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


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_a_cure(tmp_path, monkeypatch):
  of_sft = {"stages": "sft", "plan.chip": "small", "sft.batch.length": 1024}
  smallest = {"compute.remat": True, "sft.batch.rows": 1, "mesh.data": 8}
  total = _total(tiny(**of_sft), tmp_path, monkeypatch)
  _memory(monkeypatch, 0.95 * total)
  with pytest.raises(ValueError, match=r"does not fit in .* sft update") as refused:
    plan.plan(tiny(**of_sft), tmp_path)
  flags = str(refused.value).split("it would with ")[1].split()
  cured = dict(flag.removeprefix("--config.").split("=") for flag in flags)
  cured = {name: json.loads(value) for name, value in cured.items()}
  assert _total(tiny(**of_sft, **cured), tmp_path, monkeypatch) <= 0.95 * total
  _memory(monkeypatch, 1000.0)
  with pytest.raises(ValueError, match="no single change"):
    plan.plan(tiny(**of_sft, **smallest), tmp_path)


def _memory(monkeypatch, memory: float) -> None:
  chip = dataclasses.replace(plan.CHIPS["v5e"], memory=memory)
  monkeypatch.setitem(plan.CHIPS, "small", chip)


def _total(cfg, workdir, monkeypatch) -> float:
  _memory(monkeypatch, 1e12)
  plan.plan(cfg, workdir)
  return json.loads((workdir / "plan.json").read_text())["phases"][0]["total"]


def python(*args, **env) -> subprocess.CompletedProcess:
  """A process of its own, on a CPU."""
  here = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
  return helpers.python(*args, env=here | env)


def command_line(workdir, *args) -> subprocess.CompletedProcess:
  config = f"--config={ROOT / 'configs' / 'tiny.py'}"
  command = "-m", "dalign.main", "--mode=plan", config, f"--workdir={workdir}"
  return python(*command, *args)


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
  done = command_line(tmp_path, "--config.plan.topology=v99:2x2")
  assert done.returncode == 2
  assert "wanted a chip of v5e, v5p" in done.stderr
  with pytest.raises(ValueError, match="got 'v99'"):
    plan.plan(tiny(**{"plan.chip": "v99"}), tmp_path)


def test_a_slice_of_tpus_that_is_not_here(tmp_path):
  pytest.importorskip("libtpu", reason="no libtpu: pip install 'jax[tpu]'")
  flags = "--config.plan.topology=v5e:2x2", "--config.mesh.fsdp=2"
  done = command_line(tmp_path, *flags)
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
row = plan.row_of(plan.Phase("large", lower, 1, 1, (), {}), plan.CHIPS["v5e"])
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
def test_large_configs_fit_with_room_and_are_bound_by_arithmetic(name, tmp_path):
  pytest.importorskip("libtpu", reason="no libtpu: pip install 'jax[tpu]'")
  config = f"--config={ROOT / 'configs' / 'large.py'}:{name}"
  done = python("-m", "dalign.main", "--mode=plan", config, f"--workdir={tmp_path}")
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "plan.json").read_text())
  for row in found["phases"]:
    assert row["total"] <= 0.9 * found["memory"], row
  [sft] = [row for row in found["phases"] if row["phase"] == "sft update"]
  assert sft["compute_share"] >= 0.5
