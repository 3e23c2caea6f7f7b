"""Load a vision-language checkpoint that someone named on a command line; every failure says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

TINY_MODEL = Path(__file__).parent / "assets" / "tinyvqa"
"""The folder of the shipped model: a 0.7 M-parameter Qwen2.5-VL that knows coloured digits and nothing else."""

_SHOWN_TENSORS = 3
# each with what can take its place
_FILES = (
    ("config.json",),
    ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken", "tekken.json"),
    ("preprocessor_config.json", "processor_config.json"),
    ("model.safetensors", "*.safetensors", "*.safetensors.index.json", "*.bin"),
)
_REAL_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"


class CheckpointError(Exception):
    """A checkpoint that does not load; the message says what happened and what to do."""


def load_processor(name_or_path: str, **kwargs: Any) -> Any:
    """Load the processor of a checkpoint; where torchvision is missing, one that takes images but no videos.

    Many processors insist on a video processor, which needs torchvision, even for someone who only asks about images.
    Without torchvision this returns the same processor without that part: it raises an error if it is given `videos`,
    and does everything else as the class in transformers does.

    Args:
        name_or_path: a model id on the Hub, or a folder.
        **kwargs: passed to `from_pretrained`, say `revision` or `local_files_only`.

    Raises:
        ImportError: another package is missing, or the processor cannot do without torchvision.
    """
    from transformers import AutoProcessor, AutoTokenizer

    # transformers up to 5.17 exports a placeholder instead, which asks for torchvision even where pillow is enough
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    whole: Any = AutoProcessor
    try:
        return whole.from_pretrained(name_or_path, **kwargs)
    except ImportError as error:
        family = _processor_class(name_or_path, kwargs)
        if "torchvision" not in str(error).lower() or family is None:
            raise
    loaders: dict[str, Any] = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}
    parts = [
        loaders[part].from_pretrained(name_or_path, **kwargs) if part in loaders else _NoVideos()
        for part in family.get_attributes()
    ]
    settings, rest = family.get_processor_dict(name_or_path, **kwargs)
    processor = _without_videos(family).from_args_and_dict(parts, settings, **rest)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


class _NoVideos(dict[str, Any]):
    """Takes the place of a video processor; it is a dict because processors write themselves as JSON."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ValueError("videos need torchvision, which is not installed: pip install torchvision.")


def _without_videos(family: Any) -> Any:
    # mypy knows no class that is made while the program runs
    class ImageOnlyProcessor(family):  # type: ignore[misc]
        """The family's processor without its video part."""

        def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
            if videos is not None:
                self.video_processor(videos)
            return super().__call__(images=images, text=text, **kwargs)

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if isinstance(argument, _NoVideos):
                return _NoVideos
            return super().check_argument_for_proper_class(argument_name, argument)

    return ImageOnlyProcessor


def _processor_class(name_or_path: str, kwargs: dict[str, Any]) -> Any:
    """Find the processor's class by the type of the model; None if it reads more than images, videos and text."""
    from transformers import PROCESSOR_MAPPING, AutoConfig

    family: Any = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(name_or_path, **kwargs)), None)
    known = {"image_processor", "tokenizer", "video_processor"}
    return family if family is not None and set(family.get_attributes()) <= known else None


