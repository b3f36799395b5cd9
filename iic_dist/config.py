"""Everything that can be set about a run: typed, documented, read from presets, files and the command line."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import jsonargparse
import yaml

from iic_dist.errors import UsageError

PRESETS = Path(__file__).parent / "configs"
HEADS = ("clustering", "overclustering", "contrastive")


@dataclass
class RunConfig:
    """Where the run lives and what it runs on.

    Attributes:
        name: Folder of the run under `root`. Default: the data set's name and the next free number.
        root: Folder of all runs.
        seed: Decides the initial weights, the order of the images and every view; from 0 to 2^63 - 1.
        device: Where to compute; auto takes CUDA if there is a GPU.
        threads: CPU threads of one rank. Default: under torchrun the machine's cores shared among its ranks.
        resume: auto continues from the newest checkpoint of a run of this name; never refuses to touch one.
        timeout_minutes: A collective that waits longer than this ends the run with an error.
    """

    name: str | None = None
    root: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    resume: Literal["auto", "never"] = "auto"
    timeout_minutes: float = 10.0


@dataclass
class DataConfig:
    """Which images are clustered.

    Attributes:
        name: digits, mnist, fashion-mnist, cifar10, cifar100-20, stl10, or folder:DIR.
        root: Folder where named data sets are looked for and downloaded to.
        download: Download a named data set that is not under `root`.
        train_on: Images to train on; no label is used. all = training and test images (the paper's protocol).
        evaluate_on: Images to evaluate on.
        batch_size: Images in a step over all ranks (pairs = batch_size x views.repeats); must divide by the ranks.
        unlabelled: Train the overclustering and contrastive heads also on the unlabelled images (stl10 only).
        image_size: folder:DIR only: side in pixels that the images are resized and cropped to. Default: 96.
        folder_labels: folder:DIR only: the sub-folders are classes, used for evaluation.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = True
    train_on: Literal["all", "train"] = "all"
    evaluate_on: Literal["all", "train", "test"] = "all"
    batch_size: int = 256
    unlabelled: bool = False
    image_size: int | None = None
    folder_labels: bool = False


@dataclass
class ViewsConfig:
    """Which views are made of an image. Fields left out are chosen by the policy.

    Attributes:
        policy: iic (weak crop against strong view), simclr (two strong views) or digits (two affine views).
        repeats: Second views of each image in a step.
        size: Side of the views in pixels. Default: the images' own.
        crop_area: Range of the share of the image that a random crop keeps.
        crop_sides: Sides in pixels that random square crops choose from (iic).
        rotation: Largest rotation in degrees.
        flip: Probability of a horizontal flip.
        jitter: Factor on the policy's colour jitter; 0 turns it off.
        gray: Probability of a gray view.
        blur: Probability of a Gaussian blur.
        sobel: Feed the two Sobel gradients of the gray image instead of its pixels.
        mean: Channel means that are subtracted, of images in [0, 1]. Default: measured on the training images.
        std: Channel deviations to divide by. Default: measured.
    """

    policy: Literal["iic", "simclr", "digits"] = "digits"
    repeats: int = 1
    size: int | None = None
    crop_area: tuple[float, float] | None = None
    crop_sides: list[int] | None = None
    rotation: float | None = None
    flip: float | None = None
    jitter: float | None = None
    gray: float | None = None
    blur: float | None = None
    sobel: bool | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class ModelConfig:
    """The network: a backbone and up to three heads.

    Attributes:
        backbone: small_cnn, resnet18, resnet34, iic_resnet34, iic_vgg4, mobilenet_v2, or any torchvision model.
        norm: Normalisation of the project's own backbones.
        pretrained: Start from torchvision's ImageNet weights.
        freeze_backbone: Train the heads alone.
        num_clusters: Clusters wanted. Default: the number of classes of the data set.
        num_overclusters: Clusters of the overclustering head; 0 = no such head.
        sub_heads: Independent linear classifiers of each of these heads; the one of lowest loss is selected.
        head_init_std: Deviation of the first weights of these heads. Default: 1 / sqrt(features); the paper's is 0.01.
        projection_dim: Size of the contrastive embedding; 0 = no contrastive head.
        projection_hidden: Hidden units of the contrastive head. Default: none, one linear layer.
    """

    backbone: str = "small_cnn"
    norm: Literal["batch", "group", "none"] = "batch"
    pretrained: bool = False
    freeze_backbone: bool = False
    num_clusters: int | None = None
    num_overclusters: int = 0
    sub_heads: int = 5
    head_init_std: float | None = None
    projection_dim: int = 0
    projection_hidden: int | None = None


@dataclass
class LossConfig:
    """The losses and their weights in a joint step.

    Attributes:
        impl: auto takes the compiled losses where they are built; fused insists; torch is plain PyTorch.
        entropy_weight: Weight w of the marginal entropies in the IIC loss; 1 is mutual information, more pushes
            harder towards clusters of equal size.
        temperature: Of the contrastive loss.
        clustering: Weight of the clustering head's loss.
        overclustering: Weight of the overclustering head's loss.
        contrastive: Weight of the contrastive loss.
    """

    impl: Literal["auto", "fused", "torch"] = "auto"
    entropy_weight: float = 1.0
    temperature: float = 0.5
    clustering: float = 1.0
    overclustering: float = 1.0
    contrastive: float = 1.0


@dataclass
class OptimConfig:
    """How the weights are updated.

    Attributes:
        name: Optimizer.
        lr: Learning rate.
        contrastive_lr: Learning rate of steps that train the contrastive head alone. Default: `lr`.
        schedule: Constant, or a cosine down to zero over the run.
        warmup_epochs: Epochs over which the learning rate rises linearly from zero.
        weight_decay: On weight matrices; not on biases and normalisation.
        momentum: Of SGD.
        clip_norm: Largest norm of the gradient; 0 = no limit.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    contrastive_lr: float | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.9
    clip_norm: float = 0.0


@dataclass
class TrainConfig:
    """The course of the training.

    Attributes:
        epochs: Passes over the training images.
        schedule: joint trains all heads in each step on one backbone pass; alternate gives each head its own pass
            over the images in every epoch, in the order of `order`.
        order: Heads of an epoch of the alternate schedule, first to last.
        contrastive_warmup_epochs: First epochs in which only the contrastive head is trained.
        precision: Of the network; bfloat16 is autocast with float32 weights.
        channels_last: Memory format of the network; faster on GPUs.
        compile: Compile the network with torch.compile.
        sync_batchnorm: Batch normalisation over all ranks (CUDA only).
        evaluate_every: Epochs between evaluations; 0 = only at the end.
        evaluate_batch_size: Images of one forward pass of a rank in an evaluation.
        checkpoint_every: Epochs between checkpoints; there is always one at the end.
    """

    epochs: int = 50
    schedule: Literal["joint", "alternate"] = "joint"
    order: list[str] = field(default_factory=lambda: ["overclustering", "clustering", "contrastive"])
    contrastive_warmup_epochs: int = 0
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    channels_last: bool = False
    compile: bool = False
    sync_batchnorm: bool = False
    evaluate_every: int = 10
    evaluate_batch_size: int = 1000
    checkpoint_every: int = 10


@dataclass
class MonitorConfig:
    """What can be watched.

    Attributes:
        log_every: Steps between lines of metrics.jsonl and points in TensorBoard.
        pictures_every: Epochs between pictures in TensorBoard; 0 = only at the end.
        progress: Show a progress bar.
    """

    log_every: int = 10
    pictures_every: int = 0
    progress: bool = True


@dataclass
class Config:
    """All groups; the options of the command line are --GROUP.FIELD."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that the model has, in the order of `HEADS`."""
        present = (True, self.model.num_overclusters > 0, self.model.projection_dim > 0)
        return tuple(head for head, there in zip(HEADS, present, strict=True) if there)

    def to_yaml(self) -> str:
        """Return all groups as YAML that `--config FILE` reads back."""
        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(f"{' '.join(message.split())} (--help lists all options)") from ex


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m iic_dist.train",
        usage="%(prog)s [--config NAME|FILE] [--GROUP.FIELD VALUE ...] [--print_config]",
        description="Cluster unlabelled images. Runs alone or under torchrun. "
        f"Presets for --config: {', '.join(sorted(path.stem for path in PRESETS.glob('*.yaml')))}.",
    )
    parser.add_argument(
        "--config", action="config", help="A preset's name or a YAML file; options given beside it win. Default: digits."
    )
    for group in dataclasses.fields(Config):
        parser.add_class_arguments(group.default_factory, group.name)  # type: ignore[arg-type]
    return parser


