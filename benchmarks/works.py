"""The works: what every contender does, as plain data. Needs numpy alone.

Prompts are seeded random ordinary token ids of SmolLM2: the numbers are speed, and say
nothing of quality. All contenders get the same ids, batch and lengths.
"""

import dataclasses

import numpy as np

ORDINARY = 500, 49000  # ids without control tokens, padding or ends of text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
  """Greedy decoding of exactly as many new tokens as asked for; no token ends a row.

  Each prompt is `shared` tokens that all have in front and then `own` of its own; both
  `own` and `new` are the least and the most, drawn evenly. At most `batch` rows are
  decoded at once.
  """

  about: str
  prompts: int
  batch: int
  shared: int = 0
  own: tuple[int, int]
  new: tuple[int, int]

  def rows(self) -> list[list[int]]:
    """The prompts' tokens."""
    rng = np.random.default_rng(0)
    front = rng.integers(*ORDINARY, self.shared).tolist()
    lengths = rng.integers(self.own[0], self.own[1] + 1, self.prompts)
    return [front + rng.integers(*ORDINARY, n).tolist() for n in lengths]

  def lengths(self) -> list[int]:
    """How many new tokens each prompt gets."""
    rng = np.random.default_rng(1)
    return rng.integers(self.new[0], self.new[1] + 1, self.prompts).tolist()

  @property
  def tokens(self) -> int:
    """New tokens in all: the rate counts these."""
    return sum(self.lengths())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
  """A step of full fine-tuning with AdamW, every token a target."""

  about: str
  batch: int
  length: int
  remat: bool

  def rows(self, step: int) -> np.ndarray:
    """The tokens [batch, length] of a step."""
    rng = np.random.default_rng(step)
    return rng.integers(*ORDINARY, (self.batch, self.length)).astype(np.int32)

  @property
  def tokens(self) -> int:
    """Tokens in all: the rate counts these."""
    return self.batch * self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce:
  """A step of group-relative policy gradients: sampled rollouts at temperature 1, a
  reward in Python, log-probabilities of a frozen reference, one update."""

  about: str
  prompts: int
  samples: int
  prompt: int
  new: int

  def rows(self, step: int) -> list[list[int]]:
    """The prompts' tokens of a step."""
    rng = np.random.default_rng(step)
    return rng.integers(*ORDINARY, (self.prompts, self.prompt)).tolist()

  @property
  def tokens(self) -> int:
    """New tokens in all: the rate counts these."""
    return self.prompts * self.samples * self.new


def reward(tokens) -> float:
  """W4's reward of a completion: varied, cheap, and the same for everyone."""
  return float(len(set(tokens)) % 7)


WORKS = {
  "W1": Decode(
    about="decode: 16 prompts of 256 tokens, 64 new",
    prompts=16,
    batch=16,
    own=(256, 256),
    new=(64, 64),
  ),
  "W2": Decode(
    about="decode: 16 prompts that share 768 tokens and have 64 of their own, 64 new",
    prompts=16,
    batch=16,
    shared=768,
    own=(64, 64),
    new=(64, 64),
  ),
  "W2L": Decode(
    about="decode: 64 prompts that share 4,096 tokens and have 64 of their own, 64 new",
    prompts=64,
    batch=64,
    shared=4096,
    own=(64, 64),
    new=(64, 64),
  ),
  "W3": Train(about="SFT step: 8 x 512 tokens", batch=8, length=512, remat=False),
  "W3R": Train(
    about="SFT step: 8 x 512 tokens, activations made again in the backward pass",
    batch=8,
    length=512,
    remat=True,
  ),
  "W4": Reinforce(
    about="RL step: 4 prompts of 128 tokens x 4 samples of 64 new, KL to a reference",
    prompts=4,
    samples=4,
    prompt=128,
    new=64,
  ),
  "W5": Decode(
    about="decode: 64 prompts of 32 to 512 tokens, 8 to 256 new, 16 rows at once",
    prompts=64,
    batch=16,
    own=(32, 512),
    new=(8, 256),
  ),
}
