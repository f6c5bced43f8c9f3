"""The sides of the benchmark do the same work, and its table is printed."""

import sys

import torch

from benchmarks import nvfp4_emulation
from modules.ops.native import quantization


def test_sides_agree(monkeypatch):
    monkeypatch.setattr(quantization, "applies", quantization.applies)  # PORTABLE replaces it
    for precision in nvfp4_emulation.DTYPES:
        x = nvfp4_emulation.matrix(precision, 128)
        ours, portable, torchao = (
            nvfp4_emulation.functions_of(side)[""](x)
            for side in (nvfp4_emulation.OURS, nvfp4_emulation.PORTABLE, nvfp4_emulation.TORCHAO)
        )
        assert torch.equal(ours, portable)
        assert ours.dtype == torchao.dtype
        assert torch.isclose(ours, torchao, rtol=1e-5, atol=0).float().mean() > 0.99


def test_every_use_gives_a_matrix():
    x = nvfp4_emulation.matrix("bf16", 64)
    functions = nvfp4_emulation.functions_of(nvfp4_emulation.OURS)
    assert set(functions) == {"", *nvfp4_emulation.USES}
    assert all(function(x).shape == x.shape for function in functions.values())


def test_the_table(monkeypatch, capsys):
    arguments = ["--sizes", "64", "--formats", "bf16", "--threads", "1", "--rounds", "1", "--sides", "copy"]
    monkeypatch.setattr(sys, "argv", ["nvfp4_emulation", *arguments])
    nvfp4_emulation.main()
    out = capsys.readouterr().out
    assert "64 x 64 bf16, 1 thread(s)" in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "100.00%" in rows["ours"]
    assert "copy" in rows
