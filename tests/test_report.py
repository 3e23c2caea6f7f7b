"""`pruning.report`: the page, what it says in a browser, and what it never overwrites."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hawk_kernels import prune
from hawk_kernels.checkpoint import TINY_MODEL, ask_about, load_checkpoint
from hawk_kernels.methods import METHODS
from hawk_kernels.pictures import report as reports
from hawk_kernels.pictures.ratios import selections
from hawk_kernels.pictures.report import MARK, kv_bytes, readable
from hawk_kernels.selection import kept_count
from tests.tiny_families import BY_NAME, TINY, batch, tiny_model
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no chromium or google-chrome on PATH"
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pruned(model, inputs, keep_ratio=0.5, method="random", **options):
    with prune(model, keep_ratio, method=method, **options) as pruning, torch.no_grad():
        model(**inputs)
    return pruning


@pytest.fixture
def pruning():
    return pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))))


@pytest.fixture(scope="module")
def answered():
    """TinyVQA after a question about a shipped picture: pruning, picture and processor."""
    model, processor = load_checkpoint(str(TINY_MODEL), "auto", torch.device("cpu"))
    picture = Image.open(TINY_MODEL / "samples" / "digits_8x8.png")
    with prune(model, 0.2) as pruning:
        model.generate(**ask_about(processor, picture, "Which digit is red?"), max_new_tokens=2, do_sample=False)
    return pruning, picture, processor


class Opened:
    """A page after its scripts have run in headless Chromium.

    Attributes:
        dom: the document then, as HTML.
        console: lines of the console.
        requests: what the page asked for, besides itself.
    """

    def __init__(self, page: Path, folder: Path, fragment: str = "") -> None:
        log = folder / "net.json"
        assert CHROMIUM is not None, "CI must install chromium: apt-get install -y chromium"
        ran = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
                # the browser itself would look for updates
                "--host-resolver-rules=MAP * ~NOTFOUND",
                *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"),
                *("--virtual-time-budget=5000", "--window-size=1000,1200", "--dump-dom", page.as_uri() + fragment),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        self.dom = ran.stdout
        self.console = [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]
        # what the browser itself asks for has no initiator
        found = re.findall(r'"initiator":"([^"]*)".*?"url":"([^"]+)"', log.read_text())
        self.requests = [url for by, url in found if by != "not an origin" and not url.startswith(("file:", "data:"))]

    def body(self, name: str) -> str:
        found = re.search(rf'<body[^>]* data-{name}="([^"]*)"', self.dom)
        assert found is not None, f"no data-{name}"
        return found[1]

    def text(self, key: str) -> str:
        found = re.search(rf'id="{key}"[^>]*>([^<]*)<', self.dom)
        assert found is not None, f"no element {key}"
        return found[1]


@needs_browser
def test_the_page_opens_without_errors_and_shows_what_ran(answered, tmp_path):
    pruning, picture, processor = answered
    page = pruning.report(tmp_path / "a.html", picture, processor=processor, timings={"time to first token": 0.25})
    opened = Opened(page, tmp_path)
    assert opened.console == []
    assert opened.requests == []
    assert opened.body("ready") == "yes"
    assert opened.body("kept") == "12"
    assert opened.text("shown") == "20 %, which ran: 12 of 64 visual tokens"
    assert opened.text("caption-0-0") == "kept 12 of 64"
    assert opened.text("count-0") == "12"
    assert opened.text("share-0") == "18.8 %"
    assert "which digit is red ?" in opened.dom
    assert "0.25 s" in opened.dom


@needs_browser
def test_the_slider_shows_what_another_ratio_keeps(answered, tmp_path):
    pruning, picture, _ = answered
    page = pruning.report(tmp_path / "a.html", picture)
    opened = Opened(page, tmp_path, "#keep=0.5")
    assert opened.console == []
    assert opened.body("kept") == "32"
    assert 'aria-valuetext="50 %: 32 of 64 visual tokens"' in opened.dom
    assert re.search(r'<canvas id="kept-0-0"[^>]*aria-label="[^"]*kept 32 of 64 tokens"', opened.dom)
    sample = pruning.stats.samples[0]
    text = sample.prompt_tokens_before - sample.visual_tokens_before
    assert opened.text("prompt") == f"{text + 64} before, {text + 32} after"
    per_token = kv_bytes(pruning._anatomy.text)
    assert opened.text("saved") == f"{readable(32 * per_token)} of {readable((text + 64) * per_token)}"


@needs_browser
def test_a_page_of_a_video_and_of_an_unknown_geometry_opens(tmp_path):
    model = qwen_vl()
    inputs = qwen_batch(question([Picture(2, 3, 4), Picture(4, 6)]))
    page = pruned(model, inputs, 0.3, "divprune").report(
        tmp_path / "video.html", [[noise(30, 20, seed) for seed in range(8)], noise(60, 40)]
    )
    opened = Opened(page, tmp_path)
    assert opened.console == []
    assert opened.dom.count('id="kept-0-') == 4
    assert opened.text("shown") == "14 of 48 visual tokens"
    assert "chooses tokens together" in opened.dom
    order = pruned(tiny_model("aria"), batch("aria", question(BY_NAME["aria"].picture)))
    opened = Opened(order.report(tmp_path / "aria.html", noise(30, 30)), tmp_path)
    assert opened.console == []
    assert "learned query" in opened.dom


@needs_browser
def test_the_browser_would_show_an_error_and_a_request_of_the_page(pruning, tmp_path):
    page = pruning.report(tmp_path / "a.html")
    broken = re.sub(r"<meta http-equiv=.*", "", page.read_text()).replace('"use strict";', "nothing.here();")
    page.write_text(broken.replace("<main>", "<main><img alt='' src='http://127.0.0.1:9/x.png'>"))
    opened = Opened(page, tmp_path)
    assert any("nothing is not defined" in line for line in opened.console)
    assert "http://127.0.0.1:9/x.png" in opened.requests


def test_the_page_names_nothing_outside_itself(answered, tmp_path):
    pruning, picture, processor = answered
    page = pruning.report(tmp_path / "a.html", picture, processor=processor).read_text()
    assert page.startswith(MARK)
    links = re.findall(r"(?:src|href)\s*=\s*['\"]([^'\"]*)", page)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page
    assert page.count("<img") == len(re.findall(r"<img[^>]* alt='[^']+'", page))
    assert page.count("<canvas") == len(re.findall(r"<canvas[^>]* aria-label='[^']+'", page))
    assert not re.search(r"\[\[[a-z]+\]\]", page)


@pytest.mark.parametrize("name", [family.model_type for family in TINY])
def test_every_family_is_reported_also_without_a_picture(name, tmp_path):
    picture = BY_NAME[name].picture or Picture(3, 4)
    pruning = pruned(tiny_model(name), batch(name, question(picture)))
    page = pruning.report(tmp_path / "a.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert sum(data["kept"]) == pruning.stats.samples[0].visual_tokens_after
    assert len(data["kept"]) == len(data["heat"]) == len(data["rank"])


@pytest.mark.parametrize("method", ["random", "key_norm", "hawk", "hawk_rope", "fastv"])
@pytest.mark.parametrize("budget", ["shared", "per_image"])
def test_the_slider_keeps_what_a_run_at_that_ratio_keeps(method, budget):
    model = qwen_vl()
    inputs = qwen_batch(question([Picture(4, 6), Picture(3, 5)]), question(Picture(5, 3)))
    options = {"head_weights": "uniform"} if METHODS[method].uses_head_weights else {}
    known = pruned(model, inputs, 0.3, method, budget=budget, **options)._pruned_prompt
    for row in (0, 1):
        values = known.values(row)
        chosen = selections(known.prompt, row, values.kept, values.scores, known.method, 0.3, budget == "per_image")
        assert chosen.why_one is None
        assert [step.label for step in chosen.steps if step.ran] == ["30 %"]
        for step in chosen.steps:
            if step.label in ("10 %", "50 %", "100 %"):
                ratio = float(step.label.split()[0]) / 100
                again = pruned(model, inputs, ratio, method, budget=budget, **options)._pruned_prompt.values(row)
                kept = (chosen.unit >= 0) & (chosen.rank < np.array([*step.counts, 0])[chosen.unit])
                visual = known.prompt.visual[row]
                assert kept[visual].tolist() == again.kept[visual].tolist()


@pytest.mark.parametrize("method", ["divprune", "cdpruner", "dart", "downsample", "hiprune"])
def test_a_method_that_chooses_jointly_shows_only_what_ran(method):
    known = pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))), 0.25, method)._pruned_prompt
    values = known.values(0)
    chosen = selections(known.prompt, 0, values.kept, values.scores, known.method, 0.25, False)
    assert len(chosen.steps) == 1
    assert method in chosen.why_one


def test_scores_that_do_not_explain_the_selection_give_no_slider():
    known = pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))), 0.25)._pruned_prompt
    values = known.values(0)
    chosen = selections(known.prompt, 0, ~values.kept, values.scores, known.method, 0.25, False)
    assert "not what the scores alone would keep" in chosen.why_one


def test_an_int_budget_is_a_step_of_its_own():
    known = pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))), 7)._pruned_prompt
    values = known.values(0)
    chosen = selections(known.prompt, 0, values.kept, values.scores, known.method, 7, False)
    assert [(step.label, step.counts) for step in chosen.steps if step.ran] == [("7 tokens", [7])]
    counts = [sum(step.counts) for step in chosen.steps]
    assert counts == sorted(set(counts))
    assert kept_count(0.5, 24) in counts


def test_cache_bytes_are_those_of_a_real_cache():
    model = qwen_vl()
    inputs = qwen_batch(question(Picture(4, 6)))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(model.model.language_model) * inputs["input_ids"].shape[1] == size
    assert kv_bytes(tiny_model("kimi_k25").model.language_model) is None


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 30, "5 GiB")]
)
def test_bytes_are_readable(count, text):
    assert readable(count) == text


def test_what_a_caller_writes_is_text_and_never_markup(pruning, tmp_path):
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return "</script><script>alert(1)</script> [[data]] & 'quotes'"

    page = pruning.report(tmp_path / "a.html", processor=Tokenizer(), timings={"<b>": 1.0}).read_text()
    assert "<script>alert" not in page
    assert "&lt;/script&gt;" in page
    assert "[[data]]" in page
    assert "&lt;b&gt;" in page


def test_an_earlier_report_is_replaced_and_nothing_else_is(pruning, tmp_path):
    page = pruning.report(tmp_path / "a.html")
    first = page.read_text()
    assert pruning.report(str(page), noise(60, 40)) == page
    assert page.read_text() != first
    for name, content in (
        ("note.txt", b"mine"),
        ("picture.png", b"\x89PNG"),
        ("empty.html", b""),
        ("other.html", b"<!doctype html>"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="path: expected a new name or an earlier report, got a file that is no"):
            pruning.report(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.html").symlink_to(page)
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("folder", "a folder"), ("link.html", "a link"), ("pipe", "no regular file")):
        with pytest.raises(ValueError, match=f"got {what}, .*; choose another name"):
            pruning.report(tmp_path / name)
    with pytest.raises(ValueError, match="expected a file in a folder that exists"):
        pruning.report(tmp_path / "missing" / "a.html")
    with pytest.raises(TypeError, match="path: expected the name of a file, got int"):
        pruning.report(3)


def test_a_report_that_cannot_be_written_leaves_what_was_there(pruning, tmp_path, monkeypatch):
    page = pruning.report(tmp_path / "a.html")
    before = page.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reports.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        pruning.report(page, noise(60, 40))
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_a_report_is_readable_as_any_new_file_is(pruning, tmp_path):
    page = pruning.report(tmp_path / "a.html")
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(page.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_nothing_is_written_where_there_is_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="cannot draw a prompt before one with images was pruned"):
        prune(qwen_vl(), 0.5, method="random").report(tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize("timings", [[1.0], {"prefill": "fast"}, {"prefill": True}])
def test_timings_are_seconds_by_name(pruning, tmp_path, timings):
    with pytest.raises(TypeError, match="timings: expected seconds"):
        pruning.report(tmp_path / "a.html", timings=timings)
