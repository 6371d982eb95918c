import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.layers import ShapeSpec

from ccnet_d2.errors import UserError
from ccnet_d2.inference import MultiScaleFlip, SlidingWindow, WholeClip, WholeImage
from ccnet_d2.inference.label_bands import LabelBands, labels_of
from ccnet_d2.modeling import CCNet, CCNetHead, PlainConvNet


def as_input(image, height=None, width=None):
    return [{"image": image, "height": height or image.shape[-2], "width": width or image.shape[-1]}]


def test_a_mode_from_a_lazy_config_gets_its_model_later(tmp_path, make_segmenter, random_image):
    file = tmp_path / "run.py"
    file.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from ccnet_d2.inference import MultiScaleFlip, SlidingWindow\n"
        "test = dict(inference=L(MultiScaleFlip)(model=L(SlidingWindow)(tile=[20, 16]), scales=[1.0, 1.5]))\n"
    )
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(file)), ["test.inference.model.tile=[24,24]"])
    mode = instantiate(cfg.test.inference)
    assert mode.model.tile == (24, 24)
    model, inputs = make_segmenter(), as_input(random_image(30, 30))
    bound = mode.bind(model)
    expected = MultiScaleFlip(SlidingWindow(model, tile=24), scales=[1, 1.5])(inputs)[0]["sem_seg"]
    assert torch.equal(bound(inputs)[0]["sem_seg"], expected)


def test_binding_leaves_the_original_without_a_model(make_segmenter, random_image):
    mode = MultiScaleFlip(SlidingWindow(tile=16))
    first, second = mode.bind(make_segmenter()), mode.bind(make_segmenter(7))
    assert mode.model.model is None
    assert first.model.model is not second.model.model
    assert len(list(mode.parameters())) == 0 < len(list(first.parameters()))
    rebound = first.bind(second.model.model)
    assert rebound.model.model is second.model.model
    with pytest.raises(RuntimeError, match="SlidingWindow has no model"):
        mode(as_input(random_image(8, 8)))


def test_evaluation_by_detectron2_leaves_the_models_training_flag(make_segmenter, random_image):
    class Collect(DatasetEvaluator):
        def reset(self):
            self.seen = []

        def process(self, inputs, outputs):
            self.seen += [output["sem_seg"].shape for output in outputs]

    evaluator = Collect()
    loader = [as_input(random_image(20, 30)), as_input(random_image(9, 9), 12, 12)]
    for training in (True, False):
        model = make_segmenter().train(training)
        inference_on_dataset(SlidingWindow(tile=16).bind(model), loader, evaluator)
        assert model.training is training
        assert evaluator.seen == [(5, 20, 30), (5, 12, 12)]


def test_height_and_width_may_be_missing_or_none(make_segmenter, random_image):
    mode = SlidingWindow(make_segmenter(), tile=16)
    image = random_image(20, 30)
    for item in ({"image": image}, {"image": image, "height": None, "width": None}):
        assert mode([item])[0]["sem_seg"].shape == (5, 20, 30)


def test_several_images_of_a_batch(make_segmenter, random_image):
    model = make_segmenter()
    batch = as_input(random_image(20, 30, seed=1)) + as_input(random_image(20, 30, seed=2))
    for mode in (WholeImage(model), SlidingWindow(model, tile=16), MultiScaleFlip(model, scales=[1])):
        together = mode(batch)
        assert torch.allclose(together[1]["sem_seg"], mode(batch[1:])[0]["sem_seg"], atol=1e-6)
    assert WholeImage(model)([]) == []


def test_an_image_s_answer_does_not_depend_on_those_beside_it(random_image):
    torch.manual_seed(0)
    model = CCNet(
        backbone=PlainConvNet(channels=[8], strides=[2], norm="BN"),
        sem_seg_head=CCNetHead(
            {"conv": ShapeSpec(channels=8, stride=2)},
            in_feature="conv",
            num_classes=5,
            channels=8,
            norm="BN",
            aux_feature=None,
        ),
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
    ).eval()
    torch.nn.init.ones_(model.sem_seg_head.context.gamma)
    batch = [as_input(random_image(*size))[0] for size in ((12, 20), (24, 16), (12, 20))]
    for mode in (
        WholeImage(model),
        WholeClip(model),
        SlidingWindow(model, tile=10),
        MultiScaleFlip(model, scales=[1]),
    ):
        for item, together in zip(batch, mode(batch), strict=True):
            torch.testing.assert_close(together["sem_seg"], mode([item])[0]["sem_seg"])


