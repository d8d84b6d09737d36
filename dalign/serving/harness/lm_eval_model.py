"""dalign in EleutherAI's lm-evaluation-harness: `--model dalign`.

  python -m dalign.serving.harness --model dalign --tasks gsm8k --apply_chat_template \\
    --model_args workdir=runs/quickstart,stage=rl

With --apply_chat_template a prompt is a chat, and of a trained model's reply the answer
alone is scored; without it the model continues plain text, as base models do there.
Log-likelihoods are those of the text right after the prompt, with no thought between.
"""

import collections
import json
import logging
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
import tqdm

from dalign.serving import assistant
from dalign.text import chat_template
from dalign.types import Turn

CHAT = '{"chat": '  # how a prompt begins that `apply_chat_template` has made
KNOWN = {"until", "do_sample", "temperature", "max_gen_toks"}
MAX_NEW = 256  # tokens of a reply, where a task does not say; as in the harness
SOME = 256  # rows that are scored between two looks at the progress bar


@register_model("dalign")
class DalignLM(TemplateLM):
  """A model of a run's folder, as the harness asks for it."""

  def __init__(
    self,
    workdir: str = "",
    stage: str = "rl",
    max_new: int = MAX_NEW,
    batch_size=None,
    max_batch_size=None,
    device=None,
    **unknown,
  ):
    """What the harness gives and a run's own config decides (batch sizes, device) is
    not used."""
    super().__init__()
    if unknown or not workdir:
      raise ValueError(
        "--model_args: wanted workdir=FOLDER and, if you like, stage="
        f"{'|'.join(assistant.STAGES)} and max_new=TOKENS, got {sorted(unknown)}"
      )
    self.model = assistant.Model(str(workdir), stage)
    self.max_new = int(max_new)

  @property
  def eot_token_id(self) -> int:
    """The tokenizer's end of text."""
    return self.model.tok.stop_ids[0]

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text that has nothing before it."""
    bos = self.model.tok.bos_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    """What tells this model's cached requests from another's."""
    return f"dalign-{self.model.workdir}".replace("/", "_")

  def chat_template(self, chat_template=False) -> str:
    """The template, for the harness's record; it is applied where tokens are made."""
    return self.model.tok.chat_template if chat_template else ""

  def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
    """The turns as JSON, which `_tokens` reads back: as text with control tokens in it,
    a question that spells one could not be told from the template."""
    turns = [{"role": t["role"], "content": t["content"]} for t in chat_history]
    return json.dumps({"chat": turns}, ensure_ascii=False)

  def tok_encode(self, string: str, add_special_tokens=None, **_) -> list[int]:
    """Tokens of plain text, with those that the tokenizer puts around it unless told
    otherwise; control tokens that it spells are read as text."""
    tok = self.model.tok
    return tok.encode(string) if add_special_tokens is False else tok.document(string)

  def _turns(self, context: str) -> tuple[tuple[Turn, ...], str] | None:
    """The chat of a prompt and the words that its reply begins with, or None."""
    if not context.startswith(CHAT):
      return None
    turns = [Turn(**turn) for turn in json.loads(context)["chat"]]
    begun = turns.pop().content if turns[-1].role == "assistant" else ""
    return tuple(turns), begun

  def _encode_pair(self, context: str, continuation: str):
    """The tokens of both, split where the first ends; white space before the second
    counts to it, as everywhere in the harness."""
    chat = self._turns(context)
    if chat is None:
      return super()._encode_pair(context, continuation)
    turns, begun = chat
    tok = self.model.tok
    front = chat_template.render_chat(tok, turns)
    row = [*front, *tok.encode(begun + continuation)]
    split = len(front) + len(tok.encode(begun))
    while tok.decode([row[split - 1]]).isspace():
      split -= 1
    return row[:split], row[split:]

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
    """(log-probability, whether greedy decoding writes it) of each continuation; of a
    prompt that is too long the end is kept, as in the harness's own models."""
    rows = [
      (_last([*before, *own], self.model.max_length), len(own))
      for _, before, own in requests
    ]
    found = []
    with tqdm.tqdm(
      total=len(rows), desc="log-likelihoods", disable=disable_tqdm
    ) as bar:
      for at in range(0, len(rows), SOME):
        some = rows[at : at + SOME]
        found += self.model.scores(
          [row for row, _ in some], [max(len(row) - own, 1) for row, own in some]
        )
        bar.update(len(some))
    for (key, _, _), value in zip(requests, found, strict=True):
      if key is not None:
        self.cache_hook.add_partial("loglikelihood", key, value)
    return found

  def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
    """The log-probability of whole texts, in windows of the model's length."""
    found = []
    for request in requests:
      (string,) = request.args
      windows = utils.get_rolling_token_windows(
        token_list=self.tok_encode(string),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.model.max_length,
        context_len=1,
      )
      pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
      total = sum(logp for logp, _ in self._loglikelihood_tokens(pairs, True))
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
      found.append(total)
    return found

  def generate_until(self, requests, disable_tqdm=False) -> list[str]:
    """The reply to each prompt, cut before the first of the task's stop strings: of a
    chat the answer, of plain text what follows it."""
    groups = collections.defaultdict(list)
    for at, request in enumerate(requests):
      prompt, given = request.args
      wanted = normalize_gen_kwargs(given, self.max_new)
      if unknown := set(wanted) - KNOWN:
        raise ValueError(
          f"generation_kwargs: wanted some of {', '.join(sorted(KNOWN))}, got "
          f"{', '.join(sorted(unknown))}"
        )
      heat = wanted.get("temperature", 0.0) if wanted["do_sample"] else 0.0
      groups[wanted["max_gen_toks"], heat, self._turns(prompt) is None].append(at)
    found: list[str] = [""] * len(requests)
    with tqdm.tqdm(total=len(requests), desc="replies", disable=disable_tqdm) as bar:
      for (max_new, temperature, plain), places in groups.items():
        own = [requests[at].args for at in places]
        said = self._said([a[0] for a in own], plain, max_new, temperature)
        for at, (prompt, wanted), reply in zip(places, own, said, strict=True):
          until = normalize_gen_kwargs(wanted, self.max_new)["until"]
          found[at] = assistant.cut_at_stop(reply, until)
          self.cache_hook.add_partial("generate_until", (prompt, wanted), found[at])
        bar.update(len(places))
    return found

  def _said(self, prompts, plain: bool, max_new: int, temperature: float) -> list[str]:
    more: dict[str, Any] = {"max_new": max_new, "temperature": temperature}
    room = self.model.max_length - max_new
    if plain:
      rows = [_last(self.tok_encode(prompt), room) for prompt in prompts]
      return self.model.continuations(rows, **more)
    chats = [chat for prompt in prompts if (chat := self._turns(prompt))]
    if any(begun for _, begun in chats):
      raise ValueError(
        "this task begins the reply itself (gen_prefix), which would stand before the "
        "thought: run it without --apply_chat_template"
      )
    return [s.answer for s in self.model.replies([turns for turns, _ in chats], **more)]


def _last(row: list[int], n: int) -> list[int]:
  """The last n tokens of a row, with a warning where that is not all."""
  if len(row) > n:
    logging.getLogger(__name__).warning(
      "of a prompt of %d tokens the last %d are kept", len(row), n
    )
  return row[-n:]
