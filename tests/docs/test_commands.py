"""What the documents say works: every command is understood by its program, and what takes no minutes is run."""

import argparse
import ast
import hashlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg, instantiate

from ccnet_d2.engine import apply_overrides
from ccnet_d2.model_zoo import PUBLISHED, config_path, get_config
from ccnet_d2.modeling import add_ccnet_config
from tests.checkpoint.source_networks import MMSegCCNet, OfficialCCNet, ResNetV1c, randomize
from tests.docs.documents import DOCUMENTS, ROOT, Command, blocks, commands, python_blocks
from tests.scripts import load_script

COMMANDS = list(commands())
BLOCKS = python_blocks()
PLACEHOLDERS = {"CONFIG": "camvid/ccnet_R_18_D8_half.py", "OUTPUT": "output"}

# A few steps of a small model instead of a training.
ONE_STEP = [
    "train.max_iter=1",
    "train.device=cpu",
    "train.num_pictures=1",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
]
# Put behind the reader's own config.
SMALL = """
model.backbone.depth = 18
model.backbone.norm = model.sem_seg_head.norm = "BN"
model.sem_seg_head.channels, model.sem_seg_head.aux_channels = 16, 8
dataloader.train.mapper.augmentations[0].crop_size = [33, 41]
train.init_checkpoint = ""
"""


@dataclass(frozen=True)
class Rule:
    """How commands that match a pattern are run: with more arguments, or not at all for a reason."""

    pattern: str
    more: tuple[str, ...] = ()
    reason: str = ""


# The first that matches counts; a command that none matches is run as it stands.
RULES = (
    Rule(
        r"^make ",
        reason="sets up an environment and trains or tests for minutes; CI runs make lint and make test",
    ),
    Rule(r"^pip install|^git clone|csCreateTrainIdLabelImgs", reason="needs a network"),
    Rule(r"^export |^mv ", reason="is about the reader's own folders"),
    Rule(r"--num-gpus", reason="needs several GPUs"),
    Rule(
        r"ccnet://|ccnet_d2\.model_zoo imagenet",
        reason="downloads; tests/model_zoo does the same from a server here",
    ),
    Rule(r"\bCONFIG\b", reason="a pattern, which other documents fill in"),
    Rule(r"overfit", reason="trains for minutes; tests/integration/test_detection.py trains it"),
    Rule(r"compare_runs", reason="trains for minutes; tests/engine/test_compare_runs.py has it in small"),
    Rule(
        r"(train_net|demo)\.py.*ranet_",
        reason="trains for minutes, or takes what was trained; tests/integration/test_ranet_run.py and "
        "tests/inference/test_region_pictures.py have both in small",
    ),
    Rule(r"attention_viewer", reason="serves until it is stopped; tests/tools/test_attention_viewer.py"),
    Rule(r"benchmark_", reason="measures for minutes; run by tests/tools"),
    Rule(r"check_cuda_op", reason="needs a GPU"),
    Rule(
        r"demo\.py.*large\.png",
        reason="takes a trained model and minutes; tests/inference/test_sliding_window.py bounds the memory in small",
    ),
    Rule(r"clips|ccnet3d|--video-input", reason="needs a video; tests/tools/test_demo_video.py draws one"),
    Rule(
        r"tools/prepare_",
        reason="needs published files; tests/data/datasets/test_mat_sets.py has them in small",
    ),
    Rule(
        r"camvid_original|ce2p_ccl",
        reason="trains for minutes; tests/integration/test_lip.py has it in small",
    ),
    Rule(r"train_net.*(my_street\.py|camvid/).*--eval-only", tuple(ONE_STEP[1:])),
    Rule(r"train_net.*my_street\.py", (*ONE_STEP, "train.output_dir=output/my_street")),
    Rule(r"train_net.*camvid/", tuple(ONE_STEP)),
    Rule(r"demo\.py.*(my_street\.py|camvid/)", ("--opts", "train.device=cpu")),
    Rule(
        r"check_dataset\.py camvid|my_run\.py",
        reason="reads the whole set; tests/tools/test_check_dataset.py",
    ),
    Rule(r"make_synthetic_dataset\.py$", ("--train-images", "4", "--val-images", "2")),
)

