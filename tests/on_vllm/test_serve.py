"""`vllm serve` with the plugin: what a user types, and what the server tells about a prompt's length."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

from tests.on_vllm.conftest import ROOT
from tests.on_vllm.engine import CPU_WORKER, settings
from tests.on_vllm.questions import questions

COMMAND = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
OVERRIDES = {
    "architectures": ["HawkQwen2_5_VLForConditionalGeneration"],
    "hawk": {"method": "hawk", "head_weights": "tinyvqa"},
}
COMMON = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--hf-overrides", json.dumps(OVERRIDES)]


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log_file = tmp_path_factory.mktemp("serve") / "log"
    arguments = [folder, *COMMON, "--video-pruning-rate", "0.8", "--worker-cls", CPU_WORKER]
    arguments += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "tinyvqa"]
    with log_file.open("w") as log:
        server = subprocess.Popen(
            [*COMMAND, *arguments], cwd=ROOT, env={**os.environ, **settings()}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while not _is_up(url):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(log_file.read_text()[-6000:])
            time.sleep(1)
        yield url
    finally:
        # its engine is a child of it, in the same process group
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def _is_up(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(url, one):
    content = [{"type": "text", "text": one.text}]
    for picture in reversed(one.pictures):
        data = io.BytesIO()
        picture.save(data, "PNG")
        encoded = base64.b64encode(data.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}})
    body = {
        "model": "tinyvqa",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 3,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_a_server_answers_and_counts_the_tokens_that_stay(address, expected):
    from hawk_kernels.checkpoint import TINY_MODEL, load_processor
    from hawk_kernels.methods import METHODS
    from tests.on_vllm.oracle import OfEachPicture

    asked = questions(4)
    wanted = expected(0.2, OfEachPicture(METHODS["hawk"]()), of_each_kind=4, head_weights="tinyvqa")
    tokenizer = load_processor(str(TINY_MODEL)).tokenizer
    replies = [ask(address, one) for one in asked]
    assert [reply["usage"]["prompt_tokens"] for reply in replies] == [answer["prompt"] for answer in wanted]
    said = [reply["choices"][0]["message"]["content"].strip() for reply in replies]
    assert said == [tokenizer.decode(answer["ids"], skip_special_tokens=True).strip() for answer in wanted]


def test_a_server_says_that_the_pruning_rate_is_missing(folder):
    ended = subprocess.run(
        [*COMMAND, folder, *COMMON, "--worker-cls", CPU_WORKER], cwd=ROOT, env={**os.environ, **settings()},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "pass --video-pruning-rate 0.8" in ended.stdout + ended.stderr


def test_the_worker_that_leaves_pruning_off_is_refused():
    from vllm.platforms import current_platform

    from hawk_kernels.vllm.models import check_worker

    assert current_platform.is_cpu()
    check_worker(CPU_WORKER)
    with pytest.raises(ValueError, match=f"pass --worker-cls {CPU_WORKER}"):
        check_worker("vllm.v1.worker.cpu_worker.CPUWorker")
