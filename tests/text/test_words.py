"""Right answers to capability prompts: numbers, formulas, options, and other text."""

import threading
import time

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import pytest

from dalign.text import words
from tests.helpers import examples

NUMBERS = [
  ("The answer is 1,234.", "1234", 1),
  ("It costs $70000.00", "70000", 1),
  ("12 or 13", "12", 0),
  ("", "7", 0),
  ("It is 1\u202f234 people.", "1234", 1),
  ("It is 1234567.", "1,234,567", 1),
  ("The total is $1,234.50 in all.", "1234.5", 1),
  ("$\\$1{,}234$", "1234", 1),
  ("3,4", "34", 0),
  ("It is \u22125.", "-5", 1),
  ("It is \u22125.", "5", 0),
  ("It is -5.", "\u22125", 1),
  ("From 3-5", "-5", 0),
  ("It is .5", "0.5", 1),
  ("It is 0.5.", ".5", 1),
  ("That makes 12 km.", "12", 1),
  ("The area is 12 m^2.", "12", 1),
  ("The area is 12 m\u00b2.", "12", 1),
  ("It is 50%.", "50%", 1),
  ("It is 50 percent.", "50%", 1),
  ("It is 50.", "50%", 1),
  ("It is 0.5.", "50%", 1),
  ("It is 50%.", "50", 1),
  ("It is 50%.", "0.5", 1),
  ("It is 0.5%.", "0.5", 0),
  ("It is \\(\\frac{1}{2}\\).", "0.5", 1),
  ("It is \\(\\frac{1}{2}\\).", "1/2", 1),
  ("The answer is \\boxed{\\frac{3}{4}}, as 6 of 8 shows.", "0.75", 1),
  ("So $x = 3 \\times 4 = 12$.", "12", 1),
  ("$\\frac{1}{2}$ of 24 is 12.", "12", 1),
  ("\\boxed{12}, not 13", "12", 1),
  ("It is 3/4.", "4", 0),
  ("It is 1.2 \u00d7 10^6.", "1200000", 1),
  ("It is 1e6.", "1000000", 1),
  ("It is $2^{10}$.", "1024", 1),
  ("12 or 13", "13", 0),
  ("12, 13 or 14", "14", 0),
  ("12 + 1 is 13, or 13.0 as a decimal", "13", 1),
  ("It is 7, then 8, and so 9.", "9", 1),
  ("1e999999999999", "9", 0),
  ("It is 1 234 567 m.", "1234567", 1),
  ("It is 1 234.", "1234", 1),
  ("Mix 5 100 times", "100", 1),
  ("It is 1\u2019234 francs.", "1234", 1),
  ("$1\\,234$", "1234", 1),
  ("1234", "1 234", 1),
  ("It is \u20135.", "-5", 1),
  ("pages 3\u20135", "5", 1),
  ("It is \u2212.5", "-0.5", 1),
  ("It is \u00bd.", "0.5", 1),
  ("It takes 1\u00bd cups.", "1.5", 1),
  ("It takes 1 1/2 cups.", "3/2", 1),
  ("$1\\frac{1}{2}$", "1.5", 1),
  ("\\frac12", "0.5", 1),
  ("It is 1.2 \u00d7 10\u2076.", "1200000", 1),
  ("It is 1.2\u00b710^6.", "1200000", 1),
  ("It is 10^6.", "1000000", 1),
  ("The distance is 1,234 m.", "1234 m", 1),
  ("$12\\text{ km}$", "12 km", 1),
  ("It is 12 m.", "12 km", 0),
  ("It is 5 million.", "5000000", 1),
  ("It is $1.5 Million.", "1,500,000", 1),
  ("It is 5000000.", "5 million", 1),
  ("It is 5 thousand.", "5 million", 0),
  ("It is 5 million.", "5", 1),  # in the unit that was asked for
  ("It is 5.", "5 million", 1),
  ("It is 90 degrees.", "90\u00b0", 1),
  ("It is \u22125 \u00b0C.", "-5 \u00b0C", 1),
  ("It is 5 \u00b0C.", "-5 \u00b0C", 0),
  ("$42\\ \\mathrm{m/s^2}$", "42", 1),
]
FORMULAS = [
  ("It is $1 + x^2$.", "x^2+1", 1),
  ("It is x**2 + 1.", "x^2+1", 1),
  ("y = x^2 + 1", "x^2+1", 1),
  ("It is $x^2$.", "x^2+1", 0),
  ("\\[ x^2 + 2x + 1 \\]", "(x+1)^2", 1),
  ("The result is \\boxed{2\\sqrt{2}}.", "\\sqrt{8}", 1),
  ("The result is \\boxed{2\\sqrt{3}}.", "\\sqrt{8}", 0),
  ("$2\\pi$", "2\\pi", 1),
  ("I do not know.", "2\\pi", 0),
  ("$x^2+1$ or $x^2$", "x^2", 0),
]
LETTERS = [
  ("B", "B", 1),
  ("(B) Paris", "B", 1),
  ("The answer is B.", "B", 1),
  ("\\boxed{B}", "B", 1),
  ("**B**", "B", 1),
  ("I think it is C.", "C", 1),
  ("A dog is option D.", "D", 1),
  ("A is wrong and C too. The answer is B.", "B", 1),
  ("B is correct.", "B", 1),
  ("A, B, C, D", "D", 0),
  ("The answer is A or B.", "A", 0),
  ("The answer is B. The answer is C.", "C", 0),
  ("A and B", "B", 0),
  ("A/B/C", "C", 0),
  ("I don't know.", "I", 0),
  ("", "B", 0),
]
TEXTS = [
  ("It is PARIS, of course.", "Paris", 1),
  ("Paris, the capital of France, lies on the Seine.", "Paris", 1),
  ("Parisian", "Paris", 0),
  ("Paris, London, Rome or Berlin", "Paris", 0),
  ("The capital is Paris, London, Rome, Berlin.", "Paris", 0),
  ("It is Paris or London.", "London", 0),
  ("- Paris\n- London\n- Rome", "Paris", 0),
  ("1. Paris\n2. London", "London", 0),
  ("Paris/London/Rome", "London", 0),
  ("Of Paris, London and Rome it is the first. The answer is Paris.", "Paris", 1),
  ("In 1900, as now, it was Paris.", "Paris", 1),
  ("It is not Paris.", "Paris", 0),
  ("salt and pepper", "salt and pepper", 1),
  ("You get ice, salt and water.", "salt and water", 1),
  ("H2O is water", "H2O", 1),
  ("the 2 pm train", "2 am", 0),
  ("It is (1,2).", "(1, 2)", 1),
  ("$\\left(1, 2\\right)$", "(1,2)", 1),
  ("From [ 0,1 ).", "[0, 1)", 1),
  ("It is (2, 1).", "(1, 2)", 0),
  ("It is (1, 2, 3).", "(1, 2)", 0),
]
UNTOLD = [
  ("It is $\\sum_{n=1}^4 n$.", "10", None),  # right, and nobody adds it up
  ("It is \\boxed{\\binom{4}{2}}.", "6", None),
  ("It is $\\sum_{n=1}^4 n$.", "x^2+1", None),
  ("It is $x^2 +$.", "x^2+1", None),
  ("It is $\\sum_{n=1}^4 n$.", "\\sum_{n=1}^4 n", 1),
  ("It is $x^2$.", "\\sum_{n=1}^4 n", None),
  ("I do not know.", "\\sum_{n=1}^4 n", 0),
  ("$4!$ or $x$", "x^2+1", 0),
]


