"""What Prometheus is told."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from lenskit.server.service import Service
from lenskit.server.workers import Note


class Metrics:
    """Counters of one server."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        given: Any = {"registry": self._registry}
        self._jobs = Gauge("lenskit_jobs", "Jobs by model and status", ["model", "status"], **given)
        self._ended = Counter("lenskit_jobs_ended", "Jobs that ended, by model and how", ["model", "status"], **given)
        self._batches = Counter("lenskit_batches", "Batches begun, by model", ["model"], **given)
        buckets = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        said = "Rows of a batch in which jobs begin"
        self._rows = Histogram("lenskit_batch_rows", said, ["model"], buckets=buckets, **given)
        self._restarts = Counter("lenskit_worker_restarts", "Workers that died", ["model"], **given)
        self._ready = Gauge("lenskit_workers_ready", "Workers that are ready, by model", ["model"], **given)
        self._memory = Gauge("lenskit_device_memory_used_bytes", "Of each device", ["model", "device"], **given)

    def count(self, model: str, note: Note) -> None:
        """Something happened in a worker of a model."""
        if note["event"] == "begun":
            self._batches.labels(model).inc(0 if note["joined"] else 1)
            self._rows.labels(model).observe(note["rows"])
        elif note["event"] == "over":
            self._ended.labels(model, note["status"]).inc()
        elif note["event"] == "restart":
            self._restarts.labels(model).inc()

    def text(self, service: Service) -> bytes:
        """All of it, as Prometheus reads it."""
        for (model, status), n in service.jobs.counts().items():
            self._jobs.labels(model, status).set(n)
        for model in service.served:
            self._ready.labels(model).set(service.crew.ready(model) if service.crew else 0)
            for device in service.crew.memory(model) if service.crew else ():
                self._memory.labels(model, device["device"]).set(device["used"])
        return generate_latest(self._registry)
