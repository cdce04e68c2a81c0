"""Checks of a stranger's checkpoint: its files may hold only known keys, plain names and finite numbers.

transformers and PEFT follow what such files name: other repositories, classes to import, kernels to fetch, expressions
to match module names with, sizes to allocate. All of that is refused here, by name, before anything is done with it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, ProcessorMixin
from transformers.activations import ACT2FN

from ..checks import shown
from ..files import read_json, room_error
from .checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .task_info import is_number


PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

# A name of a module, layer or token, or a part of one: no path, no repository, no expression.
PLAIN = re.compile(r"[\w.:-]{0,200}")
REVISION = re.compile(r"[\w./-]{0,200}")
LEADS_ELSEWHERE = re.compile(
    r"auto_map|custom_\w+|_?\w*attn_implementation\w*|experts_implementation|\w*kernel\w*|quantization_config"
    r"|_?configuration_files?|transformers_weights|trust_remote_code|adapters?|megatron_config"
    r"|prompt_tuning_init_state_dict_path|audio_tokenizer|\w*_processor_class|pretrained_model\w*"
)
OWN_ATTENTION = (None, "eager", "sdpa")  # implemented in transformers itself
GREATEST = 2**31
MOST_ITEMS = 100_000
SIZES = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 10_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "projection_dim": 100_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 100_000,
    "image_size": 16_384,
    "patch_size": 16_384,
    "num_channels": 64,
    "r": 2**40,  # a rank that does not fit the weights is refused by their shapes, before any allocation
    "num_experts": 4096,
    "num_routers": 100_000,
}
IMAGE_KEYS = {
    *("crop_size", "size", "resample", "image_mean", "image_std", "rescale_factor"),
    *("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"),
}
# Written by transformers, without effect here.
SILENT_IMAGE_KEYS = {
    *("processor_class", "image_processor_type", "feature_extractor_type", "_valid_processor_keys", "data_format"),
    *("default_to_square", "device", "disable_grouping", "do_pad", "pad_size", "input_data_format", "return_tensors"),
    *("image_seq_length", "use_square_size", "size_divisor"),
}
TOKENIZER_KEYS = {
    *("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "padding_side", "truncation_side"),
}
SILENT_TOKENIZER_KEYS = {
    *("backend", "is_local", "local_files_only", "max_length", "pad_to_multiple_of", "pad_token_type_id", "stride"),
    *("processor_class", "tokenizer_class", "truncation_strategy", "add_prefix_space", "added_tokens_decoder"),
    *("clean_up_tokenization_spaces", "do_lower_case", "errors", "extra_special_tokens", "model_input_names"),
    *("name_or_path", "special_tokens_map_file", "additional_special_tokens", "_commit_hash"),
    *("add_bos_token", "add_eos_token"),
}


def check_known(content: Any, where: str, plain: bool = False) -> None:
    """Check the content of a JSON file of a model or an adapter.

    Args:
        content: The content.
        where: The content's name in errors.
        plain: Whether every text must be a plain name.

    Raises:
        ValueError: If a key names code, another repository or a path; if a number is not finite or larger than in any
            model; or if a text that must be a plain name is none.
    """
    if isinstance(content, dict):
        _check_count(content, where)
        for key, value in content.items():
            if not PLAIN.fullmatch(key) and plain:
                raise ValueError(f"{where}: {shown(key)} is not allowed in a checkpoint: it is not a plain name.")
            if LEADS_ELSEWHERE.fullmatch(key) and value and value not in OWN_ATTENTION:
                raise ValueError(
                    f"{where}: {key}={shown(value)} is not allowed in a checkpoint: it points outside it."
                )
            if key in SIZES and isinstance(value, int) and not 0 <= value <= SIZES[key]:
                raise ValueError(f"{where}: {key}={shown(value)} is not allowed: expected 0 to {SIZES[key]}.")
            check_known(value, f"{where}: {key}", plain)
    elif isinstance(content, list):
        _check_count(content, where)
        for value in content:
            check_known(value, where, plain)
    elif isinstance(content, str):
        if plain and not PLAIN.fullmatch(content):
            raise ValueError(f"{where}={shown(content)} is not allowed in a checkpoint: expected a plain name.")
    elif isinstance(content, float) and not math.isfinite(content):
        raise ValueError(f"{where}={content}: expected a finite number.")
    elif isinstance(content, int) and abs(content) > 2**63:
        raise ValueError(f"{where}={shown(content)}: expected a number of at most 64 bits.")


def check_adapter_config(content: dict[str, Any], where: str) -> None:
    """Check a PEFT configuration: modules must be named one by one, not by an expression.

    Raises:
        ValueError: As `check_known`.
    """
    named = {"base_model_name_or_path", "revision"}  # checked where they are used
    check_known({key: value for key, value in content.items() if key not in named}, where, plain=True)
    revision = content.get("revision")
    if revision is not None and not (isinstance(revision, str) and REVISION.fullmatch(revision)):
        raise ValueError(f"{where}: revision={shown(revision)} is not allowed: expected the name of a revision.")
    mapping = content.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library is not None and not str(library).startswith("transformers."):
        raise ValueError(f"{where}: auto_mapping={shown(mapping)} is not allowed: expected a class of transformers.")


def check_model_config(content: dict[str, Any], where: str) -> None:
    """Check the configuration of a CLIP model before a model is made of it.

    Raises:
        ValueError: As `check_known`, or if it is of another kind of model, or an activation is unknown.
    """
    check_known(content, where)
    if (kind := content.get("model_type", "clip")) != "clip":
        raise ValueError(f"{where}: model_type={shown(kind)}: expected a CLIP model, clip.")
    for tower in (content, *(content.get(f"{name}_config") for name in ("text", "vision"))):
        activation = tower.get("hidden_act") if isinstance(tower, dict) else None
        if activation is not None and (not isinstance(activation, str) or activation not in ACT2FN):
            raise ValueError(f"{where}: hidden_act={shown(activation)} is not an activation of transformers.")


def read_processor(folder: Path, vocabulary: int) -> CLIPProcessor:
    """A checkpoint's processor, built from its known parts: CLIP's image processor and CLIP's tokenizer.

    `AutoProcessor` would build whatever the files name, and follow them to other repositories.

    Args:
        folder: The checkpoint's folder.
        vocabulary: How many tokens the model knows.

    Raises:
        ValueError: If a file is missing, or says anything that these two parts do not know.
    """
    return CLIPProcessor(image_processor=_read_image_processor(folder), tokenizer=_read_tokenizer(folder, vocabulary))


def check_processor(processor: ProcessorMixin, vocabulary: int, texts: Sequence[str]) -> None:
    """Check that `read_processor` would give back a processor that is saved in a checkpoint.

    Args:
        processor: The run's processor.
        vocabulary: How many tokens the model knows.
        texts: Prompts whose tokens must stay the same.

    Raises:
        ValueError: As `read_processor`, or if the tokens differ.
        OSError: If there is no room for a temporary copy.
    """
    what = "with the base model's processor no checkpoint could be loaded again"
    with saved_on_trial(processor.save_pretrained, what) as folder:
        read = read_processor(folder, vocabulary)
    for text in texts:
        ours, theirs = (each.tokenizer(text)["input_ids"] for each in (processor, read))
        if ours != theirs:
            raise ValueError(f"{what}: {shown(text)} has the tokens {shown(ours)}; expected CLIP's, {shown(theirs)}.")


@contextmanager
def saved_on_trial(save: Callable[[Path], Any], what: str) -> Iterator[Path]:
    """Save a part of a checkpoint into a temporary folder; errors about it begin with `what`.

    Raises:
        OSError: If there is no room for it.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            save(folder)
        except Exception as error:  # tokenizers has no error class of its own for a full disk
            cause = room_error(folder, error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, name) from error
        try:
            yield folder
        except ValueError as error:
            reason = str(error).replace(f"{folder}/", "")
            raise ValueError(f"{what}: {reason}") from error


