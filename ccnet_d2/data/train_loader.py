"""Endless training batches, each a function of the seed and its place in the run."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ccnet_d2.data.bad_samples import BadSample, BadSamples, load_sample
from ccnet_d2.data.errors import DatasetError, SampleError
from ccnet_d2.data.forked_workers import fork_workers
from ccnet_d2.data.randomness import seed_of, seeded
from ccnet_d2.data.worker_signals import leave_sigterm_to_parent, sigterm_held_back
from ccnet_d2.wording import listed

__all__ = ["EpochShuffle", "TrainLoader"]

_LOADER_OPTIONS = inspect.signature(DataLoader).parameters.keys()
# What the loader decides itself.
_NOT_OPTIONS = frozenset(("batch_sampler", "batch_size", "drop_last", "generator", "sampler", "shuffle"))
_OPTIONS_OF_WORKERS = ("persistent_workers", "prefetch_factor", "timeout")

logger = logging.getLogger(__name__)

_MOST_REPLACEMENTS = 50
"""After so many bad samples in a row the data set is taken to be bad as a whole."""

# What each use of the seed adds to its key, so that none repeats the numbers of another.
_ORDER, _AUGMENTATION, _REPLACEMENT, _SAMPLER = range(4)


class Place(NamedTuple):
    """Which sample is wanted, and where in the run: the position counts the samples of all processes."""

    position: int
    index: int


class _Loaded(NamedTuple):
    sample: Any
    bad: tuple[BadSample, ...]


class EpochShuffle(Sampler):
    """The data set in a new order each epoch, without end, for all processes together.

    Args:
        size: of the data set.
        seed: the order depends on it and on the number of the epoch.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        return self.starting_at(0)

    def starting_at(self, position: int) -> Iterator[int]:
        """The indices from a position on, without going through those before."""
        epoch, skipped = divmod(position, self.size)
        for number in itertools.count(epoch):
            generator = torch.Generator().manual_seed(seed_of(self.seed, _ORDER, number))
            yield from torch.randperm(self.size, generator=generator).tolist()[skipped:]
            skipped = 0


