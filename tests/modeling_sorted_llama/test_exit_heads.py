"""Exits with a norm and a head of their own (`exit_heads="separate"`), against transformers' Llama with just those."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM, SortedLlamaModel
from tests.tiny import prompts, reference_llama, run_as_stranger, save_tiny, tiny_fields, tiny_llama, tiny_sorted


EXITS = [1, 2, 4]


def separate(seed=0, **overrides):
    """A model whose exits have drifted from the shared norm and head, and from one another."""
    torch.manual_seed(seed)
    fields = {"exit_layers": EXITS, "exit_heads": "separate", **overrides}
    model = SortedLlamaForCausalLM(SortedLlamaConfig(**tiny_fields(**fields))).eval()
    for module in (*model.model.exit_norms.values(), *model.exit_lm_heads.values()):
        module.weight.data += 0.3 * torch.randn_like(module.weight)
    return model


def reference(model, k):
    """transformers' own Llama of `k` layers with the norm and the head of that exit."""
    llama = reference_llama(model, k)
    if str(k) in model.exit_lm_heads:
        llama.model.norm.load_state_dict(model.model.exit_norms[str(k)].state_dict())
        llama.lm_head = copy.deepcopy(model.exit_lm_heads[str(k)])
        llama.config.tie_word_embeddings = False
    return llama


@pytest.mark.parametrize("tied", [True, False])
def test_exits_start_as_copies(tied):
    model = SortedLlamaForCausalLM(
        SortedLlamaConfig(**tiny_fields(exit_layers=EXITS, exit_heads="separate", tie_word_embeddings=tied))
    )
    assert list(model.model.exit_norms) == list(model.exit_lm_heads) == ["1", "2"]
    for k in EXITS[:-1]:
        for own, shared in (
            (model.model.exit_norm(k), model.model.norm),
            (model.exit_head(k), model.lm_head),
        ):
            assert own is not shared
            assert torch.equal(own.weight, shared.weight)
            assert own.weight.data_ptr() != shared.weight.data_ptr()
    for k in (3, 4):  # no exits of their own
        assert model.exit_head(k) is model.lm_head and model.model.exit_norm(k) is model.model.norm


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("auto", [True, False])
def test_loading_a_plain_llama(tmp_path, tied, auto):
    """What its checkpoint does not have are copies, not random weights; and no warning tells to train them."""
    llama = tiny_llama(tie_word_embeddings=tied)
    llama.model.norm.weight.data.uniform_()
    path = save_tiny(tmp_path, llama)
    options = {"exit_layers": EXITS, "exit_heads": "separate"}
    if auto:
        model = AutoModelForCausalLM.from_config(SortedLlamaConfig.from_pretrained(path, **options))
        assert isinstance(model, SortedLlamaForCausalLM)
    model = SortedLlamaForCausalLM.from_pretrained(path, **options)
    for k in EXITS[:-1]:
        assert torch.equal(model.exit_head(k).weight, llama.lm_head.weight)
        assert torch.equal(model.model.exit_norm(k).weight, llama.model.norm.weight)
    inputs = prompts()
    with torch.no_grad():
        shared = SortedLlamaForCausalLM.from_llama(llama, exit_layers=EXITS)
        for k in EXITS:
            assert torch.equal(model(**inputs, exit_layer=k).logits, shared(**inputs, exit_layer=k).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_logits_are_the_sub_models(tied, k):
    model, inputs = separate(tie_word_embeddings=tied), prompts()
    with torch.no_grad():
        expected = reference(model, k)(**inputs).logits
        torch.testing.assert_close(model(**inputs, exit_layer=k).logits, expected, rtol=0, atol=0)
        extracted = model.extract_submodel(k)
        assert type(extracted) is LlamaForCausalLM
        torch.testing.assert_close(extracted(**inputs).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_extracted_submodel_is_saved_as_a_plain_llama(tmp_path, tied):
    model, inputs = separate(tie_word_embeddings=tied), prompts()
    for k in EXITS:
        extracted = model.extract_submodel(k)
        assert extracted.lm_head.weight is model.exit_head(k).weight
        extracted.save_pretrained(tmp_path / str(k))
        loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / str(k), output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs, exit_layer=k).logits)


def test_from_llama_shares_the_backbone():
    llama = tiny_llama()
    model = SortedLlamaForCausalLM.from_llama(llama, exit_layers=EXITS, exit_heads="separate")
    shared = {param.data_ptr() for param in llama.parameters()}
    own = {name for name, param in model.named_parameters() if param.data_ptr() not in shared}
    assert own == {f"{kind}.{k}.weight" for kind in ("model.exit_norms", "exit_lm_heads") for k in EXITS[:-1]}


@pytest.mark.parametrize("call", [{"exit_layer": 1}, {"exit_layer": 2}, {"exit_layer": 4}], ids=str)
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_generation_at_an_exit(call, strategy):
    model, inputs = separate(), prompts()
    outputs = []
    for decoded, options in ((model, call), (reference(model, call["exit_layer"]), {})):
        torch.manual_seed(0)
        options = {"do_sample": False, **strategy, **options}
        outputs.append(decoded.generate(**inputs, max_new_tokens=12, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "call",
    [
        {"assistant_early_exit": 1},
        {"assistant_early_exit": 2, "num_assistant_tokens": 3},
        {"assistant_early_exit": "auto"},
        {"exit_threshold": 2.0},
        {"exit_layer": "auto", "exit_agreement": 1.0},
    ],
    ids=str,
)
def test_lossless_modes_give_full_depths_tokens(call):
    model, inputs = separate(), prompts()
    expected = reference(model, 4).generate(**inputs, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=20, **call), expected)