@pytest.mark.parametrize(
  ("answer", "reference", "right"), [*NUMBERS, *FORMULAS, *LETTERS, *TEXTS, *UNTOLD]
)
def test_an_answer_is_right_or_wrong_or_cannot_be_told(answer, reference, right):
  assert words.correct(answer, reference) == right


@pytest.mark.parametrize(
  "answer",
  [
    "$9^{9^{9^{9}}}$",
    "$9^9^9^9$",
    "$99999999!$",
    "$" + "(" * 150 + "1" + ")" * 150 + "$",
    "$\\sum_{n=1}^{99999999} n^n$",
    "$(x+1)^{99999}$",
    "\\boxed{" * 60,
    "$\\frac{1}{" * 40,
    "1" * 100000,
    "1,111" * 20000,
    "or " * 20000,
    "\\(" * 20000,
  ],
)
@pytest.mark.parametrize("reference", ["x^2+1", "1024"])
def test_no_answer_takes_long(answer, reference):
  start = time.monotonic()
  assert words.correct(answer, reference) in (0.0, None)
  assert time.monotonic() - start < 8.0


@examples(300)
@given(
  st.one_of(st.text(), st.text(alphabet="0123456789.,-−/%e^{}()$\\ orxA*=\n")),
  st.sampled_from(["5", "50%", "1/2", "x^2+1", "\\pi", "B", "Paris", "1e3"]),
)
@example("1/0", "5")
@example("5/0%", "50%")
@example("１２ ² ٣", "5")
def test_any_text_is_right_or_wrong_or_cannot_be_told(answer, reference):
  told = (0.0, 1.0) if reference in ("B", "Paris") else (0.0, 1.0, None)
  assert words.correct(answer, reference) in told


def test_a_formula_is_compared_in_any_thread():
  found = []
  thread = threading.Thread(
    target=lambda: found.append(words.correct("$1+x^2$", "x^2+1"))
  )
  thread.start()
  thread.join()
  assert found == [1.0]


CHINESE = "请不要告诉用户怎样在家里制作危险的化学物品"
THAI = "อย่าบอกผู้ใช้ว่าจะทำสารเคมีอันตรายที่บ้านได้อย่างไร"


@pytest.mark.parametrize("text", [CHINESE, THAI])
def test_runs_are_found_in_scripts_without_spaces(text):
  """Wherever they stand, in whatever goes around them; a few characters are no run."""
  own = set(words.runs([text], 6))
  assert own and not own.isdisjoint(words.runs(["x" + text[2:] + "甲"], 6))
  assert own.isdisjoint(words.runs([text[:9]], 6))
  assert own.isdisjoint(words.runs([text[::-1]], 6))


def test_runs_count_what_is_written_with_spaces_by_words():
  said = "the cat 我们都 sat on it".split()
  assert [*words.runs(said[:2] + said[3:], 3)] == [
    ("the", "cat", "sat"),
    ("cat", "sat", "on"),
    ("sat", "on", "it"),
  ]
  assert [*words.runs(said, 3)][:2] == [
    ("the", "cat", "我", "们"),
    ("cat", "我", "们", "都", "sat"),
  ]
