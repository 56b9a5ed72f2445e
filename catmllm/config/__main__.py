"""`python -m catmllm.config > docs/configuration.md`: the page of every key, made from the schema."""

from catmllm.config.help import markdown

print(markdown(), end="")