def load_checkpoint(
    name: str, dtype: str, device: torch.device, *, report: Callable[[str], object] = warnings.warn
) -> tuple[Any, Any]:
    """Load the model (on `device`, in eval mode) and the processor of a checkpoint.

    Args:
        name: a model id on the Hub, or a folder.
        dtype: name of a dtype, or "auto".
        device: where the model goes.
        report: is told which tensors of the model the checkpoint does not have; by default this is a warning.

    Raises:
        CheckpointError: it cannot be found, fetched or read; the message says why and what to do.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    is_tiny = Path(name).resolve() == TINY_MODEL.resolve()
    if is_tiny and not (TINY_MODEL / "model.safetensors").is_file():
        raise CheckpointError(
            f"the shipped model is missing from {TINY_MODEL}; reinstall hawk-kernels, or train it in a checkout with "
            "python -m bench.tinyvqa.train --out hawk_kernels/assets/tinyvqa"
        )
    no_hub = None if Path(name).is_dir() else _why_no_hub(name)
    try:
        with _hub_offline(no_hub is not None):
            processor = load_processor(name)
            auto: Any = AutoModelForImageTextToText
            model, loaded = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except ImportError as error:
        raise CheckpointError(f"{name} needs a package that is not installed: {first_line(error)}") from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if Path(name).is_dir():
            reason = _missing_files(Path(name)) or first_line(error)
            problem = f"the folder {name} does not hold a vision-language checkpoint that loads: {reason}"
        else:
            problem = no_hub or f"{name} was found on the Hugging Face Hub but does not load: {first_line(error)}"
        raise CheckpointError(problem) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        shown = ", ".join(missing[:_SHOWN_TENSORS]) + (", ..." if len(missing) > _SHOWN_TENSORS else "")
        report(
            f"{name} lacks {len(missing)} tensor{'s' * (len(missing) > 1)} of the model ({shown}), which are random "
            "now; do not trust its answers"
        )
    return model.to(device).eval(), processor


def load_config(name: str) -> Any:
    """Load the config of a checkpoint, which needs nothing else of it.

    Args:
        name: a model id on the Hub, or a folder.

    Raises:
        CheckpointError: it cannot be found, fetched or read.
    """
    from transformers import AutoConfig

    no_hub = None if Path(name).is_dir() else _why_no_hub(name)
    try:
        with _hub_offline(no_hub is not None):
            return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        problem = no_hub or f"found no config of a model under {name}: {first_line(error)}"
        raise CheckpointError(problem) from error


def _missing_files(folder: Path) -> str | None:
    """Say which files a checkpoint needs and a folder lacks, as the errors of transformers often do not."""
    lacking = [names[0] for names in _FILES if not any(next(folder.glob(name), None) for name in names)]
    return f"it has no {' and no '.join(lacking)}" if lacking else None


def find_device(name: str) -> torch.device:
    """Return a device that tensors can be made on and read from.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps", ...; "auto" is a GPU if there is one.

    Raises:
        CheckpointError: it cannot be used here; the message names those that can.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            found.append("mps")
        raise CheckpointError(
            f"--device {name} cannot be used here ({first_line(error)}); usable: {', '.join(found)}."
        ) from error
    return device


def ask_about(processor: Any, image: Image.Image, question: str) -> Any:
    """Make model inputs for a question about a picture, by the checkpoint's chat template where it has one.

    Args:
        processor: that of the checkpoint.
        image: the picture.
        question: what is asked.
    """
    if getattr(processor, "chat_template", None) is None:
        placeholder = getattr(processor, "image_token", "<image>")
        return processor(text=[f"{placeholder}{question}"], images=[image], return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _why_no_hub(name: str) -> str | None:
    """Say why this model cannot be fetched; `None` if it can.

    Asked once and first, because every file of an unreachable checkpoint is otherwise tried six times: two minutes of
    silence before the same answer.
    """
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"there is no folder {name}; give the folder of a checkpoint, or a model id such as {_REAL_MODEL}."
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=10)
    except (RepositoryNotFoundError, HFValidationError) as error:
        return (
            f"the Hugging Face Hub shows no model {name}: check the name (such as {_REAL_MODEL}), and for a private or "
            f"gated one run `hf auth login`. ({first_line(error)})"
        )
    except Exception as error:  # whatever the HTTP client of this version of the Hub's library raises
        return (
            f"could not get {name}: the Hugging Face Hub cannot be reached ({first_line(error)}), and the local cache "
            f"holds no complete copy. Run `hf download {name} --local-dir FOLDER` where there is network, copy FOLDER "
            "here and pass --model FOLDER. Without --model the demo needs no network."
        )
    return None


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def first_line(error: Exception) -> str:
    """Return the first line of an error that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
