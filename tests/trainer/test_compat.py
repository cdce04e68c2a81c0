"""Private names of transformers, accelerate and datasets: each is there, is what is thought, and stays here."""

import ast
import inspect
import pkgutil
import re
import textwrap
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft.tuners.tuners_utils import BaseTuner
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState

import hf_zocl
from hf_zocl.trainer import compat

from .test_trainer import Mlp, rows


PACKAGE = Path(hf_zocl.__file__).parent
# Where private names of other packages may stand, and of which package: of torch's and transformers' lowest names, of
# the Trainer's, accelerate's and datasets', and of PEFT's.
HOMES = {"private_names.py", "trainer/compat.py", "models/moe_adapter/model.py", "models/moe_adapter/layer.py"}
HOMES |= {"models/placement.py"}
# Of a named tuple, these are public: the underscore keeps them apart from its fields.
PUBLIC = {"_replace", "_asdict", "_fields", "_make"}
# What a metric of evaluate is to define.
PUBLIC |= {"_info", "_compute"}


class Recorder(compat.HookedTrainer):
    """Notes which of its hooks are called, and when."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    @compat.contextmanager
    def _saving_checkpoint(self, folder):
        self.calls.append(("saving", folder.name))
        yield
        self.calls.append(("saved", folder.name))

    def _before_state(self, folder):
        self.calls.append(
            ("before", (folder / "model.safetensors").is_file(), (folder / "trainer_state.json").exists())
        )

    def _after_state(self, folder):
        self.calls.append(("after", (folder / "trainer_state.json").is_file()))

    def _has_epoch(self):
        self.calls.append(("epoch", self.state.global_step))
        return True

    def _accepts(self, load_result):
        self.calls.append(("loaded", load_result.missing_keys))
        return True

    def _before_wrapping(self, model):
        self.calls.append(("wrapping", model is self.model))
        return model


def trainer(tmp_path, cls=Recorder, **options):
    from transformers import TrainingArguments

    args = TrainingArguments(
        tmp_path / "out", max_steps=3, per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
        use_cpu=True, logging_steps=2, save_steps=3, **options,
    )  # fmt: skip
    return cls(model=Mlp(), args=args, train_dataset=rows())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    it = trainer(tmp_path_factory.mktemp("trained"))
    it.train()
    return it


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_save_rng_state", ["self", "output_dir"]),
        ("_issue_warnings_after_load", ["self", "load_result"]),
        ("_wrap_model", ["self", "model", "training", "dataloader"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_run_epoch", None),  # takes what it is given, as it is given
        ("_move_model_to_device", ["self", "model", "device"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
        ("create_accelerator_and_postprocess", ["self"]),
    ],
)
def test_the_trainer_has_the_method(name, parameters):
    method = getattr(Trainer, name, None)
    assert callable(method), f"transformers has no Trainer.{name} any more"
    assert parameters in (None, list(inspect.signature(method).parameters)), name
    assert name in vars(compat.HookedTrainer) or name == "_get_output_dir"


@pytest.mark.parametrize(
    "name", ["_tr_loss", "_globalstep_last_logged", "_total_loss_scalar", "is_fsdp_enabled", "is_deepspeed_enabled",
             "loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "compute_loss_func", "callback_handler",
             "current_gradient_accumulation_steps"],
)  # fmt: skip
def test_a_trainer_has_the_attribute(trained, name):
    assert hasattr(trained, name), f"transformers has no Trainer.{name} any more"


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (TrainerState, "save_to_json"),
        (BatchSamplerShard, "__init__"),
        (accelerate.Accelerator, "scaler"),
        (accelerate.Accelerator, "verify_device_map"),
        (DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model"),
        (DistributedDataParallel, "_sync_buffers"),
        (DistributedDataParallel, "will_sync_module_buffers"),
        (BaseTuner, "inject_adapter"),
        (BaseTuner, "_create_and_replace"),
    ],
)
def test_a_class_has_the_name(cls, name):
    own = {**vars(cls), **vars(accelerate.Accelerator())} if cls is accelerate.Accelerator else vars(cls)
    assert name in own, f"{cls.__name__}.{name} is no more"


def test_hooks_are_called_once_each_in_their_order(trained):
    assert trained.calls == [
        ("wrapping", True),
        ("epoch", 0),
        ("saving", "checkpoint-3"),
        ("before", True, False),
        ("after", True),
        ("saved", "checkpoint-3"),
    ]
    assert "save_to_json" not in vars(trained.state)


def test_a_load_is_judged_before_the_training_goes_on(trained):
    again = trainer(Path(trained.args.output_dir).parent, save_strategy="no")
    again.train(resume_from_checkpoint=str(Path(trained.args.output_dir) / "checkpoint-3"))
    assert again.calls[0] == ("loaded", [])


def test_losses_not_yet_logged_are_read_and_given_back(tmp_path):
    losses = []

    class Watches(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            losses.append((float(compat.pending_loss(it)), compat.last_logged_step(it)))

    class Earlier(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            compat.continue_logging(it, -2, torch.tensor(8.0))

    it = trainer(tmp_path, save_strategy="no")
    it.add_callback(Watches())
    it.train()
    assert losses[1][0] > losses[0][0] > 0 and losses[2][0] < losses[1][0]
    assert [step for _, step in losses] == [0, 0, 2]
    train_loss, two = it.state.log_history[-1]["train_loss"], losses[1][0]
    torch.manual_seed(0)
    it = trainer(tmp_path / "earlier", save_strategy="no")
    it.add_callback(Earlier())
    it.train()
    assert it.state.log_history[0]["loss"] == pytest.approx((8 + two) / 4)
    assert it.state.log_history[-1]["train_loss"] == pytest.approx(train_loss)  # the 8 are none of this call's


def test_a_loss_is_scaled_as_training_step_scales_it(trained):
    def told(**attributes):
        unset = {"loss_is_scaled_for_ga": None, "model_accepts_loss_kwargs": False, "compute_loss_func": None}
        return SimpleNamespace(**unset | attributes)

    assert not compat.scales_loss(told(), 3)
    assert compat.scales_loss(told(model_accepts_loss_kwargs=True), 3)
    assert not compat.scales_loss(told(model_accepts_loss_kwargs=True), None)
    assert compat.scales_loss(told(compute_loss_func=print), None) and compat.asks_for_items(told(compute_loss_func=1))
    assert compat.scales_loss(told(loss_is_scaled_for_ga=True), None)
    source = inspect.getsource(Trainer.training_step)
    for name in ("loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "compute_loss_func"):
        assert name in source, f"Trainer.training_step no longer goes by {name}"
    assert compat.accumulated_batches(trained) == 1 and not compat.is_sharded(trained)


def test_a_callback_is_put_before_all_others(trained):
    callback = TrainerCallback()
    compat.put_first(trained, callback)
    assert trained.callback_handler.callbacks[0] is callback
    trained.remove_callback(callback)


def test_the_share_of_a_process_is_found_in_the_loader_in_use(trained):
    shard = BatchSamplerShard(BatchSampler(SequentialSampler(range(8)), 2, False), num_processes=2)
    loader, trained.callback_handler.train_dataloader = trained.callback_handler.train_dataloader, None
    assert compat.training_shard(trained) is None
    trained.callback_handler.train_dataloader = type("Loader", (), {"batch_sampler": shard})()
    assert compat.training_shard(trained) is shard
    assert (shard.num_processes, shard.batch_size, shard.drop_last, shard.split_batches) == (2, 2, False, False)
    trained.callback_handler.train_dataloader = loader


def test_a_prepared_model_is_prepared_anew(trained):
    accelerator, model = accelerate.Accelerator(), torch.nn.Linear(2, 2)
    assert compat.gradient_scaler(accelerator) is None
    accelerator.prepare_model(model, evaluation_mode=True)
    assert model._is_accelerate_prepared, "accelerate no longer marks a model by _is_accelerate_prepared"
    assert accelerator.prepare(model) is model and accelerator._models.count(model) == 1
    compat.forget_prepared(accelerator, model)
    accelerator.prepare(model)
    assert accelerator._models.count(model) == 2  # it has gone through the whole of it again


def test_a_datasets_rows_and_its_name_are_told():
    data = datasets.Dataset.from_dict({"x": [10, 11, 12, 13]})
    chosen = data.select([3, 1])
    assert compat.rows_in_table(data) is None
    assert compat.rows_in_table(chosen).to_pylist() == [3, 1]
    assert compat.dataset_fingerprint(data) != compat.dataset_fingerprint(data.map(lambda row: {"x": 1}))
    assert compat.dataset_fingerprint(data) == compat.dataset_fingerprint(datasets.Dataset.from_dict(data.to_dict()))


# The rule.


def foreign_private_names(source: str, own: set[str]) -> set[str]:
    """The private names of other packages' objects that a module uses: attributes, arguments, imports, patches."""
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and not (node.module or "").startswith("hf_zocl"):
            imported |= {alias.asname or alias.name for alias in node.names}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "__future__":
            found |= {alias.name for alias in node.names} | set(node.module.split("."))
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in imported:
                    found.add(f"_ {ast.unparse(target)} is patched")
    return {name for name in found if name.startswith("_") and not name.endswith("__")} - own - PUBLIC


