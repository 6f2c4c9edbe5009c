"""Number extraction on outputs as models write them, and the comparison of numbers."""

import math

import pytest

from moa_peft.answers import extract_number, numbers_match
from moa_peft.errors import UserError

# (text, strict, flexible)
CASES = [
    # Clean statements.
    ("The answer is 4.", 4, 4),
    ("The answer is 4", 4, 4),
    ("the ANSWER is 12.", 12, 12),
    ("So the final answer is 36", 36, 36),
    ("16 - 12 = 4 kids. The answer is 4.", 4, 4),
    ("The answer  is   7.", 7, 7),
    ("The answer\nis 7.", 7, 7),
    # Currency, units, percent.
    ("The answer is $5.", 5, 5),
    ("The answer is $1,234.50.", 1234.5, 1234.5),
    ("The answer is $ 17.", 17, 17),
    ("The answer is \u20ac45.", 45, 45),
    ("The answer is Rs. 500.", 500, 500),
    ("The answer is Rs.500.", 500, 500),
    ("The answer is 16 kids.", 16, 16),
    ("The answer is 16kids", 16, 16),
    ("The answer is 64 hours!", 64, 64),
    ("The answer is 50%.", 50, 50),
    ("The answer is 12.5 %.", 12.5, 12.5),
    ("The answer is 5th.", 5, 5),
    # Markdown, LaTeX and punctuation around the number.
    ("The answer is **5**.", 5, 5),
    ("The answer is: 5", 5, 5),
    ("The answer is: **$5**", 5, 5),
    ("**The answer is** 5.", 5, 5),
    ("The answer is:\n\n42", 42, 42),
    ("The answer is `42`.", 42, 42),
    ("The answer is _42_.", 42, 42),
    ("The answer is (42).", 42, 42),
    ('The answer is "42".', 42, 42),
    ("The answer is \\boxed{42}.", 42, 42),
    ("The answer is $\\boxed{42}$.", 42, 42),
    ("The answer is $\\frac{3}{4}$.", 0.75, 0.75),
    ("The answer is $42$.", 42, 42),
    ("The answer is x = 9.", 9, 9),
    ("The answer is approximately 3.14.", 3.14, 3.14),
    ("The answer is approx. 3.14.", 3.14, 3.14),
    # Signs.
    ("The answer is -3.", -3, -3),
    ("The answer is \u22123.", -3, -3),
    ("The answer is -$5.", -5, -5),
    ("The answer is $-5.", -5, -5),
    ("The answer is (-3).", -3, -3),
    ("The answer is -1,200.5", -1200.5, -1200.5),
    ("The answer is 0.", 0, 0),
    ("The answer is -0.", 0, 0),
    # Decimals, separators, fractions.
    ("The answer is 4.0.", 4, 4),
    ("The answer is .5", 0.5, 0.5),
    ("The answer is -.5", -0.5, -0.5),
    ("The answer is 0.75 liters.", 0.75, 0.75),
    ("The answer is 7,092.", 7092, 7092),
    ("The answer is 1,234,567.", 1234567, 1234567),
    ("The answer is 1/2.", 0.5, 0.5),
    ("The answer is -1/2.", -0.5, -0.5),
    ("The answer is 1 1/2.", 1.5, 1.5),
    ("The answer is 1/0.", None, None),
    ("The answer is 1e3.", 1000, 1000),
    # An equation inside the statement.
    ("The answer is 3 + 4 = 7.", 7, 7),
    ("The answer is 10 - 3 = 7 apples.", 7, 7),
    ("The answer is 7 = 3 + 4.", 7, 7),
    ("The answer is 3 * 4 = $12.", 12, 12),
    # The first statement counts, whatever follows it.
    ("The answer is 4. The answer is 5.", 4, 4),
    ("The answer is 4.The answer is 5.", 4, 4),
    ("The answer is 4.\n\nQ: Tom has 9 apples. The answer is 9.", 4, 4),
    ("The answer is 16. 20 + 3 = 23", 16, 16),
    ("The answer is 5. That is = 9", 5, 5),
    # A statement without a number.
    ("The answer is (C).", None, None),
    ("The answer is unknown. He has 5 left.", None, 5),
    ("The answer is\n", None, None),
    ("The answer is four.", 4, 4),
    ("The answer isn't 5.", None, 5),
    ("The answer is\nunknown\n5", None, 5),
    # No statement at all.
    ("", None, None),
    ("no digits here", None, None),
    ("10 - 3 = 7", None, 7),
    ("10-3", None, 3),
    ("10 -3", None, -3),
    ("a drop of -3", None, -3),
    ("(5)-3", None, 3),
    ("5--3", None, -3),
    ("He paid $1,234.50", None, 1234.5),
    ("She has 3, 4, 5", None, 5),
    ("1,2,3", None, 3),
    ("order 1,2345", None, 2345),
    ("COVID-19", None, 19),
    ("H2O", None, None),
    ("step 2: x3 = y", None, 2),
    ("He drove 20/16 = 1.25 feet.", None, 1.25),
    ("6 / 2 pieces", None, 2),
    ("#### 42", 42, 42),
    ("Answer: 42", 42, 42),
    ("The total is 42 dollars and 50 cents", None, 50),
    ("7 7 7 7 7 7 7", None, 7),
    ("9" * 400, None, None),
    ("3 \u00d7 4 = 12", None, 12),
    ("\u0663", None, None),
]


def test_there_are_enough_cases():
    assert len({text for text, _, _ in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize(("text", "strict", "flexible"), CASES, ids=[ascii(text[:40]) for text, _, _ in CASES])
def test_extract_number(text, strict, flexible):
    assert extract_number(text, mode="strict") == strict
    assert extract_number(text, mode="flexible") == flexible


def test_extraction_stays_fast_on_degenerate_text():
    # Backtracking over long runs would take minutes here; the linear scan is far below a second.
    for text in (
        "1," * 20000,
        "answer is " * 5000,
        "-" * 50000,
        "1 " * 20000 + "/",
        "$" * 50000,
        "answer: 1 * " * 5000,
    ):
        found = extract_number(text, mode="flexible")
        assert found is None or isinstance(found, float)


def test_unknown_mode():
    with pytest.raises(UserError, match="mode is 'loose'; allowed are settled, strict, flexible"):
        extract_number("The answer is 4.", mode="loose")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        (4.0, 4.0, True),
        (4.0005, 4.0, True),
        (3.9995, 4.0, True),
        (4.01, 4.0, False),
        (-4.0, 4.0, False),
        (None, 0.0, False),
        (math.nan, 4.0, False),
        (1e16, 1e16 + 4, False),
    ],
)
def test_numbers_match(predicted, gold, expected):
    assert numbers_match(predicted, gold) is expected


def test_tolerance():
    assert numbers_match(4.4, 4.0, tolerance=0.5)
    assert not numbers_match(4.0005, 4.0, tolerance=1e-6)
