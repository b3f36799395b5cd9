"""The losses of the global batch: local part -> collective -> op; and their sum over the heads of a step.

Both return the value of the whole batch of all ranks on every rank. DDP averages gradients over the W ranks,
so each local gradient carries a factor W: the average is the gradient of the global loss, for any shards.
"""

from iic_dist.losses.iic import IICTerms, iic_loss
from iic_dist.losses.nt_xent import nt_xent_loss, start_nt_xent_loss

__all__ = ["IICTerms", "iic_loss", "nt_xent_loss", "start_nt_xent_loss"]
