"""Every kind of bad file of bad_files.py, read without the command line around it."""

import signal

import pytest
import torch
from bad_files import BAD_CHECKPOINTS, BAD_IMAGES, BAD_LABELS, BAD_PICKLES, executed

from ccnet_d2.checkpoint import CheckpointError, SafeCheckpointer, load_checkpoint, load_file
from ccnet_d2.data import SampleError, SemSegMapper
from ccnet_d2.data.bad_samples import load_sample


@pytest.fixture(autouse=True)
def no_hang():
    """A test that waits for ever fails."""

    def hung(number, frame):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_there_are_enough_kinds():
    assert len(BAD_IMAGES) + len(BAD_LABELS) >= 20 and len(BAD_CHECKPOINTS) + len(BAD_PICKLES) >= 20


@pytest.mark.parametrize(
    ("family", "kind"), [("images", kind) for kind in BAD_IMAGES] + [("labels", kind) for kind in BAD_LABELS]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_inputs(dataset, family, kind):
    name = "train_00003.png"
    path = dataset / family / "train" / name
    {"images": BAD_IMAGES, "labels": BAD_LABELS}[family][kind](path)
    record = {
        "file_name": str(dataset / "images/train" / name),
        "sem_seg_file_name": str(dataset / "labels/train" / name),
        "height": 48,
        "width": 48,
    }
    mapper = SemSegMapper(is_train=True, augmentations=[], dataset_names="ccnet_synthetic_train")
    with pytest.raises(SampleError) as error:
        load_sample(mapper, record)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert error.value.path.endswith(name)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5), torch.nn.BatchNorm2d(16))


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".pth", kind) for kind in BAD_CHECKPOINTS] + [(".pkl", kind) for kind in BAD_PICKLES],
)
@pytest.mark.filterwarnings("ignore:.*torch\\.jit:DeprecationWarning")
def test_bad_checkpoints(tmp_path, suffix, kind):
    model = network()
    path = tmp_path / f"bad{suffix}"
    torch.save({"model": model.state_dict()}, path)
    {".pth": BAD_CHECKPOINTS, ".pkl": BAD_PICKLES}[suffix][kind](path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, path)
    assert not executed(path).exists()
    message = str(error.value)
    assert path.name in message or "does not fit the model" in message
    assert "\n" not in message and "weights_only" not in message
    if "does not fit" not in message:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["code among the weights", "code, torch's old format"])
def test_code_runs_when_the_user_says_so(tmp_path, caplog, kind):
    path = tmp_path / "trusted.pth"
    torch.save({"model": network().state_dict()}, path)
    BAD_CHECKPOINTS[kind](path)
    load_file(path, allow_pickle=True)
    assert executed(path).exists()
    assert "it asks for" in caplog.text and "allow_pickle" in caplog.text


def test_damage_stays_damage_when_code_is_allowed(tmp_path):
    path = tmp_path / "x.pkl"
    BAD_PICKLES["cut in half"](path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_file(path, allow_pickle=True)
    BAD_PICKLES["unknown codec"](path)
    with pytest.raises(CheckpointError, match="not even by running its code"):
        load_file(path, allow_pickle=True)


@pytest.mark.parametrize("tag", ["", "../model_final.pth", "/etc/passwd", "a/b.pth", "\0" * 5])
def test_the_tag_names_a_file_beside_it(tmp_path, tag):
    (tmp_path / "last_checkpoint").write_text(tag)
    with pytest.raises(CheckpointError, match="last_checkpoint"):
        SafeCheckpointer(network(), str(tmp_path)).resume_or_load("", resume=True)


def test_a_damaged_last_checkpoint_is_reported_with_the_next_best(run, tmp_path):
    assert run("train.max_iter=10")[0] == 0
    output = tmp_path / "output"
    last = output / "model_final.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    status, error = run("--resume", "train.max_iter=14")
    assert status == 1
    assert "model_final.pth" in error and "model_0000007.pth" in error and "last_checkpoint" in error
    (output / "last_checkpoint").write_text("model_0000007.pth")
    assert run("--resume", "train.max_iter=14")[0] == 0


def test_skipping_bad_files_of_a_run(run, dataset, tmp_path):
    for number, kind in ((3, "PNG cut in half"), (5, "named pipe")):
        BAD_IMAGES[kind](dataset / f"images/train/train_{number:05d}.png")
    status, error = run("train.max_iter=6")
    assert status == 1 and ("train_00003.png" in error or "train_00005.png" in error)
    for workers in (0, 2):
        output = tmp_path / f"skipping{workers}"
        workers_option = f"dataloader.train.num_workers={workers}"
        assert run("train.max_iter=6", "train.on_bad_sample=skip", workers_option, output=output)[0] == 0
        report = (output / "bad_samples.json").read_text()
        assert "train_00003.png" in report and "train_00005.png" in report
    states = [
        torch.load(tmp_path / f"skipping{w}/model_final.pth", weights_only=True)["model"] for w in (0, 2)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    status, error = run("train.max_iter=6", "train.on_bad_sample=skip", "train.bad_sample_budget=1")
    assert status == 1 and "train.bad_sample_budget=1" in error
    status, error = run("train.max_iter=6", "train.on_bad_sample=never")
    assert status == 1 and "is not one of 'stop', 'skip'" in error
