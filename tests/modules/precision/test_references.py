"""NVFP4 codes against other people's quantisers: those that run here, and vectors of those that do not.

`vectors/make.py` made the vectors and says how.
"""

import pytest
import torch

from modules.ops.native.quantization import Options
from modules.precision import e2m1, nvfp4
from tests.modules.helpers import dequantize_nvfp4
from tests.modules.precision.vectors import make

VECTORS = make.load()
INPUTS = sorted(name for name in VECTORS if "/" not in name)
TRANSFORMER_ENGINE = {
    "te_rows": {},
    "te_tiles": {"tiles": True},
    "te_mae": {"four_over_six": "mae"},
    "te_mse": {"four_over_six": "mse"},
    "te_mae_tiles": {"four_over_six": "mae", "tiles": True},
    "te_hadamard": {"axis": -2, "hadamard": True},
}


@pytest.fixture(params=["native", "portable"], autouse=True)
def _path(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(nvfp4.native, "applies", lambda x: False)
    elif nvfp4.native.load()[0] is None:
        pytest.skip(nvfp4.native.load()[1])


def differing_codes(ours, codes):
    """Codes of blocks with a scale above zero that differ, as magnitudes on the grid: (ours, theirs)."""
    known = (ours.scales.float() > 0).repeat_interleave(16, -1)
    different = (ours.codes != codes) & known
    return e2m1.decode(ours.codes)[different], e2m1.decode(codes)[different]


def assert_few_ties(mine, theirs, count, name):
    """Codes that differ are neighbours, and few: numbers between the two whose quotient is rounded in another way."""
    assert ((mine.int() - theirs.int()).abs() == 1).all()
    assert len(mine) <= (0.06 if name == "ties" else 0.001) * count


@pytest.mark.parametrize("case", TRANSFORMER_ENGINE)
@pytest.mark.parametrize("name", INPUTS)
def test_transformer_engine(name, case):
    ours = nvfp4.quantize(VECTORS[name], Options(**TRANSFORMER_ENGINE[case]))
    assert torch.equal(ours.scales.view(torch.uint8), VECTORS[f"{name}/{case}/scales"].view(torch.uint8))
    differing, theirs = differing_codes(ours, e2m1.unpack(VECTORS[f"{name}/{case}/codes"]))
    if case == "te_hadamard" and VECTORS[name].dtype == torch.float32:
        # sums of 16 fp32 numbers in another order (of bf16 numbers, they are rounded to the same bf16)
        assert len(differing) <= 1
    else:
        assert (differing == 0).all()  # at most -0, which their reference has as 0
        assert (theirs == 0).all()


@pytest.mark.parametrize("name", INPUTS)
def test_model_optimizer(name):
    """Their scale is amax_b / (6 amax / 2688), which may round to a neighbour, not below 2^-9; zero blocks have 1."""
    x = VECTORS[name]
    ours, scales = nvfp4.quantize(x), VECTORS[f"{name}/modelopt/scales"]
    mine, theirs = ours.scales.view(torch.uint8).int(), scales.view(torch.uint8).int()
    other = mine != theirs
    tiny = mine <= 1
    assert ((mine - theirs).abs()[other & ~tiny] == 1).all()
    assert (other & ~tiny).float().mean() < 0.02
    same = ~other.repeat_interleave(16, -1)
    codes = e2m1.unpack(VECTORS[f"{name}/modelopt/codes"])
    different = (ours.codes != codes) & same & (ours.codes & 7 != 0)
    assert_few_ties(ours.codes[different], codes[different], ours.codes.numel(), name)
    # their decoder reads what is equal as ours does, 1/S being amax / 2688 there
    left = dequantize_nvfp4(ours)
    equal = same & ~different
    torch.testing.assert_close(left[equal], VECTORS[f"{name}/modelopt/values"][equal], rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("name", INPUTS)
def test_torchao(name):
    """torchao multiplies by (1/sg)/sb, which breaks ties in another way, and its scales are at least 2^-6."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    x = VECTORS[name]
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max()))
    ours = nvfp4.quantize(x)
    scales = theirs.scale.view(torch.uint8).view(ours.scales.shape).int()
    mine = ours.scales.view(torch.uint8).int()
    normal = mine >= 8  # 2^-6
    other = (mine != scales) & normal
    assert (scales[~normal] == 8).all()
    assert ((mine - scales).abs()[other] == 1).all()
    assert other.float().mean() < 0.02
    same = ((mine == scales) & normal).repeat_interleave(16, -1)
    codes = e2m1.unpack(theirs.qdata)
    different = (ours.codes != codes) & same
    assert_few_ties(ours.codes[different], codes[different], ours.codes.numel(), name)
    left, right = dequantize_nvfp4(ours), theirs.dequantize(torch.float32)
    equal = same & ~different
    torch.testing.assert_close(left[equal], right[equal], rtol=1e-6, atol=0)


def test_torchao_reads_our_bytes():
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    x = torch.randn(64, 128)
    ours = nvfp4.quantize(x)
    theirs = NVFP4Tensor(e2m1.pack(ours.codes), ours.scales, 16, torch.float32, per_tensor_scale=1 / ours.inverse_scale)
    torch.testing.assert_close(theirs.dequantize(torch.float32), dequantize_nvfp4(ours), rtol=1e-6, atol=0)
