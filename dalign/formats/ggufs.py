"""GGUF files: the architecture, tensors and tokenizer of a model in one file.

Tensors are given as Hugging Face orders them, matrices [out, in] and rotary halves
apart, and dequantised one at a time.
"""

import functools
import importlib.util
import pathlib
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from dalign.config.model import ModelConfig
from dalign.formats import families
from dalign.models import param_tree
from dalign.text import vocab
from dalign.text.chat_template import Tokenizer

ARCHITECTURES = {  # of files -> family
  "llama": "llama",
  "gemma3": "gemma3_text",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "qwen3moe": "qwen3_moe",
}
NAMES = {  # leaf -> block, in blk.N, where that of experts ends with "_exps"
  "attn_norm": "attn_norm",
  "q": "attn_q",
  "k": "attn_k",
  "v": "attn_v",
  "o": "attn_output",
  "q_norm": "attn_q_norm",
  "k_norm": "attn_k_norm",
  "attn_post_norm": "post_attention_norm",
  "mlp_norm": "ffn_norm",
  "gate": "ffn_gate",
  "up": "ffn_up",
  "down": "ffn_down",
  "mlp_post_norm": "post_ffw_norm",
  "router": "ffn_gate_inp",
}
HEAD = "output.weight"
# Keys that are read here, after the architecture's name or "tokenizer.ggml.", or that
# say nothing of the numbers; of any other what is not 0, false or empty is refused.
READ = {
  "llama": {
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.layer_norm_rms_epsilon", "attention.value_length", "block_count"),
    *("context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.finetuned", "tensor_data_layout"),
    "rope.scaling.original_context_length",
  },
  "tokenizer.ggml": {
    *("model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token"),
    *("add_space_prefix", "bos_token_id", "eos_token_id", "eot_token_id"),
    *("eom_token_id", "padding_token_id", "unknown_token_id", "mask_token_id"),
    *("seperator_token_id", "prefix_token_id", "suffix_token_id", "middle_token_id"),
    *(f"fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
  },
}
READ["gemma3"] = READ["llama"] | {"attention.sliding_window", "rope.freq_base_swa"}
READ["qwen2"] = READ["qwen3"] = READ["llama"]
READ["qwen3moe"] = READ["llama"] | {
  *("expert_count", "expert_used_count", "expert_feed_forward_length"),
}
# How Qwen's tokenizers split a text: words, digits, signs, and white space.
QWEN_SPLITS = "|".join(
  [
    r"(?i:'(?:s|t|re|ve|m|ll|d))",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
  ]
)


def packaged_file(name: str) -> pathlib.Path:
  """The GGUF file inside an installed package, found without importing it."""
  spec = importlib.util.find_spec(name.replace("-", "_"))
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(f"package {name!r} is not installed; run `pip install {name}`")
  files = sorted(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))
  if len(files) != 1:
    raise ValueError(f"package {name!r} holds {len(files)} .gguf files, wanted one")
  return files[0]


class _Reader(gguf.GGUFReader):
  """The reader, with the file as a plain array: views of a memmap take numpy several
  times as long, and reading a file makes hundreds of thousands of them."""

  @property
  def data(self) -> Any:
    return self._plain

  @data.setter
  def data(self, mapped: np.memmap) -> None:
    self._plain = np.asarray(mapped)


def describe(path: pathlib.Path) -> dict:
  """The keys "general.*" of a file, without their prefix: what it says of itself."""
  return {
    name.removeprefix("general."): field.contents()
    for name, field in _Reader(path).fields.items()
    if name.startswith("general.")
  }


