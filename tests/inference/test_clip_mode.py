import pytest
import torch

from ccnet_d2.errors import UserError
from ccnet_d2.inference import MODE_NAMES, WholeClip, WholeImage, build_mode


class PerFrame(torch.nn.Module):
    """A model of clips without context: what the 2D segmenter says of each frame."""

    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batched_inputs):
        (item,) = batched_inputs
        rest = {key: item[key] for key in ("height", "width")}
        if item["image"].dim() == 3:
            return self.segmenter([item])
        answers = self.segmenter([{"image": image, **rest} for image in item["image"]])
        return [{"sem_seg": torch.stack([answer["sem_seg"] for answer in answers])}]


def test_clips_and_images_go_to_the_model_as_they_are(make_segmenter, random_image):
    segmenter = make_segmenter()
    clip = torch.stack([random_image(14, 18, seed) for seed in range(3)])
    mode = WholeClip().bind(PerFrame(segmenter))
    found, alone = mode(
        [{"image": clip, "height": 20, "width": 30}, {"image": clip[0], "height": 20, "width": 30}]
    )
    assert found["sem_seg"].shape == (3, 5, 20, 30) and not found["sem_seg"].requires_grad
    for frame, logits in zip(clip, found["sem_seg"], strict=True):
        expected = WholeImage(segmenter)([{"image": frame, "height": 20, "width": 30}])[0]["sem_seg"]
        torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(alone["sem_seg"], found["sem_seg"][0])


def test_a_model_that_does_not_answer_for_every_frame_is_refused(make_segmenter, random_image):
    clip = torch.stack([random_image(8, 8), random_image(8, 8)])

    class First(torch.nn.Module):
        def forward(self, batched_inputs):
            return self.answer

    for answer, found in (
        ([{"sem_seg": torch.zeros(1, 5, 8, 8)}], r"\(1, 5, 8, 8\)"),
        ([{"sem_seg": torch.zeros(2, 8, 8)}], r"\(2, 8, 8\)"),
        ([{"sem_seg": torch.zeros(5, 8, 8)}] * 2, "list"),  # an image's answer for each frame
    ):
        model = First()
        model.answer = answer
        with pytest.raises(RuntimeError, match=f"First answered a clip of 2 frames with {found}"):
            WholeClip(model)([{"image": clip, "height": 8, "width": 8}])
    with pytest.raises(RuntimeError, match="WholeClip has no model"):
        WholeClip()([{"image": clip, "height": 8, "width": 8}])


def test_a_clip_that_does_not_fit_into_memory_is_one_sentence():
    class Large(torch.nn.Module):
        def forward(self, batched_inputs):
            return torch.empty(1 << 60)  # the allocator's own error

    item = {"image": torch.zeros(5, 3, 8, 9), "height": 8, "width": 9}
    with pytest.raises(
        UserError, match="a clip of 5 frames of 9x8 does not fit into memory: take shorter clips"
    ):
        WholeClip(Large())([item])

    class Broken(torch.nn.Module):
        def forward(self, batched_inputs):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        WholeClip(Broken())([item])


@pytest.mark.parametrize("name", MODE_NAMES)
def test_a_clip_in_a_mode_of_images_is_one_sentence(name, make_segmenter, random_image):
    """As with `--eval-only test.inference=ms` for a run on clips."""
    clip = {"image": torch.stack([random_image(14, 18)] * 3), "height": 14, "width": 18}
    mode = build_mode(name).bind(PerFrame(make_segmenter()))
    for call in (mode, mode.predict_labels):
        with pytest.raises(
            UserError, match="a clip of 3 frames cannot be tested in a mode for single images"
        ):
            call([clip])
