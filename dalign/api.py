"""The library: what `import dalign` gives.

Values in, values out: no state, seeds are arguments, and files are touched only where a
model, a specification or an export is named. Deliberative alignment (2412.16339) is
`generate` with a `spec` in sight, `judge`, `sft_batch`, which cannot take a spec,
`sft_step`; then `generate` without it, `judge` with `thought=False`, `rl_step`.

The stages call the same code for runs, with checkpoints, meshes and adapters. What has
no argument here is an argument in `dalign.training`, `dalign.sampling` and
`dalign.judges`. Letters of shapes: `dalign.types`; P is prompts, of which B = P R rows.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import functools
import os
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalign.config.convert import build
from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.config.on_policy import ObjectiveConfig
from dalign.config.training import BatchConfig
from dalign.data import bundled
from dalign.data import prompt_sets
from dalign.formats import weights
from dalign.judges import functions
from dalign.judges import judge as judges
from dalign.judges.functions import Reply as Reply
from dalign.judges.functions import ThoughtfulReply as ThoughtfulReply
from dalign.judges.judge import FilterQuestion as FilterQuestion
from dalign.judges.judge import Judge as Judge
from dalign.judges.judge import RewardQuestion as RewardQuestion
from dalign.models import adapters
from dalign.policy import prompting
from dalign.policy import spec as specs
from dalign.policy.spec import render as render
from dalign.runs import store
from dalign.sampling import likelihood
from dalign.sampling import sampler as sampling
from dalign.sampling.programs import bucket_size
from dalign.text import packing
from dalign.text import vocab
from dalign.text.chat_template import Tokenizer
from dalign.text.chat_template import render_chat
from dalign.text.thinking import ThinkFormat
from dalign.training import advantages
from dalign.training import policy_gradient
from dalign.training import rollout
from dalign.training import sft
from dalign.training import train
from dalign.training.train import TrainState
from dalign.types import Prompt
from dalign.types import PyTree
from dalign.types import Sample
from dalign.types import Spec
from dalign.types import Turn
from dalign.types import Verdict

THINK = ThinkFormat(open="<think>\n", close="</think>")
# Runs everywhere; on a GPU or TPU kv_dtype "bfloat16" with attention "cudnn" or
# "splash" is faster.
COMPUTE = Compute(
  dtype="bfloat16",
  kv_dtype="float32",
  attention="xla",
  remat=False,
  logits_chunk=512,
)
RANDOM = dict(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffw=64) | dict(
  rope_theta=1e4, norm_eps=1e-5, tied=True, max_length=8192
)
STEP = 128  # lengths are rounded up to a multiple, so that few programs are compiled
SCORED = 8192  # tokens that are scored together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(Sample):
  """A reply to `prompt`, split into `thought` and `answer` (see `Sample`). `logp` has
  the log-probability, in nats, of each of tokens[forced:] under the distribution that
  it was drawn from, its temperature and the spec in sight included; () of what was not
  drawn."""

  prompt: Prompt
  logp: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
  """A decoder: architecture, tokenizer, parameters (the tree of `param_tree.py`), what
  its thoughts stand between and how it is computed. Make one with `load_model`."""

  arch: ModelConfig
  tokenizer: Tokenizer
  params: PyTree
  think: ThinkFormat
  compute: Compute

  def with_params(self, params: PyTree) -> "Model":
    """The same model with other parameters, such as those of a `TrainState`."""
    return dataclasses.replace(self, params=params)

  def generate(
    self,
    prompts: Prompt | Sequence[Prompt],
    *,
    spec: Spec | None = None,
    n: int = 1,
    seed: int = 0,
    max_new: int = 512,
    temperature: float = 1.0,
    think: bool = True,
    detail: str = "clauses",
    worked: int = 3,
  ) -> list[Rollout]:
    """`n` replies to each prompt, those of one prompt side by side.

    With a `spec` the model reads spec(category) in front of the prompt, as much of it
    as `detail` says ("clauses", "brief", "full"), and `worked` examples; without one
    the prompt alone. `think` opens the thought for it. At the most `max_new` tokens are
    drawn. A reply follows from seed, prompt and its number among the n, not from what
    else is asked. ValueError where prompt and reply are longer than the model takes.
    """
    prompts = [prompts] if isinstance(prompts, Prompt) else [*prompts]
    groups: dict[str, list[sampling.Request]] = collections.defaultdict(list)
    for prompt in prompts:
      forced = prompting.forced(self._tok, prompt.turns, self.think if think else None)
      tokens = (*self._front(prompt, spec, detail, worked), *forced)
      groups[prompt.category if spec else ""] += [
        sampling.Request(tokens=tokens, row_id=(prompt.id, i), max_new=max_new)
        for i in range(n)
      ]
    how = dict(cfg=self.arch, compute=self.compute, stop_ids=self._tok.stop_ids)
    sampler = _sampler(
      sampler=sampling.default_shapes(n * len(prompts), len(groups)), **how
    )
    done = sampler.complete(
      sampler.prepare(self.params),
      groups.values(),
      key=jax.random.key(seed),
      temperature=temperature,
      max_new=max_new,
    )
    found = {completion.request.row_id: completion for completion in done}
    return [
      self._rollout(prompt, i, found[prompt.id, i], think)
      for prompt in prompts
      for i in range(n)
    ]

  def logprobs(
    self,
    samples: Sequence[Rollout],
    *,
    spec: Spec | None = None,
    temperature: float = 1.0,
    detail: str = "clauses",
    worked: int = 3,
  ) -> list[np.ndarray]:
    """For each sample the log-probabilities, in nats, of its tokens[forced:] after its
    prompt, with a spec in sight or without; the rest as in `generate`."""
    fronts = [self._front(s.prompt, spec, detail, worked) for s in samples]
    rows = [[*front, *s.tokens] for front, s in zip(fronts, samples, strict=True)]
    starts = [len(f) + s.forced for f, s in zip(fronts, samples, strict=True)]
    length = bucket_size(max(map(len, rows), default=1), STEP)
    shape = BatchConfig(micro=1, rows=max(1, SCORED // length), length=length)
    score = _scorer(self.arch, self.compute, shape, temperature=temperature)
    return score(self.params, rows, starts)

  def write(self, prompt: Prompt, thought: str, answer: str) -> Rollout:
    """A thought and an answer from elsewhere as a reply, in tokens of this model."""
    sample = prompting.encode_completion(
      self._tok, prompt, thought, answer, index=0, think=self.think, opened=True
    )
    return Rollout(prompt=prompt, logp=(), **vars(sample))

  @property
  def _tok(self) -> Tokenizer:
    """The tokenizer as it reads the tags of a thought."""
    return _reading(self.tokenizer, self.think.open + self.think.close)

  def _front(self, prompt: Prompt, spec: Spec | None, detail: str, worked: int):
    """The tokens in front of a reply."""
    if spec is None:
      return render_chat(self._tok, prompting.plain(prompt))
    turns = prompting.teach(
      spec, prompt, detail=detail, worked=worked, think=self.think
    )
    return render_chat(self._tok, turns, kept_tags=self.think.tags)

  def _rollout(self, prompt: Prompt, index: int, done: sampling.Completion, think):
    how = dict(index=index, think=self.think, opened=think, needed=think)
    sample = prompting.parse_completion(
      self._tok, prompt, done.tokens, done.finish, **how
    )
    return Rollout(prompt=prompt, logp=done.logp, **vars(sample))


def load_model(
  path: str | os.PathLike[str],
  *,
  think: ThinkFormat = THINK,
  compute: Compute = COMPUTE,
  seed: int = 0,
  date: str = "",
) -> Model:
  """The model at a path: a Hugging Face folder, one of PEFT adapters, a .gguf file,
  "pip:NAME" of an installed package that holds one, a name on the Hub, or "random",
  tiny and drawn by the seed. Parameters are float32. Its chat template is told that
  today is `date`, such as 2026-11-27, or the day on which this is called. ValueError
  names what is absent or not understood."""
  if path == "random":
    tok = vocab.tiny_tokenizer()
    arch = build(ModelConfig, RANDOM | {"vocab": len(tok.ids)})
    found = weights.Checkpoint.random(arch, tok, seed)
  else:
    found = weights.find(str(path))
  date = date or datetime.datetime.now(datetime.UTC).date().isoformat()
  return Model(
    arch=found.cfg,
    tokenizer=dataclasses.replace(found.tok, date=date).without_opened_thought(
      think.tag
    ),
    params=jax.tree.map(jnp.asarray, found.params()),
    think=think,
    compute=compute,
  )


def load_spec(path: str | os.PathLike[str] = "specs") -> Spec:
  """The specification in a folder, in the format of specs/README.md; "specs" is also
  the one that comes with dalign. ValueError says what is wrong, by file and line."""
  folder = bundled.find(str(path))
  files = store.read_spec_files(folder)
  return specs.load({(folder / name).as_posix(): text for name, text in files.items()})


def user(text: str, *, category: str = specs.BENIGN, expected: str = "") -> Prompt:
  """A prompt of one user turn, with an id that follows from it. `category` names its
  policy; `expected` is the ideal response type ("refuse", "safe_complete", "comply"),
  which judges are told and no model that replies, or "" where nobody knows it."""
  turns = (Turn(role="user", content=text),)
  id = prompt_sets.digest(turns)
  return Prompt(id=id, turns=turns, category=category, expected=expected)


def judge(
  spec: Spec,
  samples: Sequence[Rollout],
  *,
  judge: Model | Judge | Callable[[list[Reply]], Sequence[Any]] | None = None,
  thought: bool = True,
  detail: str = "clauses",
) -> list[Verdict]:
  """A verdict on each sample: a score in [0, 1], or None with a reason, as malformed
  samples have.

  `judge` is a model, which reads the policy and whose expected grade counts; a function
  from a list of `Reply`, which have the policy, to a score, None, or a pair of one and
  a reason for each; any `Judge`; or None for the rubric of `judges/rubric.py`, which
  judges by the policies that come with dalign alone. With `thought` false it is asked
  of the answers alone, in what cannot carry a thought: the reward of RL. Of those the
  rubric judges prompts with `expected` only. ValueError where the function gives
  something else, and for the rubric with another specification.
  """
  if isinstance(judge, Model):
    score_logprobs = likelihood.make_label_scorer(
      judge.params, tok=judge._tok, cfg=judge.arch, compute=judge.compute
    )
    policy = functools.partial(render, spec, detail=detail)
    judge = judges.model_judge(policy, score_logprobs)
  elif judge is not None and not isinstance(judge, Judge):
    judge = functions.of_function(judge, functools.partial(render, spec, detail="full"))
  rubric = judges.rubric_judge if thought else judges.rubric_reward
  ask = judge or rubric(spec, quality=None)
  return judges.verdicts(ask, [(s.prompt, s) for s in samples], thought=thought)


def init_state(model: Model, *, learning_rate: float = 1e-4) -> TrainState:
  """The state before the first step: parameters, and Adam's moments and rate."""
  return train.create(model.params, train.adam(learning_rate))


