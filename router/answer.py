"""What an answer looks like beside its question: what it comes down to, its form, and whether it could be one.

A right answer mostly has the type that was asked for and a size like the question's own numbers, and it stands
elsewhere among the options than a guess does. Nothing here knows what is true.
"""

import math
import re
from collections.abc import Sequence

SHORT = 60  # characters up to which an answer is taken to be the final answer itself
_LONGEST = 400  # characters of a final answer that are looked at
_MARKED = re.compile(
    r'\\boxed\{([^{}]{1,60})\}|"answer"\s*:\s*"?([^"\n}]{1,60})|answer is:?\s*\(?([^\n.()]{1,60})', re.IGNORECASE
)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_OPTION = re.compile(r"\n([A-P])[.)] ([^\n]*)")
_WORD = re.compile(r"[a-z]{3,}")
_RETURNED = re.compile(r"return ([^\n]*)")
_TRUTH = re.compile(
    r"==|!=|\bnot\b|^True|^False|\.is(?:alpha|digit|upper|lower|alnum)|\.(?:starts|ends)with|\bany\(|\ball\("
)
_WHOLE = re.compile(r"^(?:len|sum|int|ord|min|max|abs)\(|\.(?:count|index|find|rfind)\(")
_STRING = re.compile(
    r"join\(|^f?['\"]|^str\(|\.(?:replace|upper|lower|strip|title|format|capitalize|swapcase|ljust|rjust|zfill|center)\("
)
_LIST = re.compile(r"^(?:\[|list\(|sorted\()")
_KINDS = "?bsildt"  # not known, truth value, string, integer or other number, list, dict, tuple
_OPENING = {"'": "s", '"': "s", "[": "l", "{": "d", "(": "t"}
_LATEX = re.compile(r"\\(?:left|right|text|!|,|;|displaystyle)|[$\s]")
_ABSENT = -1.0  # of a measure that has no meaning for this question


def final_answer(text: str) -> str:
    """What the answer comes down to: itself if short, else what it marks as its answer, else its last number."""
    text = text.strip()
    if len(text) <= SHORT:
        return text
    tail = text[-2000:]
    marked = _MARKED.findall(tail)
    if marked:
        return str(next(found for found in marked[-1] if found)).strip()
    numbers = _NUMBER.findall(tail[-200:])
    return str(numbers[-1]) if numbers else ""


def silent(final: str) -> bool:
    return final.strip().lower() in {"", "none", "nan"}


def plain(final: str) -> str:
    """The form in which two final answers are compared: numbers by value, LaTeX, spaces, case and quotes evened out;
    empty for none."""
    if silent(final):
        return ""
    evened = (
        _LATEX.sub("", final).replace("dfrac", "frac").replace("tfrac", "frac").replace('"', "'").rstrip(".").lower()
    )
    evened = evened.strip("'") or evened
    value = _value(evened)
    return evened if value is None else repr(value)


def traits(query: str, final: str) -> list[float]:
    """Numbers about a final answer to `query`: its own form, its place among the options, its fit to a program."""
    final = final.strip()[:_LONGEST]
    cut = _OPTION.search(query)
    stem = query[: cut.start()] if cut else query
    options = [found[1] for found in _OPTION.findall(query)] if cut else []
    return [*_form(final, stem), *_place(final, stem, options), *_fit(final, query)]


def _value(text: str) -> float | None:
    text = text.replace("$", "").replace("%", "").replace(",", "").strip()
    if len(text) >= 20 or not _NUMBER.fullmatch(text):
        return None
    return float(text)


def _size(value: float) -> float:
    return math.copysign(math.log1p(min(abs(value), 1e12)), value)


def _form(final: str, stem: str) -> list[float]:
    value = _value(final)
    given = [found for found in map(_value, _NUMBER.findall(stem)[:100]) if found is not None]
    most = max(map(abs, given), default=0.0)
    return [
        float(silent(final)),
        math.log1p(len(final)),
        float(value is not None),
        _size(value or 0.0),
        float(value is not None and value % 1 != 0),
        float(value is not None and value in given),
        abs(_size(value)) - _size(most) if value is not None else 0.0,
        float(len(final) - len(final.rstrip("0"))) if value is not None and "." not in final else 0.0,
        float(bool(final) and final in stem),
        float(final.count("\\")),
        float(sum(map(str.isalpha, final))),
        float(sum(not sign.isalnum() for sign in final)),
        float("=" in final),
        float(final.count(" ")),
    ]


def _place(final: str, stem: str, options: Sequence[str]) -> list[float]:
    """Which option was chosen, how long and how large it is among them, how much of it the question says."""
    at = ord(final.upper()) - 65 if len(final) == 1 and final.isalpha() and final.isascii() else -1
    if not 0 <= at < len(options):
        return [float(at), *[_ABSENT] * 8]
    chosen, sizes = options[at], [len(option) for option in options]
    values = [_value(found[0]) if (found := _NUMBER.search(option)) else None for option in options]
    known, own = [value for value in values if value is not None], values[at]
    words = set(_WORD.findall(chosen.lower()))
    lowered = chosen.lower()
    return [
        float(at),
        at / len(options),
        float(len(options)),
        math.log1p(len(chosen)),
        math.log((1 + len(chosen)) * len(options) / (len(options) + sum(sizes))),
        sum(size < len(chosen) for size in sizes) / len(options),
        sum(value < own for value in known) / len(options) if own is not None and len(known) > 2 else _ABSENT,
        len(words & set(_WORD.findall(stem.lower()))) / max(len(words), 1),
        float("none of" in lowered or "all of" in lowered or "not " in lowered),
    ]


def _fit(final: str, query: str) -> list[float]:
    """How the value fits a program whose output is asked for: its type, its likeness to the argument; and the program's
    own measures. All _ABSENT where there is no program."""
    if "def " not in query or "assert" not in query:
        return [_ABSENT] * 13
    body = query.rsplit("def ", 1)[-1]
    called = body.rsplit("assert", 1)[-1].partition("f(")[2].rpartition("==")[0]
    argument = called.strip().removesuffix(")").strip()
    returned = _RETURNED.findall(body)
    kind, expected, inner = _kind(final), _returns(returned[-1].strip() if returned else ""), final.strip("'\"")
    letters = set(argument)
    return [
        float(_KINDS.index(kind)),
        float(expected not in ("?", kind)),
        float(_kind(argument) == kind),
        float(bool(inner) and plain(final) in (plain(argument), plain(argument.split(", ")[0]))),
        float(bool(inner) and inner in argument),
        math.log((1 + len(final)) / (1 + len(argument))),
        sum(sign in letters for sign in inner) / max(len(inner), 1),
        float(_KINDS.index(expected)),
        math.log1p(len(argument)),
        float(len(returned)),
        float(body.count("for ") + body.count("while ")),
        float(body.count("if ")),
        float(body.count("\n")),
    ]


def _kind(literal: str) -> str:
    if literal.lower() in {"true", "false"}:
        return "b"
    return _OPENING.get(literal[:1], "i" if _value(literal) is not None else "?")


def _returns(expression: str) -> str:
    """The likely type of a returned expression, by its words."""
    if _TRUTH.search(expression) and " if " not in expression and " for " not in expression:
        return "b"
    for pattern, kind in ((_WHOLE, "i"), (_STRING, "s"), (_LIST, "l")):
        if pattern.search(expression):
            return kind
    return "l" if ".split(" in expression else {"{": "d", "(": "t"}.get(expression[:1], "?")
