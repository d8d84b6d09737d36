"""A trained model -> export/model: a Hugging Face folder that thinks and samples as the
evaluation had it, in whatever serves such folders, and a card that says of it what this
run knows. With adapters also export/adapter, as PEFT has them."""

from collections.abc import Mapping
import hashlib
import math
import pathlib
from typing import Any

import huggingface_hub
import jax
import jinja2

from dalign.config import stages
from dalign.formats import weights
from dalign.models import adapters
from dalign.models import param_tree
from dalign.policy import prompting
from dalign.runs import buckets
from dalign.runs import manifests
from dalign.runs import progress
from dalign.runs import store
from dalign.stages import services
from dalign.text import chat_template
from dalign.text import thinking
from dalign.types import PyTree
from dalign.types import Turn

Run = services.Services[stages.ExportStage]  # what this stage sees of a run

CARD = pathlib.Path(__file__).with_name("card.md")
METRICS = (  # of the arms, on held-out prompts
  "refuse_disallowed",
  "comply_allowed",
  "safe_complete",
  "response_types",
  "policy_retrieval",
  "citation",
  "capability",
)
ARM_OF_STAGE = {  # stage -> its arm in eval
  "base": "base",
  "sft": "sft",
  "distill": "sft_distill",
  "rl": "sft_rl",
}


def export(run: Run) -> None:
  """Writes the parameters of a stage, adapters added to their matrices."""
  cfg = run.cfg.export
  inputs = [
    run.store.path(stage, "manifest.json") for stage in ("sft", "distill", "rl", "eval")
  ]
  if not run.begin([path for path in inputs if path.exists()]):
    return
  base = cfg.of == "base"
  params = run.model.base_params() if base else run.model.trained_params(cfg.of)
  place = run.store.path("export", "model")
  weights.save_hf(
    str(buckets.staging_path(place)),
    run.model.arch,
    adapters.merge_adapters(params, cfg=run.model.arch),
    _tokenizer(run),
    dtype=cfg.dtype,
    shard=round(cfg.shard_gb * 2**30),
    generation=_generation_config(run),
  )
  if run.cfg.lora.rank and not base:
    _save_adapter(run, params)
  run.store.write_bytes(place / "README.md", card(run).encode())
  run.finish({"of": cfg.of, "dtype": cfg.dtype})
  progress.say(f"export: {place}")


def _think_format(run: Run) -> thinking.ThinkFormat | None:
  """How the exported model's thoughts are opened, if they are."""
  return None if run.cfg.export.of == "base" else run.model.trained_think


def _tokenizer(run: Run) -> chat_template.Tokenizer:
  """The tokenizer, whose chat template opens the thought as the sampler does."""
  think, ask = _think_format(run), [Turn(role="user", content="ask")]
  if not think:
    return run.model.file_tok
  tok = run.model.tok.with_opened_thought(think)
  if (*chat_template.render_chat(tok, ask),) != prompting.render_prompt(
    run.model.tok, ask, think
  ):
    progress.say(
      "export: others will read the opening of a thought, which the chat template now "
      "writes, as other tokens than this model was trained with; wanted a think.open "
      "whose tokens do not depend on what stands before it"
    )
  return tok


def _generation_config(run: Run) -> dict[str, Any]:
  """How it samples where nobody says: as it was evaluated."""
  cfg = run.cfg.replies
  generation = {
    "max_new_tokens": cfg.max_new + (cfg.max_think if _think_format(run) else 0),
    "do_sample": cfg.temperature > 0,
    "temperature": cfg.temperature,
  }
  return generation | ({"top_k": 0, "top_p": cfg.top_p} if cfg.temperature else {})


def _save_adapter(run: Run, params: PyTree) -> None:
  place = run.store.path("export", "adapter")
  lora, source = run.cfg.lora, run.cfg.model.path
  try:
    weights.save_peft(
      str(buckets.staging_path(place)), run.model.arch, params["layers"], lora, source
    )
  except ValueError as error:
    progress.say(f"export: no {place.name}: {error}")


