"""Open models of 8B to 70B parameters on slices of TPUs, and on GPUs.

  python -m dalign.main --config=configs/large.py:qwen3_8b --workdir=runs/qwen3_8b \
    --distributed

on every host of the slice; first, anywhere, --mode=plan with `pip install 'jax[tpu]'`.
The model is read from ~/models/NAME, or from --config.model.path=DIR. None of these
models has been trained with this file: it says what fits, and learning rates to begin
with.

Plans of the SFT update, rows x 2,048 tokens, all parameters: memory in GiB of one chip.

  qwen3_8b        v5e-64   64 rows    9.4 of 15.8
  llama31_8b      v5e-256  256 rows   6.6 of 15.8
  llama31_8b_v6e  v6e-64   128 rows   9.9 of 31.3
  gemma3_27b      v5p-64   128 rows  28.9 of 95.7
  qwen3_32b       v5p-128  128 rows  17.6 of 95.7
  llama33_70b     v5p-256  128 rows  18.3 of 95.7

Of all phases (b39607a; qwen3_8b and llama33_70b before it) the largest, its GiB and
share of a chip:

  qwen3_8b        RL update         10.7   68%
  llama31_8b      RL update          7.2   46%
  llama31_8b_v6e  RL update         11.4   36%
  gemma3_27b      generate prefill  36.3   38%
  qwen3_32b       RL update         19.2   20%
  llama33_70b     RL update         21.9   23%
  qwen3_8b_lora   judge prefill     81.4   62%

Of all but the last, judges' phases, and the reward model that RL holds, were not
planned then, and RL had a quarter fewer rollouts; qwen3_8b_8gpu has not been planned.
The last (cd66765) is by a CPU's compiler, for an H200, with compute.attention="xla" and
compute.kv_dtype="float32", which holds the matrices it multiplies in float32 too. Of it
15.3 GiB are a copy of the base that a GPU does not make, and that is no longer counted:
what is left is 89% of 80 GB (74.5 GiB).
"""

import importlib.util
import pathlib

import ml_collections

_path = pathlib.Path(__file__).with_name("quickstart.py")
_spec = importlib.util.spec_from_file_location("quickstart", _path)
quickstart = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(quickstart)

# Sizes as in each model's config.json, for plans where its files are not.
QWEN3 = dict(
  family="qwen3",
  vocab=151936,
  kv_heads=8,
  head_dim=128,
  rope_theta=1e6,
  norm_eps=1e-6,
  tied=False,
  max_length=40960,
  qk_norm="head",
)
LLAMA3 = dict(
  family="llama",
  vocab=128256,
  kv_heads=8,
  head_dim=128,
  rope_theta=5e5,
  norm_eps=1e-5,
  tied=False,
  max_length=131072,
  rope=(
    ("factor", 8.0),
    ("high_freq_factor", 4.0),
    ("low_freq_factor", 1.0),
    ("original_max_position_embeddings", 8192),
    ("rope_type", "llama3"),
  ),
)
GEMMA3 = dict(
  family="gemma3_text",
  vocab=262208,
  kv_heads=16,
  head_dim=128,
  rope_theta=1e6,
  norm_eps=1e-6,
  tied=True,
  max_length=131072,
  activation="gelu",
  norms=("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"),
  qk_norm="head",
  query_scale=168**-0.5,
  embed_scale=5376**0.5,
  window=1024,
  sliding=tuple(i for i in range(62) if i % 6 != 5),
  rope=(("factor", 8.0), ("rope_type", "linear")),
  local_theta=1e4,
)
MODELS = {
  "Qwen3-8B": QWEN3 | dict(width=4096, layers=36, heads=32, ffw=12288),
  "Qwen3-32B": QWEN3 | dict(width=5120, layers=64, heads=64, ffw=25600),
  "Llama-3.1-8B-Instruct": LLAMA3 | dict(width=4096, layers=32, heads=32, ffw=14336),
  "Llama-3.3-70B-Instruct": LLAMA3 | dict(width=8192, layers=80, heads=64, ffw=28672),
  "gemma-3-27b-it": GEMMA3 | dict(width=5376, layers=62, heads=32, ffw=21504),
}

