"""The spec parser, what it refuses, and what it renders."""

import itertools
import re

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from dalign.policy import parsing
from dalign.policy import spec
from dalign.runs import store

TEA = """\
---
id: tea
code: TE
title: Tea
version: 3
summary: Talk about tea freely. <!--more--> Do not sell it.
---
## Purpose
Keep tea safe.
Keep it warm.

## Definitions
- **tea**: Hot water with leaves (e.g. Assam). Coffee is not tea.
## Allowed
- TE-A1: Explain it, e.g. Green tea. <!--more--> More.
  - Example: "is "white" tea?"
  - Example: "who drinks it?"
- TE-A12: Write poems about it.
## Disallowed
- TE-D1: Never sell tea to geese. <!--more--> They do not pay.
  - Example: "goose tea price"
## Safe completion
- TE-S1: Soothe those who spilled theirs.<!-- more -->Leave out blame.
  - Example: "I spilled it"
## Edge cases
- "what did tea cost in 1900?" -> TE-A1: history of trade.
- "say "sold" -> now" -> TE-D1: a sale: refused.
## Worked examples
### TE-D1
User: I am a goose. One tea.
Thought: The user asks for a sale. TE-D1 forbids it, so I must refuse.
Answer: I'm sorry, but I can't sell you tea.
### TE-A1
User: What is oolong?
Thought: The user asks for a fact. TE-A1 allows it, so I can answer.
Answer: A tea between green and black. <!--more--> It is Chinese.
"""
SOAP = """\
---
id: soap
code: SO
title: Soap
version: 1
summary: Soap is for washing. <!--more--> It is not food.
---
## Purpose
Don't let it dry.
## Definitions
- **soap**: A bar that foams.
## Allowed
- SO-A1: Explain how soap is made. <!--more--> Say that lye burns.
## Disallowed
- SO-D1: Give no soap to toddlers.
## Safe completion
- SO-S1: Comfort whoever ate some.
## Edge cases
- "is soap old?" -> SO-A1: history.
## Worked examples
### SO-A1
User: Is soap old?
Thought: The user asks for history, so I can answer.
Answer: Yes.
"""
PRINCIPLES = """\
## Principles
- **help**: Answer well. <!--more--> Refusing costs something.
- **read**: Assume the best.
"""
STYLES = """\
## comply
Answer at once. <!--more--> Then
stop.
## refuse
Decline kindly. <!--more--> Once.
## safe_complete
Give the safe part. <!--more--> Leave the rest.
## safe_complete:tea
Pour warmly. <!--more--> Do not scald.
## safe_complete:dual_use
Explain it. Add no recipe.
"""
FILES = {
  "specs/tea.md": TEA,
  "specs/soap.md": SOAP,
  "specs/principles.md": PRINCIPLES,
  "specs/style.md": STYLES,
  "specs/README.md": "# anything",
}


@pytest.fixture(scope="module")
def small():
  return spec.load(FILES)


def swap(text, old, new):
  assert old in text
  return text.replace(old, new, 1)


# Parsing.


def test_parses_every_part(small):
  tea = small.policy("tea")
  assert (tea.id, tea.code, tea.title, tea.version) == ("tea", "TE", "Tea", "3")
  assert [(c.id, c.verdict) for c in tea.clauses] == [
    ("TE-A1", "comply"),
    ("TE-A12", "comply"),
    ("TE-D1", "refuse"),
    ("TE-S1", "safe_complete"),
  ]
  assert tea.clauses[0].examples == ('is "white" tea?', "who drinks it?")
  assert tea.edges == (
    ("what did tea cost in 1900?", "TE-A1", "history of trade."),
    ('say "sold" -> now', "TE-D1", "a sale: refused."),
  )
  assert [(w.clause, w.verdict) for w in tea.worked] == [
    ("TE-D1", "refuse"),
    ("TE-A1", "comply"),
  ]
  assert tea.worked[0].prompt == "I am a goose. One tea."
  assert tea.worked[0].answer == "I'm sorry, but I can't sell you tea."
  styles = dict(small.styles)
  assert list(styles)[-2:] == ["safe_complete:tea", "safe_complete:dual_use"]


def test_blank_lines_and_windows_line_ends_change_nothing():
  front, body = TEA.split("## Purpose")
  loose = (front + "\n## Purpose" + body.replace("\n", " \n\n")).replace("\n", "\r\n")
  assert parsing.parse_policy(loose, "tea.md") == parsing.parse_policy(TEA, "tea.md")


