"""Options that are refused, the order of a step, and texts for TensorBoard."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

from callbacks.checkpoint import Checkpoint, RandomState
from callbacks.console import Console, Startup, Summary
from callbacks.dashboard import Dashboard
from callbacks.mock_step import MockStep
from callbacks.preemption import Preemption
from callbacks.samples import Samples, markdown
from callbacks.speed import Speed
from callbacks.step import in_order, is_due
from callbacks.validation import Validation
from modules.errors import UserError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Validation(every_n_steps=0), r"validation\.every_n_steps is 0"),
        (lambda: Checkpoint(every_n_steps=-1), r"checkpoint\.every_n_steps is -1"),
        (lambda: Checkpoint(keep_last=0), r"checkpoint\.keep_last is 0"),
        (lambda: Samples(prompts=0), r"samples\.prompts is 0"),
        (lambda: Samples(prompt_tokens=0), r"samples\.prompt_tokens is 0"),
        (lambda: Samples(prompt_tokens=257), r"samples\.prompt_tokens is 257"),
        (lambda: Samples(max_new_tokens=-1), r"samples\.max_new_tokens is -1"),
        (lambda: Samples(temperature=-0.1), r"samples\.temperature is -0\.1"),
        (lambda: Samples(draft_tokens=-1), r"samples\.draft_tokens is -1"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(("step", "last", "due"), [(4, 10, True), (5, 10, False), (8, 10, True), (10, 10, True)])
def test_something_is_due_at_its_interval_and_at_the_end(step, last, due):
    loop = SimpleNamespace(is_last_step=step == last)
    trainer = SimpleNamespace(global_step=step, fit_loop=SimpleNamespace(epoch_loop=loop))
    assert is_due(4, trainer) is due


def test_the_program_calls_the_callbacks_of_a_step_in_this_order():
    """Memory is tried first, then the clock stops; a validation is in the checkpoint; a run is left after a save."""
    speed, checkpoint, own = Speed(1), Checkpoint(), Callback()
    given = [
        Summary("tensorboard"),
        Preemption(checkpoint),
        checkpoint,
        Dashboard(1),
        own,
        Samples(),
        Validation(),
        Console(),
    ]
    given += [MockStep(), Startup(speed), speed, RandomState()]
    names = [type(callback).__name__ for callback in in_order(given)]
    first, last = ["RandomState", "Speed", "Startup", "MockStep"], ["Dashboard", "Checkpoint", "Preemption", "Summary"]
    assert names == [*first, "Samples", "Validation", "Console", "Callback", *last]


def test_sample_text_keeps_its_lines_and_marks_the_continuation():
    text = markdown("def f(", "x):\n    return x")
    assert text.endswith("    def f(\u27e6x):\n        return x\u27e7")
