"""The tests, and the programs they start, see nothing of a user's settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

SETTINGS = {
    "HF_HOME": "/nowhere",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "online",
    "TORCH_LOGS": "+all",
    "PL_TRAINER_MAX_STEPS": "1",
    "SLURM_NTASKS": "2",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "nowhere",
    "http_proxy": "http://127.0.0.1:9",
}
CODE = "import tests.conftest, json, os, torch; print(json.dumps([dict(os.environ), torch.get_num_threads()]))"


def test_settings_of_the_user_do_not_reach_the_tests():
    given = {**os.environ, **SETTINGS, "OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "3"}
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", CODE], env=given, cwd=root, capture_output=True, check=True)
    environment, threads = json.loads(result.stdout)
    assert not environment.keys() & SETTINGS.keys()
    assert (environment["OMP_NUM_THREADS"], threads) == ("1", 1)
    assert [environment[name] for name in ("PATH", "HOME", "CUDA_VISIBLE_DEVICES")] == [
        given["PATH"],
        given["HOME"],
        "3",
    ]
