"""What the clusters are worth, with labels and without, and pictures of them."""
