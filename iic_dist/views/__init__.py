"""What pictures are made of an image: policies, what is drawn, the twin of the op. Knows `ops` alone."""
