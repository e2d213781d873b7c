"""The calculator: exact where it can be, honest where it cannot, and never stuck."""

import threading
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agents.calculator import MAX_CHARS, calculator
from agents.tools import Toolbox, ToolRetry
from agents.types import ToolCall


@pytest.mark.parametrize(
    "expression, result",
    [
        ("5 x 3", "15"),
        ("15 / 3", "5"),
        ("15 / 3 =", "5"),
        ("5×3÷2", "7.5"),
        ("5X3 − 1", "14"),
        ("0.1 + 0.2", "0.3"),
        ("1_000 * 1.5e3", "1500000"),
        ("1e-50", "1e-50"),
        ("0.0000001", "0.0000001"),
        ("9.5e30", "9500000000000000000000000000000"),
        (".5 + 1.", "1.5"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("10 - 3 - 2", "5"),
        ("2 ** 3 ** 2", "512"),
        ("2^10", "1024"),
        ("-2 ** 2", "-4"),
        ("2 ** -2", "0.25"),
        ("+-+3", "-3"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("7 % 3", "1"),
        ("7 % (-3)", "-2"),
        ("5.5 % 2", "1.5"),
        ("sqrt(16)", "4"),
        ("sqrt(1/4)", "0.5"),
        ("16 ** 0.5", "4"),
        ("ABS(-3)", "3"),
        ("round(2.5)", "2"),
        ("round(2.675, 2)", "2.68"),
        ("round(1234, -2)", "1200"),
        ("min(3, 1/2, 2)", "0.5"),
        ("max(1, 234)", "234"),
        ("0 ** 0", "1"),
        ("0 ** 5", "0"),
        ("0 ** 0.3", "0"),
        ("(-1) ** 10 ** 900", "1"),
        ("(-1) ** -3", "-1"),
        ("(1/3) * 3", "1"),
    ],
)
def test_what_is_exact_is_printed_exactly(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression, result",
    [
        ("1/3", "≈ 0.3333333333333333333333333333"),
        ("2/3", "≈ 0.6666666666666666666666666667"),
        ("≈ 0.3333333333333333333333333333 * 3", "0.9999999999999999999999999999"),
        ("1e40/3", "≈ 3.333333333333333333333333333e+39"),
        ("1/2**300", "≈ 4.909093465297726553095771955e-91"),
        ("sqrt(2)", "≈ 1.414213562373095048801688724"),
        ("sqrt(2) ** 2", "≈ 2"),
        ("sqrt(2) ** 100", "≈ 1125899906842624"),
        ("8 ** (1/3)", "≈ 2"),
        ("pi", "≈ 3.141592653589793238462643383"),
        ("π * 2", "≈ 6.283185307179586476925286767"),
        ("e ** (1/2)", "≈ 1.648721270700128146848650788"),
        ("min(pi, 3)", "≈ 3"),
        # A mortgage: exactly, this fraction has thousands of digits.
        ("(1 + 0.0525/12) ** 360", "≈ 4.81417506000612615473590552"),
    ],
)
def test_what_is_rounded_says_so(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression, complaint",
    [
        ("", "ends too early"),
        ("2 +", "ends too early"),
        ("abs(-3", "ends too early"),
        ("1 / 0", "division by zero"),
        ("1 // 0", "division by zero"),
        ("1 % (2 - 2)", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("15%", "write 15% as 15/100"),
        ("15% * 80", "write 15% as 15/100"),
        ("50% - 3", "write 15% as 15/100"),
        ("1,234 + 1", "a comma between digits"),
        ("max(1,234)", "a comma between digits"),
        ("1,5 + 1", "without separators"),
        ("0x10", "0x can mean two things"),
        ("2pi", r"every multiplication with \*"),
        ("2 (3)", r"every multiplication with \*"),
        ("5 3", r"every multiplication with \*"),
        ("min()", "cannot read"),
        ("(1))", "cannot read"),
        ("sqrt(1, 2)", "at most 1"),
        ("round(1, 0.5)", "whole number n"),
        ("round(1, 10**9)", "whole number n"),
        ("sqrt(-1)", "no real root"),
        ("(-8) ** (1/3)", "no real power"),
        ("sin(1)", "'sin' is not known; known are sqrt"),
        ("__import__('os')", "cannot read '_'"),
        ("$5", "known are"),
        ("9 ** 9 ** 9", "too large"),
        ("10 ** 10 ** 10", "too large"),
        ("2.5 ** 99999", "too large"),
        ("1e99999999999", "too large"),
        ("10**900 * 10**900", "too large"),
        ("1/10**900 / 10**900", "too small"),
        ("(" * 400 + "1" + ")" * 400, "nested more than"),
        ("-" * 500 + "1", "nested more than"),
        ("1+" * MAX_CHARS + "1", "longer than 1000"),
    ],
)
def test_what_cannot_be_computed_is_said_so_that_a_model_can_mend_it(expression, complaint):
    with pytest.raises(ToolRetry, match=complaint) as caught:
        calculator(expression)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


PIECES = st.sampled_from(
    [
        *"0123456789+-*/%()., xe^",
        "**",
        "//",
        "9**",
        "9**9",
        "1e999",
        "sqrt(",
        "round(",
        "max(",
        "pi",
    ]
)


@settings(max_examples=300)
@given(st.text(max_size=MAX_CHARS) | st.lists(PIECES, max_size=300).map("".join))
@example("(((" * 20 + "9**300/7**299" + "))" * 30)
@example("+".join(f"1/{n}" for n in range(100, 300)))
@example("*".join(f"(1+1/9**{n})" for n in range(300, 380)))
@example("-".join(f"sqrt({n})**0.{n}" for n in range(11, 80)))
@example("**".join(["1.0001"] * 50))
@example("9**" * 330 + "9")
@example("-" * MAX_CHARS)
@example("7" * MAX_CHARS)
def test_any_text_ends_soon_and_raises_only_what_a_model_can_mend(text):
    text = text[:MAX_CHARS]
    fastest = 1.0
    for _ in range(3):  # the best of three: other threads' work is not ours
        started = time.thread_time()
        try:
            calculator(text)
        except ToolRetry as error:
            assert str(error)
        fastest = min(fastest, time.thread_time() - started)
        if fastest < 0.25:
            break
    assert fastest < 0.25


def joined(parts):
    left, sign, right = parts
    return f"({left[0]}) {sign} ({right[0]})", left[1], sign, right[1]


def computed(text, left, sign, right):
    values = {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "/": lambda: left / right,
        "//": lambda: Fraction(left // right),
        "%": lambda: left % right,
    }
    if right == 0 and sign in ("/", "//", "%"):
        return text, None
    return text, values[sign]()


NUMBERS = st.decimals(-10_000, 10_000, places=3).map(lambda d: (format(d, "f"), Fraction(d)))
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner)
        .map(lambda parts: computed(*joined(parts)))
        .filter(lambda made: made[1] is not None and len(made[0]) < MAX_CHARS)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(EXPRESSIONS)
def test_it_agrees_with_fractions(made):
    expression, value = made
    result = calculator(expression)
    if result.startswith("≈"):
        shown = Fraction(Decimal(result.removeprefix("≈ ")))
        assert abs(shown - value) <= abs(value) / 10**27
    else:
        assert Fraction(Decimal(result)) == value


def test_threads_do_not_disturb_each_other():
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append((n, calculator(f"sqrt({n})**2"))))
        for n in range(2, 20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(n, str(n) if n in (4, 9, 16) else f"≈ {n}") for n in range(2, 20)]


def test_it_is_a_tool_that_changes_nothing():
    assert calculator.effect == "read"
    assert calculator.parameters["required"] == ["expression"]
    call = ToolCall(id="1", function={"name": "calculator", "arguments": '{"expression": "1/0"}'})
    (result,) = Toolbox([calculator]).run([call])
    assert (result.outcome, result.content) == ("retry", "division by zero")
