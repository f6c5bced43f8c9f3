"""Answers with their steps to problems of reasoning-gym, in a form that a model of a few million parameters can learn.

A small model copies, spells and counts badly; what decides is how little each token of the answer asks of it. So each
is one look-up: a digit of a column or their sum, a letter or the count so far, the item that stands behind this number
above. The result comes last, on a line that begins with `Answer:`.
"""

import json
from collections.abc import Callable
from decimal import Decimal

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


def _leg_counting(question: str, _: str) -> str:
    """`... if you have 8 birds, 2 crabs?`: a line for each animal, from the second on what there are so far."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, lines = None, []
    for group in question.rpartition(" you have ")[2].strip().removesuffix("?").split(", "):
        count, _, name = group.partition(" ")
        legs = ANIMALS[name if count == "1" else name.removesuffix("s")]
        product = int(count) * legs
        lines.append(f"{group} {count}*{legs}={product}")
        if total is not None:
            lines.append(f"{total}+{product} {_columns(total, product)}")
        total = product + (total or 0)
    return "\n".join(lines)


def _spell_backward(question: str, _: str) -> str:
    """`... (example: sun -> nus): noon`: the letters with their numbers, then from the last to the first."""
    letters = [f"{number}{letter}" for number, letter in enumerate(question.rpartition(": ")[2], 1)]
    return "".join(letters) + "\n" + "".join(reversed(letters))


def _number_filtering(question: str, answer: str) -> str:
    """`Keep all numbers larger than 3 in this list: ['5', '1']`: what is kept, then each number beside the limit."""
    rule, _, listed = question.partition(" in this list: ")
    limit = rule.rpartition(" ")[2]
    kept = _numbers(answer)
    keeps_larger = rule.startswith("Keep") == ("larger" in rule)
    lines = [f"keep {'>' if keeps_larger else '<'}"]
    for number in _numbers(listed.partition("\n")[0]):
        difference = Decimal(number) - Decimal(limit)
        sign = "=" if not difference else ">" if difference > 0 else "<"
        lines.append(f"{number} {sign} {limit} {'yes' if number in kept else 'no'}")
    return "\n".join(lines)


def _numbers(text: str) -> list[str]:
    return json.loads(text.replace("'", '"'))


STEPS: dict[str, Callable[[str, str], str]] = {
    "chain_sum": _chain_sum,
    "leg_counting": _leg_counting,
    "number_filtering": _number_filtering,
    "spell_backward": _spell_backward,
}
"""Family -> its steps, given question and right answer."""
