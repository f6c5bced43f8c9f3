"""Runs `modules.ops.ssd` with mamba-ssm's Triton kernel in Triton's interpreter: the kernel's own code, on a CPU.

A program of its own, because Triton reads its environment (`TRITON_INTERPRET=1`) when it is imported, and because what
is put in place of CUDA here must not reach other tests. Reads a list of cases {inputs, ids, chunk_size, probe} from the
file that it is given and writes, in their place, lists [y, gradients of the inputs].
"""

import contextlib
import sys
import types
import warnings

import torch
from torch import Tensor

from modules.ops import ssd
from modules.ops.documents import DocumentLayout


def stand_in_for_cuda() -> None:
    """Give mamba-ssm and Triton what they ask of CUDA when they are imported and called."""
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")  # of Mamba-1
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1)


def views_of_one_tensor(*tensors: Tensor) -> list[Tensor]:
    """Return tensors [B, T, n, m] as the mixer has them: slices of one projection, not contiguous."""
    flat = torch.cat([tensor.flatten(2) for tensor in tensors], dim=-1)
    parts = flat.split([tensor[0, 0].numel() for tensor in tensors], dim=-1)
    return [part.unflatten(2, tensor.shape[2:]) for part, tensor in zip(parts, tensors, strict=True)]


def run(inputs: dict[str, Tensor], ids: Tensor | None, chunk_size: int, probe: Tensor) -> list[Tensor]:
    """Return y and the gradients of sum(y x probe)."""
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    x, dt, B, C = views_of_one_tensor(*(leaves[name] for name in ("x", "dt", "B", "C")))
    assert not x.is_contiguous()
    documents = None if ids is None else DocumentLayout(ids)
    y = ssd.ssd(**{**leaves, "x": x, "dt": dt, "B": B, "C": C}, documents=documents, chunk_size=chunk_size)
    return [y.detach(), *torch.autograd.grad((y * probe).sum(), list(leaves.values()))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    stand_in_for_cuda()
    warnings.filterwarnings("ignore", message="Deterministic mode")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    ssd.ssd_kernel = lambda x: mamba_chunk_scan_combined
    (path,) = sys.argv[1:]
    torch.save([run(**case) for case in torch.load(path)], path)
