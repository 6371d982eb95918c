"""attention_viewer.py as a program, and its page in a real browser."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from ccnet_d2.engine import apply_overrides
from ccnet_d2.model_zoo import get_config
from tests.scripts import PROJECT, load_script

SCRIPT = PROJECT / "tools/attention_viewer.py"
TOY = "toy/ccnet_synthetic.py"
R1 = "model.sem_seg_head.context=rcca_r1"


def save_weights(path, *overrides):
    torch.manual_seed(0)
    model = instantiate(apply_overrides(get_config(TOY), list(overrides)).model)
    model.sem_seg_head.context.gamma.data.fill_(0.7)
    model.sem_seg_head.context.qkv.weight.data.mul_(4)  # attention that is not even
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def save_image(path, height, width, seed):
    pixels = np.random.default_rng(seed).integers(60, 200, (height, width, 3), dtype=np.uint8)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (220, 40, 40)
    Image.fromarray(pixels).save(path)
    return path


@contextmanager
def serving(*arguments):
    """The program; gives the address it prints."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[3])}
    program = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Jobs in the background of a shell inherit SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = program.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + program.stderr.read()
        yield found[0]
        program.send_signal(signal.SIGINT)
        assert program.wait(timeout=60) == 0
        assert "Traceback" not in program.stderr.read()
    finally:
        if program.poll() is None:
            program.kill()
            program.wait()
        program.stdout.close()
        program.stderr.close()


@pytest.fixture(scope="module")
def script():
    return load_script("tools/attention_viewer.py")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", TOY], 2, "--model needs a config and a checkpoint"),
        (["--model", TOY, R1], 1, f"needs a checkpoint before its overrides, got '{R1}'"),
        (["--model", "toy/none.py", "x.pth"], 1, "There is no config 'toy/none.py'"),
        (["--model", TOY, "x.pth", "--input", "none.png"], 1, "image 'none.png' does not exist"),
        (["--model", TOY, "x.pth", "--longest-side", "4"], 2, "--longest-side must be at least 16"),
    ],
)
def test_mistakes_are_one_sentence(script, capsys, arguments, status, message):
    try:
        code = script.main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == status and message in error.splitlines()[-1] and "Traceback" not in error


def shares(page, row, panel):
    """(largest share as its title says, colour of every pixel of the picture) of a map on the page."""
    return page.run(
        """const figures = document.querySelectorAll(".row")[arguments[0]].querySelectorAll("figure");
        const figure = figures[arguments[1]], picture = figure.querySelector("img");
        const canvas = document.createElement("canvas");
        canvas.width = picture.naturalWidth; canvas.height = picture.naturalHeight;
        const context = canvas.getContext("2d");
        context.drawImage(picture, 0, 0);
        const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
        const mark = figure.querySelector(".mark");
        return {title: figure.querySelector("figcaption").textContent, width: canvas.width, height: canvas.height,
                data: Array.from(data), mark: [mark.style.display, mark.style.left, mark.style.top]};""",
        row,
        panel,
    )


def brightness(panel):
    pixels = np.array(panel["data"], np.float64).reshape(panel["height"], panel["width"], 4)
    return pixels[..., :3].sum(axis=2)


