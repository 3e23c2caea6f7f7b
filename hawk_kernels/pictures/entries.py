"""Lists what the vision encoder returned for a row of a batch, entry by entry, with the placeholders of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.sources import Encoded


@dataclass(frozen=True)
class Entry:
    """One image, tile, frame or video, as the encoder returned it.

    Attributes:
        kind: "image" or "video", as it was encoded.
        index: its place among the entries of that kind, over the whole batch.
        positions: int64 `[tokens]`, places of its placeholders in the row.
        before: id of the token in front of it, -1 at the start of a row.
        after: id of the token after it, -1 at the end of a row.
        arguments: what the encoder was told about all entries of the kind.
    """

    kind: str
    index: int
    positions: np.ndarray
    before: int
    after: int
    arguments: dict[str, Any]

    def pieces(self) -> list[np.ndarray]:
        """Return its placeholders, divided where text stands between them."""
        return np.split(self.positions, np.flatnonzero(np.diff(self.positions) != 1) + 1)


def entries_of_row(prompt: Prompt, encoded: dict[str, Encoded], kinds: dict[int, str], row: int) -> list[Entry]:
    """Return the entries of a row in the order of the prompt.

    Where the encoder did not tell their lengths, or where these do not fit the placeholders, each run of placeholders
    is an entry.

    Args:
        prompt: the batch of prompts on the host.
        encoded: what was encoded, by kind.
        kinds: kind of each placeholder id.
        row: of the batch, as the model saw it.
    """
    lengths = {kind: run.lengths for kind, run in encoded.items()}
    copies = prompt.copies_of_rows(sum(map(sum, lengths.values())))
    waiting = {kind: deque(enumerate(of_kind)) for kind, of_kind in lengths.items()}
    found: list[tuple[str, int, np.ndarray]] = []
    placeholders = prompt.all_placeholders()
    for earlier in range(0, row // copies * copies + 1, copies):
        found = []
        positions = np.flatnonzero(placeholders[earlier])
        while positions.size:
            first = int(prompt.ids[earlier, positions[0]])
            kind = _kind_with_entries(kinds[first], waiting)
            index, length = waiting[kind].popleft() if kind is not None else (0, 0)
            if kind is None or not 0 < length <= positions.size:
                return _runs(prompt, encoded, kinds, row)
            found.append((kind, index, positions[:length]))
            positions = positions[length:]
    ids = prompt.ids[row]
    return [
        Entry(
            kind,
            index,
            places,
            _neighbour(ids, places[0] - 1),
            _neighbour(ids, places[-1] + 1),
            encoded[kind].arguments,
        )
        for kind, index, places in found
    ]


def _kind_with_entries(kind: str, waiting: dict[str, deque[tuple[int, int]]]) -> str | None:
    # some models mark the frames of a video as images
    return next((name for name in (kind, *waiting) if waiting.get(name)), None)


def _runs(prompt: Prompt, encoded: dict[str, Encoded], kinds: dict[int, str], row: int) -> list[Entry]:
    index: dict[str, int] = {}
    entries: list[Entry] = []
    for earlier in range(row + 1):
        ids, entries = prompt.ids[earlier], []
        positions = np.flatnonzero(prompt.all_placeholders()[earlier])
        breaks = (np.diff(positions) != 1) | (np.diff(ids[positions]) != 0)
        for places in np.split(positions, np.flatnonzero(breaks) + 1) if positions.size else []:
            kind = kinds[int(ids[places[0]])]
            told = encoded[kind].arguments if kind in encoded else {}
            place = index.get(kind, 0)
            index[kind] = place + 1
            around = _neighbour(ids, places[0] - 1), _neighbour(ids, places[-1] + 1)
            entries.append(Entry(kind, place, places, *around, told))
    return entries


def _neighbour(ids: np.ndarray, place: int) -> int:
    return int(ids[place]) if 0 <= place < len(ids) else -1


def split_at_text(entries: Sequence[Entry], ids: np.ndarray) -> list[Entry]:
    """Split entries so that none has text inside: some encoders return all tiles of a sample as one entry."""
    return [
        Entry(e.kind, e.index, piece, _neighbour(ids, piece[0] - 1), _neighbour(ids, piece[-1] + 1), e.arguments)
        for e in entries
        for piece in e.pieces()
    ]