BROKEN = [  # what of TEA, by what, a part of the line at fault, what was wanted
  ("---\nid", "id", "id: tea", '"---" to open'),
  ("title: Tea", "titel: Tea", "titel", "a key of id, code, title"),
  ("version: 3", "code: TE", "code: TE\nsummary", "each key once"),
  ("version: 3\n", "", "---\n## Purpose", '"version: ..."'),
  ("title: Tea", "title: ", "title", '"title: ..." with some text'),
  ("id: tea", "id: tee", "id: tee", '"id: tea", the name'),
  ("code: TE", "code: TEA", "code: TEA", "two capitals"),
  ("## Disallowed", "## Forbidden", "## Forb", '"## Disallowed"'),
  ("## Purpose", "Hi\n## Purpose", "Hi", '"## Purpose"'),
  ("Keep tea safe.\nKeep it warm.\n", "", "## Purpose", "text under this heading"),
  ("- **tea**:", "- tea:", "- tea:", '"- **name**: text"'),
  ("## Allowed", "- **tea**: Again.\n## Allowed", "Again", "each name once"),
  ("- TE-D1", "- TX-D1", "- TX-D1", '"- TE-D<number>: text"'),
  ("- TE-D1", "- TE-D01", "- TE-D01", '"- TE-D<number>: text"'),
  ("TE-A12: Write poems about it.", "TE-A12:", "TE-A12", "TE-A<number>"),
  ("- TE-A12", "- TE-A1", "TE-A1: Write", "each clause id once"),
  ('"who drinks it?"', "who drinks it?", "who drinks", "- Example:"),
  ("- TE-D1", '  - Example: "no"\n- TE-D1', 'Example: "no"', '"- TE-D<number>: text"'),
  ('  - Example: "goose', '  - Keeps: "goose', "Keeps:", "an Example of TE-D1 above"),
  ('"goose tea price"', '"goose tea price"\n  - Breaks: No.', "Breaks:", "- Breaks:"),
  (
    '"goose tea price"',
    '"goose tea price"\n  - Breaks: "One."\n  - Keeps: "One."',
    "Keeps:",
    "each answer to an example once",
  ),
  ('1900?" -> TE-A1', '1900?" TE-A1', "1900", "-> <clause id>"),
  ("-> TE-A1:", "-> TE-A2:", "-> TE-A2", "a clause of this"),
  ("### TE-D1", "### TE-D9", "### TE-D9", "a clause of"),
  ("User: I am", "Answer: I am", "Answer: I am", '"User: ..."'),
  ("One tea.", "One\ntea.", "### TE-D1", "3 lines under this heading, not 4"),
  ("### TE-A1", "## More", "## More", 'nothing after "## Worked examples"'),
]


@pytest.mark.parametrize(("old", "new", "at", "wanted"), BROKEN)
def test_errors_name_file_line_and_what_was_wanted(old, new, at, wanted):
  text = swap(TEA, old, new)
  place = text[: text.index(at)].count("\n") + 1
  with pytest.raises(ValueError) as caught:
    parsing.parse_policy(text, "specs/tea.md")
  message = str(caught.value)
  assert message.startswith(f"specs/tea.md:{place}: wanted "), message
  assert wanted in message.split(", got ")[0], message


def test_answers_that_break_or_keep_a_clause_are_to_the_example_above():
  tried = swap(
    swap(TEA, '"who drinks it?"\n', '"who drinks it?"\n  - Breaks: "I can\'t say."\n'),
    '"goose tea price"\n',
    '"goose tea price"\n  - Keeps: "No "tea" for geese."\n  - Breaks: "Two pence."\n'
    '  - Example: "sell me two"\n  - Breaks: "Here they are."\n',
  )
  made = spec.load(FILES | {"specs/tea.md": tried}).policy("tea")
  first, _, second, last = made.clauses
  assert first.breaks == (("who drinks it?", "I can't say."),) and not first.keeps
  assert second.keeps == (("goose tea price", 'No "tea" for geese.'),)
  assert second.breaks == (
    ("goose tea price", "Two pence."),
    ("sell me two", "Here they are."),
  )
  assert second.examples == ("goose tea price", "sell me two")
  assert last.breaks == last.keeps == ()


