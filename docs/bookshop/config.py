"""A bookshop's policy on SmolLM2-135M-Instruct: docs/tutorial.md.

python -m dalign.main --config=mine/config.py --workdir=runs/mine
"""

from configs import quickstart


def get_config():
  c = quickstart.get_config()
  c.recipe = ""  # the quickstart's name is for its own values
  c.spec.dir = "mine/specs"
  c.data.source = "jsonl:mine/prompts.jsonl"
  c.generate.teacher = "recorded:mine/recording.jsonl"
  # Of prompts that no policy covers, so that the model stays of use elsewhere.
  c.generate.helpful = c.generate.capability = 40
  c.filter.judge = "python:mine/judge.py:judge"
  c.filter.metadata = "told"  # it goes by your labels
  # Few rows, whole and often, or it learns to refuse and not what is so.
  c.sft.epochs = 6
  c.sft.optimizer.learning_rate = 4e-4
  c.rl.reward, c.rl.metadata = "judge", "told"
  c.eval.prompts = 100  # all that are held out
  c.eval.arms = ("base", "spec_in_prompt", "sft")  # and "sft_rl", after RL
  c.export.of = "sft"
  return c
