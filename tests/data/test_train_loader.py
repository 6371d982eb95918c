"""Training batches that depend on the seed and their place alone."""

import multiprocessing
import random
import time

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler

from ccnet_d2.data.bad_samples import BadSample, BadSamples
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.randomness import GeneratorStates, seed_of, seeded
from ccnet_d2.data.train_loader import EpochShuffle, TrainLoader
from ccnet_d2.errors import UserError


def records(count, bad=()):
    return [{"file_name": f"{i}.png", "width": 1 + i % 3, "height": 2, "bad": i in bad} for i in range(count)]


def mapper(record):
    """Draws from every generator; a bad record has a broken file."""
    if record["bad"]:
        raise OSError(f"cannot identify image file {record['file_name']}")
    return {**record, "drawn": (random.random(), float(np.random.rand()), float(torch.rand(())))}


def loader(count=10, bad=(), batch=3, **options):
    options = {"mapper": mapper, "aspect_ratio_grouping": False, "seed": 7, **options}
    made.append(TrainLoader(records(count, bad), total_batch_size=batch, **options))
    return made[-1]


made = []


@pytest.fixture(autouse=True)
def no_workers_are_left():
    yield
    while made:
        made.pop().close()


def take(batches, count):
    return [next(batches) for _ in range(count)]


def names(batches):
    return [[sample["file_name"] for sample in batch] for batch in batches]


