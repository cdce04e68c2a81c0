"""Damaged and foreign checkpoints: each is refused with one clear error, or means what it meant before."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from hf_zocl import load_task_checkpoint
from hf_zocl.hub import seal_task_checkpoint
from hf_zocl.sample import sample_path
from tests.helpers import image_batch
from tests.hub.checkpoints import change_json, save_checkpoint


# Every file that loading reads; hypothesis chooses among them.
FILES = (
    "task.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def unsealed(original, tmp_path_factory) -> Path:
    """The same as the first release wrote it, without checksums."""
    folder = tmp_path_factory.mktemp("old") / "task-03"
    shutil.copytree(original, folder)
    task = json.loads((folder / "task.json").read_text())
    task = {name: value for name, value in task.items() if name not in ("files", "sha256")}
    (folder / "task.json").write_text(json.dumps({**task, "format_version": 1}, indent=2))
    return folder


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "task-03"))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_task_checkpoint(folder)[0](image_batch()["pixel_values"]).logits


@pytest.fixture(scope="module")
def expected(original) -> torch.Tensor:
    return logits(original)


@st.composite
def mutations(draw):
    """A file's name, and a function from its bytes to other bytes."""
    name = draw(st.sampled_from(FILES))
    where = draw(st.floats(0, 1, exclude_max=True))
    kind = draw(st.sampled_from(["truncate", "flip", "overwrite", "insert", "delete", "repeat", "other file"]))
    bit, junk, length = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=8)), draw(st.integers(1, 64))
    other = draw(st.sampled_from(FILES))

    def mutate(content: bytes, folder: Path) -> bytes:
        at = int(where * len(content))
        return {
            "truncate": lambda: content[:at],
            "flip": lambda: content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :],
            "overwrite": lambda: content[:at] + junk + content[at + len(junk) :],
            "insert": lambda: content[:at] + junk + content[at:],
            "delete": lambda: content[:at] + content[at + length :],
            "repeat": lambda: content[:at] + content[at : at + length] + content[at:],
            "other file": lambda: (folder / other).read_bytes(),
        }[kind]()

    return name, mutate


@pytest.fixture
def put_back(request):
    """Damages one file of a folder, and mends it after."""

    def damage(folder: Path, name: str, mutate):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(mutate(before, folder))
        return before

    return damage


@pytest.mark.slow
@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutation=mutations())
@example(mutation=("task.json", lambda content, _: content.replace(b"\n", b"\n ")))
@example(mutation=("task.json", lambda content, _: content.replace(b'"format_version": 2', b'"format_version": 1')))
@example(mutation=("task.json", lambda content, _: content.replace(b'"sha256"', b'"sha257"')))
@example(mutation=("task.json", lambda content, _: content.replace(b'"dog"', b'"fog"')))
@example(mutation=("task.json", lambda content, _: b"[" * 100_000))
def test_a_mutated_checkpoint_is_refused_by_name_or_means_the_same(original, expected, put_back, mutation):
    name, mutate = mutation
    before = put_back(original, name, mutate)
    try:
        assert torch.equal(logits(original), expected)
    except ValueError as error:
        assert name in str(error)
        assert "\n" not in str(error)
    finally:
        (original / name).write_bytes(before)


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutation=mutations())
def test_without_checksums_a_mutated_checkpoint_loads_or_is_refused_with_one_error(unsealed, put_back, mutation):
    name, mutate = mutation
    before = put_back(unsealed, name, mutate)
    try:
        logits(unsealed)
    except ValueError as error:
        assert str(unsealed) in str(error)
    finally:
        (unsealed / name).write_bytes(before)


