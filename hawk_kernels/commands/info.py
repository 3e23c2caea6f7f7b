"""`hawk-kernels info`: what is installed here and what a call would run on, for a person or a bug report.

It runs where torch or transformers is missing or broken, and says so: every part is found out on its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Any

from hawk_kernels import __version__
from hawk_kernels.commands.guard import TRACEBACK_VARIABLE

_PACKAGES = ("torch", "triton", "transformers", "numpy", "pillow", "torchvision", "accelerate", "matplotlib")
_IMPORTED = ("torch", "triton", "transformers", "numpy")
_VARIABLES = ("HAWK_KERNELS_CONFIGS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", TRACEBACK_VARIABLE)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="hawk-kernels info",
        description="Show the versions of hawk_kernels and of what it uses, the devices, the backend that a call on "
        "each of them runs on and why, the tuning table in use, the models whose head weights are shipped, and the "
        "model families that prune supports. Runs also where torch or transformers is broken.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return 0 even if a part of it could not be found out, which the report then says."""
    args = build_parser().parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 0


def collect() -> dict[str, Any]:
    """Collect everything that `info` shows, JSON-ready; a part that failed is `{"error": why}`."""
    packages = {name: _package(name) for name in _PACKAGES}
    return {
        "hawk_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": _found(_devices),
        "tuning_tables": _found(_tuning_tables),
        "head_weights": _found(_head_weights),
        "methods": _found(_methods),
        "recipes": _found(_recipes),
        "families": _found(_families),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def describe(report: dict[str, Any]) -> str:
    """Render the report as text."""
    lines = [
        f"hawk_kernels  {report['hawk_kernels']}",
        f"python        {report['python']} on {report['platform']}",
        *(f"{name:<14}{_package_text(name, package)}" for name, package in report["packages"].items()),
        "",
    ]
    sections: tuple[tuple[str, str, Callable[[Any], list[str]]], ...] = (
        ("devices", "devices", lambda found: [f"{d['name']}: backend {d['backend']}, {d['why']}" for d in found]),
        ("tuning_tables", "tuning tables", _table_lines),
        (
            "head_weights",
            "head weights",
            lambda found: [f"{w['name']}: {w['model']}, {w['num_heads']} heads" for w in found],
        ),
        ("methods", "methods", lambda found: [", ".join(found)]),
        ("recipes", "recipes", lambda found: [", ".join(found)]),
        ("families", "families", lambda found: [", ".join(found)]),
        (
            "environment",
            "environment",
            lambda found: [f"{name}={value}" for name, value in found.items()] or ["nothing set"],
        ),
    )
    for key, title, text in sections:
        found = report[key]
        entries = [f"unknown: {found['error']}"] if isinstance(found, dict) and set(found) == {"error"} else text(found)
        lines += [f"{title}:", *(f"  {entry}" for entry in entries)]
    return "\n".join(lines)


def _found(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken package may raise anything, SystemExit included
        return {"error": _reason(error)}


def _package(name: str) -> dict[str, str]:
    try:
        package = {"version": metadata.version(name)}
    except metadata.PackageNotFoundError:
        package = {}
    if name in _IMPORTED:
        try:
            module = import_module(name)
            package.setdefault("version", str(getattr(module, "__version__", "unknown")))
        except ModuleNotFoundError as error:
            if error.name == name and not package:
                return {}
            package["error"] = _reason(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a broken package may raise anything, SystemExit included
            package["error"] = _reason(error)
    return package


def _package_text(name: str, package: dict[str, str]) -> str:
    if not package:
        return f"not installed (pip install {name})"
    version = package.get("version", "unknown version")
    return f"{version}, but it does not import: {package['error']}" if "error" in package else version


def _devices() -> list[dict[str, str]]:
    import torch

    found = [_device(torch.device("cpu"), f"cpu ({os.cpu_count()} cores)")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append(_device(torch.device("cuda", index), f"cuda:{index} ({properties.name}, {memory})"))
    if torch.backends.mps.is_available():
        found.append(_device(torch.device("mps"), "mps"))
    return found


def _device(device: Any, name: str) -> dict[str, str]:
    from hawk_kernels.backends.choose import choose_backend

    backend = choose_backend(None, device)
    if backend == "triton":
        why = "a GPU with Triton installed"
    elif device.type == "cuda":
        why = "Triton is not installed: pip install triton"
    elif device.type == "cpu":
        why = "Triton needs a GPU"
    else:
        why = f"Triton has no code for {device.type}"
    return {"name": name, "backend": backend, "why": why}


def _tuning_tables() -> dict[str, Any]:
    import torch

    from hawk_kernels.backends.kernels import configs

    own = os.environ.get(configs.TABLE_VARIABLE)
    used = {}
    for index in range(torch.cuda.device_count()):
        architecture = configs.architecture_of(torch.device("cuda", index))
        table = architecture
        if architecture not in configs.committed_architectures():
            table = configs.nearest_architecture(architecture)
        used[f"cuda:{index}"] = {"architecture": architecture, "table": table}
    return {"shipped": configs.committed_architectures(), "in_use": used, "own": _own_table(own) if own else None}


def _own_table(path: str) -> dict[str, str]:
    from pathlib import Path

    from hawk_kernels.backends.kernels.configs import load_table

    try:
        return {"path": path, "architecture": load_table(Path(path).expanduser()).architecture}
    except ValueError as error:
        return {"path": path, "error": _reason(error)}


def _table_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"shipped: {', '.join(found['shipped'])}"]
    for device, entry in found["in_use"].items():
        lines.append(f"{device}: {entry['architecture']} uses the table of {entry['table']}")
    if not found["in_use"]:
        lines.append("in use: none, since there is no GPU")
    if found["own"]:
        own = found["own"]
        lines.append(f"HAWK_KERNELS_CONFIGS: {own['path']}, {own.get('error') or 'for ' + own['architecture']}")
    return lines


def _head_weights() -> list[dict[str, Any]]:
    from hawk_kernels.head_weights import read_weights_file, shipped_weights

    contents = {name: read_weights_file(path) for name, path in shipped_weights().items()}
    return [
        {"name": name, "model": content.get("model", "unknown"), "num_heads": len(content["weights"])}
        for name, content in contents.items()
    ]


def _methods() -> list[str]:
    from hawk_kernels.methods import METHODS

    return list(METHODS)


def _recipes() -> list[str]:
    from hawk_kernels.recipes import RECIPES

    return list(RECIPES)


def _families() -> list[str]:
    from hawk_kernels.hf.families import FAMILIES

    return [family.model_type for family in FAMILIES]


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    from hawk_kernels.commands.guard import run_guarded

    sys.exit(run_guarded(main, is_process=True))
