"""How a vLLM server of a sorted checkpoint is set up: one depth, a depth a request, or drafts; and what is refused."""

import os
from typing import Any

import huggingface_hub
import vllm
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_model_path

from .configuration_sorted_llama import check_exit_layer
from .heads_sorted_llama import EXIT_HEADS, LAYER
from .vllm_requests import PER_REQUEST, check_of, default_exit_layer, exit_layers_of


# Segments and drafts reach into vLLM's scheduler, cache and runner, which no promise holds still
VERSIONS = ("0.32",)


class ServerSetup(VerifyAndUpdateConfig):
    """vLLM's hook for the architecture `SortedLlamaForCausalLM`, called when a server is configured."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """
        Choose what serves the checkpoint, and refuse what it cannot do.

        Raises:
            ValueError: If a depth or a setting is wrong, or if two settings exclude each other.
        """
        model_config = vllm_config.model_config
        if model_config.runner_type != "generate":  # a draft, whose target has been set up, or a pooling model
            return
        config = model_config.hf_config
        exit_layers = [default_exit_layer(config)]
        if depth_is_requests(vllm_config):
            _refuse_beside_depths(vllm_config)
            exit_layers = exit_layers_of(config)
            config.architectures = ["SegmentedLlamaForCausalLM"]
            vllm_config.scheduler_config.scheduler_cls = f"{__package__}.vllm_scheduler.make_scheduler"
            vllm_config.parallel_config.worker_cls = f"{__package__}.vllm_worker.DepthWorker"
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE  # a captured step knows no depth
        elif vllm_config.speculative_config is not None:
            _set_up_drafts(vllm_config)
        check = check_of(exit_layers, 2 if vllm_config.use_v2_model_runner else 1)
        model_config.logits_processors = [*(model_config.logits_processors or ()), check]


def depth_is_requests(vllm_config: VllmConfig) -> bool:
    """Whether each request chooses its depth; a `ValueError` where the setting is another one."""
    setting = (vllm_config.additional_config or {}).get("exit_layer")
    if setting not in (None, PER_REQUEST):
        raise ValueError(
            f"`exit_layer` of `--additional-config` must be {PER_REQUEST!r}, got {setting!r}: one depth for all "
            "requests is set by `--hf-overrides '{\"exit_layer\": k}'`."
        )
    return setting == PER_REQUEST


def segment_ends(vllm_config: VllmConfig) -> list[int]:
    """Where the decoder is cut: behind each depth that requests may ask for, or the draft's and the target's."""
    config = vllm_config.model_config.hf_config
    if depth_is_requests(vllm_config):
        return exit_layers_of(config)
    depth = default_exit_layer(config)
    return [check_exit_layer(config.assistant_early_exit, depth - 1, "assistant_early_exit"), depth]


def drafts_for_itself(vllm_config: VllmConfig) -> bool:
    """Whether the draft is the first layers of the model itself: the same checkpoint, however it is written."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return False
    return _checkpoint(speculative.draft_model_config) == _checkpoint(vllm_config.model_config)


def _set_up_drafts(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    _refuse("Drafts", {"`--worker-cls`": parallel.worker_cls != "auto"})
    if drafts_for_itself(vllm_config):
        config = vllm_config.model_config.hf_config
        if getattr(config, "assistant_early_exit", None) is None:
            raise ValueError(
                "A checkpoint that drafts for itself needs a depth: pass `--hf-overrides "
                "'{\"assistant_early_exit\": k}'` beside `--speculative-config`."
            )
        _refuse("Drafts from the first layers of the same checkpoint", _unknown_to_segments(vllm_config))
        segment_ends(vllm_config)  # checks the depth
        config.architectures = ["SegmentedLlamaForCausalLM"]
    # This worker also takes the check of requests away from the runner, which has none beside drafts
    parallel.worker_cls = f"{__package__}.vllm_worker.DraftWorker"


def _refuse_beside_depths(vllm_config: VllmConfig) -> None:
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    config, graphs = vllm_config.model_config.hf_config, vllm_config.compilation_config.cudagraph_mode
    excluded = {
        **_unknown_to_segments(vllm_config),
        "a checkpoint without `exit_layers`": len(exit_layers_of(config)) < 2,
        "`--speculative-config` (drafts)": vllm_config.speculative_config is not None,
        "`--pipeline-parallel-size`": parallel.pipeline_parallel_size > 1,
        "`--data-parallel-size`": parallel.data_parallel_size > 1,
        "`--decode-context-parallel-size`": parallel.decode_context_parallel_size > 1,
        "`--prefill-context-parallel-size`": parallel.prefill_context_parallel_size > 1,
        "`--enable-dbo`, `--ubatch-size`": parallel.use_ubatching,
        "`--kv-transfer-config`, or offloaded keys and values": vllm_config.kv_transfer_config is not None
        or vllm_config.cache_config.kv_offloading_size is not None,
        "`--disable-hybrid-kv-cache-manager`": bool(scheduler.disable_hybrid_kv_cache_manager),
        "`--scheduler-cls`": scheduler.scheduler_cls is not None,
        "captured graphs (`cudagraph_mode`), which know no depth": graphs not in (None, CUDAGraphMode.NONE),
        "adapters (`--enable-lora`), whose kernels take all tokens of a step in every layer": bool(
            vllm_config.lora_config
        ),
    }
    _refuse(f"A depth a request (`exit_layer={PER_REQUEST!r}`)", excluded)


def _unknown_to_segments(vllm_config: VllmConfig) -> dict[str, bool]:
    exit_heads = vllm_config.model_config.hf_config.exit_heads
    return {
        f"vLLM {vllm.__version__} (it has run with {', '.join(VERSIONS)})": not f"{vllm.__version__}.".startswith(
            tuple(f"{version}." for version in VERSIONS)
        ),
        "model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "`--worker-cls`": vllm_config.parallel_config.worker_cls != "auto",
        f"`exit_heads={exit_heads!r}`, whose exits own decoder layers (a server of one depth runs them)": LAYER
        in EXIT_HEADS[exit_heads].owned,
        f"the platform {current_platform.device_name}": not (
            current_platform.is_cpu() or current_platform.is_cuda_alike()
        ),
    }


def _refuse(what: str, excluded: dict[str, Any]) -> None:
    present = [name for name, is_there in excluded.items() if is_there]
    if present:
        raise ValueError(f"{what} cannot be served with {'; nor with '.join(present)}.")


def _checkpoint(model_config: ModelConfig) -> str:
    """One name for a checkpoint: offline, vLLM makes a folder of the target's Hub id alone."""
    if os.path.exists(model_config.model) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return os.path.realpath(get_model_path(model_config.model, model_config.revision))
    return model_config.model
