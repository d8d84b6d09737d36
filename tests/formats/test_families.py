"""Every family: files that transformers wrote, its logits and tokens, and back."""

import dataclasses
import functools
import json
import unicodedata

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dalign.config.model import LoRAConfig
from dalign.config.model import SamplerConfig
from dalign.formats import families
from dalign.formats import weights
from dalign.models import adapters
from dalign.models import param_tree
from dalign.models import rotary
from dalign.models import transformer
from dalign.sampling.sampler import Request
from dalign.sampling.sampler import Sampler
from dalign.text import packing
from dalign.text import vocab

torch = pytest.importorskip("torch", reason="transformers computes with torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

BASE = dict(
  **dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=4),
  **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-3),
  **dict(max_position_embeddings=512, tie_word_embeddings=False),
  **dict(bos_token_id=1, eos_token_id=2, pad_token_id=2),
)
LLAMA3 = dict(
  **dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0),
  **dict(high_freq_factor=4.0, original_max_position_embeddings=32),
)
YARN = dict(
  rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32
)
GROWING = YARN | dict(  # 8 is what queries grow by, and rows are longer than that
  **dict(original_max_position_embeddings=8, llama_4_scaling_beta=0.5),
  **dict(mscale=1.0, mscale_all_dim=1.0),
)
SLIDES = ["sliding_attention", "full_attention"] * 2
EXPERTS = dict(num_experts=5, num_local_experts=5, num_experts_per_tok=2)
GEMMA = dict(query_pre_attn_scalar=20, sliding_window=9, tie_word_embeddings=True)
# Keys of other families, which a config keeps and its model does not read.
STRAY = dict(
  sliding_window=3,
  layer_types=SLIDES,
  query_pre_attn_scalar=3,
  attn_logit_softcapping=0.5,
  final_logit_softcapping=0.5,
  no_rope_layers=[0] * 4,
)
# name -> model_type, and what of its config differs from BASE.
CASES = {
  "llama": ("llama", STRAY | dict(attention_bias=True, mlp_bias=True)),
  "llama3": ("llama", dict(rope_parameters=LLAMA3)),
  "linear": (
    "llama",
    dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0)),
  ),
  "yarn": ("qwen3", dict(rope_parameters=YARN)),
  "mistral": ("mistral", dict(sliding_window=9)),
  "mistral_whole": ("mistral", dict(sliding_window=None)),
  "ministral3": ("ministral3", dict(sliding_window=None, rope_parameters=GROWING)),
  "qwen2": ("qwen2", {}),
  "qwen2_sliding": (
    "qwen2",
    dict(use_sliding_window=True, sliding_window=9, max_window_layers=2),
  ),
  "qwen3": ("qwen3", dict(attention_bias=True, tie_word_embeddings=True)),
  "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=2.0)),
  "gemma3": (
    "gemma3_text",
    GEMMA
    | dict(
      attn_logit_softcapping=0.1,  # which transformers reads and does not use
      layer_types=SLIDES,
      rope_parameters={
        "full_attention": dict(rope_type="linear", rope_theta=900.0, factor=8.0),
        "sliding_attention": dict(rope_type="default", rope_theta=77.0),
      },
    ),
  ),
  "smollm3": ("smollm3", dict(no_rope_layers=[1, 1, 1, 0])),
  "olmo2": ("olmo2", {}),
  "olmo3": (
    "olmo3",
    dict(
      sliding_window=9,
      rope_parameters={
        "full_attention": YARN,
        "sliding_attention": dict(rope_type="default", rope_theta=77.0),
      },
    ),
  ),
  "phi3": ("phi3", dict(hidden_size=48, sliding_window=9)),
  "qwen3_moe": (
    "qwen3_moe",
    EXPERTS | dict(moe_intermediate_size=24, norm_topk_prob=True),
  ),
  "qwen3_moe_raw": (
    "qwen3_moe",
    EXPERTS | dict(moe_intermediate_size=24, norm_topk_prob=False),
  ),
  "gpt_oss": ("gpt_oss", EXPERTS | dict(sliding_window=9, norm_topk_prob=False)),
}
# One case a family, for what takes long or hangs on nothing that the others change.
FAMILIES = [*{kind: name for name, (kind, _) in reversed(CASES.items())}.values()]
every_family = pytest.mark.parametrize("case", FAMILIES, indirect=True)
OFTEN = ("llama", "gemma3", "gpt_oss")  # between them most of what a cache has to know
long_families = pytest.mark.parametrize(
  "case",
  [
    pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow)
    for name in FAMILIES
  ],
  indirect=True,
)
ROWS = [np.random.default_rng(7).integers(3, 259, n).tolist() for n in (40, 17, 1)]


