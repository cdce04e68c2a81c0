"""Private names of torch, and one of transformers' configurations: each is there and means what is thought."""

import pytest
import torch
from accelerate import disk_offload
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import CLIPTextConfig, CLIPTextModel

from hf_zocl import private_names as names


@pytest.mark.parametrize("name", ["_foreach_add", "_foreach_add_", "_foreach_copy_"])
def test_torch_has_the_function(name):
    assert callable(getattr(torch, name, None)), f"torch has no torch.{name} any more"


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (torch.zeros(1), "_version"),
        (torch.zeros(1).untyped_storage(), "_cdata"),
        (nn.Linear(1, 1), "_buffers"),
        (nn.Linear(1, 1), "_compiled_call_impl"),
        (torch.ops.aten.add_.Tensor, "_schema"),
        (torch.autocast("cpu"), "_enabled"),
    ],
)
def test_a_thing_of_torch_has_the_name(thing, name):
    assert hasattr(thing, name), f"{type(thing).__name__}.{name} is no more"


def test_many_tensors_are_added_and_copied():
    data = [torch.ones(2), torch.ones(3)]
    names.add_to_each(data, data)
    assert data[1].tolist() == [2, 2, 2]
    names.copy_to_each(data, [torch.zeros(2), torch.full((3,), 7.0)])
    assert [t.tolist() for t in data] == [[0, 0], [7, 7, 7]]


def test_a_change_in_place_is_counted_and_one_through_data_is_not():
    tensor = torch.zeros(2)
    before = names.version(tensor)
    tensor.add_(1)
    after = names.version(tensor)
    tensor.data.add_(1)
    assert after == before + 1 == names.version(tensor)


def test_views_share_a_storage_and_others_do_not_though_both_are_empty():
    one, other = torch.zeros(4), torch.zeros(0)
    assert names.storage_id(one) == names.storage_id(one[2:]) != names.storage_id(other)
    assert names.storage_id(other) != names.storage_id(torch.zeros(0))
    with pytest.raises((NotImplementedError, RuntimeError)):
        names.storage_id(torch.zeros(2, 2).to_sparse())


def test_a_wrapper_is_made_of_tensors_and_a_plain_tensor_of_none():
    one, other, third = torch.zeros(2), nn.Parameter(torch.ones(2)), torch.full((2,), 2.0)
    wrapped = TwoTensor(TwoTensor(one, third), TwoTensor(third, one))
    assert dict(names.plain_tensors("w", TwoTensor(one, third))) == {"w.a": one, "w.b": third}
    assert dict(names.plain_tensors("w", wrapped)) == {"w.a.a": one, "w.a.b": third, "w.b.a": third, "w.b.b": one}
    assert dict(names.plain_tensors("w", one)) == {"w": one} and dict(names.plain_tensors("", other)) == {"": other}


def test_a_buffer_is_seen_and_set_also_where_it_is_none():
    module = nn.Module()
    module.register_buffer("here", torch.zeros(1))
    module.register_buffer("none", None)
    assert set(names.own_buffers(module)) == {"here", "none"}
    names.own_buffers(module)["none"] = torch.ones(1)
    assert module.none.item() == 1


def test_compiled_modules_are_known_and_run_uncompiled():
    module = nn.Linear(1, 1)
    assert not names.is_compiled(module) and not names.is_compile_wrapper(module)
    assert names.is_compile_wrapper(torch.compile(module)) and not names.is_compiled(module)
    module.compile()
    assert names.is_compiled(module)
    vars(module).update(names.UNCOMPILED)
    assert not names.is_compiled(module)


def test_a_mode_sees_what_is_written():
    seen, target = [], torch.zeros(2)

    class Watches(names.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append([tensor is target for tensor in names.written_tensors(func, args, kwargs or {})])
            assert len(names.tree_leaves((args, kwargs))) >= 2
            return func(*args, **(kwargs or {}))

    with Watches():
        target + 1
        target.add_(1)
        torch.add(torch.zeros(2), 1, out=target)
    assert [True] in seen and [] in seen and seen[-1] == [True]


def test_the_attention_of_a_model_is_told():
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    assert names.attention_kernel(CLIPTextModel._from_config(config, attn_implementation="sdpa")) == "sdpa"
    assert names.attention_kernel(CLIPTextModel._from_config(config, attn_implementation="eager")) == "eager"
    assert names.attention_kernel(nn.Linear(1, 1)) is None


def test_an_offloaded_module_says_where_it_runs_and_can_be_loaded(tmp_path):
    there, here = nn.Linear(2, 2), nn.Linear(2, 2)
    weight = there.weight.detach().clone()
    disk_offload(there, tmp_path, execution_device=torch.device("cpu"))
    assert names.is_offloaded(there) and not names.is_offloaded(here)
    assert names.execution_device(there) == torch.device("cpu") and names.execution_device(here) is None
    with names.loaded(there) as parameters:
        assert torch.equal(parameters[0], weight)
    assert there.weight.is_meta
    with names.loaded(here) as parameters:
        assert parameters == []
