"""What vLLM calls when it starts, in each of its processes (entry point `vllm.general_plugins`)."""


def register() -> None:
    """Tell vLLM of the models and of how a server is set up; importing this package has told the Auto classes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .vllm_setup import ServerSetup

    for name, module in (
        ("SortedLlamaForCausalLM", "vllm_sorted_llama"),
        ("SegmentedLlamaForCausalLM", "vllm_segments"),
    ):
        ModelRegistry.register_model(name, f"{__package__}.{module}:{name}")
    MODELS_CONFIG_MAP["SortedLlamaForCausalLM"] = ServerSetup
