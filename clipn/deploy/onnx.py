"""Export a Detector as one ONNX file: image tower, class weights, scores and decisions, compared with torch."""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clipn.data.image_sets import find_images
from clipn.data.images import open_image
from clipn.data.prompts import class_names_of
from clipn.deploy.detector import Detector
from clipn.runtime.files import atomic_write
from clipn.scores import DECISIONS, SCORES

TOLERANCE = 1e-4  # of a cosine, and of a score
LARGEST = 1_900_000_000  # bytes in one file: Protocol Buffers are limited to 2 GB

OUTPUTS = ("logits_yes", "logits_no", "label", "score_CTW", "score_ATD", "is_ood_CTW", "is_ood_ATD")


class OnnxModel(nn.Module):
    """Image tower and head: preprocessed images [B, 3, H, W] -> OUTPUTS, the logits [B, C] and the rest [B]."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.model, self.head, self.scale = detector.model, detector.head, detector.scale

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits = self.head(self.model.encode_image(images), self.scale)
        scores = [SCORES[name](*logits) for name in ("CTW", "ATD")]
        return *logits, logits[0].argmax(dim=1), *scores, *(DECISIONS[name](*logits) for name in ("CTW", "ATD"))


def run_onnx(source: str, classes: str, out: str, check: str | None, **options: Any) -> None:
    """`clipn export onnx`: write the file, and print how far it differs from torch.

    check: a folder, of which up to 64 images are compared; None: random pixels. The rest is as in
    `Detector.from_pretrained`, with the names of `class_names_of(classes)`.
    """
    detector = Detector.from_pretrained(source, class_names_of(classes), device="cpu", **options)
    images, compared = None, "random pixels"
    if check:
        paths = sorted(find_images(Path(check)))
        if not paths:
            raise FileNotFoundError(f"--check={check!r}: no such folder, or no image in it")
        paths = paths[:: -(-len(paths) // 64)]  # from all parts of the folder
        images = torch.stack([detector.preprocess(open_image(path)) for path in paths])
        compared = f"{len(images)} images of {check}"
    cosine, score = export_onnx(detector, out, images).values()
    print(f"onnxruntime and torch on {compared}: cosines differ by {cosine:.1e}, scores by {score:.1e}")
    print(f"done: {out} ({Path(out).stat().st_size / 1e6:.1f} MB, {len(detector.class_names)} classes)")


def export_onnx(detector: Detector, path: str | Path, images: Tensor | None = None) -> dict[str, float]:
    """Write a detector on the CPU as an ONNX file with a variable batch size; returns the values of `compare`.

    images: [N, 3, H, W] preprocessed, for the comparison; None: random ones. Weights of 2 GB and more are written to
    PATH.data beside it. The metadata of the file hold class names, preprocessing and scale as JSON texts.

    Raises ValueError, and writes nothing, if a package is missing, torch cannot export the image tower, or onnxruntime
    and torch differ by more than TOLERANCE.
    """
    onnxruntime = _onnxruntime()
    module, path, size = OnnxModel(detector).eval(), Path(path), detector.model.preprocess["size"]
    example = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    program = _to_program(module, example)
    metadata = {
        "class_names": detector.class_names,
        "preprocess": detector.model.preprocess,
        "scale": detector.scale,
        "scores": "A higher score means in-distribution; is_ood is the threshold-free decision.",
    }
    texts = {f"clipn_{key}": json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    program.model.metadata_props.update(texts)
    large = sum(value.numel() * value.element_size() for value in module.state_dict().values()) > LARGEST
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        program.save(Path(folder) / path.name, external_data=large)
        session = onnxruntime.InferenceSession(Path(folder) / path.name, providers=["CPUExecutionProvider"])
        worst = compare(session, module, example if images is None else images)
        if max(worst.values()) > TOLERANCE:
            raise ValueError(f"{path}: not written: onnxruntime differs from torch by {worst}, above {TOLERANCE:g}")
        for file in sorted(Path(folder).iterdir(), reverse=True):  # PATH.data before PATH, which refers to it
            with atomic_write(path.parent / file.name) as target, open(file, "rb") as content:
                shutil.copyfileobj(content, target)
    return worst


@torch.inference_mode()
def compare(session: Any, module: OnnxModel, images: Tensor, batch_size: int = 16) -> dict[str, float]:
    """The largest differences of an onnxruntime session from torch, on [N, 3, H, W] images.

    "cosine": of the logits, divided by their scale. "score": of CTW and ATD, computed from the session's own logits,
    because near-tied classes may swap. NaN, or a label that is not the largest logit, counts as infinite.
    """
    cosines, scores = [], []
    for batch in images.split(batch_size):
        outputs = session.run(list(OUTPUTS), {"images": batch.numpy()})
        *logits, label, ctw, atd, _, _ = map(torch.from_numpy, outputs)
        cosines += [(a - b).abs().max() / module.scale for a, b in zip(logits, module(batch), strict=False)]
        scores += [(score - SCORES[name](*logits)).abs().max() for name, score in (("CTW", ctw), ("ATD", atd))]
        if not torch.equal(logits[0].gather(1, label[:, None]).squeeze(1), logits[0].amax(dim=1)):
            scores.append(torch.tensor(torch.inf))
    worst = {"cosine": cosines, "score": scores}
    return {name: float(torch.stack(values).nan_to_num(torch.inf, torch.inf).max()) for name, values in worst.items()}


def _to_program(module: OnnxModel, example: Tensor) -> "torch.onnx.ONNXProgram":
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs each constant that it does not fold
    try:
        return torch.onnx.export(
            module,
            (example,),
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    except RuntimeError as error:
        raise ValueError(f"torch cannot export this image tower: {str(error).strip().splitlines()[0]}") from error


def _onnxruntime() -> ModuleType:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install onnx onnxscript onnxruntime") from error
    return onnxruntime
