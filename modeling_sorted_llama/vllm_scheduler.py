"""Which requests take part in a step of vLLM where each has its own exit layer."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from .vllm_cache import SegmentManager
from .vllm_requests import default_exit_layer, exit_layer_of


class DepthScheduler(Scheduler):
    """
    vLLM's scheduler, by depth. A step has a greatest depth, and the requests that end there or before take part:
    shallower ones ride along, for their layers run anyway. Each depth that is asked for gets the same share of what
    steps read, so that deep steps do not hold up shallow requests, nor many shallow ones the deep.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        config = vllm_config.model_config.hf_config
        self.default = default_exit_layer(config)
        self.head_cost = _head_in_layers(config)
        self.spent: dict[int, float] = {}  # layers read, by the greatest depth of the steps
        self.depth = config.num_hidden_layers  # of this step
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            manager.exit_layer_of = lambda request_id: self.exit_layer_of(self.requests[request_id])

    def exit_layer_of(self, request: Any) -> int:
        return exit_layer_of(request.sampling_params, self.default)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        asked = {self.exit_layer_of(r) for queue in (self.running, self.waiting) for r in queue}
        if asked:
            # A depth that was not asked for has no claim on the past
            least = min((spent for k, spent in self.spent.items() if k in asked), default=0.0)
            self.spent = {k: self.spent.get(k, least) for k in asked}
            self.depth = min(asked, key=lambda k: (self.spent[k], k))
            # Also where nothing comes of it, for want of memory say: the next step is another depth's
            self.spent[self.depth] += self.depth + self.head_cost
            for request in self.running:
                takes_part = self.exit_layer_of(request) <= self.depth
                request.next_decode_eligible_step = 0 if takes_part else self.current_step + 2
        return super().schedule(*args, **kwargs)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        is_deeper = self.exit_layer_of(request) > self.depth
        return not is_deeper and super()._handle_blocked_waiting_request(request)

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        SegmentManager.looked_up = self.exit_layer_of(request)
        try:
            return super()._get_local_prefix_cache_hit(request)
        finally:
            SegmentManager.looked_up = None


def _head_in_layers(config: Any) -> float:
    """The weights of the LM head, in those of a decoder layer."""
    attention = 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return config.vocab_size / (attention + 3 * config.intermediate_size)


class AsyncDepthScheduler(DepthScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler, by depth."""


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of a server; vLLM takes it for a class, before it is known whether it is asynchronous."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (AsyncDepthScheduler if is_async else DepthScheduler)(vllm_config, *args, **kwargs)
