"""Model families: how each differs from a plain Llama, and how its files name tensors.

A family is the model_type of a config.json. Reads settings as transformers' config
classes give them, which know each family's defaults; and names tensors. Reads no file.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any, Literal

from dalign.config.model import ModelConfig
from dalign.models import param_tree
from dalign.models import rotary

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
PRE, POST = ("attn_norm", "mlp_norm"), ("attn_post_norm", "mlp_post_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What all models of a family share.

  architecture: the class that config.json names.
  norms, qk_norm: as in `ModelConfig`.
  biased: matrices that have a bias whatever config.json says.
  renamed: leaf -> the module that holds it, where it is not a Llama's.
  norm_offset: what a norm's scale is above the number in the file.
  fused: q, k, v are one tensor, and gate and up another.
  experts: how experts lie: "each" in tensors of its own, or "joined" with gate and up
    in turns; "" for a family without.
  """

  architecture: str
  norms: tuple[str, ...] = PRE
  qk_norm: Literal["", "head", "all"] = ""
  biased: tuple[str, ...] = ()
  renamed: tuple[tuple[str, str], ...] = ()
  norm_offset: float = 0.0
  fused: bool = False
  experts: str = ""


GEMMA: dict[str, Any] = dict(
  norms=PRE + POST,
  renamed=(
    ("attn_post_norm", "post_attention_layernorm"),
    ("mlp_norm", "pre_feedforward_layernorm"),
  ),
  norm_offset=1.0,
)
OLMO: dict[str, Any] = dict(
  norms=POST,
  qk_norm="all",
  renamed=(("attn_post_norm", "post_attention_layernorm"),),
)
FAMILIES = {
  "llama": Family(architecture="LlamaForCausalLM"),
  "mistral": Family(architecture="MistralForCausalLM"),
  "ministral3": Family(architecture="Ministral3ForCausalLM"),
  "qwen2": Family(architecture="Qwen2ForCausalLM", biased=("q", "k", "v")),
  "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm="head"),
  "gemma2": Family(architecture="Gemma2ForCausalLM", **GEMMA),
  "gemma3_text": Family(architecture="Gemma3ForCausalLM", qk_norm="head", **GEMMA),
  "smollm3": Family(architecture="SmolLM3ForCausalLM"),
  "olmo2": Family(architecture="Olmo2ForCausalLM", **OLMO),
  "olmo3": Family(architecture="Olmo3ForCausalLM", **OLMO),
  "phi3": Family(architecture="Phi3ForCausalLM", fused=True),
  "qwen3_moe": Family(
    architecture="Qwen3MoeForCausalLM",
    qk_norm="head",
    experts="each",
    renamed=(("router", "mlp.gate"),),
  ),
  "gpt_oss": Family(
    architecture="GptOssForCausalLM",
    experts="joined",
    biased=("router", *MLP),
    renamed=(("router", "mlp.router"),),
  ),
}
_STATE = "most of its layers keep a recurrent state instead of keys and values"
_WIDTHS = "its layers differ in the width of their heads"
UNFIT = {  # model_type -> why it is none of the families
  "gemma4_text": _WIDTHS,
  "gemma4_unified_text": _WIDTHS,
  "olmo_hybrid": _STATE,
  "qwen3_5_text": _STATE,
  "qwen3_5_moe_text": _STATE,
  "qwen3_next": _STATE,
}
MODULES = {  # of a Llama, in model.layers.N
  "attn_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
  **{name: f"self_attn.{name}_proj" for name in ATTENTION},
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
  **{name: f"mlp.{name}_proj" for name in MLP},
}


# --- Settings ---


def of(model_type: str | None) -> Family:
  """The family of a config.json; ValueError says which there are."""
  known = f"known: {', '.join(FAMILIES)}"
  if model_type in UNFIT:
    raise ValueError(f"{model_type} is not supported: {UNFIT[model_type]}; {known}")
  if model_type not in FAMILIES:
    raise ValueError(f"unknown architecture {model_type!r}; {known}")
  return FAMILIES[model_type]


