"""What a number depends on, and where it is written."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """Collect device, driver, versions, commit and date, which are stored with every number."""
    about: dict[str, Any] = {"device": device_name(device), "date": _now()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(l2_bytes(device) / 2**20, 1),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "cuda": torch.version.cuda,
        }
    return about | {
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "triton", "transformers")},
        "commit": _output("git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD") or None,
        "changed": bool(_output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--", "hawk_kernels", "bench")),
        "source": source_digest(),
    }


def device_name(device: torch.device) -> str:
    """Return the vendor's name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return models[0].strip() if models else platform.processor() or platform.machine()


def results_folder(device: torch.device) -> Path:
    """Return the folder of a device, such as `bench/results/nvidia-h200` or `bench/results/cpu-amd-epyc`."""
    prefix = "" if device.type == "cuda" else f"{device.type}-"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", prefix + device_name(device).lower()).strip("-")


def l2_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache; 64 MiB if torch does not know it."""
    if device.type != "cuda":
        return 2**26
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26


def source_digest() -> str:
    """Identify the code that was measured, also in a copy that is no git checkout."""
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "hawk_kernels").rglob("*.py")):
        digest.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def write_json(path: Path, content: Any) -> None:
    """Replace a file in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """Return what a command prints; nothing if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""
