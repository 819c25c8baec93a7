"""What is pushed of a folder, and what a push that fails leaves behind; over HTTP: tests/test_hub.py."""

import os
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

import sorted_llama.hub_card.push as push_module
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.push import files_left, files_to_push, push
from tests.tiny import save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import make_trainer


STATES = ["optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "trainer_state.json"]
STATES += ["training_args.bin", "zero_to_fp32.py", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/__0_0.distcp"]
STATES += ["optimizer_0/__0_0.distcp", "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"]
STATES += ["checkpoint-5/model.safetensors", "sub/checkpoint-5/optimizer.pt"]
SECRETS = [".env", "hub.token", "id_rsa", "server.key", "cert.pem", ".git/config", "token.txt"]
OTHERS = ["latest", "last-checkpoint/model.safetensors", "runs/events.out", "train.py", "wandb/key"]


class Api:
    """Keeps what would be pushed."""

    sent: dict[str, bytes] = {}
    fails: Exception | None = None

    def create_repo(self, name, **kwargs):
        pass

    def create_commit(self, name, operations, **kwargs):
        if Api.fails is not None:
            raise Api.fails
        Api.sent = {added.path_in_repo: Path(added.path_or_fileobj).read_bytes() for added in operations}
        return type("Commit", (), {"pr_url": None, "commit_url": "there"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(push_module, "HfApi", Api)
    monkeypatch.setattr(Api, "sent", {})
    monkeypatch.setattr(Api, "fails", None)
    save_tiny(tmp_path / "model", tiny_sorted(exit_layers=[1, 2, 4]))
    return tmp_path / "model"


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def state_of(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_pushed_and_nothing_else(folder):
    saved = {path.name for path in folder.iterdir()}
    write(folder, *STATES, *SECRETS, *OTHERS, "notes.txt", "LICENSE", "additional_chat_templates/tool.jinja")
    assert push(folder, "user/name") == "there"
    expected = saved | {"README.md", "LICENSE", "additional_chat_templates/tool.jinja"}
    assert set(Api.sent) == expected
    assert Api.sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert Api.sent["README.md"] == (folder / "README.md").read_bytes() and b'"user/name"' in Api.sent["README.md"]


@pytest.mark.parametrize("kind", ["shards", "adapter", "adapters in folders", "old tokenizer", "templates", "trained"])
def test_whatever_the_libraries_save_is_pushed(folder, kind, tmp_path):
    """What the libraries write into an empty folder is on the list."""
    out = tmp_path / "out"
    include = []
    if kind == "shards":
        tiny_sorted().save_pretrained(out, max_shard_size="20KB")
        tiny_sorted().save_pretrained(out, variant="fp16", max_shard_size="20KB")
    elif kind == "adapter":
        get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")).save_pretrained(out)
    elif kind == "adapters in folders":
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
        model.add_adapter("second", LoraConfig(target_modules="all-linear"))
        model.save_pretrained(out)
        include = ["second/*"]
    elif kind == "old tokenizer":
        tiny_tokenizer().save_pretrained(out, save_jinja_files=False)
    elif kind == "templates":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
        tokenizer.chat_template = {"default": "a", "tool": "b"}
        tokenizer.save_pretrained(out)
    else:
        trainer = make_trainer(out)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
    saved = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {"training_args.bin"}
    assert saved and set(files_to_push(out, include)) == saved


def test_other_files_are_pushed_if_they_are_asked_for(folder, capsys):
    write(folder, "notes.txt", "images/a.png", "images/b.png", "data.csv", *STATES, *SECRETS)
    main(["push", str(folder), "user/name", "--include", "images/*", "--include", "notes.txt"])
    assert {"notes.txt", "images/a.png", "images/b.png"} < set(Api.sent) and "data.csv" not in Api.sent
    printed = capsys.readouterr().out
    assert "data.csv" in printed and "notes.txt" not in printed and "optimizer" not in printed
    everything = set(files_to_push(folder, ["**/*"]))
    assert not everything & set(STATES + SECRETS) and "data.csv" in everything
    for pattern, message in {
        "nothing*": "matches no file",
        ".env": "matches no file of .* that may be pushed",
        "../*": "may be pushed|leaves",
        "/etc/*": "is no pattern of files in the folder",
        "": "is no pattern of files in the folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            files_to_push(folder, [pattern])


@pytest.mark.parametrize("link", ["config.json", "notes.txt", "images"])
def test_a_link_that_leaves_the_folder_is_not_followed(folder, tmp_path, link):
    (tmp_path / "secrets").mkdir()
    write(tmp_path / "secrets", "passwords")
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    target = {"config.json": tmp_path / "config.json", "notes.txt": tmp_path / "secrets/passwords"}
    (folder / link).unlink(missing_ok=True)
    os.symlink(target.get(link, tmp_path / "secrets"), folder / link)
    with pytest.raises(ValueError, match="is a link that leaves"):
        push(folder, "user/name", include={"notes.txt": ["notes.txt"], "images": ["images/*"]}.get(link, ()))
    assert Api.sent == {}


def test_a_link_within_the_folder_is_its_file(folder):
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "now.safetensors")
    os.symlink("weights/now.safetensors", folder / "model.safetensors")
    push(folder, "user/name")
    assert Api.sent["model.safetensors"] == (folder / "weights" / "now.safetensors").read_bytes()
    assert "weights/now.safetensors" not in Api.sent and files_left(folder, list(Api.sent)) == ["weights/"]


@pytest.mark.parametrize("error", [OSError("offline\nand more"), RuntimeError("xet"), ValueError("a name")], ids=str)
def test_a_push_that_fails_is_one_line_and_changes_nothing(folder, monkeypatch, error):
    write(folder, "README.md")
    before = state_of(folder)
    monkeypatch.setattr(Api, "fails", error)
    with pytest.raises(SystemExit, match="^The push to 'user/name' failed: [^\n]*$"):
        main(["push", str(folder), "user/name"])
    assert state_of(folder) == before
    monkeypatch.setattr(Api, "fails", None)
    push(folder, "user/name")
    assert {path for path, state in state_of(folder).items() if before.get(path) != state} == {folder / "README.md"}


def test_a_push_of_something_else_is_refused(folder, tmp_path):
    for path, name, message in (
        (tmp_path, "user/name", "`path` must be the folder of a checkpoint"),
        ("user/other", "user/name", "`path` must be the folder of a checkpoint"),
        (folder, "name", "`name` must be an id on the Hub"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["push", str(path), name])
    assert Api.sent == {} and not (folder / "README.md").exists()
