"""Weights that others have published, with their public addresses.

`sha256` is what is publicly known of a file's SHA-256: its first eight digits, which mmsegmentation, torchvision and
timm put into the names of their files. The official CCNets (Google Drive) and MIT's ImageNet weights have none.
"""

from dataclasses import dataclass
from urllib.parse import urlsplit

from ccnet_d2.errors import UserError

from .nearest import nearest


@dataclass(frozen=True)
class Published:
    """Weights on the internet.

    Attributes:
        name: as `ccnet://NAME` takes it; that of a run for a trained model.
        address: where the file is.
        layout: whose names the weights have, see `ccnet_d2.checkpoint.convert.LAYOUTS`.
        sha256: first digits of the file's SHA-256, "" where none are public.
        file: the file's name in a local folder or mirror.
        source: whose weights they are.
    """

    name: str
    address: str
    layout: str
    sha256: str
    file: str
    source: str

    @property
    def is_run(self) -> bool:
        """Whether they are a whole trained model, not an ImageNet backbone."""
        return not self.name.startswith("imagenet/")


_MMSEG = "https://download.openmmlab.com/mmsegmentation/v0.5/ccnet/"
_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
_MIT = "http://sceneparsing.csail.mit.edu/model/pretrained_resnet/"

# Config, and the file in mmsegmentation's model zoo: configs/ccnet/metafile.yaml.
_MMSEG_RUNS = (
    (
        "cityscapes/ccnet_R_50_D8_512x1024_40k",
        "ccnet_r50-d8_512x1024_40k_cityscapes_20200616_142517-4123f401",
    ),
    (
        "cityscapes/ccnet_R_101_D8_512x1024_40k",
        "ccnet_r101-d8_512x1024_40k_cityscapes_20200616_142540-a3b84ba6",
    ),
    ("cityscapes/ccnet_R_50_D8_769x769_40k", "ccnet_r50-d8_769x769_40k_cityscapes_20200616_145125-76d11884"),
    (
        "cityscapes/ccnet_R_101_D8_769x769_40k",
        "ccnet_r101-d8_769x769_40k_cityscapes_20200617_101428-4f57c8d0",
    ),
    (
        "cityscapes/ccnet_R_50_D8_512x1024_80k",
        "ccnet_r50-d8_512x1024_80k_cityscapes_20200617_010421-869a3423",
    ),
    (
        "cityscapes/ccnet_R_101_D8_512x1024_80k",
        "ccnet_r101-d8_512x1024_80k_cityscapes_20200617_203935-ffae8917",
    ),
    ("cityscapes/ccnet_R_50_D8_769x769_80k", "ccnet_r50-d8_769x769_80k_cityscapes_20200617_010421-73eed8ca"),
    (
        "cityscapes/ccnet_R_101_D8_769x769_80k",
        "ccnet_r101-d8_769x769_80k_cityscapes_20200618_011502-ad3cd481",
    ),
    ("ade20k/ccnet_R_50_D8_512x512_80k", "ccnet_r50-d8_512x512_80k_ade20k_20200615_014848-aa37f61e"),
    ("ade20k/ccnet_R_101_D8_512x512_80k", "ccnet_r101-d8_512x512_80k_ade20k_20200615_014848-1f4929a3"),
    ("ade20k/ccnet_R_50_D8_512x512_160k", "ccnet_r50-d8_512x512_160k_ade20k_20200616_084435-7c97193b"),
    ("ade20k/ccnet_R_101_D8_512x512_160k", "ccnet_r101-d8_512x512_160k_ade20k_20200616_000644-e849e007"),
    ("voc12/ccnet_R_50_D8_512x512_20k", "ccnet_r50-d8_512x512_20k_voc12aug_20200617_193212-fad81784"),
    ("voc12/ccnet_R_101_D8_512x512_20k", "ccnet_r101-d8_512x512_20k_voc12aug_20200617_193212-0007b61d"),
    ("voc12/ccnet_R_50_D8_512x512_40k", "ccnet_r50-d8_512x512_40k_voc12aug_20200613_232127-c2a15f02"),
    ("voc12/ccnet_R_101_D8_512x512_40k", "ccnet_r101-d8_512x512_40k_voc12aug_20200613_232127-c30da577"),
)
# Config, and the file's id on Google Drive: README of the official repository.
_OFFICIAL_RUNS = (
    ("cityscapes/ccnet_official_r1_R_101_D8_769x769_60k", "13j06I4e50T41j_2HQl4sksrLZihax94L", "r1"),
    ("cityscapes/ccnet_official_R_101_D8_769x769_60k", "1IxXm8qxKmfDPVRtT8uuDNEvSQsNVTfLC", "r2"),
    ("cityscapes/ccnet_ohem_R_101_D8_769x769_60k", "1eiX1Xf1o16DvQc3lkFRi4-Dk7IBVspUQ", "r2_ohem"),
)
# ImageNet weights whose files carry the digits in their names.
_IMAGENET = (
    (
        "resnet18_v1c",
        "https://download.openmmlab.com/pretrain/third_party/resnet18_v1c-b5776b93.pth",
        "mmseg",
    ),
    (
        "resnet50_v1c",
        "https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth",
        "mmseg",
    ),
    (
        "resnet101_v1c",
        "https://download.openmmlab.com/pretrain/third_party/resnet101_v1c-e67eebb6.pth",
        "mmseg",
    ),
    ("resnet18", "https://download.pytorch.org/models/resnet18-f37072fd.pth", "torchvision"),
    ("resnet34", "https://download.pytorch.org/models/resnet34-b627a593.pth", "torchvision"),
    ("resnet50", "https://download.pytorch.org/models/resnet50-0676ba61.pth", "torchvision"),
    ("resnet101", "https://download.pytorch.org/models/resnet101-63fe2227.pth", "torchvision"),
    (
        "resnet50_v1s",
        "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"
        "gluon_resnet50_v1s-1762acc0.pth",
        "timm",
    ),
    (
        "resnet101_v1s",
        "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"
        "gluon_resnet101_v1s-60fe0cc1.pth",
        "timm",
    ),
)


