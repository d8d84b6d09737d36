"""Model files of strangers: read, or refused in one line; soon, and in little memory.

Each fuzzer begins with files that are sound and breaks them. DALIGN_FUZZ=10 runs ten
times as many examples.
"""

import contextlib
import copy
import faulthandler
import json
import math
import pathlib
import resource
import shutil
import signal
import struct
import tracemalloc

import gguf
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from dalign.formats import weights
from dalign.text import chat_template
from dalign.text import templates
from dalign.text import vocab
from dalign.types import Turn
from tests.formats.test_weights import CFG
from tests.formats.test_weights import shard
from tests.formats.test_weights import write_gguf
from tests.formats.test_weights import write_index
from tests.helpers import examples

SECONDS = 5  # of a core, since others may be at work
MEGABYTES = 256  # that an example may add to the most that the process ever held
TURNS = [Turn(role="user", content="a <b> 12"), Turn(role="assistant", content="c")]
HUGE = [2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 8, 2**64 - 1]


class Hung(BaseException):
  """No Exception, which the code under test may turn into its own."""


def _hung(*_):
  raise Hung


@contextlib.contextmanager
def guarded():
  """Fails what takes long or much memory; ends the process where no signal helps."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  old = signal.signal(signal.SIGPROF, _hung)
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  faulthandler.dump_traceback_later(60, exit=True)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, old)
    faulthandler.cancel_dump_traceback_later()
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < MEGABYTES * 2**10


def refusal(read) -> str:
  """What `read` is refused with, "" where it is not; any other end is a failure."""
  try:
    with guarded():
      read()
  except ValueError as error:
    said = str(error)
    assert said.strip() and len(said.splitlines()) == 1, said
    return said
  return ""


def read_all(place: pathlib.Path):
  """A model with its parameters, and a chat under its template."""
  found = weights.find(str(place))
  params = found.params()
  if found.tok.chat_template:
    chat_template.render_chat(found.tok, TURNS)
  return params, found.tok


# --- GGUF ---


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
  path = tmp_path_factory.mktemp("gguf") / "m.gguf"
  write_gguf(path)
  return path.read_bytes()


def numbers(content: bytes, path: pathlib.Path) -> tuple[list[tuple[int, int]], int]:
  """(place, bytes) of each count, length, type, dimension and offset in the header, and
  where the header ends."""
  path.write_bytes(content)
  reader, found = gguf.GGUFReader(path), []
  fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
  for field in fields:
    at = field.offset
    for part in field.parts[:6]:  # of a list the first item
      if part.dtype in (np.uint32, np.uint64):
        found += [(at + i * part.itemsize, part.itemsize) for i in range(len(part))]
      at += part.nbytes
  return found, reader.data_offset


@pytest.fixture(scope="module")
def places(sound, tmp_path_factory):
  return numbers(sound, tmp_path_factory.mktemp("places") / "m.gguf")


def write_number(content: bytearray, at: int, size: int, value: int) -> None:
  content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


NUMBER = st.sampled_from([0, 1, 2, 3, 8, 9, 12, 255, *HUGE]) | st.integers(0, 2**64)


@examples(300)
@hypothesis.given(data=st.data())
def test_broken_gguf_files_are_read_or_refused(sound, places, tmp_path_factory, data):
  content, (known, end) = bytearray(sound), places
  for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
    kind = data.draw(st.sampled_from(["number"] * 4 + ["any", "bit", "cut", "again"]))
    at = data.draw(st.integers(0, min(end, len(content)) - 1))
    if kind == "number":
      where, size = data.draw(st.sampled_from(known))
      if where + size <= len(content):
        write_number(content, where, size, data.draw(NUMBER))
    elif kind == "any":
      size = data.draw(st.sampled_from([1, 4, 8]))
      write_number(content, at, min(size, len(content) - at), data.draw(NUMBER))
    elif kind == "bit":
      content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
      content = content[: data.draw(st.integers(1, len(content)))]
    else:
      size = data.draw(st.integers(1, 64))
      content[at:at] = content[at : at + size]
  file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
  file.write_bytes(content)
  refusal(lambda: read_all(file))


def test_every_number_of_a_gguf_header_may_be_huge(sound, places, tmp_path):
  known, _ = places
  accepted = 0
  for i, (at, size) in enumerate(known):
    content = bytearray(sound)
    write_number(content, at, size, HUGE[i % len(HUGE)])
    if content == sound:
      continue
    (tmp_path / "m.gguf").write_bytes(content)
    accepted += not refusal(lambda: read_all(tmp_path / "m.gguf"))
  assert accepted <= 1  # the length of a context, for which nothing is laid out


def gguf_key(name: str, kind: int, value: bytes) -> bytes:
  return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def gguf_file(*keys: bytes, tensors: tuple[bytes, ...] = (), data=b"") -> bytes:
  head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
  head += b"".join(keys) + b"".join(tensors)
  return head + bytes(-len(head) % 32) + data


def gguf_tensor(name: str, dims: tuple[int, ...], offset: int) -> bytes:
  front = struct.pack("<Q", len(name)) + name.encode()
  return front + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)


def nested(depth: int) -> bytes:
  return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


ONES = [gguf_tensor(f"t{i}", (1024,), 0) for i in range(100)]
BAD_GGUF = {
  "keys without end": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "65536 keys"),
  "tensors without end": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "65536 tensors"),
  "an array without end": (
    gguf_file(gguf_key("a", 9, struct.pack("<IQ", 0, 2**60))),
    "4194304 items",
  ),
  "an array past the end": (
    gguf_file(gguf_key("a", 9, struct.pack("<IQ", 10, 2**20))),
    "wanted bytes up to 8388657, got",
  ),
  "a string past the end": (
    gguf_file(gguf_key("a", 8, struct.pack("<Q", 2**63))),
    "wanted bytes up to",
  ),
  "arrays in arrays": (gguf_file(gguf_key("a", 9, nested(5000))), "arrays of arrays"),
  "a product that overflows": (
    gguf_file(tensors=(gguf_tensor("t", (2**32, 2**32), 0),), data=bytes(64)),
    "tensor t and those before it overrun the file",
  ),
  "an offset that overflows": (
    gguf_file(tensors=(gguf_tensor("t", (1,), 2**64 - 64),), data=bytes(64)),
    "tensor t and those before it overrun",
  ),
  "tensors in one place": (
    gguf_file(tensors=tuple(ONES), data=bytes(4096)),
    "overrun the file",
  ),
  "one name twice": (
    gguf_file(tensors=(gguf_tensor("t", (1,), 0),) * 2, data=bytes(64)),
    "duplicated tensor",
  ),
  "one key twice": (gguf_file(*[gguf_key("a", 0, b"\0")] * 2), "Duplicate a"),
  "nothing": (b"", "empty"),
}


@pytest.mark.parametrize("name", BAD_GGUF)
def test_gguf_headers_that_lie_are_refused(tmp_path, name):
  content, message = BAD_GGUF[name]
  (tmp_path / "m.gguf").write_bytes(content)
  tracemalloc.start()
  try:
    said = refusal(lambda: read_all(tmp_path / "m.gguf"))
    assert tracemalloc.get_traced_memory()[1] < 2**20 + 64 * len(content)
  finally:
    tracemalloc.stop()
  assert message in said


def test_long_tokens_of_a_gguf_file_are_refused(tmp_path, monkeypatch):
  """Each could be split at each of its characters."""
  tok = vocab.tiny_tokenizer()
  name = tok.backend.id_to_token(200)
  monkeypatch.setattr(vocab, "tiny_tokenizer", lambda: Renamed(tok, name, "x" * 1001))
  write_gguf(tmp_path / "m.gguf")
  said = refusal(lambda: read_all(tmp_path / "m.gguf"))
  assert "wanted 1000 characters a token at most, got 1001" in said


class Renamed:
  """A tokenizer, as far as `write_gguf` asks it, of which a token has another name."""

  def __init__(self, tok, old, new):
    self.chat_template, self.backend = tok.chat_template, self
    self.id_to_token = lambda i: tok.backend.id_to_token(i).replace(old, new)


# --- Hugging Face folders ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  place = tmp_path_factory.mktemp("folder") / "model"
  weights.save_hf(place, CFG, weights.random_model(CFG, 1), vocab.tiny_tokenizer())
  read_all(place)  # which imports what takes its time
  return place


@pytest.fixture
def broken(folder, tmp_path) -> pathlib.Path:
  """A copy of the folder, to be broken."""
  return shutil.copytree(folder, tmp_path / "model")


def put(place: pathlib.Path, name: str, **changes) -> None:
  content = json.loads((place / name).read_text()) | changes
  (place / name).write_text(json.dumps(content))


ODD = st.sampled_from(
  [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**30, 1e308, -0.5]
  + [math.nan, math.inf, "", "x", "\ud800", "12", "../../etc/passwd", "/etc/passwd"]
  + [[], {}, [[]], [None], [2**40], {"": 0}, {"a": {"b": -1}}, ["x"] * 3]
).map(copy.deepcopy)
MORE = ["auto_map", "num_labels", "text_config", "tokenizer_class", "tokenizer_file"]
MORE += ["vocab_file", "layer_types", "rope_parameters", "added_tokens_decoder", "x"]
JSONS = ["config.json", "tokenizer.json", "tokenizer_config.json"]
JSONS += ["generation_config.json", "config.json", "model.safetensors.index.json"]


def nodes(content, above=()):
  """(container, key) of everything in a JSON value, but for long lists of it."""
  items = content.items() if isinstance(content, dict) else enumerate(content)
  for key, value in list(items)[:40]:
    yield content, key
    if isinstance(value, dict | list):
      yield from nodes(value)


@examples(150)
@hypothesis.given(data=st.data())
def test_broken_json_files_are_read_or_refused(folder, tmp_path_factory, data):
  name = data.draw(st.sampled_from(JSONS))
  place = tmp_path_factory.getbasetemp() / "fuzz_json"
  shutil.rmtree(place, ignore_errors=True)
  shutil.copytree(folder, place)
  if name.endswith("index.json"):
    shard(place)
  content = json.loads((place / name).read_text())
  for _ in range(data.draw(st.integers(1, 3))):
    container, key = data.draw(st.sampled_from(list(nodes(content))))
    kind = data.draw(st.sampled_from(["put", "put", "add", "drop"]))
    value = data.draw(ODD)
    if kind == "drop" or kind == "add" and isinstance(container, list):
      del container[key]
    else:
      container[data.draw(st.sampled_from(MORE)) if kind == "add" else key] = value
    if not list(nodes(content)):
      break
  said = json.dumps(content)
  if data.draw(st.integers(0, 9)) == 0:
    said = said[: data.draw(st.integers(0, len(said)))]
  (place / name).write_text(said)
  refusal(lambda: read_all(place))


@examples(150)
@hypothesis.given(data=st.data())
def test_broken_safetensors_files_are_read_or_refused(folder, tmp_path_factory, data):
  place = tmp_path_factory.getbasetemp() / "fuzz_safetensors"
  if not place.is_dir():
    shutil.copytree(folder, place)
  content = (folder / "model.safetensors").read_bytes()
  size = int.from_bytes(content[:8], "little")
  head, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
  for _ in range(data.draw(st.integers(1, 2))):
    name = data.draw(st.sampled_from(sorted(head.keys() - {"__metadata__"})))
    entry = head[name] if isinstance(head[name], dict) else {}
    kind = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "all"]))
    if kind == "dtype":
      kinds = ["F64", "F16", "BF16", "F8_E4M3", "F4", "BOOL", "I64", "U16", "X", "C64"]
      entry["dtype"] = data.draw(st.sampled_from(kinds) | ODD)
    elif kind in ("shape", "data_offsets"):
      sizes = st.lists(NUMBER | st.sampled_from([-1, 12, 2**65, 1.5]), max_size=4)
      entry[kind] = data.draw(sizes | ODD)
    elif kind == "name":
      head[data.draw(st.sampled_from(["x", "", "../x"]))] = copy.deepcopy(head[name])
    else:
      head[name] = data.draw(ODD)
  said = json.dumps(head).encode("utf-8", "surrogatepass")
  length = data.draw(st.just(len(said)) | NUMBER.map(lambda n: n % 2**64))
  cut = data.draw(st.sampled_from([0, 0, 0, 1, len(rest)]))
  whole = struct.pack("<Q", length) + said + rest[cut:]
  (place / "model.safetensors").write_bytes(whole)
  refusal(lambda: read_all(place))


@pytest.mark.parametrize(
  "file",
  ["../outside.safetensors", "sub/../../outside.safetensors", "{absolute}"]
  + ["..", "", "."]
  + ["../../../../../../../../etc/passwd", "x\0y", "x" * 5000, 5, None, ["a"], {}],
)
def test_an_index_names_files_of_its_folder_alone(broken, file):
  index = shard(broken)
  outside = broken.parent / "outside.safetensors"
  shutil.copy(broken / index["lm_head.weight"], outside)
  if file == "{absolute}":
    file = str(outside)
  write_index(broken, index | {"lm_head.weight": file})
  assert refusal(lambda: read_all(broken))


@pytest.mark.parametrize("listed", [None, 5, [], "x", {}, [["a", "b"]]])
def test_an_index_without_a_map_is_refused(broken, listed):
  shard(broken)
  write_index(broken, listed)
  assert "weight_map" in refusal(lambda: read_all(broken)) or listed == {}


@pytest.mark.parametrize(
  "name", ["num_labels", "num_hidden_layers", "num_attention_heads", "vision.num_x"]
)
@pytest.mark.parametrize("count", [2**31, 10**30, -1, 1e300])
def test_counts_that_nothing_has_are_refused(broken, name, count):
  """Of some of them transformers makes a list of as many items."""
  front, _, name = name.rpartition(".")
  change = {name: count}
  put(broken, "config.json", **({front: change} if front else change))
  assert f"{name}: wanted 0 to 10000" in refusal(lambda: read_all(broken))


@pytest.mark.parametrize("size", ["width", "layers", "vocab", "max_length"])
@pytest.mark.parametrize("value", [0, -4, 2.0, "4", None, [4]])
def test_sizes_of_a_model_are_whole_and_above_zero(size, value):
  fields = {name: getattr(CFG, name) for name in CFG.__dataclass_fields__}
  with pytest.raises(ValueError, match=rf"ModelConfig\.{size}: wanted .*, got"):
    type(CFG)(**fields | {size: value})


@pytest.mark.parametrize("file", JSONS[:4])
@pytest.mark.parametrize(
  "content", [b"", b"[" * 10**5, b"null", b"5", b"\xff\xfe", b"{}"]
)
def test_json_that_is_none_is_refused(broken, file, content):
  (broken / file).write_bytes(content)
  said = refusal(lambda: read_all(broken))
  fine = (file, content) == ("generation_config.json", b"{}")
  assert bool(said) != fine


@pytest.mark.parametrize(
  "ids", [-1, 2**31, 2**64, "x", 1.0, True, [[1]], ["a"], {"a": 1}]
)
def test_ids_that_are_none_are_refused(broken, ids):
  put(broken, "generation_config.json", eos_token_id=ids)
  assert "eos_token_id: wanted ids" in refusal(lambda: read_all(broken))


@pytest.mark.parametrize("name", ["bos_id", "eos_id", "pad_id"])
@pytest.mark.parametrize("id_", [-1, 10**6, 2**40, "x", True])
def test_tokens_that_are_not_there_are_refused(name, id_):
  backend = tokenizers.Tokenizer.from_str(vocab.tiny_tokenizer().backend.to_str())
  ids = {"bos_id": 1, "eos_id": 2, "pad_id": 2} | {name: id_}
  with pytest.raises(
    ValueError, match=f"{name[:3]}_token_id: wanted the id of a token"
  ):
    chat_template.Tokenizer.of(backend, vocab.CHATML, **ids)


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_folder_is_not_run(broken, known):
  ran = broken.parent / "RAN"
  code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
  code += "class Config: pass\nclass Tokenizer: pass\n"
  for name in ("evil.py", "configuration_llama.py", "tokenization.py", "__init__.py"):
    (broken / name).write_text(code)
  pickled = f"cos\nsystem\n(S'touch {ran}'\ntR."
  (broken / "pytorch_model.bin").write_text(pickled)
  put(
    broken,
    "config.json",
    auto_map={"AutoConfig": "evil.Config", "AutoTokenizer": "evil.Tokenizer"},
    model_type="llama" if known else "evil",
    trust_remote_code=True,
  )
  names = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
  put(broken, "tokenizer_config.json", tokenizer_class="Tokenizer", **names)
  refusal(lambda: read_all(broken))
  assert not ran.exists()


def test_a_pickle_beside_an_index_is_not_read(broken):
  index = shard(broken)
  (broken / "x.bin").write_bytes(b"cos\nsystem\n(S'touch RAN'\ntR.")
  write_index(broken, dict.fromkeys(index, "x.bin"))
  assert "x.bin" in refusal(lambda: read_all(broken))


def test_files_that_a_tokenizer_names_elsewhere_are_not_read(broken):
  other = vocab.word_tokenizer(["secret"])
  elsewhere = broken.parent / "elsewhere.json"
  other.backend.save(str(elsewhere))
  names = dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file"), str(elsewhere))
  put(broken, "tokenizer_config.json", **names)
  found = weights.find(str(broken))
  assert "secret" not in found.tok.backend.get_vocab()
  (broken / "tokenizer.json").unlink()
  found = None
  with contextlib.suppress(ValueError):
    found = weights.find(str(broken))
  assert found is None or "secret" not in found.tok.backend.get_vocab()


# --- adapters ---


def adapter(place: pathlib.Path, base, **changes) -> pathlib.Path:
  told = {"peft_type": "LORA", "lora_alpha": 2, "r": 1, "base_model_name_or_path": base}
  place.mkdir()
  (place / "adapter_config.json").write_text(json.dumps(told | changes))
  a = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((1, 12))
  }
  safetensors.numpy.save_file(a, place / "adapter_model.safetensors")
  return place


def test_adapters_of_themselves_are_refused(tmp_path):
  adapter(tmp_path / "a", str(tmp_path / "b"))
  adapter(tmp_path / "b", str(tmp_path / "a"))
  assert "base model is themselves" in refusal(lambda: read_all(tmp_path / "a"))


@pytest.mark.parametrize("r", [0, "x", None, [], 2**80, {}])
def test_adapters_that_are_broken_are_refused(folder, tmp_path, r):
  assert refusal(lambda: read_all(adapter(tmp_path / "a", str(folder), r=r)))


# --- chat templates ---

BACKEND = vocab.tiny_tokenizer().backend.to_str()
GROW = "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = "
BAD_TEMPLATES = {  # what no template of a model does
  "{{ ''.__class__.__mro__ }}": "unsafe",
  "{{ messages.__init__.__globals__ }}": "unsafe",
  "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe",
  "{{ raise_exception.__globals__['jinja2'] }}": "unsafe",
  "{{ (messages|attr('__class__')).x }}": "unsafe",
  "{{ '{0.__class__.__mro__}'.format(1) }}": "unsafe",
  "{{ messages.append(1) }}": "unsafe",
  "{{ messages[0].update(role='x') }}": "unsafe",
  "{{ messages.clear() }}": "unsafe",
  "{% include '/etc/passwd' %}": "no loader",
  "{% import '/etc/passwd' as x %}": "no loader",
  "{% extends 'x' %}": "no loader",
  "{{ raise_exception('a\\nb') }}": "a b",
  "{{ raise_exception('a' * 10000) }}": "aaa...",
  "{{ 'a' * 10**10 }}": "more than 10000000",
  "{{ 10**10 * 'a' }}": "more than 10000000",
  "{{ [0] * 10**10 }}": "more than 10000000",
  "{{ 10 ** (10 ** 8) }}": "1024 bits",
  "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
  "{% endfor %}": "1024 bits",
  "{{ ('a' * 9000).replace('a', 'b' * 9000) }}": "more than 10000000",
  "{{ range(10**9) }}": "Range too big",
  "{{ lipsum(9) }}": "undefined",
  "{% for a in range(9999) %}" + "x" * 9999 + "{% endfor %}": "more than 10000000",
  "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}": "Recursion",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "Recursion",
  "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}": "Recursion",
  GROW + "ns.x ~ ns.x %}{% endfor %}": "more than 10000000",
  GROW + "ns.x + ns.x %}{% endfor %}": "more than 10000000",
  "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "Recursion",
  "{{ " + "[" * 150 + "]" * 150 + " }}": "Recursion",
  "{{ 1" + " + 1" * 5000 + " }}": "Recursion",
  "{{ " + "-" * 20000 + "1 }}": "Recursion",
  "{% if 1 %}" * 150 + "{% endif %}" * 150: "",
  "{% for a in [1] %}" * 30 + "{% endfor %}" * 30: "nested blocks",
  "{% if": "",
  "{{ 1 / 0 }}": "ZeroDivisionError",
  "{{ messages[0]['role'] + 1 }}": "TypeError",
  "{{ none.x.y }}": "'None' has no attribute 'x'",
  "x" * 200_001: "wanted 200000 characters at most",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES, ids=lambda t: t[:60])
def test_hostile_templates_are_refused(template):
  backend, ends = tokenizers.Tokenizer.from_str(BACKEND), dict(bos_id=1, eos_id=2)
  templates._compile.cache_clear()
  tracemalloc.start()
  try:
    said = refusal(
      lambda: chat_template.Tokenizer.of(backend, template + vocab.CHATML, **ends)
    )
    assert tracemalloc.get_traced_memory()[1] < 128 * 2**20
  finally:
    tracemalloc.stop()
  assert said and BAD_TEMPLATES[template] in said


LEAVES = ["'ab' ", *"'' 9 0 -1 1.5 none true messages x".split()]
LEAVES += ["messages[0]", "messages[0].content", "range(9)", "ns", "ns.s", "range"]
LEAVES += ["[1, 'a']", "{'a': 1}", "cycler", "namespace(s='a')", "joiner(', ')", "loop"]
LEAVES += ["'%9999d'", "'{:>9999}'", "'\\n'", "self", "caller", "dict", "f", "'é🙂'"]
NAMES = "__class__ __globals__ content format join replace items s ljust expandtabs"
NAMES = [*NAMES.split(), *"mro upper split append __dict__ copy".split()]
LEAF = st.sampled_from(LEAVES)
FILTERS = (
  "center indent join list tojson map select int round length replace format batch "
  "slice sum sort unique groupby string attr dictsort items first last reverse min "
  "default trim selectattr title truncate urlencode wordcount float abs e"
)
FILTER = st.sampled_from(FILTERS.split())
OPERATOR = st.sampled_from(
  ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "not in"]
)


def wider(inner):
  """Expressions of expressions."""
  args = st.lists(inner, max_size=3).map(", ".join)
  return st.one_of(
    st.builds("({} {} {})".format, inner, OPERATOR, inner),
    st.builds("({})|{}({})".format, inner, FILTER, args),
    st.builds("({}).{}".format, inner, st.sampled_from(NAMES)),
    st.builds("({}).{}({})".format, inner, st.sampled_from(NAMES), args),
    st.builds("({})({})".format, inner, args),
    st.builds("({})[{}:{}]".format, inner, inner, inner),
    st.builds("({})[{}]".format, inner, inner),
    st.builds("[{}]".format, args),
    st.builds("({},)".format, args),
    st.builds("({{{}: {}}})".format, inner, inner),
    st.builds(
      "({} is {})".format, inner, st.sampled_from(["iterable", "defined", "in 9"])
    ),
    st.builds("({} if {} else {})".format, inner, inner, inner),
  )


EXPRESSION = st.recursive(LEAF, wider, max_leaves=6)


def longer(inner):
  """Statements of statements."""
  body = st.lists(inner, max_size=3).map("".join)
  return st.one_of(
    st.builds("{{% for x in {} %}}{}{{% endfor %}}".format, EXPRESSION, body),
    st.builds("{{% for x in {} recursive %}}{}{{% endfor %}}".format, EXPRESSION, body),
    st.builds(
      "{{% for x in {} if {} %}}{}{{% endfor %}}".format, EXPRESSION, EXPRESSION, body
    ),
    st.builds("{{% if {} %}}{}{{% endif %}}".format, EXPRESSION, body),
    st.builds("{{% macro f(x=1) %}}{}{{% endmacro %}}".format, body),
    st.builds("{{% call f({}) %}}{}{{% endcall %}}".format, EXPRESSION, body),
    st.builds("{{% set x %}}{}{{% endset %}}".format, body),
    st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, FILTER, body),
  )


STATEMENT = st.recursive(
  st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSION),
    st.builds("{{% set ns.s = {} %}}".format, EXPRESSION),
    st.builds("{{% set x = {} %}}".format, EXPRESSION),
    st.sampled_from(["{% set ns.s = ns.s ~ ns.s %}", "{% set ns.s = [ns.s] %}"]),
    st.sampled_from(["{%", "}}", "{{ ", "text ", "{% break %}", "{% endfor %}", "{#"]),
  ),
  longer,
  max_leaves=8,
)


@examples(500)
@hypothesis.given(st.lists(STATEMENT, min_size=1, max_size=4).map("".join))
def test_templates_of_any_kind_are_rendered_or_refused(template):
  backend, ends = tokenizers.Tokenizer.from_str(BACKEND), dict(bos_id=1, eos_id=2)
  template = "{% set ns = namespace(s='a') %}" + template + vocab.CHATML

  def render():
    tok = chat_template.Tokenizer.of(backend, template, **ends)
    chat_template.render_chat(tok, TURNS)

  refusal(render)


def test_a_template_in_a_folder_is_refused_as_others_are(broken):
  put(broken, "tokenizer_config.json", chat_template="{{ 'a' * 10**10 }}")
  assert "more than 10000000" in refusal(lambda: read_all(broken))


def test_long_chats_are_rendered():
  """As much as templates of today do for each turn, a thousand times."""
  template = (
    "{% set ns = namespace(last=0, all=[]) %}{% for m in messages[::-1] %}"
    "{% if m.role == 'user' and not m.content.startswith('<tool>') %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1] | trim %}"
    "{% set ns.all = ns.all + [m.role] %}{{ '<|im_start|>' ~ m.role ~ '\n' + text }}"
    "{{ m.content.rstrip('\n').replace('a', 'b') | tojson }}<|im_end|>\n{% endfor %}"
  )
  backend = tokenizers.Tokenizer.from_str(BACKEND)
  tok = chat_template.Tokenizer.of(backend, template, bos_id=1, eos_id=2)
  roles = ("user", "assistant")
  turns = [Turn(role=roles[i % 2], content="word " * 20) for i in range(1000)]
  assert chat_template.render_chat(tok, turns).count(2) == 1000


def test_white_space_before_a_control_token_takes_no_longer_for_being_much():
  end = tokenizers.AddedToken("<|end|>", special=True, lstrip=True)
  backend = tokenizers.Tokenizer.from_str(BACKEND)
  backend.add_special_tokens([end])
  tok = chat_template.Tokenizer.of(backend, vocab.CHATML, bos_id=1, eos_id=2)
  turns = [Turn(role="user", content=" " * 100_000 + "x")]
  assert not refusal(lambda: chat_template.render_chat(tok, turns))