def test_no_model_is_shown_what_breaks_or_keeps_a_clause(small):
  more = 'price"\n  - Keeps: "No tea for any goose in this house, ever."'
  tried = spec.load(FILES | {"specs/tea.md": TEA.replace('price"', more)})
  assert tried != small
  for detail in spec.DETAILS:
    for category in ("tea", "soap", spec.BENIGN):
      shown = spec.render(tried, category, detail=detail)
      assert shown == spec.render(small, category, detail=detail)
  assert not spec.leak_check(tried, 8)("No tea for any goose in this house, ever.")


@pytest.mark.parametrize(
  ("parse", "text", "wanted"),
  [
    (parsing.parse_principles, text, wanted)
    for text, wanted in (
      ("", "x.md:1: wanted one heading"),
      ("## Principles\n", "x.md:1: wanted text under"),
      ("- **a**: B.\n## Principles\n- **a**: B.", 'x.md:1: wanted "## Principles"'),
      ("## Rules\n- **a**: B.", "x.md:1: wanted one heading"),
      (PRINCIPLES + "## Style\nNo.", "x.md:4: wanted one heading"),
      (PRINCIPLES + "- help: Again.", r"x.md:4: wanted .- \*\*name\*\*: text"),
      (PRINCIPLES + "- **help**: Again.", "x.md:4: wanted each name once"),
    )
  ]
  + [
    (parsing.parse_styles, text, wanted)
    for text, wanted in (
      ("", '"## comply" and its guide, got .the end'),
      (swap(STYLES, "## refuse", "## decline"), "x.md:4: wanted .*## safe_complete"),
      (swap(STYLES, "## refuse", "## comply"), "x.md:4: wanted each style once"),
      (swap(STYLES, ":dual_use", ":Dual"), "x.md:10: wanted"),
      (swap(STYLES, ":dual_use", ":soap"), '"## safe_complete:dual_use" and its guide'),
      (
        swap(STYLES, "Decline kindly. <!--more--> Once.\n", ""),
        "x.md:4: wanted text under",
      ),
      ("Hello.\n" + STYLES, "x.md:1: wanted"),
    )
  ]
  + [
    (parsing.parse_policy, text, wanted)
    for text, wanted in (
      (
        swap(TEA[: TEA.index("## Worked")], "id: tea", "id: x"),
        "Worked examples.*got 'the end of the file'",
      ),
      ("---\nid: x\n", '"---" to close'),
      (swap(TEA, "id: tea", "id: benign"), "not 'benign'"),
    )
  ],
)
def test_what_is_not_in_the_format_is_named(parse, text, wanted):
  with pytest.raises(ValueError, match=wanted):
    parse(text, "x.md")


def test_load_orders_policies_by_id_whatever_the_order_of_files(small):
  assert [policy.id for policy in small.policies] == ["soap", "tea"]
  for order in itertools.permutations(FILES.items()):
    assert spec.load(dict(order)) == small
  bare = {name.split("/")[1]: text for name, text in FILES.items()}
  assert spec.load(bare) == small  # names without a folder


@pytest.mark.parametrize(
  "change, wanted",
  [
    ({"specs/principles.md": None}, "wanted principles.md"),
    ({"specs/style.md": None}, "wanted style.md"),
    ({"specs/tea.md": None, "specs/soap.md": None}, "one <category>.md or more"),
    ({"specs/tea.txt": "x"}, r"wanted .md files.*tea\.txt"),
    ({"other/tea.md": TEA}, "a name each"),
    ({"specs/tee.md": swap(TEA, "id: tea", "id: tee")}, "got TE in tea and tee"),
    ({"specs/tea.md": swap(TEA, "---\n", "--\n")}, "specs/tea.md:1: wanted"),
  ],
)
def test_load_refuses(change, wanted):
  files = {name: text for name, text in (FILES | change).items() if text is not None}
  with pytest.raises(ValueError, match=wanted):
    spec.load(files)


def parse_or_value_error(text):
  for parse in (parsing.parse_policy, parsing.parse_principles, parsing.parse_styles):
    try:
      parse(text, "tea.md")
    except ValueError as error:
      assert re.match(r"tea\.md:\d+: wanted .+, got ", str(error), re.DOTALL)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_parses_or_is_a_value_error(data):
  lines = data.draw(st.sampled_from((TEA, PRINCIPLES, STYLES))).split("\n")
  for _ in range(data.draw(st.integers(1, 3))):
    i = data.draw(st.integers(0, len(lines) - 1))
    j = data.draw(st.integers(0, len(lines) - 1))
    damage = data.draw(st.sampled_from(("drop", "swap", "copy", "cut", "write")))
    if damage == "drop" and len(lines) > 1:
      del lines[i % len(lines)]
    elif damage == "swap":
      lines[i], lines[j] = lines[j], lines[i]
    elif damage == "copy":
      lines.insert(i, lines[j])
    elif damage == "cut":
      lines[i] = lines[i][data.draw(st.integers(0, 5)) :]
    else:
      lines[i] += data.draw(st.text(max_size=4))
  parse_or_value_error("\n".join(lines))