# Python that is not run as it stands: what is put before it, or why it is not run.
PREAMBLES = {
    "add_rcca(model)": """
from detectron2 import model_zoo
from detectron2.modeling import build_model
cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
cfg.MODEL.DEVICE = "cpu"
""",
    "bottom_up._target_": """
from ccnet_d2.model_zoo import get_config
model = get_config("coco/mask_rcnn_R_50_FPN_1x.py").model
""",
    "augmentations[0].crop_size": "from my_street import dataloader\n",
    "without-classifier": "from my_street import train\n",
}
NOT_RUN = {
    "compile=True": "compiles for minutes; tests/modeling/test_compilation.py",
    "trained=True": "downloads; tests/model_zoo does the same from a server here",
    'loadmat(mat)["GTcls"]': "run by tests/data/datasets/test_public_layouts.py",
    "annotations_detectron2": "run by tests/data/datasets/test_public_layouts.py",
    "L(build_detection_train_loader)": "run by tests/data/datasets/test_folder.py",
    "L(ClipSemSegEvaluator)": "a part of a config; configs/common/data/camvid_clips.py has it",
}


class Parsed(Exception):
    """Carries what a program made of its command line."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        self.namespace = namespace


def rule_of(command: Command) -> Rule:
    return next((rule for rule in RULES if re.search(rule.pattern, command.text)), Rule(""))


def main_of(words: list[str]):
    """The `main` of a script or of a module's command line."""
    if words[:2] == ["python", "-m"]:
        name = words[2]
        package = importlib.util.find_spec(name)
        assert package is not None, f"there is no module {name}"
        is_package = package.submodule_search_locations is not None
        return importlib.import_module(f"{name}.__main__" if is_package else name).main, words[3:]
    script = words[1] if words[0] == "python" else f"projects/CCNet/{words[0]}"
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    return load_script(path).main, words[2:] if words[0] == "python" else words[1:]


def parsed(words: list[str], monkeypatch) -> argparse.Namespace:
    """What the program's own parser makes of a command; nothing after the parsing is run."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    main, arguments = main_of([PLACEHOLDERS.get(word, word) for word in words])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as raised:
        main(arguments)
    return raised.value.namespace


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty folder with the repository's folders, and the file that a document describes."""
    for name in ("projects", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    own = next(block.text for block in BLOCKS if "_run = get_config" in block.text)
    (tmp_path / "my_street.py").write_text(own)
    (tmp_path / "my_run.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_check():
    assert {"README.md", "docs/convert.md", "docs/train-on-your-own-data.md"} <= set(DOCUMENTS)
    assert len(COMMANDS) > 20 and len(BLOCKS) > 8


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_understood(command, workspace, monkeypatch):
    words = command.words
    if not words or words[0] in ("pip", "git", "mv", "cp", "export", "csCreateTrainIdLabelImgs", "apt"):
        assert rule_of(command).reason
        return
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        target, *variables = words[1:]
        assert re.search(rf"^{target}:.*## ", makefile, flags=re.MULTILINE)
        assert all(
            re.search(rf"^#   {name.split('=')[0]}=", makefile, flags=re.MULTILINE) for name in variables
        )
        return
    args = parsed(words, monkeypatch)
    config = getattr(args, "config_file", None)
    if config:
        assert config_path(config).is_file()
        if config.endswith(".py"):
            # An unknown key is an error, and so is an option among them.
            apply_overrides(get_config(config), list(getattr(args, "opts", None) or []))
    for word in words:
        if word.startswith("ccnet://"):
            assert word.removeprefix("ccnet://") in PUBLISHED


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_python_is_whole_and_imports_what_exists(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ccnet_d2"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_yaml_is_understood():
    for block in blocks():
        if block.language == "yaml":
            cfg = get_cfg()
            add_ccnet_config(cfg)
            cfg.merge_from_other_cfg(type(cfg)(yaml.safe_load(block.text)))


def test_languages_are_known():
    assert {block.language for block in blocks()} <= {"", "bash", "sh", "python", "yaml", "text"}


def test_reasons_name_what_exists():
    for reason in (*NOT_RUN.values(), *(rule.reason for rule in RULES)):
        for path in re.findall(r"\b(?:tests|configs)/[\w./]+\b", reason):
            assert (ROOT / path).exists(), path


def test_links_and_pictures_lead_somewhere():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("https://", "http://")):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / document).parent / path if path else ROOT / document
            assert file.exists(), f"{document}: {target}"
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{document}: {target}"


def anchors(text: str) -> set[str]:
    """Those that GitHub gives a document's headings."""
    outside = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_table_of_the_sources_is_whole():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## Where things are")[2].partition("\n\nImports")[0]
    package = ROOT / "ccnet_d2"
    for path in package.iterdir():
        if path.name != "__init__.py" and (path.suffix == ".py" or (path / "__init__.py").is_file()):
            assert re.search(rf"[`{{,/]{re.escape(path.name)}[`}},]", table), path.name


def test_report_shown_is_the_one_printed(tmp_path):
    """The example of docs/convert.md, word by word."""
    from ccnet_d2.checkpoint.convert import convert_weights

    (shown,) = (b.text for b in blocks() if b.document == "docs/convert.md" and b.language == "text")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MMSegCCNet().state_dict().items()}
    text = convert_weights({name: torch.zeros(shape) for name, shape in shapes.items()}).text()
    assert f": {text}\nwritten to" in shown


