from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from hf_zocl.models import AdapterArguments, CLIPClassifier, add_adapter
from hf_zocl.sample import sample_path
from tests.helpers import CLASSES, image_batch, mini_clip_classifier


@pytest.fixture(scope="module")
def classifier() -> CLIPClassifier:
    return mini_clip_classifier()


def test_logits_are_those_of_the_clip_model(classifier):
    batch = image_batch()
    tokens = classifier.tokenizer(
        [f"a photo of a {c}." for c in classifier.class_names], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = classifier.clip(**tokens, pixel_values=batch["pixel_values"]).logits_per_image
        output = classifier.eval()(**batch)
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, batch["labels"]))


def test_a_clip_without_an_adapter_is_a_classifier_too(classifier):
    model = CLIPClassifier(CLIPModel.from_pretrained(sample_path("mini-clip")), classifier.tokenizer, ["cat", "dog"])
    assert model.train()(**image_batch(classes=2)).loss.isfinite()
    model.begin_task(1)
    model.end_task(1)
    assert model.extra_logs() == {}
    assert not model.couples_towers


def test_prompts_are_padded_to_their_own_longest(classifier):
    classifier.set_classes(["cat", "great white shark"])
    longest = max(len(classifier.tokenizer(f"a photo of a {c}.").input_ids) for c in classifier.class_names)
    assert classifier.input_ids.shape == (2, longest)
    classifier.set_classes(["cat", "dog", "ship"])


def test_padding_does_not_change_the_features(classifier):
    classifier.eval()
    with torch.no_grad():
        classifier.set_classes(["cat"])
        alone = classifier.encode("language")[0]
        classifier.set_classes(["cat", "great white shark"])
        padded = classifier.encode("language")[0]
    classifier.set_classes(["cat", "dog", "ship"])
    torch.testing.assert_close(alone, padded, rtol=1e-5, atol=1e-6)


def test_set_classes_changes_the_number_of_logits(classifier):
    classifier.set_classes(["a", "b", "c", "d", "e"])
    assert classifier.eval()(image_batch()["pixel_values"]).logits.shape == (8, 5)
    classifier.set_classes(["cat", "dog", "ship"])


def count_text_passes(classifier, monkeypatch) -> list:
    calls = []
    original = classifier.clip.get_text_features
    monkeypatch.setattr(classifier.clip, "get_text_features", lambda **kw: calls.append(1) or original(**kw))
    return calls


def test_text_features_are_cached_in_evaluation(classifier, monkeypatch):
    calls = count_text_passes(classifier, monkeypatch)
    classifier.eval()
    with torch.no_grad():
        for _ in range(3):
            classifier(**image_batch())
    assert len(calls) == 1


def test_the_cache_notices_new_weights_new_classes_and_training(classifier, monkeypatch):
    calls = count_text_passes(classifier, monkeypatch)
    classifier.eval()
    with torch.no_grad():
        classifier(**image_batch())
        next(p for n, p in classifier.named_parameters() if "lora_B" in n and "text" in n).add_(0.01)
        changed = classifier(**image_batch()).logits
        classifier.set_classes(["cat", "dog", "ship"])
        classifier(**image_batch())
        classifier.train()
        classifier(**image_batch())
        classifier.eval()
        torch.testing.assert_close(classifier(**image_batch()).logits, changed)
    assert len(calls) == 5


def test_the_cache_notices_a_disabled_adapter(classifier):
    classifier.eval()
    with torch.no_grad():
        adapted = classifier(**image_batch()).logits
        with classifier.clip.disable_adapter():
            base = classifier(**image_batch()).logits
        torch.testing.assert_close(classifier(**image_batch()).logits, adapted)
        classifier._clear_text_cache()
        with classifier.clip.disable_adapter():
            torch.testing.assert_close(classifier(**image_batch()).logits, base)
    assert not torch.equal(adapted, base)


def test_the_loss_comes_first(classifier):
    output = classifier.eval()(**image_batch())
    assert output[0] is output.loss