def read(settings: Any) -> ModelConfig:
  """Our config of a transformers config; ValueError for what we cannot compute."""
  family = of(settings.model_type)
  # A config class keeps keys that are other families', which its model does not read.
  own = {field.name for field in dataclasses.fields(settings)} | {"head_dim"}

  def get(name, default=None):
    found = getattr(settings, name, None) if name in own else None
    return default if found is None else found

  rope = dict(get("rope_parameters", {}))
  local = rope.get("sliding_attention")
  rope = dict(rope.get("full_attention", rope))
  theta = float(rope.pop("rope_theta"))
  if rope.pop("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError("config.json: rotary embedding of a part of the head width")
  if local and local.get("rope_type", "default") != "default":
    raise ValueError("config.json: scaled rotary embedding in layers that slide")
  if settings.model_type != "ministral3":
    rope.pop("llama_4_scaling_beta", None)  # which no other's attention reads
    rope = {} if rope.get("rope_type", "default") == "default" else rope
  sparse = bool(family.experts)
  if get("mlp_only_layers") or get("decoder_sparse_step", 1) != 1:
    raise ValueError("config.json: layers with and without experts in one model")
  if get("use_bidirectional_attention") or not getattr(settings, "is_causal", True):
    raise ValueError("config.json: use_bidirectional_attention, or is_causal=false")
  layers, window = settings.num_hidden_layers, get("sliding_window", 0)
  kinds = get("layer_types", ["sliding_attention" if window else ""] * layers)
  sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
  odd = set(kinds) - {"sliding_attention", "full_attention", ""}
  if odd:
    raise ValueError(f"config.json: layer_types {', '.join(sorted(odd))}")
  biased = ATTENTION if get("attention_bias") else ()
  biased += MLP if get("mlp_bias") and not sparse else ()
  scalar = get("query_pre_attn_scalar")
  gemma = family.norm_offset == 1.0
  # A key of Gemma 3's too, whose attention does not read it.
  cap = (
    0.0 if settings.model_type == "gemma3_text" else get("attn_logit_softcapping", 0)
  )
  cfg = ModelConfig(
    family=settings.model_type,
    vocab=settings.vocab_size,
    width=settings.hidden_size,
    layers=layers,
    heads=settings.num_attention_heads,
    kv_heads=get("num_key_value_heads", settings.num_attention_heads),
    head_dim=get("head_dim", settings.hidden_size // settings.num_attention_heads),
    ffw=get("moe_intermediate_size", settings.intermediate_size),
    rope_theta=theta,
    norm_eps=float(settings.rms_norm_eps),
    tied=bool(settings.tie_word_embeddings),
    max_length=settings.max_position_embeddings,
    activation=_activation(settings),
    norms=family.norms,
    qk_norm=family.qk_norm,
    biased=tuple(dict.fromkeys((*biased, *family.biased))),
    query_scale=None if scalar is None else scalar**-0.5,
    embed_scale=settings.hidden_size**0.5 if gemma else 1.0,
    attention_cap=float(cap),
    logit_cap=float(get("final_logit_softcapping", 0.0)),
    window=window if sliding else 0,
    sliding=sliding,
    rope=tuple(sorted(rope.items())),
    local_theta=float(local["rope_theta"]) if local else 0.0,
    unrotated=tuple(i for i, on in enumerate(get("no_rope_layers", ())) if not on),
    sinks=settings.model_type == "gpt_oss",
    experts=settings.num_local_experts if sparse else 0,
    experts_used=settings.num_experts_per_tok if sparse else 0,
    experts_normed=bool(get("norm_topk_prob", True)),
  )
  rotary.frequencies(cfg)  # what is not known of it is refused here
  return cfg


ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}


def _activation(settings: Any) -> Any:
  if settings.model_type == "gpt_oss":
    alpha, limit = settings.swiglu_alpha, settings.swiglu_limit
    if (alpha, limit) != (1.702, 7.0):
      raise ValueError(f"config.json: swiglu_alpha {alpha}, swiglu_limit {limit}")
    return "clipped"
  name = getattr(settings, "hidden_activation", None) or settings.hidden_act
  if name not in ACTIVATIONS:
    raise ValueError(
      f"config.json: activation {name!r}; known: silu, gelu_pytorch_tanh"
    )
  return ACTIVATIONS[name]


def settings(cfg: ModelConfig) -> dict[str, Any]:
  """The config.json of a model, but for what is of its tokenizer."""
  family = of(cfg.family)
  act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(
    cfg.activation, "silu"
  )
  rope = {"rope_theta": cfg.rope_theta, "rope_type": "default", **dict(cfg.rope)}
  types = [
    "sliding_attention" if i in cfg.sliding else "full_attention"
    for i in range(cfg.layers)
  ]
  if cfg.local_theta:
    local = {"rope_theta": cfg.local_theta, "rope_type": "default"}
    rope = {"full_attention": rope, "sliding_attention": local}
  out = {
    "architectures": [family.architecture],
    "model_type": cfg.family,
    "vocab_size": cfg.vocab,
    "hidden_size": cfg.width,
    "num_hidden_layers": cfg.layers,
    "num_attention_heads": cfg.heads,
    "num_key_value_heads": cfg.kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.ffw,
    "hidden_act": act,
    "rms_norm_eps": cfg.norm_eps,
    "rope_parameters": rope,
    "max_position_embeddings": cfg.max_length,
    "tie_word_embeddings": cfg.tied,
    "attention_bias": "o" in cfg.biased,
    "mlp_bias": not cfg.experts and "down" in cfg.biased,
  }
  # transformers 4 reads these.
  out |= {"rope_theta": cfg.rope_theta, "rope_scaling": dict(cfg.rope) or None}
  if cfg.local_theta:
    out["rope_local_base_freq"] = cfg.local_theta
  if cfg.family in ("qwen2", "qwen3", "smollm3", "qwen3_moe"):
    out["use_sliding_window"] = bool(cfg.sliding)
  typed = ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo3", "gpt_oss")
  if cfg.family in typed:
    out["layer_types"] = types
  if cfg.family not in ("llama", "olmo2"):
    out["sliding_window"] = cfg.window or None
  if cfg.family == "smollm3":
    out["no_rope_layers"] = [int(i not in cfg.unrotated) for i in range(cfg.layers)]
  if family.norm_offset:
    out |= {
      "hidden_activation": act,
      "query_pre_attn_scalar": cfg.head_dim
      if cfg.query_scale is None
      else _as_int(cfg.query_scale**-2),
      "attn_logit_softcapping": cfg.attention_cap or None,
      "final_logit_softcapping": cfg.logit_cap or None,
    }
  if cfg.experts:
    out |= {
      "num_experts": cfg.experts,
      "num_local_experts": cfg.experts,
      "num_experts_per_tok": cfg.experts_used,
      "norm_topk_prob": cfg.experts_normed,
      "moe_intermediate_size": cfg.ffw,
    }
  return out


def _as_int(x: float) -> int | float:
  return round(x) if abs(x - round(x)) < 1e-6 * abs(x) else x


# --- Tensors ---


def stored(cfg: ModelConfig) -> tuple[param_tree.Stored, ...]:
  """The tensors of a Hugging Face folder of this model."""
  family = of(cfg.family)
  offset = family.norm_offset
  top = [
    param_tree.Stored(
      name="model.embed_tokens.weight", leaves=("embed",), transposed=False
    ),
    param_tree.Stored(name="model.norm.weight", leaves=("norm",), offset=offset),
  ]
  if not cfg.tied:
    top.append(param_tree.Stored(name="lm_head.weight", leaves=("head",)))
  return (*top, *_layer(cfg, family))


def _layer(cfg: ModelConfig, family: Family) -> Iterator[param_tree.Stored]:
  front, left = "model.layers.{layer}.", [*param_tree.layer_leaves(cfg)]
  modules = MODULES | dict(family.renamed)

  def take(names, name, **more):
    for leaf in names:
      left.remove(leaf)
    return param_tree.Stored(name=front + name, leaves=names, **more)

  if family.fused:
    yield take(("q", "k", "v"), "self_attn.qkv_proj.weight")
    yield take(("gate", "up"), "mlp.gate_up_proj.weight")
  if family.experts == "joined":
    both, down, at = ("gate", "up"), ("down",), "mlp.experts."
    yield take(both, f"{at}gate_up_proj", transposed=False, mixed=True)
    yield take(down, f"{at}down_proj", transposed=False)
    biases = "gate_bias", "up_bias"
    yield take(biases, f"{at}gate_up_proj_bias", transposed=False, mixed=True)
    yield take(("down_bias",), f"{at}down_proj_bias", transposed=False)
  if family.experts == "each":
    for name in MLP:
      yield take((name,), f"mlp.experts.{{expert}}.{name}_proj.weight")
  if cfg.sinks:
    yield take(("sinks",), "self_attn.sinks")
  for name in tuple(left):
    if name.endswith("_bias"):
      yield take((name,), f"{modules[name.removesuffix('_bias')]}.bias")
    else:
      offset = family.norm_offset if name.endswith("norm") else 0.0
      yield take((name,), f"{modules[name]}.weight", offset=offset)
