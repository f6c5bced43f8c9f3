"""What an option of several commands means."""

import pytest

from app.options import parse_size
from modules.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 * 2**30), ("1.5KB", 1500), ("12", 12), ("7B", 7)],
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "0", "GB", "0.1"])
def test_what_is_no_size(text: str):
    with pytest.raises(UserError, match=r"--max_shard_size: .* is no size"):
        parse_size(text)