def check_finite(tensors: dict[str, torch.Tensor], what: str) -> None:
    """Check that no weight is infinite or NaN, because a model with such weights would still name a class.

    Raises:
        ValueError: If a weight is.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{what} is damaged: {name} holds values that are infinite or NaN.")


def check_adapter(folder: Path, clip_config: CLIPConfig, config: PeftConfig) -> None:
    """Compare the adapter's tensors with those that its base model expects, before either is loaded.

    Raises:
        ValueError: If the tensors cannot be read, are damaged, or have other names or shapes.
    """
    file = folder / ADAPTER_WEIGHTS
    with refusing(f"{file} is damaged: it cannot be read as safetensors"), safe_open(file, framework="pt") as tensors:
        found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    with refusing(f"{folder / ADAPTER_CONFIG} does not fit its base model"), torch.device("meta"):
        model = PeftModel(CLIPModel(clip_config), copy.deepcopy(config))
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if found == expected:
        check_finite(load_file(file), str(file))
        return
    name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    raise ValueError(
        f"{file} does not belong here: {name} has the shape {found.get(name, 'none')}, where its base model and "
        f"{ADAPTER_CONFIG} have {expected.get(name, 'none')}."
    )


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any error that transformers, PEFT or tokenizers raise over a file into one that says where."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())}).") from error


def _read_image_processor(folder: Path) -> CLIPImageProcessor:
    file, content = folder / PROCESSOR, {}
    if file.is_file():
        outer = read_json(file)
        _refuse_unknown(outer, {"image_processor", "processor_class", *IMAGE_KEYS, *SILENT_IMAGE_KEYS}, file)
        if (kind := outer.get("processor_class", "CLIPProcessor")) != "CLIPProcessor":
            raise ValueError(f"{file}: processor_class={shown(kind)}: expected CLIPProcessor.")
        content = outer.get("image_processor", {})
    if not content:
        file = folder / IMAGE_PROCESSOR
        content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: image_processor={shown(content)}: expected an object.")
    check_known(content, str(file), plain=True)
    _refuse_unknown(content, IMAGE_KEYS | SILENT_IMAGE_KEYS, file)
    kind = content.get("image_processor_type", content.get("feature_extractor_type", "CLIPImageProcessor"))
    if not re.fullmatch(r"CLIP(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(kind)):
        raise ValueError(f"{file}: image_processor_type={shown(kind)}: expected CLIP's.")
    options = {key: value for key, value in content.items() if key in IMAGE_KEYS}
    for key, value in options.items():
        if problem := _image_problem(key, value):
            raise ValueError(f"{file}: {key}={shown(value)}: expected {problem}.")
    return CLIPImageProcessor(**options)


def _image_problem(key: str, value: Any) -> str | None:
    """The values that an image processor's option may have, as text; None if its value is one of them."""
    if key.startswith("do_"):
        return None if isinstance(value, bool) or value is None else "true or false"
    if key in ("size", "crop_size"):
        sides = value.values() if isinstance(value, dict) else [value]
        keys = set(value) if isinstance(value, dict) else set()
        is_right = keys <= {"height", "width", "shortest_edge", "longest_edge"} and all(
            side is None or (isinstance(side, int) and 1 <= side <= SIZES["image_size"]) for side in sides
        )
        return None if is_right else f"sides from 1 to {SIZES['image_size']}"
    if key in ("image_mean", "image_std"):
        least = 0 if key == "image_mean" else 1e-6
        values = value if isinstance(value, list) else [value]
        is_right = len(values) in (1, 3) and all(is_number(one) and least <= one <= 1e6 for one in values)
        return None if is_right or value is None else f"numbers from {least} to 1e6, one per channel"
    if key == "resample":
        return None if value is None or (isinstance(value, int) and 0 <= value <= 5) else "a Pillow filter's number"
    return None if is_number(value) and 0 < value <= 1e6 else "a number greater than 0"


