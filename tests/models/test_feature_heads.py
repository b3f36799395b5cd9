"""Heads on features against the equation in NumPy, and networks that are given them and read from a state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from iic_dist.models import ClusterNet, ProjectionHead, SubHeads
from iic_dist.models.feature_heads import (
    FeatureSpace,
    FeatureSubHeads,
    adopt_heads,
    heads_of_state,
    keep_selected,
    load_network,
)


class Backbone(nn.Module):
    """Six features of three numbers."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


def space(f: int = 6, d: int = 4, seed: int = 0, whitened: bool = False) -> FeatureSpace:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return FeatureSpace(numbers(f), numbers(f, d), numbers(d), numbers(f, f) if whitened else None)


def network() -> ClusterNet:
    """What a run begins with: heads of two K, an overclustering and a contrastive one."""
    torch.manual_seed(0)
    heads = {"clustering_2": SubHeads(6, 3, 2), "clustering_5": SubHeads(6, 3, 5), "overclustering": SubHeads(6, 3, 9)}
    return ClusterNet(Backbone(), {**heads, "contrastive": ProjectionHead(6, 4)}).double()


CLUSTERING = {"clustering_2": 2, "clustering_5": 5}


def new_heads(sub_heads: int = 4, whitened: bool = False) -> dict[str, FeatureSubHeads]:
    torch.manual_seed(1)
    return {name: FeatureSubHeads(space(whitened=whitened), sub_heads, k).double() for name, k in CLUSTERING.items()}


@pytest.mark.parametrize("whitened", [False, True])
def test_the_space_is_its_equation(generator: torch.Generator, whitened: bool) -> None:
    features, of = torch.randn(9, 6, generator=generator, dtype=torch.float64), space(whitened=whitened)
    mean, projection, shift = (value.detach().numpy() for value in (of.mean, of.projection, of.shift))
    centred = features.numpy() - mean
    if of.whitening is not None:
        centred = centred @ of.whitening.detach().numpy()
    assert whitened == (of.whitening is not None)
    directions = centred / np.sqrt((centred**2).sum(1, keepdims=True))
    projected = directions @ projection - shift
    expected = 5 * projected / np.sqrt((projected**2).sum(1, keepdims=True))
    np.testing.assert_allclose(of(features).numpy(), expected, rtol=0, atol=1e-14)


def test_the_space_computes_in_its_own_numbers(generator: torch.Generator) -> None:
    """Half precision of the features, or autocast around it, must not round what is small beside the mean."""
    features = torch.randn(9, 6, generator=generator).half()
    of = space().float()
    expected = of(features.float())
    assert torch.equal(of(features), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(of(features), expected)
    assert of(features).dtype == torch.float32


def test_a_feature_at_the_mean_has_a_vector_all_the_same() -> None:
    of = space()
    vector = of(of.mean.detach().unsqueeze(0))
    assert vector.isfinite().all()
    torch.testing.assert_close(vector[0], -5 * of.shift / of.shift.norm())


def test_sub_heads_are_linear_classifiers_of_the_vectors(generator: torch.Generator) -> None:
    features = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    head = new_heads()["clustering_5"]
    vectors = head.space(features).numpy()
    weight, bias = head.linear.weight.detach().numpy(), head.linear.bias.detach().numpy()
    logits = head(features).detach().numpy()
    assert logits.shape == (7, 4, 5)
    for h in range(4):
        rows = slice(5 * h, 5 * h + 5)
        np.testing.assert_allclose(logits[:, h], vectors @ weight[rows].T + bias[rows], rtol=0, atol=1e-14)


@pytest.mark.parametrize("sub_head", [0, 2, 3])
def test_a_sub_head_alone_says_the_same(sub_head: int, generator: torch.Generator) -> None:
    features = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    head = new_heads()["clustering_5"]
    nn.init.normal_(head.linear.bias)
    alone = head.alone(sub_head)
    assert alone.shape == (1, 5)
    assert torch.equal(alone(features)[:, 0], head(features)[:, sub_head])
    before = head(features)
    nn.init.zeros_(alone.linear.weight)
    assert torch.equal(head(features), before)


def test_only_the_classifiers_are_trained() -> None:
    head = new_heads()["clustering_2"]
    assert [name for name, value in head.named_parameters() if value.requires_grad] == ["linear.weight", "linear.bias"]
    assert not list(head.buffers())  # which a rank would average with those of others


def test_new_heads_take_the_place_of_those_with_clusters() -> None:
    """The contrastive head stays, with its weights and as the last: what it gathers travels beside other losses."""
    model = network()
    contrastive = model.heads["contrastive"]
    adopt_heads(model, new_heads())
    assert list(model.heads) == ["clustering_2", "clustering_5", "contrastive"]
    assert model.heads["contrastive"] is contrastive
    assert model.shapes == {"clustering_2": (4, 2), "clustering_5": (4, 5)}


def test_the_selected_sub_heads_are_kept(generator: torch.Generator) -> None:
    model = network()
    adopt_heads(model, new_heads())
    images = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    before = model(images)
    keep_selected(model, {"clustering_2": 3, "clustering_5": 1})
    after = model(images)
    assert list(model.heads) == ["clustering_2", "clustering_5", "contrastive"]
    assert torch.equal(after["clustering_2"][:, 0], before["clustering_2"][:, 3])
    assert torch.equal(after["clustering_5"][:, 0], before["clustering_5"][:, 1])
    assert torch.equal(after["contrastive"], before["contrastive"])


def trained(stage: str) -> ClusterNet:
    """A network as a run leaves it after a stage."""
    model = network()
    if stage != "representation":
        adopt_heads(model, new_heads(whitened="whitened" in stage))
    if stage.startswith("refine"):
        keep_selected(model, {"clustering_2": 3, "clustering_5": 1})
    if stage == "refine alone":
        del model.heads["contrastive"]
    return model


@pytest.mark.parametrize("stage", ["representation", "neighbours", "neighbours, whitened", "refine", "refine alone"])
def test_a_state_of_any_stage_is_read_into_the_network_that_the_run_began_with(
    stage: str, generator: torch.Generator
) -> None:
    saved, model = trained(stage), network()
    images = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    load_network(model, saved.state_dict(), CLUSTERING)
    assert list(model.heads) == list(saved.heads)
    assert model.shapes == saved.shapes
    for name, output in saved(images).items():
        assert torch.equal(model(images)[name], output)


def test_heads_are_known_by_their_space() -> None:
    assert heads_of_state(network().state_dict(), CLUSTERING) == {}
    found = heads_of_state(trained("neighbours").state_dict(), CLUSTERING)
    assert {name: head.shape for name, head in found.items()} == {"clustering_2": (4, 2), "clustering_5": (4, 5)}


@pytest.mark.parametrize("stage", ["representation", "neighbours", "neighbours, whitened", "refine"])
@pytest.mark.parametrize("wrong", ["a backbone of other width", "a key too many", "a head of other K"])
def test_a_state_of_another_network_is_refused(stage: str, wrong: str) -> None:
    state = dict(trained(stage).state_dict())
    if wrong == "a backbone of other width":
        state["backbone.layer.weight"] = torch.zeros(6, 4)
    elif wrong == "a key too many":
        state["backbone.more"] = torch.zeros(1)
    else:
        state["heads.clustering_5.linear.weight"] = torch.zeros(3, 6)
    with pytest.raises(RuntimeError):
        load_network(network(), state, CLUSTERING)
