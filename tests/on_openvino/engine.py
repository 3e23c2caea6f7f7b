"""Convert the shipped model for OpenVINO, and answer questions by OpenVINO GenAI with its CDPruner.

    python -m tests.on_openvino.engine convert CHECKPOINT FOLDER
    python -m tests.on_openvino.engine answer FOLDER JOB.json OUT.json

It runs in an environment of its own, whose transformers is older than `prune` allows, and so imports nothing of
`hawk_kernels`. A job holds the questions, each with its prompt and its pictures, and the settings of the pruning.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 2


def convert(checkpoint: Path, folder: Path) -> None:
    """Write what `VLMPipeline` reads, by optimum-intel."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer

    main_export(str(checkpoint), folder, task="image-text-to-text", library_name="transformers", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # openvino_tokenizers cannot convert `Punctuation`; these are the marks that the vocabulary knows
    marks = pre_tokenizers.Split(Regex("[.,?!]"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    models = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), models, strict=True):
        openvino.save_model(model, folder / f"{name}.xml")


def answer(folder: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer each question, and tell how long its prompt was after pruning."""
    import numpy as np
    import openvino
    import openvino_genai
    from PIL import Image

    pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample = NEW_TOKENS, False
    for name, value in job["settings"].items():
        setattr(config, name, value)
    found = []
    for asked in job["questions"]:
        pictures = [openvino.Tensor(np.asarray(Image.open(path).convert("RGB"))[None]) for path in asked["pictures"]]
        result = pipeline.generate(asked["text"], images=pictures, generation_config=config)
        found.append({"answer": result.texts[0], "prompt": result.perf_metrics.get_num_input_tokens()})
    return found


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        Path(sys.argv[4]).write_text(json.dumps(answer(Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))))
