"""On-policy distillation: a student's samples, scored by a teacher that is told more.

The student samples without the specification; the teacher reads the same tokens with
spec(category) in its prompt, as in context distillation (2209.15189), but on what the
student says (GKD, 2306.13649; MiniLLM, 2306.08543). What is minimised is, of each token
that the student, pi, has sampled after y_<t, the reverse KL

  KL_t = sum_v pi(v | x, y_<t) (log pi(v | x, y_<t) - log p(v | spec, x, y_<t)).

Over samples of the student, the sum of KL_t over t has the mean KL(pi || p) of whole
completions. Its gradient takes y_<t as given, as in GKD: what a token does to the
states after it is left out.
"""

from flax import struct
import jax
import jax.numpy as jnp

from dalign.config.model import Compute
from dalign.config.model import ModelConfig
from dalign.models import ops
from dalign.models import sharding
from dalign.models import transformer
from dalign.types import Leaf
from dalign.types import Mean
from dalign.types import PyTree


@struct.dataclass
class Divergence:
  """Per token, in nats and float32: the reverse KL, and the student's entropy."""

  kl: Leaf
  entropy: Leaf


def divergence(
  hidden_PND,
  head_DV,
  teacher_PND,
  teacher_DV,
  wanted_PN,
  *,
  dtype,
  chunk: int,
  temperature: float = 1.0,
  cap: float = 0.0,
  absent=(),
) -> Divergence:
  """KL(pi || p) of the next token, exact over the whole vocabulary, [P, N], given the
  last hidden states and the heads of student and teacher, both at `temperature`.

  Where it is not wanted it is 0 and costs nothing. Logits are made of `chunk` tokens of
  each part at a time, and again in the backward pass: there are never more of them.
  Only `kl` has a gradient, and only by the student's hidden states and head. Otherwise
  as `ops.token_stats`.
  """
  cut, whole, used = ops.wanted_first_chunks(wanted_PN, chunk)
  teacher_PND, teacher_DV = jax.lax.stop_gradient((teacher_PND, teacher_DV))

  def logp(hidden_CD, head_DV):
    logits_CV = ops.soft_cap(ops.matmul(hidden_CD, head_DV, dtype), cap)
    return jax.nn.log_softmax(ops.mask_absent(logits_CV, absent) / temperature)

  @jax.checkpoint
  def one(hidden_CD, teacher_CD):
    logp_CV = logp(hidden_CD, head_DV)
    prob_CV = jnp.exp(logp_CV)
    kl_C = jnp.sum(prob_CV * (logp_CV - logp(teacher_CD, teacher_DV)), axis=-1)
    entropy_C = -jnp.sum(prob_CV * logp_CV, axis=-1)
    return Divergence(kl=kl_C, entropy=jax.lax.stop_gradient(entropy_C))

  def none(hidden_CD, _):
    zeros_C = jnp.zeros(hidden_CD.shape[0])
    return Divergence(kl=zeros_C, entropy=zeros_C)

  def step(i, chunks):
    return i + 1, jax.lax.cond(i < used, one, none, *chunks)

  _, found = jax.lax.scan(step, 0, (cut(hidden_PND), cut(teacher_PND)))
  return jax.tree.map(whole, found)


def make_loss(*, cfg: ModelConfig, compute: Compute, temperature: float, exact: bool):
  """The mean reverse KL of the sampled tokens of a step, in nats.

  Where it is `exact`, KL_t is summed over the vocabulary. Else its value is estimated
  by log pi(y_t) - log p(y_t), and its gradient is the policy gradient (REINFORCE) of
  y_t with log p(y_t) - log pi(y_t) as the advantage. Over y_t drawn from pi both have
  the means of the exact ones. Log-probabilities are those at `temperature`, at which
  y_t was sampled.

  A batch is that of `transformer.target_stats` with sampled_BT (as targets) and what
  the teacher makes of each of them, at its place: if exact teacher_BTD, the hidden
  states that predict it (`make_hidden`), else teacher_BT, its log-probability.
  Parameters are {"policy": a decoder's, "teacher": `head_of` the teacher's}; the latter
  have no gradient.
  """

  def loss(params, batch, key):
    del key
    policy, tokens_BT = params["policy"], batch["tokens_BT"]
    hidden_BTD = transformer.hidden(policy, batch, cfg=cfg, compute=compute)
    if exact:
      found = _exact(params, hidden_BTD, batch)
      kl_BT, entropy_BT = found.kl[:, :-1], found.entropy[:, :-1]
    else:
      stats = transformer.stats(
        policy,
        hidden_BTD,
        tokens_BT,
        batch["sampled_BT"][:, 1:],
        cfg=cfg,
        compute=compute,
        temperature=temperature,
      )
      gap_BT = jax.lax.stop_gradient(stats.logp - batch["teacher_BT"][:, 1:])
      kl_BT = gap_BT + gap_BT * (stats.logp - jax.lax.stop_gradient(stats.logp))
      entropy_BT = stats.entropy
    kl = Mean.of(kl_BT, batch["sampled_BT"][:, 1:])
    entropy = Mean.of(entropy_BT, batch["sampled_BT"][:, 1:])
    return kl, {"reverse_kl_nats": jax.lax.stop_gradient(kl), "entropy_nats": entropy}

  def _exact(params, hidden_BTD, batch) -> Divergence:
    """Of each token the divergence that the state before it has, at that state."""
    parts, whole = sharding.token_partition(hidden_BTD.shape[:2])
    heads = (
      sharding.constrain(transformer.head(params[name]), None, "vocab")
      for name in ("policy", "teacher")
    )
    head_DV, teacher_DV = heads
    before = ((0, 0), (0, 1))
    found = divergence(
      parts(hidden_BTD),
      head_DV,
      parts(jnp.roll(batch["teacher_BTD"], -1, axis=1)),
      teacher_DV,
      parts(jnp.pad(batch["sampled_BT"][:, 1:], before)),
      dtype=jnp.dtype(compute.dtype),
      chunk=compute.logits_chunk,
      temperature=temperature,
      cap=cfg.logit_cap,
      absent=cfg.absent,
    )
    return jax.tree.map(whole, found)

  return loss


def head_of(params: PyTree) -> PyTree:
  """What `transformer.head` reads of a decoder's parameters."""
  name = "head" if "head" in params else "embed"
  return {name: params[name]}


def make_hidden(*, cfg: ModelConfig, compute: Compute):
  """`hidden(params, batch) -> hidden_BTD`: at each token of a batch of
  `transformer.target_stats` the state that predicts it, rounded as the head does."""

  def hidden(params, batch):
    hidden_BTD = transformer.hidden(params, batch, cfg=cfg, compute=compute)
    shifted_BTD = jnp.pad(hidden_BTD[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return shifted_BTD.astype(compute.dtype)

  return hidden