def test_evaluation_returns_loss_and_logits_alone(classifier):
    with torch.no_grad():
        assert set(classifier.eval()(**image_batch())) == {"loss", "logits"}


def test_the_adapters_parameters_alone_are_trainable(classifier):
    trainable = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert {name.split(".")[3] for name in trainable} == {"vision_model", "text_model"}


def test_rank_alpha_and_target_modules_are_arguments():
    model = mini_clip_classifier(lora_rank=2, lora_alpha=6.0, target_modules=["fc1"])
    config = model.clip.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (2, 6.0, {"fc1"})
    assert {n.split("lora_")[0].split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"fc1"}


@pytest.mark.parametrize(
    ("adapter", "patterns", "left"), [("lora", ["lora_A"], {"lora_B"}), ("moe", ["down", "routers"], {"up"})]
)
def test_frozen_parameters_stay_as_they_were_drawn(adapter, patterns, left):
    arguments = AdapterArguments(adapter=adapter, frozen_parameters=patterns)
    model = add_adapter(CLIPModel.from_pretrained(sample_path("mini-clip")), arguments)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(any(part in name for part in left) for name in trainable)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [(["lora_C"], "'lora_C' freezes no parameters"), (["lora_A", "lora_B"], "'lora_B' freezes all parameters")],
)
def test_patterns_that_freeze_none_or_all_are_refused(patterns, message):
    clip = CLIPModel.from_pretrained(sample_path("mini-clip"))
    with pytest.raises(ValueError, match=message):
        add_adapter(clip, AdapterArguments(frozen_parameters=patterns))


def test_predict_gives_names_and_probabilities(classifier):
    names, probabilities = classifier.predict(image_batch()["pixel_values"])
    assert probabilities.shape == (8, 3)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(8))
    assert names == [classifier.class_names[i] for i in probabilities.argmax(dim=-1)]


@pytest.mark.parametrize("template", ["a photo", "a {} and {}"])
def test_a_template_without_one_place_for_the_name_is_refused(classifier, template):
    with pytest.raises(ValueError, match=f"prompt_template='{template}'"):
        CLIPClassifier(classifier.clip, classifier.tokenizer, ["cat"], template)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "lorra"}, "adapter='lorra'.* lora, moe"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"frozen_parameters": "lora_(A"}, r"frozen_parameters='lora_\(A' is not a regular expression"),
    ],
)
def test_bad_adapter_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterArguments(**options)


def test_several_prompts_are_averaged_class_by_class_as_features_of_unit_length(classifier):
    prompts = ("a photo of a {}.", "a sketch of a {}.", "a {}.")
    classifier.eval()
    with torch.no_grad():
        each = []
        for prompt in prompts:
            classifier.set_classes(["cat", "dog"], prompt)
            each.append(classifier.encode("language"))
        classifier.set_classes(["cat", "dog"], prompts)
        together = classifier.encode("language")
    classifier.set_classes(["cat", "dog", "ship"])
    torch.testing.assert_close(together, F.normalize(sum(each) / 3, dim=-1), rtol=1e-5, atol=1e-6)


def test_a_list_of_one_prompt_is_that_prompt_to_the_last_bit(classifier):
    classifier.eval()
    batch = image_batch()
    with torch.no_grad():
        classifier.set_classes(["cat", "dog"])
        one = classifier(batch["pixel_values"]).logits
        classifier.set_classes(["cat", "dog"], ["a photo of a {}."])
        other = classifier(batch["pixel_values"]).logits
    classifier.set_classes(["cat", "dog", "ship"])
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("template", "message"), [("a photo", "'a photo'"), ((), "is empty"), (("a {}.", "{} {}"), "'{} {}'")]
)
def test_a_prompt_without_its_one_place_for_the_name_is_an_error(classifier, template, message):
    with pytest.raises(ValueError, match=f"prompt_template.*{message}"):
        classifier.set_classes(["cat"], template)


