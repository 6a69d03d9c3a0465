"""Real photos: archives with one folder per class and captioned pairs, unpacked once, and scikit-learn's digits."""

import json
import tarfile
from pathlib import Path

from clipn.data.prompts import caption_labeller
from clipn.runtime.files import atomic_write, extract_tar
from clipn.toy.generate import write_digits

MARKER = "photos.json"  # written last: a folder without it is incomplete


def unpack_photos(source: str | Path, root: str | Path, image_size: int = 32) -> Path:
    """Unpack *_test.tar and *_val.tar of `source`, <name>/<class>/<image>, into `root`, and write root/digits.

    Images of pairs-*.tar, without the last, which is held out, become root/cifar100_train/<class>/<image>.jpg if their
    captions name one class of cifar100_test. Raises FileNotFoundError for a `source` without test or validation
    archives, ValueError when `root` was unpacked from something else.
    """
    source, root = Path(source), Path(root)
    archives = sorted([*source.glob("*_test.tar"), *source.glob("*_val.tar")])
    if not archives:
        where = f"world.source={str(source)!r}: no such folder, or no *_test.tar or *_val.tar in it"
        raise FileNotFoundError(f"{where}; `clipn prepare photos` makes data/photos")
    shards = sorted(source.glob("pairs-*.tar"))[:-1]
    sizes = {archive.name: archive.stat().st_size for archive in [*archives, *shards]}
    marker = root / MARKER
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")) != sizes:
            other = f"from other archives than {source}'s, or by an older version"
            raise ValueError(f"{root} was unpacked {other}; delete it, or set world.root")
        return root
    root.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        with tarfile.open(archive) as tar:
            extract_tar(tar, root)
    for shard in shards:
        _unpack_training_images(shard, root)
    write_digits(root / "digits", image_size, images_per_class=50, seed=0)
    with atomic_write(marker) as file:
        file.write(json.dumps(sizes).encode())
    return root


def _unpack_training_images(shard: Path, root: Path) -> None:
    """Write the images of a shard whose captions name one class of cifar100_test, as they are."""
    folders = sorted(path.name for path in root.glob("cifar100_test/*"))
    label_of = caption_labeller([folder.replace("_", " ") for folder in folders])
    with tarfile.open(shard) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    for name in [name for name in files if name.endswith(".txt")]:
        label, image = label_of(files[name].decode()), str(Path(name).with_suffix(".jpg"))
        if label is not None and image in files:
            path = root / "cifar100_train" / folders[label] / image
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[image])
