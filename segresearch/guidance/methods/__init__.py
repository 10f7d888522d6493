"""One module a method of guidance: shapes of terms, post-processors, scales, perturbations (docs/methods.md)."""