# What documents are about: data sets, files of weights and images.


def draw(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)


def draw_world(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def image() -> np.ndarray:
        return rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)

    def labels(classes: int) -> np.ndarray:
        blocks = rng.permutation(np.arange(12 * 16) % classes).astype(np.uint8).reshape(12, 16)
        return np.kron(blocks, np.ones((5, 5), np.uint8))

    for split in ("train", "val", "test"):
        for i in range(2):
            draw(folder / f"data/camvid/{split}/0001TP_{i:06d}.png", image())
            draw(folder / f"data/camvid/{split}annot/0001TP_{i:06d}.png", labels(11))
            draw(folder / f"my_street/images/{split}/{i}.png", image())
            draw(folder / f"my_street/labels/{split}/{i}.png", labels(3))
    draw(folder / "IMAGES/a.png", image())
    draw(folder / "street.png", image())


def save_published_files(folder: Path) -> None:
    name = "ccnet_r50-d8_512x1024_40k_cityscapes_20200616_142517-4123f401.pth"
    torch.save({"state_dict": MMSegCCNet(channels=64, aux=8).state_dict(), "meta": {}}, folder / name)
    torch.save(
        randomize(OfficialCCNet((3, 4, 6, 3), channels=64)).state_dict(), folder / "CS_scenes_60000.pth"
    )
    torch.save({"state_dict": ResNetV1c().state_dict()}, folder / "resnet50_v1c-2cccc1ad.pth")


def save_trained_model(path: Path) -> None:
    torch.manual_seed(0)
    model = instantiate(get_config("camvid/ccnet_R_18_D8_half.py").model)
    model.sem_seg_head.context.gamma.data.fill_(0.5)
    path.parent.mkdir()
    torch.save({"model": model.state_dict()}, path)


def run(words: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        words,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_runs(document, workspace):
    """Commands and code of a document in their order, in one folder, as `RULES` and `PREAMBLES` say."""
    draw_world(workspace)
    own = workspace / "my_street.py"
    own.write_text(own.read_text() + SMALL)
    if document == "docs/convert.md":
        save_published_files(workspace)
    if document == "docs/deploy.md":  # what another document has trained
        pytest.importorskip("onnxruntime")
        save_trained_model(workspace / "output/model_final.pth")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{workspace}",
        "DETECTRON2_DATASETS": str(workspace / "data"),
        "CCNET_D2_CACHE": str(workspace / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    steps: list[tuple[int, list[str]]] = []
    for command in COMMANDS:
        rule = rule_of(command)
        if command.document == document and not rule.reason:
            script = (
                command.words[1] if command.words[0] == "python" else f"projects/CCNet/{command.words[0]}"
            )
            start = [sys.executable, script, *command.words[2 if command.words[0] == "python" else 1 :]]
            steps.append((command.line, [*start, *rule.more]))
    for block in BLOCKS:
        if block.document == document and not any(key in block.text for key in NOT_RUN):
            preamble = next((before for key, before in PREAMBLES.items() if key in block.text), "")
            digest = hashlib.sha256(block.text.encode()).hexdigest()[:8]
            file = workspace / f"block_{digest}.py"
            file.write_text(preamble + block.text)
            steps.append((block.line, [sys.executable, str(file)]))
    for _, words in sorted(steps):
        run(words, environment)


@pytest.mark.slow
def test_api_reference(tmp_path):
    """Every name that a package exports is on its page, with a text."""
    pytest.importorskip("pdoc")
    run(
        [sys.executable, str(ROOT / "projects/CCNet/tools/build_api_docs.py"), "--output", str(tmp_path)],
        {**os.environ},
    )
    for name in ("ops", "layers", "losses", "modeling", "inference", "model_zoo", "checkpoint/convert"):
        page = (tmp_path / f"ccnet_d2/{name}.html").read_text(encoding="utf-8")
        module = importlib.import_module(f"ccnet_d2.{name.replace('/', '.')}")
        assert ":paper:" not in page, f"{name}: a title of a paper as it stands in the source"
        for exported in module.__all__:
            assert f'id="{exported}"' in page or f"{exported}.html" in page, f"{name}: {exported}"
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for path, page in pages.items():
        for target in re.findall(r'<a [^>]*href="([^":$]+)"', page):
            file, _, anchor = target.partition("#")
            found = pages[(path.parent / file).resolve() if file else path]
            assert not anchor or f'id="{anchor}"' in found, f"{path.name}: {target}"
