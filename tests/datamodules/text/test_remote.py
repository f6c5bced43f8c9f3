"""Sources behind URLs and corpora in object stores, against a server on 127.0.0.1."""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.commands.prepare import prepare
from datamodules.text import corpus, files, remote
from datamodules.text.corpus import Corpus
from datamodules.text.policies import Policies, Tally
from datamodules.text.preparation import CORPUS_FILE, prepare_corpus
from datamodules.text.remote import AGAIN, upload_folder
from datamodules.text.sources import list_units
from modules.errors import UserError
from tests.datamodules.conftest import small
from tests.datamodules.text.servers import Store, serve
from tests.datamodules.text.test_preparation import interrupt_after, tree
from tests.datamodules.text.test_sources import counts

MEND = f"mend the credentials or the permissions; {AGAIN}$"


@pytest.fixture
def store(tmp_path, monkeypatch) -> Iterator[Store]:
    """An object store that is the S3 of this test; LitData's cache is elsewhere."""
    with serve() as running:
        values = {"ENDPOINT_URL": running.url, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "DEFAULT_REGION": "r"}
        for name, value in values.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setattr(
            "litdata.utilities.dataset_utilities.get_default_cache_dir", lambda: str(tmp_path / "cache")
        )
        forget_connections()
        yield running
        forget_connections()


def forget_connections() -> None:
    for cached in (remote._s3_client, remote._bucket, corpus._downloader):
        cached.cache_clear()


