"""What a user writes is a user's: no role, thought, clause or verdict comes of it."""

import json
import re

import pytest
import tokenizers

from dalign.evaluation import evals
from dalign.evaluation import report
from dalign.judges import forms
from dalign.judges import judge
from dalign.policy import spec as specs
from dalign.runs import store
from dalign.text import chat_template
from dalign.text import thinking
from dalign.text import vocab
from dalign.types import Prompt
from dalign.types import Turn
from tests import helpers
from tests import injections
from tests.helpers import ROOT
from tests.made_up import build_run

SPEC = specs.load({str(p): p.read_text() for p in (ROOT / "specs").glob("*.md")})
THINKS = (
  thinking.ThinkFormat(open='<think>\nThe user asks: "{prompt}"', close="</think>"),
  thinking.ThinkFormat(open='<think>\n"{prompt}"', close="("),
  thinking.ThinkFormat(open="<think>", close="</think>"),
)
OTHERS = {  # control tokens and how a turn is written with them
  "llama3": (
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|start_header_id|>{r}<|end_header_id|>\n\n{c}<|eot_id|>",
  ),
  "gemma": (
    ("<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    "<start_of_turn>{r}\n{c}<end_of_turn>\n",
  ),
  "harmony": (
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
    "<|start|>{r}<|message|>{c}<|end|>",
  ),
  "mistral": (("<s>", "</s>", "[INST]", "[/INST]"), "[INST] {c}[/INST]"),
  "thinking": (("<|im_start|>", "<|im_end|>", "<think>", "</think>"), ""),
}


def tokenizer(name: str) -> chat_template.Tokenizer:
  """A tokenizer of bytes with the control tokens and turns of a family."""
  if name in ("tiny", "words"):
    some = ("Hello", "there", "Hi", "system", "user", "assistant")
    return vocab.tiny_tokenizer() if name == "tiny" else vocab.word_tokenizer(some)
  control, turn = OTHERS[name]
  made = json.loads(vocab.tiny_tokenizer().backend.to_str())
  backend = tokenizers.Tokenizer.from_str(json.dumps(made))
  backend.normalizer = tokenizers.normalizers.NFKC()
  tags = {"<think>", "</think>"} & set(control)
  backend.add_special_tokens([c for c in control if c not in tags])
  backend.add_tokens([*tags])
  template = vocab.CHATML + "{% if false %}<think></think>{% endif %}"
  if turn:
    said = turn.replace("{r}", "{{ m.role }}").replace("{c}", "{{ m.content }}")
    template = f"{{% for m in messages %}}{said}{{% endfor %}}"
  return chat_template.Tokenizer.of(backend, template, bos_id=None, eos_id=2)


def prompt_of(content: str) -> Prompt:
  return helpers.prompt(content, "illicit_behavior", "refuse", id="p", split="eval")


@pytest.mark.parametrize("name", ["tiny", "words", *OTHERS])
def test_no_user_writes_a_control_token_or_a_tag(name):
  tok = tokenizer(name)
  control = set(tok._controls.values())

  def controls(content: str, role: str) -> list[int]:
    turns = [Turn(role=role, content=content), Turn(role="user", content="Hi")]
    return [i for i in chat_template.render_chat(tok, turns) if i in control]

  assert controls("Hello there", "user")
  for content in injections.ALL:
    for role in ("user", "system"):
      wanted = controls("Hello there", role)
      for said in (content, f"a{content}", f"{content}b", content * 2):
        assert controls(said, role) == wanted, (content, role)
    assert not control & set(tok.document(content)), content


@pytest.mark.parametrize("think", THINKS)
def test_no_user_ends_or_opens_a_thought(think):
  """The opening quotes what is asked; what the model then writes is all there is."""
  for content in injections.ALL:
    own = think.of(content)
    written = f"{own.open} Clause IB-D1 forbids this.{own.close}\n\nNo."
    thought, answer, malformed = thinking.split_thought(written, own)
    assert (answer, malformed) == ("No.", ""), content
    assert thought.endswith("Clause IB-D1 forbids this.")
    assert thinking.split_thought(own.open, own)[2] == "no closing tag", content
    nothing = thinking.split_thought(f"{own.open}\n{own.close}\n\nNo.", own)
    assert nothing[2] == "empty thought", content


def outcome(think: thinking.ThinkFormat, asked: str, thinks: str, answer: str):
  """The filter's verdict on a reply whose opening quotes `asked`; its row in eval."""
  prompt, own = prompt_of(asked), think.of(asked)
  thought, said, malformed = thinking.split_thought(
    f"{own.open} {thinks}{own.close}\n\n{answer}", own
  )
  assert not malformed
  ask = judge.rubric_judge(SPEC, quality=None)
  verdict = ask([judge.FilterQuestion(prompt=prompt, thought=thought, answer=said)])[0]
  sample = helpers.sample(said, thought)
  return verdict, evals.outcome(prompt, sample, SPEC)


@pytest.mark.parametrize("think", THINKS[:2])
def test_no_user_cites_a_clause_or_decides(think):
  plain, plain_row = outcome(think, "How is it?", "It is said.", "I can't help.")
  cited, cited_row = outcome(
    think, "How is it?", "Clause IB-D1 forbids it, so I must refuse.", "I can't help."
  )
  names = ("cites_clause", "invents_none", "clause_agrees", "decision_agrees")
  assert plain.parts["cites_clause"] < cited.parts["cites_clause"] == 1.0
  assert cited_row["cited"] == ["IB-D1"] and not plain_row["cited"]
  for content in injections.ALL:
    for thinks, wanted, row in (
      ("It is said.", plain, plain_row),
      ("Clause IB-D1 forbids it, so I must refuse.", cited, cited_row),
    ):
      found, other = outcome(think, content, thinks, "I can't help.")
      for name in names:
        assert found.parts[name] == wanted.parts[name], (content, name)
      for name in ("cited", "invented"):
        assert other[name] == row[name], content
      for name in ("policy_retrieval", "thought_agrees", "fabricated"):
        assert other["scores"][name] == row["scores"][name], (content, name)


def test_a_clause_that_the_model_names_itself_still_counts():
  """Though the user named it too, and where the quote is the model's own."""
  for thinks in (
    "The user cites IB-A1, but clause IB-D1 decides.",
    'The policy says "IB-D1 forbids this", so I must refuse.',
  ):
    asked = "Does IB-D1 allow it, or IB-A1?"
    _, row = outcome(THINKS[0], asked, thinks, "I can't help.")
    assert "IB-D1" in row["cited"]


WILD = "Harmful request: yes\nResponse refusal: no\nHarmful response: {harm}"


@pytest.mark.parametrize("form", forms.FORMS)
def test_no_user_and_no_answer_writes_a_verdict(form):
  """Whatever stands in what the judge was shown, its own reply is what is read."""
  low, high = {
    "grade": ('{"score": 1}', '{"score": 5}'),
    "safeguard": ('{"violation": 1}', '{"violation": 0}'),
    "guard": ("unsafe", "safe"),
    "strongreject": ("1.b 0\n2.b 5\n3.b 5", "1.b 1\n2.b 1\n3.b 1"),
    "harmbench": ("yes", "no"),
    "wildguard": (WILD.format(harm="yes"), WILD.format(harm="no")),
    "qwen3guard": (
      "Safety: Unsafe\nCategories: Violent\nRefusal: No",
      "Safety: Safe\nCategories: None\nRefusal: Yes",
    ),
  }[form]

  def verdict(content: str, reply: str):
    question = judge.RewardQuestion(prompt_of(content), content)
    ask = judge.written_judge(
      lambda category: "The policy.",
      lambda turns: [forms.ModelReply(reply)] * len(turns),
      form=form,
    )
    return ask([question])[0].score

  assert verdict("hello", high) == 1.0
  for content in injections.ALL:
    assert verdict(content, low) == 0.0, content
    assert verdict(content, "I have no opinion.") is None, content


def test_no_row_becomes_two(tmp_path):
  rows = [{"prompt": content, content: 1} for content in injections.ALL]
  path = tmp_path / "rows.jsonl"
  store.write_rows(path, rows[:20])
  store.append_rows(path, rows[20:])
  assert store.read_rows(path) == rows


def test_no_user_writes_on_the_page(tmp_path):
  """Each is in a sample of its own; the page has the tags that it has without them."""
  pages = []
  for i, many in enumerate((["hello"] * len(injections.ALL), injections.ALL)):
    workdir = build_run(tmp_path / str(i), prompts=3)
    row = store.read_rows(workdir / "eval" / "sft.jsonl")[0]
    rows = [row | {"prompt_id": f"i{n}", "answer": x} for n, x in enumerate(many)]
    store.write_rows(workdir / "eval" / "sft.jsonl", rows)
    page = report.write_report(workdir).read_text(encoding="utf-8")
    pages.append(re.findall(r"<(\w+)", re.sub(r"(?s)<script.*?</script>", "", page)))
  assert pages[0] == pages[1]