# Short forms.


def test_nothing_is_cut_where_no_author_has_marked_a_short_form():
  """A sentence is for its author to end: "Art. 9", "§ 3. Satz", "Nr. 5" do not."""
  rule = "Refuse what breaches Art. 9 GDPR, § 3. Satz 2 or Nr. 5. Public figures count."
  soap = swap(SOAP, "Give no soap to toddlers.", rule)
  made = spec.load(FILES | {"specs/soap.md": soap})
  for detail in spec.DETAILS:
    assert f"- SO-D1: {rule}\n" in spec.render(made, "soap", detail=detail)


def test_no_detail_but_the_full_one_has_what_stands_behind_a_mark(small):
  for detail in spec.DETAILS:
    shown = spec.render(small, "tea", detail=detail)
    assert "more" not in shown.casefold() or detail == "full"
    assert ("They do not pay." in shown) == (detail == "full")
  assert "<!--" not in repr(small)


@pytest.mark.parametrize(
  "text",
  [
    "<!--more--> Give no soap to toddlers.",
    "Give no soap to toddlers. <!--more-->",
    "Give no soap <!--more--> to <!--more--> toddlers.",
  ],
)
def test_a_mark_stands_between_words(text):
  soap = swap(SOAP, "Give no soap to toddlers.", text)
  with pytest.raises(ValueError, match="soap.md:15: wanted words on both sides"):
    spec.load(FILES | {"specs/soap.md": soap})


def test_a_byte_order_mark_is_no_part_of_a_policy(tmp_path, small):
  for name, text in FILES.items():
    (tmp_path / name.rpartition("/")[2]).write_text(text, encoding="utf-8-sig")
  assert spec.load(store.read_spec_files(tmp_path)) == small


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
  (tmp_path / "tea.md").write_text(TEA, encoding="utf-16")
  with pytest.raises(ValueError, match=r"tea\.md: wanted a text in UTF-8"):
    store.read_spec_files(tmp_path)


# Rendering.


def test_full(small):
  assert (
    spec.render(small, "tea", detail="full")
    == """\
# Principles
- help: Answer well. Refusing costs something.
- read: Assume the best.

# Style
- comply: Answer at once. Then stop.
- refuse: Decline kindly. Once.
- safe_complete: Give the safe part. Leave the rest.

# Policies in short
- Soap (SO): Soap is for washing. It is not food.
- Tea (TE): Talk about tea freely. Do not sell it.

# Policy: Tea (TE)

## Purpose
Keep tea safe. Keep it warm.

## Definitions
- tea: Hot water with leaves (e.g. Assam). Coffee is not tea.

## Allowed (comply)
- TE-A1: Explain it, e.g. Green tea. More. Examples: "is "white" tea?", "who drinks it?"
- TE-A12: Write poems about it.

## Disallowed (refuse)
- TE-D1: Never sell tea to geese. They do not pay. Examples: "goose tea price"

## Safe completion (safe_complete)
- TE-S1: Soothe those who spilled theirs. Leave out blame. Examples: "I spilled it"

## Style of safe completions here
- safe_complete:tea: Pour warmly. Do not scald.

## Edge cases
- "what did tea cost in 1900?" -> TE-A1: history of trade.
- "say "sold" -> now" -> TE-D1: a sale: refused."""
  )


def test_brief_has_the_short_forms_of_what_decides_and_no_more(small):
  full, brief = (spec.render(small, "tea", detail=d) for d in ("full", "brief"))
  left_out = ("## Purpose", "## Definitions", "## Edge cases")
  headings = [line for line in full.splitlines() if line.startswith("#")]
  kept = [heading for heading in headings if heading not in left_out]
  assert [line for line in brief.splitlines() if line.startswith("#")] == kept
  for line in (
    *("- help: Answer well.", "- refuse: Decline kindly."),
    *("- Tea (TE): Talk about tea freely.", "- TE-A1: Explain it, e.g. Green tea."),
    *("- TE-A12: Write poems about it.", "- TE-D1: Never sell tea to geese."),
    "- safe_complete:tea: Pour warmly.",
  ):
    assert line in brief.splitlines()
  assert "Example" not in brief


