"""Hugging Face datasets: names on the Hub, and folders that `Dataset.save_to_disk` wrote.

Both are Arrow files in the end: `datasets` downloads a name into its cache (`HF_HOME`) and prepares it there, and what
is in the cache needs no network. Only that is left to the library; the rows are read from the files (`tables.py`), so
that worker processes need not import it (1.1 s) and nothing is held in memory. No code of a dataset is run: `datasets`
knows data files only, since version 4.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from modules.errors import UserError

SCHEME = "hf:"
DATA_SUFFIX = ".arrow"
"""Suffix of the files that hold the rows."""
SYNTAX = "hf:OWNER/NAME[/CONFIG][:SPLIT]"
"""How a dataset of the Hub is named; the split is `train` unless given."""

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_HUB_SECONDS = 5.0


class HubDataset(NamedTuple):
    """One split of a dataset on the Hub."""

    name: str
    """OWNER/NAME."""
    config: str | None
    """Its configuration; None for the only one."""
    split: str


def parse_name(path: str) -> HubDataset:
    """Return what a path of the form `SYNTAX` names.

    Raises:
        UserError: if it has another form.
    """
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/([^:\[\]]+))?(?::([\w.+-]+))?", path)
    if found is None:
        raise UserError(f"paths: {path} names no dataset of the Hub; write {SYNTAX}, with a whole split")
    return HubDataset(found[1], found[2], found[3] or "train")


def load_files(path: str) -> list[str]:
    """Return the Arrow files of a dataset, after a download into the cache where they are not there.

    Args:
        path: of the form `SYNTAX`.

    Raises:
        UserError: if there is no such dataset, or neither a network nor a cache that holds it.
    """
    name, config, split = parse_name(path)
    if os.path.exists(name):  # `datasets` would load it in place of the dataset
        raise UserError(f"paths: {path}: there is a local {name} as well; give it as a path, or start elsewhere")
    print(f"loading {path}", flush=True)
    reachable = _reach_hub()
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # from the Hub, the cache, the files in it
        mend = "give another name, or log in with `hf auth login` where the dataset asks for it"
        if not reachable:
            mend = "the Hub cannot be reached, and the cache (HF_HOME) does not hold it: run once with a network"
        raise UserError(f"paths: {path} cannot be loaded ({type(error).__name__}: {error}); {mend}") from error
    files = [file["filename"] for file in dataset.cache_files]
    assert files or not len(dataset)
    return files


def _reach_hub() -> bool:
    """Return whether the Hub answers; if not, keep the libraries from trying (half a minute for each file)."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        print(f"{endpoint} cannot be reached ({getattr(error, 'reason', error)}): using the cache", flush=True)
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
        return False
    return True


def saved_split(folder: str, files: list[str], skip: Callable[[str, str], None]) -> str | None:
    """Return the subfolder to read of a folder that `DatasetDict.save_to_disk` wrote; None for another folder.

    Args:
        folder: the folder.
        files: names of the files in it.
        skip: takes (reason, name) of each split that is not read.

    Raises:
        UserError: if it has no split `train`, so that one must be chosen.
    """
    if _SPLITS not in files:
        return None
    splits = sorted(_describe(folder, _SPLITS, "splits"))
    if "train" not in splits:
        raise UserError(f"paths: {folder} has the splits {', '.join(splits)}; give one: {folder}/{splits[0]}")
    for split in splits:
        if split != "train":
            skip("split of a dataset other than train", split)
    return "train"


def saved_files(folder: str, files: list[str], skip: Callable[[str, str], None]) -> list[str] | None:
    """Return the names of the Arrow files in a folder that `Dataset.save_to_disk` wrote; None for another folder.

    Args:
        folder: the folder.
        files: names of the files in it.
        skip: takes (reason, name) of each file that does not belong to the dataset.

    Raises:
        UserError: if the description of the dataset is damaged.
    """
    if not {_STATE, _INFO} <= set(files):
        return None
    names = [os.path.basename(entry["filename"]) for entry in _describe(folder, _STATE, "_data_files")]
    for name in sorted(set(files) - {_STATE, _INFO, *names}):
        skip("not part of the dataset", name)
    return names


def _describe(folder: str, file: str, key: str) -> list[Any]:
    """Return what a description of a saved dataset says about a key."""
    try:
        return json.loads((Path(folder) / file).read_text())[key]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"paths: {folder}/{file} describes no dataset ({error}); save it again") from None
