"""A trained model -> export/model: a Hugging Face folder, with a card that says of it
what this run knows. With adapters also export/adapter, as PEFT has them."""

import hashlib

from dalign import adapters
from dalign import buckets
from dalign import store
from dalign import weights
from dalign.pipeline import context
from dalign.types import PyTree

METRICS = (  # of the arms, on held-out prompts
  "refuse_disallowed",
  "comply_allowed",
  "balanced_accuracy",
  "policy_retrieval",
  "capability",
)
TRAINED = {"base": "base", "sft": "sft", "rl": "sft_rl"}  # stage -> its arm in eval


def export(run: context.Run) -> None:
  """Writes the parameters of a stage, adapters added to their matrices."""
  cfg = run.cfg.export
  inputs = [run.store.path(stage, "manifest.json") for stage in ("sft", "rl", "eval")]
  if not run.begin("export", [path for path in inputs if path.exists()]):
    return
  base = cfg.of == "base"
  params = run.base_params() if base else run.trained_params(cfg.of)
  place = run.store.path("export", "model")
  weights.save_hf(
    str(buckets.twin(place)),
    run.arch,
    adapters.merged(params, cfg=run.arch),
    run.model_tok,
    dtype=cfg.dtype,
    shard=round(cfg.shard_gb * 2**30),
  )
  if run.cfg.lora.rank and not base:
    _adapter(run, params)
  run.store.write_bytes(place / "README.md", card(run).encode())
  run.store.finish("export", {"of": cfg.of, "dtype": cfg.dtype})
  context.say(f"export: {place}")


def _adapter(run: context.Run, params: PyTree) -> None:
  place = run.store.path("export", "adapter")
  lora, source = run.cfg.lora, run.cfg.model.path
  try:
    weights.save_peft(
      str(buckets.twin(place)), run.arch, params["layers"], lora, source
    )
  except ValueError as error:
    context.say(f"export: no {place.name}: {error}")


def card(run: context.Run) -> str:
  """The model card: what it was made from and how, and what was measured."""
  cfg, folder = run.cfg, run.store
  texts = "".join(f"{name}\n{text}" for name, text in sorted(_texts(run).items()))
  digest = hashlib.sha256(texts.encode()).hexdigest()
  done = {
    stage: folder.manifest(stage)["summary"]
    for stage in ("generate", "filter", "sft", "reward", "rl")
    if folder.manifest(stage)
  }
  lines = [
    "---",
    "library_name: transformers",
    "tags: [deliberative-alignment, dalign]",
    "---",
    "",
    f"# {folder.workdir.name}",
    "",
    f"Stage `{cfg.export.of}` of Deliberative Alignment (arXiv 2412.16339), trained by "
    f"dalign {store.code_version()} from `{cfg.model.path}`, seed {cfg.seed}.",
    "",
    f"It thinks between `{run.think.tag}` and `{run.think.close}`, then answers, and "
    "needs no specification in its prompt.",
    "",
    "## Specification",
    "",
    f"{len(run.spec.policies)} policies, SHA-256 {digest}.",
    "",
    "## Data and training",
    "",
    *(f"- {stage}: {_told(summary)}" for stage, summary in done.items()),
    "",
    "## Evaluation",
    "",
    *_measured(run),
    "",
    "## Limits",
    "",
    "Safer by the measures shown and not safe: test it on your own use. The licence of "
    "the model it was trained from goes on.",
    "",
  ]
  return "\n".join(lines)


def _texts(run: context.Run) -> dict[str, str]:
  """The specification as files, or as it was drawn."""
  if run.cfg.world is None:
    return store.read_spec_files(run.spec_dir)
  return {"spec": repr(run.spec)}


def _told(summary: dict) -> str:
  plain = {k: v for k, v in summary.items() if isinstance(v, (int, float, str))}
  return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                   for k, v in plain.items()) or "done"  # fmt: skip


def _measured(run: context.Run) -> list[str]:
  """The table of the base and of this model, with intervals; of what there is."""
  where = run.store.path("eval", "summary.json")
  if not where.exists():
    return ["Not evaluated."]
  arms = run.store.read_json(where)["arms"]
  shown = [
    a for a in ("base", "spec_in_prompt", TRAINED[run.cfg.export.of]) if a in arms
  ]
  shown = list(dict.fromkeys(shown))
  rows = [f"| held out | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
  for name in METRICS:
    cells = [_cell(arms[arm].get(name)) for arm in shown]
    rows.append(f"| {name} | {' | '.join(cells)} |")
  return rows


def _cell(metric: dict | None) -> str:
  if metric is None or metric["mean"] is None:
    return "-"
  low, high = metric["low"], metric["high"]
  return f"{metric['mean']:.1%} ({low:.1%} to {high:.1%}, n {metric['n']})"
