"""vLLM's Llama in segments, the layers from one exit to the next: the requests of a step end behind different ones."""

from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from .vllm_setup import segment_ends


class Segment(nn.Module):
    """The decoder layers between two exits, which vLLM compiles as one."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = tuple(layers)  # no submodules: they are the model's, and found there once

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


def _compiled_segment(first: int, last: int) -> type[Segment]:
    """A class, and a function, a segment: what is compiled is kept, in memory and on disk, by the name of these."""
    name, of_all = f"Segment{first}To{last}", Segment.forward
    forward = FunctionType(of_all.__code__.replace(co_name=name), of_all.__globals__, name)
    forward.__annotations__, forward.__qualname__ = of_all.__annotations__, f"{name}.forward"
    own = type(name, (Segment,), {"forward": forward, "__module__": __name__})
    inputs = ["positions", "hidden_states", *(["residual"] if first else [])]  # the first one has no residual yet
    return support_torch_compile(own, dynamic_arg_dims=dict.fromkeys(inputs, 0))


class ExitLens(RMSNorm):
    """Norm and square matrix of an exit with `exit_heads="lens"`, unfolded: the shared head reads what it returns."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps)
        self.matrix = nn.Parameter(torch.zeros(hidden_size, hidden_size), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        normed, residual = super().forward(x, residual)
        return normed + nn.functional.linear(normed, self.matrix), residual


class SegmentedLlamaModel(LlamaModel):
    """The decoder, cut behind each of `segment_ends`; the tokens that go deepest come first in a step."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = LlamaDecoderLayer):
        ends = segment_ends(vllm_config)
        config = vllm_config.model_config.hf_config
        config.num_hidden_layers = ends[-1]
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.do_not_compile = True  # as a whole: its segments are compiled
        self.segment_ends = ends
        self.segments = nn.ModuleList(
            _compiled_segment(first, last)(
                vllm_config=vllm_config, prefix=f"{prefix}.segments.{i}", layers=self.layers[first:last]
            )
            for i, (first, last) in enumerate(zip([0, *ends], ends))
        )
        norm = ExitLens if config.exit_heads == "lens" else RMSNorm
        self.exit_norms = nn.ModuleDict(
            {str(k): norm(config.hidden_size, config.rms_norm_eps) for k in ends if k in config.own_exits}
        )
        self.returns_exits = config.exit_heads == "separate"

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        segment_tokens: list[int] | None = None,
    ) -> torch.Tensor:
        """
        Run the layers that each token needs.

        Args:
            input_ids, positions (`torch.Tensor` of shape `(num_tokens,)`):
                The tokens of a step, those that go deepest first.
            segment_tokens (`list[int]`, *optional*):
                How many of them run each segment, from shallow to deep, not ascending. Defaults to all in each.

        Returns:
            `torch.Tensor` of shape `(num_tokens, hidden_size)`: The states that a head reads, normed by the norm of a
            token's exit. With `exit_heads="separate"` there is one column more, the number of the exit.
        """
        hidden_states: Any = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual: Any = None
        read: list[torch.Tensor] = []
        for i, segment in enumerate(self.segments):
            tokens = len(hidden_states) if segment_tokens is None or i == 0 else segment_tokens[i]
            if tokens < len(hidden_states):
                read.append(self._read(i - 1, hidden_states[tokens:], residual[tokens:]))
                if tokens == 0:
                    break
                hidden_states, residual = hidden_states[:tokens], residual[:tokens]
            hidden_states, residual = segment(positions[:tokens], hidden_states, residual)
        else:
            read.append(self._read(i, hidden_states, residual))
        return read[0] if len(read) == 1 else torch.cat(read[::-1])

    def _read(self, number: int, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        key = str(self.segment_ends[number])
        norm: Any = dict(self.exit_norms).get(key, self.norm)
        states, _ = norm(hidden_states, residual)
        # It must travel with the states, of which vLLM picks some before it asks for logits; a small one is exact
        return nn.functional.pad(states, (0, 1), value=number) if self.returns_exits else states


class SegmentedLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's Llama that runs each token of a step to its own exit, and reads it through that exit's norm and head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.exit_lm_heads = nn.ModuleDict()
        for k in self.model.exit_norms if self.model.returns_exits else ():
            head_prefix = maybe_prefix(prefix, f"exit_lm_heads.{k}")
            self.exit_lm_heads[k] = ParallelLMHead(self.config.vocab_size, self.config.hidden_size, prefix=head_prefix)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = LlamaDecoderLayer
    ) -> nn.Module:
        return SegmentedLlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        segment_tokens: list[int] | None = None,
    ) -> torch.Tensor:
        """See [`SegmentedLlamaModel.forward`]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, segment_tokens)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits, `(n, vocab_size)`, of states as the model returns them, each through the head of its exit."""
        if not self.model.returns_exits:
            return super().compute_logits(hidden_states)
        states, numbers = hidden_states[:, :-1], hidden_states[:, -1].long()
        logits: torch.Tensor | None = None
        for number in numbers.unique().tolist():
            rows = (numbers == number).nonzero().squeeze(1)
            key = str(self.model.segment_ends[number])
            head = dict(self.exit_lm_heads).get(key, self.lm_head)
            of_exit = self.logits_processor(head, states[rows])
            if of_exit is None:  # another process of tensor parallelism has them
                continue
            if logits is None:
                logits = of_exit.new_empty(len(states), of_exit.shape[1])
            logits[rows] = of_exit
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load what the segments run; deeper layers, and what other exits own, are passed over."""
        return AutoWeightsLoader(self).load_weights(weight for weight in weights if self._has(weight[0]))

    def _has(self, name: str) -> bool:
        owner, _, rest = name.removeprefix("model.").partition(".")
        number = rest.partition(".")[0]
        if owner == "layers":
            return int(number) < self.model.segment_ends[-1]
        return owner not in ("exit_norms", "exit_lm_heads") or number in self.model.exit_norms
