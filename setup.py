"""Build hook of the one distribution; everything declarative stands in pyproject.toml."""

from setuptools import setup

setup()
