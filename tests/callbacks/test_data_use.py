"""Mixture and packing use of a run."""

from types import SimpleNamespace

import pytest

from callbacks.data_use import DataUse
from tests.callbacks.helpers import run
from tests.modules.helpers import ListData, make_module, row_batches


class MixedData(ListData):
    """Two sources, of which one was read too often."""

    def asked(self, step: int) -> dict[str, float]:
        return {"a": 0.75, "b": 0.25}

    def consumed(self, step: int) -> dict[str, SimpleNamespace]:
        return {"a": SimpleNamespace(rows=2 * step, epochs=step / 8), "b": SimpleNamespace(rows=3 * step, epochs=9.0)}


def test_shares_epochs_and_packing_use():
    batches = row_batches(6)
    for number, batch in enumerate(batches):
        batch.document_ids[0, 16 - number :] = 16  # that many positions of padding
    points = run(make_module(), MixedData(batches, window=2), DataUse(2))
    found = {name: value for name, value in points[2].items() if name.startswith("data/")}
    assert found == pytest.approx(
        {
            "data/share_asked/a": 0.75,
            "data/share_asked/b": 0.25,
            "data/share_read/a": 0.4,
            "data/share_read/b": 0.6,
            "data/mixture_error": 0.35,
            "data/epochs/a": 0.25,
            "data/epochs/b": 9.0,
            "data/packing_use": 1 - (0 + 1 + 2 + 3) / 64,
        }
    )
    assert points[3]["data/packing_use"] == pytest.approx(1 - (4 + 5) / 32)
    assert not any(name.startswith("data/") for name in points[1])
