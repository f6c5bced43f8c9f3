"""The mock step costs memory as a real one does, and leaves nothing behind."""

import copy
import random

import numpy
import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoint import random_state
from callbacks.mock_step import MockStep, is_out_of_memory
from modules.base import MicroBatchLoss
from modules.batch import PackedBatch
from modules.errors import UserError
from modules.optim.spikes import SpikeGuardConfig
from modules.pretraining import Pretraining
from tests.modules.helpers import Collector, ListData, counts_of, fit, make_module, network_state, row_batches


class Sized(ListData):
    """Data that say how large a micro-batch is."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.micro_batch_size = 3


class Seen(Pretraining):
    """Keeps the batches of the steps, and draws random numbers in each; `error` is raised in the first."""

    error: BaseException | None = None

    def micro_batch_loss(self, batch: PackedBatch, totals) -> MicroBatchLoss:
        self.seen = [*getattr(self, "seen", []), batch]
        self.moments = [*getattr(self, "moments", []), len(self.trainer.optimizers[0].state)]
        gradients = [parameter.grad is not None for parameter in self.built_network.parameters()]
        self.gradients = [*getattr(self, "gradients", []), all(gradients) and len(gradients) > 0]
        self.metrics.record("training/passes", 1.0, "sum")
        self.metrics.record("training/own", 1.0)
        for draw in (random.random, numpy.random.rand, lambda: torch.rand(1)):
            draw()
        if self.error is not None:
            raise self.error
        return super().micro_batch_loss(batch, totals)


class Before(Callback):
    """What is there when training starts, after the mock step."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.random = copy.deepcopy(random_state())
        self.network = network_state(pl_module)
        self.optimizer = dict(trainer.optimizers[0].state)
        self.gradients = [parameter.grad for parameter in pl_module.parameters()]
        self.metrics = dict(pl_module.metrics)
        self.guard = pl_module.step_guard.saved_state()


def train(enabled: bool, window: int = 1):
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    module = make_module(cls=Seen, spike_guard=SpikeGuardConfig(window=4, minimum_steps=2))
    before, collector = Before(), Collector()
    fit(module, Sized(row_batches(6), window=window), callbacks=[MockStep(enabled), before, collector])
    return module, before, collector


def moments(module: Seen) -> dict[str, torch.Tensor]:
    state = module.trainer.optimizers[0].state
    return {
        f"{name}/{key}": value
        for name, parameter in module.built_network.named_parameters()
        for key, value in state[parameter].items()
    }


@pytest.mark.parametrize("window", [1, 2])
def test_a_run_after_a_mock_step_is_the_run_without(window: int) -> None:
    (ours, before, steps), (plain, untouched, expected) = train(True, window), train(False, window)
    assert len(ours.seen) == len(plain.seen) + window, "there was a mock step"
    assert str(before.random) == str(untouched.random)
    assert before.optimizer == {}
    assert before.gradients == [None] * len(before.gradients)
    assert before.metrics == {}
    for name, tensor in untouched.network.items():
        assert torch.equal(before.network[name], tensor), name
    assert all(not value.nansum().any() for value in before.guard.values())
    assert steps.steps == expected.steps
    assert steps.steps[0]["training/passes"] == window
    for name, tensor in network_state(plain).items():
        assert torch.equal(network_state(ours)[name], tensor), name
    first, second = moments(ours), moments(plain)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert str(random_state()) != str(before.random), "the steps themselves drew numbers"


def test_the_step_finds_what_a_later_step_finds() -> None:
    """The moments are there, and in a window of several micro-batches the gradients of the one before."""
    for window in (1, 2, 3):
        module, _, _ = train(True, window)
        mock = min(window, 2)
        assert module.moments[0] == module.moments[-1] > 0
        assert module.moments[mock] == 0, "the first real step makes its own"
        assert module.gradients[:mock] == [False, True][:mock]
        assert module.gradients[mock] is False


def test_the_batch_is_the_largest_there_can_be() -> None:
    module, _, _ = train(True)
    batch = module.seen[0]
    assert batch.tokens.shape == batch.labels.shape == batch.document_ids.shape == (3, 16)
    assert not batch.document_ids.any()
    assert (batch.labels >= 0).all()
    assert batch.tokens.max() < 64
    assert counts_of(batch, 2).tolist() == [48, 45, 42]
    dtypes = [tensor.dtype for tensor in batch.tensors().values()]
    assert dtypes == [tensor.dtype for tensor in row_batches(1)[0].tensors().values()]
    again = module.mock_batch(3, 16)
    assert torch.equal(batch.tokens, again.tokens)


def test_the_line_says_size_time_and_memory(capsys) -> None:
    train(True)
    assert "mock step   3 rows of 16 random tokens: " in capsys.readouterr().out
    train(False)
    assert "mock step" not in capsys.readouterr().out


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ...")


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize(
    ("rows", "checkpointed", "mend"),
    [
        (3, False, r"lower data\.init_args\.micro_batch_size \(now 3; .*activation_checkpointing: true"),
        (3, True, r"lower data\.init_args\.micro_batch_size \(now 3; the result stays the same\)$"),
        (1, False, r"on 1 x cpu; set model\.init_args\.activation_checkpointing: true$"),
        (1, True, r"on 1 x cpu; take more devices or a smaller model\.init_args\.backbone"),
    ],
)
def test_a_lack_of_memory_is_one_line_with_the_mend(error, rows: int, checkpointed: bool, mend: str) -> None:
    module = make_module(cls=Seen, activation_checkpointing=checkpointed)
    module.error = error
    data = Sized(row_batches(2))
    data.micro_batch_size = rows
    with pytest.raises(UserError, match=rf"^out of memory: a step with {rows} rows of 16 tokens[^\n]*{mend}"):
        fit(module, data, callbacks=[MockStep()])


def test_other_errors_are_left_alone() -> None:
    module = make_module(cls=Seen)
    module.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        fit(module, Sized(row_batches(2)), callbacks=[MockStep()])


def test_what_the_allocator_of_this_cpu_says_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
