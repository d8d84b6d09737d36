"""Model files of strangers: nothing of them is run, and no file elsewhere is read.
Their chat templates are rendered or refused in one line; soon, and in little memory.

DALIGN_FUZZ=10 runs ten times as many examples.
"""

import contextlib
import faulthandler
import json
import pathlib
import resource
import shutil
import signal
import tracemalloc

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
from tests.formats.test_weights import write_index
from tests.helpers import examples

SECONDS = 5  # of a core, since others may be at work
MEGABYTES = 256  # that an example may add to the most that the process ever held
TURNS = [Turn(role="user", content="a <b> 12"), Turn(role="assistant", content="c")]


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


@pytest.mark.parametrize(
  "file",
  ["../outside.safetensors", "sub/../../outside.safetensors", "{absolute}", "", None],
)
def test_an_index_names_files_of_its_folder_alone(broken, file):
  index = shard(broken)
  outside = broken.parent / "outside.safetensors"
  shutil.copy(broken / index["lm_head.weight"], outside)
  if file == "{absolute}":
    file = str(outside)
  write_index(broken, index | {"lm_head.weight": file})
  assert refusal(lambda: read_all(broken))


@pytest.mark.parametrize("size", ["width", "layers", "vocab", "max_length"])
@pytest.mark.parametrize("value", [0, -4, 2.0, "4", None, [4]])
def test_sizes_of_a_model_are_whole_and_above_zero(size, value):
  fields = {name: getattr(CFG, name) for name in CFG.__dataclass_fields__}
  with pytest.raises(ValueError, match=rf"ModelConfig\.{size}: wanted .*, got"):
    type(CFG)(**fields | {size: value})


@pytest.mark.parametrize(
  ("file", "content"),
  [
    ("config.json", b""),
    ("config.json", b"null"),
    ("tokenizer.json", b"{}"),
    ("tokenizer_config.json", b"\xff\xfe"),
    ("generation_config.json", b"5"),
    ("model.safetensors.index.json", b"{}"),
  ],
)
def test_json_that_is_none_is_refused(broken, file, content):
  (broken / file).write_bytes(content)
  assert refusal(lambda: read_all(broken))


@pytest.mark.parametrize("ids", [-1, 2**64, "x", 1.0, True, [[1]]])
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


@pytest.mark.parametrize("r", [0, "x", None])
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
