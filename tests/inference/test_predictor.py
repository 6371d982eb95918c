from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from PIL import Image

from ccnet_d2.data.transforms import ResizeTo
from ccnet_d2.errors import UserError
from ccnet_d2.inference import ClassTable, Predictor, SlidingWindow, WholeImage, batch, label_bands
from ccnet_d2.inference.batch import plan_pictures, write_pictures
from ccnet_d2.inference.drawing import text_line
from ccnet_d2.inference.visualize import heat_colors, save_labels
from ccnet_d2.model_zoo import get_config


@pytest.fixture
def photograph(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (30, 42, 3), dtype=np.uint8)
    path = tmp_path / "photos" / "street.png"
    path.parent.mkdir()
    Image.fromarray(array).save(path)
    return path, array


@pytest.fixture(scope="module")
def toy_checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = instantiate(get_config("toy/ccnet_synthetic.py").model)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def test_files_arrays_and_pillow_images_give_one_answer(make_segmenter, photograph):
    path, array = photograph
    model = make_segmenter()
    predictor = Predictor(model)
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    expected = WholeImage(model)([{"image": tensor, "height": 30, "width": 42}])[0]["sem_seg"]
    for given in (path, str(path), array, Image.fromarray(array)):
        prediction = predictor(given)
        assert torch.equal(prediction.logits, expected)
        assert np.array_equal(prediction.labels, expected.argmax(0).numpy())
        assert prediction.labels.dtype == np.uint8
        assert np.array_equal(prediction.image, array)
    assert predictor(path).path == path and predictor(array).path is None


def test_labels_only_keeps_no_logits(make_segmenter, photograph):
    path, _ = photograph
    predictor = Predictor(make_segmenter(), mode=SlidingWindow(tile=16))
    without = predictor(path, labels_only=True)
    full = predictor(path)
    assert without.logits is None
    assert np.array_equal(without.labels, full.labels)
    with pytest.raises(ValueError, match="the confidence needs logits"):
        without.confidence()
    np.testing.assert_allclose(full.confidence(), full.logits.softmax(0).amax(0).numpy(), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("mode", [WholeImage(), SlidingWindow(tile=16)])
@pytest.mark.parametrize("labels_only", [False, True])
@pytest.mark.parametrize("resized", [False, True])
def test_answers_that_are_not_finite_are_told_once(
    make_segmenter, photograph, caplog, value, mode, labels_only, resized
):
    """Of a model whose training diverged, all was the first class, and nothing was said."""
    label_bands._tell_not_finite.cache_clear()
    path, _ = photograph
    model = make_segmenter()
    predictor = Predictor(model, mode=mode, augmentations=[ResizeTo(20, 28)] if resized else ())
    predictor(path, labels_only=labels_only)
    assert not caplog.records
    with torch.no_grad():
        model.convs[-1].bias[3] = value
    for _ in range(2):
        predictor(path, labels_only=labels_only)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "The model's answer is not finite (NaN or infinite)"
    ]


def test_models_in_bgr_get_bgr(make_segmenter, photograph):
    _, array = photograph
    model = make_segmenter()
    rgb = Predictor(model)(array).logits
    assert torch.equal(Predictor(model, input_format="BGR")(array[:, :, ::-1].copy()).logits, rgb)
    assert not torch.equal(Predictor(model, input_format="BGR")(array).logits, rgb)
    model.input_format = "BGR"
    assert torch.equal(Predictor(model)(array[:, :, ::-1].copy()).logits, rgb)
    model.input_format = None
    with pytest.raises(ValueError, match="channel order of TinySegmenter must be 'RGB' or 'BGR', got None"):
        Predictor(model)


def test_answers_have_the_images_size_whatever_the_network_saw(make_segmenter, photograph):
    from detectron2.data import transforms as T

    path, array = photograph
    model = make_segmenter()
    prediction = Predictor(model, augmentations=[T.Resize((20, 28))])(path)
    assert model.calls[-1] == [(3, 20, 28)]
    assert prediction.labels.shape == array.shape[:2]
    assert prediction.logits.shape == (5, *array.shape[:2])