def sft_batch(model: Model, samples: Sequence[Rollout]) -> dict[str, np.ndarray]:
  """What SFT learns, [B, T] arrays of a row a sample: the prompt WITHOUT specification,
  then thought and answer. weight_BT is 1 on the tokens that were drawn, else 0.
  ValueError where there is no sample."""
  packed = _rows(model, samples)
  return packed.lines | {"weight_BT": packed.weight_BT}


def sft_step(
  model: Model, state: TrainState, batch: Mapping[str, Any], *, parts: int = 1
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update that makes a batch likelier; pure: no argument is changed.

  Its rows are computed in `parts` of equal size, one after the other, to save memory.
  Metrics are scalars: loss and entropy_nats in nats a token, accuracy of the likeliest
  token, grad_norm.
  """
  return _sft(model.arch, model.compute)(state, batch, parts)


def rl_batch(
  model: Model,
  samples: Sequence[Rollout],
  verdicts: Sequence[Verdict],
  *,
  temperature: float = 1.0,
) -> dict[str, np.ndarray]:
  """Rollouts, R of each prompt side by side, with what they earned: reward_PR and
  scored_PR, and [B, T] arrays of a row a rollout.

  `model` is where training starts, to which the KL is measured. Malformed replies earn
  0, those without a verdict count nowhere. behaviour_BT (the sampler's) and
  reference_BT (the model's) are in nats at `temperature`, that of `generate`.
  ValueError where prompts have unlike numbers of rollouts.
  """
  packed, ids = _rows(model, samples), [s.prompt_id for s in samples]
  R = ids.count(ids[0])
  if len(ids) % R or ids != [id for id in ids[::R] for _ in range(R)]:
    raise ValueError(f"wanted {R} rollouts of each prompt side by side, got {ids}")
  reference = model.logprobs(samples, temperature=temperature)
  pairs = zip(samples, verdicts, strict=True)
  scores = [0.0 if s.malformed else v.score for s, v in pairs]
  behaviour, shape = [s.logp for s in samples], packed.tokens_BT.shape
  return {
    **packed.lines,
    "sampled_BT": packed.weight_BT > 0,
    "reward_PR": np.array([x or 0.0 for x in scores], np.float32).reshape(-1, R),
    "scored_PR": np.array([x is not None for x in scores]).reshape(-1, R),
    "cut_B": np.array([s.finish == "length" for s in samples]),
    **rollout.scatter_to_packed(
      shape, packed.where, behaviour=behaviour, reference=reference
    ),
  }


def rl_step(
  model: Model,
  state: TrainState,
  batch: Mapping[str, Any],
  *,
  objective: ObjectiveConfig | str = "rloo",
  temperature: float = 1.0,
  parts: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One policy-gradient update: advantages, surrogate, gradient. Pure, as `sft_step`.

  `objective` is that of `dalign.objective`, or its name. ValueError for one that learns
  values, which the stage alone does. Metrics are those of `policy_gradient.make_loss`,
  and grad_norm.
  """
  chosen = _objective(objective) if isinstance(objective, str) else objective
  if chosen.learns_values:
    raise ValueError(f"objective: wanted one without a value head, got {chosen}")
  step = _rl(model.arch, model.compute, chosen, temperature)
  return step(state, advantages.with_advantages(chosen, batch), parts)


def objective(name: str, **changes: Any) -> ObjectiveConfig:
  """The algorithm of that name in configs/algorithms.py ("rloo", "grpo", "dapo", ...),
  some of its choices changed."""
  of = runpy.run_path(str(bundled.find("configs/algorithms.py")))["of"]
  return build(ObjectiveConfig, of(name, **changes), "objective")


def export(
  model: Model,
  path: str | os.PathLike[str],
  *,
  dtype: str = "bfloat16",
  think: bool = True,
) -> None:
  """Writes a folder that transformers and `load_model` read. With `think` its chat
  template opens the thought, as `generate` does."""
  params = adapters.merge_adapters(model.params, cfg=model.arch)
  tok = model._tok.with_opened_thought(model.think) if think else model.tokenizer
  weights.save_hf(str(path), model.arch, params, tok, dtype=dtype)


# What equal arguments need not compile twice.


_sampler = functools.lru_cache(maxsize=16)(sampling.Sampler)
_scorer = functools.lru_cache(maxsize=16)(likelihood.Scorer)
_reading = functools.lru_cache(maxsize=16)(Tokenizer.with_tags)
_objective = functools.cache(objective)


@functools.lru_cache(maxsize=16)
def _sft(arch, compute):
  return train.make_step(sft.make_loss(cfg=arch, compute=compute))


@functools.lru_cache(maxsize=16)
def _rl(arch, compute, objective, temperature: float):
  how = dict(cfg=arch, compute=compute, temperature=temperature)
  return train.make_step(policy_gradient.make_loss(objective=objective, **how))


def _rows(model: Model, samples: Sequence[Rollout]) -> packing.Packed:
  """A row a sample, without a spec."""
  if not samples:
    raise ValueError("wanted one sample or more, got none")
  rows = [
    prompting.training_row(model._tok, prompting.plain(s.prompt), s.tokens, s.forced)
    for s in samples
  ]
  longest = max(len(tokens) for tokens, _ in rows)
  model.arch.check_length(longest, "a prompt and its reply")
  return packing.pad_rows(rows, length=bucket_size(longest, STEP))
