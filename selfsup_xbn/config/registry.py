"""Registries of methods, adaptations, data sets and evaluators.

An entry refers to its object by ``"module:attribute"``, which is imported at the first use of the object. The command
line can therefore list all names without importing torch. To extend a registry, add a line here or call ``add``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from selfsup_xbn.errors import UserError, near


class Entry(NamedTuple):
    """An entry of a registry.

    Attributes:
        target: The object, or its ``"module:attribute"``.
        help: Help text of one line.
        options: Names of the fields of ``Config`` that an evaluator reads.
    """

    target: Any
    help: str
    options: tuple[str, ...] = ()


class Registry(Mapping[str, Any]):
    """A mapping from names to objects, in the order of registration.

    Iteration and ``in`` do not import the objects.

    Args:
        kind: Noun for the objects in error messages.
        entries: Initial entries by name.

    Example:
        >>> shapes = Registry("shape", {"counter": Entry("collections:Counter", "a multiset")})
        >>> shapes.add("mapping", dict, "a dictionary")
        >>> list(shapes), shapes["counter"].__name__, shapes["mapping"]()
        (['counter', 'mapping'], 'Counter', {})
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry]) -> None:
        self.kind, self.entries = kind, dict(entries)

    def add(self, name: str, target: Any, help: str, *, options: tuple[str, ...] = ()) -> None:
        """Register an object.

        Args:
            name: Name of the object.
            target: The object, or its ``"module:attribute"``.
            help: Help text of one line.
            options: Names of the fields of ``Config`` that an evaluator reads.

        Raises:
            ValueError: The name is already registered.
        """
        if name in self.entries:
            raise ValueError(f"expected a new name for a {self.kind}, got {name!r}, which is registered")
        self.entries[name] = Entry(target, help, options)

    def remove(self, name: str) -> None:
        """Remove a name from the registry.

        Raises:
            KeyError: The name is not registered.
        """
        del self.entries[name]

    def find(self, name: str) -> Any:
        """Return the object with a name.

        Raises:
            UserError: The name is not registered. The message lists the registered names.
        """
        if name not in self.entries:
            raise UserError(f"unknown {self.kind} {name!r}: expected one of {', '.join(self)}{near(name, self)}")
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
    """Return the object that ``"module:attribute"`` refers to, or ``target`` itself if it is not a string."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


METHODS = Registry(
    "method",
    {
        "pretrain": Entry(
            "selfsup_xbn.config.modes:PretrainConfig",
            "self-supervised pretraining with a momentum encoder and a queue (MoCo)",
        ),
        "supervise": Entry(
            "selfsup_xbn.config.modes:SuperviseConfig", "supervised metric learning with a cross-batch memory"
        ),
    },
)
"""Subclasses of ``Config`` by mode. Their ``method`` is the class to train."""

ADAPTATIONS = Registry(
    "adaptation",
    {
        "xbm": Entry("selfsup_xbn.memory.adaptation:XBM", "no adaptation"),
        "xbn": Entry("selfsup_xbn.memory.adaptation:XBN", "match the moments of the batch"),
        "axbn": Entry("selfsup_xbn.memory.adaptation:AXBN", "match Kalman-filtered moments"),
    },
)
"""Subclasses of ``Adaptation``."""

DATA_SETS = Registry(
    "data set",
    {
        "glyphs": Entry("selfsup_xbn.data.datasets.glyphs:load", "characters of many fonts, disjoint test classes"),
        "glyphs-jittered": Entry("selfsup_xbn.data.datasets.glyphs:load", "glyphs, each slightly rotated and shifted"),
        "digits": Entry("selfsup_xbn.data.datasets.digits:load", "scikit-learn's handwritten digits"),
        "digits-disjoint": Entry("selfsup_xbn.data.datasets.digits_disjoint:load", "digits, disjoint test classes"),
        "cifar10": Entry("selfsup_xbn.data.datasets.cifar:load", "CIFAR-10 (downloaded on first use)"),
        "cifar100": Entry("selfsup_xbn.data.datasets.cifar:load", "CIFAR-100 (downloaded on first use)"),
        "sop": Entry("selfsup_xbn.data.datasets.sop:load", "Stanford Online Products"),
        "inshop": Entry("selfsup_xbn.data.datasets.inshop:load", "In-Shop Clothes Retrieval"),
        "deepfashion2": Entry(
            "selfsup_xbn.data.datasets.deepfashion2:load", "DeepFashion2, consumer-to-shop retrieval"
        ),
        "cars196": Entry("selfsup_xbn.data.datasets.cars196:load", "Cars196, disjoint test classes"),
        "cub200": Entry("selfsup_xbn.data.datasets.cub200:load", "CUB-200-2011, disjoint test classes"),
        "omniglot": Entry("selfsup_xbn.data.datasets.omniglot:load", "Omniglot, disjoint test alphabets"),
        "folder": Entry("selfsup_xbn.data.datasets.folder:load", "images in PATH/train/CLASS/ and PATH/test/CLASS/"),
        "list": Entry("selfsup_xbn.data.datasets.listed:load", "images in a CSV file: path, label and split"),
    },
)
"""Functions ``load(name, path, *, root, cache_bytes, workers)`` that return ``ImageData``."""

EVALUATORS = Registry(
    "evaluator",
    {
        "knn": Entry(
            "selfsup_xbn.evaluation.evaluators:KnnEvaluator",
            "weighted k-NN accuracy of an encoder, compared with raw pixels and the untrained encoder",
            ("knn_k", "knn_temperature"),
        ),
        "retrieval": Entry(
            "selfsup_xbn.evaluation.evaluators:RetrievalEvaluator",
            "Recall@K, R-precision and MAP@R of an encoder, compared with raw pixels and the untrained encoder",
            ("recall_ks",),
        ),
    },
)
"""Classes that implement the protocol ``selfsup_xbn.evaluation.evaluators.Evaluator``."""

EXPORTS = {
    "csv": "metrics.csv",
    "torchvision": "backbone.pt",
    "safetensors": "encoder.safetensors",
    "onnx": "encoder.onnx",
}
"""Default file name of each export format."""
