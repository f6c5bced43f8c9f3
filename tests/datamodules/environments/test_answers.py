"""Final answers of replies, and comparisons with a reference."""

import pytest

from datamodules.environments.answers import CHECKERS, final_answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("7", "7"),
        (" 7 \n", "7"),
        ("3 + 4 = 7\nAnswer: 7", "7"),
        ("Answer: 6\nno\n  Answer:7\n", "7"),
        ("The Answer: 7", "The Answer: 7"),
        ("Answer:\n1 2\n3 4", "1 2\n3 4"),
        ("Answer: 7</think>8", "8"),
        ("<think>Answer: 7", ""),
        ("<think>a</think>b<think>c", "b"),
        ("a</think>b</think>\nAnswer: c", "c"),
        ("", ""),
        ("Answer:", ""),
    ],
)
def test_the_final_answer_is_what_is_said_last(reply: str, answer: str):
    assert final_answer(reply) == answer


@pytest.mark.parametrize(
    ("checker", "reference", "right", "wrong"),
    [
        ("exact", "Big  Ben", ["Big Ben", "Big\nBen"], ["big ben", "BigBen", "Big Ben.", "Big"]),
        ("words", "Big Ben", ["big ben", "Big Ben.", "BIG, BEN!"], ["BigBen", "Big", "the Big Ben", "Ben Big", ""]),
        ("words", "+", ["+"], ["-", "", "++"]),
        ("number", "1000", ["1,000", "1e3", "1000.0", "+1000"], ["1000 apples", "10,00", "100", "nan", "inf", "", "²"]),
        ("number", "-2.5", ["-2.50", "\u22122.5"], ["2.5", "-2,5"]),
        ("math", r"\frac{1}{2}", ["0.5", "1/2", r"$\frac12$", r"\boxed{\frac{1}{2}}"], ["1/3", "1/2 or 1/3", ""]),
        ("math", "42", ["42", "42.0", r"\boxed{42}"], ["421", "42 and 17", "it is 42", "42 xyzzy", "24"]),
        ("math", "x+1", ["1+x", "x + 1"], ["x-1", "x"]),
        ("math", "{1,2}", ["{2,1}"], ["{1,3}"]),
    ],
)
def test_paid_is_what_is_exactly_right(checker: str, reference: str, right: list[str], wrong: list[str]):
    check = CHECKERS[checker]
    assert [answer for answer in right if not check(answer, reference)] == []
    assert [answer for answer in wrong if check(answer, reference)] == []
