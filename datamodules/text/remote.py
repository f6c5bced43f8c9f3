"""Files behind URLs: sources to download, and finished corpora to upload.

A source is downloaded once, into the working folder of the preparation, and read there like any other file: it is read
two or three times, a Parquet file in random order, and a network that fails for a moment must never look like a damaged
document that may be skipped. A download that was interrupted goes on file by file; a file that changed has another name
on the disk (`_version`).

Object stores are spoken to through obstore, which LitData brings, with boto3's credentials for S3: fsspec's own s3fs
would replace the botocore that boto3 needs.
"""

import functools
import hashlib
import re
import socket
import ssl
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from datamodules.progress import ProgressBar
from datamodules.text.files import write_blocks
from modules.errors import UserError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

WEB_SCHEMES = ("http", "https")
STORE_SCHEMES = ("s3", "gs", "azure")
AGAIN = "run the same command again, what is there so far is kept"

_STORE_NAMES = {"s3": "S3", "gs": "Google Cloud Storage", "azure": "Azure"}
_MISSING = "it does not exist"
_DENIED = (401, 403)
_BLOCK = 8 << 20
_CONNECTIONS = 8
_WEB_SECONDS = 60.0
_STORE_TIMEOUT = "200s"


class RemoteFile(NamedTuple):
    """A file behind a URL."""

    name: str
    """Its path below the URL; its last part where the URL is that of a file."""
    size: int
    """Bytes; 0 where the server does not say."""
    version: str
    """Changes when the file does; empty where the server does not say."""


