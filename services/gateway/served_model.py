"""Which model this gateway answers for, and whether the cluster serves it.

A gateway that has the weights knows its model by their digest, and uses no worker of another one.
Without weights it cannot tell models apart (tokenizer and config.json may be the same): it takes
the cluster's model as it is, and the next one when all workers have been replaced. Only an answer
that has begun stays with the model that it began on.
"""

from __future__ import annotations

import logging

from baton.shared.directory.cluster_model import ClusterModel, shown_model
from baton.shared.directory.workers import WorkerRecord
from baton.shared.rpc.errors import ModelReplaced
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)


class ServedModel:
    def __init__(self, name: str, vocab_size: int) -> None:
        self.digest: str | None = None
        """That of the weights, or the cluster's once it is known."""
        self._name = name
        self._vocab_size = vocab_size
        self._has_weights = False
        self._cluster_model: ClusterModel | None = None

    def __str__(self) -> str:
        if self._has_weights and self.digest is not None:
            return shown_model(self._name, self.digest)
        return f"{self._name!r} (no weights here; vocabulary of {self._vocab_size})"

    def has_weights(self, digest: str) -> None:
        """From now on it is theirs, whatever the cluster says."""
        self.digest, self._has_weights = digest, True

    def learn(self, cluster_model: ClusterModel | None) -> None:
        """What the directory says; None while no worker is registered, which changes nothing."""
        before, self._cluster_model = self._cluster_model, cluster_model
        if cluster_model is None or cluster_model == before:
            return
        if self.other is not None:
            message = f"the cluster's is {cluster_model}, this gateway's {self}"
            log_event(logger, logging.WARNING, "nothing to serve", message=message)
        elif not self._has_weights:
            self.digest = cluster_model.digest
            log_event(logger, logging.INFO, "serving the cluster's model", model=cluster_model)

    @property
    def other(self) -> ClusterModel | None:
        """The cluster's model, when this gateway can't answer for it."""
        model = self._cluster_model
        if model is None:
            return None
        if self._has_weights:
            return model if model.digest != self.digest else None
        return model if model.vocab_size != self._vocab_size else None

    def takes(self, record: WorkerRecord) -> bool:
        return record.capability.model_digest == self.digest

    def check(self, begun_on: str | None) -> None:
        """`begun_on`: digest of the model that an answer began on, if it has.

        Raises ModelReplaced when the cluster serves another now.
        """
        if self.other is not None:
            raise ModelReplaced(f"the cluster serves model {self.other}, not {self}")
        if begun_on not in (None, self.digest):
            raise ModelReplaced("the model that this answer began on has been replaced")
