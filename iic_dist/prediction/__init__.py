"""A trained run in use: images to clusters, tables, gallery, export."""
