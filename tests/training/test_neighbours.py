"""Heads trained on neighbours: the same on any number of ranks, after any stop, and judged by all pairs."""

from __future__ import annotations

import io
from typing import Any

import neighbour_tasks
import published
import pytest
import torch
from neighbour_tasks import CPU, OBJECTIVES, SHAPES, on, training, unit_rows
from ranks import Ranks
from runs import assert_equal
from torch import Tensor

from iic_dist.config.command_line import parse
from iic_dist.errors import UsageError
from iic_dist.models.feature_heads import FeatureSpace
from iic_dist.ops.nearest import nearest
from iic_dist.training.neighbour_stage import NeighbourStage
from iic_dist.training.neighbours import draw_partners
from iic_dist.training.starts import ClusterStarts

pytestmark = pytest.mark.usefixtures("one_thread")


def features_and_neighbours(n: int = 70, k: int = 6) -> tuple[Tensor, Tensor]:
    vectors = unit_rows(n, 8)
    return vectors, nearest(vectors, 0, vectors, k)


def to_the_end(*arguments: Tensor, **changes: Any) -> dict[str, Any]:
    return neighbour_tasks.trained(0, None, *arguments, changes)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 30), (3, 31), (4, 30), (4, 1024)])
def test_any_number_of_ranks_trains_and_judges_as_one(
    pools: dict[int, Ranks], world_size: int, batch_size: int
) -> None:
    """Also batches that do not divide by the ranks, and all images in one."""
    vectors, near = features_and_neighbours()
    changes = {"batch_size": batch_size}
    one = to_the_end(vectors, near, **changes)
    all_ranks = on(world_size, pools, neighbour_tasks.trained, vectors, near, changes)
    for result in all_ranks:
        torch.testing.assert_close(result["losses"], one["losses"], rtol=0, atol=1e-10)
        torch.testing.assert_close(result["weights"], one["weights"], rtol=0, atol=1e-10)
        torch.testing.assert_close(result["judged"], one["judged"], rtol=0, atol=1e-10)
        assert torch.equal(result["weights"], all_ranks[0]["weights"])
    for images, *parts in zip(one["images"], *(result["images"] for result in all_ranks), strict=True):
        assert torch.equal(torch.cat(parts), images)


def test_it_can_stop_after_any_step_and_go_on_bit_for_bit() -> None:
    vectors, near = features_and_neighbours()
    whole, states = training(vectors, near), []
    for _ in range(20):
        buffer = io.BytesIO()
        torch.save(whole.state_dict(), buffer)
        states.append(buffer)
        whole.train_step()
    for step, buffer in enumerate(states):
        buffer.seek(0)
        again = training(vectors, near)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        assert again.step == step
        while again.step < 20:
            again.train_step()
        assert_equal(again.state_dict(), whole.state_dict(), f"after step {step}")


def test_every_image_comes_once_in_an_epoch_of_its_own_order() -> None:
    vectors, near = features_and_neighbours(n=60)
    images = to_the_end(vectors, near, batch_size=15, steps=8)["images"]
    epochs = torch.cat(images[:4]), torch.cat(images[4:])
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(60))
    assert not torch.equal(*epochs)
    other = to_the_end(vectors, near, batch_size=15, steps=8, seed=4)["images"]
    assert not torch.equal(torch.cat(other[:4]), epochs[0])


