"""One depth of a sorted checkpoint in vLLM: its own Llama, built, loaded and cached with the layers of one exit."""

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader

from .configuration_sorted_llama import check_exit_layer
from .heads_sorted_llama import HEAD, LensHeads, heads_of, num_layers_of, submodel_name
from .vllm_segments import ExitLens


class SortedLlamaForCausalLM(LlamaForCausalLM):
    """
    vLLM's Llama of `config.exit_layer` layers (`--hf-overrides '{"exit_layer": 12}'`) and the one that the exit may
    own, or of all; a `ValueError` where the depth is out of range. The configuration in `vllm_config` is changed to
    the layers that are built.

    As the draft of another model it has the layers that the *target's* overrides say (`assistant_early_exit`), or its
    own `config.exit_layer`, or all.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        depth = config.exit_layer
        if vllm_config.model_config.runner_type == "draft":
            target = vllm_config.speculative_config.target_model_config.hf_config
            depth = getattr(target, "assistant_early_exit", None) or depth
        self.exit_layer = check_exit_layer(depth or config.num_hidden_layers, config.num_hidden_layers)
        kind = heads_of(config, self.exit_layer)
        config.num_hidden_layers = num_layers_of(config, self.exit_layer)  # keys and values, too, are of these layers
        if HEAD in kind.owned:
            config.tie_word_embeddings = False
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if isinstance(kind, LensHeads):  # a lens stays unfolded: the head may be the embeddings, and is in memory once
            self.model.norm = ExitLens(config.hidden_size, config.rms_norm_eps)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the sub-model's weights, in one call or in several; those of deeper layers are passed over."""
        named = ((submodel_name(name, self.config, self.exit_layer), tensor) for name, tensor in weights)
        return AutoWeightsLoader(self).load_weights((name, tensor) for name, tensor in named if name is not None)
