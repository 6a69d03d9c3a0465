"""Real photos: archives with one folder per class, unpacked once, and scikit-learn's digits beside them."""

import json
import tarfile
from pathlib import Path

from clipn.runtime.files import atomic_write
from clipn.toy.generate import write_digits

MARKER = "photos.json"  # written last: a folder without it is incomplete


def unpack_photos(source: str | Path, root: str | Path, image_size: int = 32) -> Path:
    """Unpack *_test.tar and *_val.tar of `source`, <name>/<class>/<image>, into `root`, and write root/digits.

    Raises FileNotFoundError for a `source` without them, ValueError when `root` was unpacked from something else.
    """
    source, root = Path(source), Path(root)
    archives = sorted([*source.glob("*_test.tar"), *source.glob("*_val.tar")])
    if not archives:
        raise FileNotFoundError(f"world.source={str(source)!r}: no such folder, or no *_test.tar or *_val.tar in it")
    sizes = {archive.name: archive.stat().st_size for archive in archives}
    marker = root / MARKER
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")) != sizes:
            raise ValueError(f"{root} was unpacked from other archives than {source}'s; delete it, or set world.root")
        return root
    root.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    write_digits(root / "digits", image_size, images_per_class=50, seed=0)
    with atomic_write(marker) as file:
        file.write(json.dumps(sizes).encode())
    return root
