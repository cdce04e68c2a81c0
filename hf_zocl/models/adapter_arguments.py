"""`AdapterArguments`: an adapter by the name of its PEFT method, and the PEFT configuration made from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PromptLearningConfig

from ..checks import check_fields, check_type
from .moe_adapter.config import PEFT_TYPE as MOE  # this import registers the method


# Upper limits: more would only fill the memory.
SIZES = {"lora_rank": 16384, "moe_num_experts": 4096, "moe_top_k": 4096}
# A method's arguments that have names of their own here, by their names in PEFT's configuration.
OWN_ARGUMENTS = {
    "lora": {
        "r": "lora_rank",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "target_modules": "target_modules",
    },
    "moe": {
        "num_experts": "moe_num_experts",
        "top_k": "moe_top_k",
        "dropout": "moe_dropout",
        "noise": "moe_noise",
        "num_routers": "moe_router_per_task",
    },
}


@dataclass
class AdapterArguments:
    """The adapter and its shape.

    Args:
        adapter: The PEFT method by its name: `lora`, `moe`, `vera`, `fourierft`, `ln_tuning`, … Methods that add
            virtual tokens (prompt tuning and its kin) do not work with a CLIP.
        adapter_config: What else the method's PEFT configuration takes, besides the arguments below: a mapping, or
            JSON. For `moe`, for example, `bottleneck`, `router_token` or `layers_to_transform` (`MoEAdapterConfig`);
            for methods other than `lora` and `moe`, all of it, including `target_modules`.
        target_modules: Names of the linear layers that get LoRA, in both towers.
        lora_rank: The rank r.
        lora_alpha: The scale is α/r.
        lora_dropout: Dropout on LoRA's input.
        moe_num_experts: Experts in parallel to the MLP of every block. The defaults are those of MoE-Adapters4CL,
            which has 2.
        moe_top_k: Experts that an example is sent to.
        moe_dropout: Dropout on an expert's hidden units.
        moe_noise: Whether the router is noisy in training.
        moe_router_per_task: A router for every task, instead of one for all.
        frozen_parameters: Regular expressions: adapter parameters whose names match stay as they were drawn. With
            `lora_A`, only B is trained (LoRA-FA, Zhang et al. 2023); with `down` and `routers`, only the experts'
            second layers. A factor has no effect while the other one is zero, and only adds noise to zeroth-order
            steps.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of its range, or PEFT has no such method or refuses its configuration.
    """

    adapter: str = field(default="lora", metadata={"help": "PEFT method of the trainable units: lora, moe, vera, …"})
    adapter_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More of the method's PEFT configuration, as a mapping or JSON."}
    )
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear layers that carry LoRA."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(default=16.0, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on LoRA's input."})
    moe_num_experts: int = field(default=2, metadata={"help": "Experts of a block."})
    moe_top_k: int = field(default=2, metadata={"help": "Experts that an example is sent to."})
    moe_dropout: float = field(default=0.1, metadata={"help": "Dropout on an expert's hidden units."})
    moe_noise: bool = field(default=True, metadata={"help": "Whether the router is noisy in training."})
    moe_router_per_task: bool = field(default=False, metadata={"help": "A router for every task."})
    frozen_parameters: list[str] | None = field(
        default=None, metadata={"help": "Adapter parameters to leave untrained, by regular expression: lora_A."}
    )

    def __post_init__(self):
        for name in ("target_modules", "frozen_parameters"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        check_fields(self, but=["adapter_config"])
        self.adapter_config = _mapping(self.adapter_config)
        for name, most in SIZES.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name}={value}: expected at least 1 and at most {most}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: expected a probability, 0 or more and less than 1.")
        for pattern in self.frozen_parameters or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"frozen_parameters={pattern!r} is not a regular expression: {error}.") from error
        peft_config(self)


def _mapping(given: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"adapter_config={given!r} is not JSON: {error}.") from error
    if given is None:
        return None
    check_type("adapter_config", given, Mapping, "a mapping of names to values, or JSON of one")
    return dict(cast("Mapping[str, Any]", given))


def config_class(adapter: str) -> type[PeftConfig]:
    """The configuration class of a PEFT method.

    Raises:
        ValueError: If PEFT has no such method, or a CLIP cannot carry it.
    """
    classes = {_plain(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    known = {name: cls for name, cls in classes.items() if not issubclass(cls, PromptLearningConfig)}
    if adapter not in known:
        reason = "adds virtual tokens, which a CLIP model does not accept" if adapter in classes else "is unknown"
        raise ValueError(f"adapter={adapter!r} {reason}: expected one of lora, moe, {', '.join(sorted(known))}.")
    return known[adapter]


def peft_config(args: AdapterArguments, num_tasks: int = 1) -> PeftConfig:
    """The PEFT configuration that the arguments describe.

    Args:
        args: The arguments.
        num_tasks: The length of the stream, for an adapter with parts for every task.

    Raises:
        ValueError: If PEFT has no such method, or its configuration does not take these values.
    """
    cls, own = config_class(args.adapter), OWN_ARGUMENTS.get(args.adapter, {})
    more = cast("dict[str, Any]", args.adapter_config or {})
    options = _options(cls)
    for name in more:
        if name in own:
            raise ValueError(f"adapter_config has {name!r}, which has its own argument: {own[name]}.")
        if name not in options:
            raise ValueError(
                f"adapter_config has {name!r}, which {cls.__name__} does not accept: expected some of "
                f"{', '.join(each for each in options if each not in own)}."
            )
    given = {name: getattr(args, argument) for name, argument in own.items()}
    if "num_routers" in given:
        given["num_routers"] = num_tasks if args.moe_router_per_task else 1
    try:
        return cls(**given, **more)
    except (TypeError, ValueError) as error:
        name = re.match(r"\w*", str(error)).group()  # with which our own configuration's errors begin
        placed = own[name] + str(error).removeprefix(name) if name in own else f"adapter_config: {error}"
        raise ValueError(placed) from error


def _options(cls: type[PeftConfig]) -> dict[str, Any]:
    """The defaults of a configuration's own fields, by name."""
    common = {each.name for each in fields(PeftConfig)}
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(cls)
        if each.init and each.name not in common
    }


def adapter_name(config: PeftConfig) -> str:
    """The PEFT method of `config`, as `AdapterArguments.adapter` names it."""
    return _plain(config.peft_type.value)


def _plain(peft_type: str) -> str:
    return "moe" if peft_type == MOE else str(peft_type).lower()


def adapter_arguments(config: PeftConfig) -> dict[str, Any]:
    """The `AdapterArguments` that would make this adapter's shape."""
    name = adapter_name(config)
    own = OWN_ARGUMENTS.get(name, {})
    found = {argument: _listed(getattr(config, each)) for each, argument in own.items()}
    if name == "lora" and isinstance(found["target_modules"], str):
        found["target_modules"] = [found["target_modules"]]
    if name == "moe":
        found["moe_router_per_task"] = config.num_routers > 1
    defaults = {each: default for each, default in _options(type(config)).items() if each not in own}
    more = {k: v for k, v in configured(config, defaults).items() if v != _listed(defaults[k]) and _is_plain(v)}
    return {"adapter": name, **found, "adapter_config": more or None}


def configured(config: PeftConfig, names: Iterable[str]) -> dict[str, Any]:
    """A configuration's values for these names, as a recipe writes them; None where it has none."""
    return {name: _listed(getattr(config, name, None)) for name in names}


def _listed(value: Any) -> Any:
    """A value as a recipe writes it: sets, which have no order, become sorted lists."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _is_plain(value: Any) -> bool:
    """True if a recipe can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
