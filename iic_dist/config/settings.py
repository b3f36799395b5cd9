"""Everything that can be set about a run, typed and documented; `iic_dist.config.command_line` reads it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from iic_dist.config import as_yaml

HEADS = ("clustering", "overclustering", "contrastive")


def _above_0(default: Any) -> Any:
    """A field whose value must be above 0; `config.check` reads it."""
    return field(default=default, metadata={"bound": "above 0"})


def _at_least_0(default: Any) -> Any:
    """A field whose value must be 0 or more."""
    return field(default=default, metadata={"bound": "0 or more"})


def _share(default: Any) -> Any:
    """A field whose value must be from 0 to 1."""
    return field(default=default, metadata={"bound": "from 0 to 1"})


@dataclass
class RunConfig:
    """Where the run lives and what it runs on.

    Attributes:
        name: Folder of the run under `root`. Default: the data set's name and the next free number.
        root: Folder of all runs.
        seed: Decides the initial weights, the order of the images and every view; from 0 to 2^63 - 1.
        device: Where to compute; auto takes CUDA, else MPS (a Mac's GPU, for one process), else the CPU.
        threads: CPU threads of one rank. Default: under torchrun the machine's cores shared among its ranks.
        resume: auto continues from the newest checkpoint of a run of this name; never refuses to touch one.
        new_images: Go on although the images are others than those that the run was trained on.
        timeout_minutes: A collective that waits longer than this, after the first step, ends the run with an error.
        start_timeout_minutes: The same until the first step is done: images are decoded, features extracted and the
            network compiled till then, and ranks may wait for the slowest.
    """

    name: str | None = None
    root: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int | None = None
    resume: Literal["auto", "never"] = "auto"
    new_images: bool = False
    timeout_minutes: float = _above_0(10.0)
    start_timeout_minutes: float = _above_0(60.0)


@dataclass
class DataConfig:
    """Which images are clustered.

    Attributes:
        name: digits, mnist, fashion-mnist, cifar10, cifar100-20, stl10, folder:DIR, or features:FILE.npy: (N, F) of
            anything.
        root: Folder where named data sets are looked for and downloaded to.
        download: Download a named data set that is not under `root`.
        train_on: Images to train on; no label is used. all = training and test images (the paper's protocol).
        evaluate_on: Images to evaluate on.
        batch_size: Images in a step over all ranks (pairs = batch_size x views.repeats); must divide by the ranks.
        unlabelled: Train the overclustering and contrastive heads also on the unlabelled images (stl10 only).
        image_size: folder:DIR only: side in pixels that the images are resized and cropped to. Default: their median
            shorter side, from 8 to 96.
        channels: 1 makes all images gray, 3 makes them RGB. Default: 1 if no image has a colour, else 3.
        resampling: folder:DIR only: how the images are resized. Default: as pretrained weights want it, else bilinear.
        folder_labels: folder:DIR only: the sub-folders are classes, used for evaluation.
        labels: features:FILE.npy only: a file .npy of labels, used for evaluation. Default: FILE.labels.npy, if it is
            there.
        cache: folder:DIR only: folder where the decoded images, or the features of a frozen backbone, are kept for
            the next run; it may be deleted at any time. Default: `decoded` under `root`.
        keep_features: Numbers in which the features of a frozen backbone are kept; float16 takes half the room. With
            train.precision float64 they are float64.
        follow_links: folder:DIR only: also take symbolic links that lead out of the folder, as predict makes them.
        max_megapixels: folder:DIR only: images of more million pixels are passed over.
        truncated: folder:DIR only: also take files that were cut short; what is missing becomes gray or black.
        workers: folder:DIR only: processes that decode; 0 = the run's own. Default: one a core, at most 16.
        relist: folder:DIR only: look for changed files at the start; false trusts the listing kept in `cache`, which
            saves a walk over millions of files on a slow disk.
        device_budget_gib: Images up to this size (decoded, in GiB; training and evaluation images each) stay in the
            memory of the device. Larger sets stay on the host, and each batch is copied while the step before it
            runs; the training is the same bit for bit.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = True
    train_on: Literal["all", "train"] = "all"
    evaluate_on: Literal["all", "train", "test"] = "all"
    batch_size: int = _above_0(256)
    unlabelled: bool = False
    image_size: int | None = None
    channels: Literal[1, 3] | None = None
    resampling: Literal["bilinear", "bicubic"] | None = None
    folder_labels: bool = False
    labels: str | None = None
    cache: str | None = None
    keep_features: Literal["float16", "float32"] = "float32"
    follow_links: bool = False
    max_megapixels: float = _above_0(50.0)
    truncated: bool = False
    workers: int | None = _at_least_0(None)
    relist: bool = True
    device_budget_gib: float = _at_least_0(4.0)

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest images that are decoded."""
        return round(self.max_megapixels * 1e6)


@dataclass
class ViewsConfig:
    """Which views are made of an image. Fields left out are chosen by the policy.

    Attributes:
        policy: iic (weak crop against strong view), simclr (two strong views) or digits (two affine views).
        repeats: Second views of each image in a step.
        size: Side of the views in pixels. Default: the images' own.
        evaluate_size: Side of the whole image that an evaluation sees, and stage 2. Default: `size`.
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
        impl: auto makes views by the compiled op where it is built, but for float64; fused insists; torch is PyTorch.
    """

    policy: Literal["iic", "simclr", "digits"] = "digits"
    repeats: int = _above_0(1)
    size: int | None = None
    evaluate_size: int | None = None
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
    impl: Literal["auto", "fused", "torch"] = "auto"


@dataclass
class ModelConfig:
    """The network: a backbone and up to three heads.

    Attributes:
        backbone: small_cnn, medium_cnn, resnet18, resnet34, iic_resnet34, iic_vgg4, mobilenet_v2, a torchvision model,
            or timm/NAME for one of timm's.
        norm: Normalisation of the project's own backbones.
        pretrained: Start from torchvision's ImageNet weights, or from timm's weights of that name: cached ones, or
            fetched ones.
        weights: Start from this file (.safetensors, .pth, .pt, .bin) of the backbone's weights; needs no network.
        weights_digest: sha256: and the first digits of that of the weights' file, filled in when the run starts;
            other weights are refused.
        freeze_backbone: Train the heads alone.
        num_clusters: Clusters wanted. Several numbers, as in 5,10,20, train one clustering head for each, and one of
            them is recommended and used. Default: the number of classes of the data set.
        num_overclusters: Clusters of the overclustering head; 0 = no such head.
        sub_heads: Independent linear classifiers of each of these heads; the one of lowest loss is selected.
        head_init_std: Deviation of the first weights of these heads. Default: 1 / sqrt(features); the paper's is 0.01.
        projection_dim: Size of the contrastive embedding; 0 = no contrastive head.
        projection_hidden: Hidden units of the contrastive head. Default: none, one linear layer.
    """

    backbone: str = "small_cnn"
    norm: Literal["batch", "group", "none"] = "batch"
    pretrained: bool = False
    weights: str | None = None
    weights_digest: str | None = None
    freeze_backbone: bool = False
    num_clusters: int | list[int] | None = None
    num_overclusters: int = _at_least_0(0)
    sub_heads: int = _above_0(5)
    head_init_std: float | None = _above_0(None)
    projection_dim: int = _at_least_0(0)
    projection_hidden: int | None = None


@dataclass
class LossConfig:
    """The losses and their weights in a joint step.

    Attributes:
        impl: auto takes the compiled losses where they are built; fused insists; torch is plain PyTorch.
        entropy_weight: Weight w of the marginal entropies in the IIC loss; 1 is mutual information, more pushes
            harder towards clusters of equal size.
        prior: Sizes that the clusters of the clustering head are pushed towards: uniform = equal ones; free = the
            mutual information alone, whatever entropy_weight; else a file of K relative sizes, one a line, or a list.
        temperature: Of the contrastive loss.
        clustering: Weight of the clustering head's loss; several clustering heads share it.
        overclustering: Weight of the overclustering head's loss.
        contrastive: Weight of the contrastive loss.
    """

    impl: Literal["auto", "fused", "torch"] = "auto"
    entropy_weight: float = _above_0(1.0)
    prior: list[float] | str = "uniform"
    temperature: float = _above_0(0.5)
    clustering: float = _at_least_0(1.0)
    overclustering: float = _at_least_0(1.0)
    contrastive: float = _at_least_0(1.0)


@dataclass
class OptimConfig:
    """How the weights are updated.

    Attributes:
        name: Optimizer; muon makes the steps of matrices orthogonal (lr 0.14), but of sub-heads, which get AdamW.
        lr: Learning rate.
        contrastive_lr: Learning rate of steps that train the contrastive head alone. Default: `lr`.
        schedule: Constant, or a cosine down to zero over the run.
        warmup_epochs: Epochs over which the learning rate rises linearly from zero.
        weight_decay: On weight matrices; not on biases and normalisation.
        momentum: Of SGD and Muon.
        clip_norm: Largest norm of the gradient; 0 = no limit.
    """

    name: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    lr: float = _above_0(1e-3)
    contrastive_lr: float | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = _at_least_0(0.0)
    weight_decay: float = _at_least_0(0.0)
    momentum: float = _at_least_0(0.9)
    clip_norm: float = _at_least_0(0.0)


@dataclass
class TrainConfig:
    """The course of the training.

    Attributes:
        epochs: Passes over the training images; 0 = none, the features of a frozen pretrained backbone are clustered.
        schedule: joint trains all heads in each step on one backbone pass; alternate gives each head its own pass
            over the images in every epoch, in the order of `order`.
        order: Heads of an epoch of the alternate schedule, first to last.
        restart_after: A sub-head whose loss stays clearly above the lowest of the clustering head for so many epochs is
            started again from the best one; 0 = never. Not done where several num_clusters are compared.
        contrastive_warmup_epochs: First epochs in which only the contrastive head is trained.
        precision: Of the network; bfloat16 is autocast with float32 weights. auto takes it on a CPU that has matrix
            units for it (AMX), else float32.
        channels_last: Memory format of the network; auto takes it on a CPU, where it is faster.
        compile: Compile the network with torch.compile.
        sync_batchnorm: Batch normalisation over the images of all ranks: the same training on any number of them.
        evaluate_every: Epochs between evaluations; 0 = only at the end.
        evaluate_batch_size: Images of one forward pass of a rank in an evaluation.
        checkpoint_every: Epochs between checkpoints; there is always one at the end, and one where a signal stops
            the run. The newest three are kept, and the one of lowest loss.
        checkpoint_every_steps: Steps between further checkpoints within an epoch; 0 = none.
        max_skipped_steps: The run ends when more steps than this in a row had a loss or gradient that is not finite.
    """

    epochs: int = _at_least_0(50)
    schedule: Literal["joint", "alternate"] = "joint"
    order: list[str] = field(default_factory=lambda: ["overclustering", "clustering", "contrastive"])
    restart_after: int = _at_least_0(15)
    contrastive_warmup_epochs: int = _at_least_0(0)
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    compile: bool = False
    sync_batchnorm: bool = False
    evaluate_every: int = _at_least_0(10)
    evaluate_batch_size: int = _above_0(1000)
    checkpoint_every: int = _above_0(10)
    checkpoint_every_steps: int = _at_least_0(0)
    max_skipped_steps: int = _at_least_0(20)


@dataclass
class NeighboursConfig:
    """Fresh clustering heads, trained on pairs of an image and one of its neighbours in the features.

    Attributes:
        steps: Updates of the new heads; 0 = no such stage. 600 are right for most sets, 100 are worse than k-means.
        k: Neighbours of each image: the nearest by cosine, exact.
        whitening: How much of their variance is first taken from the features, from 0 (none) to 1 (all): 0.75 for a
            network trained on the images themselves, 0 for pretrained features.
        walk: Steps of the random walk from an image to its partner, each to one of the neighbours of the image before:
            the more, the less a cut through a cluster pays, and the less classes of few images are lost.
        partners: Of each image in a step.
        batch_size: Images in a step over all ranks.
        sub_heads: Sub-heads of each new head that are left of five times as many: two of five started at random, two at
            clusters of the graph of neighbours, one at those of k-means; the one of lowest loss over all images is
            selected.
        entropy_weight: Weight w of the marginal entropies in their loss; 1 is mutual information, more pushes harder
            towards clusters of equal size. Random sub-heads explore, and a network is refined, with at least 2.
        lr: Learning rate of their AdamW, which falls to zero as a cosine.
        weight_decay: Of their weights.
    """

    steps: int = _at_least_0(0)
    k: int = _above_0(15)
    whitening: float = _share(0.0)
    walk: int = _above_0(6)
    partners: int = _above_0(1)
    batch_size: int = _above_0(1024)
    sub_heads: int = _above_0(8)
    entropy_weight: float = _above_0(1.0)
    lr: float = _above_0(5e-3)
    weight_decay: float = _at_least_0(1e-2)


@dataclass
class RefineConfig:
    """The whole network trained further, with the selected sub-heads of the new heads.

    Attributes:
        epochs: Passes over the training images; 0 = no such stage.
        towards: neighbours = a view of an image and a view of one of its neighbours fall into one cluster; labels = a
            strong view falls where the image itself surely does (self-labelling).
        confidence: With labels: probability from which an image counts as sure of its cluster.
        contrastive: Weight of the contrastive loss beside, if there is such a head; 0 = without.
        lr: Learning rate of the stage, which falls to zero as a cosine.
    """

    epochs: int = _at_least_0(0)
    towards: Literal["neighbours", "labels"] = "labels"
    confidence: float = _above_0(0.95)
    contrastive: float = _at_least_0(0.0)
    lr: float = _above_0(1e-4)


@dataclass
class MonitorConfig:
    """What can be watched.

    Attributes:
        log_every: Steps between lines of metrics.jsonl and points in TensorBoard.
        pictures_every: Epochs between pictures in TensorBoard; 0 = only at the end.
        progress: Show a progress bar.
        kmeans: At the end, also cluster the raw pixels with k-means and print its accuracy, to compare.
    """

    log_every: int = _above_0(10)
    pictures_every: int = _at_least_0(0)
    progress: bool = True
    kmeans: bool = False


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
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def of_features(self) -> bool:
        """Whether features are clustered as they are: no image is looked at twice, and no epoch trained."""
        return self.train.epochs == 0

    @property
    def pretrained(self) -> bool:
        """Whether the backbone starts from pretrained weights."""
        return self.model.pretrained or self.model.weights is not None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of heads that the model has, in the order of `HEADS`."""
        present = (True, self.model.num_overclusters > 0, self.model.projection_dim > 0)
        return tuple(head for head, there in zip(HEADS, present, strict=True) if there)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that the model has: one of each kind, or a clustering_K for each K of several."""
        clusters = self.model.num_clusters
        several = [f"clustering_{k}" for k in clusters] if isinstance(clusters, list) else ["clustering"]
        return (*several, *self.kinds[1:])

    @property
    def clustering_heads(self) -> dict[str, int]:
        """K of each clustering head of a complete config, by its name."""
        clusters = self.model.num_clusters
        if isinstance(clusters, list):
            return {f"clustering_{k}": k for k in clusters}
        assert clusters is not None, "complete() comes first"
        return {"clustering": clusters}

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, features and joints."""
        return torch.float64 if self.train.precision == "float64" else torch.float32

    @property
    def image_shape(self) -> tuple[int, int]:
        """Channels and side in pixels of the images of a complete config, before views are made of them."""
        size, channels = self.data.image_size, self.data.channels
        assert size is not None, "complete() comes first"
        assert channels is not None, "complete() comes first"
        return channels, size

    def to_yaml(self) -> str:
        """Return all groups as YAML that `--config FILE` reads back."""
        return as_yaml.dump(dataclasses.asdict(self))