def resave(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop_one(folder: Path) -> None:
    resave(folder, lambda tensors: tensors.pop(min(tensors)))


def add_one(folder: Path) -> None:
    resave(folder, lambda tensors: tensors.update(another=torch.zeros(2)))


def of_another_base_model(folder: Path) -> None:
    resave(folder, lambda tensors: tensors.update({min(tensors): torch.zeros(8, 512)}))


def of_another_rank(folder: Path) -> None:
    change_json(folder / "adapter_config.json", r=4)


def of_a_rank_beyond_memory(folder: Path) -> None:
    change_json(folder / "adapter_config.json", r=10**12)


def of_another_kind(folder: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(CLIPModel.from_pretrained(sample_path("mini-clip")), config).save_pretrained(folder)


def of_an_unknown_kind(folder: Path) -> None:
    change_json(folder / "adapter_config.json", peft_type="SORCERY")


def that_imports_a_module(folder: Path) -> None:
    change_json(folder / "adapter_config.json", megatron_config={"x": 1}, megatron_core="os")


def with_a_header_without_end(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def with_a_huge_header(folder: Path) -> None:
    header = b'{"a":' + b" " * 2**20 + b"}"
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def that_is_no_checkpoint(folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
    shutil.copyfile(sample_path("mini-clip") / "model.safetensors", folder / "model.safetensors")


def with_a_whole_model_as_its_adapter(folder: Path) -> None:
    shutil.copyfile(sample_path("mini-clip") / "model.safetensors", folder / "adapter_model.safetensors")


def with_a_prompt_that_reaches_into_objects(folder: Path) -> None:
    change_json(folder / "task.json", prompt_template="a {} {0.__class__}")


def with_a_tokenizer_of_nothing(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, r"adapter_model\.safetensors does not belong here: .* has the shape none"),
        (add_one, r"adapter_model\.safetensors does not belong here: another has the shape \(2,\), .* have none"),
        (
            of_another_base_model,
            r"adapter_model\.safetensors does not belong here: .* shape \(8, 512\), .* have \(8, 1\d\d\)",
        ),
        (
            of_another_rank,
            r"adapter_model\.safetensors does not belong here: .* shape \(8, 1\d\d\), .* have \(4, 1\d\d\)",
        ),
        (of_a_rank_beyond_memory, r"adapter_model\.safetensors does not belong here|does not fit its base model"),
        (of_another_kind, r"adapter_config\.json does not belong here: its adapter is 'ia3', expected 'lora'"),
        (of_an_unknown_kind, r"adapter_config\.json is damaged: .*SORCERY"),
        (that_imports_a_module, r"adapter_config\.json: megatron_config=.* is not allowed"),
        (with_a_header_without_end, r"adapter_model\.safetensors is damaged: it cannot be read as safetensors"),
        (with_a_huge_header, r"adapter_model\.safetensors is damaged: it cannot be read as safetensors"),
        (that_is_no_checkpoint, r"adapter_config\.json is missing"),
        (with_a_whole_model_as_its_adapter, r"adapter_model\.safetensors does not belong here"),
        (with_a_prompt_that_reaches_into_objects, r"task\.json is damaged: expected prompt_template"),
        (with_a_tokenizer_of_nothing, r"its processor cannot be read"),
    ],
)
def test_a_foreign_checkpoint_is_refused_though_its_checksums_are_right(checkpoint, change, message):
    change(checkpoint)
    if (checkpoint / "adapter_config.json").exists():
        seal_task_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=message) as error:
        load_task_checkpoint(checkpoint)
    assert str(checkpoint) in str(error.value)


def test_a_base_model_of_another_shape_is_refused_before_its_weights_are_read(checkpoint, tmp_path):
    config = CLIPConfig.from_pretrained(sample_path("mini-clip"))
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 96, 128
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors does not belong here: .*vision_model.* have \(8, 96\)"
    ):
        load_task_checkpoint(checkpoint, base_model=tmp_path / "base")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "clip", "vision_config": {"hidden_size": "wide"}}'),
        ("model.safetensors", b"not a tensor"),
    ],
)
def test_a_damaged_base_model_is_refused_by_name(checkpoint, tmp_path, name, content):
    base = Path(shutil.copytree(sample_path("mini-clip"), tmp_path / "base"))
    (base / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"the base model '.*base' cannot be read"):
        load_task_checkpoint(checkpoint, base_model=base)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "task.json"])
def test_a_link_out_of_the_folder_is_refused(checkpoint, tmp_path, name):
    shutil.move(checkpoint / name, tmp_path / name)
    (checkpoint / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} does not belong here: it is a link out of the checkpoint's folder"):
        load_task_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["vocab.json", "preprocessor_config.json", "model.safetensors"])
def test_a_file_that_was_added_is_refused(checkpoint, name):
    (checkpoint / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} does not belong here: task.json does not list it"):
        load_task_checkpoint(checkpoint)


def test_files_that_are_not_loaded_may_change(checkpoint, expected):
    (checkpoint / "README.md").write_text("another card")
    (checkpoint / "notes.json").write_text("{}")
    assert torch.equal(logits(checkpoint), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", ["cat", 3]),
        ("classes", []),
        ("task", True),
        ("task", 0),
        ("task_sizes", [2, 2]),
        ("task_sizes", [2, 2, 3]),
        ("prompt_template", "a photo"),
        ("prompt_template", []),
        ("metrics", {}),
        ("zero_shot", {"seen_accuracy": [0.5]}),
        ("assignment", {"branch": "dual", "layers": "all", "towers": {"vision": {"1": "magic"}}}),
        ("seconds", "long"),
        ("files", {"../../evil": {"bytes": 1, "sha256": 2}}),
        ("format_version", 3),
    ],
)
def test_a_task_file_of_a_wrong_shape_is_refused_by_the_name_of_the_field(unsealed, tmp_path, name, value):
    folder = Path(shutil.copytree(unsealed, tmp_path / "task-03"))
    change_json(folder / "task.json", **{name: value})
    with pytest.raises(ValueError, match=rf"task\.json.*{name}"):
        load_task_checkpoint(folder)
