"""mamba-ssm's Triton scan, called by `modules.ops.ssd` as on CUDA, equals the portable scan and the recurrence.

In Triton's interpreter and in fp32 (its bf16 is wrong). Needs triton, einops and mamba-ssm: of this environment, or of
the folder of peers that `make test` fills.
"""

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.ops.documents import DocumentLayout
from modules.ops.ssd import ssd
from tests.modules.helpers import assert_close, document_ids
from tests.modules.ops.test_ssd import NAMES, make_inputs, recurrence

PEERS = Path(sys.prefix) / "peers"
NEEDED = ("triton", "einops", "mamba_ssm")

CASES: dict[str, dict] = {
    "several chunks": {"length": 45, "heads": 2, "groups": 1, "rows": None, "chunk_size": 16},
    "documents": {"length": 37, "heads": 4, "groups": 2, "rows": ([20, 17], [1, 36]), "chunk_size": 16},
    "documents that end with chunks": {"length": 32, "heads": 2, "groups": 2, "rows": ([16, 16],), "chunk_size": 16},
    "less than a chunk": {"length": 7, "heads": 2, "groups": 1, "rows": ([3, 4], [7]), "chunk_size": 16},
}


def make_case(length: int, heads: int, groups: int, rows: tuple[list[int], ...] | None, chunk_size: int) -> dict:
    inputs = make_inputs(length, heads, groups, channels=16, state=16, rows=1 if rows is None else len(rows))
    probe = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(5))
    return {"inputs": inputs, "ids": rows and document_ids(*rows), "chunk_size": chunk_size, "probe": probe}


@pytest.fixture(scope="module")
def kernel_results(tmp_path_factory) -> dict[str, list[Tensor]]:
    """[y, gradients] of each case, computed in one process of its own (importing Triton takes seconds)."""
    folders = [*sys.path, str(PEERS)]
    missing = [name for name in NEEDED if importlib.machinery.PathFinder.find_spec(name, folders) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (`make test` does it)")
    path = tmp_path_factory.mktemp("ssd") / "cases.pt"
    torch.save([make_case(**case) for case in CASES.values()], path)
    script = Path(__file__).with_name("interpreted_ssd.py")
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[3], PEERS))),
        "TRITON_INTERPRET": "1",
        "MAMBA_DETERMINISTIC": "1",  # one configuration of each kernel, hence no timing of several on a GPU
    }
    subprocess.run([sys.executable, script, path], env=os.environ | environment, check=True, timeout=600)
    return dict(zip(CASES, torch.load(path), strict=True))


def with_gradients(function, inputs: dict[str, Tensor], probe: Tensor) -> list[Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y = function(leaves)
    return [y, *torch.autograd.grad((y * probe).sum(), list(leaves.values()))]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_recurrence_and_portable_scan(name: str, kernel_results: dict[str, list[Tensor]]) -> None:
    case = make_case(**CASES[name])
    inputs, ids, chunk_size, probe = case.values()
    layout = None if ids is None else DocumentLayout(ids)
    exact = with_gradients(lambda leaves: recurrence(**leaves, ids=ids), inputs, probe)
    portable = with_gradients(lambda leaves: ssd(**leaves, documents=layout, chunk_size=chunk_size), inputs, probe)
    triples = zip(("y", *NAMES), kernel_results[name], exact, portable, strict=True)
    for what, from_kernel, from_recurrence, from_portable in triples:
        assert_close(from_kernel, from_recurrence, 1e-5, f"{what}, recurrence")
        assert_close(from_kernel, from_portable, 1e-5, f"{what}, portable scan")
