import numpy as np

from datamodules.shuffle import hash64, permutation


def test_permutations_are_permutations_and_do_not_change_over_time():
    for size in (0, 1, 2, 1000):
        assert sorted(permutation(size, 12345)) == list(range(size))
    # written down once: another order here would break the resumption of every running job
    assert permutation(8, 0).tolist() == EXPECTED_0
    assert permutation(8, hash64("rows", 1, "a")).tolist() == EXPECTED_A
    assert hash64("rows", 1, "a") == EXPECTED_HASH


def test_positions_are_uniform():
    first = np.bincount([permutation(10, hash64("key", n))[0] for n in range(5000)], minlength=10)
    assert np.abs(first - 500).max() < 110  # five standard deviations


EXPECTED_0 = [2, 4, 6, 5, 1, 7, 0, 3]
EXPECTED_A = [4, 0, 5, 2, 7, 3, 6, 1]
EXPECTED_HASH = 8024569180868147254