def test_folders_and_patterns_are_predicted_one_by_one(make_segmenter, photograph):
    path, array = photograph
    Image.fromarray(array[::-1].copy()).save(path.with_name("upside.png"))
    model = make_segmenter()
    results = Predictor(model).predict_all(path.parent)
    calls = len(model.calls)
    first = next(results)
    assert first.path == path and len(model.calls) == calls + 1
    assert [one.path.name for one in results] == ["upside.png"]
    pattern = str(path.parent / "up*.png")
    assert [one.path.name for one in Predictor(model).predict_all(pattern)] == ["upside.png"]
    with pytest.raises(ValueError, match="does not exist"):
        Predictor(model).predict_all([path, "missing.png"])


def test_a_model_put_back_to_training_is_refused(make_segmenter, photograph):
    path, array = photograph
    model = make_segmenter().train()
    predictor = Predictor(model)
    before = predictor(path).logits
    calls = len(model.calls)
    model.train()
    with pytest.raises(UserError, match=r"the predictor's TinySegmenter was put into training mode"):
        predictor(array)
    with pytest.raises(UserError, match="into training mode"):
        predictor(path, labels_only=True)
    assert len(model.calls) == calls
    model.eval()
    assert torch.equal(predictor(path).logits, before)


def test_class_names(make_segmenter, photograph):
    path, _ = photograph
    model = make_segmenter()
    assert Predictor(model)(path).classes.names == tuple(f"class {i}" for i in range(5))
    named = Predictor(model, classes=list("abcde"))
    assert named(path).classes.names == tuple("abcde")
    assert named(path).overlay().ndim == 3
    table = ClassTable.create(list("abcde"))
    assert Predictor(model, classes=table)(path).classes is table
    with pytest.raises(ValueError, match="the model gives 5 classes, but 2 class names are known"):
        Predictor(model, classes=["a", "b"])(path)
    with pytest.raises(ValueError, match="has no 'stuff_classes'"):
        Predictor(model, classes="no_such_data_set")


def test_two_lines_from_a_run_and_a_checkpoint(toy_checkpoint, photograph):
    path, array = photograph
    predictor = Predictor("toy/ccnet_synthetic.py", toy_checkpoint)
    prediction = predictor(path)

    model = instantiate(get_config("toy/ccnet_synthetic.py").model)
    model.load_state_dict(torch.load(toy_checkpoint, weights_only=True)["model"])
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    with torch.no_grad():
        expected = model.eval()([{"image": tensor, "height": 30, "width": 42}])[0]["sem_seg"]
    torch.testing.assert_close(prediction.logits.cpu(), expected, atol=1e-4, rtol=1e-4)
    assert len(prediction.classes) == len(expected)
    assert not prediction.classes.names[0].startswith("class ")

    cfg = get_config("toy/ccnet_synthetic.py")
    cfg.train.init_checkpoint = str(toy_checkpoint)
    cfg.test = dict(inference=L(SlidingWindow)(tile=16))
    configured = Predictor(cfg)
    assert isinstance(configured.mode, SlidingWindow) and configured.mode.tile == (16, 16)
    assert isinstance(Predictor(cfg, mode="whole").mode, WholeImage)


def test_names_are_held_against_the_models_classes_where_only_labels_are_asked_for(
    toy_checkpoint, photograph
):
    path, _ = photograph
    model = instantiate(get_config("toy/ccnet_synthetic.py").model)
    count = model.sem_seg_head.num_classes
    numbered = Predictor(model, toy_checkpoint, mode="slide")
    # Not as many as occur in this image: a video's next frame may hold others, under the same legend.
    assert len(numbered(path, labels_only=True).classes) == count
    misnamed = Predictor(model, toy_checkpoint, classes=[f"name {i}" for i in range(count + 2)])
    with pytest.raises(
        ValueError, match=f"the model gives {count} classes, but {count + 2} class names are known"
    ):
        misnamed(path, labels_only=True)


