"""Checkpoints of several families load from a folder, take a picture and a question, and are pruned; all offline."""

import json
import shutil

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402

from hawk_kernels import demo, prune  # noqa: E402
from hawk_kernels.checkpoint import (  # noqa: E402
    TINY_MODEL,
    CheckpointError,
    ask_about,
    load_checkpoint,
    load_processor,
)
from tests.tiny_families import tiny_model  # noqa: E402
from tests.tiny_models import END_OF_TURN, IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCABULARY  # noqa: E402

QUESTION = "what is left of the cat ?"
TEMPLATE = (
    "{% for message in messages %}[user] {% for part in message.content %}{% if part.type == 'image' %}IMAGE {% else %}"
    "{{part.text}} {% endif %}{% endfor %}[end] {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer(image, template=TEMPLATE, **more):
    """Whole words; `image` is how a template writes a picture."""
    special = {
        PAD: "<pad>",
        VISION_START: "<|vision_start|>",
        VISION_END: "<|vision_end|>",
        IMAGE: "<|image_pad|>" if "pad" in image else "<image>",
        VIDEO: "<|video_pad|>",
        END_OF_TURN: "[end]",
        6: "[user]",
        7: "[assistant]",
        8: "<bos>",
        9: "\n",
    }
    words = {special.get(index, f"w{index}"): index for index in range(10)}
    words |= {word: 10 + index for index, word in enumerate([*QUESTION.split(), *(f"word{i}" for i in range(103))])}
    model = Tokenizer(WordLevel({word: i for word, i in words.items() if i < VOCABULARY}, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="[end]", **more)
    fast.add_special_tokens({"additional_special_tokens": [t for t in special.values() if t not in ("<pad>", "[end]")]})
    fast.chat_template = None if template is None else template.replace("IMAGE", image)
    return fast


def save_llava(folder):
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
    )
    transformers.LlavaProcessor(
        image_processor,
        tokenizer("<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)


def save_qwen3_vl(folder):
    # its processor cannot be made without a video processor, which needs torchvision
    size = {"shortest_edge": 24 * 24, "longest_edge": 24 * 24}
    image_processor = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    image_processor.save_pretrained(folder)
    tokenizer("<|vision_start|> <|image_pad|> <|vision_end|>").save_pretrained(folder)


def save_paligemma(folder):
    # it was trained without a chat template
    image_processor = transformers.SiglipImageProcessorPil(size={"height": 12, "width": 12})
    image_processor.image_seq_length = 9
    words = tokenizer("<image>", template=None, bos_token="<bos>")
    transformers.PaliGemmaProcessor(image_processor, words).save_pretrained(folder)


# a dummy says which packages it misses
if hasattr(transformers.AutoImageProcessor, "_backends"):
    pytest.skip("this transformers reads no image processor without torchvision", allow_module_level=True)

SAVERS = {"llava": save_llava, "qwen3_vl": save_qwen3_vl, "paligemma": save_paligemma}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint of a family."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(made[name])
            SAVERS[name](made[name])
        return str(made[name])

    return folder


@pytest.mark.parametrize("name", SAVERS)
def test_the_demo_takes_the_checkpoint_of_any_family(name, checkpoint, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    PICTURE.save(picture)
    command = ["--model", checkpoint(name), "--image", str(picture), "--prompt", QUESTION, "--device", "cpu", "--json"]
    assert demo.main([*command, "--max-new-tokens", "2", "--output", str(tmp_path / "overlay.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["head_weights"] == "uniform"
    assert (report["all_tokens"]["visual_tokens"], report["pruned"]["visual_tokens"]) == (9, 1)
    assert (tmp_path / "overlay.png").is_file()


@pytest.mark.parametrize("name", SAVERS)
def test_a_folder_is_loaded_asked_and_pruned(name, checkpoint):
    model, processor = load_checkpoint(checkpoint(name), "float32", torch.device("cpu"))
    inputs = ask_about(processor, PICTURE, QUESTION)
    assert (inputs["input_ids"] == IMAGE).sum() == 9
    assert {token for token in processor.tokenizer(QUESTION).input_ids if token >= 10} <= set(
        inputs["input_ids"][0].tolist()
    )
    options = {"max_new_tokens": 3, "do_sample": False}
    with prune(model, 3, head_weights="uniform") as pruning:
        out = model.generate(**inputs, **options)
    assert out.shape[0] == 1
    assert pruning.stats.samples[0].visual_tokens_after == 3
    asked = inputs["input_ids"][0, pruning.query_mask[0]]
    assert set(processor.tokenizer.decode(asked).split()) >= set(QUESTION.split())
    if name != "paligemma":
        with torch.no_grad(), prune(model, 3, head_weights="uniform", query=processor) as pruning:
            model(**inputs)
        asked = inputs["input_ids"][0, pruning.query_mask[0]]
        assert processor.tokenizer.decode(asked).split() == QUESTION.split()


@pytest.mark.skipif(transformers.utils.is_torchvision_available(), reason="torchvision is here: no fallback needed")
def test_videos_without_torchvision_are_refused(checkpoint):
    processor = load_processor(checkpoint("qwen3_vl"))
    assert isinstance(processor, transformers.Qwen3VLProcessor)
    with pytest.raises(ValueError, match="videos need torchvision, which is not installed: pip install torchvision"):
        processor(text=["w"], videos=[[PICTURE]])


def _cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [_cut_short, _of_another_size, _without_weights])
def test_a_broken_checkpoint_is_told_as_one(spoil, tmp_path):
    folder = shutil.copytree(TINY_MODEL, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(CheckpointError, match="does not hold a vision-language checkpoint that loads"):
        load_checkpoint(str(folder), "float32", torch.device("cpu"))
