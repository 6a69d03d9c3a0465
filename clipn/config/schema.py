"""The settings of a run: dataclasses that check their values, filled by `clipn.config.loading`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from clipn.config.checks import PRECISIONS, Section, require
from clipn.config.evaluation import AdversarialConfig, EvalConfig, ProbeConfig, TagoodConfig

OBJECTIVES = ("clipn", "clip")
TSO_KINDS = ("l2", "cosine")
WORLDS = ("toy", "photos")
NO_TOWERS = ("tower", "adapter")
SOURCES = ("pairs", "features")
FEATURE_DTYPES = ("float16", "float32")


@dataclass
class RunConfig(Section):
    """The folder, the seed and the device of a run."""

    dir: str = "runs/clipn"
    seed: int = 0
    seeds: list[int] = field(default_factory=list)  # several: one run each in dir/seed_N, then one table of all
    device: str = "auto"  # auto: CUDA if there is a GPU, else the CPU | cpu | cuda | cuda:N | mps

    def __post_init__(self) -> None:
        self._check("dir", bool(self.dir), "a folder")
        self._seed("seed", self.seed)
        self._seed("seeds", *self.seeds)
        ok = self.device in ("auto", "cpu", "cuda", "mps") or bool(re.fullmatch(r"cuda:[0-9]+", self.device))
        self._check("device", ok, "one of auto, cpu, cuda, cuda:N, mps")


@dataclass
class WorldConfig(Section):
    """Data that is generated or unpacked before training; `name: null` if the data exists already."""

    name: str | None = None  # toy: the built-in drawn world | photos: unpack a folder of photo archives
    root: str = "${run.dir}/world"
    source: str = ""  # photos: the folder of archives
    num_pairs: int = 20000  # toy
    images_per_class: int = 50  # toy
    image_size: int = 32  # toy
    seed: int = 0  # toy
    before_scenes: bool = False  # toy: things stand before scenes, as configs/toy_vit.yaml says

    def __post_init__(self) -> None:
        self._one_of("name", (None, *WORLDS))
        self._at_least(2, "num_pairs")
        self._at_least(1, "images_per_class")
        self._at_least(8, "image_size")


@dataclass
class ModelConfig(Section):
    """The base CLIP, and what CLIPN adds to it: a no tower with prompts, or an adapter."""

    name: str = "ViT-B-16"  # open_clip name, or a path to a JSON model config
    pretrained: str | None = None  # open_clip tag, or a path to a checkpoint
    num_prompts: int = 16  # 0: the hand-crafted variant, which reads negated captions
    image_mean: list[float] | None = None  # only for a checkpoint without statistics of its own
    image_std: list[float] | None = None
    no_tower: str = "tower"  # tower: a copy of the text tower with prompts | adapter: a small MLP on the yes feature
    adapter_width: int = 512  # units of the adapter's hidden layer
    bias: bool = False  # a learned bias b: d = s (f.n - f.g) + b

    def __post_init__(self) -> None:
        self._check("name", bool(self.name), "an open_clip model name or a JSON file")
        self._at_least(0, "num_prompts")
        self._one_of("no_tower", NO_TOWERS)
        self._at_least(1, "adapter_width")
        for name, value in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            self._check(name, value is None or len(value) == 3, "three numbers, or null")

    @property
    def negated(self) -> bool:
        """Whether the no tower reads negated captions."""
        return self.no_tower == "tower" and self.num_prompts == 0


@dataclass
class DataConfig(Section):
    """The image-caption pairs, and how images are augmented."""

    root: str = "data"  # for ${data.root} in the paths of a config
    source: str = "pairs"  # pairs: read and encode them in every epoch | features: encode them once, see `features`
    shards: Any = ""  # "data/cc3m/{00000..00331}.tar", a glob, a list of those, or a .csv / .tsv file
    val_shards: Any = ""  # held-out pairs, as `shards`: ITBO, accuracy and AUROC of d on them after each epoch
    num_pairs: int | None = None  # pairs in an epoch; null: all there are
    workers: int = 4  # worker processes of each rank, which decode images
    max_bad_fraction: float = 0.05  # of broken or empty pairs, before a run stops
    caption_key: str | None = None  # read the caption from this key of the .json member, not from the .txt
    image_column: str = "filepath"  # CSV / TSV
    caption_column: str = "title"  # CSV / TSV
    caption_templates: list[str] = field(default_factory=lambda: ["{}"])  # one is drawn per caption
    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    flip: float = 0.0  # probability of a mirrored image
    color_jitter: float = 0.0  # strength of brightness, contrast and saturation jitter
    erase: float = 0.0  # probability of an erased rectangle
    index_dir: str | None = None  # cache of the shards' indexes; null: the user's cache folder

    def __post_init__(self) -> None:
        for name in ("shards", "val_shards"):
            value = getattr(self, name)
            many = isinstance(value, (list, tuple)) and all(isinstance(s, str) for s in value)
            self._check(name, isinstance(value, str) or many, "a pattern or a list of patterns")
        self._one_of("source", SOURCES)
        self._check("num_pairs", self.num_pairs is None or self.num_pairs >= 2, "2 or more, or null")
        self._at_least(0, "workers")
        self._check("max_bad_fraction", 0 <= self.max_bad_fraction <= 1, "0 to 1")
        ok = len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        self._check("crop_scale", ok, "two numbers with 0 < low <= high <= 1")
        self._check("caption_templates", bool(self.caption_templates), "at least one")
        for template in self.caption_templates:
            require("{}" in template, "data.caption_templates", template, 'a text with "{}" in it')
        for name in ("flip", "erase"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a probability")
        self._check("color_jitter", 0 <= self.color_jitter <= 1, "0 to 1")


@dataclass
class FeaturesConfig(Section):
    """Outputs of the frozen towers for pairs and image sets, computed once and stored."""

    dir: str = "${run.dir}/features"
    views: int = 1  # random crops of each image (and draws of a caption template); epoch e reads view e % views
    seed: int = 0  # of those draws; runs of every run.seed share features
    dtype: str = "float16"  # of the stored pair features, and of the tower's output for image sets: float16 | float32
    precision: str | None = None  # of the towers, while pairs are encoded; null: as train.precision
    batch_size: int = 256  # images encoded at once, on each rank
    part_size: int = 1024  # pairs or images per file: the most that a kill loses, and the unit that ranks divide

    def __post_init__(self) -> None:
        self._check("dir", bool(self.dir), "a folder")
        self._at_least(1, "views", "batch_size", "part_size")
        self._seed("seed", self.seed)
        self._one_of("dtype", FEATURE_DTYPES)
        self._one_of("precision", (None, *PRECISIONS))


@dataclass
class TrainConfig(Section):
    """The objective and the optimisation; the defaults are the recipe of the paper's code."""

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
    micro_batch_size: int | None = None  # clipn: captions per forward pass of a rank; null: its whole share
    grad_checkpointing: bool = False  # recompute the no tower's activations instead of keeping them
    compile: bool = False  # torch.compile
    resume: str = "auto"  # auto: from the run's last checkpoint | never | PATH: from this one, if the run has none
    checkpoint_every_steps: int = 1000  # besides the end of each epoch; 0: only there
    checkpoint_every_minutes: float = 0.0  # the same by time; 0: off
    keep_checkpoints: int = 2  # of the newest checkpoints
    keep_every_epochs: int = 1  # every N-th epoch's checkpoint is kept, and the last one's
    log_every_steps: int = 20  # between these, a GPU computes without waiting to be read

    def __post_init__(self) -> None:
        self._one_of("objective", OBJECTIVES)
        self._one_of("precision", PRECISIONS)
        self._one_of("tso_kind", TSO_KINDS)
        self._check("batch_size", self.batch_size >= 2, "2 or more: the losses compare pairs")
        micro = self.micro_batch_size
        self._check("micro_batch_size", micro is None or micro >= 1, "1 or more, or null")
        ok = micro is None or self.objective == "clipn"
        self._check("micro_batch_size", ok, "null with train.objective=clip, which compares all texts")
        self._check("lr", self.lr > 0, "a positive number")
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._check("betas", ok, "two numbers in [0, 1)")
        self._at_least(0, "weight_decay", "eps", "warmup_steps", "itbo_weight", "tso_weight")
        self._at_least(0, "checkpoint_every_steps", "checkpoint_every_minutes")
        self._at_least(1, "epochs", "log_every_steps", "keep_checkpoints", "keep_every_epochs")
        require(self.itbo_weight + self.tso_weight > 0, "train.itbo_weight", 0.0, "a loss: both weights are 0")


@dataclass
class Config:
    """A whole run. `base` holds the settings that differ when the base CLIP is trained first (empty: it is not)."""

    run: RunConfig = field(default_factory=RunConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    tagood: TagoodConfig = field(default_factory=TagoodConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    base: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ok = self.data.source == "pairs" or self.train.objective == "clipn"
        require(ok, "data.source", self.data.source, "pairs with train.objective=clip: none of its towers is frozen")
        ok = not self.data.val_shards or self.train.objective == "clipn"
        require(ok, "data.val_shards", self.data.val_shards, "none with train.objective=clip, which has no margin d")
