"""The evaluator of all runs: against Detectron2's and counts by hand, and what it refuses."""

import math
import re

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from ccnet_d2.data import DatasetError, SampleError, register_sem_seg_folder
from ccnet_d2.evaluation import CheckedSemSegEvaluator, ClipSemSegEvaluator

VOID = 11
CLASSES = ["a", "b", "c", "d"]
SHAPE = (8, 9)


@pytest.fixture
def register(tmp_path, catalogs_as_before):
    """Registers label maps as a data set; gives its records."""

    def register(*labels, name="checked_evaluator_test"):
        for index, label in enumerate(labels):
            for kind, array in (("images", np.zeros((*label.shape, 3), np.uint8)), ("labels", label)):
                (tmp_path / name / kind).mkdir(exist_ok=True, parents=True)
                Image.fromarray(array).save(tmp_path / name / kind / f"{index}.png")
        root = tmp_path / name
        register_sem_seg_folder(name, root / "images", root / "labels", CLASSES, ignore_label=VOID)
        return DatasetCatalog.get(name)

    return register


def drawn(seed, values=(0, 1, 2, 3, VOID)):
    return np.random.default_rng(seed).choice(values, SHAPE).astype(np.uint8)


def logits_of(answer, classes=4):
    return torch.nn.functional.one_hot(torch.from_numpy(answer).long(), classes).permute(2, 0, 1).float()


def evaluate(evaluator, records, answers):
    evaluator.reset()
    for record, answer in zip(records, answers, strict=True):
        evaluator.process([{"file_name": record["file_name"]}], [{"sem_seg": logits_of(answer)}])
    return evaluator.evaluate()["sem_seg"]


def test_numbers_and_names_are_detectron2s(register):
    records = register(drawn(0), drawn(1))
    answers = [drawn(seed, range(4)) for seed in (2, 3)]
    results = evaluate(CheckedSemSegEvaluator("checked_evaluator_test"), records, answers)
    theirs = evaluate(SemSegEvaluator("checked_evaluator_test", distributed=False), records, answers)
    assert list(results)[:4] == ["mIoU", "fwIoU", "mACC", "pACC"]
    assert results == pytest.approx({key: theirs[key] for key in results})


def test_a_class_that_only_the_answers_have_is_not_in_the_mean(register):
    label = np.zeros(SHAPE, np.uint8)
    label[:4] = 1
    answer = label.copy()
    answer[0, 0] = 3  # where the label is "b"
    records = register(label)
    results = evaluate(CheckedSemSegEvaluator("checked_evaluator_test"), records, [answer])
    assert results["mIoU"] == pytest.approx((100 + 100 * 35 / 36) / 2)
    assert results["fwIoU"] == pytest.approx((36 * 100 + 36 * 100 * 35 / 36) / 72)
    assert math.isnan(results["IoU-d"]) and results["pACC"] == pytest.approx(100 * 71 / 72)


def test_a_class_of_a_single_pixel_is_in_the_means(register):
    label = np.zeros(SHAPE, np.uint8)
    label[2, 3] = 2
    records = register(label)
    results = evaluate(CheckedSemSegEvaluator("checked_evaluator_test"), records, [np.zeros(SHAPE, np.uint8)])
    assert results["mACC"] == 50 and results["mIoU"] == pytest.approx(50 * 71 / 72)
    assert results["IoU-c"] == 0 and math.isnan(results["IoU-b"])


@pytest.mark.parametrize("evaluator", [CheckedSemSegEvaluator, ClipSemSegEvaluator])
def test_an_image_without_an_answer_is_not_passed_over(register, evaluator):
    records = register(drawn(0), drawn(1))
    with pytest.raises(ValueError, match="shorter"):
        evaluator("checked_evaluator_test").process(records, [{"sem_seg": logits_of(drawn(2, range(4)))}])


def test_several_data_sets_of_the_same_classes(register):
    one, two = register(drawn(0), name="checked_one"), register(drawn(1), name="checked_two")
    perfect = [np.where(drawn(seed) == VOID, 0, drawn(seed)) for seed in (0, 1)]
    results = evaluate(CheckedSemSegEvaluator(["checked_one", "checked_two"]), one + two, perfect)
    assert results["mIoU"] == 100


def test_one_image_with_the_label_maps_of_two_sets_is_refused(register, tmp_path):
    """Both of its answers were held against the second."""
    register(drawn(0), name="first")
    register(drawn(1), name="second")
    assert CheckedSemSegEvaluator(["first", "first"]).classes == CLASSES
    both = "checked_evaluator_both"
    register_sem_seg_folder(
        both, tmp_path / "first/images", tmp_path / "second/labels", CLASSES, ignore_label=VOID
    )
    with pytest.raises(DatasetError, match=rf"^Data sets 'first', '{both}' have '\S+0.png' with different"):
        CheckedSemSegEvaluator(["first", both])