def is_url(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def check_scheme(url: str, key: str, schemes: tuple[str, ...]) -> None:
    """Refuse a URL that cannot be read or written.

    Raises:
        UserError: naming the key and the schemes there are.
    """
    if urlsplit(url).scheme not in schemes:
        known = ", ".join(f"{scheme}://" for scheme in schemes)
        raise UserError(f"{key}: {public(url)} is not a URL that can be used here; give one that begins with {known}")


def public(url: str) -> str:
    """Return a URL without its query, user and password, which may be secrets (presigned URLs); other paths as is."""
    if not is_url(url):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def list_files(url: str, single: bool) -> list[RemoteFile]:
    """Return the files at a URL, sorted by name.

    Args:
        url: of a file, or of a "folder" in an object store: all that begins with it.
        single: whether it is that of a file.

    Raises:
        UserError: if there is nothing, or the store does not answer.
    """
    try:
        if urlsplit(url).scheme in WEB_SCHEMES:
            return [_head(url)]
        store, key = _open_store(url)
        if single:
            entries = [store.head(key)]
        else:
            entries = [entry for batch in store.list(key) for entry in batch if not entry["path"].endswith("/")]
    except Exception as error:  # each store has its own
        raise _failed("paths", url, error) from error
    if not entries:
        raise UserError(f"paths: there is nothing at {public(url)}")
    start = len(key.rpartition("/")[0]) if single else len(key)
    files = [
        RemoteFile(entry["path"][start:].lstrip("/"), entry["size"], f"{entry['e_tag']} {entry['last_modified']}")
        for entry in entries
    ]
    return sorted(files)


def download(url: str, files: list[RemoteFile], single: bool, folder: Path) -> Path:
    """Copy files to a folder, those that are not there yet, and return the folder they lie in.

    Args:
        url: as `list_files` had it.
        files: some of what `list_files` returned.
        single: whether the URL is that of a file.
        folder: where downloads go; each state of the remote files gets a subfolder of its own.

    Raises:
        UserError: if a file cannot be read or written.
    """
    target = folder / _version(url, files)
    missing = [file for file in files if not (target / file.name).is_file() or not file.version]
    with ProgressBar(f"downloading {public(url)}", sum(file.size for file in missing)) as progress:
        lock = threading.Lock()

        def fetch(file: RemoteFile) -> None:
            def counted() -> Iterator[bytes]:
                for block in _read(url, file, single):
                    with lock:
                        progress.advance(len(block))
                    yield block

            write_blocks(target / file.name, counted())

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for _ in pool.map(fetch, missing):
                pass
    return target


def _version(url: str, files: list[RemoteFile]) -> str:
    described = repr([public(url), *(tuple(file) for file in files)])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _read(url: str, file: RemoteFile, single: bool) -> Iterator[bytes]:
    """Yield the content of a remote file in blocks."""
    done = 0
    try:
        if urlsplit(url).scheme in WEB_SCHEMES:
            with urllib.request.urlopen(url, timeout=_WEB_SECONDS) as response:
                while block := response.read(_BLOCK):
                    done += len(block)
                    yield block
        else:
            store, key = _open_store(url)
            path = key if single else f"{key.rstrip('/')}/{file.name}".lstrip("/")
            for block in store.get(path).stream(min_chunk_size=_BLOCK):
                done += len(block)
                yield bytes(block)
    except Exception as error:  # each store has its own
        raise _failed("paths", url, error) from error
    if file.size and done != file.size:
        raise UserError(f"paths: {public(url)} ended after {done} of {file.size} bytes; {AGAIN}")


def _head(url: str) -> RemoteFile:
    with urllib.request.urlopen(url, timeout=_WEB_SECONDS) as response:  # not HEAD: not every server answers it
        headers = response.headers
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    return RemoteFile(urlsplit(url).path.rpartition("/")[2], int(headers.get("Content-Length") or 0), version)


def upload_folder(folder: Path, url: str, last: str) -> int:
    """Copy a folder to an object store; the file `last` goes last and marks the copy as complete.

    Args:
        folder: the folder.
        url: where its content goes.
        last: name of a file in it.

    Returns:
        The number of files copied: 0 where a complete copy is there already.

    Raises:
        UserError: if something else is there, or the store refuses.
    """
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names.remove(last)
    try:
        store, key = _open_store(url)
        prefix = f"{key.rstrip('/')}/".lstrip("/")
        there = _get(store, prefix + last)
        if there is None:
            size = sum((folder / name).stat().st_size for name in names)
            with ProgressBar(f"uploading to {public(url)}", size) as progress:
                with ThreadPoolExecutor(_CONNECTIONS) as pool:
                    for done in pool.map(lambda name: _put(store, prefix + name, folder / name), names):
                        progress.advance(done)
            _put(store, prefix + last, folder / last)
            return len(names) + 1
    except Exception as error:  # each store has its own
        raise _failed("upload", url, error) from error
    if there != (folder / last).read_bytes():
        raise UserError(f"upload: another corpus is at {public(url)}; choose another URL, or delete it there first")
    return 0


def _get(store: "ObjectStore", path: str) -> bytes | None:
    try:
        return bytes(store.get(path).bytes())
    except FileNotFoundError:
        return None


def _put(store: "ObjectStore", path: str, file: Path) -> int:
    store.put(path, file)
    return file.stat().st_size


def _open_store(url: str) -> "tuple[ObjectStore, str]":
    """Return the bucket of a URL and the path in it."""
    parts = urlsplit(url)
    return _bucket(parts.scheme, parts.netloc), parts.path.lstrip("/")


@functools.cache
def _bucket(scheme: str, name: str) -> "ObjectStore":
    """Return a bucket, which keeps its connections."""
    from obstore.store import from_url

    options: dict[str, Any] = {"client_options": {"timeout": _STORE_TIMEOUT}, "retry_config": {"max_retries": 5}}
    return from_url(f"{scheme}://{name}", **options | (_s3_options() if scheme == "s3" else {}))


def s3_endpoint() -> str:
    """Return the URL of the S3 service that boto3, hence LitData, is configured for."""
    return _s3_client().meta.endpoint_url


@functools.cache
def _s3_client() -> Any:
    import boto3

    session = boto3.Session()
    return session.client("s3", region_name=session.region_name or "us-east-1")


def _s3_options() -> dict[str, Any]:
    """Return credentials, region and endpoint as boto3 finds them; without credentials for a public bucket."""
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    session, endpoint = boto3.Session(), s3_endpoint()
    config: dict[str, Any] = {"region": _s3_client().meta.region_name}
    options: dict[str, Any] = {"config": config}
    if "amazonaws.com" not in endpoint:
        config |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
        options["client_options"] = {"timeout": _STORE_TIMEOUT, "allow_http": endpoint.startswith("http://")}
    if session.get_credentials() is None:
        config["skip_signature"] = True
    else:
        options["credential_provider"] = Boto3CredentialProvider(session)
    return options


def explain(url: str, error: Exception) -> str:
    """Return what went wrong between us and the store or server of a URL, in a few words of ours.

    obstore has no fields for it: its text has the status, and the store's own word for it, among much else.
    """
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    text = str(error)
    asked = re.search(r"Error performing \w+ (\S+)", text)
    store = _STORE_NAMES.get(urlsplit(url).scheme, "the server")
    if asked:
        store += f" at {urlsplit(public(asked[1])).netloc}"
    status = error.code if isinstance(error, urllib.error.HTTPError) else _find(r"status code: (\d{3})", text)
    if isinstance(error, FileNotFoundError) or str(status) == "404":
        return _MISSING
    if status:
        answer, word = f"{store} answers {status} {_phrase(int(status))}".rstrip(), _find(r"<Code>(\w+)</Code>", text)
        answer += f" ({word})" if word else ""
        return f"{answer}: mend the credentials or the permissions" if int(status) in _DENIED else answer
    kind = _find(r"HttpError \{\s*kind: (\w+)", text)
    if kind == "Timeout":
        return f"{store} does not answer in time"
    if kind == "Connect":
        cause = _find(r'(?:message|error): "([^"]+)"', text)
        return f"{store} cannot be reached" + (f" ({cause})" if cause else "")
    if kind:
        return f"the connection to {store} broke off"
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
        return f"{store} cannot be reached ({error.strerror or text or type(error).__name__})"
    if isinstance(error, OSError):  # of this machine: a full disk, for example
        return text
    return f"{store}: {_summary(text) or type(error).__name__}"


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in set(HTTPStatus) else ""


def _find(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _summary(text: str) -> str:
    """Return the sentence of an error of obstore, without what leads to it and the dump of its fields."""
    sentence = " ".join(text.partition("Debug source:")[0].split()).rpartition(" - ")[2]
    return textwrap.shorten(re.sub(r"^Generic \w+ error: ", "", sentence), 200, placeholder=" ...")


def _failed(key: str, url: str, error: Exception) -> UserError:
    reason = explain(url, error)
    if reason == _MISSING:
        return UserError(f"{key}: {public(url)} does not exist")
    return UserError(f"{key}: {public(url)}: {reason}; {AGAIN}")