def _read_tokenizer(folder: Path, vocabulary: int) -> CLIPTokenizer:
    file = folder / TOKENIZER
    content, config = read_json(file), read_json(folder / TOKENIZER_CONFIG)
    kind = config.get("tokenizer_class", "CLIPTokenizer")
    if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise ValueError(f"{folder / TOKENIZER_CONFIG}: tokenizer_class={shown(kind)}: expected CLIPTokenizer.")
    _refuse_unknown(config, TOKENIZER_KEYS | SILENT_TOKENIZER_KEYS, folder / TOKENIZER_CONFIG)
    model = content.get("model")
    vocab, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{file}: its processor cannot be read: expected CLIP's tokenizer, with a vocab and merges.")
    wrong = next((key for key, value in vocab.items() if type(value) is not int or not 0 <= value < vocabulary), None)
    if wrong is not None:
        raise ValueError(
            f"{file} does not belong here: {shown(wrong)} is token {shown(vocab[wrong])} of {vocabulary}."
        )
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    if not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs):
        raise ValueError(f"{file} is damaged: model.merges are not pairs.")
    options = {key: _token(value) for key, value in config.items() if key in TOKENIZER_KEYS and value is not None}
    for key, value in options.items():
        if key == "model_max_length":
            # For a tokenizer without a length, transformers writes a number of thirty digits.
            options[key] = min(value, GREATEST) if is_number(value) and value >= 1 else None
        elif not isinstance(value, str) or (key.endswith("_side") and value not in ("left", "right")):
            raise ValueError(f"{folder / TOKENIZER_CONFIG}: {key}={shown(value)}: expected a token or a side.")
    options = {key: value for key, value in options.items() if value is not None}
    with refusing(f"{file}: its processor cannot be read"):
        tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs, **options)
    if max(tokenizer.all_special_ids, default=0) >= vocabulary:
        raise ValueError(
            f"{folder / TOKENIZER_CONFIG} does not belong here: the model does not know its special tokens."
        )
    return tokenizer


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _refuse_unknown(content: dict[str, Any], known: set[str], file: Path) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        value = shown(content[unknown[0]])
        raise ValueError(
            f"{file}: {shown(unknown[0])}={value} is not allowed in a checkpoint: hf_zocl writes no such key."
        )


def _check_count(content: dict | list, where: str) -> None:
    if len(content) > MOST_ITEMS:
        raise ValueError(f"{where} has {len(content)} entries; expected {MOST_ITEMS} at most.")