def test_seeds_of_different_keys_differ():
    keys = [(), (0,), (0, 0), (0, 1), (1, 0), (2**40, 3), (3, 2**40)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert seed_of(5, 6) == seed_of(5, 6)


def test_seeded_leaves_the_generators_as_they_were():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    before = GeneratorStates.capture()
    following = draw()
    before.restore()
    with seeded(1, 2):
        first = draw()
    assert draw() == following
    with pytest.raises(KeyError), seeded(1, 2):
        assert draw() == first
        raise KeyError
    with seeded(1, 3):
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_states_survive_as_data(tmp_path):
    random.gauss(0, 1), np.random.randn()  # leave a half-used pair in each
    state = GeneratorStates.capture()
    expected = random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(2).tolist()
    torch.save(state.as_data(), tmp_path / "x")
    GeneratorStates.from_data(torch.load(tmp_path / "x", weights_only=True)).restore()
    assert (random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(2).tolist()) == expected


def test_every_epoch_is_another_permutation():
    order = EpochShuffle(7, seed=1)
    stream = [index for index, _ in zip(order, range(21), strict=False)]
    epochs = [stream[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for position in range(15):
        late = order.starting_at(position)
        assert [next(late) for _ in range(5)] == stream[position : position + 5]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("grouping", [False, True])
def test_same_batches_from_any_place_with_any_workers(workers, grouping):
    expected = take(iter(loader(aspect_ratio_grouping=grouping)), 9)
    for done in (0, 4):
        first = loader(aspect_ratio_grouping=grouping)
        take(iter(first), done)
        second = loader(aspect_ratio_grouping=grouping, num_workers=workers, seed=99)
        second.load_state_dict(first.state_dict())
        assert take(iter(second), 5) == expected[done : done + 5]
        assert second.batches == done + 5


def test_augmentation_differs_between_epochs():
    batches = take(iter(loader(count=3)), 2)
    drawn = [{s["file_name"]: s["drawn"] for s in batch} for batch in batches]
    assert drawn[0].keys() == drawn[1].keys()
    assert all(a != b for name in drawn[0] for a, b in zip(drawn[0][name], drawn[1][name], strict=True))


def test_grouping_separates_wide_from_tall():
    seen = take(iter(loader(count=30, aspect_ratio_grouping=True)), 20)
    assert all(len({s["width"] > s["height"] for s in batch}) == 1 for batch in seen)
    assert len({batch[0]["width"] > 2 for batch in seen}) == 2


def test_records_without_sizes_cannot_be_grouped():
    """Folders of images and label maps have none; Detectron2 would take them from what the mapper returns."""
    bare = [{"file_name": f"{i}.png", "bad": False} for i in range(4)]
    made.append(TrainLoader(bare, mapper=mapper, total_batch_size=2, seed=7))
    with pytest.raises(DatasetError, match=r"grouping=True.*needs 'width'.*'\d.png' lacks: set it to False"):
        next(iter(made[-1]))


def test_processes_share_the_samples_out(monkeypatch):
    from ccnet_d2.data import train_loader

    whole = take(iter(loader(batch=4)), 6)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(train_loader.comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(train_loader.comm, "get_rank", lambda rank=rank: rank)
        parts.append(take(iter(loader(batch=4)), 6))
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch[0::2] == first and batch[1::2] == second
    with pytest.raises(DatasetError, match="total_batch_size=5 cannot be shared out evenly to 2"):
        loader(batch=5)


def test_going_on_with_another_batch_size_takes_the_next_samples():
    whole = [sample for batch in take(iter(loader(batch=2)), 12) for sample in batch]
    first = loader(batch=2)
    take(iter(first), 3)
    second = loader(batch=4)
    second.load_state_dict(first.state_dict())
    assert [sample for batch in take(iter(second), 2) for sample in batch] == whole[6:14]
    third = loader(batch=2)
    third.load_state_dict(second.state_dict())
    assert [sample for batch in take(iter(third), 2) for sample in batch] == whole[14:18]


def test_detectron2_samplers():
    def sampler():
        return RepeatFactorTrainingSampler(torch.tensor([1.0] * 9 + [3.0]))

    first = loader(make_sampler=sampler)
    seen = take(iter(first), 8)
    assert sum(name == "9.png" for batch in names(seen) for name in batch) >= 4
    np.random.seed(5)
    second = loader(make_sampler=sampler)
    second.load_state_dict({**first.state_dict(), "batches": 5})
    assert take(iter(second), 3) == seen[5:8]
    assert len(list(loader(make_sampler=lambda: range(7)))) == 2  # one that ends


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stops(workers):
    with pytest.raises(SampleError, match=r"sample '4\.png' cannot be loaded: cannot identify") as error:
        take(iter(loader(bad=[4], num_workers=workers)), 6)
    assert error.value.path == "4.png"


def test_closing_ends_the_workers():
    others = set(multiprocessing.active_children())  # what else this process of the test run has started
    data = loader(num_workers=2)
    data.close()
    batches = iter(data)
    take(batches, 3)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    start = time.monotonic()
    data.close()
    assert time.monotonic() - start < 4 and not any(worker.is_alive() for worker in workers)
    assert list(batches) == []
    assert data.batches == 3 and next(iter(data))


def test_a_mapper_that_returns_none_is_no_silent_fallback():
    with pytest.raises(SampleError, match=r"returned None for the sample '\d\.png'"):
        next(iter(loader(mapper=lambda record: None)))


def test_faults_of_the_program_stay_what_they_are():
    with pytest.raises(KeyError):
        next(iter(loader(mapper=lambda record: record["nothing"], bad_samples=BadSamples("skip"))))


@pytest.mark.parametrize("grouping", [False, True])
def test_skipping_is_repeatable_and_reported(grouping):
    def skipping(**options):
        return loader(
            count=12, bad=[2, 5], aspect_ratio_grouping=grouping, bad_samples=BadSamples("skip", 2), **options
        )

    first = skipping()
    seen = take(iter(first), 12)
    assert not any(sample["bad"] for batch in seen for sample in batch)
    if grouping:
        assert all(len({s["width"] > s["height"] for s in batch}) == 1 for batch in seen)
    assert len(first.bad_samples) == 2
    summary = first.bad_samples.summary()
    assert "2 bad samples" in summary and "'2.png'" in summary and "'5.png'" in summary
    middle = skipping()
    take(iter(middle), 5)
    resumed = skipping(num_workers=2)
    resumed.load_state_dict(middle.state_dict())
    assert take(iter(resumed), 7) == seen[5:]
    assert resumed.bad_samples.records() == first.bad_samples.records()


def test_the_budget_ends_it():
    with pytest.raises(DatasetError, match=r"2 bad samples are more than train\.bad_sample_budget=1"):
        take(iter(loader(bad=[2, 5], bad_samples=BadSamples("skip", 1))), 12)
    with pytest.raises(DatasetError, match="50 samples in a row are bad"):
        next(iter(loader(bad=range(10), bad_samples=BadSamples("skip"))))


def test_wrong_options():
    with pytest.raises(UserError, match="on_bad_sample='ignore' is not one of 'stop', 'skip'"):
        BadSamples("ignore")
    with pytest.raises(UserError, match="negative"):
        BadSamples("skip", -1)
    with pytest.raises(DatasetError, match="empty"):
        TrainLoader([], mapper=None, total_batch_size=1, seed=0)
    with pytest.raises(DatasetError, match=r"^dataloader\.train takes no prefetch, shufle, and torch's"):
        loader(shufle=True, prefetch=2, pin_memory=False)
    for key in ("shuffle", "drop_last", "batch_size", "sampler", "generator"):
        with pytest.raises(DatasetError, match=rf"^dataloader\.train takes no {key}: batches are endless"):
            loader(**{key: None})
    for key, value in (("persistent_workers", True), ("prefetch_factor", 2), ("timeout", 60)):
        with pytest.raises(
            DatasetError,
            match=rf"^dataloader\.train\.{key}={value} is for loader workers, and .*=0 starts none",
        ):
            loader(**{key: value})
        assert len(next(iter(loader(num_workers=1, **{key: value})))) == 3
    take(iter(loader(persistent_workers=False, prefetch_factor=None, timeout=0)), 1)
    for size in (4.0, "4", None):
        with pytest.raises(DatasetError, match=rf"total_batch_size={size!r} has to be a whole number"):
            loader(batch=size)
    assert BadSamples("skip").summary() == "No bad samples."


def test_a_data_set_that_gives_samples_and_a_collate_function():
    data = TrainLoader(
        torch.utils.data.TensorDataset(torch.arange(4)),
        mapper=None,
        total_batch_size=2,
        aspect_ratio_grouping=False,
        collate_fn=len,
        seed=0,
    )
    assert next(iter(data)) == 2


def test_bad_samples_are_counted_by_file(caplog):
    """What the report file of a run holds."""
    a, b = BadSample("a.png", "a is bad."), BadSample("b.png", "b is bad.")
    found = BadSamples("skip", 2)
    found.add([a, b, a])
    found.add([a])
    assert found.records() == [
        {"path": "a.png", "message": "a is bad.", "times": 3},
        {"path": "b.png", "message": "b is bad.", "times": 1},
    ]
    # Once for each file.
    assert [record.args for record in caplog.records] == [("a is bad.",), ("b is bad.",)]
    resumed = BadSamples("skip", 30)
    resumed.restore(found.records())
    resumed.add([b, *(BadSample(f"{i}.png", f"{i} is bad.") for i in range(19))])
    lines = resumed.summary().splitlines()
    assert lines[:3] == ["21 bad samples were skipped (budget 30):", "  a is bad. (3 x)", "  b is bad. (2 x)"]
    assert lines[20:] == ["  17 is bad. (1 x)", "  and 1 more."]
    with pytest.raises(
        DatasetError, match=r"3 bad samples are more than .*=2 allows; the last one: c is bad"
    ):
        found.add([BadSample("c.png", "c is bad.")])


def test_errors_that_are_not_of_one_sample_are_not_skipped():
    def mapper(record):
        raise DatasetError("The augmentation is wrong.")

    with pytest.raises(DatasetError, match=r"^The augmentation is wrong\.$") as told:
        next(iter(loader(mapper=mapper, bad_samples=BadSamples("skip"))))
    assert not isinstance(told.value, SampleError)


def test_a_sampler_goes_on_with_another_batch_size_too():
    options = dict(count=40, make_sampler=lambda: iter(range(40)))
    before = loader(batch=3, **options)
    take(iter(before), 4)
    after = loader(batch=2, **options)
    after.load_state_dict(before.state_dict())
    assert names(take(iter(after), 1)) == [["12.png", "13.png"]]
