"""How a module multiplies: plainly, or in quantised formats as it is trained in them.

The third way, by the quantised weight of a checkpoint, stands in `quantized_product.py`.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ops import native
from modules.ops.experts import grouped_linear
from modules.precision.formats import QUANTIZED, Format


class Product(Protocol):
    """Multiplies inputs by the weight of a module; the module casts them to its compute dtype, which results have."""

    @property
    def operands(self) -> native.Operands | None:
        """What the C code does for it on a CPU; None: it is not for this product."""
        ...

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map [..., I] by [O, I], in the dtype that the module holds it in, to [..., O]."""
        ...

    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """Map rows [R, I] sorted by expert, with end rows `offsets` int32 [E], by [E, O, I] to [R, O]."""
        ...


class PlainProduct:
    """Multiplies by the weight in the dtype of the inputs."""

    operands = native.PLAIN

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Product`."""
        return F.linear(x, weight.to(x.dtype))

    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """See `Product`."""
        return grouped_linear(x, weight.to(x.dtype), offsets)


class Products(NamedTuple):
    """Formats of the matrix products of a linear module: y = x W^T, dx = g W, dW = g^T x.

    A backward product in bf16 multiplies x and W as a quantised forward product left them: it is the gradient of what
    was computed, straight through the rounding, as in quantisation-aware training (torchao's, Model Optimizer's,
    Transformer Engine's `backward_override='dequantized'`). A quantised one rounds x, W and g themselves.
    """

    fprop: Format
    """y."""
    dgrad: Format
    """dx."""
    wgrad: Format
    """dW."""

    @classmethod
    def all_in(cls, chosen: Format) -> "Products":
        """Return all three in one format."""
        return cls(chosen, chosen, chosen)

    @property
    def plain(self) -> bool:
        """Whether none of them is quantised."""
        return not any(chosen in QUANTIZED for chosen in self)


class OperandObserver(Protocol):
    """Looks at the operands of quantised products."""

    def __call__(self, scheme: "Scheme", operand: str, before: Tensor, after: Tensor, bound: Tensor) -> None:
        """See an operand of a product in a quantised format.

        Args:
            scheme: of the module.
            operand: product and tensor, e.g. `wgrad.g` (x: inputs, w: weight, g: gradient of the results).
            before: bf16, what was quantised: padded to whole blocks, rotated where the product's operands are.
            after: fp32 of that shape, what is left of it.
            bound: fp32, broadcasts with it: a magnitude beyond this is clipped, and not just rounded. At the scale of
                its block it lies above the format's largest number by more than half of the last step below that.
                Infinity where nothing is clipped, or nothing is left of the block.
        """


class Arithmetic:
    """What all quantised modules of a network share.

    Args:
        stochastic_rounding: whether NVFP4 gradients are rounded at random.
        hadamard: whether NVFP4 operands of weight gradients are rotated.
        two_dimensional_weights: whether NVFP4 scales of weights cover 16 x 16 values.
    """

    def __init__(
        self, stochastic_rounding: bool = True, hadamard: bool = True, two_dimensional_weights: bool = True
    ) -> None:
        self.stochastic_rounding, self.hadamard = stochastic_rounding, hadamard
        self.two_dimensional_weights = two_dimensional_weights
        self.observer: OperandObserver | None = None
        """Is shown every operand that the emulated backend quantises; None: nobody."""
        self._seed = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def complete(self) -> bool:
        """Whether everything is on that NVFP4 training is published with."""
        return self.stochastic_rounding and self.hadamard and self.two_dimensional_weights

    def reseed(self, seed: int) -> None:
        """Begin the random numbers of stochastic rounding anew.

        Called before each micro-batch with a seed of its own: then a resumed run draws what the uninterrupted one
        would, and no checkpoint need hold a generator's state.

        Args:
            seed: 0 to 2**63 - 1.
        """
        self._seed = seed
        for generator in self._generators.values():
            generator.manual_seed(seed)

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return the generator of a device; None on the meta device, where nothing is drawn."""
        if device.type == "meta":
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


class Backend(Protocol):
    """Computes quantised products, forward and backward."""

    name: str
    """As in a run file."""
    shows_operands: bool
    """Whether `Arithmetic.observer` is shown what is multiplied."""

    def refusal(
        self,
        products: Products,
        arithmetic: Arithmetic,
        shape: torch.Size,
        device_type: str,
        capability: tuple[int, int] | None = None,
    ) -> str:
        """Return why a module cannot be computed here, in a few words; empty: it can.

        Args:
            products: formats of its products, one of them quantised.
            arithmetic: what the run file asks for.
            shape: of its weight, [O, I] or [E, O, I].
            device_type: where it will be, cpu or cuda.
            capability: compute capability of a GPU elsewhere, where packages are taken to be installed (`plan`); None:
                this machine decides.
        """
        ...

    def linear(self, x: Tensor, weight: Tensor, scheme: "Scheme") -> Tensor:
        """Map bf16 [..., I] by bf16 [O, I] to bf16 [..., O]; no view, which FSDP2 cannot hook into."""
        ...

    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor, scheme: "Scheme") -> Tensor:
        """Map bf16 rows [R, I] sorted by expert, with end rows int32 [E], by bf16 [E, O, I] to bf16 [R, O]."""
        ...


class Scheme:
    """Multiplies as a recipe says: a backend quantises both operands on their way into each product.

    Args:
        products: format of each product, as the recipe says; format switches change `products`.
        arithmetic: shared by the modules of a network.
        backend: what computes.
        refused: why it is not one of the better backends, by name.
    """

    operands = None

    def __init__(
        self, products: Products, arithmetic: Arithmetic, backend: Backend, refused: dict[str, str] | None = None
    ) -> None:
        self.planned = self.products = products
        self.arithmetic, self.backend, self.refused = arithmetic, backend, refused or {}

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Product`."""
        if self.products.plain:
            return F.linear(x, weight.to(x.dtype))
        return self.backend.linear(x, weight.to(x.dtype), self)

    def grouped_linear(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """See `Product`."""
        weight = weight.to(x.dtype)
        if self.products.plain:
            return grouped_linear(x, weight, offsets)
        return self.backend.grouped_linear(x, weight, offsets, self)
