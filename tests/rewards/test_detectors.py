"""The detectors behind geneval: tiny networks of the real classes, saved, and loaded by the reward's own code."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit import registry
from rlkit.clauses import Detection, Wanted
from rlkit.errors import PluginError, RewardError
from rlkit.rewards import _detectors
from rlkit.types import Prompt, Unscored

CPU = torch.device("cpu")
NAMES = {0: "dog", 1: "Cat", 2: "mouse"}
LABELS: dict[str, Any] = {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
SURE = 0.6  # of one class, in what is set by hand
ZERO, ANY = Wanted(("dog", "cat", "computer mouse"), 0.0), ("dog", "computer mouse")


def media(n: int = 2) -> Tensor:
    """Wider than high, so that a swap of the sides shows."""
    return torch.rand(n, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def swin(**ends: Any) -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, **ends
    )


def small(heads: int = 2) -> dict[str, int]:
    kinds = ("encoder", "decoder")
    return {f"{one}_{what}": n for one in kinds for what, n in (("ffn_dim", 16), ("attention_heads", heads))}


def logit(share: float) -> float:
    return float(torch.tensor(share).logit())


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It sees five times the same thing: a cat (0.6) in the middle of the left half, half as high as the picture."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = DetrConfig(
        backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1, num_queries=5, **small(), **LABELS
    )
    model = DetrForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.weight.zero_()
        model.class_labels_classifier.bias.copy_(torch.tensor([0.1, SURE, 0.1, 0.2]).log())
        model.bbox_predictor.layers[-1].weight.zero_()
        model.bbox_predictor.layers[-1].bias.copy_(torch.tensor([logit(0.25), 0, 0, logit(0.5)]))
    folder = tmp_path_factory.mktemp("detr")
    model.save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It sees four times a dog (0.6 times how sure the mask is) that fills the picture."""
    pytest.importorskip("scipy")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=swin(out_features=["stage1", "stage2", "stage3", "stage4"]),
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
        **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16),
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=4,
        **LABELS,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    embedder = model.model.transformer_module.decoder.mask_predictor.mask_embedder
    last = [layer for layer in embedder.modules() if isinstance(layer, torch.nn.Linear)][-1]
    pixels = model.model.pixel_level_module.decoder.mask_projection
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.copy_(torch.tensor([SURE, 0.1, 0.1, 0.2]).log())
        for layer in (last, pixels):  # a mask is the product of both, channel by channel: here 32 everywhere
            layer.weight.zero_()
            layer.bias.fill_(1.0)
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("owlv2")
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*letters, *(one + "</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    text = {**tower, **ends, "vocab_size": len(tokens), "max_position_embeddings": 16}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():  # every box the same: its middle and its sides come from the last bias and the grid's
        model.box_head.dense2.weight.zero_()
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoProcessor,
    )
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("grounding_dino")
    words = [f"[unused{i}]" for i in range(1034)]  # the network knows these four by their numbers in BERT
    for place, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}.items():
        words[place] = word
    words[1030:1034] = ["dog", "computer", "mouse", "cat"]
    (folder / "vocab.txt").write_text("\n".join([*words, "[MASK]"]))
    text = {"model_type": "bert", "vocab_size": 1035, "hidden_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    config = GroundingDinoConfig(
        backbone_config=swin(out_indices=[2, 3, 4]),
        text_config=text,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=4,
        max_text_len=16,
        disable_custom_kernels=True,
        **small(),
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    pictures = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    GroundingDinoProcessor(pictures, BertTokenizerFast.from_pretrained(folder)).save_pretrained(folder)
    return folder


def seen(answer: Detection | Unscored) -> Detection:
    assert isinstance(answer, Detection), answer
    return answer


# ------------------------------------------------------------------------------------------- a fixed list of classes


def test_detr_gives_boxes_in_pixels_under_the_names_that_were_asked_for(detr: Path) -> None:
    found, other = _detectors.load("detr", str(detr), CPU)(media(), [ZERO, Wanted(("dog",), 0.0)])
    cats = seen(found)
    assert cats.labels == ("cat",) * 5  # the network spells it Cat
    torch.testing.assert_close(cats.scores, torch.full((5,), SURE))
    torch.testing.assert_close(cats.boxes, torch.tensor([[0.0, 8, 24, 24]]).expand(5, 4))
    assert cats.masks is None
    assert len(seen(other)) == 0


def test_the_least_threshold_of_the_pictures_counts(detr: Path) -> None:
    look = _detectors.load("detr", str(detr), CPU)
    assert [len(seen(one)) for one in look(media(), [Wanted(("cat",), 0.9), Wanted(("cat",), 0.5)])] == [5, 5]
    assert [len(seen(one)) for one in look(media(), [Wanted(("cat",), 0.9)] * 2)] == [0, 0]


def test_classes_that_were_not_taught_are_not_called_absent(detr: Path) -> None:
    wanted = [Wanted(("dog", "zebra"), 0.3), Wanted(("computer mouse", "mouse"), 0.3), Wanted(ANY, 0.3)]
    strange, twice, known = _detectors.load("detr", str(detr), CPU)(media(3), wanted)
    assert strange == Unscored("the detector knows no class 'zebra'")
    assert twice == Unscored("two of the classes computer mouse, mouse are the same to the detector")
    assert isinstance(known, Detection)


def test_numbers_that_are_broken_are_not_an_empty_picture(detr: Path) -> None:
    look = _detectors.load("detr", str(detr), CPU)
    assert isinstance(look, _detectors._Closed)
    look.model.class_labels_classifier.bias[0] = torch.nan
    assert look(media(), [ZERO] * 2) == [_detectors.BROKEN] * 2


def test_a_checkpoint_without_a_head_is_refused(detr: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForObjectDetection

    AutoModelForObjectDetection.from_pretrained(detr).model.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"lacks .* weights"):
        _detectors.load("detr", str(tmp_path), CPU)


def test_mask2former_gives_masks_and_the_boxes_around_them(mask2former: Path) -> None:
    found, none = _detectors.load("mask2former", str(mask2former), CPU)(media(), [ZERO, Wanted(("cat",), 0.0)])
    dogs = seen(found)
    assert dogs.labels == ("dog",) * 4
    torch.testing.assert_close(dogs.scores, torch.full((4,), SURE))
    torch.testing.assert_close(dogs.boxes, torch.tensor([[0.0, 0, 48, 32]]).expand(4, 4))
    assert dogs.masks is not None
    assert dogs.masks.shape == (4, 32, 48)
    assert dogs.masks.all()
    assert len(seen(none)) == 0


def test_mask2former_without_anything_in_the_picture(mask2former: Path) -> None:
    found = seen(_detectors.load("mask2former", str(mask2former), CPU)(media(1), [Wanted(("dog",), 0.9)])[0])
    assert found.masks is not None
    assert (found.boxes.shape, found.masks.shape) == ((0, 4), (0, 32, 48))


def test_without_its_third_party_mask2former_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    message = r"needs 'scipy'.*pip install 'rlkit-visual\[geneval\]'"
    with pytest.raises(PluginError, match=message), registry.importing("rewards", "geneval"):
        _detectors.load("mask2former", "nowhere", CPU)


def test_the_box_around_a_mask() -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 2:4, 1:7] = True
    masks[1, 5, 7] = True
    assert _detectors._around(masks).tolist() == [[1, 2, 7, 4], [7, 5, 8, 6]]
    assert _detectors._around(masks[:0]).shape == (0, 4)


