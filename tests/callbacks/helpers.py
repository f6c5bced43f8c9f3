"""Training a tiny module under our loop, with a logger that keeps every value."""

from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger

from app.loop import use_step_loop
from callbacks.dashboard import Dashboard
from callbacks.step import in_order
from modules.pretraining import Pretraining
from tests.modules.helpers import ListData, make_trainer


class Values(DummyLogger):
    """Keeps {step: {name: value}}."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None, **_) -> None:
        self.points.setdefault(step, {}).update(metrics)


def run(module: Pretraining, data: ListData, *callbacks: Callback, **changes) -> dict[int, dict[str, float]]:
    """Train over all micro-batches of `data`; return what was logged at each step."""
    values = Values()
    unused = {} if data.validation else {"limit_val_batches": 0}
    callbacks = in_order([*callbacks, Dashboard(10**9)])
    trainer = make_trainer(**{"logger": values, "callbacks": callbacks, **unused, **changes})
    use_step_loop(trainer)
    trainer.fit(module, data)
    return values.points