def own_names(paths) -> set[str]:
    """The private names that modules give themselves: functions, classes, fields, and what they set on `self`."""
    own = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                own.add(node.attr)
    return own


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def elsewhere() -> dict[str, Path]:
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in paths.items() if name not in HOMES}


def test_no_other_file_uses_a_private_name_of_another_package():
    files = elsewhere()
    own = own_names([*files.values(), PACKAGE / "trainer/compat.py"]) - foreign_overrides(compat.HookedTrainer)
    found = {name: foreign_private_names(path.read_text(encoding="utf-8"), own) for name, path in files.items()}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("trainer._tr_loss.item()", "_tr_loss"),
        ("self._get_output_dir(None)", "_get_output_dir"),
        ("getattr(config, '_attn_implementation', None)", "_attn_implementation"),
        ("from torch.utils._pytree import tree_leaves", "_pytree"),
        ("from accelerate.utils import _private", "_private"),
        ("shadowed(module, _compiled_call_impl=None)", "_compiled_call_impl"),
        ("import torch\ntorch.autocast.__enter__ = None", "_ torch.autocast.__enter__ is patched"),
        ("from transformers import Trainer\nTrainer.log = print", "_ Trainer.log is patched"),
    ],
)
def test_a_planted_one_is_caught(planted, name):
    assert name in foreign_private_names(planted, own={"_mine"})
    assert foreign_private_names("self._mine = trainer._mine", own={"_mine"}) == set()


