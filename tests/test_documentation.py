"""Every command that README and docs show is run, in their order, on settings that take seconds.

A fenced block marked `bash` holds commands. They run in a folder with the repository's examples, its run files made
small, and a run that `fit` has finished there: what README's first commands leave.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.app.helpers import ROOT, Program, kill_when

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A file that a page's commands use."""
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
STEP = 4 * 512
"""Tokens in a step of the run files."""
BACKBONE = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_num_heads": 2}
NEEDS_MORE = ("gpu8",)
"""What a `fit` that needs GPUs names; of such the configuration is checked only."""
ELSEWHERE = re.compile(r"source \S+activate|\S*pip install|(\S*python -m )?benchmarks\.|docker|torchrun|srun|curl")


def commands(page: Path) -> list[str]:
    """Return the commands of a page's fenced blocks, a line each; lines that end with a backslash go on."""
    text = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def shrink(file: Path) -> None:
    """Make a run file's network, data and intervals small."""
    run = yaml.safe_load(file.read_text(encoding="utf-8"))
    model, data = run["model"]["init_args"], run["data"]["init_args"]
    model["backbone"] |= BACKBONE
    model["schedule"] |= {"warmup_tokens": STEP, "decay_tokens": 2 * STEP}
    data |= {"total_tokens": 8 * STEP, "validation_rows": 4}
    for source in data.get("sources", {}).values():
        source["count"] = 40
    for group in run.keys() & {"validation", "checkpoint", "console", "environments"}:
        run[group]["every_n_steps"] = 4
    for group in run.keys() & {"samples", "environments"}:
        run[group]["max_new_tokens"] = 8
    file.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Path:
    """A folder as README's first commands leave it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pretrain.yaml", "pretrain_nvfp4.yaml", "sft.yaml"):
        shrink(folder / "configs" / name)
    run_app(program, folder, "prepare", "examples/corpus", "--output", "data/stdlib")
    run_app(program, folder, "fit", "--config", "configs/pretrain.yaml")
    return folder


def run_app(program: Program, folder: Path, *args: str) -> None:
    serving = kill_when(lambda: "serving" in program.output(), number=signal.SIGINT) if args[0] == "serve" else None
    result = program.run(*args, folder=folder, meanwhile=serving)
    assert result.code == 0, f"{shlex.join(args)}\n{result.output[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, trained: Path, tmp_path: Path, program: Program):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for name, content in FILE.findall(page.read_text(encoding="utf-8")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    for line in commands(page):
        run(line, tmp_path, program)


def run(line: str, folder: Path, program: Program) -> None:
    """Run a line of a shell as far as this machine can."""
    words = shlex.split(line, comments=True)
    if ELSEWHERE.match(line):
        return
    if words[0] == "make":
        planned = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert planned.returncode == 0, f"{line}\n{planned.stderr}"
        return
    if "|" in words:
        shell = line.replace("python -m app", f"{sys.executable} -m app")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        return
    assert words[:3] == ["python", "-m", "app"], f"nobody has run: {line}"
    args = words[3:]
    if any(mark in line for mark in NEEDS_MORE) and args[0] == "fit":
        args = [*args, "--print_config"]
    run_app(program, folder, *args)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 140
