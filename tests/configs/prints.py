"""The resolved configuration of each run file, committed under tests/configs/resolved/.

A change of a default or of a file that a run names thus shows in a diff. After such a change, write them anew with
`.venv/bin/python -m tests.configs.prints` and read what `git diff` says.
"""

from pathlib import Path

from app.cli import parse_run

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
RESOLVED = Path(__file__).parent / "resolved"
RUNS = sorted(file for file in CONFIGS.rglob("*.yaml") if file.relative_to(CONFIGS).parts[0] not in ("model", "layout"))


def resolve(file: Path) -> str:
    """Return a run file with all defaults and the files that it names, as `fit` keeps it in the run folder."""
    return parse_run(["--config", str(file)]).config_text()


def print_of(file: Path) -> Path:
    """Return where the committed print of a run file lies."""
    return RESOLVED / file.relative_to(CONFIGS)


def main() -> None:
    """Write all prints."""
    for file in RUNS:
        print_of(file).parent.mkdir(parents=True, exist_ok=True)
        print_of(file).write_text(resolve(file), encoding="utf-8")
        print(print_of(file).relative_to(ROOT))


if __name__ == "__main__":
    main()
