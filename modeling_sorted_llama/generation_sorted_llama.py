"""The methods of `GenerationMixin` that know of the depth. Everything else of `generate` is transformers' own."""

import functools
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin

from .cache_sorted_llama import SortedCache, check_cache_depth
from .compat_sorted_llama import CACHE_NAME
from .drafting_sorted_llama import decode_with_drafts
from .exiting_sorted_llama import decode_with_exits
from .modes_sorted_llama import (
    DECODED_MODES,
    SORTED_GENERATION_FIELDS,
    ConfidenceExit,
    RowDepths,
    SelfSpeculation,
    check_company_in_memory,
    check_continuous_batching,
    choose_decoding,
    read_decoding_fields,
    row_hooks,
)
from .sequences_sorted_llama import Sequences, SortedGenerateOutput


class SortedGenerationMixin(GenerationMixin):
    """`generate` and continuous batching of a sorted model; to be put before the classes of its Llama."""

    model: Any

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any):
        try:
            return super().generate(*args, **kwargs)
        except BaseException:
            for module, key, _ in row_hooks(self):  # or every later call would fail
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
            raise

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        # `generate` keeps unknown fields of a generation config but hands none to `forward`: carry the depth over
        fields = read_decoding_fields(self, generation_config, kwargs)
        if fields["num_assistant_tokens"] == "auto":
            kwargs["num_assistant_tokens"] = None  # a number to transformers
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if "cache" in model_kwargs and CACHE_NAME != "cache":  # the new name, on a transformers that knows the old
            model_kwargs[CACHE_NAME] = model_kwargs.pop("cache")
        for name in SORTED_GENERATION_FIELDS:  # an assistant model is given this config: it has its own depth
            model_kwargs.pop(name, None)
            if hasattr(generation_config, name):
                delattr(generation_config, name)
        decoding = choose_decoding(self, generation_config, fields)
        if decoding is not None:
            generation_config.sorted_decoding = decoding
            generation_config.use_cache = True
            generation_config.assistant_early_exit = generation_config.prompt_lookup_num_tokens = None
        elif fields["exit_layer"] is not None:
            model_kwargs["exit_layer"] = fields["exit_layer"]
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, *args: Any, **kwargs: Any
    ):
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        depth = model_kwargs.get("exit_layer") or len(self.model.layers)
        if given is not None:
            given._is_user_defined = True  # as transformers notes it, from 5.24 on
        if hasattr(generation_config, "sorted_decoding"):
            if generation_mode not in DECODED_MODES:
                raise ValueError(
                    "`exit_threshold`, `assistant_early_exit` and a depth for each row work with greedy decoding and "
                    f"sampling, not with {generation_mode.value}: do not pass `assistant_model`."
                )
            if given is None:
                static = generation_config.cache_implementation == "static"
                model_kwargs[CACHE_NAME] = SortedCache(generation_config.max_length if static else 0)
        elif given is not None:
            check_cache_depth(given, depth, synchronize=True)
        elif isinstance(cache, Cache):
            del cache.layers[depth:]  # keys and values of the layers that run, and no more
            cache.offloading = cache.offloading and depth > 1  # a lone layer would be fetched while it is in use

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ):
        decoding = getattr(generation_config, "sorted_decoding", None)
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if decoding is None:
            return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **kwargs)
        if synced_gpus:
            raise ValueError(
                "Decoding at moving depth takes a different number of steps on every process, so that sharded weights "
                "(`synced_gpus=True`: DeepSpeed ZeRO-3, FSDP) would wait for each other forever: gather them first."
            )
        check_company_in_memory(self, logits_processor)
        return decode(Sequences(self, *arguments, streamer, kwargs), decoding)

    def init_continuous_batching(self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any):
        """
        See [`~transformers.ContinuousMixin`]: all requests run at `config.exit_layer`, or at full depth.

        Raises:
            ValueError: If `generation_config` asks for another depth.
        """
        check_continuous_batching(self, generation_config, {})
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def generate_batch(
        self, inputs: list[list[int]], generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ):
        """
        See [`~transformers.ContinuousMixin`]: all requests run at `config.exit_layer`, or at full depth.

        Raises:
            ValueError: If `generation_config`, or a keyword argument, asks for another depth.
        """
        check_continuous_batching(self, generation_config, kwargs)
        return super().generate_batch(inputs, generation_config, *args, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any):
        if kwargs.get("assistant_model") is not None:  # it runs at its own depth
            kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k != "exit_layer"}
        return super()._get_candidate_generator(*args, **kwargs)


def decode(
    sequences: Sequences, decoding: ConfidenceExit | RowDepths | SelfSpeculation
) -> SortedGenerateOutput | torch.Tensor:
    """
    Decode in one of the modes: what `generate` calls once transformers has prepared prompt, processors and criteria.

    Returns:
        [`SortedGenerateOutput`] with `return_dict_in_generate`, else the sequences, `(batch_size, length)`.
    """
    if isinstance(decoding, SelfSpeculation):
        return decode_with_drafts(sequences, decoding)
    return decode_with_exits(sequences, decoding)
