"""LIP's metrics on drawn predictions: against a count by hand, CE2P's own formulas, and Detectron2's evaluator."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import SemSegEvaluator

from ccnet_d2.data import DatasetError, SampleError
from ccnet_d2.data.datasets.lip import LIP_CLASSES, register_lip
from ccnet_d2.evaluation import LIPEvaluator

NAME = "evaluated_lip_val"
SIZES = [(40, 24), (33, 31), (21, 50)]


@pytest.fixture
def labels(tmp_path, catalogs_as_before) -> list[np.ndarray]:
    """Label maps of drawn blocks with every class and void, registered as LIP's validation set."""
    rng = np.random.default_rng(0)
    maps = []
    for index, (height, width) in enumerate(SIZES):
        small = rng.choice([*range(20), 255], (-(-height // 4), -(-width // 4)))
        small.ravel()[:20] = range(20)
        maps.append(np.kron(small, np.ones((4, 4)))[:height, :width].astype(np.uint8))
        write(tmp_path, index, maps[-1])
    register_lip(tmp_path / "LIP", "evaluated_lip")
    return maps


def write(root: Path, index: int, label: np.ndarray) -> Path:
    path = root / f"LIP/val_segmentations/{index}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / "LIP/val_images").mkdir(exist_ok=True)
    cv2.imwrite(str(path), label)
    cv2.imwrite(str(root / f"LIP/val_images/{index}.jpg"), np.zeros((*label.shape, 3), np.uint8))
    return path


def drawn_predictions(labels: list[np.ndarray]) -> list[np.ndarray]:
    """The labels moved by two pixels, void filled, left and right mixed up here and there."""
    rng = np.random.default_rng(1)
    predictions = []
    for label in labels:
        moved = np.roll(label, 2, axis=1)
        moved[moved == 255] = 3
        moved[(moved == 14) & (rng.random(label.shape) < 0.3)] = 15
        predictions.append(moved)
    return predictions


def evaluate(evaluator, predictions: list[np.ndarray]) -> dict[str, float]:
    evaluator.reset()
    for record, prediction in zip(DatasetCatalog.get(NAME), predictions, strict=True):
        logits = torch.nn.functional.one_hot(torch.from_numpy(prediction).long(), 20).permute(2, 0, 1).float()
        evaluator.process([{"file_name": record["file_name"]}], [{"sem_seg": logits}])
    return evaluator.evaluate()["sem_seg"]


def ce2p_formulas(labels: list[np.ndarray], predictions: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean IoU, pixel accuracy and mean accuracy as CE2P's code defines them, pixel by pixel."""
    confusion = np.zeros((20, 20))
    for label, prediction in zip(labels, predictions, strict=True):
        for truth, answer in zip(label.ravel(), prediction.ravel(), strict=True):
            if truth != 255:
                confusion[truth, answer] += 1
    pos, res, tp = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    iou = tp / np.maximum(1.0, pos + res - tp)
    return 100 * iou.mean(), 100 * tp.sum() / pos.sum(), 100 * (tp / np.maximum(1.0, pos)).mean()


def test_metrics_equal_ce2ps_and_detectron2s(labels, monkeypatch):
    predictions = drawn_predictions(labels)
    results = evaluate(LIPEvaluator(NAME), predictions)
    expected = ce2p_formulas(labels, predictions)
    assert (results["mIoU"], results["pACC"], results["mACC"]) == pytest.approx(expected)
    assert 20 < results["mIoU"] < results["mACC"] < 95
    truth, answer = (np.concatenate([one.ravel() for one in maps]) for maps in (labels, predictions))
    for index, name in enumerate(LIP_CLASSES):
        here, there = truth == index, (answer == index) & (truth != 255)
        assert results[f"IoU-{name}"] == pytest.approx(100 * (here & there).sum() / (here | there).sum())
        assert results[f"ACC-{name}"] == pytest.approx(100 * (here & there).sum() / here.sum())

    theirs = evaluate(SemSegEvaluator(NAME, distributed=False), predictions)
    assert set(results) <= set(theirs)
    assert results == pytest.approx({key: theirs[key] for key in results})


def test_perfect_answers_and_those_of_one_class(labels):
    filled = [np.where(label == 255, 7, label) for label in labels]
    assert set(evaluate(LIPEvaluator(NAME), filled).values()) == {100.0}
    nothing = evaluate(LIPEvaluator(NAME), [np.zeros_like(label) for label in labels])
    share = np.mean(np.concatenate([label[label != 255] for label in labels]) == 0)
    assert nothing["pACC"] == pytest.approx(100 * share) and nothing["mACC"] == pytest.approx(5.0)
    assert nothing["mIoU"] == pytest.approx(5 * share)


def test_classes_that_do_not_occur_are_left_out_of_the_means(labels, tmp_path, caplog):
    for index, label in enumerate(labels):
        write(tmp_path, index, np.where(label == 4, 255, label).astype(np.uint8))
    results = evaluate(LIPEvaluator(NAME), [np.where(label > 19, 4, label) for label in labels])
    assert (results["mIoU"], results["pACC"], results["mACC"]) == (100, 100, 100)
    assert np.isnan(results["IoU-Sunglasses"]) and "no pixel of ['Sunglasses']" in caplog.text


def test_counts_of_several_processes_are_added(labels, monkeypatch, caplog):
    predictions = drawn_predictions(labels)
    both = [LIPEvaluator(NAME) for _ in range(2)]
    alone = LIPEvaluator(NAME, distributed=False)
    records = DatasetCatalog.get(NAME)
    for index, (record, prediction) in enumerate(zip(records, predictions, strict=True)):
        logits = torch.nn.functional.one_hot(torch.from_numpy(prediction).long(), 20).permute(2, 0, 1).float()
        if index == 1:  # of the other process
            logits[0][prediction == 0] = np.inf
        for evaluator in (both[index % 2], alone):
            evaluator.process([record], [{"sem_seg": logits}])
    module = "ccnet_d2.evaluation.sem_seg.comm"
    monkeypatch.setattr(f"{module}.get_world_size", lambda: 2)
    monkeypatch.setattr(f"{module}.synchronize", lambda: None)
    sent = []
    monkeypatch.setattr(f"{module}.all_gather", lambda own: sent.append(own) or sent)
    expected = pytest.approx(ce2p_formulas(labels, predictions)[0])
    monkeypatch.setattr(f"{module}.is_main_process", lambda: False)
    assert both[1].evaluate() is None and not caplog.records
    monkeypatch.setattr(f"{module}.is_main_process", lambda: True)
    assert both[0].evaluate()["sem_seg"]["mIoU"] == expected
    assert f"for 1 of {len(records)} images are not finite" in caplog.text
    assert f"the first that for '{records[1]['file_name']}'" in caplog.text
    # Without adding up, every process answers, and for what it counted itself.
    monkeypatch.setattr(f"{module}.all_gather", lambda own: pytest.fail("processes waited for each other"))
    assert alone.evaluate()["sem_seg"]["mIoU"] == expected


@pytest.mark.parametrize("value", [20, 21, 254])
def test_a_label_that_is_no_class_is_refused(labels, tmp_path, value):
    predictions = drawn_predictions(labels)
    labels[0][3, 3] = value
    path = write(tmp_path, 0, labels[0])
    with pytest.raises(SampleError) as error:
        evaluate(LIPEvaluator(NAME), predictions)
    assert str(error.value) == (
        f"The label map '{path}' holds the value {value}, but classes are 0 to 19 and void is 255."
    )


def test_answers_of_another_size_and_unknown_sets(labels):
    with pytest.raises(SampleError, match=r"is 24x40, but the answer for '.*/0.jpg' is 24x39"):
        evaluate(LIPEvaluator(NAME), [one[:-1] for one in drawn_predictions(labels)])
    with pytest.raises(DatasetError, match="no data set 'lip_sem_seg_vall'; did you mean"):
        LIPEvaluator("lip_sem_seg_vall")
