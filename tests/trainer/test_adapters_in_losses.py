"""A loss that switches PEFT's adapter off and on again, as those with a reference model do (DPO, KL penalties)."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_zocl import ZOCLTrainer
from tests.helpers import arguments, training_logs


def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4))


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (12,), generator=generator)} for _ in range(16)]


class Referring(ZOCLTrainer):
    """Stays near the base model. `is_by_hand` says that PEFT asks for no gradient meanwhile."""

    is_by_hand = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        required = [parameter.requires_grad for parameter in model.parameters()]
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids).logits.float()
        if self.is_by_hand:
            for parameter, was_required in zip(model.parameters(), required, strict=True):
                parameter.requires_grad_(was_required)
        logits = model(input_ids=ids).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        apart = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean")
        return (loss + 0.1 * apart, None) if return_outputs else loss + 0.1 * apart


@pytest.mark.parametrize(
    "options",
    [{"zo_layers": "all", "bf16": True, "zo_eps": 3e-2}, {"zo_layers": "hop-even", "max_grad_norm": 0.05}],
    ids=["forward passes in bfloat16", "hybrid, clipped"],
)
def test_it_trains_as_if_the_zeroth_order_weights_had_never_asked_for_a_gradient(tmp_path, options):
    logs, weights = [], []
    for by_hand in (False, True):
        model = language_model()
        args = arguments(tmp_path, zo_queries=4, zo_learning_rate=1e-3, use_cpu=True, **options)
        trainer = Referring(model, args, train_dataset=texts())
        trainer.is_by_hand = by_hand
        trainer.train()
        logs.append(
            [{name: log.get(name) for name in ("zo_loss_difference", "grad_norm")} for log in training_logs(trainer)]
        )
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert all(parameter.requires_grad == ("lora" in name) for name, parameter in model.named_parameters())
    assert logs[0] == logs[1] and logs[0][0]["zo_loss_difference"] > 0
    assert torch.equal(*weights)
