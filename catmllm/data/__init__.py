"""What the models learn from: adsorption systems, and the samples made of them."""
