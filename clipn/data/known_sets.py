"""Image sets that papers report on: their numbers, their place under data.root, where their authors publish them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class KnownSet:
    """A published image set. None means that nothing was published, or nothing that could be found."""

    title: str
    folder: str  # under data.root
    images: int
    classes: int | None  # number of class folders; None: flat, the images have no classes here
    example: str  # one image below the folder
    page: str  # of its authors
    terms: str | None = None
    note: str = ""  # what it is part of, and what others leave out of it
    archive: str | None = None  # the file to put in DIR/downloads where it cannot be fetched; None: torchvision's own
    url: str | None = None  # of the file, where no login is needed
    md5: str | None = None
    inside: str = ""  # the set's folder in the archive, where it has one
    labels: str | None = None  # the file in that folder that names each image's class
    subset: tuple[str, ...] = ()  # only these class folders belong to the set

    @property
    def layout(self) -> str:
        """Such as "47 class folders", or "flat"."""
        return f"{self.classes} class folders" if self.classes else "flat"


_MOS = "https://github.com/deeplearning-wisc/large_scale_ood"
_MOS_FILES = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"
_OPENOOD = "https://github.com/Jingkang50/OpenOOD"

# deeplearning-wisc/MCM, data/ImageNet100/class_list.txt
_IMAGENET_100 = """
    n01498041 n01518878 n01580077 n01601694 n01632458 n01689811 n01695060 n01775062 n01817953 n01843065 n01855032
    n01871265 n01910747 n01917289 n01944390 n02002556 n02033041 n02058221 n02088364 n02091635 n02095570 n02097130
    n02102318 n02105412 n02107312 n02111889 n02113186 n02113799 n02124075 n02128757 n02128925 n02134084 n02233338
    n02326432 n02480495 n02483362 n02484975 n02488702 n02493793 n02808304 n02825657 n02843684 n02871525 n02971356
    n03000684 n03016953 n03110669 n03125729 n03127925 n03133878 n03180011 n03187595 n03218198 n03272562 n03355925
    n03388549 n03394916 n03400231 n03404251 n03425413 n03447721 n03457902 n03594945 n03633091 n03666591 n03710721
    n03721384 n03840681 n03866082 n03877845 n03887697 n03895866 n03908714 n03929855 n03933933 n03935335 n03982430
    n03995372 n04037443 n04041544 n04090263 n04136333 n04147183 n04179913 n04239074 n04356056 n04371430 n04376876
    n04418357 n04461696 n04483307 n04550184 n04562935 n04606251 n06785654 n07614500 n07714571 n09399592 n09835506
    n13052670