def test_no_gradient_is_recorded(make_segmenter, random_image):
    for mode in (WholeImage(), SlidingWindow(tile=16), MultiScaleFlip(scales=[1])):
        answer = mode.bind(make_segmenter())(as_input(random_image(20, 20)))
        assert not answer[0]["sem_seg"].requires_grad


def test_a_model_in_training_mode_is_pointed_out(random_image):
    with pytest.raises(RuntimeError, match="is it in training mode"):
        WholeImage(lambda inputs: {"loss": torch.zeros(())})(as_input(random_image(4, 4)))
    with pytest.raises(RuntimeError, match=r"where \(K, 4, 4\) was due"):
        WholeImage(lambda inputs: [{"sem_seg": torch.zeros(2, 3, 4)}])(as_input(random_image(4, 4)))


def test_a_model_without_semantic_segmentation_is_told(random_image):
    with pytest.raises(UserError, match="gives 'instances', but no 'sem_seg'"):
        WholeImage(lambda inputs: [{"instances": ["a person"]}])(as_input(random_image(4, 4)))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("out_size", [(40, 61), (7, 5), (23, 31), (1, 1), (23, 90)])
@pytest.mark.parametrize("rows_at_once", [None, 1, 3])
def test_label_bands_equal_the_argmax_of_the_whole_resize(monkeypatch, align_corners, out_size, rows_at_once):
    if rows_at_once:
        chunk = rows_at_once * 6 * max(31, out_size[1])
        monkeypatch.setattr("ccnet_d2.inference.label_bands._CHUNK_ELEMENTS", chunk)
    torch.manual_seed(1)
    logits = torch.randn(6, 23, 31)
    bands = LabelBands((23, 31), out_size, align_corners=align_corners)
    for part in logits.split([1, 1, 9, 0, 5, 7], dim=1):
        bands.push(part)
    resized = torch.nn.functional.interpolate(
        logits[None].double(), out_size, mode="bilinear", align_corners=align_corners
    )[0]
    different = bands.labels.long() != resized.argmax(0)
    top_two = resized.topk(2, dim=0).values
    assert (top_two[0] - top_two[1])[different].le(1e-5).all()
    assert bands.labels.dtype == torch.uint8


def test_label_bands_want_all_rows_and_no_more():
    bands = LabelBands((4, 4), (8, 8))
    bands.push(torch.zeros(2, 3, 4))
    with pytest.raises(RuntimeError, match="only 3 of 4 rows"):
        _ = bands.labels
    with pytest.raises(ValueError, match="do not fit"):
        bands.push(torch.zeros(2, 2, 4))


def test_labels_of_many_rows_are_taken_in_pieces(monkeypatch):
    import ccnet_d2.inference.label_bands as module

    logits = torch.randn(3, 50, 7)
    whole = labels_of(logits)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 50)
    assert torch.equal(labels_of(logits), whole)
    assert torch.equal(whole.long(), logits.argmax(0))


def test_whole_labels_equal_the_models_own_resize(make_segmenter, random_image):
    """A model that resizes in two steps (its size, then the answer's) as Detectron2's do."""

    class TwoSteps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_segmenter()

        def forward(self, inputs):
            out = []
            for item in inputs:
                size = item["image"].shape[-2:]
                full = self.inner(as_input(item["image"], *size))[0]["sem_seg"]
                answer = (item["height"], item["width"])
                out.append(
                    {"sem_seg": torch.nn.functional.interpolate(full[None], answer, mode="bilinear")[0]}
                )
            return out

    inputs = as_input(random_image(20, 30), 55, 47)
    mode = WholeImage(TwoSteps())
    logits = mode(inputs)[0]["sem_seg"]
    different = mode.predict_labels(inputs)[0].long() != logits.argmax(0)
    top_two = logits.topk(2, dim=0).values
    assert (top_two[0] - top_two[1])[different].le(1e-5).all()


def test_lazy_call_of_every_mode():
    for node in (L(WholeImage)(), L(SlidingWindow)(tile=32, stride=[16, 8]), L(MultiScaleFlip)(scales=[1])):
        assert instantiate(node).model is None
