"""Sorted LLaMA (arXiv 2309.08968): one Llama checkpoint whose first `k` layers are a model for several `k`."""

if not __package__:
    raise ImportError(
        f"`import modeling_sorted_llama` found {__file__}, a checkpoint's code, which transformers imports with "
        "`trust_remote_code=True`: the installed package is `sorted_llama`."
    )

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_sorted_llama import check_cache_depth, is_sorted_cache
from .compat_sorted_llama import (
    CACHE_NAME,
    SavedAsItsModel,
    gather_in_backward,
    logger,
    slice_logits_to_keep,
    takes_either_cache_name,
)
from .configuration_sorted_llama import SortedLlamaConfig, as_sorted_config, check_exit_layer, check_exit_layers
from .families_sorted_llama import FusedTensorsError
from .generation_sorted_llama import SortedGenerationMixin
from .graphs_sorted_llama import check_compile_config, run_block
from .heads_sorted_llama import EXIT_HEADS, ExitHead, modules_of_exits
from .loss_sorted_llama import ExitLossOptions, check_labels, labelled_rows, multi_exit_loss
from .submodels_sorted_llama import LlamaOfFamily, LoadsLlamas, load, plain_submodel, sorted_model


@dataclass
class SortedModelOutputWithPast(BaseModelOutputWithPast):
    """
    [`~transformers.modeling_outputs.BaseModelOutputWithPast`] with the states that the exits read.

    Args:
        exit_hidden_states (`tuple[torch.Tensor]`, *optional*, returned when `exit_layers` is passed):
            What the norm of each exit reads, of shape `(batch_size, sequence_length, hidden_size)`.
    """

    exit_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class SortedCausalLMOutputWithPast(CausalLMOutputWithPast):
    """[`~transformers.modeling_outputs.CausalLMOutputWithPast`] with what [`MultiExitLossOutput`] tells of exits."""

    exit_losses: torch.Tensor | None = None
    exit_token_accuracies: torch.Tensor | None = None
    exit_agreements: torch.Tensor | None = None
    exit_divergences: torch.Tensor | None = None