def test_half_precision(toy_checkpoint, photograph):
    path, array = photograph
    full = Predictor("toy/ccnet_synthetic.py", toy_checkpoint)
    cfg = get_config("toy/ccnet_synthetic.py")
    cfg.train.amp.enabled = True
    configured = Predictor(cfg, toy_checkpoint)
    asked = Predictor("toy/ccnet_synthetic.py", toy_checkpoint, amp="bfloat16")
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = full.model([{"image": tensor, "height": 30, "width": 42}])[0]["sem_seg"]
    for predictor in (configured, asked):
        prediction = predictor(path)
        assert torch.equal(prediction.logits, wanted)
        assert np.array_equal(predictor(path, labels_only=True).labels, prediction.labels)
    exact = full(path).logits
    assert not torch.equal(wanted, exact)
    torch.testing.assert_close(wanted, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    # A run's setting gives way to the argument, and attention maps are exact.
    assert torch.equal(Predictor(cfg, toy_checkpoint, amp=False)(path).logits, exact)
    for ours, wanted_map in zip(
        configured.attention(path, 5, 6).maps, full.attention(path, 5, 6).maps, strict=True
    ):
        assert np.array_equal(ours, wanted_map)
    with pytest.raises(ValueError, match=r"^amp=float16 does not run on a CPU: use bfloat16"):
        Predictor("toy/ccnet_synthetic.py", toy_checkpoint, amp="float16")


def test_attention_of_a_run(toy_checkpoint, photograph):
    path, _ = photograph
    found = Predictor("toy/ccnet_synthetic.py", toy_checkpoint).attention(path, 21, 9)
    assert found.extent == (15.0, 21.0)  # stride 2
    assert found.cell == (4, 10)
    first, second = found.maps
    assert (first > 0).sum() == 15 + 21 - 1
    assert (second > 0).all()


def test_what_is_missing_is_said(toy_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"There is no config 'toy/ccnet_synthetik\.py'"):
        Predictor("toy/ccnet_synthetik.py", toy_checkpoint)
    with pytest.raises(ValueError, match="no weights to predict with"):
        Predictor("toy/ccnet_synthetic.py")
    with pytest.raises(ValueError, match=r"nowhere\.pth"):
        Predictor("toy/ccnet_synthetic.py", tmp_path / "nowhere.pth")
    with pytest.raises(TypeError, match="model must be a module"):
        Predictor(3)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' was asked for, but torch sees no GPU"):
            Predictor(torch.nn.Conv2d(3, 3, 1), device="cuda", input_format="RGB")


def test_damaged_images_are_named(make_segmenter, photograph, tmp_path):
    path, _ = photograph
    cut = tmp_path / "cut.png"
    cut.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.png"):
        Predictor(make_segmenter())(cut)


def test_a_damaged_image_does_not_stop_the_others(make_segmenter, photograph, tmp_path):
    path, _ = photograph
    path.with_name("broken.png").write_bytes(path.read_bytes()[:500])
    out = tmp_path / "out"
    result = write_pictures(Predictor(make_segmenter()), path.parent, out, picture="labels", progress=False)
    assert [one.name for one in result.written] == ["street.png"]
    assert len(result.problems) == 1 and "broken.png" in result.problems[0]
    assert [one.name for one in out.iterdir()] == ["street.png"]


def test_a_picture_of_the_confidence_says_its_mean(make_segmenter, photograph, tmp_path, monkeypatch, capsys):
    path, _ = photograph
    written = []
    monkeypatch.setattr(
        batch, "text_line", lambda text, *args: written.append(text) or text_line(text, *args)
    )
    predictor = Predictor(make_segmenter())
    (target,) = write_pictures(predictor, path, tmp_path / "c.png", picture="confidence").written
    assert "1/1 [" in capsys.readouterr().err
    share = predictor(path).logits.softmax(0).amax(0)
    assert written == [f"confidence: dark 0, bright 1; mean {share.mean():.2f}"] and share.mean() < 0.99
    width, height = Image.open(target).size
    assert width >= 240 and height > 30 * (width // 42)  # enlarged, above the text


def test_a_confidence_that_is_not_a_number_is_drawn_as_none(make_segmenter, photograph, tmp_path):
    """It was an IndexError."""
    model = make_segmenter()
    with torch.no_grad():
        model.convs[-1].bias.fill_(np.nan)
    (target,) = write_pictures(
        Predictor(model), photograph[0], tmp_path / "c.png", picture="confidence", progress=False
    ).written
    assert (np.asarray(Image.open(target))[:20, :20] == heat_colors(np.zeros(1))).all()


def test_where_pictures_are_written(photograph, tmp_path, monkeypatch):
    path, _ = photograph
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, truth = tmp_path / "pictures.png", tmp_path / "truth" / "street.png"
    frames = tmp_path / "drive.mp4"
    for existing in (folder, frames):
        existing.mkdir()
    for labels in (truth, path.with_name("truth.png")):
        save_labels(labels, np.zeros((2, 2), np.uint8))
    for output, target in (
        (tmp_path / "o.PNG", tmp_path / "o.PNG"),
        (folder, folder / "street.png"),
        (frames, frames / "street.png"),
        (tmp_path / "v1.2", tmp_path / "v1.2" / "street.png"),
        (f"{tmp_path}/val.pictures/", tmp_path / "val.pictures" / "street.png"),
        (f"{tmp_path}/new.png/", tmp_path / "new.png" / "street.png"),
        ("~/o.png", tmp_path / "o.png"),
        ("~nobody's.png", Path("~nobody's.png")),  # of no user's home
        ("a" * 300 + ".png", Path("a" * 300 + ".png")),  # which the one who writes to it will tell
    ):
        (job,) = plan_pictures(path, output, picture="side-by-side", ground_truth="~/truth")
        assert (job.target, job.truth) == (target, truth)
    with pytest.raises(UserError, match=r"ground truth '~none/street\.png' does not exist"):
        plan_pictures(path, folder, picture="side-by-side", ground_truth="~none")
    many = plan_pictures([path, path.with_name("truth.png")], tmp_path / "val.pictures")
    assert {job.target.parent for job in many} == {tmp_path / "val.pictures"}


def test_outputs_that_do_not_fit_are_refused_before_predicting(make_segmenter, photograph, tmp_path):
    path, array = photograph
    model = make_segmenter()
    predictor = Predictor(model)
    jpg = path.with_name("street.jpg")
    Image.fromarray(array).save(jpg)
    (tmp_path / "taken").write_text("")
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    truth = tmp_path / "truth" / "street.png"
    save_labels(truth, array[:, :, 0])
    cases = [
        (([path, jpg], tmp_path / "one.png"), {}, "2 images cannot all be written to"),
        (([path, jpg], tmp_path / "out"), {}, "would both be written to"),
        ((path, path.parent), {}, r"would overwrite '.*street\.png'"),
        ((path, path), {}, r"would overwrite '.*street\.png'"),
        ((path, link), {}, r"would overwrite '.*street\.png'"),
        ((link / "street.png", path.parent), {}, r"would overwrite '.*street\.png'"),
        (
            (jpg, truth.parent),
            {"ground_truth": truth.parent, "picture": "side-by-side"},
            r"would overwrite '.*truth/street\.png'",
        ),
        ((path, tmp_path / "taken"), {}, "is a file without an image suffix"),
        (
            (path, tmp_path / "one.MP4"),
            {},
            r"^pictures of images .* to '.*one\.MP4', a video: give a folder, or a \.png",
        ),
        (([path, jpg], tmp_path / "two.avi"), {}, r"to '.*two\.avi', a video"),
        (([path, jpg], tmp_path / "two.webm"), {}, r"to '.*two\.webm', a video"),
        (
            (path, tmp_path / "one.Jpgg"),
            {},
            r"'\S*one\.Jpgg': unknown image type '\.Jpgg', take \.png or \.jpg; .* give '\S*one\.Jpgg/'\.$",
        ),
        ((path, ""), {}, r"^the output has no name: give a folder, or a \.png\.$"),
        ((path, tmp_path / "one.psd"), {}, r"one\.psd': unknown image type '\.psd', take \.png or \.jpg"),
        ((path, tmp_path / "o.jpg"), {"picture": "labels"}, r"label maps are written as \.png"),
        ((path, tmp_path), {"picture": "drawing"}, "unknown picture 'drawing'"),
        ((path, tmp_path), {"picture": "attention"}, "go together"),
        ((path, tmp_path), {"pixel": (1, 1)}, "go together"),
        ((path, tmp_path), {"ground_truth": tmp_path}, "side-by-side pictures only"),
        (
            (path, tmp_path / "out"),
            {"ground_truth": tmp_path / "none", "picture": "side-by-side"},
            r"ground truth '.*none/street\.png' does not exist",
        ),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            write_pictures(predictor, *arguments, progress=False, **options)
    assert model.calls == []
    assert not (tmp_path / "out").exists()