def test_every_family_has_a_case():
  assert {CASES[name][0] for name in FAMILIES} == set(families.FAMILIES)


@functools.cache
def theirs(name: str):
  """transformers' random model of a case, every parameter at random."""
  return random_model(*CASES[name], seed=len(name))


def random_model(model_type: str, changes: dict, *, seed: int):
  config = transformers.AutoConfig.for_model(model_type, **(BASE | changes))
  torch.manual_seed(seed)
  made = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  )
  with torch.no_grad():
    for leaf, x in made.named_parameters():
      spread = 0.3 if x.ndim == 1 or "bias" in leaf else x.shape[-1] ** -0.5
      ones = float("norm" in leaf and "gemma" not in model_type)
      x.copy_(torch.randn_like(x) * spread + ones)
  return made.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """(transformers' model, our config, our parameters, the folder) of one case."""
  hf, place = theirs(request.param), tmp_path_factory.mktemp(request.param)
  hf.save_pretrained(place)
  write_tokenizer(place)
  cfg, params, _ = weights.load(str(place))
  return hf, cfg, params, place


def write_tokenizer(place) -> None:
  tok = vocab.tiny_tokenizer()
  tok.backend.save(str(place / "tokenizer.json"))
  content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
  (place / "tokenizer_config.json").write_text(json.dumps(content))


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def logits(params, batch, *, cfg, compute):
  hidden_BTD, _ = transformer.forward(params, *batch, cfg=cfg, compute=compute)
  return transformer.logits(params, hidden_BTD, cfg=cfg, compute=compute)


def rows(*tokens):
  return [(row, [1.0] * len(row)) for row in tokens]


def lines(packed: packing.Packed):
  return packed.tokens_BT, packed.positions_BT, packed.ends_BT


def hf_logits(hf, tokens_BT, mask_BT=None) -> np.ndarray:
  with torch.no_grad():
    mask_BT = None if mask_BT is None else torch.as_tensor(mask_BT, dtype=torch.long)
    tokens_BT = torch.as_tensor(np.asarray(tokens_BT), dtype=torch.long)
    return hf(input_ids=tokens_BT, attention_mask=mask_BT).logits.numpy()


def test_logits_are_those_of_transformers(case, compute):
  hf, cfg, params, _ = case
  packed = packing.pad_rows(rows(*ROWS), length=40)
  real_BT = packed.ends_BT > 0
  got = np.asarray(logits(params, lines(packed), cfg=cfg, compute=compute))
  want = hf_logits(hf, packed.tokens_BT, real_BT)
  assert want[real_BT].std() > 0.3  # so that 1e-4 says something
  assert np.abs(got - want)[real_BT].max() < 1e-4
  alone = hf_logits(hf, [ROWS[1]])[0]
  np.testing.assert_allclose(got[1, :17], alone, atol=1e-4)


@every_family
def test_packed_rows_are_those_alone(case, compute):
  """Windows and rotary angles go by position in the row, not by column."""
  _, cfg, params, _ = case
  packed = packing.pack(rows(*ROWS), length=64)
  assert packed.tokens_BT.shape[0] == 1
  got = np.asarray(logits(params, lines(packed), cfg=cfg, compute=compute))
  alone = packing.pad_rows(rows(*ROWS), length=40)
  want = np.asarray(logits(params, lines(alone), cfg=cfg, compute=compute))
  for i, (b, start, size) in enumerate(packed.where):
    np.testing.assert_allclose(got[b, start : start + size], want[i, :size], atol=1e-5)


