"""Networks: a backbone by name, heads, and both together."""

from iic_dist.models.backbones import BACKBONE_NAMES, Backbone, build_backbone
from iic_dist.models.cluster_net import ClusterNet
from iic_dist.models.heads import ProjectionHead, SubHeads
from iic_dist.models.norm import Norm
from iic_dist.models.placement import distribute, on_device

__all__ = [
    "BACKBONE_NAMES",
    "Backbone",
    "ClusterNet",
    "Norm",
    "ProjectionHead",
    "SubHeads",
    "build_backbone",
    "distribute",
    "on_device",
]
