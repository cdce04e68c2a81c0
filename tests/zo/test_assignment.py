import pytest
import torch
from torch import nn

from hf_zocl.zo import LayerAssignment
from hf_zocl.zo.assignment import locate


class TwoTowers(nn.Module):
    """Named as a CLIPModel is: six vision and four text layers, and what lies outside them."""

    def __init__(self):
        super().__init__()
        self.vision_model = _tower(6)
        self.text_model = _tower(4)
        self.visual_projection = nn.Linear(2, 2, bias=False)
        self.text_projection = nn.Linear(2, 2, bias=False)
        self.logit_scale = nn.Parameter(nn.init.ones_(nn.Linear(1, 1).weight[0, 0].detach()))


def _tower(depth: int) -> nn.Module:
    tower = nn.Module()
    tower.encoder = nn.Module()
    tower.encoder.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
    return tower


def zo_layers(assignment: LayerAssignment, model: nn.Module | None = None) -> dict:
    split = assignment.split(model or TwoTowers())
    layers: dict = {}
    for group in split.zo:
        layers.setdefault(group.branch, []).append(group.layer)
    return layers


@pytest.mark.parametrize(
    ("layers", "vision", "language"),
    [
        ("hop-odd", [1, 3, 5], [1, 3]),
        ("hop-even", [2, 4, 6], [2, 4]),
        ("prefix-2", [1, 2], [1, 2]),
        ("suffix-2", [5, 6], [3, 4]),
        ([2, 4], [2, 4], [2, 4]),
    ],
)
def test_schemes_choose_layers_counted_from_one(layers, vision, language):
    assert zo_layers(LayerAssignment("dual", layers)) == {"vision": vision, "language": language}
    assert zo_layers(LayerAssignment("vision", layers)) == {"vision": vision}
    assert zo_layers(LayerAssignment("language", layers)) == {"language": language}


def test_all_takes_what_lies_outside_the_layers_too():
    split = LayerAssignment("vision", "all").split(TwoTowers())
    names = {name for group in split.zo for name in group.names}
    assert "visual_projection.weight" in names
    assert set(split.fo) == {name for name, _ in TwoTowers().named_parameters() if "vis" not in name}


def test_parameters_outside_the_layers_are_first_order_under_a_scheme():
    split = LayerAssignment("dual", "hop-odd").split(TwoTowers())
    assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} <= set(split.fo)


def test_every_trainable_parameter_lands_in_exactly_one_part():
    model = TwoTowers()
    model.text_projection.weight.requires_grad_(False)
    split = LayerAssignment("dual", "hop-even").split(model)
    parts = [*split.fo, *(name for group in split.zo for name in group.names)]
    assert sorted(parts) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_groups_know_the_eps_of_their_branch():
    split = LayerAssignment("dual", "all").split(TwoTowers(), {"vision": 0.01, "language": 0.1, None: 0.1})
    assert {group.branch: group.eps for group in split.zo} == {"vision": 0.01, "language": 0.1, None: 0.1}


def test_regular_expressions_choose_by_parameter_name():
    split = LayerAssignment("dual", [r"encoder\.layers\.0\.", r"^logit_scale$"]).split(TwoTowers())
    assert {name for group in split.zo for name in group.names} == {
        "vision_model.encoder.layers.0.weight",
        "vision_model.encoder.layers.0.bias",
        "text_model.encoder.layers.0.weight",
        "text_model.encoder.layers.0.bias",
        "logit_scale",
    }


def test_a_model_with_one_tower_is_dual():
    assert zo_layers(LayerAssignment("dual", "hop-odd"), _tower(5)) == {None: [1, 3, 5]}


def stack_of(make, depth: int) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(depth))


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


class EncoderDecoder(nn.Module):
    """Named as a T5 is: six layers and two, each of several parts, and a head."""

    def __init__(self):
        super().__init__()
        for name, depth in (("encoder", 6), ("decoder", 2)):
            half = nn.Module()
            half.block = stack_of(lambda: nn.ModuleDict({"layer": stack_of(linear, 2)}), depth)
            setattr(self, name, half)
        self.lm_head = linear()


def chosen(model: nn.Module, layers: str) -> set[str]:
    """The stacks and layers, as they stand in the names of what is zeroth-order."""
    split = LayerAssignment("dual", layers).split(model)
    return {".".join(name.split(".")[:3]) for group in split.zo for name in group.names}


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    [
        ("suffix-1", [5], [1]),
        ("suffix-2", [4, 5], [0, 1]),
        ("prefix-1", [0], [0]),
        ("hop-even", [1, 3, 5], [1]),
        ("hop-odd", [0, 2, 4], [0]),
        ([2], [1], [1]),
    ],
)
def test_layers_are_counted_stack_by_stack(layers, encoder, decoder):
    expected = {f"encoder.block.{i}" for i in encoder} | {f"decoder.block.{i}" for i in decoder}
    assert chosen(EncoderDecoder(), layers) == expected


@pytest.mark.parametrize("layers", ["prefix-3", "suffix-3", [1, 3]])
def test_layers_beyond_a_stack_name_it(layers):
    with pytest.raises(ValueError, match="beyond decoder.block in the model, which has 2 layers"):
        LayerAssignment("dual", layers).split(EncoderDecoder())


