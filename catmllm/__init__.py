"""Training stack for language models on catalysts: adsorption systems as graphs, three-part text and CIF."""

__version__ = "0.2.0"
