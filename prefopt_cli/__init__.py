"""prefopt: preference optimization of language models beyond plain DPO, from one YAML recipe."""

__version__ = "0.1.0"
