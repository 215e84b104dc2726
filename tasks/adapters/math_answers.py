"""Whether two answers are the same number or the same words, as MathRuler grades them (docs/SCORING.md)."""

import ast
import re
from fractions import Fraction

_UNITS = (
    *("degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week", "month", "year"),
    *("foot", "feet", "inch", "yard"),
)
_UNIT_PATTERNS = tuple(re.compile(rf"{unit}(?:es)?s? *(?:\^[0-9]+)?") for unit in _UNITS)
"""In this order, one after the other: what one of them leaves may become another's match."""
_NAMED_POWERS = {"million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}
_LATEX_SYMBOLS = {"times": "*", "cdot": "*", "pi": "pi", "infty": "inf", "cup": "U", "circ": "∘"}
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|([^\s{}\\]))"
_SPELLINGS = (
    *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
    *((removed, "") for removed in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")),
)
_FRACTION = re.compile(rf"\\[td]?frac{_ARGUMENT}{_ARGUMENT}")
_ROOT = re.compile(rf"\\sqrt(?:\[[^\]]*\])?{_ARGUMENT}")
_THOUSANDS = re.compile(r"(\d),(\d{3})($|\D)")
_PLAIN_FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?$")
_RATIO = re.compile(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)")
_FEW_LETTERS = 2
"""Different letters of an expression that is calculated; with more it is words, and they are compared as such."""
_BRACKETS = "()[]"
_PRODUCT = re.compile(r"(?<=[a-z])(?=\.\d)|(?<=\d)(?=[a-df-z])")
"""Between the factors of 3x; not in 3e5."""
_LONGEST_EXPRESSION = 200
_LARGEST_POWER = 10_000
"""Bits of an exact power; a response may ask for one that fills the memory."""


def same_answer(answer: str, response: str) -> bool:
    """Tell whether a response gives the right answer, but for writing: 1,000 and 1000, 0.5 and 1/2, (A) and a.

    Nothing is evaluated but the four operations and powers of numbers.

    Args:
        answer: the right one.
        response: the text that was found in the model's response.

    Source: `grade_answer` of MathRuler 0.1.0, called with the two in this order as ZwZ's mm-eval does.
    Departure: no sympy, so nothing that only algebra shows is found equal; docs/SCORING.md lists what.
    """
    if _folded(answer) == _folded(response):
        return True
    given, wanted = _simplified(answer), _simplified(response)
    if given == wanted:
        return True
    given_parts, wanted_parts = _parts(given), _parts(wanted)
    if len(given_parts) != len(wanted_parts):
        return False
    if len(wanted_parts) > 1 and (wanted[0], wanted[-1]) != (given[0], given[-1]):
        return False
    return all(_same_part(*pair) for pair in zip(wanted_parts, given_parts, strict=True))


def _same_part(first: str, second: str) -> bool:
    if _PLAIN_FRACTION.match(first) and _PLAIN_FRACTION.match(second):
        # Not reduced is wrong.
        return first == second
    if (_integer(first) is None) != (_integer(second) is None):
        return False
    return _same_value(first, second)


# --- first pass: space, percent, LaTeX spelling; case stays ---------------------------------------------------------


def _folded(text: str) -> str:
    """Give a text in one spelling; as it is, but for outer space, where its LaTeX is broken."""
    text = _unwrapped(text.strip()).strip()
    folded = text
    for spelling, plain in _SPELLINGS:
        folded = folded.replace(spelling, plain)
    if folded.count("\\text{ ") > 1:
        return text
    folded = folded.split("\\text{ ")[0].replace("\\%", "").replace("%", "")
    folded = folded.replace(" .", " 0.").replace("{.", "{0.")
    if not folded:
        return folded
    if folded[0] == ".":
        folded = "0" + folded
    left, *right = folded.split("=")
    if len(right) == 1 and len(left) <= 2:
        # x = 5 is 5.
        folded = right[0]
    if re.search(r"\\sqrt(?:$|\\sqrt)", folded):
        return text
    folded = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", folded).replace(" ", "")
    braced = _braced_fractions(folded)
    if braced is None:
        return text
    if braced == "0.5":
        return "\\frac{1}{2}"
    if match := _RATIO.fullmatch(braced):
        return f"\\frac{{{match[1]}}}{{{match[2]}}}"
    return braced


def _unwrapped(text: str) -> str:
    match = re.search(r"^\\text\{(.+?)\}$", text)
    return match[1] if match else text


def _braced_fractions(text: str) -> str | None:
    """Put braces round the arguments of fractions that have none; None where a fraction has no arguments."""
    first, *others = text.split("\\frac")
    braced = [first]
    for part in others:
        if not part:
            return None
        if part[0] == "{":
            braced.append(part)
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            braced.append(f"{{{part[0]}}}{part[1:]}")
        else:
            braced.append(f"{{{part[0]}}}{{{part[1]}}}{part[2:]}")
    return "\\frac".join(braced)


# --- second pass: units, numbers, case ------------------------------------------------------------------------------


def _simplified(text: str) -> str:
    text = _unwrapped(text).replace("\\%", "%").replace("\\$", "$").replace("$", "").replace("%", "")
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for name, power in _NAMED_POWERS.items():
        text = text.replace(name, power)
    for pattern in _UNIT_PATTERNS:
        text = pattern.sub("", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text and text[0] == "{" and text[-1] == "}":
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    if (number := _number(text)) is not None:
        text = str(number)
    if "\\" in text:
        text = _without_latex(text)
    text = re.sub(r"- *", "-", text)
    # 7 3/4 is 7+3/4.
    text = re.sub(r"([0-9]) +([0-9])", r"\1+\2", text)
    text = text.replace(" ", "").replace("{", "").replace("}", "").lower()
    number = _integer(text)
    return text if number is None else str(number)


def _without_latex(text: str) -> str:
    """Give the text that LaTeX would show; macros that are not known vanish, their arguments stay."""
    for pattern, shown in ((_FRACTION, r" \1\2/\3\4"), (_ROOT, r"sqrt(\1\2)")):
        while (changed := pattern.sub(shown, text)) != text:
            text = changed
    text = re.sub(r"\\[()\[\]]", "", text)
    text = re.sub(r"\\([A-Za-z]+)\s*", lambda match: _LATEX_SYMBOLS.get(match[1], ""), text)
    text = re.sub(r"\\[,;: ]", " ", text).replace("\\!", "").replace("\\\\", "\n")
    return re.sub(r"[\\{}]", "", text).strip()


def _number(text: str) -> int | None:
    """Give the integer that a number is, to 1e-7."""
    try:
        number = float(text)
        nearest = round(number)
    except (ValueError, OverflowError):
        return None
    return nearest if abs(number - nearest) <= 1e-7 else None


def _integer(text: str) -> int | None:
    """Give the integer that a text is, with or without commas between thousands."""
    return None if _number(_joined_thousands(text)) is None else int(float(text.replace(",", "")))


def _joined_thousands(text: str) -> str:
    while (joined := _THOUSANDS.sub(r"\1\2\3", text)) != text:
        text = joined
    return text


def _parts(text: str) -> list[str]:
    """Give the members of a tuple or interval; any other text is one member."""
    text = _joined_thousands(text)
    if not text:
        return []
    inner = text[1:-1]
    if inner and text[0] in _BRACKETS and text[-1] in _BRACKETS and not any(mark in inner for mark in _BRACKETS):
        return [part.strip() for part in inner.split(",")]
    return [text]


# --- third pass: arithmetic -----------------------------------------------------------------------------------------


def _same_value(first: str, second: str) -> bool:
    both = f"({first})-({second})"
    letters = {character for character in both.replace("sqrt", "").replace("frac", "") if character.isalpha()}
    if len(letters) > _FEW_LETTERS or len(both) > _LONGEST_EXPRESSION:
        return False
    if "^{" in both or "^(" in both or re.search(r"\^[0-9]+\^|\^[0-9][0-9]", both):
        return False
    try:
        trees = [
            ast.parse(_PRODUCT.sub("*", f"({text})").replace("^", "**"), mode="eval").body for text in (first, second)
        ]
        left, right = (_value(tree) for tree in trees)
        if left is None or right is None:
            return ast.dump(trees[0]) == ast.dump(trees[1])
        return left - right == 0
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False


def _value(tree: ast.expr) -> Fraction | float | None:
    """Calculate numbers; None where a name stands among them.

    Raises:
        ValueError: it is something else than arithmetic.
    """
    match tree:
        case ast.Constant(value=int() as number):
            return Fraction(number)
        case ast.Constant(value=float() as number):
            return number
        case ast.Name():
            return None
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand)
            return value if value is None or isinstance(sign, ast.UAdd) else -value
        case ast.BinOp(left=left, op=operation, right=right):
            return _combined(_value(left), operation, _value(right))
    raise ValueError("no arithmetic")


def _combined(
    left: Fraction | float | None, operation: ast.operator, right: Fraction | float | None
) -> Fraction | float | None:
    if left is None or right is None:
        return None
    match operation:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow() if right == int(right):
            exponent = int(right)
            if isinstance(left, Fraction):
                size = max(left.numerator.bit_length(), left.denominator.bit_length())
                if size * abs(exponent) > _LARGEST_POWER:
                    raise ValueError("too large a power")
            return left**exponent
    raise ValueError("no arithmetic")
