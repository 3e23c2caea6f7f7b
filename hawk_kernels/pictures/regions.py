"""Finds which part of which picture each visual token of a row stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.sources import Encoded
from hawk_kernels.pictures.entries import Entry, entries_of_row, split_at_text
from hawk_kernels.pictures.families import GEOMETRIES, Geometry
from hawk_kernels.pictures.given import Given
from hawk_kernels.pictures.layouts import Pictured, pixel_shape
from hawk_kernels.pictures.sheets import Sheet, UnknownGeometryError, WrongPictureError, in_order

_REMEDY = "pass the picture that the processor got"


@dataclass(frozen=True)
class Regions:
    """An image or video of a row, and where its visual tokens stand on it.

    Attributes:
        name: such as "image 2", counted from 1 in the order of the prompt.
        positions: int64 `[tokens]`, places of all its tokens in the row.
        sheets: the grids of its tokens, over rectangles of the picture.
        given: the caller's picture, or None.
        note: why the places of the tokens are not known, or None.
    """

    name: str
    positions: np.ndarray
    sheets: list[Sheet]
    given: Given | None
    note: str | None = None

    def others(self) -> np.ndarray:
        """Return the places of the tokens that stand for no part of the picture, such as newlines."""
        on_sheets = [sheet.tokens.ravel() for sheet in self.sheets]
        return np.setdiff1d(self.positions, np.concatenate(on_sheets))

    def frame_of(self, sheet: Sheet) -> Any:
        """Return the picture, or the frame of the video, of the caller that a sheet lies on, or None."""
        if self.given is None:
            return None
        return self.given.frames[frame_index(sheet, len(self.given.frames))]


@dataclass(frozen=True)
class _Group:
    entries: list[Entry]
    geometry: Geometry
    is_video: bool


def regions_of_row(
    anatomy: Anatomy,
    prompt: Prompt,
    encoded: dict[str, Encoded],
    row: int,
    given: list[Given] | None,
    processor: Any = None,
) -> list[Regions]:
    """List the images and videos of a row, in the order of the prompt.

    Args:
        anatomy: the model's parts.
        prompt: the batch of prompts on the host.
        encoded: what was encoded, by kind.
        row: of the batch, as the model saw it.
        given: the caller's pictures in that order; None where there are none.
        processor: the one that made the inputs, for families whose processors cut pictures as they are told.

    Raises:
        ValueError: more or fewer pictures than the row has, or one that cannot be the one that was encoded.
    """
    entries = entries_of_row(prompt, encoded, anatomy.kinds, row)
    if not entries:
        raise ValueError(f"row: expected a row with an image or a video, got row {row}, which is text; choose another")
    groups = _groups(anatomy, prompt.ids[row], entries, None if given is None else len(given))
    matched = _matched(groups, given, row)
    found = []
    numbers = {"image": 0, "video": 0}
    for of_picture, picture in matched:
        is_video = of_picture[0].is_video or (picture is not None and picture.is_video)
        kind = "video" if is_video else "image"
        numbers[kind] += 1
        found.append(_placed(f"{kind} {numbers[kind]}", of_picture, picture, anatomy, prompt.ids[row], processor))
    return found


def _groups(anatomy: Anatomy, ids: np.ndarray, entries: list[Entry], pictures: int | None) -> list[_Group]:
    """Return the entries that make up each picture, in the order of the prompt."""
    table = GEOMETRIES.get(anatomy.family.model_type, {})
    groups = []
    for is_video in (False, True):
        own = [entry for entry in entries if _is_video(entry, ids, anatomy.kinds) == is_video]
        geometry = table.get("video" if is_video else "image") or Geometry(_not_known)
        if geometry.texts:
            own = split_at_text(own, ids)
        groups += [_Group(group, geometry, is_video) for group in _divided(own, geometry.groups, pictures)]
    return sorted(groups, key=lambda group: int(group.entries[0].positions[0]))


def _is_video(entry: Entry, ids: np.ndarray, kinds: dict[int, str]) -> bool:
    # some models mark frames as images, and some encode them as such
    return "video" in (entry.kind, kinds[int(ids[entry.positions[0]])])


def _divided(entries: list[Entry], rule: str, pictures: int | None) -> list[list[Entry]]:
    if not entries:
        return []
    if rule == "one":
        return [entries] if pictures == 1 else [[entry] for entry in entries]
    if rule == "stack":
        shape = pixel_shape(entries[0])
        size = shape[1] if len(shape) == 5 else 1
        return [entries[start : start + size] for start in range(0, len(entries), size)]
    begins: Callable[[int], bool] = {
        "each": lambda place: True,
        "first": lambda place: entries[place].before == entries[0].before,
        "last": lambda place: entries[place - 1].before == entries[-1].before,
        "after": lambda place: entries[place - 1].after == entries[-1].after,
    }[rule]
    starts = [0, *(place for place in range(1, len(entries)) if begins(place)), len(entries)]
    return [entries[start:end] for start, end in pairwise(starts)]


def _matched(groups: list[_Group], given: list[Given] | None, row: int) -> list[tuple[list[_Group], Given | None]]:
    """Return the groups of each of the caller's pictures; a video may be encoded frame by frame, each a group."""
    if given is None:
        return [([group], None) for group in groups]
    if len(groups) == 1 and groups[0].is_video and len(given) > 1 and not any(item.is_video for item in given):
        given = [Given([item.frames[0] for item in given], is_video=True)]
    videos = sum(item.is_video for item in given)
    frames = len(groups) - (len(given) - videos)
    if len(groups) != len(given) and not (videos and frames >= videos and frames % videos == 0):
        raise ValueError(
            f"image: expected {len(groups)} {'picture' if len(groups) == 1 else 'pictures'} for row {row}, got "
            f"{len(given)}; pass all pictures that the processor got for the row, in the order of the prompt"
        )
    waiting = list(groups)
    matched: list[tuple[list[_Group], Given | None]] = []
    for item in given:
        count = frames // videos if item.is_video and len(groups) != len(given) else 1
        own, waiting = waiting[:count], waiting[count:]
        name = f"picture {len(matched) + 1}"
        if own[0].is_video and not item.is_video:
            raise ValueError(f"image: expected the frames of a video as {name}, got one picture; pass a list of frames")
        if item.is_video and not own[0].is_video and count == 1 and len(item.frames) > 1:
            raise ValueError(f"image: expected one picture as {name}, got {len(item.frames)} frames; {_REMEDY}")
        matched.append((own, item))
    return matched


