"""ONNX: the image tower and the classes' weights as one file for onnxruntime, checked against torch."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clipn.model.clipn import CLIPN
from clipn.model.head import Head
from clipn.runtime.files import atomic_write
from clipn.scores import DECISIONS, SCORES

TOLERANCE = 1e-4  # of a cosine, and of a score
LARGEST = 1_900_000_000  # bytes: a file of Protocol Buffers holds 2 GB, so larger weights lie in a file beside it

OUTPUTS = ("logits_yes", "logits_no", "label", "score_CTW", "score_ATD", "is_ood_CTW", "is_ood_ATD")


class OnnxModel(nn.Module):
    """Image tower and head: preprocessed images [B, 3, H, W] -> OUTPUTS, the logits [B, C] and the rest [B]."""

    def __init__(self, model: CLIPN, head: Head, scale: float = 100.0) -> None:
        super().__init__()
        self.model, self.head, self.scale = model, head, scale

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits = self.head(self.model.encode_image(images), self.scale)
        scores = [SCORES[name](*logits) for name in ("CTW", "ATD")]
        return *logits, logits[0].argmax(dim=1), *scores, *(DECISIONS[name](*logits) for name in ("CTW", "ATD"))


def export_onnx(
    model: CLIPN,
    head: Head,
    class_names: Sequence[str],
    path: str | Path,
    scale: float = 100.0,
    images: Tensor | None = None,
) -> dict[str, float]:
    """Write model and head, both on the CPU, as an ONNX file that takes any number of images at once.

    images: [N, 3, H, W] preprocessed, on which the file is compared with torch before it is kept; none: random ones.
    Returns the largest differences: {"cosine", "score"}. Weights of 2 GB and more go into PATH.data beside it.

    Raises ValueError where a package is missing, torch cannot export the image tower, or onnxruntime and torch differ
    by more than TOLERANCE; then nothing is written.
    """
    onnxruntime = _onnxruntime()
    if scale <= 0:
        raise ValueError(f"scale={scale}: expected a positive number")
    judge, path = OnnxModel(model, head, scale).eval(), Path(path)
    size = model.preprocess["size"]
    example = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    program = _program(judge, example)
    program.model.metadata_props.update(_metadata(model, class_names, scale))
    large = sum(value.numel() * value.element_size() for value in judge.state_dict().values()) > LARGEST
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        program.save(Path(folder) / path.name, external_data=large)
        session = onnxruntime.InferenceSession(Path(folder) / path.name, providers=["CPUExecutionProvider"])
        found = compare(session, judge, example if images is None else images)
        if max(found.values()) > TOLERANCE:
            raise ValueError(f"{path}: not written: onnxruntime differs from torch by {found}, above {TOLERANCE:g}")
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the model that names them
            with atomic_write(path.parent / file.name) as whole, open(file, "rb") as made:
                shutil.copyfileobj(made, whole)
    return found


@torch.inference_mode()
def compare(session: Any, judge: OnnxModel, images: Tensor, batch_size: int = 16) -> dict[str, float]:
    """The largest differences of an onnxruntime session from torch, on [N, 3, H, W] images.

    "cosine": of the logits over their scale. "score": of CTW and ATD, given the session's own logits, since a class
    that wins by a hair may lose by one. NaN anywhere, or another label than the largest logit, counts as infinite.
    """
    worst = {"cosine": 0.0, "score": 0.0}
    for part in images.split(batch_size):
        values = session.run(list(OUTPUTS), {"images": part.numpy()})
        found = dict(zip(OUTPUTS, map(torch.from_numpy, values), strict=True))
        logits = found["logits_yes"], found["logits_no"]
        cosines = [(a - b).abs().max() / judge.scale for a, b in zip(logits, judge(part), strict=False)]
        scores = [(found[f"score_{name}"] - SCORES[name](*logits)).abs().max() for name in ("CTW", "ATD")]
        chosen = logits[0].gather(1, found["label"][:, None]).squeeze(1)
        scores += [] if torch.equal(chosen, logits[0].amax(dim=1)) else [torch.tensor(torch.inf)]
        for name, differences in (("cosine", cosines), ("score", scores)):
            worst[name] = max(worst[name], float(torch.stack(differences).nan_to_num(torch.inf, torch.inf).max()))
    return worst


def _program(judge: OnnxModel, example: Tensor) -> torch.onnx.ONNXProgram:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it notes each constant that it does not fold
    try:
        return torch.onnx.export(
            judge,
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


def _metadata(model: CLIPN, class_names: Sequence[str], scale: float) -> dict[str, str]:
    """What a user of the file alone needs, as JSON texts."""
    facts = {
        "class_names": list(class_names),
        "preprocess": model.preprocess,
        "scale": scale,
        "scores": "A higher score means in-distribution; is_ood is the threshold-free decision.",
    }
    return {f"clipn_{key}": json.dumps(value, ensure_ascii=False) for key, value in facts.items()}


def _onnxruntime() -> ModuleType:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install onnx onnxscript onnxruntime") from error
    return onnxruntime
