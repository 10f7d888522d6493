"""The energy bench: statistics, energy and curvature of attention logits, and tests of the paper's claims on them."""
