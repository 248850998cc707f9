"""hcx: an open stack for sovereign language models, from raw text to a served, compressed model."""

__version__ = "0.1.0"