def _digits(file: str) -> str:
    return file.removesuffix(".pth").rpartition("-")[2]


def _table() -> dict[str, Published]:
    entries = []
    for name, stem in _MMSEG_RUNS:
        folder = stem.rsplit("_", 2)[0]  # without date and time
        file = f"{stem}.pth"
        entries.append(
            Published(name, f"{_MMSEG}{folder}/{file}", "mmseg", _digits(file), file, "mmsegmentation")
        )
    for name, drive_id, short in _OFFICIAL_RUNS:
        file = f"ccnet_official_{short}.pth"
        entries.append(Published(name, _DRIVE + drive_id, "official", "", file, "official code"))
    for short, address, layout in _IMAGENET:
        file = urlsplit(address).path.rpartition("/")[2]
        entries.append(Published(f"imagenet/{short}", address, layout, _digits(file), file, layout))
    for depth in (50, 101):
        file = f"resnet{depth}-imagenet.pth"
        entries.append(Published(f"imagenet/resnet{depth}_mit", _MIT + file, "official", "", file, "MIT"))
    return {entry.name: entry for entry in entries}


PUBLISHED: dict[str, Published] = _table()
"""By name."""


def published(name: str, *, is_run: bool = False) -> Published:
    """The published weights of a name, which may end in ".py" as a run's does.

    Args:
        name: of weights.
        is_run: that there is a run of that name is known.

    Raises:
        UserError: there are none of that name; the message names the nearest ones, unless it is that of a run.
    """
    entry = PUBLISHED.get(name.removesuffix(".py").removeprefix("configs/"))
    if entry is None:
        lists = "`python -m ccnet_d2.model_zoo` lists all."
        if is_run:
            raise UserError(
                f"There are no published weights for {name!r}, a run that has to be trained first: {lists}"
            )
        raise UserError(f"There are no published weights for {name!r}: {nearest(name, PUBLISHED, lists)}")
    return entry
