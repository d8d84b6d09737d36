"""transformers' turn: decoding with `generate`, which TRL also rolls out with.

Variants: "shared" prefills the common part once and repeats its cache, as its
documentation shows; it still copies that cache to every row, and again at every step.
"""

import torch
import transformers

from benchmarks import turn
from benchmarks import works


class Lengths(transformers.StoppingCriteria):
  """Ends each row at a length of its own."""

  def __init__(self, prompt: int, lengths: list[int]):
    self.ends = torch.tensor(lengths) + prompt

  def __call__(self, input_ids, scores, **_):
    return input_ids.shape[1] >= self.ends


def main() -> None:
  """Runs the turn that the command line asks for."""
  asked = turn.settings()
  work = works.WORKS[asked.work]
  torch.set_num_threads(turn.THREADS)
  dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[asked.dtype]
  model = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype)
  model.eval()
  model.generation_config.eos_token_id = None  # no token ends a row
  model.generation_config.pad_token_id = 0
  rows, lengths = work.rows(), work.lengths()

  def batch(rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    more = {}
    if asked.variant == "shared":
      cache = transformers.DynamicCache(config=model.config)
      front = torch.tensor(rows[:1])[:, : work.shared]
      model(input_ids=front, past_key_values=cache, logits_to_keep=1)
      cache.batch_repeat_interleave(len(rows))
      more["past_key_values"] = cache
    out = model.generate(
      input_ids=ids,
      attention_mask=mask,
      do_sample=False,
      max_new_tokens=max(lengths),
      stopping_criteria=[Lengths(T, lengths)],
      **more,
    )
    return [r[T : T + n].tolist() for r, n in zip(out, lengths, strict=True)]

  @torch.inference_mode()
  def run(whole: bool):
    done = []
    for at in range(0, len(rows), work.batch):
      part = slice(at, at + work.batch)
      ends = lengths[part] if whole else [1] * len(rows[part])
      done += batch(rows[part], ends)
    return done

  version = turn.versions("transformers", "torch")
  turn.decode(run, asked.repeats, version=version)


if __name__ == "__main__":
  main()
