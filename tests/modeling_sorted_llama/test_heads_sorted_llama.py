"""Exits that own a head (`exit_heads="separate"`), a matrix (`"lens"`) or a decoder layer (`"layer"`), and a norm."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM, SortedLlamaModel
from sorted_llama.modeling_sorted_llama.heads_sorted_llama import owned_modules
from tests.tiny import prompts, reference_llama, save_tiny, tiny_fields, tiny_llama, tiny_sorted


EXITS = [1, 2, 4]
KINDS = pytest.mark.parametrize("exit_heads", ["separate", "lens", "layer"])
TIED = pytest.mark.parametrize("tied", [True, False])


def sorted_llama(exit_heads, seed=0, **overrides):
    """A model whose exits have drifted from the shared norm and head, and from one another."""
    torch.manual_seed(seed)
    fields = {"exit_layers": EXITS, "exit_heads": exit_heads, **overrides}
    model = SortedLlamaForCausalLM(SortedLlamaConfig(**tiny_fields(**fields))).eval()
    for name, param in model.named_parameters():
        if "exit_" in name:
            param.data += (0.1 if "matrix" in name else 0.3) * torch.randn_like(param)
    return model


def num_layers(exit_heads, k):
    """Of the sub-model of an exit."""
    return k + (exit_heads == "layer" and k in EXITS[:-1])


def reference(model, k):
    """transformers' own Llama of `k` layers with what that exit owns."""
    llama = reference_llama(model, num_layers(model.config.exit_heads, k))
    if k != EXITS[-1] and k in EXITS:
        norm = model.model.exit_norms[str(k)]
        llama.model.norm.weight.data = norm.weight.data.clone()
        if model.config.exit_heads == "layer":
            llama.model.layers[k].load_state_dict(model.model.exit_decoders[str(k)].state_dict())
            return llama
        if model.config.exit_heads == "separate":
            head = model.exit_lm_heads[str(k)].weight.data.clone()
        else:
            head = (model.lm_head.weight.double() @ (torch.eye(32) + norm.matrix).double()).float()
        llama.lm_head.weight = torch.nn.Parameter(head)
        llama.config.tie_word_embeddings = False
    return llama


@KINDS
@TIED
def test_exits_start_as_full_depth_reads(exit_heads, tied):
    fields = tiny_fields(exit_layers=EXITS, exit_heads=exit_heads, tie_word_embeddings=tied)
    model = SortedLlamaForCausalLM(SortedLlamaConfig(**fields))
    shared, inputs = SortedLlamaForCausalLM.from_llama(reference_llama(model, 4), exit_layers=EXITS), prompts()
    for k in EXITS:
        expected = shared(**inputs, exit_layer=num_layers(exit_heads, k)).logits
        assert torch.equal(model(**inputs, exit_layer=k).logits, expected)


@TIED
def test_separate_exits_start_as_copies(tied):
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


@KINDS
@TIED
@pytest.mark.parametrize("auto", [True, False])
def test_exits_of_a_loaded_plain_llama_start_as_copies(tmp_path, exit_heads, tied, auto):
    """What its checkpoint does not have are copies, not random weights; and no warning tells to train them."""
    llama = tiny_llama(tie_word_embeddings=tied)
    llama.model.norm.weight.data.uniform_()
    path = save_tiny(tmp_path, llama)
    options = {"exit_layers": EXITS, "exit_heads": exit_heads}
    if auto:
        model = AutoModelForCausalLM.from_config(SortedLlamaConfig.from_pretrained(path, **options))
        assert isinstance(model, SortedLlamaForCausalLM)
    model = SortedLlamaForCausalLM.from_pretrained(path, **options)
    for k in EXITS[:-1]:
        assert torch.equal(model.exit_head(k).weight, llama.lm_head.weight)
        assert torch.equal(model.model.exit_norm(k).weight, llama.model.norm.weight)
        assert model.model.exit_norm(k).weight.data_ptr() != model.model.norm.weight.data_ptr()
    inputs = prompts()
    with torch.no_grad():
        shared = SortedLlamaForCausalLM.from_llama(llama, exit_layers=EXITS)
        for k in EXITS:
            expected = shared(**inputs, exit_layer=num_layers(exit_heads, k)).logits
            assert torch.equal(model(**inputs, exit_layer=k).logits, expected)


