"""The kernel for the hub: complete, importable by itself, equal to the package, and listed by its digests."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hawk_kernels
from bench import hub

OPERATORS = (
    "score_and_select",
    "score_tokens",
    "score_peaks",
    "select_topk",
    "compact",
    "greedy_max_min",
    "greedy_dpp",
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub.write_hub(folder)
    return folder


@pytest.fixture
def own_kernel(tmp_path):
    """One that a test may spoil."""
    hub.write_hub(tmp_path / "kernel")
    return tmp_path / "kernel"


@pytest.fixture(scope="module")
def loaded(kernel):
    """The CPU build, imported as `kernels` imports one."""
    build = kernel / "build/torch-cpu"
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for imported in [entry for entry in sys.modules if entry.partition(".")[0] == name]:
        del sys.modules[imported]


def calls(seed=0):
    """Arguments of each operator, with ties and rows of their own lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, w = draw(2, 4, 5, 16), draw(2, 2, 37, 16), draw(4).softmax(0)
    mask = torch.rand(2, 37, generator=generator) < 0.8
    scores = draw(2, 37).round()
    embeds, keep = draw(2, 9, 8), torch.rand(2, 9, generator=generator) < 0.5
    return {
        "score_and_select": ((q, k, w, 0.3), {"k_mask": mask, "normalize": "l2"}),
        "score_tokens": ((q, k, w), {"normalize": "softmax"}),
        "score_peaks": ((q, k, w), {}),
        "select_topk": ((scores, 0.2), {"mask": mask}),
        "compact": ((embeds, keep), {}),
        "greedy_max_min": ((draw(2, 21, 8), 0.4), {}),
        "greedy_dpp": ((draw(2, 21, 8), torch.rand(2, 21, generator=generator), 0.4), {}),
    }


def assert_same_bits(one, other):
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.cpu().numpy().tobytes() == other.cpu().numpy().tobytes()
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same_bits(left, right)
    else:
        assert one == other


def assert_equals_the_package(module):
    for name, (arguments, options) in calls().items():
        assert_same_bits(
            getattr(module, name)(*arguments, **options), getattr(hawk_kernels, name)(*arguments, **options)
        )
        # what torch.compile and export call
        assert getattr(module, name) is not getattr(hawk_kernels, name)


def test_it_has_the_public_names_of_the_operators(loaded):
    assert set(loaded.__all__) == set(hawk_kernels._FROM_TORCH)
    assert all(hasattr(loaded, name) for name in loaded.__all__)
    assert loaded.__version__ == hawk_kernels.__version__


def test_it_equals_the_package_bit_for_bit(loaded):
    assert_equals_the_package(loaded)


def test_its_triton_backend_equals_that_of_the_package(loaded, device, monkeypatch):
    embeds, keep = (tensor.to(device) for tensor in calls()["compact"][0])
    mine = loaded.compact(embeds, keep, backend="triton")
    assert_same_bits(tuple(mine), tuple(hawk_kernels.compact(embeds, keep, backend="triton")))
    assert f"{loaded.__name__}.backends.kernels.compact" in sys.modules
    loaded.free_workspaces(), hawk_kernels.free_workspaces()
    # each frees the memory of its own kernels
    for package, kept in (("hawk_kernels", 1024), (loaded.__name__, 4096)):
        launch = sys.modules[f"{package}.backends.kernels.launch"]
        monkeypatch.setattr(launch, "free_kept_memory", lambda kept=kept: kept)
    assert (loaded.free_workspaces(), hawk_kernels.free_workspaces()) == (4096, 1024)


def test_its_operators_have_a_namespace_of_their_own(loaded):
    own = getattr(torch.ops, loaded.__name__)
    assert hasattr(own, "select_topk")
    assert own.select_topk is not torch.ops.hawk_kernels.select_topk
    ids = [json.loads((hub_build / "metadata.json").read_text())["id"] for hub_build in builds_of(loaded)]
    assert len(set(ids)) == len(hub.BACKENDS)
    assert loaded.__name__ in ids


def builds_of(module):
    return sorted(Path(module.__file__).parent.parent.iterdir())


