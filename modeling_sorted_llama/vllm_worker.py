"""vLLM's workers: one whose runner (V1) knows how deep each request goes, and one whose draft is the target itself."""

from bisect import bisect
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.worker.utils import AttentionGroup

from .vllm_cache import SegmentSpec
from .vllm_drafts import FirstLayersProposer, mend_sampling_on_cpu
from .vllm_requests import default_exit_layer, exit_layer_of, exit_layers_of
from .vllm_setup import drafts_for_itself


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as ModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as ModelRunner
    from vllm.v1.worker.gpu_worker import Worker


class Share(NamedTuple):
    """What of a step runs a segment: its first requests, their tokens, and the most tokens of one of them."""

    requests: int
    tokens: int
    longest: int


@dataclass
class SegmentGroup(AttentionGroup):
    """vLLM's attention group, which describes to its layers the requests that run them, and no others."""

    runner: Any = None
    segment: int = 0

    def build_metadata(self, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        if self.runner.shares is not None:
            share = self.runner.shares[self.segment]
            if share.requests == 0:
                return None
            common_attn_metadata = common_attn_metadata.unpadded(share.tokens, share.requests)
            common_attn_metadata.max_query_len = share.longest
        return super().build_metadata(common_attn_metadata, *args, **kwargs)


class DepthModelRunner(ModelRunner):
    """vLLM's runner, by depth: the deepest requests of a step come first, so each segment runs a prefix of it."""

    exit_layers: list[int]
    default: int
    attn_groups: list[list[AttentionGroup]]
    segments: dict[str, int]  # by the name of an attention layer
    shares: list[Share] | None = None  # by segment; `None` where all tokens go all the way, as in a profiling run

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs, firsts = super().get_kv_cache_spec(), [0, *self.exit_layers]
        self.segments = {name: bisect(self.exit_layers, extract_layer_index(name)) for name in specs}
        return {name: SegmentSpec.of(spec, firsts[self.segments[name]]) for name, spec in specs.items()}

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        if self.reorder_batch_threshold is not None:
            backends = {group.backend.get_name() for groups in self.attn_groups for group in groups}
            raise ValueError(
                f"A depth a request needs an order of its own, which {backends} want too: pass another "
                "`--attention-backend`."
            )
        self.attn_groups = [[self._as_segment(group) for group in groups] for groups in self.attn_groups]

    def _as_segment(self, group: AttentionGroup) -> SegmentGroup:
        for builder in group.metadata_builders:
            builder.supports_update_block_table = False  # it would copy another group's, with its block table of all
        values = {field.name: getattr(group, field.name) for field in fields(AttentionGroup)}
        return SegmentGroup(**values, runner=self, segment=self.segments[group.layer_names[0]])

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().execute_model(*args, **kwargs)
        finally:
            self.shares = None

    def _may_reorder_batch(self, scheduler_output: Any) -> None:
        super()._may_reorder_batch(scheduler_output)
        batch, requests = self.input_batch, self.requests
        depths = [exit_layer_of(requests[name].sampling_params, self.default) for name in batch.req_ids]
        order = sorted(range(len(depths)), key=lambda i: -depths[i])
        for i, j in enumerate(order):
            while j < i:  # what stood there has been moved
                j = order[j]
            if i != j:
                batch.swap_states(i, j)
        counts = [scheduler_output.num_scheduled_tokens[name] for name in batch.req_ids]
        depths.sort(reverse=True)
        running = [sum(depth > first for depth in depths) for first in (0, *self.exit_layers[:-1])]
        self.shares = [Share(n, sum(counts[:n]), max(counts[:n], default=0)) for n in running]

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.shares is not None:
            kwargs["segment_tokens"] = tokens = [share.tokens for share in self.shares]
            slots = get_forward_context().slot_mapping
            for name, segment in self.segments.items():
                if 0 < tokens[segment] < tokens[0]:
                    slots[name] = slots[name][: tokens[segment]]
        return super()._model_forward(*args, **kwargs)


class DepthWorker(Worker):
    """vLLM's worker of a server that takes a depth from each request."""

    def init_device(self) -> None:
        super().init_device()
        runner, config = self.model_runner, self.model_config.hf_config
        # The worker makes its runner itself, and lets no one choose the class
        runner.__class__ = DepthModelRunner
        runner.exit_layers = exit_layers_of(config)
        runner.default = default_exit_layer(config)


class DraftWorker(Worker):
    """vLLM's worker of a server that drafts."""

    def init_device(self) -> None:
        # What checks the requests has done so before they come here, and vLLM has no such processors beside drafts
        checks = f"{__package__}.vllm_requests:"
        processors = self.model_config.logits_processors or []
        self.model_config.logits_processors = [p for p in processors if not str(p).startswith(checks)]
        super().init_device()
        if current_platform.is_cpu():
            mend_sampling_on_cpu()
        if drafts_for_itself(self.vllm_config):
            runner = self.model_runner
            runner.drafter = FirstLayersProposer(self.vllm_config, runner.device, runner)
