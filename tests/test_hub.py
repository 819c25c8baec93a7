"""To the Hub and back over HTTP, by the real client: pushed by this project, loaded by a process without it."""

import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import TrainerCallback
from transformers.utils.hub import hf_api

import sorted_llama
from sorted_llama import SortedLlamaForCausalLM
from tests.hub import TOKEN, Hub
from tests.tiny import prompts, run_as_stranger, tiny_sorted, tiny_tokenizer


ROOT = Path(__file__).parents[1]
MODEL_CODE = Path(sorted_llama.modeling_sorted_llama.__file__).parent
REMOTE_CODE = {path.name for path in MODEL_CODE.glob("[!v]*_sorted_llama.py")}
MODEL_FILES = REMOTE_CODE | {"README.md", "config.json", "generation_config.json"}
CALLS = {
    "full": {},
    "exit": {"exit_layer": 1},
    "confidence": {"exit_threshold": 0.5},
    "draft": {"assistant_early_exit": 1},
    "rows": {"exit_layer": [1, 2, 4]},
}
STRATEGIES = ["end", "every_save", "checkpoint", "all_checkpoints"]
ENVIRONMENT = {
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "0",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
}


def continuations(model, calls: dict[str, dict] | None = None) -> dict[str, list]:
    """Greedy tokens of each call; decoded in float32 from decisive logits, so two loads of a model agree on them."""
    model.eval()
    return {
        name: model.generate(**prompts(), max_new_tokens=8, do_sample=False, **call).tolist()
        for name, call in (calls or CALLS).items()
    }


# What a process with the project pushes: a function a repository or two; what they return is JSON


def push_two_versions(folder: Path) -> list[str]:
    """Two models and a tokenizer, a commit each; on another branch, code that cannot run."""
    first = tiny_sorted(0).push_to_hub("user/name").oid
    tiny_tokenizer().push_to_hub("user/name")
    second = tiny_sorted(1).push_to_hub("user/name").oid
    HfApi().create_branch("user/name", branch="broken")
    code = b'raise ImportError("this code is broken")\n'
    HfApi().upload_file(
        repo_id="user/name", path_or_fileobj=code, path_in_repo="modeling_sorted_llama.py", revision="broken"
    )
    return [first, second]


def push_with_options(folder: Path) -> list[str]:
    tiny_sorted(2).push_to_hub("user/sharded", max_shard_size="20KB", commit_message="In shards")
    tiny_sorted(2).push_to_hub("user/private", private=True)
    tiny_sorted(0).push_to_hub("user/branches")
    pull_request = tiny_sorted(1).push_to_hub("user/branches", create_pr=True)
    tiny_sorted(2).push_to_hub("user/branches", revision="branch")
    return [pull_request.pr_revision, pull_request.pr_url]


def push_in_vain_and_again(folder: Path) -> list[list[str]]:
    """How each push ended, and where the main branch was afterwards."""
    outcomes = []
    for seed in (0, 0, 1, 1, 1):
        try:
            outcome = "" if tiny_sorted(seed).push_to_hub("user/breaks") else "nothing"
        except Exception as error:
            outcome = type(error).__name__
        outcomes.append([outcome, HfApi().model_info("user/breaks").sha])
    return outcomes


def make_pushing_trainer(folder: Path, repo: str, **kwargs):
    """A trainer that saves after each of two steps, and pushes as its `hub_strategy` says."""
    from tests.trainer.runs import make_trainer

    defaults = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": repo}
    return make_trainer(folder / repo.split("/")[-1], **{**defaults, **kwargs})