def test_a_stack_in_which_nothing_is_trained_sets_no_limit():
    model = EncoderDecoder()
    model.decoder.requires_grad_(False)
    assert chosen(model, "prefix-3") == {f"encoder.block.{i}" for i in range(3)}
    assert {group.stack for group in LayerAssignment("dual", "prefix-3").split(model).zo} == {None}


def test_stacks_are_drawn_and_logged_apart():
    split = LayerAssignment("dual", "hop-even").split(EncoderDecoder())
    assert split.describe() == {
        "model": {"other": "fo"},
        "decoder.block": {"1": "fo", "2": "zo"},
        "encoder.block": {str(i): "zo" if i % 2 == 0 else "fo" for i in range(1, 7)},
    }
    assert {group.label for group in split.zo} == {"decoder.block.2", *(f"encoder.block.{i}" for i in (2, 4, 6))}


def staged(path: str) -> nn.Module:
    """Two stages of three blocks; in `path` S is the number of a stage (S1: from 1), B that of a block."""
    model = nn.Module()
    for stage in range(2):
        for block in range(3):
            numbered = path.replace("S1", str(stage + 1)).replace("S", str(stage)).replace("B", str(block))
            *parents, last = numbered.split(".")
            module = model
            for name in parents:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module._modules[name]
            module.add_module(last, linear())
    return model


@pytest.mark.parametrize(
    "path",
    [
        "encoder.layers.S.blocks.B.mlp",  # Swin
        "encoder.stages.S.layers.B.layer.0.convolution",  # ConvNeXt, ResNet, RegNet, Hiera
        "encoder.block.S.B.mlp",  # PVT
        "encoder.blocks.S.B.ffn",  # Funnel
        "levels.S.layers.B.mlp",  # NAT
        "layerS1.B.conv1",  # torchvision's and timm's ResNet
    ],
)
def test_in_a_model_of_stages_the_layers_are_the_stages(path):
    model = staged(path)
    names = [name for name, _ in model.named_parameters()]
    assert LayerAssignment("dual", "hop-even").split(model).describe() == {"model": {"1": "fo", "2": "zo"}}
    split = LayerAssignment("dual", "suffix-1").split(model)
    assert [name for group in split.zo for name in group.names] == names[len(names) // 2 :]
    with pytest.raises(ValueError, match="beyond the model, which has 2 layers"):
        LayerAssignment("dual", "prefix-3").split(model)


def test_none_leaves_everything_first_order():
    split = LayerAssignment("none").split(TwoTowers())
    assert split.zo == ()
    assert len(split.fo) == len(list(TwoTowers().parameters()))


def test_describe_draws_the_towers_layer_by_layer():
    towers = LayerAssignment("language", "hop-odd").split(TwoTowers()).describe()
    assert towers["language"] == {"other": "fo", "1": "zo", "2": "fo", "3": "zo", "4": "fo"}
    assert set(towers["vision"].values()) == {"fo"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip.base_model.model.vision_model.encoder.layers.3.self_attn.q_proj.lora_A.default.weight", ("vision", 4)),
        ("bert.encoder.layer.0.output.dense.weight", (None, 1)),
        ("transformer.h.11.attn.c_attn.weight", (None, 12)),
        ("text_projection.weight", ("language", None)),
        ("classifier.0.weight", (None, None)),
    ],
)
def test_locate_reads_tower_and_layer_off_a_name(name, expected):
    assert locate(name) == expected


@pytest.mark.parametrize("layers", ["hop", "prefix-0", "suffix-", "prefix", ""])
def test_an_unknown_scheme_is_named(layers):
    with pytest.raises(ValueError, match="zo_layers=.*hop-odd"):
        LayerAssignment("dual", layers)


def test_an_unknown_branch_is_named():
    with pytest.raises(ValueError, match="zo_branch='visual'.*none, vision, language, dual"):
        LayerAssignment("visual")


@pytest.mark.parametrize("layers", ["prefix-5", "suffix-5", [1, 5]])
def test_layers_beyond_the_model_name_its_depth(layers):
    with pytest.raises(ValueError, match="language tower, which has 4 layers"):
        LayerAssignment("dual", layers).split(TwoTowers())


@pytest.mark.parametrize("layers", [[], [0], [1, "a"], ["("], 3])
def test_a_bad_list_is_refused(layers):
    with pytest.raises(ValueError, match="zo_layers"):
        LayerAssignment("dual", layers)


@pytest.mark.parametrize("eps", [0.0, -1e-3, float("nan")])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match=r"zo_eps \(vision\)=.*greater than 0"):
        LayerAssignment().split(TwoTowers(), {"vision": eps, "language": 1e-3, None: 1e-3})


def test_no_match_lists_what_was_there():
    with pytest.raises(ValueError, match=r"matches no trainable parameter.*no tower.*1, 2, 3"):
        LayerAssignment("vision", "all").split(_tower(3))


def test_a_frozen_model_says_so():
    model = TwoTowers().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        LayerAssignment("dual", "all").split(model)


def test_complex_parameters_are_refused_where_they_would_be_zeroth_order():
    """A direction is real: the imaginary part would never move."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.filter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="filter is complex"):
        LayerAssignment("dual", "all").split(model)
    assert "filter" in LayerAssignment("dual", ["0.weight"]).split(model).fo


def test_an_expression_that_matches_nothing_is_refused():
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match="'head' matches no trainable parameter. Of tied weights .* one name"):
        LayerAssignment("dual", ["embedding", "head"]).split(model)
