"""The command `catmllm`."""
