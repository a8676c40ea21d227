"""One condition written as an expression of the Common Expression Language: `prompt_tokens > 800 && !code`.

Its variables are the facts of `router.facts`. There are no macros over lists (`exists`, `map`, ...), so no expression
takes longer than its text is long; patterns are matched by a linear engine. What can be wrong with it is found when it
is written: syntax, a fact that does not exist, a comparison of kinds that cannot be compared.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final

MAX_CHARS: Final = 1000
FUNCTIONS: Final = frozenset({"contains", "double", "endsWith", "int", "matches", "size", "startsWith", "string"})
SPELLINGS: Final = {"= ": "== to compare", "=": "== to compare", "and": "&&", "or": "||", "not": "!"}
"""What other languages write, and how it is written here."""
MACROS: Final = (".all(", ".exists(", ".exists_one(", ".filter(", ".map(")

Fact = float | str | bool | None
"""A fact's value; None where nothing was measured."""


class InvalidExpression(ValueError):
    """Says what is wrong, in a few words."""


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression that has been tried; `asked` names the facts it speaks of."""

    text: str
    asked: tuple[str, ...] = field(compare=False)
    program: Any = field(compare=False, repr=False)
    """A `cel.Program`."""

    def holds(self, facts: Mapping[str, Fact]) -> bool | None:
        """Whether it holds; None if it failed though everything it asks for was measured."""
        asked = {name: facts[name] for name in self.asked}
        try:
            value = self.program.execute({name: _decimal(fact) for name, fact in asked.items()})
        except Exception:  # whatever the evaluator raises, nothing was said
            value = None
        if isinstance(value, bool):
            return value
        return False if None in asked.values() else None

    def limits(self, _: str) -> str:
        return ""


def compiled(text: str, samples: Mapping[str, tuple[Fact, ...]]) -> Expression:
    """`samples` has each fact's name and some values that it can take. Raises InvalidExpression."""
    import cel  # it brings a terminal's editor along: only who writes expressions pays for that

    if len(text) > MAX_CHARS:
        raise InvalidExpression(f"longer than {MAX_CHARS} characters")
    try:
        program = cel.compile(text)
    except ValueError as error:
        raise InvalidExpression(_syntax(str(error))) from None
    _refuse_functions(text, program)
    asked = tuple(program.variables())
    for name in asked:
        if name not in samples:
            raise InvalidExpression(_unknown(name, samples))
    for facts in _trials(asked, samples):
        _try(program, facts)
    return Expression(text, asked, program)


def _decimal(fact: Fact) -> Fact:
    """All numbers are of one kind, since CEL joins no two kinds."""
    return float(fact) if type(fact) is int else fact


def _refuse_functions(text: str, program: Any) -> None:
    """Operators are spelled `_&&_`, `!_`, `@in`."""
    if "@not_strictly_false" in program.functions() or any(macro in text for macro in MACROS):
        raise InvalidExpression("no macros over lists: write `label in ['free', 'redact']`")
    for name in program.functions():
        if name.isidentifier() and name not in FUNCTIONS and not name.startswith("_"):
            raise InvalidExpression(f"no function {name}; known are {', '.join(sorted(FUNCTIONS))}")


def _trials(asked: tuple[str, ...], samples: Mapping[str, tuple[Fact, ...]]) -> Iterator[dict[str, Fact]]:
    """Low and high numbers with false and true, so that `a && b` is evaluated to its end."""
    for number, truth in product((0, -1), (0, -1)):
        yield {name: samples[name][truth if isinstance(samples[name][0], bool) else number] for name in asked}


def _try(program: Any, facts: dict[str, Fact]) -> None:
    try:
        value = program.execute(facts)
    except ArithmeticError:
        return  # of these numbers; then, too, nothing is said
    except TypeError:
        said = "compares or joins values of different kinds (numbers are decimals: in sums write 2.0)"
        raise InvalidExpression(said) from None
    except Exception as error:
        raise InvalidExpression(_failed(str(error).splitlines()[0])) from None
    if not isinstance(value, bool):
        raise InvalidExpression("must be true or false, as `prompt_tokens > 800` is")


def _syntax(said: str) -> str:
    """Of `ERROR: <input>:1:5: Syntax error: ...`: the column and the cause."""
    _, _, place = said.partition("<input>:")
    column, cause = place.partition(":")[2].partition(":")[::2]
    cause = cause.splitlines()[0].strip() if cause else "not an expression"
    cause = cause.removeprefix("Syntax error: ").partition(" expecting ")[0]
    hint = next((f"; write {ours}" for theirs, ours in SPELLINGS.items() if f"'{theirs}'" in cause), "")
    return f"at character {column}: {cause}{hint}"


def _failed(said: str) -> str:
    """A pattern is the one thing that only a try can find fault with."""
    _, _, pattern = said.partition("Function 'matches' error: ")
    if not pattern:
        return said
    pattern = pattern.removesuffix(":").removesuffix(" not a valid regex")
    return f"not a regex that `matches` takes: {pattern} (no look-around, no back-references, bounded in size)"


def _unknown(name: str, samples: Mapping[str, tuple[Fact, ...]]) -> str:
    close = difflib.get_close_matches(name[:80], samples, n=1)
    return f"no fact {name[:80]}" + (f"; did you mean {close[0]}?" if close else f"; known are {', '.join(samples)}")
