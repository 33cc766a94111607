"""Tables of everything that a run chooses by name: methods, adaptations, data sets and evaluators.

An entry names its object by ``"module:attribute"``, which is imported when the object is first used. So the command
line lists every name without importing torch. To add something, write its file and add its line here, or call ``add``
from a program of your own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from selfsup_xbn.errors import UserError, near


class Entry(NamedTuple):
    """A line of a registry.

    Attributes:
        target: the object, or ``"module:attribute"``.
        help: one line for the command line.
        options: for an evaluator, the fields of ``Config`` that it reads.
    """

    target: Any
    help: str
    options: tuple[str, ...] = ()


class Registry(Mapping[str, Any]):
    """Objects by name, in the order of their registration. Iteration and ``in`` import nothing.

    Example:
        >>> shapes = Registry("shape", {"counter": Entry("collections:Counter", "a multiset")})
        >>> shapes.add("mapping", dict, "a dictionary")
        >>> list(shapes), shapes["counter"].__name__, shapes["mapping"]()
        (['counter', 'mapping'], 'Counter', {})
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry]) -> None:
        self.kind, self.entries = kind, dict(entries)

    def add(self, name: str, target: Any, help: str, *, options: tuple[str, ...] = ()) -> None:
        """Register an object, or the ``"module:attribute"`` where it is.

        Raises:
            ValueError: the name is taken.
        """
        if name in self.entries:
            raise ValueError(f"expected a new {self.kind}, got {name!r}, which is registered")
        self.entries[name] = Entry(target, help, options)

    def remove(self, name: str) -> None:
        """Take a name out of the registry."""
        del self.entries[name]

    def find(self, name: str) -> Any:
        """Return the object of that name.

        Raises:
            UserError: there is no such name; the message lists those that exist.
        """
        if name not in self.entries:
            raise UserError(f"no {self.kind} {name!r} (choose from {', '.join(self)}){near(name, self)}")
        return self[name]

    def __getitem__(self, name: str) -> Any:
        return imported(self.entries[name].target)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def imported(target: Any) -> Any:
    """Return the object that ``"module:attribute"`` names; anything but a string is returned as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


METHODS = Registry(
    "method",
    {
        "pretrain": Entry(
            "selfsup_xbn.config.schema:PretrainConfig",
            "self-supervised pretraining with a momentum encoder and a queue (MoCo)",
        ),
        "supervise": Entry(
            "selfsup_xbn.config.schema:SuperviseConfig", "supervised metric learning with a cross-batch memory"
        ),
    },
)
"""The options of each mode, a subclass of ``Config`` whose ``method`` names the class that is trained."""

ADAPTATIONS = Registry(
    "adaptation",
    {
        "xbm": Entry("selfsup_xbn.memory.adaptation:XBM", "none"),
        "xbn": Entry("selfsup_xbn.memory.adaptation:XBN", "to the moments of the batch"),
        "axbn": Entry("selfsup_xbn.memory.adaptation:AXBN", "to Kalman-filtered moments"),
    },
)
"""Subclasses of ``Adaptation``."""

DATA_SETS = Registry(
    "data set",
    {
        "digits": Entry("selfsup_xbn.data.datasets.digits:load", "scikit-learn's handwritten digits"),
        "cifar10": Entry("selfsup_xbn.data.datasets.cifar:load", "CIFAR-10, downloaded"),
        "cifar100": Entry("selfsup_xbn.data.datasets.cifar:load", "CIFAR-100, downloaded"),
        "folder": Entry("selfsup_xbn.data.datasets.folder:load", "PATH holds train/CLASS/ and test/CLASS/"),
        "digits-disjoint": Entry("selfsup_xbn.data.datasets.digits_disjoint:load", "digits, test classes unseen"),
        "sop": Entry("selfsup_xbn.data.datasets.sop:load", "Stanford Online Products"),
        "inshop": Entry("selfsup_xbn.data.datasets.inshop:load", "In-Shop Clothes Retrieval"),
        "deepfashion2": Entry("selfsup_xbn.data.datasets.deepfashion2:load", "DeepFashion2, consumer to shop"),
        "cars196": Entry("selfsup_xbn.data.datasets.cars196:load", "Cars196, test classes unseen"),
        "cub200": Entry("selfsup_xbn.data.datasets.cub200:load", "CUB-200-2011, test classes unseen"),
        "omniglot": Entry("selfsup_xbn.data.datasets.omniglot:load", "Omniglot, test alphabets unseen"),
    },
)
"""Functions ``load(name, path, *, root, cache_bytes, workers)`` that return ``ImageData``."""

EVALUATORS = Registry(
    "evaluator",
    {
        "knn": Entry(
            "selfsup_xbn.evaluation.evaluators:KnnEvaluator",
            "weighted k-NN of a run's encoder, or of one from elsewhere, beside raw pixels and an untrained encoder",
            ("knn_k", "knn_temperature"),
        ),
        "retrieval": Entry(
            "selfsup_xbn.evaluation.evaluators:RetrievalEvaluator",
            "Recall@K, R-precision and MAP@R of a run's encoder, or of one from elsewhere, beside the same",
            ("recall_ks",),
        ),
    },
)
"""Classes with the methods of ``selfsup_xbn.evaluation.evaluators.Evaluator``."""