def close(exit_heads):
    """A lens is folded into the head, which rounds otherwise; copies are equal to the bit."""
    return {"rtol": 1e-4, "atol": 1e-5} if exit_heads == "lens" else {"rtol": 0, "atol": 0}


@KINDS
@TIED
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_logits_of_exits_that_own_heads_are_the_sub_models(exit_heads, tied, k):
    model, inputs = sorted_llama(exit_heads, tie_word_embeddings=tied), prompts()
    with torch.no_grad():
        expected = reference(model, k)(**inputs).logits
        torch.testing.assert_close(model(**inputs, exit_layer=k).logits, expected, **close(exit_heads))
        extracted = model.extract_submodel(k)
        assert type(extracted) is LlamaForCausalLM
        torch.testing.assert_close(extracted(**inputs).logits, expected, **close(exit_heads))


@KINDS
@TIED
def test_extracted_submodel_is_saved_as_a_plain_llama(tmp_path, exit_heads, tied):
    model, inputs = sorted_llama(exit_heads, tie_word_embeddings=tied), prompts()
    own = {param.data_ptr() for param in model.parameters()}
    for k in EXITS:
        extracted = model.extract_submodel(k)
        copied = {name for name, param in extracted.named_parameters() if param.data_ptr() not in own}
        assert copied == ({"lm_head.weight"} if exit_heads == "lens" and k < 4 else set())
        extracted.save_pretrained(tmp_path / str(k))
        loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / str(k), output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            logits = model(**inputs, exit_layer=k).logits
            torch.testing.assert_close(loaded(**inputs).logits, logits, **close(exit_heads))


def test_lens_does_not_fold_into_any_head():
    model = sorted_llama("lens")
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.data = model.lm_head.weight.data.to(torch.int8)
    with pytest.raises(ValueError, match="`exit_heads='lens'`.*dequantize"):
        model.extract_submodel(2)
    model.extract_submodel(4)


@KINDS
def test_from_llama_shares_the_backbone(exit_heads):
    llama = tiny_llama()
    model = SortedLlamaForCausalLM.from_llama(llama, exit_layers=EXITS, exit_heads=exit_heads)
    shared = {param.data_ptr() for param in llama.parameters()}
    own = {name for name, param in model.named_parameters() if param.data_ptr() not in shared}
    in_layer = [f"model.exit_decoders.{{}}.{name}" for name, _ in llama.model.layers[0].named_parameters()]
    added = {"separate": ["exit_lm_heads.{}.weight"], "lens": ["model.exit_norms.{}.matrix"], "layer": in_layer}
    names = ["model.exit_norms.{}.weight", *added[exit_heads]]
    assert own == {name.format(k) for name in names for k in EXITS[:-1]}
    modules = [model.get_submodule(name) for k in EXITS for name in owned_modules(model.config, k)]
    assert own == {n for n, p in model.named_parameters() if any(p is q for m in modules for q in m.parameters())}
    for k in EXITS:
        inputs = prompts()
        expected = reference_llama(llama, num_layers(exit_heads, k))(**inputs).logits
        assert torch.equal(model(**inputs, exit_layer=k).logits, expected)


@KINDS
@pytest.mark.parametrize("other", ["shared", "separate", "lens", "layer"])
def test_what_exits_own_is_kept(exit_heads, other):
    model = sorted_llama(exit_heads)
    if other == exit_heads:
        again = SortedLlamaForCausalLM.from_llama(model)
        assert {p.data_ptr() for p in again.parameters()} == {p.data_ptr() for p in model.parameters()}
        return
    with pytest.raises(ValueError, match=f"`exit_heads='{other}'` would drop.*`exit_heads='{exit_heads}'`"):
        SortedLlamaForCausalLM.from_llama(model, exit_heads=other)


@KINDS
@pytest.mark.parametrize("call", [{"exit_layer": 1}, {"exit_layer": 2}, {"exit_layer": 4}], ids=str)
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_generation_at_an_exit_that_owns_its_head_is_the_sub_models(exit_heads, call, strategy):
    model, inputs = sorted_llama(exit_heads), prompts()
    outputs = []
    for decoded, options in ((model, call), (reference(model, call["exit_layer"]), {})):
        torch.manual_seed(0)
        options = {"do_sample": False, **strategy, **options}
        outputs.append(decoded.generate(**inputs, max_new_tokens=12, **options))
    assert torch.equal(*outputs)


