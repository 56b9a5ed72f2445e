"""The networks of CatalyticMLLM: the graph encoder, the projector and the multimodal language model."""
