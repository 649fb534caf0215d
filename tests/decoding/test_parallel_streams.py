"""Products side by side: which, on real packed layers; the same bits and everything put back. On a GPU, in a graph."""

from __future__ import annotations

import pytest
from decode_models import GREEDY, PROMPT, filled, recorded_for, tiny, tokens

from comparator.backends import owner
from comparator.decoding import parallel_streams


def packed(name: str, method: str = "nf4", device: str = "cpu"):
    """A tiny model whose linear layers but the head are bitsandbytes' own."""
    import bitsandbytes as bnb
    import torch

    model = tiny(name).to(torch.bfloat16)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child is not model.get_output_embeddings():
                sizes = child.in_features, child.out_features, child.bias is not None
                if method == "nf4":
                    made = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.bfloat16)
                else:
                    made = bnb.nn.Linear8bitLt(
                        *sizes, has_fp16_weights=False, threshold=6.0 if method == "int8" else 0.0
                    )
                made.load_state_dict(child.state_dict())
                setattr(parent, child_name, made)
    return model.to(device).eval()  # which quantizes


def with_adapter(model):
    import torch

    peft = pytest.importorskip("peft")
    model.is_loaded_in_4bit = True  # what from_pretrained leaves; peft looks at it
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model).eval()


@pytest.fixture
def llama():
    import torch

    model = packed("Llama")
    with torch.inference_mode():
        model(torch.tensor([PROMPT]))  # bitsandbytes arranges the weights for this CPU in the first forward
    return model


def names(model, groups) -> list[list[str]]:
    known = {id(m): n for n, m in model.named_modules()}
    return [[known[id(m)].split(".")[-1] for m in members] for members in groups]


def found_in(model):
    import torch

    with torch.inference_mode():
        return parallel_streams.find(model, filled(model))


