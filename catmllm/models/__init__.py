"""The networks of CatalyticMLLM: the graph encoder, the projector and the multimodal language model."""

from pathlib import Path

# The trained model that comes with the package: an export of the layout `hf`, with its card.
# The commands take it where no run is named.
SHIPPED = Path(__file__).with_name("shipped")
