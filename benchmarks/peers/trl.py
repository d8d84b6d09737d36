"""TRL's turn: SFTTrainer and GRPOTrainer.

bf16 is TRL's own mixed precision: float32 weights under autocast. Its defaults, bf16
and gradient checkpointing, are set here as the work wants them.
"""

import tempfile

import datasets
import numpy as np
import torch
import transformers
import trl

from benchmarks import turn
from benchmarks import works


class StepTimer(transformers.TrainerCallback):
  """Tells the clock where the trainer's steps begin and end."""

  def __init__(self, steps: turn.Steps):
    self.steps = steps

  def on_step_begin(self, args, state, control, **_):
    self.steps.begin()

  def on_step_end(self, args, state, control, **_):
    self.steps.end()


def main() -> None:
  """Runs the turn that the command line asks for."""
  asked = turn.settings()
  torch.set_num_threads(turn.THREADS)
  work = works.WORKS[asked.work]
  clock = turn.Steps()
  run = sft if isinstance(work, works.Train) else grpo
  run(work, asked, clock)
  parts = clock.last
  if "rollout and reference" in parts:
    both = parts.pop("rollout and reference")
    parts["reference"] = both - parts["rollout"]
    parts["update"] = clock.runs[-1].s - both
  clock.answer(version=turn.versions("trl", "transformers", "torch"))


def settings(asked, **more) -> dict:
  """The arguments that both trainers get."""
  return more | dict(
    output_dir=tempfile.mkdtemp(),
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
    bf16=asked.dtype == "bf16",
    fp16=False,
    max_steps=asked.repeats + 1,
    gradient_accumulation_steps=1,
    learning_rate=1e-5,
    optim="adamw_torch",
    seed=0,
    model_init_kwargs={"dtype": "float32"},
  )


def tokenizer(asked):
  """The model's tokenizer, whose padding, its stop too, gets an id of its own."""
  tok = transformers.AutoTokenizer.from_pretrained(asked.model)
  tok.pad_token_id = 0
  return tok


def sft(work: works.Train, asked, clock: turn.Steps) -> None:
  """Steps of SFTTrainer; checks that every token of the batch was a target."""
  rows = np.concatenate([work.rows(step) for step in range(asked.repeats + 1)])
  trainer = trl.SFTTrainer(
    model=asked.model,
    processing_class=tokenizer(asked),
    train_dataset=datasets.Dataset.from_dict({"input_ids": rows.tolist()}),
    callbacks=[StepTimer(clock)],
    args=trl.SFTConfig(
      per_device_train_batch_size=work.batch,
      max_length=work.length,
      packing=False,
      gradient_checkpointing=work.remat,
      **settings(asked),
    ),
  )
  collate, seen = trainer.data_collator, set()

  def spy(rows):
    batch = collate(rows)
    labels = int((batch["labels"] != -100).sum())
    seen.add((*batch["input_ids"].shape, labels))
    return batch

  trainer.data_collator = spy
  trainer.train()
  assert seen == {(work.batch, work.length, work.tokens)}, seen


def grpo(work: works.Reinforce, asked, clock: turn.Steps) -> None:
  """Steps of GRPOTrainer, which takes texts: of words that are a token each."""
  tok = tokenizer(asked)
  texts = prompts(tok, work)
  trainer = trl.GRPOTrainer(
    model=asked.model,
    reward_funcs=lambda completions, **_: [works.reward(c) for c in completions],
    processing_class=tok,
    train_dataset=datasets.Dataset.from_dict({"prompt": texts * (asked.repeats + 1)}),
    callbacks=[StepTimer(clock)],
    args=trl.GRPOConfig(
      per_device_train_batch_size=work.prompts * work.samples,
      num_generations=work.samples,
      max_completion_length=work.new,
      beta=0.04,
      num_iterations=1,
      temperature=1.0,
      use_vllm=False,
      gradient_checkpointing=False,
      generation_kwargs={"min_new_tokens": work.new},
      **settings(asked),
    ),
  )
  clock.watch(trainer, "_generate", "rollout")
  inner, seen = trainer._generate_and_score_completions, set()

  def spy(*args, **kwargs):
    out = inner(*args, **kwargs)
    shapes = *out["prompt_ids"].shape, *out["completion_ids"].shape
    scored = out.get("ref_per_token_logps") is not None
    seen.add((*shapes, int(out["completion_mask"].sum()), scored))
    return out

  trainer._generate_and_score_completions = spy
  clock.watch(trainer, "_generate_and_score_completions", "rollout and reference")
  trainer.train()
  rows = work.prompts * work.samples
  assert seen == {(rows, work.prompt, rows, work.new, work.tokens, True)}, seen


def prompts(tok, work: works.Reinforce) -> list[str]:
  """Texts of exactly as many tokens as wanted."""
  vocab = [tok.convert_ids_to_tokens(i) for i in range(500, 8500)]
  words = [t[1:] for t in vocab if t[:1] == "Ġ" and len(t) > 3 and t[1:].isascii()]
  words = [" " + w for w in words if w.isalpha() and w.islower()]
  rng, found = np.random.default_rng(0), []
  while len(found) < work.prompts:
    text = "".join(rng.choice(words, work.prompt))
    if len(tok(text, add_special_tokens=False)["input_ids"]) == work.prompt:
      found.append(text)
  return found


if __name__ == "__main__":
  main()