def put_folder(store: Store, folder: Path, prefix: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            store.files[f"{prefix}/{file.relative_to(folder)}"] = file.read_bytes()


def prepare_url(url: str, output: Path, **options: object) -> dict:
    return prepare_corpus(replace(small(Path("unused"), output, **options), paths=[url]))[0]


def test_a_folder_in_an_object_store_gives_the_corpus_of_the_same_local_folder(
    store: Store, sources: Path, corpus_folder: Path, tmp_path
):
    put_folder(store, sources, "bucket/some/text")
    store.files |= {
        "bucket/some/text/a.bin": b"x",
        "bucket/some/text/.git/a.txt": b"x",
        "bucket/some/text2/a.txt": b"x",
    }
    metadata = prepare_url("s3://bucket/some/text", tmp_path / "out")
    assert counts(metadata["skipped"]) == counts(json.loads((corpus_folder / CORPUS_FILE).read_text())["skipped"]) | {
        "unsupported suffix": 1,
        "hidden file": 1,
    }
    assert metadata["skipped"]["hidden file"]["examples"] == ["s3://bucket/some/text/.git/a.txt"]
    expected = tree(corpus_folder)
    different = {name for name, digest in tree(tmp_path / "out").items() if digest != expected[name]}
    assert different == {"corpus.json", "sources.json"}  # which name the source
    assert not (tmp_path / "out" / ".preparation").exists()


def test_files_behind_urls_are_read_whatever_their_format(store: Store, tmp_path):
    pq.write_table(pa.table({"text": ["table"]}), tmp_path / "a.parquet")
    store.files |= {"bucket/a.parquet": (tmp_path / "a.parquet").read_bytes(), "bucket/a b.jsonl": b'{"text": "line"}'}
    tally, downloads = Tally(), tmp_path / "downloads"
    urls = [f"{store.url}/bucket/a.parquet?key=secret", "s3://bucket/a b.jsonl", f"{store.url}/bucket/a%20b.jsonl"]
    units = list_units(urls, Policies(), tally, downloads)
    assert [unit.kind for unit in units] == ["parquet", "jsonl", "jsonl"]
    assert [unit.name for unit in units] == [urls[0].partition("?")[0], *urls[1:]]
    reads = len(store.reads)
    list_units(urls[1:2], Policies(), tally, downloads)
    assert len(store.reads) == reads  # it is there already
    store.files["bucket/a b.jsonl"] = b'{"text": "another"}'
    [unit] = list_units(urls[1:2], Policies(), tally, downloads)
    assert Path(unit.path).read_bytes() == b'{"text": "another"}'


def test_an_interrupted_download_goes_on_file_by_file(
    store: Store, sources: Path, corpus_folder: Path, tmp_path, monkeypatch
):
    put_folder(store, sources, "bucket/in")
    os_fsync = files.os.fsync
    interrupt_after(monkeypatch, 100, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare_url("s3://bucket/in/", tmp_path / "out")
    monkeypatch.setattr(files.os, "fsync", os_fsync)
    there = [file for file in (tmp_path / "out" / ".preparation" / "downloads").rglob("*.txt") if file.is_file()]
    assert 50 < len(there) <= 100
    reads = len(store.reads)
    prepare_url("s3://bucket/in/", tmp_path / "out")
    assert len(store.reads) - reads == 300 - len(there)
    assert tree(tmp_path / "out")["train/index.json"] == tree(corpus_folder)["train/index.json"]


def test_a_transfer_that_breaks_off_is_never_a_shorter_document(store: Store, tmp_path):
    store.files["bucket/a.txt"] = b"text " * 100
    store.cut.add("bucket/a.txt")
    with pytest.raises(UserError, match=rf"^paths: {store.url}/bucket/a\.txt.*run the same command again"):
        list_units([f"{store.url}/bucket/a.txt"], Policies(), Tally(), tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/nothing/", r"^paths: there is nothing at s3://bucket/nothing/$"),
        ("s3://bucket/no.txt", r"^paths: s3://bucket/no\.txt does not exist$"),
        ("HTTP/bucket/no.txt", r"^paths: http://.*/bucket/no\.txt does not exist$"),
        ("HTTP/bucket/secret.txt", r"^paths: .*secret\.txt: the server answers 403 Forbidden: mend "),
        (
            "s3://bucket/secret.txt",
            rf"^paths: s3://bucket/secret\.txt: S3 at 127\.0\.0\.1:\d+ answers 403 Forbidden: {MEND}",
        ),
        ("http://127.0.0.1:9/a.txt", rf"^paths: .*: the server cannot be reached \(Connection refused\); {AGAIN}$"),
        ("HTTP/bucket/page", r"^paths: .*/page has the suffix '', which is neither text nor JSONL nor Parquet"),
        ("ftp://host/a.txt", r"^paths: ftp://host/a\.txt is not a URL that can be used here; .* s3://, "),
    ],
)
def test_what_a_url_does_not_give_is_one_line(url: str, message: str, store: Store, tmp_path):
    store.files["bucket/secret.txt"] = b"x"
    store.broken.add("bucket/secret.txt")
    with pytest.raises(UserError, match=message) as error:
        list_units([url.replace("HTTP", store.url)], Policies(), Tally(), tmp_path)
    assert "\n" not in str(error.value)


def test_secrets_in_urls_are_not_written_down(store: Store, tmp_path):
    store.files["bucket/a.jsonl"] = b"".join(b'{"text": "document %d"}\n' % n for n in range(50))
    address = store.url.replace("http://", "http://user:password@")
    with pytest.raises(UserError, match=r"^paths: http://127") as error:
        prepare_url(f"{address}/bucket/none.jsonl?token=secret", tmp_path / "out")
    assert "secret" not in str(error.value)
    prepare_url(f"{store.url}/bucket/a.jsonl?token=secret", tmp_path / "out")
    assert "secret" not in (tmp_path / "out" / CORPUS_FILE).read_text()


def test_secrets_in_the_url_of_an_upload_are_not_shown(store: Store, sources: Path, tmp_path, capsys, monkeypatch):
    labels: list[str] = []
    make = remote.ProgressBar
    monkeypatch.setattr(remote, "ProgressBar", lambda label, total: labels.append(label) or make(label, total))
    for shown in (r"has it: \d+ files copied$", "has it already$"):
        prepare([str(sources)], output=tmp_path / "out", upload="s3://bucket/mine?token=hush", workers=1)
        printed = capsys.readouterr()
        assert re.search(f"(?m)^s3://bucket/mine {shown}", printed.out)
        assert "hush" not in printed.out + printed.err
    assert labels == ["uploading to s3://bucket/mine"]
    store.files[f"bucket/mine/{CORPUS_FILE}"] = b"{}"
    with pytest.raises(UserError, match=r"another corpus is at s3://bucket/mine; ") as error:
        upload_folder(tmp_path / "out", "s3://bucket/mine?token=hush", CORPUS_FILE)
    assert "hush" not in str(error.value)


def test_a_corpus_that_cannot_be_read_is_one_short_sentence(store: Store):
    store.files[f"bucket/mine/{CORPUS_FILE}"] = b"{}"
    store.broken.add(f"bucket/mine/{CORPUS_FILE}")
    reason = r"S3 at 127\.0\.0\.1:\d+ answers 403 Forbidden \(AccessDenied\): mend the credentials or the permissions"
    with pytest.raises(UserError, match=rf"^s3://bucket/mine/corpus\.json cannot be read \({reason}\)$"):
        Corpus("s3://bucket/mine")
    with pytest.raises(UserError, match=r"^s3://bucket/none/corpus\.json cannot be read \(it does not exist\)$"):
        Corpus("s3://bucket/none")


def test_a_store_that_is_not_there_is_one_short_sentence(store: Store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    message = r"^paths: s3://bucket/a\.txt: S3 at 127\.0\.0\.1:9 cannot be reached \(Connection refused\); "
    with pytest.raises(UserError, match=message + f"{AGAIN}$"):
        remote.list_files("s3://bucket/a.txt", single=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("HttpError {\n    kind: Timeout,", "S3 does not answer in time"),
        ("HttpError {\n    kind: Decode,", "the connection to S3 broke off"),
        ("Generic S3 error: Error performing GET http://h:1/b?x=1 in 2ms - Wrong region\n\nDebug source:\nBare",
         "S3 at h:1: Wrong region"),
        ("status code: 599 : <Error><Code>Odd</Code>", "S3 answers 599 (Odd)"),
        ("word " * 100, "S3: " + "word " * 39 + "..."),
    ],
)  # fmt: skip
def test_other_failures_of_a_store_in_a_few_words(text: str, reason: str):
    assert remote.explain("s3://bucket/a", RuntimeError(text)) == reason


def test_a_corpus_is_uploaded_with_its_description_last_and_read_there(store: Store, corpus_folder: Path):
    files = tree(corpus_folder)
    assert upload_folder(corpus_folder, "s3://bucket/corpora/mine/", CORPUS_FILE) == len(files)
    assert store.order[-1] == f"bucket/corpora/mine/{CORPUS_FILE}"
    assert sorted(store.order) == [f"bucket/corpora/mine/{name}" for name in sorted(files)]
    assert upload_folder(corpus_folder, "s3://bucket/corpora/mine", CORPUS_FILE) == 0
    theirs, ours = Corpus("s3://bucket/corpora/mine"), Corpus(str(corpus_folder))
    assert theirs.metadata == ours.metadata
    for split in ("train", "validation"):
        far, near = theirs.rows(split), ours.rows(split)
        assert len(far) == len(near)
        for row in np.random.default_rng(0).permutation(len(near)).tolist():
            for a, b in zip(far.read(row), near.read(row), strict=True):
                assert np.array_equal(a, b)
    chunks = [path for path in store.reads if "/chunk-" in path]
    assert len(chunks) == len(set(chunks)) == sum("/chunk-" in path for path in store.files)


def test_an_upload_over_another_corpus_is_refused(store: Store, corpus_folder: Path):
    store.files[f"bucket/mine/{CORPUS_FILE}"] = b"{}"
    with pytest.raises(UserError, match=r"^upload: another corpus is at s3://bucket/mine"):
        upload_folder(corpus_folder, "s3://bucket/mine", CORPUS_FILE)
    assert len(store.files) == 1


def test_an_upload_that_fails_leaves_no_description(store: Store, corpus_folder: Path):
    store.broken.add("bucket/mine/openings.json")
    reason = rf"S3 at 127\.0\.0\.1:\d+ answers 403 Forbidden \(AccessDenied\): {MEND}"
    with pytest.raises(UserError, match=f"^upload: s3://bucket/mine: {reason}"):
        upload_folder(corpus_folder, "s3://bucket/mine", CORPUS_FILE)
    assert f"bucket/mine/{CORPUS_FILE}" not in store.files
    store.broken.clear()
    assert upload_folder(corpus_folder, "s3://bucket/mine", CORPUS_FILE)


def test_another_corpus_at_the_same_url_is_not_mixed_with_the_cached_one(store: Store, sources: Path, tmp_path):
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        prepare_corpus(small(sources, tmp_path / "out", seed=seed))
        store.files.clear()
        put_folder(store, tmp_path / "out", "bucket/mine")
        far, near = Corpus("s3://bucket/mine").rows("train"), Corpus(str(tmp_path / "out")).rows("train")
        assert all(np.array_equal(far.read(row)[0], near.read(row)[0]) for row in range(len(near)))


def test_a_full_disk_is_not_taken_for_a_store_that_is_away():
    error = OSError(errno.ENOSPC, "No space left on device", "cache/chunk")
    assert remote.explain("s3://bucket/a", error) == "[Errno 28] No space left on device: 'cache/chunk'"


def test_sources_behind_a_url_that_changed_since_are_named_without_a_download(store: Store, sources: Path, tmp_path):
    put_folder(store, sources, "bucket/in")
    store.files["bucket/in/a.png"] = b"x"
    prepare_url("s3://bucket/in", tmp_path / "out")
    reads = len(store.reads)
    assert prepare_corpus(replace(small(Path("unused"), tmp_path / "out"), paths=["s3://bucket/in"]))[1]
    assert len(store.reads) == reads
    store.files["bucket/in/new.txt"] = b"new"
    with pytest.raises(UserError, match=r"the sources changed since .*: 1 added \(s3://bucket/in/new\.txt\); give"):
        prepare_url("s3://bucket/in", tmp_path / "out")
    assert len(store.reads) == reads
    assert not (tmp_path / "out" / ".preparation").exists()