def test_confidence_and_row_depths_read_the_exits_own_heads():
    model, inputs = separate(), prompts()
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = reference(model, 1).generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, exit_threshold=0.0, **options), expected)
    rows = model.generate(**inputs, exit_layer=[1, 2, 4], **options)
    for row, k in enumerate(EXITS):
        of_exit = reference(model, k).generate(**inputs, **options)[row]
        width = min(len(of_exit), rows.shape[1])
        assert torch.equal(rows[row, :width], of_exit[:width])


def test_agreement_with_the_prompt_reads_the_exits_own_heads():
    """An exit whose head agrees with full depth is taken, one whose head does not is not."""
    model, inputs = tiny_sorted(exit_layers=[3, 4]), prompts()
    model = SortedLlamaForCausalLM.from_llama(model, exit_layers=[3, 4], exit_heads="separate")
    del model.model.layers[3].mlp.down_proj.weight, model.model.layers[3].self_attn.o_proj.weight
    layer = model.model.layers[3]  # it adds nothing: exit 3 is full depth
    layer.mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 64))
    layer.self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros(32, 32))
    options = {"exit_layer": "auto", "max_new_tokens": 2, "return_dict_in_generate": True}
    assert (model.generate(**inputs, **options).exit_layers_used[:, 0] == 3).all()
    model.exit_lm_heads["3"].weight.data.neg_()
    assert (model.generate(**inputs, **options).exit_layers_used[:, 0] == 4).all()


def test_loss_reads_each_exits_own_head():
    """Loss and gradients of the SoFT sum, with separate heads and with the full depth's shared ones."""
    model, inputs = separate(), prompts((6, 6))
    labels = inputs["input_ids"]
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    losses, expected = [], {}
    for k in EXITS:
        llama = reference(model, k)
        loss = llama(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        expected |= {
            f"model.exit_norms.{k}.weight": llama.model.norm.weight.grad,
            f"exit_lm_heads.{k}.weight": llama.lm_head.weight.grad,
        }
    assert outputs.exit_losses.tolist() == pytest.approx(losses, rel=1e-5)
    for name, param in model.named_parameters():
        if "exit_" in name:
            torch.testing.assert_close(param.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_resizing_the_vocabulary():
    model, inputs = separate(), prompts()
    before = {k: model(**inputs, exit_layer=k).logits for k in EXITS}
    model.resize_token_embeddings(300)
    for k in EXITS:
        logits = model(**inputs, exit_layer=k).logits
        assert logits.shape[-1] == 300
        torch.testing.assert_close(logits[..., :259], before[k])
        assert torch.equal(model.exit_head(k).weight[259:], model.lm_head.weight[259:])
    model.resize_token_embeddings(200)
    ids = inputs["input_ids"].clamp(max=199)
    assert model(input_ids=ids, labels=ids).exit_losses.isfinite().all()


SCRIPT = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = torch.arange(3, 11)[None]
for k in (1, 2, 4):
    print(model.generate(inputs, do_sample=False, max_new_tokens=8, exit_layer=k).tolist())
"""


def test_saved_folder_without_this_project(tmp_path):
    model = separate()
    path = save_tiny(tmp_path / "model", model)
    inputs = torch.arange(3, 11)[None]
    expected = [model.generate(inputs, do_sample=False, max_new_tokens=8, exit_layer=k).tolist() for k in EXITS]
    assert run_as_stranger(SCRIPT, path, folder=tmp_path).split("\n")[:3] == list(map(str, expected))
    plain = LlamaForCausalLM.from_pretrained(path)  # the full depth, whatever the exits have
    with torch.no_grad():
        assert torch.equal(plain(inputs).logits, model(inputs).logits)
    base = SortedLlamaModel.from_pretrained(path)
    assert torch.equal(base.exit_norm(2).weight, model.model.exit_norm(2).weight)


def test_config():
    config = SortedLlamaConfig(**tiny_fields(exit_layers=EXITS, exit_heads="separate"))
    assert SortedLlamaConfig(**config.to_dict()).exit_heads == "separate"
    assert SortedLlamaConfig(**tiny_fields()).exit_heads == "shared"
    assert not hasattr(config.to_llama(2), "exit_heads")
    assert config.to_llama(2).tie_word_embeddings is False
    assert config.to_llama(3).tie_word_embeddings is config.to_llama(4).tie_word_embeddings is True


@pytest.mark.parametrize(
    "fields",
    [{"exit_heads": "block"}, {"exit_heads": None}, {"exit_heads": "separate"}]
    + [{"exit_heads": "separate", "exit_layers": [4]}],
    ids=str,
)
def test_wrong_config(fields):
    with pytest.raises(ValueError, match="`exit_heads"):
        SortedLlamaConfig(**tiny_fields(**fields))


def test_layers_cannot_be_left_out(tmp_path):
    """The checkpoint's norm and head are full depth's: a shallower model of them would be wrong."""
    path = save_tiny(tmp_path, separate())
    for load in (SortedLlamaForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match="`num_hidden_layers=2`.*extract_submodel"):
            load(path, num_hidden_layers=2)
    assert SortedLlamaForCausalLM.from_pretrained(path, num_hidden_layers=4).config.exit_layers == EXITS