# Name: model, slice, axes of its mesh, lines of 2,048 tokens a step, rank of adapters.
PLACES = {
  "qwen3_8b": ("Qwen3-8B", "v5e:8x8", dict(fsdp=16, tensor=4), 64, 0),
  "llama31_8b": ("Llama-3.1-8B-Instruct", "v5e:16x16", dict(fsdp=64, tensor=4), 256, 0),
  "llama31_8b_v6e": ("Llama-3.1-8B-Instruct", "v6e:8x8", dict(fsdp=64), 128, 0),
  "gemma3_27b": ("gemma-3-27b-it", "v5p:4x4x4", dict(fsdp=64), 128, 0),
  "qwen3_32b": ("Qwen3-32B", "v5p:4x4x8", dict(fsdp=128), 128, 0),
  "llama33_70b": (
    "Llama-3.3-70B-Instruct",
    "v5p:4x8x8",
    dict(fsdp=64, tensor=4),
    128,
    0,
  ),
  "qwen3_8b_8gpu": ("Qwen3-8B", "", dict(fsdp=8), 64, 0),  # of 80 GB
  "qwen3_8b_lora": ("Qwen3-8B", "", {}, 8, 64),  # one GPU of 80 GB or more
}


def get_config(name: str = "qwen3_8b") -> ml_collections.ConfigDict:
  """The quickstart's stages for one of PLACES."""
  if name not in PLACES:
    raise ValueError(f"wanted configs/large.py:{'|'.join(PLACES)}, not {name}")
  model, topology, mesh, rows, rank = PLACES[name]
  # Rows that fsdp cannot divide evenly lie whole on each of its devices: 64 of them
  # over 128 took 99 GiB a chip in the reward update, 128 take 15.
  few = max(64, mesh.get("fsdp", 1)) if mesh else 8
  c = quickstart.get_config()
  c.recipe = f"large:{name}.v5"
  c.model = dict(path=f"~/models/{model}", date="", random=MODELS[model])
  c.compute = dict(
    dtype="bfloat16",
    kv_dtype="bfloat16",
    attention="splash" if topology else "cudnn",
    remat=True,
    logits_chunk=2048,
  )
  c.mesh = dict(data=1, fsdp=1, tensor=1, sequence=1, expert=1) | mesh
  c.lora = quickstart.lora(rank, frozen="bfloat16")  # as all of MODELS were saved
  c.sampler = dict(
    slots=4 * rows,
    lanes=16 if mesh else 4,
    chunk=16,
    prefill=few,
    prompt_room=512,
    prompt_step=128,
    prefix_step=256,
  )
  # Nothing below is tuned: no model of this size has been trained with it.
  c.think = dict(used=True, open="<think>\n", close="</think>")
  c.spec.detail = "full"
  c.generate.update(
    dict(
      prompts=dict(refuse=600, safe_complete=300, comply=900),
      helpful=200,
      capability=100,
      teacher="base",
      demonstrations=0,
      most=8,
      max_new=1024,
    )
  )
  c.filter.update(
    dict(
      judge="sampled", votes=4, readable=0.5, max_new=512, at_once=512, per_cell=1000
    )
  )
  c.sft.update(
    dict(
      recall_epochs=0,  # thoughts as they are: it needs no clause put first
      epochs=3,
      batch=dict(micro=1, rows=rows, length=2048),
      optimizer=quickstart.optimizer(2e-4 if rank else 1e-5),
    )
  )
  c.reward.update(
    dict(
      answer_weight=0.0,
      detail="full",
      steps=100,
      rows=few,
      length=1024,
      optimizer=quickstart.optimizer(1e-4 if rank else 5e-6),
    )
  )
  c.rl.update(
    dict(
      reward="model",
      expected=("refuse", "safe_complete", "comply"),
      steps=100,
      prompts=rows // 2,  # as many rollouts as slots
      capability=rows // 8,
      samples=8,
      temperature=1.0,
      max_new=1024,
      # Half the rows on a GPU: 8 left 8% of 80 GB.
      batch=(
        dict(micro=4, rows=rows, length=2048)
        if topology
        else dict(micro=8, rows=rows // 2, length=2048)
      ),
      optimizer=quickstart.optimizer(2e-5 if rank else 1e-6),
    )
  )
  c.eval.update(
    dict(max_new=1024, prompts=135, helpful=15, capability=40, budgets=(0, 128, 512))
  )
  chip = "" if topology else "h100" if mesh else "h200"
  c.plan.update(dict(topology=topology, chip=chip))
  return c
