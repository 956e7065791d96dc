"""jaxcrystal: designs crystals with language models."""

__version__ = "0.1.0"
