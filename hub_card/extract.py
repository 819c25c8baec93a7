"""The sub-model of an exit as a plain Llama checkpoint, for every engine that knows Llama."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
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
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from yaml import YAMLError

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layer
from sorted_llama.modeling_sorted_llama.heads_sorted_llama import (
    EMBEDDINGS,
    HEAD,
    fold_lens,
    folded_matrix,
    submodel_name,
)
from sorted_llama.modeling_sorted_llama.modes_sorted_llama import make_plain
from sorted_llama.trainer.escaping import hub_links, markdown, one_line, python_literal
from sorted_llama.trainer.model_card import QUESTION, START

from .checkpoint import load_config, load_tokenizer
from .record import FILE_NAME, exit_scores, load_evaluation


def extract(
    path: str | Path,
    exit_layer: int,
    output: str | Path,
    revision: str | None = None,
    name: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """
    Write the sub-model of an exit as a plain Llama: weights, configuration, tokenizer, chat template, generation
    configuration and a page. What is above the exit is neither downloaded, where whole files hold nothing else, nor
    read; no more than one file of the result is in memory at a time. The folder appears when it is whole.

    Args:
        path (`str` or `Path`):
            Model id or path of a sorted Llama, or of a Llama, in safetensors.
        exit_layer (`int`):
            Number of layers, from 1 to all.
        output (`str` or `Path`):
            Folder to make.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. Defaults to the main branch.
        name (`str`, *optional*):
            What the page calls it: its id on the Hub. Defaults to the folder.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            Size of a file, at most.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If `exit_layer` is out of range, if `output` is there already, if there are no safetensors in
            `path`, if a file there cannot be read, or if a quantized head would have to be multiplied by the matrix
            of an exit.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"`output` must be a folder that is not there yet, got {str(output)!r}.")
    config = load_config(path, revision)
    check_exit_layer(exit_layer, config.num_hidden_layers, "exit_layer")
    source = _Source(path, revision)
    has_tokenizer = source.file("tokenizer_config.json") is not None
    tokenizer = load_tokenizer(path, revision) if has_tokenizer else None
    chat = tokenizer is not None and tokenizer.chat_template is not None
    page = _page(source, config, exit_layer, name or str(output), chat)

    unfinished = output.with_name(output.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write_weights(source, config, exit_layer, unfinished, max_shard_size)
    except SafetensorError as error:
        raise ValueError(f"The weights of {source.path!r} could not be read: {one_line(error)}") from error
    llama_config = config.to_llama(exit_layer)
    llama_config.architectures = ["LlamaForCausalLM"]
    llama_config.save_pretrained(unfinished)
    if source.file("generation_config.json") is not None:
        generation_config = GenerationConfig.from_pretrained(path, revision=revision)
        make_plain(generation_config)
        generation_config.save_pretrained(unfinished)
    if tokenizer is not None:
        tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").write_text(page, encoding="utf-8")
    unfinished.replace(output)
    return output


class _Source:
    """The files of a checkpoint, in a folder or on the Hub."""

    def __init__(self, path: str | Path, revision: str | None):
        self.path, self.revision = str(path), revision
        self.is_local = Path(path).is_dir()

    def file(self, name: str) -> Path | None:
        """Where a file is, downloaded if need be; `None` if the checkpoint has no such file."""
        if self.is_local:
            file = Path(self.path) / name
            return file if file.is_file() else None
        try:
            return Path(hf_hub_download(self.path, name, revision=self.revision))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as error:  # nobody knows whether it is there
            raise ValueError(
                f"`path`: the Hub could not be asked for {name} of {self.path!r}: {one_line(error)}"
            ) from error

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Name of each tensor, and of the file that holds it."""
        cached = self.is_local or try_to_load_from_cache(self.path, SAFE_WEIGHTS_NAME, revision=self.revision)
        index = None if isinstance(cached, str) else self.file(SAFE_WEIGHTS_INDEX_NAME)  # offline it need not be known
        if index is not None:
            try:
                return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"`path`: {str(index)!r} is no index of weights: {one_line(error)}") from error
        single = self.file(SAFE_WEIGHTS_NAME)
        if single is None:
            raise ValueError(f"`path` must hold its weights as safetensors, got {self.path!r}.")
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Of each tensor, the open file that holds it."""
        file_of = {name: self.weight_map[name] for name in names}
        with ExitStack() as stack:
            files = {file: stack.enter_context(safe_open(self.file(file), "pt")) for file in {*file_of.values()}}
            yield {name: files[file] for name, file in file_of.items()}


def _write_weights(
    source: _Source, config: SortedLlamaConfig, exit_layer: int, folder: Path, max_shard_size: int | str
) -> None:
    names = _names_of_submodel(source.weight_map, config, exit_layer)
    matrix = folded_matrix(config, exit_layer)
    with source.opened(names.values()) as files:
        shapes = {target: _without_data(files[name], name) for target, name in names.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file_name, targets in plan.filename_to_tensors.items():
        folded = [matrix] if matrix is not None and HEAD in targets else []
        with source.opened([names[target] for target in targets] + folded) as files:
            state = {target: files[names[target]].get_tensor(names[target]) for target in targets}
            for name in folded:
                state[HEAD] = fold_lens(state[HEAD], files[name].get_tensor(name))
        save_file(state, folder / file_name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _names_of_submodel(tensors: Iterable[str], config: SortedLlamaConfig, exit_layer: int) -> dict[str, str]:
    """Of each tensor of the plain Llama, the tensor of the checkpoint that it is."""
    targets = {name: submodel_name(name, config, exit_layer) for name in tensors}
    names = {target: name for name, target in targets.items() if target is not None}
    if folded_matrix(config, exit_layer) is not None:
        names.setdefault(HEAD, EMBEDDINGS)
    elif config.tie_word_embeddings and exit_layer not in config.own_exits:
        names.pop(HEAD, None)
    return names


def _without_data(file: Any, name: str) -> torch.Tensor:
    """A tensor of a file, of which only shape and type are read."""
    shape = file.get_slice(name).get_shape()
    dtype = (file.get_slice(name)[:0] if shape else file.get_tensor(name)).dtype
    return torch.empty(shape, dtype=dtype, device="meta")


def _page(source: _Source, config: SortedLlamaConfig, exit_layer: int, name: str, chat: bool) -> str:
    file, evaluation = source.file("README.md"), source.file(FILE_NAME)
    theirs: Any = ModelCardData()
    if file is not None:
        try:
            theirs = ModelCard.load(file, ignore_metadata_errors=True).data
        except (ValueError, TypeError, YAMLError) as error:
            raise ValueError(f"The page {str(file)!r} could not be read: {one_line(error)}") from error
    data = ModelCardData(
        base_model=theirs.base_model if source.is_local else source.path,
        license=theirs.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama", "soft", "early-exit"],
        datasets=theirs.datasets,
        language=theirs.language,
    )
    made_from = markdown(Path(source.path).resolve().name) if source.is_local else hub_links(source.path)
    asked, answer = (START, "") if not chat else ([{"role": "user", "content": QUESTION}], '[-1]["content"]')
    call = f'print(pipe({json.dumps(asked)})[0]["generated_text"]{answer})'
    blocks = [
        f"---\n{data.to_yaml()}\n---",
        f"# {markdown(Path(name).name)}",
        f"The first {exit_layer} of {config.num_hidden_layers} layers of {made_from} as a plain Llama, which runs "
        "wherever Llamas run. The whole checkpoint holds this model too, beside the deeper ones.",
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


__all__ = ["extract"]
