"""Drafts in vLLM from the target's own first layers, on its own keys and values."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.triton_utils.dispatcher import register_kernels
from vllm.v1.spec_decode.draft_model import DraftModelProposer


class FirstLayers(nn.Module):
    """
    The first segment of a [`SegmentedLlamaForCausalLM`] as vLLM's proposers call a model: nothing of it is new. A
    module, because vLLM asks it for its parameters and buffers when an engine sleeps, or has its weights updated.
    """

    target: Any

    def __init__(self, target: Any):
        super().__init__()
        self.__dict__["target"] = target  # no submodule: what it has is the target's, and found there once

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load nothing: it draws on what the target has loaded."""
        return set()

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens = [len(positions)] + [0] * (len(self.target.model.segment_ends) - 1)
        states = self.target.model(input_ids, positions, inputs_embeds=inputs_embeds, segment_tokens=tokens)
        return states[:, : self.target.config.hidden_size]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if self.target.model.returns_exits:
            hidden_states = nn.functional.pad(hidden_states, (0, 1))  # the number of the first exit
        return self.target.compute_logits(hidden_states)


class FirstLayersProposer(DraftModelProposer):
    """
    vLLM's proposer of a draft model, without the model: it has no weights and no cache of its own. The verification
    has left keys and values of every accepted token in the draft's layers too, so a draft starts with one new token.
    """

    def load_model(self, target_model: Any) -> None:
        self.model = FirstLayers(target_model)
        layers = target_model.model.layers[: target_model.model.segment_ends[0]]
        self._draft_attn_layer_names = {layer.self_attn.attn.layer_name for layer in layers}

    def propose(  # type: ignore[override]
        self,
        *,
        target_positions: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: Any,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Drafts, `(num_requests, num_drafts)`, behind `next_token_ids`; see [`DraftModelProposer.propose`]."""
        metadata, count = common_attn_metadata, common_attn_metadata.batch_size()
        newest = metadata.query_start_loc[1:] - 1 if token_indices_to_sample is None else token_indices_to_sample
        positions = (target_positions[newest] + 1).clamp(max=self.max_model_len - 1)
        rows = self.arange[:count].long()
        blocks = metadata.block_table_tensor[rows, positions // self.block_size].long()
        metadata = metadata.unpadded(count, count)
        metadata.max_query_len = 1
        metadata.query_start_loc = self.arange[: count + 1]
        metadata.query_start_loc_cpu = torch.arange(count + 1, dtype=torch.int32)
        metadata.seq_lens = (positions + 1).to(metadata.seq_lens.dtype)
        metadata.max_seq_len = min(metadata.max_seq_len + 1, self.max_model_len)
        metadata.seq_lens_cpu_upper_bound = None
        metadata.slot_mapping = blocks * self.block_size + positions % self.block_size
        return super().propose(
            target_positions=positions,
            next_token_ids=next_token_ids,
            token_indices_to_sample=self.arange[:count],
            common_attn_metadata=metadata,
            num_rejected_tokens_gpu=None,  # the positions are those behind the accepted ones
            **kwargs,
        )

    def set_inputs_first_pass(  # type: ignore[override]
        self,
        *,
        next_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        token_indices_to_sample: torch.Tensor,
        cad: Any,
        **kwargs: Any,
    ) -> tuple[int, torch.Tensor, Any]:
        count = len(next_token_ids)
        self.input_ids[:count] = next_token_ids
        self._set_positions(count, target_positions)
        return count, token_indices_to_sample, cad


def mend_sampling_on_cpu() -> None:
    """
    vLLM 0.32's kernel that hands a request's temperature, `top_k` and `top_p` to each of its drafts writes, on a CPU,
    into a copy: drafts of any method are then sampled by what was in memory. A right one takes its place.
    """
    register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": _expand})


def _expand(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: int,
    replace_to: int,
    *_: Any,
    **__: Any,
) -> None:
    counts = cu_num_tokens.long().diff(prepend=cu_num_tokens.new_zeros(1).long())
    output.copy_(values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts))