@long_families
def test_greedy_tokens_through_the_cache_are_those_of_transformers(case, compute):
  """64 steps in slots beside others, behind a shared prefix and without one. The
  shortest prompt begins where another ended, so that its tokens go round the ring."""
  hf, cfg, params, _ = case
  front = ROWS[0][:14]
  prompts = [front + ROWS[0][14:22], front + ROWS[1][:3], front + ROWS[1][3:16]]
  sampler = Sampler(
    cfg=cfg,
    compute=compute,
    stop_ids=(),
    sampler=SamplerConfig(
      **dict(slots=2, lanes=1, chunk=16, prefill=2, prompt_room=32),
      **dict(prompt_step=8, prefix_step=8),
    ),
  )
  requests = [
    Request(tokens=tuple(p), row_id=i, max_new=n)
    for i, (p, n) in enumerate(zip(prompts, (40, 64, 64), strict=True))
  ]
  how = dict(key=jax.random.key(0), temperature=0.0, prompt_room=24, max_new=64)
  prepared = sampler.prepare(jax.tree.map(jnp.asarray, params))
  for prefix_room in (16, 0):
    room = how | ({} if prefix_room else {"prompt_room": 32})
    done = sampler.run(prepared, [requests], prefix_room=prefix_room, **room)
    got = {completion.request.row_id: completion for completion in done}
    for i, prompt in enumerate(prompts):
      check_greedy(hf, prompt, got[i])


def check_greedy(hf, prompt, completion) -> None:
  """That each token is the likeliest to transformers after those before it, which makes
  all of them what it would generate, and has the same log-probability."""
  got, n = list(completion.tokens), completion.request.max_new
  with torch.no_grad():
    out = torch.as_tensor([prompt + got])
    logp_TV = hf(input_ids=out).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
  assert len(got) == n and logp_TV.argmax(-1).tolist() == got
  want = logp_TV.numpy()[np.arange(n), got]
  np.testing.assert_allclose(completion.logp, want, atol=1e-4)


def test_what_is_saved_is_read_by_transformers_and_by_us(case, tmp_path):
  hf, cfg, params, place = case
  weights.save_hf(tmp_path, cfg, params, vocab.tiny_tokenizer(), shard=40_000)
  assert (tmp_path / "model.safetensors.index.json").exists()
  made, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
  )
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
  assert type(made) is type(hf)
  tokens = [ROWS[0]]
  np.testing.assert_allclose(hf_logits(made, tokens), hf_logits(hf, tokens), atol=1e-5)
  again, same, _ = weights.load(str(tmp_path))
  assert again == cfg
  for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-7)


@every_family
def test_gradients_are_those_of_transformers(case, compute):
  """Of the summed log-probabilities of a row, by every tensor."""
  hf, cfg, params, _ = case
  tokens = np.asarray([ROWS[0]])
  packed = packing.pad_rows(rows(ROWS[0]), length=40)

  def total(params):
    batch = dict(
      zip(("tokens_BT", "positions_BT", "ends_BT"), lines(packed), strict=True)
    )
    wanted_BT = jnp.ones((1, 39), bool)
    stats = transformer.target_stats(params, batch, wanted_BT, cfg=cfg, compute=compute)
    return jnp.sum(stats.logp)

  got = jax.jit(jax.grad(total))(jax.tree.map(jnp.asarray, params))
  hf.zero_grad()
  logp = hf(input_ids=torch.as_tensor(tokens)).logits[0, :-1].log_softmax(-1)
  logp.gather(-1, torch.as_tensor(tokens[0, 1:, None])).sum().backward()
  theirs = {name: p.grad.numpy() for name, p in hf.named_parameters()}

  def leaf(name, layer):
    return np.asarray(got[name] if layer is None else got["layers"][name][layer])

  compared = 0
  for s in families.stored(cfg):
    plain = dataclasses.replace(s, offset=0.0)
    for name, make in param_tree.tensors(cfg, [plain], leaf):
      if name not in theirs:  # experts lie otherwise in transformers' memory
        continue
      want = theirs[name]
      limit = 2e-4 * max(1.0, np.abs(want).max())
      np.testing.assert_allclose(make(), want, atol=limit, err_msg=name)
      compared += 1
  assert compared >= 2 + 6 * cfg.layers


