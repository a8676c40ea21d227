"""Texts that trip up whoever reads them: made of what patterns, numbers and encodings turn on."""

from hypothesis import strategies as st

PIECES = (
    "What is", "12", "1,234.5", "1.2.3", "٣٤", "²", "\\frac{1}{2}", "def f(x):\n    return [x]", "assert f", "\nA. yes",
    "\nB) 3.5", "\nC. I and II", "\nQ. no", "all of them", "Σας", "\u0130stanbul", "ÀÉ", "日本語", "\ud800", "e\u0301",
    "\u212a", "Statement 1", "__", "don't", "x=3<4", "$5", "\n\n", "\x1c", "\u2028", " ", "Answer:", "word2vec", "?",
    "...",
)  # fmt: skip


def joined(pieces: tuple[str, ...], most: int = 30) -> st.SearchStrategy[str]:
    lists = st.lists(st.sampled_from(pieces), max_size=most)
    return st.one_of(lists.map(" ".join), lists.map("".join))


TEXTS = st.one_of(st.text(max_size=200), joined(PIECES))