def foreign_overrides(cls: type) -> set[str]:
    """The private names that a class has from this package, and one of its bases of another package uses, too."""
    own = set(vars(cls)) | set(re.findall(r"self\.(_\w+)\b[^=(\n]* = ", source_of(cls)))
    taken = set()
    for base in cls.__mro__[1:]:
        if not base.__module__.startswith(("hf_zocl", "builtins", "abc", "typing")):
            taken |= set(vars(base)) | set(re.findall(r"self\.(_\w+)", source_of(base)))
    return {name for name in own & taken if name.startswith("_") and not name.endswith("__")} - {"_abc_impl"} - PUBLIC


def source_of(cls: type) -> str:
    try:
        return textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # built in, or made by a decorator
        return ""


@pytest.mark.slow
def test_no_other_class_overrides_a_private_name_of_its_bases():
    found = {}
    for module in pkgutil.walk_packages(hf_zocl.__path__, "hf_zocl."):
        path = module.name.removeprefix("hf_zocl.").replace(".", "/") + ".py"
        needs_extra = module.name == "hf_zocl.demo.page" and find_spec("gradio") is None
        if module.name == "hf_zocl.__main__" or path in HOMES or needs_extra:
            continue
        for cls in vars(import_module(module.name)).values():
            if inspect.isclass(cls) and cls.__module__ == module.name and (names := foreign_overrides(cls)):
                found[f"{module.name}.{cls.__name__}"] = names
    assert found == {}


def test_a_planted_override_is_caught():
    class Planted(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            self._tr_loss = None

    assert foreign_overrides(Planted) == {"_save", "_tr_loss"}
    assert {"_save_checkpoint", "_run_epoch", "_wrap_model"} <= foreign_overrides(compat.HookedTrainer)
