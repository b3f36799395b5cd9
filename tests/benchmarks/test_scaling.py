"""The model of benchmarks/scaling_model.py: known values, and its bytes against those that a step really exchanges."""

from __future__ import annotations

import bench_scaling
import pytest
import rank_tasks
from ranks import Ranks
from scaling_model import Network, Traffic, contrast_flops, predict

from iic_dist.config.build import build_model
from iic_dist.config.command_line import parse

RING = Network(latency=1e-3, latency_between=5e-3, bandwidth=1e6, ranks_per_node=4, tree=False)


def test_a_ring_is_what_one_counts_by_hand() -> None:
    assert RING.all_gather(4e6, 4) == pytest.approx(3 * 1e-3 + 3)  # three hops, three quarters of the bytes
    assert RING.all_reduce(4e6, 4) == pytest.approx(2 * (3 * 1e-3 + 3))
    assert RING.all_gather(8e6, 8) == pytest.approx(5 * 1e-3 + 2 * 5e-3 + 7)  # two of seven hops leave the node
    assert RING.all_reduce(1e9, 1) == 0


def test_a_tree_is_taken_where_it_is_faster() -> None:
    tree = Network(**{**RING.__dict__, "tree": True})
    assert tree.all_reduce(8, 64) == pytest.approx(2 * (2 * 1e-3 + 4 * 5e-3) + 16 / 1e6)
    assert tree.all_reduce(1e12, 64) == RING.all_reduce(1e12, 64)


def test_the_bytes_are_those_that_a_step_exchanges(ranks: Ranks) -> None:
    arguments = ["--data.batch_size", "64", "--monitor.progress", "false"]
    config = parse([*arguments, "--model.num_clusters", "10"])
    model = build_model(config, 1, 8)
    shape = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "statistics": sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point()),
        "clusters": [10, 30],
        "sub_heads": 5,
        "embedding": 128,
    }
    traffic = Traffic.of_step(images=64, **shape)
    reduced = [*traffic.joints, traffic.statistics]
    wanted = [("all_reduce", size) for size in reduced]
    wanted += [("all_gather", traffic.embeddings), ("all_gather", traffic.log_sum_exps)]
    for seen in ranks.run(4, rank_tasks.collectives_of_a_step, arguments):
        assert sorted(seen) == sorted(wanted)
    assert traffic.joints == (4 * (5 * 10 * 10 + 1), 4 * (5 * 30 * 30 + 1))
    assert traffic.gradients == 4 * shape["parameters"]


def test_the_shape_of_the_gpus_prediction_is_that_of_the_preset() -> None:
    # In a step that trains all three heads, as the preset's did before its stages.
    config = parse(["--config", "cifar10", "--model.num_clusters", "10", "--model.num_overclusters", "70"])
    model = build_model(config, 3, 32)
    shape = bench_scaling.SHAPE
    assert shape["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert shape["statistics"] == sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    assert shape["clusters"] == [config.model.num_clusters, config.model.num_overclusters]
    assert shape["embedding"] == config.model.projection_dim


def test_a_step_hides_gradients_behind_the_backward_pass_and_nothing_else() -> None:
    traffic = Traffic(joints=(1000, 2000), embeddings=4000, log_sum_exps=400, statistics=40, gradients=1_000_000)
    pieces = {"own_images": 8, "compute": 4.0, "contrast_rate": 1e6, "embedding": 16, "traffic": traffic}
    step = predict(ranks=4, network=RING, backward_share=0.5, overlap=0.5, **pieces)
    losses = sum(RING.all_reduce(size, 4) for size in (1000, 2000, 40))
    losses += RING.all_gather(4000, 4) + RING.all_gather(400, 4)
    assert step.losses == pytest.approx(losses)
    assert step.gradients == pytest.approx(RING.all_reduce(1e6, 4))
    assert step.exposed == pytest.approx(step.gradients - 1.0)
    assert step.contrast == pytest.approx(3 * contrast_flops(8, 8, 16) / 1e6)
    assert step.total == pytest.approx(4 + step.contrast + step.losses + step.exposed)
    assert predict(ranks=1, network=RING, backward_share=0.5, overlap=0.5, **pieces).total == 4.0


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_fit_finds_the_network_that_the_times_come_from(ranks: int) -> None:
    true = Network(2e-4, 2e-4, 3e8, ranks, tree=False)
    sizes = bench_scaling.SIZES
    link = {
        name: {str(size): getattr(true, name)(size, ranks) for size in sizes} for name in ("all_reduce", "all_gather")
    }
    found = bench_scaling.fit_network(link, ranks)
    assert found.latency == pytest.approx(true.latency, rel=1e-6)
    assert found.bandwidth == pytest.approx(true.bandwidth, rel=1e-6)


def test_efficiency_falls_with_the_number_of_gpus_and_with_a_slower_network() -> None:
    rows = {(row["network"], row["scaling"], row["gpus"]): row for row in bench_scaling.predict_gpus()}
    assert len(rows) == 12
    for (network, scaling, gpus), row in rows.items():
        assert 0 < row["efficiency"] <= 1
        if gpus > 8:
            assert row["efficiency"] < rows[network, scaling, 8]["efficiency"]
    fast, slow = bench_scaling.NETWORKS
    assert rows[slow, "weak", 64]["step_ms"] > rows[fast, "weak", 64]["step_ms"]