def test_it_imports_without_the_package_without_numpy_and_without_transformers(kernel):
    program = """
import importlib.util, sys
for absent in ("hawk_kernels", "transformers", "numpy", "PIL"):
    sys.modules[absent] = None
import warnings; warnings.simplefilter("ignore")
spec = importlib.util.spec_from_file_location("_alone", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["_alone"] = module
spec.loader.exec_module(module)
import torch
print(module.select_topk.__module__, torch.ops._alone.select_topk)
"""
    command = [sys.executable, "-c", program, str(kernel / "build/torch-cuda/__init__.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=kernel)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_alone.ops.select_topk", "_alone.select_topk"]


def test_every_build_holds_the_sources_and_their_digests(kernel):
    source = {path.relative_to(kernel / "torch-ext/hawk_kernels"): path for path in kernel.rglob("torch-ext/**/*.*")}
    source = {name: path.read_bytes() for name, path in source.items() if path.is_file()}
    for backend in hub.BACKENDS:
        build = kernel / f"build/torch-{backend}"
        metadata = json.loads((build / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["python-depends"] == []
        assert set(metadata["digest"]["files"]) == {str(name) for name in source}
        assert all((build / name).read_bytes() == content for name, content in source.items())
        hub.check_build(build)
    assert "edition = 5" in (kernel / "build.toml").read_text()
    assert "[torch-noarch]" in (kernel / "build.toml").read_text()


def test_another_file_gives_another_id(kernel, own_kernel, monkeypatch):
    def id_of(folder):
        return json.loads((folder / "build/torch-cpu/metadata.json").read_text())["id"]

    assert id_of(own_kernel) == id_of(kernel)
    monkeypatch.setattr(hub, "SUMMARY", "Something else.")
    hub.write_hub(own_kernel)
    assert id_of(own_kernel) != id_of(kernel)


def spoil(build, how):
    if how == "changed":
        (build / "ranking.py").write_text((build / "ranking.py").read_text() + "# one byte more\n")
        return "ranking.py was changed"
    if how == "missing":
        (build / "selection.py").unlink()
        return "selection.py is missing"
    (build / "ops/extra.py").write_text("")
    return "ops/extra.py is unknown"


@pytest.mark.parametrize("how", ["changed", "missing", "unknown"])
def test_a_build_that_was_tampered_with_is_refused(own_kernel, how, capsys):
    message = spoil(own_kernel / "build/torch-rocm", how)
    with pytest.raises(hub.HubError, match=message):
        hub.check_build(own_kernel / "build/torch-rocm")
    assert hub.main(["--check", "--out", str(own_kernel)]) == 1
    assert message in capsys.readouterr().err
    # writing again heals it
    assert hub.main(["--out", str(own_kernel)]) == 0
    assert hub.main(["--check", "--out", str(own_kernel)]) == 0


def test_a_build_without_digests_is_refused(own_kernel):
    build = own_kernel / "build/torch-cpu"
    metadata = json.loads((build / "metadata.json").read_text())
    (build / "metadata.json").write_text(json.dumps({**metadata, "digest": {"algorithm": "md5", "files": {}}}))
    with pytest.raises(hub.HubError, match="expected digests by sha256, got 'md5'"):
        hub.check_build(build)
    (build / "metadata.json").unlink()
    with pytest.raises(hub.HubError, match=r"expected a build with digests in metadata\.json"):
        hub.check_build(build)


def test_a_folder_of_other_files_stays(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert hub.main(["--out", str(tmp_path)]) == 1
    assert "which holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("path", "written", "relative"),
    [
        ("ops/a.py", "from hawk_kernels.selection import x", "from ..selection import x"),
        ("ops/a.py", "from hawk_kernels.ops.b import (\n    x,\n)", "from .b import (\n    x,\n)"),
        ("deep/er/a.py", "from hawk_kernels.deep.er import b", "from . import b"),
        ("deep/er/a.py", "def f():\n    from hawk_kernels.ops import b", "def f():\n    from ...ops import b"),
        ("ops/a.py", "from torch import nn\nfrom . import b", "from torch import nn\nfrom . import b"),
    ],
)
def test_imports_become_relative(path, written, relative):
    names = ["selection.py", "ops/__init__.py", "ops/b.py", "deep/er/__init__.py", path]
    assert hub.with_relative_imports(written, path, names) == relative


@pytest.mark.parametrize("line", ["from hawk_kernels.hf.prune import prune", "import hawk_kernels.ops.compact"])
def test_an_import_that_cannot_follow_is_refused(line):
    with pytest.raises(hub.HubError, match=r"^ops/a\.py: "):
        hub.with_relative_imports(line, "ops/a.py", ["ops/a.py"])


def test_nothing_written_is_committed(repository):
    ignored = subprocess.run(["git", "check-ignore", str(hub.OUT)], cwd=repository, capture_output=True, check=False)
    assert ignored.returncode == 0


def needs_kernels():
    return pytest.importorskip("kernels", reason="`make hub` installs the kernels package of the hub, which loads it")


def test_kernels_loads_it_and_it_equals_the_package(kernel, monkeypatch):
    kernels = needs_kernels()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = kernels.get_local_kernel(kernel, backend="cpu")
    assert_equals_the_package(module)
    assert module.__name__ == json.loads((kernel / "build/torch-cpu/metadata.json").read_text())["id"]


def test_kernels_reads_the_configuration_and_agrees_on_the_digests(kernel, own_kernel):
    needs_kernels()
    from kernels import _rust

    # raises an error where build.toml is not of edition 5
    _rust.Build.open(kernel)
    spoil(own_kernel / "build/torch-cuda", "changed")
    for backend in hub.BACKENDS:
        build = kernel / f"build/torch-{backend}"
        digest = _rust.Metadata.read_from_file(build / "metadata.json").digest
        digest.validate(_rust.Digest.hash_variant(_rust.DigestAlgorithm.SHA256, build))
        changed = _rust.Digest.hash_variant(_rust.DigestAlgorithm.SHA256, own_kernel / "build/torch-cuda")
        with pytest.raises(_rust.DigestValidationError):
            digest.validate(changed)
