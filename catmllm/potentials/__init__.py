"""Machine-learned potentials of many structures at once, and relaxations by them."""
