"""Packaging; the metadata stand in pyproject.toml."""

from setuptools import setup

setup()
