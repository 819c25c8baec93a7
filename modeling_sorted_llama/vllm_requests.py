"""The exit layer that a request asks a vLLM server for: `extra_args={"exit_layer": k}`, `vllm_xargs` over HTTP."""

import functools
from typing import Any, ClassVar

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from .configuration_sorted_llama import as_int


PER_REQUEST = "request"  # the setting with which a server takes a depth from each request


def exit_layers_of(config: Any) -> list[int]:
    """Depths that a server of all depths has: those that were trained, the config's default, and full depth."""
    return sorted({*(config.exit_layers or ()), default_exit_layer(config), config.num_hidden_layers})


def default_exit_layer(config: Any) -> int:
    """The depth of a server of one, and of a request that names none."""
    return config.exit_layer or config.num_hidden_layers


def exit_layer_of(sampling_params: SamplingParams | None, default: int) -> int:
    """The exit layer of a request that was admitted."""
    exit_layer = ((sampling_params and sampling_params.extra_args) or {}).get("exit_layer")
    return default if exit_layer is None else int(exit_layer)


class _ExitLayerCheck:
    """Changes no logits. A logits processor is where vLLM lets a plugin refuse a request, with status 400."""

    exit_layers: ClassVar[list[int]]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        asked = (sampling_params.extra_args or {}).get("exit_layer")
        if asked is None or as_int(asked) in cls.exit_layers:
            return
        hint = (
            ""
            if len(cls.exit_layers) > 1
            else (
                ", the only depth of this server: one that is started with "
                f'`--additional-config \'{{"exit_layer": "{PER_REQUEST}"}}\'` takes it from the request'
            )
        )
        allowed = ", ".join(map(str, cls.exit_layers))
        raise ValueError(f"`exit_layer` must be {'one of ' if not hint else ''}{allowed}{hint}, got {asked!r}.")


class _ChecksInV1(_ExitLayerCheck, LogitsProcessor):
    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
        pass

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass


class _ChecksInV2(_ExitLayerCheck, LogitsProcessorV2):
    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits


def check_of(exit_layers: list[int], runner: int) -> str:
    """
    The logits processor, as vLLM is told of one, that refuses all depths but these; `runner` is the version of its
    model runner. vLLM's processes find the class by its name alone, so the name says the depths.
    """
    return f"{__name__}:Runner{runner}Exits_{'_'.join(map(str, exit_layers))}"


@functools.cache
def __getattr__(name: str) -> type:
    bases = {"Runner1Exits": _ChecksInV1, "Runner2Exits": _ChecksInV2}
    kind, *exit_layers = name.split("_")
    if kind not in bases or not exit_layers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (bases[kind],), {"exit_layers": [int(k) for k in exit_layers]})
