"""Write the operators as a kernel of the Hugging Face kernel hub: `python -m bench.hub`, or `make hub`.

`kernels` loads the result, from this folder with `kernels.get_local_kernel` and after an upload with
`kernels.get_kernel`. It holds a `build.toml`, the sources under `torch-ext`, and a copy of them for each backend under
`build`; the copies differ only in their metadata, since Triton compiles on the user's machine. A copy is imported under
the name that its metadata gives, possibly beside `hawk_kernels` itself, so its imports are made relative, and the
namespace of its operators follows from that name. It has the operators only: `prune` needs transformers, on which a
kernel of the hub may not depend.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import hawk_kernels
from bench import cli

PACKAGE = Path(hawk_kernels.__file__).parent
NAME = "hawk-kernels"
MODULE = NAME.replace("-", "_")
SUMMARY = "Score, select and compact the visual tokens of vision-language models."
BACKENDS = ("cpu", "cuda", "rocm")
LICENSE = "apache-2.0"
VERSION = 1
"""The version of the kernel's interface, which the hub counts separately from that of the package."""

OUT = Path("dist/hub")
_METADATA = "metadata.json"
_BUILD = "build.toml"
_ID_DIGITS = 7


class HubError(Exception):
    """A kernel that cannot be written, or one that is not what was written; the message says why."""


def sources() -> dict[str, str]:
    """Return the files of the kernel by their paths, with relative imports.

    Raises:
        HubError: a file imports a part of the package that the kernel does not have.
    """
    exported: dict[str, str] = hawk_kernels._FROM_TORCH
    entries = {module.split(".")[1] for module in exported.values()} | {"merge_checks", "ranking", "validation"}
    paths = [PACKAGE / f"{entry}.py" for entry in entries if (PACKAGE / f"{entry}.py").is_file()]
    paths += [path for folder in ("ops", "backends") for path in (PACKAGE / folder).rglob("*.py")]
    names = sorted(path.relative_to(PACKAGE).as_posix() for path in paths)
    files = {name: with_relative_imports((PACKAGE / name).read_text(), name, names) for name in names}
    files["__init__.py"] = _init(exported)
    for table in (PACKAGE / "backends/kernels/tables").glob("*.json"):
        files[table.relative_to(PACKAGE).as_posix()] = table.read_text()
    return dict(sorted(files.items()))


def with_relative_imports(text: str, name: str, names: Sequence[str]) -> str:
    """Return a module whose imports of this package are relative.

    Args:
        text: the module.
        name: its path inside the package.
        names: the paths of all modules that the kernel has.

    Raises:
        HubError: it imports another module of the package, or the package as a whole.
    """
    lines = text.splitlines(keepends=True)
    here = name.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise HubError(f"{name}: cannot make line {node.lineno} relative; write `from {MODULE}... import ...`")
        if not isinstance(node, ast.ImportFrom) or node.level or not _is_ours(node.module or ""):
            continue
        assert node.module is not None
        there = node.module.split(".")[1:]
        path = "/".join(there)
        if f"{path}.py" not in names and f"{path}/__init__.py" not in names:
            raise HubError(f"{name}: imports {node.module}, which is not part of the kernel; add it to bench.hub")
        shared = 0
        while shared < min(len(here), len(there)) and here[shared] == there[shared]:
            shared += 1
        relative = "." * (len(here) - shared + 1) + ".".join(there[shared:])
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from {relative} import", 1)
    return "".join(lines)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == MODULE


def _init(exported: Mapping[str, str]) -> str:
    imports = sorted((module.removeprefix(MODULE), name) for name, module in exported.items())
    lines = [f'"""{SUMMARY}"""', "", *(f"from {module} import {name}" for module, name in imports), ""]
    lines += [f'__version__ = "{hawk_kernels.__version__}"', "__all__ = ["]
    return "\n".join([*lines, *(f'    "{name}",' for name in sorted(exported)), "]", ""])


def write_hub(out: Path) -> list[Path]:
    """Write the kernel and return the folders of its builds.

    Args:
        out: a new folder, or one that an earlier call wrote, which is replaced.

    Raises:
        HubError: the folder holds something else, or the sources are not complete.
    """
    if out.exists() and any(out.iterdir()) and not (out / _BUILD).is_file():
        raise HubError(f"--out: expected a new folder or one written before, got {out}, which holds other files")
    files = sources()
    shutil.rmtree(out, ignore_errors=True)
    _write(out / "torch-ext" / MODULE, files)
    _write(out, {_BUILD: _build_toml(), "README.md": _readme()})
    digests = {name: _digest(text.encode()) for name, text in files.items()}
    unique = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:_ID_DIGITS]
    builds = []
    for backend in BACKENDS:
        metadata = {
            "name": NAME,
            "id": f"_{MODULE}_{backend}_{unique}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        builds.append(out / "build" / f"torch-{backend}")
        _write(builds[-1], {**files, _METADATA: json.dumps(metadata, indent=2) + "\n"})
    return builds


def check_build(folder: Path) -> None:
    """Check that a build holds the files that its metadata lists, with these digests, and no others.

    `kernels` compares them with a signature only, not when it loads a folder.

    Raises:
        HubError: it does not; the message names the files.
    """
    try:
        digest = json.loads((folder / _METADATA).read_text())["digest"]
        algorithm, expected = digest["algorithm"], dict(digest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HubError(
            f"{folder}: expected a build with digests in {_METADATA}, got {error!r}; write it anew"
        ) from error
    if algorithm != "sha256":
        raise HubError(f"{folder}: expected digests by sha256, got {algorithm!r}; write it anew")
    found = {
        path.relative_to(folder).as_posix(): _digest(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path != folder / _METADATA
    }
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    faults += [f"{name} was changed" for name in sorted(expected) if name in found and found[name] != expected[name]]
    if faults:
        raise HubError(f"{folder}: the files are not those that were written ({', '.join(faults)}); write it anew")


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _build_toml() -> str:
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return (
        f'[general]\nname = "{NAME}"\nversion = {VERSION}\nedition = 5\nlicense = "{LICENSE}"\n'
        f"backends = [{backends}]\npython-depends = []\n\n[torch-noarch]\n"
    )


def _readme() -> str:
    return (
        f"---\nlibrary_name: kernels\nlicense: {LICENSE}\n---\n\n# {NAME}\n\n{SUMMARY}\n\n"
        "```python\nfrom pathlib import Path\n\nfrom kernels import get_local_kernel\n\n"
        f'{MODULE} = get_local_kernel(Path("."))\n'
        f"kept = {MODULE}.score_and_select(queries, keys, head_weights, 0.2)\n```\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the kernel, or check the builds of one; 0 on success, 1 with a message on stderr."""
    parser = cli.parser("bench.hub", __doc__)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the kernel (default: {OUT})")
    parser.add_argument(
        "--check", action="store_true", help="compare the builds there with their digests, write nothing"
    )
    args = parser.parse_args(argv)
    try:
        builds = [args.out / "build" / f"torch-{name}" for name in BACKENDS] if args.check else write_hub(args.out)
        for build in builds:
            check_build(build)
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(builds)} builds, {', '.join(build.name for build in builds)}; their files are as written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
