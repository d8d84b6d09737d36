"""The policy world: the whole method from nothing, with ground truth, on a laptop.

  python -m dalign.main --config=configs/world.py --workdir=runs/world
  python -m dalign.main --config=configs/world.py:ablation --workdir=runs/ablation
  python -m dalign.main --config=configs/world.py:distill --workdir=runs/distilled
  python -m dalign.main --config=configs/world.py:noise --workdir=runs/noise
  python -m dalign.main --config=configs/world.py:headroom --workdir=runs/headroom
  python -m dalign.main --config=configs/world.py:deep --workdir=runs/deep

The first trains one model by SFT and RL, the second all arms, of one seed or more
(--config.ablation.seeds="(0,1,2)"), the third one by SFT on 300 rows and distillation.
The last three ask a question each: what the least of k votes is worth with a judge
that errs, what RL and distillation add to SFT on 300 rows, and what it costs to reason
over more clauses than SFT has seen (docs/results.md). All begin with the base that
comes with dalign; with --config.world.base=train each seed trains its own.

At d8a3184 the first took 3.6 minutes in a fresh clone and environment, on two CPU
cores beside other work. At b39607a, in a fresh clone on two CPU cores, all arms that
there were of seed 0 took 26.8 minutes, of which the stages of the first command 12.6
(base 559 s, generate 8, filter 19, SFT 32, RL 122, eval of one arm 13); three seeds,
beside other work, 104. In README.md is the table of these three; in short, held out,
the mean and each seed:

  base, spec in the prompt, SFT, SFT + RL:
  verdicts          36%, 100% (100, 100, 100), 99% (100, 100, 97), 100% (100, 100, 100)
  attacks refused   0%, 99% (100, 100, 97), 97% (98, 97, 94), 97% (97, 97, 95)
  allowed answered  100%, 100% (100, 100, 99), 97% (100, 100, 92), 100% (100, 100, 99)
  capability        100% each

Of :distill, seed 0: verdicts 78% after SFT, 98% after distillation (docs/results.md).
"""

import importlib.util
import pathlib

import ml_collections


def _load(name: str):
  """Another file of this folder."""
  path = pathlib.Path(__file__).with_name(f"{name}.py")
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


quickstart = _load("quickstart")

FAMILIES = {  # attacks and more that no stage after the base has seen
  "spelled": "spelled",
  "reversed": "reversed",
  "foreign": "foreign",
  "persona": "persona",
  "begin": "begin",
  "nested": "spelled+begin",
  "lookalike": "toy",
  # Not attacks: the specification in sight, and one with clauses turned.
  "told": "told",
  "edited": "edited",
}


def _arm(row: str, stages: str = "", takes=None, **changes) -> dict:
  """An arm: the row of eval that it is, its own stages, those it takes, and changes,
  as in rl__start="base"."""
  inside = {}
  for name, value in changes.items():
    part, _, field = name.partition("__")
    inside.setdefault(part, {})[field] = value
  return dict(
    row=row,
    stages=tuple(stages.split()),
    takes=takes or {},
    changes=inside,
  )


SFT = dict(sft="sft")
FEWER = (100, 300)
# A reward model of preferences, which never sees the specification.
PREFERENCES = dict(reward__detail="none", reward__point_weight=0.0, rl__reward="model")
DISTILL = quickstart.distillation(
  prompts=44,  # 38 of policies: as the trial of METHOD 9, which also has the rate
  capability=6,
  max_new=40,
  teacher_rows=16,
  teacher_length=512,
  batch=dict(micro=4, rows=16, length=256),
  optimizer=quickstart.optimizer(3e-3) | dict(final_share=0.0),
  checkpoint_every=20,
)
ABLATION = dict(
  seeds=(0,),
  shared=("base", "generate", "filter"),
  arms={
    "none": _arm("base"),
    "spec_in_prompt": _arm("spec_in_prompt"),
    "self_refine": _arm("self_refine"),
    "sft": _arm("sft", "sft"),
    "rl": _arm("rl", "rl", rl__start="base"),
    "sft_rl": _arm("sft_rl", "rl", SFT),
    "no_thoughts": _arm("sft", "sft", think__used=False),
    "distill": _arm("distill", "distill", distill__start="base"),
    # How many rows it takes, with thoughts and without.
    **{f"sft_{n}": _arm("sft", "sft", sft__most=n) for n in FEWER},
    **{
      f"no_thoughts_{n}": _arm("sft", "sft", sft__most=n, think__used=False)
      for n in FEWER
    },
    # What SFT on few rows leaves to be learned, by RL and by distillation.
    "sft_300_rl": _arm("sft_rl", "rl", dict(sft="sft_300")),
    "sft_300_distill": _arm("sft_distill", "distill", dict(sft="sft_300")),
    # As InstructGPT (2203.02155): demonstrations, then preferences.
    "rlhf": _arm(
      "sft_rl",
      "reward rl",
      dict(sft="no_thoughts"),
      think__used=False,
      reward__labels="rubric",
      **PREFERENCES,
    ),
    "constitutional": _arm(
      "sft_rl",
      "generate filter sft reward rl",
      generate__revise=True,
      think__used=False,
      **PREFERENCES,
    ),
    "thought_shown": _arm("sft_rl", "rl", SFT, reward__shows_thought=True),
  },
)