@pytest.mark.slow
def test_in_a_browser_a_click_shows_the_maps(tmp_path, page):
    """Set CCNET_SCREENSHOTS to a folder to look at what the browser shows."""
    shots = Path(os.environ.get("CCNET_SCREENSHOTS", tmp_path))
    two, one = save_weights(tmp_path / "two.pth"), save_weights(tmp_path / "one.pth", R1)
    first = save_image(tmp_path / "first.png", 48, 64, seed=0)
    other = save_image(tmp_path / "other.jpg", 60, 40, seed=1)
    (tmp_path / "broken.png").write_bytes(first.read_bytes()[:200])
    arguments = ["--model", TOY, two, "--model", TOY, one, R1, "--input", str(first)]
    with serving(*arguments) as address:
        page.open(address)
        page.wait("return document.querySelectorAll('.row').length === 2")
        assert (
            page.run("return document.querySelectorAll('figure').length") == 4
        )  # image and prediction, twice
        page.wait("return [...document.images].every((image) => image.naturalWidth > 0)")

        # Below each prediction its classes, which together are all of it.
        page.wait("return document.querySelectorAll('.legend li').length >= 2")
        percents = page.run(
            "return [...document.querySelectorAll('.row:first-child .legend span')]"
            ".map((one) => parseFloat(one.textContent))"
        )
        assert sum(percents) == pytest.approx(100, abs=0.5) and percents == sorted(percents, reverse=True)

        # Model 0 has R=2 and model 1 R=1, and both are shown for the R that is chosen.
        page.click(".row figure:first-child .frame", 3, 3)
        page.wait("return document.querySelectorAll('figure').length === 8")
        page.wait("return [...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        status = page.run("return document.getElementById('status').textContent")
        assert status == "pixel 32, 24 · cell 16, 12 of 32×24"
        page.screenshot(shots / "viewer_compare.png")
        after_one, after_two = shares(page, 0, 2), shares(page, 0, 3)
        assert after_one["title"].startswith("R = 1 (largest ") and after_two["title"].startswith("R = 2 ")
        assert after_one["mark"] == after_two["mark"] == ["block", "50.7812%", "51.0417%"]
        off_cross = np.ones((48, 64), bool)
        off_cross[24:26] = off_cross[:, 32:34] = False  # the pixel's cell covers two rows and two columns
        bright = brightness(after_one)
        assert bright[off_cross].max() < bright[~off_cross].max() / 2
        # Off the cross nothing but the greyed image, so a share there would show as a colour.
        grey = np.array(after_one["data"]).reshape(48, 64, 4)[..., :3][off_cross]
        in_two = np.array(after_two["data"]).reshape(48, 64, 4)[..., :3][off_cross]
        spread = [int((np.ptp(one, axis=1) > 12).sum()) for one in (grey, in_two)]
        assert spread[0] < spread[1] / 4

        # Clicking a map moves the pixel, in all panels.
        page.click(".row figure:nth-child(4) .frame", 20, -20)
        page.wait("return !document.getElementById('status').textContent.startsWith('pixel 32, 24')")
        moved = shares(page, 1, 2)
        assert moved["mark"][0] == "block" and moved["mark"] != after_one["mark"]
        page.run("document.activeElement.blur()")
        before = page.run("return document.getElementById('status').textContent")
        page.keys("body", "\ue014")  # the right arrow key
        page.wait("return document.getElementById('status').textContent !== arguments[0]", before)

        # Another R.
        page.run(
            "const r = document.getElementById('recurrence'); r.value = 3; r.dispatchEvent(new Event('change'))"
        )
        page.wait("return document.querySelectorAll('figure').length === 10")

        # One model alone.
        page.run(
            "const m = document.getElementById('model-1'); m.value = ''; m.dispatchEvent(new Event('change'))"
        )
        page.wait("return document.querySelectorAll('.row').length === 1")
        page.wait("return document.querySelectorAll('figure').length === 5")

        # A file of one's own, and one that is none.
        page.keys("#file", str(other))
        page.wait("return document.querySelector('#image').selectedOptions[0].text === 'other.jpg'")
        page.wait("return document.querySelector('.frame img').naturalHeight === 60")
        page.click(".row figure:first-child .frame", -30, 40)
        page.wait("return document.querySelectorAll('figure').length === 5")
        page.screenshot(shots / "viewer_upload.png")
        page.keys("#file", str(tmp_path / "broken.png"))
        page.wait("return document.querySelector('#status.error')")
        message = page.run("return document.getElementById('status').textContent")
        assert message.startswith("the file is damaged or no image")
        page.screenshot(shots / "viewer_error.png")
