"""The final answer of a reply, and the few ways in which one is compared with a reference.

Paid is what is exactly right: an answer with something beside it is another answer.
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

ANSWER = re.compile(r"^[ \t]*Answer:", re.MULTILINE)
"""Where a reply with steps says its result."""
THOUGHTS_END, THOUGHTS_BEGIN = "</think>", "<think>"
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
"""A word of prose, or product of variables; commands of LaTeX begin with a backslash."""
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc asin acos atan arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi oo inf".split()
)
"""Words of mathematics."""


def final_answer(reply: str) -> str:
    """Return what a reply says in the end.

    Thoughts, up to the last `</think>`, are left out, and so is a thought that was not finished. If a line begins with
    `Answer:`, it is what follows the last such mark, else all of the rest; without blanks around it.
    """
    said = reply.rpartition(THOUGHTS_END)[2].partition(THOUGHTS_BEGIN)[0]
    marks = list(ANSWER.finditer(said))
    return (said[marks[-1].end() :] if marks else said).strip()


def exact(answer: str, reference: str) -> bool:
    """Return whether an answer is the reference to the letter, but for the length of blanks."""
    return answer.split() == reference.split()


def number(answer: str, reference: str) -> bool:
    """Return whether an answer is the number of the reference, however it is written: 1,000 is 1e3 and 1000.0."""
    values = [_number(text) for text in (answer, reference)]
    return None not in values and values[0] == values[1]


def words(answer: str, reference: str) -> bool:
    """Return whether an answer has the words of the reference, whatever the case and the marks between them."""
    said, due = (re.findall(r"\w+", text.casefold()) for text in (answer, reference))
    return said == due if due else exact(answer, reference)


def math(answer: str, reference: str) -> bool:
    """Return whether an answer is the expression, equation or set of the reference by `math-verify` (LaTeX or plain).

    math-verify looks for an expression anywhere in a text; here all of the answer must be one, so that nobody is paid
    for the right number in a wrong sentence.
    """
    from math_verify import parse, verify

    prose = set(WORD.findall(answer)) - set(WORD.findall(reference)) - FUNCTIONS
    if not answer or prose:
        return False
    gold, said = (parse(f"${text.strip().strip('$')}$", parsing_timeout=None) for text in (reference, answer))
    assert gold, f"math-verify cannot read the reference {reference!r}"
    return verify(gold, said, timeout_seconds=None)  # the process has a limit of its own


def _number(text: str) -> Decimal | None:
    plain = text.strip().replace("\u2212", "-")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", plain):
        plain = plain.replace(",", "")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "exact": exact,
    "number": number,
    "words": words,
    "math": math,
}
"""Name -> whether an answer is right: called with the final answer and the reference."""
