"""What holds for the tree as a whole: no paths of one machine, a lock that fits pyproject.toml."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
MACHINE_PATH = re.compile(r"(?<![\w.~<-])/(?:work|root|home|Users|tmp|opt|mnt)/\w")
TORCH_AND_ITS_OWN = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy", "torch"}


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_path_of_one_machine():
    found = []
    for file in tracked_files():
        if file.suffix in {".png", ".pt", ".svg"}:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize(("line", "found"), [("cd /" + "home/me", True), ("see modules/ops", False)])
def test_the_path_pattern_finds_paths(line: str, found: bool):
    assert bool(MACHINE_PATH.search(line)) is found


def locked(file: str = "requirements.lock") -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pins.items()}


def test_the_lock_fits_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = locked()
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        if requirement.name != "torch":
            assert lock[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_lock_leaves_torch_and_torchvision_alone():
    assert not set(locked()) & (TORCH_AND_ITS_OWN | {"torchvision"})


def test_peers_are_in_no_other_place():
    """They lie in a folder of their own: a second version of anything else there would be used in its place."""
    peers = set(locked("requirements-peers.lock"))
    assert not peers & (set(locked()) | TORCH_AND_ITS_OWN)


def test_the_lock_holds_the_safe_lightning():
    assert locked()["lightning"] == locked()["pytorch-lightning"] >= Version("2.6.4")
