"""How a module is laid over devices: FSDP2 over one mesh axis, from one CPU process up, and folder checkpoints.

One class for the laptop and the cluster: FSDP2 on a single process costs under 2%, and no format or code path changes
when devices are added. It differs from Lightning's ModelParallelStrategy in three things:

* gradients are summed over ranks, never averaged: losses are divided by the global number of targets already;
* one process needs no network port, and several share one that the first of them already holds;
* checkpoints are folders that are complete or absent, hold tensors only (nothing that unpickles to code), leave the
  optimiser's settings to the YAML file, and are compared with the model before a single tensor is read.
"""

import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from callbacks.stop_request import STARTED_BY
from modules.backbone.model import ShardingUnit
from modules.checkpoints import folder
from modules.checkpoints.training_source import SafeReader
from modules.errors import UserError, writing
from modules.precision.linear import Head

OTHER_STATE = "meta.pt"
AXES = ("replicate", "shard", "expert", "context")
"""Axes of the mesh, the ranks of the last next to each other."""
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
TIMEOUT = timedelta(minutes=30)
MODEL = "model."
OPTIMIZER = "optimizer."


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices of a mesh with the axes `AXES`, of which all but `shard` have size 1.

    Args:
        gradient_sync: When gradients are summed over devices: with the `last` micro-batch of a step, which costs least
            time and holds the whole network's gradients on each device until then; or with `every` one.
    """

    def __init__(self, gradient_sync: str = "last") -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, timeout=TIMEOUT)
        self.gradient_sync = gradient_sync
        self._store: dist.TCPStore | None = None

    # -- processes ----------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        if self.gradient_sync not in ("last", "every"):  # not when made: the parser would answer for us
            raise UserError(f"trainer.strategy: gradient_sync {self.gradient_sync!r} must be last or every")
        environment = self.cluster_environment
        if isinstance(environment, LightningEnvironment) and self.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes: {self.num_nodes} machines need torchrun or srun to start the command on each"
            )
        super()._configure_launcher()
        if self._launcher is None or self.num_processes == 1 or not isinstance(environment, LightningEnvironment):
            return
        # Hold the port from now on. Lightning looks for a free one, lets it go and takes it again seconds later, when
        # the other processes have started; another run may have it by then.
        self._store = _tcp_store("127.0.0.1", 0, is_master=True)
        environment._main_port = self._store.port
        os.environ["MASTER_PORT"] = str(self._store.port)
        os.environ[STARTED_BY] = str(os.getpid())

    def setup_environment(self) -> None:
        """Start the process group and make the mesh."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        reset_seed()
        if not dist.is_initialized():
            self._start_process_group()
        self.lightning_module._device_mesh = self.make_mesh(self.root_device.type)

    def make_mesh(self, device_type: str) -> DeviceMesh:
        """Lay the mesh over all ranks of the process group, make it the strategy's own and return it."""
        sizes = tuple(dist.get_world_size() if axis == "shard" else 1 for axis in AXES)
        self._device_mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
        return self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """This rank's place among those that read different rows; the ranks of a `context` share theirs."""
        context = self.device_mesh["context"].size()
        return {"num_replicas": self.world_size // context, "rank": self.global_rank // context}

    def _start_process_group(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        backend = self._get_process_group_backend()
        device = None if self.root_device.type == "cpu" else self.root_device
        if self.world_size == 1:
            store = dist.HashStore()
        elif isinstance(environment, LightningEnvironment):
            store = self._store or _tcp_store(environment.main_address, environment.main_port, is_master=False)
        else:
            os.environ["MASTER_ADDR"] = environment.main_address
            os.environ["MASTER_PORT"] = str(environment.main_port)
            store = None
        dist.init_process_group(
            backend, store=store, rank=self.global_rank, world_size=self.world_size, timeout=TIMEOUT, device_id=device
        )

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that this one started."""
        super().on_exception(exception)
        self.end_processes()

    def end_processes(self) -> None:
        """End the processes that this one started: they would wait for it, and then complain about its absence."""
        for process in getattr(self._launcher, "procs", []):
            process.kill()

    def teardown(self) -> None:
        """Leave the process group."""
        super().teardown()
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- layout -------------------------------------------------------------------------------------------------------

    def shard(self, network: nn.Module) -> None:
        """Lay a network over the devices, in place; called by `configure_model` before weights exist.

        Args:
            network: offers `sharding_units()`; parameters may be on the meta device.
        """
        units: list[ShardingUnit] = network.sharding_units()  # type: ignore[operator]
        assert units[-1].modules == [network], "the network itself is the last sharding unit"
        for unit in units:
            (axis,) = (axis for axis in unit.axes if axis == "shard" or self.device_mesh[axis].size() > 1)
            gathered = None if unit.dtype == torch.float32 else unit.dtype
            policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
            modules = unit.modules[0] if len(unit.modules) == 1 else unit.modules
            fully_shard(modules, mesh=self.device_mesh[axis], mp_policy=policy)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
            if isinstance(module, Head):
                register_fsdp_forward_method(module, "token_log_probabilities")

    @contextmanager
    def lend(self, head: Head) -> Iterator[Callable[[Tensor], Tensor]]:
        """Gather the head of a network, a frozen teacher's for one, for calls inside the chunks of another head.

        Args:
            head: its network may be sharded, or not, and may have run or not; all ranks call this.

        Yields:
            A function from hidden states [..., D] to fp32 logits [..., V], without a gradient for the head. It does
            not gather and free the weight at each call, as the head itself would.
        """
        if not isinstance(head, FSDPModule):
            yield head.logits
            return
        head.unshard()
        try:
            yield head.logits
        finally:
            head.reshard()

    def sync_gradients(self, network: nn.Module, sync: bool) -> None:
        """Say whether backward passes from now on sum gradients over ranks, or keep them for the one that does."""
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(sync or self.gradient_sync == "every", recurse=False)

    def all_reduce(self, tensor: Tensor, op: str = "sum", axes: Sequence[str] = AXES) -> Tensor:
        """Return the sum ("sum") or maximum ("max") over the ranks along mesh axes."""
        for axis in axes:
            if self.device_mesh[axis].size() > 1:
                tensor = tensor.clone()
                dist.all_reduce(tensor, _REDUCTIONS[op], self.device_mesh.get_group(axis))
        return tensor

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the parameters and buffers, sharded as they are."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimiser's tensors as `{parameter name}.{state name}`; its settings come from the YAML file."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        assert self.lightning_module is not None
        return {
            f"{name}.{key}": value
            for name, parameter in self.lightning_module.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | os.PathLike,
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint folder; all ranks call this.

        Args:
            checkpoint: Lightning's checkpoint dictionary, optionally with `folder.ABOUT` and `folder.ATTACHMENTS`.
            filepath: the folder; it appears under this name when it is complete.
            storage_options: must be None.

        Raises:
            OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        assert storage_options is None
        target = Path(self.broadcast(str(filepath)))
        about, attachments = checkpoint.pop(folder.ABOUT, {}), checkpoint.pop(folder.ATTACHMENTS, [])
        tensors = {MODEL + name: value for name, value in checkpoint.pop("state_dict").items()}
        for state in checkpoint.pop("optimizer_states", []):
            tensors |= {OPTIMIZER + name: value for name, value in state.items()}
        if self.is_global_zero:
            folder.begin(target)
        self.barrier()
        partial = folder.partial_of(target)
        try:
            _run_collectively(lambda: dcp.save(tensors, storage_writer=_Writer(partial)))
            if self.is_global_zero:
                content = io.BytesIO()  # torch's own file writer hides why it could not write
                torch.save(checkpoint, content)
                (partial / OTHER_STATE).write_bytes(content.getbuffer())
                for path in attachments:
                    copy = shutil.copytree if Path(path).is_dir() else shutil.copyfile
                    copy(path, partial / Path(path).name)
                folder.publish(target, about)
        except OSError as error:
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        self.barrier()

    def remove_checkpoint(self, filepath: str | os.PathLike) -> None:
        """Remove a checkpoint folder (first its name, then its files)."""
        if self.is_global_zero:
            folder.remove(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and, in `fit`, the optimiser's state in place; any number of ranks may read any checkpoint.

        Args:
            checkpoint_path: folder that `save_checkpoint` wrote.
            weights_only: ignored; nothing but tensors and plain values is ever loaded.

        Returns:
            The other state: loops, callbacks, loaders.

        Raises:
            UserError: the folder is damaged, or was written for a model with other tensors.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        reader = SafeReader(path)
        metadata = reader.read_metadata()
        assert self.lightning_module is not None
        model = self.lightning_module.state_dict()
        _check_same_tensors(path, metadata, model)
        tensors = {MODEL + name: value for name, value in model.items()}
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if fitting:
            tensors |= self._empty_optimizer_state(metadata)
        _run_collectively(lambda: dcp.load(tensors, storage_reader=reader))
        if fitting:
            self._set_optimizer_state(tensors)
        state = torch.load(path / OTHER_STATE, weights_only=True, map_location="cpu")
        return _count_in_windows(state)

    def _empty_optimizer_state(self, metadata: Metadata) -> dict[str, Tensor]:
        """Return uninitialised tensors for the optimiser state of the checkpoint, laid out like the parameters."""
        parameters = dict(self.lightning_module.named_parameters())  # type: ignore[union-attr]
        state = {}
        for key, entry in metadata.state_dict_metadata.items():
            if not key.startswith(OPTIMIZER):
                continue
            name, _, _ = key.removeprefix(OPTIMIZER).rpartition(".")
            assert isinstance(entry, TensorStorageMetadata)
            parameter, dtype = parameters[name], entry.properties.dtype
            if entry.size == parameter.shape and parameter.ndim > 0:
                state[key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            else:
                state[key] = torch.empty(entry.size, dtype=dtype, device=self.root_device)
        return state

    def _set_optimizer_state(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.lightning_module.named_parameters())  # type: ignore[union-attr]
        for key, value in tensors.items():
            if key.startswith(OPTIMIZER):
                name, _, state_name = key.removeprefix(OPTIMIZER).rpartition(".")
                (optimizer,) = self.optimizers
                optimizer.state[parameters[name]][state_name] = value


class _Writer(dcp.FileSystemWriter):
    """Writes tensors; torch hides a full disk behind the error that its own file format makes of it."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        """Write this rank's part.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        with writing(os.fspath(self.path)):
            return super().write_data(plan, planner)


def _count_in_windows(state: dict[str, Any]) -> dict[str, Any]:
    """Change the other state of a checkpoint whose loop counted micro-batches, as those up to 4f1aead, to windows."""
    fit = state["loops"]["fit_loop"]
    if loaders := fit["state_dict"].pop("combined_loader", None):
        steps = loaders[0]["steps"]
        done = dict.fromkeys(("ready", "started", "processed", "completed"), steps)
        fit["epoch_loop.batch_progress"] |= {"current": done, "total": dict(done)}
        stepped = {"ready": steps, "completed": steps}
        fit["epoch_loop.manual_optimization.optim_step_progress"] = {"current": stepped, "total": dict(stepped)}
        for value in state.values():
            if isinstance(value, dict) and "tokens_per_step" in value:
                value["steps"] = steps
    return state


def _tcp_store(address: str, port: int, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=is_master, wait_for_workers=False, timeout=TIMEOUT)


def _run_collectively(function: Any) -> None:
    """Call a function of torch's distributed checkpoints; raise the failure of a rank as it is, not wrapped."""
    try:
        function()
    except dcp.CheckpointException as exception:
        failures = [failure for failure, _ in exception.failures.values()]
        for kind in (OSError, ValueError):
            for failure in failures:
                if isinstance(failure, kind):
                    raise failure from None
        raise


def _check_same_tensors(path: Path, metadata: Metadata, model: dict[str, Tensor]) -> None:
    """Raise a ValueError that names the difference if a checkpoint is not of this model."""
    stored = {
        key.removeprefix(MODEL): tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in model.items()}
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    misshaped = sorted(name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name])
    differences = []
    if misshaped:
        name = misshaped[0]
        differences.append(
            f"{len(misshaped)} of another shape ({name}: {list(stored[name])} there, {list(wanted[name])} here)"
        )
    if missing:
        differences.append(f"{len(missing)} missing there ({missing[0]})")
    if unexpected:
        differences.append(f"{len(unexpected)} unknown here ({unexpected[0]})")
    if differences:
        raise UserError(
            f"{path} is a checkpoint of another architecture; tensors: {', '.join(differences)}. "
            f"Give the run another --name, or delete {path.parent.parent} to start it anew"
        )


StrategyRegistry.register("sharded", ShardedStrategy, description="FSDP2 over all devices; one process too")
