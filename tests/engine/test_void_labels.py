"""Training on void alone is told."""

import pytest
import torch

from ccnet_d2.engine.void_labels import VoidLabels, WatchedLoader


def batch(*values, name="a.png"):
    return [{"file_name": name, "sem_seg": torch.full((2, 3), value)} for value in values]


def warnings(caplog, batches):
    watch = VoidLabels()
    for one in batches:
        watch.look(one)
    return [record.getMessage() for record in caplog.records]


def test_void_alone_is_told_once(caplog):
    (message,) = warnings(caplog, [*[batch(255, 255)] * 9, batch(255, name="b.png"), *[batch(255)] * 20])
    assert message.startswith(
        "The first 10 batches have no labelled pixel, the last one of 'b.png': nothing is learnt"
    )


@pytest.mark.parametrize("at", [0, 5, 9])
def test_one_labelled_pixel_is_enough(caplog, at):
    void, labelled = batch(255, 255), batch(255, 255)
    labelled[1]["sem_seg"][1, 2] = 0
    batches = [void] * 30
    batches[at] = labelled
    assert not warnings(caplog, batches)


def test_fewer_batches_say_nothing(caplog):
    assert not warnings(caplog, [batch(255)] * 9)


@pytest.mark.parametrize(
    "other",
    [
        [{"file_name": "a.png", "instances": None}],
        [torch.zeros(2)],
        [],
        torch.zeros(2, 3),
        2.0,
        {"sem_seg": 255},
    ],
)
def test_batches_without_label_maps_say_nothing(caplog, other):
    assert not warnings(caplog, [other] * 20)


def test_clips_and_images_without_names(caplog):
    (message,) = warnings(caplog, [[{"sem_seg": torch.full((2, 2, 3), 255)}]] * 10)
    assert "'an image without a name'" in message


def test_a_watched_loader_gives_the_same_batches(caplog):
    batches = [batch(255)] * 12
    watched = WatchedLoader(batches)
    assert all(one is other for one, other in zip(watched, batches, strict=True))
    assert len(caplog.records) == 1
