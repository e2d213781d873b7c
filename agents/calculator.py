"""`calculator`: exact arithmetic as a tool, by a parser of its own with bounds on size and time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from math import isqrt
from typing import NoReturn

from agents.tools import ToolRetry, tool

# Bounds that no sum of a person's comes near, and that keep every expression far below 50 ms.
MAX_CHARS = 1000
MAX_DIGITS = 1000  # of a whole number, and of an exponent's effect
MAX_DEPTH = 60
_MAX_BITS = 3322  # of a number with 1,000 digits

_SHOWN = 28  # digits of a result that is not exact; as many as Python's `Decimal` has by itself
_CARRIED = 60  # digits of a value that is not exact, on the way
_PLACES = 100  # after the point; an exact result with more of them is shown rounded

_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z]+)|(?P<sign>\*\*|//|[-+*/%(),])|(?P<other>\S)"
)
# What people and models write for a sign.
_WRITTEN = str.maketrans(
    {
        **dict.fromkeys("×·⋅∗", "*"),
        **dict.fromkeys("÷∕", "/"),
        **dict.fromkeys("−–", "-"),
        "^": "**",
        "π": " pi ",
    }
)
_SEPARATED = re.compile(r"[0-9],[0-9]{3}(?![0-9])")
_HEXADECIMAL = re.compile(r"(?<![0-9.])0[xX][0-9a-fA-F]")


@dataclass(frozen=True)
class _Number:
    """A value; no longer `exact` once something on the way had to be rounded."""

    value: Fraction
    exact: bool = True


_CONSTANTS = {  # to 60 digits
    "pi": "3.14159265358979323846264338327950288419716939937510582097494",
    "e": "2.71828182845904523536028747135266249775724709369995957496697",
}


def _decimal(value: Fraction, digits: int = _CARRIED) -> Decimal:
    return Context(prec=digits).divide(Decimal(value.numerator), Decimal(value.denominator))


def _size(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _too_large() -> NoReturn:
    raise ToolRetry(f"the result is too large or too small: more than {MAX_DIGITS} digits")


def _settled(value: Fraction, exact: bool) -> _Number:
    """The value within the bounds: a broken number that has grown too long is rounded."""
    magnitude = value.numerator.bit_length() - value.denominator.bit_length()
    whole = value.denominator == 1
    if abs(magnitude) > _MAX_BITS or (whole and magnitude >= _MAX_BITS):
        _too_large()
    if exact and _size(value) <= _MAX_BITS:
        return _Number(value)
    return _Number(Fraction(_decimal(value)), exact=False)


def _divisor(number: _Number) -> Fraction:
    if not number.value:
        raise ToolRetry("division by zero")
    return number.value


def _sqrt(number: _Number) -> _Number:
    value = number.value
    if value < 0:
        raise ToolRetry("there is no real root of a negative number")
    root = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    if root * root == value:
        return _Number(root, number.exact)
    return _Number(Fraction(Context(prec=_CARRIED).sqrt(_decimal(value))), exact=False)


def _power(base: _Number, exponent: _Number) -> _Number:
    value, times = base.value, exponent.value
    exact = base.exact and exponent.exact
    if times < 0:
        _divisor(base)
    if exponent.exact and times == Fraction(1, 2):
        return _sqrt(base)
    if times.denominator == 1 and abs(value) in (0, 1):
        # By parity: the exponent may be as large as it likes.
        small = value ** (2 - times.numerator % 2) if times else Fraction(1)
        return _Number(small, exact)
    if exact and times.denominator == 1 and _size(value) * abs(times) <= 4 * _MAX_BITS:
        return _settled(value**times.numerator, exact)
    if value < 0 and times.denominator != 1:
        raise ToolRetry("a negative number has no real power with a broken exponent")
    if not value:
        return _Number(Fraction(0), exact)
    if abs(times) * abs(Fraction(Context(prec=9).log10(_decimal(abs(value))))) > MAX_DIGITS:
        _too_large()
    if (
        abs(times) > 10**30
    ):  # the error of the rounded base grows with it, into the digits that are shown
        _too_large()
    rounded = Context(prec=_CARRIED).power(_decimal(value), _decimal(times))
    return _settled(Fraction(rounded), exact=False)


def _round(number: _Number, places: _Number = _Number(Fraction(0))) -> _Number:
    count = places.value
    if count.denominator != 1 or abs(count) > MAX_DIGITS:
        raise ToolRetry("round(x, n) takes a whole number n of decimal places")
    return _settled(round(number.value, int(count)), number.exact)


def _abs(number: _Number) -> _Number:
    return _Number(abs(number.value), number.exact)


def _chosen(choose: Callable[..., Fraction]) -> Callable[..., _Number]:
    def function(*numbers: _Number) -> _Number:
        exact = all(number.exact for number in numbers)
        return _Number(choose(number.value for number in numbers), exact)

    return function


# Each with the fewest and the most arguments.
_FUNCTIONS: dict[str, tuple[Callable[..., _Number], int, int]] = {
    "sqrt": (_sqrt, 1, 1),
    "abs": (_abs, 1, 1),
    "round": (_round, 1, 2),
    "min": (_chosen(min), 1, MAX_CHARS),
    "max": (_chosen(max), 1, MAX_CHARS),
}

_OPERATIONS: dict[str, Callable[[_Number, _Number], Fraction]] = {
    "+": lambda a, b: a.value + b.value,
    "-": lambda a, b: a.value - b.value,
    "*": lambda a, b: a.value * b.value,
    "/": lambda a, b: a.value / _divisor(b),
    "//": lambda a, b: Fraction(a.value // _divisor(b)),
    "%": lambda a, b: a.value % _divisor(b),
}


class _Parser:
    """Recursive descent, computing on the way; precedence as in Python."""

    def __init__(self, text: str) -> None:
        self._tokens = [(found.lastgroup, found[0]) for found in _TOKEN.finditer(text)]
        self._tokens = [("sign", "*") if t in ("x", "X") else (kind, t) for kind, t in self._tokens]
        self._next = 0
        self._depth = 0

    def result(self) -> _Number:
        number = self._sum()
        if self._next < len(self._tokens):
            self._refuse()
        return number

    @property
    def _sign(self) -> str:
        """The sign that comes next; `""` if something else does."""
        kind, text = self._tokens[self._next] if self._next < len(self._tokens) else ("", "")
        return text if kind == "sign" else ""

    def _refuse(self) -> NoReturn:
        if self._next >= len(self._tokens):
            raise ToolRetry(f"the expression ends too early{self._percent_hint}")
        kind, text = self._tokens[self._next]
        hints = {
            ",": "; write numbers with a point and without separators, 1234.5",
            "(": "; write every multiplication with *",
        }
        hint = hints.get(text, "; write every multiplication with *" if kind != "sign" else "")
        hint = self._percent_hint or hint
        if kind == "other":
            hint = "; known are + - * / // % ** ( ), sqrt, abs, round, min, max, pi, e"
        before = "".join(token for _, token in self._tokens[: self._next])[-20:]
        after = f" after {before}" if before else ""
        raise ToolRetry(f"cannot read {text[:40]!r}{after}{hint}")

    @property
    def _percent_hint(self) -> str:
        after_percent = self._next > 0 and self._tokens[self._next - 1][1] == "%"
        return "; write 15% as 15/100, and a remainder as 7 % (-3)" if after_percent else ""

    def _take(self, sign: str) -> None:
        if self._sign != sign:
            self._refuse()
        self._next += 1

    def _sum(self) -> _Number:
        return self._chain(("+", "-"), self._product)

    def _product(self) -> _Number:
        return self._chain(("*", "/", "//", "%"), self._unary)

    def _chain(self, signs: tuple[str, ...], part: Callable[[], _Number]) -> _Number:
        number = part()
        while self._sign in signs:
            sign = self._sign
            self._next += 1
            if sign == "%" and self._sign in ("+", "-"):
                self._refuse()  # "50% - 3" would be taken for a remainder
            other = part()
            number = _settled(_OPERATIONS[sign](number, other), number.exact and other.exact)
        return number

    def _unary(self) -> _Number:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ToolRetry(f"the expression is nested more than {MAX_DEPTH} deep")
        sign = self._sign
        if sign in ("+", "-"):
            self._next += 1
            number = self._unary()
            number = _Number(-number.value, number.exact) if sign == "-" else number
        else:
            number = self._atom()
            if self._sign == "**":
                self._next += 1
                number = _power(number, self._unary())
        self._depth -= 1
        return number

    def _atom(self) -> _Number:
        if self._sign == "(":
            self._next += 1
            number = self._sum()
            self._take(")")
            return number
        kind, text = self._tokens[self._next] if self._next < len(self._tokens) else ("", "")
        if kind == "number":
            self._next += 1
            return _literal(text)
        if kind != "name":
            self._refuse()
        self._next += 1
        name = text.lower()
        if name in _CONSTANTS:
            return _Number(Fraction(_CONSTANTS[name]), exact=False)
        if name not in _FUNCTIONS:
            raise ToolRetry(
                f"{text[:40]!r} is not known; known are {', '.join([*_FUNCTIONS, *_CONSTANTS])}"
            )
        return self._called(name)

    def _called(self, name: str) -> _Number:
        function, fewest, most = _FUNCTIONS[name]
        self._take("(")
        arguments = [self._sum()]
        while self._sign == ",":
            self._next += 1
            arguments.append(self._sum())
        self._take(")")
        if not fewest <= len(arguments) <= most:
            raise ToolRetry(f"{name} takes at most {most} numbers, not {len(arguments)}")
        return function(*arguments)


def _literal(text: str) -> _Number:
    mantissa, _, exponent = text.replace("_", "").lower().partition("e")
    power = int(exponent or 0)
    if abs(power) > MAX_DIGITS:
        _too_large()
    return _settled(Fraction(mantissa) * Fraction(10) ** power, exact=True)


def _shown(number: _Number) -> str:
    value = number.value
    exact = number.exact and 10**_PLACES % value.denominator == 0
    if exact and value.denominator == 1:
        return str(value.numerator)
    shown = _decimal(value, MAX_DIGITS + 2 * _PLACES if exact else _SHOWN)
    if not exact:
        shown = shown.normalize(Context(prec=_SHOWN))
    plain = shown.adjusted() >= -_SHOWN and (exact or shown.adjusted() < _SHOWN)
    text = format(shown, "f") if plain else str(shown).lower()
    return text if exact else f"≈ {text}"


@tool(effect="read")
def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Knows + - * / // % ** and parentheses, sqrt, abs, round(x, n), min, max, pi and e.
    % is the remainder: write 15% of 80 as 15/100 * 80. A result that had to be rounded, to 28 digits,
    begins with ≈.

    Args:
        expression: for example (5 + 3) * 2.5 / 3
    """
    if len(expression) > MAX_CHARS:
        raise ToolRetry(
            f"the expression is longer than {MAX_CHARS} characters; compute it in parts"
        )
    text = expression.strip().removeprefix("≈").removesuffix("=").translate(_WRITTEN)
    if _SEPARATED.search(text):
        raise ToolRetry(
            "a comma between digits can mean two things: write 1234, or with a space max(1, 234)"
        )
    if _HEXADECIMAL.search(text):
        raise ToolRetry("0x can mean two things: write 0 * …, or the number in decimal digits")
    return _shown(_Parser(text).result())