@every_family
def test_parameters_are_laid_on_a_mesh_as_they_are_read(case):
  """Of each leaf only what a device holds, cut along its first and its last axis."""
  *_, place = case
  found = weights.find(str(place))
  mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
  spec = jax.sharding.PartitionSpec
  whole = found.params()

  def lay(x):
    axes = [None if n % 2 else "fsdp" for n in x.shape[:1]]
    axes += [None] * (x.ndim - 2)
    axes += [None if n % 2 else "tensor" for n in x.shape[1:][-1:]]
    return jax.sharding.NamedSharding(mesh, spec(*axes))

  placed = jax.tree.map(lay, whole)
  got = found.params(placed)
  for a, b, s in zip(*map(jax.tree.leaves, (got, whole, placed)), strict=True):
    assert a.sharding == s
    np.testing.assert_array_equal(a, b)


@every_family
def test_adapters_are_those_of_peft(case, compute, tmp_path):
  """Ours in PEFT, and PEFT's files as a model of ours."""
  peft = pytest.importorskip("peft")
  hf, cfg, params, place = case
  names = ("q", "v", "o") if cfg.experts else ("q", "v", "o", "up", "down")
  lora = LoRAConfig(rank=3, alpha=12.0, leaves=names, frozen="float32")
  cfg = dataclasses.replace(cfg, lora_scale=4.0)
  params = adapters.attach(params, jax.random.key(1), cfg=cfg, lora=lora)
  rng = np.random.default_rng(2)
  for name in names:
    leaf = params["layers"][name + adapters.B]
    params["layers"][name + adapters.B] = (
      rng.standard_normal(leaf.shape, np.float32) / 5
    )
  if cfg.family == "phi3":  # its q, k and v are one matrix there
    with pytest.raises(ValueError, match="no adapter for q of phi3 alone"):
      weights.save_peft(str(tmp_path), cfg, params["layers"], lora, str(place))
    return
  weights.save_peft(str(tmp_path), cfg, params["layers"], lora, str(place))
  base = transformers.AutoModelForCausalLM.from_pretrained(
    place, dtype=torch.float32, attn_implementation="eager"
  )
  want = hf_logits(peft.PeftModel.from_pretrained(base, tmp_path).eval(), [ROWS[0]])[0]
  packed = packing.pad_rows(rows(ROWS[0]), length=40)
  got = np.asarray(logits(params, lines(packed), cfg=cfg, compute=compute))[0]
  assert np.abs(want - hf_logits(hf, [ROWS[0]])[0]).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-4)
  read_cfg, read, _ = weights.load(str(tmp_path))
  whole = adapters.merge_adapters(params, cfg=cfg)
  assert read_cfg == dataclasses.replace(cfg, lora_scale=0.0)
  for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


# --- What the cases above cannot show ---


PAIRS = ["1 2", "' L", "L L", "Ċ Ċ", "č Ċ", "Ġ Ġ", "Ġ a", "a Ġ", "Ġ Ċ", ", č", "Ã ¯"]
LINES = (
  "I'LL see 2026's  end,\r\n\n  naïve e\u0301 \t日本語 12345 🙂",
  "'Re\n a b  c",
  "",
)


GEMMA_GGUF = dict(
  query_pre_attn_scalar=12,
  sliding_window=9,
  tie_word_embeddings=True,
  num_hidden_layers=6,  # of which the last sees all
  rope_parameters={
    "full_attention": dict(rope_type="default", rope_theta=900.0),
    "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
  },
)


