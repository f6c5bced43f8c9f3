"""Every key of every YAML file says what it means, in a comment above it or behind it."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
SYNTAX = {"class_path", "init_args"}
"""How jsonargparse names a class and its arguments; the key above says what the class is for."""
CHOSEN = {"data.init_args.environments", "data.init_args.sources", "data.init_args.phases[].sources"}
"""Mappings whose keys are names that the writer of the file chose: the first one needs a comment."""


def uncommented_keys(text: str) -> list[str]:
    """Return the keys without a comment; within a list or a mapping of chosen names, the first time only."""
    lines = text.splitlines()
    seen: set[str] = set()
    found: list[str] = []

    def walk(node: yaml.Node, path: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                walk(item, path + "[]")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{path}.{'*' if path in CHOSEN else key.value}".lstrip(".")
                line = key.start_mark.line
                above = lines[line - 1].strip() if line else ""
                commented = above.startswith("# ") or " # " in lines[line]
                if key.value not in SYNTAX and name not in seen and not commented:
                    found.append(name)
                seen.add(name)
                walk(value, name)

    walk(yaml.compose(text, yaml.SafeLoader), "")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_key_is_commented(file: Path):
    assert uncommented_keys(file.read_text(encoding="utf-8")) == []


def test_an_uncommented_key_is_found():
    text = "# Meaning.\na: 1\nb: 2\nc: 3  # meaning\n# Meaning.\nd:\n  - x: 1\n    # Meaning.\n    y: 2\n  - y: 3\n"
    assert uncommented_keys(text) == ["b", "d[].x"]