class EndsPushes(TrainerCallback):
    """Lets a training go on once its push has ended: no clock decides what is pushed."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, *args, **kwargs):
        self.trainer._finish_current_push()


def push_while_training(folder: Path) -> dict[str, dict]:
    trained = {}
    for strategy in STRATEGIES:
        trainer = make_pushing_trainer(folder, f"user/{strategy}", hub_strategy=strategy)
        trainer.add_callback(EndsPushes(trainer))
        trainer.train()
        if strategy == "end":
            trainer.save_model()
        trained[strategy] = continuations(trainer.model)
    return trained


def push_trained(folder: Path) -> dict[str, list]:
    """By hand, to the repository that is named as the folder."""
    from tests.trainer.runs import make_trainer

    trainer = make_trainer(folder / "by_hand")
    trainer.train()
    trainer.push_to_hub("By hand")
    return continuations(trainer.model)


def push_past_a_refusal(folder: Path) -> dict[str, list]:
    trainer = make_pushing_trainer(folder, "user/unlucky", hub_strategy="every_save")
    trainer.add_callback(EndsPushes(trainer))
    trainer.train()
    return continuations(trainer.model)


def push_after_a_kill(folder: Path) -> None:
    """The run before was killed in the middle of its third checkpoint."""
    from sorted_llama.trainer.atomic_saves import UNFINISHED

    trainer = make_pushing_trainer(folder, "user/killed", hub_strategy="end", save_strategy="no")
    half = folder / "killed" / UNFINISHED / "checkpoint-3"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half a model")
    trainer.push_to_hub()


def push_on_a_slow_line(folder: Path) -> None:
    """The first checkpoint's push comes to look at the folder while the second one is being written."""
    trainer = make_pushing_trainer(folder, "user/slow", hub_strategy="every_save")
    line_is_free = threading.Event()
    hf_api().run_as_future(line_is_free.wait, timeout=60)
    save = trainer._save_optimizer_and_scheduler

    def save_in_the_middle_of_a_push(output_dir):
        if trainer.state.global_step == 2:
            line_is_free.set()
            trainer._finish_current_push()
        save(output_dir)

    trainer._save_optimizer_and_scheduler = save_in_the_middle_of_a_push
    trainer.train()


def push_adapter(folder: Path) -> dict[str, list]:
    """An adapter of the base that is on the Hub, alone and merged."""
    from peft import LoraConfig

    from tests.trainer.runs import make_trainer

    base = SortedLlamaForCausalLM.from_pretrained("user/name")
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = make_trainer(folder / "adapter", base, peft_config=lora, learning_rate=0.1, hub_model_id="user/adapter")
    trainer.train()
    trainer.push_to_hub()
    adapted = continuations(trainer.model)
    trainer.model.merge_and_unload().push_to_hub("user/merged")
    return adapted


def push_page(folder: Path) -> list[str]:
    """What lies in a training's folder, evaluated, by the commands."""
    from sorted_llama.hub_card.commands import main

    path = folder / "all_checkpoints"
    (folder / "rows.jsonl").write_text('{"prompt": "go on", "completion": " and on"}')
    quick = ["--num_timed", "1", "--max_new_tokens", "2", "--runs", "1", "--dtype", "float32"]
    main(["evaluate", str(path), "--data", f"completions={folder / 'rows.jsonl'}", *quick])
    main(["push", str(path), "user/page"])
    main(["push", str(path), "user/page", "--revision", "later"])
    (path / "notes.txt").write_text("An owner's own file")
    main(["push", str(path), "user/page", "--create_pr", "--include", "notes.txt"])
    try:
        main(["push", str(folder), "user/nothing"])
    except SystemExit as error:
        return [str(error)]
    return []


def push_extracted(folder: Path) -> list[str]:
    """From the Hub to the Hub: a plain Llama."""
    from sorted_llama.hub_card.commands import main

    main(["extract", "user/page", "--exit", "2", str(folder / "two_layers"), "--push", "user/two_layers"])
    return []


PUSHES = [
    push_two_versions,
    push_with_options,
    push_in_vain_and_again,
    push_while_training,
    push_trained,
    push_past_a_refusal,
    push_after_a_kill,
    push_on_a_slow_line,
    push_adapter,
    push_page,
    push_extracted,
]