def test_one_image_twice_in_a_set_with_different_label_maps_is_refused(register):
    """The set's name was taken apart into letters."""
    first, second = register(drawn(0), drawn(1))
    second["file_name"] = first["file_name"]
    DatasetCatalog.register("twice", lambda: [first, second])
    MetadataCatalog.get("twice").set(stuff_classes=CLASSES, ignore_label=VOID)
    path = re.escape(first["file_name"])
    with pytest.raises(
        DatasetError, match=rf"^Data set 'twice' has '{path}' with .* maps: keep one of them\.$"
    ):
        CheckedSemSegEvaluator("twice")
    second["sem_seg_file_name"] = first["sem_seg_file_name"]
    assert CheckedSemSegEvaluator("twice").classes == CLASSES


# 4 + 1 classes: Detectron2's evaluator takes 5 for class 0 of the answer's next class.
@pytest.mark.parametrize("value", [4, 5, 255])
def test_a_value_that_is_neither_class_nor_void(register, value):
    label = drawn(0)
    label[2, 3] = value
    records = register(label)
    message = f"labels/0.png' holds the value {value}, but classes are 0 to 3 and void is {VOID}"
    with pytest.raises(SampleError, match=message):
        evaluate(CheckedSemSegEvaluator("checked_evaluator_test"), records, [drawn(1, range(4))])


def test_a_label_map_of_another_shape_and_as_many_pixels(register):
    records = register(drawn(0))
    Image.fromarray(drawn(0).reshape(12, 6)).save(records[0]["sem_seg_file_name"])
    with pytest.raises(
        SampleError, match=r"labels/0.png' is 6x12, but the answer for '.*images/0.png' is 9x8"
    ):
        evaluate(CheckedSemSegEvaluator("checked_evaluator_test"), records, [drawn(1, range(4))])


def test_a_truncated_label_map(register, tmp_path):
    records = register(drawn(0))
    path = records[0]["sem_seg_file_name"]
    with open(path, "rb+") as stream:
        stream.truncate(len(stream.read()) - 9)
    with pytest.raises(SampleError, match=r"labels/0.png' is truncated"):
        evaluate(CheckedSemSegEvaluator("checked_evaluator_test"), records, [drawn(1, range(4))])


@pytest.mark.parametrize("classes", [3, 6])
def test_a_model_of_another_number_of_classes(register, classes):
    records = register(drawn(0))
    evaluator = CheckedSemSegEvaluator("checked_evaluator_test")
    with pytest.raises(
        DatasetError, match=f"answers with {classes} classes, but the data set has 4: .* to be 4"
    ):
        evaluator.process(records, [{"sem_seg": logits_of(drawn(1, range(3)), classes)}])


@pytest.mark.parametrize("evaluator", [CheckedSemSegEvaluator, ClipSemSegEvaluator])
def test_an_image_of_another_data_set_is_named(register, evaluator):
    """It was a KeyError."""
    (other,) = register(drawn(0), name="checked_other")
    register(drawn(0))
    with pytest.raises(
        DatasetError,
        match=r"^'\S+checked_other/images/0.png' is no image of the data set 'checked_evaluator_test' that .*\.$",
    ):
        evaluate(evaluator("checked_evaluator_test"), [other], [drawn(1, range(4))])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_not_finite_are_told_with_the_first_image(register, caplog, value):
    """Of a model whose training diverged, every pixel counted as the first class, and nothing was said."""
    label = np.zeros(SHAPE, np.uint8)
    records = register(label, label, label)
    evaluator = CheckedSemSegEvaluator("checked_evaluator_test")
    finite = logits_of(label)
    masked = finite.clone()
    masked[3] = -math.inf  # a class that a model rules out is no fault
    broken = finite.clone()
    broken[2, 4, 4] = value
    for answers, told in (
        ([finite, masked, finite], None),
        ([finite, broken, broken], (1, 2)),
        ([broken, finite, finite], (0, 1)),
    ):
        caplog.clear()
        evaluator.reset()
        for record, answer in zip(records, answers, strict=True):
            evaluator.process([record], [{"sem_seg": answer}])
        evaluator.evaluate()
        found = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
        assert len(found) == (told is not None)
        if told:
            first, count = told
            assert found[0] == (
                f"CheckedSemSegEvaluator: answers for {count} of 3 images are not finite (NaN or infinite), the first "
                f"that for '{records[first]['file_name']}'; such pixels count as some class, so the numbers say "
                "little. The weights may be those of a training that diverged, or beyond the range of train.amp."
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_classes_that_are_equally_likely_the_first_counts(register, dtype):
    label = np.zeros(SHAPE, np.uint8)
    label[:, 4:] = 1
    records = register(label)
    evaluator = CheckedSemSegEvaluator("checked_evaluator_test")
    logits = torch.zeros(4, *SHAPE, dtype=dtype)
    logits[1:, :, 4:] = 0.5
    evaluator.process(records, [{"sem_seg": logits}])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == 100