# -------------------------------------------------------------------------------------------- classes by their names


def test_owlv2_measures_in_the_square_that_it_padded(owlv2: Path) -> None:
    look = _detectors.load("owlv2", str(owlv2), CPU)
    assert isinstance(look, _detectors._Open)
    found = seen(look(media(1), [ZERO])[0])
    assert len(found) == 16  # one for each patch of 8 x 8 of 32 x 32
    middles = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    shares = (look.model.box_head.dense2.bias + look.model.box_bias).sigmoid()[:, :2]
    torch.testing.assert_close(middles, shares * 48)  # of the longer side, downwards too
    assert set(found.labels) <= set(ZERO.labels)


def test_what_owlv2_sees(owlv2: Path) -> None:
    processor = SimpleNamespace(size={"height": 96, "width": 96}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    pixels = _detectors._squared(torch.ones(1, 3, 32, 48), processor)
    assert pixels.shape == (1, 3, 96, 96)
    assert (pixels[..., :62, :] == 2).all()
    assert (pixels[..., 66:, :] == -2).all()  # black below


def test_grounding_dino_reads_a_label_from_the_words_of_its_phrase(grounding_dino: Path) -> None:
    """The surest word may be a full stop, and words of two phrases may be sure at once: the processor's own way would
    return what is no label."""
    look = _detectors.load("grounding_dino", str(grounding_dino), CPU)
    assert isinstance(look, _detectors._Open)
    chances = torch.zeros(1, 3, 16)  # [CLS] dog . computer mouse . [SEP]
    chances[0, 0, [1, 2, 3, 4]] = torch.tensor([0.5, 0.95, 0.6, 0.875])
    chances[0, 1, [1, 4]] = torch.tensor([0.75, 0.25])
    chances[0, 2, [1, 4]] = 0.25
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25]]).expand(1, 3, 4)
    model = SimpleNamespace(device=CPU, config=look.model.config)
    answers = SimpleNamespace(logits=chances.logit(), pred_boxes=boxes)
    found = seen(_asked(model, answers, look.processor, ANY, 0.3))
    assert found.labels == ("computer mouse", "dog")
    torch.testing.assert_close(found.scores, torch.tensor([0.875, 0.75]))
    torch.testing.assert_close(found.boxes, torch.tensor([[12.0, 12, 36, 20]]).expand(2, 4))
    assert _asked(model, answers, look.processor, ("dog. cat", "mouse"), 0.3) == Unscored(
        "the detector cannot tell these classes apart: 'dog. cat. mouse.'"
    )
    answers.logits = answers.logits.clone()
    answers.logits[0, 2, 0] = torch.nan
    assert _asked(model, answers, look.processor, ANY, 0.3) == _detectors.BROKEN


