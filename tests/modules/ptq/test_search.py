"""The knapsack against trying everything, and its size on a network of hundreds of groups."""

import itertools
import random

import pytest

from modules.ptq.search import Option, choose


def instance(generator: random.Random) -> tuple[list[list[Option]], int]:
    """Groups of few sizes, so that costs and losses coincide often, and a budget that can be met."""
    groups = []
    for _ in range(generator.randint(1, 6)):
        size = generator.choice([1, 2, 3, 7, 10])
        losses = generator.choice([0.0, 0.5, generator.random()]), 0.3 * generator.random(), 0.0
        groups.append([Option(cost * size, loss) for cost, loss in zip((9, 16, 32), losses, strict=True)])
    least, most = (sum(bound(option.cost for option in options) for options in groups) for bound in (min, max))
    return groups, generator.randint(least, most + 3)


def totals(options: tuple[Option, ...]) -> tuple[float, int]:
    return sum(option.loss for option in options), sum(option.cost for option in options)


def test_no_choice_within_the_budget_is_better():
    generator = random.Random(0)
    for _ in range(300):
        groups, budget = instance(generator)
        best = min(totals(options) for options in itertools.product(*groups) if totals(options)[1] <= budget)
        loss, cost = totals(
            tuple(options[index] for options, index in zip(groups, choose(groups, budget), strict=True))
        )
        assert cost <= budget
        assert loss == pytest.approx(best[0], abs=1e-12)


def test_greed_is_not_enough():
    """The steepest gain first would take group 0 and have no room left for the other two."""
    groups = [
        [Option(0, 10.0), Option(6, 0.0)],
        [Option(0, 8.0), Option(5, 0.0)],
        [Option(0, 8.0), Option(5, 0.0)],
    ]
    assert choose(groups, 10) == [0, 1, 1]


def test_of_equal_losses_the_cheapest_is_taken():
    assert choose([[Option(9, 0.0), Option(16, 0.0), Option(32, 0.0)]] * 2, 64) == [0, 0]


def test_a_budget_below_the_cheapest_options_is_refused():
    groups = [[Option(9, 1.0), Option(16, 0.0)]] * 3
    assert choose(groups, 27) == [0, 0, 0]
    with pytest.raises(ValueError, match="less than what the cheapest"):
        choose(groups, 26)


def test_hundreds_of_groups_of_a_real_network_are_solved_within_the_budget_and_its_bound():
    """Groups of Super's sizes: the best mixture is no worse than half a group from the relaxation's bound."""
    generator = random.Random(1)
    sizes = 4096 * 4096, 4096 * 18560, 2 * 512 * 1024 * 2688, 4096 * 1024, 4096 * 5376
    groups = []
    for _ in range(300):
        size, loss = generator.choice(sizes) + generator.choice([0, 17]), generator.lognormvariate(0, 1.5)
        better = 0.1 * generator.random() * loss
        groups.append([Option(9 * size, loss), Option(16 * size, better), Option(32 * size, 0.0)])
    everything = sum(options[2].cost for options in groups)
    for share in (0.29, 0.4, 0.6):
        loss, cost = totals(
            tuple(
                options[index] for options, index in zip(groups, choose(groups, int(everything * share)), strict=True)
            )
        )
        assert cost <= everything * share
        assert cost > everything * share * 0.98
        assert loss < sum(options[0].loss for options in groups)
