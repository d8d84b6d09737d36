"""Tunix's turn: Sampler, PeftTrainer on all parameters, GRPOLearner.

Tunix 0.1.7 leaves a model's rotary base at 1,000,000 whatever its config says; it is
patched here to the model's. Its sampler has no shared prefix.
"""

import json
import os
import pathlib

from benchmarks import turn
from benchmarks import works

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.generate import sampler as sampling
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer

NEVER = 10**6


class Digits:
  """A tokenizer whose texts are decimal ids. Pad is 0; no BOS; no id ends a text."""

  def __init__(self, vocab: int):
    self.vocab = vocab

  def encode(self, text, **_):
    return [int(x) for x in text.split()]

  def decode(self, ids, **_):
    return " ".join(map(str, ids))

  def bos_id(self):
    return 0  # false: none is put in front

  def eos_id(self):
    return self.vocab + 7

  def pad_id(self):
    return 0


def spelled(rows) -> list[str]:
  """Token ids as the texts that `Digits` reads."""
  return [" ".join(map(str, row)) for row in rows]


class Model:
  """The checkpoint as Tunix's Llama 3."""

  def __init__(self, asked, *, remat: bool):
    self.path = asked.model
    c = json.loads((pathlib.Path(asked.model) / "config.json").read_text())
    theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
    assert llama.apply_rope.__defaults__ == (1_000_000,), "apply_rope has changed"
    llama.apply_rope.__defaults__ = (theta,)
    kind = llama.RematConfig.DECODER if remat else llama.RematConfig.NONE
    heads = c["num_attention_heads"]
    self.cfg = llama.ModelConfig(
      num_layers=c["num_hidden_layers"],
      vocab_size=c["vocab_size"],
      embed_dim=c["hidden_size"],
      hidden_dim=c["intermediate_size"],
      num_heads=heads,
      head_dim=c["hidden_size"] // heads,
      num_kv_heads=c["num_key_value_heads"],
      rope_theta=theta,
      norm_eps=c["rms_norm_eps"],
      weight_tying=c["tie_word_embeddings"],
      remat_config=kind,
    )
    auto = (jax.sharding.AxisType.Auto,) * 2
    self.mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)
    self.dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[asked.dtype]
    self.tokenizer = Digits(self.cfg.vocab_size)

  def load(self):
    """The model with its weights, anew at each call."""
    return llama_params.create_model_from_safe_tensors(
      self.path, self.cfg, self.mesh, dtype=self.dtype
    )


def settled(model) -> None:
  """Waits for a model's parameters."""
  jax.block_until_ready(jax.tree.leaves(nnx.state(model)))


def main() -> None:
  """Runs the turn that the command line asks for."""
  asked = turn.settings()
  work = works.WORKS[asked.work]
  version = turn.versions("google-tunix", "jax", "flax")
  model = Model(asked, remat=isinstance(work, works.Train) and work.remat)
  if isinstance(work, works.Decode):
    decode(work, asked, model, version)
    return
  clock = turn.Steps()
  run = sft if isinstance(work, works.Train) else grpo
  run(work, asked, model, clock)
  clock.answer(version=version)


def decode(work: works.Decode, asked, model: Model, version: str) -> None:
  """All prompts as one batch of one length."""
  rows, new = work.rows(), work.new[0]
  length = len(rows[0])
  assert work.own[0] == work.own[1] and work.new[0] == work.new[1], "even lengths"
  c = model.cfg
  cache = sampling.CacheConfig(length + new, c.num_layers, c.num_kv_heads, c.head_dim)
  engine = sampling.Sampler(model.load(), model.tokenizer, cache)

  def run(whole: bool):
    n = new if whole else 1
    out = engine(spelled(rows), max_generation_steps=n, max_prompt_length=length)
    found = [np.asarray(t).tolist() for t in out.tokens]
    assert all(len(row) == n for row in found), [len(row) for row in found]
    return found

  turn.decode(run, asked.repeats, version=version)


