"""Offers lmms-eval the model `hawk`, any of its own models pruned, by the entry-point group `lmms_eval.models`.

lmms-eval imports this while it is still importing its models, so nothing of lmms-eval may be imported at the top.
"""

from __future__ import annotations

from typing import Any

MODEL_NAME = "hawk"


def manifest() -> Any:
    """Return the `ModelManifest` of the model `hawk`, called by lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = f"{__name__}.model"
    return ModelManifest(
        model_id=MODEL_NAME,
        simple_class_path=f"{module}.PrunedSimple",
        chat_class_path=f"{module}.PrunedChat",
    )