@pytest.mark.parametrize(
  "arch, model_type, changes",
  [
    ("gemma3", "gemma3_text", GEMMA_GGUF),
    ("qwen2", "qwen2", dict(head_dim=8)),
    ("qwen3", "qwen3", dict(tie_word_embeddings=True)),
    ("qwen3moe", *CASES["qwen3_moe"]),
  ],
)
def test_ggufs_are_those_of_transformers(arch, model_type, changes, compute, tmp_path):
  more = dict(vocab_size=259 + len(PAIRS))
  hf = random_model(model_type, changes | more, seed=0)
  write_gguf(tmp_path / "m.gguf", hf, arch)
  cfg, params, _ = weights.load(str(tmp_path / "m.gguf"))
  assert cfg == dataclasses.replace(families.read(hf.config), absent=cfg.absent)
  packed = packing.pad_rows(rows(*ROWS), length=40)
  got = np.asarray(logits(params, lines(packed), cfg=cfg, compute=compute))
  for i, row in enumerate(ROWS):
    np.testing.assert_allclose(got[i, : len(row)], hf_logits(hf, [row])[0], atol=1e-4)


def test_tokens_of_a_qwen_gguf_are_those_of_transformers(tmp_path):
  hf = random_model("qwen2", dict(head_dim=8, vocab_size=259 + len(PAIRS)), seed=0)
  write_gguf(tmp_path / "m.gguf", hf, "qwen2")
  tok = weights.find(str(tmp_path / "m.gguf")).tok
  here = dict(pretrained_model_name_or_path=str(tmp_path), gguf_file="m.gguf")
  reference = transformers.AutoTokenizer.from_pretrained(**here)
  for line in LINES:
    # Qwen's tokenizer.json asks for NFC; what transformers makes of a GGUF does not.
    want = reference(unicodedata.normalize("NFC", line))["input_ids"]
    assert tok.document(line) == want and tok.decode(want) == reference.decode(want)


def write_gguf(path, hf, arch: str) -> None:
  """A model as a GGUF file, with the names that the gguf package gives its tensors, and
  bytes and some pairs of them as its tokens."""
  cfg, writer = hf.config, gguf.GGUFWriter(path, arch)
  writer.add_block_count(cfg.num_hidden_layers)
  writer.add_context_length(cfg.max_position_embeddings)
  writer.add_embedding_length(cfg.hidden_size)
  writer.add_feed_forward_length(cfg.intermediate_size)
  writer.add_head_count(cfg.num_attention_heads)
  writer.add_head_count_kv(cfg.num_key_value_heads)
  rope = cfg.rope_parameters
  writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
  writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
  if arch != "qwen2":
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
  if arch == "qwen3moe":
    writer.add_expert_count(cfg.num_experts)
    writer.add_expert_used_count(cfg.num_experts_per_tok)
    writer.add_expert_feed_forward_length(cfg.moe_intermediate_size)
  if arch == "gemma3":
    writer.add_sliding_window(cfg.sliding_window)
  tok = vocab.tiny_tokenizer()
  symbols = [tok.backend.id_to_token(i) for i in range(259)]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("qwen2")
  writer.add_token_list(symbols + [pair.replace(" ", "") for pair in PAIRS])
  writer.add_token_types([3] * 3 + [1] * (256 + len(PAIRS)))
  writer.add_token_merges(PAIRS)
  writer.add_eos_token_id(2)
  names = gguf.get_tensor_name_map(
    next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
    cfg.num_hidden_layers,
  )
  tensors = {}
  for name, x in hf.state_dict().items():
    if name.endswith("gate_up_proj"):  # of the experts in transformers' memory
      gate, up = x.chunk(2, dim=1)
      front = name.removesuffix("gate_up_proj")
      tensors |= {f"{front}gate_proj": gate, f"{front}up_proj": up}
    elif name != "lm_head.weight" or not cfg.tie_word_embeddings:
      tensors[name] = x
  for name, x in tensors.items():
    module, _, kind = name.rpartition(".")
    module, kind = (module, kind) if kind in ("weight", "bias") else (name, "weight")
    x = x + 1 if arch == "gemma3" and "norm" in name else x  # as llama.cpp keeps them
    writer.add_tensor(f"{names.get_name(module)}.{kind}", x.contiguous().numpy())
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_rotary_frequencies_are_those_of_transformers():
  """Of published settings, at their real sizes."""
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  long = "original_max_position_embeddings"
  published = {
    "llama": LLAMA3 | {"rope_theta": 500000.0, long: 8192},
    "qwen3": YARN | {"rope_theta": 1e6, long: 32768},
    "gpt_oss": YARN
    | dict(rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0)
    | {"truncate": False, long: 4096},
    "olmo2": YARN
    | dict(rope_theta=10000.0, factor=40.0, mscale=1.0, mscale_all_dim=0.5)
    | {long: 4096},
    "mistral": dict(rope_theta=1e6, rope_type="linear", factor=8.0),
    "ministral3": GROWING | dict(rope_theta=1e6, factor=16.0) | {long: 16384},
  }
  for name, rope in published.items():
    sizes = BASE | dict(head_dim=128, max_position_embeddings=131072)
    config = transformers.AutoConfig.for_model(
      name, **sizes, rope_parameters=dict(rope)
    )
    want, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    got = rotary.frequencies(families.read(config))
    np.testing.assert_allclose(got[0], want.numpy(), rtol=2e-6, err_msg=name)
    assert got[1] == pytest.approx(scale)


