"""Config of replies: to which prompts, by which policies, by whom they are sampled,
judged and evaluated."""

import dataclasses
from typing import Annotated, Any, Literal, Mapping

from dalign.config.fields import Checked
from dalign.config.fields import Count
from dalign.config.fields import Form
from dalign.config.fields import Metadata
from dalign.config.fields import Natural
from dalign.config.fields import NotNegative
from dalign.config.fields import Positive
from dalign.config.fields import Share
from dalign.config.fields import SomeShare
from dalign.config.fields import limit
from dalign.config.fields import or_function
from dalign.config.fields import refuse

JudgeForm = Literal[  # forms.FORMS
  "grade",
  "safeguard",
  "guard",
  "strongreject",
  "harmbench",
  "wildguard",
  "qwen3guard",
]
Arm = Literal[
  "base",
  "base_thinks",
  "spec_in_prompt",
  "spec_in_prompt_oracle",
  "self_refine",
  "sft",
  "distill",
  "sft_distill",
  "rl",
  "sft_rl",
  "endpoint",
  "endpoint_spec",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecConfig(Checked):
  """The written specification.

  dir: the folder of its policies, as it stands or beside the package.
  detail: how much of a policy is shown: "full", "brief" (the short forms that its
    author marked) or "clauses" (those of the category's clauses only).
  """

  dir: str
  detail: Literal["full", "brief", "clauses"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
  """The prompt set.

  source: "bundled", "csv:PATH", "jsonl:PATH", "parquet:PATH", "hf:DIR" (a folder that
    `datasets` saved), "tfds:NAME:SPLIT", "public:NAME", or of the policy world "world".
  columns: our field names -> the set's own; {} where they are the same.
  contaminated: the share of training prompts that may say what held-out ones say (8
    words in a row, or near-twins); they are left out, and more stop the run.
  dir: the folder where prepared sets are kept.
  """

  source: str
  columns: Mapping[str, str]
  contaminated: Share
  dir: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig(Checked):
  """A model behind a server that speaks OpenAI's protocol (`endpoint.py`).

  url: as "http://127.0.0.1:8000/v1"; "" for none.
  model: its name there.
  key: the environment variable that holds the key, if the server wants one.
  concurrency: requests under way at once.
  timeout: seconds a request.
  retries: how often a request that failed is sent again.
  price_in, price_out: prices of a million tokens read, and written, in any currency; 0
    where nobody asks.
  """

  url: str
  model: str
  key: str = limit()
  concurrency: Count = limit()
  timeout: Positive = limit()
  retries: Natural = limit()
  price_in: NotNegative = limit()
  price_out: NotNegative = limit()

  def check(self, asker: str) -> None:
    """ValueError where there is no server for `asker`."""
    if not (self.url and self.model):
      raise ValueError(
        f"config.{asker} needs an endpoint: wanted a url, as http://127.0.0.1:8000/v1, "
        f"and a model beside it, got {self.url!r} and {self.model!r}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Checked):
  """Stage 1. Each prompt is sampled in rounds until enough samples look right.

  prompts: how many training prompts of each ideal response type, as {"refuse": n, ...}.
  helpful, capability: how many training prompts of those kinds.
  demonstrations: worked examples in the context, or all that there are.
  teacher: who thinks and answers: the "base", the model at an "endpoint", or one that
    did so before and elsewhere, "recorded:PATH" (`recordings.py`), whose samples are
    taken as they are; "recorded:bundled" for those that come with dalign.
  endpoint: the server of such a teacher.
  revise: samples revise answers that the base gave without the spec, as in
    Constitutional AI (2212.08073).
  batch: samples a prompt and round.
  most: samples a prompt at the most.
  enough: stop with a prompt that has this many samples that look right: well-formed,
    and at least `threshold` to the rubric without its language quality; of policies
    that the rubric was not made for, a thought that ends in what the answer does.
  threshold: the score, in [0, 1], from which a sample looks right.
  refused: the share of samples that an endpoint may refuse, or its filter cut, before
    generate fails.
  temperature: temperature of sampling.
  max_new: tokens of a sample, thought and answer, at the most.
  """

  prompts: Mapping[str, Any]
  helpful: Natural
  capability: Natural
  demonstrations: Natural
  teacher: Annotated[str, Form("base|endpoint|recorded:.+")]
  endpoint: EndpointConfig
  revise: bool
  batch: Count
  most: Count
  enough: Count
  threshold: float
  refused: SomeShare = limit()
  temperature: Positive
  max_new: Count

  def __post_init__(self):
    super().__post_init__()
    if self.teacher == "endpoint":
      self.endpoint.check("generate.teacher=endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig(Checked):
  """Stage 2. Each sample is judged, and the best are kept.

  judge: the "rubric", the base "model" by the odds of its grades, the base "sampled":
    it thinks, then grades; as that the model at an "endpoint"; the votes that were
    "recorded" with the samples of a recorded teacher; or a function of yours,
    "python:FILE:FUNCTION" (`functions.py`). The rubric judges by the policies that come
    with dalign, and no others.
  metadata: what judges are told of the ideal response type: "none", "told", or wrong
    for a share of the prompts, as "noisy:0.2" (METHOD: noisy side information).
  endpoint: the server of such a judge.
  form: how the model at an endpoint is asked (`forms.FORMS`): for a "grade" of 1 to 5
    with reasons, as a "safeguard" whether the policy in its system turn is violated, as
    a "guard" with a policy of its own (Llama Guard), the conversation alone, or as one
    of the models and benchmarks that the other forms are named after. All but "grade"
    and "safeguard" read the answer alone, and of a thought nothing.
  votes: verdicts a sample, of which the least counts.
  readable: the share of a sample's votes that need a verdict: then the least of these
    counts, and the others are counted in the manifest; with fewer it is unscored. With
    1 one vote without a verdict leaves a sample without a score.
  temperature: temperature of a judge that samples.
  max_new: tokens of a judge's verdict, with its thought, at the most.
  at_once: samples that are judged together, and then saved: what a kill loses at the
    most; the first time they are 256.
  unscored: the share of well-formed samples, of all and of each cell (category and
    ideal response type) with ten or more, on which the judge may have no verdict before
    filter fails; at half, and at once, if it is so after the first 256.
  threshold: the score, in [0, 1], from which a sample is kept.
  least: kept samples of a cell that are enough to learn it from; with fewer, filter
    does as config.thin says.
  per_prompt: samples of a prompt that are kept, at the most.
  per_cell: samples of a cell (category and ideal response type) that are kept, at the
    most.
  quality: the rubric also asks the base model, of any stage that it judges in, whether
    an answer is English and is likelier after its prompt than after none.
  """

  judge: Annotated[
    str, or_function("rubric", "model", "sampled", "endpoint", "recorded")
  ]
  metadata: Metadata
  endpoint: EndpointConfig
  form: JudgeForm
  votes: Count
  readable: SomeShare
  temperature: Positive
  max_new: Count
  at_once: Count
  unscored: SomeShare = limit()
  threshold: float
  least: Natural = limit()
  per_prompt: Count
  per_cell: Count
  quality: bool

  def __post_init__(self):
    super().__post_init__()
    if self.judge == "endpoint":
      self.endpoint.check("filter.judge=endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
  """Held-out evaluation of the arms.

  arms: what is evaluated, in this order; arms whose model is missing are left out and
    named. "endpoint" is the model at `endpoint`, "endpoint_spec" the same with the
    specification in its prompt.
  endpoint: the server of such arms.
  prompts: how many held-out prompts of policies, at the most.
  helpful, capability: how many held-out prompts of those kinds, at the most.
  samples: replies that are sampled to each prompt.
  budgets: most tokens of a thought, each evaluated besides: what thinking is worth.
  grader: who grades the answers to prompts of policies and helpful ones: the "rules" of
    grader.py, a "model" in this process, the model at an "endpoint", or a function of
    yours, "python:FILE:FUNCTION" (`functions.py`), which is told the label and no
    thought. Of several the first one's grades make the table, and the others' agreement
    with it is told.
  grader_model: path of such a model, as `model.path`, of any family; another than the
    one that is evaluated.
  grader_endpoint: the server of a grader.
  form: how a grader that is a model is asked, as `filter.form`. By a "guard"
    prompts that are to be answered have no grade, as it knows harm alone.
  grader_max_new: tokens of a grader's verdict, with its thought, at the most.
  swaps: prompts that are given, besides, another prompt's thought with the opposite
    decision: whether thoughts decide (`evals.opposite_thoughts`); and, of thoughts that
    begin with a clause, that clause alone, what follows it alone or its last sentence
    alone: which of them decides (`evals.conflicting_thoughts`).
  extra: further sets, name -> {"source", "columns"}, evaluated under that name.
  suite: public sets (`public.SETS`), each alone or with ATTACKS (`attacks.py`) that
    disguise it, the innermost first, as in ("xstest", "strongreject+rot13+begin").
  copies: a folder with copies of public sets, read instead of downloads
    (`public.load`), or "".
  extra_limit: prompts of each of these sets at the most; disguises of one set are of
    the same prompts, but for those that a code leaves as they are (Cyrillic in ROT13).
  worst: of a set in several disguises, the share that counts for each prompt besides:
    those which the arm does worst on (goodness@0.1 of 2402.10260 with 0.1).
  least: held-out prompts of an ideal response type that are enough to say something of
    it; with fewer, eval does as config.thin says, and before anything is trained.
  unscored: the share of answers that may go without a score before eval fails.
  temperature: temperature of sampling; 0 takes the likeliest token.
  top_p: each token is drawn from the fewest likeliest ones that have this share of the
    probability; 1 draws from all.
  max_think: tokens of a thought at the most, and then max_new are those of the answer;
    with 0 both share max_new.
  max_new: tokens of a completion, or of its answer, at the most.
  trials: bootstrap samples of an interval.
  """

  arms: tuple[Arm, ...]
  endpoint: EndpointConfig
  grader: tuple[Annotated[str, or_function("rules", "model", "endpoint")], ...]
  grader_model: str
  grader_endpoint: EndpointConfig
  form: JudgeForm
  grader_max_new: Count
  prompts: Natural
  helpful: Natural
  capability: Natural
  samples: Count
  budgets: tuple[Natural, ...]
  swaps: Natural
  extra: Mapping[str, Any]
  suite: tuple[str, ...]
  copies: str
  extra_limit: Natural
  worst: SomeShare
  least: Natural = limit()
  unscored: SomeShare = limit()
  temperature: NotNegative
  top_p: SomeShare
  max_think: Natural
  max_new: Count
  trials: Count

  def __post_init__(self):
    super().__post_init__()
    if not self.grader or len({*self.grader}) < len(self.grader):
      refuse(self, "grader", "one name or more, each once")
    if "model" in self.grader and not self.grader_model:
      refuse(self, "grader_model", "the path of a model where eval.grader has one")
    if "endpoint" in self.grader:
      self.grader_endpoint.check("eval.grader=endpoint")
    for name, source in self.extra.items():
      if not isinstance(source, Mapping) or {*source} != {"source", "columns"}:
        refuse(self, "extra", f"a source and columns as {name!r}, and no more")
    for arm in self.arms:
      if arm.startswith("endpoint"):
        self.endpoint.check(f"eval.arms={arm}")
        if any("untemplated" in name.split("+") for name in self.suite):
          refuse(self, "suite", f"no set untemplated, as {arm} is asked in chats")
