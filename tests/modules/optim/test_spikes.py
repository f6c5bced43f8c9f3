"""The guard decides as a plain reading of its rule does, forgets nothing over a resume, never waits for the device."""

import math
import random
import statistics

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modules.errors import UserError
from modules.optim.spikes import LEAST_SIGMA, REASONS, SpikeGuardConfig, StepGuard

CONFIG = SpikeGuardConfig(sigmas=4.0, window=16, minimum_steps=8)


def run(guard: StepGuard, steps: list[tuple[float, float]]) -> list[str]:
    """Judge steps of (loss, gradient norm); return the reasons."""
    reasons = []
    for loss, norm in steps:
        skip = guard.judge(torch.tensor(loss), torch.tensor(norm))
        reasons.append(REASONS[int(guard.reason)])
        assert bool(skip) == (reasons[-1] != "none")
    return reasons


def oracle(steps: list[tuple[float, float]], config: SpikeGuardConfig = CONFIG) -> list[str]:
    """The same in plain Python, over lists."""
    window: list[tuple[float, float]] = []
    reasons = []
    for step in steps:
        reason = "none"
        if not all(map(math.isfinite, step)):
            reason = "not_finite"
        elif len(window) >= config.minimum_steps:
            for name, value, past in zip(REASONS[2:], step, zip(*window, strict=True), strict=True):
                mean = statistics.fmean(past)
                sigma = max(statistics.stdev(past), LEAST_SIGMA * abs(mean))
                if reason == "none" and value - mean > config.sigmas * sigma:
                    reason = name
        if reason == "none":
            window = [*window, step][-config.window :]
        reasons.append(reason)
    return reasons