@pytest.mark.parametrize(
    ("names", "template", "message"),
    [
        (["Apple", "apple"], "a photo of a {}.", "'Apple' and 'apple'.* have the same prompt"),
        (["cat", "hot dog", "hot  dog"], "a photo of a {}.", "numbers 1 and 2.*does not tell them apart"),
        (["café", "cafe\u0301"], "a photo of a {}.", "have the same prompt"),
        ([" cat", "cat"], "{}", "have the same prompt"),
        (["a very long name " * 20 + end for end in ("cat", "dog")], "{}", "differ only beyond the 32 tokens"),
        (["cat", "dog"], "a photo of a {{}}.", "expected one '{}'"),
        (["cat", "dog"], "a {} of {kind}", "and no other brace"),
        (["cat", "dog"], ["a {}.", "a very long prompt " * 20 + "{}"], "differ only beyond"),
        ([], "a {}.", "class_names is empty"),
        (["cat", "\ud800"], "a {}.", "half a character"),
    ],
)
def test_classes_that_the_model_cannot_tell_apart_are_refused_by_name(names, template, message):
    model = mini_clip_classifier()
    before = model.input_ids
    with pytest.raises(ValueError, match=message):
        model.set_classes(names, template)
    assert model.input_ids is before and model.class_names == CLASSES


@pytest.mark.parametrize("names", ["cat", [1, 2], None])
def test_class_names_of_a_wrong_type_are_a_type_error_that_says_so(names):
    with pytest.raises(TypeError, match="class_names.*: expected"):
        mini_clip_classifier().set_classes(names)


@pytest.mark.parametrize(("size", "kind"), [(-1, ValueError), (0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_batch_size_that_is_none_is_refused(size, kind):
    with pytest.raises(kind, match=f"batch_size={size}: expected a whole number from 1"):
        mini_clip_classifier().predict(torch.zeros(1, 3, 32, 32), batch_size=size)


def test_predicting_encodes_the_prompts_once_until_something_changes(monkeypatch):
    model = mini_clip_classifier().eval()
    images, encoded = torch.randn(2, 3, 32, 32), []
    original = type(model)._encode_prompts
    monkeypatch.setattr(type(model), "_encode_prompts", lambda self: encoded.append(1) or original(self))
    first = model.predict(images)[1]
    assert torch.equal(model.predict(images)[1], first) and len(encoded) == 1
    changes = [
        lambda: model.set_classes(["horse", "frog"]),
        lambda: next(p for p in model.parameters() if p.requires_grad).add_(0),
        model.eval,
        lambda: model.clip.merge_adapter(),
        lambda: model.clip.unmerge_adapter(),
    ]
    for number, change in enumerate(changes, start=2):
        with torch.no_grad():
            change()
        model.predict(images)
        assert len(encoded) == number


def test_many_prompts_are_encoded_some_at_a_time(monkeypatch):
    names = [f"thing number {number}" for number in range(50)]
    model = mini_clip_classifier(names).eval()
    model.set_classes(names, ["a {}.", "the {}."])
    whole = model.predict(torch.zeros(1, 3, 32, 32))[1]
    sizes = []
    original = type(model)._text_features
    monkeypatch.setattr("hf_zocl.models.clip_classifier.PROMPTS_AT_ONCE", 16)
    monkeypatch.setattr(
        type(model), "_text_features", lambda self, ids, mask: sizes.append(len(ids)) or original(self, ids, mask)
    )
    model.eval()
    torch.testing.assert_close(model.predict(torch.zeros(1, 3, 32, 32))[1], whole)
    assert sizes == [16] * 6 + [4]


def test_threads_predict_at_once_while_the_classes_change():
    model = mini_clip_classifier().eval()
    model.image_processor = None
    images = torch.randn(2, 3, 32, 32)
    lists = [("cat", "dog"), ("horse", "frog", "ship")]
    expected = {}
    for names in lists:
        model.set_classes(names)
        expected[len(names)] = model.predict(images)

    def work(number: int) -> bool:
        if number % 3 == 0:
            model.set_classes(lists[number % 2])
        found, probabilities = model.predict(images)
        names, wanted = expected[probabilities.shape[1]]
        return found == names and torch.allclose(probabilities, wanted, atol=1e-6)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(60)))