# RL at three times the rate.
FAST_RL = {
  "sft_300_rl_fast": _arm(
    "sft_rl", "rl", dict(sft="sft_300"), rl__optimizer=dict(learning_rate=1e-3)
  )
}


def _some_arms(*names: str) -> dict:
  """Arms of the ablation and the faster RL, over three seeds."""
  arms = {name: ABLATION["arms"][name] for name in names} | FAST_RL
  return ABLATION | dict(seeds=(0, 1, 2), arms=arms)


def _noise() -> dict:
  """What the least of k votes is worth, by the share of votes that are wrong: SFT on
  what a judge keeps that knows the truth and errs at that rate.

  errs_R_votes_K: R% of its votes are turned, and the least of K counts; without errors,
  "truth", K does not matter. ..._rows_300: SFT on 300 of the rows that are kept, since
  more votes leave fewer rows (eight leave fewer than that). likes_long_votes_8: no vote
  is turned, but all eight fall for answers of more than 8 words, which all safe
  completions are. own_votes_K: the base judges, as in the other recipes.
  """
  grid = {
    (rate, k): f"errs_{rate}_votes_{k}" for rate in (10, 30) for k in (1, 2, 4, 8)
  }
  equal = ["truth", *(grid[30, k] for k in (1, 2, 4))]
  habit = dict(rate=0.0, habit="long:8", habit_rate=1.0)

  def judged(votes: int, **changes) -> dict:
    return _arm("sft", "filter sft", filter__votes=votes, **changes)

  return dict(
    seeds=(0, 1, 2),
    shared=("base", "generate"),
    arms={
      "truth": judged(1),
      **{
        name: judged(k, world__judge_errors=dict(rate=rate / 100))
        for (rate, k), name in grid.items()
      },
      **{
        f"{name}_rows_300": _arm("sft", "sft", dict(filter=name), sft__most=300)
        for name in equal
      },
      "likes_long_votes_8": judged(8, world__judge_errors=habit),
      **{f"own_votes_{k}": judged(k, filter__judge="sampled") for k in (1, 8)},
    },
  )


FEW_ROWS = ("sft_300", "sft_300_rl", "sft_300_distill")
HEADROOM = _some_arms(*FEW_ROWS)
# What it costs to reason further than SFT has seen.
DEEP = _some_arms("none", "spec_in_prompt", *FEW_ROWS, "sft", "sft_rl", "no_thoughts")
ARMS = dict(
  ablation=ABLATION, short=ABLATION, noise=_noise(), headroom=HEADROOM, deep=DEEP
)
SIZES = ("distill", "noise", "headroom", "deep")
VERSIONS = dict(ablation=5, distill=2, noise=1, headroom=2, deep=1)