class SortedLlamaModel(SavedAsItsModel, LoadsLlamas, LlamaModel):
    """[`~transformers.LlamaModel`] that runs as many of its layers as it is asked to."""

    config: SortedLlamaConfig
    config_class = SortedLlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(as_sorted_config(config))
        if self.config.fused_tensors_of is not None:
            raise FusedTensorsError(self.config)
        kind = EXIT_HEADS[self.config.exit_heads]
        self.exit_decoders = modules_of_exits(self.config, kind.make_layer)
        self.exit_norms = modules_of_exits(self.config, kind.make_norm)
        if self.exit_norms:
            self.post_init()

    def _init_weights(self, module):
        original = self._original(module)
        if original is None:
            super()._init_weights(module)
        else:  # where a Llama's checkpoint knows none
            EXIT_HEADS[self.config.exit_heads].init_as(module, original)

    def _original(self, module: nn.Module) -> nn.Module | None:
        """The module that one of an exit begins as; `None` for all others."""
        norms, decoders = (getattr(self, name, nn.ModuleDict()) for name in ("exit_norms", "exit_decoders"))
        if module in norms.values():  # Llama's constructor comes here before they are made
            return self.norm
        for k, decoder in decoders.items():
            for name, own in decoder.named_modules():
                if own is module:
                    return self.layers[int(k)].get_submodule(name)
        return None

    def exit_norm(self, exit_layer: int) -> nn.Module:
        """The norm between an exit and its head: the exit's own, or the final one."""
        return next((norm for k, norm in self.exit_norms.items() if int(k) == exit_layer), self.norm)

    def exit_decoder(self, exit_layer: int) -> nn.Module | None:
        """The decoder layer that an exit owns, with `exit_heads="layer"`."""
        return next((layer for k, layer in self.exit_decoders.items() if int(k) == exit_layer), None)

    def num_layers(self, exit_layer: int) -> int:
        """Number of decoder layers of a sub-model: those up to the exit, and the exit's own."""
        return exit_layer + (self.exit_decoder(exit_layer) is not None)

    def layers_of(self, exit_layer: int) -> list[nn.Module]:
        """The decoder layers of a sub-model, as [`num_layers`] counts them."""
        own = self.exit_decoder(exit_layer)
        return [*self.layers[:exit_layer], *([] if own is None else [own])]

    def depth(self, exit_layer: int | None = None) -> int:
        """Number of layers that a call with `exit_layer` runs: as many, or `config.exit_layer`, or all."""
        exit_layer = self.config.exit_layer if exit_layer is None else exit_layer
        if exit_layer is None:
            return self.config.num_hidden_layers
        check_exit_layer(exit_layer, len(self.layers))
        trained = self.config.exit_layers or [len(self.layers)]
        if exit_layer != len(self.layers) and exit_layer not in trained and not torch.compiler.is_compiling():
            logger.warning_once(
                f"`exit_layer={exit_layer}` is not among the exits that this checkpoint was trained for "
                f"(`exit_layers={trained}`): expect poor output until it is fine-tuned with that exit."
            )
        return exit_layer

    @takes_either_cache_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        exit_layer: int | None = None,
        exit_layers: Sequence[int] | None = None,
        detach_exits: bool = False,
        cache_rows: list[int] | None = None,
        one_by_one: bool = False,
        compile_config: CompileConfig | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SortedModelOutputWithPast:
        r"""
        Run the first layers. Llama's arguments keep their meaning; `past_key_values` is another name of `cache`.

        Args:
            exit_layer (`int`, *optional*):
                Number of layers to run, before the exit's own. Defaults to `config.exit_layer`, then to all.
            exit_layers (`list[int]`, *optional*):
                Exits whose hidden states to return, ascending, within the depth that runs.
            detach_exits (`bool`, *optional*, defaults to `False`):
                Whether no gradient goes from the exits below that depth into the layers that all share.
            cache_rows (`list[int]`, *optional*):
                With a [`SortedCache`], the rows of the cache that this input's rows are, ascending. Default to all.
            one_by_one (`bool`, *optional*, defaults to `False`):
                With a [`SortedCache`], whether several tokens are to be as if each came in a call of its own, which
                makes a difference to RoPE of kind `dynamic` and `longrope`.
            compile_config ([`~transformers.CompileConfig`], *optional*):
                With a [`SortedCache`] allocated at once (`max_cache_len`), how to compile the layers between two exits
                for blocks of up to 16 tokens a row. Defaults to not at all.

        Returns:
            [`SortedModelOutputWithPast`]: `last_hidden_state` is the normed output of the last layer that ran. With a
            [`SortedCache`], tokens that were pending below `exit_layer` are taken along and come before the new ones,
            of which there may be none; every row's newest is in the last column.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        depth = self.depth(exit_layer)
        exits = () if exit_layers is None else tuple(check_exit_layer(k, depth, "exit_layers") for k in exit_layers)
        below = [k for k in exits if k < depth]
        returned = self._check_returned(depth, below, cache, kwargs)
        if compile_config is not None:
            check_compile_config(compile_config, cache, self.config._attn_implementation, returned)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        inputs = inputs_embeds, position_ids, attention_mask
        if is_sorted_cache(cache):
            kwargs |= {"cache_rows": cache_rows, "one_by_one": one_by_one, "compile_config": compile_config}
            states, normed = self._run_segments(inputs, cache, depth, below, detach_exits, **kwargs)
        elif cache_rows is not None:
            raise ValueError("`cache_rows` chooses rows of a `SortedCache`: pass one as `cache`.")
        else:
            if use_cache and cache is None:
                cache = DynamicCache(config=self.config)
                del cache.layers[self.num_layers(depth) :]
            states = self._run_at_once(inputs, cache, depth, below, detach_exits, use_cache=use_cache, **kwargs)
            normed = None
        return SortedModelOutputWithPast(
            last_hidden_state=self.exit_norm(depth)(states[depth]) if normed is None else normed,
            exit_hidden_states=tuple(states[k] for k in exits) or None,
            **{CACHE_NAME: cache},
        )

    def _check_returned(self, depth: int, below: list[int], cache: Any, kwargs: dict[str, Any]) -> list[str]:
        """
        Refuse a plain cache, and states of all layers, where they would mix what belongs to several exits; which of
        these states are asked for.
        """
        own = [k for k in below if self.exit_decoder(k) is not None]
        asked = [n for n in ("output_hidden_states", "output_attentions") if kwargs.get(n, getattr(self.config, n))]
        if own and (asked or not (cache is None or is_sorted_cache(cache))):
            what = f"`{asked[0]}=True`" if asked else f"a {type(cache).__name__}"
            raise ValueError(
                f"Exits {own} own decoder layers, for which {what} has no place beside those of the model: leave it "
                f"out, or run one of them, `exit_layer={own[0]}` without `exit_layers`."
            )
        if asked and is_sorted_cache(cache) and cache.is_pending(depth):
            raise ValueError(
                f"`{asked[0]}=True` would return tokens that are pending in the cache among those of the input: take "
                f"them along first, with an input of no tokens (`input_ids[:, :0]`) at `exit_layer={depth}`."
            )
        return asked

    def _run_at_once(self, inputs, cache, depth, below, detach_exits, **kwargs: Any) -> dict[int, torch.Tensor]:
        """Run the layers up to `depth` as Llama does; by exit, what the norms at `below` and `depth` read."""
        inputs_embeds, position_ids, attention_mask = inputs
        if isinstance(cache, Cache) and not torch.compiler.is_compiling():  # continuous batching has its own kind
            # Not at every decoding step on an accelerator: `generate` has looked before the first
            synchronize = inputs_embeds.shape[1] > 1 or inputs_embeds.device.type == "cpu"
            check_cache_depth(cache, depth, self.num_layers(depth), synchronize)
        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = positions.unsqueeze(0)
        layer_inputs = {"position_ids": position_ids, CACHE_NAME: cache}
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **layer_inputs
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        layer_inputs |= {"attention_mask": causal_mask, "position_embeddings": position_embeddings, **kwargs}
        hidden_states, states = self._run_layers(depth, inputs_embeds, below, detach_exits, **layer_inputs)
        # What an exit on the way owns is for no token to come: the cache is the model's
        states = {k: self._behind_exit(k, kept, **layer_inputs | {CACHE_NAME: None}) for k, kept in states.items()}
        return {**states, depth: self._behind_exit(depth, hidden_states, **layer_inputs)}

    def _run_layers(
        self, depth: int, hidden_states: torch.Tensor, kept: Sequence[int], detach: bool, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run the layers up to `depth`; their output, and the states behind those of them that are in `kept`."""
        kept_states = {}
        for layers_run, decoder_layer in enumerate([*self.layers][:depth], start=1):
            hidden_states = decoder_layer(hidden_states, **kwargs)
            if layers_run in kept:
                states = hidden_states.detach() if detach else hidden_states
                if detach and self.gradient_checkpointing and self.training:
                    states.requires_grad_()  # where it is reentrant, a layer is not trained on states that need none
                kept_states[layers_run] = states
        return hidden_states, kept_states

    def _behind_exit(self, exit_layer: int, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """What the norm of an exit reads: the states there, or what the exit's own layer makes of them."""
        own = self.exit_decoder(exit_layer)
        return hidden_states if own is None else own(hidden_states, **kwargs)

    def _run_segments(
        self, inputs, cache, depth, below, detach_exits, cache_rows, one_by_one, compile_config, **kwargs: Any
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """As [`_run_at_once`], taking along what is pending on the way; and the normed states, where a graph ran."""
        if cache_rows is not None and cache_rows == list(range(len(cache.lengths))):
            cache_rows = None
        own = [int(k) for k in self.exit_decoders]
        # Graphs end at every exit, whatever the depth: all calls share them
        of_graphs = [] if compile_config is None else self.config.exit_layers or []
        segments = cache.segments(depth, cache_rows, [*own, *below, *of_graphs])
        for k in {*below, depth}.intersection(own):
            cache.check_exit(k, cache_rows)
        block = cache.append(*inputs, cache_rows, rotary_emb=self.rotary_emb, one_by_one=one_by_one)
        run: Any = partial(run_block, self, cache, compile_config=compile_config, **kwargs)
        hidden_states, states, modules = inputs[0], {}, [*self.layers]  # a slice of a `ModuleList` is dear
        if block.width == 0:
            segments = cache.from_pending(segments, [*below, depth])
        for first, last in segments:
            layers = cache.trunk(first, last)
            with cache.segment(layers, hidden_states, block) as (hidden_states, block):
                norm = self.exit_norm(last)
                hidden_states, normed = run(modules[first:last], norm, layers, hidden_states, block)
                if last == depth < len(self.layers):
                    cache.trunk(last, last + 1)[0].suspend(hidden_states, block)
            if last == depth or last in below:
                at_exit = hidden_states.detach() if detach_exits and last < depth else hidden_states
                states[last], normed = self._behind_exit_in(cache, last, at_exit, normed, block, run)
            elif last in own:
                cache.of_exit(last).suspend(hidden_states, block)
        return states, normed

    def _behind_exit_in(self, cache, exit_layer: int, hidden_states, normed, block, run):
        """As [`_behind_exit`], of a block and what is pending before the exit's own layer; and the normed states."""
        own = self.exit_decoder(exit_layer)
        if own is not None:
            layers = [cache.of_exit(exit_layer)]
            with cache.segment(layers, hidden_states, block) as (hidden_states, block):
                hidden_states, normed = run([own], self.exit_norm(exit_layer), layers, hidden_states, block)
        return block.align_right(hidden_states), None if normed is None else block.align_right(normed)


class SortedLlamaForCausalLM(SavedAsItsModel, LoadsLlamas, SortedGenerationMixin, LlamaForCausalLM):
    """
    [`~transformers.LlamaForCausalLM`] whose first `k` layers, with the same final norm and LM head, are a model of
    their own: `exit_layer=k` in `forward` and in `generate` runs them and nothing more.

    Parameter names are Llama's own, so any Llama checkpoint loads as a sorted model and the other way round.

    Example:

    ```python
    >>> from sorted_llama import SortedLlamaForCausalLM
    >>> from transformers import AutoTokenizer
    >>> model = SortedLlamaForCausalLM.from_pretrained("user/sorted-llama")
    >>> tokenizer = AutoTokenizer.from_pretrained("user/sorted-llama")
    >>> chat = [{"role": "user", "content": "What is the capital of Peru?"}]
    >>> inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    >>> tokens = model.generate(**inputs, exit_layer=10, max_new_tokens=8)
    >>> print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    ```
    """

    config: SortedLlamaConfig
    config_class = SortedLlamaConfig

    def __init__(self, config: LlamaConfig):
        # Past `LlamaForCausalLM.__init__`, which would build a plain inner model first
        LlamaPreTrainedModel.__init__(self, as_sorted_config(config))
        self.model = SortedLlamaModel(self.config)
        self.vocab_size = self.config.vocab_size
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.exit_lm_heads = modules_of_exits(self.config, EXIT_HEADS[self.config.exit_heads].make_head)
        self.post_init()

    def _init_weights(self, module):
        if module in self.exit_lm_heads.values():  # where a Llama's checkpoint knows none
            shared = self.get_input_embeddings() if self.config.tie_word_embeddings else self.lm_head
            init.copy_(module.weight, shared.weight)
        else:
            super()._init_weights(module)

    def exit_head(self, exit_layer: int) -> nn.Module:
        """The LM head of an exit: the exit's own, or the one that all share."""
        shared = self.get_output_embeddings()  # not `self.lm_head`: PEFT may have put another module in its place
        return next((head for k, head in self.exit_lm_heads.items() if int(k) == exit_layer), shared)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for k, head in self.exit_lm_heads.items():
            self.exit_lm_heads[k] = ExitHead.resized(head, self.get_output_embeddings().weight)
        return embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any):
        """
        Load a sorted model, or any Llama or model of a family that is one (Mistral, Qwen2, Phi-3, ...) as one: see
        [`~transformers.PreTrainedModel.from_pretrained`]. Fields of the config are keyword arguments
        (`exit_layers=[...]`), and `num_hidden_layers=k` reads only the first `k` layers.
        """
        return load(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @takes_either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        exit_layer: int | None = None,
        exit_layers: list[int] | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SortedCausalLMOutputWithPast:
        r"""
        Run the model, or its first layers. Llama's arguments keep their meaning; `past_key_values` is another name of
        `cache`.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens to predict, not shifted, `-100` where there is no loss. The loss is that of `exit_layer` where
                it is passed; else, with `exit_layers`, the SoFT objective; else Llama's.
            exit_layer (`int`, *optional*):
                Number of layers to run. Defaults to `config.exit_layer`, then to all.
            exit_layers (`list[int]`, *optional*):
                Exits whose losses are summed, ascending, ending in the full depth. Defaults to `config.exit_layers`.
            shift_labels (`torch.LongTensor`, *optional*):
                Labels already shifted by one, as passed under context parallelism; used in place of `labels`.
            skip_logits (`bool`, *optional*):
                Whether to leave `logits` out of the output of a SoFT loss. Defaults to `True` while training several
                exits, where they would be the largest tensor of the step.
            kwargs (`Any`, *optional*):
                The fields of [`ExitLossOptions`], with a SoFT loss; `num_items_in_batch`; what Llama takes.

        Returns:
            [`SortedCausalLMOutputWithPast`]: `logits` are those of the deepest layer that ran. With a [`SortedCache`],
            those of tokens that were pending come before the input's, unless `labels` or a tensor of `logits_to_keep`
            count the input's; a number of `logits_to_keep` keeps the newest of both.
        """
        exits = self._loss_exits(exit_layer, exit_layers, labels)
        loss_arguments = self._loss_arguments(kwargs, exits)
        depth = self.config.num_hidden_layers if exits is not None else self.model.depth(exit_layer)
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        if labels is not None and tokens is not None:
            check_labels(tokens.shape[:2], labels=labels, shift_labels=loss_arguments.get("shift_labels"))

        outputs: SortedModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            exit_layer=depth,
            exit_layers=exits,
            detach_exits=exits is not None and loss_arguments["options"].detach_exits,
            **kwargs,
        )
        logits, losses = None, {}
        if exits is not None:
            losses = vars(self._multi_exit_loss(exits, outputs.exit_hidden_states, labels, **loss_arguments))
            skip_logits = self.training and len(exits) > 1 if skip_logits is None else skip_logits
        if exits is None or not skip_logits:
            states: Any = outputs.last_hidden_state
            if labels is not None or isinstance(logits_to_keep, torch.Tensor):  # they count the input's tokens
                states = _newest(states, tokens.shape[1])
            logits = self.exit_head(depth)(slice_logits_to_keep(states, logits_to_keep))
        if exits is None and labels is not None:
            losses = {"loss": self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)}

        return SortedCausalLMOutputWithPast(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _loss_exits(self, exit_layer, exit_layers, labels) -> list[int] | None:
        """The exits of a SoFT loss; `None` where the call has no loss or a single exit's."""
        if exit_layers is None:
            of_one_exit = labels is None or exit_layer is not None or self.config.exit_layer is not None
            exit_layers = None if of_one_exit else self.config.exit_layers
        elif exit_layer is not None:
            raise ValueError(
                f"`exit_layer={exit_layer!r}` and `exit_layers={exit_layers!r}` contradict each other: pass one."
            )
        elif labels is None:
            raise ValueError(f"`exit_layers={exit_layers!r}` chooses the exits of the loss: pass `labels` too.")
        return None if exit_layers is None else check_exit_layers(exit_layers, self.config.num_hidden_layers)

    def _loss_arguments(self, kwargs: dict[str, Any], exits: list[int] | None) -> dict[str, Any]:
        """Take the arguments of a SoFT loss out of `kwargs`; checked here, before any layer runs."""
        given = ExitLossOptions.pop_from(kwargs)
        if exits is None:
            if given:
                raise ValueError(
                    f"{given} are for the SoFT loss, which needs `labels` and `exit_layers`, and no `exit_layer`."
                )
            return {}
        if exits == self.config.exit_layers:
            given.setdefault("exit_loss_weights", self.config.exit_loss_weights)
        options = ExitLossOptions(**given)
        options.check(exits, self.config.own_exits)
        return {"options": options} | {name: kwargs.pop(name, None) for name in ("shift_labels", "num_items_in_batch")}

    def _multi_exit_loss(self, exits, hidden_states, labels, options, shift_labels, num_items_in_batch):
        rows, targets = labelled_rows(labels, shift_labels)
        normed = []
        for k, states in zip(exits, hidden_states, strict=True):
            states = _newest(states, labels.shape[1]).flatten(0, -2).index_select(0, rows.to(states.device))
            normed.append(self.model.exit_norm(k)(states))
        heads = [self.exit_head(k) for k in exits]
        gather_in_backward(self, heads)
        return multi_exit_loss(normed, heads, targets, options, num_items_in_batch)

    def extract_submodel(self, exit_layer: int) -> LlamaForCausalLM:
        """
        The first `exit_layer` layers as a plain Llama that *shares* its tensors with this model: training either
        trains both, and `save_pretrained` writes a vanilla Llama checkpoint for any engine. The head of an exit with
        `exit_heads="lens"` alone is new: the shared head, which may not be quantized, times the exit's matrix.
        """
        check_exit_layer(exit_layer, len(self.model.layers))
        return plain_submodel(self, exit_layer)

    @classmethod
    def from_llama(cls, model: PreTrainedModel, **kwargs: Any) -> "SortedLlamaForCausalLM":
        """
        A sorted model that *shares* its tensors with a Llama (as loaded, quantized or with adapters injected): no copy
        is made, and training either trains both. `kwargs` are fields of [`SortedLlamaConfig`] (`exit_layers=[...]`).
        Of a model of a family that is a Llama ([`~transformers.Qwen2ForCausalLM`], ...) some tensors are new.
        """
        model = LlamaOfFamily.of_model(model)
        return sorted_model(model, cls, SortedLlamaConfig.from_llama(model.config, **kwargs))


def _newest(states: torch.Tensor, number: int) -> torch.Tensor:
    """The states of the `number` newest tokens: before them is what was pending in a [`SortedCache`]."""
    return states[:, states.shape[1] - number :]


SortedLlamaModel.register_for_auto_class("AutoModel")
SortedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