def _asked(model: Any, answers: Any, processor: Any, labels: tuple[str, ...], lowest: float) -> Detection | Unscored:
    class Model:
        device, config = model.device, model.config

        def __call__(self, **inputs: Any) -> Any:
            assert inputs["pixel_values"].ndim == 4
            return answers

    (found,) = _detectors._ask_grounding(Model(), processor, media(1), labels, lowest)
    return found


@pytest.mark.parametrize("name", ["owlv2", "grounding_dino"])
def test_pictures_and_their_words_are_answered_each_by_itself(name: str, request: pytest.FixtureRequest) -> None:
    look = _detectors.load(name, str(request.getfixturevalue(name)), CPU)
    wanted = [Wanted(ANY, 0.0), Wanted(("cat",), 0.0), Wanted(ANY, 0.25)]
    together = look(media(3), wanted)
    for row, one in enumerate(wanted):
        alone = seen(look(media(3)[[row]], [one])[0])
        both = seen(together[row]).select([i for i, s in enumerate(seen(together[row]).scores) if s > one.threshold])
        assert both.labels == alone.labels
        assert len(alone) > 0
        torch.testing.assert_close(both.boxes, alone.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(both.scores, alone.scores, atol=1e-4, rtol=1e-4)
    assert set(seen(together[1]).labels) == {"cat"}


# ---------------------------------------------------------------------------------------------------------- shared


def test_a_checkpoint_may_name_its_revision(tmp_path: Path) -> None:
    assert _detectors.checkpoint("owner/name") == ("owner/name", {})
    assert _detectors.checkpoint("owner/name@no_timm") == ("owner/name", {"revision": "no_timm"})
    (tmp_path / "my@folder").mkdir()
    assert _detectors.checkpoint(str(tmp_path / "my@folder")) == (str(tmp_path / "my@folder"), {})


def test_the_whole_reward_with_real_classes(detr: Path, tmp_path: Path, samples_of: Any) -> None:
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 52, "eos_token_id": 53}
    text = {**tower, **ends, "vocab_size": 54, "max_position_embeddings": 77}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    reward = registry.build(
        "rewards", "geneval", {"detector": "detr", "path": str(detr), "colours": str(tmp_path), "score": "graded"}
    )
    cats = {"class": "cat", "count": 5}
    metadata: list[dict[str, Any]] = [{"include": [cats]}, {"include": [{**cats, "count": 1}]}]
    colours = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    metadata += [{"include": [{**cats, "color": colour}]} for colour in (*colours, "mauve")]
    samples = samples_of(
        media(1).expand(len(metadata), 3, 32, 48), [Prompt(i, "", metadata=m) for i, m in enumerate(metadata)]
    )
    values, parts = reward.load(CPU)(samples)
    assert values[:2] == [1, 0]
    assert sorted(values[2:-1]) == [0.5] * 9 + [1]  # the same five cut-outs have one colour
    assert "'mauve' is none of red, orange" in values[-1].reason
    assert parts["colour"][2:-1].sum() == 1


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*letters, *(one + "</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
