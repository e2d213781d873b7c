"""Arithmetic found in prose and worked out exactly, within bounds: "Now divide that by 3"."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Problem", "evaluate", "last_number", "problems", "show"]

# Keeps every value convertible to float, whose largest exponent is 1024, and every power quick.
_MAX_BITS = 1_000
# Far above what a person asks; keeps the recursive parser away from Python's recursion limit.
_MAX_TOKENS = 100

# Never from the middle of a longer number: that would make a search of long ones quadratic.
_NUMBER = r"(?<!\d)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_EARLIER = r"(?:(?:the |your )?(?:last |previous )?(?:result|answer)|that|it|this)\b"
_OPERAND = rf"({_NUMBER}|{_EARLIER})"

_NUMBER_WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
]
_DATE = r"\b\d{4}-\d\d?-\d\d?\b"

# Prose is rewritten to symbols in this order; `that` stands for the result before.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (_DATE, ";"),
        *((rf"\b{word}\b", str(number)) for number, word in enumerate(_NUMBER_WORDS)),
        (r"(?<=\d)\(", " * ("),
        (r"(?<=\d)\s*[x\u00d7]\s*(?=[\d(])", " * "),
        (r"(?<=[\d)])\s+x\s+(?=[\d(])", " * "),
        (rf"({_NUMBER}) ?(?:%|percent) of {_OPERAND}", r"\1 / 100 * \2"),
        (rf"\bdivide {_OPERAND} by {_OPERAND}", r"\1 / \2"),
        (rf"\bdivide by {_OPERAND}", r"that / \1"),
        (rf"\bmultiply {_OPERAND} (?:by|with|and) {_OPERAND}", r"\1 * \2"),
        (rf"\bmultiply by {_OPERAND}", r"that * \1"),
        (rf"\badd {_OPERAND} (?:to|and) {_OPERAND}", r"\2 + \1"),
        (rf"\badd {_OPERAND}", r"that + \1"),
        (rf"\b(?:subtract|take) {_OPERAND} from {_OPERAND}", r"\2 - \1"),
        (rf"\bsubtract {_OPERAND}", r"that - \1"),
        (rf"\bsum of {_OPERAND} and {_OPERAND}", r"\1 + \2"),
        (rf"\bproduct of {_OPERAND} and {_OPERAND}", r"\1 * \2"),
        (rf"\bdifference (?:of|between) {_OPERAND} and {_OPERAND}", r"\1 - \2"),
        (rf"\b(?:double|twice) {_OPERAND}", r"2 * \1"),
        (rf"\b(?:halve|half of) {_OPERAND}", r"\1 / 2"),
        (rf"\bsquare root of {_OPERAND}", r"\1 ** 0.5"),
        (rf"{_OPERAND} squared\b", r"\1 ** 2"),
        (rf"{_OPERAND} cubed\b", r"\1 ** 3"),
        (r"\bto the power of\b|\^", "**"),
        (r"\b(?:times|multiplied by)\b|\u00d7", "*"),
        (r"\bdivided by\b|\u00f7", "/"),
        (r"\bplus\b", "+"),
        (r"\bminus\b|\u2212", "-"),
        (r"\bmod(?:ulo)?\b", "%"),
        (r"^\W*(?:(?:and|now|then)[ ,]+)*(?=[+*/] )", "that "),
    ]
]

_LEXEME = re.compile(
    rf"(?P<operand>{_NUMBER}|\b{_EARLIER})|(?P<symbol>\*\*|[-+*/%()])|[^\W\d]\w*|[^\s]"
)
_TOKEN = re.compile(rf"\s*({_NUMBER}|\*\*|[-+*/%()]|\S)")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size * abs(exponent) > _MAX_BITS:
            raise OverflowError("the power is too large")
        return Fraction(base**exponent.numerator)
    if base < 0:
        raise ArithmeticError("a root of a negative number")
    return Fraction(repr(float(base) ** float(exponent)))


_OPERATORS: Mapping[str, tuple[int, Callable[[Fraction, Fraction], Fraction]]] = {
    "+": (1, lambda a, b: a + b),
    "-": (1, lambda a, b: a - b),
    "*": (2, lambda a, b: a * b),
    "/": (2, lambda a, b: a / b),
    "%": (2, lambda a, b: a % b),
    "**": (4, _power),
}
_UNARY = 3  # binds looser than a power, closer than a product: -2 ** 2 is -4


@dataclass(frozen=True)
class Problem:
    """A piece of arithmetic found in a text.

    `value` is `None` where there is none, as in a division by zero; `expression` still says "that"
    when there was no earlier result to put in its place.
    """

    expression: str
    value: Fraction | None

    @property
    def solvable(self) -> bool:
        """Whether the expression stands for itself, so that a calculator can be asked."""
        return "that" not in self.expression


def problems(text: str, earlier: Fraction | None = None) -> list[Problem]:
    """The arithmetic that `text` asks for, in its order.

    Args:
        text: Prose, as in "What is 5 x 3? Now divide that by 3."
        earlier: What "that" means at first; each problem's value is what it means to the next.
    """
    text = text.lower()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    found = []
    for run in _runs(text):
        problem = _problem(run, earlier)
        if problem is not None:
            earlier = problem.value
            found.append(problem)
    return found


def _runs(text: str) -> Iterator[list[str]]:
    """The stretches of operands and symbols between other words."""
    run: list[str] = []
    for lexeme in _LEXEME.finditer(text):
        word = lexeme["operand"] or lexeme["symbol"]
        if lexeme["operand"] and not word[0].isdigit():
            word = "that"
        # An operand straight after another begins something new: "what is it: 5 + 3".
        if not word or (run and _ends_operand(run[-1]) and (lexeme["operand"] or word == "(")):
            yield run
            run = []
        if word:
            run.append(word.replace(",", ""))
    yield run


def _ends_operand(word: str) -> bool:
    return word == ")" or word not in {*_OPERATORS, "("}


def _problem(run: list[str], earlier: Fraction | None) -> Problem | None:
    run = _trimmed(run)
    if not any(word in _OPERATORS for word in run[1:]) or len(run) > _MAX_TOKENS:
        return None
    if earlier is not None:
        run = [_operand(earlier) if word == "that" else word for word in run]
    expression = _joined(run)
    if "that" in run:
        return Problem(expression, None)
    try:
        return Problem(expression, evaluate(expression))
    except ArithmeticError:
        return Problem(expression, None)
    except ValueError:
        return None


def _trimmed(run: list[str]) -> list[str]:
    """Without what belongs to the prose: a dash before, a bracket around."""
    run = list(run)
    while run and (run[-1] in _OPERATORS or run[-1] == "(" or _opened(run) < 0):
        run.pop()
    while run and (run[0] in {*_OPERATORS, ")"} - {"-"} or _opened(run) > 0):
        run.pop(0)
    return run


def _opened(run: list[str]) -> int:
    return run.count("(") - run.count(")")


_SIGN = re.compile(r"(^|[(] ?|[-+*/%] )- ")


def _joined(run: list[str]) -> str:
    return _SIGN.sub(r"\1-", " ".join(run)).replace("( ", "(").replace(" )", ")")


def _operand(value: Fraction) -> str:
    return f"({show(value)})" if value < 0 else show(value)


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, `+ - * / % **` and brackets.

    Raises:
        ValueError: It is no such expression, or has more than 100 numbers and symbols.
        ArithmeticError: It has no value within bounds: a division by zero, a power too large.
    """
    tokens = _TOKEN.findall(expression)
    if len(tokens) > _MAX_TOKENS:
        raise ValueError(f"an expression has at most {_MAX_TOKENS} numbers and symbols")
    parser = _Parser(tokens)
    value = parser.binary(0)
    if parser.rest:
        raise ValueError(f"unexpected {parser.rest[-1]!r}")
    return value


