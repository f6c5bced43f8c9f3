"""Gradient norm and clipping over parameters on any mix of device meshes, without asking the host."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from modules.backbone.initialization import local_part


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients in place so that their total 2-norm is at most `max_norm`.

    Args:
        parameters: parameters, with or without gradient, plain or DTensor.
        max_norm: the bound; None: only measure.

    Returns:
        The norm before clipping, fp32 scalar, equal on all ranks (NaN or inf where a gradient is not finite: the
        gradients are left as they are then; skip the step).
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    layouts: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        layouts.setdefault(layout, []).append(gradient)
    squares = [_square_norm(group) for group in layouts.values()]
    norm = torch.stack(squares).sum().sqrt()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = torch.where(norm.isfinite(), factor, 1.0)  # an infinite norm would make zeros of what is finite
        torch._foreach_mul_([local_part(gradient) for gradient in gradients], factor)
    return norm


def _square_norm(gradients: list[Tensor]) -> Tensor:
    """Return the squared norm of gradients of one layout, summed over the mesh axes that shard them."""
    square = torch.stack(torch._foreach_norm([local_part(gradient) for gradient in gradients])).square().sum()
    first = gradients[0]
    if isinstance(first, DTensor):
        for axis, placement in enumerate(first.placements):
            if isinstance(placement, Shard) and first.device_mesh.size(axis) > 1:
                dist.all_reduce(square, group=first.device_mesh.get_group(axis))
    return square
