"""The methods of `GenerationMixin` that know of the depth. Everything else of `generate` is transformers' own."""

import copy
import functools
import os
from types import SimpleNamespace
from typing import Any

from transformers import Cache, CompileConfig, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from .cache_sorted_llama import SortedCache, check_cache_depth
from .compat_sorted_llama import CACHE_NAME, logger
from .drafting_sorted_llama import decode_with_drafts
from .exiting_sorted_llama import decode_with_exits
from .layer_inputs_sorted_llama import takes_slots
from .modes_sorted_llama import (
    SORTED_GENERATION_FIELDS,
    OneDepth,
    SelfSpeculation,
    check_continuous_batching,
    check_model_and_processors,
    choose_decoding,
    read_decoding_fields,
    row_hooks,
)
from .sequences_sorted_llama import Sequences


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

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        if any(hasattr(self.generation_config, name) for name in SORTED_GENERATION_FIELDS):
            # Loading drops the fields that transformers does not know where this flag is set
            self.generation_config._from_model_config = False
        super().save_pretrained(save_directory, **kwargs)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        fields = read_decoding_fields(self, generation_config, kwargs)
        # From here on the generation config is a copy for this call. transformers keeps the fields that it does not
        # know there, and hands none to `forward`
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        decoding = choose_decoding(self, generation_config, fields)
        for name in SORTED_GENERATION_FIELDS:
            model_kwargs.pop(name, None)
        if "cache" in model_kwargs and CACHE_NAME != "cache":  # the new name, on a transformers that knows the old
            model_kwargs[CACHE_NAME] = model_kwargs.pop("cache")
        if generation_config.num_assistant_tokens == "auto":
            generation_config.num_assistant_tokens = None
        if generation_config.compile_config is not None:  # asked for: also where transformers would not by itself
            generation_config.compile_config = copy.copy(generation_config.compile_config)
            generation_config.compile_config._compile_all_devices = True
        # Depth that moves is for the two methods below, one depth for `forward`
        generation_config.sorted_decoding = None if isinstance(decoding, OneDepth) else decoding
        if isinstance(decoding, OneDepth):
            model_kwargs["exit_layer"] = decoding.exit_layer
        elif decoding is not None:
            generation_config.use_cache = True
        if decoding is not None:
            generation_config.assistant_early_exit = None  # transformers' own, of the model's generation config
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, *args: Any, **kwargs: Any
    ):
        decoding, given = getattr(generation_config, "sorted_decoding", None), model_kwargs.get(CACHE_NAME)
        depth = model_kwargs.get("exit_layer")
        by_lookup = generation_config.prompt_lookup_num_tokens is not None
        if generation_mode == GenerationMode.ASSISTED_GENERATION and not by_lookup and (decoding or depth):
            asked = f"exit_layer={depth}" if decoding is None else decoding.chosen_by
            raise ValueError(
                f"`assistant_model` cannot be passed together with `{asked}`: leave one of them out, or let an exit "
                "draft, with `assistant_early_exit=k`."
            )
        if decoding is None or given is not None:  # else `Sequences` makes a `SortedCache`
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if decoding is not None:
            return
        depth, cache = depth or len(self.model.layers), model_kwargs.get(CACHE_NAME)
        num_layers = self.model.num_layers(depth)
        if given is None and isinstance(cache, Cache):
            del cache.layers[num_layers:]  # keys and values of the layers that run, and no more
            cache.offloading = cache.offloading and num_layers > 1  # a lone layer would be fetched while it is in use
        if isinstance(cache, Cache):
            check_cache_depth(cache, depth, num_layers, synchronize=True)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs: Any,
    ):
        decoding = getattr(generation_config, "sorted_decoding", None)
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if decoding is None:
            return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **kwargs)
        if synced_gpus:
            raise ValueError(
                "Decoding at moving depth takes other steps on every process; sharded weights (`synced_gpus=True`: "
                "DeepSpeed ZeRO-3, FSDP) would wait for each other forever: gather them first."
            )
        check_model_and_processors(self, logits_processor)
        decode = decode_with_drafts if isinstance(decoding, SelfSpeculation) else decode_with_exits
        return decode(Sequences(self, *arguments, streamer, kwargs), decoding)

    def compile_config_for(self, cache: SortedCache, generation_config: GenerationConfig) -> CompileConfig | None:
        """How a call compiles the layers between two exits: where transformers compiles, too, with a static cache."""
        compileable = SimpleNamespace(is_compileable=cache.max_cache_len > 0)
        if not self._valid_auto_compile_criteria({CACHE_NAME: compileable}, generation_config):
            return None
        attention = self.config._attn_implementation
        cannot = {
            f"`attn_implementation={attention!r}`, which takes no mask of slots": not takes_slots(attention),
            "layers on several devices": len(set(getattr(self, "hf_device_map", {}).values())) > 1,
            "adapters by row": bool(row_hooks(self)),
        }
        what = next((what for what, is_so in cannot.items() if is_so), None)
        if what is None:
            return generation_config.compile_config or self._default_compile_config()
        if generation_config.compile_config is not None:
            logger.warning_once(f"Decoding at moving depth does not compile with {what}: it runs uncompiled.")
        return None

    def init_continuous_batching(self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any):
        """See [`~transformers.ContinuousMixin`]: all requests run at `config.exit_layer`, or at full depth."""
        check_continuous_batching(self, generation_config, {})
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def generate_batch(
        self, inputs: list[list[int]], generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ):
        """As [`init_continuous_batching`]."""
        check_continuous_batching(self, generation_config, kwargs)
        return super().generate_batch(inputs, generation_config, *args, **kwargs)
