"""A checkpoint with its page to the Hub."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi

from sorted_llama.trainer.escaping import one_line

from .card import install, write_card


# What transformers, tokenizers, PEFT and this project save in the folder of a model
CHECKPOINT = [
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("model-*-of-*.safetensors", "model.*.safetensors", "model.safetensors.index.*.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model"),
    *("tekken.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("*_sorted_llama.py", "tokenization_*.py", "processing_*.py"),  # the code that travels along
    *("README.md", "quality_speed.png", "evaluation.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
# What no pattern brings along: what a training goes on from, and secrets
NEVER = [
    *(".*", "*.token", "*token.txt", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "*.tmp", "__pycache__"),
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "random_states_*", "trainer_state.json"),
    *("training_args.bin", "*_optim_states.pt", "*.distcp", "global_step*", "checkpoint-*", "_unfinished"),
    *("pytorch_model_fsdp*", "zero_to_fp32.py"),
]


def push(
    path: str | Path,
    name: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    include: Sequence[str] = (),
) -> str:
    """
    Push a checkpoint, its page and its evaluation; returns the address of the commit, or of the pull request. The page
    in the folder is that of the push once it has succeeded; else nothing in the folder has changed.

    Args:
        path (`str` or `Path`): Folder of the checkpoint.
        name (`str`): Id on the Hub, `user/name`; made if it is not there.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.
        revision (`str`, *optional*): Branch, made if it is not there. Defaults to the main one.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request in place of a commit.
        include (`Sequence[str]`, *optional*): Patterns of other files to push: see [`files_to_push`].

    Raises:
        ValueError: If `path` is no folder of a checkpoint, or if what is to be pushed is not a file in it.
        OSError: If the Hub refuses, or cannot be reached.
    """
    with TemporaryDirectory() as made:
        write_card(path, name=name, target=made)
        address = upload(path, name, "Sorted Llama with its page", private, revision, create_pr, include, made)
        install(made, path)
    return address


def upload(
    folder: str | Path,
    name: str,
    message: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    include: Sequence[str] = (),
    instead: str | Path | None = None,
) -> str:
    """
    Push what [`files_to_push`] names of a folder, and nothing else; files in the folder `instead` take the place of
    those of the same names. The other arguments, what is returned and what is raised are those of [`push`].
    """
    if name.count("/") != 1:
        raise ValueError(f"`name` must be an id on the Hub, user/name, got {name!r}.")
    files = {file: Path(folder, file) for file in files_to_push(folder, include)}
    if instead is not None:
        files |= {file.name: file for file in Path(instead).iterdir()}
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        added = [CommitOperationAdd(file, source) for file, source in files.items()]
        commit = api.create_commit(name, added, commit_message=message, revision=revision, create_pr=create_pr)
    except Exception as error:  # those of the Hub, its client and the line have no class of their own
        raise OSError(f"The push to {name!r} failed: {one_line(error)}") from error
    return commit.pr_url or commit.commit_url


def files_to_push(folder: str | Path, include: Sequence[str] = ()) -> list[str]:
    """
    The files of a folder that make a checkpoint, and those that `include` asks for, by patterns of `Path.glob`, as
    paths with `/`; states of a training, checkpoints in it, hidden files and what looks like a secret are never among
    them. `ValueError` if a pattern matches nothing that may be pushed, or if a file is a link that leaves the folder.
    """
    folder = Path(folder)
    found = {file for pattern in CHECKPOINT for file in _matches(folder, pattern)}
    for pattern in include:
        asked = [file for file in _matches(folder, pattern) if not _is_private(file)]
        if not asked:
            raise ValueError(f"`include={pattern!r}` matches no file of {str(folder)!r} that may be pushed.")
        found.update(asked)
    outside = [file for file in sorted(found) if not (folder / file).resolve().is_relative_to(folder.resolve())]
    if outside:
        raise ValueError(f"{outside[0]!r} is a link that leaves {str(folder)!r}: put a copy in its place.")
    return sorted(found)


def files_left(folder: str | Path, files: Sequence[str]) -> list[str]:
    """What of a folder is not pushed, but for what a training leaves and what is hidden; folders end in `/`."""
    pushed = {PurePosixPath(file).parts[0] for file in files}
    entries = [entry for entry in sorted(Path(folder).iterdir()) if not _is_private(entry.name)]
    return [f"{entry.name}{'/' * entry.is_dir()}" for entry in entries if entry.name not in pushed]


def _matches(folder: Path, pattern: str) -> list[str]:
    try:
        return [file.relative_to(folder).as_posix() for file in folder.glob(pattern) if file.is_file()]
    except (NotImplementedError, ValueError) as error:  # an absolute one, or none
        raise ValueError(f"`include={pattern!r}` is no pattern of files in the folder: {one_line(error)}") from error


def _is_private(file: str) -> bool:
    return any(fnmatch(part, pattern) for part in PurePosixPath(file).parts for pattern in NEVER)