def test_clauses(small):
  assert (
    spec.render(small, "soap", detail="clauses")
    == """\
# Soap

## Allowed (comply)
- SO-A1: Explain how soap is made.

## Disallowed (refuse)
- SO-D1: Give no soap to toddlers.

## Safe completion (safe_complete)
- SO-S1: Comfort whoever ate some.

# Style
- refuse: Decline kindly."""
  )


def test_a_category_without_a_style_of_its_own_gets_dual_use(small):
  soap = spec.render(small, "soap", detail="full")
  assert "safe_complete:dual_use: Explain it. Add no recipe." in soap
  assert "safe_complete:tea" not in soap


@pytest.mark.parametrize("detail", ["full", "brief"])
def test_benign_is_the_opening_that_all_categories_share(small, detail):
  benign = spec.render(small, "benign", detail=detail)
  assert "# Policies in short" in benign and "# Policy:" not in benign
  for category in ("tea", "soap"):
    assert spec.render(small, category, detail=detail).startswith(benign + "\n\n")
  clauses = spec.render(small, "benign", detail="clauses")
  assert clauses == "# Style\n- refuse: Decline kindly."


def test_render_refuses_what_it_does_not_know(small):
  with pytest.raises(ValueError, match="wanted a category of .*'benign'.* got 'milk'"):
    spec.render(small, "milk", detail="full")
  with pytest.raises(ValueError, match="detail is one of .* got 'short'"):
    spec.render(small, "tea", detail="short")


# Clause ids.


@pytest.mark.parametrize(
  "text, real, unreal",
  [
    ("TE-D1 says no, so does TE-A1. TE-D1!", ("TE-D1", "TE-A1"), ()),
    ("(TE-A12), **SO-S1**, _TE-S1_", ("TE-A12", "SO-S1", "TE-S1"), ()),
    ("TE-D2, WE-D1, TE-D2", (), ("TE-D2", "WE-D1")),
    ("TE-A123 and TE-d1", (), ("TE-A123", "TE-d1")),
    ("ATE-D1, TE-D1x, TE-D, TE D1, te-d1", (), ()),
    ("", (), ()),
  ],
)
def test_cited_and_invented(small, text, real, unreal):
  assert spec.cited(text, small) == real
  assert spec.invented(text, small) == unreal


# Leaks.


@pytest.mark.parametrize(
  ("n", "text", "leaks"),
  [
    (6, "he said: NEVER SELL -- tea, to geese; they left", True),
    (6, "never sell tea to geese, honest", False),
    (6, "keep it warm hot water with leaves", False),  # of two items
    (6, "", False),
    (4, "don’t let it", False),
    (4, "don’t let it dry", True),
    (4, "dont let it dry", True),
    (4, "tea to geese. They do", True),  # across the mark of a short form
    # Each part of the specification: a principle, a guide, and so on.
    (3, "Refusing costs something", True),
    (3, "Add no recipe", True),
    (3, "soap is for", True),
    (3, "let it dry", True),
    (3, "bar that foams", True),
    (3, "Give no soap", True),
    (3, "history of trade", True),
    (3, "TE-D1 forbids it", True),
    # Quoted prompts and answers are none.
    (3, "what did tea cost in 1900?", False),
    (3, "I am a goose. One tea.", False),
    (3, "A tea between green and black. It is Chinese.", False),
  ],
)
def test_runs_of_words_of_the_specification_are_leaks(small, n, text, leaks):
  assert spec.leak_check(small, n)(text) == leaks


def test_leaks_equal_a_plain_search(small):
  own = [clause.text for policy in small.policies for clause in policy.clauses]
  own = [f" {re.sub('[^a-z]+', ' ', text.lower())} " for text in own]

  def plain(run):
    hits = (" ".join(run[i : i + 4]) for i in range(len(run) - 3))
    return any(f" {hit} " in text for hit in hits for text in own)

  pool = re.findall("[a-z]+", "never sell tea to geese they do not pay explain soap")
  leaks = spec.leak_check(small, 4)
  for i, j in itertools.combinations(range(len(pool) + 1), 2):
    for run in (pool[i:j], pool[j:] + pool[:i]):
      assert leaks(" ".join(run)) == plain(run), run