@KINDS
@pytest.mark.parametrize(
    "call",
    [
        {"assistant_early_exit": 1},
        {"assistant_early_exit": 2, "num_assistant_tokens": 3},
        {"assistant_early_exit": "auto"},
        {"exit_threshold": 2.0},
        {"exit_layer": [4, 4, 4]},
    ],
    ids=str,
)
def test_lossless_modes_give_full_depths_tokens(exit_heads, call):
    model, inputs = sorted_llama(exit_heads), prompts((6, 5, 4))  # long enough that no exit agrees by chance
    expected = reference(model, 4).generate(**inputs, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=20, **call), expected)


@KINDS
def test_confidence_and_row_depths_read_as_the_exits_do(exit_heads):
    model, inputs = sorted_llama(exit_heads), prompts()
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = reference(model, 1).generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, exit_threshold=0.0, **options), expected)
    rows = model.generate(**inputs, exit_layer=[1, 2, 4], **options)
    for row, k in enumerate(EXITS):
        of_exit = reference(model, k).generate(**inputs, **options)[row]
        width = min(len(of_exit), rows.shape[1])
        assert torch.equal(rows[row, :width], of_exit[:width])


@KINDS
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("weights", [None, [0.25, 0.5, 2.0]], ids=str)
def test_loss_and_gradients_of_exits_that_own_heads_are_the_naive_sums(exit_heads, detached, weights):
    """Those of the naive sum; with detached exits, full depth's gradients are those of its loss alone."""
    model, inputs = sorted_llama(exit_heads, tie_word_embeddings=False), prompts((6, 6))
    labels = inputs["input_ids"]
    outputs = model(**inputs, labels=labels, detach_exits=detached, exit_loss_weights=weights)
    outputs.loss.backward()
    found = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    losses = [model(**inputs, labels=labels, exit_layer=k).loss for k in EXITS]
    for k, loss, weight in zip(EXITS, losses, weights or [1.0] * 3, strict=True):
        (weight * loss).backward()
        if detached and k < 4:
            for name, param in model.named_parameters():
                param.grad = param.grad if "exit_" in name else None
    assert outputs.exit_losses.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], param.grad, rtol=1e-4, atol=5e-6)


def test_resizing_the_vocabulary_resizes_the_heads_of_exits():
    model, inputs = sorted_llama("separate"), prompts()
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


def test_heads_of_exits_that_are_called_are_resized_as_well():
    """Where the LM head has a hook, those of the exits are copies of all of it."""
    llama = tiny_llama()
    llama.lm_head.register_forward_hook(lambda *_: None)
    model = SortedLlamaForCausalLM.from_llama(llama, exit_layers=EXITS, exit_heads="separate")
    before = model(**prompts(), exit_layer=2).logits
    model.resize_token_embeddings(300)
    torch.testing.assert_close(model(**prompts(), exit_layer=2).logits[..., :259], before)


def test_own_heads_are_left_out_as_the_lm_head_is(tmp_path):
    """Of adapters on all linear layers and of quantization; a sub-model's head is an `nn.Linear` again."""
    peft, bitsandbytes = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    model = sorted_llama("separate", hidden_size=64)
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear"))
    plain = peft.get_peft_model(tiny_llama(hidden_size=64), peft.LoraConfig(target_modules="all-linear"))
    assert lora.peft_config["default"].target_modules == plain.peft_config["default"].target_modules

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantized = SortedLlamaForCausalLM.from_pretrained(save_tiny(tmp_path, model), quantization_config=quantization)
    linear4bit = {n for n, module in quantized.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert linear4bit and all(name.startswith("model.layers.") for name in linear4bit)
    assert torch.equal(quantized.exit_head(2).weight, model.exit_head(2).weight)
    extracted = model.extract_submodel(2)
    assert type(extracted.lm_head) is torch.nn.Linear
    assert extracted.lm_head.weight is model.exit_head(2).weight


def test_own_heads_are_trained_through_peft():
    """`modules_to_save` puts a wrapper in the place of the head, which is called: the naive sum's gradients."""
    peft = pytest.importorskip("peft")
    model, ids = sorted_llama("separate"), prompts((6, 6))["input_ids"]
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["exit_lm_heads.1"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    loss = model(input_ids=ids, labels=ids).loss
    naive = sum(model(input_ids=ids, labels=ids, exit_layer=k).loss for k in EXITS)
    torch.testing.assert_close(loss, naive)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert any("exit_lm_heads" in name for name in trained)
    found, expected = (torch.autograd.grad(x, trained.values()) for x in (loss, naive))
    for name, grad, reference_grad in zip(trained, found, expected, strict=True):
        torch.testing.assert_close(grad, reference_grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", ["hook", "bias", "adapter"])
def test_lens_is_not_folded_into_a_head_that_does_more_than_multiply(change):
    """It would be lost without a word."""
    model = sorted_llama("lens", tie_word_embeddings=False)
    if change == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: output.tanh())
    elif change == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.ones(259))
    else:
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)
    with pytest.raises(ValueError, match="`exit_heads='lens'`.*without bias, hooks or adapters, got"):
        model.extract_submodel(2)
    model.extract_submodel(4)


