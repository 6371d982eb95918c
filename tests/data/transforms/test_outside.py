"""Where transforms fill label maps up."""

import numpy as np
import pytest
from detectron2.data import transforms as T

from ccnet_d2.data.transforms import ScaleCropTransform, outside_of


class Relabel(T.Transform):
    """Gives every pixel of one label another."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def apply_image(self, img):
        return img

    def apply_coords(self, coords):
        return coords

    def apply_segmentation(self, segmentation):
        return np.where(segmentation == self.before, np.uint8(self.after), segmentation)


def test_padding_of_several_transforms_adds_up():
    nested = T.TransformList([T.PadTransform(1, 0, 0, 0), T.TransformList([T.PadTransform(0, 2, 0, 0)])])
    expected = np.ones((5, 5), bool)
    expected[2:, 1:] = False
    np.testing.assert_array_equal(outside_of(nested, 3, 4), expected)


@pytest.mark.parametrize("label_pad_value", [0, 7, 255])
def test_a_transform_that_says_what_it_pads_with_is_left_to_it(label_pad_value):
    crop = ScaleCropTransform(3, 4, 3, 4, 0, 0, 6, 6, label_pad_value=label_pad_value)
    assert not outside_of(crop, 3, 4).any() and crop.label_pad_value == label_pad_value


@pytest.mark.parametrize("before", [1, 255])
def test_labels_that_become_the_first_class_are_not_outside(before):
    padded = outside_of(T.TransformList([Relabel(before, 0), T.PadTransform(0, 0, 2, 0)]), 3, 4)
    assert not padded[:, :4].any() and padded[:, 4:].all()


def test_void_that_becomes_the_first_class_in_a_part_is_not_outside():
    class Half(Relabel):
        def apply_segmentation(self, segmentation):
            return np.concatenate([super().apply_segmentation(segmentation[:1]), segmentation[1:]])

    padded = outside_of(T.TransformList([Half(255, 0), T.PadTransform(0, 0, 2, 0)]), 3, 4)
    assert not padded[:, :4].any() and padded[:, 4:].all()
