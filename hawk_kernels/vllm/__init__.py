"""A vLLM plugin that prunes visual tokens before the first layer, by the methods of `prune`; see docs/vllm.md.

vLLM finds `register` by the entry point group `vllm.general_plugins`. Nothing of vLLM is patched: the plugin adds
architectures, and `--hf-overrides` chooses one of them:

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --video-pruning-rate 0.8 --hf-overrides \\
        '{"architectures": ["HawkQwen2_5_VLForConditionalGeneration"], "hawk": {"method": "hawk"}}'

Of this package, only `models`, `processing`, `projections`, `recording` and `cpu_worker` import vLLM.
"""

ARCHITECTURES = {
    f"Hawk{architecture}": f"hawk_kernels.vllm.models:Hawk{architecture}"
    for architecture in (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
}
"""What `--hf-overrides` may name, and the class that each stands for."""


def register() -> None:
    """Tell vLLM the plugin's architectures. vLLM calls this once in each of its processes."""
    from vllm import ModelRegistry

    for architecture, place in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, place)
