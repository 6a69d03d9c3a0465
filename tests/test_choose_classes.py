"""`clipn classes`: accuracy of each class folder on the held-out pairs whose captions name it."""

import pytest
import torch
from conftest import write_clipn
from helpers import image_bytes, write_shard

from clipn.data.images import open_image, val_transform
from clipn.evaluation.choose_classes import run_choice
from clipn.model.base import get_tokenizer
from clipn.model.weights import open_model

FOLDERS = ["car", "oak_tree", "tulip"]
CAPTIONS = ["a car", "one oak tree", "my car", "an oak tree and a car", "a tulip", "a boat"]


@pytest.mark.parametrize("template", ["{}", "a photo of a {}"])
def test_classes_are_chosen_by_accuracy_on_the_pairs_that_name_one(tmp_path, capsys, template):
    images = [image_bytes((40 * n, 255 - 40 * n, 90)) for n in range(len(CAPTIONS))]
    pairs = zip(images, CAPTIONS, strict=True)
    samples = {f"{n}": {"jpg": image, "txt": caption.encode()} for n, (image, caption) in enumerate(pairs)}
    checkpoint, shard = write_clipn(tmp_path / "base.pt"), write_shard(tmp_path / "pairs.tar", samples)
    for folder in FOLDERS:
        (tmp_path / "classes" / folder).mkdir(parents=True)
    run_choice(str(checkpoint), str(shard), str(tmp_path / "classes"), template, number=2)
    printed = capsys.readouterr().out

    model = open_model(str(checkpoint)).eval()
    read, tokenize = val_transform(model.preprocess), get_tokenizer(model.architecture)
    with torch.no_grad():
        texts = model.encode_text(tokenize([template.format(folder.replace("_", " ")) for folder in FOLDERS]))
        best = [int((texts @ model.encode_image(read(open_image(image))[None])[0]).argmax()) for image in images]
    hits = {"car": [best[0] == 0, best[2] == 0], "oak_tree": [best[1] == 1], "tulip": [best[4] == 2]}
    accuracy = {folder: sum(found) / len(found) for folder, found in hits.items()}
    rows = {row[0]: (float(row[1]), int(row[2])) for row in map(str.split, printed.splitlines()) if row[0] in FOLDERS}
    assert rows == {folder: (accuracy[folder], len(found)) for folder, found in hits.items()}
    assert f"over all: {sum(map(sum, hits.values())) / 4:.4f}" in printed
    chosen = sorted(sorted(FOLDERS, key=lambda name: (-accuracy[name], -len(hits[name])))[:2])
    assert f"classes: [{', '.join(chosen)}]" in printed
