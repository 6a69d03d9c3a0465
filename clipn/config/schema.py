"""One run's settings: typed dataclasses, filled from a YAML file and `key=value` words through OmegaConf."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

OBJECTIVES = ("clipn", "clip")
PRECISIONS = ("fp32", "bf16", "fp16")
TSO_KINDS = ("l2", "cosine")
WORLDS = ("toy", "photos")
SOURCES = ("pairs", "features")
FEATURE_DTYPES = ("float16", "float32")


def require(ok: bool, key: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{key}={value!r}: expected {expected}")


@dataclass
class RunConfig:
    """Where a run lives and what its random draws start from."""

    dir: str = "runs/clipn"
    seed: int = 0
    seeds: list[int] = field(default_factory=list)  # several: one run each in dir/seed_N, then one table of all
    device: str = "auto"  # auto | cpu | cuda | cuda:N

    def __post_init__(self) -> None:
        require(bool(self.dir), "run.dir", self.dir, "a folder")
        for key, seeds in (("run.seed", [self.seed]), ("run.seeds", self.seeds)):
            require(
                all(0 <= seed < 2**31 for seed in seeds), key, getattr(self, key[4:]), "0 or more, up to 2147483647"
            )
        known = self.device in ("auto", "cpu", "cuda") or bool(re.fullmatch(r"cuda:[0-9]+", self.device))
        require(known, "run.device", self.device, "one of auto, cpu, cuda, cuda:N")


@dataclass
class WorldConfig:
    """Data that is made or unpacked before anything else; `name: null` means the data is already there."""

    name: str | None = None  # toy: the built-in drawn world | photos: unpack a folder of photo archives
    root: str = "${run.dir}/world"
    source: str = ""  # photos: the folder of archives
    num_pairs: int = 20000  # toy
    images_per_class: int = 50  # toy
    image_size: int = 32  # toy
    seed: int = 0  # toy

    def __post_init__(self) -> None:
        require(self.name is None or self.name in WORLDS, "world.name", self.name, f"null or one of {WORLDS}")
        require(self.num_pairs >= 2, "world.num_pairs", self.num_pairs, "2 or more")
        require(self.images_per_class >= 1, "world.images_per_class", self.images_per_class, "1 or more")
        require(self.image_size >= 8, "world.image_size", self.image_size, "8 or more pixels")


@dataclass
class ModelConfig:
    """The base CLIP and the size of what CLIPN adds to it."""

    name: str = "ViT-B-16"  # open_clip name, or a path to a JSON model config
    pretrained: str | None = None  # open_clip tag, or a path to a checkpoint
    num_prompts: int = 16  # 0: the hand-crafted variant, which reads negated captions
    image_mean: list[float] | None = None  # only for checkpoints that do not carry their statistics
    image_std: list[float] | None = None

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name", self.name, "an open_clip model name or a JSON file")
        require(self.num_prompts >= 0, "model.num_prompts", self.num_prompts, "0 or more")
        for key, value in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            require(value is None or len(value) == 3, f"model.{key}", value, "three numbers, or null")


@dataclass
class DataConfig:
    """The image-caption pairs and how an image is cropped."""

    root: str = "data"  # for ${data.root} in the paths of a config
    source: str = "pairs"  # pairs: read and encode them in every epoch | features: encode them once, see `features`
    shards: Any = ""  # "data/cc3m/{00000..00331}.tar", a glob, a list of those, or a .csv / .tsv file
    num_pairs: int | None = None  # pairs in an epoch; null: all there are
    workers: int = 4  # decoding processes of each rank
    max_bad_fraction: float = 0.05  # of broken or empty pairs, before a run stops
    caption_key: str | None = None  # read the caption from this key of the .json member, not from the .txt
    image_column: str = "filepath"  # CSV / TSV
    caption_column: str = "title"  # CSV / TSV
    caption_templates: list[str] = field(default_factory=lambda: ["{}"])  # one is drawn per caption
    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    flip: float = 0.0  # probability of a mirrored image
    color_jitter: float = 0.0  # strength of brightness, contrast and saturation jitter
    erase: float = 0.0  # probability of an erased rectangle
    index_dir: str | None = None  # where the shards' indexes are remembered; null: the user's cache folder

    def __post_init__(self) -> None:
        many = isinstance(self.shards, (list, tuple)) and all(isinstance(s, str) for s in self.shards)
        require(isinstance(self.shards, str) or many, "data.shards", self.shards, "a pattern or a list of patterns")
        require(self.source in SOURCES, "data.source", self.source, f"one of {SOURCES}")
        require(self.num_pairs is None or self.num_pairs >= 2, "data.num_pairs", self.num_pairs, "2 or more, or null")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "0 to 1")
        scale = self.crop_scale
        ok = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        require(ok, "data.crop_scale", scale, "two numbers with 0 < low <= high <= 1")
        require(bool(self.caption_templates), "data.caption_templates", self.caption_templates, "at least one")
        for template in self.caption_templates:
            require("{}" in template, "data.caption_templates", template, 'a text with "{}" in it')
        require(0 <= self.flip <= 1, "data.flip", self.flip, "a probability")
        require(0 <= self.erase <= 1, "data.erase", self.erase, "a probability")
        require(0 <= self.color_jitter <= 1, "data.color_jitter", self.color_jitter, "0 to 1")


@dataclass
class FeaturesConfig:
    """What the frozen towers make of pairs and image sets, computed once and kept on disk."""

    dir: str = "${run.dir}/features"
    views: int = 1  # random crops of each image (and draws of a caption template); epoch e reads view e % views
    seed: int = 0  # of those draws: runs of any run.seed share features
    dtype: str = "float16"  # of the pairs' features on disk: float16 | float32
    precision: str | None = None  # of the towers, while pairs are encoded; null: as train.precision
    batch_size: int = 256  # images encoded at once, on each rank
    part_size: int = 1024  # pairs or images in a file: what a kill costs at most, and what ranks share

    def __post_init__(self) -> None:
        require(bool(self.dir), "features.dir", self.dir, "a folder")
        for key in ("views", "batch_size", "part_size"):
            require(getattr(self, key) >= 1, f"features.{key}", getattr(self, key), "1 or more")
        require(0 <= self.seed < 2**31, "features.seed", self.seed, "0 or more, up to 2147483647")
        require(self.dtype in FEATURE_DTYPES, "features.dtype", self.dtype, f"one of {FEATURE_DTYPES}")
        known = self.precision is None or self.precision in PRECISIONS
        require(known, "features.precision", self.precision, f"null or one of {PRECISIONS}")


@dataclass
class TrainConfig:
    """What is trained and how: the defaults are the recipe of the paper's code."""

    objective: str = "clipn"  # clipn: the no tower and its prompts | clip: the base itself
    epochs: int = 10
    batch_size: int = 2048  # global: the sum over ranks
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup_steps: int = 0
    itbo_weight: float = 1.0
    tso_weight: float = 1.0
    tso_kind: str = "l2"  # l2 | cosine
    precision: str = "bf16"  # fp32 | bf16 | fp16
    micro_batch_size: int | None = None  # clipn: captions that each rank trains on at once; null: its whole share
    grad_checkpointing: bool = False  # recompute the no tower's activations instead of keeping them
    compile: bool = False  # torch.compile
    resume: str = "auto"  # auto: the run's last checkpoint, if any | never | PATH: that, for a run that has none
    checkpoint_every_steps: int = 1000  # besides one at the end of each epoch; 0: only those
    checkpoint_every_minutes: float = 0.0  # the same by the clock; 0: not
    keep_checkpoints: int = 2  # the newest, whatever step they are of
    keep_every_epochs: int = 1  # of the epochs' checkpoints, besides the last one
    log_every_steps: int = 20

    def __post_init__(self) -> None:
        require(self.objective in OBJECTIVES, "train.objective", self.objective, f"one of {OBJECTIVES}")
        require(self.precision in PRECISIONS, "train.precision", self.precision, f"one of {PRECISIONS}")
        require(self.tso_kind in TSO_KINDS, "train.tso_kind", self.tso_kind, f"one of {TSO_KINDS}")
        require(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        require(self.batch_size >= 2, "train.batch_size", self.batch_size, "2 or more: the losses compare pairs")
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, "train.micro_batch_size", micro, "1 or more, or null")
        alone = micro is None or self.objective == "clipn"
        require(alone, "train.micro_batch_size", micro, "null with train.objective=clip, which compares all texts")
        require(self.lr > 0, "train.lr", self.lr, "a positive number")
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(ok, "train.betas", self.betas, "two numbers in [0, 1)")
        for key in ("weight_decay", "eps", "warmup_steps", "itbo_weight", "tso_weight"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or more")
        for key in ("checkpoint_every_steps", "checkpoint_every_minutes"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or more")
        for key in ("log_every_steps", "keep_checkpoints", "keep_every_epochs"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        require(self.itbo_weight + self.tso_weight > 0, "train.itbo_weight", 0.0, "a loss: both weights are 0")


@dataclass
class EvalConfig:
    """The image sets that a checkpoint is judged on; `id: null` means no evaluation."""

    id: Any = None  # a folder, or {name: folder}, or {name: {path, classes | exclude}}
    ood: Any = None  # the same, one entry or many, or a list of folders
    class_names: Any = "folders"  # imagenet | folders | a .txt or .json file | a list
    templates: Any = "clipn-release"  # clipn-release | openai | simple | a .txt file | a list
    methods: list[str] = field(default_factory=lambda: ["MSP", "MaxLogit", "Energy", "MCM", "CTW", "ATD"])
    scale: float = 100.0
    train: Any = None  # training images of the ID classes, as `id`: kNN, Mahalanobis, RMD, ViM, Residual, ReAct
    words: str | None = None  # a word list or WordNet's database folder: NegLabel, CSP
    bootstrap: int = 0  # draws for confidence intervals; 0: none
    checkpoints: Any = None  # a path, a glob or a list: mean and deviation over them; null: this run's own
    batch_size: int = 256
    precision: str = "fp32"  # fp32 | bf16 | fp16
    keep_features: bool = True  # in features.dir: other checkpoints of the same base, and other scores, read no image

    def __post_init__(self) -> None:
        require(self.precision in PRECISIONS, "eval.precision", self.precision, f"one of {PRECISIONS}")
        require(self.scale > 0, "eval.scale", self.scale, "a positive number")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "1 or more")
        require(self.bootstrap >= 0, "eval.bootstrap", self.bootstrap, "0 or more draws")
        require(bool(self.methods), "eval.methods", self.methods, "at least one score")
        require(self.id is None or bool(self.ood), "eval.ood", self.ood, "at least one image set beside eval.id")


@dataclass
class Config:
    """A whole run. `base` holds what differs, key by key, while the base CLIP is trained first (empty: it is not)."""

    run: RunConfig = field(default_factory=RunConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    base: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fits = self.data.source == "pairs" or self.train.objective == "clipn"
        require(fits, "data.source", self.data.source, "pairs with train.objective=clip: none of its towers is frozen")