@KINDS
def test_full_depth_and_the_inner_model_load_whatever_the_exits_own(tmp_path, exit_heads):
    model = sorted_llama(exit_heads)
    path, inputs = save_tiny(tmp_path / "model", model), torch.arange(3, 11)[None]
    plain = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(plain(inputs).logits, model(inputs).logits)
    base = SortedLlamaModel.from_pretrained(path)
    assert torch.equal(base.exit_norm(2).weight, model.model.exit_norm(2).weight)
    own, expected = base.exit_decoders.state_dict(), model.model.exit_decoders.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)


@KINDS
def test_the_kind_of_exit_heads_is_kept_by_the_config_and_left_out_of_llamas(exit_heads):
    config = SortedLlamaConfig(**tiny_fields(exit_layers=EXITS, exit_heads=exit_heads))
    assert SortedLlamaConfig(**config.to_dict()).exit_heads == exit_heads
    assert SortedLlamaConfig(**tiny_fields()).exit_heads == "shared"
    assert not hasattr(config.to_llama(2), "exit_heads")
    assert config.to_llama(2).tie_word_embeddings is (exit_heads == "layer")
    assert all(config.to_llama(k).num_hidden_layers == num_layers(exit_heads, k) for k in range(1, 5))
    assert config.to_llama(3).tie_word_embeddings is config.to_llama(4).tie_word_embeddings is True


@pytest.mark.parametrize(
    "fields",
    [{"exit_heads": "block"}, {"exit_heads": None}, {"exit_heads": "separate"}]
    + [{"exit_heads": "lens"}, {"exit_heads": "layer"}, {"exit_heads": "separate", "exit_layers": [4]}],
    ids=str,
)
def test_exit_heads_that_are_unknown_or_have_no_exits_are_refused(fields):
    with pytest.raises(ValueError, match="`exit_heads"):
        SortedLlamaConfig(**tiny_fields(**fields))


@pytest.mark.parametrize("fields", [{"exit_layers": [2, 3, 4]}, {"exit_heads": "shared"}], ids=str)
def test_detached_exits_that_own_nothing_are_refused(fields):
    model = sorted_llama("lens") if "exit_heads" not in fields else tiny_sorted(exit_layers=EXITS)
    ids = prompts()["input_ids"]
    with pytest.raises(ValueError, match="`detach_exits=True`.*`exit_heads` of 'separate' or 'lens'"):
        model(input_ids=ids, labels=ids, detach_exits=True, exit_layers=fields.get("exit_layers"))


@KINDS
def test_layers_below_exits_that_own_heads_cannot_be_left_out(tmp_path, exit_heads):
    """The checkpoint's norm and head are full depth's: a shallower model of them would be wrong."""
    path = save_tiny(tmp_path, sorted_llama(exit_heads))
    for load in (SortedLlamaForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match="`num_hidden_layers=2`.*extract_submodel"):
            load(path, num_hidden_layers=2)
    assert SortedLlamaForCausalLM.from_pretrained(path, num_hidden_layers=4).config.exit_layers == EXITS


@pytest.mark.parametrize("exit_heads", ["separate", "lens", "layer"])
def test_what_exits_own_is_not_dropped_when_a_model_is_loaded(tmp_path, exit_heads):
    tiny_sorted(exit_heads=exit_heads).save_pretrained(tmp_path)
    for other in {"shared", "lens", "layer"} - {exit_heads}:
        with pytest.raises(ValueError, match=f"`exit_heads='{other}'` would drop .* `exit_heads='{exit_heads}'`"):
            SortedLlamaForCausalLM.from_pretrained(tmp_path, exit_heads=other)
