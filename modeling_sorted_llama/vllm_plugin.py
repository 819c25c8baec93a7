"""What vLLM calls when it starts (entry point `vllm.general_plugins`): nothing of vLLM's models is imported yet."""


def register() -> None:
    """Tell vLLM of the model, in every one of its processes; importing this package has told the Auto classes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(
        "SortedLlamaForCausalLM", "sorted_llama.modeling_sorted_llama.vllm_sorted_llama:SortedLlamaForCausalLM"
    )
