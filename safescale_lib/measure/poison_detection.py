"""Finding poison in a training set from what the trained model makes of it: a suspicion score for every item.

Both detectors look at one class at a time, in the space of the model's last features: poison carries the class's label but
reaches it by another road. A larger score is more suspicious.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike


def _by_class(features: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(features, dtype=float), np.asarray(labels)
    if x.ndim != 2 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"features must be finite with shape (N, D) and N >= 1, got {x.shape}")
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers, one per row of features, got {y.dtype} {y.shape}")
    return x, y


def spectral_signature(features: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(N,) squared projection of each item on the first principal direction of its class [tran2018spectral].

    features: (N, D) the model's last features of the training items; labels: (N,) the labels they came with. Algorithm 1
    removes from each
    class the largest 1.5 times the expected number of poisoned items; here the score is handed out and the share is the
    reader's.
    A class of one item scores 0.
    """
    x, y = _by_class(features, labels)
    scores = np.zeros(len(x))
    for label in np.unique(y):
        own = y == label
        centred = x[own] - x[own].mean(0)  # (n, D)
        direction = np.linalg.svd(centred, full_matrices=False)[2][0]  # (D,) top right singular vector
        scores[own] = (centred @ direction) ** 2
    return scores


def activation_clustering(
    features: ArrayLike, labels: ArrayLike, *, reduce: Literal["pca", "ica"] = "pca", components: int = 10, seed: int = 0
) -> np.ndarray:
    """(N,) how surely an item belongs to the smaller of two clusters of its class, and how clearly the class has two
    [chen2018activation].

    features, labels: as for `spectral_signature`. Per class: reduction, then 2-means. The paper judges classes by relative
    size
    or by silhouette; here the two become one number in [-1, 1]: the class's mean silhouette times (1 + the item's
    silhouette) / 2,
    positive in the smaller cluster, negative in the larger. Classes of fewer than 4 items score 0.
    reduce: "ica" as in the paper; it scales all components alike, so that a small class splits along its noise, hence "pca".
    components: at most this many, and fewer than the class has items. seed: of both fits.
    """
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA, FastICA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import silhouette_samples

    x, y = _by_class(features, labels)
    if components < 1:
        raise ValueError(f"components must be at least 1, got {components}")
    if reduce not in ("pca", "ica"):
        raise ValueError(f"reduce must be 'pca' or 'ica', got {reduce!r}")
    scores = np.zeros(len(x))
    for label in np.unique(y):
        own = y == label
        if own.sum() < 4 or np.ptp(x[own], axis=0).max() == 0:
            continue
        kept = min(components, x.shape[1], int(own.sum()) - 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a class without independent parts has no fixed point
            ica = reduce == "ica"
            reduction = FastICA(kept, random_state=seed, max_iter=1000, tol=0.005) if ica else PCA(kept, random_state=seed)
            reduced = reduction.fit_transform(x[own])  # (n, components)
        cluster = KMeans(2, n_init=10, random_state=seed).fit_predict(reduced)
        if len(np.unique(cluster)) < 2:
            continue
        clear = silhouette_samples(reduced, cluster)  # (n,)
        smaller = cluster == int(cluster.mean() < 0.5)
        scores[own] = clear.mean() * (1 + clear) / 2 * np.where(smaller, 1, -1)
    return scores
