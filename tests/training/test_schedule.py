from __future__ import annotations

import torch

from iic_dist.data.sampler import Sampler
from iic_dist.training.schedule import Pass, Schedule

HEADS = ("clustering", "overclustering", "contrastive")


def schedule(alternate: bool = False, warmup: int = 0, order: tuple[str, ...] = HEADS, wide: bool = False) -> Schedule:
    narrow = Sampler(40, 8, seed=3)
    return Schedule(
        HEADS,
        narrow,
        Sampler(100, 8, seed=3) if wide else narrow,
        alternate=alternate,
        order=order,
        contrastive_warmup_epochs=warmup,
        views=3,
    )


def test_a_joint_epoch_is_one_pass_of_all_heads() -> None:
    assert schedule().passes(0) == [Pass(HEADS, 5, 0)]
    assert not schedule().heads_take_turns
    assert schedule().total_steps(7) == 35


def test_an_alternating_epoch_follows_the_order_with_other_views_in_each_pass() -> None:
    order = ("overclustering", "clustering", "clustering", "contrastive")
    passes = schedule(alternate=True, order=order).passes(4)
    assert [each.heads for each in passes] == [(head,) for head in order]
    assert [each.first_view for each in passes] == [0, 3, 6, 9]
    assert schedule(alternate=True, order=order).heads_take_turns


def test_the_warm_up_trains_the_contrastive_head_alone() -> None:
    warmed = schedule(warmup=2)
    assert [warmed.passes(epoch)[0].heads for epoch in range(3)] == [
        ("contrastive",),
        ("contrastive",),
        HEADS,
    ]
    assert warmed.heads_take_turns


def test_every_pass_of_one_set_sees_every_image_once() -> None:
    for each in schedule(alternate=True).passes(1):
        seen = [schedule().batches(1, each.heads, i)[0][1].indices for i in range(each.steps)]
        assert sorted(torch.cat(seen).tolist()) == list(range(40))


def test_a_joint_step_on_two_sets_has_a_batch_of_each() -> None:
    both = schedule(wide=True)
    (narrow_heads, narrow), (wide_heads, wide) = both.batches(0, HEADS, 2)
    assert narrow_heads == ("clustering",)
    assert wide_heads == ("overclustering", "contrastive")
    assert narrow.indices.max() < 40
    assert len(wide.indices) == 8


def test_joint_steps_walk_over_the_wide_set_without_leaving_an_image_out() -> None:
    both = schedule(wide=True, warmup=1)
    wide = [both.batches(0, ("contrastive",), i)[0][1] for i in range(12)]  # the warm-up: one pass over 96 of 100
    assert len(set(torch.cat([batch.indices for batch in wide]).tolist())) == 96
    joint = [both.batches(epoch, HEADS, i)[1][1] for epoch in (1, 2, 3) for i in range(5)][:12]
    assert {batch.epoch for batch in joint} == {1}  # the next pass over the wide set, spread over three epochs
    assert len(set(torch.cat([batch.indices for batch in joint]).tolist())) == 96


def test_heads_of_one_kind_take_their_turn_together() -> None:
    heads = ("clustering_5", "clustering_10", "overclustering")
    narrow, wide = Sampler(40, 8, seed=3), Sampler(100, 8, seed=3)
    turns = Schedule(heads, narrow, wide, alternate=True, order=HEADS, contrastive_warmup_epochs=0, views=3)
    assert [(each.heads, each.steps) for each in turns.passes(0)] == [(heads[:2], 5), (heads[2:], 12)]
    joint = Schedule(heads, narrow, wide, alternate=False, order=HEADS, contrastive_warmup_epochs=0, views=3)
    assert [members for members, _ in joint.batches(0, heads, 0)] == [heads[:2], heads[2:]]


def test_steps_are_counted_without_listing_every_epoch() -> None:
    for warmup in (0, 3):
        each = schedule(alternate=True, warmup=warmup, wide=True)
        assert [each.total_steps(n) for n in range(7)] == [sum(len(each.steps(i)) for i in range(n)) for n in range(7)]
        assert each.total_steps(2**60) > 2**60
