"""llama.cpp's turn: decoding, through the low-level API of llama-cpp-python.

Other types than the file's are made once, beside it, with llama.cpp's own quantiser.
The cache is float32 with float32 weights, else llama.cpp's default, float16. Variant
"shared" keeps the common part's cells once, for all sequences.
"""

import ctypes
import os

import llama_cpp as lib
import numpy as np

from benchmarks import turn
from benchmarks import works

_QUIET = lib.llama_log_callback(lambda level, text, data: None)  # must stay alive


class Engine:
  """A context that holds a batch of sequences."""

  def __init__(self, path: str, work: works.Decode, *, shared: bool, f32: bool):
    self.model = lib.llama_model_load_from_file(
      path.encode(), lib.llama_model_default_params()
    )
    assert self.model, path
    p = lib.llama_context_default_params()
    p.n_seq_max, p.kv_unified = work.batch, shared
    each = work.own[1] + work.new[1]
    fronts = 1 if shared else work.batch
    p.n_ctx = fronts * work.shared + work.batch * each + 256
    p.n_batch, p.n_ubatch = 2048, 512
    p.n_threads = p.n_threads_batch = turn.THREADS
    if f32:
      p.type_k = p.type_v = lib.GGML_TYPE_F32
    self.size = p.n_batch
    self.context = lib.llama_init_from_model(self.model, p)
    assert self.context
    vocab = lib.llama_model_get_vocab(self.model)
    self.vocab = lib.llama_vocab_n_tokens(vocab)
    self.memory = lib.llama_get_memory(self.context)
    self.batch = lib.llama_batch_init(self.size, 0, work.batch)

  def clear(self) -> None:
    """Forgets all sequences."""
    lib.llama_memory_clear(self.memory, False)

  def fork(self, sequences: int) -> None:
    """Lets all sequences see the cells of the first."""
    for s in range(1, sequences):
      lib.llama_memory_seq_cp(self.memory, 0, s, -1, -1)

  def advance(self, entries) -> dict[int, int]:
    """Takes (token, position, sequence, whether to predict); the greedy next tokens."""
    found = {}
    for at in range(0, len(entries), self.size):
      part = entries[at : at + self.size]
      self.batch.n_tokens = len(part)
      for i, (token, position, sequence, wanted) in enumerate(part):
        self.batch.token[i], self.batch.pos[i] = token, position
        self.batch.n_seq_id[i], self.batch.logits[i] = 1, wanted
        self.batch.seq_id[i][0] = sequence
      code = lib.llama_decode(self.context, self.batch)
      assert code == 0, code
      for i, (_, _, sequence, wanted) in enumerate(part):
        if wanted:
          logits = lib.llama_get_logits_ith(self.context, i)
          found[sequence] = int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())
    return found


def main() -> None:
  """Runs the turn that the command line asks for."""
  asked = turn.settings()
  work = works.WORKS[asked.work]
  lib.llama_log_set(_QUIET, ctypes.c_void_p(0))
  lib.llama_backend_init()
  shared = asked.variant == "shared"
  path = converted(asked.gguf, asked.dtype)
  engine = Engine(path, work, shared=shared, f32=asked.dtype == "f32")
  rows = work.rows()
  assert len(rows) == work.batch and work.new[0] == work.new[1], "one even batch"

  def run(whole: bool):
    engine.clear()
    start = 0
    if shared:
      start = work.shared
      engine.advance([(t, i, 0, 0) for i, t in enumerate(rows[0][:start])])
      engine.fork(len(rows))
    entries = []
    for s, row in enumerate(rows):
      own = list(enumerate(row))[start:]
      entries += [(t, i, s, i == len(row) - 1) for i, t in own]
    found = [[] for _ in rows]
    for n in range(work.new[0] if whole else 1):
      for s, token in engine.advance(entries).items():
        found[s].append(token)
      entries = [(t[-1], len(rows[s]) + n, s, 1) for s, t in enumerate(found)]
    return found

  version = turn.versions("llama-cpp-python")
  turn.decode(run, asked.repeats, version=version)


def converted(path: str, dtype: str) -> str:
  """The file with weights of a type; when it is made, in a process of its own, so that
  neither time nor memory of that is counted."""
  out = f"{path}.{dtype}"
  if os.path.exists(out):
    return out
  child = os.fork()
  if child == 0:
    p = lib.llama_model_quantize_default_params()
    p.ftype = {"f32": lib.LLAMA_FTYPE_ALL_F32, "bf16": lib.LLAMA_FTYPE_MOSTLY_BF16}[
      dtype
    ]
    p.allow_requantize, p.nthread = True, turn.THREADS
    code = lib.llama_model_quantize(
      path.encode(), f"{out}.part".encode(), ctypes.byref(p)
    )
    os._exit(code)
  _, status = os.waitpid(child, 0)
  assert status == 0, f"{path} could not be written as {dtype}"
  os.replace(f"{out}.part", out)
  return out


if __name__ == "__main__":
  main()
