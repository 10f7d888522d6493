"""Inception score (arXiv 1606.03498): exp of the mean over images of KL(p(class | image) ‖ p(class)), where p(class) is
the mean over a tenth of the images. It needs no reference, and rises with N.

As torch-fidelity computes it: 1008 classes of TensorFlow's network, no bias before the softmax, fp64, images in a fixed
random order before they are split. So images of the same number are in the same tenth for every method.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError

ORDER = 2020  # the seed of torch-fidelity's order


def inception_scores(
    features: Float[Tensor, "n dim"], classes: Float[Tensor, "c dim"], splits: int = 10
) -> Float[Tensor, " splits"]:
    """The score of each of `splits` parts, on the CPU. classes: weights of the last layer, `Extractor.classes`. Papers
    print the mean and `std(correction=0)`; the standard error of the mean is std()/√splits. InputError for fewer images
    than parts, or values that are not finite."""
    n = len(features)
    if not 1 <= splits <= n:
        raise InputError(f"splits={splits}: must lie between 1 and the {n} images")
    logits = features @ classes.to(features).T  # (n, dim) -> (n, c)
    if not logits.isfinite().all():
        raise InputError("features hold values that are not finite: the images they come from are broken")
    order = torch.from_numpy(np.random.RandomState(ORDER).permutation(n))
    scores = []
    for i in range(splits):
        part = logits[order[i * n // splits : (i + 1) * n // splits].to(logits.device)].double().log_softmax(1)
        mean = part.logsumexp(0) - np.log(len(part))  # log p(class)
        scores.append((part.exp() * (part - mean)).sum(1).mean().exp().cpu())
    return torch.stack(scores)
