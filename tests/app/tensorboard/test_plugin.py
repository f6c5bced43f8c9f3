"""The page that TensorBoard opens on: what is on it for which runs."""

import json
import math
import time
import urllib.request
from pathlib import Path

import pytest
from tensorboard import program
from torch.utils.tensorboard import SummaryWriter

from app.tensorboard.__main__ import plugins
from app.tensorboard.layout import LAYOUT
from app.tensorboard.plugin import content, short_names, troubles

NOW = 1000.0


def curve(*values: float, every: int = 1) -> list[tuple[int, float, float]]:
    return [(every * step, value, 900.0 + step) for step, value in enumerate(values)]


RUN = {
    "training/next_token_loss": curve(9, 8, 7),
    "validation/loss": curve(9, 7, every=2),
    "validation/bits_per_byte": curve(3.4, 2.5, every=2),
    "reference/gzip_bits_per_byte": curve(2.0637, 2.0637, every=2),
    "gradients/dead_weights": curve(0, 0),
}
FEW_BITS = {**RUN, "quantization/snr_db/fprop.x/worst": curve(18, 18), "quantization/snr_db/dgrad.g/worst": curve(17)}


def charts(page: dict) -> dict[str, dict]:
    return {chart["title"]: chart for group in page["groups"] for chart in group["charts"]}


def test_no_chart_has_the_title_of_another():
    titles = [chart.title for charts in LAYOUT.values() for chart in charts]
    assert len(titles) == len(set(titles))


def test_what_was_not_measured_is_not_there():
    page = content({"plain": RUN}, NOW)
    assert [group["title"] for group in page["groups"]] == ["Is it good, and is it healthy?", "Do all weights learn?"]
    assert list(charts(page)) == [
        "Held-out bits per byte",
        "Loss, training and held-out",
        "Weights without any gradient",
    ]
    only_reference = content({"plain": {"reference/gzip_bits_per_byte": curve(2.0)}}, NOW)
    assert only_reference["groups"] == []


def test_a_group_shows_only_the_runs_that_measured_it():
    page = content({"plain": RUN, "nvfp4": FEW_BITS}, NOW)
    chart = charts(page)["Signal to quantisation noise"]
    assert [(one["run"], one["curve"]) for one in chart["series"]] == [("nvfp4", "dgrad.g"), ("nvfp4", "fprop.x")]
    assert [one["name"] for one in page["runs"]] == ["nvfp4", "plain"]


def test_bits_per_byte_stand_beside_gzip_which_is_no_curve():
    chart = charts(content({"plain": RUN}, NOW))["Held-out bits per byte"]
    assert chart["references"] == [{"name": "gzip -9", "value": 2.0637}]
    assert [(one["curve"], one["points"]) for one in chart["series"]] == [("bits_per_byte", [[0, 3.4], [2, 2.5]])]


def test_all_points_and_values_that_are_not_finite_reach_the_page():
    run = {"training/next_token_loss": curve(9, math.nan, math.inf, 5), "validation/loss": curve(8)}
    page = content({"run": run}, NOW)
    json.dumps(page, allow_nan=False)
    training, held_out = charts(page)["Loss, training and held-out"]["series"]
    assert (training["curve"], training["points"]) == ("training", [[0, 9], [1, None], [2, None], [3, 5]])
    assert held_out["curve"] == "held-out"


def test_the_line_of_a_run_has_its_newest_values():
    (line,) = content({"plain": RUN}, NOW)["runs"]
    assert line == {
        "name": "plain",
        "step": 2,
        "seconds": 98.0,
        "bits_per_byte": 2.5,
        "gzip": 2.0637,
        "validation_loss": 7.0,
        "training_loss": 7.0,
        "tokens_per_second": None,
        "troubles": [],
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"training/skipped_steps": curve(0, 3)}, ["skipped steps: 3, above 0"]),
        ({"training/skipped_steps": curve(3, 0)}, []),
        ({"speed/data_wait_share": curve(0.0, 0.25)}, ["waiting for data: 25%, above 10%"]),
        ({"experts/router_entropy/worst": curve(0.9, 0.1)}, ["router entropy: 0.1, below 0.2"]),
        ({"training/next_token_loss": curve(9, math.nan)}, ["training loss is not finite"]),
        ({"validation/loss": curve(9, 5, 6, every=10)}, ["held-out loss 6 has risen from 5 at step 10"]),
        ({"validation/loss": curve(9, 5, 5.05)}, []),
    ],
)
def test_what_is_worth_a_look_is_said(changes: dict, expected: list[str]):
    assert troubles({**RUN, **changes}) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["validation/bits_per_byte"], ["bits_per_byte"]),
        (["q/snr/a/worst", "q/snr/b/worst"], ["a", "b"]),
        (["data/share_asked/c", "data/share_read/c"], ["share_asked", "share_read"]),
        ([], []),
    ],
)
def test_names_lose_what_they_share(names: list[str], expected: list[str]):
    assert short_names(names) == expected


def test_tensorboard_serves_the_page_first(tmp_path: Path):
    with SummaryWriter(log_dir=str(tmp_path / "run")) as writer:
        for step, value in enumerate((3.4, 2.5)):
            writer.add_scalar("validation/bits_per_byte", value, step)
    server = program.TensorBoard(plugins=plugins())
    server.configure(["tensorboard", "--logdir", str(tmp_path), "--port", "0", "--load_fast", "false"])
    url = server.launch()

    def get(path: str) -> str:
        with urllib.request.urlopen(url + path, timeout=60) as answer:
            return answer.read().decode()

    page = {"groups": []}
    for _ in range(300):  # TensorBoard reads the folder in the background
        page = json.loads(get("data/plugin/superbolt/content"))
        if page["groups"]:
            break
        time.sleep(0.1)
    (one,) = charts(page)["Held-out bits per byte"]["series"]
    assert (one["run"], one["points"]) == ("run", [[0, 3.4], [1, 2.5]])
    assert next(iter(json.loads(get("data/plugins_listing")))) == "superbolt"
    entry = get("data/plugin_entry.html?name=superbolt")
    assert '<base href="plugin/superbolt/"' in entry
    assert 'import("./page.js")' in entry
    assert "export async function render()" in get("data/plugin/superbolt/page.js")