class File:
  """An open GGUF file; ValueError says what of it is not understood, and the reader
  may raise anything for a broken one."""

  def __init__(self, path: pathlib.Path):
    self.reader = _Reader(path)
    if (parts := self._field("split.count", 1)) > 1:
      raise ValueError(
        f"part {self._field('split.no') + 1} of {parts} of one model: wanted all of it "
        "in a file; join the parts with `llama-gguf-split --merge`"
      )
    self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
    self.cfg = self._config()
    self.tok = self._tokenizer()

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, the outputs first."""
    return tuple(int(n) for n in reversed(self.tensors[name].shape))

  def stored(self) -> tuple[param_tree.Stored, ...]:
    """How the tensors hold the leaves."""
    out = [
      param_tree.Stored(name="token_embd.weight", leaves=("embed",), transposed=False),
      param_tree.Stored(name="output_norm.weight", leaves=("norm",)),
    ]
    if not self.cfg.tied:
      out.append(param_tree.Stored(name=HEAD, leaves=("head",)))
    for leaf in param_tree.layer_leaves(self.cfg):
      block = NAMES[leaf.removesuffix("_bias")]
      if self.cfg.experts and leaf in param_tree.OF_EXPERTS:
        block += "_exps"
      kind = "bias" if leaf.endswith("_bias") else "weight"
      name = f"blk.{{layer}}.{block}.{kind}"
      out.append(param_tree.Stored(name=name, leaves=(leaf,)))
    return tuple(out)

  def read(self, name: str, index: param_tree.Index) -> np.ndarray:
    """A part of a tensor, float32."""
    return self._whole(name)[index]

  @functools.lru_cache(maxsize=1)  # noqa: B019
  def _whole(self, name: str) -> np.ndarray:
    tensor = self.tensors[name]
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    kind = name.split(".")[-2]
    if self.cfg.family != "llama" or kind not in ("attn_q", "attn_k"):
      return array
    heads = self.cfg.heads if kind == "attn_q" else self.cfg.kv_heads
    # The two halves of each head lie interleaved: row 2i + j is ours of j * H/2 + i.
    split = array.reshape(heads, -1, 2, array.shape[-1])
    return split.swapaxes(1, 2).reshape(array.shape)

  def _field(self, name: str, default=None):
    field = self.reader.get_field(name)
    if field is None and default is None:
      raise ValueError(f"the key {name!r} is missing")
    return default if field is None else field.contents()

  @functools.cached_property
  def _symbols(self) -> list[str]:
    """The tokens, in the order of their ids."""
    return self._field("tokenizer.ggml.tokens")

  def _check_read(self, group: str) -> None:
    """Raises ValueError for a key of a group that is not read and says something."""
    for name, field in self.reader.fields.items():
      key = name.removeprefix(f"{group}.")
      if name != key and key not in READ[group] and field.contents():
        raise ValueError(f"{name} = {field.contents()!r:.60} is not supported")

  def _config(self) -> ModelConfig:
    architecture = self._field("general.architecture")
    if architecture not in ARCHITECTURES:
      raise ValueError(
        f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}"
      )
    self._check_read(architecture)
    self._check_read("tokenizer.ggml")
    family = families.of(ARCHITECTURES[architecture])

    def get(name, default=None):
      return self._field(f"{architecture}.{name}", default)

    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // heads)
    if get("attention.value_length", head_dim) != head_dim:
      raise ValueError("keys and values of different lengths are not supported")
    turned = get("rope.dimension_count", head_dim)
    scaling = get("rope.scaling.type", "none")
    if turned != head_dim or scaling not in ("none", "linear"):
      raise ValueError(
        f"rotary embedding of {turned} of {head_dim} dimensions with scaling "
        f"{scaling!r}: only of whole heads, plain or linear, is supported"
      )
    rope = ()
    if scaling == "linear":
      rope = (("factor", float(get("rope.scaling.factor"))), ("rope_type", "linear"))
    layers = get("block_count")
    more, ffw = {}, "feed_forward_length"
    if family.experts:  # whose weights add up to one, as in llama.cpp
      more = dict(experts=get("expert_count"), experts_used=get("expert_used_count"))
      ffw = "expert_feed_forward_length"
    if architecture == "gemma3":
      # As llama.cpp does: of six layers one sees all, and the others turn faster.
      more = dict(
        activation="gelu",
        embed_scale=width**0.5,
        query_scale=head_dim**-0.5,
        window=get("attention.sliding_window"),
        sliding=tuple(i for i in range(layers) if (i + 1) % 6),
        local_theta=float(get("rope.freq_base_swa", 10000.0)),
      )
      if layers == 62:  # 27B, whose queries are scaled by the width a head
        more["query_scale"] = (width / heads) ** -0.5
    eps = get("attention.layer_norm_rms_epsilon")
    return ModelConfig(
      family=ARCHITECTURES[architecture],
      norms=family.norms,
      qk_norm=family.qk_norm,
      biased=family.biased,
      vocab=len(self._symbols),
      width=width,
      layers=layers,
      heads=heads,
      kv_heads=get("attention.head_count_kv", heads),
      head_dim=head_dim,
      ffw=get(ffw),
      rope_theta=float(get("rope.freq_base", 10000.0)),
      norm_eps=float(f"{eps:.6g}"),  # a float32: 1e-5 reads 9.99999974e-06
      tied=HEAD not in self.tensors,
      max_length=get("context_length"),
      rope=rope,
      **more,
    )

  def _tokenizer(self) -> Tokenizer:
    field = self._field
    kind = field("tokenizer.ggml.model")
    pre = field("tokenizer.ggml.pre", "default")
    if kind != "llama" and (kind != "gpt2" or pre not in ("smollm", "gpt-2", "qwen2")):
      raise ValueError(
        f"tokenizer {kind!r} with splitting {pre!r} is not supported, only llama, and "
        "gpt2 with smollm, gpt-2 or qwen2; load the model from its Hugging Face folder"
      )
    types = field("tokenizer.ggml.token_type")
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    named: dict[int, list[str]] = {kind: [] for kind in kinds}
    symbols: list[str | None] = []  # without the unused ones, which nothing writes
    for symbol, number in zip(self._symbols, types, strict=True):
      symbols.append(None if number == gguf.TokenType.UNUSED else symbol)
      if number in named:
        named[number].append(symbol)
    control = named[gguf.TokenType.CONTROL]
    if kind == "llama":
      backend = vocab.pieces(
        symbols,
        field("tokenizer.ggml.scores"),
        control,
        space_in_front=field("tokenizer.ggml.add_space_prefix", True),
      )
    else:
      merges = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
      backend = vocab.byte_level(symbols, merges, control)
    backend.add_tokens(
      [
        tokenizers.AddedToken(s, normalized=False)
        for s in named[gguf.TokenType.USER_DEFINED]
      ]
    )
    if pre == "smollm":  # single digits split off before white space is grouped
      backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
      )
    if pre == "qwen2":
      backend.normalizer = normalizers.NFC()
      split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLITS), behavior="isolated")
      whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
      backend.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    bos, pad, *ends = (
      found and found.contents()
      for found in (
        self.reader.get_field(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "padding", "eot", "eom")
      )
    )
    if bos is not None and field("tokenizer.ggml.add_bos_token", kind == "llama"):
      vocab.begin_with(backend, bos)
    return Tokenizer.of(
      backend,
      field("tokenizer.chat_template", ""),
      bos_id=bos,
      eos_id=field("tokenizer.ggml.eos_token_id"),
      pad_id=pad,
      stop_ids=[end for end in ends if end is not None],
    )
