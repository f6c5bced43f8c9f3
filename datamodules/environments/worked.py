"""Answers with their steps to problems of reasoning-gym, in a form that a model of a few million parameters can learn.

A small model copies, spells and counts badly; what decides is how little each token of the answer asks of it. So each
is one look-up: a digit of a column or their sum, a letter or the count so far, the item that stands behind this number
above. The result comes last, on a line that begins with `Answer:`.
"""

import json
from collections.abc import Callable

MARK = "Answer:"
"""Begins the line with the result."""


def worked_answer(family: str, question: str, answer: str) -> str:
    """Return an assistant's text: a line or more of steps where the family has some here, then the result.

    Args:
        family: name of the family.
        question: its question, in reasoning-gym's words.
        answer: the right answer.
    """
    steps = STEPS[family](question, answer) + "\n" if family in STEPS else ""
    return f"{steps}{MARK} {answer}"


def _chain_sum(question: str, _: str) -> str:
    """`... problem: 47 + 85 - 9 =`: a line for each operation, column by column from the right."""
    first, *rest = question.rpartition(": ")[2].removesuffix("=").split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        value = int(term) if sign == "+" else -int(term)
        lines.append(_columns(total, value))
        total += value
    return "\n".join(lines)


def _columns(x: int, y: int) -> str:
    """Return the columns of x + y: `7+5=12 4+8+1=13`, where their signs differ `85-47 15-7=8 8-4-1=3`.

    From the second column on, the number before the sign of equality is what the column before carried or borrowed.
    """
    adds = (x < 0) == (y < 0)
    x, y = abs(x), abs(y)
    if not adds and x < y:
        x, y = y, x
    carry, columns = 0, [] if adds else [f"{x}-{y}"]
    for place in range(len(str(max(x, y)))):
        upper, lower = x // 10**place % 10, y // 10**place % 10
        last = str(carry) if place else ""
        if adds:
            total = upper + lower + carry
            columns.append(f"{upper}+{lower}{last and '+' + last}={total}")
            carry = total // 10
        else:
            borrowed = upper < lower + carry
            upper += 10 * borrowed
            columns.append(f"{upper}-{lower}{last and '-' + last}={upper - lower - carry}")
            carry = int(borrowed)
    return " ".join(columns)


def _products(question: str, _: str) -> str:
    """`... multiplication: 47 * 12. ...`: a line for each digit of the second factor, and what is added up so far."""
    first, second = question.rpartition(": ")[2].partition(".")[0].split(" * ")
    x, lines, total = abs(int(first)), [], 0
    for place, digit in enumerate(reversed(second.lstrip("-"))):
        carry, columns = 0, []
        for upper in reversed(str(x)):
            product = int(upper) * int(digit) + carry
            columns.append(f"{upper}*{digit}{f'+{carry}' if columns else ''}={product}")
            carry = product // 10
        lines.append(" ".join(columns))
        part = x * int(digit) * 10**place
        if place:
            lines.append(f"{total}+{part} {_columns(total, part)}")
        total += part
    return "\n".join(lines)


def _letter_counting(question: str, _: str) -> str:
    """`... the letter "e" appear in the text: "me see"?`: each word, its letters with the count at each hit, the word.

    The word again, since the next one is found behind it in the question.
    """
    _, letter, _, text, _ = question.split('"')
    count, words = 0, []
    for word in text.split():
        spelled = ""
        for character in word.lower():
            count += character == letter
            spelled += f" {character}{count if character == letter else ''}"
        words.append(f"{word}:{spelled} {word}")
    return " ".join(words)


def _spell_backward(question: str, _: str) -> str:
    """`... (example: sun -> nus): noon`: the letters with their numbers, then from the last to the first."""
    letters = [f"{number}{letter}" for number, letter in enumerate(question.rpartition(": ")[2], 1)]
    return "".join(letters) + "\n" + "".join(reversed(letters))


def _number_filtering(question: str, answer: str) -> str:
    """`Keep all numbers larger than 3 in this list: ['5', '1']`: each number with `yes` or `no`."""
    kept = _numbers(answer)
    listed = question[question.index("[") : question.index("]") + 1]
    return ", ".join(f"{number} {'yes' if number in kept else 'no'}" for number in _numbers(listed))


def _numbers(text: str) -> list[str]:
    return json.loads(text.replace("'", '"'))


STEPS: dict[str, Callable[[str, str], str]] = {
    "chain_sum": _chain_sum,
    "letter_counting": _letter_counting,
    "number_filtering": _number_filtering,
    "products": _products,
    "spell_backward": _spell_backward,
}
"""Family -> its steps, given question and right answer."""
