"""dalign in inspect_ai: `--model dalign/FOLDER -M stage=rl`.

  inspect eval task.py --model dalign/runs/quickstart -M stage=rl

FOLDER is the --workdir of a run. Chats that wait at the same time are answered in one
batch. A trained model's thought is in the log as reasoning; scorers see the answer.
"""

import time

import anyio
import anyio.to_thread
from inspect_ai import model as inspect_model
from inspect_ai.model import modelapi

from dalign.serving import assistant
from dalign.types import Turn

WAIT = 0.05  # seconds in which others may join a batch
STOPS = {"stop": "stop", "length": "max_tokens"}
# Settings that are read, here or by inspect_ai, or change nothing of what is sampled;
# any other that is set is refused.
KNOWN = {
  *("max_tokens", "temperature", "top_p", "seed", "stop_seqs", "system_message"),
  *("max_retries", "timeout", "attempt_timeout", "stream_idle_timeout"),
  *("max_connections", "adaptive_connections", "max_tool_output", "batch", "cache"),
  *("cache_prompt", "fallback_models", "fail_on_refusal", "parallel_tool_calls"),
  *("internal_tools", "reasoning_history", "reasoning_summary"),
}


@modelapi(name="dalign")
class DalignAPI(inspect_model.ModelAPI):
  """A model of a run's folder, as inspect_ai asks for it."""

  def __init__(
    self,
    model_name: str,
    base_url: str | None = None,
    api_key: str | None = None,
    config: inspect_model.GenerateConfig = inspect_model.GenerateConfig(),  # noqa: B008
    stage: str = "rl",
    **unknown,
  ):
    super().__init__(model_name, base_url, api_key, [], config)
    if unknown:
      raise ValueError(
        f"-M: wanted stage={'|'.join(assistant.STAGES)}, got {sorted(unknown)}"
      )
    self.model = assistant.Model(model_name, stage)
    self._waiting: list[_Asked] = []
    self._lock: anyio.Lock | None = None

  def max_tokens(self) -> int:
    """Tokens of a reply, thought and answer, where a task does not say."""
    return self.model.budget

  def max_connections(self) -> int:
    """As many chats at once as the sampler has slots."""
    return self.model.slots

  def connection_key(self) -> str:
    """Those who share a limit: all who ask this model."""
    return f"dalign-{self.model.workdir}-{self.model.stage}"

  async def generate(self, input, tools, tool_choice, config):
    """The reply to a chat; ValueError for what cannot be done as asked."""
    if tools:
      raise ValueError("dalign: a model of a run uses no tools; leave them out")
    for name, value in config.model_dump(exclude_none=True).items():
      if name not in KNOWN and (name, value) != ("num_choices", 1):
        raise ValueError(f"dalign: {name} cannot be set; leave it out")
    temperature, top_p = config.temperature, config.top_p
    asked = _Asked(
      turns=tuple(_turn(message) for message in input),
      settings=(
        config.max_tokens or self.max_tokens(),
        self.model.temperature if temperature is None else temperature,
        self.model.top_p if top_p is None else top_p,
        config.seed or 0,
      ),
    )
    start = time.monotonic()
    self._waiting.append(asked)
    await anyio.sleep(WAIT)
    if self._lock is None:
      self._lock = anyio.Lock()
    async with self._lock:
      if asked in self._waiting:
        await anyio.to_thread.run_sync(self._answer, asked.settings)
    if asked.error:
      raise asked.error
    return self._output(asked, config.stop_seqs or (), time.monotonic() - start)

  def _answer(self, settings) -> None:
    """Answers all who wait and want what `settings` say."""
    batch = [asked for asked in self._waiting if asked.settings == settings]
    for asked in batch:
      self._waiting.remove(asked)
    max_new, temperature, top_p, seed = settings
    try:
      samples = self.model.replies(
        [asked.turns for asked in batch],
        max_new=max_new,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
      )
      for asked, sample in zip(batch, samples, strict=True):
        asked.sample = sample
    except Exception as error:
      for asked in batch:
        asked.error = error

  def _output(self, asked, stops, seconds: float) -> inspect_model.ModelOutput:
    sample = asked.sample
    content = [
      inspect_model.ContentText(text=assistant.cut_at_stop(sample.answer, stops))
    ]
    if sample.thought:
      content.insert(0, inspect_model.ContentReasoning(reasoning=sample.thought))
    read = len(self.model.read(asked.turns))
    written = len(sample.tokens) - sample.forced
    return inspect_model.ModelOutput(
      model=self.model_name,
      choices=[
        inspect_model.ChatCompletionChoice(
          message=inspect_model.ChatMessageAssistant(
            content=content, model=self.model_name, source="generate"
          ),
          stop_reason=STOPS[sample.finish],
        )
      ],
      usage=inspect_model.ModelUsage(
        input_tokens=read, output_tokens=written, total_tokens=read + written
      ),
      time=seconds,
    )


class _Asked:
  """A chat that waits for its reply."""

  def __init__(self, turns, settings):
    self.turns, self.settings = turns, settings
    self.sample = self.error = None


def _turn(message) -> Turn:
  """A message as a turn; of an earlier reply the answer alone."""
  if message.role not in ("system", "user", "assistant"):
    raise ValueError(f"dalign: wanted no {message.role} messages, got one")
  if getattr(message, "tool_calls", None):
    raise ValueError("dalign: wanted no calls of tools, got one")
  parts = [] if isinstance(message.content, str) else message.content
  other = {part.type for part in parts} - {"text", "reasoning"}
  if other:
    raise ValueError(f"dalign: reads text alone, got {', '.join(sorted(other))}")
  return Turn(role=message.role, content=message.text)
