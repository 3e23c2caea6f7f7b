"""Holds what all prepared calls that score or select share: shapes and budget, results, working memory, one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hawk_kernels.backends.kernels.launch import (
    MOST_COLUMNS,
    PreparedLaunch,
    launch_counters,
    on_device,
    workspace,
)
from hawk_kernels.backends.kernels.phases import num_counters
from hawk_kernels.backends.kernels.plan import Plan
from hawk_kernels.selection import Selection, keep_fraction, max_kept


class PreparedSelection:
    """A call that scores or selects in one launch, and can be repeated with other tensors of the same signature.

    Attributes:
        is_empty: whether there is nothing to score, so that no launch is needed.
        selects: whether mask and indices are wanted besides scores.
        rounding: of the budget; "floor" where nothing is selected, so that no variant is compiled twice.
        budget: width of the indices, then the arguments of `radix.Budget`.
    """

    def __init__(
        self,
        device: torch.device,
        batch: int,
        num_columns: int,
        r: float | int | None,
        rounding: str,
        batched: bool,
    ) -> None:
        """Work out the shapes of the results, and the budget.

        Args:
            device: of all tensors.
            batch: rows, `B`.
            num_columns: keys or tokens of a row, `M`.
            r: how many are kept; None scores and does not select.
            rounding: of the budget.
            batched: False leaves the batch axis out of the results.
        """
        rows = (batch,) if batched else ()
        self.is_empty = batch == 0 or num_columns == 0
        self.selects = r is not None
        self.rounding = rounding if self.selects else "floor"
        width = num_columns if r is None else max_kept(r, num_columns, rounding)
        self.budget = (width, *((1, 1, 0) if r is None else keep_arguments(r, rounding)))
        self._device = device
        self._shape = (*rows, num_columns)
        self._kept_shape = (*rows, width)
        self._num_floats = self._num_words = self._num_counters = 0
        self._launch: PreparedLaunch | None = None

    def prepare(
        self,
        plan: Plan,
        num_counted_rows: int,
        arrange: Callable[..., tuple[Any, ...]],
        constants: dict[str, Any],
        num_specialized: int,
    ) -> None:
        """Prepare the launch.

        Args:
            plan: what follows from shapes.
            num_counted_rows: rows that have counters of their own.
            arrange, constants, num_specialized: as in `PreparedLaunch`; `arrange` gets the tensors of `run` in order.
        """
        self._num_floats, self._num_words = plan.num_floats, plan.num_words
        self._num_counters = num_counters(num_counted_rows)
        self._launch = PreparedLaunch(plan.grid, arrange, constants, plan.options, num_specialized)

    def run(self, kernel: Any, inputs: tuple[torch.Tensor, ...], unspecialized: tuple[torch.Tensor, ...]) -> Selection:
        """Launch the kernel on `inputs`, workspace, counters, scores, mask, indices and `unspecialized`, in this order.

        Returns:
            Mask, indices and scores; without selecting, each of them is the scores.
        """
        device = self._device
        scores = torch.empty(self._shape, dtype=torch.float32, device=device)
        mask = torch.empty(self._shape, dtype=torch.bool, device=device) if self.selects else scores
        indices = torch.empty(self._kept_shape, dtype=torch.int64, device=device) if self.selects else scores
        if self._launch is not None:
            with on_device(device):
                floats, words = workspace(self._num_floats, self._num_words, device)
                counters = launch_counters(self._num_counters, device)
                self._launch(kernel, *inputs, floats, words, counters, scores, mask, indices, *unspecialized)
        return Selection(mask, indices, scores)


def keep_arguments(r: float | int, rounding: str) -> tuple[int, int, int]:
    """Return `(numerator, denominator, count)` as `radix.Budget` takes them; a count of 0 means by the fraction."""
    if isinstance(r, int):
        return 1, 1, min(r, MOST_COLUMNS)
    return *keep_fraction(r, rounding), 0
