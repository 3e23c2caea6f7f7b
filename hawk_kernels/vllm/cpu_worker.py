"""A CPU worker whose runner asks the model to prune: `--worker-cls hawk_kernels.vllm.cpu_worker.CPUWorker`.

In vLLM 0.32 the GPU runner notes on loading whether the model prunes; the CPU runner loads the model in a method of its
own and does not.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.interfaces import supports_multimodal_pruning
from vllm.v1.worker import cpu_worker


class CPUWorker(cpu_worker.CPUWorker):
    """Loads the model, then notes whether it prunes."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model."""
        super().load_model(*args, **kwargs)
        runner, multimodal = self.model_runner, self.model_config.multimodal_config
        runner.is_multimodal_pruning_enabled = (
            multimodal is not None
            and multimodal.is_multimodal_pruning_enabled()
            and supports_multimodal_pruning(runner.get_model())
        )
