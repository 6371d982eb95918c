"""Errors of the user are one sentence on stderr; errors of the program keep their traceback."""

import pickle

import pytest
from detectron2.data.datasets import load_coco_json
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from ccnet_d2.data.errors import SampleError
from ccnet_d2.engine.user_errors import one_sentence_errors


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise SampleError("The image 'a.png' is cut off.", "a.png")


def test_nothing_wrong():
    with one_sentence_errors() as status:
        pass
    assert status.code == 0


def test_user_error_is_one_line(capsys):
    with one_sentence_errors() as status:
        raise ValueError("recurrence must be at least 1.")
    assert status.code == 1
    assert capsys.readouterr().err == "error: recurrence must be at least 1.\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_loader_worker_is_the_same_line(capsys, workers):
    with one_sentence_errors() as status:
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert status.code == 1
    assert capsys.readouterr().err == "error: The image 'a.png' is cut off.\n"


def test_a_set_of_detectron2_that_is_missing_says_where_it_belongs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    annotations = f"{tmp_path}/coco/annotations/instances_val2017.json"
    with one_sentence_errors() as status:
        load_coco_json(annotations, f"{tmp_path}/coco/val2017")
    assert status.code == 1
    message = capsys.readouterr().err
    assert message.startswith(
        f"error: '{annotations}' does not exist: put the data set there, or set DETECTRON2_DATASETS"
    )
    assert message.count("\n") == 1


def test_other_missing_files_are_told_as_they_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    with one_sentence_errors():
        open(tmp_path / "weights.pth")
    assert (
        capsys.readouterr().err == f"error: [Errno 2] No such file or directory: '{tmp_path}/weights.pth'\n"
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.max_iter", "Missing key max_iter (config key train.max_iter)."),
        ("a.b", "Interpolation key 'nothing' not found (config key a.b)."),
        (
            "a.c",
            "Error trying to access none.d: node `none` is not a container and thus cannot contain `d` (config key "
            "a.c).",
        ),
    ],
)
def test_keys_that_a_config_lacks(capsys, key, message):
    cfg = OmegaConf.create({"train": {}, "a": {"b": "${nothing}", "c": "${none.d}"}, "none": None})
    group, name = key.split(".")
    with one_sentence_errors() as status:
        getattr(cfg[group], name)
        cfg[group][name]
    assert status.code == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_program_errors_pass_through():
    with pytest.raises(ZeroDivisionError), one_sentence_errors():
        raise ZeroDivisionError


def test_sample_error_survives_pickling():
    error = pickle.loads(pickle.dumps(SampleError("bad", "a.png")))
    assert str(error) == "bad" and error.path == "a.png"