class _Parser:
    """Precedence climbing over tokens kept in reverse, so that the next one is popped."""

    def __init__(self, tokens: list[str]) -> None:
        self.rest = tokens[::-1]

    def binary(self, floor: int) -> Fraction:
        left = self._unary()
        while self.rest and self.rest[-1] in _OPERATORS:
            precedence, apply = _OPERATORS[self.rest[-1]]
            if precedence < floor:
                break
            symbol = self.rest.pop()
            right = self.binary(precedence if symbol == "**" else precedence + 1)
            left = _bounded(apply(left, right))
        return left

    def _unary(self) -> Fraction:
        word = self.rest.pop() if self.rest else ""
        if word in {"-", "+"}:
            value = self.binary(_UNARY)
            return -value if word == "-" else value
        if word == "(":
            value = self.binary(0)
            if not self.rest or self.rest.pop() != ")":
                raise ValueError("a bracket is not closed")
            return value
        if not word[:1].isdigit():
            raise ValueError(f"expected a number, not {word!r}")
        return _bounded(_number(word))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise OverflowError("the number is too large")
    return value


def _number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


_SIGNED = re.compile(rf"-?{_NUMBER}")


def last_number(text: str) -> Fraction | None:
    """The last number in `text`, or `None`; one too long to reckon with counts as none."""
    found = _SIGNED.findall(text)
    return _number(found[-1]) if found and len(found[-1]) < _MAX_BITS // 4 else None


def show(value: Fraction) -> str:
    """A number as people write it: whole, or with up to ten significant digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"
