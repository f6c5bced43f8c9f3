"""The layout of the page that TensorBoard opens on; tests/app/test_real_run.py looks for its curves."""

import re

from callbacks.dashboard import LAYOUT, custom_scalars


def test_patterns_fit_whole_names():
    """TensorBoard matches from the beginning only."""
    (pattern, *_) = custom_scalars()["Is the run healthy?"]["Gradient norm"][1]
    assert re.match(pattern, "training/gradient_norm")
    assert not re.match(pattern, "training/gradient_norm_of_something")


def test_no_chart_has_the_title_of_another():
    titles = [title for charts in LAYOUT.values() for title in charts]
    assert len(titles) == len(set(titles))


def test_a_band_is_drawn_between_the_constant_curves():
    """TensorBoard takes whole names there, in the order value, lower, upper."""
    assert custom_scalars()["Is the run healthy?"]["MFU, share of the peak"] == [
        "Margin",
        ["speed/mfu", "scale/0", "scale/1"],
    ]