def test_mxfp4_experts_are_read(tmp_path):
  """As gpt-oss is published: blocks of 4-bit floats, and exponents."""
  from transformers.integrations.mxfp4 import convert_moe_packed_tensors

  changes = dict(EXPERTS, hidden_size=64, intermediate_size=32)
  config = transformers.AutoConfig.for_model("gpt_oss", **(BASE | changes))
  torch.manual_seed(0)
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
  write_tokenizer(tmp_path)
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  rng, want = np.random.default_rng(0), {}
  for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
    experts, ins, outs = tensors.pop(name).shape
    blocks = rng.integers(0, 256, (experts, outs, ins // 32, 16), np.uint8)
    scales = rng.integers(120, 130, (experts, outs, ins // 32), np.uint8)
    tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    args = torch.as_tensor(blocks), torch.as_tensor(scales)
    want[name] = convert_moe_packed_tensors(*args, dtype=torch.float32).numpy()
  safetensors.numpy.save_file(tensors, file)
  settings = json.loads((tmp_path / "config.json").read_text())
  settings["quantization_config"] = {"quant_method": "mxfp4"}
  (tmp_path / "config.json").write_text(json.dumps(settings))
  cfg, params, _ = weights.load(str(tmp_path))
  for i in range(cfg.layers):
    both = want[f"model.layers.{i}.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(params["layers"]["gate"][i], both[..., ::2])
    np.testing.assert_array_equal(params["layers"]["up"][i], both[..., 1::2])
    down = want[f"model.layers.{i}.mlp.experts.down_proj"]
    np.testing.assert_array_equal(params["layers"]["down"][i], down)
  odd = next(name for name in tensors if name.endswith("_scales"))
  tensors[odd] = tensors[odd].astype(np.int8)
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match=f"{odd}: wanted uint8, got int8"):
    weights.load(str(tmp_path))


@pytest.mark.parametrize("name, whole", [("gemma3",) * 2, ("ministral3", "mistral3")])
def test_the_language_model_of_one_that_sees_is_read(tmp_path, name, whole):
  """As Gemma 3 from 4B on: its text part, whatever its tensors are called."""
  hf = theirs(name)
  hf.save_pretrained(tmp_path)
  write_tokenizer(tmp_path)
  want = weights.load(str(tmp_path))[1]
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  config = json.loads((tmp_path / "config.json").read_text())
  seeing = {"model_type": whole, "text_config": config}
  (tmp_path / "config.json").write_text(json.dumps(seeing))
  for front in ("language_model.model.", "model.language_model."):
    renamed = {n.replace("model.", front, 1): x for n, x in tensors.items()}
    renamed["vision_tower.patches.weight"] = np.ones((2, 2), np.float32)
    safetensors.numpy.save_file(renamed, file)
    cfg, got, _ = weights.load(str(tmp_path))
    assert cfg.family == hf.config.model_type
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_array_equal(a, b)