@pytest.mark.parametrize(
    ("name", "of_a_layer"),
    [
        ("Llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        # Qwen3 normalizes q before k is computed: what is asked for first does not matter.
        ("Qwen3", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        # Phi's attention and MLP read one and the same normalized input.
        ("Phi", [["q_proj", "k_proj", "v_proj", "fc1"]]),
        # One product for q, k and v.
        ("GPTNeoX", []),
    ],
)
def test_what_reads_one_input_is_found(name, of_a_layer):
    model = packed(name)
    assert names(model, found_in(model)) == of_a_layer * model.config.num_hidden_layers


def test_full_precision_is_left_alone():
    assert found_in(tiny("Llama")) == ()


def test_an_input_that_is_written_into_between_its_readers(llama):
    """Computing v with q would then compute it from other values."""
    attention = llama.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(lambda _, inputs, __: inputs[0].mul_(2))
    groups = names(llama, found_in(llama))
    assert groups == [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def test_one_that_is_called_twice_is_left_out(llama):
    mlp = llama.model.layers[0].mlp
    mlp.up_proj = mlp.gate_proj
    assert names(llama, found_in(llama))[:2] == [["q_proj", "k_proj", "v_proj"]] * 2


def test_several_sequences_are_left_alone(llama):
    import torch

    from comparator.decoding.timed_batch import record

    with torch.inference_mode():
        recorded, _ = record(llama, torch.tensor([PROMPT, PROMPT]), 6, compiled=False)
    assert parallel_streams.NOTE not in recorded.notes


def test_each_gives_its_own_output_in_any_order_and_is_put_back(llama):
    import torch

    attention = llama.model.layers[0].self_attn
    members = attention.q_proj, attention.k_proj, attention.v_proj
    inputs = torch.randn(2, 1, 1, llama.config.hidden_size).to(torch.bfloat16)
    with torch.inference_mode():
        own = [[m(x) for m in members] for x in inputs]
        with parallel_streams.applied((members,), torch.device("cpu")):
            for x, expected in zip(inputs, own, strict=True):
                for order in ((0, 1, 2), (2, 0, 1)):  # as the model calls them; as a compiler may
                    for place in order:
                        assert torch.equal(members[place](x), expected[place])
            # One was not asked for: what was computed beside it is not given for another input.
            members[0](inputs[0])
            inputs[0].copy_(inputs[1])
            members[1](inputs[1])
            assert torch.equal(members[0](inputs[1]), own[1][0])
        assert not any("forward" in vars(m) for m in members)
        assert torch.equal(members[0](inputs[1]), own[1][0])


def test_each_is_computed_once_a_step(llama):
    import torch

    counts = []
    layer = llama.model.layers[0]
    members = layer.mlp.gate_proj, layer.mlp.up_proj
    x = torch.randn(1, 1, llama.config.hidden_size).to(torch.bfloat16)
    own = type(members[0]).forward
    for member in members:
        member.forward = lambda x, member=member: counts.append(member) or own(member, x)
    with torch.inference_mode(), parallel_streams.applied((members,), torch.device("cpu")):
        for _ in range(3):
            members[0](x), members[1](x)
    assert len(counts) == 6
    assert "forward" in vars(members[0]), "what was there before comes back"


@pytest.mark.parametrize("method", ["nf4", "int8", "int8:threshold=0"])
def test_the_column_says_so_and_its_tokens_are_eagers(method):
    model = packed("Llama", method)
    recorded, notes, check = recorded_for(model)
    assert parallel_streams.NOTE in notes
    assert check.first_difference is None
    assert tokens(model, GREEDY, recorded)[0] == tokens(model, GREEDY)[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_compiler_does_not_look_into_them(method, monkeypatch):
    """It gets one operation for each product, and whichever it runs first runs those beside it."""
    from comparator.decoding import compile as decoding_compile
    from comparator.decoding import custom_ops

    seen = []
    own = decoding_compile.compiled
    monkeypatch.setattr(
        decoding_compile,
        "compiled",
        lambda fixed: seen.extend(m for m in fixed.model.modules() if custom_ops.is_opaque(m)) or own(fixed),
    )
    model = packed("Llama", method)
    recorded, notes, check = recorded_for(model, compiled=True)
    layers = model.config.num_hidden_layers
    # LLM.int8 with its threshold is in a form of our own, which is opaque everywhere.
    assert len(seen) == layers * {"nf4": 5, "int8": 7}[method]
    assert parallel_streams.NOTE in notes and check.first_difference is None
    assert tokens(model, GREEDY, recorded)[0] == tokens(model, GREEDY)[0]
    assert not any("forward" in vars(m) for m in model.modules())


def test_under_an_adapter_the_base_layers_run_side_by_side():
    """peft calls the layer it wraps with the wrapper's own input, then adds what the adapter makes of it."""
    import torch

    model = with_adapter(packed("Llama"))
    groups = found_in(model)
    assert names(model, groups)[:2] == [
        ["base_layer", "k_proj", "base_layer"],
        ["gate_proj", "base_layer"],
    ]
    _, notes, check = recorded_for(model)
    assert parallel_streams.NOTE in notes and check.first_difference is None
    given = torch.tensor([PROMPT])
    with torch.inference_mode():
        own = model(given).logits
        with parallel_streams.applied(groups, torch.device("cpu")):
            assert torch.equal(model(given).logits, own)


def test_gptqmodels_layers_count_and_its_torch_kernel_does_not(monkeypatch):
    exllama = pytest.importorskip("gptqmodel.nn_modules.qlinear.exllamav2").ExllamaV2Linear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    def made(kind):
        monkeypatch.setattr(kind, "validate", lambda *_, **__: (True, None))  # there is no GPU here
        module = kind(bits=4, group_size=32, sym=True, desc_act=False, in_features=64, out_features=64)
        assert hasattr(module, "qweight"), "gptqmodel names its weights otherwise now"
        return module

    backend = owner(made(exllama))
    assert backend.name == "gptq" and backend.on_parallel_streams(made(exllama))
    assert owner(made(TorchLinear)) is backend and not backend.on_parallel_streams(made(TorchLinear))


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["graph", "compiled"])
@pytest.mark.parametrize("method", ["nf4", "nf4 with an adapter", "int8", "int8:threshold=0"])
def test_a_graph_with_branches_gives_the_same_bits(method, decode, monkeypatch):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from comparator.decoding.generate import decoding
    from comparator.decoding.planner import capture

    model = packed("Llama", method.split()[0], "cuda")
    if "adapter" in method:
        model = with_adapter(model)
    rows = []
    for side_by_side in (True, False):
        if not side_by_side:
            monkeypatch.setattr(parallel_streams, "find", lambda *_: ())
        fixed = filled(model)
        with torch.inference_mode(), decoding(model) as begin:
            begin()
            before = fixed.position.clone(), fixed.token.clone()
            recorded = capture(model, fixed, decode == "compiled", False)
            assert (parallel_streams.NOTE in recorded.notes) == side_by_side
            fixed.position.copy_(before[0]), fixed.token.copy_(before[1])
            made = []
            for _ in range(6):
                recorded.replay()
                made.append(fixed.logits.clone())
        rows.append(torch.stack(made))
    assert torch.equal(*rows), "a branch was read before it was done, or a tensor was reused too early"
