"""What a folder says of generation: special tokens, and settings that other programs read from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.checkpoints.documents import read_json
from modules.errors import UserError

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Special tokens of a model, and what else its folder says of generation."""

    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a completion; empty: none is known."""
    bos_token_id: int | None = None
    """Id that starts a text; None: none."""
    pad_token_id: int | None = None
    """Id that fills rows; None: none."""
    other: dict[str, Any] = field(default_factory=dict)
    """The other keys of generation_config.json, as they are."""


def read_defaults(folder: Path, config: dict[str, Any], tokenizer_folder: Path | None) -> GenerationDefaults:
    """Return the defaults of a folder: generation_config.json decides, then config.json, then the tokenizer.

    Args:
        folder: may hold a generation_config.json.
        config: the model's config.json; empty where there is none.
        tokenizer_folder: the tokenizer's files, if any.

    Raises:
        UserError: a file cannot be read, or an id is no id.
    """
    file = folder / GENERATION_CONFIG
    generation = read_json(file) if file.exists() else {}
    ids: dict[str, Any] = {}
    for kind in ("eos", "bos", "pad"):
        key = f"{kind}_token_id"
        sources = ((generation, file), (config, folder / "config.json"))
        found = next(((raw[key], path) for raw, path in sources if raw.get(key) is not None), None)
        if found is None and tokenizer_folder is not None:
            found = _tokenizer_id(tokenizer_folder, f"{kind}_token"), tokenizer_folder
        ids[kind] = _checked(key, *found) if found is not None else ()
    named = {"eos_token_id", "bos_token_id", "pad_token_id"}
    return GenerationDefaults(
        eos_token_ids=ids["eos"],
        bos_token_id=next(iter(ids["bos"]), None),
        pad_token_id=next(iter(ids["pad"]), None),
        other={key: value for key, value in generation.items() if key not in named},
    )


def _checked(key: str, value: Any, file: Path) -> tuple[int, ...]:
    """Return an id or a list of ids as a tuple."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for entry in values:
        if type(entry) is not int or entry < 0:
            raise UserError(f"{file}: {key} {value!r} must be a token id or a list of them")
    return tuple(values)


def _tokenizer_id(folder: Path, kind: str) -> int | None:
    """Return the id of the token that tokenizer_config.json calls `kind` (e.g. eos_token), or None."""
    files = folder / TOKENIZER_CONFIG, folder / "tokenizer.json"
    if not all(file.exists() for file in files):
        return None
    token = read_json(files[0]).get(kind)
    text = token.get("content") if isinstance(token, dict) else token
    tokenizer = read_json(files[1])
    ids = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    return ids.get(text)