class TrainLoader:
    """What Detectron2's `build_detection_train_loader` does, exactly repeatable.

    - The n-th batch of a process depends on the seed, n and the number of processes, and on nothing else: not on the
      number of loader workers, not on when the run was interrupted. Without aspect ratio grouping all processes
      together take the same samples at each step whatever their number.
    - Each sample is mapped with Python's, NumPy's and torch's generators seeded by (seed, position, index).
    - A bad sample stops the run, or is replaced by one drawn from (seed, position) and reported. Detectron2 takes any
      other sample silently where a mapper returns None.

    `state_dict` tells the number of batches handed out; what workers have loaded ahead does not count.
    """

    def __init__(
        self,
        dataset: Sequence[Any] | Dataset,
        *,
        mapper: Callable[[Any], Any] | None,
        total_batch_size: int,
        make_sampler: Callable[[], Iterable[int]] | None = None,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int,
        bad_samples: BadSamples | None = None,
        **loader_options: Any,
    ) -> None:
        """
        Args:
            dataset: data set dicts, or a map-style data set.
            mapper: makes a sample of a dict; None where the data set gives samples.
            total_batch_size: of all processes together.
            make_sampler: makes an iterable of endless indices of this process, as Detectron2's training samplers
                are; called under the seed. Default: a new order each epoch.
            aspect_ratio_grouping: only wide or only tall images in a batch, by "width" and "height" of the dicts.
            num_workers: processes that load ahead; forked on Linux, unless `multiprocessing_context` says otherwise.
            collate_fn: makes a batch of a list of samples; default: the list.
            seed: of order and augmentation.
            bad_samples: what to do about bad samples; default: stop.
            loader_options: others of `torch.utils.data.DataLoader`, but for those that say what is in a batch.

        Raises:
            DatasetError: the data set is empty, the batch cannot be shared out evenly, or there is no such option, or
                none without workers; when a batch is asked for, records to be grouped do not have "width" and "height".
        """
        self.size = len(dataset)  # type: ignore[arg-type]
        if self.size == 0:
            raise DatasetError("The training set is empty.")
        self.world_size, self.rank = comm.get_world_size(), comm.get_rank()
        if not isinstance(total_batch_size, Integral):
            raise DatasetError(
                f"dataloader.train.total_batch_size={total_batch_size!r} has to be a whole number of samples."
            )
        if total_batch_size <= 0 or total_batch_size % self.world_size:
            raise DatasetError(
                f"dataloader.train.total_batch_size={total_batch_size} cannot be shared out evenly to "
                f"{self.world_size} processes."
            )
        unknown = loader_options.keys() - _LOADER_OPTIONS
        if unknown:
            raise DatasetError(
                f"dataloader.train takes no {listed(sorted(unknown))}, and torch's DataLoader neither."
            )
        decided = sorted(loader_options.keys() & _NOT_OPTIONS)
        if decided:
            raise DatasetError(
                f"dataloader.train takes no {listed(decided)}: batches are endless, of total_batch_size samples in the "
                "order of dataloader.train.sampler, or else in a new one each epoch."
            )
        if not num_workers:
            for key in _OPTIONS_OF_WORKERS:
                if loader_options.get(key):
                    raise DatasetError(
                        f"dataloader.train.{key}={loader_options[key]} is for loader workers, and "
                        f"dataloader.train.num_workers={num_workers} starts none: leave it out, or have some."
                    )
        self.seed = seed
        self.batches = 0
        self.total_batch_size = total_batch_size
        self.bad_samples = BadSamples() if bad_samples is None else bad_samples
        self.make_sampler = make_sampler
        self.aspect_ratio_grouping = aspect_ratio_grouping
        # The position of the first batch; not 0 where a run goes on with another batch size.
        self._start = 0
        self._is_wide: dict[int, bool] = {}
        self._records = dataset if isinstance(dataset, list) and aspect_ratio_grouping else None
        self._dataset = DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
        self._mapper = mapper
        self._collate = collate_fn
        self._options = {"num_workers": num_workers, **loader_options}
        self._iterator: Generator[Any, None, None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the run, as plain data."""
        return {
            "seed": self.seed,
            "batches": self.batches,
            "start": self._start,
            "total_batch_size": self.total_batch_size,
            "world_size": self.world_size,
            "bad_samples": self.bad_samples.records(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place; only before the first batch is taken."""
        self.seed = state["seed"]
        self.bad_samples.restore(state["bad_samples"])
        same = (state["total_batch_size"], state["world_size"]) == (self.total_batch_size, self.world_size)
        if same:
            self.batches, self._start = state["batches"], state["start"]
            return
        # Samples seen by all processes together; with grouping, about that many.
        self.batches, self._start = 0, state["start"] + state["batches"] * state["total_batch_size"]
        logger.warning(
            "The run was saved with %d processes and batches of %d, and goes on with %d and %d: from the same place in "
            "the data, but not bit by bit as it would have.",
            state["world_size"],
            state["total_batch_size"],
            self.world_size,
            self.total_batch_size,
        )

    def __iter__(self) -> Iterator[Any]:
        self._iterator = self._batches()
        return self._iterator

    def close(self) -> None:
        """End the workers of the last iterator, which has no more batches then.

        Left to the garbage collector, they may be waited for five seconds each.
        """
        if self._iterator is not None:
            self._iterator.close()

    def _batches(self) -> Generator[Any, None, None]:
        # A generator: nothing is loaded until the first batch is asked for, after load_state_dict.
        samples = _Samples(
            self._dataset,
            self._mapper,
            self.seed,
            self.bad_samples.skip,
            self._wide if self.aspect_ratio_grouping else None,
        )
        loader = DataLoader(
            samples,
            batch_sampler=_Batches(self),
            collate_fn=_as_list,
            # The loader draws a seed for its workers; not from the generator that the model draws from.
            generator=torch.Generator().manual_seed(0),
            **self._options
            | {
                "worker_init_fn": functools.partial(
                    leave_sigterm_to_parent, then=self._options.get("worker_init_fn")
                )
            },
        )
        for batch in _closing_workers(loader):
            self.batches += 1
            self.bad_samples.add(bad for loaded in batch for bad in loaded.bad)
            data = [loaded.sample for loaded in batch]
            yield self._collate(data) if self._collate else data

    @property
    def batch_size(self) -> int:
        """Samples in a batch of one process."""
        return self.total_batch_size // self.world_size

    def _places(self, first: int) -> Iterator[Place]:
        """The samples of this process, leaving out its first `first` ones."""
        start = self._start + self.rank + first * self.world_size
        positions = itertools.count(start, self.world_size)
        if self.make_sampler is None:
            shared = EpochShuffle(self.size, self.seed).starting_at(start)
            indices: Iterator[int] = itertools.islice(shared, 0, None, self.world_size)
        else:
            with seeded(self.seed, _SAMPLER):  # Detectron2's draw their seed when they are made
                sampler = self.make_sampler()
            indices = itertools.islice(sampler, first + self._start // self.world_size, None)
        return (Place(position, int(index)) for position, index in zip(positions, indices, strict=False))

    def _wide(self, index: int) -> bool:
        if index not in self._is_wide:
            record = self._records[index] if self._records is not None else self._dataset[index]
            if "width" not in record or "height" not in record:
                # Detectron2 asks the mapped sample, which is too late to know what is in which batch.
                raise DatasetError(
                    "dataloader.train.aspect_ratio_grouping=True, Detectron2's default, needs 'width' and 'height' in "
                    f"the data set's records, which '{record.get('file_name', index)}' lacks: set it to False, as "
                    "suits crops of one size."
                )
            self._is_wide[index] = record["width"] > record["height"]
        return self._is_wide[index]


class _Batches(Sampler):
    """Lists of places, starting after the batches that were handed out."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[Place]]:
        size, done = self.loader.batch_size, self.loader.batches
        if not self.loader.aspect_ratio_grouping:
            places = self.loader._places(done * size)
            while True:
                batch = list(itertools.islice(places, size))
                if len(batch) < size:  # a sampler of the user's that ends
                    return
                yield batch
        # What lies in the groups depends on all that came before, so that this goes through it; no image is read.
        groups: tuple[list[Place], list[Place]] = ([], [])
        number = 0
        for place in self.loader._places(0):
            group = groups[self.loader._wide(place.index)]
            group.append(place)
            if len(group) == size:
                number += 1
                if number > done:
                    yield group[:]
                group.clear()


class _Samples(Dataset):
    """Maps the sample at a place, with the random numbers of that place."""

    def __init__(
        self,
        dataset: Any,
        mapper: Callable[[Any], Any] | None,
        seed: int,
        skip: bool,
        group_of: Callable[[int], bool] | None,
    ) -> None:
        self._dataset = dataset
        self._mapper = mapper
        self._seed = seed
        self._skip = skip
        self._group_of = group_of

    def __getitem__(self, place: Place) -> _Loaded:
        if not self._skip:
            return _Loaded(self._load(place), ())
        bad: list[BadSample] = []
        for index in itertools.islice(self._candidates(place), _MOST_REPLACEMENTS):
            try:
                return _Loaded(self._load(Place(place.position, index)), tuple(bad))
            except SampleError as error:
                bad.append(BadSample(error.path, str(error)))
        raise DatasetError(f"{len(bad)} samples in a row are bad; the last one: {bad[-1].message}")

    def _load(self, place: Place) -> Any:
        with seeded(self._seed, _AUGMENTATION, place.position, place.index):
            if self._mapper is None:
                return load_sample(self._dataset.__getitem__, place.index)
            return load_sample(self._mapper, self._dataset[place.index])

    def _candidates(self, place: Place) -> Iterator[int]:
        """The wanted index, then what may replace it, drawn from the place in the run alone."""
        yield place.index
        generator = torch.Generator().manual_seed(seed_of(self._seed, _REPLACEMENT, place.position))
        size = len(self._dataset)
        while True:
            index = int(torch.randint(size, (1,), generator=generator))
            if self._group_of is None or self._group_of(index) == self._group_of(place.index):
                yield index


def _closing_workers(loader: DataLoader) -> Iterator[list[_Loaded]]:
    """The batches of a loader, whose workers end at once when one of them raises.

    The frames in an error's traceback keep the loader's iterator alive; left to the garbage collector, it waits five
    seconds for each worker. The message has the traceback from the worker, which is the one that tells something.
    """
    with sigterm_held_back():
        batches = iter(fork_workers(loader))
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if loader.num_workers == 0:
                raise
            problem = error.with_traceback(None)
            break
        yield batch
    del batches
    raise problem


def _as_list(batch: list[_Loaded]) -> list[_Loaded]:
    return batch