def _find(name: str) -> str:
    """Return the file of a preset's name, or `name` itself where it is a file."""
    preset = PRESETS / f"{name}.yaml"
    if preset.is_file():
        return str(preset)
    if Path(name).is_file():
        return name
    names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    raise UsageError(f"--config {name}: neither a file nor a preset ({names})")


def _config_first(arguments: list[str]) -> list[str]:
    """Put --config, with its preset resolved, before the options, so that these win wherever they stand."""
    config, rest = "digits", []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config = next(remaining, "")
        elif argument.startswith("--config="):
            config = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return ["--config", _find(config), *rest]


def parse(arguments: list[str] | None = None) -> Config:
    """Read the command line into a checked `Config`.

    Args:
        arguments: Options without the program's name; None takes the process's own.

    Raises:
        UsageError: an unknown option, a value of the wrong type, or values that do not fit together.
    """
    parser = _parser()
    parsed = parser.parse_args(_config_first(sys.argv[1:] if arguments is None else arguments))
    groups = parser.instantiate(parsed)
    config = Config(**{group.name: getattr(groups, group.name) for group in dataclasses.fields(Config)})
    check(config)
    return config


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise UsageError(f"{name}={value!r}: must be {rule}")


def check(config: Config) -> None:
    """Raise a UsageError for the first value that no run could work with."""
    positive = {
        "data": ("batch_size",),
        "views": ("repeats",),
        "model": ("sub_heads",),
        "loss": ("entropy_weight", "temperature"),
        "optim": ("lr",),
        "train": ("epochs", "evaluate_batch_size", "checkpoint_every"),
        "run": ("timeout_minutes",),
        "monitor": ("log_every",),
    }
    not_negative = {
        "model": ("num_overclusters", "projection_dim"),
        "loss": ("clustering", "overclustering", "contrastive"),
        "optim": ("warmup_epochs", "weight_decay", "clip_norm", "momentum"),
        "train": ("contrastive_warmup_epochs", "evaluate_every"),
        "monitor": ("pictures_every",),
    }
    for names, lowest, rule in ((positive, 0, "above 0"), (not_negative, -1, "0 or more")):
        for group, fields in names.items():
            for name in fields:
                value = getattr(getattr(config, group), name)
                above = value > 0 if lowest == 0 else value >= 0
                _require(math.isfinite(value) and above, f"{group}.{name}", value, rule)
    _require(0 <= config.run.seed < 2**63, "run.seed", config.run.seed, "from 0 to 2^63 - 1")
    _check_heads(config)


def _check_heads(config: Config) -> None:
    model, train = config.model, config.train
    for name, count in (("num_clusters", model.num_clusters), ("num_overclusters", model.num_overclusters or None)):
        _require(count is None or count >= 2, f"model.{name}", count, "2 or more")
    unknown = [head for head in train.order if head not in HEADS]
    _require(not unknown, "train.order", train.order, f"made of {', '.join(HEADS)}")
    if train.schedule == "alternate":
        missing = [head for head in config.heads if head not in train.order]
        _require(not missing, "train.order", train.order, f"complete; the model also has {', '.join(missing)}")
    if train.contrastive_warmup_epochs and "contrastive" not in config.heads:
        raise UsageError(
            f"train.contrastive_warmup_epochs={train.contrastive_warmup_epochs}: there is no contrastive head; "
            "set model.projection_dim, e.g. 128"
        )
    if config.data.unlabelled and len(config.heads) == 1:
        raise UsageError(
            "data.unlabelled=true: only the overclustering and contrastive heads use unlabelled images; "
            "set model.num_overclusters or model.projection_dim"
        )