def sft(work: works.Train, asked, model: Model, clock: turn.Steps) -> None:
  """Steps of PeftTrainer, which trains all parameters of a model without LoRA."""
  trainer = peft_trainer.PeftTrainer(
    model.load(),
    optax.adamw(1e-5),
    peft_trainer.TrainingConfig(
      eval_every_n_steps=NEVER,
      max_steps=asked.repeats + 1,
      max_inflight_computations=1,
    ),
  )
  at_BT = np.tile(np.arange(work.length, dtype=np.int32), (work.batch, 1))
  causal_BTT = np.tile(np.tri(work.length, dtype=bool), (work.batch, 1, 1))
  trainer = trainer.with_gen_model_input_fn(
    lambda x: {
      "input_tokens": x.input_tokens,
      "input_mask": x.input_mask,
      "positions": jnp.asarray(at_BT),
      "attention_mask": jnp.asarray(causal_BTT),
    }
  )
  inner = trainer.jit_train_and_eval_step

  def with_clock(*args, **kwargs):
    train_step, eval_step = inner(*args, **kwargs)

    class Step:
      func = getattr(train_step, "func", None)

      def __call__(self, batch):
        clock.begin()
        out = train_step(batch)
        jax.block_until_ready(out)
        settled(trainer.model)
        clock.end()
        return out

    return Step(), eval_step

  trainer.jit_train_and_eval_step = with_clock
  steps = [work.rows(step) for step in range(asked.repeats + 1)]
  with model.mesh:
    trainer.train(
      [
        peft_trainer.TrainingInput(input_tokens=x, input_mask=np.ones_like(x))
        for x in steps
      ]
    )


def grpo(work: works.Reinforce, asked, model: Model, clock: turn.Steps) -> None:
  """Steps of GRPOLearner."""
  roles = rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT
  training = rl_cluster.RLTrainingConfig(
    actor_optimizer=optax.adamw(1e-5),
    eval_every_n_steps=NEVER,
    max_steps=asked.repeats + 1,
    mini_batch_size=work.prompts,
    train_micro_batch_size=work.prompts,
    max_inflight_computations=1,
  )
  rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=work.new,
    max_prompt_length=work.prompt,
    kv_cache_size=work.prompt + work.new,
    temperature=1.0,
    top_p=1.0,
    top_k=None,
    eos_tokens=[model.tokenizer.eos_id()],
  )
  cluster = rl_cluster.RLCluster(
    actor=model.load(),
    reference=model.load(),
    tokenizer=model.tokenizer,
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh={role: model.mesh for role in roles},
      rollout_engine="vanilla",
      offload_to_cpu=False,
      training_config=training,
      rollout_config=rollout,
    ),
  )
  seen = set()

  def reward(prompts, completions, **_):
    tokens = [c.split() for c in completions]
    seen.update((len(tokens), len(t)) for t in tokens)
    return [works.reward(t) for t in tokens]

  config = grpo_learner.GRPOConfig(
    num_generations=work.samples, num_iterations=1, beta=0.04
  )
  learner = grpo_learner.GRPOLearner(cluster, config, reward)

  def settle(out):
    arrays = [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]
    jax.block_until_ready(arrays)

  clock.watch(cluster, "generate", "rollout", settle)
  clock.watch(cluster, "get_ref_per_token_logps", "reference", settle)
  clock.watch(
    cluster, "update_actor", "update", lambda _: settled(cluster.actor_trainer.model)
  )
  inner = learner._run_global_step

  def with_clock(*args, **kwargs):
    clock.begin()
    out = inner(*args, **kwargs)
    settled(cluster.actor_trainer.model)
    if "update" in clock.parts:  # it is called once more at the end, for nothing
      clock.end()
    return out

  learner._run_global_step = with_clock
  # An array: a list of texts becomes a list of arrays where samples are repeated.
  steps = [
    {"prompts": np.array(spelled(work.rows(step)))} for step in range(asked.repeats + 1)
  ]
  with model.mesh:
    learner.train(steps)
  assert seen == {(work.prompts * work.samples, work.new)}, seen


if __name__ == "__main__":
  main()