def push_all(folder: str, out: str) -> None:
    results = {}
    for push in PUSHES:
        try:
            results[push.__name__] = {"returned": push(Path(folder))}
        except Exception:
            results[push.__name__] = {"raised": traceback.format_exc()}
    Path(out).write_text(json.dumps(results))


# What a process without the project loads

LOAD_ALL = """
import contextlib
import io
import json
import os

environment, plan, calls, prompts, out = sys.argv[1:]
os.environ.update(json.loads(environment))

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
prompts = {name: torch.tensor(rows) for name, rows in json.loads(prompts).items()}


def load(repo, adapter=False, again=None, calls=json.loads(calls), **arguments):
    auto = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = auto.from_pretrained(repo, trust_remote_code=True, **arguments)
    if again:
        model.push_to_hub(again, token=os.environ["AGAIN_TOKEN"])
        model = auto.from_pretrained(again, trust_remote_code=True)
    tokens = {
        name: model.generate(**prompts, max_new_tokens=8, do_sample=False, **call).tolist()
        for name, call in calls.items()
    }
    return {"tokens": tokens, "module": type(model.get_base_model() if adapter else model).__module__}


def pipe(repo):
    tokenizer = AutoTokenizer.from_pretrained(repo)
    pipe = pipeline("text-generation", model=repo, trust_remote_code=True)
    texts = {
        name: pipe("hello", max_new_tokens=8, do_sample=False, **call)[0]["generated_text"]
        for name, call in json.loads(calls).items()
        if name != "rows"  # there is one
    }
    return {"texts": texts, "ids": tokenizer("hello")["input_ids"]}


def paste(repo):
    # What the code on the page makes, run as it stands there
    from huggingface_hub import hf_hub_download

    with open(hf_hub_download(repo, "README.md")) as file:
        code = file.read().split("```python")[1].split("```")[0]
    made, printed = [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("print(", "made.append(tokens); print("), {"made": made})
    return {"code": code, "tokens": [tokens.tolist() for tokens in made], "printed": printed.getvalue()}


results = {}
for name, arguments in json.loads(plan).items():
    try:
        results[name] = {"pipeline": pipe, "page": paste}.get(name, load)(**arguments)
    except Exception as error:
        results[name] = {"raised": f"{type(error).__name__}: {error}"}
with open(out, "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.failures = {
            "uploads": ["hang up"],
            "user/breaks": ["refuse", "", "hang up", "refuse"],
            "user/unlucky": ["refuse"],
        }
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pushes")


@pytest.fixture(scope="module")
def pushed(hub, folder):
    """What each function of `PUSHES` returned."""
    environment = {**os.environ, **ENVIRONMENT, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", "import sys; from tests.test_hub import push_all; push_all(*sys.argv[1:])"]
        + [str(folder), str(folder / "results.json")],
        cwd=ROOT,
        env={**environment, "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((folder / "results.json").read_text())

    def returned(push):
        result = results[push.__name__]
        assert "raised" not in result, result["raised"]
        return result["returned"]

    return returned


@pytest.fixture(scope="module")
def loaded(hub, pushed, tmp_path_factory):
    """What a process that has never heard of the project got from the Hub, by name of the load."""
    first, _ = pushed(push_two_versions)
    plan = {
        "main": {"repo": "user/name"},
        "older": {"repo": "user/name", "revision": first},
        "shallow": {"repo": "user/name", "exit_layer": 1, "calls": {"full": {}}},
        "broken": {"repo": "user/name", "revision": "broken"},
        "pinned": {"repo": "user/name", "revision": "broken", "code_revision": first},
        "pipeline": {"repo": "user/name"},
        "again": {"repo": "user/name", "again": "user/again"},
        "sharded": {"repo": "user/sharded"},
        "stranger": {"repo": "user/private"},
        "owner": {"repo": "user/private", "token": TOKEN},
        "pull request": {"repo": "user/branches", "revision": "refs/pr/1"},
        "branch": {"repo": "user/branches", "revision": "branch"},
        "untouched": {"repo": "user/branches"},
        "breaks": {"repo": "user/breaks"},
        **{strategy: {"repo": f"user/{strategy}"} for strategy in STRATEGIES},
        "by hand": {"repo": "user/by_hand"},
        "unlucky": {"repo": "user/unlucky"},
        "adapter": {"repo": "user/adapter", "adapter": True},
        "merged": {"repo": "user/merged"},
        "page": {"repo": "user/page"},
        "extracted": {"repo": "user/two_layers", "calls": {"full": {}}},
    }
    folder = tmp_path_factory.mktemp("loads")
    arguments = [{**ENVIRONMENT, "HF_ENDPOINT": hub.url, "AGAIN_TOKEN": TOKEN}, plan, CALLS]
    arguments.append({name: rows.tolist() for name, rows in prompts().items()})
    run_as_stranger(LOAD_ALL, *map(json.dumps, arguments), folder / "results.json", folder=folder)
    results = json.loads((folder / "results.json").read_text())

    def result(name):
        assert "raised" not in results[name], results[name]["raised"]
        return results[name]

    result.raised = lambda name: results[name].get("raised", "")
    return result


@pytest.fixture(scope="module")
def expected():
    """Tokens of the local models that were pushed, by their seeds."""
    return [continuations(tiny_sorted(seed)) for seed in range(3)]


def paths(hub, repo, revision="main"):
    return set(hub.files(repo, revision)) - {".gitattributes"}


def test_a_push_is_one_commit_of_weights_and_code(hub, pushed):
    first, second = pushed(push_two_versions)
    assert [commit.message for commit in hub.log("user/name")] == [
        "Upload SortedLlamaForCausalLM",
        "Upload tokenizer",
        "Upload SortedLlamaForCausalLM",
    ]
    assert paths(hub, "user/name", first) == MODEL_FILES | {"model.safetensors"}
    assert paths(hub, "user/name") > paths(hub, "user/name", first)
    for name in REMOTE_CODE:
        assert hub.files("user/name", second)[name] == (ROOT / "modeling_sorted_llama" / name).read_bytes()
    assert hub.failures["uploads"] == [], "the client has met a line that breaks, and sent the weights again"


def test_a_stranger_gets_the_local_models_tokens_in_every_mode(loaded, pushed, expected):
    _, second = pushed(push_two_versions)
    assert expected[0] != expected[1] and len(set(map(str, expected[1].values()))) >= 3
    assert loaded("main")["tokens"] == expected[1]
    assert loaded("main")["module"].startswith("transformers_modules.user.name.")
    assert second in loaded("main")["module"]


def test_a_revision_an_exit_and_pinned_code(loaded, pushed, expected):
    first, _ = pushed(push_two_versions)
    assert loaded("older")["tokens"] == expected[0]
    assert first in loaded("older")["module"]
    assert loaded("shallow")["tokens"] == {"full": expected[1]["exit"]}
    assert expected[1]["exit"] != expected[1]["full"]
    assert "this code is broken" in loaded.raised("broken")
    assert loaded("pinned")["tokens"] == expected[1]
    assert first in loaded("pinned")["module"]


def test_a_pipeline_from_the_hub(loaded):
    tokenizer, model = tiny_tokenizer(), tiny_sorted(1)
    prompt = tokenizer("hello", return_tensors="pt")
    assert loaded("pipeline")["ids"] == prompt["input_ids"][0].tolist()
    assert loaded("pipeline")["texts"].keys() == CALLS.keys() - {"rows"}
    for name, text in loaded("pipeline")["texts"].items():
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False, **CALLS[name])[0]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_what_a_stranger_pushes_again_has_its_own_code(hub, loaded, expected):
    assert loaded("again")["tokens"] == expected[1]
    assert loaded("again")["module"].startswith("transformers_modules.user.again.")
    assert paths(hub, "user/again") == MODEL_FILES | {"model.safetensors"}
    assert "user/name" not in hub.files("user/again")["config.json"].decode()


def test_shards_with_a_message(hub, pushed, loaded, expected):
    pushed(push_with_options)
    assert [commit.message for commit in hub.log("user/sharded")] == ["In shards"]
    weights = {path for path in paths(hub, "user/sharded") if path.startswith("model-")}
    assert len(weights) > 1
    assert paths(hub, "user/sharded") == MODEL_FILES | weights | {"model.safetensors.index.json"}
    assert loaded("sharded")["tokens"] == expected[2]


def test_a_private_model_and_its_code_need_the_token(hub, loaded, expected):
    assert hub.repos["user/private"].private and not hub.repos["user/name"].private
    assert "user/private" in loaded.raised("stranger")
    assert loaded("owner")["tokens"] == expected[2]


def test_a_pull_request_and_a_branch_leave_main_alone(hub, pushed, loaded, expected):
    revision, url = pushed(push_with_options)
    assert revision == "refs/pr/1" and url == f"{hub.url}/user/branches/discussions/1"
    assert len(hub.log("user/branches")) == 1
    assert loaded("pull request")["tokens"] == expected[1]
    assert loaded("branch")["tokens"] == expected[2]
    assert loaded("untouched")["tokens"] == expected[0]


def test_a_push_that_fails_changes_nothing_and_the_next_one_succeeds(hub, pushed, loaded, expected):
    """Refused at the first commit; and, with a model there, hung up on in the middle of the commit, and refused."""
    errors, places = zip(*pushed(push_in_vain_and_again))
    assert hub.failures["user/breaks"] == []
    assert [bool(error) for error in errors] == [True, False, True, True, False], errors
    assert errors[0] == errors[3] == "HfHubHTTPError"
    before, first, *unchanged, second = places
    assert paths(hub, "user/breaks", before) == set()
    assert unchanged == [first, first]
    assert [commit.parent for commit in hub.log("user/breaks")] == [first, before]
    assert hub.repos["user/breaks"].refs == {"main": second} and len(hub.repos["user/breaks"].commits) == 3
    assert loaded("breaks")["tokens"] == expected[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_training_has_pushed_is_the_model(hub, folder, pushed, loaded, strategy):
    steps = [f"Training in progress, step {step}" for step in (2, 1)]
    trained = pushed(push_while_training)[strategy]
    local, on_hub = folder / strategy, hub.files(f"user/{strategy}")
    with_checkpoints = [message for step in steps for message in (f"{step}, checkpoint", step)]
    assert [commit.message for commit in hub.log(f"user/{strategy}")] == {
        "end": ["Model save"],
        "every_save": steps,
        "checkpoint": with_checkpoints,
        "all_checkpoints": with_checkpoints,
    }[strategy]
    checkpoints = {
        "checkpoint": {"last-checkpoint": "checkpoint-2"},
        "all_checkpoints": {"checkpoint-1": "checkpoint-1", "checkpoint-2": "checkpoint-2"},
    }.get(strategy, {})
    for name, checkpoint in checkpoints.items():
        contents = {f"{name}/{path.name}": path.read_bytes() for path in (local / checkpoint).iterdir()}
        assert f"{name}/optimizer.pt" in contents
        assert {path: on_hub[path] for path in on_hub if path.startswith(f"{name}/")} == contents
    assert {path.split("/")[0] for path in on_hub if "/" in path} == set(checkpoints)
    root = {path for path in on_hub if "/" not in path}
    assert root >= MODEL_FILES | {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_args.bin"}
    assert loaded(strategy)["tokens"] == trained


def test_trainer_push_to_hub(hub, pushed, loaded):
    assert loaded("by hand")["tokens"] == pushed(push_trained)
    assert [commit.message for commit in hub.log("user/by_hand")] == ["By hand"]
    assert paths(hub, "user/by_hand") >= MODEL_FILES | {"model.safetensors", "tokenizer.json"}


def test_a_training_goes_on_after_a_push_that_failed(hub, pushed, loaded):
    trained = pushed(push_past_a_refusal)
    assert hub.failures["user/unlucky"] == []
    assert [commit.message for commit in hub.log("user/unlucky")] == ["Training in progress, step 2"]
    assert loaded("unlucky")["tokens"] == trained


@pytest.mark.parametrize("push", [push_after_a_kill, push_on_a_slow_line])
def test_what_is_not_finished_is_not_pushed(hub, pushed, push):
    pushed(push)
    repo = {push_after_a_kill: "user/killed", push_on_a_slow_line: "user/slow"}[push]
    assert len(hub.log(repo)) >= 1 and "model.safetensors" in paths(hub, repo)
    for commit in hub.log(repo):
        assert not [path for path in commit.files if "/" in path]


def test_an_adapter_and_what_it_is_merged_into(hub, pushed, loaded, expected):
    adapted = pushed(push_adapter)
    assert all(adapted[name] != expected[1][name] for name in ("full", "exit"))
    assert "adapter_model.safetensors" in paths(hub, "user/adapter") and "README.md" in paths(hub, "user/adapter")
    assert not paths(hub, "user/adapter") & {"model.safetensors", "config.json", *REMOTE_CODE}
    base = json.loads(hub.files("user/adapter")["adapter_config.json"])["base_model_name_or_path"]
    assert base == "user/name"
    assert loaded("adapter")["tokens"] == adapted
    assert loaded("adapter")["module"].startswith("transformers_modules.user.name.")
    assert paths(hub, "user/merged") == MODEL_FILES | {"model.safetensors"}
    assert loaded("merged")["tokens"] == adapted


def test_a_page_with_its_model_is_one_commit(hub, folder, pushed, loaded):
    (refused,) = pushed(push_page)
    assert "`path` must be the folder of a checkpoint" in refused and "user/nothing" not in hub.repos
    files = hub.files("user/page")
    assert set(files) >= MODEL_FILES | {"model.safetensors", "evaluation.json", "quality_speed.png"}
    assert not any("/" in path or path.endswith((".bin", ".pt", ".tmp")) for path in files)
    assert [commit.message for commit in hub.log("user/page")] == ["Sorted Llama with its page"]
    assert set(hub.files("user/page", "later")) == set(files)
    assert set(hub.files("user/page", "refs/pr/1")) == {*files, "notes.txt"}
    page = files["README.md"].decode()
    assert "| `exit_layer=4` (full) |" in page and "| exits | 1, 2, 4 |" in page and "model-index" in page
    found = loaded("page")
    assert 'name = "user/page"' in found["code"] and len(found["tokens"]) == 3
    model = SortedLlamaForCausalLM.from_pretrained(folder / "all_checkpoints")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    text = tiny_tokenizer().apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    inputs = tiny_tokenizer()(text, add_special_tokens=False, return_tensors="pt")
    printed = ""
    for tokens, call in zip(found["tokens"], [{"exit_layer": 1}, {"exit_threshold": 0.9}, {}], strict=True):
        assert tokens == model.generate(**inputs, **call, max_new_tokens=32).tolist()  # drafting: full depth's tokens
        printed += tiny_tokenizer().decode(tokens[0], skip_special_tokens=True) + "\n"
    assert found["printed"] == printed


def test_an_extracted_exit_is_a_plain_llama_there(hub, folder, pushed, loaded):
    pushed(push_extracted)
    files = hub.files("user/two_layers")
    assert "README.md" in files and not [path for path in files if path.endswith(".py")]
    page = files["README.md"].decode()
    assert "# two_layers" in page and "base_model: user/page" in page and "| rows | exact match |" in page
    found = loaded("extracted")
    assert found["module"] == "transformers.models.llama.modeling_llama"
    model = SortedLlamaForCausalLM.from_pretrained(folder / "all_checkpoints")
    assert found["tokens"]["full"] == continuations(model, {"full": {"exit_layer": 2}})["full"]


def test_the_hub_knew_every_request(hub, loaded):
    assert hub.unknown == []
