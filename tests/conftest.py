"""What all tests share: an environment of their own, few threads, fixed seeds.

A user's settings for Hugging Face, Lightning, torch, SLURM or a proxy would change what tests and the programs they
start do. So of the environment only what names places and tools of the machine is kept, before a library reads it.
"""

import os
import re
import signal

KEPT = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|TMPDIR|XDG_CACHE_HOME|PYTHON\w*|VIRTUAL_ENV|PYTEST_\w+|SUPERBOLT_\w+"
    r"|CC|CXX|CPATH|LIBRARY_PATH|LD_\w+|DYLD_\w+|CUDA_\w+|NVIDIA_\w+"
)
for name in os.environ.keys() - set(filter(KEPT.fullmatch, os.environ)):
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is imported; see app/__main__.py
os.environ["TOKENIZERS_PARALLELISM"] = "false"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    from tests.app.helpers import Program

    started = Program(tmp_path_factory.mktemp("program"))
    yield started
    started.close()
