"""The settings of an evaluation and of its methods: dataclasses that check their values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from clipn.config.checks import PRECISIONS, Section

SOLVERS = ("adam", "lbfgs")
ATTENTIONS = ("cosine", "gradient")
TAG_SCORES = ("cosine", "cosine*tag")
UNTAGGED = ("keep", "reject")
DECISIONS = ("CTW", "ATD")


@dataclass
class EvalConfig(Section):
    """The image sets and scores of an evaluation; `id: null` for none."""

    id: Any = None  # a folder, or {name: folder}, or {name: {path, classes | exclude}}
    ood: Any = None  # the same, one entry or many, or a list of folders
    class_names: Any = "folders"  # imagenet | folders | a .txt or .json file | a list
    templates: Any = "clipn-release"  # clipn-release | openai | simple | a .txt file | a text | a list
    methods: list[str] = field(default_factory=lambda: ["MSP", "MaxLogit", "Energy", "MCM", "CTW", "ATD"])
    scale: float = 100.0
    train: Any = None  # ID training images, as `id`, for kNN, Mahalanobis, PLP-*, TagOOD and others: docs/evaluation.md
    train_filter: str | None = None  # CTW | ATD: leave out training images that this decision of CLIPN calls OOD
    train_shots: int | None = None  # training images of each class folder, drawn by run.seed; null: all
    words: str | None = None  # a word list or WordNet's database folder: NegLabel, CSP
    bootstrap: int = 0  # draws for confidence intervals; 0: none
    checkpoints: Any = None  # a path, a glob or a list: mean and deviation over them; null: this run's own
    batch_size: int = 256
    precision: str = "fp32"  # fp32 | bf16 | fp16
    keep_features: bool = True  # store image features in features.dir: other checkpoints of this base read no image

    def __post_init__(self) -> None:
        self._one_of("precision", PRECISIONS)
        self._check("scale", self.scale > 0, "a positive number")
        self._at_least(1, "batch_size")
        self._at_least(0, "bootstrap")
        self._one_of("train_filter", (None, *DECISIONS))
        self._check("train_shots", self.train_shots is None or self.train_shots >= 1, "1 or more, or null")
        self._check("methods", bool(self.methods), "at least one score")
        self._check("ood", self.id is None or bool(self.ood), "at least one image set beside eval.id")


@dataclass
class ProbeConfig(Section):
    """The linear probe of the methods PLP-* (pseudo-labels) and LP-* (class folders); the defaults are the paper's."""

    epochs: int = 100
    batch_size: int = 256  # 8192 for ImageNet
    lr: float = 1e-3  # the peak
    weight_decay: float = 1e-3  # of weight and bias
    warmup: float = 0.1  # the share of the steps in which the learning rate grows
    solver: str = "adam"  # adam | lbfgs: the optimum of the same objective, which the paper's probe does not reach
    seed: int = 0  # of the initial weights and the order of the images

    def __post_init__(self) -> None:
        self._at_least(1, "epochs", "batch_size")
        self._check("lr", self.lr > 0, "a positive number")
        self._at_least(0, "weight_decay")
        self._check("warmup", 0 <= self.warmup <= 1, "0 to 1")
        self._one_of("solver", SOLVERS)
        self._seed("seed", self.seed)


@dataclass
class TagoodConfig(Section):
    """The tagger and the projector of the methods TagOOD*; the defaults are the paper's, but for lr and max_tokens."""

    tagger: str = "clip"  # clip: the base itself | ram | ram++ | MODULE:FUNCTION, which makes your own
    weights: str | None = None  # ram, ram++: their file of weights
    tags: str = "classes"  # classes: their names | clipn: clip with the no tower's veto | a .txt file, a tag a class
    tag_threshold: float = 0.5  # ram: of a tag's confidence; clip: of its probability relative to the largest
    attention: str = "cosine"  # clip: of a patch and the class name | gradient: of the best cosine at the pixels
    attention_threshold: float = 0.5  # tokens with more attention are kept
    max_tokens: int = 16  # tokens of an image at most, beside the one of the whole image; the paper: 144
    width: int = 512
    layers: int = 2
    heads: int = 8
    groups: int = 4  # parts of a feature that are compared with a centre one by one
    epochs: int = 100
    batch_size: int = 256
    lr: float = 1e-3  # the paper's is 0.01
    lr_min: float = 1e-5  # at the end of the cosine
    weight_decay: float = 5e-4
    centre_weight: float = 0.1  # of the centre loss, beside the cross-entropy
    centre_decay: float = 0.999
    score: str = "cosine"  # cosine | cosine*tag: times the confidence of the best tag
    untagged: str = "keep"  # of images without a tag. keep: use their best tag | reject: the lowest score
    seed: int = 0  # of the initial weights and centres, the order of the images and dropout

    def __post_init__(self) -> None:
        own = bool(re.fullmatch(r"[\w.]+:\w+", self.tagger))
        ok = self.tagger in ("clip", "ram", "ram++") or own
        self._check("tagger", ok, "clip, ram, ram++ or MODULE:FUNCTION")
        ok = self.tags == "clipn" if self.tagger == "clip" else own or self.tags.endswith(".txt")
        expected = "clipn" if self.tagger == "clip" else "a .txt file"
        self._check("tags", self.tags == "classes" or ok, f"classes or {expected}, with tagood.tagger={self.tagger}")
        for name in ("tag_threshold", "attention_threshold"):
            self._check(name, 0 <= getattr(self, name) < 1, "0 or more, below 1")
        self._at_least(1, "max_tokens", "width", "layers", "heads", "groups", "epochs", "batch_size")
        for name in ("heads", "groups"):
            self._check(name, self.width % getattr(self, name) == 0, f"a divisor of tagood.width={self.width}")
        self._check("lr", self.lr > 0, "a positive number")
        self._check("lr_min", 0 <= self.lr_min <= self.lr, f"0 to tagood.lr={self.lr}")
        self._at_least(0, "weight_decay", "centre_weight")
        self._check("centre_decay", 0 <= self.centre_decay <= 1, "0 to 1")
        self._one_of("attention", ATTENTIONS)
        self._one_of("score", TAG_SCORES)
        self._one_of("untagged", UNTAGGED)
        self._seed("seed", self.seed)


@dataclass
class AdversarialConfig(Section):
    """Adversarial OOD images, made by `clipn adversarial`; the defaults are the paper's."""

    images: int = 1000  # at most, of eval.id, of each set of eval.ood, and of eval.train as targets; drawn by seed
    steps: int = 250  # of Adam
    lr: float = 1e-3
    smoothness: float = 5000.0  # for 224 pixels; 400 for 64, 100 for 32; 0: each pixel changes alone
    batch_size: int = 16
    seed: int = 0  # of the drawn images and of the initial noise

    def __post_init__(self) -> None:
        self._at_least(1, "images", "steps", "batch_size")
        self._check("lr", self.lr > 0, "a positive number")
        self._at_least(0, "smoothness")
        self._seed("seed", self.seed)
