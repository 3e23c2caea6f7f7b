"""What `prune` does with a model inside a wrapper, and with models that it cannot prune."""

import importlib.util

import pytest
import torch
from torch import nn

from hawk_kernels import prune
from tests.tiny_models import END_OF_TURN, IMAGE, VISION_END, VISION_START, Picture, question, qwen_batch, qwen_vl

GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "suppress_tokens": [VISION_START, VISION_END, IMAGE, IMAGE + 1, END_OF_TURN],
}
HAS_PEFT = importlib.util.find_spec("peft") is not None


class PeftModel(nn.Module):
    """Has the shape of peft's class: a tuner that holds the model and calls its `forward` past its hooks."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def get_base_model(self):
        return self.base_model.model

    def forward(self, **kwargs):
        return self.base_model.model.forward(**kwargs)

    def generate(self, **kwargs):
        return self.base_model.model.generate(**kwargs)


class PeftModelForCausalLM(PeftModel):
    pass


def adapted(model):
    """The model with an adapter of peft, or of the stand-in where peft is missing."""
    if not HAS_PEFT:
        return PeftModelForCausalLM(model)
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@pytest.fixture
def distributed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check_wrapped(wrapper, model):
    inputs = qwen_batch(question(Picture(4, 4)))
    with torch.no_grad():
        with prune(model, 0.25, head_weights="uniform") as plain:
            expected, said = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        with prune(wrapper, 0.25, head_weights="uniform") as pruning:
            assert torch.equal(wrapper(**inputs).logits, expected)
            last = wrapper(**inputs, logits_to_keep=1).logits
            assert (last - expected[:, -1:]).abs().max() < 1e-5
            generate = getattr(wrapper, "generate", model.generate)
            assert torch.equal(generate(**inputs, **GREEDY), said)
    assert torch.equal(pruning.keep_mask, plain.keep_mask)
    assert pruning.stats.model == "Qwen2_5_VLForConditionalGeneration"
    assert "generate" not in vars(model)


def test_a_model_with_an_adapter_of_peft():
    wrapper = adapted(qwen_vl(layers=2))
    check_wrapped(wrapper, wrapper.get_base_model())


def test_data_parallel_on_one_device_and_distributed_data_parallel(distributed):
    for wrap in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        model = qwen_vl(layers=2)
        check_wrapped(wrap(model), model)


def test_data_parallel_over_several_devices_is_refused_with_the_remedy():
    wrapper = nn.DataParallel(qwen_vl(layers=1))
    wrapper.device_ids = [0, 1]
    with pytest.raises(TypeError, match=r"got a DataParallel over 2 devices; pass model.module and call that one"):
        prune(wrapper, 0.25, head_weights="uniform")


def test_a_compiled_model_generates_pruned():
    model = qwen_vl(layers=2)
    inputs = qwen_batch(question(Picture(4, 4)))
    with prune(model, 0.25, head_weights="uniform"):
        expected = model.generate(**inputs, **GREEDY)
    compiled = torch.compile(model, backend="eager")
    with prune(compiled, 0.25, head_weights="uniform") as pruning:
        assert torch.equal(compiled.generate(**inputs, **GREEDY), expected)
    assert pruning.stats.samples[0].visual_tokens_after == 4
    torch._dynamo.reset()


def test_wrappers_inside_wrappers(distributed):
    model = qwen_vl(layers=2)
    wrapper = torch.compile(nn.parallel.DistributedDataParallel(PeftModelForCausalLM(model)), backend="eager")
    assert prune(wrapper, 0.25, head_weights="uniform").stats.model == type(model).__name__


def test_text_models_and_encoder_decoders_are_refused_in_one_line():
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**small, vocab_size=32))
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32))
    for model, reason in ((llama, r"\(a text model: it reads no images\)"), (t5, r"\(an encoder-decoder model")):
        with pytest.raises(TypeError, match=f"docs/families.md.*got {type(model).__name__} {reason}") as raised:
            prune(model, 0.2)
        assert len(str(raised.value)) < 300