def _placed(
    name: str, groups: Sequence[_Group], given: Given | None, anatomy: Anatomy, ids: np.ndarray, processor: Any
) -> Regions:
    positions = np.concatenate([entry.positions for group in groups for entry in group.entries])
    sheets: list[Sheet] = []
    try:
        for number, group in enumerate(groups):
            size = None if given is None else given.size
            placed = group.geometry.layout(Pictured(group.entries, ids, size, anatomy.multimodal, processor))
            if len(groups) > 1:
                placed = [_as_frame(sheet, number, len(groups)) for sheet in placed]
            sheets += placed
        if given is not None:
            for sheet in sheets:
                frame_index(sheet, len(given.frames))
    except UnknownGeometryError as error:
        note = f"Where the tokens of {anatomy.family.model_type} stand on this picture is not known: {error}."
        return Regions(name, positions, [in_order(positions, "tokens in their order")], given, note)
    except WrongPictureError as error:
        raise ValueError(f"image: {error} for {name}; {_REMEDY}") from None
    return Regions(name, positions, sheets, given)


def _as_frame(sheet: Sheet, number: int, count: int) -> Sheet:
    name = f"frame {number + 1} of {count}"
    return replace(sheet, name=name if sheet.name == "picture" else f"{name}, {sheet.name}", frame=number, frames=count)


def frame_index(sheet: Sheet, frames: int) -> int:
    """Tell which of the caller's `frames` frames a sheet shows.

    It is the first of each pair that is encoded as one, or one of as many evenly spaced frames as were encoded.

    Raises:
        WrongPictureError: fewer frames than were encoded.
    """
    if sheet.frames == 1:
        return 0
    if frames < sheet.frames:
        raise WrongPictureError(f"expected a video of at least {sheet.frames} frames, got {frames}")
    if (frames + 1) // 2 == sheet.frames:
        return 2 * sheet.frame
    return round(sheet.frame * (frames - 1) / (sheet.frames - 1))


def _not_known(image: Pictured) -> list[Sheet]:
    raise UnknownGeometryError("this version of the package does not describe the family")