"""

_IMAGENET = KnownSet(
    title="ImageNet-1K validation",
    folder="imagenet/val",
    images=50000,
    classes=1000,
    example="n01440764/ILSVRC2012_val_<number>.JPEG",
    page="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php",
    terms="registration at image-net.org",
    note="published as one heap, sorted here by ILSVRC2012_devkit_t12.tar.gz in DIR/downloads or by --mapping",
    archive="ILSVRC2012_img_val.tar",
    md5="29b22e2961454d5413ddabcf34fc5622",
)


def _mos(title: str) -> KnownSet:
    return KnownSet(
        title=f"{title} (MOS)",
        folder=title,
        images=10000,
        classes=None,
        example="images/<image>.jpg",
        page=_MOS,
        note=f"the 10 000 images that Huang and Li chose from {title}, of concepts that ImageNet-1K has not",
        archive=f"{title}.tar.gz",
        url=f"{_MOS_FILES}/{title}.tar.gz",
        inside=title,
    )


KNOWN_SETS: dict[str, KnownSet] = {
    "imagenet": _IMAGENET,
    "imagenet100": replace(
        _IMAGENET,
        title="ImageNet-100 of MCM",
        images=5000,
        classes=100,
        example="n01498041/ILSVRC2012_val_<number>.JPEG",
        note="100 class folders of ImageNet-1K validation, chosen in github.com/deeplearning-wisc/MCM; "
        "other papers use other hundreds",
        subset=tuple(_IMAGENET_100.split()),
    ),
    "inaturalist": _mos("iNaturalist"),
    "sun": _mos("SUN"),
    "places": _mos("Places"),
    "textures": KnownSet(
        title="Textures (DTD)",
        folder="dtd/images",
        images=5640,
        classes=47,
        example="banded/banded_<number>.jpg",
        page="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        terms="for research",
        note="all of DTD, as in MOS; ViM leaves out bubbly, honeycombed, cobwebbed and spiralled (eval: exclude)",
        archive="dtd-r1.0.1.tar.gz",
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        md5="fff73e5086ae6bdbea199a49dfb8a4c1",
        inside="dtd/images",
    ),
    "imagenet-o": KnownSet(
        title="ImageNet-O",
        folder="imagenet-o",
        images=2000,
        classes=200,
        example="n01443537/<image>.JPEG",
        page="https://github.com/hendrycks/natural-adv-examples",
        note="a folder is named after the ImageNet class that its images are mistaken for",
        archive="imagenet-o.tar",
        url="https://people.eecs.berkeley.edu/~hendrycks/imagenet-o.tar",
        md5="86bd7a50c1c4074fb18fc5f219d6d50b",
        inside="imagenet-o",
    ),
    "openimage-o": KnownSet(
        title="OpenImage-O",
        folder="openimage_o",
        images=17632,
        classes=None,
        example="images/<image>.jpg",
        page="https://github.com/haoqiwang/vim",
        note=f"a file list of OpenImages-V3's test set; {_OPENOOD} offers the images as openimage_o.zip (Google Drive) "
        "and tests on 15 869 of them, after 1 763 for validation",
        archive="openimage_o.zip",
        inside="openimage_o",
    ),
    "ninco": KnownSet(
        title="NINCO",
        folder="NINCO/NINCO_OOD_classes",
        images=5879,
        classes=64,
        example="<class>/<image>",
        page="https://github.com/j-cb/NINCO",
        note="its authors average over the 64 classes; here all images count alike",
        archive="NINCO_all.tar.gz",
        url="https://zenodo.org/record/8013288/files/NINCO_all.tar.gz",
        md5="b9ffae324363cd900a81ce3c367cd834",
        inside="NINCO/NINCO_OOD_classes",
    ),
    "ssb-hard": KnownSet(
        title="SSB-hard",
        folder="ssb_hard",
        images=49000,
        classes=980,
        example="<wnid>/<image>",
        page="https://github.com/sgvaze/SSB",
        terms="those of ImageNet-21K",
        note=f"classes of ImageNet-21K-P; {_OPENOOD} offers the images as ssb_hard.zip (Google Drive)",
        archive="ssb_hard.zip",
        inside="ssb_hard",
    ),
    "cifar10": KnownSet(
        title="CIFAR-10 test",
        folder="cifar10/test",
        images=10000,
        classes=10,
        example="airplane/<number>.png",
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
    ),
    "cifar100": KnownSet(
        title="CIFAR-100 test",
        folder="cifar100/test",
        images=10000,
        classes=100,
        example="apple/<number>.png",
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
    ),
    "svhn": KnownSet(
        title="SVHN test",
        folder="svhn/test",
        images=26032,
        classes=10,
        example="0/<number>.png",
        page="http://ufldl.stanford.edu/housenumbers/",
        terms="non-commercial",
        url="http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
        md5="eb5a983be6a315427106f1b164d9cef3",
    ),
    "tiny-imagenet": KnownSet(
        title="Tiny ImageNet validation",
        folder="tiny-imagenet-200/val",
        images=10000,
        classes=200,
        example="n01443537/val_<number>.JPEG",
        page="http://cs231n.stanford.edu/",
        note="some of its classes are CIFAR's too: leave them out with exclude where that matters",
        archive="tiny-imagenet-200.zip",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        md5="90528d7ca1a48142e341f4ef8d21d0de",
        inside="tiny-imagenet-200/val",
        labels="val_annotations.txt",
    ),
    "lsun": KnownSet(
        title="LSUN test, resized (ODIN)",
        folder="LSUN_resize",
        images=10000,
        classes=None,
        example="<number>.jpg",
        page="https://github.com/facebookresearch/odin",
        note="32 pixels wide, as made for ODIN; its cropped twin is another set",
        archive="LSUN_resize.tar.gz",
        url="https://www.dropbox.com/s/raw/moqh2wh8696c3yl/LSUN_resize.tar.gz",
        md5="278b7b31c8cb7e804a1465a8ce03a2dc",
        inside="LSUN_resize",
    ),
}


def known_set(name: str) -> KnownSet:
    """A row of the table. Raises ValueError that names the choices for an unknown one."""
    if name not in KNOWN_SETS:
        raise ValueError(f"unknown image set {name!r}; the known ones are: {', '.join(KNOWN_SETS)}")
    return KNOWN_SETS[name]


def expected_tree(name: str, path: str | Path) -> str:
    """One line: what the set has to look like at `path`, and how to get it."""
    known = known_set(name)
    folders = f" in {known.layout}" if known.classes else ""
    does = "fetches it" if known.url else "unpacks and sorts it, or says what that takes"
    script = f"python scripts/prepare_data.py {name} --root DIR {does}"
    return f"{known.title} is {known.images} images{folders}, {path}/{known.example}; {script}; see {known.page}"
