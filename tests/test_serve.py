"""`hawk-kernels serve`: concurrent streams answer as `prune` does, and what the command says without its packages."""

import base64
import builtins
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from transformers import AutoModelForImageTextToText, pipeline  # noqa: E402
from transformers.utils.import_utils import is_accelerate_available, is_serve_available  # noqa: E402

from hawk_kernels import prune  # noqa: E402
from hawk_kernels.__main__ import main  # noqa: E402
from hawk_kernels.checkpoint import TINY_MODEL, load_processor  # noqa: E402
from hawk_kernels.commands import serve  # noqa: E402

SAMPLES = TINY_MODEL / "samples"
STREAMS, NEW_TOKENS = 12, 4
# keeps so little by the question that most answers are other words than those of the whole pictures
KEEP, OPTIONS = 0.05, {"method": "hawk", "head_weights": "uniform"}
needs_server = pytest.mark.skipif(
    not (is_serve_available() and is_accelerate_available()), reason="needs pip install 'transformers[serving]'"
)


def questions():
    """Twelve pairs of a picture's path and a question about a digit in it."""
    found = []
    for name, told in json.loads((SAMPLES / "samples.json").read_text()).items():
        colours = [thing["colour"] for thing in told["objects"] if "digit" in thing]
        found += [(SAMPLES / name, f"which digit is {colour} ?") for colour in colours]
    return found[:STREAMS]


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(TINY_MODEL))


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()


def turn(path, text):
    content = [{"type": "image", "image": Image.open(path).convert("RGB")}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def generated(model, processor, path, text):
    """The token ids that `generate` adds, greedily."""
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([turn(path, text)], **template)
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def text_of(processor, answers):
    return [processor.decode(ids, skip_special_tokens=True).strip() for ids in answers]


@pytest.fixture(scope="module")
def expected(model, processor):
    """The answers of `prune` and `generate` to the twelve questions, as token ids."""
    with prune(model, KEEP, **OPTIONS):
        found = [generated(model, processor, *one) for one in questions()]
    whole = [generated(model, processor, *one) for one in questions()]
    assert sum(a != b for a, b in zip(found, whole, strict=True)) > STREAMS // 2
    return found


def test_a_pipeline_inside_prune_answers_as_generate_does(model, processor, expected):
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    with prune(answer.model, KEEP, **OPTIONS) as pruning:
        replies = [answer(text=[turn(*one)], generate_kwargs=greedy, return_tensors=True) for one in questions()]
    found = [
        reply["generated_token_ids"].tolist()[-len(ids) :] for (reply,), ids in zip(replies, expected, strict=True)
    ]
    assert found == expected
    assert pruning.totals.prompts == STREAMS


@pytest.fixture(scope="module")
def address(repository, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(part for part in (str(repository), os.environ.get("PYTHONPATH")) if part)
    words = [str(TINY_MODEL), "--keep-ratio", str(KEEP), "--method", OPTIONS["method"]]
    words += ["--option", f"head_weights={OPTIONS['head_weights']}", "--dtype", "float32", "--device", "cpu"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as written:
        server = subprocess.Popen(
            [sys.executable, "-m", "hawk_kernels", "serve", *words],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=written,
            stderr=written,
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while not is_up(url):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(log.read_text()[-3000:])
            time.sleep(0.5)
        yield url
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 130, log.read_text()[-3000:]
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()
        server.wait()


def is_up(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def post(url, **body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=180)


def ask(url, path, text, **more):
    picture = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return post(f"{url}/v1/chat/completions", messages=messages, temperature=0, max_tokens=NEW_TOKENS, **more)


def streamed(url, path, text):
    """The words that the server streams, joined."""
    said = []
    with ask(url, path, text, stream=True) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[len(b"data: ") :])["choices"]
                said.append(choice["delta"].get("content") or "")
    return "".join(said).strip()


@needs_server
def test_twelve_concurrent_streams_answer_as_prune_and_generate_do(address, processor, expected):
    with ThreadPoolExecutor(STREAMS) as pool:
        replies = list(pool.map(lambda one: streamed(address, *one), questions()))
    assert replies == text_of(processor, expected)


@needs_server
def test_an_answer_in_one_piece_is_the_same_and_counts_the_prompt_before_pruning(address, processor, expected):
    with ask(address, *questions()[0]) as reply:
        told = json.load(reply)
    assert told["choices"][0]["message"]["content"].strip() == text_of(processor, expected)[0]
    assert told["usage"]["prompt_tokens"] > 64


@needs_server
def test_a_model_that_the_server_loads_again_is_pruned_too(address, processor, expected):
    assert post(f"{address}/reset").status == 200
    replies = [streamed(address, *one) for one in questions()[:4]]
    assert replies == text_of(processor, expected)[:4]


def failed(capsys, *words):
    """The line on stderr of a command that ends with 1."""
    assert main(["serve", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


@pytest.fixture
def without_fastapi(monkeypatch):
    whole = builtins.__import__

    def importing(name, *more, **options):
        if name == "fastapi":
            raise ModuleNotFoundError("No module named 'fastapi'", name=name)
        return whole(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_a_missing_package_is_named_with_what_installs_everything(without_fastapi, capsys, monkeypatch):
    monkeypatch.setattr(serve, "_serve", lambda _: pytest.fail("served"))
    line = failed(capsys, str(TINY_MODEL))
    assert line.startswith("error: serve needs fastapi")
    assert "not installed here: pip install fastapi" in line
    assert line.endswith("pip install 'transformers[serving]'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--option", "l2"], "--option: expected NAME=VALUE, got 'l2'"),
        (["--method", "magic"], "expected one of 'cdpruner'"),
        (["--option", "magic=1"], "method 'hawk' has no option 'magic'"),
    ],
)
def test_a_wrong_argument_ends_in_one_line_before_the_model_is_loaded(words, message, capsys, monkeypatch):
    from transformers.cli.serving.model_manager import ModelManager

    monkeypatch.setattr(serve, "need_packages", lambda *_: None)
    monkeypatch.setattr(ModelManager, "load_model_and_processor", lambda *_, **__: pytest.fail("loaded"))
    assert message in failed(capsys, str(TINY_MODEL), *words)


def test_help_needs_no_server_packages(without_fastapi, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--keep-ratio", "--method", "--option", "--host", "--port"))
