"""
Sorted LLaMA in vLLM: its own Llama, built, loaded and cached with the layers of one exit and no more.

vLLM imports this module through the plugin; it is no part of the code that a checkpoint carries.
"""

import os
from collections.abc import Iterable
from weakref import WeakValueDictionary

import huggingface_hub
import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.transformers_utils.repo_utils import get_model_path

from .configuration_sorted_llama import check_exit_layer
from .heads_sorted_llama import submodel_weights


_targets: WeakValueDictionary[str, "SortedLlamaForCausalLM"] = WeakValueDictionary()  # by their checkpoint


class SortedLlamaForCausalLM(LlamaForCausalLM):
    """
    vLLM's Llama of `config.exit_layer` layers (`--hf-overrides '{"exit_layer": 12}'`), or of all; a `ValueError` where
    the depth is out of range. The configuration in `vllm_config` is changed to the layers that are built.

    As the draft of its own checkpoint (`--speculative-config` with the method `draft_model` and the same path), it has
    `config.assistant_early_exit` layers, a field of the *target's* overrides without which it is refused, and reads
    through the target's weights. As the draft of another model, it has those, or its own `config.exit_layer`, or all.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        model_config = vllm_config.model_config
        config = model_config.hf_config
        is_draft = model_config.runner_type == "draft"
        depth = _draft_depth(vllm_config) if is_draft else config.exit_layer
        self.exit_layer = check_exit_layer(depth or config.num_hidden_layers, config.num_hidden_layers)
        config.num_hidden_layers = self.exit_layer  # keys and values, too, are of these layers
        if self.exit_layer in config.own_exits:
            config.tie_word_embeddings = False
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._shared: tuple[str, ...] = ()
        if not is_draft:
            _targets[_checkpoint(model_config)] = self
        elif _checkpoint(model_config) in _targets:
            self._share(_targets[_checkpoint(model_config)])

    def _share(self, target: "SortedLlamaForCausalLM") -> None:
        """Read through the modules of `target`, all but those that hold keys and values."""
        shared: list[tuple[nn.Module, nn.Module, str]] = [(self.model, target.model, "embed_tokens")]
        self._shared = ("model.embed_tokens.", "model.layers.")
        if not {self.exit_layer, target.exit_layer} & {*self.config.own_exits}:
            shared += [(self.model, target.model, "norm"), (self, target, "lm_head")]
            self._shared += ("model.norm.", "lm_head.")
        for mine, theirs in zip(self.model.layers, target.model.layers):
            shared += [(mine, theirs, name) for name in ("input_layernorm", "post_attention_layernorm", "mlp")]
            attentions = mine.self_attn, theirs.self_attn
            shared += [(*attentions, name) for name in ("qkv_proj", "o_proj", "rotary_emb")]
        for own, others, name in shared:
            module = getattr(others, name)
            delattr(own, name)
            # No submodule: vLLM would load it, and process its weights, a second time
            own.__dict__[name] = module

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the sub-model's weights; those of deeper layers, and those that a draft shares, are passed over."""
        needed = submodel_weights(weights, self.config, self.exit_layer)
        return AutoWeightsLoader(self).load_weights(w for w in needed if not w[0].startswith(self._shared))


def _checkpoint(model_config: ModelConfig) -> str:
    """One name for a checkpoint, however it is written: offline, vLLM makes a folder of the target's Hub id alone."""
    if os.path.exists(model_config.model) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return os.path.realpath(get_model_path(model_config.model, model_config.revision))
    return model_config.model


def _draft_depth(vllm_config: VllmConfig) -> int | None:
    model_config, target_config = vllm_config.model_config, vllm_config.speculative_config.target_model_config
    depth = getattr(target_config.hf_config, "assistant_early_exit", None)
    if _checkpoint(model_config) != _checkpoint(target_config):
        return model_config.hf_config.exit_layer if depth is None else depth
    if depth is None:
        raise ValueError(
            "A checkpoint that drafts for itself needs a depth: pass `--hf-overrides '{\"assistant_early_exit\": k}'` "
            "beside `--speculative-config`."
        )
    return check_exit_layer(depth, target_config.hf_config.num_hidden_layers - 1, "assistant_early_exit")
