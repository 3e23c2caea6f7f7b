"""Writes one HTML page about a pruned prompt, which loads no other file."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
import re
import stat
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hawk_kernels.pictures.overlay import RowValues, sheet_picture
from hawk_kernels.pictures.pruned import PrunedPrompt, read
from hawk_kernels.pictures.ratios import Selections, selections
from hawk_kernels.pictures.regions import Regions
from hawk_kernels.viz import heat_colour

if TYPE_CHECKING:
    from PIL import Image

MARK = "<!doctype html>\n<!-- hawk_kernels report -->\n"
"""How every report begins; what does not begin so is never replaced."""


def write_report(
    pruned: PrunedPrompt | None,
    path: str | Path,
    image: Any = None,
    *,
    row: int = 0,
    processor: Any = None,
    timings: Mapping[str, float] | None = None,
) -> Path:
    """Write the page about a row of the last prefill.

    Args:
        pruned: the last prefill.
        path: of the page; replaces an earlier report, and nothing else.
        image: what the processor got for the row, as for `overlay`; without it tokens are shown on blank grids.
        row: of the batch, as the model saw it.
        processor: the one that made the inputs, or a tokenizer; tells what was asked.
        timings: seconds by name, shown as they are.

    Returns:
        the path.

    Raises:
        ValueError: nothing was pruned yet, a picture that cannot be the encoded one, or a path that holds something
            else than a report.
        TypeError: an argument of another type.
        OSError: the page cannot be written; what was there before stays.
    """
    known = read(pruned)
    target = _checked_target(path)
    row = known.checked_row(row)
    _check_timings(timings)
    page = _page(known, known.regions(image, row, processor), row, processor, timings or {})
    _replace(target, page)
    return target


def _checked_target(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected the name of a file, got {type(path).__name__}; use 'report.html'")
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path: expected a file in a folder that exists, got {target}; make the folder first")
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return target
    came = None
    if not stat.S_ISREG(mode):
        came = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "no regular file"
    else:
        with target.open("rb") as file:
            if file.read(len(MARK)) != MARK.encode():
                came = "a file that is no report"
    if came is not None:
        raise ValueError(f"path: expected a new name or an earlier report, got {came}, {target}; choose another name")
    return target


def _check_timings(timings: Mapping[str, float] | None) -> None:
    if timings is not None and not isinstance(timings, Mapping):
        raise TypeError(f"timings: expected seconds by name, got {type(timings).__name__}; use {{'prefill': 0.12}}")
    for name, seconds in (timings or {}).items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise TypeError(
                f"timings: expected seconds as numbers, got {type(seconds).__name__} for {name!r}; use floats"
            )


def _replace(target: Path, page: str) -> None:
    """Write beside the target, then rename: a reader sees the old page or the new one, never a part."""
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)
        os.replace(beside, target)
    except BaseException:  # Ctrl-C leaves no half-written file behind either
        Path(beside).unlink(missing_ok=True)
        raise


def _page(known: PrunedPrompt, regions: list[Regions], row: int, processor: Any, timings: Mapping[str, float]) -> str:
    values, stats = known.values(row), known.stats
    prompt, sample = known.prompt, stats.samples[row]
    chosen = selections(
        prompt, row, values.kept, values.scores, known.method, stats.keep_ratio, stats.budget != "shared"
    )
    positions = np.concatenate([image.positions for image in regions])
    bytes_per_token = None if _is_inside(known) else kv_bytes(known.anatomy.text)
    data = {
        **_tokens(positions, values, chosen),
        "palette": ["rgb({},{},{})".format(*heat_colour(level / 63)) for level in range(64)],
        "images": [_image_data(image, positions) for image in regions],
        "steps": [{"label": s.label, "counts": s.counts, "ran": s.ran} for s in chosen.steps],
        "text": sample.prompt_tokens_before - sample.visual_tokens_before,
        "bytes": bytes_per_token,
    }
    question = _question(known, row, processor)
    after, before = sample.visual_tokens_after, sample.visual_tokens_before
    parts = {
        "title": html.escape(f"{stats.method} kept {after} of {before} visual tokens"),
        "question": "" if question is None else f"<p class='question'>{html.escape(question)}</p>",
        "summary": _summary(known, row),
        "slider": _slider(chosen),
        "images": "".join(_image_html(number, image) for number, image in enumerate(regions)),
        "facts": _facts(known, row, bytes_per_token),
        "tokens": _token_table(regions),
        "timings": _table("Timings", {name: f"{seconds:.4g} s" for name, seconds in timings.items()})
        if timings
        else "",
        "versions": _table("Versions", versions(known)),
        # a script ends at the first "</", wherever that stands
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    # in one pass, so that what a caller writes is never taken for a place of the template
    filled = re.sub(r"\[\[(\w+)\]\]", lambda place: parts[place[1]], template)
    return MARK + filled


def _tokens(positions: np.ndarray, values: RowValues, chosen: Selections) -> dict[str, list[int]]:
    whole = RowValues(values.kept, values.scores)
    finite = np.isfinite(whole.scores)
    heat = np.full(len(finite), -1)
    if finite.any():
        scores = whole.scores[finite].astype(np.float64)
        heat[finite] = np.round((scores - scores.min()) / max(float(np.ptp(scores)), 1e-12) * 63)
    return {
        "kept": values.kept[positions].astype(int).tolist(),
        "heat": heat[positions].tolist(),
        "unit": chosen.unit[positions].tolist(),
        "rank": chosen.rank[positions].tolist(),
    }


def _image_data(image: Regions, positions: np.ndarray) -> dict[str, Any]:
    place = {int(position): number for number, position in enumerate(positions)}
    place[-1] = -1
    return {
        "tokens": [place[int(position)] for position in image.positions],
        "sheets": [
            {
                "rows": sheet.tokens.shape[0],
                "columns": sheet.tokens.shape[1],
                "tokens": [place[int(token)] for token in sheet.tokens.ravel()],
            }
            for sheet in image.sheets
        ],
    }


def _image_html(number: int, image: Regions) -> str:
    note = "" if image.note is None else f"<p class='note'>{html.escape(image.note)} Its tokens are drawn in order.</p>"
    is_strip = len({sheet.frame for sheet in image.sheets}) > 1
    sheets = []
    for place, sheet in enumerate(image.sheets):
        picture = sheet_picture(image.frame_of(sheet), sheet, *((240, 320) if is_strip else (480, 800)))
        name, key = html.escape(sheet.name), f"{number}-{place}"
        size = f"width='{picture.width}' height='{picture.height}'"
        alt = f"{html.escape(image.name)}, {name}" + ("" if image.given else ": no picture was given")
        heading = "" if sheet.name == "picture" else f"<h3>{name}</h3>"
        source = f"<img id='picture-{key}' src='{_data_uri(picture)}'"
        shown = f"{source} alt='{alt}, as the model saw it' {size}>"
        if sheet.box is None and image.given is not None:
            # what is drawn on is blank, and beside it stands what was given
            whole = image.given.frames[0].copy()
            whole.thumbnail((800, 800))
            shown = f"<img src='{_data_uri(whole)}' alt='{html.escape(image.name)}'>{source} alt='blank' hidden {size}>"
        sheets.append(
            f"<div class='sheet'>{heading}<div class='panels'>"
            f"<figure>{shown}<figcaption>picture</figcaption></figure>"
            f"<figure><canvas id='heat-{key}' role='img' aria-label='{alt}: scores as heat' {size}></canvas>"
            "<figcaption>scores</figcaption></figure>"
            f"<figure><canvas id='kept-{key}' role='img' aria-label='{alt}: kept tokens' {size}></canvas>"
            f"<figcaption id='caption-{key}'>kept</figcaption></figure></div></div>"
        )
    heading = f"<h2>{html.escape(image.name.capitalize())}</h2>"
    kind = "strip" if is_strip else "still"
    return f"<section class='{kind}'>{heading}{note}{''.join(sheets)}</section>"


def _data_uri(picture: Image.Image) -> str:
    """Encode the picture for the page, as PNG where that is not much larger than JPEG, as for drawings."""
    coded = {}
    for kind, options in (("jpeg", {"quality": 88}), ("png", {"optimize": True})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        coded[kind] = buffer.getvalue()
    kind = "png" if len(coded["png"]) < 1.5 * len(coded["jpeg"]) else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(coded[kind]).decode()}"


def _slider(chosen: Selections) -> str:
    ran = next(number for number, step in enumerate(chosen.steps) if step.ran)
    if chosen.why_one is not None:
        step = html.escape(chosen.steps[0].label)
        return (
            f"<p class='keep'>Keep ratio <strong>{step}</strong>: <output id='shown'></output></p>"
            f"<p class='note'>{html.escape(chosen.why_one)}</p><input id='keep' type='hidden' value='0'>"
        )
    return (
        "<label class='keep' for='keep'>Keep ratio <output id='shown' for='keep'></output></label>"
        f"<input id='keep' type='range' min='0' max='{len(chosen.steps) - 1}' step='1' value='{ran}'>"
        f"<p class='hint'>Drag, or press the arrow keys. "
        f"<button id='back' type='button'>Back to what ran: {html.escape(chosen.steps[ran].label)}</button></p>"
    )


def _summary(known: PrunedPrompt, row: int) -> str:
    sample, stats = known.stats.samples[row], known.stats
    text = f"{stats.model}, row {row + 1} of {len(stats.samples)}."
    if sample.reason:
        text += f" Nothing was dropped: {sample.reason}."
    return html.escape(text)


def _facts(known: PrunedPrompt, row: int, bytes_per_token: int | None) -> str:
    sample, stats = known.stats.samples[row], known.stats
    options = ", ".join(f"{name} = {value}" for name, value in stats.method_options.items())
    dropped = sample.visual_tokens_before - sample.visual_tokens_after
    if _is_inside(known) and stats.cache_bytes_saved is not None:
        saved = f"{readable(stats.cache_bytes_saved)} in all rows together"
    elif bytes_per_token is None:
        saved = "not known for this model's attention"
    else:
        saved = f"{readable(dropped * bytes_per_token)} of {readable(sample.prompt_tokens_before * bytes_per_token)}"
    chosen = {
        "Prompt tokens": f"{sample.prompt_tokens_before} before, {sample.prompt_tokens_after} after",
        "Key-value cache saved": saved,
    }
    facts = {
        "Method": f"{stats.method} ({options})" if options else stats.method,
        "Keep ratio": str(stats.keep_ratio),
        "Budget": f"{stats.budget.replace('_', ' ')}: {sample.budget} tokens",
        "Visual tokens": f"{sample.visual_tokens_before} before, {sample.visual_tokens_after} after",
        "Text that ranked them": f"{sample.query_tokens} tokens ({sample.query_source})",
    }
    if stats.head_weights:
        facts["Head weights"] = stats.head_weights
    if sample.budget_per_image:
        facts[f"Budget of each {stats.budget.removeprefix('per_')}"] = ", ".join(map(str, sample.budget_per_image))
    ids = {"Key-value cache saved": "saved", "Prompt tokens": "prompt"}
    return _table("Prompt and cache at the ratio shown", chosen, ids) + _table("What ran", facts)


def _is_inside(known: PrunedPrompt) -> bool:
    """Tell whether tokens left after some layer, so that layers hold different numbers of them."""
    return any(stage.layer for stage in known.stats.stages)


def _token_table(regions: list[Regions]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(image.name)}</th><td>{len(image.positions)}</td>"
        f"<td id='count-{number}'></td><td id='share-{number}'></td></tr>"
        for number, image in enumerate(regions)
    )
    return (
        "<table><caption>Visual tokens at the ratio shown</caption><thead><tr><th scope='col'>picture</th>"
        "<th scope='col'>before</th><th scope='col'>kept</th><th scope='col'>share</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _table(caption: str, facts: Mapping[str, str], ids: Mapping[str, str] | None = None) -> str:
    rows = []
    for name, value in facts.items():
        key = f" id='{ids[name]}'" if ids and name in ids else ""
        rows.append(f"<tr><th scope='row'>{html.escape(str(name))}</th><td{key}>{html.escape(value)}</td></tr>")
    return f"<table><caption>{html.escape(caption)}</caption><tbody>{''.join(rows)}</tbody></table>"


def _question(known: PrunedPrompt, row: int, processor: Any) -> str | None:
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        return None
    asked = known.prompt.ids[row][known.prompt.query[row]].tolist()
    text = tokenizer.decode(asked, skip_special_tokens=True).strip()
    return text or None


def kv_bytes(text: Any) -> int | None:
    """Count the bytes that one token takes in the key-value cache; None for attention that caches something else.

    Args:
        text: the decoder, with `layers`.
    """
    total = 0
    for layer in text.layers:
        attention = getattr(layer, "self_attn", None)
        if attention is None or getattr(attention, "is_kv_shared_layer", False):
            continue
        projections = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
        if any(not hasattr(projection, "out_features") for projection in projections):
            return None
        total += sum(projection.out_features for projection in projections if projection is not None)
    return total * text.dtype.itemsize if total else None


def readable(count: int) -> str:
    """Write a number of bytes in binary units."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{size:.3g} {unit}"


def versions(known: PrunedPrompt) -> dict[str, str]:
    """List what ran: this package and those below it, and the device."""
    import torch
    import transformers

    from hawk_kernels import __version__

    device = known.keep_mask.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "hawk_kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "Device": f"{device} ({name})",
        "Data type": str(known.anatomy.text.dtype).removeprefix("torch."),
    }