def series(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """A falling, noisy loss and norm with leaps up and down, and steps that are not finite."""
    chance = random.Random(seed)
    steps = []
    for step in range(count):
        loss, norm = 2 + 5 / (1 + step / 10) + chance.gauss(0, 0.05), abs(chance.gauss(1, 0.2))
        kind = chance.random()
        loss += (kind < 0.05) * 8 - (0.05 < kind < 0.08) * 3
        norm *= 1 + (0.08 < kind < 0.13) * 20
        if 0.13 < kind < 0.16:
            loss = chance.choice([math.nan, math.inf, -math.inf])
        if 0.16 < kind < 0.18:
            norm = chance.choice([math.nan, math.inf])
        steps.append(tuple(torch.tensor([loss, norm]).tolist()))  # what fp32 holds
    return steps


@pytest.mark.parametrize("seed", range(3))
def test_decides_as_the_plain_rule_does(seed: int) -> None:
    steps = series(200, seed)
    expected = oracle(steps)
    assert set(expected) == set(REASONS), "the series tries every reason"
    guard = StepGuard(CONFIG)
    assert run(guard, steps) == expected
    assert guard.spikes.tolist() == [expected.count("loss_spike"), expected.count("gradient_spike")]


def test_only_leaps_upwards_are_spikes() -> None:
    steps = [(3.0 + 0.1 * (step % 2), 1.0 + 0.1 * (step % 2)) for step in range(8)]
    assert run(StepGuard(CONFIG), [*steps, (0.1, 0.01)]) == ["none"] * 9
    assert run(StepGuard(CONFIG), [*steps, (9.0, 0.01)])[-1] == "loss_spike"
    assert run(StepGuard(CONFIG), [*steps, (0.1, 9.0)])[-1] == "gradient_spike"


def test_nothing_is_a_spike_before_the_window_holds_enough_steps() -> None:
    calm, leap = [(3.0, 1.0), (3.1, 1.1)] * 4, (99.0, 99.0)
    assert run(StepGuard(CONFIG), [*calm[:7], leap])[-1] == "none"
    assert run(StepGuard(CONFIG), [*calm[:8], leap])[-1] == "loss_spike"
    assert run(StepGuard(CONFIG), [*calm[:7], (math.nan, 1.0), leap])[-1] == "none", "a skipped step does not count"


def test_skipped_steps_do_not_raise_the_bar() -> None:
    guard = StepGuard(CONFIG)
    run(guard, [(3.0, 1.0), (3.1, 1.1)] * 8)
    window = guard.history.clone()
    assert run(guard, [(9.0, 1.0)] * 40) == ["loss_spike"] * 40
    assert torch.equal(guard.history, window)
    assert guard.streak_spikes.tolist() == [40, 0]
    assert run(guard, [(3.0, 1.0)]) == ["none"]
    assert guard.streak_spikes.tolist() == [0, 0]


def test_a_constant_loss_makes_no_spikes_of_its_rounding() -> None:
    steps = [(2.0 + 1e-6 * (step % 3 == 2), 0.5) for step in range(60)]
    assert set(run(StepGuard(CONFIG), steps)) == {"none"}
    assert run(StepGuard(CONFIG), [(2.0, 0.5)] * 20 + [(2.1, 0.5)])[-1] == "loss_spike"
    assert set(run(StepGuard(CONFIG), [(0.0, 0.0)] * 20)) == {"none"}, "nothing to learn is no spike"


def test_large_and_nearly_equal_values_are_judged_in_fp64() -> None:
    """In fp32 the variance of these is rounding noise; the leap is 30 sigma."""
    steps = [(1e4 + 16 * (step % 2), 1.0) for step in range(16)]
    guard = StepGuard(CONFIG)
    run(guard, [*steps, (1e4 + 300, 1.0)])
    past = [loss for loss, _ in steps]
    sigma = max(statistics.stdev(past), LEAST_SIGMA * statistics.fmean(past))
    assert guard.scores[0].item() == pytest.approx((1e4 + 300 - statistics.fmean(past)) / sigma, rel=1e-12)


def test_switched_off_only_what_is_not_finite_is_skipped() -> None:
    guard = StepGuard(None)
    steps = series(100)
    expected = ["not_finite" if reason == "not_finite" else "none" for reason in oracle(steps)]
    assert run(guard, steps) == expected
    assert guard.metrics(torch.tensor(3)) == {}


@pytest.mark.parametrize("cut", [0, 5, 40, 41, 90])
def test_a_restored_guard_decides_as_one_that_never_stopped(cut: int) -> None:
    steps = series(120, seed=4)
    whole, first, second = (StepGuard(CONFIG) for _ in range(3))
    expected = run(whole, steps)
    head = run(first, steps[:cut])
    second.restore(first.saved_state())
    assert head + run(second, steps[cut:]) == expected
    for name, value in whole.saved_state().items():
        assert torch.equal(value, second.saved_state()[name]), name


@pytest.mark.parametrize("window", [8, 16, 40])
def test_another_window_keeps_the_newest_steps(window: int) -> None:
    old = StepGuard(CONFIG)
    run(old, [(float(step), 1.0) for step in range(20)][::-1])
    new = StepGuard(SpikeGuardConfig(window=window, minimum_steps=8))
    new.restore(old.saved_state())
    kept = min(window, 16)
    assert new.history[0, window - kept :].tolist() == [float(step) for step in range(kept)][::-1]
    assert new.history[:, : window - kept].isnan().all()


def test_a_guard_switched_off_and_on_again_keeps_its_counts() -> None:
    on, off, again = StepGuard(CONFIG), StepGuard(None), StepGuard(CONFIG)
    run(on, [(3.0, 1.0), (3.1, 1.1)] * 8 + [(9.0, 1.0)])
    off.restore(on.saved_state())
    again.restore(off.saved_state())
    assert again.spikes.tolist() == [1, 0]
    assert again.history.isnan().all()


def test_the_state_is_no_part_of_the_architecture() -> None:
    assert StepGuard(CONFIG).state_dict() == {}


def test_the_counts_by_reason_add_up() -> None:
    guard = StepGuard(CONFIG)
    steps = series(200)
    skipped = sum(reason != "none" for reason in run(guard, steps))
    counts = {name: value.item() for name, value in guard.metrics(torch.tensor(skipped)).items() if "skipped" in name}
    expected = oracle(steps)
    assert counts == {
        "training/skipped_not_finite": expected.count("not_finite"),
        "training/skipped_loss_spikes": expected.count("loss_spike"),
        "training/skipped_gradient_spikes": expected.count("gradient_spike"),
    }


class NoWaiting(TorchDispatchMode):
    """Fails at what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(text in name for text in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")), name
        return func(*args, **(kwargs or {}))


def test_judging_does_not_wait_for_the_device() -> None:
    guard = StepGuard(CONFIG)
    with NoWaiting():
        for _ in range(20):
            guard.judge(torch.tensor(2.0), torch.tensor(1.0))
            guard.metrics(torch.tensor(0))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        bool(torch.tensor(True))


def test_why_a_streak_ended_a_run() -> None:
    guard = StepGuard(CONFIG)
    run(guard, [(math.nan, 1.0)] * 3)
    assert guard.streak_message(12, 3, 2) == (
        "loss or gradient not finite in steps 10 to 12 (model.max_skipped_steps 2); lower model.optimizer."
        "learning_rate or look at the data of these steps"
    )
    guard = StepGuard(CONFIG)
    run(guard, [(3.0, 1.0), (3.1, 1.1)] * 8 + [(9.0, 1.0)] * 2 + [(3.0, 9.0)] + [(math.nan, 1.0)])
    message = guard.streak_message(20, 4, 4)
    assert "in steps 17 to 20 (model.max_skipped_steps 4)" in message
    assert "2 loss spikes and 1 gradient spikes above 4 sigma, 1 not finite" in message
    assert "raise model.spike_guard.sigmas or set model.spike_guard to null" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"sigmas": 0}, "sigmas"),
        ({"sigmas": math.inf}, "sigmas"),
        ({"sigmas": math.nan}, "sigmas"),
        ({"window": 1}, "window"),
        ({"window": 32}, "minimum_steps"),
        ({"minimum_steps": 1}, "minimum_steps"),
    ],
)
def test_settings_out_of_range_are_one_line_naming_the_key(fields: dict, key: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.spike_guard\.{key}: [^\n]*$"):
        SpikeGuardConfig(**fields)