def get_config(which: str | None = None) -> ml_collections.ConfigDict:
  """SFT and RL in the world, or distillation in RL's place, or all arms, or "short":
  those that the method is made of, with less RL and fewer prompts; or the arms of a
  question; every number once, with its reason."""
  if which not in (None, "short", *VERSIONS):
    raise ValueError(
      "wanted configs/world.py, or with one of "
      f"{', '.join(f':{name}' for name in ('short', *VERSIONS))} behind it, not {which}"
    )
  c = ml_collections.ConfigDict()
  c.recipe = f"world:{which}.v{VERSIONS[which]}" if which in VERSIONS else "world.v4"
  if which == "short":
    c.recipe = ""  # nobody cites its numbers
  c.seed = 0
  c.stages = "base,generate,filter,sft,rl,eval,report"
  c.start_over = False
  c.thin = "say"
  c.model = dict(
    path="world",
    date="",
    random=dict(
      width=128,
      layers=3,
      heads=4,
      kv_heads=4,
      head_dim=32,
      ffw=384,
      rope_theta=100.0,
      norm_eps=1e-5,
      tied=True,
      max_length=1024,
      # With queries and keys normalised it finds clauses sooner: after 300 steps that
      # mostly read, the loss was 0.26 and not 0.30.
      family="qwen3",
      qk_norm="head",
    ),
  )
  c.compute = dict(
    dtype="bfloat16",
    kv_dtype="float32",
    attention="xla",
    remat=False,
    logits_chunk=4096,
  )
  c.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1, expert=1)
  # What SFT does not rehearse it loses where it changes all parameters: 77% of
  # capability were left, with adapters of rank 16 or 32 all of it, and 95 or 98% of
  # verdicts were right in place of 91%; rank 4 learned less, 74% (one seed).
  c.lora = quickstart.lora(rank=32)
  c.sampler = dict(
    slots=128,
    lanes=8,
    chunk=8,
    prefill=16,
    prompt_room=80,
    prompt_step=16,
    prefix_step=64,
  )
  c.think = dict(used=True, open="<think>", close="</think>")
  c.world = dict(
    spec=0,
    depth=1,
    base="bundled",  # seed 0 of the recipe below; "train" makes one of the run's seed
    # To look a clause up takes two layers that learn it together: read out most of a
    # policy first, one clause after the other, in an order that is asked for. In an
    # order that is always the same, one base of three read out 99.5% of clauses, and
    # found 90% of those that a thought needs. To compare roles likewise: weigh six
    # exceptions a row.
    first_lessons=dict(reading=0.7, weighing=0.15, rules=0.06, free=0.04, grading=0.05),
    first_share=0.26,
    lessons=dict(
      rules=0.31,
      free=0.22,
      grading=0.25,
      codes=0.1,
      revising=0.04,
      reading=0.04,
      weighing=0.04,
    ),
    # Real helpful-only models decline now and then; without it RL would have nothing
    # to find.
    declines=0.04,
    steps=1600,
    # Of two rows that read a policy out, a line of 192 tokens holds both. After 2300
    # steps of 10 lines (and a rate that ended at a tenth) 54% of the base's replies
    # followed the specification in sight, after 1250 of these 98%.
    batch=dict(micro=1, rows=32, length=192),
    # Reading alone, the loss after 320 steps of 16 lines was 0.11 with Muon and 0.22
    # with AdamW.
    optimizer=quickstart.optimizer(3e-3)
    | dict(matrix_rate=0.02, clip_norm=1e3, final_share=0.0),
    checkpoint_every=200,
    judge_errors=dict(rate=0.0, habit="", habit_rate=0.0),
  )
  c.spec = dict(dir="specs", detail="full")
  c.data = dict(source="world", columns={}, contaminated=0.05, dir="~/.cache/dalign")
  c.generate = dict(
    prompts=dict(refuse=400, safe_complete=400, comply=400),
    helpful=40,
    capability=0,
    demonstrations=0,
    teacher="base",
    endpoint=quickstart.NO_ENDPOINT,
    revise=False,
    batch=2,
    most=2,
    enough=2,
    threshold=1.0,
    refused=0.5,
    temperature=0.7,
    max_new=40,
  )
  c.filter = dict(
    endpoint=quickstart.NO_ENDPOINT,
    form="grade",
    judge="sampled",
    metadata="none",
    votes=2,
    readable=1.0,
    temperature=0.3,
    max_new=56,
    at_once=4096,
    unscored=0.2,
    threshold=1.0,
    least=0,
    per_prompt=1,
    per_cell=1000,
    quality=False,
  )
  c.sft = dict(
    epochs=8,
    spec_in_prompt=False,
    worked=False,
    most=10**6,
    capability=500,  # all there are: what is not rehearsed is lost first
    recall_epochs=0,
    average_share=0.0,
    leak_words=8,
    batch=dict(micro=1, rows=8, length=192),
    # With a rate of 1e-3, 68% of verdicts were right (rank 16, one seed).
    optimizer=quickstart.optimizer(3e-3) | dict(final_share=0.0),
    checkpoint_every=100,
  )
  c.distill = DISTILL if which else None
  c.reward = dict(
    start="base",
    labels="judge",
    drafts=True,
    shows_thought=False,
    detail="full",
    metadata="none",
    steps=200,
    rows=64,
    length=80,
    held_out=0.1,
    point_weight=1.0,
    pair_weight=1.0,
    answer_weight=0.0,
    optimizer=quickstart.optimizer(3e-3),
    checkpoint_every=100,
  )
  c.rl = dict(
    start="sft",
    # One judge for the filter and for RL (2412.16339).
    reward="judge",
    metadata="none",
    helpful="none",
    combine="product",
    steps=60,
    prompts=38,
    expected=("refuse", "safe_complete", "comply"),
    mixture={},
    capability=6,
    samples=8,
    temperature=1.0,
    max_new=40,
    resample=0,
    unscored=0.5,
    judge_errors=1.0,  # what rivals' preference models get wrong is a result
    scan_words=8,
    skip_kl=0.0,
    stop_kl=50.0,
    stop_gap=0.1,
    objective=quickstart.algorithms.of("rloo", length_norm=25.0, kl_weight=0.0),
    batch=dict(micro=4, rows=16, length=256),
    # With 1e-3 it forgot attacks that SFT withstood (90 to 85%, one seed).
    optimizer=quickstart.optimizer(3e-4) | dict(final_share=0.0),
    checkpoint_every=20,
    show_every=10,
    audit=0,
  )
  c.eval = dict(
    arms=("base", "spec_in_prompt", "sft", "sft_rl"),
    endpoint=quickstart.NO_ENDPOINT,
    grader=("rules",),
    grader_model="",
    grader_endpoint=dict(quickstart.NO_ENDPOINT),
    form="grade",
    grader_max_new=512,
    prompts=480,
    helpful=16,
    capability=96,
    samples=1,
    budgets=(0, 4, 8, 16),
    swaps=0,
    extra={
      name: dict(source=f"world:{forms}", columns={})
      for name, forms in FAMILIES.items()
    },
    suite=(),
    copies="",
    extra_limit=120,
    worst=0.1,
    least=0,
    unscored=0.2,
    temperature=0.5,
    top_p=1.0,
    max_think=0,
    max_new=40,
    trials=1000,
  )
  c.export = dict(of="rl", dtype="float32", shard_gb=4.0)
  c.log = dict(writers=("tensorboard",), project="dalign")
  c.profile = dict(steps=())
  c.plan = dict(topology="", chip="", price=0.0)
  c.ablation = ARMS.get(which)
  if which == "short":
    shown = ("none", "spec_in_prompt", "sft", "sft_rl", "no_thoughts")
    c.ablation.arms = {name: ABLATION["arms"][name] for name in shown}
    c.rl.steps = 20
    c.eval.update(dict(prompts=240, helpful=8, capability=48, budgets=()))
    c.eval.extra = {}
  if which == "noise":
    # So hot that some samples are wrong, which is what a judge is for: of 760 samples
    # (190 prompts, seed 100) 100% were right at 1.0, 90% at 1.5 and 24% at 2.0.
    c.generate.update(dict(batch=4, most=4, enough=4, temperature=1.65))
    # Of the 1200 prompts of the other recipes SFT learns all that there is.
    c.generate.prompts = dict(refuse=200, safe_complete=200, comply=200)
    c.filter.judge = "rubric"  # the truth
    c.sft.capability = 200
    c.eval.budgets = ()
    c.eval.extra = {name: c.eval.extra[name] for name in ("spelled", "begin")}
  if which == "deep":
    # Four conditions with an exception each: up to five clauses to consider, of which
    # training prompts need three.
    c.world.depth = 4
    c.world.batch.update(dict(rows=24, length=272))  # what is graded is longer
    # With 1600 steps, a quarter of them of reading, the base did what the specification
    # in sight says for 72% of prompts: it looked up the wrong one of twelve clauses.
    c.world.update(dict(steps=2400, first_share=0.3))
    c.sampler.prompt_room = 144
    c.generate.max_new = c.rl.max_new = c.distill.max_new = 80
    c.filter.judge = "rubric"  # the truth
    c.eval.update(dict(max_new=80, prompts=960, budgets=(0, 8, 16, 24, 32)))
  if which == "distill":
    c.stages = "base,generate,filter,sft,distill,eval,report"
    c.sft.most = 300  # of all rows SFT learns all there is
    c.eval.arms = ("base", "spec_in_prompt", "sft", "sft_distill")
    c.export.of = "distill"
  return c
