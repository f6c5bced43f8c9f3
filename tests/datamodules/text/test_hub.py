"""Hugging Face datasets, saved and from a cache; nothing here reaches a network."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.text.hub import HubDataset, parse_name
from datamodules.text.policies import Policies, Tally
from datamodules.text.sources import list_units
from modules.errors import UserError
from tests.datamodules.text.test_sources import counts, read

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dataset():
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"id": list(range(60)), "text": [f"text {n}" for n in range(60)]})


TEXTS = [f"text {n}" for n in range(60)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf:a/b", HubDataset("a/b", None, "train")),
        ("hf:a/b:test", HubDataset("a/b", None, "test")),
        ("hf:a-1/b.c_d/en/20:train+test", HubDataset("a-1/b.c_d", "en/20", "train+test")),
        ("hf:a/b/v1.0", HubDataset("a/b", "v1.0", "train")),
    ],
)
def test_names_are_taken_apart(path: str, expected: HubDataset):
    assert parse_name(path) == expected


@pytest.mark.parametrize("path", ["hf:a", "hf:", "hf:a/b:train[:10%]", "hf:a/b:", "hf://datasets/a/b/c.parquet"])
def test_other_names_are_refused_with_the_syntax(path: str, tmp_path):
    with pytest.raises(UserError, match=r"names no dataset of the Hub; write hf:OWNER/NAME\[/CONFIG\]\[:SPLIT\]"):
        list_units([path], Policies(), Tally(), tmp_path)


def test_a_saved_dataset_is_read_shard_by_shard(dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"left by a map")
    (tmp_path / "other.txt").write_text("beside it")
    texts, tally = read([tmp_path])
    assert texts == ["beside it", *TEXTS]
    assert counts(tally.skipped) == {"not part of the dataset": 1}
    assert read([tmp_path / "saved"])[0] == TEXTS
    with pytest.raises(UserError, match=r"^text_key: .*has no column 'body'; .* holds text: text$"):
        read([tmp_path], text_key="body")


def test_selected_and_shuffled_rows_are_read_as_they_were_saved(dataset, tmp_path):
    dataset.select([5, 3, 50]).save_to_disk(str(tmp_path / "saved"))
    assert read([tmp_path])[0] == ["text 5", "text 3", "text 50"]


def test_of_saved_splits_train_is_read_and_others_are_counted(dataset, tmp_path):
    import datasets

    splits = {"train": dataset.select(range(3)), "test": dataset.select(range(3, 5))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    texts, tally = read([tmp_path / "both"])
    assert texts == TEXTS[:3]
    assert tally.skipped["split of a dataset other than train"]["examples"] == [str(tmp_path / "both" / "test")]
    assert read([tmp_path / "both" / "test"])[0] == TEXTS[3:5]
    assert read([tmp_path])[0] == TEXTS[:3]
    datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^paths: .*none has the splits a, b; give one: .*none/a$"):
        read([tmp_path / "none"])


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_a_damaged_description_is_one_line(damage: str, dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text(damage)
    with pytest.raises(UserError, match=r"^paths: .*state\.json describes no dataset \(.*\); save it again$"):
        read([tmp_path])


def test_a_missing_or_cut_shard_follows_the_policy(dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    (tmp_path / "saved" / "data-00000-of-00003.arrow").unlink()
    cut = tmp_path / "saved" / "data-00001-of-00003.arrow"
    cut.write_bytes(cut.read_bytes()[:300])
    texts, tally = read([tmp_path])
    assert texts == TEXTS[40:]
    assert counts(tally.skipped) == {"unreadable (No such file or directory)": 1, "cannot be decoded": 1}
    with pytest.raises(UserError, match=r"data-0000\d-of-00003\.arrow: "):
        read([tmp_path], malformed="strict")


def run(args: list[str], home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `prepare` with a Hub that nobody serves."""
    variables = {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"} | environment
    command = [sys.executable, "-m", "app", "prepare", *args, "--workers", "1", "--vocab_size", "300"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_network_and_cache_it_is_one_line_at_once(offline: str, tmp_path):
    start = time.monotonic()
    result = run(["hf:owner/name", "--output", str(tmp_path / "out")], tmp_path / "home", HF_HUB_OFFLINE=offline)
    assert time.monotonic() - start < 20  # the library alone takes 23 s for its retries
    assert result.returncode == 2, result
    [line] = result.stderr.splitlines()
    assert line.startswith("error: paths: hf:owner/name cannot be loaded (")
    assert line.endswith("the Hub cannot be reached, and the cache (HF_HOME) does not hold it: run once with a network")
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_cache_needs_no_network(dataset, tmp_path):
    import datasets

    folder = tmp_path / "home" / "datasets" / "owner___name" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "name-train.arrow"), features=dataset.features) as writer:
        for row in dataset:
            writer.write(row)
        writer.finalize()
    splits = {"train": {"name": "train", "num_bytes": 1, "num_examples": 60, "dataset_name": "name"}}
    information = {"builder_name": "parquet", "config_name": "default", "dataset_name": "name", "splits": splits}
    information |= {"features": dataset.features.to_dict(), "version": {"version_str": "0.0.0"}}
    (folder / "dataset_info.json").write_text(json.dumps(information))
    result = run(["hf:owner/name", "--output", str(tmp_path / "out"), "--sequence_length", "16"], tmp_path / "home")
    assert result.returncode == 0, result
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["documents"] == 60
    assert "http://127.0.0.1:9 cannot be reached" in result.stdout
