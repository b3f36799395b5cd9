"""Values that no run could work with are refused before any image is read."""

from __future__ import annotations

import math

import pytest

from iic_dist.config import Config
from iic_dist.config.check import check, doubt_about_clusters
from iic_dist.config.command_line import parse
from iic_dist.errors import UsageError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data.batch_size", "0"], "data.batch_size=0: must be above 0"),
        (["--data.workers", "-1"], "data.workers=-1: must be 0 or more"),
        (["--data.device_budget_gib", "-2"], "data.device_budget_gib=-2.0: must be 0 or more"),
        (["--optim.lr", "-1"], "optim.lr=-1.0: must be above 0"),
        (["--neighbours.whitening", "1.5"], "neighbours.whitening=1.5: must be from 0 to 1"),
        (["--neighbours.whitening", "-0.1"], "neighbours.whitening=-0.1: must be from 0 to 1"),
        (["--optim.lr", "inf"], "optim.lr.*inf"),
        (["--loss.temperature", "0"], "loss.temperature=0.0"),
        (["--run.seed", "-3"], "run.seed=-3"),
        (["--model.num_clusters", "1"], "model.num_clusters=1: must be 2 or more"),
        (["--model.num_clusters", "5,1"], r"model.num_clusters=\[5, 1\]: must be one number, or several different"),
        (["--model.num_clusters", "5,5"], r"model.num_clusters=\[5, 5\]: must be"),
        (["--model.num_clusters", "[7]"], r"model.num_clusters=\[7\]: must be"),
        (["--model.num_clusters", "5,8", "--model.sub_heads", "2"], "model.sub_heads=2: .*at least 3"),
        (["--model.num_clusters", "5,8", "--loss.prior", "sizes.txt"], r"loss.prior='sizes.txt'.*not of \[5, 8\]"),
        (["--model.num_clusters", "2", "--loss.prior", "[1, -2]"], r"loss.prior=\[1.0, -2.0\]: must be uniform, free"),
        (["--train.restart_after", "-1"], "train.restart_after=-1: must be 0 or more"),
        (["--train.order", "[clustering, nonsense]"], "train.order=.*nonsense"),
        (["--config", "cifar10-alternate", "--train.order", "[clustering]"], "overclustering, contrastive"),
        (
            ["--config", "cifar10-iic", "--train.contrastive_warmup_epochs", "3"],
            "no contrastive head.*projection_dim",
        ),
        (["--config", "stl10-iic", "--model.num_overclusters", "0"], "data.unlabelled=true"),
    ],
)
def test_a_value_out_of_bounds_is_one_line_that_names_the_field(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)


ABOVE_0 = [
    *("views.repeats", "model.sub_heads", "loss.entropy_weight", "loss.temperature", "optim.lr"),
    *("train.evaluate_batch_size", "train.checkpoint_every", "run.timeout_minutes"),
    *("monitor.log_every", "model.head_init_std"),
]
FROM_0_ON = [
    *("data.device_budget_gib", "data.workers", "model.num_overclusters", "model.projection_dim"),
    *("loss.clustering", "loss.overclustering", "loss.contrastive", "monitor.pictures_every"),
    *("optim.warmup_epochs", "optim.weight_decay", "optim.clip_norm", "optim.momentum"),
    *("train.epochs", "train.contrastive_warmup_epochs", "train.evaluate_every", "train.restart_after"),
    *("train.checkpoint_every_steps", "train.max_skipped_steps"),
]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [*((name, 0, "above 0") for name in ABOVE_0), *((name, -1, "0 or more") for name in FROM_0_ON)],
)
def test_every_bound_is_held(name: str, value: int, rule: str) -> None:
    config = Config()
    check(config)
    group, field = name.split(".")
    for wrong in (value, -math.inf, math.inf, math.nan):
        setattr(getattr(config, group), field, wrong)
        with pytest.raises(UsageError, match=f"^{name}={wrong}: must be {rule}$"):
            check(config)
    setattr(getattr(config, group), field, value + 1)
    check(config)


@pytest.mark.parametrize("name", ["optim.lr", "train.order", "data.batch_size", "loss.prior"])
def test_null_is_refused_where_it_means_nothing(name: str) -> None:
    """A file may say null where an option cannot."""
    config = Config()
    group, field = name.split(".")
    setattr(getattr(config, group), field, None)
    with pytest.raises(UsageError, match=f"^{name}=None: must be given$"):
        check(config)


@pytest.mark.parametrize(
    ("options", "images", "says"),
    [
        ([], 1797, None),
        (["--model.num_clusters", "10"], 10, None),
        (["--model.num_clusters", "11"], 10, "model.num_clusters=11 of 10 images: 1 or more will stay empty"),
        (["--model.num_clusters", "5,70"], 64, "model.num_clusters=70 of 64 images: 6 or more will stay empty"),
        (
            ["--model.num_clusters", "257", "--data.batch_size", "256"],
            1797,
            "model.num_clusters=257 is above data.batch_size=256: no step sees all clusters",
        ),
    ],
)
def test_more_clusters_than_images_are_one_warning(options: list[str], images: int, says: str | None) -> None:
    """Nothing was said of clusters that must stay empty, or that no step can show together."""
    config = parse(options)
    config.model.num_clusters = config.model.num_clusters or 10
    doubt = doubt_about_clusters(config, images)
    assert doubt is None if says is None else (doubt or "").startswith(says)
