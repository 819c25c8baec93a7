"""A model, or the sub-model of an exit, as a checkpoint of a plain Llama, for every engine that knows Llama."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    ModelCard,
    ModelCardData,
    hf_hub_download,
    split_torch_state_dict_into_shards,
    try_to_load_from_cache,
)
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from yaml import YAMLError

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.modeling_sorted_llama import heads_sorted_llama as heads
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import (
    check_choice,
    check_exit_layer,
)
from sorted_llama.modeling_sorted_llama.families_sorted_llama import (
    FAMILIES,
    WAYS_BACK,
    Family,
    family_config,
    lacks_output_bias,
)
from sorted_llama.modeling_sorted_llama.modes_sorted_llama import make_plain
from sorted_llama.trainer.escaping import hub_links, markdown, one_line, python_literal
from sorted_llama.trainer.model_card import QUESTION, START

from .adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, convert_adapter
from .checkpoint import load_config, load_tokenizer
from .record import FILE_NAME, exit_scores, load_evaluation


Find = Callable[[str], Path | None]  # of a name, where that file of the checkpoint is; `None` if it has none
MODEL_TYPES = ("llama", *WAYS_BACK)  # that a checkpoint can be written as
_EMBEDDINGS, _HEAD = f"{heads.EMBEDDINGS}.weight", f"{heads.HEAD}.weight"
_WHOLE = " The whole checkpoint holds this model too, beside the deeper ones."


def extract(
    path: str | Path,
    exit_layer: int | None,
    output: str | Path,
    revision: str | None = None,
    name: str | None = None,
    max_shard_size: int | str = "5GB",
    model_type: str = "llama",
    trust_remote_code: bool = False,
    max_position_embeddings: int | None = None,
) -> Path:
    """
    Write a model, or the sub-model of an exit, as a plain Llama: weights, configuration, tokenizer, chat template,
    generation configuration and a page. What is above the exit is neither downloaded, where whole files hold nothing
    else, nor read; no more than one file of the result is in memory at a time. The folder appears when it is whole.

    Args:
        path (`str` or `Path`): Model id or path of a sorted Llama, of a Llama, or of a model of a family that is one,
            in safetensors; without `exit_layer` also of a LoRA adapter, see [`convert_adapter`].
        exit_layer (`int`, *optional*): Number of layers, from 1 to all. `None` means all.
        output (`str` or `Path`): Folder to make.
        revision (`str`, *optional*): Branch, tag or commit on the Hub. Defaults to the main branch.
        name (`str`, *optional*): What the page calls it: its id on the Hub. Defaults to the folder.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size of a file, at most.
        model_type (`str`, *optional*, defaults to `"llama"`): What to write: `"llama"`, or where nothing was trained
            that it does not have, `"mistral"` or `"qwen2"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether the tokenizer may run code from `path`.
        max_position_embeddings (`int`, *optional*): Length of text to allow: within the sliding window of a model that
            has one, it is a Llama. Defaults to what the configuration says.

    Raises:
        ValueError: If `exit_layer` is out of range, if `output` is there already, if there are no safetensors in
            `path`, or not those of all layers and a head, if a file there cannot be read, if a quantized head would
            have to be multiplied by the matrix of an exit, or if no model of `model_type` is the same.
    """
    output, path = Path(output), str(path)
    if output.exists():
        raise ValueError(f"`output` must be a folder that is not there yet, got {str(output)!r}.")
    check_choice(model_type, "model_type", MODEL_TYPES)
    find = partial(_find, path, revision)
    adapter = find(ADAPTER_CONFIG) if exit_layer is None else None
    if adapter is not None:
        return convert_adapter(adapter, find(ADAPTER_WEIGHTS), output)
    length = {} if max_position_embeddings is None else {"max_position_embeddings": max_position_embeddings}
    config = load_config(path, revision, **length)
    exit_layer = config.num_hidden_layers if exit_layer is None else exit_layer
    check_exit_layer(exit_layer, config.num_hidden_layers, "exit_layer")
    if exit_layer not in (trained := config.exit_layers or [config.num_hidden_layers]):
        warnings.warn(
            f"Exit {exit_layer} is none that {path!r} was trained for, {trained}: expect poor output.", stacklevel=2
        )
    llama_config = config.to_llama(exit_layer)
    llama_config.architectures = ["LlamaForCausalLM"]
    new_config = llama_config if model_type == "llama" else family_config(llama_config, model_type)
    has_tokenizer = find("tokenizer_config.json") is not None
    tokenizer = load_tokenizer(path, revision, trust_remote_code) if has_tokenizer else None
    chat = tokenizer is not None and tokenizer.chat_template is not None
    page = _page(path, find, config, exit_layer, name or str(output), chat, model_type)

    unfinished = output.with_name(output.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        weights = _read_weights(find, _weight_map(path, revision, find), config, exit_layer)
    except SafetensorError as error:
        raise ValueError(f"The weights of {path!r} could not be read: {one_line(error)}") from error
    _set_absent_biases(weights, llama_config, model_type)
    _save_weights(weights, unfinished, max_shard_size)
    new_config.save_pretrained(unfinished)
    if find("generation_config.json") is not None:
        generation_config = GenerationConfig.from_pretrained(path, revision=revision)
        make_plain(generation_config)
        generation_config.save_pretrained(unfinished)
    if tokenizer is not None:
        tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").write_text(page, encoding="utf-8")
    unfinished.replace(output)
    return output


def _find(path: str, revision: str | None, name: str) -> Path | None:
    """Where a file of a checkpoint is, downloaded if need be; `None` if the checkpoint has no such file."""
    if Path(path).is_dir():
        return Path(path, name) if Path(path, name).is_file() else None
    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:  # nobody knows whether it is there
        raise ValueError(f"`path`: the Hub could not be asked for {name} of {path!r}: {one_line(error)}") from error


def _weight_map(path: str, revision: str | None, find: Find) -> dict[str, str]:
    """Name of each tensor, and of the file that holds it."""
    cached = None if Path(path).is_dir() else try_to_load_from_cache(path, SAFE_WEIGHTS_NAME, revision=revision)
    index = None if isinstance(cached, str) else find(SAFE_WEIGHTS_INDEX_NAME)  # offline it need not be known
    if index is not None:
        try:
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`path`: {str(index)!r} is no index of weights: {one_line(error)}") from error
    single = find(SAFE_WEIGHTS_NAME)
    if single is None:
        raise ValueError(f"`path` must hold its weights as safetensors, got {path!r}.")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)


def _read_weights(
    find: Find, weight_map: dict[str, str], config: SortedLlamaConfig, exit_layer: int
) -> dict[str, torch.Tensor]:
    """The tensors of the plain Llama. They map their files: it is the writing that reads them."""
    family = FAMILIES[config.fused_tensors_of] if config.fused_tensors_of else Family()
    sources = {llama: name for name in weight_map for llama in family.llama_names(name)}
    names = _names_of_submodel(sources, config, exit_layer)
    if _HEAD in weight_map and (_HEAD not in names or _HEAD in family.llama_names(_EMBEDDINGS)):
        _check_tied_head(find, weight_map)
    weights: dict[str, torch.Tensor] = {}
    for file in {weight_map[sources[llama]] for llama in names.values()}:
        with safe_open(find(file), "pt") as opened:
            for name in {sources[llama] for llama in names.values() if weight_map[sources[llama]] == file}:
                parts = family.split(name, opened.get_tensor(name), config)
                of_llama = dict(zip(family.llama_names(name), parts, strict=True))
                weights |= {target: of_llama[llama] for target, llama in names.items() if llama in of_llama}
    matrix = weights.pop(heads.MATRIX, None)
    if matrix is not None:
        weights[_HEAD] = heads.fold_lens(weights[_HEAD], matrix)
    return {target: weights[target] for target in names if target in weights}


def _check_tied_head(find: Find, weight_map: dict[str, str]) -> None:
    """Refuse a head that is not the embeddings, of which `config.json` says that it is: transformers would read it."""
    head, embeddings = (safe_open(find(weight_map[name]), "pt").get_tensor(name) for name in (_HEAD, _EMBEDDINGS))
    if not torch.equal(head, embeddings):
        raise ValueError(
            f"`path` must hold embeddings that are the head too, as its `tie_word_embeddings=True` says, or say "
            f"`false`: {_HEAD} has other values."
        )


def _save_weights(weights: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    on_meta = {name: tensor.to("meta") for name, tensor in weights.items()}  # each counts, also those split from one
    shards = split_torch_state_dict_into_shards(on_meta, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: weights[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _set_absent_biases(weights: dict[str, torch.Tensor], config: LlamaConfig, model_type: str) -> None:
    """Zeros for biases that a Llama has and the family of its checkpoint not; or none, in that family again."""
    if model_type == "llama":
        for name in [name for name in weights if lacks_output_bias(config) and name.endswith("q_proj.bias")]:
            zeros = torch.zeros(config.hidden_size, dtype=weights[name].dtype)
            weights.setdefault(name.replace("q_proj", "o_proj"), zeros)
        return
    for name in [name for name in weights if name.endswith("o_proj.bias")]:
        if weights.pop(name).any():
            raise ValueError(f"A model of type {model_type!r} has no {name}: in this one it is not zero.")


def _names_of_submodel(tensors: Iterable[str], config: SortedLlamaConfig, exit_layer: int) -> dict[str, str]:
    """Of each tensor of the plain Llama, and of a lens, the tensor of the checkpoint that it is."""
    targets = {name: heads.submodel_name(name, config, exit_layer) for name in tensors}
    names = {target: name for name, target in targets.items() if target is not None}
    llama_config = config.to_llama(exit_layer)
    with torch.device("meta"):
        plain = LlamaForCausalLM(llama_config)
    if heads.MATRIX in names:
        names.setdefault(_HEAD, _EMBEDDINGS)
    elif llama_config.tie_word_embeddings:
        names.pop(_HEAD, None)
    there = {name.rpartition(".")[0] for name in names}
    for name, _ in plain.named_parameters():  # by module: quantized ones have tensors of other names
        module = name.rpartition(".")[0]
        if module not in there:
            raise ValueError(f"`path` must hold a model with its head, under its class's names: it has no {module!r}.")
    return names


def _page(
    path: str, find: Find, config: SortedLlamaConfig, exit_layer: int, name: str, chat: bool, model_type: str
) -> str:
    file, evaluation, is_local = find("README.md"), find(FILE_NAME), Path(path).is_dir()
    theirs: Any = ModelCardData()
    if file is not None:
        try:
            theirs = ModelCard.load(file, ignore_metadata_errors=True).data
        except (ValueError, TypeError, YAMLError) as error:
            raise ValueError(f"The page {str(file)!r} could not be read: {one_line(error)}") from error
    data = ModelCardData(
        base_model=theirs.base_model if is_local else path,
        license=theirs.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama", "soft", "early-exit"],
        datasets=theirs.datasets,
        language=theirs.language,
    )
    made_from = markdown(Path(path).resolve().name) if is_local else hub_links(path)
    own = " and one of the exit's own" if heads.num_layers_of(config, exit_layer) > exit_layer else ""
    kind = "plain Llama, which runs wherever Llamas run" if model_type == "llama" else f"model of type `{model_type}`"
    which, rest = f"The first {exit_layer} of {config.num_hidden_layers} layers", _WHOLE
    if exit_layer == config.num_hidden_layers:
        which, rest = f"All {exit_layer} layers", ""
    asked, answer = (START, "") if not chat else ([{"role": "user", "content": QUESTION}], '[-1]["content"]')
    call = f'print(pipe({json.dumps(asked)})[0]["generated_text"]{answer})'
    blocks = [
        f"---\n{data.to_yaml()}\n---",
        f"# {markdown(Path(name).name)}",
        f"{which} of {made_from}{own} as a {kind}.{rest}",
        "```python\nfrom transformers import pipeline\n\n"
        f'pipe = pipeline("text-generation", {python_literal(name)})\n{call}\n```',
    ]
    scores = [] if evaluation is None else _scores(load_evaluation(evaluation), exit_layer)
    blocks += ["\n".join(scores)] if scores else ["It was not evaluated at this depth."]
    return "\n\n".join(blocks) + "\n"


def _scores(record: dict[str, Any], exit_layer: int) -> list[str]:
    """Rows of a table: what the evaluation of the whole checkpoint found of this exit."""
    rows = [
        f"| {markdown(score.task)} | {markdown(score.metric.replace('_', ' '))} | {score.shown} |"
        for score in exit_scores(record)
        if score.exit_layer == exit_layer
    ]
    return ["| task | metric | score |", "|---|---|---:|", *rows] if rows else []
