"""A checkpoint with its page to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from .card import write_card


# What a training leaves in a folder, and a page does not need
IGNORED = ["checkpoint-*/**", "_unfinished/**", "runs/**", "*.tmp", "training_args.bin", "trainer_state.json"]
IGNORED += ["optimizer.pt", "scheduler.pt", "rng_state*.pth"]


def push(
    path: str | Path,
    name: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """
    Push a checkpoint, its page and its evaluation as one commit: the Hub has all of it or nothing.

    Args:
        path (`str` or `Path`):
            Folder of the checkpoint.
        name (`str`):
            Id on the Hub, `user/name`; made if it is not there.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch, made if it is not there. Defaults to the main one.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request in place of a commit.

    Returns:
        `str`: Address of the commit, or of the pull request.

    Raises:
        ValueError: If `path` is no folder of a checkpoint.
    """
    write_card(path, name=name)
    return upload(path, name, "Sorted Llama with its page", private, revision, create_pr)


def upload(
    folder: str | Path,
    name: str,
    message: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """
    Push a folder as it is, as one commit.

    Args:
        folder (`str` or `Path`):
            What to push; checkpoints and states of a training are left out.
        name (`str`):
            Id on the Hub, `user/name`; made if it is not there.
        message (`str`):
            Of the commit.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch, made if it is not there. Defaults to the main one.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request in place of a commit.

    Returns:
        `str`: Address of the commit, or of the pull request.
    """
    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    if revision is not None and not create_pr:
        api.create_branch(name, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=IGNORED,
        commit_message=message,
    )
    return commit.pr_url or commit.commit_url


__all__ = ["push", "upload"]