def test_partners_depend_on_seed_step_and_image_alone() -> None:
    near = torch.arange(50 * 5).view(50, 5)  # which says whose neighbour it is, and which one
    images = torch.arange(50)
    drawn = draw_partners(near, images, seed=3, epoch=7, count=4).view(4, 50)
    assert torch.equal(drawn // 5, images.repeat(4, 1))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    assert torch.equal(draw_partners(near, order, seed=3, epoch=7, count=4).view(4, 20), drawn[:, order])
    assert torch.equal(draw_partners(near, images, seed=3, epoch=7, count=2).view(2, 50), drawn[:2])
    for other in ({"seed": 4, "epoch": 7}, {"seed": 3, "epoch": 8}):
        assert not torch.equal(draw_partners(near, images, count=4, **other).view(4, 50), drawn)


def test_each_neighbour_is_drawn_as_often() -> None:
    """20 draws of 5000 images: a share of 1/7 with a deviation of 0.0011."""
    near = torch.arange(7).repeat(5000, 1)
    counts = torch.bincount(draw_partners(near, torch.arange(5000), seed=0, epoch=0, count=20), minlength=7)
    assert float((counts / 100_000 - 1 / 7).abs().max()) < 5 * 0.0011


@pytest.mark.parametrize("walk", [1, 2, 3])
def test_the_verdict_is_the_loss_over_all_walks(walk: int) -> None:
    """Every walk is written out as a pair: k to the power of its steps for each image."""
    vectors, near = features_and_neighbours(n=40, k=4)
    heads = training(vectors, near, walk=walk)
    for _ in range(20):
        heads.train_step()
    judged = heads.judge()
    ends = torch.arange(40).unsqueeze(1)
    for _ in range(walk):
        ends = near[ends].flatten(1)
    for name, head in heads.heads.items():
        logits = head(vectors).detach()
        partners = logits[ends.T.flatten()]  # walk r of image i in row r * N + i
        expected = published.iic(logits, partners, OBJECTIVES[name].entropy_weight, OBJECTIVES[name].prior)
        torch.testing.assert_close(judged[name].loss, expected, rtol=0, atol=1e-10)
    assert {name: terms.joint.shape[:2] for name, terms in judged.items()} == SHAPES


def test_a_walk_goes_from_neighbour_to_neighbour() -> None:
    """On a ring, where each image has the two behind it, three steps lead 3 to 6 images on, each as often as it should.

    The sum of three fair coins: 1, 3, 3, 1 of eight; 40,000 draws deviate by 0.0025.
    """
    ring = (torch.arange(2000).unsqueeze(1) + torch.tensor([1, 2])) % 2000
    ends = draw_partners(ring, torch.arange(2000), seed=1, epoch=2, count=20, walk=3).view(20, 2000)
    moved = (ends - torch.arange(2000)) % 2000
    shares = torch.bincount(moved.flatten(), minlength=7) / 40_000
    expected = torch.tensor([0, 0, 0, 1, 3, 3, 1]) / 8
    assert float((shares - expected).abs().max()) < 5 * 0.0025


def test_each_phase_has_its_sub_heads_and_the_best_remain() -> None:
    """Of three that are left: twice as many at random, five times as many, the best six, the best three."""
    vectors, near = features_and_neighbours()
    heads = training(vectors, near, steps=20)
    counts, kept = [], []
    for _ in range(20):
        before = heads.judge()["clustering"].loss if heads.step in (8, 12) else None
        old = heads.heads["clustering"].linear.weight.detach().clone()
        heads.train_step()
        counts.append(heads.heads["clustering"].shape[0])
        if before is not None:
            kept.append((before, old, heads.heads["clustering"].linear.weight.detach().clone()))
    assert counts == [6] * 5 + [15] * 3 + [6] * 4 + [3] * 8
    for (losses, old, new), left in zip(kept, (6, 3), strict=True):
        best = losses.argsort()[:left].sort().values
        chosen = old.unflatten(0, (-1, 4))[best].flatten(0, 1)
        assert float((chosen - new).abs().max()) < 6e-3  # one step of AdamW on


def test_heads_at_clusters_start_behind_the_random_ones() -> None:
    vectors, near = features_and_neighbours()
    heads = training(vectors, near, steps=20)
    for _ in range(5):
        heads.train_step()
    random = heads.heads["clustering"].linear.weight.detach().clone()
    heads._go_on()
    joined = heads.heads["clustering"].linear
    assert torch.equal(joined.weight[:24], random)
    assert torch.equal(joined.weight[24:], ClusterStarts(vectors, near, 3)(4, 9).flatten(0, 1))
    assert not joined.bias[24:].any()


def test_random_heads_explore_with_a_strong_push_and_direct_neighbours() -> None:
    """The loss of the first steps and of later ones, by hand."""
    vectors, near = features_and_neighbours()
    heads = training(vectors, near, steps=8, walk=2)
    for step in range(4):
        while heads.step >= heads.plan[min(heads.phase + 1, 3)].first and heads.phase < 3:
            heads._go_on()
        explores = step < 2
        images = heads._batch()
        partners = draw_partners(near, images, 3, neighbour_tasks.neighbours._EPOCH + step, 2, 1 if explores else 2)
        head, towards = heads.heads["clustering_6"], OBJECTIVES["clustering_6"]
        weight = 2.0 if explores else 1.5
        expected = published.iic(head(vectors[images]), head(vectors[partners]), weight, towards.prior).detach()
        torch.testing.assert_close(heads.train_step()["clustering_6"].loss, expected, rtol=0, atol=1e-10)


def test_a_step_is_that_of_adamw_on_the_loss_of_its_pairs() -> None:
    """The first one, from PyTorch's own AdamW that is not fused, with the published loss."""
    vectors, near = features_and_neighbours()
    heads, reference = training(vectors, near), training(vectors, near)
    images = reference._batch()
    partners = draw_partners(near, images, 3, neighbour_tasks.neighbours._EPOCH, 2)
    loss = sum(
        published.iic(head(vectors[images]), head(vectors[partners]), 2.0, of.prior).sum()
        for head, of in ((reference.heads[name], OBJECTIVES[name]) for name in SHAPES)
    )
    loss.backward()  # type: ignore[union-attr]
    weights = [p for p in reference.parameters if p.dim() > 1]
    biases = [p for p in reference.parameters if p.dim() == 1]
    groups = [{"params": weights, "weight_decay": 1e-2}, {"params": biases, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=5e-3, fused=False, foreach=False).step()
    heads.train_step()
    for mine, theirs in zip(heads.parameters, reference.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_the_same_seed_gives_the_same_heads_and_leaves_the_random_state_alone() -> None:
    vectors, near = features_and_neighbours()
    before = torch.random.get_rng_state()
    first, second, other = (training(vectors, near, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, first.parameters, second.parameters))
    assert not torch.equal(first.parameters[0], other.parameters[0])


def test_the_finished_heads_say_of_features_what_was_trained_on_vectors() -> None:
    vectors, near = features_and_neighbours()
    heads = training(vectors, near)
    heads.train_step()
    space = FeatureSpace(torch.zeros(8).double(), torch.eye(8).double(), torch.zeros(8).double())
    finished = heads.finished(space)
    for name, head in heads.heads.items():
        torch.testing.assert_close(finished[name](2 * vectors), head(vectors))  # the space sees the direction alone


def test_heads_find_the_kinds_of_things() -> None:
    """Five blobs far apart, five clusters; one eighth is the smallest of them."""
    vectors = 5 * torch.nn.functional.normalize(neighbour_tasks.blobs(400, 12, noise=0.2))
    near = nearest(vectors, 0, vectors, 10)
    heads = neighbour_tasks.NeighbourTraining(
        vectors,
        near,
        {"clustering": (8, 5)},
        {"clustering": neighbour_tasks.Objective(2.0)},
        neighbour_tasks.settings(steps=150, batch_size=200),
        CPU,
    )
    while heads.step < 150:
        heads.train_step()
    best = int(heads.judge()["clustering"].loss.argmin())
    clusters = heads.heads["clustering"](vectors)[:, best].argmax(1)
    pairs = set(zip((torch.arange(400) % 5).tolist(), clusters.tolist(), strict=True))
    assert len(pairs) == 5


@pytest.mark.parametrize("world_size", [2, 4])
def test_fewer_images_than_ranks_are_one_line(pools: dict[int, Ranks], world_size: int) -> None:
    for said in on(world_size, pools, neighbour_tasks.why_no_training, world_size - 1):
        assert said == f"{world_size - 1} images for {world_size} ranks: use at most one rank an image"


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_images_are_one_line(count: int) -> None:
    config = parse(["--neighbours.steps", "5", "--model.num_clusters", "2"])
    with pytest.raises(UsageError, match=f"^{count} images have no neighbours to speak of"):
        NeighbourStage(config, unit_rows(count, 3).float(), CPU)


@pytest.mark.parametrize("count", [3, 4, 12, 21])
def test_a_stage_of_few_images_has_all_others_as_neighbours(count: int) -> None:
    """Fewer than k + 1, and fewer than a batch."""
    config = parse(["--neighbours.steps", "5", "--model.num_clusters", "2", "--neighbours.partners", "3"])
    stage = NeighbourStage(config, unit_rows(count, 3).float(), CPU)
    assert stage.neighbours.shape == (count, min(15, count - 1))
    assert stage.training.batch_size == count
    steps = []
    stage.run(lambda step, terms: steps.append((step, *terms)))
    assert steps == [(step, "clustering") for step in range(1, 6)]
    heads, record = stage.finish()
    assert heads["clustering"].shape == (8, 2)
    assert bool(record.losses["clustering"].isfinite().all())
