"""
How a vLLM server of a sorted checkpoint is set up, and what is refused before an engine starts.
"""

import pytest
import vllm
from vllm import EngineArgs

from tests.serving_vllm.engines import PER_REQUEST


def configured(path, **options):
    """vLLM's configuration, as the process makes it that takes the requests."""
    options = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "skip_tokenizer_init": True, **options}
    return EngineArgs(model=str(path), **options).create_engine_config()


def drafting(path, **options):
    draft = {"method": "draft_model", "model": str(path), "num_speculative_tokens": 2}
    return configured(path, speculative_config=draft, **options)


@pytest.fixture
def path(checkpoint):
    return checkpoint()[0]


def test_a_depth_a_request_is_set_up_by_one_setting(path):
    plain, depths = configured(path), configured(path, additional_config=PER_REQUEST)
    assert plain.model_config.hf_config.architectures == ["SortedLlamaForCausalLM"]
    assert plain.scheduler_config.scheduler_cls is None
    assert depths.model_config.hf_config.architectures == ["SegmentedLlamaForCausalLM"]
    assert depths.scheduler_config.scheduler_cls.endswith(".vllm_scheduler.make_scheduler")
    assert depths.parallel_config.worker_cls.endswith(".vllm_worker.DepthWorker")


@pytest.mark.parametrize("value", [2, "2", "full", True, ""], ids=repr)
def test_another_value_of_the_setting_is_refused(path, value):
    with pytest.raises(ValueError, match=f"`exit_layer` of `--additional-config` must be 'request', got {value!r}"):
        configured(path, additional_config={"exit_layer": value})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "`--speculative-config`"),
        ({"pipeline_parallel_size": 2}, "`--pipeline-parallel-size`"),
        ({"data_parallel_size": 2}, "`--data-parallel-size`"),
        ({"enable_dbo": True}, "`--enable-dbo`"),
        ({"kv_offloading_size": 1.0}, "`--kv-transfer-config`"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "`--kv-transfer-config`",
        ),
        ({"disable_hybrid_kv_cache_manager": True}, "`--disable-hybrid-kv-cache-manager`"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "`--scheduler-cls`"),
        ({"enable_lora": True}, r"adapters \(`--enable-lora`\)"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "`--worker-cls`"),
        ({"compilation_config": {"cudagraph_mode": "FULL"}, "enforce_eager": False}, "captured graphs"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_knows_no_depths_is_refused_beside_them(path, options, message):
    with pytest.raises(ValueError, match=rf"A depth a request \(`exit_layer='request'`\).*{message}"):
        configured(path, additional_config=PER_REQUEST, **options)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_a_worker_of_the_users_is_refused_beside_drafts(path, method):
    draft = {"method": method, "num_speculative_tokens": 2}
    draft |= {"model": str(path)} if method == "draft_model" else {"prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="Drafts cannot be served with `--worker-cls`"):
        configured(path, speculative_config=draft, worker_cls="vllm.v1.worker.cpu_worker.CPUWorker")


def test_a_checkpoint_without_exits_is_refused(checkpoint):
    path, _ = checkpoint(exit_layers=[4])
    with pytest.raises(ValueError, match="with a checkpoint without `exit_layers`"):
        configured(path, additional_config=PER_REQUEST)


def test_all_that_is_in_the_way_is_said_at_once(path):
    with pytest.raises(ValueError, match="`--pipeline-parallel-size`; nor with `--scheduler-cls`"):
        configured(path, additional_config=PER_REQUEST, pipeline_parallel_size=2, scheduler_cls="a.Scheduler")


@pytest.fixture(params=["depths", "drafts"])
def reaching_in(request, path):
    """Starts what reaches into vLLM: a server of all depths, or one that drafts for itself."""
    if request.param == "depths":
        return lambda: configured(path, additional_config=PER_REQUEST)
    return lambda: drafting(path, hf_overrides={"assistant_early_exit": 2})


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0", "0.320.0"])
def test_another_version_of_vllm_is_refused_by_name(path, reaching_in, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ValueError, match=rf"vLLM {version} \(it has run with 0\.32\)"):
        reaching_in()
    configured(path, hf_overrides={"exit_layer": 2})  # a server of one depth reaches into nothing


def test_a_repaired_version_of_vllm_is_taken(reaching_in, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.32.1.dev3+cpu")
    reaching_in()


def test_the_other_model_runner_is_refused(reaching_in, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"model runner V2 \(set VLLM_USE_V2_MODEL_RUNNER=0\)"):
        reaching_in()


def test_a_server_of_one_depth_checks_its_requests_in_the_other_model_runner_too(path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)  # vLLM refuses that runner without it
    (check,) = configured(path, hf_overrides={"exit_layer": 2}).model_config.logits_processors
    module, name = check.split(":")
    assert module.endswith(".vllm_requests") and name == "Runner2Exits_2"


@pytest.mark.parametrize("override", [9, 0, "two"], ids=repr)
def test_a_bad_depth_of_a_server_is_refused(path, override):
    with pytest.raises(ValueError, match=f"`exit_layer` must be an integer from 1 to 4, got {override!r}"):
        configured(path, hf_overrides={"exit_layer": override})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({}, "A checkpoint that drafts for itself needs a depth"),
        ({"assistant_early_exit": 4}, "`assistant_early_exit` must be an integer from 1 to 3, got 4"),
        ({"assistant_early_exit": 0}, "`assistant_early_exit` must be an integer from 1 to 3, got 0"),
        ({"assistant_early_exit": "2"}, "`assistant_early_exit` must be an integer from 1 to 3, got '2'"),
        (
            {"assistant_early_exit": 2, "exit_layer": 2},
            "`assistant_early_exit` must be an integer from 1 to 1, got 2",
        ),
    ],
    ids=str,
)
def test_a_bad_depth_of_a_draft_is_refused(path, overrides, message):
    with pytest.raises(ValueError, match=message):
        drafting(path, hf_overrides=overrides)


@pytest.mark.parametrize("written", ["{}/", "{}/../model", "{}/."])
def test_a_draft_is_the_target_however_its_folder_is_written(path, written):
    draft = {"method": "draft_model", "model": written.format(path), "num_speculative_tokens": 2}
    config = configured(path, speculative_config=draft, hf_overrides={"assistant_early_exit": 2})
    assert config.model_config.hf_config.architectures == ["SegmentedLlamaForCausalLM"]


def test_drafts_and_a_depth_a_request_exclude_each_other(path):
    with pytest.raises(ValueError, match=r"cannot be served with `--speculative-config` \(drafts\)"):
        drafting(path, hf_overrides={"assistant_early_exit": 2}, additional_config=PER_REQUEST)


def test_exits_that_own_layers_are_served_at_one_depth(checkpoint):
    path, _ = checkpoint(exit_heads="layer")
    configured(path, hf_overrides={"exit_layer": 2})
    message = "`exit_heads='layer'`, whose exits own decoder layers"
    with pytest.raises(ValueError, match=rf"A depth a request.*{message}"):
        configured(path, additional_config=PER_REQUEST)
    with pytest.raises(ValueError, match=rf"Drafts from the first layers.*{message}"):
        drafting(path, hf_overrides={"assistant_early_exit": 2})