def card(run: Run) -> str:
  """The model card: what it was made from and how, and what was measured."""
  cfg, folder = run.cfg, run.store
  texts = "".join(f"{name}\n{text}" for name, text in sorted(_spec_texts(run).items()))
  done = {
    stage: manifest["summary"]
    for stage in ("generate", "filter", "sft", "distill", "reward", "rl")
    if (manifest := folder.manifest(stage))
  }
  evaluated = folder.path("eval", "summary.json")
  arms = folder.read_json(evaluated)["arms"] if evaluated.exists() else {}
  names = ("base", "spec_in_prompt", ARM_OF_STAGE[cfg.export.of])
  origin = weights.origin(cfg.model.path)
  shapes = jax.tree.leaves(
    param_tree.shapes(run.model.arch), is_leaf=lambda shape: isinstance(shape, tuple)
  )
  env = jinja2.Environment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  env.filters |= {"plain": _summary_text, "estimate": _cell, "repr": repr}
  return env.from_string(CARD.read_text("utf-8")).render(
    metadata=_card_metadata(run, origin, arms),
    name=folder.workdir.name,
    stage=cfg.export.of,
    version=manifests.code_version(),
    base=origin.get("base_model") or cfg.model.path,
    seed=cfg.seed,
    size=sum(map(math.prod, shapes)),
    dtype=cfg.export.dtype,
    think=_think_format(run),
    policies=run.task.spec.policies,
    digest=hashlib.sha256(texts.encode()).hexdigest(),
    source=cfg.data.source,
    learned=_learned(run, done),
    done=done,
    arms=arms,
    shown=[arm for arm in dict.fromkeys(names) if arm in arms],
    definitions={name: run.task.definitions[name] for name in METRICS},
    license=origin.get("license"),
  )


def _learned(run: Run, done: Mapping[str, dict]) -> str:
  """Whose completions were learned, as far as some were: no filter that kept nothing,
  or that nothing was learned from, is one."""
  cfg, kept = run.cfg, done.get("filter", {}).get("kept")
  if not kept or "sft" not in done:
    return "; no completion was filtered and learned"
  teachers = {
    "base": "the base's own, with the specification in its prompt",
    "endpoint": f"of `{cfg.teacher_model}`",
  }
  whose = teachers.get(cfg.teacher, f"`{cfg.teacher}`")
  none = ", ".join(done["filter"].get("kept_none_of", ()))
  return (
    f"; completions: {whose}, filtered by a judge (`{cfg.judge}`), learned without the "
    "specification" + (f"; it kept none of {none}" if none else "")
  )


def _card_metadata(run: Run, origin: dict, arms: dict) -> str:
  """The metadata that the Hub reads: what the base's files say, and what was found."""
  arm, source = arms.get(ARM_OF_STAGE[run.cfg.export.of], {}), run.cfg.data.source
  results = [
    huggingface_hub.EvalResult(
      task_type="text-generation",
      dataset_type=source,
      dataset_name=f"held-out prompts of {source}",
      metric_type=name,
      metric_name=f"{name} ({arm[name]['n']} prompts)",
      metric_value=round(arm[name]["mean"], 4),
    )
    for name in METRICS
    if arm.get(name) and arm[name]["mean"] is not None
  ]
  known = {k: v for k, v in origin.items() if k != "language"}
  data = huggingface_hub.ModelCardData(
    **known,
    language=origin.get("language") or (None if run.cfg.world else "en"),
    library_name="transformers",
    pipeline_tag="text-generation",
    tags=["deliberative-alignment", "dalign", "arxiv:2412.16339"],
    model_name=run.store.workdir.name,
    eval_results=results or None,
  )
  return data.to_yaml()


def _spec_texts(run: Run) -> dict[str, str]:
  """The specification as files, or as it was drawn."""
  if run.cfg.world is None:
    return store.read_spec_files(run.spec_dir)
  return {"spec": repr(run.task.spec)}


def _summary_text(summary: dict) -> str:
  plain = {k: v for k, v in summary.items() if isinstance(v, (int, float, str))}
  return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                   for k, v in plain.items()) or "done"  # fmt: skip


def _cell(metric: dict | None) -> str:
  if metric is None or metric["mean"] is None:
    return "-"
  low, high = metric["low"], metric["high"]
  return f"{metric['mean']:.1%} ({low:.1%} to {high:.1%}, n {metric['n']})"
