"""`prepare` as a user starts it: what its command line adds to datamodules/text/preparation.py."""

import pytest

from app.__main__ import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "s3://bucket/mine"], "error: output: s3:/bucket/mine is a URL; give a folder on this machine"),
        (
            ["--output", "OUT", "--upload", "https://host/mine"],
            "error: upload: https://host/mine is not a URL that",
        ),
        (["--output", "OUT", "--upload", "mine"], "error: upload: mine is not a URL that can be used here; give"),
    ],
)
def test_urls_in_the_wrong_place_are_refused_before_anything_is_read(
    options: list[str], message: str, tmp_path, capsys
):
    text = tmp_path / "a.txt"
    text.write_text("a")
    options = [option.replace("OUT", str(tmp_path / "out")) for option in options]
    assert main(["prepare", str(text), *options]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
